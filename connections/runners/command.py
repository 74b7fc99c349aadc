"""One claimed command to one outcome.

A program runs under a terminal (``terminal.py``); here what it writes becomes output, what people send is typed into it, and when it stands
still and reads its terminal, the task waits for input. Several things go on at the same time:

- :class:`reading.Reading` reads the terminal and appends what it has read;
- :meth:`CommandRun._type` takes what was sent, one after the other, and types it;
- :meth:`CommandRun._watch` looks whether the program waits;
- :meth:`CommandRun._attend` hears of kills and of inputs.

Whatever happens ends in exactly one ``settle``, with all of the output before it, or in none, because the lease is somebody else's.
While the database is away everything stands still, the program included (its terminal is full at some time), and goes on afterwards.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import datetime as dt
import logging
import os
import select
import termios
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from django.conf import settings
from django.db import transaction
from django.utils import timezone

from connections import outputs, task_inputs, tasks
from connections.commands import COLS, ROWS, NotAllowed, check_still, is_below
from connections.models import Task
from connections.outputs import NotHeld
from connections.runners.database import Database
from connections.runners.reading import Reading
from connections.runners.terminal import CannotStart, Keeper, Program, SupervisorLost, signal_name
from connections.runners.waiting import Waits, look, unread
from connections.states import InputKind
from connections.tasks import LeaseLost
from connections.terminal import keys, prompts
from connections.terminal.ansi import Modes
from connections.terminal.typing import Line, Typist, line_of

logger = logging.getLogger(__name__)

#: What lasts longer is typed to, watched and asked after.
SHORT_SECONDS = 0.03
#: Looked for kills and inputs after this time even when no bell rang; the first time sooner, for what was heard before it was ours.
LOOK_SECONDS, FIRST_LOOK_SECONDS = 5.0, 0.5
#: Output that comes so soon after something was typed without Enter is its echo.
ECHO_SECONDS = 0.5
#: The looks of a program that is busy without a word become rarer, up to this.
RARELY_SECONDS = 5.0
#: Where nothing tells what it does, it counts as waiting after so many times ``COMMAND_QUIET_SECONDS``.
QUIET_TIMES = 5
#: Between a text and its Enter, and between two keys, where the program reads keys: what comes in one piece looks as if it was pasted. And after the
#: key Escape: what comes right behind it would be taken for the rest of a sequence.
PIECE_SECONDS, ESCAPE_SECONDS = 0.03, 0.15
#: What a command is made with (row C55) is held back for so long until it waits for input; so long it has to show that it has got it, before it is
#: typed again; and so often it is typed at most.
READY_SECONDS, VERIFY_SECONDS, ATTEMPTS = 30.0, 2.0, 3
#: Between two looks whether it has.
VERIFY_PAUSE_SECONDS = 0.1
#: Offered to the terminal in one go; it takes a few thousand.
WRITE_BYTES = 1 << 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """How it ended, in the words of ``tasks.settle``."""

    exit_code: int | None = None
    signal: str = ""
    error_code: str = ""
    error: str = ""


def outcome_of(exit_code: int | None, number: int | None) -> Outcome:
    """What an end by itself means."""
    if number is not None:
        name = signal_name(number)
        return Outcome(signal=name, error_code="signal", error=f"It was ended by {name}.")
    if exit_code:
        return Outcome(
            exit_code=exit_code, error_code="exit_code", error=f"It ended with exit code {exit_code}."
        )
    return Outcome(exit_code=exit_code)


def environment(task_id: str) -> dict[str, str]:
    """What a command is told: the variables of the worker that ``COMMAND_ENV`` names, and nothing else of it."""
    kept = {name: os.environ[name] for name in settings.COMMAND_ENV if name in os.environ}
    return {**kept, "TERM": "xterm-256color", "SWITCHBOARD_TASK_ID": task_id}


def real_directory(path: str) -> str:
    """Where the folder of a command really is: a link may lead out of ``COMMAND_DIRECTORIES`` by now.

    :raises CannotStart: it is not there, or not allowed.
    """
    real = os.path.realpath(path)
    if not os.path.isdir(real):
        raise CannotStart(f"The folder {path} does not exist.", "missing_directory")
    if not any(is_below(real, os.path.realpath(folder)) for folder in settings.COMMAND_DIRECTORIES):
        raise CannotStart(
            f"The folder {path} leads to one that commands may not run in.", "missing_directory"
        )
    return real


@dataclasses.dataclass(frozen=True, kw_only=True)
class Last:
    """The rest of the output of a command (from the offset ``at`` on), and its end."""

    end: tasks.End
    data: bytes
    at: int


def finish_several(*, lasts: Sequence[Last], now: dt.datetime) -> None:
    """All of them in one transaction. What is somebody else's by now is left alone."""
    with transaction.atomic():
        for last in lasts:
            if last.data:
                hold = last.end.hold
                with contextlib.suppress(NotHeld):
                    outputs.append(
                        task_id=hold.task_id,
                        worker=hold.worker,
                        attempt=hold.attempt,
                        data=last.data,
                        at=last.at,
                        now=now,
                    )
        tasks.settle_several([last.end for last in lasts], now=now)


