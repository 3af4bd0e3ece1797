"""miniature.demo with the shipped teacher and few steps: files, JSON keys, images and the report."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from browser import chromium
from d2g.core.config import override, to_json
from d2g.core.errors import SettingError
from d2g.core.seeds import noise
from d2g.diffusion.pretrained import SHIPPED, resolve
from d2g.diffusion.teacher import load_teacher
from eval.protocols.config import EvalRun
from eval.protocols.protocol import PROTOCOLS
from eval.runner.run import run_evaluation
from miniature.config import DEMO_PRESETS, DemoConfig
from miniature.demo import DEMO_SAMPLERS, DemoResult, run_demo
from miniature.metrics import TEST_SEED
from miniature.sampling import scene_captions
from pairgen.store.reader import PairReader

TINY = override(
    DEMO_PRESETS["quick"],
    [
        "pairs.num_pairs=8",
        "pairs.steps=2",
        "pairs.shard_size=4",
        "ode.train.images=16",
        "gan.train.images=16",
        "ode.train.batch_size=8",
        "gan.train.batch_size=8",
        "ode.train.report_images=8",
        "gan.train.report_images=8",
        "eval_images=8",
        "teacher_steps=2",
        "columns=2",
    ],
)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[DemoResult, Path, list[str]]:
    out, labels = tmp_path_factory.mktemp("demo") / "out", []
    result = run_demo(TINY, out, lambda label, done, total: labels.append(label))
    assert result is not None
    return result, out, labels


def test_documented_json_keys(demo: tuple[DemoResult, Path, list[str]]) -> None:
    result, out, labels = demo
    written = json.loads((out / "demo.json").read_text())
    assert written == result.to_json()
    assert {"out", "report", "seconds", "pairs", "caption_accuracy", "fid", "recall", "ms_per_image"} <= set(
        written
    )
    for key in ("fid", "caption_accuracy", "recall", "precision", "clip_score", "caption_exact"):
        assert set(written[key]) == set(DEMO_SAMPLERS), key
        assert all(math.isfinite(value) for value in written[key].values())
    assert (
        set(written["ms_per_image"]) == {"teacher", "student"} and min(written["ms_per_image"].values()) > 0
    )
    assert set(written["timings"]) == {"pairs", "stage 1", "stage 2", "evaluation"} and written["pairs"] == 8
    assert {"pairs", "ode", "gan", "evaluate"} <= set(labels)


def test_runs_and_stores_of_the_demo_are_ordinary_folders(demo: tuple[DemoResult, Path, list[str]]) -> None:
    _, out, _ = demo
    assert PairReader(out / "pairs").complete
    for stage in ("ode", "gan"):
        assert [p.name for p in (out / stage / "checkpoints").iterdir()] == ["000000016"]
    config = EvalRun(
        student=str(out / "gan"), protocol=PROTOCOLS["miniature"], num=8, metrics=("clip", "caption_accuracy")
    )
    measured = run_evaluation(config)
    assert measured["clip_score"] == pytest.approx(demo[0].clip_score["gan"], abs=1e-6)
    assert measured["extra"]["caption_accuracy"] == pytest.approx(demo[0].caption_accuracy["gan"])


def test_images_are_shown_side_by_side(demo: tuple[DemoResult, Path, list[str]]) -> None:
    _, out, _ = demo
    strips = []
    for name in DEMO_SAMPLERS:
        with Image.open(out / f"{name}.png") as image:
            assert image.size == (2 * 66, 66) and image.mode == "RGB"
            strips.append(image.tobytes())
    with Image.open(out / "side-by-side.png") as image:
        assert image.size == (2 * 66, 4 * 66) and image.tobytes() == b"".join(strips)
    assert len(set(strips)) == 4


def test_the_report_is_self_contained(demo: tuple[DemoResult, Path, list[str]]) -> None:
    result, _, _ = demo
    text = Path(result.report).read_text(encoding="utf-8")
    sources = re.findall(r"""\ssrc\s*=\s*['"]([^'"]{0,40})""", text)
    assert len(sources) == 4 * 2 and all(source.startswith("data:image/png;base64,") for source in sources)
    assert "http:" not in text and "<script" not in text and "@import" not in text and "url(" not in text
    assert text.startswith("<!doctype html>") and text.rstrip().endswith("</html>")


