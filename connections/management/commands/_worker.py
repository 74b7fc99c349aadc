"""A worker beside a command, for ``manage.py login --worker``."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator

from django.core.management.base import CommandError

from connections.drivers.http_form import HttpFormDriver
from connections.worker import LOGINS, Worker

STOP_SECONDS = 15


class _Beside:
    """A worker in a thread of its own, with an event loop of its own."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop = asyncio.Event()
        self._begun = threading.Event()
        self._thread = threading.Thread(target=self._work, name="worker", daemon=True)

    def start(self) -> None:
        self._thread.start()
        self._begun.wait()

    def _work(self) -> None:
        try:
            asyncio.run(self._main())
        except Exception as error:  # handed to whoever waits for this worker's work
            self.error = error
        finally:
            self._begun.set()

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._begun.set()
        await Worker(HttpFormDriver(), concurrency=5, kinds=LOGINS).run(self._stop)

    def check(self) -> None:
        """
        :raises CommandError: the worker has failed, so nothing will come of waiting for it.
        """
        if self.error is not None:
            raise CommandError(f"The worker failed: {self.error}") from self.error

    def end(self) -> None:
        """Let it give back what it holds."""
        if self._loop is not None and self._thread.is_alive():
            # Between the two the loop may have ended by itself.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(timeout=STOP_SECONDS)


@contextlib.contextmanager
def beside(*, wanted: bool) -> Iterator[Callable[[], None]]:
    """Run a worker for as long as the block lasts. What is yielded raises when that worker has failed."""
    if not wanted:
        yield lambda: None
        return
    worker = _Beside()
    worker.start()
    try:
        yield worker.check
    finally:
        worker.end()
