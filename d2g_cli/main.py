"""Registers the commands and turns exceptions into one-line errors and exit codes."""

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from d2g.core.errors import Interrupted, UserError
from d2g.core.logs import logger
from d2g.core.machine_errors import explain_error
from d2g.core.signals import CommandInterrupts
from d2g_cli import (
    cascade,
    demo_doctor,
    distill,
    explore,
    launch,
    lpips,
    pairs,
    run,
    serve,
    settings,
    student,
    teacher,
)
from d2g_cli import eval as eval_commands
from d2g_cli.common import (
    is_printed_by_rank_0,
    is_rank_0,
    log_to_stderr,
    print_error,
    publish_error,
    reporter,
)
from d2g_cli.inputs import check_shell_values
from d2g_cli.terminal import is_terminal, one_line, prepare_streams, printable

INTERRUPTED = 130
"""Exit code after Ctrl-C, and after a signal that asks for the same."""
STOPPED = "interrupted; what was finished before is safe, run the same command again"


@contextmanager
def _usage_errors() -> Iterator[None]:
    """Make usage errors, which typer itself prints, printable. Under torchrun rank 0 alone prints them."""
    try:
        yield
    except typer.TyperException as error:
        text = one_line(error.format_message())
        if is_printed_by_rank_0(text):
            raise typer.Exit(error.exit_code) from error
        error.format_message = lambda: text  # type: ignore[method-assign]  # names options that do not exist
        raise


class _Subgroup(TyperGroup):
    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """List the commands with their whole first sentence, which typer would cut in a pipe."""
        commands = {name: self.get_command(ctx, name) for name in self.list_commands(ctx)}
        lines = {
            name: command.get_short_help_str(sys.maxsize)
            for name, command in commands.items()
            if command is not None and not command.hidden
        }
        with formatter.section("Commands"):
            formatter.write_dl(list(lines.items()))


class _Group(_Subgroup):
    def make_context(self, *args: Any, **settings: Any) -> Any:
        with _usage_errors():
            return super().make_context(*args, **settings)

    def invoke(self, ctx: Any) -> Any:
        with _usage_errors():
            return super().invoke(ctx)


app = typer.Typer(
    cls=_Group, help="Distill diffusion teachers into one-step conditional GANs.", no_args_is_help=True
)
demo_doctor.register_demo_doctor(app)
run.register_run(app)
cascade.register_cascade(teacher.teacher_app)
app.add_typer(teacher.teacher_app, name="teacher", cls=_Subgroup)
app.add_typer(pairs.pairs_app, name="pairs", cls=_Subgroup)
app.add_typer(lpips.lpips_app, name="lpips", cls=_Subgroup)
app.add_typer(distill.distill_app, name="distill", cls=_Subgroup)
student.register_student(app)
app.add_typer(explore.explore_app, name="explore", cls=_Subgroup)
app.command("serve")(serve.serve)
app.add_typer(eval_commands.eval_app, name="eval", cls=_Subgroup)
app.command("settings")(settings.settings)
app.command(
    "launch",
    context_settings={
        "allow_extra_args": True,
        "ignore_unknown_options": True,
        "allow_interspersed_args": False,
    },
)(launch.launch)


def _version(value: bool) -> None:
    if value:
        from importlib.metadata import version as installed_version  # slow to import

        print(f"diffusion2gan {installed_version('diffusion2gan')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Options before the command."""
    log_to_stderr()


def main(arguments: list[str] | None = None) -> None:
    """Run the command line. Every failure becomes one `error:` line and an exit code."""
    argv = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in argv
    prepare_streams()
    app.rich_markup_mode = "rich" if is_terminal(sys.stdout) and is_terminal(sys.stderr) else None
    logger.propagate = False  # a library may give the root logger a handler, which would repeat each line
    try:
        with CommandInterrupts() as interrupts:
            _run(argv, debug, interrupts)
    finally:
        logger.propagate = True  # for programs that call `main` and have a log of their own


def _run(argv: list[str], debug: bool, interrupts: CommandInterrupts) -> None:
    """Run a command and exit."""
    from d2g.core.launcher import check_launcher

    try:
        check_launcher()
        check_shell_values(argv)
        app(args=[a for a in argv if a != "--debug"], obj=argv, standalone_mode=True)
    except SystemExit as exit_:
        if isinstance(exit_.__context__, typer.TyperException):
            publish_error(exit_.__context__.format_message())
        # Loops handle Ctrl-C themselves; elsewhere typer turns it into a silent exit.
        if isinstance(exit_.__context__ and exit_.__context__.__cause__, KeyboardInterrupt):
            _fail(exit_, STOPPED, INTERRUPTED, debug)
        raise
    except Exception as error:
        # A library that swallowed a KeyboardInterrupt fails in its own way.
        if interrupts.received and not isinstance(error, Interrupted):
            _fail(error, STOPPED, INTERRUPTED, debug)
        # Messages for the user; anything else is unexpected.
        foreseen = isinstance(error, UserError | FloatingPointError)
        code = error.exit_code if isinstance(error, UserError) else 1
        _fail(error, str(error) if foreseen else _unexpected(error), code, debug)


def _unexpected(error: Exception) -> str:
    """The message of an error that is neither the user's nor foreseen, or that another rank caused."""
    if "WORLD_SIZE" in os.environ:  # decided without importing torch
        from d2g.core.distributed import process_group

        if process_group.lost_peer(error):
            return (
                f"another process is gone (process {process_group.rank()} lost it); its own message says why"
            )
    if (text := explain_error(error)) is not None:
        return text
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}; this is unexpected, run again with --debug and report it"


def _fail(error: BaseException, text: str, code: int, debug: bool) -> None:
    reporter.stop()
    if debug:
        print(printable("".join(traceback.format_exception(error))), file=sys.stderr)
    # Ctrl-C reaches every rank at once: rank 0 speaks for all.
    if code != INTERRUPTED or is_rank_0() or debug:
        print_error(text, every_rank=debug)
    sys.exit(code)
