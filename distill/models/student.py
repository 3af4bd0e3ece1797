"""The one-step student: the teacher's U-Net at one fixed point, turned into a data prediction."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from d2g.core.errors import SettingError
from d2g.core.seeds import Stream, generator
from d2g.diffusion import pretrained
from d2g.diffusion.edm import EDMSchedule
from d2g.diffusion.lora import TARGETS, add_lora
from d2g.diffusion.pipelines import open_pipeline
from d2g.diffusion.schedule import Schedule
from d2g.diffusion.text_encoders import Conditioning, added_conditions, as_text
from distill.config.components import StudentConfig
from distill.models.row_dropout import RowDropout

GUIDANCE_WIDTH = 256
"""Sines and cosines that tell the guidance scale, as in latent consistency models."""


class Student(nn.Module):
    """G(z, c) = (z - sigma_T eps(z, c, T)) / alpha_T (supplement eq. 2; other predictions: method.md
    "One-step formulas"), or of an EDM teacher its own c_skip sigma_max z + c_out F(c_in sigma_max z, c_noise,
    c) (method.md "CIFAR10 and EDM").

    A fixed wrapper without parameters of its own; the combination runs in fp32 whatever the network runs in.
    `downscale`: pixels of a picture's side by its latents', which SDXL's U-Net is told.
    """

    def __init__(
        self, unet: Any, schedule: Schedule | EDMSchedule, timestep: int = -1, downscale: int = 8
    ) -> None:
        super().__init__()
        self.unet: Any = unet
        self.schedule, self.point, self.downscale = schedule, schedule.one_step(timestep), downscale
        self.reads_text = hasattr(unet.config, "cross_attention_dim")
        if isinstance(schedule, EDMSchedule):
            _told_exactly(unet.time_proj, self.point.t)

    def forward(self, noise: Tensor, text: Conditioning, guidance: Tensor | None = None) -> Tensor:
        """noise [B, C, h, w] ~ N(0, 1), what a text encoder, or its like, gives of B prompts -> scaled
        latents [B, C, h, w], fp32.

        guidance [B]: the scale of classifier-free guidance to imitate, for a student that is told it.
        """
        x = self.schedule.start(noise)
        shown = self.schedule.shown(x, self.point).to(next(self.unet.parameters()).dtype)
        output = self._of_text(shown, text, guidance) if self.reads_text else self._of_classes(shown, text)
        with torch.autocast(noise.device.type, enabled=False):
            return self.schedule.x0(output, x, self.point)

    def _of_text(self, x: Tensor, told: Conditioning, guidance: Tensor | None) -> Tensor:
        """A UNet2DConditionModel's output."""
        text, scale = as_text(told), None
        if (width := self.unet.config.time_cond_proj_dim) is not None:
            assert guidance is not None and guidance.shape == x.shape[:1], "one guidance scale for each row"
            scale = guidance_embedding(guidance.to(x.device), width).to(x.dtype)
        output: Tensor = self.unet(
            x,
            self.point.t,
            text.hidden.to(x.dtype),
            timestep_cond=scale,
            added_cond_kwargs=added_conditions(self.unet, text, x, self.downscale),
        ).sample
        return output

    def _of_classes(self, x: Tensor, told: Conditioning) -> Tensor:
        """A UNet2DModel's output, without a learned variance."""
        assert isinstance(told, Tensor), "class numbers, or nothing"
        labels = None if self.unet.config.num_class_embeds is None else told.to(x.device)
        output: Tensor = self.unet(x, self.point.t, class_labels=labels).sample
        return output[:, : x.shape[1]]

    @property
    def timestep(self) -> int:
        """What a run's `student_timestep` stands for; of an EDM teacher, which has none, -1."""
        return -1 if isinstance(self.schedule, EDMSchedule) else int(self.point.t)

    @property
    def where(self) -> str:
        """The point at which the network is asked, in words."""
        if isinstance(self.schedule, EDMSchedule):
            return f"sigma {self.point.sigma:g}"
        return f"timestep {self.timestep}"

    @property
    def guided(self) -> bool:
        """Whether it is told the guidance scale."""
        return getattr(self.unet.config, "time_cond_proj_dim", None) is not None

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) that the UNet was trained at."""
        config = self.unet.config
        size = config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return int(config.in_channels), int(height), int(width)


def _told_exactly(time_proj: nn.Module, time: float) -> None:
    """Whatever a U-Net is given as its time, `time` in fp32 reaches its sines.

    UNet2DModel takes a number to be an integer, and FSDP2 casts a tensor to bf16, which keeps eight bits of
    c_noise.
    """

    def exactly(module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor]:
        return (torch.full_like(given[0], time, dtype=torch.float32),)

    time_proj.register_forward_pre_hook(exactly)


def student_from_teacher(
    teacher: str, timestep: int = -1, config: StudentConfig | None = None, seed: int = 0
) -> Student:
    """A student that starts as the teacher: its output is the teacher's own x0 prediction at T.

    config: what it has beside the teacher's network (`equip`); `seed` draws the adapters.
    """
    return _around(pretrained.load_unet(teacher), teacher, timestep, config, seed)


def meta_student(
    teacher: str, timestep: int = -1, config: StudentConfig | None = None, seed: int = 0
) -> Student:
    """The same without weights, on torch's meta device but for what `equip` adds."""
    return _around(pretrained.load_on_meta(teacher, "unet"), teacher, timestep, config, seed)


