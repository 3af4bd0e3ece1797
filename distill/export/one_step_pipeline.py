"""One-step pipelines: save a student as a pipeline that plain diffusers loads, and sample it with diffusers.

The scheduler is LCMScheduler with one original step. It evaluates the network at its last timestep and
returns (x - sigma eps) / alpha; it adds noise between steps only, does not scale the initial noise, and
refuses a second step, where DDIM with "trailing" spacing would silently compute something else. For a student
at an earlier timestep the table of betas ends at that timestep. Students of flows have the scheduler of their
teacher, FlowMatchEulerDiscreteScheduler, whose single step is x - v. Students of EDM teachers have no such
scheduler: diffusers' EDM schedulers start from sqrt(sigma_max^2 + 1) times the noise, not from sigma_max
times it.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from d2g.core.atomic_files import write_atomically
from d2g.core.distributed.engine import store_frozen_in_bf16
from d2g.core.errors import UserError
from d2g.diffusion import pretrained
from d2g.diffusion.edm import EDMSchedule
from d2g.diffusion.families.base import Family, Pipeline
from d2g.diffusion.pipelines import open_pipeline
from d2g.diffusion.schedule import CosineSchedule, FlowSchedule, Schedule

_NO_SKIP = 1e4
"""timestep_scaling that makes the skip weight of consistency models, 0.25 / (scaling t)^2, negligible."""


def one_step_scheduler(schedule: Schedule | FlowSchedule, timestep: int) -> Any:
    """A scheduler whose single step returns x_0 from a network evaluated at `timestep`, which is above 0.

    For variance-preserving schedules with epsilon, v or x_0 prediction, including zero terminal SNR, and for
    flows, whose student must be at the last timestep.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, LCMScheduler

    if isinstance(schedule, FlowSchedule):
        if timestep != schedule.train_steps:
            raise UserError(
                f"the student is at timestep {timestep}, but diffusers' sampler of a flow starts at "
                f"{schedule.train_steps}; export it with --format safetensors"
            )
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=schedule.train_steps)

    bars = schedule.alphas_cumprod[: timestep + 1].double()
    before = torch.cat([torch.ones(1, dtype=torch.float64), bars[:-1]])
    return LCMScheduler(
        num_train_timesteps=timestep + 1,
        trained_betas=(1 - bars / before).float().tolist(),
        original_inference_steps=1,
        timestep_scaling=_NO_SKIP,
        prediction_type=schedule.prediction,
        steps_offset=1,  # not used here, but StableDiffusionPipeline warns of any other
    )


def pipeline_schedule(teacher: str) -> Schedule | FlowSchedule:
    """The noise schedule of a teacher. Raises UserError if no diffusers pipeline can run its students."""
    pipeline, schedule = open_pipeline(teacher), pretrained.load_schedule(teacher)
    instead = "export it with --format safetensors"
    if isinstance(schedule, FlowSchedule):
        return schedule
    instead = f"{instead} or onnx"
    # Networks that no pipeline of diffusers can call as the student does.
    if isinstance(schedule, EDMSchedule):
        raise UserError(
            f"teacher {teacher} is preconditioned as in EDM, and no scheduler of diffusers starts from "
            f"sigma_max times the noise, as its students do; {instead}"
        )
    if isinstance(schedule, CosineSchedule):
        raise UserError(
            f"teacher {teacher} is a stage of a cascade, whose scheduler in diffusers gives 0.99995 of "
            "the student's latents in one step; export it with --format safetensors"
        )

    # Pipelines of UNet2DModel pass no class and take the whole output as noise.
    if not pipeline.family.reads_text and pipeline.family.network == "unet":
        config = pretrained.load_on_meta(teacher, "unet").config
        if config.num_class_embeds is not None:
            raise UserError(
                f"teacher {teacher} is class-conditional, and no pipeline of diffusers passes classes to "
                f"a UNet2DModel; {instead}"
            )
        if config.out_channels != config.in_channels:
            raise UserError(
                f"teacher {teacher} gives a learned variance, which {pipeline.kind} does not take off; "
                f"{instead}"
            )
    return schedule


