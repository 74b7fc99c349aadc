"""Says through the channel layer that something was committed. Who commits neither waits for it nor hears of its faults.

The message carries nothing: the log says what happened. Wake-ups that follow each other closely become one. A wake-up that is lost
costs latency, never an event, for the hub also looks by itself.

With the in-memory layer only event loops of this very process can listen; each is told in its own thread, for the layer's queues belong to
their loop. With Redis one background thread keeps one connection: a loop and a connection per commit would cost more than the commit,
and a Redis that hangs would hang the verb.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import logging
import os
import threading
from collections import Counter
from collections.abc import Iterator

from channels.layers import InMemoryChannelLayer, get_channel_layer

from events import metrics

logger = logging.getLogger(__name__)

#: The channel-layer group that every hub listens on, and all that is ever said there.
GROUP = "switchboard.events"
MESSAGE = {"type": "events.wake"}

SEND_SECONDS = 3.0
#: Between two wake-ups at least; the first is sent at once. As long as hubs join events (``hub.JOIN_SECONDS``).
PAUSE_SECONDS = 0.01
#: How long a process that ends waits for its last wake-up to leave.
EXIT_SECONDS = 1.0

#: Loops of this process in which a hub listens; the value tells whether a wake-up is on its way.
_listening: dict[asyncio.AbstractEventLoop, bool] = {}
_listeners: Counter[asyncio.AbstractEventLoop] = Counter()


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """The running loop has a hub, for as long as the block runs."""
    loop = asyncio.get_running_loop()
    _listening.setdefault(loop, False)
    _listeners[loop] += 1
    try:
        yield
    finally:
        # One that is leaving may overlap with the next.
        _listeners[loop] -= 1
        if not _listeners[loop]:
            del _listeners[loop], _listening[loop]


def wake() -> None:
    """Something was committed. Returns at once, from any thread."""
    layer = get_channel_layer()
    if isinstance(layer, InMemoryChannelLayer):
        for loop, on_its_way in list(_listening.items()):
            if not on_its_way:
                _listening[loop] = True
                with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile: nobody listens there
                    loop.call_soon_threadsafe(_tell_this_loop, layer, loop)
    elif layer is not None:
        _sender.wake()


_told: set[asyncio.Task[None]] = set()


def _tell_this_loop(layer: InMemoryChannelLayer, loop: asyncio.AbstractEventLoop) -> None:
    if loop in _listening:
        _listening[loop] = False
        task = loop.create_task(layer.group_send(GROUP, MESSAGE))
        # A loop keeps weak references only.
        _told.add(task)
        task.add_done_callback(_told.discard)


class _Sender:
    """The background thread, started with the first wake-up of the process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._wanted: asyncio.Event | None = None
        self._asked = 0
        #: Set while nothing waits to be sent.
        self._quiet = threading.Event()
        self._quiet.set()

    def wake(self) -> None:
        with self._lock:
            if self._loop is None:
                self._start()
            self._asked += 1
            self._quiet.clear()
            loop, wanted = self._loop, self._wanted
        assert loop is not None
        assert wanted is not None
        loop.call_soon_threadsafe(wanted.set)

    def _start(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._wanted = asyncio.Event()
        threading.Thread(
            target=self._loop.run_until_complete, args=(self._send(),), name="waker", daemon=True
        ).start()
        atexit.register(self.flush)

    def flush(self) -> None:
        self._quiet.wait(EXIT_SECONDS)

    async def _send(self) -> None:
        assert self._wanted is not None
        healthy = True
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            asked = self._asked
            try:
                async with asyncio.timeout(SEND_SECONDS):
                    layer = get_channel_layer()
                    assert layer is not None
                    await layer.group_send(GROUP, MESSAGE)
                if not healthy:
                    logger.info("the channel layer takes wake-ups again")
                healthy = True
            except Exception as error:  # noqa: BLE001 (whatever the layer's client raises, the next one is tried)
                metrics.WAKES_UNSENT.inc()
                if healthy:
                    logger.warning(
                        "the channel layer takes no wake-ups (%r); events are late until it does", error
                    )
                healthy = False
            with self._lock:
                if asked == self._asked:
                    self._quiet.set()
            # Whoever has been woken joins what comes within this time anyway, so another wake-up would not be heard earlier.
            await asyncio.sleep(PAUSE_SECONDS)


_sender = _Sender()


def flush() -> None:
    """Wait until the last wake-up has left, for EXIT_SECONDS at most."""
    _sender.flush()


def _after_fork() -> None:
    # The child has no thread: it starts its own.
    global _sender
    _sender = _Sender()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
