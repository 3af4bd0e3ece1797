"""eval.runner.samplers: an image is a function of its number, whoever draws it, and broken ones are named."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import tiny
from d2g.core.errors import SettingError, UserError
from d2g.diffusion.teacher import load_teacher
from distill.sampling import untrained_one_step
from eval.images.resize import NATIVE
from eval.measure.source import ImageSource
from eval.runner.samplers import SamplingRequest, checkpoints, ode_source, one_step_source, pipeline_source

DRAWING = SamplingRequest(prompts=tiny.CAPTIONS[:4], seed=3)


def images(source: ImageSource, numbers: range, batch_size: int = 64) -> Tensor:
    return torch.cat([drawn.views[NATIVE] for drawn in source.draw(numbers, batch_size, (NATIVE,))])


def sources(teacher: Path) -> dict[str, ImageSource]:
    name = str(teacher)
    return {
        "student": one_step_source("naive", untrained_one_step(name), DRAWING),
        "teacher": ode_source(load_teacher(name), DRAWING, steps=3, guidance=2.0),
        "pipeline": pipeline_source(name, DRAWING, steps=3, guidance=2.0),
    }


def test_an_image_is_a_function_of_its_number(teacher: Path) -> None:
    """Other batches round the last bit of a convolution elsewhere: one grey level, here and there."""
    for name, source in sources(teacher).items():
        one_batch = images(source, range(7)).int()
        components = torch.cat([images(source, range(3), 2), images(source, range(3, 7), 3)]).int()
        assert (one_batch - components).abs().max() <= 1 and (
            one_batch != components
        ).float().mean() < 0.01, name
        assert (source.image(5).int() - one_batch[5]).abs().max() <= 1, name
        assert len({image.numpy().tobytes() for image in one_batch}) == 7, "other noise, other image"
        assert source.count is None and source.facts["seed"] == 3


def test_prompts_go_round(teacher: Path) -> None:
    (drawn,) = sources(teacher)["student"].draw(range(2, 10), 64, (NATIVE, "crop4-box"))
    assert drawn.prompts == [tiny.CAPTIONS[i % 4] for i in range(2, 10)] and drawn.first == 2
    assert drawn.views[NATIVE].shape == (8, 3, 16, 16) and drawn.views["crop4-box"].shape == (8, 3, 4, 4)


def test_pipeline_and_teacher_agree_on_the_same_noise(teacher: Path) -> None:
    """diffusers' own sampler, called as a whole, gives the image that our ODE gives."""
    both = sources(teacher)
    a, b = (images(both[name], range(4)).int() for name in ("teacher", "pipeline"))
    assert (a - b).abs().max() <= 1


def test_facts_tell_samplers_apart(teacher: Path) -> None:
    name = str(teacher)
    one, loaded = untrained_one_step(name), load_teacher(name)
    facts = [
        ode_source(loaded, DRAWING, steps=3).facts,
        ode_source(loaded, DRAWING, steps=4).facts,
        ode_source(loaded, DRAWING, steps=3, guidance=1.0).facts,
        ode_source(loaded, replace(DRAWING, seed=4), steps=3).facts,
        ode_source(loaded, replace(DRAWING, prompts=["x"]), steps=3).facts,
        one_step_source("naive", one, DRAWING).facts,
        one_step_source("naive", one, DRAWING, noise_scale=0.5).facts,
        pipeline_source(name, DRAWING, steps=3).facts,
    ]
    assert len({repr(sorted(fact.items())) for fact in facts}) == len(facts)


def test_truncation_draws_from_less_noise(teacher: Path) -> None:
    one = untrained_one_step(str(teacher))
    full, half, none = (
        images(
            one_step_source("x", one, replace(DRAWING, prompts=["a"]), noise_scale=scale), range(8)
        ).float()
        for scale in (1.0, 0.5, 0.0)
    )
    assert full.std(0).mean() > half.std(0).mean() > none.std(0).mean() == 0


def test_an_image_that_is_not_finite_is_named(teacher: Path) -> None:
    """A VAE that overflows, say, in half precision."""
    broken = load_teacher(str(teacher))
    bias = broken.network.conv_out.bias
    bias.data.fill_(float("nan"))
    with pytest.raises(
        UserError, match=rf"image 2 \('{tiny.CAPTIONS[2]}'\) is not finite; try precision fp32"
    ):
        images(ode_source(broken, DRAWING, steps=2), range(2, 5))


def test_what_a_pipeline_does_not_take_is_refused(teacher: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(teacher, folder)
    (folder / "model_index.json").write_text("{}")
    with pytest.raises(UserError, match=rf"pipeline {folder} cannot be loaded"):
        pipeline_source(str(folder), DRAWING)
    with pytest.raises(SettingError, match="precision is 'fp8'; expected fp32, bf16, fp16"):
        SamplingRequest(prompts=["a"], precision="fp8")
    with pytest.raises(SettingError, match="there is no prompt to draw"):
        SamplingRequest(prompts=[])
    with pytest.raises(UserError, match="holds no checkpoint; give a run of `d2g distill`"):
        checkpoints(str(tmp_path))


def test_unconditional_and_class_pipelines(tmp_path: Path) -> None:
    """diffusers' DDPM takes no prompts and no guidance, and a generator for each image."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    DDPMPipeline(unet, DDPMScheduler(num_train_timesteps=10)).save_pretrained(tmp_path)
    source = pipeline_source(str(tmp_path), SamplingRequest(prompts=[""]), steps=4)
    one_batch = images(source, range(4)).int()
    assert (one_batch - images(source, range(4), 3).int()).abs().max() <= 1, (
        "ancestral noise is per image too"
    )
    with pytest.raises(SettingError, match="takes no guidance_scale; leave it out"):
        pipeline_source(str(tmp_path), SamplingRequest(prompts=[""]), steps=4, guidance=2.0)


def test_latency_has_its_parts(teacher: Path) -> None:
    for name, source in sources(teacher).items():
        assert source.parts is not None
        parts = source.parts(2)
        wanted = ["pipeline"] if name == "pipeline" else ["text", "network", "decoder"]
        assert list(parts) == wanted
        for call in parts.values():
            call()
