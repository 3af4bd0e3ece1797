"""`d2g distill`: train a one-step student."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from d2g.core.config import Presets, pick
from d2g.core.errors import SettingError, UserError
from d2g.core.logs import logger
from d2g_cli.common import (
    Out,
    TeacherOption,
    WorkOptions,
    configure,
    emit,
    expand_options,
    finish_dry_run,
    is_rank_0,
    leave_process_group,
    presets_in_help,
    reporter,
    settings_from,
)
from d2g_cli.inputs import check_inputs, config_inputs
from d2g_cli.launch import log_other_processes
from d2g_cli.watch import watch

distill_app = typer.Typer(help="Train a one-step student.", no_args_is_help=True)
distill_app.command("watch")(watch)


SCORING_CLIPS = {
    "openai/clip-vit-base-patch32": "vit-b-32",
    "openai/clip-vit-large-patch14-336": "vit-l-14-336",
    "laion/CLIP-ViT-g-14-laion2B-s12B-b42K": "vit-g-14",
}
"""CLIP models that `d2g eval` scores with, by their hub ids."""


@dataclass(frozen=True, kw_only=True)
class DistillOptions(WorkOptions):
    """Options of both stages."""

    pairs: Annotated[
        str | None, typer.Option(help="Folder of `d2g pairs generate`, or its URL (s3://, gs://, hf://).")
    ] = None
    teacher: TeacherOption = None
    lpips: Annotated[Path | None, typer.Option(help="LatentLPIPS folder (TEACHER/latent_lpips).")] = None
    minutes: Annotated[
        float | None, typer.Option(help="Stop after this many minutes, with a checkpoint.")
    ] = None
    images: Annotated[int | None, typer.Option(help="Training images, over all ranks.")] = None
    validate: Annotated[
        str | None, typer.Option(help="Protocol of `d2g eval` whose FID to measure while training.")
    ] = None
    validate_reference: Annotated[
        str | None, typer.Option(help="Reference of that protocol, as --reference of `d2g eval run`.")
    ] = None
    validate_num: Annotated[int | None, typer.Option(help="Images to sample for it (the protocol's).")] = None
    validate_prompts: Annotated[
        str | None, typer.Option(help="Prompts to sample for it (the protocol's).")
    ] = None
    validate_weights: Annotated[Path | None, typer.Option(help="Weights of its feature network.")] = None


@dataclass(frozen=True, kw_only=True)
class GanOptions(DistillOptions):
    """Options of the stages with a discriminator."""

    init: Annotated[
        str | None,
        typer.Option(
            help="Run of an earlier stage, or exported student, to start from; `teacher` starts with the "
            "teacher's weights."
        ),
    ] = None


def _presets(stage: str) -> Presets[Any]:
    """The presets that have the stage."""
    from distill.config.presets import DISTILL_PRESETS

    return Presets(
        {name: (recipe.about, recipe) for name, recipe in DISTILL_PRESETS.items() if stage in recipe}
    )


@distill_app.command("ode", cls=presets_in_help(lambda: _presets("ode")))
@expand_options
def distill_ode(options: DistillOptions, out: Out = Path("runs/ode")) -> None:
    """Regression stage: predict the teacher's latents from their noise in one step."""
    _distill("ode", options, out)


@distill_app.command("gan", cls=presets_in_help(lambda: _presets("gan")))
@expand_options
def distill_gan(options: GanOptions, out: Out = Path("runs/gan")) -> None:
    """GAN stage: add the discriminator, conditioned on noise, and on text or classes."""
    _distill("gan", options, out)


@distill_app.command("text", cls=presets_in_help(lambda: _presets("text")))
@expand_options
def distill_text(options: GanOptions, out: Out = Path("runs/text")) -> None:
    """Text-encoder phase: freeze the student, train the text encoders that it reads with, guided by CLIP."""
    _distill("text", options, out)


@distill_app.command("cd", cls=presets_in_help(lambda: _presets("cd")))
@expand_options
def distill_cd(options: DistillOptions, out: Out = Path("runs/cd")) -> None:
    """Consistency distillation of an EDM teacher, to compare with: on latents of pairs, or on gan.real."""
    _distill("cd", options, out)


def _distill(stage: str, options: DistillOptions, out: Path) -> None:
    """Train one stage as the options say."""
    from distill.config.presets import preset as stage_preset
    from distill.config.run import DistillConfig
    from distill.monitoring.collapse import Collapse
    from distill.planning.unused_settings import refuse_unused

    preset = options.preset or _chosen_preset(options, stage)
    settings = settings_from(options, DistillConfig)
    length = {"train.minutes": options.minutes, "train.images": options.images}
    config = configure(stage_preset(preset, stage), {**settings, **length}, options.sets)
    if config.stage != stage:
        raise SettingError(f"stage is {config.stage!r}; expected {stage!r} of `d2g distill {stage}`")
    refuse_unused(config, [*(name for name, value in settings.items() if value), *_names(options.sets)])
    _warn_of_scoring_clip(config)
    _warn_of_ended_rates(config)
    validate = _validation_hook(config, options)
    if options.dry_run:
        from distill.training.check_config import check_plan

        inputs = config_inputs(config, ("teacher", "pairs", "lpips", "init"))
        weights = {"regression.lpips_weights": config.regression.lpips_weights}
        check_inputs(inputs | {"gan.real": config.gan.real} | weights)
        check_inputs(config_inputs(options, ("validate_reference", "validate_prompts", "validate_weights")))
        check_plan(config)
        sets_gpus = "engine.gpus" in _names(options.sets)
        finish_dry_run(config, options.as_json, _plan(config, preset, sets_gpus))
    from distill.training.train import train

    log_other_processes(f"distill {stage}")
    with leave_process_group(Collapse):
        emit(train(config, out, reporter, validate), options.as_json, f"distill {stage}")


