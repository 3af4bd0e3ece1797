"""Files of the model hub, and errors of the connection to it as one line that says what to do."""

import errno
from collections.abc import Sequence
from pathlib import Path

from d2g.core.errors import UserError, first_line

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
"""Errors of the cache's disk, which are no errors of the hub."""


def connection_errors() -> tuple[type[Exception], ...]:
    """Return the exceptions that huggingface_hub raises if the hub refuses or cannot be reached.

    Its versions send requests with different libraries, whose errors have a base class in common with
    HfHubHTTPError. Broken and offline connections are OSErrors, ids that cannot exist ValueErrors, and errors
    of the package hf_xet RuntimeErrors.
    """
    from huggingface_hub.errors import HfHubHTTPError

    return (*HfHubHTTPError.__bases__, OSError, ValueError, RuntimeError)


def fetch(name: str, patterns: Sequence[str], what: str) -> Path:
    """The local copy of a hub id's files that match `patterns`, downloaded if it is not in the cache.

    Raises UserError, which starts with `what`, such as "teacher org/name".
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except connection_errors() as error:
        if isinstance(error, OSError) and error.errno in _DISK:
            raise
        raise UserError(
            f"{what}: no such folder here, and as a hub id it cannot be fetched: {explain(error, name)}"
        ) from error


def explain(error: Exception, name: str) -> str:
    """Why a request about a hub id failed, and what to do."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
    )

    if isinstance(error, HFValidationError):
        return f"{name} is no hub id; give a folder or a hub id org/name"
    if isinstance(error, GatedRepoError):
        return "its authors ask for consent; accept the terms on its page and log in with `hf auth login`"
    if isinstance(error, RepositoryNotFoundError):
        return "the hub has no such model, or it is private; check the name, or log in with `hf auth login`"
    copy = f"run `hf download {name} --local-dir FOLDER` where there is a network and give FOLDER"
    if constants.HF_HUB_OFFLINE:
        return f"HF_HUB_OFFLINE is set, and the cache {constants.HF_HUB_CACHE} lacks it; unset it, or {copy}"
    source = error.__cause__ if isinstance(error.__cause__, Exception) else error
    reason = first_line(source)[:200]
    if isinstance(source, HfHubHTTPError) and source.response is not None:
        return f"the hub answers with an error ({reason}); run the same command again later, or {copy}"
    return f"the hub cannot be reached ({reason}); check the network, or {copy}"


def has_file(name: str, file: str) -> bool | None:
    """Whether a hub id has a file, here in the cache or on the hub; None where the hub cannot be reached."""
    from huggingface_hub import file_exists, try_to_load_from_cache
    from huggingface_hub.errors import GatedRepoError

    if isinstance(try_to_load_from_cache(name, file), str):
        return True
    try:
        return bool(file_exists(name, file))
    except GatedRepoError:
        return True
    except connection_errors():
        return None
