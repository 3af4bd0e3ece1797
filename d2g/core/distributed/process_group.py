"""Access to torch.distributed. Without a process group every function acts as rank 0 of 1.

The final error of a failed run is published in torchrun's store, so that one `error:` line is printed and not
one per rank. `torch.distributed.elastic.multiprocessing.errors.record` does not replace this: under it each
rank still prints its own error and torchrun repeats all of them (measured: 73 lines for two ranks), and the
import of torch that it needs would delay `--help` by seconds.
"""

import ctypes
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar
from uuid import uuid4

import torch
import torch.distributed as td
from torch import Tensor
from torch._C._distributed_c10d import GradBucket, HashStore, PrefixStore, Store, TCPStore

from d2g.core.allocator import keep_freed_memory
from d2g.core.environment import unusable_gpus
from d2g.core.errors import UserError, first_line
from d2g.core.logs import log_once
from d2g.core.precision import set_exact_fp32
from d2g.core.signals import StopFlag

T = TypeVar("T")

JOIN_TIMEOUT = timedelta(minutes=30)
"""How long a rank waits for the others to start."""

GRACE = timedelta(seconds=10)
"""How long a failing rank waits for rank 0 to publish the same error."""

GRACE_IN_STEP = timedelta(seconds=2)
"""The same once rank 0 has joined the group: from then on, errors of all ranks come together."""


def init(long_waits: bool = False) -> torch.device:
    """Join the process group that torchrun announced, if any; return this process's device.

    long_waits: for ranks that communicate only at the start and at the end of days of work, where the others
    wait as long. Raises UserError if it is not clear which GPU is this process's.
    """
    if "RANK" not in os.environ and world_size() > 1:
        raise UserError(
            f"WORLD_SIZE is {world_size()} in the environment, but RANK is not set; start the processes with "
            "torchrun or `d2g launch`, or unset WORLD_SIZE"
        )
    device = own_device()  # before the group: NCCL takes the GPU that is current then
    if "RANK" in os.environ and not td.is_initialized():
        _join(_backend(), timedelta(days=30) if long_waits else None)
    return device


def own_device() -> torch.device:
    """This process's GPU, made the current one, or the CPU without a GPU, with exact fp32. For work of one
    process, which joins no group.

    Raises UserError if it is not clear which GPU is this process's.
    """
    keep_freed_memory()
    device = _gpu_or_cpu()
    set_exact_fp32(device)
    return device


def _gpu_or_cpu() -> torch.device:
    if not torch.cuda.is_available():
        if reason := unusable_gpus():
            log_once(f"computing on the CPU: {reason}", level=logging.WARNING)
        return torch.device("cpu")
    if "LOCAL_RANK" not in os.environ and world_size() > 1:
        raise UserError(
            f"WORLD_SIZE is {world_size()}, but LOCAL_RANK is not set, so all processes would use GPU 0; "
            "start them with torchrun, or set LOCAL_RANK to the number of the process on its machine"
        )
    number, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if number >= count:
        raise UserError(
            f"LOCAL_RANK is {number}, but this process sees {count} GPU{'s' * (count > 1)}; start no more "
            "processes than GPUs on a machine, or set LOCAL_RANK=0 where each process sees its own GPU only"
        )
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def _join(backend: str, timeout: timedelta | None = None) -> None:
    if not by_torchrun():  # the default store, which rank 0 creates
        try:
            with stdout_to_stderr():
                td.init_process_group(backend, timeout=timeout)
        except (ValueError, td.DistNetworkError) as error:
            # A variable is missing or is no number, the port is in use, or rank 0 does not answer.
            raise UserError(
                f"process {rank()} cannot join a group of {world_size()} ({first_line(error)}); start the "
                "processes with torchrun or `d2g launch`, set MASTER_ADDR and a free MASTER_PORT, or unset "
                "RANK"
            ) from error
        return
    store = _torchrun_store(JOIN_TIMEOUT)
    if rank() == 0:
        store.set(_key("joined"), "")
    fresh = PrefixStore(agree_on_name(store, rank(), world_size()), store)
    with stdout_to_stderr():
        td.init_process_group(backend, timeout=timeout, store=fresh, rank=rank(), world_size=world_size())


@contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """Send what C++ code writes to standard output to standard error. Wrap the making of groups in it.

    The gloo of torch 2.9 reports every connection on standard output, where a command prints its results.
    """
    if sys.stdout is None or sys.stderr is None:  # closed by the caller: nobody reads them
        yield
        return
    sys.stdout.flush()
    original = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        ctypes.CDLL(None).fflush(None)  # C's buffer, before it would go to the original
        os.dup2(original, 1)
        os.close(original)


