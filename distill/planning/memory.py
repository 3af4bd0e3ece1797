"""Prediction of the memory of a training run per GPU, from its config, without weights and without a GPU.

Weights, gradients and optimizer states are counted. The activations that a network saves for the backward
pass are measured: the network runs on fake tensors, which have shapes but no data, and the tensors that
autograd saves are added up.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from d2g.core.distributed import engine
from d2g.core.distributed.low_memory_adamw import WORKING_COPIES, moment_bytes
from d2g.diffusion import pretrained
from d2g.diffusion.conditioning import Conditioning
from d2g.diffusion.families.base import Pipeline
from d2g.diffusion.latents import decode
from d2g.diffusion.pipelines import family_of, open_pipeline
from distill.config.components import DiscriminatorConfig, OptimConfig, RegressionConfig
from distill.config.run import DistillConfig, EngineConfig
from distill.losses.clip_guidance import ClipGuidance, build_clip_guidance
from distill.losses.gradient_penalty import DiscriminatorInput, r1_penalty
from distill.losses.regression.decoder_features import DecoderFeatures
from distill.losses.regression.registry import regression_networks
from distill.models.discriminators import DISCRIMINATORS, check_discriminator
from distill.models.projected_discriminator import ProjectedDiscriminator
from distill.models.row_dropout import set_dropout_keys
from distill.models.student import Student, check_teacher, meta_student, set_trainable
from distill.planning.reference_models import NAMES, configs_only
from distill.planning.saved_activations import SavedBytes, peak_bytes, saved_bytes
from latent_lpips.config import LPIPSConfig
from latent_lpips.distance import LatentLPIPS
from latent_lpips.fused import GPU_POSITIONS, distance_with_gradient
from latent_lpips.lpips import PixelLPIPS
from latent_lpips.weights import read_lpips_config

PEAK = 312e12
"""Operations per second of an A100 in bf16, by its data sheet."""

UTILIZATION = 0.4
"""Assumed share of the peak that training reaches."""

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
    student = _meta_student(config)
    discriminator = _meta_discriminator(config.teacher, config.gan) if config.stage == "gan" else None
    distances = _autoencoder_distances(config.teacher, config.regression)
    text_share = 0.5 if config.encodes_text_in_bf16(on_gpu=True) else 1.0
    frozen = text_share * _bytes(p for model in _text_encoders(config) for p in model.parameters())
    frozen += _bytes(p for model in _frozen_autoencoder(config) for p in model.parameters())
    pixel_metrics = [metric for metric, _ in distances if isinstance(metric, PixelLPIPS)]
    frozen += _bytes(p for metric in pixel_metrics for p in metric.parameters())
    # The first backward pass of a process decides whether autograd starts threads. On fake tensors it would
    # start some, and processes forked from this one could not train.
    torch.ones((), requires_grad=True).backward()
    view = [] if discriminator is None else _views(discriminator)
    frozen += _bytes(p for network in view for p in network.parameters())
    guide = build_clip_guidance(config.clip_guidance, config.teacher, "meta")
    frozen += _bytes(guide.parameters()) if guide is not None else 0.0
    metric = _latent_metric(config, student.latent_shape[0])
    if metric is not None:
        frozen += sum(p.numel() * p.element_size() for p in metric.parameters())
    with FakeTensorMode():
        if metric is not None:
            to_fake(metric)
        for network in (student, discriminator, *view):
            if network is not None:
                to_fake(network)
        if config.engine.frozen_weights == "bf16":
            for trained_network in (student, discriminator):
                if trained_network is not None:
                    engine.store_frozen_in_bf16(trained_network)
        if config.engine.activation_checkpointing:
            engine.recompute(list(family_of(config.teacher).shard_units(student)))
            if discriminator is not None:
                kind = DISCRIMINATORS[config.gan.discriminator]
                engine.recompute(list(kind.shard_units(config.teacher, discriminator)))
            for network in view:
                engine.recompute(network.layers())  # type: ignore[operator]
        working = _working_bytes(config, world_size, student, discriminator, distances, metric)
        if guide is not None:
            to_fake(guide)
            rows = config.train.batch_size / world_size / config.engine.gradient_accumulation
            working += _guidance_activations(config, guide, student.latent_shape).of(rows)
    shards = _shards(config.engine, world_size)
    trained = [student] if discriminator is None else [student, discriminator]
    gib = 2.0**30
    return Memory(
        weights=sum(p.numel() * p.element_size() for net in trained for p in net.parameters()) / shards / gib,
        optimizer=_moment_bytes(config, student, discriminator) / shards / gib,
        average=_bytes(_trained(student)) / shards / gib,
        frozen=frozen / gib,
        working=working / gib,
    )


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
    distances: list[nn.ModuleList],
    metric: LatentLPIPS | None,
) -> float:
    """Bytes of gradients and saved activations at the peak of a step. Call it in a FakeTensorMode."""
    rows = config.train.batch_size / world_size / config.engine.gradient_accumulation
    shards = _shards(config.engine, world_size)
    # DDP's buckets hold the gradients of all trained networks during the whole run.
    buckets = config.engine.parallel == "ddp" and world_size > 1

    # The student's forward pass, which stays alive during the regression loss.
    student_graph = _activations(config, student, student, partial(_generate, student))
    working = student_graph.of(rows)
    for distance in distances:
        to_fake(distance)
        working += _distance_activations(distance, student.latent_shape).of(rows)
    if metric is not None:
        working += _sweep_bytes(metric, student.latent_shape, rows)

    # The peak is the forward pass, an optimizer step, or the update of the discriminator.
    working = max(working, _update_bytes(student, config.optim, config.engine, shards, buckets))
    if discriminator is not None:
        waiting = student_graph.of(rows) if config.engine.gradient_accumulation == 1 else 0.0
        of_d = _discriminator_bytes(config, discriminator, student, rows, shards, buckets)
        working = max(working, waiting + of_d)
    if buckets:
        working += _bytes(_trained(student))
        working += _bytes(_trained(discriminator)) if discriminator is not None else 0.0
    return working


def _shards(options: EngineConfig, world_size: int) -> int:
    """Number of processes over which weights, gradients and optimizer states are split."""
    return (options.shard_size or world_size) if options.parallel == "fsdp" else 1


def forecast(config: DistillConfig, gpus: int, model: str = "") -> dict[str, Any] | None:
    """Predicted GiB per GPU: the fields of `Memory`, and `total`.

    If the teacher is not on this disk, the networks of `model`, a key of NAMES, stand in for it, and
    `assumed` says so. Returns None if `model` is unknown as well.
    """
    with known_teacher(config, model) as known:
        if known is None:
            return None
        memory = _rounded(predict(known, gpus))
    if known.teacher == config.teacher:
        return memory
    return {**memory, "assumed": f"{NAMES[model]}'s networks; the teacher is not on this disk"}


@contextmanager
def known_teacher(config: DistillConfig, model: str) -> Iterator[DistillConfig | None]:
    """The config with a teacher whose configs can be read: its own, or if it is not on this disk, the
    networks of `model`, a key of NAMES; None if `model` is unknown as well.
    """
    if config.teacher in pretrained.SHIPPED or Path(config.teacher or "-").is_dir():
        yield config
    elif model not in NAMES:
        yield None
    else:
        with TemporaryDirectory() as folder:
            yield replace(config, teacher=configs_only(model, Path(folder) / model))


def gpu_days(config: DistillConfig, evaluations: int, model: str = "") -> float | None:
    """A100 GPU-days of so many network evaluations, each with its backward pass; None for an unknown teacher.

    An estimate from the operations of the student's network: a backward pass costs two forward passes, and a
    GPU reaches UTILIZATION of PEAK. Losses, text encoders and reading are not counted.
    """
    with known_teacher(config, model) as known:
        if known is None:
            return None
        student = _meta_student(known)
        with FakeTensorMode():
            to_fake(student)
            batch = _fake_batch(open_pipeline(known.teacher), student, 1)
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                _generate(student, batch)
    return 3 * float(counter.get_total_flops()) * evaluations / (UTILIZATION * PEAK) / 86_400


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
        "train.precision=bf16": config.train.precision != "bf16",
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
    shards: int,
    buckets: bool,
) -> float:
    """Bytes of D's update: activations of real and fake rows, the gradient penalty, or the optimizer step."""
    # Frozen networks that it reads through count as part of it.
    network = nn.ModuleList([discriminator, *_views(discriminator)])
    inputs = partial(_discriminator_input, config.gan)
    graph = _activations(config, network, student, lambda b: discriminator(*inputs(b).args))
    passes = 3 if config.gan.active_penalty == "approx" else 2
    update = _update_bytes(discriminator, config.gan.optim, config.engine, shards, buckets)
    if config.gan.active_penalty in ("none", "approx"):
        return max(graph.of(passes * rows), update)
    # The penalty has a backward pass of its own, so its gradients exist during the passes that follow.
    gradients = _bytes(_trained(discriminator)) / shards
    penalty_rows = 1 if config.gan.active_penalty == "single" else rows
    penalty = _penalty_activations(config, network, student, discriminator).of(penalty_rows)
    # Under FSDP2 the gathered weights stay until the penalty is done.
    if config.engine.parallel == "fsdp":
        penalty += _bytes(discriminator.parameters()) * (0.5 if config.train.precision == "bf16" else 1.0)
    return max(gradients + max(graph.of(passes * rows), penalty), update)


