"""Compares E-LatentLPIPS with the authors' package and with decoding plus LPIPS: time, memory, accuracy.

python benchmarks/latent_lpips.py [--theirs THEIR_PYTHON] [--repeats 3] [--quick] [--no-decode]

Measures one forward and backward pass with respect to one input, with transforms `bgco` and a VGG16-BN of
full width with random weights from one file. Each contestant runs in its own process
(latent_lpips_worker.py); they take turns. THEIR_PYTHON is the interpreter of an environment with
elatentlpips 0.2 (see elatentlpips_golden.py); without it, only our implementation runs. Writes
benchmarks/latent_lpips_DATE_DEVICE.md, in twelve minutes on two cores.
"""

import argparse
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import authors  # noqa: E402
from benchmarks.common import compare, median, table, write  # noqa: E402
from benchmarks.pairs import matmul_peak  # noqa: E402
from benchmarks.worker import Worker  # noqa: E402
from latent_lpips import load_lpips  # noqa: E402
from latent_lpips.config import Precision  # noqa: E402

SIZES, BATCHES, CHANNELS = (64, 128), (1, 4, 16), 4
LARGE = 4 * 64 * 64  # positions above which a pass needs no warm-up
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GFLOP = 77.0 / 64**2
"""Work of the trunk per latent position and pass; a distance with its gradient takes three passes."""

Case = tuple[int, int]
Rows = dict[str, dict[str, float]]


def checkpoints(folder: Path) -> Path:
    """Write both checkpoint files where the authors' package expects them; returns the calibrated one."""
    (folder / "ckpt").mkdir()
    authors.trunk_file(folder / "ckpt" / "sd15_latent_vgg16.pth.tar", CHANNELS, seed=1)
    return authors.tuned_file(folder / "ckpt" / "sd15_latest_vgg16_tuned.pth", CHANNELS, seed=1)


def contest(case: Case, contestants: dict[str, dict[str, Any]], repeats: int, folder: Path) -> Rows:
    """Return median seconds and the memory of each contestant, in new processes that take turns."""
    size, batch = case
    shape = {"size": size, "batch": batch, "channels": CHANNELS}
    seconds: dict[str, list[dict[str, float]]] = {name: [] for name in contestants}
    with ExitStack() as stack:
        workers = {}
        for name, settings in contestants.items():  # their imports run side by side
            workers[name] = stack.enter_context(Worker(settings["python"], folder))
        for name, settings in contestants.items():
            workers[name].ask(do="open", channels=CHANNELS, **settings["open"])
        warm_up = int(size * size * batch <= LARGE)
        for turn in range(warm_up + repeats):
            for name, worker in workers.items():
                answer = worker.ask(do="time", **shape)
                if turn >= warm_up:
                    seconds[name].append(answer)
        memory = {name: worker.ask(do="memory", **shape) for name, worker in workers.items()}
    return {
        name: {key: median([answer[key] for answer in answers]) for key in ("wall", "cpu")} | memory[name]
        for name, answers in seconds.items()
    }


def speed(theirs: str | None, weights: Path, cases: list[Case], repeats: int) -> list[str]:
    """Return the table of times, memory and ratios, and the range of the ratios."""
    contestants: dict[str, dict[str, Any]] = {}
    if theirs is not None:
        contestants["elatentlpips 0.2"] = {"python": theirs, "open": {"who": "theirs", "space": "sd15"}}
    for precision in ("fp32", "auto"):
        ours = {"who": "ours", "weights": str(weights), "precision": precision, "root": str(ROOT)}
        contestants[f"ours, {precision}"] = {"python": sys.executable, "open": ours}
    rows: list[list[object]] = []
    ratios: dict[str, list[tuple[float, ...]]] = {}
    for case in cases:
        results = contest(case, contestants, repeats, weights.parents[1])
        base = next(iter(results.values()))
        for name, row in results.items():
            ratio = tuple(base[k] / row[k] if k == "wall" else row[k] / base[k] for k in KEYS)
            ratios.setdefault(name, []).append(ratio)
            rows.append([latent(case), case[1], name, *(row[k] for k in COLUMNS), *ratio])
        print(f"{case}: { {name: round(row['wall'], 2) for name, row in results.items()} }", file=sys.stderr)
    head = ["latent", "batch", "who", "s", "CPU s", "extra MiB", "peak MiB", "speed", "extra", "peak"]
    explained = [
        "",
        "Extra: memory of a pass beyond what the process held before it. Peak: with weights and code, beyond "
        "what `import torch` takes. Speed, extra and peak are ratios to the first row of the same latent and "
        "batch.",
        "",
        *(f"- {name}: {spread(of)}" for name, of in ratios.items()),
    ]
    return [*table(head, rows), *explained]


def spread(ratios: list[tuple[float, ...]]) -> str:
    """Describe the range of the ratios over all cases, from worst to best."""
    faster, extra, peak = ([ratio[k] for ratio in ratios] for k in range(3))
    return (
        f"speed {min(faster):.2f}x to {max(faster):.2f}x, "
        f"extra memory {max(extra):.3f}x to {min(extra):.3f}x, peak {max(peak):.3f}x to {min(peak):.3f}x"
    )


def latent(case: Case) -> str:
    """Return the shape of a case's latents."""
    return f"{CHANNELS}x{case[0]}x{case[0]}"


COLUMNS = ("wall", "cpu", "extra_mib", "peak_mib")
KEYS = ("wall", "extra_mib", "peak_mib")


