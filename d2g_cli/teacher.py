"""`d2g teacher`: train or inspect a teacher."""

import shlex
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from d2g.core.config import Presets
from d2g.core.errors import SettingError
from d2g.core.logs import logger
from d2g_cli.common import (
    Json,
    Out,
    WorkOptions,
    configure_preset,
    emit,
    emit_table,
    expand_options,
    finish_dry_run,
    is_rank_0,
    leave_process_group,
    one_process,
    presets_in_help,
    reporter,
    require_range,
)

teacher_app = typer.Typer(help="Train or inspect a teacher.", no_args_is_help=True)


def _presets() -> Presets[Any]:
    from teacher_training.config import TEACHER_PRESETS

    return TEACHER_PRESETS


@dataclass(frozen=True, kw_only=True)
class TeacherTrainOptions(WorkOptions):
    """Options of `d2g teacher train`."""

    data: Annotated[str | None, typer.Option(help="scenes, an image folder, or image-parquet.")] = None
    minutes: Annotated[float | None, typer.Option(help="Minutes of all stages together on this machine.")] = (
        None
    )
    images: Annotated[
        int | None, typer.Option(help="Training images of the network; the other stages scale with it.")
    ] = None
    vae: Annotated[
        str | None,
        typer.Option(help="Autoencoder to use as it is: a folder, a hub id, or taesd (trains one)."),
    ] = None
    init: Annotated[str | None, typer.Option(help="Teacher to train further, from its weights.")] = None


@teacher_app.command("train", cls=presets_in_help(_presets))
@expand_options
def teacher_train(
    options: TeacherTrainOptions,
    out: Out = Path("teacher"),
    stages: Annotated[
        str | None, typer.Option(help="Stages to run, comma-separated (default: all of the network).")
    ] = None,
) -> None:
    """Train a small teacher on captioned or class-labeled images: U-Net, DiT or EDM (--set network=...)."""
    config = _train_config(options)
    from d2g.core.distributed import process_group
    from d2g.core.tracking.run_directory import sole_owner
    from miniature.registration import register_training_scenes
    from teacher_training.networks.registry import network_of
    from teacher_training.plan import Request, WholeProgress, plan_teacher, save_request
    from teacher_training.train import check_stages, train_teacher

    register_training_scenes()
    names = check_stages(config, stages.split(",") if stages else None)
    request = Request(minutes=config.minutes or None, images=options.images)
    with leave_process_group(typer.Exit):
        process_group.init(long_waits=True)  # for rank 0, which alone trains LatentLPIPS and CLIP
        # The folder is refused before the plan is measured, which takes a while.
        with nullcontext() if options.dry_run else sole_owner(out, "trains in"):
            config, plan = plan_teacher(config, out, names, request)
            for line in plan.lines():
                logger.info(line)
            if options.dry_run:
                finish_dry_run(config, options.as_json, {"plan": asdict(plan)})
            save_request(out, config, request, names)
            progress = WholeProgress(plan, reporter)
            finishing = stages if network_of(config).stage in names else None
            summary = train_teacher(config, out, names, progress, _command(options, finishing, out))
        emit(asdict(summary) | {"plan": asdict(plan)}, options.as_json, "teacher")


def _train_config(options: TeacherTrainOptions) -> Any:
    """The settings of a training. Raises SettingError for settings that another one makes useless."""
    preset = options.preset or ("scenes" if options.data in (None, "scenes") else "quick")
    if options.preset is None and preset == "quick" and is_rank_0():
        logger.info("no --preset: quick, about 15 minutes; --preset evening or night train better teachers")
    if options.images is not None:
        require_range(1, images=options.images)
        if options.minutes is not None:
            raise SettingError("give --minutes or --images, not both")
    settings = {
        "data": options.data,
        "seed": options.seed,
        "pretrained_vae": options.vae,
        "init": options.init,
        "minutes": 0.0 if options.images is not None else options.minutes,
    }
    config = configure_preset(_presets(), preset, options, settings)
    # What --set cannot change in such a training.
    unused: dict[tuple[str, ...], str] = {}
    if config.minutes or options.images:
        unused[_length_settings(config)] = "the minutes or --images choose the lengths"
    if config.pretrained_vae or config.init:
        unused[("vae.",)] = "the autoencoder is used as it is"
    unused[_other_groups(config)] = f"network={config.network} does not read it"
    if config.init:
        unused[INIT_SHAPES] = "--init brings its networks"
    for assignment in options.sets or []:
        name = assignment.partition("=")[0].strip()
        for settings_without_effect, reason in unused.items():
            if name.startswith(settings_without_effect):
                raise SettingError(f"--set {name} has no effect: {reason}; leave one of them out")
    return config


