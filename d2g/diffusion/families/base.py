"""Base class of the model families in this package, and the pipeline files that they read.

A family's file holds everything that is known about it: pipelines and components, checks, conditioner, the
call of its network, latent shape, repeated blocks, LoRA targets, and the stages that work for it.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

from torch import Tensor, nn

from d2g.core.errors import SettingError, UserError
from d2g.diffusion.conditioning import Conditioner, Conditioning
from d2g.diffusion.latents import LatentSpace

ScheduleKind = Literal["vp", "flow", "edm", "cosine"]
"""Variance-preserving, rectified flow, preconditioned as in EDM, or Wuerstchen's continuous cosine."""

SCHEDULE_NAMES: dict[ScheduleKind, str] = {
    "vp": "variance-preserving",
    "flow": "flow",
    "edm": "EDM",
    "cosine": "continuous cosine",
}

VAE_CLASSES = ("AutoencoderKL", "AutoencoderTiny")
CLIP_CLASSES = ("CLIPTextModel",)
CLIP_POOLED_CLASSES = ("CLIPTextModelWithProjection",)
CLIP_TOKENIZER_CLASSES = ("CLIPTokenizer", "CLIPTokenizerFast")
T5_CLASSES = ("T5EncoderModel",)
T5_TOKENIZER_CLASSES = ("T5Tokenizer", "T5TokenizerFast")
Components = Mapping[str, tuple[str, ...]]
"""Component -> the classes it may have; the first is the one we load."""

ANY_SCHEDULER: tuple[str, ...] = ()
"""Any class: `d2g.diffusion.scheduler_files` decides."""

EMPTY_PROMPT = "the empty prompt"
"""The fact that a pair store notes where the encoded empty prompt is the unconditional row."""


EMBEDDED = "embedded"
"""The fact `guidance` of a pair store whose teacher takes the guidance scale as an input."""


class ExportFormat(NamedTuple):
    """A format that `d2g export` writes, and the teachers whose students can have it."""

    name: Literal["safetensors", "diffusers", "lora", "comfyui", "onnx"]
    schedules: tuple[ScheduleKind, ...]
    unconditional_only: bool = False
    reason: str = ""
    """Why other students of the family cannot have it, for the table of stages."""


