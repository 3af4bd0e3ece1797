"""distill.losses.clip_guidance: the formula, transformers as judge, real runs of both stages, refusals."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import tiny
import tiny_teachers
import vision_models
from d2g.core.config import override
from d2g.core.errors import SettingError, UserError
from d2g.diffusion.latents import decode
from d2g.vision.normalization import OPENAI
from d2g.vision.transformers_vision import clip_sha256
from d2g_cli.distill import _warn_of_scoring_clip
from distill.config.clip_guidance import ClipGuidanceConfig
from distill.losses.clip_guidance import build_clip_guidance, spherical_distance, text_cross_entropy
from distill.planning.memory import predict
from distill.planning.unused_settings import refuse_unused
from distill.student_files import guiding_clip
from distill.training.train import train
from jobs import d2g, d2g_ranks, distill_arguments, distill_config, make_pairs, succeed
from runs import losses, state_at


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    return vision_models.save_clip_model(tmp_path_factory.mktemp("clip"))


def test_the_distance_is_the_squared_angle() -> None:
    angles = torch.tensor([0.0, 0.5, 1.5, 3.0])
    image = torch.stack([angles.cos(), angles.sin()], 1).requires_grad_()
    distance = spherical_distance(image, torch.tensor([1.0, 0.0]).expand(4, 2))
    torch.testing.assert_close(distance, angles.square(), rtol=1e-4, atol=1e-5)
    distance.sum().backward()
    assert image.grad is not None and image.grad.isfinite().all()


def test_the_contrastive_loss_in_closed_form() -> None:
    """An image at the angle a of its own text, with others at right angles and opposite."""
    angle, scale = torch.tensor(0.7), 3.0
    image = torch.stack([angle.cos(), angle.sin()])[None].requires_grad_()
    texts = torch.tensor([[0.0, 1.0], [1.0, 0.0], [-1.0, 0.0]])
    loss = text_cross_entropy(image, texts[1:2], texts, scale)
    own, right, opposite = ((scale * x).exp() for x in (angle.cos(), angle.sin(), -angle.cos()))
    torch.testing.assert_close(loss, -(own / (own + right + opposite)).log()[None])
    # Its gradient is s (sum_n p_n text_n - text).
    (slope,) = torch.autograd.grad(loss.sum(), image)
    shares = torch.stack([right, own, opposite]) / (own + right + opposite)
    torch.testing.assert_close(slope[0], scale * (shares @ texts - texts[1]))
    # With the own text alone the loss is 0.
    assert text_cross_entropy(image, texts[1:2], texts[1:2], scale).abs() < 1e-6


def test_the_contrastive_form_is_the_loss_of_transformers(teacher: Path, clip: str) -> None:
    """Cross entropy of the logits of CLIPModel, with its own temperature, among all texts of the batch."""
    from transformers import CLIPModel

    config = ClipGuidanceConfig(weight=0.2, model=clip, crop=16, form="contrastive")
    guide = build_clip_guidance(config, str(teacher))
    assert guide is not None
    latents, prompts = torch.randn(3, 4, 4, 4).requires_grad_(), tiny.CAPTIONS[:3]
    texts = guide.encode(prompts)
    net = CLIPModel.from_pretrained(clip)
    tokens = guide.tokenizer(prompts, padding=True, return_tensors="pt")
    mean, deviation = (torch.tensor(s).view(3, 1, 1) for s in OPENAI)
    size = net.config.vision_config.image_size
    pixels = F.interpolate(decode(guide.vae, latents), (size, size), mode="bilinear", antialias=True)
    logits = net(pixel_values=(pixels / 2 + 0.5 - mean) / deviation, **tokens).logits_per_image
    rows = F.cross_entropy(logits, torch.arange(3), reduction="none")
    places = torch.zeros(3, 2)
    torch.testing.assert_close(guide(latents, texts, places), rows.mean(), rtol=1e-4, atol=1e-5)
    # Rows of a micro-batch are compared with all texts.
    part = guide(latents[1:], texts[1:], places[1:], texts)
    torch.testing.assert_close(part, rows[1:].mean(), rtol=1e-4, atol=1e-5)
    (slope,) = torch.autograd.grad(part, latents)
    assert (slope[1:].flatten(1).abs().sum(1) > 0).all() and (slope[0] == 0).all()


def test_guidance_is_the_angle_of_transformers_embeddings(teacher: Path, clip: str) -> None:
    """The crop of 16 px of a 32 px image, decoded alone."""
    from transformers import CLIPModel

    config = ClipGuidanceConfig(weight=0.2, model=clip, crop=16)
    guide = build_clip_guidance(config, str(teacher))
    assert guide is not None and build_clip_guidance(ClipGuidanceConfig(), str(teacher)) is None
    latents = torch.randn(2, 4, 8, 8).requires_grad_()
    prompts, places = tiny.CAPTIONS[:2], torch.tensor([[0.0, 0.0], [0.999, 0.999]])
    text = guide.encode(prompts)
    value = guide(latents, text, places)
    crops = torch.stack([latents[0, :, :4, :4], latents[1, :, 4:, 4:]])
    mean, deviation = (
        torch.tensor(s).view(3, 1, 1)
        for s in ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    )
    net = CLIPModel.from_pretrained(clip)
    tokens = guide.tokenizer(prompts, padding=True, return_tensors="pt")
    pixels = (decode(guide.vae, crops) / 2 + 0.5 - mean) / deviation
    cosine = net(pixel_values=pixels, **tokens).logits_per_image.diagonal() / net.logit_scale.exp()
    torch.testing.assert_close(value, cosine.arccos().square().mean(), rtol=1e-4, atol=1e-5)
    (slope,) = torch.autograd.grad(value, latents)
    assert (slope[0, :, :4, :4] != 0).any() and (slope[0, :, 4:] == 0).all()


@pytest.mark.slow
def test_guided_runs_resume_bit_for_bit(teacher: Path, clip: str, tmp_path: Path) -> None:
    """In the regression stage, as in the second."""
    pairs = make_pairs(teacher, tmp_path)
    guided = ("clip_guidance.weight=0.2", f"clip_guidance.model={clip}", "clip_guidance.crop=8")
    config, shorter = (
        distill_config(teacher, pairs, "regression.losses=mse", *guided, f"train.images={n}") for n in (8, 4)
    )
    for run, configs in (("once", (config,)), ("twice", (shorter, config))):
        for each in configs:
            train(each, tmp_path / run)
    once, twice = (state_at(tmp_path / run, 8) for run in ("once", "twice"))
    assert all(torch.equal(once[name], twice[name]) for name in once)
    assert guiding_clip(str(tmp_path / "once")) == clip_sha256(clip) != ""
    report = losses(tmp_path / "once")[-1]
    assert report["loss/g"] == pytest.approx(report["loss/mse"] + 0.2 * report["loss/clip"], rel=1e-5)


def contrastive(clip: str) -> tuple[str, ...]:
    guided = ("clip_guidance.weight=0.2", f"clip_guidance.model={clip}", "clip_guidance.crop=8")
    return ("regression.losses=mse", *guided, "clip_guidance.form=contrastive")


@pytest.mark.slow
def test_contrastive_runs_do_not_depend_on_micro_batches(teacher: Path, clip: str, tmp_path: Path) -> None:
    """The texts are those of the whole batch; runs resume bit for bit."""
    pairs = make_pairs(teacher, tmp_path)
    settings = contrastive(clip)
    for run, parts in (("whole", 1), ("split", 2)):
        accumulate = f"engine.gradient_accumulation={parts}"
        train(distill_config(teacher, pairs, *settings, accumulate, "train.images=8"), tmp_path / run)
    whole, split = ([line["loss/clip"] for line in losses(tmp_path / run)] for run in ("whole", "split"))
    assert len(whole) > 1 and min(whole) > 0 and split == pytest.approx(whole, rel=1e-4)
    for images in (4, 8):
        train(distill_config(teacher, pairs, *settings, f"train.images={images}"), tmp_path / "twice")
    once, twice = (state_at(tmp_path / run, 8) for run in ("whole", "twice"))
    assert all(torch.equal(once[name], twice[name]) for name in once)


@pytest.mark.slow
def test_contrastive_runs_do_not_depend_on_processes(teacher: Path, clip: str, tmp_path: Path) -> None:
    config = distill_config(teacher, make_pairs(teacher, tmp_path), *contrastive(clip), "train.images=8")
    settings = contrastive(clip)
    succeed(d2g(distill_arguments(config, tmp_path / "one", *settings), tmp_path / "log"))
    succeed(*d2g_ranks(distill_arguments(config, tmp_path / "two", *settings), tmp_path / "log"))
    one, two = ([line["loss/clip"] for line in losses(tmp_path / run)] for run in ("one", "two"))
    assert len(one) > 1 and two == pytest.approx(one, rel=1e-4)


def test_memory_counts_clip(teacher: Path, clip: str) -> None:
    config = distill_config(teacher, Path("pairs"))
    guided = replace(config, clip_guidance=ClipGuidanceConfig(weight=0.2, model=clip, crop=16))
    before, after = predict(config, 1), predict(guided, 1)
    assert after.frozen > before.frozen and after.working > before.working


def test_what_cannot_guide_is_refused(
    teacher: Path, clip: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    classes = tiny_teachers.save_kind("unet2d", tmp_path / "unet2d")
    good = ClipGuidanceConfig(weight=0.2, model=clip, crop=16)
    for config, name, message in (
        (good, classes, "weight is 0.2, but .* has no text to guide by; set it to 0"),
        (replace(good, crop=18), str(teacher), "crop is 18, but a latent is 4 px wide; expected a multiple"),
        (
            replace(good, crop=64),
            str(teacher),
            r"crop is 64, but images of .* have \d+ px; set it to \d+ or less",
        ),
        (replace(good, model="nowhere"), str(teacher), r"^clip_guidance\.model: nowhere: no such folder"),
    ):
        with pytest.raises(UserError, match=message) as error:
            build_clip_guidance(config, name)
        assert "\n" not in str(error.value)
    config = distill_config(teacher, Path("pairs"))
    with pytest.raises(SettingError, match=r"batch_size is 1, but .*form is contrastive.* expected 2"):
        override(config, [*contrastive(clip), "train.batch_size=1"])
    for name in ("model=x", "crop=32", "form=contrastive"):
        changed = override(config, [f"clip_guidance.{name}"])
        with pytest.raises(SettingError, match="has an effect only with clip_guidance"):
            refuse_unused(changed, [f"clip_guidance.{name.partition('=')[0]}"])
    scoring = "openai/clip-vit-base-patch32"
    _warn_of_scoring_clip(replace(config, clip_guidance=replace(good, model=scoring)))
    message = (
        f"is {scoring}, which d2g eval calls vit-b-32: its CLIP scores of this student would be inflated"
    )
    assert f"clip_guidance.model {message}" in caplog.text
    changes = ("stage=gan", "gan.mix_z=0", "gan.discriminator=unet+projected")
    _warn_of_scoring_clip(override(config, [*changes, f'gan.feature_networks=["{scoring}"]']))
    assert f"gan.feature_networks {message}" in caplog.text
