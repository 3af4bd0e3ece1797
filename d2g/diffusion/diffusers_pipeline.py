"""Any pipeline of diffusers as a sampler, called as its own documentation says, to evaluate it.

`d2g.diffusion.pretrained` loads single components for training; here a pipeline is loaded as one object.
"""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2g.core import hub
from d2g.core.errors import SettingError, UserError, first_line
from d2g.core.json_files import COPY_AGAIN, read_json_object
from d2g.core.logs import logger
from d2g.core.machine_errors import raise_machine_error
from d2g.core.seeds import generator, noise


class AnyPipeline:
    """A pipeline of diffusers on one device. Build it with `load_any_pipeline`."""

    def __init__(self, name: str, pipe: Any, device: torch.device) -> None:
        self.name, self.pipe, self.device = name, pipe, device
        self.parameters = set(inspect.signature(pipe.__call__).parameters)

    @property
    def most_steps(self) -> int | None:
        """The largest number of steps of its scheduler; None without a limit. d2g's exports have one step."""
        scheduler = getattr(self.pipe, "scheduler", None)
        limit = getattr(getattr(scheduler, "config", None), "original_inference_steps", None)
        return None if limit is None else int(limit)

    @property
    def conditioning(self) -> str:
        """Kind of its prompts: text, label (class numbers in decimal) or none (empty strings)."""
        return (
            "text"
            if "prompt" in self.parameters
            else "label"
            if "class_labels" in self.parameters
            else "none"
        )

    @torch.no_grad()
    def images(
        self, seed: int, numbers: range, prompts: Sequence[str], steps: int, guidance: float | None
    ) -> Tensor:
        """The images of these numbers, [B, 3, H, W] in [0, 1], fp32. Image i depends on (seed, i) and its
        prompt.

        A pipeline that takes latents of its U-Net's size gets the same noise as teacher and student. Each
        image also has a generator of its own, for samplers that draw noise. `guidance` None: the pipeline's
        default.
        """
        # Pass only what the pipeline's call accepts.
        settings: dict[str, Any] = {"num_inference_steps": steps, "output_type": "np"}
        if "generator" in self.parameters:
            settings["generator"] = [generator(seed, number) for number in numbers]
        if (shape := self._latent_shape()) is not None:
            settings["latents"] = noise(seed, numbers, shape).to(self.device, self.pipe.dtype)
        if guidance is not None:
            settings["guidance_scale"] = guidance
        settings |= self._prompt_arguments(prompts)
        try:
            pixels = torch.from_numpy(self.pipe(**settings).images).float()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # each pipeline has its own
            raise UserError(
                f"pipeline {self.name} ({type(self.pipe).__name__}) cannot draw with {steps} steps and "
                f"guidance {guidance} ({type(error).__name__}: {first_line(error)}); see its documentation"
            ) from error
        # Gray images become RGB.
        return pixels.permute(0, 3, 1, 2).expand(-1, 3, -1, -1)

    def _latent_shape(self) -> tuple[int, int, int] | None:
        unet, vae = getattr(self.pipe, "unet", None), getattr(self.pipe, "vae", None)
        if "latents" not in self.parameters or unet is None or not isinstance(unet.config.sample_size, int):
            return None
        channels = unet.config.in_channels if vae is None else vae.config.latent_channels
        return int(channels), unet.config.sample_size, unet.config.sample_size

    def _prompt_arguments(self, prompts: Sequence[str]) -> dict[str, Any]:
        """The arguments that carry the prompts, and the batch size where nothing else does."""
        if self.conditioning == "text":
            return {"prompt": list(prompts)}
        size = {"batch_size": len(prompts)} if "batch_size" in self.parameters else {}
        if self.conditioning == "none":
            return size
        try:
            return {"class_labels": [int(prompt) for prompt in prompts], **size}
        except ValueError as error:
            raise UserError(
                f"pipeline {self.name} is class-conditional, so its prompts must be class numbers ({error})"
            ) from error


def load_any_pipeline(
    name: str, device: torch.device | str, dtype: torch.dtype, steps: int, guidance: float | None
) -> AnyPipeline:
    """Load a folder or hub id with DiffusionPipeline, without a safety checker, which could blacken images.

    Raises UserError if it cannot be loaded, SettingError for settings that the pipeline does not take.
    """
    import diffusers

    diffusers.utils.logging.disable_progress_bar()
    if not Path(name).exists():
        hub.fetch(name, ["model_index.json"], f"pipeline {name}")
    path, settings = Path(name) / "model_index.json", dict[str, Any]()
    index = read_json_object(path, COPY_AGAIN) if path.is_file() else {}
    _refuse_custom_code(Path(name), index)
    # A safety checker is switched off only where the pipeline names one: others reject the argument.
    if "safety_checker" in index:
        settings = {"safety_checker": None, "requires_safety_checker": False}
    try:
        pipe = diffusers.DiffusionPipeline.from_pretrained(name, **settings)
    except Exception as error:  # on odd files, the libraries raise almost anything
        raise_machine_error(error)
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"pipeline {name} cannot be loaded ({type(error).__name__}: {reason}); give a folder or hub id "
            "in diffusers layout"
        ) from error
    pipe.set_progress_bar_config(disable=True)
    loaded = AnyPipeline(name, pipe.to(device, dtype), torch.device(device))
    # Refuse settings that the pipeline would not use.
    for setting, value in (("num_inference_steps", steps), ("guidance_scale", guidance)):
        if value is not None and setting not in loaded.parameters:
            raise SettingError(f"pipeline {name} ({type(pipe).__name__}) takes no {setting}; leave it out")
    return loaded


def _refuse_custom_code(folder: Path, index: dict[str, Any]) -> None:
    """Raise UserError for a pipeline that brings Python code, which older versions of diffusers run.

    A pipeline's own class is [MODULE, CLASS]; a component's is too, and its module lies in its folder.
    """
    modules = [
        folder / component / f"{value[0]}.py"
        for component, value in index.items()
        if isinstance(value, list) and value and component != "_class_name"
    ]
    own = index.get("_class_name", "")
    if not isinstance(own, str) or any(module.exists() for module in modules):
        raise UserError(
            f"pipeline {folder} has classes of its own, whose code d2g does not run; give a pipeline of the "
            "classes of diffusers and transformers"
        )


def supported_steps(pipe: AnyPipeline, steps: int, default: int) -> int:
    """The number of steps to draw with: `steps`, or where that is the default the most that the pipeline has.

    Raises SettingError for more steps than its scheduler has.
    """
    limit = pipe.most_steps
    if limit is None or steps <= limit:
        return steps
    if steps != default:
        raise SettingError(
            f"pipeline {pipe.name} takes {limit} steps at most, got {steps}; set --steps {limit}"
        )
    logger.info("pipeline %s takes %d steps at most, and draws with as many", pipe.name, limit)
    return limit
