"""The log: append, read, newest, prune. The one place that promises order.

The promise (spec/streams.md, section 2): a reader with a cursor never misses an event because a transaction that took
its id earlier committed later. SQLite has one writer at a time, so ids are taken in the order of commits by itself. On PostgreSQL
a sequence alone does not give that: an id is drawn before the commit, and commits overtake each other.

The choice: :func:`append` takes one advisory lock before the id is drawn and holds it to the end of the transaction. PostgreSQL lets go
of it only after the commit can be seen, so whoever draws the next id commits later. What it was chosen from, with 8 writers on 2
cores (``python -m tests.bench.order --seconds 2``, fsync off; a transaction that ends at its event | that goes on for 0 to 4 ms after it):

=================================  ===================  ============================================================================
way                                writes a second      events that a reader with a cursor missed
=================================  ===================  ============================================================================
no lock                            4,576 | 2,587        8 % | 59 %
one lock (this)                    2,456 | 364          none
eight locks, by topic              3,644 | 1,614        6 % | 48 %: the shards overtake each other
eight locks, a cursor for each     3,976 | 1,683        none, but a client would have to keep eight cursors
cursor (xid, id) with watermark    5,459 | 2,751        none, but nobody sees anything while any transaction of the cluster that
                                                        wrote is open, and the cursors do not survive a dump and restore
=================================  ===================  ============================================================================

The cost: transactions that tell queue from their first event to their commit. Verbs therefore lock and write everything first and tell
last: with 0 to 4 ms of work *before* the event one lock gives 2,042 writes a second, and no lock at all 2,476. With ``--fsync`` each
commit waits for the disk inside the queue: 1,777 | 338 (no lock: 3,770 | 2,113). Transactions that tell nothing never wait.

The limits:

- One database writes about as many events a second as it can commit one after the other. On a disk that takes 5 ms that is 200.
- A writer that stops in the middle holds up every other one. When its process dies the database ends its transaction; when it only
  hangs, ``idle_in_transaction_session_timeout`` and ``lock_timeout`` of the settings decide how long.
- After its first event a transaction must not wait for a row: who has that row may be waiting to tell, and PostgreSQL would have to
  end one of the two. The lock of the log is the last one in the order of locks.
- Rolled back ids are gaps; readers step over them. Ids must come from the sequence, and its cache must stay 1 (the default).
- Reading from a replica is not supported: it has the same order but lags, so that a cursor of the primary looks like one of the future, and
  a GET may be older than the event. Through PgBouncer, pooling by transaction is enough: the lock belongs to the transaction.

Retention: :func:`prune` deletes a prefix by primary key in small transactions, never takes the lock of the order, and makes neither
writers nor readers wait. The deleted rows' space is used again after a vacuum (the migration ``vacuum_of_the_log`` has autovacuum come by
amount), so the table stays as large as its largest content: 5 times 20,000 rows written and pruned grew neither table nor indexes after
the second time. Partitions would give the space back to the system, but dropping one locks out all readers for a moment, and a
forgotten next partition stops every verb. SQLite uses freed pages again; its file does not shrink (``VACUUM`` does that).
"""

from __future__ import annotations

import datetime as dt
import json
import time
from collections.abc import Sequence
from typing import Any

from django.db import connection, transaction

from events import sse, waker
from events.envelope import CATALOGUE, SIGNAL_NAMES, Change, Envelope
from events.models import Event, LogMark

#: What :func:`read_envelopes` holds at a time, in bytes of frames. Its first look asks for so many rows, to learn how large they are.
READ_BYTES = 1 << 18
_FIRST_ROWS = 8

#: Any fixed number: the key of the advisory lock that puts writers of the log in a row. Locks of this kind belong to one database;
#: Django takes none, and the one other here is ``events.clients.NEWCOMERS_LOCK``, which is taken long before this one.
ORDER_LOCK = 0x5B_10_60

_COLUMNS = ("name", "topic", "audience", "object_id", "version", "at", "actor", "data")
#: Rows of one INSERT: a statement holds only so many values.
_ROWS_AT_ONCE = 100

#: Rows deleted in one transaction: on SQLite it is the one write lock of the database that is held meanwhile.
PRUNE_BATCH = 1000


