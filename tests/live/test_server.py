"""The server as a process: it ends in order, loses nothing when killed, and is not held up by readers that do not read."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import pytest
from django.conf import settings

from events.sse import Parser
from project.server import Server, Wire
from tests.conftest import ROOT, Running, run_switchboard, until
from tests.live.streaming import (
    DRAINS_LONGER,
    Stream,
    anonymous_of,
    call,
    connect,
    events,
    managed,
    many,
    opened_and_stalled,
    pid_of,
    rss_of,
    stalled_reader,
    start_patched,
    threads_of,
    write_elsewhere,
)
from tests.live.test_operations import numbers

pytestmark = pytest.mark.live

MIB = 1 << 20


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
            assert stream.ended.wait(30)
            end = stream.events[-1]
            assert (end.name, end.json()) == ("end", {"reason": "shutdown", "reconnect": True})
        retries = {stream.parser.retry_ms for stream in held}
        assert len(retries) > 10, "they come back one after the other"
        assert all(retry is not None and 0 <= retry <= 5000 for retry in retries)
        assert quiet.ended.wait(30)
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
    assert running.stop("server") == 0
    start_patched(running, DRAINS_LONGER)
    with opened_and_stalled(running, "?topics=task:flood"), events(running, "?topics=tasks") as stream:
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
        assert stream.ended.wait(30)
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


#: So many that what they cost stands out from what the process takes and gives back by itself, which is some MiB from one flood to the next.
STALLED = 250


@pytest.fixture
def impatient(tmp_path: Path) -> Any:
    """A server that closes readers who take nothing for three seconds."""
    with run_switchboard(tmp_path, STREAM_LIMIT=str(STALLED + 50)) as running:
        assert running.stop("server") == 0
        start_patched(running, "consumers.STALLED_SECONDS = 3.0\nserver.FLUSH_SECONDS = 1")
        yield running


@contextlib.contextmanager
def peak_of(pid: int, measure: Callable[[int], int] = rss_of) -> Iterator[list[int]]:
    """The most bytes that the process had while the block ran: looked at 100 times a second, and at both ends."""
    peak = [measure(pid)]
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.01):
            peak[0] = max(peak[0], measure(pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        over.set()
        watcher.join()
        peak[0] = max(peak[0], measure(pid))


@pytest.mark.parametrize(("count", "size"), [(300, 2_000), (200, 100_000), (20, 1_000_000)])
def test_C12_a_reader_that_takes_nothing_costs_less_than_256_KiB_delays_nobody_and_is_closed(
    impatient: Running, count: int, size: int
) -> None:
    running = impatient
    pid = pid_of(running)
    topic = "?topics=task:flood"
    with events(running, topic) as quick, contextlib.ExitStack() as opened:
        quick.named("ready")
        # What the process takes for everybody (the window, the pages, a batch on its way) is what a flood costs without them.
        with peak_of(pid, anonymous_of) as without:
            for _ in range(3):
                write_elsewhere(running, count, topic="flood", size=size)
            until(lambda: len(quick.logged()) == 3 * count, 60)
        sockets = sockets_of(pid)
        for _ in range(STALLED):
            opened.enter_context(opened_and_stalled(running, topic))
        assert sockets_of(pid) >= sockets + STALLED
        with peak_of(pid, anonymous_of) as with_them:
            write_elsewhere(running, count, topic="flood", size=size)
            until(lambda: len(quick.logged()) == 4 * count, 60)
            assert [event.json()["n"] for event in quick.logged()] == list(range(count)) * 4
            until(lambda: sockets_of(pid) <= sockets, 60, "a reader that takes nothing is still there")
        each_costs = (with_them[0] - without[0]) / STALLED / 1024
        assert each_costs < 256, f"{each_costs:.0f} KiB each"
        assert numbers(running)["switchboard_streams_ended_total slow"] == STALLED
        created = connect(running)
        status, _, _ = call(running, "GET", f"/auth/connections/{created['id']}")
        assert status == 200
    assert "Traceback" not in running.log("server"), running.log("server")


def test_C12_a_reader_that_stops_in_the_middle_of_a_large_event_gets_all_of_it_later(
    own_running: Running,
) -> None:
    """Its frame is not kept for it: the rest is taken from the log when the reader goes on."""
    running = own_running
    reader = stalled_reader(running, "?topics=task:large")
    with events(running, "?topics=task:large") as quick:
        quick.named("ready")
        write_elsewhere(running, 8, topic="large", size=900_000)
        until(lambda: len(quick.logged()) == 8, 20)
        reader.settimeout(10)
        raw = b""
        while raw.count(b"event: task.updated") < 8 or not raw.endswith(b"\n\n\r\n"):
            raw += reader.recv(1 << 20)
        reader.close()
        got = list(Parser().feed(unchunked(raw.partition(b"\r\n\r\n")[2])))
        assert [event.data for event in got if event.name == "task.updated"] == [
            event.data for event in quick.logged()
        ]


def unchunked(raw: bytes) -> bytes:
    """Whole chunks of the chunked transfer coding, without their sizes."""
    body = b""
    while raw:
        size, _, rest = raw.partition(b"\r\n")
        length = int(size, 16)
        body, raw = body + rest[:length], rest[length + 2 :]
    return body


def test_runserver_serves_streams_with_the_server_of_the_deployment(own_running: Running) -> None:
    running = own_running
    assert running.stop("server") == 0
    port = running.url.rpartition(":")[2]
    with (running.data_dir / "server.log").open("ab") as output:
        running.processes["server"] = subprocess.Popen(
            [sys.executable, "manage.py", "runserver", "--noreload", f"127.0.0.1:{port}"],
            cwd=ROOT, env=running.env, stdout=output, stderr=output,
        )  # fmt: skip
    running.wait_until_up()
    with events(running) as stream:
        stream.named("ready")
        connect(running)
        stream.named("connection.created")
        assert running.stop("server") == 0
        assert stream.of("end")[0].json() == {"reason": "shutdown", "reconnect": True}


def test_C08_runserver_ends_its_streams_in_order_when_the_code_changes_and_stops_on_ctrl_c(
    own_running: Running, tmp_path: Path
) -> None:
    running = own_running
    assert running.stop("server") == 0
    # A module of the process that this test may change: the reloader watches whatever was imported.
    module = tmp_path / "extra" / "sitecustomize.py"
    module.parent.mkdir()
    module.write_text("")
    with (running.data_dir / "server.log").open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "manage.py", "runserver", f"127.0.0.1:{running.url.rpartition(':')[2]}"],
            cwd=ROOT, env=running.env | {"PYTHONPATH": str(module.parent)}, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            # A terminal sends Ctrl-C to the reloader and to what it started. (What a shell runs in the background would ignore it.)
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
                start_new_session=True,
        )  # fmt: skip
    try:
        running.wait_until_up()
        with events(running) as stream:
            cursor = str(stream.named("ready").json()["cursor"])
            later = itertools.count(int(time.time()) + 10)
            # Again and again: the first look of the reloader may come after a change.
            until(lambda: os.utime(module, (next(later),) * 2) or stream.of("end"), 30)
            assert stream.named("end").json() == {"reason": "shutdown", "reconnect": True}
        running.wait_until_up()
        with events(running, Last_Event_ID=cursor) as stream:
            stream.named("ready")
            connect(running)
            stream.named("connection.created")
            os.killpg(process.pid, signal.SIGINT)
            # Django's reloader gives its child a quarter of a second: enough for the last frames mostly, and not more than that.
            assert stream.ended.wait(30)
        process.wait(15)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert "Traceback" not in running.log("server"), running.log("server")


@pytest.mark.parametrize("path", ["/healthz", "/api/events", "/nowhere"])
def test_an_offer_of_a_websocket_is_answered_as_a_plain_request(own_running: Running, path: str) -> None:
    running = own_running
    handshake = ["Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA=="]  # fmt: skip
    with dial(running) as client:
        client.sendall(head_of(running, *handshake, method="GET", path=path))
        raw = b""
        while b"\r\n\r\n" not in raw:
            part = client.recv(65536)
            assert part, raw
            raw += part
    head = raw.partition(b"\r\n\r\n")[0].lower()
    expected = {"/healthz": b"200", "/api/events": b"401", "/nowhere": b"404"}[path]
    assert head.startswith(b"http/1.1 " + expected)
    assert b"x-request-id: " in head
    assert running.stop("server") == 0
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
    return int(running.env.get("MAX_BODY_BYTES", settings.MAX_BODY_BYTES))


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
        # Nothing of the body is sent, so the answer waited for none of it.
        client.sendall(head_of(running, "Content-Length: 300000000", *more))
        assert_refused(running, read_all(client))


def chunk(body: bytes) -> bytes:
    return f"{len(body):x}\r\n".encode() + body + b"\r\n"


@pytest.mark.parametrize("framing", [CHUNKED, "Content-Length: 20971520"])
def test_a_body_over_the_limit_costs_no_memory_and_its_sender_gets_the_answer(
    running: Running, framing: str
) -> None:
    pid = pid_of(running)
    call(running, "GET", "/auth/connections")
    before = rss_of(pid)
    part = b"x" * MIB
    with peak_of(pid) as peak, dial(running) as client:
        client.sendall(head_of(running, framing))
        for _ in range(20):
            # It does not look for an answer before it has sent everything.
            client.sendall(chunk(part) if framing == CHUNKED else part)
        assert_refused(running, read_all(client))
    assert peak[0] - before < 10 * MIB, f"{(peak[0] - before) / MIB:.0f} MiB"
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
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            send_on(client, 30)


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
        assert isinstance(gate, Wire)
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
        gate = details["wire"]
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


def test_an_ordinary_answer_has_no_wire(server: Server) -> None:
    async def course() -> None:
        protocol = FakeProtocol()
        server.connections[protocol] = {}
        await server.handle_reply(protocol, START | {"headers": [(b"Content-Type", b"application/json")]})
        await server.handle_reply(protocol, LAST)
        assert server.connections[protocol] == {}
        assert protocol.producer is None

    asyncio.run(course())


def test_streams_of_a_caller_are_counted_by_its_connections_not_by_its_requests(own_running: Running) -> None:
    """Opened and closed over and over, a caller never runs into its own limit."""
    for _ in range(120):
        with Stream(f"{own_running.url}/api/events", key=own_running.api_key) as stream:
            assert stream.status == 200
            stream.named("ready")
