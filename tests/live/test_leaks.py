"""What streams leave behind when they are over (nothing), how many there may be, and who ends them from outside."""

from __future__ import annotations

import json
import re
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from lxml import html

from tests.conftest import ROOT, Running, run_switchboard, until
from tests.live import services
from tests.live.services import Cluster
from tests.live.streaming import Stream, call, connect, events, many, pid_of, threads_of
from tests.live.test_operations import numbers, readiness

pytestmark = pytest.mark.live

# ── A thousand that come and go ──

COUNT = 1000
#: What the process may keep open to the database: its pool, which grows to what was needed at one moment and shrinks after minutes.
POOL = 4

#: The server, which tells on SIGUSR1 what it holds.
WRAPPER = """
import asyncio, gc, json, signal, sys
from project import server
from events.broker import Subscription
from events.consumers import Course, EventStreamConsumer
from twisted.internet import reactor

def tell(*_):
    gc.collect()
    kinds = [type(each) for each in gc.get_objects()]
    held = {"tasks": len(asyncio.all_tasks(reactor._asyncioEventloop))}
    for name, kind in {"subscriptions": Subscription, "courses": Course, "streams": EventStreamConsumer, "requests": server.Request,
                       "wires": server.Wire}.items():
        held[name] = sum(issubclass(each, kind) for each in kinds)
    print("HELD", json.dumps(held), flush=True)

signal.signal(signal.SIGUSR1, tell)
sys.exit(server.main())
"""


@pytest.fixture
def telling(tmp_path: Path) -> Iterator[tuple[Running, services.PostgreSQL]]:
    """A server on PostgreSQL and Redis that tells what it holds."""
    with (
        services.postgresql(tmp_path) as database,
        services.redis(tmp_path) as redis,
        run_switchboard(
            tmp_path,
            DATABASE_URL=database.url,
            REDIS_URL=redis.url,
            DATABASE_POOL_SIZE=str(POOL),
            STREAM_LIMIT="5000",
            HEARTBEAT_SECONDS="2",
        ) as running,
    ):
        services.stop_all(running)
        with (tmp_path / "server.log").open("ab") as output:
            running.processes["server"] = subprocess.Popen(
                [sys.executable, "-c", WRAPPER], cwd=ROOT, env=running.env, stdout=output, stderr=output
            )
        running.wait_until_up()
        yield running, database


def held(running: Running, database: services.PostgreSQL) -> dict[str, int]:
    """What the process has at this moment."""
    pid = pid_of(running)
    before = running.log("server").count("HELD ")
    running.processes["server"].send_signal(signal.SIGUSR1)
    until(lambda: running.log("server").count("HELD ") > before, 20)
    told: dict[str, int] = json.loads(re.findall(r"HELD (\{.*\})", running.log("server"))[-1])
    rows = database.execute(
        "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'switchboard' AND datname = 'switchboard'"
    )
    connections = int(rows[0][0])
    return told | {
        "threads": threads_of(pid),
        # Those that are no connections of the pool.
        "files": len(list(Path(f"/proc/{pid}/fd").iterdir())) - connections,
        "database connections": connections,
    }


def open_raw(running: Running) -> socket.socket:
    """A stream that is asked for; nobody reads it yet."""
    host, _, port = running.domain.partition(":")
    line = socket.create_connection((host, int(port)), timeout=30)
    line.sendall(
        f"GET /api/events HTTP/1.1\r\nHost: {running.domain}\r\nAuthorization: Bearer {running.api_key}\r\n\r\n".encode()
    )
    return line


def read_until(line: socket.socket, word: bytes) -> None:
    got = b""
    while word not in got:
        part = line.recv(65536)
        assert part, f"ended after {got!r}"
        got += part


def hang_up(line: socket.socket, number: int) -> None:
    """In order, or by a reset as when a machine is gone."""
    if number % 2:
        line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    line.close()


