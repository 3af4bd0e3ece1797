"""Options of the evaluation commands, and the config that they make."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from d2g.core.config import Presets, pick
from d2g.core.errors import SettingError
from d2g_cli.common import Prompts, TeacherOption, WorkOptions, configure_preset, settings_from


@dataclass(frozen=True, kw_only=True)
class ProtocolOptions(WorkOptions):
    """Options of all evaluations: the protocol, its networks and the batch size."""

    protocol: Annotated[
        str | None, typer.Option(help="Named protocol; see `d2g eval protocols` (folder).")
    ] = None
    metrics: Annotated[str | None, typer.Option(help="fid,clip,pr,…: comma-separated (the protocol's).")] = (
        None
    )
    features: Annotated[
        str | None,
        typer.Option(
            help="Feature network, if the protocol leaves it open: inception, efficientnet-lite0…, FILE.pt2, "
            "FILE.onnx, or MODULE:FUNCTION, your own code."
        ),
    ] = None
    features_input: Annotated[
        str | None,
        typer.Option(help="Pixels for a network in a file: SIZE,NORMALIZATION (224,imagenet)."),
    ] = None
    weights: Annotated[
        list[str] | None,
        typer.Option(
            help="Weight file of the feature network, or NAME=PATH of dinov2, dreamsim…; repeatable."
        ),
    ] = None
    allow_fewer: Annotated[
        bool,
        typer.Option(
            "--allow-fewer", help="Accept fewer images than the protocol's; the result states the number."
        ),
    ] = False
    batch_size: Annotated[int | None, typer.Option(help="Images per batch (64).")] = None
    seed: Annotated[
        int | None, typer.Option(help="Image i has the noise of (seed, i) (the protocol's: 1000).")
    ] = None


@dataclass(frozen=True, kw_only=True)
class SamplerOptions(ProtocolOptions):
    """Options of evaluations that sample images: `d2g eval run` and `d2g eval curve`."""

    student: Annotated[str | None, typer.Option(help="Run folder, exported student, or a shipped name.")] = (
        None
    )
    prior: Annotated[
        str | None,
        typer.Option(help="Stage C of a cascade: a student for --student, else a teacher for --teacher."),
    ] = None
    teacher: TeacherOption = None
    pipeline: Annotated[str | None, typer.Option(help="Any diffusers pipeline: folder or hub id.")] = None
    reference: Annotated[
        Path | None,
        typer.Option(help="Real images: a file of `d2g eval stats`, COCO's folder, any folder, parquet."),
    ] = None
    clip: Annotated[
        str | None,
        typer.Option(help="CLIP, if the protocol leaves it open: vit-b-32, MODEL:TAG, or a folder."),
    ] = None
    prompts: Prompts = None
    num: Annotated[
        int | None,
        typer.Option(help="Number of images, if the protocol leaves it open (one per prompt)."),
    ] = None
    steps: Annotated[int | None, typer.Option(help="Steps of a teacher or pipeline (50).")] = None
    guidance: Annotated[
        float | None,
        typer.Option(
            help="Guidance of a teacher (3, or its student's pairs'), a pipeline (its own), or a student "
            "that takes it."
        ),
    ] = None
    prior_steps: Annotated[int | None, typer.Option(help="Steps of stage C's teacher in a cascade (60).")] = (
        None
    )
    prior_guidance: Annotated[
        float | None, typer.Option(help="Guidance of stage C's teacher in a cascade (3).")
    ] = None
    work: Annotated[
        Path | None,
        typer.Option(help="Folder for finished parts, to resume from (work/ in an --out folder)."),
    ] = None
    keep: Annotated[Path | None, typer.Option(help="Save the sampled images in this folder as PNG.")] = None


@dataclass(frozen=True, kw_only=True)
class RunOptions(SamplerOptions):
    """Options of `d2g eval run`."""

    images: Annotated[Path | None, typer.Option(help="Folder or parquet of images to measure.")] = None
    against: Annotated[
        str | None,
        typer.Option(help="Other side of dreamsim, lpips and psnr: a teacher or its kept images."),
    ] = None
    train: Annotated[
        Path | None, typer.Option(help="Training images, for the report's nearest neighbors and the floor.")
    ] = None
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for result.json, report.html and parts to resume from; or a .json file."),
    ] = None
    latency: Annotated[
        bool, typer.Option("--latency", help="Also measure the time per image, by component.")
    ] = False
    every: Annotated[bool, typer.Option("--every", help="Measure every checkpoint of a student's run.")] = (
        False
    )


def load_presets() -> Presets[Any]:
    """The presets of `d2g eval`, the miniature's included."""
    from eval.protocols.config import EVAL_PRESETS
    from miniature.registration import register_eval_scenes

    register_eval_scenes()
    return EVAL_PRESETS


