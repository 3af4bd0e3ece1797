"""Growing a store keeps its rows, and the result equals a store generated at once."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import pytest

import tiny
from d2g.core.errors import UserError
from pairgen.config import PairConfig
from pairgen.generate import generate_pairs, regenerate
from pairgen.grow import grow_store
from pairgen.merge import merge_stores
from pairgen.place import FolderPlace
from pairgen.prompts import PromptList
from pairgen.shard_claims import Claims
from pairgen.store.reader import PairReader
from pairgen.store.spec import pending, read_spec, shard_path, write_spec
from pairgen.verify import verify_store
from stores import same

MORE = [*tiny.CAPTIONS, "a green cube", "a red torus"]


def config(teacher: Path | str, folder: Path, captions: list[str], **settings: Any) -> PairConfig:
    folder.mkdir(parents=True, exist_ok=True)
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(captions) + "\n")
    return tiny.pair_config(str(teacher), str(prompts), steps=1, guidance=1.0, batch_size=1, **settings)


def rows(store: Path) -> Any:
    reader = PairReader(store)
    assert reader.complete
    return reader.read(range(len(reader)), None)


@pytest.fixture(scope="module")
def small_store(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six pairs of six prompts in shards of 5, so the last shard is incomplete."""
    folder = tmp_path_factory.mktemp("small")
    generate_pairs(config(teacher, folder, tiny.CAPTIONS, num_pairs=6), folder / "pairs")
    return folder / "pairs"


@pytest.mark.parametrize(
    ("captions", "num_pairs"),
    [(tiny.CAPTIONS, 8), (tiny.CAPTIONS, 17), (MORE, 6), (MORE, 8), (MORE, 12)],
    ids=["within a shard", "more shards", "more prompts", "one pair per prompt", "both"],
)
def test_a_grown_store_equals_one_generated_at_once(
    teacher: Path, small_store: Path, tmp_path: Path, captions: list[str], num_pairs: int
) -> None:
    grown = Path(shutil.copytree(small_store, tmp_path / "grown"))
    before = rows(grown)
    settings = config(teacher, tmp_path / "new", captions, num_pairs=num_pairs)
    assert generate_pairs(settings, grown).new_pairs == num_pairs - 6
    generate_pairs(settings, tmp_path / "once")
    after = rows(grown)
    assert same(after, rows(tmp_path / "once")) and same(before, PairReader(grown).read(range(6), None))
    assert verify_store(grown).ok and read_spec(grown).num_prompts == len(captions)
    assert generate_pairs(settings, grown).new_pairs == 0, "running the command again adds nothing"


def test_a_store_grows_again_and_is_repaired(teacher: Path, small_store: Path, tmp_path: Path) -> None:
    """Each shard has the spec of the store when it was written; all remain valid."""
    store = Path(shutil.copytree(small_store, tmp_path / "store"))
    for captions, number in ((MORE[:7], 7), (MORE, 12), (MORE, 13)):
        generate_pairs(config(teacher, tmp_path / "new", captions, num_pairs=number), store)
        assert verify_store(store).ok and len(PairReader(store)) == number
    assert [count for count, _ in read_spec(store).earlier_prompts] == [6, 7]
    shard_path(store, 1).unlink()
    assert regenerate(store) == 5 and verify_store(store).ok


def test_killing_a_growing_job_loses_nothing(teacher: Path, small_store: Path, tmp_path: Path) -> None:
    """Kill after the incomplete shard was reopened: the old and the new command both finish the store."""
    for number in (6, 9):
        store = Path(shutil.copytree(small_store, tmp_path / str(number)))
        part = store / "partial" / "pairs-00001.rows-0000000005.h5"
        part.parent.mkdir(exist_ok=True)
        shard_path(store, 1).rename(part)
        generate_pairs(config(teacher, tmp_path / "new", tiny.CAPTIONS, num_pairs=number), store)
        assert verify_store(store).ok and len(PairReader(store)) == number and not part.exists()