class Settling:
    """The ends of a worker's commands: those that come while a transaction is under way share the next one, so a thousand short commands cost
    far less than a thousand transactions, and none waits for others to come."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._waiting: list[tuple[Last, asyncio.Future[None]]] = []
        self._working: asyncio.Task[None] | None = None

    async def settle(self, last: Last) -> None:
        """Return when it is committed. It is, also when the caller is cancelled."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((last, done))
        if self._working is None:
            self._working = asyncio.create_task(self._work())
        await asyncio.shield(done)

    async def _work(self) -> None:
        try:
            while self._waiting:
                batch, self._waiting = self._waiting, []
                try:
                    await self._database.surely(
                        finish_several, lasts=[last for last, _ in batch], now=timezone.now()
                    )
                except Exception as error:  # noqa: BLE001 (handed to those who wait for it)
                    for _, done in batch:
                        if not done.done():
                            done.set_exception(error)
                    continue
                for _, done in batch:
                    if not done.done():
                        done.set_result(None)
        finally:
            self._working = None


def _wishes(*, task_id: str) -> tuple[bool, int]:
    """Whether a kill was asked for, and how many inputs wait."""
    row = Task.objects.filter(pk=task_id).values_list("kill_requested_at", "inputs_waiting").first()
    return (row[0] is not None, row[1]) if row else (False, 0)


def _something_to_read(master: int) -> bool:
    poll = select.poll()
    poll.register(master, select.POLLIN)
    return bool(poll.poll(0))


