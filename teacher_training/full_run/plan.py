"""The plan of a run before it starts: the time of each part on this machine, and lengths that fit."""

import json
import logging
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict

import torch

from d2g.core.atomic_files import write_atomically
from d2g.core.config import differing, with_values
from d2g.core.distributed import process_group
from d2g.core.errors import Interrupted, UserError
from d2g.core.json_files import read_json_object
from d2g.core.logs import logger
from d2g.core.seeds import fork_rng
from d2g.core.tracking.run_directory import read_stats
from distill.config.run import TrainConfig
from distill.training.train import train
from eval.protocols.config import EvalRun
from eval.runner.session import EvalSession
from pairgen.cost import device_name, plan_pairs
from pairgen.generate import generate_pairs
from teacher_training.full_run.config import FEWEST_IMAGES, REFERENCE_PICTURES, FullRunConfig
from teacher_training.full_run.pictures import spread_captions
from teacher_training.networks.registry import network_of
from teacher_training.plan import Request, TeacherPlan, plan_teacher
from teacher_training.start import save_untrained_teacher

PARTS = ("teacher", "pairs", "ode", "gan", "eval", "export")
"""Parts of a run, in order."""
PART_SHARES = {"teacher": 0.6, "pairs": 0.12, "ode": 0.1, "gan": 0.14, "eval": 0.04}
"""Shares of the minutes, over the parts that the run has."""
PART_LENGTHS = {
    "pairs": "pairs.num_pairs",
    "ode": "ode.train.images",
    "gan": "gan.train.images",
    "eval": "eval_images",
}
"""The setting of each part's length; the teacher's training plans its own lengths."""
TIMED_BATCHES, TIMED_SOLVER_STEPS, TIMED_IMAGES = 3, 2, 8
"""Batches of each stage, solver steps of a pair, and images of the feature network that are timed."""


@dataclass(frozen=True, kw_only=True)
class FullRunPlan:
    """The plan of a run.

    request: minutes and teacher for which the plan was made. lengths: pairs and images by part. seconds: time
    per pair or image by part. teacher, teacher_request: plan of the teacher's training and its requested
    length; None for a pretrained teacher.
    """

    request: Mapping[str, Any]
    lengths: Mapping[str, int]
    seconds: Mapping[str, float]
    measured_on: str
    teacher: TeacherPlan | None = None
    teacher_request: Request | None = None

    @property
    def minutes(self) -> dict[str, float]:
        """Minutes by part, finished work of the parts after the teacher included."""
        later = {part: self.lengths[part] * self.seconds[part] / 60 for part in self.lengths}
        return ({} if self.teacher is None else {"teacher": self.teacher.minutes}) | later

    def lines(self) -> list[str]:
        """The plan in words."""
        units = {"pairs": "pairs", "ode": "images", "gan": "images", "eval": "images of each sampler"}
        minutes = self.minutes
        parts = ", ".join(
            f"{part} {length:,} {units[part]} ({minutes[part]:.1f} min)"
            for part, length in self.lengths.items()
        )
        return [
            *(["plan: the teacher is given"] if self.teacher is None else self.teacher.lines()),
            f"plan: then {parts}",
            f"plan: about {sum(minutes.values()):.1f} minutes for the whole run ({self.measured_on})",
        ]


def plan_run(config: FullRunConfig, out: Path) -> tuple[FullRunConfig, FullRunPlan]:
    """Choose the lengths of all parts, and say what the run will do. Nothing is written. Call on every rank.

    The lengths of OUT/plan.json hold from the first start on. Raises UserError for a run that was planned for
    other minutes or another teacher, and for inputs that the parts refuse.
    """
    device = process_group.init(long_waits=True)
    request = {"minutes": config.minutes, "teacher": config.pretrained_teacher}
    earlier = _known_plan(out / "plan.json", request)
    shares = dict(PART_SHARES)
    if config.pretrained_teacher:
        del shares["teacher"]
    budget = {part: 60 * config.minutes * share / sum(shares.values()) for part, share in shares.items()}
    # The teacher's training plans itself, within its share of the minutes.
    teacher_plan = teacher_request = None
    if not config.pretrained_teacher:
        teacher_request = Request(minutes=budget["teacher"] / 60 or config.teacher.minutes or None)
        stages = network_of(config.teacher).stages
        teacher, teacher_plan = plan_teacher(config.teacher, out / "teacher", stages, teacher_request)
        config = replace(config, teacher=teacher)
    # The other parts: as planned before, or measured.
    seconds = earlier["seconds"] if earlier else measure_parts(config)
    if config.minutes:
        lengths = earlier["lengths"] if earlier else _lengths(config, budget, seconds)
        config = with_values(config, {PART_LENGTHS[part]: length for part, length in lengths.items()})
    plan = FullRunPlan(
        request=request,
        lengths=_part_lengths(config),
        seconds=seconds,
        measured_on=f"{process_group.world_size()} process(es), {device_name(device)} each",
        teacher=teacher_plan,
        teacher_request=teacher_request,
    )
    return config, plan


def save_plan(out: Path, plan: FullRunPlan) -> None:
    """Write OUT/plan.json on rank 0, so that the same command keeps its lengths."""
    if process_group.rank() == 0:
        content = {"request": plan.request, "lengths": plan.lengths, "seconds": plan.seconds}
        write_atomically(out / "plan.json", json.dumps(content, indent=1))


