"""eval.networks.lpips against the formula, with torchvision's layers and the heads of package lpips."""

from pathlib import Path

import lpips
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torchvision.models import alexnet

from d2g.core.errors import SettingError, UserError
from d2g.core.seeds import generator
from eval.networks.lpips import load_pixel_lpips


@pytest.fixture(scope="module")
def trunk(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Sequential, Path]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        features = alexnet(weights=None).features
    for module in features.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, generator=generator(1))
    file = tmp_path_factory.mktemp("alexnet") / "trunk.pth"
    torch.save({f"features.{name}": tensor for name, tensor in features.state_dict().items()}, file)
    return features.eval().requires_grad_(False), file


def random_images(count: int, seed: int) -> Tensor:
    return torch.randint(0, 256, (count, 3, 64, 64), dtype=torch.uint8, generator=generator(seed))


def lpips_formula(features: nn.Sequential, a: Tensor, b: Tensor) -> Tensor:
    """Zhang et al. 2018, eq. 1."""
    heads = torch.load(Path(lpips.__file__).parent / "weights" / "v0.1" / "alex.pth", map_location="cpu")
    shift = torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1)
    x, y = ((images.float() / 127.5 - 1 - shift) / scale for images in (a, b))
    total, tap = torch.zeros(len(a)), 0
    for layer in features:
        x, y = layer(x), layer(y)
        if isinstance(layer, nn.ReLU):
            difference = (normalize(x, dim=1) - normalize(y, dim=1)).square()
            total += (heads[f"lin{tap}.model.1.weight"] * difference).sum(1).mean((1, 2))
            tap += 1
    assert tap == 5
    return total


def test_the_distance_equals_the_formula(trunk: tuple[nn.Sequential, Path]) -> None:
    features, file = trunk
    distance = load_pixel_lpips("alex", file)
    a, b = random_images(3, 0), random_images(3, 1)
    expected = lpips_formula(features, a, b)
    torch.testing.assert_close(distance(a, b).float(), expected, rtol=1e-4, atol=1e-6)
    assert (expected > 1e-3).all() and (distance(a, a) == 0).all()


def test_unknown_foreign_and_damaged_trunks_are_refused(
    trunk: tuple[nn.Sequential, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SettingError, match="unknown LPIPS network 'alexnet'; did you mean 'alex'"):
        load_pixel_lpips("alexnet", trunk[1])  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"trunk.pth is not torchvision's state dict of vgg"):
        load_pixel_lpips("vgg", trunk[1])
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError, match=r"fetch alexnet-owt-7be5be79.pth \(233 MiB, sha256 7be5be79"):
        load_pixel_lpips()
    (tmp_path / "alexnet-owt-7be5be79.pth").write_bytes(trunk[1].read_bytes())
    with pytest.raises(UserError, match="is damaged: its sha256 does not start with 7be5be79"):
        load_pixel_lpips(trunk=tmp_path / "alexnet-owt-7be5be79.pth")
