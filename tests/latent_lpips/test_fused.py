"""The fused distance and gradient against autograd in float64, and their memory."""

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import authors
from latent_lpips import fused, load_lpips
from latent_lpips.config import LPIPSConfig, Precision
from latent_lpips.distance import LatentLPIPS
from latent_lpips.vgg import FP32_CONVS, fold_batch_norms
from latent_lpips.winograd_2x2 import Winograd2x2


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def latents(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=rng(seed))


def randomized_metric(width: float) -> LatentLPIPS:
    """A metric with random weights and batch norms that are not the identity."""
    torch.manual_seed(0)
    metric = LatentLPIPS(LPIPSConfig(width=width))
    for module in metric.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.2)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 2)  # type: ignore[arg-type]
    for head in metric.heads:
        head.uniform_(0, 2)
    return metric


@pytest.fixture(scope="module")
def metric() -> LatentLPIPS:
    return randomized_metric(1 / 16)


@pytest.fixture(scope="module")
def narrow_metric() -> LatentLPIPS:
    return randomized_metric(0.5)


def with_gradient(metric: LatentLPIPS, pred: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    pred = pred.detach().requires_grad_()
    distance = metric(pred, target)
    (gradient,) = torch.autograd.grad(distance.sum(), pred)
    return distance.detach(), gradient


def cosine(a: Tensor, b: Tensor) -> float:
    return torch.cosine_similarity(a.double().flatten(), b.double().flatten(), 0).item()


@pytest.fixture(params=[True, False], ids=["AMX", "no AMX"])
def bf16_cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU with AMX, and one without, by what torch says of it."""
    capabilities = {"avx512_bf16": True, "amx_bf16": request.param}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)


@pytest.mark.usefixtures("bf16_cpu")
@pytest.mark.parametrize(("noise", "width"), [(math.inf, 0.5), (1.0, 0.5), (0.1, 0.5), (0.1, 1.0)])
def test_fast_path_agrees_with_float64(narrow_metric: LatentLPIPS, noise: float, width: float) -> None:
    """For unrelated to similar latents: relative errors of 1e-5 in fp32 and 1e-2 in bf16, cosine of the
    gradients above 0.999. benchmarks/latent_lpips.py has larger latents."""
    pred, other = latents(2, 4, 16, 16), latents(2, 4, 16, 16, seed=1)
    target = other if noise == math.inf else pred + noise * other
    metric = narrow_metric if width == 0.5 else randomized_metric(width)
    exact, slope = with_gradient(copy.deepcopy(metric).double(), pred.double(), target.double())
    assert exact.dtype == slope.dtype == torch.float64
    bounds: dict[Precision, tuple[float, float]] = {"fp32": (1e-5, 1 - 1e-6), "bf16": (1e-2, 0.999)}
    for precision, (error, least) in bounds.items():
        distance, gradient = with_gradient(copy.deepcopy(metric).fold(precision), pred, target)
        assert (distance / exact - 1).abs().max() < error, precision
        assert cosine(gradient, slope) > least, precision
        assert (gradient.norm() / slope.norm()).item() == pytest.approx(1, abs=10 * error)


@pytest.mark.usefixtures("bf16_cpu")
@pytest.mark.parametrize("noise", [0.03, 0.003])
def test_nearly_equal_latents_keep_their_relative_precision_in_bf16(noise: float) -> None:
    """On a CPU, wide layers convolve the difference of the features apart. All in bf16 are wide here."""
    metric = randomized_metric(1.0)
    pred = latents(1, 4, 8, 8)
    target = pred + noise * latents(1, 4, 8, 8, seed=1)
    exact, slope = with_gradient(copy.deepcopy(metric).double(), pred.double(), target.double())
    distance, gradient = with_gradient(metric.fold("bf16"), pred, target)
    assert (distance / exact - 1).abs().item() < 5e-3
    assert cosine(gradient, slope) > 0.999
    torch.testing.assert_close(metric(pred, target), distance)


@pytest.mark.usefixtures("bf16_cpu")
def test_gradients_of_unrelated_latents_in_bf16(tmp_path: Path) -> None:
    """At full width, for four pairs; the first has the largest error of 18 (docs/LOG.md)."""
    weights = authors.tuned_file(tmp_path / "tuned.pth", 4, seed=1)
    pred, target = (
        torch.cat([torch.randn(1, 4, 16, 16, generator=rng(seed)) for seed in range(first, 8, 2)])
        for first in (0, 1)
    )
    exact = load_lpips(weights, fold=False).double()
    distance, slope = with_gradient(exact, pred.double(), target.double())
    rounded, gradient = with_gradient(load_lpips(weights, precision="bf16"), pred, target)
    assert (rounded / distance - 1).abs().max() < 1e-3
    cosines = torch.cosine_similarity(gradient.double().flatten(1), slope.flatten(1), 1)
    assert cosines.min() > 0.999


@pytest.mark.parametrize("size", [(4, 4), (5, 9), (7, 6)])
@torch.no_grad()
def test_differences_through_a_trunk_equal_two_passes(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, where rounding hides nothing: taps, and records of every layer, with odd sizes and pools.
    Layers of stage 3 take direct convolutions, the others Winograd's."""
    monkeypatch.setattr(Winograd2x2, "FORWARD_CHANNELS", 32)
    trunk = fold_batch_norms(copy.deepcopy(randomized_metric(1 / 16).trunk)).double()
    plain = trunk.layers()
    layers = [
        layer._replace(
            by_difference=True, winograd=Winograd2x2(Winograd2x2.transform(layer.weight, torch.float64))
        )
        if k > 4
        else layer
        for k, layer in enumerate(plain)
    ]
    pred, target = latents(2, 4, *size).double(), latents(2, 4, *size, seed=1).double()
    records: list[fused.LayerRecord] = []
    expected: list[fused.LayerRecord] = []
    pairs = list(fused._tap_pairs(layers, pred, target, records))
    two_passes = fused._tap_pairs(plain, pred, target, expected)
    torch.testing.assert_close(pairs, list(two_passes))
    for record, other in zip(records, expected, strict=True):
        assert torch.equal(record.positive, other.positive) and record.size == other.size
        assert (record.indices is None) == (other.indices is None)


def test_gradient_passes_gradcheck(metric: LatentLPIPS) -> None:
    exact = copy.deepcopy(metric).fold().double()
    pred, target = latents(1, 4, 4, 4).double(), latents(1, 4, 4, 4, seed=1).double()
    assert torch.autograd.gradcheck(lambda x: exact(x, target), pred.requires_grad_(), eps=1e-7, atol=1e-4)


def test_gradient_agrees_with_autograd_of_the_folded_metric(metric: LatentLPIPS) -> None:
    quick = copy.deepcopy(metric).fold()
    pred, target = latents(3, 4, 9, 14).requires_grad_(), latents(3, 4, 9, 14, seed=1)
    torch.testing.assert_close(quick.layers(pred, target), metric.layers(pred, target))
    torch.testing.assert_close(quick(pred, target), quick.layers(pred, target).sum(1))
    weights = torch.tensor([0.5, -2.0, 0.0])
    slopes = [torch.autograd.grad((weights * m(pred, target)).sum(), pred)[0] for m in (quick, metric)]
    torch.testing.assert_close(*slopes, rtol=1e-4, atol=1e-7)
    assert torch.equal(slopes[0][2], torch.zeros(4, 9, 14))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_equal_inputs_have_distance_zero(metric: LatentLPIPS, precision: Precision) -> None:
    quick, x = copy.deepcopy(metric).fold(precision), latents(3, 4, 16, 16)
    distance, gradient = with_gradient(quick, x, x.clone())
    assert torch.equal(distance, torch.zeros(3)) and torch.equal(gradient, torch.zeros_like(x))
    assert torch.equal(quick(x, x.clone()), torch.zeros(3))


def test_a_rows_result_does_not_depend_on_the_batch(metric: LatentLPIPS) -> None:
    """7 latents of 48x64 are computed in chunks of 2, 2, 2 and 1 rows."""
    quick = copy.deepcopy(metric).fold()
    pred, target = latents(7, 4, 48, 64), latents(7, 4, 48, 64, seed=1)
    assert [len(p) for p, _ in fused._row_chunks(pred, target)] == [2, 2, 2, 1]
    distance, gradient = with_gradient(quick, pred, target)
    for row in (0, 3, 6):
        single = with_gradient(quick, pred[row : row + 1], target[row : row + 1])
        torch.testing.assert_close(single, (distance[row : row + 1], gradient[row : row + 1]))
    torch.testing.assert_close(quick(pred, target), distance)


def test_graph_saves_one_gradient_and_no_features(metric: LatentLPIPS) -> None:
    quick, held = copy.deepcopy(metric).fold(), []
    pred, target = latents(4, 4, 16, 16).requires_grad_(), latents(4, 4, 16, 16, seed=1)

    def keep(tensor: Tensor) -> Tensor:
        held.append(tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        quick(pred, target)
    assert [tuple(tensor.shape) for tensor in held] == [tuple(pred.shape)]


def test_runs_under_deterministic_algorithms(metric: LatentLPIPS) -> None:
    quick, (pred, target) = copy.deepcopy(metric).fold(), (latents(2, 4, 9, 8), latents(2, 4, 9, 8, seed=1))
    expected = with_gradient(quick, pred, target)
    torch.use_deterministic_algorithms(True)
    try:
        result = with_gradient(quick, pred, target)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


def test_second_derivatives_need_the_autograd_path(metric: LatentLPIPS) -> None:
    quick = copy.deepcopy(metric).fold()
    pred, target = latents(1, 4, 8, 8).requires_grad_(), latents(1, 4, 8, 8, seed=1)
    with pytest.raises(RuntimeError, match=r"no second derivative.*use metric.layers\(pred, target\)"):
        torch.autograd.grad(quick(pred, target).sum(), pred, create_graph=True)
    (slope,) = torch.autograd.grad(quick.layers(pred, target).sum(), pred, create_graph=True)
    slope.square().sum().backward()
    assert pred.grad is not None and pred.grad.abs().max() > 0


def test_all_zero_features_have_a_finite_gradient(metric: LatentLPIPS) -> None:
    dead = copy.deepcopy(metric).fold()
    for layer in dead.trunk.layers():
        layer.bias.fill_(-1e6)
    distance, gradient = with_gradient(dead, latents(2, 4, 8, 8), latents(2, 4, 8, 8, seed=1))
    assert torch.equal(distance, torch.zeros(2)) and torch.equal(gradient, torch.zeros(2, 4, 8, 8))
    features = torch.zeros(1, 3, 2, 2).requires_grad_()
    (slope,) = torch.autograd.grad(fused.normalize_features(features).sum(), features)
    assert slope.isfinite().all()


def test_bf16_starts_after_the_exact_stages(metric: LatentLPIPS) -> None:
    trunk = fold_batch_norms(copy.deepcopy(metric.trunk), "bf16")
    types = [layer.weight.dtype for layer in trunk.layers()]
    assert types == [torch.float32] * FP32_CONVS + [torch.bfloat16] * (13 - FP32_CONVS)
    assert (metric.precision, copy.deepcopy(metric).fold("bf16").precision) == ("fp32", "bf16")
    assert all(layer.weight.is_contiguous(memory_format=torch.channels_last) for layer in trunk.layers())


def test_group_norm_cannot_be_folded_and_works_unfolded() -> None:
    torch.manual_seed(0)
    metric = LatentLPIPS(LPIPSConfig(width=1 / 16, norm="group"))
    a, b = latents(2, 4, 8, 8), latents(2, 4, 8, 8, seed=1)
    before = metric(a, b)
    assert torch.equal(metric.fold("bf16")(a, b), before) and metric.config.norm == "group"
    single = metric(a[:1], b[:1])
    torch.testing.assert_close(single, before[:1])


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch 2.9 to 2.11
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compiles_in_one_graph(metric: LatentLPIPS, precision: Precision, fresh_dynamo: None) -> None:
    quick = copy.deepcopy(metric).fold(precision)
    compiled = torch.compile(quick, fullgraph=True, backend="aot_eager")
    pred, target = latents(2, 4, 8, 8), latents(2, 4, 8, 8, seed=1)
    torch.testing.assert_close(with_gradient(compiled, pred, target), with_gradient(quick, pred, target))
