"""Identify the inputs of a run by content: recorded in RUN/config.json, and compared when a run resumes.

Digests and specs identify the teacher, pair stores, the initial student, frozen networks and real images.
Paths may change.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from d2g.core.config import RESTORE_CONFIG_HINT, digest, to_json
from d2g.core.distributed import process_group
from d2g.core.errors import UserError
from d2g.core.json_files import read_json_object
from d2g.core.logs import logger
from d2g.diffusion import pretrained
from d2g.vision.transformers_vision import clip_sha256
from d2g.vision.weights import file_sha256
from distill.config.run import DistillConfig
from distill.models.feature_networks import weights_path
from distill.student_files import student_folder
from distill.training.real_images import RealImages
from distill.training.real_rows import ImageRows
from pairgen.store.concat import JoinedReader
from pairgen.store.dataset import PairRows
from pairgen.store.rewired import RewiredReader
from pairgen.store.spec import StoreSpec, differing_from_earlier

FROZEN_NETWORKS = ("lpips", "regression.lpips_weights", "gan.feature_networks", "clip_guidance.model")
"""The settings that are files or folders of frozen networks."""
INPUTS = ("teacher", "pairs", "init", "gan.real", *FROZEN_NETWORKS)
"""The settings that are paths of inputs, by dotted name."""


def describe_inputs(
    config: DistillConfig, reader: PairRows | ImageRows, real: RealImages | None
) -> dict[str, Any]:
    """Describe the inputs of a run as JSON.

    - images: their number, in a run without pairs.
    - teacher: digest of the teacher without its autoencoder.
    - pairs: specs of the pair stores.
    - init: digest of the initial student; "" without one, or if it is gone.
    - clip: digest of the CLIP of CLIP guidance, if it is used.
    - files: digests of frozen networks by setting, and of `real`, the images of gan.real.
    """
    files = {name: weights_sha256_of(_paths(to_json(config), name)) for name in FROZEN_NETWORKS}
    if real is not None:
        files["gan.real"] = real.digest()
    return {
        **({"images": len(reader)} if isinstance(reader, ImageRows) else {}),
        "teacher": pretrained.denoiser_sha256(config.teacher),
        "pairs": [spec.as_json() for spec in store_specs(reader)],
        "init": _student_sha256(config.init) if config.init else "",
        **({"clip": clip_sha256(config.clip_guidance.model)} if config.clip_guidance.weight else {}),
        "files": {name: sha256 for name, sha256 in files.items() if sha256},
    }


def store_specs(reader: PairRows | ImageRows) -> list[StoreSpec]:
    """List the specs of the stores that a reader reads, in order; [] for a run without pairs."""
    if isinstance(reader, ImageRows):
        return []
    if isinstance(reader, RewiredReader):
        reader = reader.reader
    readers = reader.readers if isinstance(reader, JoinedReader) else [reader]
    return [store.spec for store in readers]


class StoreFacts(TypedDict):
    """The spec of a pair store, which may be of an older version."""

    num_pairs: NotRequired[int]


class InputDigests(TypedDict):
    """The result of `describe_inputs` as it is recorded."""

    images: NotRequired[int]
    pairs: NotRequired[list[StoreFacts]]
    init: NotRequired[str]
    files: NotRequired[dict[str, str]]


class RunInputs(TypedDict):
    """The fields of a run's config.json that identify its inputs, besides paths at the top level."""

    inputs: NotRequired[InputDigests]
    gan: NotRequired[dict[str, Any]]
    regression: NotRequired[dict[str, Any]]
    clip_guidance: NotRequired[dict[str, Any]]


