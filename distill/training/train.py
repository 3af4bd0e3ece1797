"""The life of a training run, for both stages. The method itself is in distill/training/step.py."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch

from d2g.core.claims import FolderOwner
from d2g.core.config import to_json
from d2g.core.distributed import checkpoint, process_group, sharded_checkpoint
from d2g.core.errors import Interrupted, SettingError, UserError
from d2g.core.precision import set_training_arithmetic
from d2g.core.progress import Progress, quiet
from d2g.core.signals import StopFlag
from d2g.core.tracking.run_directory import Pace, RunLog, sole_owner
from d2g.diffusion import pretrained
from d2g.diffusion.conditioning import Conditioning
from d2g.diffusion.pipelines import family_of
from distill.config.run import DistillConfig, microbatch_size
from distill.losses.clip_guidance import ClipGuidance, build_clip_guidance
from distill.losses.noise_augmentation import NoiseAugmentation, build_noise_augmentation
from distill.losses.regression.regression import Regression, build_regression
from distill.models.consistency import ConsistencyStudent, ConsistencyTarget
from distill.models.student import student_from_teacher
from distill.models.students import STUDENTS
from distill.models.text_student import TextStudent
from distill.planning.choose_precision import decide_precision
from distill.planning.flops import seconds_per_image_at_peak
from distill.training.callbacks import (
    Callback,
    CheckpointCallback,
    ReportCallback,
    StopControl,
    ValidationCallback,
)
from distill.training.check_config import check_supported, validate_config
from distill.training.consistency_step import consistency_step
from distill.training.finite_check import FiniteCheck
from distill.training.inputs import describe_inputs, same_inputs
from distill.training.logit_stats import LogitStats
from distill.training.microbatch import MicroBatch, StepPreparation, StepRandomness
from distill.training.monitor import RunMonitor, StudentSampler
from distill.training.open_rows import open_batches, open_rows, sample_guidance, shape_of
from distill.training.real_images import RealImages
from distill.training.real_rows import ImageRows, RealRows
from distill.training.state import State, new_state
from distill.training.step import LossTerms, StepContext, train_step
from distill.training.text_cache import TextCache
from distill.training.validation import Validate
from pairgen.store.dataset import PairRows
from pairgen.store.hdf5 import PairBatch


@dataclass(frozen=True, kw_only=True)
class TrainSummary:
    """What `train` left in the run folder. `loss`: the last report's terms; `checkpoint`: the newest
    folder.
    """

    out: str
    images: int
    steps: int
    seconds: float
    images_per_sec: float
    loss: dict[str, float]
    checkpoint: str


def train(
    config: DistillConfig, out: Path, progress: Progress = quiet, validate: Validate | None = None
) -> TrainSummary:
    """Run one stage to its end, or resume from the newest checkpoint in `out`. Call on every rank.

    `validate` measures the student at each validation, beside the held-out pairs. Raises UserError for inputs
    that do not fit together, FloatingPointError at the first loss or gradient that is not finite (no update
    has used it), collapse.Collapse when configured to stop at a collapse, Interrupted on Ctrl-C. The newest
    checkpoint stays complete.

    >>> import tempfile
    >>> from distill import train
    >>> from d2g.core.config import override
    >>> from pairgen import generate_pairs
    >>> from pairgen.config import PairConfig
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / "prompts.txt").write_text("a red cube\\na blue ball")
    >>> pairs = PairConfig(teacher="miniature", prompts=str(folder / "prompts.txt"), steps=2, guidance=1.0)
    >>> _ = generate_pairs(pairs, folder / "pairs")
    >>> config = DistillConfig(teacher="miniature", pairs=str(folder / "pairs"))
    >>> config = override(config, ["train.images=4", "train.batch_size=2", "train.loader_workers=0"])
    >>> train(config, folder / "run").images
    4
    """
    # Check settings before the processes meet: later, a process that leaves would block the others.
    _refuse_other_folders(out)
    validate_config(config)
    family = family_of(config.teacher)
    if validate is not None and (family.prior_family is not None or not family.draws_images):
        raise SettingError(
            f"--validate draws images, which {config.teacher}, a stage of a cascade, does not alone; leave "
            "it out, and set train.validate_pairs=K for held-out pairs"
        )
    if validate is not None and STUDENTS[config.student.kind].enlarges:
        raise SettingError(
            "--validate draws images, which an upsampler does not alone; leave it out, and set "
            "train.validate_images=0"
        )
    if validate is None and config.train.validate_images and not config.train.validate_pairs:
        raise SettingError("train.validate_images needs pairs, or --validate PROTOCOL; set it to 0")
    try:
        device = process_group.init()
        config = decide_precision(config, device, out)
        with sole_owner(out, "trains in") as owner:
            return _train(config, out, device, progress, validate, owner)
    except RuntimeError as error:
        if not process_group.lost_peer(error):
            raise
        last = checkpoint.latest(out / "checkpoints")
        where = f"from {last.folder}" if last else "from the start"
        raise UserError(
            f"another process of this run is gone (process {process_group.rank()} lost it); its own message "
            f"says why; the same command goes on {where}"
        ) from error


@dataclass(kw_only=True)
class _Run:
    """An open run: everything that its loop works with."""

    config: DistillConfig
    out: Path
    log: RunLog
    state: State
    monitor: RunMonitor
    writer: sharded_checkpoint.Writer
    pace: Pace
    finite: FiniteCheck
    prepare: StepPreparation
    context: StepContext
    batches: Iterator[PairBatch]
    resumed: bool

    @property
    def take_step(self) -> Callable[[StepContext, Sequence[MicroBatch], StepRandomness], LossTerms]:
        """The step of the run's stage."""
        return consistency_step if self.config.stage == "cd" else train_step


