"""Students of Stable Cascade's stages through real runs: pairs, both stages of training, refusals."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from diffusers import DDPMWuerstchenScheduler
from PIL import Image
from torch import Tensor

import tiny
import tiny_teachers
from d2g.core.distributed import checkpoint, sharded_checkpoint
from d2g.core.errors import SettingError, UserError
from d2g.core.seeds import Stream, generator, noise
from d2g.core.tracking.run_directory import read_stats
from d2g.diffusion import pretrained
from d2g.diffusion.families.cascade import CascadeFamily
from d2g.diffusion.latents import decode_uint8
from d2g.diffusion.pipelines import family_of
from d2g.diffusion.teacher import check_solver, load_teacher
from d2g.diffusion.teacher_sampler import SolverSettings, load_sampler, prior_seed
from distill.config.discriminator import DiscriminatorConfig
from distill.config.export import ExportConfig
from distill.config.run import EngineConfig, SampleConfig
from distill.export.export import export
from distill.models.cascade_discriminator import discriminator_from_stage
from distill.models.student import student_from_teacher
from distill.planning.memory import predict
from distill.sampling import load_student, with_prior
from distill.saved_samples import save_both_samples, save_teacher_samples
from distill.training.state import new_state
from distill.training.train import train
from eval.protocols.config import EvalRun
from eval.runner.samplers import SamplingRequest, student_source
from eval.runner.session import EvalSession
from jobs import d2g_ranks, distill_arguments, distill_config, succeed
from pairgen.generate import generate_pairs, resimulate
from pairgen.store.reader import PairReader
from pairgen.verify import verify_store
from runs import equal

GAN = ("gan.discriminator=cascade", "gan.r1_interval=2", "gan.mix_fraction=0.5")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # diffusers calls these pipelines deprecated
]


@dataclass(frozen=True)
class Stage:
    """A teacher, its pairs and a student of the first stage of training."""

    teacher: Path
    pairs: Path
    ode: Path


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Stage]:
    root = tmp_path_factory.mktemp("cascade")
    tiny_teachers.save_cascade_prior(root / "prior")
    tiny_teachers.save_cascade_decoder(root / "decoder")
    prompts = tiny.save_prompts(root / "prompts.txt")
    settings = tiny.pair_config(str(root / "prior"), prompts)
    generate_pairs(settings, root / "prior_pairs")
    settings = tiny.pair_config(
        str(root / "decoder"), "", condition=str(root / "prior_pairs"), seed=1, num_pairs=0
    )
    generate_pairs(settings, root / "decoder_pairs")
    made = {}
    for name in ("prior", "decoder"):
        teacher, pairs, run = root / name, root / f"{name}_pairs", root / f"{name}_ode"
        held = ("train.validate_pairs=4", "train.validate_images=4", "train.preview_prompts=1")
        train(distill_config(teacher, pairs, "train.images=4", *held), run)
        made[name] = Stage(teacher, pairs, run)
    return made


def test_rows_of_stage_b_hold_the_latents_of_stage_c(stages: dict[str, Stage]) -> None:
    """Each row of stage B's store follows from its own columns: noise, prompt and stage C's latents."""
    stage_c, stage_b = (PairReader(stages[name].pairs) for name in ("prior", "decoder"))
    order = [7, 0, 11]
    rows, conditions = stage_b.read(order), stage_c.read(order)
    assert rows.condition is not None and torch.equal(rows.condition, conditions.latents)
    assert rows.prompts == conditions.prompts and stage_b.spec.condition_shape == (3, 4, 4)
    teacher = load_teacher(str(stages["decoder"].teacher))
    cond = teacher.encode(rows.prompts).with_prior(rows.condition)
    latents = teacher.sample(rows.noise, rows.prompts, 4, 3.0, "ddim", cond=cond)
    torch.testing.assert_close(latents, rows.latents, rtol=1e-4, atol=1e-3)
    assert resimulate(stages["decoder"].pairs, 3) < 1e-2 and verify_store(stages["decoder"].pairs).ok


@pytest.mark.parametrize("name", ["prior", "decoder"])
def test_the_student_starts_as_the_teachers_prediction(name: str, stages: dict[str, Stage]) -> None:
    rows = PairReader(stages[name].pairs).read([0, 1, 2])
    loaded = load_teacher(str(stages[name].teacher))
    cond = loaded.encode(rows.prompts)
    cond = cond if rows.condition is None else cond.with_prior(rows.condition)
    student = student_from_teacher(str(stages[name].teacher))
    expected = loaded.sample(rows.noise, rows.prompts, 1, 1.0, "ddim", cond=cond)
    torch.testing.assert_close(student(rows.noise, cond), expected, rtol=1e-4, atol=1e-3)
    assert student.timestep == 1000


@pytest.mark.parametrize("name", ["prior", "decoder"])
def test_discriminator_starts_as_the_teacher_and_ignores_z(name: str, stages: dict[str, Stage]) -> None:
    folder = str(stages[name].teacher)
    discriminator = discriminator_from_stage(
        folder, DiscriminatorConfig(discriminator="cascade"), generator(3)
    )
    rows = PairReader(stages[name].pairs).read([0, 1, 2])
    cond = pretrained.load_conditioner(folder).encode(rows.prompts)
    cond = cond if rows.condition is None else cond.with_prior(rows.condition)
    check_features(stages[name].teacher, stages[name].pairs)
    # The noise has no effect until the first step, and then in every head.
    x, z, other = rows.latents, rows.noise, 3 * rows.noise.flip(0)
    first, moved = discriminator(x, z, cond), discriminator(x, other, cond)
    assert list(first) == ["down0", "down1", "up1", "up0"]
    assert all(torch.equal(first[head], moved[head]) for head in first)
    optimizer = torch.optim.AdamW(discriminator.parameters(), lr=1e-2)
    sum(logits.square().mean() for logits in first.values()).backward()  # type: ignore[union-attr]
    idle = [n for n, p in discriminator.named_parameters() if p.requires_grad and p.grad is None]
    assert idle == []
    optimizer.step()
    first, moved = discriminator(x, z, cond), discriminator(x, other, cond)
    assert all((first[head] - moved[head]).abs().max() > 1e-5 for head in first)


def test_the_gan_stage_resumes_bit_for_bit(stages: dict[str, Stage], tmp_path: Path) -> None:
    """Stage B's, which has every part of stage C's."""
    stage, settings = stages["decoder"], (*GAN, "gan.optim.lr=1e-3")
    for run, lengths in (("once", (12,)), ("twice", (4, 12))):
        for images in lengths:
            config = distill_config(
                stage.teacher, stage.pairs, *settings, f"train.images={images}", stage="gan", init=stage.ode
            )
            train(config, tmp_path / run)
    once, twice = (
        sharded_checkpoint.read(checkpoint.open_checkpoint(tmp_path / run / "checkpoints" / f"{12:09d}"))
        for run in ("once", "twice")
    )
    assert equal(once, twice)
    assert "loss/r1" in read_stats(tmp_path / "once")[0]


def test_recomputation_learns_the_same(stages: dict[str, Stage], tmp_path: Path) -> None:
    stage = stages["prior"]
    config = distill_config(stage.teacher, stage.pairs, *GAN, "train.images=4", stage="gan", init=stage.ode)
    train(config, tmp_path / "plain")
    train(replace(config, engine=EngineConfig(activation_checkpointing=True)), tmp_path / "other")
    plain, other = (
        sharded_checkpoint.read(checkpoint.open_checkpoint(tmp_path / run / "checkpoints" / f"{4:09d}"))
        for run in ("plain", "other")
    )
    for name, value in plain.items():
        torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-5)


def test_wuerstchen_goes_through_both_stages(tmp_path: Path) -> None:
    """The other cascade: features of its discriminators, two short runs of a stage, and both students."""
    pairs, runs = dict[str, Path](), dict[str, str]()
    for name, save in zip(("prior", "decoder"), tiny_teachers.CASCADES["wuerstchen"], strict=True):
        teacher = Path(save(tmp_path / name))
        prompts = tiny.save_prompts(tmp_path / "prompts.txt") if name == "prior" else ""
        stage = {} if name == "prior" else {"condition": str(pairs["prior"]), "seed": 1}
        pairs[name] = tmp_path / f"{name}_pairs"
        generate_pairs(tiny.pair_config(str(teacher), prompts, num_pairs=8, **stage), pairs[name])
        check_features(teacher, pairs[name])
        ode, gan = tmp_path / f"{name}_ode", tmp_path / f"{name}_gan"
        train(distill_config(teacher, pairs[name], "train.images=4"), ode)
        train(distill_config(teacher, pairs[name], *GAN, "train.images=4", stage="gan", init=ode), gan)
        runs[name] = str(gan)
    one = with_prior(load_student(runs["decoder"]), runs["decoder"], runs["prior"])
    assert one(tiny.CAPTIONS[:2]).shape == (2, 3, 32, 32)


def check_features(teacher: Path, pairs: Path) -> None:
    """A discriminator's last features and the student's output, against diffusers' forward pass."""
    folder, rows = str(teacher), PairReader(pairs).read([0, 1, 2])
    network, family = pretrained.load_model(folder, family_of(folder).network), family_of(folder)
    assert isinstance(family, CascadeFamily)
    cond = pretrained.load_conditioner(folder).encode(rows.prompts)
    cond = cond if rows.condition is None else cond.with_prior(rows.condition)
    recorded = list[Tensor]()
    output = getattr(network, family.output_layers[0])
    output[0].register_forward_pre_hook(lambda _, args: recorded.append(args[0]))
    for t in (0, 250):
        with torch.no_grad():
            family.forward(network, network.config, rows.latents, t, cond, 1)
            features = family.features(network, rows.latents, t, cond)
        torch.testing.assert_close(list(features.values())[-1], recorded[-1], rtol=1e-5, atol=1e-5)
    widths = family.feature_widths(network.config)
    assert {name: maps.shape[1] for name, maps in features.items()} == widths


