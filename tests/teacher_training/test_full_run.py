"""`d2g run`: the plan, all parts, resuming, a teacher that is not trained or given, Ctrl-C, refusals."""

import json
import signal
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from browser import chromium
from d2g.core.distributed import checkpoint
from d2g.core.distributed.process_count import saved_process_count
from d2g.core.errors import UserError
from d2g.diffusion.teacher import load_teacher
from d2g_cli.launch import cpu_processes
from eval.images.folders import load_all, read_images
from eval.networks.efficientnet import load_efficientnet_lite0
from eval.result import EvalResult
from jobs import Ended, Running
from jobs import d2g as fork_d2g
from own_pictures import CONFIG, class_folders, image_folder, make_image, run_arguments
from pairgen.store.reader import PairReader
from teacher_training.full_run.config import FULL_RUN_PRESETS
from teacher_training.full_run.pictures import (
    reference_pictures,
    save_pictures,
    spread_captions,
    spread_pictures,
)
from teacher_training.full_run.plan import PART_SHARES, FullRunPlan, measure_parts, plan_run
from teacher_training.full_run.run import run_parts
from teacher_training.plan import Request, plan_teacher
from teacher_training.start import save_untrained_teacher
from teacher_training.times import PartTimes


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "pictures"
    folder.mkdir()
    image_folder(folder)
    return folder


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ended, Ended]:
    """(WORK, the start that refused the untrained teacher, the same command with --untrained)."""
    folder = tmp_path_factory.mktemp("work")
    # Import here what every fork would import again.
    save_untrained_teacher(replace(CONFIG, data=str(data)), folder / "untrained")
    load_teacher(str(folder / "untrained"))
    load_efficientnet_lite0()
    arguments = run_arguments(data, folder / "work", "--minutes", "0.05")
    refused = fork_d2g(arguments, folder / "log")
    return folder / "work", refused, fork_d2g([*arguments, "--untrained", "--json"], folder / "log")


def files(folder: Path) -> Mapping[Path, int]:
    """Weights and shards with their times."""
    kinds = (".safetensors", ".h5", ".parquet")
    return {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.suffix in kinds}


@pytest.mark.long
@pytest.mark.slow
def test_a_teacher_that_is_not_trained_ends_the_run(run: tuple[Path, Ended, Ended]) -> None:
    work, refused, _ = run
    assert refused.code == 1 and "this teacher is not trained" in refused.error
    assert (
        "--untrained to go on with it" in refused.error and str(work / "teacher/report.html") in refused.error
    )
    for line in (
        "plan: 40 pictures, 40 of them with a caption",
        "plan: then pairs ",
        " minutes for the whole run",
    ):
        assert line in refused.stderr


@pytest.mark.slow
def test_one_command_leaves_what_the_single_commands_leave(run: tuple[Path, Ended, Ended]) -> None:
    work, _, ended = run
    assert ended.code == 0, ended.stderr
    result, lengths = ended.json, json.loads((work / "plan.json").read_text())["lengths"]
    assert len(PairReader(work / "pairs")) == lengths["pairs"] >= 16
    for stage in ("ode", "gan"):
        last = checkpoint.latest(work / stage / "checkpoints")
        assert last is not None and last.nimg >= lengths[stage]
    # Every sampler was evaluated on the same prompts, beside real pictures.
    assert set(result["results"]) == {"teacher", "ode", "gan", "real"}
    for name in ("teacher", "ode", "gan"):
        evaluation = EvalResult.load(work / "results" / name)
        assert evaluation.numbers() == result["results"][name] and evaluation.clip_score is not None
        assert evaluation.counts["images"] == lengths["eval"] and evaluation.counts["reference"] == 40
        assert evaluation.models["features"]["name"] == "efficientnet-lite0"
    assert (work / "student" / "model_index.json").is_file() and result["exported"] == str(work / "student")
    assert saved_process_count(work) in (1, cpu_processes(work / "other", 0))
    assert list(result["seconds"]) == ["teacher", "pairs", "stage 1", "stage 2", "evaluation", "export"]
    with chromium() as browser:
        page = browser.open(work / "report.html", width=1400)
    assert page.problems == [] and page.images == 16 * (4 + 2)
    assert "This teacher is not trained" in page.text and "held-out real pictures" in page.text


