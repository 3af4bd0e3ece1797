"""Reading pairs: compared with plain file reads and with what training consumes; opening many shards.

    python benchmarks/reader.py [--rows 32768] [--repeats 5] [--shards 3000] [--folder DIR]

Needs about 64 KiB of disk a row in DIR (a temporary folder if not given). Writes
benchmarks/reader_DATE_DEVICE.md.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import median, table, write
from d2g.core.allocator import keep_freed_memory
from d2g.core.peak_flops import H100_BF16
from d2g.diffusion import pretrained
from d2g.diffusion.latents import LatentSpace
from distill.config.presets import DISTILL_PRESETS
from distill.planning.flops import count as count_flops
from distill.training.data import pair_batches
from distill.training.train import train
from pairgen.store.dataset import PairSampler, pair_loader
from pairgen.store.hdf5 import PairBatch, encode_rows
from pairgen.store.reader import PairReader
from pairgen.store.spec import StoreSpec, create_store, shard_path

BATCH, BLOCK, WINDOW = 64, 64, 16
SPEC = StoreSpec(
    teacher="none",
    teacher_sha256="0" * 64,
    prompts_sha256="0" * 64,
    num_pairs=1,
    num_prompts=1,
    solver="ddim",
    steps=50,
    spacing="leading",
    final_alpha_one=True,
    guidance=8.0,
    seed=0,
    latent_shape=(4, 64, 64),
    latent_space=LatentSpace(channels=4, downscale=8, scale=0.18215),
    shard_size=4096,
)


def make_store(folder: Path, spec: StoreSpec) -> Path:
    """A store of random values; reading speed does not depend on them."""
    create_store(folder, spec)
    generator = torch.Generator().manual_seed(0)
    for shard in range(spec.num_shards):
        index = list(spec.rows(shard))
        shape = (len(index), *spec.latent_shape)
        noise, latent = (torch.randn(shape, generator=generator).to(spec.torch_dtype) for _ in range(2))
        prompts = [f"a photograph of thing number {i}, on a table, in the morning" for i in index]
        rows = PairBatch(noise=noise, latents=latent, prompts=prompts, index=torch.tensor(index))
        shard_path(folder, shard).write_bytes(encode_rows(spec, rows))
    os.sync()
    return folder


def forget(folder: Path) -> None:
    """Drop the files of a store from the page cache."""
    for path in sorted((folder / "shards").iterdir()):
        file = os.open(path, os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def read_plainly(folder: Path, buffer: bytearray) -> None:
    """Read every byte of every file in order."""
    for path in sorted((folder / "shards").iterdir()):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def read_shuffled(
    reader: PairReader, block: int = 0, window: int = 0, workers: int = 0, dtype: torch.dtype | None = None
) -> None:
    """Read one epoch of batches."""
    sampler = PairSampler(len(reader), BATCH, 0, block=block, window=window)
    for _ in islice(pair_loader(reader, sampler, workers=workers, dtype=dtype), len(reader) // BATCH):
        pass


def turns(
    contestants: dict[str, Callable[[], None]], repeats: int, before: Callable[[], None]
) -> list[list[float]]:
    """Median [wall seconds, CPU seconds of this process] of each contestant; `before` is not timed."""
    wall: dict[str, list[float]] = {name: [] for name in contestants}
    busy: dict[str, list[float]] = {name: [] for name in contestants}
    for repeat in range(repeats + 1):
        for name, run in contestants.items():
            before()
            started, used = time.perf_counter(), time.process_time()
            run()
            if repeat:  # the first is a warm-up
                wall[name].append(time.perf_counter() - started)
                busy[name].append(time.process_time() - used)
    return [[statistics.median(wall[name]), statistics.median(busy[name])] for name in contestants]


def against_files(folder: Path, repeats: int) -> tuple[list[str], float]:
    """Tables of shuffled and plain reading, from disk and memory; rows/s of block reads from disk."""
    reader, buffer = PairReader(folder), bytearray(1 << 20)
    started = time.process_time()
    reader.read(range(0, len(reader), reader.spec.shard_size))  # shards opened and checked
    opening = (time.process_time() - started) / reader.shards
    size = sum(path.stat().st_size for path in (folder / "shards").iterdir())
    contestants: dict[str, Callable[[], None]] = {
        "plain: open().readinto, in order": partial(read_plainly, folder, buffer),
        f"blocks of {BLOCK}, window {WINDOW}": partial(read_shuffled, reader, BLOCK, WINDOW),
        "the same, to fp32": partial(read_shuffled, reader, BLOCK, WINDOW, 0, torch.float32),
        "all rows shuffled": partial(read_shuffled, reader),
        "blocks, 1 worker": partial(read_shuffled, reader, BLOCK, WINDOW, 1),
        "blocks, 2 workers": partial(read_shuffled, reader, BLOCK, WINDOW, 2),
    }
    lines: list[str] = []
    in_blocks: list[float] = []
    for title, before in (("from the disk", partial(forget, folder)), ("from memory", lambda: None)):
        times = turns(contestants, repeats, before)
        rows = [
            [name, len(reader) / wall, size / wall / 1e9, times[0][0] / wall, busy]
            for name, (wall, busy) in zip(contestants, times, strict=True)
        ]
        in_blocks.append(float(rows[1][1]))
        head = [title, "rows/s", "GB/s", "of plain", "CPU s of the process"]
        lines += ["", *table(head, rows), "", f"Load average: {os.getloadavg()[0]:.1f}."]
    about = [
        f"{len(reader)} rows of 4x64x64 float16 with stored noise, {size / 2**30:.2f} GiB in {reader.shards} "
        f"shards; batches of {BATCH}, as stored. Medians of {repeats} epochs, contestants taking turns. From "
        "the disk: the files are dropped from the page cache before each epoch (posix_fadvise). One process "
        "each, but for the workers; these hand batches over in shared memory, and their CPU time is not "
        f"counted. Before: the header, index and places of chunks of each shard, {opening * 1e3:.1f} ms "
        f"of CPU for one of {reader.spec.shard_size} rows."
    ]
    return about + lines, in_blocks[0]


def against_training(folder: Path) -> list[str]:
    """Rows/s of the reader compared with images/s of the miniature's regression stage on this machine."""
    config = DISTILL_PRESETS["miniature"]["ode"]
    teacher = pretrained.resolve(config.teacher)
    unet = pretrained.load_unet(str(teacher))
    shape = (unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
    space = replace(SPEC.latent_space, channels=shape[0])
    sha256 = pretrained.weights_sha256(config.teacher)
    spec = replace(
        SPEC, latent_shape=shape, latent_space=space, teacher_sha256=sha256, num_pairs=8192, shard_size=512
    )
    store = make_store(folder / "miniature", spec)
    images = 8 * config.train.batch_size
    config = replace(
        config, pairs=str(store), train=replace(config.train, images=images, checkpoint_images=10**9)
    )
    trained = train(config, folder / "run").images_per_sec
    reader = PairReader(store)
    read: list[float] = []
    for _ in range(5):
        batches = pair_batches(reader, config.train.batch_size, 0, 0, 0)
        next(batches)
        started = time.perf_counter()
        for _ in islice(batches, 40):
            pass
        read.append(40 * config.train.batch_size / (time.perf_counter() - started))
    rate = median(read)
    return [
        f"Miniature, batch {config.train.batch_size}, {images} images of stage 1 on this machine: "
        f"{trained:.1f} images/s. Its rows, all shuffled, read in one process: {rate:.0f} rows/s, "
        f"{rate / trained:.0f} times as many."
    ]


def sd15_bound(rows_per_sec: float) -> list[str]:
    """An upper bound on the SD 1.5 pairs per second that one GPU consumes in the regression stage."""
    with torch.device("meta"):
        unet = pretrained.new_unet(
            sample_size=64,
            cross_attention_dim=768,
            attention_head_dim=8,
            block_out_channels=(320, 640, 1280, 1280),
            layers_per_block=2,
            down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        )
        inputs = torch.zeros(1, 4, 64, 64), torch.zeros(1), torch.zeros(1, 77, 768)
    with torch.no_grad():
        flops = 3 * count_flops(lambda: unet(inputs[0], inputs[1], encoder_hidden_states=inputs[2]))
    bound = H100_BF16 / flops
    return [
        f"SD 1.5, an estimate and not a run: forward and backward of the UNet at 64x64 take "
        f"{flops / 1e12:.2f} TFLOP an image (the forward counted, the backward taken as twice that). At "
        f"{H100_BF16 / 1e12:.0f} TFLOP/s, all of an H100's or H200's stated bf16 peak with nothing else to "
        f"do, that is {bound:.0f} images/s, more than any training reaches. The reader gives "
        f"{rows_per_sec:.0f} rows/s in blocks from the disk, {rows_per_sec / bound:.0f} times as many."
    ]


def many_shards(folder: Path, shards: int) -> list[str]:
    """Time to open a store of many small shards."""
    spec = replace(SPEC, latent_shape=(4, 8, 8), num_pairs=4 * shards, shard_size=4)
    store = make_store(folder / "many", spec)
    seconds: dict[str, list[float]] = {"open": [], "first row": [], "a row of every shard": []}
    for _ in range(3):
        started = time.perf_counter()
        reader = PairReader(store)
        seconds["open"].append(time.perf_counter() - started)
        started = time.perf_counter()
        reader.read([0])
        seconds["first row"].append(time.perf_counter() - started)
        started = time.perf_counter()
        reader.read(range(0, len(reader), 4))
        seconds["a row of every shard"].append(time.perf_counter() - started)
    rows = [[name, statistics.median(times)] for name, times in seconds.items()]
    return [
        f"{shards} shards of 4 rows of 4x8x8. Opening reads 512 bytes of each; the header and the "
        "index are read with a shard's first row, which `a row of every shard` adds up.",
        "",
        *table(["", "seconds (median of 3)"], rows),
    ]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=32_768)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--shards", type=int, default=3000)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()  # as in a training process
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        big = make_store(folder / "big", replace(SPEC, num_pairs=options.rows))
        files, in_blocks = against_files(big, options.repeats)
        sections = {
            "Against plain reading of the same files": files,
            "Against what training eats": [*against_training(folder), "", *sd15_bound(in_blocks)],
            "Opening": many_shards(folder, options.shards),
        }
    lines = [line for title, body in sections.items() for line in (f"## {title}", "", *body, "")]
    write("reader", "Reading pairs", lines)


if __name__ == "__main__":
    main()
