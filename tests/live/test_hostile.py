"""Requests that nobody means well with, on real sockets: none of them costs the others their streams, or the process its memory."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.conftest import Running, run_switchboard, until
from tests.live import services
from tests.live.streaming import connect, events, pid_of, rss_of, start_patched, write_elsewhere
from tests.live.test_operations import numbers

pytestmark = pytest.mark.live

MIB = 1 << 20


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server on PostgreSQL that waits two seconds for a request."""
    place = tmp_path_factory.mktemp("hostile")
    with (
        services.postgresql(place) as database,
        run_switchboard(
            place, DATABASE_URL=database.url, STREAM_LIMIT="50", HEARTBEAT_SECONDS="2"
        ) as running,
    ):
        services.stop_all(running)
        start_patched(running, "server.ARRIVAL_SECONDS = 2")
        yield running
        assert "Traceback" not in running.log("server"), running.log("server")
        assert running.api_key not in running.log("server")


def dial(running: Running) -> socket.socket:
    parts = urlsplit(running.url)
    return socket.create_connection((str(parts.hostname), int(parts.port or 80)), timeout=20)


def head(
    running: Running, *headers: str, path: str = "/api/events", method: str = "GET", version: str = "1.1"
) -> bytes:
    lines = [
        f"{method} {path} HTTP/{version}",
        f"Host: {urlsplit(running.url).netloc}",
        f"Authorization: Bearer {running.api_key}",
        *headers,
    ]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def read(line: socket.socket, word: bytes = b"") -> bytes:
    """Up to the word; without one, up to the end."""
    got = b""
    while not word or word not in got:
        part = line.recv(65536)
        if not part:
            assert not word, got
            return got
        got += part
    return got


def answer(running: Running, request: bytes) -> bytes:
    with dial(running) as line:
        line.sendall(request)
        return read(line)


# ── What is asked ──


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/auth/connections/%00/events", 404),
        ("/auth/connections/a%00b/events", 404),
        ("/auth/connections/%ff/events", 404),
        ("/auth/connections/%ed%a0%80/events", 404),
        ("/auth/connections/a%0d%0aX-Injected:%201/events", 404),
        ("/api/events?topics=task:%00", 400),
        ("/api/events?topics=" + ",".join(f"task:t{number}" for number in range(101)), 400),
        ("/api/events?" + "&".join(f"p{number}=1" for number in range(2000)), 400),
        ("/api/events?cid=conn-1-abcdef&page=%00", 400),
        ("/api/events?cid=conn-1-abcdef&path=/%00", 400),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_question_that_makes_no_sense_is_the_askers_fault_on_postgresql_too(
    target: Running, path: str, status: int
) -> None:
    got = answer(target, head(target, "Connection: close", path=path))
    assert got.startswith(f"HTTP/1.1 {status} ".encode()), got
    assert b'{"code":' in got
    assert b"\r\nX-Injected" not in got


@pytest.mark.parametrize("path", ["/api/events", "/live", "/", "/auth/connections/x/events"])
@pytest.mark.parametrize("key", [r'"abcdefgh\000ijklmnop"', "x" * 5000, "\xff\xfe\xfd" * 5, "", '"'])
def test_a_cookie_that_is_no_key_of_a_session_is_nobody(target: Running, path: str, key: str) -> None:
    request = (
        f"GET {path} HTTP/1.1\r\nHost: {urlsplit(target.url).netloc}\r\nConnection: close\r\nCookie: sessionid={key}\r\n\r\n"
    ).encode("latin-1")
    expected = b"HTTP/1.1 302 " if path == "/" else b"HTTP/1.1 401 "
    assert answer(target, request).startswith(expected)


@pytest.mark.parametrize(
    "cursor",
    ["00000000000000000000", "-0", "+1", "\xb2", "9223372036854775808", "1_0", "0x1", "1e3", "1\r\n 2"],
)
def test_C44_a_Last_Event_ID_that_is_no_cursor_is_400(target: Running, cursor: str) -> None:
    got = answer(target, head(target, f"Last-Event-ID: {cursor}", "Connection: close"))
    assert got.startswith(b"HTTP/1.1 400 ")
    assert b"invalid_cursor" in got


@pytest.mark.parametrize("part", ["path", "header"])
def test_a_line_that_has_no_end_is_refused_with_a_reason(target: Running, part: str) -> None:
    long = "x" * 300_000
    request = (
        head(target, path=f"/api/events?after={long}") if part == "path" else head(target, f"X-Long: {long}")
    )
    got = answer(target, request)
    assert got.startswith(b"HTTP/1.1 431 "), got[:100]
    assert b'"code": "headers_too_large"' in got


@pytest.mark.parametrize(
    "request_",
    [
        b"GET /api/events\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET /api/events HTTP/1.1\r\nno colon\r\n\r\n",
        b"GET /api/events HTTP/1.1\r\nX: a\x00b\r\n\r\n",
        b"GET /api/events HTTP/1.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"GET /api/events HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        b"GET /api/events HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
        b"GET /api/events HTTP/1.1\r\n"
        + b"".join(b"X-%d: 1\r\n" % number for number in range(600))
        + b"\r\n",
    ],
    ids=lambda value: repr(value[:45]),
)
def test_what_is_no_request_is_400_and_the_end_of_its_connection(target: Running, request_: bytes) -> None:
    assert answer(target, request_).startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize("method", ["HEAD", "POST", "DELETE", "BREW", "get"])
