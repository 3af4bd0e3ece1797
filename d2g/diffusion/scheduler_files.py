"""Schedules from the scheduler files of pipelines. Schedulers and settings that our solvers do not implement
raise UserError.

From a scheduler we take the ODE (betas, prediction, shift) and the spacing of its steps, but not its solver:
pairs need a deterministic sampler that ends at sigma = 0.
"""

import inspect
import json
import math
from collections.abc import Callable, Mapping
from typing import Any, get_args

from d2g.core.errors import UserError, first_line
from d2g.core.json_files import COPY_AGAIN, check_type, parse_json, read_json_object
from d2g.core.machine_errors import raise_machine_error
from d2g.core.regular_files import open_regular
from d2g.diffusion.edm import EDMPrediction, EDMSchedule, SigmaGrid
from d2g.diffusion.families.base import Pipeline, ScheduleKind
from d2g.diffusion.pipelines import open_pipeline
from d2g.diffusion.schedule import CosineSchedule, DynamicShift, FlowSchedule, Prediction, Schedule, Spacing

VARIANCE_PRESERVING = (
    "DDIMScheduler",
    "PNDMScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LMSDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler",
)
FLOW = ("FlowMatchEulerDiscreteScheduler",)
DPM_SOLVER = "DPMSolverMultistepScheduler"
COSINE = ("DDPMWuerstchenScheduler",)
EDM = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")

AnySchedule = Schedule | FlowSchedule | EDMSchedule | CosineSchedule

SCHEDULERS: dict[ScheduleKind, tuple[str, ...]] = {
    "vp": VARIANCE_PRESERVING,
    "flow": FLOW,
    "edm": EDM,
    "cosine": COSINE,
}
"""Scheduler classes by kind of schedule; a family's `schedules` say which of them its teachers may have."""


def schedule_kind(schedule: AnySchedule) -> ScheduleKind:
    """The kind of a schedule, as families name it."""
    if isinstance(schedule, FlowSchedule):
        return "flow"
    if isinstance(schedule, CosineSchedule):
        return "cosine"
    return "edm" if isinstance(schedule, EDMSchedule) else "vp"


BETAS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
)
"""Settings that determine the table of alphas, in the same way for every scheduler."""

_NOISE = "it draws fresh noise at every step"
REFUSED = {
    "DDPMScheduler": _NOISE,
    "DDPMParallelScheduler": _NOISE,
    "DDPMWuerstchenScheduler": _NOISE,
    "EulerAncestralDiscreteScheduler": _NOISE,
    "KDPM2AncestralDiscreteScheduler": _NOISE,
    "DPMSolverSDEScheduler": _NOISE,
    "SASolverScheduler": _NOISE,
    "LCMScheduler": _NOISE,
    "TCDScheduler": _NOISE,
    "FlowMatchLCMScheduler": _NOISE,
    "RePaintScheduler": _NOISE,
    "UnCLIPScheduler": _NOISE,
    "CMStochasticIterativeScheduler": _NOISE,
    "ScoreSdeVeScheduler": _NOISE,
    "DEISMultistepScheduler": "its final sigma is not 0",
}
"""Common schedulers that cannot make pairs, and why. DDPMWuerstchenScheduler's schedule can, where it is the
family's own: we take DDIM on it."""


# Setting -> (whether a value is unsupported, what it does, the value to use instead).
_UNSUPPORTED: dict[str, tuple[Callable[[Any], bool], str, str]] = {
    "clip_sample": (bool, "it clips x_0, which is no ODE", "false"),
    "thresholding": (bool, "it clips x_0, which is no ODE", "false"),
    "algorithm_type": (lambda v: "sde" in str(v), _NOISE, '"dpmsolver++"'),
    "stochastic_sampling": (bool, _NOISE, "false"),
    "final_sigmas_type": (lambda v: v != "zero", "its final sigma is not 0", '"zero"'),
    "use_karras_sigmas": (bool, "it leaves the timesteps the network was trained at", "false"),
    "use_exponential_sigmas": (bool, "it leaves the timesteps the network was trained at", "false"),
    "use_beta_sigmas": (bool, "it leaves the timesteps the network was trained at", "false"),
    "use_lu_lambdas": (bool, "it leaves the timesteps the network was trained at", "false"),
    "use_flow_sigmas": (bool, "a flow needs a FlowMatchEulerDiscreteScheduler", "false"),
    "interpolation_type": (lambda v: v != "linear", "it spaces steps in log sigma", '"linear"'),
    "timestep_type": (lambda v: v != "discrete", "its network takes log sigma as its time", '"discrete"'),
    "sigma_min": (lambda v: v is not None, "it cuts the range of sigmas", "null"),  # EDM has its own
    "sigma_max": (lambda v: v is not None, "it cuts the range of sigmas", "null"),
    "lambda_min_clipped": (lambda v: v != float("-inf"), "it drops the first steps", "-Infinity"),
    "shift_terminal": (lambda v: v is not None, "it stretches the steps", "null"),
    "invert_sigmas": (bool, "it runs from data to noise", "false"),
}


