"""distill.export.card_scores: scores on a model card belong to the exported weights or to labeled images."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from d2g.core.atomic_files import write_atomically
from d2g.core.errors import UserError
from d2g.diffusion.pretrained import SHIPPED
from distill.config.export import CardOptions, ExportConfig
from distill.config.student import StudentConfig
from distill.export.card_scores import own_results
from distill.export.export import export, export_student
from distill.export.model_card import PipelineUsage, model_card
from exported import readme_of, save_lora_run, save_result, save_result_of, save_run

SHA256 = hashlib.sha256((SHIPPED["miniature"] / "student" / "ema.safetensors").read_bytes()).hexdigest()


def score_lines(file: str) -> str:
    usage = PipelineUsage(pipeline="StableDiffusionPipeline", dtype="float32", guided=False, reads_text=True)
    return model_card(
        student="miniature", teacher="miniature", timestep="timestep 999", parity=0.0, options=CardOptions(),
        scores=own_results("miniature", (file,)), usage=usage,
    )  # fmt: skip


def test_scores_of_the_exported_student(tmp_path: Path) -> None:
    source: dict[str, Any] = {
        "kind": "student",
        "name": "runs/gan",
        "weights_sha256": SHA256,
        "precision": "fp32",
    }
    text = score_lines(save_result(tmp_path / "a.json", **source, noise_scale=1.0))
    assert "Protocol `coco` (`abcabcabcabcabca`; 30,000 images), of these weights:" in text
    assert "| fid | 9.29 |" in text
    text = score_lines(save_result(tmp_path / "b.json", **source | {"precision": "bf16"}, noise_scale=0.8))
    assert "of these weights, in bf16, noise scaled by 0.8:" in text


def test_scores_say_how_the_images_were_drawn(tmp_path: Path) -> None:
    """The same weights draw other images at another guidance scale, or with truncated noise."""
    source: dict[str, Any] = {"kind": "student", "weights_sha256": SHA256, "guidance": 3.0}
    text = score_lines(save_result(tmp_path / "a.json", **source))
    assert "of these weights, at guidance 3:" in text
    assert "coco (abcabcabcabcabca, at guidance 3)" in text, "in the metadata, too"
    text = score_lines(save_result(tmp_path / "b.json", **source, noise_scale=0.8))
    assert "coco (abcabcabcabcabca, at guidance 3, noise scaled by 0.8)" in text


def test_results_of_images_are_labeled(tmp_path: Path) -> None:
    text = score_lines(
        save_result(tmp_path / "a.json", kind="images", name="/somewhere/of/mine/samples", images=30000)
    )
    assert "images), of the images in `samples`, which nobody has checked to be this student's:" in text
    assert "| fid | 9.29 |" in text and "somewhere" not in text and "these weights" not in text


@pytest.mark.parametrize(
    ("source", "expected_source"),
    [
        ({"kind": "teacher"}, "of a teacher"),
        (
            {"kind": "teacher", "name": "sd15, 9 steps", "weights_sha256": SHA256},
            "of a teacher, sd15, 9 steps,",
        ),
        ({"kind": "pipeline", "name": "x", "files_sha256": SHA256}, "of a pipeline, x, weights not named"),
        ({"kind": "student", "name": "runs/b", "weights_sha256": "f" * 64}, "b, weights ffffffffffffffff;"),
        ({"kind": "student", "name": "runs/b"}, "of a student, runs/b, weights not named;"),
        ({"kind": "memory", "name": "x"}, "of a memory, x"),
        ({}, "of a source that it does not name, weights not named;"),
    ],
)  # fmt: skip
def test_results_of_other_weights_are_refused(
    source: dict[str, Any], expected_source: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        own_results("miniature", (save_result(tmp_path / "result.json", **source),))
    text = str(caught.value)
    assert f"--scores {tmp_path / 'result.json'} is of " in text and expected_source in text
    assert f"expected one of the student miniature, weights {SHA256[:16]}" in text and "\n" not in text
    assert text.endswith("make one with `d2g eval run --student miniature --out FOLDER`")


def test_a_malformed_source_is_refused(tmp_path: Path) -> None:
    facts = {"protocol": "coco", "protocol_sha256": "abc", "source": "runs/gan"}
    write_atomically(tmp_path / "result.json", json.dumps(facts))
    with pytest.raises(UserError, match="of a source that it does not name"):
        own_results("miniature", (str(tmp_path),))


@pytest.mark.parametrize("form", ["diffusers", "lora", "onnx"])
def test_every_format_checks_scores_before_exporting(form: Any, teacher: Path, tmp_path: Path) -> None:
    """For a LoRA run, whose weights on disk are not merged."""
    run = save_lora_run(tmp_path / "run", str(teacher), StudentConfig(lora_rank=2))
    other = save_run(tmp_path / "other", str(teacher))
    wrong = CardOptions(scores=(save_result_of(tmp_path / "wrong.json", other),))
    with pytest.raises(UserError, match=rf"wrong\.json is of a student, {other}, weights .*; expected"):
        export(ExportConfig(student=run, format=form, card=wrong), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    # test_to_onnx.py checks the ONNX card: after torch.export, forked processes cannot train.
    if form == "onnx":
        return
    right = CardOptions(scores=(save_result_of(tmp_path / "right.json", run),))
    export(ExportConfig(student=run, format=form, card=right), tmp_path / "out")
    table = "of these weights:\n\n| measure | value |\n|---|---|\n| fid | 9.29 |"
    assert table in readme_of(tmp_path / "out")


def test_scores_belong_to_the_input_weights_not_to_the_exported_ones(teacher: Path, tmp_path: Path) -> None:
    run, small = save_run(tmp_path / "run", str(teacher)), str(tmp_path / "small")
    export_student(run, Path(small))  # rounded to fp16, so the weights differ
    of_run, of_small = (save_result_of(tmp_path / f"{Path(name).name}.json", name) for name in (run, small))
    for student, scores in ((run, of_run), (small, of_small)):
        config = ExportConfig(
            student=student, format="diffusers", dtype="fp16", card=CardOptions(scores=(scores,))
        )
        export(config, tmp_path / "out")
        assert "of these weights:" in readme_of(tmp_path / "out")
    with pytest.raises(UserError, match=rf"of a student, {run}, weights .* student {small}, weights"):
        own_results(small, (of_run,))


def test_missing_weights_are_reported(teacher: Path, tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", str(teacher))
    (tmp_path / "run" / "checkpoints" / "000000004" / "ema.safetensors").unlink()
    with pytest.raises(UserError, match=r"ema\.safetensors cannot be read: No such file"):
        own_results(run, (save_result(tmp_path / "a.json", kind="images", name="x"),))
