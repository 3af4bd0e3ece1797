"""The training state of a run (networks, optimizers, EMA), and how it is built, saved and loaded."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from d2g.core.config import digest, to_json
from d2g.core.distributed import checkpoint, process_group, sharded_checkpoint
from d2g.core.distributed import engine as parallel
from d2g.core.distributed.checkpoint import Checkpoint, list_checkpoints, open_checkpoint
from d2g.core.distributed.engine import DistributedModule
from d2g.core.errors import SettingError, UserError
from d2g.core.logs import logger
from d2g.core.seeds import Stream, generator
from d2g.diffusion import pretrained
from d2g.diffusion.fp32_attention import use_fp32_attention
from d2g.diffusion.lora import has_lora
from distill.config.discriminator import DiscriminatorConfig
from distill.config.run import FROM_TEACHER, DistillConfig, EngineConfig
from distill.config.student import GeneratorConfig
from distill.models.discriminator_kind import DiscriminatorKind
from distill.models.discriminators import DISCRIMINATORS
from distill.models.ema import EMA
from distill.models.student import (
    DiffusionStudent,
    Student,
    add_adapters,
    takes_guidance,
)
from distill.models.students import STUDENTS, build_student, build_student_on_meta
from distill.models.text_student import (
    TextStudent,
    load_text_conditioner,
    set_stage_trainable,
    text_conditioner_on_meta,
    text_modules,
)
from distill.student_files import (
    kind_settings,
    load_same_adapters,
    load_student_weights,
    stored_tensors,
    student_folder,
    student_prediction,
)
from distill.training.inputs import weights_sha256_of
from distill.training.optim import optimizer

N = TypeVar("N", bound=nn.Module)

ADDED_LATER = ("channel_base", "channel_max", "feature_heads")
"""Settings of `gan` that the first checkpoints of version 0.2.0 lack, and later ones have in their digests.
Their defaults build the same networks as before, so today's digests leave them out at their defaults.
"""
IN_NO_EARLIER_DIGEST = ("adaptive_weight",)
"""Settings of `gan` that no digest ever held at their defaults. Add each new setting of `gan` here."""
GENERATOR_ADDED_LATER = ("residual", "second_order", "text_bypass")
"""Settings of `student.generator` that are left out at their defaults in the same way."""


def _without_later(
    settings: dict[str, Any], later: tuple[str, ...], defaults: dict[str, Any]
) -> dict[str, Any]:
    """Drop the settings named in `later` that are at their defaults."""
    return {name: value for name, value in settings.items() if name not in later or value != defaults[name]}


@dataclass(frozen=True, kw_only=True)
class NetworkDigests:
    """Digests of the teacher and the settings that determine the networks and their tensors."""

    by_content: str
    """Digest with the content of files instead of their paths, so that files may move."""
    earlier: tuple[str, ...]
    """Digests that earlier versions of the code wrote into checkpoints. They include file paths, or the paths
    of feature networks and real images, or all settings of `gan` with those of `ADDED_LATER`.
    """

    @classmethod
    def of(cls, config: DistillConfig) -> "NetworkDigests":
        """Compute the digests of a run's networks."""
        # The student's settings. Checkpoints from before `student.kind` existed lack `kind` and `generator`.
        settings, teacher = to_json(config), pretrained.denoiser_sha256(config.teacher)
        if config.student.is_diffusion:
            settings["student"] = {
                name: value
                for name, value in settings["student"].items()
                if name not in ("kind", "generator")
            }
        else:
            settings["student"]["generator"] = _without_later(
                settings["student"]["generator"], GENERATOR_ADDED_LATER, to_json(GeneratorConfig())
            )
        # The discriminator's settings, without those that were added later and are at their defaults.
        defaults = to_json(DiscriminatorConfig())
        every_gan = _without_later(settings["gan"], IN_NO_EARLIER_DIGEST, defaults)
        gan = settings["gan"] = _without_later(every_gan, ADDED_LATER, defaults)
        # Real images may change between runs. Feature networks in files are identified by content.
        features = weights_sha256_of(config.gan.feature_networks) or gan["feature_networks"]
        by_content = {"real": "", "feature_networks": features}
        student = [settings[name] for name in ("stage", "seed", "student")]
        return cls(
            by_content=digest([teacher, *student, {**gan, **by_content}]),
            earlier=(
                digest([settings[name] for name in ("stage", "pairs", "teacher", "seed", "student", "gan")]),
                digest([teacher, *student, gan]),
                digest([teacher, *student, {**every_gan, **by_content}]),
            ),
        )


