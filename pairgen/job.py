"""A pair job: the teacher, prompts and spec of a config, and the computation of rows."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from d2g.core.distributed import process_group
from d2g.core.errors import SettingError
from d2g.core.logs import logger
from d2g.core.seeds import Stream, generator, noise
from d2g.data.text_files import STANDARD_INPUT
from d2g.diffusion import pretrained
from d2g.diffusion.conditioning import Conditioning
from d2g.diffusion.edm import EDMSchedule
from d2g.diffusion.pipelines import TeacherDigests
from d2g.diffusion.solvers import Churn, Solver
from d2g.diffusion.teacher import Teacher, check_solver, describe_stages, teacher_on_meta, with_weights
from pairgen.condition import condition_prompts, open_condition
from pairgen.config import PairConfig
from pairgen.prompts import PromptList, check_labels, label_list, prompt_list_sha256, read_prompts
from pairgen.store.reader import PairReader
from pairgen.store.spec import StoreSpec, prompts_path

PairPrecision = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True)
class Job:
    """Everything that computes rows: a teacher on one device, the prompts, and the store's spec."""

    teacher: Teacher
    prompts: PromptList
    spec: StoreSpec
    prior: PairReader | None = None
    """The store whose row i conditions row i, for a later stage of a cascade."""

    def texts(self, indices: Sequence[int]) -> list[str]:
        """The prompts of these pairs."""
        return [self.prompts[self.spec.prompt_of(index)] for index in indices]

    def encode(self, indices: Sequence[int], offload: bool = False) -> "EncodedPrompts":
        """Encode the distinct prompts of these pairs.

        `offload`: move the text encoders to the teacher's device for this call only.
        """
        unique = list(dict.fromkeys(self.texts(indices)))
        offloaded = self.teacher.encoders if offload else []
        for encoder in offloaded:
            encoder.to(self.teacher.device)
        cond = self.teacher.encode(unique)
        for encoder in offloaded:
            encoder.to("cpu")
        return EncodedPrompts({text: row for row, text in enumerate(unique)}, cond)

    def condition(self, indices: Sequence[int]) -> Tensor | None:
        """Read the latents [B, C', h', w'] of a cascade's earlier stage that condition these rows, fp32.

        They are rounded to the stored type. None if the teacher is not a later stage.
        """
        if self.prior is None:
            return None
        return self.prior.read(indices).latents.to(self.spec.torch_dtype).float()

    def rows(
        self,
        indices: Sequence[int],
        encoded: "EncodedPrompts | None" = None,
        condition: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, list[str]]:
        """Compute rows: (noise [B, C, h, w] fp32 on the CPU, latents [B, C, h, w] on the device, B prompts).

        The noise is rounded to the stored type before sampling, so that the file holds exactly what the
        teacher received. encoded, condition: results of `encode` and `condition`, if the caller has them.
        """
        texts, spec = self.texts(indices), self.spec
        encoded = encoded or self.encode(indices)
        # Distinct prompts are encoded once; repeat their rows in the order of the pairs.
        cond = encoded.cond[[encoded.position[text] for text in texts]]
        condition = self.condition(indices) if condition is None else condition
        cond = cond if condition is None else cond.with_prior(condition)
        noise_rows = noise(spec.seed, indices, spec.latent_shape, spec.torch_dtype).float()
        latents = self.teacher.sample(
            noise_rows,
            texts,
            spec.steps,
            spec.guidance,
            spec.solver,
            spec.guidance_rescale,
            cond,
            self._churn(indices),
        )
        return noise_rows, latents, texts

    def _churn(self, indices: Sequence[int]) -> Churn | None:
        """The solver's churn: new noise in each step, a function of the seed, the step and the pair."""
        spec = self.spec
        if not spec.churn:
            return None

        def fresh_noise(step: int) -> Tensor:
            seed = generator(spec.seed, Stream.CHURN, step).initial_seed()
            return noise(seed, indices, spec.latent_shape)

        return Churn(spec.churn, fresh_noise)


@dataclass(frozen=True)
class EncodedPrompts:
    """Encoded distinct prompts. `position` maps a prompt to its row in `cond`."""

    position: dict[str, int]
    cond: Conditioning


