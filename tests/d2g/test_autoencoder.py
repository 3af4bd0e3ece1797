"""d2g.diffusion.pretrained.load_autoencoder: a VAE folder or the VAE of a pipeline."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny

from d2g.core.errors import UserError
from d2g.diffusion import pretrained
from d2g.diffusion.latents import encode, latent_space


def test_vae_folder_and_pipeline_give_the_same_autoencoder(teacher: Path) -> None:
    from_folder, from_pipeline = (
        pretrained.load_autoencoder(str(path)) for path in (teacher / "vae", teacher)
    )
    pairs = zip(from_folder.parameters(), from_pipeline.parameters(), strict=True)
    assert all(torch.equal(a, b) and not a.requires_grad for a, b in pairs) and not from_folder.training
    assert latent_space(from_folder).scale == pytest.approx(0.7)
    digests = {pretrained.autoencoder_sha256(str(path)) for path in (teacher / "vae", teacher)}
    assert len(digests) == 1 and len(digests.pop()) == 64


def test_each_row_may_have_its_own_generator(teacher: Path) -> None:
    vae = pretrained.load_autoencoder(str(teacher))
    pixels = torch.rand(3, 3, 16, 16) * 2 - 1
    rngs = [torch.Generator().manual_seed(seed) for seed in (4, 5, 6)]
    batch = encode(vae, pixels, rngs)
    single = encode(vae, pixels[1:2], torch.Generator().manual_seed(5))
    torch.testing.assert_close(batch[1:2], single)
    assert not torch.allclose(batch, encode(vae, pixels))


def test_autoencoder_tiny_has_no_latent_scale(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    torch.manual_seed(0)
    widths = {"encoder_block_out_channels": (8, 8, 8), "decoder_block_out_channels": (8, 8, 8)}
    blocks = {"num_encoder_blocks": (1, 1, 1), "num_decoder_blocks": (1, 1, 1)}
    tiny = AutoencoderTiny(latent_channels=3, **widths, **blocks)
    tiny.save_pretrained(tmp_path)
    vae = pretrained.load_autoencoder(str(tmp_path))
    assert caplog.text == ""  # no warning of an attribute that diffusers itself wrote
    pixels = torch.rand(1, 3, 16, 16) * 2 - 1
    assert latent_space(vae).downscale == 4 and latent_space(vae).channels == 3
    torch.testing.assert_close(encode(vae, pixels), tiny.encode(pixels).latents)


def test_unsupported_autoencoders_are_refused(teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is a UNet2DConditionModel; supported: AutoencoderKL, "):
        pretrained.load_autoencoder(str(teacher / "unet"))
    with pytest.raises(UserError, match=r"no model_index\.json"):
        pretrained.load_autoencoder(str(tmp_path))
    shutil.copytree(teacher / "vae", tmp_path / "vae")
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match=r"autoencoder .*vae cannot be loaded"):
        pretrained.load_autoencoder(str(tmp_path / "vae"))
    (tmp_path / "vae" / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is damaged \(Expecting property name"):
        pretrained.load_autoencoder(str(tmp_path / "vae"))
    (tmp_path / "vae" / "config.json").write_text(json.dumps({}))
    with pytest.raises(UserError, match="is a None; supported"):
        pretrained.load_autoencoder(str(tmp_path / "vae"))
