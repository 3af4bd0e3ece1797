"""teacher_training.clip: training, saving, and loading with the factory of open_clip."""

import json
import os
import signal
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPTokenizer

from d2g.core.errors import Interrupted, SettingError, UserError
from d2g.core.seeds import generator
from eval.metrics.clip_score import clip_scores, retrieval_top1
from eval.networks.registry import FEATURES, load_clip
from teacher_training.clip import contrastive_loss, train_clip
from teacher_training.config import ClipConfig

COLORS = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 220), "white": (240, 240, 240)}
TINY = ClipConfig(
    image_size=16, patch=8, width=32, layers=1, text_width=32, text_layers=1, context=24, embed=16,
    images=2000, batch_size=40, warmup_images=200, lr=3e-3, held_out=40,
)  # fmt: skip


def colored(count: int) -> tuple[Tensor, list[str]]:
    names = [sorted(COLORS)[i % len(COLORS)] for i in range(count)]
    flat = torch.tensor([COLORS[name] for name in names])[:, :, None, None]
    noise = torch.randint(-15, 16, (count, 3, 16, 16), generator=generator(count))
    return (flat + noise).clamp(0, 255).to(torch.uint8), [f"a {name} wall" for name in names]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    letters = [chr(code) for code in range(33, 127)]
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[]).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    folder = tmp_path_factory.mktemp("clip") / "tiny"
    return folder, train_clip(*colored(400), tokenizer, folder, TINY)


def test_training_learns_to_distinguish_colors(trained: tuple[Path, dict[str, float]]) -> None:
    folder, scores = trained
    assert scores["retrieval_chance"] == 0.25
    assert scores["retrieval_top1"] > 0.9
    assert scores["images"] == TINY.images
    assert json.loads((folder / "meta.json").read_text())["scores"] == scores


def test_open_clips_factory_loads_the_folder(trained: tuple[Path, dict[str, float]]) -> None:
    name = f"local-dir:{trained[0]}"
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    tokens = open_clip.get_tokenizer(name)(["a red wall", "a blue wall"])
    assert tokens.shape == (2, TINY.context)
    images, captions = colored(4)
    net = load_clip(str(trained[0]))
    with torch.no_grad():
        expected = F.normalize(model.eval().encode_text(tokens), dim=1)
    torch.testing.assert_close(net.encode_texts(["a red wall", "a blue wall"]), expected)
    files = {path.name for path in trained[0].iterdir()}
    assert files >= {"open_clip_config.json", "open_clip_model.safetensors", "tokenizer.json", "meta.json"}
    assert preprocess.transforms[0].size == 16
    assert clip_scores(net, images, captions).mean() > clip_scores(net, images, captions[::-1]).mean() + 0.1


