"""The one door to feature networks: FID's InceptionV3, SqueezeNet, open_clip."""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.errors import UserError
from eval.images import resize_clean, resize_tensorflow, to_pil
from eval.weights import file_sha256, load_strict

INCEPTION_FILE = "pt_inception-2015-12-05-6726825d.pth"
INCEPTION_SHA256_PREFIX = "6726825d"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
)
CLIP_CONFIG, CLIP_WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"

Device = str | torch.device


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureNet:
    """A map from uint8 images [B, 3, H, W] to features [B, dim]. `sha256`: of its weights."""

    name: str
    dim: int
    sha256: str
    function: Callable[[Tensor], Tensor]

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] -> float [B, dim], on the network's device."""
        assert images.dtype == torch.uint8 and images.ndim == 4 and images.shape[1] == 3
        features = self.function(images)
        assert features.shape == (len(images), self.dim), (tuple(features.shape), self.dim)
        return features


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipNet:
    """Both towers of a CLIP model. `sha256`: of its parameters as loaded."""

    name: str
    dim: int
    sha256: str
    encode_images: Callable[[Tensor], Tensor]
    """uint8 [B, 3, H, W] -> unit vectors [B, dim], on the CPU in fp32."""
    encode_texts: Callable[[list[str]], Tensor]
    """B texts -> unit vectors [B, dim], on the CPU in fp32."""


# Inception


def fid_inception() -> nn.Module:
    """The network of FID: TensorFlow's 2015-12-05 InceptionV3 as torchvision blocks, 1008 classes, no weights
    yet.

    Against torchvision: average pools leave padding out of the count, and the last block pools by maximum.
    """
    from torchvision.models import inception as tv

    def chain(block: nn.Module, x: Tensor, *names: str) -> Tensor:
        for name in names:
            x = getattr(block, name)(x)
        return x

    def average(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)

    def maximum(x: Tensor) -> Tensor:
        return F.max_pool2d(x, 3, stride=1, padding=1)

    class A(tv.InceptionA):  # type: ignore[misc]
        def _forward(self, x: Tensor) -> list[Tensor]:
            fives = chain(self, x, "branch5x5_1", "branch5x5_2")
            threes = chain(self, x, "branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3")
            return [self.branch1x1(x), fives, threes, self.branch_pool(average(x))]

    class C(tv.InceptionC):  # type: ignore[misc]
        def _forward(self, x: Tensor) -> list[Tensor]:
            sevens = chain(self, x, *(f"branch7x7_{i}" for i in (1, 2, 3)))
            double = chain(self, x, *(f"branch7x7dbl_{i}" for i in (1, 2, 3, 4, 5)))
            return [self.branch1x1(x), sevens, double, self.branch_pool(average(x))]

    class E(tv.InceptionE):  # type: ignore[misc]
        pool = staticmethod(average)

        def _forward(self, x: Tensor) -> list[Tensor]:
            three, double = self.branch3x3_1(x), chain(self, x, "branch3x3dbl_1", "branch3x3dbl_2")
            threes = [self.branch3x3_2a(three), self.branch3x3_2b(three)]
            doubles = [self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double)]
            pooled = self.branch_pool(self.pool(x))
            return [self.branch1x1(x), torch.cat(threes, 1), torch.cat(doubles, 1), pooled]

    class LastE(E):
        pool = staticmethod(maximum)

    net: nn.Module = tv.Inception3(num_classes=1008, aux_logits=False, init_weights=False)
    net.Mixed_5b, net.Mixed_5c, net.Mixed_5d = A(192, 32), A(256, 64), A(288, 64)
    net.Mixed_6b, net.Mixed_6c, net.Mixed_6d, net.Mixed_6e = (
        C(768, 128),
        C(768, 160),
        C(768, 160),
        C(768, 192),
    )
    net.Mixed_7b, net.Mixed_7c = E(1280), LastE(2048)
    return net


def load_inception(weights: str | Path, device: Device = "cpu") -> FeatureNet:
    """FID features [B, 2048] the clean-fid way. `weights`: pytorch-fid's file, as .pth or .safetensors."""
    return _inception("inception", weights, device, resize_clean)


def load_inception_tf(weights: str | Path, device: Device = "cpu") -> FeatureNet:
    """FID features [B, 2048] resized as in the TensorFlow graph: what published CIFAR10 numbers use."""
    return _inception("inception-tf", weights, device, resize_tensorflow)


def _inception(
    name: str, weights: str | Path, device: Device, resize: Callable[[Tensor], Tensor]
) -> FeatureNet:
    net = fid_inception()
    load_strict(net, weights, f"pytorch-fid's {INCEPTION_FILE}")
    net.fc = nn.Identity()
    net = net.to(device).eval().requires_grad_(False)

    def features(images: Tensor) -> Tensor:
        output: Tensor = net((resize(images.to(device)) - 128) / 128)
        return output

    return FeatureNet(name=name, dim=2048, sha256=file_sha256(weights), function=features)


# SqueezeNet


def load_squeezenet(weights: str | Path, device: Device = "cpu") -> FeatureNet:
    """ImageNet SqueezeNet 1.0, features [B, 512] averaged over the last fire module. RGB minus (123, 117,
    104), 227 px.

    A small stand-in where no Inception is at hand; its distances are no FID.
    """
    from torchvision.models import squeezenet1_0

    net = squeezenet1_0(weights=None)
    load_strict(net, weights, "a squeezenet1_0.safetensors with torchvision's keys")
    net = net.to(device).eval().requires_grad_(False)
    mean = torch.tensor([123.0, 117.0, 104.0], device=device).view(3, 1, 1)

    def features(images: Tensor) -> Tensor:
        output: Tensor = net.features(resize_clean(images.to(device), 227) - mean)
        return output.mean((2, 3))

    return FeatureNet(name="squeezenet", dim=512, sha256=file_sha256(weights), function=features)


