"""d2g.diffusion.teacher against diffusers' StableDiffusionPipeline; behavior of all families."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

import tiny
import tiny_teachers
from d2g.core.errors import SettingError, UserError
from d2g.core.seeds import noise
from d2g.diffusion.schedule import Point
from d2g.diffusion.solvers import guided
from d2g.diffusion.teacher import Teacher, check_solver, describe_teacher, load_teacher

SHAPE = (4, 4, 4)

# Steps divide 1000, without linspace: otherwise diffusers leaves its grid (next = t - 1000 // steps).
CASES: dict[str, dict[str, Any]] = {
    "epsilon, as SD 1.5 is": dict(
        prediction_type="epsilon", timestep_spacing="leading", set_alpha_to_one=False
    ),
    "epsilon, trailing": dict(prediction_type="epsilon", timestep_spacing="trailing", set_alpha_to_one=True),
    "v, as SD 2.1 is": dict(
        prediction_type="v_prediction", timestep_spacing="leading", set_alpha_to_one=False
    ),
    "v from zero terminal SNR": dict(
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        set_alpha_to_one=True,
        rescale_betas_zero_snr=True,
    ),
    "sample, leading": dict(prediction_type="sample", timestep_spacing="leading", set_alpha_to_one=True),
}


@pytest.fixture(scope="module", params=list(CASES))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("teachers") / "teacher"
    tiny.save_teacher(out, **CASES[request.param])
    return out


def pipeline_latents(
    folder: Path, latents: Tensor, prompts: list[str], steps: int, **settings: Any
) -> Tensor:
    """diffusers' StableDiffusionPipeline on the same noise."""
    pipe = tiny_teachers.diffusers_pipeline(folder)
    assert type(pipe).__name__ == "StableDiffusionPipeline" and pipe.scheduler.init_noise_sigma == 1.0
    images: Tensor = pipe(
        prompt=prompts, latents=latents, num_inference_steps=steps, output_type="latent", **settings
    ).images
    return images


def test_pairs_equal_diffusers_pipeline(folder: Path) -> None:
    teacher = load_teacher(str(folder), final_alpha="teacher")
    z, prompts = noise(0, range(3), SHAPE), tiny.CAPTIONS[:3]
    for guidance, rescale in ((3.0, 0.0), (1.0, 0.0), (5.0, 0.7)):
        result = teacher.sample(z, prompts, 8, guidance, "ddim", rescale)
        expected = pipeline_latents(folder, z, prompts, 8, guidance_scale=guidance, guidance_rescale=rescale)
        assert result.abs().max() > 0.5
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_every_spacing_equals_diffusers_ddim(teacher: Path, spacing: Any) -> None:
    """Reference: a loop with diffusers' scheduler, whose step leaves the linspace grid and only gives x_0."""
    loaded = load_teacher(str(teacher), spacing=spacing, final_alpha="teacher")
    reference = DDIMScheduler.from_pretrained(teacher / "scheduler", timestep_spacing=spacing)
    reference.set_timesteps(5)
    cond = loaded.encode(["a red cube"]).tensors["hidden"]
    x = z = noise(0, [0], SHAPE)
    grid = [*reference.timesteps.tolist(), -1]
    with torch.no_grad():
        for t, after in pairwise(grid):
            step = reference.step(epsilon := loaded.network(x, t, cond).sample, t, x)
            bar = reference.alphas_cumprod[after] if after >= 0 else reference.final_alpha_cumprod
            x = bar.sqrt() * step.pred_original_sample + (1 - bar).sqrt() * epsilon
            if spacing != "linspace":
                torch.testing.assert_close(x, step.prev_sample)
    result = loaded.sample(z, ["a red cube"], 5, 1.0, "ddim")
    torch.testing.assert_close(result, x, rtol=0, atol=1e-4)


def with_scheduler(teacher: Path, folder: Path, **settings: Any) -> Path:
    """A copy of the teacher with other settings in scheduler_config.json."""
    shutil.copytree(teacher, folder)
    tiny_teachers.edit(folder, "scheduler/scheduler_config.json", **settings)
    return folder


def test_final_alpha_one_drops_the_last_steps_noise(teacher: Path, tmp_path: Path) -> None:
    """Overriding SD's set_alpha_to_one=False equals a pipeline whose scheduler has True."""
    sd = with_scheduler(teacher, tmp_path / "sd", set_alpha_to_one=False)
    one = with_scheduler(teacher, tmp_path / "one", set_alpha_to_one=True)
    z, prompts = noise(0, range(2), SHAPE), tiny.CAPTIONS[:2]
    expected = pipeline_latents(one, z, prompts, 4, guidance_scale=3.0)
    result = load_teacher(str(sd), final_alpha="one").sample(z, prompts, 4, 3.0, "ddim")
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-4)
    unchanged = load_teacher(str(sd), final_alpha="teacher").sample(z, prompts, 4, 3.0, "ddim")
    assert (unchanged - expected).abs().max() > 1e-3


