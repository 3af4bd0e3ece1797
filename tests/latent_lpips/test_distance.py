import copy
import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from d2g.core.errors import SettingError, UserError
from latent_lpips import ELatentLPIPS, LatentLPIPS, augment
from latent_lpips.config import AugmentConfig, LPIPSConfig
from latent_lpips.weights import load_lpips, save_lpips

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


def test_distance_equals_its_formula(metric: LatentLPIPS) -> None:
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
    params = augment.sample_transforms(config, 4, (8, 8), rng(3))
    expected = metric(augment.apply_transforms(a, params), augment.apply_transforms(b, params))
    assert torch.equal(ELatentLPIPS(metric, config)(a, b, generator=rng(3)), expected)
    if families != "none":
        other = augment.sample_transforms(config, 4, (8, 8), rng(4))
        mixed = metric(augment.apply_transforms(a, params), augment.apply_transforms(b, other))
        assert (mixed - expected).abs().max() > 1e-3


def test_draws_are_averaged_and_follow_the_generator(metric: LatentLPIPS) -> None:
    a, b = latents(2, 4, 8, 8), latents(2, 4, 8, 8, seed=1)
    shared = rng(5)
    one = ELatentLPIPS(metric)
    expected = torch.stack([one(a, b, generator=shared) for _ in range(3)]).mean(0)
    assert torch.equal(ELatentLPIPS(metric, draws=3)(a, b, generator=rng(5)), expected)
    assert not torch.equal(one(a, b, generator=rng(6)), one(a, b, generator=rng(5)))


@pytest.mark.parametrize("case", ["different", "equal", "zero"])
def test_bf16_and_autocast_give_fp32_distances_and_finite_gradients(metric: LatentLPIPS, case: str) -> None:
    target = latents(2, 4, 8, 8, seed=1).bfloat16() * (case != "zero")
    pred = (latents(2, 4, 8, 8).bfloat16() if case == "different" else target.clone()).requires_grad_()
    ensemble = ELatentLPIPS(metric)
    plain = ensemble(pred.detach(), target, generator=rng())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        distance = ensemble(pred, target, generator=rng())
        (gradient,) = torch.autograd.grad(distance.sum(), pred)
    assert distance.dtype == torch.float32
    assert torch.equal(distance, plain)
    assert gradient.isfinite().all()
    assert (gradient.abs().max() > 0) == (case == "different")


def test_gradient_is_correct_and_reaches_pred_only(metric: LatentLPIPS) -> None:
    pred, target = latents(1, 4, 8, 8).requires_grad_(), latents(1, 4, 8, 8, seed=1).requires_grad_()
    metric(pred, target).sum().backward()
    assert target.grad is None
    assert all(p.grad is None and not p.requires_grad for p in metric.parameters())
    assert pred.grad is not None
    direction = pred.grad / pred.grad.norm()
    with torch.no_grad():
        ahead, behind = (metric(pred + s * direction, target).item() for s in (1e-2, -1e-2))
    assert (ahead - behind) / 2e-2 == pytest.approx(pred.grad.norm().item(), rel=0.05)


def test_train_mode_does_not_change_batch_norm_statistics(metric: LatentLPIPS) -> None:
    a, b = latents(4, 4, 8, 8), latents(4, 4, 8, 8, seed=1)
    before, state = metric(a, b), {k: v.clone() for k, v in metric.state_dict().items()}
    parent = nn.ModuleDict({"loss": ELatentLPIPS(metric)}).train()
    assert parent.training and not any(m.training for m in metric.modules())
    assert torch.equal(metric(a, b), before)
    assert all(torch.equal(v, state[k]) for k, v in metric.state_dict().items())


def test_spatial_map_has_the_size_of_the_latents_and_locates_the_change(metric: LatentLPIPS) -> None:
    a = latents(1, 4, 32, 32)
    b = a.clone()
    b[:, :, 4:8, 20:24] += 3
    where = metric(a, b, spatial=True)
    assert where.shape == (1, 32, 32) and where.min() >= 0
    assert where[0, 2:10, 18:26].mean() > 10 * where[0, 24:, :8].mean()
    torch.testing.assert_close(where.mean((1, 2)), metric(a, b))


def test_distance_is_symmetric(metric: LatentLPIPS) -> None:
    a, b = latents(3, 4, 8, 8), latents(3, 4, 8, 8, seed=1)
    torch.testing.assert_close(metric(a, b), metric(b, a))
    torch.testing.assert_close(copy.deepcopy(metric).fold()(a, b), metric(b, a))


