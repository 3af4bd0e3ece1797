"""Teachers equal diffusers' pipeline of the same folder, also where its constructor and `encode_prompt`
correct or expand the contents of the folder. Unsupported settings are refused.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
import tiny_teachers
from d2g.core.errors import UserError
from d2g.core.seeds import noise
from d2g.diffusion import pretrained
from d2g.diffusion.latents import decode
from d2g.diffusion.pipelines import family_of
from d2g.diffusion.teacher import describe_teacher, load_teacher
from tiny_teachers import edit

SAVE: dict[str, Callable[[Path], str]] = {
    "sd": tiny.save_teacher,
    "sdxl": tiny_teachers.save_sdxl,
    "sd3": tiny_teachers.save_sd3,
    "flux": tiny_teachers.save_flux,
    "pixart": lambda folder: tiny_teachers.save_pixart(folder, sigma=False, timestep_spacing="trailing"),
    "dit": tiny_teachers.save_dit,
    "ldm": tiny_teachers.save_ldm,
    "pixels": tiny_teachers.save_pixels,
}
TEXT = ("sd", "sdxl", "sd3", "pixart")
SCHEDULER = "scheduler/scheduler_config.json"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("families")
    return {name: Path(save(out / name)) for name, save in SAVE.items()}


def drop(folder: Path, file: str, *keys: str) -> None:
    """Remove keys from one of a folder's JSON files."""
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({k: v for k, v in content.items() if k not in keys}))


def add_words(folder: Path, *words: str, tokenizer: str = "tokenizer", save: str = "both") -> None:
    """Add tokens with large embeddings, as textual inversion does."""
    encoder = tokenizer.replace("tokenizer", "text_encoder")
    tokens = pretrained.load_tokenizer(str(folder), tokenizer)
    model = pretrained.load_model(str(folder), encoder)
    tokens.add_tokens(list(words))
    model.resize_token_embeddings(len(tokens), mean_resizing=False)
    weights = model.get_input_embeddings().weight.data
    torch.manual_seed(1)
    weights[-len(words) :] = 3 * torch.randn(len(words), weights.shape[1]) * weights.std()
    tokens.save_pretrained(folder / tokenizer)
    if save == "both":
        model.save_pretrained(folder / encoder)