def test_spacing_overrides_the_schedulers(teacher: Path, tmp_path: Path) -> None:
    trailing = with_scheduler(teacher, tmp_path / "trailing", timestep_spacing="trailing")
    z = noise(0, range(2), SHAPE)
    result = load_teacher(str(teacher), spacing="trailing").sample(z, ["a", "b"], 4, 3.0, "ddim")
    assert torch.equal(result, load_teacher(str(trailing)).sample(z, ["a", "b"], 4, 3.0, "ddim"))
    assert not torch.equal(result, load_teacher(str(teacher)).sample(z, ["a", "b"], 4, 3.0, "ddim"))


@pytest.mark.parametrize("t", [0, 500, 981])
def test_x0_and_epsilon_from_every_prediction(folder: Path, t: int) -> None:
    """alpha x0 + sigma eps = x and, for v, v = alpha eps - sigma x0: solved for x0 from the raw output."""
    teacher = load_teacher(str(folder))
    x, cond = noise(1, range(2), SHAPE), teacher.encode(tiny.CAPTIONS[:2])
    raw = teacher.network(x, t, cond.tensors["hidden"]).sample
    assert not isinstance(teacher.schedule.prediction, tuple)
    point = Point(t, *teacher.schedule.alpha_sigma(t))  # type: ignore[union-attr]
    x0 = {
        "epsilon": (x - point.sigma * raw) / point.alpha,
        "v_prediction": point.alpha * x - point.sigma * raw,
        "sample": raw,
    }[teacher.schedule.prediction]
    result = teacher.denoiser(cond, 1.0)(x, point)
    torch.testing.assert_close(result.x0, x0, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(point.alpha * x0 + point.sigma * result.epsilon, x, rtol=0, atol=5e-5)


class Calls:
    """Records batch sizes and text inputs of every network evaluation."""

    def __init__(self, unet: nn.Module) -> None:
        self.rows: list[int] = []
        self.text: list[Tensor] = []
        unet.register_forward_hook(self._see, with_kwargs=True)

    def _see(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self.rows.append(len(args[0]))
        self.text.append(args[2] if len(args) > 2 else kwargs["encoder_hidden_states"])


@pytest.fixture
def record_calls(teacher: Path) -> tuple[Teacher, Calls]:
    loaded = load_teacher(str(teacher))
    return loaded, Calls(loaded.network)


def test_without_guidance_a_step_is_one_evaluation(record_calls: tuple[Teacher, Calls]) -> None:
    teacher, calls = record_calls
    teacher.sample(noise(0, range(3), SHAPE), ["a", "b", "c"], 4, 1.0, "ddim")
    assert calls.rows == [3] * 4
    teacher.sample(noise(0, range(3), SHAPE), ["a", "b", "c"], 4, 2.0, "ddim")
    assert calls.rows[4:] == [6] * 4
    teacher.sample(noise(0, range(3), SHAPE), ["a", "b", "c"], 4, 1.0, "heun")
    assert calls.rows[8:] == [3] * 7


def test_the_unconditional_branch_is_the_encoded_empty_string(record_calls: tuple[Teacher, Calls]) -> None:
    teacher, calls = record_calls
    prompts = ["a red cube", "a blue sphere", "a red cube"]
    teacher.sample(noise(0, range(3), SHAPE), prompts, 1, 3.0, "ddim")
    empty, text = calls.text[0].chunk(2)
    torch.testing.assert_close(empty, teacher.encode([""]).tensors["hidden"].expand_as(empty))
    torch.testing.assert_close(text, teacher.encode(prompts).tensors["hidden"])
    assert (text[0] - text[1]).abs().max() > 1e-3


def test_each_distinct_prompt_is_encoded_once(teacher: Path) -> None:
    loaded = load_teacher(str(teacher))
    batch_sizes: list[int] = []
    loaded.encoders[0].register_forward_hook(lambda module, args, output: batch_sizes.append(len(args[0])))
    prompts = ["a", "b", "a", "a"]
    result = loaded.sample(noise(0, range(4), SHAPE), prompts, 2, 3.0, "ddim")
    assert batch_sizes == [3], "a, b and the empty prompt"
    cond = loaded.encode(["a", "b"])[[0, 1, 0, 0]]
    loaded.encoders[0].to("meta")  # the encoder must not be used again
    for row in range(4):
        single = loaded.sample(noise(0, [row], SHAPE), [], 2, 3.0, "ddim", cond=cond[[row]])
        torch.testing.assert_close(single, result[row : row + 1], rtol=0, atol=1e-5)


def test_conditions_are_selected_by_position(teacher: Path) -> None:
    cond = load_teacher(str(teacher)).encode(["a", "b"])
    assert len(cond) == 2 and len(cond[[1, 1, 0]]) == 3
    assert torch.equal(cond[[1]].tensors["hidden"][0], cond.tensors["hidden"][1])
    assert torch.equal(cond[[1]].null["hidden"], cond.null["hidden"])
    assert len(cond[[]]) == 0
    with pytest.raises(IndexError, match="positions 0 to 2 of 2 rows"):
        cond[[0, 2]]


@pytest.mark.parametrize("solver", ["ddim", "heun"])
def test_a_row_does_not_depend_on_its_batch(folder: Path, solver: Any) -> None:
    teacher, prompts = load_teacher(str(folder)), tiny.CAPTIONS[:4]
    batch = teacher.sample(noise(0, range(4), SHAPE), prompts, 4, 2.0, solver)
    for row in (0, 3):
        single = teacher.sample(noise(0, [row], SHAPE), prompts[row : row + 1], 4, 2.0, solver)
        torch.testing.assert_close(single[0], batch[row], rtol=1e-5, atol=1e-5)
    assert batch.isfinite().all()


def test_latents_are_updated_in_fp32_with_bf16_networks(teacher: Path) -> None:
    """Only the network's output is in bf16: the reference is diffusers' scheduler on fp32 latents."""
    half = load_teacher(str(teacher), precision="bf16")
    assert {p.dtype for m in (half.network, *half.encoders) for p in m.parameters()} == {torch.bfloat16}
    z, cond = noise(0, range(2), SHAPE), half.encode(["a", "b"])
    reference = DDIMScheduler.from_pretrained(teacher / "scheduler")
    reference.set_timesteps(4)
    x, hidden = z, cond.with_null().tensors["hidden"]
    for t in reference.timesteps:
        with torch.no_grad():
            raw = half.network(torch.cat([x, x]).bfloat16(), t, hidden).sample.float()
        empty, text = raw.chunk(2)
        x = reference.step(guided(text, empty, 3.0), t, x).prev_sample
    result = half.sample(z, ["a", "b"], 4, 3.0, "ddim")
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, x, rtol=0, atol=1e-5)
    full = load_teacher(str(teacher)).sample(z, ["a", "b"], 4, 3.0, "ddim")
    assert 0 < (result - full).abs().max() < 0.2 * full.abs().max()


def test_the_network_may_be_replaced(teacher: Path) -> None:
    """As by torch.compile: a wrapper that only forwards calls to the module."""

    class Wrapper(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.inner(*args, **kwargs)

    loaded, z = load_teacher(str(teacher)), noise(0, range(2), SHAPE)
    wrapped = replace(loaded, network=Wrapper(loaded.network))
    result = wrapped.sample(z, ["a", "b"], 2, 3.0, "ddim")
    assert torch.equal(result, loaded.sample(z, ["a", "b"], 2, 3.0, "ddim"))


def test_an_unknown_precision_is_refused(teacher: Path) -> None:
    with pytest.raises(SettingError, match=r"unknown precision 'float16'; .*fp16"):
        load_teacher(str(teacher), precision="float16")


def test_invalid_settings_are_refused_before_sampling(teacher: Path, tmp_path: Path) -> None:
    loaded = load_teacher(str(teacher))
    check_solver(loaded, "ddim", 50, 3.0, 0.7)
    check_solver(loaded, "heun", 18)
    for solver, steps, guidance, rescale, says in (
        ("euler", 50, 1.0, 0.0, "solver is 'euler', but teacher .* take ddim or heun"),
        ("ddim", 2000, 1.0, 0.0, "steps is 2000; expected 1 to 1000"),
        ("ddim", 50, 3.0, 1.5, "guidance_rescale is 1.5; expected 0"),
        ("ddim", 50, 1.0, 0.7, "guidance_rescale is 0.7, but guidance 1 leaves nothing to rescale"),
    ):
        with pytest.raises(SettingError, match=says) as caught:
            check_solver(loaded, solver, steps, guidance, rescale)
        assert "\n" not in str(caught.value)
    flawed = with_scheduler(
        teacher, tmp_path / "flawed", rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )
    with pytest.raises(
        UserError, match=r"predicts epsilon, but starts at zero terminal SNR \(timestep 999\)"
    ):
        check_solver(load_teacher(str(flawed)), "ddim", 50)
    check_solver(load_teacher(str(flawed), spacing="leading"), "ddim", 50)


SIZES: list[tuple[Callable[[Path], str], list[tuple[int, int]], tuple[int, int], str]] = [
    (tiny.save_teacher, [(5, 5), (3, 8)], (0, 4), "0x4; .* takes multiples of 1"),
    (tiny_teachers.save_sd3, [(16, 16), (6, 2)], (5, 4), "5x4; .* takes multiples of 2"),
    (tiny_teachers.save_sd3, [], (4, 18), "4x18; .* takes 16 at most"),
    (tiny_teachers.save_dit, [(6, 6)], (7, 7), "7x7; .* takes multiples of 2"),
    (tiny_teachers.save_pixels, [(10, 12)], (9, 8), "9x8; .* takes multiples of 2"),
]


@pytest.mark.parametrize(("save", "good", "bad", "says"), SIZES)
def test_unsupported_sizes_are_refused(
    tmp_path: Path, save: Callable[[Path], str], good: list[tuple[int, int]], bad: tuple[int, int], says: str
) -> None:
    loaded = load_teacher(save(tmp_path))
    prompt = {"text": "a", "label": "1", "none": ""}[loaded.conditioning]
    for size in good:
        check_solver(loaded, loaded.default_solver, 1, size=size)
        z = noise(0, [0], (loaded.latent_shape[0], *size))
        assert loaded.sample(z, [prompt], 1, 1.0, loaded.default_solver).shape == z.shape
    with pytest.raises(SettingError, match=f"latent size is {says}"):
        check_solver(loaded, loaded.default_solver, 1, size=bad)
    with pytest.raises((RuntimeError, ValueError)):  # the network itself raises these
        z = torch.zeros(1, loaded.latent_shape[0], *bad)
        loaded.sample(z, [prompt], 1, 1.0, loaded.default_solver)


UNSUPPORTED: dict[str, tuple[str, dict[str, Any], str]] = {
    "inpainting": ("unet/config.json", dict(in_channels=9), "takes 9 channels, but latents have 4"),
    "two outputs": ("unet/config.json", dict(out_channels=5), "gives 5 channels; expected 4, or 8"),
    "a guidance-distilled UNet": (
        "unet/config.json",
        dict(time_cond_proj_dim=8),
        "has time_cond_proj_dim=8, which StableDiffusionPipeline never feeds",
    ),
    "a UNet without a size": ("unet/config.json", dict(sample_size=None), "has no sample_size"),
    "a UNet of SDXL": (
        "unet/config.json",
        dict(addition_embed_type="text", cross_attention_dim=16),
        "addition_embed_type=text; a StableDiffusionPipeline expects None",
    ),
    "a text encoder with masks": (
        "text_encoder/config.json",
        dict(use_attention_mask=True),
        "text_encoder has use_attention_mask",
    ),
    "a scale per channel": ("vae/config.json", dict(latents_mean=[0.0] * 4), "latents_mean and latents_std"),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_unsupported_networks_are_refused_before_weights_are_read(
    case: str, teacher: Path, tmp_path: Path
) -> None:
    file, values, says = UNSUPPORTED[case]
    folder = Path(shutil.copytree(teacher, tmp_path / "teacher"))
    tiny_teachers.edit(folder, file, **values)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match=says) as caught:
        load_teacher(str(folder))
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_a_teacher_describes_itself(folder: Path) -> None:
    result, loaded = describe_teacher(str(folder)), load_teacher(str(folder), final_alpha="teacher")
    assert result["pipeline"] == "StableDiffusionPipeline" and result["latent_shape"] == [4, 4, 4]
    assert result["latent_space"] == {"channels": 4, "downscale": 4, "scale": 0.7, "shift": 0.0}
    assert result["conditioning"] == {
        "kind": "text",
        "guidance": True,
        "encoders": {"text_encoder": "CLIPTextModel"},
        "num_labels": 0,
    }
    assert result["params"]["unet"] == sum(p.numel() for p in loaded.network.parameters())
    assert result["params"]["text_encoder"] == sum(p.numel() for p in loaded.encoders[0].parameters())
    schedule, defaults = loaded.schedule, result["solver_defaults"]
    assert result["prediction_type"] == schedule.prediction and defaults["solver"] == "ddim"
    assert (defaults["spacing"], defaults["final_alpha_one"]) == (schedule.spacing, schedule.final_alpha_one)
    assert defaults["train_steps"] == 1000 and len(result["sha256"]) == 64
    assert (
        result["facts"]
        == loaded.facts
        == {
            "pipeline": "StableDiffusionPipeline",
            "prediction_type": schedule.prediction,
            "steps_offset": 1,
            "no_prompt": "the empty prompt",
        }
    )


def test_describing_reads_no_weights(teacher: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(teacher, tmp_path / "teacher"))
    before = describe_teacher(str(folder))
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    assert {**describe_teacher(str(folder)), "sha256": ""} == {**before, "sha256": ""}
