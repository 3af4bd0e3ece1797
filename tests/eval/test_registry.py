"""eval.networks.registry: the feature networks by name, and SqueezeNet with random weights."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import squeezenet1_0

from d2g.core.errors import UserError
from d2g.core.seeds import generator
from eval.networks.registry import FEATURES, load_squeezenet


def random_images(count: int, size: int = 40) -> Tensor:
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator(count))


@pytest.fixture(scope="module")
def squeezenet(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = squeezenet1_0(weights=None).eval().half()
    file = tmp_path_factory.mktemp("squeezenet") / "squeezenet1_0.safetensors"
    save_file(dict(net.state_dict()), file)
    return net.float(), file


@torch.no_grad()
def test_squeezenet_features_equal_torchvisions(squeezenet: tuple[nn.Module, Path]) -> None:
    net, file = squeezenet
    images = random_images(3, 227)
    features = load_squeezenet(file)(images)
    centered = images.float() - torch.tensor([123.0, 117, 104]).view(1, 3, 1, 1)
    expected = net.get_submodule("features")(centered).mean((2, 3))
    assert features.shape == (3, 512) and features.std() > 0
    torch.testing.assert_close(features, expected, atol=1e-2, rtol=1e-3)


def test_features_do_not_depend_on_the_batch(squeezenet: tuple[nn.Module, Path]) -> None:
    net = FEATURES["squeezenet"](squeezenet[1], "cpu")
    images = random_images(4)
    one_by_one = torch.cat([net(image[None]) for image in images])
    torch.testing.assert_close(net(images), one_by_one, atol=1e-3, rtol=1e-4)


def test_a_network_accepts_only_uint8(squeezenet: tuple[nn.Module, Path]) -> None:
    with pytest.raises(AssertionError):
        load_squeezenet(squeezenet[1])(random_images(1).float())


@pytest.mark.parametrize("name", sorted(FEATURES.keys() - {"efficientnet-lite0"}))
def test_the_error_for_missing_weights_is_one_line_with_a_remedy(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError) as error_info:
        FEATURES[name](None, "cpu")
    text = str(error_info.value)
    assert "\n" not in text and any(word in text for word in ("fetch", "give"))