def _chosen_preset(options: DistillOptions, stage: str) -> str:
    """The preset for the teacher's size, and a line in the log that says so."""
    from distill.planning.choose_preset import choose_preset

    name, reason = choose_preset(options.teacher or "", stage)
    if is_rank_0():
        logger.info("no --preset: %s, because %s; --preset NAME chooses another", name, reason)
    return name


def _warn_of_scoring_clip(config: Any) -> None:
    """Warn where a CLIP that trains the student is one that `d2g eval` scores it with."""
    guidance, gan = config.clip_guidance, config.gan
    used = [("clip_guidance.model", guidance.model)] if guidance.weight else []
    if config.adversarial and "projected" in gan.parts:
        used += [("gan.feature_networks", network) for network in gan.feature_networks]
    for setting, model in used:
        name = SCORING_CLIPS.get(model)
        if name and is_rank_0():
            logger.warning(
                "%s is %s, which d2g eval calls %s: its CLIP scores of this student would be inflated; train "
                "with another CLIP, or score with another",
                *(setting, model, name),
            )


def _warn_of_ended_rates(config: Any) -> None:
    """Warn where a learning rate is 0 before the run ends, so that its last images change nothing."""
    from distill.training.optim import images_at_rate_zero

    optimizers = {"optim": config.optim, **({"gan.optim": config.gan.optim} if config.adversarial else {})}
    for name, optim in optimizers.items():
        idle = images_at_rate_zero(optim, config.train.images)
        if idle and is_rank_0():
            logger.warning(
                "%s.decay_images is %d and train.images %d, so the learning rate is 0 for the last %d "
                "images; set %s.decay_images=-1, the length of the run",
                *(name, optim.decay_images, config.train.images, idle, name),
            )


def _names(sets: Sequence[str] | None) -> list[str]:
    """The names of the settings that `--set` changes."""
    return [assignment.partition("=")[0].strip() for assignment in sets or []]


def _validation_hook(config: Any, options: DistillOptions) -> Any:
    """The function that measures FID while training, or None without `--validate`."""
    details = {
        name: getattr(options, f"validate_{name}") for name in ("reference", "num", "prompts", "weights")
    }
    details = {name: value for name, value in details.items() if value is not None}
    if options.validate is None:
        if details:
            raise SettingError(f"--validate-{next(iter(details))} needs a protocol; give --validate PROTOCOL")
        return None
    # `distill` must not import `eval`, so the command builds the hook.
    from eval.protocols.protocol import PROTOCOLS
    from miniature.registration import register_eval_scenes

    register_eval_scenes()
    protocol = pick(PROTOCOLS, options.validate, "--validate protocol")
    if not config.train.validate_images:
        raise SettingError(
            "--validate needs to know when; set train.validate_images=N, and train.validate_pairs=K if there "
            "are pairs"
        )
    from eval.protocols.config import EvalRun
    from eval.runner.validation import validation_hook

    # FID alone, without bootstrap intervals, keeps a validation short.
    if "weights" in details:
        details["weights"] = (str(details["weights"]),)
    fixed: dict[str, Any] = {"metrics": ("fid",), "resamples": 0, "allow_fewer": True}
    run = EvalRun(teacher=config.teacher, protocol=protocol, **fixed, **details)
    return validation_hook(run, config.teacher)


def _plan(config: Any, preset: str, sets_gpus: bool) -> dict[str, Any]:
    """The cost of a run. Raises SettingError for a batch that does not divide over the processes, UserError
    where the run does not fit this machine's GPU.

    sets_gpus: whether the user has set `engine.gpus`. Otherwise a run in several processes has as many GPUs,
    whatever number its preset has.
    """
    from d2g.core.distributed import process_group
    from d2g.core.environment import inspect_machine
    from distill.config.presets import DISTILL_PRESETS
    from distill.planning.choose_precision import decide_precision
    from distill.planning.cost import plan
    from distill.planning.feature_notes import feature_notes
    from distill.planning.first_step import first_step_notes
    from distill.planning.flops import UTILIZATION, gpu_days
    from distill.planning.memory import forecast, too_large
    from distill.planning.parameters import student_parameters

    # Evaluations and memory. A run that does not fit this GPU is refused.
    config = decide_precision(config, process_group.own_device())
    processes = process_group.world_size()
    gpus = config.engine.gpus or processes
    if processes > 1 and not sets_gpus:
        gpus = processes
    config = replace(config, engine=replace(config.engine, gpus=gpus))
    cost = plan(config, preset)
    memory, machine = forecast(config, gpus, DISTILL_PRESETS[preset].model), inspect_machine()
    if memory and machine["cuda"] and (problem := too_large(config, memory["total"], machine["memory_gib"])):
        raise UserError(problem)
    # Time, from the operations of the student's network.
    days = gpu_days(config, cost["evaluations"], DISTILL_PRESETS[preset].model)
    estimate = (
        "unknown until the teacher is here"
        if days is None
        else {"a100": round(days, 2), "assumed": f"{UTILIZATION:.0%} of the GPU's peak; losses not counted"}
    )
    model = DISTILL_PRESETS[preset].model
    notes = [*first_step_notes(config, model), *feature_notes(config, model)]
    parameters = student_parameters(config, model)
    return cost | {
        **({"student_million_parameters": parameters} if parameters else {}),
        "gpu_days_estimate": estimate,
        "memory_gib_per_gpu": memory or "unknown until the teacher is here",
        **({"notes": notes} if notes else {}),
    }
