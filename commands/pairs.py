"""`d2g pairs`: make and look after noise-latent pairs."""

from pathlib import Path
from typing import Annotated, Any

import typer

from commands import stores
from commands.common import (
    DryRun,
    Json,
    Out,
    Preset,
    Prompts,
    Seed,
    Sets,
    TeacherOption,
    configure,
    dry,
    emit,
    reporter,
)
from core.config import pick
from core.errors import UserError

app = typer.Typer(help="Make and look after noise-latent pairs.", no_args_is_help=True)


def _pair_config(preset: str | None, sets: list[str] | None, **options: Any) -> Any:
    from pairgen.config import PRESETS

    return configure(pick(PRESETS, preset or "default", "preset"), options, sets)


NumPairs = Annotated[int | None, typer.Option(help="Default: one per prompt.")]
Steps = Annotated[int | None, typer.Option(help="Solver steps [50].")]
Guidance = Annotated[float | None, typer.Option(help="Classifier-free guidance [8]; 1 is none.")]
PerPrompt = Annotated[int | None, typer.Option(help="Rows per prompt, each with its own noise [1].")]
Solver = Annotated[
    str | None, typer.Option(help="ddim, heun or euler [the teacher's: ddim, for a flow euler].")
]


def _batch_size(text: str) -> int:
    if text == "auto":
        return 0
    if not text.isdecimal() or int(text) < 1:
        raise typer.BadParameter(f"{text!r} is neither a number of rows nor auto")
    return int(text)


BatchSize = Annotated[
    int | None,
    typer.Option(parser=_batch_size, metavar="ROWS|auto", help="Rows per network evaluation; auto measures."),
]


@app.command("generate")
def pairs_generate(
    teacher: TeacherOption = None,
    prompts: Prompts = None,
    out: Out = Path("pairs"),
    num_pairs: NumPairs = None,
    steps: Steps = None,
    guidance: Guidance = None,
    solver: Solver = None,
    per_prompt: PerPrompt = None,
    batch_size: BatchSize = None,
    dtype: Annotated[str | None, typer.Option(help="Stored type, float16 or float32.")] = None,
    shard_size: Annotated[int | None, typer.Option(help="Rows per shard.")] = None,
    noise: Annotated[str | None, typer.Option(help="stored, or seeded: drawn again on reading.")] = None,
    preset: Preset = None,
    sets: Sets = None,
    seed: Seed = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Send noise through the teacher and store (noise, latent, prompt) rows."""
    from core import dist
    from pairgen.generate import generate_pairs

    given = locals()
    names = (
        "teacher",
        "prompts",
        "num_pairs",
        "steps",
        "guidance",
        "solver",
        "per_prompt",
        "batch_size",
        "dtype",
        "shard_size",
        "noise",
        "seed",
    )
    config = _pair_config(preset, sets, **{name: given[name] for name in names})
    if dry_run:
        dry(config, as_json)
    try:
        made = generate_pairs(config, out, reporter)
        emit(made, as_json, "pairs")
    finally:
        dist.finish()
    if made.quarantined:
        shown = ", ".join(map(str, made.quarantined[:10])) + (" ..." if len(made.quarantined) > 10 else "")
        raise UserError(
            f"{len(made.quarantined)} of {made.pairs + len(made.quarantined)} pairs have no finite latent: "
            f"{shown}; their prompts stand in {out / 'quarantine'}, the others are usable, "
            f"`d2g pairs repair {out}` tries these again"
        )


@app.command("plan")
def pairs_plan(
    teacher: TeacherOption = None,
    prompts: Prompts = None,
    num_pairs: NumPairs = None,
    steps: Steps = None,
    guidance: Guidance = None,
    solver: Solver = None,
    per_prompt: PerPrompt = None,
    batch_size: BatchSize = None,
    price: Annotated[float, typer.Option(help="Of one GPU-hour, in any currency: adds costs.")] = 0.0,
    preset: Preset = None,
    sets: Sets = None,
    seed: Seed = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Time a few batches here; print GPU-hours, GiB and shards before anything is spent."""
    from pairgen.plan import plan_pairs

    given = locals()
    names = (
        "teacher",
        "prompts",
        "num_pairs",
        "steps",
        "guidance",
        "solver",
        "per_prompt",
        "batch_size",
        "seed",
    )
    config = _pair_config(preset, sets, **{name: given[name] for name in names})
    if dry_run:
        dry(config, as_json)
    emit(plan_pairs(config, price=price, progress=reporter), as_json, "plan")


app.command("info")(stores.info)
app.command("verify")(stores.verify)
app.command("repair")(stores.repair)
app.command("merge")(stores.merge)
app.command("stats")(stores.stats)
