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
    """The words of every command and group of commands, such as ("pairs", "generate")."""
    group = group or typer.main.get_command(cli.app)
    yield path
    for name, command in getattr(group, "commands", {}).items():
        yield from commands(command, (*path, name))


COMMANDS = list(commands())
COMMANDS_WITH_SETTINGS = [
    "demo",
    "teacher train",
    "teacher cascade",
    "pairs generate",
    "pairs plan",
    "distill ode",
    "distill gan --preset miniature",
    "sample",
    "eval run",
    f"eval stats --images {ROOT / 'docs'} --out x.safetensors",
    "eval curve --over guidance=1,2 --out x",
]


# `--help` and usage errors.


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: " ".join(words) or "d2g")
def test_help(words: tuple[str, ...]) -> None:
    result = CliRunner().invoke(cli.app, [*words, "--help"])
    assert result.exit_code == 0 and "Usage" in result.output and len(result.output.splitlines()) > 5


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: " ".join(words) or "d2g")
def test_help_texts_have_no_square_brackets(words: tuple[str, ...]) -> None:
    """Rich interprets square brackets as markup and does not print them."""
    command = typer.main.get_command(cli.app)
    for word in words:
        command = command.commands[word]  # type: ignore[attr-defined]
    texts = [command.help or "", *(str(getattr(param, "help", "") or "") for param in command.params)]
    assert not [text for text in texts if "[" in text]


def test_version_in_a_new_process() -> None:
    process = subprocess.run(
        [sys.executable, "-m", "d2g_cli", "--version"], cwd=ROOT, capture_output=True, text=True
    )
    assert process.returncode == 0 and process.stdout.startswith("diffusion2gan ") and process.stderr == ""


