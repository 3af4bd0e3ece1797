"""Locks of files, with a bound: a process that holds one may be suspended, or hang in a lost network disk."""

import fcntl
import time

POLL_SECONDS = 0.02


def lock_file(descriptor: int, seconds: float) -> bool:
    """Lock an open file against other processes and threads, until it is closed.

    False if the disk has no locks, as some network file systems, or if somebody holds the lock for longer
    than `seconds`. A caller must be right without the lock, too.
    """
    end = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= end:
                return False
            time.sleep(POLL_SECONDS)
        except OSError:
            return False
