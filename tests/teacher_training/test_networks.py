"""Networks of classes: DiT, U-Net of pixels, EDM. Trained by the real code, and used as any teacher."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import tiny
from d2g.core.errors import SettingError, UserError
from d2g.core.seeds import noise
from d2g.core.tracking.run_directory import read_stats
from d2g.diffusion.edm import EDMSchedule, preconditioning
from d2g.diffusion.teacher import load_teacher
from distill.sampling import load_student
from distill.training.real_images import CaptionKind, RealImages
from distill.training.train import train
from jobs import distill_config
from own_pictures import CLASSES, SIZE, class_folders, image_folder
from pairgen.generate import generate_pairs
from teacher_training.config import DiTConfig, EDMConfig, TeacherConfig
from teacher_training.data import TrainingPictures, captioned_images, labeled_images, read_captions
from teacher_training.networks.edm import training_example
from teacher_training.networks.registry import NETWORKS
from teacher_training.train import train_teacher

NAMES = [f"{color} {shape}" for color in ("blue", "green", "red", "yellow") for shape in ("box", "disc")]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classes")
    class_folders(folder)
    return folder


def test_edm_examples_are_the_paper_s() -> None:
    """F's input, time and target give back the clean rows through D, and lambda c_out^2 is 1 (eq. 8)."""
    x0, noise = torch.randn(2, 5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.002, 0.1, 0.7, 5.0, 80.0])
    example = training_example(x0, noise, sigma, 0.7)
    schedule = EDMSchedule(
        sigma_min=0.002, sigma_max=80.0, sigma_data=0.7, rho=7.0, grid="karras", prediction="epsilon"
    )
    for row, level in enumerate(sigma.tolist()):
        rows, point = slice(row, row + 1), schedule.point(level)
        x = x0[rows] + level * noise[rows]
        torch.testing.assert_close(example.input[rows], schedule.network_input(x, point))
        assert example.c_noise[row].item() == pytest.approx(point.t)
        restored = schedule.denoised(example.target[rows], x, point).x0
        torch.testing.assert_close(restored, x0[rows], rtol=0, atol=2e-4)
        weight = (level**2 + 0.7**2) / (level * 0.7) ** 2
        assert weight * preconditioning(level, 0.7).c_out ** 2 == pytest.approx(1)
    # Data and noise of these deviations: targets have unit variance at every noise level.
    many = torch.randn(2, 4000, 1, 2, 2, generator=torch.Generator().manual_seed(1))
    for level in (0.05, 1.0, 30.0):
        target = training_example(0.7 * many[0], many[1], torch.full((4000,), level), 0.7).target
        assert target.std().item() == pytest.approx(1, abs=0.02)


def test_classes_are_numbered_as_real_images_are(pictures: Path, tmp_path: Path) -> None:
    loaded = labeled_images(str(pictures), SIZE, 16, 0)
    assert loaded.classes == NAMES and loaded.images.shape == (16, 3, SIZE, SIZE)
    assert sorted(loaded.prompts) == sorted(2 * [str(label) for label in range(8)]), (
        "each class has its share"
    )
    real = RealImages(str(pictures), (SIZE, SIZE), kind=CaptionKind("label", 8))
    everything = labeled_images(str(pictures), SIZE, 100, 0)
    assert real.read(range(40))[1] == everything.prompts
    # A column of class numbers, and pictures without classes.
    image_folder(tmp_path)
    assert labeled_images(str(tmp_path), SIZE, 5, 0).classes is None
    assert labeled_images(str(pictures), SIZE, 5, 0, classes=False).prompts == [""] * 5
    data = (tmp_path / "000.png").read_bytes()
    for labels, expected in (
        ((1, 0), ["0", "1"]),
        ((0, 2), "class numbers are 0, 2; expected 0 to 1 without"),
    ):
        rows = [{"image": {"bytes": data}, "label": label, "caption": "a"} for label in labels]
        file = tmp_path / f"{labels[1]}.parquet"
        pq.write_table(pa.Table.from_pylist(rows), file)
        if isinstance(expected, str):
            with pytest.raises(UserError, match=expected):
                labeled_images(str(file), SIZE, 5, 0)
        else:
            table = labeled_images(str(file), SIZE, 5, 0)
            assert table.classes == expected and table.prompts == ["1", "0"]
            # A network of text reads the numbers as text.
            texts = captioned_images(str(file), SIZE, 5, 0, "{}", column="label")[1]
            assert texts == read_captions(replace(CLASSES, data=str(file), column="label")) == ["1", "0"]


