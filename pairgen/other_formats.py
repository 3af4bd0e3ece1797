"""Copies of a pair store for other trainers: Parquet files, or tar files in WebDataset's layout."""

import io
import json
import math
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
from torch import Tensor

from d2g.core.atomic_files import write_and_rename, write_atomically
from d2g.core.claims import FolderOwner
from d2g.core.errors import SettingError
from d2g.core.logs import logger
from d2g.core.progress import Progress, quiet
from pairgen.store.hdf5 import PairBatch, load_rows, quarantined_in
from pairgen.store.spec import (
    StoreSpec,
    read_spec,
    refuse_other_folder,
    require_same_spec,
    shard_path,
    shards_present,
    writing,
)


def export_store(folder: Path, out: Path, format: str, progress: Progress = quiet) -> dict[str, Any]:
    """Copy the rows of a store to `out`: one file per shard, and the store.json.

    format: `parquet` or `webdataset`, whose contents docs/pair-format.md describes. Noise and latents keep
    the stored type, and seeded noise is written out. Missing shards and quarantined pairs are left out, and
    the log says how many. A copy gets the modification time of its shard, and stays while they agree. So the
    same call resumes, and copies shards again that were repaired or replaced. Returns the numbers of pairs,
    of files, and of files that this call wrote.

    Raises SettingError for another format, what `check_copy_folder` raises, DamagedShard, and UserError if
    `out` holds the copy of another store, or cannot be written.
    """
    check_format(format)
    suffix, encode = FORMATS[format]
    spec, pairs, written = read_spec(folder), 0, 0
    check_copy_folder(folder, out)
    shards = shards_present(folder, spec)
    with FolderOwner(out, "exports to"), writing(out, "the store is untouched, and finished files stay"):
        # A folder holds the copy of one store.
        if (out / "store.json").exists():
            require_same_spec(out, read_spec(out), spec)
        else:
            write_atomically(out / "store.json", (folder / "store.json").read_bytes())
        # Every file appears complete or not at all.
        for done, shard in enumerate(shards):
            source = shard_path(folder, shard)
            target = out / f"{source.stem}.{suffix}"
            modified = source.stat().st_mtime_ns
            if not target.exists() or target.stat().st_mtime_ns != modified:
                content = encode(load_rows(source, spec), spec)
                write_and_rename(content, target, target.with_name(f".{target.name}.tmp"))
                os.utime(target, ns=(modified, modified))
                written += 1
            pairs += len(spec.rows(shard)) - len(quarantined_in(source))
            progress("export", done + 1, len(shards))
    if left_out := spec.num_pairs - pairs:
        logger.info("%s: left out %d pairs that are missing or quarantined", folder, left_out)
    return {"out": str(out), "format": format, "pairs": pairs, "files": len(shards), "written": written}


def check_format(format: str) -> None:
    """Raise SettingError for an unknown format."""
    if format not in FORMATS:
        raise SettingError(f"format is {format!r}; expected {' or '.join(FORMATS)}")


def check_copy_folder(folder: Path, out: Path) -> None:
    """Raise SettingError if `out` is the store in `folder`, lies in it, or holds another store's shards, and
    UserError if it holds something else."""
    if Path(folder).resolve() in (out.resolve(), *out.resolve().parents):
        raise SettingError(
            f"--out {out} lies in the store {folder}, which holds its own files there; choose another folder"
        )
    if (out / "shards").is_dir():
        raise SettingError(f"--out {out} holds the shards of a pair store; choose another folder")
    refuse_other_folder(out)


def _tensors(rows: PairBatch) -> dict[str, Tensor]:
    """The tensors of the rows by column name, each [B, C, H, W]."""
    tensors = {"noise": rows.noise, "latent": rows.latents}
    return tensors if rows.condition is None else tensors | {"condition": rows.condition}


def _to_parquet(rows: PairBatch, spec: StoreSpec) -> bytes:
    """A row per pair: index, prompt or label, and flat tensors, whose shapes are in the schema's metadata."""
    columns: dict[str, pa.Array] = {"index": pa.array(rows.index.numpy())}
    if spec.conditioning == "text":
        columns["prompt"] = pa.array(rows.prompts, pa.string())
    elif spec.conditioning == "label":
        columns["label"] = pa.array(rows.labels.numpy())
    shapes = {}
    for name, values in _tensors(rows).items():
        shapes[name] = list(values.shape[1:])
        flat = pa.array(values.numpy().reshape(-1))
        columns[name] = pa.FixedSizeListArray.from_arrays(flat, math.prod(values.shape[1:]))
    table = pa.table(columns).replace_schema_metadata({"shapes": json.dumps(shapes)})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="none")  # noise cannot be compressed
    return buffer.getvalue()


def _to_tar(rows: PairBatch, spec: StoreSpec) -> bytes:
    """Files INDEX.noise.npy, INDEX.latent.npy and INDEX.txt or INDEX.cls, which are a WebDataset sample."""
    buffer, tensors = io.BytesIO(), _tensors(rows)
    text_suffix = {"text": "txt", "label": "cls"}.get(spec.conditioning)
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for row, number in enumerate(rows.index.tolist()):
            for name, values in tensors.items():
                array = io.BytesIO()
                np.save(array, values[row].numpy())
                _add_member(tar, f"{number:09d}.{name}.npy", array.getvalue())
            if text_suffix:
                _add_member(tar, f"{number:09d}.{text_suffix}", rows.prompts[row].encode())
    return buffer.getvalue()


def _add_member(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    # The time stays 0, so that equal pairs give equal files.
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


FORMATS: dict[str, tuple[str, Callable[[PairBatch, StoreSpec], bytes]]] = {
    "parquet": ("parquet", _to_parquet),
    "webdataset": ("tar", _to_tar),
}
"""Name of a format -> ending of its files, and the encoder of a shard's rows."""
