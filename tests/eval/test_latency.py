"""eval.measure.latency: timed calls, comparisons, and when batches stop growing. The models sleep."""

import json
import time
from collections.abc import Callable, Mapping

import pytest
import torch

from d2g.core.errors import SettingError, UserError
from eval.measure.latency import Parts, measure_latency, milliseconds_per_image


def sleeping(text: float, network: float, memory: int = 1000, each: bool = False) -> Parts:
    """Parts that sleep `text` and `network` ms per batch (`each`: per image). `memory`: the largest batch."""

    def parts(batch: int) -> Mapping[str, Callable[[], object]]:
        def network_call() -> None:
            if batch > memory:
                raise torch.OutOfMemoryError("out of memory")
            time.sleep(network / 1000 * (batch if each else 1))

        return {"text": lambda: time.sleep(text / 1000), "network": network_call}

    return parts


def test_timing_counts_calls_and_takes_the_median() -> None:
    calls: list[int] = []
    work = torch.randn(64, 64)

    def sample() -> None:
        calls.append(1)
        repeat = 400 if len(calls) == 3 else 1  # one outlier among the timed calls
        for _ in range(repeat):
            work @ work

    assert 0 < milliseconds_per_image(sample, repeats=5, warmup=2) < 20
    assert len(calls) == 7
    with pytest.raises(SettingError, match="repeats >= 1"):
        milliseconds_per_image(sample, repeats=0)


def test_parts_add_up_and_the_teacher_is_compared_with_the_student() -> None:
    models = {"student": sleeping(1, 4), "teacher": sleeping(1, 40)}
    latency = measure_latency(models, "cpu", batches=(1, 2), repeats=3, warmup=1)
    assert json.loads(json.dumps(latency)) == latency
    for name, network in (("student", 4), ("teacher", 40)):
        one = latency["models"][name]["batch_1"]
        assert list(one["parts_ms"]) == ["text", "network"] and one["batch"] == 1
        assert one["parts_ms"]["text"] >= 1 and one["parts_ms"]["network"] >= network
        assert one["ms"] >= 1 + network and one["ms_p10"] <= one["ms"] <= one["ms_p90"]
        assert one["ms_per_image"] == one["ms"] and one["images_per_sec"] == pytest.approx(1000 / one["ms"])
        best = latency["models"][name]["best"]
        assert best["batch"] == 2 and best["ms_per_image"] == pytest.approx(best["ms"] / 2)
    ratio = latency["teacher_over_student"]
    assert ratio["batch_1"] > 2 and ratio["best"] > 2
    assert latency["device"] == "cpu" and latency["clock"] == "wall"


def test_models_alternate_and_warm_up_is_not_timed() -> None:
    order: list[str] = []

    def parts(name: str) -> Parts:
        def call() -> None:
            order.append(name)
            time.sleep(0.2 if len(order) <= 2 else 0)  # the warm-up

        return lambda batch: {"all": call}

    models = {name: parts(name) for name in "ab"}
    latency = measure_latency(models, "cpu", batches=(1,), repeats=3, warmup=1)
    assert order == list("ab") * 4
    assert latency["models"]["a"]["batch_1"]["ms_p90"] < 200 and "teacher_over_student" not in latency


def test_batches_grow_until_memory_is_full_or_nothing_is_gained() -> None:
    models = {"full": sleeping(0, 10, memory=2), "flat": sleeping(0, 10, each=True), "free": sleeping(0, 10)}
    latency = measure_latency(models, "cpu", batches=(1, 2, 4, 8), repeats=1, warmup=0)["models"]
    assert [entry["batch"] for entry in latency["full"]["by_batch"]] == [1, 2]
    assert latency["full"]["stopped"] == "out of memory at batch 4"
    assert latency["free"]["stopped"] is None and latency["free"]["best"]["batch"] == 8
    assert len(latency["flat"]["by_batch"]) in (3, 4)  # a busy machine may stretch one sleep
    with pytest.raises(UserError, match="full has no latency: out of memory at batch 1"):
        measure_latency({"full": sleeping(0, 1, memory=0)}, "cpu", repeats=1)


def test_invalid_settings_are_refused() -> None:
    for batches in ((), (2, 4), (1, 4, 2), (1, 1)):
        with pytest.raises(SettingError, match="expected ascending sizes from 1"):
            measure_latency({"a": sleeping(0, 0)}, "cpu", batches=batches)
    with pytest.raises(SettingError, match="warmup >= 0"):
        measure_latency({"a": sleeping(0, 0)}, "cpu", warmup=-1)