def append(change: Change) -> Event:
    """Write one change to the log, in the transaction of the change itself; the last thing that a verb does.

    On PostgreSQL this waits for the transaction that told before, and lets no other tell until this one ends. The lock is asked for
    at every event, also at the second of a transaction: it costs a look in the session's own table, and a savepoint that was rolled
    back has given up what was locked inside.

    :raises ValueError: for a name that is not in the catalogue.
    :raises RuntimeError: outside of a transaction: then change and event could come apart.
    :raises OperationalError: the writer before did not end within the ``lock_timeout`` of the settings; the change is rolled back.
    """
    return append_all([change])[0]


def append_all(changes: Sequence[Change]) -> list[Event]:
    """As :func:`append`, for the changes of one transaction, in this order: one lock, one statement and one wake-up for all."""
    for change in changes:
        if change.name not in CATALOGUE and change.name not in SIGNAL_NAMES:
            raise ValueError(f"not in the catalogue of events: {change.name!r}")
    if not connection.in_atomic_block:
        raise RuntimeError("an event is written in the transaction of its change")
    if connection.vendor == "postgresql":
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_advisory_xact_lock(%s)", [ORDER_LOCK])
    rows: list[Event] = []
    for begin in range(0, len(changes), _ROWS_AT_ONCE):
        rows += _insert(changes[begin : begin + _ROWS_AT_ONCE])
    transaction.on_commit(waker.wake, robust=True)
    return rows


def _insert(changes: Sequence[Change]) -> list[Event]:
    """The rows of one INSERT, which draw their ids in the order in which they stand there. Without the ORM, as :func:`_envelopes_after`: every verb
    comes through here with the log locked behind it, and building the statement took longer than the database does."""
    rows = [
        Event(
            name=change.name,
            topic=change.topic,
            audience=change.audience,
            object_id=change.object_id,
            version=change.version,
            at=change.at,
            actor=change.actor,
            data=dict(change.data),
        )
        for change in changes
    ]
    table = connection.ops.quote_name(Event._meta.db_table)
    one = f"({', '.join(['%s'] * len(_COLUMNS))})"
    values: list[Any] = []
    for row in rows:
        at = connection.ops.adapt_datetimefield_value(row.at)
        values += [
            row.name,
            row.topic,
            row.audience,
            row.object_id,
            row.version,
            at,
            row.actor,
            json.dumps(row.data),
        ]
    with connection.cursor() as cursor:
        cursor.execute(
            f"INSERT INTO {table} ({', '.join(_COLUMNS)}) VALUES {', '.join([one] * len(rows))} RETURNING id",  # noqa: S608 (no word of it is from outside)
            values,
        )
        ids = cursor.fetchall()
    for row, (pk,) in zip(rows, ids, strict=True):
        row.pk = pk
        row._state.adding = False
    return rows


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


def prune(before: dt.datetime, limit: int = PRUNE_BATCH) -> int:
    """Delete events that happened before ``before``, oldest first, at most ``limit``; returns how many. One transaction.

    Only a prefix of the log goes, so that ``oldest_cursor`` says exactly what can still be continued. The very newest event
    stays: its id is what tells a cursor of the future from one of the past. Writers and readers do not wait for this on
    PostgreSQL (it takes the row of the mark and the rows that go); on SQLite writers wait for one batch.
    """
    LogMark.objects.get_or_create(pk=1)
    with transaction.atomic():
        mark = LogMark.objects.select_for_update().get(pk=1)
        last = newest()
        prefix: list[int] = []
        # From the mark on: a walk from 0 would step over the index entries of everything that was deleted since the last vacuum.
        rows = Event.objects.filter(id__gt=mark.pruned_through).order_by("id").values_list("id", "at")
        for pk, at in rows[:limit]:
            if at >= before or pk == last:
                break
            prefix.append(pk)
        if not prefix:
            return 0
        mark.pruned_through = prefix[-1]
        mark.save()
        Event.objects.filter(id__lte=prefix[-1]).delete()
        return len(prefix)