def eval_config(options: ProtocolOptions) -> Any:
    """The EvalRun of a preset, the options that are set, and --set."""
    from eval.protocols.config import EvalRun
    from eval.protocols.metric import check_metrics
    from eval.protocols.protocol import PROTOCOLS

    presets = load_presets()
    settings = settings_from(options, EvalRun)
    if options.protocol is not None:
        settings["protocol"] = pick(PROTOCOLS, options.protocol, "protocol")
    # Lists are given as text.
    settings["metrics"] = tuple(options.metrics.split(",")) if options.metrics else None
    settings["weights"] = tuple(options.weights) if options.weights else None
    for flag in ("allow_fewer", "latency", "every"):
        settings[flag] = settings.get(flag) or None  # a flag that is not given leaves the preset's value
    config = configure_preset(presets, "default", options, settings)
    if config.metrics:
        check_metrics(config.metrics)
    return config


def refuse_unused_options(options: SamplerOptions, config: Any) -> None:
    """Raise SettingError for a setting of a sampler, given by hand, where nothing that takes it is drawn.

    A preset and `d2g run` may set them all the same.
    """
    if not any((config.student, config.images, config.pipeline, config.teacher)):
        return  # the evaluation says what is missing
    teacher, pipeline = _draws_teacher(config), config.pipeline is not None
    without_solver = (
        "has an effect only on a teacher that is drawn; leave it out, or give --teacher alone, --latency, "
        "or a metric that compares with the teacher, such as psnr"
    )
    # Name -> whether it has an effect, and what it lacks. Of students, only some take a guidance scale: the
    # evaluation refuses it for the others.
    settings = {
        "steps": (teacher or pipeline, without_solver),
        "guidance": (teacher or pipeline or config.student is not None, without_solver),
        **dict.fromkeys(("solver", "prior_steps", "prior_guidance"), (teacher, without_solver)),
        "precision": (teacher or not config.images, "has no effect on --images; leave it out"),
    }
    by_set = {assignment.partition("=")[0].strip() for assignment in options.sets or []}
    for name, (has_effect, reason) in settings.items():
        if not has_effect and (name in by_set or getattr(options, name, None) is not None):
            raise SettingError(f"{name} is set, but {reason}")


def _draws_teacher(config: Any) -> bool:
    """Whether the evaluation draws images of a teacher, alone or beside what it measures."""
    from eval.protocols.metric import paired_metrics

    if not (config.student or config.images or config.pipeline):
        return True
    if config.student and config.latency:
        return True
    # The other side of paired metrics: a teacher, or images in a folder.
    if config.against is not None:
        return not Path(config.against).is_dir() or (Path(config.against) / "model_index.json").is_file()
    return bool(config.student and paired_metrics(config.metrics or config.protocol.metrics))


def load_metrics() -> dict[str, str]:
    """Every metric with its description, those of the scenes included."""
    from eval.protocols.metric import all_metrics

    load_presets()
    return {name: metric.description for name, metric in all_metrics().items()}
