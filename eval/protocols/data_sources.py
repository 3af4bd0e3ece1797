"""Data sources: programs that make both the prompts and the real images of a protocol.

A package above `eval` registers one, and protocols name it as `prompts` and `reference`. The callables import
what they need when they are called, so that registering a source costs nothing.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalDataSource:
    """Prompts, reference statistics, feature networks and measures of one data source.

    - `images`: how many images to measure where the protocol leaves the number open.
    - `teacher`: the teacher in whose latent space LatentLPIPS measures, where none is named.
    - `prompts(count)`: the prompts of the first `count` images, list[str].
    - `reference(count, protocol, networks, progress)`: an `eval.measure.reference.Reference` of `count` real
      images, `networks` being feature networks by the name of their rows.
    - `features`: loaders of feature networks (`eval.networks.base.FeatureNet`) by the names that
      `Protocol.features` uses.
    - `measures`: by the name of a metric, a function of the preprocessing that returns
      `eval.measure.measure.Measure` objects by the name of their rows.
    """

    name: str
    images: int
    teacher: str
    prompts: Callable[[int], list[str]]
    reference: Callable[[int, Any, Mapping[str, Any], Any], Any]
    features: Mapping[str, Callable[[], Any]]
    measures: Mapping[str, Callable[[str], Mapping[str, Any]]]


DATA_SOURCES: dict[str, EvalDataSource] = {}
"""The registered data sources by name."""


def register_data_source(source: EvalDataSource) -> None:
    """Make a data source known to protocols. Registering the same one again changes nothing."""
    assert DATA_SOURCES.setdefault(source.name, source) == source, f"{source.name!r} is already registered"
