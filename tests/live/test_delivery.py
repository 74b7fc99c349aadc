"""What the streams promise (spec/streams.md, section 2), in every deployment: both databases, with Redis and without."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tests.conftest import ROOT, Running, run_switchboard, until
from tests.live import services
from tests.live.streaming import Stream, call, connect, events, login, many
from tests.sites.app import PASSWORD, USERNAME, Site

pytestmark = pytest.mark.live

DEPLOYMENTS = ["sqlite", "sqlite+redis", "postgresql", "postgresql+redis"]

WRITE = """
import datetime as dt, random, sys, threading, time
from django.contrib.auth.models import User
from django.db import connection, transaction
from events import log
from events.envelope import Change

owner = User.objects.get(username="admin").pk
connection.close()

def write(topic, writer, count, hold):
    for number in range(count):
        with transaction.atomic():
            data = {"id": topic, "n": number, "writer": writer}
            log.append(Change(name="task.updated", topic=f"task:{topic}", audience=owner, object_id=topic, version=number + 1,
                              at=dt.datetime.now(dt.UTC), actor="test", data=data))
            if hold:
                # Held open after its id was drawn: whoever comes later must not be seen earlier.
                time.sleep(random.uniform(0, 0.004))
                # Every tenth never happened.
                transaction.set_rollback(number % 10 == 9)
    connection.close()

print("ready", flush=True)
for line in sys.stdin:
    topic, count, writers = line.split()
    threads = [threading.Thread(target=write, args=(topic, n, int(count), int(writers) > 1)) for n in range(int(writers))]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    print("done", flush=True)
"""


class Writer:
    """Another process of the installation, as a management command or a worker is one."""

    def __init__(self, running: Running) -> None:
        with (running.data_dir / "writer.log").open("ab") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "manage.py", "shell", "--no-imports", "-c", WRITE],
                cwd=ROOT, env=running.env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
            )  # fmt: skip
        self._hear("ready")

    def _hear(self, word: str) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline().strip() == word, "the writer failed: see writer.log"

    def write(self, topic: str, count: int, *, writers: int = 1) -> None:
        """So many events; with several writers at the same time each rolls every tenth of its own back."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{topic} {count} {writers}\n")
        self.process.stdin.flush()
        self._hear("done")

    def stop(self) -> None:
        self.process.communicate(timeout=20)


@pytest.fixture(scope="module")
def postgresql(tmp_path_factory: pytest.TempPathFactory) -> Iterator[services.PostgreSQL]:
    with services.postgresql(tmp_path_factory.mktemp("postgresql")) as started:
        yield started


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[services.Redis]:
    with services.redis(tmp_path_factory.mktemp("redis")) as started:
        yield started


