"""The sources of a reader's shards, and the bounded set of shards that are open, checked when opened."""

import os
import resource
from collections import OrderedDict
from pathlib import Path
from typing import Any, Protocol

from d2g.core.errors import UserError
from d2g.core.machine_errors import raise_machine_error
from pairgen.store.hdf5 import (
    UNREADABLE,
    DamagedShard,
    IntArray,
    OpenShard,
    check_length,
    damage_error,
    quarantined_in,
    read_fault,
)
from pairgen.store.spec import StoreSpec, read_spec, shard_path, shards_present

# HDF5 takes about 1 ms and 0.6 MiB per open file: a full shuffle over more shards reads about 4 times slower.
OPEN_FILES = min(1024, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)
BOUNDED_FILES = 8  # with a bounded cache: a deleted copy takes disk space as long as it is open
TEXT_BLOCKS = 256  # decoded blocks of prompts in memory

TEXT_DATASETS = {"text": "prompt", "label": "label", "none": None}

Damage = dict[int, str]  # place in a batch -> why its row cannot be trusted


class ShardSource(Protocol):
    """The shards of one store. `folder` holds the quarantine records."""

    folder: Path
    spec: StoreSpec
    shards: list[int]
    size: int  # bytes of all shards
    bounded: bool  # whether the cache cannot hold all shards at once
    remedy: str  # what a user can do about a damaged shard

    def name(self, shard: int) -> str:
        """The shard's name in messages."""

    def check(self) -> dict[int, str]:
        """The checks that read no rows: shard -> what is wrong with it."""

    def quarantined(self, shard: int, recorded: list[int]) -> list[int]:
        """The quarantined pairs of a shard whose record lists `recorded`."""

    def open(self, shard: int) -> OpenShard:
        """Open a shard. Raises OSError, DamagedShard, and UserError when it cannot be downloaded."""

    def request(self, shard: int) -> bool:
        """Whether the shard is on this machine; if not, start to download it in the background."""


class LocalShards:
    """Shards in a folder of this machine."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.spec, self.size, self.bounded = folder, read_spec(folder), 0, False
        self.shards = shards_present(folder, self.spec)
        self.remedy = f"run `d2g pairs repair {folder}`, then `d2g pairs generate` again"

    def name(self, shard: int) -> str:
        return str(shard_path(self.folder, shard))

    def check(self) -> dict[int, str]:
        damage: dict[int, str] = {}
        for shard in self.shards:
            try:
                self.size += check_length(shard_path(self.folder, shard))
            except DamagedShard as error:
                damage[shard] = error.reason
        return damage

    def quarantined(self, shard: int, recorded: list[int]) -> list[int]:
        # Trust the header: a writer that is killed between shard and record leaves an outdated record.
        return quarantined_in(shard_path(self.folder, shard))

    def open(self, shard: int) -> OpenShard:
        return OpenShard(shard_path(self.folder, shard))

    def request(self, shard: int) -> bool:
        return True


def open_source(folder: Path | str, cache: Path | str | None, cache_gib: float) -> ShardSource:
    """The store at a path or an fsspec URL. Raises UserError when there is no store."""
    from pairgen.store.remote import RemoteShards, is_url

    if is_url(folder):
        return RemoteShards(str(folder), cache, cache_gib)
    return LocalShards(Path(folder))


class OpenShards:
    """Opens a source's shards on demand and closes those unused for longest.

    A forked or unpickled copy opens its own files. quarantined: shard -> the pairs that it must lack.
    damage: shard -> what is wrong with it, as far as known; grows when shards are opened.
    """

    def __init__(
        self, source: ShardSource, quarantined: dict[int, list[int]], damage: dict[int, str]
    ) -> None:
        self.source, self.quarantined, self.damage = source, quarantined, damage
        self._checked: dict[int, tuple[int, int, int]] = {}  # shard -> identity of the file that was checked
        self._close_all()

    def _close_all(self) -> None:
        self._process = os.getpid()
        self._files: OrderedDict[int, OpenShard] = OrderedDict()
        self._texts: OrderedDict[tuple[int, int], list[str]] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key not in ("_files", "_texts")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._close_all()

    def get(self, shard: int) -> OpenShard:
        """The open shard. Raises DamagedShard when it cannot be trusted as a whole."""
        if self._process != os.getpid():  # HDF5's handles are not made for a fork
            self._close_all()
        # Two threads may request the same shard at the same time: then both open it.
        file = self._files.pop(shard, None) or self._open(shard)
        self._files[shard] = file
        if len(self._files) > (BOUNDED_FILES if self.source.bounded else OPEN_FILES):
            self._files.popitem(last=False)
        return file

    def error(self, shard: int, reason: str) -> DamagedShard:
        """The error that names a shard, what is wrong with it, and the remedy."""
        return damage_error(self.source.name(shard), reason, self.source.remedy)

    def hint(self, shard: int, first: int, last: int) -> None:
        """Announce rows `first` to `last` of a shard. Errors are left to the read that follows."""
        try:
            if shard not in self.damage and self.source.request(shard):
                file = self.get(shard)
                for name in self.value_names:
                    file.hint(name, first, last)
        except (UserError, *UNREADABLE):
            return

    @property
    def value_names(self) -> list[str]:
        """The datasets of noise, latents and conditions in each file."""
        return list(self.source.spec.row_shapes)

    def _open(self, shard: int) -> OpenShard:
        """Open a shard, and check it unless this very file was checked before."""
        if shard in self.damage:
            raise self.error(shard, self.damage[shard])
        # Check a file when it is opened first; a file of the same identity needs no second check.
        try:
            file = self.source.open(shard)
            if self._checked.get(shard) != file.identity:
                self._check(shard, file)
                self._checked[shard] = file.identity
        except DamagedShard as error:
            self.damage[shard] = error.reason
            raise self.error(shard, error.reason) from error
        except OSError as error:
            raise_machine_error(error, self.source.name(shard))
            self.damage[shard] = f"unreadable ({os.strerror(error.errno) if error.errno else error})"
            raise self.error(shard, self.damage[shard]) from error
        return file

    def _check(self, shard: int, file: OpenShard) -> None:
        quarantined = file.check(self.source.spec, shard)
        if quarantined != (recorded := self.quarantined.get(shard, [])):
            reason = f"its header quarantines pairs {quarantined}, its record in quarantine/ {recorded}"
            raise self.error(shard, reason)

    def read_text(self, shard: int, rows: IntArray, places: IntArray, text: list[str]) -> Damage:
        """Read prompts, or labels in decimal, to text[place]. Does nothing for a store without either."""
        damage: Damage = {}
        if (name := TEXT_DATASETS[self.source.spec.conditioning]) is None:
            return damage
        file = self.get(shard)
        # Prompts are compressed in chunks: decode a chunk once and cache it.
        for row, place in zip(rows.tolist(), places.tolist(), strict=True):
            block = file.text_block(name, row)
            try:
                text[place] = self._text_of(shard, file, name, block)[row - block.start]
            except UNREADABLE as error:
                raise_machine_error(error, self.source.name(shard), memory=False)
                damage[place] = read_fault(name, row, error)
        return damage

    def _text_of(self, shard: int, file: OpenShard, name: str, block: range) -> list[str]:
        key = shard, block.start
        text = self._texts.pop(key, None)
        if text is None:
            text = file.read_text(name, block)
        self._texts[key] = text
        if len(self._texts) > TEXT_BLOCKS:
            self._texts.popitem(last=False)
        return text
