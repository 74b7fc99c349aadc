"""``manage.py run_worker``: claims tasks and does them until it is told to stop."""

from __future__ import annotations

import asyncio
import signal
from argparse import ArgumentParser
from typing import Any

from django.core.management.base import BaseCommand, CommandError

from connections.drivers.http_form import HttpFormDriver
from connections.worker import KINDS, Worker


class Command(BaseCommand):
    help = (
        "Log in to sites, check sessions and run commands: take tasks from the queue under a lease and do them. "
        "Any number of workers may run. Stops in order on SIGTERM and Ctrl-C: logins go back to the queue, with commands it "
        "does what COMMAND_ON_STOP says; a second signal interrupts them."
    )

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument(
            "--concurrency",
            type=int,
            default=50,
            help="how many logins at once (default 50); most of them wait. Commands: COMMAND_CONCURRENCY",
        )
        parser.add_argument(
            "--kinds",
            default=",".join(KINDS),
            help=f"what to take from the queue, separated by commas (default: {','.join(KINDS)})",
        )

    def handle(self, *args: Any, concurrency: int, kinds: str, **options: Any) -> None:
        if concurrency < 1:
            raise CommandError("--concurrency must be at least 1")
        wanted = [kind.strip() for kind in kinds.split(",") if kind.strip()]
        for kind in wanted:
            if kind not in KINDS:
                raise CommandError(f"--kinds: {kind!r} is none of {', '.join(KINDS)}")
        if not wanted:
            raise CommandError("--kinds names none")
        asyncio.run(self._run(concurrency, wanted))

    async def _run(self, concurrency: int, kinds: list[str]) -> None:
        stop, hurry = asyncio.Event(), asyncio.Event()
        loop = asyncio.get_running_loop()

        def on_signal() -> None:
            if stop.is_set():
                hurry.set()
            stop.set()

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, on_signal)
        worker = Worker(HttpFormDriver(), concurrency=concurrency, kinds=kinds)
        limits = [f"{concurrency} logins"] if worker.logins else []
        limits += [f"{worker.commands} commands"] if worker.runs_commands else []
        self.stdout.write(f"worker {worker.name} is ready ({' and '.join(limits) or 'nothing'} at once)")
        self.stdout.flush()
        await worker.run(stop, hurry)
        self.stdout.write("worker stopped")
