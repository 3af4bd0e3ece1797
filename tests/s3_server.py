"""A local S3 server (moto's) that can be told to fail, with conditional writes that are atomic."""

import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import boto3
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

BUCKET = "pairs-of-ours"
DENIED = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
CONFLICT = (
    b"<Error><Code>OperationAborted</Code><Message>A conflicting operation is in progress.</Message></Error>"
)
BUSY = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"


class QuietHandler(WSGIRequestHandler):
    def log(self, type: str, message: str, *arguments: Any) -> None:
        """Print nothing."""


class S3Server:
    """An S3 server with one empty bucket.

    `fault(method, name)` is asked before each request for an object, by its name below the bucket: "busy"
    answers 503, "conflict" 409, "denied" 403, "lost answer" does what is asked and answers 503, "lost upload"
    does nothing and answers as if it had. `requests`: "METHOD name" of all requests.
    """

    def __init__(self) -> None:
        self._app = DomainDispatcherApplication(create_backend_app)
        self._lock = threading.Lock()
        self.fault: Callable[[str, str], str | None] = lambda method, name: None
        self.requests: list[str] = []
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True, request_handler=QuietHandler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        self.client = boto3.client(
            "s3",
            endpoint_url=self.address,
            region_name="us-east-1",
            aws_access_key_id="key",
            aws_secret_access_key="secret",
        )
        self.client.create_bucket(Bucket=BUCKET)

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to use the server."""
        return {
            "AWS_ENDPOINT_URL": self.address,
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": "/nonexistent",
            "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def stop(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _answer(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        method = environ["REQUEST_METHOD"]
        name = environ["PATH_INFO"].removeprefix(f"/{BUCKET}").lstrip("/")
        prefix = parse_qs(environ["QUERY_STRING"]).get("prefix", [""])[0]
        self.requests.append(f"{method} {name or prefix}")
        fault = self.fault(method, name or prefix)
        # A request is done as a whole before the next one, so that conditions hold.
        if fault in (None, "lost answer"):
            with self._lock:
                answer: list[Any] = []
                body = b"".join(self._app(environ, lambda *head, **_: answer.append(head)))
            if fault is None:
                start(*answer[0])
                return [body]
        else:
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        if fault == "lost upload":
            start("200 OK", [("ETag", '"0"'), ("Content-Length", "0")])
            return [b""]
        refusals = {"denied": ("403 Forbidden", DENIED), "conflict": ("409 Conflict", CONFLICT)}
        status, body = refusals.get(fault or "", ("503 Slow Down", BUSY))
        start(status, [("Content-Length", str(len(body))), ("Content-Type", "application/xml")])
        return [body]

    def names(self, prefix: str = "") -> list[str]:
        """The names of the objects that begin with `prefix`."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
        return sorted(entry["Key"] for page in pages for entry in page.get("Contents", []))

    def get(self, name: str) -> bytes:
        content: bytes = self.client.get_object(Bucket=BUCKET, Key=name)["Body"].read()
        return content

    def put(self, name: str, content: bytes) -> None:
        self.client.put_object(Bucket=BUCKET, Key=name, Body=content)

    def copy_to(self, prefix: str, folder: Path) -> Path:
        """Copy the objects below a prefix to a folder, as `aws s3 cp --recursive` does."""
        for name in self.names(f"{prefix}/"):
            path = folder / name.removeprefix(f"{prefix}/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self.get(name))
        return folder


@contextmanager
def s3_server() -> Iterator[S3Server]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = S3Server()
    try:
        yield server
    finally:
        server.stop()
