"""Memory of a training run per GPU, predicted from its config without weights or a GPU.

Weights, gradients and optimiser states are counted; what networks keep for the backward pass is found out by
running them on fake tensors, which have shapes and no data, and adding up what autograd saves.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

from d2g.core.distributed import engine
from d2g.diffusion import pretrained
from d2g.diffusion.conditioning import Conditioning
from d2g.diffusion.latents import decode
from d2g.diffusion.pipelines import family_of, open_pipeline
from distill.config.components import OptimConfig
from distill.config.run import DistillConfig
from distill.losses.gradient_penalty import r1_penalty
from distill.models.row_dropout import give_keys
from distill.models.student import Student, check_teacher, meta_student, set_trainable
from distill.models.unet_discriminator import Discriminator
from distill.planning.reference_models import NAMES, configs_only
from distill.planning.saved_activations import Kept, saved
from latent_lpips.lpips import PixelLPIPS

STATES = 8
"""Bytes of an optimiser's states by parameter: two moments in fp32."""

CONTEXT_GIB = 0.5
"""What CUDA takes for itself."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """GiB on one GPU at the worst moment of a step, less the CUDA context (about 0.5) and fragmentation."""

    weights: float
    optimizer: float
    average: float
    frozen: float
    """Text encoders, and the autoencoder where it is used."""
    working: float
    """Gradients, and what is kept for the backward pass, at the worst moment."""

    @property
    def total(self) -> float:
        return self.weights + self.optimizer + self.average + self.frozen + self.working


def predict(config: DistillConfig, world_size: int) -> Memory:
    """Memory of a run on `world_size` processes. Reads configs of the teacher's pieces, no weights.

    Of the regression's own networks only those of `lpips` are counted, which differentiates the decoder too;
    a distance of latents keeps little.
    """
    student = _student(config)
    discriminator = _discriminator(config) if config.stage == "gan" else None
    pixels = _pixels(config) if config.regression.kind == "lpips" else None
    frozen = _bytes(p for model in _frozen(config) for p in model.parameters())
    frozen += _bytes(pixels[0].parameters()) if pixels is not None else 0.0
    # Autograd's first pass decides whether it has threads. On fake tensors it would start some, and processes
    # forked from this one could not train.
    torch.ones((), requires_grad=True).backward()
    with FakeTensorMode():
        for network in (student, discriminator):
            if network is not None:
                _without_data(network)
                if config.engine.activation_checkpointing:
                    engine.recompute(list(family_of(config.teacher).shard_units(network)))
        rows = config.train.batch_size / world_size / config.engine.gradient_accumulation
        g = _kept(config, student, partial(_generate, student))
        shards = (config.engine.shard_size or world_size) if config.engine.parallel == "fsdp" else 1
        # DDP's buckets hold the gradients of both networks for as long as the run lasts.
        kept = config.engine.parallel == "ddp" and world_size > 1
        working = g.of(rows)
        if pixels is not None:  # the student's graph waits meanwhile
            _without_data(pixels)
            working += _distance(pixels, student.latent_shape).of(rows)
        working = max(working, _update(student, config.optim, shards, kept))
        trained: list[tuple[nn.Module, OptimConfig]] = [(student, config.optim)]
        if discriminator is not None:
            trained.append((discriminator, config.gan.optim))
            working = max(working, _with_discriminator(config, discriminator, g, rows, shards, kept))
        if kept:
            working += sum(_bytes(_trained(network)) for network, _ in trained)
    whole = sum(_bytes(network.parameters()) for network, _ in trained)
    states = sum(STATES / 4 * _bytes(_trained(network)) for network, _ in trained)
    gib = 2.0**30
    return Memory(
        weights=whole / shards / gib,
        optimizer=states / shards / gib,
        average=_bytes(student.parameters()) / shards / gib,
        frozen=frozen / gib,
        working=working / gib,
    )


def forecast(config: DistillConfig, gpus: int, model: str = "") -> dict[str, Any] | None:
    """GiB per GPU by what takes them, and `total`. When the teacher is not on this disk, the networks of
    `model` (a preset's) stand in for it, and `assumed` says so; None when that model is not known either.
    """
    if config.teacher in pretrained.SHIPPED or Path(config.teacher or "-").is_dir():
        return _rounded(predict(config, gpus))
    if model not in NAMES:
        return None
    with TemporaryDirectory() as folder:
        found = predict(replace(config, teacher=configs_only(model, Path(folder) / model)), gpus)
    return {**_rounded(found), "assumed": f"{NAMES[model]}'s networks; the teacher is not on this disk"}


def _rounded(memory: Memory) -> dict[str, Any]:
    return {**{k: round(v, 3) for k, v in asdict(memory).items()}, "total": round(memory.total, 3)}


def too_large(config: DistillConfig, total_gib: float, device_gib: float) -> str | None:
    """Why a run does not fit a GPU of `device_gib`, and what to change first; None where it fits."""
    needed = total_gib + CONTEXT_GIB
    if needed <= device_gib:
        return None
    ways = {
        "engine.parallel=fsdp over several GPUs": config.engine.parallel != "fsdp",
        "engine.activation_checkpointing=true": not config.engine.activation_checkpointing,
        "a larger engine.gradient_accumulation": True,
        "train.precision=bf16": config.train.precision != "bf16",
    }
    first = ", ".join([way for way, open_ in ways.items() if open_][:3])
    return (
        f"stage {config.stage} needs about {needed:.1f} GiB per GPU, there are {device_gib:.1f}; set {first}"
    )


def _update(network: nn.Module, optim: OptimConfig, shards: int, kept: bool) -> float:
    """Bytes of gradients, unless they are `kept` in any case, and of what the optimiser's step makes of them
    where it is not one kernel."""
    temporary = 1.0 if optim.name in ("adamw", "radam") else 0.0
    return ((not kept) + temporary) * _bytes(_trained(network)) / shards


def _with_discriminator(
    config: DistillConfig, discriminator: Discriminator, g: Kept, rows: float, shards: int, kept: bool
) -> float:
    """D's update while the student's graph waits: real and fake kept, or D's gradients, or its penalty."""
    waiting = g.of(rows) if config.engine.gradient_accumulation == 1 else 0.0
    d = _kept(config, discriminator, lambda b: discriminator(b.noise, b.noise, b.text))
    passes = 3 if config.gan.active_penalty == "approx" else 2
    gradients = _bytes(_trained(discriminator)) / shards
    update = _update(discriminator, config.gan.optim, shards, kept)
    if config.gan.active_penalty in ("none", "approx"):
        return waiting + max(d.of(passes * rows), update)
    # The penalty has a pass of its own, whose gradients are there when the others begin.
    one = 1 if config.gan.active_penalty == "single" else rows
    largest = max(d.of(passes * rows), _penalty(discriminator, config).of(one))
    return waiting + max(gradients + largest, update)


@dataclass(frozen=True)
class _Rows:
    noise: Tensor
    text: Conditioning
    guidance: tuple[Tensor, ...]


def _rows(config: DistillConfig, network: Any, count: int) -> _Rows:
    unet, tokens = network.unet.config, 77
    size = unet.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    noise = torch.empty(count, unet.in_channels, height, width)
    if isinstance(network, Student) and not network.reads_text:
        return _Rows(noise, Conditioning.from_labels(torch.zeros(count, dtype=torch.int64)), ())
    pooled = None
    if unet.addition_embed_type == "text_time":
        pooled = torch.empty(
            count, unet.projection_class_embeddings_input_dim - 6 * unet.addition_time_embed_dim
        )
    told = (torch.empty(count),) if isinstance(network, Student) and network.guided else ()
    hidden = torch.empty(count, tokens, unet.cross_attention_dim)
    return _Rows(noise, Conditioning.from_text(hidden, pooled), told)


def _generate(student: Student, b: _Rows) -> Tensor:
    give_keys(student, torch.zeros(len(b.noise), dtype=torch.int64))
    latents: Tensor = student(b.noise, b.text, *b.guidance)
    return latents


def _kept(config: DistillConfig, network: Any, run: Callable[[_Rows], Any]) -> Kept:
    """Two small batches tell what a pass keeps in any case, and what it keeps for each row."""
    half = config.train.precision == "bf16"
    one, two = (saved(network, partial(lambda n: run(_rows(config, network, n)), n), half) for n in (1, 2))
    fixed = 2 * one - two
    if config.engine.parallel == "fsdp":  # gathered weights are freed after each layer
        fixed = 0.0
    return Kept(fixed=fixed, row=two - one)


def _penalty(discriminator: Discriminator, config: DistillConfig) -> Kept:
    """Of a pass whose gradient is differentiated again."""
    b = _rows(config, discriminator, 1)
    with sdpa_kernel(SDPBackend.MATH):
        row = saved(discriminator, lambda: r1_penalty(discriminator, b.noise, b.noise, b.text), False)
    return Kept(fixed=0.0, row=row)


def _distance(pixels: nn.ModuleList, shape: tuple[int, int, int]) -> Kept:
    """Of LPIPS between the student's latents and the teacher's, in fp32."""

    def of(rows: int) -> float:
        pred = torch.empty(rows, *shape, requires_grad=True)
        return saved(pixels, lambda: pixels[0](pred, torch.empty(rows, *shape)), False)

    one, two = of(1), of(2)
    return Kept(fixed=2 * one - two, row=two - one)


def _student(config: DistillConfig) -> Student:
    check_teacher(config.teacher, config.stage, config.student)
    student = meta_student(config.teacher, config.student_timestep, config.student, config.seed)
    set_trainable(student, config.student)
    return student


def _discriminator(config: DistillConfig) -> Discriminator:
    with torch.device("meta"):
        return Discriminator(pretrained.load_on_meta(config.teacher, "unet"), config.gan)


def _pixels(config: DistillConfig) -> nn.ModuleList:
    """LPIPS as the config has it, with random weights, and the decoder before it, without any."""
    vae, options = pretrained.autoencoder_on_meta(config.teacher), config.regression
    resize = options.lpips_resize or None
    metric = PixelLPIPS(options.lpips_net, pretrained=False, decode=partial(decode, vae), resize=resize)
    return nn.ModuleList([metric, vae.requires_grad_(False)])


def _without_data(network: nn.Module) -> None:
    """Parameters and buffers as fake tensors on the CPU; to be called in a FakeTensorMode."""
    for module in network.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = nn.Parameter(torch.empty(p.shape, dtype=p.dtype), p.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _frozen(config: DistillConfig) -> list[nn.Module]:
    """Text encoders, and the autoencoder where anything is decoded or encoded."""
    components = [p for p in open_pipeline(config.teacher).components if p.startswith("text_encoder")]
    pictures = config.regression.kind == "lpips" or config.gan.real or config.train.preview_prompts
    if pictures and (autoencoder := family_of(config.teacher).autoencoder) is not None:
        components.append(autoencoder)
    return [pretrained.load_on_meta(config.teacher, component) for component in components]


def _trained(network: nn.Module) -> list[nn.Parameter]:
    return [p for p in network.parameters() if p.requires_grad]


def _bytes(parameters: Any) -> float:
    """In fp32."""
    return 4.0 * sum(int(p.numel()) for p in parameters)
