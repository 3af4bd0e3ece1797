"""PickScore against the CLIP of transformers, and win rates against closed forms."""

from pathlib import Path

import pytest
import torch
from scipy.stats import binomtest
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

import tiny
from d2g.core.errors import UserError
from d2g.core.seeds import generator
from d2g.diffusion.pretrained import new_tokenizer
from d2g.vision.normalization import OPENAI
from eval.metrics.win_rate import win_rate
from eval.networks.base import normalize_channels
from eval.networks.pickscore import load_pickscore

PROMPTS = ["a red cube", "two green cones", "a cyan cube left of a red cone"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[CLIPModel, Path]:
    folder = tmp_path_factory.mktemp("pickscore")
    tokenizer = new_tokenizer(tiny.CAPTIONS, folder, 320, 16)
    tower = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    text = dict(
        vocab_size=len(tokenizer),
        max_position_embeddings=16,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = CLIPConfig(
            text_config={**tower, **text},
            vision_config={**tower, "image_size": 32, "patch_size": 8},
            projection_dim=8,
            logit_scale_init_value=1.0,
        )
        net = CLIPModel(config).eval()
        for parameter in net.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.3)
    net.save_pretrained(folder)
    return net, folder


def random_images(count: int, size: int = 32) -> Tensor:
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator(count))


@torch.no_grad()
def test_scores_are_the_clip_logits_of_matching_pairs(model: tuple[CLIPModel, Path]) -> None:
    net, folder = model
    pick = load_pickscore(str(folder))
    tokenizer = new_tokenizer(tiny.CAPTIONS, folder / "again", 320, 16)
    images = random_images(3)
    tokens = tokenizer(PROMPTS, padding=True, return_tensors="pt")
    expected = net(pixel_values=normalize_channels(images, OPENAI), **tokens).logits_per_image
    scores = pick.score(images, PROMPTS)
    torch.testing.assert_close(scores.float(), expected.diagonal(), rtol=1e-5, atol=1e-6)
    assert expected.std() > 0.1 and pick.name == folder.name
    one_by_one = torch.cat([pick.score(images[i : i + 1], PROMPTS[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(scores, one_by_one, rtol=1e-5, atol=1e-6)
    long = pick.score(images[:1], ["a red cube " * 40])
    assert long.isfinite().all(), "a prompt that is longer than the context is truncated"
    assert pick.score(random_images(2, 50), PROMPTS[:2]).shape == (2,)


def test_missing_files_are_named(model: tuple[CLIPModel, Path], tmp_path: Path) -> None:
    net, _ = model
    net.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="holds no tokenizer"):
        load_pickscore(str(tmp_path))
    with pytest.raises(UserError, match="no such folder"):
        load_pickscore(str(tmp_path / "gone"))


def test_ties_count_as_half_a_win() -> None:
    first, second = torch.tensor([3.0, 1.0, 2.0, 5.0]), torch.tensor([1.0, 1.0, 4.0, 4.0])
    outcome = win_rate(first, second)
    assert (outcome.wins, outcome.ties, outcome.losses, outcome.rate) == (2, 1, 1, 0.625)
    swapped = win_rate(second, first)
    assert swapped.rate == 1 - outcome.rate
    assert swapped.interval == pytest.approx((1 - outcome.interval[1], 1 - outcome.interval[0]))
    near = win_rate(first, second, margin=1.0)
    assert (near.wins, near.ties, near.losses) == (1, 2, 1)
    with pytest.raises(UserError, match="at least one prompt"):
        win_rate(torch.empty(0), torch.empty(0))


@pytest.mark.parametrize(("wins", "count"), [(0, 20), (13, 20), (500, 1000), (7, 7)])
def test_the_interval_of_a_win_rate_is_the_wilson_interval(wins: int, count: int) -> None:
    first = (torch.arange(count) < wins).double()
    outcome = win_rate(first, torch.full((count,), 0.5))
    expected = binomtest(wins, count).proportion_ci(method="wilson")
    assert outcome.interval == (
        pytest.approx(expected.low, abs=1e-12),
        pytest.approx(expected.high, abs=1e-12),
    )
