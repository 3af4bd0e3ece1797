"""A small door to headless Chromium: opens a page as a reader would see it and says what is broken."""

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import pytest

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--no-default-browser-check",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-extensions",
    "--disable-sync",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)

PATIENCE = 60  # seconds without a word from the browser; a busy machine takes a few

# Runs in the page, after every picture is decoded. Lazy pictures are asked for: nobody scrolls here.
LOOK = r"""(async () => {
  const images = [...document.images];
  for (const image of images) image.loading = "eager";
  await Promise.all(images.map(image => image.decode().catch(() => null)));
  for (const part of document.querySelectorAll("*")) part.style.contentVisibility = "visible";
  const text = part => part.textContent.trim().replace(/\s+/g, " ");
  const short = part => part.outerHTML.slice(0, 80);
  const all = query => [...document.querySelectorAll(query)];
  const ids = all("[id]").map(part => part.id);
  const width = document.documentElement.clientWidth;
  const clipped = part => { for (let up = part.parentElement; up; up = up.parentElement)
    if (getComputedStyle(up).overflowX === "auto") return true; return false; };
  return {
    title: document.title, text: document.body.innerText, width,
    headings: all("h1,h2,h3,h4").map(part => [Number(part.tagName[1]), text(part)]),
    images: images.length,
    broken: images.filter(image => !image.naturalWidth || !image.clientWidth).map(short),
    nameless: images.filter(image => !image.alt.trim()).map(short)
      .concat(all("svg:not([aria-hidden]):not([aria-label])").map(short)),
    unscoped: all("th:not([scope])").map(short),
    dangling: all("a[href^='#']").filter(link => !ids.includes(link.hash.slice(1))).map(short),
    repeated: ids.filter((id, place) => ids.indexOf(id) !== place),
    overflow: Math.max(document.documentElement.scrollWidth, document.body.scrollWidth) - width,
    outside: all("main *").filter(part => part.getBoundingClientRect().right > width + 1 && !clipped(part))
      .map(short),
  };
})()"""


@dataclass(frozen=True, kw_only=True, slots=True)
class PageState:
    """What the page looked like. `problems`: everything that is wrong with it, in words."""

    title: str
    text: str
    headings: list[tuple[int, str]]
    images: int
    problems: list[str] = field(default_factory=list)


class Browser:
    """A running Chromium, spoken to over the pipe of its DevTools protocol: JSON messages ended by NUL."""

    def __init__(self, to: BinaryIO, answers: int) -> None:
        self._to, self._answers, self._count, self._session = to, answers, 0, ""
        self._unread = b""
        self._events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One command and its result; events on the way are kept. Raises on the browser's refusal."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        message |= {"sessionId": self._session} if self._session else {}
        self._to.write(json.dumps(message).encode() + b"\0")
        self._to.flush()
        while True:
            answer = self._next()
            if answer.get("id") == self._count:
                assert "error" not in answer, f"{method}: {answer.get('error')}"
                result: dict[str, Any] = answer["result"]
                return result

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._unread:
            ready, _, _ = select.select([self._answers], [], [], PATIENCE)
            assert ready, f"the browser said nothing for {PATIENCE} s"
            part = os.read(self._answers, 1 << 16)
            assert part, "the browser has gone"
            self._unread += part
        message, _, self._unread = self._unread.partition(b"\0")
        answer: dict[str, Any] = json.loads(message)
        if "method" in answer:
            self._events.append(answer)
        return answer

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page, awaited."""
        answer = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def open(self, page: Path, *, width: int, dark: bool = False, media: str = "screen") -> PageState:
        """Load a file at a viewport `width` CSS pixels wide and look at all of it."""
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", media=media, features=scheme)
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False
        )
        self._events.clear()
        address = page.resolve().as_uri()
        self.call("Page.navigate", url=address)
        while not any(event["method"] == "Page.loadEventFired" for event in self._events):
            self._next()
        layout = self.evaluate(LOOK)
        return PageState(
            title=layout["title"],
            text=layout["text"],
            headings=[(level, text) for level, text in layout["headings"]],
            images=layout["images"],
            problems=[*_in_page(layout, width), *self._complaints(address)],
        )

    def _complaints(self, address: str) -> list[str]:
        """What the console said, what was thrown, and what was asked of the outside."""
        complaints = []
        for event in self._events:
            method, params = event["method"], event["params"]
            if method == "Runtime.consoleAPICalled":
                complaints.append(f"console: {[part.get('value') for part in params['args']]}")
            elif method == "Log.entryAdded":
                complaints.append(f"log: {params['entry']['text']}")
            elif method == "Runtime.exceptionThrown":
                complaints.append(f"thrown: {params['exceptionDetails']['text']}")
            elif method == "Network.requestWillBeSent":
                url = params["request"]["url"]
                if url != address and not url.startswith("data:"):
                    complaints.append(f"request: {url[:120]}")
        return complaints

    def close(self) -> None:
        """Ask the whole browser, not the page, to leave."""
        self._session = ""
        self.call("Browser.close")

    def pdf(self) -> bytes:
        """The page as a reader with a dark screen would print it on A4."""
        dark = [{"name": "prefers-color-scheme", "value": "dark"}]
        self.call("Emulation.setEmulatedMedia", media="", features=dark)
        return base64.b64decode(self.call("Page.printToPDF", paperWidth=8.27, paperHeight=11.69)["data"])


def _in_page(seen: dict[str, Any], width: int) -> list[str]:
    kinds = ("broken", "nameless", "unscoped", "dangling", "repeated", "outside")
    problems = [f"{kind}: {part}" for kind in kinds for part in seen[kind]]
    if seen["overflow"] > 0:
        problems.append(f"overflow: {seen['overflow']} px beyond {width}")
    levels = [level for level, _ in seen["headings"]]
    jumps = [(a, b) for a, b in zip([0, *levels], levels, strict=False) if b > a + 1]
    if levels.count(1) != 1 or jumps:
        problems.append(f"headings: levels {levels}")
    return problems


def find() -> str | None:
    """Chromium's executable, if there is one."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return next((path for name in names if (path := shutil.which(name))), None)


@contextmanager
def chromium() -> Iterator[Browser]:
    """A fresh headless Chromium without network habits. Where there is none the test is skipped."""
    program = find()
    if program is None:
        missing = "no chromium on this machine; apt-get install chromium, as .ci/run does"
        pytest.skip(missing)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        (inbox, to), (answers, outbox) = os.pipe(), os.pipe()
        # The browser reads its commands on descriptor 3 and answers on 4; the shell puts ours there.
        shell = f'exec "$@" 3<&{inbox} 4>&{outbox}'
        command = ["bash", "-c", shell, "bash", program, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        process = subprocess.Popen(
            command, pass_fds=(inbox, outbox), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(inbox)
        os.close(outbox)
        with open(to, "wb") as sender:
            try:
                browser = Browser(sender, answers)
                yield browser
                browser.close()
            finally:
                _stop(process)
                os.close(answers)


def _stop(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
