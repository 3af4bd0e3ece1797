"""How near an image is to the teacher's image of the same noise: means over pairs."""

from typing import TYPE_CHECKING

from eval.protocols.metric import Metric, mean_of_rows

if TYPE_CHECKING:
    from torch import Tensor


def _psnr(images: "Tensor", teacher_images: "Tensor") -> "Tensor":
    from eval.metrics.paired import psnr

    return psnr(images, teacher_images)


DREAMSIM = Metric(
    name="dreamsim",
    description="DreamSim distance to the teacher's image of the same noise",
    label="DreamSim to the teacher",
    better="lower",
    interval="bootstrap",
    networks=("dreamsim",),
    needs_reference=False,
    compute=mean_of_rows("dreamsim"),
    paired=True,
    ranks_images=True,
)

LPIPS = Metric(
    name="lpips",
    description="LPIPS to the teacher's image of the same noise",
    label="LPIPS to the teacher",
    better="lower",
    interval="bootstrap",
    networks=("lpips",),
    needs_reference=False,
    compute=mean_of_rows("lpips"),
    paired=True,
    ranks_images=True,
)

LATENT_LPIPS = Metric(
    name="latent_lpips",
    description="LatentLPIPS to the teacher's image of the same noise",
    label="LatentLPIPS to the teacher",
    better="lower",
    interval="bootstrap",
    networks=("latent_lpips",),
    needs_reference=False,
    compute=mean_of_rows("latent_lpips"),
    paired=True,
)

PSNR = Metric(
    name="psnr",
    description="peak signal-to-noise ratio to the teacher's image of the same noise",
    label="PSNR to the teacher (dB)",
    better="higher",
    interval="bootstrap",
    networks=(),
    needs_reference=False,
    compute=mean_of_rows("psnr"),
    paired=True,
    pair_distance=_psnr,
    ranks_images=True,
)
