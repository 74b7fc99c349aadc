"""The output of tasks over real sockets: two server processes, on SQLite and on PostgreSQL; what is written through one is read through the other."""

from __future__ import annotations

import base64
import http.client
import http.cookiejar
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, Running, run_switchboard, until
from tests.live import services
from tests.live.client import Node, installation
from tests.live.streaming import Stream, call

pytestmark = pytest.mark.live


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def pair(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    clients_database: services.PostgreSQL,
) -> Iterator[list[Node]]:
    """Two servers without Redis: the second learns of what was written through the first by looking."""
    database = clients_database if request.param == "postgresql" else None
    with installation(
        tmp_path_factory.mktemp(request.param), servers=2, database=database, COMMANDS="any", COMMAND_LIMIT="3", STREAM_LIMIT="300",
    ) as nodes:  # fmt: skip
        yield nodes


class Work:
    """A task of a kind of its own in the hands of this test."""

    def __init__(self, node: Running, kind: str | None = None) -> None:
        self.node = node
        self.kind = kind or f"k{uuid.uuid4().hex[:12]}"
        status, made, _ = call(node, "POST", "/api/tasks", {"kind": self.kind, "payload": None})
        assert status == 201, made
        self.id = made["id"]
        _, claimed, _ = call(
            node, "POST", "/api/work/claim", {"kinds": [self.kind], "worker": "t", "lease_seconds": 600}
        )
        assert claimed["task"]["id"] == self.id
        self.hold = {"worker": "t", "attempt": claimed["attempt"]}
        self.place = 0
        self._link = http.client.HTTPConnection("127.0.0.1", int(node.env["PORT"]), timeout=60)

    def write(self, data: bytes) -> None:
        for start in range(0, len(data), 1 << 20):
            piece = data[start : start + (1 << 20)]
            address = f"/api/work/{self.id}/output?worker=t&attempt={self.hold['attempt']}&at={self.place}"
            headers = {
                "Authorization": f"Bearer {self.node.api_key}",
                "Content-Type": "application/octet-stream",
            }
            self._link.request("POST", address, piece, headers)
            answer = self._link.getresponse()
            body = json.loads(answer.read())
            assert answer.status == 200, body
            self.place = body["next"]
        # It opens again by itself.
        self._link.close()

    def end(self, **how: Any) -> None:
        status, shown, _ = call(
            self.node, "POST", f"/api/work/{self.id}/status", {**self.hold, "status": "completed", **how}
        )
        assert status == 200, shown


class Output(Stream):
    """A reader of one output; ``data`` is what came, ``place`` where it would go on."""

    def __init__(self, node: Running, task_id: str, query: str = "", *, last: int | None = None) -> None:
        headers = {} if last is None else {"Last-Event-ID": str(last)}
        super().__init__(f"{node.url}/api/tasks/{task_id}/output{query}", key=node.api_key, headers=headers)

    @property
    def data(self) -> bytes:
        return b"".join(base64.b64decode(event.json()["data"]) for event in self.of("output"))

    @property
    def place(self) -> int:
        # Of the last event that came whole, as an EventSource has it.
        return int(self.events[-1].id or 0) if self.events else 0


def test_C50_C36_what_one_process_writes_another_streams_at_once_and_the_end_too(pair: list[Node]) -> None:
    work = Work(pair[0])
    with Output(pair[1], work.id) as stream:
        assert stream.named("ready").json()["offset"] == 0
        for piece in (b"one \xff\x00", "zwei €".encode(), b"\x1b[1mthree\r\n"):
            size = len(stream.data) + len(piece)
            work.write(piece)
            until(lambda size=size: len(stream.data) == size, 10)
        work.end(exit_code=0)
        assert stream.named("end").json()["status"] == "completed"
        assert stream.ended.wait(10), "the server closes after the end"
        assert stream.data == b"one \xff\x00" + "zwei €".encode() + b"\x1b[1mthree\r\n"
        assert stream.answer.headers["Content-Type"] == "text/event-stream"
        assert stream.answer.headers["X-Accel-Buffering"] == "no"


