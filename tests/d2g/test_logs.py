"""d2g.core.logs: rank 0 speaks for the others, except about what concerns one rank alone."""

import pytest

from d2g.core.logs import EVERY_RANK, logger


@pytest.mark.parametrize(("rank", "expected"), [(0, ["all", "one"]), (1, ["rank 1: one"])])
def test_ranks(
    rank: int, expected: list[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", str(rank))
    logger.warning("all")
    logger.warning("%s", "one", extra=EVERY_RANK)
    assert caplog.messages == expected
