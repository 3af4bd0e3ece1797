"""A student as three ONNX files, for machines without torch: text encoder, one-step network, decoder."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from core import pretrained
from core.checkpoint import write_atomically
from core.latents import decode
from core.onnx_model import check_onnx, run_onnx, save_onnx
from core.pipelines import open_pipeline
from core.seeds import noise
from core.text import Text, as_text
from distill.card import CardOptions, card, read_result
from distill.generator import Student
from distill.sample import load_one_step, student_folder

PROMPTS = ["", "a red cube on a wooden table"]
"""What parity is measured with, in every format; the noise is that of (0, 0) and (0, 1)."""


def export_onnx(
    student: str, out: Path, teacher: str | None = None, options: CardOptions | None = None
) -> dict[str, Any]:
    """Write OUT/{text_encoder,student,decoder}.onnx in fp32 with a free batch size, OUT/tokenizer and a
    README.md with the few lines of numpy between them.

    Returns `out` and `parity_max_abs_err`: the largest difference in latents and in images in [0, 1] between
    our own student and the files run by onnxruntime on the CPU, on two noises.
    """
    check_onnx()
    options = options or CardOptions()
    scores = [read_result(file) for file in options.scores]  # what is wrong with them shows before the work
    source = teacher or student_folder(student)[1]
    one = load_one_step(student, source)
    drawn = noise(0, range(2), one.student.latent_shape)
    tokens = one.text.tokens(PROMPTS)
    text = as_text(one.text(tokens))
    told = _told(text, one.student, one.guidance)
    own = one.latents(drawn, PROMPTS)

    outputs = ["hidden", "pooled"][: 1 if text.pooled is None else 2]
    save_onnx(_Encoder(one.text), {"tokens": tokens}, outputs, out / "text_encoder.onnx")
    save_onnx(_OneStep(one.student), {"noise": drawn, **told}, ["latents"], out / "student.onnx")
    save_onnx(_Decoder(one.vae), {"latents": own}, ["images"], out / "decoder.onnx")
    tokenizers = [piece for piece in open_pipeline(source).pieces if piece.startswith("tokenizer")]
    for piece in tokenizers:
        pretrained.load_tokenizer(source, piece).save_pretrained(out / piece)

    found = dict(zip(outputs, run_onnx(out / "text_encoder.onnx", {"tokens": tokens}), strict=True))
    (latents,) = run_onnx(out / "student.onnx", {"noise": drawn, **told, **found})
    (images,) = run_onnx(out / "decoder.onnx", {"latents": latents})
    with torch.no_grad():
        pairs = ((latents, own), (images, _Decoder(one.vae)(own)))
    parity = max(float((a - b).abs().max()) for a, b in pairs)
    write_atomically(
        out / "README.md",
        card(
            student=student, teacher=source, timestep=one.student.timestep, parity=parity, options=options,
            scores=scores, what="One-step student", library="onnx",
            use=_usage(tokenizers, one.student, outputs),
        ),
    )  # fmt: skip
    return {"out": str(out), "parity_max_abs_err": parity}


def _told(text: Text, student: Student, guidance: float) -> dict[str, Tensor]:
    """What the network is told beside noise, by the names of its inputs."""
    told = {"hidden": text.hidden}
    if text.pooled is not None:
        told["pooled"] = text.pooled
    return {**told, "guidance": torch.full((len(text),), guidance)} if student.guided else told


class _Encoder(nn.Module):
    def __init__(self, text: nn.Module) -> None:
        super().__init__()
        self.text = text

    def forward(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Token ids -> hidden states, and SDXL's pooled output."""
        text = as_text(self.text(tokens))
        return (text.hidden,) if text.pooled is None else (text.hidden, text.pooled)


class _OneStep(nn.Module):
    def __init__(self, student: Student) -> None:
        super().__init__()
        self.student = student

    def forward(
        self, noise: Tensor, hidden: Tensor, pooled: Tensor | None = None, guidance: Tensor | None = None
    ) -> Tensor:
        """Noise and text -> scaled latents."""
        latents: Tensor = self.student(noise, Text(hidden, pooled), guidance)
        return latents


class _Decoder(nn.Module):
    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latents: Tensor) -> Tensor:
        """Scaled latents -> images in [0, 1]."""
        return (decode(self.vae, latents) / 2 + 0.5).clamp(0, 1)


def _usage(tokenizers: list[str], student: Student, outputs: list[str]) -> list[str]:
    channels, height, width = student.latent_shape
    scale = ", guidance=np.full(1, 8.0, np.float32)" if student.guided else ""
    calls = [f'tokens_of("{piece}")' for piece in tokenizers]
    tokens = calls[0] if len(calls) == 1 else f"np.stack([{', '.join(calls)}], 1)"
    return [
        "```python",
        "import numpy as np",
        "from onnxruntime import InferenceSession",
        "from PIL import Image",
        "from transformers import CLIPTokenizer",
        "",
        "def run(name, **inputs):",
        '    return InferenceSession(f"THIS_FOLDER/{name}.onnx").run(None, inputs)',
        "",
        "def tokens_of(name):",
        '    tokenizer = CLIPTokenizer.from_pretrained(f"THIS_FOLDER/{name}")',
        '    told = tokenizer(["a red cube"], padding="max_length", truncation=True, return_tensors="np")',
        "    return told.input_ids",
        "",
        f'text = dict(zip({outputs}, run("text_encoder", tokens={tokens})))',
        f"noise = np.random.default_rng(0).standard_normal((1, {channels}, {height}, {width}), np.float32)",
        f'(latents,) = run("student", noise=noise, **text{scale})',
        '(images,) = run("decoder", latents=latents)',
        "image = Image.fromarray((images[0].transpose(1, 2, 0) * 255).round().astype(np.uint8))",
        "```",
    ]
