"""Settings of `d2g export` and their preset."""

from dataclasses import dataclass, fields
from typing import Literal

from d2g.core.config import Presets, check_values, require, setting
from d2g.core.errors import SettingError

FORMATS_WITH_CARD = ("diffusers", "lora", "comfyui", "onnx")
"""Export formats with a model card."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CardOptions:
    """Facts for the model card that the run's files do not contain."""

    scores: tuple[str, ...] = setting((), "Results of `d2g eval run` to print (option --scores)")
    license: str | None = setting(
        None, "License of the teacher, which the student inherits; null: read from the teacher's folder"
    )
    watts: float = setting(400.0, "Mean power of a device in watts", source="power limit of an A100 SXM")
    kg_per_kwh: float = setting(
        0.48, "Carbon intensity of electricity in kg CO2 per kWh", source="world average of 2023, Ember"
    )
    pue: float = setting(
        1.0,
        "Power usage effectiveness: energy of the data center per energy of its devices; about 1.1 to 1.6",
        source="ISO/IEC 30134-2; 1 counts the devices alone",
    )

    def __post_init__(self) -> None:
        require(
            self,
            watts=(self.watts > 0, "a positive number"),
            kg_per_kwh=(self.kg_per_kwh >= 0, "0 or more"),
            pue=(self.pue >= 1, "1 (no overhead) or more"),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportConfig:
    """One `d2g export`: which student, in which format."""

    student: str = setting("", "Run folder, or exported student (option --student)")
    format: Literal["safetensors", "diffusers", "lora", "comfyui", "onnx"] = setting(
        "safetensors", "Export format"
    )
    dtype: Literal["fp32", "fp16", "bf16"] | None = setting(
        None, "Type of the weights; null: fp16 for safetensors, fp32 for the other formats"
    )
    teacher: str | None = setting(None, "Teacher to use in place of the one that the student names")
    card: CardOptions = setting(CardOptions(), "The model card")

    def __post_init__(self) -> None:
        check_values(self)
        changed = [f.name for f in fields(CardOptions) if getattr(self.card, f.name) != f.default]
        if changed and self.format not in FORMATS_WITH_CARD:
            raise SettingError(
                f"the format {self.format} has no model card, and no use for {', '.join(changed)}; leave it "
                f"out, or choose --format {', '.join(FORMATS_WITH_CARD)}"
            )


EXPORT_PRESETS = Presets({"default": ("Half-precision safetensors", ExportConfig())})
"""Presets of `d2g export`."""
