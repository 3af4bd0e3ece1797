"""LPIPS (Zhang et al. 2018) of images, or of latents through a decoder, with the interface of LatentLPIPS."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal
from urllib.error import URLError

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from d2g.core.errors import SettingError, UserError
from d2g.core.machine_errors import raise_machine_error
from d2g.core.torch_files import load_tensors
from latent_lpips.distance import PerceptualDistance, require_nonnegative_heads

LPIPS_NETS = ("vgg", "alex", "squeeze")


class PixelLPIPS(PerceptualDistance):
    """LPIPS v0.1 of images [B, 3, H, W] in [-1, 1], or of latents that `decode` turns into images.

    Networks and heads come from the package lpips (BSD-2; its trunks are torchvision's, BSD-3). The distance
    is computed by PerceptualDistance: it equals the package's to 1e-5 and has finite gradients at all-zero
    features.
    """

    def __init__(
        self,
        net: Literal["vgg", "alex", "squeeze"] = "vgg",
        weights: str | Path | None = None,
        pretrained: bool = True,
        decode: Callable[[Tensor], Tensor] | None = None,
        resize: int | None = None,
    ) -> None:
        """Build the network `net`.

        `weights` is a local state dict of torchvision's vgg16, alexnet or squeezenet1_1; by default it is
        downloaded to PyTorch's hub folder. `pretrained=False` leaves the trunk random, for tests and timings.
        `decode` maps scaled latents to pixels, for example `partial(d2g.diffusion.latents.decode, vae)` with
        a frozen VAE. `resize` is the side in pixels to which images are resized bilinearly (DMD uses 224 for
        CIFAR). Raises SettingError for an unknown `net`, and UserError for weights that are missing or belong
        to another network.
        """
        super().__init__()
        if net not in LPIPS_NETS:
            raise SettingError(f"LPIPS network {net!r} is unknown, expected one of {', '.join(LPIPS_NETS)}")
        if resize is not None and resize < 1:
            raise SettingError(f"PixelLPIPS: resize is {resize}, expected a positive number of pixels")
        # Build the package's network, with the published trunk or with the user's.
        published = _published(net, download=pretrained and weights is None)
        if weights is not None:
            _load_torchvision(published.net, Path(weights), net)
        # Keep trunk and heads only; PerceptualDistance computes the distance.
        self.trunk, self.scaling = published.net, published.scaling_layer
        self.heads = nn.ParameterList(lin.model[-1].weight.detach().flatten() for lin in published.lins)
        require_nonnegative_heads(self.heads, f"LPIPS {net}")
        self.decode, self.resize = decode, resize
        for part in (self.trunk, self.scaling, self.heads):
            part.requires_grad_(False)
        self.train()

    def taps(self, x: Tensor) -> list[Tensor]:
        """Return the trunk's feature maps, 5 (squeeze: 7), of images or of the decoder's inputs."""
        # The trunk takes RGB images, as LPIPS scales them.
        pixels = self.decode(x) if self.decode is not None else x.float()
        if pixels.dim() != 4 or pixels.shape[1] != 3:
            raise UserError(f"LPIPS got pixels of shape {tuple(pixels.shape)}, expected [B, 3, H, W]")
        if self.resize is not None:
            pixels = F.interpolate(pixels, (self.resize, self.resize), mode="bilinear")
        return list(self.trunk(self.scaling(pixels.float())))


def _published(net: str, download: bool) -> Any:
    """Build the package's network with its heads; the trunk is pretrained or random."""
    import lpips

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the package passes a deprecated argument to torchvision
        try:
            return lpips.LPIPS(net=net, pnet_rand=not download, verbose=False)
        except (URLError, OSError) as error:
            raise UserError(
                f"LPIPS {net}: the trunk is not in {torch.hub.get_dir()} and cannot be fetched ({error}); "
                "give its file as `weights`"
            ) from error


def _load_torchvision(trunk: nn.Module, file: Path, net: str) -> None:
    """Load torchvision's tensors into the package's slices, which call features.3.weight slice2.3.weight."""
    try:
        state = load_tensors(file)
        names = trunk.state_dict()
        trunk.load_state_dict({name: state[f"features.{name.partition('.')[2]}"] for name in names})
    except FileNotFoundError as error:
        raise UserError(f"{file}: no such file, expected torchvision's weights of {net}") from error
    except Exception as error:  # on damaged bytes the unpickler raises almost anything
        raise_machine_error(error)
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{file} is not torchvision's state dict of {net} ({reason}); give the file that torchvision "
            "publishes"
        ) from error
