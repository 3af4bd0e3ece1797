"""The demo's report: one self-contained HTML file."""

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from core.checkpoint import write_atomically

TITLES = {
    "naive": "teacher, one step, no training",
    "ode": "after stage 1 (regression)",
    "gan": "after stage 2 (GAN)",
    "teacher": "teacher, 50 DDIM steps",
}
STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:1rem 0}td,th{padding:.3rem .8rem;border-bottom:1px solid #ddd;
text-align:right}td:first-child,th:first-child{text-align:left}.pictures td{padding:2px;border:0}
.pictures img{width:96px;image-rendering:auto;display:block}.pictures th{font-weight:normal;font-size:.7rem;
max-width:96px;text-align:left;border:0;vertical-align:bottom}
.wide{max-width:100%}"""


def write_report(
    path: Path,
    result: Mapping[str, Any],
    pictures: Mapping[str, Tensor],
    prompts: Sequence[str],
    curves: Mapping[str, Sequence[Mapping[str, float]]],
) -> None:
    """Write the report. pictures: per sampler uint8 [columns, 3, H, W]; curves: per stage the lines of
    stats.jsonl.
    """
    speed = result["ms_per_image"]
    parts = [
        "<!doctype html><html lang='en'><meta charset='utf-8'><title>d2g demo</title>",
        f"<style>{STYLE}</style><h1>A diffusion teacher, distilled into one step</h1>",
        f"<p>{result['pairs']} noise-latent pairs, two stages, measured in {result['seconds']:.0f} s. "
        "One image takes "
        f"{speed['student']:.1f} ms, the teacher's {speed['teacher']:.0f} ms "
        f"({speed['teacher'] / speed['student']:.0f}x).</p>",
        _numbers(result),
        "<p>FID here is the Frechet distance of the caption oracle's features against rendered scenes of "
        "the same captions, not an Inception FID. Caption accuracy: share of captioned facts that the oracle "
        "reads back.</p>",
        "<h2>The same noise and prompts through each</h2>",
        _pictures(pictures, prompts),
        "<h2>Training</h2>",
        *(
            f"<h3>{TITLES[stage]}</h3><img class='wide' src='{_curves(lines)}'>"
            for stage, lines in curves.items()
        ),
        "<h2>Time</h2><table>",
        *(f"<tr><td>{escape(k)}</td><td>{v:.0f} s</td></tr>" for k, v in result["timings"].items()),
        "</table></html>",
    ]
    write_atomically(path, "\n".join(parts))


def _numbers(result: Mapping[str, Any]) -> str:
    columns = {
        "fid": "FID",
        "recall": "recall",
        "precision": "precision",
        "clip_score": "CLIP score",
        "caption_accuracy": "caption accuracy",
        "caption_exact": "flawless pictures",
    }
    head = "".join(f"<th>{title}</th>" for title in columns.values())
    rows = "".join(
        f"<tr><td>{TITLES[name]}</td>"
        + "".join(f"<td>{result[key][name]:.3g}</td>" for key in columns)
        + "</tr>"
        for name in TITLES
    )
    return f"<table><tr><th></th>{head}</tr>{rows}</table>"


def _pictures(pictures: Mapping[str, Tensor], prompts: Sequence[str]) -> str:
    head = "".join(f"<th>{escape(prompt)}</th>" for prompt in prompts)
    rows = "".join(
        f"<tr><th>{TITLES[name]}</th>"
        + "".join(f"<td><img src='{_png(image)}'></td>" for image in images)
        + "</tr>"
        for name, images in pictures.items()
    )
    return f"<table class='pictures'><tr><th></th>{head}</tr>{rows}</table>"


def _png(image: Tensor) -> str:
    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, "PNG")
    return _data_url(buffer)


def _curves(lines: Sequence[Mapping[str, float]]) -> str:
    """Loss parts and mean logits over images, as a PNG data URL."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = sorted({name for line in lines for name in line})
    for name in names:
        axis = (
            left
            if name.startswith("loss/")
            else right
            if name.count("/") == 1 and name.startswith("logit/")
            else None
        )
        points = [(line["nimg"], line[name]) for line in lines if name in line]
        if axis is not None:
            axis.plot(*zip(*points, strict=True), label=name)
    for axis, title in ((left, "losses"), (right, "discriminator's mean logits")):
        axis.set_xlabel("images")
        axis.set_title(title)
        if axis.lines:
            axis.legend(fontsize=7)
    if not right.lines:
        right.remove()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return _data_url(buffer)


def _data_url(buffer: io.BytesIO) -> str:
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
