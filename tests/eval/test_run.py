"""eval.runner.run, session and curves: evaluations of tiny models, resuming, several processes, curves."""

import json
import os
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import tiny
import tiny_teachers
from d2g.core.config import digest
from d2g.core.errors import SettingError, UserError
from d2g.vision.transformers_vision import clip_sha256
from distill.config.student import StudentConfig
from distill.export.export import export_student
from distill.saved_samples import save_samples
from distill.student_files import guiding_clip
from eval.measure.reference import Reference
from eval.measure.rows import MeasuredRows, save_part
from eval.networks.registry import load_clip
from eval.protocols.config import CurveRun, EvalRun
from eval.protocols.protocol import PROTOCOLS
from eval.result import EvalResult
from eval.runner.curves import run_at, run_curve, run_every
from eval.runner.run import compare_results, run_evaluation, save_statistics
from eval.runner.samplers import SamplingRequest, student_source
from eval.runner.session import EvalSession, read_list
from eval_jobs import config
from exported import save_run
from jobs import d2g, d2g_ranks, succeed


def arguments(job: Path, teacher: Path, **options: Any) -> list[str]:
    """The command line equivalent to `config(job)`."""
    run = config(job)
    options_by_name: dict[str, Any] = {"teacher": teacher, "prompts": run.prompts, "num": 12, "steps": 2}
    options_by_name |= {
        "reference": run.reference,
        "metrics": "fid,pr,clip",
        "features": "clip",
        "clip": run.clip,
    }
    options_by_name |= {"weights": run.weights[0], "batch-size": 4, **options}
    flags = [str(part) for name, value in options_by_name.items() for part in (f"--{name}", value)]
    return ["eval", "run", *flags, "--set", "part=4", "--set", "resamples=10", "--json"]


NUMBERS = ("fid", "clip_score", "precision", "recall", "ci", "counts", "protocol_sha256", "models", "source")


def numbers(result: dict[str, Any]) -> dict[str, Any]:
    return {name: result[name] for name in NUMBERS}


def assert_close(a: dict[str, Any], b: dict[str, Any]) -> None:
    for name in ("fid", "clip_score"):
        assert a[name] == pytest.approx(b[name], rel=1e-9), name
    for name in ("precision", "recall", "counts", "protocol_sha256", "models"):
        assert a[name] == b[name], name


def test_the_files_of_an_out_folder(job: Path, tmp_path: Path) -> None:
    result = run_evaluation(config(job, student=str(job / "run"), out=str(tmp_path / "out")))
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {"result.json", "report.html", "rows.safetensors", "work"}
    assert EvalResult.load(out).to_json() == result
    scores = load_file(out / "rows.safetensors")
    assert set(scores) == {"clip_score"} and scores["clip_score"].mean().item() == pytest.approx(
        result["clip_score"]
    )
    assert (out / "work" / "parts" / "00000000-00000004.safetensors").is_file()
    page = (out / "report.html").read_text()
    assert result["protocol_sha256"] in page and tiny.CAPTIONS[0] in page
    single = tmp_path / "one.json"
    again = run_evaluation(config(job, student=str(job / "run"), out=str(single)))
    assert json.loads(single.read_text()) == again == result and len(list(tmp_path.iterdir())) == 2


