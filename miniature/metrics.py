"""References and metrics of the scenes, computed with the caption oracle."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import Tensor

from d2g.core.config import digest
from d2g.core.distributed import process_group
from d2g.core.progress import Progress, quiet
from d2g.diffusion.latents import from_uint8
from eval.images.folders import Batch
from eval.measure.build_reference import build_reference, cache_folder, save_reference
from eval.measure.measure import Measure
from eval.measure.reference import Reference
from eval.measure.rows import MeasureOptions
from eval.measure.source import batch_source
from eval.networks.base import FeatureNet
from eval.protocols.protocol import Protocol
from miniature.oracle import NUM_FEATURES, ORACLE_FOLDER, Oracle, caption_scores
from miniature.sampling import render_dataset

TEST_SEED = 2  # teachers train on scenes of seed 1


def oracle_features(oracle: Oracle) -> FeatureNet:
    """Return the oracle's pooled features as the feature network of the scenes protocols."""
    sha256 = hashlib.sha256((ORACLE_FOLDER / "model.safetensors").read_bytes()).hexdigest()
    return FeatureNet(
        name="oracle",
        dim=NUM_FEATURES,
        sha256=sha256,
        function=lambda images: oracle.features(from_uint8(images.cpu())),  # the oracle stays on the CPU
    )


def oracle_measures(oracle: Oracle, size: str) -> dict[str, Measure]:
    """Return the measures caption_accuracy (share of correct facts) and caption_exact (1 if all are
    correct).
    """

    def scores(row: int) -> Callable[[Tensor, list[str]], Tensor]:
        return lambda images, texts: caption_scores(oracle, from_uint8(images.cpu()), texts)[row]

    return {
        name: Measure(size=size, function=scores(row), needs_prompts=True)
        for row, name in enumerate(("caption_accuracy", "caption_exact"))
    }


def real_scenes(num: int, progress: Progress = quiet) -> list[Batch]:
    """Render test scenes; returns them with their captions, in batches of 64."""
    images, texts = render_dataset(num, TEST_SEED, "train", progress)
    return [(images[i : i + 64], texts[i : i + 64]) for i in range(0, num, 64)]


def scenes_reference(
    count: int, protocol: Protocol, sets: Mapping[str, FeatureNet], progress: Progress = quiet
) -> Reference:
    """Return the statistics of `count` rendered test scenes, cached on disk."""
    networks = {name: [net.name, net.sha256] for name, net in sets.items()}
    key = digest(["scenes", TEST_SEED, count, networks, protocol.preprocessing])
    file = cache_folder() / "reference" / f"{key}.safetensors"
    if process_group.any_rank(process_group.rank() == 0 and not file.is_file()):
        source = batch_source("scenes", real_scenes(count, progress))
        built = build_reference(source, replace(protocol, reference_images=count), sets, progress=progress)
        save_reference(built, file, MeasureOptions(), protocol.pr_images)
    return Reference.load(file)
