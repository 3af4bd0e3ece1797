"""Lists of millions of prompts: stripped, without duplicates, in file order, in one buffer of bytes."""

import difflib
import hashlib
import json
import mmap
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from operator import index as as_integer
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from d2g.core.errors import UserError
from d2g.core.json_files import parse_json
from d2g.core.logs import log_once
from d2g.core.machine_errors import raise_machine_error
from d2g.data.prompt_files import prompt_cells, prompt_text
from pairgen.store.spec import write_through_scratch, writing

NEWLINE, QUOTE = 10, 34
SCAN_BYTES = 1 << 24  # bytes of a saved list that are scanned at once
HASH_BYTES = 16  # of a prompt's hash: among 12M prompts, a collision is expected once in 10^24 files
BLOCK_PROMPTS = 1 << 16  # prompts that are moved or decoded at once
RESTORE = "restore it from the job's prompt file"

json_string = json.JSONEncoder(ensure_ascii=False).encode


class PromptList(Sequence[str]):
    """Prompts by position, stored as JSON lines: one JSON string per line in UTF-8, as in prompts.jsonl.

    `open` maps the file into memory, so that processes on one machine share it; the offsets take 8 bytes per
    prompt. Slices with step 1 share the buffer. A list equals any sequence of the same strings.
    """

    def __init__(self, lines: bytes | bytearray | mmap.mmap | memoryview, ends: NDArray[np.int64]) -> None:
        """`lines`: the buffer. `ends` [n + 1]: line i is lines[ends[i] : ends[i + 1]]."""
        self._lines, self._ends = memoryview(lines), ends

    @classmethod
    def of(cls, texts: Iterable[str]) -> "PromptList":
        """A list of these strings, in this order, duplicates included."""
        lines, ends, _ = _encode_lines(texts)
        return cls(lines, _as_numbers(ends))

    @classmethod
    def open(cls, path: Path) -> "PromptList":
        """Map a saved list into memory. Raises UserError for a file that is missing or damaged."""
        try:
            with Path(path).open("rb") as file:
                lines = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
            raise_machine_error(error)
            reason = getattr(error, "strerror", None) or "it is empty"
            raise UserError(f"cannot read prompts from {path}: {reason}; {RESTORE}") from error
        # Find the ends of all lines in blocks, so that a file of gigabytes needs little memory.
        values = np.frombuffer(lines, np.uint8)
        blocks = (
            np.flatnonzero(values[at : at + SCAN_BYTES] == NEWLINE) + at + 1
            for at in range(0, len(values), SCAN_BYTES)
        )
        ends = np.concatenate([np.zeros(1, np.int64), *blocks])
        # Each line must be a quoted string that ends with a newline.
        starts, stops = ends[:-1], ends[1:]
        quoted = stops - starts >= 3
        if ends[-1] != len(values) or not quoted.all() or (values[[starts, stops - 2]] != QUOTE).any():
            raise _damaged(path)
        return cls(lines, ends)

    def save(self, path: Path) -> None:
        """Write the list completely or not at all. Raises UserError for errors of the disk."""
        path = Path(path)
        scratch = path.parent / "partial"
        with writing(path.parent, "no prompt list was written"):
            write_through_scratch(self.buffer, path, scratch if scratch.is_dir() else path.parent)

    @property
    def buffer(self) -> memoryview:
        """The JSON lines of these prompts: what `save` writes and `prompt_list_sha256` hashes."""
        return self._lines[int(self._ends[0]) : int(self._ends[-1])]

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, item: int) -> str: ...
    @overload
    def __getitem__(self, item: slice) -> "PromptList": ...
    def __getitem__(self, item: int | slice) -> "str | PromptList":
        if isinstance(item, slice):
            start, stop, step = item.indices(len(self))
            if step != 1:
                return PromptList.of(self[i] for i in range(start, stop, step))
            return PromptList(self._lines, self._ends[start : max(start, stop) + 1])
        number = as_integer(item)
        if not -len(self) <= number < len(self):
            raise IndexError(f"prompt {number} of {len(self)}")
        number %= len(self)
        return _decoded(self._lines[int(self._ends[number]) : int(self._ends[number + 1])])

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), BLOCK_PROMPTS):
            ends = self._ends[start : start + BLOCK_PROMPTS + 1].tolist()
            yield from (_decoded(self._lines[a:b]) for a, b in pairwise(ends))

    def __eq__(self, other: object) -> bool:
        if isinstance(other, PromptList):
            return bool(len(self) == len(other) and self.buffer == other.buffer)
        if not isinstance(other, Sequence) or isinstance(other, str | bytes):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]  # as a list's

    def __repr__(self) -> str:
        first = ", ".join(map(repr, self[:3]))
        return f"PromptList of {len(self)}: {first}{', ...' if len(self) > 3 else ''}"

    def __reduce__(self) -> tuple[Any, ...]:
        return PromptList, (bytes(self.buffer), self._ends - self._ends[0])


def read_prompts(path: Path, column: str | None = None) -> PromptList:
    """Read the prompts of a file (.txt, .jsonl, .csv, .tsv, COCO's .json, .parquet), of standard input, or of
    an image folder.

    Prompts are stripped, and blank ones are dropped. Of equal prompts, the first is kept. A prompt's position
    in the list is its id. 12M prompts of 60 bytes take 0.9 GB, and 1.3 GB while they are read. `column`: the
    column of the prompts (`d2g.data.columns`). Raises UserError for a file that is
    missing, empty, not UTF-8, without a prompt column, damaged or of another kind.
    """
    path = Path(path)
    read = 0

    def texts() -> Iterator[str]:
        nonlocal read
        for cell in prompt_cells(path, column):
            if text := prompt_text(path, cell):
                read += 1
                yield text

    prompts = distinct(texts())
    if not prompts:
        raise UserError(f"{path} holds no prompts, expected at least one; check --prompts")
    # A prompt's number is then not that of its line.
    if repeats := read - len(prompts):
        log_once(f"{path}: left out {repeats:,} of {read:,} prompts, which repeat earlier ones")
    return prompts


