"""The words of the miniature world: what a scene's caption says, and how to read it back.

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
    """What a caption says of one object."""

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
    """All that a caption says. `relation`: how objects[0] stands to objects[1]; None for one object."""

    objects: tuple[ObjectSpec, ...]
    relation: str | None
    background: str

    def __str__(self) -> str:
        return f"{f' {self.relation} '.join(map(str, self.objects))}, {self.background} background"


def _heldout_triples() -> frozenset[Triple]:
    """One triple of each color, the one with the smallest hash: the same for every seed and platform."""

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
    """ "heldout" when any object is a held-out (color, shape, material), else "train"."""
    return "heldout" if any(item.triple in HELDOUT_TRIPLES for item in facts.objects) else "train"


class _Words:
    """A caption being read from left to right; every complaint names the word it stands on."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.words = text.lower().replace(",", " , ").split()
        self.at = 0

    def next_is(self, word: str) -> bool:
        return self.words[self.at : self.at + 1] == [word]

    def take(self, what: str, allowed: tuple[str, ...]) -> str:
        """The next word or words, which must be one of `allowed`."""
        for phrase in allowed:
            parts = phrase.split()
            if self.words[self.at : self.at + len(parts)] == parts:
                self.at += len(parts)
                return phrase
        self.fail(f"{what} ({', '.join(allowed)})" if len(allowed) > 1 else f"'{allowed[0]}'")

    def fail(self, expected: str) -> NoReturn:
        got = repr(self.words[self.at]) if self.at < len(self.words) else "the end"
        raise UserError(
            f"caption {self.text!r}: got {got} as word {self.at + 1}, expected {expected}; "
            'captions read like "a large red metal sphere left of a small blue matte cube, pink background"'
        )


def parse_caption(text: str) -> SceneFacts:
    """Reads a caption of the grammar above; upper case and extra spaces are let through.

    Raises UserError, naming the first word that does not fit and what could stand there.
    """
    words = _Words(text)
    objects = [_parse_object(words)]
    relation = None
    if not words.next_is(","):
        relation = words.take("',' or a relation", RELATIONS)
        objects.append(_parse_object(words))
    words.take("a comma", (",",))
    background = words.take("a background", BACKGROUNDS)
    words.take("the last word", ("background",))
    if words.at < len(words.words):
        words.fail("the end of the caption")
    return SceneFacts(tuple(objects), relation, background)


def _parse_object(words: _Words) -> ObjectSpec:
    words.take("an article", ("a",))
    return ObjectSpec(*(words.take(what, allowed) for what, allowed in OBJECT_SLOTS))