@pytest.mark.slow
def test_the_same_command_keeps_everything_and_other_minutes_are_refused(
    run: tuple[Path, Ended, Ended], data: Path, tmp_path: Path, d2g: Any
) -> None:
    work, _, first = run
    before = files(work)
    arguments = run_arguments(
        data, work, "--minutes", "0.05", "--untrained", "--parts", "teacher,pairs,ode,gan"
    )
    again = fork_d2g([*arguments, "--json"], tmp_path)
    assert again.code == 0, again.stderr
    assert again.json["results"] == first.json["results"] and files(work) == before
    error = d2g(*run_arguments(data, work, "--minutes", "7")).error
    assert "was planned for another run: minutes (0.05 -> 7.0); give the same to go on" in error


@pytest.mark.long
@pytest.mark.slow
def test_a_given_teacher_is_distilled_and_ctrl_c_says_how_to_go_on(
    run: tuple[Path, Ended, Ended], data: Path, tmp_path: Path
) -> None:
    options = ["--data", str(data), "--out", str(tmp_path / "work"), "--teacher", str(run[0] / "teacher")]
    options += ["--minutes", "0", "--untrained", "--processes", "1", "--parts", "pairs,ode"]
    sets = ("pairs.num_pairs=64", "pairs.steps=2", "ode.train.images=1000000", "gan.train.batch_size=16")
    running = Running(["run", *options, *(w for one in sets for w in ("--set", one))], tmp_path / "log")
    stats = tmp_path / "work" / "ode" / "stats.jsonl"
    running.wait_for(lambda: stats.is_file() and stats.stat().st_size > 0)
    running.send(signal.SIGINT)
    ended = running.wait()
    assert ended.code == 130 and "run the same command again to go on" in ended.error
    assert "plan: the teacher is given" in ended.stderr and not (tmp_path / "work" / "teacher").exists()
    assert checkpoint.latest(tmp_path / "work" / "ode" / "checkpoints") is not None


