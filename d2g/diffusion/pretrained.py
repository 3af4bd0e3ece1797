"""Models of a pipeline, loaded from its folder or built new: the entry point to transformers and tokenizers.

`d2g.diffusion.pipelines` finds pipelines on disk, `d2g.diffusion.scheduler_files` reads their schedules. The
`new_*` functions build components of Stable Diffusion's shape, for the miniature and the tests.
"""

import json
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from d2g.core.atomic_files import share_weights, write_atomically
from d2g.core.errors import UserError, first_line
from d2g.core.json_files import COPY_AGAIN, read_json_object
from d2g.core.machine_errors import raise_machine_error
from d2g.diffusion.conditioning import Conditioner, TextConditioner, encoder_of
from d2g.diffusion.families.base import Pipeline
from d2g.diffusion.families.registry import FAMILIES
from d2g.diffusion.families.sd import SDConditioner
from d2g.diffusion.latents import PixelSpace, latent_space
from d2g.diffusion.pipelines import SHIPPED as SHIPPED
from d2g.diffusion.pipelines import choose_weights, component_sha256, family_of, open_pipeline
from d2g.diffusion.pipelines import denoiser_sha256 as denoiser_sha256
from d2g.diffusion.pipelines import resolve as resolve
from d2g.diffusion.pipelines import teacher_digests as teacher_digests
from d2g.diffusion.pipelines import weights_sha256 as weights_sha256
from d2g.diffusion.schedule import Schedule
from d2g.diffusion.scheduler_files import load_schedule as load_schedule

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the loader workers fork

_NO_LENGTH = 10**9
"""transformers gives a tokenizer without `model_max_length` a larger number than this."""

AUTOENCODERS = ("AutoencoderKL", "AutoencoderTiny", "AutoencoderDC", "VQModel")
"""Classes of autoencoders that may have a folder of their own."""


_WUERSTCHEN = ("PaellaVQModel", "WuerstchenPrior", "WuerstchenDiffNeXt")
"""Classes that diffusers does not have at its top level."""


def _passes(record: logging.LogRecord) -> bool:
    """Drop diffusers' warning at every load of an AutoencoderTiny, which saves an attribute that it does not
    read again."""
    text = record.getMessage()
    return not ("'block_out_channels'" in text and "passed to AutoencoderTiny" in text)


logging.getLogger("diffusers.configuration_utils").addFilter(_passes)


def _class(pipeline: Pipeline, component: str) -> Any:
    """The class to load a component with: for autoencoders and tokenizers the one in model_index.json."""
    import diffusers
    import transformers
    from diffusers.pipelines.deprecated import wuerstchen

    diffusers.utils.logging.disable_progress_bar()  # the caller reports progress
    transformers.utils.logging.disable_progress_bar()
    name = (
        pipeline.class_name(component)
        if "vae" in component or "token" in component
        else pipeline.family.components[component][0]
    )
    if str(name) in _WUERSTCHEN:
        return getattr(wuerstchen, str(name))
    return getattr(diffusers, str(name), None) or getattr(transformers, str(name))


def load_model(name: str, component: str, dtype: torch.dtype = torch.float32) -> Any:
    """A component with its weights: from safetensors, directly in `dtype`, in eval mode, frozen.

    Raises UserError for a missing component or class, and for weights that are missing, damaged or
    incomplete.
    """
    pipeline = open_pipeline(name)
    module = _with_weights(
        pipeline.component_dir(component),
        _class(pipeline, component),
        dtype,
        f"teacher {pipeline.folder}: {component}",
    )
    return _corrected(pipeline, component, module)


def _corrected(pipeline: Pipeline, component: str, module: Any) -> Any:
    """The module, with the settings that the constructor of its pipeline overwrites, and as its family adapts
    it.
    """
    file = pipeline.component_dir(component) / "config.json"
    if changes := pipeline.family.corrected_config(component, read_json_object(file, COPY_AGAIN)):
        module.register_to_config(**changes)
    pipeline.family.adapt(component, module)
    return module


_UNMERGED = (
    "that are not merged ({}); in diffusers, load the pipeline, then fuse_lora, unload_lora_weights and "
    "save_pretrained"
)
"""How the error about adapters goes on, with an example."""


