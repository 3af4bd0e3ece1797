"""Settings of consistency distillation."""

from dataclasses import dataclass

from d2g.core.config import check_values, require, setting


@dataclass(frozen=True, kw_only=True, slots=True)
class ConsistencyConfig:
    """Consistency distillation (method.md "Consistency distillation")."""

    levels: int = setting(
        18,
        "Noise levels N between which the teacher takes its steps",
        source="Song et al. 2023, section 6.1: 18 for CIFAR10",
    )

    def __post_init__(self) -> None:
        check_values(self)
        require(self, levels=(self.levels >= 2, "2 or more"))
