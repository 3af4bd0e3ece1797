"""Tiny real teachers of every family except Stable Diffusion, saved as diffusers saves them.

Each takes well under a second. Images are 16 px, latents 4 x 4. Random weights are a little larger than
usual, so that conditioning and guidance change the latents by more than rounding does.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tiny
from d2g.diffusion.conditioning import Conditioning
from d2g.diffusion.pretrained import SD_BETAS, new_tokenizer, new_unet, new_vae
from d2g.diffusion.teacher import load_teacher
from pairgen.config import PairConfig
from tiny import CAPTIONS, save_lpips, save_prompts, save_teacher

LATENT = (4, 4, 4)
DDIM = dict(SD_BETAS, clip_sample=False, steps_offset=1, set_alpha_to_one=False)
# The betas of DDPM, DiT and PixArt, but ending at alpha = 0.22: a random network leaves about x / alpha in
# the latents, and large numbers cannot be compared to 1e-4 in fp32.
LINEAR = dict(num_train_timesteps=1000, beta_schedule="linear", beta_end=0.006, clip_sample=False)


def lively(module: nn.Module, scale: float = 1.5) -> Any:
    """The module in eval mode with larger matrices; parameters that are zero get small random numbers."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(scale if "embed" not in name else 1.0)
            if not parameter.any():
                parameter.normal_(std=0.1)
    return module.eval()


def clip(tokenizer: Any, width: int, pooled: bool) -> Any:
    """A CLIP text model of two layers, with or without the projection of its pooled output."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return lively((CLIPTextModelWithProjection if pooled else CLIPTextModel)(config))


def clip_tokenizer(folder: Path, pad: str | None = None) -> Any:
    """A CLIP tokenizer; SDXL's and SD3's second one pads with "!"."""
    tokenizer = new_tokenizer(CAPTIONS, folder, 320, 12)
    if pad is not None:
        tokenizer.pad_token = pad
    return tokenizer


def t5(width: int) -> tuple[Any, Any]:
    """A T5 tokenizer of letters and a T5 encoder of one layer."""
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0), ("\u2581red", -1.0)]
    vocab += [(letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz,ABCDEFGHIJKLMNOPQRSTUVWXYZ"]
    tokenizer = T5Tokenizer(vocab=vocab, extra_ids=0)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=8,
        d_ff=2 * width,
        num_layers=1,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    return tokenizer, T5EncoderModel(config).eval()


def vae(channels: int = 4, **settings: Any) -> Any:
    """An autoencoder of 16 px to 4 x 4."""
    return new_vae(
        sample_size=16,
        latent_channels=channels,
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=4,
        mid_block_add_attention=False,
        **{"scaling_factor": 0.7, **settings},
    )


def save_sdxl(folder: Path, zeros: bool = True, scheduler: Any = None, **settings: Any) -> str:
    """SDXL: two CLIPs, pooled text, time ids."""
    from diffusers import DDIMScheduler, StableDiffusionXLPipeline

    torch.manual_seed(0)
    tokenizers = clip_tokenizer(folder / "tokenizer"), clip_tokenizer(folder / "tokenizer_2", "!")
    unet = new_unet(
        sample_size=4,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2,
        norm_num_groups=4,
        cross_attention_dim=16 + 24,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 24,
    )
    StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=clip(tokenizers[0], 16, False),
        text_encoder_2=clip(tokenizers[1], 24, True),
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        unet=lively(unet),
        scheduler=(scheduler or DDIMScheduler).from_config({**DDIM, **settings}),
        force_zeros_for_empty_prompt=zeros,
        add_watermarker=False,
    ).save_pretrained(folder)
    return str(folder)


SD3: dict[str, Any] = {"dual_attention_layers": (), "qk_norm": None}
"""Settings of the transformer of SD3, which SD3.5 changed."""


def save_sd3(
    folder: Path, with_t5: bool = True, network: dict[str, Any] | None = None, **settings: Any
) -> str:
    """SD3.5: a block with a second attention among image tokens and one without, two CLIPs, maybe a T5.

    network: other settings of the transformer; SD3 is `SD3` below.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    torch.manual_seed(0)
    tokenizers = clip_tokenizer(folder / "tokenizer"), clip_tokenizer(folder / "tokenizer_2", "!")
    tokenizer_3, text_encoder_3 = t5(48) if with_t5 else (None, None)
    defaults: dict[str, Any] = dict(
        sample_size=4,
        patch_size=2,
        in_channels=8,
        out_channels=8,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=48,
        caption_projection_dim=16,
        pooled_projection_dim=16 + 24,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    StableDiffusion3Pipeline(
        transformer=lively(SD3Transformer2DModel(**{**defaults, **(network or {})})),
        vae=vae(8, scaling_factor=1.5305, shift_factor=0.0609),
        text_encoder=clip(tokenizers[0], 16, True),
        text_encoder_2=clip(tokenizers[1], 24, True),
        text_encoder_3=text_encoder_3,
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        tokenizer_3=tokenizer_3,
        scheduler=FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **settings}),
    ).save_pretrained(folder)
    return str(folder)


