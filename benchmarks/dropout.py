"""Dropout with masks that are a row's own against torch's, on an activation of EDM's CIFAR-10 network.

    OMP_NUM_THREADS=1 python benchmarks/dropout.py     benchmarks/dropout_DATE_DEVICE.md

In turns, forward and backward; beside them the 3x3 convolution that follows it there.
"""

import sys
from functools import partial
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import compare, median, table, write
from distill.models.row_dropout import RowDropout, give_keys, row_keys

SHAPE, P, REPEATS = (64, 256, 32, 32), 0.1, 15


def once(module: nn.Module, x: torch.Tensor) -> None:
    """Forward and backward."""
    module(x).sum().backward()
    if x.is_cuda:
        torch.cuda.synchronize()


def main() -> None:
    """Time the three, and write them down."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = SHAPE if device == "cuda" else (8, *SHAPE[1:])
    x = torch.randn(rows, device=device, requires_grad=True)
    own = RowDropout(P, 0)
    give_keys(own, row_keys(0, range(len(x))).to(device))
    modules = {
        "a row's own masks": own,
        "torch.nn.Dropout": nn.Dropout(P),
        "3x3 convolution": nn.Conv2d(SHAPE[1], SHAPE[1], 3, padding=1).to(device),
    }
    seconds = compare({name: partial(once, module, x) for name, module in modules.items()}, REPEATS, 2)
    peer = median(seconds["torch.nn.Dropout"])
    found = [[name, 1e3 * median(s), median(s) / peer] for name, s in seconds.items()]
    lines = [f"Activation {list(rows)}, fp32, p {P}; median of {REPEATS}.", ""]
    write("dropout", "Dropout by row", [*lines, *table(["", "ms", "against torch's"], found)])


if __name__ == "__main__":
    main()
