"""Writes tests/golden/elatentlpips.json: distances of the authors' package on random weights in its file
format.

python benchmarks/elatentlpips_golden.py THEIR_PYTHON

THEIR_PYTHON is the interpreter of an environment with elatentlpips 0.2 (CC-BY-NC-4.0; do not install it in
our environment):

uv venv --python 3.11 theirs
    uv pip install --python theirs/bin/python torch==OURS torchvision requests psutil scipy matplotlib tqdm
    uv pip install --python theirs/bin/python --no-deps elatentlpips==0.2 "setuptools<70"
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import authors  # noqa: E402
from benchmarks.worker import Worker  # noqa: E402
from d2g.core.seeds import noise  # noqa: E402

CASES: list[dict[str, Any]] = [
    {"space": "sd15", "channels": 4, "weights": 11, "size": [16, 16]},
    {"space": "sd15", "channels": 4, "weights": 11, "size": [12, 20]},
    {"space": "sd21", "channels": 4, "weights": 11, "size": [8, 8], "normalize": True},
    {"space": "sdxl", "channels": 4, "weights": 11, "size": [8, 8], "normalize": True},
    {"space": "sd3", "channels": 16, "weights": 12, "size": [16, 16]},
    {"space": "sd3", "channels": 16, "weights": 12, "size": [8, 8], "normalize": True},
    {"space": "flux", "channels": 16, "weights": 12, "size": [8, 8], "normalize": True},
    {"space": "flux", "channels": 16, "weights": 12, "size": [8, 8], "l1": True},
]
"""`weights` is the seed for tests/authors.py. Inputs are rows of d2g.core.seeds.noise(3, …); with
`normalize` they are raw latents.
"""


def distances(python: str, case: dict[str, Any], folder: Path) -> list[float]:
    """Return the package's distances without augmentation, computed in a separate process."""
    checkpoints = folder / "ckpt"
    checkpoints.mkdir(exist_ok=True)
    space, channels, seed = case["space"], case["channels"], case["weights"]
    authors.trunk_file(checkpoints / f"{space}_latent_vgg16.pth.tar", channels, seed)
    authors.tuned_file(checkpoints / f"{space}_latest_vgg16_tuned.pth", channels, seed)
    shape = (channels, *case["size"])
    torch.save(tuple(noise(3, rows, shape) for rows in ((0, 1), (2, 3))), folder / "inputs.pt")
    with Worker(python, folder) as worker:
        worker.ask(do="open", who="theirs", space=space, threads=1)
        changes = {
            "ensembling": False,
            "add_l1_loss": case.get("l1", False),
            "normalize": case.get("normalize", False),
        }
        result: list[float] = worker.ask(do="distance", inputs="inputs.pt", changes=changes)["distance"]
        return result


def main() -> None:
    """Compute the distances of all cases and write the file."""
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    python = str(Path(sys.argv[1]).absolute())
    with tempfile.TemporaryDirectory() as folder:
        cases = [{**case, "distance": distances(python, case, Path(folder))} for case in CASES]
    code = "import torch, importlib.metadata as m; print(m.version('elatentlpips'), torch.__version__)"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    versions = done.stdout.split()
    text = {
        "made_by": "python benchmarks/elatentlpips_golden.py THEIR_PYTHON",
        "elatentlpips": versions[0],
        "torch": versions[1],
        "cases": cases,
    }
    (ROOT / "tests" / "golden" / "elatentlpips.json").write_text(json.dumps(text, indent=1) + "\n")


if __name__ == "__main__":
    main()
