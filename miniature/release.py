"""Turns trained runs into the folders under weights/: in half precision, without training state, with
metadata.
"""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from d2g.core.atomic_files import write_atomically
from d2g.core.progress import Progress, quiet
from d2g.core.seeds import noise
from d2g.diffusion.latents import from_uint8
from d2g.diffusion.teacher import load_teacher
from distill.export.export import export_student
from distill.sampling import load_student
from eval.images.resize import NATIVE
from eval.protocols.config import EvalRun
from eval.protocols.protocol import PROTOCOLS
from eval.runner.run import run_evaluation
from eval.runner.samplers import SamplingRequest, ode_source
from miniature.metrics import TEST_SEED
from miniature.oracle import caption_accuracy, load_oracle
from miniature.registration import register_eval_scenes
from miniature.sampling import scene_captions

COMPONENTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler", "latent_lpips", "clip")


def store_as_fp16(folder: Path) -> None:
    """Convert the fp32 tensors in a folder's safetensors files to fp16, in place."""
    for path in sorted(folder.rglob("*.safetensors")):
        tensors = load_file(path)
        half = {k: v.half() if v.dtype == torch.float32 else v for k, v in tensors.items()}
        save_file(half, path, metadata={"format": "pt"})


def source_commit() -> str:
    """Return the commit of this checkout."""
    command = ["git", "rev-parse", "HEAD"]
    return subprocess.run(
        command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
    ).stdout.strip()


def release_teacher(run: Path, out: Path, how: dict[str, Any], progress: Progress = quiet) -> dict[str, Any]:
    """Copy a finished `d2g teacher train` folder in fp16 without training/, score it, and write meta.json.

    `how` is added to the metadata, which is returned.
    """
    out.mkdir(parents=True, exist_ok=True)
    shutil.copy(run / "model_index.json", out / "model_index.json")
    # Copy the components without training state, in half precision.
    for component in COMPONENTS:
        if (out / component).is_dir():
            shutil.rmtree(out / component)
        shutil.copytree(run / component, out / component)
        if (config := out / component / "config.json").is_file():
            facts = json.loads(config.read_text(encoding="utf-8"))
            facts.pop("_name_or_path", None)  # a path of the training machine
            write_atomically(config, json.dumps(facts, indent=2) + "\n")
    for component in ("unet", "vae", "text_encoder", "latent_lpips"):
        store_as_fp16(out / component)
    stages = {
        p.parent.name: json.loads(p.read_text()) for p in sorted((run / "training").glob("*/scores.json"))
    }
    # Score the copy, not the original.
    meta = {
        "what": "miniature teacher",
        "commit": source_commit(),
        **how,
        "stages": stages,
        "scores": score_teacher(str(out), progress),
    }
    write_atomically(out / "meta.json", json.dumps(meta, indent=1) + "\n")
    lpips = {"what": "LatentLPIPS of the miniature's latents", "commit": meta["commit"], **how}
    scores = {"scores": stages.get("lpips", {})}
    write_atomically(out / "latent_lpips" / "meta.json", json.dumps(lpips | scores, indent=1) + "\n")
    return meta


def score_teacher(
    teacher: str, progress: Progress, num: int = 256, steps: int = 50, guidance: float = 3.0
) -> dict[str, float]:
    """Return the caption accuracy of the teacher's samples on `num` captions of each split."""
    oracle, loaded = load_oracle(), load_teacher(teacher)
    scores: dict[str, float] = {}
    for split in ("train", "heldout"):
        texts, images = scene_captions(num, TEST_SEED, split), []
        source = ode_source(loaded, SamplingRequest(prompts=texts), steps=steps, guidance=guidance)
        for batch in source.draw(range(num), 64, (NATIVE,)):
            images.append(batch.views[NATIVE])
            progress(f"score {split}", 64 * len(images), num)
        accuracy = caption_accuracy(oracle, from_uint8(torch.cat(images)), texts)
        scores |= {f"{split}_caption_accuracy": accuracy.attributes, f"{split}_caption_exact": accuracy.exact}
    return {**scores, "images": num, "steps": steps, "guidance": guidance}


def release_student(run: Path, out: Path, how: dict[str, Any], progress: Progress = quiet) -> dict[str, Any]:
    """Export a run's student in fp16, score it, and write meta.json; returns the metadata."""
    register_eval_scenes()
    exported = export_student(str(run), out, "fp16", teacher="miniature")
    oracle, one = load_oracle(), load_student(str(out))
    # Caption accuracy on trained and held-out combinations.
    scores: dict[str, float] = {}
    for split in ("train", "heldout"):
        texts = scene_captions(256, TEST_SEED, split)
        pixels = from_uint8(one.images(noise(0, range(256), one.student.latent_shape), texts))
        accuracy = caption_accuracy(oracle, pixels, texts)
        scores |= {f"{split}_caption_accuracy": accuracy.attributes, f"{split}_caption_exact": accuracy.exact}
    measured = run_evaluation(EvalRun(student=str(out), protocol=PROTOCOLS["miniature"]), progress)
    keep = {key: measured[key] for key in ("fid", "clip_score", "precision", "recall", "counts")}
    parity = {"parity_max_abs_err": exported["parity_max_abs_err"]}
    meta = {"what": "miniature student", "commit": source_commit(), **how, "scores": scores | keep | parity}
    write_atomically(out / "meta.json", json.dumps(meta, indent=1) + "\n")
    return meta
