"""Pair data sets: generate, store, verify and read (noise, latents, prompt) rows of a diffusion teacher."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

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


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that `import pairgen` does not load torch."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
