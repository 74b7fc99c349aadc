"""The program that starts commands, and sees to it that nothing of them is left. It is not imported: a worker starts it as a process.

Three kinds of processes, none of which knows Django or a secret of the server:

- the *keeper*, one per worker, single-threaded and small, so that a fork takes a millisecond. For each command the worker sends it one end
  of a socket; it forks a supervisor for that socket, and has nothing else to do with the command;
- a *supervisor* per running command, the parent of everything that the command starts (``PR_SET_CHILD_SUBREAPER``). It opens the terminal, starts the
  program in a session of its own, hands the terminal's master to the worker, and waits. When the program has ended it ends what the program
  left behind, and says how the program ended. When the socket breaks, because the worker died, it ends the program, too;
- the command itself. When its supervisor dies, it falls to the keeper, which ends it.

The socket of a supervisor carries a JSON object a line. The first one says what to run::

    {"argv": [...], "cwd": "/...", "env": {...}, "rows": 24, "cols": 80, "grace": 5.0}

The answer is ``{"started": <pid>, "supervisor": <pid>}`` with the master as SCM_RIGHTS, or ``{"failed": "<why>", "code": "cannot_start" | "missing_directory"}``. Then:

- ``{"do": "end", "grace": 5.0}``: SIGTERM to the program's groups, after ``grace`` seconds SIGKILL to all that is left;
- ``{"do": "wait", "path": "...", "seconds": 60, "luggage": {...}}``: the worker leaves. The answer is ``{"waiting": true}``, and from then on it
  listens on a socket of that name for another worker. That one is sent the first answer again, with ``"adopt": <luggage>``, and all goes
  on as if it had been there from the start. Nobody comes: as if the worker had died;
- at the end ``{"ended": {"exit": 3}}`` or ``{"ended": {"signal": 11}}``: the program has ended, and so have all of its children. Then, and when it could not be
  started, the supervisor is ready for the next command: a new process for each would be half of what a short command costs.

Outside of Linux there is neither a subreaper nor /proc: there the process group is what is ended.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import gc
import json
import os
import resource
import select
import shutil
import signal
import socket
import struct
import sys
import termios
import time
from typing import Any, NoReturn

from ptyprocess import PtyProcess

_PR_SET_CHILD_SUBREAPER = 36
_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None

#: Seconds that what a program leaves behind gets to end after SIGTERM.
LEFTOVERS_SECONDS = 0.5
#: What SIGKILL has not ended after this time belongs to another user (``sudo``), or hangs in the kernel. It is left alone with the hangup of its terminal.
STUBBORN_SECONDS = 5.0
#: While something is being killed it is looked again this often: a new child announces itself to nobody.
SWEEP_SECONDS = 0.05


def prctl(option: int, value: int) -> None:
    """Linux only; elsewhere nothing happens."""
    if _libc is not None:
        _libc.prctl(option, value, 0, 0, 0)


# ── Processes ─────────────────────────────────────────────────────────────────────────────────────────────────────


def wake_on_children() -> int:
    """A descriptor that can be read when a child has ended."""
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    os.set_blocking(writing, False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    return reading


def drain(wake: int) -> None:
    with contextlib.suppress(BlockingIOError):
        while os.read(wake, 512):
            pass


def reap() -> tuple[dict[int, int], bool]:
    """Which children have ended, with their wait status, and whether there are any others."""
    ended: dict[int, int] = {}
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return ended, False
        if pid == 0:
            return ended, True
        ended[pid] = status


def descendants(root: int) -> set[int]:
    """Every process below this one, as far as /proc tells."""
    children: dict[int, list[int]] = {}
    try:
        names = os.listdir("/proc")
    except OSError:
        return set()
    for name in names:
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:
                    # The name of the program, in brackets, may hold anything.
                    parent = int(file.read().rpartition(b")")[2].split()[1])
            except (OSError, IndexError, ValueError):
                continue
            children.setdefault(parent, []).append(int(name))
    found: set[int] = set()
    look = [root]
    while look:
        below = children.get(look.pop(), [])
        found.update(below)
        look += below
    return found


def kill(pid: int, number: int) -> None:
    """One that is gone, or has become somebody else, needs nothing any more."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)


