"""A pair store at a URL of an object store: shards are made on this machine and uploaded whole.

The objects have the names of a store's files, so that readers of URLs and copies to a folder find a store.
Jobs on any number of machines share the work by claims (`d2g.core.object_claims`). Shards are made in a
scratch folder of this machine. A shard whose upload failed stays there, and the next job of this machine that
claims it uploads it. A job that is asked to stop uploads its finished rows to PREFIX/partial.
"""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from d2g.core.config import digest
from d2g.core.errors import UserError
from d2g.core.logs import logger
from d2g.core.object_claims import ObjectClaims
from d2g.core.object_store import ListedObject, MissingObject, ObjectStore, Version
from pairgen.place import StorePlace
from pairgen.prompts import PromptList
from pairgen.store.remote import cache_label, default_cache
from pairgen.store.spec import (
    StoreSpec,
    encode_spec,
    parse_record,
    parse_spec,
    prompts_path,
    quarantine_path,
    record_numbers,
    require_same_spec,
    shard_numbers,
    shard_path,
    writing,
)


def default_scratch() -> Path:
    """$XDG_CACHE_HOME/diffusion2gan/unfinished, or ~/.cache/diffusion2gan/unfinished."""
    return default_cache().parent / "unfinished"


class ObjectPlace(StorePlace):
    """A store at `url`. `scratch`: where unfinished shards are, in a folder of their own for each store."""

    def __init__(self, url: str, scratch: Path | str = "") -> None:
        self.store = ObjectStore(url)
        self.name, self.root = self.store.url, Path(scratch or default_scratch())
        self.folder = self.root / "none"  # until the spec is known
        self._records: dict[str, tuple[str, list[dict[str, Any]]]] = {}  # file -> (e-tag, rows)
        self._spec_version: Version = {}  # of store.json, when it was read last

    def open(self) -> bool:
        stored = self.store.read("store.json")
        if stored is None:
            return False
        spec = parse_spec(stored[0], f"{self.name}/store.json")
        self._enter_scratch(spec)
        if not prompts_path(self.folder).exists():
            try:
                with self._writing():
                    self.store.download("prompts.jsonl", prompts_path(self.folder))
            except MissingObject:
                logger.info("%s has no prompts.jsonl", self.name)
        return True

    def read_spec(self) -> StoreSpec:
        stored = self.store.read("store.json")
        if stored is None:
            raise UserError(
                f"{self.name} is not a pair store: it has no store.json; create one with `d2g pairs generate`"
            )
        self._spec_version = stored[1]
        return parse_spec(stored[0], f"{self.name}/store.json")

    def create(self, spec: StoreSpec, prompts: PromptList) -> StoreSpec:
        self._check_conditions()
        # One job creates the store; the others compare their spec with its.
        stored = spec
        if self.store.create("store.json", encode_spec(spec)) is None:
            stored = self.read_spec()
            require_same_spec(self.name, stored, spec)
        self._enter_scratch(stored)
        if self.store.size("prompts.jsonl") is None:
            if not prompts_path(self.folder).exists():
                prompts.save(prompts_path(self.folder))
            self.store.write("prompts.jsonl", prompts_path(self.folder))
        self._remove_leftovers(stored)
        return stored

    def _remove_leftovers(self, spec: StoreSpec) -> None:
        """Remove what killed jobs left of shards that are present: nobody makes those any more."""
        present = {_stem(shard) for shard in self.shards_present(spec)}
        for folder in ("claims", "partial"):
            for file in self.store.list(folder):
                if file.partition(".")[0] in present:
                    self.store.remove(f"{folder}/{file}")
        for folder in ("shards", "partial", "quarantine"):
            for path in (self.folder / folder).glob("pairs-*"):
                if path.name.partition(".")[0] in present:
                    path.unlink(missing_ok=True)

    def _check_conditions(self) -> None:
        """Warn if the store ignores conditions of writes, as some servers do: then jobs repeat work."""
        name = f"claims/.{uuid.uuid4().hex}"
        first, second = self.store.create(name, b"1"), self.store.create(name, b"2")
        self.store.remove(name)
        if first is not None and second is not None:
            logger.warning(
                "%s ignores the conditions of writes: several jobs may make the same shards, which wastes "
                "time and harms nothing",
                self.name,
            )

    def write_grown(self, spec: StoreSpec, prompts: PromptList | None) -> None:
        # The caller decided by the spec that it read. Two jobs may grow the store at once to one size.
        content, stored = encode_spec(spec), self.store.read("store.json")
        unchanged = stored is not None and (stored[1] == self._spec_version or stored[0] == content)
        self._enter_scratch(spec)
        if unchanged and prompts is not None:
            prompts.save(prompts_path(self.folder))
            self.store.write("prompts.jsonl", prompts_path(self.folder))
        if not unchanged or self.store.replace("store.json", content, self._spec_version) is None:
            raise UserError(
                f"{self.name} was changed by another job meanwhile; run the same command again to compare"
            )

    def reopen(self, shard: int, spec: StoreSpec) -> None:
        name = _shard_name(shard)
        if self.store.size(name) is not None:
            self.store.rename(name, f"partial/{_stem(shard)}.rows-{spec.rows(shard)[0]:010d}.h5")

    def shards_present(self, spec: StoreSpec) -> list[int]:
        return shard_numbers(spec, self.store.list("shards"))

    def quarantined_rows(self, spec: StoreSpec) -> dict[int, list[dict[str, Any]]]:
        files = self.store.list("quarantine")
        numbers = record_numbers(files)
        return {
            shard: self._record(shard, file, files[file])
            for shard, file in numbers.items()
            if shard < spec.num_shards
        }

    def _record(self, shard: int, file: str, entry: ListedObject) -> list[dict[str, Any]]:
        """The rows of a record, which is read again only when it has changed."""
        cached = self._records.get(file)
        if cached is None or cached[0] != entry.e_tag:
            name = f"quarantine/{file}"
            remedy = "delete it and the shard, then run `d2g pairs generate` again"
            stored = self.store.read(name)
            rows = parse_record(stored[0], shard, f"{self.name}/{name}", remedy) if stored else []
            cached = self._records[file] = entry.e_tag, rows
        return cached[1]

    def claims(self, patience: float) -> ObjectClaims:
        return ObjectClaims(self.store, "claims", "pairs", patience)

    def prepare(self, shard: int) -> bool:
        with self._writing():
            for name in ("shards", "partial"):
                (self.folder / name).mkdir(parents=True, exist_ok=True)
            # Another job has completed it, or a job of this machine could not upload it.
            if self.store.size(_shard_name(shard)) is not None:
                self._forget(shard)
                return False
            if shard_path(self.folder, shard).exists():
                self.publish(shard)
                return False
            try:
                for file in self._remote_rows(shard):
                    self.store.download(f"partial/{file}", self.folder / "partial" / file)
            except MissingObject:
                # The owner of a claim that was taken over has completed the shard after all.
                return self.prepare(shard)
        return True

    def publish(self, shard: int) -> None:
        # The record goes first: a shard never lacks rows without one.
        record = quarantine_path(self.folder, shard)
        remote_record, lacks_rows = f"quarantine/{record.name}", record.exists()
        if lacks_rows:
            self.store.write(remote_record, record)
        try:
            self.store.write(_shard_name(shard), shard_path(self.folder, shard))
        except (FileNotFoundError, MissingObject):
            # Another job on this machine saw the uploaded shard, and removed the local files.
            if self.store.size(_shard_name(shard)) is None:
                raise
        else:
            # The local record may be gone by now for the same reason, and says nothing any more.
            if not lacks_rows:
                self.store.remove(remote_record)
        for file in self._remote_rows(shard):
            self.store.remove(f"partial/{file}")
        self._forget(shard)

    def save_rows(self, shard: int) -> None:
        for path in self._local_rows(shard):
            self.store.write(f"partial/{path.name}", path)
            path.unlink(missing_ok=True)

    def _remote_rows(self, shard: int) -> list[str]:
        """Names of the objects in PREFIX/partial that hold rows of a shard."""
        return [file for file in self.store.list("partial") if file.startswith(f"{_stem(shard)}.rows-")]

    def _local_rows(self, shard: int) -> list[Path]:
        return sorted((self.folder / "partial").glob(f"{_stem(shard)}.rows-*.h5"))

    def _forget(self, shard: int) -> None:
        """Delete what the scratch folder has of a shard that is in its place."""
        leftovers = (shard_path(self.folder, shard), quarantine_path(self.folder, shard))
        for path in (*leftovers, *self._local_rows(shard)):
            path.unlink(missing_ok=True)

    def _enter_scratch(self, spec: StoreSpec) -> None:
        """Use the scratch folder of this store: another spec at this URL gets another folder."""
        self.folder = self.root / f"{cache_label(self.name)}-{digest([self.name, spec.sha256])[:16]}"
        with self._writing():
            for name in ("shards", "partial"):
                (self.folder / name).mkdir(parents=True, exist_ok=True)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        with writing(self.root, f"what is in {self.name} is safe"):
            yield


def _stem(shard: int) -> str:
    return shard_path(Path(), shard).stem


def _shard_name(shard: int) -> str:
    return os.fspath(shard_path(Path(), shard))