def test_a_killed_run_resumes_to_the_same_numbers(
    job: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL when one part is written, again when two are written; the third start finishes."""
    uninterrupted = d2g(arguments(job, teacher), tmp_path / "uninterrupted").json
    out = tmp_path / "out"

    def save_and_die(path: Path, part: MeasuredRows) -> None:
        save_part(path, part)
        os.kill(os.getpid(), signal.SIGKILL)

    for parts in (1, 2):
        with monkeypatch.context() as patch:
            patch.setattr("eval.measure.measure.save_part", save_and_die)
            killed = d2g(arguments(job, teacher, out=out), tmp_path / f"killed{parts}")
        assert killed.code == -signal.SIGKILL and not (out / "result.json").exists()
        assert len(list((out / "work" / "parts").glob("0*"))) == parts
    ended = d2g(arguments(job, teacher, out=out), tmp_path / "end")
    assert ended.code == 0, ended.stderr
    assert numbers(ended.json) == numbers(uninterrupted), "bit for bit"
    other = d2g(arguments(job, teacher, out=out, steps=3), tmp_path / "other")
    assert other.code == 1 and "holds parts of another evaluation: source.steps (2 -> 3)" in other.error


def test_unequal_sides_of_precision_and_recall_are_noted(job: Path, teacher: Path) -> None:
    """Both depend on the numbers of images."""
    few = run_evaluation(config(job, teacher=str(teacher), num=8))
    assert few["counts"]["pr_images"] == 8 < few["counts"]["pr_reference"]
    assert any("compare 8 generated with" in note for note in few["notes"])
    count = few["counts"]["pr_reference"]
    equal = run_evaluation(config(job, teacher=str(teacher), num=count))
    assert not any("generated with" in note for note in equal["notes"])


@pytest.mark.parametrize("ranks", [2, 3])
def test_several_processes_give_the_same_result_and_rank_0_prints_it(
    job: Path, teacher: Path, tmp_path: Path, ranks: int
) -> None:
    """Each process also measures its share of the reference and of the training images."""
    single = d2g(arguments(job, teacher), tmp_path / "single").json
    cache = {"D2G_CACHE": str(tmp_path / "cache")}
    options = arguments(job, teacher, out=tmp_path / "out", train=job / "photographs")
    ended = d2g_ranks(options, tmp_path / "ranks", ranks, cache)
    succeed(*ended)
    assert [bool(one.stdout) for one in ended] == [True] + [False] * (ranks - 1)
    assert_close(ended[0].json, single)
    assert json.loads((tmp_path / "out" / "result.json").read_text())["fid"] == ended[0].json["fid"]
    assert "Nearest training images" in (tmp_path / "out" / "report.html").read_text()


def test_saved_images_give_the_same_numbers(job: Path, teacher: Path, tmp_path: Path) -> None:
    sampled = run_evaluation(config(job, teacher=str(teacher), keep=str(tmp_path / "drawn")))
    assert len(list((tmp_path / "drawn").glob("*.png"))) == 12
    with pytest.raises(UserError, match=r"drawn holds images of another evaluation: source\.steps"):
        run_evaluation(config(job, teacher=str(teacher), steps=3, keep=str(tmp_path / "drawn")))
    read = run_evaluation(config(job, images=str(tmp_path / "drawn"), prompts=None, num=0))
    assert {k: read[k] for k in ("fid", "clip_score", "protocol_sha256")} == {
        k: sampled[k] for k in ("fid", "clip_score", "protocol_sha256")
    }
    # A part of a folder is noted: its first images may be of one class.
    part = config(job, images=str(tmp_path / "drawn"), prompts=None, num=8, metrics=("clip",), reference=None)
    note = f"measured the first 8 of 12 images of {tmp_path / 'drawn'}"
    assert note in run_evaluation(part)["notes"] and not any("the first" in text for text in read["notes"])
    reread = run_evaluation(
        config(job, images=str(tmp_path / "drawn"), num=0, prompts=str(twelve_prompts(job, tmp_path)))
    )
    assert reread["clip_score"] == sampled["clip_score"]


def twelve_prompts(job: Path, folder: Path) -> Path:
    prompts = read_list(job / "prompts.txt")
    (folder / "twelve.txt").write_text("\n".join(prompts[i % len(prompts)] for i in range(12)))
    return folder / "twelve.txt"


def test_paired_distances_of_student_and_teacher(job: Path, teacher: Path, tmp_path: Path) -> None:
    """The distances are the same to images that the teacher samples and to images that it saved."""
    metrics = ("psnr", "latent_lpips")
    run = config(job, student=str(job / "run"), metrics=metrics, reference=None, steps=3, guidance=2.0)
    sampled = run_evaluation(replace(run, out=str(tmp_path / "out")))
    assert 0 < sampled["extra"]["psnr"] < 60 and sampled["extra"]["latent_lpips"] > 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count('<section id="beside"') == 1 and '<th scope="col">teacher</th>' in page
    keep = config(
        job,
        teacher=str(teacher),
        metrics=("clip",),
        reference=None,
        keep=str(tmp_path / "drawn"),
        steps=3,
        guidance=2.0,
    )
    run_evaluation(keep)
    reread = run_evaluation(replace(run, against=str(tmp_path / "drawn"), out=str(tmp_path / "again")))
    assert reread["extra"] == pytest.approx(sampled["extra"], rel=1e-6)
    assert '<th scope="col">drawn</th>' in (tmp_path / "again" / "report.html").read_text()
    itself = run_evaluation(
        config(
            job,
            teacher=str(teacher),
            metrics=("psnr",),
            reference=None,
            steps=3,
            guidance=2.0,
            against=str(teacher),
            out=str(tmp_path / "itself"),
        )
    )
    assert itself["extra"]["psnr"] > 70, "the teacher compared with itself"
    assert '<th scope="col">beside</th>' in (tmp_path / "itself" / "report.html").read_text()
    with pytest.raises(SettingError, match="there is nothing to compare image by image; give --against"):
        run_evaluation(config(job, teacher=str(teacher), metrics=("psnr",), reference=None))
    # Images of other noise do not pair, whichever command wrote them.
    for folder in (tmp_path / "drawn", tmp_path / "samples"):
        if folder.name == "samples":
            save_samples(str(job / "run"), read_list(twelve_prompts(job, tmp_path)), folder, 1000, 4)
        with pytest.raises(
            UserError, match=f"{folder} holds images of seed 1000.*of seed 5.*give --seed 1000"
        ):
            run_evaluation(replace(run, seed=5, against=str(folder)))
    (tmp_path / "drawn" / "00000011.png").unlink()
    with pytest.raises(UserError, match=r"gives 12 images, but .* holds 11 to compare with; give as many"):
        run_evaluation(replace(run, against=str(tmp_path / "drawn")))
    # Without an image in the middle, those after it would pair with others.
    (tmp_path / "drawn" / "00000004.png").unlink()
    drawn = str(tmp_path / "drawn")
    read = config(job, images=drawn, prompts=None, num=0, metrics=("psnr",), reference=None, against=drawn)
    for gap in (replace(run, against=drawn), read):
        with pytest.raises(UserError, match=r"drawn lacks image 4: 00000005\.png is in its place"):
            run_evaluation(gap)


def test_numbered_images_of_others_pair_in_the_order_of_their_numbers(job: Path, tmp_path: Path) -> None:
    for number in range(12):
        Image.new("RGB", (16, 16)).save(tmp_path / f"{number}.png")
    run = config(job, student=str(job / "run"), metrics=("psnr",), reference=None, against=str(tmp_path))
    with pytest.raises(UserError, match=r"11\.png comes before 2\.png.*write the numbers with leading zeros"):
        run_evaluation(run)


def test_latency_of_student_and_teacher(job: Path) -> None:
    run = config(job, student=str(job / "run"), metrics=("clip",), reference=None, latency=True)
    latency = run_evaluation(replace(run, latency_repeats=1))["latency"]
    assert set(latency["models"]) == {"student", "teacher"} and latency["teacher_over_student"]["batch_1"] > 0
    for model in latency["models"].values():
        assert set(model["batch_1"]["parts_ms"]) == {"text", "network", "decoder"} and model["best"]["ms"] > 0
    with pytest.raises(SettingError, match="--latency times a sampler; images are already drawn"):
        run_evaluation(
            config(job, images=str(job / "photographs"), prompts=None, num=0, metrics=("fid",), latency=True)
        )


def test_the_report_shows_the_nearest_training_images(job: Path, tmp_path: Path) -> None:
    run = config(job, student=str(job / "run"), out=str(tmp_path / "out"), train=str(job / "photographs"))
    run_evaluation(run)
    assert "Nearest training images" in (tmp_path / "out" / "report.html").read_text()
    with pytest.raises(SettingError, match="--train looks for neighbors in the protocol's features; add fid"):
        run_evaluation(replace(run, metrics=("clip",), out=str(tmp_path / "other")))


@pytest.mark.slow
def test_a_curve_over_a_setting(job: Path, teacher: Path, tmp_path: Path) -> None:
    run = config(job, teacher=str(teacher), metrics=("fid", "clip"), out=str(tmp_path / "curve"))
    curve = run_curve(CurveRun(run=run, setting="guidance", values=(1.0, 3.0)))
    assert [point["guidance"] for point in curve["points"]] == [1.0, 3.0]
    for point in curve["points"]:
        single = run_evaluation(
            config(job, teacher=str(teacher), metrics=("fid", "clip"), guidance=point["guidance"])
        )
        assert point["fid"] == pytest.approx(single["fid"]) and point["clip_score"] == pytest.approx(
            single["clip_score"]
        )
    out = tmp_path / "curve"
    assert json.loads((out / "curve.json").read_text()) == curve
    with Image.open(out / "curve.png") as image:
        assert image.width > 600 and len(image.convert("L").getcolors(256) or []) > 20
    page = (out / "report.html").read_text()
    assert "FID over CLIP score" in page and page.count("<svg") >= 1
    assert sorted(path.name for path in (out / "work").iterdir()) == ["guidance-1", "guidance-3"]
    assert run_curve(CurveRun(run=run, setting="guidance", values=(1.0, 3.0))) == curve, (
        "from the saved parts"
    )


def test_a_student_imitates_the_guidance_scale_that_is_given(
    job: Path, teacher: Path, tmp_path: Path
) -> None:
    guided = save_run(tmp_path / "guided", str(teacher), StudentConfig(guidance_conditioning=True))
    at_8, explicit, at_2 = (
        run_evaluation(config(job, student=guided, metrics=("fid",), guidance=scale))
        for scale in (None, 8.0, 2.0)
    )
    assert at_8["fid"] == explicit["fid"] != at_2["fid"]
    assert [result["source"]["guidance"] for result in (at_8, at_2)] == [8.0, 2.0]
    parts = student_source(guided, SamplingRequest(prompts=["a"])).parts
    assert parts is not None and parts(2)["network"]() is not None, "for --latency"
    # A student without such an input draws the same at any scale, also in a curve beside its teacher.
    beside = config(job, student=str(job / "run"), metrics=("fid", "clip", "psnr"), out=str(tmp_path / "c"))
    with pytest.raises(SettingError, match=r"guidance is 1, but student .* has its guidance in its weights"):
        run_curve(CurveRun(run=beside, setting="guidance", values=(1.0, 2.0)))
    with pytest.raises(SettingError, match=r"guidance is 2, but student .* has its guidance in its weights"):
        run_evaluation(config(job, student=str(job / "run"), metrics=("fid",), guidance=2.0))


def test_a_student_is_compared_with_its_teacher_at_the_scale_of_its_pairs(job: Path, tmp_path: Path) -> None:
    """Another scale is another image: the result says which, and so does a table of several results."""
    run = shutil.copytree(job / "run", tmp_path / "run")
    facts = json.loads((run / "config.json").read_text())
    facts["inputs"]["pairs"][0]["guidance"] = 6.0
    (run / "config.json").write_text(json.dumps(facts))
    exported = tmp_path / "exported"
    export_student(str(run), exported, "fp32")
    settings: dict[str, Any] = {"metrics": ("psnr",), "reference": None}
    by_default, at_6, at_3, of_export = (
        run_evaluation(
            config(job, student=str(student), guidance=scale, out=str(tmp_path / name), **settings)
        )
        for name, student, scale in (
            ("default", run, None),
            ("six", run, 6.0),
            ("three", run, 3.0),
            ("export", exported, None),
        )
    )
    values = [result["extra"]["psnr"] for result in (by_default, at_6, at_3, of_export)]
    assert values[0] == values[1] == values[3] != values[2]
    assert [result["against"]["guidance"] for result in (by_default, at_3)] == [6.0, 3.0]
    beside = compare_results([tmp_path / "default", tmp_path / "three"])["against"]
    assert [name.partition(", ")[2] for name in beside.values()] == [
        "2 steps, guidance 6",
        "2 steps, guidance 3",
    ]


def test_a_curve_of_truncation(job: Path, tmp_path: Path) -> None:
    run = config(job, student=str(job / "run"), metrics=("fid", "clip"), out=str(tmp_path / "curve"))
    curve = run_curve(CurveRun(run=run, setting="noise_scale", values=(0.5, 1.0)))
    assert curve["points"][0]["fid"] != curve["points"][1]["fid"]


@pytest.mark.slow
def test_two_curves_in_one_picture(job: Path, tmp_path: Path) -> None:
    """StyleGAN-T's figure 6; a curve of another setting, seed or name is refused."""
    run = config(job, student=str(job / "run"), metrics=("fid", "clip"), out=str(tmp_path / "before"))
    before = CurveRun(run=run, setting="noise_scale", values=(1.0,))
    run_curve(before)
    after = replace(before, run=replace(run, out=str(tmp_path / "after")), beside=(str(tmp_path / "before"),))
    run_curve(after)
    report = (tmp_path / "after" / "report.html").read_text()
    assert ">before<" in report and ">after<" in report
    for changed, message in (
        (replace(after, beside=("nowhere",)), "nowhere"),
        (replace(before, beside=(str(tmp_path / "before"),)), "needs an --out of another name"),
        (
            replace(after, run=replace(after.run, seed=7, out=str(tmp_path / "seed"))),
            "does not compare: prot",
        ),
    ):
        with pytest.raises(UserError, match=message):
            run_curve(changed)
    # The protocol is known at the end alone: what was measured until then is there.
    assert len(json.loads((tmp_path / "seed" / "curve.json").read_text())["points"]) == 1
    with pytest.raises(SettingError, match=r"psi is 0\.5, but student .* has no styles to truncate"):
        run_curve(CurveRun(run=replace(run, out=str(tmp_path / "psi")), setting="psi", values=(0.5,)))
    with pytest.raises(SettingError, match="psi is 2; expected 0"):
        CurveRun(run=run, setting="psi", values=(2,))


def test_checkpoints_that_are_close_have_folders_of_their_own() -> None:
    run = EvalRun(student="runs/gan", out="out", keep="drawn")
    curve = CurveRun(run=run, setting="checkpoints")
    points = [run_at(curve, float(images)) for images in (12_800_000, 12_800_064)]
    assert [point.work for point in points] == [
        *("out/work/checkpoints-12800000", "out/work/checkpoints-12800064")
    ]
    assert [point.keep for point in points] == ["drawn/checkpoints-12800000", "drawn/checkpoints-12800064"]
    guidance = run_at(CurveRun(run=run, setting="guidance", values=(1.5,)), 1.5)
    assert guidance.work == "out/work/guidance-1.5"


def test_every_checkpoint_of_a_run(job: Path, tmp_path: Path) -> None:
    run = config(job, student=str(job / "run"), every=True, out=str(tmp_path / "out"))
    results = run_every(run)
    assert [row["images"] for row in results["checkpoints"]] == [8.0, 16.0]
    newest = run_evaluation(config(job, student=str(job / "run")))
    assert results["fid"] == pytest.approx(newest["fid"]) == pytest.approx(results["checkpoints"][-1]["fid"])
    assert results["checkpoints"][0]["fid"] != results["checkpoints"][1]["fid"]
    assert "images trained on" in (tmp_path / "out" / "report.html").read_text()
    assert EvalResult.load(tmp_path / "out").fid == results["fid"]
    # The scores of each image are those of the newest checkpoint, also in a folder of an earlier evaluation.
    scores = load_file(tmp_path / "out" / "rows.safetensors")["clip_score"]
    assert scores.mean().item() == pytest.approx(results["clip_score"])
    points = replace(run, every=False, metrics=("fid", "clip"), out=str(tmp_path / "curve"))
    curve = run_curve(CurveRun(run=points, setting="checkpoints", values=(8.0,)))
    assert curve["points"][0]["fid"] == pytest.approx(results["checkpoints"][0]["fid"])
    with pytest.raises(UserError, match="has no checkpoint at 9 images; it has 8, 16"):
        run_curve(CurveRun(run=points, setting="checkpoints", values=(9.0,)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "give --student or --teacher, or --images, or --pipeline"),
        ({"student": "x", "images": "y"}, "student is x and images is y; expected one of them"),
        ({"teacher": "x", "pipeline": "y"}, "pipeline is y and teacher is x; expected one of them"),
        ({"teacher": "x", "noise_scale": 0.5}, "noise_scale is a student's setting"),
        ({"student": "miniature", "every": True}, "--every goes over a run's checkpoints"),
        ({"images": "x", "keep": "y"}, "--keep saves what a sampler draws"),
        ({"images": "x", "latency": True}, "--latency times a sampler"),
        (
            {"images": "x", "protocol": PROTOCOLS["localized-narratives-5k"], "num": 6000},
            "num is 6000, but protocol localized-narratives-5k measures 5000 images",
        ),
        ({"images": "x", "metrics": ("fad",)}, "unknown metric 'fad'; did you mean 'fid'"),
        ({"images": "x", "metrics": ("caption_accuracy",)}, "take protocol scenes-5k or miniature"),
        ({"images": "x", "metrics": ("fid",)}, "metric 'fid' (Frechet distance of the protocol's features)"),
        ({"images": "x", "metrics": ("fid",), "weights": ("y",)}, "leaves the features open; give --feat"),
        (
            {"images": "x", "metrics": ("clip",)},
            "needs a CLIP, and protocol folder leaves it open; give --clip",
        ),
        (
            {"images": "x", "metrics": ("latent_lpips",), "against": "y"},
            "needs a teacher for its latent space",
        ),
        (
            {"images": "x", "metrics": ("psnr",), "weights": ("incption=x",)},
            "unknown network 'incption' in --weights",
        ),
        (
            {"images": "x", "metrics": ("psnr",), "weights": ("dinov2=x",)},
            "--weights dinov2=PATH has no effect: none of the metrics psnr needs that network",
        ),
        ({"images": "x", "metrics": ("psnr",), "features": "inception"}, "--features has no effect"),
        ({"images": "x", "metrics": ("psnr",), "clip": "vit-b-32"}, "--clip has no effect"),
        (
            {"student": "miniature", "protocol": PROTOCOLS["miniature"], "weights": ("x",)},
            "--weights has no effect: the features oracle bring their own",
        ),
    ],
)
def test_invalid_settings_are_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "x" / "a.png")
    settings = {k: str(tmp_path / "x") if v == "x" and k == "images" else v for k, v in settings.items()}
    with pytest.raises(SettingError, match=re.escape(message)):
        run_evaluation(EvalRun(**settings))


