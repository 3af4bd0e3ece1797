"""examples/launch: the scripts run with stub schedulers, and every d2g command in them parses."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from d2g_cli.main import app
from distill.config.presets import DISTILL_PRESETS
from pairgen.config import PAIR_PRESETS
from pairgen.store.reader import PairReader

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples" / "launch"
YAML_FILES = sorted(EXAMPLES.rglob("*.yaml"))
MINIATURE = {
    "SD": "miniature",
    "LPIPS": str(ROOT / "miniature/weights/teacher/latent_lpips"),
    "PRESET": "trial",
    "GPUS": "1",
}

# Stubs that run locally what a scheduler would run elsewhere. They log their own calls to $STUB_LOG.
STUBS = {
    # Every task of the array, or the one job, with the variables that SLURM sets.
    "sbatch": """
script=$1; shift
tasks=$(sed -n 's/^#SBATCH --array=0-//p' "$script")
export SLURM_JOB_ID=7 SLURM_ARRAY_JOB_ID=7 SLURM_JOB_NODELIST=nodes
export SLURM_NNODES=${NODES:-$(sed -n 's/^#SBATCH --nodes=//p' "$script")}
for task in $(seq 0 "${TASKS:-${tasks:-0}}"); do SLURM_ARRAY_TASK_ID=$task bash "$script" "$@" & done
code=0
for job in $(jobs -p); do wait "$job" || code=$?; done
exit $code
""",
    # One task per node.
    "srun": """
for node in $(seq "$SLURM_NNODES"); do "$@" & done
code=0
for job in $(jobs -p); do wait "$job" || code=$?; done
exit $code
""",
    "scontrol": """
