"""`d2g lpips train`: complete runs on tiny images with a tiny real VAE."""

import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from d2g.core.distributed import checkpoint
from d2g.core.errors import SettingError, UserError
from d2g.core.seeds import generator
from d2g.core.tracking.run_directory import read_stats
from d2g.diffusion import pretrained
from jobs import Running, d2g_ranks, succeed
from labeled import save_classes, save_table
from latent_lpips import load_lpips
from latent_lpips.config import LPIPSConfig
from latent_lpips.training.classifier import (
    classify_in_training,
    plan_batches,
    shift_latents,
    train_classifier,
)
from latent_lpips.training.config import ClassifyConfig
from latent_lpips.training.labeled_images import open_labeled
from latent_lpips.training.latent_stream import CropEncoder, CropItem, open_latent_stream
from latent_lpips.vgg import VGG16
from latent_lpips.weights import read_lpips_meta

SETTINGS: dict[str, Any] = dict(
    size=16, width=1 / 16, grid=1, dropout=0.1, batch=12, epochs=10, held_out=0.25, optimizer="adamw", lr=3e-3
)
SETTINGS |= dict(schedule="onecycle", area=(0.5, 1.0), score_epochs=5, workers=2, posterior="mean")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_classes(tmp_path_factory.mktemp("classes") / "data")


def config(data: Path, teacher: Path, **settings: Any) -> ClassifyConfig:
    return ClassifyConfig(data=str(data), latents=str(teacher), **{**SETTINGS, **settings})


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "lpips.safetensors")


def equal(a: Path, b: Path) -> bool:
    left, right = weights(a), weights(b)
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


