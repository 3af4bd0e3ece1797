"""Invalid files of a teacher end in a one-line error with its name, for any exception of the libraries."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

import tiny
import tiny_teachers
from d2g.core.errors import UserError
from d2g.diffusion.pipelines import resolve
from d2g.diffusion.pretrained import load_model
from d2g.diffusion.teacher import check_solver, load_teacher
from tiny_teachers import edit

ODD: tuple[Any, ...] = (None, "x", "", -1, 0, 0.5, 1e30, True, [], {}, [1, 2], {"a": 1})


@pytest.fixture(scope="module")
def folders(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("odd")
    saved = {
        "sdxl": tiny_teachers.save_sdxl(out / "sdxl"),
        "sd3": tiny_teachers.save_sd3(out / "sd3"),
        "pixart": tiny_teachers.save_pixart(out / "pixart", sigma=True),
        "dit": tiny_teachers.save_dit(out / "dit", classes=4),
        "pixels": tiny_teachers.save_pixels(out / "pixels"),
    }
    return {"sd": teacher, **{name: Path(folder) for name, folder in saved.items()}}


def try_out(folder: Path) -> str:
    """Load a teacher. Returns the error message, or "" if it loads and has timesteps."""
    try:
        teacher = load_teacher(str(folder))
        check_solver(teacher, teacher.default_solver, 4)
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 1500
        return str(error)
    return ""


def change_one_value(rng: random.Random, folder: Path) -> str:
    """Give one key of one JSON file an odd value, or remove it."""
    large = {"tokenizer.json"}  # its own cases are below
    file = rng.choice([path for path in sorted(folder.glob("*/*.json")) if path.name not in large])
    content = json.loads(file.read_text())
    key = rng.choice(sorted(content))
    if rng.random() < 0.15:
        del content[key]
        what = "removed"
    else:
        content[key] = rng.choice(ODD)
        what = f"= {content[key]!r}"
    file.write_text(json.dumps(content))
    return f"{file.relative_to(folder)}: {key} {what}"


COUNTS = ((20, pytest.mark.slow), (100, (pytest.mark.slow, pytest.mark.long)))


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "pixart", "dit", "pixels"])
@pytest.mark.parametrize("count", [6, *(pytest.param(n, marks=mark) for n, mark in COUNTS)])
@pytest.mark.filterwarnings("ignore")  # the libraries warn of much of this
def test_changed_values_load_or_are_refused_in_one_line(
    family: str, count: int, folders: dict[str, Path], tmp_path: Path
) -> None:
    rng = random.Random(f"{family} {count}")
    for number in range(count):
        folder = Path(shutil.copytree(folders[family], tmp_path / str(number)))
        change = change_one_value(rng, folder)
        try:
            try_out(folder)
        except Exception as error:
            raise AssertionError(f"{change}: {type(error).__name__}") from error
        shutil.rmtree(folder)


SCHEDULER = "scheduler/scheduler_config.json"
CASES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "steps_offset null": ("sdxl", lambda f: edit(f, SCHEDULER, steps_offset=None), "has a value"),
    "no training steps": ("sd", lambda f: edit(f, SCHEDULER, num_train_timesteps=0), "scheduler DDIM|steps"),
    "betas that are words": (
        "sd",
        lambda f: edit(f, SCHEDULER, beta_start="x"),
        "cannot be read (beta_start: expected",
    ),
    "a shift that is a word": (
        "sd3",
        lambda f: edit(f, SCHEDULER, shift="x"),
        "cannot be read (shift: expected",
    ),
    "a list for a file": ("sd", lambda f: (f / SCHEDULER).write_text("[]"), "cannot be read"),
    "a binary file": ("sd", lambda f: (f / SCHEDULER).write_bytes(b"\xff\xfe\x00"), "cannot be read"),
    "a scheduler of nobody": (
        "sd",
        lambda f: edit(f, "model_index.json", scheduler=["diffusers", "MyScheduler"]),
        "scheduler MyScheduler does not go with",
    ),
    "a tokenizer that is no JSON": (
        "sd",
        lambda f: (f / "tokenizer/tokenizer.json").write_text("{"),
        "tokenizer cannot be loaded",
    ),
    "a tokenizer of another format": (
        "sd",
        lambda f: (f / "tokenizer/tokenizer.json").write_text('{"model": {"type": "none"}}'),
        "tokenizer cannot be loaded",
    ),
    "a U-Net without blocks": (
        "sd",
        lambda f: edit(f, "unet/config.json", down_block_types=[]),
        "unet has no config that can be read",
    ),
    "an activation of nobody": (
        "sd",
        lambda f: edit(f, "unet/config.json", act_fn="none"),
        "unet has no config that can be read",
    ),
    "a text model of no heads": (
        "sd",
        lambda f: edit(f, "text_encoder/config.json", num_attention_heads=0),
        "text_encoder has no config that can be read",
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore")
def test_invalid_files_are_reported(case: str, folders: dict[str, Path], tmp_path: Path) -> None:
    family, change, says = CASES[case]
    folder = Path(shutil.copytree(folders[family], tmp_path / "teacher"))
    change(folder)
    text = try_out(folder)
    assert any(part in text for part in says.split("|")), text
    assert str(folder) in text or "steps is" in text


@pytest.mark.parametrize(
    "content", ['{"_class_name": []}', "[]", '{"a": 1}', "[" * 20_000, '"x"', '{"_class_name": {"a": 1}}']
)
def test_an_invalid_index_is_reported(content: str, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["sd"], tmp_path / "teacher"))
    (folder / "model_index.json").write_text(content)
    assert "model_index.json" in try_out(folder)


# Folders and files without the layout of diffusers.


def unet_only(teacher: Path, out: Path) -> Path:
    shutil.copytree(teacher / "unet", out / "checkpoint-500" / "unet")
    (out / "checkpoint-500" / "optimizer.bin").touch()
    return out / "checkpoint-500"


@pytest.mark.parametrize("names", ["of peft", "of diffusers before 0.22"])
def test_adapters_that_are_not_merged_are_refused(names: str, teacher: Path, tmp_path: Path) -> None:
    """A pipeline that is saved with its adapters. Without them it would be the model before its training."""
    folder = Path(shutil.copytree(teacher, tmp_path / "teacher"))
    unet = load_teacher(str(folder)).network
    if names == "of peft":
        unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
        unet.save_pretrained(folder / "unet")
    else:
        file = folder / "unet" / "diffusion_pytorch_model.safetensors"
        adapters = {"down_blocks.0.attentions.0.processor.to_q_lora.down.weight": torch.ones(2, 8)}
        save_file({**load_file(file), **adapters}, file, metadata={"format": "pt"})
    assert "unet cannot be loaded: its weights hold LoRA adapters that are not merged (" in try_out(folder)


@pytest.mark.parametrize("base", ["beside them", "elsewhere"])
def test_adapters_of_a_text_encoder_are_refused(base: str, teacher: Path, tmp_path: Path) -> None:
    """transformers adds them to the weights beside them, or loads the model that they name. The digest of the
    teacher would not change with them."""
    folder = Path(shutil.copytree(teacher, tmp_path / "teacher"))
    encoder: Any = load_model(str(folder), "text_encoder")
    encoder.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    encoder.save_pretrained(folder / "text_encoder")
    if base == "elsewhere":
        (folder / "text_encoder" / "config.json").unlink()
        edit(
            folder / "text_encoder",
            "adapter_config.json",
            base_model_name_or_path=str(teacher / "text_encoder"),
        )
    with pytest.raises(
        UserError, match="text_encoder cannot be loaded: it holds LoRA adapters that are not merged"
    ):
        load_model(str(folder), "text_encoder")


def one_model(teacher: Path, out: Path) -> Path:
    return Path(shutil.copytree(teacher / "unet", out / "model"))


def adapters(teacher: Path, out: Path) -> Path:
    (out / "lora").mkdir()
    (out / "lora" / "pytorch_lora_weights.safetensors").touch()
    return out / "lora"


def student(teacher: Path, out: Path) -> Path:
    (out / "student").mkdir()
    (out / "student" / "student.json").write_text("{}")
    return out / "student"


def empty_file(name: str) -> Callable[[Path, Path], Path]:
    def save(teacher: Path, out: Path) -> Path:
        (out / name).touch()
        return out / name

    return save


OTHERS: dict[str, tuple[Callable[[Path, Path], Path], str]] = {
    "a U-Net alone": (unet_only, "no component but unet, as fine-tuning scripts leave checkpoints"),
    "one model": (one_model, "one model, no model_index.json; copy the pipeline"),
    "LoRA adapters": (adapters, "LoRA adapters, no model_index.json; in diffusers, load the pipeline"),
    "a student": (student, "a student of d2g, no teacher; give it to --student"),
    "an empty folder": (lambda t, out: out, "no model_index.json; expected a folder in diffusers layout"),
    "a single file": (empty_file("a b.safetensors"), "a b.safetensors' FOLDER`, then give FOLDER"),
    "a .ckpt": (empty_file("a.ckpt"), "import it once with `d2g teacher import /"),
    "some other file": (empty_file("a.txt"), "a file; expected a folder in diffusers layout"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_errors_about_other_layouts_explain_the_conversion(case: str, teacher: Path, tmp_path: Path) -> None:
    make, says = OTHERS[case]
    with pytest.raises(UserError) as caught:
        resolve(str(make(teacher, tmp_path)))
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_the_suggested_conversion_of_a_unet_works(teacher: Path, tmp_path: Path) -> None:
    fine_tune = unet_only(Path(tiny.save_teacher(tmp_path / "other", seed=3)), tmp_path)
    made = Path(shutil.copytree(teacher, tmp_path / "made"))
    shutil.rmtree(made / "unet")
    shutil.copytree(fine_tune / "unet", made / "unet")
    assert load_teacher(str(made)).latent_shape == (4, 4, 4)
