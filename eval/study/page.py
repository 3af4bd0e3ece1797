"""The page of a preference study: a small HTTP server of this machine, without files from elsewhere."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar, Literal, TypedDict
from urllib.parse import parse_qs, urlsplit

import numpy as np
from PIL import Image

from d2g.core.config import digest
from d2g.core.errors import UserError
from d2g.core.json_files import check_type, parse_json
from d2g.core.seeds import generator
from d2g.core.shuffle import permuted
from d2g.data.pictures import picture_prompt, png_text
from eval.images.decode import decode_image
from eval.images.folders import ImageFiles, open_images
from eval.study.answers import AnswerFile, Choice, Study


class PostedAnswer(TypedDict):
    """The numbers of an answer that the page sends."""

    pair: int
    seconds: float


Route = Callable[[dict[str, Any]], tuple[str, bytes]]
"""(query of the address) -> content type and body."""
MAX_BODY = 1 << 14
"""Bytes of an answer."""
MAX_NAME = 60
"""Characters of a user's name."""
MAX_SECONDS = 1e9
"""A bound on the seconds of an answer, which nobody reaches."""


@dataclass(frozen=True, eq=False)
class Contestants:
    """The images of two models of the same prompts, in the same order."""

    first: ImageFiles
    second: ImageFiles
    prompts: list[str]

    @classmethod
    def open(cls, first: Path, second: Path) -> "Contestants":
        """Open two folders, as `d2g eval run --keep` and `d2g sample` write them. Raises UserError for
        other numbers of images, and for images of different prompts."""
        sets = [_numbered(open_images(folder)) for folder in (first, second)]
        if len(sets[0]) != len(sets[1]):
            raise UserError(
                f"{first} has {len(sets[0])} images and {second} {len(sets[1])}; expected the same prompts "
                "in the same order"
            )
        texts = [[_caption(files, file) for file in files.pictures] for files in sets]
        for number, (a, b) in enumerate(zip(*texts, strict=True)):
            if a != b:
                raise UserError(
                    f"image {number} shows {a[:60]!r} in {first} and {b[:60]!r} in {second}; expected the "
                    "same prompts in the same order"
                )
        return cls(sets[0], sets[1], texts[0])

    def study(self, seed: int = 0) -> Study:
        """Return the facts that identify the study. `seed`: of the orders and sides."""
        sums = [digest([_sha256(file) for file in files.pictures]) for files in (self.first, self.second)]
        return Study(
            first=self.first.name,
            second=self.second.name,
            pairs=len(self.prompts),
            prompts_sha256=digest(self.prompts),
            first_sha256=sums[0],
            second_sha256=sums[1],
            seed=seed,
        )


def _numbered(files: ImageFiles) -> ImageFiles:
    """The images without the grid that `d2g sample` adds. Raises UserError for parquet files."""
    if files.tables:
        raise UserError(f"{files.name} has parquet files; the page needs a folder of image files")
    pictures = [file for file in files.pictures if file.stem != "grid"]
    return ImageFiles(name=files.name, pictures=pictures, captions=files.captions, column=files.column)


def _caption(files: ImageFiles, file: Path) -> str:
    if (caption := files.captions.get(file)) is not None:
        return caption
    return picture_prompt(png_text(file))


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


class PreferenceStudy:
    """Chooses what a user sees, by the seed of the study; each user has their own order."""

    def __init__(self, contestants: Contestants, answers: AnswerFile) -> None:
        self.contestants, self.answers, self.seed = contestants, answers, answers.study.seed

    def next(self, user: str) -> dict[str, Any]:
        """The next pair of a user as the page gets it, which names no model; without `pair` at the end."""
        done, count = self.answers.answered(user), len(self.contestants.prompts)
        order = permuted(self._user_seed(user), 0, count, np.arange(count))
        pair = next((int(number) for number in order if number not in done), None)
        progress = {"done": len(done), "pairs": count}
        if pair is None:
            return progress
        return {**progress, "pair": pair, "prompt": self.contestants.prompts[pair]}

    def left(self, user: str, pair: int) -> Literal["first", "second"]:
        """The model whose image is on the left, as likely the one as the other."""
        bits = hashlib.sha256(f"{self._user_seed(user)} {pair}".encode()).digest()
        return "first" if bits[0] % 2 else "second"

    def answer(self, user: str, pair: int, side: str, seconds: float) -> None:
        """Record `left`, `right` or `tie`. Raises UserError for another word or pair, and as `AnswerFile.add`
        does."""
        if side not in ("left", "right", "tie") or not 0 <= pair < len(self.contestants.prompts):
            raise UserError(f"the answer is {side!r} to pair {pair}; expected left, right or tie to a pair")
        left = self.left(user, pair)
        right: Literal["first", "second"] = "second" if left == "first" else "first"
        choice: Choice = "tie" if side == "tie" else left if side == "left" else right
        self.answers.add(user, pair, choice, left, seconds)

    def image(self, user: str, pair: int, side: str) -> bytes:
        """The PNG of one side: pixels alone, because a file's text or format could name its model."""
        left = self.left(user, pair)
        is_first = (left == "first") == (side == "left")
        model = self.contestants.first if is_first else self.contestants.second
        file = model.pictures[pair]
        buffer = BytesIO()
        pixels = decode_image(file.read_bytes, str(file)).image
        Image.fromarray(pixels.transpose(1, 2, 0)).save(buffer, "PNG")
        return buffer.getvalue()

    def _user_seed(self, user: str) -> int:
        return generator(self.seed, *hashlib.sha256(user.encode()).digest()[:4]).initial_seed()


