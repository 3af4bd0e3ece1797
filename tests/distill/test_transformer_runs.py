"""Students of transformers through real runs of both stages: pairs, training, resume, sampling, memory."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
import tiny_teachers
from d2g.core.config import override
from d2g.core.distributed import checkpoint
from d2g.core.errors import SettingError, UserError
from d2g.core.seeds import noise
from d2g.core.tracking.run_directory import read_stats
from d2g.diffusion.teacher import describe_stages, load_teacher
from distill.config.export import ExportConfig
from distill.config.run import DistillConfig, EngineConfig
from distill.export.export import export
from distill.models.student import check_teacher, student_from_teacher
from distill.planning.memory import predict
from distill.planning.saved_activations import saved_bytes
from distill.sampling import load_student
from distill.training.state import new_state
from distill.training.train import train
from jobs import distill_config
from pairgen.generate import generate_pairs
from runs import equal, state_at

GAN = (
    "gan.discriminator=transformer",
    "gan.token_heads=2",
    "gan.token_scales=[1,2]",
    "gan.r1_interval=2",
    "gan.mix_fraction=0.5",
)


@pytest.fixture(scope="module", params=tiny_teachers.TRANSFORMERS)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


LONG_RUNS = pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=() if name == "dit" else pytest.mark.slow)
        for name in tiny_teachers.TRANSFORMERS
    ],
    indirect=True,
    scope="module",
)
"""Runs of all families; the fast suite has those of classes and of text."""


@pytest.fixture(scope="module")
def teacher(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(tiny_teachers.save_transformer(family, tmp_path_factory.mktemp(family) / "teacher"))


def prompts_of(family: str) -> list[str]:
    return ["0", "3", "5"] if family == "dit" else tiny.CAPTIONS[:3]


@pytest.fixture(scope="module")
def pairs(family: str, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    (folder / "prompts.txt").write_text("\n".join(prompts_of(family)) + "\n")
    solver = load_teacher(str(teacher)).default_solver
    settings = tiny.pair_config(str(teacher), str(folder / "prompts.txt"), solver=solver)
    generate_pairs(settings, folder / "pairs")
    return folder / "pairs"


@pytest.fixture(scope="module")
def ode(teacher: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ode")
    held = ("train.validate_pairs=4", "train.validate_images=4", "train.preview_prompts=1")
    train(distill_config(teacher, pairs, "train.images=4", *held), out)
    return out


def test_the_student_starts_as_the_teachers_prediction(family: str, teacher: Path) -> None:
    """One step of the teacher's own sampler from pure noise to clean data, as judge."""
    flow = family in tiny_teachers.FLOWS
    loaded = load_teacher(str(teacher), spacing="linspace" if flow else "trailing")
    student = student_from_teacher(str(teacher))
    z, prompts = noise(0, range(3), student.latent_shape), prompts_of(family)
    guidance = 3.5 if student.guided else 1.0
    scales = (torch.full((3,), guidance),) if student.guided else ()
    expected = loaded.sample(z, prompts, 1, guidance, loaded.default_solver)
    torch.testing.assert_close(student(z, loaded.encode(prompts), *scales), expected, rtol=1e-4, atol=1e-4)
    assert student.timestep == (1000 if flow else 999)
    assert all(name.startswith("transformer.") for name in student.state_dict())


@LONG_RUNS
def test_both_stages_resume_bit_for_bit(teacher: Path, pairs: Path, ode: Path, tmp_path: Path) -> None:
    for run, lengths in (("once", (12,)), ("twice", (4, 12))):
        for images in lengths:
            settings = (*GAN, f"train.images={images}", "gan.optim.lr=1e-3")
            train(distill_config(teacher, pairs, *settings, stage="gan", init=ode), tmp_path / run)
    once, twice = (state_at(tmp_path / run, 12) for run in ("once", "twice"))
    assert equal(once, twice)
    lines = [
        [
            {k: v for k, v in line.items() if k.startswith(("loss/", "grad/", "logit/"))}
            for line in read_stats(run)
        ]
        for run in (tmp_path / "once", tmp_path / "twice")
    ]
    assert lines[0] == lines[1] and "loss/r1" in lines[0][0]
    heads = {name.rpartition("/")[2] for name in read_stats(tmp_path / "once")[0] if "logit/real/" in name}
    assert heads == {f"block{depth}{pool}" for depth in (1, 2) for pool in ("", "_pool2")}
    # Every trained weight of both networks has moved.
    config = distill_config(teacher, pairs, *GAN, stage="gan", init=ode)
    start = new_state(config, torch.device("cpu"))
    for name, network in (("student", start.student), ("discriminator", start.discriminator)):
        assert network is not None
        moved = [n for n, p in network.module.named_parameters() if not torch.equal(once[f"{name}.{n}"], p)]
        assert len(moved) > 0.8 * len(network.parameters())


