"""The load generator: a process of its own that holds thousands of streams and notes what came when.

Plain Python on epoll and non-blocking sockets. While it measures it only receives and notes ``(time, bytes)``; everything is taken apart
afterwards (``check.py``). Its own CPU is part of every report, so that one can see that it was not what was measured.

It is spoken to in lines of JSON: a command on standard input, its answer on standard output (:class:`Generator` is the other end).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import errno
import gc
import itertools
import json
import os
import resource
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self, TypeVar

from tests.bench import check

T = TypeVar("T")

BUFFER = 1 << 18
#: How often slow readers read.
TICK_SECONDS = 0.25
#: A client that comes back and is refused tries again after this, as browsers do.
RETRY_SECONDS = 0.5
#: Spare file descriptors beside the streams.
SPARE = 100


def raise_limit(streams: int) -> int:
    """Allow as many open files as the system lets us; returns how many streams that is enough for."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = streams + SPARE
    if soft != resource.RLIM_INFINITY and soft < wanted:
        allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
        soft = allowed
    return streams if soft == resource.RLIM_INFINITY else max(0, min(streams, soft - SPARE))


def interleaved(groups: Sequence[Sequence[T]]) -> Iterator[T]:
    """One of each in turn."""
    for row in itertools.zip_longest(*groups):
        yield from (each for each in row if each is not None)


class Client:
    """One client over all its connections: what it ever got, in the order in which it came."""

    __slots__ = (
        "broken", "chunks", "cursor", "events", "group", "looked", "open", "reader", "request", "seqs", "socket",
        "statuses", "writing",
    )  # fmt: skip

    def __init__(self, group: Group, request: bytes) -> None:
        self.group = group
        self.request = request
        self.socket: socket.socket | None = None
        self.writing = False
        #: Open for the bench: its answer has begun, and the sign of readiness was seen.
        self.open = False
        self.chunks: list[tuple[int, bytes]] = []
        self.looked = 0
        self.reader = check.Reader()
        self.cursor = ""
        self.seqs: list[int] = []
        self.events: list[check.Got] = []
        self.statuses: list[int] = []
        self.broken = ""

    def take_apart(self) -> None:
        """Everything received until now becomes events."""
        chunks, self.chunks, self.looked = self.chunks, [], 0
        if self.broken or not chunks:
            return
        try:
            events, cursor = self.reader.feed(chunks)
        except check.Broken as error:
            self.broken = str(error)
            return
        self.cursor = cursor or self.cursor
        self.events.extend(events)
        self.seqs.extend(event.seq for event in events)

    def new(self) -> bytes:
        """What has come since the last look (with one piece of overlap)."""
        new = self.chunks[max(0, self.looked - 1) :]
        self.looked = len(self.chunks)
        return new[0][1] if len(new) == 1 else b"".join(piece for _, piece in new)

    def has(self, needle: bytes) -> bool:
        """Whether these bytes have come since the last look."""
        return needle in self.new()


@dataclasses.dataclass
class Group:
    """Clients that are told apart in the report. ``rate`` bytes a second, or as fast as they come (None); 0: never."""

    name: str
    address: tuple[str, int]
    ready: bytes
    rate: int | None = None
    #: As over a long line, not over the loopback: a small window and small segments, so that the sender's kernel keeps little for it.
    receive_buffer: int | None = None
    segment: int | None = None
    clients: list[Client] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Waiting:
    """A command whose answer is due when ``done()`` says so, or at ``deadline``, or when nothing comes for ``quiet`` seconds."""

    done: Callable[[], bool]
    answer: Callable[[bool], dict[str, Any]]
    deadline: float
    quiet: float
    began: float


