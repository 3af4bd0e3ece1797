"""d2g.core.distributed.engine: under DDP and FSDP2 on two processes, D's gradients with R1 are those of one
process.
"""

import copy
import os
import subprocess
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import parallel_worker
import tiny_teachers
from d2g.core.distributed.engine import DistributedModule, recompute
from distill.losses.adversarial import discriminator_loss
from distill.losses.gradient_penalty import r1_penalty
from parallel_worker import FAMILIES, ROWS, batch, gradients, new_discriminator

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(warm_python: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case on two processes: FOLDER/FAMILY/CASE.pt."""
    folder = tmp_path_factory.mktemp("parallel")
    for kind in FAMILIES:
        tiny_teachers.save_kind(kind, folder / kind / "teacher")
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", parallel_worker.__file__]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment["PYTHON_EXEC"] = warm_python  # by which torchrun starts its processes
    done = subprocess.run(
        [warm_python, "-m", *command, str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return folder


def one_process(teacher: str, parts: int, half: bool) -> dict[str, Tensor]:
    """The same two steps written out: `parts` micro-batches, R1 on the first row of either half."""
    network = new_discriminator(teacher, seed=0)
    trained = [p for p in network.parameters() if p.requires_grad]
    optim = torch.optim.SGD(trained, 0.1)
    real, fake, noise, text = batch(teacher)
    for _ in range(2):
        optim.zero_grad()
        first = [0, ROWS // 2]
        (3.0 * r1_penalty(network, real[first], noise[first], text[first])).backward()
        for rows in torch.arange(ROWS).chunk(parts):
            with torch.autocast("cpu", torch.bfloat16) if half else nullcontext():
                logits = [network(x[rows], noise[rows], text[rows]) for x in (real, fake)]
            (discriminator_loss(*logits) / parts).backward()
        results = {f"grad.{n}": p.grad.clone() for n, p in network.named_parameters() if p.grad is not None}
        results["norm"] = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optim.step()
    x = fake.clone().requires_grad_()
    heads = network(x, noise, text).values()
    results["slope"] = torch.autograd.grad(torch.stack([v.mean() for v in heads]).mean(), x)[0]
    return results | {f"weight.{n}": p.detach() for n, p in network.named_parameters()}


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # FLUX's norms, autocast
@pytest.mark.parametrize(
    ("family", "case"), [(family, case) for family, cases in FAMILIES.items() for case in cases]
)
def test_two_processes_give_the_gradients_of_one(family: str, case: str, folder: Path) -> None:
    """1e-6 in fp32, and where each rank's part is one micro-batch under autocast. FSDP2's own bf16 casts the
    weights too: 3 % of the gradients' norm.
    """
    results = torch.load(folder / family / f"{case}.pt", weights_only=True)
    half = case == "ddp-autocast"
    wanted = one_process(str(folder / family / "teacher"), 2 if half else 1, half)
    results["slope"] /= 2  # each rank's mean is over half of the rows
    assert results.keys() == wanted.keys() and len(results) > 50
    if case == "fsdp-half":
        a, b = (torch.cat([v.flatten() for k, v in of.items() if "grad" in k]) for of in (results, wanted))
        assert 0 < (a - b).norm() < 0.03 * b.norm()
        return
    for name, value in wanted.items():
        if half and name == "slope":
            continue  # that pass is not under autocast
        torch.testing.assert_close(
            results[name], value, rtol=0, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_single_process_gives_the_networks_gradients(
    kind: str, warm_python: str, teacher: Path, tmp_path: Path
) -> None:
    """One process, no torchrun: FSDP2 in a subprocess, since it needs a process group of its own."""
    script = (
        "import sys, torch, parallel_worker as w; from d2g.core.distributed import process_group\n"
        f"torch.save(w.gradients(sys.argv[1], kind={kind!r}), sys.argv[2]); process_group.finish()"
    )
    out = tmp_path / "gradients.pt"
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [warm_python, "-c", script, str(teacher), str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    results = torch.load(out, weights_only=True)
    network = new_discriminator(str(teacher), seed=0)
    real, fake, noise, text = batch(str(teacher))
    assert torch.equal(results["weight.unet.conv_norm_out.weight"], network.unet.conv_norm_out.weight)
    with_r1 = gradients(str(teacher))
    for name, value in with_r1.items():
        torch.testing.assert_close(results[name], value, rtol=0, atol=1e-6)
    assert len(real) == len(fake) == len(noise) == len(text) == ROWS


@pytest.mark.long
@pytest.mark.slow
def test_compiled_passes_agree_with_eager_ones(teacher: Path) -> None:
    """The compiled network agrees with the eager one, and R1 still has its second derivative."""
    network = new_discriminator(str(teacher), seed=0)
    compiled = DistributedModule(network, "ddp", torch.device("cpu"), compile_backend="aot_eager")
    real, _, noise, text = batch(str(teacher))
    for name, value in compiled(real, noise, text).items():
        torch.testing.assert_close(value, network(real, noise, text)[name])
    with compiled.bare_module() as bare:
        r1_penalty(bare, real[:1], noise[:1], text[:1]).backward()
    gradients = {n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None}
    network.zero_grad()
    r1_penalty(network, real[:1], noise[:1], text[:1]).backward()
    assert gradients and all(
        torch.equal(p.grad, gradients[n]) for n, p in network.named_parameters() if p.grad is not None
    )


def test_recomputation_keeps_random_states_for_dropout_alone() -> None:
    """Dropout draws the same mask again in the backward pass."""
    plain, without, dropout = (nn.Sequential(nn.Linear(4, 4), nn.Dropout(p)) for p in (0.0, 0.0, 0.5))
    recompute([without, dropout])
    settings = [layer.forward.keywords["preserve_rng_state"] for layer in (without, dropout)]
    assert settings == [False, True] and plain.forward is not without.forward
    x = torch.ones(64, 4, requires_grad=True)
    weight = dropout[0].weight
    result = dropout(x)
    (gradient,) = torch.autograd.grad(result.sum(), weight)
    mask = (result != 0).double() * 2  # d(sum)/dW[i] is the number of rows where unit i is kept, doubled
    torch.testing.assert_close(gradient.double(), mask.sum(0)[:, None].expand(4, 4))


def test_channels_last_changes_the_layout_and_no_value() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 4, 3, padding=1))
    twin = copy.deepcopy(net)
    x = torch.randn(2, 4, 8, 8)
    with_layout = DistributedModule(net, "ddp", torch.device("cpu"), channels_last=True)
    plain = DistributedModule(twin, "ddp", torch.device("cpu"))
    assert net[0].weight.is_contiguous(memory_format=torch.channels_last)
    for module in (with_layout, plain):
        module(x).square().mean().backward()
    torch.testing.assert_close(net[0].weight.grad, twin[0].weight.grad)
