"""The environment variables by which a launcher, such as torchrun, makes a process one of many."""

import os

from d2g.core.errors import UserError


def check_launcher() -> None:
    """Raise UserError for variables that are no whole numbers, or for a rank that the world does not have."""
    for name, least in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)):
        value = os.environ.get(name, str(least))
        if not (value.isascii() and value.isdecimal() and int(value) >= least):
            raise UserError(
                f"{name} is {value!r} in the environment; expected a whole number from {least} on, as "
                f"torchrun sets it; unset {name}, or start with `d2g launch`"
            )
    rank, world = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
    if rank is not None and world is not None and int(rank) >= int(world):
        raise UserError(
            f"RANK is {rank} in the environment, but WORLD_SIZE is {world}; expected a rank from 0 to "
            f"{int(world) - 1}; start with torchrun or `d2g launch`, or unset both"
        )
