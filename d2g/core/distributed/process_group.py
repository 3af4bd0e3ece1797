"""The one door to torch.distributed. Everything runs without a process group as rank 0 of 1."""

import os
import time
from collections.abc import Iterable
from contextlib import suppress
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar
from uuid import uuid4

import torch
import torch.distributed as td
from torch import Tensor
from torch._C._distributed_c10d import GradBucket, HashStore, PrefixStore, Store, TCPStore

from d2g.core.signals import StopFlag

T = TypeVar("T")

PATIENCE = timedelta(minutes=30)
"""How long a process waits for the others to start."""

GRACE = timedelta(seconds=10)
"""How long a process that ends waits for rank 0 to end likewise."""

STEP = timedelta(seconds=2)
"""The same once rank 0 has come to the others: they work in step, and what all find they find together."""


def init(patient: bool = False) -> torch.device:
    """Join the process group that torchrun announced, if any; return this process's device.

    `patient`: for ranks that meet at the start and at the end of days of work only. NCCL would give up after
    minutes.
    """
    if "RANK" in os.environ and not td.is_initialized():
        if patient:
            _join("gloo", timedelta(days=30))
        else:
            _join(_backend())
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cuda", torch.cuda.current_device())


def _join(backend: str, timeout: timedelta | None = None) -> None:
    if not by_torchrun():  # rank 0 has a store of its own, a new one
        td.init_process_group(backend, timeout=timeout)
        return
    kept = _kept(PATIENCE)
    if rank() == 0:
        kept.set(_key("come"), "")
    fresh = PrefixStore(agree(kept, rank(), world_size()), kept)
    td.init_process_group(backend, timeout=timeout, store=fresh, rank=rank(), world_size=world_size())


def agree(store: Store, rank: int, world_size: int) -> str:
    """A name that is known to the processes of this start alone; call on every rank.

    torchrun's store outlives its restarts: whoever comes first after one would find the others' addresses of
    before it, and connect to nobody (torch 2.15; pytorch/pytorch#135712). So each rank tells rank 0 a number
    of its own, and what is answered to that number cannot be old. Raises DistStoreError when others never
    come.
    """
    mine, end = uuid4().hex, time.monotonic() + PATIENCE.total_seconds()
    if rank:
        store.set(f"hello/{rank}", mine)
        name = str(store.get(f"name/{mine}").decode())
        store.set(f"heard/{name}/{rank}", "")
        return name
    missing = set(range(1, world_size))
    while missing:
        for other in sorted(missing):
            if store.check([f"hello/{other}"]):
                store.set(f"name/{store.get(f'hello/{other}').decode()}", mine)
            if store.check([f"heard/{mine}/{other}"]):
                missing.remove(other)
        if time.monotonic() > end:
            raise td.DistStoreError(f"ranks {sorted(missing)} did not come within {PATIENCE}")
        time.sleep(0.02)
    return mine


def by_torchrun() -> bool:
    """Whether torchrun started this process, and keeps a store for it and its like."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def publish_final_error(text: str) -> None:
    """Tell the others what rank 0 has printed as its last: call there, under torchrun."""
    with suppress(RuntimeError):  # the store is gone: they print it themselves
        _kept(GRACE).set(_key("word"), text)


def rank_0_published(text: str) -> bool:
    """Whether rank 0 prints `text` as its last too: call elsewhere, under torchrun. Waits for as long as it
    may need to get there, or until this process is told to end.
    """
    begun = time.monotonic()
    try:
        kept, word, come = _kept(GRACE), _key("word"), _key("come")
        with StopFlag() as stop:
            while not kept.check([word]) and not stop:
                if time.monotonic() - begun > (STEP if kept.check([come]) else GRACE).total_seconds():
                    break
                time.sleep(0.02)
        return bool(kept.check([word]) and kept.get(word).decode() == text)
    except RuntimeError:  # the store is gone, and with it what was said
        return False


def _key(name: str) -> str:
    return f"{name}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"  # of this start, not of one before


def _kept(timeout: timedelta) -> TCPStore:
    """torchrun's own store, which outlives its workers."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return TCPStore(host, port, is_master=False, timeout=timeout)


def join_alone() -> None:
    """A process group of one, where torchrun announced none: FSDP2 needs one."""
    if not td.is_initialized():
        td.init_process_group(_backend(), store=HashStore(), rank=0, world_size=1)


LOST = (
    "Connection closed by peer",
    "Connection reset",
    "Broken pipe",
    "Socket closed",
    "remote process exited",
)


def lost_peer(error: BaseException) -> bool:
    """Whether an exchange failed because another process is gone."""
    return isinstance(error, td.DistBackendError | td.DistNetworkError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in LOST)
    )


def joined() -> bool:
    """Whether this process is in a group."""
    return td.is_initialized()


