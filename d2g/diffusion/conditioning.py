"""Conditioning of a network (text, class labels or nothing), and the conditioners that compute it.

Teacher, student and discriminator take the same `Conditioning` from the same conditioner. Each family of
models defines its conditioner in `d2g/diffusion/families/`; what several families share is here.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count, takewhile
from typing import Any, ClassVar, Literal, Self, cast

import torch
from torch import Tensor, nn

from d2g.core.errors import UserError
from d2g.core.transfer import to_device

ConditioningKind = Literal["text", "label", "none"]
"""What prompts are: text, class labels in decimal, or empty strings."""


@dataclass(frozen=True, eq=False)
class Conditioning:
    """Conditioning of B rows: tensors [B, ...] by name, and optionally the unconditional row `null` [1, ...].

    - hidden [B, L, D]: text embeddings.
    - pooled [B, P]: pooled text embeddings (SDXL, SD3, FLUX).
    - mask [B, L]: padding mask of the text (PixArt, SANA).
    - time_ids [B, 6]: original size, crop and target size in pixels (SDXL). By default they describe the
      whole image, uncropped.
    - guidance [B]: guidance scales (FLUX).
    - class_labels [B], int64.
    - empty [B, 0]: for an unconditional network.
    - prior [B, C, h, w]: latents of the stage before, for a later stage of a cascade.
    """

    tensors: dict[str, Tensor]
    null: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def from_text(cls, hidden: Tensor, pooled: Tensor | None = None, time_ids: Tensor | None = None) -> Self:
        """Text embeddings [B, L, D], optionally with pooled embeddings [B, P] and time ids [B, 6]."""
        tensors = {"hidden": hidden, "pooled": pooled, "time_ids": time_ids}
        return cls({name: tensor for name, tensor in tensors.items() if tensor is not None})

    @classmethod
    def from_labels(cls, labels: Tensor) -> Self:
        """Class labels, int64 [B]."""
        return cls({"class_labels": labels})

    @classmethod
    def empty(cls, rows: int) -> Self:
        """Conditioning of an unconditional network for this number of rows."""
        return cls({"empty": torch.empty(rows, 0)})

    @classmethod
    def cat(cls, parts: Sequence["Conditioning"]) -> Self:
        """The rows of several values, one after the other; the unconditional row is that of the first."""
        names = parts[0].tensors
        return cls({name: torch.cat([part.tensors[name] for part in parts]) for name in names}, parts[0].null)

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, rows: slice | Tensor | Sequence[int]) -> "Conditioning":
        """Some rows, in this order, repeats allowed. Raises IndexError for row numbers that do not exist."""
        if isinstance(rows, slice | Tensor):
            return self.map(lambda tensor: tensor[rows])
        if rows and not -len(self) <= min(rows) <= max(rows) < len(self):
            raise IndexError(f"positions {min(rows)} to {max(rows)} of {len(self)} rows")
        positions = torch.tensor(rows, dtype=torch.int64)
        return self.map(lambda tensor: tensor[to_device(positions, tensor.device)])

    def map(self, function: Callable[..., Tensor], *others: "Conditioning") -> "Conditioning":
        """Apply `function` to each tensor and its namesakes in `others`; keep the unconditional row."""
        tensors = {
            name: function(tensor, *(other.tensors[name] for other in others))
            for name, tensor in self.tensors.items()
        }
        return Conditioning(tensors, self.null)

    def to(self, target: torch.device | str | torch.dtype) -> "Conditioning":
        """Move to a device, or convert floating-point tensors to a dtype; labels and masks stay integers."""

        def convert(tensor: Tensor) -> Tensor:
            if isinstance(target, torch.dtype) and not tensor.is_floating_point():
                return tensor
            if not isinstance(target, torch.dtype) and torch.device(target).type == "cuda":
                return to_device(tensor, target)
            return tensor.to(target)

        tensors, null = (
            {name: convert(tensor) for name, tensor in part.items()} for part in (self.tensors, self.null)
        )
        return Conditioning(tensors, null)

    def detach(self) -> "Conditioning":
        """Return the same tensors, detached from their graph."""
        return self.map(torch.Tensor.detach)

    def with_guidance(self, scales: Tensor) -> "Conditioning":
        """Add guidance scales [B], for a network that takes them as an input."""
        device = next(iter(self.tensors.values())).device
        return Conditioning({**self.tensors, "guidance": to_device(scales.float(), device)}, self.null)

    def with_prior(self, latents: Tensor) -> "Conditioning":
        """Add latents [B, C, h, w] of the stage before, for a later stage of a cascade. Those of an
        unconditional row are zero."""
        prior = to_device(latents, next(iter(self.tensors.values())).device).float()
        null = {**self.null, "prior": torch.zeros_like(prior[:1])} if self.null else self.null
        return Conditioning({**self.tensors, "prior": prior}, null)

    def with_null(self) -> "Conditioning":
        """2 B rows for guidance in one batch: the unconditional row B times, then the rows."""
        return Conditioning(
            {name: torch.cat([self.null[name].expand_as(t), t]) for name, t in self.tensors.items()}
        )


# Registered with torch as a container, so that DDP, FSDP2 and activation checkpointing find its tensors.
torch.export.register_dataclass(Conditioning)


def require_list(prompts: Sequence[str]) -> None:
    """Assert that prompts are no string, whose characters would be taken for prompts."""
    assert not isinstance(prompts, str), f"prompts is the string {prompts[:40]!r}; give a list of prompts"


class Conditioner(nn.Module):
    """Computes the conditioning of prompts for one teacher.

    `facts`: what decides the conditioning, other than weights and prompts, as JSON values for a pair store.
    """

    kind: ClassVar[ConditioningKind]
    models: nn.ModuleDict
    """Text encoders by component; empty where there is no text."""

    def __init__(self, facts: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.models = nn.ModuleDict()
        self.facts = dict(facts or {})

    @property
    def has_null(self) -> bool:
        """Whether there is an unconditional row, which classifier-free guidance needs."""
        return False

    @property
    def num_labels(self) -> int:
        """Number of classes; 0 without class labels."""
        return 0

    @property
    def label_names(self) -> list[str] | None:
        """Names of the classes, if the pipeline has them."""
        return None

    @property
    def default_prompts(self) -> list[str]:
        """Prompts if the user gives none: every class in turn, or one empty prompt; no prompts for text."""
        return []

    @property
    def example_prompts(self) -> list[str]:
        """Two valid prompts, to compare two forms of a student with."""
        return ["", ""]

    @abstractmethod
    def encode(self, prompts: Sequence[str], null: bool = False) -> Conditioning:
        """Encode B prompts, without a graph; with `null`, also the unconditional row if there is one.

        Raises UserError for prompts that the teacher cannot take.
        """


class UnconditionalConditioner(Conditioner):
    """For an unconditional network: all prompts are empty."""

    kind = "none"

    @property
    def default_prompts(self) -> list[str]:
        return [""]

    def encode(self, prompts: Sequence[str], null: bool = False) -> Conditioning:
        # The network would ignore a prompt: refuse it.
        if any(prompts):
            first = next(filter(None, prompts))
            raise UserError(f"prompt {first!r}: this teacher is unconditional; expected none")
        return Conditioning.empty(len(prompts))


class LabelConditioner(Conditioner):
    """Class labels: a prompt is a class number in decimal, 0 to `num_labels` - 1.

    `null_label`: the label of the unconditional row; None for networks without one.
    """

    kind = "label"

    def __init__(self, num_labels: int, null_label: int | None, names: list[str] | None = None) -> None:
        super().__init__({"null_label": null_label})
        self._num_labels, self.null_label, self._names = num_labels, null_label, names

    @property
    def has_null(self) -> bool:
        return self.null_label is not None

    @property
    def num_labels(self) -> int:
        return self._num_labels

    @property
    def label_names(self) -> list[str] | None:
        return self._names

    @property
    def default_prompts(self) -> list[str]:
        return [str(label) for label in range(self._num_labels)]

    @property
    def example_prompts(self) -> list[str]:
        return ["0", str(self._num_labels - 1)]

    def encode(self, prompts: Sequence[str], null: bool = False) -> Conditioning:
        for prompt in prompts:
            if not (prompt.isascii() and prompt.isdecimal() and int(prompt) < self._num_labels):
                raise UserError(f"prompt {prompt!r}: expected a class number, 0 to {self._num_labels - 1}")
        labels = torch.tensor([int(prompt) for prompt in prompts], dtype=torch.int64)
        null_row = {} if self.null_label is None else {"class_labels": torch.tensor([self.null_label])}
        return Conditioning({"class_labels": labels}, null_row if null else {})


class TextConditioner(Conditioner):
    """Text through the text encoders of a pipeline; the encoded empty prompt is the unconditional row.

    Both dictionaries are by component: `models` text_encoder, text_encoder_2 ...; `tokenizers` tokenizer, ...
    """

    kind = "text"
    spells_out_words: ClassVar[bool] = False
    """Whether words of several vectors (textual inversion) are replaced by all their tokens."""

    def __init__(
        self,
        models: Mapping[str, nn.Module],
        tokenizers: Mapping[str, Any],
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(facts)
        self.models = nn.ModuleDict(models)
        self.tokenizers = dict(tokenizers)

    @property
    def has_null(self) -> bool:
        return True

    @property
    def example_prompts(self) -> list[str]:
        return ["", "a red cube on a wooden table"]

    @abstractmethod
    def embed(self, prompts: Sequence[str]) -> Conditioning:
        """Encode B prompts, the empty one included."""

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], null: bool = False) -> Conditioning:
        if not (null and self.has_null):
            return self.embed(prompts)
        # The last row, of the empty prompt, becomes the unconditional row.
        embedded = self.embed([*prompts, ""]).tensors
        return Conditioning(
            {name: tensor[:-1] for name, tensor in embedded.items()},
            {name: tensor[-1:] for name, tensor in embedded.items()},
        )

    def token_length(self, component: str) -> int:
        """Number of tokens to which prompts are padded and cut by a tokenizer: by default its own."""
        return int(self.tokenizers[component].model_max_length)

    def tokenize(self, component: str, prompts: Sequence[str], length: int | None = None) -> Any:
        """`input_ids` and `attention_mask` [B, L] of a tokenizer. L: `length`, by default its `token_length`.

        Raises UserError for tokens that its text encoder does not embed.
        """
        tokenizer = self.tokenizers[component]
        words = _multi_vector_words(tokenizer) if self.spells_out_words else {}
        tokens = tokenizer(
            [_spelled_out(prompt, words, tokenizer) for prompt in prompts],
            padding="max_length",
            max_length=length or self.token_length(component),
            truncation=True,
            return_tensors="pt",
        )
        encoder = encoder_of(component)
        vocabulary = cast(Any, self.models[encoder]).config.vocab_size
        if (last := int(tokens.input_ids.max())) >= vocabulary:
            raise UserError(
                f"{component} has the token {tokenizer.convert_ids_to_tokens(last)!r} (number {last}), but "
                f"{encoder} embeds {vocabulary} tokens; save both after resize_token_embeddings"
            )
        return tokens

    def check_lengths(self) -> None:
        """Raise UserError for more tokens than a text encoder has positions, and as `tokenize` does."""
        for component in self.tokenizers:
            encoder, length = encoder_of(component), self.token_length(component)
            places = getattr(cast(Any, self.models[encoder]).config, "max_position_embeddings", None)
            if places is not None and length > places:
                raise UserError(
                    f"{component} gives {length} tokens (model_max_length), but {encoder} has {places} "
                    "positions (max_position_embeddings); write the smaller number into "
                    f"{component}/tokenizer_config.json"
                )
            self.tokenize(component, [""])

    def run(self, component: str, ids: Tensor, **settings: Any) -> Any:
        """The output of a text encoder for token ids [B, L], computed where the encoder is."""
        model: Any = self.models[component]
        return model(to_device(ids, next(model.parameters()).device), **settings)


class CLIPConditioner(TextConditioner):
    """Text through one or two CLIP text models, from token ids that are one tensor.

    Token ids are a separate step, because a teacher's training and an ONNX export start from them.
    """

    spells_out_words = True

    @abstractmethod
    def tokens(self, prompts: Sequence[str]) -> Tensor:
        """Token ids of B prompts, padded and cut to the length of the text models."""

    @abstractmethod
    def forward(self, tokens: Tensor) -> Conditioning:
        """Conditioning of token ids, with a graph if the text models are trained."""

    def embed(self, prompts: Sequence[str]) -> Conditioning:
        embedding: Conditioning = self(self.tokens(prompts))
        return embedding

    def shard_units(self) -> list[nn.Module]:
        """The parts of the text models that FSDP2 gathers at once.

        They are below the models of transformers: FSDP2 changes the class of a module, by which transformers
        knows that it can return the hidden states of a model, as SDXL's conditioner needs.
        """
        return list(_below_models(self.models))


def _below_models(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the outermost modules with parameters that are no models of transformers."""
    from transformers import PreTrainedModel

    for child in module.children():
        if isinstance(child, PreTrainedModel):
            yield from _below_models(child)
        elif any(True for _ in child.parameters()):
            yield child


def encoder_of(tokenizer: str) -> str:
    """The component that encodes the tokens of a tokenizer: text_encoder_2 for tokenizer_2."""
    return tokenizer.replace("tokenizer", "text_encoder")


def _multi_vector_words(tokenizer: Any) -> dict[str, str]:
    """Words of a textual inversion with several vectors -> the tokens of all its vectors.

    diffusers names the tokens of a word <toy>: <toy>, <toy>_1, <toy>_2, ...
    """
    added = tokenizer.added_tokens_encoder
    words = {}
    for word in sorted(added):
        parts = list(takewhile(added.__contains__, map(f"{word}_{{}}".format, count(1))))
        if parts:
            words[word] = " ".join([word, *parts])
    return words


def _spelled_out(prompt: str, words: Mapping[str, str], tokenizer: Any) -> str:
    """A prompt in which each word of several vectors is replaced by all its tokens, as diffusers'
    `TextualInversionLoaderMixin.maybe_convert_prompt` does."""
    if not any(word in prompt for word in words):
        return prompt
    tokens = set(tokenizer.tokenize(prompt))
    for word in words:
        if word in tokens:
            prompt = prompt.replace(word, words[word])
    return prompt
