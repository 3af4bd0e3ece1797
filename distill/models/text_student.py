"""A student with its own text encoders, trained by `d2g distill text`.

Source: StyleGAN-T, section 3.3, "Guiding the text encoder". The discriminator keeps the text encoders of the
teacher.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from d2g.core.errors import SettingError
from d2g.core.transfer import to_device
from d2g.diffusion import pretrained
from d2g.diffusion.conditioning import CLIPConditioner, Conditioning
from d2g.diffusion.families.unet import TextUNetFamily
from d2g.diffusion.pipelines import family_of, open_pipeline
from distill.config.student import StudentConfig
from distill.models.student import DiffusionStudent, Student, freeze_by_pattern, set_trainable

PREFIX = "conditioner."
"""Prefix of the names of the text encoders' tensors in checkpoints and exported students."""


class TextStudent(DiffusionStudent):
    """A student that takes token ids as conditioning and encodes them with its own text encoders.

    The weights of the text encoders are named conditioner.models.text_encoder.…
    """

    conditioner: CLIPConditioner

    def __init__(self, student: DiffusionStudent, conditioner: CLIPConditioner) -> None:
        super().__init__(
            student.network, student.schedule, student.family, student.timestep, student.downscale
        )
        self.conditioner = conditioner

    def forward(self, noise: Tensor, cond: Conditioning, guidance: Tensor | None = None) -> Tensor:
        """noise [B, C, h, w] and token ids of B rows from `tokenize` -> scaled latents [B, C, h, w], fp32."""
        encoded: Conditioning = self.conditioner(cond.tensors["tokens"])
        return super().forward(noise, encoded.to(torch.float32), guidance)

    def tokenize(self, prompts: Sequence[str]) -> Conditioning:
        """Convert B prompts to token ids, on the network's device."""
        device = next(self.network.parameters()).device
        return Conditioning({"tokens": to_device(self.conditioner.tokens(prompts), device)})

    def fake_tokens(self, rows: int) -> Conditioning:
        """Return token ids 0 in the shape that `tokenize` returns, for planning without a tokenizer."""
        models: list[Any] = list(self.conditioner.models.values())
        length = models[0].config.max_position_embeddings
        shape = (rows, length) if len(models) == 1 else (rows, len(models), length)
        return Conditioning({"tokens": torch.zeros(shape, dtype=torch.int64)})


def split_tensors(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split a student's tensors into those of its network and those of its own text encoders.

    The latter have their names in a conditioner. They are empty for a student that uses its teacher's.
    """
    text = {name.removeprefix(PREFIX): t for name, t in tensors.items() if name.startswith(PREFIX)}
    return {name: t for name, t in tensors.items() if not name.startswith(PREFIX)}, text


def check_text_teacher(teacher: str) -> None:
    """Raise SettingError for a teacher whose students cannot have text encoders of their own."""
    if not isinstance(family_of(teacher), TextUNetFamily):
        raise SettingError(
            f"{teacher}, a {open_pipeline(teacher).kind}, has no CLIP text encoders to train; students with "
            "text encoders of their own are made of Stable Diffusion and SDXL teachers"
        )


def load_text_conditioner(teacher: str) -> CLIPConditioner:
    """Load the teacher's text encoders, with which a student's own ones start."""
    conditioner = pretrained.load_conditioner(teacher)
    assert isinstance(conditioner, CLIPConditioner), "check_text_teacher must run first"
    return conditioner


def text_conditioner_on_meta(teacher: str, with_tokenizers: bool = False) -> CLIPConditioner:
    """Build the same conditioner on torch's meta device, from config files.

    with_tokenizers: load the tokenizers, too.
    """
    if with_tokenizers:
        with_weightless_encoders = pretrained.conditioner_on_meta(teacher)
        assert isinstance(with_weightless_encoders, CLIPConditioner), "check_text_teacher must run first"
        return with_weightless_encoders
    pipeline = open_pipeline(teacher)
    config = pretrained.load_on_meta(teacher, pipeline.family.network).config
    names = [name for name in pipeline.components if name.startswith("text_encoder")]
    models = {name: pretrained.load_on_meta(teacher, name) for name in names}
    conditioner = pipeline.family.conditioner(pipeline, config, models, {}).eval()
    assert isinstance(conditioner, CLIPConditioner), "check_text_teacher must run first"
    return conditioner


def train_text_encoders(student: TextStudent, teacher: str, freeze: Sequence[str]) -> None:
    """Switch gradients on for the text encoders and off for all other parameters.

    Parameters that match a pattern in `freeze` stay frozen, and so do those that do not influence the
    conditioning, such as the last layer of SDXL's first encoder. Raises SettingError for a pattern that
    freezes nothing, and if nothing is left to train.
    """
    student.requires_grad_(False)
    parameters = dict(student.conditioner.named_parameters())
    for name in _reach_conditioning(teacher):
        parameters[name].requires_grad = True
    freeze_by_pattern(parameters, freeze)


def _reach_conditioning(teacher: str) -> list[str]:
    """Names of the parameters that influence the conditioning: those with a gradient, on the meta device."""
    conditioner = text_conditioner_on_meta(teacher).requires_grad_(True)
    names, parameters = zip(*conditioner.named_parameters(), strict=True)
    # Encode one row of tokens, and differentiate.
    encoders: list[Any] = list(conditioner.models.values())
    shape = (1, len(encoders)) if len(encoders) > 1 else (1,)
    length = encoders[0].config.max_position_embeddings
    tokens = torch.zeros(*shape, length, dtype=torch.int64, device="meta")
    outputs = [tensor.sum() for tensor in conditioner(tokens).tensors.values()]
    gradients = torch.autograd.grad(outputs, parameters, allow_unused=True)
    return [name for name, gradient in zip(names, gradients, strict=True) if gradient is not None]


def set_stage_trainable(student: Student, teacher: str, stage: str, config: StudentConfig) -> None:
    """Switch gradients on for what a stage trains: the text encoders in stage `text`, else the network."""
    if stage == "text":
        assert isinstance(student, TextStudent), "the student of stage text has text encoders of its own"
        train_text_encoders(student, teacher, config.freeze)
        return
    set_trainable(student, config)
    if isinstance(student, TextStudent):
        student.conditioner.requires_grad_(False)


def text_modules(student: nn.Module) -> list[nn.Module]:
    """List the parts of a student's own text encoders for FSDP2 to shard; empty for other students."""
    return student.conditioner.shard_units() if isinstance(student, TextStudent) else []
