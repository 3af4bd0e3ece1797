"""Runs `d2g` from a checkout: `python cli.py …`."""

from d2g_cli.__main__ import main

if __name__ == "__main__":
    main()
