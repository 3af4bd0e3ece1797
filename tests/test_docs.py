"""The documentation's pages: each one is reachable, the API page has every public name, and the recipes have
every preset."""

import re
from fnmatch import fnmatch
from importlib import import_module
from pathlib import Path

import pytest

from distill.config.presets import DISTILL_PRESETS

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


def test_the_recipes_say_of_every_preset_what_a_sound_run_looks_like() -> None:
    text = (ROOT / "docs" / "recipes.md").read_text()
    section = text.partition("## Preset by preset\n")[2].partition("\n## ")[0]
    first_column = " ".join(re.findall(r"^\| (.+?) \|", section, re.MULTILINE))
    patterns = re.findall(r"`([\w*-]+)`", first_column)
    missing = [name for name in DISTILL_PRESETS if not any(fnmatch(name, pattern) for pattern in patterns)]
    unknown = [pattern for pattern in patterns if not any(fnmatch(name, pattern) for name in DISTILL_PRESETS)]
    assert not missing and set(unknown) <= {"ode", "gan", "cd"}
