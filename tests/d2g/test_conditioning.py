"""d2g.diffusion.conditioning: indexing, concatenation and dtypes; SDXL's conditioner against diffusers."""

from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_flatten, tree_map

import tiny
import tiny_teachers
from d2g.diffusion import pretrained
from d2g.diffusion.conditioning import Conditioning
from d2g.diffusion.families.sdxl import SDXLConditioner
from d2g.diffusion.families.unet import added_conditions


def text(rows: int = 3) -> Conditioning:
    rng = torch.Generator().manual_seed(0)
    return Conditioning.from_text(
        *(torch.randn(rows, *shape, generator=rng) for shape in ((12, 40), (24,), (6,)))
    )


def test_indexing_takes_rows_of_every_tensor() -> None:
    cond = text()
    assert list(cond.tensors) == ["hidden", "pooled", "time_ids"]
    for rows in (slice(1, 3), torch.tensor([2, 0]), [1], [0, 0, 2]):
        part = cond[rows]
        for name, tensor in cond.tensors.items():
            assert torch.equal(part.tensors[name], tensor[rows])
    assert len(cond) == 3 and len(cond[:1]) == 1 and len(cond[[]]) == 0
    bare = Conditioning.from_text(cond.tensors["hidden"])[1:].to(torch.float64).detach()
    assert list(bare.tensors) == ["hidden"] and bare.tensors["hidden"].dtype == torch.float64
    with pytest.raises(IndexError, match="positions 0 to 3 of 3 rows"):
        cond[[0, 3]]


def test_concatenation_and_the_unconditional_row() -> None:
    cond = Conditioning({"class_labels": torch.tensor([1, 2])}, {"class_labels": torch.tensor([9])})
    joined = Conditioning.cat([cond[1:], cond])
    assert joined.tensors["class_labels"].tolist() == [2, 1, 2]
    assert joined.with_null().tensors["class_labels"].tolist() == [9, 9, 9, 2, 1, 2]
    assert not joined.with_null().null


def test_a_dtype_converts_floating_point_tensors_only() -> None:
    cond = Conditioning({"hidden": torch.zeros(2, 3, 4), "mask": torch.ones(2, 3, dtype=torch.int64)})
    half = cond.to(torch.bfloat16)
    assert half.tensors["hidden"].dtype == torch.bfloat16 and half.tensors["mask"].dtype == torch.int64
    assert cond.to("meta").tensors["mask"].device.type == "meta"


def test_conditioning_is_a_pytree() -> None:
    """DDP and FSDP2 cast and move tensors with tree_map."""
    leaves, _ = tree_flatten((text(), {"more": Conditioning.from_text(torch.zeros(1, 2, 3))}))
    assert [leaf.shape[0] for leaf in leaves] == [3, 3, 3, 1]
    half = tree_map(lambda t: t.half(), text())
    assert isinstance(half, Conditioning) and half.tensors["pooled"].dtype == torch.float16


def test_other_unets_take_no_added_conditions(teacher: Path) -> None:
    unet = pretrained.load_unet(str(teacher))
    assert added_conditions(unet.config, text(), torch.zeros(3, 4, 4, 4), 8) is None


def test_time_ids_default_to_the_image_size(tmp_path: Path) -> None:
    tiny_teachers.save_sdxl(tmp_path)
    config, x, cond = pretrained.load_unet(str(tmp_path)).config, torch.zeros(3, 4, 5, 7), text()
    hidden, pooled = cond.tensors["hidden"], cond.tensors["pooled"]
    added = added_conditions(config, Conditioning.from_text(hidden, pooled), x, 8)
    assert added is not None and added["time_ids"].tolist() == [[40.0, 56.0, 0.0, 0.0, 40.0, 56.0]] * 3
    conditions = added_conditions(config, cond, x, 8)
    assert conditions is not None and torch.equal(conditions["time_ids"], cond.tensors["time_ids"])
    with pytest.raises(AssertionError, match="pooled"):
        added_conditions(config, Conditioning.from_text(hidden), x, 8)


def test_sdxl_conditioner_equals_diffusers(tmp_path: Path) -> None:
    tiny_teachers.save_sdxl(tmp_path)
    conditioner, prompts = pretrained.load_conditioner(str(tmp_path)), tiny.CAPTIONS[:3]
    assert isinstance(conditioner, SDXLConditioner) and conditioner.tokens(prompts).shape == (3, 2, 12)
    cond = conditioner.encode(prompts)
    pipe = tiny_teachers.diffusers_pipeline(tmp_path)
    with torch.no_grad():
        hidden, _, pooled, _ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False)
    torch.testing.assert_close(cond.tensors["hidden"], hidden)
    torch.testing.assert_close(cond.tensors["pooled"], pooled)
    assert not cond.tensors["hidden"].requires_grad and not cond.null