def test_a_run_draws_and_its_export_draws_the_same(family: str, ode: Path, tmp_path: Path) -> None:
    student = load_student(str(ode))
    images = student(prompts_of(family))
    side = 4 * student.student.downscale
    assert images.shape == (3, 3, side, side) and images.dtype == torch.uint8
    facts = export(ExportConfig(student=str(ode), dtype="fp32"), tmp_path / "out")
    assert facts["parity_max_abs_err"] == 0.0
    with pytest.raises(UserError, match="export it with --format safetensors"):
        export(ExportConfig(student=str(ode), format="onnx"), tmp_path / "onnx")


@pytest.fixture(scope="module")
def plain_gan(
    teacher: Path, pairs: Path, ode: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[DistillConfig, dict[str, Tensor]]:
    """Two steps of the second stage, with the engine's defaults: config and state at the end."""
    out = tmp_path_factory.mktemp("plain")
    config = distill_config(teacher, pairs, *GAN, "train.images=8", stage="gan", init=ode)
    train(config, out)
    return config, state_at(out, 8)


@LONG_RUNS
@pytest.mark.parametrize(
    "engine",
    [
        {"activation_checkpointing": True},
        pytest.param({"compile": "eager"}, marks=(pytest.mark.slow, pytest.mark.long)),
    ],
)
def test_recomputation_and_compilation_learn_the_same(
    engine: dict[str, Any],
    plain_gan: tuple[DistillConfig, dict[str, Tensor]],
    tmp_path: Path,
    fresh_dynamo: None,
) -> None:
    config, plain = plain_gan
    train(replace(config, engine=EngineConfig(**engine)), tmp_path / "run")
    other = state_at(tmp_path / "run", 8)
    for name, value in plain.items():
        torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-5)


def test_adapters_are_trained_alone_and_merge(teacher: Path, pairs: Path, tmp_path: Path) -> None:
    config = distill_config(teacher, pairs, "student.lora_rank=2", "train.images=8", "optim.lr=1e-2")
    train(config, tmp_path / "run")
    state = new_state(config, torch.device("cpu"))
    trained = {n for n, p in state.student.module.named_parameters() if p.requires_grad}
    assert trained and all(".lora_" in name for name in trained)
    ends = {name.partition(".lora_")[0] for name in trained}
    assert all(name.endswith(state.student.module.family.lora_targets) for name in ends)
    merged = load_student(str(tmp_path / "run"))
    z = noise(0, range(2), merged.student.latent_shape)
    run, scales = state.student.module, (torch.full((2,), 3.0),) if merged.student.guided else ()
    state.ema.load(checkpoint.latest(tmp_path / "run" / "checkpoints").tensors("ema"))  # type: ignore[union-attr]
    state.ema.copy_to(run)
    cond = merged.conditioner.encode(merged.examples)
    with torch.no_grad():
        expected = run(z, cond, *scales)
        torch.testing.assert_close(merged.student(z, cond, *scales), expected, rtol=1e-4, atol=1e-4)


