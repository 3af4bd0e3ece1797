"""Configs that evaluate tiny models."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from eval.protocols.config import EvalRun


def config(job: Path, **settings: Any) -> EvalRun:
    """FID, CLIP score, precision and recall of 12 images, all from the features of one tiny CLIP."""
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
    return replace(base, **settings)
