import itertools

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from core.errors import UserError
from latent_lpips import ELatentLPIPS, LatentLPIPS, augment
from latent_lpips.config import AugmentConfig, LPIPSConfig
from latent_lpips.metric import normalise

FAMILIES = ["none"] + ["".join(c) for n in range(1, 5) for c in itertools.combinations("bgco", n)]


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def latents(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=rng(seed))


@pytest.fixture(scope="module")
def metric() -> LatentLPIPS:
    torch.manual_seed(0)
    metric = LatentLPIPS(LPIPSConfig(width=1 / 16))
    for head in metric.heads:
        head.uniform_(0, 2)
    return metric


def test_distance_equals_the_hand_formula(metric: LatentLPIPS) -> None:
    a, b = latents(3, 4, 8, 8), latents(3, 4, 8, 8, seed=1)
    expected = torch.zeros(3, 5)
    for layer, (f, g) in enumerate(zip(metric.trunk.taps(a), metric.trunk.taps(b), strict=True)):
        f = f / torch.sqrt((f**2).sum(1, keepdim=True) + 1e-8)
        g = g / torch.sqrt((g**2).sum(1, keepdim=True) + 1e-8)
        expected[:, layer] = torch.einsum("bchw,c->bhw", (f - g) ** 2, metric.heads[layer]).mean((1, 2))
    torch.testing.assert_close(metric.layers(a, b), expected)
    torch.testing.assert_close(metric(a, b), expected.sum(1))
    assert metric(a, b).min() > 0.1


