"""`d2g teacher cascade`: train a small Wuerstchen, the stages A, B and C of a cascade."""