class StoredPlan(TypedDict):
    """The content of OUT/plan.json."""

    request: dict[str, Any]
    lengths: dict[str, int]
    seconds: dict[str, float]


def _known_plan(file: Path, request: Mapping[str, Any]) -> dict[str, Any]:
    """The plan of an earlier start; empty without one."""
    if not file.is_file():
        return {}
    stored = read_json_object(file, f"delete {file}, the run is planned again", StoredPlan)
    if differ := differing(stored["request"], request):
        raise UserError(
            f"{file.parent} was planned for another run: {', '.join(differ)}; give the same to go on, or "
            "another --out"
        )
    return stored


def _part_lengths(config: FullRunConfig) -> dict[str, int]:
    """The lengths that the settings hold. 0 pairs are one for each caption, which the plan counts as one."""
    return {
        "pairs": config.pairs.num_pairs,
        "ode": config.ode.train.images,
        "gan": config.gan.train.images,
        "eval": config.eval_images,
    }


def _lengths(
    config: FullRunConfig, budget: Mapping[str, float], seconds: Mapping[str, float]
) -> dict[str, int]:
    """Lengths that fill the seconds of each part, and are large enough for one step."""
    least = {
        "pairs": _fewest_pairs(config),
        "ode": config.ode.train.batch_size,
        "gan": config.gan.train.batch_size,
        "eval": FEWEST_IMAGES,
    }
    lengths = {part: max(least[part], int(budget[part] / seconds[part])) for part in PART_LENGTHS}
    return {**lengths, "eval": min(lengths["eval"], config.eval_images)}


def _fewest_pairs(config: FullRunConfig) -> int:
    """Pairs for one batch of either stage, those held out for validation included."""
    return max(stage.train.batch_size + stage.train.validate_pairs for stage in (config.ode, config.gan))


def measure_parts(config: FullRunConfig) -> dict[str, float]:
    """Seconds per pair, per training image of each stage and per evaluated image, of all processes together.

    Runs the parts for a moment in a temporary folder, with the given teacher or an untrained one of the
    settings' shapes. What a part refuses, it refuses here.
    """
    folder = Path(process_group.gather_objects(tempfile.mkdtemp() if process_group.rank() == 0 else "")[0])
    try:
        with fork_rng(process_group.own_device()), _without_log():
            return _measure_in(folder, config)
    except Interrupted as error:
        raise Interrupted("stopped while the plan was measured; run the same command again") from error
    finally:
        process_group.barrier()
        shutil.rmtree(folder, ignore_errors=True)


def _measure_in(folder: Path, config: FullRunConfig) -> dict[str, float]:
    teacher = config.pretrained_teacher or str(folder / "teacher")
    rows, world = _fewest_pairs(config), process_group.world_size()
    if process_group.rank() == 0:
        captions = spread_captions(config.data, config.teacher.column, rows)
        write_atomically(folder / "prompts.txt", "\n".join(captions) + "\n")
        if not config.pretrained_teacher:
            save_untrained_teacher(config.teacher, folder / "teacher")
    process_group.barrier()
    # Pairs: the time of a few solver steps, and a small store for the stages.
    pairs = replace(
        config.pairs,
        teacher=teacher,
        prompts=str(folder / "prompts.txt"),
        num_pairs=rows,
        steps=TIMED_SOLVER_STEPS,
        shard_size=-(-rows // world),
    )
    pair = plan_pairs(pairs, batches=1)["seconds_per_pair"] * config.pairs.steps / TIMED_SOLVER_STEPS
    generate_pairs(pairs, folder / "pairs")
    seconds = {"pairs": pair / world}
    # A few steps of each stage.
    for part, stage in (("ode", config.ode), ("gan", config.gan)):
        short = replace(stage, teacher=teacher, pairs=str(folder / "pairs"), train=_timed(stage.train))
        short = replace(short, init=str(folder / "ode")) if part == "gan" else short
        train(short, folder / part)
        lines = process_group.gather_objects(read_stats(folder / part))[0]
        seconds[part] = 1 / max(line.get("time/images_per_sec", 0.0) for line in lines)
    # An evaluated image: the teacher draws it; three samplers' images and real pictures are measured.
    measured = 3 + REFERENCE_PICTURES
    seconds["eval"] = seconds["pairs"] + measured * feature_seconds(config) / world
    return process_group.gather_objects(seconds)[0]


def _timed(options: TrainConfig) -> TrainConfig:
    """A few reported steps, without anything else."""
    batch = options.batch_size
    return replace(
        options,
        images=TIMED_BATCHES * batch,
        minutes=None,
        report_images=batch,
        validate_images=0,
        validate_pairs=0,
        preview_prompts=0,
        loggers=(),
        on_collapse="off",
    )


def feature_seconds(config: FullRunConfig) -> float:
    """Seconds per image of the feature network; 0 without one. Loads it, so that a wrong one is refused."""
    run = EvalRun(
        images=config.data,
        reference=config.data,
        metrics=("fid",),
        features=config.features,
        features_input=config.features_input,
    )
    session = EvalSession(run)
    if session.features is None:
        return 0.0
    images = torch.zeros(TIMED_IMAGES, 3, config.teacher.size, config.teacher.size, dtype=torch.uint8)
    network = session.networks.sets["features"]
    network(images).cpu()  # waits for the device
    started = time.monotonic()
    network(images).cpu()
    return (time.monotonic() - started) / TIMED_IMAGES


@contextmanager
def _without_log() -> Iterator[None]:
    """Drop lines below warnings while the parts are tried."""
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)
