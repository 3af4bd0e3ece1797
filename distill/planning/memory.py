"""Prediction of the memory of a training run per GPU, from its config, without weights and without a GPU.

Weights, gradients and optimizer states are counted. The activations that a network saves for the backward
pass are measured: the network runs on fake tensors, which have shapes but no data, and the tensors that
autograd saves are added up.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map_only

from d2g.core.distributed import engine, process_group
from d2g.core.distributed.low_memory_adamw import WORKING_COPIES, moment_bytes
from d2g.diffusion import pretrained
from d2g.diffusion.pipelines import family_of, open_pipeline
from distill.config.optim import OptimConfig
from distill.config.run import DistillConfig, EngineConfig
from distill.losses.clip_guidance import ClipGuidance, build_clip_guidance
from distill.losses.gradient_penalty import r1_penalty
from distill.losses.regression.registry import regression_networks
from distill.models.discriminators import DISCRIMINATORS
from distill.models.student import Student
from distill.models.students import STUDENTS
from distill.planning.choose_precision import decide_precision
from distill.planning.fake_networks import (
    FakeBatch,
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
from distill.planning.reference_models import NAMES
from distill.planning.saved_activations import SavedBytes, peak_bytes, saved_bytes, saved_parts
from latent_lpips.distance import LatentLPIPS
from latent_lpips.fused import GPU_POSITIONS, distance_with_gradient
from latent_lpips.lpips import PixelLPIPS

CONTEXT_GIB = 0.5
"""Memory of the CUDA context."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """GiB on one GPU at the peak of a step, without the CUDA context (about 0.5) and fragmentation."""

    weights: float
    optimizer: float
    average: float
    frozen: float
    """Text encoders, and the autoencoder and the networks of the regression loss if they are used."""
    working: float
    """Gradients, saved activations, and what the regression loss computes with, at the peak."""

    @property
    def total(self) -> float:
        return self.weights + self.optimizer + self.average + self.frozen + self.working


def predict(config: DistillConfig, world_size: int) -> Memory:
    """Predict the memory of a run on `world_size` GPUs. Reads configs of the teacher, no weights."""
    config = decide_precision(config, process_group.own_device())
    student = build_meta_student(config)
    discriminator = build_meta_discriminator(config.teacher, config.gan) if config.adversarial else None
    losses = _Losses(
        autoencoder_distances(config.teacher, config.regression),
        latent_metric(config, student.latent_shape[0]),
        build_clip_guidance(config.clip_guidance, config.teacher, "meta"),
    )
    frozen = _frozen_bytes(config, student, discriminator, losses)

    # The first backward pass of a process decides whether autograd starts threads. On fake tensors it would
    # start some, and processes forked from this one could not train.
    torch.ones((), requires_grad=True).backward()
    with FakeTensorMode():
        _prepare_networks(config, student, discriminator)
        working = _working_bytes(config, world_size, student, discriminator, losses)

    # FSDP2 divides weights, moments and EMA among the ranks.
    shards = _shards(config.engine, world_size)
    trained = [student] if discriminator is None else [student, discriminator]
    gib = 2.0**30
    return Memory(
        weights=sum(_stored_bytes(network) for network in trained) / shards / gib,
        optimizer=_moment_bytes(config, student, discriminator) / shards / gib,
        average=_bytes(_trained(student)) / shards / gib,
        frozen=frozen / gib,
        working=working / gib,
    )


@dataclass(frozen=True)
class _Losses:
    """Networks of the student's losses."""

    distances: list[nn.ModuleList]
    """A distance between decoded latents, and the autoencoder that decodes them."""
    metric: LatentLPIPS | None
    guide: ClipGuidance | None


def _frozen_bytes(
    config: DistillConfig, student: Student, discriminator: nn.Module | None, losses: _Losses
) -> float:
    """Bytes of the networks that no optimizer changes: text encoders, autoencoder, networks of the losses."""
    text_share = 0.5 if config.encodes_text_in_bf16(on_gpu=True) else 1.0
    frozen = text_share * sum(_bytes(encoder.parameters()) for encoder in _text_encoders(config))
    pixel_metrics = [distance for distance, _ in losses.distances if isinstance(distance, PixelLPIPS)]
    feature_networks = [] if discriminator is None else pixel_features_of(discriminator)
    for network in (*_frozen_autoencoder(config), *pixel_metrics, *feature_networks):
        frozen += _bytes(network.parameters())
    # Consistency distillation keeps the teacher.
    frozen += _bytes(student.parameters()) if config.stage == "cd" else 0.0
    frozen += _bytes(losses.guide.parameters()) if losses.guide is not None else 0.0
    return frozen + (_stored_bytes(losses.metric) if losses.metric is not None else 0.0)


