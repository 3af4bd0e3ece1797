"""eval.features: FID's Inception and SqueezeNet through real weight files of random numbers."""

import hashlib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import squeezenet1_0

from core.errors import UserError
from core.seeds import generator
from eval.features import FEATURES, fid_inception, load_inception, load_inception_tf, load_squeezenet
from eval.images import resize_clean


def pictures(count: int, size: int = 40) -> Tensor:
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator(count))


@pytest.fixture(scope="module")
def inception() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = fid_inception().eval()
        for module in net.modules():  # torch's own initialisation fades to 1e-8 over 94 layers
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        return net


@pytest.fixture(scope="module")
def inception_file(inception: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As pytorch-fid's file: no batch counters, which its PyTorch did not know yet."""
    state = {n: t for n, t in inception.state_dict().items() if not n.endswith("num_batches_tracked")}
    file = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(state, file)
    return file


def test_inception_has_the_published_files_names(inception: nn.Module) -> None:
    state = {n: t for n, t in inception.state_dict().items() if not n.endswith("num_batches_tracked")}
    assert len(state) == 94 * 5 + 2, "94 convolutions with batch norm, and the classifier"
    assert state["fc.weight"].shape == (1008, 2048) and state["fc.bias"].shape == (1008,)
    assert state["Conv2d_1a_3x3.conv.weight"].shape == (32, 3, 3, 3)
    assert state["Mixed_5b.branch1x1.conv.weight"].shape == (64, 192, 1, 1)
    assert state["Mixed_6e.branch7x7dbl_5.bn.running_var"].shape == (192,)
    assert state["Mixed_7c.branch_pool.conv.weight"].shape == (192, 2048, 1, 1)
    assert not any(name.startswith("AuxLogits") for name in state)


@pytest.mark.parametrize(
    ("block", "channels", "last"),
    [("Mixed_5b", 192, False), ("Mixed_6b", 768, False), ("Mixed_7b", 1280, False), ("Mixed_7c", 2048, True)],
)
@torch.no_grad()
def test_inception_pools_as_tensorflow_did(
    inception: nn.Module, block: str, channels: int, last: bool
) -> None:
    x = torch.rand(1, channels, 5, 5, generator=generator(1)) + 1
    seen: list[Tensor] = []
    mixed = inception.get_submodule(block)
    handle = mixed.get_submodule("branch_pool").register_forward_pre_hook(
        lambda _, args: seen.append(args[0])
    )
    mixed(x)
    handle.remove()
    if last:
        assert torch.equal(seen[0], F.max_pool2d(x, 3, 1, 1))
    else:  # the corner averages its four pixels, not nine with padding
        torch.testing.assert_close(seen[0][..., 0, 0], x[..., :2, :2].mean((2, 3)))
        torch.testing.assert_close(seen[0][..., 2, 2], x[..., 1:4, 1:4].mean((2, 3)))


@torch.no_grad()
def test_inception_loads_and_returns_pooled_features(inception: nn.Module, inception_file: Path) -> None:
    net = load_inception(inception_file)
    assert (net.name, net.dim) == ("inception", 2048)
    assert net.sha256 == hashlib.sha256(inception_file.read_bytes()).hexdigest()
    images = pictures(2)
    features = net(images)
    captured: list[Tensor] = []
    handle = inception.get_submodule("avgpool").register_forward_hook(lambda *args: captured.append(args[2]))
    inception((resize_clean(images) - 128) / 128)
    handle.remove()
    torch.testing.assert_close(features, captured[0].flatten(1))
    assert features.std() > 0.05


def test_the_tensorflow_variant_differs_only_in_its_resize(inception_file: Path) -> None:
    clean, legacy = load_inception(inception_file), load_inception_tf(inception_file)
    assert legacy.name == "inception-tf" and legacy.sha256 == clean.sha256
    small, native = pictures(1, 32), pictures(1, 299)
    assert (clean(small) - legacy(small)).abs().max() > 0.05
    torch.testing.assert_close(clean(native), legacy(native), atol=1e-3, rtol=1e-2)


def test_other_weights_are_refused(inception: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone.pth: no weights there; put pytorch-fid's pt_inception"):
        load_inception(tmp_path / "gone.pth")
    state = dict(inception.state_dict())
    del state["fc.bias"]
    state["Mixed_5b.branch1x1.conv.weight"] = torch.zeros(1)
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(
        UserError, match=r"1 tensors missing, 0 unknown, 1 of another shape, the first 'fc.bias'"
    ):
        load_inception(tmp_path / "other.pth")
    (tmp_path / "junk.pth").write_bytes(b"junk")
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    for name in ("junk.pth", "junk.safetensors"):
        with pytest.raises(UserError, match=f"{name} is damaged or no weights file"):
            load_inception(tmp_path / name)


@pytest.fixture(scope="module")
def squeezenet(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = squeezenet1_0(weights=None).eval().half()
    file = tmp_path_factory.mktemp("squeezenet") / "squeezenet1_0.safetensors"
    save_file(dict(net.state_dict()), file)
    return net.float(), file


@torch.no_grad()
def test_squeezenet_features(squeezenet: tuple[nn.Module, Path]) -> None:
    net, file = squeezenet
    images = pictures(3, 227)
    features = load_squeezenet(file)(images)
    centred = images.float() - torch.tensor([123.0, 117, 104]).view(1, 3, 1, 1)
    expected = net.get_submodule("features")(centred).mean((2, 3))
    assert features.shape == (3, 512) and features.std() > 0
    torch.testing.assert_close(features, expected, atol=1e-2, rtol=1e-3)


def test_features_belong_to_their_image_whatever_the_batch(squeezenet: tuple[nn.Module, Path]) -> None:
    net = FEATURES["squeezenet"](squeezenet[1], "cpu")
    images = pictures(4)
    alone = torch.cat([net(image[None]) for image in images])
    torch.testing.assert_close(net(images), alone, atol=1e-3, rtol=1e-4)


def test_a_network_takes_uint8_only(squeezenet: tuple[nn.Module, Path]) -> None:
    with pytest.raises(AssertionError):
        load_squeezenet(squeezenet[1])(pictures(1).float())
