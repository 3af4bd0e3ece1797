"""distill.browser_page: the page draws what `d2g sample` draws, and a click in a real browser shows it."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny_teachers
from browser import Browser, chromium
from d2g.core.errors import SettingError, UserError
from d2g.diffusion.latents import decode_uint8
from d2g.diffusion.pretrained import load_vae
from d2g.diffusion.teacher_sampler import SolverSettings, load_sampler
from distill.browser_page import BrowserPage, DrawRequest, build_page, open_page
from distill.config.student import GeneratorConfig, StudentConfig
from distill.models.students import build_student
from distill.sampling import OneStepSampler, untrained_one_step
from jobs import Running
from stores import FORKS

SETTINGS = SolverSettings(steps=2, guidance=1.0)


@pytest.fixture(scope="module")
def one(teacher: Path) -> OneStepSampler:
    return untrained_one_step(str(teacher))


@pytest.fixture(scope="module")
def page(one: OneStepSampler, teacher: Path) -> BrowserPage:
    return open_page(one, "student", str(teacher), SETTINGS)


def request(**changes: Any) -> DrawRequest:
    values: dict[str, Any] = {
        "prompt": "a red cube",
        "seed": 3,
        "count": 2,
        "second_seed": 4,
        "position": 0.0,
    }
    return DrawRequest(**{**values, "guidance": 8.0, **changes})


def test_the_page_draws_the_images_of_its_two_seeds(page: BrowserPage, one: OneStepSampler) -> None:
    prompts = ["a red cube"] * 2
    assert torch.equal(page.draw(request()).images, one(prompts, seed=3))
    assert (page.draw(request(position=1.0)).images.int() - one(prompts, seed=4)).abs().max() <= 1
    between = page.draw(request(position=0.5)).images
    assert (between != one(prompts, seed=3)).any() and (between != one(prompts, seed=4)).any()


def test_the_teacher_has_the_noise_of_the_student(page: BrowserPage, one: OneStepSampler) -> None:
    assert page.teacher is not None
    latents = page.teacher.latents(3, range(2), ["a red cube"] * 2)
    assert torch.equal(page.draw_teacher(request()).images, one.decode(latents))


def test_the_teacher_decodes_with_its_own_autoencoder(
    one: OneStepSampler, teacher: Path, tmp_path: Path
) -> None:
    shutil.copytree(teacher, tmp_path / "other")
    (file,) = (tmp_path / "other" / "vae").glob("*.safetensors")
    weights = load_file(file)
    save_file({name: weights[name].flip(0) for name in weights}, file)
    page = open_page(one, "student", str(tmp_path / "other"), SETTINGS)
    assert page.teacher is not None
    latents = page.teacher.latents(3, range(2), ["a red cube"] * 2)
    images = page.draw_teacher(request()).images
    assert torch.equal(images, next(decode_uint8(load_vae(str(tmp_path / "other")), latents)))
    assert (images != one.decode(latents)).any()
    assert torch.equal(page.draw(request()).images, one(["a red cube"] * 2, seed=3))


def test_an_upsampler_and_its_prior_move_to_the_second_seed(one: OneStepSampler, teacher: Path) -> None:
    """Its teacher reads no other stage, and draws alone from noise of its own."""
    sizes = GeneratorConfig(channel_base=64, channel_max=16, residual_blocks=1, z_dim=8, w_dim=8, factor=2)
    config = StudentConfig(kind="gigagan-upsampler", generator=sizes)
    upsampler = replace(one, student=build_student(str(teacher), -1, config), prior=one)
    page = open_page(upsampler, "up", str(teacher), replace(SETTINGS, prior="base"))
    assert page.teacher is not None and page.teacher.prior is None and not page.same_noise
    prompts = ["a red cube"] * 2
    assert torch.equal(page.draw(request()).images, upsampler(prompts, seed=3))
    assert (page.draw(request(position=1.0)).images.int() - upsampler(prompts, seed=4)).abs().max() <= 1
    assert page.draw_teacher(request()).images.shape == (2, 3, 16, 16)


def test_the_stages_of_a_cascade_move_together(tmp_path: Path) -> None:
    before = tiny_teachers.save_wuerstchen_prior(tmp_path / "c")
    last = tiny_teachers.save_wuerstchen_decoder(tmp_path / "b")
    sampler = replace(untrained_one_step(last), prior=untrained_one_step(before))
    stages = load_sampler(last, replace(SETTINGS, prior=before, prior_steps=2))
    page = BrowserPage(sampler, "b", stages, teacher_vae=load_vae(last))
    assert page.teacher is not None
    prompts = ["a red cube"] * 2
    assert torch.equal(page.draw(request()).images, sampler(prompts, seed=3))
    assert (page.draw(request(position=1.0)).images.int() - sampler(prompts, seed=4)).abs().max() <= 1
    for position, seed in ((0.0, 3), (1.0, 4)):
        expected = sampler.decode(page.teacher.latents(seed, range(2), prompts)).int()
        assert (page.draw_teacher(request(position=position)).images.int() - expected).abs().max() <= 1


def test_a_teacher_of_other_latents_is_refused(one: OneStepSampler) -> None:
    with pytest.raises(
        UserError, match=r"teacher miniature makes latents of shape .* give the teacher of this"
    ):
        open_page(one, "student", "miniature", SETTINGS)


def test_the_page_without_gradio(page: BrowserPage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)  # as importlib marks a module that cannot be imported
    with pytest.raises(SettingError, match="needs Gradio, which is not installed; `pip install gradio`"):
        build_page(page)


def test_a_prompt_that_no_page_can_show_is_refused(d2g: Any) -> None:
    refused = d2g("serve", "--prompt", "a\udce9", "--dry-run")
    assert refused.code == 1 and "bytes that are not UTF-8" in refused.error


def wait_for(browser: Browser, condition: str) -> None:
    end = time.monotonic() + 60
    while not browser.evaluate(condition):
        assert time.monotonic() < end, f"never true: {condition}"
        time.sleep(0.1)


PICTURES = "[...document.images].filter(i => i.naturalWidth == 64).map(i => i.src)"
LET_GO_AT_THE_END = """
window.slider = [...document.querySelectorAll('input[type=range]')].find(i => i.ariaLabel.includes('second'));
slider.value = slider.max;
slider.dispatchEvent(new Event('input', {bubbles: true}));
slider.dispatchEvent(new PointerEvent('pointerup', {bubbles: true}));
"""


@pytest.mark.long
@pytest.mark.slow
def test_a_click_in_a_browser_draws_with_student_and_teacher(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    arguments = ["--teacher", "miniature", "--steps", "2", "--prompt", "a red cube", "--port", port]
    command = [sys.executable, "-W", "error", "-m", "d2g_cli", "serve", *arguments]
    with (tmp_path / "log").open("w+") as log, subprocess.Popen(command, stderr=log, stdout=log) as process:
        try:
            # The address is logged when the page is served.
            end = time.monotonic() + 60
            while not (address := re.search(r"http://127\.0\.0\.1:\d+/", (tmp_path / "log").read_text())):
                assert process.poll() is None and time.monotonic() < end, (tmp_path / "log").read_text()
                time.sleep(0.1)
            with chromium() as browser:
                browser.call("Page.navigate", url=address[0])
                button = "[...document.querySelectorAll('button')].find(b => b.innerText == 'Draw')"
                wait_for(browser, f"!!{button}")
                browser.evaluate(f"{button}.click()")
                wait_for(browser, "[...document.images].filter(i => i.naturalWidth == 64).length == 8")
                assert "ms per image; teacher: " in browser.evaluate("document.body.innerText")
                # The slider, let go at its end, draws other images of both.
                browser.evaluate(f"window.before = {PICTURES}; {LET_GO_AT_THE_END}")
                wait_for(browser, f"{PICTURES}.filter(url => !before.includes(url)).length == 8")
                assert browser.requests_elsewhere("127.0.0.1") == []
        finally:
            process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130, (tmp_path / "log").read_text()


@pytest.mark.slow
@FORKS
def test_the_page_takes_no_files_and_removes_its_images(tmp_path: Path) -> None:
    """Any page in the browser may send files to an address of this machine. Gradio puts them, and the images,
    into one folder for all users of a machine, which the first of them owns."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    serve = Running(["serve", "--port", str(port)], tmp_path)
    try:
        serve.wait_for(lambda: "is served at" in serve.err.read_text())
        address, boundary = f"http://127.0.0.1:{port}/gradio_api", "boundary"
        form = {"Content-Type": f"multipart/form-data; boundary={boundary}", "Origin": "http://other.example"}
        part = 'Content-Disposition: form-data; name="files"; filename="a.bin"'
        body = f"--{boundary}\r\n{part}\r\n\r\n{'x' * 1000}\r\n--{boundary}--\r\n".encode()
        with pytest.raises(HTTPError, match="413"):
            urlopen(Request(f"{address}/upload", body, form), timeout=60)
        # A click draws one image.
        values = json.dumps({"data": ["a red cube", 0, 1, 1, 0, 8]}).encode()
        click = Request(f"{address}/call/draw", values, {"Content-Type": "application/json"})
        with urlopen(click, timeout=60) as answer:
            event = json.load(answer)["event_id"]
        with urlopen(f"{address}/call/draw/{event}", timeout=60) as answer:
            image = Path(re.findall(r'"path": "([^"]*image.png)"', answer.read().decode())[0])
        assert image.is_file() and Path(tempfile.gettempdir(), "gradio") not in image.parents
    finally:
        serve.send(signal.SIGINT)
    assert serve.wait().code == 130 and not image.exists()


SPACE = """
import runpy, sys
blocks = runpy.run_path(sys.argv[1], run_name="space")["demo"].blocks.values()
print([block.label for block in blocks if getattr(block, "label", None)][:4])
"""


@pytest.mark.long
@pytest.mark.slow
def test_the_space_builds_the_page_of_the_bundled_student() -> None:
    space = Path(__file__).resolve().parents[2] / "examples/space"
    environment = {k: v for k, v in os.environ.items() if k not in ("STUDENT", "TEACHER", "PROMPT")}
    command = [sys.executable, "-c", SPACE, str(space / "app.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout == "['Prompt', 'Images', 'Seed', 'Second seed']\n", done.stderr
    # The wheel that the Space installs is that of this version.
    wheel = f"diffusion2gan-{version('diffusion2gan')}-py3-none-any.whl"
    assert (space / "requirements.txt").read_text() == f"./{wheel}[ui]\n"
    assert wheel in (space / "README.md").read_text()
