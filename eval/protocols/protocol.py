"""Protocols: everything that changes a number, under one name and one digest."""

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

from d2g.core.config import digest, nearest
from d2g.core.errors import SettingError
from eval.protocols.data_sources import DATA_SOURCES
from eval.protocols.metric import check_metrics

ANY = "any"
PROMPT_RULES = ("given", "coco2014-val", "coco2017-val", "classes")
"""Rules that select prompts, beside the names of registered data sources; "given": by the caller."""

REFERENCE_SETS = ("given", "coco2014-val", "coco2014-val-prompted", "coco2017-val", "cifar10-train")
"""Sets of real images, beside the names of registered data sources; "given": by the caller."""

Resize = Literal["lanczos", "bicubic", "bilinear", "box"]
Crop = Literal["none", "centre"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Protocol:
    """One way of measuring. Two results are comparable only if the digests of their protocols are equal.

    - `prompts`: the rule that selects the prompts (one of PROMPT_RULES, or a data source); `prompts_sha256`:
      the digest of the list, once it is known.
    - `reference`: the set of real images (one of REFERENCE_SETS, or a data source).
    - `images`, `reference_images`: numbers of images; 0: all there are.
    - `size`, `resize`, `crop`: real and generated images are cropped to the center square or not, then
      resized with PIL's filter `resize` to `size` (0: neither). `clip_size`: another size for the CLIP score.
    - `features`, `clip`: names of networks; ANY: whichever the caller gives, and the digest holds its name.
    - `clip_prefix`: text before each prompt for the CLIP score.
    - `pr_images`: precision, recall, density and coverage compare this many random images of each side, at
      each k of `neighbours`; the first k is the headline.
    - `seed`: seed of the noise and of every random subset.

    The values "centre" and `neighbours` keep their spelling because they enter published digests.
    """

    name: str
    prompts: str = "given"
    prompts_sha256: str = ""
    reference: str = "given"
    images: int = 0
    reference_images: int = 0
    size: int = 0
    resize: Resize = "lanczos"
    crop: Crop = "centre"
    features: str = ANY
    clip: str = ANY
    clip_prefix: str = ""
    clip_size: int = 0
    neighbours: tuple[int, ...] = (3, 5)
    pr_images: int = 10_000
    kid_subsets: int = 100
    kid_subset_size: int = 1_000
    is_splits: int = 10
    diversity_images: int = 4
    seed: int = (
        1_000  # training pairs use seed 0 by default: students are measured on noise that is new to them
    )
    metrics: tuple[str, ...] = ("fid", "kid", "clip", "pr")

    def __post_init__(self) -> None:
        choices = {
            "prompts": (*PROMPT_RULES, *DATA_SOURCES),
            "reference": (*REFERENCE_SETS, *DATA_SOURCES),
            "resize": get_args(Resize),
            "crop": get_args(Crop),
        }
        # Rules that have names.
        for name, allowed in choices.items():
            value = getattr(self, name)
            if value not in allowed:
                raise SettingError(f"protocol {self.name}: {name} is {value!r}{nearest(value, allowed)}")
        # Counts and sizes; 0 leaves them open.
        for name in ("images", "reference_images", "size", "clip_size", "pr_images", "seed"):
            if getattr(self, name) < 0:
                raise SettingError(f"protocol {self.name}: {name} is negative; expected 0 or more")
        minima = {"kid_subsets": 1, "kid_subset_size": 2, "is_splits": 1, "diversity_images": 2}
        for name, minimum in minima.items():
            if getattr(self, name) < minimum:
                raise SettingError(f"protocol {self.name}: {name} is below {minimum}")
        if not self.neighbours or min(self.neighbours) < 1:
            raise SettingError(f"neighbours are {self.neighbours}; expected one or more positive numbers")
        check_metrics(self.metrics)

    @property
    def preprocessing(self) -> str:
        """The preprocessing of `eval.images.resize.prepare`: native, or for example crop256-lanczos."""
        return self._to_size(self.size)

    @property
    def clip_preprocessing(self) -> str:
        """The preprocessing for the CLIP score."""
        return self._to_size(self.clip_size or self.size)

    def _to_size(self, size: int) -> str:
        if size == 0:
            return "native"
        return f"{'crop' if self.crop == 'centre' else 'squash'}{size}-{self.resize}"

    def settings(self) -> dict[str, Any]:
        """Every field that changes a number, as JSON: all but the default selection of metrics."""
        fields = asdict(self)
        del fields["metrics"]
        if self.size == 0:
            fields |= {"resize": "none", "crop": "none"}
        return {**fields, "neighbours": list(self.neighbours)}

    def summary(self) -> str:
        """One line for a table."""
        images = f"{self.images:,}" if self.images else "all"
        real = f"{self.reference_images:,}" if self.reference_images else "all"
        parts = [f"{images} images against {real} ({self.reference})", self.preprocessing, self.features]
        return f"{'; '.join([*parts, self.clip])}; {', '.join(self.metrics)}; sha256 {self.sha256()[:12]}"

    def sha256(self) -> str:
        """The digest that every result carries."""
        return digest(self.settings())

    def resolved(self, *, features: str, clip: str, prompts_sha256: str) -> "Protocol":
        """This protocol with the names of the networks and the digest of the prompts that are really used."""
        return replace(
            self,
            features=features if self.features == ANY else self.features,
            clip=clip if self.clip == ANY else self.clip,
            prompts_sha256=prompts_sha256,
        )


VIT_B_32 = "ViT-B-32-quickgelu:openai"
VIT_G_14 = "ViT-g-14:laion2b_s12b_b42k"
_PREFIX = "A photo depicts "  # GigaGAN's evaluation code puts these tokens before each caption

_GIGAGAN = Protocol(
    name="coco2014-30k-gigagan",
    prompts="coco2014-val",
    reference="coco2014-val",
    images=30_000,
    reference_images=40_504,
    size=256,
    resize="lanczos",
    crop="centre",
    features="inception",
    clip=VIT_B_32,
    clip_prefix=_PREFIX,
    metrics=("fid", "clip", "pr"),
)

_PUBLISHED = (
    # GigaGAN's evaluation code, which DMD and DMD2 also use: Lanczos, OpenAI's ViT-B/32.
    _GIGAGAN,
    # StyleGAN-T's table 2: "downsampled to 64x64 pixels using Lanczos", here on both sides. Its CLIP score is
    # that of ViT-g-14 (section 3), without a prefix.
    replace(
        _GIGAGAN, name="coco2014-30k-64px", size=64, clip=VIT_G_14, clip_prefix="", metrics=("fid", "clip")
    ),
    # Diffusion2GAN, supplement B: bicubic. It does not name its CLIP; ViT-g-14 fits its Table A4 better.
    replace(_GIGAGAN, name="coco2014-30k-d2gan", resize="bicubic", clip=VIT_G_14),
    # Diffusion2GAN's SDXL table: 5,000 pairs of COCO 2017, DreamSim distance and diversity. The paper does
    # not say how many images per prompt DreamDiv compares; diversity_images is our choice.
    replace(
        _GIGAGAN,
        name="coco2017-5k-d2gan",
        prompts="coco2017-val",
        reference="coco2017-val",
        images=5_000,
        reference_images=5_000,
        resize="bicubic",
        clip=VIT_G_14,
        metrics=("fid", "clip", "dreamsim_diversity", "dreamsim"),
    ),
    # DMD2's SDXL commands: FID at 512 px against the 10,000 photographs of the prompts, CLIP score at 256 px.
    replace(
        _GIGAGAN,
        name="coco2014-10k-sdxl",
        reference="coco2014-val-prompted",
        images=10_000,
        reference_images=10_000,
        size=512,
        clip=VIT_G_14,
        clip_size=256,
        metrics=("fid", "clip"),
    ),
    # Wuerstchen's table 1 beside COCO-30k: one image per prompt, scored by PickScore; win rates are those of
    # `d2g eval compare`. Images keep their size: PickScore resizes them itself.
    Protocol(name="parti-prompts", clip=VIT_G_14, metrics=("pickscore", "clip")),
    Protocol(name="localized-narratives-5k", images=5_000, clip=VIT_G_14, metrics=("pickscore", "clip")),
    # Published CIFAR10 numbers resize inside the TensorFlow graph and compare with the training set.
    Protocol(
        name="cifar10-50k",
        prompts="classes",
        reference="cifar10-train",
        images=50_000,
        reference_images=50_000,
        features="inception-tf",
        metrics=("fid",),
    ),
    # Fashion-MNIST resized to the 32 px of its teacher, against all 10,000 test images.
    Protocol(
        name="fashion-1k",
        images=1_000,
        reference_images=10_000,
        size=32,
        resize="lanczos",
        crop="centre",
        features="squeezenet",
        pr_images=1_000,
        metrics=("fid", "kid", "pr"),
    ),
    # Any images against any reference: the caller sets what should be fixed.
    Protocol(name="folder", metrics=("fid", "fd_relative", "kid", "clip", "pr")),
)

PROTOCOLS: dict[str, Protocol] = {protocol.name: protocol for protocol in _PUBLISHED}
"""The named protocols: those above and the registered ones."""


def register_protocol(protocol: Protocol) -> None:
    """Add a protocol of another package. Registering the same one again changes nothing."""
    assert PROTOCOLS.setdefault(protocol.name, protocol) == protocol, (
        f"{protocol.name!r} is already registered"
    )
