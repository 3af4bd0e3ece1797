"""Objects below one URL of an object store (S3, Google Cloud Storage, Azure), with conditional writes.

A conditional write creates an object only if there is none, or replaces it only if it is still the version
that the writer knows: what claims of several machines need. Requests that fail for reasons of the network are
repeated. Errors that a user can mend are one line.

Credentials, endpoint and region come from the environment variables and metadata servers that obstore reads
(`AWS_*`, `GOOGLE_*`, `AZURE_*`), for S3 also from the files of AWS (`~/.aws`), if botocore is installed.
"""

import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from d2g.core.errors import UserError

T = TypeVar("T")

SCHEMES = {"s3": "s3", "gs": "gcs", "az": "azure"}
"""Scheme of a URL -> the extra of this project that installs what it needs."""

RETRY_SECONDS = (0.2, 1.0, 5.0, 15.0)
"""Pauses before each new attempt of a request, after the quick ones of obstore itself."""

QUICK_RETRIES = {"max_retries": 3, "retry_timeout": timedelta(seconds=60)}
CLIENT = {
    "connect_timeout": "10s",
    "timeout": "180s",
}  # of one request: a part of an upload, or a small object
PART_BYTES = 16 << 20
PARTS_AT_ONCE = 4
CREDENTIAL_SECONDS = 600  # after which the files of AWS are asked again

Version = dict[str, str]
"""Identifies the content of an object, for `ObjectStore.replace`."""


@dataclass(frozen=True, slots=True)
class ListedObject:
    """An object in a listing. `e_tag` changes with the content, and is as of `bare_tag`."""

    size: int
    e_tag: str


class MissingObject(UserError):
    """There is no object of this name."""


