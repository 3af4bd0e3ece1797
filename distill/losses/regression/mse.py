"""Mean squared error of latents."""

from torch import Tensor

from distill.losses.regression.base import FunctionDistance, RegressionLoss


def squared_error(pred: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each row. pred, target [B, C, h, w] -> [B]."""
    return (pred - target).square().mean(dim=(1, 2, 3))


MSE_LOSS = RegressionLoss(
    name="mse", log_key="loss/mse", build=lambda config, networks: FunctionDistance(squared_error)
)
