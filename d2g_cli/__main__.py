"""`python -m d2g_cli …` and `torchrun … -m d2g_cli …`."""

from d2g_cli.main import main

if __name__ == "__main__":
    main()
