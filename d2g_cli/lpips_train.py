"""`d2g lpips train`, `calibrate`, `score`, `overfit`, `triplets`: train and test a LatentLPIPS."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from d2g.core.config import Presets
from d2g_cli.common import (
    Out,
    WorkOptions,
    configure_preset,
    emit,
    expand_options,
    finish_dry_run,
    leave_process_group,
    one_process,
    presets_in_help,
    reporter,
    settings_from,
)
from d2g_cli.inputs import config_inputs

Images = Annotated[Path | None, typer.Option(help="Folder of images, or image-parquet.")]


@dataclass(frozen=True, kw_only=True)
class LatentOptions(WorkOptions):
    """Options of the commands that encode images."""

    latents: Annotated[
        str | None,
        typer.Option(
            help="Autoencoder in diffusers layout, or a pipeline with one (folder, hub id, miniature)."
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class JudgmentOptions(LatentOptions):
    """Options of the commands that read human judgments."""

    weights: Annotated[Path | None, typer.Option(help="LatentLPIPS folder or the authors' file.")] = None
    data: Annotated[
        Path | None,
        typer.Option(help="BAPPS layout: train/ and val/ splits, or one split with ref/ p0/ p1/ judge/."),
    ] = None


def register_lpips_training(app: typer.Typer) -> None:
    """Add the commands to `d2g lpips`."""
    app.command("train", cls=presets_in_help(lambda: _presets("TRAIN")))(train_lpips)
    app.command("calibrate", cls=presets_in_help(lambda: _presets("HEADS")))(calibrate)
    app.command("score", cls=presets_in_help(lambda: _presets("SCORE")))(score)
    app.command("overfit", cls=presets_in_help(lambda: _presets("OVERFIT")))(overfit)
    app.command("triplets", cls=presets_in_help(lambda: _presets("TRIPLETS")))(triplets)


def _presets(command: str) -> Presets[Any]:
    from latent_lpips.training import config

    presets: Presets[Any] = getattr(config, f"{command}_PRESETS")
    return presets


@expand_options
def train_lpips(
    options: LatentOptions,
    data: Annotated[
        Path | None, typer.Option(help="One subfolder per class, or image-parquet with `label`.")
    ] = None,
    out: Out = Path("lpips"),
    val: Annotated[
        Path | None, typer.Option(help="Labeled images to score on (val/ in data, or a part of data).")
    ] = None,
    minutes: Annotated[float | None, typer.Option(help="Stop this many minutes after the start.")] = None,
) -> None:
    """Train a trunk: classify labeled images in an autoencoder's latent space."""
    settings = {
        "data": data,
        "latents": options.latents,
        "val": val,
        "minutes": minutes,
        "seed": options.seed,
    }
    config = configure_preset(_presets("TRAIN"), "paper", options, settings)
    if options.dry_run:
        latents = f"{config.crops} crops of each image, stored on disk" if config.crops else "fresh crops"
        finish_dry_run(
            config,
            options.as_json,
            {"out": str(out), "latents": latents},
            config_inputs(config, ("data", "latents", "val")),
        )
    from latent_lpips.training.classifier import train_classifier

    with leave_process_group():
        emit(train_classifier(config, out, reporter), options.as_json, "lpips train")


@expand_options
def calibrate(options: JudgmentOptions, out: Out = Path("lpips-calibrated")) -> None:
    """Fit the heads to two-alternative judgments with the trunk frozen."""
    from latent_lpips.training.config import HeadsConfig

    config = configure_preset(_presets("HEADS"), "paper", options, settings_from(options, HeadsConfig))
    if options.dry_run:
        finish_dry_run(
            config, options.as_json, {"out": str(out)}, config_inputs(config, ("data", "latents", "weights"))
        )
    from latent_lpips.training.calibrate import calibrate_folder

    with leave_process_group():
        emit(calibrate_folder(config, out, reporter), options.as_json, "lpips calibrate")


@one_process
@expand_options
def score(
    options: JudgmentOptions,
    out: Annotated[Path | None, typer.Option(help="Write the result to this JSON file too.")] = None,
    baselines: Annotated[str | None, typer.Option(help="Score these too: l2,ssim.")] = None,
    pixels: Annotated[
        str | None, typer.Option(help="Score LPIPS in pixels too: vgg, alex or squeeze.")
    ] = None,
    pixel_weights: Annotated[
        Path | None, typer.Option(help="Torchvision's weight file of its trunk.")
    ] = None,
) -> None:
    """Score the agreement with people (2AFC and JND), by split, with 95 % intervals."""
    from latent_lpips.training.config import ScoreConfig

    settings = settings_from(options, ScoreConfig) | {"lpips": pixels, "lpips_weights": pixel_weights}
    settings["baselines"] = tuple(baselines.split(",")) if baselines is not None else None
    config = configure_preset(_presets("SCORE"), "paper", options, settings)
    if options.dry_run:
        inputs = config_inputs(config, ("data", "latents", "weights")) | {
            "--pixel-weights": config.lpips_weights
        }
        finish_dry_run(config, options.as_json, {"out": str(out) if out else None}, inputs)
    from latent_lpips.training.score import score_folder

    with leave_process_group():
        emit(score_folder(config, out, reporter), options.as_json, "lpips score")


@one_process
@expand_options
def overfit(
    options: LatentOptions,
    weights: Annotated[Path | None, typer.Option(help="LatentLPIPS folder or the authors' file.")] = None,
    data: Images = None,
    out: Out = Path("lpips-overfit"),
    families: Annotated[
        str | None, typer.Option(help="Augmentations to compare, comma-separated (none,b,bg,bgc,bgco).")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of each optimization.")] = None,
) -> None:
    """Optimize random latents with the distance alone until they show an image, with plot and images."""
    settings: dict[str, Any] = {"weights": weights, "data": data, "latents": options.latents, "steps": steps}
    settings |= {
        "seed": options.seed,
        "families": tuple(families.split(",")) if families is not None else None,
    }
    config = configure_preset(_presets("OVERFIT"), "paper", options, settings)
    if options.dry_run:
        plan = {"out": str(out), "runs": len(config.families)}
        finish_dry_run(config, options.as_json, plan, config_inputs(config, ("data", "latents", "weights")))
    from latent_lpips.training.overfit import overfit_latents

    with leave_process_group():
        emit(overfit_latents(config, out, reporter), options.as_json, "lpips overfit")


@one_process
@expand_options
def triplets(
    options: WorkOptions,
    data: Images = None,
    out: Out = Path("triplets"),
    decoder: Annotated[
        list[str] | None,
        typer.Option(help="Autoencoder whose reconstructions are another distortion; repeatable."),
    ] = None,
) -> None:
    """Write judgments with a known order in BAPPS layout: one distortion at two strengths."""
    settings = {"data": data, "seed": options.seed, "decoders": tuple(decoder) if decoder else None}
    config = configure_preset(_presets("TRIPLETS"), "patches", options, settings)
    if options.dry_run:
        plan = {"out": str(out), "made": list(config.selected_kinds)}
        finish_dry_run(config, options.as_json, plan, {"--data": config.data, "--decoder": config.decoders})
    from latent_lpips.training.make_triplets import make_triplets

    with leave_process_group():
        emit(make_triplets(config, out, reporter), options.as_json, "lpips triplets")
