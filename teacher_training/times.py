"""The time of each part of a run, over all its starts."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from d2g.core.atomic_files import write_atomically
from d2g.core.distributed import process_group
from d2g.core.json_files import read_json


class PartTimes:
    """Seconds by part. With a file they add up over all starts of a run."""

    def __init__(self, file: Path | None = None) -> None:
        self.file, self.seconds = file, dict[str, float]()
        if file is not None and file.is_file():
            self.seconds = read_json(file, f"delete {file}, it holds timings only", dict[str, float])

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Add the time of the block, also of one that is interrupted."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds[part] = self.seconds.get(part, 0.0) + time.monotonic() - started
            if self.file is not None and process_group.rank() == 0:
                write_atomically(self.file, json.dumps(self.seconds, indent=1))