def _prepare_networks(config: DistillConfig, student: Student, discriminator: nn.Module | None) -> None:
    """Give the networks fake weights, and store and recompute them as the run does."""
    trained = [student] if discriminator is None else [student, discriminator]
    feature_networks = [] if discriminator is None else pixel_features_of(discriminator)
    for network in (*trained, *feature_networks):
        to_fake(network)
    if config.engine.frozen_weights == "bf16":
        for network in trained:
            engine.store_frozen_in_bf16(network)
    if config.engine.activation_checkpointing:
        engine.recompute(list(STUDENTS[config.student.kind].shard_units(config.teacher, student)))
        if discriminator is not None:
            kind = DISCRIMINATORS[config.gan.discriminator]
            engine.recompute(list(kind.shard_units(config.teacher, discriminator)))
        for network in feature_networks:
            engine.recompute(network.layers())  # type: ignore[operator]


def _moment_bytes(config: DistillConfig, student: Student, discriminator: nn.Module | None) -> float:
    """Bytes of the optimizers' moments on the device."""
    if config.engine.offload_optimizer:
        return 0.0
    networks = [
        (student, config.optim),
        *([] if discriminator is None else [(discriminator, config.gan.optim)]),
    ]
    return float(
        sum(
            moment_bytes(parameter, optim.name == "adamw_8bit")
            for network, optim in networks
            for parameter in _trained(network)
        )
    )


def _working_bytes(
    config: DistillConfig,
    world_size: int,
    student: Student,
    discriminator: nn.Module | None,
    losses: _Losses,
) -> float:
    """Bytes of gradients and saved activations at the peak of a step. Call it in a FakeTensorMode."""
    rows = config.train.batch_size / world_size / config.engine.gradient_accumulation
    shards = _shards(config.engine, world_size)
    # DDP's buckets hold the gradients of all trained networks during the whole run.
    buckets = config.engine.parallel == "ddp" and world_size > 1

    # The student's forward pass, which stays alive during the regression loss.
    student_graph = _activations(config, student, student, partial(fake_forward, student))
    loss = 0.0
    for distance in losses.distances:
        to_fake(distance)
        loss += _distance_activations(distance, student.latent_shape).of(rows)
    if losses.metric is not None:
        to_fake(losses.metric)
        loss += _sweep_bytes(losses.metric, student.latent_shape, rows)
    # The loss is gone before the backward pass begins.
    recomputed = student_graph.recomputed.of(rows)
    working = student_graph.saved.of(rows) + max(loss, recomputed)

    # The peak is the loss, the begin or the end of the backward pass, where gradients have replaced the
    # activations, an optimizer step, or the update of the discriminator.
    gradients = 0.0 if buckets else _bytes(_trained(student)) / shards
    working = max(
        working,
        gradients + recomputed,
        _update_bytes(student, config.optim, config.engine, shards, buckets),
    )
    if discriminator is not None:
        reused = config.engine.gradient_accumulation == 1 and not config.engine.own_generator_passes
        waiting = student_graph.saved.of(rows) if reused else 0.0
        of_d = _discriminator_bytes(config, discriminator, student, rows, world_size, buckets)
        working = max(working, waiting + of_d)
    if buckets:
        working += _bytes(_trained(student))
        working += _bytes(_trained(discriminator)) if discriminator is not None else 0.0
    if losses.guide is not None:
        to_fake(losses.guide)
        working += _guidance_activations(config, losses.guide, student.latent_shape).of(rows)
    return working


def _shards(options: EngineConfig, world_size: int) -> int:
    """Number of processes over which weights, gradients and optimizer states are split."""
    return (options.shard_size or world_size) if options.parallel == "fsdp" else 1


def forecast(config: DistillConfig, gpus: int, model: str = "") -> dict[str, Any] | None:
    """Predicted GiB per GPU: the fields of `Memory`, and `total`.

    If the teacher is not on this disk, the networks of `model`, a key of NAMES, stand in for it, and
    `assumed` says so. Returns None if `model` is unknown as well.
    """
    with planning_config(config, model) as planned:
        if planned is None:
            return None
        memory = _rounded(predict(planned, gpus))
    if planned.teacher == config.teacher:
        return memory
    return {**memory, "assumed": f"{NAMES[model]}'s networks; the teacher is not on this disk"}


def _rounded(memory: Memory) -> dict[str, Any]:
    return {**{k: round(v, 3) for k, v in asdict(memory).items()}, "total": round(memory.total, 3)}


