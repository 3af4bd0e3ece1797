"""Curves of the overfitting experiment as a picture (supplement, Fig. A1)."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from d2g.core.errors import UserError

OVERFIT_PANELS = {"latent_lpips": "LatentLPIPS without transforms", "pixel_mse": "pixel MSE, decoded"}


def plot_overfit(curves: Mapping[str, Sequence[Mapping[str, float]]], files: Sequence[Path]) -> None:
    """A panel for each of PANELS: per family its lines (step, latent_lpips, pixel_mse), logarithmic. Written
    as each of `files`, .svg, .png or .pdf. Raises UserError where one cannot be written."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    for axis, (key, title) in zip(
        figure.subplots(1, len(OVERFIT_PANELS)), OVERFIT_PANELS.items(), strict=True
    ):
        for family, lines in curves.items():
            axis.plot([line["step"] for line in lines], [line[key] for line in lines], label=family)
        axis.set_yscale("log")
        axis.set_xlabel("steps")
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    try:
        with rc_context({"svg.hashsalt": "overfit"}):  # the same curves, the same file
            for file in files:
                figure.savefig(file, dpi=150, metadata={"Date": None} if file.suffix == ".svg" else None)
    except OSError as error:
        raise UserError(f"cannot write {files[0]}: {error.strerror or error}; free space") from error