@dataclass(frozen=True)
class _Batch:
    noise: Tensor
    cond: Conditioning
    guidance: tuple[Tensor, ...]


def _fake_batch(pipeline: Pipeline, student: Student, count: int) -> _Batch:
    """Inputs of `count` rows for a student and its discriminator; `guidance` is empty without that input."""
    noise = torch.empty(count, *student.latent_shape)
    cond = student.family.fake_conditioning(pipeline, student.network.config, count)
    return _Batch(noise, cond, (torch.empty(count),) if student.guided else ())


def _generate(student: Student, b: _Batch) -> Tensor:
    set_dropout_keys(student, torch.zeros(len(b.noise), dtype=torch.int64))
    latents: Tensor = student(b.noise, b.cond, *b.guidance)
    return latents


def _activations(
    config: DistillConfig, network: Any, student: Student, run: Callable[[_Batch], Any]
) -> SavedBytes:
    """Bytes that a forward pass saves, from batches of one and of two rows."""
    bf16, pipeline = config.train.precision == "bf16", open_pipeline(config.teacher)
    sizes = (
        saved_bytes(network, partial(lambda n: run(_fake_batch(pipeline, student, n)), n), bf16)
        for n in (1, 2)
    )
    saved = SavedBytes.from_batches(*sizes)
    # FSDP2 frees the gathered weights after each layer.
    return replace(saved, fixed=0.0) if config.engine.parallel == "fsdp" else saved


