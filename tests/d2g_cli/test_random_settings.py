"""Random values of settings: a command prints its plan, or one line that says what is wrong."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from d2g.core.setting_docs import describe_settings
from d2g_cli.settings import GROUPS, sections_of
from jobs import Running, distill_arguments, distill_config, make_pairs

NUMBERS = "0 -1 1 2 3 7 0.5 -0.0 1e-9 1e308 1e400 nan inf -inf 00 1_0 0x10 +1".split()
NUMBERS += ["9" * 400, str(2**63), "\u0661"]
WORDS = [
    *("", "x", "null", "true", "none", "[]", "[1]", "[1,2,3]", "[[1,2],[3]]", "{}", '{"a": 1}', '"', "a:b"),
    *(
        "a:1,b:nan",
        ",",
        "=",
        "a=b",
        "\u00e9",
        "\x1b[31m",
        "\u202e",
        "\ud800",
        "[" * 3000,
        "../..",
        "/dev/null",
    ),
]
SMALL = ["0", "-1", "1", "2", "3", "0.5", "1e-9", "true", "null", "[]", "[1]", "x", ""]
"""Values with which a run stays small."""
LENGTHS = ("train.images", "train.batch_size", "train.loader_workers", "train.minutes")


def commands() -> dict[str, list[str]]:
    """By command of `d2g settings`: the names of its settings. Planning a teacher takes time."""
    groups = [sections_of(group) for group in GROUPS if group != "teacher"]
    sections = {name: config for group in groups for name, (config, _) in group.items()}
    return {name: [doc.name for doc in describe_settings(config)] for name, config in sections.items()}


def random_sets(numbers: random.Random, names: list[str], values: list[str]) -> list[str]:
    """One to three random assignments, as options."""
    count = numbers.choice([1, 1, 1, 2, 3])
    sets = [f"{numbers.choice(names)}={numbers.choice(values)}" for _ in range(count)]
    return [word for one in sets for word in ("--set", one)]


def check(ended: Any, arguments: list[str]) -> None:
    """Fail unless a command succeeded, or printed one line of error with exit code 1 or 2."""
    assert ended.code in (0, 1, 2), (arguments, ended)
    assert "Traceback" not in ended.stderr and "this is unexpected" not in ended.stderr, (arguments, ended)
    if ended.code:
        assert ended.stderr.splitlines()[-1] == ended.error, (arguments, ended)
    assert "\x1b" not in ended.stderr + ended.stdout


def try_plans(seed: int, count: int, d2g: Any) -> None:
    numbers, table = random.Random(seed), commands()
    for _ in range(count):
        command = numbers.choice(sorted(table))
        words = command.split()[1:]
        words += [numbers.choice(["ode", "gan"])] if words == ["distill"] else []
        arguments = [*words, "--dry-run", *random_sets(numbers, table[command], NUMBERS + WORDS)]
        check(d2g(*arguments), arguments)


def test_plans_with_random_settings(d2g: Any) -> None:
    try_plans(0, 60, d2g)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seed", "count"), [(1, 150), *(pytest.param(seed, 400, marks=pytest.mark.long) for seed in range(1, 6))]
)
def test_plans_with_many_random_settings(seed: int, count: int, d2g: Any) -> None:
    try_plans(seed, count, d2g)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.long) for n in (1, 2))])
def test_runs_with_random_settings(seed: int, teacher: Path, tmp_path: Path) -> None:
    """Stage 1 of five steps, and what its settings do while it runs."""
    config = distill_config(teacher, make_pairs(teacher, tmp_path, steps=1, guidance=1.0))
    names = [name for name in commands()["d2g distill"] if not name.startswith(("gan.", *LENGTHS))]
    numbers = random.Random(seed)
    for case in range(8):
        sets = random_sets(numbers, names, SMALL)
        arguments = [*distill_arguments(config, tmp_path / f"run{case}"), *sets]
        ended = Running(arguments, tmp_path / "log").wait()
        check(ended, sets)
        if ended.code == 0:
            ending = json.loads((tmp_path / f"run{case}" / "ended.json").read_text())
            assert ending["how"] in ("done", "minutes"), (sets, ending)
