"""`d2g sample`, `d2g export` and `d2g push`: use a finished student."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from d2g.core.config import Presets
from d2g.core.errors import SettingError
from d2g_cli.common import (
    BaseOptions,
    Json,
    Out,
    Prompts,
    TeacherOption,
    WorkOptions,
    configure_preset,
    emit,
    expand_options,
    finish_dry_run,
    one_process,
    presets_in_help,
    reporter,
    settings_from,
)
from d2g_cli.inputs import config_inputs


def register_student(app: typer.Typer) -> None:
    """Add the commands to the program."""
    app.command("sample", cls=presets_in_help(_sample_presets))(sample)
    app.command("export", cls=presets_in_help(_export_presets))(student_export)
    app.command("push")(push)


def _sample_presets() -> Presets[Any]:
    from distill.config.run import SAMPLE_PRESETS

    return SAMPLE_PRESETS


def _export_presets() -> Presets[Any]:
    from distill.config.export import EXPORT_PRESETS

    return EXPORT_PRESETS


@dataclass(frozen=True, kw_only=True)
class SampleOptions(WorkOptions):
    """Options of `d2g sample`."""

    student: Annotated[str | None, typer.Option(help="Run folder, exported student, or a shipped name.")] = (
        None
    )
    prior: Annotated[
        str | None,
        typer.Option(help="Stage C of a cascade: a student for --student, else a teacher for --teacher."),
    ] = None
    prompt: Annotated[
        list[str] | None, typer.Option(help="Text, or a class number (every class); repeatable.")
    ] = None
    prompts: Prompts = None
    num: Annotated[int | None, typer.Option(help="Images per prompt (1).")] = None
    teacher: Annotated[
        str | None, typer.Option(help="Teacher to draw; with --student both draw, from the same noise.")
    ] = None
    steps: Annotated[int | None, typer.Option(help="Solver steps of the teacher (50).")] = None
    prior_steps: Annotated[
        int | None, typer.Option(help="Solver steps of stage C's teacher in a cascade (60).")
    ] = None
    prior_guidance: Annotated[
        float | None, typer.Option(help="Guidance of stage C's teacher in a cascade (3).")
    ] = None
    batch_size: Annotated[int | None, typer.Option(help="Images per forward pass (32).")] = None
    guidance: Annotated[
        float | None,
        typer.Option(
            help="Guidance of a teacher (3, or its student's pairs'); or to imitate, for a student that "
            "takes it (8, or its pairs')."
        ),
    ] = None
    psi: Annotated[
        float | None, typer.Option(help="Truncation of a student with styles, 0 (its mean) to 1 (none).")
    ] = None
    seed: Annotated[int | None, typer.Option(help="Image i uses the noise of (seed, i) (0).")] = None


@one_process
@expand_options
def sample(options: SampleOptions, out: Out = Path("samples")) -> None:
    """Draw with a student in one step, a teacher, or both from the same noise: PNGs and a grid."""
    from distill.config.run import SampleConfig

    settings = settings_from(options, SampleConfig)
    settings["prompt"] = tuple(options.prompt) if options.prompt else None
    config = configure_preset(_sample_presets(), "default", options, settings)
    if options.dry_run:
        inputs = config_inputs(config, ("student", "prior", "teacher", "prompts"))
        finish_dry_run(config, options.as_json, inputs=inputs)
    from d2g.data.prompt_files import prompt_text

    for text in config.prompt:
        prompt_text("--prompt", text)
    from d2g.diffusion.teacher_sampler import PRIOR_STEPS, TEACHER_STEPS, SolverSettings
    from distill.sampling import default_student_prompts
    from distill.saved_samples import save_both_samples, save_samples, save_teacher_samples
    from pairgen.prompts import read_prompts

    student = config.student or ("" if config.teacher else "miniature")
    from_file = read_prompts(Path(config.prompts), config.column) if config.prompts else []
    texts = [*config.prompt, *from_file] or default_student_prompts(student, config.teacher)
    texts = [text for text in texts for _ in range(config.num)]
    # The student, the teacher, or both.
    if config.teacher is None:
        summary = save_samples(
            *(student, texts, out, config.seed, config.batch_size),
            *(None, config.guidance, reporter, config.prior, config.psi),
        )
    else:
        solver = SolverSettings(
            steps=config.steps or TEACHER_STEPS,
            guidance=config.guidance,
            prior=config.prior,
            prior_steps=config.prior_steps or PRIOR_STEPS,
            prior_guidance=config.prior_guidance,
        )
        shared = (texts, out, config.seed, config.batch_size, solver, reporter)
        summary = (
            save_both_samples(student, config.teacher, *shared)
            if student
            else save_teacher_samples(config.teacher, *shared)
        )
    emit(summary, options.as_json, "samples")


@dataclass(frozen=True, kw_only=True)
class ExportOptions(BaseOptions):
    """Options of `d2g export`."""

    student: Annotated[str | None, typer.Option(help="Run folder, or exported student.")] = None
    format: Annotated[
        str | None,
        typer.Option(
            help="safetensors (default), diffusers: a pipeline, lora: adapters, comfyui: one file, or onnx."
        ),
    ] = None
    dtype: Annotated[str | None, typer.Option(help="fp32, fp16 or bf16 (safetensors fp16, else fp32).")] = (
        None
    )
    teacher: TeacherOption = None
    scores: Annotated[
        list[Path] | None,
        typer.Option(help="Result of `d2g eval run` to print in the model card; repeatable."),
    ] = None
    license: Annotated[
        str | None, typer.Option(help="The teacher's license, if its folder does not state it.")
    ] = None
    watts: Annotated[
        float | None, typer.Option(help="Mean power of a device, for the CO2 of the model card (400).")
    ] = None
    kg_per_kwh: Annotated[
        float | None, typer.Option(help="CO2 of electricity in kg per kWh, for the model card (0.48).")
    ] = None


@one_process
@expand_options
def student_export(options: ExportOptions, out: Out = Path("exported")) -> None:
    """Write a student for others: small safetensors, a diffusers pipeline, adapters or ONNX, with a card."""
    card = {f"card.{name}": getattr(options, name) for name in ("license", "watts", "kg_per_kwh")}
    card["card.scores"] = tuple(map(str, options.scores)) if options.scores else None
    names = ("student", "format", "dtype", "teacher")
    settings = {name: getattr(options, name) for name in names} | card
    config = configure_preset(_export_presets(), "default", options, settings)
    if options.dry_run:
        inputs = config_inputs(config, ("student", "teacher")) | {"--scores": options.scores}
        finish_dry_run(config, options.as_json, inputs=inputs)
    from d2g.core.distributed import process_group
    from distill.export.export import export as export_student

    emit(export_student(config, out, process_group.own_device()), options.as_json, "export")


@one_process
def push(
    source: Annotated[str, typer.Argument(help="Run folder, or a folder that `d2g export` wrote.")],
    repository: Annotated[str, typer.Argument(help="Repository on the Hugging Face hub: OWNER/NAME.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder for what is uploaded (push/NAME).", show_default=False)
    ] = None,
    form: Annotated[
        str | None,
        typer.Option("--format", help="Format for a run: diffusers (default), lora, comfyui or onnx."),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Create a private repository.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Write the folder and list its files; upload nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Publish a student on the Hugging Face hub with its model card; a run is exported first."""
    from distill.config.export import FORMATS_WITH_CARD, ExportConfig
    from distill.export.output import is_export
    from distill.export.push import check_repository, upload, write_upload

    check_repository(repository)
    if form not in (None, *FORMATS_WITH_CARD):
        raise SettingError(f"--format is {form!r}; expected {', '.join(FORMATS_WITH_CARD)}")
    if form is not None and is_export(Path(source)):
        raise SettingError(f"--format is {form!r}, but {source} is exported already; leave it out")
    folder = out or Path("push") / repository.rpartition("/")[2]
    files = write_upload(source, folder, ExportConfig(format=form or "diffusers"))  # type: ignore[arg-type]  # checked above
    result: dict[str, Any] = {"repository": repository, "folder": str(folder), "files": files}
    if not dry_run:
        result["url"] = upload(folder, repository, private)
    emit(result, as_json, "push: nothing was uploaded" if dry_run else "push")
