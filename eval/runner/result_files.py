"""The files of one evaluation in its output folder: the result, and the scores of each image."""

import json
from pathlib import Path

from safetensors.torch import save

from d2g.core.atomic_files import write_atomically
from eval.evaluation import Evaluation


def write_result(folder: Path, evaluation: Evaluation) -> None:
    """Write FOLDER/result.json, and the scores of each image with the prompts to FOLDER/rows.safetensors."""
    rows = evaluation.rows
    scores = {name: values.contiguous() for name, values in rows.values.items() if values.ndim == 1}
    write_atomically(folder / "result.json", json.dumps(evaluation.result.to_json(), indent=1))
    write_atomically(folder / "rows.safetensors", save(scores, {"prompts": json.dumps(rows.prompts)}))