def test_published_lpips_agrees_on_our_features(metric: LatentLPIPS) -> None:
    import lpips

    a, b = latents(3, 4, 8, 8), latents(3, 4, 8, 8, seed=1)
    expected = torch.zeros(3)
    for head, f, g in zip(metric.heads, metric.trunk.taps(a), metric.trunk.taps(b), strict=True):
        linear = lpips.NetLinLayer(len(head), use_dropout=True).eval()
        linear.model[1].weight.data.copy_(head[None, :, None, None])
        difference = (lpips.normalize_tensor(f) - lpips.normalize_tensor(g)) ** 2
        expected += lpips.spatial_average(linear(difference), keepdim=False)[:, 0].detach()
    torch.testing.assert_close(metric(a, b), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("families", FAMILIES)
def test_zero_at_identity_for_every_draw_and_never_negative(metric: LatentLPIPS, families: str) -> None:
    ensemble = ELatentLPIPS(metric, AugmentConfig(families=families), draws=3)
    for size in ((8, 8), (4, 6)):
        a, b = latents(3, 4, *size), latents(3, 4, *size, seed=1)
        assert torch.equal(ensemble(a, a.clone(), generator=rng(7)), torch.zeros(3))
        assert torch.equal(ensemble(a.requires_grad_(), a, generator=rng(7)), torch.zeros(3))
        assert ensemble(a, b, generator=rng(7)).min() >= 0
        assert ensemble(a, b, generator=rng(7)).max() > 0


@pytest.mark.parametrize("families", FAMILIES)
def test_both_inputs_get_the_same_transform(metric: LatentLPIPS, families: str) -> None:
    config = AugmentConfig(families=families)
    a, b = latents(4, 4, 8, 8), latents(4, 4, 8, 8, seed=1)
    params = augment.draw(config, 4, (8, 8), rng(3))
    expected = metric(augment.apply(a, params), augment.apply(b, params))
    assert torch.equal(ELatentLPIPS(metric, config)(a, b, generator=rng(3)), expected)
    if families != "none":
        other = augment.draw(config, 4, (8, 8), rng(4))
        mixed = metric(augment.apply(a, params), augment.apply(b, other))
        assert (mixed - expected).abs().max() > 1e-3


def test_draws_are_averaged_and_the_generator_decides(metric: LatentLPIPS) -> None:
    a, b = latents(2, 4, 8, 8), latents(2, 4, 8, 8, seed=1)
    shared = rng(5)
    one = ELatentLPIPS(metric)
    expected = torch.stack([one(a, b, generator=shared) for _ in range(3)]).mean(0)
    assert torch.equal(ELatentLPIPS(metric, draws=3)(a, b, generator=rng(5)), expected)
    assert not torch.equal(one(a, b, generator=rng(6)), one(a, b, generator=rng(5)))


@pytest.mark.parametrize("case", ["apart", "equal", "zero"])
def test_bf16_and_autocast_give_fp32_distances_and_finite_gradients(metric: LatentLPIPS, case: str) -> None:
    target = latents(2, 4, 8, 8, seed=1).bfloat16() * (case != "zero")
    pred = (latents(2, 4, 8, 8).bfloat16() if case == "apart" else target.clone()).requires_grad_()
    ensemble = ELatentLPIPS(metric)
    plain = ensemble(pred.detach(), target, generator=rng())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        distance = ensemble(pred, target, generator=rng())
        (gradient,) = torch.autograd.grad(distance.sum(), pred)
    assert distance.dtype == torch.float32
    assert torch.equal(distance, plain)
    assert gradient.isfinite().all()
    assert (gradient.abs().max() > 0) == (case == "apart")


def test_all_zero_features_have_a_finite_gradient() -> None:
    features = torch.zeros(1, 3, 2, 2).requires_grad_()
    (gradient,) = torch.autograd.grad(normalise(features).sum(), features)
    assert gradient.isfinite().all()


def test_gradient_is_right_and_goes_to_pred_only(metric: LatentLPIPS) -> None:
    pred, target = latents(1, 4, 8, 8).requires_grad_(), latents(1, 4, 8, 8, seed=1).requires_grad_()
    metric(pred, target).sum().backward()
    assert target.grad is None
    assert all(p.grad is None and not p.requires_grad for p in metric.parameters())
    assert pred.grad is not None
    direction = pred.grad / pred.grad.norm()
    with torch.no_grad():
        ahead, behind = (metric(pred + s * direction, target).item() for s in (1e-2, -1e-2))
    assert (ahead - behind) / 2e-2 == pytest.approx(pred.grad.norm().item(), rel=0.05)


def test_train_mode_leaves_the_norms_alone(metric: LatentLPIPS) -> None:
    a, b = latents(4, 4, 8, 8), latents(4, 4, 8, 8, seed=1)
    before, state = metric(a, b), {k: v.clone() for k, v in metric.state_dict().items()}
    parent = nn.ModuleDict({"loss": ELatentLPIPS(metric)}).train()
    assert parent.training and not any(m.training for m in metric.modules())
    assert torch.equal(metric(a, b), before)
    assert all(torch.equal(v, state[k]) for k, v in metric.state_dict().items())


def test_spatial_map_has_the_latents_size_and_points_at_the_change(metric: LatentLPIPS) -> None:
    a = latents(1, 4, 32, 32)
    b = a.clone()
    b[:, :, 4:8, 20:24] += 3
    where = metric.spatial(a, b)
    assert where.shape == (1, 32, 32) and where.min() >= 0
    assert where[0, 2:10, 18:26].mean() > 10 * where[0, 24:, :8].mean()


def test_folded_metric_measures_the_same() -> None:
    torch.manual_seed(1)
    metric = LatentLPIPS(LPIPSConfig(width=1 / 16))
    for module in metric.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.2)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 2)  # type: ignore[arg-type]
    a, b = latents(3, 4, 8, 8), latents(3, 4, 8, 8, seed=1)
    before = metric(a, b)
    torch.testing.assert_close(metric.fold()(a, b), before, rtol=1e-5, atol=1e-5)
    assert not any(p.requires_grad for p in metric.parameters())


def test_negative_or_nan_heads_are_refused() -> None:
    metric = LatentLPIPS(LPIPSConfig(width=1 / 16))
    for bad in (-0.25, float("nan")):
        state = metric.state_dict()
        state["heads.3"] = torch.full_like(state["heads.3"], bad)
        with pytest.raises(
            UserError, match=r"head 3 holds the weight .* expected 0 or more; calibrate again"
        ):
            LatentLPIPS(LPIPSConfig(width=1 / 16)).load_state_dict(state)


def test_different_shapes_are_refused(metric: LatentLPIPS) -> None:
    with pytest.raises(UserError, match=r"\(1, 4, 8, 8\) and \(2, 4, 8, 8\)"):
        metric(latents(1, 4, 8, 8), latents(2, 4, 8, 8))


def test_nothing_waits_for_a_number_from_the_device(metric: LatentLPIPS) -> None:
    """A fake tensor has a shape and no values: reading one on the host raises."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        pred, target = torch.empty(2, 4, 11, 11), torch.empty(2, 4, 11, 11)
        with pytest.raises(DataDependentOutputException):
            pred.mean().item()
        assert ELatentLPIPS(metric)(pred, target).shape == (2,)
    augment._enlarger.cache_clear()
    augment._shrinker.cache_clear()