def _train(
    config: DistillConfig,
    out: Path,
    device: torch.device,
    progress: Progress,
    validate: Validate | None,
    owner: FolderOwner,
) -> TrainSummary:
    run = _open_run(config, out, device, validate)
    started, first = time.monotonic(), run.state.nimg
    with run.monitor.record_ending(), StopFlag() as stop:
        _loop(run, StopControl(config.train, stop, run.writer, owner), progress)
    return _summary(out, run.log, run.state, config.train.images, first, time.monotonic() - started)


def _open_run(config: DistillConfig, out: Path, device: torch.device, validate: Validate | None) -> _Run:
    """Load data, networks and losses, from the newest checkpoint if there is one."""
    options, folder = config.train, out / "checkpoints"
    set_training_arithmetic(device, options.bf16)
    check_supported(config)
    if validate is not None:
        validate.open()  # an error now costs less than one at the first validation
    encode, kind, reader = open_rows(config, device)
    # Load the losses with their frozen networks, and what makes real rows and previews.
    gan, shape = config.gan if config.adversarial else None, shape_of(reader)
    regression = build_regression(config, shape[0], device)
    noise_augment = build_noise_augmentation(gan, config.teacher, config.seed, device)
    guide = build_clip_guidance(config.clip_guidance, config.teacher, device)
    mixed = None if config.without_pairs else gan
    mix_in_real_images = RealRows(mixed, config.teacher, config.seed, shape, kind, encode, device)
    vae = pretrained.load_vae(config.teacher).to(device) if options.preview_prompts else None
    # Networks, optimizers and the log start at the newest checkpoint, or at the first image.
    last = agree_on_checkpoint(folder)
    state = new_state(config, device, fresh=last is None)
    autocast, logit_stats = _build_autocast(options.bf16, config.engine.parallel, device), LogitStats()
    log = _resume(_open_log(config, out, reader, mix_in_real_images.images), state, last, options.loggers)

    # Build the step, and the batches in the order that resumes at this image.
    writer = sharded_checkpoint.Writer(folder, options.keep_checkpoints, config.engine.async_checkpoints)
    at_peak = seconds_per_image_at_peak(config, device) if process_group.rank() == 0 else None
    pace = Pace(log.read(), state.nimg, process_group.world_size(), at_peak)
    finite = FiniteCheck(out, config.pairs, state, logit_stats, writer, device)
    rows, distance = microbatch_size(config, process_group.world_size()), regression.validation_distance
    student = state.student.module
    own_encode = student.tokenize if isinstance(student, TextStudent) else None
    draw = StudentSampler(state.student, own_encode or encode, device, autocast)
    guidance = sample_guidance(config.teacher, config.student, reader)
    monitor = RunMonitor(
        options, config.seed, log, reader, shape, state, draw, distance, rows, vae, validate, guidance
    )
    return _Run(
        config=config,
        out=out,
        log=log,
        state=state,
        monitor=monitor,
        writer=writer,
        pace=pace,
        finite=finite,
        prepare=_build_preparation(
            config, state, regression, noise_augment, encode, own_encode, guide, device
        ),
        context=StepContext(
            state=state,
            regression=regression,
            noise_augment=noise_augment,
            mix_in_real_images=mix_in_real_images,
            gan=config.gan,
            clip_guidance=guide,
            clip_weight=config.clip_guidance.weight,
            consistency=_build_consistency(config, device),
            student_optim=config.optim,
            batch_size=options.batch_size,
            images=options.images,
            own_generator_passes=config.engine.own_generator_passes,
            logit_stats=logit_stats,
            autocast=autocast,
            waiting=pace.waiting,
            stop_updates=finite.stop_updates,
        ),
        batches=open_batches(config, reader, state.nimg, device),
        resumed=last is not None,
    )


