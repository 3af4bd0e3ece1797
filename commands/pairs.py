"""`d2g pairs`: make and look after noise-latent pairs."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

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

app = typer.Typer(help="Make and look after noise-latent pairs.", no_args_is_help=True)


def _pair_config(preset: str | None, sets: list[str] | None, **options: Any) -> Any:
    from pairgen.config import PRESETS

    return configure(pick(PRESETS, preset or "default", "preset"), options, sets)


NumPairs = Annotated[int | None, typer.Option(help="Default: one per prompt.")]
Steps = Annotated[int | None, typer.Option(help="Solver steps [50].")]
Guidance = Annotated[float | None, typer.Option(help="Classifier-free guidance [8]; 1 is none.")]
Solver = Annotated[str | None, typer.Option(help="ddim or heun.")]
BatchSize = Annotated[int | None, typer.Option(help="Rows per network evaluation.")]


@app.command("generate")
def pairs_generate(
    teacher: TeacherOption = None,
    prompts: Prompts = None,
    out: Out = Path("pairs"),
    num_pairs: NumPairs = None,
    steps: Steps = None,
    guidance: Guidance = None,
    solver: Solver = None,
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
        emit(generate_pairs(config, out, reporter), as_json, "pairs")
    finally:
        dist.finish()


@app.command("plan")
def pairs_plan(
    teacher: TeacherOption = None,
    prompts: Prompts = None,
    num_pairs: NumPairs = None,
    steps: Steps = None,
    guidance: Guidance = None,
    solver: Solver = None,
    batch_size: BatchSize = None,
    preset: Preset = None,
    sets: Sets = None,
    seed: Seed = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Time a few batches here; print GPU-hours, GiB and shards before anything is spent."""
    from pairgen.generate import plan_pairs

    given = locals()
    names = ("teacher", "prompts", "num_pairs", "steps", "guidance", "solver", "batch_size", "seed")
    config = _pair_config(preset, sets, **{name: given[name] for name in names})
    if dry_run:
        dry(config, as_json)
    emit(plan_pairs(config), as_json, "plan")


@app.command("info")
def pairs_info(folder: Path, as_json: Json = False) -> None:
    """Pairs, shards, spec and size of a store."""
    from pairgen.verify import store_info

    emit(store_info(folder), as_json, str(folder))


@app.command("verify")
def pairs_verify(
    folder: Path,
    resimulate: Annotated[int, typer.Option(help="Also send this many rows through the teacher again.")] = 0,
    teacher: TeacherOption = None,
    tolerance: Annotated[float, typer.Option(help="Largest difference --resimulate accepts.")] = 0.02,
    as_json: Json = False,
) -> None:
    """Read every byte of a store and say what is damaged or missing. Exit 1 when not ok."""
    from pairgen.verify import verify_store

    result: dict[str, Any] = asdict(verify_store(folder, reporter)) | {"max_abs_err": None}
    if resimulate and result["ok"]:
        from pairgen.generate import resimulate as again

        result["max_abs_err"] = again(folder, resimulate, teacher)
        result["ok"] = result["max_abs_err"] <= tolerance
    emit(result, as_json, str(folder))
    if not result["ok"]:
        print(f"error: {folder} is not ok; `d2g pairs repair {folder}`, then generate again", file=sys.stderr)
        raise typer.Exit(1)


@app.command("repair")
def pairs_repair(
    folder: Path,
    prompts: Annotated[
        Path | None, typer.Option(help="The store's prompt file: also make missing rows.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Move bad shards to quarantine/; with --prompts, make the missing rows again."""
    from pairgen.verify import repair_store

    quarantined, regenerated = repair_store(folder, reporter), 0
    if prompts is not None:
        from pairgen.generate import regenerate

        regenerated = regenerate(folder, prompts, reporter)
    emit({"quarantined": quarantined, "regenerated": regenerated}, as_json, str(folder))


@app.command("merge")
def pairs_merge(folders: list[Path], out: Out, as_json: Json = False) -> None:
    """Join stores of one spec that hold different shards."""
    from pairgen.verify import merge_stores, store_info

    merge_stores(folders, out)
    emit(store_info(out), as_json, str(out))
