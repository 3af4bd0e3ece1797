"""The documentation's pages: each one is reachable, and the API page has every public name."""

import re
from importlib import import_module
from pathlib import Path

import pytest

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
