"""Talk to benchmarks/latent_lpips_worker.py: one JSON object a line each way."""

import json
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any, Self

SCRIPT = Path(__file__).with_name("latent_lpips_worker.py")


class Worker:
    """A process under `python` in `folder`, asked one thing at a time."""

    def __init__(self, python: str, folder: Path) -> None:
        self.log = (folder / f"worker-{id(self)}.log").open("w+")
        self.process = subprocess.Popen(
            [python, "-u", str(SCRIPT)],
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
        )

    def ask(self, **request: Any) -> dict[str, Any]:
        """Its answer. Raises RuntimeError with the end of its log when it dies instead."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        if not (line := self.process.stdout.readline()):
            self.log.seek(0)
            raise RuntimeError(f"{request} failed:\n{self.log.read()[-3000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.log):
            if stream is not None:
                stream.close()