def kill_group(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


# ── The keeper ────────────────────────────────────────────────────────────────────────────────────────────────────


def keep(control: socket.socket) -> None:
    """Fork a supervisor for every socket that arrives, until the worker is gone and the last supervisor with it."""
    prctl(_PR_SET_CHILD_SUBREAPER, 1)
    # What programs inherit: no core files, and an ordinary umask.
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    os.umask(0o022)
    wake = wake_on_children()
    supervisors: set[int] = set()
    # What is there now is shared with every fork for good: a collector that touched it would copy it.
    gc.collect()
    gc.freeze()
    poller = select.poll()
    poller.register(control, select.POLLIN)
    poller.register(wake, select.POLLIN)
    worker_there, orphans = True, False
    while worker_there or supervisors or orphans:
        for descriptor, _ in poller.poll(SWEEP_SECONDS * 1000 if orphans else None):
            if descriptor == wake:
                drain(wake)
                continue
            try:
                message, descriptors, _, _ = socket.recv_fds(control, 1, 1)
            except ConnectionError:
                message, descriptors = b"", []
            if not message:
                worker_there = False
                poller.unregister(control)
            for theirs in descriptors:
                os.set_inheritable(theirs, False)
                try:
                    pid = os.fork()
                except OSError:
                    # The worker sees the socket closed.
                    os.close(theirs)
                    continue
                if pid == 0:
                    control.close()
                    os.close(wake)
                    run_supervisor(socket.socket(fileno=theirs))
                supervisors.add(pid)
                os.close(theirs)
        ended, _ = reap()
        supervisors -= ended.keys()
        if orphans or any(ended.values()):
            # A supervisor that was killed, or broke, has left its children to us.
            ours = descendants(os.getpid())
            kept = supervisors.union(*(descendants(pid) for pid in supervisors))
            orphans = bool(ours - kept)
            for pid in ours - kept:
                kill(pid, signal.SIGKILL)


# ── A supervisor ──────────────────────────────────────────────────────────────────────────────────────────────────


def run_supervisor(link: socket.socket) -> NoReturn:
    """The whole life of a forked supervisor: it never returns into the keeper's loop."""
    code = 1
    try:
        prctl(_PR_SET_CHILD_SUBREAPER, 1)
        Supervisor(link).run()
        code = 0
    except Exception:  # noqa: BLE001 (written to standard error, which the worker logs)
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(code)


class CannotStart(Exception):
    """Why, in words, and as the code that the task gets."""

    def __init__(self, why: str, code: str = "cannot_start") -> None:
        super().__init__(why)
        self.code = code


def spawn(spec: dict[str, Any]) -> tuple[int, int]:
    """Start the program under a new terminal, in a session of its own; its process, and the terminal's master.

    :raises CannotStart: it could not be started.
    """
    argv, env = spec["argv"], spec["env"]
    try:
        for text in (*argv, *env, *env.values()):
            os.fsencode(text)
    except UnicodeError:
        raise CannotStart("An argument cannot be written in the encoding of this system.") from None
    try:
        os.chdir(spec["cwd"])
    except OSError as error:
        raise CannotStart(
            f"The folder {spec['cwd']} cannot be used: {error.strerror}.", "missing_directory"
        ) from error
    # Both ways look the program up in the PATH that the command gets.
    os.environ["PATH"] = env.get("PATH", os.defpath)
    start = spawn_at_once if sys.platform == "linux" else spawn_by_fork
    try:
        return start(argv, env, spec["rows"], spec["cols"])
    except FileNotFoundError:
        raise CannotStart(why_not_found(argv[0])) from None
    except (OSError, ValueError) as error:
        # With a word of the kernel: no permission, not a program, arguments too long, no terminal left.
        code = getattr(error, "errno", None)
        raise CannotStart(f"{argv[0]} cannot be started: {os.strerror(code) if code else error}.") from error


def spawn_at_once(argv: list[str], env: dict[str, str], rows: int, cols: int) -> tuple[int, int]:
    """On Linux a leader of a session that opens a terminal gets it as its own, so no code of ours has to run between fork and exec, and
    posix_spawn copies no memory: half of what a short command costs.

    Descriptors of this process close by themselves (PEP 446), and folder, umask and limits are inherited. What ``PR_SET_PDEATHSIG`` would do for a
    fork, the keeper does, to which the program falls when this process dies.
    """
    program = shutil.which(argv[0])
    if program is None:
        raise FileNotFoundError(argv[0])
    master, slave = os.openpty()
    try:
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, cols, 0, 0))
        actions = [
            (os.POSIX_SPAWN_OPEN, 0, os.ttyname(slave), os.O_RDWR, 0),
            (os.POSIX_SPAWN_DUP2, 0, 1),
            (os.POSIX_SPAWN_DUP2, 0, 2),
        ]
        pid = os.posix_spawn(
            program, argv, env, file_actions=actions, setsid=True, setsigmask=[], setsigdef=IGNORED
        )
    except BaseException:
        os.close(master)
        raise
    finally:
        os.close(slave)
    return pid, master


