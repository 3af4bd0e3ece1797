"""`d2g settings` prints the same table of settings in the terminal, as JSON and in docs/settings."""

import subprocess
import sys
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from d2g.core.config import from_json, setting, to_json
from d2g.core.errors import SettingError
from d2g.core.setting_docs import describe_settings
from d2g_cli.settings import GROUPS, sections_of, settings_page

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, kw_only=True, slots=True)
class Inner:
    betas: tuple[float, float] = setting((0.9, 0.99), "Adam betas", source="Table 1")
    steps: tuple[int, ...] = setting((), "Steps")


@dataclass(frozen=True, kw_only=True, slots=True)
class Outer:
    minutes: float | None = setting(None, "Limit")
    kind: Literal["a", "b"] = setting("a", "Kind", recipe=True)
    inner: Inner = setting(Inner(), "Group")


def test_descriptions_of_settings_start_with_the_recipe() -> None:
    docs = describe_settings(Outer())
    assert [(doc.name, doc.type, doc.default, doc.meaning, doc.source, doc.recipe) for doc in docs] == [
        ("kind", "a | b", "a", "Kind", "", True),
        ("minutes", "float or null", "null", "Limit", "", False),
        ("inner.betas", "2 x float", "[0.9, 0.99]", "Adam betas", "Table 1", False),
        ("inner.steps", "list of int", "[]", "Steps", "", False),
    ]


@pytest.mark.parametrize("group", GROUPS)
def test_every_setting_is_documented_and_listed(group: str) -> None:
    for config, presets in sections_of(group).values():
        docs = describe_settings(config)
        assert not [doc.name for doc in docs if not doc.meaning]
        assert set(presets.about) == set(presets) and all(presets.about.values())
        assert {doc.name.partition(".")[0] for doc in docs} == {field.name for field in fields(config)}


def test_the_recipe_of_distillation_has_12_settings() -> None:
    (config, _), *_ = sections_of("distill").values()
    docs = describe_settings(config)
    recipe = [doc.name for doc in docs if doc.recipe]
    assert len(docs) > 90 and len(recipe) == 12 and [doc.recipe for doc in docs[:12]] == [True] * 12
    assert {"optim.lr", "gan.optim.lr", "gan.r1_gamma", "regression.losses"} <= set(recipe)


@pytest.mark.parametrize("group", GROUPS)
def test_the_pages_in_docs_are_up_to_date(group: str) -> None:
    page = ROOT / "docs" / "settings" / f"{group}.md"
    assert page.read_text(encoding="utf-8") == settings_page(group), (
        f"run `uv run d2g settings {group} --markdown > docs/settings/{group}.md`"
    )


def test_json_and_terminal_list_the_same_settings(d2g: Any) -> None:
    listed = d2g("settings", "distill", "--json").json
    text = d2g("settings", "distill").stdout
    assert listed["d2g distill"][0]["recipe"] is True
    assert all(entry["name"] in text for section in listed.values() for entry in section)
    assert "did you mean 'distill'?" in d2g("settings", "distil").stderr


@pytest.mark.parametrize(
    "words", [["settings", "distill"], ["distill", "gan", "--help"], ["eval", "run", "--help"]]
)
def test_help_and_settings_do_not_import_torch(words: list[str]) -> None:
    code = (
        "import sys\nfrom d2g_cli.__main__ import main\ntry: main()\n"
        "except SystemExit: pass\nsys.exit('torch' in sys.modules)"
    )
    process = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0 and process.stdout, process.stderr


@pytest.mark.parametrize("group", GROUPS)
def test_help_lists_the_presets(group: str, d2g: Any) -> None:
    for command, (_, presets) in sections_of(group).items():
        for words in ("d2g distill ode", "d2g distill gan") if command == "d2g distill" else (command,):
            text = d2g(*words.split()[1:], "--help").stdout
            stage = words.split()[-1]
            names = [name for name in presets if command != "d2g distill" or stage in presets[name]]
            assert "Presets" in text and all(name in text for name in names)


def test_errors_name_the_full_path_of_a_setting() -> None:
    for data in ({"inner": {"betas": [1]}}, {"inner": {"betas": 3}}):
        with pytest.raises(SettingError, match=r"^setting 'inner\.betas' takes"):
            from_json(Outer, data)
    assert from_json(Outer, to_json(Outer())) == Outer() and is_dataclass(Outer())


def test_help_of_an_evaluation_lists_the_metrics_and_a_dry_run_checks_their_names(d2g: Any) -> None:
    text = d2g("eval", "run", "--help").stdout
    assert all(name in text for name in ("fid_infinity", "dreamsim_diversity", "caption_accuracy"))
    ended = d2g("eval", "run", "--student", "miniature", "--metrics", "fidd", "--dry-run")
    assert ended.code == 2 and "unknown metric 'fidd'; did you mean 'fid'?" in ended.error


def test_help_of_doctor_lists_the_presets_of_distill(d2g: Any) -> None:
    text = d2g("doctor", "--help").stdout
    assert all(name in text for name in ("sd15-cfg3", "sdxl-cfg7", "trial"))
