"""CLIP guidance: a loss between the student's decoded images and their text in CLIP's embedding space.

It is the squared spherical distance of image and text (StyleGAN-T, equation 2), or the contrastive loss with
which CLIP was trained (GigaGAN, section 3.3).
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2g.core.errors import SettingError, naming
from d2g.core.transfer import to_device
from d2g.diffusion import pretrained
from d2g.diffusion.latents import decode, latent_space
from d2g.diffusion.pipelines import family_of, open_pipeline
from d2g.vision.crops import crop_view
from d2g.vision.normalization import OPENAI
from d2g.vision.transformers_vision import clip_on_meta, load_clip_model, load_clip_tokenizer
from distill.config.clip_guidance import ClipGuidanceConfig

MAX_COSINE = 1 - 1e-6
"""Cosines are clamped to [-MAX_COSINE, MAX_COSINE]: the derivative of arccos is infinite at 1."""


def spherical_distance(image: Tensor, text: Tensor) -> Tensor:
    """Compute arccos(image . text)^2 of unit vectors [B, D]: [B] in fp32."""
    cosine = (image.float() * text.float()).sum(1)
    return cosine.clamp(-MAX_COSINE, MAX_COSINE).arccos().square()


def text_cross_entropy(image: Tensor, text: Tensor, texts: Tensor, scale: Tensor | float) -> Tensor:
    """Compute -log(exp(s image . text) / sum_n exp(s image . texts_n)): [B] in fp32.

    image, text: unit vectors [B, D] of images and their texts. texts: unit vectors [N, D] of all texts of the
    batch, `text` among them. scale: s, the inverse temperature that CLIP has learned.
    """
    with torch.autocast(image.device.type, enabled=False):
        image = image.float()
        positive = scale * (image * text.float()).sum(1)
        return torch.logsumexp(scale * (image @ texts.float().T), dim=1) - positive


class ClipGuidance(nn.Module):
    """The loss of a frozen CLIP on decoded crops of latents.

    crop: side of the crops in pixels. contrastive: use the contrastive loss, not the spherical distance.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, model: Any, tokenizer: Any, vae: Any, crop: int, contrastive: bool = False) -> None:
        super().__init__()
        self.model, self.vae, self.tokenizer = model, vae.requires_grad_(False), tokenizer
        self.side = crop // latent_space(vae).downscale
        self.contrastive = contrastive
        # As buffers, because a copy from the CPU in each step would wait for the GPU.
        for name, values in zip(("mean", "deviation"), OPENAI, strict=True):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Encode B prompts as unit vectors [B, D], fp32."""
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(
            list(prompts), padding=True, truncation=True, max_length=length, return_tensors="pt"
        )
        device = next(self.model.parameters()).device
        output = self.model.text_model(
            input_ids=to_device(tokens.input_ids, device),
            attention_mask=to_device(tokens.attention_mask, device),
        )
        embedding: Tensor = self.model.text_projection(output.pooler_output)
        return F.normalize(embedding.float(), dim=1)

    def forward(self, latents: Tensor, text: Tensor, uniform: Tensor, texts: Tensor | None = None) -> Tensor:
        """Compute the mean loss over rows, a scalar in fp32.

        latents: scaled latents [B, C, h, w]. text: unit vectors [B, D] of their prompts. uniform: positions
        of the crops [B, 2], in [0, 1). texts: unit vectors [N, D] of the whole batch, for the contrastive
        loss; None uses `text`.
        """
        # Decode a crop of each row and resize it for CLIP.
        pixels = decode(self.vae, crop_view(latents, self.side, uniform))
        size = self.model.config.vision_config.image_size
        pixels = F.interpolate(pixels, (size, size), mode="bilinear", antialias=True)

        # Compare image and text embeddings.
        output = self.model.vision_model(pixel_values=(pixels / 2 + 0.5 - self.mean) / self.deviation)
        image = F.normalize(self.model.visual_projection(output.pooler_output).float(), dim=1)
        if not self.contrastive:
            return spherical_distance(image, text).mean()
        scale = self.model.logit_scale.float().exp()
        return text_cross_entropy(image, text, text if texts is None else texts, scale).mean()


def build_clip_guidance(
    config: ClipGuidanceConfig, teacher: str, device: torch.device | str = "cpu"
) -> ClipGuidance | None:
    """Build the CLIP guidance of a run; None if its weight is 0.

    On the device "meta" it has no weights and no tokenizer. Raises SettingError for a teacher without text or
    without a decoder to pixels, and for a crop that does not fit its latents; UserError if the CLIP is
    missing.
    """
    if not config.weight:
        return None

    # The teacher must have text and a decoder, and its images must contain the crop.
    family, kind = family_of(teacher), open_pipeline(teacher).kind
    if not family.reads_text or family.network not in ("unet", "transformer"):
        reason = "no text to guide by" if not family.reads_text else "no decoder to pixels"
        raise SettingError(
            f"clip_guidance.weight is {config.weight:g}, but {teacher}, a {kind}, has {reason}; set it to 0"
        )
    downscale = pretrained.latent_downscale(teacher)
    if config.crop % downscale:
        raise SettingError(
            f"clip_guidance.crop is {config.crop}, but a latent is {downscale} px wide; expected a multiple "
            "of that"
        )
    pixels = min(pretrained.latent_shape(teacher)[1:]) * downscale
    if config.crop > pixels:
        raise SettingError(
            f"clip_guidance.crop is {config.crop}, but images of {teacher} have {pixels} px; set it to "
            f"{pixels} or less"
        )

    # Load CLIP and the autoencoder.
    contrastive = config.form == "contrastive"
    if torch.device(device).type == "meta":
        vae = pretrained.autoencoder_on_meta(teacher)
        with naming("clip_guidance.model"):
            clip = clip_on_meta(config.model)
        return ClipGuidance(clip, None, vae, config.crop, contrastive)
    with naming("clip_guidance.model"):
        model, tokenizer = load_clip_model(config.model), load_clip_tokenizer(config.model)
    vae = pretrained.load_vae(teacher)
    return ClipGuidance(model, tokenizer, vae, config.crop, contrastive).to(device)
