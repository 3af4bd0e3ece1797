"""What the runs that led to a student say of it: their pairs, their recipes, what they cost. For its card."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from d2g.core.config import WRITTEN_ANEW, from_json, read_object
from d2g.core.distributed import checkpoint
from d2g.core.errors import SettingError
from d2g.core.tracking.run_directory import read_stats
from distill.config.components import DiscriminatorConfig, RegressionConfig
from distill.config.run import DistillConfig
from distill.planning.cost import evaluations, pair_evaluations
from pairgen.store.hdf5 import StoreSpec
from pairgen.store.reader import PairReader

EXPORTED = "not recorded with an exported student; export the run itself"


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One run on the way to a student. `config.train.images` are those of its newest checkpoint, which is
    what the next run starts from, and what is exported; `device_hours` are those up to it.
    """

    config: DistillConfig
    device_hours: float | None

    @property
    def name(self) -> str:
        """As a card calls it."""
        return f"Stage `{self.config.stage}`"


@dataclass(frozen=True, kw_only=True, slots=True)
class History:
    """The runs that led to a student, first one first, as far back as they are known, and why no further:
    "" where the first of them began from the teacher."""

    stages: tuple[Stage, ...]
    gap: str


def history(student: str) -> History:
    """What the folders at hand say of a run or of an exported student. Raises UserError for damaged ones."""
    found: list[Stage] = []
    folder, seen = Path(student), set[Path]()
    while True:
        if not (folder / "config.json").is_file():
            gap = "an exported student or a run that is not at hand" if found else EXPORTED
            break
        seen.add(folder.resolve())
        try:
            stage = _stage(folder)
        except SettingError as error:  # named in the card, for it does not keep a student from its export
            gap = f"a run whose config.json is of another version ({error})"
            break
        if stage is None:
            gap = "a run whose checkpoints are gone"
            break
        found.insert(0, stage)
        if not stage.config.init:
            return History(stages=tuple(found), gap="")
        folder = Path(stage.config.init)
        if folder.resolve() in seen:
            gap = "a run that has been trained anew since"
            break
    return History(stages=tuple(found), gap=gap)


def _stage(folder: Path) -> Stage | None:
    """A run up to its newest checkpoint; None where it has none. SettingError for another version's."""
    last = checkpoint.latest(folder / "checkpoints")
    if last is None:
        return None
    config = _config(read_object(folder / "config.json", WRITTEN_ANEW))
    hours = [
        line["time/device_hours"]
        for line in read_stats(folder)
        if line["nimg"] <= last.nimg and "time/device_hours" in line
    ]
    return Stage(
        config=replace(config, train=replace(config.train, images=last.nimg)),
        device_hours=max(hours, default=None),
    )


def _config(written: dict[str, Any]) -> DistillConfig:
    """A run's config.json, in which what may change at a resume lies apart. Of the engine, whose compiler
    need not be on this machine, what evaluations depend on."""
    length = written.pop("length", {})
    for group in ("train", "data"):
        known = type(getattr(DistillConfig(), group)).__dataclass_fields__
        written[group] = written.get(group, {}) | {k: v for k, v in length.items() if k in known}
    engine = written.get("engine", {}) | length
    written["engine"] = {"gradient_accumulation": engine.get("gradient_accumulation", 1)}
    return from_json(DistillConfig, written)


def pairs(runs: History) -> tuple[list[StoreSpec], list[str]]:
    """The different stores that the runs read, and the names of those that are not on this machine."""
    found: dict[Path, StoreSpec] = {}
    missing: dict[str, None] = {}
    for folder in (Path(part) for run in runs.stages for part in run.config.pairs.split(",")):
        if (folder / "store.json").is_file():
            found[folder.resolve()] = PairReader(folder).spec
        else:
            missing[folder.name] = None
    return list(found.values()), list(missing)


def pairs_lines(runs: History) -> list[str]:
    """One line for each store of pairs."""
    if not runs.stages:
        return [f"- Pairs and recipe: {runs.gap}."]
    specs, missing = pairs(runs)
    lines = [_store(spec) for spec in specs]
    return [
        *lines,
        *(f"- Pairs `{name}`: their folder was not at hand when this was written." for name in missing),
    ]


def _store(spec: StoreSpec) -> str:
    kinds = {"text": "prompts", "label": "classes"}
    what = f" of {spec.num_prompts:,} {kinds[spec.conditioning]}" if spec.conditioning in kinds else ""
    return (
        f"- Pairs: {spec.num_pairs:,}{what}, {spec.solver} with {spec.steps} steps, guidance "
        f"{spec.guidance:g}, latents {'x'.join(map(str, spec.latent_shape))}, spec `{spec.sha256[:16]}`."
    )


