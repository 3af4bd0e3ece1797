"""Run folders to export, and evaluation results for the model card."""

import json
from pathlib import Path
from typing import Any

import torch

from d2g.core.atomic_files import write_atomically
from d2g.core.config import to_json
from d2g.core.distributed.checkpoint import save
from d2g.core.seeds import generator
from distill.config.run import DistillConfig
from distill.config.student import StudentConfig
from distill.models.student import student_from_teacher
from distill.training.state import new_state
from eval.runner.samplers import SamplingRequest, student_source

PROMPT = ["a red cube", "two green cones"]


def save_run(folder: Path, teacher: str, config: StudentConfig | None = None, **settings: Any) -> str:
    """Save a run folder whose student is the teacher with small random changes of every weight."""
    run_config = DistillConfig(teacher=teacher, student=config or StudentConfig(), **settings)
    student = student_from_teacher(teacher, run_config.student_timestep, run_config.student)
    rng = generator(3, 1)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=rng))
    write_atomically(folder / "config.json", json.dumps(to_json(run_config)))
    save(folder / "checkpoints", 4, {"ema": student.state_dict()}, {}, {"steps": 1})
    return str(folder)


def save_lora_run(
    folder: Path, teacher: str, config: StudentConfig, init: str = "", seed: int = 4, **settings: Any
) -> str:
    """Save a run folder whose student has LoRA adapters with nonzero weights."""
    run_config = DistillConfig(teacher=teacher, student=config, init=init, **settings)
    student = new_state(run_config, torch.device("cpu")).student.module
    rng = generator(seed, 1)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if ".lora_" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=rng))
    write_atomically(folder / "config.json", json.dumps(to_json(run_config)))
    save(folder / "checkpoints", 4, {"ema": student.state_dict()}, {}, {"steps": 1})
    return str(folder)


def readme_of(exported: Path) -> str:
    return (exported / "README.md").read_text(encoding="utf-8")


def save_result_of(file: Path, student: str) -> str:
    """Save the result that `d2g eval run --student` would write for this student, with made-up numbers."""
    source = student_source(student, SamplingRequest(prompts=["a red cube"]))
    return save_result(file, name=source.name, **source.facts)


def save_result(file: Path, **source: Any) -> str:
    """Save a result of `d2g eval run` with made-up numbers and this source."""
    facts = {"protocol": "coco", "protocol_sha256": "abc" * 20, "fid": 9.29, "counts": {"images": 30000}}
    write_atomically(file, json.dumps({**facts, "source": source}))
    return str(file)
