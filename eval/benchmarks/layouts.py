"""Folders of generated images as the tools of prompt benchmarks read them.

One class per benchmark: how its prompt file is read, how many images a prompt has, and where they lie. The
tools are third-party programs with their own networks, and are not run here.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from d2g.core.atomic_files import write_atomically
from d2g.core.errors import UserError
from d2g.core.png import image_grid, png_bytes
from d2g.data.prompt_files import prompt_cells, prompt_text
from d2g.data.text_files import csv_rows, json_rows


@dataclass(frozen=True)
class BenchmarkPrompt:
    """A prompt of a benchmark: its position, its text, and further fields of its record."""

    position: int
    text: str
    record: dict[str, Any] = field(default_factory=dict)


class BenchmarkLayout(ABC):
    """A folder of images that the tool of a benchmark reads."""

    name: ClassVar[str]
    title: ClassVar[str]
    images_per_prompt: ClassVar[int]
    """Images of a prompt unless the user gives another number."""
    fixed: ClassVar[bool] = False
    """Whether the tool reads this number only."""

    def read(self, file: Path) -> list[BenchmarkPrompt]:
        """The prompts of a file, without exact duplicates."""
        texts = dict.fromkeys(prompt_text(file, cell) for cell in prompt_cells(file))
        return [BenchmarkPrompt(position, text) for position, text in enumerate(filter(None, texts))]

    @abstractmethod
    def files(self, prompt: BenchmarkPrompt, count: int) -> list[Path]:
        """The image files of a prompt, relative to the folder."""

    def save(self, out: Path, prompt: BenchmarkPrompt, images: Tensor) -> None:
        """Write the images [N, 3, H, W] of a prompt."""
        for file, image in zip(self.files(prompt, len(images)), images, strict=True):
            _save(image, out / file, prompt)

    def finish(self, out: Path, prompts: Sequence[BenchmarkPrompt], count: int) -> None:  # noqa: B027
        """Write the file that lists all images. Does nothing where the tool reads none."""


def _save(image: Tensor, file: Path, prompt: BenchmarkPrompt) -> None:
    """Write a PNG whole or not at all: a file that exists counts as done."""
    write_atomically(file, png_bytes(image, {"prompt": prompt.text}))


def _text(file: Path, number: int, row: dict[str, Any], key: str) -> str:
    """The prompt in a row. Raises UserError if there is none."""
    text = prompt_text(file, row.get(key, ""))
    if not text:
        raise UserError(f"{file} line {number} has no {key!r}; expected the benchmark's own file")
    return text


class GenEval(BenchmarkLayout):
    """GenEval (Ghosh et al. 2023): NNNNN/metadata.jsonl and NNNNN/samples/KKKK.png, four images a prompt."""

    name, title, images_per_prompt = "geneval", "GenEval", 4

    def read(self, file: Path) -> list[BenchmarkPrompt]:
        """The lines of evaluation_metadata.jsonl."""
        prompts: list[BenchmarkPrompt] = []
        for number, row in json_rows(file):
            if not {"tag", "include"} <= set(row):
                raise UserError(
                    f"{file} line {number} has no 'tag' and 'include'; expected GenEval's "
                    "evaluation_metadata.jsonl"
                )
            prompts.append(BenchmarkPrompt(len(prompts), _text(file, number, row, "prompt"), row))
        return prompts

    def files(self, prompt: BenchmarkPrompt, count: int) -> list[Path]:
        """NNNNN/samples/KKKK.png."""
        return [Path(f"{prompt.position:05d}/samples/{number:04d}.png") for number in range(count)]

    def save(self, out: Path, prompt: BenchmarkPrompt, images: Tensor) -> None:
        """Images, and the line of the prompt."""
        folder = out / f"{prompt.position:05d}"
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "metadata.jsonl", json.dumps(prompt.record))
        super().save(out, prompt, images)


class GenEval2(BenchmarkLayout):
    """GenEval 2 (Kamath et al., arXiv 2512.16853): image_filepath_data.json maps each prompt to its image."""

    name, title, images_per_prompt, fixed = "geneval2", "GenEval 2", 1, True

    def files(self, prompt: BenchmarkPrompt, count: int) -> list[Path]:
        """images/NNNNN.png."""
        return [Path(f"images/{prompt.position:05d}.png")]

    def finish(self, out: Path, prompts: Sequence[BenchmarkPrompt], count: int) -> None:
        """Write image_filepath_data.json with absolute paths."""
        paths = {prompt.text: str((out / self.files(prompt, 1)[0]).resolve()) for prompt in prompts}
        write_atomically(out / "image_filepath_data.json", json.dumps(paths, indent=1, ensure_ascii=False))


class DPGBench(BenchmarkLayout):
    """DPG-Bench (ELLA, Hu et al. 2024): images/ITEM.png, four images of a prompt in a square."""

    name, title, images_per_prompt, fixed = "dpg-bench", "DPG-Bench", 4, True

    def read(self, file: Path) -> list[BenchmarkPrompt]:
        """The items of dpg_bench.csv, each once."""
        columns, rows = csv_rows(file, ("item_id", "text"))
        if not {"item_id", "text"} <= set(columns):
            raise UserError(
                f"{file} has the columns {', '.join(columns)}; expected dpg_bench.csv with item_id and text"
            )
        prompts: dict[str, BenchmarkPrompt] = {}
        for number, cells in rows:
            if len(cells) < len(columns):
                raise UserError(
                    f"{file} line {number} has {len(cells)} of {len(columns)} columns; correct it"
                )
            row = dict(zip(columns, cells, strict=True))
            item = row["item_id"]
            if Path(item).name != item or item in ("", ".", ".."):
                raise UserError(f"{file} line {number}: item_id {item!r} cannot be the name of a file")
            if item not in prompts:
                text = _text(file, number, row, "text")
                prompts[item] = BenchmarkPrompt(len(prompts), text, {"item_id": item})
        return list(prompts.values())

    def files(self, prompt: BenchmarkPrompt, count: int) -> list[Path]:
        """images/ITEM.png."""
        return [Path(f"images/{prompt.record['item_id']}.png")]

    def save(self, out: Path, prompt: BenchmarkPrompt, images: Tensor) -> None:
        """One square of four images; its side is twice the `--resolution` of the tool."""
        _save(image_grid(images, columns=2, gap=0), out / self.files(prompt, 4)[0], prompt)


class T2ICompBench(BenchmarkLayout):
    """T2I-CompBench (Huang et al. 2023): samples/PROMPT_NNNNNN.png, ten images a prompt."""

    name, title, images_per_prompt = "t2i-compbench", "T2I-CompBench", 10

    def files(self, prompt: BenchmarkPrompt, count: int) -> list[Path]:
        """samples/PROMPT_NNNNNN.png. Raises UserError for a prompt that the tool cannot read from a name."""
        text = prompt.text.rstrip(".")
        if "_" in text or "/" in text or len(text.encode()) > 200:
            raise UserError(
                f"the prompt {prompt.text[:60]!r} cannot be the name of a file that T2I-CompBench reads: "
                "it has '_' or '/', or over 200 bytes; leave it out"
            )
        first = prompt.position * count
        return [Path(f"samples/{text}_{first + number:06d}.png") for number in range(count)]


class _ListedImages(BenchmarkLayout):
    """images/NNNNN_K.png, and a JSON file for the tool's Python interface."""

    images_per_prompt = 1

    def files(self, prompt: BenchmarkPrompt, count: int) -> list[Path]:
        """images/NNNNN_K.png."""
        return [Path(f"images/{prompt.position:05d}_{number}.png") for number in range(count)]

    def _paths(self, out: Path, prompt: BenchmarkPrompt, count: int) -> list[str]:
        return [str((out / file).resolve()) for file in self.files(prompt, count)]


