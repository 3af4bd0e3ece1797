"""distill.exploration: walks through noises and prompts pass their points, and keep the norm of noise."""

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from d2g.core.errors import SettingError
from d2g.core.seeds import noise
from d2g.diffusion.conditioning import LabelConditioner
from distill.exploration import LENGTH_STEP, Walk, interpolate_noise, walk_positions
from distill.sampling import OneStepSampler, untrained_one_step


@pytest.fixture(scope="module")
def one(teacher: Path) -> OneStepSampler:
    return untrained_one_step(str(teacher))


def test_an_arc_keeps_the_norm_and_an_angle_that_grows_evenly() -> None:
    # Two orthogonal noises of norm 2: the arc is known in closed form.
    a, b = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    at = torch.linspace(0, 1, 5)
    points = interpolate_noise(a.expand(5, -1), b.expand(5, -1), at)
    angle = at * torch.pi / 2
    assert torch.allclose(points, 2 * torch.stack([angle.cos(), angle.sin()], 1), atol=1e-6)
    # Equal noises stay what they are.
    same = noise(0, range(3), (4, 2, 2))
    assert torch.allclose(interpolate_noise(same, same, torch.tensor([0.0, 0.4, 1.0])), same, atol=1e-6)


def test_a_walk_passes_its_points(one: OneStepSampler) -> None:
    prompts = ["a red cube", "a blue sphere", "a red cube"]
    noises = noise(0, range(3), one.student.latent_shape)
    walk = Walk(one, noises, prompts)
    at_points = walk.latents(torch.tensor([0.0, 1.0, 2.0]))
    assert torch.allclose(at_points, one.latents(noises, prompts), atol=1e-5)
    # The batch size does not matter, and images between are others.
    images = walk.images(torch.tensor([0.0, 0.5, 1.0]), batch_size=2)
    assert (images[1] != images[0]).any() and (images[1] != images[2]).any()


@pytest.mark.parametrize(("points", "frames"), [(2, 2), (2, 9), (3, 3), (3, 16), (5, 12)])
def test_every_point_has_a_frame(points: int, frames: int) -> None:
    positions = walk_positions(points, frames)
    assert len(positions) == frames and (positions.diff() > 0).all()
    assert set(range(points)) <= set(positions.tolist())
    # As even as that allows: segments differ by one frame at most.
    counts = positions[:-1].floor().long().bincount()
    assert counts.max() - counts.min() <= 1


def test_the_path_length_of_a_known_distance(one: OneStepSampler) -> None:
    def squared(a: Tensor, b: Tensor) -> Tensor:
        return (a - b).square().flatten(1).mean(1)

    noises = noise(0, range(2), one.student.latent_shape)
    walk, at = Walk(one, noises, ["a", "a"]), torch.tensor([0.25, 0.5])
    metric: Any = squared
    expected = squared(walk.latents(at), walk.latents(at + LENGTH_STEP)).mean() / LENGTH_STEP**2
    assert walk.perceptual_length(metric, at) == pytest.approx(float(expected), rel=1e-5)
    # A walk that stays in one place has length 0.
    assert Walk(one, noises[[0, 0]], ["a", "a"]).perceptual_length(metric, at) == pytest.approx(0, abs=1e-6)


def test_a_path_length_is_drawn_in_batches(one: OneStepSampler) -> None:
    """A long walk has more frames than fit in one forward pass."""

    def squared(a: Tensor, b: Tensor) -> Tensor:
        return (a - b).square().flatten(1).mean(1)

    walk = Walk(one, noise(0, range(2), one.student.latent_shape), ["a", "a"])
    at, rows, metric = torch.linspace(0, 0.9, 40), list[int](), cast(Any, squared)
    hook = one.student.network.register_forward_pre_hook(
        lambda _, args, options: rows.append(len((*args, *options.values())[0])), with_kwargs=True
    )
    length = walk.perceptual_length(metric, at)
    hook.remove()
    assert max(rows) == 32
    assert length == pytest.approx(
        float(squared(walk.latents(at), walk.latents(at + LENGTH_STEP)).mean()) / LENGTH_STEP**2, rel=1e-4
    )


