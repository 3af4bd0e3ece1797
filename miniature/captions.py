"""The captions of the miniature world: their grammar, and a parser that reads them back.

Grammar, with one or two objects:
    OBJECT = "a" SIZE COLOR MATERIAL SHAPE
    caption = OBJECT [RELATION OBJECT] ", " BACKGROUND " background"
for example "a large red metal sphere left of a small blue matte cube, pink background".
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from itertools import product
from typing import NoReturn

from d2g.core.errors import UserError

SIZES = ("large", "small")
COLORS = ("red", "green", "blue", "yellow", "purple", "cyan")
MATERIALS = ("matte", "metal")
SHAPES = ("sphere", "cube", "cylinder", "cone", "torus")
BACKGROUNDS = ("pink", "gray", "white", "teal", "brown")
RELATIONS = ("left of", "right of", "in front of", "behind")
SCENE_SPLITS = ("train", "heldout")

OBJECT_SLOTS = (("a size", SIZES), ("a color", COLORS), ("a material", MATERIALS), ("a shape", SHAPES))

Triple = tuple[str, str, str]


@dataclass(frozen=True, slots=True)
class ObjectSpec:
    """The attributes of one object that a caption names."""

    size: str
    color: str
    material: str
    shape: str

    @property
    def triple(self) -> Triple:
        """The attributes whose combination decides the split."""
        return (self.color, self.shape, self.material)

    def __str__(self) -> str:
        return f"a {self.size} {self.color} {self.material} {self.shape}"


@dataclass(frozen=True, slots=True)
class SceneFacts:
    """Everything a caption says. `relation` is that of objects[0] to objects[1], None for one object."""

    objects: tuple[ObjectSpec, ...]
    relation: str | None
    background: str

    def __str__(self) -> str:
        return f"{f' {self.relation} '.join(map(str, self.objects))}, {self.background} background"


def _heldout_triples() -> frozenset[Triple]:
    """Return one triple per color, that with the smallest hash: the same for every seed and platform."""

    def rank(triple: Triple) -> bytes:
        return hashlib.sha256(" ".join(triple).encode()).digest()

    return frozenset(min(product((color,), SHAPES, MATERIALS), key=rank) for color in COLORS)


HELDOUT_TRIPLES = _heldout_triples()
TRIPLES = {
    "all": tuple(product(COLORS, SHAPES, MATERIALS)),
    "heldout": tuple(sorted(HELDOUT_TRIPLES)),
    "train": tuple(t for t in product(COLORS, SHAPES, MATERIALS) if t not in HELDOUT_TRIPLES),
}


def split_of(facts: SceneFacts) -> str:
    """Return "heldout" if any object is a held-out (color, shape, material), else "train"."""
    return "heldout" if any(item.triple in HELDOUT_TRIPLES for item in facts.objects) else "train"


class _CaptionReader:
    """Reads a caption from left to right. Errors name the present word and what is expected there."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.words = text.lower().replace(",", " , ").split()
        self.position = 0

    def next_is(self, word: str) -> bool:
        return self.words[self.position : self.position + 1] == [word]

    def take(self, what: str, allowed: tuple[str, ...]) -> str:
        """Consume the next word or words, which must be one of `allowed`, and return them."""
        for phrase in allowed:
            parts = phrase.split()
            if self.words[self.position : self.position + len(parts)] == parts:
                self.position += len(parts)
                return phrase
        self.fail(f"{what} ({', '.join(allowed)})" if len(allowed) > 1 else f"'{allowed[0]}'")

    def fail(self, expected: str) -> NoReturn:
        got = repr(self.words[self.position]) if self.position < len(self.words) else "the end"
        raise UserError(
            f"caption {self.text!r}: got {got} as word {self.position + 1}, expected {expected}; "
            'captions read like "a large red metal sphere left of a small blue matte cube, pink background"'
        )


def parse_caption(text: str) -> SceneFacts:
    """Parse a caption of this grammar; case and extra spaces do not matter.

    Raises UserError, naming the first unexpected word and the words expected there.
    """
    words = _CaptionReader(text)
    objects = [_parse_object(words)]
    relation = None
    if not words.next_is(","):
        relation = words.take("',' or a relation", RELATIONS)
        objects.append(_parse_object(words))
    words.take("a comma", (",",))
    background = words.take("a background", BACKGROUNDS)
    words.take("the last word", ("background",))
    if words.position < len(words.words):
        words.fail("the end of the caption")
    return SceneFacts(tuple(objects), relation, background)


def _parse_object(words: _CaptionReader) -> ObjectSpec:
    words.take("an article", ("a",))
    return ObjectSpec(*(words.take(what, allowed) for what, allowed in OBJECT_SLOTS))
