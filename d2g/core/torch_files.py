"""Reading .pt and .pth files: tensors and plain values only, of the size that the file itself has."""

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

ZIP_MAGIC = b"PK\x03\x04"
"""What torch.save's files begin with since torch 1.6."""


def load_tensors(path: Path | str, device: str = "cpu") -> Any:
    """The content of a file of `torch.save`. No name in it is called (`weights_only`).

    Raises pickle.UnpicklingError for a file that would unpack to more than its own size, before anything is
    unpacked, and for values that are no tensors; OSError; and what torch raises for damaged bytes.
    """
    _check_sizes(Path(path))
    return torch.load(path, map_location=device, weights_only=True)


def _check_sizes(path: Path) -> None:
    """Raise pickle.UnpicklingError if the records of a zip file are compressed or overlap.

    torch.save writes them plain, one after the other. torch.load unpacks what a record claims.
    """
    with open(path, "rb") as file:
        if file.read(len(ZIP_MAGIC)) != ZIP_MAGIC:
            return
        size = os.fstat(file.fileno()).st_size
        try:
            with zipfile.ZipFile(file) as archive:
                records = archive.infolist()
        except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
            raise pickle.UnpicklingError(f"damaged zip file: {error}") from error
    if packed := [record for record in records if record.compress_type != zipfile.ZIP_STORED]:
        raise pickle.UnpicklingError(
            f"its record {packed[0].filename} is compressed, from {packed[0].file_size:,} bytes to "
            f"{packed[0].compress_size:,}; expected the plain records of torch.save"
        )
    # Data before the first record could hide a second directory, which torch would read.
    total = sum(record.file_size for record in records)
    first = min((record.header_offset for record in records), default=0)
    if total > size or first:
        raise pickle.UnpicklingError(
            f"its records claim {total:,} bytes from byte {first} of a file of {size:,}; expected one after "
            "the other"
        )