class ObjectStore:
    """The objects below `url`, such as `s3://bucket/prefix`, by their names below it.

    Every method raises UserError, in one line, if the bucket does not exist, if access is denied, and if the
    network fails for longer than RETRY_SECONDS.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._store = _open(self.url)

    def read(self, name: str) -> tuple[bytes, Version] | None:
        """The content and version of an object; None if it does not exist."""
        import obstore

        def get() -> tuple[bytes, Version]:
            result = obstore.get(self._store, name)
            return bytes(result.bytes()), _version(result.meta)

        try:
            return self._try(name, get)
        except MissingObject:
            return None

    def write(self, name: str, content: bytes | Path) -> None:
        """Write an object, whether it exists or not. A file is uploaded in parts and appears as a whole.

        The size of what was stored is checked.
        """
        import obstore

        length = content.stat().st_size if isinstance(content, Path) else len(content)

        def put() -> None:
            parts = {"chunk_size": PART_BYTES, "max_concurrency": PARTS_AT_ONCE}
            obstore.put(self._store, name, content, **parts)
            try:
                stored = obstore.head(self._store, name)["size"]
            except FileNotFoundError:
                stored = 0
            if stored != length:
                raise ConnectionError(f"{stored} of {length} bytes arrived")

        self._try(name, put, write=True)

    def create(self, name: str, content: bytes) -> Version | None:
        """Write an object unless one exists. Returns its version; None if another writer was quicker.

        An object of the same content counts as written by this call, whose answer can have been lost.
        """
        return self._conditional(name, content, "create")

    def replace(self, name: str, content: bytes, version: Version) -> Version | None:
        """Write an object if it is still of this version. Returns the new version; None if it has changed.

        An object of the same content counts as written by this call, as in `create`.
        """
        return self._conditional(name, content, version)

    def _conditional(self, name: str, content: bytes, mode: Any) -> Version | None:
        import obstore
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        def put() -> Version | None:
            try:
                return _version(obstore.put(self._store, name, content, mode=mode))
            except (AlreadyExistsError, PreconditionError):
                return None  # the condition does not hold

        if (version := self._try(name, put, write=True)) is not None:
            return version
        now = self.read(name)
        return now[1] if now is not None and now[0] == content else None

    def remove(self, name: str) -> None:
        """Delete an object, if it exists."""
        import obstore

        try:
            self._try(name, lambda: obstore.delete(self._store, name))
        except MissingObject:
            return

    def size(self, name: str) -> int | None:
        """Bytes of an object; None if it does not exist."""
        import obstore

        try:
            return int(self._try(name, lambda: obstore.head(self._store, name)["size"]))
        except MissingObject:
            return None

    def list(self, folder: str) -> dict[str, ListedObject]:
        """The objects directly in a folder, by their names in it; empty if there are none."""
        import obstore

        def listed() -> dict[str, ListedObject]:
            objects = obstore.list_with_delimiter(self._store, folder)["objects"]
            return {
                entry["path"].rpartition("/")[2]: ListedObject(entry["size"], bare_tag(entry))
                for entry in objects
            }

        return self._try(folder, listed)

    def download(self, name: str, path: Path) -> None:
        """Copy an object to a file, completely or not at all. Raises MissingObject, OSError of the disk."""
        import obstore

        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")

        def get() -> None:
            with temporary.open("wb") as file:
                for chunk in obstore.get(self._store, name).stream():
                    file.write(chunk)

        try:
            self._try(name, get)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    def rename(self, name: str, new: str) -> None:
        """Copy an object to a new name, then delete it. Raises MissingObject."""
        import obstore

        self._try(name, lambda: obstore.copy(self._store, name, new), write=True)
        self.remove(name)

    def _try(self, name: str, request: Callable[[], T], write: bool = False) -> T:
        """The result of a request, repeated while the network fails. Raises UserError."""
        where = f"{self.url}/{name}"
        for wait in (*RETRY_SECONDS, None):
            try:
                return request()
            except Exception as error:
                if not _is_of_store(error):
                    raise
                if (final := _final_error(where, self.url, error)) is not None:
                    raise final from error
                if wait is None:
                    safe = "; what was finished before is safe" if write else ""
                    raise UserError(
                        f"{where}: {_reason(error)}, tried {len(RETRY_SECONDS) + 1} times; check the network "
                        f"and the endpoint, then run the same command again{safe}"
                    ) from error
                time.sleep(wait)
        raise AssertionError("unreachable")


def _is_of_store(error: Exception) -> bool:
    """Whether an error comes from the store or the network, not from this program or its disk."""
    from obstore.exceptions import BaseError

    return isinstance(error, BaseError) or (isinstance(error, OSError) and error.errno is None)


def _final_error(where: str, url: str, error: Exception) -> UserError | None:
    """The error for a failure that does not pass by itself; None for one that may.

    obstore has one type for most failures, whose text holds the status and the answer of the store.
    """
    text, reason = str(error), _reason(error)
    status = int(found[1]) if (found := re.search(r"status code: (\d{3})", text)) else 0
    if re.search("NoSuchBucket|ContainerNotFound|bucket does not exist", text):
        bucket = urlsplit(url).netloc
        return UserError(f"{url}: the bucket {bucket} does not exist ({reason}); create it, or check the URL")
    if isinstance(error, FileNotFoundError) or status == 404:
        return MissingObject(f"{where} does not exist; check the URL")
    if status in (401, 403) or type(error).__name__ in ("PermissionDeniedError", "UnauthenticatedError"):
        return UserError(
            f"{where}: access denied ({reason}); check the credentials, and that they may read, write, list "
            "and delete there"
        )
    if status == 501 or type(error).__name__ == "NotSupportedError":
        return UserError(
            f"{where}: this store has no conditional writes ({reason}), with which jobs share the work; "
            "choose another store, or a folder"
        )
    if status in (301, 400, 405, 411, 413) and "RequestTimeout" not in text:
        return UserError(f"{where}: {reason}; check the URL, the region and the credentials")
    return None


def _reason(error: Exception) -> str:
    """Summarize an error of the store: code and message of its answer, or the end of the first line."""
    text = str(error)
    code, message = (re.search(f"<{tag}>([^<]*)<", text) for tag in ("Code", "Message"))
    if code:
        return f"{code[1]}: {' '.join(message[1].split())}" if message else code[1]
    line = (text.strip().splitlines() or [type(error).__name__])[0]
    return line.rpartition(" - ")[2].strip().rstrip(":") or type(error).__name__


def _version(facts: Any) -> Version:
    return {key: facts[key] for key in ("e_tag", "version") if facts.get(key)}


def bare_tag(facts: Any) -> str:
    """The e-tag of a version without its quotation marks, which Azure leaves out in listings."""
    return str(facts.get("e_tag") or "").strip('"')


def _open(url: str) -> Any:
    """obstore's store of a URL."""
    parts = urlsplit(url)
    if parts.scheme not in SCHEMES:
        known = ", ".join(f"{scheme}://" for scheme in SCHEMES)
        raise UserError(
            f"{url}: pairs cannot be written there; give a folder, or a URL of {known} or file://"
        )
    if not parts.netloc:
        raise UserError(f"{url} names no bucket; give a URL such as {parts.scheme}://bucket/pairs")
    try:
        from obstore.store import from_url
    except ImportError as error:
        raise UserError(
            f"{url} needs another package; `pip install 'diffusion2gan[{SCHEMES[parts.scheme]}]'`"
        ) from error
    settings = _aws_settings(url) if parts.scheme == "s3" else {}
    # A server on this machine or in this network has no certificate, and says so in its address.
    endpoint = next((os.environ[name] for name in _ENDPOINTS[parts.scheme] if os.environ.get(name)), "")
    client = CLIENT | {"allow_http": endpoint.startswith("http://")}
    try:
        return from_url(url, client_options=client, retry_config=QUICK_RETRIES, **settings)
    except Exception as error:
        if not _is_of_store(error):
            raise
        raise UserError(
            f"{url}: {_reason(error)}; set the credentials of this store in the environment"
        ) from error


_ENDPOINTS = {
    "s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"),
    "gs": ("GOOGLE_BASE_URL",),
    "az": ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"),
}


def _aws_settings(url: str) -> dict[str, Any]:
    """Region and credentials as the tools of AWS find them: environment, files, role of the machine.

    Empty without botocore: obstore looks for them itself then, in the environment and at the machine's role.
    """
    try:
        import botocore.exceptions
        import botocore.session
    except ImportError:
        return {}
    session = botocore.session.get_session()
    try:
        credentials, region = session.get_credentials(), session.get_config_variable("region")
    except botocore.exceptions.BotoCoreError as error:
        raise UserError(f"{url}: {error}; check AWS_PROFILE and the files of ~/.aws") from error
    if credentials is None:
        raise UserError(
            f"{url}: no credentials found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or run "
            "`aws configure`"
        )

    def provide() -> dict[str, Any]:
        frozen = credentials.get_frozen_credentials()
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": datetime.now(UTC) + timedelta(seconds=CREDENTIAL_SECONDS),
        }

    region = os.environ.get("AWS_REGION") or region
    return {"credential_provider": provide} | ({"region": region} if region else {})