def same_inputs(
    out: Path, config: DistillConfig, reader: PairRows | ImageRows, inputs: dict[str, Any]
) -> list[str]:
    """List the settings of INPUTS whose inputs are the same as when the run in `out` started, at any path.

    Raises UserError if a pair store at its old path holds other pairs now, and for another number of images
    in a run without pairs.
    """
    # A new run has nothing to compare with.
    if not (out / "config.json").is_file():
        return []
    written = read_json_object(out / "config.json", RESTORE_CONFIG_HINT, RunInputs)
    before = written.get("inputs", {})

    # The same path, or the same digest at another path.
    settings = to_json(config)
    unchanged = [name for name in INPUTS if _same_paths(_paths(written, name), _paths(settings, name))]
    unchanged += [name for name in ("teacher", "init") if inputs[name] and before.get(name) == inputs[name]]
    files, files_before = inputs["files"], before.get("files", {})
    unchanged += [name for name in files if files_before.get(name) == files[name]]

    # A file that has changed at its old path is used anyway, and reported.
    started = any((out / name).exists() for name in ("checkpoints", "stats.jsonl"))
    changed = [
        name for name in files if name in unchanged and files_before.get(name, files[name]) != files[name]
    ]
    for name in changed if started and process_group.rank() == 0 else ():
        logger.info(
            "%s: %s has changed since the run in %s started", name, ",".join(_paths(settings, name)), out
        )

    # The order of a run's images depends on their number.
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
            unchanged.append("pairs")
            _log_growth(config.pairs, specs, before["pairs"])
        elif "pairs" in unchanged and started:
            raise UserError(
                f"{config.pairs} holds other pairs than when the run in {out} started: {differing}; "
                "restore them, or give another --out"
            )
    return unchanged


def _differing_stores(specs: list[StoreSpec], before: Sequence[Mapping[str, Any]]) -> str:
    """How stores differ from those that a run recorded; "" if they are the same or have grown."""
    if len(specs) != len(before):
        return f"{len(before)} stores -> {len(specs)}"
    pairs = zip(specs, before, strict=True)
    return ", ".join(text for spec, earlier in pairs for text in differing_from_earlier(spec, earlier))


def _log_growth(folders: str, specs: list[StoreSpec], before: Sequence[Mapping[str, Any]]) -> None:
    now, then = sum(spec.num_pairs for spec in specs), sum(spec["num_pairs"] for spec in before)
    if now != then and process_group.rank() == 0:
        logger.info(
            "%s: grown from %d to %d pairs since this run started; from now on its rows come in a new order",
            *(folders, then, now),
        )


def _paths(settings: Mapping[str, Any], name: str) -> list[str]:
    """The paths of a setting by its dotted name: a list, or a text with commas between them."""
    *groups, last = name.split(".")
    for group in groups:
        settings = settings.get(group, {})
    value = settings.get(last, "")
    return [str(path) for path in value] if isinstance(value, list) else str(value).split(",")


def _same_paths(a: Sequence[str], b: Sequence[str]) -> bool:
    """Whether two lists of paths lead to the same files."""
    return [os.path.realpath(path) for path in a] == [os.path.realpath(path) for path in b]


def weights_sha256_of(names: Sequence[str]) -> str:
    """Digest of frozen networks, wherever their files and folders lie; "" if none is a file or a folder."""
    digests = [_network_sha256(Path(weights_path(name))) if name else "" for name in names]
    return (
        digest([sha256 or name for sha256, name in zip(digests, names, strict=True)]) if any(digests) else ""
    )


def _network_sha256(path: Path) -> str:
    """sha256 of a file, or over the names and contents of weights and texts in a folder; else ""."""
    if path.is_file():
        return file_sha256(path)
    if not path.is_dir():
        return ""
    files = sorted(file for file in path.iterdir() if file.suffix in (".safetensors", ".json", ".txt"))
    return digest([[file.name, file_sha256(file)] for file in files if file.is_file()])


def _student_sha256(name: str) -> str:
    """sha256 of the weights of a run or exported student; "" if it is gone: a resume does not need it."""
    try:
        file = student_folder(name)[0] / "ema.safetensors"
    except UserError:
        return ""
    if not file.is_file():
        return ""
    return file_sha256(file)