def test_pictures_are_kept_as_the_teacher_sees_them(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Cropped, with captions by the template of the training; drawn evenly, so that no class is left out."""
    (tmp_path / "classes").mkdir()
    class_folders(tmp_path / "classes")
    config = replace(CONFIG, data=str(tmp_path / "classes"), caption_template="a drawing of a {}")
    file = save_pictures(config, 16, tmp_path)
    images, captions = spread_pictures(file, 8)
    assert images.shape == (8, 3, 16, 16) and len(set(captions)) == 8
    assert captions[0] == "a drawing of a blue box" == spread_captions(str(file), None, 4)[0]
    assert spread_captions(str(file), None, 80)[:2] == [captions[0]] * 2, "more than there are: repeats"
    assert len(spread_pictures(file, 100)[0]) == 40
    # Evaluations compare with some of many pictures, as evenly spread.
    few = reference_pictures(file, 8, tmp_path / "results" / "reference.parquet")
    assert torch.equal(load_all(read_images(few))[0], images)
    assert load_all(read_images(few))[1] == captions
    assert reference_pictures(file, 40, tmp_path / "unused.parquet") == file
    # What was measured of a file counts as long as the file is the same.
    written = few.stat().st_mtime_ns
    assert reference_pictures(file, 8, few).stat().st_mtime_ns == written
    assert len(load_all(read_images(reference_pictures(file, 12, few)))[1]) == 12
    # An existing file is kept, without a warning of changed captions.
    before = file.stat().st_mtime_ns
    assert save_pictures(config, 16, tmp_path).stat().st_mtime_ns == before
    table = pq.read_table(file)
    spaces = [f"{text} " for text in table["caption"].to_pylist()]
    (tmp_path / "spaces").mkdir()
    pq.write_table(table.set_column(1, "caption", [spaces]), tmp_path / "spaces.parquet")
    for _ in range(2):
        save_pictures(replace(config, data=str(tmp_path / "spaces.parquet")), 16, tmp_path / "spaces")
    assert "other pictures" not in caplog.text
    # Other pictures are not taken for them.
    with pytest.raises(UserError, match=r"has pictures of other settings: caption_template .*, data "):
        save_pictures(replace(CONFIG, data=str(data)), 16, tmp_path)
    with pytest.raises(UserError, match=r"has pictures of other settings: size .16 -> 32.; give"):
        save_pictures(config, 32, tmp_path)


def test_few_pairs_have_captions_of_all_pictures(teacher: Path, tmp_path: Path) -> None:
    """The pictures are sorted by class. The first captions alone would be of one class."""
    (tmp_path / "pictures").mkdir()
    for number in range(40):
        make_image(number)[0].save(tmp_path / "pictures" / f"{number:03d}.png")
        (tmp_path / "pictures" / f"{number:03d}.txt").write_text(
            f"{'red cube' if number < 20 else 'cone'} {number}"
        )
    out, config = tmp_path / "work", FULL_RUN_PRESETS["quick"]
    pairs = replace(config.pairs, num_pairs=16, steps=2, guidance=1.0, shard_size=8)
    config = replace(
        config,
        data=str(tmp_path / "pictures"),
        teacher=replace(CONFIG, data=str(tmp_path / "pictures")),
        pretrained_teacher=str(teacher),
        pairs=pairs,
        stop_untrained=False,
    )
    plan = FullRunPlan(request={}, lengths={}, seconds={}, measured_on="")
    run_parts(config, plan, out, ("pairs",))
    prompts = PairReader(out / "pairs").prompts()
    assert len(prompts) == 16 and 4 <= sum("cone" in prompt for prompt in prompts) <= 12
    # The same command goes on, also with more pairs.
    more = replace(config, pairs=replace(pairs, num_pairs=48))
    run_parts(more, plan, out, ("pairs",))
    assert PairReader(out / "pairs").prompts()[:16] == prompts and len(PairReader(out / "pairs")) == 48


def test_measuring_a_plan_asks_no_gpu_but_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch would copy the random state of every GPU of the machine, and warn of it."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    with pytest.raises(UserError, match="nowhere"):
        measure_parts(replace(FULL_RUN_PRESETS["quick"], data=str(tmp_path / "nowhere")))


def test_a_damaged_plan_is_one_line(data: Path, tmp_path: Path) -> None:
    config = replace(FULL_RUN_PRESETS["quick"], pretrained_teacher="miniature")
    (tmp_path / "plan.json").write_text('{"request": {}, "lengths": {"pairs": "many"}, "seconds": {}}')
    with pytest.raises(
        UserError, match=r"plan\.json is damaged \(lengths\.pairs.*\); delete .*planned again$"
    ):
        plan_run(config, tmp_path)
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "plan.json").write_text("{}")
    with pytest.raises(UserError, match=r"plan\.json is damaged \(it has no 'lengths'\); delete"):
        plan_teacher(replace(CONFIG, data=str(data)), tmp_path, ("data", "vae"), Request(minutes=1))


def test_times_add_up_over_starts_and_interruptions(tmp_path: Path) -> None:
    for _ in range(2):
        times = PartTimes(tmp_path / "times.json")
        with pytest.raises(KeyboardInterrupt), times.measure("pairs"):
            raise KeyboardInterrupt
    first = PartTimes(tmp_path / "times.json").seconds["pairs"]
    with times.measure("pairs"):
        pass
    assert 0 < first < times.seconds["pairs"] and set(PartTimes().seconds) == set()


def test_the_plan_in_words() -> None:
    plan = FullRunPlan(
        request={},
        lengths={"pairs": 2_000, "ode": 600, "gan": 300, "eval": 10},
        seconds={"pairs": 0.06, "ode": 0.1, "gan": 0.2, "eval": 6.0},
        measured_on="here",
    )
    assert plan.minutes == pytest.approx({"pairs": 2.0, "ode": 1.0, "gan": 1.0, "eval": 1.0})
    assert plan.lines()[1:] == [
        "plan: then pairs 2,000 pairs (2.0 min), ode 600 images (1.0 min), gan 300 images (1.0 min), "
        "eval 10 images of each sampler (1.0 min)",
        "plan: about 5.0 minutes for the whole run (here)",
    ]
    assert sum(PART_SHARES.values()) == pytest.approx(1.0)
    assert set(FULL_RUN_PRESETS) == {"quick", "evening", "night"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "--data is not set"),
        ("--data none", "--data none: no such file or folder"),
        ("--data . --set pairs.num_pairs=5", "pairs.num_pairs has no effect: the minutes choose"),
        ("--data . --set teacher.unet.fit.images=5", "has no effect: the minutes choose the lengths"),
        ("--data . --set ode.teacher=x", "has no effect: options and earlier parts choose it"),
        ("--data . --teacher miniature --set teacher.size=5", "has no effect: --teacher is there already"),
        (
            "--data . --set ode.student_timestep=500",
            "ode.student_timestep is 500, and gan.student_timestep is -1",
        ),
        ("--data . --minutes -1", "minutes is -1.0; expected 0 or more"),
        ("--data . --processes 0", "--processes is 0; expected 1 or more"),
        ("--data . --processes 1 --parts pairs,gam", "unknown part 'gam'; did you mean 'gan'"),
        ("--data . --processes 1", "holds no images"),
    ],
)
def test_wrong_options_are_refused(
    options: str, message: str, d2g: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ended = d2g("run", *options.split())
    assert ended.code in (1, 2) and message in ended.error and not list(tmp_path.iterdir())
