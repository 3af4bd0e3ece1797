"""A full disk and a small /dev/shm, with real file systems: one line of error, and no waiting."""

from pathlib import Path

import pytest

from jobs import Ended, Running, can_mount, distill_arguments, distill_config
from labeled import save_classes
from own_pictures import image_folder, train_arguments
from stores import FORKS

pytestmark = FORKS


@pytest.fixture(scope="module", autouse=True)
def mounts() -> None:
    """Skip the tests where this user may not mount file systems."""
    if not can_mount():
        pytest.skip("mounting needs root")


def run_on_disk(arguments: list[str], disk: Path, kib: int, log: Path) -> Ended:
    """Run a command while `disk` is a disk of `kib` KiB."""
    return Running(arguments, log, disks={disk: kib << 10}).wait()


def check(ended: Ended, kib: int) -> None:
    """Fail unless the command succeeded or said in one line that space is missing."""
    assert ended.code in (0, 1), (kib, ended)
    if ended.code:
        assert "space" in ended.error and "this is unexpected" not in ended.error, (kib, ended)


def distill(teacher: Path, pairs: Path, disk: Path) -> list[str]:
    """A run that writes reports, previews, a validation and checkpoints."""
    config = distill_config(teacher, pairs, "train.preview_prompts=4", "train.checkpoint_images=8")
    return distill_arguments(config, disk / "run")


def test_a_full_disk_during_training(teacher: Path, pairs: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    ended = run_on_disk(distill(teacher, pairs, disk), disk, 40, tmp_path / "log")
    assert ended.code == 1
    check(ended, 40)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kib", [8, 24, 256, *(pytest.param(n, marks=pytest.mark.long) for n in (4, 12, 16, 64, 512, 1024))]
)
def test_full_disks_of_many_sizes_during_training(
    kib: int, teacher: Path, pairs: Path, tmp_path: Path
) -> None:
    check(
        run_on_disk(distill(teacher, pairs, tmp_path / "disk"), tmp_path / "disk", kib, tmp_path / "log"), kib
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "kib", [60, 800, *(pytest.param(n, marks=pytest.mark.long) for n in (4, 16, 100, 200, 400, 1600, 3200))]
)
@pytest.mark.parametrize("command", ["teacher train", "lpips train", "sample", "export", "eval run"])
def test_full_disks_of_many_sizes(command: str, kib: int, teacher: Path, tmp_path: Path) -> None:
    disk, data = tmp_path / "disk", tmp_path / "data"
    out = str(disk / "out")
    if command == "teacher train":
        data.mkdir()
        image_folder(data)
        arguments = train_arguments(data, disk / "out", "--images", "16", stages="data,vae,unet,lpips,clip")
    elif command == "lpips train":
        words = (
            f"--data {save_classes(data)} --latents {teacher} --out {out} --set size=16 --set width=0.0625"
        )
        sets = "--set grid=1 --set batch=12 --set epochs=2 --set crops=2 --set optimizer=adamw --set lr=0.001"
        arguments = ["lpips", "train", *words.split(), *sets.split()]
    elif command == "sample":
        arguments = ["sample", "--student", "miniature", "--prompt", "a", "--num", "4", "--out", out]
    elif command == "export":
        arguments = ["export", "--student", "miniature", "--out", out]
    else:
        words = "--student miniature --protocol miniature --metrics caption_accuracy --num 8 --allow-fewer"
        arguments = ["eval", "run", *words.split(), "--out", out]
    check(run_on_disk(arguments, disk, kib, tmp_path / "log"), kib)


@pytest.mark.parametrize("kib", [4, 64])
def test_a_small_shared_memory_ends_a_run_with_one_line(
    kib: int, teacher: Path, pairs: Path, tmp_path: Path
) -> None:
    """Loader processes pass batches through /dev/shm."""
    config = distill_config(teacher, pairs, "train.loader_workers=2")
    arguments = distill_arguments(config, tmp_path / "run")
    ended = Running(arguments, tmp_path / "log", disks={Path("/dev/shm"): kib << 10}).wait()
    assert ended.code in (0, 1), ended
    if kib == 4:
        assert ended.code == 1 and "loader process" in ended.error and "/dev/shm" in ended.error
