"""Dividing the shards of one store among jobs that share its folder (`d2g.core.claims`).

If two jobs do generate one shard, they compute the same rows and the last rename wins: claims save work, but
correctness does not depend on them.
"""

from pathlib import Path

from d2g.core.claims import FileClaims
from pairgen.store.spec import writing


class Claims(FileClaims):
    """The claims of one process on the shards of a store, in DIR/claims."""

    def __init__(self, folder: Path, patience: float = 120.0) -> None:
        super().__init__(Path(folder) / "claims", patience)

    def _path(self, number: int) -> Path:
        return self.folder / f"pairs-{number:05d}.json"

    def _create(self, number: int) -> bool:
        with writing(self.folder.parent, "nothing was lost"):
            return super()._create(number)
