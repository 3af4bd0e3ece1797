"""The one-step student: the teacher's network at one fixed point, turned into a data prediction."""

import fnmatch
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from d2g.core.errors import SettingError
from d2g.core.seeds import Stream, generator
from d2g.diffusion import pretrained
from d2g.diffusion.conditioning import Conditioning
from d2g.diffusion.edm import EDMSchedule
from d2g.diffusion.families.base import SCHEDULE_NAMES, Family
from d2g.diffusion.lora import add_lora
from d2g.diffusion.pipelines import family_of, open_pipeline
from d2g.diffusion.scheduler_files import AnySchedule, schedule_kind
from distill.config.student import StudentConfig
from distill.models.row_dropout import RowDropout

GUIDANCE_WIDTH = 256
"""Width of the sinusoidal embedding of the guidance scale, as in latent consistency models."""


class Student(nn.Module, ABC):
    """A one-step generator of latents: (noise [B, *noise_shape], conditioning of B rows) -> scaled latents
    [B, C, h, w], fp32.

    `family`: of the teacher, whose latents and conditioning it has. `downscale`: pixels per latent.

    >>> from d2g.core.seeds import noise
    >>> from distill import load_student
    >>> loaded = load_student("miniature")
    >>> student = loaded.student  # a Student
    >>> z = noise(0, range(2), student.noise_shape)
    >>> cond = loaded.conditioner.encode(["a red cube", "a blue cone"])
    >>> student(z, cond).shape == (2, *student.latent_shape)
    True
    """

    family: Family
    downscale: int
    own_noise = False
    """Whether each row of training draws new noise, in place of the noise of its pair."""
    has_styles = False
    """Whether it has styles w, whose truncation `psi` is an input of the forward pass."""

    @property
    @abstractmethod
    def network(self) -> Any:
        """The network that it evaluates once."""

    @property
    @abstractmethod
    def conditioning_config(self) -> Any:
        """The config of the teacher's network, which says what its conditioning is."""

    @property
    @abstractmethod
    def latent_shape(self) -> tuple[int, int, int]:
        """The shape (C, h, w) of its latents."""

    @property
    def noise_shape(self) -> tuple[int, ...]:
        """The shape of a row's noise, which is a function of (seed, index)."""
        return self.latent_shape

    @property
    def reads_text(self) -> bool:
        """Whether its conditioning is text."""
        return self.family.reads_text

    @property
    def guided(self) -> bool:
        """Whether it takes the guidance scale as an input."""
        return False

    @property
    def timestep(self) -> int:
        """The timestep of the network's one evaluation; -1 where there is none."""
        return -1

    @property
    def prior_shape(self) -> tuple[int, int, int] | None:
        """The shape of the latents of another student that it enlarges; None for other students."""
        return None

    @property
    @abstractmethod
    def where(self) -> str:
        """The point at which the network is evaluated, in words."""

    def real_view(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] with no more detail than the student can draw."""
        return latents

    def prior_of(self, latents: Tensor) -> Tensor | None:
        """The small latents that it enlarges to `latents` [B, C, h, w]; None for other students."""
        return None

    def grown(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The weights of a run to start from, with those that it lacks where the student has grown."""
        return tensors

    def begin_step(self) -> None:
        """Called before the forward passes of a training step."""

    def after_update(self, steps: int) -> None:
        """Called on every rank after an update of the weights, which is preceded by `steps` steps."""


