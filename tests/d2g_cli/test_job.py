"""Every command on one tiny job, and the documented keys of its JSON output."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import tiny
from d2g_cli import main as cli
from eval.report.numbers import format_value
from jobs import distill_arguments, distill_config, make_clip


@pytest.fixture(scope="module")
def job(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with prompts.txt, pairs/, ode/ and gan/, written by the command line."""
    folder = tmp_path_factory.mktemp("job")
    tiny.save_prompts(folder / "prompts.txt")
    for args in (
        pair_arguments(teacher, folder),
        *(stage_arguments(s, teacher, folder) for s in ("ode", "gan")),
    ):
        with pytest.raises(SystemExit) as exit_info:
            cli.main(args)
        assert exit_info.value.code == 0, args
    return folder


def pair_arguments(teacher: Path, folder: Path) -> list[str]:
    options = ["--teacher", teacher, "--prompts", folder / "prompts.txt", "--out", folder / "pairs"]
    options += ["--num-pairs", 12, "--steps", 4, "--guidance", 3, "--solver", "ddim", "--dtype", "float32"]
    options += ["--shard-size", 5, "--batch-size", 4]
    return ["pairs", "generate", *map(str, options)]


def stage_arguments(stage: str, teacher: Path, folder: Path) -> list[str]:
    init = folder / "ode" if stage == "gan" else ""
    config = distill_config(teacher, folder / "pairs", stage=stage, init=init)
    return distill_arguments(config, folder / stage)


def test_generating_again_adds_no_pairs(d2g: Any, job: Path, teacher: Path) -> None:
    summary = d2g(*pair_arguments(teacher, job), "--json").json
    assert {"out", "pairs", "new_pairs", "shards", "seconds", "pairs_per_sec"} <= set(summary)
    assert (summary["pairs"], summary["new_pairs"], summary["shards"]) == (12, 0, 3)


def test_pairs_info_verify_and_repair(d2g: Any, job: Path) -> None:
    info = d2g("pairs", "info", job / "pairs", "--json").json
    assert {"pairs", "shards", "spec", "complete", "gib"} <= set(info)
    assert info["complete"] is True and info["spec"]["guidance"] == 3.0
    verified = d2g("pairs", "verify", job / "pairs", "--resimulate", 3, "--json").json
    assert {"ok", "checked", "bad_shards", "max_abs_err"} <= set(verified)
    assert verified["ok"] is True and verified["checked"] == 12 and verified["max_abs_err"] < 1e-4
    assert d2g("pairs", "repair", job / "pairs", "--json").json == {"quarantined": [], "regenerated": 0}


def test_pairs_plan(d2g: Any, job: Path, teacher: Path) -> None:
    options = ["--teacher", teacher, "--prompts", job / "prompts.txt", "--num-pairs", 2**20, "--steps", 4]
    # tests/pairgen/test_generate.py tests how precision and compilation are chosen.
    settings = [part for name in ("precision=fp32", "compile=false") for part in ("--set", name)]
    plan = d2g("pairs", "plan", *options, *settings, "--batch-size", 2, "--json").json
    keys = {"pairs", "gib", "gib_with_noise", "shards", "seconds_per_pair", "gpu_hours", "measured_on"}
    assert keys <= set(plan) and plan["pairs"] == 2**20 and plan["gib"] == 0.125


@pytest.mark.parametrize("stage", ["ode", "gan"])
def test_distilling_again_trains_no_steps(d2g: Any, job: Path, teacher: Path, stage: str) -> None:
    summary = d2g(*stage_arguments(stage, teacher, job), "--json").json
    assert {"out", "images", "steps", "seconds", "images_per_sec", "loss", "checkpoint"} <= set(summary)
    assert (summary["images"], summary["steps"]) == (20, 5) and Path(summary["checkpoint"]).is_dir()
    expected = {"g", "e_latent_lpips"} | ({"d", "g_gan"} if stage == "gan" else set())
    assert expected <= set(summary["loss"])


def test_distill_resumes_with_more_images(d2g: Any, job: Path, teacher: Path) -> None:
    args = distill_arguments(distill_config(teacher, job / "pairs"), job / "more", "train.images=8")
    assert d2g(*args, "--json").json["steps"] == 2
    assert d2g(*args, "--images", 99, "--set", "train.images=12", "--json").json["steps"] == 3


