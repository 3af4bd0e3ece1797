"""Chooses the preset of a run without --preset, by the size and the family of its teacher."""

from math import prod
from pathlib import Path

from d2g.diffusion import pretrained
from d2g.diffusion.families.base import Family
from d2g.diffusion.families.cascade import CascadeFamily
from d2g.diffusion.families.transformer import TransformerFamily
from d2g.diffusion.pipelines import open_pipeline
from distill.config.presets import DISTILL_PRESETS

DEFAULT = "sd15-cfg8"
"""The preset for Stable Diffusion 1.5, and where the teacher is not on this disk."""
SMALL = 100_000_000
"""Parameters of a denoiser below which a teacher gets the plan of the miniature, which a CPU can train."""

OF_FAMILY = {
    "sdxl": "sdxl-cfg7",
    "unet2d": "cifar10",
    "dit": "dit-xl-256",
    "pixart": "pixart-sigma-512",
    "sd3": "sd35-medium",
    "flux": "flux-dev",
    "sana": "sana-600m",
    "wuerstchen_prior": "wuerstchen",
    "wuerstchen_decoder": "wuerstchen-b",
    "stable_cascade_prior": "wuerstchen",
    "stable_cascade_decoder": "wuerstchen-b",
}
"""Presets by the name of the family; `_preset_of_network` says which one other families take."""
TEXT_OF_FAMILY = {"sdxl": "sdxl-text"}
"""Presets of stage text by the name of the family; others take that of Stable Diffusion 1.5."""


def _preset_of_network(family: Family) -> str:
    """A preset whose discriminator and losses work for this kind of network."""
    if isinstance(family, CascadeFamily):
        return "wuerstchen"
    if family.autoencoder is None:
        return "cifar10"
    return "sd35-medium" if isinstance(family, TransformerFamily) else DEFAULT


def preset_of_family(family: Family) -> str:
    """The preset of large teachers of a family."""
    return OF_FAMILY.get(family.name) or _preset_of_network(family)


def choose_preset(teacher: str, stage: str) -> tuple[str, str]:
    """(name of the preset, reason in words) for a stage of a run with this teacher; "" for none.

    Reads the teacher's configs, no weights. Raises UserError for a folder that is no teacher.
    """
    default = {"text": "sd15-text", "cd": "cifar10"}.get(stage, DEFAULT)
    if not teacher:
        return default, "no teacher is named"
    if teacher not in pretrained.SHIPPED and not Path(teacher).is_dir():
        return default, f"teacher {teacher} is not on this disk"
    family = open_pipeline(teacher).family
    network = pretrained.load_on_meta(teacher, family.network)
    size = sum(prod(parameter.shape) for parameter in network.parameters())
    reason = f"teacher {teacher} ({family.title}) has {size / 1e6:,.1f} million parameters"
    published = preset_of_family(family)
    small = "small-transformer" if family.network == "transformer" else "miniature"
    # The small presets compare latents, and have the discriminator of a U-Net or a transformer.
    if family.autoencoder is None or isinstance(family, CascadeFamily):
        small = published
    name = small if size < SMALL else published
    if stage == "text":
        name = "miniature-text" if size < SMALL else TEXT_OF_FAMILY.get(family.name, "sd15-text")
    # A preset without the stage is no choice.
    return next(choice for choice in (name, small, default) if stage in DISTILL_PRESETS[choice]), reason
