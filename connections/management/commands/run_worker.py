"""``manage.py run_worker``: claims tasks and does them until it is told to stop."""

from __future__ import annotations

import asyncio
import signal
from argparse import ArgumentParser
from typing import Any

from django.core.management.base import BaseCommand, CommandError

from connections.drivers.http_form import HttpFormDriver
from connections.worker import Worker


class Command(BaseCommand):
    help = (
        "Log in to sites and check sessions: take tasks from the queue under a lease and do them. "
        "Any number of workers may run. Stops in order on SIGTERM and Ctrl-C: what it holds goes back to the queue."
    )

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument(
            "--concurrency",
            type=int,
            default=50,
            help="how many tasks at once (default 50); most of them wait",
        )

    def handle(self, *args: Any, concurrency: int, **options: Any) -> None:
        if concurrency < 1:
            raise CommandError("--concurrency must be at least 1")
        asyncio.run(self._run(concurrency))

    async def _run(self, concurrency: int) -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        worker = Worker(HttpFormDriver(), concurrency=concurrency)
        self.stdout.write(f"worker {worker.name} is ready ({concurrency} tasks at once)")
        self.stdout.flush()
        await worker.run(stop)
        self.stdout.write("worker stopped")
