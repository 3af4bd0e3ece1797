"""The one-step student: the teacher's network at one fixed timestep, its output converted to a prediction of
clean latents."""

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
    """A one-step generator: (noise [B, *noise_shape], conditioning of B rows) -> scaled latents [B, C, h, w].

    The latents are fp32. family: the teacher's family, whose latents and conditioning the student shares.
    downscale: pixels per latent position.

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
    """Whether training uses new noise for each row instead of the noise of its pair."""
    has_styles = False
    """Whether it is a generator with styles w, whose forward pass takes their truncation `psi`."""

    @property
    @abstractmethod
    def network(self) -> Any:
        """The network that a forward pass evaluates once."""

    @property
    @abstractmethod
    def conditioning_config(self) -> Any:
        """The config of the teacher's network, which determines the form of the conditioning."""

    @property
    @abstractmethod
    def latent_shape(self) -> tuple[int, int, int]:
        """The shape (C, h, w) of a row's latents."""

    @property
    def noise_shape(self) -> tuple[int, ...]:
        """The shape of a row's noise."""
        return self.latent_shape

    @property
    def reads_text(self) -> bool:
        """Whether the conditioning is text."""
        return self.family.reads_text

    @property
    def guided(self) -> bool:
        """Whether the forward pass takes the guidance scale as an input."""
        return False

    @property
    def timestep(self) -> int:
        """The timestep at which the network is evaluated; -1 for a network without timesteps."""
        return -1

    @property
    def prior_shape(self) -> tuple[int, int, int] | None:
        """The shape (C, h', w') of the small latents that an upsampler takes; None for other students."""
        return None

    @property
    @abstractmethod
    def evaluation_point(self) -> str:
        """Where the network is evaluated, for messages and the model card, such as "timestep 999"."""

    def limit_detail(self, latents: Tensor) -> Tensor:
        """Remove from target latents [B, C, h, w] the detail that the student cannot generate.

        Only generators that draw at a lower resolution change the latents.
        """
        return latents

    def small_latents(self, latents: Tensor) -> Tensor | None:
        """Reduce target latents [B, C, h, w] to the input of an upsampler; None for other students."""
        return None

    def grow_weights(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Add initial weights of new blocks to the weights of a smaller generator; others stay unchanged."""
        return tensors

    def begin_step(self) -> None:
        """Hook: called before the forward passes of a training step."""

    def after_update(self, steps: int) -> None:
        """Hook: called on every rank after each update of the weights. `steps`: earlier steps of the run."""


class DiffusionStudent(Student):
    """The teacher's network: G(z, c) = (z - sigma_T eps(z, c, T)) / alpha_T (supplement eq. 2).

    A flow gives z - v(z, c, 1); other predictions are in method.md "One-step formulas". An EDM teacher gives
    c_skip sigma_max z + c_out F(c_in sigma_max z, c_noise, c) (method.md "CIFAR10 and EDM"). The wrapper has
    no parameters of its own. The formula is computed in fp32, whatever the precision of the network.
    `timestep`: -1 is the last one. `downscale`: pixels per latent, for networks that take the image size.
    """

    latent_size: tuple[int, int] | None = None
    """Height and width of the latents of its pairs; None: those that the network was trained at."""

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
        # Parameters have the names of the pipeline: unet.…, transformer.…
        self.add_module(family.network, network)
        self.schedule, self.point, self.downscale = schedule, schedule.one_step(timestep), downscale
        self.time_input: Tensor | float = self.point.t
        """EDM's time input c_noise: a number, or one per row [B]."""
        if isinstance(schedule, EDMSchedule):
            _force_time_input(network.time_proj, lambda: self.time_input)

    def forward(self, noise: Tensor, cond: Conditioning, guidance: Tensor | None = None) -> Tensor:
        """noise [B, C, h, w] ~ N(0, 1) and the conditioning of B rows -> scaled latents [B, C, h, w], fp32.

        guidance [B]: the guidance scale to imitate, for a student with an input for it. It may be missing if
        `cond` holds the scale already, as for teachers that take it too.
        """
        # The network's input, at the point where the student is evaluated.
        x = self.schedule.start(noise)
        inputs = self.schedule.network_input(x, self.point).to(next(self.network.parameters()).dtype)

        # The guidance scale: the teacher's own input, or the added embedding.
        embedding = None
        if guidance is not None and self.family.embedded_guidance is not None:
            cond = cond.with_guidance(guidance)
        elif self.guided and "guidance" not in cond.tensors:
            assert guidance is not None and guidance.shape == x.shape[:1], "one guidance scale for each row"
            width = self.network.config.time_cond_proj_dim
            embedding = guidance_embedding(guidance.to(x.device), width).to(inputs.dtype)

        # One evaluation, then the prediction of clean latents.
        output = self.family.forward(
            self.network,
            self.network.config,
            inputs,
            self._time(len(x), x.device),
            cond,
            self.downscale,
            embedding,
        )
        output = output[:, : x.shape[1]]  # drop the channels of a learned variance
        with torch.autocast(noise.device.type, enabled=False):
            return self.schedule.x0(output, x, self.point)

    def _time(self, rows: int, device: torch.device) -> Tensor:
        """The network's time input [B], created on the device: diffusers would copy a number to the GPU and
        wait. EDM's time is not an integer; `_force_time_input` inserts it.
        """
        return torch.full((rows,), int(self.point.t), device=device)

    unet: Any  # the network of a U-Net family

    @property
    def network(self) -> Any:
        """The teacher's network, which a forward pass evaluates once."""
        return getattr(self, self.family.network)

    @property
    def conditioning_config(self) -> Any:
        """The network's own config."""
        return self.network.config

    @property
    def timestep(self) -> int:
        """The timestep at which the network is evaluated; -1 for an EDM teacher, which has none."""
        return -1 if isinstance(self.schedule, EDMSchedule) else int(self.point.t)

    @property
    def evaluation_point(self) -> str:
        """The timestep, or for an EDM teacher the noise level, of the network's evaluation, in words."""
        if isinstance(self.schedule, EDMSchedule):
            return f"sigma {self.point.sigma:g}"
        return f"timestep {self.timestep}"

    @property
    def guided(self) -> bool:
        """Whether the network has an input for the guidance scale."""
        added = getattr(self.network.config, "time_cond_proj_dim", None) is not None
        return added or self.family.embedded_guidance is not None

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """The latent shape (C, h, w) of its pairs, or that the teacher's network was trained at."""
        shape = self.family.latent_shape(self.network.config)
        return shape if self.latent_size is None else (shape[0], *self.latent_size)


def _force_time_input(time_proj: nn.Module, time: Callable[[], Tensor | float]) -> None:
    """Make the sinusoidal time embedding of a U-Net use `time()` in fp32, whatever time the U-Net receives.

    UNet2DModel would convert a number to an integer, and FSDP2 would cast a tensor to bf16, which keeps eight
    bits of c_noise.
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
    """Load a student with the teacher's weights: its output is the teacher's prediction of x_0 at T.

    timestep: -1 is the last one. config: dropout, LoRA and guidance input for `add_adapters`; None adds none.
    seed: initializes the adapters. wrapper: a subclass of DiffusionStudent. Raises UserError for a teacher
    whose family has no students.
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
    """Build the student of `student_from_teacher` on torch's meta device, without weights.

    Only the modules that `add_adapters` adds have weights.
    """
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
    schedule, family = pretrained.load_schedule(teacher), family_of(teacher)
    downscale = pretrained.latent_downscale(teacher)
    student = (wrapper or DiffusionStudent)(network, schedule, family, timestep, downscale)
    if config is not None:
        add_adapters(student, config, seed)
    return student


def check_teacher(teacher: str, stage: str, student: StudentConfig) -> None:
    """Raise SettingError if the teacher does not support the stage, the guidance input, or dropout."""
    # Guidance input and dropout must fit the teacher's network.
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
    kind = schedule_kind(pretrained.load_schedule(teacher))
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
    """Whether students of this teacher have an input for the guidance scale, added or the teacher's own."""
    return student.guidance_conditioning or family_of(teacher).embedded_guidance is not None


def add_adapters(student: DiffusionStudent, config: StudentConfig, seed: int = 0) -> DiffusionStudent:
    """Add dropout, LoRA adapters and a guidance input to a student in place, and return it.

    Adapters and guidance input do not change its output at first. `seed` initializes the adapters. Raises
    SettingError for LoRA on a network without attention.
    """
    # Each residual block draws its own mask, numbered in the order of the network.
    if config.dropout:
        blocks = [m for m in student.network.modules() if type(m).__name__.startswith("ResnetBlock")]
        for number, block in enumerate(blocks):
            block.dropout = RowDropout(config.dropout, number)

    # The contribution of the adapters starts at zero.
    if config.lora_rank:
        targets = student.family.lora_targets
        if not any(name.endswith(targets) for name, _ in student.network.named_modules()):
            raise SettingError(
                f"student.lora_rank is {config.lora_rank}, but the network has no attention to adapt; set it "
                "to 0"
            )
        add_lora(student.network, targets, config.lora_rank, config.alpha, generator(seed, Stream.LORA_INIT))

    # A guidance input whose contribution starts at zero, unless the teacher has one already.
    if config.guidance_conditioning and not student.guided:
        assert student.reads_text, "check_teacher must run first"
        add_guidance_embedding(student.network)
    return student


def add_guidance_embedding(unet: Any) -> None:
    """Add the input `timestep_cond` to a U-Net. diffusers' pipelines pass the guidance scale to it.

    Its weight is zero, so it does not change the network's output at first.
    """
    time_layer = unet.time_embedding.linear_1
    projection = nn.utils.skip_init(nn.Linear, GUIDANCE_WIDTH, time_layer.in_features, bias=False)
    nn.init.zeros_(projection.weight)
    unet.time_embedding.cond_proj = projection.to(time_layer.weight)
    unet.register_to_config(time_cond_proj_dim=GUIDANCE_WIDTH)


def guidance_embedding(guidance: Tensor, width: int) -> Tensor:
    """Embed guidance scales w [B] as sinusoids: [B, width], fp32.

    Sines, then cosines, of 1000 (w - 1) at `width` / 2 frequencies from 1 down to 1e-4, as diffusers does for
    latent consistency models (Luo et al. 2023).
    """
    half = width // 2
    frequencies = torch.exp(torch.arange(half, device=guidance.device) * (-math.log(10_000) / (half - 1)))
    angles = 1000 * (guidance.float() - 1)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def set_trainable(student: Student, config: StudentConfig) -> None:
    """Switch gradients on for the trained parameters, and off for all others.

    Trained are all parameters except those that match `freeze`; with LoRA, only adapters and guidance input.
    Raises SettingError for a pattern that freezes nothing, and if nothing is left to train.
    """
    student.requires_grad_(not config.lora_rank)
    freeze_by_pattern(dict(student.network.named_parameters()), config.freeze)
    if config.lora_rank:
        for name, parameter in student.named_parameters():
            parameter.requires_grad = ".lora_" in name or name.endswith("cond_proj.weight")


def freeze_by_pattern(parameters: Mapping[str, nn.Parameter], patterns: Sequence[str]) -> None:
    """Freeze the parameters whose names match one of `patterns` (`student.freeze`).

    Raises SettingError for a pattern that freezes nothing, and if nothing is left to train.
    """
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