@pytest.mark.parametrize("channels", [1, 3, 16])
def test_any_number_of_channels(channels: int) -> None:
    torch.manual_seed(0)
    metric = LatentLPIPS(LPIPSConfig(channels=channels, width=1 / 16)).fold()
    a, b = latents(2, channels, 8, 8), latents(2, channels, 8, 8, seed=1)
    distance = ELatentLPIPS(metric)(a, b, generator=rng())
    assert distance.shape == (2,) and distance.min() > 0


def test_folding_does_not_change_the_distance() -> None:
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
            UserError, match=r"head 3 holds the weight .* expected 0 or more, .*; calibrate again"
        ):
            LatentLPIPS(LPIPSConfig(width=1 / 16)).load_state_dict(state)


def test_different_shapes_are_refused(metric: LatentLPIPS) -> None:
    with pytest.raises(UserError, match=r"\(1, 4, 8, 8\) and \(2, 4, 8, 8\)"):
        metric(latents(1, 4, 8, 8), latents(2, 4, 8, 8))


@pytest.mark.parametrize("families", ["none", "b", "c", "o", "bgco"])
def test_transforms_broadcast_no_sample_over_the_others(metric: LatentLPIPS, families: str) -> None:
    """Color and cutout alone would: one latent with two transforms gave two distances."""
    loss = ELatentLPIPS(metric, families)
    one, two = latents(1, 4, 8, 8), latents(2, 4, 8, 8)
    for pred, target in ((one, two), (two, one)):
        with pytest.raises(UserError, match="compares inputs of one shape, got"):
            loss(pred, target)
    with pytest.raises(UserError, match="got transforms of 2 samples for 1 latents; sample them for these"):
        loss(one, one, transforms=loss.sample_transforms(two))
    with pytest.raises(UserError, match=r"got latents of shape \(4, 8, 8\), its trunk takes \[B, 4, h, w\]"):
        loss(one[0], one[0])
    with pytest.raises(UserError, match="got latents of 1x1 positions, expected at least 4x4"):
        loss(one[:, :, :1, :1], one[:, :, :1, :1])


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_the_default_type_of_torch_changes_nothing(
    metric: LatentLPIPS, tmp_path: Path, default: torch.dtype
) -> None:
    """A program that sets bf16 as default got rounded weights, and an error in the transforms."""
    save_lpips(metric, tmp_path, {})
    pred, target = latents(2, 4, 8, 8), latents(2, 4, 8, 8, seed=1)

    def distances() -> list[Tensor]:
        augment._cached_matrix.cache_clear()
        loaded = [load_lpips(tmp_path), load_lpips(tmp_path, fold=False)]
        return [ELatentLPIPS(m, f)(pred, target, generator=rng(1)) for m in loaded for f in ("none", "bgco")]

    expected = distances()
    torch.set_default_dtype(default)
    try:
        result = distances()
    finally:
        torch.set_default_dtype(torch.float32)
        augment._cached_matrix.cache_clear()
    assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(result, expected, strict=True))


def test_the_unfolded_metric_works_under_torch_func(metric: LatentLPIPS) -> None:
    pred, target = latents(2, 4, 8, 8).requires_grad_(), latents(2, 4, 8, 8, seed=1)
    loss = ELatentLPIPS(metric, "none", ensemble=1.0)

    def of_one(a: Tensor, b: Tensor) -> Tensor:
        return loss(a[None], b[None])[0]

    (expected,) = torch.autograd.grad(loss(pred, target).sum(), pred)
    gradients = torch.vmap(torch.func.grad(of_one), randomness="different")(pred.detach(), target)
    torch.testing.assert_close(gradients, expected)


def test_no_host_synchronization(metric: LatentLPIPS) -> None:
    """Fake tensors have no values, so reading one on the host would raise."""
    quick = copy.deepcopy(metric).fold()
    with FakeTensorMode(allow_non_fake_inputs=True):
        pred, target = torch.empty(2, 4, 11, 11), torch.empty(2, 4, 11, 11)
        with pytest.raises(DataDependentOutputException):
            pred.mean().item()
        assert ELatentLPIPS(metric)(pred, target).shape == (2,)
        assert ELatentLPIPS(quick)(pred.requires_grad_(), target).shape == (2,)
    real = latents(2, 4, 11, 11)  # the fake pass must not cache fake constants
    assert ELatentLPIPS(metric)(real, real, generator=rng()).tolist() == [0.0, 0.0]


