"""`d2g pairs`: generate and maintain noise-latent pairs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from d2g.core.config import Presets
from d2g.core.errors import UserError
from d2g.core.logs import logger
from d2g_cli import pair_store
from d2g_cli.common import (
    Prompts,
    TeacherOption,
    WorkOptions,
    configure_preset,
    emit,
    expand_options,
    finish_dry_run,
    is_rank_0,
    leave_process_group,
    presets_in_help,
    reporter,
    require_range,
    settings_from,
)
from d2g_cli.inputs import check_inputs, config_inputs
from d2g_cli.launch import log_other_processes

pairs_app = typer.Typer(help="Generate and maintain noise-latent pairs.", no_args_is_help=True)


def _parse_batch_size(text: str) -> int:
    """A number of rows, or 0 for `auto`."""
    if text == "auto":
        return 0
    if not text.isdecimal() or int(text) < 1:
        raise typer.BadParameter(f"{text!r} is neither a number of rows nor auto")
    return int(text)


@dataclass(frozen=True, kw_only=True)
class PairOptions(WorkOptions):
    """Options of `d2g pairs plan` and `generate`."""

    teacher: TeacherOption = None
    prompts: Prompts = None
    condition: Annotated[
        str | None, typer.Option(help="Pair store of stage C, whose rows condition those of stage B.")
    ] = None
    num_pairs: Annotated[int | None, typer.Option(help="Number of pairs (one per prompt).")] = None
    steps: Annotated[int | None, typer.Option(help="Solver steps (50).")] = None
    guidance: Annotated[float | None, typer.Option(help="Classifier-free guidance (8); 1 is none.")] = None
    solver: Annotated[
        str | None,
        typer.Option(help="ddim, heun or euler (the teacher's: ddim, for a flow euler)."),
    ] = None
    per_prompt: Annotated[int | None, typer.Option(help="Rows per prompt, each with its own noise (1).")] = (
        None
    )
    batch_size: Annotated[
        int | None,
        typer.Option(
            parser=_parse_batch_size,
            metavar="ROWS|auto",
            help="Rows per network evaluation; auto measures the fastest.",
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(PairOptions):
    """Options of `d2g pairs generate`."""

    dtype: Annotated[str | None, typer.Option(help="Stored type, float16 or float32.")] = None
    shard_size: Annotated[int | None, typer.Option(help="Rows per shard.")] = None
    noise: Annotated[
        str | None, typer.Option(help="stored, or seeded: computed again when the pairs are read.")
    ] = None


def _presets() -> Presets[Any]:
    from pairgen.config import PAIR_PRESETS

    return PAIR_PRESETS


def _pair_config(options: PairOptions) -> Any:
    from pairgen.config import PairConfig

    return configure_preset(_presets(), "default", options, settings_from(options, PairConfig))


StoreOut = Annotated[
    str,
    typer.Option("--out", help="Store to write: a folder, or a URL (s3://, gs://, az://, file://)."),
]


@pairs_app.command("generate", cls=presets_in_help(_presets))
@expand_options
def pairs_generate(options: GenerateOptions, out: StoreOut = "pairs") -> None:
    """Solve the teacher's ODE from noise and store rows of (noise, latent, prompt)."""
    config = _pair_config(options)
    _warn_of_verdict(config.teacher)
    if options.dry_run:
        _finish_dry_run(config, options.as_json)
    from pairgen.generate import generate_pairs
    from pairgen.store.remote import is_url

    log_other_processes("pairs generate")
    with leave_process_group():
        summary = generate_pairs(config, out, reporter)
        emit(summary, options.as_json, "pairs")
    if bad := summary.quarantined:
        again = "" if is_url(out) else f", `d2g pairs repair {out}` tries these again"
        raise UserError(
            f"{len(bad)} of {summary.pairs + len(bad)} pairs have no finite latent: "
            f"{pair_store.first_ten(bad)}; their prompts are in {out}/quarantine, the other pairs are "
            f"usable{again}"
        )


def _finish_dry_run(config: Any, as_json: bool) -> None:
    """Print the config and the size of the job, refuse what the job would refuse, and exit.

    Of a teacher that is not on this machine, and of a condition at a URL, at most their existence is checked.
    """
    from d2g.diffusion.pipelines import is_local
    from pairgen.cost import expected_size

    check_inputs(config_inputs(config, ("teacher", "prompts", "condition")))
    here = config.teacher and is_local(config.teacher) and "://" not in config.condition
    finish_dry_run(config, as_json, expected_size(config) if here else {})


def _warn_of_verdict(teacher: str) -> None:
    """Warn if `d2g teacher train` has found the teacher not trained. This reads its verdict and measures
    nothing."""
    if not is_rank_0():
        return
    from teacher_training.verdict import recorded_verdict

    verdict = recorded_verdict(Path(teacher))
    if verdict is not None and not verdict["trained"]:
        logger.warning("%s: %s", teacher, verdict["verdict"])


@pairs_app.command("plan", cls=presets_in_help(_presets))
@expand_options
def pairs_plan(
    options: PairOptions,
    price: Annotated[
        float, typer.Option(help="Price of one GPU-hour in any currency; adds the costs.")
    ] = 0.0,
) -> None:
    """Time a few batches on this machine, and print the GPU-hours, GiB and shards of the whole job."""
    config = _pair_config(options)
    require_range(price=price)
    if options.dry_run:
        _finish_dry_run(config, options.as_json)
    from pairgen.cost import plan_pairs

    emit(plan_pairs(config, price=price, progress=reporter), options.as_json, "plan")


pairs_app.command("info")(pair_store.info)
pairs_app.command("verify")(pair_store.verify_pairs)
pairs_app.command("repair")(pair_store.repair)
pairs_app.command("merge")(pair_store.merge)
pairs_app.command("export")(pair_store.export_pairs)
pairs_app.command("stats")(pair_store.stats)
