"""Opens HTML pages in headless Chromium over the DevTools protocol and lists rendering problems."""

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
from urllib.parse import urlsplit

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

TIMEOUT = 240  # seconds to wait for a message from the browser; a busy machine takes many

# JavaScript that waits until the page and its images have loaded.
LOADED = "document.readyState === 'complete' || new Promise(done => { window.onload = () => done(true); })"

# JavaScript that inspects the page. It loads images with loading="lazy" at once, because nobody scrolls.
INSPECT = r"""(async () => {
  const images = [...document.images];
  for (const image of images) image.loading = "eager";
  await Promise.all(images.map(image => image.decode().catch(() => null)));
  for (const element of document.querySelectorAll("*")) element.style.contentVisibility = "visible";
  const text = element => element.textContent.trim().replace(/\s+/g, " ");
  const short = element => element.outerHTML.slice(0, 80);
  const all = query => [...document.querySelectorAll(query)];
  const ids = all("[id]").map(element => element.id);
  const width = document.documentElement.clientWidth;
  const clipped = element => { for (let up = element.parentElement; up; up = up.parentElement)
    if (getComputedStyle(up).overflowX === "auto") return true; return false; };
  return {
    title: document.title, text: document.body.innerText, width,
    headings: all("h1,h2,h3,h4").map(element => [Number(element.tagName[1]), text(element)]),
    images: images.length,
    broken_image: images.filter(image => !image.naturalWidth || !image.clientWidth).map(short),
    no_label: images.filter(image => !image.alt.trim()).map(short)
      .concat(all("svg:not([aria-hidden]):not([aria-label])").map(short)),
    no_scope: all("th:not([scope])").map(short),
    broken_link: all("a[href^='#']").filter(link => !ids.includes(link.hash.slice(1))).map(short),
    duplicate_id: ids.filter((id, place) => ids.indexOf(id) !== place),
    overflow: Math.max(document.documentElement.scrollWidth, document.body.scrollWidth) - width,
    outside: all("main *").filter(element => element.getBoundingClientRect().right > width + 1)
      .filter(element => !clipped(element)).map(short),
  };
})()"""


@dataclass(frozen=True, kw_only=True, slots=True)
class PageState:
    """The content of a rendered page. `problems`: one line for each rendering problem."""

    title: str
    text: str
    headings: list[tuple[int, str]]
    images: int
    problems: list[str] = field(default_factory=list)


