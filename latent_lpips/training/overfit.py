"""`d2g lpips overfit`: optimize random latents towards target latents with the distance as the only loss.

This is the experiment of Diffusion2GAN's supplement C.1 and Fig. A1. It writes
OUT/FAMILIES/{config.json,stats.jsonl,checkpoints/}, OUT/curves.svg, OUT/curves.png and OUT/decoded.png.
"""

import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2g.core.config import to_json
from d2g.core.distributed import checkpoint, process_group
from d2g.core.errors import Interrupted, UserError
from d2g.core.png import image_grid, save_png
from d2g.core.progress import Progress, quiet
from d2g.core.seeds import Stream, generator, noise
from d2g.core.signals import StopFlag
from d2g.core.tracking.run_directory import RunLog, read_stats, sole_owner
from d2g.diffusion import pretrained
from d2g.diffusion.latents import decode, encode, from_uint8, to_uint8
from latent_lpips.distance import ELatentLPIPS, LatentLPIPS
from latent_lpips.training.calibrate import metric_sha256, open_metric
from latent_lpips.training.config import OverfitConfig, require_set
from latent_lpips.training.crops import center_crop_resized
from latent_lpips.training.labeled_images import open_unlabeled
from latent_lpips.training.latent_stream import check_image_size

OVERFIT_PANELS = {"latent_lpips": "LatentLPIPS without transforms", "pixel_mse": "pixel MSE, decoded"}


@dataclass(frozen=True, kw_only=True)
class OverfitResult:
    """Result of `overfit_latents`.

    `final` has, per families of transforms, the last latent_lpips (without transforms), pixel_mse (of decoded
    images in [0, 1]), psnr in dB (at most 120) and loss. `order` lists the families by pixel_mse, best first.
    """

    out: str
    final: dict[str, dict[str, float]]
    order: list[str]
    images: list[str]
    plot: str
    decoded: str
    seconds: float


def overfit_latents(config: OverfitConfig, out: Path, progress: Progress = quiet) -> OverfitResult:
    """Minimize E-LatentLPIPS from random latents to those of `count` images, once for each of `families`.

    All start from the same noise. Runs resume from their newest checkpoints. Raises UserError for bad input
    and while another process works in OUT, FloatingPointError for a non-finite loss, and Interrupted on
    Ctrl-C.
    """
    require_set(config, "data", "latents", "weights")
    with sole_owner(out, "optimizes in"):
        return _overfit(config, out, progress)


def _overfit(config: OverfitConfig, out: Path, progress: Progress) -> OverfitResult:
    started = time.monotonic()
    device = process_group.own_device()
    # Load the networks and the images.
    vae = pretrained.load_autoencoder(config.latents).to(device)
    check_image_size(vae, config.size)
    metric = open_metric(config.weights, config.latents, vae, device)
    pictures = open_unlabeled(config.data)
    if len(pictures) < config.count:
        raise UserError(f"{config.data} holds {len(pictures)} pictures, expected {config.count}; set count")
    # Targets: the first `count` images as latents, and decoded again for the pixel error.
    pixels = torch.stack(
        [center_crop_resized(pictures.open(row), config.size, 1.0) for row in range(config.count)]
    )
    with torch.no_grad():
        targets = encode(vae, from_uint8(pixels).to(device))
        target_pixels = decode(vae, targets)
    # One optimization for each choice of families, all from the same noise.
    inputs = {
        "metric": metric_sha256(metric),
        "autoencoder": pretrained.autoencoder_sha256(config.latents),
        "pictures": hashlib.sha256(pixels.numpy().tobytes()).hexdigest(),
    }
    latents = {
        families: _run(
            config, inputs, out / families, families, vae, metric, targets, target_pixels, progress
        )
        for families in config.families
    }
    # Plot the curves, and show the decoded results below the targets.
    curves = {
        families: [{**line, "step": line["nimg"]} for line in read_stats(out / families)]
        for families in config.families
    }
    files = [out / "curves.svg", out / "curves.png"]
    plot_overfit(curves, files)
    rows = [to_uint8(target_pixels).cpu(), *(to_uint8(decode(vae, x)).cpu() for x in latents.values())]
    text = {"rows": ", ".join(["target", *latents])}
    save_png(image_grid(torch.cat(rows), columns=config.count), out / "decoded.png", text)
    # The last logged values of each run.
    final = {
        families: {k: v for k, v in lines[-1].items() if k not in ("nimg", "step")}
        for families, lines in curves.items()
    }
    return OverfitResult(
        out=str(out),
        final=final,
        order=sorted(final, key=lambda families: final[families]["pixel_mse"]),
        images=[Path(pictures.names[row]).name for row in range(config.count)],
        plot=str(files[1]),
        decoded=str(out / "decoded.png"),
        seconds=time.monotonic() - started,
    )