def test_quarantined_rows_of_an_incomplete_shard_are_retried(
    teacher: Path, small_store: Path, tmp_path: Path
) -> None:
    from pairgen.store.hdf5 import encode_rows, load_rows
    from pairgen.store.spec import encode_record, quarantine_path

    store = Path(shutil.copytree(small_store, tmp_path / "store"))
    spec, path = read_spec(store), shard_path(store, 1)
    shard = load_rows(path, spec)
    record = [{"index": 5, "prompt": shard.prompts[0], "reason": "not finite"}]
    quarantine_path(store, 1).parent.mkdir(exist_ok=True)
    quarantine_path(store, 1).write_bytes(encode_record(1, record))
    none = replace(shard, noise=shard.noise[:0], latents=shard.latents[:0], prompts=[], index=shard.index[:0])
    path.write_bytes(encode_rows(spec, none, [5]))
    generate_pairs(config(teacher, tmp_path / "new", tiny.CAPTIONS, num_pairs=8), store)
    assert verify_store(store).ok and same(PairReader(store).read(range(6), None), rows(small_store))


@pytest.mark.parametrize(
    ("captions", "settings", "says"),
    [
        (MORE[1:], {"num_pairs": 8}, r"its 6 prompts are not the first ones of --prompts"),
        (list(reversed(tiny.CAPTIONS)), {"num_pairs": 8}, r"another spec; differing: .*prompts_sha256"),
        (tiny.CAPTIONS, {"num_pairs": 5}, r"differing: num_pairs \(6 -> 5\)"),
        (MORE, {"num_pairs": 8, "seed": 3}, r"differing: .*seed \(0 -> 3\)"),
        (tiny.CAPTIONS, {"num_pairs": 8, "per_prompt": 2}, r"differing: .*per_prompt"),
        (tiny.CAPTIONS, {"num_pairs": 8, "shard_size": 4}, r"differing: .*shard_size"),
    ],
    ids=["prompts before", "reordered", "fewer", "seed", "per_prompt", "shard_size"],
)
def test_settings_that_would_change_rows_are_refused(
    teacher: Path, small_store: Path, tmp_path: Path, captions: list[str], settings: dict[str, Any], says: str
) -> None:
    before = {path: path.read_bytes() for path in sorted(small_store.rglob("*")) if path.is_file()}
    with pytest.raises(UserError, match=says):
        generate_pairs(config(teacher, tmp_path, captions, **settings), small_store)
    assert {path: path.read_bytes() for path in sorted(small_store.rglob("*")) if path.is_file()} == before


def test_prompts_cannot_be_appended_after_the_list_wrapped_around(teacher: Path, tmp_path: Path) -> None:
    generate_pairs(config(teacher, tmp_path, tiny.CAPTIONS[:2], num_pairs=4), tmp_path / "pairs")
    with pytest.raises(UserError, match=r"uses its 2 prompts several times over for 4 pairs"):
        generate_pairs(config(teacher, tmp_path, MORE, num_pairs=8), tmp_path / "pairs")
    generate_pairs(config(teacher, tmp_path, tiny.CAPTIONS[:2], num_pairs=7), tmp_path / "pairs")
    assert verify_store(tmp_path / "pairs").ok, "more pairs of the same prompts"


@pytest.mark.parametrize("machine", ["this", "another"])
def test_a_store_cannot_grow_while_another_job_writes_its_last_shard(
    teacher: Path, small_store: Path, tmp_path: Path, machine: str
) -> None:
    store = Path(shutil.copytree(small_store, tmp_path / "store"))
    spec = replace(read_spec(store), num_pairs=9)
    (store / "claims").mkdir(exist_ok=True)
    with Claims(store, patience=2) as other:
        other.place = other.place if machine == "this" else "elsewhere"
        assert other.take([1]) == 1
        with pytest.raises(UserError, match=r"cannot grow now: .*, process .* makes its last shard"):
            grow_store(FolderPlace(store), spec, PromptList.of(tiny.CAPTIONS), patience=20)
    assert read_spec(store).num_pairs == 6
    grow_store(FolderPlace(store), spec, PromptList.of(tiny.CAPTIONS))
    assert [list(part) for part in pending(store, read_spec(store))] == [[5, 6, 7, 8]]


