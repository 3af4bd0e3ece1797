"""What the evaluation commands are told: configs and their presets."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from d2g.core.errors import SettingError
from eval.protocols.protocol import PROTOCOLS, Protocol


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalRun:
    """One `d2g eval run`: what is measured, and with what. Files and folders are strings.

    What is measured is a student, a teacher, a pipeline (any of diffusers') or images; a teacher beside a
    student is the student's own, to load it with. `against`: the other side of pairs, a teacher (by name or
    folder) or the images that one kept. `train`: images it learnt from, for the report's nearest neighbours.
    Settings from `batch_size` on change no number.
    """

    student: str | None = None
    teacher: str | None = None
    pipeline: str | None = None
    images: str | None = None
    protocol: Protocol = PROTOCOLS["folder"]
    metrics: tuple[str, ...] = ()
    """None: the protocol's."""
    reference: str | None = None
    against: str | None = None
    features: str | None = None
    clip: str | None = None
    weights: tuple[str, ...] = ()
    """Of networks, NAME=PATH; a path alone is the protocol's feature network's."""
    prompts: str | None = None
    num: int = 0
    """0: the protocol's, else one per prompt."""
    allow_fewer: bool = False
    steps: int = 50
    guidance: float | None = None
    """None: 3 for a teacher, its own for a pipeline."""
    solver: str = "teacher"
    noise_scale: float = 1.0
    precision: str = "fp32"
    seed: int | None = None
    """None: the protocol's."""
    every: bool = False
    """All checkpoints of a student's run, one after another."""
    resamples: int = 200

    batch_size: int = 64
    part: int = 0
    out: str | None = None
    work: str | None = None
    keep: str | None = None
    train: str | None = None
    latency: bool = False
    latency_repeats: int = 10

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "latency_repeats"):
            if getattr(self, name) < 1:
                raise SettingError(f"{name} is {getattr(self, name)}; expected 1 or more")
        for name in ("num", "part", "resamples"):
            if getattr(self, name) < 0:
                raise SettingError(f"{name} is {getattr(self, name)}; expected 0 or more")
        if self.guidance is not None and not 0 <= self.guidance < math.inf:
            raise SettingError(f"guidance is {self.guidance}; expected 0 or more")
        if not 0 <= self.noise_scale <= 2:
            raise SettingError(f"noise_scale is {self.noise_scale}; expected 0 (none) to 2 (1: as trained)")

    def check_source(self) -> None:
        """Raise SettingError unless one thing is to be measured, with settings that mean something for it."""
        given = [name for name in ("student", "pipeline", "images") if getattr(self, name)]
        if (
            len(given) > 1
            or (not given and not self.teacher)
            or (self.teacher and given and given != ["student"])
        ):
            raise SettingError(
                "give --student or --teacher, or --images, or --pipeline, to say what is measured: "
                "one of them"
            )
        if self.noise_scale != 1 and self.student is None:
            raise SettingError("noise_scale is a student's setting; leave it out")
        if self.every and (self.student is None or not (Path(self.student) / "checkpoints").is_dir()):
            raise SettingError("--every goes over a run's checkpoints; give --student the folder of a run")
        if self.keep and self.images:
            raise SettingError(
                "--keep saves what a sampler draws, and --images are files already; leave it out"
            )

    def weight_table(self) -> dict[str, str]:
        """`weights` by network."""
        pairs = [text.partition("=") for text in self.weights]
        return {name if found else "features": path if found else name for name, found, path in pairs}


PRESETS: Mapping[str, EvalRun] = MappingProxyType(
    {"default": EvalRun(), "miniature": EvalRun(student="miniature", protocol=PROTOCOLS["miniature"])}
)
"""Presets of `d2g eval run`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CurveRun:
    """One `d2g eval curve`: the same evaluation at several values of one setting."""

    run: EvalRun = EvalRun()
    setting: str = "guidance"
    values: tuple[float, ...] = ()
    """For the setting `checkpoints`: numbers of images trained on; none: all checkpoints there are."""

    def __post_init__(self) -> None:
        if self.setting not in CURVE_SETTINGS:
            raise SettingError(f"curve over {self.setting!r}; choose from {', '.join(CURVE_SETTINGS)}")
        if self.setting != "checkpoints" and not self.values:
            raise SettingError(
                f"a curve over {self.setting} needs its values, say --over {self.setting}=1,2,4"
            )
        for value in self.values:
            self.at(value)  # a wrong last one shows before the first is measured

    def at(self, value: float) -> EvalRun:
        """The run at one value of the setting."""
        if self.setting == "checkpoints":
            return self.run
        if self.setting == "steps" and not float(value).is_integer():
            raise SettingError(f"curve over steps: {value}; expected whole numbers")
        changed: dict[str, object] = {self.setting: int(value) if self.setting == "steps" else value}
        return replace(self.run, **changed)  # type: ignore[arg-type]  # the setting decides its type


CURVE_SETTINGS = ("guidance", "steps", "noise_scale", "checkpoints")
"""What a curve can run over. `noise_scale` is truncation: it shrinks a student's noise towards its mean."""
