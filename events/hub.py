"""One reader of the log per process: wakes up, reads what is new, hands it to the broker.

The channel layer says that something happened; the log says what. A wake-up that is lost costs latency, never an event: the hub
also looks by itself every ``settings.POLL_SECONDS``. That is how a change made by another process arrives on SQLite with the
in-memory layer. The hub starts with the first subscriber of its event loop and ends with the last.

All reading happens in one thread of the hub's own with one database connection, so a stream costs neither.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import weakref
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from channels.layers import get_channel_layer
from django.conf import settings
from django.db import DatabaseError, InterfaceError, connection

from events import log
from events.broker import Broker, Subscription
from events.envelope import Envelope, Interest

logger = logging.getLogger(__name__)
T = TypeVar("T")

#: Rows per look: what a reader of the log holds in memory at a time.
BATCH = 100
#: Group membership in a layer expires (after a day in channels-redis), so it is renewed now and then.
REJOIN_SECONDS = 3600
PAUSE_AFTER_ERROR = 1.0


class Hub:
    """``position`` is the cursor up to which every subscription of this process has been served."""

    def __init__(self) -> None:
        self.broker = Broker()
        self.position = 0
        self._users = 0
        self._lock = asyncio.Lock()
        self._wake = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._thread: ThreadPoolExecutor | None = None

    @contextlib.asynccontextmanager
    async def subscribe(self, interest: Interest) -> AsyncIterator[Subscription]:
        """A subscription for as long as the block runs. Everything after ``position`` at its start will be offered."""
        async with self._lock:
            self._users += 1
            if self._users == 1:
                try:
                    await self._start()
                except BaseException:
                    self._users -= 1
                    await self._stop()
                    raise
        subscription = self.broker.add(interest)
        try:
            yield subscription
        finally:
            self.broker.remove(subscription)
            # A stream may be cancelled once more while it leaves (its client goes just when it ends):
            # the hub must not be left half stopped, with a thread and a database connection that nobody ends.
            await asyncio.shield(self._leave())

    async def read(self, after: int, *, upto: int) -> list[Envelope] | None:
        """Up to BATCH events of the log with ``after < id <= upto``; None when some of them were pruned."""

        def work() -> list[Envelope] | None:
            found = log.read_envelopes(after, BATCH, upto=upto)
            # Looked at after the events were: what is pruned between the two looks is noticed, too.
            return found if log.oldest_cursor() <= after else None

        return await self._in_thread(work)

    async def bounds(self) -> tuple[int, int]:
        """``(oldest cursor that can be continued, newest cursor)``."""
        return await self._in_thread(lambda: (log.oldest_cursor(), log.newest()))

    async def _leave(self) -> None:
        async with self._lock:
            self._users -= 1
            if self._users == 0:
                await self._stop()

    async def _start(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="hub")
        self.position = await self._in_thread(log.newest)
        self._tasks = [
            asyncio.create_task(self._follow_log(), name="hub.follow_log"),
            asyncio.create_task(self._hear_wakes(), name="hub.hear_wakes"),
        ]

    async def _stop(self) -> None:
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        thread, self._thread = self._thread, None
        if thread is not None:
            await asyncio.get_running_loop().run_in_executor(thread, lambda: connection.close())
            thread.shutdown(wait=False)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        def run() -> T:
            try:
                return work()
            except (DatabaseError, InterfaceError):
                # The next look gets a new connection: the server may have been restarted.
                connection.close()
                raise

        return await asyncio.get_running_loop().run_in_executor(self._thread, run)

    async def _follow_log(self) -> None:
        while True:
            self._wake.clear()
            try:
                news = await self._in_thread(lambda: log.read_envelopes(self.position, BATCH))
            except Exception:
                # Whatever it is: a hub that stopped looking would leave every stream alive and silent.
                logger.exception("the hub cannot read the log; trying again in %s s", PAUSE_AFTER_ERROR)
                await asyncio.sleep(PAUSE_AFTER_ERROR)
                continue
            for envelope in news:
                self.broker.publish(envelope)
                self.position = envelope.id
            if not news:
                # Not wait_for(): before Python 3.12 it swallows a cancellation that comes together with the wake-up.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(settings.POLL_SECONDS):
                        await self._wake.wait()

    async def _hear_wakes(self) -> None:
        layer = get_channel_layer()
        if layer is None:
            return
        while True:
            try:
                channel = await layer.new_channel("hub")
                await layer.group_add(log.WAKE_GROUP, channel)
                try:
                    async with asyncio.timeout(REJOIN_SECONDS):
                        while True:
                            await layer.receive(channel)
                            self._wake.set()
                except TimeoutError:
                    continue
                finally:
                    await layer.group_discard(log.WAKE_GROUP, channel)
            except Exception:
                # Whatever the layer's server does, the hub goes on by looking for itself.
                logger.exception("the channel layer does not answer; wake-ups are late until it does")
                await asyncio.sleep(PAUSE_AFTER_ERROR)


_hubs: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Hub] = weakref.WeakKeyDictionary()


def current() -> Hub:
    """The hub of the running event loop: one per server process."""
    return _hubs.setdefault(asyncio.get_running_loop(), Hub())