def test_the_same_address_gives_the_bytes_in_one_piece(pair: list[Node]) -> None:
    work = Work(pair[0])
    data = random.Random(5).randbytes(3_000_000)
    work.write(data)
    headers = {"Authorization": f"Bearer {pair[1].api_key}"}
    for query, expected in (
        ("", data),
        ("?tail=10", data[-10:]),
        ("?from=2999990", data[-10:]),
        ("?ansi=keep&from=5&limit=7", data[5:12]),
    ):
        request = urllib.request.Request(f"{pair[1].url}/api/tasks/{work.id}/output{query}", headers=headers)
        with urllib.request.urlopen(request, timeout=30) as answer:
            assert answer.read() == expected
            assert answer.headers["Content-Type"] == "application/octet-stream"
            assert answer.headers["X-Task-Status"] == "running"
    status, error, _ = call(
        pair[1], "POST", f"/api/tasks/{work.id}/output", {}, headers={"Accept": "text/event-stream"}
    )
    assert (status, error["code"]) == (405, "method_not_allowed")


def signed_in(node: Running) -> str:
    """The session cookie of the admin's browser."""
    jar = http.cookiejar.CookieJar()
    opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(jar))
    with opener.open(f"{node.url}/signin", timeout=30) as page:
        token = re.search(r'name="csrfmiddlewaretoken" value="([^"]+)"', page.read().decode())
    assert token is not None
    fields = {"csrfmiddlewaretoken": token[1], "username": node.username, "password": node.password}
    opener.open(f"{node.url}/signin", urllib.parse.urlencode(fields).encode(), timeout=30).close()
    return next(f"{cookie.name}={cookie.value}" for cookie in jar if cookie.name == "sessionid")


def test_C60_a_page_follows_with_its_session_and_a_stranger_gets_nothing(pair: list[Node]) -> None:
    work = Work(pair[0])
    work.write(b"for the owner")
    address = f"{pair[1].url}/api/tasks/{work.id}/output"
    # As an EventSource asks: a cookie, no other header of ours.
    with Stream(address, headers={"Cookie": signed_in(pair[1])}) as stream:
        stream.named("output")
    for key, status in ((pair[1].other_api_key, 404), ("", 401), ("sk_wrong", 401)):
        for headers in ({}, {"Accept": "*/*"}):
            with Stream(address, key=key, headers=headers) as stream:
                assert stream.status == status
                assert "for the owner" not in json.dumps(stream.json())


