"""Settings that change nothing in a run as it is set up. A preset may carry them; who gives one is told."""

from collections.abc import Callable, Iterable

from d2g.core.errors import SettingError
from distill.config.run import DistillConfig

Acts = Callable[[DistillConfig], bool]

ACTS: dict[tuple[str, ...], tuple[Acts, str]] = {
    ("gan.",): (lambda c: c.stage == "gan", "in `d2g distill gan`"),
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
    ("gan.timestep_shift",): (
        lambda c: c.gan.timestep_mode == "random",
        "with gan.timestep_mode=random",
    ),
    ("gan.noise_max_timestep",): (
        lambda c: c.gan.noise_augment != "none",
        "with gan.noise_augment=uniform or small",
    ),
    ("gan.optim.decay",): (lambda c: c.gan.optim.decay_images > 0, "with gan.optim.decay_images above 0"),
    ("optim.decay",): (lambda c: c.optim.decay_images > 0, "with optim.decay_images above 0"),
    ("regression.augment", "regression.draws"): (
        lambda c: c.regression.kind == "e_latent_lpips",
        "with regression.kind=e_latent_lpips",
    ),
    ("regression.huber_c",): (
        lambda c: c.regression.kind == "pseudo_huber",
        "with regression.kind=pseudo_huber",
    ),
    ("regression.lpips_net", "regression.lpips_weights", "regression.lpips_resize"): (
        lambda c: c.regression.kind == "lpips",
        "with regression.kind=lpips",
    ),
    ("lpips",): (
        lambda c: c.regression.needs_latent_lpips,
        "with regression.kind=e_latent_lpips or latent_lpips, or regression.latent_lpips_weight above 0",
    ),
}
"""Settings, or with a dot at the end groups of them: when they act, and that in words."""


def refuse_idle(config: DistillConfig, given: Iterable[str]) -> None:
    """Raise SettingError for the first of the dotted names `given` that changes nothing in such a run."""
    for name in given:
        for settings, (acts, when) in ACTS.items():
            meant = name in settings or name.startswith(tuple(s for s in settings if s.endswith(".")))
            if meant and not acts(config):
                raise SettingError(f"{name} is set, but acts only {when}; leave it out")
