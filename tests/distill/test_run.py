"""distill.config.run: presets against Table A1 of the supplement; invalid settings."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from d2g.core.config import from_json, override, to_json, with_values
from d2g.core.errors import SettingError
from distill.config.discriminator import DiscriminatorConfig
from distill.config.presets import DISTILL_PRESETS, TABLE_A1, preset
from distill.config.regression import RegressionConfig, RegressionName
from distill.config.run import DistillConfig, EngineConfig, TrainConfig
from distill.planning.cost import column, plan, table_evaluations
from distill.planning.cost import evaluations as evaluations_of
from distill.planning.unused_settings import CONDITIONS, GAN_ONLY, refuse_unused


def test_presets_are_table_a1() -> None:
    table = {
        (name, stage): (
            p.train.images // p.train.batch_size,
            p.train.batch_size,
            p.optim.lr,
            p.regression.losses,
            p.regression.augment,
            p.train.ema_start_images // p.train.batch_size,
            p.engine.gpus,
        )
        for name, stages in TABLE_A1.items()
        for stage, p in stages.items()
    }
    falling = (1e-4, 1e-5, "linear")
    own = (("e_latent_lpips", 1.0),)
    both = (*own, ("latent_lpips", 1.0))
    assert table == {
        ("cifar10", "ode"): (150_000, 512, 4e-4, (("lpips", 1.0),), "bgco", 20_000, 8),
        ("sd15-cfg3", "ode"): (150_000, 256, 1e-4, both, "bgo", 4_000, 16),
        ("sd15-cfg3", "gan"): (10_000, 256, 1e-5, both, "bgo", 4_000, 16),
        ("sd15-cfg8", "ode"): (50_000, 2048, 1e-4, own, "bgco", 4_000, 64),
        ("sd15-cfg8", "gan"): (10_000, 1024, 1e-5, own, "bgco", 4_000, 64),
        ("sdxl-cfg7", "ode"): (20_000, 1024, 1e-4, own, "bgco", 4_000, 128),
        ("sdxl-cfg7", "gan"): (30_000, 512, 1e-5, own, "bgco", 4_000, 128),
    }
    assert {
        name: (
            p.gan.weight,
            p.gan.active_penalty,
            p.gan.noise_augment,
            p.gan.optim.betas,
            p.gan.mix_fraction > 0,
            (p.gan.optim.lr, p.gan.optim.final_lr, p.gan.optim.decay, p.gan.optim.decay_images),
        )
        for name, stages in TABLE_A1.items()
        if (p := stages.get("gan"))
    } == {
        "sd15-cfg3": (0.25, "single", "none", (0.9, 0.999), True, (*falling, 2_560_000)),
        "sd15-cfg8": (0.25, "single", "none", (0.9, 0.999), True, (*falling, 10_240_000)),
        "sdxl-cfg7": (1.0, "none", "uniform", (0.0, 0.99), True, (*falling, 15_360_000)),
    }
    for name, stages in TABLE_A1.items():
        for p in stages.values():
            cifar = name == "cifar10"
            assert (p.train.precision, p.train.ema_beta, p.optim.betas) == ("bf16", 0.9999, (0.9, 0.999))
            decay = (p.optim.weight_decay, p.optim.attention_weight_decay)
            assert decay == ((0.0, 0.0) if cifar else (1e-2, 1e-5))
            assert (p.optim.name, p.student.dropout) == (("radam", 0.1) if cifar else ("adamw", 0.0))
            assert (p.gan.r1_gamma, p.gan.r1_interval, p.gan.d_steps_per_g_step) == (0.01, 16, 1)


def test_evaluation_counts_match_table_a1() -> None:
    """Table A1's network evaluations, and the seconds per step that follow from its GPU-days (method.md
    "Schedule and hyperparameters").
    """
    million = 1_000_000
    expected = {
        "cifar10": {"pairs": 35.0, "ode": 76.8, "total": 111.8},
        "sd15-cfg3": {"pairs": 150.0, "ode": 38.4, "gan": 12.8, "total": 201.2},
        "sd15-cfg8": {"pairs": 600.0, "ode": 102.4, "gan": 51.2, "total": 753.6},
        "sdxl-cfg7": {"pairs": 400.0, "ode": 20.48, "gan": 76.8, "total": 497.28},
    }
    columns = {name: column(name) for name in TABLE_A1}
    for name, sums in expected.items():
        assert {k: columns[name][k] / million for k in sums} == sums
        assert set(columns[name]) == {*sums, "gpus", "gpu_days", "seconds_per_step"}
    assert [(c["gpus"], c["gpu_days"]) for c in columns.values()] == [
        (8, 6.0),
        (16, 43.6),
        (64, 119.2),
        (128, 356.8),
    ]
    seconds = [round(c["seconds_per_step"], 2) for c in columns.values()]
    assert seconds == [0.43, 1.47, 2.68, 4.82]


def components_of(name: str) -> set[str]:
    gan = DISTILL_PRESETS[name]["gan"].gan
    scales = {gan.multi_scale_input, gan.multi_scale_output}
    assert len(scales) == 1
    enabled = {"z": gan.z_conditioning, "r1": gan.active_penalty == "single", "multiscale": scales == {True}}
    return {part for part, is_on in {**enabled, "mix": gan.mix_fraction > 0}.items() if is_on}


@pytest.mark.parametrize(("prefix", "base"), [("", "sd15-cfg3"), ("miniature-", "miniature")])
def test_each_ablation_row_adds_one_component(prefix: str, base: str) -> None:
    rows = ["d", "z", "r1", "multiscale", "mix"]
    assert [components_of(f"{prefix}ablation-{row}") for row in rows] == [
        set(rows[1 : i + 1]) for i in range(5)
    ]
    assert DISTILL_PRESETS[f"{prefix}ablation-regression"] == {"ode": DISTILL_PRESETS[base]["ode"]}
    assert DISTILL_PRESETS[f"{prefix}ablation-mix"] == DISTILL_PRESETS[base]
    for row in rows:  # nothing else differs
        config = DISTILL_PRESETS[f"{prefix}ablation-{row}"]["gan"]
        assert replace(config, gan=DISTILL_PRESETS[base]["gan"].gan) == DISTILL_PRESETS[base]["gan"]


@pytest.mark.parametrize(("prefix", "base"), [("", "sd15-cfg3"), ("miniature-", "miniature")])
def test_loss_comparison_presets_differ_in_the_loss_only(prefix: str, base: str) -> None:
    kinds: dict[str, RegressionName] = {
        "mse": "mse",
        "pseudo-huber": "pseudo_huber",
        "lpips": "lpips",
        "latent-lpips": "latent_lpips",
        "e-latent-lpips": "e_latent_lpips",
        "decoder-features": "decoder_features",
    }
    first = DISTILL_PRESETS[f"{prefix}loss-mse"]["ode"]
    for name, kind in kinds.items():
        stages = DISTILL_PRESETS[f"{prefix}loss-{name}"]
        assert set(stages) == {"ode"} and stages["ode"].regression.names == (kind,)
        assert stages["ode"] == replace(first, regression=replace(first.regression, losses=((kind, 1.0),)))
    ode = DISTILL_PRESETS[base]["ode"]
    regression = replace(ode.regression, losses=(("mse", 1.0),))
    assert first == replace(ode, regression=regression, train=replace(ode.train, images=first.train.images))
    if not prefix:
        assert (first.train.images, first.train.batch_size) == (20_000 * 256, 256)


def test_every_preset_has_its_stage_and_round_trips_through_json() -> None:
    for name, stages in DISTILL_PRESETS.items():
        assert stages and set(stages) <= {"ode", "gan", "text", "cd"}
        for stage, config in stages.items():
            assert config.stage == stage and preset(name, stage) is config
            assert from_json(DistillConfig, to_json(config)) == config
    with pytest.raises(SettingError, match=r"unknown preset 'minature'; did you mean 'miniature'\?"):
        preset("minature", "ode")


@pytest.mark.parametrize(
    ("settings", "evaluations", "table"),
    [
        ({"penalty": "none"}, 4000, 5000),  # one D step and one G step share G's forward
        ({}, 4001, 5000),  # one row of R1 in the first of five steps
        ({"r1_rows": 8, "r1_interval": 2}, 4024, 5000),  # R1 in the first, third and fifth step
        ({"d_steps_per_g_step": 4}, 3201, 3500),  # G updates in the fourth step
        ({"loss": "rpgan"}, 5001, 5000),
        ({"penalty": "full", "r1_interval": 10}, 4200, 5000),
        ({"penalty": "full", "r1_interval": 2}, 4600, 5000),
        ({"penalty": "r1r2", "r1_interval": 10}, 4400, 5000),
        ({"penalty": "approx"}, 5000, 5000),
    ],
)
def test_plan_counts_evaluations(settings: dict[str, Any], evaluations: int, table: int) -> None:
    train = TrainConfig(images=1000, batch_size=200)
    config = DistillConfig(stage="gan", train=train, gan=DiscriminatorConfig(**settings))
    assert plan(config, world_size=5) == {
        "steps": 5,
        "evaluations": evaluations,
        "gpus": 5,
        "rows_per_gpu": 40,
    }
    assert table_evaluations(config) == table
    ode = DistillConfig(train=train)
    assert plan(ode)["evaluations"] == table_evaluations(ode) == 1000
    assert evaluations_of(replace(ode, train=replace(train, images=801))) == 1000, "the last step is complete"
    accumulated = plan(replace(config, engine=EngineConfig(gradient_accumulation=5, gpus=2)))
    assert accumulated["evaluations"] == evaluations + 200 * (5 // config.gan.d_steps_per_g_step)
    assert (accumulated["gpus"], accumulated["rows_per_gpu"]) == (2, 20)
    own_passes = plan(replace(config, engine=EngineConfig(own_generator_passes=True)))
    assert own_passes["evaluations"] == accumulated["evaluations"]
    with pytest.raises(SettingError, match="batch_size 200 does not divide over 64 processes"):
        plan(config, world_size=64)
    with pytest.raises(SettingError, match="a micro-batch has 25 rows per process"):
        plan(config, world_size=8)
    assert plan(DISTILL_PRESETS["trial"]["gan"], world_size=8)["rows_per_gpu"] == 2, "on a node of eight"
    assert plan(DISTILL_PRESETS["sd15-cfg8"]["ode"], "sd15-cfg8")["table_a1"] == column("sd15-cfg8")


def test_dependent_settings_can_be_overridden_together() -> None:
    config = override(
        DistillConfig(), ["student.lora_alpha=4", "student.lora_rank=8", "data.block=2", "data.window=3"]
    )
    assert (config.student.lora_rank, config.student.alpha, config.data.block) == (8, 4.0, 2)
    assert override(DistillConfig(), ["student.lora_rank=8"]).student.alpha == 8


def test_active_penalty() -> None:
    assert DiscriminatorConfig().penalty == "single" and DiscriminatorConfig().penalty_interval == 16
    assert (
        DiscriminatorConfig(r1_gamma=0).active_penalty
        == DiscriminatorConfig(penalty="none").active_penalty
        == "none"
    )
    approximate = DiscriminatorConfig(penalty="approx", r1_gamma=0)
    assert (approximate.active_penalty, approximate.penalty_interval) == ("approx", 1)


def group(name: str, /, **values: object) -> DistillConfig:
    """A config with values in one group, built so that errors contain the full path of a setting."""
    return with_values(DistillConfig(), {f"{name}.{key}": value for key, value in values.items()})


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: group("optim", lr=0), r"^optim\.lr is 0; expected a positive number$"),
        (lambda: group("optim", weight_decay=-1), r"^optim\.weight_decay is -1; expected 0 or more$"),
        (lambda: group("regression", draws=0), "draws"),
        (lambda: group("regression", losses=(("l1", -1.0),)), r"^regression\.losses is .*positive weights"),
        (lambda: DistillConfig(regression=RegressionConfig(losses=())), r"^regression\.losses is \(\)"),
        (lambda: group("gan", mix_fraction=1), "gan.mix_fraction is 1"),
        (lambda: group("gan", r1_interval=0), "r1_interval"),
        (lambda: group("optim", betas=(0.9, 1.0)), "optim.betas"),
        (lambda: group("optim", name="adm"), r"optim.name is 'adm'; did you mean 'adam'\?"),
        (lambda: group("optim", final_lr=1e-5), "set decay_images"),
        (
            lambda: group("optim", decay="step", decay_images=-1),
            r"^optim\.decay is 'step' but decay_images is -1",
        ),
        (lambda: group("gan.optim", lr=0), r"^gan\.optim\.lr is 0; expected a positive number$"),
        (lambda: group("optim", final_lr=1.0, decay_images=1), "optim.final_lr is 1.0; expected 0 to lr"),
        (lambda: group("regression", losses=(("mse", 1.0), ("mse", 2.0))), "each once"),
        (lambda: group("regression", huber_c=0), "huber_c"),
        (lambda: group("regression", losses=(("huber", 1.0),)), "did you mean 'pseudo_huber'"),
        (lambda: group("gan", loss="wgan"), "gan.loss is 'wgan'"),
        (lambda: group("gan", mix_x=0, mix_c=0, mix_z=0), "set one above 0"),
        (lambda: group("gan", mix_x=-1), "mix_x"),
        (lambda: group("gan", d_steps_per_g_step=0), "gan.d_steps_per_g_step is 0"),
        (lambda: group("gan", noise_max_timestep=0), "gan.noise_max_timestep"),
        (lambda: group("gan", approx_sigma=0), "gan.approx_sigma"),
        (
            lambda: group("gan", noise_augment="uniform", timestep=5),
            "the sampled noise level; set timestep=0",
        ),
        (lambda: group("gan", timestep_mode="random", timestep=5), "but timestep_mode=random samples"),
        (lambda: group("gan", real="photos"), "expected both, or neither"),
        (lambda: group("gan", real_fraction=0.5), "expected both, or neither"),
        (lambda: group("student", lora_rank=-1), "student.lora_rank is -1"),
        (lambda: group("student", lora_alpha=2), "lora_rank is 0; set lora_rank"),
        (lambda: group("student", dropout=1), "student.dropout"),
        (lambda: DistillConfig(train=TrainConfig(validate_images=10)), "expected both above 0"),
        (lambda: group("train", keep_best=True), "train.keep_best needs validation"),
        (lambda: group("train", loggers=("wandb", "mlflow")), "mlflow"),
        (lambda: group("train", precision="fp16"), "train.precision is 'fp16'"),
        (lambda: group("engine", gradient_accumulation=0), "engine.gradient_accumulation is 0"),
        (lambda: group("engine", shard_size=2), "set parallel=fsdp"),
        (lambda: group("engine", parallel="zero"), "engine.parallel is 'zero'"),
        (
            lambda: DistillConfig(engine=EngineConfig(gradient_accumulation=3)),
            r"over 1 process x 3 micro-batches \(engine.gradient_accumulation\); expected a multiple of 3$",
        ),
        (lambda: DistillConfig(stage="both"), "^stage is 'both'"),
        (
            lambda: DistillConfig(
                stage="gan", train=TrainConfig(batch_size=4), engine=EngineConfig(gradient_accumulation=4)
            ),
            r"^gan\.mix_fraction is 0\.25, but a micro-batch has 1 row per process",
        ),
        (lambda: preset("cifar10-real", "ode"), "preset 'cifar10-real' has no stage 'ode'; it has gan"),
        (lambda: group("train", batch_size=0), "train.batch_size is 0"),
        (lambda: group("train", ema_beta=1), r"^train\.ema_beta is 1; expected 0 up to below 1$"),
        (lambda: group("train", minutes=-1), r"^train\.minutes is -1; expected a positive number"),
        (lambda: group("train", minutes=float("inf")), r"^train\.minutes is inf; expected finite numbers$"),
        (lambda: group("optim", lr=float("nan")), r"^optim\.lr is nan; expected finite numbers$"),
        (lambda: group("optim", betas=(0.9, float("nan"))), r"^optim\.betas is \(0\.9, nan\); expected f"),
        (lambda: group("data", cache_gib=float("inf")), r"^data\.cache_gib is inf"),
        (lambda: group("student", lora_alpha=float("inf")), r"^student\.lora_alpha is inf"),
        (
            lambda: group("regression", augment="zzz"),
            r"^regression\.augment is 'zzz'; expected 'none' or letters",
        ),
        (lambda: group("regression", augment="bb"), r"^regression\.augment is 'bb'"),
        (lambda: group("regression", augment=""), r"^regression\.augment is ''"),
        (
            lambda: group("engine", compile="inductr"),
            r"^engine\.compile is 'inductr'; did you mean 'inductor'\?$",
        ),
        (lambda: group("engine", compile="zz"), r"^engine\.compile is 'zz'; known: cudagraphs, inductor"),
        (
            lambda: DistillConfig(stage="gan", train=TrainConfig(batch_size=1)),
            "a micro-batch has 1 row per process",
        ),
        (
            lambda: DistillConfig(
                stage="gan", train=TrainConfig(batch_size=6), gan=DiscriminatorConfig(r1_rows=4)
            ),
            r"^gan\.r1_rows is 4; expected a divisor of train\.batch_size, 6; set gan\.r1_rows or train",
        ),
        (lambda: group("gan", r1_rows=0), r"^gan\.r1_rows is 0; expected 1 or more$"),
    ],
)
def test_invalid_settings_are_refused(build: Callable[[], object], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        build()


def test_compile_backends_are_accepted() -> None:
    assert EngineConfig(compile="inductor").compile == "inductor"
    assert EngineConfig(compile="eager").compile == "eager"  # a debugging backend of torch.compile


# Settings that have no effect.

IMAGES_ALONE = ("regression.losses=[]", "gan.real_fraction=1", "gan.z_conditioning=false", "gan.mix_z=0")
UNUSED: list[tuple[str, tuple[str, ...], tuple[str, ...]]] = [
    # (setting, settings with which it has no effect, settings with which it has one)
    ("gan.weight=1", ("stage=ode",), ("stage=gan",)),
    ("gan.optim.lr=1", ("stage=ode",), ("stage=gan",)),
    ("engine.own_generator_passes=true", ("stage=ode",), ("stage=gan",)),
    ("gan.mix_fraction=0", ("stage=cd",), ("stage=gan",)),
    ('gan.real="x"', ("gan.real_fraction=1", "stage=ode"), ("gan.real_fraction=1", "stage=cd")),
    ("gan.real_column=x", ("stage=cd", "pairs=x"), ("stage=cd", "gan.real=y", "gan.real_fraction=1")),
    ("gan.real_column=x", (), ("gan.real=y", "gan.real_fraction=0.5")),
    ("gan.real_fraction=1", ("stage=cd", "pairs=x"), ("stage=cd",)),
    ("consistency.levels=4", (), ("stage=cd",)),
    ("clip_guidance.weight=1", ("stage=cd",), ()),
    ("data.rewire=true", ("stage=cd",), ()),
    ("gan.r1_interval=2", ("gan.penalty=approx",), ("gan.penalty=full",)),
    ("gan.r1_interval=2", ("gan.r1_gamma=0",), ()),
    ("gan.r1_rows=2", ("gan.penalty=full",), ("gan.penalty=single",)),
    ("gan.r1_reduction=sum", ("gan.penalty=none",), ("gan.penalty=r1r2",)),
    ("gan.r1_gamma=2", ("gan.penalty=approx",), ("gan.penalty=single",)),
    ("gan.approx_sigma=2", (), ("gan.penalty=approx",)),
    ("gan.approx_weight=2", ("gan.penalty=none",), ("gan.penalty=approx",)),
    *((f"gan.mix_{row}=2", ("gan.mix_fraction=0",), ()) for row in "xcz"),
    *(
        (f"gan.{name}", ("gan.discriminator=transformer",), ())
        for name in ("multi_scale_input=false", "multi_scale_output=false", "output_head=true")
    ),
    *(
        (f"gan.{name}", (), ("gan.discriminator=transformer",))
        for name in ("token_heads=2", "token_scales=[1,2]")
    ),
    *(
        (f"gan.{name}", (), ("gan.mix_z=0", "gan.discriminator=unet+projected"))
        for name in (
            'feature_networks=["x"]',
            "feature_size=64",
            "feature_augment=[]",
            "feature_heads=modulated",
            "virtual_batch=4",
            "projected_weight=2",
        )
    ),
    *(
        (f"gan.{name}=64", (), ("gan.mix_z=0", "gan.discriminator=gigagan"))
        for name in ("channel_base", "channel_max")
    ),
    ("gan.z_conditioning=false", ("gan.mix_z=0", "gan.discriminator=gigagan+projected"), ("gan.mix_z=0",)),
    (
        "gan.virtual_batch=4",
        ("gan.mix_z=0", "gan.discriminator=projected", "gan.feature_heads=modulated"),
        ("gan.mix_z=0", "gan.discriminator=projected"),
    ),
    *(
        (f"gan.{name}", ("gan.mix_z=0", "gan.discriminator=projected"), ())
        for name in ("freeze_backbone=true", "timestep=500", "timestep_mode=random")
    ),
    ("gan.z_conditioning=false", ("gan.mix_z=0", "gan.discriminator=projected"), ("gan.mix_z=0",)),
    ("gan.noise_augment=none", ("gan.mix_z=0", "gan.discriminator=projected"), ()),
    ("clip_guidance.model=x", (), ("clip_guidance.weight=0.2",)),
    ("clip_guidance.crop=8", (), ("clip_guidance.model=x", "clip_guidance.weight=0.2")),
    ("clip_guidance.form=contrastive", (), ("clip_guidance.weight=0.2",)),
    ("engine.frozen_weights=bf16", (), ("student.lora_rank=4",)),
    *(
        (f"student.generator.{name}=4", ("student.kind=diffusion",), ("student.kind=stylegan-t",))
        for name in ("channel_base", "channel_max", "residual_blocks", "z_dim", "w_dim", "mapping_layers")
    ),
    *(
        (f"student.generator.{name}=false", ("student.kind=gigagan",), ("student.kind=stylegan-t",))
        for name in ("residual", "second_order", "text_bypass")
    ),
    ("student.generator.resolution=4", ("student.kind=gigagan-upsampler",), ("student.kind=gigagan",)),
    ("student.generator.kernels=4", ("student.kind=stylegan-t",), ("student.kind=gigagan",)),
    ("student.generator.attention_sizes=[4]", ("student.kind=stylegan-t",), ("student.kind=gigagan",)),
    ("student.generator.text_layers=4", ("student.kind=stylegan-t",), ("student.kind=gigagan-upsampler",)),
    ("student.generator.factor=4", ("student.kind=gigagan",), ("student.kind=gigagan-upsampler",)),
    ("student_timestep=900", ("student.kind=gigagan",), ("student.kind=diffusion",)),
    ("student.own_text_encoder=true", ("stage=text",), ("stage=gan",)),
    ("gan.timestep_shift=2", (), ("gan.timestep_mode=random",)),
    ("gan.noise_max_timestep=2", (), ("gan.noise_augment=small",)),
    ("gan.optim.decay=step", ("optim.decay_images=9",), ("gan.optim.decay_images=9",)),
    ("optim.decay=step", ("gan.optim.decay_images=9",), ("optim.decay_images=9",)),
    ("train.ema_beta=0.5", ("train.ema_halflife_images=9",), ()),
    ("regression.augment=bg", ("regression.losses=mse",), ()),
    ("regression.draws=2", ("regression.losses=latent_lpips",), ()),
    ("regression.huber_c=2", (), ("regression.losses=pseudo_huber",)),
    ("regression.decoder_blocks=2", (), ("regression.losses=mse,decoder_features:0.1",)),
    ("regression.lpips_net=alex", (), ("regression.losses=lpips",)),
    ("regression.lpips_weights=x", ("regression.losses=mse",), ("regression.losses=lpips",)),
    ("regression.lpips_resize=9", (), ("regression.losses=lpips",)),
    ("lpips=x", ("regression.losses=mse",), ("regression.losses=mse,latent_lpips",)),
    ("data.block=2", (*IMAGES_ALONE, "data.window=2"), ("data.window=2",)),
    ("data.window=2", (*IMAGES_ALONE, "data.block=2"), ("data.block=2",)),
    *(
        (f"data.{name}", IMAGES_ALONE, (*IMAGES_ALONE, "pairs=x"))
        for name in ("skip_bad=true", "max_pairs=8", "rewire=true")
    ),
    *(
        (f"data.{name}", settings, ("pairs=x,s3://bucket/y",))
        for name in ("cache=x", "cache_gib=2")
        for settings in (IMAGES_ALONE, ("pairs=x",))
    ),
]


@pytest.mark.parametrize(("setting", "no_effect_with", "effect_with"), UNUSED)
def test_settings_without_effect_are_refused(
    setting: str, no_effect_with: tuple[str, ...], effect_with: tuple[str, ...]
) -> None:
    name, start = setting.partition("=")[0], DistillConfig(stage="gan")
    with pytest.raises(
        SettingError, match=rf"^{name} is set, but has an effect only (in|with) .*; leave it out$"
    ):
        refuse_unused(override(start, [*no_effect_with, setting]), ["seed", name])
    refuse_unused(override(start, [*effect_with, setting]), [name])


def test_every_condition_is_tested_and_presets_may_set_unused_settings() -> None:
    tested = {setting.partition("=")[0] for setting, _, _ in UNUSED}
    groups = {"gan.optim.", "consistency.", *(f"gan.{name}" for name in GAN_ONLY)}
    assert {name for names, _ in CONDITIONS for name in names} <= tested | groups
    refuse_unused(DISTILL_PRESETS["cifar10"]["ode"], [])
