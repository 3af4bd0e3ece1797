"""Rows of measured images, and the files that keep finished parts while an evaluation runs."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from d2g.core.atomic_files import write_atomically
from d2g.core.config import differing
from d2g.core.distributed import process_group
from d2g.core.errors import UserError
from d2g.core.json_files import check_type, parse_json, read_json_object
from d2g.core.machine_errors import raise_machine_error
from eval.metrics.feature_stats import FeatureStats, Origin
from eval.networks.base import FeatureNet


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasuredRows:
    """Measured values of the images `numbers`: by name, [N] or [N, D], and their N prompts.

    converted: for image files, the number of images converted to 8-bit RGB, by their original format.
    """

    numbers: range
    values: dict[str, Tensor] = field(default_factory=dict)
    prompts: list[str] = field(default_factory=list)
    converted: Counter[str] = field(default_factory=Counter)

    def __len__(self) -> int:
        return len(self.numbers)


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasureOptions:
    """Options of measuring that do not change the numbers.

    batch_size: images per forward pass. folder: folder for finished parts, from which a killed run resumes.
    keep: folder in which the images are saved as PNG; a part without its images is measured again. part:
    images per part (0: a 64th of all images, 16 to 512).
    """

    batch_size: int = 64
    folder: Path | None = None
    keep: Path | None = None
    part: int = 0

    def parts(self, numbers: range) -> list[range]:
        """Split the numbers into parts, in order. The split does not depend on the number of processes."""
        size = self.part or max(16, min(512, len(numbers) // 64))
        starts = range(numbers.start, numbers.stop, size)
        return [range(start, min(start + size, numbers.stop)) for start in starts]

    def path(self, part: range) -> Path | None:
        """The file of a finished part; None without a `folder`."""
        if self.folder is None:
            return None
        return self.folder / "parts" / f"{part.start:08d}-{part.stop:08d}.safetensors"

    def image(self, number: int) -> Path:
        """The file of a kept image."""
        assert self.keep is not None
        return self.keep / f"{number:08d}.png"

    def finished(self, part: range) -> bool:
        """Whether a part is measured, and its images are kept if they should be."""
        path = self.path(part)
        if path is None or not path.is_file():
            return False
        return self.keep is None or all(self.image(number).is_file() for number in part)


def open_work(
    folder: Path, facts: Mapping[str, Any], *, file: str = "work.json", holds: str = "parts"
) -> None:
    """Create a folder for the evaluation that `facts` (JSON) describe, or resume in an existing one.

    Raises UserError when the folder belongs to another evaluation, naming what differs.
    """
    path = folder / file
    if path.is_file():
        differ = differing(
            read_json_object(path, f"delete {folder} and evaluate again"), json.loads(json.dumps(facts))
        )
        if differ:
            raise UserError(
                f"{folder} holds {holds} of another evaluation: {', '.join(differ)}; give the same settings "
                "to go on with it, or another folder"
            )
    elif process_group.rank() == 0:
        write_atomically(path, json.dumps(facts, indent=1))


def save_part(path: Path, rows: MeasuredRows) -> None:
    """Write a finished part atomically. Raises UserError when the disk refuses."""
    write_atomically(path, _pack([rows]))


def load_part(path: Path) -> MeasuredRows:
    """Read a finished part. Raises UserError when it is damaged."""
    try:
        (rows,) = _unpack(path.read_bytes())
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise_machine_error(error)
        raise UserError(f"{path} is damaged ({error}); delete it and run the same command again") from error
    return rows


def gather_parts(done: list[MeasuredRows], numbers: range) -> MeasuredRows:
    """Join the parts of all processes in order; every process gets all rows."""
    if process_group.world_size() > 1:
        packed = torch.frombuffer(bytearray(_pack(done)), dtype=torch.uint8)
        done = [rows for data in process_group.gather(packed) for rows in _unpack(data.numpy().tobytes())]
    done = sorted(done, key=lambda rows: rows.numbers.start)
    assert [n for rows in done for n in rows.numbers] == list(numbers), "parts are missing or doubled"
    names = done[0].values.keys() if done else ()
    values = {name: torch.cat([rows.values[name] for rows in done]) for name in names}
    prompts = [text for rows in done for text in rows.prompts]
    converted = sum((rows.converted for rows in done), Counter[str]())
    return MeasuredRows(numbers=numbers, values=values, prompts=prompts, converted=converted)


def _pack(parts: Iterable[MeasuredRows]) -> bytes:
    """Parts as safetensors: `START:STOP/rows/NAME` for values, `START:STOP/facts` for the rest as JSON."""
    tensors: dict[str, Tensor] = {}
    for rows in parts:
        key = f"{rows.numbers.start}:{rows.numbers.stop}"
        facts = bytearray(json.dumps([rows.prompts, rows.converted]).encode())
        tensors[f"{key}/facts"] = torch.frombuffer(facts, dtype=torch.uint8)
        tensors |= {f"{key}/rows/{name}": value.contiguous() for name, value in rows.values.items()}
    return save(tensors)


def _unpack(data: bytes) -> list[MeasuredRows]:
    """The inverse of `_pack`."""
    parts: dict[str, MeasuredRows] = {}
    # Keys are START:STOP/COLUMN.
    for name, tensor in load(data).items():
        key, _, column = name.partition("/")
        start, stop = (int(number) for number in key.split(":"))
        rows = parts.setdefault(key, MeasuredRows(numbers=range(start, stop)))
        if column == "facts":
            prompts, converted = parse_json(tensor.numpy().tobytes())
            check_type(prompts, list[str], "prompts")
            check_type(converted, dict[str, int], "converted")
            rows.prompts.extend(prompts)
            rows.converted.update(converted)
        else:
            rows.values[column.removeprefix("rows/")] = tensor
    return list(parts.values())


def feature_stats(
    rows: MeasuredRows, sets: Mapping[str, FeatureNet], resize: str, source: str
) -> dict[str, FeatureStats]:
    """Mean and covariance of the rows of each feature network in `sets`."""
    stats = {}
    for name, net in sets.items():
        origin = Origin(features=net.name, features_sha256=net.sha256, resize=resize, source=source)
        stats[name] = FeatureStats(net.dim, origin)
        stats[name].update(rows.values[name])
    return stats