class DiffusionStudent(Student):
    """The teacher's network: G(z, c) = (z - sigma_T eps(z, c, T)) / alpha_T (supplement eq. 2).

    Other predictions: method.md "One-step formulas"; a flow gives z - v(z, c, 1). For an EDM teacher
    (method.md "CIFAR10 and EDM"): c_skip sigma_max z + c_out F(c_in sigma_max z, c_noise, c). The wrapper has
    no parameters of its own, and combines in fp32 whatever the network runs in. `downscale` is for networks
    that take the size of the image.
    """

    def __init__(
        self,
        network: Any,
        schedule: AnySchedule,
        family: Family,
        timestep: int = -1,
        downscale: int = 8,
    ) -> None:
        super().__init__()
        self.family = family
        self.add_module(
            family.network, network
        )  # weights are named as in the pipeline: unet.…, transformer.…
        self.schedule, self.point, self.downscale = schedule, schedule.one_step(timestep), downscale
        self.time_input: Tensor | float = self.point.t
        """EDM's time input c_noise: a number, or one per row [B]."""
        if isinstance(schedule, EDMSchedule):
            _force_time_input(network.time_proj, lambda: self.time_input)

    def forward(self, noise: Tensor, cond: Conditioning, guidance: Tensor | None = None) -> Tensor:
        """noise [B, C, h, w] ~ N(0, 1) and the conditioning of B rows -> scaled latents [B, C, h, w], fp32.

        guidance [B]: the guidance scale to imitate, for a student that takes it as an input; unless `cond`
        holds it already, where the teacher takes it too.
        """
        x = self.schedule.start(noise)
        inputs = self.schedule.network_input(x, self.point).to(next(self.network.parameters()).dtype)
        embedding = None
        if guidance is not None and self.family.embedded_guidance is not None:
            cond = cond.with_guidance(guidance)
        elif self.guided and "guidance" not in cond.tensors:
            assert guidance is not None and guidance.shape == x.shape[:1], "one guidance scale for each row"
            width = self.network.config.time_cond_proj_dim
            embedding = guidance_embedding(guidance.to(x.device), width).to(inputs.dtype)
        output = self.family.forward(
            self.network,
            self.network.config,
            inputs,
            self._time(len(x), x.device),
            cond,
            self.downscale,
            embedding,
        )
        output = output[:, : x.shape[1]]  # a learned variance follows the mean
        with torch.autocast(noise.device.type, enabled=False):
            return self.schedule.x0(output, x, self.point)

    def _time(self, rows: int, device: torch.device) -> Tensor:
        """The network's time input [B], filled on the device: diffusers copies a number to the GPU and waits.
        EDM's time is no whole number; `_force_time_input` puts it in.
        """
        return torch.full((rows,), int(self.point.t), device=device)

    unet: Any  # the network of a U-Net family

    @property
    def network(self) -> Any:
        """The network that it evaluates once."""
        return getattr(self, self.family.network)

    @property
    def conditioning_config(self) -> Any:
        """The network's own config."""
        return self.network.config

    @property
    def timestep(self) -> int:
        """The timestep of the network's one evaluation; -1 for an EDM teacher, which has none."""
        return -1 if isinstance(self.schedule, EDMSchedule) else int(self.point.t)

    @property
    def where(self) -> str:
        """The point at which the network is evaluated, in words."""
        if isinstance(self.schedule, EDMSchedule):
            return f"sigma {self.point.sigma:g}"
        return f"timestep {self.timestep}"

    @property
    def guided(self) -> bool:
        """Whether it takes the guidance scale as an input."""
        added = getattr(self.network.config, "time_cond_proj_dim", None) is not None
        return added or self.family.embedded_guidance is not None

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """The latent shape (C, h, w) that the network was trained at."""
        return self.family.latent_shape(self.network.config)


