"""Diffusion and flow teachers: pipelines on disk, schedules, solvers, conditioning, latents."""

from typing import TYPE_CHECKING

from d2g.core.lazy_names import lazy_names

if TYPE_CHECKING:
    from d2g.diffusion.teacher import Teacher, load_teacher

__all__ = ["Teacher", "load_teacher"]

__getattr__, __dir__ = lazy_names(__name__, dict.fromkeys(__all__, "d2g.diffusion.teacher"))
