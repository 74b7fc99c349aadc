"""Who listens in this process, and a bounded queue for each. No Django, no I/O: data in, data out.

A reader whose queue is full is not sent what it missed from memory: it is marked ``lost`` and goes back to the log at its own pace,
so it misses nothing, holds nobody up and costs no more than the bound.
"""

from __future__ import annotations

import asyncio
from collections import deque

from events.envelope import Envelope, Interest

QUEUE_LIMIT = 200
#: Bytes of frames; one event may be larger than that by itself.
QUEUE_BYTES = 1 << 18


class Subscription:
    """One stream's place in the broker. Lives and dies with the stream."""

    __slots__ = ("_bytes", "_news", "_queue", "interest", "limit", "lost")

    def __init__(self, interest: Interest, *, limit: int = QUEUE_LIMIT) -> None:
        self.interest = interest
        self.limit = limit
        self.lost = False
        self._queue: deque[Envelope] = deque()
        self._bytes = 0
        self._news = asyncio.Event()

    def __len__(self) -> int:
        return len(self._queue)

    def offer(self, envelope: Envelope) -> None:
        """Put one event in the queue; when it is full, let go of all of it and remember that."""
        if self.lost or not self.interest.wants(envelope.topic, envelope.audience):
            return
        size = len(envelope.frame)
        if len(self._queue) >= self.limit or (self._queue and self._bytes + size > QUEUE_BYTES):
            self._clear()
            self.lost = True
        else:
            self._queue.append(envelope)
            self._bytes += size
        self._news.set()

    def take(self) -> list[Envelope]:
        """Everything that is queued, in order; the queue is empty after it."""
        taken = list(self._queue)
        self._clear()
        if not self.lost:
            self._news.clear()
        return taken

    def found(self) -> None:
        """The reader is about to read the log up to the present: queue for it again."""
        self._clear()
        self.lost = False
        self._news.clear()

    def _clear(self) -> None:
        self._queue.clear()
        self._bytes = 0

    async def wait(self) -> None:
        """Until there is something to take, or the queue was lost."""
        await self._news.wait()


class Broker:
    """Hands each event to every subscription that wants it. Publishing never waits and never raises."""

    def __init__(self) -> None:
        self._subscriptions: set[Subscription] = set()

    def __len__(self) -> int:
        return len(self._subscriptions)

    def add(self, interest: Interest, *, limit: int = QUEUE_LIMIT) -> Subscription:
        subscription = Subscription(interest, limit=limit)
        self._subscriptions.add(subscription)
        return subscription

    def remove(self, subscription: Subscription) -> None:
        self._subscriptions.discard(subscription)

    def publish(self, envelope: Envelope) -> None:
        for subscription in self._subscriptions:
            subscription.offer(envelope)
