"""Code that all other packages share.

`d2g.core`: config, errors, seeds, files, distributed. `d2g.data`: readers of text, pictures and tables.
`d2g.vision`: published image networks. `d2g.diffusion`: teachers and their model families.
"""

__all__ = ["core", "data", "diffusion", "vision"]
