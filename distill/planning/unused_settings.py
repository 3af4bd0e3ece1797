"""Settings that have no effect in a given run. A preset may contain them; setting one by hand is an error."""

from collections.abc import Callable, Iterable
from dataclasses import fields

from d2g.core.errors import SettingError
from distill.config.discriminator import DiscriminatorConfig
from distill.config.run import DistillConfig
from distill.losses.regression.registry import REGRESSION_LOSSES, regression_networks
from distill.models.discriminators import DISCRIMINATORS
from distill.models.students import STUDENTS
from pairgen.store.remote import is_url

Condition = tuple[Callable[[DistillConfig], bool], str]


def _loss_conditions() -> dict[tuple[str, ...], Condition]:
    """Settings that a single regression loss reads."""
    return {
        tuple(f"regression.{setting}" for setting in loss.settings): (
            lambda config, name=name: name in config.regression.names,  # type: ignore[misc]
            f"with {name} in regression.losses",
        )
        for name, loss in REGRESSION_LOSSES.items()
        if loss.settings
    }


def _discriminator_conditions() -> dict[tuple[str, ...], Condition]:
    """Settings that some kinds of discriminators read and others do not."""
    readers: dict[str, tuple[str, ...]] = {}
    for name, kind in DISCRIMINATORS.items():
        for setting in kind.settings:
            readers[setting] = (*readers.get(setting, ()), name)
    return {
        (f"gan.{setting}",): (
            lambda config, names=names: config.gan.discriminator in names,  # type: ignore[misc]
            f"with gan.discriminator={' or '.join(names)}",
        )
        for setting, names in readers.items()
        if len(names) < len(DISCRIMINATORS)
    }


_ADVERSARIAL = "in `d2g distill gan` and `d2g distill text`"

GAN_ONLY = sorted(
    {field.name for field in fields(DiscriminatorConfig)} - {"optim", "real", "real_column", "real_fraction"}
)
"""Settings of the discriminator that no other stage reads."""


def _student_conditions() -> dict[tuple[str, ...], Condition]:
    """Settings of generators that some kinds of students read and others do not."""
    readers: dict[str, tuple[str, ...]] = {}
    for name, kind in STUDENTS.items():
        for setting in kind.settings:
            readers[setting] = (*readers.get(setting, ()), name)
    return {
        (f"student.generator.{setting}",): (
            lambda config, names=names: config.student.kind in names,  # type: ignore[misc]
            f"with student.kind={' or '.join(names)}",
        )
        for setting, names in readers.items()
    }


_CONDITIONS: dict[tuple[str, ...], Condition] = {
    tuple(f"gan.{name}" for name in GAN_ONLY): (lambda c: c.adversarial, _ADVERSARIAL),
    ("gan.optim.",): (lambda c: c.adversarial, _ADVERSARIAL),
    ("gan.real", "gan.real_column", "gan.real_fraction"): (
        lambda c: c.adversarial or (c.stage == "cd" and not c.pairs),
        f"{_ADVERSARIAL}, or in `d2g distill cd` without --pairs",
    ),
    ("gan.real_column",): (lambda c: bool(c.gan.real), "with gan.real"),
    ("consistency.",): (lambda c: c.stage == "cd", "in `d2g distill cd`"),
    ("data.rewire", "clip_guidance.weight"): (
        lambda c: c.stage != "cd",
        "in `d2g distill ode`, `gan` and `text`",
    ),
    ("gan.r1_interval", "gan.r1_reduction"): (
        lambda c: c.gan.active_penalty not in ("approx", "none"),
        "with gan.penalty=single, full or r1r2 and gan.r1_gamma above 0",
    ),
    ("gan.r1_rows",): (
        lambda c: c.gan.active_penalty == "single",
        "with gan.penalty=single and gan.r1_gamma above 0",
    ),
    ("gan.r1_gamma",): (
        lambda c: c.gan.penalty not in ("approx", "none"),
        "with gan.penalty=single, full or r1r2",
    ),
    ("gan.approx_sigma", "gan.approx_weight"): (
        lambda c: c.gan.penalty == "approx",
        "with gan.penalty=approx",
    ),
    ("gan.mix_x", "gan.mix_c", "gan.mix_z"): (
        lambda c: c.gan.mix_fraction > 0,
        "with gan.mix_fraction above 0",
    ),
    ("gan.virtual_batch",): (
        lambda c: c.gan.feature_heads == "tokens",
        "with gan.feature_heads=tokens",
    ),
    ("gan.timestep_shift",): (
        lambda c: c.gan.timestep_mode == "random",
        "with gan.timestep_mode=random",
    ),
    ("gan.noise_max_timestep",): (
        lambda c: c.gan.noise_augment != "none",
        "with gan.noise_augment=uniform or small",
    ),
    ("engine.own_generator_passes",): (lambda c: c.adversarial, _ADVERSARIAL),
    ("engine.frozen_weights",): (
        lambda c: c.student.lora_rank > 0 or c.stage == "text" or (c.adversarial and c.gan.freeze_backbone),
        "with student.lora_rank above 0, in `d2g distill text`, or in `d2g distill gan` with "
        "gan.freeze_backbone=true",
    ),
    ("student.own_text_encoder",): (
        lambda c: c.stage != "text",
        "in the stages ode and gan: a student of `d2g distill text` always has text encoders of its own",
    ),
    ("gan.optim.decay",): (
        lambda c: c.gan.optim.decay_images != 0,
        "with gan.optim.decay_images other than 0",
    ),
    ("clip_guidance.model", "clip_guidance.crop", "clip_guidance.form"): (
        lambda c: c.clip_guidance.weight > 0,
        "with clip_guidance.weight above 0",
    ),
    ("student_timestep",): (lambda c: c.student.is_diffusion, "with student.kind=diffusion"),
    ("optim.decay",): (lambda c: c.optim.decay_images != 0, "with optim.decay_images other than 0"),
    ("train.ema_beta",): (lambda c: not c.train.ema_halflife_images, "with train.ema_halflife_images=0"),
    (
        "data.block",
        "data.window",
        "data.skip_bad",
        "data.max_pairs",
        "data.rewire",
    ): (
        lambda c: not c.without_pairs,
        "with --pairs",
    ),
    ("data.cache", "data.cache_gib"): (
        lambda c: any(is_url(store) for store in c.pairs.split(",")),
        "with a URL as --pairs",
    ),
    ("lpips",): (
        lambda c: "latent_lpips" in regression_networks(c.regression),
        "with e_latent_lpips or latent_lpips in regression.losses",
    ),
}
CONDITIONS = (
    *_CONDITIONS.items(),
    *_loss_conditions().items(),
    *_discriminator_conditions().items(),
    *_student_conditions().items(),
)
"""When a run uses a setting (or a group, whose name ends with a dot): the condition, and its words. A setting
with several conditions needs all of them.
"""


def refuse_unused(config: DistillConfig, names: Iterable[str]) -> None:
    """Raise SettingError for the first of the dotted setting names that has no effect in such a run."""
    for name in names:
        for settings, (is_used, condition) in CONDITIONS:
            groups = tuple(setting for setting in settings if setting.endswith("."))
            if (name in settings or name.startswith(groups)) and not is_used(config):
                raise SettingError(f"{name} is set, but has an effect only {condition}; leave it out")
