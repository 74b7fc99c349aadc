"""The claim loop: takes tasks by lease and holds many at once.

The worker reads the same log as the streams: a new task, a submission and the end of a flow are events, and each rings a bell. The
lease does the rest. A worker that stops in order gives its tasks back; one that is killed lets its leases run out, and the
reconciler starts the flows again elsewhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import logging
import os
import random
import secrets
import socket

from channels.db import database_sync_to_async
from django.conf import settings
from django.db import DatabaseError
from django.utils import timezone

from connections import reconciler, tasks, transitions
from connections.drivers.base import Driver
from connections.runners.hook import deliver_loop
from connections.runners.login import run_check, run_login
from connections.states import FLOW_END, FlowStep, TaskKind, TaskStatus
from connections.tasks import Hold
from events import hub as hubs
from events.envelope import Envelope, Interest
from events.stream import Events, follow

logger = logging.getLogger(__name__)

KINDS = (TaskKind.LOGIN, TaskKind.REAUTH, TaskKind.HEALTH_CHECK)
#: Looked again for work after this time even when no bell rang.
LOOK_SECONDS = 2.0
SWEEP_SECONDS = 5.0
PRUNE_EVERY = 12
STOP_SECONDS = 8.0


@dataclasses.dataclass(eq=False)
class Job:
    """One task in this worker's hands."""

    hold: Hold
    bell: asyncio.Event
    task: asyncio.Task[None] | None = None


def worker_name() -> str:
    """Unique for this start of this process."""
    return f"{socket.gethostname()[:40]}-{os.getpid()}-{secrets.token_hex(3)}"


class Worker:
    """``concurrency`` tasks at once, all in one event loop: a login mostly waits, for a site or for a person."""

    def __init__(self, driver: Driver, *, concurrency: int = 50, name: str | None = None) -> None:
        self.driver = driver
        self.concurrency = concurrency
        self.name = name or worker_name()
        self.jobs: set[Job] = set()
        self._work = asyncio.Event()

    async def run(self, stop: asyncio.Event) -> None:
        """Until ``stop`` is set; then every task that is still held goes back to the queue."""
        hub = hubs.current()
        async with hub.subscribe(Interest(topics=frozenset({"connections", "tasks"}))) as subscription:
            helpers = [
                asyncio.create_task(self._listen(follow(hub, subscription, after=None))),
                asyncio.create_task(self._renew()),
                asyncio.create_task(self._sweep()),
                asyncio.create_task(deliver_loop(worker=self.name)),
            ]
            claiming = asyncio.create_task(self._claim())
            stopping = asyncio.create_task(stop.wait())
            try:
                await asyncio.wait({claiming, stopping, *helpers}, return_when=asyncio.FIRST_COMPLETED)
                if not stop.is_set():
                    # None of them ends by itself: say why before the process does.
                    for helper in (claiming, *helpers):
                        if helper.done():
                            helper.result()
            finally:
                stopping.cancel()
                claiming.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await claiming
                await self._give_back()
                for helper in helpers:
                    helper.cancel()
                await asyncio.gather(*helpers, stopping, return_exceptions=True)

    async def _claim(self) -> None:
        while True:
            self._work.clear()
            if len(self.jobs) < self.concurrency and await self._claim_one():
                continue
            with contextlib.suppress(TimeoutError):
                # Not wait_for(): before Python 3.12 it swallows a cancellation that comes together with the bell.
                async with asyncio.timeout(LOOK_SECONDS):
                    await self._work.wait()

    async def _claim_one(self) -> bool:
        claim = database_sync_to_async(tasks.claim, thread_sensitive=False)
        claiming = asyncio.ensure_future(claim(worker=self.name, kinds=KINDS, now=timezone.now()))
        try:
            hold = await asyncio.shield(claiming)
        except asyncio.CancelledError:
            # Stopped in the middle: what was claimed is ours to give back.
            hold = await claiming
            if hold is not None:
                self.jobs.add(Job(hold=hold, bell=asyncio.Event()))
            raise
        except DatabaseError:
            logger.exception("the database does not answer; trying again")
            await asyncio.sleep(1.0)
            return False
        if hold is None:
            return False
        job = Job(hold=hold, bell=asyncio.Event())
        self.jobs.add(job)
        job.task = asyncio.create_task(self._run(job), name=hold.task_id)
        return True

    async def _run(self, job: Job) -> None:
        try:
            if job.hold.kind == TaskKind.HEALTH_CHECK:
                await run_check(job.hold, self.driver)
            else:
                await run_login(job.hold, job.bell, self.driver)
        except DatabaseError:
            # The lease runs out by itself, and the task starts again: that is the one way of recovery.
            logger.exception("the database failed under %s", job.hold.task_id)
        finally:
            self.jobs.discard(job)
            self._work.set()

    async def _listen(self, items: object) -> None:
        async for item in items:  # type: ignore[attr-defined]
            if isinstance(item, Events):
                for envelope in item.batch:
                    self._hear(envelope)

    def _hear(self, envelope: Envelope) -> None:
        if envelope.name == "task.created" or envelope.data.get("status") == TaskStatus.QUEUED:
            self._work.set()
        elif envelope.name == "flow.state":
            data = envelope.data
            for job in list(self.jobs):
                if job.hold.flow_id != data["flow_id"]:
                    continue
                if data["flow_status"] in FLOW_END and job.task is not None:
                    job.task.cancel()
                elif data["flow_step"] == FlowStep.SUBMITTING:
                    job.bell.set()

    async def _renew(self) -> None:
        renew = database_sync_to_async(tasks.renew, thread_sensitive=False)
        while True:
            await asyncio.sleep(settings.LEASE_SECONDS / 3 * random.uniform(0.8, 1.0))
            for job in list(self.jobs):
                try:
                    if not await renew(hold=job.hold, now=timezone.now()) and job.task is not None:
                        logger.warning("the lease of %s was lost; leaving it alone", job.hold.task_id)
                        job.task.cancel()
                except DatabaseError:
                    logger.exception("the lease of %s could not be renewed", job.hold.task_id)

    async def _sweep(self) -> None:
        sweep = database_sync_to_async(reconciler.run, thread_sensitive=False)
        for tick in itertools.count():
            sweeps = reconciler.URGENT + (reconciler.LEISURELY if tick % PRUNE_EVERY == 0 else ())
            await sweep(sweeps, now=timezone.now())
            await asyncio.sleep(min(SWEEP_SECONDS, settings.LEASE_SECONDS / 3) * random.uniform(0.8, 1.2))

    async def _give_back(self) -> None:
        give_back = database_sync_to_async(transitions.give_back, thread_sensitive=False)
        held = list(self.jobs)
        running = [job.task for job in held if job.task is not None]
        for task in running:
            task.cancel()
        if running:
            await asyncio.wait(running, timeout=STOP_SECONDS)
        for job in held:
            await give_back(hold=job.hold, now=timezone.now())
        if held:
            logger.info("gave back %d tasks", len(held))
