"""Interfaces of evaluation networks: images (or texts) in, rows of features out."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Device = str | torch.device


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureNet:
    """A network that maps uint8 images [B, 3, H, W] to features [B, dim]. `sha256`: digest of its weights."""

    name: str
    dim: int
    sha256: str
    function: Callable[[Tensor], Tensor]
    classifier: Callable[[Tensor], Tensor] | None = None
    """Features [N, dim] -> class logits [N, C], for the Inception score; None where there are no classes."""

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] -> float [B, dim], on the network's device."""
        assert images.dtype == torch.uint8 and images.ndim == 4 and images.shape[1] == 3
        features = self.function(images)
        assert features.shape == (len(images), self.dim), (tuple(features.shape), self.dim)
        return features


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipNet:
    """Both towers of a CLIP model. `sha256`: digest of its parameters as loaded. `text_sha256`: `clip_sha256`
    of the same model in other files; "" where it has none.
    """

    name: str
    dim: int
    sha256: str
    encode_images: Callable[[Tensor], Tensor]
    """uint8 [B, 3, H, W] -> unit vectors [B, dim], on the CPU in fp32."""
    encode_texts: Callable[[list[str]], Tensor]
    """B texts -> unit vectors [B, dim], on the CPU in fp32."""
    text_sha256: str = ""


def normalize_channels(images: Tensor, statistics: tuple[tuple[float, ...], tuple[float, ...]]) -> Tensor:
    """uint8 [B, 3, H, W] -> fp32: scaled to [0, 1], then normalized by each channel's mean and deviation."""
    mean, deviation = (torch.tensor(s, device=images.device).view(3, 1, 1) for s in statistics)
    return (images.float() / 255 - mean) / deviation


def parameters_sha256(model: nn.Module) -> str:
    """sha256 of the names and values of a network's state dict."""
    total = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        total.update(name.encode())
        total.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return total.hexdigest()
