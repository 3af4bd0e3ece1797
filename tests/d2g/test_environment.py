"""d2g.core.environment: the documented keys with the values of this machine."""

import json
import os
from importlib.metadata import version
from types import SimpleNamespace

import pytest
import torch

from d2g.core.distributed import process_group
from d2g.core.environment import REQUIRED_PACKAGES, inspect_machine, usable_cores


def test_doctor_reports_the_documented_json_keys() -> None:
    machine = json.loads(json.dumps(inspect_machine()))
    assert set(machine) >= {
        "torch",
        "cuda",
        "devices",
        "bf16",
        "memory_gib",
        "disk_free_gib",
        "versions",
        "problems",
    }
    assert machine["torch"] == torch.__version__ and machine["cuda"] == torch.cuda.is_available()
    assert machine["versions"] == {name: version(name) for name in REQUIRED_PACKAGES}
    assert machine["devices"] and 0.1 < machine["memory_gib"] < 1 << 14 and machine["disk_free_gib"] >= 0
    assert isinstance(machine["bf16"], bool)


def test_bf16_that_a_gpu_emulates_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """A T4 computes bf16 in fp32, slowly: a run with train.precision=auto takes fp32 there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla T4")
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=2**34)
    )
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    machine = inspect_machine()
    assert machine["devices"] == ["Tesla T4"] and machine["bf16"] is False


def test_gpus_that_torch_cannot_use_are_a_problem(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As with a driver older than the CUDA of this build of torch: everything would run on the CPU."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 7)
    (problem,) = [p for p in inspect_machine()["problems"] if "GPU" in p]
    assert "7 NVIDIA GPUs" in problem and "driver" in problem
    with caplog.at_level("WARNING", "d2g"):
        for _ in range(2):
            assert process_group.own_device().type == "cpu"
    (message,) = [record.message for record in caplog.records]
    assert problem in message and "CPU" in message


def test_problems_describe_missing_components() -> None:
    problems = inspect_machine()["problems"]
    assert all("\n" not in p for p in problems)
    assert any("CUDA" in p for p in problems) == (not torch.cuda.is_available())


def test_cores_are_counted_where_the_system_has_no_affinities(monkeypatch: pytest.MonkeyPatch) -> None:
    assert usable_cores() == len(os.sched_getaffinity(0))
    monkeypatch.delattr(os, "sched_getaffinity")
    assert usable_cores() == os.cpu_count()