def save_flux(folder: Path, network: dict[str, Any] | None = None, **settings: Any) -> str:
    """FLUX.1-dev: a double and a single block, CLIP's pooled text, T5, guidance as an input.

    network: other settings of the transformer; `settings`: of the scheduler.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    torch.manual_seed(0)
    clip_tokens, (t5_tokens, t5_encoder) = clip_tokenizer(folder / "tokenizer"), t5(24)
    defaults: dict[str, Any] = dict(
        in_channels=4 * 8,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=16,
        guidance_embeds=True,
        axes_dims_rope=(4, 2, 2),
    )
    scheduler: dict[str, Any] = dict(
        shift=3.0, use_dynamic_shifting=True, base_image_seq_len=2, max_image_seq_len=16
    )
    FluxPipeline(
        transformer=lively(FluxTransformer2DModel(**{**defaults, **(network or {})})),
        vae=vae(8, scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=clip(clip_tokens, 16, False),
        text_encoder_2=t5_encoder,
        tokenizer=clip_tokens,
        tokenizer_2=t5_tokens,
        scheduler=FlowMatchEulerDiscreteScheduler(**{**scheduler, **settings}),
    ).save_pretrained(folder)
    # Published configs say no size; the pipeline's default, 1024 px, is too large for a test.
    edit(folder, "transformer/config.json", sample_size=4)
    return str(folder)


def save_pixart(
    folder: Path, sigma: bool, sized: bool = False, scheduler: Any = None, **settings: Any
) -> str:
    """PixArt-alpha or -sigma: T5 with its mask, a learned variance, the size of the image if `sized`."""
    from diffusers import DDIMScheduler, PixArtAlphaPipeline, PixArtSigmaPipeline, PixArtTransformer2DModel

    torch.manual_seed(0)
    tokenizer, text_encoder = t5(16)
    transformer = PixArtTransformer2DModel(
        # diffusers' pipeline passes the image size only to networks with sample_size 128
        sample_size=128 if sized else 4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=3 if sized else 2,
        cross_attention_dim=24 if sized else 16,
        in_channels=4,
        out_channels=8,
        patch_size=2,
        caption_channels=16,
        interpolation_scale=1,
    )
    (PixArtSigmaPipeline if sigma else PixArtAlphaPipeline)(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=vae(),
        transformer=lively(transformer),
        scheduler=(scheduler or DDIMScheduler).from_config({**LINEAR, **settings}),
    ).save_pretrained(folder)
    return str(folder)


def save_dit(folder: Path, classes: int = 1000, **settings: Any) -> str:
    """DiT: class-conditional latents with a learned variance."""
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        sample_size=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        patch_size=2,
        num_embeds_ada_norm=classes,
    )
    DiTPipeline(
        transformer=lively(transformer), vae=vae(), scheduler=DDIMScheduler(**{**LINEAR, **settings})
    ).save_pretrained(folder)
    # Published DiT pipelines have id2label; save_pretrained drops it.
    edit(folder, "model_index.json", id2label={str(i): f"thing {i}, thingy {i}" for i in range(classes)})
    return str(folder)


def gemma(width: int, texts: list[str]) -> tuple[Any, Any]:
    """A Gemma tokenizer trained on texts, and a Gemma 2 of two layers."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.normalizer = normalizers.Replace(" ", "\u2581")
    bpe.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    bpe.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    )
    model = json.loads(bpe.to_str())["model"]
    tokenizer = GemmaTokenizer(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]])
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=2048,
        sliding_window=64,
    )
    return tokenizer, lively(Gemma2Model(config))


