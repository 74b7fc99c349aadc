"""Short units of database work for many streams: one thread hop and one database connection for all that wait at a moment.

A stream asks the database when it opens (who is this?) and at every heartbeat (still?). A thousand clients that come back at once would
be a thousand hops and a thousand connections, mostly with the same question; here they are a few.

An answer is shared only with those who asked before the look began, unless they say how old it may be.
"""

from __future__ import annotations

import asyncio
import contextvars
import dataclasses
import time
import weakref
from collections.abc import Callable, Hashable
from typing import Any, TypeVar, cast

from channels.db import database_sync_to_async
from django.db import Error as DatabaseFailed
from django.db import connection

from events import metrics

T = TypeVar("T")

#: Units that share one hop; others wait for the next, and the thread is free for them in between.
HOP = 64
#: Answers that are remembered for those who take an older one.
REMEMBERED = 4096


@dataclasses.dataclass
class Answer:
    """What a unit of work returned, or raised; and when the look began, on the monotonic clock."""

    at: float
    value: Any = None
    error: BaseException | None = None

    def take(self) -> Any:
        if self.error is not None:
            # Raised once for each who asked: without this it would collect a traceback every time.
            raise self.error.with_traceback(None)
        return self.value


class Desk:
    """The units of work that wait, in one event loop."""

    def __init__(self) -> None:
        self._waiting: dict[Hashable, tuple[Callable[[], Any], asyncio.Future[Answer]]] = {}
        self._known: dict[Hashable, Answer] = {}
        self._working: asyncio.Task[None] | None = None

    async def look(self, work: Callable[[], T], *, key: Hashable = None, within: float = 0.0) -> T:
        """The result of ``work``, run where the ORM may be used. ``work`` of one ``key`` is the same work.

        :param within: take an answer that began at most so many seconds ago.
        :raises BaseException: what ``work`` raised.
        """
        known = self._known.get(key) if within and key is not None else None
        if known is not None and known.at >= time.monotonic() - within:
            metrics.CHECKS_SHARED.inc()
            return cast(T, known.take())
        place: Hashable = object() if key is None else key
        waiting = self._waiting.get(place)
        if waiting is None:
            future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
            waiting = self._waiting[place] = (work, future)
            if self._working is None:
                # In a context of its own, for it serves everybody.
                self._working = asyncio.create_task(self._work(), name="units", context=contextvars.Context())
        # One that leaves while it waits must not take the answer away from the others.
        return cast(T, (await asyncio.shield(waiting[1])).take())

    async def _work(self) -> None:
        try:
            while self._waiting:
                keys = list(self._waiting)[:HOP]
                batch = [self._waiting.pop(key) for key in keys]
                try:
                    answers = await _all([work for work, _ in batch])
                except Exception as error:  # noqa: BLE001 (handed to whoever asked)
                    answers = [Answer(time.monotonic(), error=error) for _ in batch]
                for key, (_, future), answer in zip(keys, batch, answers, strict=True):
                    self._remember(key, answer)
                    if not future.done():
                        future.set_result(answer)
        finally:
            self._working = None

    def _remember(self, key: Hashable, answer: Answer) -> None:
        if type(key) is object:
            return
        self._known.pop(key, None)
        self._known[key] = answer
        while len(self._known) > REMEMBERED:
            del self._known[next(iter(self._known))]


@database_sync_to_async
def _all(works: list[Callable[[], Any]]) -> list[Answer]:
    answers: list[Answer] = []
    away: Exception | None = None
    for work in works:
        answer = Answer(time.monotonic(), error=away)
        answers.append(answer)
        if away is not None:
            continue
        try:
            answer.value = work()
        except Exception as error:  # noqa: BLE001 (handed to whoever asked)
            answer.error = error
            if isinstance(error, DatabaseFailed) and connection.connection is None:
                # No connection could be had, which takes seconds to find out: the others need not find out one after the other.
                away = error
    return answers


_desks: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Desk] = weakref.WeakKeyDictionary()


def desk() -> Desk:
    """The desk of the running event loop."""
    return _desks.setdefault(asyncio.get_running_loop(), Desk())
