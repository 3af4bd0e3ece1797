"""The networks that a choice of metrics needs, and what each measures of an image or of a pair."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from d2g.core.config import nearest, pick
from d2g.core.errors import SettingError
from d2g.diffusion import pretrained
from d2g.diffusion.latents import encode, from_uint8
from eval.images.resize import NATIVE
from eval.measure.measure import Measure, PairMeasure
from eval.metrics.clip_score import clip_scores
from eval.metrics.paired import cosine_distance, encoded, psnr
from eval.metrics.pickscore import PickNet, load_pickscore
from eval.networks.base import ClipNet, Device, FeatureNet
from eval.networks.lpips import load_pixel_lpips
from eval.networks.registry import CLIP_PRESETS, FEATURES, load_clip, load_clip_features
from eval.protocols.protocol import ANY, DISTANCES, Protocol
from latent_lpips.weights import load_lpips

CMMD_CLIP = "vit-l-14-336"
DREAMSIM = "dreamsim_features"
WEIGHTS = ("features", "clip", "dinov2", "fd_clip", "cmmd", "dreamsim", "pickscore", "lpips", "latent_lpips")
"""Networks whose weights can be given: `--weights NAME=PATH`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Networks:
    """What measures. `sets`: feature networks by the name of their rows: "features" (the protocol's), dinov2,
    fd_clip, cmmd, and DREAMSIM. `pairs`: distances of uint8 images [B, 3, H, W] and as many others -> [B].
    """

    sets: Mapping[str, FeatureNet] = field(default_factory=dict)
    clip: ClipNet | None = None
    pick: PickNet | None = None
    pairs: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = field(default_factory=dict)
    extra: Mapping[str, Measure] = field(default_factory=dict)

    def models(self) -> dict[str, dict[str, str]]:
        """Names and digests of the networks, for the result."""
        found = {
            name: {"name": net.name, "dim": str(net.dim), "sha256": net.sha256}
            for name, net in self.sets.items()
        }
        for name, net in (("clip", self.clip), ("pickscore", self.pick)):
            if net is not None:
                found[name] = {"name": net.name, "sha256": net.sha256}
        return found


def load_networks(
    metrics: tuple[str, ...],
    protocol: Protocol,
    *,
    features: FeatureNet | str | None,
    clip: str | None,
    weights: Mapping[str, str],
    teacher: str | None,
    device: Device,
) -> Networks:
    """Load what `metrics` need. `features`: the protocol's network, or its name; `teacher`: in whose latent
    space LatentLPIPS measures.

    Raises SettingError for a network that nobody named, UserError where its weights are missing.
    """
    if unknown := sorted(weights.keys() - set(WEIGHTS)):
        raise SettingError(f"unknown network {unknown[0]!r} in --weights{nearest(unknown[0], WEIGHTS)}")
    sets: dict[str, FeatureNet] = {}
    if {*DISTANCES, "is"} & set(metrics):
        sets["features"] = _features(features, protocol, weights, device)
    if "fd_dinov2" in metrics:
        sets["dinov2"] = FEATURES["dinov2"](weights.get("dinov2"), device)
    if "fd_clip" in metrics:
        sets["fd_clip"] = load_clip_features(weights.get("fd_clip"), device)
    if "cmmd" in metrics:
        sets["cmmd"] = load_clip_features(weights.get("cmmd", CMMD_CLIP), device)
    if {"dreamsim", "dreamsim_diversity"} & set(metrics):
        sets[DREAMSIM] = FEATURES["dreamsim"](weights.get("dreamsim"), device)
    if "is" in metrics and sets["features"].classifier is None:
        raise SettingError(
            f"metric 'is' needs a network with classes, and {sets['features'].name} has none; take "
            "--features inception, or leave is out"
        )
    return Networks(
        sets=sets,
        clip=_clip(_clip_name(clip, protocol), weights.get("clip"), device) if "clip" in metrics else None,
        pick=load_pickscore(weights.get("pickscore"), device=device) if "pickscore" in metrics else None,
        pairs=_pairs(metrics, sets, weights, teacher, device),
    )


