"""Statistics of D's logits and of the student's latents for a report, over all rows of a step's batch.

Values are gathered row by row, so that they do not depend on how the batch is split over processes and
micro-batches.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from d2g.core.distributed import process_group
from distill.training.microbatch import MicroBatch


class LogitStats:
    """Latest discriminator logits on this rank, by input kind.

    The kinds are `real` (D's real rows), `fake` (D's fake rows, some of them mismatched real ones), and
    `student` (the rows of G's loss, after D's update; missing in steps that do not update G).
    """

    def __init__(self) -> None:
        self._means: dict[str, dict[int, Tensor]] = {}  # by kind and micro-batch: means [b, heads]
        self._heads: list[str] = []

    def add(self, number: int, **logits_by_kind: Mapping[str, Tensor]) -> None:
        """Keep the mean logits of the rows of micro-batch `number`. Does not wait for the device.

        Each keyword is a kind of input, with logits [b, 1, h_s, w_s] by head.
        """
        for kind, logits in logits_by_kind.items():
            self._heads = list(logits)
            means = [v.detach().float().flatten(1).mean(1) for v in logits.values()]
            self._means.setdefault(kind, {})[number] = torch.stack(means, 1)

    def copy(self) -> "LogitStats":
        """Return a copy, which later steps do not change."""
        duplicate = LogitStats()
        duplicate._heads = self._heads
        duplicate._means = {kind: dict(means) for kind, means in self._means.items()}
        return duplicate

    def latest(self) -> dict[str, dict[str, float]]:
        """Mean logit over this rank's rows, by kind and head."""
        return {
            kind: dict(zip(self._heads, torch.cat([*means.values()]).mean(0).tolist(), strict=True))
            for kind, means in self._means.items()
        }

    @torch.no_grad()
    def report(self, microbatches: Sequence[MicroBatch]) -> dict[str, float]:
        """Compute `logit/...`, `d/auc` and `latent/...` of a step. Call it on every rank.

        Every rank gets the same values. Values without rows are left out.
        """
        generated, targets = [m.generated.detach() for m in microbatches], [m.target for m in microbatches]
        report = contrast_and_color(generated, targets)
        if len(microbatches) * len(microbatches[0].prompts) * process_group.world_size() > 1:
            report["latent/spread"] = spread(generated, targets)
        if self._means:
            mode = torch.cat([m.mix_mode for m in microbatches])
            means = [torch.cat([*by_microbatch.values()]) for by_microbatch in self._means.values()]
            # Exchange all kinds at once: a column for the mode, then a column per kind and head.
            table = torch.cat(process_group.gather(torch.cat([mode[:, None], *means], 1).cpu()))
            by_kind = zip(self._means, table[:, 1:].chunk(len(means), 1), strict=True)
            report |= logit_report(dict(by_kind), self._heads, table[:, 0] == 0)
        return report


def logit_report(logits: Mapping[str, Tensor], heads: Sequence[str], generated: Tensor) -> dict[str, float]:
    """Compute report values from mean logits [B, heads] of the kinds `real`, `fake` and `student`.

    generated [B], bool: which rows of `fake` are the student's; the others are mismatched real rows.
    `logit/KIND/HEAD` are means over rows, `logit/KIND` means over rows and heads. `d/auc` in [0, 1] is the
    share of (real, generated) row pairs that D orders correctly: 0.5 by chance, for any GAN loss.
    """
    kinds = {**logits, "fake": logits["fake"][generated], "mismatched": logits["fake"][~generated]}
    report = {}
    for kind, rows in kinds.items():
        if len(rows):
            means = rows.double().mean(0)
            report[f"logit/{kind}"] = float(means.mean())
            report |= {f"logit/{kind}/{head}": v for head, v in zip(heads, means.tolist(), strict=True)}
    if len(kinds["fake"]):
        report["d/auc"] = float(auc(kinds["real"].mean(1), kinds["fake"].mean(1)))
    return report


def auc(real: Tensor, fake: Tensor) -> Tensor:
    """Share of pairs (i, j) with real[i] > fake[j], for [N] and [M]; ties count half. NaN if one is empty."""
    difference = real[:, None] - fake[None]
    return ((difference > 0).double() + 0.5 * (difference == 0).double()).mean()


def spread(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> float:
    """Variance of the student's latents over the batch, divided by the variance of the teacher's.

    student, teacher: this process's micro-batches [b, C, h, w], with the same b on all processes. Variances
    over rows are averaged over positions. The result is about 1 for a healthy student, 0 if all rows are
    equal, and undefined for a single row. Call it on every rank.
    """
    return float(_variance(student) / _variance(teacher).clamp(min=1e-12))


def contrast_and_color(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> dict[str, float]:
    """Compute two indicators of oversaturated images, from micro-batches [b, C, h, w] as in `spread`.

    `latent/contrast`: the student's standard deviation over rows and positions divided by the teacher's,
    averaged over channels; 1 for a perfect student. `latent/color`: the largest distance between the means of
    a channel, in standard deviations of the teacher; 0 for a perfect student. Call it on every rank.
    """
    mean, std = _channel_moments(student)
    mean_teacher, std_teacher = _channel_moments(teacher)
    return {
        "latent/contrast": float((std / std_teacher).mean()),
        "latent/color": float(((mean - mean_teacher).abs() / std_teacher).max()),
    }


def _channel_moments(microbatches: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [C] of each channel over the rows of all processes and all positions."""
    doubles = (x.double() for x in microbatches)
    axes = (0, 2, 3)
    moments = sum(
        (torch.stack([x.mean(axes), x.square().mean(axes)]) for x in doubles), start=torch.zeros(())
    )
    mean, square = process_group.all_mean(moments / len(microbatches))
    return mean, (square - mean.square()).clamp(min=1e-12).sqrt()


def _variance(microbatches: Sequence[Tensor]) -> Tensor:
    """Variance over the rows of all processes, from means and mean squares in fp64."""
    doubles = (x.double() for x in microbatches)
    moments = sum((torch.stack([x.mean(0), x.square().mean(0)]) for x in doubles), start=torch.zeros(()))
    mean, square = process_group.all_mean(moments / len(microbatches))
    variance: Tensor = (square - mean.square()).mean()
    return variance.clamp(min=0)  # rounding
