"""Measure FID and other numbers of a student while it trains."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from d2g.core.distributed import process_group
from d2g.core.errors import SettingError
from d2g.core.precision import exact_fp32
from d2g.diffusion import pretrained
from d2g.diffusion.latents import decode
from eval.evaluation import check_networks, evaluate
from eval.measure.rows import MeasureOptions
from eval.protocols.config import EvalRun
from eval.protocols.metric import paired_metrics, referenced_metrics
from eval.runner.samplers import SamplingRequest, sampler_source
from eval.runner.session import EvalSession
from eval.summary import check_reference

_SampleLatents = Callable[[int, Sequence[str]], Tensor]
"""(seed, N prompts) -> latents [N, C, h, w] of the averaged student, the same on every rank."""


def validation_hook(run: EvalRun, teacher: str) -> "StudentValidation":
    """Return what `distill.training.train.train` calls at each validation.

    It evaluates the averaged student and returns the numbers as `val/fid`, `val/clip_score` and so on, the
    same on every rank. `run` sets protocol, metrics, reference, prompts, number of images and weights, as in
    `d2g eval run`; networks and reference are loaded once. Keep `num` small: a validation draws all images,
    and every rank holds all their latents. Numbers of fewer images than the protocol's compare only with each
    other. Raises SettingError for paired metrics.
    """
    if paired := sorted(paired_metrics(run.metrics or run.protocol.metrics)):
        raise SettingError(
            f"metric {paired[0]!r} compares images pair by pair; validation takes fid and the like"
        )
    return StudentValidation(replace(run, student=None, pipeline=None, images=None, teacher=teacher), teacher)


class StudentValidation:
    """The evaluation of a student in training. Its session joins the process group, which must exist."""

    def __init__(self, run: EvalRun, teacher: str) -> None:
        self.run, self.teacher = run, teacher
        self.facts: dict[str, Any] = {}
        """How the last call measured, on rank 0."""

    @cached_property
    def session(self) -> EvalSession:
        """Protocol, networks and reference."""
        return EvalSession(self.run)

    @cached_property
    def request(self) -> SamplingRequest:
        """The images that the student samples. Raises SettingError without prompts."""
        prompts = self.session.prompts or pretrained.default_prompts(self.teacher)
        if not prompts:
            raise SettingError(
                f"--validate {self.run.protocol.name} has no prompts of its own; give --validate-prompts FILE"
            )
        return self.session.sampling_request(prompts)

    @cached_property
    def vae(self) -> Any:
        """The teacher's autoencoder."""
        return pretrained.load_vae(self.teacher).to(self.session.device)

    def open(self) -> None:
        """Load prompts, networks and reference. Raises SettingError and UserError for what is missing."""
        session, prompts = self.session, len(self.request.prompts)
        if (count := session.count or prompts) < 2:
            raise SettingError(f"--validate draws {count} image; expected 2 or more, --validate-num")
        if (compared := referenced_metrics(session.metrics)) and not session.has_reference:
            raise SettingError(
                f"--validate {session.protocol.name} measures {compared[0]}, which needs real images; give "
                "--validate-reference"
            )
        check_networks(session.protocol, session.networks)
        check_reference(session.metrics, session.reference if session.has_reference else None)

    def __call__(self, sample: _SampleLatents, nimg: int) -> dict[str, float]:
        session, request = self.session, self.request
        count = session.count or len(request.prompts)
        # All ranks sample together; decoding is split like any evaluation.
        latents = sample(request.seed, request.texts(range(count)))

        @torch.no_grad()
        def decode_images(numbers: range, texts: list[str]) -> Tensor:
            return decode(self.vae, latents[numbers.start : numbers.stop])

        with exact_fp32(session.device):
            evaluation = evaluate(
                sampler_source(f"{nimg} images", {"kind": "student"}, request, decode_images),
                session.protocol,
                session.networks,
                metrics=session.metrics,
                reference=(lambda: session.reference) if session.has_reference else None,
                count=count,
                allow_fewer=True,
                work=MeasureOptions(batch_size=self.run.batch_size),
                resamples=0,
            )
        self.facts = evaluation.result.comparable_facts()
        # Only rank 0 computes numbers; share them with all ranks.
        numbers = process_group.gather_objects(evaluation.result.numbers())[0]
        return {f"val/{name}": value for name, value in numbers.items()}
