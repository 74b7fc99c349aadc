"""The log: append, read, newest, prune. The one place that promises order.

The promise (spec/streams.md, section 2): a reader with a cursor never misses an event because a transaction that took
its id earlier committed later. SQLite has one writer at a time, so ids are taken in the order of commits by itself. On PostgreSQL
a sequence alone does not give that; :func:`append` takes one advisory lock before the id is drawn and holds it to the end of
the transaction. Cost: writers of events queue behind each other from their first event to their commit. Verbs therefore tell last.
"""

from __future__ import annotations

import datetime as dt

from asgiref.sync import async_to_sync
from channels.layers import get_channel_layer
from django.db import connection, transaction

from events import sse
from events.envelope import CATALOGUE, Change, Envelope
from events.models import Event, LogMark

#: The channel-layer group that every hub listens on.
WAKE_GROUP = "switchboard.events"
WAKE_MESSAGE = {"type": "events.wake"}

#: What :func:`read_envelopes` holds at a time, in bytes of frames; it looks after so many rows whether that is reached.
READ_BYTES = 1 << 18
_READ_ROWS = 5

#: Any fixed number: the key of the advisory lock that puts writers of the log in a row.
_ORDER_LOCK = 0x5B_10_60


def append(change: Change) -> Event:
    """Write one change to the log, in the transaction of the change itself.

    :raises ValueError: for a name that is not in the catalogue.
    :raises RuntimeError: outside of a transaction: then change and event could come apart.
    """
    if change.name not in CATALOGUE:
        raise ValueError(f"not in the catalogue of events: {change.name!r}")
    if not connection.in_atomic_block:
        raise RuntimeError("an event is written in the transaction of its change")
    if connection.vendor == "postgresql":
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_advisory_xact_lock(%s)", [_ORDER_LOCK])
    row = Event.objects.create(
        name=change.name,
        topic=change.topic,
        audience=change.audience,
        object_id=change.object_id,
        version=change.version,
        at=change.at,
        actor=change.actor,
        data=dict(change.data),
    )
    transaction.on_commit(_wake, robust=True)
    return row


def _wake() -> None:
    layer = get_channel_layer()
    if layer is not None:
        async_to_sync(layer.group_send)(WAKE_GROUP, WAKE_MESSAGE)


def read(after: int, limit: int = 500, *, upto: int | None = None) -> list[Event]:
    """Events with ``after < id`` (and ``id <= upto``), in the order of the log, at most ``limit``."""
    rows = Event.objects.filter(id__gt=after)
    if upto is not None:
        rows = rows.filter(id__lte=upto)
    return list(rows.order_by("id")[:limit])


def newest() -> int:
    """The cursor of the newest event; of the last pruned one when the log is empty; 0 before the first."""
    last = Event.objects.order_by("-id").values_list("id", flat=True).first()
    return last if last is not None else oldest_cursor()


def oldest_cursor() -> int:
    """The smallest cursor that can be continued without a gap."""
    return LogMark.objects.values_list("pruned_through", flat=True).first() or 0


def prune(before: dt.datetime, limit: int = 10_000) -> int:
    """Delete events that happened before ``before``, oldest first, at most ``limit``; returns how many.

    Only a prefix of the log goes, so that ``oldest_cursor`` says exactly what can still be continued. The very newest event
    stays: its id is what tells a cursor of the future from one of the past.
    """
    with transaction.atomic():
        mark, _ = LogMark.objects.select_for_update().get_or_create(pk=1)
        last = Event.objects.order_by("-id").values_list("id", flat=True).first()
        prefix: list[int] = []
        for pk, at in Event.objects.order_by("id").values_list("id", "at")[:limit]:
            if at >= before or pk == last:
                break
            prefix.append(pk)
        if not prefix:
            return 0
        mark.pruned_through = prefix[-1]
        mark.save()
        Event.objects.filter(id__lte=prefix[-1]).delete()
        return len(prefix)


def envelope(row: Event) -> Envelope:
    """The row as it travels: its frame is encoded here, once for all streams of this process."""
    return Envelope(
        id=row.id,
        name=row.name,
        topic=row.topic,
        audience=row.audience,
        data=row.data,
        frame=sse.frame(row.name, row.data, id=row.id),
    )


def read_envelopes(after: int, limit: int = 500, *, upto: int | None = None) -> list[Envelope]:
    """As :func:`read`, ready to travel, and at most about READ_BYTES: fewer than ``limit`` does not mean that there are no more."""
    found: list[Envelope] = []
    size = 0
    while len(found) < limit and size < READ_BYTES:
        rows = read(found[-1].id if found else after, min(_READ_ROWS, limit - len(found)), upto=upto)
        found.extend(envelope(row) for row in rows)
        size += sum(len(each.frame) for each in found[len(found) - len(rows) :])
        if len(rows) < _READ_ROWS:
            break
    return found
