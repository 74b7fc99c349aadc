"""The newest part of the log, held once for all streams of a process. No Django, no I/O: data in, data out.

A stream that cannot take an event at once keeps nothing but its cursor, and goes on from here when it can; so a reader that is slow,
stalled or just coming back costs no memory of its own. Who falls out of the window reads older events from the log, in pages that
streams share as well.
"""

from __future__ import annotations

import dataclasses
import itertools
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence

from events.envelope import Envelope

#: What the window holds: bytes of frames, and events (an event of 300 bytes weighs ten times that as an object).
WINDOW_BYTES = 4 << 20
WINDOW_EVENTS = 5000
#: What a stream takes from it at a time, and what is written at a time: one event at least.
PORTION_BYTES = 1 << 16
#: Events that one page holds at most; where pages begin is a multiple of it.
PAGE = 100
#: Bytes of frames in the pages that are remembered.
PAGES_BYTES = 4 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class Portion:
    """Every event that follows a cursor, up to ``through`` and no further."""

    events: Sequence[Envelope]
    through: int


def portions(events: Sequence[Envelope], size: int = PORTION_BYTES) -> list[list[Envelope]]:
    """The events in parts of at most ``size`` bytes of frames; an event that is larger is a part of its own."""
    parts: list[list[Envelope]] = []
    room = 0
    for event in events:
        if not parts or len(event.frame) > room:
            parts.append([])
            room = size
        parts[-1].append(event)
        room -= len(event.frame)
    return parts


class Window:
    """Every event with ``start < id <= end``."""

    def __init__(
        self, at: int = 0, *, limit_bytes: int = WINDOW_BYTES, limit_events: int = WINDOW_EVENTS
    ) -> None:
        self.start = at
        self.end = at
        self._limit_bytes = limit_bytes
        self._limit_events = limit_events
        self._events: list[Envelope] = []
        self._ids: list[int] = []
        self._bytes = 0
        #: For each event the bytes of all frames up to its end, counted since the window was made.
        self._ends: list[int] = []

    def __len__(self) -> int:
        return len(self._events)

    def extend(self, events: Sequence[Envelope]) -> None:
        """The events that follow ``end`` in the log. The oldest make room for them."""
        if not events:
            return
        self._events.extend(events)
        self._ids.extend(event.id for event in events)
        written = self._ends[-1] if self._ends else 0
        self._ends.extend(itertools.accumulate((len(event.frame) for event in events), initial=written))
        del self._ends[-len(events) - 1]
        self._bytes += sum(len(event.frame) for event in events)
        self.end = events[-1].id
        gone = 0
        # The newest stays, however large: the reader that is about to take it is the rule.
        while gone < len(self._events) - 1 and (
            self._bytes > self._limit_bytes or len(self._events) - gone > self._limit_events
        ):
            self._bytes -= len(self._events[gone].frame)
            gone += 1
        if gone:
            self.start = self._ids[gone - 1]
            del self._events[:gone], self._ids[:gone], self._ends[:gone]

    def after(self, cursor: int, size: int = PORTION_BYTES) -> Portion | None:
        """The events that follow, at most ``size`` bytes of frames but at least one; None when some of them are not here any more."""
        if cursor < self.start:
            return None
        first = bisect_right(self._ids, cursor)
        last = first
        if first < len(self._events):
            before = self._ends[first] - len(self._events[first].frame)
            last = max(first + 1, bisect_right(self._ends, before + size))
        events = self._events[first:last]
        return Portion(events, self.end if last == len(self._events) else events[-1].id)


@dataclasses.dataclass(frozen=True, slots=True)
class Page:
    """Every event with ``start < id <= through``, read when the log went back to ``oldest``."""

    start: int
    events: Sequence[Envelope]
    through: int
    oldest: int


class Pages:
    """Older parts of the log that were read lately. The log only grows, so a page stays true."""

    def __init__(self, limit_bytes: int = PAGES_BYTES) -> None:
        self._limit = limit_bytes
        self._pages: OrderedDict[int, Page] = OrderedDict()
        self._bytes = 0

    def find(self, cursor: int) -> Page | None:
        """A page with what follows the cursor."""
        page = next((each for each in self._pages.values() if each.start <= cursor < each.through), None)
        if page is not None:
            self._pages.move_to_end(page.start)
        return page

    def put(self, page: Page) -> None:
        self._forget(page.start)
        self._pages[page.start] = page
        self._bytes += _weight(page)
        while self._bytes > self._limit and len(self._pages) > 1:
            self._forget(next(iter(self._pages)))

    def _forget(self, start: int) -> None:
        gone = self._pages.pop(start, None)
        if gone is not None:
            self._bytes -= _weight(gone)


def _weight(page: Page) -> int:
    return 500 + sum(len(event.frame) for event in page.events)