def test_C50_fifty_megabytes_are_exact_over_reconnects_at_random_offsets_between_processes(
    pair: list[Node],
) -> None:
    chance = random.Random(20)
    # Every place looks different, and there is everything in it: invalid UTF-8, cut characters, very long lines, escape sequences.
    block = (
        chance.randbytes(1 << 20) + "größer ✔ \x1b[1;31mrot\x1b[0m\r\n".encode() * 20_000 + b"x" * (1 << 20)
    )
    size = 50 << 20
    work = Work(pair[0])
    written = bytearray()

    def write() -> None:
        while len(written) < size:
            piece = block[chance.randrange(len(block) // 2) :][: 1 << 20]
            work.write(piece)
            written.extend(piece)
        work.end()

    writer = threading.Thread(target=write)
    writer.start()
    found = bytearray()
    place, streams, over = 0, 0, False
    hands = random.Random(21)
    while not over:
        streams += 1
        with Output(hands.choice(pair), work.id, last=place) as stream:
            wanted = place + hands.choice([0, 1, 10_000, 1_000_000, 15_000_000])
            until(lambda s=stream, w=wanted: s.place > w or s.ended.is_set(), 120)
        # Closed in the middle of whatever it was doing: what was not read whole is no event.
        over = "end" in stream.names()
        found += stream.data
        place = max(place, stream.place)
        assert len(found) == place
    writer.join()
    assert streams > 4
    assert bytes(found) == bytes(written)


def test_a_hundred_readers_of_one_task_get_every_byte(pair: list[Node]) -> None:
    work = Work(pair[0])
    data = random.Random(7).randbytes(200_000)
    streams = [Output(pair[number % 2], work.id, "?from=live") for number in range(100)]
    try:
        for stream in streams:
            stream.named("ready")
        for start in range(0, len(data), 20_000):
            work.write(data[start : start + 20_000])
        work.end()
        for stream in streams:
            assert stream.named("end", 60).json()["status"] == "completed"
            assert stream.data == data
    finally:
        for stream in streams:
            stream.close()


def memory(node: Node) -> int:
    """Bytes that a server process holds."""
    text = (Path("/proc") / str(node.pid) / "status").read_text()
    return int(re.findall(r"VmRSS:\s+(\d+)", text)[0]) * 1024


def test_C12_readers_that_take_nothing_cost_little_and_read_on_when_they_can(pair: list[Node]) -> None:
    work = Work(pair[0])
    data = random.Random(8).randbytes(20 << 20)
    node = pair[1]
    work.write(data[: 1 << 20])
    links = []
    try:
        for _ in range(30):
            link = socket.create_connection(("127.0.0.1", int(node.env["PORT"])))
            link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            link.sendall(
                f"GET /api/tasks/{work.id}/output HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept: text/event-stream\r\n"
                f"Authorization: Bearer {node.api_key}\r\n\r\n".encode()
            )
            assert b" 200 " in link.recv(200)
            links.append(link)
        before = memory(node)
        with Output(node, work.id) as quick:
            work.write(data[1 << 20 :])
            until(lambda: quick.place == len(data), 120)
            grown = memory(node) - before
        # 30 readers, of whom none took the 20 MiB. What is kept for all of them is bounded: task_streams.BLOCKS_KEPT.
        assert grown < 60 << 20, f"{grown / 1e6:.1f} MB"
    finally:
        for link in links:
            link.close()


def test_a_server_that_stops_sends_its_readers_to_the_other(pair: list[Node]) -> None:
    work = Work(pair[0])
    work.write(b"before ")
    with Output(pair[1], work.id) as stream:
        stream.named("output")
        pair[1].stop_server(signal.SIGTERM)
        end = stream.named("end").json()
        assert (end["reason"], end["reconnect"]) == ("shutdown", True)
    try:
        work.write(b"after")
        with Output(pair[0], work.id, last=stream.place) as again:
            again.named("output")
            assert stream.data + again.data == b"before after"
    finally:
        pair[1].start_server()
        pair[1].wait_until_up()


def at_once(nodes: list[Node], count: int, act: Callable[[int, Node], Any]) -> list[Any]:
    together = threading.Barrier(count)

    def one(number: int) -> Any:
        together.wait(60)
        return act(number, nodes[number % len(nodes)])

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


def test_C52_with_room_for_one_of_ten_creations_on_two_processes_one_passes(pair: list[Node]) -> None:
    made = [
        call(pair[0], "POST", "/api/tasks", {"kind": "command", "argv": ["true"]})[1]["id"] for _ in range(2)
    ]
    told = "SELECT count(*) FROM events_event WHERE name = 'task.created'"
    before = pair[0].rows(told)[0][0]
    for _ in range(3):
        answers = at_once(
            pair,
            10,
            lambda number, node: call(
                node, "POST", "/api/tasks", {"kind": "command", "argv": ["true"]}, headers={"Idempotency-Key": str(uuid.uuid4())} if number % 3 else None
            ),
        )  # fmt: skip
        assert sorted(status for status, _, _ in answers) == [201] + [429] * 9
        for status, body, headers in answers:
            if status == 429:
                assert (body["code"], body["limit"], body["running"] + body["queued"]) == (
                    "no_capacity",
                    3,
                    3,
                )
                assert int(headers["retry-after"]) >= 1
        after = pair[0].rows(told)[0][0]
        assert after == before + 1
        before = after
        winner = next(body["id"] for status, body, _ in answers if status == 201)
        assert call(pair[1], "POST", f"/api/tasks/{winner}/kill")[1]["status"] == "killed"
    for task_id in made:
        call(pair[0], "POST", f"/api/tasks/{task_id}/kill")


def test_the_example_of_a_worker_takes_a_task_asks_and_is_answered(pair: list[Node]) -> None:
    node = pair[0]
    env = {"PATH": os.environ["PATH"], "SWITCHBOARD_URL": node.url, "SWITCHBOARD_KEY": node.api_key}
    with (node.data_dir / "example.log").open("wb") as log:
        program = subprocess.Popen(
            [sys.executable, ROOT / "tests/examples/external_worker.py"], env=env, stdout=log, stderr=log
        )
    try:
        for name in ("Ada", "$(id) 'x'"):
            _, task, _ = call(
                node, "POST", "/api/tasks", {"kind": "greeting", "payload": {"greeting": "Hello"}}
            )
            path = f"/api/tasks/{task['id']}"
            asks = until(lambda p=path: (shown := call(node, "GET", p)[1])["prompt"] and shown, 20)
            assert (asks["status"], asks["prompt"]["text"]) == ("waiting_for_input", "Who is there?")
            assert call(pair[1], "POST", f"{path}/input", {"text": name})[0] == 202
            shown = until(lambda p=path: (s := call(node, "GET", p)[1])["status"] == "completed" and s, 20)
            assert shown["inputs"][0]["status"] == "delivered"
            with Output(node, task["id"]) as stream:
                stream.named("end")
                assert stream.data.decode() == f"Who is there? {name}\r\nHello, {name}!\r\n"
        _, task, _ = call(node, "POST", "/api/tasks", {"kind": "greeting", "payload": {"greeting": "Hello"}})
        path = f"/api/tasks/{task['id']}"
        until(lambda: call(node, "GET", path)[1]["status"] == "waiting_for_input", 20)
        call(node, "POST", f"{path}/kill", {"reason": "enough"})
        until(lambda: call(node, "GET", path)[1]["status"] == "killed", 20)
        assert program.poll() is None, (node.data_dir / "example.log").read_text()
    finally:
        program.terminate()
        program.wait(10)


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """An installation with a worker that runs commands."""
    with run_switchboard(tmp_path_factory.mktemp("commands"), COMMANDS="any", STREAM_LIMIT="100") as running:
        yield running


def manage(running: Running, *words: str, **more: Any) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "manage.py", "task", *words], cwd=ROOT, env=running.env, capture_output=True, timeout=60, check=False, **more
    )  # fmt: skip


