"""Which hardware has bf16, and how CUDA computes fp32 matrix products and convolutions: the one place that
decides it.

By default PyTorch rounds the inputs of cuDNN's convolutions to TF32 (a mantissa of 10 bits), but not those of
matrix products. Here both follow one decision. It has no effect on a CPU, nor on bf16 and fp16 tensors.
"""

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from logging import WARNING
from typing import Any

import torch

from d2g.core.logs import log_once


def supports_bf16(device: torch.device) -> bool:
    """Whether the hardware has bf16 arithmetic."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        capabilities: Any = getattr(torch.cpu, "get_capabilities", dict)()  # missing in older torch
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return False


def has_amx() -> bool:
    """Whether this CPU multiplies bf16 matrices by Intel's AMX, several times as fast as by vectors."""
    capabilities: Any = getattr(torch.cpu, "get_capabilities", dict)()  # missing in older torch
    return bool(capabilities.get("amx_bf16"))


def set_exact_fp32(device: torch.device) -> None:
    """Compute in IEEE fp32 on CUDA, with cuDNN's usual algorithms: in a process that has trained before, too.
    `process_group.own_device` calls it."""
    if device.type == "cuda":
        _allow_tf32(False)
        torch.backends.cudnn.benchmark = False


def set_training_arithmetic(device: torch.device, bf16: bool) -> None:
    """Decide the arithmetic of a training run on CUDA, and log the decision.

    An fp32 run is exact. In a bf16 run TF32 may serve what stays in fp32, such as the autoencoder; what must
    be exact is inside `exact_fp32`. cuDNN times its algorithms at the first use of each shape: the shapes of
    a step are always the same.
    """
    if device.type != "cuda":
        return
    _allow_tf32(bf16)
    torch.backends.cudnn.benchmark = True
    if bf16 and not supports_bf16(device):
        log_once(
            "this GPU emulates bf16, which is slower than fp32: set the precision to fp32", level=WARNING
        )
    log_once(
        "CUDA arithmetic: networks in bf16; what stays in fp32 may use TF32, except R1 and LatentLPIPS' fp32 "
        "layers, which are exact"
        if bf16
        else "CUDA arithmetic: IEEE fp32 everywhere, no TF32"
    )


def exact_fp32(device: torch.device) -> AbstractContextManager[None]:
    """Context in which CUDA computes in IEEE fp32. A backward pass must run inside, too.

    torch.compile cannot trace the switch: in compiled code the caller's choice holds.
    """
    if device.type != "cuda" or torch.compiler.is_compiling():
        return nullcontext()
    return _without_tf32()


def fp32_products_are_exact(device: torch.device) -> bool:
    """Whether matrix products in fp32 are IEEE fp32; torch rounds their inputs where the user allows it."""
    # What a backend answers holds for both of torch's interfaces; `torch.get_float32_matmul_precision` raises
    # if the user took the newer one.
    backends: Any = torch.backends
    backend = backends.cuda if device.type == "cuda" else backends.mkldnn
    return backend.matmul.fp32_precision in ("none", "ieee")


@contextmanager
def _without_tf32() -> Iterator[None]:
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    _allow_tf32(False)
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def _allow_tf32(allow: bool) -> None:
    # The older of torch's two interfaces: inductor and other packages read it, and mixing the two raises.
    _accept_older_interface()
    torch.backends.cuda.matmul.allow_tf32 = allow
    torch.backends.cudnn.allow_tf32 = allow


@cache
def _accept_older_interface() -> None:
    """torch 2.9 warns of the older interface; once for a process, because the switch is set in every step."""
    warnings.filterwarnings("ignore", "Please use the new API settings to control TF32", UserWarning)