if [ "$1" = show ]; then echo localhost; echo localhost; fi
echo "scontrol $*" >>"$STUB_LOG"
""",
    "ssh": 'echo "ssh $1" >>"$STUB_LOG"; bash -c "$2"',
}
RECORD = 'import json, os, sys; print(json.dumps(sys.argv[1:]), file=open(os.environ["STUB_LOG"], "a"))'


def stub_environment(folder: Path, command: str, **variables: str) -> dict[str, str]:
    """An environment whose PATH starts with the stubs, and in which `d2g` runs `command`."""
    bin_folder = folder / "bin"
    bin_folder.mkdir()
    for name, text in {**STUBS, "d2g": f'{command} "$@"'}.items():
        (bin_folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (bin_folder / name).chmod(0o755)
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "SLURM"))}
    path = f"{bin_folder}:{os.environ['PATH']}"
    return {**inherited, "PATH": path, "STUB_LOG": str(folder / "log"), **variables}


def run_script(text: str, folder: Path, environment: dict[str, str], *arguments: str, code: int = 0) -> None:
    command = ["bash", "-euo", "pipefail", "-c", text, "script", *arguments]
    process = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert process.returncode == code, process.stdout[-1000:] + process.stderr[-3000:]


def check_arguments(arguments: list[str]) -> None:
    """The command, its options and its preset exist; for `launch`, those of both commands."""
    command, words = get_command(app), list(arguments)
    while (commands := getattr(command, "commands", None)) is not None:
        command = commands[words.pop(0)]
    context = command.make_context(command.name, words)
    if command.name == "launch":
        assert context.args and not context.args[0].startswith("-"), f"d2g launch has no {context.args[0]}"
        check_arguments(context.args)
    else:
        presets = PAIR_PRESETS if command.name == "generate" else DISTILL_PRESETS
        assert context.params["preset"] in presets and not context.args


SCRIPTS: dict[str, tuple[str, dict[str, str], int]] = {
    "sbatch slurm/pairs.sbatch": ("pairs", {}, 16),
    "sbatch slurm/train.sbatch ode": ("ode", {}, 2),
    "sbatch slurm/train.sbatch gan": ("gan", {}, 2),
    "bash ssh/pairs.sh": ("pairs", {"HOSTS": "a b", "GPUS": "2", "FOLDER": "."}, 4),
    "bash ssh/train.sh ode": ("ode", {"HOSTS": "a b", "FOLDER": "."}, 2),
    "bash ssh/train.sh gan": ("gan", {"HOSTS": "a b", "FOLDER": "."}, 2),
}
"""Command line -> (what it runs, variables, number of d2g processes)."""


@pytest.mark.parametrize("line", SCRIPTS)
def test_the_scripts_call_d2g_with_commands_that_parse(line: str, tmp_path: Path) -> None:
    stage, variables, count = SCRIPTS[line]
    environment = stub_environment(
        tmp_path, f"{shlex.quote(sys.executable)} -c {shlex.quote(RECORD)}", **variables
    )
    runner, script, *arguments = line.split()
    run_script(f'{runner} "$@"', tmp_path, environment, str(EXAMPLES / script), *arguments)
    log = (tmp_path / "log").read_text().splitlines()
    calls = [json.loads(record) for record in log if record.startswith("[")]
    assert len(calls) == count and all(call == calls[0] for call in calls)
    assert stage in calls[0] and ("launch" in calls[0]) == (stage != "pairs")
    check_arguments(calls[0])


@pytest.mark.parametrize("code", [130, 138, 1])
def test_a_stopped_slurm_job_asks_for_another_turn(code: int, tmp_path: Path) -> None:
    environment = stub_environment(tmp_path, f"exit {code};", TASKS="0", NODES="1")
    for script, number in (("pairs.sbatch", "7_0"), ("train.sbatch", "7")):
        (tmp_path / "log").unlink(missing_ok=True)
        run_script('sbatch "$@"', tmp_path, environment, str(EXAMPLES / "slurm" / script), "ode", code=code)
        log = (tmp_path / "log").read_text() if (tmp_path / "log").exists() else ""
        stopped = code == 130 or (code == 138 and script == "train.sbatch")
        assert (f"scontrol requeue {number}" in log) == stopped


def yaml_commands(path: Path, folder: Path) -> list[list[str]]:
    """The d2g commands of a YAML file: of its containers, or of a SkyPilot `run` block, which runs."""
    document = yaml.safe_load(path.read_text())
    if "run" not in document:
        return [container["command"][1:] for container in find_containers(document)]
    nodes = str(document.get("num_nodes", 1))
    gpus = document["resources"]["accelerators"].partition(":")[2]
    variables = {"SKYPILOT_NUM_NODES": nodes, "SKYPILOT_NUM_GPUS_PER_NODE": gpus, "SKYPILOT_TASK_ID": "t"}
    commands = []
    for stage in ("ode", "gan"):
        work = folder / stage
        work.mkdir()
        recorder = f"{shlex.quote(sys.executable)} -c {shlex.quote(RECORD)}"
        environment = stub_environment(work, recorder, SKYPILOT_NODE_IPS="10.0.0.1\n10.0.0.2", **variables)
        script = document["run"]
        if "/data" in document["file_mounts"]:  # the bucket is mounted, else `--out` is its URL
            assert script.startswith("cd /data\n")
            script = script.partition("\n")[2]
        assert document["envs"]["PAIRS"].startswith("s3://")
        run_script(script, work, {**environment, **document["envs"], "STAGE": stage})
        commands += [json.loads(line) for line in (work / "log").read_text().splitlines()]
    return commands


def find_containers(value: Any) -> list[dict[str, Any]]:
    if isinstance(value, dict):
        return value.get("containers", []) + find_containers(list(value.values()))
    return [c for child in value for c in find_containers(child)] if isinstance(value, list) else []


@pytest.mark.parametrize("path", YAML_FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_the_yaml_files_hold_commands_that_parse(path: Path, tmp_path: Path) -> None:
    commands = yaml_commands(path, tmp_path)
    assert commands, "the file calls no d2g"
    for command in commands:
        check_arguments(command)


def test_the_jobset_meets_at_a_pod_that_exists() -> None:
    """JobSet names pods SET-JOB-0-0 under the subdomain SET; a node has as many GPUs as its limit."""
    jobset = yaml.safe_load((EXAMPLES / "kubernetes/train.yaml").read_text())
    (job,) = jobset["spec"]["replicatedJobs"]
    name, pods = jobset["metadata"]["name"], job["template"]["spec"]
    (container,) = find_containers(jobset)
    assert pods["parallelism"] == pods["completions"]
    assert f"--rendezvous={name}-{job['name']}-0-0.{name}:29500" in container["command"]
    assert f"--nodes={pods['completions']}" in container["command"]
    assert f"--gpus={container['resources']['limits']['nvidia.com/gpu']}" in container["command"]
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pods["template"]["spec"]["volumes"]}


def test_the_page_names_every_file_and_no_other() -> None:
    text = (ROOT / "docs/launch.md").read_text()
    files = {path.relative_to(ROOT).as_posix() for path in EXAMPLES.rglob("*") if path.is_file()}
    assert set(re.findall(r"examples/launch/[\w./-]+\w", text)) == files
    assert "`d2g pairs generate` needs no launcher." in text


@pytest.mark.long
@pytest.mark.slow
def test_the_slurm_and_ssh_scripts_run_on_the_miniature(warm_python: str, tmp_path: Path) -> None:
    """An array of two pair jobs on one folder, stage 1 on two nodes by srun, stage 2 on two hosts by ssh."""
    (tmp_path / "prompts.txt").write_text("".join(f"a small {c} cube\n" for c in ("red", "blue", "green")))
    command = f"{shlex.quote(warm_python)} -m d2g_cli"
    variables = {**MINIATURE, "PORT": "29713", "TASKS": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    variables["PYTHON_EXEC"] = warm_python  # torchrun starts its processes by it
    hosts = {"HOSTS": "localhost localhost", "FOLDER": "."}
    environment = stub_environment(tmp_path, command, **variables, **hosts)
    slurm = EXAMPLES / "slurm"
    run_script('sbatch "$@"', tmp_path, environment, str(slurm / "pairs.sbatch"))
    assert len(PairReader(tmp_path / "pairs")) == 64
    run_script('sbatch "$@"', tmp_path, environment | {"TASKS": "0"}, str(slurm / "train.sbatch"), "ode")
    run_script('bash "$@"', tmp_path, environment, str(EXAMPLES / "ssh/train.sh"), "gan")
    for stage in ("ode", "gan"):
        assert json.loads((tmp_path / "runs" / stage / "ended.json").read_text())["how"] == "done"
    assert (tmp_path / "log").read_text().count("ssh localhost") == 2
