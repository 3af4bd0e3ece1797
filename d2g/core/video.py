"""Write videos with PyAV, which brings its own encoder (the extra `video`)."""

from fractions import Fraction
from importlib import import_module
from math import ceil
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from d2g.core.atomic_files import cannot_write
from d2g.core.errors import UserError

SMALLEST_FRAME = 256
"""Smaller frames are enlarged by a whole factor to this many pixels or more on the longer side: H.264 keeps
colors at half the resolution."""
QUALITY = "18"
"""Constant rate factor of x264: 0 is lossless, 23 its default; 18 looks the same as the frames."""


def require_video() -> Any:
    """The module `av`. Raises UserError without it."""
    try:
        return import_module("av")
    except ImportError as error:
        raise UserError("an mp4 needs the package av; `pip install 'diffusion2gan[video]'`") from error


def save_mp4(frames: Tensor, path: Path, frame_ms: int) -> None:
    """Write frames uint8 [N, 3, H, W] as an H.264 video with `frame_ms` milliseconds for each.

    Raises UserError without PyAV, and if the file cannot be written.
    """
    av = require_video()
    # Enlarge by a whole factor, and repeat the last row and column to even sizes, which the format needs.
    factor = max(1, ceil(SMALLEST_FRAME / max(frames.shape[2:])))
    frames = frames.repeat_interleave(factor, dim=2).repeat_interleave(factor, dim=3)
    height, width = frames.shape[2:]
    frames = F.pad(frames.float(), (0, width % 2, 0, height % 2), mode="replicate").byte()
    try:
        with av.open(str(path), "w", format="mp4") as container:
            stream = container.add_stream(
                "libx264", rate=Fraction(1000, frame_ms), options={"crf": QUALITY, "preset": "slow"}
            )
            stream.height, stream.width, stream.pix_fmt = *frames.shape[2:], "yuv420p"
            for frame in frames:
                pixels = frame.permute(1, 2, 0).contiguous().numpy()
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(stream.encode())
    except OSError as error:
        raise cannot_write(path, error) from error
