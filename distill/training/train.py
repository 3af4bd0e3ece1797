"""Run the training of a stage from start to end: open, loop, report, save, resume.

The method itself is in distill/training/step.py.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from d2g.core.claims import FolderOwner
from d2g.core.config import to_json
from d2g.core.distributed import checkpoint, process_group, sharded_checkpoint
from d2g.core.errors import Interrupted, LostFolder, SettingError, UserError
from d2g.core.precision import set_training_arithmetic
from d2g.core.progress import Progress, quiet
from d2g.core.signals import StopFlag
from d2g.core.tracking.run_directory import Pace, RunLog, require_shared_folder, sole_owner
from d2g.diffusion import pretrained
from d2g.diffusion.conditioning import Conditioning
from d2g.diffusion.pipelines import family_of
from distill.config.run import DistillConfig, microbatch_size
from distill.losses.clip_guidance import ClipGuidance, build_clip_guidance
from distill.losses.noise_augmentation import NoiseAugmentation, build_noise_augmentation
from distill.losses.regression.regression import Regression, build_regression
from distill.models.consistency import ConsistencyStudent, ConsistencyTarget
from distill.models.student import DiffusionStudent, Student, student_from_teacher
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
    """Result of `train`."""

    out: str
    images: int
    """Images that the run has trained on, over all ranks and restarts."""
    steps: int
    seconds: float
    """Wall-clock time of this call, without opening the run."""
    images_per_sec: float
    loss: dict[str, float]
    """Unweighted loss terms of the last report."""
    checkpoint: str
    """Folder of the newest checkpoint."""


def train(
    config: DistillConfig, out: Path, progress: Progress = quiet, validate: Validate | None = None
) -> TrainSummary:
    """Train one stage to its end, or resume from the newest checkpoint in `out`. Call it on every rank.

    `validate` is an additional measurement at each validation, after that on held-out pairs. The newest
    checkpoint is complete whenever and however this function ends. It raises:

    - UserError for inputs that do not fit together, and SettingError for wrong settings;
    - FloatingPointError at the first loss or gradient that is not finite, before an update uses it;
    - collapse.Collapse at a collapse, if `train.on_collapse` is stop;
    - Interrupted on Ctrl-C or SIGTERM, after a checkpoint.

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
    # Check the settings before the process group exists: later, other ranks would wait for one that fails.
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

    # Train as the only owner of the folder. If another rank dies, say so instead of its symptom here.
    try:
        device = process_group.init()
        config = decide_precision(config, device, out)
        with sole_owner(out, "trains in") as owner:
            require_shared_folder(out)
            return _train(config, out, device, progress, validate, owner)
    except RuntimeError as error:
        if not process_group.lost_peer(error):
            raise
        newest = checkpoint.latest(out / "checkpoints")
        where = f"from {newest.folder}" if newest else "from the start"
        raise UserError(
            f"another process of this run is gone (process {process_group.rank()} lost it); its own message "
            f"says why; the same command goes on {where}"
        ) from error


@dataclass(kw_only=True)
class _Run:
    """An open run: the objects that its loop uses."""

    config: DistillConfig
    out: Path
    log: RunLog
    state: State
    monitor: RunMonitor
    writer: sharded_checkpoint.Writer
    pace: Pace
    finite_check: FiniteCheck
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
    started, first_nimg = time.monotonic(), run.state.nimg
    with run.monitor.record_ending(), StopFlag() as stop, _keep_checkpoint(run.writer):
        _loop(run, StopControl(config.train, stop, run.writer, owner), progress)
    return _summary(out, run.log, run.state, config.train.images, first_nimg, time.monotonic() - started)


@contextmanager
def _keep_checkpoint(writer: sharded_checkpoint.Writer) -> Iterator[None]:
    """Context that completes the checkpoint which is being written in the background, also after an error.

    Not where several processes would have to do it together, and not if another run owns the folder.
    """
    try:
        yield
    except LostFolder:
        raise
    except Exception:
        if process_group.world_size() == 1:
            with suppress(UserError):  # a full disk must not hide the original error
                writer.finish()
        raise


