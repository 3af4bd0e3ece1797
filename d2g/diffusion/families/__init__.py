"""From a pipeline's files to its conditioner: what each family needs to know, and what we refuse by name."""

from typing import Any

from d2g.core.errors import SettingError, UserError
from d2g.diffusion.conditioning import Conditioner, Labels, Text, Text3, TextPixArt, TextXL
from d2g.diffusion.latents import LatentSpace
from d2g.diffusion.pipelines import Pipeline, classes

T5_TOKENS = {"StableDiffusion3Pipeline": 256, "PixArtAlphaPipeline": 120, "PixArtSigmaPipeline": 300}
"""max_sequence_length of diffusers' own pipelines, by default."""

EMPTY = "the empty prompt"


def check_network(pipeline: Pipeline, config: Any, space: LatentSpace) -> tuple[int, int, int]:
    """(C, h, w) of the latents that a network was trained on, from its config.

    Raises UserError for networks that take more than latents in, give out something else, or do not say their
    size.
    """
    where = f"teacher {pipeline.folder}: {type_of(pipeline)}"
    if config.in_channels != space.channels:
        raise UserError(
            f"{where} takes {config.in_channels} channels, but latents have {space.channels}; "
            "networks for inpainting or editing are no teachers"
        )
    given = config.out_channels or config.in_channels  # a DiT may leave it out
    if given not in (space.channels, 2 * space.channels):
        raise UserError(
            f"{where} gives {given} channels; expected {space.channels}, "
            f"or {2 * space.channels} with a learned variance"
        )
    for key in ("time_cond_proj_dim", "class_embed_type", "encoder_hid_dim_type"):
        if getattr(config, key, None) is not None:
            raise UserError(f"{where} has {key}={getattr(config, key)}, which {pipeline.kind} never feeds")
    size = config.sample_size
    if size is None:
        raise UserError(f"{where} has no sample_size; write the latents' side into its config.json")
    height, width = (size, size) if isinstance(size, int) else size
    return space.channels, int(height), int(width)


def check_size(name: str, config: Any, size: tuple[int, int]) -> None:
    """Raise SettingError for a latent height and width that a network, by its config, cannot take."""
    patch, most = getattr(config, "patch_size", None), getattr(config, "pos_embed_max_size", None)
    if patch:
        unit = int(patch)
    else:  # a UNet2DConditionModel crops what its last levels give too much, a UNet2DModel does not
        unit = 1 if hasattr(config, "cross_attention_dim") else 2 ** (len(config.block_out_channels) - 1)
    if any(side < unit or side % unit for side in size):
        raise SettingError(f"latent size is {size[0]}x{size[1]}; teacher {name} takes multiples of {unit}")
    if most and max(size) > most * unit:
        raise SettingError(f"latent size is {size[0]}x{size[1]}; teacher {name} takes {most * unit} at most")


def type_of(pipeline: Pipeline) -> str:
    """The class of a pipeline's network, as model_index.json has it."""
    return str(pipeline.class_name(network_piece(pipeline)))


def network_piece(pipeline: Pipeline) -> str:
    """The piece that denoises."""
    return "unet" if "unet" in pipeline.components else "transformer"


def conditioner(
    pipeline: Pipeline,
    config: Any,
    space: LatentSpace,
    models: dict[str, Any],
    tokenizers: dict[str, Any],
) -> Conditioner:
    """How this pipeline's network (whose `config` is given) is told what to draw."""
    components: dict[str, Any] = {"models": models, "tokenizers": tokenizers}
    kind = pipeline.kind
    if kind == "StableDiffusionPipeline":
        _expect_added(pipeline, config, None)
        if getattr(models["text_encoder"].config, "use_attention_mask", False):
            raise UserError(
                f"teacher {pipeline.folder}: text_encoder has use_attention_mask; CLIP's have none"
            )
        return Text(**components, facts={"no_prompt": EMPTY})
    if kind == "StableDiffusionXLPipeline":
        _expect_added(pipeline, config, "text_time")
        _check_time_ids(pipeline, config, models["text_encoder_2"].config.projection_dim)
        zeros = bool(pipeline.index.get("force_zeros_for_empty_prompt", True))
        facts = {"no_prompt": "zeros" if zeros else EMPTY, "time_ids": "height, width, 0, 0, height, width"}
        return TextXL(**components, downscale=space.downscale, zeros=zeros, facts=facts)
    if kind == "StableDiffusion3Pipeline":
        return Text3(
            **components,
            width=config.joint_attention_dim,
            t5_tokens=T5_TOKENS[kind],
            facts={
                "no_prompt": EMPTY,
                "t5_tokens": T5_TOKENS[kind],
                "t5": "encoded" if "text_encoder_3" in models else "absent: zeros",
            },
        )
    if kind.startswith("PixArt"):
        asked = config.use_additional_conditions
        sized = config.sample_size == 128 if asked is None else bool(asked)
        return TextPixArt(
            **components,
            downscale=space.downscale,
            t5_tokens=T5_TOKENS[kind],
            sized=sized,
            facts={
                "no_prompt": EMPTY,
                "t5_tokens": T5_TOKENS[kind],
                "captions": "lower case, stripped",
                "micro_conditions": "height, width, height / width" if sized else None,
            },
        )
    if kind == "DiTPipeline":
        count = int(config.num_embeds_ada_norm)
        return Labels(
            num_labels=count,
            null_label=count,
            label_names=_names(pipeline, count),
            facts={"null_label": count},
        )
    return _unet2d(pipeline, config)


def _unet2d(pipeline: Pipeline, config: Any) -> Conditioner:
    count, null = classes(pipeline, config.num_class_embeds)
    if config.num_class_embeds is None:
        return Conditioner()
    return Labels(
        num_labels=count,
        null_label=null,
        label_names=_names(pipeline, count),
        facts={"null_label": null},
    )


def _expect_added(pipeline: Pipeline, config: Any, expected: str | None) -> None:
    if config.addition_embed_type != expected:
        raise UserError(
            f"teacher {pipeline.folder}: the UNet has addition_embed_type={config.addition_embed_type}; "
            f"a {pipeline.kind} expects {expected}"
        )


def _check_time_ids(pipeline: Pipeline, config: Any, pooled: int) -> None:
    takes = config.projection_class_embeddings_input_dim
    if takes != 6 * config.addition_time_embed_dim + pooled:
        raise UserError(
            f"teacher {pipeline.folder}: the UNet takes {takes} added numbers; expected six time ids of "
            f"{config.addition_time_embed_dim} and {pooled} of text (SDXL's refiner is no teacher)"
        )


def _names(pipeline: Pipeline, count: int) -> list[str] | None:
    """Class names, where model_index.json has id2label."""
    names = pipeline.index.get("id2label")
    return None if not isinstance(names, dict) else [str(names.get(str(i), i)) for i in range(count)]
