"""`d2g …`, `python -m d2g_cli …` and `torchrun … -m d2g_cli …`."""

import os
import sys

from d2g.core.signals import CommandInterrupts


def main() -> None:
    """Run the command line. A signal while it is imported ends it with one line, too."""
    try:
        with CommandInterrupts():
            from d2g_cli.main import main as run
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print("error: interrupted before the start; run the same command again", file=sys.stderr)
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
