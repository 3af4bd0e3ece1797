"""The checks of a run's reports in real runs: each fault is found in the run that has it, and in no other.

The teacher predicts v at zero terminal SNR, and its pairs have one step. So the student repeats the teacher
from the start, and its latents are the output of its last layer: a changed layer is a student with a fault.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import tiny
from d2g.core.atomic_files import write_atomically
from d2g.core.config import to_json
from d2g.core.distributed.checkpoint import save
from d2g.core.tracking.run_directory import read_stats
from d2g.diffusion.pretrained import load_vae
from distill.models.student import student_from_teacher
from distill.monitoring.collapse import Collapse, Limits, findings
from distill.training.preview import decode_images, preview_statistics
from distill.training.train import train
from jobs import distill_config, make_pairs
from pairgen import PairReader

LIMITS = Limits(reports=2)
SETTINGS = ("regression.losses=mse", "train.preview_prompts=4", "optim.lr=1e-7")
LENGTH = 48
"""Images of the sound run, in twelve reports: as many as the checks need before and after."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with teacher/, pairs/, and the sound run/ of twelve reports."""
    root = tmp_path_factory.mktemp("sound")
    v_prediction = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    teacher = Path(tiny.save_teacher(root / "teacher", **v_prediction))
    # Rounded to fp16, so that the regression loss starts at a value that a small step does not double.
    pairs = make_pairs(teacher, root, steps=1, guidance=1.0, spacing="trailing", dtype="float16")
    settings = (*SETTINGS, f"train.images={LENGTH}", "train.on_collapse=stop")
    train(distill_config(teacher, pairs, *settings), root / "run")
    return root


def kinds_with(root: Path, folder: Path, change: Callable[[nn.Conv2d], None]) -> set[str]:
    """Kinds of the findings after the sound run was followed by two reports of a student whose last layer
    was changed."""
    # A run folder with the changed student.
    config = distill_config(root / "teacher", root / "pairs", *SETTINGS, "train.images=8")
    student = student_from_teacher(config.teacher, config.student_timestep, config.student)
    with torch.no_grad():
        change(student.network.conv_out)
    faulty = folder / "faulty"
    write_atomically(faulty / "config.json", json.dumps(to_json(config)))
    save(faulty / "checkpoints", 4, {"ema": student.state_dict()}, {}, {"steps": 1})
    # A run from it, whose reports follow those of the sound run.
    train(replace(config, init=str(faulty)), folder / "run")
    later = [{**line, "nimg": line["nimg"] + LENGTH} for line in read_stats(folder / "run")]
    return {finding.kind for finding in findings([*read_stats(root / "run"), *later], LIMITS)}


def test_a_sound_run_has_no_finding(root: Path) -> None:
    lines = read_stats(root / "run")
    assert len(lines) == LENGTH // 4
    assert not any(findings(lines[:end], LIMITS) for end in range(1, len(lines) + 1))


def test_saturated_images_are_found(root: Path, tmp_path: Path) -> None:
    def saturate(layer: nn.Conv2d) -> None:
        layer.weight.mul_(1.4)

    found = kinds_with(root, tmp_path, saturate)
    assert "saturation" in found and not found & {"color_shift", "frozen_weights"}, found


def test_shifted_colors_are_found(root: Path, tmp_path: Path) -> None:
    def shift(layer: nn.Conv2d) -> None:
        assert layer.bias is not None
        layer.bias[0] += 1.0

    found = kinds_with(root, tmp_path, shift)
    assert "color_shift" in found and not found & {"saturation", "frozen_weights"}, found


def test_weights_that_do_not_move_end_the_run(root: Path, tmp_path: Path) -> None:
    settings = (*SETTINGS, "train.images=12", "optim.lr=1e-30", "train.on_collapse=stop")
    with pytest.raises(Collapse, match="the student's weights do not move"):
        train(distill_config(root / "teacher", root / "pairs", *settings), tmp_path / "run")


def test_a_grid_in_the_pictures_is_found(root: Path) -> None:
    """The pictures of the run, with a checkerboard of one cell per latent, and with one that is shifted by
    half a cell. No change of the latents draws such a grid: the decoder smooths them."""
    latents = PairReader(root / "pairs").read(list(range(4))).latents.float()
    teacher = decode_images(load_vae(str(root / "teacher")), latents)
    row = torch.arange(16) // 4 % 2
    board = 100 * (row[:, None] ^ row) - 50

    def found(pattern: Tensor) -> list[str]:
        student = (teacher.int() + pattern).clamp(0, 255).to(torch.uint8)
        line = preview_statistics(student, teacher, cell=4)
        later = [{"nimg": LENGTH + 4 * number, **line} for number in (1, 2)]
        return [finding.kind for finding in findings([*read_stats(root / "run"), *later], LIMITS)]

    assert found(torch.zeros_like(board)) == []
    assert "grid_artifacts" in found(board)
    assert "grid_artifacts" not in found(torch.roll(board, (2, 2), (0, 1))), "the same contrast, elsewhere"