def too_large(config: DistillConfig, total_gib: float, device_gib: float) -> str | None:
    """Why a run does not fit a GPU of `device_gib`, and what to change first; None if it fits."""
    needed = total_gib + CONTEXT_GIB
    if needed <= device_gib:
        return None
    remedies = {
        "engine.parallel=fsdp over several GPUs": config.engine.parallel != "fsdp",
        "engine.activation_checkpointing=true": not config.engine.activation_checkpointing,
        "a larger engine.gradient_accumulation": True,
        "train.precision=bf16": not config.train.bf16,
    }
    first = ", ".join([remedy for remedy, possible in remedies.items() if possible][:3])
    return (
        f"stage {config.stage} needs about {needed:.1f} GiB per GPU, there are {device_gib:.1f}; set {first}"
    )


def _update_bytes(
    network: nn.Module, optim: OptimConfig, options: EngineConfig, shards: int, buckets: bool
) -> float:
    """Bytes of an optimizer step: gradients, unless DDP's buckets hold them, and temporaries.

    The fused optimizers have no temporaries. RAdam has the update, and copies of the weights and its states
    to go back to (distill.training.optim.step_and_restore). LowMemoryAdamW has copies of one parameter.
    """
    trained = _trained(network)
    temporaries = 4.0 * _bytes(trained) if optim.name == "radam" else 0.0
    if optim.name == "adamw_8bit" or options.offload_optimizer:
        temporaries = WORKING_COPIES * max(_bytes([parameter]) for parameter in trained)
    return ((not buckets) * _bytes(trained) + temporaries) / shards


def _discriminator_bytes(
    config: DistillConfig,
    discriminator: nn.Module,
    student: Student,
    rows: float,
    world_size: int,
    buckets: bool,
) -> float:
    """Bytes of D's update: activations of real and fake rows, the gradient penalty, or the optimizer step."""
    # Frozen networks that it reads through count as part of it.
    network = nn.ModuleList([discriminator, *pixel_features_of(discriminator)])
    shards = _shards(config.engine, world_size)
    inputs = partial(discriminator_input, config.gan)
    graph = _activations(config, network, student, lambda b: discriminator(*inputs(b).args))
    parts = 3 if config.gan.active_penalty == "approx" else 2
    recomputed = graph.recomputed.of(rows)
    activations = graph.saved.of(parts * rows) + recomputed
    # Autograd adds a weight's gradients of all parts before it hands over the sum. Until the last part they
    # wait whole: as FSDP2 gathered the weights, or as autocast cast them.
    waiting = _bytes(_trained(discriminator)) * (0.5 if config.train.bf16 else 1.0)
    activations = max(activations, waiting + graph.saved.of(rows) + recomputed)
    gradients = _bytes(_trained(discriminator)) / shards
    update = _update_bytes(discriminator, config.gan.optim, config.engine, shards, buckets)
    update = max(update, recomputed + (0.0 if buckets else gradients))
    if config.gan.active_penalty in ("none", "approx"):
        return max(activations, update)
    # A pass of the penalty is a backward pass of its own: it has the gradients of earlier passes beside it,
    # and leaves gradients for the passes that follow.
    single = config.gan.active_penalty == "single"
    passes = config.gan.r1_rows / world_size if single else config.engine.gradient_accumulation
    penalty = _penalty_bytes(config, network, student, discriminator, 1 if single else rows)
    penalty = max(gradients * (passes > 1) + penalty, gradients)
    # Under FSDP2 the gathered weights stay until the penalty is done.
    if config.engine.parallel == "fsdp":
        penalty += _bytes(discriminator.parameters()) * (0.5 if config.train.bf16 else 1.0)
    return max(gradients + activations, penalty, update)


@dataclass(frozen=True)
class _Activations:
    """Bytes that a forward pass saves, and bytes that the largest recomputed layer adds in backward."""

    saved: SavedBytes
    recomputed: SavedBytes


def _activations(
    config: DistillConfig, network: Any, student: Student, run: Callable[[FakeBatch], Any]
) -> _Activations:
    """Measure the bytes that a forward pass saves, with batches of one row and of two rows."""
    bf16, pipeline = config.train.bf16, open_pipeline(config.teacher)
    sizes = (
        saved_parts(network, partial(lambda n: run(fake_batch(pipeline, student, n)), n), bf16)
        for n in (1, 2)
    )
    saved, recomputed = (SavedBytes.from_batches(*both) for both in zip(*sizes, strict=True))
    # FSDP2 frees the gathered weights after each layer.
    if config.engine.parallel == "fsdp":
        saved = replace(saved, fixed=0.0)
    return _Activations(saved, recomputed)


