"""Distillation of diffusion teachers into one-step students (Kang et al., ECCV 2024).

`load_student` loads an exported student, a run's newest checkpoint, or the shipped miniature one:

>>> from distill import load_student
>>> student = load_student("miniature")
>>> images = student(["a red circle on a white background"], seed=0)
>>> images.dtype, images.ndim, len(images)
(torch.uint8, 4, 1)

`train` runs one stage from a config, and returns where the checkpoint is.
"""

from typing import TYPE_CHECKING

from d2g.core.lazy_names import lazy_names

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

__getattr__, __dir__ = lazy_names(__name__, _MODULES)
