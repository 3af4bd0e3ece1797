"""Settings of an optimizer."""

from dataclasses import dataclass
from typing import Literal

from d2g.core.config import check_values, require, setting
from d2g.core.errors import SettingError

Optimizer = Literal["adamw", "adamw_fused", "adamw_8bit", "adam", "radam"]


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """The optimizer of one network and its learning rate schedule. Schedules count images, not steps."""

    name: Optimizer = setting(
        "adamw",
        "Optimizer. The paper says Adam with weight decay 1e-2, read as decoupled (adamw); adam adds the "
        "decay to the gradient; the paper's CIFAR10 model uses radam. On a GPU adamw and adam are fused; "
        "adamw_fused also on a CPU; adamw_8bit keeps its moments in 8 bits, a quarter of the memory",
        source='Table A1; method.md "Schedule and hyperparameters"',
    )
    lr: float = setting(1e-4, "Learning rate after warm-up", source="Table A1", recipe=True)
    betas: tuple[float, float] = setting(
        (0.9, 0.999), "Adam betas; the paper uses (0, 0.99) for SDXL's discriminator", source="Table A1"
    )
    weight_decay: float = setting(1e-2, "Weight decay outside attention layers", source="Table A1")
    attention_weight_decay: float = setting(
        1e-5, "Weight decay of all parameters inside attention layers", source="Table A1"
    )
    warmup_images: int = setting(
        0,
        "Images over which the learning rate rises linearly from 0",
        source="not in the paper; DMD: 500 steps",
    )
    decay_images: int = setting(
        0,
        "Images over which the learning rate falls to final_lr; 0 keeps it constant; -1 is the length of the "
        "run, train.images, which may be longer when the run resumes",
        source="ours",
    )
    decay: Literal["cosine", "linear", "step"] = setting(
        "cosine", "Shape of the decay; step changes the rate at once after decay_images", source="ours"
    )
    final_lr: float = setting(
        0.0,
        "Learning rate after decay_images. Table A1's arrow 1e-4 -> 1e-5 for the discriminator may mean this",
        source='method.md "Schedule and hyperparameters"',
    )
    clip_norm: float = setting(
        0.0, "Largest gradient norm; 0 does not clip", source="not in the paper; DMD: 10"
    )

    def __post_init__(self) -> None:
        check_values(self)
        require(
            self,
            lr=(self.lr > 0, "a positive number"),
            weight_decay=(self.weight_decay >= 0, "0 or more"),
            attention_weight_decay=(self.attention_weight_decay >= 0, "0 or more"),
            clip_norm=(self.clip_norm >= 0, "0 or more"),
            betas=(all(0 <= beta < 1 for beta in self.betas), "two numbers in [0, 1)"),
            warmup_images=(self.warmup_images >= 0, "0 or more"),
            decay_images=(self.decay_images >= -1, "0 or more, or -1 for the length of the run"),
            final_lr=(0 <= self.final_lr <= self.lr, f"0 to lr, {self.lr}"),
        )
        if self.final_lr and not self.decay_images:
            raise SettingError(
                f"final_lr is {self.final_lr} but decay_images is 0: the rate is constant; set decay_images"
            )
        if self.decay == "step" and self.decay_images == -1:
            raise SettingError(
                "decay is 'step' but decay_images is -1, the length of the run: the rate is constant; set "
                "decay_images to the images before the change, or decay=linear or cosine"
            )
