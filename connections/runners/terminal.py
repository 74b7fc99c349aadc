"""A program under a terminal, as a worker sees it: the other side of ``keeper.py``.

:class:`Keeper` starts programs, :class:`Program` is one of them: what comes out of it is read from its ``master``, and what is typed is written
there. Neither knows anything of tasks or of the database.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import logging
import os
import signal
import socket
import struct
import subprocess
import sys
import termios
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

logger = logging.getLogger(__name__)

KEEPER = Path(__file__).with_name("keeper.py")
#: Seconds for an answer of a supervisor, on a machine that is busy.
ANSWER_SECONDS = 30.0
#: Seconds that a keeper without anything to do needs to end.
GOODBYE_SECONDS = 1.0
#: Supervisors that are kept for the next commands: as many as a worker has at once, when nobody has said otherwise.
IDLE = 20
#: A supervisor that has said nothing so long after SIGKILL was due hangs (somebody has stopped it): it is killed, and the keeper ends what it leaves.
STUCK_SECONDS = 10.0
_TIOCGPTN = 0x80045430


class CannotStart(Exception):
    """The program was not started. The text is fit to be shown; ``code`` is the task's ``error_code``."""

    def __init__(self, why: str, code: str) -> None:
        super().__init__(why)
        self.code = code


class SupervisorLost(Exception):
    """The supervisor of the program is gone; with it, the program."""


class Program:
    """One program. ``ended`` has how it ended: ``(exit code, None)`` or ``(None, number of the signal)``.

    ``master`` is the terminal: not blocking, and closed by :meth:`close`.
    """

    def __init__(self, link: socket.socket, give_back: Callable[[socket.socket], None] | None = None) -> None:
        self._link = link
        self._give_back = give_back
        #: The supervisor is done with it, and ready for another one.
        self._free = False
        self._link.setblocking(False)
        self._loop = asyncio.get_running_loop()
        self._buffer = bytearray()
        self._answer: asyncio.Future[dict[str, Any]] = self._loop.create_future()
        self.ended: asyncio.Future[tuple[int | None, int | None]] = self._loop.create_future()
        self.master = -1
        self.pid = self._supervisor = 0
        self._stuck: asyncio.TimerHandle | None = None
        self._loop.add_reader(link, self._hear)

    # ── What the supervisor says ──

    def _hear(self) -> None:
        try:
            data, descriptors, _, _ = socket.recv_fds(self._link, 1 << 16, 1)
        except BlockingIOError:
            return
        except ConnectionError:
            data, descriptors = b"", []
        for descriptor in descriptors:
            os.set_inheritable(descriptor, False)
            os.set_blocking(descriptor, False)
            self.master = descriptor
        if not data:
            self._free = False
            self._loop.remove_reader(self._link)
            for waiting in (self._answer, self.ended):
                if not waiting.done():
                    waiting.set_exception(SupervisorLost("the supervisor is gone"))
                    # Whoever waits is told; nobody has to wait.
                    waiting.exception()
            return
        self._buffer += data
        *lines, rest = bytes(self._buffer).split(b"\n")
        self._buffer[:] = rest
        for line in lines:
            self._take(json.loads(line))

    def _take(self, message: dict[str, Any]) -> None:
        if "ended" in message:
            self._free = True
            if not self._answer.done():
                # It will not come: the program was quicker.
                self._answer.set_exception(SupervisorLost("the program has ended"))
                self._answer.exception()
            if not self.ended.done():
                self.ended.set_result((message["ended"].get("exit"), message["ended"].get("signal")))
        elif not self._answer.done():
            self._answer.set_result(message)

    async def answer(self) -> dict[str, Any]:
        """
        :raises SupervisorLost: it says nothing any more.
        """
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                return await self._answer
        except TimeoutError:
            raise SupervisorLost("the supervisor does not answer") from None
        finally:
            self._answer = self._loop.create_future()

    def tell(self, message: Mapping[str, Any]) -> None:
        """Say something to the supervisor. One that is gone is noticed where it is heard."""
        # Short: it fits into the buffer of the socket.
        with contextlib.suppress(ConnectionError):
            self._link.send(json.dumps(message).encode() + b"\n")

    async def begin(self, spec: Mapping[str, Any]) -> None:
        """
        :raises CannotStart: with the reason.
        :raises SupervisorLost: it has died.
        """
        try:
            await self._loop.sock_sendall(self._link, json.dumps(spec).encode() + b"\n")
        except ConnectionError:
            raise SupervisorLost("the supervisor is gone") from None
        said = await self.answer()
        if "failed" in said:
            self._free = True
            raise CannotStart(said["failed"], said["code"])
        self._began(said)

    def _began(self, said: Mapping[str, Any]) -> None:
        self.pid, self._supervisor = said["started"], said["supervisor"]

    # ── What can be done with it ──

    def end(self, grace: float) -> None:
        """SIGTERM to its process group; what is left after ``grace`` seconds gets SIGKILL. ``ended`` tells when it is over."""
        self.tell({"do": "end", "grace": grace})
        if self._stuck is None:
            self._stuck = self._loop.call_later(grace + STUCK_SECONDS, self._give_up)

    def _give_up(self) -> None:
        if not self.ended.done():
            logger.error("the supervisor of process %d hangs; killing it", self.pid)
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._supervisor, signal.SIGKILL)

    async def leave(self, *, path: Path, seconds: float, luggage: Mapping[str, Any]) -> None:
        """Let the supervisor wait for another worker, which gets ``luggage``. Nobody reads the terminal from now on.

        :raises SupervisorLost: it has died, or the program has ended meanwhile.
        """
        wish = {"do": "wait", "path": str(path), "seconds": seconds, "luggage": luggage}
        with contextlib.suppress(ConnectionError):
            await self._loop.sock_sendall(self._link, json.dumps(wish).encode() + b"\n")
        await self.answer()

    def resize(self, rows: int, cols: int) -> None:
        """A new size of the terminal; its foreground processes get SIGWINCH from the kernel."""
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, cols, 0, 0))

    def slave_name(self) -> str:
        """The name of the terminal as the program sees it; empty where the system does not say."""
        if sys.platform != "linux":
            return ""
        (number,) = struct.unpack("i", fcntl.ioctl(self.master, _TIOCGPTN, b"\0" * 4))
        return f"/dev/pts/{number}"

    def close(self) -> None:
        """Leave: a program that still runs is ended by its supervisor. Idempotent."""
        if self._stuck is not None:
            self._stuck.cancel()
        if self._link.fileno() != -1:
            self._loop.remove_reader(self._link)
            if self._free and self._give_back is not None:
                # To the next command.
                self._give_back(self._link)
                self._link = socket.socket()
            self._link.close()
        if self.master != -1:
            self._loop.remove_reader(self.master)
            self._loop.remove_writer(self.master)
            os.close(self.master)
            self.master = -1
        if not self.ended.done():
            self.ended.cancel()


