"""A student with text encoders of its own, which `d2g distill text` trains (StyleGAN-T, section 3.3, "Guiding
the text encoder"). The discriminator and the guidance by CLIP keep those of the teacher."""

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
"""Before the names of the text encoders' tensors in a checkpoint and in an exported student."""


class TextStudent(DiffusionStudent):
    """A student whose conditioning holds token ids: it runs its own text encoders on them.

    The weights of the text encoders are named conditioner.models.text_encoder.…
    """

    conditioner: CLIPConditioner

    def __init__(self, student: DiffusionStudent, conditioner: CLIPConditioner) -> None:
        super().__init__(
            student.network, student.schedule, student.family, student.timestep, student.downscale
        )
        self.conditioner = conditioner

    def forward(self, noise: Tensor, cond: Conditioning, guidance: Tensor | None = None) -> Tensor:
        """noise [B, C, h, w], token ids of B rows as `tokenize` gives them -> latents [B, C, h, w], fp32."""
        encoded: Conditioning = self.conditioner(cond.tensors["tokens"])
        return super().forward(noise, encoded.to(torch.float32), guidance)

    def tokenize(self, prompts: Sequence[str]) -> Conditioning:
        """The token ids of B prompts, on the device of the network."""
        device = next(self.network.parameters()).device
        return Conditioning({"tokens": to_device(self.conditioner.tokens(prompts), device)})

    def fake_tokens(self, rows: int) -> Conditioning:
        """Token ids in the shape of `tokenize`, for planning without a tokenizer."""
        models: list[Any] = list(self.conditioner.models.values())
        length = models[0].config.max_position_embeddings
        shape = (rows, length) if len(models) == 1 else (rows, len(models), length)
        return Conditioning({"tokens": torch.zeros(shape, dtype=torch.int64)})


def split_tensors(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of a student's network, and those of its own text encoders by their names in a conditioner;
    the second is empty for a student that reads with its teacher's."""
    own = {name.removeprefix(PREFIX): t for name, t in tensors.items() if name.startswith(PREFIX)}
    return {name: t for name, t in tensors.items() if not name.startswith(PREFIX)}, own


def check_text_teacher(teacher: str) -> None:
    """Raise SettingError for a teacher whose students cannot have text encoders of their own."""
    if not isinstance(family_of(teacher), TextUNetFamily):
        raise SettingError(
            f"{teacher}, a {open_pipeline(teacher).kind}, has no CLIP text encoders to train; students with "
            "text encoders of their own are made of Stable Diffusion and SDXL teachers"
        )


def load_text_conditioner(teacher: str) -> CLIPConditioner:
    """The teacher's text encoders, to become a student's own."""
    conditioner = pretrained.load_conditioner(teacher)
    assert isinstance(conditioner, CLIPConditioner), "check_text_teacher must run first"
    return conditioner


def text_conditioner_on_meta(teacher: str, with_tokenizers: bool = False) -> CLIPConditioner:
    """The same without weights, and unless asked for without tokenizers, from configs alone."""
    if with_tokenizers:
        complete = pretrained.conditioner_on_meta(teacher)
        assert isinstance(complete, CLIPConditioner), "check_text_teacher must run first"
        return complete
    pipeline = open_pipeline(teacher)
    config = pretrained.load_on_meta(teacher, pipeline.family.network).config
    names = [name for name in pipeline.components if name.startswith("text_encoder")]
    models = {name: pretrained.load_on_meta(teacher, name) for name in names}
    conditioner = pipeline.family.conditioner(pipeline, config, models, {}).eval()
    assert isinstance(conditioner, CLIPConditioner), "check_text_teacher must run first"
    return conditioner


def train_text_encoders(student: TextStudent, teacher: str, freeze: Sequence[str]) -> None:
    """Require gradients for the text encoders alone, except for patterns in `freeze` and parameters that do
    not reach the conditioning, such as the last layer of SDXL's first encoder.

    Raises SettingError for a pattern that freezes nothing, and if nothing is left.
    """
    student.requires_grad_(False)
    parameters = dict(student.conditioner.named_parameters())
    for name in _reach_conditioning(teacher):
        parameters[name].requires_grad = True
    freeze_by_pattern(parameters, freeze)


def _reach_conditioning(teacher: str) -> list[str]:
    """Names of the parameters that the conditioning depends on, found on the meta device."""
    conditioner = text_conditioner_on_meta(teacher).requires_grad_(True)
    names, parameters = zip(*conditioner.named_parameters(), strict=True)
    lengths: list[Any] = list(conditioner.models.values())
    shape = (1, len(lengths)) if len(lengths) > 1 else (1,)
    tokens = torch.zeros(*shape, lengths[0].config.max_position_embeddings, dtype=torch.int64, device="meta")
    outputs = [tensor.sum() for tensor in conditioner(tokens).tensors.values()]
    slopes = torch.autograd.grad(outputs, parameters, allow_unused=True)
    return [name for name, slope in zip(names, slopes, strict=True) if slope is not None]


def set_stage_trainable(student: Student, teacher: str, stage: str, config: StudentConfig) -> None:
    """Require gradients for what a stage trains: the text encoders in stage `text`, else the network."""
    if stage == "text":
        assert isinstance(student, TextStudent), "the student of stage text has text encoders of its own"
        train_text_encoders(student, teacher, config.freeze)
        return
    set_trainable(student, config)
    if isinstance(student, TextStudent):
        student.conditioner.requires_grad_(False)


def text_modules(student: nn.Module) -> list[nn.Module]:
    """A student's own text encoders, for FSDP2 to shard; none for a student that has none."""
    return list(student.conditioner.models.values()) if isinstance(student, TextStudent) else []
