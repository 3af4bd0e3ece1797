"""Mean absolute error of latents, which the authors' E-LatentLPIPS package adds with weight 1."""

from torch import Tensor

from distill.losses.regression.base import FunctionDistance, RegressionLoss


def absolute_error(pred: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error of each row. pred, target [B, C, h, w] -> [B]."""
    return (pred - target).abs().mean(dim=(1, 2, 3))


L1_LOSS = RegressionLoss(
    name="l1", log_key="loss/l1", build=lambda config, networks: FunctionDistance(absolute_error)
)
