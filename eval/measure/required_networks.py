"""Load the networks that a choice of metrics needs, and say what each measures of an image or of a pair."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from torch import Tensor

from d2g.core.config import nearest, pick
from d2g.core.errors import SettingError
from d2g.diffusion import pretrained
from d2g.diffusion.latents import encode, from_uint8
from eval.images.resize import NATIVE
from eval.measure.measure import Measure, PairMeasure
from eval.metrics.clip_score import clip_scores
from eval.metrics.paired import cosine_distance, encoded
from eval.networks.base import ClipNet, Device, FeatureNet
from eval.networks.lpips import load_pixel_lpips
from eval.networks.pickscore import PickNet, load_pickscore
from eval.networks.registry import CLIP_PRESETS, FEATURES, load_clip, load_clip_features
from eval.protocols.metric import all_metrics
from eval.protocols.protocol import ANY, Protocol
from latent_lpips.weights import load_lpips

CMMD_CLIP = "vit-l-14-336"
DREAMSIM_ROWS = "dreamsim_features"
"""Name of the rows that hold DreamSim's embeddings; `dreamsim` names the distances of pairs."""

PairDistance = Callable[[Tensor, Tensor], Tensor]
"""(uint8 images [B, 3, H, W], as many others) -> distances [B]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Networks:
    """The loaded networks of an evaluation.

    `sets`: feature networks by the name of their rows: "features" (the protocol's), "dinov2", "fd_clip",
    "cmmd" and DREAMSIM_ROWS. `pairs`: distances by the name of their rows. `extra`: further measures of
    single images by the name of their rows, from a registered data source.
    """

    sets: Mapping[str, FeatureNet] = field(default_factory=dict)
    clip: ClipNet | None = None
    pick: PickNet | None = None
    pairs: Mapping[str, PairDistance] = field(default_factory=dict)
    extra: Mapping[str, Measure] = field(default_factory=dict)

    def models(self) -> dict[str, dict[str, str]]:
        """Names and digests of the networks, for the result."""
        models = {
            name: {"name": net.name, "dim": str(net.dim), "sha256": net.sha256}
            for name, net in self.sets.items()
        }
        for name, net in (("clip", self.clip), ("pickscore", self.pick)):
            if net is not None:
                models[name] = {"name": net.name, "sha256": net.sha256}
        return models

    @property
    def compared(self) -> dict[str, FeatureNet]:
        """The feature networks whose statistics a reference must hold."""
        return {name: net for name, net in self.sets.items() if name != DREAMSIM_ROWS}


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkOptions:
    """Inputs of a network loader.

    `features`: the protocol's feature network, or its name; `clip`: name of a CLIP; `weights`: weight files
    by network name; `teacher`: the teacher in whose latent space LatentLPIPS measures.
    """

    protocol: Protocol
    features: FeatureNet | str | None
    clip: str | None
    weights: Mapping[str, str]
    teacher: str | None
    device: Device


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
    """Load the networks that `metrics` need, each once. The arguments are those of `NetworkOptions`.

    Raises SettingError for a network that nobody named, UserError where its weights are missing.
    """
    if unknown := sorted(weights.keys() - LOADERS.keys()):
        raise SettingError(f"unknown network {unknown[0]!r} in --weights{nearest(unknown[0], LOADERS)}")
    options = NetworkOptions(
        protocol=protocol, features=features, clip=clip, weights=weights, teacher=teacher, device=device
    )
    requested = [metric for metric in all_metrics().values() if metric.name in metrics]
    networks = Networks()
    # Load in the order of LOADERS, so that the first missing file does not depend on the order of metrics.
    needed = {name for metric in requested for name in metric.networks}
    for name, load in LOADERS.items():
        if name in needed:
            networks = load(networks, options)
    return complete_networks(metrics, replace(networks, pairs=_chosen_pairs(metrics, networks)))


def _chosen_pairs(metrics: tuple[str, ...], networks: Networks) -> dict[str, PairDistance]:
    """The loaded distances of the chosen paired metrics; loading DreamSim adds one that may be unused."""
    return {name: distance for name, distance in networks.pairs.items() if name in metrics}


def complete_networks(metrics: tuple[str, ...], networks: Networks) -> Networks:
    """Add the distances of the paired metrics that need no network.

    Raises SettingError for a metric whose network is missing, or has no classes although it needs them.
    """
    chosen = [metric for metric in all_metrics().values() if metric.name in metrics]
    own = {metric.name: metric.pair_distance for metric in chosen if metric.pair_distance is not None}
    networks = replace(networks, pairs={**networks.pairs, **own})
    # Networks by the names that metrics use.
    loaded = {
        **networks.sets,
        **networks.extra,
        "clip": networks.clip,
        "pickscore": networks.pick,
        "dreamsim": networks.sets.get(DREAMSIM_ROWS),
    }
    for metric in chosen:
        needed = (metric.name,) if metric.paired else metric.networks
        available = networks.pairs if metric.paired else loaded
        for name in needed:
            if available.get(name) is None:
                raise SettingError(
                    f"metric {metric.name!r} ({metric.description}) needs the network {name!r}, which is not "
                    f"loaded; add it to `networks`, or leave {metric.name} out"
                )
        if metric.needs_classes and networks.sets["features"].classifier is None:
            raise SettingError(
                f"metric {metric.name!r} needs a network with classes, and "
                f"{networks.sets['features'].name} has none; take --features inception, or leave "
                f"{metric.name} out"
            )
    return networks


def _load_features(networks: Networks, options: NetworkOptions) -> Networks:
    net, protocol = options.features, options.protocol
    if not isinstance(net, FeatureNet):
        name = net or (None if protocol.features == ANY else protocol.features)
        if name is None:
            raise SettingError(
                f"protocol {protocol.name} leaves the features open; give --features {', '.join(FEATURES)}"
            )
        load = pick(FEATURES, name, "feature network")
        net = load(options.weights.get("features"), options.device)
    return replace(networks, sets={**networks.sets, "features": net})


def _feature_set(
    rows: str, weights: str, load: Callable[[str | None, Device], FeatureNet]
) -> Callable[[Networks, NetworkOptions], Networks]:
    """A loader that adds a feature network as `rows`; `--weights` calls its files `weights`."""

    def add(networks: Networks, options: NetworkOptions) -> Networks:
        net = load(options.weights.get(weights), options.device)
        return replace(networks, sets={**networks.sets, rows: net})

    return add


def _load_dreamsim(networks: Networks, options: NetworkOptions) -> Networks:
    net = FEATURES["dreamsim"](options.weights.get("dreamsim"), options.device)
    distance = encoded(net, cosine_distance)
    return replace(
        networks,
        sets={**networks.sets, DREAMSIM_ROWS: net},
        pairs={**networks.pairs, "dreamsim": distance},
    )


def _load_clip(networks: Networks, options: NetworkOptions) -> Networks:
    protocol, file = options.protocol, options.weights.get("clip")
    name = options.clip or (None if protocol.clip == ANY else protocol.clip)
    if name is None:
        raise SettingError(
            f"metric 'clip' needs a CLIP, and protocol {protocol.name} leaves it open; give --clip vit-b-32, "
            "MODEL:TAG or a folder, or leave clip out of the metrics"
        )
    if file is None:
        return replace(networks, clip=load_clip(name, options.device))
    # A file replaces the download of a tag. The name stays the tag's; the digest shows the real weights.
    full = CLIP_PRESETS.get(name, name)
    clip = load_clip(f"{full.partition(':')[0]}:{file}", options.device)
    return replace(networks, clip=replace(clip, name=full))


def _load_pickscore(networks: Networks, options: NetworkOptions) -> Networks:
    return replace(networks, pick=load_pickscore(options.weights.get("pickscore"), device=options.device))


def _load_lpips(networks: Networks, options: NetworkOptions) -> Networks:
    distance = load_pixel_lpips(trunk=options.weights.get("lpips"), device=options.device)
    return replace(networks, pairs={**networks.pairs, "lpips": distance})


def _load_latent_lpips(networks: Networks, options: NetworkOptions) -> Networks:
    """LatentLPIPS of two images in the latent space of the teacher's VAE."""
    teacher, device = options.teacher, options.device
    if teacher is None:
        raise SettingError("metric 'latent_lpips' needs a teacher for its latent space; give --teacher")
    vae: Any = pretrained.load_vae(teacher).to(device)
    folder = options.weights.get("latent_lpips") or pretrained.resolve(teacher) / "latent_lpips"
    metric = load_lpips(folder, int(vae.config.latent_channels)).to(device)
    distance = encoded(lambda images: encode(vae, from_uint8(images.to(device))), metric)
    return replace(networks, pairs={**networks.pairs, "latent_lpips": distance})


LOADERS: Mapping[str, Callable[[Networks, NetworkOptions], Networks]] = MappingProxyType(
    {
        "features": _load_features,
        "dinov2": _feature_set("dinov2", "dinov2", FEATURES["dinov2"]),
        "fd_clip": _feature_set("fd_clip", "fd_clip", FEATURES["clip"]),
        "cmmd": _feature_set(
            "cmmd", "cmmd", lambda weights, device: load_clip_features(weights or CMMD_CLIP, device)
        ),
        "dreamsim": _load_dreamsim,
        "clip": _load_clip,
        "pickscore": _load_pickscore,
        "lpips": _load_lpips,
        "latent_lpips": _load_latent_lpips,
    }
)
"""Loaders by the name that `Metric.networks` and `--weights NAME=PATH` use; each adds its network."""


def measures_of(
    networks: Networks, protocol: Protocol, metrics: tuple[str, ...]
) -> tuple[dict[str, Measure], dict[str, PairMeasure]]:
    """Return the measures of single images and of pairs, by the name of their rows."""
    size = protocol.preprocessing
    measures = {name: Measure(size=size, function=_of_images(net)) for name, net in networks.sets.items()}
    if not any(metric.repeats_prompts for metric in all_metrics().values() if metric.name in metrics):
        measures.pop(DREAMSIM_ROWS, None)  # only the distances of pairs are needed
    if networks.clip is not None:
        measures["clip_score"] = Measure(
            size=protocol.clip_preprocessing,
            function=_clip_measure(networks.clip, protocol.clip_prefix),
            needs_prompts=True,
        )
    if networks.pick is not None:
        measures["pickscore"] = Measure(size=size, function=networks.pick.score, needs_prompts=True)
    pairs = {name: PairMeasure(size=NATIVE, function=function) for name, function in networks.pairs.items()}
    return {**measures, **networks.extra}, pairs


def _of_images(net: FeatureNet) -> Callable[[Tensor, list[str]], Tensor]:
    return lambda images, prompts: net(images).float()


def _clip_measure(clip: ClipNet, prefix: str) -> Callable[[Tensor, list[str]], Tensor]:
    return lambda images, prompts: clip_scores(clip, images, prompts, prefix=prefix)
