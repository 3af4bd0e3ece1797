"""Export a student as ONNX files for machines without torch: text encoder, one-step network, decoder."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from d2g.core.atomic_files import write_atomically
from d2g.core.errors import SettingError, UserError
from d2g.core.seeds import noise
from d2g.core.staged_folder import staged
from d2g.diffusion import pretrained
from d2g.diffusion.conditioning import CLIPConditioner, Conditioning
from d2g.diffusion.latents import decode
from d2g.diffusion.pipelines import open_pipeline
from distill.config.export import CardOptions
from distill.export.card_scores import own_results
from distill.export.model_card import OnnxUsage, model_card
from distill.export.output import check_out, check_parity, max_abs_diff
from distill.models.student import Student
from distill.sampling import OneStepSampler, load_student
from distill.student_files import student_folder

PACKAGES = ("onnx", "onnxscript", "onnxruntime")

_ONE_FILE = 2**31 - 2**26
"""Largest total of weights in bytes for a single file: protocol buffers end at 2 GiB."""


def export_onnx(
    student: str, out: Path, teacher: str | None = None, options: CardOptions | None = None
) -> dict[str, Any]:
    """Write a student as ONNX files in fp32 with a free batch size.

    Writes OUT/{text_encoder,student,decoder}.onnx, OUT/tokenizer and a README.md with the numpy code that
    connects them. A class-conditional or unconditional student has no text encoder and no tokenizer.

    Returns `out` and `parity_max_abs_err`: the largest difference in latents and in images in [0, 1] between
    the training code's student and the files as onnxruntime runs them on the CPU, on two noises. Raises
    SettingError if a package is missing.
    """
    check_onnx()
    options = options or CardOptions()
    # Check all inputs before the expensive part.
    scores = own_results(student, options.scores)
    source = teacher or student_folder(student)[1]
    kind = open_pipeline(source)
    check_out(out, student, source, ("README.md", *_tokenizers(source)))
    if all(export.name != "onnx" for export in kind.family.exports):
        raise UserError(
            f"teacher {source} is a {kind.kind}, whose text encoders or network have no ONNX export; "
            "export it with --format safetensors"
        )
    sampler = load_student(student, source)
    # Write the networks, draw with onnxruntime, and write the card with the difference.
    with staged(out, "exports to") as folder:
        parity, usage = _write_files(sampler, source, folder)
        text = model_card(
            student=student,
            teacher=source,
            timestep=sampler.student.evaluation_point,
            parity=check_parity(parity, torch.float32),
            options=options,
            scores=scores,
            usage=usage,
        )
        write_atomically(folder / "README.md", text)
    return {"out": str(out), "parity_max_abs_err": parity}


def _write_files(sampler: OneStepSampler, source: str, out: Path) -> tuple[float, OnnxUsage]:
    """Write the ONNX files and tokenizers. Returns their parity and how to use them."""
    student = sampler.student
    latents_noise = noise(0, range(2), student.latent_shape)
    expected = sampler.latents(latents_noise, sampler.examples)

    # Export the networks.
    cond, exported_cond = _write_text_encoder(sampler, out)
    scale = {"guidance": torch.full((2,), sampler.guidance)} if student.guided else {}
    inputs = {"noise": latents_noise, **cond, **scale}
    save_onnx(_OneStep(student), inputs, ["latents"], out / "student.onnx")
    save_onnx(_Decoder(sampler.vae), {"latents": expected}, ["images"], out / "decoder.onnx")
    tokenizers = _tokenizers(source)
    for name in tokenizers:
        pretrained.load_tokenizer(source, name).save_pretrained(out / name)

    # Run the exported files, and compare with the student.
    inputs = {"noise": latents_noise, **exported_cond, **scale}
    (latents,) = run_onnx(out / "student.onnx", inputs)
    (images,) = run_onnx(out / "decoder.onnx", {"latents": latents})
    with torch.no_grad():
        parity = max_abs_diff((latents, expected), (images, _Decoder(sampler.vae)(expected)))
    usage = OnnxUsage(
        tokenizers=tuple(tokenizers),
        outputs=tuple(cond) if student.reads_text else (),
        latent_shape=student.latent_shape,
        guided=student.guided,
        reads_text=student.reads_text,
        reads_labels=not student.reads_text and sampler.conditioner.kind == "label",
        guidance=sampler.guidance,
    )
    return parity, usage


def _tokenizers(teacher: str) -> list[str]:
    """The tokenizers of a teacher, by component."""
    return [name for name in open_pipeline(teacher).components if name.startswith("tokenizer")]


def _write_text_encoder(sampler: OneStepSampler, out: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Write OUT/text_encoder.onnx if the student reads text.

    Returns the conditioning of the example prompts by input name of the network, once from the torch encoder
    and once from the exported file.
    """
    conditioner = sampler.conditioner
    if conditioner.kind == "label":
        labels = {"labels": conditioner.encode(sampler.examples).tensors["class_labels"]}
        return labels, labels
    if not isinstance(conditioner, CLIPConditioner):
        return {}, {}
    tokens = conditioner.tokens(sampler.examples)
    with torch.no_grad():
        cond: Conditioning = conditioner(tokens)
    names = list(cond.tensors)
    save_onnx(_Encoder(conditioner), {"tokens": tokens}, names, out / "text_encoder.onnx")
    outputs = run_onnx(out / "text_encoder.onnx", {"tokens": tokens})
    return cond.tensors, dict(zip(names, outputs, strict=True))


class _Encoder(nn.Module):
    def __init__(self, conditioner: CLIPConditioner) -> None:
        super().__init__()
        self.conditioner = conditioner

    def forward(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Map token ids to hidden states, and for SDXL also to the pooled output."""
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
        """Map noise, and text or class labels if the student has them, to scaled latents."""
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
        """Map scaled latents to images in [0, 1]."""
        return (decode(self.vae, latents) / 2 + 0.5).clamp(0, 1)


def check_onnx() -> None:
    """Raise SettingError if a package that the ONNX export needs is not installed."""
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise SettingError(
            f"the format onnx needs {', '.join(missing)}, not installed; `pip install {' '.join(missing)}`"
        )


@torch.no_grad()
def save_onnx(module: nn.Module, inputs: Mapping[str, Tensor], outputs: Sequence[str], file: Path) -> None:
    """Write a network to an ONNX file by way of torch.export. The first dimension of each input is free.

    Weights beyond 2 GiB go to FILE.data beside it. Raises UserError for a file that cannot be written.
    """
    program = torch.onnx.export(
        module.eval(),
        kwargs=dict(inputs),
        dynamo=True,
        input_names=list(inputs),
        output_names=list(outputs),
        dynamic_shapes={name: {0: torch.export.Dim.DYNAMIC} for name in inputs},
        verbose=False,
    )
    assert program is not None, "torch.onnx.export gives a program with dynamo=True"
    # torch notes at each node where its code lies: paths of this machine do not belong in the file.
    for graph in (program.model.graph, *program.model.functions.values()):
        for node in graph:
            node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)
    size = sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        program.save(str(file), external_data=size > _ONE_FILE)
    except OSError as error:
        raise UserError(f"cannot write {file}: {error}; free space or choose another --out") from error


def run_onnx(file: Path, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """Run an ONNX file with onnxruntime on the CPU, and return its outputs."""
    import onnxruntime

    session: Any = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    outputs = session.run(None, {name: value.cpu().numpy() for name, value in inputs.items()})
    return [torch.from_numpy(value) for value in outputs]