def _penalty_activations(
    config: DistillConfig, network: nn.Module, student: Student, discriminator: nn.Module
) -> SavedBytes:
    """Bytes that a pass saves whose gradient is differentiated again, in fp32. network: the discriminator
    with the frozen networks that it reads through."""
    b = _discriminator_input(config.gan, _fake_batch(open_pipeline(config.teacher), student, 1))
    with sdpa_kernel(SDPBackend.MATH):
        row = saved_bytes(
            network,
            lambda: r1_penalty(discriminator, b.latents, b.noise, b.cond, draws=b.draws),
            False,
        )
    return SavedBytes(fixed=0.0, row=row)


def _discriminator_input(gan: DiscriminatorConfig, b: _Batch) -> DiscriminatorInput:
    """Inputs of a discriminator for the rows of a batch."""
    count = DISCRIMINATORS[gan.discriminator].draws
    draws = torch.zeros(len(b.noise), count, dtype=torch.int64) if count else None
    return DiscriminatorInput(b.noise, b.noise, b.cond, None, draws)


def _views(discriminator: nn.Module) -> list[nn.Module]:
    """The frozen networks that a discriminator reads through, or its part that has some."""
    return [part.view for part in discriminator.modules() if isinstance(part, ProjectedDiscriminator)]


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
        bf16 = config.train.precision == "bf16" and config.engine.parallel == "ddp"
        return saved_bytes(guide, lambda: guide(latents, text, places), bf16)

    return SavedBytes.from_batches(of(1), of(2))


def _latent_metric(config: DistillConfig, channels: int) -> LatentLPIPS | None:
    """The LatentLPIPS of the regression loss as the run folds it, without weights; None if there is none.

    If it is not on this disk, one of full width stands in for it.
    """
    if "latent_lpips" not in regression_networks(config.regression):
        return None
    folder = Path(config.lpips) if config.lpips else pretrained.resolve(config.teacher) / "latent_lpips"
    known = (folder / "config.json").is_file()
    shape = read_lpips_config(folder) if known else LPIPSConfig(channels=channels)
    with torch.device("meta"):
        return LatentLPIPS(shape).fold("bf16" if config.train.precision == "bf16" else "fp32")


def _sweep_bytes(metric: LatentLPIPS, shape: tuple[int, int, int], rows: float) -> float:
    """Bytes at the peak of LatentLPIPS, which a GPU computes for so many rows at a time."""
    pred, target = torch.empty(1, *shape), torch.empty(1, *shape)
    with torch.no_grad():
        row = peak_bytes(
            lambda: distance_with_gradient(metric.trunk.layers(), list(metric.heads), pred, target)
        )
    return row * min(rows, max(1, GPU_POSITIONS // (shape[1] * shape[2])))


def _meta_student(config: DistillConfig) -> Student:
    check_teacher(config.teacher, config.stage, config.student)
    student = meta_student(config.teacher, config.student_timestep, config.student, config.seed)
    set_trainable(student, config.student)
    return student


def _meta_discriminator(teacher: str, gan: DiscriminatorConfig) -> nn.Module:
    check_discriminator(teacher, gan)
    return DISCRIMINATORS[gan.discriminator].build_on_meta(teacher, gan)


def _autoencoder_distances(teacher: str, options: RegressionConfig) -> list[nn.ModuleList]:
    """The losses that differentiate the autoencoder, each with the autoencoder beside it, without weights."""
    distances = []
    if "lpips" in options.names:
        vae = pretrained.autoencoder_on_meta(teacher).requires_grad_(False)
        resize = options.lpips_resize or None
        metric = PixelLPIPS(options.lpips_net, pretrained=False, decode=partial(decode, vae), resize=resize)
        distances.append(nn.ModuleList([metric, vae]))
    if "decoder_features" in options.names:
        vae = pretrained.autoencoder_on_meta(teacher)
        distances.append(nn.ModuleList([DecoderFeatures(vae, options.decoder_blocks), nn.Module()]))
    return distances


def to_fake(network: nn.Module, device: str = "cpu") -> None:
    """Replace parameters and buffers by fake tensors. Call it in a FakeTensorMode."""
    for module in network.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = nn.Parameter(
                    torch.empty(p.shape, dtype=p.dtype, device=device), p.requires_grad
                )
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)


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