def test_C32_the_command_line_runs_a_command_and_leaves_as_it_did(commands: Running) -> None:
    done = manage(commands, "run", "--", "sh", "-c", r"printf 'a\377\000b'; exit 3", stdin=subprocess.DEVNULL)
    assert (done.returncode, done.stdout) == (3, b"a\xff\x00b"), done.stderr
    done = manage(commands, "run", "--", "sh", "-c", "kill -SEGV $$", stdin=subprocess.DEVNULL)
    assert done.returncode == 128 + signal.SIGSEGV, done.stderr
    done = manage(commands, "run", "--", "no-such-program-anywhere", stdin=subprocess.DEVNULL)
    assert done.returncode == 1
    assert b"no-such-program-anywhere" in done.stderr


def test_C45_C19_on_the_command_line_a_command_is_answered_and_another_is_ended_by_ctrl_c(
    commands: Running,
) -> None:
    task_id = (
        manage(commands, "run", "--detach", "--", "sh", "-c", "printf 'name? '; read x; echo \"hello $x\"")
        .stdout.decode()
        .strip()
    )
    until(
        lambda: (
            json.loads(manage(commands, "show", task_id, "--json").stdout)["status"] == "waiting_for_input"
        ),
        30,
    )
    assert manage(commands, "input", task_id, "$(id)").returncode == 0
    followed = manage(commands, "output", task_id, "--follow")
    assert (followed.returncode, followed.stdout.endswith(b"hello $(id)\r\n")) == (0, True), followed
    words = ["run", "--", "sh", "-c", "echo up; sleep 300"]
    with subprocess.Popen(
        [sys.executable, "manage.py", "task", *words],
        cwd=ROOT, env=commands.env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    ) as program:  # fmt: skip
        assert program.stdout is not None
        assert program.stdout.readline() == b"up\r\n"
        program.send_signal(signal.SIGINT)
        assert program.wait(30) == 130
    newest = json.loads(manage(commands, "list", "--json", "--limit", "1").stdout)[0]
    assert (newest["status"], newest["kill_reason"]) == ("killed", "Killed in the terminal.")