def recipe_lines(runs: History) -> list[str]:
    """What each stage learnt, by which losses."""
    lines = [line for run in runs.stages for line in _recipe(run)]
    if runs.stages and runs.gap:
        lines.append(f"- Before that: {runs.gap}.")
    return lines


def _recipe(run: Stage) -> list[str]:
    c, train, adapters = run.config, run.config.train, run.config.student
    text = f"- {run.name}: {train.images:,} images in batches of {train.batch_size}, {c.optim.name}, "
    text += f"learning rate {c.optim.lr:g}, {train.precision}, EMA {train.ema_beta}, seed {c.seed}; "
    if adapters.lora_rank:
        text += f"LoRA of rank {adapters.lora_rank}, alpha {adapters.alpha:g}"
    else:
        text += "all weights trained"
    text += ", told the guidance scale" if adapters.guidance_conditioning else ""
    text += f", dropout {adapters.dropout:g}" if adapters.dropout else ""
    lines = [f"{text}.", f"  - Regression: {_regression(c.regression)}."]
    return lines if c.stage == "ode" else [*lines, f"  - Discriminator: {_gan(c.gan)}."]


def _regression(c: RegressionConfig) -> str:
    detail = {
        "e_latent_lpips": f", transforms `{c.augment}`" + (f", {c.draws} draws" if c.draws > 1 else ""),
        "pseudo_huber": f", c {c.huber_c:g}",
        "lpips": f" of {c.lpips_net}" + (f" at {c.lpips_resize} pixels" if c.lpips_resize else ""),
    }
    text = f"`{c.kind}`{detail.get(c.kind, '')}, weight {c.weight:g}"
    text += (
        f"; LatentLPIPS without transforms, weight {c.latent_lpips_weight:g}" if c.latent_lpips_weight else ""
    )
    return text + (f"; L1, weight {c.l1_weight:g}" if c.l1_weight else "")


def _gan(c: DiscriminatorConfig) -> str:
    text = f"loss `{c.loss}`, weight {c.weight:g}, {c.optim.name}, learning rate {c.optim.lr:g}"
    text += f", {c.d_steps_per_g_step} updates for one of the student" if c.d_steps_per_g_step > 1 else ""
    text += f"; {_penalty(c)}; mix-and-match {c.mix_fraction:g}"
    text += f"; noise before it: {c.noise_augment}" if c.noise_augment != "none" else ""
    return text + (f"; photographs, {c.real_fraction:g} of its real rows" if c.real_fraction else "")


def _penalty(c: DiscriminatorConfig) -> str:
    if c.active_penalty == "none":
        return "no gradient penalty"
    if c.active_penalty == "approx":
        return f"approximated R1, weight {c.approx_weight:g}, sigma {c.approx_sigma:g}, every step"
    rows = "one row" if c.r1_rows == 1 else f"{c.r1_rows} rows"
    what = {"single": f"R1 of {rows}", "full": "R1 of all rows", "r1r2": "R1 and R2 of all rows"}[
        c.active_penalty
    ]
    often = f"every {c.penalty_interval} steps" if c.penalty_interval > 1 else "every step"
    return f"{what}, gamma {c.r1_gamma:g}, {often}"


def cost_lines(runs: History) -> tuple[list[str], float | None]:
    """Evaluations, and the device hours of all stages, None where some are not recorded."""
    if not runs.stages:
        return [f"- Evaluations and device hours: {runs.gap}."], None
    specs, missing = pairs(runs)
    lines = []
    if specs:
        of_pairs = sum(
            s.num_pairs * pair_evaluations(s.solver, s.steps) * (1 if s.guidance == 1 else 2) for s in specs
        )
        rest = f", without those of {', '.join(f'`{name}`' for name in missing)}" if missing else ""
        lines.append(f"- Pairs: {of_pairs:.3g} evaluations of the teacher{rest}.")
    for run in runs.stages:
        networks = "student" if run.config.stage == "ode" else "student and discriminator"
        lines.append(f"- {run.name}: {evaluations(run.config):.3g} evaluations of {networks}.")
    if runs.gap:
        lines.append(f"- Before that: {runs.gap}, not counted.")
    hours = [run.device_hours for run in runs.stages if run.device_hours is not None]
    return lines, sum(hours) if len(hours) == len(runs.stages) else None
