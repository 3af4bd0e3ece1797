"""Generate pairs: the loop from a teacher to stored (noise, latents, prompt) rows."""

import math
import re
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.request import url2pathname

import torch
from torch import Tensor

from d2g.core.claims import WorkClaims
from d2g.core.distributed import process_group
from d2g.core.errors import Interrupted, UserError
from d2g.core.logs import logger
from d2g.core.progress import Progress, quiet
from d2g.core.signals import StopFlag
from d2g.diffusion import pretrained
from pairgen.config import PairConfig
from pairgen.grow import grow_store
from pairgen.job import Job, batched, config_from_spec, log_supported_stages, open_job, streamed_prompts
from pairgen.object_place import ObjectPlace
from pairgen.place import FolderPlace, StorePlace
from pairgen.speed import choose_speed, fastest_batch
from pairgen.statistics import evenly_spread
from pairgen.store.reader import PairReader
from pairgen.store.remote import is_url
from pairgen.store.spec import (
    StoreSpec,
    is_teacher_of,
    prompts_path,
    read_spec,
)
from pairgen.store.writer import BackgroundWriter, PairWriter

CHECK_BAD_AFTER = 256  # rows; fewer say little about the share of bad rows
RESIMULATED_ROWS = 8
"""Rows that `resimulate` samples at once: few enough for a small GPU."""


@dataclass(frozen=True, kw_only=True)
class PairSummary:
    """Result of `generate_pairs`."""

    out: str
    pairs: int  # rows in the store
    new_pairs: int  # rows that all ranks have added
    shards: int  # complete shards in the store
    seconds: float
    pairs_per_sec: float
    complete: bool  # whether all shards of the spec are present
    batch_size: int
    quarantined: list[int]  # numbers of pairs without finite latents; their records are in DIR/quarantine


class Tally:
    """Writes rows and counts those without finite latents; stops the job if their share exceeds `max_bad`."""

    def __init__(self, max_bad: float) -> None:
        self.written, self.bad, self.max_bad = 0, 0, max_bad
        self.latest: dict[str, Any] = {}
        """The quarantine record of the last row without finite latents."""

    def append(
        self,
        writer: PairWriter,
        noise: Tensor,
        latents: Tensor,
        prompts: list[str],
        index: list[int],
        condition: Tensor | None = None,
    ) -> None:
        """Append rows to a shard, as `PairWriter.append` does.

        Raises FloatingPointError if more than `max_bad` of the rows so far are not finite.
        """
        quarantined = len(writer.quarantined)
        writer.append(noise, latents, prompts, index, condition)
        self.written += len(index)
        if len(writer.quarantined) > quarantined:
            self.bad += len(writer.quarantined) - quarantined
            self.latest = list(writer.quarantined.values())[-1]
        if self.written >= CHECK_BAD_AFTER and self.bad > self.max_bad * self.written:
            # Save now: after an error, the background thread runs no further calls.
            writer.flush()
            raise FloatingPointError(
                f"{self.bad} of {self.written} latents are not finite, the last that of pair "
                f"{self.latest['index']} ({self.latest['prompt']!r}); max_bad is {self.max_bad}: try another "
                "precision, or raise max_bad"
            )