@pytest.fixture(scope="module", params=DEPLOYMENTS)
def installation(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    """A server and a worker in this deployment."""
    deployment: str = request.param
    extra = {"STREAM_LIMIT": "100"}
    if deployment.startswith("postgresql"):
        database: services.PostgreSQL = request.getfixturevalue("postgresql")
        extra["DATABASE_URL"] = database.new_database(deployment)
    if deployment.endswith("redis"):
        extra["REDIS_URL"] = request.getfixturevalue("redis").url
    with run_switchboard(tmp_path_factory.mktemp("installation"), **extra) as started:
        yield started


@pytest.fixture(scope="module")
def writer(installation: Running) -> Iterator[Writer]:
    started = Writer(installation)
    yield started
    started.stop()


def numbers(stream: Stream, **of: Any) -> list[int]:
    told = [event.json() for event in stream.logged()]
    return [data["n"] for data in told if of.items() <= data.items()]


def assert_in_order_and_once(stream: Stream) -> None:
    ids = [int(event.id) for event in stream.logged()]
    assert ids == sorted(set(ids))


def test_C05_C36_what_another_process_writes_is_on_every_open_stream_in_order_and_once(
    installation: Running, writer: Writer
) -> None:
    with many(10, lambda: events(installation, "?topics=task:all")) as streams:
        for stream in streams:
            stream.named("ready")
        writer.write("all", 200)
        for stream in streams:
            until(lambda stream=stream: len(stream.logged()) >= 200, 20)
            assert numbers(stream) == list(range(200))
            assert_in_order_and_once(stream)


def test_C44_a_cursor_goes_on_without_a_gap_and_without_anything_twice(
    installation: Running, writer: Writer
) -> None:
    with events(installation, "?topics=task:cursor") as whole:
        cursor = str(whole.named("ready").json()["cursor"])
        seen: list[tuple[str, str]] = []
        for _ in range(4):
            # Some come while it is away, some while it is there.
            writer.write("cursor", 20)
            with events(installation, "?topics=task:cursor", Last_Event_ID=cursor) as part:
                part.named("ready")
                writer.write("cursor", 20)
                until(lambda part=part: len(part.logged()) >= 40, 20)
                seen += [(event.id, event.data) for event in part.logged()]
                cursor = part.parser.last_event_id
        until(lambda: len(whole.logged()) >= len(seen), 20)
        assert seen == [(event.id, event.data) for event in whole.logged()]


def test_C35_the_order_is_that_of_commits_and_what_was_rolled_back_was_never_there(
    installation: Running, writer: Writer
) -> None:
    writers, count = 4, 50
    kept = [number for number in range(count) if number % 10 != 9]
    with events(installation, "?topics=task:rivals") as stream:
        start = stream.named("ready").json()["cursor"]
        writer.write("rivals", count, writers=writers)
        # One more, so that nothing can still be on its way before it.
        writer.write("rivals", 1)
        until(lambda: len(stream.logged()) >= writers * len(kept) + 1, 20)
        assert_in_order_and_once(stream)
        live = [(event.id, event.json()["writer"], event.json()["n"]) for event in stream.logged()]
    for number in range(writers):
        assert [n for _, of, n in live[:-1] if of == number] == kept
    with events(installation, f"?topics=task:rivals&after={start}") as later:
        later.named("ready")
        told = [(event.id, event.json()["writer"], event.json()["n"]) for event in later.logged()]
        assert told == live, "whoever reads it later reads the same"


def test_C35_at_reception_a_GET_is_at_least_as_new_as_the_event(installation: Running) -> None:
    connection = connect(installation)
    path = f"/auth/connections/{connection['id']}"
    changes = 10
    pairs: list[tuple[int, int]] = []
    with events(installation, f"?topics=connection:{connection['id']}") as stream:
        stream.named("ready")

        def look() -> None:
            """Ask for the object the moment its event is there."""
            while len(pairs) < changes and not stream.ended.is_set():
                for event in stream.logged()[len(pairs) :]:
                    _, shown, _ = call(installation, "GET", path)
                    pairs.append((len(event.json()["allowed_domains"]), len(shown["allowed_domains"])))

        watcher = threading.Thread(target=look)
        watcher.start()
        for number in range(changes):
            domains = [f"d{each}.example.com" for each in range(number + 1)]
            status, body, _ = call(installation, "PATCH", path, {"allowed_domains": domains})
            assert status == 200, body
        watcher.join(20)
    assert [told for told, _ in pairs] == list(range(1, changes + 1))
    assert [(told, shown) for told, shown in pairs if shown < told] == []


def test_C36_every_step_of_a_workers_login_is_on_the_streams_once(installation: Running) -> None:
    with Site(scenario="simple") as site:
        connection = connect(installation, site.domain, login_url=site.url("/simple/login"))
        with many(2, lambda: events(installation, f"?topics=connection:{connection['id']}")) as streams:
            for stream in streams:
                stream.named("ready")
            login(installation, connection)
            asked = streams[0].until(lambda event: event.json().get("flow_step") == "AWAITING_INPUT").json()
            values = {"identifier": USERNAME, "password": PASSWORD}
            answer = {
                "interaction_id": asked["interaction_id"],
                "field_values": {field["id"]: values[field["type"]] for field in asked["fields"]},
            }
            assert (
                call(installation, "POST", f"/auth/connections/{connection['id']}/submit", answer)[0] == 202
            )
            for stream in streams:
                stream.until(lambda event: event.json().get("flow_status") == "SUCCESS")
                stream.named("connection.status")
                versions = [event.json()["version"] for event in stream.of("flow.state")]
                assert versions == sorted(set(versions)), "each state once, in order"
                steps = [event.json()["flow_step"] for event in stream.of("flow.state")]
                assert steps == ["DISCOVERING", "AWAITING_INPUT", "SUBMITTING", "COMPLETED"]
                assert_in_order_and_once(stream)
            last = int(streams[0].logged()[-1].id)
            both = [[event.id for event in stream.logged() if int(event.id) <= last] for stream in streams]
            assert both[0] == both[1]
