"""`d2g pairs info`, `verify`, `repair`, `merge`, `export` and `stats`: maintain pair stores."""

from dataclasses import asdict
from math import isfinite
from pathlib import Path
from typing import Annotated, Any

import typer

from d2g.core.errors import UserError
from d2g.core.logs import logger
from d2g_cli.common import (
    DryRun,
    Json,
    Out,
    Prompts,
    TeacherOption,
    emit,
    is_rank_0,
    leave_process_group,
    one_process,
    reporter,
    require_range,
)
from d2g_cli.inputs import check_inputs

Store = Annotated[Path, typer.Argument(help="The store's folder.")]
Workers = Annotated[int, typer.Option(help="Files to read at once (one per processor, at most 8).")]
Tolerance = Annotated[
    float, typer.Option(help="Largest difference of latents that counts as rounding error.")
]
BARS = " ▁▂▃▄▅▆▇█"
MAX_LIST_ITEMS = 8  # items of a list to print


@one_process
def info(
    folder: Annotated[str, typer.Argument(help="The store's folder, or its URL (s3://, gs://, hf://).")],
    as_json: Json = False,
) -> None:
    """Show the pairs, shards, spec and size of a store."""
    from pairgen.verify import store_info

    _show(store_info(folder), as_json, folder)


@one_process
def verify_pairs(
    folder: Store,
    resimulate: Annotated[
        int, typer.Option(help="Generate this many rows again with the teacher and compare.")
    ] = 0,
    teacher: TeacherOption = None,
    tolerance: Tolerance = 0.02,
    workers: Workers = 0,
    as_json: Json = False,
) -> None:
    """Read every byte of a store and report what is damaged or missing. Exits with 1 if not ok."""
    from pairgen.verify import verify_store

    require_range(tolerance=tolerance, workers=workers, resimulate=resimulate)
    report = verify_store(folder, reporter, workers)
    result = asdict(report) | {"max_abs_err": None}
    if resimulate and report.checked and not report.bad_shards:
        from pairgen.generate import resimulate as resimulate_rows

        worst = resimulate_rows(folder, resimulate, teacher)
        result["max_abs_err"] = worst if isfinite(worst) else None  # JSON has no infinity
        result["ok"] &= worst <= tolerance
    _show(result, as_json, str(folder))
    if not result["ok"]:
        raise UserError(f"{folder} is not ok: {_faults(folder, result, tolerance)}")


def _faults(folder: Path, result: dict[str, Any], tolerance: float) -> str:
    """The faults that `verify` reports, in one line, and what to do."""
    counts = {
        "damaged files": len(result["bad_shards"]),
        "shards missing": len(result["missing"]),
        "pairs in two rows": len(result["duplicates"]),
        "pairs without a finite latent": len(result["quarantined"]),
    }
    faults = [f"{count} {name}" for name, count in counts.items() if count]
    if faults:
        return f"{', '.join(faults)}; run `d2g pairs repair {folder}`"
    worst = result["max_abs_err"]
    if worst is None:
        return (
            "rows generated again are not finite, and the stored ones are; this processor computes them "
            "differently, or the pairs come from another teacher"
        )
    return (
        f"rows generated again differ by up to {worst:.3g}, tolerance {tolerance:g}; this processor rounds "
        "differently (raise --tolerance), or the pairs come from another teacher"
    )


