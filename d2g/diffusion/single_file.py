"""Checkpoints in a single file, as Stable Diffusion was first published, imported as a folder of components.

The file holds weights under their original names. Configs, tokenizers and the scheduler come from a pipeline
of the same architecture. diffusers' `from_single_file` does the conversion.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from d2g.core import hub
from d2g.core.errors import UserError, first_line
from d2g.core.json_files import COPY_AGAIN
from d2g.core.logs import logger
from d2g.core.machine_errors import raise_machine_error
from d2g.core.staged_folder import staged
from d2g.core.torch_files import load_tensors
from d2g.diffusion.pipelines import SINGLE_FILE_SUFFIXES, open_pipeline
from d2g.diffusion.schedule import NO_SIGNAL, Schedule
from d2g.diffusion.scheduler_files import load_schedule
from d2g.diffusion.teacher import describe_teacher

NETWORK, AUTOENCODER, AVERAGE = "model.diffusion_model.", "first_stage_model.", "model_ema.diffusion_model"
"""Prefixes of the original names of the U-Net, of the autoencoder, and of the U-Net's moving average, whose
names go on without dots."""

_CONFIG_FILES = ["*.json", "*/*.json", "*.txt", "*/*.txt"]


def import_single_file(file: Path, out: Path, config: str | None = None) -> dict[str, Any]:
    """Write the checkpoint of Stable Diffusion 1.x, 2.x or XL in `file` to `out` as a pipeline's folder.

    config: a pipeline of the same architecture, as a folder or hub id; None: the published one, from the
    hub's cache or the hub. Of a file with the U-Net's weights and their moving average, the average is
    imported. Weights keep their dtype if all have the same one, and become fp32 otherwise.
    Returns `out`, `config`, `dtype` and what `describe_teacher` says. Raises UserError for files that are no
    such checkpoint, pickles of anything but tensors, and weights that do not fit the configuration.
    """
    if (out / "model_index.json").exists():
        raise UserError(f"{out} holds a pipeline; choose another OUT, or remove it first")
    tensors = _read_tensors(file)
    kind = _pipeline_class(file, tensors)
    source, folder = _config_folder(file, tensors, config)
    pipeline = open_pipeline(str(folder))
    if pipeline.kind != kind:
        raise UserError(
            f"{file} is a checkpoint of a {kind}, but --config {source} is a {pipeline.kind}; "
            "give a pipeline of the same architecture"
        )
    _check_marks(file, tensors, folder, source)
    dtype = _common_dtype(tensors)
    size = sum(value.numel() for name, value in tensors.items() if name.startswith(NETWORK))
    has_autoencoder = any(name.startswith(AUTOENCODER) for name in tensors)
    if has_average := _has_average(file, tensors):
        logger.info("%s holds the U-Net's weights and their moving average, which is imported", file)
    del tensors  # diffusers reads the file again

    with staged(out, "imports into", "OUT") as written:
        converted = _convert(file, kind, folder, source, dtype, has_autoencoder, has_average)
        # diffusers drops what the config has no place for.
        expected = sum(value.numel() for value in converted.unet.state_dict().values())
        if size != expected:
            raise UserError(_misfit(file, source, f"{size} numbers for the U-Net, expected {expected}"))
        converted.save_pretrained(written)
        # The same checks as for any other teacher, before the folder gets its name.
        facts = describe_teacher(str(written))
    return {"out": str(out), "config": source, "dtype": str(dtype).removeprefix("torch."), **facts}


def _read_tensors(file: Path) -> Mapping[str, Tensor]:
    """The tensors of a checkpoint by name; those of .safetensors are mapped, not read."""
    if not file.is_file() or file.suffix not in SINGLE_FILE_SUFFIXES:
        raise UserError(
            f"{file}: no such checkpoint; expected a file that ends in {', '.join(SINGLE_FILE_SUFFIXES)}"
        )
    try:
        content = load_file(file) if file.suffix == ".safetensors" else load_tensors(file, "meta")
    except UnpicklingError as error:
        name = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"names {name[1]}" if name else first_line(error)
        raise UserError(
            f"{file} is a pickle with more than tensors ({reason}) and is not loaded, because it could run "
            "code; get the model as .safetensors"
        ) from error
    except (SafetensorError, RuntimeError, ValueError, EOFError, KeyError) as error:
        raise_machine_error(error)
        raise UserError(f"{file} cannot be read: {first_line(error)}; {COPY_AGAIN}") from error
    # Files of PyTorch Lightning hold the weights beside other values.
    while isinstance(content, dict) and "state_dict" in content:
        content = content["state_dict"]
    entries = content.items() if isinstance(content, dict) else ()
    tensors = {name: value for name, value in entries if isinstance(value, Tensor) and isinstance(name, str)}
    if not tensors:
        raise UserError(f"{file} holds no tensors; expected a checkpoint of Stable Diffusion")
    return tensors


def _pipeline_class(file: Path, tensors: Mapping[str, Tensor]) -> str:
    """The pipeline class of a checkpoint, by the names of its text encoders."""
    prefixes = {name.split(".")[0] for name in tensors}
    if any(name.startswith(NETWORK) for name in tensors):
        if "conditioner" in prefixes:
            return "StableDiffusionXLPipeline"
        if "cond_stage_model" in prefixes:
            return "StableDiffusionPipeline"
    example = min(tensors)
    if any(".lora_" in name or name.startswith("lora_") for name in tensors):
        raise UserError(
            f"{file} holds LoRA adapters ({example}, ...), no whole model; in diffusers, load the pipeline "
            "they were trained on, then load_lora_weights, fuse_lora and save_pretrained"
        )
    raise UserError(
        f"{file} is no checkpoint of Stable Diffusion 1.x, 2.x or XL with text encoders ({example}, ...); "
        "convert others in Python with diffusers: from_single_file of their pipeline, then save_pretrained"
    )


def _config_folder(file: Path, tensors: Mapping[str, Tensor], config: str | None) -> tuple[str, Path]:
    """(name, folder) of the pipeline whose configs fit a checkpoint."""
    if config is not None and Path(config).is_dir():
        return config, Path(config)
    from diffusers.loaders.single_file_utils import fetch_diffusers_config

    name = config or str(fetch_diffusers_config(tensors)["pretrained_model_name_or_path"])
    try:
        return name, hub.fetch(name, _CONFIG_FILES, name)
    except UserError as error:
        raise UserError(
            f"{file} holds weights only, and the configs and tokenizers of {name} are neither a folder here, "
            "nor in the hub's cache, nor can they be fetched; give --config with the folder of any pipeline "
            "of the same architecture"
        ) from error


def _check_marks(file: Path, tensors: Mapping[str, Tensor], folder: Path, source: str) -> None:
    """Raise UserError for a checkpoint that is marked as predicting v, or as trained at zero terminal SNR,
    with a scheduler for other ones."""
    schedule = load_schedule(str(folder))
    last = float(schedule.alphas_cumprod[-1]) if isinstance(schedule, Schedule) else 0.0
    other = "give --config with a copy of that pipeline whose scheduler_config.json says"
    if "v_pred" in tensors and schedule.prediction != "v_prediction":
        raise UserError(
            f"{file} is marked as v_pred, but the scheduler of {source} has prediction_type "
            f"{schedule.prediction}; {other} v_prediction"
        )
    if "ztsnr" in tensors and last > NO_SIGNAL:
        raise UserError(
            f"{file} is marked as ztsnr (zero terminal SNR), but the scheduler of {source} ends at alpha^2 = "
            f"{last:.2g}; {other} rescale_betas_zero_snr=true, with a scheduler that reads it (DDIMScheduler)"
        )


def _has_average(file: Path, tensors: Mapping[str, Tensor]) -> bool:
    """Whether a checkpoint holds its U-Net's moving average. Raises UserError if it holds a part of it."""
    if not any(name.startswith(AVERAGE) for name in tensors):
        return False
    network = [name.removeprefix(NETWORK) for name in tensors if name.startswith(NETWORK)]
    averaged = (AVERAGE + name.replace(".", "") for name in network)
    if missing := sorted(name for name in averaged if name not in tensors):
        raise UserError(f"{file} holds a part of a moving average (no {missing[0]}); {COPY_AGAIN}")
    return True


