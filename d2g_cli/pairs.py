"""`d2g pairs`: make and look after noise-latent pairs."""

from pathlib import Path
from typing import Annotated, Any

import typer

from d2g.core.errors import UserError
from d2g_cli import pair_store
from d2g_cli.common import (
    DryRun,
    Json,
    Out,
    Preset,
    Prompts,
    Seed,
    Sets,
    TeacherOption,
    chosen,
    dry,
    emit,
    expect,
    finishing,
    reporter,
)

app = typer.Typer(help="Make and look after noise-latent pairs.", no_args_is_help=True)


def _pair_config(given: dict[str, Any]) -> Any:
    """PairConfig of a command's parameters."""
    from pairgen.config import PAIR_PRESETS, PairConfig

    options = {name: value for name, value in given.items() if name in PairConfig.__dataclass_fields__}
    return chosen(PAIR_PRESETS, given["preset"] or "default", options, given["sets"])


NumPairs = Annotated[int | None, typer.Option(help="Default: one per prompt.")]
Steps = Annotated[int | None, typer.Option(help="Solver steps (50).")]
Guidance = Annotated[float | None, typer.Option(help="Classifier-free guidance (8); 1 is none.")]
PerPrompt = Annotated[int | None, typer.Option(help="Rows per prompt, each with its own noise (1).")]
Solver = Annotated[
    str | None, typer.Option(help="ddim, heun or euler (the teacher's: ddim, for a flow euler).")
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
    config = _pair_config(locals())
    if dry_run:
        dry(config, as_json)
    from pairgen.generate import generate_pairs

    with finishing():
        made = generate_pairs(config, out, reporter)
        emit(made, as_json, "pairs")
    if made.quarantined:
        bad = made.quarantined
        raise UserError(
            f"{len(bad)} of {made.pairs + len(bad)} pairs have no finite latent: {pair_store.first_ten(bad)}; "
            f"their prompts stand in {out / 'quarantine'}, the others are usable, "
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
    config = _pair_config(locals())
    expect(price=price)
    if dry_run:
        dry(config, as_json)
    from pairgen.cost import plan_pairs

    emit(plan_pairs(config, price=price, progress=reporter), as_json, "plan")


app.command("info")(pair_store.info)
app.command("verify")(pair_store.verify)
app.command("repair")(pair_store.repair)
app.command("merge")(pair_store.merge)
app.command("stats")(pair_store.stats)
