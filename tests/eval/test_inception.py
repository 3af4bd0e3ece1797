"""eval.networks.inception against torch-fidelity and torchvision, with random weights."""

import hashlib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torchvision.models import Inception3

from d2g.core.errors import UserError
from d2g.core.seeds import generator
from d2g.vision.weights import find_weights
from eval.images.resize import resize_clean
from eval.networks.inception import (
    FID_INCEPTION,
    fid_inception,
    load_inception,
    load_inception_tf,
    load_inception_torchvision,
)


def random_images(count: int, size: int = 40) -> Tensor:
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator(count))


def with_kaiming_weights(net: nn.Module) -> nn.Module:
    """Kaiming initialization; with PyTorch's default the activations shrink to 1e-8 over 94 layers."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    return net.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def inception() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return with_kaiming_weights(fid_inception())


@pytest.fixture(scope="module")
def inception_file(inception: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A weights file like pytorch-fid's, which has no `num_batches_tracked`."""
    state = {n: t for n, t in inception.state_dict().items() if not n.endswith("num_batches_tracked")}
    file = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(state, file)
    return file


def test_names_and_shapes_of_the_published_file(inception: nn.Module) -> None:
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
def test_pooling_branches_pool_as_in_tensorflow(
    inception: nn.Module, block: str, channels: int, last: bool
) -> None:
    x = torch.rand(1, channels, 5, 5, generator=generator(1)) + 1
    inputs: list[Tensor] = []
    mixed = inception.get_submodule(block)
    handle = mixed.get_submodule("branch_pool").register_forward_pre_hook(
        lambda _, args: inputs.append(args[0])
    )
    mixed(x)
    handle.remove()
    if last:
        assert torch.equal(inputs[0], F.max_pool2d(x, 3, 1, 1))
    else:  # the corner averages its four pixels, not nine with padding
        torch.testing.assert_close(inputs[0][..., 0, 0], x[..., :2, :2].mean((2, 3)))
        torch.testing.assert_close(inputs[0][..., 2, 2], x[..., 1:4, 1:4].mean((2, 3)))


@torch.no_grad()
def test_features_and_logits_equal_those_of_torch_fidelity(inception_file: Path) -> None:
    """At 299 px neither resizes, so only the order of float32 sums differs."""
    images = random_images(2, 299)
    published = FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=inception_file
    )
    features, logits = published(images)
    for load in (load_inception, load_inception_tf):
        net = load(inception_file)
        ours = net(images)
        torch.testing.assert_close(ours, features, rtol=1e-4, atol=1e-5)
        assert net.classifier is not None and features.std() > 0.05
        torch.testing.assert_close(net.classifier(features), logits, rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_in_float64_features_equal_those_of_torch_fidelity(
    inception: nn.Module, inception_file: Path
) -> None:
    """torch-fidelity needs `feature_extractor_internal_dtype` to compute in float64. It returns float32."""
    images = random_images(1, 299)
    published = FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048"], feature_extractor_weights_path=inception_file
    ).double()
    published.feature_extractor_internal_dtype = torch.float64
    expected = published(images)[0]
    net = fid_inception().eval()
    net.load_state_dict(inception.state_dict())
    net.fc = nn.Identity()
    got = net.double()((images.double() - 128) / 128)
    torch.testing.assert_close(got.float(), expected, rtol=1e-6, atol=1e-7)


@torch.no_grad()
def test_features_after_the_tensorflow_resize_equal_those_of_torch_fidelity(inception_file: Path) -> None:
    """From 32 px. The resized pixels agree to 1e-3 of 255, which changes the features by up to 1e-3."""
    images = random_images(1, 32)
    published = FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048"], feature_extractor_weights_path=inception_file
    )
    expected = published(images)[0]
    legacy, clean = load_inception_tf(inception_file), load_inception(inception_file)
    assert (legacy.name, clean.name) == ("inception-tf", "inception") and legacy.sha256 == clean.sha256
    torch.testing.assert_close(legacy(images), expected, rtol=1e-3, atol=1e-3)
    assert (clean(images) - expected).abs().max() > 0.05


@torch.no_grad()
def test_features_of_the_default_network_use_the_clean_resize(
    inception: nn.Module, inception_file: Path
) -> None:
    net = load_inception(inception_file)
    assert (net.name, net.dim) == ("inception", 2048)
    assert net.sha256 == hashlib.sha256(inception_file.read_bytes()).hexdigest()
    images = random_images(2)
    captured: list[Tensor] = []
    handle = inception.get_submodule("avgpool").register_forward_hook(lambda *args: captured.append(args[2]))
    inception((resize_clean(images) - 128) / 128)
    handle.remove()
    torch.testing.assert_close(net(images), captured[0].flatten(1))


@torch.no_grad()
def test_torchvisions_inception_has_a_loader_of_its_own(tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        published = with_kaiming_weights(Inception3(init_weights=False))
    torch.save(published.state_dict(), tmp_path / "inception.pth")
    net = load_inception_torchvision(tmp_path / "inception.pth")
    images = random_images(1, 299)
    expected = published(images.float() / 127.5 - 1)
    assert net.name == "torchvision-inception" and net.classifier is not None
    torch.testing.assert_close(net.classifier(net(images)), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(UserError, match=r"is not the Inception weights pt_inception.*'fc.weight'|AuxLogits"):
        load_inception(tmp_path / "inception.pth")


def test_other_weights_are_refused(inception: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"gone.pth: no weights there; put the Inception weights pt_inception"
    ):
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


def test_weights_are_found_in_the_cache_of_torch_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    with pytest.raises(UserError) as error_info:
        load_inception()
    text = str(error_info.value)
    assert "\n" not in text and str(folder) in text
    assert "fetch pt_inception-2015-12-05-6726825d.pth (91 MiB, sha256 6726825d…" in text
    folder.mkdir(parents=True)
    name = "weights-inception-2015-12-05-6726825d.pth"  # torch-fidelity's name of the same file
    (folder / name).write_bytes(b"cut off")
    with pytest.raises(UserError, match=f"{name} is damaged: its sha256 does not start with 6726825d"):
        load_inception()
    with pytest.raises(UserError, match="is damaged"):
        find_weights(FID_INCEPTION, folder / name)
    assert find_weights(FID_INCEPTION, tmp_path / "mine.pth") == tmp_path / "mine.pth"
