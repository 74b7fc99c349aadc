"""The claim loops: take tasks by lease and hold many at once. Logins and commands have a loop and a limit of their own.

The worker reads the same log as the streams: a new task, a submission, an input and the end of a flow are events, and each rings a bell. The
lease does the rest. A worker that stops in order gives its logins back, and does with its commands what ``COMMAND_ON_STOP`` says; one that is killed
lets its leases run out, and the reconciler starts the flows again elsewhere. A command is never started twice.
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
import time
from collections.abc import Awaitable, Callable, Collection
from pathlib import Path

from channels.db import database_sync_to_async
from django.conf import settings
from django.db import DatabaseError
from django.utils import timezone

from connections import reconciler, tasks, transitions
from connections.drivers.base import Driver
from connections.runners import terminal
from connections.runners.command import CommandRun, Settling
from connections.runners.database import Database
from connections.runners.hook import deliver_loop
from connections.runners.login import run_check, run_login
from connections.runners.terminal import Keeper
from connections.states import FLOW_END, FlowStep, TaskKind, TaskStatus
from connections.tasks import Hold, LeaseLost
from events import hub as hubs
from events.envelope import Envelope, Interest
from events.stream import Events, follow

logger = logging.getLogger(__name__)

LOGINS = (TaskKind.LOGIN, TaskKind.REAUTH, TaskKind.HEALTH_CHECK)
KINDS = (*LOGINS, TaskKind.COMMAND)
#: Looked again for work after this time even when no bell rang.
LOOK_SECONDS = 2.0
SWEEP_SECONDS = 5.0
PRUNE_EVERY = 12
STOP_SECONDS = 8.0


#: Commands claimed in one transaction: there is room for all of them.
CLAIM_AT_ONCE = 20
#: With room for fewer than this it is waited for a moment: for several, a transaction costs hardly more than for one.
LITTLE_ROOM, MOMENT_SECONDS = 8, 0.01
#: Before a lease is over by the worker's own clock and nothing is known, its program is ended.
DOUBT = 0.9


@dataclasses.dataclass(eq=False)
class Job:
    """One task in this worker's hands."""

    hold: Hold
    bell: asyncio.Event
    task: asyncio.Task[None] | None = None
    command: CommandRun | None = None
    #: By ``time.monotonic()``: when the lease was last known to be ours.
    held_at: float = dataclasses.field(default_factory=time.monotonic)


def worker_name() -> str:
    """Unique for this start of this process."""
    return f"{socket.gethostname()[:40]}-{os.getpid()}-{secrets.token_hex(3)}"


def handover_folder() -> Path:
    """Where programs wait for another worker."""
    return Path(settings.DATA_DIR) / "run"