def _resume(log: RunLog, state: State, last: checkpoint.Checkpoint | None, loggers: Sequence[str]) -> RunLog:
    """Weights, optimizers and the log go back to the same image."""
    if last is not None:
        state.load(last)
    log.rewind(state.nimg)
    log.attach(loggers, state.nimg)
    return log


def _open_log(
    config: DistillConfig, out: Path, reader: PairRows | ImageRows, real: RealImages | None
) -> RunLog:
    """The run's log. Raises UserError if the folder holds a run with other settings or inputs."""
    inputs = describe_inputs(config, reader, reader.images if isinstance(reader, ImageRows) else real)
    settings = {**_split_config(config), "inputs": inputs}
    notes = same_inputs(out, config, reader, inputs)
    defaults = _split_config(DistillConfig())
    return RunLog(out, settings, ignore=("length", "inputs"), notes=notes, defaults=defaults)


def _loop(run: _Run, control: StopControl, progress: Progress) -> None:
    """Train until the run has all its images, its minutes are over, or somebody stops it."""
    config, state, monitor, writer = run.config, run.state, run.monitor, run.writer
    options = config.train
    checkpoints = CheckpointCallback(options, monitor, state, writer)
    callbacks: tuple[Callback, ...] = (
        ReportCallback(options, monitor, run.context.logit_stats, run.pace, writer),
        checkpoints,
        ValidationCallback(monitor, checkpoints, writer),
    )
    finished = state.nimg >= options.images
    if run.resumed and monitor.validation_missed():
        monitor.validate()
    while not finished:
        # Read pairs and draw the step's random numbers.
        with run.pace.waiting():
            batch = next(run.batches)
        run.finite.begin_step(batch)
        microbatches, randomness = run.prepare(batch, state.nimg)

        # Update the networks.
        terms = run.take_step(run.context, microbatches, randomness)
        state.nimg, state.steps = state.nimg + options.batch_size, state.steps + 1
        progress(config.stage, min(state.nimg, options.images), options.images)

        # Stop if something was not finite: know it before anything is written, else one step later.
        event = control.event(state.nimg, terms, microbatches)
        run.finite.end_step(at_once=event.due)

        # Report, save, validate, stop.
        for callback in callbacks:
            callback.after_step(event)
        finished, interrupted = event.finished, event.interrupted
        del event, microbatches, terms  # the next step allocates in their memory
        if interrupted and not finished:
            raise Interrupted(
                f"stopped at image {state.nimg}; safe on disk: "
                f"{run.out / 'checkpoints' / f'{state.nimg:09d}'}; run the same command again to go on"
            )