def save_one_step(
    teacher: str,
    network: nn.Module,
    schedule: Schedule | FlowSchedule,
    timestep: int,
    folder: Path,
    dtype: torch.dtype,
    own_text: Mapping[str, nn.Module] = MappingProxyType({}),
) -> None:
    """Write `network` and the teacher's other components as a diffusers folder, all weights in `dtype`.

    own_text: text encoders that replace the teacher's, by component; they are converted in place.

    A text-conditional U-Net must have the input for a guidance scale (time_cond_proj_dim): only then does
    diffusers skip classifier-free guidance at every scale. Transformers have no such input; their pipelines
    skip it with guidance_scale=1, except for FLUX's, which has none. Converts `network` to `dtype` in place.
    Raises UserError for a folder that cannot be written.
    """
    pipeline = open_pipeline(teacher)
    component_of_network = pipeline.family.network
    if pipeline.family.takes_guidance:
        assert network.config.time_cond_proj_dim is not None, "diffusers would add classifier-free guidance"  # type: ignore[union-attr]
    # The student's network, and the teacher's other components as they are.
    components: dict[str, Any] = {component_of_network: nn.Module.to(network, dtype)}
    for component in pipeline.components:
        if component.startswith("tokenizer"):
            components[component] = pretrained.load_tokenizer(teacher, component)
        elif component in own_text:
            components[component] = nn.Module.to(own_text[component], dtype)
        elif component not in (component_of_network, "scheduler"):
            components[component] = pretrained.load_model(teacher, component, dtype)
    components["scheduler"] = one_step_scheduler(schedule, timestep)
    # diffusers writes the folder; paths of this machine do not belong in it.
    try:
        _assembled(pipeline, components).save_pretrained(folder, safe_serialization=True)
        _remove_local_paths(folder)
        if isinstance(names := pipeline.index.get("id2label"), dict):  # which diffusers does not save
            _add_to_index(folder, {"id2label": names})
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot write {folder}: {error}; free space or choose another --out, then run again"
        ) from error


def saved_pipeline_class(teacher: str) -> str:
    """Class of the pipeline that `save_one_step` writes: the teacher's class, except for DDIMPipeline.

    DDIMPipeline would replace the one-step scheduler by its own.
    """
    kind = open_pipeline(teacher).kind
    return "DDPMPipeline" if kind == "DDIMPipeline" else kind


def _assembled(pipeline: Pipeline, components: dict[str, Any]) -> Any:
    import diffusers

    if pipeline.kind == "StableDiffusionPipeline":
        return diffusers.StableDiffusionPipeline(
            **components, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    if pipeline.kind in ("DDIMPipeline", "DDPMPipeline"):
        return diffusers.DDPMPipeline(**components)
    if pipeline.kind == "StableDiffusionXLPipeline":
        zeros = pipeline.index.get("force_zeros_for_empty_prompt", True)
        return diffusers.StableDiffusionXLPipeline(**components, force_zeros_for_empty_prompt=zeros)
    absent = dict.fromkeys(pipeline.family.optional)
    return getattr(diffusers, pipeline.kind)(**{**absent, **components})


def _add_to_index(folder: Path, facts: Mapping[str, Any]) -> None:
    file = folder / "model_index.json"
    index = json.loads(file.read_text(encoding="utf-8"))
    write_atomically(file, json.dumps({**index, **facts}, indent=2) + "\n")


def _remove_local_paths(folder: Path) -> None:
    """Delete the paths of this machine that the libraries record in the JSON files."""
    for file in sorted(folder.rglob("*.json")):
        facts = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(facts, dict) and facts.pop("_name_or_path", None) is not None:
            write_atomically(file, json.dumps(facts, indent=2) + "\n")


def save_scheduler(schedule: Schedule | FlowSchedule, timestep: int, folder: Path) -> None:
    """Write the one-step scheduler to a folder. Raises UserError if it cannot be written."""
    try:
        one_step_scheduler(schedule, timestep).save_pretrained(folder)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error}; choose another --out, then run again") from error


