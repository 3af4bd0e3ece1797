"""The metric registry. `Metric` describes one entry of `--metrics`; everything that lists metrics reads it.

This module and the files in `eval/metrics/definitions/` import no torch, so that a command can list metrics
without delay. `compute` functions import what they need when they run.
"""

import importlib
import pkgutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, get_args

from d2g.core.config import nearest
from d2g.core.errors import SettingError

if TYPE_CHECKING:
    from torch import Tensor

Models = Mapping[str, Mapping[str, str]]
"""Facts of the networks of a result, by name: {"features": {"name": "inception", "sha256": ...}, ...}."""

Better = Literal["lower", "higher", ""]
"""Which end of a number is the good one; "" where neither is."""

Interval = Literal["normal", "wilson", "bootstrap", "none"]
"""How the 95 % interval follows from an `Estimate`: value +- 1.96 standard errors; Wilson's score interval of
a share of `count` cases; bootstrap percentiles of the mean of `values`; or no interval.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """One computed value with what its interval needs. Without those facts the value has no interval."""

    value: float
    standard_error: float | None = None
    count: int = 0
    values: "Tensor | None" = None


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricResult:
    """Result of `Metric.compute`: estimates by the key of their number, and facts for `EvalResult`.

    `counts` and `neighbors` are merged into the fields of the same meaning of `eval.result.EvalResult`.
    """

    estimates: Mapping[str, Estimate]
    counts: Mapping[str, int] = field(default_factory=dict)
    neighbors: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricNumber:
    """A number that a metric reports under `key` in results. `label` may depend on the networks used."""

    key: str
    label: str | Callable[[Models], str]
    better: Better
    interval: Interval

    def __post_init__(self) -> None:
        for name, allowed in (("better", get_args(Better)), ("interval", get_args(Interval))):
            if getattr(self, name) not in allowed:
                raise SettingError(
                    f"metric number {self.key}: {name} is {getattr(self, name)!r}; expected one of {allowed}"
                )


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """One entry of `--metrics`. It computes one number, or several that belong together (`more`).

    `networks` names the entries of `eval.measure.required_networks.LOADERS` that must have measured the
    images. `compute` takes an `eval.metrics.inputs.MetricInputs`. The rest is optional:

    - `key`: the name of the number in results, where it differs from `name`.
    - `paired`: compares each image with an image of a second source from the same noise.
    - `pair_distance`: for a paired metric without a network; (uint8 [B, 3, H, W], the same) -> [B].
    - `needs_classes`: the feature network must have a classifier.
    - `repeats_prompts`: a sampler draws `Protocol.diversity_images` images per prompt for this metric.
    - `all_reference_rows`: reference statistics keep every row for this metric, not a random subset.
    - `ranks_images`: the report shows the images with the best and the worst values.
    - `data_source`: works only with protocols of this `EvalDataSource`, which measures its rows.
    - `check_count`: raises UserError for too few images; takes (count, protocol, feature dimension).
    """

    name: str
    description: str
    label: str | Callable[[Models], str]
    better: Better
    interval: Interval
    networks: tuple[str, ...]
    needs_reference: bool
    compute: Callable[[Any], MetricResult]
    key: str = ""
    more: tuple[MetricNumber, ...] = ()
    paired: bool = False
    pair_distance: "Callable[[Tensor, Tensor], Tensor] | None" = None
    needs_classes: bool = False
    repeats_prompts: bool = False
    all_reference_rows: bool = False
    ranks_images: bool = False
    data_source: str = ""
    check_count: Callable[[int, Any, int], None] | None = None

    def __post_init__(self) -> None:
        assert self.numbers  # checks `better` and `interval`

    @property
    def numbers(self) -> tuple[MetricNumber, ...]:
        """The numbers that this metric reports, the headline number first."""
        first = MetricNumber(
            key=self.key or self.name, label=self.label, better=self.better, interval=self.interval
        )
        return (first, *self.more)


_REGISTERED: dict[str, Metric] = {}


def register_metric(metric: Metric) -> None:
    """Add a metric of another package. Registering the same one again changes nothing.

    Raises SettingError when another metric has its name or one of its keys.
    """
    registered = _built_in() | _REGISTERED
    if registered.get(metric.name) == metric:
        return
    keys = {number.key for existing in registered.values() for number in existing.numbers}
    if metric.name in registered or keys & {number.key for number in metric.numbers}:
        raise SettingError(f"metric {metric.name!r}: its name or a key is taken; choose another")
    _REGISTERED[metric.name] = metric


def all_metrics() -> dict[str, Metric]:
    """Every metric by name: first those that compare with a reference, last those that compare pairs."""
    metrics = _built_in() | _REGISTERED
    return dict(sorted(metrics.items(), key=lambda item: (item[1].paired, not item[1].needs_reference)))


@cache
def _built_in() -> dict[str, Metric]:
    """Every top-level `Metric` of the files in `eval/metrics/definitions/`, files in alphabetical order."""
    package = importlib.import_module("eval.metrics.definitions")
    names = sorted(module.name for module in pkgutil.iter_modules(package.__path__))
    modules = [importlib.import_module(f"{package.__name__}.{name}") for name in names]
    values = [value for module in modules for value in vars(module).values()]
    return {value.name: value for value in values if isinstance(value, Metric)}


def all_numbers() -> dict[str, MetricNumber]:
    """Every number that some metric reports, by its key."""
    return {number.key: number for metric in all_metrics().values() for number in metric.numbers}


def number_labels(models: Models) -> dict[str, str]:
    """Return the label of each number, given the networks that measured it."""
    return {
        key: number.label if isinstance(number.label, str) else number.label(models)
        for key, number in all_numbers().items()
    }


def check_metrics(names: tuple[str, ...]) -> None:
    """Raise SettingError unless `names` is a non-empty selection of `all_metrics()`."""
    metrics = all_metrics()
    if not names:
        raise SettingError(f"no metrics chosen; choose from {', '.join(metrics)}")
    for name in names:
        if name not in metrics:
            raise SettingError(f"unknown metric {name!r}{nearest(name, metrics)}")


def paired_metrics(names: Collection[str]) -> list[str]:
    """The names among `names` whose metric compares images pair by pair."""
    return [metric.name for metric in all_metrics().values() if metric.paired and metric.name in names]


def referenced_metrics(names: Collection[str]) -> list[str]:
    """The names among `names` whose metric compares with a reference."""
    return [m.name for m in all_metrics().values() if m.needs_reference and m.name in names]


def mean_of_rows(*keys: str) -> Callable[[Any], MetricResult]:
    """A `Metric.compute` whose numbers are the means over images of the rows with the same names."""

    def compute(inputs: Any) -> MetricResult:
        rows = {key: inputs.rows[key].double() for key in keys}
        return MetricResult(
            estimates={
                key: Estimate(value=values.mean().item(), values=values) for key, values in rows.items()
            }
        )

    return compute
