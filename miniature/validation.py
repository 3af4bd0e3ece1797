"""FID and its like while a student trains: where training and measures meet."""

from dataclasses import replace

from core import dist, pretrained
from core.errors import SettingError
from core.parallel import local
from distill.generator import Student
from distill.sample import OneStep
from distill.validate import Validate
from eval.config import EvalRun
from eval.evaluate import evaluate
from eval.parts import Work
from eval.protocol import PAIRED
from miniature.bench import Bench
from miniature.sources import one_step_source


def measuring(run: EvalRun, teacher: str) -> Validate:
    """What `distill.train.train` calls at each validation: an evaluation of the averaged student, its numbers
    as `val/fid`, `val/clip_score` and so on, the same on every rank.

    run: protocol, metrics, reference, prompts, number of images and weights, as of `d2g eval run`; networks
    and reference are loaded once, at the first call. Keep `num` small: a validation draws all. Numbers of
    fewer images than the protocol's compare with each other only. Raises SettingError for metrics of pairs,
    and for weights in shards, which all ranks would have to gather equally often.
    """
    if paired := sorted(set(run.metrics or run.protocol.metrics) & set(PAIRED)):
        raise SettingError(
            f"metric {paired[0]!r} compares images pair by pair; validation takes fid and the like"
        )
    made: list[tuple[Bench, OneStep]] = []

    def validate(student: Student, nimg: int) -> dict[str, float]:
        if any(local(value) is not value for value in student.parameters()):
            raise SettingError("validation by images needs whole weights; set engine.parallel=ddp")
        if not made:  # the run has joined its process group by now
            bench = Bench(replace(run, student=None, pipeline=None, images=None, teacher=teacher))
            text, vae = pretrained.load_text_encoder(teacher), pretrained.load_vae(teacher)
            made.append((bench, OneStep(student, text.to(bench.device), vae.to(bench.device), bench.device)))
        bench, one = made[0]
        one = replace(one, student=student)
        given = bench.scenes or run.reference is not None
        found = evaluate(
            one_step_source(f"{nimg} images", one, bench.drawing(bench.prompts)),
            bench.protocol,
            bench.networks,
            metrics=bench.metrics,
            reference=(lambda: bench.reference) if given else None,
            count=bench.count or len(bench.prompts),
            allow_fewer=True,
            work=Work(batch_size=run.batch_size),
            resamples=0,
        )
        return {
            f"val/{name}": value for name, value in dist.gather_objects(found.result.numbers())[0].items()
        }

    return validate