def load_schedule(name: str) -> AnySchedule:
    """The schedule of a pipeline: variance-preserving, flow or EDM.

    Raises UserError for schedulers that are stochastic or do not end at sigma = 0, and for settings that our
    solvers do not implement.
    """
    pipeline = open_pipeline(name)
    kind, settings = _settings(pipeline)
    builders: dict[str, Callable[[Pipeline, str, dict[str, Any]], AnySchedule]] = {
        **dict.fromkeys(EDM, _edm),
        **dict.fromkeys(FLOW, _flow),
        **dict.fromkeys(COSINE, _cosine),
    }
    build = builders.get(kind, _vp)
    if kind == DPM_SOLVER and pipeline.family.dpm_solver_flow:
        build = _dpm_solver_flow
    try:
        return build(pipeline, kind, settings)
    except UserError:
        raise
    except Exception as error:  # on odd values, scheduler and number constructors raise almost anything
        raise UserError(
            f"teacher {pipeline.folder}: scheduler {kind} has a value in scheduler_config.json that it does "
            f"not take ({first_line(error)}); copy the file from the model that this one was trained from"
        ) from error


def _settings(pipeline: Pipeline) -> tuple[str, dict[str, Any]]:
    """The scheduler's class, and the settings in its file completed by the defaults of its constructor.

    Raises UserError for schedulers and settings that are not supported.
    """
    import diffusers

    folder, kind = pipeline.component_dir("scheduler"), pipeline.class_name("scheduler")
    if kind not in EDM:
        kind = pipeline.family.scheduler_classes.get(pipeline.kind, kind)
    where = f"teacher {pipeline.folder}: scheduler {kind}"
    clips = "vp" in pipeline.family.schedules
    supported = [name for schedule in pipeline.family.schedules for name in SCHEDULERS[schedule]]
    supported += [DPM_SOLVER] if pipeline.family.dpm_solver_flow else []
    # Refuse schedulers that are not supported, with the way out.
    remedy = (
        f"in diffusers, set pipe.scheduler = {supported[0]}.from_config(pipe.scheduler.config"
        f"{', clip_sample=False' if clips else ''}) and save_pretrained the pipeline"
    )
    assert kind is not None, "component_dir has checked it"
    if kind in REFUSED and kind not in supported:
        raise UserError(f"{where} cannot make pairs: {REFUSED[kind]}; {remedy}")
    if kind not in supported:
        raise UserError(
            f"{where} does not go with {pipeline.kind}; expected {', '.join(supported)}; {remedy}"
        )
    # Read the file, and complete it with the defaults of the scheduler's constructor.
    file = folder / "scheduler_config.json"
    try:
        with open_regular(file) as stream:
            raw = parse_json(stream.read())
        parameters = inspect.signature(getattr(diffusers, kind).__init__).parameters
        # Files keep keys of other schedulers: SDXL's Euler file has set_alpha_to_one, which Euler never
        # reads, and using it is a known bug (method.md "Details that change the pairs").
        settings = {k: raw.get(k, p.default) for k, p in parameters.items() if k != "self"}
        _check_settings(settings, {key: parameters[key].default for key in settings})
        settings |= {k: v for k, v in pipeline.family.scheduler_settings.items() if k in settings}
    except (OSError, ValueError, AttributeError) as error:
        raise_machine_error(error)
        raise UserError(f"{where}: {file.name} cannot be read ({first_line(error)})") from error
    # Refuse settings that change the ODE or its end. EDM's sigma_min and sigma_max are part of it.
    own = {"sigma_min", "sigma_max"} if kind in EDM else set[str]()
    own |= {"use_flow_sigmas"} if pipeline.family.dpm_solver_flow else set()
    for key in sorted(_UNSUPPORTED.keys() & settings.keys() - own):
        is_unsupported, effect, instead = _UNSUPPORTED[key]
        if is_unsupported(settings[key]):
            raise UserError(
                f"{where} has {key}={json.dumps(settings[key])}: {effect}; "
                f"set it to {instead} in {file.relative_to(pipeline.folder)}"
            )
    return kind, settings


MOST_TIMESTEPS = 1_000_000
"""Training steps of a schedule, which has a table of that length; 1000 is usual."""