def generate_pairs(
    config: PairConfig, out: Path | str, progress: Progress = quiet, retry: bool = False
) -> PairSummary:
    """Generate every pair that the store `out` does not hold yet: noise -> ODE solver -> latents -> HDF5.

    Call it again to resume. Ranks under torchrun, and jobs on other machines that use the same folder or URL,
    share the work: each claims one shard at a time (`d2g.core.claims`). Source: method.md "Pair data sets".

    out: a folder, or a URL s3://, gs://, az:// or file:// (`pairgen.object_place`). retry: generate the
    quarantined rows of a folder again.

    Raises UserError for bad input or a folder with another spec; Interrupted on Ctrl-C, after saving all
    finished rows; and FloatingPointError if more than `config.max_bad` of the latents are not finite.

    >>> import tempfile
    >>> from pathlib import Path
    >>> from pairgen import PairReader, generate_pairs
    >>> from pairgen.config import PairConfig
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / "prompts.txt").write_text("a red cube\\na blue ball")
    >>> config = PairConfig(teacher="miniature", prompts=str(folder / "prompts.txt"), steps=2, guidance=1.0)
    >>> generate_pairs(config, folder / "pairs").complete
    True
    >>> PairReader(folder / "pairs").read([0]).latents.shape
    torch.Size([1, 8, 8, 8])
    """
    started = time.monotonic()
    device = process_group.init(long_waits=True)
    log_supported_stages(config)

    # Load the teacher and check all inputs before the first file is written.
    place = open_place(out, config.scratch)
    job = open_store(config, place, device)
    spec, tally = job.spec, Tally(config.max_bad)
    batch_size = config.batch_size or fastest_batch(job)
    offload = config.text_cache > 0 and device.type != "cpu"

    # With `retry`, each rank takes its share of the shards with quarantined rows: those that rank 0 lists,
    # because another rank may look when some of them are made already.
    quarantined = process_group.gather_objects(sorted(place.quarantined_rows(spec)))[0] if retry else []
    retry_shards = quarantined[process_group.rank() :: process_group.world_size()]
    queued: set[int] = set()  # shards whose commit is queued in the writer thread

    # Claim shards until none is left. The teacher computes while a thread writes.
    with StopFlag() as stop, place.claims(config.patience) as claims, BackgroundWriter() as background:
        while (shard := next_shard(claims, place, spec, retry_shards, stop)) is not None:
            _check_not_grown(place, spec)
            # The rows of a shard that is present already count; only its quarantined ones are made again.
            retried = shard in retry_shards
            writer = PairWriter(place.folder, spec, shard, retry=retried)
            retry_shards = [number for number in retry_shards if number != shard]
            present = place.pairs_present(spec, queued)
            try:
                # Encode prompts in large chunks, sample in batches, and write in the background.
                todo = writer.open()
                present += 0 if retried else len(spec.rows(shard)) - len(todo)
                for chunk in batched(todo, max(config.text_cache, batch_size)):
                    if stop or claims.lost(shard):  # encoding the rest takes longer than a grace period
                        break
                    encoded = job.encode(chunk, offload)
                    for indices in batched(chunk, batch_size):
                        if stop or claims.lost(shard):
                            break
                        condition = job.condition(indices)
                        rows = job.rows(indices, encoded, condition)
                        background.submit(tally.append, writer, *rows, indices, condition)
                        present += len(indices)
                        progress("pairs", present, spec.num_pairs)
            except BaseException:
                background.submit(writer.flush)  # save finished rows, whatever the error is
                raise

            # On Ctrl-C, save the finished rows and report their number.
            if stop:
                background.submit(writer.flush)
                background.submit(place.save_rows, shard)
                background.finish()
                saved = place.pairs_present(spec)
                saved += 0 if retried else len(spec.rows(shard)) - len(writer.missing)
                raise Interrupted(
                    f"stopped; {saved} of {spec.num_pairs} pairs are safe in {out}; "
                    "run the same command again to generate the rest"
                )

            # Put the shard in place, unless this job stalled and another job has taken the shard over.
            if not claims.lost(shard):
                background.submit(commit, writer, place, claims, shard)
                queued.add(shard)
        # Wait for the last commits before anything is counted.
        background.finish()
    if stop:
        raise Interrupted(f"stopped; {place.pairs_present(spec)} of {spec.num_pairs} pairs are safe in {out}")
    return _summary(place, spec, tally, batch_size, time.monotonic() - started)


def _summary(
    place: StorePlace, spec: StoreSpec, tally: Tally, batch_size: int, seconds: float
) -> PairSummary:
    """Count the new rows of all ranks and the rows of the store. Waits for all ranks."""
    totals = process_group.mean({"new": float(tally.written - tally.bad)})
    new = round(totals["new"] * process_group.world_size())
    return PairSummary(
        out=place.name,
        pairs=place.pairs_present(spec),
        new_pairs=new,
        shards=len(place.shards_present(spec)),
        seconds=seconds,
        pairs_per_sec=new / seconds,
        complete=not place.pending(spec),
        batch_size=batch_size,
        quarantined=[row["index"] for rows in place.quarantined_rows(spec).values() for row in rows],
    )


def open_place(out: Path | str, scratch: Path | str = "") -> StorePlace:
    """Return the place of a store at a path or URL. scratch: local folder in which shards for a URL are made.

    Raises UserError for a URL to which no store can be written.
    """
    name = str(out)
    if name.startswith("file:"):
        return FolderPlace(Path(url2pathname("/" + name.removeprefix("file:").lstrip("/"))))
    # A Path has merged the two slashes of a URL.
    url = re.sub("^([a-z][a-z0-9+.-]+):/(?!/)", r"\1://", name)
    if not is_url(url):
        return FolderPlace(Path(out))
    return ObjectPlace(url, scratch)


def open_store(config: PairConfig, place: StorePlace, device: torch.device) -> Job:
    """Open the job of a store: rank 0 resolves the config and creates the store, others read its spec."""
    if process_group.rank() == 0:
        exists = place.open()
        prompts = streamed_prompts(config)
        config = choose_speed(config, device, place.read_spec() if exists else None, prompts)
        job = open_job(config, device, place.folder, prompts=prompts)
        if exists:
            grow_store(place, job.spec, job.prompts, config.patience)
        else:
            _log_unused_prompts(job.spec)
        job = replace(job, spec=place.create(job.spec, job.prompts))
    process_group.barrier()
    if process_group.rank() == 0:
        return job
    place.open()
    spec = place.read_spec()
    return open_job(choose_speed(config, device, spec), device, place.folder, spec)