def _penalty_bytes(
    config: DistillConfig, network: nn.Module, student: Student, discriminator: nn.Module, rows: float
) -> float:
    """Peak bytes of R1 and its backward pass, besides weights and gradients.

    R1 runs in fp32, or in bf16 if FSDP2 gathers bf16 weights. network: the discriminator with its frozen
    feature networks.
    """
    inputs = discriminator_input(
        config.gan, fake_batch(open_pipeline(config.teacher), student, max(1, round(rows)))
    )

    def run() -> None:
        with sdpa_kernel(SDPBackend.MATH):
            penalty = r1_penalty(discriminator, inputs.latents, inputs.noise, inputs.cond, draws=inputs.draws)
            penalty.backward()

    # Run it with gradients that exist already, which are not part of the peak.

    in_bf16 = config.engine.parallel == "fsdp" and config.train.bf16
    units = DISCRIMINATORS[config.gan.discriminator].shard_units(config.teacher, discriminator)
    with _gathered_in_bf16(discriminator, [discriminator, *units]) if in_bf16 else nullcontext():
        parameters = list(network.parameters())
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        peak = peak_bytes(run, [*parameters, *gradients])
        for parameter in parameters:
            parameter.grad = None
    return peak


@contextmanager
def _gathered_in_bf16(network: nn.Module, units: Iterable[nn.Module]) -> Iterator[None]:
    """Context in which a network computes as under FSDP2 with mixed precision.

    Its weights are in bf16, and each of the `units` casts its inputs to bf16.
    """

    def cast_inputs(unit: nn.Module, *inputs: Any) -> Any:
        return tree_map_only(Tensor, lambda t: t.bfloat16() if t.is_floating_point() else t, inputs)

    # Replace the weights, and cast inputs at the units.
    weights = [
        (module, name, parameter)
        for module in network.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None
    ]
    hooks = [unit.register_forward_pre_hook(cast_inputs, with_kwargs=True) for unit in units]
    for module, name, parameter in weights:
        half = nn.Parameter(parameter.detach().bfloat16(), parameter.requires_grad)
        module._parameters[name] = half

    # Put the weights back afterwards.
    try:
        yield
    finally:
        for module, name, parameter in weights:
            module._parameters[name] = parameter
        for hook in hooks:
            hook.remove()


def _distance_activations(distance: nn.ModuleList, shape: tuple[int, int, int]) -> SavedBytes:
    """Bytes that LPIPS between the decoded latents of student and teacher saves, in fp32."""

    def of(rows: int) -> float:
        pred = torch.empty(rows, *shape, requires_grad=True)
        return saved_bytes(distance, lambda: distance[0](pred, torch.empty(rows, *shape)), False)

    return SavedBytes.from_batches(of(1), of(2))


def _guidance_activations(
    config: DistillConfig, guide: ClipGuidance, shape: tuple[int, int, int]
) -> SavedBytes:
    """Bytes that guidance by CLIP saves, counted beside everything else at the peak."""
    width = guide.model.config.projection_dim

    def of(rows: int) -> float:
        latents = torch.empty(rows, *shape, requires_grad=True)
        text, places = torch.empty(rows, width), torch.empty(rows, 2)
        bf16 = config.train.bf16 and config.engine.parallel == "ddp"
        return saved_bytes(guide, lambda: guide(latents, text, places), bf16)

    return SavedBytes.from_batches(of(1), of(2))


def _sweep_bytes(metric: LatentLPIPS, shape: tuple[int, int, int], rows: float) -> float:
    """Bytes at the peak of LatentLPIPS, which a GPU computes for so many rows at a time."""
    pred, target = torch.empty(1, *shape), torch.empty(1, *shape)
    with torch.no_grad():
        row = peak_bytes(
            lambda: distance_with_gradient(metric.trunk.layers(), list(metric.heads), pred, target)
        )
    return row * min(rows, max(1, GPU_POSITIONS // (shape[1] * shape[2])))


def _text_encoders(config: DistillConfig) -> list[nn.Module]:
    components = [p for p in open_pipeline(config.teacher).components if p.startswith("text_encoder")]
    return [pretrained.load_on_meta(config.teacher, component) for component in components]


def _frozen_autoencoder(config: DistillConfig) -> list[nn.Module]:
    """The autoencoder, if images are decoded or encoded."""
    needs_vae = bool(regression_networks(config.regression) & {"vae", "decoder"})
    needs_images = needs_vae or config.gan.real or config.train.preview_prompts
    if needs_images and (autoencoder := family_of(config.teacher).autoencoder) is not None:
        return [pretrained.load_on_meta(config.teacher, autoencoder)]
    return []


def _trained(network: nn.Module) -> list[nn.Parameter]:
    return [p for p in network.parameters() if p.requires_grad]


def _bytes(parameters: Any) -> float:
    """Bytes of parameters in fp32."""
    return 4.0 * sum(int(p.numel()) for p in parameters)


def _stored_bytes(network: nn.Module) -> float:
    """Bytes of parameters in the types that they have."""
    return sum(p.numel() * p.element_size() for p in network.parameters())