def _with_weights(folder: Path, kind: Any, dtype: torch.dtype, what: str) -> Any:
    """A model of class `kind` from a folder; `what` begins the error messages."""
    # transformers and diffusers name the dtype differently.
    keyword = "dtype" if kind.__module__.startswith("transformers") else "torch_dtype"
    try:
        # transformers would add these to the weights, or load the model that they name.
        if (folder / "adapter_config.json").exists():
            raise ValueError(f"it holds LoRA adapters {_UNMERGED.format('adapter_config.json')}")
        variant, _ = choose_weights(path.name for path in folder.iterdir())
        module, report = kind.from_pretrained(
            folder, variant=variant, use_safetensors=True, output_loading_info=True, **{keyword: dtype}
        )
        # Adapters that are not merged would be left out, or keep the weights below them from being found.
        if adapters := sorted(key for key in report["unexpected_keys"] if "lora" in key.lower()):
            raise ValueError(f"its weights hold LoRA adapters {_UNMERGED.format(f'{adapters[0]}, ...')}")
        if report["missing_keys"]:  # diffusers would fill them with random numbers and a warning
            raise ValueError(f"its weights lack {', '.join(sorted(report['missing_keys'])[:3])}")
    except Exception as error:  # on odd configs and damaged files, these constructors raise almost anything
        raise_machine_error(error, what)
        raise UserError(f"{what} cannot be loaded: {first_line(error)}") from error
    return module.eval().requires_grad_(False)


def load_on_meta(name: str, component: str) -> Any:
    """A component without weights, on torch's meta device: its config and shapes, at no cost."""
    pipeline = open_pipeline(name)
    folder, kind = pipeline.component_dir(component), _class(pipeline, component)
    try:
        with torch.device("meta"):
            if kind.__module__.startswith("transformers"):
                return kind(kind.config_class.from_pretrained(folder)).eval()
            return _corrected(pipeline, component, kind.from_config(kind.load_config(folder)).eval())
    except Exception as error:  # on odd configs, these constructors raise almost anything
        raise_machine_error(error)
        reason = first_line(error)
        raise UserError(
            f"teacher {pipeline.folder}: {component} has no config that can be read: {reason}"
        ) from error


def load_tokenizer(name: str, component: str = "tokenizer") -> Any:
    """One of the pipeline's tokenizers, with a length: without `model_max_length` it takes that of its text
    encoder. Raises UserError if it cannot be loaded.
    """
    pipeline = open_pipeline(name)
    folder, kind = pipeline.component_dir(component), _class(pipeline, component)
    try:
        tokenizer = kind.from_pretrained(folder)
    except Exception as error:  # tokenizers raises plain Exceptions
        raise_machine_error(error)
        raise UserError(
            f"teacher {pipeline.folder}: {component} cannot be loaded: {first_line(error)}"
        ) from error
    if tokenizer.model_max_length >= _NO_LENGTH:
        encoder: Any = load_on_meta(name, encoder_of(component))
        places = getattr(encoder.config, "max_position_embeddings", None)
        tokenizer.model_max_length = places or tokenizer.model_max_length
    return tokenizer