def _check_settings(settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Raise ValueError for a setting of another type than its default, and for a table that fills memory."""
    for key, value in settings.items():
        # Files may say null for no value, and a whole number for any number.
        if type(default := defaults[key]) in (bool, int, float, str) and value is not None:
            check_type(value, str if isinstance(default, str) else bool | float, key)
    check_type(settings.get("trained_betas"), list[float] | None, "trained_betas")
    timesteps = settings.get("num_train_timesteps", 1)
    if not (isinstance(timesteps, int | float) and 0 < timesteps <= MOST_TIMESTEPS):
        raise ValueError(f"num_train_timesteps is {timesteps}; expected 1 to {MOST_TIMESTEPS}")


def _vp(pipeline: Pipeline, kind: str, settings: dict[str, Any]) -> Schedule:
    from diffusers import DDIMScheduler

    # Our solvers implement these predictions and spacings only.
    where = f"teacher {pipeline.folder}: scheduler {kind}"
    if settings["prediction_type"] not in get_args(Prediction):
        raise UserError(
            f"{where} has prediction_type={settings['prediction_type']}; "
            f"supported: {', '.join(get_args(Prediction))}"
        )
    spacing = settings.get("timestep_spacing", "linspace")
    if spacing not in get_args(Spacing):
        raise UserError(f"{where} has timestep_spacing={spacing}; supported: {', '.join(get_args(Spacing))}")
    # DDIMScheduler computes the table of alphas from any scheduler's betas.
    try:
        alphas = DDIMScheduler(**{k: settings[k] for k in BETAS if k in settings}).alphas_cumprod
    except Exception as error:  # on odd values, it raises almost anything
        reason = first_line(error)
        raise UserError(f"{where} has betas that DDIMScheduler does not take: {reason}") from error
    return Schedule(
        alphas_cumprod=alphas.double(),
        prediction=settings["prediction_type"],
        spacing=spacing,
        steps_offset=int(settings.get("steps_offset", 0)),
        final_alpha_one=bool(
            settings.get("set_alpha_to_one", True)
        ),  # schedulers without it end at sigma = 0
    )


def _flow(pipeline: Pipeline, kind: str, settings: dict[str, Any]) -> FlowSchedule:
    # With a dynamic shift, the number of patches depends on the network's patch size.
    dynamic = None
    if settings["use_dynamic_shifting"]:
        folder = pipeline.component_dir(pipeline.family.network)
        network = read_json_object(folder / "config.json", COPY_AGAIN)
        dynamic = DynamicShift(
            base_shift=float(settings["base_shift"]),
            max_shift=float(settings["max_shift"]),
            base_length=int(settings["base_image_seq_len"]),
            max_length=int(settings["max_image_seq_len"]),
            kind=settings["time_shift_type"],
            patch_size=int(network.get("patch_size", 2)) * pipeline.family.packing,
        )
    return FlowSchedule(
        train_steps=int(settings["num_train_timesteps"]),
        shift=float(settings["shift"]),
        spacing=pipeline.family.flow_spacing,
        dynamic=dynamic,
    )


def _dpm_solver_flow(pipeline: Pipeline, kind: str, settings: dict[str, Any]) -> FlowSchedule:
    where = f"teacher {pipeline.folder}: scheduler {kind}"
    expected = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "use_dynamic_shifting": False}
    for key, value in expected.items():
        if settings[key] != value:
            raise UserError(
                f"{where} has {key}={json.dumps(settings[key])}; expected {json.dumps(value)}, because a "
                f"{pipeline.kind} is a flow"
            )
    return FlowSchedule(
        train_steps=int(settings["num_train_timesteps"]),
        shift=float(settings["flow_shift"]),
        spacing="trailing",
        dpm_solver=True,
    )


def _cosine(pipeline: Pipeline, kind: str, settings: dict[str, Any]) -> CosineSchedule:
    scaler, offset = float(settings["scaler"]), float(settings["s"])
    if not (0 < scaler < math.inf and 0 <= offset < math.inf):
        raise ValueError(f"scaler={scaler:g}, s={offset:g}; expected numbers above 0")
    return CosineSchedule(scaler=scaler, offset=offset, final_alpha_one=False)


def _edm(pipeline: Pipeline, kind: str, settings: dict[str, Any]) -> EDMSchedule:
    # Our solvers implement these predictions and grids only.
    where = f"teacher {pipeline.folder}: scheduler {kind}"
    for key, supported in (("prediction_type", EDMPrediction), ("sigma_schedule", SigmaGrid)):
        if settings[key] not in get_args(supported):
            raise UserError(f"{where} has {key}={settings[key]}; supported: {', '.join(get_args(supported))}")
    # c_noise = ln(sigma) / 4 may be negative, which only the positional embedding takes.
    network = read_json_object(pipeline.component_dir("unet") / "config.json", COPY_AGAIN)
    if (embedding := network.get("time_embedding_type", "positional")) != "positional":
        raise UserError(
            f"{where} has the time input c_noise, which may be negative, but the UNet has "
            f"time_embedding_type={embedding}; expected positional"
        )
    # The grid of eq. 5 needs positive, ordered sigmas.
    low, high, data, rho = (float(settings[k]) for k in ("sigma_min", "sigma_max", "sigma_data", "rho"))
    if not (0 < low < high and data > 0 and rho > 0):
        raise UserError(
            f"{where} has sigma_min={low:g}, sigma_max={high:g}, sigma_data={data:g}, rho={rho:g}; expected "
            "0 < sigma_min < sigma_max, and the others above 0"
        )
    return EDMSchedule(
        sigma_min=low,
        sigma_max=high,
        sigma_data=data,
        rho=rho,
        grid=settings["sigma_schedule"],
        prediction=settings["prediction_type"],
    )
