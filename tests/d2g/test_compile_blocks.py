"""Regional compilation: each repeated block of a network is compiled by itself."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from d2g.core.distributed.engine import DistributedModule, compile_blocks, recompute
from d2g.core.errors import SettingError
from d2g.diffusion.pipelines import family_of
from distill.config.run import EngineConfig
from distill.losses.gradient_penalty import r1_penalty
from distill.models.student import student_from_teacher
from parallel_worker import new_discriminator
from tiny_teachers import TRANSFORMERS, random_inputs, save_kind

KINDS = ("sd", "edm", *TRANSFORMERS, "wuerstchen_decoder", "stable_cascade_prior")
"""One family of each kind of repeated block."""


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_blocks_have_the_gradients_of_eager_ones(
    kind: str, tmp_path: Path, fresh_dynamo: None
) -> None:
    """A student, recomputed, and the second derivative of R1 through a discriminator."""
    teacher = tmp_path / kind / "teacher"
    save_kind(kind, teacher)
    student = student_from_teacher(str(teacher), -1).requires_grad_(True)
    discriminator = new_discriminator(str(teacher), seed=0)
    _, noise, cond = random_inputs(kind, 2)
    gradients: list[dict[str, Any]] = []
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
        values = {"latents": latents, **logits}
        for number, network in enumerate(networks):
            values |= {f"{number}.{name}": p.grad for name, p in network.named_parameters()}
        gradients.append(values)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 2
    norms = [{n: float(v.detach().norm()) for n, v in of.items() if v is not None} for of in gradients]
    assert norms[0].keys() == norms[1].keys()
    largest = max(norms[0].values())
    for name, norm in norms[0].items():
        # The softmax does not see a bias of the keys that has no norm behind it: its gradient is rounding.
        if name.endswith("to_k.bias") and norm < 1e-7 * largest:
            assert norms[1][name] < 1e-7 * largest
        else:
            assert float((gradients[1][name] - gradients[0][name]).detach().norm()) <= 1e-5 * norm, name


def test_blocks_need_a_backend() -> None:
    with pytest.raises(SettingError, match="compile_blocks is true but compile names no backend"):
        EngineConfig(compile_blocks=True)
