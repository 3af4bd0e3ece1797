"""The plan of a teacher's training before it starts: its data, its lengths, and its time on this machine."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypedDict

from d2g.core.atomic_files import write_atomically
from d2g.core.config import with_values
from d2g.core.distributed import process_group
from d2g.core.errors import SettingError
from d2g.core.json_files import read_json_object
from d2g.core.logs import logger
from d2g.core.progress import Progress
from d2g.diffusion.pipelines import TRAINING
from eval.images.folders import open_images
from pairgen.cost import device_name
from teacher_training.config import TeacherConfig
from teacher_training.data import class_names, expect_captions, is_registered, read_captions
from teacher_training.networks.registry import network_of
from teacher_training.speed import TIMED_STEPS, Speed, measure_speed
from teacher_training.start import check_start
from teacher_training.train import check_captions, images_done, is_finished, stage_batch, stage_length

HELPER_SHARES = {"vae": 0.2, "lpips": 0.15, "clip": 0.1}
NETWORK_SHARE = 0.55
"""Shares of the minutes, over the stages that are to be trained."""
FEWEST_JUDGMENTS = 50
"""Synthetic judgments that LatentLPIPS is calibrated on, at least."""


def length_setting(stage: str) -> str:
    """The setting of a stage's length."""
    return {"lpips": "lpips.trunk.images", "clip": "clip.images"}.get(stage, f"{stage}.fit.images")


@dataclass(frozen=True, kw_only=True)
class TeacherPlan:
    """The plan of a training: `images`, `steps` and minutes by stage. Finished stages take none.

    `captions`: pictures that have a caption, or a class. `gib`: disk space for caches, checkpoints and
    weights.
    """

    pictures: int
    captions: int
    images: Mapping[str, int]
    steps: Mapping[str, int]
    stage_minutes: Mapping[str, float]
    minutes: float
    gib: float
    measured_on: str
    prompt: str = "caption"

    def lines(self) -> list[str]:
        """The plan in words."""
        stages = ", ".join(
            f"{stage} {self.steps[stage]:,} steps ({minutes:.1f} min)"
            for stage, minutes in self.stage_minutes.items()
        )
        return [
            f"plan: {self.pictures:,} pictures, {self.captions:,} of them with a {self.prompt}",
            f"plan: {stages or 'all stages are finished'}",
            f"plan: about {self.minutes:.1f} minutes in all ({self.measured_on}), {self.gib:.2f} GiB of disk",
        ]


@dataclass(frozen=True, kw_only=True)
class Request:
    """The length that is asked for: minutes of all, or images of the network; neither: as in the settings."""

    minutes: float | None = None
    images: int | None = None


def count_pictures(config: TeacherConfig, stages: Sequence[str]) -> tuple[int, int]:
    """(pictures, pictures with a caption or class) of the data, at most `config.images`, none decoded.

    Raises UserError for data that does not exist, and for captions that the training would refuse.
    """
    if is_registered(config.data):
        return config.images, config.images
    if network_of(config).prompts == "label":
        count = min(len(open_images(config.data, config.column)), config.images)
        has_classes = config.denoiser.classes and class_names(config.data, config.column) is not None
        return count, count if has_classes else 0
    captions = read_captions(config)
    expect_captions(config.data, captions)
    check_captions(config, captions, stages)
    return len(captions), len(captions)