def repair(
    folder: Store,
    prompts: Prompts = None,
    teacher: TeacherOption = None,
    no_regenerate: Annotated[
        bool, typer.Option("--no-regenerate", help="Only move damaged files away; needs no teacher.")
    ] = False,
    workers: Workers = 0,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Move damaged files to quarantine/, then generate the missing rows, quarantined ones too.

    Prompts come from the store's own list; give --prompts for a store without one, and --teacher if the
    teacher is not where it was.
    """
    from d2g.core.distributed import process_group
    from pairgen.repair import repair_store
    from pairgen.store.spec import pending, quarantined_rows, read_spec
    from pairgen.verify import verify_store

    require_range(workers=workers)
    if dry_run:
        check_inputs({"--prompts": prompts, "--teacher": teacher})
    spec = read_spec(folder)
    if dry_run:
        report = verify_store(folder, reporter, workers)
        plan = {"bad": report.bad_shards, "rows_to_make": spec.num_pairs - report.checked}
        _show(plan, as_json, f"dry run: nothing was touched in {folder}")
        return
    regenerated = 0
    with leave_process_group():
        # Rank 0 alone moves files, before any rank generates.
        process_group.init(long_waits=True)
        moved = repair_store(folder, reporter, workers) if is_rank_0() else []
        quarantined = process_group.gather_objects(moved)[0]
        if quarantined:
            logger.info("moved %d files to %s", len(quarantined), folder / "quarantine")
        # Generate what is missing, which needs the teacher and the prompts.
        if not no_regenerate and (pending(folder, spec) or quarantined_rows(folder, spec)):
            from pairgen.generate import regenerate

            _require_prompts(folder, prompts, spec.conditioning)
            regenerated = regenerate(folder, prompts, teacher, reporter)
    _show({"quarantined": quarantined, "regenerated": regenerated}, as_json, str(folder))
    # Rows whose latents are not finite stay out.
    failed = [row["index"] for rows in quarantined_rows(folder, spec).values() for row in rows]
    if failed and not no_regenerate:
        raise UserError(
            f"{len(failed)} pairs still have no finite latent: {first_ten(failed)}; "
            f"their prompts are in {folder / 'quarantine'}, the other pairs are usable"
        )


def first_ten(numbers: list[int]) -> str:
    """The first ten of some row numbers, as text."""
    return ", ".join(map(str, numbers[:10])) + (" ..." if len(numbers) > 10 else "")


def _require_prompts(folder: Path, prompts: Path | None, conditioning: str) -> None:
    """Raise UserError if the missing rows need prompts that neither the store nor the user provides."""
    from pairgen.store.spec import prompts_path

    if prompts is None and conditioning == "text" and not prompts_path(folder).exists():
        raise UserError(
            f"rows are missing, and {folder} has no prompt list to generate them from; "
            "give --prompts FILE, the one it was generated with, or --no-regenerate"
        )


@one_process
def merge(
    folders: Annotated[list[Path], typer.Argument(help="Stores with the same spec.")],
    out: Out,
    link: Annotated[bool, typer.Option("--link", help="Create hard links, not copies.")] = False,
    tolerance: Tolerance = 0.02,
    workers: Workers = 0,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Merge stores of the same spec that contain different shards. Run the same command again to resume."""
    from pairgen.merge import merge_stores
    from pairgen.store.spec import read_spec, shards_present
    from pairgen.verify import store_info

    require_range(tolerance=tolerance, workers=workers)
    if dry_run:
        shards = {str(folder): len(shards_present(folder, read_spec(folder))) for folder in folders}
        _show({"out": str(out), "shards": shards}, as_json, "dry run: nothing was touched")
        return
    report = merge_stores(folders, out, reporter, link=link, tolerance=tolerance, workers=workers)
    _show(store_info(out) | asdict(report), as_json, str(out))


@one_process
def export_pairs(
    folder: Store,
    out: Out,
    format: Annotated[str, typer.Option(help="parquet, or webdataset for tar files.")] = "parquet",
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Copy a store to Parquet or WebDataset files, for other trainers. Run again to resume."""
    from pairgen.other_formats import check_copy_folder, check_format, export_store
    from pairgen.store.spec import read_spec, shards_present

    check_format(format)
    check_copy_folder(folder, out)
    if dry_run:
        files = len(shards_present(folder, read_spec(folder)))
        _show({"out": str(out), "format": format, "files": files}, as_json, "dry run: nothing was written")
        return
    _show(export_store(folder, out, format, reporter), as_json, str(out))


@one_process
def stats(
    folder: Store,
    rows: Annotated[int, typer.Option(help="Number of evenly spaced rows to read (all).")] = 0,
    sheet: Annotated[
        Path | None, typer.Option(help="Write a PNG of decoded rows with their prompts, too.")
    ] = None,
    cells: Annotated[int, typer.Option(help="Images on the sheet.")] = 48,
    teacher: TeacherOption = None,
    workers: Workers = 0,
    as_json: Json = False,
) -> None:
    """Show moments, norms, prompt lengths and outliers of a store's rows, and write a contact sheet."""
    from pairgen.statistics import store_statistics

    require_range(rows=rows, workers=workers)
    require_range(1, 1024, cells=cells)
    result = store_statistics(folder, rows, teacher, reporter, workers) | {"sheet": None}
    if sheet is not None:
        from pairgen.contact_sheet import save_sheet

        save_sheet(folder, sheet, cells, teacher, reporter)
        result["sheet"] = str(sheet)
    _show(result, as_json, str(folder))


def _show(result: dict[str, Any], as_json: bool, title: str) -> None:
    emit(result if as_json else readable(result), as_json, title)


def readable(result: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A result as lines of a table: groups as dotted names, histograms as bars, long lists shortened."""
    flat: dict[str, Any] = {}
    for key, value in result.items():
        if key == "edges":
            continue  # bin edges of a histogram, which lie evenly between min and max
        if isinstance(value, dict) and value:
            # Groups become dotted names.
            flat |= readable(value, f"{prefix}{key}.")
        elif key in ("counts", "expected"):
            flat[prefix + key] = _bars(value)
        elif isinstance(value, list):
            more = [f"and {len(value) - MAX_LIST_ITEMS} more"] if len(value) > MAX_LIST_ITEMS else []
            separator = ", " if all(isinstance(item, int | float) for item in value) else "\n"
            flat[prefix + key] = separator.join([*map(_item, value[:MAX_LIST_ITEMS]), *more]) or "none"
        elif value is not None:
            flat[prefix + key] = value
    return flat


def _item(value: Any) -> str:
    """A list item as text."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_item(part)}" for key, part in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _bars(counts: list[float]) -> str:
    """A histogram as a row of block characters."""
    highest = max(counts) or 1
    return "".join(BARS[min(8, -int(-8 * count // highest))] for count in counts)