def open_server(study: PreferenceStudy, host: str, port: int) -> ThreadingHTTPServer:
    """Open a server of the page, without running it. Port 0 takes a free port.

    Raises UserError for an address on which it cannot listen.
    """
    page = files("eval.study").joinpath("prefer.html").read_bytes()

    # The answers to GET and POST requests.
    class Handler(_Handler):
        routes: ClassVar[dict[str, Route]] = {
            "/": lambda query: ("text/html; charset=utf-8", page),
            "/next": lambda query: ("application/json", json.dumps(study.next(_user(query))).encode()),
            "/image": lambda query: (
                "image/png",
                study.image(_user(query), _pair(study, query), query.get("side", "")),
            ),
        }

        def record(self, values: dict[str, Any]) -> None:
            user = _user(values)
            try:
                check_type(values, PostedAnswer)
            except ValueError as error:
                raise UserError(
                    f"an answer needs the number of its pair and its seconds ({error})"
                ) from error
            if not 0 <= values["seconds"] < MAX_SECONDS:
                raise UserError(f"an answer takes 0 to {MAX_SECONDS:g} seconds")
            study.answer(user, values["pair"], str(values.get("side")), float(values["seconds"]))

    try:
        return ThreadingHTTPServer((host, port), Handler)
    except (OSError, OverflowError) as error:
        raise UserError(f"cannot listen on {host}:{port} ({error}); give another --host or --port") from error


class _Handler(BaseHTTPRequestHandler, ABC):
    routes: ClassVar[dict[str, Route]]

    @abstractmethod
    def record(self, values: dict[str, Any]) -> None:
        """Record an answer."""

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        route = self.routes.get(address.path)
        if route is None:
            return self.send_error(HTTPStatus.NOT_FOUND)
        query = {name: values[-1] for name, values in parse_qs(address.query).items()}
        self._reply(lambda: route(query))

    def do_POST(self) -> None:
        size = self.headers.get("Content-Length", "")
        if self.path != "/answer" or not size.isdecimal() or int(size) > MAX_BODY:
            return self.send_error(HTTPStatus.BAD_REQUEST)
        # A page of another address must not answer for the user.
        if self.headers.get("Content-Type") != "application/json":
            return self.send_error(HTTPStatus.UNSUPPORTED_MEDIA_TYPE)
        body = self.rfile.read(int(size))

        def record() -> tuple[str, bytes]:
            try:
                values = parse_json(body)
            except ValueError as error:
                raise UserError(f"an answer must be JSON ({error})") from error
            if not isinstance(values, dict):
                raise UserError("an answer must be a JSON object")
            self.record(values)
            return "application/json", b"{}"

        self._reply(record)

    def _reply(self, make: Callable[[], tuple[str, bytes]]) -> None:
        status = HTTPStatus.OK
        try:
            kind, body = make()
        except UserError as error:
            status, kind = HTTPStatus.BAD_REQUEST, "text/plain; charset=utf-8"
            body = str(error).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *words: Any) -> None:
        """Print nothing: the answers are in the file."""


def _user(values: dict[str, Any]) -> str:
    name = values.get("user")
    if not isinstance(name, str) or not name.strip() or len(name) > MAX_NAME:
        raise UserError(f"give a name of 1 to {MAX_NAME} characters")
    return name.strip()


def _pair(study: PreferenceStudy, query: dict[str, Any]) -> int:
    text = str(query.get("pair", ""))
    if not text.isdecimal() or len(text) > 9 or int(text) >= len(study.contestants.prompts):
        raise UserError(f"pair is {text!r}; expected a number of the study")
    return int(text)
