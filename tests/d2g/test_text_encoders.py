"""d2g.diffusion.text_encoders: what a U-Net is told, as one value; SDXL's encoder against diffusers' pipeline."""

from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_flatten, tree_map

import tiny
import tiny_teachers
from d2g.diffusion import pretrained
from d2g.diffusion.text_encoders import Text, added_conditions, as_text


def text(rows: int = 3) -> Text:
    rng = torch.Generator().manual_seed(0)
    return Text(*(torch.randn(rows, *shape, generator=rng) for shape in ((12, 40), (24,), (6,))))


def test_rows_are_taken_from_all_that_is_there() -> None:
    whole = text()
    for rows in (slice(1, 3), torch.tensor([2, 0]), [1]):
        part = whole[rows]
        for name in ("hidden", "pooled", "time_ids"):
            assert torch.equal(getattr(part, name), getattr(whole, name)[rows])
    assert len(whole) == 3 and len(whole[:1]) == 1
    bare = Text(whole.hidden)[1:].to(torch.float64).detach()
    assert bare.pooled is None and bare.time_ids is None and bare.hidden.dtype == torch.float64
    assert as_text(whole) is whole and as_text(whole.hidden).hidden is whole.hidden


def test_torch_finds_the_tensors_in_it() -> None:
    """DDP and FSDP2 cast and move what tree_map reaches."""
    leaves, _ = tree_flatten((text(), {"more": Text(torch.zeros(1, 2, 3))}))
    assert [leaf.shape[0] for leaf in leaves if leaf is not None] == [3, 3, 3, 1]
    halved = tree_map(lambda t: t.half(), text())
    assert isinstance(halved, Text) and halved.pooled is not None and halved.pooled.dtype == torch.float16


def test_other_unets_are_told_nothing_more(teacher: Path) -> None:
    assert added_conditions(pretrained.load_unet(str(teacher)), text(), torch.zeros(3, 4, 4, 4), 8) is None


def test_the_pictures_size_is_its_own_unless_said(tmp_path: Path) -> None:
    tiny_teachers.save_sdxl(tmp_path)
    unet, x, told = pretrained.load_unet(str(tmp_path)), torch.zeros(3, 4, 5, 7), text()
    added = added_conditions(unet, Text(told.hidden, told.pooled), x, 8)
    assert added is not None and added["time_ids"].tolist() == [[40.0, 56.0, 0.0, 0.0, 40.0, 56.0]] * 3
    said = added_conditions(unet, told, x, 8)
    assert said is not None and torch.equal(said["time_ids"], told.time_ids)  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match="pooled"):
        added_conditions(unet, Text(told.hidden), x, 8)


def test_sdxls_encoder_is_diffusers(tmp_path: Path) -> None:
    tiny_teachers.save_sdxl(tmp_path)
    encoder, prompts = pretrained.load_text_encoder(str(tmp_path)), tiny.CAPTIONS[:3]
    found = encoder.encode(prompts)
    assert isinstance(found, Text) and encoder.tokens(prompts).shape == (3, 2, 12)
    pipe = tiny_teachers.judge(tmp_path)
    with torch.no_grad():
        hidden, _, pooled, _ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False)
    torch.testing.assert_close(found.hidden, hidden)
    torch.testing.assert_close(found.pooled, pooled)
    assert not found.hidden.requires_grad
