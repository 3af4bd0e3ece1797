"""Regional compilation: each repeated block of a network is compiled by itself."""

import copy
from pathlib import Path

import pytest
import torch

from d2g.core.distributed.engine import DistributedModule, compile_blocks, recompute
from d2g.core.errors import SettingError
from d2g.diffusion.pipelines import family_of
from distill.config.run import EngineConfig
from distill.losses.gradient_penalty import r1_penalty
from distill.models.student import student_from_teacher
from parallel_worker import new_discriminator
from tiny_teachers import random_inputs, save_kind


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd", "dit"])
def test_compiled_blocks_have_the_gradients_of_eager_ones(
    kind: str, tmp_path: Path, fresh_dynamo: None
) -> None:
    """A student, recomputed, and the second derivative of R1 through a discriminator."""
    teacher = tmp_path / kind / "teacher"
    save_kind(kind, teacher)
    student = student_from_teacher(str(teacher), -1).requires_grad_(True)
    discriminator = new_discriminator(str(teacher), seed=0)
    _, noise, cond = random_inputs(kind, 2)
    gradients = []
    for compiled in (False, True):
        networks = [copy.deepcopy(student), copy.deepcopy(discriminator)]
        wrapped = []
        for network in networks:
            units = list(family_of(str(teacher)).shard_units(network))
            if compiled:
                compile_blocks(units, "aot_eager")
            recompute(units)
            wrapped.append(DistributedModule(network, "ddp", torch.device("cpu"), compiled_blocks=compiled))
        generate, judge = wrapped
        latents = generate(noise, cond)
        latents.square().sum().backward()
        with judge.bare_module() as bare:
            r1_penalty(bare, noise[:1], noise[:1], cond[:1]).backward()
        logits = judge(latents.detach(), noise, cond)
        sum(values.sum() for values in logits.values()).backward()
        gradients.append([latents, *logits.values(), *(p.grad for n in networks for p in n.parameters())])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 2
    largest = max(float(eager.detach().norm()) for eager in gradients[0] if eager is not None)
    for eager, result in zip(*gradients, strict=True):
        if eager is not None and 0 < float(eager.detach().norm()) < 1e-7 * largest:
            # Zero but for rounding: the softmax does not see the biases of DiT's keys.
            assert float(result.detach().norm()) < 1e-7 * largest
        elif eager is not None:
            assert float((result - eager).detach().norm()) <= 1e-5 * float(eager.detach().norm())


def test_blocks_need_a_backend() -> None:
    with pytest.raises(SettingError, match="compile_blocks is true but compile names no backend"):
        EngineConfig(compile_blocks=True)
