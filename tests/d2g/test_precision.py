"""d2g.core.precision: TF32 is allowed in bf16 training only, and never in what must be exact."""

import logging
import os
from collections.abc import Iterator

import pytest
import torch

from d2g.core.precision import exact_fp32, fp32_products_are_exact, set_exact_fp32, set_training_arithmetic
from forks import fork

pytestmark = pytest.mark.filterwarnings("ignore:Please use the new API settings to control TF32:UserWarning")
"""torch 2.9 says so at the first look at the interface that the project and inductor use."""

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


def tf32() -> tuple[bool, bool]:
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


@pytest.fixture(autouse=True)
def restore(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    before, benchmark = tf32(), torch.backends.cudnn.benchmark
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
    torch.backends.cudnn.benchmark = benchmark


@pytest.mark.parametrize("bf16", [False, True])
def test_a_training_run_decides_once(bf16: bool, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "d2g"):
        for _ in range(2):
            set_training_arithmetic(CUDA, bf16)
    assert tf32() == (bf16, bf16) and torch.backends.cudnn.benchmark
    (line,) = [record.message for record in caplog.records if "CUDA arithmetic" in record.message]
    assert ("may use TF32, except R1" in line) == bf16 and ("no TF32" in line) != bf16
    assert torch.get_float32_matmul_precision() == ("high" if bf16 else "highest")


@pytest.mark.parametrize("has_bf16", [False, True])
def test_a_gpu_that_emulates_bf16_is_named(
    has_bf16: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """bf16 is the default, and slower than fp32 there (V100, T4)."""
    answer = lambda including_emulation=True: including_emulation or has_bf16  # noqa: E731
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", answer)
    with caplog.at_level(logging.WARNING, "d2g"):
        for bf16 in (False, True, True):
            set_training_arithmetic(CUDA, bf16)
    assert len([r for r in caplog.records if "emulates bf16" in r.message]) == (not has_bf16)


def test_exact_arithmetic_ends_with_its_context() -> None:
    set_training_arithmetic(CUDA, bf16=True)
    with pytest.raises(ZeroDivisionError), exact_fp32(CUDA):
        assert tf32() == (False, False)
        raise ZeroDivisionError
    assert tf32() == (True, True)
    set_exact_fp32(CUDA)
    assert tf32() == (False, False)


def test_work_after_a_training_run_chooses_no_algorithms_by_timing() -> None:
    """A row of pairs, or an evaluated image, must not depend on which algorithm was faster a moment ago."""
    set_training_arithmetic(CUDA, bf16=True)
    set_exact_fp32(CUDA)
    assert not torch.backends.cudnn.benchmark


def test_nothing_changes_on_a_cpu() -> None:
    before = tf32(), torch.backends.cudnn.benchmark
    set_training_arithmetic(CPU, bf16=True)
    set_exact_fp32(CPU)
    with exact_fp32(CPU):
        assert (tf32(), torch.backends.cudnn.benchmark) == before


@pytest.mark.parametrize(
    "statement",
    [
        "",
        "torch.set_float32_matmul_precision('medium')",
        "torch.backends.mkldnn.matmul.fp32_precision = 'bf16'",
    ],
)
def test_products_that_a_user_lets_torch_round_are_not_exact(statement: str) -> None:
    """Torch has two interfaces for it, and a process can use only one of them."""

    def ask() -> None:
        exec(statement)
        assert fp32_products_are_exact(CPU) == (not statement)

    assert os.waitpid(fork(ask), 0)[1] == 0


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_rounded_products_on_a_gpu(precision: str) -> None:
    torch.set_float32_matmul_precision(precision)
    assert fp32_products_are_exact(CUDA) == (precision == "highest")
    torch.set_float32_matmul_precision("highest")