class Load:
    def __init__(self) -> None:
        self.epoll = select.epoll()
        self.groups: dict[str, Group] = {}
        self.by_fd: dict[int, Client] = {}
        self.waiting: Waiting | None = None
        self.pending: set[Client] = set()
        #: Still to be connected, a bounded number at a time.
        self.queue: list[tuple[Client, str]] = []
        self.at_once = 0
        self.connecting = 0
        self.failed: list[str] = []
        #: Clients on their way back, and when those that were refused try again.
        self.returning: dict[Client, float] = {}
        self.buffer = bytearray(BUFFER)
        self.view = memoryview(self.buffer)
        self.received_at = time.monotonic()
        self.looked_at = 0.0
        self.ticked_at = 0.0
        self.cpu_at, self.wall_at = time.process_time(), time.monotonic()
        self.input = b""
        os.set_blocking(0, False)
        self.epoll.register(0, select.EPOLLIN)

    # ── The loop ──

    def run(self) -> None:
        # Millions of small objects that all live: collecting them would stop the clock again and again.
        gc.disable()
        while True:
            events = self.epoll.poll(0.01 if self.waiting or self.queue else TICK_SECONDS)
            for fd, mask in events:
                if fd == 0:
                    if not self.hear():
                        return
                    continue
                client = self.by_fd.get(fd)
                if client is not None:
                    self.serve(client, mask)
            now = time.monotonic()
            if now - self.ticked_at >= TICK_SECONDS:
                self.tick(now)
            if self.waiting is not None:
                self.look(now, idle=not events)

    def serve(self, client: Client, mask: int) -> None:
        if client.writing:
            if not mask & (select.EPOLLOUT | select.EPOLLERR | select.EPOLLHUP):
                return
            self.connected(client)
            return
        self.receive(client, BUFFER)

    def receive(self, client: Client, most: int) -> int:
        assert client.socket is not None
        try:
            size = client.socket.recv_into(self.buffer, most)
        except BlockingIOError:
            return 0
        except OSError as error:
            self.lost(client, errno.errorcode.get(error.errno or 0, "error"))
            return 0
        if not size:
            self.lost(client, "closed")
            return 0
        client.chunks.append((time.monotonic_ns(), bytes(self.view[:size])))
        if not client.open and client.has(client.group.ready):
            self.ready(client)
        return size

    def tick(self, now: float) -> None:
        """Slow readers take their portion; who was sent away while coming back tries again."""
        for client, due in list(self.returning.items()):
            if client.socket is None and now >= due:
                self.come(client)
        passed = min(1.0, now - self.ticked_at) if self.ticked_at else 0.0
        self.ticked_at = now
        for group in self.groups.values():
            if not group.rate:
                continue
            for client in group.clients:
                if client.open and client.socket is not None:
                    self.receive(client, max(1, int(group.rate * passed)))

    def look(self, now: float, *, idle: bool) -> None:
        """Is what a command waits for there? Looking costs a little, so it is done when nothing comes, or ten times a second."""
        assert self.waiting is not None
        if not idle:
            self.received_at = now
            if now - self.looked_at < 0.1:
                return
        self.looked_at = now
        waiting = self.waiting
        done = waiting.done()
        if not done and now < waiting.deadline and now - max(self.received_at, waiting.began) < waiting.quiet:
            return
        self.waiting = None
        self.say(waiting.answer(done))

    # ── Connections ──

    def connect(self, client: Client, cursor: str) -> None:
        """Begin to connect; the request is sent when the connection stands."""
        group = client.group
        made = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        made.setblocking(False)
        if group.receive_buffer:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, group.receive_buffer)
        if group.segment:
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, group.segment)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client.socket, client.writing, client.open = made, True, False
        client.reader = check.Reader()
        self.connecting += 1
        code = made.connect_ex(group.address)
        self.by_fd[made.fileno()] = client
        self.epoll.register(made.fileno(), select.EPOLLOUT)
        if code not in (0, errno.EINPROGRESS):
            self.lost(client, errno.errorcode.get(code, str(code)))
            return
        client.cursor = cursor

    def connected(self, client: Client) -> None:
        assert client.socket is not None
        code = client.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            self.lost(client, errno.errorcode.get(code, str(code)))
            return
        resume = f"Last-Event-ID: {client.cursor}\r\n".encode() if client.cursor else b""
        # A fresh socket takes so few bytes at once.
        client.socket.send(client.request + resume + b"\r\n")
        client.writing = False
        self.epoll.modify(client.socket.fileno(), select.EPOLLIN)

    def lost(self, client: Client, why: str) -> None:
        if not client.open:
            self.failed.append(why)
            self.connecting -= 1
            self.pending.discard(client)
        self.leave(client)
        if client in self.returning:
            self.returning[client] = time.monotonic() + RETRY_SECONDS

    def leave(self, client: Client) -> None:
        if client.socket is not None:
            self.by_fd.pop(client.socket.fileno(), None)
            with contextlib.suppress(OSError):
                self.epoll.unregister(client.socket.fileno())
            client.socket.close()
        client.socket, client.open, client.writing = None, False, False

    def begin(
        self, group: Group, clients: list[tuple[Client, str]], concurrency: int, timeout: float
    ) -> None:
        """Connect these; the answer is due when each is ready. ``concurrency`` 0: all at once."""
        self.at_once = concurrency or len(clients)
        self.queue = list(reversed(clients))
        self.pending = {client for client, _ in clients}
        self.failed = []
        self.connecting = 0
        count = len(clients)

        def done() -> bool:
            return not self.pending and not self.queue

        def answer(complete: bool) -> dict[str, Any]:
            statuses: dict[str, int] = {}
            for client in self.pending:
                head = (
                    client.chunks[0][1][:80].split(b"\r\n")[0].decode("latin-1")
                    if client.chunks
                    else "no answer"
                )
                statuses[head] = statuses.get(head, 0) + 1
            for why in self.failed:
                statuses[why] = statuses.get(why, 0) + 1
            return {
                "open": sum(client.open for client in group.clients),
                "asked": count,
                "failed": statuses,
                "seconds": round(time.monotonic() - began, 3),
            }

        began = time.monotonic()
        self.wait(done, answer, timeout=timeout, quiet=timeout)
        self.go_on()

    def go_on(self) -> None:
        while self.queue and self.connecting < self.at_once:
            self.connect(*self.queue.pop())

    def ready(self, client: Client) -> None:
        self.pending.discard(client)
        self.connecting -= 1
        client.open = True
        if client.group.rate is not None:
            assert client.socket is not None
            self.epoll.unregister(client.socket.fileno())
        self.go_on()

    # ── Commands ──

    def hear(self) -> bool:
        data = os.read(0, 1 << 20)
        if not data:
            return False
        self.input += data
        *lines, self.input = self.input.split(b"\n")
        for line in lines:
            words = json.loads(line)
            answer = getattr(self, "do_" + words.pop("do"))(**words)
            if answer is not None:
                self.say(answer)
        return True

    def say(self, answer: dict[str, Any]) -> None:
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()

    def wait(self, done: Callable[[], bool], answer: Any, *, timeout: float, quiet: float) -> None:
        now = time.monotonic()
        self.waiting = Waiting(done, answer, now + timeout, quiet, now)
        self.looked_at = 0.0

    def do_open(
        self, *, group: str, host: str, port: int, requests: list[str], count: int, ready: str, concurrency: int = 64,
        rate: int | None = None, receive_buffer: int | None = None, segment: int | None = None, timeout: float = 60,
    ) -> None:  # fmt: skip
        """``count`` clients; ``requests`` (head without its last empty line) are dealt out in turn."""
        made = Group(group, (host, port), ready.encode(), rate, receive_buffer, segment)
        self.groups[group] = made
        made.clients = [Client(made, requests[number % len(requests)].encode()) for number in range(count)]
        self.begin(made, [(client, "") for client in made.clients], concurrency, timeout)

    def do_leave(self, *, group: str, count: int | None = None) -> dict[str, Any]:
        """The clients (or the last ``count``, for good) close their connections; what they got is kept."""
        made = self.groups[group]
        going = made.clients if count is None else made.clients[len(made.clients) - count :]
        for client in going:
            client.take_apart()
            self.leave(client)
        if count is not None:
            made.clients = made.clients[: len(made.clients) - count]
        return {"left": len(going), "without_cursor": sum(not client.cursor for client in going)}

    def come(self, client: Client) -> None:
        client.take_apart()
        self.connect(client, client.cursor)
        # What it gets is only noted: nothing is looked for while it is measured.
        client.open = client.socket is not None

    def do_come_back(
        self, *, group: str, port: int, last: int, beside: dict[str, int] | None = None,
        marks: Sequence[str] = (), timeout: float = 30, quiet: float = 30,
    ) -> None:  # fmt: skip
        """All at once, each with its cursor; the answer is due when each has event number ``last``, and got all ``marks``.

        ``beside``: other groups that come back in the same moment, and to which port.
        """
        for name, where in {group: port, **(beside or {})}.items():
            self.groups[name].address = (self.groups[name].address[0], where)
        coming = list(interleaved([self.groups[name].clients for name in (group, *(beside or ()))]))
        began = time.monotonic_ns()
        wanted = frozenset((check.needle(last), *(mark.encode() for mark in marks)))
        waiting = dict.fromkeys(coming, wanted)
        self.returning = dict.fromkeys(coming, 0.0)
        for client in coming:
            self.come(client)

        def done() -> bool:
            for client, missing in list(waiting.items()):
                if not client.chunks:
                    continue
                new = client.new()
                waiting[client] = left = frozenset(needle for needle in missing if needle not in new)
                if not left:
                    del waiting[client]
            return not waiting

        def answer(complete: bool) -> dict[str, Any]:
            self.returning = {}
            return {"complete": complete, "began_ns": began, "missing": len(waiting)}

        self.wait(done, answer, timeout=timeout, quiet=quiet)

    def do_signs(self, *, groups: list[str]) -> dict[str, Any]:
        """For each client of these groups, in their order: the frames of the stream itself on its present connection."""
        clients = [client for name in groups for client in self.groups[name].clients]
        for client in clients:
            client.take_apart()
        return {"clients": [[dataclasses.astuple(sign) for sign in each.reader.signs] for each in clients]}

    def do_until(self, *, groups: list[str], last: int, timeout: float, quiet: float) -> None:
        """Until every client of these groups has event number ``last``."""
        needle = check.needle(last)
        waiting = {client for name in groups for client in self.groups[name].clients}
        for client in waiting:
            # Searching all that came before would hold up what is just coming.
            client.looked = max(0, len(client.chunks) - 4)
        began, thorough = time.monotonic(), False

        def done() -> bool:
            nonlocal thorough
            if not thorough and time.monotonic() - began > 1:
                thorough = True
                for client in waiting:
                    client.looked = 0
            waiting.difference_update([each for each in waiting if each.chunks and each.has(needle)])
            return not waiting

        self.wait(
            done,
            lambda complete: {"complete": complete, "missing": len(waiting)},
            timeout=timeout,
            quiet=quiet,
        )

    def do_rate(self, *, group: str, rate: int | None) -> dict[str, Any]:
        """From now on this fast."""
        made = self.groups[group]
        if made.rate is not None and rate is None:
            for client in made.clients:
                if client.socket is not None:
                    # No longer at the end of a long line.
                    client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
                    self.epoll.register(client.socket.fileno(), select.EPOLLIN)
        made.rate = rate
        return {}

    def do_start(self) -> dict[str, Any]:
        """The measured time begins."""
        for group in self.groups.values():
            for client in group.clients:
                client.take_apart()
                client.events = []
        self.cpu_at, self.wall_at = time.process_time(), time.monotonic()
        return {}

    def do_stop(self) -> dict[str, Any]:
        """The measured time ends: what it cost this process."""
        wall = time.monotonic() - self.wall_at
        cpu = time.process_time() - self.cpu_at
        return {"seconds": round(wall, 3), "cpu_seconds": round(cpu, 3), "busy": round(cpu / wall, 3)}

    def do_report(
        self, *, groups: list[str], first: int, last: int, commits: dict[str, int] | None = None
    ) -> dict[str, Any]:
        clients = [client for name in groups for client in self.groups[name].clients]
        for client in clients:
            client.take_apart()
        known = {int(seq): at for seq, at in (commits or {}).items()}
        report = check.summary(((client.seqs, client.events) for client in clients), first, last, known)
        broken = [client.broken for client in clients if client.broken]
        statuses = sorted({client.reader.status for client in clients if client.reader.status != 200})
        return report | {
            "closed": sum(client.socket is None for client in clients),
            "broken_framing": broken[:3],
            "other_statuses": statuses,
        }