def test_C06_a_thousand_streams_opened_and_closed_leave_nothing_behind(
    telling: tuple[Running, services.PostgreSQL],
) -> None:
    running, database = telling
    # What the process keeps of its first stream is no leak: its thread for the database, its connection to Redis.
    for _ in range(3):
        with events(running) as warm:
            warm.named("ready")
            connect(running)
            warm.named("connection.created")
        until(lambda: numbers(running)["switchboard_streams_open"] == 0, 10)
    assert readiness(running)[0] == 200
    before = held(running, database)
    assert before["subscriptions"] == before["courses"] == 0
    for _ in range(2):
        lines = [open_raw(running) for _ in range(COUNT)]
        try:
            for line in lines:
                read_until(line, b"event: ready")
            assert numbers(running)["switchboard_streams_open"] == COUNT
            during = held(running, database)
            assert during["subscriptions"] == during["courses"] == COUNT
            assert during["files"] >= before["files"] + COUNT
            # However many there are, they share one reader of the log and one desk.
            assert during["threads"] <= before["threads"] + 4
            assert during["database connections"] <= POOL
            # They leave while something is being written to them.
            connect(running)
            for line in lines[::3]:
                read_until(line, b"event: connection.created")
        finally:
            for number, line in enumerate(lines):
                hang_up(line, number)

        def nothing_left() -> bool:
            now = held(running, database)
            allowed = before | {"database connections": POOL}
            return all(now[name] <= count for name, count in allowed.items())

        try:
            until(nothing_left, 30)
        except AssertionError:
            raise AssertionError(f"before {before}, after {held(running, database)}") from None
        counted = numbers(running)
        assert counted["switchboard_streams_open"] == 0
        assert counted["switchboard_hub_running"] == 0
        assert not any(name.startswith("switchboard_principal_streams ") for name in counted)
        ready, found = readiness(running)
        assert ready == 200
        assert found["checks"]["hub"]["running"] is False
    assert "Traceback" not in running.log("server"), running.log("server")
    assert "never retrieved" not in running.log("server")


# ── Limits ──


def test_C12_more_streams_than_a_caller_or_a_process_may_have_are_told_when_to_come_again(
    tmp_path: Path,
) -> None:
    with run_switchboard(tmp_path, STREAM_PROCESS_LIMIT="3", STREAM_LIMIT="2") as running:

        def refusal(key: str) -> tuple[int, str]:
            with events(running, key=key) as stream:
                headers = {name.lower(): value for name, value in stream.answer.getheaders()}
                assert int(headers["retry-after"]) > 0
                assert headers["content-type"] == "application/json"
                return stream.status, stream.json()["code"]

        with many(2, lambda: events(running)) as mine:
            for stream in mine:
                stream.named("ready")
            assert refusal(running.api_key) == (429, "too_many_streams")
            with events(running, key=running.other_api_key) as other:
                other.named("ready")
                assert refusal(running.other_api_key) == (503, "process_full")
                counted = numbers(running)
                assert counted["switchboard_streams_open"] == 3
                assert counted["switchboard_streams_refused_total 429"] == 1
                assert counted["switchboard_streams_refused_total 503"] == 1
                # Who is there already notices nothing.
                made = connect(running)
                for stream in mine:
                    stream.until(lambda event: event.json().get("id") == made["id"])
                # A place that is given back is there for the next.
                mine[0].close()
                until(lambda: numbers(running)["switchboard_streams_open"] == 2, 10)
                with events(running, key=running.other_api_key) as next_one:
                    assert next_one.status == 200
                    next_one.named("ready")


# ── An operator ends them, in the admin of another server ──


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with services.cluster(tmp_path_factory.mktemp("operators"), workers=0, HEARTBEAT_SECONDS="2") as started:
        yield started


class Browser:
    """Somebody at one server, past nginx: the cookies are for https alone, so they are carried by hand."""

    def __init__(self, node: Running) -> None:
        self.http = httpx.Client(base_url=node.url, trust_env=False, timeout=20)
        self.cookies: dict[str, str] = {}

    def _keep(self, answer: httpx.Response) -> httpx.Response:
        for line in answer.headers.get_list("set-cookie"):
            name, _, value = line.partition(";")[0].partition("=")
            self.cookies[name] = value
        return answer

    @property
    def cookie(self) -> str:
        return "; ".join(f"{name}={value}" for name, value in self.cookies.items())

    def get(self, path: str) -> httpx.Response:
        answer = self._keep(self.http.get(path, headers={"Cookie": self.cookie}))
        assert answer.status_code == 200, (path, answer.status_code)
        return answer

    def post(self, path: str, form: dict[str, Any]) -> httpx.Response:
        form = form | {"csrfmiddlewaretoken": self.cookies["csrftoken"]}
        return self._keep(self.http.post(path, data=form, headers={"Cookie": self.cookie}))

    def sign_in(self, path: str, username: str, password: str) -> None:
        self.get(path)
        answer = self.post(path, {"username": username, "password": password})
        assert answer.status_code == 302, answer.text
        assert "sessionid" in self.cookies

    def form(self, path: str) -> dict[str, Any]:
        """What a browser would send of the form of that page."""
        page = html.fromstring(self.get(path).text)
        form = next(each for each in page.forms if "_save" in each.inputs)
        return dict(form.form_values())


