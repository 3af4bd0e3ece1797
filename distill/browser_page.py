"""A page in the browser that draws with a student, and with its teacher from the same noise (Gradio)."""

import os
import tempfile
import time
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from d2g.core.errors import SettingError, UserError
from d2g.core.logs import logger
from d2g.core.seeds import noise
from d2g.data.prompt_files import prompt_text
from d2g.diffusion.latents import decode, to_uint8
from d2g.diffusion.pretrained import load_vae
from d2g.diffusion.teacher_sampler import SolverSettings, TeacherSampler, load_sampler, prior_seed
from distill.exploration import interpolate_noise
from distill.sampling import OneStepSampler
from distill.student_files import teacher_prior

MOST_IMAGES = 16
"""Images that one click can draw."""


@dataclass(frozen=True, kw_only=True)
class DrawRequest:
    """The state of the page when someone asks for images.

    Image i has the noise of (seed, i). `position`, between 0 and 1, moves all noises along arcs to those of
    `second_seed`.
    """

    prompt: str
    seed: int
    count: int
    second_seed: int
    position: float
    guidance: float


@dataclass(frozen=True)
class Drawing:
    """Images uint8 [N, 3, H, W] and the milliseconds per image."""

    images: Tensor
    milliseconds: float


@dataclass(frozen=True)
class BrowserPage:
    """The models behind the page, and the prompt with which it starts.

    teacher, and teacher_vae, its autoencoder: None if the page has the student alone.
    """

    student_sampler: OneStepSampler
    name: str
    teacher: TeacherSampler | None = None
    prompt: str = ""
    teacher_vae: Any = None

    @property
    def same_noise(self) -> bool:
        """Whether student and teacher draw from the same noise."""
        return not self.student_sampler.student.own_noise

    def noise_of(self, request: DrawRequest, shape: tuple[int, ...], prior: bool = False) -> Tensor:
        """Noise [N, *shape] of a request's N images: of its seed, or interpolated towards the second seed.

        prior: for the stage before, in a cascade, or for the student whose latents an upsampler enlarges.
        """
        rows = range(request.count)
        seed, second_seed = (
            prior_seed(number) if prior else number for number in (request.seed, request.second_seed)
        )
        start = noise(seed, rows, shape)
        if request.position == 0:
            return start
        end = noise(second_seed, rows, shape)
        return interpolate_noise(start, end, torch.full((request.count,), request.position))

    def draw(self, request: DrawRequest) -> Drawing:
        """Draw with the student in one step. Raises UserError for a prompt that the student cannot take."""
        sampler = replace(self.student_sampler, guidance=request.guidance)
        prompts = [prompt_text("the prompt", request.prompt)] * request.count
        started = time.monotonic()
        # In a cascade, the noise of the stage before moves to the second seed, too.
        prior, before = None, sampler.prior
        if before is not None:
            prior = before.latents(self.noise_of(request, before.student.noise_shape, prior=True), prompts)
        images = sampler.images(self.noise_of(request, sampler.student.noise_shape), prompts, prior)
        return Drawing(images, 1000 * (time.monotonic() - started) / request.count)

    @torch.no_grad()
    def draw_teacher(self, request: DrawRequest) -> Drawing:
        """Draw with the teacher's solver from the same noise, in a cascade after the stage before."""
        assert self.teacher is not None
        prompts = [prompt_text("the prompt", request.prompt)] * request.count
        started = time.monotonic()
        latents = None
        for sampler in filter(None, (self.teacher.prior, self.teacher)):
            cond = replace(sampler, prior=None).conditioning(request.seed, range(request.count), prompts)
            latents = sampler.teacher.sample(
                self.noise_of(request, sampler.teacher.latent_shape, prior=sampler is not self.teacher),
                prompts,
                sampler.steps,
                sampler.guidance,
                sampler.solver,
                cond=cond if latents is None else cond.with_prior(latents),
            )
        assert latents is not None
        images = to_uint8(decode(self.teacher_vae, latents)).cpu()
        return Drawing(images, 1000 * (time.monotonic() - started) / request.count)


def open_page(
    student_sampler: OneStepSampler,
    name: str,
    teacher: str | None,
    settings: SolverSettings,
    prompt: str = "",
) -> BrowserPage:
    """Build the page of a loaded student, with a teacher beside it if `teacher` is given.

    The prior of the settings is the student of the stage before, in a cascade; the teacher draws after that
    student's teacher. For an upsampler it is the student whose latents it enlarges; the teacher draws alone.

    Raises SettingError and UserError as `load_sampler` does, and UserError for a teacher with latents of
    another shape.
    """
    if teacher is None:
        return BrowserPage(student_sampler, name, None, prompt)
    settings = replace(settings, prior=teacher_prior(teacher, settings.prior))
    _, height, width = student_sampler.student.latent_shape
    teacher_sampler = load_sampler(teacher, settings, student_sampler.device, size=(height, width))
    if teacher_sampler.teacher.latent_shape != student_sampler.student.latent_shape:
        raise UserError(
            f"teacher {teacher} makes latents of shape {teacher_sampler.teacher.latent_shape}, but student "
            f"{name} makes {student_sampler.student.latent_shape}; give the teacher of this student"
        )
    # The autoencoders of two teachers with one denoiser may differ.
    vae = load_vae(teacher).to(student_sampler.device)
    return BrowserPage(student_sampler, name, teacher_sampler, prompt, vae)


