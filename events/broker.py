"""Who listens in this process. No Django, no I/O: data in, data out.

Streams with the same interest form a group: an event is matched, and the bytes of a burst are joined, once for all of them. A stream that has
everything is *idle* and is handed what is new; one that is behind is left alone, for it reads on from its own cursor (see ``window.py``).
So there is no queue to overflow, and publishing neither waits nor fails, whatever a reader does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from events import metrics
from events.envelope import Envelope, Interest
from events.window import PORTION_BYTES

#: Takes the frames of some events now, or says that it cannot (nothing was taken then).
Sink = Callable[[bytes], bool]


class Attention:
    """An event for one who waits. ``asyncio.Event`` may have many, and keeps 760 bytes of deque for them: per stream."""

    __slots__ = ("_set", "_waiter")

    def __init__(self) -> None:
        self._set = False
        self._waiter: asyncio.Future[None] | None = None

    def set(self) -> None:
        self._set = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def is_set(self) -> bool:
        return self._set

    def clear(self) -> None:
        self._set = False

    async def wait(self) -> None:
        if not self._set:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None


class Subscription:
    """One stream's place in the broker. Lives and dies with the stream.

    ``cursor`` counts while the stream is behind: everything that it wants, up to there, it has. ``attention`` is set whenever
    whoever serves the stream should look: there is something to read, or something else that concerns it. ``handed_at`` is when the
    sink took something last, on the publisher's clock.
    """

    __slots__ = ("attention", "cursor", "handed_at", "idle", "interest", "sink")

    def __init__(self, interest: Interest, cursor: int) -> None:
        self.interest = interest
        self.cursor = cursor
        self.idle = False
        self.sink: Sink | None = None
        self.handed_at = 0.0
        self.attention = Attention()

    def call(self, cursor: int) -> None:
        """There is something after ``cursor``; nothing before it was missed."""
        self.idle = False
        self.cursor = cursor
        self.attention.set()


class Broker:
    """Hands events to every idle subscription that wants them. Publishing never waits and never raises."""

    def __init__(self) -> None:
        self._groups: dict[Interest, dict[Subscription, None]] = {}
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def add(self, interest: Interest, cursor: int) -> Subscription:
        subscription = Subscription(interest, cursor)
        self._groups.setdefault(interest, {})[subscription] = None
        self._size += 1
        return subscription

    def remove(self, subscription: Subscription) -> None:
        group = self._groups.get(subscription.interest, {})
        if subscription in group:
            del group[subscription]
            self._size -= 1
        if not group:
            self._groups.pop(subscription.interest, None)

    def change(self, subscription: Subscription, interest: Interest) -> None:
        """What it may see is another from now on."""
        if interest != subscription.interest:
            self.remove(subscription)
            subscription.interest = interest
            self._groups.setdefault(interest, {})[subscription] = None
            self._size += 1

    def publish(self, events: Sequence[Envelope], now: float) -> None:
        """Some events that follow each other, small enough to be written at once."""
        handed = 0
        for interest, group in list(self._groups.items()):
            wanted = [event for event in events if interest.wants(event.topic, event.audience)]
            if not wanted:
                continue
            frames = b"".join([event.frame for event in wanted])
            # A large one is written bit by bit, by the stream itself.
            large = len(frames) > PORTION_BYTES
            before = wanted[0].id - 1
            direct = 0
            for subscription in list(group):
                if subscription.idle:
                    sink = subscription.sink
                    if sink is not None and not large and sink(frames):
                        subscription.handed_at = now
                        direct += 1
                    else:
                        subscription.call(before)
            handed += direct * len(wanted)
        if handed:
            metrics.EVENTS_DELIVERED.inc(handed)
