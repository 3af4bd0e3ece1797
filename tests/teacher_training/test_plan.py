"""teacher_training.plan and the options of `d2g teacher train`: lengths, plan, resume, refusals."""

import json
import shlex
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from d2g.core.distributed import checkpoint
from d2g.core.errors import UserError
from jobs import Running, d2g_ranks, succeed
from own_pictures import CONFIG, class_folders, image_folder, parquet, train_arguments
from teacher_training.data import load_pictures, read_captions
from teacher_training.networks.registry import NETWORKS
from teacher_training.plan import (
    Request,
    TeacherPlan,
    WholeProgress,
    count_pictures,
    plan_teacher,
    save_request,
)
from teacher_training.train import stage_length, train_teacher

STAGES = NETWORKS["unet_text"].stages


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own") / "pictures"
    folder.mkdir()
    image_folder(folder)
    return folder


def lengths(config: Any) -> dict[str, int]:
    return {stage: stage_length(config, stage) for stage in STAGES[1:]}


def test_pictures_and_captions_are_counted(tmp_path: Path, data: Path) -> None:
    for write in (class_folders, parquet):
        (tmp_path / write.__name__).mkdir()
        write(tmp_path / write.__name__)
        assert count_pictures(replace(CONFIG, data=str(tmp_path / write.__name__)), STAGES) == (40, 40)
    assert count_pictures(replace(CONFIG, data=str(data), images=7), STAGES) == (7, 7)
    # One caption of three.
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes((data / f"{number:03d}.png").read_bytes())
    (tmp_path / "1.txt").write_text("a disc")
    shutil.rmtree(tmp_path / "class_folders")
    shutil.rmtree(tmp_path / "parquet")
    with pytest.raises(UserError, match="2 of 3 images have no caption"):
        count_pictures(replace(CONFIG, data=str(tmp_path)), STAGES)


