"""PickScore: a CLIP that predicts which image of a prompt people prefer (Kirstain et al. 2023)."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from d2g.vision import transformers_vision
from d2g.vision.normalization import OPENAI
from eval.images.resize import prepare_batch
from eval.networks.base import Device, normalize_channels, parameters_sha256

PICKSCORE_MODEL = "yuvalkirstain/PickScore_v1"
"""CLIP ViT-H/14 fine-tuned on human preferences (MIT, Kirstain et al. 2023)."""
PICKSCORE_TOKENIZER = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
"""The tokenizer that the authors use; the repository of PickScore has none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PickNet:
    """A network that scores images for their prompts. `sha256`: digest of its parameters.

    `score`: (uint8 images [B, 3, H, W], their B prompts) -> [B], higher is better.
    """

    name: str
    sha256: str
    score: Callable[[Tensor, list[str]], Tensor]


def load_pickscore(weights: str | None = None, device: Device = "cpu") -> PickNet:
    """PickScore (Kirstain et al. 2023): exp(logit scale) times the cosine of image and prompt.

    `weights`: folder or hub id in transformers' format, tokenizer included; None: PICKSCORE_MODEL and
    PICKSCORE_TOKENIZER. Images go through PIL's bicubic filter to the model's size, center crop.
    Raises UserError when either is missing.
    """
    source = weights or PICKSCORE_MODEL
    model = transformers_vision.load_clip_model(source).to(device)
    tokenizer = transformers_vision.load_clip_tokenizer(PICKSCORE_TOKENIZER if weights is None else source)
    size, length = model.config.vision_config.image_size, model.config.text_config.max_position_embeddings

    @torch.no_grad()
    def score(images: Tensor, prompts: list[str]) -> Tensor:
        assert len(images) == len(prompts)
        pixels = normalize_channels(prepare_batch(images.to(device), f"crop{size}-bicubic"), OPENAI)
        # Embeddings of images and prompts, and their scaled cosine.
        tokens = tokenizer(prompts, padding=True, truncation=True, max_length=length, return_tensors="pt").to(
            device
        )
        image_features = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
        text_features = model.text_projection(
            model.text_model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).pooler_output
        )
        cosine = (F.normalize(image_features, dim=1) * F.normalize(text_features, dim=1)).sum(1)
        scores: Tensor = model.logit_scale.exp() * cosine
        return scores.double().cpu()

    return PickNet(name=Path(source).name, sha256=parameters_sha256(model), score=score)
