"""Feature networks that a user brings: an exported program, an ONNX file, or a Python function."""

import importlib
import importlib.util
import inspect
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export.passes import move_to_device_pass

from d2g.core.config import nearest
from d2g.core.errors import SettingError, UserError, first_line
from d2g.core.machine_errors import raise_machine_error
from d2g.vision.normalization import HALF, IMAGENET, OPENAI
from d2g.vision.weights import file_sha256
from eval.images.resize import resize_clean
from eval.networks.base import Device, FeatureNet

UNIT = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
BYTE = ((0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255))
NORMALIZATIONS = {"imagenet": IMAGENET, "openai": OPENAI, "half": HALF, "unit": UNIT, "byte": BYTE}
"""Mean and deviation of RGB in [0, 1] by name: `half` gives [-1, 1], `unit` [0, 1], `byte` [0, 255]."""
DEFAULT_INPUT = "224,imagenet"
EXPECTED_FEATURES = (
    "expected MODULE:FUNCTION that can be imported from here, a network's name, FILE.pt2 or FILE.onnx"
)

Run = Callable[[Tensor], Tensor]
"""Float pixels [B, 3, S, S] -> features [B, D], or maps [B, D, h, w]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FileNetwork:
    """An opened network file. `batch`: the only number of rows that it takes, 0 for any."""

    run: Run
    batch: int


def is_user_network(name: str | None) -> bool:
    """Whether a value of `--features` is a file or a function, and not the name of a network."""
    return name is not None and (Path(name).suffix in OPENERS or ":" in name)


def find_user_network(name: str) -> None:
    """Raise UserError unless the file or the module of `--features` exists. No code of the module runs."""
    if Path(name).suffix in OPENERS:
        if not Path(name).is_file():
            raise UserError(f"--features {name}: no such file")
        return
    module = name.partition(":")[0]
    _import_from_here()
    # Of a module in a package, only the package is looked for: a search would run its code.
    package = module.partition(".")[0]
    try:
        found = bool(package) and importlib.util.find_spec(package) is not None
    except ValueError:  # a module without a spec, such as __main__
        found = False
    if not found:
        raise UserError(
            f"--features {name}: no module {package!r} can be imported from here; {EXPECTED_FEATURES}"
        )


def load_user_network(name: str, pixels: str | None, device: Device = "cpu") -> FeatureNet:
    """A feature network from `--features FILE.pt2`, `FILE.onnx` or `MODULE:FUNCTION`.

    A file takes RGB as floats [B, 3, S, S] and returns features [B, D] or maps [B, D, h, w], whose spatial
    mean is taken. `pixels`: "SIZE,NORMALIZATION" (None: "224,imagenet"): images are resized to SIZE x SIZE
    with clean-fid's filter, then normalized by a name of NORMALIZATIONS. A function takes uint8 images
    [B, 3, H, W] and returns features [B, D]; its preprocessing is its own, and it runs with the rights of the
    user: pass names from the command line only. Raises SettingError and UserError.
    """
    if Path(name).suffix in OPENERS:
        function, sha256, title = _from_file(Path(name), pixels or DEFAULT_INPUT, device)
    else:
        if pixels is not None:
            raise SettingError(f"--features-input has no effect: {name} prepares its images; leave it out")
        function, sha256, title = _from_module(name, device)
    # One small image tells the number of features, and whether the network works at all.
    try:
        with torch.no_grad():
            rows = function(torch.zeros(2, 3, 64, 64, dtype=torch.uint8))
    except UserError:
        raise
    except Exception as error:  # foreign code raises anything
        raise_machine_error(error)
        raise UserError(f"--features {name} fails on two black images: {first_line(error)}") from error
    if not isinstance(rows, Tensor) or rows.ndim != 2 or len(rows) != 2 or not rows.is_floating_point():
        kind = tuple(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
        raise UserError(f"--features {name} returns {kind} for 2 images; expected floats [2, features]")
    return FeatureNet(name=title, dim=rows.shape[1], sha256=sha256, function=function)


def _from_file(file: Path, pixels: str, device: Device) -> tuple[Run, str, str]:
    """(function, sha256 of the file, name with the preprocessing) of a network file."""
    find_user_network(str(file))
    size, mean, deviation = _parse_input(pixels)
    network = OPENERS[file.suffix](file, device)
    center, scale = (torch.tensor(values).view(3, 1, 1) for values in (mean, deviation))

    def features(images: Tensor) -> Tensor:
        inputs = (resize_clean(images.cpu(), size) / 255 - center) / scale
        # A network with a fixed number of rows gets full batches; the last one repeats its last row.
        step = network.batch or len(inputs)
        rows = []
        for part in inputs.split(step):
            filled = torch.cat([part, part[-1:].expand(step - len(part), -1, -1, -1)])
            rows.append(network.run(filled)[: len(part)])
        output = torch.cat(rows).float()
        return output.flatten(2).mean(2) if output.ndim > 2 else output

    return features, file_sha256(file), f"{file.name} ({pixels})"


def _parse_input(pixels: str) -> tuple[int, tuple[float, ...], tuple[float, ...]]:
    """Side in pixels, mean and standard deviation of "SIZE,NORMALIZATION"."""
    size, _, name = pixels.partition(",")
    if not size.isdecimal() or not 8 <= int(size) <= 4096 or name not in NORMALIZATIONS:
        raise SettingError(
            f"--features-input is {pixels!r}; expected SIZE,NORMALIZATION such as {DEFAULT_INPUT}, a size "
            f"of 8 to 4096{nearest(name, NORMALIZATIONS)}"
        )
    return int(size), *NORMALIZATIONS[name]


def _open_program(file: Path, device: Device) -> FileNetwork:
    """A program of torch.export."""
    try:
        with warnings.catch_warnings():
            # torch 2.9 warns of the read-only memory of the weights, which nothing writes to.
            warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
            program = torch.export.load(str(file))
        # Also what the program itself makes, such as positions, which an export on a CPU leaves there.
        module: Any = move_to_device_pass(program, torch.device(device)).module()
        names = program.graph_signature.user_inputs
        (shape,) = [
            node.meta["val"].shape
            for node in program.graph.nodes
            if node.op == "placeholder" and node.name in names
        ]
    except Exception as error:  # the loader raises almost any error on damaged bytes
        raise_machine_error(error)
        raise UserError(
            f"{file} is no program of torch.export with one input ({first_line(error)}); write it with "
            "torch.export.save"
        ) from error
    return FileNetwork(
        run=lambda pixels: module(pixels.to(device)), batch=shape[0] if isinstance(shape[0], int) else 0
    )


def _open_onnx(file: Path, device: Device) -> FileNetwork:
    """An ONNX file, on the CPU."""
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError(f"{file} needs onnxruntime; install diffusion2gan[onnx]") from error
    try:
        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        (first,) = session.get_inputs()
    except Exception as error:  # onnxruntime has exceptions of its own, without a common class
        raise_machine_error(error)
        raise UserError(
            f"{file} is no ONNX network with one input ({first_line(error)}); export it again"
        ) from error

    def run(pixels: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {first.name: pixels.numpy()})[0])

    return FileNetwork(run=run, batch=first.shape[0] if isinstance(first.shape[0], int) else 0)


OPENERS: dict[str, Callable[[Path, Device], FileNetwork]] = {".pt2": _open_program, ".onnx": _open_onnx}
"""How files are opened, by suffix."""


def _import_from_here() -> None:
    """Let modules be imported from the current folder."""
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)


def _from_module(name: str, device: Device) -> tuple[Run, str, str]:
    """(function, sha256 of its source file, name) of MODULE:FUNCTION, with the current folder on the path."""
    module_name, _, function_name = name.partition(":")
    _import_from_here()
    try:
        module = importlib.import_module(module_name)
        function = getattr(module, function_name)
    except (ImportError, AttributeError, ValueError, SyntaxError) as error:
        raise UserError(f"--features {name}: {first_line(error)}; {EXPECTED_FEATURES}") from error
    source = inspect.getsourcefile(module)
    sha256 = file_sha256(source) if source is not None else ""
    return lambda images: function(images.to(device)), sha256, name
