"""Measure FID and other numbers of a student while it trains."""

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


def validation_hook(run: EvalRun, teacher: str) -> Callable[[_SampleLatents, int], dict[str, float]]:
    """Return the function that `distill.training.train.train` calls at each validation.

    It evaluates the averaged student and returns the numbers as `val/fid`, `val/clip_score` and so on, the
    same on every rank. `run` sets protocol, metrics, reference, prompts, number of images and weights, as in
    `d2g eval run`; networks and reference are loaded once, at the first call. Keep `num` small: a validation
    draws all images, and every rank holds all their latents. Numbers of fewer images than the protocol's
    compare only with each other. Raises SettingError for paired metrics.
    """
    if paired := sorted(paired_metrics(run.metrics or run.protocol.metrics)):
        raise SettingError(
            f"metric {paired[0]!r} compares images pair by pair; validation takes fid and the like"
        )

    # The session joins the process group, which exists only once the run has started: open it at first use.
    @cache
    def open_session() -> EvalSession:
        return EvalSession(replace(run, student=None, pipeline=None, images=None, teacher=teacher))

    @cache
    def load_vae() -> Any:
        return pretrained.load_vae(teacher).to(open_session().device)

    def validate(sample: _SampleLatents, nimg: int) -> dict[str, float]:
        session = open_session()
        prompts = session.prompts or pretrained.default_prompts(teacher)
        request, count = session.sampling_request(prompts), session.count or len(prompts)
        # All ranks sample together; decoding is split like any evaluation.
        latents = sample(request.seed, request.texts(range(count)))

        @torch.no_grad()
        def decode_images(numbers: range, texts: list[str]) -> Tensor:
            return decode(load_vae(), latents[numbers.start : numbers.stop])

        evaluation = evaluate(
            sampler_source(f"{nimg} images", {"kind": "student"}, request, decode_images),
            session.protocol,
            session.networks,
            metrics=session.metrics,
            reference=(lambda: session.reference) if session.has_reference else None,
            count=count,
            allow_fewer=True,
            work=MeasureOptions(batch_size=run.batch_size),
            resamples=0,
        )
        # Only rank 0 computes numbers; share them with all ranks.
        numbers = process_group.gather_objects(evaluation.result.numbers())[0]
        return {f"val/{name}": value for name, value in numbers.items()}

    return validate
