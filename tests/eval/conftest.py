"""Fixtures of the evaluation tests."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from distill.training.train import train
from jobs import distill_config, make_clip, make_pairs
from miniature.registration import register_eval_scenes

register_eval_scenes()  # as the commands of d2g do


@pytest.fixture(scope="module")
def job(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with prompts.txt, photographs/, clip/ and run/, a training run with two checkpoints."""
    folder = tmp_path_factory.mktemp("job")
    pairs = make_pairs(teacher, folder)
    settings = ("train.checkpoint_images=8", "train.keep_checkpoints=9", "train.images=16")
    train(distill_config(teacher, pairs, *settings), folder / "run")
    (folder / "photographs").mkdir()
    stream = torch.Generator().manual_seed(0)
    for number in range(12):
        pixels = torch.randint(256, (16, 16, 3), generator=stream, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / "photographs" / f"{number:02}.png")
    make_clip(teacher, folder / "clip")
    return folder
