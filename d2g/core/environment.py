"""The machine: devices, memory, disk, installed versions, and what is missing or too small."""

import os
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

REQUIRED_PACKAGES = (
    "torch",
    "diffusers",
    "transformers",
    "kornia",
    "open_clip_torch",
    "lpips",
    "h5py",
    "numpy",
    "safetensors",
)


def inspect_machine() -> dict[str, Any]:
    """The result of `d2g doctor`: versions, devices, sizes in GiB, and problems in words."""
    cuda, problems, versions = torch.cuda.is_available(), [], {}
    # Installed versions, without importing the packages.
    for name in REQUIRED_PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            problems.append(f"{name} is not installed; run `uv sync`")
    # Devices and free space, with a problem for each that is too small for real training.
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else ["cpu"]
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    if reason := unusable_gpus():
        problems.append(reason)
    elif not cuda:
        problems.append("no CUDA device: the miniature trains here, SD 1.5 would take months")
    if free < 2:
        problems.append(f"{free:.1f} GiB free on this disk; checkpoints of SD 1.5 take 14 GiB each")
    return {
        "torch": torch.__version__,
        "cuda": cuda,
        "devices": devices,
        "bf16": torch.cuda.is_bf16_supported(including_emulation=False) if cuda else True,
        "memory_gib": _memory_gib(cuda),
        "disk_free_gib": round(free, 1),
        "versions": versions,
        "problems": problems,
    }


def unusable_gpus() -> str:
    """Why PyTorch cannot use the NVIDIA GPUs that the driver lists, and what to do; "" if it can, or if there
    are none."""
    count = torch.cuda.device_count()
    if not count or torch.cuda.is_available():
        return ""
    return (
        f"this machine has {count} NVIDIA GPU{'s' * (count > 1)}, but PyTorch {torch.__version__} cannot use "
        f"them, as with a driver older than CUDA {torch.version.cuda}; update the driver, or install PyTorch "
        "for an older CUDA (pytorch.org)"
    )


def usable_cores() -> int:
    """CPU cores that this process may use; all of the machine where the system has no affinities (macOS)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory_gib(cuda: bool) -> float:
    """Memory of the first GPU, or of the machine."""
    if cuda:
        return round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1)
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