def test_sample(d2g: Any, job: Path, tmp_path: Path) -> None:
    args = ["--prompt", "a red cube", "--prompt", "a blue sphere", "--num", 2, "--seed", 3]
    summary = d2g(
        "sample", "--student", job / "gan", *args, "--batch-size", 3, "--out", tmp_path, "--json"
    ).json
    assert {"out", "images", "seconds_per_image"} <= set(summary) and summary["images"] == 4
    with Image.open(tmp_path / "00003.png") as image:
        assert image.info == {"prompt": "a blue sphere", "seed": "3", "index": "3"}
    args = ["--prompts", job / "prompts.txt", "--out", tmp_path]
    assert d2g("sample", "--student", job / "ode", *args, "--json").json["images"] == 6


def test_teacher_info_and_doctor(d2g: Any, teacher: Path) -> None:
    info = d2g("teacher", "info", teacher, "--json").json
    keys = {"pipeline", "prediction_type", "latent_shape", "params", "solver_defaults", "conditioning"}
    assert keys <= set(info)
    assert info["latent_shape"] == [4, 4, 4]
    doctor = d2g("doctor", "--json").json
    keys = {"torch", "cuda", "devices", "bf16", "memory_gib", "disk_free_gib", "versions", "problems"}
    assert keys <= set(doctor)
    assert doctor["torch"] == torch.__version__ and doctor["memory_gib"] > 0


def test_doctor_reports_a_batch_too_small_for_the_gpus(d2g: Any) -> None:
    report = d2g("doctor", "--preset", "miniature", "--gpus", "32", "--json").json
    (problem,) = [text for text in report["problems"] if text.startswith("miniature")]
    assert problem.startswith("miniature gan: gan.mix_fraction is 0.25, but a micro-batch has 1 row")
    assert set(report["memory_gib_per_gpu"]) == {"ode"}


def test_doctor_computes_the_memory_of_a_preset(d2g: Any, tmp_path: Path) -> None:
    args = ["--preset", "miniature-loss-mse", "--teacher", "miniature", "--gpus", "2"]
    assert set(d2g("doctor", *args, "--json").json["memory_gib_per_gpu"]) == {"ode"}
    for absent in (tmp_path / "none", "org/name"):
        result = d2g("doctor", "--preset", "sd15-cfg8", "--teacher", absent)
        assert result.code == 1 and result.stdout == "" and len(result.stderr.splitlines()) == 1
        assert result.stderr.startswith(f"error: --teacher {absent}: no such folder; ")


# `d2g eval`.


