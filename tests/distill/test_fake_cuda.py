"""The training step on fake CUDA tensors: no tensor is on the wrong device, and the host does not wait.

DDP over fake ranks has torch's reducer in Python here, because the one in C++ asks the driver
(docs/scaling.md). The one in C++ is tested with real processes on the CPU, in tests/distill and
tests/d2g/test_engine.py.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_teachers
from benchmarks.scaling import OPERATORS
from d2g.core.config import override
from distill.config.presets import DISTILL_PRESETS
from distill.planning.flops import flop_per_image
from distill.planning.reference_models import configs_only

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        torch.version.cuda is None or torch.torch_version.TorchVersion(torch.__version__) < (2, 11),
        reason="fake CUDA tensors need a CUDA build of torch 2.11 or newer",
    ),
    pytest.mark.skipif(
        Path("/dev/nvidiactl").exists(), reason="there is a GPU: pytest -m gpu runs on real CUDA tensors"
    ),
]


def fake_cuda(python: str, *arguments: str) -> dict[str, Any]:
    """What tests/fake_cuda.py prints."""
    return printed_by("fake_cuda.py", python, *arguments)


def fake_cuda_command(python: str, *arguments: str) -> dict[str, Any]:
    """What tests/fake_cuda_commands.py prints."""
    return printed_by("fake_cuda_commands.py", python, *arguments)


def printed_by(script: str, python: str, *arguments: str) -> dict[str, Any]:
    """The JSON object that a script in tests/ prints. A process of its own, because it changes torch."""
    done = subprocess.run(
        [python, str(ROOT / "tests" / script), *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


LATE = [{"d2g/core/transfer.py read: waits for an event": 1}]
"""What the host may read of the step before: whether it was finite."""


@pytest.mark.parametrize(
    "arguments",
    [
        "gan",
        *(
            pytest.param(arguments, marks=pytest.mark.long)
            for arguments in (
                "ode",
                "ode optim.name=radam",
                "ode optim.name=adamw_8bit engine.offload_optimizer=true student.lora_rank=2",
                "gan gan.penalty=approx gan.adaptive_weight=true engine.gradient_accumulation=2 "
                "data.text_cache=4",
            )
        ),
    ],
)
def test_a_step_never_waits_for_the_device(arguments: str, warm_python: str) -> None:
    """Between reports, the host reads one value: whether the step before was finite."""
    waits = fake_cuda(warm_python, *arguments.split())
    assert waits["steps"] == [{}, {}]
    assert waits["late"] == [{}, *LATE]
    assert waits["report"], "the counter counts"
    assert 0 < waits["mfu"] < 1e-3 * waits["images_per_sec"]
    assert waits["contiguous_filters"] == 0, "engine.channels_last=auto"
    assert waits["embeddings"] == ["torch.bfloat16"], "data.text_precision=auto, train.precision=bf16"


@pytest.mark.long
@pytest.mark.parametrize("stage", ["ode", "gan"])
@pytest.mark.parametrize("parallel", ["fsdp", "ddp"])
def test_a_step_over_eight_ranks_never_waits_for_the_device(
    parallel: str, stage: str, warm_python: str
) -> None:
    """The first of eight ranks, whose collectives send nothing."""
    waits = fake_cuda(warm_python, "ranks", "8", stage, f"engine.parallel={parallel}")
    assert waits["steps"] == [{}, {}]
    assert waits["late"] == [{}, *LATE]
    assert waits["report"], "the counter counts"
    # DDP averages each gradient once per step; R1, in the first and third, leaves local ones until then.
    if parallel == "ddp":
        first, second, third = waits["all_reduces"]
        assert first == second == third > 0


@pytest.mark.long
def test_networks_that_look_at_images_let_no_step_wait(warm_python: str) -> None:
    """Their constants are on the device from the start: a copy waits for all that is queued there."""
    waits = fake_cuda(warm_python, "pixels")
    assert waits["steps"] == [{}, {}] and waits["late"] == [{}, *LATE]
    assert waits["report"], "the counter counts"


@pytest.mark.long
def test_a_validation_leaves_the_arithmetic_of_training_alone(warm_python: str) -> None:
    """Evaluations are exact; opening one once switched TF32 off for the whole run."""
    result = fake_cuda(warm_python, "validation")
    assert result["tf32"] == [True] * 3
    assert any(line.startswith("eval/") for line in result["report"]), "it has measured"


@pytest.mark.long
def test_no_family_mixes_devices_or_waits() -> None:
    """Pairs and both stages of every kind of teacher.

    In two new processes that take equally long. One has all stages of cascades, because stage B reads the
    pairs of stage C.
    """
    first_part = ["edm", "sdxl", "ldm", *tiny_teachers.STAGES]
    others = (kind for kind in tiny_teachers.UNETS if kind not in first_part)
    parts = (first_part, [*tiny_teachers.TRANSFORMERS, *others])
    with ThreadPoolExecutor() as pool:
        first, second = pool.map(lambda kinds: fake_cuda(sys.executable, "families", *kinds), parts)
    results = first | second
    assert list(results) == [*parts[0], *parts[1]]
    for kind, result in results.items():
        assert result["pairs"] == {}, kind
        for stage in ("ode", "gan"):
            assert result[stage]["steps"] == [{}] and result[stage]["late"] == [{}], (kind, stage)
            assert result[stage]["report"], "the counter counts"


@pytest.mark.long
def test_training_a_metric_does_not_mix_devices(warm_python: str) -> None:
    results = fake_cuda_command(warm_python, "metric")
    assert list(results) == ["fresh", "cached", "calibrate", "overfit", "score", "triplets"]
    assert all(results.values()), "each of them uses the GPU"


@pytest.mark.long
def test_an_evaluation_does_not_mix_devices(warm_python: str) -> None:
    """Images and features are read by the host once per batch, so this lists waits and limits nothing."""
    results = fake_cuda_command(warm_python, "evaluation")
    assert list(results) == ["teacher", "student", "plan"]
    assert all(results.values()), "the counter counts"
    # A timing waits for the device.
    assert results["plan"]["teacher_training/full_run/plan.py feature_seconds: copies to the host"] == 2


@pytest.mark.long
def test_drawing_and_comparing_images_does_not_mix_devices(warm_python: str) -> None:
    """The caption oracle and the images of a folder are on the CPU. Class labels start there, too."""
    results = fake_cuda_command(warm_python, "sampling")
    names = ["sample", "explore", "serve", "export", "demo", "against", "folder", "latency"]
    assert list(results) == names and all(results.values()), "the counter counts"


@pytest.mark.long
def test_pair_stores_do_not_mix_devices(warm_python: str) -> None:
    results = fake_cuda_command(warm_python, "stores")
    assert list(results) == ["generate", "auto", "plan", "resimulate", "sheet"]
    assert all(results.values()), "the counter counts"


@pytest.mark.long
@pytest.mark.parametrize("networks", [["unet_text", "edm"], ["dit", "unet", "cascade"]])
def test_training_a_teacher_does_not_mix_devices(networks: list[str], warm_python: str) -> None:
    """All stages. The host waits in each step for the finite check; this test does not limit waits."""
    results = fake_cuda_command(warm_python, "teachers", *networks)
    assert list(results) == networks
    for waits in results.values():
        assert any(line.startswith("teacher_training/loop.py _update: reads") for line in waits)


@pytest.mark.long
@pytest.mark.parametrize(
    ("preset", "stage", "rows", "settings"),
    [
        ("sd15-cfg3", "ode", 8, ()),
        ("sd15-cfg3", "gan", 8, ("gan.r1_rows=1", "gan.r1_interval=1")),
        ("sdxl-cfg7", "ode", 2, ()),
        ("sdxl-cfg7", "gan", 2, ("engine.parallel=ddp",)),
    ],
)
def test_the_forecasts_agree_with_a_step(
    preset: str, stage: str, rows: int, settings: tuple[str, ...], warm_python: str, tmp_path: Path
) -> None:
    """Two steps at the size of SD 1.5, with R1 in each, and of SDXL, which has none: their memory, and the
    FLOP by which a run reports its MFU. docs/scaling.md has the memory of more recipes."""
    settings = (f"train.batch_size={rows}", "engine.activation_checkpointing=false", *settings)
    result = fake_cuda(warm_python, "memory", preset, stage, *settings)
    assert result["forecast"] == pytest.approx(result["tracked"], rel=0.05)
    recipe = DISTILL_PRESETS[preset]
    config = override(replace(recipe[stage], teacher=configs_only(recipe.model, tmp_path)), settings)
    assert result["flop_per_step"] == pytest.approx(rows * flop_per_image(config), rel=0.01)
    # benchmarks/scaling.py counts the operators of a step without R1.
    if stage == "ode" or config.gan.active_penalty == "none":
        operators = OPERATORS[preset.partition("-")[0], stage, False]
        assert result["operators_per_step"] == pytest.approx(operators, rel=0.02)


@pytest.mark.long
@pytest.mark.parametrize(
    ("preset", "stage", "settings"),
    [
        ("sd15-cfg3", "ode", ("train.batch_size=64",)),
        ("sd15-cfg3", "gan", ("train.batch_size=64", "gan.r1_rows=8")),
        ("sdxl-cfg7", "gan", ("train.batch_size=32",)),
    ],
)
def test_the_memory_forecast_under_fsdp2_agrees_with_the_storages_of_a_step(
    preset: str, stage: str, settings: tuple[str, ...], warm_python: str
) -> None:
    """The first of eight ranks. R1 is in bf16 there. SDXL has none, and its gradients of D are the peak."""
    chosen = ("engine.parallel=fsdp", *settings)
    result = fake_cuda(warm_python, "memory-ranks", "8", preset, stage, *chosen)
    assert result["forecast"] == pytest.approx(result["tracked"], rel=0.05)
