"""Stage text: what is trained, resume, ranks, sampling and exports of a student with its own text encoder."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tiny
import tiny_teachers
import vision_models
from d2g.core.config import override
from d2g.core.errors import SettingError, UserError
from d2g.core.seeds import noise
from d2g.diffusion.pretrained import load_conditioner
from distill.config.export import ExportConfig
from distill.config.run import DistillConfig
from distill.config.student import StudentConfig
from distill.export.export import export
from distill.models.text_student import TextStudent
from distill.planning.flops import flop_per_image
from distill.planning.memory import predict
from distill.planning.unused_settings import refuse_unused
from distill.sampling import load_student
from distill.training.state import new_state
from distill.training.train import train
from jobs import d2g, d2g_ranks, distill_arguments, distill_config, make_pairs, succeed
from runs import assert_resumes_exactly, losses, state_at

GUIDED = ("clip_guidance.weight=50", "clip_guidance.crop=8", "regression.losses=[]", "gan.mix_fraction=0.5")


@pytest.fixture(scope="module")
def first(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> DistillConfig:
    """A run of stage text after a short GAN stage, beside a folder `gan`."""
    folder = tmp_path_factory.mktemp("text")
    clip = vision_models.save_clip_model(folder / "clip")
    pairs = make_pairs(teacher, folder)
    gan = distill_config(
        teacher, pairs, "train.images=4", "regression.losses=mse", stage="gan", init="teacher"
    )
    train(gan, folder / "gan")
    settings = (*GUIDED, f"clip_guidance.model={clip}", "gan.r1_interval=2", "optim.lr=1e-2")
    config = distill_config(teacher, pairs, *settings, stage="text", init=folder / "gan")
    return replace(config, train=replace(config.train, images=8))


@pytest.fixture(scope="module")
def trained(first: DistillConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of `first`."""
    out = tmp_path_factory.mktemp("trained") / "text"
    train(first, out)
    return out


