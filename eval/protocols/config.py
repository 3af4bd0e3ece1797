"""Settings of the evaluation commands and their presets."""

import math
from dataclasses import dataclass, replace
from pathlib import Path

from d2g.core.config import Presets, require, setting
from d2g.core.errors import SettingError
from d2g.data.columns import require_prompts
from eval.protocols.protocol import PROTOCOLS, Protocol

PIPELINE_STEPS = 50
"""Default number of solver steps of a pipeline or teacher."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalRun:
    """One `d2g eval run`: what is measured, and how. Files and folders are strings.

    Exactly one of student, teacher, pipeline and images is measured. A teacher next to a student is the one
    that the student is loaded with. Settings from `batch_size` on do not change numbers.
    """

    student: str | None = setting(
        None, "Student to measure: run folder, exported student or shipped name", recipe=True
    )
    prior: str | None = setting(
        None,
        "Stage C of a cascade: a student for a student of stage B, a teacher for a teacher of stage B",
        recipe=True,
    )
    teacher: str | None = setting(
        None, "Teacher to measure; with student, the teacher that the student is loaded with", recipe=True
    )
    pipeline: str | None = setting(None, "Any diffusers pipeline to measure", recipe=True)
    images: str | None = setting(None, "Folder of images to measure", recipe=True)
    protocol: Protocol = setting(
        PROTOCOLS["folder"],
        "Protocol that fixes prompts, sizes and networks; `d2g eval protocols NAME` lists its own settings",
        source='method.md "Evaluation protocol"',
        recipe=True,
    )
    metrics: tuple[str, ...] = setting((), "Metrics to compute; empty: the protocol's", recipe=True)
    reference: str | None = setting(
        None, "Reference statistics or folder of real images; null: none", recipe=True
    )
    against: str | None = setting(
        None, "Other side of paired metrics: a teacher, or the images that its evaluation kept"
    )
    features: str | None = setting(
        None,
        "Feature network: a name, FILE.pt2, FILE.onnx or MODULE:FUNCTION (your code, which is run); null: "
        "the protocol's, else inception if its weights are here, else efficientnet-lite0",
    )
    features_input: str | None = setting(
        None,
        "Pixels for a network in a file, SIZE,NORMALIZATION: imagenet, openai, half (-1 to 1), unit (0 to 1) "
        "or byte (0 to 255); null: 224,imagenet",
    )
    clip: str | None = setting(None, "CLIP model; null: the protocol's")
    weights: tuple[str, ...] = setting(
        (), "Weight files of networks as NAME=PATH; a path alone is the feature network's"
    )
    prompts: str | None = setting(None, "Prompt file; - is standard input")
    column: str | None = setting(
        None, "Column of the prompts and of the images' captions; null: prompt, caption, text or TEXT"
    )
    num: int = setting(0, "Number of images; 0: the protocol's, else one per prompt")
    allow_fewer: bool = setting(False, "Accept fewer images than the protocol asks for")
    steps: int = setting(
        PIPELINE_STEPS, "Solver steps of a teacher or pipeline; a pipeline with fewer takes its own"
    )
    guidance: float | None = setting(
        None,
        "Guidance scale of a teacher (null: beside its student that of the student's pairs, else 3) or "
        "pipeline (null: its own default), and to imitate, for a student that takes it (null: as in `d2g "
        "sample`)",
    )
    prior_steps: int | None = setting(None, "Solver steps of the teacher of stage C in a cascade; null: 60")
    prior_guidance: float | None = setting(
        None, "Guidance scale of the teacher of stage C in a cascade; null: 3"
    )
    solver: str = setting("teacher", "ODE solver of a teacher")
    noise_scale: float = setting(1.0, "Factor on a student's noise (truncation); 1: as trained")
    psi: float = setting(1.0, "Truncation of a student's styles w towards their mean; 1: none")
    precision: str = setting("fp32", "Arithmetic of the sampler's network")
    seed: int | None = setting(None, "Seed of the noise and of the choice of prompts; null: the protocol's")
    every: bool = setting(False, "Evaluate every checkpoint of a student's run")
    resamples: int = setting(200, "Bootstrap resamples of the confidence intervals; 0: no intervals")

    batch_size: int = setting(64, "Images per forward pass")
    part: int = setting(0, "Images per part, the unit that is saved and resumed; 0: a 64th of all, 16 to 512")
    out: str | None = setting(None, "Result file or folder")
    work: str | None = setting(None, "Folder for partial results of an interrupted evaluation")
    keep: str | None = setting(None, "Folder in which to keep the sampled images")
    train: str | None = setting(None, "Training images, for the report's nearest neighbors and the floor")
    latency: bool = setting(False, "Also measure the time per image")
    latency_repeats: int = setting(10, "Repetitions of the latency measurement")

    def __post_init__(self) -> None:
        require(
            self,
            steps=(self.steps >= 1, "1 or more"),
            batch_size=(self.batch_size >= 1, "1 or more"),
            latency_repeats=(self.latency_repeats >= 1, "1 or more"),
            num=(self.num >= 0, "0 or more"),
            part=(self.part >= 0, "0 or more"),
            resamples=(self.resamples >= 0, "0 or more"),
            guidance=(self.guidance is None or 0 <= self.guidance < math.inf, "0 or more"),
            prior_steps=(self.prior_steps is None or self.prior_steps >= 1, "1 or more"),
            prior_guidance=(
                self.prior_guidance is None or 0 <= self.prior_guidance < math.inf,
                "0 or more",
            ),
            noise_scale=(0 <= self.noise_scale <= 2, "0 (none) to 2 (1: as trained)"),
            psi=(0 <= self.psi <= 1, "0 (the mean style) to 1 (no truncation)"),
        )
        require_prompts(self.column, self.prompts or self.images)

    @property
    def sources(self) -> list[str]:
        """Names of the settings that say what is measured, of those that are set."""
        return [name for name in ("student", "pipeline", "images", "teacher") if getattr(self, name)]

    def check_source(self) -> None:
        """Raise SettingError unless exactly one thing is measured, with settings that apply to it."""
        if not (sources := self.sources):
            raise SettingError(
                "give --student or --teacher, or --images, or --pipeline, to say what is measured"
            )
        if len(sources) > 1 and sources != ["student", "teacher"]:
            both = " and ".join(f"{name} is {getattr(self, name)}" for name in sources)
            raise SettingError(
                f"{both}; expected one of them, which is measured: leave the others out, and empty one of a "
                f"preset, as with --set {sources[0]}=null"
            )
        # Settings that apply to some sources only.
        if self.prior is not None and self.student is None and self.teacher is None:
            raise SettingError(
                f"prior is {self.prior!r}, which goes with --student or --teacher; leave it out"
            )
        for name in ("prior_steps", "prior_guidance"):
            if getattr(self, name) is not None and self.prior is None:
                raise SettingError(f"{name} is {getattr(self, name)}, which goes with --prior; leave it out")
        for name in ("noise_scale", "psi"):
            if getattr(self, name) != 1 and self.student is None:
                raise SettingError(f"{name} is a student's setting; leave it out")
        if self.every and (self.student is None or not (Path(self.student) / "checkpoints").is_dir()):
            raise SettingError("--every goes over a run's checkpoints; give --student the folder of a run")
        if self.latency and self.images:
            raise SettingError("--latency times a sampler; images are already drawn, leave it out")
        if self.keep and self.images:
            raise SettingError(
                "--keep saves what a sampler draws, and --images are files already; leave it out"
            )

    def weight_table(self) -> dict[str, str]:
        """The weight files by network; a path without a name is the feature network's."""
        pairs = [text.partition("=") for text in self.weights]
        return {name if sep else "features": path if sep else name for name, sep, path in pairs}


