"""Decides the arithmetic of a run whose settings leave it to the hardware."""

from dataclasses import replace
from pathlib import Path
from typing import Literal, NotRequired, TypedDict

import torch

from d2g.core.config import RESTORE_CONFIG_HINT
from d2g.core.distributed import process_group
from d2g.core.json_files import read_json_object
from d2g.core.precision import supports_bf16
from distill.config.run import DistillConfig

DecidedPrecision = Literal["fp32", "bf16"]


class WrittenTrainSettings(TypedDict):
    """What is read of the settings of a run's training."""

    precision: NotRequired[DecidedPrecision]


class WrittenSettings(TypedDict):
    """What is read of a run's config.json."""

    train: NotRequired[WrittenTrainSettings]


def decide_precision(config: DistillConfig, device: torch.device, run: Path | None = None) -> DistillConfig:
    """The config with `train.precision=auto` replaced by what it means here: the precision of the run in this
    folder, if there is one, else bf16 where every process has it, else fp32. Call it on every rank.

    Raises UserError for a damaged config.json.
    """
    if config.train.precision != "auto":
        return config
    precision: DecidedPrecision = "fp32" if process_group.any_rank(not supports_bf16(device)) else "bf16"
    if run is not None and (file := run / "config.json").is_file():
        written = read_json_object(file, RESTORE_CONFIG_HINT, WrittenSettings)
        precision = written.get("train", {}).get("precision", precision)
    return replace(config, train=replace(config.train, precision=precision))
