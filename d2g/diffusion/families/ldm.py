"""Latent diffusion of 2022 (LDMPipeline): a UNet2DModel on the latents of a VQ autoencoder."""

from typing import ClassVar

from d2g.diffusion.families.base import ANY_SCHEDULER, Components
from d2g.diffusion.families.unet2d import UNet2D


class LatentDiffusion(UNet2D):
    """LDMPipeline: as `UNet2D`, but on latents and never flat."""

    name = "ldm"
    title = "LDM with a VQ autoencoder"
    pipelines = ("LDMPipeline",)
    components: ClassVar[Components] = {
        "unet": ("UNet2DModel",),
        "vqvae": ("VQModel",),
        "scheduler": ANY_SCHEDULER,
    }
    autoencoder = "vqvae"
    flat_layout = False