# CLIP


def load_clip(model: str, device: Device = "cpu") -> ClipNet:
    """A CLIP through open_clip: `MODEL:TAG_OR_FILE` (ViT-B-32-quickgelu:openai) or a folder (also
    `local-dir:FOLDER`).

    A folder holds open_clip_config.json, weights and tokenizer files. A tag makes open_clip download its
    weights. Raises UserError when the folder, the weights or the name is missing.
    """
    import open_clip

    folder = model.removeprefix("local-dir:")
    local = folder != model or Path(folder).is_dir()
    name, _, pretrained = (f"local-dir:{folder}", "", "") if local else model.partition(":")
    _check_clip_source(model, Path(folder) if local else None, pretrained)
    try:
        net, _, preprocess = open_clip.create_model_and_transforms(
            name, pretrained=pretrained or None, device=device
        )
        tokenizer = open_clip.get_tokenizer(name)
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"CLIP {model!r} does not load ({reason}); give MODEL:FILE with its weights"
        ) from error
    net = net.eval().requires_grad_(False)

    @torch.no_grad()
    def encode_images(images: Tensor) -> Tensor:
        pixels = torch.stack([preprocess(to_pil(image)) for image in images]).to(device)
        return F.normalize(net.encode_image(pixels).float(), dim=1).cpu()

    @torch.no_grad()
    def encode_texts(texts: list[str]) -> Tensor:
        return F.normalize(net.encode_text(tokenizer(texts).to(device)).float(), dim=1).cpu()

    dim = encode_texts([""]).shape[1]
    shown = f"local-dir:{Path(folder).resolve().name}" if local else model
    sha256 = _parameters_sha256(net)
    return ClipNet(name=shown, dim=dim, sha256=sha256, encode_images=encode_images, encode_texts=encode_texts)


def load_clip_features(model: str | Path, device: Device = "cpu") -> FeatureNet:
    """A CLIP's image tower as a feature network."""
    clip = load_clip(str(model), device)
    return FeatureNet(name=f"clip:{clip.name}", dim=clip.dim, sha256=clip.sha256, function=clip.encode_images)


def new_clip(model_config: Mapping[str, Any]) -> Any:
    """An untrained open_clip CLIP of a `model_cfg` (embed_dim, vision_cfg, text_cfg)."""
    import open_clip

    return open_clip.CLIP(**model_config)


def clip_tokenizer(folder: str | Path, context_length: int) -> Callable[[list[str]], Tensor]:
    """open_clip's tokenizer over a folder of transformers CLIPTokenizer files: texts -> token ids [B,
    context_length].

    Its `.tokenizer` is the transformers tokenizer. Raises UserError when the folder holds none.
    """
    import open_clip

    if not any((Path(folder) / name).is_file() for name in TOKENIZER_FILES):
        raise UserError(f"{folder} holds no tokenizer; expected {', '.join(TOKENIZER_FILES[:2])} in it")
    tokenizer: Callable[[list[str]], Tensor] = open_clip.tokenizer.HFTokenizer(
        str(folder), context_length=context_length
    )
    return tokenizer


def save_clip(
    model: nn.Module,
    model_config: Mapping[str, Any],
    preprocess_config: Mapping[str, Any],
    tokenizer: str | Path,
    out: str | Path,
) -> None:
    """Write a folder that open_clip's `local-dir:` loads: config, fp16 weights, tokenizer files."""
    from safetensors.torch import save_file

    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    config = {"model_cfg": model_config, "preprocess_cfg": preprocess_config}
    (out / CLIP_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(
        {name: t.detach().half().contiguous() for name, t in model.state_dict().items()}, out / CLIP_WEIGHTS
    )
    for name in TOKENIZER_FILES:
        if (Path(tokenizer) / name).is_file():
            shutil.copyfile(Path(tokenizer) / name, out / name)


def _parameters_sha256(model: nn.Module) -> str:
    total = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        total.update(name.encode())
        total.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return total.hexdigest()


def _check_clip_source(model: str, folder: Path | None, pretrained: str) -> None:
    if folder is None and not pretrained:
        raise UserError(
            f"CLIP {model!r} is neither a folder nor MODEL:TAG_OR_FILE; for example ViT-B-32-quickgelu:openai"
        )
    # Without weights open_clip would only log a line and go on with a random network.
    if folder is not None:
        suffixes = {file.suffix for file in folder.glob("*")}
        if not (folder / CLIP_CONFIG).is_file() or not suffixes & {".safetensors", ".bin", ".pth"}:
            raise UserError(
                f"{folder} is no open_clip folder; expected {CLIP_CONFIG} and {CLIP_WEIGHTS} in it"
            )


FEATURES: Mapping[str, Callable[[str | Path, Device], FeatureNet]] = MappingProxyType(
    {
        "inception": load_inception,
        "inception-tf": load_inception_tf,
        "squeezenet": load_squeezenet,
        "clip": load_clip_features,
    }
)
"""Feature networks by the names that protocols use; each takes its weights (or CLIP's name) and a device."""
