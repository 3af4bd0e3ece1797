"""Operations of training by image, counted on fake tensors, and what a GPU needs for them at its peak."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from d2g.core.distributed import process_group
from d2g.core.logs import log_once
from d2g.core.peak_flops import A100_BF16, peak_flops
from d2g.diffusion.pipelines import open_pipeline
from distill.config.run import DistillConfig
from distill.losses.clip_guidance import ClipGuidance, build_clip_guidance
from distill.losses.gradient_penalty import DiscriminatorInput, exact_penalty
from distill.models.student import Student
from distill.planning.cost import PASSES
from distill.planning.fake_networks import (
    autoencoder_distances,
    build_meta_discriminator,
    build_meta_student,
    discriminator_input,
    fake_batch,
    fake_forward,
    latent_metric,
    pixel_features_of,
    planning_config,
    to_fake,
)
from latent_lpips.distance import LatentLPIPS
from latent_lpips.fused import distance_with_gradient

UTILIZATION = 0.4
"""Assumed share of the peak that training reaches."""


class Flops(TorchDispatchMode):
    """Counts the FLOP of matrix products, convolutions and attention, with torch's formulas.

    FlopCounterMode also follows modules, which fails where a gradient is asked of a leaf.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total: float = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if (formula := flop_registry.get(func.overloadpacket)) is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=result)
        return result


def count(run: Callable[[], Any]) -> float:
    """FLOP of `run`, with attention as plain matrix products: kernels that recompute count the same."""
    with Flops() as flops, sdpa_kernel(SDPBackend.MATH):
        run()
    return float(flops.total)


def flop_per_image(config: DistillConfig) -> float:
    """FLOP of training per image: forward and backward passes of student, discriminator and losses.

    The mean over many steps: the gradient penalty and the student's update come at their intervals.
    Recomputed activations and text encoders do not count (model FLOPs, Chowdhery et al. 2022, appendix B).
    Reads configs of the teacher, no weights.
    """
    student = build_meta_student(config)
    discriminator = build_meta_discriminator(config.teacher, config.gan) if config.adversarial else None
    metric = latent_metric(config, student.latent_shape[0])
    distances = autoencoder_distances(config.teacher, config.regression)
    guide = build_clip_guidance(config.clip_guidance, config.teacher, "meta")
    # As in distill.planning.memory: the first backward pass is one on data.
    torch.ones((), requires_grad=True).backward()
    with FakeTensorMode():
        networks: list[nn.Module | None] = [student, metric, guide, *distances]
        if discriminator is not None:
            networks += [discriminator, *pixel_features_of(discriminator)]
        for network in networks:
            if network is not None:
                to_fake(network)
        losses = _losses(config, student.latent_shape, metric, distances, guide)
        if discriminator is None:
            without_gradient = (PASSES[config.stage] - 1) * _student_forward(config, student)
            return _student_pass(config, student) + without_gradient + losses
        adversarial = _discriminator(config, student, discriminator)
        every = config.gan.d_steps_per_g_step
        # Where one forward pass does not serve both updates, the update of D has one of its own.
        separate = config.engine.gradient_accumulation > 1 or config.engine.own_generator_passes
        own_pass = 1.0 if separate else 1 - 1 / every
        forward = _student_forward(config, student)
        return (_student_pass(config, student) + losses) / every + own_pass * forward + adversarial


def _student_forward(config: DistillConfig, student: Student) -> float:
    """FLOP of a forward pass of one row."""
    batch = fake_batch(open_pipeline(config.teacher), student, 1)
    with torch.no_grad():
        return count(lambda: fake_forward(student, batch))


def _student_pass(config: DistillConfig, student: Student) -> float:
    """FLOP of a forward and backward pass of one row."""
    batch = fake_batch(open_pipeline(config.teacher), student, 1)
    return count(lambda: fake_forward(student, batch).sum().backward())


