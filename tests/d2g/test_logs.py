"""d2g.core.logs: messages about all ranks come from rank 0 only."""

import pytest

from d2g.core.logs import EVERY_RANK, logger


@pytest.mark.parametrize(("rank", "expected"), [(0, ["all", "one"]), (1, ["rank 1: one"])])
def test_messages_by_rank(
    rank: int, expected: list[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", str(rank))
    logger.warning("all")
    logger.warning("%s", "one", extra=EVERY_RANK)
    assert caplog.messages == expected
