"""Pair generation against diffusers' own pipeline, its writer's cost, and how cost grows.

    python benchmarks/pairs.py [--sd15] [--quick]

`--sd15` adds a teacher of SD 1.5's size with random weights. Writes benchmarks/pairs_DATE_DEVICE.md.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import compare, median, table, write
from d2g.core import seeds
from d2g.core.errors import UserError
from d2g.diffusion.pretrained import SHIPPED, new_conditioner, new_tokenizer, new_unet, new_vae, save_pipeline
from distill.planning.flops import count as count_flops
from pairgen.config import PairConfig
from pairgen.job import Job, batched, open_job
from pairgen.speed import choose_speed
from pairgen.store.spec import create_store
from pairgen.store.writer import PairWriter

ROOT = Path(__file__).resolve().parents[1]
CAPTIONS = [
    f"a {size} {colour} {kind} {shape}, {ground} background"
    for size in ("small", "large")
    for colour in ("red", "blue", "green", "yellow")
    for kind in ("matte", "metal")
    for shape in ("cube", "sphere", "cone", "torus")
    for ground in ("white", "pink", "gray", "brown")
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def matmul_peak(dtype: torch.dtype, size: int = 4096) -> float:
    """FLOP/s of the best of several square matrix products: what this machine can do at most.

    On a GPU, where a product takes a fraction of a millisecond, several are timed together, so that waiting
    for the device hardly counts.
    """
    a, b = (torch.randn(size, size, device=DEVICE).to(dtype) for _ in range(2))
    count = products_in_a_row(size) if DEVICE == "cuda" else 1

    def products() -> None:
        for _ in range(count):
            a @ b

    seconds = compare({"mm": products}, repeats=7, warm_up=2)["mm"]
    return count * 2 * size**3 / min(seconds)


def products_in_a_row(size: int) -> int:
    """Products of this size that a GPU computes in some milliseconds; of small ones, at most 1000, whose
    launches take as long."""
    return min(1000, max(1, 20 * 4096**3 // size**3))


def sd15_folder(folder: Path) -> str:
    """A pipeline of SD 1.5's UNet and a text encoder of its width, with random weights."""
    torch.manual_seed(0)
    tokenizer = new_tokenizer(CAPTIONS, folder / "tokenizer", 400, 77)
    text = new_conditioner(tokenizer, width=768, layers=12, heads=12)
    blocks = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    unet = new_unet(
        sample_size=64,
        cross_attention_dim=768,
        attention_head_dim=8,
        block_out_channels=(320, 640, 1280, 1280),
        down_block_types=blocks,
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    )
    vae = new_vae(
        block_out_channels=(32, 32, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        scaling_factor=0.18215,
    )
    save_pipeline(folder, unet=unet, vae=vae, conditioner=text)
    return str(folder)


class Race:
    """A pair job and diffusers' pipeline of the same teacher, both loaded.

    With `precision=auto`, diffusers has its default, fp32.
    """

    def __init__(self, config: PairConfig) -> None:
        from diffusers import DDIMScheduler, DiffusionPipeline

        known = {"auto": torch.float32, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
        self.config, self.dtype = config, known[config.precision]
        self.job = open_job(choose_speed(config, torch.device(DEVICE)), DEVICE)
        self.product_dtype = known[self.job.spec.precision]
        folder = SHIPPED[config.teacher] / "teacher" if config.teacher in SHIPPED else config.teacher
        self.pipe = DiffusionPipeline.from_pretrained(folder, torch_dtype=self.dtype).to(DEVICE)
        self.pipe.scheduler = DDIMScheduler.from_config(self.pipe.scheduler.config, set_alpha_to_one=True)
        self.pipe.set_progress_bar_config(disable=True)

    def theirs(self, indices: list[int], noise: torch.Tensor) -> torch.Tensor:
        """The same pairs by diffusers, on the CPU."""
        latents: torch.Tensor = self.pipe(
            self.job.texts(indices),
            latents=noise.to(DEVICE, self.dtype),
            num_inference_steps=self.config.steps,
            guidance_scale=self.config.guidance,
            output_type="latent",
        ).images
        return latents.float().cpu()

    def row(self, size: int, repeats: int, compiled: bool = False) -> dict[str, float]:
        """Rows/s of both at a batch size, in turns, and the largest difference."""
        job = self.job
        if compiled:  # as open_job does
            job = replace(job, teacher=replace(job.teacher, network=torch.compile(job.teacher.network)))
        indices = list(range(size))
        noise, latents, _ = job.rows(indices)
        difference = float((latents.cpu() - self.theirs(indices, noise)).abs().max())
        contestants = {"ours": partial(ours, job, indices), "diffusers": partial(self.theirs, indices, noise)}
        taken = compare(contestants, repeats)
        speed = {name: size / median(seconds) for name, seconds in taken.items()}
        return {"batch": size, **speed, "largest difference": difference}


def race(config: PairConfig, batches: list[int], repeats: int, peak_size: int = 4096) -> dict[str, Any]:
    """Rows/s of both at each batch size, in turns; FLOP of a pair; FLOP/s of a square matrix product."""
    both = Race(config)
    rows = [both.row(size, repeats) for size in batches]
    chosen = {"precision": both.job.spec.precision, "compiled": both.job.spec.compiled}
    peak = matmul_peak(both.product_dtype, peak_size)
    return {"rows": rows, "flops": row_flops(both.job), "peak": peak, **chosen}


def against_diffusers(config: PairConfig, batches: list[int], repeats: int) -> list[str]:
    """The race as lines, with the ratio at the batch where each is fastest."""
    result = race(config, batches, repeats)
    rows, flops, peak = result["rows"], result["flops"], result["peak"]
    best = {name: max(row[name] for row in rows) for name in ("ours", "diffusers")}
    cells = [
        [r["batch"], r["ours"], r["diffusers"], r["ours"] / r["diffusers"], r["largest difference"]]
        for r in rows
    ]
    return [
        *table(["batch", "ours, pairs/s", "diffusers, pairs/s", "ratio", "largest difference"], cells),
        "",
        f"Ours: {result['precision']}, {'compiled' if result['compiled'] else 'not compiled'}. "
        f"At the batch where each is fastest: **{best['ours'] / best['diffusers']:.3f}x** "
        f"({best['ours']:.4g} against {best['diffusers']:.4g} pairs/s).",
        f"{flops / 1e12:.4g} TFLOP a pair, {flops * best['ours'] / 1e12:.4g} TFLOP/s: "
        f"**{100 * flops * best['ours'] / peak:.1f} %** of the {peak / 1e12:.4g} TFLOP/s that a "
        f"{result['precision']} matrix product of 4096 x 4096 reached in this run.",
    ]


def settings(config: PairConfig, size: int, repeats: int) -> list[str]:
    """Rows/s by precision, memory format and compilation; the largest difference from plain fp32."""
    rows: list[list[object]] = []
    indices = list(range(size))
    plain = ours(open_job(replace(config, precision="fp32", channels_last=False), DEVICE), indices)
    for change in ({}, {"channels_last": True}, {"compile": True}, {"precision": "bf16"}):
        job = open_job(replace(config, **change), DEVICE)  # type: ignore[arg-type]
        seconds = median(compare({"ours": partial(ours, job, indices)}, repeats)["ours"])
        difference = float((ours(job, indices) - plain).abs().max())
        rows.append([", ".join(map(str, change.items())) or "plain", size / seconds, difference])
    return table(["setting", "pairs/s", "largest difference"], rows)


def ours(job: Job, indices: list[int]) -> torch.Tensor:
    """Latents of these pairs, on the CPU, so that the device is waited for."""
    return job.rows(indices)[1].cpu()


def row_flops(job: Job) -> float:
    """Floating-point operations of one pair: matrix products and convolutions."""
    return count_flops(lambda: job.rows([0]))


def writer_overhead(config: PairConfig, repeats: int) -> list[str]:
    """A row's share of checking, encoding, hashing and syncing shards, against the teacher's seconds."""
    job = open_job(replace(config, num_pairs=2048, shard_size=1024), DEVICE)
    spec, size = job.spec, config.batch_size
    latents = ours(job, list(range(size)))
    noise_batches = [seeds.noise(spec.seed, range(n, n + size), spec.latent_shape, spec.torch_dtype).float()
             for n in range(0, spec.num_pairs, size)]  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        runs = count()

        def write_all() -> None:
            folder = Path(scratch) / str(next(runs))
            create_store(folder, spec)
            for shard in range(spec.num_shards):
                with PairWriter(folder, spec, shard) as writer:
                    for indices in batched(writer.missing, size):
                        writer.append(noise_batches[indices[0] // size], latents, job.texts(indices), indices)
                    writer.commit()

        taken = compare({"teacher": partial(ours, job, list(range(size))), "writer": write_all}, repeats)
    teacher, writer = median(taken["teacher"]) / size, median(taken["writer"]) / spec.num_pairs
    return [
        f"A row takes the writer {1e3 * writer:.3f} ms (checks, HDF5, sha256, fsync, rename; shards of "
        f"{spec.shard_size}) and the teacher {1e3 * teacher:.2f} ms ({spec.steps} steps, batch {size}): "
        f"**{100 * writer / teacher:.2f} %**, and the writer works in a thread of its own."
    ]


def growth(config: PairConfig, quick: bool) -> list[str]:
    """Seconds a pair as steps and resolution grow."""
    rows: list[list[object]] = []
    for steps, latent in ((5, 8), (10, 8), (20, 8), (50, 8), (20, 4), (20, 16), (20, 32)):
        job = open_job(replace(config, steps=steps, latent_size=latent), DEVICE)
        size = max(1, 8 * 64 // latent**2)
        indices = list(range(size))
        seconds = median(compare({"ours": partial(ours, job, indices)}, 1 if quick else 3)["ours"]) / size
        gib = 2 * 1e6 * job.spec.latent_space.channels * latent**2 * 2 / 2**30
        rows.append([steps, f"{latent}x{latent}", size, 1000 * seconds, seconds * 1e6 / 3600, gib])
    head = [
        "steps",
        "latent",
        "batch",
        "ms a pair",
        "hours a million pairs here",
        "GiB a million pairs, fp16",
    ]
    return table(head, rows)


def processes(config: PairConfig, counts: tuple[int, ...]) -> list[str]:
    """pairs/s of complete `d2g pairs generate` runs by number of processes, one thread each."""
    rows: list[list[object]] = []
    for number in counts:
        with tempfile.TemporaryDirectory() as folder:
            prompts = Path(folder) / "prompts.txt"
            prompts.write_text("\n".join(CAPTIONS))
            settings = {
                name: getattr(config, name)
                for name in ("teacher", "num_pairs", "steps", "guidance", "batch_size", "shard_size")
            }
            words = [f"{name}={value}" for name, value in settings.items()]
            launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(number)]
            job = [
                "-m",
                "cli",
                "pairs",
                "generate",
                "--prompts",
                str(prompts),
                "--out",
                f"{folder}/pairs",
                "--json",
            ]
            done = subprocess.run(
                [sys.executable, *launch, *job, *(part for word in words for part in ("--set", word))],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                capture_output=True,
                text=True,
            )
            if done.returncode:
                raise UserError(done.stderr[-2000:])
            report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        rows.append([number, report["pairs"], report["seconds"], report["pairs_per_sec"]])
    return table(["processes", "pairs", "seconds, loading included", "pairs/s"], rows)


def main() -> None:
    """Run all parts and write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sd15", action="store_true", help="also a teacher of SD 1.5's size")
    parser.add_argument("--quick", action="store_true", help="a smoke run; its numbers mean little")
    args = parser.parse_args()
    repeats = 1 if args.quick else 5
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        prompts = Path(scratch) / "prompts.txt"
        prompts.write_text("\n".join(CAPTIONS))
        mini = PairConfig(
            teacher="miniature", prompts=str(prompts), num_pairs=128, steps=10, guidance=3.0, batch_size=64,
            shard_size=64, precision="fp32", compile=False,
        )  # fmt: skip
        auto = replace(mini, num_pairs=100_000, precision="auto", compile="auto")
        lines = ["## Against diffusers: the miniature teacher, 10 DDIM steps, guidance 3", ""]
        lines += against_diffusers(mini, [1, 8] if args.quick else [1, 4, 16, 32], repeats)
        lines += ["", "## The same, with the precision and compilation that ours measures by itself", ""]
        lines += against_diffusers(auto, [1, 8] if args.quick else [1, 4, 16, 32], repeats)
        if args.sd15:
            config = replace(mini, teacher=sd15_folder(Path(scratch) / "sd15"), steps=2, guidance=8.0)
            gpu = DEVICE == "cuda"
            config = replace(config, steps=50, precision="fp16", channels_last=True) if gpu else config
            lines += [
                "",
                f"## Against diffusers: SD 1.5's size, random weights, {config.steps} steps, 64x64",
                "",
            ]
            lines += against_diffusers(config, [1, 4, 8, 16, 32] if gpu else [1, 2], 3 if gpu else 2)
        lines += ["", "## Settings that decide speed (miniature)", ""]
        lines += settings(mini, 8 if args.quick else 32, repeats)
        lines += ["", "## The writer", "", *writer_overhead(mini, 1 if args.quick else 3)]
        lines += ["", "## Cost by steps and resolution (miniature)", "", *growth(mini, args.quick)]
        busy = replace(mini, num_pairs=128 if args.quick else 512)
        lines += ["", "## Cost by processes (miniature, one thread each)", ""]
        lines += processes(busy, (1, 2) if args.quick else (1, 2, 4))
    lines += ["", f"All of it took {time.monotonic() - started:.0f} s."]
    write("pairs_quick" if args.quick else "pairs", "Pair generation", lines)


if __name__ == "__main__":
    main()