def test_memory_and_adapters(stages: dict[str, Stage], tmp_path: Path) -> None:
    stage = stages["decoder"]
    gan = distill_config(stage.teacher, stage.pairs, *GAN, stage="gan", init=stage.ode)
    memory = predict(gan, 1)
    parameters = sum(p.numel() for p in student_from_teacher(str(stage.teacher)).parameters())
    assert memory.average == pytest.approx(4 * parameters / 2**30) and memory.working > 0
    lora = distill_config(
        stage.teacher, stage.pairs, "student.lora_rank=2", "train.images=4", "optim.lr=1e-2"
    )
    train(lora, tmp_path / "run")
    trained = {
        n
        for n, p in new_state(lora, torch.device("cpu")).student.module.named_parameters()
        if p.requires_grad
    }
    assert trained and all(".lora_" in name for name in trained)


def test_a_cascade_draws_in_two_evaluations(stages: dict[str, Stage], tmp_path: Path) -> None:
    """Two students C -> B -> VQGAN, as samples, as exports, and as `d2g eval` draws them."""
    run_c, run_b, prompts = str(stages["prior"].ode), str(stages["decoder"].ode), tiny.CAPTIONS[:3]
    one = with_prior(load_student(run_b), run_b, run_c)
    images = one(prompts, seed=4)
    assert images.shape == (3, 3, 32, 32) and images.dtype == torch.uint8
    # By hand, with diffusers' VQGAN: stage C's latents from a noise of their own.
    first = load_student(run_c)
    z = noise(generator(4, Stream.CASCADE_PRIOR).initial_seed(), range(3), (3, 4, 4))
    with torch.no_grad():
        latents = one.latents(noise(4, range(3), (4, 8, 8)), prompts, first.latents(z, prompts))
        expected = one.vae.decode(latents * one.vae.config.scale_factor).sample.clamp(0, 1)
    assert (images.float() / 255 - expected).abs().max() < 0.51 / 255
    # Exports draw the same, and a source of the evaluation too.
    exports = [tmp_path / name for name in ("c", "b")]
    for run, folder in zip((run_c, run_b), exports, strict=True):
        assert export(ExportConfig(student=run, dtype="fp32"), folder)["parity_max_abs_err"] == 0.0
    c, b = map(str, exports)
    assert torch.equal(with_prior(load_student(b), b, c)(prompts, seed=4), images)
    source = student_source(run_b, SamplingRequest(prompts=prompts, seed=4), prior=run_c)
    (batch,) = source.draw(range(3), 3, ["native"])
    assert torch.equal(next(iter(batch.views.values())), images)