def against_decoding(weights: Path, cases: list[Case], repeats: int) -> list[str]:
    """Compare our distance at precision `auto` with a decoder of SD's size plus the package lpips."""
    ours = {"who": "ours", "weights": str(weights), "precision": "auto", "root": str(ROOT)}
    contestants = {
        "decode and LPIPS": {"python": sys.executable, "open": {"who": "decoded"}},
        "ours, auto": {"python": sys.executable, "open": ours},
    }
    rows: list[list[object]] = []
    for case in cases:
        decoded, ours_auto = contest(case, contestants, repeats, weights.parents[1]).values()
        speedup, memory = decoded["wall"] / ours_auto["wall"], ours_auto["extra_mib"] / decoded["extra_mib"]
        rows.append([latent(case), case[1], decoded["wall"], ours_auto["wall"], speedup, memory])
    head = ["latent", "batch", "decode and LPIPS, s", "ours, s", "speed", "extra memory"]
    return table(head, rows)


def accuracy(weights: Path, size: int) -> list[str]:
    """Compare distances and gradients with float64 autograd: relative error, and cosine of the gradients."""
    exact = load_lpips(weights, fold=False).double()
    pred = torch.randn(2, CHANNELS, size, size, generator=torch.Generator().manual_seed(0))
    other = torch.randn(2, CHANNELS, size, size, generator=torch.Generator().manual_seed(1))
    rows: list[list[object]] = []
    targets = {"unrelated": other, "noise 1": pred + other, "noise 0.1": pred + 0.1 * other}
    for pair, target in targets.items():
        distance, exact_gradient = with_gradient(exact, pred.double(), target.double())
        for precision in ("fp32", "bf16"):
            quick = load_lpips(weights, precision=precision, device=DEVICE)
            result, gradient = (x.cpu() for x in with_gradient(quick, pred.to(DEVICE), target.to(DEVICE)))
            error = (result / distance - 1).abs().max().item()
            cosine = torch.cosine_similarity(gradient.double().flatten(), exact_gradient.flatten(), 0).item()
            rows.append([pair, distance.mean().item(), precision, f"{error:.1e}", f"{1 - cosine:.1e}"])
    return table(["pair", "distance", "precision", "relative error", "1 - cosine of gradients"], rows)


def with_gradient(metric: Any, pred: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return the distance and its gradient with respect to `pred`."""
    pred = pred.clone().requires_grad_()
    distance = metric(pred, target)
    return distance.detach(), torch.autograd.grad(distance.sum(), pred)[0]


def trunk_speed(weights: Path, precision: Precision, in_a_row: int = 1) -> float:
    """FLOP/s of the trunk, forward and backward, on 16 latents of 64x64. in_a_row: passes that are timed
    together, so that waiting for a GPU hardly counts."""
    metric = load_lpips(weights, precision=precision, device=DEVICE)
    pred, target = (torch.randn(16, CHANNELS, 64, 64, device=DEVICE) for _ in range(2))

    def passes() -> None:
        for _ in range(in_a_row):
            with_gradient(metric, pred, target)

    seconds = median(compare({"ours": passes}, repeats=7, warm_up=2)["ours"]) / in_a_row
    return 3 * 1e9 * GFLOP * pred[:, 0].numel() / seconds


def use_of_peak(weights: Path) -> list[str]:
    """Return the trunk's throughput as a share of that of a square matrix product in the same run."""
    rows: list[list[object]] = []
    types: list[tuple[Precision, torch.dtype]] = [("fp32", torch.float32), ("bf16", torch.bfloat16)]
    for precision, dtype in types:
        peak, reached = matmul_peak(dtype) / 1e12, trunk_speed(weights, precision) / 1e12
        rows.append([precision, peak, reached, f"{reached / peak:.0%}"])
    return table(["precision", "matmul, TFLOP/s", "trunk, TFLOP/s", "share"], rows)


def main() -> None:
    """Run the selected comparisons and write the page."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--theirs", help="interpreter with elatentlpips 0.2")
    parser.add_argument("--repeats", type=int, default=3, help="passes of each contestant and case")
    parser.add_argument("--quick", action="store_true", help="small latents, to check that it runs")
    parser.add_argument("--no-decode", action="store_true", help="skip the decoder")
    options = parser.parse_args()
    theirs = None if options.theirs is None else str(Path(options.theirs).absolute())
    sizes, batches = ((16, 32), (1, 2)) if options.quick else (SIZES, BATCHES)
    cases = [(size, batch) for size in sizes for batch in batches]
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        weights = checkpoints(Path(folder))
        lines = ["## Speed and memory", "", *speed(theirs, weights, cases, options.repeats)]
        if not options.no_decode:
            # A pass of the decoder takes half a minute and 6 GiB on two cores, per latent of 64x64.
            decoder_cases = cases if DEVICE == "cuda" else cases[:1]
            lines += [
                "",
                "## Decode and LPIPS",
                "",
                *against_decoding(weights, decoder_cases, options.repeats),
            ]
        lines += ["", "## Accuracy", "", *accuracy(weights, 16 if options.quick else 32)]
        if DEVICE == "cuda":
            lines += ["", "## Use of the matrix units", "", *use_of_peak(weights)]
    lines += ["", f"The run took {time.monotonic() - started:.0f} s."]
    write("latent_lpips", "E-LatentLPIPS: time, memory, accuracy", lines)


if __name__ == "__main__":
    main()
