"""Batches of stored pairs in an order that is a function of (seed, images so far)."""

from collections.abc import Iterator

from d2g.core.distributed import process_group
from d2g.core.errors import SettingError, UserError
from distill.config.run import DataConfig
from pairgen.store.concat import JoinedReader
from pairgen.store.dataset import PairRows, PairSampler, pair_loader
from pairgen.store.hdf5 import PairBatch
from pairgen.store.reader import PairReader

PLAIN = DataConfig()


def open_pairs(folders: str, teacher_sha256: str, config: DataConfig = PLAIN, told: bool = False) -> PairRows:
    """The pairs of a run, at a path or an fsspec URL, or of several, separated by commas.

    told: rows come with their guidance scale, as GuidedBatch; without it all stores must have the same.
    Raises UserError for an empty or unfinished store, or one made by another teacher.
    """
    readers = [_open(folder, teacher_sha256, config) for folder in folders.split(",")]
    return readers[0] if len(readers) == 1 and not told else JoinedReader(readers, told)


def _open(folder: str, teacher_sha256: str, config: DataConfig) -> PairReader:
    cache = config.cache or None
    reader = PairReader(folder, skip_bad=config.skip_bad, cache=cache, cache_gib=config.cache_gib)
    shard_size = reader.spec.shard_size
    if reader.bounded and config.block < shard_size:
        text = f"data.cache_gib is {config.cache_gib}, the pairs take {reader.gib:.3g}: shuffled by less than"
        raise SettingError(
            f"{text} a shard they would be copied again and again; set data.block={shard_size}"
        )
    if not reader.complete:
        raise UserError(
            f"{folder} holds {len(reader)} of {reader.spec.num_pairs} pairs; "
            "run the same `d2g pairs generate` again to finish it"
        )
    if not len(reader):
        raise UserError(f"{folder}: all {reader.spec.num_pairs} pairs are quarantined; make others")
    if reader.spec.teacher_sha256 != teacher_sha256:
        raise UserError(
            f"{folder} was made by teacher {reader.spec.teacher} ({reader.spec.teacher_sha256[:12]}), "
            "--teacher has "
            f"sha256 {teacher_sha256[:12]}; give the teacher that made the pairs"
        )
    return reader


def expect_enough(pairs: int, batch_size: int, held_out: int = 0) -> None:
    """Raise UserError where a batch is larger than the pairs that are trained on: rows would repeat in it.

    held_out: of the `pairs`, never trained on.
    """
    if batch_size > pairs - held_out:
        kept = f" ({pairs} less {held_out} held out)" if held_out else ""
        raise UserError(
            f"train.batch_size is {batch_size}, but there are {pairs - held_out} pairs to train on{kept}; "
            "make more pairs, or set a smaller batch"
        )


def bad_pairs(batch: PairBatch, folder: str) -> str:
    """What to do about pairs of all ranks' batches that hold values that are not finite; "" where none does.
    Call on every rank.
    """
    finite = (batch.noise.isfinite() & batch.latents.isfinite()).flatten(1).all(dim=1)
    found = process_group.gather_objects(batch.index[~finite].tolist())
    numbers = sorted(number for of_rank in found for number in of_rank)
    if not numbers:
        return ""
    which = f"pair{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers[:8]))}"
    return (
        f"{which} of {folder}: values that are not finite; `d2g pairs verify` names the shard, "
        "`d2g pairs repair` makes it again, then the same command goes on"
    )


def pair_batches(
    reader: PairRows,
    batch_size: int,
    seed: int,
    start: int,
    workers: int,
    config: DataConfig = PLAIN,
    pin_memory: bool = False,
    held_out: int = 0,
) -> Iterator[PairBatch]:
    """This rank's endless batches in the stored dtype, read ahead by `workers` processes (0: in this one).

    held_out: so many of the last pairs are never read.

    Raises UserError on damage, with `skip_bad` it warns once of each damaged shard instead; and for a batch
    larger than what there is.
    """
    expect_enough(len(reader), batch_size, held_out)
    sampler = PairSampler(
        len(reader) - held_out,
        batch_size,
        seed,
        start,
        rank=process_group.rank(),
        world_size=process_group.world_size(),
        block=config.block,
        window=config.window,
    )
    return pair_loader(reader, sampler, workers=workers, dtype=None, pin_memory=pin_memory)
