"""Describe a loss or gradient that is not finite: the files in RUN/failure and the error."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from d2g.core.atomic_files import write_atomically
from d2g.core.distributed import checkpoint, process_group


def write_failure(
    run: Path,
    *,
    step: int,
    nimg: int,
    gradient: str,
    norm: Tensor,
    pairs: Sequence[int],
    terms: Mapping[str, Tensor],
    logits: Mapping[str, Mapping[str, float]],
) -> Path:
    """Write RUN/failure/rank-N.json: the step, the pairs of this rank's rows, every loss term, and the latest
    logits per head. Returns the folder.

    gradient: the update that was stopped, "grad/d" or "grad/g". Numbers that are not finite are written as
    text ("nan", "inf"). docs/runs.md "When a loss is NaN" says how to read the file.
    """
    folder = run / "failure"
    # JSON has no NaN, so such numbers become text.
    report = {
        "step": step,
        "images": nimg,
        "gradient": gradient,
        "norm": _number(float(norm)),
        "pairs": list(pairs),
        "losses": {name: _number(float(value)) for name, value in terms.items()},
        "logits": {
            kind: {head: _number(value) for head, value in heads.items()} for kind, heads in logits.items()
        },
    }
    write_atomically(folder / f"rank-{process_group.rank()}.json", json.dumps(report, indent=1) + "\n")
    return folder


def not_finite_error(
    name: str, norm: Tensor, terms: Mapping[str, Tensor], nimg: int, run: Path, bad_pairs: str = ""
) -> FloatingPointError:
    """The error for a loss or a gradient norm that is not finite. It names the first loss term of this rank
    that is not finite, else the norm. `bad_pairs`: the message about pairs that cause it, if any.
    """
    values = {**terms, name: norm}
    culprit, value = next((k, v) for k, v in values.items() if not torch.isfinite(v))
    last = checkpoint.latest(run / "checkpoints")
    where = f"last good checkpoint: {last.folder}" if last else "no checkpoint was written before"
    where += f"; losses, logits and rows of the step: {run / 'failure'}"
    if bad_pairs:  # the same command would meet them again at any learning rate
        return FloatingPointError(f"{bad_pairs}; training stopped at image {nimg}; {where}")
    remedy = "lower the learning rate in another --out"
    remedy += f", from there with --set init={run}" if last else ""
    of_discriminator = name == "grad/d" or culprit == "loss/g_gan"  # D's update can ruin the student's loss
    remedy += f"; the setting is {'gan.optim.lr' if of_discriminator else 'optim.lr'}"
    return FloatingPointError(f"{culprit} is {value.item()} at image {nimg}; {where}; {remedy}")


def _number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
