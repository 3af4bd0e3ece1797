"""What the inputs of a run are, wherever they lie: recorded in RUN/config.json and compared at a resume.

Digests and specs identify a teacher, pair stores and an initial student. Their paths are notes.
"""

import hashlib
import os
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from d2g.core.config import RESTORE_CONFIG_HINT
from d2g.core.distributed import process_group
from d2g.core.errors import UserError
from d2g.core.json_files import read_json_object
from d2g.core.logs import logger
from d2g.diffusion import pretrained
from d2g.vision.transformers_vision import clip_sha256
from distill.config.run import DistillConfig
from distill.sampling import student_folder
from distill.training.real_rows import ImageRows
from pairgen.store.concat import JoinedReader
from pairgen.store.dataset import PairRows
from pairgen.store.rewired import RewiredReader
from pairgen.store.spec import StoreSpec, differing_from_earlier

INPUTS = ("teacher", "pairs", "init", "lpips")
"""The settings that are paths of inputs."""


def describe_inputs(teacher: str, init: str, reader: PairRows | ImageRows, guide: str = "") -> dict[str, Any]:
    """Digest of the teacher without its autoencoder, specs of the pair stores, digest of the initial student
    ("" without one, or if it is gone), digest of the CLIP `guide`, if one guides, and the number of images
    of a run without pairs, as JSON."""
    images = {"images": len(reader)} if isinstance(reader, ImageRows) else {}
    return {
        **images,
        "teacher": pretrained.denoiser_sha256(teacher),
        "pairs": [spec.as_json() for spec in store_specs(reader)],
        "init": _student_sha256(init) if init else "",
        **({"clip": clip_sha256(guide)} if guide else {}),
    }


def store_specs(reader: PairRows | ImageRows) -> list[StoreSpec]:
    """The specs of the stores that a reader reads, in order; none for a run without pairs."""
    if isinstance(reader, ImageRows):
        return []
    if isinstance(reader, RewiredReader):
        reader = reader.reader
    readers = reader.readers if isinstance(reader, JoinedReader) else [reader]
    return [one.spec for one in readers]


class RunInputs(TypedDict):
    """The digests of a run's inputs in its config.json."""

    inputs: NotRequired[dict[str, Any]]


def same_inputs(
    out: Path, config: DistillConfig, reader: PairRows | ImageRows, inputs: dict[str, Any]
) -> list[str]:
    """The settings of INPUTS whose inputs are those that the run in `out` started with, whatever their paths.

    Raises UserError if a pair store is at its old path, but holds other pairs now, and for another number of
    images in a run without pairs.
    """
    # A new run has nothing to compare with.
    if not (out / "config.json").is_file():
        return []
    written = read_json_object(out / "config.json", RESTORE_CONFIG_HINT, RunInputs)
    before = written.get("inputs", {})

    # The same path, or the same digest at another path.
    same = [name for name in INPUTS if _same_paths(str(written.get(name, "")), getattr(config, name))]
    same += [name for name in ("teacher", "init") if inputs[name] and before.get(name) == inputs[name]]

    # The order of a run's images depends on their number.
    started = any((out / name).exists() for name in ("checkpoints", "stats.jsonl"))
    if started and "images" in before and "images" in inputs and before["images"] != inputs["images"]:
        raise UserError(
            f"{config.gan.real} holds {inputs['images']} images, but {before['images']} when the run in "
            f"{out} started; restore them, or give another --out"
        )

    # Pair stores may grow, but the pairs that the run started with must be unchanged.
    if "pairs" in before:
        specs = store_specs(reader)
        differing = _differing_stores(specs, before["pairs"])
        if not differing:
            same.append("pairs")
            _log_growth(config.pairs, specs, before["pairs"])
        elif "pairs" in same and started:
            raise UserError(
                f"{config.pairs} holds other pairs than when the run in {out} started: {differing}; "
                "restore them, or give another --out"
            )
    return same


def _differing_stores(specs: list[StoreSpec], before: list[dict[str, Any]]) -> str:
    """How stores differ from those that a run recorded; "" if they are the same or have grown."""
    if len(specs) != len(before):
        return f"{len(before)} stores -> {len(specs)}"
    pairs = zip(specs, before, strict=True)
    return ", ".join(text for spec, earlier in pairs for text in differing_from_earlier(spec, earlier))


def _log_growth(folders: str, specs: list[StoreSpec], before: list[dict[str, Any]]) -> None:
    now, then = sum(spec.num_pairs for spec in specs), sum(spec["num_pairs"] for spec in before)
    if now != then and process_group.rank() == 0:
        logger.info(
            "%s: grown from %d to %d pairs since this run started; from now on its rows come in a new order",
            *(folders, then, now),
        )


def _same_paths(a: str, b: str) -> bool:
    """Whether two lists of paths, separated by commas, lead to the same files."""
    left, right = ([os.path.realpath(path) for path in paths.split(",")] for paths in (a, b))
    return left == right


def _student_sha256(name: str) -> str:
    """sha256 of the weights of a run or exported student; "" if it is gone: a resume does not need it."""
    try:
        file = student_folder(name)[0] / "ema.safetensors"
    except UserError:
        return ""
    if not file.is_file():
        return ""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
