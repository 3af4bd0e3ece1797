"""Memory of a training process, predicted (`--dry-run`, `d2g doctor`) against measured.

    python benchmarks/memory.py [--widths 128 256 512] [--size 32] [--batch 4] [--set a.b=c ...]

A U-Net of these widths with random weights, a few random pairs, three steps of each stage in a process of its
own. On a GPU the allocator's peak is read; on a CPU the resident set, less that of a process that has loaded
the same code and run a step of a tiny network. Writes benchmarks/memory_DATE_DEVICE.md.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import tiny  # noqa: E402
from benchmarks.common import table, write  # noqa: E402
from core import pretrained  # noqa: E402
from core.config import override  # noqa: E402
from distill.memory import predict  # noqa: E402
from distill.presets import PRESETS  # noqa: E402
from pairgen.generate import generate_pairs  # noqa: E402

VARIANTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("plain", ()),
    ("recompute", ("engine.activation_checkpointing=true",)),
    ("2 micro-batches", ("engine.accumulate=2",)),
)


def teacher(folder: Path, widths: list[int], size: int) -> str:
    """The tests' tiny teacher with a larger U-Net."""
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
    pretrained.save_piece(unet, folder / "unet")
    return str(folder)


def measured(stage: str, settings: list[str], init: str, folder: Path) -> float:
    """GiB at the peak of a process that trains for three steps."""
    command = [sys.executable, "-m", "cli", "distill", stage, "--preset", "miniature", "--out", str(folder)]
    command += ["--init", init] if stage == "gan" else []
    command += [part for setting in settings for part in ("--set", setting)]
    # glibc keeps freed memory otherwise, which no GPU's allocator counts.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    lines = (folder / "stats.jsonl").read_text().splitlines()
    return float(json.loads(lines[-1])["mem/peak_gib"])


def settings(made: str, pairs: Path, batch: int, more: tuple[str, ...]) -> list[str]:
    """After --set."""
    length = (f"train.batch_size={batch}", f"train.images={3 * batch}", f"train.report_images={3 * batch}")
    common = (f"teacher={made}", f"pairs={pairs}", "train.sentinels=off", "gan.r1_interval=1")
    return [*common, *length, *more]


def main() -> None:
    """Compare every variant of both stages."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 256, 512])
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--set", dest="sets", action="append", default=[])
    given = parser.parse_args()
    rows: list[list[Any]] = []
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        prompts = tiny.save_prompts(root / "prompts.txt")
        stores: dict[str, tuple[str, Path]] = {}
        for kind, widths, size in (("tiny", [32, 64], 8), ("large", given.widths, given.size)):
            made = teacher(root / kind, widths, size)
            generate_pairs(tiny.pair_config(made, prompts, num_pairs=8, steps=1), root / f"{kind}-pairs")
            stores[kind] = (made, root / f"{kind}-pairs")
        init = {}
        for kind, (made, pairs) in stores.items():
            init[kind] = str(root / f"{kind}-first")
            measured("ode", settings(made, pairs, 2, ()), "", Path(init[kind]))
        for stage in ("ode", "gan"):
            base = 0.0
            if not torch.cuda.is_available():
                made, pairs = stores["tiny"]
                base = measured(stage, settings(made, pairs, 2, ()), init["tiny"], root / f"base-{stage}")
            made, pairs = stores["large"]
            for label, more in VARIANTS:
                sets = settings(made, pairs, given.batch, (*more, *given.sets))
                folder = root / f"{stage}-{label}"
                peak = measured(stage, sets, init["large"], folder) - base
                config = override(replace(PRESETS["miniature"][stage]), sets)
                expected = predict(config, 1).total
                rows.append([stage, label, expected, peak, f"{expected / peak - 1:+.1%}"])
                print(rows[-1], file=sys.stderr, flush=True)
        parameters = sum(p.numel() for p in pretrained.skeleton(stores["large"][0], "unet").parameters())
    lines = [f"{parameters / 1e6:.0f}M parameters, {given.size}x{given.size} latents, batch {given.batch}."]
    lines += ["", *table(["stage", "variant", "predicted GiB", "measured GiB", "prediction off by"], rows)]
    write("memory", "Memory of a training process", lines)


if __name__ == "__main__":
    main()
