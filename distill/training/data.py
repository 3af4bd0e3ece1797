"""Training batches of stored pairs, in an order that depends only on (seed, number of images seen)."""

from collections.abc import Iterator, Sequence

from d2g.core.distributed import process_group
from d2g.core.errors import SettingError, UserError
from d2g.core.logs import logger
from d2g.diffusion.pipelines import TeacherDigests
from distill.config.run import DataConfig
from pairgen.store.concat import JoinedReader
from pairgen.store.dataset import PairRows, PairSampler, pair_loader
from pairgen.store.hdf5 import PairBatch
from pairgen.store.reader import PairReader
from pairgen.store.spec import is_teacher_of

DEFAULTS = DataConfig()


def open_pairs(
    folders: str, teacher: TeacherDigests, config: DataConfig = DEFAULTS, with_guidance: bool = False
) -> PairRows:
    """Open the pair stores of a run. `folders`: paths or fsspec URLs, separated by commas.

    with_guidance: return each row with its guidance scale (GuidedBatch); without it, all stores must have the
    same scale. Raises UserError for an empty or unfinished store or one made by another teacher, SettingError
    for a cache too small for the shuffle.
    """
    readers = [_open_store(folder, teacher, config) for folder in folders.split(",")]
    _warn_of_duplicates(readers)
    return readers[0] if len(readers) == 1 and not with_guidance else JoinedReader(readers, with_guidance)


def _warn_of_duplicates(readers: Sequence[PairReader]) -> None:
    """Warn of stores that hold the same pairs: held-out pairs of one are trained on in the other."""
    first: dict[tuple[object, ...], PairReader] = {}
    for reader in readers:
        spec = reader.spec
        teacher = spec.denoiser_sha256 or spec.teacher_sha256
        # A store that has grown begins with the pairs of its first prompt list.
        prompts = spec.earlier_prompts[0][1] if spec.earlier_prompts else spec.prompts_sha256
        pairs = (spec.seed, spec.guidance, teacher, prompts, spec.per_prompt)
        if (other := first.setdefault(pairs, reader)) is not reader:
            logger.warning(
                "%s and %s have the same seed %d, guidance, teacher and prompts: their pairs are duplicates; "
                "leave one out, or generate it with another --seed",
                *(other.folder, reader.folder, spec.seed),
            )


def _open_store(folder: str, teacher: TeacherDigests, config: DataConfig) -> PairReader:
    cache = config.cache or None
    reader = PairReader(folder, skip_bad=config.skip_bad, cache=cache, cache_gib=config.cache_gib)
    shard_size = reader.spec.shard_size
    # A bounded cache needs shuffle blocks of whole shards.
    if reader.bounded and config.block < shard_size:
        sizes = f"data.cache_gib is {config.cache_gib}, the pairs take {reader.gib:.3g}"
        raise SettingError(
            f"{sizes}: with shuffle blocks smaller than a shard, shards would be copied again and again; "
            f"set data.block={shard_size}"
        )
    # The store must be finished, hold a row, and be made by the run's teacher.
    if not reader.complete:
        raise UserError(
            f"{folder} holds {len(reader)} of {reader.spec.num_pairs} pairs; "
            "run the same `d2g pairs generate` again to finish it"
        )
    if not len(reader):
        raise UserError(f"{folder}: all {reader.spec.num_pairs} pairs are quarantined; make others")
    if not is_teacher_of(reader.spec, teacher):
        raise UserError(
            f"{folder} was made by teacher {reader.spec.teacher} ({reader.spec.teacher_sha256[:12]}), "
            "--teacher has "
            f"sha256 {teacher.weights[:12]}; give the teacher that made the pairs"
        )
    return reader


def training_pairs(pairs: int, max_pairs: int, held_out: int) -> int:
    """Number of pairs to train on, the first ones; `max_pairs` of 0 takes all that are not held out.

    Raises SettingError if `max_pairs` is above that number.
    """
    available = pairs - held_out
    if max_pairs > available:
        note = f", of which train.validate_pairs holds out {held_out}" if held_out else ""
        raise SettingError(
            f"data.max_pairs is {max_pairs}, but there are {pairs} pairs{note}; expected at most {available}"
        )
    return max_pairs or available


def require_enough_pairs(pairs: int, batch_size: int, held_out: int = 0) -> None:
    """Raise UserError if a batch is larger than the training set, because a batch would repeat rows.

    held_out: number of the `pairs` that are excluded from training.
    """
    if batch_size > pairs - held_out:
        settings = "data.max_pairs or train.validate_pairs"
        note = f" ({pairs} less {held_out} that {settings} leaves out)" if held_out else ""
        raise UserError(
            f"train.batch_size is {batch_size}, but there are {pairs - held_out} pairs to train on{note}; "
            "make more pairs, or set a smaller batch"
        )


def bad_pairs(batch: PairBatch, folder: str) -> str:
    """Describe the pairs with non-finite values in the current batch of all ranks, and how to repair them.

    Returns "" if all values are finite. Call it on every rank.
    """
    finite = (batch.noise.isfinite() & batch.latents.isfinite()).flatten(1).all(dim=1)
    bad_by_rank = process_group.gather_objects(batch.index[~finite].tolist())
    bad = sorted(number for numbers in bad_by_rank for number in numbers)
    if not bad:
        return ""
    subject = f"pair{'s' * (len(bad) > 1)} {', '.join(map(str, bad[:8]))}"
    return (
        f"{subject} of {folder}: values that are not finite; `d2g pairs verify` names the shard, "
        "`d2g pairs repair` makes it again, then the same command goes on"
    )


def pair_batches(
    reader: PairRows,
    batch_size: int,
    seed: int,
    start: int,
    workers: int,
    config: DataConfig = DEFAULTS,
    pin_memory: bool = False,
    held_out: int = 0,
) -> Iterator[PairBatch]:
    """Iterate endlessly over this rank's share of the batches, in the stored dtype.

    batch_size: rows over all ranks. start: number of images already seen. workers: number of prefetching
    processes (0: read in this process). held_out: number of last pairs, which are never read.

    Raises UserError for a batch larger than the training set, and for a damaged shard; with `skip_bad`, it
    logs one warning for each damaged shard instead.
    """
    require_enough_pairs(len(reader), batch_size, held_out)
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
