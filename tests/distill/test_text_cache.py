"""distill.training.text_cache: embeddings do not depend on the cache's content; batches of one size."""

from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import pytest
import torch

from d2g.diffusion import pretrained
from d2g.diffusion.conditioning import Conditioning
from distill.training.text_cache import PROMPTS_AT_ONCE, TextCache

CPU = torch.device("cpu")
PROMPTS = [
    f"a {color} {shape}" for color in ("red", "blue", "green") for shape in ("cube", "ball", "cone", "")
]


@pytest.fixture(scope="module")
def encode(teacher: Path) -> "Recorder":
    return Recorder(str(teacher))


class Recorder:
    """A teacher's conditioner that remembers what it encoded."""

    def __init__(self, teacher: str) -> None:
        self.conditioner, self.batches = pretrained.load_conditioner(teacher), list[list[str]]()

    def __call__(self, prompts: Sequence[str]) -> Conditioning:
        self.batches.append(list(prompts))
        return self.conditioner.encode(prompts)


def test_misses_are_encoded_in_batches_of_one_size(encode: Recorder) -> None:
    cache = TextCache(encode, 100, CPU)
    encode.batches.clear()
    cache([*PROMPTS, *PROMPTS[:3]])
    assert [len(batch) for batch in encode.batches] == [PROMPTS_AT_ONCE] * 2
    assert [*dict.fromkeys(chain(*encode.batches))] == PROMPTS
    cache(PROMPTS)
    assert len(encode.batches) == 2, "everything is in the cache"


def test_an_embedding_does_not_depend_on_what_else_was_encoded(encode: Recorder) -> None:
    """Bit for bit: with an empty cache, a full one, and one that forgets; as the networks get them."""
    together = TextCache(encode, 100, CPU)(PROMPTS).tensors["hidden"]
    small = TextCache(encode, 3, CPU)
    for number, prompt in enumerate(PROMPTS):
        assert torch.equal(small([prompt]).tensors["hidden"][0], together[number])
        assert len(small.cache) <= 3
    backwards = small(PROMPTS[::-1]).tensors["hidden"]
    assert torch.equal(backwards.flip(0), together)
    plain = TextCache(encode, 0, CPU)(PROMPTS).tensors["hidden"]
    torch.testing.assert_close(together, plain)


def test_the_least_recently_used_prompt_is_forgotten(encode: Recorder) -> None:
    cache = TextCache(encode, 2, CPU)
    cache(["a", "b"])
    cache(["a"])
    cache(["c"])
    assert list(cache.cache) == ["a", "c"]
