"""eval.runner.samplers: an image depends only on its number and seed; errors name the image."""

import json
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import tiny
from d2g.core.errors import SettingError, UserError
from d2g.diffusion.teacher import load_teacher
from d2g.vision.weights import file_sha256
from distill.sampling import load_checkpoint, untrained_one_step
from distill.student_files import student_folder
from eval.images.resize import NATIVE
from eval.measure.source import ImageSource
from eval.runner.samplers import (
    SamplingRequest,
    checkpoints,
    ode_source,
    one_step_source,
    pipeline_source,
    student_source,
)
from exported import save_run

REQUEST = SamplingRequest(prompts=tiny.CAPTIONS[:4], seed=3)


def images(source: ImageSource, numbers: range, batch_size: int = 64) -> Tensor:
    return torch.cat([batch.views[NATIVE] for batch in source.draw(numbers, batch_size, (NATIVE,))])


def sources(teacher: Path) -> dict[str, ImageSource]:
    name = str(teacher)
    return {
        "student": one_step_source("naive", untrained_one_step(name), REQUEST),
        "teacher": ode_source(load_teacher(name), REQUEST, steps=3, guidance=2.0),
        "pipeline": pipeline_source(name, REQUEST, steps=3, guidance=2.0),
    }


def test_an_image_depends_only_on_its_number(teacher: Path) -> None:
    """The batch size may change the last bit of a convolution: single pixels differ by one gray level."""
    for name, source in sources(teacher).items():
        one_batch = images(source, range(7)).int()
        components = torch.cat([images(source, range(3), 2), images(source, range(3, 7), 3)]).int()
        assert (one_batch - components).abs().max() <= 1 and (
            one_batch != components
        ).float().mean() < 0.01, name
        assert (source.image(5).int() - one_batch[5]).abs().max() <= 1, name
        assert len({image.numpy().tobytes() for image in one_batch}) == 7, "images of different noise differ"
        assert source.count is None and source.facts["seed"] == 3


def test_prompts_are_used_cyclically(teacher: Path) -> None:
    (batch,) = sources(teacher)["student"].draw(range(2, 10), 64, (NATIVE, "crop4-box"))
    assert batch.prompts == [tiny.CAPTIONS[i % 4] for i in range(2, 10)] and batch.first == 2
    assert batch.views[NATIVE].shape == (8, 3, 16, 16) and batch.views["crop4-box"].shape == (8, 3, 4, 4)


def test_the_pipeline_and_our_solver_give_the_same_images(teacher: Path) -> None:
    """From the same noise, the diffusers pipeline gives the images of our ODE solver."""
    both = sources(teacher)
    a, b = (images(both[name], range(4)).int() for name in ("teacher", "pipeline"))
    assert (a - b).abs().max() <= 1


def test_different_samplers_have_different_facts(teacher: Path) -> None:
    name = str(teacher)
    one_step, loaded = untrained_one_step(name), load_teacher(name)
    facts = [
        ode_source(loaded, REQUEST, steps=3).facts,
        ode_source(loaded, REQUEST, steps=4).facts,
        ode_source(loaded, REQUEST, steps=3, guidance=1.0).facts,
        ode_source(loaded, replace(REQUEST, seed=4), steps=3).facts,
        ode_source(loaded, replace(REQUEST, prompts=["x"]), steps=3).facts,
        one_step_source("naive", one_step, REQUEST).facts,
        one_step_source("naive", one_step, REQUEST, noise_scale=0.5).facts,
        pipeline_source(name, REQUEST, steps=3).facts,
    ]
    assert len({repr(sorted(fact.items())) for fact in facts}) == len(facts)


def test_a_smaller_noise_scale_gives_less_diverse_images(teacher: Path) -> None:
    one_step = untrained_one_step(str(teacher))
    full, half, none = (
        images(
            one_step_source("x", one_step, replace(REQUEST, prompts=["a"]), noise_scale=scale), range(8)
        ).float()
        for scale in (1.0, 0.5, 0.0)
    )
    assert full.std(0).mean() > half.std(0).mean() > none.std(0).mean() == 0


def test_the_error_names_an_image_that_is_not_finite(teacher: Path) -> None:
    """As of a VAE that overflows in half precision."""
    broken = load_teacher(str(teacher))
    bias = broken.network.conv_out.bias
    bias.data.fill_(float("nan"))
    with pytest.raises(
        UserError, match=rf"image 2 \('{tiny.CAPTIONS[2]}'\) is not finite; try precision fp32"
    ):
        images(ode_source(broken, REQUEST, steps=2), range(2, 5))


def test_invalid_pipelines_and_requests_are_refused(teacher: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(teacher, folder)
    (folder / "model_index.json").write_text("{}")
    with pytest.raises(UserError, match=rf"pipeline {folder} cannot be loaded"):
        pipeline_source(str(folder), REQUEST)
    for index in ({"_class_name": ["own", "Own"]}, {"_class_name": "DiTPipeline", "vae": ["own", "Own"]}):
        (folder / "model_index.json").write_text(json.dumps(index))
        (folder / "vae" / "own.py").write_text("")
        with pytest.raises(UserError, match=rf"pipeline {folder} has classes of its own, whose code"):
            pipeline_source(str(folder), REQUEST)
    with pytest.raises(SettingError, match="precision is 'fp8'; expected fp32, bf16, fp16"):
        SamplingRequest(prompts=["a"], precision="fp8")
    with pytest.raises(SettingError, match="there is no prompt to draw"):
        SamplingRequest(prompts=[])
    with pytest.raises(UserError, match="holds no checkpoint; give a run of `d2g distill`"):
        checkpoints(str(tmp_path))


def test_unconditional_and_class_pipelines(tmp_path: Path) -> None:
    """The DDPM pipeline of diffusers takes no prompts, no guidance, and one generator per image."""
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
        "the noise of each step also depends on the image number only"
    )
    with pytest.raises(SettingError, match="takes no guidance_scale; leave it out"):
        pipeline_source(str(tmp_path), SamplingRequest(prompts=[""]), steps=4, guidance=2.0)


def test_the_parts_of_each_sampler_for_latency(teacher: Path) -> None:
    for name, source in sources(teacher).items():
        assert source.parts is not None
        parts = source.parts(2)
        expected = ["pipeline"] if name == "pipeline" else ["text", "network", "decoder"]
        assert list(parts) == expected
        for call in parts.values():
            call()


def test_a_run_that_goes_on_gives_the_images_of_the_recorded_weights(teacher: Path, tmp_path: Path) -> None:
    """A training saves checkpoints while an evaluation loads the student."""
    run = save_run(tmp_path / "run", str(teacher))
    first = student_folder(run)[0]
    weights = load_file(first / "ema.safetensors")
    for number in range(8, 400, 4):
        later = shutil.copytree(first, tmp_path / "later" / f"{number:09d}")
        save_file(
            {name: value * (1 + number / 800) for name, value in weights.items()}, later / "ema.safetensors"
        )
    done = threading.Event()

    def go_on() -> None:
        for folder in sorted((tmp_path / "later").iterdir()):
            folder.rename(first.with_name(folder.name))
            done.wait(0.01)

    training = threading.Thread(target=go_on)
    training.start()
    source = student_source(run, REQUEST)
    done.set()
    training.join()
    recorded = [
        folder
        for folder in checkpoints(run)
        if file_sha256(folder / "ema.safetensors") == source.facts["weights_sha256"]
    ]
    expected = load_checkpoint(run, recorded[0], str(teacher))(REQUEST.prompts, seed=REQUEST.seed)
    assert torch.equal(images(source, range(4)), expected)
