"""d2g.core.distributed.sharded_checkpoint: round trips, refusal of damaged files, and pruning."""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from d2g.core.distributed import checkpoint, sharded_checkpoint
from d2g.core.distributed.checkpoint import Checkpoint, complete_points
from d2g.core.errors import UserError


def trained(seed: int, width: int = 4) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A network after two steps, and its optimizer."""
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Linear(width, 1))
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        network(torch.randn(8, 3)).square().mean().backward()
        optimizer.step()
    return network, optimizer


def save(folder: Path, nimg: int, seed: int, **settings: object) -> sharded_checkpoint.Writer:
    network, optimizer = trained(seed)
    writer = sharded_checkpoint.Writer(folder, **settings)  # type: ignore[arg-type]
    writer.save(nimg, tensors_of(network, optimizer), {"ema": network.state_dict()}, {"steps": 2})
    return writer


def tensors_of(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    memory = sharded_checkpoint.optimizer_tensors("optim.net", optimizer, network)
    return sharded_checkpoint.network_tensors("net", network) | memory


def newest(folder: Path) -> Checkpoint:
    last = checkpoint.latest(folder)
    assert last is not None
    return last


def test_writing_in_the_background_never_waits_for_the_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a GPU, torch writes 10 MB at a time and waits after each for all that training has queued, also
    for copies that are on the CPU already."""
    waits, (network, optimizer) = list[str](), trained(0)
    stream = SimpleNamespace(device_type="cuda", synchronize=lambda: waits.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    writer = sharded_checkpoint.Writer(tmp_path, background=True)
    writer.save(8, tensors_of(network, optimizer), {"ema": network.state_dict()}, {"steps": 2})
    writer.finish()
    assert complete_points(tmp_path) == [8] and not waits


def test_training_continues_identically_after_loading(tmp_path: Path) -> None:
    """Weights, buffers and optimizer states are loaded into a network that was never trained."""
    save(tmp_path, 8, seed=0)
    network, optimizer = trained(0)
    torch.manual_seed(5)
    loaded_network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    other = torch.optim.AdamW(loaded_network.parameters(), lr=0.1)
    last = newest(tmp_path)
    sharded_checkpoint.verify(last)
    sharded_checkpoint.load(last, "net", loaded_network, other)
    for net, optim in ((network, optimizer), (loaded_network, other)):
        optim.zero_grad()
        net(torch.ones(8, 3).cumsum(0)).square().mean().backward()
        optim.step()
    for name, value in network.state_dict().items():
        assert torch.equal(value, loaded_network.state_dict()[name]), name
    assert (last.nimg, last.meta["steps"], last.meta["processes"]) == (8, 2, 1)
    assert set(last.tensors("ema")) == set(network.state_dict())


@pytest.mark.parametrize("background", [False, True])
def test_a_checkpoint_is_a_snapshot(background: bool, tmp_path: Path) -> None:
    """Training continues while a checkpoint is written; the checkpoint has the weights from before."""
    network, optimizer = trained(0)
    before = {k: v.clone() for k, v in tensors_of(network, optimizer).items()}
    writer = sharded_checkpoint.Writer(tmp_path, background=background)
    writer.save(4, tensors_of(network, optimizer), {"ema": network.state_dict()}, {})
    with torch.no_grad():
        for value in tensors_of(network, optimizer).values():
            value.zero_()
    writer.finish()
    assert writer.done
    state = sharded_checkpoint.read(newest(tmp_path))
    assert state.keys() == before.keys() and all(torch.equal(state[k], v) for k, v in before.items())


def test_pruning_keeps_the_newest_and_protected_checkpoints(tmp_path: Path) -> None:
    for nimg in (4, 8, 12, 16):
        save(tmp_path, nimg, seed=0, keep=2, spare={"000000004"})
    assert checkpoint.complete_points(tmp_path) == [4, 12, 16]


def test_leftovers_of_a_killed_writer_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".000000004.tmp" / "state").mkdir(parents=True)
    save(tmp_path, 8, seed=0)
    assert [path.name for path in tmp_path.iterdir()] == ["000000008"]


@pytest.mark.parametrize("damage", ["truncated", "missing", "foreign", "flipped", "no metadata", "no ema"])
def test_damage_is_reported(damage: str, tmp_path: Path) -> None:
    save(tmp_path / "run", 8, seed=0)
    save(tmp_path / "other", 8, seed=1)
    last = newest(tmp_path / "run")
    shard = last.folder / "state" / "__0_0.distcp"
    if damage == "truncated":
        shard.write_bytes(shard.read_bytes()[:-100])
    elif damage == "missing":
        shard.unlink()
    elif damage == "foreign":
        shutil.copy(tmp_path / "other" / "000000008" / "state" / shard.name, shard)
    elif damage == "flipped":
        data = bytearray(shard.read_bytes())
        data[len(data) // 2] ^= 1
        shard.write_bytes(data)
    elif damage == "no metadata":
        shard = last.folder / "state" / ".metadata"
        shard.unlink()
    else:
        shard = last.folder / "ema.safetensors"
        shard.unlink()
    with pytest.raises(
        UserError, match=r"delete .*000000008 to continue from the checkpoint before it"
    ) as caught:
        sharded_checkpoint.verify(last)
    assert str(caught.value).startswith(str(shard))
    assert ("is missing" in str(caught.value)) == (damage in ("missing", "no metadata", "no ema"))


def test_metadata_without_its_files_is_one_line(tmp_path: Path) -> None:
    save(tmp_path, 8, seed=0)
    meta = tmp_path / "000000008" / "meta.json"
    values = json.loads(meta.read_text())
    del values["files"]
    meta.write_text(json.dumps(values))
    with pytest.raises(
        UserError, match=r"is not in the list of files in .*meta\.json; delete .*000000008 to"
    ):
        sharded_checkpoint.verify(newest(tmp_path))


def test_a_network_with_other_parameter_names_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 8, seed=0)
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1), nn.Linear(1, 1))
    with pytest.raises(UserError, match=r"net\.3\.bias is in the checkpoint or in the network, not in both"):
        sharded_checkpoint.load(newest(tmp_path), "net", network, torch.optim.AdamW(network.parameters()))
