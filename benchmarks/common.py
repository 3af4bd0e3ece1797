"""Helpers of the benchmarks: timing, and result files with date, hardware and versions."""

import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("torch", "diffusers", "numpy", "h5py", "diffusion2gan")


def hardware() -> str:
    """One line that describes the machine."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, {os.cpu_count()} CPU cores"
    name = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = names[0].partition(":")[2].strip() if names else name
    return f"{os.cpu_count()} cores of {name}, no GPU"


def environment(packages: Sequence[str] = PACKAGES) -> list[str]:
    """Hardware, command, commit, versions and load average, as lines of markdown."""
    commit, dirty = git("rev-parse", "--short", "HEAD"), git("status", "--porcelain", "-uno")
    script = Path(sys.argv[0])
    command = shlex.join(["python", f"{script.parent.name}/{script.name}", *sys.argv[1:]])
    return [
        f"- hardware: {hardware()}, {torch.get_num_threads()} threads",
        f"- command: `{command}`",
        f"- commit: {commit or 'unknown'}{' and uncommitted changes' if dirty else ''}",
        f"- versions: Python {platform.python_version()}, "
        + ", ".join(f"{name} {installed_version(name)}" for name in packages),
        f"- load average of the last minute at the end: {os.getloadavg()[0]:.1f}",
    ]


def git(*arguments: str) -> str:
    """The output of a git command in this checkout; empty without git or outside a repository."""
    if shutil.which("git") is None:
        return ""
    done = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True)
    return done.stdout.strip()


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation as text; one value alone."""
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{deviation}"


def installed_version(package: str) -> str:
    """The version of an installed package; a plain checkout of this project is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def card() -> str:
    """The GPU's name in a file name, or "cpu"."""
    if not torch.cuda.is_available():
        return "cpu"
    return "-".join(torch.cuda.get_device_name().lower().replace("/", " ").split())


def compare(
    contestants: Mapping[str, Callable[[], object]], repeats: int, warm_up: int = 1
) -> dict[str, list[float]]:
    """Seconds of every call by contestant. They take turns, so that a busy machine slows all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for repeat in range(warm_up + repeats):
        for name, run in contestants.items():
            started = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if repeat >= warm_up:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def median(seconds: Sequence[float]) -> float:
    """Median of some times."""
    return statistics.median(seconds)


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """Lines of a markdown table, floats with four digits."""

    def cell(value: object) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(cell(value) for value in line) + " |" for line in lines]


def write(topic: str, title: str, lines: Sequence[str]) -> Path:
    """Write benchmarks/TOPIC_DATE_DEVICE.md with the environment on top, and return its path."""
    device = torch.cuda.get_device_name().split()[-1].lower() if torch.cuda.is_available() else "cpu"
    path = Path(__file__).parent / f"{topic}_{date.today().isoformat()}_{device}.md"
    path.write_text("\n".join([f"# {title}", "", *environment(), "", *lines, ""]), encoding="utf-8")
    print(path.read_text(encoding="utf-8"))
    return path
