"""Publish a student on the Hugging Face hub: the folder to upload, and its upload."""

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from d2g.core.errors import SettingError, UserError, first_line
from d2g.core.hub import connection_errors
from d2g.core.staged_folder import staged
from distill.config.export import ExportConfig
from distill.export.output import check_out, is_export


def check_repository(name: str) -> None:
    """Raise SettingError unless `name` is a repository of the hub, `owner/name`."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
        valid = name.count("/") == 1
    except HFValidationError:
        valid = False
    if not valid:
        raise SettingError(
            f"repository {name!r} is no name of the hub; expected OWNER/NAME, as in me/one-step"
        )


def write_upload(source: str, out: Path, config: ExportConfig) -> list[dict[str, Any]]:
    """Write to `out` what is uploaded: a copy of an export with a model card, or an export of a run.

    Returns the files with their sizes in bytes. Raises UserError for a source that is neither, for links out
    of the export, and if `out` holds files of something else, which would be published too.
    """
    folder, before = Path(source), _files(out)
    if is_export(folder):
        _refuse_links(folder)
        check_out(out, source, source, _names(folder))
        with staged(out, "exports to") as copy:
            shutil.copytree(folder, copy, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".*"))
    else:
        import torch

        from distill.export.export import export

        export(replace(config, student=source), out, "cuda" if torch.cuda.is_available() else "cpu")
    # New files have new inodes: those that they replace existed while they were written.
    files = _files(out)
    if others := [
        name for name, stat in files.items() if name in before and before[name].st_ino == stat.st_ino
    ]:
        raise UserError(
            f"--out {out} holds other files, first {others[0]}, which would be published too; nothing was "
            "uploaded; choose another --out"
        )
    return [{"path": name, "bytes": stat.st_size} for name, stat in files.items()]


def _names(folder: Path) -> list[str]:
    """The entries of a folder that are published: hidden ones are not."""
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def _refuse_links(folder: Path) -> None:
    """Raise UserError for a link to a folder, which could lead back, and for one out of the export: what it
    leads to would be copied, and published.
    """
    root = os.path.realpath(folder)
    for path in sorted(folder.rglob("*")):
        target = Path(os.path.realpath(path))
        if path.is_symlink() and (path.is_dir() or not target.is_relative_to(root)):
            raise UserError(
                f"{path} is a link to {target}, {'a folder' if path.is_dir() else 'outside of the export'}; "
                "nothing was uploaded; put the files themselves there, or remove the link"
            )


def _files(folder: Path) -> dict[str, os.stat_result]:
    """The files below a folder by relative name, in order."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat() for path in paths}


def upload(folder: Path, repository: str, private: bool = False) -> str:
    """Upload a folder as one commit to a model repository, which is created if needed. Returns its URL.

    Raises UserError if the hub refuses or cannot be reached.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository, folder_path=folder, commit_message="Upload a student of diffusion2gan"
        )
    except connection_errors() as error:
        raise UserError(
            f"cannot upload to {repository}: {first_line(error)}; {folder} holds the files; log in with "
            "`hf auth login` if the hub asks for it, and run the same command again"
        ) from error
    return str(commit.commit_url)
