"""How the two networks do: what a report says of a step, over all rows of its batch.

Means over processes of what the last micro-batch of each says would depend on how a batch is shared out.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from d2g.core.distributed import process_group
from distill.training.microbatch import MicroBatch


class LogitStats:
    """What D said of this process's rows, of each kind the last time.

    `real`: of the pairs; `fake`: of the mixed batch; `student`: of the student after D's step, which not
    every step has.
    """

    def __init__(self) -> None:
        self._said: dict[str, dict[int, Tensor]] = {}  # by kind and micro-batch: means [b, heads]
        self._heads: list[str] = []

    def add(self, number: int, **said: Mapping[str, Tensor]) -> None:
        """Logits [b, 1, h_s, w_s] of every head by kind, of micro-batch `number`. Does not wait for the
        device."""
        for kind, logits in said.items():
            self._heads = list(logits)
            means = [v.detach().float().flatten(1).mean(1) for v in logits.values()]
            self._said.setdefault(kind, {})[number] = torch.stack(means, 1)

    @torch.no_grad()
    def report(self, micros: Sequence[MicroBatch]) -> dict[str, float]:
        """`logit/...`, `d/auc` and `latent/spread` of a step by its micro-batches, the same on every rank.
        Call on every rank. What no row has something to say of is left out.
        """
        found: dict[str, float] = {}
        if len(micros) * len(micros[0].prompts) * process_group.world_size() > 1:
            found["latent/spread"] = spread([m.fake.detach() for m in micros], [m.real for m in micros])
        if self._said:
            mode = torch.cat([m.mode for m in micros])
            said = [torch.cat([*rows.values()]) for rows in self._said.values()]
            table = torch.cat(
                process_group.gather(torch.cat([mode[:, None], *said], 1).cpu())
            )  # one exchange
            by_kind = zip(self._said, table[:, 1:].chunk(len(said), 1), strict=True)
            found |= logit_report(dict(by_kind), self._heads, table[:, 0] == 0)
        return found


def logit_report(said: Mapping[str, Tensor], heads: Sequence[str], plain: Tensor) -> dict[str, float]:
    """What D says, by `said`: mean logits [B, heads] of the rows of the kinds `real`, `fake`, `student`.

    `plain` [B] (bool): the rows of `fake` that are the student's; the others are mismatched.
    `logit/KIND/HEAD` are means over rows, `logit/KIND` means over heads. `d/auc` in [0, 1]: the share of
    (real, student's) row pairs that D orders rightly, 0.5 for a blind one, whatever the GAN loss.
    """
    kinds = {**said, "fake": said["fake"][plain], "mismatched": said["fake"][~plain]}
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
    """The share of pairs (i, j) with real[i] > fake[j], ties counting half. NaN where one is empty."""
    apart = real[:, None] - fake[None]
    return ((apart > 0).double() + 0.5 * (apart == 0).double()).mean()


def spread(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> float:
    """Variance over a batch, mean over positions: the student's latents' over the teacher's, each as the
    micro-batches of this process, [b, C, h, w] with one b everywhere. Call on every rank.

    About 1 when all is well, 0 when every row is the same. Says nothing of a single row.
    """
    return float(_variance(student) / _variance(teacher).clamp(min=1e-12))


def _variance(micros: Sequence[Tensor]) -> Tensor:
    """Over the rows of all processes, from means and mean squares in fp64."""
    doubles = (x.double() for x in micros)
    moments = sum((torch.stack([x.mean(0), x.square().mean(0)]) for x in doubles), start=torch.zeros(()))
    mean, square = process_group.all_mean(moments / len(micros))
    variance: Tensor = (square - mean.square()).mean()
    return variance.clamp(min=0)  # rounding