def test_the_teachers_of_a_cascade_draw(stages: dict[str, Stage], tmp_path: Path) -> None:
    """Alone, beside their students on the same noise, and for `d2g eval`: C, then B, then the VQGAN."""
    c, b, prompts = stages["prior"], stages["decoder"], tiny.CAPTIONS[:3]
    settings = SolverSettings(steps=3, guidance=2.0, prior=str(c.teacher), prior_steps=2, prior_guidance=1.5)
    save_teacher_samples(str(b.teacher), prompts, tmp_path / "alone", 4, 2, settings)
    # By hand, with each teacher's own sampler.
    first, second = load_teacher(str(c.teacher)), load_teacher(str(b.teacher))
    z = noise(prior_seed(4), range(3), (3, 4, 4))
    cond = second.encode(prompts).with_prior(first.sample(z, prompts, 2, 1.5, "ddim"))
    latents = second.sample(noise(4, range(3), (4, 8, 8)), prompts, 3, 2.0, "ddim", cond=cond)
    expected = torch.cat(list(decode_uint8(pretrained.load_vae(str(b.teacher)), latents)))
    drawn = [torch.from_numpy(numpy.array(Image.open(tmp_path / "alone" / f"{n:05d}.png"))) for n in range(3)]
    assert (torch.stack(drawn).permute(0, 3, 1, 2).int() - expected.int()).abs().max() <= 1
    # Beside the students, whose prior names its teacher; a source of the evaluation draws the same.
    both = replace(settings, prior=str(c.ode))
    save_both_samples(str(b.ode), str(b.teacher), prompts, tmp_path / "both", 4, 2, both)
    for name in ("alone", "both/teacher"):
        assert (tmp_path / name / "00002.png").read_bytes() == (tmp_path / "alone" / "00002.png").read_bytes()
    run = EvalRun(
        teacher=str(b.teacher), prior=str(c.teacher), steps=3, guidance=2.0, prior_steps=2, prior_guidance=1.5
    )
    prompt_file = tmp_path / "prompts.txt"
    prompt_file.write_text("\n".join(prompts))
    session = EvalSession(replace(run, prompts=str(prompt_file), seed=4, metrics=("is",)))
    (batch,) = session.source(session.config).draw(range(3), 3, ["native"])
    assert (next(iter(batch.views.values())).int() - expected.int()).abs().max() <= 1
    student = replace(session.config, student=str(b.ode), teacher=None, prior=str(c.ode))
    assert session.teacher_source(str(b.teacher), student).facts == session.source(session.config).facts


