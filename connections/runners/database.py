"""Verbs for the event loop of a worker that runs commands: in threads of their own, with connections that stay open where that saves something.

SQLite has one writer at a time. Threads that wait for it sleep between their tries, so one thread with one connection is quicker than many, and
opening it for each verb would cost as much as the verb. PostgreSQL's pool is quick, and its writers do not wait for each other.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from django.conf import settings
from django.db import InterfaceError, OperationalError, connections

logger = logging.getLogger(__name__)
T = TypeVar("T")

#: Seconds between two tries while the database is away.
AGAIN_SECONDS = 0.5
_THREADS = 4


class Database:
    """Runs verbs. A verb that has begun is finished, also when its caller is cancelled."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(
            1 if settings.IS_SQLITE else _THREADS, thread_name_prefix="commands-database"
        )

    async def once(self, work: Callable[..., T], /, **arguments: Any) -> T:
        """
        :raises OperationalError: the database is away, or locked for too long.
        """
        inner = asyncio.get_running_loop().run_in_executor(self._threads, _work, work, arguments)
        try:
            # wait() and not shield(): it leaves the future alone as well, and keeps quiet about what nobody awaits any more.
            await asyncio.wait({inner})
        except asyncio.CancelledError:
            inner.add_done_callback(_after_cancelled)
            raise
        return inner.result()

    async def surely(self, work: Callable[..., T], /, **arguments: Any) -> T:
        """As :meth:`once`, and again while the database is away. Only for verbs that bear to be done twice."""
        for number in range(1 << 30):
            try:
                return await self.once(work, **arguments)
            except (OperationalError, InterfaceError) as error:
                if number == 0:
                    logger.warning("the database does not answer (%s); trying again", str(error).strip())
                await asyncio.sleep(AGAIN_SECONDS)
        raise AssertionError("patience is endless")

    async def close(self) -> None:
        """When nothing runs any more."""
        await self.once(connections.close_all)
        self._threads.shutdown()


def _work(work: Callable[..., T], arguments: dict[str, Any]) -> T:
    try:
        return work(**arguments)
    finally:
        for connection in connections.all(initialized_only=True):
            if not settings.IS_SQLITE or connection.errors_occurred:
                connection.close()


def _after_cancelled(inner: asyncio.Future[Any]) -> None:
    """The end of a verb whose caller was cancelled: an error is read here, or asyncio would complain that nobody did."""
    if not inner.cancelled() and inner.exception() is not None:
        logger.info("a verb whose caller was cancelled ended with %s", type(inner.exception()).__name__)
