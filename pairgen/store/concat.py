"""Several pair stores of one teacher read as one, each row with the guidance scale of its store."""

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
    """A PairBatch with the guidance scale of each row, [B] fp32, for a guidance-conditioned student."""

    guidance: Tensor


def guidance_scales(batch: PairBatch) -> tuple[Tensor, ...]:
    """The guidance scales ([B],) of a GuidedBatch, to pass to the student; () for other batches."""
    return (batch.guidance,) if isinstance(batch, GuidedBatch) else ()


class JoinedReader:
    """Reads several stores like one PairReader. Their rows are interleaved evenly, so that any range of
    positions contains every guidance scale in proportion.

    with_guidance: return GuidedBatches. Raises UserError if teacher, solver or latents differ between
    stores, and SettingError if guidance scales differ without `with_guidance`.
    """

    def __init__(self, readers: Sequence[PairReader], with_guidance: bool) -> None:
        self.readers, self.with_guidance = list(readers), with_guidance
        first = self.spec
        # Stores may differ in guidance, but must have the same teacher, solver and latents.
        for reader in self.readers[1:]:
            by_denoiser = reader.spec.denoiser_sha256 and first.denoiser_sha256
            teacher = "denoiser_sha256" if by_denoiser else "teacher_sha256"
            condition = ("condition_shape", "condition_teacher")
            solver = ("solver", "steps", "spacing", "final_alpha_one", "guidance_rescale", "churn")
            for name in (teacher, "conditioning", "latent_shape", "latent_space", *condition, *solver):
                if (value := getattr(reader.spec, name)) != (expected := getattr(first, name)):
                    raise UserError(
                        f"{reader.folder} has {name} {value}, {self.readers[0].folder} {expected}; "
                        "expected stores that differ in guidance only"
                    )
        guidance_scales = sorted({reader.spec.guidance for reader in self.readers})
        if len(guidance_scales) > 1 and not with_guidance:
            raise SettingError(
                f"the pairs have guidance scales {', '.join(f'{s:g}' for s in guidance_scales)}; "
                "set student.guidance_conditioning=true, or use pairs of one scale"
            )
        # Spread the rows of each store evenly over [0, 1), and sort all rows by that place.
        sizes = [len(reader) for reader in self.readers]
        places = np.concatenate([(np.arange(size) + 0.5) / size for size in sizes])
        self._order = np.argsort(places, kind="stable")
        self._ends = np.cumsum([0, *sizes])

    @property
    def spec(self) -> StoreSpec:
        """The spec of the first store."""
        return self.readers[0].spec

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _locate(self, rows: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """The store of each row, and its position in that store."""
        number = self._order[np.asarray(rows, dtype=np.int64)]
        store = np.searchsorted(self._ends, number, side="right") - 1
        return store, number - self._ends[store]

    def read(self, rows: Sequence[int], dtype: torch.dtype | None = torch.float32) -> PairBatch:
        """Read the rows at these positions like PairReader.read; dtype None means the first store's type."""
        dtype = dtype or self.spec.torch_dtype
        store, position = self._locate(rows)
        # Read each store's rows in one call.
        parts = {n: self.readers[n].read(position[store == n].tolist(), dtype) for n in set(store.tolist())}
        prompts = {n: iter(part.prompts) for n, part in parts.items()}
        first = next(iter(parts.values()))
        # Scatter the rows back to their order in the batch.
        noise, latents, index = (
            torch.empty(len(store), *t.shape[1:], dtype=t.dtype)
            for t in (first.noise, first.latents, first.index)
        )
        for n, part in parts.items():
            mask = torch.from_numpy(store == n)
            noise[mask], latents[mask], index[mask] = part.noise, part.latents, part.index
        condition = None
        if first.condition is not None:
            condition = torch.empty(len(store), *first.condition.shape[1:], dtype=first.condition.dtype)
            for n, part in parts.items():
                assert part.condition is not None, "stores of one condition_shape"
                condition[torch.from_numpy(store == n)] = part.condition
        batch = replace(
            first,
            condition=condition,
            noise=noise,
            latents=latents,
            index=index,
            prompts=[next(prompts[n]) for n in store.tolist()],
            skipped={file: why for part in parts.values() for file, why in part.skipped.items()},
        )
        if not self.with_guidance:
            return batch  # type: ignore[no-any-return]  # replace() of a PairBatch
        # Each row gets the guidance scale of its store.
        guidance = torch.tensor([self.readers[n].spec.guidance for n in store.tolist()])
        fields = {name: getattr(batch, name) for name in PairBatch.__dataclass_fields__}
        return GuidedBatch(**fields, guidance=guidance.float())

    def prefetch(self, rows: Sequence[int], block: int = 1) -> None:
        """Announce positions that are read soon."""
        store, position = self._locate(rows)
        for n in sorted(set(store.tolist())):
            self.readers[n].prefetch(position[store == n].tolist(), block)
