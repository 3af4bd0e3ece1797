"""Where samplers meet measures: what `d2g eval run` and the demo call. Adds the oracle to eval's own
networks.
"""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core import pretrained
from core.config import pick
from core.errors import SettingError
from core.latents import decode, from_uint8, to_uint8
from core.progress import Progress, quiet
from core.seeds import noise
from distill.sample import load_one_step, student_folder
from eval.config import PROTOCOLS
from eval.features import FEATURES, FeatureNet, load_clip
from eval.images import Batch, read_images
from eval.report import collect, evaluate, reference_stats
from miniature.oracle import NUM_FEATURES, SHIPPED, Oracle, caption_accuracy, load_oracle
from miniature.scenes import captions as scene_captions
from miniature.scenes import render_dataset
from pairgen.prompts import read_prompts
from pairgen.teacher import Teacher, load_teacher

TEST_SEED = 2  # teachers train on scenes of seed 1


def oracle_features(oracle: Oracle) -> FeatureNet:
    """The caption oracle's pooled features, as the feature network of protocol `miniature`."""
    sha256 = hashlib.sha256((SHIPPED / "model.safetensors").read_bytes()).hexdigest()
    return FeatureNet(
        name="oracle",
        dim=NUM_FEATURES,
        sha256=sha256,
        function=lambda images: oracle.features(from_uint8(images)),
    )


def oracle_measures(oracle: Oracle) -> dict[str, Any]:
    """caption_accuracy (share of captioned facts read back right) and caption_exact (share of flawless
    pictures).
    """

    def attributes(images: Tensor, texts: list[str]) -> float:
        return caption_accuracy(oracle, from_uint8(images), texts).attributes

    def exact(images: Tensor, texts: list[str]) -> float:
        return caption_accuracy(oracle, from_uint8(images), texts).exact

    return {"caption_accuracy": attributes, "caption_exact": exact}


def real_scenes(num: int, progress: Progress = quiet) -> list[Batch]:
    """Rendered test scenes and their captions, in batches."""
    images, texts = render_dataset(num, TEST_SEED, "train", progress)
    return [(images[i : i + 64], texts[i : i + 64]) for i in range(0, num, 64)]


def teacher_batches(
    teacher: Teacher, prompts: Sequence[str], seed: int, steps: int, guidance: float, batch_size: int = 64
) -> Iterable[Batch]:
    """Images of a teacher by DDIM; image i uses the noise of (seed, i), as a student's does."""
    vae = pretrained.load_vae(teacher.name).to(teacher.device)
    for first in range(0, len(prompts), batch_size):
        texts = list(prompts[first : first + batch_size])
        drawn = noise(seed, range(first, first + len(texts)), teacher.latent_shape)
        latents = teacher.sample(drawn, texts, steps, guidance, "ddim")
        with torch.no_grad():
            yield to_uint8(decode(vae, latents)).cpu(), texts


def save_statistics(
    images: Path,
    out: Path,
    protocol: str,
    features: str,
    weights: str,
    progress: Progress = quiet,
) -> dict[str, Any]:
    """Feature statistics of real images under a protocol, kept in OUT (.safetensors) for `--reference`."""
    chosen, device = pick(PROTOCOLS, protocol, "protocol"), "cuda" if torch.cuda.is_available() else "cpu"
    net = pick(FEATURES, features, "feature network")(weights, device)
    stats = reference_stats(images, chosen, net, progress=progress)
    stats.save(out)
    return {"out": str(out), "images": stats.count, "features": net.name, "features_sha256": net.sha256}


def run_evaluation(
    *,
    student: str | None = None,
    teacher: str | None = None,
    images: str | Path | None = None,
    reference: str | Path | None = None,
    protocol: str = "custom",
    metrics: Sequence[str] = (),
    features: str | None = None,
    feature_weights: str | None = None,
    clip: str | None = None,
    prompts: str | Path | None = None,
    num: int | None = None,
    steps: int = 50,
    guidance: float = 3.0,
    batch_size: int = 64,
    seed: int = 0,
    progress: Progress = quiet,
) -> dict[str, Any]:
    """Measure a student, a teacher (when no student is given) or images under a named protocol.

    Protocol `miniature` needs nothing else: test captions, rendered references, the oracle and the teacher's
    CLIP. Raises SettingError when what is to be measured, or what it is measured with, is missing or given
    twice.
    """
    if (images is not None and (student or teacher)) or not (images or student or teacher):
        raise SettingError("give --student or --teacher, or --images, to say what is measured")
    chosen, device = pick(PROTOCOLS, protocol, "protocol"), "cuda" if torch.cuda.is_available() else "cpu"
    small = protocol == "miniature"
    count = num or chosen.images or (1_000 if small else 0)
    texts: list[str] = []
    if images is None:
        if prompts is None and not small:
            raise SettingError("--prompts is not set; give the file of captions to draw")
        listed = scene_captions(count, TEST_SEED) if prompts is None else read_prompts(Path(prompts))
        count = count or len(listed)
        texts = [listed[i % len(listed)] for i in range(count)]

    # Networks.
    oracle = load_oracle() if small or features == "oracle" else None
    name = features or ("oracle" if small else None if chosen.features == "any" else chosen.features)
    net: FeatureNet | None = None
    if name == "oracle" and oracle is not None:
        net = oracle_features(oracle)
    elif name is not None:
        loader = pick({**FEATURES, "oracle": None}, name, "feature network")
        if feature_weights is None:
            raise SettingError(f"--feature-weights is not set; {name} needs its weights file")
        assert loader is not None
        net = loader(feature_weights, device)
    clip_name = clip
    if clip_name is None and "clip" in (metrics or chosen.metrics):
        source = teacher or (student_folder(student)[1] if student else None)
        own = pretrained.resolve(source) / "clip" if source else None
        clip_name = (
            str(own) if own is not None and own.is_dir() else None if chosen.clip == "any" else chosen.clip
        )
    clip_net = load_clip(clip_name, device) if clip_name else None

    # Samples and reference.
    batches: Iterable[Batch]
    if images is not None:
        batches = read_images(images, limit=num, resize="native", batch_size=batch_size)
    elif student is not None:
        batches = load_one_step(student, teacher, device).sample(texts, seed, batch_size=batch_size)
    else:
        assert teacher is not None
        batches = teacher_batches(load_teacher(teacher, device), texts, seed, steps, guidance, batch_size)
    real: Any = reference
    if reference is None and small and net is not None:
        real = collect(
            real_scenes(count, progress), net, resize=chosen.resize, source="scenes", progress=progress
        )
    result = evaluate(
        batches,
        real,
        chosen,
        features=net,
        clip=clip_net,
        metrics=tuple(metrics) if metrics else None,
        extra=oracle_measures(oracle) if oracle is not None and small else None,
        progress=progress,
        seed=seed,
    )
    return result.to_json()
