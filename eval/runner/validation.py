"""FID and its like while a student trains: where training and measures meet."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from d2g.core.distributed import process_group
from d2g.core.errors import SettingError
from d2g.diffusion import pretrained
from d2g.diffusion.latents import decode
from eval.evaluation import evaluate
from eval.measure.rows import MeasureOptions
from eval.protocols.config import EvalRun
from eval.protocols.metric import paired_metrics
from eval.runner.samplers import sampler_source
from eval.runner.session import EvalSession

_SampleLatents = Callable[[int, Sequence[str]], Tensor]
"""(seed, N prompts) -> latents [N, C, h, w] of the averaged student, the same on every rank."""


def measuring(run: EvalRun, teacher: str) -> Callable[[_SampleLatents, int], dict[str, float]]:
    """What `distill.training.train.train` calls at each validation: an evaluation of the averaged student, its numbers
    as `val/fid`, `val/clip_score` and so on, the same on every rank.

    run: protocol, metrics, reference, prompts, number of images and weights, as of `d2g eval run`; networks
    and reference are loaded once, at the first call. Keep `num` small: a validation draws all, and every rank
    holds all their latents. Numbers of fewer images than the protocol's compare with each other only. Raises
    SettingError for metrics of pairs.
    """
    if paired := sorted(paired_metrics(run.metrics or run.protocol.metrics)):
        raise SettingError(
            f"metric {paired[0]!r} compares images pair by pair; validation takes fid and the like"
        )

    @cache
    def bench() -> EvalSession:  # the run has joined its process group by the first call
        return EvalSession(replace(run, student=None, pipeline=None, images=None, teacher=teacher))

    @cache
    def vae() -> Any:
        return pretrained.load_vae(teacher).to(bench().device)

    def validate(student: _SampleLatents, nimg: int) -> dict[str, float]:
        made = bench()
        prompts = made.prompts or pretrained.default_prompts(teacher)
        drawing, count = made.drawing(prompts), made.count or len(prompts)
        latents = student(drawing.seed, drawing.texts(range(count)))

        @torch.no_grad()
        def images(numbers: range, texts: list[str]) -> Tensor:
            return decode(vae(), latents[numbers.start : numbers.stop])

        found = evaluate(
            sampler_source(f"{nimg} images", {"kind": "student"}, drawing, images),
            made.protocol,
            made.networks,
            metrics=made.metrics,
            reference=(lambda: made.reference) if made.has_reference else None,
            count=count,
            allow_fewer=True,
            work=MeasureOptions(batch_size=run.batch_size),
            resamples=0,
        )
        return {
            f"val/{name}": value
            for name, value in process_group.gather_objects(found.result.numbers())[0].items()
        }

    return validate