def test_what_the_teachers_of_a_cascade_lack_is_refused(stages: dict[str, Stage], tmp_path: Path) -> None:
    b, c = (str(stages[name].teacher) for name in ("decoder", "prior"))
    other, wide = (str(tmp_path / name) for name in ("other", "wide"))
    tiny_teachers.save_wuerstchen_prior(Path(other))
    tiny_teachers.save_cascade_prior(Path(wide), in_channels=5, out_channels=5)
    for name, prior, message in (
        (b, None, "prior is not set, .* give --prior a teacher of that"),
        (c, None, "whose latents are no images; give it to --prior, and to --teacher a teacher"),
        (b, b, "is of Stable Cascade, stage B; expected one of Stable Cascade, stage C"),
        (b, other, "is of Würstchen v2, stage C; expected one of Stable Cascade, stage C"),
        (b, wide, "makes latents of 5 channels, but teacher .* reads 3; give --prior the stage of the same"),
        (b, str(stages["prior"].ode), "a student of d2g, no teacher"),
        ("miniature", c, "teacher miniature reads no other stage; leave it out"),
    ):
        with pytest.raises((SettingError, UserError), match=message) as error:
            load_sampler(name, SolverSettings(prior=prior))
        assert "\n" not in str(error.value)
    with pytest.raises(SettingError, match="prior_steps is 3, which goes with --teacher and --prior"):
        SampleConfig(student=b, prior=c, prior_steps=3)
    with pytest.raises(SettingError, match=r"prior_guidance is 2\.0, which goes with --prior"):
        EvalRun(teacher=b, prior_guidance=2.0).check_source()


