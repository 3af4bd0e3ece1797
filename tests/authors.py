"""Random weights in the format of the checkpoints of package elatentlpips, as a function of a seed."""

from pathlib import Path

import torch
from torch import Tensor

from d2g.core.seeds import noise

CONVS = (
    0,
    3,
    7,
    10,
    14,
    17,
    20,
    24,
    27,
    30,
    34,
    37,
    40,
)  # indices of the convolutions in torchvision's vgg16_bn
WIDTHS = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
SLICE_ENDS = (7, 14, 24, 34, 44)
TAPS = (64, 128, 256, 512, 512)


def features(channels: int, seed: int, width: float = 1.0) -> dict[str, Tensor]:
    """Tensors of vgg16_bn's `features`; their batch norms differ from the identity. Names have no prefix."""
    state: dict[str, Tensor] = {}
    previous = channels
    for index, (conv, full) in enumerate(zip(CONVS, WIDTHS, strict=True)):
        wide = round(full * width)
        state[f"{conv}.weight"] = _noise(seed, index, wide, previous, 3, 3) * (2 / (9 * previous)) ** 0.5
        bias, gain, shift, mean, spread = _noise(seed, 100 + index, 5, wide)
        state[f"{conv}.bias"] = 0.1 * bias
        norm = conv + 1
        state[f"{norm}.weight"], state[f"{norm}.bias"] = 1 + 0.2 * gain, 0.1 * shift
        state[f"{norm}.running_mean"], state[f"{norm}.running_var"] = 0.2 * mean, torch.exp(0.3 * spread)
        state[f"{norm}.num_batches_tracked"] = torch.tensor(7)
        previous = wide
    return state


def trunk_file(path: Path, channels: int, seed: int, width: float = 1.0, hidden: int = 4096) -> Path:
    """Save a trunk in the format of its training script, with a classifier of zeros."""
    grid, classes = round(512 * width) * 49, 1000
    state = {f"module.model.features.{key}": value for key, value in features(channels, seed, width).items()}
    for layer, (rows, columns) in {0: (hidden, grid), 3: (hidden, hidden), 6: (classes, hidden)}.items():
        state[f"module.model.classifier.{layer}.weight"] = torch.zeros(rows, columns)
        state[f"module.model.classifier.{layer}.bias"] = torch.zeros(rows)
    torch.save({"epoch": 90, "arch": "vgg16_bn", "state_dict": state, "best_acc1": torch.tensor(69.9)}, path)
    return path


def tuned_state(channels: int, seed: int, width: float = 1.0) -> dict[str, Tensor]:
    """Tensors of a calibrated distance: the trunk in slices, and each head under two names."""
    state: dict[str, Tensor] = {}
    for key, value in features(channels, seed, width).items():
        number = int(key.split(".")[0])
        component = 1 + next(i for i, end in enumerate(SLICE_ENDS) if number < end)
        state[f"net.slice{component}.{key}"] = value
    for layer, full in enumerate(TAPS):
        head = _noise(seed, 200 + layer, 1, round(full * width), 1, 1).abs()
        state[f"lin{layer}.model.1.weight"] = state[f"lins.{layer}.model.1.weight"] = head
    return state


def tuned_file(path: Path, channels: int, seed: int, width: float = 1.0) -> Path:
    torch.save(tuned_state(channels, seed, width), path)
    return path


def _noise(seed: int, index: int, *shape: int) -> Tensor:
    return noise(seed, [index], shape)[0]
