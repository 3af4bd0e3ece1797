"""`d2g lpips overfit`: can the distance alone bring random latents to given ones? Supplement C.1, Fig. A1.

OUT/FAMILIES/{config.json,stats.jsonl,checkpoints/}  OUT/curves.svg|png  OUT/decoded.png
"""

import hashlib
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2g.core.config import to_json
from d2g.core.distributed import checkpoint
from d2g.core.errors import Interrupted, UserError
from d2g.core.png import grid, save_png
from d2g.core.progress import Progress, quiet
from d2g.core.seeds import Stream, generator, noise
from d2g.core.signals import StopFlag
from d2g.core.tracking.run_directory import RunLog, read_stats
from d2g.diffusion import pretrained
from d2g.diffusion.latents import decode, encode, from_uint8, to_uint8
from latent_lpips.distance import ELatentLPIPS, LatentLPIPS
from latent_lpips.training.calibrate import metric_sha256, open_metric
from latent_lpips.training.config import OverfitConfig, require_given
from latent_lpips.training.crops import center_crop_resized
from latent_lpips.training.labeled_images import open_unlabeled
from latent_lpips.training.latent_stream import check_image_size, require_single_process
from latent_lpips.training.plot import plot_overfit


@dataclass(frozen=True, kw_only=True)
class OverfitResult:
    """final: per families the last latent_lpips (without transforms), pixel_mse (decoded, range [0, 1], to
    the decoded target), psnr in dB (at most 120) and loss. order: families by pixel_mse, best first."""

    out: str
    final: dict[str, dict[str, float]]
    order: list[str]
    images: list[str]
    plot: str
    decoded: str
    seconds: float


def overfit_latents(config: OverfitConfig, out: Path, progress: Progress = quiet) -> OverfitResult:
    """Minimize E-LatentLPIPS from random latents to those of `count` pictures, once for each of `families`.

    Each starts from the same noise; runs go on from their newest checkpoints. Raises UserError for bad input,
    FloatingPointError when a loss is not finite, Interrupted on Ctrl-C.
    """
    require_single_process("overfit")
    require_given(config, "data", "latents", "weights")
    started = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vae = pretrained.load_autoencoder(config.latents).to(device)
    check_image_size(vae, config.size)
    metric = open_metric(config.weights, config.latents, vae, device)
    pictures = open_unlabeled(config.data)
    if len(pictures) < config.count:
        raise UserError(f"{config.data} holds {len(pictures)} pictures, expected {config.count}; set count")
    pixels = torch.stack(
        [center_crop_resized(pictures.open(row), config.size, 1.0) for row in range(config.count)]
    )
    with torch.no_grad():
        target = encode(vae, from_uint8(pixels).to(device))
        aim = decode(vae, target)
    facts = {
        "metric": metric_sha256(metric),
        "autoencoder": pretrained.autoencoder_sha256(config.latents),
        "pictures": hashlib.sha256(pixels.numpy().tobytes()).hexdigest(),
    }
    found = {
        families: _one(config, facts, out / families, families, vae, metric, target, aim, progress)
        for families in config.families
    }
    curves = {
        families: [{**line, "step": line["nimg"]} for line in read_stats(out / families)]
        for families in config.families
    }
    files = [out / "curves.svg", out / "curves.png"]
    plot_overfit(curves, files)
    rows = [to_uint8(aim).cpu(), *(to_uint8(decode(vae, latents)).cpu() for latents in found.values())]
    told = {"rows": ", ".join(["target", *found])}
    save_png(grid(torch.cat(rows), columns=config.count), out / "decoded.png", told)
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


def _one(
    config: OverfitConfig,
    facts: Mapping[str, str],
    folder: Path,
    families: str,
    vae: Any,
    metric: LatentLPIPS,
    target: Tensor,
    aim: Tensor,
    progress: Progress,
) -> Tensor:
    """The latents at the end of one run."""
    loss_of = ELatentLPIPS(metric, families, draws=config.draws)
    whole = to_json(replace(config, families=(families,)))
    length = {name: whole.pop(name) for name in ("steps", "report_steps", "checkpoint_steps")}
    log = RunLog(folder, {**whole, **facts, "length": length}, ignore=("length",))
    x = noise(config.seed, range(len(target)), target.shape[1:]).to(target.device).requires_grad_()
    optimizer = torch.optim.Adam([x], lr=config.lr)
    step = 0
    if (last := checkpoint.latest(folder / "checkpoints")) is not None:
        with torch.no_grad():
            x.copy_(last.tensors("latents")["x"])
        optimizer.load_state_dict(last.state()["optimizer"])
        step = last.nimg
    if step > config.steps:
        raise UserError(
            f"{folder} holds a run of {step} steps, more than the {config.steps} asked for; "
            f"ask for {step} or more, or name another --out"
        )
    if step < config.steps:
        log.rewind(step - 1)  # a step's line is written before the step
    with StopFlag() as stop:
        while step < config.steps:
            # Each picture is an experiment of its own: Adam treats every number alone, and so does the sum.
            distance = loss_of(x, target, generator=generator(config.seed, Stream.OVERFIT_TRANSFORMS, step))
            loss = distance.sum()
            if not math.isfinite(loss.item()):
                raise FloatingPointError(
                    f"overfit {families}: loss is {loss.item()} at step {step}; lower lr"
                )
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            if step % config.report_steps == 0:
                log.write(step, {**_state(x, target, aim, vae, metric), "loss": loss.item() / len(x)})
            optimizer.step()
            step += 1
            progress(f"overfit {families}", step, config.steps)
            if step == config.steps:
                log.write(step, {**_state(x, target, aim, vae, metric), "loss": loss.item() / len(x)})
            if step % config.checkpoint_steps == 0 or step == config.steps or stop:
                state = {"optimizer": optimizer.state_dict()}
                checkpoint.save(folder / "checkpoints", step, {"latents": {"x": x}}, state, {}, keep=1)
            if stop and step < config.steps:
                raise Interrupted(
                    f"stopped at step {step} of {families}; safe on disk: {folder}; "
                    "run the same command again to go on"
                )
    return x.detach()


@torch.no_grad()
def _state(x: Tensor, target: Tensor, aim: Tensor, vae: Any, metric: LatentLPIPS) -> dict[str, float]:
    error = ((decode(vae, x).clamp(-1, 1) - aim.clamp(-1, 1)) / 2).square().mean((1, 2, 3))
    return {
        "latent_lpips": metric(x, target).mean().item(),
        "pixel_mse": error.mean().item(),
        # Below 120 dB: there float32 has no digits left.
        "psnr": (-10 * error.clamp(min=1e-12).log10()).mean().item(),
    }
