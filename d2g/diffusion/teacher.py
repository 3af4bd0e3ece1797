"""A diffusion teacher as a sampler needs it: prompts in, x_0 and epsilon out, whatever it predicts."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from d2g.core.errors import SettingError, UserError
from d2g.diffusion import pretrained
from d2g.diffusion.conditioning import Condition as Condition
from d2g.diffusion.conditioning import Conditioner, Kind, Labels
from d2g.diffusion.edm import EDMSchedule
from d2g.diffusion.families import check_network, check_size, conditioner, network_piece
from d2g.diffusion.latents import LatentSpace, latent_space
from d2g.diffusion.pipelines import Pipeline, open_pipeline
from d2g.diffusion.schedule import NO_SIGNAL, Denoised, FlowSchedule, Point, Schedule, Spacing
from d2g.diffusion.scheduler_files import AnySchedule, load_any_schedule
from d2g.diffusion.solvers import Denoise, Solver, first_order, guided, sample_ode

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Teacher:
    """A frozen teacher on one device, of any family. Build with `load_teacher`.

    `latent_shape`: (C, h, w) of the resolution the network was trained at; others may be asked for. `network`
    may be replaced by a compiled one.
    """

    name: str
    pipeline: str
    network: Any
    conditioner: Conditioner
    schedule: AnySchedule
    space: LatentSpace
    latent_shape: tuple[int, int, int]
    device: torch.device
    dtype: torch.dtype

    @property
    def conditioning(self) -> Kind:
        """What prompts are: text, class numbers in decimal, or nothing (empty)."""
        return self.conditioner.kind

    @property
    def num_labels(self) -> int:
        """Number of classes; 0 unless conditioning is "label"."""
        return self.conditioner.num_labels if isinstance(self.conditioner, Labels) else 0

    @property
    def label_names(self) -> list[str] | None:
        """The classes' names, where the pipeline has them."""
        return self.conditioner.label_names if isinstance(self.conditioner, Labels) else None

    @property
    def default_solver(self) -> Solver:
        """The first-order solver of this kind of ODE."""
        return first_order(self.schedule)

    @property
    def encoders(self) -> list[torch.nn.Module]:
        """The text encoders, which may lie on another device than the network while their text is kept."""
        return list(self.conditioner.models.values())

    @property
    def facts(self) -> dict[str, Any]:
        """What decides latents beside weights, prompts and a job's settings. JSON values."""
        found: dict[str, Any] = {"pipeline": self.pipeline, "prediction_type": self.schedule.prediction}
        if isinstance(self.schedule, Schedule):
            found["steps_offset"] = self.schedule.steps_offset
        elif isinstance(self.schedule, EDMSchedule):
            found |= _edm_facts(self.schedule)
        elif self.schedule.dynamic is None:
            found["shift"] = self.schedule.shift
        else:
            found["dynamic_shift"] = asdict(self.schedule.dynamic)
        return {**found, **self.conditioner.facts}

    def encode(self, prompts: Sequence[str]) -> Condition:
        """What the network is told for these prompts, a row each, and for none: on the teacher's device.

        Text is encoded where the encoders lie. Raises UserError for prompts that are no class numbers.
        """
        return self.conditioner.encode(prompts).to(self.device)

    def denoiser(self, condition: Condition, guidance: float, guidance_rescale: float = 0.0) -> Denoise:
        """A callable (x [B, C, h, w], point) -> x_0 and epsilon, with classifier-free guidance baked in.

        Guidance takes both branches in one batch and acts on the network's own output, before it is read as
        x_0 and epsilon; guidance 1 evaluates no second branch.
        """
        assert guidance == 1 or self.conditioner.has_null, "check_solver comes first"
        told = condition.rows if guidance == 1 else condition.with_null()
        told = {k: t.to(self.dtype) if t.is_floating_point() else t for k, t in told.items()}

        @torch.no_grad()
        def denoise(x: Tensor, point: Point) -> Denoised:
            doubled = x if guidance == 1 else torch.cat([x, x])
            shown = self.schedule.shown(doubled, point).to(self.dtype)
            output = self.conditioner.call(self.network, shown, point, told)
            output = output[:, : x.shape[1]].float()  # a learned variance follows the mean
            if guidance != 1:
                empty, conditional = output.chunk(2)
                output = guided(conditional, empty, guidance, guidance_rescale)
            return self.schedule.read(output, x, point)

        return denoise

    def sample(
        self,
        noise: Tensor,
        prompts: Sequence[str],
        steps: int,
        guidance: float,
        solver: Solver,
        guidance_rescale: float = 0.0,
        condition: Condition | None = None,
    ) -> Tensor:
        """Noise [B, C, h, w] and B prompts -> scaled latents [B, C, h, w] in fp32, on the teacher's device.

        `condition`, if given, holds the B prompts' rows, and `prompts` is not read.
        """
        if condition is None:
            unique = list(dict.fromkeys(prompts))
            place = {prompt: i for i, prompt in enumerate(unique)}
            condition = self.encode(unique).select([place[prompt] for prompt in prompts])
        assert len(condition) == len(noise), f"{len(condition)} conditions for {len(noise)} rows of noise"
        denoise = self.denoiser(condition, guidance, guidance_rescale)
        return sample_ode(denoise, noise.to(self.device), self.schedule, steps, solver)


