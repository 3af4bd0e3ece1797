"""OUT/report.html of `d2g teacher train`: verdict, reconstructions, samples beside real pictures, curves."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2g.core.tracking.run_directory import read_stats
from d2g.diffusion import pretrained
from d2g.diffusion.latents import decode_uint8
from d2g.diffusion.teacher import load_teacher
from eval.report.charts import Curve
from eval.report.gallery import Pictures
from eval.report.html import MetricRow, ReportData, write_report
from eval.report.page import environment
from teacher_training.config import NETWORK_GROUPS
from teacher_training.previews import reconstructions
from teacher_training.verdict import SAMPLE_STEPS, SAMPLES, draw_samples, spread_rows

STAGE_NAMES = {"vae": "Autoencoder", "lpips": "LatentLPIPS", "clip": "CLIP"}
"""Titles of the stages other than that of the network."""


def stage_name(stage: str) -> str:
    """The title of a stage."""
    return STAGE_NAMES.get(stage, "Denoiser")


def write_teacher_report(
    out: Path,
    verdict: Mapping[str, Any],
    images: Tensor,
    captions: Sequence[str],
    scores: Mapping[str, Mapping[str, Any]],
    device: torch.device | str = "cpu",
) -> Path:
    """Write OUT/report.html for a finished teacher; returns its path.

    verdict: as `judge_teacher` returns it. images: uint8 [N, 3, S, S], with N `captions`.
    """
    # Samples and reconstructions beside real pictures.
    rows = spread_rows(len(images), SAMPLES)
    real, texts = images[rows], [captions[row] for row in rows.tolist()]
    teacher, vae = load_teacher(str(out), device), pretrained.load_vae(str(out)).to(device)
    samples = draw_samples(teacher, texts)
    settings = f"{SAMPLE_STEPS} steps of {teacher.default_solver}, guidance {teacher.default_guidance:g}"
    beside = [
        Pictures(
            title="Samples beside real pictures",
            columns={"real picture": real, "sample": torch.cat(list(decode_uint8(vae, samples)))},
            prompts=texts,
            text=f"{settings}, prompts of the pictures.",
        )
    ]
    if teacher.family.autoencoder is not None:
        beside.append(
            Pictures(
                title="Reconstructions",
                columns={"real picture": real, "reconstruction": reconstructions(vae, real)},
                prompts=texts,
                text="What the autoencoder keeps: samples cannot look better than this.",
            )
        )

    # The page: verdict, metrics, pictures, curves and times.
    data = ReportData(
        title=f"Teacher {out.name}",
        summary=verdict["verdict"],
        counts={"pictures": len(images), "captions": len(set(captions))},
        metrics=_metric_rows(verdict["numbers"], scores.get("vae", {})),
        beside=beside,
        curves=teacher_curves(out / "training"),
        timings={stage_name(name): float(score.get("seconds", 0.0)) for name, score in scores.items()},
        environment=environment(),
    )
    path = out / "report.html"
    write_report(path, data)
    return path


def _metric_rows(numbers: Mapping[str, Any], autoencoder: Mapping[str, Any]) -> list[MetricRow]:
    """The numbers of the verdict, each beside what it is compared with."""
    this, real = "this teacher", "real pictures"
    # Numbers of every teacher.
    rows = [
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
            name="Standard deviation of latents",
            values={this: numbers["samples_std"], real: numbers["latents_std"]},
        ),
        MetricRow(
            name="Roughness of latents",
            values={this: numbers["samples_roughness"], real: numbers["latents_roughness"]},
            note="mean squared difference of neighbors over the variance; white noise has 2",
        ),
    ]
    # Numbers of an autoencoder, if there is one.
    if numbers["psnr"] is not None:
        values = {this: numbers["psnr"], "mean picture": numbers["psnr_mean"]}
        rows.insert(1, MetricRow(name="Reconstruction PSNR, dB", better="higher", values=values))
    if "perceptual" in autoencoder:
        values = {this: autoencoder["perceptual"]}
        rows.insert(
            2, MetricRow(name="Perceptual distance of reconstructions", better="lower", values=values)
        )
    return rows


def teacher_curves(training: Path) -> list[Curve]:
    """Losses of the autoencoder and of the network over training images."""
    curves = []
    for stage in ("vae", *NETWORK_GROUPS.values()):
        lines = read_stats(training / stage)
        names = sorted(
            {name for line in lines for name in line if name.startswith(("loss/", "preview/loss"))}
        )
        points = {name: [(line["nimg"], line[name]) for line in lines if name in line] for name in names}
        if points:
            curves.append(Curve(title=f"{stage_name(stage)}: losses", x="images", y="loss", lines=points))
    return curves
