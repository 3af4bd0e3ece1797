"""Measure the time per image, end to end and part by part, of several models side by side."""

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from d2g.core.errors import SettingError, UserError
from d2g.core.progress import Progress, quiet

Parts = Callable[[int], Mapping[str, Callable[[], object]]]
"""Batch size -> functions that each run one part of making a batch, in order (text, network, decoder)."""

PLATEAU = 1.02
"""A larger batch must raise the throughput by this factor to count as faster."""


def milliseconds_per_image(sample_one: Callable[[], object], *, repeats: int = 20, warmup: int = 3) -> float:
    """Median milliseconds of `sample_one()`, which must make one image end to end (text encoder, U-Net, VAE).

    Synchronizes with the GPU, if one is in use, before and after each call.
    """
    _check(repeats, warmup)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    times = [_time_once({"": sample_one}, device)[0] for _ in range(warmup + repeats)]
    return statistics.median(times[warmup:])


def measure_latency(
    models: Mapping[str, Parts],
    device: str | torch.device,
    *,
    batches: Sequence[int] = (1, 2, 4, 8, 16, 32, 64),
    repeats: int = 20,
    warmup: int = 3,
    progress: Progress = quiet,
) -> dict[str, Any]:
    """Latency at batch 1 and throughput at the best batch of each model ("student", "teacher", …), JSON-able.

    At each batch size the models take turns, so that a busy minute affects all of them. The first `warmup`
    rounds do not count. On CUDA, parts are timed by device events, which do not stall the queue, and the
    total by the clock, from an idle device to an idle device. A model gets no larger batch once it is out of
    memory or two larger batches in a row were no faster; `stopped` says which.

    Per model: `batch_1`, `best` and `by_batch`, each with `batch`, `ms` (median of a batch end to end),
    `ms_p10`, `ms_p90`, `ms_per_image`, `images_per_sec` and `parts_ms`. With a teacher and a student also
    `teacher_over_student`, their ratio. Raises SettingError for batches that do not ascend from 1, UserError
    when a model cannot do batch 1.
    """
    _check(repeats, warmup)
    if not batches or batches[0] != 1 or list(batches) != sorted(set(batches)):
        raise SettingError(f"batches are {list(batches)}; expected ascending sizes from 1")
    device = torch.device(device)
    # Go up in batch size until every model is out of memory or no longer gets faster.
    entries_of: dict[str, list[dict[str, Any]]] = {name: [] for name in models}
    stopped: dict[str, str] = {}
    for done, batch in enumerate(batches, start=1):
        running = {name: parts for name, parts in models.items() if name not in stopped}
        for name, times in _time_in_turns(running, batch, device, repeats, warmup, stopped).items():
            entries_of[name].append(_summary(batch, times))
            rates = [entry["images_per_sec"] for entry in entries_of[name]]
            if len(rates) > 2 and max(rates[-2:]) < PLATEAU * max(rates[:-2]):
                stopped[name] = f"no faster from batch {entries_of[name][-3]['batch']} on"
        progress("latency of batch sizes", done, len(batches))
    for name, entries in entries_of.items():
        if not entries:
            raise UserError(f"{name} has no latency: {stopped[name]}; free the device's memory")
    return _latency_json(entries_of, stopped, device, repeats, warmup)


def _latency_json(
    entries_of: Mapping[str, list[dict[str, Any]]],
    stopped: Mapping[str, str],
    device: torch.device,
    repeats: int,
    warmup: int,
) -> dict[str, Any]:
    # All batch sizes of each model, and its best one.
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "clock": "device events and wall" if device.type == "cuda" else "wall",
        "repeats": repeats,
        "warmup": warmup,
        "models": {
            name: {
                "batch_1": entries[0],
                "best": max(entries, key=lambda entry: entry["images_per_sec"]),
                "by_batch": entries,
                "stopped": stopped.get(name),
            }
            for name, entries in entries_of.items()
        },
    }
    # How much faster the student is.
    if {"teacher", "student"} <= entries_of.keys():
        teacher, student = result["models"]["teacher"], result["models"]["student"]
        result["teacher_over_student"] = {
            "batch_1": teacher["batch_1"]["ms"] / student["batch_1"]["ms"],
            "best": student["best"]["images_per_sec"] / teacher["best"]["images_per_sec"],
        }
    return result


Times = list[tuple[float, dict[str, float]]]
"""Per repeat: milliseconds end to end, and of each part."""


def _time_in_turns(
    models: Mapping[str, Parts],
    batch: int,
    device: torch.device,
    repeats: int,
    warmup: int,
    stopped: dict[str, str],
) -> dict[str, Times]:
    """All repeats of the models that have memory for this batch; adds the others to `stopped`."""
    ready: dict[str, Mapping[str, Callable[[], object]]] = {}
    times: dict[str, Times] = {}
    for repeat in range(-1, warmup + repeats):
        for name, parts in models.items():
            if name in stopped:
                continue
            try:
                # The first round loads the batch; the others are timed.
                if repeat < 0:
                    ready[name], times[name] = parts(batch), []
                else:
                    times[name].append(_time_once(ready[name], device))
            except torch.OutOfMemoryError:
                stopped[name] = f"out of memory at batch {batch}"
                times.pop(name, None)
    return {name: rows[warmup:] for name, rows in times.items()}


def _time_once(
    parts: Mapping[str, Callable[[], object]], device: torch.device
) -> tuple[float, dict[str, float]]:
    """Milliseconds of one batch end to end, and of each part."""
    _wait(device)
    start = time.perf_counter()
    marks = [_mark(device)]
    for call in parts.values():
        call()
        marks.append(_mark(device))
    _wait(device)
    total = (time.perf_counter() - start) * 1000
    spans = [_between(a, b) for a, b in itertools.pairwise(marks)]
    return total, dict(zip(parts, spans, strict=True))


def _mark(device: torch.device) -> Any:
    """A point in time: an event in the queue on CUDA; elsewhere the clock, after all work is done."""
    if device.type == "cuda":
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(device))
        return event
    _wait(device)
    return time.perf_counter()


def _between(a: Any, b: Any) -> float:
    return float(a.elapsed_time(b)) if isinstance(a, torch.cuda.Event) else (b - a) * 1000


def _summary(batch: int, times: Times) -> dict[str, Any]:
    """The JSON entry of one batch size: medians and the 10th and 90th percentiles."""
    totals = sorted(total for total, _ in times)
    median = statistics.median(totals)
    tenth = len(totals) // 10
    return {
        "batch": batch,
        "ms": median,
        "ms_p10": totals[tenth],
        "ms_p90": totals[-1 - tenth],
        "ms_per_image": median / batch,
        "images_per_sec": batch * 1000 / median,
        "parts_ms": {name: statistics.median(row[name] for _, row in times) for name in times[0][1]},
    }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _check(repeats: int, warmup: int) -> None:
    if repeats < 1 or warmup < 0:
        raise SettingError(f"timing takes repeats >= 1 and warmup >= 0, got {repeats} and {warmup}")
