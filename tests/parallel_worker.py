"""One rank of tests/d2g/test_engine.py: gradients of the discriminator with R1 under every engine.

torchrun … parallel_worker.py FOLDER    writes FOLDER/FAMILY/CASE.pt from rank 0
"""

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tiny_teachers
from d2g.core.distributed import engine, process_group
from d2g.core.distributed.engine import DistributedModule
from d2g.diffusion.conditioning import Conditioning
from d2g.diffusion.pipelines import family_of
from distill.config.discriminator import DiscriminatorConfig
from distill.losses.adversarial import discriminator_loss
from distill.losses.gradient_penalty import r1_penalty
from distill.models.discriminator_kind import DiscriminatorKind
from distill.models.discriminators import DISCRIMINATORS

ROWS = 8
CASES = {
    "ddp": {},
    "ddp-accumulate": {"accumulate": 2},
    "ddp-recompute": {"recompute": True},
    "ddp-autocast": {"half": True},
    "fsdp": {"kind": "fsdp"},
    "fsdp-accumulate": {"kind": "fsdp", "accumulate": 2},
    "fsdp-recompute": {"kind": "fsdp", "recompute": True},
    "fsdp-half": {"kind": "fsdp", "half": True},
    "fsdp-replicas": {"kind": "fsdp", "replicas": 2},
}

FAMILIES = {
    "sd": tuple(CASES),
    **dict.fromkeys(tiny_teachers.TRANSFORMERS, ("ddp", "ddp-autocast", "fsdp-recompute")),
    "sd3": ("ddp", "ddp-accumulate", "ddp-autocast", "fsdp", "fsdp-accumulate", "fsdp-recompute"),
    **dict.fromkeys(("unet2d", "edm"), ("ddp", "ddp-autocast", "fsdp-recompute")),
    **dict.fromkeys(
        ("stable_cascade_decoder", "wuerstchen_prior", "wuerstchen_decoder"), ("ddp", "fsdp-recompute")
    ),
}
"""Cases by kind of teacher; it is FOLDER/KIND/teacher. Accumulation and plain sharding are the engine's, and
recomputation is done on the same layers that are sharded, which a family names.
"""


def discriminator_kind(teacher: str) -> tuple[DiscriminatorKind, DiscriminatorConfig]:
    """The kind of discriminator that goes with a teacher, and settings for it."""
    network = family_of(teacher).network
    name: Any = next(name for name, each in DISCRIMINATORS.items() if network in each.networks)
    return DISCRIMINATORS[name], DiscriminatorConfig(discriminator=name, token_heads=2, token_scales=(1, 2))


def new_discriminator(teacher: str, seed: int) -> nn.Module:
    """Heads differ by seed; nothing that matters is zero."""
    rng = torch.Generator().manual_seed(seed)
    kind, config = discriminator_kind(teacher)
    discriminator = kind.build(teacher, config, rng)
    inputs = (
        *("conv_z.weight", "heads.0_skip.weight", "projections.0_skip.weight"),
        *("patch_z.weight", "heads.block1.weight", "conv_z.1.weight"),
    )
    with torch.no_grad():
        for name in inputs:
            if (p := dict(discriminator.named_parameters()).get(name)) is not None:
                p.copy_(0.3 * torch.randn(p.shape, generator=rng))
        # This makes the gradients as large as those of the others, about 1 in norm.
        if Path(teacher).parent.name in ("unet2d", "edm", "stable_cascade_decoder", "wuerstchen_decoder"):
            for name, p in discriminator.named_parameters():
                p.mul_(0.3 if name.startswith(("heads", "projections")) else 0.6)
    return discriminator


def batch(teacher: str) -> tuple[Tensor, Tensor, Tensor, Conditioning]:
    """real, fake, noise, conditioning of the whole batch, for FOLDER/KIND/teacher."""
    kind = Path(teacher).parent.name
    real, noise, cond = tiny_teachers.random_inputs(kind, ROWS, 5)
    return real, tiny_teachers.random_inputs(kind, ROWS, 6)[0], noise, cond


def gradients(
    teacher: str,
    kind: str = "ddp",
    accumulate: int = 1,
    recompute: bool = False,
    half: bool = False,
    replicas: int = 1,
) -> dict[str, Tensor]:
    """Whole gradients of this world's D loss with R1 on one row a rank, then the weights after one update."""
    rank, world = process_group.rank(), process_group.world_size()
    if kind == "fsdp" and rank:
        kind_of_d, config = discriminator_kind(teacher)
        network = kind_of_d.build_on_meta(teacher, config).to("meta")
    else:
        network = new_discriminator(teacher, seed=rank)
    layers = list(family_of(teacher).shard_units(network))
    if recompute:
        engine.recompute(layers)
    policy = torch.bfloat16 if half and kind == "fsdp" else None
    d = DistributedModule(
        network, kind, torch.device("cpu"), layers=layers, roots=[network], replicas=replicas, half=policy
    )
    mixed = torch.autocast("cpu", torch.bfloat16) if half and kind == "ddp" else nullcontext()
    optim = torch.optim.SGD(d.parameters(), 0.1)
    local = ROWS // world
    size = local // accumulate
    rows: Any = [part[rank * local : (rank + 1) * local] for part in batch(teacher)]
    for _ in range(2):  # twice: what the first step leaves behind must not show in the second
        optim.zero_grad(set_to_none=True)
        real, fake, noise, text = rows
        with d.bare_module() as bare:
            (3.0 * r1_penalty(bare, real[:1], noise[:1], text[:1])).backward()
        for part in range(accumulate):
            real, fake, noise, text = (x[part * size : (part + 1) * size] for x in rows)
            with d.no_sync(part < accumulate - 1):
                with mixed:
                    logits = d(real, noise, text), d(fake, noise, text)
                (discriminator_loss(*logits) / accumulate).backward()
        results = {
            f"grad.{n}": engine.full_tensor(p.grad).clone()  # clipping scales in place
            for n, p in network.named_parameters()
            if p.grad is not None
        }
        norm = d.clip_gradients(1.0)
        optim.step()
    results["norm"] = norm
    # A pass that trains nothing leaves no gradients, and sees the updated weights.
    optim.zero_grad(set_to_none=True)
    network.requires_grad_(False)
    x = rows[1].clone().requires_grad_()
    out = torch.stack([v.float().mean() for v in d.forward_frozen(x, rows[2], rows[3]).values()]).mean()
    (slope,) = torch.autograd.grad(out, x)
    assert all(p.grad is None for p in network.parameters())
    results["slope"] = torch.cat(process_group.gather(slope))
    results |= {f"weight.{n}": engine.full_tensor(p.detach()).clone() for n, p in network.named_parameters()}
    return results


def main() -> None:
    """All cases."""
    folder = Path(sys.argv[1])
    process_group.init()
    for family, cases in FAMILIES.items():
        for name in cases:
            results = gradients(str(folder / family / "teacher"), **CASES[name])  # type: ignore[arg-type]
            if process_group.rank() == 0:
                torch.save(results, folder / family / f"{name}.pt")
            process_group.barrier()
    process_group.finish()


if __name__ == "__main__":
    main()
