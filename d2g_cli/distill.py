"""`d2g distill`: train a one-step student."""

from pathlib import Path
from typing import Annotated, Any

import typer

from d2g_cli.common import (
    DryRun,
    Json,
    Out,
    Preset,
    Seed,
    Sets,
    TeacherOption,
    configure,
    dry,
    emit,
    finishing,
    reporter,
)
from d2g_cli.watch import watch

app = typer.Typer(help="Train a one-step student.", no_args_is_help=True)
app.command("watch")(watch)


def _distill(stage: str, given: dict[str, Any]) -> None:
    """Train as the command's parameters say."""
    from d2g.core.errors import SettingError
    from distill.config.presets import preset as distill_preset
    from distill.config.unused_settings import refuse_idle
    from distill.monitoring.collapse import Collapse

    options = {name: given.get(name) for name in ("pairs", "teacher", "lpips", "init", "seed")}
    length = {f"train.{name}": given[name] for name in ("minutes", "images")}
    preset, as_json = given["preset"] or "sd15-cfg8", given["as_json"]
    config = distill_preset(preset, stage)
    config = configure(config, {**options, **length}, given["sets"])
    if config.stage != stage:
        raise SettingError(f"stage is {config.stage!r}; expected {stage!r} of `d2g distill {stage}`")
    named = [text.partition("=")[0].strip() for text in given["sets"] or []]
    refuse_idle(config, [*(name for name, value in options.items() if value), *named])
    validate = _validator(config, given)
    if given["dry_run"]:
        dry(config, as_json, _plan(config, preset))
    from distill.training.train import train

    with finishing(Collapse):
        emit(train(config, given["out"], reporter, validate), as_json, f"distill {stage}")


def _validator(config: Any, given: dict[str, Any]) -> Any:
    """What measures FID on the way, if asked for."""
    from d2g.core.errors import SettingError

    how = {name: given[f"validate_{name}"] for name in ("reference", "num", "prompts", "weights")}
    how = {name: value for name, value in how.items() if value is not None}
    if given["validate"] is None:
        if how:
            raise SettingError(f"--validate-{next(iter(how))} says how; give --validate PROTOCOL too")
        return None
    from d2g.core.config import pick
    from eval.protocols.protocol import PROTOCOLS
    from miniature.registration import register_eval_scenes

    register_eval_scenes()
    protocol = pick(PROTOCOLS, given["validate"], "--validate protocol")
    if not config.train.validate_images:
        raise SettingError(
            "--validate needs to know when; set train.validate_images=N and train.validate_pairs=K"
        )
    from eval.protocols.config import EvalRun
    from eval.runner.validation import measuring

    if "weights" in how:
        how["weights"] = (str(how["weights"]),)
    told: dict[str, Any] = {"metrics": ("fid",), "resamples": 0, "allow_fewer": True, **how}
    run = EvalRun(teacher=config.teacher, protocol=protocol, **told)
    return measuring(run, config.teacher)


def _plan(config: Any, preset: str) -> dict[str, Any]:
    """What a run costs. Raises SettingError for rows that cannot be shared out, UserError where it cannot fit
    the GPU that is here."""
    from d2g.core.distributed import process_group
    from d2g.core.environment import examine
    from d2g.core.errors import UserError
    from distill.config.presets import DISTILL_PRESETS
    from distill.planning.cost import plan
    from distill.planning.memory import forecast, too_large

    gpus = config.engine.gpus or process_group.world_size()
    cost = plan(config, preset, gpus)
    memory, machine = forecast(config, gpus, DISTILL_PRESETS[preset].model), examine()
    if memory and machine["cuda"] and (why := too_large(config, memory["total"], machine["memory_gib"])):
        raise UserError(why)
    return cost | {"memory_gib_per_gpu": memory or "unknown until the teacher is here"}


Pairs = Annotated[
    str | None, typer.Option(help="Folder of `d2g pairs generate`, or its URL (s3://, gs://, hf://).")
]
Lpips = Annotated[Path | None, typer.Option(help="LatentLPIPS folder (TEACHER/latent_lpips).")]
Minutes = Annotated[float | None, typer.Option(help="Stop after so long, with a checkpoint.")]
Validation = Annotated[
    str | None, typer.Option("--validate", help="Protocol of `d2g eval` whose FID to measure on the way.")
]
Reference = Annotated[str | None, typer.Option(help="Its reference, as --reference of `d2g eval run`.")]
ValidateNum = Annotated[int | None, typer.Option(help="Images to draw for it (the protocol's).")]
ValidatePrompts = Annotated[str | None, typer.Option(help="Prompts to draw for it (the protocol's).")]
ValidateWeights = Annotated[Path | None, typer.Option(help="Weights of its feature network.")]
Images = Annotated[int | None, typer.Option(help="Training images, over all ranks.")]


@app.command("ode")
def distill_ode(
    pairs: Pairs = None,
    teacher: TeacherOption = None,
    out: Out = Path("runs/ode"),
    lpips: Lpips = None,
    minutes: Minutes = None,
    images: Images = None,
    validate: Validation = None,
    validate_reference: Reference = None,
    validate_num: ValidateNum = None,
    validate_prompts: ValidatePrompts = None,
    validate_weights: ValidateWeights = None,
    preset: Preset = None,
    sets: Sets = None,
    seed: Seed = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Stage 1: regress the teacher's latents from their noise in one step."""
    _distill("ode", locals())


@app.command("gan")
def distill_gan(
    pairs: Pairs = None,
    teacher: TeacherOption = None,
    out: Out = Path("runs/gan"),
    init: Annotated[str | None, typer.Option(help="Stage-1 run, or exported student, to start from.")] = None,
    lpips: Lpips = None,
    minutes: Minutes = None,
    images: Images = None,
    validate: Validation = None,
    validate_reference: Reference = None,
    validate_num: ValidateNum = None,
    validate_prompts: ValidatePrompts = None,
    validate_weights: ValidateWeights = None,
    preset: Preset = None,
    sets: Sets = None,
    seed: Seed = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Stage 2: add the text- and noise-conditional discriminator."""
    _distill("gan", locals())