def spawn_by_fork(argv: list[str], env: dict[str, str], rows: int, cols: int) -> tuple[int, int]:
    """Everywhere else: ptyprocess."""

    def before_exec() -> None:
        for number in IGNORED:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, [])

    process = PtyProcess.spawn(argv, env=env, preexec_fn=before_exec, dimensions=(rows, cols))
    # A descriptor of our own: what is collected ends its program.
    master = os.dup(process.fd)
    process.fileobj.close()
    process.closed = True
    return process.pid, master


def why_not_found(program: str) -> str:
    if os.path.isdir(program):
        return f"{program} is a folder, not a program."
    if os.path.dirname(program):
        if not os.path.exists(program):
            return f"There is no program {program}."
        return f"{program} may not be executed."
    return f"There is no program {program} in the PATH of the worker."


class Supervisor:
    """One program after the other: its terminal, its end, and whoever wants to know about it."""

    def __init__(self, link: socket.socket) -> None:
        self.link: socket.socket | None = link
        self.listener: socket.socket | None = None
        self.listener_path = ""
        self.burdened = False
        self.wake = wake_on_children()
        self.grace = 0.0
        self.master = -1
        self.pid = 0
        self.status: int | None = None
        self.kill_at: float | None = None
        self.give_up_at: float | None = None
        self.begin()
        self.buffer = bytearray()
        self.poller = select.poll()
        self.poller.register(link, select.POLLIN)
        self.poller.register(self.wake, select.POLLIN)

    def run(self) -> None:
        """One command after the other, for as long as the worker has any for it."""
        while self.link is not None and not self.burdened and (spec := self.first_line()) is not None:
            self.begin()
            self.grace = spec["grace"]
            try:
                self.pid, self.master = spawn(spec)
            except CannotStart as why:
                self.say({"failed": str(why), "code": why.code})
                reap()
                continue
            self.say(self.who(), self.master)
            while not self.over():
                self.look()
            self.stop_listening()
            os.close(self.master)
            os.chdir("/")

    def begin(self) -> None:
        """As if there had been no command before."""
        self.luggage = None
        self.status = None
        self.children = True
        self.asked = self.tidying = False
        self.kill_at = self.give_up_at = None

    def who(self) -> dict[str, int]:
        return {"started": self.pid, "supervisor": os.getpid()}

    def over(self) -> bool:
        """Whether there is nothing left to do: nothing runs, and somebody was told or nobody will ask."""
        if self.children:
            return False
        if self.link is not None:
            assert self.status is not None
            number = os.WTERMSIG(self.status) if os.WIFSIGNALED(self.status) else 0
            self.say({"ended": {"signal": number} if number else {"exit": os.WEXITSTATUS(self.status)}})
            return True
        return self.listener is None

    def look(self) -> None:
        """Wait for something to happen, and deal with it."""
        for descriptor, _ in self.poller.poll(self.patience()):
            if descriptor == self.wake:
                drain(self.wake)
            elif self.link is not None and descriptor == self.link.fileno():
                self.hear()
            elif self.listener is not None and descriptor == self.listener.fileno():
                self.adopt()
        ended, self.children = reap()
        self.status = ended.get(self.pid, self.status)
        now = time.monotonic()
        if self.give_up_at is not None and now >= self.give_up_at:
            self.give_up_at = None
            self.stop_listening()
            self.end(self.grace)
        if self.children and self.status is not None and not self.tidying:
            # The program has ended, and left something behind.
            self.tidying = True
            self.signal_all(signal.SIGTERM)
            self.kill_within(min(LEFTOVERS_SECONDS, self.grace))
        if self.children and self.kill_at is not None and now >= self.kill_at:
            self.signal_all(signal.SIGKILL)
            if now >= self.kill_at + STUBBORN_SECONDS:
                # Whoever has such a child can tell nothing by its children any more.
                self.children, self.burdened = False, True
                self.status = signal.SIGKILL if self.status is None else self.status

    def patience(self) -> float | None:
        """Milliseconds until something is due by itself."""
        due = [at for at in (self.kill_at if self.children else None, self.give_up_at) if at is not None]
        if not due:
            return None
        wait = min(due) - time.monotonic()
        return max(wait, SWEEP_SECONDS) * 1000

    def end(self, grace: float) -> None:
        """SIGTERM now, SIGKILL after ``grace`` seconds. Again, only an earlier SIGKILL is news."""
        if not self.asked and self.status is None:
            groups = {self.pid}
            with contextlib.suppress(OSError):
                groups.add(os.tcgetpgrp(self.master))
            for group in groups - {0, -1}:
                kill_group(group, signal.SIGTERM)
                # What is stopped hears nothing otherwise.
                kill_group(group, signal.SIGCONT)
        self.asked = True
        self.kill_within(grace)

    def kill_within(self, seconds: float) -> None:
        at = time.monotonic() + seconds
        self.kill_at = at if self.kill_at is None else min(self.kill_at, at)

    def signal_all(self, number: int) -> None:
        if self.status is None:
            kill_group(self.pid, number)
        for pid in descendants(os.getpid()):
            kill(pid, number)

    # ── The worker, and the next one ──

    def first_line(self) -> dict[str, Any] | None:
        """What to run next; None when the worker is gone. A word about a command that has just ended comes too late, and is passed over."""
        while True:
            while b"\n" not in self.buffer:
                data = self.receive()
                if not data:
                    return None
                self.buffer += data
            line, _, rest = bytes(self.buffer).partition(b"\n")
            self.buffer[:] = rest
            found: dict[str, Any] = json.loads(line)
            if "argv" in found:
                return found

    def receive(self) -> bytes:
        assert self.link is not None
        try:
            return self.link.recv(1 << 16)
        except ConnectionError:
            return b""

    def hear(self) -> None:
        data = self.receive()
        if not data:
            self.lose_link()
            self.end(self.grace)
            return
        self.buffer += data
        *lines, rest = bytes(self.buffer).split(b"\n")
        self.buffer[:] = rest
        for line in lines:
            wish = json.loads(line)
            if wish["do"] == "end":
                self.end(wish["grace"])
            elif wish["do"] == "wait":
                self.wait_for_another(wish)

    def lose_link(self) -> None:
        if self.link is not None:
            self.poller.unregister(self.link)
            self.link.close()
            self.link = None

    def say(self, message: dict[str, Any], descriptor: int | None = None) -> None:
        assert self.link is not None
        data = json.dumps(message).encode() + b"\n"
        try:
            if descriptor is None:
                self.link.sendall(data)
            else:
                # Short enough to go in one piece: the buffer of a new socket is empty, or nearly so.
                sent = socket.send_fds(self.link, [data], [descriptor])
                self.link.sendall(data[sent:])
        except ConnectionError:
            # Whoever should hear it is gone: noticed where it is read.
            return

    def wait_for_another(self, wish: dict[str, Any]) -> None:
        folder, name = os.path.split(wish["path"])
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        # The name of a socket is short, the path of a folder need not be.
        os.chdir(folder)
        listener.bind(name)
        listener.listen(1)
        self.say({"waiting": True})
        self.lose_link()
        self.buffer.clear()
        self.listener, self.listener_path, self.luggage = listener, name, wish["luggage"]
        self.give_up_at = time.monotonic() + wish["seconds"]
        self.poller.register(listener, select.POLLIN)

    def adopt(self) -> None:
        assert self.listener is not None
        self.link, _ = self.listener.accept()
        self.stop_listening()
        self.give_up_at = None
        self.poller.register(self.link, select.POLLIN)
        self.say({"adopt": self.luggage, **self.who()}, self.master)

    def stop_listening(self) -> None:
        if self.listener is not None:
            self.poller.unregister(self.listener)
            self.listener.close()
            self.listener = None
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.listener_path)


#: Signals that this process ignores, by itself or because it was started so: a program that is started would go on ignoring them.
IGNORED: list[int] = []

if __name__ == "__main__":
    # The worker's signals are not ours: it tells us over the socket, or by dying.
    for ignored in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(ignored, signal.SIG_IGN)
    IGNORED += [number for number in signal.valid_signals() if signal.getsignal(number) == signal.SIG_IGN]
    os.set_inheritable(int(sys.argv[1]), False)
    keep(socket.socket(fileno=int(sys.argv[1])))