def save_sana(
    folder: Path, network: dict[str, Any] | None = None, scheduler: Any = None, **settings: Any
) -> str:
    """SANA: linear attention, DC-AE latents of 128 px, Gemma 2 with its mask, and a flow.

    Its scheduler is DPMSolverMultistepScheduler, as published, but of order 1; or `scheduler`.

    network: other settings of the transformer.
    """
    from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel

    from d2g.diffusion.families.sana import default_instruction

    torch.manual_seed(0)
    tokenizer, text_encoder = gemma(16, [default_instruction(), *CAPTIONS])
    defaults: dict[str, Any] = dict(
        sample_size=4,
        patch_size=1,
        in_channels=8,
        out_channels=8,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
    )
    autoencoder = AutoencoderDC(
        latent_channels=8,
        attention_head_dim=4,
        encoder_block_types=(*["ResBlock"] * 5, "EfficientViTBlock"),
        decoder_block_types=(*["ResBlock"] * 5, "EfficientViTBlock"),
        encoder_block_out_channels=(8,) * 6,
        decoder_block_out_channels=(8,) * 6,
        encoder_layers_per_block=(1,) * 6,
        decoder_layers_per_block=(1,) * 6,
        encoder_qkv_multiscales=(*[()] * 5, (5,)),
        decoder_qkv_multiscales=(*[()] * 5, (5,)),
        upsample_block_type="interpolate",
        downsample_block_type="conv",
        scaling_factor=0.41407,
    )
    flow: dict[str, Any] = dict(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, solver_order=1
    )
    kind = scheduler or DPMSolverMultistepScheduler
    SanaPipeline(
        transformer=lively(SanaTransformer2DModel(**{**defaults, **(network or {})})),
        vae=lively(autoencoder, 1.0),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        scheduler=kind(**(settings if scheduler else {**flow, **settings})),
    ).save_pretrained(folder)
    return str(folder)


def cascade_unet(**settings: Any) -> Any:
    """A StableCascadeUNet of two levels, the lower one with attention."""
    from diffusers import StableCascadeUNet

    defaults: dict[str, Any] = dict(
        timestep_ratio_embedding_dim=8,
        conditioning_dim=16,
        block_out_channels=(8, 16),
        num_attention_heads=(-1, 2),
        down_num_layers_per_block=(1, 1),
        up_num_layers_per_block=(1, 1),
        block_types_per_layer=(
            ("SDCascadeResBlock", "SDCascadeTimestepBlock"),
            ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),
        ),
        clip_text_pooled_in_channels=16,
        clip_seq=2,
        dropout=(0.1, 0.1),
        timestep_conditioning_type=("sca", "crp"),
    )
    return lively(StableCascadeUNet(**{**defaults, **settings}))


def save_cascade_prior(folder: Path, scheduler: Any = None, **settings: Any) -> str:
    """Stage C of Stable Cascade: latents [3, 4, 4] from text."""
    from diffusers import DDPMWuerstchenScheduler, StableCascadePriorPipeline

    torch.manual_seed(0)
    tokenizer = clip_tokenizer(folder / "tokenizer")
    network = dict(in_channels=3, out_channels=3, clip_text_in_channels=16, clip_image_in_channels=6)
    StableCascadePriorPipeline(
        tokenizer=tokenizer,
        text_encoder=clip(tokenizer, 16, True),
        prior=cascade_unet(**{**network, **settings}),
        scheduler=DDPMWuerstchenScheduler() if scheduler is None else scheduler,
    ).save_pretrained(folder)
    # Published configs say no size; the pipeline's default, 1024 px, is too large for a test.
    edit(folder, "prior/config.json", sample_size=4)
    save_lpips(folder / "latent_lpips", 3)
    return str(folder)


