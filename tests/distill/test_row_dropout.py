"""distill.models.row_dropout: masks depend on the row only and are statistically independent."""

import pytest
import torch
from torch import nn

from distill.models.row_dropout import RowDropout, keep_mask, row_keys, set_dropout_keys

SHAPE = (16, 32, 32)


def masks(rows: range, layer: int = 0, p: float = 0.25, seed: int = 0) -> torch.Tensor:
    return keep_mask(row_keys(seed, rows), layer, torch.Size((len(rows), *SHAPE)), p)


def test_a_mask_does_not_depend_on_the_other_rows() -> None:
    all_masks = masks(range(8))
    assert torch.equal(all_masks[3:5], masks(range(3, 5)))
    assert torch.equal(all_masks, masks(range(8)))
    others = (masks(range(8), layer=1), masks(range(8), seed=1), masks(range(8, 16)))
    assert all(abs((all_masks == other).float().mean() - (0.75**2 + 0.25**2)) < 0.005 for other in others)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_drop_counts_are_binomial_along_each_axis(p: float) -> None:
    """All means lie within 5.5 standard errors, and their variance is that of independent samples."""
    dropped = (~masks(range(64), p=p)).double()
    for dims in ((0, 1, 2, 3), (1, 2, 3), (0, 2, 3), (0, 1, 3), (2, 3), (0, 1), (0, 2), (1, 2)):
        mean = dropped.mean(dims)
        count = dropped.numel() / mean.numel()
        z = (mean - p) * (count / (p * (1 - p))) ** 0.5
        assert z.abs().max() < 5.5
        if mean.numel() >= 1024:
            assert 0.85 < z.square().mean() < 1.15


def test_masks_of_neighboring_rows_are_independent() -> None:
    """Correlations at distances 1 to 3 along layer, row, channel, height and width vanish."""
    x = torch.stack([masks(range(32), layer, p=0.5) for layer in range(4)]).double() - 0.5
    for axis in range(5):
        for step in (1, 2, 3):
            a, b = x.narrow(axis, step, x.shape[axis] - step), x.narrow(axis, 0, x.shape[axis] - step)
            z = 4 * (a * b).mean() * a.numel() ** 0.5
            assert abs(z) < 5, (axis, step)


def test_four_corners_of_a_rectangle_are_independent() -> None:
    """If the hash were hash(channel) xor hash(position), three corners would determine the fourth."""
    x = masks(range(64), p=0.5).flatten(2).double() - 0.5
    product = x[:, 0::2, 0::2] * x[:, 1::2, 0::2] * x[:, 0::2, 1::2] * x[:, 1::2, 1::2]
    assert abs(16 * product.mean() * product.numel() ** 0.5) < 5


def test_kept_values_are_scaled_and_eval_mode_is_the_identity() -> None:
    net = nn.Sequential(RowDropout(0.2, 0), nn.Identity(), RowDropout(0.5, 1))
    x = torch.ones(4, *SHAPE, dtype=torch.bfloat16, requires_grad=True)
    set_dropout_keys(net, row_keys(5, range(4)))
    out = net(x)
    assert out.dtype == x.dtype and set(out.unique().tolist()) == {0.0, 2.5}
    out.sum().backward()
    assert x.grad is not None and torch.equal(x.grad, out.detach())
    assert out.float().mean().item() == pytest.approx(1, abs=0.03)
    assert torch.equal(net.eval()(x), x)
    with pytest.raises(AssertionError, match="a key for each row"):
        net.train()(x[:3])


def test_feature_vectors_have_masks() -> None:
    keys = row_keys(0, range(64))
    assert keep_mask(keys, 0, torch.Size((64, 256)), 0.3).float().mean().item() == pytest.approx(
        0.7, abs=0.02
    )
