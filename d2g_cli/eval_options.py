"""What the evaluation commands take: option types, and the config that they make."""

from pathlib import Path
from typing import Annotated, Any

import typer

from d2g.core.config import pick
from d2g_cli.common import chosen

Student = Annotated[str | None, typer.Option(help="Run folder, exported student, or a shipped name.")]
Pipeline = Annotated[str | None, typer.Option(help="Any diffusers pipeline: folder or hub id.")]
Images = Annotated[Path | None, typer.Option(help="Folder or parquet of images to measure.")]
Reference = Annotated[
    Path | None, typer.Option(help="Real images: a file of `eval stats`, COCO's folder, any folder, parquet.")
]
ProtocolName = Annotated[str | None, typer.Option(help="Named protocol; see `eval protocols` (folder).")]
Metrics = Annotated[str | None, typer.Option(help="fid,clip,pr,…: comma-separated (the protocol's).")]
Features = Annotated[
    str | None,
    typer.Option(help="Feature network, where the protocol leaves it open: inception, squeezenet…"),
]
Clip = Annotated[str | None, typer.Option(help="CLIP, where it is open: vit-b-32, MODEL:TAG, or a folder.")]
Weights = Annotated[
    list[str] | None,
    typer.Option(help="Weights file of the feature network, or NAME=PATH of dinov2, dreamsim…; repeatable."),
]
Num = Annotated[int | None, typer.Option(help="Images, where the protocol leaves it open (one per prompt).")]
Fewer = Annotated[
    bool, typer.Option("--allow-fewer", help="Measure fewer than the protocol's; the result says so.")
]
Steps = Annotated[int | None, typer.Option(help="Steps of a teacher or pipeline (50).")]
Guidance = Annotated[float | None, typer.Option(help="Guidance of a teacher (3) or pipeline (its own).")]
Batch = Annotated[int | None, typer.Option(help="Images per batch (64).")]
NoiseSeed = Annotated[
    int | None, typer.Option(help="Image i has the noise of (seed, i) (the protocol's: 1000).")
]
Work = Annotated[
    Path | None, typer.Option(help="Where finished parts are kept, to go on from (work/ in an --out folder).")
]
Keep = Annotated[Path | None, typer.Option(help="Save the images there as PNG.")]


def configured(given: dict[str, Any]) -> Any:
    """EvalRun of a command's parameters: of a preset, the options that were given, and --set."""
    from eval.protocols.config import EVAL_PRESETS, EvalRun
    from eval.protocols.protocol import PROTOCOLS
    from miniature.registration import register_eval_scenes

    register_eval_scenes()
    options = {name: value for name, value in given.items() if name in EvalRun.__dataclass_fields__}
    if given.get("protocol") is not None:
        options["protocol"] = pick(PROTOCOLS, given["protocol"], "protocol")
    if given.get("metrics"):
        options["metrics"] = tuple(given["metrics"].split(","))
    if given.get("weights"):
        options["weights"] = tuple(given["weights"])
    for flag in ("allow_fewer", "latency", "every"):
        options[flag] = options.get(flag) or None
    return chosen(EVAL_PRESETS, given["preset"] or "default", options, given["sets"])
