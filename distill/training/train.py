"""The training loop of both stages."""

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from d2g.core.config import to_json
from d2g.core.distributed import checkpoint, process_group, sharded_checkpoint
from d2g.core.errors import Interrupted, SettingError, UserError
from d2g.core.progress import Progress, quiet
from d2g.core.signals import StopFlag
from d2g.core.tracking.loggers import check_loggers
from d2g.core.tracking.run_directory import Pace, RunLog
from d2g.diffusion import pretrained
from distill.config.run import DistillConfig, microbatch_size
from distill.losses.adversarial import discriminator_loss, generator_loss, mix_and_match
from distill.losses.gradient_penalty import DiscriminatorInput, approximation, penalty
from distill.losses.noise_augmentation import Noiser
from distill.losses.regression.regression import build_regression
from distill.models.row_dropout import give_keys
from distill.models.student import check_teacher
from distill.training.data import bad_pairs, expect_enough, open_pairs, pair_batches
from distill.training.logit_stats import LogitStats
from distill.training.microbatch import MicroBatch, StepRandomness, penalised, sample_step_randomness, split
from distill.training.monitor import Watching
from distill.training.optim import learning_rate, update
from distill.training.real_rows import RealRows
from distill.training.state import State, new_state
from distill.training.text_cache import TextCache
from distill.training.validation import Validate, held_out
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
    """Run one stage to its end, or on from the newest checkpoint in `out`. Runs on every rank of torchrun.

    `validate`: measured at each validation beside the held-out pairs. Raises UserError for input that does
    not fit together, FloatingPointError at the first gradient that is not finite, sentinels.Collapse when
    asked to stop at one, Interrupted on Ctrl-C; each leaves a whole checkpoint behind if there was one.
    """
    try:
        return _train(config, out, progress, validate)
    except RuntimeError as error:
        if not process_group.lost_peer(error):
            raise
        last = checkpoint.latest(out / "checkpoints")
        where = f"from {last.folder}" if last else "from the start"
        raise UserError(
            f"another process of this run is gone (process {process_group.rank()} lost it); its own message says why; "
            f"the same command goes on {where}"
        ) from error