def plan_teacher(
    config: TeacherConfig, out: Path, stages: Sequence[str], request: Request
) -> tuple[TeacherConfig, TeacherPlan]:
    """Choose the lengths of the stages, and say what the training will do. Nothing is written.

    The same request as before keeps the lengths of OUT/training/plan.json, so that the same command resumes.
    A request in minutes counts from now; finished stages but the network's keep their length. Raises
    SettingError for a request in both minutes and images, UserError for inputs that do not exist and for
    pictures that the training would refuse.
    """
    if request.minutes is not None and request.images is not None:
        raise SettingError("give --minutes or --images, not both")
    device = process_group.init(long_waits=True)
    check_start(config)
    kind = network_of(config)
    pictures, captions = count_pictures(config, stages)
    speed = process_group.gather_objects(measure_speed(config, stages, device))[0]
    # All processes share the steps of these two stages.
    for stage in speed.seconds.keys() & {"vae", kind.stage}:
        speed.seconds[stage] /= process_group.world_size()
    # Finished stages but the network's, and a given autoencoder, take no time and keep their length.
    work, trained = out / TRAINING, kind.stages[1:]
    done = {stage: images_done(work / stage) for stage in trained}
    fixed = [s for s in trained if s != kind.stage and (work / s / "scores.json").is_file()]
    fixed += ["vae"] if config.pretrained_vae or config.init else []
    open_stages = [stage for stage in trained if stage in stages and stage not in fixed]
    config = _with_lengths(config, out, open_stages, request, speed, done)
    unfinished = [stage for stage in open_stages if not is_finished(work / stage, stage, config)]
    images = {stage: stage_length(config, stage) - done[stage] for stage in unfinished}
    images = {stage: count for stage, count in images.items() if count > 0}
    minutes = {stage: count * speed.seconds[stage] / 60 for stage, count in images.items()}
    if "lpips" in minutes:
        minutes["lpips"] += min(pictures, config.lpips.triplets) * speed.judgment_seconds / 60
    if "clip" in minutes and config.clip.minutes:
        minutes["clip"] = min(minutes["clip"], config.clip.minutes)
    plan = TeacherPlan(
        pictures=pictures,
        captions=captions,
        images=images,
        steps={stage: -(-count // stage_batch(config, stage)) for stage, count in images.items()},
        stage_minutes=minutes,
        minutes=sum(minutes.values()) + pictures * speed.encode_seconds / 60,
        gib=(speed.picture_bytes * pictures + speed.fixed_bytes) / 2**30,
        measured_on=f"measured by {TIMED_STEPS} steps of each stage on {device_name(device)}",
        prompt="caption" if kind.prompts == "text" else "class",
    )
    return config, plan


def save_request(out: Path, config: TeacherConfig, request: Request, stages: Sequence[str]) -> None:
    """Note the request and the lengths that were chosen for these stages, and keep them when it is
    repeated."""
    if process_group.rank() == 0 and request != Request():
        lengths = _chosen_lengths(out, request)
        network_stages = [stage for stage in network_of(config).stages[1:] if stage in stages]
        lengths |= {length_setting(stage): stage_length(config, stage) for stage in network_stages}
        if "lpips" in stages:
            lengths["lpips.triplets"] = config.lpips.triplets
        content = {"request": asdict(request), "lengths": lengths}
        write_atomically(out / TRAINING / "plan.json", json.dumps(content, indent=1))


class StoredLengths(TypedDict):
    """The content of OUT/training/plan.json that is read back."""

    lengths: dict[str, int]


def _chosen_lengths(out: Path, request: Request) -> dict[str, int]:
    """Lengths by setting that were chosen for the same request before, for the stages of that start."""
    file = out / TRAINING / "plan.json"
    if not file.is_file():
        return {}
    stored = read_json_object(file, f"delete {file} to choose the lengths again", StoredLengths)
    return dict(stored["lengths"]) if stored.get("request") == asdict(request) else {}


def _with_lengths(
    config: TeacherConfig,
    out: Path,
    open_stages: Sequence[str],
    request: Request,
    speed: Speed,
    done: Mapping[str, int],
) -> TeacherConfig:
    """The config with the lengths that the request asks for."""
    if request == Request():
        return config
    finished = [stage for stage in done if stage not in open_stages and done[stage]]
    lengths = {length_setting(stage): done[stage] for stage in finished}
    # The same request again: the same lengths.
    chosen_lengths = _chosen_lengths(out, request)
    if finished and not chosen_lengths:
        logger.info("finished stages keep their length: %s", ", ".join(finished))
    lengths |= chosen_lengths
    shares = {stage: HELPER_SHARES.get(stage, NETWORK_SHARE) for stage in open_stages}
    for stage in open_stages:
        if length_setting(stage) in chosen_lengths:
            continue
        if request.images is not None:
            count = round(stage_length(config, stage) * request.images / config.denoiser.fit.images)
        else:
            budget = 60 * (request.minutes or 0.0) * shares[stage] / sum(shares.values())
            # Calibration takes at most half of LatentLPIPS' time.
            if stage == "lpips":
                judgments = min(config.lpips.triplets, int(budget / 2 / speed.judgment_seconds))
                lengths["lpips.triplets"] = max(FEWEST_JUDGMENTS, judgments)
                budget -= lengths["lpips.triplets"] * speed.judgment_seconds
            count = done[stage] + int(budget / speed.seconds[stage])
        lengths[length_setting(stage)] = max(1, count)
    return with_values(config, {**lengths, "clip.minutes": 0.0})


class WholeProgress:
    """Progress of all stages together, in planned seconds, so that one line says when everything is done.

    A stage's own progress is passed on when it ends.
    """

    def __init__(self, plan: TeacherPlan, progress: Progress) -> None:
        self.seconds = {stage: 60 * minutes for stage, minutes in plan.stage_minutes.items()}
        self.images, self.progress = plan.images, progress
        self.first: dict[str, int] = {}
        self.done: dict[str, float] = {}

    def __call__(self, label: str, done: int, total: int) -> None:
        stage = LABELS.get(label, label)
        if stage not in self.seconds:
            self.progress(label, done, total)
            return
        # A resumed stage starts at its checkpoint, and the plan counts from there.
        first = self.first.setdefault(label, done)
        share = (done - first) / max(1, total - first)
        self.done[stage] = self.seconds[stage] * share
        if done >= total:
            self.progress(label, done, total)
        seconds = sum(self.done.values())
        self.progress("teacher, planned seconds", int(seconds), max(1, int(sum(self.seconds.values()))))


LABELS = {"LatentLPIPS trunk": "lpips", "train CLIP": "clip"}
"""Stages by the label of their progress, where it is not their name."""
