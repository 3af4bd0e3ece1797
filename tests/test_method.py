"""The code cites docs/method.md and docs/pytorch.md by heading: each cited heading exists."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("d2g", "d2g_cli", "pairgen", "latent_lpips", "distill", "eval", "teacher_training", "miniature")
FOLDERS += ("tests", "benchmarks")
NUMBERED = re.compile(r"method\.md,? (?:section )?\d")
CITATION = re.compile(r'(method|pytorch)\.md((?:,? (?:and )?\\?"[^"]+")+)')
PAGES = ("method", "pytorch")


def _headings(page: str) -> list[str]:
    text = (ROOT / f"docs/{page}.md").read_text(encoding="utf-8")
    return re.findall(r"^#{2,} (.+)$", text, re.MULTILINE)


def _texts() -> dict[str, str]:
    """Source and documentation files by path, with all line breaks (and comment marks) replaced by blanks."""
    folders = [ROOT / name for name in FOLDERS]
    paths = [*ROOT.glob("*.py"), *ROOT.glob("*.md"), *(p for f in folders for p in f.rglob("*.py"))]
    paths += (ROOT / "docs").glob("*.md")
    texts = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in paths}
    return {path: re.sub(r"\s*\n\s*(?:# )?", " ", text) for path, text in texts.items()}


def test_every_cited_heading_exists() -> None:
    headings = {page: _headings(page) for page in PAGES}
    cited = [
        (path, page, heading)
        for path, text in _texts().items()
        if path != "tests/test_method.py"
        for page, citation in CITATION.findall(text)
        for heading in re.findall(r'"([^"\\]+)\\?"', citation)
    ]
    assert len(cited) > 30
    assert [(path, page, heading) for path, page, heading in cited if heading not in headings[page]] == []


def test_no_citation_by_number() -> None:
    """Section numbers would become wrong when a section is added."""
    assert [path for path, text in _texts().items() if NUMBERED.search(text)] == []


@pytest.mark.parametrize("page", PAGES)
def test_headings_are_unique(page: str) -> None:
    headings = _headings(page)
    assert len(headings) == len(set(headings))