def _force_time_input(time_proj: nn.Module, time: Callable[[], Tensor | float]) -> None:
    """Make the sinusoidal embedding of a U-Net's time input see `time()` in fp32, whatever the U-Net gets.

    UNet2DModel converts a number to an integer, and FSDP2 casts a tensor to bf16, which keeps eight bits of
    c_noise.
    """

    def replace_input(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        value = time()
        if isinstance(value, Tensor):
            return (value,)
        return (torch.full_like(args[0], value, dtype=torch.float32),)

    time_proj.register_forward_pre_hook(replace_input)


def student_from_teacher(
    teacher: str,
    timestep: int = -1,
    config: StudentConfig | None = None,
    seed: int = 0,
    wrapper: type[DiffusionStudent] | None = None,
) -> DiffusionStudent:
    """A student with the teacher's weights: its output is the teacher's own x_0 prediction at T.

    config: what `add_adapters` adds to the network; `seed` initializes the adapters. wrapper: a class
    derived from DiffusionStudent.
    """
    pretrained.expect_student_family(teacher)
    network = pretrained.load_model(teacher, family_of(teacher).network)
    return _wrap(network, teacher, timestep, config, seed, wrapper)


def meta_student(
    teacher: str,
    timestep: int = -1,
    config: StudentConfig | None = None,
    seed: int = 0,
    wrapper: type[DiffusionStudent] | None = None,
) -> DiffusionStudent:
    """The same without weights: on torch's meta device, except for what `add_adapters` adds."""
    network = pretrained.load_on_meta(teacher, family_of(teacher).network)
    return _wrap(network, teacher, timestep, config, seed, wrapper)


def _wrap(
    network: Any,
    teacher: str,
    timestep: int,
    config: StudentConfig | None,
    seed: int,
    wrapper: type[DiffusionStudent] | None,
) -> DiffusionStudent:
    schedule, family = pretrained.load_any_schedule(teacher), family_of(teacher)
    downscale = pretrained.latent_downscale(teacher)
    student = (wrapper or DiffusionStudent)(network, schedule, family, timestep, downscale)
    if config is not None:
        add_adapters(student, config, seed)
    return student


def check_teacher(teacher: str, stage: str, student: StudentConfig) -> None:
    """Raise SettingError if a stage, an input for the guidance scale, or dropout is not supported for this
    teacher."""
    # What the student adds must fit the teacher's network.
    pipeline = open_pipeline(teacher)
    family = pipeline.family
    if student.guidance_conditioning and family.embedded_guidance is not None:
        raise SettingError(
            f"student.guidance_conditioning is true, but the network of {teacher}, a {pipeline.kind}, takes "
            "the guidance scale of its pairs already; set it to false"
        )
    if student.guidance_conditioning and not family.takes_guidance:
        raise SettingError(
            f"student.guidance_conditioning is true, but the network of {teacher}, a {pipeline.kind}, has no "
            "input for a guidance scale; set it to false"
        )
    if student.dropout and not family.takes_dropout:
        raise SettingError(
            f"student.dropout is {student.dropout:g}, but the network of {teacher}, a {pipeline.kind}, has "
            "no residual blocks to drop values in; set it to 0"
        )
    pretrained.expect_student_family(teacher)
    # The stage must support the teacher's family and noise schedule.
    kind = schedule_kind(pretrained.load_any_schedule(teacher))
    if stage in ("gan", "text") and kind not in family.gan:
        raise SettingError(
            f"stage {stage} has no discriminator for {teacher}, a {pipeline.kind} of kind "
            f"{SCHEDULE_NAMES[kind]}; its students are trained by `d2g distill ode` alone"
        )
    if stage == "cd" and (kind != "edm" or family.autoencoder is not None):
        raise SettingError(
            f"stage cd needs a teacher of pixels that is preconditioned as in EDM, but {teacher} is a "
            f"{pipeline.kind} of kind {SCHEDULE_NAMES[kind]}; use `d2g distill ode`"
        )


def takes_guidance(teacher: str, student: StudentConfig) -> bool:
    """Whether students of this teacher take the guidance scale as an input: an added one, or the teacher's
    own."""
    return student.guidance_conditioning or family_of(teacher).embedded_guidance is not None


def add_adapters(student: DiffusionStudent, config: StudentConfig, seed: int = 0) -> DiffusionStudent:
    """Add dropout, LoRA adapters and a guidance input to a student; dropout aside, its output stays the same.

    `seed` initializes the adapters. Raises SettingError for adapters of a network without attention.
    """
    # Each residual block draws its own mask, numbered in the order of the network.
    if config.dropout:
        blocks = [m for m in student.network.modules() if type(m).__name__.startswith("ResnetBlock")]
        for number, block in enumerate(blocks):
            block.dropout = RowDropout(config.dropout, number)
    # Adapters start at zero, so the output stays the same.
    if config.lora_rank:
        targets = student.family.lora_targets
        if not any(name.endswith(targets) for name, _ in student.network.named_modules()):
            raise SettingError(
                f"student.lora_rank is {config.lora_rank}, but the network has no attention to adapt; set it "
                "to 0"
            )
        add_lora(student.network, targets, config.lora_rank, config.alpha, generator(seed, Stream.LORA_INIT))

    # A teacher that has a guidance input keeps it; others get one that starts at zero.
    if config.guidance_conditioning and not student.guided:
        assert student.reads_text, "check_teacher must run first"
        add_guidance_embedding(student.network)
    return student


def add_guidance_embedding(unet: Any) -> None:
    """Add the input `timestep_cond` to a U-Net, which diffusers' pipelines feed with the guidance scale.

    Its weight is zero, so the network's output stays the same at first.
    """
    first = unet.time_embedding.linear_1
    projection = nn.utils.skip_init(nn.Linear, GUIDANCE_WIDTH, first.in_features, bias=False)
    nn.init.zeros_(projection.weight)
    unet.time_embedding.cond_proj = projection.to(first.weight)
    unet.register_to_config(time_cond_proj_dim=GUIDANCE_WIDTH)


def guidance_embedding(guidance: Tensor, width: int) -> Tensor:
    """Guidance scales w [B] -> embeddings [B, width], fp32: sines, then cosines, of 1000 (w - 1) at `width` /
    2 frequencies from 1 down to 1e-4, as diffusers does for latent consistency models (Luo et al. 2023).
    """
    half = width // 2
    frequencies = torch.exp(torch.arange(half, device=guidance.device) * (-math.log(10_000) / (half - 1)))
    angles = 1000 * (guidance.float() - 1)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def set_trainable(student: Student, config: StudentConfig) -> None:
    """Require gradients for what is trained: everything but `freeze`, or with LoRA the adapters and the
    guidance input. Raises SettingError for a pattern that freezes nothing, and if nothing is left."""
    student.requires_grad_(not config.lora_rank)
    freeze_by_pattern(dict(student.network.named_parameters()), config.freeze)
    if config.lora_rank:
        for name, parameter in student.named_parameters():
            parameter.requires_grad = ".lora_" in name or name.endswith("cond_proj.weight")


def freeze_by_pattern(parameters: Mapping[str, nn.Parameter], patterns: Sequence[str]) -> None:
    """Freeze the parameters whose names match a pattern of `student.freeze`. Raises SettingError for a
    pattern that freezes nothing, and if nothing is left."""
    for pattern in patterns:
        if not (frozen := fnmatch.filter(parameters, pattern)):
            raise SettingError(
                f"student.freeze has {pattern!r}, which matches no parameter that is trained; their names "
                f"look like {next(iter(parameters))}"
            )
        for name in frozen:
            parameters[name].requires_grad = False
    if patterns and not any(p.requires_grad for p in parameters.values()):
        raise SettingError(f"student.freeze is {list(patterns)}, which leaves nothing to train")
