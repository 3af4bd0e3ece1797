"""distill.export.output: allowed output folders, atomic writes and parity checks of exports."""

import json
import logging
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import LCMScheduler
from safetensors.torch import load_file, save_file

from d2g.core.errors import SettingError, UserError
from d2g.core.staged_folder import staged
from d2g.diffusion.families.registry import FAMILIES
from d2g.diffusion.pretrained import load_vae, save_component
from distill.config.export import FORMATS_WITH_CARD, CardOptions, ExportConfig
from distill.config.student import StudentConfig
from distill.export.export import MAIN_FILES, WRITERS, export
from distill.export.output import PARITY_BOUND, check_parity, max_abs_diff
from distill.student_files import student_folder
from exported import save_lora_run, save_run
from latent_lpips.config import LPIPSConfig
from latent_lpips.distance import LatentLPIPS
from latent_lpips.weights import save_lpips

FORMATS = ("safetensors", "diffusers", "lora", "comfyui", "onnx")


def test_the_lists_of_formats_agree() -> None:
    """Without a main file, an export could replace that of another student in part."""
    families = {entry.name for family in FAMILIES.values() for entry in family.exports}
    assert set(FORMATS) == set(MAIN_FILES) == families
    assert set(WRITERS) <= set(FORMATS_WITH_CARD) <= set(FORMATS)


@pytest.fixture(scope="module")
def run(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_run(tmp_path_factory.mktemp("out") / "run", str(teacher), StudentConfig(lora_rank=2))


def listing(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("where", ["run", "another run", "checkpoint", "teacher", "pipeline", "component"])
def test_an_export_over_a_run_or_its_sources_is_refused(
    where: str, form: Any, run: str, teacher: Path, tmp_path: Path
) -> None:
    own = shutil.copytree(teacher, tmp_path / "teacher")
    student = shutil.copytree(run, tmp_path / "run")
    config = student / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "teacher": str(own)}))
    (tmp_path / "new" / "checkpoints").mkdir(parents=True)
    shutil.copytree(teacher, tmp_path / "other")
    out, message = {
        "run": (student, r"holds a run or a model \(config.json, checkpoints\)"),
        "another run": (tmp_path / "new", r"holds a run or a model \(checkpoints\)"),
        "checkpoint": (student_folder(str(student))[0], r"holds a run or a model \(meta.json\)"),
        "teacher": (tmp_path / "other" / ".." / "teacher", "is the teacher itself"),
        "pipeline": (tmp_path / "other", "holds a pipeline that no export wrote"),
        "component": (own / "unet", r"holds a run or a model \(config.json\)"),
    }[where]
    before = listing(tmp_path)
    with pytest.raises(UserError, match=f"^--out .* {message}; choose another --out$") as caught:
        export(ExportConfig(student=str(student), format=form), out)
    assert caught.value.exit_code == 1 and listing(tmp_path) == before


def test_an_export_may_replace_an_earlier_one_but_not_its_input(run: str, tmp_path: Path) -> None:
    small, pipeline = tmp_path / "small", tmp_path / "pipeline"
    export(ExportConfig(student=run), small)
    with pytest.raises(UserError, match="is the student itself"):
        export(ExportConfig(student=str(small), dtype="bf16"), small)
    (small / "notes.txt").write_text("mine")
    export(ExportConfig(student=run, dtype="bf16"), small)
    assert {t.dtype for t in load_file(small / "ema.safetensors").values()} == {torch.bfloat16}
    assert sorted(p.name for p in small.iterdir()) == ["ema.safetensors", "notes.txt", "student.json"]
    export(ExportConfig(student=run, format="diffusers"), pipeline)
    (pipeline / "unet" / "stale.safetensors").write_text("")
    export(ExportConfig(student=run, format="diffusers"), pipeline)
    assert not (pipeline / "unet" / "stale.safetensors").exists()


@pytest.mark.parametrize("form", FORMATS[1:])
def test_an_export_replaces_no_files_of_something_else(form: Any, run: str, tmp_path: Path) -> None:
    """A project's README.md, even one that names this program, and its folders named like components."""
    project = tmp_path / "project"
    (project / "scheduler").mkdir(parents=True)
    (project / "scheduler" / "jobs.txt").write_text("mine")
    (project / "README.md").write_text("# Mine, made with diffusion2gan")
    before = listing(project)
    with pytest.raises(UserError, match=r"holds what no export wrote .*README.md.*; choose another --out$"):
        export(ExportConfig(student=run, format=form), project)
    assert listing(project) == before


