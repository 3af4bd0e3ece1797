"""Errors of libraries and of the operating system are printed as one line with a remedy."""

import errno
import os
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from d2g.core.distributed import process_group
from d2g.core.distributed.checkpoint_index import read_index
from d2g.core.json_files import read_json_object
from d2g.core.machine_errors import MachineError, explain_error
from d2g.data.text_files import read_text
from d2g.diffusion.pipelines import open_pipeline
from d2g.vision.weights import read_checkpoint
from d2g_cli.common import TORCHRUN
from distill.sampling import untrained_one_step
from eval.result import EvalResult
from eval.runner.samplers import SamplingRequest, pipeline_source
from jobs import d2g, d2g_ranks
from pairgen.prompts import PromptList
from pairgen.store.reader import PairReader
from pairgen.store.spec import read_spec, shard_path
from pairgen.verify import check_file
from stores import FORKS, SPEC, put_store

pytestmark = FORKS
ROOT = Path(__file__).resolve().parents[2]
REPORT = "this is unexpected"
NCCL_WITHOUT_SHARED_MEMORY = (
    "NCCL error in: NCCLUtils.cpp:94, unhandled cuda error (run with NCCL_DEBUG=INFO for details), NCCL "
    "version 2.27.5\nncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\n"
    "Error while creating shared memory segment /dev/shm/nccl-3fYpQx (size 33030528), error: No space left "
    "on device (28)"
)
"""What each of two ranks says in a container with the usual 64 MB of shared memory."""


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "take smaller batches"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "take smaller batches"),
        (MemoryError(), "out of memory (MemoryError)"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"), "take smaller batches"),
        (
            RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable\nmore"),
            "see `nvidia-smi` for who uses it",
        ),
        (RuntimeError("CUDA error: invalid device ordinal"), "CUDA_VISIBLE_DEVICES"),
        (
            RuntimeError("CUDA error: no kernel image is available for execution on the device\nmore"),
            "this build of PyTorch has no code for this GPU",
        ),
        (torch.distributed.DistBackendError(NCCL_WITHOUT_SHARED_MEMORY), "--shm-size"),
        (
            torch.distributed.DistBackendError("NCCL error in: x.cpp:1, invalid usage\nLast error:\nodd"),
            "the GPUs cannot exchange data (odd)",
        ),
        (OSError(errno.ENOSPC, "No space left on device", "/x/y"), "/x/y: the disk is full; free space"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "your quota of the disk is used up"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), "/x: no permission"),
        (OSError(errno.EMFILE, "Too many open files"), "ulimit -n"),
        (OSError(errno.EROFS, "Read-only file system", b"/\xff"), "the disk is read-only"),
        (ModuleNotFoundError("No module named 'foo.bar'", name="foo.bar"), "`pip install foo`"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else value[:20],
)
def test_errors_that_a_user_can_fix_have_a_remedy(error: Exception, message: str) -> None:
    text = explain_error(error)
    assert text is not None and message in text and "\n" not in text


@pytest.mark.parametrize(
    ("text", "lost"),
    [
        (NCCL_WITHOUT_SHARED_MEMORY, False),
        (
            "NCCL error in: x.cpp:1, remote process exited or there was a network error\nncclRemoteError: ..",
            True,
        ),
        ("[Rank 1] Connection closed by peer", True),
    ],
)
def test_an_error_of_nccl_about_this_machine_is_no_lost_process(text: str, lost: bool) -> None:
    """All ranks have the same error: nobody would print the reason."""
    assert process_group.lost_peer(torch.distributed.DistBackendError(text)) == lost