def save_cascade_decoder(folder: Path, **settings: Any) -> str:
    """Stage B of Stable Cascade: latents [4, 8, 8] of a VQGAN from text and latents [3, 4, 4] of stage C."""
    from diffusers import DDPMWuerstchenScheduler, StableCascadeDecoderPipeline
    from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel

    torch.manual_seed(1)
    tokenizer = clip_tokenizer(folder / "tokenizer")
    network: dict[str, Any] = dict(
        in_channels=4,
        out_channels=4,
        patch_size=2,
        effnet_in_channels=3,
        pixel_mapper_in_channels=3,
        timestep_conditioning_type=("sca",),
        up_blocks_repeat_mappers=(1, 2),
    )
    StableCascadeDecoderPipeline(
        decoder=cascade_unet(**{**network, **settings}),
        tokenizer=tokenizer,
        text_encoder=clip(tokenizer, 16, True),
        scheduler=DDPMWuerstchenScheduler(),
        vqgan=lively(PaellaVQModel(bottleneck_blocks=1, embed_dim=8, num_vq_embeddings=8)),
        latent_dim_scale=2.0,
    ).save_pretrained(folder)
    edit(folder, "decoder/config.json", sample_size=8)
    save_lpips(folder / "latent_lpips", 4)
    return str(folder)


def save_wuerstchen_prior(folder: Path) -> str:
    """Stage C of Wuerstchen v2: latents [3, 4, 4] from text."""
    from diffusers import DDPMWuerstchenScheduler, WuerstchenPriorPipeline
    from diffusers.pipelines.deprecated.wuerstchen import WuerstchenPrior

    torch.manual_seed(2)
    tokenizer = clip_tokenizer(folder / "tokenizer")
    prior = lively(WuerstchenPrior(c_in=3, c=8, c_cond=16, c_r=8, depth=2, nhead=2))
    with torch.no_grad():  # its output is divided by 1 - b, which stays away from 0 in a trained network
        prior.out[1].weight.mul_(0.1)
    WuerstchenPriorPipeline(
        tokenizer=tokenizer,
        text_encoder=clip(tokenizer, 16, False),
        prior=prior,
        scheduler=DDPMWuerstchenScheduler(),
    ).save_pretrained(folder)
    edit(folder, "prior/config.json", sample_size=4)
    save_lpips(folder / "latent_lpips", 3)
    return str(folder)


def save_wuerstchen_decoder(folder: Path) -> str:
    """Stage B of Wuerstchen v2: latents [4, 8, 8] of a VQGAN from text and latents [3, 4, 4] of stage C."""
    from diffusers import DDPMWuerstchenScheduler, WuerstchenDecoderPipeline
    from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel, WuerstchenDiffNeXt

    torch.manual_seed(3)
    tokenizer = clip_tokenizer(folder / "tokenizer")
    network = WuerstchenDiffNeXt(
        c_r=8,
        c_cond=12,
        c_hidden=[8, 12],
        nhead=[-1, 2],
        blocks=[1, 2],
        level_config=["CT", "CTA"],
        inject_effnet=[False, True],
        effnet_embd=3,
        clip_embd=16,
    )
    with torch.no_grad():  # the constructor makes these smaller in every call of `apply`, down to nothing
        for name, parameter in network.named_parameters():
            if name.endswith("channelwise.4.weight"):
                parameter.normal_(std=0.1)
    WuerstchenDecoderPipeline(
        tokenizer=tokenizer,
        text_encoder=clip(tokenizer, 16, False),
        decoder=lively(network),
        scheduler=DDPMWuerstchenScheduler(),
        vqgan=lively(PaellaVQModel(bottleneck_blocks=1, embed_dim=8, num_vq_embeddings=8)),
        latent_dim_scale=2.0,
    ).save_pretrained(folder)
    edit(folder, "decoder/config.json", sample_size=8)
    save_lpips(folder / "latent_lpips", 4)
    return str(folder)