def test_a_job_stops_if_its_store_has_grown(
    teacher: Path, small_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job has the old spec and must not replace the longer shard by a shorter one."""
    from pairgen import generate

    store = Path(shutil.copytree(small_store, tmp_path / "store"))
    shard_path(store, 0).unlink()
    opened = generate.open_store

    def grow_first(*arguments: Any) -> Any:
        job = opened(*arguments)
        grow_store(FolderPlace(store), replace(job.spec, num_pairs=9), job.prompts)
        return job

    monkeypatch.setattr(generate, "open_store", grow_first)
    with pytest.raises(UserError, match="has grown to 9 pairs and 6 prompts while this job ran"):
        generate_pairs(config(teacher, tmp_path, tiny.CAPTIONS, num_pairs=6), store)
    monkeypatch.undo()
    generate_pairs(config(teacher, tmp_path, tiny.CAPTIONS, num_pairs=9), store)
    assert verify_store(store).ok


def test_shards_of_a_larger_store_are_refused_in_a_smaller_one(
    teacher: Path, small_store: Path, tmp_path: Path
) -> None:
    """A shard may only have an earlier spec of the store; another prompt list or more pairs are damage."""
    other = tmp_path / "other"
    generate_pairs(config(teacher, tmp_path, MORE, num_pairs=12), other)
    store = Path(shutil.copytree(small_store, tmp_path / "store"))
    shutil.copy(shard_path(other, 0), shard_path(store, 0))
    report = verify_store(store)
    assert [bad["shard"] for bad in report.bad_shards] == ["shards/pairs-00000.h5"]
    assert "num_pairs (6 -> 12)" in report.bad_shards[0]["reason"]


# The same teacher under another path.


def links(teacher: Path, folder: Path) -> dict[str, str]:
    folder.mkdir()
    shutil.copytree(teacher, folder / "copy")
    (folder / "link").symlink_to(teacher)
    return {"copy": str(folder / "copy"), "link": str(folder / "link"), "slash": f"{teacher}/"}


@pytest.mark.parametrize("other", ["copy", "link", "slash"])
def test_a_moved_teacher_can_resume_and_merge(
    teacher: Path, small_store: Path, tmp_path: Path, other: str
) -> None:
    name = links(teacher, tmp_path / "teachers")[other]
    store = Path(shutil.copytree(small_store, tmp_path / "store"))
    shard_path(store, 1).unlink()
    part = Path(shutil.copytree(small_store, tmp_path / "part"))
    shard_path(part, 0).unlink()
    other_store = tmp_path / "moved"
    generate_pairs(config(name, tmp_path, tiny.CAPTIONS, num_pairs=6), other_store)
    with h5py.File(shard_path(other_store, 0)) as file:
        assert name in file.attrs["spec"], "shards note the path"
    shard_path(other_store, 1).unlink()
    merge_stores([other_store, part], tmp_path / "merged")
    assert verify_store(tmp_path / "merged").ok and same(rows(tmp_path / "merged"), rows(small_store))
    assert generate_pairs(config(name, tmp_path, tiny.CAPTIONS, num_pairs=6), store).new_pairs == 1
    assert verify_store(store).ok and read_spec(store).teacher == str(teacher), "the first path stays"


def test_repair_accepts_a_moved_teacher(teacher: Path, tmp_path: Path) -> None:
    first = Path(shutil.copytree(teacher, tmp_path / "first"))
    store = tmp_path / "pairs"
    generate_pairs(config(first, tmp_path, tiny.CAPTIONS, num_pairs=6), store)
    first.rename(tmp_path / "moved")
    shard_path(store, 1).unlink()
    with pytest.raises(UserError, match=r"no such folder.*give --teacher if it lies elsewhere"):
        regenerate(store)
    assert regenerate(store, teacher=str(tmp_path / "moved")) == 1 and verify_store(store).ok
    tiny.save_teacher(tmp_path / "other", seed=1)
    shard_path(store, 1).unlink()
    with pytest.raises(UserError, match=r"teacher .*other has sha256 .*, .*pairs was made with"):
        regenerate(store, teacher=str(tmp_path / "other"))


def test_another_decoder_of_the_same_latent_space_is_accepted(
    teacher: Path, small_store: Path, tmp_path: Path
) -> None:
    """As sd-vae-ft-mse: other decoder weights, the same latent space."""
    from d2g.diffusion.pretrained import load_vae, save_component, weights_sha256

    swapped = Path(shutil.copytree(teacher, tmp_path / "swapped"))
    vae = load_vae(str(teacher))
    vae.decoder.conv_out.weight.data.mul_(1.5)
    save_component(vae, swapped / "vae")
    assert weights_sha256(str(swapped)) != weights_sha256(str(teacher))
    store = Path(shutil.copytree(small_store, tmp_path / "store"))
    shard_path(store, 1).unlink()
    generate_pairs(config(swapped, tmp_path, tiny.CAPTIONS, num_pairs=6), store)
    assert verify_store(store).ok and same(rows(store), rows(small_store))
    vae.register_to_config(scaling_factor=0.9)
    save_component(vae, swapped / "vae")
    with pytest.raises(UserError, match=r"differing: latent_space\.scale \(0\.7 -> 0\.9\)"):
        generate_pairs(config(swapped, tmp_path, tiny.CAPTIONS, num_pairs=6), store)


def test_a_store_without_denoiser_digest_is_checked_by_the_digest_of_all_weights(
    teacher: Path, small_store: Path, tmp_path: Path
) -> None:
    from pairgen.store.spec import write_spec

    store = Path(shutil.copytree(small_store, tmp_path / "store"))
    write_spec(store, replace(read_spec(store), denoiser_sha256=""))
    assert "denoiser" not in (store / "store.json").read_text()
    shard_path(store, 1).unlink()
    generate_pairs(config(teacher, tmp_path, tiny.CAPTIONS, num_pairs=6), store)
    assert verify_store(store).ok
    tiny.save_teacher(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match="differing: teacher_sha256"):
        generate_pairs(config(tmp_path / "other", tmp_path, tiny.CAPTIONS, num_pairs=6), store)


@pytest.mark.parametrize(
    ("captions", "num_pairs"), [(tiny.CAPTIONS, 8), (tiny.CAPTIONS, 17), (MORE, 12)], ids=str
)
def test_stores_of_different_sizes_are_merged_to_the_largest(
    teacher: Path,
    small_store: Path,
    tmp_path: Path,
    captions: list[str],
    num_pairs: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    large = Path(shutil.copytree(small_store, tmp_path / "large"))
    settings = config(teacher, tmp_path / "new", captions, num_pairs=num_pairs)
    generate_pairs(settings, large)
    expected = rows(large)
    # The complete shard comes from the small store; the others from the large one.
    shard_path(large, 0).unlink()
    for order in ([small_store, large], [large, small_store]):
        out = tmp_path / f"out-{order[0].name}"
        with caplog.at_level("INFO"):
            merge_stores(order, out)
        assert same(rows(out), expected) and verify_store(out).ok and read_spec(out) == read_spec(large)
        assert f"{shard_path(small_store, 1)}: left out, because it has 1 rows and" in caplog.text
    # Without the large store's last shards, the same command of `generate` finishes the merged store.
    for shard in range(1, read_spec(large).num_shards):
        shard_path(large, shard).unlink()
    merge_stores([large, small_store], tmp_path / "part")
    assert generate_pairs(settings, tmp_path / "part").new_pairs == num_pairs - 5
    assert same(rows(tmp_path / "part"), expected)


def test_stores_of_other_latent_shapes_are_not_merged(small_store: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(small_store, tmp_path / "other"))
    spec = read_spec(other)
    write_spec(other, replace(spec, latent_shape=(4, 16, 16), num_pairs=12))
    with pytest.raises(UserError, match=r"latent_shape \("):
        merge_stores([small_store, other], tmp_path / "out")
    assert not (tmp_path / "out").exists()
