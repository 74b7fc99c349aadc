"""One reader of the log per process: wakes up, reads what is new, puts it in the window, hands it to the broker.

The channel layer says that something happened; the log says what. A wake-up that is lost costs latency, never an event: the hub
also looks by itself every ``settings.POLL_SECONDS``. That is how a change made by another process arrives on SQLite with the
in-memory layer. The hub starts with the first subscriber of its event loop and ends with the last.

All reading happens in one thread of the hub's own with one database connection, so a stream costs neither.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import itertools
import logging
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from channels.layers import InMemoryChannelLayer, get_channel_layer
from django.conf import settings
from django.db import DatabaseError, InterfaceError, connection

from events import log, metrics, waker
from events.broker import Broker, Subscription
from events.envelope import Envelope, Interest
from events.window import PAGE, PORTION_BYTES, Page, Pages, Portion, Window, portions

logger = logging.getLogger(__name__)
T = TypeVar("T")

#: Rows per look at most.
BATCH = 200
#: What the hub reads of the past when it starts.
TAIL_EVENTS = 2500
TAIL_BYTES = 2 << 20
#: After a look that found something, the next one waits for so long: events that follow each other are joined into one write. A
#: lone event is not delayed.
JOIN_SECONDS = 0.01
#: A look for streams that have just been opened comes so long after the one before, so that a thousand that come back at once share a few.
OPENED_SECONDS = 0.05
#: Group membership in a layer expires (after a day in channels-redis), so it is renewed now and then.
REJOIN_SECONDS = 3600
#: So many looks in a row that found something unannounced: the layer has forgotten this process, and it joins anew.
REJOIN_AFTER_MISSED = 3
#: What the layer may take for joining and leaving.
LAYER_SECONDS = 5.0
PAUSE_AFTER_ERROR = 1.0
#: How long a cancelled task may take before it is cancelled once more.
AGAIN_SECONDS = 0.2
FOLLOWING = "hub.follow_log"


class Hub:
    """``position`` is the cursor up to which every subscription of this process was told; the window ends there."""

    def __init__(self) -> None:
        self.broker = Broker()
        self.window = Window()
        #: time.monotonic() of the last look that left nothing unread; None before the first.
        self.caught_up_at: float | None = None
        self._pages = Pages()
        self._page_reads: dict[int, asyncio.Task[Page]] = {}
        self._ahead: set[Subscription] = set()
        #: Those that wait for a look, and the timer that brings it about.
        self._expecting: set[Subscription] = set()
        self._look_soon: asyncio.TimerHandle | None = None
        self._users = 0
        self._lock = asyncio.Lock()
        self._wake = asyncio.Event()
        self._woken = False
        self._missed = 0
        self._rejoin = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._leaving: set[asyncio.Task[None]] = set()
        self._thread: ThreadPoolExecutor | None = None
        self._heard: set[Callable[[], None]] = set()

    @property
    def position(self) -> int:
        return self.window.end

    @property
    def running(self) -> bool:
        """Has subscribers, and reads the log for them."""
        return bool(self._tasks)

    @contextlib.asynccontextmanager
    async def subscribe(self, interest: Interest) -> AsyncIterator[Subscription]:
        """A subscription for as long as the block runs. It begins at ``position``, and not yet idle."""
        async with self._lock:
            self._users += 1
            if self._users == 1:
                try:
                    await self._start()
                except BaseException:
                    self._users -= 1
                    await self._stop()
                    raise
        subscription = self.broker.add(interest, self.position)
        try:
            yield subscription
        finally:
            self.broker.remove(subscription)
            self._ahead.discard(subscription)
            self._expecting.discard(subscription)
            # A stream may be cancelled once more while it leaves (its client goes just when it ends):
            # the hub must not be left half stopped, with a thread and a database connection that nobody ends.
            await asyncio.shield(self._leave())

    # ── Reading on from a cursor ──

    async def read(self, cursor: int, size: int = PORTION_BYTES) -> Portion | None:
        """What follows a cursor, in portions of about ``size`` bytes of frames; None when some of it was pruned."""
        portion = self.window.after(cursor, size)
        if portion is None:
            portion = await self._read_page_after(cursor, size)
        return portion

    async def find(self, event_id: int) -> Envelope | None:
        """One event, from memory or from the log; None when it was pruned."""
        portion = await self.read(event_id - 1, 1)
        events = portion.events if portion is not None else ()
        return events[0] if events and events[0].id == event_id else None

    async def _read_page_after(self, cursor: int, size: int) -> Portion | None:
        page = self._pages.find(cursor)
        if page is None:
            # Pages begin at round ids, so that readers that are behind by different numbers of events share them; unless the events are so
            # large that a page ends before it comes to the cursor. They hold a number of rows, for ids have gaps of any size.
            page = await self._page(cursor - cursor % PAGE)
            if page.through <= cursor:
                page = await self._page(cursor)
        if cursor < page.oldest:
            return None
        events = [event for event in page.events if event.id > cursor]
        first = portions(events, size)[0] if events else []
        return Portion(first, page.through if len(first) == len(events) else first[-1].id)

    async def _page(self, start: int) -> Page:
        """Read once, however many wait for it."""
        reading = self._page_reads.get(start)
        if reading is None:
            reading = self._page_reads[start] = asyncio.create_task(
                self._read_page(start), context=contextvars.Context()
            )
            reading.add_done_callback(lambda _: self._page_reads.pop(start, None))
        # A stream that leaves while it waits must not take the page away from the others.
        return await asyncio.shield(reading)

    async def _read_page(self, start: int) -> Page:
        end = max(self.window.start, start + 1)

        def work() -> Page:
            metrics.LOG_READS.labels("page").inc()
            events, complete = log.read_envelopes(start, PAGE, upto=end)
            # Looked at after the events were: what is pruned between the two looks is noticed, too.
            return Page(start, events, end if complete else events[-1].id, log.oldest_cursor())

        page = await self._in_thread(work)
        self._pages.put(page)
        return page

    async def bounds(self) -> tuple[int, int]:
        """``(oldest cursor that can be continued, newest cursor)``."""
        return await self._in_thread(lambda: (log.oldest_cursor(), log.newest()))

    def call_at(self, subscription: Subscription) -> None:
        """Call its attention when ``position`` has come to its cursor."""
        self._ahead.add(subscription)
        self._wake.set()

    @contextlib.contextmanager
    def hearing(self, call: Callable[[], None]) -> Iterator[None]:
        """Have something called with every wake-up: for what is told by them and is not in the log. It must be quick and never raise."""
        self._heard.add(call)
        try:
            yield
        finally:
            self._heard.discard(call)

    def has_looked_since(self, moment: float) -> bool:
        """Whether a look at the log that left nothing unread has begun after this moment (``time.monotonic()``)."""
        return self.caught_up_at is not None and self.caught_up_at >= moment

    def call_after_look(self, subscription: Subscription) -> None:
        """Call its attention after a look that is yet to begin."""
        self._expecting.add(subscription)
        if self._look_soon is None:
            last = self.caught_up_at or 0.0
            pause = max(0.0, last + OPENED_SECONDS - time.monotonic())
            self._look_soon = asyncio.get_running_loop().call_later(pause, self._look_now)

    def _look_now(self) -> None:
        self._look_soon = None
        self._wake.set()

    # ── Its own life ──

    async def _leave(self) -> None:
        async with self._lock:
            self._users -= 1
            if self._users == 0:
                await self._stop()

    async def _start(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="hub")
        # After a restart everybody comes back with a cursor of a moment ago: the newest part of the log is read once for all.
        self.window = await self._in_thread(_newest_part)
        self.caught_up_at = time.monotonic()
        # In a context of their own: what they log is not about the stream that happened to come first.
        self._tasks = [
            asyncio.create_task(work, name=name, context=contextvars.Context())
            for name, work in ((FOLLOWING, self._follow_log()), ("hub.hear_wakes", self._hear_wakes()))
        ]

    async def _stop(self) -> None:
        tasks, self._tasks = self._tasks, []
        if self._look_soon is not None:
            self._look_soon.cancel()
            self._look_soon = None
        await _end([task for task in tasks if task.get_name() == FOLLOWING] + [*self._page_reads.values()])
        # Nobody waits for the layer's server: the next subscriber would wait with us.
        for task in tasks:
            if not task.done():
                leaving = asyncio.create_task(
                    _end([task]), name="hub.leave_layer", context=contextvars.Context()
                )
                self._leaving.add(leaving)
                leaving.add_done_callback(self._leaving.discard)
        # What is in them would be stale when the next subscriber comes.
        self._pages, self.window = Pages(), Window()
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
            woken, self._woken = self._woken, False
            began = time.monotonic()
            try:
                news, complete = await self._in_thread(self._look)
            except Exception:
                # Whatever it is: a hub that stopped looking would leave every stream alive and silent.
                logger.exception("the hub cannot read the log; trying again in %s s", PAUSE_AFTER_ERROR)
                await asyncio.sleep(PAUSE_AFTER_ERROR)
                continue
            if news:
                self._take(news)
                self._missed = 0 if woken else self._missed
            if not complete:
                # There is more: other tasks first, for a moment.
                await asyncio.sleep(0)
                continue
            self.caught_up_at = began
            self._tell_expecting()
            unannounced = bool(news) and not woken
            if news:
                await asyncio.sleep(max(0.0, began + JOIN_SECONDS - time.monotonic()))
            # Not wait_for(): before Python 3.12 it swallows a cancellation that comes together with the wake-up.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(settings.POLL_SECONDS):
                    await self._wake.wait()
            # Looked at last: a wake-up may come a moment after the look that found its event.
            if unannounced:
                self._count_missed(self._woken)

    def _tell_expecting(self) -> None:
        # Not in the loop above: its variable would keep the last of them, with its connection, until the next one comes.
        expecting, self._expecting = self._expecting, set()
        for subscription in expecting:
            subscription.attention.set()

    def _look(self) -> tuple[list[Envelope], bool]:
        metrics.LOG_READS.labels("hub").inc()
        return log.read_envelopes(self.position, BATCH)

    def _take(self, news: list[Envelope]) -> None:
        metrics.EVENTS_READ.inc(len(news))
        if news[0].id <= self.position or any(a.id >= b.id for a, b in itertools.pairwise(news)):
            metrics.OUT_OF_ORDER.inc()
            logger.error(
                "the log gave events out of order after %s: %s", self.position, [event.id for event in news]
            )
        for part in portions(news):
            self.window.extend(part)
            self.broker.publish(part, time.monotonic())
        for subscription in [each for each in self._ahead if each.cursor <= self.position]:
            self._ahead.discard(subscription)
            subscription.attention.set()

    def _count_missed(self, woken: bool) -> None:
        if woken:
            return
        metrics.WAKES_MISSED.inc()
        self._missed += 1
        if isinstance(get_channel_layer(), InMemoryChannelLayer):
            # It carries nothing between processes, so this is how their events are found.
            return
        if self._missed % REJOIN_AFTER_MISSED == 0:
            self._rejoin.set()

    async def _hear_wakes(self) -> None:
        layer = get_channel_layer()
        if layer is None:
            return
        with waker.listening():
            while True:
                self._rejoin.clear()
                try:
                    async with self._membership(layer) as channel:
                        await self._hear(layer, channel)
                except Exception:
                    # Whatever the layer's server does, the hub goes on by looking for itself.
                    logger.exception("the channel layer does not answer; wake-ups are late until it does")
                    await asyncio.sleep(PAUSE_AFTER_ERROR)

    async def _hear(self, layer: Any, channel: str) -> None:
        """Until it is time to join anew."""
        rejoin = asyncio.ensure_future(self._rejoin.wait())
        hearing = asyncio.ensure_future(self._hear_on(layer, channel))
        try:
            await asyncio.wait({rejoin, hearing}, timeout=REJOIN_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            if hearing.done():
                hearing.result()
        finally:
            for task in (rejoin, hearing):
                task.cancel()
            await asyncio.gather(rejoin, hearing, return_exceptions=True)

    async def _hear_on(self, layer: Any, channel: str) -> None:
        while True:
            await layer.receive(channel)
            metrics.WAKES.inc()
            self._woken = True
            self._wake.set()
            for call in list(self._heard):
                call()

    @contextlib.asynccontextmanager
    async def _membership(self, layer: Any) -> AsyncIterator[str]:
        async with asyncio.timeout(LAYER_SECONDS):
            channel = await layer.new_channel("hub")
            await layer.group_add(waker.GROUP, channel)
        # Whatever was said before is read now.
        self._wake.set()
        try:
            yield channel
        finally:
            try:
                async with asyncio.timeout(LAYER_SECONDS):
                    await layer.group_discard(waker.GROUP, channel)
            except Exception as error:  # noqa: BLE001 (a server that is away needs no farewell)
                logger.info("the channel layer did not hear that this process leaves its group: %r", error)


async def _end(tasks: Sequence[asyncio.Task[Any]]) -> None:
    """Cancel, until they are over: redis-py swallows a cancellation that comes while it connects, and goes on as if there had been none."""
    left = set(tasks)
    while left:
        for task in left:
            task.cancel()
        _, left = await asyncio.wait(left, timeout=AGAIN_SECONDS)


def _newest_part() -> Window:
    metrics.LOG_READS.labels("tail").inc()
    newest = log.newest()
    events, start = log.tail(TAIL_EVENTS, TAIL_BYTES)
    window = Window(start if events else newest)
    window.extend(events)
    return window


_hubs: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Hub] = weakref.WeakKeyDictionary()


def current() -> Hub:
    """The hub of the running event loop: one per server process."""
    loop = asyncio.get_running_loop()
    found = _hubs.get(loop)
    if found is None:
        found = _hubs[loop] = Hub()
    return found