def load_unet(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """The U-Net of a pipeline that students can be made of, in eval mode, frozen.

    A UNet2DConditionModel of Stable Diffusion, or a UNet2DModel. Raises UserError for other families.
    """
    expect_student_family(name)
    return load_model(name, "unet", dtype)


def load_vae(name: str) -> Any:
    """The pipeline's autoencoder: fp32, in eval mode, frozen; a `PixelSpace` for pipelines in pixel space."""
    family = family_of(name)
    if family.autoencoder is None:
        return PixelSpace(family.latent_shape(load_on_meta(name, family.network).config)[0])
    return load_model(name, family.autoencoder)


def load_autoencoder(name: str) -> Any:
    """The autoencoder in a folder of its own, or a pipeline's as in `load_vae`: fp32, in eval mode, frozen.

    Raises UserError for a folder that is neither, and for classes that `d2g.diffusion.latents` does not know.
    """
    if (folder := _standalone_autoencoder(name)) is None:
        return load_vae(name)
    # A folder of its own, as `save_pretrained` of an autoencoder writes it.
    import diffusers

    diffusers.utils.logging.disable_progress_bar()
    kind = read_json_object(folder / "config.json", COPY_AGAIN).get("_class_name")
    if kind not in AUTOENCODERS:
        raise UserError(f"autoencoder {folder} is a {kind}; supported: {', '.join(AUTOENCODERS)}")
    return _with_weights(folder, getattr(diffusers, kind), torch.float32, f"autoencoder {folder}")


def autoencoder_sha256(name: str) -> str:
    """sha256 over the files that decide the latents of `load_autoencoder(name)`; "pixels" in pixel space."""
    if (folder := _standalone_autoencoder(name)) is not None:
        return component_sha256(folder)
    pipeline = open_pipeline(name)
    component = pipeline.family.autoencoder
    return component_sha256(pipeline.component_dir(component)) if component else "pixels"


def _standalone_autoencoder(name: str) -> Path | None:
    """The folder `name`, if it holds an autoencoder and no pipeline."""
    folder = Path(name)
    standalone = (folder / "config.json").is_file() and not (folder / "model_index.json").is_file()
    return folder if standalone else None


def autoencoder_on_meta(name: str) -> Any:
    """The pipeline's autoencoder without weights; a `PixelSpace` for pipelines in pixel space."""
    component = family_of(name).autoencoder
    return load_on_meta(name, component) if component else load_vae(name)


def latent_shape(name: str) -> tuple[int, int, int]:
    """The latent shape (C, h, w) at which a teacher's network was trained, from its config alone."""
    family = family_of(name)
    return family.latent_shape(load_on_meta(name, family.network).config)


def latent_downscale(name: str) -> int:
    """Pixels per latent along a side, from the autoencoder's config alone."""
    return latent_space(autoencoder_on_meta(name)).downscale


def expect_student_family(name: str) -> None:
    """Raise UserError for a teacher of a family that no student can be made of."""
    pipeline = open_pipeline(name)
    if not pipeline.family.regression:
        supported = [kind for family in FAMILIES.values() if family.regression for kind in family.pipelines]
        raise UserError(
            f"teacher {name} is a {pipeline.kind}; students are made of {' or '.join(supported)} teachers"
        )


def conditioner_on_meta(name: str) -> Conditioner:
    """The conditioner of a teacher, whose text encoders have no weights yet.

    Raises UserError for components without a config, and for networks and encoders that do not fit the
    pipeline.
    """
    pipeline = open_pipeline(name)
    config = load_on_meta(name, pipeline.family.network).config
    models = {c: load_on_meta(name, c) for c in pipeline.components if c.startswith("text_encoder")}
    tokenizers = {c: load_tokenizer(name, c) for c in pipeline.components if c.startswith("tokenizer")}
    conditioner = pipeline.family.conditioner(pipeline, config, models, tokenizers).eval()
    if isinstance(conditioner, TextConditioner):
        try:
            conditioner.check_lengths()
        except UserError as error:
            raise UserError(f"teacher {pipeline.folder}: {error}") from error
    return conditioner


def is_unconditional(name: str) -> bool:
    """Whether a teacher takes neither text nor classes, from its configs alone."""
    return not family_of(name).reads_text and conditioner_on_meta(name).kind == "none"


def load_conditioner(name: str, dtype: torch.dtype = torch.float32) -> Conditioner:
    """The conditioner of a teacher, with its text encoders in `dtype`, in eval mode, frozen.

    Raises UserError as `conditioner_on_meta` and `load_model` do.
    """
    return load_text_encoders(name, conditioner_on_meta(name), dtype, "cpu")


def load_text_encoders(
    name: str, conditioner: Conditioner, dtype: torch.dtype, device: torch.device | str
) -> Conditioner:
    """Replace the text encoders of a conditioner on meta, in place, by those with weights, in `dtype`,
    frozen."""
    for component in conditioner.models:
        conditioner.models[component] = load_model(name, component, dtype).to(device)
    return conditioner


def default_prompts(name: str) -> list[str]:
    """Prompts for a teacher's students when the user gives none: every class in turn, or one empty prompt;
    an empty list for text."""
    return [] if family_of(name).reads_text else conditioner_on_meta(name).default_prompts


def new_model(kind: str, **settings: Any) -> Any:
    """A network with fresh weights, or a scheduler, by the name of its class in diffusers."""
    import diffusers

    return getattr(diffusers, kind)(**settings)


def new_unet(**settings: Any) -> Any:
    """A UNet2DConditionModel with fresh weights."""
    return new_model("UNet2DConditionModel", **settings)


def new_vae(**settings: Any) -> Any:
    """An AutoencoderKL with fresh weights."""
    return new_model("AutoencoderKL", **settings)


def new_tokenizer(captions: Iterable[str], folder: Path, vocab_size: int, max_length: int) -> Any:
    """A CLIP-style byte-pair tokenizer trained on captions, saved to and loaded back from `folder`.

    Equal captions give equal tokenizers in every process.
    """
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
    # All words of the captions, for their last letters below.
    texts = list(captions)
    words = {
        word
        for text in sorted(set(texts))
        for word, _ in bpe.pre_tokenizer.pre_tokenize_str(bpe.normalizer.normalize_str(text))
    }
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        # The trainer numbers word-final letters in hash order, which also decides ties between merges. As
        # special tokens they are numbered in our order.
        special_tokens=sorted({f"{word[-1]}</w>" for word in words}),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    model = json.loads(bpe.to_str())["model"]
    # The special tokens come last, as in CLIP: its text model pools at the highest id.
    vocab = dict(model["vocab"])
    for token in special:
        vocab[token] = len(vocab)
    merges = [tuple(m) if not isinstance(m, str) else tuple(m.split(" ")) for m in model["merges"]]
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=max_length)
    tokenizer.save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)


