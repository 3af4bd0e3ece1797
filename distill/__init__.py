"""Distillation of diffusion teachers into one-step students (Kang et al., ECCV 2024).

`load_student` loads an exported student, a run's newest checkpoint, or the shipped miniature one:

>>> from distill import load_student
>>> student = load_student("miniature")
>>> images = student(["a red circle on a white background"], seed=0)
>>> images.dtype, images.ndim, len(images)
(torch.uint8, 4, 1)

`train` runs one stage from a config, and returns where the checkpoint is.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distill.models.student import Student
    from distill.sampling import load_student
    from distill.training.train import train

__all__ = ["Student", "load_student", "train"]

_MODULES = {
    "Student": "distill.models.student",
    "load_student": "distill.sampling",
    "train": "distill.training.train",
}


def __getattr__(name: str) -> Any:
    """Import torch only when one of the public names is asked for."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
