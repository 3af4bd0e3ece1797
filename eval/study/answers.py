"""The answers of a preference study: one JSON lines file, and what they say."""

import errno
import json
import os
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

from d2g.core.atomic_files import cannot_write
from d2g.core.config import differing
from d2g.core.errors import UserError
from d2g.core.json_files import check_type, parse_json
from eval.metrics.intervals import wilson_interval

Choice = Literal["first", "second", "tie"]
"""The preferred model of a study, or neither."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    """The compared sets of images, of the same N prompts. It is the first line of the file."""

    first: str
    second: str
    pairs: int
    prompts_sha256: str
    first_sha256: str
    second_sha256: str
    seed: int = 0
    """Of the orders and sides. A page that is open when the server restarts keeps its sides."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """One comparison. left: the model whose image was on the left. seconds: from showing to answering."""

    user: str
    pair: int
    choice: Choice
    left: Literal["first", "second"]
    seconds: float
    time: float
    """Seconds since 1970."""


class AnswerFile:
    """The file of a study. Answers are appended, each written to the disk before it counts.

    Raises UserError for a file of another study, with the facts that differ, and for damaged lines.
    """

    def __init__(self, path: Path, study: Study) -> None:
        self.path, self.study, self._lock = path, study, threading.Lock()
        self.answers: list[Answer] = []
        if path.exists():
            stored, self.answers = read_answers(path)
            if differ := differing(asdict(stored), asdict(study)):
                raise UserError(
                    f"{path} has answers of another study: {'; '.join(differ)}; choose another --out"
                )
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._append({"study": asdict(study)})

    def add(
        self, user: str, pair: int, choice: Choice, left: Literal["first", "second"], seconds: float
    ) -> None:
        """Append an answer. Raises UserError for a pair that the user has answered, or if it cannot write."""
        answer = Answer(user=user, pair=pair, choice=choice, left=left, seconds=seconds, time=time.time())
        with self._lock:
            if any(earlier.user == user and earlier.pair == pair for earlier in self.answers):
                raise UserError(f"pair {pair} is answered already")
            self._append(asdict(answer))
            self.answers.append(answer)

    def answered(self, user: str) -> set[int]:
        """The pairs that a user has answered."""
        with self._lock:
            return {answer.pair for answer in self.answers if answer.user == user}

    def _append(self, values: Mapping[str, Any]) -> None:
        line = json.dumps(values, ensure_ascii=False).encode() + b"\n"
        length = self.path.stat().st_size if self.path.exists() else 0
        try:
            with open(self.path, "ab", buffering=0) as stream:
                if stream.write(line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(stream.fileno())
        except OSError as error:
            # Half a line would make the file unreadable.
            with suppress(OSError):
                os.truncate(self.path, length)
            raise cannot_write(self.path, error) from error


def read_answers(path: Path) -> tuple[Study, list[Answer]]:
    """The study of a file and its answers. Raises UserError, which names the line, for anything else."""
    try:
        # Names may hold other characters that `splitlines` takes for the end of a line.
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path} ({error}); expected a file of `d2g eval prefer`") from error
    if lines == [""]:
        raise UserError(f"{path} is empty; expected a file of `d2g eval prefer`")
    parsed: list[Any] = []
    for number, line in enumerate(lines, 1):
        try:
            values = parse_json(line)
            kind = Study if number == 1 else Answer
            values = values["study"] if number == 1 else values
            check_type(values, kind)
            parsed.append(kind(**values))
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"{path}, line {number} is no line of a study ({error}); delete it if it was cut off, or "
                "give a file of `d2g eval prefer`"
            ) from error
    return parsed[0], parsed[1:]


def summarize_answers(answers: Sequence[Answer]) -> dict[str, Any]:
    """Counts and win rates of the first model, a tie counting half, with Wilson's 95 % intervals.

    `all`: over all answers. `users`: over users, each by the model that they prefer more often; of those who
    answered at least as often as the median user, as Wuerstchen's section 4.2 does, because few users give
    most answers otherwise. `left`: how often the left image won, which is a half without a bias. Raises
    UserError without answers.
    """
    if not answers:
        raise UserError("there are no answers yet; open the page with `d2g eval prefer` first")
    by_user: dict[str, list[Answer]] = defaultdict(list)
    for answer in answers:
        by_user[answer.user].append(answer)
    # Users who answered at least as often as the median user, and what each prefers.
    enough = median(len(user_answers) for user_answers in by_user.values())
    regular = {user: user_answers for user, user_answers in by_user.items() if len(user_answers) >= enough}
    preferred: list[Choice] = [_preferred(user_answers) for user_answers in regular.values()]
    # Which side won, whatever the model: the left one counts as the first.
    sides: list[Choice] = [
        "tie" if a.choice == "tie" else "first" if a.choice == a.left else "second" for a in answers
    ]
    return {
        "all": _rate([answer.choice for answer in answers]),
        "users": {**_rate(preferred), "at_least": enough, "of": len(by_user)},
        "left": _rate(sides),
        "seconds": median(answer.seconds for answer in answers),
        "per_user": {
            user: _rate([a.choice for a in user_answers]) for user, user_answers in sorted(by_user.items())
        },
    }


def _preferred(answers: Sequence[Answer]) -> Choice:
    counts = Counter(answer.choice for answer in answers)
    if counts["first"] == counts["second"]:
        return "tie"
    return "first" if counts["first"] > counts["second"] else "second"


def _rate(choices: Sequence[Choice]) -> dict[str, Any]:
    counts = Counter(choices)
    rate = (counts["first"] + counts["tie"] / 2) / len(choices)
    low, high = wilson_interval(rate, len(choices))
    return {
        "win_rate": rate,
        "ci": [low, high],
        "wins": counts["first"],
        "ties": counts["tie"],
        "losses": counts["second"],
    }
