"""teacher_training.cascade: all parts of a tiny Wuerstchen, from captioned images to images from text."""

import io
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import tiny_teachers
from d2g.core.errors import SettingError, UserError
from d2g.core.seeds import generator
from d2g.diffusion import cascade_files
from d2g.diffusion.latents import encode, from_uint8
from d2g.diffusion.teacher_sampler import SolverSettings, load_sampler
from own_pictures import CASCADE, CASCADE_FIT, SIZE, image_folder, make_image
from teacher_training.cascade.compressor import SemanticCompressor
from teacher_training.cascade.config import CompressorConfig, StageBConfig
from teacher_training.cascade.stages import SCHEDULE, CaptionTable, stage_c_loss
from teacher_training.cascade.train import train_cascade
from teacher_training.data import captioned_images


@pytest.mark.slow
def test_a_cascade_from_captioned_images(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    image_folder(tmp_path / "data")
    config, out = replace(CASCADE, data=str(tmp_path / "data")), tmp_path / "cascade"
    with pytest.raises(UserError, match=r"model\.safetensors is missing; train stage_b first"):
        train_cascade(config, out, ("vqgan", "stage_c"))
    summary = train_cascade(config, out)
    assert summary.images == 40 and list(summary.parts) == ["vqgan", "stage_b", "stage_c"]
    # Both stages are teachers: text -> latents of the compressor -> latents of the VQGAN.
    sampler = load_sampler(summary.stage_b, SolverSettings(steps=2, prior=summary.stage_c, prior_steps=2))
    assert sampler.prior is not None and sampler.prior.teacher.latent_shape == (3, 2, 2)
    assert sampler.latents(0, range(2), ["a red disc", "a blue box"]).shape == (2, 4, 4, 4)
    # Again: nothing is trained. A longer stage C goes on, other parts must keep their length.
    before = (out / "stage_b" / "decoder" / "diffusion_pytorch_model.safetensors").stat().st_mtime_ns
    assert train_cascade(config, out).parts == summary.parts
    longer = replace(config, stage_c=replace(config.stage_c, fit=replace(CASCADE_FIT, images=48)))
    assert train_cascade(longer, out).parts["stage_c"]["length"] == 48
    assert (out / "stage_b" / "decoder" / "diffusion_pytorch_model.safetensors").stat().st_mtime_ns == before
    for part in ("vqgan", "stage_b"):
        longer_part = replace(getattr(config, part), fit=replace(CASCADE_FIT, images=48))
        changed = replace(config, **{part: longer_part})
        with pytest.raises(UserError, match=f"{part} in .* is finished with 32 images, the settings ask"):
            train_cascade(changed, out)


def test_latents_of_a_vqgan_of_a_sorted_folder_have_unit_variance(tmp_path: Path) -> None:
    """The first 1,024 pictures are plain."""
    rows = []
    for number in range(2048):
        image = make_image(number)[0] if number >= 1024 else Image.new("RGB", (SIZE, SIZE), "gray")
        image.save(buffer := io.BytesIO(), "PNG")
        rows.append({"image": {"bytes": buffer.getvalue()}, "caption": f"a picture {number % 7}"})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    config = replace(CASCADE, data=str(tmp_path / "train.parquet"), images=2048)
    train_cascade(config, tmp_path / "cascade", ("vqgan",))
    vqgan = cascade_files.load_vqgan(tmp_path / "cascade" / "vqgan")
    images, _ = captioned_images(config.data, SIZE, 2048, 0, "a {}")
    with torch.no_grad():
        latents = torch.cat([encode(vqgan, from_uint8(part)) for part in images.split(256)])
    assert latents.std().item() == pytest.approx(1.0, abs=0.05)


def test_the_compressor_normalizes_its_latents() -> None:
    torch.manual_seed(0)
    compressor = SemanticCompressor(CompressorConfig(channels=(8, 16), latent_channels=5)).eval()
    pixels = from_uint8(torch.randint(0, 256, (64, 3, 16, 16), dtype=torch.uint8))
    compressor.set_statistics(pixels)
    latents = compressor(pixels)
    assert latents.shape == (64, 5, 4, 4)
    variance, mean = torch.var_mean(latents, dim=(0, 2, 3))
    torch.testing.assert_close(mean, torch.zeros(5), atol=1e-4, rtol=0)
    torch.testing.assert_close(variance, torch.ones(5), atol=1e-2, rtol=0)


def test_stage_c_starts_with_its_input_as_the_prediction() -> None:
    """Then the loss has a closed form: the weighted error of x_t as epsilon."""
    network = cascade_files.new_prior(c_in=3, c=16, c_cond=8, depth=1, nhead=2)
    latents, text = torch.randn(6, 3, 2, 2), torch.randn(2, 4, 8)
    captions = CaptionTable(text, torch.tensor([0, 1, 0, 1, 0, 1]), torch.zeros(1, 4, 8))
    rows = [5, 0, 2, 2]
    loss, _ = stage_c_loss(network, latents, captions, 0.5)(rows, generator(1))
    rng = generator(1)
    noise, t = torch.randn(4, 3, 2, 2, generator=rng), 1000 * torch.rand(4, generator=rng)
    bar = SCHEDULE.alpha_bar(t).float().view(-1, 1, 1, 1)
    error = bar.sqrt() * latents[rows] + (1 - bar).sqrt() * noise - noise
    expected = ((1 - bar) / (1 + bar) * error.square()).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
    # Dropped rows have the empty prompt.
    cond = captions.conditioning(rows, torch.tensor([True, False, False, True])).tensors["hidden"]
    assert torch.equal(cond[0], torch.zeros(4, 8)) and torch.equal(cond[1], text[0])


def test_stage_b_starts_with_weights_of_its_layers() -> None:
    """diffusers' constructor shrinks them to nothing."""
    network = cascade_files.new_decoder(
        c_hidden=[8, 16], nhead=[-1, 2], blocks=[1, 1], level_config=["CT", "CTA"], inject_effnet=[True] * 2
    )
    weights = [p for n, p in network.named_parameters() if n.endswith("channelwise.4.weight")]
    assert len(weights) == 4 and all(p.std() > 0.05 for p in weights)


def test_settings_and_text_encoders_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="size is 24; expected a multiple of 16, the downscaling"):
        replace(CASCADE, size=24)
    with pytest.raises(SettingError, match="channels is"):
        StageBConfig(channels=(8, 12), head_width=8)
    cascade = tiny_teachers.save_cascade_prior(tmp_path / "c")
    with pytest.raises(UserError, match="but a cascade takes one CLIP text encoder; name a teacher of"):
        cascade_files.frozen_text(cascade)
