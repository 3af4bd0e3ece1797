"""The command line: help, usage errors and --dry-run."""

import inspect
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import typer
from typer.testing import CliRunner

from d2g_cli import main as cli

ROOT = Path(__file__).parents[2]


def commands(group: Any = None, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every command's words, groups included."""
    group = group or typer.main.get_command(cli.app)
    yield path
    for name, command in getattr(group, "commands", {}).items():
        yield from commands(command, (*path, name))


COMMANDS = list(commands())
WORKS = [
    "demo",
    "teacher train",
    "pairs generate",
    "pairs plan",
    "distill ode",
    "distill gan",
    "sample",
    "eval run",
    "eval stats --images x --out x.safetensors",
    "eval curve --over guidance=1,2 --out x",
]


# Help and usage.


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: " ".join(words) or "d2g")
def test_help(words: tuple[str, ...]) -> None:
    result = CliRunner().invoke(cli.app, [*words, "--help"])
    assert result.exit_code == 0 and "Usage" in result.output and len(result.output.splitlines()) > 5


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: " ".join(words) or "d2g")
def test_help_says_all_that_was_written(words: tuple[str, ...]) -> None:
    """Rich takes square brackets for its own and leaves them out."""
    command = typer.main.get_command(cli.app)
    for word in words:
        command = command.commands[word]  # type: ignore[attr-defined]
    texts = [command.help or "", *(str(getattr(param, "help", "") or "") for param in command.params)]
    assert not [text for text in texts if "[" in text]


def test_the_contracts_commands_are_there() -> None:
    commands = {" ".join(words) for words in COMMANDS}
    contract = {
        "demo",
        "doctor",
        "teacher train",
        "teacher info",
        "teacher list",
        "sample",
        "export",
        "lpips distance",
    }
    contract |= {f"pairs {name}" for name in ("plan", "generate", "info", "verify", "repair", "merge")}
    contract |= {"distill ode", "distill gan", "eval run", "eval compare", "eval stats", "eval curve"}
    assert contract <= commands and {words.partition(" --")[0] for words in WORKS} <= commands


def test_help_needs_no_torch() -> None:
    """In a fresh process: `--help` answers at once because nothing heavy is imported."""
    code = "import sys, cli\ntry: cli.main(sys.argv[1:])\nexcept SystemExit: sys.exit('torch' in sys.modules)"
    for words in (["--help"], ["distill", "gan", "--help"]):
        done = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0 and "Usage" in done.stdout, done.stderr


