"""docs/how-to-add.md: its examples of new files work, and have names that no other module has."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import test_layers
from d2g.core.seeds import generator
from d2g.diffusion import pretrained
from distill.config.discriminator import DiscriminatorConfig
from distill.config.regression import RegressionConfig
from distill.losses.regression.base import FrozenNetworks
from eval import FeatureNet, Protocol, batch_source, build_reference
from eval.metrics.inputs import MetricInputs

PAGE = (Path(__file__).parents[1] / "docs" / "how-to-add.md").read_text()
LOSS, DISCRIMINATOR, METRIC = re.findall(r"```python\n(.+?)```", PAGE, re.DOTALL)


def names_of(example: str) -> dict[str, Any]:
    """Run a file of the page, and return what it defines."""
    names: dict[str, Any] = {"__name__": "example"}
    exec(example, names)
    return names


def latents(seed: int) -> Tensor:
    return torch.randn(2, 4, 4, 4, generator=generator(seed))


def test_names_are_unique_across_modules() -> None:
    """As tests/test_layers.py requires of a new file."""
    taken = {name for module in test_layers.TREES for name in test_layers.public_names(module)}
    for example in (LOSS, DISCRIMINATOR, METRIC):
        defined = re.findall(r"^(?:class |def )?([A-Za-z]\w+)(?: =|\(|:)", example, re.MULTILINE)
        assert defined and not taken & set(defined)


def test_the_loss_is_a_distance_with_a_gradient() -> None:
    loss = names_of(LOSS)["CHARBONNIER_LOSS"]
    distance = loss.build(RegressionConfig(), FrozenNetworks())
    a, b = latents(0).requires_grad_(), latents(1)
    expected = ((a - b).square() + 1e-6).sqrt().mean((1, 2, 3)) - 1e-3
    torch.testing.assert_close(distance(a, b), expected)
    distance(a, b).sum().backward()
    assert a.grad is not None and a.grad.abs().amin() > 0


def test_the_discriminator_is_built_alike_on_both_devices(teacher: Path) -> None:
    kind = names_of(DISCRIMINATOR)["PATCH"]
    config = DiscriminatorConfig()
    network, again = (kind.build(str(teacher), config, generator(3)) for _ in range(2))
    on_meta = kind.build_on_meta(str(teacher), config)
    shapes = [{k: v.shape for k, v in net.state_dict().items()} for net in (network, on_meta)]
    assert shapes[0] == shapes[1] and all(p.is_meta for p in on_meta.parameters())
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), again.parameters(), strict=True))
    # Its gradient penalty is defined.
    x, cond = latents(0).requires_grad_(), pretrained.load_conditioner(str(teacher)).encode(["a", "b"])
    logits = network(x, latents(1), cond)
    assert {head: value.shape for head, value in logits.items()} == {"patch": (2, 1, 4, 4)}
    (slope,) = torch.autograd.grad(logits["patch"].sum(), x, create_graph=True)
    slope.square().sum().backward()
    assert all(p.grad is not None for p in network.parameters() if p.dim() > 1)


def test_the_metric_is_computed() -> None:
    metric = names_of(METRIC)["MEAN_SHIFT"]
    images = torch.randint(256, (40, 3, 8, 8), dtype=torch.uint8)
    color = FeatureNet(name="color", dim=3, sha256="", function=lambda x: x.float().mean((2, 3)))
    protocol = Protocol(name="example")
    generated, real = (
        build_reference(batch_source("part", [(part, [""] * 20)]), protocol, {"features": color}).stats
        for part in images.split(20)
    )
    inputs = MetricInputs(protocol=protocol, rows={}, prompts=[""] * 20, generated=generated, real=real)
    a, b = (part.double().mean((0, 2, 3)) for part in images.split(20))
    assert metric.compute(inputs).estimates["mean_shift"].value == pytest.approx(float((a - b).norm()))
