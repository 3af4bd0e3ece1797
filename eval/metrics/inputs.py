"""Inputs of metrics: measured rows, statistics of generated and of real images, and the protocol."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property

from torch import Tensor

from d2g.core.progress import Progress, quiet
from eval.metrics.feature_stats import FeatureStats
from eval.metrics.frechet import frechet_distance
from eval.metrics.intervals import frechet_error
from eval.metrics.precision_recall import precision_recalls
from eval.protocols.protocol import Protocol


@dataclass(frozen=True, kw_only=True)
class MetricInputs:
    """The inputs that every metric receives.

    `rows`: measured values by name, [N] or [N, D], of N images; `prompts`: theirs. `more_rows` and
    `more_prompts`: further images of the same prompts, for `Metric.repeats_prompts`. `generated` and `real`:
    statistics by network; `real` is empty without a reference. `classifier`: features [N, dim] -> logits.
    `resamples`: bootstrap resamples, 0 for no intervals that need them.
    """

    protocol: Protocol
    rows: Mapping[str, Tensor]
    prompts: Sequence[str]
    generated: Mapping[str, FeatureStats]
    real: Mapping[str, FeatureStats]
    classifier: Callable[[Tensor], Tensor] | None = None
    more_rows: Mapping[str, Tensor] = field(default_factory=dict)
    more_prompts: Sequence[str] = ()
    resamples: int = 0
    progress: Progress = quiet

    @cached_property
    def subsets(self) -> tuple[Tensor, Tensor]:
        """Feature rows of `protocol.pr_images` random images of each side: (real, generated)."""
        count, seed = self.protocol.pr_images, self.protocol.seed
        return self.real["features"].sample(count, seed), self.generated["features"].sample(count, seed)

    @property
    def subset_counts(self) -> dict[str, int]:
        """Sizes of `subsets`, as they stand among the counts of a result."""
        real, generated = self.subsets
        return {"pr_images": len(generated), "pr_reference": len(real)}

    def frechet(self, network: str) -> tuple[float, float | None]:
        """Frechet distance of the rows of `network` and its standard error, computed once for all metrics."""
        if network not in self._frechet:
            generated, real = self.generated[network], self.real[network]
            value = frechet_distance(generated.mean, generated.covariance, real.mean, real.covariance)
            error = frechet_error(generated, real, self.resamples, self.protocol.seed, self.progress)
            self._frechet[network] = value, error
        return self._frechet[network]

    @cached_property
    def _frechet(self) -> dict[str, tuple[float, float | None]]:
        return {}

    @cached_property
    def neighborhoods(self) -> dict[str, dict[str, float]]:
        """Precision, recall, density and coverage of `subsets` by k, computed once for all metrics."""
        by_k = precision_recalls(*self.subsets, ks=self.protocol.neighbours)
        return {str(k): asdict(values) for k, values in by_k.items()}
