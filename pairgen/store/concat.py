"""Several pair stores of one teacher read as one, each row with the guidance scale it was made with."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from d2g.core.errors import SettingError, UserError
from pairgen.store.hdf5 import PairBatch, StoreSpec
from pairgen.store.reader import PairReader


@dataclass(frozen=True, kw_only=True, slots=True)
class GuidedBatch(PairBatch):
    """Rows whose student is told their guidance scale [B], fp32."""

    guidance: Tensor


def scales(batch: PairBatch) -> tuple[Tensor, ...]:
    """What a student is told beside noise and text: the rows' guidance [B], where they come with it."""
    return (batch.guidance,) if isinstance(batch, GuidedBatch) else ()


class JoinedReader:
    """What a PairReader does, over several: rows of all stores lie evenly among one another, so that the last
    rows, like any others, are of every scale.

    told: give GuidedBatches. Raises UserError for stores of other teachers or latents than the first's,
    SettingError for other scales where the student is not told them.
    """

    def __init__(self, readers: Sequence[PairReader], told: bool) -> None:
        self.readers, self.told = list(readers), told
        first = self.spec
        for reader in self.readers[1:]:
            for name in ("teacher_sha256", "conditioning", "latent_shape", "latent_space"):
                if (theirs := getattr(reader.spec, name)) != (ours := getattr(first, name)):
                    raise UserError(
                        f"{reader.folder} has {name} {theirs}, {self.readers[0].folder} {ours}; "
                        "expected stores that differ in guidance only"
                    )
        different = sorted({reader.spec.guidance for reader in self.readers})
        if len(different) > 1 and not told:
            raise SettingError(
                f"the pairs have guidance scales {', '.join(f'{s:g}' for s in different)}; "
                "set student.guidance_conditioning=true, or give the pairs of one"
            )
        sizes = [len(reader) for reader in self.readers]
        places = np.concatenate([(np.arange(size) + 0.5) / size for size in sizes])
        self._order = np.argsort(places, kind="stable")
        self._ends = np.cumsum([0, *sizes])

    @property
    def spec(self) -> StoreSpec:
        """The first store's."""
        return self.readers[0].spec

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _where(self, rows: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """(store, position in it) of each row."""
        number = self._order[np.asarray(rows, dtype=np.int64)]
        store = np.searchsorted(self._ends, number, side="right") - 1
        return store, number - self._ends[store]

    def read(self, rows: Sequence[int], dtype: torch.dtype | None = torch.float32) -> PairBatch:
        """The rows at these positions, as PairReader.read gives them; stores of another type than the first's
        are brought to it."""
        dtype = dtype or self.spec.torch_dtype
        store, position = self._where(rows)
        parts = {n: self.readers[n].read(position[store == n].tolist(), dtype) for n in set(store.tolist())}
        prompts = {n: iter(part.prompts) for n, part in parts.items()}
        whole = next(iter(parts.values()))
        noise, latent, index = (
            torch.empty(len(store), *t.shape[1:], dtype=t.dtype)
            for t in (whole.noise, whole.latents, whole.index)
        )
        for n, part in parts.items():
            here = torch.from_numpy(store == n)
            noise[here], latent[here], index[here] = part.noise, part.latents, part.index
        batch = replace(
            whole,
            noise=noise,
            latents=latent,
            index=index,
            prompts=[next(prompts[n]) for n in store.tolist()],
            skipped={file: why for part in parts.values() for file, why in part.skipped.items()},
        )
        if not self.told:
            return batch  # type: ignore[no-any-return]  # replace() of a PairBatch
        guidance = torch.tensor([self.readers[n].spec.guidance for n in store.tolist()])
        fields = {name: getattr(batch, name) for name in PairBatch.__dataclass_fields__}
        return GuidedBatch(**fields, guidance=guidance.float())

    def prefetch(self, rows: Sequence[int], block: int = 1) -> None:
        """Announce positions that will be read."""
        store, position = self._where(rows)
        for n in sorted(set(store.tolist())):
            self.readers[n].prefetch(position[store == n].tolist(), block)