def test_saved_statistics_replace_the_reference_folder(job: Path, teacher: Path, tmp_path: Path) -> None:
    """A statistics file gives the numbers of its folder; another protocol refuses it."""
    run = config(job, metrics=("fid", "pr", "clip"), reference=None, prompts=None, num=0)
    file = tmp_path / "real.safetensors"
    summary = save_statistics(replace(run, clip=None), job / "photographs", file)
    assert (
        summary["images"] == 12
        and summary["networks"]["features"]["name"].startswith("clip:")
        and file.is_file()
    )
    shared = run_evaluation(config(job, teacher=str(teacher), reference=str(file)))
    assert_close(shared, run_evaluation(config(job, teacher=str(teacher))))
    other = replace(config(job).protocol, size=8, resize="box", crop="centre")
    with pytest.raises(UserError, match=r"another way: preprocessing \('native' -> 'crop8-box'\)"):
        run_evaluation(config(job, teacher=str(teacher), reference=str(file), protocol=other))
    with pytest.raises(SettingError, match="metrics clip need no reference; name some that do, say fid"):
        save_statistics(replace(run, clip=None, metrics=("clip",)), job / "photographs", file)


def coco(folder: Path) -> Path:
    """Save ten images in the layout of COCO."""
    (folder / "val2014").mkdir(parents=True)
    (folder / "annotations").mkdir()
    stream = torch.Generator().manual_seed(1)
    for i in range(10):
        pixels = torch.randint(256, (20, 24 + i, 3), generator=stream, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / "val2014" / f"{i}.jpg")
    content = {
        "images": [{"id": i, "file_name": f"{i}.jpg"} for i in range(10)],
        "annotations": [{"id": i, "image_id": i, "caption": tiny.CAPTIONS[i % 6]} for i in range(10)],
    }
    (folder / "annotations" / "captions_val2014.json").write_text(json.dumps(content))
    return folder


