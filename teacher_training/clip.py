"""Trains a small CLIP for evaluations, with under a million parameters, in open_clip's format."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2g.core.config import to_json
from d2g.core.distributed.loop_checkpoints import LoopCheckpoints
from d2g.core.errors import UserError
from d2g.core.progress import Progress, quiet
from d2g.core.seeds import Stream, generator
from d2g.core.shuffle import permuted_batch
from d2g.core.transfer import device_of
from d2g.diffusion.latents import from_uint8
from eval.metrics.clip_score import retrieval_top1
from eval.networks.registry import clip_tokenizer, new_clip, save_clip
from teacher_training.config import ClipConfig


def model_config(config: ClipConfig, vocabulary: int, eos: int) -> dict[str, Any]:
    """Return the `model_cfg` of open_clip_config.json. Text is pooled at the first `eos` token."""
    # The field names are those of open_clip; text and image tower share `embed`.
    return {
        "embed_dim": config.embed,
        "vision_cfg": {
            "image_size": config.image_size,
            "patch_size": config.patch,
            "width": config.width,
            "layers": config.layers,
            "head_width": config.head,
            "mlp_ratio": 2.0,
        },
        "text_cfg": {
            "context_length": config.context,
            "vocab_size": vocabulary,
            "width": config.text_width,
            "heads": config.text_width // config.head,
            "layers": config.text_layers,
            "mlp_ratio": 2.0,
            "pool_type": "eos",
            "eos_id": eos,
            "hf_tokenizer_name": "tokenizer files beside this one",
        },
    }


def contrastive_loss(images: Tensor, texts: Tensor, scale: Tensor, caption_ids: Tensor) -> Tensor:
    """Symmetric cross-entropy (Radford et al. 2021) of unit vectors [B, D]; equal captions are positives.

    The target of a row is uniform over the columns with the same caption, so that equal captions are not
    pushed apart.
    """
    logits = scale * images @ texts.T
    target = (caption_ids[:, None] == caption_ids).float()
    target = target / target.sum(1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def train_clip(
    images: Tensor,
    captions: list[str],
    tokenizer: str | Path,
    out: str | Path,
    config: ClipConfig,
    *,
    progress: Progress = quiet,
    device: str | torch.device = "cpu",
    checkpoints: Path | None = None,
) -> dict[str, float]:
    """Train on uint8 images [N, 3, S, S] with N captions; write an open_clip folder; return scores.

    `tokenizer` is a folder of CLIPTokenizer files, which are copied to `out`. The scores, also written to
    `out`/meta.json, are `retrieval_top1` on held-out images and its chance level, `loss` (mean over the last
    tenth), `params`, `images` and `seconds`. checkpoints: folder of the training's checkpoints, from which it
    goes on exactly; None keeps none. Raises UserError for images of another shape or number than expected,
    and for a non-finite loss, Interrupted on Ctrl-C where there are checkpoints.
    """
    if images.shape[1:] != (3, config.image_size, config.image_size) or len(images) != len(captions):
        raise UserError(
            f"got images {tuple(images.shape)} and {len(captions)} captions; expected as many captions as "
            f"images [N, 3, {config.image_size}, {config.image_size}]"
        )
    # Tokenize each distinct caption once.
    tokenize = clip_tokenizer(tokenizer, config.context)
    hf_tokenizer = tokenize.tokenizer  # type: ignore[attr-defined]
    settings = model_config(config, len(hf_tokenizer), hf_tokenizer.eos_token_id)
    ids = {caption: number for number, caption in enumerate(sorted(set(captions)))}
    tokens = tokenize(list(ids))
    caption_ids = torch.tensor([ids[caption] for caption in captions])
    # Hold out images for the retrieval score.
    order = torch.randperm(len(images), generator=generator(config.seed, Stream.CLIP_SPLIT))
    num_held_out = max(1, min(config.held_out, len(images) // 10))
    held_out, train = order[:num_held_out], order[num_held_out:]
    if len(train) < 2:
        raise UserError(f"got {len(images)} images; training a CLIP needs at least 3")

    # Train, and score the retrieval of held-out captions.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = new_clip(settings).to(device).train()
    losses, seconds = _optimize(model, images, tokens, caption_ids, train, config, progress, checkpoints)
    top1, chance = _retrieval(model, images, captions, tokens[caption_ids], held_out, config, device)
    scores = {
        "retrieval_top1": top1,
        "retrieval_chance": chance,
        "loss": torch.tensor(losses[-max(1, len(losses) // 10) :]).mean().item(),
        "params": float(sum(p.numel() for p in model.parameters())),
        "images": float(len(losses) * config.batch_size),
        "seconds": seconds,
    }
    # An open_clip folder, with the tokenizer and the scores beside the weights.
    preprocess = {"size": config.image_size, "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"}
    save_clip(model, settings, preprocess, tokenizer, out)
    meta = json.dumps({"config": to_json(config), "scores": scores}, indent=2)
    (Path(out) / "meta.json").write_text(meta + "\n", encoding="utf-8")
    return scores


def _optimize(
    model: Any,
    images: Tensor,
    tokens: Tensor,
    caption_ids: Tensor,
    train: Tensor,
    config: ClipConfig,
    progress: Progress,
    checkpoints: Path | None,
) -> tuple[list[float], float]:
    """Train `model` in place on the rows `train`; returns the loss of every step, and the seconds."""
    device = device_of(model)
    optimizer = torch.optim.AdamW(
        _parameter_groups(model, config.weight_decay), lr=config.lr, betas=(0.9, 0.98)
    )
    with LoopCheckpoints(checkpoints, "train CLIP", model, optimizer) as state:
        losses = state.values.setdefault("losses", list[float]())
        while state.nimg < config.images and not _time_over(state.seconds, config):
            # Loss of a batch.
            rows = train[permuted_batch(config.seed, len(train), state.nimg, config.batch_size)]
            pixels, texts = from_uint8(images[rows]).to(device), caption_ids[rows]
            image_vectors = F.normalize(model.encode_image(pixels), dim=1)
            text_vectors = F.normalize(model.encode_text(tokens[texts].to(device)), dim=1)
            loss = contrastive_loss(image_vectors, text_vectors, model.logit_scale.exp(), texts.to(device))
            if not torch.isfinite(loss):
                raise UserError(
                    f"the CLIP's loss is {loss.item()} at image {state.nimg}; lower its lr from {config.lr}"
                )
            # Step, with the gradient norm and the temperature limited.
            for group in optimizer.param_groups:
                group["lr"] = config.lr * _learning_rate_factor(state.nimg, state.seconds, config)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            with torch.no_grad():
                model.logit_scale.clamp_(0, math.log(100))
            losses.append(loss.item())
            state.nimg += config.batch_size
            progress("train CLIP", min(state.nimg, config.images), config.images)
            state.step_done()
    return losses, state.seconds


@torch.no_grad()
def _retrieval(
    model: Any,
    images: Tensor,
    captions: list[str],
    tokens: Tensor,
    rows: Tensor,
    config: ClipConfig,
    device: str | torch.device,
) -> tuple[float, float]:
    """Return top-1 retrieval of captions on the rows, and its chance level."""
    texts = [captions[row] for row in rows.tolist()]
    image_vectors = torch.cat(list(_image_vectors(model.eval(), images[rows], device)))
    text_vectors = F.normalize(model.encode_text(tokens[rows].to(device)), dim=1).cpu()
    top1 = retrieval_top1(image_vectors, text_vectors, texts, candidates=config.candidates)
    return top1, 1 / min(config.candidates, len(set(texts)))


@torch.no_grad()
def _image_vectors(model: Any, images: Tensor, device: str | torch.device) -> Iterator[Tensor]:
    for batch in images.split(256):
        yield F.normalize(model.encode_image(from_uint8(batch).to(device)), dim=1).cpu()


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Apply weight decay to matrices and embeddings, not to gains, biases and the logit scale."""
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def _time_over(seconds: float, config: ClipConfig) -> bool:
    return config.minutes > 0 and seconds > 60 * config.minutes


def _learning_rate_factor(nimg: int, seconds: float, config: ClipConfig) -> float:
    """Linear warm-up times a cosine to zero, over images, or over time if that ends first."""
    fraction = nimg / config.images
    if config.minutes > 0:
        fraction = max(fraction, min(seconds / (60 * config.minutes), 1.0))
    warm = min(1.0, (nimg + config.batch_size) / max(config.warmup_images, 1))
    return warm * 0.5 * (1 + math.cos(math.pi * fraction))
