"""`d2g eval export`: draw the images of a prompt benchmark into the folder that its tool reads."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from d2g.core.atomic_files import write_atomically
from d2g.core.config import digest, pick
from d2g.core.errors import SettingError, UserError
from d2g.core.json_files import read_json_object
from d2g.core.progress import Progress, quiet
from d2g.core.tracking.run_directory import sole_owner
from eval.benchmarks.layouts import BUNDLED_PROMPTS, LAYOUTS, BenchmarkLayout, BenchmarkPrompt
from eval.images.resize import NATIVE
from eval.measure.source import ImageSource

MARKER = "d2g_export.json"
"""File in the folder that says what its images are of."""


@dataclass(frozen=True)
class BenchmarkPlan:
    """The prompts of a benchmark and the number of images of each. Image i has prompt i // count."""

    layout: BenchmarkLayout
    prompts: Sequence[BenchmarkPrompt]
    count: int

    @property
    def texts(self) -> list[str]:
        """The prompt of each image."""
        return [prompt.text for prompt in self.prompts for _ in range(self.count)]


def plan_benchmark(name: str, prompts: Path | None, count: int | None) -> BenchmarkPlan:
    """Read a benchmark's prompts.

    Raises SettingError for an unknown benchmark, a missing prompt file and a number of images that the tool
    cannot read; UserError for a file of another kind, and for prompts that its layout cannot hold.
    """
    layout = pick(LAYOUTS, name, "benchmark")
    file = prompts or BUNDLED_PROMPTS.get(name)
    if file is None:
        raise SettingError(f"the prompts of {layout.title} are not in this package; give --prompts FILE")
    count = count or layout.images_per_prompt
    if layout.fixed and count != layout.images_per_prompt:
        raise SettingError(
            f"--num is {count}; {layout.title} reads {layout.images_per_prompt} images of each prompt"
        )
    plan = BenchmarkPlan(layout, layout.read(file), count)
    if not plan.prompts:
        raise UserError(f"{file} holds no prompts, expected at least one; check --prompts")
    # Every prompt must have a place, and no two the same.
    files = [path for prompt in plan.prompts for path in layout.files(prompt, count)]
    if len(set(files)) < len(files):
        raise UserError(f"{file} has prompts that would share a file; expected different ones")
    return plan


def export_benchmark(
    plan: BenchmarkPlan, source: ImageSource, out: Path, batch_size: int, progress: Progress = quiet
) -> dict[str, Any]:
    """Draw all images of a plan into `out`; a second call draws those that are missing.

    Returns the folder, the number of prompts and images, and how many were new. Raises UserError for a folder
    with images of another benchmark, sampler or prompts.
    """
    layout, count = plan.layout, plan.count
    facts = {
        "benchmark": layout.name,
        "count": count,
        "images": digest(source.facts),  # the sampler, its prompts and its seed
    }
    with sole_owner(out, "draws into"):
        _claim(out, facts)

        # A prompt of which one image is missing is drawn again as a whole.
        missing = [
            prompt
            for prompt in plan.prompts
            if not all((out / file).is_file() for file in layout.files(prompt, count))
        ]
        # Prompts that are next to each other share a batch.
        for prompts in _neighbors(missing, max(1, batch_size // count)):
            first, last = prompts[0].position * count, (prompts[-1].position + 1) * count
            batches = source.draw(range(first, last), batch_size, (NATIVE,))
            images = [image for batch in batches for image in batch.views[NATIVE]]
            for prompt in prompts:
                start = prompt.position * count - first
                layout.save(out, prompt, torch.stack(images[start : start + count]))
            progress("export", last, len(plan.prompts) * count)
        layout.finish(out, plan.prompts, count)
    return {
        "out": str(out),
        "benchmark": layout.title,
        "prompts": len(plan.prompts),
        "images": len(plan.prompts) * count,
        "new": len(missing) * count,
    }


def _claim(out: Path, facts: dict[str, Any]) -> None:
    """Write what the images of the folder are of. Raises UserError if it holds others."""
    marker = out / MARKER
    if marker.is_file():
        if read_json_object(marker, "export into an empty folder") != facts:
            raise UserError(
                f"{out} holds images of another benchmark, sampler, seed or list of prompts; choose another "
                "--out"
            )
        return
    write_atomically(marker, json.dumps(facts, indent=1))


def _neighbors(prompts: Sequence[BenchmarkPrompt], most: int) -> list[list[BenchmarkPrompt]]:
    """Groups of at most `most` prompts with consecutive positions."""
    groups: list[list[BenchmarkPrompt]] = []
    for prompt in prompts:
        if groups and len(groups[-1]) < most and groups[-1][-1].position + 1 == prompt.position:
            groups[-1].append(prompt)
        else:
            groups.append([prompt])
    return groups
