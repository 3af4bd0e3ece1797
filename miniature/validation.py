"""FID while a student trains: what `d2g distill --validate` measures beside the held-out pairs."""

from functools import cached_property
from pathlib import Path

from core import pretrained
from core.errors import SettingError
from distill.config import DistillConfig
from distill.generator import Student
from distill.sample import OneStep
from distill.validate import Validate
from eval.config import EvalRun
from eval.source import Source
from miniature.bench import Bench
from miniature.sources import one_step_source


class _During(Bench):
    """A bench whose source is the student that is being trained, whatever its weights are just now."""

    student: Student

    @cached_property
    def _around(self) -> OneStep:
        """Text encoder and VAE, loaded at the first validation."""
        assert self.config.teacher is not None
        text = pretrained.load_text_encoder(self.config.teacher).to(self.device)
        vae = pretrained.load_vae(self.config.teacher).to(self.device)
        return OneStep(self.student, text, vae, self.device)

    def source(self, config: EvalRun, checkpoint: Path | None = None) -> Source:
        """The student's images of the protocol's prompts."""
        return one_step_source("student", self._around, self.drawing(self.prompts))


def validator(config: DistillConfig, run: EvalRun) -> Validate:
    """(averaged student, images seen) -> `val/fid` under the run's protocol, from the same noise each time.

    run: its protocol, reference, weights, prompts and number of images. Raises SettingError where the config
    validates nothing, or shards the student: ranks draw different numbers of images.
    """
    if not config.train.validate_images:
        raise SettingError(
            "--validate needs to know when; give --set train.validate_images=N --set train.validate_pairs=K"
        )
    if config.engine.parallel == "fsdp":
        raise SettingError(
            "--validate draws whole students; set engine.parallel=ddp, or `d2g eval run --every`"
        )
    bench = _During(run)

    def measure(student: Student, nimg: int) -> dict[str, float]:
        bench.student = student
        _, found = bench.measure(run)
        assert found.result.fid is not None
        return {"val/fid": float(found.result.fid)}

    return measure
