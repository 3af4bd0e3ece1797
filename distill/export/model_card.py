"""Model card of an exported student: `model_card.md.jinja` filled with what was measured.

Nothing in a card is invented. What is not known is said to be unknown.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from d2g.diffusion.pretrained import SHIPPED, resolve
from distill.config.export import CardOptions
from distill.export.card_history import pair_stores, read_history, teacher_evaluations
from distill.export.card_scores import eval_results, score_table
from distill.losses.regression.registry import REGRESSION_LOSSES

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

TEMPLATE = Path(__file__).with_name("model_card.md.jinja")

LICENSES = {
    "miniature": "apache-2.0",
    "runwayml/stable-diffusion-v1-5": "creativeml-openrail-m",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "creativeml-openrail-m",
    "CompVis/stable-diffusion-v1-4": "creativeml-openrail-m",
    "stabilityai/stable-diffusion-2-1": "openrail++",
    "stabilityai/stable-diffusion-2-1-base": "openrail++",
    "stabilityai/stable-diffusion-xl-base-1.0": "openrail++",
    "stabilityai/stable-diffusion-3-medium-diffusers": "stabilityai-ai-community",
    "stabilityai/stable-diffusion-3.5-medium": "stabilityai-ai-community",
    "stabilityai/stable-diffusion-3.5-large": "stabilityai-ai-community",
    "black-forest-labs/FLUX.1-dev": "flux-1-dev-non-commercial-license",
    "black-forest-labs/FLUX.1-schnell": "apache-2.0",
    "PixArt-alpha/PixArt-XL-2-512x512": "openrail++",
    "PixArt-alpha/PixArt-XL-2-1024-MS": "openrail++",
    "PixArt-alpha/PixArt-Sigma-XL-2-512-MS": "openrail++",
    "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS": "openrail++",
    "Efficient-Large-Model/Sana_600M_512px_diffusers": "nscl-v2-custom",
    "Efficient-Large-Model/Sana_600M_1024px_diffusers": "nscl-v2-custom",
    "Efficient-Large-Model/Sana_1600M_512px_diffusers": "nscl-v2-custom",
    "Efficient-Large-Model/Sana_1600M_1024px_diffusers": "nscl-v2-custom",
    "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers": "nscl-v2-custom",
    "Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers": "nscl-v2-custom",
    "Efficient-Large-Model/SANA1.5_4.8B_1024px_diffusers": "nscl-v2-custom",
}
"""Licenses of teachers by hub id, for folders that state none: identifiers of the hub, or NAMED_LICENSES."""

NAMED_LICENSES = {
    "stabilityai-ai-community": (
        "https://huggingface.co/stabilityai/stable-diffusion-3.5-medium/blob/main/LICENSE.md"
    ),
    "flux-1-dev-non-commercial-license": (
        "https://huggingface.co/black-forest-labs/FLUX.1-dev/blob/main/LICENSE.md"
    ),
    "nscl-v2-custom": (
        "https://huggingface.co/Efficient-Large-Model/Sana_1600M_1024px_diffusers/blob/main/LICENSE.txt"
    ),
}
"""Licenses for which the hub has no identifier: license_name -> license_link."""


@dataclass(frozen=True, kw_only=True)
class PipelineUsage:
    """How to draw from an exported pipeline of class `pipeline`, stored in the torch type `dtype`."""

    form: ClassVar[str] = "diffusers"
    library: ClassVar[str] = "diffusers"
    title: ClassVar[str] = "One-step student"
    pipeline: str
    dtype: str
    guided: bool
    reads_text: bool
    reads_labels: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the call, beside the number of steps."""
    settings_needed: bool = False
    """Whether the pipeline would draw something else without them."""


@dataclass(frozen=True, kw_only=True)
class AdapterUsage:
    """How to draw from the teacher's own pipeline of class `pipeline` with exported adapters of `rank`."""

    form: ClassVar[str] = "lora"
    library: ClassVar[str] = "diffusers"
    title: ClassVar[str] = "One-step LoRA"
    reads_text: ClassVar[bool] = True
    pipeline: str
    rank: int
    scheduler: str = "LCMScheduler"
    comfyui: str = ""
    """File with the adapters under kohya's names, if there is one."""
    settings: Mapping[str, Any] = field(default_factory=lambda: {"guidance_scale": 1})
    """Settings of the call, beside the number of steps."""
    guided: bool = False
    unrounded_difference: float | None = None
    """Largest difference in latents and pixels on the teacher in fp32, for a student whose frozen weights are
    those of the teacher rounded to bf16; None for others."""


@dataclass(frozen=True, kw_only=True)
class ComfyUIUsage:
    """How to draw from a one-file checkpoint with a workflow of ComfyUI.

    `unlike`: in what the model differs from the published one of its family; ComfyUI knows only that size.
    """

    form: ClassVar[str] = "comfyui"
    library: ClassVar[str] = "diffusion-single-file"
    title: ClassVar[str] = "One-step student"
    reads_text: ClassVar[bool] = True
    checkpoint: str
    workflow: str
    unlike: list[str]


