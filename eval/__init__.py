"""Evaluate samplers under named protocols, and the metrics by themselves.

`evaluate` measures any source of images; `frechet_distance` and `precision_recall` take features.
"""

from typing import TYPE_CHECKING

from d2g.core.lazy_names import lazy_names

if TYPE_CHECKING:
    from eval.evaluation import evaluate
    from eval.measure.build_reference import build_reference
    from eval.measure.required_networks import Networks
    from eval.measure.source import batch_source
    from eval.metrics.frechet import frechet_distance
    from eval.metrics.precision_recall import precision_recall
    from eval.networks.base import FeatureNet
    from eval.protocols.protocol import Protocol

_MODULES = {
    "FeatureNet": "eval.networks.base",
    "Networks": "eval.measure.required_networks",
    "Protocol": "eval.protocols.protocol",
    "batch_source": "eval.measure.source",
    "build_reference": "eval.measure.build_reference",
    "evaluate": "eval.evaluation",
    "frechet_distance": "eval.metrics.frechet",
    "precision_recall": "eval.metrics.precision_recall",
}
__all__ = [
    "FeatureNet",
    "Networks",
    "Protocol",
    "batch_source",
    "build_reference",
    "evaluate",
    "frechet_distance",
    "precision_recall",
]

__getattr__, __dir__ = lazy_names(__name__, _MODULES)