def _train(config: DistillConfig, out: Path, progress: Progress, validate: Validate | None) -> TrainSummary:
    # Set up.
    _refuse(config)  # before the processes meet: who leaves then would hold up the others
    device = process_group.init()
    options, gan, accumulate = config.train, config.gan, config.engine.gradient_accumulation
    size = options.batch_size
    told = config.student.guidance_conditioning
    reader = open_pairs(config.pairs, pretrained.weights_sha256(config.teacher), config.data, told)
    check_teacher(config.teacher, config.stage, config.student)
    held_out(len(reader), options.validate_pairs)
    expect_enough(len(reader), size, options.validate_pairs)
    text_encoder = pretrained.load_conditioner(config.teacher).to(device)
    encode = TextCache(text_encoder.encode, config.data.text_cache, device)
    regression = build_regression(config, reader.spec.latent_shape[0], device)
    noised = Noiser(config, device)
    with_real = RealRows(config, reader.spec.latent_shape, encode, device)
    folder = out / "checkpoints"
    last = agree_on_checkpoint(folder)
    state: State = new_state(config, device, fresh=last is None)
    student, discriminator = state.student, state.discriminator

    def autocast() -> AbstractContextManager[None]:
        whole = options.precision == "bf16" and config.engine.parallel == "ddp"
        return torch.autocast(device.type, torch.bfloat16, enabled=whole)

    def generate(micro: MicroBatch) -> Tensor:
        if micro.keys is not None:
            give_keys(student.module, micro.keys)
        with autocast():
            latents: Tensor = student(micro.noise, micro.text, *micro.guidance)
        return latents

    # Resume.
    log = RunLog(out, _split_config(config), ignore=("length",))
    if last is not None:
        state.load(last, config)
    log.rewind(state.nimg)
    log.attach(options.loggers, state.nimg)
    watching = Watching(config, log, reader, state, regression, encode, device, autocast, validate)
    writer = sharded_checkpoint.Writer(folder, options.keep_checkpoints, config.engine.async_checkpoints)

    def check(name: str, parts: Mapping[str, Tensor], batch: PairBatch) -> Callable[[Tensor], None]:
        def checked(norm: Tensor) -> None:
            if not torch.isfinite(norm):  # the norm is over all ranks, so that all of them come here
                writer.finish()  # a checkpoint on its way is as good as any
                raise not_finite(name, norm, parts, state.nimg, folder, bad_pairs(batch, config.pairs))

        return checked

    # Train.
    pin = device.type == "cuda"
    workers, kept = options.loader_workers, options.validate_pairs
    batches = pair_batches(reader, size, config.seed, state.nimg, workers, config.data, pin, kept)
    pace = Pace(log.read(), state.nimg, process_group.world_size())
    started, first = time.monotonic(), state.nimg
    finished = state.nimg >= options.images
    latest: dict[str, Tensor] = {}  # each value's last, since the last report: not every step has all
    seen = LogitStats()
    with watching.to_the_end(), StopFlag() as stop:
        if last is not None and watching.missed():
            watching.validate()
        while not finished:
            with pace.waiting():
                batch = next(batches)
            nimg, step = state.nimg, state.steps
            draws: StepRandomness = sample_step_randomness(
                config, regression, reader.spec.latent_shape, nimg, noised.levels
            )
            micros: list[MicroBatch] = split(batch, draws, encode, config, noised, device)
            moves_g = discriminator is None or step % gan.d_steps_per_g_step == gan.d_steps_per_g_step - 1
            shared = accumulate == 1 and moves_g  # one pass of the student serves both networks
            parts: dict[str, Tensor] = {}

            def add(found: Mapping[str, Tensor], parts: dict[str, Tensor] = parts) -> None:
                for name, value in found.items():
                    parts[name] = parts.get(name, 0) + value.detach().float() / accumulate

            for micro in micros if discriminator is not None or shared else []:
                with torch.set_grad_enabled(shared):
                    micro.fake = generate(micro)

            # Discriminator: real rows; generated rows, of which some are mismatched real ones; a penalty.
            if discriminator is not None:
                assert state.optim_d is not None
                discriminator.module.requires_grad_(True)
                for micro in micros:
                    x, z, c = mix_and_match(
                        micro.fake.detach(), micro.real, micro.noise, micro.text, micro.mode, micro.partner
                    )
                    with pace.waiting():  # for photographs, if there are to be any
                        shown = with_real(
                            DiscriminatorInput(micro.real, micro.noise, micro.text, micro.t), micro.rows
                        )
                    micro.d_real = replace(shown, x=noised(shown.x, micro.t, micro.eps[0]))
                    micro.d_fake = DiscriminatorInput(noised(x, micro.t, micro.eps[1]), z, c, micro.t)
                apart = gan.active_penalty not in (
                    "none",
                    "approx",
                )  # a pass of its own, differentiated twice
                if apart and step % gan.penalty_interval == 0:
                    with discriminator.bare_module() as judge:
                        for real, fake, weight in penalised(micros, draws, gan.active_penalty):
                            value, found = penalty(gan, judge, real, fake)
                            (weight * value).backward()
                            add({name: accumulate * weight * v for name, v in found.items()})
                for number, micro in enumerate(micros):
                    with discriminator.no_sync(number < accumulate - 1):
                        with autocast():
                            real, fake = micro.d_real, micro.d_fake
                            logits_real = discriminator(real.x, real.noise, real.text, real.t)
                            logits_fake = discriminator(fake.x, fake.noise, fake.text, fake.t)
                            loss_d = discriminator_loss(
                                logits_real, logits_fake, gan.loss, gan.head_reduction
                            )
                            add({"loss/d": loss_d})
                            seen.add(number, real=logits_real, fake=logits_fake)
                            if micro.moved is not None:
                                value, found = approximation(
                                    gan, discriminator, real, logits_real, micro.moved
                                )
                                loss_d = loss_d + value
                                add(found)
                        (loss_d / accumulate).backward()
                lr = learning_rate(nimg, gan.optim, size)
                parts["grad/d"] = update(
                    state.optim_d, discriminator, gan.optim, lr, check("grad/d", parts, batch)
                )
                discriminator.module.requires_grad_(False)

            # Student: regression on the pair, and the discriminator's verdict on the same latents. Their
            # slope at the latents goes on into the student once the discriminator's graph is gone.
            for number, micro in enumerate(micros if moves_g else []):
                with student.no_sync(number < accumulate - 1):
                    if not shared:
                        micro.fake = generate(micro)
                    latents = micro.fake.detach().requires_grad_()
                    loss_g, found = regression(latents, micro.real, micro.transforms)
                    if discriminator is not None:
                        with autocast():
                            verdict = discriminator.forward_frozen(
                                noised(latents, micro.t, micro.eps[1]), micro.noise, micro.text, micro.t
                            )
                            rival = None
                            if gan.loss == "rpgan":
                                with torch.no_grad():
                                    s = micro.d_real
                                    rival = discriminator.forward_frozen(s.x, s.noise, s.text, s.t)
                        seen.add(number, student=verdict)
                        found["loss/g_gan"] = generator_loss(verdict, gan.loss, gan.head_reduction, rival)
                        loss_g = loss_g + gan.weight * found["loss/g_gan"]
                    add({**found, "loss/g": loss_g})
                    (slope,) = torch.autograd.grad(loss_g, latents)
                    micro.fake.backward(slope / accumulate)
            if moves_g:
                lr = learning_rate(nimg, config.optim, size)
                parts["grad/g"] = update(
                    state.optim_g, student, config.optim, lr, check("grad/g", parts, batch)
                )
                state.ema.update(student.module, nimg + size)
            latest |= parts
            state.nimg, state.steps = nimg + size, step + 1
            progress(config.stage, min(state.nimg, options.images), options.images)

            # Report, validate, save.
            late = options.minutes is not None and time.monotonic() - started > 60 * options.minutes
            flags = process_group.any_of({"stop": bool(stop), "late": late, "writing": not writer.done})
            finished = state.nimg >= options.images or flags["late"]
            if not flags["writing"]:
                writer.finish()
            if passed_interval(state.nimg, size, options.report_images) or finished:
                watching.report({**latest, **seen.report(micros)}, pace, writer)
                latest.clear()
            # Saved first: whoever sends SIGTERM does not wait for a validation.
            due = passed_interval(state.nimg, size, options.checkpoint_images) or finished or flags["stop"]
            if due:
                writer.finish()  # the one before it has its name now, and may be the best
                writer.spare = watching.spare()
                state.save(writer, config)
            if not flags["stop"] and watching.due(finished):
                writer.finish()  # what is being written counts among the points to choose from
                if watching.validate() and not due:
                    writer.spare = watching.spare()
                    state.save(writer, config)
            if finished or flags["stop"]:
                writer.finish()
            if flags["stop"] and not finished:
                raise Interrupted(
                    f"stopped at image {state.nimg}; safe on disk: {folder / f'{state.nimg:09d}'}; "
                    "run the same command again to go on"
                )
    seconds = time.monotonic() - started
    newest = checkpoint.latest(folder)
    if newest is None:
        raise UserError(f"{out}: nothing to train, train.images is {options.images}")
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