def sample_pipeline(
    folder: Path,
    noise: Tensor,
    prompts: Sequence[str],
    settings: Mapping[str, Any] = MappingProxyType({}),
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """Run a saved text-to-image pipeline for one step, with diffusers alone.

    settings: of the call, beside the number of steps. Returns latents [B, C, h, w] and images [B, 3, H, W] in
    [0, 1], in fp32 on the CPU.
    """
    family = open_pipeline(str(folder)).family
    return _sample(_load_pipeline(folder), family, noise, prompts, settings, device)


def sample_own_noise(
    folder: Path, labels: Sequence[int] | None, rows: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Run a saved class-conditional or, without `labels`, unconditional pipeline for one step, with diffusers
    alone.

    Returns images [rows, 3, H, W] in [0, 1], in fp32 on the CPU. Such pipelines accept no noise: they draw
    torch.randn from a generator with seed 0.
    """
    pipe = _load_pipeline(folder)
    _to_fp32(pipe, device)
    settings = {"batch_size": rows} if labels is None else {"class_labels": list(labels), "guidance_scale": 1}
    generator = torch.Generator().manual_seed(0)
    images = pipe(**settings, generator=generator, num_inference_steps=1, output_type="np").images
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def _load_pipeline(folder: Path) -> Any:
    """A saved pipeline. Components that it may leave out are [null, null] in its index."""
    import diffusers

    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    absent: dict[str, Any] = {name: None for name, entry in index.items() if entry == [None, None]}
    return diffusers.DiffusionPipeline.from_pretrained(folder, trust_remote_code=False, **absent)


def sample_with_adapters(
    teacher: str,
    folder: Path,
    noise: Tensor,
    prompts: Sequence[str],
    settings: Mapping[str, Any],
    device: torch.device | str = "cpu",
    rounded: bool = False,
) -> tuple[Tensor, Tensor]:
    """Like `sample_pipeline`, for the teacher's pipeline with the adapters and the scheduler of `folder`.

    rounded: round the network below the adapters to bf16 as engine.frozen_weights=bf16 does.
    """
    import diffusers

    pipeline = open_pipeline(teacher)
    components: dict[str, Any] = {
        component: pretrained.load_tokenizer(teacher, component)
        if component.startswith("tokenizer")
        else pretrained.load_model(teacher, component)
        for component in pipeline.components
        if component != "scheduler"
    }
    if rounded:
        network = components[pipeline.family.network].requires_grad_(False)
        store_frozen_in_bf16(network)
        nn.Module.float(network)  # or peft would round the adapters too
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    components["scheduler"] = getattr(diffusers, scheduler["_class_name"]).from_config(scheduler)
    pipe = _assembled(pipeline, components)
    with _errors_only():  # suppress the warning that the text encoders have no adapters
        pipe.load_lora_weights(folder)
    return _sample(pipe, pipeline.family, noise, prompts, settings, device)


def _to_fp32(pipe: Any, device: torch.device | str) -> None:
    """Move all networks of a pipeline, adapters included, to a device in fp32.

    nn.Module.to is called directly, because the `to` of diffusers warns about layers to be kept in fp32.
    """
    pipe.set_progress_bar_config(disable=True)
    for component in pipe.components.values():
        if isinstance(component, nn.Module):
            nn.Module.to(component, device, torch.float32)


@contextmanager
def _errors_only() -> Iterator[None]:
    """Suppress log messages of diffusers below errors."""
    from diffusers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


@torch.no_grad()
def _sample(
    pipe: Any,
    family: Family,
    noise: Tensor,
    prompts: Sequence[str],
    settings: Mapping[str, Any],
    device: torch.device | str,
) -> tuple[Tensor, Tensor]:
    _to_fp32(pipe, device)
    pipe.watermark = None  # SDXL would write it into the pixels if its package is installed
    packed = family.pack(noise.to(device))
    latents, images = (
        pipe(list(prompts), num_inference_steps=1, latents=packed, output_type=kind, **settings).images
        for kind in ("latent", "pt")
    )
    latents = family.unpack(latents, (noise.shape[2], noise.shape[3]))
    return latents.float().cpu(), images.float().cpu()
