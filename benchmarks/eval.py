"""Evaluation against the packages that people use: Frechet distance, statistics, precision and recall.

    python benchmarks/eval.py agreement|frechet|statistics|neighbours|images [--quick]

Ratios are of one run on one machine, contestants taking turns. `--quick` takes small sizes and writes
nothing; else each part writes eval_PART_DATE_DEVICE.md beside this script. `agreement` fails where a number
is not the judges'.
"""

import argparse
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import eval_agreement, eval_images, eval_neighbours
from benchmarks.common import compare, median, table, write
from d2g.core.seeds import generator
from eval.metrics.feature_stats import FeatureStats, Origin
from eval.metrics.frechet import frechet_distance

JUDGES = (
    "scipy",
    "scikit-learn",
    "prdc",
    "torch-fidelity",
    "torchmetrics",
    "clean-fid",
    "dreamsim",
    "pillow",
)
ORIGIN = Origin(features="benchmark", features_sha256="", resize="native", source="random rows")


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is measured."""

    dim: int = 2048
    rows: int = 10_000
    many_rows: int = 50_000
    repeats: int = 3
    memory_gib: int = 12
    files: int = 160


def features(count: int, dim: int, seed: int, shift: float = 0.0) -> Tensor:
    """fp32 rows whose covariance's eigenvalues fall as 1 / i, about as Inception's do, around a mean."""
    scale = (torch.arange(dim) + 1.0) ** -0.5
    turn = torch.linalg.qr(torch.randn(dim, dim, generator=generator(dim)))[0]
    return torch.randn(count, dim, generator=generator(seed)) * scale @ turn + 0.5 + shift * scale


def shown(results: Mapping[str, Any]) -> str:
    """Results, to see that all measured one thing."""
    return "; ".join(f"{name} {value:.10g}" for name, value in results.items())


def race(calls: Mapping[str, Callable[[], float]], repeats: int) -> list[str]:
    """A table of the median seconds of calls that return the same number; ours is the first."""
    results: dict[str, float] = {}

    def keep(name: str) -> Callable[[], None]:
        return lambda: results.update({name: calls[name]()})

    seconds = compare({name: keep(name) for name in calls}, repeats)
    ours = median(seconds[next(iter(calls))])
    rows = [
        (name, median(times), min(times), max(times), median(times) / ours) for name, times in seconds.items()
    ]
    lines = table(("contestant", "median s", "min s", "max s", "times ours"), rows)
    return [*lines, "", f"Results: {shown(results)}."]


# Frechet


def frechet(sizes: Sizes) -> list[str]:
    """The distance of two means and covariances."""
    from scipy.linalg import sqrtm
    from torch_fidelity.metric_fid import fid_statistics_to_metric
    from torchmetrics.image.fid import _compute_fid

    a, b = (features(sizes.rows, sizes.dim, seed, 0.1 * seed).double() for seed in (0, 1))
    moments = [(rows.mean(0), rows.T.cov()) for rows in (a, b)]
    (mean_a, cov_a), (mean_b, cov_b) = moments
    stats = [{"mu": mean.numpy(), "sigma": cov.numpy()} for mean, cov in moments]

    def by_sqrtm() -> float:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            root = sqrtm((cov_a @ cov_b).numpy())
        return float((mean_a - mean_b).square().sum() + (cov_a + cov_b).trace() - 2 * np.trace(root).real)

    calls = {
        "diffusion2gan": lambda: frechet_distance(mean_a, cov_a, mean_b, cov_b),
        "scipy.linalg.sqrtm (pytorch-fid, clean-fid)": by_sqrtm,
        "torch-fidelity (eigvals)": lambda: fid_statistics_to_metric(*stats, verbose=False)[
            "frechet_inception_distance"
        ],
        "torchmetrics (eigvals)": lambda: _compute_fid(mean_a, cov_a, mean_b, cov_b).item(),
    }
    head = f"## Frechet distance of two covariances [{sizes.dim}, {sizes.dim}], float64"
    return [head, "", *race(calls, sizes.repeats)]


# Statistics


def statistics(sizes: Sizes) -> list[str]:
    """Rows in batches of 64 to mean and covariance."""
    from torch_fidelity.metric_fid import fid_features_to_statistics
    from torchmetrics.image.fid import FrechetInceptionDistance

    rows = features(sizes.rows, sizes.dim, 0)

    class Pass(torch.nn.Module):
        num_features = sizes.dim

        def forward(self, features: Tensor) -> Tensor:
            return features

    def ours() -> float:
        stats = FeatureStats(sizes.dim, ORIGIN)
        for batch in rows.split(64):
            stats.update(batch)
        return float(stats.covariance.sum())

    def by_fidelity() -> float:
        features = torch.cat(list(rows.split(64)))
        return float(fid_features_to_statistics(features)["sigma"].sum())

    def by_torchmetrics() -> float:
        metric = FrechetInceptionDistance(feature=Pass())
        for batch in rows.split(64):
            metric.update(batch, real=True)
        mean = metric.real_features_sum / sizes.rows
        scatter = metric.real_features_cov_sum - sizes.rows * torch.outer(mean, mean)
        return float(scatter.sum() / (sizes.rows - 1))

    calls = {
        "diffusion2gan (streaming, centred)": ours,
        "torch-fidelity (numpy.cov of all rows)": by_fidelity,
        "torchmetrics (streaming, not centred)": by_torchmetrics,
    }
    head = f"## Mean and covariance of {sizes.rows:,} rows of {sizes.dim} in batches of 64"
    return [head, "", *race(calls, sizes.repeats), "", "The result is the sum of the covariance."]


PARTS: dict[str, Callable[[Sizes], list[str]]] = {
    "agreement": lambda sizes: eval_agreement.agreement(),
    "frechet": frechet,
    "statistics": statistics,
    "neighbours": lambda sizes: eval_neighbours.neighbours(
        {sizes.rows: sizes.repeats, sizes.many_rows: 1}, sizes.dim, sizes.memory_gib
    ),
    "images": lambda sizes: eval_images.images(sizes.files, sizes.repeats),
}


def main() -> None:
    """Run the part asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--quick", action="store_true", help="small sizes; nothing is written")
    args = parser.parse_args()
    sizes = Sizes(dim=256, rows=1000, many_rows=2000, repeats=2, files=64) if args.quick else Sizes()
    lines = [f"- judges: {', '.join(f'{name} {version(name)}' for name in JUDGES)}", ""]
    lines += PARTS[args.part](sizes)
    if args.quick:
        print("\n".join(lines))
    else:
        write(f"eval_{args.part}", "Evaluation against published packages", lines)


if __name__ == "__main__":
    main()