@pytest.mark.parametrize("settings", [{}, {"crops": 2}], ids=["fresh crops", "cached"])
def test_training_learns_and_its_folder_can_be_loaded(
    teacher: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    """Of three classes, with 30 pictures held out."""
    data = save_classes(tmp_path / "data", 40)
    result = train_classifier(config(data, teacher, epochs=40, **settings), tmp_path / "out")
    assert result.top1 > 0.7 and result.top5 == 1.0 and (result.train, result.val) == (90, 30)
    metric = load_lpips(tmp_path / "out")
    assert metric.config.channels == 4 and all(torch.equal(h, torch.ones_like(h)) for h in metric.heads)
    meta = read_lpips_meta(tmp_path / "out")
    assert meta["top1"] == result.top1 and meta["calibrated"] is False
    assert (meta["scaling_factor"], meta["shift_factor"]) == (0.7, 0.0)
    repeated = train_classifier(config(data, teacher, epochs=40, **settings), tmp_path / "out")
    assert (repeated.top1, repeated.images) == (result.top1, result.images)


@pytest.mark.parametrize(
    "settings", [{"posterior": "sample"}, {"crops": 1}, {"norm": "group", "precision": "bf16"}]
)
def test_a_resumed_run_equals_an_unbroken_one(
    data: Path, teacher: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    uninterrupted = config(data, teacher, epochs=4, score_epochs=1, **settings)
    train_classifier(uninterrupted, tmp_path / "unbroken")
    short = replace(uninterrupted, minutes=1e-6)
    runs = 0
    while True:  # each run makes one step
        runs += 1
        if train_classifier(short, tmp_path / "resumed").images == 108:
            break
    assert runs == 9 and equal(tmp_path / "unbroken", tmp_path / "resumed")


@pytest.mark.parametrize("posterior", ["mean", "sample"])
def test_latents_depend_on_image_and_crop_only(
    data: Path, teacher: Path, tmp_path: Path, posterior: str
) -> None:
    """Latents do not depend on the batch; cached latents equal those of the first epochs up to fp16."""
    settings = config(data, teacher, crops=2, posterior=posterior)
    vae = pretrained.load_vae(str(teacher))
    encoder = CropEncoder(settings, vae, open_labeled(str(data))[0], torch.device("cpu"))
    items = [CropItem(row, crop) for crop in range(4) for row in (5, 0, 20)]
    fresh = torch.cat(list(encoder.stream([items[:5], items[5:6], items[6:]])))
    torch.testing.assert_close(fresh, next(encoder.stream([items])), rtol=1e-5, atol=1e-5)
    assert len({tuple(x.flatten()[:4].tolist()) for x in fresh}) == 12
    cached = torch.cat(list(open_latent_stream(encoder, tmp_path, "train", "sha")([items[:7], items[7:]])))
    torch.testing.assert_close(cached, fresh[[*range(6), *range(6)]], rtol=2e-3, atol=2e-3)
    centers = next(open_latent_stream(encoder, tmp_path, "val", "sha")([[CropItem(5, -1)]]))
    torch.testing.assert_close(centers, next(encoder.stream([[CropItem(5, -1)]])), rtol=2e-3, atol=2e-3)


def test_two_processes_equal_one(data: Path, teacher: Path, tmp_path: Path) -> None:
    words = ["lpips", "train", "--json", "--data", str(data), "--latents", str(teacher)]
    settings = {k: list(v) if isinstance(v, tuple) else v for k, v in SETTINGS.items()}
    settings |= {"epochs": 1, "optimizer": "sgd", "lr": 0.05, "crops": 1, "shift": 0.25, "schedule": "step"}
    settings["batch"] = 26  # two steps only, because rounding differences grow
    for name, value in settings.items():
        words += ["--set", f"{name}={value}"]
    succeed(*d2g_ranks([*words, "--out", str(tmp_path / "two")], tmp_path))
    one = ClassifyConfig(
        data=str(data), latents=str(teacher), **{**settings, "area": (0.5, 1.0), "workers": 1}
    )
    train_classifier(one, tmp_path / "one")
    left, right = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name, value in left.items():
        torch.testing.assert_close(right[name].double(), value.double(), rtol=1e-3, atol=1e-5)
    initial = VGG16(LPIPSConfig(width=1 / 16)).state_dict()
    assert any((left[k] - initial[k]).abs().max() > 0.01 for k in initial if k.startswith("features.0"))


def test_classify_equals_the_forward_pass_without_dropout() -> None:
    torch.manual_seed(0)
    model = VGG16(LPIPSConfig(width=1 / 16), classes=3, dropout=0.0, grid=2)
    x = torch.randn(4, 4, 8, 8)
    ours = classify_in_training(model, x, generator(0), 4, slice(0, 4))
    torch.testing.assert_close(ours, model(x))
    model.classifier[2] = nn.Dropout(0.5)  # type: ignore[index]
    full_batch = classify_in_training(model.eval(), x, generator(0), 4, slice(0, 4))
    half = classify_in_training(model.eval(), x[2:], generator(0), 4, slice(2, 4))
    torch.testing.assert_close(half, full_batch[2:])


def test_ranks_share_each_epoch() -> None:
    settings = ClassifyConfig(batch=6)
    stream = plan_batches(settings, 9, 0, slice(0, 6))
    items = [item for _ in range(3) for item in next(stream)]
    assert sorted(items) == [CropItem(row, epoch) for row in range(9) for epoch in range(2)]
    halves = [next(plan_batches(settings, 9, 6, part)) for part in (slice(0, 3), slice(3, 6))]
    assert halves[0] + halves[1] == items[6:12]


def test_shifts_are_integer_and_do_not_depend_on_the_batch_split() -> None:
    settings = ClassifyConfig(batch=4, shift=0.25)
    x = torch.randn(4, 2, 8, 8)
    full_batch = shift_latents(x, settings, 0, slice(0, 4))
    assert torch.equal(shift_latents(x[2:], settings, 0, slice(2, 4)), full_batch[2:]) and not torch.equal(
        full_batch, x
    )
    assert shift_latents(x, ClassifyConfig(), 0, slice(0, 4)) is x


@pytest.mark.parametrize("with_part_names", [False, True])
def test_parquet_files_with_and_without_part_names(tmp_path: Path, with_part_names: bool) -> None:
    save_table(tmp_path / "data" / ("train-0.parquet" if with_part_names else "all.parquet"))
    if with_part_names:
        save_table(tmp_path / "data" / "validation-0.parquet", count=2)
    train, val = open_labeled(str(tmp_path / "data"))
    assert len(train) == 36 and train.classes == ["0", "1", "2"] and train.open(0).size == (40, 36)
    assert (None if val is None else len(val)) == (6 if with_part_names else None)


def test_validation_labels_use_the_training_classes(tmp_path: Path) -> None:
    save_classes(tmp_path / "train", 3)
    save_classes(tmp_path / "val", 2, classes=("green", "red"))
    train, val = open_labeled(str(tmp_path))
    assert val is not None and val.labels.tolist() == [1, 1, 2, 2]
    assert train.labels.bincount().tolist() == [3, 3, 3]
    save_classes(tmp_path / "val2", 1, classes=("green", "pink"))
    with pytest.raises(UserError, match="class pink is not among the 3 training classes"):
        open_labeled(str(tmp_path), str(tmp_path / "val2"))


def break_picture(data: Path) -> None:
    (data / "red" / "03.png").write_bytes(b"\x89PNG no more")


BAD = {
    "no such folder": (lambda data: shutil.rmtree(data), {}, "no such file or folder"),
    "single class": (
        lambda data: [shutil.rmtree(data / name) for name in ("red", "green")],
        {},
        r"all 12 pictures are of one class \(blue\)",
    ),
    "no pictures": (
        lambda data: [shutil.rmtree(data / name) for name in ("red", "green", "blue")],
        {},
        "holds no labeled images",
    ),
    "unreadable": (break_picture, {}, r"03.png is not a readable image .*; remove or replace it"),
    "size": (lambda data: None, {"size": 18}, "size is 18 pixels; .* multiples of 4, 16 or more"),
    "too small": (lambda data: None, {"size": 12}, "size is 12 pixels"),
    "batch": (lambda data: None, {"batch": 64}, "27 training pictures, fewer than a batch of 64"),
    "lr": (lambda data: None, {"optimizer": "sgd", "lr": 1e30}, "loss is (nan|inf).*lower the learning rate"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_a_one_line_error(data: Path, teacher: Path, tmp_path: Path, case: str) -> None:
    damage, settings, message = BAD[case]
    shutil.copytree(data, tmp_path / "data")
    damage(tmp_path / "data")
    with pytest.raises((UserError, FloatingPointError), match=message) as caught:
        train_classifier(config(tmp_path / "data", teacher, **settings), tmp_path / "out")
    assert "\n" not in str(caught.value) and not (tmp_path / "out" / "config.json").exists()


def test_bad_tables_and_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="columns image; expected `image` and `label`"):
        open_labeled(str(save_table(tmp_path / "a.parquet", label=False)))
    with pytest.raises(UserError, match="of one class"):
        open_labeled(str(save_table(tmp_path / "b.parquet", label=7)))
    (tmp_path / "c.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="not a readable parquet"):
        open_labeled(str(tmp_path / "c.parquet"))
    with pytest.raises(SettingError, match="data is not set; give --data"):
        train_classifier(ClassifyConfig(), tmp_path / "out")
    for settings in ({"area": (0.5, 0.1)}, {"batch": 1}, {"held_out": 1.0}, {"minutes": 0.0}):
        with pytest.raises(SettingError, match=next(iter(settings))):
            ClassifyConfig(**settings)  # type: ignore[arg-type]


def test_another_config_and_damaged_latents_are_refused(data: Path, teacher: Path, tmp_path: Path) -> None:
    out, first = tmp_path / "out", config(data, teacher, epochs=1, crops=1)
    train_classifier(first, out)
    with pytest.raises(UserError, match=r"another config: lr \(0.003 -> 0.1\)"):
        train_classifier(replace(first, lr=0.1), out)
    cache = out / "run" / "latents"
    with pytest.raises(UserError, match=r"computed from other inputs: .*size \(16 -> 20\)"):
        train_classifier(replace(first, size=20, cache=str(cache)), tmp_path / "other")
    (shard,) = cache.glob("train-*.npy")
    data_bytes = bytearray(shard.read_bytes())
    data_bytes[-1] ^= 1
    shard.write_bytes(data_bytes)
    with pytest.raises(UserError, match=r"is damaged .*; delete it and run again"):
        train_classifier(first, out)
    shard.unlink()
    assert train_classifier(first, out).images == 36


def test_a_changed_image_invalidates_the_cache(data: Path, teacher: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "data")
    first = config(tmp_path / "data", teacher, epochs=1, crops=1, cache=str(tmp_path / "cache"))
    train_classifier(first, tmp_path / "a")
    shutil.copy(data / "red" / "01.png", tmp_path / "data" / "red" / "00.png")
    with pytest.raises(UserError, match="computed from other inputs: pictures"):
        train_classifier(first, tmp_path / "b")


def test_only_complete_checkpoints_are_left(data: Path, teacher: Path, tmp_path: Path) -> None:
    settings = config(data, teacher, epochs=3, score_epochs=1)
    train_classifier(settings, tmp_path / "out")
    folder = tmp_path / "out" / "run" / "checkpoints"
    last, left = checkpoint.latest(folder), sorted(folder.iterdir())
    assert last is not None and last.nimg == 84 and last.meta["classes"] == ["blue", "green", "red"]
    # A run was killed after its last checkpoint, before it deleted the oldest one.
    shutil.copytree(last.folder, folder / "000000001")
    train_classifier(settings, tmp_path / "out")
    assert sorted(folder.iterdir()) == left and len(left) == checkpoint.CHECKPOINTS_KEPT


def lines_of(out: Path) -> list[dict[str, float]]:
    """Reports without times and speeds."""
    names = ("nimg", "loss", "top1", "top5")
    return [{name: line[name] for name in names} for line in read_stats(out / "run")]


def test_a_kill_before_scoring_or_the_first_checkpoint_has_no_effect(
    data: Path, teacher: Path, tmp_path: Path
) -> None:
    settings = config(data, teacher, epochs=4, score_epochs=2)
    result = train_classifier(settings, tmp_path / "out")
    expected = lines_of(tmp_path / "out")
    stats = tmp_path / "out" / "run" / "stats.jsonl"
    stats.write_text("".join(stats.read_text().splitlines(keepends=True)[:-1]))
    assert train_classifier(settings, tmp_path / "out").top1 == result.top1
    assert lines_of(tmp_path / "out") == expected
    shutil.rmtree(tmp_path / "out" / "run" / "checkpoints")
    train_classifier(settings, tmp_path / "out")
    assert lines_of(tmp_path / "out") == expected


def test_a_signal_saves_and_exits_without_scoring(data: Path, teacher: Path, tmp_path: Path) -> None:
    words = ["lpips", "train", "--json", "--data", str(data), "--latents", str(teacher)]
    settings = {k: list(v) if isinstance(v, tuple) else v for k, v in SETTINGS.items()}
    for name, value in {**settings, "epochs": 4000, "score_epochs": 1000}.items():
        words += ["--set", f"{name}={value}"]
    out = tmp_path / "out"
    running = Running([*words, "--out", str(out)], tmp_path / "job")
    running.wait_for(lambda: "classifier" in running.err.read_text())
    running.send(signal.SIGTERM)
    ended = running.wait()
    assert ended.code == 130 and "safe on disk" in ended.stderr, ended
    last = checkpoint.latest(out / "run" / "checkpoints")
    assert last is not None and last.meta["steps"] * 12 == last.nimg and not read_stats(out / "run")


def test_large_batches_are_encoded_in_parts(data: Path, teacher: Path) -> None:
    vae = pretrained.load_vae(str(teacher))
    sizes: list[int] = []
    vae.encoder.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    train, _ = open_labeled(str(data))
    encoder = CropEncoder(config(data, teacher, posterior="sample"), vae, train, torch.device("cpu"))
    items = [CropItem(row % 36, row // 36) for row in range(150)]
    full_batch = next(encoder.stream([items]))
    assert sizes == [64, 64, 22]
    torch.testing.assert_close(full_batch[100:], next(encoder.stream([items[100:]])), rtol=1e-5, atol=1e-5)


def test_a_run_with_changed_images_or_classes_is_refused(data: Path, teacher: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "data")
    settings = config(tmp_path / "data", teacher, epochs=1)
    train_classifier(settings, tmp_path / "out")
    # Images that have moved are the same.
    (tmp_path / "data").rename(tmp_path / "moved")
    train_classifier(config(tmp_path / "moved", f"{teacher}/", epochs=1), tmp_path / "out")
    (tmp_path / "moved").rename(tmp_path / "data")
    first = tmp_path / "data" / "red" / "00.png"
    known = first.stat()
    shutil.copy(tmp_path / "data" / "red" / "01.png", first)
    with pytest.raises(UserError, match=r"another config: pictures\."):
        train_classifier(settings, tmp_path / "out")
    shutil.copy(data / "red" / "00.png", first)
    os.utime(first, ns=(known.st_atime_ns, known.st_mtime_ns))
    (tmp_path / "data" / "red").rename(tmp_path / "data" / "pink")
    with pytest.raises(UserError, match=r"another config: classes\.names"):
        train_classifier(settings, tmp_path / "out")


def test_table_digests_depend_on_the_bytes_of_cells(tmp_path: Path) -> None:
    a = open_labeled(str(save_table(tmp_path / "a.parquet")))[0]
    same = open_labeled(str(save_table(tmp_path / "b" / "c.parquet")))[0]
    assert a.digest() == same.digest()
    order = [1, 0, *range(2, 36)]
    swapped = replace(a, readers=[a.readers[row] for row in order])
    assert a.digest() not in {swapped.digest(), replace(a, labels=a.labels[order]).digest()}


@pytest.mark.parametrize("held", ["val", "validation", "test"])
def test_a_held_out_folder_beside_the_classes_is_not_used_for_training(tmp_path: Path, held: str) -> None:
    save_classes(tmp_path / "data", 2)
    save_classes(tmp_path / "data" / held, 1)
    train, val = open_labeled(str(tmp_path / "data"))
    assert train.classes == ["blue", "green", "red"] and (len(train), val and len(val)) == (6, 3)
    train, _ = open_labeled(str(tmp_path / "data"), str(save_classes(tmp_path / "other", 1)))
    assert len(train) == 6
    save_table(tmp_path / "tables" / "all.parquet")
    save_table(tmp_path / "tables" / f"{held}-0.parquet", 2)
    train, val = open_labeled(str(tmp_path / "tables"))
    assert (len(train), val and len(val)) == (36, 6)
