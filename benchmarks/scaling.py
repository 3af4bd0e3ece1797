"""Requirements of the columns of Table A1 on 8, 64 and 128 GPUs: memory, step time, traffic, GPU-days.

    python benchmarks/scaling.py [--tflops 312] [--used 0.45] [--gbytes 25] [--memory 80] [--launch 5]

The numbers are computed, not measured: memory and FLOPs from the real network shapes on fake tensors, time
from the peak of one GPU, an assumed utilization, the bandwidth between GPUs, and the time in which the host
calls an operator. Writes benchmarks/scaling_DATE_computed.md.
"""

import argparse
import sys
import tempfile
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import environment, table
from d2g.core.peak_flops import A100_BF16
from d2g.diffusion import pretrained
from d2g.diffusion.conditioning import Conditioning
from distill.config.presets import TABLE_A1
from distill.config.run import DistillConfig
from distill.planning.cost import PUBLISHED, column
from distill.planning.flops import count
from distill.planning.memory import CONTEXT_GIB, predict
from distill.planning.reference_models import UNETS, configs_only

OPERATORS = {
    ("sd15", "ode", False): 10_994,
    ("sd15", "ode", True): 14_654,
    ("sd15", "gan", False): 29_201,
    ("sd15", "gan", True): 42_737,
    ("sdxl", "ode", False): 27_086,
    ("sdxl", "ode", True): 39_022,
    ("sdxl", "gan", False): 80_091,
    ("sdxl", "gan", True): 124_215,
}
"""Operators that a step without R1 calls, by network, stage and recomputation (`tests/fake_cuda.py memory
PRESET STAGE train.batch_size=2 gan.penalty=none engine.parallel=ddp engine.activation_checkpointing=...`)."""
LATENT_LPIPS = 3 * 77e9 / 64**2
"""FLOP of one LatentLPIPS with its gradient, per latent position (benchmarks/latent_lpips.py)."""


def unet_flops(kind: str) -> float:
    """FLOP of a forward pass of one row."""
    with FakeTensorMode():
        unet = pretrained.new_unet(**UNETS[kind])
        config = unet.config
        added = None
        if config.addition_embed_type:
            added = {"text_embeds": torch.empty(1, 1280), "time_ids": torch.empty(1, 6)}
        size = config.sample_size
        text = Conditioning.from_text(torch.empty(1, 77, config.cross_attention_dim))
        inputs = torch.empty(1, 4, size, size), 999, text.tensors["hidden"]
        with torch.no_grad():
            return count(lambda: unet(*inputs, added_cond_kwargs=added))


def forward_equivalents(config: DistillConfig) -> float:
    """Cost of a row in forward passes of the U-Net: a backward pass counts twice, recomputation once.

    In the student's update D has no weight gradients, so its backward pass counts once.
    """
    recompute = 1.0 if config.engine.activation_checkpointing else 0.0
    student = 3 + recompute
    return student if config.stage == "ode" else student + 2 * (3 + recompute) + (2 + recompute)


def metric_flops(config: DistillConfig, positions: int) -> float:
    """FLOP of the regression loss of one row: one pass per LatentLPIPS, and per draw of E-LatentLPIPS."""
    draws = {"latent_lpips": 1, "e_latent_lpips": config.regression.draws}
    return LATENT_LPIPS * positions * sum(draws.get(name, 0) for name in config.regression.names)


def row_flops(config: DistillConfig, kind: str, unet: float) -> float:
    """FLOP of a row in a training step without R1. kind: a key of UNETS; unet: FLOP of its forward pass."""
    return forward_equivalents(config) * unet + metric_flops(config, UNETS[kind]["sample_size"] ** 2)


