"""Check the settings of a run before anything is loaded."""

from pathlib import Path

import torch

from d2g.core.distributed import process_group
from d2g.core.errors import SettingError
from d2g.core.tracking.loggers import check_loggers
from d2g.diffusion.pipelines import SHIPPED, family_of
from distill.config.run import DistillConfig, microbatch_size
from distill.losses.noise_augmentation import build_noise_augmentation
from distill.losses.regression.regression import check_space
from distill.models.discriminators import check_discriminator
from distill.models.student import check_teacher
from distill.models.students import check_student
from distill.models.text_student import check_text_teacher
from distill.training.data import require_enough_pairs, training_pairs
from distill.training.validation import held_out
from pairgen.store.spec import read_spec


def validate_config(config: DistillConfig) -> None:
    """Raise SettingError for settings that are wrong whatever the inputs hold, before anything is loaded."""
    # A generator of its own kind may start with random weights.
    starts = config.adversarial and config.student.is_diffusion
    for name in ("teacher", *(["init"] if starts else [])):
        if not getattr(config, name):
            raise SettingError(f"{name} is not set; give --{name}")
    check_student(config)
    if not config.pairs:
        _check_without_pairs(config)
    _check_real_images(config)
    if config.adversarial and config.gan.real_fraction and not config.gan.real:
        raise SettingError("gan.real is not set; give the folder of real images, --set gan.real=FOLDER")
    if config.adversarial:
        _check_adversarial_loss(config)
    microbatch_size(config, process_group.world_size())
    check_loggers(config.train.loggers)


def check_plan(config: DistillConfig) -> None:
    """Raise SettingError or UserError for settings that the run would refuse, as far as the inputs that are
    on this disk tell. A plan may be made before there are a teacher and pairs.
    """
    if config.adversarial:
        _check_adversarial_loss(config)
    # What the teacher decides: its space, and the timesteps of its schedule.
    if config.teacher in SHIPPED or Path(config.teacher or "-").is_dir():
        _check_real_images(config)
        check_space(config.teacher, config.regression)
        gan = config.gan if config.adversarial else None
        build_noise_augmentation(gan, config.teacher, config.seed, torch.device("cpu"))
    # Batch, held-out pairs and `data.max_pairs` must fit the number of pairs.
    stores = [Path(name) for name in config.pairs.split(",") if name]
    if stores and all((store / "store.json").is_file() for store in stores):
        pairs, held = sum(read_spec(store).num_pairs for store in stores), config.train.validate_pairs
        held_out(pairs, held)
        count = training_pairs(pairs, config.data.max_pairs, held)
        require_enough_pairs(pairs, config.train.batch_size, pairs - count)


def _check_real_images(config: DistillConfig) -> None:
    """Raise SettingError for real images beside a teacher whose latents they do not have."""
    family = family_of(config.teacher)
    if config.adversarial and config.gan.real and not family.takes_real_images:
        raise SettingError(
            f"gan.real is {config.gan.real!r}, but photographs have no latents of a cascade's stages, as "
            f"{config.teacher} ({family.title}) makes; leave gan.real out"
        )


def _check_adversarial_loss(config: DistillConfig) -> None:
    """Raise SettingError for a run that never updates the student, and for an adaptive weight where the GAN
    loss is the only loss of the student."""
    steps, every = -(-config.train.images // config.train.batch_size), config.gan.d_steps_per_g_step
    if steps < every:
        raise SettingError(
            f"gan.d_steps_per_g_step is {every}, but the run has {steps} step{'s' * (steps > 1)} "
            f"(train.images {config.train.images}, train.batch_size {config.train.batch_size}), so that the "
            "student would never be updated; change one of them"
        )
    if config.gan.adaptive_weight and not config.regression.losses and not config.clip_guidance.weight:
        raise SettingError(
            "gan.adaptive_weight is true, but regression.losses is [] and clip_guidance.weight 0; expected "
            "another loss, to which the GAN loss is scaled; set one, or gan.adaptive_weight=false"
        )


def _check_without_pairs(config: DistillConfig) -> None:
    """Raise SettingError for settings that need pairs."""
    # Which stages can run without pairs, and on what.
    if config.stage == "ode":
        raise SettingError("pairs is not set; give --pairs")
    if config.stage == "cd" and not config.without_pairs:
        raise SettingError(
            "pairs is not set; give --pairs, or train on real images: set gan.real=FOLDER and "
            "gan.real_fraction=1"
        )
    if not config.without_pairs:
        losses = ", ".join(config.regression.names)
        missing = {
            "regression.losses=[]": bool(losses),
            "gan.real=FOLDER": not config.gan.real,
            "gan.real_fraction=1": config.gan.real_fraction != 1,
        }
        needed = ", ".join(name for name, needs in missing.items() if needs)
        reason = f", but the regression loss {losses} compares with the teacher's latents" if losses else ""
        raise SettingError(
            f"pairs is not set{reason}; give --pairs, or train on real images alone: set {needed}"
        )
    # Held-out pairs and guidance scales come from pairs.
    if config.train.validate_pairs:
        raise SettingError(
            f"train.validate_pairs is {config.train.validate_pairs}, but there are no pairs; set it to 0, "
            "and give --validate PROTOCOL"
        )
    if family_of(config.teacher).embedded_guidance is not None:
        raise SettingError(
            f"pairs is not set, but the network of {config.teacher} takes the guidance scale of its pairs; "
            "give --pairs"
        )
    if config.student.guidance_conditioning:
        raise SettingError(
            "student.guidance_conditioning is true, but without pairs there are no guidance scales; set it "
            "to false"
        )


def check_supported(config: DistillConfig) -> None:
    """Raise SettingError or UserError for a teacher that the stage, the student or the discriminator does not
    take."""
    check_teacher(config.teacher, config.stage, config.student)
    if config.own_text:
        check_text_teacher(config.teacher)
    if config.adversarial:
        check_discriminator(config.teacher, config.gan)
