"""d2g.diffusion.pretrained: the loaders on a tiny teacher, and one-line errors for broken teachers."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

import tiny
import tiny_teachers
from d2g.core.errors import UserError
from d2g.core.seeds import noise
from d2g.diffusion import pretrained
from d2g.diffusion.families.sd import SDConditioner
from d2g.diffusion.families.unet import attention_parameters

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def broken(teacher: Path, tmp_path: Path) -> Path:
    """A copy of the teacher to break."""
    return Path(shutil.copytree(teacher, tmp_path / "broken"))


def change_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.fixture(scope="module")
def pipeline(teacher: Path) -> Any:
    result = StableDiffusionPipeline.from_pretrained(teacher)
    result.set_progress_bar_config(disable=True)
    return result


@torch.no_grad()
def test_components_equal_those_of_the_pipeline(teacher: Path, pipeline: Any) -> None:
    name, prompts = str(teacher), ["a red cube", "two green cones", ""]
    text = pretrained.load_conditioner(name)
    theirs, _ = pipeline.encode_prompt(prompts, "cpu", 1, False)
    hidden = text.encode(prompts).tensors["hidden"]
    torch.testing.assert_close(hidden, theirs)
    assert hidden.shape == (3, 12, 16)
    x = noise(0, [0, 1, 2], (4, 4, 4))
    torch.testing.assert_close(
        pretrained.load_unet(name)(x, 981, hidden).sample, pipeline.unet(x, 981, hidden).sample
    )
    pixels = torch.zeros(1, 3, 16, 16)
    torch.testing.assert_close(
        pretrained.load_vae(name).encode(pixels).latent_dist.mean,
        pipeline.vae.encode(pixels).latent_dist.mean,
    )


def test_models_are_frozen_in_eval_mode_and_in_the_requested_dtype(teacher: Path) -> None:
    unet = pretrained.load_unet(str(teacher), torch.bfloat16)
    text, vae = pretrained.load_conditioner(str(teacher)), pretrained.load_vae(str(teacher))
    assert {p.dtype for p in unet.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in (*text.parameters(), *vae.parameters())} == {torch.float32}
    for module in (unet, text, vae):
        assert not module.training and not any(p.requires_grad for p in module.parameters())


def test_schedule_is_read_from_the_file(teacher: Path, broken: Path) -> None:
    schedule = pretrained.load_schedule(str(teacher))
    assert (len(schedule), schedule.prediction, schedule.spacing) == (1000, "epsilon", "leading")
    assert schedule.steps_offset == 1 and schedule.final_alpha_one
    assert float(schedule.alphas_cumprod[999]) == pytest.approx(0.0046601, rel=1e-4)
    change_json(
        broken / "scheduler" / "scheduler_config.json",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        set_alpha_to_one=False,
        rescale_betas_zero_snr=True,
    )
    schedule = pretrained.load_schedule(str(broken))
    assert (schedule.prediction, schedule.spacing, schedule.final_alpha_one) == (
        "v_prediction",
        "trailing",
        False,
    )
    assert float(schedule.alphas_cumprod[999]) == pytest.approx(0, abs=1e-7)


def test_tokenizer_round_trip_padding_and_truncation(teacher: Path) -> None:
    text = pretrained.load_conditioner(str(teacher))
    assert isinstance(text, SDConditioner)
    tokenizer = text.tokenizers["tokenizer"]
    ids = text.tokens(tiny.CAPTIONS)
    assert ids.shape == (len(tiny.CAPTIONS), 12)
    ids_of_captions = tokenizer(tiny.CAPTIONS).input_ids  # not truncated
    decoded = tokenizer.batch_decode(ids_of_captions, skip_special_tokens=True)
    assert [" ".join(d.split()).replace(" ,", ",") for d in decoded] == tiny.CAPTIONS
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert (ids[:, 0] == begin).all() and (ids[:, -1] == end).all()
    assert int(ids.max()) == end, "the text model pools at the highest id"
    long = text.tokens(["red " * 40])
    assert long.shape == (1, 12) and int(long[0, -1]) == end
    assert len(set(map(tuple, ids.tolist()))) == len(tiny.CAPTIONS)
    unknown = text.tokens(["Ünïcode 🟥 7"])
    assert not torch.equal(unknown, text.tokens([""])), "unknown bytes still have tokens"


def test_attention_parameter_names_are_those_of_the_attention_blocks(teacher: Path) -> None:
    unet = pretrained.load_unet(str(teacher))
    expected = {
        f"{path}.{name}"
        for path, module in unet.named_modules()
        if type(module).__name__ == "Transformer2DModel"
        for name, _ in module.named_parameters()
    }
    names = attention_parameters(unet)
    assert names == expected and any("attn2" in n for n in names)
    assert names < {n for n, _ in unet.named_parameters()}


def test_fingerprint_depends_on_the_weights_only(teacher: Path, broken: Path) -> None:
    same = pretrained.weights_sha256(str(teacher))
    assert pretrained.weights_sha256(str(broken)) == same
    (broken / "README.md").write_text("a note")
    (broken / "unet" / ".cache").mkdir()
    assert pretrained.weights_sha256(str(broken)) == same
    digests = {same}
    for component, name in (
        ("unet", "diffusion_pytorch_model.safetensors"),
        ("vae", "diffusion_pytorch_model.safetensors"),
        ("text_encoder", "model.safetensors"),
        ("tokenizer", "tokenizer.json"),
        ("scheduler", "scheduler_config.json"),
    ):
        path = broken / component / name
        data = bytearray(path.read_bytes())
        data[-3] ^= 1
        path.write_bytes(data)
        digests.add(pretrained.weights_sha256(str(broken)))
    assert len(digests) == 6


def test_a_missing_folder_and_a_folder_of_something_else(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such folder; give a folder in diffusers layout or a hub id"):
        pretrained.load_unet(str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"no model_index\.json; expected a folder in diffusers layout"):
        pretrained.load_unet(str(tmp_path))


def test_a_failed_hub_download_is_reported() -> None:
    with pytest.raises(UserError, match=r"teacher nobody/nothing: .*cannot be fetched") as caught:
        pretrained.resolve("nobody/nothing")
    assert "\n" not in str(caught.value)


LOADERS = {
    "unet": pretrained.load_unet,
    "vae": pretrained.load_vae,
    "text_encoder": pretrained.load_conditioner,
    "tokenizer": pretrained.load_tokenizer,
    "scheduler": pretrained.load_schedule,
}


@pytest.mark.parametrize("component", sorted(LOADERS))
def test_a_missing_component_is_reported(broken: Path, component: str) -> None:
    shutil.rmtree(broken / component)
    with pytest.raises(
        UserError, match=rf"no {component}; expected the components unet, vae.*; found .*"
    ) as caught:
        LOADERS[component](str(broken))
    assert "\n" not in str(caught.value)


def test_a_component_of_another_class_is_refused(broken: Path) -> None:
    change_json(broken / "model_index.json", unet=["diffusers", "FluxTransformer2DModel"])
    with pytest.raises(UserError, match="unet is a FluxTransformer2DModel; supported: UNet2DConditionModel"):
        pretrained.load_unet(str(broken))


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
def test_damaged_weights_are_reported(broken: Path, component: str) -> None:
    (path,) = (broken / component).glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=rf"{component} cannot be loaded") as caught:
        LOADERS[component](str(broken))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
def test_weights_that_lack_a_tensor_are_refused(broken: Path, component: str) -> None:
    """diffusers and transformers would initialize it randomly with a warning."""
    (path,) = (broken / component).glob("*.safetensors")
    tensors = load_file(path)
    removed = sorted(tensors)[3]
    save_file({k: v for k, v in tensors.items() if k != removed}, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"{component} cannot be loaded: its weights lack .*{removed[-10:]}"):
        LOADERS[component](str(broken))


def test_attention_with_old_parameter_names_is_loaded(tmp_path: Path) -> None:
    """As in the VAE of SD 1.5: no tensor counts as missing or stays random."""
    vae = pretrained.new_vae(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    tiny_teachers.save_dit(tmp_path, classes=2)
    vae.save_pretrained(tmp_path / "vae")
    path, old = tmp_path / "vae" / "diffusion_pytorch_model.safetensors", {}
    for name, tensor in load_file(path).items():
        for now, then in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            name = name.replace(now, then)
        old[name] = tensor
    assert any("query" in name for name in old)
    save_file(old, path, metadata={"format": "pt"})
    result = pretrained.load_vae(str(tmp_path)).state_dict()
    assert all(torch.equal(result[name], tensor) for name, tensor in vae.state_dict().items())


def test_a_meta_model_has_the_shapes_of_the_model(teacher: Path) -> None:
    for component in ("unet", "vae", "text_encoder"):
        bare, loaded = (
            pretrained.load_on_meta(str(teacher), component),
            pretrained.load_model(str(teacher), component),
        )
        assert {p.device.type for p in bare.parameters()} == {"meta"}
        shapes = ({name: p.shape for name, p in m.named_parameters()} for m in (bare, loaded))
        assert next(shapes) == next(shapes) and type(bare) is type(loaded)


def test_class_and_unconditional_conditioners(teacher: Path, tmp_path: Path) -> None:
    classes = tiny_teachers.save_pixels(tmp_path / "classes", classes=10)
    nothing = tiny_teachers.save_ldm(tmp_path / "nothing")
    labels = pretrained.load_conditioner(classes).encode(["9", "0"]).tensors["class_labels"]
    assert labels.dtype == torch.int64 and labels.tolist() == [9, 0]
    assert len(pretrained.load_conditioner(nothing).encode(["", "", ""])) == 3
    with pytest.raises(UserError, match="prompt '10': expected a class number, 0 to 9"):
        pretrained.load_conditioner(classes).encode(["1", "10"])
    with pytest.raises(UserError, match="prompt 'a cat': this teacher is unconditional; expected none"):
        pretrained.load_conditioner(nothing).encode(["", "a cat"])
    tiny_teachers.edit(Path(classes), "model_index.json", null_class=9)
    with pytest.raises(UserError, match="prompt '9': expected a class number, 0 to 8"):
        pretrained.load_conditioner(classes).encode(["9"])
    assert pretrained.default_prompts(classes) == [str(i) for i in range(9)]
    assert pretrained.default_prompts(nothing) == [""] and pretrained.default_prompts(str(teacher)) == []


@pytest.mark.slow
def test_equal_captions_give_equal_tokenizers_in_every_process(tmp_path: Path) -> None:
    code = (
        "import sys, tiny; from pathlib import Path; from d2g.diffusion.pretrained import new_tokenizer; "
        "new_tokenizer(tiny.CAPTIONS, Path(sys.argv[1]), 320, 12)"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    command = [sys.executable, "-c", code, str(tmp_path / "other")]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    pretrained.new_tokenizer(tiny.CAPTIONS, tmp_path / "this", 320, 12)
    texts = [(tmp_path / process / "tokenizer.json").read_bytes() for process in ("other", "this")]
    assert texts[0] == texts[1]