def test_an_export_is_atomic(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match="stop"), staged(out, "exports to") as folder:
        (folder / "a").write_text("new")
        raise UserError("stop")
    assert not out.exists()
    (out / ".staged.1.tmp").mkdir(parents=True)  # left by a killed export
    (out / "a").write_text("old")
    with pytest.raises(UserError, match="stop"), staged(out, "exports to") as folder:
        (folder / "a").write_text("new")
        raise UserError("stop")
    assert listing(out) == {"a": b"old"} and len(list(out.iterdir())) == 1
    with staged(out, "exports to") as folder:
        (folder / "a").write_text("new")
    assert listing(out) == {"a": b"new"}
    with (
        pytest.raises(UserError, match=r"cannot write .*out.*: Not a directory; choose another --out"),
        staged(out / "a", "exports to"),
    ):
        raise AssertionError("not reached")


def test_an_export_replaces_links_and_what_is_no_folder(tmp_path: Path) -> None:
    """A folder on another disk, behind a link, stopped the replacement halfway: new folders, old files."""
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    for folder in (out / "scheduler", elsewhere):
        folder.mkdir(parents=True)
        (folder / "a").write_text("old")
    (out / "unet").symlink_to(elsewhere)
    (out / "vae").write_text("old")
    (out / "model_index.json").write_text("old")
    with staged(out, "exports to") as folder:
        for name in ("scheduler", "unet", "vae"):
            (folder / name).mkdir()
            (folder / name / "a").write_text("new")
        (folder / "model_index.json").write_text("new")
    assert set(listing(out).values()) == {b"new"} and len(listing(out)) == 4
    assert listing(elsewhere) == {"a": b"old"}


def test_weights_have_the_permissions_of_other_files(run: str, teacher: Path, tmp_path: Path) -> None:
    """A colleague's account, and a container's, may read what the umask allows. safetensors says 0600."""
    export(ExportConfig(student=run), tmp_path / "export")
    export(ExportConfig(student=run, format="diffusers"), tmp_path / "pipeline")
    save_component(load_vae(str(teacher)), tmp_path / "vae")
    save_lpips(LatentLPIPS(LPIPSConfig(channels=4, width=0.0625)), tmp_path / "lpips", {})
    plain = tmp_path / "plain"
    plain.touch()
    weights = [*tmp_path.rglob("*.safetensors"), *Path(run).rglob("*.safetensors")]
    assert len({path.parts[-2] for path in weights}) > 5
    assert {path.stat().st_mode for path in weights} == {plain.stat().st_mode}


def test_weights_that_may_not_be_read_are_named(run: str, tmp_path: Path) -> None:
    """safetensors says that they are not there."""
    weights = Path(shutil.copytree(run, tmp_path / "run")) / "checkpoints" / "000000004" / "ema.safetensors"
    weights.chmod(0)
    if os.access(weights, os.R_OK):
        pytest.skip("root reads every file")
    with pytest.raises(UserError, match=r"ema.safetensors: no permission; change that"):
        export(ExportConfig(student=str(tmp_path / "run")), tmp_path / "export")


def test_parity_bound() -> None:
    assert check_parity(PARITY_BOUND, torch.float32) == PARITY_BOUND
    with pytest.raises(UserError, match=r"differ by 1\.50e-02 .* at most 0\.001 in float32; nothing was"):
        check_parity(1.5e-2, torch.float32)
    assert check_parity(0.5, torch.float16) == 0.5
    for dtype in (torch.float32, torch.bfloat16):
        for parity in (math.nan, math.inf):
            with pytest.raises(UserError, match="values that are not finite"):
                check_parity(parity, dtype)


def test_a_nan_anywhere_is_the_largest_difference() -> None:
    a, b = torch.zeros(2, 3), torch.tensor([[0.0, 1, 2], [0, 0, 0]])
    assert max_abs_diff((a, a), (a, b)) == max_abs_diff((a, b), (a, a)) == 2
    assert math.isnan(max_abs_diff((a, a * math.nan), (a, b))) and math.isnan(
        max_abs_diff((a, b), (a, a * math.nan))
    )