class Browser:
    """A running Chromium, controlled over its DevTools pipe: JSON messages, each terminated by a NUL byte."""

    def __init__(self, commands: BinaryIO, responses: int) -> None:
        self._commands, self._responses, self._count, self._session = commands, responses, 0, ""
        self._unread = b""
        self._events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command and return its result; store the events that arrive before it. Fails on an error."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        message |= {"sessionId": self._session} if self._session else {}
        self._commands.write(json.dumps(message).encode() + b"\0")
        self._commands.flush()
        while True:
            response = self._read_message()
            if response.get("id") == self._count:
                assert "error" not in response, f"{method}: {response.get('error')}"
                result: dict[str, Any] = response["result"]
                return result

    def _read_message(self) -> dict[str, Any]:
        while b"\0" not in self._unread:
            ready, _, _ = select.select([self._responses], [], [], TIMEOUT)
            assert ready, f"no message from the browser for {TIMEOUT} s"
            data = os.read(self._responses, 1 << 16)
            assert data, "the browser has exited"
            self._unread += data
        message, _, self._unread = self._unread.partition(b"\0")
        content: dict[str, Any] = json.loads(message)
        if "method" in content:
            self._events.append(content)
        return content

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page; a promise is awaited."""
        response = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in response, response
        return response["result"].get("value")

    def open(self, page: Path, *, width: int, dark: bool = False, media: str = "screen") -> PageState:
        """Load a file in a viewport that is `width` CSS pixels wide, and inspect the whole page."""
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", media=media, features=scheme)
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False
        )
        self._events.clear()
        address = page.resolve().as_uri()
        self.call("Page.navigate", url=address)
        while not any(event["method"] == "Page.loadEventFired" for event in self._events):
            self._read_message()
        # A slow browser reports late that the page before this one was loaded.
        self.evaluate(LOADED)
        layout = self.evaluate(INSPECT)
        return PageState(
            title=layout["title"],
            text=layout["text"],
            headings=[(level, text) for level, text in layout["headings"]],
            images=layout["images"],
            problems=[*_layout_problems(layout, width), *self._event_problems(address)],
        )

    def _event_problems(self, address: str) -> list[str]:
        """Console messages, uncaught exceptions and network requests since the page was opened."""
        problems = []
        for event in self._events:
            method, params = event["method"], event["params"]
            if method == "Runtime.consoleAPICalled":
                problems.append(f"console: {[argument.get('value') for argument in params['args']]}")
            elif method == "Log.entryAdded":
                problems.append(f"log: {params['entry']['text']}")
            elif method == "Runtime.exceptionThrown":
                problems.append(f"thrown: {params['exceptionDetails']['text']}")
            elif method == "Network.requestWillBeSent":
                url = params["request"]["url"]
                if url != address and not url.startswith("data:"):
                    problems.append(f"request: {url[:120]}")
        return problems

    def requests_elsewhere(self, host: str) -> list[str]:
        """Addresses that were asked for, other than those of `host` and data in the page."""
        sent = [
            e["params"]["request"]["url"] for e in self._events if e["method"] == "Network.requestWillBeSent"
        ]
        return [url for url in sent if not url.startswith("data:") and urlsplit(url).hostname != host]

    def close(self) -> None:
        """Close the browser, not only the page."""
        self._session = ""
        self.call("Browser.close")

    def pdf(self) -> bytes:
        """The page as a PDF on A4, printed while the user prefers a dark color scheme."""
        dark = [{"name": "prefers-color-scheme", "value": "dark"}]
        self.call("Emulation.setEmulatedMedia", media="", features=dark)
        return base64.b64decode(self.call("Page.printToPDF", paperWidth=8.27, paperHeight=11.69)["data"])


def _layout_problems(layout: dict[str, Any], width: int) -> list[str]:
    kinds = ("broken_image", "no_label", "no_scope", "broken_link", "duplicate_id", "outside")
    problems = [f"{kind}: {element}" for kind in kinds for element in layout[kind]]
    if layout["overflow"] > 0:
        problems.append(f"overflow: {layout['overflow']} px beyond {width}")
    levels = [level for level, _ in layout["headings"]]
    jumps = [(a, b) for a, b in zip([0, *levels], levels, strict=False) if b > a + 1]
    if levels.count(1) != 1 or jumps:
        problems.append(f"headings: levels {levels}")
    return problems


def find_chromium() -> str | None:
    """The path of the Chromium executable, or None."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return next((path for name in names if (path := shutil.which(name))), None)


@contextmanager
def chromium() -> Iterator[Browser]:
    """Start headless Chromium with an empty profile. Skips the test if Chromium is not installed."""
    program = find_chromium()
    if program is None:
        missing = "Chromium is not installed; apt-get install chromium, as .ci/run does"
        pytest.skip(missing)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        (command_read, command_write), (response_read, response_write) = os.pipe(), os.pipe()
        # Chromium reads commands from descriptor 3 and writes responses to 4; the shell redirects our pipes.
        shell = f'exec "$@" 3<&{command_read} 4>&{response_write}'
        command = ["bash", "-c", shell, "bash", program, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        process = subprocess.Popen(
            command,
            pass_fds=(command_read, response_write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(command_read)
        os.close(response_write)
        with open(command_write, "wb") as commands:
            try:
                browser = Browser(commands, response_read)
                yield browser
                browser.close()
            finally:
                _stop(process)
                os.close(response_read)


def _stop(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