class Family(ABC):
    """One model family. Subclasses set the attributes and the abstract methods; they hold no state."""

    name: str
    """Short name, the key of `FAMILIES`."""
    title: str
    """The model names, as printed by `d2g teacher list`."""
    pipelines: tuple[str, ...]
    """Pipeline classes of diffusers."""
    components: ClassVar[Components]
    """All components that its pipelines need."""
    optional: tuple[str, ...] = ()
    """Components that a pipeline may leave out, as [null, null] in model_index.json."""
    network: str
    """The component that denoises."""
    autoencoder: str | None = "vae"
    """The component that turns latents into pixels; None for networks that work in pixels."""
    reads_shift: bool = False
    """Whether its pipelines read the autoencoder's `shift_factor`; others decode without it."""
    flat_layout: bool = False
    """Whether repositories may keep the components' files at their root."""
    reads_text: bool = True
    """Whether prompts are text."""
    draws_images: bool = True
    """Whether its latents are, or decode to, images; the first stage of a cascade makes other latents."""
    prior_family: str | None = None
    """Name of the family whose latents condition its network, row by row: the stage before in a cascade."""
    takes_real_images: bool = True
    """Whether the GAN stage can mix in photographs; stages of a cascade have no encoder for them."""

    schedules: tuple[ScheduleKind, ...]
    """Kinds of noise schedule that its teachers may have; pairs can be made with each."""
    regression: tuple[ScheduleKind, ...] = ()
    """Kinds of schedule for which students can be trained by regression; empty: none."""
    gan: tuple[ScheduleKind, ...] = ()
    """Kinds of schedule for which the GAN stage works."""
    lora: tuple[ScheduleKind, ...] = ()
    """Kinds of schedule for which students can be trained as LoRA adapters."""
    exports: tuple[ExportFormat, ...] = ()
    """Formats of `d2g export`."""
    not_exported: str = ""
    """Which formats its students cannot have and why, for the table of stages."""
    lora_targets: tuple[str, ...] = ()
    """Layers that get an adapter, by the end of their names."""
    takes_guidance: bool = False
    """Whether students can take the guidance scale as an input."""
    takes_dropout: bool = False
    """Whether students can be trained with dropout."""
    embedded_guidance: float | None = None
    """The usual guidance scale of teachers whose network takes it as an input, in place of classifier-free
    guidance: one evaluation a step, and their students take the scale too. None: other teachers."""
    packing: int = 1
    """Side of the squares of latents that become the channels of one token before the network."""
    default_size: int | None = None
    """Latent side of networks whose config says none; None: their config must say it."""
    flow_spacing: Literal["linspace", "trailing"] = "linspace"
    """Spacing of the steps of a flow: `trailing` for pipelines that pass their own sigmas."""
    dpm_solver_flow: bool = False
    """Whether the scheduler of its flows may be a DPMSolverMultistepScheduler with use_flow_sigmas."""

    scheduler_settings: ClassVar[Mapping[str, Any]] = {}
    """Settings of a scheduler that the constructor of its pipelines overwrites, where the scheduler has
    them."""
    scheduler_classes: ClassVar[Mapping[str, str]] = {}
    """Pipeline class -> the scheduler class to which its constructor converts variance-preserving ones."""

    def corrected_config(self, component: str, config: Mapping[str, Any]) -> dict[str, Any]:
        """Settings of a component that the constructor of its pipelines overwrites, or that they do not read.

        config: the content of the component's config.json.
        """
        unread = component == self.autoencoder and not self.reads_shift and config.get("shift_factor")
        return {"shift_factor": None} if unread else {}

    def adapt(self, component: str, module: Any) -> None:  # noqa: B027
        """Change a loaded component in place, where this project computes something else than diffusers."""

    @abstractmethod
    def conditioner(
        self,
        pipeline: "Pipeline",
        config: Any,
        models: Mapping[str, nn.Module],
        tokenizers: Mapping[str, Any],
    ) -> Conditioner:
        """The conditioner of a teacher from its network's config, text encoders and tokenizers by component.

        Raises UserError for networks and encoders that the pipeline would not feed correctly.
        """

    @abstractmethod
    def forward(
        self,
        network: Any,
        config: Any,
        x: Tensor,
        t: Tensor | float,
        cond: Conditioning,
        downscale: int,
        guidance_embedding: Tensor | None = None,
    ) -> Tensor:
        """Call the network: inputs x [B, C, h, w] -> raw prediction [B, C', h, w].

        C' is 2 C if the network learns a variance.

        - config: the network's config; the network itself may be compiled or wrapped.
        - t: the time input, a number or a tensor [B].
        - downscale: pixels per latent position, for networks that take the image size.
        - guidance_embedding [B, W]: for students with an added input for the guidance scale.
        """

    def shard_units(self, network: nn.Module) -> Iterator[nn.Module]:
        """The repeated blocks of a student or discriminator: what FSDP2 gathers at once and what activation
        checkpointing recomputes."""
        raise UserError(f"students cannot be made of {self.title} teachers")

    def check(self, pipeline: "Pipeline", config: Any, space: LatentSpace) -> tuple[int, int, int]:
        """The shape (C, h, w) of the latents that a network was trained on, from its config.

        Raises UserError for networks with further inputs or other outputs, or without a `sample_size`.
        """
        # The input must be latents alone, the output a prediction and at most a variance.
        where = f"teacher {pipeline.folder}: {pipeline.class_name(self.network)}"
        expected = space.channels * self.packing**2
        packed = f", packed {self.packing} x {self.packing}" if self.packing > 1 else ""
        if config.in_channels != expected:
            raise UserError(
                f"{where} takes {config.in_channels} channels, but latents have {expected}{packed}; "
                "networks for inpainting or editing cannot be teachers"
            )
        channels = config.out_channels or config.in_channels  # a DiT may leave it out
        if channels not in (expected, 2 * expected):
            raise UserError(
                f"{where} gives {channels} channels; expected {expected}, "
                f"or {2 * expected} with a learned variance"
            )
        # Conditions that the pipeline never feeds would be missing at every step.
        classes = ("num_class_embeds",) if self.reads_text else ()
        for key in ("time_cond_proj_dim", "class_embed_type", "encoder_hid_dim_type", *classes):
            if getattr(config, key, None) is not None:
                raise UserError(
                    f"{where} has {key}={getattr(config, key)}, which {pipeline.kind} never feeds"
                )
        if (getattr(config, "sample_size", None) or self.default_size) is None:
            raise UserError(f"{where} has no sample_size; write the latents' side into its config.json")
        return self.latent_shape(config)

    def latent_shape(self, config: Any) -> tuple[int, int, int]:
        """The latent shape (C, h, w) that a network was trained at."""
        size: Any = getattr(config, "sample_size", None) or self.default_size
        height, width = (size, size) if isinstance(size, int) else size
        return int(config.in_channels) // self.packing**2, int(height), int(width)

    def prior_channels(self, config: Any) -> int:
        """Channels of the latents of `prior_family`, from the network's config."""
        raise NotImplementedError(f"{self.title} has no stage before it")

    def pack(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] as its pipelines take and return them."""
        return latents

    def unpack(self, packed: Tensor, size: tuple[int, int]) -> Tensor:
        """The inverse of `pack`, for this latent height and width."""
        return packed

    def pipeline_settings(self, pixels: tuple[int, int]) -> dict[str, Any]:
        """Arguments with which a call of its pipelines draws an image of this size as a student does."""
        return {}

    @abstractmethod
    def fake_conditioning(self, pipeline: "Pipeline", config: Any, rows: int) -> Conditioning:
        """Conditioning of the right shapes and any values, to predict memory without text encoders."""

    def size_unit(self, config: Any) -> int:
        """Latent height and width must be multiples of this number: a transformer's patch size by default."""
        return int(config.patch_size) * self.packing

    def check_size(self, name: str, config: Any, size: tuple[int, int]) -> None:
        """Raise SettingError for a latent height and width that a network, by its config, cannot take."""
        unit, most = self.size_unit(config), getattr(config, "pos_embed_max_size", None)
        if any(side < unit or side % unit for side in size):
            raise SettingError(
                f"latent size is {size[0]}x{size[1]}; teacher {name} takes multiples of {unit}"
            )
        if most and max(size) > most * unit:
            raise SettingError(
                f"latent size is {size[0]}x{size[1]}; teacher {name} takes {most * unit} at most"
            )

    def supported_stages(self, schedule: ScheduleKind, unconditional: bool) -> dict[str, str]:
        """Stage -> its name, for teachers with this kind of schedule; "" where it is not supported."""
        # The formats that students of this schedule can be exported to.
        formats = ", ".join(
            export.name
            for export in self.exports
            if schedule in export.schedules and (unconditional or not export.unconditional_only)
        )
        return {
            "pairs": "pairs",
            "regression": "regression" if schedule in self.regression else "",
            "GAN": "GAN" if schedule in self.gan else "",
            "LoRA": "LoRA" if schedule in self.lora else "",
            "export": f"export ({formats})" if formats else "",
        }