def log_supported_stages(config: PairConfig) -> None:
    """Log in one line which training stages support the teacher.

    Raises UserError for a teacher that neither stage of training supports.
    """
    stages = describe_stages(config.teacher) if config.teacher else ""
    if stages and process_group.rank() == 0:
        logger.info(stages)


def open_job(
    config: PairConfig,
    device: torch.device | str = "cpu",
    store: Path | None = None,
    spec: StoreSpec | None = None,
    prompts: PromptList | None = None,
) -> Job:
    """Load the teacher and prompts of a config and check them; nothing is written.

    Prompts come from `config.prompts`, or else from the prompt list of `store`, or else they are all classes
    of the teacher. spec: the store's spec, if it is known to match. prompts: those of `config.prompts`, if
    they were read before. Settings that are still `auto` (see `pairgen.speed`) become those of a short job:
    fp32, not compiled. Raises UserError and SettingError for inputs that are missing or do not fit together.
    """
    config = resolve_auto(config, "fp32", False)
    assert config.precision != "auto"
    # Check the teacher, the stage before and the prompts before gigabytes are read.
    teacher, solver = _open_teacher(config)
    prior = open_condition(config, teacher)
    store = None if spec is None and config.prompts else store
    prompts = _prompts(config, teacher, store, prompts)
    teacher = with_weights(teacher, device, config.precision)
    # Apply the settings that change the speed only.
    if config.channels_last:
        teacher.network.to(memory_format=torch.channels_last)
    if config.compile:
        teacher = replace(teacher, network=torch.compile(teacher.network))
    if spec is None:
        digests = pretrained.teacher_digests(config.teacher)
        spec = resolve_spec(config, teacher, digests, prompts, solver, prior)
    return Job(teacher, prompts, spec, prior)


def expected_spec(config: PairConfig) -> StoreSpec | None:
    """The spec of the store that a config would make, without digests of the teacher: no weights are read.

    None if prompts are needed and not set, or can be read only once. Raises errors as `open_job` does, but
    none of the teacher's weights.
    """
    config = resolve_auto(config, "fp32", False)
    teacher, solver = _open_teacher(config)
    prior = open_condition(config, teacher)
    needed = teacher.conditioning == "text" and not config.condition
    if (needed and not config.prompts) or is_streamed(config.prompts):
        return None
    prompts = _prompts(config, teacher, None, None)
    return resolve_spec(config, teacher, TeacherDigests("", ""), prompts, solver, prior)


def _open_teacher(config: PairConfig) -> tuple[Teacher, Solver]:
    """The teacher without weights, and the solver; checked with the settings of both."""
    if not config.teacher:
        raise SettingError("teacher is not set; give --teacher")
    teacher = teacher_on_meta(config.teacher, config.spacing, config.final_alpha)
    if config.churn and not isinstance(teacher.schedule, EDMSchedule):
        raise SettingError(
            f"churn is {config.churn:g}, but teacher {config.teacher} is not preconditioned as in EDM; leave "
            "churn at 0"
        )
    solver = teacher.default_solver if config.solver == "teacher" else config.solver
    size = (config.latent_size, config.latent_size) if config.latent_size else None
    check_solver(teacher, solver, config.steps, config.guidance, config.guidance_rescale, size)
    return teacher, solver


def resolve_auto(config: PairConfig, precision: PairPrecision, compiled: bool) -> PairConfig:
    """Replace `auto` in the settings `precision` and `compile` by these values."""
    return replace(
        config,
        precision=precision if config.precision == "auto" else config.precision,
        compile=compiled if config.compile == "auto" else config.compile,
    )


def streamed_prompts(config: PairConfig) -> PromptList | None:
    """The prompts of standard input or of a pipe, which can be read once; None for other prompts."""
    return read_prompts(Path(config.prompts), config.column) if is_streamed(config.prompts) else None


def is_streamed(prompts: str) -> bool:
    """Whether these prompts can be read only once."""
    path = Path(prompts)
    return bool(prompts) and (path == STANDARD_INPUT or path.is_fifo())


