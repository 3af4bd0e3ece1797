"""The commands of docs/own-pictures.md run."""

import os
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from d2g.core.captioned_grid import MARGIN, SMALLEST
from own_pictures import image_folder

PAGE = (Path(__file__).parents[1] / "docs" / "own-pictures.md").read_text(encoding="utf-8")


@pytest.mark.long
@pytest.mark.slow
def test_the_commands_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, d2g: Any) -> None:
    """All of them, in order, on 40 small pictures, with the lengths that the page gives for a trial."""
    (tmp_path / "pictures").mkdir()
    image_folder(tmp_path / "pictures")
    monkeypatch.chdir(tmp_path)
    # The first block is `d2g run`, which tests/teacher_training runs with a smaller teacher.
    # Blocks with $F are long runs on photographs.
    blocks = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    whole, block = (text for text in blocks if "$F" not in text)
    assert all(line.startswith(("MINUTES=", "d2g run --data pictures")) for line in whole.splitlines())
    outputs = {}
    for line in block.splitlines():
        if assignment := re.fullmatch(r'([A-Z]+)=(?:"(.*)"|(.*))', line):
            monkeypatch.setenv(assignment[1], assignment[2] or assignment[3])
        elif line:
            words = shlex.split(os.path.expandvars(line), comments=True)
            assert words[0] == "d2g"
            ended = d2g(*words[1:])
            assert ended.code == 0, (line, ended.stderr)
            outputs[" ".join(words[1:3])] = ended
    # What each command promises.
    assert "plan: 40 pictures, 40 of them with a caption" in outputs["teacher train"].stderr
    assert "this teacher is not trained" in outputs["teacher info"].stdout
    assert "these pairs are" in outputs["pairs stats"].stdout
    assert "no --preset: miniature, because teacher teacher" in outputs["distill gan"].stderr
    assert "no --features: efficientnet-lite0, because Inception's weights" in outputs["eval run"].stderr
    assert "held-out real pictures" in outputs["eval run"].stdout
    assert (tmp_path / "teacher" / "report.html").is_file() and (tmp_path / "results/report.html").is_file()
    # 8 different captions: student and teacher side by side.
    with Image.open(tmp_path / "samples" / "both" / "grid.png") as grid:
        assert grid.width == 2 * (SMALLEST + MARGIN) + MARGIN and grid.height > 8 * (SMALLEST + MARGIN)
