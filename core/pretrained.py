"""The one door to diffusers, transformers and tokenizers: pieces of a Stable-Diffusion-shaped pipeline.

Everything loads from a folder in diffusers layout or from a hub id, and is built new from plain settings by
the `new_*` functions (the miniature and the tests do).
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from core.errors import UserError
from core.schedule import Schedule

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the loader workers fork

PIECES = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL", "AutoencoderTiny"),
    "text_encoder": ("CLIPTextModel",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "scheduler": (),
}


SHIPPED = {"miniature": Path(__file__).resolve().parents[1] / "miniature" / "weights"}
"""Names that stand for folders in this distribution: teacher/, student/ and more inside each."""


def resolve(name: str) -> Path:
    """The folder of a pipeline: `name` itself if it is one, a shipped name's, or the snapshot of a hub id.

    Raises UserError for a missing folder, a folder without model_index.json, and a failed download.
    """
    folder = SHIPPED[name] / "teacher" if name in SHIPPED else Path(name)
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise UserError(
                f"teacher {name}: no model_index.json; expected a folder in diffusers layout, "
                "as StableDiffusionPipeline.save_pretrained writes"
            )
        return folder
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name):
        raise UserError(
            f"teacher {name}: no such folder; give a folder in diffusers layout or a hub id org/name"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        patterns = ["model_index.json", *(f"{piece}/*" for piece in PIECES)]
        return Path(
            snapshot_download(name, allow_patterns=patterns, ignore_patterns=["*.bin", "*.fp16.*", "*.ckpt"])
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        first = str(error).splitlines()[0]
        raise UserError(
            f"teacher {name}: no such folder here, and as a hub id it cannot be fetched ({first}); "
            "check the name"
        ) from error


def _piece(folder: Path, piece: str) -> tuple[Any, str]:
    """The class of a pipeline's piece, by its name in model_index.json, and that name."""
    index = json.loads((folder / "model_index.json").read_text())
    entry = index.get(piece)
    if not entry or entry[0] is None or not (folder / piece).is_dir():
        raise UserError(
            f"teacher {folder}: no {piece}; expected the pieces {', '.join(PIECES)} in diffusers layout; "
            f"found {', '.join(sorted(p.name for p in folder.iterdir() if p.is_dir())) or 'none'}"
        )
    library, name = entry
    if PIECES[piece] and name not in PIECES[piece]:
        raise UserError(f"teacher {folder}: {piece} is a {name}; supported: {', '.join(PIECES[piece])}")
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()  # progress is the caller's business
    transformers.utils.logging.disable_progress_bar()
    return getattr(transformers if library == "transformers" else diffusers, name), name


def _load(name: str, piece: str, dtype: torch.dtype = torch.float32) -> Any:
    folder = resolve(name)
    kind, _ = _piece(folder, piece)
    keyword = "dtype" if piece == "text_encoder" else "torch_dtype"
    try:
        module = kind.from_pretrained(folder, subfolder=piece, **{keyword: dtype})
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"teacher {folder}: {piece} cannot be loaded: {str(error).splitlines()[0]}"
        ) from error
    return module.eval().requires_grad_(False)


def load_unet(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """The pipeline's UNet2DConditionModel: eval, frozen."""
    return _load(name, "unet", dtype)


def load_vae(name: str) -> Any:
    """The pipeline's AutoencoderKL or AutoencoderTiny: fp32, eval, frozen."""
    return _load(name, "vae")


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


def load_tokenizer(name: str) -> Any:
    """The pipeline's CLIP tokenizer."""
    folder = resolve(name)
    kind, _ = _piece(folder, "tokenizer")
    try:
        return kind.from_pretrained(folder / "tokenizer")
    except (OSError, ValueError) as error:
        raise UserError(
            f"teacher {folder}: tokenizer cannot be loaded: {str(error).splitlines()[0]}"
        ) from error


def load_text_encoder(name: str) -> TextEncoder:
    """The pipeline's CLIP text encoder with its tokenizer."""
    return TextEncoder(load_tokenizer(name), _load(name, "text_encoder")).eval().requires_grad_(False)


def load_schedule(name: str) -> Schedule:
    """The noise schedule and sampler conventions in the pipeline's scheduler_config.json, whatever its class.

    Raises UserError for schedulers that are not variance-preserving (flow matching), or clip or threshold
    x_0.
    """
    folder = resolve(name)
    _, kind = _piece(folder, "scheduler")
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    if "beta_start" not in config and "trained_betas" not in config:
        raise UserError(
            f"teacher {folder}: scheduler {kind} has no betas; expected a VP schedule like DDIM's"
        )
    for flag in ("clip_sample", "thresholding"):
        if config.get(flag):
            raise UserError(
                f"teacher {folder}: scheduler has {flag}=true, which latent teachers never use; set it false"
            )
    from diffusers import DDIMScheduler

    known = {k: v for k, v in config.items() if not k.startswith("_")}
    ddim = DDIMScheduler.from_config({**known, "clip_sample": False})
    return Schedule(
        alphas_cumprod=ddim.alphas_cumprod.double(),
        prediction=config.get("prediction_type", "epsilon"),
        spacing=config.get("timestep_spacing", "leading"),
        steps_offset=int(config.get("steps_offset", 0)),
        final_alpha_one=bool(config.get("set_alpha_to_one", True)),
    )


def weights_sha256(name: str) -> str:
    """sha256 over the files that decide what a teacher draws: UNet, text encoder, tokenizer, scheduler,
    VAE.
    """
    folder, total = resolve(name), hashlib.sha256()
    for piece in sorted(PIECES):
        for path in sorted((folder / piece).glob("*")):
            if path.suffix in (".json", ".safetensors", ".txt"):
                total.update(path.name.encode())
                with open(path, "rb") as file:
                    total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def attention_parameters(unet: nn.Module) -> set[str]:
    """Names of the parameters inside attention layers and their transformer blocks (the weight-decay
    rule).
    """
    return {name for name, _ in unet.named_parameters() if ".attentions." in f".{name}"}


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