def test_odd_sizes_and_moved_stores_are_refused(stages: dict[str, Stage], tmp_path: Path) -> None:
    b, c = stages["decoder"], stages["prior"]
    wuerstchen = tiny_teachers.save_wuerstchen_decoder(tmp_path / "b")
    for teacher, size, unit in ((str(b.teacher), 7, 2), (wuerstchen, 6, 4)):
        loaded = load_teacher(teacher)
        with pytest.raises(SettingError, match=f"latent size is {size}x{size}; .* takes multiples of {unit}"):
            check_solver(loaded, "ddim", 2, size=(size, size))
    # The store of stage C has moved since the store of stage B was begun.
    moved = tiny.pair_config(
        str(b.teacher), "", condition=str(tmp_path / "gone"), seed=1, num_pairs=0, shard_size=4
    )
    with pytest.raises(UserError, match=r"gone is not a pair store: .* or give --condition the folder that"):
        generate_pairs(moved, b.pairs)
    # A store whose rows are conditioned by another stage C cannot be trained on beside the first.
    tiny_teachers.save_cascade_prior(tmp_path / "c", scheduler=DDPMWuerstchenScheduler(scaler=2.0))
    prompts = str(c.pairs.parent / "prompts.txt")
    generate_pairs(tiny.pair_config(str(tmp_path / "c"), prompts), tmp_path / "c_pairs")
    settings = tiny.pair_config(str(b.teacher), "", condition=str(tmp_path / "c_pairs"), seed=1, num_pairs=0)
    generate_pairs(settings, tmp_path / "b_pairs")
    both = f"{b.pairs},{tmp_path / 'b_pairs'}"
    with pytest.raises(UserError, match=r"b_pairs has condition_teacher .* expected stores that differ in"):
        train(distill_config(b.teacher, Path(both), "train.images=4"), tmp_path / "run")


