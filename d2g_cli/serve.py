"""`d2g serve`: a page in the browser that draws with a student."""

from typing import Annotated, Any

import typer

from d2g_cli.common import DryRun, Json, emit, one_process, require_range, require_solver_options
from d2g_cli.inputs import check_inputs


@one_process
def serve(
    student: Annotated[
        str, typer.Option(help="Run folder, exported student, or a shipped name.")
    ] = "miniature",
    prior: Annotated[
        str | None, typer.Option(help="Student of stage C, for the last stage of a cascade.")
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(help="Teacher that draws beside the student, from the same noise.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Solver steps of the teacher (50).")] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Guidance of the teacher (its student's pairs', else 3).")
    ] = None,
    prompt: Annotated[str, typer.Option(help="Prompt that the page starts with.")] = "",
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 is open to the network.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 7860,
    share: Annotated[
        bool, typer.Option("--share", help="Open a public link through Gradio's servers.")
    ] = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Serve a page in the browser: prompt, seeds, a grid of images, and the teacher beside the student."""
    require_range(1, 65535, port=port)
    require_solver_options(teacher, steps, guidance)
    check_inputs({"--student": student, "--prior": prior, "--teacher": teacher})
    from d2g.data.prompt_files import prompt_text

    prompt_text("--prompt", prompt)
    if dry_run:
        plan: dict[str, Any] = {
            "student": student,
            "teacher": teacher,
            "host": host,
            "port": port,
            "share": share,
        }
        emit(plan, as_json, "dry run: nothing was served")
        return
    from d2g.core.distributed import process_group
    from d2g.diffusion.teacher_sampler import TEACHER_STEPS, SolverSettings
    from distill import browser_page
    from distill.sampling import load_student, with_prior
    from distill.student_files import pairs_guidance

    sampler = with_prior(load_student(student, device=process_group.own_device()), student, prior)
    if teacher is not None and guidance is None:
        guidance = pairs_guidance(student, teacher)
    settings = SolverSettings(steps=steps or TEACHER_STEPS, guidance=guidance, prior=prior)
    browser_page.serve_page(
        browser_page.open_page(sampler, student, teacher, settings, prompt), host, port, share
    )