async def adopt(path: Path) -> tuple[Program, dict[str, Any]] | None:
    """A program that waits for another worker, with its luggage; None when it has found one, or is gone."""
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    link.setblocking(False)
    try:
        # The name of a socket is short, the path of a folder need not be.
        await asyncio.get_running_loop().sock_connect(link, f"/proc/self/fd/{folder}/{path.name}")
    except ConnectionRefusedError:
        # Its supervisor has died.
        path.unlink(missing_ok=True)
        link.close()
        return None
    except OSError:
        link.close()
        return None
    finally:
        os.close(folder)
    program = Program(link)
    try:
        said = await program.answer()
    except SupervisorLost:
        program.close()
        return None
    program._began(said)
    return program, said["adopt"]


class Keeper:
    """Starts programs; itself a process that is started with the first of them, and again should it die."""

    def __init__(self) -> None:
        self._control: socket.socket | None = None
        #: Supervisors without a command.
        self._idle: list[socket.socket] = []
        self._process: subprocess.Popen[bytes] | None = None

    async def run(
        self, *, argv: Sequence[str], cwd: str, env: Mapping[str, str], rows: int, cols: int, grace: float
    ) -> Program:
        """Start a program.

        :param grace: seconds between SIGTERM and SIGKILL when this worker dies.
        :raises CannotStart: with the reason.
        """
        spec = {"argv": list(argv), "cwd": cwd, "env": dict(env), "rows": rows, "cols": cols, "grace": grace}
        try:
            program = Program(self._supervisor(), self._take_back)
        except OSError as error:
            raise CannotStart(f"No process can be started: {error.strerror}.", "cannot_start") from error
        try:
            await program.begin(spec)
        except SupervisorLost as error:
            program.close()
            raise CannotStart("The process that starts commands has died.", "cannot_start") from error
        except BaseException:
            program.close()
            raise
        return program

    def _take_back(self, link: socket.socket) -> None:
        if len(self._idle) < IDLE and self._control is not None:
            self._idle.append(link)
        else:
            link.close()

    def _supervisor(self) -> socket.socket:
        """One that has nothing to do, or a new one."""
        while self._idle:
            link = self._idle.pop()
            try:
                link.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
            except BlockingIOError:
                return link
            except ConnectionError:
                pass
            # It was killed meanwhile.
            link.close()
        return self._new_supervisor()

    def _new_supervisor(self) -> socket.socket:
        """
        :raises OSError: there is no process, or no descriptor, left for it.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            try:
                try:
                    socket.send_fds(self._started(), [b"+"], [theirs.fileno()])
                except ConnectionError:
                    # It was killed: the next one is as good.
                    self.stop()
                    socket.send_fds(self._started(), [b"+"], [theirs.fileno()])
            except OSError:
                ours.close()
                raise
        return ours

    def _started(self) -> socket.socket:
        if self._control is None:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
            with theirs:
                # Not asyncio's: that would kill it with the event loop, and it may have to outlive this worker (handover).
                self._process = subprocess.Popen(  # noqa: S603 (our own file)
                    [sys.executable, "-I", str(KEEPER), str(theirs.fileno())],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    pass_fds=(theirs.fileno(),),
                    # What it starts can be looked at by what it starts: nothing of ours is in there.
                    env={"PATH": os.defpath},
                    # Ctrl-C, and a signal to the whole group of the worker, are for the worker alone.
                    start_new_session=True,
                )
            self._control = ours
            assert self._process.stderr is not None
            os.set_blocking(self._process.stderr.fileno(), False)
            asyncio.get_running_loop().add_reader(self._process.stderr, self._hear, self._process.stderr)
        return self._control

    def _hear(self, stderr: IO[bytes]) -> None:
        """It says nothing but what is wrong with it."""
        said = stderr.read(1 << 16)
        if said:
            logger.error("keeper: %s", said.decode(errors="replace").rstrip())
        elif said == b"":
            asyncio.get_running_loop().remove_reader(stderr)

    def stop(self) -> None:
        """Let it go. It ends by itself when the last supervisor does, which may be later."""
        for link in self._idle:
            link.close()
        self._idle.clear()
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._process is not None:
            assert self._process.stderr is not None
            asyncio.get_running_loop().remove_reader(self._process.stderr)
            self._process.stderr.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(GOODBYE_SECONDS)
            self._process = None


def signal_name(number: int) -> str:
    """``SIGSEGV`` for 11; a number that has no name is ``SIG34``."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"SIG{number}"