class HPSv3(_ListedImages):
    """HPSv3 (Ma et al. 2025): images.json has the arguments of `HPSv3RewardInferencer.reward`."""

    name, title = "hpsv3", "HPSv3"

    def finish(self, out: Path, prompts: Sequence[BenchmarkPrompt], count: int) -> None:
        """Write images.json: prompts and image_paths, in the same order."""
        texts = [prompt.text for prompt in prompts for _ in range(count)]
        paths = [path for prompt in prompts for path in self._paths(out, prompt, count)]
        content = json.dumps({"prompts": texts, "image_paths": paths}, indent=1, ensure_ascii=False)
        write_atomically(out / "images.json", content)


class VQAScore(_ListedImages):
    """VQAScore (Lin et al. 2024): dataset.json is the list that `VQAScore.batch_forward` takes."""

    name, title = "vqascore", "VQAScore"

    def finish(self, out: Path, prompts: Sequence[BenchmarkPrompt], count: int) -> None:
        """Write dataset.json: the images of each prompt, and its text."""
        rows = [{"images": self._paths(out, prompt, count), "texts": [prompt.text]} for prompt in prompts]
        write_atomically(out / "dataset.json", json.dumps(rows, indent=1, ensure_ascii=False))


def _by_name(layouts: Iterable[BenchmarkLayout]) -> dict[str, BenchmarkLayout]:
    return {layout.name: layout for layout in layouts}


LAYOUTS = _by_name((GenEval(), GenEval2(), DPGBench(), HPSv3(), VQAScore(), T2ICompBench()))
"""Layouts by the name of the benchmark."""
BUNDLED_PROMPTS = {"geneval": Path(__file__).parent / "geneval.jsonl"}
"""Prompt files in the package, by benchmark. GenEval's: MIT License, eval/benchmarks/LICENSE.geneval."""
