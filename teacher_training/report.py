"""OUT/report.html of `d2g teacher train`: verdict, reconstructions, samples beside real pictures, curves."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2g.core.seeds import noise
from d2g.core.tracking.run_directory import read_stats
from d2g.diffusion import pretrained
from d2g.diffusion.latents import decode_uint8
from d2g.diffusion.teacher import load_teacher
from eval.report.charts import Curve
from eval.report.gallery import Pictures
from eval.report.html import MetricRow, ReportData, write_report
from eval.report.page import environment
from teacher_training.previews import reconstructions
from teacher_training.verdict import SAMPLE_GUIDANCE, SAMPLE_STEPS, SAMPLES, spread_rows

STAGE_NAMES = {"vae": "Autoencoder", "unet": "Denoiser", "lpips": "LatentLPIPS", "clip": "CLIP"}


def write_teacher_report(
    out: Path,
    verdict: Mapping[str, Any],
    images: Tensor,
    captions: Sequence[str],
    scores: Mapping[str, Mapping[str, Any]],
) -> Path:
    """Write OUT/report.html for a finished teacher; returns its path.

    verdict: as `judge_teacher` returns it. images: uint8 [N, 3, S, S], with N `captions`.
    """
    rows = spread_rows(len(images), SAMPLES)
    real, texts = images[rows], [captions[row] for row in rows.tolist()]
    teacher, vae = load_teacher(str(out)), pretrained.load_vae(str(out))
    latent_noise = noise(0, range(len(rows)), teacher.latent_shape)
    samples = teacher.sample(latent_noise, texts, SAMPLE_STEPS, SAMPLE_GUIDANCE, "ddim")
    data = ReportData(
        title=f"Teacher {out.name}",
        summary=verdict["verdict"],
        counts={"pictures": len(images), "captions": len(set(captions))},
        metrics=_rows(verdict["numbers"]),
        beside=[
            Pictures(
                title="Samples beside real pictures",
                columns={"real picture": real, "sample": torch.cat(list(decode_uint8(vae, samples)))},
                prompts=texts,
                text=f"{SAMPLE_STEPS} DDIM steps, guidance {SAMPLE_GUIDANCE:g}, captions of the pictures.",
            ),
            Pictures(
                title="Reconstructions",
                columns={"real picture": real, "reconstruction": reconstructions(vae, real)},
                prompts=texts,
                text="What the autoencoder keeps: samples cannot look better than this.",
            ),
        ],
        curves=teacher_curves(out / "training"),
        timings={STAGE_NAMES[name]: float(score.get("seconds", 0.0)) for name, score in scores.items()},
        environment=environment(),
    )
    path = out / "report.html"
    write_report(path, data)
    return path


def _rows(numbers: Mapping[str, float]) -> list[MetricRow]:
    """The numbers of the verdict, each beside what it is compared with."""
    this, real = "this teacher", "real pictures"
    return [
        MetricRow(
            name="Loss: mean squared error of epsilon",
            better="lower",
            values={
                this: numbers["loss"],
                "without structure": numbers["loss_gaussian"],
                "predicting zero": numbers["loss_zero"],
                "untrained": numbers["loss_untrained"],
            },
            note="without structure: the best denoiser that knows mean and variance of each channel alone",
        ),
        MetricRow(
            name="Reconstruction PSNR, dB",
            better="higher",
            values={this: numbers["psnr"], "mean picture": numbers["psnr_mean"]},
        ),
        MetricRow(
            name="Standard deviation of latents",
            values={this: numbers["samples_std"], real: numbers["latents_std"]},
        ),
        MetricRow(
            name="Roughness of latents",
            values={this: numbers["samples_roughness"], real: numbers["latents_roughness"]},
            note="mean squared difference of neighbors over the variance; white noise has 2",
        ),
    ]


def teacher_curves(training: Path) -> list[Curve]:
    """Losses of the autoencoder and the denoiser over training images."""
    curves = []
    for stage in ("vae", "unet"):
        lines = read_stats(training / stage)
        names = sorted(
            {name for line in lines for name in line if name.startswith(("loss/", "preview/loss"))}
        )
        points = {name: [(line["nimg"], line[name]) for line in lines if name in line] for name in names}
        if points:
            curves.append(Curve(title=f"{STAGE_NAMES[stage]}: losses", x="images", y="loss", lines=points))
    return curves
