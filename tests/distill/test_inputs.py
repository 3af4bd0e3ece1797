"""A resumed run accepts its inputs under another path, and refuses other inputs."""

import io
import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import tiny
import vision_models
from d2g.core.errors import UserError
from d2g.core.tracking.run_directory import read_stats
from d2g.diffusion import pretrained
from distill.config.export import ExportConfig
from distill.config.run import DistillConfig
from distill.config.student import StudentConfig
from distill.export.card_history import read_history
from distill.export.export import export
from distill.monitoring.best_point import comparable_reports
from distill.training.inputs import describe_inputs, same_inputs, weights_sha256_of
from distill.training.real_images import RealImages
from distill.training.state import NetworkDigests
from distill.training.train import train
from jobs import BATCH, distill_config, make_pairs
from pairgen.generate import generate_pairs
from pairgen.store.reader import PairReader
from wrong_json import changed


@pytest.fixture(scope="module")
def pairs(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pairs(teacher, tmp_path_factory.mktemp("pairs"), steps=1, guidance=1.0)


@pytest.fixture(scope="module")
def two_step_run(teacher: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps."""
    run = tmp_path_factory.mktemp("started") / "run"
    train(distill_config(teacher, pairs, f"train.images={2 * BATCH}"), run)
    return run


def copy(source: Path, folder: Path) -> Path:
    return Path(shutil.copytree(source, folder))


def link(source: Path, folder: Path) -> Path:
    folder.symlink_to(source)
    return folder


MOVES: dict[str, Callable[[Path, Path], str]] = {
    "copy": lambda source, folder: str(copy(source, folder)),
    "link": lambda source, folder: str(link(source, folder)),
    "slash": lambda source, folder: f"{source}/",
    "dots": lambda source, folder: f"{source}/../{source.name}",
}


@pytest.mark.parametrize("move", MOVES)
def test_moved_inputs_are_accepted(
    move: str, teacher: Path, pairs: Path, two_step_run: Path, tmp_path: Path
) -> None:
    run = copy(two_step_run, tmp_path / "run")
    config = distill_config(Path(), Path(), f"train.images={3 * BATCH}")
    config = replace(
        config,
        teacher=MOVES[move](teacher, tmp_path / "teacher"),
        pairs=MOVES[move](pairs, tmp_path / "pairs"),
    )
    assert train(config, run).steps == 3
    assert [line["nimg"] for line in read_stats(run)] == [BATCH, 2 * BATCH, 3 * BATCH]
    written = json.loads((run / "config.json").read_text())
    assert (written["teacher"], written["pairs"]) == (config.teacher, config.pairs), (
        "config.json records the latest paths"
    )
    assert not read_history(str(run)).gap
    train(distill_config(teacher, pairs, f"train.images={4 * BATCH}"), run)  # and back to the first paths


@pytest.mark.parametrize(
    "kind", ["safetensors", "diffusers", pytest.param("onnx", marks=[pytest.mark.slow, pytest.mark.long])]
)
def test_export_accepts_a_moved_teacher(kind: Any, pairs: Path, teacher: Path, tmp_path: Path) -> None:
    first = copy(teacher, tmp_path / "first")
    train(distill_config(first, pairs, f"train.images={BATCH}"), tmp_path / "run")
    first.rename(tmp_path / "moved")
    config = ExportConfig(student=str(tmp_path / "run"), format=kind, teacher=str(tmp_path / "moved"))
    assert export(config, tmp_path / "out")["parity_max_abs_err"] < 0.1
    if kind == "safetensors":
        assert str(tmp_path / "moved") in (tmp_path / "out" / "student.json").read_text()


def test_a_run_accepts_another_autoencoder(
    pairs: Path, teacher: Path, two_step_run: Path, tmp_path: Path
) -> None:
    from d2g.diffusion.pretrained import load_vae, save_component

    run, swapped = copy(two_step_run, tmp_path / "run"), copy(teacher, tmp_path / "swapped")
    vae = load_vae(str(teacher))
    vae.decoder.conv_out.weight.data.mul_(1.5)
    save_component(vae, swapped / "vae")
    assert train(distill_config(swapped, pairs, f"train.images={3 * BATCH}"), run).steps == 3


def test_a_run_accepts_a_store_that_has_grown(
    teacher: Path, pairs: Path, two_step_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, store = copy(two_step_run, tmp_path / "run"), copy(pairs, tmp_path / "pairs")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(tiny.CAPTIONS))
    settings = tiny.pair_config(str(teacher), str(prompts), steps=1, guidance=1.0, num_pairs=14)
    generate_pairs(settings, store)
    with caplog.at_level("INFO"):
        assert train(distill_config(teacher, store, f"train.images={3 * BATCH}"), run).steps == 3
    assert "grown from 12 to 14 pairs since this run started" in caplog.text


def test_validations_on_the_pairs_of_a_grown_store_are_not_compared(
    teacher: Path, pairs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The last pairs are held out, and others are last now."""
    run, store = tmp_path / "run", copy(pairs, tmp_path / "pairs")
    settings = ("train.validate_pairs=2", f"train.validate_images={BATCH}", "train.keep_best=true")
    for images, num_pairs in ((BATCH, 12), (2 * BATCH, 12), (3 * BATCH, 14)):
        prompts = tiny.save_prompts(tmp_path / "prompts.txt")
        generate_pairs(
            tiny.pair_config(str(teacher), prompts, steps=1, guidance=1.0, num_pairs=num_pairs), store
        )
        caplog.clear()
        with caplog.at_level("INFO"):
            train(distill_config(teacher, store, *settings, f"train.images={images}"), run)
        assert ("pairs ([10, 12] -> [12, 14])" in caplog.text) == (num_pairs == 14)
    counted = comparable_reports(run, read_stats(run))
    assert [line["nimg"] for line in counted if "val/psnr" in line] == [3 * BATCH]


def test_a_run_of_an_older_version_lacks_newer_settings(
    teacher: Path, pairs: Path, two_step_run: Path, tmp_path: Path
) -> None:
    """They count as their defaults; another value of one is refused by name."""
    run = copy(two_step_run, tmp_path / "run")
    settings = json.loads((run / "config.json").read_text())
    del settings["optim"]["clip_norm"], settings["clip_guidance"]
    (run / "config.json").write_text(json.dumps(settings))
    longer = (teacher, pairs, f"train.images={3 * BATCH}")
    with pytest.raises(UserError, match=r"another config: optim\.clip_norm \(0\.0 -> 1\.0\)"):
        train(distill_config(*longer, "optim.clip_norm=1"), run)
    assert train(distill_config(*longer), run).steps == 3


@pytest.mark.parametrize("place", ["the same path", "another path"])
@pytest.mark.parametrize(
    ("settings", "says"),
    [({"seed": 7}, r"seed"), ({"num_pairs": 8}, r"num_pairs \(8 -> 12\)"), ({"steps": 2}, r"steps")],
    ids=["seed", "fewer", "steps"],
)
def test_other_pairs_are_refused(
    place: str,
    settings: dict[str, Any],
    says: str,
    teacher: Path,
    pairs: Path,
    two_step_run: Path,
    tmp_path: Path,
) -> None:
    first = copy(pairs, tmp_path / "first" / "pairs")
    run = copy(two_step_run, tmp_path / "run")
    train(distill_config(teacher, first, f"train.images={2 * BATCH}"), run)
    (tmp_path / "other").mkdir()
    other = make_pairs(teacher, tmp_path / "other", **{"steps": 1, "guidance": 1.0, **settings})
    if place == "the same path":
        shutil.rmtree(first)
        other = other.rename(first)
    else:
        says = r"holds a run with another config: pairs"
    with pytest.raises(UserError, match=says):
        train(distill_config(teacher, other, f"train.images={3 * BATCH}"), run)


@pytest.mark.slow
def test_gan_stage_accepts_a_moved_init(teacher: Path, pairs: Path, tmp_path: Path) -> None:
    images = f"train.images={BATCH}"
    train(distill_config(teacher, pairs, images), tmp_path / "ode")
    train(distill_config(teacher, pairs, images, stage="gan", init=tmp_path / "ode"), tmp_path / "gan")
    moved = (tmp_path / "ode").rename(tmp_path / "moved")
    more = f"train.images={2 * BATCH}"
    assert train(distill_config(teacher, pairs, more, stage="gan", init=moved), tmp_path / "gan").steps == 2
    train(distill_config(teacher, pairs, more, "seed=3"), tmp_path / "other")
    with pytest.raises(UserError, match=r"another config: init"):
        other = distill_config(teacher, pairs, more, stage="gan", init=tmp_path / "other")
        train(other, tmp_path / "gan")
    shutil.rmtree(moved)  # a resume reads the checkpoint, not its init
    assert train(distill_config(teacher, pairs, more, stage="gan", init=moved), tmp_path / "gan").steps == 2


@pytest.fixture(scope="module")
def frozen(teacher: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with real images, a CLIP and a LatentLPIPS, and a run of one step that reads them."""
    folder = tmp_path_factory.mktemp("frozen")
    (folder / "real").mkdir()
    for number in range(5):
        Image.new("RGB", (40, 30), (40 * number, 10, 200)).save(folder / "real" / f"{number}.png")
        (folder / "real" / f"{number}.txt").write_text(f"a red cube {number}")
    vision_models.save_clip_model(folder / "clip")
    copy(teacher / "latent_lpips", folder / "lpips")
    train(frozen_config(teacher, pairs, folder, BATCH), folder / "run")
    return folder


def frozen_config(teacher: Path, pairs: Path, folder: Path, images: int) -> Any:
    """The second stage, with real images, guided by CLIP."""
    settings = (f"gan.real={folder / 'real'}", "gan.real_fraction=0.5", f"lpips={folder / 'lpips'}")
    guided = ("clip_guidance.weight=0.2", f"clip_guidance.model={folder / 'clip'}", "clip_guidance.crop=8")
    options = (*settings, *guided, f"train.images={images}", "gan.r1_rows=2")
    return distill_config(teacher, pairs, *options, stage="gan", init="teacher")


@pytest.mark.slow
def test_moved_images_and_frozen_networks_are_accepted(
    teacher: Path, pairs: Path, frozen: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of the same content; other content is refused at another path and mentioned at the old one."""
    moved = copy(frozen, tmp_path / "moved")
    assert train(frozen_config(teacher, pairs, moved, 2 * BATCH), moved / "run").steps == 2
    written = json.loads((moved / "run" / "config.json").read_text())
    assert written["gan"]["real"] == str(moved / "real")
    assert written["clip_guidance"]["model"] == str(moved / "clip")
    assert written["lpips"] == str(moved / "lpips")
    longer, other = 3 * BATCH, copy(moved, tmp_path / "other")
    for name in ("real/0.txt", "clip/config.json", "lpips/config.json"):
        (other / name).write_text((other / name).read_text() + " ?"[name.endswith("txt")])
    with pytest.raises(UserError, match=r"config: clip_guidance\.model \(.*, gan\.real \(.*, lpips \("):
        train(frozen_config(teacher, pairs, other, longer), other / "run")
    (moved / "real" / "0.txt").write_text("a blue cube")
    with caplog.at_level("INFO"):
        assert train(frozen_config(teacher, pairs, moved, longer), moved / "run").steps == 3
    assert f"gan.real: {moved / 'real'} has changed since the run in {moved / 'run'} started" in caplog.text


def test_feature_networks_and_tables_are_identified_by_content(tmp_path: Path) -> None:
    weights = [tmp_path / name for name in ("a.pth", "b.pth", "c.pth")]
    for file, data in zip(weights, (b"1", b"1", b"2"), strict=True):
        file.write_bytes(data)
    first, same, other = (weights_sha256_of([f"squeezenet:{file}", "org/name"]) for file in weights)
    assert first == same != other != "" and weights_sha256_of(["org/name", ""]) == ""
    tables = []
    for name, color in (("a", "red"), ("b", "red"), ("c", "blue")):
        data = io.BytesIO()
        Image.new("RGB", (9, 9), color).save(data, "BMP")
        table = pa.table({"image": [data.getvalue()], "caption": ["a color"]})
        pq.write_table(table, tmp_path / f"{name}.parquet")
        tables.append(RealImages(str(tmp_path / f"{name}.parquet"), (8, 8)).digest())
    assert tables[0] == tables[1] != tables[2]


def test_a_damaged_record_of_inputs_is_one_line(
    teacher: Path, pairs: Path, two_step_run: Path, tmp_path: Path
) -> None:
    run, rng = copy(two_step_run, tmp_path / "run"), random.Random(3)
    config, reader = distill_config(teacher, pairs), PairReader(pairs)
    inputs = describe_inputs(config, reader, None)
    good = json.loads((run / "config.json").read_text())
    for _ in range(100):
        (run / "config.json").write_text(json.dumps({**good, "inputs": changed(rng, good["inputs"])}))
        try:
            same_inputs(run, config, reader, inputs)
        except UserError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("stage", "first", "by_path", "with_every_setting"),
    [
        (
            "ode",
            "4360d47e8bd8680d6ff3a7dc1bac5e4ff0e745b78ea2ea491c011c4f8a61b1fa",
            "07db5e91f55d4191ecc33fc3994f63e277b1dfe5299d6d29283f512284e8b130",
            "54266007e5227f5db03bf2902258fe6aa9d2ab43c2e6d1aa72d48ec3fb76952d",
        ),
        (
            "gan",
            "7f931b69467213bb8ac50a5bd02e8b833d65988c731bf630fe201d596c4194ae",
            "803e7354d03438edb7628579220bbdddf5af43d3e700e1943cc083dedfddd894",
            "1dcf6cc2bea49094d61f33d103787f9fb554bcb546a37506f1c2ce1fe387ed7e",
        ),
    ],
)
def test_a_new_setting_of_the_discriminator_keeps_older_digests(
    stage: Any, first: str, by_path: str, with_every_setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """first, by_path: what the code of commit 342babf computes, before the settings of `ADDED_LATER`.
    with_every_setting: that of commit d765eda. If this fails after a setting of `gan` was added, put its name
    into `IN_NO_EARLIER_DIGEST`: otherwise no checkpoint written before resumes."""
    monkeypatch.setattr(pretrained, "denoiser_sha256", lambda teacher: "0" * 64)
    config = DistillConfig(stage=stage, teacher="miniature", pairs="pairs")
    today = NetworkDigests.of(config)
    assert today.by_content == first and {by_path, with_every_setting} <= set(today.earlier)
    changes: list[dict[str, Any]] = [
        {"channel_max": 64},
        {"channel_base": 64},
        {"feature_heads": "modulated"},
        {"adaptive_weight": True},
    ]
    for change in changes:
        other = NetworkDigests.of(replace(config, gan=replace(config.gan, **change)))
        assert not {other.by_content, *other.earlier} & {first, by_path, with_every_setting}


def test_a_new_setting_of_the_generator_keeps_older_digests(monkeypatch: pytest.MonkeyPatch) -> None:
    """The digest is that of commit 3881540, before the settings of `GENERATOR_ADDED_LATER`."""
    monkeypatch.setattr(pretrained, "denoiser_sha256", lambda teacher: "0" * 64)
    student = StudentConfig(kind="stylegan-t")
    config = DistillConfig(stage="gan", teacher="miniature", pairs="pairs", student=student)
    before = "254956cfa490dcb3d502e85b772effd84c636101d61d223ce0cd079b651cf069"
    assert NetworkDigests.of(config).by_content == before
    for name in ("residual", "second_order", "text_bypass"):
        changed = replace(student, generator=replace(student.generator, **{name: False}))
        assert NetworkDigests.of(replace(config, student=changed)).by_content != before


def test_a_run_of_version_0_2_0_can_be_resumed(
    teacher: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Version 0.2.0 recorded paths without digests in config.json and in checkpoints."""
    of = NetworkDigests.of
    with monkeypatch.context() as patched:
        patched.setattr(
            NetworkDigests, "of", lambda config: replace(of(config), by_content=of(config).earlier[0])
        )
        train(distill_config(teacher, pairs, f"train.images={BATCH}"), tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    del written["inputs"]
    (tmp_path / "config.json").write_text(json.dumps(written))
    assert train(distill_config(teacher, pairs, f"train.images={2 * BATCH}"), tmp_path).steps == 2
    (tmp_path / "other").mkdir()
    other = make_pairs(teacher, tmp_path / "other", steps=1, guidance=1.0, seed=2)
    with pytest.raises(UserError, match="another config: pairs"):
        train(distill_config(teacher, other, f"train.images={3 * BATCH}"), tmp_path)
