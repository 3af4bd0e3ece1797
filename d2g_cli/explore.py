"""`d2g explore`: walks between noises and prompts, one noise in many styles, and mixed styles."""

from pathlib import Path
from typing import Annotated, Any

import typer

from d2g_cli.common import DryRun, Json, emit, one_process, reporter, require_range
from d2g_cli.inputs import check_inputs

explore_app = typer.Typer(help="Interpolate, edit and mix the inputs of a student.", no_args_is_help=True)

StudentOption = Annotated[str, typer.Option(help="Run folder, exported student, or a shipped name.")]
NoiseScale = Annotated[
    float, typer.Option(help="Factor of the noise; below 1 the images are more typical and less diverse.")
]
Psi = Annotated[
    float | None,
    typer.Option(help="Truncation of the styles of a student that has them: 0 (mean) to 1 (none)."),
]
OutFolder = Annotated[Path, typer.Option(help="Output folder.")]


@explore_app.command("walk")
@one_process
def walk(
    student: StudentOption = "miniature",
    prompt: Annotated[
        list[str] | None, typer.Option(help="Text, or a class number; repeat it to walk between prompts.")
    ] = None,
    seed: Annotated[
        list[int] | None, typer.Option(help="Seed of a noise; repeat it to walk between noises (0).")
    ] = None,
    frames: Annotated[int, typer.Option(help="Images from the first point to the last.")] = 16,
    noise_scale: NoiseScale = 1.0,
    psi: Psi = None,
    lpips: Annotated[
        Path | None, typer.Option(help="LatentLPIPS for the path length (TEACHER/latent_lpips).")
    ] = None,
    mp4: Annotated[bool, typer.Option("--mp4", help="Write a video, too; needs the extra `video`.")] = False,
    out: OutFolder = Path("walk"),
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Interpolate between noises, between prompts, or both: PNGs, a strip, a GIF and the path length."""
    seeds = seed or [0]
    require_range(2, 10_000, frames=frames)
    require_range(noise_scale=noise_scale)
    require_range(0, 1, psi=1.0 if psi is None else psi)
    for number in seeds:
        require_range(0, 2**63 - 1, seed=number)
    _check_prompts("--prompt", prompt or [])
    check_inputs({"--student": student, "--lpips": lpips})
    if mp4:
        from d2g.core.video import require_video

        require_video()
    if dry_run:
        plan: dict[str, Any] = {"student": student, "prompts": prompt or [], "seeds": seeds, "images": frames}
        emit(plan, as_json, "dry run: nothing was drawn")
        return
    from distill.exploration import open_student, path_metric, save_walk
    from distill.sampling import default_student_prompts

    sampler = open_student(student, psi)
    prompts = prompt or default_student_prompts(student, options="--prompt TEXT")[:1]
    metric = path_metric(student, sampler, lpips)
    summary = save_walk(
        *(student, sampler, prompts, seeds, frames, out),
        noise_scale=noise_scale,
        metric=metric,
        mp4=mp4,
        progress=reporter,
    )
    emit(summary, as_json, "walk")


@explore_app.command("edit")
@one_process
def edit(
    prompt: Annotated[str, typer.Option(help="The prompt to start from.")],
    to: Annotated[str, typer.Option(help="The prompt in whose direction to go.")],
    student: StudentOption = "miniature",
    seed: Annotated[
        list[int] | None, typer.Option(help="Seed of a noise; repeatable, a row each (0).")
    ] = None,
    strength: Annotated[
        list[float] | None,
        typer.Option(help="Part of the way; repeatable, a column each (0, 0.25 … 1); above 1: beyond."),
    ] = None,
    noise_scale: NoiseScale = 1.0,
    psi: Psi = None,
    out: OutFolder = Path("edit"),
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Edit a prompt towards another with the noise fixed, as a labeled grid: seeds by strengths."""
    seeds, strengths = seed or [0], strength or [0.0, 0.25, 0.5, 0.75, 1.0]
    require_range(noise_scale=noise_scale)
    require_range(0, 1, psi=1.0 if psi is None else psi)
    for number in seeds:
        require_range(0, 2**63 - 1, seed=number)
    for part in strengths:
        require_range(-10, 10, strength=part)
    _check_prompts("--prompt", [prompt])
    _check_prompts("--to", [to])
    check_inputs({"--student": student})
    if dry_run:
        plan: dict[str, Any] = {"student": student, "prompt": prompt, "to": to, "seeds": seeds}
        emit({**plan, "strengths": strengths}, as_json, "dry run: nothing was drawn")
        return
    from distill.exploration import open_student, save_edits

    summary = save_edits(
        *(student, open_student(student, psi), prompt, to, seeds, strengths, out),
        noise_scale=noise_scale,
        progress=reporter,
    )
    emit(summary, as_json, "edit")


@explore_app.command("styles")
@one_process
def styles(
    subject: Annotated[list[str], typer.Option(help="Subject; repeatable, a row each.")],
    style: Annotated[list[str], typer.Option(help="Style; repeatable, a column each.")],
    student: StudentOption = "miniature",
    template: Annotated[
        str, typer.Option(help="The prompt of a subject and a style.")
    ] = "{subject}, {style}",
    seed: Annotated[int, typer.Option(help="Seed of the noise that all images share.")] = 0,
    noise_scale: NoiseScale = 1.0,
    psi: Psi = None,
    out: OutFolder = Path("styles"),
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Draw every subject in every style from one noise, as a labeled grid."""
    require_range(0, 2**63 - 1, seed=seed)
    require_range(noise_scale=noise_scale)
    require_range(0, 1, psi=1.0 if psi is None else psi)
    _check_prompts("--subject", subject)
    _check_prompts("--style", style)
    check_inputs({"--student": student})
    from distill.exploration import open_student, save_styles, style_prompts

    prompts = style_prompts(subject, style, template)
    if dry_run:
        emit({"student": student, "prompts": prompts}, as_json, "dry run: nothing was drawn")
        return
    summary = save_styles(
        *(student, open_student(student, psi), subject, style, template, seed, out),
        noise_scale=noise_scale,
        progress=reporter,
    )
    emit(summary, as_json, "styles")


@explore_app.command("mix")
@one_process
def mix(
    student: Annotated[
        str, typer.Option(help="Run folder or exported student of a kind with styles (student.kind).")
    ],
    prompt: Annotated[
        list[str] | None, typer.Option(help="Text, or a class number; repeat it to mix prompts.")
    ] = None,
    seed: Annotated[
        list[int] | None, typer.Option(help="Seed of a noise; repeat it to mix noises (0).")
    ] = None,
    coarse: Annotated[
        list[int] | None,
        typer.Option(
            help="Draw blocks up to this side, in latents, by the first seed or prompt; repeat it for more "
            "columns (every side, and 0)."
        ),
    ] = None,
    psi: Psi = None,
    out: OutFolder = Path("mix"),
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Draw coarse blocks by the style of the first seed or prompt and fine blocks by that of another, as a
    labeled grid: a row per other seed or prompt, a column per --coarse."""
    seeds, sides = seed or [0], coarse or []
    require_range(0, 1, psi=1.0 if psi is None else psi)
    for number in seeds:
        require_range(0, 2**63 - 1, seed=number)
    for side in sides:
        require_range(0, 10_000, coarse=side)
    _check_prompts("--prompt", prompt or [])
    check_inputs({"--student": student})
    if dry_run:
        plan: dict[str, Any] = {"student": student, "prompts": prompt or [], "seeds": seeds, "coarse": sides}
        emit(plan, as_json, "dry run: nothing was drawn")
        return
    from distill.exploration import open_student, save_mix
    from distill.sampling import default_student_prompts

    sampler = open_student(student, psi)
    prompts = prompt or default_student_prompts(student, options="--prompt TEXT")[:1]
    emit(save_mix(student, sampler, prompts, seeds, sides, out, progress=reporter), as_json, "mix")


def _check_prompts(option: str, texts: list[str]) -> None:
    """Raise UserError, which names the option, for text that no prompt can be."""
    from d2g.data.prompt_files import prompt_text

    for text in texts:
        prompt_text(option, text)
