"""The regression loss of both stages: a distance between the student's and the teacher's latents."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from d2g.core.errors import SettingError
from d2g.diffusion import pretrained
from d2g.diffusion.pipelines import family_of
from distill.config.regression import RegressionConfig
from distill.config.run import DistillConfig
from distill.losses.regression.base import FrozenNetworks, Network, RowDistance, Transforms
from distill.losses.regression.e_latent_lpips import EnsembleDistance
from distill.losses.regression.registry import REGRESSION_LOSSES, regression_networks
from latent_lpips.config import Precision
from latent_lpips.distance import ELatentLPIPS
from latent_lpips.weights import load_lpips

NEEDS_LATENTS: frozenset[Network] = frozenset({"latent_lpips", "decoder"})
"""Networks that exist only for a teacher of latents."""


class Regression(nn.Module):
    """Weighted sum of the distances in `regression.losses`. At most one of them has random transforms."""

    def __init__(self, config: RegressionConfig, networks: FrozenNetworks) -> None:
        super().__init__()
        self.weights = dict(config.losses)
        self.distances: Mapping[str, RowDistance] = nn.ModuleDict(  # type: ignore[assignment]
            {name: REGRESSION_LOSSES[name].build(config, networks) for name in self.weights}
        )

    @property
    def validation_distance(self) -> ELatentLPIPS | None:
        """The distance that validation measures beside PSNR; None if the run has no E-LatentLPIPS."""
        ensembles = [d.ensemble for d in self.distances.values() if isinstance(d, EnsembleDistance)]
        return ensembles[0] if ensembles else None

    def draw(self, rows: int, shape: tuple[int, int, int], rng: torch.Generator) -> Transforms:
        """Random transforms of `rows` latents of `shape` (C, h, w); None for losses without transforms."""
        transforms = [distance.draw(rows, shape, rng) for distance in self.distances.values()]
        return next((t for t in transforms if t is not None), None)

    def forward(
        self, pred: Tensor, target: Tensor, transforms: Transforms
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """pred, target [B, C, h, w] scaled latents -> (weighted sum, unweighted terms by log key).

        All are means over the batch. transforms: of these rows, from `draw`.
        """
        total, terms = pred.new_zeros(()), {}
        for name, weight in self.weights.items():
            value = self.distances[name](pred, target, transforms).mean()
            terms[REGRESSION_LOSSES[name].log_key] = value
            total = total + weight * value
        return total, terms


def build_regression(config: DistillConfig, channels: int, device: torch.device | str = "cpu") -> Regression:
    """The regression loss of a run, with its frozen networks loaded. channels: of the latents.

    Raises UserError for weights that are missing or of another latent space, SettingError for a distance of
    latents where the teacher generates pixels.
    """
    _require_latents(config.teacher, config.regression)
    needs, latent_lpips = regression_networks(config.regression), None
    if "latent_lpips" in needs:
        folder = config.lpips or str(pretrained.resolve(config.teacher) / "latent_lpips")
        precision: Precision = "auto" if config.train.bf16 else "fp32"
        latent_lpips = load_lpips(folder, channels, precision=precision, device=device)
    vae = pretrained.load_vae(config.teacher).to(device) if needs & {"vae", "decoder"} else None
    return Regression(config.regression, FrozenNetworks(latent_lpips, vae)).to(device)


def _require_latents(teacher: str, config: RegressionConfig) -> None:
    family = family_of(teacher)
    if family.autoencoder is not None:
        return
    # Pixels have no distance of latents, and latents that are no images none of pixels.
    excluded: set[str] = set(NEEDS_LATENTS) if family.draws_images else {"vae", "decoder"}
    unfitting = [name for name, loss in REGRESSION_LOSSES.items() if loss.needs & excluded]
    unfit = [name for name in config.names if name in unfitting]
    if not unfit:
        return
    *others, last = [name for name in REGRESSION_LOSSES if name not in unfitting]
    output = "pixels" if family.draws_images else "latents that no autoencoder decodes"
    raise SettingError(
        f"teacher {teacher} generates {output}, for which there is no {unfit[0]}; expected regression.losses "
        f"of {', '.join(others)} or {last}"
    )
