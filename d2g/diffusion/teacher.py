"""A frozen diffusion or flow teacher: prompts and noise in; x_0, epsilon and latents out."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from d2g.core.config import pick
from d2g.core.errors import SettingError, UserError, first_line
from d2g.core.machine_errors import raise_machine_error
from d2g.core.transfer import to_device
from d2g.diffusion import pretrained
from d2g.diffusion.conditioning import Conditioner, Conditioning, ConditioningKind, require_list
from d2g.diffusion.edm import EDMSchedule
from d2g.diffusion.families.base import EMBEDDED, SCHEDULE_NAMES, Family, Pipeline
from d2g.diffusion.latents import LatentSpace, latent_space
from d2g.diffusion.pipelines import open_pipeline
from d2g.diffusion.schedule import NO_SIGNAL, CosineSchedule, Denoised, FlowSchedule, Point, Schedule, Spacing
from d2g.diffusion.scheduler_files import AnySchedule, load_schedule, schedule_kind
from d2g.diffusion.solvers import Churn, Denoise, Solver, first_order, guided, sample_ode

TEACHER_GUIDANCE = 3.0
"""Guidance scale of samples where none is set; teachers without an unconditional branch take 1."""
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Teacher:
    """A frozen teacher of any family on one device. Build it with `load_teacher`.

    pipeline: the name of its diffusers class. latent_shape: shape (C, h, w) at the resolution of training; it
    can also sample at others. config: the network's config; the network itself may be compiled.

    >>> from d2g.core.seeds import noise
    >>> from d2g.diffusion import load_teacher
    >>> teacher = load_teacher("miniature")
    >>> z = noise(0, range(2), teacher.latent_shape)  # rows 0 and 1 of seed 0
    >>> prompts = ["a red cube", "a blue cone"]
    >>> teacher.sample(z, prompts, steps=2, guidance=3.0, solver="ddim").shape == z.shape
    True
    """

    name: str
    pipeline: str
    family: Family
    network: Any
    config: Any
    conditioner: Conditioner
    schedule: AnySchedule
    space: LatentSpace
    latent_shape: tuple[int, int, int]
    device: torch.device
    dtype: torch.dtype

    @property
    def conditioning(self) -> ConditioningKind:
        """Kind of prompts: text, class labels in decimal, or empty."""
        return self.conditioner.kind

    @property
    def num_labels(self) -> int:
        """Number of classes; 0 unless `conditioning` is "label"."""
        return self.conditioner.num_labels

    @property
    def label_names(self) -> list[str] | None:
        """The names of the classes, if the pipeline has them."""
        return self.conditioner.label_names

    @property
    def default_solver(self) -> Solver:
        """The first-order solver of this kind of ODE."""
        return first_order(self.schedule)

    @property
    def default_guidance(self) -> float:
        """Guidance scale if the user gives none: TEACHER_GUIDANCE, the family's usual scale if the network
        takes it as an input, or 1 without guidance."""
        without = TEACHER_GUIDANCE if self.conditioner.has_null else 1.0
        return self.family.embedded_guidance or without

    @property
    def encoders(self) -> list[torch.nn.Module]:
        """The text encoders; they may be on another device than the network while their output is cached."""
        return list(self.conditioner.models.values())

    @property
    def facts(self) -> dict[str, Any]:
        """Facts that determine latents, besides weights, prompts and a job's settings, as JSON values."""
        # Each kind of schedule has its own parameters.
        facts: dict[str, Any] = {"pipeline": self.pipeline, "prediction_type": self.schedule.prediction}
        if isinstance(self.schedule, Schedule):
            facts["steps_offset"] = self.schedule.steps_offset
        elif isinstance(self.schedule, EDMSchedule):
            facts |= _edm_facts(self.schedule)
        elif isinstance(self.schedule, CosineSchedule):
            facts |= {"cosine_scaler": self.schedule.scaler, "cosine_offset": self.schedule.offset}
        elif self.schedule.dynamic is None:
            facts["shift"] = self.schedule.shift
        else:
            facts["dynamic_shift"] = asdict(self.schedule.dynamic)
        if isinstance(self.schedule, FlowSchedule) and self.schedule.dpm_solver:
            facts["sigmas"] = "as DPMSolverMultistepScheduler, with whole time inputs"
        if self.family.embedded_guidance is not None:
            facts["guidance"] = EMBEDDED
        return {**facts, **self.conditioner.facts}

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """The conditioning of B prompts and the unconditional row, on the teacher's device.

        Text is encoded on the encoders' device. Raises UserError for prompts that this teacher cannot take.
        """
        require_list(prompts)
        return self.conditioner.encode(prompts, null=True).to(self.device)

    def denoiser(self, cond: Conditioning, guidance: float, guidance_rescale: float = 0.0) -> Denoise:
        """A callable (x [B, C, h, w], point) -> x_0 and epsilon, with guidance built in.

        Classifier-free guidance evaluates both branches in one batch and combines the network's raw outputs,
        before they are converted to x_0 and epsilon; with guidance 1 there is no unconditional branch. A
        network that takes the guidance scale as an input has none either.
        """
        embedded = self.family.embedded_guidance is not None
        classifier_free = guidance != 1 and not embedded
        assert self.conditioner.has_null or not classifier_free, "check_solver must run first"
        network_cond = (cond.with_null() if classifier_free else cond).to(self.dtype)
        if embedded:
            network_cond = network_cond.with_guidance(torch.full((len(cond),), guidance))

        @torch.no_grad()
        def denoise(x: Tensor, point: Point) -> Denoised:
            # One batch: the unconditional rows, then the conditional ones.
            batch = torch.cat([x, x]) if classifier_free else x
            inputs = self.schedule.network_input(batch, point).to(self.dtype)
            output = self.family.forward(
                self.network,
                self.config,
                inputs,
                time_input(inputs, point),
                network_cond,
                self.space.downscale,
            )
            output = output[:, : x.shape[1]].float()  # drop the channels of a learned variance
            # Guidance combines raw outputs, before the conversion to x_0 and epsilon.
            if classifier_free:
                unconditional, conditional = output.chunk(2)
                output = guided(conditional, unconditional, guidance, guidance_rescale)
            return self.schedule.denoised(output, x, point)

        return denoise

    def sample(
        self,
        noise: Tensor,
        prompts: Sequence[str],
        steps: int,
        guidance: float,
        solver: Solver,
        guidance_rescale: float = 0.0,
        cond: Conditioning | None = None,
        churn: Churn | None = None,
    ) -> Tensor:
        """Sample scaled latents [B, C, h, w], fp32, on the teacher's device.

        noise: [B, C, h, w] of unit variance. prompts: B texts; they are ignored if `cond` has the encoded
        prompts of the B rows. steps: solver steps. Call `check_solver` with these settings first.
        """
        if cond is None:
            require_list(prompts)
            unique = list(dict.fromkeys(prompts))  # each different prompt is encoded once
            position = {prompt: i for i, prompt in enumerate(unique)}
            cond = self.encode(unique)[[position[prompt] for prompt in prompts]]
        assert len(cond) == len(noise), f"{len(cond)} rows of conditioning for {len(noise)} rows of noise"
        denoise = self.denoiser(cond, guidance, guidance_rescale)
        return sample_ode(denoise, to_device(noise, self.device), self.schedule, steps, solver, churn)