def test_coco_statistics_hold_the_prompts(job: Path, teacher: Path, tmp_path: Path) -> None:
    """A statistics file holds the prompts, so an evaluation needs neither COCO nor a prompt list."""
    protocol = PROTOCOLS["coco2014-30k-d2gan"]
    small = replace(protocol, images=8, reference_images=10, size=16, features="any", clip="any")
    run = config(job, protocol=small, prompts=None, num=0, reference=None)
    summary = save_statistics(replace(run, clip=None), coco(tmp_path / "coco"), tmp_path / "coco.safetensors")
    assert (summary["images"], summary["prompts"], summary["preprocessing"]) == (10, 8, "crop16-bicubic")
    shared = run_evaluation(replace(run, teacher=str(teacher), reference=str(tmp_path / "coco.safetensors")))
    direct = run_evaluation(replace(run, teacher=str(teacher), reference=str(tmp_path / "coco")))
    assert numbers(shared) == numbers(direct) and shared["counts"]["images"] == 8
    prompts = Reference.load(tmp_path / "coco.safetensors").prompts
    assert shared["settings"]["prompts_sha256"] == digest(list(prompts)) and len(prompts) == 8
    (note,) = [note for note in shared["notes"] if note.startswith("not coco2014-30k-d2gan as it is named")]
    assert "images (30000 -> 8)" in note and "size (256 -> 16)" in note
    with pytest.raises(UserError, match="has 10 captioned images, the protocol draws 30000"):
        save_statistics(replace(run, protocol=protocol), tmp_path / "coco", tmp_path / "b.safetensors")