def agree_on_name(store: Store, rank: int, world_size: int) -> str:
    """A name that only the ranks of this start know. Call on every rank.

    torchrun's store outlives its restarts: after one, the first rank would read the addresses of the previous
    start and connect to nobody (torch 2.15; pytorch/pytorch#135712). So each rank sends rank 0 a random
    token, and an answer to that token cannot be old. Raises DistStoreError when other ranks never come.
    """
    token, deadline = uuid4().hex, time.monotonic() + JOIN_TIMEOUT.total_seconds()
    if rank:
        # Send the token, wait for the name that answers it, and confirm.
        store.set(f"hello/{rank}", token)
        name = str(store.get(f"name/{token}").decode())
        store.set(f"heard/{name}/{rank}", "")
        return name
    # Rank 0: its own token is the name. Answer all tokens until every rank has confirmed.
    missing = set(range(1, world_size))
    while missing:
        for other in sorted(missing):
            if store.check([f"hello/{other}"]):
                store.set(f"name/{store.get(f'hello/{other}').decode()}", token)
            if store.check([f"heard/{token}/{other}"]):
                missing.remove(other)
        if time.monotonic() > deadline:
            raise td.DistStoreError(f"ranks {sorted(missing)} did not come within {JOIN_TIMEOUT}")
        time.sleep(0.02)
    return token


def by_torchrun() -> bool:
    """Whether torchrun started this process and provides a store for its ranks."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def publish_final_error(text: str) -> None:
    """On rank 0 under torchrun: publish the final error so that other ranks do not print it again."""
    with suppress(RuntimeError):  # the store is gone: the other ranks print the error themselves
        _torchrun_store(GRACE).set(_key("error"), text)


def rank_0_published(text: str) -> bool:
    """On a rank above 0 under torchrun: whether rank 0 publishes the same final error.

    Waits for rank 0 for up to `GRACE`, or until a signal asks this process to stop.
    """
    start = time.monotonic()
    try:
        store, error, joined = _torchrun_store(GRACE), _key("error"), _key("joined")
        with StopFlag() as stop:
            # Once rank 0 has joined the group, its errors come together with ours: wait for less time.
            while not store.check([error]) and not stop:
                grace = GRACE_IN_STEP if store.check([joined]) else GRACE
                if time.monotonic() - start > grace.total_seconds():
                    break
                time.sleep(0.02)
        return bool(store.check([error]) and store.get(error).decode() == text)
    except RuntimeError:  # the store is gone
        return False


def _key(name: str) -> str:
    """A key of this start, which differs from those of earlier starts."""
    return f"{name}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"


def _torchrun_store(timeout: timedelta) -> TCPStore:
    """torchrun's store, which outlives its workers."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return TCPStore(host, port, is_master=False, timeout=timeout)


def init_single_process() -> None:
    """Join a process group of one if there is none: FSDP2 needs a group."""
    if not td.is_initialized():
        with stdout_to_stderr():
            td.init_process_group(_backend(), store=HashStore(), rank=0, world_size=1)


LOST_PEER_ERRORS = (
    "Connection closed by peer",
    "Connection reset",
    "Broken pipe",
    "Socket closed",
    "remote process exited",
)


LOST_NCCL_PEER_ERRORS = (*LOST_PEER_ERRORS, "ncclRemoteError", "by remote peer")
"""What NCCL's errors say where another process is gone. Its other errors are about this machine."""


def lost_peer(error: BaseException) -> bool:
    """Whether a communication failed because another process is gone."""
    if isinstance(error, RuntimeError) and "NCCL error" in str(error):
        return any(text in str(error) for text in LOST_NCCL_PEER_ERRORS)
    return isinstance(error, td.DistBackendError | td.DistNetworkError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in LOST_PEER_ERRORS)
    )


def joined() -> bool:
    """Whether this process is in a group."""
    return td.is_initialized()


@cache
def side_group() -> td.ProcessGroup:
    """A second gloo group of all ranks, for a background thread. Call on every rank."""
    with stdout_to_stderr():
        group = td.new_group(backend="gloo")
    assert isinstance(group, td.ProcessGroup)  # this rank is in it
    return group


def _backend() -> str:
    """gloo for CPU tensors (flags and checkpoints), nccl for CUDA tensors."""
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"


def finish() -> None:
    """Leave the process group, if there is one."""
    if td.is_initialized():
        side_group.cache_clear()
        td.destroy_process_group()