def prune_all(before: dt.datetime, *, seconds: float | None = None) -> int:
    """:func:`prune` in batches until nothing is left or ``seconds`` are over (None: no limit); returns how many went.

    After each batch it rests as long as the batch took: SQLite's writers do not queue, they try again now and then, and without
    the rest would hardly find the lock free.
    """
    end = None if seconds is None else time.monotonic() + seconds
    count = 0
    while True:
        began = time.monotonic()
        gone = prune(before, PRUNE_BATCH)
        count += gone
        now = time.monotonic()
        if gone < PRUNE_BATCH or (end is not None and now >= end):
            return count
        time.sleep(now - began)


def vacuum() -> bool:
    """PostgreSQL: make the space of what was pruned usable now, not when autovacuum comes by. False where there is nothing to do.

    Locks neither readers nor writers out. It reads the indexes whole when more than two percent of the table's pages went: of a
    long log that takes its time. For commands, therefore, and not for sweeps.
    """
    if connection.vendor != "postgresql" or connection.in_atomic_block:
        return False
    with connection.cursor() as cursor:
        # SKIP_LOCKED: where autovacuum is at it already, there is nothing to do.
        cursor.execute(
            f"VACUUM (SKIP_LOCKED, TRUNCATE FALSE) {connection.ops.quote_name(Event._meta.db_table)}"
        )
    return True


def envelope(row: Event) -> Envelope:
    """The row as it travels."""
    return _envelope(row.id, row.name, row.topic, row.audience, row.data)


def _envelope(pk: int, name: str, topic: str, audience: int, data: Any) -> Envelope:
    """Its frame is encoded here, once for all streams of this process."""
    return Envelope(
        id=pk, name=name, topic=topic, audience=audience, data=data, frame=sse.frame(name, data, id=pk)
    )


def read_envelopes(after: int, limit: int, *, upto: int | None = None) -> tuple[list[Envelope], bool]:
    """Events that follow ``after``, ready to travel: at most ``limit``, and about READ_BYTES of them.

    Returns them with whether that was all there is.
    """
    found: list[Envelope] = []
    size = 0
    ask = _FIRST_ROWS
    while len(found) < limit and size < READ_BYTES:
        ask = min(ask, limit - len(found))
        more = _envelopes_after(found[-1].id if found else after, ask, upto)
        found += more
        size += sum(len(each.frame) for each in more)
        if len(more) < ask:
            return found, True
        ask = _rows_for(READ_BYTES - size, found, size)
    return found, False


def _envelopes_after(after: int, limit: int, upto: int | None) -> list[Envelope]:
    """As :func:`read`, without the ORM: every process that follows the log does this many times a second, and building the statement and the rows
    was nine tenths of it."""
    table = connection.ops.quote_name(Event._meta.db_table)
    until = "" if upto is None else "AND id <= %s"
    values = [after, *(() if upto is None else (upto,)), limit]
    with connection.cursor() as cursor:
        cursor.execute(
            f"SELECT id, name, topic, audience, data FROM {table} WHERE id > %s {until} ORDER BY id LIMIT %s",  # noqa: S608 (no word of it is from outside)
            values,
        )
        rows = cursor.fetchall()
    return [
        _envelope(pk, name, topic, audience, json.loads(data)) for pk, name, topic, audience, data in rows
    ]


def tail(limit: int, limit_bytes: int) -> tuple[list[Envelope], int]:
    """The newest events, in order, within both limits; and the cursor that they follow."""
    newest_first: list[Envelope] = []
    size = 0
    ask = _FIRST_ROWS
    while len(newest_first) < limit and size < limit_bytes:
        ask = min(ask, limit - len(newest_first))
        rows = Event.objects.order_by("-id")
        if newest_first:
            rows = rows.filter(id__lt=newest_first[-1].id)
        more = [envelope(row) for row in rows[:ask]]
        newest_first += more
        size += sum(len(each.frame) for each in more)
        if len(more) < ask:
            # The log has no more: what comes before the first event was pruned, or never was.
            return newest_first[::-1], oldest_cursor()
        ask = _rows_for(limit_bytes - size, newest_first, size)
    return newest_first[::-1], newest_first[-1].id - 1


def _rows_for(room: int, found: list[Envelope], size: int) -> int:
    """How many rows to ask for next: what should fit when they are like those that were found."""
    return max(1, room * len(found) // max(1, size))