class Worker:
    """``concurrency`` logins at once, all in one event loop: a login mostly waits, for a site or for a person. And ``commands`` commands."""

    def __init__(
        self,
        driver: Driver,
        *,
        concurrency: int = 50,
        commands: int | None = None,
        kinds: Collection[str] = KINDS,
        name: str | None = None,
    ) -> None:
        self.driver = driver
        self.concurrency = concurrency
        self.commands = settings.COMMAND_CONCURRENCY if commands is None else commands
        self.logins = tuple(kind for kind in LOGINS if kind in kinds)
        self.runs_commands = TaskKind.COMMAND in kinds and self.commands > 0 and settings.COMMANDS != "off"
        self.name = name or worker_name()
        self.jobs: set[Job] = set()
        self._work, self._command_work = asyncio.Event(), asyncio.Event()
        self._database, self._keeper = Database(), Keeper()
        self._settling = Settling(self._database)
        self._stopping = False

    async def run(self, stop: asyncio.Event, hurry: asyncio.Event | None = None) -> None:
        """Until ``stop`` is set; then every login that is still held goes back to the queue, and commands end as ``COMMAND_ON_STOP`` says.

        :param hurry: set while it stops: commands are interrupted now.
        """
        hub = hubs.current()
        async with hub.subscribe(Interest(topics=frozenset({"connections", "tasks"}))) as subscription:
            helpers = [
                asyncio.create_task(self._listen(follow(hub, subscription, after=None))),
                asyncio.create_task(self._renew()),
                asyncio.create_task(self._sweep()),
                asyncio.create_task(deliver_loop(worker=self.name)),
            ]
            claiming = []
            if self.logins:
                claiming.append(asyncio.create_task(self._claim(self._claim_one, self._work)))
            if self.runs_commands:
                claiming.append(asyncio.create_task(self._claim(self._claim_commands, self._command_work)))
            stopping = asyncio.create_task(stop.wait())
            try:
                await asyncio.wait({stopping, *claiming, *helpers}, return_when=asyncio.FIRST_COMPLETED)
                if not stop.is_set():
                    # None of them ends by itself: say why before the process does.
                    for helper in (*claiming, *helpers):
                        if helper.done():
                            helper.result()
            finally:
                stopping.cancel()
                self._stopping = True
                for each in claiming:
                    each.cancel()
                for ended in await asyncio.gather(*claiming, return_exceptions=True):
                    if isinstance(ended, Exception):
                        # A database that is away just now: what runs is stopped as it should be all the same.
                        logger.error("a claim that was broken off failed: %r", ended)
                await self._give_back()
                await self._stop_commands(hurry or asyncio.Event())
                for helper in helpers:
                    helper.cancel()
                await asyncio.gather(*helpers, stopping, return_exceptions=True)
                self._keeper.stop()
                await self._database.close()

    async def _claim(self, claim: Callable[[], Awaitable[bool]], work: asyncio.Event) -> None:
        """Claim for as long as there is something and room for it; then until the bell rings."""
        while True:
            work.clear()
            if await claim():
                continue
            with contextlib.suppress(TimeoutError):
                # Not wait_for(): before Python 3.12 it swallows a cancellation that comes together with the bell.
                async with asyncio.timeout(LOOK_SECONDS):
                    await work.wait()

    async def _claim_one(self) -> bool:
        if sum(job.command is None for job in self.jobs) >= self.concurrency:
            return False
        claim = database_sync_to_async(tasks.claim, thread_sensitive=False)
        claiming = asyncio.ensure_future(claim(worker=self.name, kinds=self.logins, now=timezone.now()))
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

    # ── Commands ──

    async def _claim_commands(self) -> bool:
        """Those that another worker left first, then new ones. Never stopped half way: what was taken would be lost."""
        claiming = asyncio.ensure_future(self._take_commands())
        try:
            return await asyncio.shield(claiming)
        except asyncio.CancelledError:
            await claiming
            raise

    def _room(self) -> int:
        return self.commands - sum(job.command is not None for job in self.jobs)

    async def _take_commands(self) -> bool:
        if 0 < self._room() < min(LITTLE_ROOM, self.commands):
            await asyncio.sleep(MOMENT_SECONDS)
        room = self._room()
        if room <= 0:
            return False
        await self._adopt(room)
        try:
            rows = await self._database.once(
                tasks.claim_several,
                worker=self.name,
                kinds=[TaskKind.COMMAND],
                limit=min(room, CLAIM_AT_ONCE),
                now=timezone.now(),
            )
            for row in rows if self._stopping else ():
                # Not begun, so another one may.
                await self._database.once(transitions.give_back, hold=tasks.hold_of(row), now=timezone.now())
        except DatabaseError:
            logger.exception("the database does not answer; trying again")
            await asyncio.sleep(1.0)
            return False
        for row in () if self._stopping else rows:
            self._begin(
                CommandRun(row, database=self._database, settling=self._settling, keeper=self._keeper)
            )
        return bool(rows)

    def _begin(self, command: CommandRun, work: Awaitable[None] | None = None) -> None:
        job = Job(hold=command.hold, bell=command.bell, command=command)
        self.jobs.add(job)
        job.task = asyncio.create_task(self._run_command(job, work or command.run()), name=job.hold.task_id)

    async def _run_command(self, job: Job, work: Awaitable[None]) -> None:
        try:
            await work
        except Exception:
            # Its program was ended on the way out; the lease runs out by itself, and the task is "interrupted".
            logger.exception("the command %s broke", job.hold.task_id)
        finally:
            self.jobs.discard(job)
            self._command_work.set()

    async def _adopt(self, room: int) -> None:
        """Go on with programs whose worker has left them to us."""
        for path in () if self._stopping else sorted(handover_folder().glob("*.sock"))[:room]:
            found = await terminal.adopt(path)
            if found is None:
                continue
            program, luggage = found
            try:
                row = await self._database.once(
                    tasks.adopt,
                    task_id=luggage["task"],
                    holder=luggage["worker"],
                    attempt=luggage["attempt"],
                    worker=self.name,
                    now=timezone.now(),
                )
            except (LeaseLost, DatabaseError):
                # Too late: it is ended, and its task is failed when the lease runs out.
                logger.warning("%s could not be gone on with", luggage["task"])
                program.close()
                continue
            command = CommandRun(row, database=self._database, settling=self._settling, keeper=self._keeper)
            self._begin(command, command.go_on(program, luggage))

    async def _stop_commands(self, hurry: asyncio.Event) -> None:
        """Let them end, leave them, or interrupt them."""

        def running() -> list[asyncio.Task[None]]:
            return [job.task for job in self.jobs if job.command is not None and job.task is not None]

        async def over(seconds: float) -> None:
            hurrying = asyncio.create_task(hurry.wait())
            until = time.monotonic() + seconds
            while running() and not hurry.is_set() and (left := until - time.monotonic()) > 0:
                await asyncio.wait({hurrying, *running()}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            hurrying.cancel()

        if not running():
            return
        if settings.COMMAND_ON_STOP == "finish":
            logger.info(
                "waiting for %d commands, %d s at most", len(running()), settings.COMMAND_STOP_SECONDS
            )
            await over(settings.COMMAND_STOP_SECONDS)
        elif settings.COMMAND_ON_STOP == "handover":
            folder = handover_folder()
            folder.mkdir(mode=0o700, exist_ok=True)
            for job in list(self.jobs):
                if job.command is not None:
                    job.command.hand_over(folder)
            await over(STOP_SECONDS)
        for job in list(self.jobs):
            if job.command is not None:
                job.command.interrupt("its worker was told to stop")
        last = running()
        if last:
            await asyncio.wait(last, timeout=settings.COMMAND_KILL_SECONDS + STOP_SECONDS)
        for task in running():
            task.cancel()
        await asyncio.gather(*running(), return_exceptions=True)

    # ── Both ──

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
            (self._command_work if envelope.data.get("kind") == TaskKind.COMMAND else self._work).set()
        elif envelope.name == "task.updated":
            data = envelope.data
            # What another version told may say less than this one does: it is no reason to end.
            if data.get("inputs_waiting") or data.get("kill_requested_at"):
                for job in list(self.jobs):
                    if job.hold.task_id == data["id"]:
                        job.bell.set()
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
        pause = settings.LEASE_SECONDS / 3
        while True:
            await asyncio.sleep(pause * random.uniform(0.8, 1.0))
            pause = settings.LEASE_SECONDS / 3
            try:
                for job in list(self.jobs):
                    now = time.monotonic()
                    held = await renew(hold=job.hold, now=timezone.now())
                    job.held_at = now
                    if not held and job in self.jobs and job.task is not None:
                        logger.warning("the lease of %s was lost; leaving it alone", job.hold.task_id)
                        job.task.cancel()
            except DatabaseError:
                logger.exception("leases could not be renewed")
                pause = min(1.0, pause)
                for job in self.jobs:
                    doubtful = time.monotonic() - job.held_at > settings.LEASE_SECONDS * DOUBT
                    if doubtful and job.command is not None:
                        # Somebody may have called it interrupted by now: then it must not run on.
                        job.command.interrupt("its worker lost the database for too long")

    async def _sweep(self) -> None:
        sweep = database_sync_to_async(reconciler.run, thread_sensitive=False)
        for tick in itertools.count():
            sweeps = reconciler.URGENT + (reconciler.LEISURELY if tick % PRUNE_EVERY == 0 else ())
            await sweep(sweeps, now=timezone.now())
            await asyncio.sleep(min(SWEEP_SECONDS, settings.LEASE_SECONDS / 3) * random.uniform(0.8, 1.2))

    async def _give_back(self) -> None:
        give_back = database_sync_to_async(transitions.give_back, thread_sensitive=False)
        held = [job for job in self.jobs if job.command is None]
        running = [job.task for job in held if job.task is not None]
        for task in running:
            task.cancel()
        if running:
            await asyncio.wait(running, timeout=STOP_SECONDS)
        for job in held:
            await give_back(hold=job.hold, now=timezone.now())
        if held:
            logger.info("gave back %d tasks", len(held))
