"""Errors of other libraries and of the system that a user can mend, as one line that says how."""

import errno
import os

MEMORY = (
    "take smaller batches (--batch-size for pairs, sampling and evaluation; for training train.batch_size, "
    "or engine.gradient_accumulation with the same batch), half precision, or a larger device"
)
_DEVICE_BUSY = ("busy or unavailable", "no CUDA-capable device", "CUDA driver", "invalid device ordinal")
_NO_MEMORY = ("out of memory", "allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
_DISK_FULL = (
    *("No space left on device", "Disk quota exceeded", "File too large", "os error 28", "os error 122"),
    *("requested and", "PytorchStreamWriter failed writing", "inline_container.cc"),
)
"""What safetensors (as text of its own errors), numpy (`4 requested and 2 written`) and torch.save say."""
_SYSTEM = {
    errno.ENOSPC: "the disk is full; free space and run the same command again",
    errno.EDQUOT: "your quota of the disk is used up; free space and run the same command again",
    errno.EFBIG: "the file is larger than allowed here (ulimit -f); raise the limit, or take smaller shards",
    errno.EROFS: "the disk is read-only; choose another folder",
    errno.EACCES: "no permission; change that, or choose another folder",
    errno.EPERM: "no permission; change that, or choose another folder",
    errno.EMFILE: "too many open files; raise the limit (ulimit -n)",
    errno.ENFILE: "too many open files on this machine; close other programs",
    errno.ENOMEM: f"no memory left; {MEMORY}",
    errno.EIO: "the disk reports an error; look at the system's log",
    errno.ESTALE: "the network disk has lost the file; run the same command again",
    errno.ENAMETOOLONG: "the name is too long for the disk; choose a shorter one",
    errno.ENOENT: "no such file or folder",
    errno.ENOTDIR: "a part of the path is a file; choose another folder",
    errno.EISDIR: "this is a folder; give the name of a file",
    errno.EEXIST: "this is there already, and is no folder; choose another folder",
}


def explain(error: BaseException) -> str | None:
    """What happened and what to do, in one line; None for an error that only its developers can mend."""
    text = " ".join(str(error).split())
    kind = type(error).__name__
    if kind == "OutOfMemoryError" or isinstance(error, MemoryError) or _says(text, _NO_MEMORY):
        return f"out of memory ({text[:200] or kind}); {MEMORY}"
    if _says(text, _DEVICE_BUSY) and "CUDA" in text:
        return (
            f"the GPU cannot be used ({text[:200]}); see `nvidia-smi` for who uses it, choose another with "
            "CUDA_VISIBLE_DEVICES, or hide all with CUDA_VISIBLE_DEVICES="
        )
    if isinstance(error, OSError) and error.errno in _SYSTEM:
        file = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
        return f"{file}{_SYSTEM[error.errno]} ({error.strerror})"
    if isinstance(error, OSError | RuntimeError) or kind == "SafetensorError":
        if _says(text, _DISK_FULL):
            return f"the disk is full ({text[:200]}); free space and run the same command again"
    if isinstance(error, ModuleNotFoundError) and error.name:
        package = error.name.partition(".")[0]
        return f"the package {package} is not installed; `pip install {package}`"
    return None


def _says(text: str, signs: tuple[str, ...]) -> bool:
    return any(sign in text for sign in signs)