@dataclass(frozen=True)
class Pipeline:
    """A pipeline's folder, its class in diffusers, the content of its model_index.json, and its family."""

    folder: Path
    kind: str
    index: dict[str, Any]
    family: Family

    @property
    def components(self) -> list[str]:
        """The components it has, of those that its family needs; no tokenizer without its encoder."""
        absent = {component for component in self.family.optional if self.class_name(component) is None}
        absent |= {c.replace("text_encoder", "tokenizer") for c in absent}
        return [component for component in self.family.components if component not in absent]

    def class_name(self, component: str) -> str | None:
        """The class of a component in model_index.json; None if its entry is [null, null] or missing."""
        entry = self.index.get(component)
        return entry[1] if isinstance(entry, list) and len(entry) == 2 else None

    def component_dir(self, component: str) -> Path:
        """The folder of a component. Raises UserError if it is missing or of a class that we do not load."""
        # Some repositories keep the files of their components at the root.
        name, folder = self.class_name(component), self.folder / component
        if not folder.is_dir() and self.family.flat_layout:
            file = "scheduler_config.json" if component == "scheduler" else "config.json"
            folder = self.folder if (self.folder / file).is_file() else folder
        if name is None or not folder.is_dir():
            folders = ", ".join(sorted(p.name for p in self.folder.iterdir() if p.is_dir())) or "none"
            raise UserError(
                f"teacher {self.folder}: no {component}; expected the components "
                f"{', '.join(self.family.components)} in diffusers layout; found {folders}"
            )
        # Only classes that we load correctly are accepted.
        allowed = self.family.components[component]
        if allowed and name not in allowed:
            raise UserError(
                f"teacher {self.folder}: {component} is a {name}; supported: {', '.join(allowed)}"
            )
        return folder

    def class_names(self, count: int) -> list[str] | None:
        """Names of the classes 0 to `count` - 1, if model_index.json has id2label."""
        names = self.index.get("id2label")
        return None if not isinstance(names, dict) else [str(names.get(str(i), i)) for i in range(count)]


def expect_width(pipeline: Pipeline, what: str, width: int, expected: int | tuple[int, ...]) -> None:
    """Raise UserError unless text of this width fits a network that takes `expected` (at each level)."""
    widths = {expected} if isinstance(expected, int) else set(expected)
    if widths != {width}:
        takes = " or ".join(map(str, sorted(widths)))
        raise UserError(
            f"teacher {pipeline.folder}: {what} is {width} numbers wide, but {pipeline.family.network} takes "
            f"{takes}; its components are of different models"
        )


def expect_addition(pipeline: Pipeline, config: Any, expected: str | None) -> None:
    """Raise UserError unless a U-Net's `addition_embed_type` is the one that its pipeline feeds."""
    if config.addition_embed_type != expected:
        raise UserError(
            f"teacher {pipeline.folder}: the UNet has addition_embed_type={config.addition_embed_type}; "
            f"a {pipeline.kind} expects {expected}"
        )