def _regex(pattern: str) -> Any:
    from tokenizers import Regex

    return Regex(pattern)


def new_conditioner(tokenizer: Any, width: int, layers: int, heads: int) -> SDConditioner:
    """Stable Diffusion's conditioner for `tokenizer`, with a CLIP text model of fresh weights."""
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
    return SDConditioner({"text_encoder": CLIPTextModel(config)}, {"tokenizer": tokenizer})


SD_BETAS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000)
"""Stable Diffusion's noise schedule, as settings of a scheduler of diffusers."""


def new_sd_scheduler(**settings: Any) -> Any:
    """A DDIMScheduler with SD's betas, as Stable Diffusion's pipelines have it; `settings` override."""
    return new_model("DDIMScheduler", **{**SD_BETAS, "clip_sample": False, "steps_offset": 1, **settings})


def sd_schedule() -> Schedule:
    """The schedule of `new_sd_scheduler` for networks that predict epsilon."""
    alphas = new_sd_scheduler().alphas_cumprod.double()
    return Schedule(
        alphas_cumprod=alphas, prediction="epsilon", spacing="leading", steps_offset=1, final_alpha_one=True
    )


def save_diffusers_pipeline(folder: Path, kind: str, index: Mapping[str, Any], **components: Any) -> None:
    """Save components as a pipeline of diffusers by the name of its class.

    index: further keys of its model_index.json, which `save_pretrained` leaves out.
    """
    new_model(kind, **components).save_pretrained(folder, safe_serialization=True)
    for component in components:
        share_weights(folder / component)
    file = folder / "model_index.json"
    content = {**read_json_object(file, COPY_AGAIN), **index}
    write_atomically(file, json.dumps(content, indent=2))


def save_pipeline(
    folder: Path, *, unet: nn.Module, vae: nn.Module, conditioner: SDConditioner, **scheduler: Any
) -> None:
    """Save the components as a StableDiffusionPipeline with a DDIM scheduler of SD's betas.

    scheduler: further settings of the DDIM scheduler.
    """
    import transformers
    from diffusers import StableDiffusionPipeline

    transformers.utils.logging.disable_progress_bar()  # the caller reports progress
    StableDiffusionPipeline(
        vae=vae,
        unet=unet,
        text_encoder=conditioner.models["text_encoder"],
        tokenizer=conditioner.tokenizers["tokenizer"],
        scheduler=new_sd_scheduler(**scheduler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder, safe_serialization=True)
    for component in ("vae", "unet", "text_encoder"):
        share_weights(folder / component)


def save_component(module: nn.Module, folder: Path) -> None:
    """Save one diffusers or transformers model as config.json and safetensors."""
    cast(Any, module).save_pretrained(folder, safe_serialization=True)
    share_weights(folder)
