"""Hub ids that cannot be fetched: without a network, offline, refused by the hub, with broken proxies."""

import errno
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.hf_api import api

from d2g.core import hub
from d2g.core.errors import UserError
from d2g.diffusion.autoencoders import open_autoencoder
from d2g.diffusion.diffusers_pipeline import load_any_pipeline
from d2g.diffusion.pipelines import resolve
from d2g.vision.transformers_vision import load_dinov2_model

COPY = "run `hf download org/name --local-dir FOLDER` where there is a network and give FOLDER"
OPENERS: dict[str, Callable[[str], Any]] = {
    "teacher": resolve,
    "autoencoder": open_autoencoder,
    "pipeline": lambda name: load_any_pipeline(name, "cpu", None, 1, None),  # type: ignore[arg-type]
    "": load_dinov2_model,
}
"""Readers of hub ids by the first word of their errors."""


class Answers(ThreadingHTTPServer):
    """A hub that answers every question with one status and error code."""

    daemon_threads = True
    status, code = 404, ""


class Handler(BaseHTTPRequestHandler):
    server: Answers

    def do_GET(self) -> None:
        self.send_response(self.server.status)
        self.send_header("X-Error-Code", self.server.code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *words: Any) -> None:
        pass


def set_address(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    """Where questions go: huggingface_hub reads the environment when it is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(api, "endpoint", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def online(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Answers]:
    """A hub on this machine, with an empty cache."""
    server = Answers(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    set_address(monkeypatch, f"http://127.0.0.1:{server.server_port}")
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def message_of(name: str = "org/name") -> set[str]:
    """What all readers say about a hub id, without their first word."""
    messages = set()
    for kind, opener in OPENERS.items():
        with pytest.raises(UserError) as caught:
            opener(name)
        what = f"{kind} {name}".strip()
        assert str(caught.value).startswith(f"{what}: no such folder here, and as a hub id it cannot be"), (
            kind
        )
        assert "\n" not in str(caught.value)
        messages.add(str(caught.value).removeprefix(what))
    return messages


def test_offline_says_which_cache_lacks_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    (message,) = message_of()
    assert message.endswith(f"HF_HUB_OFFLINE is set, and the cache {tmp_path} lacks it; unset it, or {COPY}")
    assert hub.has_file("org/name", "config.json") is None


def test_without_a_network_the_remedy_is_no_other_name(
    online: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_address(monkeypatch, "http://127.0.0.1:9")
    (message,) = message_of()
    assert "the hub cannot be reached (" in message and message.endswith(f"check the network, or {COPY}")
    assert hub.has_file("org/name", "config.json") is None


def test_the_answers_of_the_hub_have_remedies(online: Answers) -> None:
    for status, code, remedy in (
        (401, "RepoNotFound", "or it is private; check the name, or log in with `hf auth login`"),
        (404, "RepoNotFound", "the hub has no such model"),
        (403, "GatedRepo", "accept the terms on its page and log in"),
        (400, "", "the hub answers with an error ("),
    ):
        online.status, online.code = status, code
        (message,) = message_of()
        assert remedy in message, (status, message)
    online.status, online.code = 404, "RepoNotFound"
    assert hub.has_file("org/name", "config.json") is False
    (message,) = message_of("a" * 200 + "/b") - message_of("org/name")
    assert "is no hub id; give a folder or a hub id org/name" in message


def test_errors_of_the_connection_are_reported_and_those_of_the_disk_stay(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Errors of the client's library have no class in common with OSError: a broken proxy, a cut download."""
    library = huggingface_hub.errors.HfHubHTTPError.__bases__[0]
    for error in (library("proxy\nrefused"), TimeoutError("slow"), RuntimeError("hf_xet"), OSError("cut")):

        def fail(*_: Any, error: Exception = error, **__: Any) -> None:
            raise error

        monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
        with pytest.raises(UserError, match=r"teacher org/name: no such folder here, .*HF_HUB_OFFLINE is"):
            hub.fetch("org/name", ["config.json"], "teacher org/name")
        monkeypatch.setattr(huggingface_hub, "file_exists", fail)
        assert hub.has_file("org/name", "config.json") is None
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: fail(error=full))
    with pytest.raises(OSError, match="No space left"):
        hub.fetch("org/name", ["config.json"], "teacher org/name")
