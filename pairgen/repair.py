"""Repairing pair stores: move damaged files away and rewrite lost records. Nothing is deleted."""

from pathlib import Path
from typing import Any

from d2g.core.progress import Progress, quiet
from pairgen.prompts import PromptList
from pairgen.store.spec import (
    StoreSpec,
    encode_record,
    quarantine_path,
    read_spec,
    write_through_scratch,
    writing,
)
from pairgen.verify import stored_prompts, verify_store


def repair_store(folder: Path, progress: Progress = quiet, workers: int = 0) -> list[str]:
    """Move every damaged file to DIR/quarantine; `pairgen.generate.regenerate` then generates its rows again.

    Lost or damaged quarantine records are rewritten from their shards' headers. Returns the paths, relative
    to `folder`, of the files that were moved.
    """
    folder, spec = Path(folder), read_spec(folder)
    report = verify_store(folder, progress, workers)
    names = [bad["shard"] for bad in report.bad_shards if (folder / bad["shard"]).exists()]
    # Move damaged files away, records included; then rewrite the records that are missing.
    with writing(folder, "no shard was deleted"):
        for name in names:
            (folder / "quarantine").mkdir(exist_ok=True)
            (folder / name).rename(_free_name(folder / "quarantine" / Path(name).name))
        _write_lost_records(folder, spec, report.quarantined)
    return names


def _write_lost_records(folder: Path, spec: StoreSpec, quarantined: list[int]) -> None:
    prompts, _ = stored_prompts(folder, spec)
    for shard in sorted({pair // spec.shard_size for pair in quarantined}):
        if not quarantine_path(folder, shard).exists():
            (folder / "quarantine").mkdir(exist_ok=True)
            rows = [_lost_row(pair, spec, prompts) for pair in quarantined if pair in spec.rows(shard)]
            write_through_scratch(
                encode_record(shard, rows), quarantine_path(folder, shard), folder / "partial"
            )


def _lost_row(pair: int, spec: StoreSpec, prompts: PromptList | None) -> dict[str, Any]:
    text = "" if prompts is None else prompts[spec.prompt_of(pair)]
    reason = "its shard's header lists it as quarantined; the record with the reason was lost"
    return {"index": pair, "prompt": text, "reason": reason}


def _free_name(path: Path) -> Path:
    """`path`, or the first `path.1`, `path.2`, ... that does not exist."""
    number = 0
    free = path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}.{number}")
    return free
