"""The folder of a run: config.json before the first step, then one JSON line per report in stats.jsonl."""

import json
import os
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal
from uuid import uuid4

from torch import Tensor

from d2g.core.atomic_files import cannot_write, write_atomically
from d2g.core.claims import FolderOwner
from d2g.core.config import RESTORE_CONFIG_HINT, completed, differing, with_values_of, without
from d2g.core.distributed import process_group
from d2g.core.distributed.checkpoint import complete_points
from d2g.core.errors import UserError
from d2g.core.json_files import check_type, parse_json, read_json_object
from d2g.core.png import save_png
from d2g.core.tracking.loggers import RunLogger, open_loggers

ENDED = "ended.json"
Ending = Literal["done", "minutes", "stopped", "failed"]

SHARED_SECONDS = 10.0
"""How long a rank looks for a file that rank 0 has written, on a network disk that shows it late."""

_owned: dict[tuple[int, Path], FolderOwner] = {}
"""The folders that this process holds by `sole_owner`, by process (one may fork) and absolute path."""


@contextmanager
def sole_owner(folder: Path, what: str, option: str = "--out") -> Iterator[FolderOwner]:
    """On all ranks: hold a folder for this run alone, by a claim of rank 0 (`FolderOwner`).

    Inside of another such block for the same folder, it is that block's. Raises UserError on all ranks while
    another run holds it.
    """
    place = (os.getpid(), folder.resolve())
    if place in _owned:
        yield _owned[place]
        return
    owner, refusal = FolderOwner(folder, what, option=option), ""
    with ExitStack() as stack:
        if process_group.rank() == 0:
            try:
                stack.enter_context(owner)
            except UserError as error:
                refusal = str(error)
        if refusal := process_group.gather_objects(refusal)[0]:
            raise UserError(refusal)
        _owned[place] = owner
        stack.callback(_owned.pop, place)
        yield owner


def require_shared_folder(folder: Path) -> None:
    """Raise UserError on all ranks unless all see what rank 0 writes to `folder`, which exists there.

    On disks of their own, each machine would get its own part of a checkpoint.
    """
    if not process_group.joined():
        return
    # A new name, which no network disk can remember as absent.
    mark = folder / f".{process_group.gather_objects(uuid4().hex)[0]}"
    if process_group.rank() == 0:
        mark.touch()
    process_group.barrier()
    end = time.monotonic() + SHARED_SECONDS
    while not (shared := mark.exists()) and time.monotonic() < end:
        time.sleep(0.5)
        for place in (folder.parent, folder):  # a network disk looks again when it is listed
            with suppress(OSError):
                os.listdir(place)
    alone = [rank for rank, shares in enumerate(process_group.gather_objects(shared)) if not shares]
    if process_group.rank() == 0:
        mark.unlink(missing_ok=True)
    if alone:
        raise UserError(
            f"process {alone[0]} does not see what process 0 writes to {folder}; expected one folder for all "
            "processes, on a disk that their machines share; give such an --out"
        )