def time_input(x: Tensor, point: Point) -> Tensor:
    """A network's time input [B] at a point: a timestep of the table, a flow's fraction of it, or EDM's
    c_noise.

    It is a tensor, because torch.compile would compile a network again for every number.
    """
    dtype = torch.int64 if isinstance(point.t, int) else torch.float32
    return torch.full((len(x),), point.t, dtype=dtype, device=x.device)


def check_solver(
    teacher: Teacher,
    solver: str,
    steps: int,
    guidance: float = 1.0,
    guidance_rescale: float = 0.0,
    size: tuple[int, int] | None = None,
) -> None:
    """Raise SettingError or UserError if `teacher.sample` cannot run with these settings.

    `size`: latent height and width; by default the network's own.
    """
    # The latent size and the solver must fit the network and its ODE.
    size = size or teacher.latent_shape[1:]
    teacher.family.check_size(teacher.name, teacher.config, size)
    name = teacher.name
    if solver not in ("heun", teacher.default_solver):
        kind = _SCHEDULES[type(teacher.schedule)]
        raise SettingError(
            f"solver is {solver!r}, but teacher {name} is {kind}; take {teacher.default_solver} or heun"
        )
    # An epsilon prediction says nothing about x_0 where x is noise only.
    first = teacher.schedule.points(steps, size)[0]
    if teacher.schedule.prediction == "epsilon" and first.alpha < NO_SIGNAL:
        raise UserError(
            f"teacher {name} predicts epsilon, but starts at zero terminal SNR (timestep {first.t}), where "
            "that says nothing about x_0; take spacing=leading or fewer steps, or a v-prediction teacher"
        )
    # Guidance needs an input or an unconditional branch, and rescaling needs classifier-free guidance.
    embedded = teacher.family.embedded_guidance is not None
    if guidance != 1 and not (embedded or teacher.conditioner.has_null):
        raise SettingError(
            f"guidance is {guidance:g}, but teacher {name} has no unconditional branch; take guidance 1"
            + (", or name its null_class in model_index.json" if teacher.num_labels else "")
        )
    if not 0 <= guidance_rescale <= 1:
        raise SettingError(f"guidance_rescale is {guidance_rescale:g}; expected 0 (none) to 1")
    if guidance_rescale and (guidance == 1 or embedded):
        why = "guidance 1" if not embedded else f"teacher {name}, which takes guidance as an input,"
        raise SettingError(
            f"guidance_rescale is {guidance_rescale:g}, but {why} leaves nothing to rescale; set it to 0"
        )