def _run(
    config: OverfitConfig,
    inputs: Mapping[str, str],
    folder: Path,
    families: str,
    vae: Any,
    metric: LatentLPIPS,
    target: Tensor,
    target_pixels: Tensor,
    progress: Progress,
) -> Tensor:
    """Optimize the latents under one choice of families; returns the final latents."""
    # Loss, log and the latents, which start from noise or from a checkpoint.
    loss_of = ELatentLPIPS(metric, families, draws=config.draws)
    settings = to_json(replace(config, families=(families,)))
    length = {name: settings.pop(name) for name in ("steps", "report_steps", "checkpoint_steps")}
    log = RunLog(
        folder,
        {**settings, **inputs, "length": length},
        ignore=("length",),
        notes=("data", "latents", "weights"),  # which their digests identify
    )
    x = noise(config.seed, range(len(target)), target.shape[1:]).to(target.device).requires_grad_()
    optimizer = torch.optim.Adam([x], lr=config.lr)
    step = _resume(folder, config, x, optimizer)
    if step < config.steps:
        log.rewind(step - 1)  # a step's line is written before its update
    with StopFlag() as stop:
        while step < config.steps:
            # Images do not interact: the loss is a sum over them, and Adam is element-wise.
            distance = loss_of(x, target, generator=generator(config.seed, Stream.OVERFIT_TRANSFORMS, step))
            loss = distance.sum()
            if not math.isfinite(loss.item()):
                raise FloatingPointError(
                    f"overfit {families}: loss is {loss.item()} at step {step}; lower lr"
                )
            # Report the state before the update, then update.
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            if step % config.report_steps == 0:
                log.write(
                    step, {**_measure(x, target, target_pixels, vae, metric), "loss": loss.item() / len(x)}
                )
            optimizer.step()
            step += 1
            progress(f"overfit {families}", step, config.steps)
            if step == config.steps:
                log.write(
                    step, {**_measure(x, target, target_pixels, vae, metric), "loss": loss.item() / len(x)}
                )
            # Save now and then, at the end, and on Ctrl-C.
            if step % config.checkpoint_steps == 0 or step == config.steps or stop:
                state = {"optimizer": optimizer.state_dict()}
                checkpoint.save(folder / "checkpoints", step, {"latents": {"x": x}}, state, {}, keep=1)
            if stop and step < config.steps:
                raise Interrupted(
                    f"stopped at step {step} of {families}; safe on disk: {folder}; "
                    "run the same command again to go on"
                )
    return x.detach()


def _resume(folder: Path, config: OverfitConfig, x: Tensor, optimizer: torch.optim.Optimizer) -> int:
    """Load the newest checkpoint into `x` and `optimizer`, if there is one; returns its step, else 0."""
    last = checkpoint.latest(folder / "checkpoints")
    if last is None:
        return 0
    with torch.no_grad():
        x.copy_(last.tensors("latents")["x"])
    optimizer.load_state_dict(last.state()["optimizer"])
    if last.nimg > config.steps:
        raise UserError(
            f"{folder} holds a run of {last.nimg} steps, more than the {config.steps} asked for; "
            f"ask for {last.nimg} or more, or name another --out"
        )
    return last.nimg


@torch.no_grad()
def _measure(
    x: Tensor, target: Tensor, target_pixels: Tensor, vae: Any, metric: LatentLPIPS
) -> dict[str, float]:
    error = ((decode(vae, x).clamp(-1, 1) - target_pixels.clamp(-1, 1)) / 2).square().mean((1, 2, 3))
    return {
        "latent_lpips": metric(x, target).mean().item(),
        "pixel_mse": error.mean().item(),
        # Limited to 120 dB, where float32 has no digits left.
        "psnr": (-10 * error.clamp(min=1e-12).log10()).mean().item(),
    }


def plot_overfit(curves: Mapping[str, Sequence[Mapping[str, float]]], files: Sequence[Path]) -> None:
    """Plot a panel per entry of OVERFIT_PANELS with one curve per families, on a logarithmic scale.

    `curves` holds lines with step, latent_lpips and pixel_mse. The figure is written to each of `files`
    (.svg, .png or .pdf). Raises UserError if a file cannot be written.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    # One panel per measure; all curves share the legend of the last panel.
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    for axis, (key, title) in zip(
        figure.subplots(1, len(OVERFIT_PANELS)), OVERFIT_PANELS.items(), strict=True
    ):
        for families, lines in curves.items():
            axis.plot([line["step"] for line in lines], [line[key] for line in lines], label=families)
        axis.set_yscale("log")
        axis.set_xlabel("steps")
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    # Write no dates and no random ids, so that equal curves give equal files.
    try:
        with rc_context({"svg.hashsalt": "overfit"}):
            for file in files:
                figure.savefig(file, dpi=150, metadata={"Date": None} if file.suffix == ".svg" else None)
    except OSError as error:
        raise UserError(f"cannot write {files[0]}: {error.strerror or error}; free space") from error
