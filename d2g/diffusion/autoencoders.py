"""Autoencoders that others have trained: folders, pipelines, hub ids, and TAESD's own weight files."""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from d2g.core import hub
from d2g.core.errors import UserError, first_line
from d2g.core.machine_errors import raise_machine_error
from d2g.diffusion.pipelines import SHIPPED, weight_patterns
from d2g.diffusion.pretrained import load_autoencoder

TAESD = "taesd"
TAESD_HUB_ID = "madebyollin/taesd"


def open_autoencoder(name: str) -> Any:
    """An autoencoder in fp32, in eval mode, frozen, to use as it is.

    name: a folder as `save_pretrained` writes it, a pipeline's folder, a folder with
    taesd_encoder.safetensors and taesd_decoder.safetensors (or FOLDER/taesdxl for another pair of files in
    it), a hub id, or `taesd`.
    Raises UserError for anything else.
    """
    path = Path(name)
    if (files := taesd_files(path)) is not None:
        return load_taesd(*files)
    if path.exists() or name in SHIPPED:
        return load_autoencoder(name)
    return load_autoencoder(str(_fetch(TAESD_HUB_ID if name == TAESD else name)))


def taesd_files(path: Path) -> tuple[Path, Path] | None:
    """The two files of TAESD in a folder, or those with a path as their prefix; None without them."""
    prefix = path / TAESD if path.is_dir() else path
    files = [prefix.with_name(f"{prefix.name}_{part}.safetensors") for part in ("encoder", "decoder")]
    return (files[0], files[1]) if all(file.is_file() for file in files) else None


def load_taesd(encoder: Path, decoder: Path) -> Any:
    """An AutoencoderTiny from TAESD's own files: fp32, in eval mode, frozen.

    Its files number the layers from 0; the decoder's layer 0 there is a clamp without weights, which
    diffusers' class has built in. Raises UserError for damaged files and for other layers.
    """
    from diffusers import AutoencoderTiny

    try:
        tensors = {f"encoder.layers.{key}": value.float() for key, value in load_file(encoder).items()}
        for key, value in load_file(decoder).items():
            number, _, rest = key.partition(".")
            tensors[f"decoder.layers.{int(number) - 1}.{rest}"] = value.float()
        channels = int(tensors["decoder.layers.0.weight"].shape[1])
        vae = AutoencoderTiny(latent_channels=channels)
        vae.load_state_dict(tensors, strict=True)
    except (SafetensorError, RuntimeError, ValueError, KeyError, OSError) as error:
        raise_machine_error(error)
        raise UserError(f"{encoder} and {decoder.name} are no TAESD weights: {first_line(error)}") from error
    return vae.eval().requires_grad_(False)


def _fetch(name: str) -> Path:
    """The local copy of an autoencoder or pipeline on the hub."""
    # The files of an autoencoder of its own, and those of a pipeline's.
    files = ["config.json", "model_index.json", *weight_patterns(None)]
    patterns = [*files, *(f"vae/{file}" for file in files)]
    folder = hub.fetch(name, patterns, f"autoencoder {name}")
    return folder / "vae" if (folder / "vae" / "config.json").is_file() else folder