_SCHEDULES = {
    Schedule: "variance-preserving, and DDIM is its Euler",
    FlowSchedule: "a flow",
    EDMSchedule: "preconditioned as in EDM",
    CosineSchedule: "of a continuous cosine schedule, and DDIM is its Euler",
}


def _edm_facts(schedule: EDMSchedule) -> dict[str, Any]:
    rho = {"rho": schedule.rho} if schedule.grid == "karras" else {}
    ends = {name: getattr(schedule, name) for name in ("sigma_min", "sigma_max", "sigma_data")}
    return {"preconditioning": "edm", **ends, "sigma_schedule": schedule.grid, **rho}


def load_teacher(
    name: str,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
    spacing: Spacing | Literal["teacher"] = "teacher",
    final_alpha: str = "one",
) -> Teacher:
    """Load a teacher from a folder or hub id. `spacing` and `final_alpha`, as in PairConfig, override the
    scheduler's.

    Network and text encoders are loaded in `precision`: fp32, bf16 or fp16; of the autoencoder only the
    config is read. Raises UserError for what cannot be a teacher, SettingError for another precision and for
    a spacing that a flow or an EDM does not have.

    >>> from d2g.diffusion import load_teacher
    >>> teacher = load_teacher("miniature")
    >>> teacher.conditioning, teacher.schedule.prediction
    ('text', 'epsilon')
    """
    # Every check runs before gigabytes are read.
    return with_weights(teacher_on_meta(name, spacing, final_alpha), device, precision)


def with_weights(teacher: Teacher, device: torch.device | str, precision: str) -> Teacher:
    """The teacher of `teacher_on_meta` with its weights, on this device and in this precision.

    Raises UserError for files of weights that do not fit, SettingError for another precision.
    """
    device, dtype = torch.device(device), pick(PRECISIONS, precision, "precision")
    return replace(
        teacher,
        network=pretrained.load_model(teacher.name, teacher.family.network, dtype).to(device),
        conditioner=pretrained.load_text_encoders(teacher.name, teacher.conditioner, dtype, device),
        device=device,
        dtype=dtype,
    )


def teacher_on_meta(
    name: str, spacing: Spacing | Literal["teacher"] = "teacher", final_alpha: str = "one"
) -> Teacher:
    """A checked teacher without weights, from its config files. Arguments and errors as in `load_teacher`."""
    pipeline = open_pipeline(name)
    try:
        return _checked_teacher(name, pipeline, spacing, final_alpha)
    except UserError:
        raise
    except Exception as error:  # odd values of the files meet arithmetic here and in other libraries
        raise_machine_error(error)
        raise UserError(
            f"teacher {pipeline.folder}: its config files hold a value that does not fit "
            f"({type(error).__name__}: {first_line(error)}); compare them with those of the original model"
        ) from error


def _checked_teacher(
    name: str, pipeline: Pipeline, spacing: Spacing | Literal["teacher"], final_alpha: str
) -> Teacher:
    schedule = _override(name, load_schedule(name), spacing, final_alpha)
    space = _latent_space(name)
    network = pretrained.load_on_meta(name, pipeline.family.network)
    return Teacher(
        name=name,
        pipeline=pipeline.kind,
        family=pipeline.family,
        network=network,
        config=network.config,
        schedule=schedule,
        space=space,
        latent_shape=pipeline.family.check(pipeline, network.config, space),
        conditioner=pretrained.conditioner_on_meta(name),
        device=torch.device("meta"),
        dtype=torch.float32,
    )


