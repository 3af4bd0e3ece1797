"""Small captioned pictures in every kind of folder, and settings of a teacher that trains on them."""

import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from d2g.core.config import to_json
from d2g.core.tracking.run_directory import read_stats
from latent_lpips.config import CalibrateConfig, LPIPSConfig, LPIPSTrainConfig, TrunkTrainConfig
from teacher_training.cascade.config import (
    CascadeConfig,
    CompressorConfig,
    StageBConfig,
    StageCConfig,
    VQGANConfig,
)
from teacher_training.config import (
    AutoencoderConfig,
    ClipConfig,
    DenoiserConfig,
    DiTConfig,
    EDMConfig,
    FitConfig,
    PixelUNetConfig,
    TeacherConfig,
)

SIZE = 16
CONFIG = TeacherConfig(
    size=SIZE,
    images=40,
    vae=AutoencoderConfig(
        channels=(8, 8), latent_channels=4, fit=FitConfig(images=64, batch_size=16, lr=1e-3)
    ),
    unet=DenoiserConfig(
        channels=(8, 16),
        text_width=16,
        text_layers=1,
        vocab_size=300,
        max_length=12,
        fit=FitConfig(images=64, batch_size=16, lr=1e-3),
    ),
    lpips=LPIPSTrainConfig(
        network=LPIPSConfig(width=1 / 16),
        trunk=TrunkTrainConfig(optimizer="adamw", lr=1e-3, batch=16, images=32, grid=2, held_out=0.2),
        calibrate=CalibrateConfig(epochs=1),
        triplets=20,
    ),
    clip=ClipConfig(
        patch=8,
        width=32,
        layers=1,
        text_width=32,
        text_layers=1,
        context=12,
        embed=16,
        images=32,
        batch_size=16,
    ),
)
CLASSES_FIT = FitConfig(images=32, batch_size=8, lr=1e-3, checkpoint_minutes=0.0)
PIXELS: dict[str, Any] = dict(channels=(8, 16), head_width=8, fit=CLASSES_FIT)
CLASSES = replace(
    CONFIG,
    dit=DiTConfig(layers=2, width=16, heads=2, fit=CLASSES_FIT),
    pixel_unet=PixelUNetConfig(**PIXELS, class_dropout=0.2),
    edm=EDMConfig(**PIXELS, sigma_max=20.0),
    vae=replace(CONFIG.vae, fit=replace(CLASSES_FIT, images=16)),
)
"""For networks of classes."""
CASCADE_FIT = FitConfig(images=32, batch_size=16, lr=1e-3)
CASCADE = CascadeConfig(
    size=SIZE,
    images=40,
    vqgan=VQGANConfig(channels=8, bottleneck_blocks=1, codes=16, fit=CASCADE_FIT),
    compressor=CompressorConfig(channels=(8, 8, 8), latent_channels=3),
    stage_b=StageBConfig(channels=(8, 16), blocks=(1, 1), head_width=8, condition_width=8, fit=CASCADE_FIT),
    stage_c=StageCConfig(width=16, depth=1, heads=2, fit=CASCADE_FIT),
)
COLORS = ("red", "green", "blue", "yellow")


def make_image(number: int) -> tuple[Image.Image, str, str]:
    """(image, color, shape): a disc or a box in an image that is not square and has to be cropped."""
    color, shape = COLORS[number % 4], ("disc", "box")[number // 4 % 2]
    image = Image.new("RGB", (SIZE + 4, SIZE), "white")
    draw = ImageDraw.Draw(image)
    left = 3 + number % 5
    (draw.ellipse if shape == "disc" else draw.rectangle)((left, 3, left + 9, 12), fill=color)
    return image, color, shape


def image_folder(folder: Path) -> None:
    lines = []
    for number in range(40):
        image, color, shape = make_image(number)
        image.save(folder / f"{number:03d}.png")
        lines.append(json.dumps({"file_name": f"{number:03d}.png", "caption": f"a {color} {shape}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))


def class_folders(folder: Path) -> None:
    for number in range(40):
        image, color, shape = make_image(number)
        (folder / f"{color}_{shape}").mkdir(exist_ok=True)
        image.save(folder / f"{color}_{shape}" / f"{number:03d}.png")


def parquet(folder: Path) -> None:
    rows = []
    for number in range(40):
        image, color, shape = make_image(number)
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        rows.append({"image": {"bytes": buffer.getvalue()}, "caption": f"a {color} {shape}"})
    pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet")


def train_arguments(data: Path, out: Path, *more: str, stages: str = "data,vae,unet") -> list[str]:
    """`d2g teacher train` with the settings of CONFIG but its lengths; `more`: further options."""
    options = ["--data", str(data), "--out", str(out), "--stages", stages, "--preset", "scenes"]
    return ["teacher", "train", *options, *more, *_teacher_settings("")]


def run_arguments(data: Path, out: Path, *more: str) -> list[str]:
    """`d2g run` with the teacher settings of CONFIG but its lengths; `more`: further options."""
    small = ("pairs.steps=2", "ode.train.batch_size=16", "gan.train.batch_size=16", "eval_images=16")
    options = ["--data", str(data), "--out", str(out), "--processes", "1", *more]
    options += [word for one in small for word in ("--set", one)]
    return ["run", *options, *_teacher_settings("teacher.")]


def _teacher_settings(prefix: str) -> list[str]:
    """--set of every setting of CONFIG but its data and its lengths."""
    skip = {"data", "minutes", "images", "vae.fit.images", "unet.fit.images", "clip.images", "clip.minutes"}
    skip |= {"lpips.trunk.images", "lpips.triplets", "pretrained_vae", "init"}
    other_networks = ("dit.", "pixel_unet.", "edm.")
    values = (
        (name, value)
        for name, value in _flat(to_json(CONFIG))
        if name not in skip and not name.startswith(other_networks)
    )
    return [word for name, value in values for word in ("--set", f"{prefix}{name}={json.dumps(value)}")]


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of nested settings."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def random_images(count: int = 24) -> Tensor:
    """Smooth random images, uint8 [N, 3, 16, 16]."""
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return (nn.functional.interpolate(coarse, 16, mode="bilinear") * 255).to(torch.uint8)


def reports(folder: Path) -> list[dict[str, float]]:
    """The reports of a training without the times, which depend on the machine."""
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in read_stats(folder)]