@dataclass(frozen=True, kw_only=True)
class OnnxUsage:
    """How to draw from exported ONNX files.

    `tokenizers`: folder names, empty without text; `outputs`: output names of the text encoder.
    """

    form: ClassVar[str] = "onnx"
    library: ClassVar[str] = "onnx"
    title: ClassVar[str] = "One-step student"
    tokenizers: tuple[str, ...]
    outputs: tuple[str, ...]
    latent_shape: tuple[int, int, int]
    guided: bool
    reads_text: bool
    reads_labels: bool
    guidance: float
    """The guidance scale at which a student that takes it is drawn by default."""


Usage = PipelineUsage | AdapterUsage | ComfyUIUsage | OnnxUsage


def kg_co2(device_hours: float, options: CardOptions) -> float:
    """Emissions in kg CO2 (Lacoste et al. 2019): device hours x watts x PUE x carbon intensity."""
    return device_hours * options.watts / 1000 * options.pue * options.kg_per_kwh


def license_fields(teacher: str, terms: str | None = None) -> dict[str, str]:
    """The license of a teacher as metadata of the hub; `terms` overrides it.

    It is that of the front matter of its README.md, else of LICENSES. A license for which the hub has no
    identifier is "other" with a license_name; "other" alone means that the license is unknown.
    """
    readme = resolve(teacher) / "README.md"
    if terms is None and readme.is_file():
        # The front matter, line by line.
        parts = readme.read_text(encoding="utf-8", errors="replace").split("---")
        lines = parts[1].splitlines() if len(parts) > 2 and not parts[0].strip() else []
        stated = {
            key: value.strip().strip("\"'")
            for key, colon, value in (line.partition(":") for line in lines)
            if colon and key in ("license", "license_name", "license_link")
        }
        if stated.get("license") == "other" and "license_name" in stated:
            return stated | _absolute_link(teacher, stated)
        terms = stated.get("license")
    terms = terms or LICENSES.get(teacher)
    if terms in NAMED_LICENSES:
        return {"license": "other", "license_name": terms, "license_link": NAMED_LICENSES[terms]}
    return {"license": terms or "other"}


def _absolute_link(teacher: str, stated: Mapping[str, str]) -> dict[str, str]:
    """The link to a license, which a README gives relative to its own repository, as an address."""
    link = NAMED_LICENSES.get(stated["license_name"], stated.get("license_link", ""))
    if link and "://" not in link and "/" in _public_name(teacher):
        link = f"https://huggingface.co/{teacher}/blob/main/{link.removeprefix('./')}"
    return {"license_link": link} if "://" in link else {}


def license_of(teacher: str, terms: str | None = None) -> str | None:
    """The name of the license that `license_fields` gives, or None if it is unknown."""
    fields = license_fields(teacher, terms)
    return fields.get("license_name", None if fields["license"] == "other" else fields["license"])


def model_card(
    *,
    student: str,
    teacher: str,
    timestep: str,
    parity: float,
    options: CardOptions,
    scores: Sequence[Mapping[str, Any]],
    usage: Usage,
) -> str:
    """Text of the README.md of an export, in the format of the Hugging Face hub.

    `timestep`: where the network is evaluated, for example "timestep 999"; `parity`: largest difference from
    the training code's student; `scores`: results as `own_results` returns them. Raises UserError for a
    damaged run folder.
    """
    from huggingface_hub import ModelCard

    name, tables = _public_name(teacher), [score_table(result) for result in scores]
    # Facts of the runs behind the student, and of their pairs.
    history = read_history(student)
    specs, missing = pair_stores(history)
    hours = history.device_hours

    values = asdict(usage)
    # The template lays out the text; every number of the card comes from here.
    card = ModelCard.from_template(
        _metadata(name, license_fields(teacher, options.license), tables, usage),
        template_path=str(TEMPLATE),
        title=usage.title,
        teacher=name,
        license=license_of(teacher, options.license),
        timestep=timestep,
        usage=values | {"form": usage.form},
        call_settings="".join(f", {name}={value}" for name, value in values.get("settings", {}).items()),
        history=history,
        specs=specs,
        missing=missing,
        teacher_evaluations=teacher_evaluations(specs),
        device_hours=hours,
        kg_co2=None if hours is None else kg_co2(hours, options),
        options=options,
        scores=tables,
        parity=parity,
        regression_losses=REGRESSION_LOSSES,
    )
    return str(card)


def _metadata(
    name: str, license_values: Mapping[str, str], tables: Sequence[Mapping[str, Any]], usage: Usage
) -> "ModelCardData":
    """The hub's metadata block; name: public name of the teacher."""
    from huggingface_hub import ModelCardData

    task = "text-to-image" if usage.reads_text else "unconditional-image-generation"
    measured = [result for table in tables for result in eval_results(table, task)]
    on_hub = "/" in name
    relation = "adapter" if isinstance(usage, AdapterUsage) else "finetune"
    return ModelCardData(
        **license_values,
        base_model=name if on_hub else None,
        base_model_relation=relation if on_hub else None,
        model_name=f"{usage.title} of {name}" if measured else None,
        eval_results=measured or None,
        library_name=usage.library,
        pipeline_tag=task,
        tags=["one-step", "distillation", "diffusion2gan"],
    )


def _public_name(teacher: str) -> str:
    """The teacher's hub id or shipped name; of a local path only the last part."""
    return teacher if teacher in SHIPPED or not Path(teacher).exists() else Path(teacher).resolve().name
