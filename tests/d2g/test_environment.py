"""d2g.core.environment: the contract's keys, true on this machine."""

import json
from importlib.metadata import version

import torch

from d2g.core.environment import REQUIRED_PACKAGES, inspect_machine


def test_doctor_reports_the_contract_keys_in_json() -> None:
    found = json.loads(json.dumps(inspect_machine()))
    assert set(found) >= {
        "torch",
        "cuda",
        "devices",
        "bf16",
        "memory_gib",
        "disk_free_gib",
        "versions",
        "problems",
    }
    assert found["torch"] == torch.__version__ and found["cuda"] == torch.cuda.is_available()
    assert found["versions"] == {name: version(name) for name in REQUIRED_PACKAGES}
    assert found["devices"] and 0.1 < found["memory_gib"] < 1 << 14 and found["disk_free_gib"] >= 0
    assert isinstance(found["bf16"], bool)


def test_problems_are_words_about_what_is_missing() -> None:
    problems = inspect_machine()["problems"]
    assert all("\n" not in p for p in problems)
    assert any("CUDA" in p for p in problems) == (not torch.cuda.is_available())
