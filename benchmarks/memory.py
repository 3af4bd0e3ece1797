"""Memory of a training process: prediction of `--dry-run` and `d2g doctor` against measurement.

    python benchmarks/memory.py [--widths 128 256 512] [--size 32] [--batch 4] [--set a.b=c ...]

Trains a U-Net of these widths with random weights on a few random pairs, three steps of each stage, in a
process of its own. That process trains a tiny network first, so that all code is loaded. On a GPU the peak of
the allocator is read; on a CPU the peak of the resident set, minus its size before the run (Linux only). The
optimizer is the fused AdamW, because the temporaries of the plain one exist on GPUs only. Writes
benchmarks/memory_DATE_DEVICE.md.
"""

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import tiny  # noqa: E402
from benchmarks.common import table, write  # noqa: E402
from d2g.core.config import from_json, override, to_json  # noqa: E402
from d2g.diffusion import pretrained  # noqa: E402
from distill.config.presets import DISTILL_PRESETS  # noqa: E402
from distill.config.run import DistillConfig  # noqa: E402
from distill.planning.memory import predict  # noqa: E402
from distill.training.train import train  # noqa: E402
from pairgen.generate import generate_pairs  # noqa: E402

VARIANTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("plain", ()),
    ("recompute", ("engine.activation_checkpointing=true",)),
    ("2 micro-batches", ("engine.gradient_accumulation=2",)),
)


def save_teacher(folder: Path, widths: list[int], size: int) -> str:
    """Write the tests' tiny teacher with a larger U-Net, and return its path."""
    tiny.save_teacher(folder)
    down = ["CrossAttnDownBlock2D"] * (len(widths) - 1) + ["DownBlock2D"]
    up = ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * (len(widths) - 1)
    unet = pretrained.new_unet(
        sample_size=size,
        block_out_channels=widths,
        down_block_types=down,
        up_block_types=up,
        cross_attention_dim=16,
        attention_head_dim=8,
    )
    pretrained.save_component(unet, folder / "unet")
    return str(folder)


def peak_gib() -> float:
    """Peak of the GPU allocator, or without a GPU of the resident set, in GiB."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 2**20


def reset_peak() -> None:
    """Reset the peak to the memory in use now."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def print_peak(tiny_run: DistillConfig, run: DistillConfig, folder: Path) -> None:
    """Print the peak of `run` in GiB, minus the memory in use before. Runs in a process of its own."""
    train(tiny_run, folder / "before")
    reset_peak()
    before = peak_gib()
    train(run, folder / "run")
    print(json.dumps(peak_gib() - before))


def measure(tiny_run: DistillConfig, run: DistillConfig, folder: Path) -> float:
    """Peak GiB of a process that trains `run`."""
    # By default glibc keeps freed memory, which the peak of a GPU allocator does not include.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    configs = [json.dumps(to_json(config)) for config in (tiny_run, run)]
    command = [sys.executable, __file__, "--work", *configs, str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return float(json.loads(done.stdout.splitlines()[-1]))


def short_run(
    stage: str, teacher: str, pairs: Path, init: str, batch: int, sets: Sequence[str]
) -> DistillConfig:
    """Config of three steps of a stage."""
    length = (f"train.batch_size={batch}", f"train.images={3 * batch}", f"train.report_images={3 * batch}")
    as_on_gpus = ("optim.name=adamw_fused", "gan.optim.name=adamw_fused")
    common = (
        f"teacher={teacher}",
        f"pairs={pairs}",
        f"init={init}",
        "train.on_collapse=off",
        "gan.r1_interval=1",
        "data.text_precision=fp32",
    )
    return override(DISTILL_PRESETS["miniature"][stage], [*common, *length, *as_on_gpus, *sets])


def main() -> None:
    """Compare prediction and measurement for the variants of both stages."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 256, 512])
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--set", dest="sets", action="append", default=[])
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        tiny_run, run = (from_json(DistillConfig, json.loads(text)) for text in args.work[:2])
        return print_peak(tiny_run, run, Path(args.work[2]))
    rows: list[list[Any]] = []
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        prompts = tiny.save_prompts(root / "prompts.txt")
        stores: dict[str, tuple[str, Path]] = {}
        for kind, widths, size in (("tiny", [32, 64], 8), ("large", args.widths, args.size)):
            path = save_teacher(root / kind, widths, size)
            generate_pairs(tiny.pair_config(path, prompts, num_pairs=8, steps=1), root / f"{kind}-pairs")
            stores[kind] = (path, root / f"{kind}-pairs")
        init = {}
        for kind, (path, pairs) in stores.items():
            init[kind] = str(root / f"{kind}-first")
            train(short_run("ode", path, pairs, "", 2, ()), Path(init[kind]))
        for stage in ("ode", "gan"):
            before = short_run(stage, *stores["tiny"], init["tiny"] if stage == "gan" else "", 2, ())
            for label, sets in VARIANTS:
                start = init["large"] if stage == "gan" else ""
                run = short_run(stage, *stores["large"], start, args.batch, (*sets, *args.sets))
                peak = measure(before, run, root / f"{stage}-{label}")
                expected = predict(run, 1).total
                rows.append([stage, label, expected, peak, f"{expected / peak - 1:+.1%}"])
                print(rows[-1], file=sys.stderr, flush=True)
        parameters = sum(p.numel() for p in pretrained.load_on_meta(stores["large"][0], "unet").parameters())
    lines = [f"{parameters / 1e6:.0f}M parameters, {args.size}x{args.size} latents, batch {args.batch}."]
    lines += ["", *table(["stage", "variant", "predicted GiB", "measured GiB", "prediction off by"], rows)]
    write("memory", "Memory of a training process", lines)


if __name__ == "__main__":
    main()