@pytest.mark.parametrize(
    ("count", "caption", "message"),
    [
        (40, "a disc", "40 captions have no word that occurs in 1% to 90% of them"),
        (2, "a disc", r"it holds 2 picture\(s\), expected 3 or more"),
        (40, "", "40 of 40 images have no caption"),
    ],
)
def test_the_plan_refuses_pictures_that_the_training_refuses(
    count: int, caption: str, message: str, data: Path, tmp_path: Path
) -> None:
    """Without a decoded picture or a measured step, so also with --dry-run."""
    for number in range(count):
        shutil.copy(data / "000.png", tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text(caption)
    config = replace(CONFIG, data=str(tmp_path))
    with pytest.raises(UserError, match=message):
        plan_teacher(config, tmp_path / "out", STAGES, Request(images=64))
    with pytest.raises(UserError, match=message):
        train_teacher(config, tmp_path / "out")
    # Without LatentLPIPS and CLIP equal captions are no fault.
    if caption:
        _, plan = plan_teacher(config, tmp_path / "b", ("data", "vae", "unet"), Request(images=64))
        assert plan.captions == count


def test_captions_of_the_plan_are_those_of_the_training(tmp_path: Path) -> None:
    """In the same order, at most `images`, with a share for every class."""
    for write in (class_folders, parquet, image_folder):
        (tmp_path / write.__name__).mkdir()
        write(tmp_path / write.__name__)
        for images in (40, 7):
            config = replace(CONFIG, data=str(tmp_path / write.__name__), images=images)
            assert read_captions(config) == load_pictures(config).prompts


def test_a_number_of_images_scales_all_stages(data: Path, tmp_path: Path) -> None:
    config = replace(CONFIG, data=str(data))
    before = lengths(config)
    planned, plan = plan_teacher(config, tmp_path, STAGES, Request(images=256))
    assert lengths(planned) == {stage: 4 * count for stage, count in before.items()}
    assert plan.steps["unet"] == 16 and plan.pictures == plan.captions == 40 and plan.gib > 0
    assert set(plan.stage_minutes) == set(STAGES[1:]) and not list(tmp_path.iterdir())
    assert plan.lines()[0] == "plan: 40 pictures, 40 of them with a caption"


def test_minutes_become_lengths_that_fit_and_the_same_request_keeps_them(data: Path, tmp_path: Path) -> None:
    config = replace(CONFIG, data=str(data))
    request = Request(minutes=2.0)
    planned, plan = plan_teacher(config, tmp_path, STAGES, request)
    assert plan.minutes == pytest.approx(2.0, abs=0.1)
    assert plan.stage_minutes["unet"] == pytest.approx(1.1, abs=0.05)
    # The speed differs the next time; the lengths of the same request do not.
    save_request(tmp_path, planned, request, STAGES)
    again, _ = plan_teacher(config, tmp_path, STAGES, request)
    assert lengths(again) == lengths(planned)
    longer, _ = plan_teacher(config, tmp_path, STAGES, Request(minutes=20.0))
    assert stage_length(longer, "unet") > 4 * stage_length(planned, "unet")
    # Without a request the settings' own lengths hold.
    assert lengths(plan_teacher(config, tmp_path, ("unet",), Request())[0]) == lengths(config)


def test_stages_that_were_left_out_get_their_lengths_when_they_are_added(data: Path, tmp_path: Path) -> None:
    """By the same request, as in the command that finishes a teacher."""
    config = replace(CONFIG, data=str(data))
    request, first = Request(images=256), ("data", "vae")
    planned, _ = plan_teacher(config, tmp_path, first, request)
    save_request(tmp_path, planned, request, first)
    every, _ = plan_teacher(config, tmp_path, STAGES, request)
    assert lengths(every) == {stage: 4 * count for stage, count in lengths(config).items()}
    save_request(tmp_path, every, request, STAGES)
    assert lengths(plan_teacher(config, tmp_path, STAGES, request)[0]) == lengths(every)


def test_a_length_below_that_of_a_checkpoint_is_refused(data: Path, tmp_path: Path) -> None:
    config = replace(CONFIG, data=str(data))
    checkpoint.save(tmp_path / "training/unet/checkpoints", 320, {"unet": {"w": torch.ones(1)}}, {}, {})
    message = "stage unet in .* has trained on 320 images, the settings ask for 64; give 320 or more"
    with pytest.raises(UserError, match=message):
        plan_teacher(config, tmp_path, STAGES, Request(images=64))
    # The last step may go beyond the length by less than a batch.
    for images in (310, 320, 640):
        plan_teacher(config, tmp_path, STAGES, Request(images=images))


def test_one_time_left_for_all_stages() -> None:
    """Progress is in planned seconds: a stage that is faster than another counts less per image."""
    plan = TeacherPlan(
        pictures=1,
        captions=1,
        images={"vae": 100, "unet": 100},
        steps={},
        stage_minutes={"vae": 1.0, "unet": 3.0},
        minutes=4.0,
        gib=0.0,
        measured_on="",
    )
    calls: list[tuple[str, int, int]] = []
    progress = WholeProgress(plan, lambda *call: calls.append(call))
    for label, done in (("vae", 0), ("vae", 50), ("vae", 100), ("unet", 40), ("unet", 70), ("unet", 100)):
        progress(label, done, 100)
    whole = [call[1:] for call in calls if call[0] == "teacher, planned seconds"]
    # The UNet was resumed at 40 of 100 images: its planned seconds are for the rest.
    assert whole == [(0, 240), (30, 240), (60, 240), (60, 240), (150, 240), (240, 240)]
    assert [call for call in calls if call[0] in ("vae", "unet")] == [("vae", 100, 100), ("unet", 100, 100)]


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of `d2g teacher train --images 64`."""
    from jobs import d2g as run

    folder = tmp_path_factory.mktemp("trained")
    ended = run([*train_arguments(data, folder / "teacher", "--images", "64"), "--json"], folder / "log")
    result = ended.json
    assert result["plan"]["steps"] == {"vae": 1, "unet": 4}  # 70,000 to 500,000 images in the preset
    assert "plan: 40 pictures, 40 of them with a caption" in ended.stderr
    assert "minutes in all (measured by 2 steps of each stage on 1 CPU threads)" in ended.stderr
    assert result["trained"] is False and result["verdict"].startswith("this teacher is not trained")
    return folder / "teacher"


def test_the_same_command_finds_everything_finished(trained: Path, data: Path, d2g: Any) -> None:
    ended = d2g(*train_arguments(data, trained, "--images", "64"), "--json")
    assert ended.json["plan"]["steps"] == {} and "all stages are finished" in ended.stderr
    command = (trained / "training" / "command.txt").read_text()
    assert command.startswith(
        f"d2g teacher train --preset scenes --data {data} --images 64 --stages data,vae,unet --set "
    )
    assert command.rstrip().endswith(f"--out {trained}")


def test_a_finished_stage_with_other_settings_is_refused(trained: Path, data: Path, d2g: Any) -> None:
    arguments = train_arguments(data, trained, "--images", "64")
    for name, value in (("vae.kl_weight", "0.5"), ("unet.fit.lr", "0.1"), ("unet.caption_dropout", "0.3")):
        error = d2g(*arguments, "--set", f"{name}={value}").error
        assert f"holds a run with another config: {name.partition('.')[2]} (" in error, error
    error = d2g(*arguments, "--set", "size=32").error
    assert "holds a run with another config: size (16 -> 32)" in error


def test_a_longer_training_goes_on_and_a_shorter_one_is_refused(
    trained: Path, data: Path, tmp_path: Path, d2g: Any
) -> None:
    import shutil

    out = shutil.copytree(trained, tmp_path / "teacher")
    error = d2g(*train_arguments(data, out, "--images", "32")).error
    assert "stage unet" in error and "is finished with 64 images, the settings ask for 32" in error
    vae = (out / "vae" / "diffusion_pytorch_model.safetensors").read_bytes()
    ended = d2g(*train_arguments(data, out, "--images", "128"), "--json")
    assert ended.json["plan"]["images"] == {"unet": 64}, "the VAE stays, the U-Net goes on"
    assert "finished stages keep their length: vae" in ended.stderr
    first = json.loads((trained / "training/unet/scores.json").read_text())["seconds"]
    assert ended.json["scores"]["unet"]["seconds"] > first, "the time of both starts"
    assert (out / "vae" / "diffusion_pytorch_model.safetensors").read_bytes() == vae
    lines = [json.loads(line) for line in (out / "training/unet/stats.jsonl").read_text().splitlines()]
    counts = [line["nimg"] for line in lines if "loss/mse" in line]
    assert counts == [16, 32, 48, 64, 80, 96, 112, 128]


def test_an_interrupted_training_says_how_to_finish(data: Path, tmp_path: Path, d2g: Any) -> None:
    out = tmp_path / "teacher"
    assert d2g(*train_arguments(data, out, "--images", "64", stages="data,vae")).code == 0
    prompts, written = ("--prompts", data), ("--out", tmp_path / "none")
    for command in (
        ("teacher", "info", out),
        ("pairs", "generate", "--teacher", out, *prompts, *written),
        ("eval", "run", "--teacher", out, *prompts, *written),
        ("distill", "ode", "--teacher", out, "--pairs", tmp_path, *written),
        ("run", "--teacher", out, "--data", data, *written),
    ):
        error = d2g(*command).error
        assert (
            f"its training is not finished; finish it with `d2g teacher train --preset scenes --data {data}"
            in error
        ), command
    assert not (tmp_path / "none").exists()


@pytest.mark.long
@pytest.mark.slow
def test_ctrl_c_is_resumed_by_the_command_that_the_refusal_names(
    data: Path, tmp_path: Path, d2g: Any
) -> None:
    out = tmp_path / "teacher"
    running = Running(train_arguments(data, out, "--images", "1600"), tmp_path / "log")
    running.wait_for(lambda: (out / "training" / "unet" / "stats.jsonl").is_file())
    running.send(signal.SIGINT)
    ended = running.wait()
    assert ended.code == 130 and "unet stopped; safe on disk: " in ended.error
    # Every command that needs a teacher names the command that finishes it; run that one.
    error = d2g("sample", "--teacher", out, "--prompt", "a", "--out", tmp_path / "samples").error
    words = shlex.split(error.partition("finish it with `")[2].rstrip("`"))
    assert words[:3] == ["d2g", "teacher", "train"] and not (tmp_path / "samples").exists()
    result = d2g(*words[1:], "--json").json
    assert set(result["scores"]) == {"vae", "unet"}
    assert 0 < result["plan"]["images"]["unet"] < 1600 and result["scores"]["unet"]["length"] == 1600
    assert d2g("teacher", "info", out).code == 0


def test_a_dry_run_shows_the_plan_and_checks_the_data(data: Path, tmp_path: Path, d2g: Any) -> None:
    out = tmp_path / "teacher"
    ended = d2g(*train_arguments(data, out, "--minutes", "1"), "--dry-run", "--json")
    plan = ended.json["plan"]
    assert f"plan: {plan['pictures']} pictures, {plan['captions']} of them with a caption" in ended.stderr
    assert plan["minutes"] == pytest.approx(1, abs=0.1) and not out.exists()
    error = d2g(*train_arguments(tmp_path / "none", out), "--dry-run").error
    assert "none: no such file or folder" in error and not out.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--minutes 1 --images 64", "give --minutes or --images, not both"),
        (
            "--images 64 --set unet.fit.images=5",
            "--set unet.fit.images has no effect: the minutes or --images",
        ),
        ("--init miniature --set unet.channels=[8,8]", "--set unet.channels has no effect: --init brings"),
        ("--vae x --set vae.channels=[8,8]", "--set vae.channels has no effect: the autoencoder is used"),
        ("--preset quick --set clip.images=5", "--set clip.images has no effect: the minutes or --images"),
    ],
)
def test_options_without_effect_are_refused(options: str, message: str, d2g: Any, tmp_path: Path) -> None:
    ended = d2g("teacher", "train", "--out", tmp_path / "t", *options.split())
    assert ended.code == 2 and message in ended.error and not list(tmp_path.iterdir())


def test_a_folder_without_a_preset_is_quick(tmp_path: Path, d2g: Any) -> None:
    ended = d2g("teacher", "train", "--data", tmp_path / "none", "--dry-run")
    assert "no --preset: quick, about 15 minutes" in ended.stderr and "no such file" in ended.error


@pytest.mark.long
@pytest.mark.slow
def test_two_processes_train_one_teacher(data: Path, tmp_path: Path) -> None:
    """The lengths that rank 0 measures are those of all ranks, and rank 0 alone writes the results."""
    out = tmp_path / "teacher"
    arguments = train_arguments(data, out, "--minutes", "0.02", stages="data,vae,unet,lpips")
    ranks = d2g_ranks([*arguments, "--json"], tmp_path / "log")
    succeed(*ranks)
    result = ranks[0].json
    assert ranks[1].stdout == "" and result["trained"] is False and (out / "report.html").is_file()
    plan = json.loads((out / "training" / "plan.json").read_text())
    assert result["scores"]["unet"]["length"] == plan["lengths"]["unet.fit.images"]
    assert result["scores"]["lpips"]["two_afc"] > 0, "rank 0 trains this stage, and the others wait"
