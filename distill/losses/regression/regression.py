"""The regression loss of both stages: a weighted sum of distances between student's and teacher's latents."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from d2g.core.distributed import process_group
from d2g.core.errors import SettingError
from d2g.core.logs import logger
from d2g.diffusion import pretrained
from d2g.diffusion.pipelines import family_of
from distill.config.regression import RegressionConfig
from distill.config.run import DistillConfig
from distill.losses.regression.base import FrozenNetworks, Network, RowDistance, Transforms
from distill.losses.regression.e_latent_lpips import EnsembleDistance
from distill.losses.regression.registry import REGRESSION_LOSSES, regression_networks
from latent_lpips.config import Precision
from latent_lpips.distance import ELatentLPIPS
from latent_lpips.weights import load_lpips, read_lpips_meta, require_latent_scale

NEEDS_LATENTS: frozenset[Network] = frozenset({"latent_lpips", "decoder"})
"""Networks that exist only for teachers in a latent space."""


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
        """The run's E-LatentLPIPS, which validation measures beside PSNR; None if it has none."""
        ensembles = [d.ensemble for d in self.distances.values() if isinstance(d, EnsembleDistance)]
        return ensembles[0] if ensembles else None

    def draw(self, rows: int, shape: tuple[int, int, int], rng: torch.Generator) -> Transforms:
        """Sample transforms for `rows` latents of `shape` (C, h, w); None for losses without transforms."""
        transforms = [distance.draw(rows, shape, rng) for distance in self.distances.values()]
        return next((sampled for sampled in transforms if sampled is not None), None)

    def forward(
        self, pred: Tensor, target: Tensor, transforms: Transforms
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute (weighted sum of the losses, unweighted losses by log key), all scalars.

        pred, target: scaled latents [B, C, h, w]. transforms: those of these rows, from `draw`.
        """
        total, terms = pred.new_zeros(()), {}
        for name, weight in self.weights.items():
            value = self.distances[name](pred, target, transforms).mean()
            terms[REGRESSION_LOSSES[name].log_key] = value
            total = total + weight * value
        return total, terms


def build_regression(config: DistillConfig, channels: int, device: torch.device | str = "cpu") -> Regression:
    """Build the regression loss of a run and load its frozen networks. channels: channels of the latents.

    Raises UserError for weights that are missing or belong to another latent space, and SettingError for a
    loss that does not exist in the teacher's space (latents or pixels).
    """
    check_space(config.teacher, config.regression)
    needs, latent_lpips = regression_networks(config.regression), None
    if "latent_lpips" in needs:
        folder = config.lpips or str(pretrained.resolve(config.teacher) / "latent_lpips")
        precision: Precision = "auto" if config.train.bf16 else "fp32"
        latent_lpips = load_lpips(folder, channels, precision=precision, device=device)
        _check_metric(folder, config.teacher)
    vae = pretrained.load_vae(config.teacher).to(device) if needs & {"vae", "decoder"} else None
    return Regression(config.regression, FrozenNetworks(latent_lpips, vae)).to(device)


def _check_metric(lpips: str, teacher: str) -> None:
    """Raise UserError if a LatentLPIPS was trained on latents of another scale than the teacher's, and warn
    if it was trained with another autoencoder. Weights that record neither are not checked."""
    if family_of(teacher).autoencoder is None:
        return
    meta = read_lpips_meta(lpips)
    require_latent_scale(lpips, meta, pretrained.autoencoder_on_meta(teacher), teacher)
    expected = meta.get("autoencoder_sha256")
    if expected is None or process_group.rank() != 0:
        return
    # The same autoencoder may have other files, or another decoder.
    if expected != (sha256 := pretrained.autoencoder_sha256(teacher)):
        logger.warning(
            "lpips is %s, which was trained in the latents of %s (sha256 %s), but %s has another autoencoder "
            "(sha256 %s): if its latents are others, too, their distance means nothing; give weights of this "
            "latent space",
            *(lpips, meta.get("autoencoder"), str(expected)[:12], teacher, sha256[:12]),
        )


def check_space(teacher: str, config: RegressionConfig) -> None:
    """Raise SettingError for losses that need networks which the teacher's space does not have."""
    family = family_of(teacher)
    if family.autoencoder is not None:
        return
    # Pixels have no latent distance. Latents without an autoencoder have no distance of decoded images.
    missing: set[str] = set(NEEDS_LATENTS) if family.draws_images else {"vae", "decoder"}
    unsupported = [name for name in config.names if REGRESSION_LOSSES[name].needs & missing]
    if not unsupported:
        return
    *others, last = [name for name, loss in REGRESSION_LOSSES.items() if not loss.needs & missing]
    output = "pixels" if family.draws_images else "latents that no autoencoder decodes"
    raise SettingError(
        f"teacher {teacher} generates {output}, for which there is no {unsupported[0]}; expected "
        f"regression.losses of {', '.join(others)} or {last}"
    )