def distinct(texts: Iterable[str]) -> PromptList:
    """Return these strings in this order without duplicates: of equal strings, the first is kept."""
    lines, ends, keys = _encode_lines(
        texts, lambda line: hashlib.blake2b(line, digest_size=HASH_BYTES).digest()
    )
    numbers = _as_numbers(ends)
    is_first = _first_occurrence(np.frombuffer(keys, np.uint64).reshape(-1, 2))
    if not is_first.all():
        numbers = _compact(lines, numbers, is_first)
    return PromptList(lines, numbers)


def label_list(num_labels: int) -> PromptList:
    """The prompts of a class-conditional job without a prompt file: all class numbers in decimal."""
    return PromptList.of(map(str, range(num_labels)))


def check_labels(
    prompts: Sequence[str], num_labels: int, names: Mapping[str, int] | None = None
) -> PromptList:
    """The prompts of a class-conditional job as class numbers in decimal, without duplicates.

    A prompt is a number from 0 to `num_labels` - 1 or one of the teacher's class `names` (name -> number).
    Raises UserError, which counts and names all other prompts.
    """
    names = names or {}
    numbers = [_label(text, num_labels, names) for text in prompts]
    wrong = [i for i, number in enumerate(numbers) if number is None]
    if wrong:
        # Name the first wrong prompts, and the class that the first one may mean.
        examples = ", ".join(f"prompt {i} {prompts[i][:40]!r}" for i in wrong[:3]) + (
            ", ..." if wrong[3:] else ""
        )
        close = difflib.get_close_matches(prompts[wrong[0]], names, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        expected = f"a number from 0 to {num_labels - 1}" + (" or a class name" if names else "")
        raise UserError(
            f"{len(wrong)} of {len(prompts)} prompts are not classes of the teacher: {examples}; "
            f"expected {expected}{hint}"
        )
    return distinct(map(str, numbers))


def _label(text: str, num_labels: int, names: Mapping[str, int]) -> int | None:
    if text in names:
        return names[text]
    number = int(text) if text.isascii() and text.isdigit() and len(text) < 10 else num_labels
    return number if number < num_labels else None


def prompt_list_sha256(prompts: Iterable[str]) -> str:
    """sha256 of the JSON lines (docs/pair-format.md): equal for the same prompts in the same order."""
    if isinstance(prompts, PromptList):
        return hashlib.sha256(prompts.buffer).hexdigest()
    total = hashlib.sha256()
    for prompt in prompts:
        total.update(json_string(prompt).encode() + b"\n")
    return total.hexdigest()


def _encode_lines(
    texts: Iterable[str], key: Callable[[bytes], bytes] | None = None
) -> tuple[bytearray, "array[int]", bytearray]:
    """(JSON lines of `texts`, their ends with a leading 0, the concatenated keys of all lines)."""
    lines, ends, keys = bytearray(), array("q", [0]), bytearray()
    for text in texts:
        line = json_string(text).encode() + b"\n"
        lines += line
        ends.append(len(lines))
        if key is not None:
            keys += key(line)
    return lines, ends, keys


def _as_numbers(ends: "array[int]") -> NDArray[np.int64]:
    return np.frombuffer(ends, np.int64)


def _first_occurrence(keys: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """[n] bool: the rows of `keys` [n, 2] that equal no earlier row."""
    # Sort by both halves of the key: equal keys become neighbors.
    order = np.lexsort((keys[:, 1], keys[:, 0]))  # stable: equal keys stay in order
    repeats = np.ones(max(0, len(keys) - 1), np.bool_)
    for half in (0, 1):
        column = keys[:, half][order]
        repeats &= column[1:] == column[:-1]
    # Only rows that repeat their predecessor in this order are duplicates.
    is_first = np.ones(len(keys), np.bool_)
    is_first[order[1:][repeats]] = False
    return is_first


def _compact(lines: bytearray, ends: NDArray[np.int64], keep: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Move the lines to keep to the front of the buffer, truncate it, and return their ends."""
    lengths, stop = np.diff(ends), 0
    values = np.frombuffer(lines, np.uint8)
    # Lines move towards the front, so a block never overwrites lines that are still to be read.
    for start in range(0, len(keep), BLOCK_PROMPTS):
        rows = slice(start, start + BLOCK_PROMPTS)
        block = values[ends[start] : ends[min(start + BLOCK_PROMPTS, len(keep))]]
        remaining = block[np.repeat(keep[rows], lengths[rows])]
        values[stop : stop + len(remaining)] = remaining
        stop += len(remaining)
    # Views of the buffer must be gone before it can shrink.
    del values, block
    del lines[stop:]
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths[keep])])


def _decoded(line: memoryview) -> str:
    data = bytes(line)
    try:
        if b"\\" not in data:
            return data[1:-2].decode()
        text: str = parse_json(data)
    except ValueError as error:
        raise UserError(
            f"a prompt list holds {data[:40]!r}, which is not a JSON string; restore it"
        ) from error
    return text


def _damaged(path: Path) -> UserError:
    return UserError(f"{path} is damaged: expected one JSON string per line; {RESTORE}")
