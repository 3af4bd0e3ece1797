"""Scores of a miniature student on test scenes under three feature networks, for benchmarks."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from d2g.diffusion import pretrained
from d2g.diffusion.latents import encode, from_uint8
from distill.sampling import load_student
from eval.evaluation import evaluate
from eval.images.resize import NATIVE
from eval.measure.build_reference import build_reference
from eval.measure.reference import Reference
from eval.measure.required_networks import Networks
from eval.measure.source import ImageSource, batch_source
from eval.metrics.diversity import prompt_diversity
from eval.networks.base import FeatureNet, parameters_sha256
from eval.networks.clip import load_clip_features
from eval.networks.registry import load_clip
from eval.protocols.protocol import ANY, PROTOCOLS, Protocol
from eval.runner.samplers import SamplingRequest, one_step_source
from miniature.metrics import oracle_features, oracle_measures, real_scenes
from miniature.oracle import load_oracle
from miniature.registration import register_eval_scenes

COLUMNS = ("oracle", "clip", "vae", "precision", "recall", "caption_accuracy", "caption_exact")
"""Names of the scores: Frechet distances by feature network (CLIP's times 1000); the rest is the oracle's."""


def vae_features() -> FeatureNet:
    """The teacher's latents of an image, flattened: posterior means of its VAE."""
    vae = pretrained.load_vae("miniature")

    @torch.no_grad()
    def features(images: Tensor) -> Tensor:
        return encode(vae, from_uint8(images)).flatten(1)

    dim = features(torch.zeros(1, 3, 64, 64, dtype=torch.uint8)).shape[1]
    return FeatureNet(name="vae", dim=dim, sha256=parameters_sha256(vae), function=features)


@cache
def _networks() -> dict[str, FeatureNet]:
    clip = load_clip_features(pretrained.resolve("miniature") / "clip")
    return {"oracle": oracle_features(load_oracle()), "clip": clip, "vae": vae_features()}


@cache
def _reference(count: int) -> tuple[dict[str, Reference], list[str], Protocol]:
    """References of `count` test scenes by feature network, their captions, and the protocol."""
    register_eval_scenes()
    protocol, scenes = replace(PROTOCOLS["miniature"], features=ANY), real_scenes(count)
    texts = [text for _, batch in scenes for text in batch]
    source = batch_source("scenes", scenes)
    references = {
        name: build_reference(source, protocol, {"features": net}) for name, net in _networks().items()
    }
    return references, texts, protocol


def _drawn(source: ImageSource, count: int) -> ImageSource:
    """The first images of a source in memory, so that each is drawn and decoded once."""
    batches = source.draw(range(count), 64, (NATIVE,))
    return batch_source(source.name, [(batch.views[NATIVE], batch.prompts) for batch in batches])


def diversity(sampler: Callable[[SamplingRequest], ImageSource], prompts: int = 64, images: int = 8) -> float:
    """Mean distance 1 - cos between images of one caption, in CLIP's features, times 1000."""
    texts = _reference(prompts)[1]
    request = SamplingRequest(prompts=[text for text in texts for _ in range(images)], seed=0, device="cpu")
    source, count = sampler(request), len(request.prompts)
    net, size = _networks()["clip"], replace(PROTOCOLS["miniature"], features=ANY).preprocessing
    batches = list(source.draw(range(count), 64, (size,)))
    features = torch.cat([net.function(batch.views[size]) for batch in batches])
    return 1000 * prompt_diversity(features, [text for batch in batches for text in batch.prompts]).mean


def score(run: Path, count: int) -> dict[str, float]:
    """Scores of the student of a run on `count` test scenes, all with the same noise and captions."""
    student = load_student(str(run))
    return score_sampler(lambda request: one_step_source(str(run), student, request), count)


def score_sampler(
    sampler: Callable[[SamplingRequest], ImageSource], count: int, seed: int = 0
) -> dict[str, float]:
    """Scores of any sampler: the function makes a source of the images of a request. seed: of its noise."""
    references, texts, protocol = _reference(count)
    source = _drawn(sampler(SamplingRequest(prompts=texts, seed=seed, device="cpu")), count)
    scores: dict[str, float] = {}
    for network, net in _networks().items():
        # The oracle also measures precision, recall and captions.
        is_oracle = network == "oracle"
        networks = Networks(
            sets={"features": net},
            clip=load_clip(str(pretrained.resolve("miniature") / "clip")) if is_oracle else None,
            extra=oracle_measures(load_oracle(), protocol.preprocessing) if is_oracle else {},
        )
        metrics = ("fid", "pr", "caption_accuracy") if is_oracle else ("fid",)
        result = evaluate(
            source,
            protocol,
            networks,
            metrics=metrics,
            reference=references[network],
            count=count,
            resamples=0,
        ).result
        assert result.fid is not None
        scores[network] = result.fid * (1000 if network == "clip" else 1)
        if is_oracle:
            assert result.precision is not None and result.recall is not None
            scores |= {"precision": result.precision, "recall": result.recall, **result.extra}
    return {name: float(scores[name]) for name in COLUMNS}
