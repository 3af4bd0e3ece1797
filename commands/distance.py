"""`d2g lpips`: the latent perceptual distance."""

from pathlib import Path
from typing import Annotated

import typer

from commands.common import Json, TeacherOption, emit
from core.errors import SettingError

app = typer.Typer(help="The latent perceptual distance.", no_args_is_help=True)


@app.command("distance")
def lpips_distance(
    a: Annotated[Path, typer.Argument(help="Image file.")],
    b: Annotated[Path, typer.Argument(help="Image file of the same size.")],
    teacher: TeacherOption = None,
    weights: Annotated[Path | None, typer.Option(help="LatentLPIPS folder [TEACHER/latent_lpips].")] = None,
    augment: Annotated[str, typer.Option(help="none, or letters of bgco.")] = "none",
    draws: Annotated[int, typer.Option(help="Transforms averaged over, with --augment.")] = 16,
    seed: Annotated[int, typer.Option(help="Seed of the transforms.")] = 0,
    as_json: Json = False,
) -> None:
    """LatentLPIPS between two images, in a teacher's latent space."""
    from eval.lpips_pair import image_distance

    if teacher is None:
        raise SettingError("--teacher is not set; its VAE makes the latents")
    emit({"distance": image_distance(a, b, teacher, weights, augment, draws, seed)}, as_json, f"{a} | {b}")
