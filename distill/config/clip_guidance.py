"""Settings of guidance by CLIP."""

from dataclasses import dataclass
from typing import Literal

from d2g.core.config import check_values, require, setting


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipGuidanceConfig:
    """A loss that draws the student's images toward their texts, by a frozen CLIP."""

    weight: float = setting(
        0.0,
        "Weight of CLIP's loss in the student's loss; 0: none. StyleGAN-T: 0.2, spherical; too much costs "
        "FID and diversity",
        source="StyleGAN-T, section 3.3 and table 4",
    )
    form: Literal["spherical", "contrastive"] = setting(
        "spherical",
        "spherical: arccos(image . text)^2 (StyleGAN-T); contrastive: the cross entropy of the own text "
        "among those of the batch, over all processes (GigaGAN)",
        source='method.md "Guidance by CLIP"',
    )
    model: str = setting(
        "openai/clip-vit-large-patch14",
        "CLIP in transformers' format, with its tokenizer: a folder or a hub id. Use another CLIP "
        "to score the student",
        source="StyleGAN-T, section 3: ViT-L/14",
    )
    crop: int = setting(
        64,
        "Side in pixels of the random crops of larger images that CLIP sees",
        source="StyleGAN-T, section 3.3",
    )

    def __post_init__(self) -> None:
        check_values(self)
        require(
            self,
            weight=(self.weight >= 0, "0 or more"),
            crop=(self.crop >= 1, "1 or more"),
        )
