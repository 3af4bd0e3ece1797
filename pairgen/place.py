"""The place of a pair store that a job writes: a folder, or a URL (`pairgen.object_place`)."""

from abc import ABC, abstractmethod
from collections.abc import Collection
from pathlib import Path
from typing import Any

from d2g.core.claims import WorkClaims
from pairgen.prompts import PromptList
from pairgen.shard_claims import Claims
from pairgen.store.hdf5 import load_rows
from pairgen.store.spec import (
    StoreSpec,
    create_store,
    prompts_path,
    quarantined_rows,
    read_spec,
    shard_path,
    shards_present,
    write_spec,
    writing,
)


class StorePlace(ABC):
    """Where the files of one store are, and where its shards are made. `name` is for messages.

    Shards are written by a `PairWriter` in `folder`, a folder of this machine with the layout of a store.
    """

    name: str
    folder: Path

    @abstractmethod
    def open(self) -> bool:
        """Whether there is a store here. Then its prompt list is in `folder`, if the store has one."""

    @abstractmethod
    def read_spec(self) -> StoreSpec:
        """The spec of the store as it is now."""

    @abstractmethod
    def create(self, spec: StoreSpec, prompts: PromptList) -> StoreSpec:
        """Create the store, or check that the existing one has the facts of `spec`, and return its spec."""

    @abstractmethod
    def write_grown(self, spec: StoreSpec, prompts: PromptList | None) -> None:
        """Replace the spec of a store that grows, and its prompt list unless that stays."""

    @abstractmethod
    def reopen(self, shard: int, spec: StoreSpec) -> None:
        """Turn a complete shard of the old `spec` into unfinished rows, from which a longer one is made."""

    @abstractmethod
    def shards_present(self, spec: StoreSpec) -> list[int]:
        """Sorted numbers of the complete shards."""

    @abstractmethod
    def quarantined_rows(self, spec: StoreSpec) -> dict[int, list[dict[str, Any]]]:
        """Shard -> its rows {"index", "prompt", "reason"} without finite latents, in order of index."""

    @abstractmethod
    def claims(self, patience: float) -> WorkClaims:
        """The claims of this process on the shards."""

    @abstractmethod
    def prepare(self, shard: int) -> bool:
        """Get what is finished of a claimed shard into `folder`; False if another job has completed it."""

    @abstractmethod
    def publish(self, shard: int) -> None:
        """Put a shard that is complete in `folder` in its place."""

    @abstractmethod
    def save_rows(self, shard: int) -> None:
        """Keep the finished rows of a shard that this process leaves to others."""

    def pending(self, spec: StoreSpec) -> list[int]:
        """The shards that are not present yet, in order."""
        present = set(self.shards_present(spec))
        return [shard for shard in range(spec.num_shards) if shard not in present]

    def pairs_present(self, spec: StoreSpec, also: Collection[int] = ()) -> int:
        """Number of rows in the shards that are present and in the shards `also`."""
        present = {*self.shards_present(spec), *also}
        quarantined = sum(
            len(rows) for shard, rows in self.quarantined_rows(spec).items() if shard in present
        )
        return sum(len(spec.rows(shard)) for shard in present) - quarantined


class FolderPlace(StorePlace):
    """A store in a folder, in which its shards are made: a finished one is renamed into its place."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.name = folder, str(folder)

    def open(self) -> bool:
        return (self.folder / "store.json").exists()

    def read_spec(self) -> StoreSpec:
        return read_spec(self.folder)

    def create(self, spec: StoreSpec, prompts: PromptList) -> StoreSpec:
        stored = create_store(self.folder, spec)
        # A resumed job keeps the prompt list that the store already has.
        if not prompts_path(self.folder).exists():
            with writing(self.folder, "nothing was lost"):
                prompts.save(prompts_path(self.folder))
        return stored

    def write_grown(self, spec: StoreSpec, prompts: PromptList | None) -> None:
        if prompts is not None:
            prompts.save(prompts_path(self.folder))
        with writing(self.folder, "the store is as it was"):
            write_spec(self.folder, spec)

    def reopen(self, shard: int, spec: StoreSpec) -> None:
        path = shard_path(self.folder, shard)
        if not path.exists():
            return
        index = load_rows(path, spec).index.tolist()
        with writing(self.folder, "the store is as it was"):
            if index:
                path.rename(self.folder / "partial" / f"{path.stem}.rows-{index[0]:010d}.h5")
            else:
                path.unlink()  # all its rows are quarantined

    def shards_present(self, spec: StoreSpec) -> list[int]:
        return shards_present(self.folder, spec)

    def quarantined_rows(self, spec: StoreSpec) -> dict[int, list[dict[str, Any]]]:
        return quarantined_rows(self.folder, spec)

    def claims(self, patience: float) -> WorkClaims:
        with writing(self.folder, "nothing was lost"):
            for name in ("partial", "claims"):
                (self.folder / name).mkdir(exist_ok=True)
        return Claims(self.folder, patience)

    def prepare(self, shard: int) -> bool:
        return not shard_path(self.folder, shard).exists()

    def publish(self, shard: int) -> None:
        """Nothing: the writer has renamed the shard into its place."""

    def save_rows(self, shard: int) -> None:
        """Nothing: the writer has put the rows where others find them."""
