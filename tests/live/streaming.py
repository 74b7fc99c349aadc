"""A reader of streams over a real socket, and small calls of the API beside it."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any, Self
from urllib.parse import urlsplit

from events.sse import Parser, ServerSentEvent
from tests.conftest import ROOT, Running, until


def tls() -> ssl.SSLContext:
    """For the certificate that nginx of tests/live/services.py makes for itself. A new one each time: clients of HTTP/2 change theirs."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


TLS = tls()


class Stream:
    """One open stream; a thread reads it. ``events`` grows, ``raw`` holds the bytes, ``ended`` tells how it is going."""

    def __init__(self, url: str, *, key: str = "", headers: dict[str, str] | None = None) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None
        self.events: list[ServerSentEvent] = []
        self.times: list[float] = []
        self.raw = bytearray()
        self.ended = threading.Event()
        if parts.scheme == "https":
            self._connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                parts.hostname, parts.port, timeout=60, context=TLS
            )
        else:
            self._connection = http.client.HTTPConnection(parts.hostname, parts.port or 80, timeout=60)
        sent = {"Accept": "text/event-stream"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self._connection.request(
            "GET", f"{parts.path}{'?' + parts.query if parts.query else ''}", headers=sent | (headers or {})
        )
        self._socket = self._connection.sock
        self.answer = self._connection.getresponse()
        self.status = self.answer.status
        self.parser = Parser()
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _read(self) -> None:
        try:
            while chunk := self.answer.read1(65536):
                self.raw += chunk
                for event in self.parser.feed(chunk):
                    self.times.append(time.monotonic())
                    self.events.append(event)
        except (OSError, http.client.HTTPException, AttributeError, ValueError):
            pass
        finally:
            self.ended.set()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self.thread.join(5)
        self._connection.close()

    def json(self) -> Any:
        """The body of an answer that is no stream."""
        assert self.ended.wait(30)
        return json.loads(self.raw)

    def names(self) -> list[str]:
        return [event.name for event in self.events]

    def of(self, *names: str) -> list[ServerSentEvent]:
        return [event for event in list(self.events) if event.name in names]

    def logged(self) -> list[ServerSentEvent]:
        """The events of the log: their names have a dot."""
        return [event for event in list(self.events) if "." in event.name]

    def until(self, condition: Callable[[ServerSentEvent], bool], seconds: float = 30) -> ServerSentEvent:
        def found() -> ServerSentEvent | None:
            return next((event for event in list(self.events) if condition(event)), None)

        try:
            return until(found, seconds)
        except AssertionError:
            raise AssertionError(f"did not come in {seconds} s; there were {self.names()[-30:]}") from None

    def named(self, name: str, seconds: float = 30) -> ServerSentEvent:
        return self.until(lambda event: event.name == name, seconds)


def events(running: Running, query: str = "", *, key: str | None = None, **headers: str) -> Stream:
    """``/api/events`` with a key, opened and ready."""
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    return Stream(
        f"{running.url}/api/events{query}", key=running.api_key if key is None else key, headers=sent
    )


def call(
    running: Running,
    method: str,
    path: str,
    body: Any = None,
    *,
    key: str | None = None,
    headers: dict[str, str] | None = None,
) -> tuple[int, Any, dict[str, str]]:
    """One call of the API: status, JSON, headers (lower case)."""
    sent = {"Authorization": f"Bearer {running.api_key if key is None else key}"} | (headers or {})
    if body is not None:
        sent["Content-Type"] = "application/json"
    request = urllib.request.Request(
        running.url + path,
        method=method,
        headers=sent,
        data=None if body is None else json.dumps(body).encode(),
    )
    try:
        with urllib.request.urlopen(request, timeout=30, context=TLS) as answer:
            raw, status, got = answer.read(), answer.status, answer.headers
    except urllib.error.HTTPError as error:
        raw, status, got = error.read(), error.code, error.headers
    return status, json.loads(raw) if raw else None, {name.lower(): value for name, value in got.items()}


_serial = iter(range(1, 1_000_000))


def connect(running: Running, domain: str | None = None, *, key: str | None = None, **config: Any) -> Any:
    """A new connection, with a profile of its own."""
    number = f"{time.monotonic_ns()}-{next(_serial)}"
    body = {"domain": domain or f"d{number}.example.com", "profile_name": f"p{number}", **config}
    status, created, _ = call(running, "POST", "/auth/connections", body, key=key)
    assert status == 201, created
    return created


def login(running: Running, connection: Any) -> Any:
    status, body, _ = call(running, "POST", f"/auth/connections/{connection['id']}/login", {})
    assert status == 200, body
    return body


def managed(running: Running, connection: Any, *, key: str | None = None, **headers: str) -> Stream:
    return Stream(
        f"{running.url}/auth/connections/{connection['id']}/events",
        key=running.api_key if key is None else key, headers=headers,
    )  # fmt: skip


WRITE = """
import datetime as dt
from django.contrib.auth.models import User
from django.db import transaction
from events import log
from events.envelope import Change
owner = User.objects.get(username={username!r}).pk
for number in range({count}):
    with transaction.atomic():
        log.append(Change(name="task.updated", topic="task:{topic}", audience=owner, object_id="{topic}", version=number + 1,
                          at=dt.datetime.now(dt.UTC), actor="test", data={{"id": "{topic}", "n": number, "fill": "x" * {size}}}))
"""


def write_elsewhere(
    running: Running, count: int, *, topic: str, size: int = 10, username: str = "admin"
) -> None:
    """Events of the log, written by another process: a management command."""
    running.shell(WRITE.format(username=username, count=count, size=size, topic=topic))


def pid_of(running: Running) -> int:
    return running.processes["server"].pid


def stalled_reader(running: Running, query: str = "") -> socket.socket:
    """Asks for a stream and then never reads; its receive buffer is small."""
    parts = urlsplit(running.url)
    reader = socket.socket()
    reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    reader.connect((parts.hostname, parts.port))
    reader.sendall(
        f"GET /api/events{query} HTTP/1.1\r\nHost: {parts.netloc}\r\nAuthorization: Bearer {running.api_key}\r\n\r\n".encode()
    )
    return reader


def opened_and_stalled(running: Running, query: str = "") -> socket.socket:
    """As :func:`stalled_reader`, but it reads until its stream is live: whatever is published from then on waits for it."""
    reader = stalled_reader(running, query)
    reader.settimeout(30)
    raw = b""
    while b"event: ready" not in raw:
        part = reader.recv(4096)
        assert part, raw
        raw += part
    return reader


PATCHED = """
import sys
from project import server
from events import consumers
{changes}
sys.exit(server.main())
"""


def start_patched(running: Running, changes: str) -> None:
    """Start the server (it must have been stopped) with other constants: lines like ``server.FLUSH_SECONDS = 1``."""
    with (running.data_dir / "server.log").open("ab") as output:
        running.processes["server"] = subprocess.Popen(
            [sys.executable, "-c", PATCHED.format(changes=changes)],
            cwd=ROOT, env=running.env, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
        )  # fmt: skip
    running.wait_until_up()


#: For tests of what a draining server answers. A reader that takes nothing holds it as long as that (as a rule: a second).
DRAINS_LONGER = "server.LAST_FLUSH_SECONDS = 6.0"


def rss_of(pid: int) -> int:
    """Resident bytes of a process."""
    return _status_bytes(pid, "VmRSS")


def anonymous_of(pid: int) -> int:
    """Those of them that the process allocated: without the pages of programs, libraries and SQLite's files, which come and go with what is read."""
    return _status_bytes(pid, "RssAnon")


def _status_bytes(pid: int, name: str) -> int:
    with open(f"/proc/{pid}/status") as file:
        line = next(line for line in file if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def threads_of(pid: int) -> int:
    with open(f"/proc/{pid}/status") as file:
        return int(next(line for line in file if line.startswith("Threads")).split()[1])


@contextlib.contextmanager
def many(count: int, make: Callable[[], Stream]) -> Iterator[list[Stream]]:
    streams: list[Stream] = []
    try:
        for _ in range(count):
            streams.append(make())
        yield streams
    finally:
        for stream in streams:
            stream.close()


class Cut:
    """A network between clients and one server that can break. ``url`` stands for the server's.

    ``swallow()``: what either side sends arrives nowhere, and neither hears of it. ``reset()`` breaks every connection. ``heal()``: new connections
    work again.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._target = (str(parts.hostname), int(parts.port or 80))
        self._listening = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        #: Bytes of the server that arrived nowhere.
        self.swallowed = 0
        self._swallowing = threading.Event()
        self._ends: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._run(self._accept)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        # Closing alone does not wake who waits in accept().
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self.reset()
        for thread in self._threads:
            thread.join(5)
            assert not thread.is_alive(), "the network does not end"

    def swallow(self) -> None:
        self._swallowing.set()

    def heal(self) -> None:
        self._swallowing.clear()

    def reset(self) -> None:
        ends, self._ends = self._ends, []
        for end in ends:
            # With RST instead of FIN.
            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            with contextlib.suppress(OSError):
                # Its thread is woken by this, and not by closing.
                end.shutdown(socket.SHUT_RD)
            end.close()

    def _run(self, work: Callable[..., None], *words: Any) -> None:
        thread = threading.Thread(target=work, args=words, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listening.accept()
                try:
                    server = socket.create_connection(self._target, timeout=5)
                except OSError:
                    client.close()
                    continue
                server.settimeout(None)
                self._ends += [client, server]
                self._run(self._carry, client, server, False)
                self._run(self._carry, server, client, True)

    def _carry(self, source: socket.socket, target: socket.socket, from_server: bool) -> None:
        with contextlib.suppress(OSError):
            while part := source.recv(65536):
                if not self._swallowing.is_set():
                    target.sendall(part)
                elif from_server:
                    self.swallowed += len(part)
            if not self._swallowing.is_set():
                target.shutdown(socket.SHUT_WR)