def _prompts(
    config: PairConfig, teacher: Teacher, store: Path | None, already_read: PromptList | None
) -> PromptList:
    if store is not None and prompts_path(store).exists():
        return PromptList.open(prompts_path(store))
    if config.condition:
        return condition_prompts(config)
    if config.prompts:
        prompts = (
            already_read if already_read is not None else read_prompts(Path(config.prompts), config.column)
        )
        names = {name: number for number, name in enumerate(teacher.label_names or ())}
        return check_labels(prompts, teacher.num_labels, names) if teacher.num_labels else prompts
    if teacher.conditioning == "label":
        return label_list(teacher.num_labels)
    if teacher.conditioning == "none":
        return PromptList.of([""])
    raise SettingError("prompts is not set; give --prompts")


def resolve_spec(
    config: PairConfig,
    teacher: Teacher,
    digests: TeacherDigests,
    prompts: PromptList,
    solver: Solver,
    prior: PairReader | None = None,
) -> StoreSpec:
    """Build the spec of a config. Open settings are filled in from the teacher and the store `prior`.

    `digests` are the teacher's. `prior` is the store that conditions the rows of a later stage of a cascade.
    """
    # A size other than the network's own is allowed where `check_solver` accepts it.
    channels, height, width = teacher.latent_shape
    if config.latent_size:
        height = width = config.latent_size

    # Resolved values and digests: everything that determines a row must be in the spec.
    per_prompt = config.per_prompt if prior is None else prior.spec.per_prompt
    num_pairs = config.num_pairs or (len(prompts) * per_prompt if prior is None else len(prior))
    precision = config.precision
    assert precision != "auto", "open_job has replaced it"
    spec = StoreSpec(
        teacher=config.teacher,
        teacher_sha256=digests.weights,
        denoiser_sha256=digests.denoiser,
        conditioning=teacher.conditioning,
        teacher_facts=teacher.facts,
        prompts_sha256=prompt_list_sha256(prompts),
        num_pairs=num_pairs,
        num_prompts=len(prompts),
        per_prompt=per_prompt,
        solver=solver,
        steps=config.steps,
        spacing=teacher.schedule.spacing,
        final_alpha_one=teacher.schedule.final_alpha_one,
        guidance=config.guidance,
        guidance_rescale=config.guidance_rescale,
        churn=config.churn,
        precision=precision,
        compiled=bool(config.compile),
        seed=config.seed,
        dtype=config.dtype,
        latent_shape=(channels, height, width),
        latent_space=teacher.space,
        noise=config.noise,
        shard_size=config.shard_size,
    )

    # A later stage of a cascade also records the store that conditions its rows.
    if prior is None:
        return spec
    return replace(
        spec,
        condition=config.condition,
        condition_sha256=prior.spec.rows_sha256,
        condition_teacher=prior.spec.denoiser_sha256,
        condition_shape=prior.spec.latent_shape,
    )


def config_from_spec(spec: StoreSpec, **changes: Any) -> PairConfig:
    """Return the config that generates more rows of the store with this spec. changes: other settings."""
    # All values are given, so that a changed default or scheduler file cannot change the rows. Latents that
    # are not square have the network's own size: the setting is for squares.
    _, height, width = spec.latent_shape
    config = PairConfig(
        teacher=spec.teacher,
        condition=spec.condition,
        num_pairs=spec.num_pairs,
        per_prompt=spec.per_prompt,
        solver=spec.solver,
        steps=spec.steps,
        spacing=spec.spacing,
        final_alpha="one" if spec.final_alpha_one else "teacher",
        guidance=spec.guidance,
        guidance_rescale=spec.guidance_rescale,
        churn=spec.churn,
        precision=spec.precision,
        compile=False,  # compilation is not worth its time for few rows
        seed=spec.seed,
        dtype=spec.dtype,
        noise=spec.noise,
        shard_size=spec.shard_size,
        latent_size=height if height == width else 0,
    )
    return replace(config, **changes)


def batched(indices: Sequence[int], size: int) -> Iterator[list[int]]:
    """Split `indices` into batches of `size`."""
    remaining = iter(indices)
    while batch := list(islice(remaining, size)):
        yield batch