CASCADES: dict[str, tuple[Callable[[Path], str], Callable[[Path], str]]] = {
    "stable_cascade": (save_cascade_prior, save_cascade_decoder),
    "wuerstchen": (save_wuerstchen_prior, save_wuerstchen_decoder),
}
"""Cascades -> functions that save their stages C and B."""

STAGES: dict[str, Callable[[Path], str]] = {
    f"{cascade}_{stage}": save
    for cascade, both in CASCADES.items()
    for stage, save in zip(("prior", "decoder"), both, strict=True)
}
"""The stages of CASCADES by the names of their families."""


def unet2d(**settings: Any) -> Any:
    """A UNet2DModel of two levels."""
    from diffusers import UNet2DModel

    defaults: dict[str, Any] = dict(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        norm_num_groups=4,
    )
    return lively(UNet2DModel(**{**defaults, **settings}))


def save_ldm(folder: Path, **settings: Any) -> str:
    """LDM: unconditional latents of a VQ autoencoder."""
    from diffusers import DDIMScheduler, LDMPipeline, VQModel

    torch.manual_seed(0)
    vqvae = VQModel(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4,
        num_vq_embeddings=32,
        mid_block_add_attention=False,
        scaling_factor=0.3,
    )
    LDMPipeline(
        vqvae=vqvae, unet=unet2d(sample_size=4), scheduler=DDIMScheduler(**{**DDIM, **settings})
    ).save_pretrained(folder)
    return str(folder)


def save_pixels(folder: Path, classes: int | None = None, scheduler: Any = None, **settings: Any) -> str:
    """A UNet2DModel in pixel space, as DDIMPipeline saves it; class-conditional if `classes` is given."""
    from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline

    torch.manual_seed(0)
    unet = unet2d(num_class_embeds=classes)
    if scheduler is None:
        DDIMPipeline(unet=unet, scheduler=DDIMScheduler(**{**LINEAR, **settings})).save_pretrained(folder)
    else:  # DDIMPipeline would turn it into a DDIMScheduler
        DDPMPipeline(unet=unet, scheduler=scheduler(**settings)).save_pretrained(folder)
    return str(folder)


EDM = dict(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5)
"""The settings of Karras et al. 2022."""


def save_edm(folder: Path, classes: int | None = 10, scheduler: Any = None, **settings: Any) -> str:
    """A UNet2DModel in pixel space that is preconditioned as in EDM; with classes, as CIFAR-10's."""
    from diffusers import EDMEulerScheduler

    return save_pixels(folder, classes, scheduler or EDMEulerScheduler, **{**EDM, **settings})


TRANSFORMERS = ("dit", "pixart", "sd3", "flux", "sana")
"""Families of transformers; `save_transformer` saves a teacher of each."""

FLOWS = ("sd3", "flux", "sana")
"""Those of TRANSFORMERS that are flows."""


def latent_channels(family: str) -> int:
    """Channels of the latents of a family's tiny teacher."""
    return 8 if family in FLOWS else 4


def save_transformer(family: str, folder: Path, **settings: Any) -> str:
    """A teacher of one of TRANSFORMERS, with latent_lpips/ for its latents."""
    if family == "pixart":
        name = save_pixart(folder, sigma=True, **settings)
    elif family == "dit":
        name = save_dit(folder, classes=6, **settings)
    else:
        name = {"sd3": save_sd3, "flux": save_flux, "sana": save_sana}[family](folder, **settings)
    save_lpips(folder / "latent_lpips", latent_channels(family))
    return name


UNETS: dict[str, Callable[[Path], str]] = {
    "sd": save_teacher,
    "unet2d": lambda folder: save_pixels(folder, classes=6),
    "edm": lambda folder: save_edm(folder, classes=6),
    "ldm": save_ldm,
}
"""Kinds of U-Nets that differ for a discriminator -> a function that saves a teacher of the kind."""


def save_kind(kind: str, folder: Path) -> str:
    """A teacher of one of UNETS, STAGES or TRANSFORMERS, or of SDXL."""
    if kind == "sdxl":
        save_lpips(folder / "latent_lpips")
        return save_sdxl(folder)
    others = {**UNETS, **STAGES}
    return others[kind](folder) if kind in others else save_transformer(kind, folder)


