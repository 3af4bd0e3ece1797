"""Models of a pipeline, loaded from its folder or built new: the door to transformers and tokenizers.

`d2g.diffusion.pipelines` knows which pipelines there are and where their pieces lie, `d2g.diffusion.scheduler_files` schedules.
The `new_*` functions build pieces of a Stable-Diffusion shape (the miniature and the tests do).
"""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from d2g.core.errors import UserError
from d2g.diffusion.latents import PixelSpace, latent_space
from d2g.diffusion.pipelines import PIPELINES, Pipeline, choose_weights, classes, open_pipeline, piece_sha256
from d2g.diffusion.pipelines import SHIPPED as SHIPPED
from d2g.diffusion.pipelines import resolve as resolve
from d2g.diffusion.pipelines import weights_sha256 as weights_sha256
from d2g.diffusion.scheduler_files import UNETS
from d2g.diffusion.scheduler_files import load_schedule as load_schedule
from d2g.diffusion.scheduler_files import load_student_schedule as load_student_schedule
from d2g.diffusion.text_encoders import LabelEncoder, NoEncoder, TextEncoderXL

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the loader workers fork

STUDENTS = UNETS
"""Pipelines whose U-Net a student can be made of."""

TEXT_STUDENTS = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
"""Those whose U-Net is told text."""

AUTOENCODERS = ("AutoencoderKL", "AutoencoderTiny", "VQModel")
"""Classes that may stand in a folder by themselves."""


def _class(pipeline: Pipeline, component: str) -> Any:
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()  # progress is the caller's business
    transformers.utils.logging.disable_progress_bar()
    name = (
        pipeline.class_name(component)
        if "vae" in component or "token" in component
        else PIPELINES[pipeline.kind][component][0]
    )
    return getattr(diffusers, str(name), None) or getattr(transformers, str(name))


def load_model(name: str, component: str, dtype: torch.dtype = torch.float32) -> Any:
    """A piece with weights: from safetensors, directly in `dtype`, eval, frozen.

    Raises UserError for a missing piece or class, and for weights that are missing, damaged or incomplete.
    """
    pipeline = open_pipeline(name)
    return _with_weights(
        pipeline.component_dir(component),
        _class(pipeline, component),
        dtype,
        f"teacher {pipeline.folder}: {component}",
    )


def _with_weights(component_dir: Path, kind: Any, dtype: torch.dtype, what: str) -> Any:
    keyword = "dtype" if kind.__module__.startswith("transformers") else "torch_dtype"
    try:
        variant, _ = choose_weights(path.name for path in component_dir.iterdir())
        module, report = kind.from_pretrained(
            component_dir, variant=variant, use_safetensors=True, output_loading_info=True, **{keyword: dtype}
        )
        if report["missing_keys"]:  # diffusers would fill them with random numbers and a warning
            raise ValueError(f"its weights lack {', '.join(sorted(report['missing_keys'])[:3])}")
    except (OSError, ValueError, RuntimeError, SafetensorError, UserError) as error:
        raise UserError(f"{what} cannot be loaded: {str(error).splitlines()[0]}") from error
    return module.eval().requires_grad_(False)


def load_on_meta(name: str, component: str) -> Any:
    """A piece as it is loaded, but without weights, on torch's meta device: its shapes, at no cost."""
    pipeline = open_pipeline(name)
    component_dir, kind = pipeline.component_dir(component), _class(pipeline, component)
    try:
        with torch.device("meta"):
            if kind.__module__.startswith("transformers"):
                return kind(kind.config_class.from_pretrained(component_dir)).eval()
            return kind.from_config(kind.load_config(component_dir)).eval()
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"teacher {pipeline.folder}: {component} has no config that can be read: {str(error).splitlines()[0]}"
        ) from error


def load_tokenizer(name: str, component: str = "tokenizer") -> Any:
    """One of the pipeline's tokenizers."""
    pipeline = open_pipeline(name)
    component_dir, kind = pipeline.component_dir(component), _class(pipeline, component)
    try:
        return kind.from_pretrained(component_dir)
    except (OSError, ValueError) as error:
        raise UserError(
            f"teacher {pipeline.folder}: {component} cannot be loaded: {str(error).splitlines()[0]}"
        ) from error


