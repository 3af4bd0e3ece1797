"""distill.export.to_onnx: onnxruntime samples the student, and the code in the README.md runs."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny_teachers
from d2g.core.errors import SettingError
from d2g.core.seeds import noise
from distill.config.export import CardOptions, ExportConfig
from distill.config.student import StudentConfig
from distill.export import to_onnx
from distill.export.export import export
from distill.export.to_onnx import run_onnx
from distill.sampling import load_student
from exported import PROMPT, readme_of, save_result_of, save_run


@pytest.mark.slow
def test_onnxruntime_reproduces_the_student(teacher: Path, tmp_path: Path) -> None:
    """A student with a guidance input. SDXL is left out: torch.export takes a minute for its networks."""
    run = save_run(tmp_path / "run", str(teacher), StudentConfig(guidance_conditioning=True))
    config, out = tmp_path / "run" / "config.json", tmp_path / "out"
    inputs = {"pairs": [{"guidance": 1.5}, {"guidance": 4.0}]}
    config.write_text(json.dumps({**json.loads(config.read_text()), "inputs": inputs}))
    scores = CardOptions(scores=(save_result_of(tmp_path / "result.json", run),))
    assert export(ExportConfig(student=run, format="onnx", card=scores), out)["parity_max_abs_err"] <= 1e-4
    table = "of these weights, at guidance 4:\n\n| measure | value |\n|---|---|\n| fid | 9.29 |"
    assert table in readme_of(out)
    paths = [str(Path(str(module.__file__)).parent).encode() for module in (torch, to_onnx)]
    assert not [f.name for f in out.glob("*.onnx") for path in paths if path in f.read_bytes()]
    one, z = load_student(run), noise(7, range(3), (4, 4, 4))
    hidden = one.conditioner.encode([*PROMPT, "a blue sphere"]).tensors["hidden"]
    scale = torch.full((3,), 4.0)
    (latents,) = run_onnx(out / "student.onnx", {"noise": z, "hidden": hidden, "guidance": scale})
    torch.testing.assert_close(latents, one.latents(z, [*PROMPT, "a blue sphere"]), rtol=0, atol=1e-4)
    (code,) = re.findall(r"```python\n(.*?)```", readme_of(out), re.DOTALL)
    assert "guidance=np.full(1, 4.0, np.float32)" in code, "the scale of its pairs nearest to 8"
    names: dict[str, Any] = {}
    exec(code.replace("THIS_FOLDER", str(out)), names)
    assert names["image"].size == (16, 16) and np.asarray(names["image"]).std() > 1


@pytest.mark.long
@pytest.mark.slow
def test_class_conditional_onnx_has_no_text_encoder(tmp_path: Path) -> None:
    """The teacher is an EDM in pixels, whose non-integer time is a constant of the ONNX graph."""
    run, out = save_run(tmp_path / "run", tiny_teachers.save_edm(tmp_path / "teacher")), tmp_path / "out"
    assert export(ExportConfig(student=run, format="onnx"), out)["parity_max_abs_err"] <= 1e-4
    assert sorted(p.name for p in out.iterdir()) == ["README.md", "decoder.onnx", "student.onnx"]
    one, z = load_student(run), noise(7, range(3), (3, 8, 8))
    labels = torch.tensor([4, 0, 9])
    (latents,) = run_onnx(out / "student.onnx", {"noise": z, "labels": labels})
    torch.testing.assert_close(latents, one.latents(z, ["4", "0", "9"]), rtol=0, atol=1e-4)
    readme = readme_of(out)
    assert "of the network at sigma 80 turns noise" in readme
    assert "pipeline_tag: unconditional-image-generation" in readme
    (code,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    names: dict[str, Any] = {}
    exec(code.replace("THIS_FOLDER", str(out)), names)
    own = one.images(torch.from_numpy(names["noise"]), ["0"])[0].permute(1, 2, 0).int().numpy()
    assert np.abs(np.asarray(names["image"]).astype(int) - own).max() <= 1


def test_onnx_needs_fp32_and_its_packages(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = save_run(tmp_path / "run", str(teacher))
    with pytest.raises(SettingError, match="'fp16'; the format onnx is written in fp32"):
        export(ExportConfig(student=run, format="onnx", dtype="fp16"), tmp_path)
    monkeypatch.setattr(to_onnx, "PACKAGES", ("onnx", "no_such_package"))
    with pytest.raises(
        SettingError, match="needs no_such_package, not installed; `pip install no_such_package"
    ):
        export(ExportConfig(student=run, format="onnx"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