def _summary(out: Path, log: RunLog, state: State, images: int, first: int, seconds: float) -> TrainSummary:
    newest = checkpoint.latest(out / "checkpoints")
    if newest is None:
        raise UserError(f"{out}: nothing to train, train.images is {images}")
    lines = log.read()  # a validation has a line of its own
    values = {k: v for line in lines if line["nimg"] == lines[-1]["nimg"] for k, v in line.items()}
    return TrainSummary(
        out=str(out),
        images=state.nimg,
        steps=state.steps,
        seconds=seconds,
        images_per_sec=(state.nimg - first) / seconds if state.nimg > first else 0.0,
        loss={k.removeprefix("loss/"): v for k, v in values.items() if k.startswith("loss/")},
        checkpoint=str(newest.folder),
    )


def _build_consistency(config: DistillConfig, device: torch.device) -> ConsistencyTarget | None:
    """The teacher of consistency distillation; None in other stages."""
    if config.stage != "cd":
        return None
    teacher = student_from_teacher(config.teacher, wrapper=ConsistencyStudent)
    return ConsistencyTarget.of(teacher.requires_grad_(False).to(device), config.consistency.levels)


def _build_autocast(
    bf16: bool, parallel: str, device: torch.device
) -> Callable[[], AbstractContextManager[None]]:
    """bf16 autocast where configured; FSDP2 casts by itself."""
    enabled = bf16 and parallel == "ddp"
    return lambda: torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def _build_preparation(
    config: DistillConfig,
    state: State,
    regression: Regression,
    noise_augment: NoiseAugmentation,
    encode: TextCache,
    own_encode: Callable[[Sequence[str]], Conditioning] | None,
    guide: ClipGuidance | None,
    device: torch.device,
) -> StepPreparation:
    return StepPreparation(
        seed=config.seed,
        batch_size=config.train.batch_size,
        microbatches=config.engine.gradient_accumulation,
        dropout=config.student.dropout > 0,
        gan=config.gan if config.adversarial else None,
        regression=regression,
        noise_augment=noise_augment,
        encode=encode,
        encode_for_student=own_encode,
        device=device,
        student=state.student.module,  # type: ignore[arg-type]
        embedded_guidance=family_of(config.teacher).embedded_guidance is not None,
        clip_guidance=guide,
        noise_levels=config.consistency.levels if config.stage == "cd" else 0,
    )


def agree_on_checkpoint(folder: Path) -> checkpoint.Checkpoint | None:
    """The newest checkpoint as rank 0 sees it: a network disk may show another node an older folder."""
    last = checkpoint.latest(folder)
    name = process_group.gather_objects(None if last is None else last.folder.name)[0]
    return None if name is None else checkpoint.open_checkpoint(folder / name)


def _refuse_other_folders(out: Path) -> None:
    """Raise UserError for a folder that holds something else than a run."""
    for file, what in {
        "store.json": "a pair store",
        "model_index.json": "a teacher",
        "student.json": "an exported student",
    }.items():
        if (out / file).is_file():
            raise UserError(f"{out} holds {what} ({file}), not a run; give another --out")


_CHANGEABLE_SETTINGS = {
    "train": (
        *("images", "minutes", "loader_workers", "report_images", "checkpoint_images", "keep_checkpoints"),
        *("keep_best", "validate_images", "preview_prompts", "plot", "loggers", "on_collapse"),
    ),
    # A run may go on past damage that it met, or with another cache; the order of its rows stays.
    "data": ("skip_bad", "cache", "cache_gib", "text_cache", "text_precision"),
    "engine": (
        *("parallel", "shard_size", "gradient_accumulation", "activation_checkpointing", "compile", "gpus"),
        *("async_checkpoints", "channels_last", "offload_optimizer", "compile_blocks"),
        "own_generator_passes",
    ),
}
"""Settings that a resumed run may have other values of: none changes what is learnt beyond rounding."""


def _split_config(config: DistillConfig) -> dict[str, object]:
    """The config as JSON, with the settings that may change at a resume apart, under `length`."""
    settings = to_json(config)
    changeable = {
        name: settings[group].pop(name) for group, names in _CHANGEABLE_SETTINGS.items() for name in names
    }
    return {**settings, "length": changeable}