def _length_settings(config: Any) -> tuple[str, ...]:
    """Settings of the stages' lengths."""
    from teacher_training.networks.registry import network_of
    from teacher_training.plan import length_setting

    lengths = (length_setting(stage) for stage in network_of(config).stages[1:])
    return (*lengths, "lpips.triplets", "clip.minutes")


def _other_groups(config: Any) -> tuple[str, ...]:
    """Groups of settings, and settings, that the network does not read."""
    from teacher_training.config import NETWORK_GROUPS
    from teacher_training.networks.registry import network_of

    kind = network_of(config)
    groups = ("vae", "lpips", "clip", *NETWORK_GROUPS.values())
    others = tuple(f"{group}." for group in groups if group not in kind.stages)
    return others if kind.prompts == "text" else (*others, "caption_template")


INIT_SHAPES = (
    *("unet.channels", "unet.layers_per_block", "unet.heads", "unet.text_width", "unet.text_layers"),
    *("unet.vocab_size", "unet.max_length"),
)
"""Settings of the shape of the networks that `--init` brings."""


def _command(options: TeacherTrainOptions, stages: str | None, out: Path) -> str:
    """The command line of these options, which finishes an interrupted training. stages: those that train the
    network, else None."""
    names = ("preset", "data", "minutes", "images", "vae", "init", "seed")
    values = [(f"--{name}", getattr(options, name)) for name in names]
    values += [("--stages", stages)]
    values += [("--set", assignment) for assignment in options.sets or []]
    words = [word for name, value in values if value is not None for word in (name, f"{value}")]
    return shlex.join(["d2g", "teacher", "train", *words, "--out", str(out)])


@teacher_app.command("import")
@one_process
def teacher_import(
    file: Annotated[Path, typer.Argument(help="Checkpoint of SD 1.x, 2.x or SDXL: .safetensors or .ckpt.")],
    out: Annotated[Path, typer.Argument(help="Folder for the teacher.")],
    config: Annotated[
        str | None,
        typer.Option(
            help="Pipeline of the same architecture for configs and tokenizers, a folder or hub id "
            "(default: the published one, from the hub's cache or the hub)."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Turn a checkpoint in a single file into a teacher's folder."""
    from d2g.diffusion.single_file import import_single_file

    emit(import_single_file(file, out, config), as_json, str(out))


@teacher_app.command("list")
@one_process
def teacher_list(as_json: Json = False) -> None:
    """List the model families and the stages that support them."""
    from d2g.diffusion.families.registry import STAGE_COLUMNS, stage_table

    rows = stage_table()
    if as_json:
        emit({"families": rows}, as_json, "families")
    else:
        emit_table(STAGE_COLUMNS, [[row[column] for column in STAGE_COLUMNS] for row in rows], "families")


@teacher_app.command("info")
@one_process
def teacher_info(
    teacher: Annotated[str, typer.Argument(help="Folder, hub id or shipped name.")], as_json: Json = False
) -> None:
    """Describe a teacher; for one of `d2g teacher train`, say whether it is trained, too."""
    from d2g.diffusion.pipelines import resolve
    from d2g.diffusion.teacher import describe_teacher
    from teacher_training.verdict import current_verdict

    facts = describe_teacher(teacher)
    verdict = current_verdict(resolve(teacher)) or {"verdict": NO_RECORD}
    emit(facts | {key: verdict.get(key) for key in ("trained", "verdict", "numbers")}, as_json, teacher)


NO_RECORD = "unknown: the folder holds no record of its training"
"""The verdict that `d2g teacher info` prints for a teacher that `d2g teacher train` did not train."""
