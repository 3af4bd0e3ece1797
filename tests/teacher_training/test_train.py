"""teacher_training.train: all stages of a tiny teacher, from every kind of captioned images."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from d2g.core.errors import SettingError, UserError
from d2g.core.png import save_png
from d2g.core.progress import Progress
from d2g.core.seeds import noise
from d2g.diffusion import pretrained
from d2g.diffusion.teacher import load_teacher
from eval.networks.registry import load_clip
from latent_lpips.weights import load_lpips
from miniature.registration import register_training_scenes
from own_pictures import CONFIG, SIZE, class_folders, image_folder, make_image, parquet
from teacher_training.config import TEACHER_PRESETS
from teacher_training.data import captioned_images, labeled_images, read_captions, register_data
from teacher_training.train import train_teacher
from teacher_training.verdict import current_verdict


def test_pictures_without_a_difference_are_refused_before_the_first_stage(tmp_path: Path) -> None:
    """One caption for all, and two pictures: the stages after the U-Net could not learn from them."""
    (tmp_path / "data").mkdir()
    for number in range(4):
        make_image(number)[0].save(tmp_path / "data" / f"{number}.png")
        (tmp_path / "data" / f"{number}.txt").write_text("a shape")
    for limit, message in ((4, "4 captions have no word that occurs in 1% to 90%"), (2, "it holds 2 pic")):
        config = replace(CONFIG, data=str(tmp_path / "data"), images=limit)
        with pytest.raises(UserError, match=message) as error_info:
            train_teacher(config, tmp_path / str(limit))
        assert "or train with --stages data,vae,unet" in str(error_info.value)
        assert not (tmp_path / str(limit) / "training" / "vae").exists()


SOURCES = {"an image folder": image_folder, "class-named subfolders": class_folders, "parquet": parquet}
EACH_SOURCE = pytest.mark.parametrize(
    "source",
    [
        pytest.param(source, marks=() if source == "an image folder" else pytest.mark.slow)
        for source in SOURCES
    ],
)


@EACH_SOURCE
def test_training_a_teacher_from_captioned_images(source: str, tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "teacher"
    data.mkdir()
    SOURCES[source](data)
    config = replace(CONFIG, data=str(data))
    summary = train_teacher(config, out)
    assert (
        summary.images == 40
        and summary.params > 0
        and set(summary.scores) == {"vae", "unet", "lpips", "clip"}
    )

    # The result works with diffusers, pair generation, both stages and evaluation.
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(out)
    pipe.set_progress_bar_config(disable=True)
    latent_noise = noise(0, [0], (4, 8, 8))
    prompt = "a photo of a red disc" if source.startswith("class") else "a red disc"
    expected = pipe(
        prompt, latents=latent_noise, num_inference_steps=4, guidance_scale=3.0, output_type="latent"
    ).images
    teacher = load_teacher(str(out), final_alpha="teacher")
    assert teacher.latent_shape == (4, 8, 8) and teacher.space.downscale == 2
    torch.testing.assert_close(
        teacher.sample(latent_noise, [prompt], 4, 3.0, "ddim"), expected, rtol=0, atol=1e-4
    )
    assert load_lpips(out / "latent_lpips", 4)(expected, expected).item() == 0.0
    assert load_clip(str(out / "clip")).encode_texts([prompt]).shape == (1, 16)
    captions = json.loads((out / "training" / "captions.json").read_text())
    assert prompt in captions and len(captions) == 40 and len(set(captions)) == 8

    # A second run finds all stages finished.
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    assert train_teacher(config, out).scores == summary.scores
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_captions_match_their_images(tmp_path: Path) -> None:
    """For every source format, the middle pixel has the color in the caption."""
    names = {(255, 0, 0): "red", (0, 128, 0): "green", (0, 0, 255): "blue", (255, 255, 0): "yellow"}
    for source, write in SOURCES.items():
        folder = tmp_path / source.replace(" ", "_")
        folder.mkdir()
        write(folder)
        images, captions = captioned_images(str(folder), SIZE, 100, 0, "a photo of a {}")
        assert images.shape == (40, 3, SIZE, SIZE) and images.dtype == torch.uint8 and len(captions) == 40
        for image, caption in zip(images, captions, strict=True):
            assert names[tuple(image[:, 7, 7].tolist())] in caption
        few, texts = captioned_images(str(folder), SIZE, 7, 0, "a photo of a {}")
        assert len(few) == len(texts) == 7


def test_stages_can_be_run_one_at_a_time(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    image_folder(tmp_path / "data")
    config, out = replace(CONFIG, data=str(tmp_path / "data")), tmp_path / "teacher"
    assert train_teacher(config, out, ("data",)).scores == {} and not (out / "vae").exists()
    summary = train_teacher(config, out, ("vae",))
    assert set(summary.scores) == {"vae"} and (summary.params, summary.images) == (0, 40)
    assert pretrained.load_autoencoder(str(out / "vae")).config.scaling_factor != 0.18215
    with pytest.raises(SettingError, match=r"unknown stage 'unett'; did you mean 'unet'\?"):
        train_teacher(config, out, ("unett",))


def test_pictures_that_have_changed_since_the_first_start_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for source in ("image folder", "classes"):
        data, out = tmp_path / source, tmp_path / f"teacher of {source}"
        data.mkdir()
        (image_folder if source == "image folder" else class_folders)(data)
        config = replace(CONFIG, data=str(data))
        for _ in range(2):
            train_teacher(config, out, ("data",))
        assert "other pictures or captions" not in caplog.text
        next(data.rglob("*.png")).unlink()
        assert train_teacher(config, out, ("data",)).images == 40
        assert f"{data} has other pictures or captions than at the first start (39 pictures)" in caplog.text
        assert f"the 40 pictures in {out}" in caplog.text
        caplog.clear()


def test_latent_lpips_is_scaled_on_unrelated_pictures_of_a_sorted_folder(tmp_path: Path) -> None:
    """Of a folder sorted by class, neighbors are alike: here half of the pictures are the same."""
    data, out = tmp_path / "data", tmp_path / "teacher"
    data.mkdir()
    for number in range(40):
        make_image(0 if number < 20 else number)[0].save(data / f"{number:03d}.png")
        (data / f"{number:03d}.txt").write_text("a red disc" if number < 20 else "a shape")
    lpips = replace(CONFIG.lpips, unrelated=1.0)
    train_teacher(replace(CONFIG, data=str(data), lpips=lpips), out, ("data", "vae", "lpips"))
    latents = torch.load(out / "training" / "latents.pt")
    metric = load_lpips(out / "latent_lpips", 4)
    with torch.no_grad():
        distances = [metric(latents, latents.roll(step, 0)).mean() for step in range(1, 40)]
    assert torch.stack(distances).mean().item() == pytest.approx(1.0, abs=0.25)


def test_pictures_that_were_read_with_classes_are_not_taken_for_others(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    class_folders(tmp_path / "data")
    config, out = replace(CONFIG, data=str(tmp_path / "data"), network="edm"), tmp_path / "teacher"
    for _ in range(2):
        train_teacher(config, out, ("data",))
    with pytest.raises(UserError, match=r"holds a run with another config: classes .*True -> False"):
        train_teacher(replace(config, edm=replace(config.edm, classes=False)), out, ("data",))
    # Folders of earlier versions do not say it.
    written = json.loads((out / "training" / "config.json").read_text())
    del written["classes"]
    (out / "training" / "config.json").write_text(json.dumps(written))
    train_teacher(config, out, ("data",))


def test_a_table_without_the_classes_of_the_others_is_refused(tmp_path: Path) -> None:
    """Otherwise the teacher would be trained without classes."""
    (tmp_path / "data").mkdir()
    parquet(tmp_path / "data")
    table = pq.read_table(tmp_path / "data" / "train.parquet")
    pq.write_table(table.append_column("label", [[0, 1] * 20]), tmp_path / "data" / "a.parquet")
    config = replace(CONFIG, data=str(tmp_path / "data"), network="edm", images=80)
    with pytest.raises(
        UserError, match=r"train\.parquet: expected a column named label, found image, caption"
    ):
        train_teacher(config, tmp_path / "teacher", ("data",))
    (tmp_path / "data" / "a.parquet").unlink()
    assert train_teacher(config, tmp_path / "teacher", ("data",)).images == 40


def test_pictures_that_hold_their_captions_are_planned_like_others(tmp_path: Path) -> None:
    for number in range(3):
        picture = torch.full((3, SIZE, SIZE), 40 * number, dtype=torch.uint8)
        save_png(picture, tmp_path / f"{number}.png", {"prompt": f"a shade of {number}"})
    _, captions = captioned_images(str(tmp_path), SIZE, 100, 0, "a photo of a {}")
    assert (
        read_captions(replace(CONFIG, data=str(tmp_path)))
        == captions
        == [f"a shade of {n}" for n in range(3)]
    )


@pytest.mark.slow
def test_damaged_caches_are_named_and_an_autoencoder_gets_latents_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    image_folder(tmp_path / "data")
    config, out = replace(CONFIG, data=str(tmp_path / "data")), tmp_path / "teacher"
    train_teacher(config, out, ("data", "vae", "unet"))
    latents = out / "training" / "latents.pt"
    first = latents.read_bytes()
    # Another autoencoder: the latents of the first one are not taken for its own.
    for stage in ("vae", "unet"):
        shutil.rmtree(out / "training" / stage)
    other = replace(config, vae=replace(config.vae, fit=replace(config.vae.fit, lr=2e-3)))
    train_teacher(other, out, ("vae", "unet"))
    assert latents.read_bytes() != first
    # Files that are cut off.
    pixels, message = out / "training" / "images.npy", r"is damaged \([^\n]*\); delete [^\n]* and run again$"
    whole = pixels.read_bytes()
    pixels.write_bytes(whole[:-100])
    (out / "training" / "verdict.json").unlink()
    with pytest.raises(UserError, match=rf"^{pixels} is damaged .*; restore {out}$"):
        current_verdict(out)
    with pytest.raises(UserError, match=message):
        train_teacher(other, out, ("unet",))
    pixels.write_bytes(whole)
    shutil.rmtree(out / "training" / "unet")
    latents.write_bytes(latents.read_bytes()[:-100])
    with pytest.raises(UserError, match=message):
        train_teacher(other, out, ("unet",))


def test_unusable_images_are_refused(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    make_image(0)[0].save(tmp_path / "data" / "a.png")
    with pytest.raises(UserError, match=r"1 of 1 images have no caption; expected a metadata\.jsonl"):
        train_teacher(replace(CONFIG, data=str(tmp_path / "data")), tmp_path / "teacher", ("data",))
    register_training_scenes()
    with pytest.raises(UserError, match="scenes are rendered at 64 pixels, got size 16"):
        train_teacher(CONFIG, tmp_path / "scenes", ("data",))
    with pytest.raises(
        UserError, match=r"no such file or folder; .* or a registered name \(there are the data s"
    ):
        train_teacher(replace(CONFIG, data=str(tmp_path / "none")), tmp_path / "none-teacher", ("data",))
    with pytest.raises(SettingError, match="size is 18; expected a multiple of 4"):
        replace(CONFIG, size=18)


def test_pictures_that_are_mostly_cut_off_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In folders and tables. A picture of 2:1 is not counted."""
    sizes = {"a": (64, 16), "b": (32, 16), "c": (16, 33)}
    for name, (width, height) in sizes.items():
        make_image(0)[0].resize((width, height)).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(f"a picture {name}")
    said = "2 of 3 pictures have one side more than twice as long as the other; the teacher sees"
    captioned_images(str(tmp_path), 16, 10, 0, "{}")
    assert caplog.text.count(said) == 1
    labeled_images(str(tmp_path), 16, 10, 0)
    assert caplog.text.count(said) == 2


