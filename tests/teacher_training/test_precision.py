"""Training in bf16: the loss, what is saved, and folders of older versions."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from d2g.core.errors import UserError
from d2g.core.tracking.run_directory import read_stats
from d2g.diffusion import pretrained
from own_pictures import CONFIG, image_folder
from teacher_training.config import TEACHER_PRESETS
from teacher_training.train import train_teacher

STAGES = ("data", "vae", "unet")


@pytest.mark.slow
def test_bf16_trains_weights_in_fp32(tmp_path: Path) -> None:
    """The curves of both precisions agree to 2 %, and differ; the saved weights are fp32, and their folder is
    like any other."""
    (tmp_path / "data").mkdir()
    image_folder(tmp_path / "data")
    config = replace(CONFIG, data=str(tmp_path / "data"))
    losses = {}
    for precision in ("fp32", "bf16"):
        out = tmp_path / precision
        train_teacher(replace(config, precision=precision), out, STAGES)
        lines = read_stats(out / "training/unet")
        losses[precision] = [line["loss/mse"] for line in lines if "loss/mse" in line]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.02)
    assert losses["bf16"] != losses["fp32"]
    weights = [pretrained.load_unet(str(tmp_path / name)).state_dict() for name in losses]
    assert all(value.dtype == torch.float32 for value in weights[1].values())
    assert weights[0].keys() == weights[1].keys()


def test_a_training_of_an_older_version_was_in_fp32(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    image_folder(tmp_path / "data")
    config, out = replace(CONFIG, data=str(tmp_path / "data")), tmp_path / "teacher"
    train_teacher(config, out, STAGES)
    file = out / "training/unet/config.json"
    old = json.loads(file.read_text())
    assert old.pop("precision") == "fp32"
    file.write_text(json.dumps(old))
    with pytest.raises(UserError, match="another config: precision"):
        train_teacher(replace(config, precision="bf16"), out, STAGES)
    train_teacher(config, out, STAGES)


def test_the_presets_for_own_pictures_take_bf16_where_there_is_some() -> None:
    chosen = {name: preset.precision for name, preset in TEACHER_PRESETS.items()}
    assert {chosen[name] for name in ("quick", "evening", "night")} == {"auto"}
    assert chosen["scenes"] == "fp32"