MAKE = """
import json
from django.contrib.auth.models import User
from django.utils import timezone
from connections import registry
user = User.objects.create_user({name!r}, password="of-this-test-alone")
row, plain = registry.create_api_key(owner_id=user.pk, name="phone", now=timezone.now())
print("MADE", json.dumps([user.pk, row.pk, plain]))
"""


def person(cluster: Cluster, name: str) -> tuple[int, int, str]:
    """A new user with a key: their number, the key's, and the key."""
    printed = cluster.nodes[0].shell(MAKE.format(name=name))
    user, key, plain = json.loads(printed.split("MADE", 1)[1])
    return user, key, plain


@pytest.fixture
def operator(cluster: Cluster) -> Iterator[Browser]:
    """Signed in to the admin of the first server."""
    browser = Browser(cluster.nodes[0])
    with browser.http:
        browser.sign_in("/admin/login/", cluster.front.username, cluster.front.password)
        yield browser


def assert_over_within_a_heartbeat(stream: Stream, told: int) -> None:
    """``told``: how many frames there were when the operator had the answer."""
    assert stream.named("end", 10).json() == {"reason": "session_over", "reconnect": False}
    assert stream.ended.wait(30)
    later = stream.names()[told:]
    assert later.count("heartbeat") <= 1, later
    assert later[-1] == "end"


def test_C02_a_key_revoked_in_the_admin_of_one_server_ends_its_streams_on_the_other(
    cluster: Cluster, operator: Browser
) -> None:
    there = cluster.nodes[1]
    _, key, plain = person(cluster, "loses-a-phone")
    with events(there, key=plain) as stream, events(there) as bystander:
        stream.named("ready")
        bystander.named("ready")
        # It goes on as long as the key is good.
        until(lambda: stream.names().count("heartbeat") >= 2, 15)
        form = {"action": "revoke", "_selected_action": str(key), "index": "0"}
        answer = operator.post("/admin/connections/apikey/", form)
        told = len(stream.events)
        assert answer.status_code == 302, answer.text
        assert_over_within_a_heartbeat(stream, told)
        for node in cluster.nodes:
            with events(node, key=plain) as refused:
                assert refused.status == 401
            assert call(node, "GET", "/auth/connections", key=plain)[0] == 401
        beats = bystander.names().count("heartbeat")
        until(lambda: bystander.names().count("heartbeat") > beats, 10)
        assert not bystander.of("end")


def test_C02_a_user_deactivated_in_the_admin_of_one_server_loses_every_stream_on_the_other(
    cluster: Cluster, operator: Browser
) -> None:
    there = cluster.nodes[1]
    user, _, plain = person(cluster, "leaves-the-company")
    theirs = Browser(there)
    with theirs.http:
        theirs.sign_in("/signin", "leaves-the-company", "of-this-test-alone")
    cookie = {"Cookie": theirs.cookie}
    with (
        events(there, key=plain) as by_key,
        Stream(f"{there.url}/api/events", headers=cookie) as by_cookie,
        Stream(f"{there.url}/live", headers=cookie) as page,
    ):
        for stream in (by_key, by_cookie, page):
            assert stream.status == 200
            stream.named("ready")
        path = f"/admin/auth/user/{user}/change/"
        form = operator.form(path)
        assert form.pop("is_active") == "on"
        answer = operator.post(path, form)
        told = [len(stream.events) for stream in (by_key, by_cookie, page)]
        assert answer.status_code == 302, answer.text
        for stream, count in zip((by_key, by_cookie, page), told, strict=True):
            assert_over_within_a_heartbeat(stream, count)
        for again in (
            {"Authorization": f"Bearer {plain}"},
            cookie,
        ):
            with Stream(f"{there.url}/api/events", headers=again) as refused:
                assert refused.status == 401
        with Stream(f"{there.url}/live", headers=cookie) as refused:
            assert refused.status == 401
