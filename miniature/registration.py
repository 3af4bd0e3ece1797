"""Registers the scenes with the packages below, which know only folders of pictures by themselves."""

from torch import Tensor

from d2g.core.errors import UserError
from d2g.core.progress import Progress, quiet
from miniature.sampling import render_dataset
from teacher_training.data import register_data


def register_scenes() -> None:
    """Make `scenes` available as training data of a teacher. Calling it again changes nothing."""
    register_data("scenes", training_scenes)


def training_scenes(size: int, limit: int, seed: int, progress: Progress = quiet) -> tuple[Tensor, list[str]]:
    """Render `limit` scenes of the training split: uint8 images [limit, 3, 64, 64] and their captions.

    Raises UserError for another size than 64 pixels, which the renderer is made for.
    """
    if size != 64:
        raise UserError(f"scenes are rendered at 64 pixels, got size {size}; leave --set size at 64")
    return render_dataset(limit, seed, "train", progress)
