"""Write videos with PyAV, which brings its own encoder (the extra `video`)."""

from fractions import Fraction
from importlib import import_module
from math import ceil
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from d2g.core.atomic_files import cannot_write, fsync_path, process_tag
from d2g.core.errors import UserError

SMALLEST_FRAME = 256
"""Smaller frames are enlarged by a whole factor to this many pixels or more on the longer side: H.264 keeps
colors at half the resolution."""
ENCODER = "libx264"
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

    The file is complete or absent. Raises UserError without PyAV, and if the file cannot be encoded or
    written.
    """
    av = require_video()
    temporary = path.with_name(f".{path.name}.{process_tag()}.tmp")
    try:
        try:
            _encode(av, frames, temporary, frame_ms)
            fsync_path(temporary)
            temporary.replace(path)
        except BaseException:  # Ctrl-C too
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise cannot_write(path, error) from error
    except (av.error.FFmpegError, ValueError) as error:
        raise UserError(
            f"cannot encode {path} with {ENCODER}: {error}; expected a size that H.264 takes, and PyAV's own "
            "build: `pip install --force-reinstall --only-binary av av`; or leave the mp4 out"
        ) from error


def _encode(av: Any, frames: Tensor, path: Path, frame_ms: int) -> None:
    # Enlarge by a whole factor, and repeat the last row and column to even sizes, which the format needs.
    factor = max(1, ceil(SMALLEST_FRAME / max(frames.shape[2:])))
    height, width = (factor * side for side in frames.shape[2:])
    padding = (0, width % 2, 0, height % 2)
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream(
            ENCODER, rate=Fraction(1000, frame_ms), options={"crf": QUALITY, "preset": "slow"}
        )
        stream.height, stream.width, stream.pix_fmt = height + height % 2, width + width % 2, "yuv420p"
        for frame in frames:
            enlarged = frame.repeat_interleave(factor, dim=1).repeat_interleave(factor, dim=2)
            even = F.pad(enlarged.float(), padding, mode="replicate").byte()
            pixels = even.permute(1, 2, 0).contiguous().numpy()
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
