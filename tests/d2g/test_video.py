"""d2g.core.video: frames come back from the file; one clear error without the package or the place."""

import sys
from pathlib import Path

import pytest
import torch

from d2g.core import video
from d2g.core.errors import UserError
from d2g.core.video import SMALLEST_FRAME, require_video, save_mp4


@pytest.mark.parametrize("size", [(32, 48), (301, 257)])
def test_a_video_has_the_frames_and_their_length(size: tuple[int, int], tmp_path: Path) -> None:
    """Small frames are enlarged by a whole factor, odd sizes get a row or column more."""
    av = pytest.importorskip("av")
    ramp = torch.linspace(0, 255, size[1]).expand(3, *size)
    frames = torch.stack([ramp, ramp.flip(2), torch.full((3, *size), 90.0)]).byte()
    save_mp4(frames, tmp_path / "a.mp4", 80)
    with av.open(str(tmp_path / "a.mp4")) as file:
        stream = file.streams.video[0]
        assert stream.codec_context.name == "h264" and stream.pix_fmt == "yuv420p"
        assert float(stream.average_rate) == 12.5
        read = [torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in file.decode(stream)]
    factor = 6 if size == (32, 48) else 1
    assert len(read) == 3 and max(read[0].shape[:2]) >= SMALLEST_FRAME
    for frame, image in zip(read, frames, strict=True):
        shown = image.repeat_interleave(factor, 1).repeat_interleave(factor, 2).permute(1, 2, 0)
        assert frame.shape[0] % 2 == frame.shape[1] % 2 == 0
        difference = frame[: shown.shape[0], : shown.shape[1]].float() - shown.float()
        assert difference.abs().mean() < 3


@pytest.mark.parametrize("why", ["too wide", "no encoder"])
def test_what_cannot_be_encoded(why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An older file stays as it was, and nothing else is left."""
    pytest.importorskip("av")
    (tmp_path / "a.mp4").write_bytes(b"an older video")
    if why == "no encoder":
        monkeypatch.setattr(video, "ENCODER", "none")
    frames = torch.zeros(1, 3, 2, 40_000 if why == "too wide" else 2, dtype=torch.uint8)
    with pytest.raises(
        UserError,
        match=r"cannot encode .*a\.mp4 with .*; expected a size that H.264 takes, and PyAV's own build",
    ) as caught:
        save_mp4(frames, tmp_path / "a.mp4", 80)
    assert "\n" not in str(caught.value)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"an older video"]


def test_what_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("av")
    frames = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    with pytest.raises(UserError, match=r"cannot write .*a\.mp4: No such file or directory; choose another"):
        save_mp4(frames, tmp_path / "none" / "a.mp4", 80)
    monkeypatch.setitem(sys.modules, "av", None)  # as importlib marks a module that cannot be imported
    with pytest.raises(UserError, match=r"needs the package av; `pip install 'diffusion2gan\[video\]'`$"):
        require_video()
