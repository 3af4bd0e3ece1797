"""Registers the scenes with the packages below, which by themselves know only folders of images.

Importing this module loads nothing heavy: each function imports what it needs when it is called.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from d2g.core.errors import UserError
from d2g.core.progress import Progress, quiet
from eval.protocols.config import EvalRun, register_preset
from eval.protocols.data_sources import EvalDataSource, register_data_source
from eval.protocols.metric import Metric, MetricNumber, mean_of_rows, register_metric
from eval.protocols.protocol import Protocol, register_protocol

if TYPE_CHECKING:
    from torch import Tensor

    from eval.measure.measure import Measure
    from eval.measure.reference import Reference
    from eval.networks.base import FeatureNet

_CAPTION_ACCURACY = Metric(
    name="caption_accuracy",
    description="share of a scene's captioned facts that the oracle reads back",
    label="Caption accuracy",
    better="higher",
    interval="bootstrap",
    more=(
        MetricNumber(key="caption_exact", label="Flawless pictures", better="higher", interval="bootstrap"),
    ),
    networks=(),
    needs_reference=False,
    compute=mean_of_rows("caption_accuracy", "caption_exact"),
    ranks_images=True,
    data_source="scenes",
)


def register_eval_scenes() -> None:
    """Register the scenes with `eval`: metric, data source, protocols, preset. Idempotent."""
    register_metric(_CAPTION_ACCURACY)
    register_data_source(_SCENES)
    # The test scenes under a fixed number of images.
    scenes = Protocol(
        name="scenes-5k",
        prompts="scenes",
        reference="scenes",
        images=5_000,
        reference_images=5_000,
        size=64,
        resize="box",
        crop="centre",
        features="oracle",
        metrics=("fid", "kid", "clip", "pr", "caption_accuracy"),
    )
    register_protocol(scenes)
    # The same with as many scenes as the caller asks for; the demo uses it.
    any_number = replace(scenes, name="miniature", images=0, reference_images=0)
    register_protocol(any_number)
    register_preset(
        "miniature",
        "The shipped miniature student under its own protocol",
        EvalRun(student="miniature", protocol=any_number),
    )


def register_training_scenes() -> None:
    """Make `scenes` available as training data of a teacher. Calling it again changes nothing."""
    from teacher_training.data import register_data

    register_data("scenes", training_scenes)


def training_scenes(
    size: int, limit: int, seed: int, progress: Progress = quiet
) -> "tuple[Tensor, list[str]]":
    """Render `limit` scenes of the training split: uint8 images [limit, 3, 64, 64] and their captions.

    Raises UserError for another size than 64 pixels, which the renderer is made for.
    """
    from miniature.sampling import render_dataset

    if size != 64:
        raise UserError(f"scenes are rendered at 64 pixels, got size {size}; leave --set size at 64")
    return render_dataset(limit, seed, "train", progress)


def _prompts(count: int) -> list[str]:
    from miniature.metrics import TEST_SEED
    from miniature.sampling import scene_captions

    return scene_captions(count, TEST_SEED)


def _reference(
    count: int, protocol: Protocol, networks: "Mapping[str, FeatureNet]", progress: Progress
) -> "Reference":
    from miniature.metrics import scenes_reference

    return scenes_reference(count, protocol, networks, progress)


def _oracle_features() -> "FeatureNet":
    from miniature.metrics import oracle_features
    from miniature.oracle import load_oracle

    return oracle_features(load_oracle())


def _oracle_measures(size: str) -> "Mapping[str, Measure]":
    from miniature.metrics import oracle_measures
    from miniature.oracle import load_oracle

    return oracle_measures(load_oracle(), size)


_SCENES = EvalDataSource(
    name="scenes",
    images=1_000,
    teacher="miniature",
    prompts=_prompts,
    reference=_reference,
    features={"oracle": _oracle_features},
    measures={"caption_accuracy": _oracle_measures},
)