@dataclass
class State:
    """The training state, which a checkpoint holds: networks, optimizers, EMA and progress.

    nimg: images seen. Together with the seed it determines all further rows and random numbers. steps: steps
    taken. stage: ode, gan, text or cd.
    """

    stage: str
    networks: NetworkDigests
    student: DistributedModule
    optim_g: torch.optim.Optimizer
    ema: EMA
    discriminator: DistributedModule | None
    optim_d: torch.optim.Optimizer | None
    nimg: int = 0
    steps: int = 0

    def save(self, writer: sharded_checkpoint.Writer) -> None:
        """Write a checkpoint, or start to write it in the background. Call it on every rank.

        Raises UserError if it cannot be written.
        """
        tensors = sharded_checkpoint.network_tensors("student", self.student.module)
        tensors |= sharded_checkpoint.optimizer_tensors("optim.student", self.optim_g, self.student.module)
        if self.discriminator is not None and self.optim_d is not None:
            tensors |= sharded_checkpoint.network_tensors("discriminator", self.discriminator.module)
            tensors |= sharded_checkpoint.optimizer_tensors(
                "optim.discriminator", self.optim_d, self.discriminator.module
            )
        meta = {"steps": self.steps, "stage": self.stage, "networks": self.networks.by_content}
        writer.save(self.nimg, tensors, {"ema": self.ema.tensors}, meta)

    def load(self, saved: Checkpoint) -> None:
        """Load a checkpoint that any number of processes has written. Call it on every rank.

        Raises UserError for a checkpoint of other networks, of an older version, or with damaged files.
        """
        if not {"files", "steps"} <= saved.meta.keys():
            raise UserError(f"{saved.folder} was written by an older version; start another --out with init")
        own = (self.networks.by_content, *self.networks.earlier)
        if saved.meta.get("networks") not in own:
            folders = list_checkpoints(saved.folder.parent)
            one_fits = any(open_checkpoint(folder).meta.get("networks") in own for folder in folders)
            # If none fits, they are all of this run, and its inputs have changed: deleting one is no help.
            raise UserError(
                f"{saved.folder} is of a run with other networks (kind, teacher or seed); "
                "delete the folder to continue from the checkpoint before it"
                if one_fits
                else f"{saved.folder} was written with other networks: the teacher or gan.feature_networks "
                "has changed since; restore it, or give another --out and start with --set init="
                f"{saved.folder.parent.parent}"
            )
        sharded_checkpoint.verify(saved)
        sharded_checkpoint.load(saved, "student", self.student.module, self.optim_g)
        if self.discriminator is not None and self.optim_d is not None:
            sharded_checkpoint.load(saved, "discriminator", self.discriminator.module, self.optim_d)
        self.ema.load(saved.tensors("ema"))
        self.nimg, self.steps = saved.nimg, int(saved.meta["steps"])


def new_state(config: DistillConfig, device: torch.device, fresh: bool = True) -> State:
    """Build the initial training state on `device`.

    With `fresh=False`, skip loading `config.init`: a checkpoint will overwrite it. Raises UserError for
    weights that do not fit the networks, SettingError for inconsistent settings.
    """
    rng = generator(config.seed, Stream.DISCRIMINATOR_INIT)  # for the discriminator's new layers
    return state_of(
        config,
        device,
        lambda: _build_student(config, fresh),
        lambda: _build_discriminator(config, fresh, rng),
    )