def test_clip_scores_are_cosine_similarities(trained: tuple[Path, dict[str, float]]) -> None:
    net = load_clip(f"local-dir:{trained[0]}")
    images, captions = colored(5)
    scores = clip_scores(net, images, captions)
    assert scores.shape == (5,) and scores.abs().max() <= 1 + 1e-6
    single = torch.cat([clip_scores(net, images[i : i + 1], captions[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(scores, single, atol=1e-5, rtol=0)
    turned = clip_scores(net, images.flip(0), captions[::-1])
    torch.testing.assert_close(turned.flip(0), scores, atol=1e-5, rtol=0)
    prefixed = clip_scores(net, images, captions, prefix="photo of ")
    written_out = clip_scores(net, images, ["photo of " + caption for caption in captions])
    assert torch.equal(prefixed, written_out) and not torch.equal(prefixed, scores)


def test_name_and_digest_identify_a_model(trained: tuple[Path, dict[str, float]]) -> None:
    by_path, by_schema = load_clip(str(trained[0])), load_clip(f"local-dir:{trained[0]}")
    assert by_path.name == by_schema.name == "local-dir:tiny"
    assert by_path.sha256 == by_schema.sha256
    features = FEATURES["clip"](trained[0], "cpu")
    assert features.sha256 == by_path.sha256 and features(colored(2)[0]).shape == (2, TINY.embed)


def test_training_is_deterministic(tokenizer: Path, tmp_path: Path) -> None:
    short = ClipConfig(**{**{n: getattr(TINY, n) for n in ("width", "layers", "text_width", "text_layers")},
                          "image_size": 16, "images": 80, "batch_size": 20})  # fmt: skip
    for name in ("a", "b"):
        train_clip(*colored(60), tokenizer, tmp_path / name, short)
    assert load_clip(str(tmp_path / "a")).sha256 == load_clip(str(tmp_path / "b")).sha256


def test_a_stopped_clip_goes_on_exactly(tokenizer: Path, tmp_path: Path) -> None:
    short = ClipConfig(**{**{n: getattr(TINY, n) for n in ("width", "layers", "text_width", "text_layers")},
                          "image_size": 16, "images": 80, "batch_size": 20})  # fmt: skip
    expected = train_clip(*colored(60), tokenizer, tmp_path / "once", short)

    def stop(label: str, done: int, total: int) -> None:
        if done == 40:
            os.kill(os.getpid(), signal.SIGINT)

    checkpoints = tmp_path / "checkpoints"
    with pytest.raises(Interrupted, match="train CLIP stopped; safe on disk"):
        train_clip(*colored(60), tokenizer, tmp_path / "twice", short, progress=stop, checkpoints=checkpoints)
    scores = train_clip(*colored(60), tokenizer, tmp_path / "twice", short, checkpoints=checkpoints)
    assert load_clip(str(tmp_path / "once")).sha256 == load_clip(str(tmp_path / "twice")).sha256
    assert {**scores, "seconds": 0} == {**expected, "seconds": 0}


def test_the_time_limit_ends_training(tokenizer: Path, tmp_path: Path) -> None:
    config = ClipConfig(image_size=16, width=32, layers=1, batch_size=4, minutes=1e-4)
    scores = train_clip(*colored(20), tokenizer, tmp_path, config)
    assert 0 < scores["images"] < config.images / 100
    assert scores["params"] < 1e6


def test_the_default_model_has_less_than_a_million_parameters() -> None:
    from eval.networks.registry import new_clip
    from teacher_training.clip import model_config

    model = new_clip(model_config(ClipConfig(), vocabulary=1000, eos=999))
    assert 5e5 < sum(p.numel() for p in model.parameters()) <= 1.0e6


def test_equal_captions_are_positives() -> None:
    text = F.normalize(torch.randn(2, 8, generator=generator(1)), dim=1)
    ids = torch.tensor([0, 0, 1])
    vectors = text[ids]
    scale = torch.tensor(50.0)
    ideal = contrastive_loss(vectors, vectors, scale, ids)
    floor = (2 * torch.tensor(2.0).log() / 3).item()  # equal captions share the probability
    assert ideal.item() == pytest.approx(floor, abs=1e-3)
    assert contrastive_loss(vectors, vectors[[2, 0, 1]], scale, ids) > ideal + 1
    distinct = torch.tensor([0, 1])
    logits = scale * text @ text.T
    plain = F.cross_entropy(logits, distinct)
    assert contrastive_loss(text, text, scale, distinct).item() == pytest.approx(plain.item(), abs=1e-6)


def test_retrieval_counts_distinct_captions_only() -> None:
    eye = torch.eye(4)
    captions = ["a", "b", "a", "c"]
    texts = torch.stack([eye[0], eye[1], eye[0], eye[2]])
    assert retrieval_top1(texts, texts, captions) == 1
    assert retrieval_top1(texts[[1, 0, 2, 3]], texts, captions) == 0.5
    assert retrieval_top1(eye[[3, 3, 3, 3]], texts, captions) == 0, "a tie is no hit"


def test_bad_clip_sources_are_refused(tmp_path: Path, tokenizer: Path) -> None:
    with pytest.raises(UserError, match="neither a folder nor MODEL:TAG_OR_FILE"):
        load_clip("ViT-B-32")
    with pytest.raises(UserError, match="is no open_clip folder"):
        load_clip(f"local-dir:{tmp_path / 'gone'}")
    with pytest.raises(UserError, match="is no open_clip folder"):
        load_clip(str(tokenizer))
    with pytest.raises(UserError, match="does not load"):
        load_clip(f"ViT-B-32:{tmp_path / 'gone.pt'}")
    with pytest.raises(UserError, match="holds no tokenizer"):
        train_clip(*colored(20), tmp_path, tmp_path / "out", TINY)
    with pytest.raises(UserError, match="expected as many captions as images"):
        train_clip(colored(20)[0], ["a"], tokenizer, tmp_path / "out", TINY)
    with pytest.raises(SettingError, match="patch is 7; expected a divisor of image_size, 64"):
        ClipConfig(patch=7)
