"""A blind side-by-side study of two models by people (Wuerstchen, section 4.2 and appendix C)."""
