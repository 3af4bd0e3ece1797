"""Image-parquet: tables with encoded images, as Hugging Face's data sets store them."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from d2g.core.errors import UserError

IMAGE_COLUMNS = ("image", "img")  # Hugging Face's; its CIFAR10 says img


def parquet_errors() -> tuple[type[Exception], ...]:
    """What pyarrow raises for a table that is damaged or cannot be read."""
    from pyarrow.lib import ArrowException  # type: ignore[import-untyped]

    return (ArrowException, OSError)


def unreadable_table(file: Path | str, error: Exception) -> UserError:
    """The error for a table that pyarrow cannot read."""
    return UserError(
        f"{file} is not a readable parquet file ({' '.join(str(error).split())}); fetch it again"
    )


def open_table(file: Path) -> Any:
    """A pyarrow ParquetFile. Raises UserError if it is damaged."""
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    try:
        return pq.ParquetFile(file)
    except parquet_errors() as error:
        raise unreadable_table(file, error) from error


def image_column(file: Path | str, names: Iterable[str], *others: str) -> str:
    """The column of encoded images. Raises UserError if there is none, or if one of `others` is missing."""
    names = list(names)
    column = next((key for key in IMAGE_COLUMNS if key in names), None)
    if column is None or any(other not in names for other in others):
        expected = " and ".join(f"`{key}`" for key in ("image", *others))
        raise UserError(
            f"{file} has columns {', '.join(names)}; expected {expected}, with `bytes` inside image"
        )
    return column


def encoded_image(cell: Any, where: str) -> bytes:
    """The encoded image in a cell. Raises UserError, with `where`, for a cell without one."""
    data = cell.get("bytes") if isinstance(cell, dict) else cell
    if isinstance(cell, dict) and not data and isinstance(cell.get("path"), str) and cell["path"]:
        # A table may not name files of this machine: they would be read on behalf of whoever wrote it.
        raise UserError(
            f"{where}: `image` names a file ({cell['path'][:80]}) and holds no bytes; write the table with "
            "the images in it (`embed_table_storage` of datasets), or give a folder of images"
        )
    if not isinstance(data, bytes) or not data:
        raise UserError(f"{where}: `image` holds no bytes; expected encoded images in `image.bytes`")
    return data
