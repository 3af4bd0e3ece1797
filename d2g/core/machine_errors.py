"""Errors of the machine, and of libraries about it, that a user can mend, as one line that says how.

A file that cannot be read for such a reason may be intact: nobody should repair or delete it.
"""

import errno
import os
from pathlib import Path

from d2g.core.errors import UserError

MEMORY = (
    "take smaller batches (--batch-size for pairs, sampling and evaluation; for training train.batch_size, "
    "or engine.gradient_accumulation with the same batch), half precision, or a larger device"
)
_DEVICE_BUSY = ("busy or unavailable", "no CUDA-capable device", "CUDA driver", "invalid device ordinal")
_NO_MEMORY = (
    *("out of memory", "allocate memory", "CUBLAS_STATUS_ALLOC_FAILED"),
    "Storage size calculation overflowed",
)
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


def explain_error(error: BaseException) -> str | None:
    """Explain an error of the machine and its remedy in one line; None for a bug of the program."""
    text = " ".join(str(error).split())
    kind = type(error).__name__
    if _lacks_memory(error):
        return f"out of memory ({text[:200] or kind}); {MEMORY}"
    if _says(text, _DEVICE_BUSY) and "CUDA" in text:
        return (
            f"the GPU cannot be used ({text[:200]}); see `nvidia-smi` for who uses it, choose another with "
            "CUDA_VISIBLE_DEVICES, or hide all with CUDA_VISIBLE_DEVICES="
        )
    if "no kernel image is available" in text:
        return (
            f"this build of PyTorch has no code for this GPU ({text[:200]}); install one that supports it "
            "(pytorch.org), or hide the GPU with CUDA_VISIBLE_DEVICES="
        )
    if "NCCL error" in text:
        return _explain_nccl(text)
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


def _explain_nccl(text: str) -> str:
    """Explain an error of NCCL, whose own reason comes last, in one line."""
    reason = (text.partition("Last error:")[2] or text).strip()[:300]
    remedy = "see `nvidia-smi`, and set NCCL_DEBUG=INFO for details"
    if "/dev/shm" in reason:
        remedy = "it needs more shared memory: give a container --shm-size=16g or --ipc=host"
    return f"the GPUs cannot exchange data ({reason}); {remedy}"


class MachineError(UserError):
    """A file or network cannot be read because of the machine: limits, rights, memory, a lost disk."""


_NOT_OF_THE_FILE = (
    *(errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EACCES, errno.EPERM),
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ESTALE),
)
"""Error numbers that say nothing about the content of a file."""


def raise_machine_error(error: BaseException, file: Path | str = "", memory: bool = True) -> None:
    """Raise MachineError if `error` comes from the machine, whatever the file holds; else do nothing.

    For handlers that take any error of a reader for damage. file: where the error may not name it. memory:
    whether a lack of memory counts; not where a damaged file can ask for any amount.
    """
    if isinstance(error, MachineError):
        raise error
    lacks_memory = memory and _lacks_memory(error)
    if lacks_memory or (isinstance(error, OSError) and error.errno in _NOT_OF_THE_FILE):
        text = explain_error(error) or ""
        name = "" if str(file) in text else f"{file}: "
        raise MachineError(f"{name}{text}") from error


def _lacks_memory(error: BaseException) -> bool:
    kind = type(error).__name__
    return kind == "OutOfMemoryError" or isinstance(error, MemoryError) or _says(str(error), _NO_MEMORY)


def _says(text: str, signs: tuple[str, ...]) -> bool:
    return any(sign in text for sign in signs)
