"""`d2g lpips train`, `calibrate`, `score`, `overfit`, `triplets`: a LatentLPIPS of one's own."""

from pathlib import Path
from typing import Annotated, Any

import typer

from d2g_cli.common import DryRun, Json, Out, Preset, Seed, Sets, chosen, dry, emit, finishing, reporter

Latents = Annotated[
    str | None,
    typer.Option(help="Autoencoder in diffusers layout, or a pipeline (folder, hub id, miniature) with one."),
]
Bapps = Annotated[
    Path | None, typer.Option(help="BAPPS layout: train/ and val/ splits, or one with ref/ p0/ p1/ judge/.")
]
Images = Annotated[Path | None, typer.Option(help="Folder of images, or image-parquet.")]
Weights = Annotated[Path | None, typer.Option(help="LatentLPIPS folder or authors' file.")]


def train(
    data: Annotated[
        Path | None, typer.Option(help="A subfolder for each class, or image-parquet with `label`.")
    ] = None,
    latents: Latents = None,
    out: Out = Path("lpips"),
    val: Annotated[Path | None, typer.Option(help="The same, to score on (val/ in data, or a part).")] = None,
    minutes: Annotated[float | None, typer.Option(help="Stop so long after the start.")] = None,
    preset: Preset = None,
    sets: Sets = None,
    seed: Seed = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Train a trunk: classify labelled images in an autoencoder's latent space. Presets: paper, small."""
    from latent_lpips.training.config import TRAIN_PRESETS

    options = {"data": data, "latents": latents, "val": val, "minutes": minutes, "seed": seed}
    config = chosen(TRAIN_PRESETS, preset or "paper", options, sets)
    if dry_run:
        kept = f"{config.crops} crops of each image, kept on disk" if config.crops else "fresh crops"
        dry(config, as_json, {"out": str(out), "latents": kept})
    from latent_lpips.training.classifier import train_classifier

    with finishing():
        emit(train_classifier(config, out, reporter), as_json, "lpips train")


def calibrate(
    weights: Weights = None,
    data: Bapps = None,
    latents: Latents = None,
    out: Out = Path("lpips-calibrated"),
    preset: Preset = None,
    sets: Sets = None,
    seed: Seed = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Fit the heads to two-alternative judgements, the trunk frozen. Presets: paper, small."""
    from latent_lpips.training.config import HEADS_PRESETS

    options = {"weights": weights, "data": data, "latents": latents, "seed": seed}
    config = chosen(HEADS_PRESETS, preset or "paper", options, sets)
    if dry_run:
        dry(config, as_json, {"out": str(out)})
    from latent_lpips.training.calibrate import calibrate_folder

    with finishing():
        emit(calibrate_folder(config, out, reporter), as_json, "lpips calibrate")


def score(
    weights: Weights = None,
    data: Bapps = None,
    latents: Latents = None,
    out: Annotated[Path | None, typer.Option(help="Also write the result to this JSON file.")] = None,
    baselines: Annotated[str | None, typer.Option(help="Score these too: l2,ssim.")] = None,
    pixels: Annotated[
        str | None, typer.Option(help="Score LPIPS in pixels too: vgg, alex or squeeze.")
    ] = None,
    pixel_weights: Annotated[Path | None, typer.Option(help="Torchvision's file of its trunk.")] = None,
    preset: Preset = None,
    sets: Sets = None,
    seed: Seed = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Agreement with people (2AFC and JND), by split, with 95 % intervals. Presets: paper, small."""
    from latent_lpips.training.config import SCORE_PRESETS

    options: dict[str, Any] = {"weights": weights, "data": data, "latents": latents, "seed": seed}
    options |= {"lpips": pixels, "lpips_weights": pixel_weights}
    if baselines is not None:
        options["baselines"] = tuple(baselines.split(","))
    config = chosen(SCORE_PRESETS, preset or "paper", options, sets)
    if dry_run:
        dry(config, as_json, {"out": str(out) if out else None})
    from latent_lpips.training.score import score_folder

    with finishing():
        emit(score_folder(config, out, reporter), as_json, "lpips score")


def overfit(
    weights: Weights = None,
    data: Images = None,
    latents: Latents = None,
    out: Out = Path("lpips-overfit"),
    families: Annotated[
        str | None, typer.Option(help="Transforms to compare, comma-separated (none,b,bg,bgc,bgco).")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Of each run.")] = None,
    preset: Preset = None,
    sets: Sets = None,
    seed: Seed = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Can the distance alone bring random latents to an image's? With plot and pictures. Presets: paper,
    small."""
    from latent_lpips.training.config import OVERFIT_PRESETS

    options: dict[str, Any] = {"weights": weights, "data": data, "latents": latents}
    options |= {"steps": steps, "seed": seed}
    if families is not None:
        options["families"] = tuple(families.split(","))
    config = chosen(OVERFIT_PRESETS, preset or "paper", options, sets)
    if dry_run:
        dry(config, as_json, {"out": str(out), "runs": len(config.families)})
    from latent_lpips.training.overfit import overfit_latents as run

    with finishing():
        emit(run(config, out, reporter), as_json, "lpips overfit")


def triplets(
    data: Images = None,
    out: Out = Path("triplets"),
    decoder: Annotated[
        list[str] | None, typer.Option(help="Autoencoder whose reconstructions are a kind too; repeatable.")
    ] = None,
    preset: Preset = None,
    sets: Sets = None,
    seed: Seed = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Write judgements of known order in BAPPS layout: one distortion at two strengths. Presets: patches,
    pictures."""
    from latent_lpips.training.config import TRIPLETS_PRESETS

    options = {"data": data, "seed": seed, "decoders": tuple(decoder) if decoder else None}
    config = chosen(TRIPLETS_PRESETS, preset or "patches", options, sets)
    if dry_run:
        dry(config, as_json, {"out": str(out), "made": list(config.made)})
    from latent_lpips.training.make_triplets import make_triplets

    with finishing():
        emit(make_triplets(config, out, reporter), as_json, "lpips triplets")