def _open_run(config: DistillConfig, out: Path, device: torch.device, validate: Validate | None) -> _Run:
    """Open the data, build networks, losses and the log, and load the newest checkpoint if there is one."""
    options, folder = config.train, out / "checkpoints"
    check_supported(config)
    if validate is not None:
        validate.open()  # an error now costs less than one at the first validation
    set_training_arithmetic(device, options.bf16)  # after `open`, which sets that of evaluations
    encode, kind, reader = open_rows(config, device)
    # Losses with their frozen networks, photographs as real rows, and the VAE of previews.
    gan, shape = config.gan if config.adversarial else None, shape_of(reader)
    regression = build_regression(config, shape[0], device)
    noise_augment = build_noise_augmentation(gan, config.teacher, config.seed, device)
    clip_guidance = build_clip_guidance(config.clip_guidance, config.teacher, device)
    gan_with_pairs = None if config.without_pairs else gan  # without pairs, all rows are photographs already
    mix_in_real_images = RealRows(gan_with_pairs, config.teacher, config.seed, shape, kind, encode, device)
    vae = pretrained.load_vae(config.teacher).to(device) if options.preview_prompts else None
    # Networks, optimizers and the log, at the newest checkpoint or at the first image.
    newest = agree_on_checkpoint(folder)
    state = new_state(config, device, fresh=newest is None)
    autocast, logit_stats = _build_autocast(options.bf16, config.engine.parallel, device), LogitStats()
    log = _open_log(config, out, reader, mix_in_real_images.images)
    reports = log.read()  # those after the checkpoint, too: the time that they took counts
    _resume(log, state, newest, options.loggers)

    # Checkpoints, speed, and the check for losses and gradients that are not finite.
    writer = sharded_checkpoint.Writer(folder, options.keep_checkpoints, config.engine.async_checkpoints)
    peak_seconds = seconds_per_image_at_peak(config, device) if process_group.rank() == 0 else None
    pace = Pace(reports, state.nimg, process_group.world_size(), peak_seconds)
    finite_check = FiniteCheck(out, config.pairs, state, logit_stats, writer, device)

    # Reports, previews and validation sample with the student.
    student = state.student.module
    _set_latent_size(student, shape)
    encode_for_student = student.tokenize if isinstance(student, TextStudent) else None
    monitor = RunMonitor(
        options,
        config.seed,
        log,
        reader,
        shape,
        state,
        StudentSampler(state.student, encode_for_student or encode, device, autocast),
        regression.validation_distance,
        microbatch_size(config, process_group.world_size()),
        vae,
        validate,
        sample_guidance(config.teacher, config.student, reader),
    )
    return _Run(
        config=config,
        out=out,
        log=log,
        state=state,
        monitor=monitor,
        writer=writer,
        pace=pace,
        finite_check=finite_check,
        prepare=_build_preparation(
            config, state, regression, noise_augment, encode, encode_for_student, clip_guidance, device
        ),
        context=StepContext(
            state=state,
            regression=regression,
            noise_augment=noise_augment,
            mix_in_real_images=mix_in_real_images,
            gan=config.gan,
            clip_guidance=clip_guidance,
            clip_weight=config.clip_guidance.weight,
            consistency=_build_consistency(config, device),
            student_optim=config.optim,
            batch_size=options.batch_size,
            images=options.images,
            own_generator_passes=config.engine.own_generator_passes,
            logit_stats=logit_stats,
            autocast=autocast,
            waiting=pace.waiting,
            stop_updates=finite_check.stop_updates,
        ),
        batches=open_batches(config, reader, state.nimg, device),
        resumed=newest is not None,
    )


def _set_latent_size(student: nn.Module, shape: tuple[int, int, int]) -> None:
    """Let a student draw at the size of the rows. Raises SettingError for a generator of another size."""
    assert isinstance(student, Student)
    if isinstance(student, DiffusionStudent):
        student.latent_size = shape[1:]
    elif student.latent_shape != shape:
        own, rows = ("x".join(map(str, sizes[1:])) for sizes in (student.latent_shape, shape))
        raise SettingError(
            f"the student makes latents of {own}, the size of its teacher, but the pairs have latents of "
            f"{rows}; give pairs of latent_size=0, or set student.kind=diffusion"
        )


def _resume(log: RunLog, state: State, newest: checkpoint.Checkpoint | None, loggers: Sequence[str]) -> None:
    """Load the newest checkpoint if there is one, and drop lines of the log beyond its image."""
    if newest is not None:
        state.load(newest)
    log.rewind(state.nimg)
    log.attach(loggers, state.nimg)


def _open_log(
    config: DistillConfig, out: Path, reader: PairRows | ImageRows, real: RealImages | None
) -> RunLog:
    """Open the run's log. Raises UserError if the folder holds a run with other settings or inputs."""
    inputs = describe_inputs(config, reader, reader.images if isinstance(reader, ImageRows) else real)
    settings = {**_split_config(config), "inputs": inputs}
    notes = same_inputs(out, config, reader, inputs)
    defaults = _split_config(DistillConfig())
    return RunLog(out, settings, ignore=("length", "inputs"), notes=notes, defaults=defaults)


