"""distill.planning.memory: closed forms, and bytes saved for backward against a pass on data."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import tiny_teachers
from d2g.core.distributed import engine as parallel
from d2g.core.distributed.low_memory_adamw import moment_bytes
from d2g.core.seeds import generator
from d2g.diffusion import pretrained
from d2g.diffusion.conditioning import Conditioning
from distill.config.discriminator import DiscriminatorConfig
from distill.config.optim import OptimConfig
from distill.config.presets import DISTILL_PRESETS
from distill.config.regression import RegressionConfig
from distill.config.run import DataConfig, DistillConfig, EngineConfig, TrainConfig
from distill.config.student import StudentConfig
from distill.losses.gradient_penalty import r1_penalty
from distill.models.student import set_trainable, student_from_teacher
from distill.models.unet_discriminator import added_parameters, discriminator_from_teacher
from distill.planning.memory import Memory, forecast, predict
from distill.planning.saved_activations import peak_bytes, saved_bytes
from latent_lpips.distance import LatentLPIPS
from latent_lpips.fused import distance_with_gradient
from latent_lpips.weights import read_lpips_config


def config(teacher: Path, **settings: Any) -> DistillConfig:
    base = DistillConfig(
        teacher=str(teacher),
        train=TrainConfig(batch_size=8, precision="fp32"),
        regression=RegressionConfig(losses=(("mse", 1.0),)),
    )
    return replace(base, **settings)


def count_parameters(teacher: Path) -> int:
    return sum(p.numel() for p in pretrained.load_on_meta(str(teacher), "unet").parameters())


def gib(values: float) -> float:
    return 4 * values / 2**30


def test_weights_states_and_averages_in_closed_form(teacher: Path) -> None:
    g = count_parameters(teacher)
    memory = predict(config(teacher), 1)
    assert isinstance(memory, Memory) and memory.weights == pytest.approx(gib(g))
    assert memory.optimizer == pytest.approx(gib(2 * g)) and memory.average == pytest.approx(gib(g))
    assert memory.total == pytest.approx(
        memory.weights + memory.optimizer + memory.average + memory.frozen + memory.working
    )
    encoder = pretrained.load_conditioner(str(teacher))
    assert memory.frozen == pytest.approx(gib(sum(p.numel() for p in encoder.parameters())))
    vae = sum(p.numel() for p in pretrained.load_vae(str(teacher)).parameters())
    with_preview = predict(
        config(teacher, train=TrainConfig(batch_size=8, precision="fp32", preview_prompts=1)), 1
    )
    assert with_preview.frozen == pytest.approx(memory.frozen + gib(vae))


def test_stage_two_has_two_networks(teacher: Path) -> None:
    g = count_parameters(teacher)
    gan = predict(config(teacher, stage="gan"), 1)
    d = discriminator_from_teacher(str(teacher), DiscriminatorConfig(), generator(0))
    trained = sum(p.numel() for p in d.parameters() if p.requires_grad)
    assert gan.weights == pytest.approx(gib(2 * g + added_parameters(d)))
    assert gan.optimizer == pytest.approx(gib(2 * (g + trained)))
    assert gan.average == pytest.approx(gib(g))
    assert gan.working > predict(config(teacher), 1).working


@pytest.mark.slow
def test_shards_divide_weights_and_states(teacher: Path) -> None:
    replicated = predict(config(teacher, stage="gan"), 4)
    for engine, parts in (
        (EngineConfig(parallel="fsdp"), 4),
        (EngineConfig(parallel="fsdp", shard_size=2), 2),
    ):
        memory = predict(config(teacher, stage="gan", engine=engine), 4)
        for name in ("weights", "optimizer", "average"):
            assert getattr(memory, name) == pytest.approx(getattr(replicated, name) / parts)
        assert memory.frozen == replicated.frozen


def test_frozen_weights_need_no_optimizer_states(teacher: Path) -> None:
    adapted = StudentConfig(lora_rank=2)
    student = student_from_teacher(str(teacher), -1, adapted)
    adapters = sum(p.numel() for n, p in student.named_parameters() if ".lora_" in n)
    memory = predict(config(teacher, student=adapted), 1)
    assert memory.optimizer == pytest.approx(gib(2 * adapters))
    assert memory.average == pytest.approx(gib(adapters))  # frozen weights are their own average
    assert memory.weights == pytest.approx(gib(count_parameters(teacher) + adapters))


def test_frozen_weights_moments_in_8_bits_and_in_cpu_memory(teacher: Path) -> None:
    bf16, stored = TrainConfig(batch_size=8), EngineConfig(frozen_weights="bf16")
    adapted = StudentConfig(lora_rank=2)
    student = student_from_teacher(str(teacher), -1, adapted)
    set_trainable(student, adapted)
    halved = sum(
        p.numel()
        for layer in student.modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
        for p in layer.parameters(recurse=False)
        if not p.requires_grad
    )
    plain, small = (
        predict(config(teacher, student=adapted, train=bf16, **more), 1) for more in ({}, {"engine": stored})
    )
    assert halved and plain.weights - small.weights == pytest.approx(gib(halved) / 2)
    # The moments of a full student: of 2 or more dimensions and 4,096 values in 8 bits, and none on the GPU.
    parameters = pretrained.load_on_meta(str(teacher), "unet").parameters()
    expected = sum(moment_bytes(p, True) for p in parameters) / 2**30
    of_8_bits = config(teacher, optim=OptimConfig(name="adamw_8bit"))
    assert predict(of_8_bits, 1).optimizer == pytest.approx(expected)
    assert predict(replace(of_8_bits, engine=EngineConfig(offload_optimizer=True)), 1).optimizer == 0


def large(**train: Any) -> TrainConfig:
    return TrainConfig(**{"batch_size": 4096, "precision": "fp32", **train})


@pytest.mark.slow
def test_working_memory_by_rows_micro_batches_and_checkpointing(teacher: Path) -> None:
    def working(**settings: Any) -> float:
        return predict(config(teacher, **settings), 1).working

    one, two = working(train=large()), working(train=large(batch_size=8192))
    assert two == pytest.approx(2 * one, rel=0.01)
    # Each of two processes has half of the rows, and DDP's buckets for all gradients.
    half = predict(config(teacher, train=large(batch_size=8192)), 2).working
    assert half == pytest.approx(one + gib(count_parameters(teacher)))
    split = EngineConfig(gradient_accumulation=4)
    assert working(train=large(), engine=split) == pytest.approx(one / 4, rel=0.01)
    checkpointed = EngineConfig(activation_checkpointing=True)
    assert 0 < working(train=large(), engine=checkpointed) < 0.6 * one
    assert working(train=large(precision="bf16")) < one
    gan = working(stage="gan", train=large())
    assert 2.5 * one < gan < 3.5 * one  # the graphs of the student and of D on real and fake
    assert working(stage="gan", train=large(), gan=DiscriminatorConfig(penalty="full")) > gan
    # With a pass of its own, the student's graph is not held while D is updated.
    own_passes = working(stage="gan", train=large(), engine=EngineConfig(own_generator_passes=True))
    assert own_passes == pytest.approx(gan - one, rel=0.01)


def test_fake_tensors_save_the_same_bytes_as_real_ones(teacher: Path) -> None:
    student = student_from_teacher(str(teacher)).requires_grad_(True)
    batch = 16
    noise, text = torch.randn(batch, 4, 4, 4), Conditioning.from_text(torch.randn(batch, 77, 16))
    real = saved_bytes(student, lambda: student(noise, text), False) / 2**30
    train = TrainConfig(batch_size=batch, precision="fp32")
    small = predict(config(teacher, train=train), 1).working
    # Gradients and the optimizer's temporaries dominate at this small batch size.
    train = TrainConfig(batch_size=batch * 64, precision="fp32")
    many = predict(config(teacher, train=train), 1).working
    assert many == pytest.approx(64 * real, rel=0.02) and small >= 0.99 * real


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_sweep_of_latent_lpips_counts_with_its_weights(teacher: Path, precision: Any) -> None:
    """A GPU computes up to 2^16 positions at a time; here a latent has 16."""
    losses = RegressionConfig(losses=(("e_latent_lpips", 1.0),))

    def added(rows: int) -> tuple[float, float]:
        train = TrainConfig(batch_size=rows, precision=precision)
        with_metric, without = (
            predict(config(teacher, train=train, **more), 1) for more in ({"regression": losses}, {})
        )
        return with_metric.frozen - without.frozen, with_metric.working - without.working

    metric = LatentLPIPS(read_lpips_config(teacher / "latent_lpips")).fold(precision)
    weights = sum(p.numel() * p.element_size() for p in metric.parameters())
    small, large = added(2**16), added(2**17)
    assert small[0] == large[0] == pytest.approx(weights / 2**30)
    assert small[1] == pytest.approx(large[1]) and large[1] > 0

    # The same on data, at the size of a chunk on the CPU.
    rows = 32
    pred, target = torch.randn(rows, 4, 4, 4), torch.randn(rows, 4, 4, 4)
    with torch.no_grad():
        peak = peak_bytes(
            lambda: distance_with_gradient(metric.trunk.layers(), list(metric.heads), pred, target)
        )
    assert large[1] == pytest.approx(2**16 / 16 / rows * peak / 2**30, rel=0.1)


def test_peak_bytes_counts_what_is_alive_at_once() -> None:
    def run() -> None:
        a = torch.empty(100)  # 400 bytes
        b = a + 1
        view = b[50:]
        del a, b
        c = view * torch.empty(1)  # the view keeps its storage
        del view
        c.mul_(2)

    assert peak_bytes(run) == 800


@pytest.mark.slow
def test_gathered_weights_stay_during_r1_under_fsdp(teacher: Path) -> None:
    """With one row, R1 is the peak, and its gathered weights take half as much in bf16."""
    d = discriminator_from_teacher(str(teacher), DiscriminatorConfig(), generator(0))
    weights = gib(sum(p.numel() for p in d.parameters()))
    trained = gib(sum(p.numel() for p in d.parameters() if p.requires_grad))

    def working(parallel: Any, precision: Any, penalty: Any) -> float:
        train = TrainConfig(batch_size=2, precision=precision)
        gan = DiscriminatorConfig(penalty=penalty, r1_rows=1)
        engine = EngineConfig(parallel=parallel)
        return predict(config(teacher, stage="gan", train=train, gan=gan, engine=engine), 1).working

    assert working("fsdp", "fp32", "single") >= trained + weights
    assert working("fsdp", "bf16", "single") >= trained + weights / 2
    assert working("fsdp", "fp32", "single") > working("fsdp", "bf16", "single") + 0.4 * weights


@pytest.mark.slow
def test_a_pass_of_r1_takes_what_it_takes_on_data(teacher: Path) -> None:
    """Per row: the graph that is differentiated again, and the peak of its backward pass beside gradients."""

    gan, rows = DiscriminatorConfig(penalty="full"), 8192
    settings = config(teacher, stage="gan", train=large(batch_size=rows), gan=gan)
    student = student_from_teacher(str(teacher)).requires_grad_(True)
    d = discriminator_from_teacher(str(teacher), DiscriminatorConfig(), generator(0)).requires_grad_(True)

    def on_data(rows: int) -> float:
        noise, text = torch.randn(rows, 4, 4, 4), Conditioning.from_text(torch.randn(rows, 77, 16))
        for p in d.parameters():
            p.grad = torch.zeros_like(p)
        existing = [*d.parameters(), *(p.grad for p in d.parameters() if p.grad is not None)]

        def penalize() -> None:
            with sdpa_kernel(SDPBackend.MATH):
                r1_penalty(d, noise, noise, text).backward()

        return saved_bytes(student, lambda: student(noise, text), False) + peak_bytes(penalize, existing)

    per_row = (on_data(32) - on_data(16)) / 16 / 2**30
    assert predict(settings, 1).working == pytest.approx(rows * per_row, rel=0.02)


def test_text_encoders_take_half_in_bf16(teacher: Path) -> None:
    encoder = gib(sum(p.numel() for p in pretrained.load_conditioner(str(teacher)).parameters()))
    for choice, share in (("auto", 0.5), ("bf16", 0.5), ("fp32", 1.0)):
        text = DataConfig(text_precision=choice)  # type: ignore[arg-type]
        memory = predict(config(teacher, train=TrainConfig(batch_size=8), data=text), 1)
        assert memory.frozen == pytest.approx(share * encoder)


def test_sdxl_memory(tmp_path: Path) -> None:
    tiny_teachers.save_sdxl(tmp_path)
    memory = predict(config(tmp_path, stage="gan"), 1)
    encoders = pretrained.load_conditioner(str(tmp_path))
    assert memory.working > 0
    assert memory.frozen == pytest.approx(gib(sum(p.numel() for p in encoders.parameters())))


def test_checkpointed_layers_count_their_inputs_and_the_largest_layer() -> None:
    """Two blocks of width 8 and 16: saved are the inputs of both and the activations of the wider one."""
    narrow, wide = (nn.Sequential(nn.Linear(4, w), nn.Tanh(), nn.Linear(w, 4)) for w in (8, 16))
    both, x = nn.Sequential(narrow, wide), torch.randn(2, 4)
    assert saved_bytes(both, lambda: both(x), False) == 4 * (2 * 4 + 2 * 8 + 2 * 4 + 2 * 16)
    parallel.recompute([narrow, wide])
    assert saved_bytes(both, lambda: both(x), False) == 4 * (2 * 4 + 2 * 4 + 2 * 16)


def test_a_missing_teacher_is_replaced_by_the_presets_model() -> None:
    """SD 1.5 has 859.5M fp32 parameters. Without a known network for a preset there is no forecast."""
    preset = DISTILL_PRESETS["ablation-z"]["ode"]
    memory = forecast(
        replace(preset, teacher="stable-diffusion-v1-5/stable-diffusion-v1-5"),
        16,
        DISTILL_PRESETS["ablation-z"].model,
    )
    assert memory is not None and memory["weights"] == pytest.approx(gib(859_520_964), abs=1e-3)
    assert memory["assumed"] == "SD 1.5's networks; the teacher is not on this disk"
    assert forecast(preset, 16, "") is None
    miniature = forecast(DISTILL_PRESETS["miniature"]["ode"], 1, "sd15")
    assert miniature is not None and "assumed" not in miniature
