"""Image-parquet: tables with encoded images, as Hugging Face's data sets store them."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from d2g.core.errors import UserError
from d2g.core.machine_errors import raise_machine_error
from d2g.data.parquet_pages import page_sizes

IMAGE_COLUMNS = ("image", "img")  # Hugging Face's; its CIFAR10 says img


def parquet_errors() -> tuple[type[Exception], ...]:
    """Return the exceptions that pyarrow raises for a damaged or unreadable table."""
    from pyarrow.lib import ArrowException  # type: ignore[import-untyped]

    return (ArrowException, OSError)


def unreadable_table(file: Path | str, error: Exception) -> UserError:
    """The error for a table that pyarrow cannot read."""
    raise_machine_error(error, file)
    return UserError(
        f"{file} is not a readable parquet file ({' '.join(str(error).split())}); fetch it again"
    )


def open_table(file: Path, dictionaries: Sequence[str] = ()) -> Any:
    """A pyarrow ParquetFile. Raises UserError if it is damaged.

    `dictionaries`: columns whose repeated values stay one value in memory.
    """
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    try:
        return pq.ParquetFile(file, read_dictionary=list(dictionaries))
    except parquet_errors() as error:
        raise unreadable_table(file, error) from error


MAX_EXPANSION = 1032
"""Bytes that a byte of a table may become when it is unpacked: the most that deflate can do."""
FREE_BYTES = 1 << 28
"""A table of any size may become as many bytes: repeated captions compress very well."""


def check_expansion(file: Path | str, table: Any, columns: Sequence[str], groups: Sequence[int] = ()) -> None:
    """Raise UserError if these columns of a table would become far larger than its file.

    `groups`: the row groups that will be read; all by default. Reads the headers of the pages alone.
    """
    packed = unpacked = 0
    metadata = table.metadata
    try:
        with open(file, "rb") as stream:
            for group in groups or range(metadata.num_row_groups):
                row_group = metadata.row_group(group)
                for number in range(metadata.num_columns):
                    chunk = row_group.column(number)
                    if chunk.path_in_schema.partition(".")[0] not in columns:
                        continue
                    for packed_bytes, unpacked_bytes in page_sizes(stream, chunk):
                        packed, unpacked = packed + packed_bytes, unpacked + unpacked_bytes
    except (OSError, ValueError) as error:
        raise unreadable_table(file, error) from error
    if unpacked > FREE_BYTES + MAX_EXPANSION * packed:
        raise UserError(
            f"{file}: {' and '.join(columns)} would grow from {packed / 2**20:.1f} MiB to "
            f"{unpacked / 2**30:.1f} GiB when read; expected at most {MAX_EXPANSION} times; write the table "
            "again from its source"
        )


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
        # A table from a stranger must not name files of this machine to be read.
        raise UserError(
            f"{where}: `image` names a file ({cell['path'][:80]}) and holds no bytes; write the table with "
            "the images in it (`embed_table_storage` of datasets), or give a folder of images"
        )
    if not isinstance(data, bytes) or not data:
        raise UserError(f"{where}: `image` holds no bytes; expected encoded images in `image.bytes`")
    return data