@pytest.mark.long
def test_engines_train_stage_b_alike_with_exact_r1(
    stages: dict[str, Stage], tmp_path: Path, fresh_dynamo: None
) -> None:
    """One process, compiled regions, and two ranks with DDP and then FSDP2; R1 of the first step to 1e-6."""
    stage = stages["decoder"]
    settings = (*GAN, "optim.lr=1e-5", "gan.optim.lr=1e-5", "train.images=8", "gan.r1_interval=1")
    config = distill_config(stage.teacher, stage.pairs, *settings, stage="gan", init=stage.ode)
    train(config, tmp_path / "plain")
    train(replace(config, engine=EngineConfig(compile="eager")), tmp_path / "compiled")
    for parallel, images in (("ddp", 4), ("fsdp", 8)):
        changes = (f"engine.parallel={parallel}", f"train.images={images}")
        arguments = distill_arguments(config, tmp_path / "ranks", *settings, *changes)
        succeed(*d2g_ranks(arguments, tmp_path / parallel))
    expected = read_stats(tmp_path / "plain")
    for run in ("compiled", "ranks"):
        lines = read_stats(tmp_path / run)
        assert lines[0]["loss/r1"] == pytest.approx(expected[0]["loss/r1"], rel=1e-6)
        for line, other in zip(lines, expected, strict=True):
            losses = {name: value for name, value in other.items() if name.startswith("loss/")}
            assert {name: line[name] for name in losses} == pytest.approx(losses, rel=1e-4, abs=1e-6)


def test_missing_and_foreign_stages_are_refused(stages: dict[str, Stage], tmp_path: Path) -> None:
    b, c = stages["decoder"], stages["prior"]

    def generate(error: type[Exception], message: str, teacher: Path = b.teacher, **settings: Any) -> None:
        with pytest.raises(error, match=message):
            generate_pairs(tiny.pair_config(str(teacher), "", num_pairs=0, **settings), tmp_path / "out")
        assert not (tmp_path / "out" / "store.json").exists()

    generate(
        SettingError, "condition is not set, .* reads the latents of Stable Cascade, stage C; give --cond"
    )
    generate(
        UserError,
        "nowhere is not a pair store: cannot read .*; or give --condition the",
        condition=str(tmp_path / "nowhere"),
        seed=1,
    )
    generate(UserError, "of a StableCascadeDecoderPipeline, but .* 3-channel", condition=str(b.pairs), seed=1)
    generate(SettingError, "seed is 0, as of .* set another, such as seed=1", condition=str(c.pairs))
    generate(
        SettingError, "reads no latents of another stage; leave it out", c.teacher, condition=str(c.pairs)
    )
    # Another stage-C store under the same stage-B store.
    other = tiny.pair_config(str(c.teacher), str(c.pairs.parent / "prompts.txt"), steps=2)
    generate_pairs(other, tmp_path / "other")
    with pytest.raises(UserError, match="differing: condition_sha256"):
        again = tiny.pair_config(str(b.teacher), "", condition=str(tmp_path / "other"), seed=1, num_pairs=0)
        generate_pairs(again, b.pairs)
    # Students: a stage that is missing, in the wrong place, or of another teacher.
    run_b, run_c = str(b.ode), str(c.ode)
    for name, prior, message in (
        (run_b, None, "prior is not set, .* give --prior a student of that"),
        (run_c, None, "whose latents are no images; give it to --prior"),
        (run_b, run_b, "is of Stable Cascade, stage B; expected one of Stable Cascade, stage C"),
        ("miniature", run_c, "reads no other stage; leave it out"),
    ):
        with pytest.raises((SettingError, UserError), match=message):
            with_prior(load_student(name), name, prior)
    foreign = tmp_path / "foreign"
    export(ExportConfig(student=run_c, dtype="fp32"), foreign)
    tiny_teachers.save_cascade_prior(tmp_path / "teacher", scheduler=DDPMWuerstchenScheduler(scaler=2.0))
    facts = json.loads((foreign / "student.json").read_text()) | {"teacher": str(tmp_path / "teacher")}
    (foreign / "student.json").write_text(json.dumps(facts))
    with pytest.raises(UserError, match=r"another teacher than the latents that student .* was trained"):
        with_prior(load_student(run_b), run_b, str(foreign))
    with pytest.raises(SettingError, match="photographs have no latents"):
        config = distill_config(
            b.teacher, b.pairs, *GAN, "gan.real=x", "gan.real_fraction=0.5", stage="gan", init=b.ode
        )
        train(config, tmp_path / "run")
