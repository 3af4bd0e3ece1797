"""What the columns of Table A1 need on 8, 64 and 128 GPUs: memory, step time, communication, GPU-days.

    python benchmarks/scaling.py [--tflops 312] [--used 0.45] [--gbytes 25] [--memory 80]

Computed, not measured: memory and FLOPs from the networks' real shapes on fake tensors, time from the peak of
one GPU, the share of it that is assumed to be used, and the bandwidth between GPUs. Writes
benchmarks/scaling_DATE_computed.md.
"""

import argparse
import sys
import tempfile
from dataclasses import replace
from datetime import date
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import environment, table
from d2g.diffusion import pretrained
from d2g.diffusion.conditioning import Conditioning
from distill.config.presets import TABLE_A1
from distill.config.run import DistillConfig
from distill.planning.cost import PUBLISHED, column
from distill.planning.memory import CONTEXT_GIB, predict
from distill.planning.reference_models import UNETS, configs_only

LATENT_LPIPS = 3 * 77e9 / 64**2
"""FLOP of a distance with its gradient, per latent position (benchmarks/latent_lpips.py)."""


def unet_flops(kind: str) -> float:
    """Of one row's forward pass."""
    with FakeTensorMode():
        unet = pretrained.new_unet(**UNETS[kind])
        config = unet.config
        added = None
        if config.addition_embed_type:
            added = {"text_embeds": torch.empty(1, 1280), "time_ids": torch.empty(1, 6)}
        size = config.sample_size
        text = Conditioning.from_text(torch.empty(1, 77, config.cross_attention_dim))
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            unet(torch.empty(1, 4, size, size), 999, text.hidden, added_cond_kwargs=added)
    return float(counter.get_total_flops())


def passes(config: DistillConfig) -> float:
    """Forward-sized passes of a row: backward counts twice; D's in G's step once, for its weights rest."""
    again = 1.0 if config.engine.activation_checkpointing else 0.0
    student = 3 + again
    return student if config.stage == "ode" else student + 2 * (3 + again) + (2 + again)


def row(
    name: str, stage: str, gpus: int, teacher: str, flops: float, given: argparse.Namespace
) -> list[object]:
    """One stage on so many GPUs: the first engine in a list of ever thriftier ones that fits."""
    config = replace(TABLE_A1[name][stage], teacher=teacher)
    local = config.train.batch_size // gpus
    tries = [
        {"parallel": "ddp", "activation_checkpointing": False},
        {"parallel": "ddp", "activation_checkpointing": True},
        *(
            {"parallel": "fsdp", "activation_checkpointing": True, "accumulate": n}
            for n in (1, 2, 4, 8, 16, 32, 64)
        ),
    ]
    for settings in tries:
        if settings.get("accumulate", 1) > max(1, local // 2):
            continue
        config = replace(config, engine=replace(config.engine, gpus=gpus, **settings))
        memory = predict(config, gpus)
        if memory.total + CONTEXT_GIB <= given.memory:
            break
    size = TABLE_A1[name][stage].train.batch_size
    positions = UNETS["sdxl" if "sdxl" in name else "sd15"]["sample_size"] ** 2
    work = local * (passes(config) * flops + LATENT_LPIPS * positions)
    compute = work / (given.tflops * 1e12 * given.used)
    networks = 1 if stage == "ode" else 2
    parameters = sum(p.numel() for p in pretrained.load_on_meta(teacher, "unet").parameters())
    ring = (gpus - 1) / gpus
    if config.engine.parallel == "ddp":
        traffic = networks * 2 * ring * 4 * parameters
    else:  # bf16 weights gathered for forward and backward of each pass, fp32 gradients scattered
        rounds = (2 if stage == "ode" else 2 + 4 + 2) * config.engine.gradient_accumulation
        traffic = ring * parameters * (2 * rounds + 4 * networks * config.engine.gradient_accumulation)
    exchange = traffic / (given.gbytes * 1e9)
    steps = config.train.images // size
    days = (max(compute, exchange), compute + exchange)
    engine = config.engine
    how = engine.parallel + (", recompute" if engine.activation_checkpointing else "")
    how += f", {engine.gradient_accumulation} micro-batches" if engine.gradient_accumulation > 1 else ""
    spent = " to ".join(f"{seconds * steps * gpus / 86_400:.1f}" for seconds in days)
    return [name, stage, gpus, local, how, memory.total, compute, traffic / 1e9, exchange, spent]


def main() -> None:
    """Write the page."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--tflops", type=float, default=312, help="bf16 peak of one GPU (A100: 312)")
    parser.add_argument("--used", type=float, default=0.45, help="share of it in the networks")
    parser.add_argument("--gbytes", type=float, default=25, help="GB/s each GPU sends (200 Gb/s network)")
    parser.add_argument("--memory", type=float, default=79.2, help="GiB of one GPU")
    given = parser.parse_args()
    head = [
        "recipe",
        "stage",
        "GPUs",
        "rows each",
        "engine",
        "GiB each",
        "compute, s",
        "GB sent",
        "exchange, s",
        "GPU-days",
    ]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        teachers = {kind: configs_only(kind, Path(folder) / kind) for kind in UNETS}
        flops = {kind: unet_flops(kind) for kind in teachers}
        for name in ("sd15-cfg3", "sd15-cfg8", "sdxl-cfg7"):
            kind = name.split("-")[0]
            for gpus in (8, 64, 128):
                for stage in TABLE_A1[name]:
                    rows.append(row(name, stage, gpus, teachers[kind], flops[kind], given))
                    print(rows[-1], file=sys.stderr)
    sums = {name: column(name) for name in PUBLISHED if name != "cifar10"}
    lines = [
        "# Scaling, computed",
        "",
        *environment(),
        f"- assumed: {given.tflops:g} TFLOP/s bf16, {given.used:.0%} of it used, {given.gbytes:g} GB/s each, "
        f"{given.memory:g} GiB each",
        f"- forward pass of a row: SD 1.5 {flops['sd15'] / 1e12:.3f}, SDXL {flops['sdxl'] / 1e12:.3f} TFLOP",
        "",
        *table(head, rows),
        "",
        "GPU-days: with the exchange hidden behind the work, to not at all. Training only, without pairs.",
        "",
        *table(
            ["recipe", "the paper's GPUs", "its GPU-days", "its seconds a step, mean of both stages"],
            [[n, s["gpus"], s["gpu_days"], s["seconds_per_step"]] for n, s in sums.items()],
        ),
        "",
    ]
    path = Path(__file__).parent / f"scaling_{date.today().isoformat()}_computed.md"
    path.write_text("\n".join(lines), encoding="utf-8")
    print(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
