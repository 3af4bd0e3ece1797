"""Everything from pictures to a student: teacher, pairs, both stages, evaluations, export, one report."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from d2g.core.atomic_files import write_atomically
from d2g.core.distributed import checkpoint, process_group
from d2g.core.distributed.process_count import save_process_count
from d2g.core.errors import UserError
from d2g.core.logs import logger
from d2g.core.progress import Progress, quiet
from d2g.core.tracking.run_directory import sole_owner
from d2g.diffusion import pretrained
from distill.config.export import FORMATS_WITH_CARD
from distill.export.export import export as export_student_as
from distill.student_files import student_folder
from eval.protocols.config import EvalRun
from eval.protocols.protocol import PROTOCOLS
from eval.result import EvalResult
from eval.runner.run import run_evaluation
from pairgen.statistics import store_statistics
from teacher_training.full_run.config import REFERENCE_PICTURES, FullRunConfig
from teacher_training.full_run.pictures import (
    pair_prompts,
    reference_pictures,
    save_pictures,
    spread_captions,
)
from teacher_training.full_run.plan import PARTS, FullRunPlan, save_plan
from teacher_training.full_run.report import SAMPLER_TITLES, write_run_report
from teacher_training.full_run.stages import distill_teacher
from teacher_training.networks.registry import network_of
from teacher_training.plan import WholeProgress, save_request
from teacher_training.times import PartTimes
from teacher_training.train import train_teacher


@dataclass(frozen=True, kw_only=True)
class FullRunSummary:
    """Result of a run.

    `teacher`, `student` and `exported` are folders. `verdict` says whether the teacher is trained (None if
    this call did not train it), and `pairs` whether the pairs are usable. `results` has the metrics of each
    sampler, and those of real pictures as "real". `seconds` is the time of each part over all starts.
    """

    out: str
    teacher: str
    student: str | None
    exported: str | None
    verdict: str | None
    pairs: str | None
    results: Mapping[str, Mapping[str, float]]
    seconds: Mapping[str, float]
    report: str


def run_parts(
    config: FullRunConfig,
    plan: FullRunPlan,
    out: Path,
    parts: Sequence[str] = PARTS,
    progress: Progress = quiet,
    command: str = "",
) -> FullRunSummary | None:
    """Do the parts of a run that are not finished, then write OUT/report.html. Call on every rank.

    config, plan: of `plan_run`. OUT/teacher, pairs, ode, gan, results and student are what the single
    commands write, and each part resumes as its own command does. `command`: what finishes an interrupted
    run. Returns None on other ranks than 0. Raises what the parts raise, and UserError for a teacher that is
    not trained, unless `config.stop_untrained` is off.
    """
    with sole_owner(out, "runs in"):
        save_plan(out, plan)
        save_process_count(out)
        times = PartTimes(out / "times.json")
        # The pictures at the teacher's size, and the teacher.
        name, verdict, size = str(out / "teacher"), None, config.teacher.size
        if config.pretrained_teacher:
            name = config.pretrained_teacher
            size = pretrained.latent_shape(name)[1] * pretrained.latent_downscale(name)
        pictures = save_pictures(config.teacher, size, out, progress)
        if "teacher" in parts and not config.pretrained_teacher:
            with times.measure("teacher"):
                verdict = _train_teacher(config, plan, out, progress, command)

        # Pairs, and both stages of the student. The pairs' verdict comes before the student trains on them.
        prompts = pair_prompts(pictures, config.pairs, out)
        pairs = replace(config.pairs, teacher=name, prompts=str(prompts), column=None)
        ode, gan = replace(config.ode, teacher=name), replace(config.gan, teacher=name)
        distill_teacher(pairs, ode, gan, out, times, progress, {"pairs"} & set(parts))
        pairs_verdict = _judge_pairs(config, out / "pairs", progress)
        distill_teacher(pairs, ode, gan, out, times, progress, {"ode", "gan"} & set(parts))

        # The results, the export, and the report of all parts.
        if "eval" in parts:
            with times.measure("evaluation"):
                _evaluate(config, name, pictures, out, progress)
        results = _load_results(out)
        exported = None
        if "export" in parts and process_group.rank() == 0:
            with times.measure("export"):
                exported = _export(config, out)
        if process_group.rank() == 0:
            verdicts = (verdict, pairs_verdict)
            report = write_run_report(config, out, name, pictures, results, verdicts, times.seconds)
        process_group.barrier()
    if process_group.rank() != 0:
        return None
    floor = next((result.floor for result in results.values() if result.floor), {})
    numbers = {name: result.numbers() for name, result in results.items()}
    return FullRunSummary(
        out=str(out),
        teacher=name,
        student=str(out / "gan") if has_checkpoint(out / "gan") else None,
        exported=exported,
        verdict=verdict,
        pairs=pairs_verdict,
        results=numbers | ({"real": floor} if floor else {}),
        seconds=times.seconds,
        report=str(report),
    )


def _train_teacher(
    config: FullRunConfig, plan: FullRunPlan, out: Path, progress: Progress, command: str
) -> str:
    """Train the teacher to its planned length, and return its verdict.

    Raises UserError for a teacher that is not trained, unless `config.stop_untrained` is off.
    """
    assert plan.teacher is not None and plan.teacher_request is not None
    stages = network_of(config.teacher).stages
    save_request(out / "teacher", config.teacher, plan.teacher_request, stages)
    total_progress = WholeProgress(plan.teacher, progress)
    summary = train_teacher(config.teacher, out / "teacher", None, total_progress, command)
    trained, verdict = process_group.gather_objects((summary.trained, summary.verdict))[0]
    logger.info("%s", verdict)
    if config.stop_untrained and not trained:
        raise UserError(
            f"{verdict}; look at {out / 'teacher' / 'report.html'}, then give more --minutes and another "
            "--out, or --untrained to go on with it"
        )
    return str(verdict)


def _judge_pairs(config: FullRunConfig, folder: Path, progress: Progress) -> str | None:
    """The verdict on the pairs, which the log shows; None without. Raises UserError for unusable ones."""
    if not (folder / "store.json").is_file():
        return None
    statistics = store_statistics(folder, JUDGED_ROWS, progress=progress) if process_group.rank() == 0 else {}
    facts = {name: statistics.get(name) for name in ("usable", "verdict")}
    usable, verdict = process_group.gather_objects(facts)[0].values()
    logger.info("%s", verdict)
    if config.stop_untrained and not usable:
        raise UserError(f"{verdict}; --untrained goes on with them")
    return str(verdict)


JUDGED_ROWS = 1024
"""Pairs that their verdict is based on, at most."""


def has_checkpoint(run: Path) -> bool:
    """Whether a stage has left a student."""
    return checkpoint.latest(run / "checkpoints") is not None


def _evaluate(config: FullRunConfig, teacher: str, pictures: Path, out: Path, progress: Progress) -> None:
    """Evaluate the teacher and the student of each stage, as `d2g eval run` does, to OUT/results."""
    # Real pictures and their captions, the same for all samplers.
    captions = spread_captions(str(pictures), None, config.eval_images)
    prompts = out / "results" / "prompts.jsonl"
    if process_group.rank() == 0:
        write_atomically(prompts, "".join(json.dumps({"prompt": text}) + "\n" for text in captions))
    process_group.barrier()
    count = REFERENCE_PICTURES * len(captions)
    base = EvalRun(
        protocol=PROTOCOLS["folder"],
        reference=str(reference_pictures(pictures, count, out / "results" / "reference.parquet")),
        prompts=str(prompts),
        num=len(captions),
        steps=config.pairs.steps,
        guidance=config.pairs.guidance,
        solver=config.pairs.solver,
        features=config.features,
        features_input=config.features_input,
    )

    # Unfinished work is kept per teacher: the digest of its weights names the folder.
    digest = pretrained.weights_sha256(teacher)[:8]
    for sampler in SAMPLER_TITLES:
        folder, run = out / "results" / sampler, replace(base, teacher=teacher)
        work = folder / "work" / digest
        if sampler != "teacher":
            if not has_checkpoint(out / sampler):
                continue
            # Another length of the stage has another work folder.
            run = replace(base, student=str(out / sampler), guidance=None)
            work = folder / "work" / f"{digest}-{student_folder(str(out / sampler))[0].name}"
        run_evaluation(replace(run, out=str(folder), work=str(work)), progress)


def _load_results(out: Path) -> dict[str, EvalResult]:
    """The results of the samplers that were evaluated, by their names."""
    return {
        sampler: EvalResult.load(out / "results" / sampler)
        for sampler in SAMPLER_TITLES
        if (out / "results" / sampler / "result.json").is_file()
    }


def _export(config: FullRunConfig, out: Path) -> str | None:
    """Export the student to OUT/student; None without one."""
    if not has_checkpoint(out / "gan"):
        return None
    scores = out / "results" / "gan" / "result.json"
    card = replace(config.export.card, scores=(str(scores),) if scores.is_file() else ())
    has_card = config.export.format in FORMATS_WITH_CARD
    settings = replace(config.export, student=str(out / "gan"), card=card if has_card else config.export.card)
    result: dict[str, Any] = export_student_as(settings, out / "student")
    return str(result["out"])