def pair_config(teacher: str, folder: Path, condition: Path | None = None) -> PairConfig:
    """The config of a small job with a saved teacher of any kind; `folder` takes its prompts. condition: the
    store of the stage before, for the later stage of a cascade."""
    if condition is not None:
        return tiny.pair_config(teacher, "", condition=str(condition), seed=1, num_pairs=0)
    loaded = load_teacher(teacher)
    has_text = loaded.conditioning == "text"
    prompts = save_prompts(folder / "prompts.txt") if has_text else ""
    guidance = 3.0 if has_text else 1.0
    return tiny.pair_config(teacher, prompts, guidance=guidance, solver=loaded.default_solver)


def stage_settings(kind: str, stage: str) -> list[str]:
    """Settings that a stage needs for the tiny teacher of one of UNETS, STAGES or TRANSFORMERS; for SDXL,
    those of its recipe."""
    settings = ["regression.losses=mse:1"] if kind in UNETS and kind != "sd" else []
    if stage == "gan" and kind in TRANSFORMERS:
        settings += ["gan.discriminator=transformer", "gan.token_heads=2"]
    if stage == "gan" and kind in STAGES:
        settings += ["gan.discriminator=cascade"]
    if stage == "gan" and kind == "sdxl":
        settings += ["gan.penalty=none", "gan.noise_augment=uniform"]
    if stage == "gan" and kind == "ldm":
        settings += ["gan.mix_fraction=0"]
    return settings


def random_inputs(
    kind: str, rows: int, seed: int = 0, dtype: Any = torch.float32, size: int = 4
) -> tuple[Tensor, Tensor, Conditioning]:
    """Latents, noise [rows, C, size, size] and conditioning of the tiny teacher of a kind."""
    rng = torch.Generator().manual_seed(seed)
    three = kind in ("unet2d", "edm", "ldm") or kind.endswith("_prior")
    channels = 3 if three else latent_channels(kind)
    x, noise = (torch.randn(rows, channels, size, size, generator=rng, dtype=dtype) for _ in range(2))
    return x, noise, random_conditioning(kind, rows, seed, dtype)


def random_conditioning(family: str, rows: int, seed: int = 0, dtype: Any = torch.float32) -> Conditioning:
    """Conditioning of the tiny teacher of a family: random numbers, masks and labels."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(rows, *shape, generator=rng, dtype=dtype)

    if family in ("dit", "unet2d", "edm"):
        return Conditioning.from_labels(torch.arange(rows) % 5)
    if family == "ldm":
        return Conditioning.empty(rows)
    if family in ("pixart", "sana"):
        mask = torch.arange(7) <= torch.arange(rows)[:, None] % 5 + 1
        return Conditioning({"hidden": normal(7, 16), "mask": mask.long()})
    if family in STAGES:
        text = {"hidden": normal(7, 16), "pooled": normal(16), "prior": normal(3, 4, 4)}
        takes = ["hidden"] if family.startswith("wuerstchen") else ["pooled"]
        takes += ["prior"] if family.endswith("decoder") else []
        takes += ["hidden"] if family == "stable_cascade_prior" else []
        return Conditioning({name: text[name] for name in takes})
    if family == "flux":
        return Conditioning.from_text(normal(7, 24), normal(16)).with_guidance(torch.full((rows,), 3.5))
    return (
        Conditioning.from_text(normal(7, 48), normal(40))
        if family == "sd3"
        else (Conditioning.from_text(normal(12, 16)))
    )


def diffusers_pipeline(folder: Path, **components: Any) -> Any:
    """diffusers' own pipeline of a folder; `components` replace those in the folder."""
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(folder, **components)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def edit(folder: Path, file: str, **values: Any) -> None:
    """Change keys of one of a folder's JSON files."""
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


class DecoderInput:
    """Records the scaled latents that an autoencoder decodes, for pipelines that return only pixels."""

    def __init__(self, autoencoder: Any) -> None:
        self.scale = autoencoder.config.scaling_factor
        autoencoder.post_quant_conv.register_forward_pre_hook(self._record)

    def _record(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.latents = args[0] * self.scale