def _losses(
    config: DistillConfig,
    shape: tuple[int, int, int],
    metric: LatentLPIPS | None,
    distances: Sequence[nn.ModuleList],
    guide: ClipGuidance | None,
) -> float:
    """FLOP of the regression losses and of the guidance by CLIP, with their gradients, for one row."""
    pred, target, total = torch.empty(1, *shape, requires_grad=True), torch.empty(1, *shape), 0.0
    # The gradient of LatentLPIPS is part of its forward pass.
    if metric is not None:
        layers, heads = metric.trunk.layers(), list(metric.heads)
        passes = {"latent_lpips": 1, "e_latent_lpips": config.regression.draws}
        row = count(lambda: distance_with_gradient(layers, heads, pred, target))
        total += row * sum(passes.get(name, 0) for name in config.regression.names)
    for distance, _ in distances:
        total += count(partial(_backward, distance, pred, target))
    if guide is not None:
        text, places = torch.empty(1, guide.model.config.projection_dim), torch.empty(1, 2)
        total += count(partial(_backward, guide, pred, text, places))
    return total


def _backward(function: Callable[..., Tensor], *args: Tensor) -> None:
    function(*args).sum().backward()


def _discriminator(config: DistillConfig, student: Student, discriminator: nn.Module) -> float:
    """FLOP of the discriminator per image: its update, the penalty, and the student's adversarial loss."""
    gan = config.gan
    inputs = discriminator_input(gan, fake_batch(open_pipeline(config.teacher), student, 1))
    generated = replace(inputs, latents=torch.empty_like(inputs.latents, requires_grad=True))

    def score(batch: DiscriminatorInput) -> Any:
        return sum(logits.sum() for logits in discriminator(*batch.args).values())

    own_pass = count(lambda: score(inputs).backward())
    with _frozen(discriminator):
        student_pass = count(lambda: score(generated).backward())
        with torch.no_grad():
            real_logits = count(lambda: score(inputs)) if gan.loss == "rpgan" else 0.0
    # Real and fake rows, for the approximated penalty real rows again, and the student's update.
    passes = 3 if gan.active_penalty == "approx" else 2
    total = passes * own_pass + (student_pass + real_logits) / gan.d_steps_per_g_step
    if gan.active_penalty in ("none", "approx"):
        return total
    row = count(lambda: exact_penalty(gan, discriminator, inputs, inputs)[0].backward())
    share = gan.r1_rows / config.train.batch_size if gan.active_penalty == "single" else 1.0
    return total + share * row / gan.penalty_interval


@contextmanager
def _frozen(network: nn.Module) -> Iterator[None]:
    network.requires_grad_(False)
    yield
    network.requires_grad_(True)


def seconds_per_image_at_peak(config: DistillConfig, device: torch.device) -> float | None:
    """Seconds that the run's GPUs together need for an image at the peak of their data sheet.

    None on a CPU, and where the peak of the card is unknown, which is logged once.
    """
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    peak = peak_flops(name, config.train.precision)
    if peak is None:
        log_once(f"reports have no MFU: the peak FLOP/s of {name} is not in d2g/core/peak_flops.py")
        return None
    return flop_per_image(config) / (peak * process_group.world_size())


def gpu_days(config: DistillConfig, evaluations: int, model: str = "") -> float | None:
    """A100 GPU-days of so many network evaluations, with their backward passes (in consistency distillation,
    of one in four); None for an unknown teacher.

    An estimate from the operations of the student's network: a backward pass costs two forward passes, and a
    GPU reaches UTILIZATION of its peak. Losses, text encoders and reading are not counted.
    """
    with planning_config(config, model) as planned:
        if planned is None:
            return None
        student = build_meta_student(planned)
        with FakeTensorMode():
            to_fake(student)
            forward = _student_forward(planned, student)
    passes = evaluations + 2 * evaluations / PASSES.get(config.stage, 1)
    return forward * passes / (UTILIZATION * A100_BF16) / 86_400
