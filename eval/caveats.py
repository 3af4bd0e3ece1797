"""Notes that a reader must know before quoting a result."""

from collections.abc import Mapping

from d2g.core.config import differing
from eval.measure.reference import Reference
from eval.measure.required_networks import Networks
from eval.measure.rows import MeasuredRows
from eval.networks.inception import INCEPTION_FILE, INCEPTION_SHA256_PREFIX
from eval.protocols.protocol import PROTOCOLS, Protocol


def result_notes(
    rows: MeasuredRows,
    protocol: Protocol,
    networks: Networks,
    counts: Mapping[str, int],
    reference: Reference | None,
) -> list[str]:
    """One line each: other counts, too few images, networks other than FID's, converted images."""
    lines = _changed_settings(protocol)
    expected = {"images": protocol.images, "reference": protocol.reference_images}
    # Counts other than the protocol's.
    for name, number in expected.items():
        if number and name in counts and counts[name] != number:
            lines.append(
                f"{counts[name]} {name}, the protocol has {number}: not comparable with published numbers"
            )
    # Fewer images than features.
    for name, net in networks.sets.items():
        sides = {"images": counts["images"], "reference": counts.get("reference", net.dim + 1)}
        few = [f"{count} {side}" for side, count in sides.items() if count <= net.dim]
        if few and reference is not None and name in reference.stats:
            lines.append(
                f"{' and '.join(few)} for {net.dim} {net.name} features: covariances are singular, and "
                "Frechet distances biased upwards"
            )
    # Frechet distances that are no FID.
    features = networks.sets.get("features")
    if features is not None and not features.name.startswith("inception"):
        lines.append(f"`fid` is a Frechet distance of {features.name} features, not an Inception FID")
    elif features is not None and not features.sha256.startswith(INCEPTION_SHA256_PREFIX):
        lines.append(f"the Inception weights are not the published {INCEPTION_FILE}: this is no FID")
    # Images that were not 8-bit RGB.
    for side, converted in (("images", rows.converted), ("reference", _converted(reference))):
        if converted:
            kinds = ", ".join(f"{number} {kind}" for kind, number in sorted(converted.items()))
            lines.append(f"{side}: {kinds}, taken as 8-bit RGB")
    return lines


def _converted(reference: Reference | None) -> Mapping[str, int]:
    return {} if reference is None else reference.facts.get("converted", {})


def _changed_settings(protocol: Protocol) -> list[str]:
    """A note where the settings of a named protocol were changed; `folder` is meant to be changed."""
    original = PROTOCOLS.get(protocol.name)
    if original is None or protocol.name == "folder":
        return []
    resolved = original.resolved(
        features=protocol.features, clip=protocol.clip, prompts_sha256=protocol.prompts_sha256
    )
    differ = differing(resolved.settings(), protocol.settings())
    return [f"not {protocol.name} as it is named: {', '.join(differ)}"] if differ else []
