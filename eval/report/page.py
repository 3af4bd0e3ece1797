"""From evaluations to the report: what the page shows, chosen and drawn."""

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from eval.evaluate import Evaluation
from eval.images.resize import NATIVE
from eval.measure.source import Source
from eval.protocols.metric import all_metrics, all_numbers, number_labels
from eval.report.charts import Curve
from eval.report.gallery import Pictures, Ranking, rank
from eval.report.html import Latency, MetricRow, ReportData
from eval.result import EvalResult

GRID, BESIDE, RANKED = 32, 16, 8


class LazyImages(Sequence[Tensor]):
    """A source's images, drawn when they are asked for."""

    def __init__(self, source: Source, count: int) -> None:
        self.source, self.total = source, count

    def __len__(self) -> int:
        return self.total

    @overload
    def __getitem__(self, item: int) -> Tensor: ...
    @overload
    def __getitem__(self, item: slice) -> list[Tensor]: ...
    def __getitem__(self, item: int | slice) -> Tensor | list[Tensor]:
        if isinstance(item, slice):
            return [self.source.image(number) for number in range(*item.indices(self.total))]
        return self.source.image(item)


def first_images(source: Source, count: int) -> list[Tensor]:
    """The first images of a source as they are, uint8 [3, H, W] each."""
    if source.count is not None:  # files: of several sizes, maybe
        return LazyImages(source, count)[:]
    drawn = source.draw(range(count), 16, (NATIVE,))
    return [image.cpu() for batch in drawn for image in batch.views[NATIVE]]


def metrics_of(results: Mapping[str, EvalResult]) -> list[MetricRow]:
    """Every number of every result, beside the others'."""
    keys = dict.fromkeys(key for result in results.values() for key in result.numbers())
    labels = number_labels(next(iter(results.values())).models)
    numbers = all_numbers()
    return [
        MetricRow(
            name=labels.get(key, key),
            values={name: r.numbers()[key] for name, r in results.items() if key in r.numbers()},
            intervals={name: r.ci[key] for name, r in results.items() if key in r.ci},
            better=numbers[key].better,
        )
        for key in keys
    ]


def beside_name(name: str, other: Source) -> str:
    """What to call the other side of pairs: teacher, or the folder that holds its images."""
    kind = str(other.facts["kind"])
    shown = Path(other.name).name if kind == "images" else kind
    return "beside" if shown == name else shown


def rankings(name: str, source: Source, evaluation: Evaluation, other: Source | None = None) -> list[Ranking]:
    """The images that score worst and best, by what was measured of each."""
    rows, labels = evaluation.rows, number_labels(evaluation.result.models)
    ranking = {m.numbers[0].key: m.numbers[0] for m in all_metrics().values() if m.ranks_images}
    columns = {name: LazyImages(source, len(rows))}
    if other is not None:
        columns[beside_name(name, other)] = LazyImages(other, len(rows))
    return [
        rank(
            labels.get(key, key),
            rows.values[key].tolist(),
            columns,
            rows.prompts if any(rows.prompts) else (),
            better="lower" if number.better == "lower" else "higher",
            count=RANKED,
        )
        for key, number in ranking.items()
        if key in rows.values
    ]


def latencies(latency: Mapping[str, Any]) -> list[Latency]:
    """Batch 1 and the best batch of each model."""
    found = []
    for name, entry in latency.get("models", {}).items():
        for place in ("batch_1", "best"):
            one = entry[place]
            if place == "batch_1" or one["batch"] != 1:
                parts = {part: ms / one["batch"] for part, ms in one["parts_ms"].items()}
                found.append(
                    Latency(name=name, milliseconds=one["ms_per_image"], batch=one["batch"], parts=parts)
                )
    return found


def environment() -> dict[str, str]:
    """What the numbers were made with."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return {
        "diffusion2gan": version("diffusion2gan"),
        "torch": torch.__version__,
        "Python": platform.python_version(),
        "device": device,
    }


def report_data(
    name: str,
    source: Source,
    evaluation: Evaluation,
    *,
    other: Source | None = None,
    nearest: Sequence[Pictures] = (),
    curves: Sequence[Curve] = (),
) -> ReportData:
    """The page of one evaluation. Draws the images it shows: they are functions of their numbers."""
    result, prompts = evaluation.result, evaluation.rows.prompts
    count = min(GRID, len(evaluation.rows))
    shown = first_images(source, count)
    beside = []
    if other is not None:
        pair = min(BESIDE, count)
        columns = {name: shown[:pair], beside_name(name, other): first_images(other, pair)}
        beside = [Pictures(title="Same noise, same prompt", columns=columns, prompts=_told(prompts[:pair]))]
    return ReportData(
        title=f"{name} under {result.protocol}",
        protocol=result.protocol,
        protocol_sha256=result.protocol_sha256,
        settings=result.settings,
        sources={name: source.name} | ({beside_name(name, other): other.name} if other else {}),
        models=result.models,
        counts=result.counts,
        notes=result.notes,
        metrics=metrics_of({name: result}),
        beside=beside,
        grids=[Pictures(title=f"The first {count}", columns={name: shown}, prompts=_told(prompts[:count]))],
        rankings=rankings(name, source, evaluation, other),
        nearest=nearest,
        curves=curves,
        latency=latencies(result.latency),
        environment=environment(),
    )


def _told(prompts: Sequence[str]) -> Sequence[str]:
    return prompts if any(prompts) else ()


def fid_clip_curve(lines: Mapping[str, Sequence[Mapping[str, Any]]], *, label: str) -> Curve:
    """FID over CLIP score, a line per sampler (StyleGAN-T, Fig. 5). Points: {clip_score, fid, value}."""
    return Curve(
        title="FID over CLIP score",
        x="CLIP score",
        y=label,
        lines={name: [(p["clip_score"], p["fid"]) for p in points] for name, points in lines.items()},
        labels={name: [str(p["label"]) for p in points] for name, points in lines.items()},
        text="Down and to the right is better.",
    )