def build_page(page: BrowserPage) -> Any:
    """Build the Gradio `Blocks` of a page. `launch()` serves them.

    Raises SettingError if Gradio is not installed.
    """
    if find_spec("gradio") is None:
        raise SettingError("the page needs Gradio, which is not installed; `pip install gradio`")
    import gradio

    # Inputs above, galleries of student and teacher below.
    with gradio.Blocks(title=f"diffusion2gan: {page.name}", analytics_enabled=False) as blocks:
        gradio.Markdown(f"# {page.name}: images in one step")
        with gradio.Row():
            prompt = _prompt_input(gradio, page)
            count = gradio.Slider(1, MOST_IMAGES, 4, step=1, label="Images")
        with gradio.Row():
            seed = gradio.Number(0, precision=0, minimum=0, label="Seed")
            second_seed = gradio.Number(1, precision=0, minimum=0, label="Second seed")
            position = gradio.Slider(0, 1, 0, label="From the first seed to the second")
            guidance = gradio.Slider(
                1,
                15,
                page.student_sampler.guidance,
                label="Guidance",
                visible=page.student_sampler.student.guided,
            )
        button = gradio.Button("Draw", variant="primary")
        status = gradio.Markdown("")
        galleries = [_gallery(gradio, "Student, one step")]
        if page.teacher is not None:
            shared = "the same noise" if page.same_noise else "noise of its own"
            galleries.append(_gallery(gradio, f"Teacher, {page.teacher.steps} steps, {shared}"))

        # The button draws; so does moving the slider.
        def draw(*values: Any) -> list[Any]:
            return _draw(gradio, page, *values)

        inputs = [prompt, seed, count, second_seed, position, guidance]
        outputs = [status, *galleries]
        button.click(draw, inputs, outputs, api_name="draw")
        position.release(draw, inputs, outputs, api_visibility="private")
    return blocks


def _prompt_input(gradio: Any, page: BrowserPage) -> Any:
    """A field for a text, or a list of the classes; a student without conditioning has one empty prompt."""
    if page.student_sampler.student.family.reads_text:
        return gradio.Textbox(page.prompt, label="Prompt", placeholder="Describe the image", scale=4)
    classes = page.student_sampler.conditioner.default_prompts
    return gradio.Dropdown(classes, value=page.prompt or classes[0], label="Class", scale=4)


def _gallery(gradio: Any, label: str) -> Any:
    return gradio.Gallery(label=label, columns=4, object_fit="contain", format="png", interactive=False)


def _draw(
    gradio: Any,
    page: BrowserPage,
    prompt: str,
    seed: int | None,
    count: int,
    second_seed: int | None,
    position: float,
    guidance: float,
) -> list[Any]:
    """The text and the galleries after a click; bad input becomes a message on the page."""
    if seed is None or second_seed is None:
        raise gradio.Error("give a number as seed", print_exception=False)
    request = DrawRequest(
        prompt=prompt,
        seed=int(seed),
        count=int(count),
        second_seed=int(second_seed),
        position=float(position),
        guidance=float(guidance),
    )
    try:
        student = page.draw(request)
        teacher = page.draw_teacher(request) if page.teacher is not None else None
    except UserError as error:
        raise gradio.Error(str(error), print_exception=False) from error
    text = f"student: {student.milliseconds:.1f} ms per image"
    if teacher is None:
        return [text, _pictures(student)]
    return [f"{text}; teacher: {teacher.milliseconds:.1f} ms", _pictures(student), _pictures(teacher)]


def _pictures(drawing: Drawing) -> list[np.ndarray[Any, Any]]:
    """Arrays [H, W, 3] for a gallery."""
    return [image.permute(1, 2, 0).numpy() for image in drawing.images]


def serve_page(page: BrowserPage, host: str, port: int, share: bool) -> None:
    """Serve the page until Ctrl-C, and log its address. Raises UserError if the port is taken."""
    with tempfile.TemporaryDirectory(prefix="d2g-serve-") as folder:
        # Gradio's own folder for images belongs to the first user of a machine, and stays.
        os.environ.setdefault("GRADIO_TEMP_DIR", folder)
        _serve(build_page(page), page.name, host, port, share)


def _serve(blocks: Any, name: str, host: str, port: int, share: bool) -> None:
    import gradio

    # Fonts of the reader's system: nothing is downloaded.
    theme = gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    try:
        _, local, public = blocks.launch(
            server_name=host,
            server_port=port,
            share=share,
            theme=theme,
            footer_links=[],
            max_file_size=1,  # the page takes no files, which any other page in the browser could send
            quiet=True,
            prevent_thread_lock=True,
        )
    except OSError as error:
        raise UserError(
            f"cannot listen on port {port} of {host}: it is taken, or the address is none of this machine; "
            "choose another --port or --host"
        ) from error
    logger.info("%s is served at %s; stop it with Ctrl-C", name, public or local)
    try:
        blocks.server.thread.join()
    finally:
        blocks.close(verbose=False)