def test_win_rates_from_saved_scores(job: Path, teacher: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    for name, shift in (("a", 0.0), ("b", 1.0)):
        run_evaluation(config(job, teacher=str(teacher), out=str(tmp_path / name)))
        scores = {"pickscore": torch.arange(12.0) + shift}
        save_file(scores, tmp_path / name / "rows.safetensors")
    table = compare_results([tmp_path / "b", tmp_path / "a"])
    assert [row["name"] for row in table["results"]] == [str(tmp_path / "a"), str(tmp_path / "b")]
    (wins,) = table["pickscore_wins"]
    assert (wins["first"], wins["win_rate"], wins["losses"]) == (str(tmp_path / "a"), 0.0, 12)
    assert compare_results([tmp_path / "a"])["pickscore_wins"] == []


def test_damaged_scores_and_foreign_results_are_one_line(tmp_path: Path) -> None:
    for name, counts in (("a", {"images": 3}), ("b", {"images": 3}), ("c", {"pr_images": 1})):
        result = EvalResult(protocol="folder", protocol_sha256="0" * 64, counts=counts)
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_text(json.dumps(result.to_json()))
        save_file({"pickscore": torch.arange(3.0)}, tmp_path / name / "rows.safetensors")
    assert compare_results([tmp_path / "a", tmp_path / "b"])["pickscore_wins"][0]["ties"] == 3
    with pytest.raises(UserError, match=r"do not compare: counts\.images"):
        compare_results([tmp_path / "a", tmp_path / "c"])
    save_file({"pickscore": torch.arange(2.0)}, tmp_path / "b" / "rows.safetensors")
    with pytest.raises(UserError, match="holds 2 PickScores, the result is of 3 images; evaluate it again"):
        compare_results([tmp_path / "a", tmp_path / "b"])
    (tmp_path / "b" / "rows.safetensors").write_bytes(b"x" * 20)
    with pytest.raises(UserError, match=r"rows.safetensors is damaged \(.*\); evaluate it again"):
        compare_results([tmp_path / "a", tmp_path / "b"])


def test_metrics_without_a_network_are_left_out_and_named(
    job: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the protocol's own metrics, those remain that can be measured; the user's own are an error."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr("d2g.vision.efficientnet.PACKAGE", "a_package_that_is_not_installed")
    run = config(job, teacher=str(teacher), metrics=(), features=None, weights=(), out=str(tmp_path / "out"))
    result = run_evaluation(run)
    assert result["clip_score"] is not None and result["fid"] is None
    line = "left out: fid, fd_relative, kid, pr (no feature network; give --features inception)"
    assert line in result["notes"] and line in (tmp_path / "out" / "report.html").read_text()
    # Without real images those that need some; without anything, one error names all.
    features = replace(config(job, teacher=str(teacher), metrics=()), reference=None)
    result = run_evaluation(features)
    assert "left out: fid, fd_relative, kid, pr (no real images; give --reference)" in result["notes"]
    nothing = replace(features, features=None, weights=(), clip=None)
    with pytest.raises(
        SettingError, match=r"nothing can be measured: left out: fid, fd_relative, kid, pr \(no feature net"
    ):
        run_evaluation(nothing)


def test_real_pictures_beside_real_pictures(
    job: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without --train the reference is split in two; with it, the reference is compared with the training."""
    monkeypatch.setenv("D2G_CACHE", str(tmp_path / "cache"))
    split = run_evaluation(config(job, teacher=str(teacher), metrics=("fid", "fd_relative", "pr", "clip")))
    assert set(split["floor"]) == {"fid", "fd_relative", "precision", "recall"}
    assert "floor: 6 held-out real pictures against 6 others of the reference" in split["notes"]
    # The relative distance is the distance over the trace of the reference's covariance.
    (reference,) = (tmp_path / "cache" / "reference").glob("*.safetensors")
    variance = Reference.load(reference).stats["features"].covariance.trace().item()
    assert split["extra"]["fd_relative"] == pytest.approx(split["fid"] / variance)
    low, high = split["ci"]["fid"]
    assert split["ci"]["fd_relative"] == pytest.approx([low / variance, high / variance])
    # The reference against training pictures, which are all of its own and another one.
    shutil.copytree(job / "photographs", tmp_path / "training")
    Image.new("RGB", (16, 16)).save(tmp_path / "training" / "black.png")
    run = config(job, teacher=str(teacher), train=str(tmp_path / "training"), out=str(tmp_path / "out"))
    trained = run_evaluation(run)
    assert trained["floor"]["fid"] > 0 and trained["floor"]["precision"] == 1
    assert "floor: 12 held-out real pictures against 13 training pictures" in trained["notes"]
    assert "held-out real pictures" in (tmp_path / "out" / "report.html").read_text()
    # The protocol's number of reference images is not that of training pictures.
    fixed = EvalSession(replace(run, protocol=replace(run.protocol, reference_images=6)))
    assert fixed.training is not None and fixed.training.count == 13
    # Pictures that are training pictures and reference at once are not held out: the reference is split.
    both = replace(run, train=str(job / "photographs"), out=None)
    same = run_evaluation(both)
    assert same["floor"] == pytest.approx({name: split["floor"][name] for name in same["floor"]})
    note = "floor: 6 held-out real pictures against 6 others of the reference (--train has the same pictures)"
    assert note in same["notes"]
    # A protocol with a reference of its own has no floor.
    assert EvalSession(replace(run, protocol=PROTOCOLS["coco2014-30k-gigagan"])).training is None


def test_a_network_of_the_user(job: Path, teacher: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Its name and its digest are in the result; a protocol that fixes its network refuses it."""
    (tmp_path / "brightness.py").write_text("def of(images):\n    return images.float().mean((2, 3))\n")
    monkeypatch.chdir(tmp_path)
    run = config(job, teacher=str(teacher), features="brightness:of", weights=(), metrics=("fid",))
    result = run_evaluation(run)
    assert result["models"]["features"]["name"] == "brightness:of" and result["models"]["features"]["sha256"]
    assert any("`fid` is a Frechet distance of brightness:of features" in note for note in result["notes"])
    for wrong, message in (
        (replace(run, weights=("x.pth",)), "--weights has no effect"),
        (replace(run, features="clip", features_input="16,half"), "--features-input has no effect: clip"),
    ):
        with pytest.raises(SettingError, match=message):
            run_evaluation(wrong)
    # A protocol's own text never names code.
    protocol = replace(run.protocol, features="brightness:of")
    with pytest.raises(SettingError, match="unknown feature network 'brightness:of'"):
        run_evaluation(replace(run, features=None, protocol=protocol))


def test_missing_training_pictures_are_an_error_before_the_first_image(job: Path, tmp_path: Path) -> None:
    run = config(job, student=str(job / "run"), train=str(tmp_path / "absent"), out=str(tmp_path / "out"))
    with pytest.raises(UserError, match="absent: no such file or folder"):
        run_evaluation(run)
    assert not (tmp_path / "out" / "work" / "parts").exists()


def test_numbers_are_written_before_what_fails_after_them(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The teacher is loaded for --latency when all is measured; training pictures are read before that."""
    monkeypatch.setenv("D2G_CACHE", str(tmp_path / "cache"))
    run = config(job, student=str(job / "run"), metrics=("fid",), out=str(tmp_path / "result.json"))
    with pytest.raises(SettingError, match="solver is 'none'"):
        run_evaluation(replace(run, latency=True, solver="none"))
    assert json.loads((tmp_path / "result.json").read_text())["fid"] > 0
    shutil.copytree(job / "photographs", tmp_path / "training")
    (tmp_path / "training" / "00.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"00\.png"):
        run_evaluation(replace(run, train=str(tmp_path / "training"), work=str(tmp_path / "work")))
    assert not (tmp_path / "work" / "parts").exists()


def test_repeated_prompts_are_kept(tmp_path: Path) -> None:
    """505 of COCO's 30,000 captions occur twice, and an image is sampled for each."""
    (tmp_path / "a.txt").write_text("one\n two \none\n\nthree\n")
    assert read_list(tmp_path / "a.txt") == ["one", "two", "one", "three"]
    (tmp_path / "b.txt").write_text("\n")
    for name, message in (
        ("b.txt", "holds no prompts"),
        ("c.txt", "cannot read prompts from"),
        ("d.pdf", "prompt files end in"),
    ):
        with pytest.raises(UserError, match=message):
            read_list(tmp_path / name)


def test_a_teacher_with_nan_weights_is_an_error_without_a_result(
    teacher: Path, job: Path, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    broken = tmp_path / "teacher"
    shutil.copytree(teacher, broken)
    file = broken / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["decoder.conv_out.bias"].fill_(float("nan"))
    save_file(tensors, file, {"format": "pt"})
    ended = d2g(arguments(job, broken, out=tmp_path / "out"), tmp_path / "run")
    assert ended.code == 1 and "image 0" in ended.error and "is not finite" in ended.error
    assert not (tmp_path / "out" / "result.json").exists()


def test_fewer_images_than_prompts_take_a_random_subset_of_them(
    job: Path, teacher: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Files are often sorted by class: their first prompts would be of one class."""
    listed = tmp_path / "prompts.txt"
    listed.write_text("\n".join(f"{kind} {n}" for kind in "abcd" for n in range(30)) + "\n")

    def sampled(**settings: Any) -> list[str]:
        session = EvalSession(config(job, teacher=str(teacher), prompts=str(listed), **settings))
        return list(session.sampling_request(session.prompts).prompts)

    prompts, others = read_list(listed), sampled(num=40, seed=5)
    chosen = sampled(num=40)
    assert chosen == sampled(num=40) != others and chosen == sorted(set(chosen), key=prompts.index)
    assert {text[0] for text in chosen} == {text[0] for text in others} == set("abcd")
    assert sampled(num=120) == sampled(num=200) == prompts
    with caplog.at_level("INFO", logger="d2g"):
        run = config(job, teacher=str(teacher), steps=1, prompts=str(listed), num=4, metrics=("clip",))
        result = run_evaluation(replace(run, reference=None))
    note = "4 of 120 prompts, chosen at random (seed 1000)"
    assert note in result["notes"] and note in caplog.text
    # COCO's prompts are in random order already, and their first ones are those of the published protocol.
    coco = PROTOCOLS["coco2014-30k-gigagan"]
    session = EvalSession(config(job, teacher=str(teacher), protocol=coco, num=2, prompts=None))
    assert list(session.sampling_request(["x", "y", "z"]).prompts) == ["x", "y"]


def test_prompts_that_are_drawn_several_times_are_noted(job: Path, teacher: Path, tmp_path: Path) -> None:
    """The reference of a smaller protocol has fewer prompts than this one measures images."""
    listed = tmp_path / "prompts.txt"
    listed.write_text("a\nb\nc\n")
    run = config(job, teacher=str(teacher), steps=1, prompts=str(listed), num=7, metrics=("clip",))
    result = run_evaluation(replace(run, reference=None))
    assert "3 prompts for 7 images: they are drawn in turn, each time with new noise" in result["notes"]
    result = run_evaluation(replace(run, reference=None, num=3))
    assert not any("drawn in turn" in note for note in result["notes"])


def test_a_sampler_without_a_number_of_images_says_what_to_give(tmp_path: Path) -> None:
    classes = tiny_teachers.save_kind("dit", tmp_path / "dit")
    with pytest.raises(UserError, match=r"got 0 images to evaluate; expected at least 2, --num"):
        run_evaluation(EvalRun(teacher=classes, metrics=("psnr",), against=classes, steps=1))


def test_a_clip_score_by_the_clip_that_guided_the_student_is_noted(
    job: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A digest tells, wherever the CLIP lies and whichever library wrote it."""
    scoring = load_clip(str(job / "clip"))
    tensors = load_file(job / "clip" / "open_clip_model.safetensors")
    (tmp_path / "guide").mkdir()
    table = {"text_model.embeddings.token_embedding.weight": tensors["token_embedding.weight"].float()}
    save_file(table, tmp_path / "guide" / "model.safetensors")
    assert scoring.text_sha256 == clip_sha256(str(tmp_path / "guide")) != ""
    run = tmp_path / "run"
    shutil.copytree(job / "run", run)
    settings = json.loads((run / "config.json").read_text())
    for digest_of_guide, notes in ((scoring.text_sha256, 1), ("0" * 64, 0), ("", 0)):
        settings["inputs"]["clip"] = digest_of_guide
        (run / "config.json").write_text(json.dumps(settings))
        result = run_evaluation(config(job, student=str(run), metrics=("clip",), reference=None, num=4))
        assert sum("guided this student in training" in note for note in result["notes"]) == notes
    settings["inputs"]["clip"] = scoring.text_sha256
    (run / "config.json").write_text(json.dumps(settings))
    export_student(str(run), tmp_path / "exported")
    assert guiding_clip(str(tmp_path / "exported")) == scoring.text_sha256
