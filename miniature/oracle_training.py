"""Trains the caption oracle on freshly rendered scenes of both splits."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from d2g.core.errors import SettingError
from d2g.core.progress import Progress, quiet
from d2g.core.seeds import generator
from d2g.core.shuffle import permuted_batch
from miniature.oracle import OBJECT_HEADS, OBJECT_SIDES, ORACLE_HEADS, Oracle, caption_accuracy
from miniature.render import render_scenes
from miniature.sampling import sample_scene
from miniature.scene import Scene, project


@dataclass(frozen=True, kw_only=True, slots=True)
class OracleConfig:
    """Number of scenes per split to train and to test on; `nimg` is the number of training images."""

    train: int = 40_000
    heldout: int = 6_000
    test: int = 2_000
    nimg: int = 300_000
    batch: int = 128
    width: int = 64
    lr: float = 4e-3
    weight_decay: float = 0.02
    seed: int = 1
    test_seed: int = 2

    def __post_init__(self) -> None:
        for name in ("train", "test", "nimg", "batch"):
            if getattr(self, name) < 1:
                raise SettingError(f"{name} is {getattr(self, name)}; expected 1 or more")
        if self.width < 16 or self.width % 16:
            raise SettingError(f"width is {self.width}; expected a multiple of 16")
        if self.seed == self.test_seed:
            raise SettingError(f"seed and test_seed are both {self.seed}; expected two different ones")


def train_oracle(config: OracleConfig, progress: Progress = quiet) -> tuple[Oracle, dict[str, float]]:
    """Render scenes of both splits, train an oracle, and score it on new scenes."""
    parts = [
        render_oracle_data(num, config.seed, split, progress)
        for num, split in ((config.train, "train"), (config.heldout, "heldout"))
    ]
    images = torch.cat([images for images, _ in parts])
    targets = torch.cat([targets for _, targets in parts])
    oracle = fit_oracle(images, targets, config, progress)
    return oracle, score_oracle(oracle, config.test, config.test_seed, progress)


def render_oracle_data(num: int, seed: int, split: str, progress: Progress = quiet) -> tuple[Tensor, Tensor]:
    """Return images, uint8 [num, 3, 64, 64], and targets [num, heads], -100 where a head has no target."""
    images, targets = (
        torch.empty(num, 3, 64, 64, dtype=torch.uint8),
        torch.empty(num, len(ORACLE_HEADS), dtype=torch.long),
    )
    for start in range(0, num, 64):
        scenes = [sample_scene(seed, index, split) for index in range(start, min(start + 64, num))]
        images[start : start + len(scenes)] = render_scenes(scenes)
        targets[start : start + len(scenes)] = torch.tensor([scene_targets(scene) for scene in scenes])
        progress(f"render {split} scenes", start + len(scenes), num)
    return images, targets


def scene_targets(scene: Scene) -> list[int]:
    """Return the targets in the order of ORACLE_HEADS. `nearer` has one only if the caption tells it."""
    places = [project(scene.view, spot.x, 0.0, spot.z)[0] for spot in scene.placements]
    order = sorted(range(len(places)), key=places.__getitem__)
    answers = {"count": str(len(order)), "background": scene.background}
    if scene.relation in ("in front of", "behind"):
        answers["nearer"] = OBJECT_SIDES[order.index(0 if scene.relation == "in front of" else 1)]
    for side, place in zip(OBJECT_SIDES, order, strict=False):
        answers |= {f"{side}_{name}": getattr(scene.objects[place], name) for name in OBJECT_HEADS}
    return [values.index(answers[name]) if name in answers else -100 for name, values in ORACLE_HEADS.items()]


def fit_oracle(images: Tensor, targets: Tensor, config: OracleConfig, progress: Progress = quiet) -> Oracle:
    """Train on uint8 images [N, 3, 64, 64] and targets [N, heads], with AdamW and a one-cycle schedule.

    Raises FloatingPointError at the first non-finite loss.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        oracle = Oracle(config.width).to(memory_format=torch.channels_last)
    oracle.train()
    steps = -(-config.nimg // config.batch)
    optimizer = torch.optim.AdamW(oracle.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, total_steps=steps, pct_start=0.15)
    for step in range(steps):
        # Augmented images and their targets.
        rows = torch.tensor(permuted_batch(config.seed, len(images), step * config.batch, config.batch))
        pixels = augment_pixels(images[rows].float() / 127.5 - 1, generator(config.seed, step))
        logits = oracle(pixels.contiguous(memory_format=torch.channels_last))
        answers = targets[rows].unbind(1)
        # Sum of the heads' cross-entropies; targets of -100 are ignored.
        loss = torch.stack(
            [
                F.cross_entropy(part, answer, reduction="sum")
                for part, answer in zip(logits.values(), answers, strict=True)
            ]
        ).sum() / len(rows)
        if not loss.isfinite():
            raise FloatingPointError(
                f"oracle: loss is {loss.item()} at step {step}; lower lr, now {config.lr}"
            )
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(oracle.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        progress(
            f"train oracle, loss {loss.item():.3f}", min((step + 1) * config.batch, config.nimg), config.nimg
        )
    return oracle.eval()


def augment_pixels(pixels: Tensor, rng: torch.Generator) -> Tensor:
    """Augment with slight shift, blur, contrast, brightness and noise, for robustness to decoded images."""
    num = len(pixels)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(num, 1, 1, 1, generator=rng)

    # Shift by up to two pixels.
    top, left = torch.randint(0, 5, (2,), generator=rng).tolist()
    pixels = F.pad(pixels, (2, 2, 2, 2), mode="replicate")[:, :, top : top + 64, left : left + 64]
    # Blur every second image or so, by a random amount.
    padded = F.pad(pixels, (1, 1, 1, 1), mode="replicate")
    rows = (padded[:, :, :-2] + padded[:, :, 2:] + 2 * padded[:, :, 1:-1]) / 4
    blurred = (rows[..., :-2] + rows[..., 2:] + 2 * rows[..., 1:-1]) / 4
    pixels = torch.lerp(pixels, blurred, uniform(-0.5, 1.0).clamp(min=0))
    # Contrast and brightness, then noise.
    pixels = pixels * uniform(0.92, 1.08) + uniform(-0.06, 0.06)
    return (pixels + uniform(0.0, 0.06) * torch.randn(pixels.shape, generator=rng)).clamp(-1, 1)


def score_oracle(oracle: Oracle, num: int, seed: int, progress: Progress = quiet) -> dict[str, float]:
    """Return the caption accuracy on the first `num` scenes of each split of a seed."""
    scores: dict[str, float] = {}
    for split in ("train", "heldout"):
        scenes = [sample_scene(seed, index, split) for index in range(num)]
        pixels = render_scenes(scenes).float() / 127.5 - 1
        accuracy = caption_accuracy(oracle, pixels, [str(scene.facts) for scene in scenes])
        scores |= {f"{split}_{name}": value for name, value in asdict(accuracy).items()}
        progress(f"score oracle on {split} scenes", num, num)
    return scores