def check_solver(
    teacher: Teacher,
    solver: str,
    steps: int,
    guidance: float = 1.0,
    guidance_rescale: float = 0.0,
    size: tuple[int, int] | None = None,
) -> None:
    """Raise SettingError or UserError if `teacher.sample` could not go with these settings.

    `size`: latent height and width, where they are not the network's own.
    """
    size = size or teacher.latent_shape[1:]
    check_size(teacher.name, teacher.network.config, size)
    name = teacher.name
    if solver not in ("heun", teacher.default_solver):
        kind = _KINDS[type(teacher.schedule)]
        raise SettingError(
            f"solver is {solver!r}, but teacher {name} is {kind}; take {teacher.default_solver} or heun"
        )
    first = teacher.schedule.points(steps, size)[0]
    if teacher.schedule.prediction == "epsilon" and first.alpha < NO_SIGNAL:
        raise UserError(
            f"teacher {name} predicts epsilon, but starts at zero terminal SNR (timestep {first.t}), where "
            "that says nothing about x_0; take spacing=leading or fewer steps, or a v-prediction teacher"
        )
    if guidance != 1 and not teacher.conditioner.has_null:
        raise SettingError(
            f"guidance is {guidance:g}, but teacher {name} has no unconditional branch; take guidance 1"
            + (", or name its null_class in model_index.json" if teacher.num_labels else "")
        )
    if not 0 <= guidance_rescale <= 1:
        raise SettingError(f"guidance_rescale is {guidance_rescale:g}; expected 0 (none) to 1")
    if guidance == 1 and guidance_rescale:
        raise SettingError(
            f"guidance_rescale is {guidance_rescale:g}, but guidance 1 leaves nothing to rescale; set it to 0"
        )


_KINDS = {
    Schedule: "variance-preserving, and DDIM is its Euler",
    FlowSchedule: "a flow",
    EDMSchedule: "preconditioned as in EDM",
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
    """Load a teacher from a folder or hub id. `spacing` and `final_alpha` as in PairConfig override the
    scheduler's.

    Network and text encoders come in `precision`; of the autoencoder only its config is read. Raises
    UserError for what cannot be a teacher, SettingError for a spacing that a flow or an EDM does not have.
    """
    device, dtype = torch.device(device), PRECISIONS[precision]
    bare = _skeleton(name, spacing, final_alpha)  # every refusal comes before gigabytes are read

    def load(component: str) -> Any:
        return pretrained.load_model(name, component, dtype).to(device)

    return replace(
        bare,
        network=load(network_piece(open_pipeline(name))),
        conditioner=replace(
            bare.conditioner, models={component: load(component) for component in bare.conditioner.models}
        ),
        device=device,
        dtype=dtype,
    )


def _skeleton(name: str, spacing: Spacing | Literal["teacher"], final_alpha: str) -> Teacher:
    """A teacher without weights, checked."""
    pipeline = open_pipeline(name)
    schedule = _override(name, load_any_schedule(name), spacing, final_alpha)
    space = _space(name, pipeline)
    network = pretrained.load_on_meta(name, network_piece(pipeline))
    shape = check_network(pipeline, network.config, space)
    tokenizers = {
        p: pretrained.load_tokenizer(name, p) for p in pipeline.components if p.startswith("tokenizer")
    }
    encoders = {
        p: pretrained.load_on_meta(name, p) for p in pipeline.components if p.startswith("text_encoder")
    }
    return Teacher(
        name=name,
        pipeline=pipeline.kind,
        network=network,
        conditioner=conditioner(pipeline, network.config, space, encoders, tokenizers),
        schedule=schedule,
        space=space,
        latent_shape=shape,
        device=torch.device("meta"),
        dtype=torch.float32,
    )


def _override(
    name: str, schedule: AnySchedule, spacing: Spacing | Literal["teacher"], final_alpha: str
) -> AnySchedule:
    if isinstance(schedule, EDMSchedule):
        if spacing not in ("teacher", schedule.spacing):
            raise SettingError(
                f"spacing is {spacing!r}, but teacher {name} is preconditioned as in EDM, and its steps lie "
                f"as its scheduler's sigma_schedule, {schedule.grid}, says; take spacing=teacher"
            )
        return schedule
    if isinstance(schedule, FlowSchedule):
        if spacing == "leading":
            raise SettingError(
                f"spacing is 'leading', which would start short of noise in the flow of teacher {name}; "
                "take linspace or trailing"
            )
        return schedule if spacing == "teacher" else replace(schedule, spacing=spacing)
    if spacing != "teacher":
        schedule = replace(schedule, spacing=spacing)
    return replace(schedule, final_alpha_one=True) if final_alpha == "one" else schedule


def _space(name: str, pipeline: Pipeline) -> LatentSpace:
    component = pretrained.vae_piece(name)
    if component is None:
        return latent_space(pretrained.load_vae(name))
    try:
        return latent_space(pretrained.load_on_meta(name, component))
    except UserError as error:
        raise UserError(f"teacher {pipeline.folder}: {error}") from error


def describe_teacher(name: str) -> dict[str, Any]:
    """What `d2g teacher info` prints, found out from the files; no weights are loaded."""
    teacher = _skeleton(name, "teacher", "teacher")
    pipeline, schedule = open_pipeline(name), teacher.schedule
    parts = {network_piece(pipeline): teacher.network, **teacher.conditioner.models}
    if (vae := pretrained.vae_piece(name)) is not None:
        parts[vae] = pretrained.load_on_meta(name, vae)
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
        "params": {part: sum(p.numel() for p in module.parameters()) for part, module in parts.items()},
        "solver_defaults": defaults,
        "conditioning": {
            "kind": teacher.conditioning,
            "guidance": teacher.conditioner.has_null,
            "encoders": {
                component: type(model).__name__ for component, model in teacher.conditioner.models.items()
            },
            "num_labels": teacher.num_labels,
        },
        "facts": teacher.facts,
        "scheduler": pipeline.class_name("scheduler"),
        "sha256": pretrained.weights_sha256(name),
    }
