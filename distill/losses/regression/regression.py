"""The regression loss of both stages: a distance between the student's and the teacher's latents."""

import torch
from torch import Tensor, nn

from d2g.core.errors import SettingError
from d2g.diffusion import pretrained
from d2g.diffusion.pipelines import family_of
from distill.config.components import RegressionConfig
from distill.config.run import DistillConfig
from distill.losses.regression.base import FrozenNetworks, Transforms
from distill.losses.regression.e_latent_lpips import EnsembleDistance
from distill.losses.regression.registry import REGRESSION_LOSSES, regression_networks
from latent_lpips.config import Precision
from latent_lpips.distance import ELatentLPIPS
from latent_lpips.weights import load_lpips


class Regression(nn.Module):
    """Weighted sum of the distance `regression.kind` and of the terms added to it: LatentLPIPS and L1."""

    def __init__(self, config: RegressionConfig, networks: FrozenNetworks) -> None:
        super().__init__()
        self.config, self.loss = config, REGRESSION_LOSSES[config.kind]
        self.distance = self.loss.build(config, networks)
        self.latent_lpips = networks.latent_lpips if config.latent_lpips_weight else None

    @property
    def validation_distance(self) -> ELatentLPIPS | None:
        """The distance that validation measures beside PSNR; None if the run has no E-LatentLPIPS."""
        return self.distance.ensemble if isinstance(self.distance, EnsembleDistance) else None

    def draw(self, rows: int, shape: tuple[int, int, int], rng: torch.Generator) -> Transforms:
        """Random transforms of `rows` latents of `shape` (C, h, w); None for a loss without transforms."""
        return self.distance.draw(rows, shape, rng)

    def forward(
        self, pred: Tensor, target: Tensor, transforms: Transforms
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """pred, target [B, C, h, w] scaled latents -> (weighted sum, unweighted terms by log key).

        All are means over the batch. transforms: of these rows, from `draw`.
        """
        config, key = self.config, self.loss.log_key
        terms = {key: self.distance(pred, target, transforms).mean()}
        total = config.weight * terms[key]
        if self.latent_lpips is not None:
            terms["loss/latent_lpips"] = self.latent_lpips(pred, target).mean()
            total = total + config.latent_lpips_weight * terms["loss/latent_lpips"]
        if config.l1_weight:
            terms["loss/l1"] = (pred - target).abs().mean()
            total = total + config.l1_weight * terms["loss/l1"]
        return total, terms


def build_regression(config: DistillConfig, channels: int, device: torch.device | str = "cpu") -> Regression:
    """The regression loss of a run, with its frozen networks loaded. channels: of the latents.

    Raises UserError for weights that are missing or of another latent space, SettingError for a distance of
    latents where the teacher generates pixels.
    """
    needs, latent_lpips = regression_networks(config.regression), None
    if "latent_lpips" in needs:
        _require_latents(config.teacher, config.regression)
        folder = config.lpips or str(pretrained.resolve(config.teacher) / "latent_lpips")
        precision: Precision = "auto" if config.train.precision == "bf16" else "fp32"
        latent_lpips = load_lpips(folder, channels, precision=precision, device=device)
    vae = pretrained.load_vae(config.teacher).to(device) if "vae" in needs else None
    return Regression(config.regression, FrozenNetworks(latent_lpips, vae)).to(device)


def _require_latents(teacher: str, config: RegressionConfig) -> None:
    if family_of(teacher).autoencoder is not None:
        return
    remedy = "regression.latent_lpips_weight=0"
    if "latent_lpips" in REGRESSION_LOSSES[config.kind].needs:
        others = [name for name, loss in REGRESSION_LOSSES.items() if "latent_lpips" not in loss.needs]
        remedy = f"regression.kind={', '.join(others[:-1])} or {others[-1]}"
    raise SettingError(f"teacher {teacher} generates pixels, for which there is no LatentLPIPS; set {remedy}")
