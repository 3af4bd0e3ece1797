"""Pair data sets: generate, store, verify and read (noise, latents, prompt) rows of a diffusion teacher."""

from typing import TYPE_CHECKING

from d2g.core.lazy_names import lazy_names

if TYPE_CHECKING:
    from pairgen.generate import generate_pairs
    from pairgen.store.dataset import PairDataset
    from pairgen.store.reader import PairReader
    from pairgen.store.writer import PairWriter

_MODULES = {
    "PairDataset": "pairgen.store.dataset",
    "PairReader": "pairgen.store.reader",
    "PairWriter": "pairgen.store.writer",
    "generate_pairs": "pairgen.generate",
}
__all__ = ["PairDataset", "PairReader", "PairWriter", "generate_pairs"]

__getattr__, __dir__ = lazy_names(__name__, _MODULES)