def state_of(
    config: DistillConfig,
    device: torch.device,
    build_student: Callable[[], Student],
    build_discriminator: Callable[[], nn.Module],
) -> State:
    """Build the initial state of a run from functions that build its networks with weights.

    Under FSDP2 only rank 0 calls these functions; other ranks build the networks without weights.
    """
    # The student, wrapped for the engine.
    student = _distribute(
        config.engine,
        config.train.bf16,
        device,
        build_student,
        lambda: _build_student_on_meta(config),
        lambda net: [net.network, *text_modules(net)],
        lambda net: STUDENTS[config.student.kind].shard_units(config.teacher, net),
    )
    # The discriminator of the GAN stage, with its frozen feature networks if it reads pixels.
    discriminator: DistributedModule | None = None
    optim_d: torch.optim.Optimizer | None = None
    if config.adversarial:
        kind = DISCRIMINATORS[config.gan.discriminator]
        discriminator = _distribute(
            config.engine,
            config.train.bf16,
            device,
            build_discriminator,
            lambda: kind.build_on_meta(config.teacher, config.gan),
            lambda net: [net],
            lambda net: kind.shard_units(config.teacher, net),
        )
        _attach_pixel_features(kind, config, discriminator.module, device)
        optim_d = optimizer(discriminator.module, config.gan.optim, config.engine.offload_optimizer)
    # The moving average starts at the student's weights.
    ema = EMA(student.module, config.ema_decay, config.train.ema_start_images)
    return State(
        stage=config.stage,
        networks=NetworkDigests.of(config),
        student=student,
        optim_g=optimizer(student.module, config.optim, config.engine.offload_optimizer),
        ema=ema,
        discriminator=discriminator,
        optim_d=optim_d,
    )


def _attach_pixel_features(
    kind: DiscriminatorKind, config: DistillConfig, discriminator: Any, device: torch.device
) -> None:
    """Load the frozen feature networks of a discriminator on pixels, if it is one. Call it on every rank."""
    if kind.open_pixel_features is None:
        return
    pixel_features = kind.open_pixel_features(config.teacher, config.gan, False).to(device)
    if config.engine.activation_checkpointing:
        parallel.recompute(pixel_features.layers())  # type: ignore[operator]
    discriminator.attach(pixel_features)


def _distribute(
    engine: EngineConfig,
    bf16: bool,
    device: torch.device,
    load: Callable[[], N],
    build_on_meta: Callable[[], N],
    roots: Callable[[N], list[nn.Module]],
    shard_units: Callable[[N], Iterable[nn.Module]],
) -> DistributedModule:
    """Wrap a network for the engine (DDP, FSDP2 or a single process).

    load: build the network with its weights. build_on_meta: build it without weights. roots: modules that
    hold the parameters outside the shard units. shard_units: modules that FSDP2 shards one at a time, and
    whose activations engine.activation_checkpointing recomputes.
    """
    # With FSDP2, only rank 0 loads the full weights.
    if engine.parallel == "fsdp" and process_group.rank() != 0:
        network = build_on_meta().to("meta")
    else:
        network = load()
    if bf16 and device.type == "cpu":
        use_fp32_attention(network)
    if engine.frozen_weights == "bf16":
        parallel.store_frozen_in_bf16(network)
    # Compile blocks, recompute activations per block, and wrap blocks and roots.
    layers = list(shard_units(network))
    if engine.compile_blocks:
        parallel.compile_blocks(layers, engine.compile)
    if engine.activation_checkpointing:
        parallel.recompute(layers)
    size = engine.shard_size or process_group.world_size()
    if process_group.world_size() % size:
        raise SettingError(
            f"engine.shard_size is {size}; expected a divisor of the {process_group.world_size()} processes"
        )
    return DistributedModule(
        network,
        engine.parallel,
        device,
        layers=layers,
        roots=roots(network),
        replicas=process_group.world_size() // size,
        half=torch.bfloat16 if bf16 else None,
        compile_backend="" if engine.compile_blocks else engine.compile,
        compiled_blocks=engine.compile_blocks,
        channels_last=engine.channels_last == "on"
        or (engine.channels_last == "auto" and engine.parallel == "ddp" and device.type == "cuda"),
    )


def _expect_kind(init: str, kind: str) -> None:
    """Raise SettingError if the student `init`, from which the run starts, is of another kind."""
    stored = kind_settings(init).kind
    if stored != kind:
        raise SettingError(
            f"init is {init}, a student of kind {stored}, but student.kind is {kind!r}; give a student of "
            "that kind"
        )