@pytest.mark.parametrize(
    ("words", "message"),
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
        ("distill ode", "teacher is not set; give --teacher"),
        ("distill ode --set optim.lr=Infinity", "'optim.lr' is 'Infinity'; expected a finite number"),
        ("distill ode --set stage=gan", "stage is 'gan'; expected 'ode' of `d2g distill ode`"),
        (
            "distill ode --set gan.weight=1",
            "gan.weight is set, but has an effect only in `d2g distill gan` and `d2g distill text`",
        ),
        (
            "distill gan --set gan.penalty=approx --set gan.r1_interval=4",
            "gan.r1_interval is set, but has an effect only",
        ),
        (
            "distill ode --lpips x --set regression.losses=mse",
            "lpips is set, but has an effect only with e_latent_lpips or latent_lpips in regression.losses",
        ),
        ("distill ode --validate nope", "unknown --validate protocol 'nope'; known: "),
        ("distill ode --validate miniature", "--validate needs to know when"),
        ("demo --seed 9223372036854775808", "seed is 9223372036854775808; give an integer from 0 to 2^63"),
        ("sample --prompt a --guidance 0", "guidance is 0.0; expected 1 (no guidance) or more"),
        (
            "eval export --for geneval --out x --teacher miniature --guidance 0",
            "--guidance is 0; expected 1 (no guidance) or more",
        ),
        ("serve --teacher miniature --guidance 0.5", "--guidance is 0.5; expected 1 (no guidance) or more"),
        (
            "eval curve --student x --out x --over noise_scale=1 --beside a/c --beside b/c",
            "--beside has two folders named 'c'; rename one, both names are in the picture",
        ),
        ("pairs stats x --cells 1025", "--cells is 1025; expected 1 to 1024"),
        ("doctor --gpus 0 --preset miniature", "--gpus is 0; expected 1 or more"),
        ("doctor --gpus 2", "--gpus needs a run to describe; give --preset"),
        ("doctor --teacher miniature", "--teacher needs a run to describe; give --preset"),
        ("doctor --preset minature", "did you mean 'miniature'?"),
        ("teacher train --stages vae,unett --out x", "did you mean 'unet'?"),
        ("demo --preset quik", "did you mean 'quick'?"),
        ("sample --student miniature", "nothing to draw"),
        ("sample --student x --prompt a --num 0", "num is 0"),
        ("sample --prompt a --set column=b", "column is 'b', but there is no prompt file"),
        ("pairs generate --teacher x --set column=b", "column is 'b', but there is no prompt file"),
        ("eval run --student x --set column=b", "column is 'b', but there is no prompt file"),
        ("eval run", "give --student or --teacher, or --images"),
        ("eval run --preset miniature --images x --dry-run", "--set student=null"),
        (
            "eval curve --teacher x --pipeline y --out x --over steps=1 --dry-run",
            "pipeline is y and teacher is",
        ),
        ("eval run --images x --protocol minature", "did you mean 'miniature'?"),
        ("eval run --images x --set protocol.sise=9", "did you mean 'protocol.size'?"),
        ("eval run --images x --set protocol.resize=lanzcos", "did you mean 'lanczos'?"),
        ("eval run --images x --metrics fad", "did you mean 'fid'?"),
        ("eval run --student x --steps 5", "steps is set, but has an effect only on a teacher that is drawn"),
        ("eval run --student x --set solver=heun --dry-run", "solver is set, but has an effect only on a"),
        ("eval run --student x --against . --metrics psnr --steps 5", "steps is set, but has an effect only"),
        ("eval run --student x --prior y --prior-steps 5", "prior_steps is set, but has an effect only on a"),
        ("eval run --images x --guidance 2", "guidance is set, but has an effect only on a teacher"),
        ("eval run --images x --set precision=bf16", "precision is set, but has no effect on --images"),
        ("eval run --pipeline x --set solver=heun", "solver is set, but has an effect only on a teacher"),
        ("eval curve --student x --out x --over psi=1 --steps 5", "steps is set, but has an effect only"),
        ("eval stats --images x --out x.npz", "expected a name ending in .safetensors"),
        ("eval curve --student x --out x --over guidence=1", "curve over 'guidence'"),
        ("eval curve --student x --out x --over steps=1", "--over steps has no effect on a student"),
        ("eval curve --teacher x --out x --over steps=a", "expected for example guidance=1,2,4"),
        ("eval curve --teacher x --out x --over guidance=1,nan", "guidance is nan; expected 0 or more"),
        ("eval curve --teacher x --out x --over steps=4,0", "steps is 0; expected 1 or more"),
        ("eval curve --teacher x --out x --over steps=2.5", "over steps: 2.5; expected whole numbers"),
        ("eval curve --teacher x --out x.json --over steps=1", "give a folder"),
        ("eval protocols coco2014-30k-d2gn", "did you mean 'coco2014-30k-d2gan'?"),
        ("lpips distance a b", "--teacher is not set"),
    ],
)
def test_usage_errors_exit_with_2_and_a_remedy(
    d2g: Any, words: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    result = d2g(*words.split())
    assert result.code == 2 and message in result.stderr and result.stdout == "", result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


REQUIRED_OPTIONS = {  # options without which a command fails before it checks its numbers
    "doctor": "--preset miniature",
    "sample": "--prompt a",
    "export": "--student x --format diffusers",
    "explore edit": "--prompt a --to b",
    "explore styles": "--subject a --style b",
    "explore mix": "--student x",
    "eval export": "--for geneval --out x --student miniature",
    "pairs verify": "x",
    "pairs repair": "x",
    "pairs merge": "x --out y",
    "pairs stats": "x",
    "lpips distance": "a b --teacher x",
    "distill ode": "--validate miniature --set train.validate_images=9 --set train.validate_pairs=9",
    "distill cd": "--validate miniature --set train.validate_images=9 --set train.validate_pairs=9",
    "distill gan": "--validate miniature --set train.validate_images=9 --set train.validate_pairs=9",
    "distill text": "--validate miniature --set train.validate_images=9 --set train.validate_pairs=9",
    "distill watch": "x",
    "eval run": "--teacher x",
    "eval stats": "--images x --out x.safetensors",
    "eval ledger": "x",
    "eval robustness": "--images x",
    "eval prefer": "--first x --second y --out z.jsonl",
    "eval curve": "--teacher x --out x --over guidance=1",
}


def invalid_numbers() -> Iterator[tuple[str, str, str]]:
    """Every option that takes a number: the command, the option, and an invalid value."""
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


@pytest.mark.parametrize(("words", "option", "value"), [*invalid_numbers()])
def test_invalid_numbers_are_refused(
    d2g: Any, words: str, option: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For every numeric option of every command."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    result = d2g(*words.split(), *REQUIRED_OPTIONS.get(words, "").split(), option, value)
    assert result.code == 2 and result.stdout == "" and list(tmp_path.iterdir()) == [], result.stderr
    name = option.removeprefix("--").removeprefix("validate-").replace("-", "_")
    assert option in result.stderr or name in result.stderr, result.stderr
    assert value in result.stderr.lower(), result.stderr  # also as NaN and Infinity of JSON


@pytest.mark.parametrize("words", COMMANDS_WITH_SETTINGS)
def test_a_dry_run_writes_nothing(
    d2g: Any, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plan = d2g(*words.split(), "--dry-run", "--json", "--seed", "7").json
    assert plan["config"]["seed"] == 7 and list(tmp_path.iterdir()) == []


def test_a_dry_run_says_that_nothing_was_touched(
    d2g: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = d2g("pairs", "generate", "--preset", "miniature", "--dry-run")
    assert result.code == 0 and "nothing was touched" in result.stdout and list(tmp_path.iterdir()) == []


def test_overrides_take_precedence_over_options_and_options_over_presets(d2g: Any) -> None:
    words = "pairs generate --preset sd15-cfg3 --guidance 4 --seed 1 --set seed=2 --set steps=9"
    config = d2g(*words.split(), "--dry-run", "--json").json["config"]
    values = [config[name] for name in ("num_pairs", "guidance", "seed", "steps")]
    assert values == [3_000_000, 4.0, 2, 9]
    plan = d2g("distill", "gan", "--preset", "miniature", "--images", "512", "--dry-run", "--json").json
    assert (plan["steps"], plan["evaluations"], plan["config"]["train"]["images"]) == (16, 2050, 512)


@pytest.mark.parametrize("stage", ["ode", pytest.param("gan", marks=(pytest.mark.slow, pytest.mark.long))])
def test_the_default_preset_of_a_dry_run(stage: str, d2g: Any) -> None:
    ended = d2g("distill", stage, "--dry-run", "--json")
    assert "no --preset: sd15-cfg8, because no teacher is named" in ended.stderr
    default_plan = ended.json
    preset_plan = d2g("distill", stage, "--preset", "sd15-cfg8", "--dry-run", "--json").json
    assert default_plan == preset_plan and default_plan["table_a1"]["gpus"] == 64
    assert default_plan["memory_gib_per_gpu"]["assumed"].startswith("SD 1.5's networks")


def test_debug_shows_the_traceback(d2g: Any, tmp_path: Path) -> None:
    result = d2g("pairs", "info", tmp_path / "none", "--debug")
    assert result.code == 1 and "Traceback" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: ")


def test_log_lines_are_printed_once_despite_handlers_of_libraries(tmp_path: Path, d2g: Any) -> None:
    """open_clip and other libraries add a handler on stderr to the root logger."""
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