def test_another_method_opens_no_stream(target: Running, method: str) -> None:
    got = answer(target, head(target, "Connection: close", method=method))
    assert got.startswith(b"HTTP/1.1 405 ")
    assert b"\r\nAllow: GET\r\n" in got
    assert (b"method_not_allowed" in got) is (method != "HEAD")


@pytest.mark.parametrize(
    "headers",
    [
        ["Connection: Upgrade", "Upgrade: h2c", "HTTP2-Settings: AAMAAABk"],
        ["Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0"],
        ["Content-Length: 5\r\n\r\nhello"],
        ["Expect: 100-continue", "Content-Length: 0"],
        ["Last-Event-ID: x", "Last-Event-ID: 0"],
    ],
    ids=lambda value: value[0][:30],
)
def test_what_comes_with_a_request_for_a_stream_does_not_keep_it_from_opening(
    target: Running, headers: list[str]
) -> None:
    with dial(target) as line:
        line.sendall(head(target, *headers))
        read(line, b"event: ready")


def test_C03_an_HTTP_1_0_client_reads_its_stream_unframed_up_to_its_end(target: Running) -> None:
    with dial(target) as line:
        line.sendall(head(target, "Connection: keep-alive", version="1.0"))
        got = read(line, b"event: ready")
        assert b"transfer-encoding" not in got.lower()
        assert got.partition(b"\r\n\r\n")[2].startswith(b"retry: ")


# ── While it is streaming ──


def test_what_a_client_sends_on_its_open_stream_neither_ends_the_stream_nor_is_kept(target: Running) -> None:
    with dial(target) as line:
        line.sendall(head(target))
        read(line, b"event: ready")
        before = rss_of(pid_of(target))
        for part in (b"\r\n", head(target), b"x" * MIB * 64):
            line.sendall(part)
        made = connect(target)
        read(line, made["id"].encode())
        assert rss_of(pid_of(target)) - before < 16 * MIB
        assert numbers(target)["switchboard_streams_open"] == 1
    until(lambda: numbers(target)["switchboard_streams_open"] == 0, 10, "its end was not seen")


def test_C12_who_reads_nothing_and_sends_without_end_costs_no_memory(target: Running) -> None:
    """Its stream is full, so nothing that depends on the stream tells the server to stop reading."""
    with dial(target) as line, events(target, "?topics=task:flood") as quick:
        line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        line.sendall(head(target, path="/api/events?topics=task:flood"))
        read(line, b"event: ready")
        quick.named("ready")
        write_elsewhere(target, 60, topic="flood", size=100_000)
        until(lambda: len(quick.logged()) == 60, 30)
        before = rss_of(pid_of(target))
        for _ in range(64):
            line.sendall(b"x" * MIB)
        assert rss_of(pid_of(target)) - before < 16 * MIB
    until(lambda: numbers(target)["switchboard_streams_open"] == 0, 10)


def test_a_request_behind_a_stream_in_one_piece_waits_for_it_and_answers_before_it_come_first(
    target: Running,
) -> None:
    with dial(target) as line:
        refused = head(target, path="/api/events?after=x")
        line.sendall(refused * 20 + head(target) + refused)
        got = read(line, b"event: ready")
        assert got.count(b"HTTP/1.1 400 ") == 20
        got += read(line, b"event: heartbeat")
        assert got.count(b"HTTP/1.1 ") == 21


# ── Slowly ──


@pytest.mark.parametrize(
    "start",
    [
        b"",
        b"GET /api/events HTTP/1.1\r\nX-Slow: ",
        b"POST /auth/connections HTTP/1.1\r\nContent-Length: 100000\r\n\r\n",
    ],
    ids=["first line", "header", "body"],
)
def test_a_request_that_comes_byte_by_byte_is_not_waited_for(target: Running, start: bytes) -> None:
    with dial(target) as line:
        over = threading.Event()

        def drip() -> None:
            with contextlib.suppress(OSError):
                line.sendall(start)
                while not over.wait(0.1):
                    line.sendall(b"x")

        dripping = threading.Thread(target=drip)
        dripping.start()
        try:
            with contextlib.suppress(ConnectionResetError):
                assert read(line) == b""
        finally:
            over.set()
            dripping.join()


def test_a_connection_that_answered_is_kept_for_the_next_request_longer_than_one_may_take_to_arrive(
    target: Running,
) -> None:
    over = threading.Event()
    with dial(target) as line:
        for _ in range(2):
            line.sendall(head(target, path="/api/events?after=x"))
            read(line, b"invalid_cursor")
            # Longer than ARRIVAL_SECONDS of this server: nothing is arriving, so nothing is late. (Not a wait for anything.)
            over.wait(2.5)


def test_many_connections_that_say_nothing_keep_nobody_out(target: Running) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(200):
            stack.enter_context(dial(target)).sendall(b"GET /api")
        with events(target) as stream:
            stream.named("ready")


def test_who_only_half_hangs_up_is_gone(target: Running) -> None:
    with dial(target) as line:
        line.sendall(head(target))
        read(line, b"event: ready")
        line.shutdown(socket.SHUT_WR)
        read(line)
    until(lambda: numbers(target)["switchboard_streams_open"] == 0, 10)


def test_the_server_is_still_well(target: Running) -> None:
    with events(target) as stream:
        stream.named("ready")
        made = connect(target)
        stream.until(lambda event: event.json().get("id") == made["id"])
    until(lambda: numbers(target)["switchboard_streams_open"] == 0, 10)
    descriptors = list(Path(f"/proc/{pid_of(target)}/fd").iterdir())
    assert len(descriptors) < 100
