"""How well an image shows its prompt: CLIP score and image-to-text retrieval."""

import torch
from torch import Tensor

from d2g.core.seeds import generator
from eval.networks.registry import ClipNet


def clip_scores(clip: ClipNet, images: Tensor, prompts: list[str], *, prefix: str = "") -> Tensor:
    """Compute the cosine of each uint8 image [B, 3, H, W] and `prefix + prompt`: [B] float64 in [-1, 1].

    The mean over images is the CLIP score as GigaGAN and Diffusion2GAN report it (Hessel et al. 2021 clip at
    0 and multiply by 2.5).
    """
    assert len(images) == len(prompts)
    texts = clip.encode_texts([prefix + prompt for prompt in prompts])
    return (clip.encode_images(images).double() * texts.double()).sum(1)


def retrieval_top1(
    images: Tensor, texts: Tensor, captions: list[str], *, candidates: int = 100, seed: int = 0
) -> float:
    """Share of images whose caption is the nearest of `candidates` distinct captions, itself included.

    images, texts: unit vectors [N, D] of image i and caption i. With fewer distinct captions, all of them are
    candidates. The random captions depend on `seed`.
    """
    # Distinct captions, each by its first row.
    first_row = {caption: row for row, caption in reversed(list(enumerate(captions)))}
    distinct = sorted(first_row.values())
    number = min(candidates, len(distinct))
    rng, correct = generator(seed), 0
    # Compare each image with its own caption and with random other ones.
    for row, caption in enumerate(captions):
        shuffled = torch.randperm(len(distinct), generator=rng)[:number].tolist()
        distractors = [distinct[i] for i in shuffled if distinct[i] != first_row[caption]][: number - 1]
        scores = texts[distractors] @ images[row]
        correct += bool(scores.numel() == 0 or texts[row] @ images[row] > scores.max())
    return correct / len(captions)