def _loop(run: _Run, control: StopControl, progress: Progress) -> None:
    """Train until the run has seen all its images, its time limit is over, or a signal stops it."""
    config, state, monitor, writer = run.config, run.state, run.monitor, run.writer
    options = config.train
    checkpoints = CheckpointCallback(options, monitor, state, writer)
    callbacks: tuple[Callback, ...] = (
        ReportCallback(options, monitor, run.context.logit_stats, run.pace, writer),
        checkpoints,
        ValidationCallback(monitor, checkpoints, writer),
    )
    finished = state.nimg >= options.images

    # A run that was killed between a checkpoint and its validation makes up for the validation now.
    if run.resumed and monitor.validation_missed():
        monitor.validate()
    while not finished:
        # Read pairs and draw the step's random numbers.
        with run.pace.waiting():
            batch = next(run.batches)
        run.finite_check.begin_step(batch)
        microbatches, randomness = run.prepare(batch, state.nimg)

        # Update the networks.
        terms = run.take_step(run.context, microbatches, randomness)
        state.nimg, state.steps = state.nimg + options.batch_size, state.steps + 1
        progress(config.stage, min(state.nimg, options.images), options.images)

        # Stop at a value that is not finite: before anything is written, otherwise one step later, so that
        # the host does not wait for the device in every step.
        event = control.event(state.nimg, terms, microbatches)
        run.finite_check.end_step(at_once=event.due)

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


def _summary(
    out: Path, log: RunLog, state: State, images: int, first_nimg: int, seconds: float
) -> TrainSummary:
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
        images_per_sec=(state.nimg - first_nimg) / seconds if state.nimg > first_nimg else 0.0,
        loss={k.removeprefix("loss/"): v for k, v in values.items() if k.startswith("loss/")},
        checkpoint=str(newest.folder),
    )


def _build_consistency(config: DistillConfig, device: torch.device) -> ConsistencyTarget | None:
    """Load the teacher that gives the targets of consistency distillation; None in other stages."""
    if config.stage != "cd":
        return None
    teacher = student_from_teacher(config.teacher, wrapper=ConsistencyStudent)
    return ConsistencyTarget.of(teacher.requires_grad_(False).to(device), config.consistency.levels)


def _build_autocast(
    bf16: bool, parallel: str, device: torch.device
) -> Callable[[], AbstractContextManager[None]]:
    """The autocast context of forward passes: bf16 under DDP if configured. FSDP2 casts by itself."""
    enabled = bf16 and parallel == "ddp"
    return lambda: torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def _build_preparation(
    config: DistillConfig,
    state: State,
    regression: Regression,
    noise_augment: NoiseAugmentation,
    encode: TextCache,
    encode_for_student: Callable[[Sequence[str]], Conditioning] | None,
    clip_guidance: ClipGuidance | None,
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
        encode_for_student=encode_for_student,
        device=device,
        student=state.student.module,  # type: ignore[arg-type]
        embedded_guidance=family_of(config.teacher).embedded_guidance is not None,
        clip_guidance=clip_guidance,
        noise_levels=config.consistency.levels if config.stage == "cd" else 0,
    )


def agree_on_checkpoint(folder: Path) -> checkpoint.Checkpoint | None:
    """Return the newest checkpoint that rank 0 sees in `folder`, on every rank; None if there is none.

    A network disk may show other nodes an older listing of the folder.
    """
    newest = checkpoint.latest(folder)
    name = process_group.gather_objects(None if newest is None else newest.folder.name)[0]
    return None if name is None else checkpoint.open_checkpoint(folder / name)


def _refuse_other_folders(out: Path) -> None:
    """Raise UserError for a folder that holds something else than a run."""
    for file, contents in {
        "store.json": "a pair store",
        "model_index.json": "a teacher",
        "student.json": "an exported student",
    }.items():
        if (out / file).is_file():
            raise UserError(f"{out} holds {contents} ({file}), not a run; give another --out")


_CHANGEABLE_SETTINGS = {
    "train": (
        *("images", "minutes", "loader_workers", "report_images", "checkpoint_images", "keep_checkpoints"),
        *("keep_best", "validate_images", "preview_prompts", "plot", "loggers", "on_collapse"),
    ),
    # `skip_bad` lets a run continue past damaged rows. The order of the rows stays the same.
    "data": ("skip_bad", "cache", "cache_gib", "text_cache", "text_precision"),
    "engine": (
        *("parallel", "shard_size", "gradient_accumulation", "activation_checkpointing", "compile", "gpus"),
        *("async_checkpoints", "channels_last", "offload_optimizer", "compile_blocks"),
        "own_generator_passes",
    ),
}
"""Settings that may change when a run resumes. None changes what is learned beyond rounding."""


def _split_config(config: DistillConfig) -> dict[str, object]:
    """The config as JSON, with the settings that may change at a resume moved to the key `length`."""
    settings = to_json(config)
    changeable = {
        name: settings[group].pop(name) for group, names in _CHANGEABLE_SETTINGS.items() for name in names
    }
    return {**settings, "length": changeable}
