"""Settings of `d2g run` and their presets."""

from dataclasses import dataclass, replace

from d2g.core.config import Presets, require, setting
from d2g.core.errors import SettingError
from distill.config.export import ExportConfig
from distill.config.presets import DISTILL_PRESETS
from distill.config.run import DistillConfig
from pairgen.config import PAIR_PRESETS, PairConfig
from teacher_training.config import TEACHER_PRESETS, TeacherConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class FullRunConfig:
    """A run from pictures to a student. Each part has the settings of its own command."""

    data: str = setting("", "Folder of captioned pictures, or image-parquet (option --data)", recipe=True)
    pretrained_teacher: str = setting(
        "", "Teacher to distill (option --teacher); empty: train one on the pictures", recipe=True
    )
    minutes: float = setting(
        0.0, "Minutes of all parts together on this machine (option --minutes); 0: the settings' own lengths"
    )
    stop_untrained: bool = setting(True, "Stop after the teacher's training if it is not trained")
    eval_images: int = setting(500, "Images of each evaluation, at most")
    features: str | None = setting(None, "Feature network, as --features of `d2g eval run`")
    features_input: str | None = setting(None, "Its pixels, as --features-input of `d2g eval run`")
    teacher: TeacherConfig = setting(TEACHER_PRESETS["quick"], "Training of the teacher")
    pairs: PairConfig = setting(
        replace(PAIR_PRESETS["miniature"], precision="fp32", compile=False), "Pair generation"
    )
    ode: DistillConfig = setting(DISTILL_PRESETS["miniature"]["ode"], "The regression stage")
    gan: DistillConfig = setting(DISTILL_PRESETS["miniature"]["gan"], "The GAN stage")
    export: ExportConfig = setting(ExportConfig(format="diffusers"), "Format of the exported student")

    def __post_init__(self) -> None:
        if self.teacher.network != "unet_text":
            raise SettingError(
                f"teacher.network is {self.teacher.network!r}; `d2g run` trains unet_text alone: train the "
                "teacher with `d2g teacher train`, and give it as --teacher"
            )
        # The second stage starts from the student of the first.
        for name, first, second in (
            ("student_timestep", self.ode.student_timestep, self.gan.student_timestep),
            ("student.kind", self.ode.student.kind, self.gan.student.kind),
        ):
            if first != second:
                raise SettingError(
                    f"ode.{name} is {first}, and gan.{name} is {second}; expected the same, because the GAN "
                    "stage starts from the student of the regression stage: set both"
                )
        require(
            self,
            minutes=(self.minutes >= 0, "0 or more"),
            eval_images=(self.eval_images >= FEWEST_IMAGES, f"{FEWEST_IMAGES} or more"),
        )


REFERENCE_PICTURES = 4
"""Real pictures that an evaluation compares with, at most, for each of its images."""
FEWEST_IMAGES = 12
"""Images of an evaluation, at least: recall at k = 5 needs more than 5 pictures on each side of the floor."""


def _preset(minutes: float, teacher: str, eval_images: int) -> FullRunConfig:
    config = FullRunConfig(minutes=minutes, eval_images=eval_images, teacher=TEACHER_PRESETS[teacher])
    return replace(config, pairs=replace(config.pairs, teacher=""))


FULL_RUN_PRESETS = Presets(
    {
        "quick": ("Half an hour at 32 px: whether the pictures work", _preset(30, "quick", 500)),
        "evening": ("Two hours at 64 px", _preset(120, "evening", 1_000)),
        "night": ("Fifteen hours at 64 px, with a larger U-Net", _preset(900, "night", 2_000)),
    }
)
"""Presets of `d2g run`."""
