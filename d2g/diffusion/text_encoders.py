"""What a U-Net is told beside noise and time, as one value; encoders of SDXL's text, classes, and nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from d2g.core.errors import UserError


@dataclass(frozen=True)
class Text:
    """B prompts: hidden states [B, L, D]; SDXL: also pooled [B, P], and time_ids [B, 6]: original size, crop
    and target size in pixels, which are the picture's own, uncropped, where they are None.
    """

    hidden: Tensor
    pooled: Tensor | None = None
    time_ids: Tensor | None = None

    def map(self, function: Callable[..., Tensor], *others: Text) -> Text:
        """`function` of each tensor that is there, with the same one of the others."""

        def each(name: str) -> Tensor | None:
            mine = getattr(self, name)
            return None if mine is None else function(mine, *(getattr(o, name) for o in others))

        hidden = each("hidden")
        assert hidden is not None
        return Text(hidden, each("pooled"), each("time_ids"))

    def __len__(self) -> int:
        return len(self.hidden)

    def __getitem__(self, rows: slice | Tensor | Sequence[int]) -> Text:
        """Some of the rows."""
        return self.map(lambda t: t[rows])

    def to(self, *args: Any, **settings: Any) -> Text:
        """As Tensor.to, of every tensor."""
        return self.map(lambda t: t.to(*args, **settings))

    def detach(self) -> Text:
        """Without a graph."""
        return self.map(torch.Tensor.detach)


# Known to torch as a container, so that wrappers (DDP, FSDP2, checkpointing) find the tensors in it.
torch.export.register_dataclass(Text)

Conditioning = Tensor | Text
"""Of B prompts: hidden states [B, L, D] alone, or with what goes beside them; class numbers, int64 [B]; or
[B, 0] for a network that is told nothing."""


def as_text(told: Conditioning) -> Text:
    """`told` as Text."""
    return told if isinstance(told, Text) else Text(told)


def added_conditions(unet: Any, text: Text, x: Tensor, downscale: int) -> dict[str, Tensor] | None:
    """diffusers' added_cond_kwargs for x [B, C, h, w]; None if the U-Net takes none. `downscale`: pixels by
    latents."""
    if unet.config.addition_embed_type != "text_time":
        return None
    assert text.pooled is not None, "SDXL's U-Net needs Text with `pooled`"
    ids = text.time_ids
    if ids is None:
        ids = x.new_zeros(len(x), 6)
        ids[:, 0::4], ids[:, 1::4] = downscale * x.shape[2], downscale * x.shape[3]
    return {"text_embeds": text.pooled.to(x.dtype), "time_ids": ids.to(x.dtype)}


class TextEncoderXL(nn.Module):
    """SDXL's two tokenizers and CLIPs: prompts -> Text, as StableDiffusionXLPipeline encodes them."""

    def __init__(self, tokenizers: Sequence[Any], models: Sequence[nn.Module]) -> None:
        super().__init__()
        self.tokenizers, self.models = list(tokenizers), nn.ModuleList(models)

    def tokens(self, prompts: Sequence[str]) -> Tensor:
        """Token ids [B, 2, L], padded and cut to the models' length."""
        ids = [
            tokenizer(
                list(prompts),
                padding="max_length",
                max_length=tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            ).input_ids
            for tokenizer in self.tokenizers
        ]
        return torch.stack(ids, dim=1)

    def forward(self, tokens: Tensor) -> Text:
        """Token ids [B, 2, L] -> next to last hidden states side by side, the second one's pooled output."""
        tokens = tokens.to(next(self.parameters()).device)
        each = zip(self.models, tokens.unbind(1), strict=True)
        found = [model(ids, output_hidden_states=True) for model, ids in each]
        return Text(torch.cat([f.hidden_states[-2] for f in found], dim=-1), found[-1][0])

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Text:
        """Prompts -> Text, without a graph."""
        return self.forward(self.tokens(prompts))


def class_numbers(prompts: Sequence[str], count: int) -> list[int]:
    """Prompts that are class numbers in decimal, 0 to `count` - 1, as numbers. Raises UserError."""
    for prompt in prompts:
        if not (prompt.isascii() and prompt.isdecimal() and int(prompt) < count):
            raise UserError(f"prompt {prompt!r}: expected a class number, 0 to {count - 1}")
    return [int(prompt) for prompt in prompts]


def expect_empty(prompts: Sequence[str]) -> None:
    """Raise UserError for prompts that say something, where nothing can be told."""
    if any(prompts):
        raise UserError(
            f"prompt {next(filter(None, prompts))!r}: this teacher is unconditional; expected none"
        )


class LabelEncoder(nn.Module):
    """Class numbers as a text encoder would have them: prompts -> int64 [B], on the CPU."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> class numbers [B]. Raises UserError for what is none."""
        return torch.tensor(class_numbers(prompts, self.count), dtype=torch.int64)


class NoEncoder(nn.Module):
    """Of a network that is told nothing: empty prompts -> [B, 0], on the CPU."""

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Empty prompts -> [B, 0]. Raises UserError for prompts that are not."""
        expect_empty(prompts)
        return torch.empty(len(prompts), 0)