def test_registered_data_is_found_by_name() -> None:
    """The loader receives size, limit and seed; a name can be registered only once."""

    def load(size: int, limit: int, seed: int, progress: Progress) -> tuple[Tensor, list[str]]:
        return torch.full((limit, 3, size, size), seed, dtype=torch.uint8), ["a gray square"] * limit

    register_data("gray squares", load)
    register_data("gray squares", load)
    images, captions = captioned_images("gray squares", SIZE, 3, 7, "a photo of a {}")
    assert images.shape == (3, 3, SIZE, SIZE) and (images == 7).all() and captions == ["a gray square"] * 3
    with pytest.raises(AssertionError, match="data source 'gray squares' is already registered"):
        register_data("gray squares", lambda size, limit, seed, progress: load(size, limit, seed, progress))


def test_preset_sizes_are_compatible() -> None:
    """Latent sizes are divisible for the UNet, and image sizes by CLIP's patch size."""
    for name, preset in TEACHER_PRESETS.items():
        if preset.network == "unet_text":
            assert preset.size % preset.clip.patch == 0, name
        if not preset.denoiser.in_pixels:
            latent = preset.size // 2 ** (len(preset.vae.channels) - 1)
            assert latent == 8 and latent % preset.denoiser.downscale == 0, name


def sort_by_class(folder: Path) -> None:
    """Sort the rows of a parquet file, and the names of captioned pictures, by their captions."""
    for table in folder.glob("*.parquet"):
        pq.write_table(pq.read_table(table).sort_by("caption"), table)
    for metadata in folder.glob("metadata.jsonl"):
        rows = [json.loads(line) for line in metadata.read_text().splitlines()]
        for row in rows:
            name = f"{row['caption']} {row['file_name']}"
            (folder / row["file_name"]).rename(folder / name)
            row["file_name"] = name
        metadata.write_text("\n".join(map(json.dumps, rows)))


@EACH_SOURCE
def test_a_limit_keeps_the_class_proportions(
    source: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    SOURCES[source](tmp_path)
    sort_by_class(tmp_path)
    images, captions = captioned_images(str(tmp_path), SIZE, 16, 0, "a photo of a {}")
    assert len(images) == 16
    assert {captions.count(caption) for caption in set(captions)} == {2} and len(set(captions)) == 8
    assert f"{tmp_path}: 16 of 40 pictures, evenly spread; images=40 takes all" in caplog.text
