"""The image part of benchmarks/eval.py: from a folder of files to the input of a network, and the network.

Contestants read the same files in turn, with several numbers of worker processes; ours uses threads.
torch-fidelity resizes inside its network; its own function is timed with its loader here.
"""

import itertools
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.common import compare, median, table
from d2g.core.seeds import generator
from eval.images.folders import read_images
from eval.images.resize import prepare, resize_clean, resize_tensorflow, to_pil
from eval.networks.inception import fid_inception

BATCH = 32
WORKERS = (0, 2, 4, 12)  # clean-fid takes 12 by default, torch-fidelity 4


def photograph(height: int, width: int, seed: int) -> Image.Image:
    """Colored noise with the 1 / f spectrum of photographs: JPEG and PNG compress it as little as those."""
    down, across = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)
    amplitude = 1 / np.maximum(np.hypot(down, across), 1 / max(height, width))
    phases = torch.rand(3, height, width // 2 + 1, generator=generator(seed)).numpy()
    planes = np.fft.irfft2(amplitude * np.exp(2j * np.pi * phases), s=(height, width))
    planes -= planes.mean((1, 2), keepdims=True)
    planes /= planes.std((1, 2), keepdims=True)
    mixed = 128 + 50 * (0.8 * planes + 0.2 * planes.mean(0))
    return Image.fromarray(mixed.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))


@contextmanager
def folder_of(kind: str, size: tuple[int, int], count: int) -> Iterator[Path]:
    """A folder of `count` pictures."""
    options: dict[str, Any] = {"quality": 90} if kind == "jpg" else {}
    with tempfile.TemporaryDirectory() as name:
        for number in range(count):
            photograph(*size, number).save(Path(name) / f"{number:04}.{kind}", **options)
        yield Path(name)


def by_clean_fid(files: list[str], workers: int, crop: bool) -> Tensor:
    """Its loader and resize; a mean stands for the network."""
    from cleanfid.fid import get_files_features

    def gigagan(image: Any) -> Any:
        return np.array(prepare(Image.fromarray(image), "crop256-lanczos"))

    options = {"num_workers": workers, "batch_size": BATCH, "device": "cpu", "verbose": False}
    if crop:
        options["custom_image_tranform"] = gigagan
    return torch.from_numpy(get_files_features(files, lambda x: x.mean((2, 3)), **options))


def by_fidelity(files: list[str], workers: int) -> Tensor:
    """Its data set, its loader's settings, its resize."""
    from torch.utils.data import DataLoader
    from torch_fidelity.datasets import ImagesPathDataset
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    loader = DataLoader(ImagesPathDataset(files), batch_size=BATCH, num_workers=workers)
    parts = [
        interpolate_bilinear_2d_like_tensorflow1x(batch.float(), size=(299, 299), align_corners=False)
        for batch in loader
    ]
    return torch.cat([part.mean((2, 3)) for part in parts])


def ours(folder: Path, how: str, resize: Callable[[Tensor], Tensor]) -> Tensor:
    """Threads that decode and crop, then the resize of a batch."""
    batches = read_images(folder, resize=how, batch_size=BATCH)
    return torch.cat([resize(images).mean((2, 3)) for images, _ in batches])


def race(calls: Mapping[str, Callable[[], Tensor]], count: int, repeats: int) -> list[tuple[object, ...]]:
    """(contestant, images/s, its time over ours, largest difference from ours) of each; ours is the first."""
    outputs: dict[str, Tensor] = {}
    seconds = compare({k: lambda k=k: outputs.update({k: calls[k]()}) for k in calls}, repeats)  # type: ignore[misc]
    first = next(iter(calls))
    return [
        (
            name,
            count / median(times),
            median(times) / median(seconds[first]),
            f"{float((outputs[name] - outputs[first]).abs().max()):.1e}",
        )
        for name, times in seconds.items()
    ]


def images(count: int, repeats: int) -> list[str]:
    """Decode and resize, for JPEG photographs and PNG samples; then the network alone."""
    lines = [f"## {count} files to 299 x 299 floats, batches of {BATCH}, on the CPU", ""]
    head = ("files", "task", "contestant", "images/s", "times ours", "largest difference")
    rows: list[tuple[object, ...]] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the judges' own
        for kind, size in (("jpg", (480, 640)), ("png", (512, 512))):
            with folder_of(kind, size, count) as folder:
                shown = f"{size[1]}x{size[0]} {kind}"
                for task, calls in _tasks(folder).items():
                    rows += [(shown, task, *row) for row in race(calls, count, repeats)]
        lines += [*table(head, rows), "", *network(repeats)]
    ratios = [float(str(row[4])) for row in rows if row[2] != "diffusion2gan"]
    return [
        *lines,
        "",
        f"The slowest we are against any setting of any contestant: {min(ratios):.2f} times ours.",
    ]


def _tasks(folder: Path) -> dict[str, dict[str, Callable[[], Tensor]]]:
    files = sorted(map(str, folder.iterdir()))
    clean: dict[str, Callable[[], Tensor]] = {"diffusion2gan": lambda: ours(folder, "native", resize_clean)}
    crop: dict[str, Callable[[], Tensor]] = {
        "diffusion2gan": lambda: ours(folder, "crop256-lanczos", resize_clean)
    }
    graph: dict[str, Callable[[], Tensor]] = {
        "diffusion2gan": lambda: ours(folder, "native", resize_tensorflow)
    }
    for workers in WORKERS:
        name = f"clean-fid, {workers} workers"
        clean[name] = lambda workers=workers: by_clean_fid(files, workers, crop=False)  # type: ignore[misc]
        crop[name] = lambda workers=workers: by_clean_fid(files, workers, crop=True)  # type: ignore[misc]
        graph[f"torch-fidelity, {workers} workers"] = lambda workers=workers: by_fidelity(files, workers)  # type: ignore[misc]
    return {"clean": clean, "crop to 256, then clean": crop, "TensorFlow's bilinear": graph}


def random_inception() -> torch.nn.Module:
    """FID's network, of random weights that keep activations alive over 94 layers; torch's own fade."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = fid_inception().eval().requires_grad_(False)
        for module in net.modules():
            if isinstance(module, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    return net


def network(repeats: int) -> list[str]:
    """Inception alone, the same random weights in ours and torch-fidelity's, on prepared pixels."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    net = random_inception()
    pixels = torch.stack([torch.from_numpy(np.array(photograph(299, 299, n))) for n in range(4)]).permute(
        0, 3, 1, 2
    )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "weights.pth"
        torch.save(net.state_dict(), file)
        theirs = FeatureExtractorInceptionV3("x", ["2048"], feature_extractor_weights_path=str(file))
    net.fc = torch.nn.Identity()
    scaled = (pixels.float() - 128) / 128
    calls: dict[str, Callable[[], Tensor]] = {
        "diffusion2gan": lambda: net(scaled),
        "torch-fidelity": lambda: theirs(pixels)[0],
    }
    rows = race(calls, len(pixels), repeats)
    assert all(image.size == (299, 299) for image in itertools.islice(map(to_pil, pixels), 1))
    return [
        "### Inception alone",
        "",
        *table(("contestant", "images/s", "times ours", "largest difference"), rows),
    ]
