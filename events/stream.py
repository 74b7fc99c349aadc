"""What one stream carries: subscribe, take the mark, replay up to it, go live. One loop over the log, no border.

Bytes, headers and endings are the consumer's business; this is tested without HTTP.
"""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncGenerator

from events.broker import Subscription
from events.envelope import Envelope
from events.hub import Hub


@dataclasses.dataclass(frozen=True)
class Events:
    """Events of the log, in its order, each once."""

    batch: list[Envelope]


@dataclasses.dataclass(frozen=True)
class Ready:
    """Caught up and live: everything committed from now on will come."""

    cursor: int


@dataclasses.dataclass(frozen=True)
class Reset:
    """The cursor cannot be continued; the stream goes on from this one."""

    reason: str
    cursor: int


Item = Events | Ready | Reset


async def follow(hub: Hub, subscription: Subscription, *, after: int | None) -> AsyncGenerator[Item]:
    """Everything that the subscription wants after the cursor ``after`` (None: from now on), without end."""
    mark = hub.position
    cursor = mark if after is None else after
    if after is not None:
        oldest, newest = await hub.bounds()
        if after > newest or after < oldest:
            cursor = mark
            yield Reset("unknown_cursor" if after > newest else "retention", cursor)
    told_ready = False
    while True:
        while cursor < mark:
            rows = await hub.read(cursor, upto=mark)
            if rows is None:
                cursor = mark
                yield Reset("retention", cursor)
                break
            cursor = rows[-1].id if rows else mark
            wanted = [row for row in rows if subscription.interest.wants(row.topic, row.audience)]
            if wanted:
                yield Events(wanted)
        if not told_ready:
            told_ready = True
            yield Ready(cursor)
        while not subscription.lost:
            news = [envelope for envelope in subscription.take() if envelope.id > cursor]
            if news:
                cursor = news[-1].id
                yield Events(news)
            else:
                await subscription.wait()
        # Too slow for the queue: what was missed is in the log, up to where the hub is in this very step.
        subscription.found()
        mark = hub.position
