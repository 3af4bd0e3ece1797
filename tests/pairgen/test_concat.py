"""pairgen.store.concat: several stores read as one; each row has the guidance scale of its store."""

import json
import shutil
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from d2g.core.distributed import checkpoint
from d2g.core.errors import SettingError, UserError
from d2g.diffusion import pretrained
from distill.export.export import export_student
from distill.models.student import student_from_teacher
from distill.sampling import load_student
from distill.saved_samples import save_samples
from distill.training.data import open_pairs, pair_batches
from distill.training.open_rows import sample_guidance
from distill.training.train import train
from jobs import distill_config, make_pairs
from pairgen.generate import generate_pairs
from pairgen.store.concat import GuidedBatch, JoinedReader, guidance_scales
from pairgen.store.reader import PairReader


@pytest.fixture(scope="module")
def stores(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    low, high = (tmp_path_factory.mktemp(name) for name in ("low", "high"))
    return [make_pairs(teacher, low, guidance=2.0, num_pairs=8), make_pairs(teacher, high, guidance=6.0)]


def join_readers(stores: list[Path], with_guidance: bool = True) -> JoinedReader:
    return JoinedReader([PairReader(store) for store in stores], with_guidance)


def test_rows_equal_those_of_the_stores_and_have_their_scale(stores: list[Path]) -> None:
    reader, readers = join_readers(stores), [PairReader(store) for store in stores]
    assert len(reader) == 8 + 12 and reader.spec == readers[0].spec
    batch = reader.read(range(20))
    assert isinstance(batch, GuidedBatch) and sorted(set(batch.guidance.tolist())) == [2.0, 6.0]
    for scale, source in ((2.0, readers[0]), (6.0, readers[1])):
        from_source = batch.guidance == scale
        all_rows = source.read(range(len(source)))
        assert batch.index[from_source].tolist() == all_rows.index.tolist()
        assert torch.equal(batch.noise[from_source], all_rows.noise)
        assert torch.equal(batch.latents[from_source], all_rows.latents)
        assert [
            p for p, included in zip(batch.prompts, from_source, strict=True) if included
        ] == all_rows.prompts


def test_every_range_of_rows_mixes_the_scales_in_proportion(stores: list[Path]) -> None:
    reader = join_readers(stores)
    for start in range(0, 15):
        low = (reader.read(range(start, start + 5)).guidance == 2.0).sum()  # type: ignore[attr-defined]
        assert 1 <= low <= 3


def test_rows_are_returned_in_the_requested_order_with_repeats(stores: list[Path]) -> None:
    reader = join_readers(stores)
    rows = [17, 3, 3, 0, 9]
    all_rows, selected = reader.read(range(20)), reader.read(rows)
    assert isinstance(all_rows, GuidedBatch) and isinstance(selected, GuidedBatch)
    assert torch.equal(selected.latents, all_rows.latents[rows]) and torch.equal(
        selected.guidance, all_rows.guidance[rows]
    )
    assert selected.prompts == [all_rows.prompts[row] for row in rows]
    assert torch.equal(selected.index, all_rows.index[rows])


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # Python 3.12 warns about fork with threads
def test_worker_processes_give_the_same_batches(stores: list[Path], teacher: Path) -> None:
    digests = pretrained.teacher_digests(str(teacher))
    reader = open_pairs(",".join(map(str, stores)), digests, with_guidance=True)
    streams = [pair_batches(reader, 4, 7, 0, workers) for workers in (0, 1)]
    for a, b in zip(*(list(islice(s, 5)) for s in streams), strict=True):
        assert torch.equal(a.latents, b.latents) and torch.equal(guidance_scales(a)[0], guidance_scales(b)[0])
    for stream in streams:
        stream.close()  # type: ignore[attr-defined]


def test_a_single_store_has_scales_only_if_requested(stores: list[Path], teacher: Path) -> None:
    digests = pretrained.teacher_digests(str(teacher))
    plain = open_pairs(str(stores[0]), digests)
    assert isinstance(plain, PairReader) and guidance_scales(plain.read([0])) == ()
    (guidance,) = guidance_scales(open_pairs(str(stores[0]), digests, with_guidance=True).read([0, 1]))
    assert guidance.tolist() == [2.0, 2.0]


def test_incompatible_stores_are_refused(stores: list[Path], teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"guidance scales 2, 6; set student.guidance_conditioning=true"):
        join_readers(stores, with_guidance=False)
    same = join_readers([stores[0], stores[0]], with_guidance=False)
    assert len(same) == 16 and not isinstance(same.read([0]), GuidedBatch)
    readers = [PairReader(store) for store in stores]
    readers[1].spec = replace(readers[1].spec, denoiser_sha256="other")
    with pytest.raises(UserError, match="has denoiser_sha256 other"):
        JoinedReader(readers, True)


def test_stores_of_another_solver_are_refused(stores: list[Path], teacher: Path, tmp_path: Path) -> None:
    """The same noise and prompt would have two targets."""
    settings: tuple[dict[str, Any], ...] = ({"steps": 2}, {"solver": "heun"}, {"spacing": "trailing"})
    for setting in settings:
        name = next(iter(setting))
        (tmp_path / name).mkdir()
        other = make_pairs(teacher, tmp_path / name, guidance=2.0, seed=1, **setting)
        with pytest.raises(UserError, match=rf"has {name} .*; expected stores that differ in guidance only"):
            open_pairs(f"{stores[0]},{other}", pretrained.teacher_digests(str(teacher)))


def test_stores_of_the_same_pairs_are_warned_of(
    stores: list[Path], teacher: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    digests = pretrained.teacher_digests(str(teacher))
    other_seed = make_pairs(teacher, tmp_path, guidance=2.0, num_pairs=8, seed=1)
    open_pairs(",".join(map(str, [*stores, other_seed])), digests, with_guidance=True)
    assert "duplicates" not in caplog.text
    open_pairs(f"{stores[0]},{other_seed},{stores[0]}", digests)
    message = f"{stores[0]} and {stores[0]} have the same seed 0, guidance, teacher and prompts: their pairs"
    assert caplog.text.count("duplicates") == 1 and message in caplog.text
    # A store that has grown since begins with the same pairs.
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(prompts.read_text() + "a new prompt\n")
    config = tiny.pair_config(str(teacher), str(prompts), guidance=2.0, num_pairs=6, seed=1)
    small = generate_pairs(
        replace(config, prompts=tiny.save_prompts(tmp_path / "few.txt")), tmp_path / "small"
    )
    shutil.copytree(small.out, tmp_path / "larger")
    generate_pairs(replace(config, num_pairs=7), tmp_path / "larger")
    open_pairs(f"{small.out},{tmp_path / 'larger'}", digests)
    assert caplog.text.count("duplicates") == 2


def test_a_student_is_trained_on_several_scales(stores: list[Path], teacher: Path, tmp_path: Path) -> None:
    config = distill_config(teacher, stores[0])
    config = replace(
        config,
        pairs=",".join(map(str, stores)),
        student=replace(config.student, guidance_conditioning=True),
        train=replace(config.train, images=8, validate_images=4, validate_pairs=4),
    )
    summary = train(config, tmp_path / "run")
    assert summary.images == 8
    one = load_student(str(tmp_path / "run"))
    assert one.student.guided
    assert one.guidance == 6.0, "the scale of its pairs that is nearest to 8"
    assert export_student(str(tmp_path / "run"), tmp_path / "exported")["out"]
    assert load_student(str(tmp_path / "exported")).guidance == 6.0
    assert sample_guidance(config.teacher, config.student, join_readers(stores)) == 6.0, "in validations"
    weight = one.student.unet.time_embedding.cond_proj.weight
    assert weight.abs().max() > 0
    images = {}
    for scale in (2.0, 6.0):
        save_samples(str(tmp_path / "run"), ["a red cube"], tmp_path / str(scale), 0, guidance=scale)
        images[scale] = (tmp_path / str(scale) / "00000.png").read_bytes()
    assert images[2.0] != images[6.0]
    with torch.no_grad():
        latents = [
            replace(one, guidance=scale).latents(torch.ones(1, 4, 4, 4), ["a"]) for scale in (2.0, 6.0)
        ]
    assert not torch.equal(*latents)
    plain = student_from_teacher(str(teacher))
    checkpoint.save(tmp_path / "plain" / "checkpoints", 1, {"ema": plain.state_dict()}, {}, {})
    facts = {"teacher": str(teacher), "student_timestep": -1}
    (tmp_path / "plain" / "config.json").write_text(json.dumps(facts))
    with pytest.raises(SettingError, match="has its guidance in its weights; leave --guidance out"):
        save_samples(str(tmp_path / "plain"), ["a"], tmp_path / "out", 0, guidance=3.0)
