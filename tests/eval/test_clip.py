"""eval.networks.clip: presets are models of open_clip; features and scores of a tiny CLIP."""

import io
import json
import shutil
from pathlib import Path

import open_clip
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

import tiny
from d2g.core.errors import UserError
from d2g.core.seeds import generator
from eval.metrics.clip_score import clip_scores
from eval.metrics.kernel import cmmd
from eval.networks.clip import CLIP_PRESETS, clip_tokenizer, load_clip, load_clip_features
from jobs import make_clip


@pytest.fixture(scope="module")
def folder(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clip(teacher, tmp_path_factory.mktemp("clip") / "small")


def random_images(count: int) -> Tensor:
    return torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8, generator=generator(count))


def test_presets_are_pretrained_models_of_open_clip() -> None:
    known = set(open_clip.list_pretrained())
    assert {"vit-b-32", "vit-g-14", "vit-l-14-336"} <= set(CLIP_PRESETS)
    for name in CLIP_PRESETS.values():
        model, _, tag = name.partition(":")
        assert (model, tag) in known
    assert open_clip.get_model_config("ViT-L-14-336-quickgelu")["vision_cfg"]["image_size"] == 336
    with pytest.raises(UserError, match="for example vit-b-32, vit-g-14"):
        load_clip("vit-b")


def test_a_damaged_folder_is_one_line(folder: Path, tmp_path: Path) -> None:
    damage = {"open_clip_config.json": b'{"model_cfg": []}', "open_clip_model.safetensors": b"\xff" * 32}
    for name, content in damage.items():
        copy = Path(shutil.copytree(folder, tmp_path / name))
        (copy / name).write_bytes(content)
        with pytest.raises(UserError, match=f"CLIP '{copy}' does not load") as error:
            load_clip(str(copy))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("allowed", [False, True])
def test_code_in_a_folder_does_not_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allowed: bool
) -> None:
    """Neither if the folder's own settings allow it, nor if the user would answer a question."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    copy, marker = Path(shutil.copytree(folder, tmp_path / "clip")), tmp_path / "marker"
    (copy / "own.py").write_text(
        "from transformers import CLIPTokenizer\n"
        f"open({str(marker)!r}, 'w')\n"
        "class Own(CLIPTokenizer): pass\n"
    )
    config = json.loads((copy / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"]["tokenizer_kwargs"] = {"trust_remote_code": allowed} if allowed else {}
    (copy / "open_clip_config.json").write_text(json.dumps(config))
    tokenizer = json.loads((copy / "tokenizer_config.json").read_text())
    tokenizer |= {"auto_map": {"AutoTokenizer": [None, "own.Own"]}, "tokenizer_class": "Own"}
    (copy / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    for load in (lambda: load_clip(str(copy)), lambda: clip_tokenizer(copy, 8)):
        with pytest.raises(UserError, match="contains custom code"):
            load()
    assert not marker.exists()


def test_code_of_a_text_model_does_not_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    copy, text, marker = (
        Path(shutil.copytree(folder, tmp_path / "clip")),
        tmp_path / "text",
        tmp_path / "marker",
    )
    text.mkdir()
    (text / "own.py").write_text(
        "from transformers import PretrainedConfig\n"
        f"open({str(marker)!r}, 'w')\n"
        "class Own(PretrainedConfig): model_type = 'own'\n"
    )
    auto = {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}
    (text / "config.json").write_text(json.dumps(auto))
    config = json.loads((copy / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"]["hf_model_name"] = str(text)
    (copy / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="contains custom code"):
        load_clip(str(copy))
    assert not marker.exists()


def test_features_are_not_normalized_but_cmmd_and_scores_normalize_them(folder: Path) -> None:
    features, clip = load_clip_features(folder), load_clip(str(folder))
    images = random_images(5)
    raw = features(images)
    assert features.name == "clip:local-dir:small" and raw.shape == (5, 8)
    assert (raw.norm(dim=1) - 1).abs().min() > 0.01
    torch.testing.assert_close(normalize(raw, dim=1).cpu(), clip.encode_images(images))
    assert cmmd(raw[:3], raw[2:]) == pytest.approx(cmmd(2 * raw[:3], raw[2:]))
    scores = clip_scores(clip, images, tiny.CAPTIONS[:5], prefix="a photo of ")
    texts = clip.encode_texts([f"a photo of {caption}" for caption in tiny.CAPTIONS[:5]])
    torch.testing.assert_close(scores, (normalize(raw, dim=1).double() * texts.double()).sum(1))