EVAL_PRESETS = Presets({"default": ("The protocol that --protocol names, by default `folder`", EvalRun())})
"""Presets of `d2g eval run`; other packages add theirs with `register_preset`."""


def register_preset(name: str, about: str, run: EvalRun) -> None:
    """Add a preset of another package, `about` being its line for --help. Again: changes nothing."""
    assert EVAL_PRESETS.setdefault(name, run) == run, f"preset {name!r} is already registered"
    EVAL_PRESETS.about[name] = about


@dataclass(frozen=True, kw_only=True, slots=True)
class CurveRun:
    """One `d2g eval curve`: the same evaluation at several values of one setting."""

    run: EvalRun = EvalRun()
    setting: str = "guidance"
    """One of `CURVE_SETTINGS`."""
    values: tuple[float, ...] = ()
    """Values of the setting. For `checkpoints`: the training images of each; empty: all checkpoints."""
    beside: tuple[str, ...] = ()
    """Folders of earlier curves over the same setting and protocol, drawn in the same picture."""

    def __post_init__(self) -> None:
        if self.setting not in CURVE_SETTINGS:
            raise SettingError(f"curve over {self.setting!r}; choose from {', '.join(CURVE_SETTINGS)}")
        if self.setting != "checkpoints" and not self.values:
            raise SettingError(
                f"a curve over {self.setting} needs its values, say --over {self.setting}=1,2,4"
            )
        names = [Path(folder).name for folder in self.beside]
        if twice := [name for name in names if names.count(name) > 1]:
            raise SettingError(
                f"--beside has two folders named {twice[0]!r}; rename one, both names are in the picture"
            )
        for value in self.values:
            self.at(value)  # refuse a wrong value before the first one is measured

    def at(self, value: float) -> EvalRun:
        """The run at one value of the setting."""
        if self.setting == "checkpoints":
            return self.run
        if self.setting == "steps" and not float(value).is_integer():
            raise SettingError(f"curve over steps: {value}; expected whole numbers")
        changed: dict[str, object] = {self.setting: int(value) if self.setting == "steps" else value}
        return replace(self.run, **changed)  # type: ignore[arg-type]  # the type depends on the setting


CURVE_SETTINGS = ("guidance", "steps", "noise_scale", "psi", "checkpoints")
"""Settings a curve can run over. Two are truncation: `noise_scale` shrinks a student's noise to its mean,
`psi` the styles w of a student that has them."""
