"""gan.adaptive_weight: in each step the GAN loss is scaled by the gradients at the student's latents."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.training_step import RandomStep
from d2g.core.config import override
from d2g.core.errors import SettingError
from d2g.core.tracking.run_directory import read_stats
from distill.config.presets import DISTILL_PRESETS
from distill.training.check_config import validate_config
from distill.training.step import (
    LossTerms,
    adaptively_weighted_gradients,
    generate,
    set_discriminator_inputs,
    weighted_gradient,
)
from jobs import d2g, d2g_ranks, distill_arguments, distill_config, make_pairs, succeed

SETTINGS = ("train.precision=fp32", "train.batch_size=4", "lpips=random", "gan.penalty=none")


def latent_gradients(
    teacher: Path, folder: Path, *settings: str, head_scale: float = 1.0
) -> tuple[list[Tensor], float]:
    """Gradients of a step's micro-batches at the student's latents, and the weight of the GAN loss.

    head_scale: factor of the weights of D's heads.
    """
    config = replace(DISTILL_PRESETS["trial"]["gan"], teacher=str(teacher))
    config = override(config, (*SETTINGS, *settings))
    torch.manual_seed(0)  # of the random weights
    step = RandomStep(config, torch.device("cpu"), folder)
    assert step.state.discriminator is not None
    for name, parameter in step.state.discriminator.module.named_parameters():
        if name.startswith("heads."):
            parameter.data.mul_(head_scale)
    microbatches, _ = step.prepare(step.batch, 0)
    terms = LossTerms(len(microbatches))
    for microbatch in microbatches:
        with torch.no_grad():
            microbatch.generated = generate(step.context, microbatch)
        set_discriminator_inputs(step.context, microbatch)
    if config.gan.adaptive_weight:
        gradients = adaptively_weighted_gradients(step.context, microbatches, terms)
        return gradients, float(terms["gan/weight"])
    gradients = [weighted_gradient(step.context, i, m, terms) for i, m in enumerate(microbatches)]
    return gradients, config.gan.weight


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_gan_gradient_has_the_chosen_share_of_the_other_gradient(
    accumulation: int, teacher: Path, tmp_path: Path
) -> None:
    """A weight of 0 leaves the gradient of the regression loss. The rest is the GAN loss's."""
    accumulate = f"engine.gradient_accumulation={accumulation}"
    regression, _ = latent_gradients(teacher, tmp_path, accumulate, "gan.weight=0")
    fixed, _ = latent_gradients(teacher, tmp_path, accumulate, "gan.weight=1")
    adaptive, weight = latent_gradients(
        teacher, tmp_path, accumulate, "gan.weight=0.5", "gan.adaptive_weight=true"
    )
    others = torch.cat(regression)
    assert float((torch.cat(adaptive) - others).norm()) == pytest.approx(0.5 * float(others.norm()), rel=1e-3)
    # The GAN loss is scaled as a whole: rows and micro-batches keep their proportions.
    gan = torch.cat(fixed) - others
    assert (torch.cat(adaptive) - others - weight * gan).norm() < 1e-3 * others.norm()


def test_micro_batches_do_not_change_the_weight_of_a_tiny_gradient(teacher: Path, tmp_path: Path) -> None:
    """The 1e-6 of the formula belongs to the gradient of the mean over all rows."""
    settings = ("gan.adaptive_weight=true", "gan.mix_fraction=0", "regression.losses=pseudo_huber")
    _, whole = latent_gradients(teacher, tmp_path, *settings, head_scale=1e-6)
    _, parts = latent_gradients(
        teacher, tmp_path, *settings, "engine.gradient_accumulation=4", head_scale=1e-6
    )
    assert parts == pytest.approx(whole, rel=1e-4)


@pytest.mark.slow
def test_the_weight_is_that_of_the_whole_step(teacher: Path, tmp_path: Path) -> None:
    """Micro-batches and processes do not change it, and a resumed run has the same."""
    pairs = make_pairs(teacher, tmp_path)
    loss = "regression.losses=pseudo_huber"  # the gradients of E-LatentLPIPS follow rounding more
    settings = (loss, "gan.adaptive_weight=true", "gan.optim.lr=1e-4", "train.images=16")
    config = distill_config(teacher, pairs, *settings, stage="gan", init="teacher")

    def run(name: str, *more: str) -> list[dict[str, float]]:
        succeed(d2g(distill_arguments(config, tmp_path / name, *settings, *more), tmp_path / f"{name}.log"))
        return read_stats(tmp_path / name)

    plain = run("plain")
    assert len({line["gan/weight"] for line in plain}) == len(plain) == 4
    for line in plain:
        expected = line["loss/pseudo_huber"] + line["gan/weight"] * line["loss/g_gan"]
        assert line["loss/g"] == pytest.approx(expected, rel=1e-5)

    # Two micro-batches, whose student passes come after the losses; two steps and a restart; two processes.
    runs = {"accumulated": run("accumulated", "engine.gradient_accumulation=2")}
    run("resumed", "train.images=8")
    runs["resumed"] = run("resumed")
    succeed(*d2g_ranks(distill_arguments(config, tmp_path / "ranks", *settings), tmp_path / "log"))
    runs["ranks"] = read_stats(tmp_path / "ranks")
    for name, lines in runs.items():
        for line, other in zip(plain, lines, strict=True):
            for term in ("gan/weight", "loss/g", "grad/g"):
                assert other[term] == pytest.approx(line[term], rel=1e-4), (name, term)


def test_it_needs_another_loss(teacher: Path) -> None:
    settings = ("gan.adaptive_weight=true", "regression.losses=[]", "pairs=x", "init=teacher")
    config = replace(DISTILL_PRESETS["trial"]["gan"], teacher=str(teacher))
    with pytest.raises(SettingError, match=r"adaptive_weight is true, but regression\.losses is \[\]"):
        validate_config(override(config, settings))
    validate_config(override(config, (*settings, "clip_guidance.weight=1")))
