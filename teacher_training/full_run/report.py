"""OUT/report.html of `d2g run`: verdicts, numbers, samples beside real pictures, curves, times."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from d2g.core.distributed import checkpoint
from d2g.core.tracking.run_directory import read_stats
from d2g.diffusion.pretrained import load_vae
from d2g.diffusion.teacher import load_teacher
from eval.report.charts import Curve
from eval.report.gallery import Pictures
from eval.report.html import ReportData, write_report
from eval.report.page import environment, first_images, metrics_of
from eval.result import EvalResult
from eval.runner.samplers import SamplingRequest, ode_source, student_source
from pairgen.config import PairConfig
from teacher_training.full_run.config import FullRunConfig
from teacher_training.full_run.pictures import spread_pictures
from teacher_training.previews import reconstructions
from teacher_training.report import teacher_curves

BESIDE_COUNT = 16
"""Captions that the report shows all samplers with."""
SAMPLE_SEED = 1_000  # as in evaluations: noise that no stage was trained on
STAGE_TITLES = {"ode": "Stage 1", "gan": "Stage 2"}
SAMPLER_TITLES = {"teacher": "teacher", "ode": "after stage 1", "gan": "student"}
"""Evaluated samplers, and their names in the report."""


def write_run_report(
    config: FullRunConfig,
    out: Path,
    teacher: str,
    pictures: Path,
    results: Mapping[str, EvalResult],
    verdicts: Sequence[str | None],
    seconds: Mapping[str, float],
) -> Path:
    """Write OUT/report.html from what the folder holds so far; returns its path.

    pictures: of `save_pictures`. results: by the name of the sampler. verdicts: on the teacher and the pairs.
    """
    # Pictures, curves and results of all parts that have run so far.
    beside = _pictures_beside(config.pairs, out, teacher, pictures)
    separate = {name: out / "results" / name for name in SAMPLER_TITLES}
    curves = teacher_curves(Path(teacher) / "training")
    for stage, title in STAGE_TITLES.items():
        curves += stage_curves(title, read_stats(out / stage))
    by_title = {title: results[name] for name, title in SAMPLER_TITLES.items() if name in results}
    first = next(iter(by_title.values()), None)
    data = ReportData(
        title=f"From {Path(config.data).name} to one step",
        summary=" ".join(f"{text[0].upper()}{text[1:]}." for text in verdicts if text),
        sources={
            f"{SAMPLER_TITLES[name]}, in detail": f"{folder}/report.html"
            for name, folder in separate.items()
            if (folder / "report.html").is_file()
        },
        counts={} if first is None else first.counts,
        notes=[] if first is None else first.notes,
        models={} if first is None else first.models,
        metrics=[] if first is None else metrics_of(by_title),
        beside=beside,
        curves=curves,
        timings=seconds,
        environment=environment(),
    )
    path = out / "report.html"
    write_report(path, data)
    return path


def _pictures_beside(pairs: PairConfig, out: Path, teacher: str, pictures: Path) -> list[Pictures]:
    """Real pictures beside all samplers on the same noise with their captions, and reconstructions."""
    # One source per sampler, all from the same noise and captions.
    real, captions = spread_pictures(pictures, BESIDE_COUNT)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    request = SamplingRequest(prompts=captions, seed=SAMPLE_SEED, device=device)
    loaded = load_teacher(teacher, device)
    sources = {"teacher": ode_source(loaded, request, steps=pairs.steps, guidance=pairs.guidance)}
    for stage in STAGE_TITLES:
        if checkpoint.latest(out / stage / "checkpoints") is not None:
            sources[stage] = student_source(str(out / stage), request, teacher=teacher)
    columns = {SAMPLER_TITLES[name]: first_images(source, len(real)) for name, source in sources.items()}
    vae = load_vae(teacher).to(device)
    return [
        Pictures(
            title="Same noise, same prompt",
            columns={"real picture": list(real), **columns},
            prompts=captions,
            text="The samplers share the noise; the real picture is the one that the caption comes from.",
        ),
        Pictures(
            title="Reconstructions",
            columns={"real picture": real, "reconstruction": reconstructions(vae, real)},
            prompts=captions,
            text="What the autoencoder keeps: no sampler can look better than this.",
        ),
    ]


def stage_curves(title: str, lines: Sequence[Mapping[str, float]]) -> list[Curve]:
    """Curves of the loss terms and of the discriminator's mean logits, over training images."""
    curves = []
    for prefix, subject in (("loss", "losses"), ("logit", "the discriminator's mean logits")):
        names = sorted({name for line in lines for name in line if _part_of(name, prefix)})
        points = {name: [(line["nimg"], line[name]) for line in lines if name in line] for name in names}
        if points:
            curves.append(Curve(title=f"{title}: {subject}", x="images", y=prefix, lines=points))
    return curves


def _part_of(name: str, prefix: str) -> bool:
    """Whether a logged name is like loss/g or logit/real; logits of single discriminator heads are not."""
    return name.startswith(f"{prefix}/") and name.count("/") == 1
