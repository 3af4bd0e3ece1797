"""Diffusion and flow teachers: pipelines on disk, schedules, solvers, conditioning, latents."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from d2g.diffusion.teacher import Teacher, load_teacher

__all__ = ["Teacher", "load_teacher"]


def __getattr__(name: str) -> Any:
    """Import torch and diffusers only when a teacher is asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from d2g.diffusion import teacher

    return getattr(teacher, name)