def test_version_from_a_fresh_process() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "d2g_cli", "--version"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.startswith("diffusion2gan ") and done.stderr == ""


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ("pairs generate --gidance 3", "--guidance"),
        ("pairs genrate", "generate"),
        ("pairs generate --steps many", "--steps"),
        ("pairs generate --preset sd15-cfg33", "'sd15-cfg3'"),
        ("pairs generate --set guidence=3", "did you mean 'guidance'?"),
        ("pairs generate --set guidance=strong", "takes float"),
        ("pairs generate --set guidance", "name=value"),
        ("pairs generate --solver huen", "did you mean 'heun'?"),
        ("pairs generate", "teacher is not set; give --teacher"),
        ("distill ode --preset minature", "did you mean 'miniature'?"),
        ("distill ode --set regresion.draws=2", "did you mean 'regression'?"),
        ("distill gan --set gan.r1_gama=2", "did you mean 'gan.r1_gamma'?"),
        ("distill gan --set gan=2", "is a group; set one of its members"),
        ("distill gan --set train.images=-1", "train.images is -1"),
        ("distill ode", "pairs is not set; give --pairs"),
        ("distill ode --minutes -1", "train.minutes is -1.0; expected a positive number"),
        ("distill ode --minutes nan", "--minutes is nan; expected a finite number"),
        ("distill ode --set optim.lr=Infinity", "'optim.lr' is 'Infinity'; expected a finite number"),
        ("distill ode --set regression.augment=zzz", "regression.augment is 'zzz'; expected 'none' or"),
        ("distill ode --set stage=gan", "stage is 'gan'; expected 'ode' of `d2g distill ode`"),
        (
            "distill ode --set gan.weight=1",
            "gan.weight is set, but acts only in `d2g distill gan`; leave it out",
        ),
        (
            "distill gan --set gan.penalty=approx --set gan.r1_interval=4",
            "gan.r1_interval is set, but acts only",
        ),
        (
            "distill ode --lpips x --set regression.losses=mse",
            "lpips is set, but acts only with e_latent_lpips or latent_lpips in regression.losses",
        ),
        ("distill ode --validate nope", "unknown --validate protocol 'nope'; known: "),
        ("distill ode --validate nope --dry-run", "unknown --validate protocol 'nope'"),
        ("distill ode --validate miniature", "--validate needs to know when"),
        ("pairs verify x --tolerance nan", "--tolerance is nan; expected 0 or more"),
        ("pairs merge x --out y --tolerance -1", "--tolerance is -1.0; expected 0 or more"),
        ("pairs generate --guidance inf", "--guidance is inf; expected a finite number"),
        ("pairs plan --price nan", "--price is nan; expected 0 or more"),
        ("pairs plan --price -1 --dry-run", "--price is -1.0; expected 0 or more"),
        ("demo --seed 9223372036854775808", "seed is 9223372036854775808; give an integer from 0 to 2^63"),
        ("sample --prompt a --guidance 0", "guidance is 0.0; expected 1 (no guidance) or more"),
        ("pairs stats x --cells 1025", "--cells is 1025; expected 1 to 1024"),
        ("lpips distance a b --teacher x --draws 0", "--draws is 0; expected 1 or more"),
        ("doctor --gpus 0 --preset miniature", "--gpus is 0; expected 1 or more"),
        ("doctor --gpus -3", "--gpus is -3; expected 1 or more"),
        ("doctor --gpus 2", "--gpus needs a run to describe; give --preset"),
        ("doctor --teacher miniature", "--teacher needs a run to describe; give --preset"),
        ("doctor --preset minature", "did you mean 'miniature'?"),
        ("teacher train --stages vae,unett --out x", "did you mean 'unet'?"),
        ("demo --preset quik", "did you mean 'quick'?"),
        ("sample --student miniature", "nothing to draw"),
        ("sample --student x --prompt a --num 0", "num is 0"),
        ("eval run", "give --student or --teacher, or --images"),
        ("eval run --images x --protocol minature", "did you mean 'miniature'?"),
        ("eval run --images x --set protocol.sise=9", "did you mean 'protocol.size'?"),
        ("eval run --images x --set protocol.resize=lanzcos", "did you mean 'lanczos'?"),
        ("eval run --images x --metrics fad", "did you mean 'fid'?"),
        ("eval stats --images x --out x.npz", "expected a name ending in .safetensors"),
        ("eval curve --student x --out x --over guidence=1", "curve over 'guidence'"),
        ("eval curve --student x --out x --over guidance=1", "means nothing for a student"),
        ("eval curve --teacher x --out x --over steps=a", "expected for example guidance=1,2,4"),
        ("eval curve --teacher x --out x --over guidance=1,nan", "guidance is nan; expected 0 or more"),
        ("eval curve --teacher x --out x --over steps=4,0", "steps is 0; expected 1 or more"),
        ("eval curve --teacher x --out x --over steps=2.5", "over steps: 2.5; expected whole numbers"),
        ("eval curve --teacher x --out x --over steps=inf", "over steps: inf; expected whole numbers"),
        ("eval curve --teacher x --out x.json --over steps=1", "give a folder"),
        ("eval protocols coco2014-30k", "did you mean 'coco2014-30k-d2gan'?"),
        ("export --student x --dtype int8 --out y", "dtype is 'int8'"),
        ("lpips distance a b", "--teacher is not set"),
    ],
)
def test_bad_usage_exits_2_and_names_what_is_right(
    d2g: Any, words: str, names: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    said = d2g(*words.split())
    assert said.code == 2 and names in said.stderr and said.stdout == "", said.stderr
    assert "Traceback" not in said.stderr
    assert list(tmp_path.iterdir()) == []


BESIDES = {  # what a command wants besides, to come as far as its numbers
    "doctor": "--preset miniature",
    "sample": "--prompt a",
    "export": "--student x --format diffusers",
    "pairs verify": "x",
    "pairs repair": "x",
    "pairs merge": "x --out y",
    "pairs stats": "x",
    "lpips distance": "a b --teacher x",
    "distill ode": "--validate miniature --set train.validate_images=9 --set train.validate_pairs=9",
    "distill gan": "--validate miniature --set train.validate_images=9 --set train.validate_pairs=9",
    "distill watch": "x",
    "eval run": "--teacher x",
    "eval stats": "--images x --out x.safetensors",
    "eval curve": "--teacher x --out x --over guidance=1",
}


def numbers() -> Iterator[tuple[str, str, str]]:
    """Every option that takes a number: its command, its name, what makes no sense of it."""
    for words in COMMANDS:
        command: Any = typer.main.get_command(cli.app)
        for word in words:
            command = command.commands[word]
        parameters = {} if hasattr(command, "commands") else inspect.signature(command.callback).parameters
        for param in command.params if parameters else ():
            hint = parameters[param.name].annotation
            (kind,) = get_args(hint)[:1] or (hint,)
            kinds = {kind, *get_args(kind)}
            if kinds & {int, float}:
                for value in ("-1", "nan", "inf") if float in kinds else ("-1",):
                    yield " ".join(words), param.opts[0], value


@pytest.mark.parametrize(("words", "option", "value"), [*numbers()])
def test_numbers_that_make_no_sense(
    d2g: Any, words: str, option: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every option of every command."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    said = d2g(*words.split(), *BESIDES.get(words, "").split(), option, value)
    assert said.code == 2 and said.stdout == "" and list(tmp_path.iterdir()) == [], said.stderr
    name = option.removeprefix("--").removeprefix("validate-").replace("-", "_")
    assert option in said.stderr or name in said.stderr, said.stderr
    assert value in said.stderr.lower(), said.stderr  # JSON's NaN and Infinity too


@pytest.mark.parametrize("words", WORKS)
def test_a_dry_run_touches_nothing(
    d2g: Any, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plan = d2g(*words.split(), "--dry-run", "--json", "--seed", "7").json
    assert plan["config"]["seed"] == 7 and list(tmp_path.iterdir()) == []
    shown = d2g(*words.split(), "--dry-run")
    assert shown.code == 0 and "nothing was touched" in shown.stdout and list(tmp_path.iterdir()) == []


def test_a_dry_run_shows_presets_options_and_overrides_in_that_order(d2g: Any) -> None:
    words = "pairs generate --preset sd15-cfg3 --guidance 4 --seed 1 --set seed=2 --set steps=9"
    config = d2g(*words.split(), "--dry-run", "--json").json["config"]
    values = [config[name] for name in ("num_pairs", "guidance", "seed", "steps")]
    assert values == [3_000_000, 4.0, 2, 9]
    plan = d2g("distill", "gan", "--preset", "sd15-cfg3", "--images", "512", "--dry-run", "--json").json
    assert (plan["steps"], plan["evaluations"], plan["config"]["train"]["images"]) == (2, 2064, 512)


@pytest.mark.parametrize("stage", ["ode", "gan"])
def test_a_dry_run_without_a_preset_is_that_of_the_default(stage: str, d2g: Any) -> None:
    default_plan = d2g("distill", stage, "--dry-run", "--json").json
    preset_plan = d2g("distill", stage, "--preset", "sd15-cfg8", "--dry-run", "--json").json
    assert default_plan == preset_plan and default_plan["table_a1"]["gpus"] == 64
    assert default_plan["memory_gib_per_gpu"]["assumed"].startswith("SD 1.5's networks")


def test_debug_shows_the_traceback(d2g: Any, tmp_path: Path) -> None:
    said = d2g("pairs", "info", tmp_path / "none", "--debug")
    assert said.code == 1 and "Traceback" in said.stderr
    assert said.stderr.splitlines()[-1].startswith("error: ")


def test_a_log_line_is_printed_once_whatever_handlers_a_library_installs(tmp_path: Path, d2g: Any) -> None:
    """open_clip and others call functions of `logging` that give the root logger a handler on stderr."""
    root = logging.getLogger()
    handler = logging.StreamHandler()
    root.addHandler(handler)
    try:
        (tmp_path / "prompts.txt").write_text("a red cube\n")
        words = ("--teacher", "miniature", "--prompts", tmp_path / "prompts.txt", "--steps", "1")
        ended = d2g("pairs", "generate", *words, "--out", tmp_path / "pairs")
    finally:
        root.removeHandler(handler)
    assert ended.code == 0, ended.stderr
    assert ended.stderr.count("supports pairs, regression, GAN") == 1
    assert logging.getLogger("d2g").propagate
