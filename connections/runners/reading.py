"""What a program writes, from its terminal to the database.

The event loop reads the terminal into memory, and stops reading while there is too much there: then the program waits. :meth:`Reading.write` appends
what was read, in batches, while the next one comes in. What a program writes in its last moment is left for the transaction of its end.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable

from django.utils import timezone

from connections import outputs
from connections.runners.database import Database
from connections.runners.terminal import Program
from connections.tasks import Hold

#: Read in one go, before other commands have their turn.
TURN_BYTES = 1 << 18
#: Written in one transaction, and held in memory of one command at most (when it is reached, reading stops).
BATCH_BYTES, HELD_BYTES = 1 << 20, 1 << 21
#: Seconds between the beginnings of two transactions for output of one command, while there is less than a batch.
BATCH_SECONDS = 0.05
#: The first output waits so long for more: a command that is over in a moment is told with its output, in one transaction.
MOMENT_SECONDS = 0.02
#: A program that closed its terminal may open it again.
REOPEN_SECONDS = 0.2
#: How long the end of the output is waited for after everything has ended that could write to it.
DRAIN_SECONDS = 2.0


class Reading:
    """The output of one program. ``heard`` is called with every piece, as it comes; ``kept`` is set while all of it is in the database."""

    def __init__(
        self, program: Program, hold: Hold, *, at: int, database: Database, heard: Callable[[bytes], None]
    ) -> None:
        self.kept = asyncio.Event()
        self.kept.set()
        #: The offset of the first byte that is not kept yet.
        self.at = at
        self._program = program
        self._hold = hold
        self._database = database
        self._heard = heard
        self._loop = asyncio.get_running_loop()
        self._pieces: list[bytes] = []
        self._held = 0
        self._more, self._full, self._hang = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._paused = self._hung_up = self._stopped = False

    # ── From the terminal into memory ──

    def read_on(self) -> None:
        self._paused = self._hung_up = False
        self._loop.add_reader(self._program.master, self._readable)

    def _readable(self) -> None:
        master = self._program.master
        pieces, size = [], 0
        while size < TURN_BYTES:
            try:
                piece = os.read(master, TURN_BYTES)
            except BlockingIOError:
                break
            except OSError:
                # Nobody has the terminal open any more.
                piece = b""
            if not piece:
                self._loop.remove_reader(master)
                self._hung_up = True
                self._hang.set()
                if not self._program.ended.done():
                    self._loop.call_later(REOPEN_SECONDS, self._reopened)
                break
            pieces.append(piece)
            size += len(piece)
        if not size:
            return
        data = b"".join(pieces)
        self._pieces.append(data)
        self._held += size
        self.kept.clear()
        self._more.set()
        if self._held >= BATCH_BYTES:
            self._full.set()
        if self._held >= HELD_BYTES:
            self._loop.remove_reader(master)
            self._paused = True
        self._heard(data)

    def _reopened(self) -> None:
        if self._hung_up and not self._program.ended.done() and not self._stopped:
            self.read_on()

    # ── From memory into the database ──

    async def write(self) -> None:
        """Append what was read, until :meth:`stop`.

        :raises NotHeld: the lease is somebody else's.
        """
        begun = self._loop.time() - BATCH_SECONDS + MOMENT_SECONDS
        while True:
            await self._more.wait()
            if not self._stopped and (wait := begun + BATCH_SECONDS - self._loop.time()) > 0:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(wait):
                        await self._full.wait()
            if self._stopped:
                return
            begun = self._loop.time()
            await self._append()

    async def _append(self) -> None:
        data = b"".join(self._pieces)
        self._pieces.clear()
        self._held = 0
        self._more.clear()
        self._full.clear()
        if self._paused and not self._stopped:
            # The next batch comes in while this one is being written.
            self.read_on()
        if data:
            await self._database.surely(
                outputs.append,
                task_id=self._hold.task_id,
                worker=self._hold.worker,
                attempt=self._hold.attempt,
                data=data,
                at=self.at,
                now=timezone.now(),
            )
            self.at += len(data)
        if not self._pieces:
            self.kept.set()

    # ── The end ──

    def stop(self) -> None:
        """Let :meth:`write` return after what it is writing."""
        self._stopped = True
        self._more.set()
        self._full.set()

    async def leave(self, writing: asyncio.Task[None]) -> None:
        """Somebody else reads on: keep all that was read, and read nothing more."""
        self._loop.remove_reader(self._program.master)
        self._paused = True
        self.stop()
        await writing
        await self._append()

    def go_on(self) -> None:
        """Nobody else does, after all. :meth:`write` is to be called again."""
        self._stopped = self._paused = False

    async def drain(self) -> None:
        """Everything that could write has ended: read to the end of what it wrote."""
        self._hung_up = False
        self._hang.clear()
        if not self._paused:
            self.read_on()
        while not self._hung_up:
            before = self.at + self._held
            try:
                async with asyncio.timeout(DRAIN_SECONDS):
                    await self._hang.wait()
            except TimeoutError:
                if not self._paused and self.at + self._held == before:
                    # A process that is none of ours has the terminal open.
                    return

    def rest(self) -> bytes:
        """What is not kept yet."""
        return b"".join(self._pieces)
