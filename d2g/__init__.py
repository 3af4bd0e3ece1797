"""The ground floor of diffusion2gan: `d2g.core` knows no domain words, `d2g.diffusion` knows teachers."""

__all__ = ["core", "diffusion"]
