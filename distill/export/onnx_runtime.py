"""Networks as ONNX files, and onnxruntime to check them with: the door to both."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from d2g.core.errors import SettingError, UserError

PACKAGES = ("onnx", "onnxscript", "onnxruntime")

_ONE_FILE = 2**31 - 2**26
"""Bytes of weights that one file can hold; ONNX files are protocol buffers, and those end at 2 GiB."""


def check_onnx() -> None:
    """Raise SettingError where a package is missing, with what to install."""
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise SettingError(
            f"the format onnx needs {', '.join(missing)}, not installed; `pip install {' '.join(missing)}`"
        )


@torch.no_grad()
def save_onnx(module: nn.Module, inputs: Mapping[str, Tensor], outputs: Sequence[str], file: Path) -> None:
    """Write a network through torch.export, its inputs by name; their first dimension is free.

    Large weights lie beside it in FILE.data. Raises UserError for a file that cannot be written.
    """
    program = torch.onnx.export(
        module.eval(),
        kwargs=dict(inputs),
        dynamo=True,
        input_names=list(inputs),
        output_names=list(outputs),
        dynamic_shapes={name: {0: torch.export.Dim.DYNAMIC} for name in inputs},
        verbose=False,
    )
    assert program is not None, "torch.onnx.export gives a program with dynamo=True"
    size = sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        program.save(str(file), external_data=size > _ONE_FILE)
    except OSError as error:
        raise UserError(f"cannot write {file}: {error}; free space or choose another --out") from error


def run_onnx(file: Path, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """What onnxruntime makes of a file, on the CPU."""
    import onnxruntime

    session: Any = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    found = session.run(None, {name: value.cpu().numpy() for name, value in inputs.items()})
    return [torch.from_numpy(value) for value in found]