def _override(
    name: str, schedule: AnySchedule, spacing: Spacing | Literal["teacher"], final_alpha: str
) -> AnySchedule:
    """The schedule with another spacing and end, where its kind allows them."""
    # EDM: the grid of sigmas decides the steps.
    if isinstance(schedule, EDMSchedule):
        if spacing not in ("teacher", schedule.spacing):
            raise SettingError(
                f"spacing is {spacing!r}, but teacher {name} is preconditioned as in EDM, and the "
                f"sigma_schedule of its scheduler, {schedule.grid}, decides its steps; take spacing=teacher"
            )
        return schedule
    # Flow: any spacing that starts at pure noise.
    if isinstance(schedule, FlowSchedule):
        if spacing == "leading":
            raise SettingError(
                f"spacing is 'leading', which would start short of noise in the flow of teacher {name}; "
                "take linspace or trailing"
            )
        return schedule if spacing == "teacher" else replace(schedule, spacing=spacing)
    # Continuous time has even steps only. Variance-preserving: any spacing. Both: an end at clean data.
    if isinstance(schedule, CosineSchedule):
        if spacing not in ("teacher", schedule.spacing):
            raise SettingError(
                f"spacing is {spacing!r}, but the cosine schedule of teacher {name} is continuous, and its "
                "steps are even; take spacing=teacher"
            )
        return replace(schedule, final_alpha_one=True) if final_alpha == "one" else schedule
    if spacing != "teacher":
        schedule = replace(schedule, spacing=spacing)
    return replace(schedule, final_alpha_one=True) if final_alpha == "one" else schedule


def _latent_space(name: str) -> LatentSpace:
    autoencoder = pretrained.autoencoder_on_meta(name)
    try:
        return latent_space(autoencoder)
    except UserError as error:
        raise UserError(f"teacher {open_pipeline(name).folder}: {error}") from error


def describe_stages(name: str) -> str:
    """One line for people: which stages support this teacher, and which do not.

    Raises UserError for a teacher that neither stage of training supports.
    """
    pipeline = open_pipeline(name)
    unconditional = not pipeline.family.reads_text and pretrained.conditioner_on_meta(name).kind == "none"
    kind = schedule_kind(load_schedule(name))
    supported = pipeline.family.supported_stages(kind, unconditional)
    missing = [stage for stage, supports in supported.items() if not supports]
    stages = ", ".join(supports for supports in supported.values() if supports)
    line = f"teacher {name} ({pipeline.family.title}, {SCHEDULE_NAMES[kind]}) supports {stages}"
    if missing:
        line += f"; not supported: {', '.join(missing)}"
    if not (supported["regression"] or supported["GAN"]):
        raise UserError(f"{line}; nothing trains on its pairs: `d2g teacher list` has the table of families")
    return line


def describe_teacher(name: str) -> dict[str, Any]:
    """Describe a teacher for `d2g teacher info`, from its files; no weights are loaded."""
    # Every component on the meta device: shapes and numbers of parameters without weights.
    teacher = teacher_on_meta(name, final_alpha="teacher")
    pipeline, schedule = open_pipeline(name), teacher.schedule
    models = {pipeline.family.network: teacher.network, **dict(teacher.conditioner.models.items())}
    if (autoencoder := pipeline.family.autoencoder) is not None:
        models[autoencoder] = pretrained.load_on_meta(name, autoencoder)
    # Defaults of the sampler. EDM has no training steps, and only a table of timesteps has an offset.
    defaults: dict[str, Any] = {
        "solver": teacher.default_solver,
        "spacing": schedule.spacing,
        "final_alpha_one": schedule.final_alpha_one,
    }
    if not isinstance(schedule, EDMSchedule):
        defaults["train_steps"] = len(schedule)
    if isinstance(schedule, Schedule):
        defaults["steps_offset"] = schedule.steps_offset
    return {
        "pipeline": teacher.pipeline,
        "prediction_type": schedule.prediction,
        "latent_shape": list(teacher.latent_shape),
        "latent_space": asdict(teacher.space),
        "params": {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()},
        "solver_defaults": defaults,
        "conditioning": {
            "kind": teacher.conditioning,
            "guidance": teacher.conditioner.has_null or teacher.family.embedded_guidance is not None,
            "encoders": {c: type(model).__name__ for c, model in teacher.conditioner.models.items()},
            "num_labels": teacher.num_labels,
        },
        "facts": teacher.facts,
        "scheduler": pipeline.class_name("scheduler"),
        "sha256": pretrained.weights_sha256(name),
    }