@cache
def side_group() -> td.ProcessGroup:
    """A second gloo group of all ranks, for a thread that must not disturb the first. Call on every rank."""
    group = td.new_group(backend="gloo")
    assert isinstance(group, td.ProcessGroup)  # this rank is in it
    return group


def _backend() -> str:
    """gloo also beside nccl: for flags and checkpoints, which are on the CPU."""
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"


def finish() -> None:
    """Leave the process group, if there is one."""
    if td.is_initialized():
        side_group.cache_clear()
        td.destroy_process_group()


def rank() -> int:
    """This process's rank, 0 alone. Known from torchrun's environment before `init`."""
    return td.get_rank() if td.is_initialized() else int(os.environ.get("RANK", 0))


def world_size() -> int:
    """Number of processes, 1 alone."""
    return td.get_world_size() if td.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))


def barrier() -> None:
    """Wait for all ranks."""
    if td.is_initialized():
        td.barrier()


def mean(values: dict[str, float]) -> dict[str, float]:
    """The mean over ranks of each value; every rank must give the same keys."""
    if not td.is_initialized():
        return values
    names = sorted(values)
    tensor = torch.tensor([values[n] for n in names], dtype=torch.float64)
    td.all_reduce(tensor)
    return dict(zip(names, (tensor / td.get_world_size()).tolist(), strict=True))


def gather_objects(value: T) -> list[T]:
    """Every rank's small picklable value, in rank order, on every rank."""
    if not td.is_initialized():
        return [value]
    values: list[Any] = [None] * td.get_world_size()
    td.all_gather_object(values, value)
    return values


def any_rank(flag: bool) -> bool:
    """Whether `flag` holds on any rank."""
    return mean({"flag": float(flag)})["flag"] > 0


def any_of(flags: dict[str, bool]) -> dict[str, bool]:
    """Which of the flags hold on any rank, in one exchange."""
    return {name: value > 0 for name, value in mean({k: float(v) for k, v in flags.items()}).items()}


def gather(rows: Tensor) -> list[Tensor]:
    """Every rank's rows [n_r, ...], in rank order, on every rank. Only n_r may differ between ranks."""
    if not td.is_initialized():
        return [rows]
    counts = [torch.zeros(1, dtype=torch.int64) for _ in range(td.get_world_size())]
    td.all_gather(counts, torch.tensor([len(rows)]))
    longest = max(1, *(int(count) for count in counts))  # gloo takes no empty tensors
    padded = torch.zeros(longest, *rows.shape[1:], dtype=rows.dtype)
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in counts]
    td.all_gather(parts, padded)
    return [part[: int(count)].to(rows.device) for part, count in zip(parts, counts, strict=True)]


def average_in_order(_: object, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    """DDP's hook for gloo, which sums the parts of a buffer in orders that differ by place: the mean over
    ranks, summed in rank order. DDP moves gradients to other places after a run's first step, so that with
    three processes or more a resumed run would differ from an unbroken one by rounding.
    """
    own, size = bucket.buffer(), td.get_world_size()
    parts = [torch.empty_like(own) for _ in range(size)]
    work = td.all_gather(parts, own, async_op=True)
    assert work is not None
    return work.get_future().then(lambda _: sum(parts[1:], start=parts[0]).div_(size))


def broadcast(tensors: Iterable[Tensor]) -> None:
    """Overwrite every rank's tensors with rank 0's, in place."""
    if td.is_initialized():
        for tensor in tensors:
            td.broadcast(tensor, 0)


class _Mean(torch.autograd.Function):
    """Its gradient is the mean over ranks again: every rank's loss depends on every rank's value."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _averaged(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _averaged(gradient)


def _averaged(x: Tensor) -> Tensor:
    x = x.clone()
    td.all_reduce(x)
    return x / td.get_world_size()


def all_mean(x: Tensor) -> Tensor:
    """The mean over ranks of each element, on every rank; of one shape everywhere. Differentiable: with
    `average_gradients` behind it, the gradient is that of the mean of the ranks' losses."""
    mean: Tensor = _Mean.apply(x) if td.is_initialized() else x
    return mean


@torch.no_grad()
def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Replace each gradient by its mean over ranks, in one flat all-reduce.

    Without a wrapper around the module, a second-order R1 pass and a plain pass may both add to `.grad` and
    the result is still exact; through DDP two backward passes are silently wrong. A parameter without a
    gradient on some rank counts as zero there.
    """
    if not td.is_initialized():
        return
    parameters = [p for p in parameters if p.requires_grad]
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    flat = torch.cat([p.grad.reshape(-1) for p in parameters if p.grad is not None])
    td.all_reduce(flat)
    flat /= td.get_world_size()
    start = 0
    for p in parameters:
        assert p.grad is not None
        p.grad.copy_(flat[start : start + p.numel()].view_as(p))
        start += p.numel()
