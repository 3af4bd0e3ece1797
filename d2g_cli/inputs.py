"""Checks of options: values that the shell has lost; and of `--dry-run`, inputs that do not exist."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from d2g.core.config import pick
from d2g.core.errors import SettingError, UserError
from d2g.core.logs import logger

Check = Callable[[str, str], None]
"""(option, value): raises UserError for an input that does not exist."""


OUTPUTS = ("--out", "--keep", "--work")
"""Options that name what is written."""


def check_shell_values(argv: Sequence[str]) -> None:
    """Raise SettingError for an empty value where it would have an effect, and an output that begins with ~.

    An unset variable of the shell gives an empty value. bash does not replace the ~ of `--out=~/images`.
    """
    for word, following in zip(argv, [*argv[1:], "."], strict=True):
        option, equals, value = word.partition("=")
        value = value if equals else following
        if option in (*OUTPUTS, "--student", "--host") and not value.strip():
            raise SettingError(f"{option} is empty; give a value, or leave it out (is a variable unset?)")
        if option in OUTPUTS and value.startswith("~"):
            raise SettingError(
                f"{option} is {value}: the shell has left the ~ as it is; write $HOME, or ./~ for that name"
            )


def check_inputs(inputs: Mapping[str, Any]) -> None:
    """Check inputs by option name, such as {"--teacher": "miniature"}; empty values and None are left out.

    A value may be a list of values. Raises UserError for the first input that does not exist.
    """
    for option, value in inputs.items():
        values = value if isinstance(value, list | tuple) else [value]
        for one in values:
            if one not in (None, ""):
                CHECKS.get(option, _path)(option, str(one))


def _path(option: str, value: str) -> None:
    """A file or folder on this disk, or a URL, which is not opened."""
    if "://" in value:
        logger.info("%s %s is not checked: it is a URL", option, value)
    elif not Path(value).exists():
        raise UserError(f"{option} {value}: no such file or folder; check the name")


def _prompts(option: str, value: str) -> None:
    if value != "-":
        _path(option, value)


def _pairs(option: str, value: str) -> None:
    """Pair stores, separated by commas."""
    from pairgen.store.spec import read_spec

    for store in value.split(","):
        if "://" in store:
            _path(option, store)
        else:
            read_spec(Path(store))


def _pipeline(option: str, value: str) -> None:
    """A teacher, or another pipeline: a finished folder, a shipped name or a hub id."""
    from d2g.diffusion.pipelines import is_local, resolve

    if is_local(value):
        resolve(value)
    else:
        _hub_id(option, value, "model_index.json")


def _hub_id(option: str, value: str, *files: str) -> None:
    """A hub id, by a question to the hub. Without a connection the log says that it is not checked."""
    from d2g.core.hub import has_file

    # A name below a folder of this disk is a path.
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", value) or Path(value).parent.is_dir():
        raise UserError(
            f"{option} {value}: no such folder; give a folder in diffusers layout or a hub id org/name"
        )
    answers = [has_file(value, file) for file in files]
    if not any(answers) and None not in answers:
        raise UserError(
            f"{option} {value}: no such folder here, and no such model on the hub; check the name"
        )
    if not any(answers):
        logger.info("%s %s is not checked: the hub cannot be reached", option, value)


def _autoencoder(option: str, value: str) -> None:
    from d2g.diffusion.pipelines import SHIPPED

    if value not in SHIPPED and not Path(value).exists():
        _hub_id(option, value, "model_index.json", "config.json")


def _student(option: str, value: str) -> None:
    """A run with a checkpoint, an exported student, or a shipped name."""
    from distill.student_files import student_folder

    student_folder(value)


def _prior(option: str, value: str) -> None:
    """A student, or the teacher of a cascade's first stage."""
    if (Path(value) / "model_index.json").is_file():
        _pipeline(option, value)
    else:
        _student(option, value)


def _init(option: str, value: str) -> None:
    if value != "teacher":
        _student(option, value)


def _named_path(option: str, value: str) -> None:
    """NAME=PATH, or a path."""
    if not Path(value.rpartition("=")[2]).exists():
        _path(option, value)


def _against(option: str, value: str) -> None:
    """A teacher, or a folder of images."""
    if not Path(value).is_dir() or (Path(value) / "model_index.json").is_file():
        _pipeline(option, value)


def _clip(option: str, value: str) -> None:
    """A folder, or the name of a CLIP, which is not checked."""
    if "/" in value and ":" not in value:
        _path(option, value)


def _features(option: str, value: str) -> None:
    """A feature network: a file, a function of a module that is found but not run, or a name."""
    from eval.networks.registry import FEATURES
    from eval.networks.user_network import find_user_network, is_user_network
    from eval.protocols.data_sources import DATA_SOURCES

    if is_user_network(value):
        find_user_network(value)
    else:
        names = [*FEATURES, *(name for source in DATA_SOURCES.values() for name in source.features)]
        pick(dict.fromkeys(names), value, option)


def _data(option: str, value: str) -> None:
    if value != "scenes":
        _path(option, value)


CHECKS: Mapping[str, Check] = {
    "--prompts": _prompts,
    "--pairs": _pairs,
    "--condition": _pairs,
    "--teacher": _pipeline,
    "--pipeline": _pipeline,
    "--latents": _autoencoder,
    "--decoder": _autoencoder,
    "--student": _student,
    "--prior": _prior,
    "--init": _init,
    "--features": _features,
    "--weights": _named_path,
    "--against": _against,
    "--clip": _clip,
    "--data": _data,
}
"""How options are checked; the others are files or folders."""


def config_inputs(config: Any, names: Iterable[str]) -> dict[str, Any]:
    """The inputs of a config by their option, from names of its settings."""
    return {f"--{name.replace('_', '-')}": getattr(config, name) for name in names}
