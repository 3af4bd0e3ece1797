"""One contestant of benchmarks/latent_lpips.py, in its own process and, for elatentlpips, its own Python.

Reads one JSON object per line on stdin and answers each with one on stdout: `open` builds a distance, `time`
and `memory` measure one forward and backward pass with respect to one input, `distance` computes distances of
stored inputs.
It needs only torch and the measured package; elatentlpips is used through its public interface.
"""

import ctypes
import gc
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch

Request = dict[str, Any]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def open_theirs(request: Request) -> Any:
    """Build the package's E-LatentLPIPS from ./ckpt in the current folder, where it looks for its files."""
    import elatentlpips

    metric = elatentlpips.ELatentLPIPS(
        encoder=request["space"], augment=request.get("augment", "bgco"), verbose=False
    )
    metric = metric.to(DEVICE).eval()
    options = request.get("options", {"ensembling": True, "add_l1_loss": False})
    return lambda pred, target, **changes: metric(pred, target, **{**options, **changes}).flatten(1).mean(1)


def open_ours(request: Request) -> Any:
    """Build our E-LatentLPIPS from the same file."""
    sys.path.insert(0, request["root"])
    from latent_lpips import ELatentLPIPS, load_lpips

    metric = load_lpips(request["weights"], precision=request["precision"], device=DEVICE)
    return ELatentLPIPS(metric, request.get("augment", "bgco"))


def open_plain(request: Request) -> Any:
    """Build the same E-LatentLPIPS in the form of the authors' package: batch norms, every layer through
    autograd, and torch's default arithmetic."""
    sys.path.insert(0, request["root"])
    from latent_lpips import ELatentLPIPS, load_lpips

    metric = load_lpips(request["weights"], fold=False, device=DEVICE)
    return ELatentLPIPS(metric, request.get("augment", "bgco"))


def open_decoded(request: Request) -> Any:
    """Build a distance that decodes with a random VAE, of Stable Diffusion's size unless `blocks` says
    otherwise, and applies lpips' VGG.
    """
    import lpips
    from diffusers import AutoencoderKL

    blocks = request.get("blocks", (128, 256, 512, 512))
    vae = AutoencoderKL(
        block_out_channels=blocks,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=request["channels"],
    )
    vae = vae.to(DEVICE).eval().requires_grad_(False)
    metric = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False).to(DEVICE).requires_grad_(False)

    def distance(pred: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            target_pixels = vae.decode(target).sample
        value: torch.Tensor = metric(vae.decode(pred).sample, target_pixels).flatten()
        return value

    return distance


def _status(name: str) -> float:
    """Return the MiB of an entry of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) / 1024


BASELINE_MIB = 0.0 if DEVICE == "cuda" else _status("VmRSS")
OPENERS = {"theirs": open_theirs, "ours": open_ours, "plain": open_plain, "decoded": open_decoded}


def timed(distance: Any, request: Request) -> Request:
    """Seconds of one pass, by the wall clock and in CPU time. Passes follow each other as in a training, so
    the allocator still has the memory of the pass before."""
    pred, target = _inputs(request)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    _pass(distance, pred, target)
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def memory(distance: Any, request: Request) -> Request:
    """Memory of one pass: MiB beyond what the process held before, and peak MiB beyond what `import torch`
    takes. Memory that earlier passes have freed goes back to the system first, so it is not timed."""
    pred, target = _inputs(request)
    before = _begin()
    _pass(distance, pred, target)
    peak = _peak()
    return {"extra_mib": peak - before, "peak_mib": peak - BASELINE_MIB}


def _inputs(request: Request) -> list[torch.Tensor]:
    shape = (request["batch"], request["channels"], request["size"], request["size"])
    return [torch.randn(shape, device=DEVICE, requires_grad=k == 0) for k in (0, 1)]


def _pass(distance: Any, pred: torch.Tensor, target: torch.Tensor) -> None:
    """Forward and backward, to the end."""
    distance(pred, target).sum().backward()
    assert pred.grad is not None and bool(pred.grad.isfinite().all())
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def _begin() -> float:
    """Release freed memory and reset the peak; returns the MiB held now."""
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak() -> float:
    return torch.cuda.max_memory_allocated() / 2**20 if DEVICE == "cuda" else _status("VmHWM")


def measure(distance: Any, request: Request) -> Request:
    """Return the distances of stored inputs."""
    pred, target = torch.load(request["inputs"], weights_only=True)
    with torch.no_grad():
        return {"distance": distance(pred, target, **request.get("changes", {})).tolist()}


def main() -> None:
    """Answer requests until stdin ends."""
    warnings.simplefilter("ignore")
    answers, sys.stdout = sys.stdout, sys.stderr  # elatentlpips prints to stdout
    distance: Any = None
    for line in sys.stdin:
        request: Request = json.loads(line)
        if request["do"] == "open":
            torch.set_num_threads(request.get("threads") or torch.get_num_threads())
            distance = OPENERS[request["who"]](request)
            precision = getattr(getattr(distance, "metric", None), "precision", "fp32")
            answer: Request = {
                "torch": torch.__version__,
                "threads": torch.get_num_threads(),
                "precision": precision,
            }
        else:
            actions = {"time": timed, "memory": memory, "distance": measure}
            answer = actions[request["do"]](distance, request)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
