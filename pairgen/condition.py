"""The pair store of the stage before: its latents condition the rows of a later stage of a cascade."""

from pathlib import Path

from d2g.core.errors import SettingError, UserError
from d2g.diffusion.families.registry import FAMILIES
from d2g.diffusion.teacher import Teacher
from pairgen.config import PairConfig
from pairgen.prompts import PromptList
from pairgen.store.reader import PairReader
from pairgen.store.spec import prompts_path


def open_condition(config: PairConfig, teacher: Teacher) -> PairReader | None:
    """The store whose row i conditions row i of the job; None for a teacher without a stage before.

    Raises SettingError for settings that do not go with it, UserError for a store that is missing, unfinished
    or of another teacher.
    """
    # Only later stages of a cascade have a condition.
    folder, family = config.condition, teacher.family
    if family.prior_family is None:
        if folder:
            raise SettingError(
                f"condition is {folder!r}, but teacher {config.teacher}, a {teacher.pipeline}, reads no "
                "latents of another stage; leave it out"
            )
        return None
    prior = FAMILIES[family.prior_family]
    made_by = f"a {' or '.join(prior.pipelines)}"
    if not folder:
        raise SettingError(
            f"condition is not set, but teacher {config.teacher} is {family.title}, which reads the latents "
            f"of {prior.title}; give --condition a pair store made by {made_by}"
        )
    # The store must be of the stage before, and complete: row i needs its row i.
    try:
        reader = PairReader(folder)
    except UserError as error:
        raise UserError(
            f"{error}; or give --condition the folder that holds pairs of {prior.title}"
        ) from error
    kind, channels = reader.spec.teacher_facts.get("pipeline"), family.prior_channels(teacher.config)
    if kind not in prior.pipelines or reader.spec.latent_shape[0] != channels:
        raise UserError(
            f"{folder} holds {reader.spec.latent_shape[0]}-channel latents of a {kind}, but teacher "
            f"{config.teacher} reads {channels}-channel latents of {prior.title}; give --condition a pair "
            f"store made by {made_by} of the same model"
        )
    if len(reader) != reader.spec.num_pairs:
        raise UserError(
            f"{folder} holds {len(reader)} of {reader.spec.num_pairs} pairs; run the `d2g pairs generate` "
            "that makes it again to finish it"
        )
    _check_settings(config, reader)
    return reader


def _check_settings(config: PairConfig, reader: PairReader) -> None:
    spec = reader.spec
    if config.prompts:
        raise SettingError(
            f"prompts is {config.prompts!r}, but the rows have the prompts of {config.condition}; leave it "
            "out"
        )
    if config.per_prompt not in (1, spec.per_prompt):
        raise SettingError(
            f"per_prompt is {config.per_prompt}, but {config.condition} has {spec.per_prompt}; leave it out"
        )
    if config.num_pairs > spec.num_pairs:
        raise SettingError(
            f"num_pairs is {config.num_pairs}, but {config.condition} has {spec.num_pairs}; expected at most "
            "as many"
        )
    if config.seed == spec.seed:
        raise SettingError(
            f"seed is {config.seed}, as of {config.condition}: the noise of both stages would begin with the "
            f"same numbers; set another, such as seed={config.seed + 1}"
        )


def condition_prompts(config: PairConfig) -> PromptList:
    """The prompt list of the store that conditions the rows. Raises UserError if the store has none."""
    path = prompts_path(Path(config.condition))
    if not path.exists():
        raise UserError(
            f"{config.condition} has no prompts.jsonl, which the rows take their prompts from; copy the "
            "store with all its files"
        )
    return PromptList.open(path)
