"""Every `d2g` command in the documentation exists, with every option and preset that it gives; so does every
command of benchmarks/, in the documentation and in the dated files."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from d2g_cli import main as cli

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BENCHMARK = re.compile(r"python benchmarks/(\w+)\.py((?:[^`\n#]|\\\n)*)")
REPLACED = {"ablation": "recipe"}
"""Scripts of old entries that are gone, and what does their work now."""
COMMAND = re.compile(r"^(?:uv run |torchrun .*-m d2g_cli |\$T )?(?:uv run )?(?:python -m d2g_cli |d2g )?")


def commands(text: str) -> Iterator[list[str]]:
    """The words after `d2g` of each command line in the bash blocks; lines that end in a backslash go on."""
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            start = COMMAND.match(line)
            if start and start.group():
                yield shlex.split(line[start.end() :].split(" | ")[0], comments=True)


def unknown_options(words: list[str]) -> list[str]:
    """The options that the command does not have. Raises KeyError for a command that does not exist."""
    command: Any = typer.main.get_command(cli.app)
    while hasattr(command, "commands") and words and not words[0].startswith("-"):
        command, words = command.commands[words[0]], words[1:]
    inner: list[str] = []
    if command.name == "launch" and "--" in words:  # a command follows
        words, inner = words[: words.index("--")], words[words.index("--") + 1 :]
    known = {name for param in command.params for name in param.opts} | {"--help", "--debug", "--version"}
    wrong = [word for word in words if word.startswith("--") and word.partition("=")[0] not in known]
    return wrong + (unknown_options(inner) if inner else [])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_of_documented_commands_exist(page: Path) -> None:
    wrong = {
        " ".join(words): options
        for words in commands(page.read_text(encoding="utf-8"))
        if words and (options := unknown_options(words))
    }
    assert not wrong


def test_a_wrong_option_is_noticed() -> None:
    text = "```bash\nuv run d2g eval run --feature-weights x --out y  # --no\n$T pairs generate --out p\n```"
    first, second = commands(text)
    assert unknown_options(first) == ["--feature-weights"] and unknown_options(second) == []


def unknown_words(script: str, words: str) -> list[str]:
    """Options of a benchmark's command, and its first word, that the script does not name."""
    if not (ROOT / "benchmarks" / f"{script}.py").is_file():
        return [f"{script}.py"]
    source = (ROOT / "benchmarks" / f"{script}.py").read_text(encoding="utf-8")
    given = [*re.findall(r"(?<!\S)--[a-z][\w-]*", words), *re.findall(r"^ ([a-z]+)(?!\S)", words)]
    return [word for word in given if f'"{word}"' not in source]


def test_documented_commands_of_benchmarks_exist() -> None:
    dated = sorted((ROOT / "benchmarks").glob("*.md"))
    named = [
        (page.name, script, words)
        for page in [*PAGES, *dated]
        for script, words in BENCHMARK.findall(page.read_text(encoding="utf-8"))
    ]
    wrong = {
        (page, script, words): unknown
        for page, script, words in named
        if script not in REPLACED and (unknown := unknown_words(script, words))
    }
    assert len(named) > 40 and not wrong
    assert all((ROOT / "benchmarks" / f"{script}.py").is_file() for script in REPLACED.values())


def test_a_wrong_command_of_a_benchmark_is_noticed() -> None:
    ((script, words),) = BENCHMARK.findall("`python benchmarks/recipe.py walk --pairs DIR --arms gan`")
    assert unknown_words(script, words) == ["--arms", "walk"] and unknown_words("walks", "") == ["walks.py"]
