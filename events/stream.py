"""What one stream carries: replay from its cursor, then live. One loop over the log, no border.

A subscription exists before the first look, so whatever is committed later is either found by a look or handed over.
Bytes, headers and endings are the consumer's business; this is tested without HTTP.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import AsyncGenerator, Sequence

from events import metrics
from events.broker import Subscription
from events.envelope import Envelope
from events.hub import Hub

#: Portions with nothing for a stream that it passes in one go.
PASSED = 8


@dataclasses.dataclass(frozen=True)
class Events:
    """Events of the log, in its order, each once."""

    batch: Sequence[Envelope]


@dataclasses.dataclass(frozen=True)
class Ready:
    """Caught up and live: everything that was committed before the stream was opened has come, and everything from now on will."""

    cursor: int


@dataclasses.dataclass(frozen=True)
class Reset:
    """The cursor cannot be continued; the stream goes on from this one."""

    reason: str
    cursor: int


Item = Events | Ready | Reset


class Follower:
    """Everything that the subscription wants after the cursor ``after`` (None: from now on), piece by piece."""

    def __init__(self, hub: Hub, subscription: Subscription, *, after: int | None) -> None:
        self._hub = hub
        self._subscription = subscription
        self._given = after
        self._opened_at = time.monotonic()
        self._told_ready = False
        self._fell_behind = False

    async def next(self) -> Item | None:
        """The next piece; None when there is no more at present.

        After None the subscription's attention is called as soon as there is more here. Mostly it is idle then, and the broker may hand
        what comes to its sink instead.

        :raises django.db.Error: when the log cannot be read now; nothing is lost, the next call tries again.
        """
        subscription, hub = self._subscription, self._hub
        passed = 0
        if self._given is not None:
            reset = await self._begin(self._given)
            self._given = None
            if reset is not None:
                return reset
        while not subscription.idle:
            if subscription.cursor > hub.position:
                # Another process told its client of events that this one has not read yet.
                hub.call_at(subscription)
                break
            if subscription.cursor == hub.position:
                if not self._told_ready:
                    if not hub.has_looked_since(self._opened_at):
                        # Another process may have committed something a moment before, that this one has not found yet.
                        hub.call_after_look(subscription)
                        break
                    self._told_ready = True
                    return Ready(subscription.cursor)
                # No await since the look above: what comes now finds it idle.
                subscription.idle = True
                self._fell_behind = False
                break
            if self._told_ready and not self._fell_behind and subscription.cursor < hub.window.start:
                self._fell_behind = True
                metrics.FALLBACKS.inc()
            portion = await hub.read(subscription.cursor)
            if portion is None:
                return self._reset("retention", hub.position)
            subscription.cursor = portion.through
            wanted = subscription.interest.of(portion.events)
            if not wanted and passed < PASSED:
                passed += 1
                continue
            metrics.EVENTS_DELIVERED.inc(len(wanted))
            # Also when it is empty: who sees little of a long log has other things to do in between.
            return Events(wanted)
        return None

    async def _begin(self, after: int) -> Reset | None:
        hub = self._hub
        self._subscription.cursor = after
        # Older than the window is asked of nobody here: whoever reads the page finds out whether it is still there.
        if after > hub.window.end:
            _, newest = await hub.bounds()
            if after > newest:
                return self._reset("unknown_cursor", hub.position)
        return None

    def _reset(self, reason: str, cursor: int) -> Reset:
        metrics.RESETS.labels(reason).inc()
        if reason == "retention":
            metrics.EVENTS_SKIPPED.inc(max(0, cursor - self._subscription.cursor))
        self._subscription.cursor = cursor
        return Reset(reason, cursor)


async def follow(hub: Hub, subscription: Subscription, *, after: int | None) -> AsyncGenerator[Item]:
    """The pieces of a :class:`Follower`, for a reader that has nothing else to wait for."""
    follower = Follower(hub, subscription, after=after)
    while True:
        item = await follower.next()
        if item is None:
            await subscription.attention.wait()
            subscription.attention.clear()
        elif not isinstance(item, Events) or item.batch:
            yield item