def set_weight_of_copy(run: str, folder: Path, value: float) -> str:
    """Copy a run and set one weight of its student to `value`."""
    copy = shutil.copytree(run, folder)
    file = copy / "checkpoints" / "000000004" / "ema.safetensors"
    tensors = load_file(file)
    tensors["unet.conv_out.bias"][0] = value
    save_file(tensors, file)
    return str(copy)


def test_a_student_that_overflows_half_precision_is_refused(run: str, tmp_path: Path) -> None:
    big = set_weight_of_copy(run, tmp_path / "run", 1e6)
    with pytest.raises(UserError, match="in float16, draws values that are not finite"):
        export(ExportConfig(student=big), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    broken = set_weight_of_copy(run, tmp_path / "broken", math.nan)
    with pytest.raises(UserError, match="not finite"):
        export(ExportConfig(student=broken, format="diffusers"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["diffusers", "lora"])
def test_an_export_with_wrong_parity_leaves_no_files(
    form: Any, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scheduler's step is changed, as another version of diffusers might do."""
    run, step = save_lora_run(tmp_path / "run", str(teacher), StudentConfig(lora_rank=2)), LCMScheduler.step

    def changed_step(*args: Any, **settings: Any) -> Any:
        output = step(*args, **settings)
        return tuple(1.01 * part for part in output)

    monkeypatch.setattr(LCMScheduler, "step", changed_step)
    with pytest.raises(UserError, match=r"latents or images differ by .* at most 0\.001 in float32; nothing"):
        export(ExportConfig(student=run, format=form), tmp_path / "new" / "out")
    assert not (tmp_path / "new" / "out").exists()


@pytest.mark.parametrize("options", [{"scores": ("a.json",)}, {"license": "mit"}, {"watts": 3.0}])
def test_card_options_of_a_format_without_card_are_refused(options: dict[str, Any]) -> None:
    (name,) = options
    message = (
        f"the format safetensors has no model card, and no use for {name}; .* diffusers, lora, comfyui, onnx"
    )
    with pytest.raises(SettingError, match=message):
        ExportConfig(card=CardOptions(**options))
    ExportConfig(card=CardOptions(**options), format="onnx")


@pytest.fixture
def library_messages() -> Iterator[list[str]]:
    messages: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    listener = Listener()
    for name in ("diffusers", "peft"):
        logging.getLogger(name).addHandler(listener)
    yield messages
    for name in ("diffusers", "peft"):
        logging.getLogger(name).removeHandler(listener)


@pytest.mark.parametrize("form", ["diffusers", "lora"])
def test_an_export_causes_no_other_library_messages(
    form: Any, teacher: Path, library_messages: list[str], tmp_path: Path
) -> None:
    run = save_lora_run(tmp_path / "run", str(teacher), StudentConfig(lora_rank=2))
    export(ExportConfig(student=run, format=form), tmp_path / "out")
    # The parity prompt exceeds the tiny tokenizer's limit, which logs a warning.
    assert library_messages and all("truncated because CLIP" in line for line in library_messages), (
        library_messages
    )


def test_export_command_errors(d2g: Any, run: str, tmp_path: Path) -> None:
    words, scores = (
        ("export", "--student", run, "--out", tmp_path / "out"),
        ("--scores", tmp_path / "none.json"),
    )
    for more in ((), ("--dry-run",)):
        ended = d2g(*words, *scores, *more)
        assert ended.code == 2 and "safetensors has no model card, and no use for scores" in ended.error
    ended = d2g(*words, *scores, "--format", "lora")
    assert ended.code == 1 and "none.json is no evaluation result" in ended.error
    assert not (tmp_path / "out").exists()
    ended = d2g("export", "--student", run, "--out", run)
    assert ended.code == 1 and "holds a run" in ended.error
    ended = d2g(*words, *scores, "--set", "format=onnx", "--dry-run")
    assert ended.code == 1 and "none.json: no such file or folder" in ended.error
    (tmp_path / "none.json").write_text("{}")
    ended = d2g(*words, *scores, "--set", "format=onnx", "--dry-run", "--json")
    assert ended.json["config"]["card"]["scores"] == [str(tmp_path / "none.json")]
