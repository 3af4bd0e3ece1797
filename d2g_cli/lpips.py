"""`d2g lpips`: the latent perceptual distance."""

from pathlib import Path
from typing import Annotated

import typer

from d2g.core.errors import SettingError
from d2g_cli import lpips_train
from d2g_cli.common import Json, TeacherOption, emit, one_process, require_range

lpips_app = typer.Typer(help="Train, calibrate and use the latent perceptual distance.", no_args_is_help=True)
lpips_train.register_lpips_training(lpips_app)


@lpips_app.command("distance")
@one_process
def lpips_distance(
    a: Annotated[Path, typer.Argument(help="Image file.")],
    b: Annotated[Path, typer.Argument(help="Image file of the same size.")],
    teacher: TeacherOption = None,
    weights: Annotated[
        Path | None, typer.Option(help="LatentLPIPS folder or the authors' file (TEACHER/latent_lpips).")
    ] = None,
    pixels: Annotated[
        str | None, typer.Option(help="Use LPIPS in pixels: vgg, alex or squeeze; needs no teacher.")
    ] = None,
    augment: Annotated[str, typer.Option(help="none, or letters of bgco.")] = "none",
    draws: Annotated[int, typer.Option(help="Random transforms to average over, with --augment.")] = 16,
    seed: Annotated[int, typer.Option(help="Seed of the transforms.")] = 0,
    as_json: Json = False,
) -> None:
    """LatentLPIPS between two images in a teacher's latent space, or LPIPS with --pixels."""
    from eval.measure.image_pair import image_distance, pixel_distance

    require_range(1, draws=draws)
    require_range(0, 2**63 - 1, seed=seed)
    # Either latents of a teacher's autoencoder, or pixels.
    if (teacher is None) == (pixels is None):
        raise SettingError(
            "--teacher is not set; its VAE encodes the images (or give --pixels vgg)"
            if teacher is None
            else "--teacher and --pixels are both set; expected one of them, for latents or for pixels"
        )
    if teacher is not None:
        distance = image_distance(a, b, teacher, weights, augment, draws, seed)
    else:
        distance = pixel_distance(a, b, pixels, weights, augment, draws, seed)
    emit({"distance": distance}, as_json, f"{a} | {b}")


@lpips_app.command("convert")
@one_process
def lpips_convert(
    file: Annotated[
        Path, typer.Argument(help="elatentlpips checkpoint: …_tuned.pth, or a trunk's .pth.tar.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for lpips.safetensors and config.json.")],
    space: Annotated[
        str | None, typer.Option(help="sd15, sd21, sdxl, sd3 or flux (the start of the file name).")
    ] = None,
    as_json: Json = False,
) -> None:
    """Convert a checkpoint of LatentLPIPS' authors (for non-commercial use) to a folder that d2g loads."""
    from latent_lpips.weights import convert_official_checkpoint

    emit(
        {"out": str(out), **convert_official_checkpoint(file, out, space)},
        as_json,
        f"{file.name} converted",
    )
