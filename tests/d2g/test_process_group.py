"""d2g.core.distributed.process_group: two gloo processes agree with one; a single process changes nothing."""

import ctypes
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._C._distributed_c10d import HashStore

from d2g.core.distributed import process_group
from d2g.core.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:Please use the new API settings to control TF32:UserWarning")
"""torch 2.9 says so at the first look at the interface that the project and inductor use."""

ROOT = Path(__file__).resolve().parents[2]

WORKER = """
import json, sys
import torch
from torch import nn
from d2g.core.distributed import process_group

rank_before = process_group.rank()
device = process_group.init()
rank = process_group.rank()
assert (process_group.world_size(), rank_before, device.type) == (2, rank, "cpu")

torch.manual_seed(rank)
net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
process_group.broadcast(net.state_dict().values())

x = torch.arange(24.0).view(8, 3).cos()[rank * 4 : rank * 4 + 4]
frozen, idle = nn.Parameter(torch.ones(2), requires_grad=False), nn.Parameter(torch.ones(2))
net(x).square().mean().backward()
x.requires_grad_(True)  # a second backward pass of second order adds to the same gradients, as R1 does
(slope,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
slope.square().mean().backward()
if rank == 0:
    idle.grad = torch.tensor([2.0, 4.0])
process_group.average_gradients([*net.parameters(), frozen, idle])

result = {
    "weights": [p.tolist() for p in net.parameters()],
    "gradients": [p.grad.tolist() for p in net.parameters()],
    "idle": idle.grad.tolist(),
    "frozen": frozen.grad is None,
    "mean": process_group.mean({"b": 1.0 + rank, "a": 10.0 * rank}),
    "any": [process_group.any_rank(rank == 1), process_group.any_rank(False)],
}
open(f"{sys.argv[1]}/{rank}.json", "w").write(json.dumps(result))
process_group.side_group()
process_group.barrier()
process_group.finish()
"""


def test_two_processes_equal_one(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(script),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "", "the gloo of torch 2.9 reports its connections, not where results are printed"
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second, "every rank holds the same weights, gradients and means"

    torch.manual_seed(0)  # broadcast copied rank 0's weights to all ranks
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    for weight, got in zip(net.parameters(), first["weights"], strict=True):
        assert torch.equal(weight, torch.tensor(got))
    x = torch.arange(24.0).view(8, 3).cos().requires_grad_(True)
    (slope,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    (net(x).square().mean() + slope.square().mean()).backward()
    for weight, got in zip(net.parameters(), first["gradients"], strict=True):
        torch.testing.assert_close(torch.tensor(got), weight.grad, atol=1e-6, rtol=1e-6)
    assert first["idle"] == [1.0, 2.0], "a rank without a gradient counts as zero"
    assert first["frozen"] is True
    assert first["mean"] == {"a": 5.0, "b": 1.5} and first["any"] == [True, False]


def test_what_c_code_prints_while_a_group_is_made_goes_to_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    libc = ctypes.CDLL(None)
    with process_group.stdout_to_stderr():
        libc.puts(b"[Gloo] Rank 0 is connected")
    libc.puts(b"results")
    libc.fflush(None)
    assert capfd.readouterr() == ("results\n", "[Gloo] Rank 0 is connected\n")


def test_a_single_process_is_rank_0_of_1() -> None:
    weight = nn.Parameter(torch.ones(2))
    weight.grad = torch.tensor([1.0, 2.0])
    process_group.average_gradients([weight])
    process_group.broadcast([weight.data])
    process_group.barrier()
    process_group.finish()
    assert (process_group.rank(), process_group.world_size()) == (0, 1)
    assert weight.grad.tolist() == [1.0, 2.0]
    assert (
        process_group.mean({"a": 3.0}) == {"a": 3.0}
        and process_group.any_rank(True)
        and not process_group.any_rank(False)
    )


def test_rank_is_known_from_the_launcher_before_init(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert (process_group.rank(), process_group.world_size()) == (3, 8)


@pytest.mark.parametrize("late", [0, 1, 2])
def test_each_start_agrees_on_a_unique_name_in_a_persistent_store(late: int) -> None:
    """Keys that an earlier start left in the store have no effect, for any order of arrival."""
    store = HashStore()

    def join(rank: int) -> str:
        time.sleep(0.2 if rank == late else 0)
        return process_group.agree_on_name(store, rank, 3)

    with ThreadPoolExecutor(3) as pool:
        names = [set(pool.map(join, range(3))) for _ in range(3)]
    assert [len(of_a_start) for of_a_start in names] == [1, 1, 1]
    assert len(set.union(*names)) == 3


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "4", "RANK": "1"}, "WORLD_SIZE is 4, but LOCAL_RANK is not set"),
        (
            {"WORLD_SIZE": "4", "RANK": "2", "LOCAL_RANK": "2"},
            "LOCAL_RANK is 2, but this process sees 2 GPUs",
        ),
    ],
)
def test_a_process_without_a_gpu_of_its_own_is_refused(environment: dict[str, str], message: str) -> None:
    with on_two_gpus(environment) as calls:
        with pytest.raises(UserError, match=message) as caught:
            process_group.init()
        assert "\n" not in str(caught.value) and not calls


def test_the_gpu_is_chosen_before_the_group_is_joined() -> None:
    with on_two_gpus({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}) as calls:
        assert process_group.init() == torch.device("cuda", 1)
        assert calls == ["set_device 1", "init_process_group cpu:gloo,cuda:nccl"]
    with on_two_gpus({}) as calls:
        assert process_group.init() == torch.device("cuda", 0) and calls == ["set_device 0"]


def test_ranks_with_long_waits_exchange_gradients_by_nccl_too() -> None:
    """`d2g run` trains in the group with which it makes the pairs."""
    with on_two_gpus({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}) as calls:
        process_group.init(long_waits=True)
        assert calls == ["set_device 1", "init_process_group cpu:gloo,cuda:nccl"]


def test_tests_without_the_mark_gpu_see_no_gpu() -> None:
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "" and not torch.cuda.is_available()


def test_work_of_one_process_joins_no_group_and_is_exact() -> None:
    with on_two_gpus({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}) as calls:
        torch.backends.cudnn.allow_tf32 = True
        assert process_group.own_device() == torch.device("cuda", 1) and calls == ["set_device 1"]
        assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32


@contextmanager
def on_two_gpus(environment: dict[str, str]) -> Iterator[list[str]]:
    """Let torch report two GPUs, and record what is asked of it."""
    calls: list[str] = []

    def join(backend: str, **_: object) -> None:
        calls.append(f"init_process_group {backend}")

    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    with pytest.MonkeyPatch.context() as patch:
        for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "TORCHELASTIC_USE_AGENT_STORE"):
            patch.delenv(name, raising=False)
        for name, value in environment.items():
            patch.setenv(name, value)
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "device_count", lambda: 2)
        patch.setattr(torch.cuda, "set_device", lambda number: calls.append(f"set_device {number}"))
        patch.setattr(torch.distributed, "init_process_group", join)
        yield calls
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
