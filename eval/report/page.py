"""Build the data of an evaluation's report: images, rankings and tables."""

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from eval.evaluation import Evaluation
from eval.images.resize import NATIVE
from eval.measure.source import ImageSource
from eval.protocols.metric import all_metrics, all_numbers, number_labels
from eval.report.charts import Curve
from eval.report.gallery import Pictures, Ranking, rank_images
from eval.report.html import Latency, MetricRow, ReportData
from eval.result import FLOOR_NAME, EvalResult

GRID, BESIDE, RANKED = 32, 16, 8


class LazyImages(Sequence[Tensor]):
    """A source's images, drawn on access."""

    def __init__(self, source: ImageSource, count: int) -> None:
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


def first_images(source: ImageSource, count: int) -> list[Tensor]:
    """The first images of a source at native size, uint8 [3, H, W] each."""
    if source.count is not None:  # files, which may differ in size
        return LazyImages(source, count)[:]
    batches = source.draw(range(count), 16, (NATIVE,))
    return [image.cpu() for batch in batches for image in batch.views[NATIVE]]


def metrics_of(results: Mapping[str, EvalResult]) -> list[MetricRow]:
    """One row per metric, with the numbers of all results side by side, then those of real pictures."""
    floor = next((result.floor for result in results.values() if result.floor), {})
    keys = dict.fromkeys(key for result in results.values() for key in result.numbers())
    labels = number_labels(next(iter(results.values())).models)
    numbers = all_numbers()
    return [
        MetricRow(
            name=labels.get(key, key),
            values={name: r.numbers()[key] for name, r in results.items() if key in r.numbers()}
            | ({FLOOR_NAME: floor[key]} if key in floor else {}),
            intervals={name: r.ci[key] for name, r in results.items() if key in r.ci},
            better=numbers[key].better,
        )
        for key in keys
    ]


def beside_name(name: str, other: ImageSource) -> str:
    """The column title of the other side of pairs: its kind, or the name of its image folder."""
    kind = str(other.facts["kind"])
    title = Path(other.name).name if kind == "images" else kind
    return "beside" if title == name else title


def rankings(
    name: str, source: ImageSource, evaluation: Evaluation, other: ImageSource | None = None
) -> list[Ranking]:
    """The worst and best images by each per-image score."""
    rows, labels = evaluation.rows, number_labels(evaluation.result.models)
    ranking = {m.numbers[0].key: m.numbers[0] for m in all_metrics().values() if m.ranks_images}
    columns = {name: LazyImages(source, len(rows))}
    if other is not None:
        columns[beside_name(name, other)] = LazyImages(other, len(rows))
    return [
        rank_images(
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
    """Latency of each model at batch 1 and at its best batch size."""
    rows = []
    for name, entry in latency.get("models", {}).items():
        for batch_kind in ("batch_1", "best"):
            measurement = entry[batch_kind]
            if batch_kind == "batch_1" or measurement["batch"] != 1:
                parts = {part: ms / measurement["batch"] for part, ms in measurement["parts_ms"].items()}
                rows.append(
                    Latency(
                        name=name,
                        milliseconds=measurement["ms_per_image"],
                        batch=measurement["batch"],
                        parts=parts,
                    )
                )
    return rows


def environment() -> dict[str, str]:
    """Versions and device that the numbers were made with."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return {
        "diffusion2gan": version("diffusion2gan"),
        "torch": torch.__version__,
        "Python": platform.python_version(),
        "device": device,
    }


def report_data(
    name: str,
    source: ImageSource,
    evaluation: Evaluation,
    *,
    other: ImageSource | None = None,
    nearest: Sequence[Pictures] = (),
    curves: Sequence[Curve] = (),
) -> ReportData:
    """The report of one evaluation. Draws the images that it shows."""
    # The first images of the evaluation.
    result, prompts = evaluation.result, evaluation.rows.prompts
    count = min(GRID, len(evaluation.rows))
    images = first_images(source, count)
    # The student and the other side from the same noise.
    beside = []
    if other is not None:
        pairs = min(BESIDE, count)
        columns = {name: images[:pairs], beside_name(name, other): first_images(other, pairs)}
        beside = [
            Pictures(title="Same noise, same prompt", columns=columns, prompts=_if_any(prompts[:pairs]))
        ]
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
        grids=[
            Pictures(title=f"The first {count}", columns={name: images}, prompts=_if_any(prompts[:count]))
        ],
        rankings=rankings(name, source, evaluation, other),
        nearest=nearest,
        curves=curves,
        latency=latencies(result.latency),
        environment=environment(),
    )


def _if_any(prompts: Sequence[str]) -> Sequence[str]:
    """The prompts, or none where all are empty."""
    return prompts if any(prompts) else ()


def fid_clip_curve(lines: Mapping[str, Sequence[Mapping[str, Any]]], *, label: str) -> Curve:
    """FID over CLIP score, one line per sampler (StyleGAN-T, Fig. 5). Points: {clip_score, fid, label}."""
    return Curve(
        title="FID over CLIP score",
        x="CLIP score",
        y=label,
        lines={name: [(p["clip_score"], p["fid"]) for p in points] for name, points in lines.items()},
        labels={name: [str(p["label"]) for p in points] for name, points in lines.items()},
        text="Down and to the right is better.",
    )
