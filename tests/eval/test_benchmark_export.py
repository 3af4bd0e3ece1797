"""eval.runner.benchmark_export: each benchmark's folder read as its tool reads it, and calls that resume."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from typer.main import get_command

from d2g.core.errors import SettingError, UserError
from d2g_cli.eval import eval_app
from eval.benchmarks.layouts import BUNDLED_PROMPTS, LAYOUTS
from eval.measure.source import ImageSource
from eval.protocols.protocol import Protocol
from eval.runner.benchmark_export import export_benchmark, plan_benchmark
from eval.runner.samplers import SamplingRequest, sampler_source
from pairgen.config import PairConfig

SIDE = 4


def source(texts: list[str], drawn: list[int]) -> ImageSource:
    """Image i has the gray value i / 127.5 - 1; `drawn` records which are drawn."""

    def sample(numbers: range, prompts: list[str]) -> Tensor:
        drawn.extend(numbers)
        return torch.tensor([*numbers]).view(-1, 1, 1, 1).expand(-1, 3, SIDE, SIDE) / 127.5 - 1

    return sampler_source("gray", {"kind": "gray"}, SamplingRequest(prompts=texts), sample)


def gray(file: Path | Image.Image) -> int:
    """The value of a gray image."""
    pixels = np.asarray(file if isinstance(file, Image.Image) else Image.open(file))
    assert (pixels == pixels[0, 0]).all()
    return int(pixels[0, 0, 0])


def export(name: str, prompts: Path, out: Path, **settings: Any) -> tuple[dict[str, Any], list[int]]:
    drawn: list[int] = []
    plan = plan_benchmark(name, prompts, settings.pop("num", None))
    return export_benchmark(plan, source(plan.texts, drawn), out, settings.pop("batch_size", 3)), drawn


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("a red cube.\na blue ball\na cat, a dog\n")
    return file


def test_geneval(tmp_path: Path) -> None:
    bundled = [json.loads(line) for line in BUNDLED_PROMPTS["geneval"].read_text().splitlines()]
    assert len(bundled) == 553 and len(plan_benchmark("geneval", None, None).texts) == 4 * 553
    file = tmp_path / "evaluation_metadata.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in bundled[:3]))
    summary, _ = export("geneval", file, tmp_path / "out")
    assert (summary["prompts"], summary["images"], summary["new"]) == (3, 12, 12)
    # As evaluate_images.py reads it: folders of digits, one JSON object, files of digits.
    folders = sorted(path for path in (tmp_path / "out").iterdir() if path.is_dir() and path.name.isdigit())
    assert [json.loads((folder / "metadata.jsonl").read_text()) for folder in folders] == bundled[:3]
    samples = [[gray(file) for file in sorted((folder / "samples").iterdir())] for folder in folders]
    assert samples == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert all(re.match(r"\d+\.png", file.name) for file in folders[0].glob("samples/*"))


def test_geneval2(tmp_path: Path, lines: Path) -> None:
    export("geneval2", lines, tmp_path / "out")
    paths = json.loads((tmp_path / "out/image_filepath_data.json").read_text())
    assert {prompt: gray(Path(path)) for prompt, path in paths.items()} == {
        "a red cube.": 0, "a blue ball": 1, "a cat, a dog": 2
    }  # fmt: skip
    with pytest.raises(SettingError, match="--num is 2; GenEval 2 reads 1 images of each prompt"):
        plan_benchmark("geneval2", lines, 2)


def test_dpg_bench(tmp_path: Path) -> None:
    file = tmp_path / "dpg_bench.csv"
    file.write_text(
        'item_id,text,proposition_id\npart1,"a cat, asleep",1\npart1,"a cat, asleep",2\ncoco7,a dog,1\n'
    )
    summary, _ = export("dpg-bench", file, tmp_path / "out")
    assert (summary["prompts"], summary["images"]) == (2, 8)
    # As compute_dpg_bench.py crops it with --resolution 4 --pic-num 4; the name is the item.
    for item, first in (("part1", 0), ("coco7", 4)):
        square = Image.open(tmp_path / f"out/images/{item}.png")
        corners = [(0, 0), (SIDE, 0), (0, SIDE), (SIDE, SIDE)]
        crops = [square.crop((x, y, x + SIDE, y + SIDE)) for x, y in corners]
        assert square.size == (2 * SIDE, 2 * SIDE) and [gray(crop) for crop in crops] == [
            *range(first, first + 4)
        ]
    assert len(list((tmp_path / "out/images").iterdir())) == 2
    file.write_text("item_id,text\n../up,a cat\n")
    with pytest.raises(UserError, match=r"line 2: item_id '\.\./up' cannot be the name of a file"):
        plan_benchmark("dpg-bench", file, None)
    file.write_text("text,item_id\na cat\n")
    with pytest.raises(UserError, match="line 2 has 1 of 2 columns; correct it"):
        plan_benchmark("dpg-bench", file, None)
    file.write_text("id,prompt\n1,a cat\n")
    with pytest.raises(UserError, match=r"expected dpg_bench\.csv with item_id and text"):
        plan_benchmark("dpg-bench", file, None)


def test_t2i_compbench(tmp_path: Path, lines: Path) -> None:
    export("t2i-compbench", lines, tmp_path / "out", num=2)
    # As BLIP_vqa.py reads it: sorted by the number at the end, the prompt before the first "_".
    names = sorted(
        (tmp_path / "out/samples").iterdir(), key=lambda f: int(f.name.split("_")[-1].split(".")[0])
    )
    assert [file.name.split("_")[0] for file in names] == [
        "a red cube", "a red cube", "a blue ball", "a blue ball", "a cat, a dog", "a cat, a dog"
    ]  # fmt: skip
    assert [gray(file) for file in names] == [*range(6)]
    lines.write_text("a file_name\n")
    with pytest.raises(
        UserError, match="'a file_name' cannot be the name of a file that T2I-CompBench reads"
    ):
        plan_benchmark("t2i-compbench", lines, None)


def test_lists_for_python_interfaces(tmp_path: Path, lines: Path) -> None:
    export("hpsv3", lines, tmp_path / "hpsv3")
    content = json.loads((tmp_path / "hpsv3/images.json").read_text())
    assert content["prompts"] == ["a red cube.", "a blue ball", "a cat, a dog"]
    assert [gray(Path(path)) for path in content["image_paths"]] == [0, 1, 2]
    export("vqascore", lines, tmp_path / "vqascore", num=2)
    rows = json.loads((tmp_path / "vqascore/dataset.json").read_text())
    assert [(row["texts"], [gray(Path(path)) for path in row["images"]]) for row in rows] == [
        (["a red cube."], [0, 1]), (["a blue ball"], [2, 3]), (["a cat, a dog"], [4, 5])
    ]  # fmt: skip


@pytest.mark.parametrize("name", sorted(LAYOUTS))
def test_a_second_call_draws_what_is_missing(name: str, tmp_path: Path, lines: Path) -> None:
    file, out = lines, tmp_path / "out"
    if name == "geneval":
        file = tmp_path / "geneval.jsonl"
        file.write_text("".join(BUNDLED_PROMPTS["geneval"].read_text().splitlines(keepends=True)[:3]))
    if name == "dpg-bench":
        file = tmp_path / "dpg_bench.csv"
        file.write_text("item_id,text\na,x\nb,y\nc,z\n")
    plan = plan_benchmark(name, file, None)
    count = plan.count
    export(name, file, out)
    expected = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for path in plan.layout.files(plan.prompts[1], count):
        (out / path).unlink()
    summary, drawn = export(name, file, out, batch_size=1)
    assert (summary["new"], drawn) == (count, [*range(count, 2 * count)])
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == expected
    assert export(name, file, out)[1] == []
    # Images of other prompts do not mix with these.
    file.write_text(
        file.read_text().replace("a red cube", "a red ball").replace(",x", ",w").replace("bench", "cow")
    )
    with pytest.raises(
        UserError, match="holds images of another benchmark, sampler, seed or list of prompts"
    ):
        export(name, file, out)


def test_images_have_the_noise_of_an_evaluation_and_not_that_of_training_pairs() -> None:
    (seed,) = (o.default for o in get_command(eval_app).commands["export"].params if o.name == "seed")  # type: ignore[attr-defined]
    assert seed == Protocol(name="any").seed != PairConfig().seed


def test_prompts_that_are_missing(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="unknown benchmark 'genevl'; did you mean 'geneval'"):
        plan_benchmark("genevl", None, None)
    with pytest.raises(
        SettingError, match="the prompts of DPG-Bench are not in this package; give --prompts"
    ):
        plan_benchmark("dpg-bench", None, None)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a cat"}\n')
    with pytest.raises(UserError, match="line 1 has no 'tag' and 'include'"):
        plan_benchmark("geneval", tmp_path / "prompts.jsonl", None)


def test_the_help_names_every_benchmark() -> None:
    command: Any = get_command(eval_app)
    (option,) = (p for p in command.commands["export"].params if p.name == "benchmark")
    assert set(re.findall(r"[a-z0-9-]{5,}", option.help)) == set(LAYOUTS)