def _common_dtype(tensors: Mapping[str, Tensor]) -> torch.dtype:
    dtypes = {value.dtype for value in tensors.values() if value.is_floating_point()}
    half = dtypes in ({torch.float16}, {torch.bfloat16})
    return dtypes.pop() if half else torch.float32


def _convert(
    file: Path,
    kind: str,
    folder: Path,
    source: str,
    dtype: torch.dtype,
    has_autoencoder: bool,
    has_average: bool,
) -> Any:
    """The pipeline of a checkpoint in `dtype`, built by diffusers."""
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    parts: dict[str, Any] = {"safety_checker": None, "feature_extractor": None, "image_encoder": None}
    if kind == "StableDiffusionPipeline":
        parts["requires_safety_checker"] = False
    try:
        if not has_autoencoder:
            logger.info("%s holds no autoencoder; it is taken from %s", file, source)
            parts["vae"] = diffusers.AutoencoderKL.from_pretrained(
                folder, subfolder="vae", use_safetensors=True
            )
        if has_average:
            parts["unet"] = diffusers.UNet2DConditionModel.from_single_file(
                str(file), config=str(folder), subfolder="unet", local_files_only=True, extract_ema=True
            )
        pipeline = getattr(diffusers, kind).from_single_file(
            str(file), config=str(folder), local_files_only=True, **parts
        )
    except Exception as error:  # on weights of other shapes and odd configs, it raises almost anything
        raise_machine_error(error)
        reason = first_line(error).partition(". If you want")[0]
        # What the file lacks stays on the meta device.
        reason = "it lacks weights" if "meta tensor" in reason else reason
        raise UserError(_misfit(file, source, reason)) from error

    # Parameters on the meta device are weights that the file lacks.
    for component, module in pipeline.components.items():
        if isinstance(module, nn.Module):
            if missing := [name for name, value in module.named_parameters() if value.is_meta]:
                raise UserError(_misfit(file, source, f"no {component} weights {', '.join(missing[:3])}"))
            nn.Module.to(module, dtype)
    return pipeline


def _misfit(file: Path, source: str, reason: str) -> str:
    return (
        f"{file} does not fit the configs of {source}: {reason}; "
        "give --config with a pipeline of the same architecture"
    )
