"""What a teacher is told beside the noise: text, a class, or nothing. One class per family of pipelines.

Each knows how diffusers' own pipeline encodes prompts, what stands for no prompt, how to call the network.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from d2g.diffusion.schedule import Point
from d2g.diffusion.text_encoders import class_numbers, expect_empty

Kind = Literal["text", "label", "none"]


@dataclass(frozen=True)
class Condition:
    """`size` rows of what a network is told: tensors [size, ...] by name, and [1, ...] for the unconditional
    branch (empty where a teacher has none). Small enough to keep for as many batches as use the same prompts.
    """

    size: int
    rows: dict[str, Tensor]
    null: dict[str, Tensor]

    def __len__(self) -> int:
        return self.size

    def select(self, positions: Sequence[int]) -> "Condition":
        """The rows at these positions, in this order, repeats allowed."""
        if positions and not -self.size <= min(positions) <= max(positions) < self.size:
            raise IndexError(f"positions {min(positions)} to {max(positions)} of {self.size} rows")
        chosen = torch.tensor(positions, dtype=torch.int64)
        rows = {name: rows[chosen.to(rows.device)] for name, rows in self.rows.items()}
        return Condition(len(positions), rows, self.null)

    def to(self, device: torch.device | str) -> "Condition":
        """The same on another device."""
        rows, null = ({name: t.to(device) for name, t in part.items()} for part in (self.rows, self.null))
        return Condition(self.size, rows, null)

    def with_null(self) -> dict[str, Tensor]:
        """Tensors [2 size, ...]: the unconditional branch for every row, then the rows, for guidance in one
        batch."""
        return {name: torch.cat([self.null[name].expand_as(t), t]) for name, t in self.rows.items()}


@dataclass(frozen=True, kw_only=True)
class Conditioner:
    """An unconditional UNet2DModel is told nothing (DDIMPipeline, LDMPipeline). Base of the other kinds."""

    kind: ClassVar[Kind] = "none"
    models: dict[str, nn.Module] = field(default_factory=dict)
    """Text encoders by piece."""
    tokenizers: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    """What of the conditioning decides latents beside weights and prompts."""

    @property
    def has_null(self) -> bool:
        """Whether there is an unconditional branch, so that guidance means something."""
        return False

    def encode(self, prompts: Sequence[str]) -> Condition:
        """One row per prompt. Raises UserError for prompts that the teacher cannot be told."""
        expect_empty(prompts)
        return Condition(len(prompts), {}, {})

    def call(self, network: Any, x: Tensor, point: Point, told: dict[str, Tensor]) -> Tensor:
        """The network's raw output [B, C', h, w] for x [B, C, h, w]; `told`: [B, ...] of a Condition."""
        return _output(network(x, times(x, point), return_dict=False))


def times(x: Tensor, point: Point) -> Tensor:
    """What the network is told as its time, [B]: integers of a table, a flow's fractions of it, or EDM's
    c_noise.

    A tensor, because torch.compile would compile a network anew for every number.
    """
    dtype = torch.int64 if isinstance(point.t, int) else torch.float32
    return torch.full((len(x),), point.t, dtype=dtype, device=x.device)


def _output(result: Any) -> Tensor:
    output: Tensor = result[0]
    return output


@dataclass(frozen=True, kw_only=True)
class Labels(Conditioner):
    """Class numbers: a UNet2DModel with num_class_embeds, or a DiT. Prompts are the numbers in decimal."""

    kind: ClassVar[Kind] = "label"
    num_labels: int
    null_label: int | None
    label_names: list[str] | None = None

    @property
    def has_null(self) -> bool:
        return self.null_label is not None

    def encode(self, prompts: Sequence[str]) -> Condition:
        labels = torch.tensor(class_numbers(prompts, self.num_labels), dtype=torch.int64)
        null = {} if self.null_label is None else {"class_labels": torch.tensor([self.null_label])}
        return Condition(len(prompts), {"class_labels": labels}, null)

    def call(self, network: Any, x: Tensor, point: Point, told: dict[str, Tensor]) -> Tensor:
        return _output(network(x, times(x, point), class_labels=told["class_labels"], return_dict=False))


@dataclass(frozen=True, kw_only=True)
class Text(Conditioner):
    """CLIP's last hidden states (StableDiffusionPipeline); the empty prompt stands for none."""

    kind: ClassVar[Kind] = "text"

    @property
    def has_null(self) -> bool:
        return True

    def encode(self, prompts: Sequence[str]) -> Condition:
        return _split(self.embed([*prompts, ""]))

    def embed(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Tensors [B, ...] for B prompts, the empty one among them."""
        ids = tokens(self.tokenizers["tokenizer"], prompts).input_ids
        return {"hidden": _output(_run(self.models["text_encoder"], ids))}

    def call(self, network: Any, x: Tensor, point: Point, told: dict[str, Tensor]) -> Tensor:
        return _output(network(x, times(x, point), told["hidden"], return_dict=False))


@dataclass(frozen=True, kw_only=True)
class TextXL(Text):
    """SDXL: the next to last hidden states of two CLIPs side by side, the second one's pooled output, and the
    picture's size. Zeros stand for no prompt unless model_index.json says otherwise.
    """

    downscale: int
    zeros: bool

    def encode(self, prompts: Sequence[str]) -> Condition:
        if not self.zeros:
            return super().encode(prompts)
        rows = self.embed(prompts)
        return Condition(len(prompts), rows, {name: torch.zeros_like(t[:1]) for name, t in rows.items()})

    def embed(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        hidden = []
        for number in ("", "_2"):
            ids = tokens(self.tokenizers[f"tokenizer{number}"], prompts).input_ids
            found = _run(self.models[f"text_encoder{number}"], ids, output_hidden_states=True)
            hidden.append(found.hidden_states[-2])
        return {"hidden": torch.cat(hidden, dim=-1), "pooled": _output(found)}

    def call(self, network: Any, x: Tensor, point: Point, told: dict[str, Tensor]) -> Tensor:
        height, width = (self.downscale * side for side in x.shape[-2:])
        size = x.new_zeros(
            len(x), 6, dtype=torch.float32
        )  # filled where it lies: no copy, no wait for the GPU
        size[:, 0::4], size[:, 1::4] = height, width  # original size, crop at 0, 0, target size
        added = {"text_embeds": told["pooled"], "time_ids": size}
        return _output(
            network(x, times(x, point), told["hidden"], added_cond_kwargs=added, return_dict=False)
        )


@dataclass(frozen=True, kw_only=True)
class Text3(Text):
    """SD3: two CLIPs side by side, padded to T5's width, T5 after them, and both CLIPs' pooled outputs.

    Without a T5, zeros stand in for it, as in diffusers.
    """

    width: int
    t5_tokens: int

    def embed(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        hidden, pooled = [], []
        length = self.tokenizers["tokenizer"].model_max_length
        for number in ("", "_2"):
            ids = tokens(self.tokenizers[f"tokenizer{number}"], prompts, length).input_ids
            found = _run(self.models[f"text_encoder{number}"], ids, output_hidden_states=True)
            hidden.append(found.hidden_states[-2])
            pooled.append(_output(found))
        clip = torch.cat(hidden, dim=-1)
        clip = nn.functional.pad(clip, (0, self.width - clip.shape[-1]))
        if "text_encoder_3" in self.models:
            ids = tokens(self.tokenizers["tokenizer_3"], prompts, self.t5_tokens).input_ids
            t5 = _output(_run(self.models["text_encoder_3"], ids)).to(clip)
        else:
            t5 = clip.new_zeros(len(prompts), self.t5_tokens, self.width)
        return {"hidden": torch.cat([clip, t5], dim=1), "pooled": torch.cat(pooled, dim=-1)}

    def call(self, network: Any, x: Tensor, point: Point, told: dict[str, Tensor]) -> Tensor:
        result = network(
            hidden_states=x,
            timestep=times(x, point),
            encoder_hidden_states=told["hidden"],
            pooled_projections=told["pooled"],
            return_dict=False,
        )
        return _output(result)


@dataclass(frozen=True, kw_only=True)
class TextPixArt(Text):
    """PixArt: T5 with its padding masked, captions in lower case, and the picture's size where the model was
    trained with it."""

    downscale: int
    t5_tokens: int
    sized: bool

    def embed(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        found = tokens(self.tokenizers["tokenizer"], [p.lower().strip() for p in prompts], self.t5_tokens)
        model = self.models["text_encoder"]
        mask = found.attention_mask.to(next(model.parameters()).device)
        return {"hidden": _output(_run(model, found.input_ids, attention_mask=mask)), "mask": mask}

    def call(self, network: Any, x: Tensor, point: Point, told: dict[str, Tensor]) -> Tensor:
        added: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if self.sized:
            height, width = (self.downscale * side for side in x.shape[-2:])
            size = x.new_full((len(x), 2), height, dtype=torch.float32)
            size[:, 1] = width
            added = {"resolution": size, "aspect_ratio": x.new_full((len(x), 1), height / width).float()}
        result = network(
            x,
            encoder_hidden_states=told["hidden"],
            encoder_attention_mask=told["mask"],
            timestep=times(x, point),
            added_cond_kwargs=added,
            return_dict=False,
        )
        return _output(result)


def tokens(tokenizer: Any, prompts: Sequence[str], length: int | None = None) -> Any:
    """input_ids and attention_mask [B, L], padded and cut to `length` (the tokenizer's own by default)."""
    return tokenizer(
        list(prompts),
        padding="max_length",
        max_length=length or tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )


@torch.no_grad()
def _run(model: Any, ids: Tensor, **settings: Any) -> Any:
    return model(ids.to(next(model.parameters()).device), **settings)


def _split(rows: dict[str, Tensor]) -> Condition:
    """The last row, of the empty prompt, becomes the unconditional branch."""
    size = len(next(iter(rows.values()))) - 1
    return Condition(size, {k: t[:-1] for k, t in rows.items()}, {k: t[-1:] for k, t in rows.items()})
