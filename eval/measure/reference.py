"""Reference statistics in one file: feature statistics of the real images, and the protocol's prompts."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from d2g.core.atomic_files import write_atomically
from d2g.core.config import differing
from d2g.core.errors import UserError
from d2g.core.json_files import check_type, parse_json
from eval.metrics.feature_stats import FeatureStats, Origin
from eval.networks.base import FeatureNet
from eval.protocols.metric import all_metrics
from eval.protocols.protocol import Protocol

VERSION = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """Feature statistics by the name of their rows (features, dinov2, ...), and the protocol's prompts.

    `facts`: source, images, files_sha256 (the digest of all files' sha256, in order), preprocessing and
    converted.
    """

    stats: Mapping[str, FeatureStats]
    prompts: Sequence[str] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Images measured."""
        return next(iter(self.stats.values())).count

    def save(self, file: Path, *, keep: int = 0) -> None:
        """Write one .safetensors file atomically, with `keep` random rows of each network (0: all rows).

        Networks of metrics with `all_reference_rows` keep every row. Raises UserError when the disk refuses.
        """
        origins = {name: asdict(stats.origin) | {"count": stats.count} for name, stats in self.stats.items()}
        complete = {name for m in all_metrics().values() if m.all_reference_rows for name in m.networks}
        tensors = {
            f"{name}/{part}": tensor
            for name, stats in self.stats.items()
            for part, tensor in stats.tensors(0 if name in complete else keep).items()
        }
        tensors["prompts"] = torch.frombuffer(
            bytearray(json.dumps(list(self.prompts)).encode()), dtype=torch.uint8
        )
        facts = {"version": VERSION, "facts": dict(self.facts), "origins": origins}
        write_atomically(file, save(tensors, {"d2g_reference": json.dumps(facts, sort_keys=True)}))

    @classmethod
    def load(cls, file: Path) -> "Reference":
        """Read what `save` wrote. Raises UserError for a missing, damaged or foreign file."""
        if not file.is_file():
            raise UserError(f"{file}: no such statistics file; make one with `d2g eval stats`")
        try:
            with safe_open(str(file), "pt") as content:
                facts = parse_json((content.metadata() or {})["d2g_reference"])
                tensors = {name: content.get_tensor(name) for name in content.keys()}
            check_type(facts, dict[str, Any])
            if facts["version"] != VERSION:
                raise ValueError(f"version {facts['version']}, expected {VERSION}")
            # Statistics by feature network, and the prompts.
            stats = {}
            for name, origin in facts["origins"].items():
                parts = {part: tensors[f"{name}/{part}"] for part in ("mean", "covariance", "rows")}
                count = int(origin.pop("count"))
                stats[name] = FeatureStats.restored(Origin(**origin), count, parts)
            prompts = parse_json(tensors["prompts"].numpy().tobytes())
            check_type(prompts, list[str], "prompts")
        except (SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{file} is no reference statistics file ({error}); make it with `d2g eval stats`"
            ) from error
        return cls(stats=stats, prompts=prompts, facts=facts["facts"])

    def check(self, protocol: Protocol, sets: Mapping[str, FeatureNet]) -> None:
        """Raise UserError unless the statistics fit the protocol and the networks `sets`."""
        expected_facts: dict[str, Any] = {
            "preprocessing": protocol.preprocessing,
            "reference": protocol.reference,
        }
        differ = differing(
            {name: self.facts.get(name, expected_facts[name]) for name in expected_facts}, expected_facts
        )
        # The same networks, with the same weights and preprocessing.
        for name, net in sets.items():
            if name not in self.stats:
                raise UserError(
                    f"reference {self.facts.get('source')} has no statistics of {net.name} features; make it "
                    "again with `d2g eval stats` and the same --metrics"
                )
            origin = self.stats[name].origin
            expected = {"features": net.name, "features_sha256": net.sha256, "resize": protocol.preprocessing}
            differ += differing({key: getattr(origin, key) for key in expected}, expected, f"{name}.")
        if differ:
            raise UserError(
                f"reference {self.facts.get('source')} was measured another way: {', '.join(differ)}; make "
                "its statistics again"
            )
