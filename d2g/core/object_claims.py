"""Claims as objects of an object store (`d2g.core.claims`).

A claim is created only if there is none. Its owner replaces it by one with the next number of its counter, if
it is still the version that the owner wrote last; so does a job that takes it over. The e-tags of one listing
tell every job which counters have increased: no clock of a machine or of the store is read.
"""

import json
import uuid
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from d2g.core.claims import WorkClaims, parse_claim
from d2g.core.errors import UserError
from d2g.core.logs import EVERY_RANK, logger
from d2g.core.object_store import ListedObject, ObjectStore, Version, bare_tag

LONGEST_POLL = 5.0


class ObjectClaims(WorkClaims):
    """The claims of one process on numbered pieces of work, as objects FOLDER/STEM-00000.json of `store`."""

    def __init__(self, store: ObjectStore, folder: str, stem: str, patience: float = 120.0) -> None:
        super().__init__(patience)
        self.poll_seconds = min(LONGEST_POLL, patience / 8)
        self.store, self.folder, self.stem = store, folder, stem
        self._held: dict[int, Version] = {}  # number -> what this process wrote last
        self._taken: set[int] = set()  # claims of this process that another job has taken over
        self._listed: dict[str, ListedObject] = {}
        self._contents: dict[int, tuple[str, dict[str, Any]]] = {}  # number -> (e-tag, content)
        self._id, self._beats = uuid.uuid4().hex, 0

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            super().__exit__(kind, error, trace)
        except UserError as lost:  # the network: an error that came before says more
            logger.warning(
                "claims are not released (%s); other jobs take them over after %g seconds",
                *(lost, self.patience),
                extra=EVERY_RANK,
            )

    def take(self, numbers: Sequence[int]) -> int | None:
        self._listed = self.store.list(self.folder)
        return super().take(numbers)

    def held(self) -> list[int]:
        return list(self._held)

    def lost(self, number: int) -> bool:
        # The heartbeat finds out, also at once after this process was suspended.
        return number in self._taken

    def release(self, number: int) -> None:
        # A renewal shows that the claim is this process's, and nobody takes a fresh claim over.
        with self._guard:
            try:
                if number not in self._taken and self._renew(number):
                    self.store.remove(self._name(number))
            finally:
                self._held.pop(number)
                self._taken.discard(number)

    def _name(self, number: int) -> str:
        return f"{self.folder}/{self._file(number)}"

    def _file(self, number: int) -> str:
        return f"{self.stem}-{number:05d}.json"

    def _content(self) -> bytes:
        """A claim that no other write has the content of."""
        self._beats += 1
        return json.dumps(self._own_claim() | {"job": self._id, "beat": self._beats}).encode()

    def _create(self, number: int) -> bool:
        # The listing saves a request for each claim that was there.
        if self._file(number) in self._listed:
            return False
        return self._enter(number, self.store.create(self._name(number), self._content()))

    def _take_over(self, number: int) -> bool:
        listed = self._listed.get(self._file(number))
        if listed is None or not self._dead(number, (0, listed.e_tag)):
            return False
        # Replace the claim that was found dead, and no other.
        now = self.store.read(self._name(number))
        if now is None or bare_tag(now[1]) != listed.e_tag:
            return False
        self._observed.pop(number, None)
        return self._enter(number, self.store.replace(self._name(number), self._content(), now[1]))

    def _enter(self, number: int, version: Version | None) -> bool:
        if version is None:
            return False  # another job was quicker
        with self._guard:
            self._held[number] = version
        self._alive.discard(number)
        return True

    def _read(self, number: int) -> dict[str, Any]:
        # A claim of a machine whose counter has increased is read no more: its counter says enough.
        listed = self._listed.get(self._file(number))
        known = self._contents.get(number)
        if known is not None and (number in self._alive or (listed and listed.e_tag == known[0])):
            return known[1]
        now = self.store.read(self._name(number))
        if now is None:
            return {}
        content = parse_claim(now[0])
        self._contents[number] = bare_tag(now[1]), content
        return content

    def _renew(self, number: int) -> bool:
        """Increment the counter of a held claim; False if it has another owner now. Needs the guard."""
        version = self.store.replace(self._name(number), self._content(), self._held[number])
        if version is None:
            self._taken.add(number)
            return False
        self._held[number] = version
        return True

    def _increment_held(self) -> None:
        for number in self.held():
            try:
                with self._guard:
                    if number in self._held and number not in self._taken:
                        self._renew(number)
            except UserError as error:
                logger.warning(
                    "the claim on %s is not renewed (%s); trying again",
                    *(self._file(number), error),
                    extra=EVERY_RANK,
                )