def settings_of(network: str, data: Path) -> TeacherConfig:
    return replace(CLASSES, data=str(data), network=network)


def check_both_stages(out: Path, folder: Path, *gan: str) -> None:
    """Pairs of every class, one step of each stage, and the student's images."""
    teacher = load_teacher(str(out))
    pairs = tiny.pair_config(str(out), "", solver=teacher.default_solver, guidance=teacher.default_guidance)
    generate_pairs(pairs, folder / "pairs")
    settings = ("regression.losses=pseudo_huber", "train.images=4")
    train(distill_config(out, folder / "pairs", *settings), folder / "ode")
    config = distill_config(out, folder / "pairs", *settings, *gan, stage="gan", init=folder / "ode")
    train(config, folder / "gan")
    (line,) = read_stats(folder / "gan")
    assert all(math.isfinite(line[name]) for name in ("loss/d", "loss/g", "loss/g_gan"))
    images = load_student(str(folder / "gan"))(["7", "0"])
    assert images.shape == (2, 3, SIZE, SIZE) and images.dtype == torch.uint8


@pytest.mark.parametrize("network", ["dit", "unet", "edm"])
def test_the_loss_of_a_step_is_that_of_its_generator(network: str, tmp_path: Path) -> None:
    """Whatever the global random numbers are: a resumed training draws the same noise and drops the same."""
    images = torch.randint(256, (8, 3, SIZE, SIZE), dtype=torch.uint8)
    pictures = TrainingPictures(images=images, prompts=[str(row) for row in range(8)], classes=NAMES)
    config = settings_of(network, tmp_path)
    shape = (3, SIZE) if config.denoiser.in_pixels else (4, 8)
    inputs = images if config.denoiser.in_pixels else noise(0, range(8), (4, 8, 8))
    trainable = NETWORKS[network].build(config, pictures, shape, tmp_path, True)
    again = NETWORKS[network].build(config, pictures, shape, tmp_path, False)
    for name, module in trainable.modules.items():
        module.train()
        assert state_equal(module, again.modules[name])
        for parameter in module.parameters():
            parameter.data += 0.01  # the prediction of a fresh DiT is zero
    losses = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        loss_of = trainable.loss(inputs, pictures.prompts)
        losses.append(loss_of(list(range(8)), torch.Generator().manual_seed(0))[0].item())
    other = trainable.loss(inputs, ["0"] * 8)(list(range(8)), torch.Generator().manual_seed(0))[0].item()
    assert losses[0] == losses[1] != other, "classes matter"


