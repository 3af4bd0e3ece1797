"""`d2g …`, `python -m d2g_cli …` and `torchrun … -m d2g_cli …`."""

import os
import sys

from d2g.core.signals import CommandInterrupts


def main() -> None:
    """Run the command line. A signal while it is imported ends it with one line, too."""
    wait_without_spinning()
    try:
        with CommandInterrupts():
            from d2g_cli.main import main as run
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print("error: interrupted before the start; run the same command again", file=sys.stderr)
        sys.exit(130)
    run()


def wait_without_spinning() -> None:
    """Let OpenMP's threads sleep while they wait for each other. Call before torch is imported.

    By default they spin, for a millisecond and more. On cores that other programs use too, the thread that is
    waited for then often cannot run: two threads were 10 times slower than one. A user's own policy stays.
    """
    if "GOMP_SPINCOUNT" not in os.environ:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


if __name__ == "__main__":
    main()
