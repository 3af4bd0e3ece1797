"""eval.study: the page in a real browser, what its answers say, and input that is refused."""

import json
import math
import re
import resource
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from browser import Browser, chromium
from d2g.core.errors import UserError
from d2g.core.png import save_png
from eval.metrics.intervals import wilson_interval
from eval.study.answers import Answer, AnswerFile, Choice, read_answers, summarize_answers
from eval.study.page import Contestants, PreferenceStudy, open_server

PROMPTS = [f"prompt {number} <b>&" for number in range(6)]


def save_model(folder: Path, color: int, prompts: list[str] = PROMPTS) -> Path:
    """Images of one color, and the grid that `d2g sample` adds."""
    for number, prompt in enumerate(prompts):
        save_png(
            torch.full((3, 8, 8), color, dtype=torch.uint8), folder / f"{number:05d}.png", {"prompt": prompt}
        )
    save_png(torch.zeros(3, 8, 8, dtype=torch.uint8), folder / "grid.png", {})
    return folder


@pytest.fixture
def models(tmp_path: Path) -> Contestants:
    """The first model is dark, the second one light."""
    return Contestants.open(save_model(tmp_path / "dark", 10), save_model(tmp_path / "light", 240))


@contextmanager
def served(models: Contestants, out: Path) -> Iterator[str]:
    server = open_server(PreferenceStudy(models, AnswerFile(out, models.study())), "127.0.0.1", 0)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def answer(user: str, pair: int, choice: Choice, left: Any = "first") -> Answer:
    return Answer(user=user, pair=pair, choice=choice, left=left, seconds=2.0, time=0.0)


DARK = """(() => { const image = document.getElementById("image-left");
  const canvas = document.createElement("canvas"); const context = canvas.getContext("2d");
  context.drawImage(image, 0, 0, 1, 1); return context.getImageData(0, 0, 1, 1).data[0] < 100; })()"""


def wait_for(browser: Browser, condition: str) -> None:
    """Until a JavaScript condition holds in the page."""
    script = f"(async () => {{ while (!({condition})) await new Promise(done => setTimeout(done, 10)); }})()"
    browser.evaluate(script)


@pytest.mark.slow
def test_a_person_in_a_browser(models: Contestants, tmp_path: Path) -> None:
    """Someone who always takes the dark image prefers the first model, wherever it stands."""
    out, sides = tmp_path / "answers.jsonl", list[bool]()
    with served(models, out) as address, chromium() as browser:
        browser.call("Page.navigate", url=address)
        wait_for(browser, 'document.readyState === "complete" && document.getElementById("name")')
        page = browser.evaluate("document.documentElement.outerHTML")
        assert "dark" not in re.sub("color-scheme: light dark", "", page)
        browser.evaluate('document.getElementById("name").value = "ada"')
        browser.evaluate('document.querySelector("#start button").click()')
        for done in range(len(PROMPTS)):
            wait_for(
                browser, f'document.getElementById("status").textContent.startsWith("{done} of 6") && !busy'
            )
            assert browser.evaluate('document.getElementById("prompt").textContent') in PROMPTS
            sides.append(browser.evaluate(DARK))
            if done == 5:
                browser.evaluate('document.getElementById("tie").click()')
            elif done % 2:
                key = "ArrowLeft" if sides[-1] else "ArrowRight"
                browser.evaluate(f'dispatchEvent(new KeyboardEvent("keydown", {{ key: "{key}" }}))')
            else:
                browser.evaluate(f'document.getElementById("{"left" if sides[-1] else "right"}").click()')
        wait_for(browser, 'document.getElementById("status").textContent.includes("Thank you")')
        assert browser.requests_elsewhere("127.0.0.1") == []
    study, answers = read_answers(out)
    assert study == models.study() and {a.pair for a in answers} == set(range(6))
    assert [a.choice for a in answers] == [*["first"] * 5, "tie"]
    assert [a.left == "first" for a in answers] == sides and len(set(sides)) == 2
    assert all(0 < a.seconds < 60 for a in answers)
    assert len(AnswerFile(out, models.study()).answered("ada")) == 6  # goes on in its file


def test_every_user_has_an_order_of_his_own_and_no_pair_twice(models: Contestants, tmp_path: Path) -> None:
    study = PreferenceStudy(models, AnswerFile(tmp_path / "a.jsonl", models.study()))
    orders, lefts = set(), []
    for user in (f"user {number}" for number in range(12)):
        order = []
        while (shown := study.next(user)).get("pair") is not None:
            order.append(shown["pair"])
            lefts.append(study.left(user, shown["pair"]))
            study.answer(user, shown["pair"], "left", 1.0)
        assert sorted(order) == list(range(6)) and study.next(user) == {"done": 6, "pairs": 6}
        orders.add(tuple(order))
    assert len(orders) > 6 and 20 < lefts.count("first") < 52
    with pytest.raises(UserError, match="pair 0 is answered already"):
        study.answer("user 0", 0, "left", 1.0)


