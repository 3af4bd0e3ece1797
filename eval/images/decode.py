"""Decode one image and preprocess it for an evaluation or a training."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

from d2g.core.errors import UserError
from d2g.core.machine_errors import raise_machine_error
from d2g.data.pictures import decode_picture
from eval.images.resize import NATIVE, Pixels, prepare, to_array


@dataclass(frozen=True, slots=True)
class Decoded:
    """uint8 [3, H, W] after preprocessing, the PNG's own prompt, what was converted, sha256 of the file, and
    (width, height) before preprocessing."""

    image: Pixels
    caption: str
    converted: tuple[str, ...]
    sha256: bytes
    size: tuple[int, int]


def decode_image(
    read: Callable[[], bytes], name: str, resize: str = NATIVE, *, exact: bool = True
) -> Decoded:
    """Read, decode and preprocess one image (`eval.images.resize.prepare`).

    `exact`: as in `d2g.data.pictures.decode_picture`. Raises UserError as it does, and for disk errors.
    """
    try:
        data = read()
    except OSError as error:
        raise_machine_error(error, name)
        raise UserError(
            f"{name} is not a readable image ({error.strerror or error}); remove or replace it"
        ) from error
    picture = decode_picture(data, name, exact=exact)
    pixels = to_array(prepare(picture.image, resize))
    return Decoded(
        pixels, picture.prompt, picture.converted, hashlib.sha256(data).digest(), picture.image.size
    )