def test_unaugmented_and_l1_terms(metric: LatentLPIPS) -> None:
    a, b = latents(2, 4, 8, 8).requires_grad_(), latents(2, 4, 8, 8, seed=1)
    loss = ELatentLPIPS(metric, "bgo", draws=2, ensemble=0.5, l1=0.25)
    parts = loss.parts(a, b, generator=rng(5))
    assert torch.equal(parts["e_latent_lpips"], ELatentLPIPS(metric, "bgo", draws=2)(a, b, generator=rng(5)))
    assert torch.equal(parts["latent_lpips"], metric(a, b))
    assert torch.equal(parts["l1"], (a - b).abs().mean((1, 2, 3)))
    total = parts["e_latent_lpips"] + 0.5 * parts["latent_lpips"] + 0.25 * parts["l1"]
    torch.testing.assert_close(loss(a, b, generator=rng(5)), total)
    assert list(ELatentLPIPS(metric).parts(a, b, generator=rng())) == ["e_latent_lpips"]
    for wrong in ({"draws": 0}, {"ensemble": -1.0}, {"l1": float("nan")}):
        with pytest.raises(SettingError, match=f"{next(iter(wrong))} is .*, expected . or more"):
            ELatentLPIPS(metric, **wrong)  # type: ignore[arg-type]


def test_transforms_can_be_sampled_in_advance(metric: LatentLPIPS) -> None:
    a, b = latents(2, 4, 8, 8), latents(2, 4, 8, 8, seed=1)
    loss = ELatentLPIPS(metric, draws=2)
    transforms = loss.sample_transforms(a, rng(5))
    assert torch.equal(loss(a, b, transforms=transforms), loss(a, b, generator=rng(5)))
    still = [replace(t, letters="") for t in transforms]
    torch.testing.assert_close(loss(a, b, transforms=still), metric(a, b))


@pytest.mark.long
@pytest.mark.slow
def test_compiles_in_one_graph_with_given_transforms(metric: LatentLPIPS, fresh_dynamo: None) -> None:
    """The compiled loss has no graph break; without `transforms`, sampling is part of the graph."""
    loss = ELatentLPIPS(copy.deepcopy(metric).fold(), ensemble=1.0, l1=1.0)
    a, b = latents(2, 4, 8, 8).requires_grad_(), latents(2, 4, 8, 8, seed=1)
    transforms = loss.sample_transforms(a, rng(3))
    expected = loss(a, b, transforms=transforms)
    (slope,) = torch.autograd.grad(expected.sum(), a)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    result = compiled(a, b, transforms=transforms)
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(torch.autograd.grad(result.sum(), a)[0], slope)
    assert compiled(a, b).shape == (2,)


def test_generators_work_under_compile_with_a_graph_break(metric: LatentLPIPS, fresh_dynamo: None) -> None:
    loss = ELatentLPIPS(copy.deepcopy(metric).fold(), "b")
    a, b = latents(2, 4, 8, 8), latents(2, 4, 8, 8, seed=1)
    compiled = torch.compile(loss, backend="eager")
    torch.testing.assert_close(compiled(a, b, generator=rng(3)), loss(a, b, generator=rng(3)))


def test_distance_under_ddp(metric: LatentLPIPS) -> None:
    """The loss is part of the wrapped module: DDP neither trains nor averages its parameters."""

    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.student, self.loss = nn.Conv2d(4, 4, 1), ELatentLPIPS(copy.deepcopy(metric).fold())

        def forward(self, x: Tensor, target: Tensor) -> Tensor:
            total: Tensor = self.loss(self.student(x), target, generator=rng(2)).mean()
            return total

    x, target, single = latents(2, 4, 8, 8), latents(2, 4, 8, 8, seed=1), Step()
    single(x, target).backward()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(Step())
        wrapped(x, target).backward()
        grad, expected = wrapped.module.student.weight.grad, single.student.weight.grad
    finally:
        torch.distributed.destroy_process_group()
    assert expected is not None and expected.abs().max() > 0
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_generator_may_be_on_the_device_or_the_cpu(metric: LatentLPIPS, device: str) -> None:
    loss = ELatentLPIPS(copy.deepcopy(metric).fold().to(device))
    a, b = latents(2, 4, 8, 8).to(device).requires_grad_(), latents(2, 4, 8, 8, seed=1).to(device)
    for component_dir in {"cpu", device}:
        one, two = (loss(a, b, generator=torch.Generator(component_dir).manual_seed(3)) for _ in range(2))
        assert torch.equal(one, two) and one.device.type == device
        one.sum().backward()
    assert a.grad is not None and a.grad.isfinite().all()
