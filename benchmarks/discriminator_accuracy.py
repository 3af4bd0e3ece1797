"""Does the discriminator memorize its pairs, and how well does it tell the student from the teacher?

    python benchmarks/discriminator_accuracy.py RUN [--checkpoint 25600 ...]

Compares its logits, averaged over heads and positions, on rows that it was trained on and on rows that
train.validate_pairs holds out. The student draws with its weights, not with their average. Writes
discriminator_accuracy_DATE_cpu.md.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from benchmarks.common import table, write
from d2g.core.config import override
from d2g.core.distributed import checkpoint
from distill.export.card_history import read_history
from distill.training.data import training_pairs
from distill.training.open_rows import open_rows
from distill.training.state import State, new_state
from distill.training.text_cache import TextCache
from pairgen.store.dataset import PairRows

BATCH = 32


@torch.no_grad()
def mean_logits(state: State, encode: TextCache, reader: PairRows, rows: list[int]) -> tuple[Tensor, Tensor]:
    """D's mean logit [n] of the teacher's latents and of the student's, for the same noise and captions."""
    assert state.discriminator is not None
    discriminator, student = state.discriminator.module.eval(), state.student.module.eval()
    real, fake = list[Tensor](), list[Tensor]()
    for start in range(0, len(rows), BATCH):
        batch = reader.read(rows[start : start + BATCH])
        noise, cond = batch.noise.float(), encode(batch.prompts)
        for logits, latents in ((real, batch.latents.float()), (fake, student(noise, cond))):
            heads = discriminator(latents, noise, cond, None).values()
            logits.append(torch.stack([head.flatten(1).mean(dim=1) for head in heads]).mean(dim=0))
    return torch.cat(real), torch.cat(fake)


def main() -> None:
    """Measure each checkpoint, and write the table."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("run", type=Path, help="run of `d2g distill gan` with train.validate_pairs")
    parser.add_argument("--checkpoint", type=int, nargs="+", help="images of the checkpoints (default: all)")
    args = parser.parse_args()
    stages = read_history(str(args.run)).stages
    if not stages or not stages[-1].config.adversarial or not stages[-1].config.train.validate_pairs:
        parser.error(f"{args.run} is no run of `d2g distill gan` with checkpoints and train.validate_pairs")
    config = override(stages[-1].config, ["train.precision=fp32"])
    folders = {int(folder.name): folder for folder in checkpoint.list_checkpoints(args.run / "checkpoints")}
    if missing := set(args.checkpoint or ()) - set(folders):
        parser.error(f"{args.run} has no checkpoint {sorted(missing)}; it has {list(folders)}")

    # As many of the rows that it was trained on, evenly spaced, as there are held-out rows.
    encode, _, reader = open_rows(config, torch.device("cpu"))
    held_out = config.train.validate_pairs
    trained_on = training_pairs(len(reader), config.data.max_pairs, held_out)
    spacing = max(1, trained_on // held_out)
    parts = {
        "trained on": list(range(0, trained_on, spacing))[:held_out],
        "held out": list(range(len(reader) - held_out, len(reader))),
    }
    rows = []
    for nimg in args.checkpoint or folders:
        state = new_state(config, torch.device("cpu"), fresh=False)
        state.load(checkpoint.open_checkpoint(folders[nimg]))
        for part, numbers in parts.items():
            real, fake = mean_logits(state, encode, reader, numbers)
            above = (real[:, None] > fake).float().mean().item()
            same_noise = (real > fake).float().mean().item()
            values = (real.mean().item(), fake.mean().item(), above, same_noise)
            rows.append([f"{nimg:,}", part, *(f"{value:.3f}" for value in values)])
            print(*rows[-1], file=sys.stderr, flush=True)
    lines = [
        f"{len(parts['trained on'])} rows that the discriminator was trained on, and {held_out} held out.",
        "Logits are means over heads and positions. AUC: how often a real row has a larger logit than a fake "
        "row. The same noise: the same for the teacher's and the student's latents of one noise and caption.",
        "",
        *table(["images", "rows", "logit, real", "logit, fake", "AUC", "the same noise"], rows),
    ]
    write("discriminator_accuracy", "The discriminator on trained and held-out pairs", lines)


if __name__ == "__main__":
    main()
