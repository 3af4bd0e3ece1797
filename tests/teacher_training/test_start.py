"""Teachers that start from a given autoencoder or from another teacher."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import tiny
from d2g.core.errors import UserError
from d2g.diffusion import pretrained
from d2g.diffusion.autoencoders import load_taesd, open_autoencoder
from d2g.diffusion.latents import decode, encode
from d2g.diffusion.teacher import load_teacher
from own_pictures import CONFIG, image_folder
from teacher_training.train import train_teacher


@pytest.fixture(scope="module")
def taesd(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """Random weights of an AutoencoderTiny in TAESD's own two files, and the autoencoder."""
    from diffusers import AutoencoderTiny

    folder = tmp_path_factory.mktemp("taesd")
    torch.manual_seed(0)
    vae = AutoencoderTiny().eval()
    for part, shift in (("encoder", 0), ("decoder", 1)):
        tensors = {}
        for key, value in getattr(vae, part).layers.state_dict().items():
            number, _, rest = key.partition(".")
            tensors[f"{int(number) + shift}.{rest}"] = value.bfloat16().contiguous()
        save_file(tensors, folder / f"taesd_{part}.safetensors")
    # What the files hold: weights rounded to bf16.
    for parameter in vae.parameters():
        parameter.data = parameter.data.bfloat16().float()
    return folder, vae


def test_taesd_files_load_into_the_class_of_diffusers(taesd: tuple[Path, Any]) -> None:
    folder, expected = taesd
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    for name in (folder, folder / "taesd"):
        vae = open_autoencoder(str(name))
        latents = encode(vae, images)
        with torch.no_grad():
            assert torch.equal(latents, expected.encode(images).latents)
            assert torch.equal(decode(vae, latents), expected.decode(latents).sample)
    assert latents.shape == (2, 4, 2, 2) and not any(p.requires_grad for p in vae.parameters())


def test_other_autoencoders_open_and_wrong_ones_are_refused(
    teacher: Path, taesd: tuple[Path, Any], tmp_path: Path
) -> None:
    for name in (teacher, teacher / "vae"):
        assert type(open_autoencoder(str(name))).__name__ == "AutoencoderKL"
    with pytest.raises(
        UserError, match=r"autoencoder nobody/none: no such folder here, and as a hub id it can"
    ):
        open_autoencoder("nobody/none")
    with pytest.raises(UserError, match=r"autoencoder .* is a UNet2DConditionModel; supported: Autoencoder"):
        open_autoencoder(str(teacher / "unet"))
    encoder = taesd[0] / "taesd_encoder.safetensors"
    with pytest.raises(UserError, match=r"are no TAESD weights: "):
        load_taesd(encoder, encoder)


def test_a_teacher_with_a_given_autoencoder(taesd: tuple[Path, Any], tmp_path: Path) -> None:
    """It is saved as it is, not trained, and the teacher's latents are its own."""
    (tmp_path / "data").mkdir()
    image_folder(tmp_path / "data")
    config = replace(CONFIG, data=str(tmp_path / "data"), pretrained_vae=str(taesd[0]))
    summary = train_teacher(config, tmp_path / "teacher", ("vae", "unet"))
    teacher = load_teacher(str(tmp_path / "teacher"))
    assert teacher.latent_shape == (4, 2, 2) and teacher.space.downscale == 8
    saved, given = pretrained.load_vae(str(tmp_path / "teacher")).state_dict(), taesd[1].state_dict()
    assert all(torch.equal(saved[key], given[key]) for key in given) and saved.keys() == given.keys()
    assert summary.scores["vae"]["psnr"] > 0 and summary.trained is False
    # The same run again is finished; another autoencoder is refused.
    before = summary.scores
    (tmp_path / "link").symlink_to(tmp_path / "data")
    again = replace(config, data=str(tmp_path / "link"), pretrained_vae=f"{taesd[0]}/")
    assert train_teacher(again, tmp_path / "teacher", ("vae", "unet")).scores == before
    with pytest.raises(UserError, match=r"another config: pretrained_vae"):
        train_teacher(replace(config, pretrained_vae="x"), tmp_path / "teacher", ("vae",))


def test_the_size_must_fit_a_given_autoencoder(taesd: tuple[Path, Any], tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    image_folder(tmp_path / "data")
    config = replace(CONFIG, data=str(tmp_path / "data"), pretrained_vae=str(taesd[0]), size=20)
    with pytest.raises(UserError, match=r"size is 20, but autoencoder .* of 8 pixels; give --set size=16"):
        train_teacher(config, tmp_path / "teacher", ("vae",))


def test_a_teacher_that_starts_from_another(teacher: Path, tmp_path: Path) -> None:
    """Its networks begin with the weights of `init`; autoencoder and tokenizer are those of `init`."""
    (tmp_path / "data").mkdir()
    image_folder(tmp_path / "data")
    fit = replace(CONFIG.unet.fit, images=16, lr=1e-12)  # one step that changes nothing
    unet = replace(CONFIG.unet, fit=fit)
    config = replace(CONFIG, data=str(tmp_path / "data"), init=str(teacher), unet=unet)
    out = tmp_path / "further"
    summary = train_teacher(config, out, ("vae", "unet"))
    for load in (pretrained.load_unet, pretrained.load_vae):
        start, end = load(str(teacher)).state_dict(), load(str(out)).state_dict()
        for key, value in start.items():
            torch.testing.assert_close(end[key], value, rtol=0, atol=1e-8)
    texts = [
        pretrained.load_conditioner(str(name)).encode(["a red cube"]).tensors["hidden"]
        for name in (teacher, out)
    ]
    torch.testing.assert_close(texts[0], texts[1], rtol=0, atol=1e-5)
    assert summary.params == sum(p.numel() for p in pretrained.load_unet(str(teacher)).parameters())


def test_an_init_that_cannot_be_trained_is_refused(teacher: Path, tmp_path: Path) -> None:
    import shutil

    (tmp_path / "data").mkdir()
    image_folder(tmp_path / "data")
    velocity = shutil.copytree(teacher, tmp_path / "velocity")
    file = velocity / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"prediction_type": "v_prediction"}))
    config = replace(CONFIG, data=str(tmp_path / "data"), init=str(velocity))
    with pytest.raises(UserError, match=r"predicts v_prediction; expected a teacher that predicts epsilon"):
        train_teacher(config, tmp_path / "out", ("vae",))
    with pytest.raises(UserError, match=r"no such folder; give a folder in diffusers layout or a hub id"):
        train_teacher(replace(config, init="none here"), tmp_path / "out", ("vae",))
    # Latents of other channels than the U-Net's.
    wide = tmp_path / "wide"
    tiny.save_teacher(wide, latent_channels=8)
    config = replace(config, init=str(teacher), pretrained_vae=str(wide / "vae"))
    with pytest.raises(
        UserError, match=r"takes latents of 4 channels, the autoencoder .* makes 8; leave --vae"
    ):
        train_teacher(config, tmp_path / "out2", ("vae", "unet"))
