"""Where a reader's shards come from: a folder here; `pairgen.store.remote` for URLs."""

from pathlib import Path
from typing import Protocol

from pairgen.store.hdf5 import DamagedShard, check_seal, quarantined_in
from pairgen.store.hdf5_chunks import Descriptor
from pairgen.store.spec import StoreSpec, read_spec, shard_path, shards_present


class Source(Protocol):
    """The shards of one store. `folder` holds the records of their quarantined rows."""

    folder: Path
    spec: StoreSpec
    shards: list[int]
    size: int  # bytes of all shards
    bounded: bool  # whether shards may have to make room for others
    remedy: str  # what a user can do about a damaged shard

    def name(self, shard: int) -> str:
        """What a shard is called in messages."""

    def check(self) -> dict[int, str]:
        """What can be seen without reading rows: shard -> what is wrong with it."""

    def quarantined(self, shard: int, recorded: list[int]) -> list[int]:
        """The pairs that a shard with a record lacks."""

    def open(self, shard: int) -> Descriptor:
        """The shard as an open file. Raises OSError, DamagedShard, and UserError when it is out of reach."""

    def bring(self, shard: int) -> bool:
        """Whether a shard that is needed soon is here; if not, begin to bring it."""


class Folder:
    """Shards in a folder of this machine."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.spec, self.size, self.bounded = folder, read_spec(folder), 0, False
        self.shards = shards_present(folder, self.spec)
        self.remedy = f"run `d2g pairs repair {folder}`, then `d2g pairs generate` again"

    def name(self, shard: int) -> str:
        return str(shard_path(self.folder, shard))

    def check(self) -> dict[int, str]:
        found: dict[int, str] = {}
        for shard in self.shards:
            try:
                self.size += check_seal(shard_path(self.folder, shard))
            except DamagedShard as error:
                found[shard] = error.reason
        return found

    def quarantined(self, shard: int, recorded: list[int]) -> list[int]:
        # A writer killed between a shard and its record leaves the header right and the record out of date.
        return quarantined_in(shard_path(self.folder, shard))

    def open(self, shard: int) -> Descriptor:
        return Descriptor(shard_path(self.folder, shard))

    def bring(self, shard: int) -> bool:
        return True


def open_source(folder: Path | str, cache: Path | str | None, cache_gib: float) -> Source:
    """The store at a path or an fsspec URL. Raises UserError for what is none."""
    from pairgen.store.remote import Mirror, is_url

    if is_url(folder):
        return Mirror(str(folder), cache, cache_gib)
    return Folder(Path(folder))
