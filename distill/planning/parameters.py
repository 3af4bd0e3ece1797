"""Parameters of a student that is no teacher's network, for --dry-run, by part."""

from distill.config.run import DistillConfig
from distill.planning.fake_networks import build_meta_student, planning_config

GENERATOR_PARTS = {
    "styles": ".affine.",
    "kernel selection": ".select.",
    "convolutions": ".conv.weight",
    "attention": ".attention.",
    "mapping": "mapping.",
    "text layers": "text.",
    "input": "input.",
}
"""Parts by what the names of their parameters contain; the first that fits counts."""


def student_parameters(config: DistillConfig, model: str = "") -> dict[str, float] | None:
    """Millions of parameters by part of a generator with styles, and `total`; None for a teacher's network,
    and for an unknown teacher. model: a key of `reference_models.NAMES`, which stands in for a teacher that
    is not on this disk.
    """
    with planning_config(config, model) as planned:
        if planned is None or planned.student.is_diffusion:
            return None
        student = build_meta_student(planned)
    counts: dict[str, int] = {}
    for name, parameter in student.network.named_parameters():
        part = next((part for part, inside in GENERATOR_PARTS.items() if inside in name), "other")
        counts[part] = counts.get(part, 0) + parameter.numel()
    counts["total"] = sum(counts.values())
    return {part: round(count / 1e6, 3) for part, count in counts.items()}
