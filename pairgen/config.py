"""Settings of a pair store, and the presets of the paper's four teachers' data sets (method.md 1.1)."""

from dataclasses import dataclass
from typing import Literal, get_args, get_origin, get_type_hints

from d2g.core.config import nearest
from d2g.core.errors import SettingError


@dataclass(frozen=True, kw_only=True, slots=True)
class PairConfig:
    """What a pair store is made with. The group from `batch_size` on decides speed, not rows."""

    teacher: str = ""
    prompts: str = ""  # may stay empty for a class-conditional teacher (all classes) or an unconditional one
    num_pairs: int = 0  # 0: one per prompt
    per_prompt: int = 1  # rows i, i + 1 … of one prompt, each with its own noise
    solver: Literal["teacher", "ddim", "heun", "euler"] = "teacher"
    """`teacher`: DDIM for a diffusion, Euler for a flow and for an EDM."""
    steps: int = 50
    spacing: Literal["teacher", "leading", "trailing", "linspace"] = "teacher"
    final_alpha: Literal["one", "teacher"] = "one"
    """`one` ends at clean data; `teacher` obeys the scheduler's set_alpha_to_one, which for SD 1.5 leaves 3 %
    of noise in the target (method.md 1.3).
    """
    guidance: float = 8.0  # 1 costs one evaluation a step, more cost two
    guidance_rescale: float = 0.0  # Lin et al. 2023, section 3.4; they take 0.7
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # of the network; updates are always fp32
    seed: int = 0
    dtype: Literal["float16", "float32"] = "float16"  # of stored noise and latents
    noise: Literal["stored", "seeded"] = "stored"
    shard_size: int = 4096
    latent_size: int = 0  # height and width of latents; 0: the UNet's own

    batch_size: int = 32  # 0: measured, the fastest on this machine
    text_cache: int = 0  # encode so many rows' prompts at once, text encoders off the GPU meanwhile; 0: never
    channels_last: bool = False
    compile: bool = False  # torch.compile of the network
    patience: float = 120.0  # seconds after which a silent job's shard is taken over
    max_bad: float = 0.1  # stop when more of the rows than this have no finite latent

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            value = getattr(self, name)
            if get_origin(hint) is Literal and value not in get_args(hint):
                raise SettingError(f"{name} is {value!r}{nearest(value, get_args(hint))}")
        for name in ("per_prompt", "steps", "shard_size"):
            if getattr(self, name) < 1:
                raise SettingError(f"{name} is {getattr(self, name)}; expected 1 or more")
        for name in ("num_pairs", "latent_size", "batch_size", "text_cache"):
            if getattr(self, name) < 0:
                raise SettingError(f"{name} is {getattr(self, name)}; expected 0 or more")
        for name in ("guidance_rescale", "max_bad"):
            if not 0 <= getattr(self, name) <= 1:
                raise SettingError(f"{name} is {getattr(self, name)}; expected 0 to 1")
        if self.patience <= 0:
            raise SettingError(f"patience is {self.patience}; expected seconds, more than 0")
        if self.guidance < 1:
            raise SettingError(f"guidance is {self.guidance}; expected 1 (no guidance) or more")


PRESETS: dict[str, PairConfig] = {
    "default": PairConfig(),
    # Table A1 of the supplement: pairs and guidance; prompts are yours to bring
    "cifar10": PairConfig(num_pairs=1_000_000, guidance=1.0, solver="heun", steps=18, batch_size=512),
    "sd15-cfg3": PairConfig(num_pairs=3_000_000, guidance=3.0, precision="fp16"),
    "sd15-cfg8": PairConfig(num_pairs=12_000_000, guidance=8.0, precision="fp16"),
    "sdxl-cfg7": PairConfig(num_pairs=8_000_000, guidance=7.0, precision="bf16", batch_size=8),
    # Every command of a run, small enough for a laptop: to see that all is in place before the real one
    "trial": PairConfig(num_pairs=64, guidance=3.0, steps=4, batch_size=8, shard_size=32),
    "miniature": PairConfig(teacher="miniature", guidance=3.0, steps=20, batch_size=128, shard_size=512),
}
"""Presets of `d2g pairs generate`."""
