"""Configs that evaluate tiny models."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from eval.protocols.config import EvalRun
from eval.protocols.metric import all_metrics


def config(job: Path, **settings: Any) -> EvalRun:
    """FID, CLIP score, precision and recall of 12 images, all from the features of one tiny CLIP.

    Networks that the metrics of `settings` do not need are left out: an evaluation refuses them.
    """
    base = EvalRun(
        prompts=str(job / "prompts.txt"),
        num=12,
        reference=str(job / "photographs"),
        metrics=("fid", "pr", "clip"),
        features="clip",
        weights=(f"features={job / 'clip'}",),
        clip=str(job / "clip"),
        batch_size=4,
        part=4,
        steps=2,
        resamples=10,
    )
    run = replace(base, **settings)
    metrics = run.metrics or run.protocol.metrics
    needed = {network for name in metrics for network in all_metrics()[name].networks}
    unused: dict[str, Any] = {} if "clip" in needed else {"clip": None}
    unused |= {} if "features" in needed else {"features": None, "weights": ()}
    return replace(run, **{name: value for name, value in unused.items() if name not in settings})
