"""A student as ONNX files, for machines without torch: text encoder, one-step network, decoder."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from d2g.core.atomic_files import write_atomically
from d2g.core.seeds import noise
from d2g.diffusion import pretrained
from d2g.diffusion.conditioning import CLIPConditioner, Conditioning
from d2g.diffusion.latents import decode
from d2g.diffusion.pipelines import open_pipeline
from distill.config.export import CardOptions
from distill.export.card_scores import own_results
from distill.export.model_card import card
from distill.export.onnx_runtime import check_onnx, run_onnx, save_onnx
from distill.export.output import apart, check_out, checked, staged
from distill.models.student import Student
from distill.sampling import OneStep, load_one_step, student_folder


def export_onnx(
    student: str, out: Path, teacher: str | None = None, options: CardOptions | None = None
) -> dict[str, Any]:
    """Write OUT/{text_encoder,student,decoder}.onnx in fp32 with a free batch size, OUT/tokenizer and a
    README.md with the few lines of numpy between them. A student that is told classes, or nothing, has
    neither text encoder nor tokenizer.

    Returns `out` and `parity_max_abs_err`: the largest difference in latents and in images in [0, 1] between
    our own student and the files run by onnxruntime on the CPU, on two noises.
    """
    check_onnx()
    options = options or CardOptions()
    scores = own_results(student, options.scores)  # what is wrong with them shows before the work
    source = teacher or student_folder(student)[1]
    check_out(out, student, source)
    one = load_one_step(student, source)
    with staged(out) as folder:
        parity = _write(one, student, source, folder, options, scores)
    return {"out": str(out), "parity_max_abs_err": parity}


def _write(
    one: OneStep,
    student: str,
    source: str,
    out: Path,
    options: CardOptions,
    scores: list[dict[str, Any]],
) -> float:
    """Write the files to a folder; their parity."""
    drawn = noise(0, range(2), one.student.latent_shape)
    own = one.latents(drawn, one.examples)
    told, found, outputs = _encoded(one, out)
    scale = {"guidance": torch.full((2,), one.guidance)} if one.student.guided else {}
    save_onnx(_OneStep(one.student), {"noise": drawn, **told, **scale}, ["latents"], out / "student.onnx")
    save_onnx(_Decoder(one.vae), {"latents": own}, ["images"], out / "decoder.onnx")
    tokenizers = [
        component for component in open_pipeline(source).components if component.startswith("tokenizer")
    ]
    for component in tokenizers:
        pretrained.load_tokenizer(source, component).save_pretrained(out / component)

    (latents,) = run_onnx(out / "student.onnx", {"noise": drawn, **found, **scale})
    (images,) = run_onnx(out / "decoder.onnx", {"latents": latents})
    with torch.no_grad():
        parity = apart((latents, own), (images, _Decoder(one.vae)(own)))
    write_atomically(
        out / "README.md",
        card(
            student=student, teacher=source, where=one.student.where, parity=checked(parity, torch.float32),
            options=options, scores=scores, what="One-step student", library="onnx",
            text=one.student.reads_text, use=_usage(tokenizers, one.student, outputs),
        ),
    )  # fmt: skip
    return parity


def _encoded(one: OneStep, out: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], list[str]]:
    """What the network is told of the student's examples, by the names of its inputs: from our own encoder,
    and from OUT/text_encoder.onnx, which is written where there is text; and the names of its outputs."""
    conditioner = one.text
    if conditioner.kind == "label":
        labels = {"labels": conditioner.encode(one.examples).tensors["class_labels"]}
        return labels, labels, []
    if not isinstance(conditioner, CLIPConditioner):
        return {}, {}, []
    tokens = conditioner.tokens(one.examples)
    with torch.no_grad():
        cond: Conditioning = conditioner(tokens)
    names = list(cond.tensors)
    save_onnx(_Encoder(conditioner), {"tokens": tokens}, names, out / "text_encoder.onnx")
    outputs = run_onnx(out / "text_encoder.onnx", {"tokens": tokens})
    return cond.tensors, dict(zip(names, outputs, strict=True)), names


class _Encoder(nn.Module):
    def __init__(self, conditioner: CLIPConditioner) -> None:
        super().__init__()
        self.conditioner = conditioner

    def forward(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Token ids -> hidden states, and SDXL's pooled output."""
        cond: Conditioning = self.conditioner(tokens)
        return tuple(cond.tensors.values())


class _OneStep(nn.Module):
    def __init__(self, student: Student) -> None:
        super().__init__()
        self.student = student

    def forward(
        self,
        noise: Tensor,
        hidden: Tensor | None = None,
        pooled: Tensor | None = None,
        labels: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """Noise and text, class labels or nothing -> scaled latents."""
        if hidden is not None:
            cond = Conditioning.from_text(hidden, pooled)
        elif labels is not None:
            cond = Conditioning.from_labels(labels)
        else:
            cond = Conditioning({"empty": noise.new_empty(len(noise), 0)})
        latents: Tensor = self.student(noise, cond, guidance)
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
    told, read = "", []
    if student.reads_text:
        told = ", **text" + (", guidance=np.full(1, 8.0, np.float32)" if student.guided else "")
        calls = [f'tokens_of("{component}")' for component in tokenizers]
        tokens = calls[0] if len(calls) == 1 else f"np.stack([{', '.join(calls)}], 1)"
        read = [
            "def tokens_of(name):",
            '    tokenizer = CLIPTokenizer.from_pretrained(f"THIS_FOLDER/{name}")',
            '    settings = dict(padding="max_length", truncation=True, return_tensors="np")',
            '    return tokenizer(["a red cube"], **settings).input_ids',
            "",
            f'text = dict(zip({outputs}, run("text_encoder", tokens={tokens})))',
        ]
    elif student.unet.config.num_class_embeds is not None:
        told = ", labels=np.array([0])"
    return [
        "```python",
        "import numpy as np",
        "from onnxruntime import InferenceSession",
        "from PIL import Image",
        *(["from transformers import CLIPTokenizer"] if read else []),
        "",
        "def run(name, **inputs):",
        '    return InferenceSession(f"THIS_FOLDER/{name}.onnx").run(None, inputs)',
        "",
        *read,
        f"noise = np.random.default_rng(0).standard_normal((1, {channels}, {height}, {width}), np.float32)",
        f'(latents,) = run("student", noise=noise{told})',
        '(images,) = run("decoder", latents=latents)',
        "image = Image.fromarray((images[0].transpose(1, 2, 0) * 255).round().astype(np.uint8))",
        "```",
    ]
