"""The pictures of a run as the teacher sees them: one parquet file that pairs and evaluations read."""

import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
from torch import Tensor

from d2g.core.atomic_files import write_atomically
from d2g.core.config import differing
from d2g.core.distributed import process_group
from d2g.core.errors import UserError
from d2g.core.json_files import parse_json
from d2g.core.logs import logger
from d2g.core.progress import Progress, quiet
from d2g.core.shuffle import permuted_batch
from d2g.data.tables import open_table
from eval.images.folders import load_all, read_images
from eval.images.resize import to_pil
from eval.runner.session import read_list
from pairgen.config import PairConfig
from pairgen.prompts import read_prompts
from teacher_training.config import TeacherConfig
from teacher_training.data import captioned_images, warn_of_changed_pictures

PICTURES_FILE = "pictures.parquet"
PICTURES_KEY = "d2g_pictures"
"""Key of the settings in the metadata of the file."""


def save_pictures(config: TeacherConfig, size: int, out: Path, progress: Progress = quiet) -> Path:
    """Write OUT/pictures.parquet on rank 0, unless it is there: pictures of `size` pixels with captions.

    The pictures and captions are those of `captioned_images`, which raises UserError for damaged pictures and
    missing captions. Raises UserError if the file is there with pictures of other settings.
    """
    file = out / PICTURES_FILE
    facts = {"data": os.path.realpath(config.data), "size": size} | {
        name: getattr(config, name) for name in ("column", "images", "seed", "caption_template")
    }
    if file.is_file():
        _require_same(file, facts)
        warn_of_changed_pictures(config, read_list(file), file)
    if process_group.rank() == 0 and not file.is_file():
        images, captions = captioned_images(
            config.data,
            size,
            config.images,
            config.seed,
            config.caption_template,
            progress,
            config.column,
        )
        table = pa.table({"image": [{"bytes": _png(image)} for image in images], "caption": captions})
        table = table.replace_schema_metadata({PICTURES_KEY: json.dumps(facts)})
        buffer = io.BytesIO()
        pq.write_table(table, buffer, row_group_size=1024)
        write_atomically(file, buffer.getvalue())
    process_group.barrier()
    return file


def _require_same(file: Path, facts: Mapping[str, Any]) -> None:
    """Raise UserError for a file of pictures that were made with other settings; older files do not say."""
    stored = (open_table(file).schema_arrow.metadata or {}).get(PICTURES_KEY.encode(), b"{}")
    if differ := differing({**facts, **parse_json(stored)}, facts):
        raise UserError(
            f"{file} has pictures of other settings: {', '.join(differ)}; give the same to go on, or another "
            "--out"
        )


def _png(image: Tensor) -> bytes:
    buffer = io.BytesIO()
    to_pil(image).save(buffer, "PNG")
    return buffer.getvalue()


def spread_captions(source: str, column: str | None, count: int) -> list[str]:
    """`count` captions of pictures that are evenly spread over all, so that every class keeps its share."""
    texts = read_list(Path(source), column)
    return [texts[row * len(texts) // count] for row in range(count)]


def pair_prompts(pictures: Path, pairs: PairConfig, out: Path) -> Path:
    """The prompts of the pairs: the captions of `pictures`, or OUT/prompts.jsonl with them in random order.

    Pairs take the first prompts, and pictures lie sorted, often by class. So the order is random where there
    are fewer pairs than captions, unless an earlier version has begun the store in the order of the pictures.
    """
    file = out / "prompts.jsonl"
    if process_group.rank() == 0 and not file.is_file() and not (out / "pairs" / "store.json").is_file():
        captions = read_prompts(pictures)
        if 0 < pairs.num_pairs < len(captions) * pairs.per_prompt:
            order = permuted_batch(pairs.seed, len(captions), 0, len(captions))
            lines = (json.dumps({"prompt": captions[number]}) + "\n" for number in order)
            write_atomically(file, "".join(lines))
    process_group.barrier()
    return file if file.is_file() else pictures


def reference_pictures(pictures: Path, count: int, file: Path) -> Path:
    """At most `count` pictures, evenly spread, for evaluations: `pictures` itself, or FILE by rank 0.

    If FILE holds this number of pictures already, it is not written again, so that evaluations can reuse what
    they have measured of it.
    """
    total = pq.read_metadata(pictures).num_rows
    if total <= count:
        return pictures
    if process_group.rank() == 0:
        logger.info("evaluations compare with %d of %d pictures, evenly spread", count, total)
        if not (file.is_file() and pq.read_metadata(file).num_rows == count):
            table, buffer = pq.read_table(pictures), io.BytesIO()
            pq.write_table(table.take([row * total // count for row in range(count)]), buffer)
            write_atomically(file, buffer.getvalue())
    process_group.barrier()
    return file


def spread_pictures(file: Path, count: int) -> tuple[Tensor, list[str]]:
    """At most `count` pictures [N, 3, S, S] of a parquet file, evenly spread, with their captions."""
    total = pq.read_metadata(file).num_rows
    count = min(count, total)
    rows = (row * total // count for row in range(count))
    return load_all(batch for row in rows for batch in read_images(file, start=row, limit=1))