class Failed(RuntimeError):
    """The generator ended, or did not answer in time."""


class Generator:
    """The other end: starts the process and speaks with it. ``with Generator() as load: load("open", ...)``."""

    def __init__(self, streams: int = 0) -> None:
        enough = raise_limit(streams)
        if enough < streams:
            raise Failed(
                f"{streams} streams need {streams + SPARE} open files, and the system allows {enough + SPARE} "
                f"(ulimit -Hn): use --streams {enough}"
            )

    def __enter__(self) -> Self:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.bench.load", "--serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        return self

    def __exit__(self, *exception: object) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        # It only waits for its input; what it holds dies with it.
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()

    def __call__(self, do: str, **words: Any) -> dict[str, Any]:
        self.tell(do, **words)
        return self.answer()

    def tell(self, do: str, **words: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, **words}).encode() + b"\n")
        self.process.stdin.flush()

    def answer(self, seconds: float = 180) -> dict[str, Any]:
        assert self.process.stdout is not None
        readable, _, _ = select.select([self.process.stdout], [], [], seconds)
        line = self.process.stdout.readline() if readable else b""
        if not line:
            raise Failed("the load generator does not answer")
        answer: dict[str, Any] = json.loads(line)
        return answer

    @contextlib.contextmanager
    def measured(self) -> Iterator[dict[str, Any]]:
        """The generator's own cost over the block."""
        cost: dict[str, Any] = {}
        self("start")
        yield cost
        cost.update(self("stop"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--serve", action="store_true", required=True, help="take commands on standard input")
    parser.parse_args()
    Load().run()


if __name__ == "__main__":
    main()