def _features(
    given: FeatureNet | str | None, protocol: Protocol, weights: Mapping[str, str], device: Device
) -> FeatureNet:
    if isinstance(given, FeatureNet):
        return given
    name = given or (None if protocol.features == ANY else protocol.features)
    if name is None:
        raise SettingError(
            f"protocol {protocol.name} leaves the features open; give --features {', '.join(FEATURES)}"
        )
    return pick(FEATURES, name, "feature network")(weights.get("features"), device)


def _clip_name(given: str | None, protocol: Protocol) -> str:
    name = given or (None if protocol.clip == ANY else protocol.clip)
    if name is None:
        raise SettingError(
            f"metric 'clip' needs a CLIP, and protocol {protocol.name} leaves it open; give --clip vit-b-32, "
            "MODEL:TAG or a folder, or leave clip out of the metrics"
        )
    return name


def _clip(name: str, file: str | None, device: Device) -> ClipNet:
    """A CLIP by name; `file`: a copy of its weights, for where nothing can be fetched. The digest tells."""
    if file is None:
        return load_clip(name, device)
    full = CLIP_PRESETS.get(name, name)
    return replace(load_clip(f"{full.partition(':')[0]}:{file}", device), name=full)


def _pairs(
    metrics: tuple[str, ...],
    sets: Mapping[str, FeatureNet],
    weights: Mapping[str, str],
    teacher: str | None,
    device: Device,
) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    found: dict[str, Callable[[Tensor, Tensor], Tensor]] = {}
    if "dreamsim" in metrics:
        found["dreamsim"] = encoded(sets[DREAMSIM], cosine_distance)
    if "lpips" in metrics:
        found["lpips"] = load_pixel_lpips(trunk=weights.get("lpips"), device=device)
    if "latent_lpips" in metrics:
        found["latent_lpips"] = _latent_lpips(weights.get("latent_lpips"), teacher, device)
    if "psnr" in metrics:
        found["psnr"] = psnr
    return found


def _latent_lpips(weights: str | None, teacher: str | None, device: Device) -> Any:
    """LatentLPIPS of two images in the latent space of the teacher's VAE."""
    if teacher is None:
        raise SettingError("metric 'latent_lpips' needs a teacher for its latent space; give --teacher")
    vae = pretrained.load_vae(teacher).to(device)
    folder = weights or pretrained.resolve(teacher) / "latent_lpips"
    metric = load_lpips(folder, int(vae.config.latent_channels)).to(device)
    return encoded(lambda images: encode(vae, from_uint8(images.to(device))), metric)


def measures_of(
    networks: Networks, protocol: Protocol, metrics: tuple[str, ...]
) -> tuple[dict[str, Measure], dict[str, PairMeasure]]:
    """What is measured of each image, and of each pair: rows by name."""
    size = protocol.preprocessing
    found = {name: Measure(size=size, function=_of_images(net)) for name, net in networks.sets.items()}
    if "dreamsim_diversity" not in metrics:
        found.pop(DREAMSIM, None)  # of pairs only
    if networks.clip is not None:
        found["clip_score"] = Measure(
            size=protocol.clip_preprocessing,
            function=_clip_measure(networks.clip, protocol.clip_prefix),
            needs_prompts=True,
        )
    if networks.pick is not None:
        found["pickscore"] = Measure(size=size, function=networks.pick.score, needs_prompts=True)
    pairs = {name: PairMeasure(size=NATIVE, function=function) for name, function in networks.pairs.items()}
    return {**found, **networks.extra}, pairs


def _of_images(net: FeatureNet) -> Callable[[Tensor, list[str]], Tensor]:
    return lambda images, prompts: net(images).float()


def _clip_measure(clip: ClipNet, prefix: str) -> Callable[[Tensor, list[str]], Tensor]:
    return lambda images, prompts: clip_scores(clip, images, prompts, prefix=prefix)
