"""History of a student for its model card: the runs that led to it, their pair stores and their cost."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from d2g.core.config import RESTORE_CONFIG_HINT, from_json
from d2g.core.distributed import checkpoint
from d2g.core.errors import SettingError
from d2g.core.json_files import read_json_object
from d2g.core.tracking.run_directory import read_stats
from d2g.vision.weights import file_sha256
from distill.config.run import FROM_TEACHER, DistillConfig
from distill.planning.cost import evaluations
from distill.training.inputs import RunInputs
from pairgen.store.hdf5 import StoreSpec
from pairgen.store.reader import PairReader

NOT_RECORDED = "not recorded with an exported student; export the run itself"


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One run on the way to a student, up to the checkpoint that the next run started from, or that is
    exported.

    `config.train.images` and `device_hours` (None if not recorded) count up to it. `init_sha256`: of the
    weights that this run started from; "" if not recorded.
    """

    config: DistillConfig
    device_hours: float | None
    init_sha256: str

    @property
    def evaluations(self) -> int:
        """Network evaluations of the run, without those of its pairs."""
        return evaluations(self.config)


@dataclass(frozen=True, kw_only=True, slots=True)
class History:
    """The runs that led to a student, oldest first.

    `gap` says why the history goes no further back, or is empty if the oldest run started from the teacher.
    """

    stages: tuple[Stage, ...]
    gap: str

    @property
    def device_hours(self) -> float | None:
        """Device hours of all stages, or None if one of them recorded none."""
        hours = [stage.device_hours for stage in self.stages if stage.device_hours is not None]
        return sum(hours) if self.stages and len(hours) == len(self.stages) else None


def read_history(student: str) -> History:
    """Follow a run folder (or exported student) back through `config.init` as far as the folders exist.

    Raises UserError for a damaged folder.
    """
    stages: list[Stage] = []
    folder, visited, weights = Path(student), set[Path](), ""
    while True:
        # The history ends where a folder is missing, unreadable or without checkpoints.
        if not (folder / "config.json").is_file():
            gap = "an exported student or a run that is not at hand" if stages else NOT_RECORDED
            break
        visited.add(folder.resolve())
        try:
            stage = _read_stage(folder, weights)
        except SettingError as error:  # the card mentions it; it does not prevent the export
            gap = f"a run whose config.json is of another version ({error})"
            break
        if stage is None:
            gap = "a run whose checkpoint is gone"
            break
        # Go on with the run that this one started from.
        stages.insert(0, stage)
        if stage.config.init in ("", FROM_TEACHER):
            gap = ""
            break
        folder, weights = Path(stage.config.init), stage.init_sha256
        if folder.resolve() in visited:
            gap = "a run that was trained again later"
            break
    return History(stages=tuple(stages), gap=gap)


def _read_stage(folder: Path, weights: str) -> Stage | None:
    """Read a run up to its newest checkpoint, or None if it has none.

    weights: sha256 of the averaged weights of the checkpoint in its place, because the run may have gone on
    later; "" if not recorded. Raises SettingError for a config of another version.
    """
    folders = checkpoint.list_checkpoints(folder / "checkpoints")
    if weights:
        folders = [each for each in folders if file_sha256(each / "ema.safetensors") == weights]
    if not folders:
        return None
    nimg = checkpoint.open_checkpoint(folders[-1]).nimg
    written = read_json_object(folder / "config.json", RESTORE_CONFIG_HINT, RunInputs)
    inputs = written.get("inputs", {})
    config = _read_config(written)
    hours = [
        line["time/device_hours"]
        for line in read_stats(folder)
        if line["nimg"] <= nimg and "time/device_hours" in line
    ]
    return Stage(
        config=replace(config, train=replace(config.train, images=nimg)),
        device_hours=max(hours, default=None),
        init_sha256=inputs.get("init", ""),
    )


def _read_config(written: dict[str, Any]) -> DistillConfig:
    """Parse the config.json of a run.

    Settings that may change on resume are stored under `length`. Of the engine only gradient accumulation is
    read: evaluations depend on it, and the compile backend may be missing on this machine.
    """
    length = written.pop("length", {})
    written.pop("inputs", None)
    for group in ("train", "data"):
        known = type(getattr(DistillConfig(), group)).__dataclass_fields__
        written[group] = written.get(group, {}) | {k: v for k, v in length.items() if k in known}
    engine = written.get("engine", {}) | length
    written["engine"] = {"gradient_accumulation": engine.get("gradient_accumulation", 1)}
    return from_json(DistillConfig, written)


def pair_stores(history: History) -> tuple[list[StoreSpec], list[str]]:
    """Specs of the distinct pair stores that the runs read, and folder names of those that are missing."""
    specs: dict[Path, StoreSpec] = {}
    missing: dict[str, None] = {}
    names = [name for stage in history.stages for name in stage.config.pairs.split(",") if name]
    for folder in map(Path, names):
        if (folder / "store.json").is_file():
            specs[folder.resolve()] = PairReader(folder).spec
        else:
            missing[folder.name] = None
    return list(specs.values()), list(missing)


def teacher_evaluations(specs: list[StoreSpec]) -> int:
    """Network evaluations of the teacher for all pairs."""
    return sum(spec.num_pairs * spec.evaluations_per_pair for spec in specs)
