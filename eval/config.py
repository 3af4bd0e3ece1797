"""What an evaluation measures and how: a protocol fixes all that changes a number, and has a digest."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from core.config import digest, nearest, to_json
from core.errors import SettingError

METRICS = ("fid", "kid", "clip", "pr")
"""Frechet distance, kernel distance, CLIP score, precision and recall (with density and coverage)."""

_RESIZE = re.compile(r"native|crop[1-9][0-9]*-(lanczos|bicubic|box)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Protocol:
    """One way of measuring. Two results are comparable only if their protocols' digests are equal.

    `features` and `clip` name the networks ("any": whichever the caller hands in; the result says which).
    `resize` is applied alike to generated and reference images: "native" (all of one size) or "cropN-FILTER"
    (PIL: centre crop of the long edge, then N x N with that filter). Counts of 0 mean "all there are";
    otherwise a result with other counts carries a note. `neighbours` are the k of precision and recall; the
    first is the headline.
    """

    name: str
    features: str = "any"
    resize: str = "native"
    images: int = 0
    reference_images: int = 0
    pr_images: int = 10_000
    neighbours: tuple[int, ...] = (3, 5)
    clip: str = "any"
    clip_prefix: str = ""
    metrics: tuple[str, ...] = METRICS

    def __post_init__(self) -> None:
        if not _RESIZE.fullmatch(self.resize):
            raise SettingError(f"resize is {self.resize!r}; expected native or, say, crop256-lanczos")
        if min(self.images, self.reference_images, self.pr_images) < 0:
            raise SettingError("image counts of a protocol must be 0 (all) or more")
        if not self.neighbours or min(self.neighbours) < 1:
            raise SettingError(f"neighbours are {self.neighbours}; expected one or more positive numbers")
        check_metrics(self.metrics)


def check_metrics(names: tuple[str, ...]) -> None:
    """Raise SettingError unless `names` is a non-empty selection of METRICS."""
    if not names:
        raise SettingError(f"no metrics chosen; choose from {', '.join(METRICS)}")
    for name in names:
        if name not in METRICS:
            raise SettingError(f"unknown metric {name!r}{nearest(name, METRICS)}")


def protocol_sha256(protocol: Protocol) -> str:
    """The digest that `compare` looks at."""
    return digest(to_json(protocol))


def _coco2014(
    name: str, *, resize: str = "crop256-lanczos", clip: str = "ViT-B-32-quickgelu:openai"
) -> Protocol:
    return Protocol(
        name=name,
        features="inception",
        resize=resize,
        images=30_000,
        reference_images=40_504,
        clip=clip,
        clip_prefix="A photo depicts ",
    )


_ALL = (
    # Lanczos compares with GigaGAN, DMD and DMD2 (GigaGAN's evaluation code); the supplement of
    # Diffusion2GAN says bicubic. Neither names its CLIP for certain, hence the third.
    _coco2014("coco2014-30k"),
    _coco2014("coco2014-30k-bicubic", resize="crop256-bicubic"),
    _coco2014("coco2014-30k-vitg14", clip="ViT-g-14:laion2b_s12b_b42k"),
    Protocol(
        name="coco2017-5k",
        features="inception",
        resize="crop256-lanczos",
        images=5_000,
        reference_images=5_000,
        clip="ViT-g-14:laion2b_s12b_b42k",
        clip_prefix="A photo depicts ",
        metrics=("fid", "clip"),
    ),
    # The literature's CIFAR10 numbers resize inside the TensorFlow graph, not the clean-fid way.
    Protocol(
        name="cifar10-50k", features="inception-tf", images=50_000, reference_images=50_000, metrics=("fid",)
    ),
    Protocol(name="custom"),
    Protocol(name="miniature", features="oracle", resize="crop64-box"),
    # 28x28 garments as a 32 px teacher sees them, against all 10,000 test photographs; docs/LOG.md.
    Protocol(
        name="fashion-1k",
        features="squeezenet",
        resize="crop32-lanczos",
        images=1_000,
        reference_images=10_000,
        pr_images=1_000,
        metrics=("fid", "kid", "pr"),
    ),
)

PROTOCOLS: Mapping[str, Protocol] = MappingProxyType({protocol.name: protocol for protocol in _ALL})
"""The protocols one can name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalRun:
    """One `d2g eval run`: what is measured, and with what. Files and folders are strings."""

    student: str | None = None
    teacher: str | None = None
    images: str | None = None
    reference: str | None = None
    protocol: str = "custom"
    metrics: tuple[str, ...] = ()  # empty: the protocol's
    features: str | None = None
    feature_weights: str | None = None
    clip: str | None = None
    prompts: str | None = None
    num: int | None = None
    steps: int = 50
    guidance: float = 3.0
    batch_size: int = 64
    seed: int = 0


PRESETS: Mapping[str, EvalRun] = MappingProxyType(
    {"default": EvalRun(), "miniature": EvalRun(student="miniature", protocol="miniature")}
)
"""Presets of `d2g eval run`."""