def words_in_all(*words: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for path in sorted(folder.glob("tokenizer*")):
            if (folder / path.name.replace("tokenizer", "text_encoder") / "config.json").is_file():
                add_words(folder, *words, tokenizer=path.name)

    return change


def old_unet(version: str | None, size: int) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        edit(folder, "unet/config.json", sample_size=size, _diffusers_version=version)

    return change


def scheduler_of(kind: str, **settings: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        edit(folder, "model_index.json", scheduler=["diffusers", kind])
        edit(folder, SCHEDULER, _class_name=kind, **settings)

    return change


CASES: dict[str, tuple[str, Callable[[Path], object], list[str]]] = {
    # StableDiffusionPipeline's constructor corrects these.
    "sd, no steps_offset": ("sd", lambda f: drop(f, SCHEDULER, "steps_offset"), ["a red cube"]),
    "sd, steps_offset 0": ("sd", lambda f: edit(f, SCHEDULER, steps_offset=0), ["a red cube"]),
    "sd, clip_sample true": ("sd", lambda f: edit(f, SCHEDULER, clip_sample=True), ["a red cube"]),
    "sd, no clip_sample": ("sd", lambda f: drop(f, SCHEDULER, "clip_sample"), ["a red cube"]),
    "sd, a scheduler file of 2022": (
        "sd",
        lambda f: drop(f, SCHEDULER, "clip_sample", "steps_offset", "timestep_spacing", "prediction_type"),
        ["a red cube"],
    ),
    "sd, a U-Net of 0.6": ("sd", old_unet("0.6.0", 4), ["a red cube"]),
    "sd, a U-Net of 0.8.1": ("sd", old_unet("0.8.1", 32), ["a red cube"]),
    "sd, a U-Net of 0.9": ("sd", old_unet("0.9.0", 4), ["a red cube"]),
    "sd, a U-Net of no version": ("sd", lambda f: drop(f, "unet/config.json", "_diffusers_version"), ["a"]),
    "sd, trailing": ("sd", lambda f: edit(f, SCHEDULER, timestep_spacing="trailing"), ["a red cube"]),
    "sd, set_alpha_to_one": ("sd", lambda f: edit(f, SCHEDULER, set_alpha_to_one=True), ["a red cube"]),
    "sd, v-prediction": ("sd", lambda f: edit(f, SCHEDULER, prediction_type="v_prediction"), ["a red cube"]),
    # The other pipelines use their files unchanged.
    "sdxl, no steps_offset": ("sdxl", lambda f: drop(f, SCHEDULER, "steps_offset"), ["a red cube"]),
    "sdxl, steps_offset 0": ("sdxl", lambda f: edit(f, SCHEDULER, steps_offset=0), ["a red cube"]),
    "sdxl, an old U-Net": ("sdxl", old_unet("0.6.0", 4), ["a red cube"]),
    "sdxl, no force_zeros": (
        "sdxl",
        lambda f: edit(f, "model_index.json", force_zeros_for_empty_prompt=False),
        ["a red cube"],
    ),
    "dit, no steps_offset": ("dit", lambda f: drop(f, SCHEDULER, "steps_offset"), ["7"]),
    "ldm, steps_offset 0": ("ldm", lambda f: edit(f, SCHEDULER, steps_offset=0), [""]),
    "pixart, steps_offset 0": ("pixart", lambda f: edit(f, SCHEDULER, steps_offset=0), ["a red cube"]),
    "sd3, another shift": ("sd3", lambda f: edit(f, SCHEDULER, shift=1.5), ["a red cube"]),
    # DDIMPipeline converts any scheduler.
    "pixels, PNDM": ("pixels", scheduler_of("PNDMScheduler", clip_sample=False), [""]),
    "pixels, DDPM": ("pixels", scheduler_of("DDPMScheduler", clip_sample=False), [""]),
    "pixels, Euler": ("pixels", scheduler_of("EulerDiscreteScheduler", clip_sample=False), [""]),
    # Textual inversion: SD, SDXL and FLUX expand tokens of several vectors, SD3 and PixArt do not.
    "sd, a word of three vectors": (
        "sd",
        words_in_all("<toy>", "<toy>_1", "<toy>_2"),
        ["a <toy> on a table", "<toy>", "a <toy>, a <toy>", "a <toy>_1"],
    ),
    "sd, two words": ("sd", words_in_all("<a>", "<b>", "<b>_1"), ["a <a> and a <b>", "<b><a>", "<B> cube"]),
    "sd, a word that fills the prompt": (
        "sd",
        words_in_all("<toy>", *(f"<toy>_{number}" for number in range(1, 9))),
        ["a <toy> on a red table", "a red cube <toy>"],
    ),
    "sd, a gap in the numbers": ("sd", words_in_all("<toy>", "<toy>_1", "<toy>_3"), ["a <toy>"]),
    "sdxl, a word of three vectors": (
        "sdxl",
        words_in_all("<toy>", "<toy>_1", "<toy>_2"),
        ["a <toy> on a table", "<toy>"],
    ),
    "sdxl, in the second tokenizer": (
        "sdxl",
        lambda f: add_words(f, "<toy>", "<toy>_1", tokenizer="tokenizer_2"),
        ["a <toy> on a table"],
    ),
    "sd3, a word of two vectors": ("sd3", words_in_all("<toy>", "<toy>_1"), ["a <toy> on a table"]),
    "flux, a word of two vectors": ("flux", words_in_all("<toy>", "<toy>_1"), ["a <toy> on a table"]),
    # Behavior of every encode_prompt.
    "sd, edges of prompts": ("sd", lambda f: None, ["", "A RED Cube", "a red cube " * 20, "\u00e9 \u2603"]),
    "sdxl, edges of prompts": ("sdxl", lambda f: None, ["a", "A RED Cube", "a red cube " * 20, "\u2603"]),
    "sd3, edges of prompts": ("sd3", lambda f: None, ["a", "A RED Cube", "a red cube " * 90]),
    "sd3, tokenizers of two lengths": (
        "sd3",
        lambda f: edit(f, "tokenizer_2/tokenizer_config.json", model_max_length=9),
        ["a red cube on a table and more"],
    ),
    "flux, edges of prompts": ("flux", lambda f: None, ["a", "A RED Cube", "a red cube " * 90]),
    "pixart, edges of prompts": ("pixart", lambda f: None, ["a", " A RED Cube ", "a red cube " * 90]),
}


def sample_with_diffusers(
    folder: Path, prompts: list[str], steps: int, guidance: float
) -> tuple[Tensor, Tensor]:
    """Return the first and last latents of diffusers' pipeline, recorded from its scheduler's steps."""
    pipe = tiny_teachers.diffusers_pipeline(folder)
    step, first, last = pipe.scheduler.step, [], []

    def record(output: Any, t: Any, sample: Tensor, *arguments: Any, **settings: Any) -> Any:
        result = step(output, t, sample, *arguments, **settings)
        first.append(sample)
        last.append(result[0] if isinstance(result, tuple) else result.prev_sample)
        return result

    pipe.scheduler.step = record
    kind, rng = type(pipe).__name__, torch.Generator().manual_seed(0)
    settings: dict[str, Any] = {"num_inference_steps": steps, "generator": rng}
    if kind == "DiTPipeline":
        settings |= {"class_labels": [int(p) for p in prompts], "guidance_scale": guidance}
    elif prompts == [""] and guidance == 1:
        settings |= {"batch_size": 1}
    else:
        settings |= {"prompt": prompts, "guidance_scale": guidance, "output_type": "latent"}
    family = family_of(str(folder))
    if family.reads_text:
        settings |= family.pipeline_settings((16, 16))
    pipe(**settings)
    start, end = (family.unpack(latents[: len(prompts)].float(), (4, 4)) for latents in (first[0], last[-1]))
    return start, end


@pytest.mark.filterwarnings("ignore:The configuration file of:FutureWarning")  # diffusers corrects it
@pytest.mark.parametrize("case", CASES)
def test_latents_equal_diffusers_pipeline(case: str, folders: dict[str, Path], tmp_path: Path) -> None:
    family, change, prompts = CASES[case]
    folder = Path(shutil.copytree(folders[family], tmp_path / "teacher"))
    change(folder)
    guidance = 1.0 if family in ("ldm", "pixels") else 3.0
    z, expected = sample_with_diffusers(folder, prompts, 4, guidance)
    teacher = load_teacher(str(folder), final_alpha="teacher")
    assert teacher.latent_shape == tuple(z.shape[1:])
    result = teacher.sample(z, prompts, 4, guidance, teacher.default_solver)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["sd", "sdxl", "pixart", "sd3"])
def test_images_of_a_shifted_autoencoder_equal_diffusers_pipeline(
    family: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    """SD3's and FLUX's pipelines read the autoencoder's shift_factor, the others do not."""
    folder = Path(shutil.copytree(folders[family], tmp_path / "teacher"))
    edit(folder, "vae/config.json", shift_factor=1.5)
    teacher, vae = load_teacher(str(folder), final_alpha="teacher"), pretrained.load_vae(str(folder))
    z = noise(0, range(1), teacher.latent_shape)
    settings = family_of(str(folder)).pipeline_settings((16, 16))
    images = tiny_teachers.diffusers_pipeline(folder)(
        ["a red cube"], latents=z, num_inference_steps=2, guidance_scale=3.0, output_type="pt", **settings
    ).images
    latents = teacher.sample(z, ["a red cube"], 2, 3.0, teacher.default_solver)
    result = (decode(vae, latents) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(result, images, rtol=0, atol=1e-4)
    shifted = teacher.space.shift
    assert shifted == (1.5 if family == "sd3" else 0), "pairs record the space in which they are decoded"


def test_corrections_change_the_latents(folders: dict[str, Path], tmp_path: Path) -> None:
    """Each corrected setting changes the latents or their size, so the cases above can fail."""
    plain = describe_teacher(str(folders["sd"]))
    old = Path(shutil.copytree(folders["sd"], tmp_path / "old"))
    old_unet("0.6.0", 4)(old)
    assert plain["latent_shape"] == [4, 4, 4] and describe_teacher(str(old))["latent_shape"] == [4, 64, 64]
    drop(old, SCHEDULER, "steps_offset")
    assert load_teacher(str(old)).schedule.points(5, (4, 4))[0].t == 801
    word = Path(shutil.copytree(folders["sd"], tmp_path / "word"))
    words_in_all("<toy>", "<toy>_1")(word)
    tokens = pretrained.load_tokenizer(str(word)).convert_tokens_to_ids(["<toy>", "<toy>_1"])
    ids: Tensor = pretrained.conditioner_on_meta(str(word)).tokens(["a <toy>"])  # type: ignore[operator]
    assert ids[0, 2:4].tolist() == tokens


REFUSED: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "sdxl, clip_sample true": ("sdxl", lambda f: edit(f, SCHEDULER, clip_sample=True), "clip_sample=true"),
    "sd, thresholding": ("sd", lambda f: edit(f, SCHEDULER, thresholding=True), "thresholding=true"),
    "pixels, PNDM of 2022": (
        "pixels",
        lambda f: (scheduler_of("PNDMScheduler")(f), drop(f, SCHEDULER, "clip_sample")),
        "scheduler DDIMScheduler has clip_sample=true",
    ),
    "sd, a guidance input": (
        "sd",
        lambda f: edit(f, "unet/config.json", time_cond_proj_dim=16),
        "time_cond_proj_dim=16",
    ),
    "sd, classes": (
        "sd",
        lambda f: edit(f, "unet/config.json", num_class_embeds=5),
        "UNet2DConditionModel has num_class_embeds=5, which StableDiffusionPipeline never feeds",
    ),
    "sdxl, classes": (
        "sdxl",
        lambda f: edit(f, "unet/config.json", num_class_embeds=5),
        "num_class_embeds=5",
    ),
    "sd, an attention mask": (
        "sd",
        lambda f: edit(f, "text_encoder/config.json", use_attention_mask=True),
        "use_attention_mask",
    ),
    # Settings that contradict each other.
    "sd, a longer tokenizer": (
        "sd",
        lambda f: edit(f, "tokenizer/tokenizer_config.json", model_max_length=77),
        r"tokenizer gives 77 tokens \(model_max_length\), but text_encoder has 12 positions",
    ),
    "sdxl, a longer second tokenizer": (
        "sdxl",
        lambda f: edit(f, "tokenizer_2/tokenizer_config.json", model_max_length=13),
        r"tokenizer_2 gives 13 tokens .* but text_encoder_2 has 12 positions",
    ),
    "sd3, a longer tokenizer": (
        "sd3",
        lambda f: edit(f, "tokenizer/tokenizer_config.json", model_max_length=77),
        r"tokenizer gives 77 tokens",
    ),
    "sd, a text encoder of another model": (
        "sd",
        lambda f: edit(f, "unet/config.json", cross_attention_dim=24),
        r"text is 16 numbers wide, but unet takes 24",
    ),
    "sdxl, the U-Net of another model": (
        "sdxl",
        lambda f: edit(f, "unet/config.json", cross_attention_dim=16),
        r"text is 40 numbers wide, but unet takes 16",
    ),
    "sd3, a T5 of another size": (
        "sd3",
        lambda f: edit(f, "transformer/config.json", joint_attention_dim=64),
        r"T5's text is 48 numbers wide, but transformer takes 64",
    ),
    "sd3, other pooled text": (
        "sd3",
        lambda f: edit(f, "transformer/config.json", pooled_projection_dim=16),
        r"pooled text is 40 numbers wide, but transformer takes 16",
    ),
    "pixart, a T5 of another size": (
        "pixart",
        lambda f: edit(f, "transformer/config.json", caption_channels=32),
        r"text is 16 numbers wide, but transformer takes 32",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_unsupported_settings_are_refused_before_sampling(
    case: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    family, change, says = REFUSED[case]
    folder = Path(shutil.copytree(folders[family], tmp_path / "teacher"))
    change(folder)
    for call in (load_teacher, describe_teacher):
        with pytest.raises(UserError, match=says) as caught:
            call(str(folder))
        assert "\n" not in str(caught.value)


def test_a_token_without_an_embedding_is_reported(folders: dict[str, Path], tmp_path: Path) -> None:
    """On a GPU it would cause a device-side assertion."""
    folder = Path(shutil.copytree(folders["sd"], tmp_path / "teacher"))
    add_words(folder, "<toy>", save="tokenizer")
    teacher = load_teacher(str(folder))
    assert len(teacher.encode(["a red cube"])) == 1, "other prompts still work"
    with pytest.raises(UserError, match=r"tokenizer has the token '<toy>' .* text_encoder embeds 322 tokens"):
        teacher.encode(["a <toy>"])


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_a_tokenizer_without_a_length_uses_that_of_its_text_encoder(
    family: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    """diffusers cannot run such a folder, so the reference is the folder with the length."""
    folder = Path(shutil.copytree(folders[family], tmp_path / "teacher"))
    for path in folder.glob("tokenizer*"):
        drop(folder, f"{path.name}/tokenizer_config.json", "model_max_length")
    expected, result = (
        load_teacher(str(f)).encode(["a red cube " * 20, "a"]).tensors for f in (folders[family], folder)
    )
    assert result["hidden"].shape[1] == 12
    assert all(torch.equal(result[name], expected[name]) for name in expected)