def load_unet(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """The U-Net of a pipeline that students are made of: a UNet2DConditionModel of Stable Diffusion, else a
    UNet2DModel; eval, frozen."""
    _expect_student(name)
    return load_model(name, "unet", dtype)


def vae_piece(name: str) -> str | None:
    """The piece that turns latents to pixels; None for pipelines that work in pixels."""
    return next(
        (component for component in open_pipeline(name).components if component in ("vae", "vqvae")), None
    )


def load_vae(name: str) -> Any:
    """The pipeline's autoencoder: fp32, eval, frozen. A pipeline in pixel space has a PixelSpace instead."""
    component = vae_piece(name)
    if component is None:
        return PixelSpace(int(load_on_meta(name, "unet").config.in_channels))
    return load_model(name, component)


def load_autoencoder(name: str) -> Any:
    """The autoencoder in a folder of its own, or a pipeline's as in `load_vae`: fp32, eval, frozen.

    Raises UserError for what is neither, and for classes that `d2g.diffusion.latents` does not know.
    """
    if (component_dir := _autoencoder_home(name)) is None:
        return load_vae(name)
    import diffusers

    diffusers.utils.logging.disable_progress_bar()
    try:
        kind = json.loads((component_dir / "config.json").read_text(encoding="utf-8")).get("_class_name")
    except (ValueError, AttributeError) as error:
        raise UserError(
            f"{component_dir / 'config.json'} is not readable as JSON ({error}); copy it again"
        ) from error
    if kind not in AUTOENCODERS:
        raise UserError(f"autoencoder {component_dir} is a {kind}; supported: {', '.join(AUTOENCODERS)}")
    return _with_weights(
        component_dir, getattr(diffusers, kind), torch.float32, f"autoencoder {component_dir}"
    )


def autoencoder_sha256(name: str) -> str:
    """sha256 over the files that decide the latents of `load_autoencoder(name)`."""
    if (component_dir := _autoencoder_home(name)) is None:
        component = vae_piece(name)
        component_dir = open_pipeline(name).component_dir(component) if component else None
    return piece_sha256(component_dir) if component_dir else "pixels"


def _autoencoder_home(name: str) -> Path | None:
    """The folder, if it holds an autoencoder and no pipeline."""
    folder = Path(name)
    alone = (folder / "config.json").is_file() and not (folder / "model_index.json").is_file()
    return folder if alone else None


def latent_downscale(name: str) -> int:
    """Pixels of a picture's side by its latents', from the autoencoder's config alone."""
    component = vae_piece(name)
    return latent_space(load_on_meta(name, component) if component else load_vae(name)).downscale


def _expect_student(name: str) -> None:
    if (kind := open_pipeline(name).kind) not in STUDENTS:
        raise UserError(f"teacher {name} is a {kind}; students are made of {' or '.join(STUDENTS)} teachers")


class TextEncoder(nn.Module):
    """Tokenizer and CLIP text model: prompts -> hidden states [B, L, D], as StableDiffusionPipeline encodes
    them.
    """

    def __init__(self, tokenizer: Any, model: nn.Module) -> None:
        super().__init__()
        self.tokenizer, self.model = tokenizer, model

    def tokens(self, prompts: Sequence[str]) -> Tensor:
        """Token ids [B, L], padded and cut to the model's length."""
        ids = self.tokenizer(
            list(prompts),
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        return cast(Tensor, ids)

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids [B, L] -> hidden states [B, L, D]."""
        return cast(Tensor, self.model(tokens.to(next(self.model.parameters()).device))[0])

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> hidden states [B, L, D], without a graph."""
        return self.forward(self.tokens(prompts))


Encoder = TextEncoder | TextEncoderXL | LabelEncoder | NoEncoder
"""What turns prompts into what a U-Net is told: each has `encode(prompts)`."""


def load_text_encoder(name: str) -> Encoder:
    """The CLIP text encoder of a StableDiffusionPipeline, or the two of SDXL, with their tokenizers; of a
    pipeline that knows no text, what reads class numbers, or nothing."""
    _expect_student(name)
    pipeline = open_pipeline(name)
    if pipeline.kind not in TEXT_STUDENTS:
        embeddings = load_on_meta(name, "unet").config.num_class_embeds
        count, _ = classes(pipeline, embeddings)
        return NoEncoder() if embeddings is None else LabelEncoder(count)
    if pipeline.kind == "StableDiffusionPipeline":
        encoder = TextEncoder(load_tokenizer(name), load_model(name, "text_encoder"))
        return encoder.eval().requires_grad_(False)
    numbers = ("", "_2")
    both = TextEncoderXL(
        [load_tokenizer(name, f"tokenizer{n}") for n in numbers],
        [load_model(name, f"text_encoder{n}") for n in numbers],
    )
    return both.eval().requires_grad_(False)


def default_prompts(name: str) -> list[str]:
    """What a pipeline's students are asked for where nobody says: every class in turn, or nothing; of text,
    nothing stands for all, and the list is empty."""
    if open_pipeline(name).kind in TEXT_STUDENTS:
        return []
    encoder = load_text_encoder(name)
    return [str(label) for label in range(encoder.count)] if isinstance(encoder, LabelEncoder) else [""]


def attention_parameters(unet: nn.Module) -> set[str]:
    """Names of the parameters inside attention layers and their transformer blocks (the weight-decay
    rule).
    """
    return {name for name, _ in unet.named_parameters() if ".attentions." in f".{name}"}


def layers(network: nn.Module) -> Iterator[nn.Module]:
    """The layers that hold nearly all weights and activations of a U-Net, or of what is built around one:
    residual blocks, transformer blocks, and attentions without such.

    They are what FSDP2 gathers at once, and what activation checkpointing computes again.
    """
    for module in network.modules():
        kind = type(module).__name__
        if kind.startswith("ResnetBlock") or kind == "BasicTransformerBlock":
            yield module
        elif kind == "AttentionBlock" or (kind == "Attention" and hasattr(module, "group_norm")):
            if getattr(module, "group_norm", None) is not None:
                yield module


def new_unet(**settings: Any) -> Any:
    """A UNet2DConditionModel with fresh weights."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(**settings)


def new_vae(**settings: Any) -> Any:
    """An AutoencoderKL with fresh weights."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(**settings)


def new_tokenizer(captions: Iterable[str], folder: Path, vocab_size: int, max_length: int) -> Any:
    """A CLIP-style byte-pair tokenizer learnt from captions, saved to and loaded back from `folder`."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    special = ["<|startoftext|>", "<|endoftext|>"]
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token=special[1]))
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    # CLIP's own split: words, single digits, runs of punctuation.
    pattern = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(_regex(pattern), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    texts = list(captions)
    words = {
        word
        for text in sorted(set(texts))
        for word, _ in bpe.pre_tokenizer.pre_tokenize_str(bpe.normalizer.normalize_str(text))
    }
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        # The trainer numbers word-final letters in hash order, which also breaks ties between merges; named
        # here, they get their numbers from us, and equal captions give equal tokenizers.
        special_tokens=sorted({f"{word[-1]}</w>" for word in words}),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    learnt = json.loads(bpe.to_str())["model"]
    vocab = dict(learnt["vocab"])
    for token in special:  # last, as in CLIP: the text model pools at the highest id
        vocab[token] = len(vocab)
    merges = [tuple(m) if not isinstance(m, str) else tuple(m.split(" ")) for m in learnt["merges"]]
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=max_length)
    tokenizer.save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)


def _regex(pattern: str) -> Any:
    from tokenizers import Regex

    return Regex(pattern)


def new_text_encoder(tokenizer: Any, width: int, layers: int, heads: int) -> TextEncoder:
    """A CLIP text model with fresh weights for `tokenizer`."""
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return TextEncoder(tokenizer, CLIPTextModel(config))


SD_BETAS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000)


def save_pipeline(
    folder: Path, *, unet: nn.Module, vae: nn.Module, text: TextEncoder, **scheduler: Any
) -> None:
    """Save the pieces as a StableDiffusionPipeline with a DDIM scheduler of SD's betas (plus `scheduler`
    settings).
    """
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    StableDiffusionPipeline(
        vae=vae,
        unet=unet,
        text_encoder=text.model,
        tokenizer=text.tokenizer,
        scheduler=DDIMScheduler(**{**SD_BETAS, "clip_sample": False, "steps_offset": 1, **scheduler}),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder, safe_serialization=True)


def save_piece(module: nn.Module, folder: Path) -> None:
    """Save one diffusers or transformers model as config.json and safetensors."""
    cast(Any, module).save_pretrained(folder, safe_serialization=True)
