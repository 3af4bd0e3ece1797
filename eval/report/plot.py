"""A curve as a picture for papers: FID over CLIP score, each point with its setting."""

from pathlib import Path

from d2g.core.errors import UserError
from eval.report.svg import Curve


def plot_curve(curve: Curve, file: Path) -> None:
    """Write `curve` as .png, .pdf or .svg. Raises UserError when the file cannot be written."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5, 3.4), layout="constrained")
    axis = figure.subplots()
    for name, points in curve.lines.items():
        axis.plot(*zip(*points, strict=True), marker="o", markersize=4, linewidth=1.2, label=name)
        for (x, y), label in zip(points, curve.labels.get(name, [""] * len(points)), strict=True):
            axis.annotate(label, (x, y), xytext=(4, 4), textcoords="offset points", fontsize=7)
    axis.set_xlabel(curve.x)
    axis.set_ylabel(curve.y)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=200)
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror or error}; choose another --out") from error
