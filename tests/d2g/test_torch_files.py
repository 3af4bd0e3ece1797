"""d2g.core.torch_files: files of torch.save are read, and those that would unpack to more are not."""

import pickle
import zipfile
from pathlib import Path

import pytest
import torch

from d2g.core.errors import UserError
from d2g.core.torch_files import load_tensors
from d2g.vision.weights import read_state
from latent_lpips.official_checkpoints import read_official_checkpoint


def save(file: Path, elements: int = 4) -> Path:
    torch.save({"a": torch.zeros(elements), "b": [1, "x"]}, file)
    return file


def repack(source: Path, target: Path, packed: str) -> Path:
    """Copy a zip file with one record, whose name ends like `packed`, compressed."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for record in old.infolist():
            method = zipfile.ZIP_DEFLATED if record.filename.endswith(packed) else zipfile.ZIP_STORED
            new.writestr(record.filename, old.read(record), method)
    return target


@pytest.mark.parametrize("zipped", [True, False])
def test_files_of_torch_save_are_read(zipped: bool, tmp_path: Path) -> None:
    torch.save({"a": torch.arange(3)}, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    assert load_tensors(tmp_path / "a.pt")["a"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("packed", ["data/0", "data.pkl", "version", "serialization_id"])
def test_compressed_records_are_refused(packed: str, tmp_path: Path) -> None:
    bomb = repack(save(tmp_path / "plain.pth", 1 << 22), tmp_path / "bomb.pth", packed)
    with pytest.raises(
        pickle.UnpicklingError, match=rf"record .*{packed} is compressed, from [\d,]+ bytes to"
    ):
        load_tensors(bomb)


def test_every_reader_says_why(tmp_path: Path) -> None:
    bomb = repack(save(tmp_path / "plain.pth", 1 << 22), tmp_path / "bomb.pth", "data/0")
    assert bomb.stat().st_size < 50_000
    for read in (lambda: read_official_checkpoint(bomb), lambda: read_state(bomb, "weights")):
        with pytest.raises(UserError, match=r"bomb.pth.*data/0 is compressed, from 16,777,216 bytes to"):
            read()


def test_records_that_share_bytes_are_refused(tmp_path: Path) -> None:
    """Many entries of the directory point to one record, so the sum is beyond the file."""
    file = tmp_path / "shared.pth"
    with zipfile.ZipFile(save(tmp_path / "plain.pth", 1 << 16)) as old, zipfile.ZipFile(file, "w") as new:
        for record in old.infolist():
            new.writestr(record.filename, old.read(record))
        large = max(new.infolist(), key=lambda record: record.file_size)
        new.filelist += [large] * 10
    with pytest.raises(pickle.UnpicklingError, match=r"claim [\d,]+ bytes from byte 0 of a file of"):
        load_tensors(file)


def test_a_second_directory_before_the_first_is_refused(tmp_path: Path) -> None:
    """Python's zipfile corrects the places of records behind other data; torch does not."""
    plain = save(tmp_path / "plain.pth").read_bytes()
    (tmp_path / "two.pth").write_bytes(plain + plain)
    with pytest.raises(pickle.UnpicklingError, match=rf"from byte {len(plain)} of"):
        load_tensors(tmp_path / "two.pth")


def test_damaged_files_raise_errors(tmp_path: Path) -> None:
    plain = save(tmp_path / "plain.pth").read_bytes()
    for end in (0, 3, 4, 100, len(plain) - 30):
        (tmp_path / "cut.pth").write_bytes(plain[:end])
        with pytest.raises((pickle.UnpicklingError, EOFError, RuntimeError)):
            load_tensors(tmp_path / "cut.pth")
