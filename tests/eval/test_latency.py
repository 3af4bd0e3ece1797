"""eval.measure.latency: timed calls, comparisons, and when batches stop growing. Models move the clock."""

import json
from collections.abc import Callable, Mapping

import pytest
import torch

from clocks import Clock
from d2g.core.errors import SettingError, UserError
from eval.measure.latency import Parts, measure_latency, milliseconds_per_image


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The only clock of the measurements: their results do not depend on what else the machine does."""
    clock = Clock()
    monkeypatch.setattr("eval.measure.latency.time", clock)
    return clock


def sleeping(clock: Clock, text: float, network: float, memory: int = 1000, each: bool = False) -> Parts:
    """Parts that take `text` and `network` ms per batch (`each`: per image). `memory`: the largest batch."""

    def parts(batch: int) -> Mapping[str, Callable[[], object]]:
        def network_call() -> None:
            if batch > memory:
                raise torch.OutOfMemoryError("out of memory")
            clock.sleep(network / 1000 * (batch if each else 1))

        return {"text": lambda: clock.sleep(text / 1000), "network": network_call}

    return parts


def test_timing_counts_calls_and_takes_the_median(clock: Clock) -> None:
    calls: list[int] = []

    def sample() -> None:
        calls.append(1)
        # A slow start, and an outlier among the timed calls.
        clock.sleep({1: 0.5, 3: 0.4}.get(len(calls), 0.002))

    assert milliseconds_per_image(sample, repeats=5, warmup=2) == pytest.approx(2)
    assert len(calls) == 7
    with pytest.raises(SettingError, match="repeats >= 1"):
        milliseconds_per_image(sample, repeats=0)


def test_parts_add_up_and_the_teacher_is_compared_with_the_student(clock: Clock) -> None:
    models = {"student": sleeping(clock, 1, 4), "teacher": sleeping(clock, 1, 40)}
    latency = measure_latency(models, "cpu", batches=(1, 2), repeats=3, warmup=1)
    assert json.loads(json.dumps(latency)) == latency
    for name, network in (("student", 4), ("teacher", 40)):
        one = latency["models"][name]["batch_1"]
        assert list(one["parts_ms"]) == ["text", "network"] and one["batch"] == 1
        assert one["parts_ms"] == pytest.approx({"text": 1, "network": network})
        assert [one[key] for key in ("ms", "ms_p10", "ms_p90")] == pytest.approx([1 + network] * 3)
        assert one["ms_per_image"] == one["ms"] and one["images_per_sec"] == pytest.approx(1000 / one["ms"])
        best = latency["models"][name]["best"]
        assert best["batch"] == 2 and best["ms_per_image"] == pytest.approx(best["ms"] / 2)
    ratio = latency["teacher_over_student"]
    assert ratio == pytest.approx({"batch_1": 41 / 5, "best": 41 / 5})
    assert latency["device"] == "cpu" and latency["clock"] == "wall"


def test_models_alternate_and_warm_up_is_not_timed(clock: Clock) -> None:
    order: list[str] = []

    def parts(name: str) -> Parts:
        def call() -> None:
            order.append(name)
            clock.sleep(0.2 if len(order) <= 2 else 0.001)  # the warm-up

        return lambda batch: {"all": call}

    models = {name: parts(name) for name in "ab"}
    latency = measure_latency(models, "cpu", batches=(1,), repeats=3, warmup=1)
    assert order == list("ab") * 4
    assert latency["models"]["a"]["batch_1"]["ms_p90"] == pytest.approx(1)
    assert "teacher_over_student" not in latency


def test_batches_grow_until_memory_is_full_or_nothing_is_gained(clock: Clock) -> None:
    models = {
        "full": sleeping(clock, 0, 10, memory=2),
        "flat": sleeping(clock, 0, 10, each=True),
        "free": sleeping(clock, 0, 10),
    }
    steps: list[tuple[str, int, int]] = []
    latency = measure_latency(
        models, "cpu", batches=(1, 2, 4, 8), repeats=1, warmup=0, progress=lambda *step: steps.append(step)
    )["models"]
    assert steps == [("latency of batch sizes", done, 4) for done in (1, 2, 3, 4)]
    assert [entry["batch"] for entry in latency["full"]["by_batch"]] == [1, 2]
    assert latency["full"]["stopped"] == "out of memory at batch 4"
    assert latency["free"]["stopped"] is None and latency["free"]["best"]["batch"] == 8
    assert [entry["batch"] for entry in latency["flat"]["by_batch"]] == [1, 2, 4]
    with pytest.raises(UserError, match="full has no latency: out of memory at batch 1"):
        measure_latency({"full": sleeping(clock, 0, 1, memory=0)}, "cpu", repeats=1)


def test_invalid_settings_are_refused(clock: Clock) -> None:
    for batches in ((), (2, 4), (1, 4, 2), (1, 1)):
        with pytest.raises(SettingError, match="expected ascending sizes from 1"):
            measure_latency({"a": sleeping(clock, 0, 0)}, "cpu", batches=batches)
    with pytest.raises(SettingError, match="warmup >= 0"):
        measure_latency({"a": sleeping(clock, 0, 0)}, "cpu", warmup=-1)
