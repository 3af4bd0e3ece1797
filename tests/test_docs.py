"""The documentation's pages: each one is reachable, the API page has every public name, README and recipes
have every preset, the evaluation page every feature network, and the format of pairs every key of a spec."""

import re
from dataclasses import fields
from fnmatch import fnmatch
from importlib import import_module
from pathlib import Path

import pytest

from distill.config.presets import DISTILL_PRESETS
from eval.networks.registry import FEATURES
from pairgen.store.spec import StoreSpec

ROOT = Path(__file__).parents[1]
PAGES = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}


@pytest.mark.parametrize("index", ["mkdocs.yml", "docs/llms.txt"])
def test_every_page_is_listed_once(index: str) -> None:
    listed = re.findall(r"[\w/-]+\.md", (ROOT / index).read_text())
    assert sorted(listed) == sorted(PAGES)


def test_the_api_page_has_every_public_name() -> None:
    listed = re.findall(r"^::: ([\w.]+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    public = {
        f"{obj.__module__}.{name}"
        for package in ("d2g.diffusion", "pairgen", "latent_lpips", "distill", "eval")
        for name in import_module(package).__all__
        for obj in [getattr(import_module(package), name)]
    }
    assert sorted(listed) == sorted(public)


def _section(page: str, heading: str) -> str:
    return (ROOT / page).read_text().partition(f"\n{heading}\n")[2].partition("\n## ")[0]


def _check_presets(text: str, other_words: set[str]) -> None:
    """Patterns in backticks match every preset, and each one matches a preset or is one of `other_words`."""
    patterns = re.findall(r"`([\w*-]+)`", text)
    missing = [name for name in DISTILL_PRESETS if not any(fnmatch(name, pattern) for pattern in patterns)]
    unknown = [pattern for pattern in patterns if not any(fnmatch(name, pattern) for name in DISTILL_PRESETS)]
    assert not missing and set(unknown) <= other_words


def test_the_recipes_say_of_every_preset_what_a_sound_run_looks_like() -> None:
    section = _section("docs/recipes.md", "## Preset by preset")
    first_column = " ".join(re.findall(r"^\| (.+?) \|", section, re.MULTILINE))
    _check_presets(first_column, {"ode", "gan", "cd"})


def test_the_readme_lists_every_preset() -> None:
    section = _section("README.md", "## Train at scale")
    lines = re.findall(r"^(?:- |  )(.+)$", section, re.MULTILINE)
    _check_presets(" ".join(lines), set())


def test_the_evaluation_page_lists_every_feature_network() -> None:
    section = _section("docs/evaluation.md", "## Feature networks")
    assert set(FEATURES) <= set(re.findall(r"`([\w-]+)`", section))


def test_the_format_of_pairs_has_every_key_of_a_spec() -> None:
    section = _section("docs/pair-format.md", "## store.json")
    keys = re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| (.+?) \|", section, re.MULTILINE)))
    assert sorted(keys) == sorted(field.name for field in fields(StoreSpec))