def test_the_report_in_a_browser(demo: tuple[DemoResult, Path, list[str]]) -> None:
    result, _, _ = demo
    with chromium() as browser:
        for width, dark in ((1400, False), (400, True)):
            page = browser.open(Path(result.report), width=width, dark=dark)
            assert page.problems == [] and page.images == 4 * 2
    assert [text for level, text in page.headings if level == 2] == [
        "Metrics", "Same noise, same prompt", "Curves", "Latency", "Time taken",
    ]  # fmt: skip
    assert [text for level, text in page.headings if level == 3] == [
        "Stage 1: losses", "Stage 2: losses", "Stage 2: the discriminator's mean logits",
    ]  # fmt: skip
    for label in ("Frechet distance (oracle features)", "Recall", "CLIP score", "Caption accuracy", "total"):
        assert label in page.text
    assert "teacher, 2 DDIM steps" in page.text  # the configured number of steps, not the default
    assert all(prompt in page.text for prompt in scene_captions(2, TEST_SEED))


def test_a_second_run_reuses_finished_parts(demo: tuple[DemoResult, Path, list[str]]) -> None:
    first, out, _ = demo
    mtimes = {
        path: path.stat().st_mtime_ns for path in out.rglob("*") if path.suffix in (".h5", ".safetensors")
    }
    second = run_demo(TINY, out)
    assert second is not None
    assert {path: path.stat().st_mtime_ns for path in mtimes} == mtimes
    assert second.fid == pytest.approx(first.fid, rel=1e-6) and second.recall == first.recall


def test_stable_diffusion_pipeline_samples_the_shipped_teacher() -> None:
    """Diffusers loads the shipped teacher and gives the same latents."""
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(SHIPPED["miniature"] / "teacher")
    pipe.set_progress_bar_config(disable=True)
    teacher, prompts = load_teacher("miniature", final_alpha="teacher"), scene_captions(2, 2)
    latent_noise = noise(0, range(2), teacher.latent_shape)

    def by_diffusers(kind: str) -> object:
        return pipe(
            prompts, latents=latent_noise, num_inference_steps=5, guidance_scale=3.0, output_type=kind
        ).images

    expected = by_diffusers("latent")
    latents = teacher.sample(latent_noise, prompts, 5, 3.0, "ddim")
    torch.testing.assert_close(latents, expected, rtol=0, atol=1e-4)
    pictures = by_diffusers("pil")
    assert isinstance(pictures, list) and [p.size for p in pictures] == [(64, 64)] * 2
    assert all(max(hi - lo for lo, hi in picture.getextrema()) > 50 for picture in pictures)


def test_shipped_folders_are_small_and_documented() -> None:
    folder = SHIPPED["miniature"]
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 20 * 2**20
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".txt"}  # no pickles
    assert resolve("miniature") == folder / "teacher" and (folder / "student" / "student.json").is_file()


def test_presets_and_invalid_sizes() -> None:
    assert set(DEMO_PRESETS) == {"default", "quick"} and DEMO_PRESETS["default"] == DemoConfig()
    for preset in DEMO_PRESETS.values():
        assert preset.ode.teacher == preset.gan.teacher == preset.pairs.teacher == "miniature"
        assert override(DemoConfig(), []) == DemoConfig() and to_json(preset)["columns"] == preset.columns
    for wrong in ({"eval_images": 1}, {"columns": 0}, {"columns": 1000}):
        with pytest.raises(SettingError, match=f"^{next(iter(wrong))} is "):
            replace(DemoConfig(), **wrong)
