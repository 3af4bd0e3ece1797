"""Speed of dropout with a mask per row against torch.nn.Dropout, on an activation of EDM's CIFAR-10 network.

    OMP_NUM_THREADS=1 python benchmarks/dropout.py     benchmarks/dropout_DATE_DEVICE.md

Times forward and backward passes in turns, beside the 3x3 convolution that follows dropout in that network.
"""

import sys
from functools import partial
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import compare, median, table, write
from distill.models.row_dropout import RowDropout, row_keys, set_dropout_keys

SHAPE, P, REPEATS = (64, 256, 32, 32), 0.1, 15


def run_once(module: nn.Module, x: torch.Tensor) -> None:
    """Run one forward and one backward pass."""
    module(x).sum().backward()
    if x.is_cuda:
        torch.cuda.synchronize()


def main() -> None:
    """Time the three modules and write the result file."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = SHAPE if device == "cuda" else (8, *SHAPE[1:])
    x = torch.randn(rows, device=device, requires_grad=True)
    row_dropout = RowDropout(P, 0)
    set_dropout_keys(row_dropout, row_keys(0, range(len(x))).to(device))
    modules = {
        "a mask per row": row_dropout,
        "torch.nn.Dropout": nn.Dropout(P),
        "3x3 convolution": nn.Conv2d(SHAPE[1], SHAPE[1], 3, padding=1).to(device),
    }
    seconds = compare({name: partial(run_once, module, x) for name, module in modules.items()}, REPEATS, 2)
    torch_seconds = median(seconds["torch.nn.Dropout"])
    times = [[name, 1e3 * median(s), median(s) / torch_seconds] for name, s in seconds.items()]
    lines = [f"Activation {list(rows)}, fp32, p {P}; median of {REPEATS}.", ""]
    write("dropout", "Dropout by row", [*lines, *table(["", "ms", "relative to torch"], times)])


if __name__ == "__main__":
    main()