def _around(unet: Any, teacher: str, timestep: int, config: StudentConfig | None, seed: int) -> Student:
    schedule = pretrained.load_student_schedule(teacher)
    student = Student(unet, schedule, timestep, pretrained.latent_downscale(teacher))
    return add_adapters(student, config, seed) if config is not None else student


def check_teacher(teacher: str, stage: str, student: StudentConfig) -> None:
    """Raise SettingError for what there is not for this teacher: a discriminator of a network of classes, or
    of one preconditioned as in EDM (the paper trains none; Table A1, CIFAR10), or its input of guidance."""
    kind = open_pipeline(teacher).kind
    text = kind in pretrained.TEXT_STUDENTS
    if student.guidance_conditioning and not text:
        raise SettingError(
            f"student.guidance_conditioning is true, but the network of {teacher}, a {kind}, has no input "
            "for a guidance scale; set it to false"
        )
    if stage == "ode":
        return
    edm = text and isinstance(pretrained.load_student_schedule(teacher), EDMSchedule)
    if edm or not text:
        what = "is preconditioned as in EDM" if edm else f"is a {kind}, which knows no text"
        raise SettingError(
            f"stage {stage} needs a variance-preserving teacher of text, but {teacher} {what}; its students "
            "are trained by `d2g distill ode` alone"
        )


def add_adapters(student: Student, config: StudentConfig, seed: int = 0) -> Student:
    """Dropout, adapters and guidance input into a student, which still gives what it gave (dropout aside).

    Raises SettingError for adapters of a network without attention.
    """
    if config.dropout:
        blocks = [m for m in student.unet.modules() if type(m).__name__.startswith("ResnetBlock")]
        for number, block in enumerate(blocks):
            block.dropout = RowDropout(config.dropout, number)
    if config.lora_rank:
        if not any(name.endswith(TARGETS) for name, _ in student.unet.named_modules()):
            raise SettingError(
                f"student.lora_rank is {config.lora_rank}, but the network has no attention to adapt; set it "
                "to 0"
            )
        add_lora(student.unet, config.lora_rank, config.alpha, generator(seed, Stream.LORA_INIT))
    if config.guidance_conditioning and not student.guided:
        assert student.reads_text, "check_teacher comes first"
        add_guidance_embedding(student.unet)
    return student


def add_guidance_embedding(unet: Any) -> None:
    """Give a U-Net the input of `timestep_cond` that diffusers' pipelines feed with the guidance scale.

    Its weight is zero: the network starts as it was.
    """
    first = unet.time_embedding.linear_1
    projection = nn.utils.skip_init(nn.Linear, GUIDANCE_WIDTH, first.in_features, bias=False)
    nn.init.zeros_(projection.weight)
    unet.time_embedding.cond_proj = projection.to(first.weight)
    unet.register_to_config(time_cond_proj_dim=GUIDANCE_WIDTH)


def guidance_embedding(guidance: Tensor, width: int) -> Tensor:
    """[B] -> [B, width] fp32: sines, then cosines, of 1000 (w - 1) at `width` / 2 frequencies from 1 down to
    1e-4, as diffusers' pipelines tell a latent consistency model its scale (Luo et al. 2023).
    """
    half = width // 2
    frequencies = torch.exp(torch.arange(half, device=guidance.device) * (-math.log(10_000) / (half - 1)))
    angles = 1000 * (guidance.float() - 1)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def set_trainable(student: Student, config: StudentConfig) -> None:
    """Gradients for what is trained: everything, or with LoRA the adapters and the guidance input."""
    student.requires_grad_(not config.lora_rank)
    if config.lora_rank:
        for name, parameter in student.named_parameters():
            parameter.requires_grad = ".lora_" in name or name.endswith("cond_proj.weight")
