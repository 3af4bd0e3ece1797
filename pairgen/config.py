"""Settings of a pair store, and the presets of the four data sets of method.md "Pair data sets"."""

from dataclasses import dataclass
from math import inf
from typing import Literal

from d2g.core.config import Presets, check_values, require, setting
from d2g.data.columns import require_prompts


@dataclass(frozen=True, kw_only=True, slots=True)
class PairConfig:
    """How a pair store is generated. The settings from `batch_size` on change the speed, not the rows."""

    teacher: str = setting("", "Teacher folder, hub id or shipped name (option --teacher)", recipe=True)
    prompts: str = setting(
        "",
        "Prompt file (option --prompts); empty for a class-conditional teacher (all classes) or an "
        "unconditional one",
        recipe=True,
    )
    column: str | None = setting(
        None, "Column of the prompts in the prompt file; null: prompt, caption, text or TEXT"
    )
    condition: str = setting(
        "",
        "Pair store of the stage before (option --condition), whose latents and prompts the rows take: for "
        "stage B of a cascade",
    )
    num_pairs: int = setting(0, "Number of pairs; 0: one per prompt", source="Table A1", recipe=True)
    per_prompt: int = setting(1, "Consecutive rows per prompt, each with its own noise")
    solver: Literal["teacher", "ddim", "heun", "euler"] = setting(
        "teacher",
        "ODE solver; teacher takes ddim for a diffusion model, euler for a flow and for an EDM",
        source='method.md "Pair data sets"',
        recipe=True,
    )
    steps: int = setting(50, "Solver steps", source='method.md "Pair data sets"', recipe=True)
    spacing: Literal["teacher", "leading", "trailing", "linspace"] = setting(
        "teacher",
        "Spacing of the timesteps; teacher takes its scheduler's",
        source='method.md "Pair data sets"',
    )
    final_alpha: Literal["one", "teacher"] = setting(
        "one",
        "one ends at clean data; teacher obeys the scheduler's set_alpha_to_one, which leaves 3 % of noise "
        "in "
        "SD 1.5's targets",
        source='method.md "Details that change the pairs"',
    )
    guidance: float = setting(
        8.0,
        "Classifier-free guidance scale; 1 is none and costs one evaluation per step, others cost two. FLUX "
        "takes the scale as an input: one evaluation at any scale",
        source="Table A1",
        recipe=True,
    )
    guidance_rescale: float = setting(
        0.0, "Rescaling of guided predictions; Lin et al. use 0.7", source="Lin et al. 2023, section 3.4"
    )
    churn: float = setting(
        0.0,
        "An experiment: fresh noise in each step (S_churn of EDM's Algorithm 2), EDM teachers only. Such "
        "pairs are random, and a student cannot learn them",
        source="paper, supplement E",
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = setting(
        "auto",
        "Arithmetic of the network; solver updates are always fp32. auto: bf16 if the job takes a minute or "
        "more and bf16 is 1.2 times as fast here, otherwise fp32. It is measured when the store is created, "
        "and store.json keeps the choice",
    )
    seed: int = setting(0, "Seed of the noise: row i uses the noise of (seed, i)")
    dtype: Literal["float16", "float32"] = setting("float16", "Type of stored noise and latents")
    noise: Literal["stored", "seeded"] = setting(
        "stored", "stored: write the noise; seeded: readers compute it again from (seed, row)"
    )
    shard_size: int = setting(4096, "Rows per shard file")
    latent_size: int = setting(0, "Height and width of the latents; 0: the network's own")

    batch_size: int = setting(32, "Rows per network evaluation; 0 measures the fastest on this machine")
    text_cache: int = setting(
        0,
        "Rows whose prompts are encoded at once, with the text encoders off the GPU in between; 0 keeps "
        "them on it",
    )
    channels_last: bool = setting(False, "Run the network in channels-last memory format")
    compile: Literal["auto", True, False] = setting(
        "auto",
        "Run the network through torch.compile. auto: if the job takes ten minutes or more and compilation "
        "is faster on this machine; measured and stored like the precision",
    )
    patience: float = setting(120.0, "Seconds after which the shard of a silent process is taken over")
    scratch: str = setting(
        "",
        "Folder of this machine in which the shards of a store at a URL are made; empty: unfinished/ in the "
        "cache folder",
    )
    max_bad: float = setting(0.1, "Stop when more than this share of the rows has no finite latent")

    def __post_init__(self) -> None:
        check_values(self)
        require(
            self,
            per_prompt=(self.per_prompt >= 1, "1 or more"),
            steps=(self.steps >= 1, "1 or more"),
            shard_size=(self.shard_size >= 1, "1 or more"),
            num_pairs=(self.num_pairs >= 0, "0 or more"),
            latent_size=(self.latent_size >= 0, "0 or more"),
            batch_size=(self.batch_size >= 0, "0 or more"),
            text_cache=(self.text_cache >= 0, "0 or more"),
            guidance_rescale=(0 <= self.guidance_rescale <= 1, "0 to 1"),
            max_bad=(0 <= self.max_bad <= 1, "0 to 1"),
            patience=(self.patience > 0, "seconds, more than 0"),
            churn=(0 <= self.churn < inf, "0 (deterministic pairs) or more"),
            guidance=(self.guidance >= 1, "1 (no guidance) or more"),
        )
        require_prompts(self.column, self.prompts)


PAIR_PRESETS = Presets(
    {
        "default": ("50 steps at guidance 8", PairConfig()),
        "cifar10": (
            "The paper's CIFAR10 pairs: EDM with 18 Heun steps, no guidance (Table A1)",
            PairConfig(num_pairs=1_000_000, guidance=1.0, solver="heun", steps=18, batch_size=512),
        ),
        "sd15-cfg3": (
            "The paper's SD 1.5 pairs at guidance 3 (Table A1)",
            PairConfig(num_pairs=3_000_000, guidance=3.0, precision="fp16"),
        ),
        "sd15-cfg8": (
            "The paper's SD 1.5 pairs at guidance 8 (Table A1)",
            PairConfig(num_pairs=12_000_000, guidance=8.0, precision="fp16"),
        ),
        "sdxl-cfg7": (
            "The paper's SDXL pairs at guidance 7 (Table A1)",
            PairConfig(num_pairs=8_000_000, guidance=7.0, precision="bf16", batch_size=8),
        ),
        "flux-dev": (
            "FLUX.1-dev at 1024 px, its pipeline's steps and embedded guidance; as many pairs as sd15-cfg3",
            PairConfig(num_pairs=3_000_000, guidance=3.5, steps=28, precision="bf16", batch_size=8),
        ),
        "sana-600m": (
            "SANA 600M at 1024 px, its pipeline's guidance, 20 steps; as many pairs as sd15-cfg3",
            PairConfig(num_pairs=3_000_000, guidance=4.5, steps=20, precision="bf16"),
        ),
        "wuerstchen": (
            "Stage C of Wuerstchen v2 at 1024 px in the paper's 60 steps; as many pairs as sd15-cfg3",
            PairConfig(num_pairs=3_000_000, guidance=4.0, steps=60, precision="bf16"),
        ),
        "wuerstchen-b": (
            "Stage B of Wuerstchen v2 at 1024 px in the paper's 12 steps, for every row of stage C's pairs",
            PairConfig(guidance=4.0, steps=12, precision="bf16", batch_size=8, seed=1),
        ),
        "trial": (
            "64 pairs in 4 steps, to check that every command of a run works before the real one",
            PairConfig(
                num_pairs=64,
                guidance=3.0,
                steps=4,
                batch_size=8,
                shard_size=32,
                precision="fp32",
                compile=False,
            ),
        ),
        "miniature": (
            "The shipped miniature teacher on two CPU cores",
            PairConfig(teacher="miniature", guidance=3.0, steps=20, batch_size=128, shard_size=512),
        ),
    }
)
"""Presets of `d2g pairs generate` and `d2g pairs plan`."""
