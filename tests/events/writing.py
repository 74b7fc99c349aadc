"""Writing to the log from tests: as verbs do it, from threads of their own."""

from __future__ import annotations

import datetime as dt
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from django.db import connection, transaction

from events import log
from events.envelope import Change

NOW = dt.datetime(2026, 3, 1, 12, tzinfo=dt.UTC)


def change(number: int = 0, **overrides: Any) -> Change:
    return Change(
        **{
            "name": "task.status",
            "topic": f"task:t{number}",
            "audience": 1,
            "object_id": f"t{number}",
            "version": number,
            "at": NOW,
            "actor": "test",
            "data": {"id": f"t{number}", "version": number},
            **overrides,
        }
    )


def write(*numbers: int, **overrides: Any) -> list[int]:
    """One transaction for each; returns the ids."""
    written = []
    for number in numbers:
        with transaction.atomic():
            written.append(log.append(change(number, **overrides)).id)
    return written


def write_and_leave(*numbers: int, **overrides: Any) -> list[int]:
    """As :func:`write`, and the thread keeps no database connection."""
    try:
        return write(*numbers, **overrides)
    finally:
        connection.close()


def prune_and_leave(before: dt.datetime, limit: int = 10_000) -> int:
    try:
        return log.prune(before, limit)
    finally:
        connection.close()


def writers(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=count, thread_name_prefix="writer")
