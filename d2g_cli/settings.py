"""`d2g settings`: every setting of a group of commands, with type, default, meaning and source."""

import textwrap
from typing import Annotated, Any

import typer

from d2g.core.config import Presets, pick
from d2g.core.setting_docs import SettingDoc, describe_settings, settings_json, settings_markdown
from d2g_cli.common import Json, emit, one_process

Sections = dict[str, tuple[Any, Presets[Any]]]
"""By command: its config with the default values, and its presets."""


@one_process
def settings(
    group: Annotated[str, typer.Argument(help="distill, pairs, eval, lpips, teacher or export.")],
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the page of docs/settings.")] = False,
    as_json: Json = False,
) -> None:
    """List every setting of a group: type, default, meaning, and where the default comes from."""
    if markdown:
        print(settings_page(group), end="")
        return
    configs = {name: config for name, (config, _) in sections_of(group).items()}
    if as_json:
        emit(settings_json(configs), True, "settings")
        return
    # The published recipe first, then the rest.
    for section, config in configs.items():
        print(f"\n{section}")
        docs = describe_settings(config)
        for title, recipe in (("recipe", True), ("advanced", False)):
            if part := [doc for doc in docs if doc.recipe == recipe]:
                print(f"\n  {title}", *map(_readable, part), sep="\n")


def _readable(doc: SettingDoc) -> str:
    """A setting as two lines: name, default and type; meaning and source."""
    source = f" [{doc.source}]" if doc.source else ""
    text = textwrap.fill(doc.meaning + source, width=100, initial_indent=" " * 8, subsequent_indent=" " * 8)
    return f"    {doc.name} = {doc.default} ({doc.type})\n{text}"


def settings_page(group: str) -> str:
    """The text of docs/settings/GROUP.md."""
    sections = sections_of(group)
    configs = {name: config for name, (config, _) in sections.items()}
    return settings_markdown(group, configs, {name: presets.about for name, (_, presets) in sections.items()})


def sections_of(group: str) -> Sections:
    """The commands of a group with their configs. Raises SettingError naming the nearest group."""
    return pick(GROUPS, group, "group of settings")()


def _distill() -> Sections:
    from distill.config.presets import DISTILL_PRESETS
    from distill.config.run import SAMPLE_PRESETS, DistillConfig, SampleConfig

    return {
        "d2g distill": (DistillConfig(), DISTILL_PRESETS),
        "d2g sample": (SampleConfig(), SAMPLE_PRESETS),
    }


def _pairs() -> Sections:
    from pairgen.config import PAIR_PRESETS, PairConfig

    return {"d2g pairs generate": (PairConfig(), PAIR_PRESETS)}


def _eval() -> Sections:
    from d2g_cli.eval_options import load_presets
    from eval.protocols.config import EvalRun

    return {"d2g eval run": (EvalRun(), load_presets())}


def _lpips() -> Sections:
    from latent_lpips.training import config

    return {
        "d2g lpips train": (config.ClassifyConfig(), config.TRAIN_PRESETS),
        "d2g lpips calibrate": (config.HeadsConfig(), config.HEADS_PRESETS),
        "d2g lpips score": (config.ScoreConfig(), config.SCORE_PRESETS),
        "d2g lpips overfit": (config.OverfitConfig(), config.OVERFIT_PRESETS),
        "d2g lpips triplets": (config.TripletsConfig(), config.TRIPLETS_PRESETS),
    }


def _teacher() -> Sections:
    from teacher_training.cascade.config import CASCADE_PRESETS, CascadeConfig
    from teacher_training.config import TEACHER_PRESETS, TeacherConfig

    return {
        "d2g teacher train": (TeacherConfig(), TEACHER_PRESETS),
        "d2g teacher cascade": (CascadeConfig(), CASCADE_PRESETS),
    }


def _export() -> Sections:
    from distill.config.export import EXPORT_PRESETS, ExportConfig

    return {"d2g export": (ExportConfig(), EXPORT_PRESETS)}


GROUPS = {
    "distill": _distill,
    "pairs": _pairs,
    "eval": _eval,
    "lpips": _lpips,
    "teacher": _teacher,
    "export": _export,
}
"""Groups of settings, and what loads them."""