def fitting_engine(config: DistillConfig, gpus: int, memory_gib: float) -> tuple[DistillConfig, float]:
    """The config with the first engine that fits, from fastest to most economical, and its GiB per GPU."""
    rows = config.train.batch_size // gpus
    engines: list[dict[str, Any]] = [
        {"parallel": "ddp", "activation_checkpointing": False},
        {"parallel": "ddp", "activation_checkpointing": True},
        *(
            {"parallel": "fsdp", "activation_checkpointing": True, "gradient_accumulation": n}
            for n in (1, 2, 4, 8, 16, 32, 64)
        ),
    ]
    total = float("nan")
    for settings in engines:
        if settings.get("gradient_accumulation", 1) > max(1, rows // 2):
            continue
        config = replace(config, engine=replace(config.engine, gpus=gpus, **settings))
        total = predict(config, gpus).total
        if total + CONTEXT_GIB <= memory_gib:
            break
    return config, total


def traffic_bytes(config: DistillConfig, gpus: int, parameters: int) -> float:
    """Bytes that each GPU sends per step."""
    networks = 1 if config.stage == "ode" else 2
    ring = (gpus - 1) / gpus
    if config.engine.parallel == "ddp":
        return networks * 2 * ring * 4 * parameters
    # FSDP2 gathers bf16 weights for the forward and backward of each pass, and scatters fp32 gradients.
    micro_batches = config.engine.gradient_accumulation
    gathers = (2 if config.stage == "ode" else 2 + 4 + 2) * micro_batches
    return ring * parameters * (2 * gathers + 4 * networks * micro_batches)


def scaling_row(
    name: str, stage: str, gpus: int, teacher: str, flops: float, args: argparse.Namespace
) -> list[object]:
    """One row of the table: a stage of a recipe on `gpus` GPUs."""
    config = replace(TABLE_A1[name][stage], teacher=teacher)
    rows = config.train.batch_size // gpus
    config, memory = fitting_engine(config, gpus, args.memory)
    work = rows * row_flops(config, name.split("-")[0], flops)
    compute = work / (args.tflops * 1e12 * args.used)
    recomputes, micro_batches = config.engine.activation_checkpointing, config.engine.gradient_accumulation
    launches = OPERATORS[name.split("-")[0], stage, recomputes] * micro_batches * args.launch / 1e6
    parameters = sum(p.numel() for p in pretrained.load_on_meta(teacher, "unet").parameters())
    traffic = traffic_bytes(config, gpus, parameters)
    exchange = traffic / (args.gbytes * 1e9)

    # GPU-days with all communication hidden behind compute or launches, and with none of it hidden.
    steps = config.train.images // config.train.batch_size
    busy = max(compute, launches)
    days = [t * steps * gpus / 86_400 for t in (max(busy, exchange), busy + exchange)]
    engine = config.engine
    description = engine.parallel + (", recompute" if engine.activation_checkpointing else "")
    if engine.gradient_accumulation > 1:
        description += f", {engine.gradient_accumulation} micro-batches"
    gpu_days = f"{days[0]:.1f} to {days[1]:.1f}"
    seconds = [compute, f"{launches:.4g}{' (launch-bound)' if launches > compute else ''}"]
    return [name, stage, gpus, rows, description, memory, *seconds, traffic / 1e9, exchange, gpu_days]


def main() -> None:
    """Compute the table and write the result file."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument(
        "--tflops", type=float, default=A100_BF16 / 1e12, help="bf16 peak of one GPU (A100: 312)"
    )
    parser.add_argument("--used", type=float, default=0.45, help="share of the peak that the networks reach")
    parser.add_argument("--gbytes", type=float, default=25, help="GB/s each GPU sends (200 Gb/s network)")
    parser.add_argument("--memory", type=float, default=79.2, help="GiB of one GPU")
    parser.add_argument("--launch", type=float, default=5, help="microseconds of the host per operator")
    args = parser.parse_args()
    head = [
        "recipe",
        "stage",
        "GPUs",
        "rows each",
        "engine",
        "GiB each",
        "compute, s",
        "launches, s",
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
                    rows.append(scaling_row(name, stage, gpus, teachers[kind], flops[kind], args))
                    print(rows[-1], file=sys.stderr)
    sums = {name: column(name) for name in PUBLISHED if name != "cifar10"}
    lines = [
        "# Scaling, computed",
        "",
        *environment(),
        f"- assumed: {args.tflops:g} TFLOP/s bf16, {args.used:.0%} utilization, {args.gbytes:g} GB/s each, "
        f"{args.memory:g} GiB each, {args.launch:g} microseconds per operator",
        f"- forward pass of a row: SD 1.5 {flops['sd15'] / 1e12:.3f}, SDXL {flops['sdxl'] / 1e12:.3f} TFLOP",
        "",
        *table(head, rows),
        "",
        "Launches: the host's time for the operators of a step, beside the compute of the GPU; the longer "
        "one counts. GPU-days: with all communication hidden behind it, to none. Training only, no pairs.",
        "",
        *table(
            ["recipe", "the paper's GPUs", "its GPU-days", "its seconds per step, mean of both stages"],
            [[n, s["gpus"], s["gpu_days"], s["seconds_per_step"]] for n, s in sums.items()],
        ),
        "",
    ]
    path = Path(__file__).parent / f"scaling_{date.today().isoformat()}_computed.md"
    path.write_text("\n".join(lines), encoding="utf-8")
    print(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