def rank() -> int:
    """This process's rank, 0 without a group. Before `init` it comes from torchrun's environment."""
    return td.get_rank() if td.is_initialized() else int(os.environ.get("RANK", 0))


def world_size() -> int:
    """Number of ranks, 1 without a group. Before `init` it comes from torchrun's environment."""
    return td.get_world_size() if td.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))


def barrier() -> None:
    """Wait for all ranks."""
    if td.is_initialized():
        td.barrier()


def mean(values: dict[str, float]) -> dict[str, float]:
    """The mean over ranks of each value. Every rank passes the same keys."""
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
    """Whether `flag` is true on any rank."""
    return mean({"flag": float(flag)})["flag"] > 0


def any_of(flags: dict[str, bool]) -> dict[str, bool]:
    """For each flag, whether it is true on any rank, in one all-reduce."""
    return start_any_of(flags)()


def start_any_of(flags: dict[str, bool]) -> Callable[[], dict[str, bool]]:
    """Start `any_of` in the background. The returned function waits for the slowest rank."""
    if not td.is_initialized():
        return lambda: flags
    names = sorted(flags)
    tensor = torch.tensor([float(flags[name]) for name in names])
    work = td.all_reduce(tensor, async_op=True)
    assert work is not None

    def result() -> dict[str, bool]:
        work.wait()
        return {name: value > 0 for name, value in zip(names, tensor.tolist(), strict=True)}

    return result


def gather(rows: Tensor) -> list[Tensor]:
    """Every rank's rows [n_r, ...], in rank order, on every rank. Only n_r may differ between ranks."""
    if not td.is_initialized():
        return [rows]
    # all_gather takes equal shapes only: exchange the counts, then pad to the longest.
    counts = [torch.zeros(1, dtype=torch.int64) for _ in range(td.get_world_size())]
    td.all_gather(counts, torch.tensor([len(rows)]))
    longest = max(1, *(int(count) for count in counts))  # gloo takes no empty tensors
    padded = torch.zeros(longest, *rows.shape[1:], dtype=rows.dtype)
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in counts]
    td.all_gather(parts, padded)
    return [part[: int(count)].to(rows.device) for part, count in zip(parts, counts, strict=True)]


def join_rows(rows: Tensor) -> Tensor:
    """Every rank's rows [n, ...], in rank order, on every rank and on their own device, without a copy to the
    CPU. Shapes are equal on all ranks."""
    if not td.is_initialized():
        return rows
    parts = [torch.empty_like(rows) for _ in range(td.get_world_size())]
    td.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


def sum_in_order(value: Tensor) -> Tensor:
    """The sum of every rank's tensor, in rank order, on every rank and on the tensor's own device."""
    if not td.is_initialized():
        return value
    parts = [torch.empty_like(value) for _ in range(td.get_world_size())]
    td.all_gather(parts, value)
    return torch.stack(parts).sum(0)


def average_in_order(_: object, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    """A DDP communication hook for gloo: the mean over ranks, summed in rank order.

    gloo's own all-reduce sums each part of a buffer in another order of ranks, and DDP changes the layout
    of its buffers after a run's first step. With three ranks or more, a resumed run would then differ from
    an unbroken one by rounding.
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
    """Mean over ranks. Its gradient is the mean over ranks, too: every rank's loss depends on every value."""

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
    """The mean over ranks of each element, on every rank. All ranks pass the same shape.

    Differentiable: after `average_gradients`, the gradient is that of the mean of the ranks' losses.
    """
    mean: Tensor = _Mean.apply(x) if td.is_initialized() else x
    return mean


@torch.no_grad()
def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Replace each gradient by its mean over ranks, in one flat all-reduce.

    For modules that are not wrapped: several backward passes, second-order ones included, may add to `.grad`
    first. Through DDP, two backward passes give wrong gradients without an error. A parameter without a
    gradient on some rank counts as zero there.
    """
    if not td.is_initialized():
        return
    parameters = [p for p in parameters if p.requires_grad]
    # All ranks must reduce a buffer of the same layout: fill missing gradients with zeros.
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    # One all-reduce of the concatenated gradients is faster than one for each parameter.
    flat = torch.cat([p.grad.reshape(-1) for p in parameters if p.grad is not None])
    td.all_reduce(flat)
    flat /= td.get_world_size()
    # Copy the means back, each to its parameter.
    start = 0
    for p in parameters:
        assert p.grad is not None
        p.grad.copy_(flat[start : start + p.numel()].view_as(p))
        start += p.numel()
