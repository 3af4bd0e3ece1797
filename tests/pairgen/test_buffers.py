"""pairgen.store.buffers: memory comes back when nobody holds it, and never before."""

import pickle
import threading
from pathlib import Path

import numpy as np
import torch

from pairgen.store.buffers import KEPT, SMALL, Buffers
from pairgen.store.reader import PairReader
from stores import put_store, rows_of, same, spec_of


def address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])


def test_freed_memory_is_given_again() -> None:
    buffers = Buffers()
    first = buffers.empty((4, SMALL), np.uint8)
    place = address(first)
    del first
    again = buffers.empty((SMALL, 2), np.float16)
    assert address(again) == place and again.dtype == np.float16 and again.flags.writeable
    assert address(buffers.empty((4, SMALL), np.uint8)) != place, "it is held"
    assert buffers.empty((3, 2), np.int8).shape == (3, 2) and buffers.empty((0, 5), np.int8).size == 0


def test_any_view_holds_it() -> None:
    buffers = Buffers()
    holders = [
        lambda array: array[1:3],
        lambda array: array.view(np.float32).reshape(-1)[5:],
        lambda array: torch.from_numpy(array).view(torch.float16)[2],
        lambda array: torch.from_numpy(array.view(np.float16).reshape(2, -1)).detach().t(),
        lambda array: memoryview(array)[2:],
    ]
    for hold in holders:
        array = buffers.empty((4, SMALL), np.uint8)
        array[:] = 7
        place, held = address(array), hold(array)
        del array
        other = buffers.empty((4, SMALL), np.uint8)
        other[:] = 9
        assert address(other) != place and bytes(memoryview(np.asarray(held).copy()).cast("B"))[:1] == b"\x07"
        del held, other
        assert place in {address(a) for a in [buffers.empty((4, SMALL), np.uint8) for _ in range(3)]}


def test_only_a_few_wait() -> None:
    buffers = Buffers()
    many = [buffers.empty((SMALL,), np.uint8) for _ in range(KEPT + 5)]
    places = [address(array) for array in many]
    del many
    assert len(buffers._free) == KEPT
    assert len(pickle.loads(pickle.dumps(buffers))._free) == 0
    found = [buffers.empty((SMALL,), np.uint8) for _ in range(KEPT)]
    assert {address(array) for array in found} <= set(places) and len(buffers._free) == 0


def test_threads_never_get_the_same_memory() -> None:
    buffers, wrong = Buffers(), list[int]()

    def work(number: int) -> None:
        for _ in range(200):
            array = buffers.empty((SMALL,), np.uint8)
            array[:64] = number
            if not (array[:64] == number).all():
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_batches_that_are_kept_stay_as_they_were(tmp_path: Path) -> None:
    spec = spec_of(latent_shape=(4, 64, 64), num_pairs=14, shard_size=5)
    reader = PairReader(put_store(tmp_path, spec))
    orders = [[(7 * i + 3 * j) % 14 for j in range(9)] for i in range(12)]
    kept = [reader.read(order, torch.float32 if order[0] % 2 else None) for order in orders]
    halves = [reader.read(order).latent[3:] for order in orders]
    for order in orders:
        reader.read(order)
    assert all(same(batch, rows_of(spec, order)) for batch, order in zip(kept, orders, strict=True))
    expected = [rows_of(spec, order).latent[3:].float() for order in orders]
    assert all(torch.equal(half, whole) for half, whole in zip(halves, expected, strict=True))
