"""distill.export.push: the folder to upload, and its upload to a server that answers as the hub does."""

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from exported import save_run


class Hub(BaseHTTPRequestHandler):
    """The calls of the hub's API that an upload of small files makes. Commits end up in `files`."""

    server: Any

    def answer(self, content: Any, status: int = 200) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.calls.append((self.path, self.headers.get("Authorization")))
        if self.headers.get("Authorization") != "Bearer secret":
            return self.answer({"error": "Invalid credentials"}, 401)
        repository = f"/api/models/{self.server.repository}"
        if self.path == "/api/repos/create":
            self.server.created = json.loads(body)
            return self.answer({"url": f"{self.server.url}/{self.server.repository}", "id": "1"})
        if self.path == "/api/validate-yaml":
            return self.answer({"warnings": [], "errors": []})
        if self.path == f"{repository}/preupload/main":
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
            return self.answer({"files": modes})
        if self.path.startswith(f"{repository}/commit/main"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    value = line["value"]
                    assert value["encoding"] == "base64"
                    self.server.files[value["path"]] = base64.b64decode(value["content"])
            url = f"{self.server.url}/{self.server.repository}/commit/abc"
            return self.answer({"commitUrl": url, "commitOid": "abc", "hookOutput": "", "success": True})
        self.answer({"error": f"no such call: {self.path}"}, 404)

    def do_GET(self) -> None:
        self.server.calls.append((self.path, self.headers.get("Authorization")))
        self.answer({"error": f"no such call: {self.path}"}, 404)

    def log_message(self, *words: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[Any]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.repository, server.url = "me/one-step", f"http://127.0.0.1:{server.server_port}"
    server.calls, server.files, server.created = [], {}, None
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def push(folder: Path, hub: Any, *arguments: str, token: str = "secret") -> subprocess.CompletedProcess[str]:
    """Run `d2g push` in a process of its own: huggingface_hub reads its environment when it is imported."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTEST"))}
    own = {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": token,
        "HF_HOME": str(folder / "hf"),
        "HF_HUB_DISABLE_XET": "1",
    }
    command = [sys.executable, "-m", "d2g_cli", "push", *arguments, "me/one-step", "--json"]
    settings = {"capture_output": True, "text": True, "cwd": folder}
    paths = {"PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run(command, env={**inherited, **own, **paths}, **settings)  # type: ignore[call-overload,no-any-return]


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    """A small folder that looks like an export; its content is only copied."""
    folder = tmp_path / "exported"
    (folder / "unet").mkdir(parents=True)
    (folder / "README.md").write_text("---\nlicense: mit\n---\nMade with diffusion2gan.\n")
    (folder / "unet" / "weights.safetensors").write_bytes(bytes(range(256)))
    (folder / ".staged.7.tmp").mkdir()
    (folder / ".staged.7.tmp" / "left-over").write_text("of a killed export")
    return folder


def test_a_dry_run_writes_the_folder_and_uploads_nothing(exported: Path, hub: Any, tmp_path: Path) -> None:
    process = push(tmp_path, hub, str(exported), "--dry-run")
    assert process.returncode == 0, process.stderr
    result = json.loads(process.stdout)
    assert result["folder"] == "push/one-step" and "url" not in result and hub.calls == []
    assert [file["path"] for file in result["files"]] == ["README.md", "unet/weights.safetensors"]
    assert result["files"][1]["bytes"] == 256
    assert (tmp_path / "push/one-step/unet/weights.safetensors").read_bytes() == bytes(range(256))


def test_an_upload_is_one_commit_of_the_same_files(exported: Path, hub: Any, tmp_path: Path) -> None:
    process = push(tmp_path, hub, str(exported), "--private", "--out", "folder")
    assert process.returncode == 0, process.stderr
    assert json.loads(process.stdout)["url"] == f"{hub.url}/me/one-step/commit/abc"
    files = {p.relative_to(tmp_path / "folder").as_posix(): p for p in (tmp_path / "folder").rglob("*.*")}
    assert hub.files == {name: path.read_bytes() for name, path in files.items()}
    assert hub.created["name"] == "one-step" and hub.created["organization"] == "me"
    assert hub.created.get("private") or hub.created.get("visibility") == "private"
    assert sum("/commit/main" in path for path, _ in hub.calls) == 1


def test_a_refused_upload_keeps_the_folder(exported: Path, hub: Any, tmp_path: Path) -> None:
    process = push(tmp_path, hub, str(exported), token="wrong")
    assert process.returncode == 1 and "Traceback" not in process.stderr
    (line,) = [line for line in process.stderr.splitlines() if line.startswith("error: ")]
    assert "cannot upload to me/one-step" in line and "`hf auth login`" in line
    assert (tmp_path / "push/one-step/README.md").is_file() and hub.files == {}


def test_a_run_is_exported_first(teacher: Path, tmp_path: Path, d2g: Any) -> None:
    run = save_run(tmp_path / "run", str(teacher))
    result = d2g("push", run, "me/x", "--dry-run", "--out", tmp_path / "out", "--json").json
    names = {file["path"] for file in result["files"]}
    assert {"README.md", "model_index.json", "unet/diffusion_pytorch_model.safetensors"} <= names
    assert ModelCard.load(tmp_path / "out" / "README.md").data.library_name == "diffusers"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["runs/gan", "no-owner"], "repository 'no-owner' is no name of the hub; expected OWNER/NAME"),
        (["runs/gan", "a/b/c"], "repository 'a/b/c' is no name of the hub"),
        (["runs/gan", "a/b..c"], "repository 'a/b..c' is no name of the hub"),
        (
            ["runs/gan", "a/b", "--format", "safetensors"],
            "--format is 'safetensors'; expected diffusers, lora",
        ),
    ],
)
def test_wrong_names_are_refused(arguments: list[str], message: str, d2g: Any) -> None:
    ended = d2g("push", *arguments, "--dry-run")
    assert ended.code == 2 and message in ended.error


def test_a_folder_is_not_copied_onto_itself(exported: Path, d2g: Any) -> None:
    ended = d2g("push", exported, "a/b", "--dry-run", "--out", exported)
    assert ended.code == 1 and "is the student itself; choose another --out" in ended.error


@pytest.mark.parametrize("target", ["weights.safetensors", "../../key", "../../keys", ".."])
def test_links_out_of_an_export_are_not_followed(
    target: str, exported: Path, tmp_path: Path, d2g: Any
) -> None:
    """An export from a stranger must not publish files of this machine, nor copy itself without an end."""
    (tmp_path / "keys").mkdir()
    (tmp_path / "key").write_text("secret")
    (exported / "unet" / "more").symlink_to(target)
    ended = d2g("push", exported, "a/b", "--dry-run", "--out", tmp_path / "out")
    if target == "weights.safetensors":
        assert ended.code == 0 and (tmp_path / "out/unet/more").read_bytes() == bytes(range(256))
    else:
        reason = "outside of the export" if target == "../../key" else "a folder"
        assert ended.code == 1 and "more is a link to /" in ended.error and reason in ended.error
        assert not (tmp_path / "out").exists()


def test_a_format_is_for_a_run(exported: Path, tmp_path: Path, d2g: Any) -> None:
    ended = d2g("push", exported, "a/b", "--dry-run", "--format", "lora", "--out", tmp_path / "out")
    assert (
        ended.code == 2 and "--format is 'lora', but" in ended.error and "is exported already" in ended.error
    )


def test_no_readme_of_something_else_is_replaced(exported: Path, tmp_path: Path, d2g: Any) -> None:
    (tmp_path / "README.md").write_text("mine")
    ended = d2g("push", exported, "a/b", "--dry-run", "--out", tmp_path)
    assert ended.code == 1 and "holds what no export wrote" in ended.error
    assert (tmp_path / "README.md").read_text() == "mine"


@pytest.mark.slow
def test_files_of_something_else_are_not_published(exported: Path, hub: Any, tmp_path: Path) -> None:
    """Running the same command again is fine; a file that no push wrote is not."""
    for _ in range(2):
        process = push(tmp_path, hub, str(exported), "--dry-run")
        assert process.returncode == 0, process.stderr
    (tmp_path / "push/one-step/diary.txt").write_text("mine")
    process = push(tmp_path, hub, str(exported))
    assert process.returncode == 1 and "first diary.txt, which would be published too" in process.stderr
    assert hub.calls == [] and (tmp_path / "push/one-step/diary.txt").read_text() == "mine"