def state_equal(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    state = other.state_dict()
    return all(torch.equal(value, state[name]) for name, value in one.state_dict().items())


def test_an_edm_teacher_goes_through_both_stages(pictures: Path, tmp_path: Path, d2g: Any) -> None:
    out = tmp_path / "teacher"
    summary = train_teacher(settings_of("edm", pictures), out)
    assert summary.images == 40 and set(summary.scores) == {"edm"} and summary.trained is False
    info = d2g("teacher", "info", out, "--json").json
    assert info["pipeline"] == "DDPMPipeline" and info["latent_shape"] == [3, SIZE, SIZE]
    assert info["conditioning"] == {"kind": "label", "guidance": False, "encoders": {}, "num_labels": 8}
    assert info["facts"]["preconditioning"] == "edm" and info["facts"]["sigma_max"] == 20.0
    assert info["params"]["unet"] == summary.params and info["verdict"] == summary.verdict
    assert load_teacher(str(out)).label_names == NAMES and info["numbers"]["psnr"] is None
    assert "Denoiser: losses" in (out / "report.html").read_text()
    check_both_stages(out, tmp_path, "gan.mix_fraction=0.5")


@pytest.mark.slow
def test_a_dit_teacher_goes_through_both_stages(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "teacher"
    assert set(train_teacher(settings_of("dit", pictures), out).scores) == {"vae", "dit", "lpips"}
    teacher = load_teacher(str(out))
    assert (teacher.pipeline, teacher.num_labels, teacher.default_guidance) == ("DiTPipeline", 8, 3.0)
    assert teacher.label_names == NAMES and teacher.latent_shape == (4, 8, 8)
    check_both_stages(out, tmp_path, "gan.discriminator=transformer", "gan.token_heads=2")


@pytest.mark.slow
def test_a_pixel_teacher_goes_through_both_stages(pictures: Path, tmp_path: Path) -> None:
    """With class dropout: the label after the last class is that of no class."""
    out = tmp_path / "teacher"
    train_teacher(settings_of("unet", pictures), out)
    teacher = load_teacher(str(out))
    assert teacher.num_labels == 8 and teacher.default_guidance == 3.0
    assert json.loads((out / "model_index.json").read_text())["null_class"] == 8
    check_both_stages(out, tmp_path)


@pytest.mark.slow
def test_pictures_without_classes_train_an_unconditional_teacher_that_resumes_exactly(tmp_path: Path) -> None:
    """A training that stops after its second step and goes on has the weights of an unbroken one."""
    (tmp_path / "data").mkdir()
    image_folder(tmp_path / "data")
    config = settings_of("edm", tmp_path / "data")

    def stop(label: str, done: int, total: int) -> None:
        if label == "edm" and done == 16:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_teacher(config, tmp_path / "twice", None, stop)
    with pytest.raises(UserError, match="its training is not finished"):
        load_teacher(str(tmp_path / "twice"))
    for folder in ("twice", "once"):
        train_teacher(config, tmp_path / folder)
    once, twice = (load_teacher(str(tmp_path / folder)) for folder in ("once", "twice"))
    assert once.conditioning == "none" and state_equal(once.network, twice.network)
    lines = [read_stats(tmp_path / folder / "training" / "edm") for folder in ("once", "twice")]
    assert [line.get("loss/mse") for line in lines[0]] == [line.get("loss/mse") for line in lines[1]]


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"network": "dit"}, "a DiT needs classes, found none; expected two or more subfolders named by class"),
    (
        {"network": "edm", "pretrained_vae": "taesd"},
        "works in pixels and has no autoencoder; leave --vae out",
    ),
    ({"network": "edm", "init": "miniature"}, "but --init trains a Stable Diffusion further; leave one of"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED)
def test_a_start_that_cannot_be_is_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    image_folder(tmp_path / "data")
    with pytest.raises((SettingError, UserError), match=message):
        train_teacher(replace(CLASSES, data=str(tmp_path / "data"), **settings), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_sizes_that_do_not_fit_are_refused() -> None:
    for network, size, step in (("edm", 17, 2), ("unet", 17, 2), ("dit", 18, 4)):
        with pytest.raises(
            SettingError, match=f"size is {size}; expected a multiple of {step}, the downscal"
        ):
            replace(CLASSES, network=network, size=size)
    assert TeacherConfig(network="edm", size=28).denoiser.downscale == 4
    with pytest.raises(SettingError, match="head_width is 24; expected a divisor of the last number of chan"):
        EDMConfig(head_width=20 + 4, channels=(8, 16))
    with pytest.raises(SettingError, match="heads is 3; expected a divisor of width, 16"):
        DiTConfig(width=16, heads=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--set unet.channels=[8,8]", "--set unet.channels has no effect: network=edm does not read it"),
        ("--set caption_template=a", "--set caption_template has no effect: network=edm does not read it"),
        ("--stages data,vae", "unknown stage 'vae'; known: data, edm"),
        ("--images 5 --set edm.fit.images=5", "--set edm.fit.images has no effect: the minutes or --images"),
    ],
)
def test_options_of_other_networks_are_refused(options: str, message: str, d2g: Any, tmp_path: Path) -> None:
    ended = d2g("teacher", "train", "--out", tmp_path / "t", "--preset", "fashion-edm", *options.split())
    assert ended.code == 2 and message in ended.error and not list(tmp_path.iterdir())


def test_the_full_run_refuses_other_networks(tmp_path: Path, d2g: Any) -> None:
    ended = d2g("run", "--data", tmp_path, "--set", "teacher.network=edm", "--out", tmp_path / "out")
    assert "`d2g run` trains unet_text alone: train the teacher with `d2g teacher train`" in ended.error
