"""A model card filled from what was measured: nothing in it is made up, and what is not known says so."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from d2g.diffusion.pretrained import SHIPPED, resolve
from distill.config.export import CardOptions
from distill.export.card_history import History, cost_lines, pairs_lines, recipe_lines
from distill.export.card_history import history as history
from distill.export.card_scores import score_lines

LICENCES = {
    "miniature": "apache-2.0",
    "runwayml/stable-diffusion-v1-5": "creativeml-openrail-m",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "creativeml-openrail-m",
    "CompVis/stable-diffusion-v1-4": "creativeml-openrail-m",
    "stabilityai/stable-diffusion-2-1": "openrail++",
    "stabilityai/stable-diffusion-2-1-base": "openrail++",
    "stabilityai/stable-diffusion-xl-base-1.0": "openrail++",
}
"""Licences of teachers whose folder says none, by their hub id."""


def kg_co2(device_hours: float, options: CardOptions) -> float:
    """Hours over all devices x watts x carbon of electricity; without the building's share (PUE)."""
    return device_hours * options.watts / 1000 * options.kg_per_kwh


def licence_of(teacher: str) -> str | None:
    """A teacher's licence: from the front matter of its README.md, else as LICENCES has it."""
    readme = resolve(teacher) / "README.md"
    if readme.is_file():
        parts = readme.read_text(encoding="utf-8").split("---")
        for line in parts[1].splitlines() if len(parts) > 2 and not parts[0].strip() else ():
            if line.startswith("license:"):
                return line.partition(":")[2].strip().strip("\"'")
    return LICENCES.get(teacher)


def card(
    *,
    student: str,
    teacher: str,
    where: str,
    parity: float,
    options: CardOptions,
    scores: Sequence[Mapping[str, Any]],
    what: str,
    use: Sequence[str],
    library: str = "diffusers",
    text: bool = True,
) -> str:
    """The README.md of an export, in the hub's format. where: the point at which the network is asked; what:
    as in "One-step LoRA"; use: lines that show how to draw; scores: results as `own_results` gives them;
    text: whether it is told any.
    """
    runs, licence, named = history(student), options.licence or licence_of(teacher), _named(teacher)
    say = (
        f"Distilled with diffusion2gan (Diffusion2GAN, Kang et al., ECCV 2024) from {named}: one evaluation "
    )
    say += f"of the network at {where} turns noise into an image."
    front = ["---", *_front(named, licence, library, text), "---"]
    return "\n".join(
        [
            *front, "", f"# {what} of {named}", "", say,
            *_section("Use", [line.replace("TEACHER", named) for line in use]),
            *_measured(runs, named, licence, parity, options, scores),
        ]
    )  # fmt: skip


def pipeline_usage(kind: str, guided: bool, dtype: str) -> list[str]:
    """How to draw from an exported pipeline of this class."""
    untold = kind in ("DDPMPipeline", "LDMPipeline")
    told = "" if untold else '"a red cube", '
    scale = ", guidance_scale=8.0" if guided else ""
    if guided:
        note = " The student is told `guidance_scale` and imitates it in its one evaluation."
    else:
        note = " `guidance_scale` and negative prompts do nothing: guidance is in the weights."
    return [
        "```python",
        "import torch",
        f"from diffusers import {kind}",
        "",
        f'pipe = {kind}.from_pretrained("THIS_FOLDER").to(torch.{dtype})',
        f"image = pipe({told}num_inference_steps=1{scale}).images[0]",
        "```",
        "",
        "Other numbers of steps are refused by the scheduler." + ("" if untold else note),
    ]


def adapter_usage(kind: str, rank: int) -> list[str]:
    """How to draw from the teacher's own pipeline with exported adapters."""
    return [
        "```python",
        f"from diffusers import LCMScheduler, {kind}",
        "",
        f'pipe = {kind}.from_pretrained("TEACHER")',
        'pipe.scheduler = LCMScheduler.from_pretrained("THIS_FOLDER", subfolder="scheduler")',
        'pipe.load_lora_weights("THIS_FOLDER")',
        'image = pipe("a red cube", num_inference_steps=1, guidance_scale=1).images[0]',
        "```",
        "",
        f"Adapters of rank {rank}. `guidance_scale=1` matters: guidance is in the adapters already.",
    ]


def _measured(
    runs: History,
    teacher: str,
    licence: str | None,
    parity: float,
    options: CardOptions,
    scores: Sequence[Mapping[str, Any]],
) -> list[str]:
    """The sections that hold what was measured."""
    check = "Largest difference in latents and in pixels from the training code's own student, drawn from "
    check += f"this folder in fp32: {parity:.2e}."
    return [
        *_section("How it was made", [*_teacher(teacher, licence), *pairs_lines(runs), *recipe_lines(runs)]),
        *_section("Scores", [line for result in scores for line in score_lines(result)]),
        *_section("Cost", _cost(runs, options)),
        *_section("Check", [check, ""]),
    ]


def _section(title: str, lines: Sequence[str]) -> list[str]:
    return ["", f"## {title}", "", *(lines or ["Not measured."])]


def _named(teacher: str) -> str:
    """A teacher's name for others: a hub id or shipped name as it is, of a path the last part only."""
    return teacher if teacher in SHIPPED or not Path(teacher).exists() else Path(teacher).resolve().name


def _front(teacher: str, licence: str | None, library: str, text: bool) -> list[str]:
    return [
        f"license: {licence or 'other'}",
        *([f"base_model: {teacher}"] if "/" in teacher else []),
        f"library_name: {library}",
        f"pipeline_tag: {'text-to-image' if text else 'unconditional-image-generation'}",
        "tags: [one-step, distillation, diffusion2gan]",
    ]


def _teacher(teacher: str, licence: str | None) -> list[str]:
    known = licence or "not stated in its folder; look it up before you share this"
    return [f"- Teacher: {teacher}. Licence: {known}. Its terms hold for this student too."]


def _cost(runs: History, options: CardOptions) -> list[str]:
    lines, hours = cost_lines(runs)
    if hours is None:
        return [*lines, *(["- Device hours: not recorded."] if runs.stages else [])]
    return [
        *lines,
        f"- Training: {hours:.3g} device hours, about {kg_co2(hours, options):.3g} kg CO2 (assumed: "
        f"{options.watts:g} W a device, {options.kg_per_kwh:g} kg CO2 a kWh; the pairs not counted). What "
        "kind of device is not recorded.",
    ]
