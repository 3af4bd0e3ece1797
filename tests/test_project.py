"""Files around the code: continuous integration, pre-commit, the citation, issue templates, the changelog."""

import os
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def read_yaml(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def checks() -> list[str]:
    """The commands of .ci/run that start with `uv`, in order, without what they set in the environment, and
    without the & of those in the background."""
    commands = (
        re.sub(r"^(?:[A-Z_]+=\S+ )+| &$", "", line) for line in (ROOT / ".ci/run").read_text().splitlines()
    )
    return [command for command in commands if command.startswith("uv ")]


def commands_of(job: str) -> list[str]:
    steps = read_yaml(".github/workflows/ci.yml")["jobs"][job]["steps"]
    return [line for step in steps for line in step.get("run", "").splitlines()]


def test_ci_run_holds_the_checks() -> None:
    """The other tests compare with these lines: this one notices when they move."""
    assert checks()[0] == "uv sync --locked" and checks()[-2] == "uv run pytest"
    slow, *files = checks()[-1].split(" tests/")
    assert slow == "uv run pytest -m slow" and all((ROOT / "tests" / file).is_file() for file in files)


def test_the_workflow_runs_what_ci_run_runs() -> None:
    all_slow = "uv run pytest -m slow"
    assert commands_of("newest-torch") == ["pip install uv", ".ci/run", all_slow]
    assert commands_of("wheel") == ["pip install uv", ".ci/release"]
    for script in (".ci/run", ".ci/release"):
        assert os.access(ROOT / script, os.X_OK), f"{script} is not executable"
    # With the oldest torch, environment and tests are the same; format, types and docs depend on no torch.
    commands = [c.replace(" --no-sync", "") for c in commands_of("oldest-torch") if c != "pip install uv"]
    commands = [command for command in commands if not command.startswith("uv pip install")]
    same = [line for line in checks() if not re.search("ruff|mypy|zensical", line)]
    assert commands == [*same[:-1], all_slow]


def test_the_workflow_takes_the_oldest_torch_that_the_project_allows() -> None:
    (install,) = [c for c in commands_of("oldest-torch") if c.startswith("uv pip install")]
    dependencies = [line for line in PROJECT["dependencies"] if re.match(r"torch(vision)?>=", line)]
    assert install.split()[3:] == [line.replace(">=", "==") + ".0" for line in dependencies]
    python = PROJECT["requires-python"].removeprefix(">=")
    for job in read_yaml(".github/workflows/ci.yml")["jobs"].values():
        (setup,) = [s for s in job["steps"] if s.get("uses", "").startswith("actions/setup-python")]
        assert setup["with"]["python-version"] == python


def test_pre_commit_runs_the_quick_checks() -> None:
    (repo,) = read_yaml(".pre-commit-config.yaml")["repos"]
    quick = [line for line in checks() if "ruff" in line or "mypy" in line]
    assert [hook["entry"] for hook in repo["hooks"]] == quick
    assert repo["repo"] == "local", "the tools are those of uv.lock"


def test_versions_agree() -> None:
    versions = re.findall(r"^## (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[0] == PROJECT["version"] == str(read_yaml("CITATION.cff")["version"])


def test_the_citation_is_that_of_the_readme() -> None:
    """The keys that the Citation File Format 1.2.0 requires, and the paper as the README cites it."""
    citation = read_yaml("CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["cff-version"] == "1.2.0" and citation["license"] == PROJECT["license"]
    paper = citation["preferred-citation"]
    assert {"type", "title", "authors"} <= set(paper)
    bibtex = (ROOT / "README.md").read_text().partition("```bibtex")[2].partition("```")[0]
    bibtex = " ".join(bibtex.replace("{GAN}s", "GANs").split())
    names = " and ".join(f"{author['family-names']}, {author['given-names']}" for author in paper["authors"])
    assert f"{{{names}}}" in bibtex and f"{{{paper['title']}}}" in bibtex
    assert f"{{{paper['year']}}}" in bibtex and paper["collection-title"] in bibtex
    assert paper["identifiers"][0]["value"].removeprefix("arXiv:") in paper["url"]


TEMPLATES = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))


@pytest.mark.parametrize("path", [t for t in TEMPLATES if t.name != "config.yml"], ids=lambda path: path.stem)
def test_issue_templates_ask_for_commands_that_exist(path: Path) -> None:
    template = read_yaml(str(path.relative_to(ROOT)))
    assert {"name", "description", "body"} <= set(template)
    fields = [element for element in template["body"] if element["type"] != "markdown"]
    assert len({field["id"] for field in fields}) == len(fields)
    assert any(field["validations"]["required"] for field in fields if "validations" in field)
    from typer.testing import CliRunner

    from d2g_cli.main import app

    commands = re.findall(
        r"`d2g ((?:[a-z]+ ?)+)", " ".join(f["attributes"].get("description", "") for f in fields)
    )
    for command in commands:
        result = CliRunner().invoke(app, [*command.split(), "--help"])
        assert result.exit_code == 0, f"{path.name} asks for `d2g {command.strip()}`"


def test_the_release_script_refuses_a_version_without_a_changelog_entry(tmp_path: Path) -> None:
    (tmp_path / ".ci").mkdir()
    (tmp_path / ".ci/release").write_text((ROOT / ".ci/release").read_text())
    (tmp_path / "CHANGELOG.md").write_text("# Changes\n")
    stub = tmp_path / "bin" / "uv"
    stub.parent.mkdir()
    stub.write_text('#!/bin/sh\n[ "$1" = version ] && echo 9.9.9 || exit 7\n')
    stub.chmod(0o755)
    environment = {**os.environ, "PATH": f"{stub.parent}:{os.environ['PATH']}"}
    command = ["bash", str(tmp_path / ".ci/release")]
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert process.returncode == 1 and "no entry for 9.9.9" in process.stderr


def test_the_platform_page_names_files_that_are_as_it_says() -> None:
    """Every `file: word` of docs/platforms.md exists: the page says what the code shows."""
    text = (ROOT / "docs/platforms.md").read_text()
    claims = re.findall(r"`([\w/]+\.py)`: `([^`]+)`", text)
    assert len(claims) >= 8
    for file, word in claims:
        assert word in (ROOT / file).read_text(), f"{file} does not contain {word}"