def passed_interval(nimg: int, size: int, interval: int) -> bool:
    """Whether a multiple of `interval` lies in the last step's images: the same after a restart."""
    return nimg // interval > (nimg - size) // interval


def agree_on_checkpoint(folder: Path) -> checkpoint.Checkpoint | None:
    """The newest checkpoint as rank 0 sees it: a network disk may show another node an older folder."""
    last = checkpoint.latest(folder)
    name = process_group.gather_objects(None if last is None else last.folder.name)[0]
    return None if name is None else checkpoint.open_checkpoint(folder / name)


def not_finite(
    name: str, norm: Tensor, parts: Mapping[str, Tensor], nimg: int, folder: Path, pairs: str = ""
) -> FloatingPointError:
    """The error of a gradient norm that is not finite, to be raised before the optimizer's step. It names
    this rank's first bad loss, if any. pairs: what is wrong with those of this step, if they are at fault.
    """
    bad = {k: v for k, v in {**parts, name: norm}.items() if not torch.isfinite(v)}
    culprit, value = next(iter(bad.items()))
    last = checkpoint.latest(folder)
    where = f"last good checkpoint: {last.folder}" if last else "no checkpoint was written before"
    way = "lower the learning rate in another --out"
    way += f", from there with --set init={folder.parent}" if last else ""
    if pairs:  # which the same command meets again, whatever the rate
        return FloatingPointError(f"{pairs}; training stopped at image {nimg}; {where}")
    return FloatingPointError(f"{culprit} is {value.item()} at image {nimg}; {where}; {way}")


def _refuse(config: DistillConfig) -> None:
    """What can be known before anything is loaded."""
    for name in ("pairs", "teacher", *(["init"] if config.stage == "gan" else [])):
        if not getattr(config, name):
            raise SettingError(f"{name} is not set; give --{name}")
    microbatch_size(config, process_group.world_size())
    check_loggers(config.train.loggers)


_MAY_CHANGE = {
    "train": (
        *("images", "minutes", "loader_workers", "report_images", "checkpoint_images", "keep_checkpoints"),
        *("keep_best", "validate_images", "preview_prompts", "loggers", "on_collapse"),
    ),
    # A run may go on past damage that it met, or with another cache; the order of its rows stays.
    "data": ("skip_bad", "cache", "cache_gib", "text_cache"),
    "engine": (
        *("parallel", "shard_size", "gradient_accumulation", "activation_checkpointing", "compile", "gpus"),
        "async_checkpoints",
    ),
}
"""Settings that a resumed run may have other values of: none changes what is learnt beyond rounding."""


def _split_config(config: DistillConfig) -> dict[str, object]:
    """The config as JSON, with what may change at a resume apart, under `length`."""
    whole = to_json(config)
    length = {name: whole[group].pop(name) for group, names in _MAY_CHANGE.items() for name in names}
    return {**whole, "length": length}