def _log_unused_prompts(spec: StoreSpec) -> None:
    """Log how many prompts get no pair: of a sorted file, the first ones are not a sample."""
    used = -(-spec.num_pairs // spec.per_prompt)
    if used < spec.num_prompts:
        logger.info(
            "%d pairs take the first %d of %d prompts; shuffle the prompts if they are sorted",
            *(spec.num_pairs, used, spec.num_prompts),
        )


def next_shard(
    claims: WorkClaims, place: StorePlace, spec: StoreSpec, retry_shards: list[int], stop: StopFlag
) -> int | None:
    """Claim an unfinished shard, or one of `retry_shards`. Returns None if live jobs hold all of them.

    It waits while a claim may belong to a dead job, whose shard this job would have to finish.
    """
    while not stop:
        # List again each time: other jobs finish shards meanwhile.
        unfinished = [*retry_shards, *place.pending(spec)]
        shard = claims.take(unfinished)
        if shard is None:
            # Live jobs hold all remaining shards: this job is done.
            if not claims.undecided(unfinished):
                return None
            time.sleep(claims.poll_seconds)
        elif shard in retry_shards or place.prepare(shard):
            return shard
        else:
            claims.release(shard)  # another job finished it between the listing and the claim
    return None


def _check_not_grown(place: StorePlace, spec: StoreSpec) -> None:
    """Raise UserError if another job has grown the store: the claimed shard may have more rows now."""
    if (current := place.read_spec()) != spec:
        raise UserError(
            f"{place.name} has grown to {current.num_pairs} pairs and {current.num_prompts} prompts while "
            "this job ran; its shards are safe; run the command that made it grow to make the rest"
        )


def commit(writer: PairWriter, place: StorePlace, claims: WorkClaims, shard: int) -> None:
    """Put a finished shard in place, then release its claim."""
    writer.commit()
    place.publish(shard)
    claims.release(shard)


def regenerate(
    folder: Path, prompts: Path | None = None, teacher: str | None = None, progress: Progress = quiet
) -> int:
    """Generate the rows that a store lacks, quarantined ones included, with the settings of its spec.

    prompts: the prompt file, for a store without a prompt list. teacher: the teacher's new path, if it has
    moved. Returns the number of new rows. Raises UserError if the teacher or the prompts are not those of the
    store.
    """
    spec = read_spec(folder)
    name = find_teacher(folder, spec, teacher)
    config = config_from_spec(spec, teacher=name, prompts=str(prompts or ""))
    return generate_pairs(config, folder, progress, retry=True).new_pairs


def find_teacher(folder: Path, spec: StoreSpec, teacher: str | None) -> str:
    """Return the name of the teacher that made a store: `teacher`, by default that in the store's spec.

    Raises UserError if the teacher is missing or has other weights than the store's.
    """
    name = teacher or spec.teacher
    try:
        digests = pretrained.teacher_digests(name)
    except UserError as error:
        if teacher is not None:
            raise
        raise UserError(f"{error}; {folder} was made with it: give --teacher if it lies elsewhere") from error
    if not is_teacher_of(spec, digests):
        raise UserError(
            f"teacher {name} has sha256 {digests.weights[:12]}, {folder} was made with "
            f"{spec.teacher_sha256[:12]}; give --teacher the folder it was made with"
        )
    return name


def resimulate(folder: Path, count: int, teacher_name: str | None = None) -> float:
    """Sample `count` evenly spaced rows again and return the largest absolute difference from stored latents,
    which are finite: infinity if a sample is not.

    Raises UserError if the teacher's weights are not those that the store was made with, and for a store
    without its prompt list.
    """
    # Another teacher gives other latents: a difference would say nothing about the store.
    reader = PairReader(folder)
    spec = reader.spec
    name = find_teacher(folder, spec, teacher_name)
    if spec.conditioning == "text" and not prompts_path(folder).exists():
        raise UserError(
            f"{folder} has no prompts.jsonl, from which the rows are generated again; copy the store "
            "with all its files"
        )

    # Sample the rows again from their numbers alone: noise, prompts and settings follow from the spec.
    job = open_job(config_from_spec(spec, teacher=name), process_group.init(), folder, spec)
    positions = evenly_spread(len(reader), count)
    worst = 0.0
    for batch in batched(positions, RESIMULATED_ROWS):
        rows = reader.read(batch)
        _, latents, _ = job.rows(rows.index.tolist())
        difference = (latents.cpu() - rows.latents).abs().nan_to_num(nan=math.inf, posinf=math.inf)
        worst = max(worst, float(difference.max()))
    return worst