class RunLog:
    """Writes RUN/config.json, RUN/stats.jsonl, RUN/previews and RUN/ended.json, on rank 0 alone."""

    def __init__(
        self,
        folder: Path,
        config: Mapping[str, Any],
        ignore: Sequence[str] = (),
        notes: Sequence[str] = (),
        defaults: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """Open a run folder, or resume it. `ignore`: keys of the config that a resume may change, by dotted
        name, groups too. `notes`: further ones, whose new values replace those in config.json. `defaults`: of
        the settings that the config.json of an older version lacks.

        Raises UserError when the folder holds a run with another config, naming the keys that differ, or
        checkpoints without a config. A run that has written nothing but its config is overwritten.
        """
        self.folder, self.config = folder, config
        self.loggers: list[RunLogger] = []
        self.lines: list[dict[str, float]] | None = None  # of stats.jsonl, once read
        path = folder / "config.json"
        # The folder holds a run: its settings must match, except those that a resume may change.
        if path.is_file():
            old = read_json_object(path, RESTORE_CONFIG_HINT)
            ignored = (*ignore, *notes)
            keys = differing(without(completed(old, defaults), ignored), without(config, ignored))
            # Settings may change as long as the run has written nothing but its config.
            entries = {entry.name for entry in folder.iterdir() if not entry.name.startswith(".")}
            if keys and not entries <= {path.name, ENDED}:
                raise UserError(
                    f"{folder} holds a run with another config: {', '.join(keys)}; "
                    "give the same settings to resume it, or another --out"
                )
            if not keys:
                current = with_values_of(old, config, notes)
                if current != old and process_group.rank() == 0:
                    write_atomically(path, json.dumps(current, indent=1))
                return
        elif complete_points(folder / "checkpoints"):
            # Without the config, the settings of these checkpoints are unknown.
            raise UserError(
                f"{folder} holds checkpoints but no config.json; {RESTORE_CONFIG_HINT}, or delete {folder} "
                "to start again"
            )
        if process_group.rank() == 0:
            write_atomically(path, json.dumps(config, indent=1))

    def begin(self) -> None:
        """Mark the run as started: remove RUN/ended.json of an earlier start, and set config.json's time,
        from which `d2g distill watch` counts until the first report."""
        if process_group.rank() == 0:
            (self.folder / ENDED).unlink(missing_ok=True)
            with suppress(PermissionError):  # the file belongs to another user
                os.utime(self.folder / "config.json")

    def end(self, how: Ending, why: str = "") -> None:
        """Write RUN/ended.json: images at the last report, how the run ended, and the reason if it failed."""
        if process_group.rank() == 0:
            lines = self.read()
            facts = {"nimg": int(lines[-1]["nimg"]) if lines else 0, "how": how, "why": why}
            write_atomically(self.folder / ENDED, json.dumps(facts, indent=1))

    def rewind(self, nimg: int) -> None:
        """Remove the lines written after `nimg` images, the checkpoint that a resumed run starts from."""
        path = self.folder / "stats.jsonl"
        if process_group.rank() == 0 and path.is_file():
            lines = [line for line in read_stats(self.folder) if line["nimg"] <= nimg]
            write_atomically(path, "".join(json.dumps(line) + "\n" for line in lines))
            self.lines = None

    def attach(self, names: Sequence[str], nimg: int) -> None:
        """Open loggers by name (`d2g.core.tracking.loggers`), which get everything written from now on.

        What they have recorded after `nimg` images is removed.
        """
        if process_group.rank() == 0:
            self.loggers = open_loggers(names, self.folder, self.config, nimg)

    def write(self, nimg: int, values: Mapping[str, float]) -> None:
        """Append a line of scalars to stats.jsonl, and pass it to the loggers."""
        if process_group.rank() == 0:
            try:
                with open(self.folder / "stats.jsonl", "a", encoding="utf-8") as file:
                    file.write(json.dumps({"nimg": nimg, **values}) + "\n")
            except OSError as error:
                raise cannot_write(self.folder / "stats.jsonl", error) from error
            # Keep the lines in memory up to date, so that `read` need not parse the file again.
            if self.lines is not None:
                self.lines.append({"nimg": nimg, **values})
            for logger in self.loggers:
                logger.write(nimg, values)

    def picture(self, nimg: int, name: str, image: Tensor, text: Mapping[str, str]) -> None:
        """Save a uint8 image [3, H, W] as RUN/previews/NAME-NIMG.png, with `text` as its metadata."""
        if process_group.rank() == 0:
            save_png(image, self.folder / "previews" / f"{name}-{nimg:09d}.png", text)
            for logger in self.loggers:
                logger.picture(nimg, name, image)

    def close(self) -> None:
        """Close the loggers, which may buffer. stats.jsonl is complete after each write."""
        for logger in self.loggers:
            logger.close()
        self.loggers = []

    def read(self) -> list[dict[str, float]]:
        """All lines of stats.jsonl so far. Rank 0, which writes them, reads the file only once."""
        if process_group.rank() != 0:
            return read_stats(self.folder)
        if self.lines is None:
            self.lines = read_stats(self.folder)
        return list(self.lines)


def same_places(folder: Path, config: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """List those of the settings `names` whose path in FOLDER/config.json is the same file or folder as in
    `config`, perhaps written as a relative path, with a slash at its end, or through a link."""
    path = folder / "config.json"
    old = read_json_object(path, RESTORE_CONFIG_HINT) if path.is_file() else {}
    return [
        name for name in names if os.path.realpath(str(old.get(name))) == os.path.realpath(str(config[name]))
    ]


def read_stats(folder: Path) -> list[dict[str, float]]:
    """The lines of a run's stats.jsonl; empty when nothing has been reported yet.

    An incomplete last line is ignored: the run is writing it, or was killed while writing. Raises UserError
    for any other line that is not a JSON object with `nimg`.
    """
    path = folder / "stats.jsonl"
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    # Ignore a last line that is not complete.
    if lines and not lines[-1].endswith(b"}\n"):
        lines.pop()
    reports: list[dict[str, float]] = []
    # Any other damaged line is an error, because dropping it would hide lost reports.
    for number, line in enumerate(lines, 1):
        try:
            values: dict[str, float] = parse_json(line)
            check_type(values, dict[str, float])
            values["nimg"] = int(values["nimg"])
        except (ValueError, OverflowError, KeyError) as error:
            raise UserError(f"{path}: line {number} is damaged ({error!r}); delete that line") from error
        reports.append(values)
    return reports


class Pace:
    """Measures the speed and cost of a run, for its reports.

    - before: the lines of stats.jsonl so far, which hold the device hours before a restart.
    - nimg: images seen at the start.
    - devices: number of ranks.
    - seconds_at_peak: seconds per image of all devices together at their peak FLOP/s by the data sheet; None
      if the peak is unknown.
    """

    def __init__(
        self,
        before: Sequence[Mapping[str, float]],
        nimg: int,
        devices: int,
        seconds_at_peak: float | None = None,
    ) -> None:
        self.devices, self.nimg, self.seconds_at_peak = devices, nimg, seconds_at_peak
        self.hours = max((line.get("time/device_hours", 0.0) for line in before), default=0.0)
        self.waited, self.since = 0.0, time.monotonic()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Measure the time inside the block as time spent waiting for data."""
        start = time.monotonic()
        yield
        self.waited += time.monotonic() - start

    def report(self, nimg: int) -> dict[str, float]:
        """Return speed and cost after `nimg` images, by their keys in stats.jsonl.

        Images per second and the share of time waiting for data count from the last report, device hours over
        all starts of the run. Peak memory is that of this process, in GiB. Model FLOPs utilization is left
        out where the peak is unknown.
        """
        seconds = max(time.monotonic() - self.since, 1e-9)
        self.hours += seconds * self.devices / 3600
        values = {
            "time/images_per_sec": (nimg - self.nimg) / seconds,
            "time/loader_wait": self.waited / seconds,
            "time/device_hours": self.hours,
            "mem/peak_gib": peak_memory_gib(),
        }
        if self.seconds_at_peak is not None:
            values["time/mfu"] = values["time/images_per_sec"] * self.seconds_at_peak
        self.nimg, self.waited, self.since = nimg, 0.0, time.monotonic()
        return values


def speed_in_words(values: Mapping[str, float]) -> str:
    """Format the values of `Pace.report`: "12.3 images/s, MFU 41.0 %, peak 33.8 GiB"."""
    mfu = f", MFU {values['time/mfu']:.1%}".replace("%", " %") if "time/mfu" in values else ""
    return f"{values['time/images_per_sec']:.3g} images/s{mfu}, peak {values['mem/peak_gib']:.1f} GiB"


def peak_memory_gib() -> float:
    """Peak memory of this process in GiB: of CUDA's allocator, or the resident set without CUDA."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS, KiB elsewhere
    return peak / (2**30 if sys.platform == "darwin" else 2**20)
