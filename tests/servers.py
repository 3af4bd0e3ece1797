"""An HTTP server of one folder that can be told to fail, and an fsspec file system that reads from it."""

import http.client
import json
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import fsspec


class Server(ThreadingHTTPServer):
    """Serves `folder` and records requests. `fault(path)`: bytes to send (None: all; 0: error 503)."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.requests = folder, list[str]()
        self.fault: Callable[[str], int | None] = lambda path: None

    @property
    def url(self) -> str:
        return f"plain://127.0.0.1:{self.server_port}/pairs"

    def handle_error(self, request: Any, address: Any) -> None:
        """Print nothing: some tests close the connection early."""


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        path = self.server.folder / self.path.removeprefix("/pairs").lstrip("/")
        limit = (self.headers.get("Range") or "bytes=0-").partition("-")[2]
        self.server.requests.append(f"{self.path} {limit}".strip())
        if self.path.endswith("denied/store.json"):
            return self.send_error(403)
        if not path.exists():
            return self.send_error(404)
        if path.is_dir():
            data = json.dumps([[p.name, p.stat().st_size] for p in sorted(path.iterdir())]).encode()
        else:
            data = path.read_bytes()[: int(limit) + 1 if limit else None]
        cut = self.server.fault(self.path) if not limit else None
        if cut == 0:
            return self.send_error(503)
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[:cut])  # fewer bytes than Content-Length if `cut`

    def log_message(self, *words: Any) -> None:
        pass


class PlainFileSystem(fsspec.AbstractFileSystem):  # type: ignore[misc]
    """The smallest file system that fsspec accepts, over HTTP."""

    protocol = "plain"

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return path.rstrip("/")

    def _request(self, path: str, headers: dict[str, str]) -> bytes:
        parts = urlsplit(path)
        connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=120)
        try:
            connection.request("GET", parts.path, headers=headers)
            answer = connection.getresponse()
            if answer.status in (403, 404):
                raise {403: PermissionError, 404: FileNotFoundError}[answer.status](path)
            if answer.status != 200:
                raise OSError(f"status {answer.status}")
            return answer.read()
        finally:
            connection.close()

    def ls(self, path: str, detail: bool = True, **options: Any) -> list[Any]:
        entries = json.loads(self._request(path, {}))
        return [{"name": f"{path}/{name}", "size": size, "type": "file"} for name, size in entries]

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        return self._request(path, {} if end is None else {"Range": f"bytes={start}-{end - 1}"})

    def get_file(self, rpath: str, lpath: str, **options: Any) -> None:
        Path(lpath).write_bytes(self._request(rpath, {}))
