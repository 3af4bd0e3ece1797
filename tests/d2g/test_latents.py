"""d2g.diffusion.latents: encoding, decoding and rounding as in diffusers, with the latent scale."""

from typing import Any

import pytest
import torch
from diffusers import AutoencoderTiny
from diffusers.image_processor import VaeImageProcessor

from d2g.core.seeds import generator, noise
from d2g.diffusion.latents import (
    LatentSpace,
    decode,
    decode_uint8,
    encode,
    from_uint8,
    latent_space,
    to_uint8,
)
from d2g.diffusion.pretrained import new_vae


@pytest.fixture(scope="module")
def kl() -> Any:
    torch.manual_seed(0)
    return new_vae(
        sample_size=16,
        latent_channels=4,
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=4,
        scaling_factor=0.7,
        shift_factor=0.25,
    ).eval()


@pytest.fixture(scope="module")
def taesd() -> Any:
    torch.manual_seed(0)
    return AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
    ).eval()


PIXELS = noise(0, [0, 1], (3, 16, 16)).clamp(-1, 1)


def test_scaled_and_raw_are_inverse() -> None:
    space = LatentSpace(channels=4, downscale=8, scale=0.13025, shift=0.5)
    raw = noise(0, [0], (4, 2, 2))
    torch.testing.assert_close(space.raw(space.scaled(raw)), raw)
    torch.testing.assert_close(space.scaled(raw), (raw - 0.5) * 0.13025)


def test_latent_space_is_read_from_the_vae(kl: Any, taesd: Any) -> None:
    assert latent_space(kl) == LatentSpace(channels=4, downscale=4, scale=0.7, shift=0.25)
    assert latent_space(taesd) == LatentSpace(channels=4, downscale=4, scale=1.0, shift=0.0)


@torch.no_grad()
def test_kl_encodes_and_decodes_as_diffusers_pipelines_do(kl: Any) -> None:
    latents = encode(kl, PIXELS)
    torch.testing.assert_close(latents, (kl.encode(PIXELS).latent_dist.mean - 0.25) * 0.7)
    assert latents.shape == (2, 4, 4, 4) and latents.dtype == torch.float32
    torch.testing.assert_close(decode(kl, latents), kl.decode(latents / 0.7 + 0.25).sample)


@torch.no_grad()
def test_kl_samples_the_posterior_from_the_given_generator(kl: Any) -> None:
    one, same, other = (encode(kl, PIXELS, generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)
    spread = kl.encode(PIXELS).latent_dist.std * 0.7
    assert ((one - encode(kl, PIXELS)).abs() <= 5 * spread).all()


@torch.no_grad()
def test_taesd_latents_need_no_scale(taesd: Any) -> None:
    latents = encode(taesd, PIXELS)
    torch.testing.assert_close(latents, taesd.encode(PIXELS).latents)
    torch.testing.assert_close(decode(taesd, latents), taesd.decode(latents).sample)


@torch.no_grad()
def test_a_tiny_autoencoder_with_a_scale_is_scaled_as_in_diffusers_pipelines(taesd: Any) -> None:
    scaled = AutoencoderTiny.from_config(taesd.config, scaling_factor=0.7, shift_factor=0.25).eval()
    latents = encode(scaled, PIXELS)
    torch.testing.assert_close(latents, (scaled.encode(PIXELS).latents - 0.25) * 0.7)
    torch.testing.assert_close(decode(scaled, latents), scaled.decode(latents / 0.7 + 0.25).sample)


def test_decode_is_differentiable(kl: Any) -> None:
    latents = noise(3, [0], (4, 4, 4)).requires_grad_(True)
    decode(kl, latents).sum().backward()
    assert latents.grad is not None and latents.grad.isfinite().all() and latents.grad.abs().sum() > 0


@torch.no_grad()
def test_half_precision_vaes_have_fp32_inputs_and_outputs(taesd: Any) -> None:
    half = AutoencoderTiny.from_config(taesd.config).eval()
    half.load_state_dict(taesd.state_dict())
    half.to(torch.bfloat16)
    latents = encode(half, PIXELS)
    assert latents.dtype == decode(half, latents).dtype == torch.float32
    torch.testing.assert_close(latents, encode(taesd, PIXELS), atol=0.1, rtol=0.1)


def test_rounding_equals_diffusers_image_processor() -> None:
    pixels = torch.linspace(-1.2, 1.2, 3 * 64 * 64).view(1, 3, 64, 64)
    theirs = VaeImageProcessor.numpy_to_pil(
        VaeImageProcessor.pt_to_numpy(VaeImageProcessor.denormalize(pixels))
    )[0]
    ours = to_uint8(pixels)[0].permute(1, 2, 0)
    assert torch.equal(ours, torch.tensor(list(theirs.tobytes()), dtype=torch.uint8).view(64, 64, 3))


def test_uint8_round_trip_is_exact() -> None:
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(to_uint8(from_uint8(images)), images)
    assert from_uint8(images).min() == -1 and from_uint8(images).max() == 1


def test_large_images_are_decoded_a_few_at_a_time(kl: Any) -> None:
    """SD's autoencoder takes 0.75 GiB for an image of 512 px: 64 of them would not fit beside a training."""
    latents = noise(5, range(10), (4, 128, 128))
    sizes: list[int] = []
    hook = kl.decoder.register_forward_hook(lambda module, args, output: sizes.append(len(output)))
    try:
        with torch.no_grad():
            pixels = decode(kl, latents)
            decode(kl, latents[:, :, :4, :4])
            torch.testing.assert_close(pixels[9:], decode(kl, latents[9:]), atol=1e-3, rtol=1e-3)
    finally:
        hook.remove()
    assert pixels.shape == (10, 3, 512, 512) and sizes == [8, 2, 10, 1]
    # With a graph all rows stay in memory anyway.
    small = latents[:2, :, :4, :4].requires_grad_()
    decode(kl, small).sum().backward()
    assert small.grad is not None


@pytest.mark.slow
def test_large_images_are_encoded_a_few_at_a_time(kl: Any) -> None:
    """As they are decoded: 64 images of 1024 px take SD's autoencoder 160 GiB."""
    pixels = noise(5, range(10), (3, 512, 512)).clamp(-1, 1)
    sizes: list[int] = []
    hook = kl.encoder.register_forward_hook(lambda module, args, output: sizes.append(len(output)))

    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(row) for row in range(10)]

    try:
        with torch.no_grad():
            latents = encode(kl, pixels)
            sampled = encode(kl, pixels, generators())
            last = encode(kl, pixels[9:], generators()[9:])
            encode(kl, pixels, torch.Generator())
    finally:
        hook.remove()
    assert latents.shape == (10, 4, 128, 128) and not torch.equal(latents, sampled)
    torch.testing.assert_close(sampled[9:], last, atol=1e-3, rtol=1e-3)
    assert sizes == [8, 2, 8, 2, 1, 10], "one generator draws for all rows at once"


def test_decode_uint8_streams_any_number_of_rows(kl: Any) -> None:
    latents = noise(4, range(5), (4, 4, 4))
    batches = list(decode_uint8(kl, latents, batch_size=2))
    assert [len(batch) for batch in batches] == [2, 2, 1]
    images = torch.cat(batches)
    with torch.no_grad():
        expected = to_uint8(decode(kl, latents))
    assert images.shape == (5, 3, 16, 16) and images.dtype == torch.uint8
    assert (images.int() - expected.int()).abs().max() <= 1, "batch size changes the last bit at most"
