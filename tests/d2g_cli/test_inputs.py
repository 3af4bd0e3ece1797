"""`--dry-run` checks inputs, and that pairs fit the teacher; `d2g distill` without a preset chooses one."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from d2g_cli.inputs import CHECKS, check_inputs
from jobs import d2g_ranks, make_pairs
from tiny_teachers import save_dit, save_edm

MISSING = [
    ("pairs generate --teacher none --prompts {here}", "teacher none: no such folder"),
    ("pairs generate --teacher miniature --prompts none.txt", "--prompts none.txt: no such file or folder"),
    ("pairs plan --teacher miniature --prompts none.txt", "--prompts none.txt: no such file or folder"),
    ("distill ode --teacher none --pairs {here}", "none"),
    ("distill ode --teacher miniature --pairs none", "none/store.json"),
    ("distill gan --teacher miniature --lpips none", "--lpips none: no such file or folder"),
    ("distill gan --teacher miniature --init none", "student none: expected a run"),
    (
        "distill ode --preset cifar10 --set regression.lpips_weights=none.pth",
        "regression.lpips_weights none.pth: no such file",
    ),
    ("distill gan --preset cifar10-real --set gan.real=none", "gan.real none: no such"),
    ("sample --student none --prompt a", "student none: expected a run"),
    ("sample --teacher none --prompt a", "--teacher none: no such folder"),
    ("sample --prompts none.txt", "--prompts none.txt: no such file or folder"),
    ("export --student none --format diffusers", "student none: expected a run"),
    ("export --student miniature --format onnx --scores none.json", "--scores none.json: no such file"),
    ("eval run --student none", "student none: expected a run"),
    ("eval run --teacher miniature --reference none", "--reference none: no such file or folder"),
    ("eval run --teacher miniature --weights dinov2=none", "--weights dinov2=none: no such file"),
    ("eval run --images none", "--images none: no such file or folder"),
    ("eval stats --images none --out x.safetensors", "--images none: no such file or folder"),
    ("eval curve --teacher none --over guidance=1,2 --out x", "--teacher none: no such folder"),
    ("lpips train --data none", "--data none: no such file or folder"),
    ("lpips calibrate --latents none", "--latents none: no such folder"),
    ("lpips score --weights none", "--weights none: no such file or folder"),
    ("lpips overfit --data none", "--data none: no such file or folder"),
    ("lpips triplets --data none", "--data none: no such file or folder"),
    ("pairs repair {here} --teacher none", "teacher none: no such folder"),
    ("pairs repair {here} --prompts none.txt", "--prompts none.txt: no such file or folder"),
    ("explore walk --student none", "student none: expected a run"),
    ("explore edit --student none --prompt a --to b", "student none: expected a run"),
    ("explore styles --student none --subject a --style b", "student none: expected a run"),
    ("explore mix --student none", "student none: expected a run"),
    ("eval curve --student miniature --over psi=0,1 --out x --beside none", "--beside none: no such file"),
    ("eval run --student miniature --features none.pt2", "--features none.pt2: no such file"),
    ("eval robustness --images {here} --features none.onnx", "--features none.onnx: no such file"),
    ("eval run --student miniature --features none:mean", "--features none:mean: no module 'none' can be"),
    ("eval prefer --summary --out none.jsonl", "--out none.jsonl: no such file or folder"),
    ("run --data {here} --features none.pt2", "--features none.pt2: no such file"),
    ("teacher train --data none", "none: no such file or folder"),
    ("teacher train --init none", "teacher none: no such folder"),
    ("teacher train --vae none/none", "autoencoder none/none: no such folder"),
]


@pytest.mark.parametrize(("words", "message"), MISSING)
def test_a_dry_run_names_the_input_that_is_missing(
    words: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, d2g: Any
) -> None:
    here = tmp_path / "here.txt"
    here.write_text("a")
    monkeypatch.chdir(tmp_path)
    ended = d2g(*words.format(here=here).split(), "--dry-run")
    assert ended.code == 1 and message in ended.error and ended.stdout == ""
    assert list(tmp_path.iterdir()) == [here]


def test_inputs_that_exist_pass(teacher: Path, tmp_path: Path, d2g: Any) -> None:
    pairs = make_pairs(teacher, tmp_path)
    words = ("--teacher", teacher, "--dry-run", "--json")
    plan = d2g("pairs", "generate", "--prompts", tmp_path / "prompts.txt", *words).json
    assert plan["config"]["prompts"] == str(tmp_path / "prompts.txt")
    small = ("--set", "train.batch_size=4")
    assert d2g("distill", "ode", "--pairs", pairs, *words, *small).json["config"]["pairs"] == str(pairs)
    assert d2g("sample", "--student", "miniature", "--prompt", "a", "--dry-run").code == 0
    check_inputs({"--prompts": "-", "--pairs": "s3://bucket/pairs", "--init": "teacher", "--teacher": None})
    assert set(CHECKS) >= {"--teacher", "--student", "--pairs"}


DRY_RUNS = {
    "gan.adaptive_weight=true regression.losses=[]": "gan.adaptive_weight is true, but regression.losses",
    "train.batch_size=16": "train.batch_size is 16, but there are 12 pairs to train on",
    "train.batch_size=8 train.validate_images=8 train.validate_pairs=12": "train.validate_pairs is 12 of 12",
    "train.batch_size=8 data.max_pairs=50": "data.max_pairs is 50, but there are 12 pairs",
    "train.batch_size=8 gan.timestep=1000": "gan.timestep is 1000; expected 0 to 999",
    "train.batch_size=8 train.images=16 gan.d_steps_per_g_step=3": "step is 3, but the run has 2 steps",
    "train.batch_size=8 gan.r1_rows=4": "",
}


@pytest.mark.parametrize("sets", DRY_RUNS)
def test_a_dry_run_refuses_what_the_run_would_refuse(sets: str, teacher: Path, pairs: Path, d2g: Any) -> None:
    words = ["distill", "gan", "--preset", "miniature", "--teacher", teacher, "--pairs", pairs]
    words += [word for one in sets.split() for word in ("--set", one)]
    ended = d2g(*words, "--dry-run")
    assert ended.code == (1 if "there are 12 pairs to" in DRY_RUNS[sets] else 2 if DRY_RUNS[sets] else 0)
    assert DRY_RUNS[sets] in ended.stderr


PAIR_DRY_RUNS = {
    "churn=1": "churn is 1, but teacher",
    "solver=euler": "solver is 'euler', but teacher",
    "guidance=1 guidance_rescale=0.7": "guidance 1 leaves nothing to rescale",
    "column=title": "prompts.txt has one prompt a line and no columns",
    "num_pairs=100000000 shard_size=1": "shard_size is 1, expected at least",
}


@pytest.mark.parametrize("sets", PAIR_DRY_RUNS)
def test_a_dry_run_of_pairs_refuses_what_the_job_would_refuse(
    sets: str, teacher: Path, tmp_path: Path, d2g: Any
) -> None:
    (tmp_path / "prompts.txt").write_text("a\nb\n")
    words = ["pairs", "generate", "--teacher", teacher, "--prompts", tmp_path / "prompts.txt"]
    words += [word for one in sets.split() for word in ("--set", one)]
    ended = d2g(*words, "--out", tmp_path / "out", "--dry-run")
    assert ended.code == 2 and PAIR_DRY_RUNS[sets] in ended.error
    assert not (tmp_path / "out").exists()


def test_a_dry_run_of_pairs_prints_the_size_of_the_store(teacher: Path, tmp_path: Path, d2g: Any) -> None:
    (tmp_path / "prompts.txt").write_text("a\nb\nc\n")
    words = ("--prompts", tmp_path / "prompts.txt", "--teacher", teacher, "--steps", "3")
    plan = d2g("pairs", "generate", *words, "--set", "shard_size=2", "--dry-run", "--json").json
    assert (plan["pairs"], plan["shards"], plan["evaluations_per_pair"]) == (3, 2, 6)
    assert plan["gib_with_noise"] == 2 * plan["gib"] == plan["gib_here"]
    measured = d2g("pairs", "plan", *words, "--set", "shard_size=2", "--json").json
    assert {key: measured[key] for key in plan if key != "config"} == {
        key: value for key, value in plan.items() if key != "config"
    }
    # Without prompts there is no size yet.
    assert set(d2g("pairs", "plan", "--teacher", teacher, "--dry-run", "--json").json) == {"config"}


def test_a_dry_run_names_losses_that_the_teacher_does_not_have(tmp_path: Path, d2g: Any) -> None:
    pixels = save_edm(tmp_path / "edm")
    sets = ("--set", "regression.losses=e_latent_lpips")
    ended = d2g("distill", "ode", "--teacher", pixels, *sets, "--dry-run")
    assert ended.code == 2 and "generates pixels, for which there is no e_latent_lpips" in ended.error


def test_a_hub_id_is_not_fetched(d2g: Any) -> None:
    """Without a connection the log says so. A name below a folder of this disk is a path."""
    ended = d2g("pairs", "generate", "--teacher", "nobody/nothing", "--prompts", "-", "--dry-run")
    assert (
        ended.code == 0
        and "--teacher nobody/nothing is not checked: the hub cannot be reached" in ended.stderr
    )
    ended = d2g("pairs", "generate", "--teacher", "tests/nothing", "--prompts", "-", "--dry-run")
    assert ended.code == 1 and "--teacher tests/nothing: no such folder" in ended.error


def test_a_small_teacher_gets_a_small_plan(teacher: Path, tmp_path: Path, d2g: Any) -> None:
    ended = d2g("distill", "ode", "--teacher", teacher, "--dry-run", "--json")
    assert ended.json["config"]["train"]["images"] == 24_000
    assert (
        f"no --preset: miniature, because teacher {teacher} (Stable Diffusion 1.x, 2.x) has 0."
        in ended.stderr
    )
    named = d2g("distill", "ode", "--teacher", teacher, "--preset", "sd15-cfg8", "--dry-run", "--json")
    assert named.json["config"]["train"]["images"] == 102_400_000 and "no --preset" not in named.stderr
    # A transformer gets the discriminator that is made of it.
    dit = save_dit(tmp_path / "dit")
    gan = d2g("distill", "gan", "--teacher", dit, "--dry-run", "--json").json["config"]["gan"]
    assert gan["discriminator"] == "transformer"
    # A teacher of pixels gets a loss of pixels, whatever its size.
    pixels = save_edm(tmp_path / "edm")
    ode = d2g("distill", "ode", "--teacher", pixels, "--dry-run", "--json").json["config"]
    assert ode["regression"]["losses"] == [["lpips", 1.0]]


def test_an_unfinished_teacher_is_refused_in_a_dry_run(teacher: Path, tmp_path: Path, d2g: Any) -> None:
    folder = shutil.copytree(teacher, tmp_path / "teacher")
    (folder / "training").mkdir()
    (folder / "training" / "config.json").write_text("{}")
    for words in (("pairs", "generate"), ("distill", "ode"), ("eval", "run"), ("sample", "--prompt", "a")):
        error = d2g(*words, "--teacher", folder, "--dry-run").error
        assert "its training is not finished" in error


@pytest.mark.parametrize(("settings", "gpus"), [((), 2), (("--set", "engine.gpus=64"), 64)])
def test_a_plan_is_for_the_processes_that_it_is_started_in(
    teacher: Path, tmp_path: Path, settings: tuple[str, ...], gpus: int
) -> None:
    """`d2g launch --gpus 2 -- ... --dry-run`: memory and rows of two GPUs, not of those that the preset is
    meant for."""
    words = ["distill", "ode", "--preset", "sd15-cfg3", "--teacher", str(teacher), "--dry-run", "--json"]
    first, second = d2g_ranks([*words, *settings], tmp_path)
    plan = first.json
    assert (plan["gpus"], plan["rows_per_gpu"]) == (gpus, 256 // gpus)
    assert second.code == 0


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["sample", "--prompt", "a", "--out", ""], "--out is empty"),
        (["sample", "--prompt", "a", "--student="], "--student is empty"),
        (["eval", "run", "--preset", "miniature", "--keep", " "], "--keep is empty"),
        (
            ["eval", "prefer", "--out", "a.jsonl", "--first", ".", "--second", ".", "--host", ""],
            "--host is emp",
        ),
        (["launch", "--", "sample", "--prompt", "a", "--out="], "--out is empty"),
        (
            ["sample", "--prompt", "a", "--out=~/images"],
            "--out is ~/images: the shell has left the ~ as it is",
        ),
    ],
)
def test_values_that_the_shell_has_lost_are_refused(
    words: list[str], error: str, d2g: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unset variable gives an empty text, which was the folder here, the default, or all addresses; bash
    does not replace ~ after --out=."""
    monkeypatch.chdir(tmp_path)
    ended = d2g(*words)
    assert ended.code == 2 and ended.error.startswith(f"error: {error}"), ended
    assert not list(tmp_path.iterdir())
