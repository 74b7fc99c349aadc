"""What tasks wrote: bytes in the order of writing, each with its offset. The only writer of :class:`TaskOutput`.

Bytes are kept as they came: no line is cut, no character repaired. Up to ``COMMAND_OUTPUT_BYTES`` of a task are kept; how many came
after that is counted, and shown wherever the output is. The row of the task says how much there is, so whoever waits
for more looks at one number. No event is written for output: it would fill the log; :func:`sizes` is what readers ask instead.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
from collections.abc import Collection

from django.conf import settings
from django.db import transaction
from django.db.models import F

from connections.models import Task, TaskOutput
from connections.states import TASK_END, TASK_HELD
from events import waker

#: The largest piece that one read returns, and the largest row.
PIECE_BYTES = 1 << 18


class Gap(Exception):
    """The offset is not where the output ends. ``end`` is where it does."""

    def __init__(self, end: int) -> None:
        super().__init__(f"the output ends at {end}")
        self.end = end


class NotHeld(Exception):
    """The task is not held by whoever writes (any more)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """How much there is: ``end`` is the offset after the last kept byte."""

    end: int
    dropped: int
    status: str

    @property
    def is_over(self) -> bool:
        return self.status in TASK_END


def append(
    *, task_id: str, worker: str, attempt: int, data: bytes, now: dt.datetime, at: int | None = None
) -> Size:
    """Add bytes to the end, as the holder of the task; what passes the limit is counted and dropped.

    :param at: the offset that the writer believes to be the end (dropped bytes count): what came before is known, and is not added again.
    :raises NotHeld: the hold is not the present one.
    :raises Gap: ``at`` is beyond the end.
    """
    with transaction.atomic():
        row = (
            Task.objects.select_for_update()
            .filter(pk=task_id, leased_by=worker, attempts=attempt, status__in=TASK_HELD)
            .only("output_bytes", "output_dropped", "status")
            .first()
        )
        if row is None:
            raise NotHeld(task_id)
        if at is not None:
            end = row.output_bytes + row.output_dropped
            if at > end:
                raise Gap(end)
            data = data[end - at :]
        if not data:
            return Size(end=row.output_bytes, dropped=row.output_dropped, status=row.status)
        kept = data[: max(0, settings.COMMAND_OUTPUT_BYTES - row.output_bytes)]
        dropped = len(data) - len(kept)
        TaskOutput.objects.bulk_create(
            TaskOutput(
                task_id=task_id,
                start=row.output_bytes + offset,
                data=kept[offset : offset + PIECE_BYTES],
                at=now,
            )
            for offset in range(0, len(kept), PIECE_BYTES)
        )
        Task.objects.filter(pk=task_id).update(
            output_bytes=F("output_bytes") + len(kept),
            output_dropped=F("output_dropped") + dropped,
            last_activity_at=now,
        )
        transaction.on_commit(waker.wake, robust=True)
        return Size(end=row.output_bytes + len(kept), dropped=row.output_dropped + dropped, status=row.status)


def read(task_id: str, start: int, limit: int = PIECE_BYTES) -> bytes:
    """Up to ``limit`` bytes from the offset ``start`` on; empty at the end."""
    first = (
        TaskOutput.objects.filter(task_id=task_id, start__lte=start)
        .order_by("-start")
        .values_list("start", flat=True)
        .first()
    )
    if first is None:
        return b""
    found = bytearray()
    pieces = TaskOutput.objects.filter(task_id=task_id, start__gte=first, start__lt=start + limit)
    for begin, data in pieces.order_by("start").values_list("start", "data").iterator(chunk_size=4):
        found += bytes(data)[max(0, start - begin) :]
        if len(found) >= limit:
            break
    return bytes(found[:limit])


def tail(task_id: str, limit: int) -> tuple[int, bytes]:
    """The last ``limit`` bytes and the offset at which they begin."""
    end = Task.objects.values_list("output_bytes", flat=True).get(pk=task_id)
    start = max(0, end - limit)
    return start, read(task_id, start, end - start)


def sizes(task_ids: Collection[str]) -> dict[str, Size]:
    """How much there is of each; tasks that are gone are missing."""
    rows = Task.objects.filter(pk__in=task_ids).values_list("pk", "output_bytes", "output_dropped", "status")
    return {pk: Size(end=end, dropped=dropped, status=status) for pk, end, dropped, status in rows}