@pytest.fixture(scope="module")
def images_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images_folder")
    rng = torch.Generator().manual_seed(0)
    for number in range(10):
        pixels = torch.randint(256, (16, 16, 3), generator=rng, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{number}.png")
    lines = [json.dumps({"file_name": f"{n}.png", "caption": tiny.CAPTIONS[n % 6]}) for n in range(10)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def squeezenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from torchvision.models import squeezenet1_0

    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("weights") / "squeezenet.safetensors"
    save_file(squeezenet1_0(weights=None).state_dict(), file)
    return file


@pytest.fixture(scope="module")
def clip(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clip(teacher, tmp_path_factory.mktemp("clip"))


KEYS = {"protocol", "protocol_sha256", "fid", "clip_score", "precision", "recall", "counts", "models", "ci"}


def test_eval_of_images_with_squeezenet(d2g: Any, images_folder: Path, squeezenet: Path) -> None:
    args = [
        "--images",
        images_folder,
        "--reference",
        images_folder,
        "--features",
        "squeezenet",
        "--metrics",
        "pr",
    ]
    result = d2g("eval", "run", *args, "--weights", squeezenet, "--json").json
    assert KEYS <= set(result) and result["models"]["features"]["name"] == "squeezenet"
    assert (result["precision"], result["recall"], result["counts"]["images"]) == (1.0, 1.0, 10)


def test_eval_of_a_student_and_its_comparison(
    d2g: Any, job: Path, images_folder: Path, clip: Path, tmp_path: Path
) -> None:
    """FID, CLIP score, precision and recall of one-step images, all with one tiny CLIP."""
    args = ["--prompts", job / "prompts.txt", "--num", 8, "--reference", images_folder]
    args += ["--metrics", "fid,pr,clip", "--features", "clip", "--weights", clip, "--clip", clip]
    numbers = {}
    for stage in ("ode", "gan"):
        out = tmp_path / f"{stage}.json"
        numbers[stage] = d2g("eval", "run", "--student", job / stage, *args, "--out", out, "--json").json
        assert KEYS <= set(numbers[stage]) and numbers[stage] == json.loads(out.read_text())
        assert numbers[stage]["fid"] > 0 and -1 <= numbers[stage]["clip_score"] <= 1
        assert numbers[stage]["counts"] == {"images": 8, "reference": 10, "pr_images": 8, "pr_reference": 10}
    rows = d2g("eval", "compare", tmp_path / "ode.json", tmp_path / "gan.json", "--json").json["results"]
    assert {Path(row["name"]).stem: row["fid"] for row in rows} == {s: numbers[s]["fid"] for s in numbers}
    output = d2g("eval", "compare", tmp_path / "ode.json", tmp_path / "gan.json").stdout
    for stage in numbers:
        assert format_value(numbers[stage]["fid"], numbers[stage]["ci"]["fid"])[0] in output, stage
    assert "CLIP score" in output and "{" not in output


def test_eval_of_a_teacher(d2g: Any, job: Path, teacher: Path, clip: Path) -> None:
    args = ["--prompts", job / "prompts.txt", "--num", 4, "--steps", 2, "--metrics", "clip", "--clip", clip]
    result = d2g("eval", "run", "--teacher", teacher, *args, "--json").json
    assert result["clip_score"] is not None and result["fid"] is None and result["counts"] == {"images": 4}


def test_eval_stats_from_a_folder_and_a_curve_with_them(
    d2g: Any, job: Path, teacher: Path, images_folder: Path, clip: Path, tmp_path: Path
) -> None:
    networks = ["--features", "clip", "--weights", clip, "--json"]
    file = tmp_path / "real.safetensors"
    summary = d2g(
        "eval", "stats", "--images", images_folder, "--metrics", "fid,pr", "--out", file, *networks
    ).json
    assert summary["images"] == 10 and summary["out"] == str(file)
    args = ["--teacher", teacher, "--prompts", job / "prompts.txt", "--num", 8, "--reference", file]
    args += ["--over", "steps=1,2", "--clip", clip, "--out", tmp_path / "curve", "--set", "resamples=0"]
    curve = d2g("eval", "curve", *args, *networks).json
    assert [point["steps"] for point in curve["points"]] == [1, 2]
    assert {"fid", "clip_score"} <= set(curve["points"][0]) and (tmp_path / "curve" / "curve.png").is_file()
    output = d2g("eval", "curve", *args, *networks[:-1]).stdout
    assert f"{curve['points'][1]['fid']:.4g}" in output and "CLIP score" in output and "{" not in output


def test_eval_protocols(d2g: Any) -> None:
    result = d2g("eval", "protocols")
    assert result.code == 0 and "coco2014-30k-d2gan" in result.stdout and "40,504" in result.stdout
    one = d2g("eval", "protocols", "scenes-5k", "--json").json
    assert one["images"] == 5_000 and len(one["sha256"]) == 64
    assert set(d2g("eval", "protocols", "--json").json) > {"folder", "cifar10-50k"}


def test_eval_without_json_prints_a_table(d2g: Any, job: Path, clip: Path) -> None:
    args = ["--student", job / "gan", "--prompts", job / "prompts.txt", "--metrics", "clip", "--clip", clip]
    result = d2g("eval", "run", *args, "--latency", "--set", "latency_repeats=1")
    assert result.code == 0 and "CLIP score" in result.stdout and "6 images" in result.stdout, result.stderr
    for text in ("student, an image", "teacher, an image", "ms at batch 1"):
        assert text in result.stdout


def test_lpips_distance(d2g: Any, teacher: Path, images_folder: Path) -> None:
    def distance(a: str, b: str) -> float:
        args = [images_folder / a, images_folder / b, "--teacher", teacher, "--json"]
        return float(d2g("lpips", "distance", *args).json["distance"])

    assert distance("0.png", "0.png") == 0.0 and distance("0.png", "1.png") > 0
