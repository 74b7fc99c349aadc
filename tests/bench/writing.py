"""Events of the log as a worker writes them: each committed by itself."""

from __future__ import annotations

import datetime as dt
import time

from django.db import transaction

from events import log
from events.envelope import Change
from tests.bench import check, pace


def write(first: int, count: int, size: int, *, topic: str, audience: int, rate: float = 0) -> dict[int, int]:
    """Events ``first`` to ``first + count - 1``, ``rate`` a second (0: as fast as it goes); returns when each was committed (ns)."""
    commits: dict[int, int] = {}
    for seq, wait in pace.turns(first, count, rate):
        time.sleep(wait)
        sent = time.monotonic_ns()
        with transaction.atomic():
            # The first to hear of the commit: before the log wakes the hubs.
            transaction.on_commit(lambda seq=seq: commits.__setitem__(seq, time.monotonic_ns()))
            log.append(
                Change(
                    name="task.updated",
                    topic=f"task:{topic}",
                    audience=audience,
                    object_id=topic,
                    version=seq,
                    at=dt.datetime.now(dt.UTC),
                    actor="bench",
                    data=check.payload(seq, sent, size),
                )
            )
    return commits