def test_other_errors_have_no_remedy() -> None:
    assert explain_error(KeyError("x")) is None and explain_error(OSError("odd")) is None
    assert explain_error(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None


@contextmanager
def no_more_open_files() -> Iterator[None]:
    """Inside, this process can open no file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_file_that_the_machine_cannot_read_is_not_damaged(teacher: Path, tmp_path: Path) -> None:
    """The error does not advise to repair or delete the file, and no other row is read in its place."""
    store = put_store(tmp_path / "pairs", SPEC)
    reader = PairReader(store, skip_bad=True)
    texts = {name: tmp_path / name for name in ("a.json", "a.pth", "a.txt", "result.json")}
    for file in texts.values():
        file.write_text("{}")
    read_by: dict[str, Callable[[], object]] = {
        "shard": lambda: check_file(shard_path(store, 1), 1, SPEC, None),
        "row": lambda: reader.read([8]),
        "spec": lambda: read_spec(store),
        "prompts": lambda: PromptList.open(texts["a.txt"]),
        "index": lambda: read_index(tmp_path),
        "JSON": lambda: read_json_object(texts["a.json"], "delete it"),
        "weights": lambda: read_checkpoint(texts["a.pth"], "weights"),
        "text": lambda: read_text(texts["a.txt"]),
        "result": lambda: EvalResult.load(texts["result.json"]),
        "teacher": lambda: open_pipeline(str(teacher)),
    }
    errors: dict[str, BaseException | None] = dict.fromkeys(read_by)
    with no_more_open_files():
        for name, read in read_by.items():
            try:
                read()
            except Exception as error:
                errors[name] = error
    for name, error in errors.items():
        assert isinstance(error, MachineError), (name, error)
        assert "ulimit -n" in str(error) and "\n" not in str(error)
        assert not any(word in str(error) for word in ("delete", "repair", "fetch", "restore", "create"))
    assert check_file(shard_path(store, 1), 1, SPEC, None).reason == ""


def test_an_out_of_memory_error_is_one_line(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drawing the noise of the first batch raises OutOfMemoryError."""

    def out_of_memory(*arguments: Any, **settings: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has 8 MiB free")

    monkeypatch.setattr("pairgen.job.noise", out_of_memory)
    (tmp_path / "p.txt").write_text("a cube")
    ended = d2g(
        [
            *("pairs", "generate", "--teacher", str(teacher), "--prompts", str(tmp_path / "p.txt")),
            *("--preset", "trial", "--num-pairs", "1", "--out", str(tmp_path / "o")),
        ],
        tmp_path / "log",
    )
    assert ended.code == 1 and "out of memory (CUDA out of memory." in ended.error
    assert REPORT not in ended.error and "--batch-size" in ended.error


# Pipelines whose schedulers limit the number of steps.


@pytest.fixture(scope="module")
def one_step(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pipeline that `d2g export` writes for an untrained student."""
    from d2g.diffusion import pretrained
    from distill.export.one_step_pipeline import save_one_step
    from distill.models.student import add_guidance_embedding

    out = tmp_path_factory.mktemp("pipeline") / "pipe"
    unet = untrained_one_step(str(teacher)).student.unet
    add_guidance_embedding(unet)
    save_one_step(str(teacher), unet, pretrained.load_schedule(str(teacher)), 999, out, torch.float32)
    return out


def test_an_exported_pipeline_is_sampled_in_one_step(
    one_step: Path, caplog: pytest.LogCaptureFixture
) -> None:
    request = SamplingRequest(prompts=["a red cube"])
    with caplog.at_level("INFO"):
        source = pipeline_source(str(one_step), request)
    assert source.facts["steps"] == 1 and "takes 1 steps at most" in caplog.text
    batch = next(iter(source.draw(range(1), 1, ())))
    assert batch.prompts == ["a red cube"]
    assert pipeline_source(str(one_step), request, steps=1).facts == source.facts


def test_more_steps_than_a_pipeline_supports_are_refused(one_step: Path, teacher: Path) -> None:
    request = SamplingRequest(prompts=["a red cube"])
    with pytest.raises(Exception, match=r"takes 1 steps at most, got 4; set --steps 1"):
        pipeline_source(str(one_step), request, steps=4)
    assert pipeline_source(str(teacher), request).facts["steps"] == 50, "the default of other pipelines is 50"


def test_an_error_inside_a_pipeline_is_one_line(teacher: Path, tmp_path: Path) -> None:
    """A text encoder with too few positions fails inside the pipeline."""
    import tiny_teachers
    from d2g.core.errors import UserError

    folder = Path(shutil.copytree(teacher, tmp_path / "teacher"))
    tiny_teachers.edit(folder, "tokenizer/tokenizer_config.json", model_max_length=40)
    source = pipeline_source(str(folder), SamplingRequest(prompts=["a red cube"]), steps=2)
    with pytest.raises(UserError, match=r"pipeline .* cannot draw with 2 steps and guidance None \("):
        next(iter(source.draw(range(1), 1, ())))


# Commands of one process under torchrun.


@pytest.mark.parametrize(
    "args",
    [["export", "--student", "miniature"], ["teacher", "info", "miniature", "--json"]],
    ids=["export", "teacher info"],
)
def test_rank_0_runs_the_command_and_the_other_ranks_exit_with_0(args: list[str], tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "out")] if args[0] == "export" else []
    first, second = d2g_ranks([*args, *out], tmp_path / "log")
    assert (first.code, second.code) == (0, 0), first.stderr + second.stderr
    assert second.stdout == "" == second.stderr and first.stdout
    assert "works in one process; the others of torchrun have nothing to do" in first.stderr
    assert not out or (tmp_path / "out" / "student.json").is_file()


@pytest.mark.parametrize("command", ["score", "overfit", "triplets"])
def test_a_usage_error_of_an_lpips_command_is_printed_by_rank_0_only(command: str, tmp_path: Path) -> None:
    first, second = d2g_ranks(["lpips", command], tmp_path)
    assert (first.code, second.code) == (2, 0) and "is not set; give --" in first.error
    assert second.stderr == ""


def test_the_environment_variables_of_torchrun() -> None:
    """TORCHRUN lists the variables that torchrun sets for ranks and that `process_group` reads."""
    assert {"RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_USE_AGENT_STORE"} <= set(TORCHRUN)


# Environment variables of a launcher.


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "abc"}, "RANK is 'abc' in the environment; expected a whole number from 0 on"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0' in the environment; expected a whole number from 1 on"),
        ({"LOCAL_RANK": ""}, "LOCAL_RANK is '' in the environment; expected a whole number from 0 on"),
        ({"RANK": "5", "WORLD_SIZE": "2"}, "RANK is 5 in the environment, but WORLD_SIZE is 2; expected"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2 in the environment, but RANK is not set; start the processes"),
        ({"RANK": "0"}, "WORLD_SIZE expected, but not set); start the processes with"),
        ({"RANK": "0", "WORLD_SIZE": "1"}, "MASTER_ADDR expected, but not set); start the processes with"),
    ],
)
def test_variables_of_a_launcher_that_do_not_fit_together_are_one_line(
    environment: dict[str, str], message: str, tmp_path: Path
) -> None:
    ended = d2g(["lpips", "calibrate"], tmp_path, environment=environment)
    assert ended.code == 1 and message in ended.error and REPORT not in ended.error


def test_a_port_that_is_in_use_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        group = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        port = str(other.getsockname()[1])
        ended = d2g(["lpips", "calibrate"], tmp_path, environment={**group, "MASTER_PORT": port})
    assert ended.code == 1 and "cannot join a group of 1 (" in ended.error
    assert f"port: {port}" in ended.error and "a free MASTER_PORT" in ended.error


# A reader that closes the pipe.


@pytest.mark.parametrize("args", [["settings", "distill"], ["teacher", "list", "--json"]])
def test_a_closed_pipe_prints_no_error(args: list[str]) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    process = subprocess.run(
        [sys.executable, "-m", "d2g_cli", *args],
        cwd=ROOT,
        stdout=write_end,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(write_end)
    assert (
        "Traceback" not in process.stderr and REPORT not in process.stderr and "error" not in process.stderr
    )
