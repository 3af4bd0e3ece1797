"""A family of models that the project does not know: one file in `d2g/diffusion/families` is all it takes."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import tiny
import tiny_teachers
from jobs import distill_arguments, distill_config

FILE = '''"""SiT (Ma et al. 2024): the network of DiT as a rectified flow, and a family with pairs alone."""

from d2g.diffusion.families.base import ExportFormat
from d2g.diffusion.families.dit import DiT


class SiT(DiT):
    """Classes and a flow, which no other family has together."""

    name = "sit"
    title = "SiT"
    pipelines = ("SiTPipeline",)
    schedules = regression = gan = lora = ("flow",)
    exports = (ExportFormat("safetensors", ("flow",)),)


class Bare(SiT):
    """Nothing but pairs."""

    name = "bare"
    title = "Bare"
    pipelines = ("BarePipeline",)
    regression = gan = lora = exports = ()
'''
RUN = """
import json, sys
from d2g.diffusion import families
families.__path__.append(sys.argv[1])
from d2g_cli.main import main
for command in json.loads(sys.argv[2]):
    print("##", flush=True)
    try:
        main(command)
    except SystemExit as end:
        print("code", end.code or 0, flush=True)
"""
"""The command line with a further folder of families, as a file in the package's own would be."""


def save_sit(folder: Path, pipeline: str) -> str:
    """A tiny DiT with the scheduler of a flow."""
    tiny_teachers.save_dit(folder, classes=4)
    flow = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(flow))
    entry = ["diffusers", flow["_class_name"]]
    tiny_teachers.edit(folder, "model_index.json", _class_name=pipeline, scheduler=entry)
    tiny.save_lpips(folder / "latent_lpips", 4)
    return str(folder)


def run(families: Path, commands: list[list[Any]], folder: Path) -> tuple[list[str], str]:
    """Commands in one new process -> the output of each, and what they print to stderr."""
    texts = [[str(word) for word in command] for command in commands]
    script = [sys.executable, "-c", RUN, str(families), json.dumps(texts)]
    done = subprocess.run(script, capture_output=True, text=True, timeout=300, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout.split("##\n")[1:], done.stderr


@pytest.mark.slow
def test_one_file_takes_a_family_through_all_stages(tmp_path: Path) -> None:
    families = tmp_path / "families"
    families.mkdir()
    (families / "sit.py").write_text(FILE)
    teacher = save_sit(tmp_path / "teacher", "SiTPipeline")
    bare = save_sit(tmp_path / "bare", "BarePipeline")
    pairs, ode, gan = (tmp_path / name for name in ("pairs", "ode", "gan"))

    def generate(name: str, out: Path) -> list[Any]:
        sets = ("num_pairs=8", "steps=2", "guidance=2", "dtype=float32", "shard_size=8")
        words = ["pairs", "generate", "--teacher", name, "--out", out]
        return [*words, *(word for change in sets for word in ("--set", change))]

    def distill(name: str, stage: str, out: Path, *settings: str) -> list[Any]:
        config = distill_config(
            Path(name), pairs, "train.images=4", stage=stage, init=ode if settings else ""
        )
        return distill_arguments(config, out, *settings)

    heads = ("gan.discriminator=transformer", "gan.token_heads=2", "gan.r1_interval=1")
    commands = [
        ["teacher", "list", "--json"],
        generate(teacher, pairs),
        distill(teacher, "ode", ode),
        distill(teacher, "gan", gan, *heads),
        ["export", "--student", gan, "--format", "safetensors", "--out", tmp_path / "out"],
        ["sample", "--student", tmp_path / "out", "--prompt", "2", "--out", tmp_path / "images"],
        # The other family is refused before pairs are made.
        generate(bare, tmp_path / "bare_pairs"),
        distill(bare, "ode", tmp_path / "bare_ode"),
    ]
    outputs, errors = run(families, commands, tmp_path)
    codes = [int(text.rpartition("code ")[2]) for text in outputs]
    assert codes == [0, 0, 0, 0, 0, 0, 1, 1], errors
    assert "nothing trains on its pairs: `d2g teacher list` has the table" in errors
    assert not (tmp_path / "bare_pairs").exists()
    rows = {row["family"]: row for row in json.loads(outputs[0].splitlines()[0])["families"]}
    assert [rows["SiT"][stage] for stage in ("pairs", "regression", "GAN", "LoRA")] == ["yes"] * 4
    assert [rows["Bare"][stage] for stage in ("regression", "GAN", "LoRA", "export")] == ["no"] * 4
    assert "(SiT, flow) supports pairs, regression, GAN, LoRA, export (safetensors)" in errors
    assert "supports pairs; not supported: regression, GAN, LoRA, export" in errors
    assert "is a BarePipeline; students are made of" in errors.splitlines()[-1]
    assert list((tmp_path / "images").rglob("*.png"))
    stats = (gan / "stats.jsonl").read_text()
    assert "loss/r1" in stats and not (tmp_path / "bare_ode").exists()
