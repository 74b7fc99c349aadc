"""The server as a process: it ends in order, loses nothing when killed, and is not held up by readers that do not read."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import pytest
from daphne.server import Server as DaphneServer

from project.server import Gate, Server
from tests.conftest import ROOT, Running, run_switchboard, until
from tests.live.streaming import (
    Stream,
    call,
    connect,
    events,
    managed,
    many,
    pid_of,
    rss_of,
    threads_of,
    write_elsewhere,
)

pytestmark = pytest.mark.live

MIB = 1 << 20


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


def sockets_of(pid: int) -> int:
    count = 0
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            count += str(descriptor.readlink()).startswith("socket:")
    return count


def test_C08_on_sigterm_streams_end_in_order_and_a_client_with_its_cursor_missed_nothing(
    own_running: Running,
) -> None:
    running = own_running
    first = connect(running)
    with many(30, lambda: events(running)) as held, managed(running, first) as quiet:
        for stream in held:
            stream.named("ready")
        created = connect(running)
        for stream in held:
            stream.until(
                lambda event: event.name == "connection.created" and event.json()["id"] == created["id"]
            )
        started = time.monotonic()
        assert running.stop("server") == 0
        assert time.monotonic() - started < 10
        for stream in held:
            assert stream.ended.wait(5)
            end = stream.events[-1]
            assert (end.name, end.json()) == ("end", {"reason": "shutdown", "reconnect": True})
        retries = {stream.parser.retry_ms for stream in held}
        assert len(retries) > 10, "they come back one after the other"
        assert all(retry is not None and 0 <= retry <= 5000 for retry in retries)
        assert quiet.ended.wait(5)
        assert "end" not in quiet.names(), "the managed-auth stream knows no control frames"
        cursor = held[0].parser.last_event_id
    write_elsewhere(running, 3, topic="while-down")
    running.start("server")
    running.wait_until_up()
    with events(running, Last_Event_ID=cursor) as again:
        again.named("ready")
        assert [event.json()["n"] for event in again.logged() if event.json()["id"] == "while-down"] == [
            0,
            1,
            2,
        ]
    assert "Traceback" not in running.log("server"), running.log("server")


def test_C08_while_it_drains_new_streams_are_503_and_nobody_waits_longer_than_ten_seconds(
    own_running: Running,
) -> None:
    running = own_running
    with stalled_reader(running, "?topics=task:flood"), events(running, "?topics=tasks") as stream:
        stream.named("ready")
        write_elsewhere(running, 60, topic="flood", size=100_000)
        until(lambda: len(stream.logged()) == 60, 20)
        process = running.processes["server"]
        started = time.monotonic()
        process.terminate()
        assert stream.named("end").json()["reason"] == "shutdown"
        # The reader that does not read holds the server for its last seconds: meanwhile it takes no new stream.
        with events(running) as refused:
            assert refused.status == 503
            assert int(dict(refused.answer.getheaders())["Retry-After"]) > 0
            assert refused.json()["code"] == "draining"
        assert process.wait(15) == 0
        assert time.monotonic() - started < 10.5
    running.processes.pop("server")


def test_B41_a_server_that_is_killed_loses_nothing(own_running: Running) -> None:
    running = own_running
    with events(running) as stream:
        start = stream.named("ready").json()["cursor"]
        ids = [connect(running)["id"] for _ in range(3)]
        stream.until(lambda event: event.name == "connection.created" and event.json()["id"] == ids[0])
        running.processes["server"].kill()
        running.processes.pop("server").wait()
        assert stream.ended.wait(5)
        seen = stream.logged()
    cursor = seen[-1].id or str(start)
    write_elsewhere(running, 2, topic="dead")
    running.start("server")
    running.wait_until_up()
    with events(running, Last_Event_ID=cursor) as again, events(running, f"?after={start}") as everything:
        again.named("ready")
        everything.named("ready")
        assert [event.id for event in seen + again.logged()] == [event.id for event in everything.logged()]
        assert [event.json()["id"] for event in again.logged()][-2:] == ["dead", "dead"]


def test_C06_clients_that_leave_leave_nothing_behind(own_running: Running) -> None:
    running = own_running
    pid = pid_of(running)
    with events(running) as warm:
        warm.named("ready")
    until(lambda: sockets_of(pid) > 0, 5)
    threads = threads_of(pid)
    before = until(lambda: sockets_of(pid), 5)
    for _ in range(4):
        with many(50, lambda: events(running)) as held:
            for stream in held:
                stream.named("ready")
            assert sockets_of(pid) >= before + 50 - 1
            assert threads_of(pid) <= threads + 3, "a stream costs no thread"
        until(lambda: sockets_of(pid) <= before, 10, "sockets are left")
    until(lambda: threads_of(pid) <= threads, 10, "threads are left")
    assert "Traceback" not in running.log("server"), running.log("server")


WRAPPER = """
import sys
from project import server
from events import consumers
consumers.STALLED_SECONDS = 2.0
server.FLUSH_SECONDS = 1
sys.exit(server.main())
"""


@pytest.fixture
def impatient(tmp_path: Path) -> Any:
    """A server that closes readers who take nothing for two seconds."""
    with run_switchboard(tmp_path, STREAM_LIMIT="100") as running:
        assert running.stop("server") == 0
        with (tmp_path / "server.log").open("ab") as output:
            running.processes["server"] = subprocess.Popen(
                [sys.executable, "-c", WRAPPER], cwd=ROOT, env=running.env, stdout=output, stderr=output
            )
        running.wait_until_up()
        yield running


def test_C12_a_reader_that_takes_nothing_costs_bounded_memory_delays_nobody_and_is_closed(
    impatient: Running,
) -> None:
    running = impatient
    pid = pid_of(running)
    with events(running, "?topics=task:flood") as quick:
        quick.named("ready")
        before, sockets = rss_of(pid), sockets_of(pid)
        stalled = [stalled_reader(running, "?topics=task:flood") for _ in range(10)]
        until(lambda: sockets_of(pid) >= sockets + 10, 10)
        peak = [0]
        watching = threading.Event()

        def watch() -> None:
            while not watching.wait(0.02):
                peak[0] = max(peak[0], rss_of(pid))

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            write_elsewhere(running, 200, topic="flood", size=100_000)
            until(lambda: len(quick.logged()) == 200, 20)
            assert [event.json()["n"] for event in quick.logged()] == list(range(200))
            until(lambda: sockets_of(pid) <= sockets, 15, "a reader that takes nothing is still there")
        finally:
            watching.set()
            watcher.join()
            for each in stalled:
                each.close()
        # 20 MB for each of ten readers were offered: without back-pressure 200 MB, and as much again for what they were made of.
        assert peak[0] - before < 100 * MIB, f"{(peak[0] - before) / MIB:.0f} MiB"
        created = connect(running)
        status, _, _ = call(running, "GET", f"/auth/connections/{created['id']}")
        assert status == 200
    assert "Traceback" not in running.log("server"), running.log("server")


# ── Bodies that are too large: refused by the connection, before there is a request for Django ──

CHUNKED = "Transfer-Encoding: chunked"


def head_of(running: Running, *headers: str, method: str = "POST", path: str = "/auth/connections") -> bytes:
    lines = [f"{method} {path} HTTP/1.1", f"Host: {urlsplit(running.url).netloc}", *headers]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def dial(running: Running) -> socket.socket:
    parts = urlsplit(running.url)
    return socket.create_connection((parts.hostname, parts.port), timeout=10)


def read_all(client: socket.socket) -> bytes:
    """Everything until the server closes its side."""
    raw = b""
    while part := client.recv(65536):
        raw += part
    return raw


def limit_of(running: Running) -> int:
    return int(running.env.get("MAX_BODY_BYTES", 262_144))


def assert_refused(running: Running, raw: bytes) -> None:
    head, _, body = raw.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 413 "), raw[:200]
    assert b"connection: close" in head.lower()
    message = f"A body can have at most {limit_of(running)} bytes."
    assert json.loads(body) == {"code": "payload_too_large", "message": message}


@pytest.mark.parametrize("more", [[], ["Expect: 100-continue"]])
def test_a_declared_length_over_the_limit_is_413_before_any_of_the_body(
    running: Running, more: list[str]
) -> None:
    with dial(running) as client:
        started = time.monotonic()
        client.sendall(head_of(running, "Content-Length: 300000000", *more))
        assert_refused(running, read_all(client))
        assert time.monotonic() - started < 2


def chunk(body: bytes) -> bytes:
    return f"{len(body):x}\r\n".encode() + body + b"\r\n"


@pytest.mark.parametrize("framing", [CHUNKED, "Content-Length: 20971520"])
def test_a_body_over_the_limit_costs_no_memory_and_its_sender_gets_the_answer(
    running: Running, framing: str
) -> None:
    pid = pid_of(running)
    call(running, "GET", "/auth/connections")
    before, peak, watching = rss_of(pid), [0], threading.Event()

    def watch() -> None:
        while not watching.wait(0.01):
            peak[0] = max(peak[0], rss_of(pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    part = b"x" * MIB
    try:
        with dial(running) as client:
            client.sendall(head_of(running, framing))
            for _ in range(20):
                # It does not look for an answer before it has sent everything.
                client.sendall(chunk(part) if framing == CHUNKED else part)
            assert_refused(running, read_all(client))
    finally:
        watching.set()
        watcher.join()
    assert max(peak[0], rss_of(pid)) - before < 10 * MIB, f"{(peak[0] - before) / MIB:.0f} MiB"
    assert call(running, "GET", "/auth/connections")[0] == 200


def test_what_follows_a_refused_body_is_no_request_and_no_second_answer(running: Running) -> None:
    too_much = chunk(b"x" * (limit_of(running) + 1))
    again = head_of(running, method="GET", path="/api/events")
    for rest in (b"0\r\n\r\n" + again, b"no chunk at all\r\n"):
        with dial(running) as client:
            client.sendall(head_of(running, CHUNKED) + too_much + rest)
            assert_refused(running, read_all(client))
    assert "Traceback" not in running.log("server"), running.log("server")


def test_answers_before_a_refused_body_come_in_order(running: Running) -> None:
    ordinary = head_of(
        running,
        f"Authorization: Bearer {running.api_key}",
        "Content-Type: application/json",
        CHUNKED,
        path="/profiles",
    )
    with dial(running) as client:
        # A body of exactly the limit is Django's: no JSON.
        client.sendall(ordinary + chunk(b"x" * limit_of(running)) + b"0\r\n\r\n")
        client.sendall(ordinary + chunk(b"x") + b"0\r\n\r\n")
        client.sendall(head_of(running, "Content-Length: 300000000"))
        raw = read_all(client)
    assert raw.count(b"HTTP/1.1 ") == 3
    assert raw.count(b"HTTP/1.1 400 ") == 2
    assert_refused(running, raw[raw.rindex(b"HTTP/1.1 ") :])


def send_on(client: socket.socket, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        client.sendall(chunk(b"x" * 1024))
        time.sleep(0.05)


def test_a_client_that_sends_on_after_its_refusal_is_cut_off(running: Running) -> None:
    with dial(running) as client:
        client.sendall(head_of(running, CHUNKED) + chunk(b"x" * (limit_of(running) + 1)))
        assert_refused(running, read_all(client))
        started = time.monotonic()
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            send_on(client, 15)
        assert time.monotonic() - started < 7


# ── Server.handle_reply by itself ──


class FakeChannel:
    def __init__(self) -> None:
        self.producer: Any = None
        self.persistent = True
        self.transport = SimpleNamespace(connected=True, abortConnection=lambda: None)

    def registerProducer(self, producer: Any, streaming: bool) -> None:
        self.producer = producer

    def unregisterProducer(self) -> None:
        self.producer = None


class FakeProtocol:
    def __init__(self) -> None:
        self.channel: FakeChannel | None = FakeChannel()
        self.producer: Any = None
        self.sent: list[dict[str, Any]] = []

    def handle_reply(self, message: dict[str, Any]) -> None:
        self.sent.append(message)

    def registerProducer(self, producer: Any, streaming: bool) -> None:
        self.producer = producer
        assert self.channel is not None
        self.channel.registerProducer(producer, streaming)


START = {"type": "http.response.start", "status": 200, "headers": [(b"Content-Type", b"text/event-stream")]}
PART = {"type": "http.response.body", "body": b"x", "more_body": True}
LAST = {"type": "http.response.body", "body": b"", "more_body": False}


@pytest.fixture
def server() -> Server:
    made = Server(application=None, endpoints=["tcp:port=0"])
    made.connections = {}
    return made


def test_C12_send_waits_while_the_transport_is_full(server: Server) -> None:
    async def course() -> None:
        protocol = FakeProtocol()
        server.connections[protocol] = {}
        await server.handle_reply(protocol, START)
        gate = protocol.channel.producer  # type: ignore[union-attr]
        assert isinstance(gate, Gate)
        await server.handle_reply(protocol, PART)
        gate.pauseProducing()
        blocked = asyncio.ensure_future(server.handle_reply(protocol, PART))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not blocked.done()
        gate.resumeProducing()
        async with asyncio.timeout(5):
            await blocked
        await server.handle_reply(protocol, LAST)
        assert protocol.channel is not None
        assert protocol.channel.producer is None
        assert protocol.channel.persistent
        assert [message["type"] for message in protocol.sent] == [
            "http.response.start",
            *["http.response.body"] * 3,
        ]

    asyncio.run(course())


def test_C06_a_client_that_leaves_frees_who_waits_and_the_last_frame_after_it_hurts_nobody(
    server: Server,
) -> None:
    async def course() -> None:
        protocol = FakeProtocol()
        details: dict[str, Any] = {}
        server.connections[protocol] = details
        await server.handle_reply(protocol, START)
        gate = details["gate"]
        gate.pauseProducing()
        blocked = asyncio.ensure_future(server.handle_reply(protocol, PART))
        await asyncio.sleep(0)
        # As Twisted does it when the connection is lost.
        protocol.channel = None
        details["disconnected"] = time.time()
        gate.stopProducing()
        async with asyncio.timeout(5):
            await blocked
        await server.handle_reply(protocol, LAST)

    asyncio.run(course())


def test_an_ordinary_answer_has_no_gate(server: Server) -> None:
    async def course() -> None:
        protocol = FakeProtocol()
        server.connections[protocol] = {}
        await server.handle_reply(protocol, START | {"headers": [(b"Content-Type", b"application/json")]})
        await server.handle_reply(protocol, LAST)
        assert server.connections[protocol] == {}
        assert protocol.producer is None

    asyncio.run(course())


def test_the_server_is_daphne_with_two_methods_of_its_own() -> None:
    assert issubclass(Server, DaphneServer)


def test_streams_of_a_caller_are_counted_by_its_connections_not_by_its_requests(own_running: Running) -> None:
    """Opened and closed over and over, a caller never runs into its own limit."""
    for _ in range(120):
        with Stream(f"{own_running.url}/api/events", key=own_running.api_key) as stream:
            assert stream.status == 200
            stream.named("ready")
