"""The log of all packages, `logging.getLogger("d2g")`: under torchrun, rank 0 alone writes it."""

import logging
import os
from threading import Lock

EVERY_RANK = {"every_rank": True}
"""`extra` of a record that every rank logs, because it is about this rank's own files or rows."""

logger = logging.getLogger("d2g")


def _passes(record: logging.LogRecord) -> bool:
    """Drop records of ranks above 0, except those with `EVERY_RANK`, which are marked with their rank."""
    rank = int(os.environ.get("RANK", 0))
    if rank and not getattr(record, "every_rank", False):
        return False
    if rank:
        record.msg = f"rank {rank}: {record.msg}"
    return True


logger.addFilter(_passes)

_once_lock, _once_keys = Lock(), set[str]()


def log_once(text: str, key: str = "", level: int = logging.INFO) -> None:
    """Log a line, unless this process has logged it before, or one with the same `key`."""
    with _once_lock:
        if (key or text) in _once_keys:
            return
        _once_keys.add(key or text)
    logger.log(level, "%s", text)
