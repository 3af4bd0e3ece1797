"""d2g.diffusion.single_file: a checkpoint in a single file becomes the pipeline that it was made of."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import tiny
import tiny_teachers
from d2g.core.errors import UserError
from d2g.core.seeds import noise
from d2g.diffusion import pretrained
from d2g.diffusion.single_file import NETWORK, import_single_file
from d2g.diffusion.teacher import load_teacher
from distill.export.original_names import original_clip, original_open_clip, original_unet, original_vae

PROMPTS = ["a red cube", "two green cones"]
Tensors = dict[str, Tensor]


def state(teacher: str, component: str) -> Tensors:
    weights: Tensors = pretrained.load_model(teacher, component).state_dict()
    return weights


def assert_equal_states(first: str | Path, second: str | Path, component: str) -> None:
    actual, expected = state(str(first), component), state(str(second), component)
    assert set(actual) == set(expected)
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def original_names(teacher: str, text: Callable[[str], Tensors]) -> Tensors:
    layers = pretrained.load_on_meta(teacher, "unet").config.layers_per_block
    weights = original_unet(state(teacher, "unet"), layers) | original_vae(state(teacher, "vae"))
    return {name: value.contiguous() for name, value in (weights | text(teacher)).items()}


def clip_names(teacher: str) -> Tensors:
    return original_clip(state(teacher, "text_encoder"), "cond_stage_model.")


def open_clip_names(teacher: str) -> Tensors:
    return original_open_clip(state(teacher, "text_encoder"), "cond_stage_model.model.")


def sdxl_names(teacher: str) -> Tensors:
    first = original_clip(state(teacher, "text_encoder"), "conditioner.embedders.0.")
    return first | original_open_clip(state(teacher, "text_encoder_2"), "conditioner.embedders.1.model.")


@pytest.fixture(scope="module")
def weights(teacher: Path) -> Tensors:
    return original_names(str(teacher), clip_names)


@pytest.fixture
def file(weights: Tensors, tmp_path: Path) -> Path:
    save_file(weights, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("family", ["SD 1.x", "SD 2.x", "SDXL"])
def test_an_imported_checkpoint_samples_as_its_pipeline(family: str, tmp_path: Path) -> None:
    """The configs come from another pipeline of that architecture, whose weights are others."""
    make, text = {
        "SD 1.x": (tiny.save_teacher, clip_names),
        "SD 2.x": (tiny.save_teacher, open_clip_names),
        "SDXL": (tiny_teachers.save_sdxl, sdxl_names),
    }[family]
    source, config = make(tmp_path / "source"), make(tmp_path / "config")
    for component in ("unet", "vae", "text_encoder"):
        for stale in (Path(config) / component).glob("*.safetensors"):
            stale.unlink()
    save_file(original_names(source, text), tmp_path / "model.safetensors")
    facts = import_single_file(tmp_path / "model.safetensors", tmp_path / "out", config)
    assert facts["dtype"] == "float32" and facts["config"] == config
    expected, imported = load_teacher(source), load_teacher(str(tmp_path / "out"))
    z = noise(3, range(2), expected.latent_shape)
    first, second = (t.sample(z, PROMPTS, 3, 2.5, "ddim") for t in (expected, imported))
    assert torch.equal(first, second) and imported.facts == expected.facts
    assert_equal_states(tmp_path / "out", source, "vae")


def test_a_ckpt_of_tensors_gives_the_same_teacher(
    d2g: Any, file: Path, weights: Tensors, teacher: Path, tmp_path: Path
) -> None:
    torch.save({"state_dict": weights, "global_step": 7}, tmp_path / "model.ckpt")
    digests = []
    for name in ("model.safetensors", "model.ckpt"):
        out = tmp_path / f"from-{name}"
        ended = d2g("teacher", "import", tmp_path / name, out, "--config", teacher, "--json")
        facts = ended.json
        assert facts["out"] == str(out) and facts["pipeline"] == "StableDiffusionPipeline"
        digests.append(facts["sha256"])
    assert digests[0] == digests[1]
    again = d2g("teacher", "import", file, out, "--config", teacher)
    assert again.code == 1 and "holds a pipeline; choose another OUT" in again.error


class Payload:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_a_ckpt_with_code_is_refused(form: str, weights: Tensors, teacher: Path, tmp_path: Path) -> None:
    target, file = tmp_path / "executed", tmp_path / "model.ckpt"
    content = {"state_dict": weights, "callbacks": Payload(target)}
    torch.save(content, file, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(UserError, match=r"is a pickle with more than tensors \(names .*mkdir\) and is not"):
        import_single_file(file, tmp_path / "out", str(teacher))
    assert not target.exists() and not (tmp_path / "out").exists()


def test_half_precision_stays(weights: Tensors, teacher: Path, tmp_path: Path) -> None:
    half = {name: value.half() for name, value in weights.items()}
    save_file(half, tmp_path / "half.safetensors")
    assert (
        import_single_file(tmp_path / "half.safetensors", tmp_path / "out", str(teacher))["dtype"]
        == "float16"
    )
    imported = state(str(tmp_path / "out"), "unet")
    for name, value in state(str(teacher), "unet").items():
        assert torch.equal(imported[name], value.half().float()), name


def test_the_moving_average_is_imported_where_a_file_holds_one(
    weights: Tensors, teacher: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """LDM names the average without the dots: sd-v1-4-full-ema.ckpt and v1-5-pruned.ckpt hold both."""
    plain = {name: value for name, value in weights.items() if name.startswith(NETWORK)}
    average = {f"model_ema.{name.removeprefix('model.').replace('.', '')}": v for name, v in plain.items()}
    counts = {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}
    trained = {name: value + 1 for name, value in plain.items()}
    save_file(weights | trained | average | counts, tmp_path / "both.safetensors")
    import_single_file(tmp_path / "both.safetensors", tmp_path / "out", str(teacher))
    assert_equal_states(tmp_path / "out", teacher, "unet")
    assert "moving average, which is imported" in caplog.text

    # A part of an average is no network.
    average.popitem()
    save_file(weights | trained | average, tmp_path / "part.safetensors")
    with pytest.raises(UserError, match=r"holds a part of a moving average \(no model_ema\.diffusion_model"):
        import_single_file(tmp_path / "part.safetensors", tmp_path / "part", str(teacher))


def test_an_autoencoder_that_the_file_lacks_comes_from_the_config(
    weights: Tensors, teacher: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "pruned.safetensors"
    save_file({n: v for n, v in weights.items() if not n.startswith("first_stage_model.")}, file)
    with caplog.at_level("INFO", logger="d2g"):
        import_single_file(file, tmp_path / "out", str(teacher))
    assert f"{file} holds no autoencoder; it is taken from {teacher}" in caplog.text
    assert_equal_states(tmp_path / "out", teacher, "vae")


def test_configs_come_from_the_hubs_cache(
    file: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    name = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    with pytest.raises(UserError, match=f"configs and tokenizers of {name} are neither .* give --config"):
        import_single_file(file, tmp_path / "out")
    repository = tmp_path / "cache" / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / ("0" * 40)
    shutil.copytree(teacher, snapshot, ignore=shutil.ignore_patterns("*.safetensors"))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    facts = import_single_file(file, tmp_path / "out")
    assert facts["config"] == name and facts["sha256"] == pretrained.weights_sha256(str(teacher))


def changed(**settings: Any) -> Callable[[Path], None]:
    """A config of another U-Net."""

    def edit(config: Path) -> None:
        text = config / "unet" / "config.json"
        text.write_text(json.dumps({**json.loads(text.read_text()), **settings}))

    return edit


MISFITS: dict[str, tuple[Callable[[Path], None], str]] = {
    "wider": (changed(block_out_channels=[16, 32]), r"does not fit the configs of .* got torch\.Size"),
    "deeper": (changed(layers_per_block=2), r"does not fit .* got torch\.Size\(.*\); give --config"),
    "fewer": (
        changed(transformer_layers_per_block=1, mid_block_type=None),
        r"does not fit the configs of .*: \d+ numbers for the U-Net, expected \d+",
    ),
    "inpainting": (changed(in_channels=9), "does not fit the configs of"),
    "no index": (
        lambda config: (config / "model_index.json").unlink(),
        "no model_index.json; expected a folder",
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_configs_of_another_model_are_refused(case: str, file: Path, teacher: Path, tmp_path: Path) -> None:
    edit, message = MISFITS[case]
    config = Path(shutil.copytree(teacher, tmp_path / "config"))
    edit(config)
    with pytest.raises(UserError, match=message) as caught:
        import_single_file(file, tmp_path / "out", str(config))
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def without(*names: str) -> Callable[[Tensors], Tensors]:
    return lambda weights: {n: v for n, v in weights.items() if not n.startswith(names)}


ONE = torch.zeros(1)
FILES: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "a LoRA": (lambda _: {"lora_unet_a.lora_down.weight": ONE}, "holds LoRA adapters"),
    "an autoencoder": (lambda _: {"decoder.conv_in.weight": ONE}, "is no checkpoint of Stable Diffusion"),
    "without text encoder": (without("cond_stage_model."), "is no checkpoint of Stable Diffusion"),
    "without a text weight": (
        without("cond_stage_model.transformer.text_model.final_layer_norm"),
        "no text_encoder weights",
    ),
    "without a U-Net weight": (
        without("model.diffusion_model.out.2"),
        "does not fit the configs of .*: it lacks weights; give",
    ),
    "an SDXL": (lambda w: {**w, "conditioner.embedders.0.x": ONE}, "is a checkpoint of a StableDiffusionXL"),
    "predicts v": (lambda w: {**w, "v_pred": ONE}, "is marked as v_pred, but the scheduler of"),
    "zero terminal SNR": (
        lambda w: {**w, "ztsnr": ONE},
        r"is marked as ztsnr .* ends at alpha\^2 = .* says rescale_betas_zero_snr=true",
    ),
    "nothing": (lambda _: {}, "holds no tensors"),
}


@pytest.mark.parametrize("case", FILES)
def test_other_files_are_refused(case: str, weights: Tensors, teacher: Path, tmp_path: Path) -> None:
    change, message = FILES[case]
    save_file(change(weights), tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=message) as caught:
        import_single_file(tmp_path / "x.safetensors", tmp_path / "out", str(teacher))
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_damaged_files_are_refused(file: Path, teacher: Path, tmp_path: Path) -> None:
    data = file.read_bytes()
    cases = {
        "cut.safetensors": (data[: len(data) // 2], "cannot be read"),
        "empty.safetensors": (b"", "cannot be read"),
        "empty.ckpt": (b"", "cannot be read"),
        "page.ckpt": (b"<html>", "cannot be read|is a pickle"),
        "pickle.ckpt": (pickle.dumps([1, 2], protocol=2), "cannot be read|is a pickle"),
        "model.txt": (data, "no such checkpoint; expected a file that ends in .safetensors, .ckpt"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=message) as caught:
            import_single_file(tmp_path / name, tmp_path / "out", str(teacher))
        assert "\n" not in str(caught.value), name