class CommandRun:
    """A command in the hands of this worker. ``bell``: something was sent to it, or it is to be killed."""

    def __init__(self, row: Task, *, database: Database, settling: Settling, keeper: Keeper) -> None:
        self._settling = settling
        self.hold = tasks.hold_of(row)
        self.bell = asyncio.Event()
        self._row = row
        self._database = database
        self._keeper = keeper
        self._loop = asyncio.get_running_loop()
        self._program: Program | None = None
        self._reading: Reading | None = None
        # What it looks like.
        self._tail = b""
        self._modes = Modes()
        self._waiting = False
        self._active = asyncio.Event()
        self._active_at = self._loop.time()
        #: Counts pieces of output, and turns of typing that finish a line.
        self._written = self._written_when_waiting = 0
        self._turn = asyncio.Lock()
        # What is typed.
        self._typist = Typist()
        self._inputs = asyncio.Event()
        self._untyped: list[bytes] = []
        self._echo_until = 0.0
        #: The input it was made with: to be typed yet; typed, and nobody has seen that it arrived; and it lies in the terminal, where nobody reads.
        self._initial = row.prompt_delivered is False
        self._typed = self._unread = False
        self._ready = asyncio.Event()
        # Why it ends, when it does not end by itself.
        self._reason: Outcome | None = None
        self._ending = False
        self._leaving: Path | None = None
        self._leave = asyncio.Event()

    # ── From the beginning to the end ──

    async def run(self) -> None:
        """Start it, and see it through."""
        spec = self._row.spec
        try:
            check_still(spec)
            cwd = await asyncio.to_thread(real_directory, spec["cwd"])
            self._program = await self._keeper.run(
                argv=spec["argv"],
                cwd=cwd,
                env=environment(self.hold.task_id),
                rows=spec.get("rows") or ROWS,
                cols=spec.get("cols") or COLS,
                grace=settings.COMMAND_KILL_SECONDS,
            )
        except NotAllowed as why:
            await self._settle(Outcome(error_code="not_allowed", error=str(why)), b"", 0)
            return
        except CannotStart as why:
            await self._settle(Outcome(error_code=why.code, error=str(why)), b"", 0)
            return
        await self._see_through(self._program)

    async def go_on(self, program: Program, luggage: Mapping[str, Any]) -> None:
        """See it through that another worker has started."""
        self._program = program
        self._tail = luggage["tail"].encode("latin-1")
        self._untyped = [piece.encode("latin-1") for piece in luggage["untyped"]]
        self._modes.bracketed_paste, self._modes.application_keys = luggage["modes"]
        self._typist.begun = luggage["begun"]
        self._waiting = luggage["waiting"]
        self._initial, self._typed, self._unread, ready = luggage["initial"]
        if ready:
            self._ready.set()
        await self._see_through(program)

    async def _see_through(self, program: Program) -> None:
        assert self._row.started_at is not None
        timer = None
        if self._row.timeout_seconds:
            used = (timezone.now() - self._row.started_at).total_seconds()
            timer = self._loop.call_later(max(0.0, self._row.timeout_seconds - used), self._time_out)
        if self._ending:
            # Before it had begun.
            program.end(settings.COMMAND_KILL_SECONDS)
        at = self._row.output_bytes + self._row.output_dropped
        self._reading = reading = Reading(
            program, self.hold, at=at, database=self._database, heard=self._heard
        )
        reading.read_on()
        writing = asyncio.create_task(reading.write())
        others: list[asyncio.Task[None]] = []
        leaving: asyncio.Task[Any] = asyncio.create_task(self._leave.wait())
        waited: set[asyncio.Future[Any]] = {program.ended, writing, leaving}
        try:
            # A short command has ended before anybody could want anything of it.
            done, _ = await asyncio.wait(waited, timeout=SHORT_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            if not done:
                others += [asyncio.create_task(each()) for each in (self._attend, self._type, self._watch)]
                await asyncio.wait({*waited, *others}, return_when=asyncio.FIRST_COMPLETED)
            for helper in (writing, *others):
                if helper.done():
                    # None of them ends by itself: the lease is lost, or there is a fault of ours.
                    helper.result()
            if not program.ended.done():
                if await self._left(program, reading, writing, others):
                    return
                writing = asyncio.create_task(reading.write())
            outcome = await self._outcome(program)
            for helper in others:
                helper.cancel()
            await reading.drain()
            reading.stop()
            await writing
            await self._settle(outcome, reading.rest(), reading.at)
        except (LeaseLost, NotHeld):
            # Somebody else has ended it, or will: there is nothing left to say. Closing ends the program.
            logger.warning("the lease of %s was lost; ending its program", self.hold.task_id)
        finally:
            if timer is not None:
                timer.cancel()
            for each in (writing, leaving, *others):
                each.cancel()
            await asyncio.gather(writing, leaving, *others, return_exceptions=True)
            program.close()

    async def _outcome(self, program: Program) -> Outcome:
        try:
            by_itself = outcome_of(*await program.ended)
        except SupervisorLost:
            by_itself = Outcome(
                error_code="interrupted", error="interrupted: the process that watched over it was killed"
            )
        if self._reason is None:
            return by_itself
        return dataclasses.replace(self._reason, exit_code=by_itself.exit_code, signal=by_itself.signal)

    async def _settle(self, outcome: Outcome, data: bytes, at: int) -> None:
        end = tasks.End(
            hold=self.hold,
            exit_code=outcome.exit_code,
            signal=outcome.signal,
            error_code=outcome.error_code,
            error=outcome.error,
            # It read, was given it, and does not read any more.
            prompt_delivered=self._typed
            and not (self._unread or self._untyped or self._ending)
            and self._ready.is_set(),
        )
        await self._settling.settle(Last(end=end, data=data, at=at))

    # ── Ending it before its time ──

    def _end(self, reason: Outcome | None) -> None:
        self._reason = self._reason or reason
        self._ending = True
        if self._program is not None:
            self._program.end(settings.COMMAND_KILL_SECONDS)

    def _time_out(self) -> None:
        seconds = self._row.timeout_seconds
        self._end(Outcome(error_code="timeout", error=f"It ran longer than {seconds} seconds."))

    def interrupt(self, why: str) -> None:
        """End it because its worker cannot go on with it."""
        self._end(Outcome(error_code="interrupted", error=f"interrupted: {why}"))

    # ── Leaving it to another worker ──

    def hand_over(self, folder: Path) -> None:
        """Leave it running for the next worker on this machine. One that is about to end does so here."""
        if not self._ending:
            self._leaving = folder
            self._leave.set()

    async def _left(
        self,
        program: Program,
        reading: Reading,
        writing: asyncio.Task[None],
        others: list[asyncio.Task[None]],
    ) -> bool:
        """Whether somebody else goes on with it."""
        folder = self._leaving
        assert folder is not None
        async with self._turn:
            # Nothing is being taken, which would be lost, or told.
            for helper in others:
                helper.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await reading.leave(writing)
        seconds = settings.COMMAND_STOP_SECONDS
        # Held until the supervisor has given up, and a little longer.
        until = seconds + int(settings.COMMAND_KILL_SECONDS) + 5
        if not await self._database.surely(
            tasks.renew, hold=self.hold, now=timezone.now(), lease_seconds=until
        ):
            raise LeaseLost(self.hold.task_id)
        luggage = {
            "task": self.hold.task_id,
            "worker": self.hold.worker,
            "attempt": self.hold.attempt,
            "tail": self._tail.decode("latin-1"),
            "untyped": [piece.decode("latin-1") for piece in self._untyped],
            "begun": self._typist.begun,
            "modes": [self._modes.bracketed_paste, self._modes.application_keys],
            "waiting": self._waiting,
            "initial": [self._initial, self._typed, self._unread, self._ready.is_set()],
        }
        try:
            await program.leave(path=folder / f"{self.hold.task_id}.sock", seconds=seconds, luggage=luggage)
        except SupervisorLost:
            # It has ended at the same moment.
            reading.go_on()
            return False
        return True

    # ── What comes out ──

    def _heard(self, data: bytes) -> None:
        self._modes.feed(data)
        self._tail = (self._tail + data[-prompts.LOOK_BYTES :])[-prompts.LOOK_BYTES :]
        self._happened()

    # ── What goes in ──

    async def _attend(self) -> None:
        wait = FIRST_LOOK_SECONDS
        if self._row.inputs_waiting or self._untyped:
            self._inputs.set()
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await self.bell.wait()
            self.bell.clear()
            killed, waiting = await self._database.surely(_wishes, task_id=self.hold.task_id)
            if killed and not self._ending:
                self._end(None)
            if waiting:
                self._inputs.set()
            if self._unread and not await self._lies_there():
                await self._delivered()
            wait = LOOK_SECONDS

    async def _type(self) -> None:
        """Take what was sent, one after the other, and type it."""
        if self._initial:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(READY_SECONDS):
                    await self._ready.wait()
        if self._typed and not self._unread:
            # By its last worker, which has left the text to nobody: it is not typed again.
            await self._put()
            self._typed = not await self._arrives(self._written)
        while True:
            await self._inputs.wait()
            self._inputs.clear()
            await self._put()
            while (given := await self._take()) is not None:
                # From here to the first byte nothing is waited for: who hands over finds either all of it in the queue or in here.
                if given.initial:
                    await self._give(given)
                else:
                    self._press(given)
                    await self._put()

    def _press(self, given: task_inputs.Input) -> None:
        if given.kind == InputKind.RESIZE:
            self._resize(given.rows, given.cols)
        elif given.kind == InputKind.KEYS:
            self._typist.keys()
            self._untyped += [
                keys.pressed([name], application=self._modes.application_keys) for name in given.keys
            ]
        else:
            line = self._line()
            text = given.text.encode(errors="surrogatepass")
            self._untyped.append(self._typist.text(text, line, bracketed=self._modes.bracketed_paste))
            if given.submit:
                self._untyped.append(self._typist.enter(line))

    # ── What it was made with ──

    async def _give(self, given: task_inputs.Input) -> None:
        """Type the initial input, and type it again when the program has lost it."""
        self._initial, self._typed = False, True
        for attempt in range(1, ATTEMPTS + 1):
            written = self._written
            self._press(given)
            await self._put()
            if await self._arrives(written):
                return
            if attempt < ATTEMPTS:
                # It was told as waiting meanwhile.
                await self._moved()
                self._happened()
        self._typed = False
        logger.warning("nothing shows that %s has got its initial input", self.hold.task_id)

    async def _arrives(self, written: int) -> bool:
        """Whether it need not be typed again: the program has got it, which is told, or it lies in the terminal for the program to read.

        A program that reads lines gets one when it is complete. One that reads keys may throw away what it has read: it shows by what it writes, or by
        doing something else, that it has not. ``written``: pieces of output before it was typed.
        """
        assert self._program is not None
        until = self._loop.time() + VERIFY_SECONDS
        lay = False
        while self._loop.time() < until:
            await asyncio.sleep(VERIFY_PAUSE_SECONDS)
            if await self._lies_there():
                lay = True
                continue
            got = self._written != written
            if not got and self._ready.is_set():
                seen = await asyncio.to_thread(look, self._program.master, self._program.slave_name())
                got = self._line().canonical or seen is Waits.BUSY
            if got or (lay and not self._ready.is_set()):
                await self._delivered()
                return True
        self._unread = await self._lies_there()
        return self._unread

    async def _lies_there(self) -> bool:
        assert self._program is not None
        return await asyncio.to_thread(unread, self._program.slave_name()) > 0

    async def _delivered(self) -> None:
        async with self._turn:
            await self._database.surely(task_inputs.initial_delivered, hold=self.hold, now=timezone.now())
            self._typed = self._unread = False

    async def _take(self) -> task_inputs.Input | None:
        async with self._turn:
            given = await self._database.surely(task_inputs.next_input, hold=self.hold)
            if given is None:
                return None
            # Typed only after this, and this bears to be done twice: where the answer of the very commit gets lost, the line does not.
            await self._database.surely(
                task_inputs.inputs_taken, hold=self.hold, through=given.number, now=timezone.now()
            )
            if given.kind == InputKind.RESIZE:
                return given
            if given.finishes:
                # The verb has told it.
                self._waiting = False
                self._happened()
            else:
                self._echo_until = self._loop.time() + ECHO_SECONDS
            return given

    async def _put(self) -> None:
        """Write what is to be typed to the terminal, as fast as the program takes it."""
        while self._untyped:
            piece = self._untyped[0]
            await self._put_piece()
            self._untyped.pop(0)
            if self._untyped and not self._line().canonical:
                await asyncio.sleep(ESCAPE_SECONDS if piece == keys.KEYS["escape"] else PIECE_SECONDS)

    async def _put_piece(self) -> None:
        program = self._program
        assert program is not None
        while piece := self._untyped[0]:
            try:
                self._untyped[0] = piece[os.write(program.master, piece[:WRITE_BYTES]) :]
            except BlockingIOError:
                writable = asyncio.Event()
                self._loop.add_writer(program.master, writable.set)
                try:
                    await writable.wait()
                finally:
                    self._loop.remove_writer(program.master)
            except OSError:
                # Nobody has the terminal open: nobody will read it.
                self._untyped[0] = b""

    def _line(self) -> Line:
        assert self._program is not None
        return line_of(termios.tcgetattr(self._program.master))

    def _resize(self, rows: int, cols: int) -> None:
        assert self._program is not None
        self._program.resize(rows, cols)

    # ── Whether it waits ──

    def _happened(self) -> None:
        self._written += 1
        self._active_at = self._loop.time()
        self._active.set()

    async def _watch(self) -> None:
        """Tell when it stands still, and when it goes on by itself."""
        quiet = settings.COMMAND_QUIET_SECONDS
        pause = quiet
        while True:
            self._active.clear()
            now = self._loop.time()
            if self._waiting and self._written != self._written_when_waiting:
                if now < self._echo_until:
                    await asyncio.sleep(self._echo_until - now)
                    await self._look_again()
                else:
                    await self._moved()
            elif self._waiting:
                await self._active.wait()
            elif now - self._active_at < quiet:
                pause = quiet
                await asyncio.sleep(self._active_at + quiet - now)
            elif await self._stands_still(patient=now - self._active_at >= QUIET_TIMES * quiet) is Waits.BUSY:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(pause):
                        await self._active.wait()
                pause = min(pause * 1.5, RARELY_SECONDS)

    async def _look_again(self) -> None:
        """Something was typed without Enter, and it wrote something: an echo, after which it waits as before, or an answer."""
        self._written_when_waiting = self._written
        if await self._stands_still(patient=True) is Waits.BUSY:
            await self._moved()

    async def _moved(self) -> None:
        """It goes on without having been given a line."""
        async with self._turn:
            if self._waiting:
                self._waiting = False
                await self._database.surely(tasks.go_on, hold=self.hold, now=timezone.now())

    async def _stands_still(self, *, patient: bool) -> Waits:
        """It has been quiet: whether it waits, which is told. ``patient``: when nothing can be known, that is enough."""
        program = self._program
        assert program is not None
        written = self._written
        seen = await asyncio.to_thread(look, program.master, program.slave_name())
        line = self._line()
        if seen is Waits.UNKNOWN and not patient and not line.asks_secret:
            return Waits.BUSY
        if seen is Waits.BUSY or _something_to_read(program.master):
            # What it wrote before it began to read is on its way: first that.
            return Waits.BUSY
        # What it asks is to be seen by whoever is told that it asks.
        assert self._reading is not None
        await self._reading.kept.wait()
        async with self._turn:
            if written == self._written and not self._ending:
                self._ready.set()
                prompt = {
                    **prompts.recognise(self._tail, secret=line.asks_secret),
                    "detected_by": "read" if seen is Waits.READS else "quiet",
                }
                self._written_when_waiting = written
                self._waiting = await self._database.surely(
                    tasks.await_input, hold=self.hold, prompt=prompt, now=timezone.now()
                )
                if not self._waiting:
                    # Something was sent, and is about to be taken.
                    self._active_at = self._loop.time()
        return seen
