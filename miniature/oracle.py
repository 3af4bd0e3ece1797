"""The caption oracle: a small network that predicts a scene's attributes from its pixels.

It scores generated images (caption accuracy), and its pooled features are used for Frechet distance and
recall.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any, TypedDict

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from d2g.core.atomic_files import write_atomically
from d2g.core.errors import UserError
from d2g.core.json_files import read_json_object
from miniature.captions import (
    BACKGROUNDS,
    COLORS,
    MATERIALS,
    SHAPES,
    SIZES,
    ObjectSpec,
    SceneFacts,
    parse_caption,
)

ORACLE_FOLDER = Path(__file__).parent / "weights" / "oracle"
NUM_FEATURES = 128

COUNTS = ("1", "2")
OBJECT_SIDES = ("left", "right")
OBJECT_HEADS = {"size": SIZES, "color": COLORS, "material": MATERIALS, "shape": SHAPES}
ORACLE_HEADS: dict[str, tuple[str, ...]] = {
    "count": COUNTS,
    "background": BACKGROUNDS,
    "nearer": OBJECT_SIDES,
    **{f"{side}_{name}": values for side in OBJECT_SIDES for name, values in OBJECT_HEADS.items()},
}


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.norm1(self.conv1(x)))
        return F.relu(x + self.norm2(self.conv2(inner)))


def _down(inputs: int, outputs: int) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


class Oracle(nn.Module):
    """Convolutions to 8x8 cells, then two attention slots, for the left and for the right object."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.width = width
        self.trunk = nn.Sequential(
            _down(3, width // 4),
            _down(width // 4, width // 2),
            _Residual(width // 2),
            _down(width // 2, width),
            _Residual(width),
        )
        self.position = nn.Parameter(0.1 * torch.randn(1, 64, width))
        self.mixer = nn.TransformerEncoderLayer(
            width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.norm = nn.LayerNorm(width)
        self.slots = nn.Linear(width, 2, bias=False)
        self.pool = nn.Linear(3 * width, NUM_FEATURES)
        self.head = nn.Linear(NUM_FEATURES, sum(map(len, ORACLE_HEADS.values())))

    def features(self, pixels: Tensor) -> Tensor:
        """Return pooled features [B, 128] of pixels [B, 3, 64, 64] in [-1, 1]."""
        cells = self.trunk(pixels).flatten(2).transpose(1, 2)  # [B, 64, width]
        tokens = self.norm(self.mixer(cells + self.position))
        attention = self.slots(tokens).softmax(1)  # [B, 64, 2]
        slots = (attention.transpose(1, 2) @ cells).flatten(1)
        return F.gelu(self.pool(torch.cat([slots, cells.mean(1)], 1)))

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """Return logits [B, number of values] per head, for pixels [B, 3, 64, 64] in [-1, 1]."""
        logits = torch.split(
            self.head(self.features(pixels)), [len(values) for values in ORACLE_HEADS.values()], 1
        )
        return dict(zip(ORACLE_HEADS, logits, strict=True))


@dataclass(frozen=True, slots=True)
class OracleReading:
    """The oracle's prediction: objects from left to right, and which of two (0 left, 1 right) is nearer."""

    objects: tuple[ObjectSpec, ...]
    background: str
    nearer: int


@dataclass(frozen=True, slots=True)
class CaptionAccuracy:
    """`attributes` is the mean share of correct facts per caption, `exact` the share of correct captions."""

    attributes: float
    exact: float


@torch.no_grad()
def read_attributes(oracle: Oracle, pixels: Tensor, batch: int = 128) -> list[OracleReading]:
    """Predict the attributes of images [B, 3, 64, 64] in [-1, 1]. Puts the oracle in eval mode."""
    oracle.eval()
    readings: list[OracleReading] = []
    for part in torch.split(pixels, batch):
        classes = {name: logits.argmax(1).tolist() for name, logits in oracle(part).items()}
        readings += [
            _reading({name: values[row] for name, values in classes.items()}) for row in range(len(part))
        ]
    return readings


def _reading(classes: Mapping[str, int]) -> OracleReading:
    words = {name: ORACLE_HEADS[name][index] for name, index in classes.items()}
    sides = OBJECT_SIDES[: int(words["count"])]
    objects = tuple(ObjectSpec(*(words[f"{side}_{name}"] for name in OBJECT_HEADS)) for side in sides)
    return OracleReading(objects, words["background"], classes["nearer"])


def caption_accuracy(oracle: Oracle, pixels: Tensor, captions: Sequence[str]) -> CaptionAccuracy:
    """Return how well images [B, 3, 64, 64] in [-1, 1] match their captions.

    Raises UserError for a caption that `parse_caption` does not accept.
    """
    attributes, exact = caption_scores(oracle, pixels, captions)
    return CaptionAccuracy(attributes=attributes.mean().item(), exact=exact.mean().item())


def caption_scores(oracle: Oracle, pixels: Tensor, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Return per image the share of correct facts, and 1 if all are correct: [B] float64 each."""
    assert len(pixels) == len(captions) > 0, f"{len(pixels)} images for {len(captions)} captions"
    scores = [
        count_correct(parse_caption(text), reading)
        for text, reading in zip(captions, read_attributes(oracle, pixels), strict=True)
    ]
    shares = torch.tensor([correct / total for correct, total in scores], dtype=torch.float64)
    return shares, (shares == 1).double()


def count_correct(facts: SceneFacts, reading: OracleReading) -> tuple[int, int]:
    """Return (correct facts, facts in the caption): count, background, four per object, and the relation.

    Captioned objects are matched with predicted ones so that as many attributes as possible agree; then the
    relation is checked. A red cube left of a blue cone with swapped positions has one wrong fact. For an
    object without a match, all four attributes and the relation are wrong.
    """
    predicted: tuple[ObjectSpec | None, ...] = reading.objects + (None,) * (
        len(facts.objects) - len(reading.objects)
    )
    # Find the matching with the most equal attributes.
    most_agreement = 0
    for match in permutations(range(len(predicted)), len(facts.objects)):
        agree = sum(
            _num_equal(captioned, predicted[place])
            for captioned, place in zip(facts.objects, match, strict=True)
        )
        holds = facts.relation is not None and _holds(facts.relation, match, reading)
        most_agreement = max(most_agreement, 2 * agree + holds)  # the relation only breaks ties
    correct = most_agreement // 2 + most_agreement % 2
    correct += len(facts.objects) == len(reading.objects)
    correct += facts.background == reading.background
    return correct, 2 + 4 * len(facts.objects) + (facts.relation is not None)


def _num_equal(a: ObjectSpec, b: ObjectSpec | None) -> int:
    return 0 if b is None else sum(getattr(a, name) == getattr(b, name) for name in OBJECT_HEADS)


def _holds(relation: str, match: tuple[int, ...], reading: OracleReading) -> bool:
    first, second = match
    if len(reading.objects) < 2:
        return False
    if relation in ("left of", "right of"):
        return first < second if relation == "left of" else first > second
    return reading.nearer == (first if relation == "in front of" else second)


def save_oracle(oracle: Oracle, folder: Path, meta: Mapping[str, Any]) -> None:
    """Write model.safetensors (fp16), config.json and meta.json (training settings and scores)."""
    state = {name: _to_storage(value).contiguous() for name, value in oracle.state_dict().items()}
    # Weights are stored in half precision.
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(state, folder / "model.safetensors")
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot write oracle {folder} ({error}); free space or name another folder"
        ) from error
    write_atomically(folder / "config.json", json.dumps({"width": oracle.width}, indent=1) + "\n")
    write_atomically(folder / "meta.json", json.dumps(dict(meta), indent=1) + "\n")


class OracleFile(TypedDict):
    """The content of config.json."""

    width: int


def load_oracle(folder: Path = ORACLE_FOLDER) -> Oracle:
    """Load a frozen oracle in eval mode and fp32. Raises UserError if a file is missing or damaged."""
    # A missing file gets a message of its own: the usual mistake is a wrong folder.
    for component in ("config.json", "model.safetensors"):
        if not (folder / component).is_file():
            raise UserError(
                f"{folder} is no oracle: {component} is missing, expected config.json and model.safetensors; "
                "name a folder that save_oracle wrote"
            )

    # Weights are stored in a smaller type; the network computes in fp32.
    try:
        config = read_json_object(folder / "config.json", "copy it again", OracleFile)
        oracle = Oracle(config["width"])
        state = load_file(folder / "model.safetensors")
        oracle.load_state_dict({name: _from_storage(value) for name, value in state.items()})
    except (ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"oracle {folder} is damaged ({reason}); copy it again or train a new one") from error
    return oracle.eval().requires_grad_(False)


def _to_storage(value: Tensor) -> Tensor:
    return value.half() if value.is_floating_point() else value


def _from_storage(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value