def test_the_commands_draw(d2g: Any, tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    prompt = "a large red metal sphere left of a small blue matte cube, pink background"
    other = prompt.replace("red", "green")
    words = ["--student", "miniature", "--prompt", prompt, "--prompt", other, "--frames", 3]
    result = d2g("explore", "walk", *words, "--mp4", "--out", tmp_path / "walk", "--json").json
    assert result["images"] == 3 and result["perceptual_path_length"] > 0
    names = {"00000.png", "00001.png", "00002.png", "strip.png", "walk.gif", "walk.mp4"}
    assert {path.name for path in (tmp_path / "walk").iterdir()} == names
    with Image.open(tmp_path / "walk" / "walk.gif") as animation:
        assert animation.n_frames == 4  # type: ignore[attr-defined]  # forth and back
    with av.open(str(tmp_path / "walk" / "walk.mp4")) as video:
        assert len(list(video.decode(video=0))) == 4
    words = ["--subject", "a red cube", "--style", "matte", "--style", "metal", "--out", tmp_path / "styles"]
    assert d2g("explore", "styles", *words, "--json").json["images"] == 2
    # The first image of a walk is what `d2g sample` draws.
    d2g("sample", "--student", "miniature", "--prompt", prompt, "--out", tmp_path / "sample")
    walked, sampled = (
        np.asarray(Image.open(tmp_path / name / "00000.png")).astype(int) for name in ("walk", "sample")
    )
    assert np.abs(walked - sampled).max() <= 1  # batches of 3 and of 1 round differently


def test_images_of_an_earlier_call_are_named(d2g: Any, tmp_path: Path) -> None:
    """Of a longer walk, and of a student alone where student and teacher draw now."""
    points = ["--prompt", "a red cube", "--seed", 1, "--seed", 2]
    d2g("explore", "walk", *points, "--frames", 3, "--out", tmp_path)
    shorter = d2g("explore", "walk", *points, "--frames", 2, "--out", tmp_path)
    assert f"{tmp_path} also holds 1 images of an earlier call, from 00002.png on" in shorter.stderr
    both = ["--student", "miniature", "--teacher", "miniature", "--steps", 1, "--prompt", "a red cube"]
    assert (
        f"{tmp_path} also holds 3 images of an earlier call" in d2g("sample", *both, "--out", tmp_path).stderr
    )


def test_an_edit_goes_from_one_prompt_to_the_other_and_beyond(one: OneStepSampler, tmp_path: Path) -> None:
    """The ends are the images of both prompts from the same noise; files are rows of the grid."""
    from distill.exploration import save_edits

    facts = save_edits("x", one, "a red cube", "a blue sphere", [3, 4], [0.0, 1.0, 2.0], tmp_path)
    assert facts["images"] == 6 and (tmp_path / "edit.png").is_file()
    files = [np.asarray(Image.open(tmp_path / f"{number:05d}.png")).astype(int) for number in range(6)]
    for row, seed in enumerate((3, 4)):
        for column, prompt in enumerate(("a red cube", "a blue sphere")):
            start = noise(seed, range(1), one.student.latent_shape)
            expected = one.images(start, [prompt])[0].permute(1, 2, 0).numpy()
            assert np.abs(files[3 * row + column] - expected).max() <= 1
        assert np.abs(files[3 * row + 2] - files[3 * row + 1]).max() > 0
    classes = replace(one, conditioner=LabelConditioner(2, None))
    with pytest.raises(SettingError, match="takes no text to edit; use `d2g explore walk`"):
        save_edits("x", classes, "0", "1", [0], [0.0], tmp_path)


def test_walks_without_sense_are_refused(d2g: Any, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="two points"):
        walk_positions(1, 8)
    with pytest.raises(SettingError, match="--frames is 2, but the walk has 3 points"):
        walk_positions(3, 2)
    out = ["--student", "miniature", "--out", tmp_path / "out"]
    for words, message in (
        (
            ["walk", "--prompt", "a", "--prompt", "b", "--seed", 1, "--seed", 2, "--seed", 3],
            "2 prompts and 3",
        ),
        (["walk", "--prompt", "a", "--seed", 1, "--seed", 2, "--frames", 1], "--frames is 1"),
        (["styles", "--subject", "a", "--style", "b", "--template", "{subject}"], "expected {subject} and"),
        (["walk", "--seed", 1, "--seed", 2], "nothing to draw; give --prompt TEXT"),
        (["walk", "--seed", 1, "--seed", 2, "--psi", 0.5], "psi"),
    ):
        refused = d2g("explore", *words, *out)
        assert refused.code == 2 and message in refused.error
    refused = d2g("explore", "mix", "--student", "miniature", "--seed", 1, "--seed", 2, "--prompt", "a")
    assert refused.code == 2 and (
        "student miniature has no styles to mix; use `d2g explore edit` between prompts, or `d2g explore "
        "walk` between prompts or noises" in refused.error
    )
    assert not (tmp_path / "out").exists()
    words = ["walk", "--prompt", "a", "--prompt", "b", "--frames", 2, "--noise-scale", "1e300"]
    refused = d2g("explore", *words, *out)
    assert refused.code == 1 and "latents that are not finite" in refused.error