def test_the_summary_counts_answers_and_users() -> None:
    """One busy user prefers the second model, two others the first; one user answered too little."""
    answers = [answer("busy", pair, "second") for pair in range(8)]
    answers += [answer("a", pair, "first") for pair in range(4)] + [answer("a", 4, "second")]
    answers += [answer("b", pair, "first", "second") for pair in range(4)] + [answer("b", 4, "tie")]
    answers += [answer("c", 0, "second")]
    facts = summarize_answers(answers)
    assert (facts["all"]["wins"], facts["all"]["ties"], facts["all"]["losses"]) == (8, 1, 10)
    assert facts["all"]["win_rate"] == 8.5 / 19 and facts["all"]["ci"] == list(wilson_interval(8.5 / 19, 19))
    users = facts["users"]
    assert (users["wins"], users["losses"], users["at_least"], users["of"]) == (2, 1, 5, 4)
    assert facts["left"]["wins"] == 4 and facts["left"]["losses"] == 14
    assert facts["per_user"]["b"]["win_rate"] == 0.9
    with pytest.raises(UserError, match="there are no answers yet"):
        summarize_answers([])


def cut_off(file: Path) -> None:
    file.write_text(file.read_text() + '{"user": "a"')


def other_choice(file: Path) -> None:
    values = {"user": "a", "pair": 0, "choice": "left", "left": "first", "seconds": 1.0, "time": 0.0}
    file.write_text(file.read_text() + json.dumps(values) + "\n")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: file.write_text(""), "is empty"),
        (lambda file: file.write_text("{}"), "line 1 is no line of a study"),
        (cut_off, "line 2 is no line of a study"),
        (other_choice, "line 2 is no line of a study .choice: expected 'first' or 'second'"),
    ],
)
def test_damaged_answers_are_named(
    models: Contestants, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    file = tmp_path / "a.jsonl"
    AnswerFile(file, models.study())
    damage(file)
    with pytest.raises(UserError, match=message) as error:
        read_answers(file)
    assert "\n" not in str(error.value)


def test_a_full_disk_leaves_no_half_line(models: Contestants, tmp_path: Path) -> None:
    file = AnswerFile(tmp_path / "a.jsonl", models.study())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file.path.stat().st_size + 20, limits[1]))
    try:
        with pytest.raises(UserError, match=r"a\.jsonl"):
            file.add("a", 0, "first", "first", 1.0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    file.add("a", 1, "first", "first", 1.0)
    assert [answer.pair for answer in read_answers(file.path)[1]] == [1]


def test_images_that_do_not_compare_are_refused(models: Contestants, tmp_path: Path) -> None:
    dark = Path(models.first.name)
    fewer = save_model(tmp_path / "fewer", 1, PROMPTS[:3])
    with pytest.raises(UserError, match=r"has 6 images and .* 3; expected the same prompts"):
        Contestants.open(dark, fewer)
    other = save_model(tmp_path / "other", 1, [*PROMPTS[:5], "another"])
    with pytest.raises(UserError, match=r"image 5 shows 'prompt 5 .*' in .* and 'another' in"):
        Contestants.open(dark, other)
    AnswerFile(tmp_path / "a.jsonl", models.study())
    swapped = Contestants.open(Path(models.second.name), dark)
    with pytest.raises(UserError, match="has answers of another study: first "):
        AnswerFile(tmp_path / "a.jsonl", swapped.study())


def test_a_study_keeps_its_seed(models: Contestants, tmp_path: Path) -> None:
    """With another one, a page that is open while the server restarts would mean the other side."""
    file = tmp_path / "a.jsonl"
    AnswerFile(file, models.study(seed=3))
    with pytest.raises(UserError, match=r"has answers of another study: seed .*3.*0"):
        AnswerFile(file, models.study())
    assert PreferenceStudy(models, AnswerFile(file, models.study(seed=3))).seed == 3


def test_the_server_refuses_what_no_page_sends(models: Contestants, tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    with served(models, out) as address:

        def status(path: str, body: Any = None, kind: str = "application/json") -> int:
            data = None if body is None else json.dumps(body).encode()
            request = urllib.request.Request(address + path, data, {"Content-Type": kind})
            try:
                with urllib.request.urlopen(request, timeout=120) as response:
                    return int(response.status)
            except urllib.error.HTTPError as error:
                error.close()
                return error.code

        good = {"user": "a", "pair": 0, "side": "left", "seconds": 1}
        for change in (
            {"user": ""},
            {"user": "x" * 61},
            {"pair": 6},
            {"pair": "0"},
            {"side": "up"},
            {"seconds": None},
            {"seconds": math.nan},
            {"seconds": True},
            {"seconds": 10**400},
            {"pair": False},
            {"user": "\ud800"},
        ):
            assert status("/answer", {**good, **change}) == 400
        assert status("/answer", [1]) == 400 and status("/answer", good, "text/plain") == 415
        for path in (
            "/next",
            "/image?user=a&pair=9&side=left",
            "/image?user=a",
            f"/image?user=a&pair={9:0>5000}",
        ):
            assert status(path) == 400
        assert status("/secrets") == 404 and len(read_answers(out)[1]) == 0
        assert status("/answer", good) == 200 and status("/answer", good) == 400
        # A name with a character that ends a line for Python, but not in JSON lines.
        assert status("/answer", {**good, "user": "a\u2028b"}) == 200
    assert [answer.user for answer in read_answers(out)[1]] == ["a", "a\u2028b"]
    with served(models, out) as address, pytest.raises(UserError, match="cannot listen on"):
        port = int(address.rpartition(":")[2])
        open_server(PreferenceStudy(models, AnswerFile(out, models.study())), "127.0.0.1", port)