def _expect_prediction_and_timestep(init: str, student: DiffusionStudent) -> None:
    """Raise SettingError if the student `init` is evaluated at another timestep than this run's, or if its
    network predicts something else."""
    prediction, expected = student_prediction(init), student.schedule.prediction
    if prediction not in ("", expected):
        raise SettingError(
            f"init is {init}, a student whose network makes a prediction of type {prediction}, but this "
            f"run's teacher has {expected}; give a student of this teacher, or the teacher of that student"
        )
    timestep = student_folder(init)[2]
    if student.schedule.one_step(timestep) != student.point:
        raise SettingError(
            f"init is {init}, a student at timestep {timestep}, but this run's student is at "
            f"{student.timestep}; set student_timestep={timestep}"
        )


def _build_student(config: DistillConfig, fresh: bool) -> Student:
    """Build the student with its initial weights, and switch gradients on for the trained parameters."""
    # Weights of the teacher, of the run or student `init`, or random ones.
    student = build_student(
        config.teacher, config.student_timestep, config.student, config.seed, config.stage
    )
    conditioner = load_text_conditioner(config.teacher) if config.own_text else None
    if config.init not in ("", FROM_TEACHER) and fresh:
        _expect_kind(config.init, config.student.kind)
        if isinstance(student, DiffusionStudent):
            _expect_prediction_and_timestep(config.init, student)
        load_student_weights(student, config.init, conditioner)
    if student.guided and not takes_guidance(config.teacher, config.student):
        raise SettingError(
            f"{config.init} takes the guidance scale as an input; set student.guidance_conditioning=true"
        )

    # Adapters, guidance input and own text encoders.
    if isinstance(student, DiffusionStudent):
        add_adapters(student, config.student, config.seed)
        if config.student.lora_rank and config.init not in ("", FROM_TEACHER) and fresh:
            _continue_adapters(student, config)
        if conditioner is not None:
            student = TextStudent(student, conditioner)
    set_stage_trainable(student, config.teacher, config.stage, config.student)
    return student


def _continue_adapters(student: DiffusionStudent, config: DistillConfig) -> None:
    """Load the adapters of the run `config.init`, if this run has adapters of the same rank and alpha.

    Other adapters have been merged into the frozen weights by `load_student_weights`. Storage in bf16 rounds
    the merged weights, so that the student can no longer be exported as adapters of the teacher.
    """
    if load_same_adapters(student, config.init, config.student):
        logger.info("the adapters of %s are trained further", config.init)
    elif config.engine.frozen_weights == "bf16" and has_lora(stored_tensors(config.init)):
        logger.warning(
            "%s has other adapters than this run (rank or alpha); they are merged into its frozen weights, "
            "which are rounded to bf16, so that `d2g export --format lora` will refuse the student; to keep "
            "them, set student.lora_rank and student.lora_alpha to those of %s",
            config.init,
            config.init,
        )


def _build_discriminator(config: DistillConfig, fresh: bool, rng: torch.Generator) -> nn.Module:
    """Build the discriminator with its initial weights.

    Stage text continues with the discriminator of the run `config.init`, if its tensors have the same shapes
    (StyleGAN-T, section 3.3).
    """
    network = DISCRIMINATORS[config.gan.discriminator].build(config.teacher, config.gan, rng)
    if config.stage != "text" or not fresh or config.init == FROM_TEACHER:
        return network
    newest = checkpoint.latest(Path(config.init) / "checkpoints")
    prefix = "discriminator."
    stored = sharded_checkpoint.read(newest) if newest is not None else {}
    weights = {name.removeprefix(prefix): t for name, t in stored.items() if name.startswith(prefix)}
    shapes = {name: t.shape for name, t in network.state_dict().items()}
    if weights and {name: t.shape for name, t in weights.items()} == shapes:
        network.load_state_dict(weights)
        logger.info("the discriminator goes on from %s", config.init)
    else:
        logger.info("the discriminator starts with new weights: %s has none of the same shapes", config.init)
    return network


def _build_student_on_meta(config: DistillConfig) -> Student:
    student = build_student_on_meta(
        config.teacher, config.student_timestep, config.student, config.seed, config.stage
    )
    if config.own_text:
        assert isinstance(student, DiffusionStudent), "check_student refuses others"
        student = TextStudent(student, text_conditioner_on_meta(config.teacher, with_tokenizers=True))
    set_stage_trainable(student, config.teacher, config.stage, config.student)
    return student
