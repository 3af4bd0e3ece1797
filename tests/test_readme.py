"""The commands of the README run."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from pairgen.store.reader import PairReader

ROOT = Path(__file__).parents[1]
TRIAL = {"SD": "miniature", "LPIPS": "miniature/weights/teacher/latent_lpips", "PRESET": "trial", "GPUS": "2"}


def bash_block(content: str) -> str:
    """The only bash block of the README that contains `content`."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (block,) = [text for text in blocks if content in text]
    return str(block)


@pytest.mark.slow
def test_the_commands_of_a_run(warm_python: str, tmp_path: Path) -> None:
    """Pairs, both stages and sampling, with the README's trial settings, in a copy of the repository."""
    skip = shutil.ignore_patterns(".git", ".venv", "tests", "docs", "__pycache__", ".*_cache")
    tree = shutil.copytree(ROOT, tmp_path / "clone", ignore=skip)
    (tree / "prompts.txt").write_text(
        "".join(f"a small {color} cube\n" for color in ("red", "blue", "green"))
    )
    for name, value in TRIAL.items():
        assert f"{name}={value}" in (ROOT / "README.md").read_text(), f"the README does not offer {name}"
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith("PYTEST")},
        **TRIAL,
        "UV_NO_SYNC": "1",  # use the environment that runs this test
        "UV_PROJECT_ENVIRONMENT": str(ROOT / ".venv"),
        "OMP_NUM_THREADS": "1",
        "PYTHON_EXEC": warm_python,  # by which torchrun starts its processes
    }
    process = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", bash_block("pairs generate")],
        cwd=tree,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    assert len(PairReader(tree / "pairs")) == 64
    assert len(list((tree / "samples").glob("*.png"))) == 2, "one image and the grid"