def test_only_the_text_encoder_changes(first: DistillConfig, trained: Path) -> None:
    """The generator's conditioning changes; D goes on from the GAN stage with the teacher's text encoder."""
    before, after = load_student(first.init), load_student(str(trained))
    assert after.own_text and not before.own_text
    network = after.student.state_dict()
    assert all(torch.equal(value, network[name]) for name, value in before.student.state_dict().items())
    teachers = load_conditioner(first.teacher).state_dict()
    changed = {
        name for name, value in after.conditioner.state_dict().items() if (value != teachers[name]).any()
    }
    assert any("layers.0.mlp" in name for name in changed)
    assert any("token_embedding" in name for name in changed)
    start = new_state(first, torch.device("cpu"))
    assert start.discriminator is not None
    stored = state_at(Path(first.init), 4)
    weights = start.discriminator.module.state_dict()
    assert all(torch.equal(value, stored[f"discriminator.{name}"]) for name, value in weights.items())
    fresh = new_state(replace(first, init="teacher"), torch.device("cpu"))
    assert fresh.discriminator is not None
    assert any(
        (value != weights[name]).any() for name, value in fresh.discriminator.module.state_dict().items()
    )
    report = losses(trained)[-1]
    expected = 0.25 * report["loss/g_gan"] + 50 * report["loss/clip"]
    assert report["loss/g"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_an_adaptive_weight_follows_the_guidance(first: DistillConfig, tmp_path: Path) -> None:
    """The only other loss of this stage."""
    train(override(first, ["gan.adaptive_weight=true"]), tmp_path / "text")
    for report in losses(tmp_path / "text"):
        expected = report["gan/weight"] * report["loss/g_gan"] + 50 * report["loss/clip"]
        assert report["gan/weight"] > 0 and report["loss/g"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_text_runs_resume_bit_for_bit(first: DistillConfig, tmp_path: Path) -> None:
    assert_resumes_exactly(first, replace(first, train=replace(first.train, images=4)), tmp_path)


@pytest.mark.long
@pytest.mark.slow
def test_two_ranks_train_as_one(first: DistillConfig, tmp_path: Path) -> None:
    """Under DDP and FSDP2: equal losses, gradient norms and updates, up to rounding."""
    clip = (f"clip_guidance.model={first.clip_guidance.model}", "clip_guidance.crop=8")
    runs = {}
    for name, ranks, parallel in (("one", 1, "ddp"), ("ddp", 2, "ddp"), ("fsdp", 2, "fsdp")):
        settings = (*clip, "gan.r1_interval=2", "optim.name=adam", f"engine.parallel={parallel}")
        command = distill_arguments(first, tmp_path / name, *settings)
        succeed(*d2g_ranks(command, tmp_path / f"{name}-ranks", ranks))
        runs[name] = losses(tmp_path / name)
    for name in ("ddp", "fsdp"):
        for expected, report in zip(runs["one"], runs[name], strict=True):
            assert report == pytest.approx(expected, rel=2e-3, abs=2e-4), name


def test_exports_hold_the_text_encoder(trained: Path, tmp_path: Path) -> None:
    """Each format draws what the run's student draws; the check is the export's own parity."""
    run = load_student(str(trained))
    z, prompts = noise(0, range(2), run.student.latent_shape), tiny.CAPTIONS[:2]
    expected = run.latents(z, prompts)
    export(ExportConfig(student=str(trained), dtype="fp32"), tmp_path / "small")
    small = load_student(str(tmp_path / "small"))
    assert small.own_text and torch.equal(small.latents(z, prompts), expected)
    export(ExportConfig(student=str(trained), format="diffusers"), tmp_path / "pipeline")
    saved = load_conditioner(str(tmp_path / "pipeline"))
    own = run.conditioner.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in saved.state_dict().items())
    with pytest.raises(UserError, match="has no adapters"):
        export(ExportConfig(student=str(trained), format="lora"), tmp_path / "lora")


def test_the_next_primary_phase_keeps_the_text_encoder(
    first: DistillConfig, trained: Path, tmp_path: Path
) -> None:
    """StyleGAN-T goes on with the primary phase afterwards."""
    config = replace(first, stage="gan", init=str(trained), train=replace(first.train, images=4))
    with pytest.raises(UserError, match=r"text encoders of its own, .* set student.own_text_encoder=true"):
        train(config, tmp_path / "refused")
    config = replace(config, student=StudentConfig(own_text_encoder=True))
    train(config, tmp_path / "gan")
    before, after = load_student(str(trained)), load_student(str(tmp_path / "gan"))
    kept = after.conditioner.state_dict()
    assert all(torch.equal(value, kept[name]) for name, value in before.conditioner.state_dict().items())
    network = after.student.state_dict()
    assert any((value != network[name]).any() for name, value in before.student.state_dict().items())


@pytest.mark.long
@pytest.mark.slow
def test_plans_count_the_text_encoder(first: DistillConfig) -> None:
    gan = replace(first, stage="gan")
    text, network = predict(first, 1), predict(gan, 1)
    assert text.weights > network.weights and text.optimizer != network.optimizer
    assert flop_per_image(first) != flop_per_image(gan)


def test_sdxl_trains_what_reaches_the_conditioning(tmp_path: Path) -> None:
    """The last layer of the first encoder does not: DDP would wait for its gradient."""
    teacher = tiny_teachers.save_sdxl(tmp_path / "sdxl")
    config = DistillConfig(stage="text", teacher=str(teacher), init="teacher")
    student = new_state(config, torch.device("cpu")).student.module
    assert isinstance(student, TextStudent)
    trained = {name for name, p in student.named_parameters() if p.requires_grad}
    student(torch.randn(2, *student.latent_shape), student.tokenize(["a", "b"])).sum().backward()
    assert trained == {name for name, p in student.named_parameters() if p.grad is not None}
    names = {name.split(".")[2] for name in trained}
    assert names == {"text_encoder", "text_encoder_2"}


@pytest.mark.slow
def test_sdxl_trains_its_text_encoders_sharded(tmp_path: Path) -> None:
    """FSDP2 is the engine of the preset sdxl-text; SDXL reads hidden states before the last layer."""
    teacher = Path(tiny_teachers.save_sdxl(tmp_path / "sdxl"))
    pairs = make_pairs(teacher, tmp_path)
    config = distill_config(teacher, pairs, stage="text", init="teacher")
    reports = []
    for parallel in ("ddp", "fsdp"):
        settings = ("clip_guidance.weight=0", "train.images=8", f"engine.parallel={parallel}")
        succeed(d2g(distill_arguments(config, tmp_path / parallel, *settings), tmp_path / "log"))
        reports.append(losses(tmp_path / parallel))
    for expected, report in zip(*reports, strict=True):
        assert report == pytest.approx(expected, rel=2e-3, abs=2e-4)


def test_what_stage_text_cannot_do_is_refused(first: DistillConfig, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"lora_rank is 2, but stage text keeps"):
        replace(first, student=StudentConfig(lora_rank=2))
    with pytest.raises(SettingError, match="has an effect only in the stages ode and gan"):
        refuse_unused(first, ["student.own_text_encoder"])
    classes = str(tiny_teachers.save_kind("unet2d", tmp_path / "unet2d"))
    with pytest.raises(SettingError, match="has no CLIP text encoders to train"):
        train(replace(first, teacher=classes), tmp_path / "run")
    with pytest.raises(SettingError, match=r"freeze has 'x', which matches no parameter that is trained"):
        new_state(replace(first, student=StudentConfig(freeze=("x",))), torch.device("cpu"))
    frozen = replace(first, student=StudentConfig(freeze=("*embedding*",)))
    module = new_state(frozen, torch.device("cpu")).student.module
    assert not any(p.requires_grad for name, p in module.named_parameters() if "embedding" in name)