def test_memory_is_predicted_as_the_networks_save_it(teacher: Path) -> None:
    gan = replace(distill_config(teacher, Path("pairs"), *GAN, stage="gan"), pairs="pairs")
    memory = predict(gan, 1)
    student = student_from_teacher(str(teacher)).requires_grad_(True)
    parameters = sum(p.numel() for p in student.parameters())
    assert memory.average == pytest.approx(4 * parameters / 2**30)
    assert memory.weights > 2 * memory.average and memory.working > 0
    # The student's own activations, with data, against the prediction for many rows.
    ode = replace(DistillConfig(teacher=str(teacher)), train=replace(gan.train, batch_size=4096))
    ode = override(ode, ["regression.losses=mse"])  # a loss that saves nothing of its own

    def saved(rows: int) -> float:
        z = noise(0, range(rows), student.latent_shape)
        cond = student.family.fake_conditioning(_pipeline(teacher), student.network.config, rows)
        return saved_bytes(student, lambda: student(z, cond), False)

    real = (saved(6) - saved(3)) / 3
    # The prediction extrapolates from one and two rows; a single row of SD3 saves 3 % more than its share.
    assert predict(ode, 1).working == pytest.approx(4096 * real / 2**30, rel=0.04)
    recompute = replace(ode, engine=EngineConfig(activation_checkpointing=True))
    # Of two blocks one is recomputed at a time, and the inputs of both, long texts among them, are saved.
    assert predict(recompute, 1).working < 0.9 * predict(ode, 1).working


def _pipeline(teacher: Path) -> Any:
    from d2g.diffusion.pipelines import open_pipeline

    return open_pipeline(str(teacher))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("student.dropout=0.1",), "student.dropout is 0.1, but the network .* has no residual blocks"),
        (
            ("student.guidance_conditioning=true",),
            "no input for a guidance scale; .*false|of its pairs already",
        ),
    ],
)
def test_what_a_transformer_lacks_is_refused(settings: tuple[str, ...], message: str, teacher: Path) -> None:
    config = distill_config(teacher, Path("pairs"), *settings)
    with pytest.raises(SettingError, match=message):
        check_teacher(config.teacher, config.stage, config.student)


def test_the_unet_discriminator_is_refused_before_anything_is_loaded(
    teacher: Path, pairs: Path, ode: Path, tmp_path: Path
) -> None:
    config = distill_config(teacher, pairs, stage="gan", init=ode)
    with pytest.raises(SettingError, match=r"set gan\.discriminator=transformer"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert "GAN" in describe_stages(str(teacher)) and "not supported" not in describe_stages(str(teacher))


def test_plain_diffusers_draws_the_student_in_one_step(family: str, ode: Path, tmp_path: Path) -> None:
    """Parity of latents and pixels with the training code's student, from the folder that was written."""
    facts = export(ExportConfig(student=str(ode), format="diffusers"), tmp_path / "out")
    assert 0 <= facts["parity_max_abs_err"] < 1e-4
    card = (tmp_path / "out" / "README.md").read_text()
    scale = 3.0 if family == "flux" else 1
    assert f"num_inference_steps=1, guidance_scale={scale}" in card and "Keep these settings" in card


@pytest.mark.parametrize(
    "save", [tiny_teachers.save_flux, tiny_teachers.save_sana, partial(tiny_teachers.save_sd3, with_t5=False)]
)
def test_plain_diffusers_draws_with_the_adapters(save: Any, tmp_path: Path) -> None:
    """Adapters on the teacher's own pipeline, and the same student as a pipeline; SD3 has no T5 here."""
    teacher = Path(save(tmp_path / "teacher"))
    tiny.save_lpips(teacher / "latent_lpips", 8)
    prompts = tiny.save_prompts(tmp_path / "prompts.txt")
    generate_pairs(tiny.pair_config(str(teacher), prompts, solver="euler"), tmp_path / "pairs")
    settings = ("train.images=4", "optim.lr=1e-2", "student.lora_rank=2")
    train(distill_config(teacher, tmp_path / "pairs", *settings), tmp_path / "run")
    for form in ("diffusers", "lora"):
        facts = export(ExportConfig(student=str(tmp_path / "run"), format=form), tmp_path / form)  # type: ignore[arg-type]
        assert 0 <= facts["parity_max_abs_err"] < 1e-4
    scale = 3.0 if "Flux" in (teacher / "model_index.json").read_text() else 1
    assert f"guidance_scale={scale}" in (tmp_path / "lora" / "README.md").read_text()


def test_adapters_go_only_where_diffusers_loads_them(family: str, ode: Path, tmp_path: Path) -> None:
    if family in tiny_teachers.FLOWS:
        return
    with pytest.raises(UserError, match="into which diffusers loads no adapters"):
        export(ExportConfig(student=str(ode), format="lora"), tmp_path / "out")
