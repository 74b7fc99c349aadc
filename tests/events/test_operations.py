"""Readiness and metrics without a server: spoken in ASGI messages, in one event loop with a hub and streams of its own."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import threading
import time
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import pytest
from channels.layers import InMemoryChannelLayer
from django.core.management import CommandError, call_command
from django.db import OperationalError, connections
from django.utils import timezone
from prometheus_client.parser import text_string_to_metric_families

from events import hub as hubs
from events import log, metrics, operations
from events.consumers import streams
from events.envelope import SIGNAL_NAMES, Interest
from events.management.commands import events_stats
from tests.events.writing import write, write_and_leave

TOKEN = "a-token-of-this-test"  # not a secret of anybody


class Answer:
    def __init__(self, sent: list[dict[str, Any]]) -> None:
        start, *bodies = sent
        self.status = start["status"]
        self.headers = {name.decode().lower(): value.decode() for name, value in start["headers"]}
        self.body = b"".join(message["body"] for message in bodies)

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def numbers(self) -> dict[str, float]:
        return {
            sample.name + "".join(sample.labels.values()): sample.value
            for family in text_string_to_metric_families(self.body.decode())
            for sample in family.samples
        }


async def ask(
    application: Any, *, method: str = "GET", peer: str | None = "127.0.0.1", **headers: str
) -> Answer:
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    named = {"host": "127.0.0.1:8000", **headers}
    scope = {
        "type": "http",
        "method": method,
        "headers": [(name.replace("_", "-").encode(), value.encode()) for name, value in named.items()],
        "client": (peer, 4711) if peer else None,
    }
    await application(scope, None, send)
    return Answer(sent)


@contextlib.asynccontextmanager
async def a_running_hub() -> AsyncIterator[hubs.Hub]:
    hub = hubs.current()
    async with hub.subscribe(Interest()):
        yield hub


async def eventually(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


class Hanging:
    """A log whose newest id is a long time coming."""

    def __init__(self) -> None:
        self.released = threading.Event()
        self.asked = 0
        self.real = log.newest

    def newest(self) -> int:
        self.asked += 1
        self.released.wait(20)
        return self.real()


@pytest.fixture
def hanging(monkeypatch: pytest.MonkeyPatch) -> Hanging:
    made = Hanging()
    monkeypatch.setattr(operations, "log", made)
    monkeypatch.setattr(operations, "LOOK_SECONDS", 0.2)
    return made


class Layer:
    """A channel layer over a network: it takes what is said, or does not."""

    def __init__(self) -> None:
        self.answering = True
        self.said: list[tuple[str, Any]] = []
        self.after: Callable[[], None] = lambda: None

    async def group_send(self, group: str, message: Any) -> None:
        if not self.answering:
            await asyncio.Event().wait()
        self.said.append((group, message))
        self.after()


@pytest.fixture
def layer(monkeypatch: pytest.MonkeyPatch) -> Layer:
    made = Layer()
    monkeypatch.setattr(operations, "get_channel_layer", lambda: made)
    monkeypatch.setattr(operations, "LOOK_SECONDS", 0.6)
    return made


def names_of_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate()]


@pytest.mark.django_db(transaction=True)
@pytest.mark.asyncio
class TestReadiness:
    async def test_a_process_without_streams_is_ready(self) -> None:
        answer = await ask(operations.readyz)
        assert (answer.status, answer.json["ready"]) == (200, True)
        assert answer.json["checks"]["database"]["ok"]
        assert answer.json["checks"]["layer"] == {"ok": True, "kind": "memory"}
        assert answer.json["checks"]["hub"] == {"ok": True, "running": False}
        assert answer.json["checks"]["draining"] is False
        assert answer.headers["cache-control"] == "no-store"
        assert "retry-after" not in answer.headers

    async def test_a_hub_that_catches_up_in_time_is_ready(self, monkeypatch: pytest.MonkeyPatch) -> None:
        (newest,) = await asyncio.to_thread(write_and_leave, 1)
        hub = SimpleNamespace(running=True, position=newest - 1)
        monkeypatch.setattr(hubs, "_hubs", {asyncio.get_running_loop(): hub})
        looked = threading.Event()
        real = log.newest

        def newest_and_told() -> int:
            looked.set()
            return real()

        monkeypatch.setattr(operations.log, "newest", newest_and_told)
        asking = asyncio.create_task(ask(operations.readyz))
        await eventually(looked.is_set)
        asyncio.get_running_loop().call_later(0.1, setattr, hub, "position", newest)
        answer = await asking
        assert answer.status == 200, answer.body
        assert answer.json["checks"]["hub"] == {"ok": True, "running": True, "behind": 0}

    async def test_the_real_hub_has_caught_up_when_the_answer_says_so(self) -> None:
        async with a_running_hub() as hub:
            ids = await asyncio.to_thread(write_and_leave, *range(5))
            answer = await ask(operations.readyz)
            assert answer.status == 200, answer.body
            assert hub.position >= ids[-1]

    async def test_a_hub_that_does_not_catch_up_is_not_ready(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(operations, "LOOK_SECONDS", 0.3)
        monkeypatch.setattr(
            hubs, "_hubs", {asyncio.get_running_loop(): SimpleNamespace(running=True, position=0)}
        )
        (newest,) = await asyncio.to_thread(write_and_leave, 1)
        answer = await ask(operations.readyz)
        assert answer.status == 503
        assert answer.json["ready"] is False
        assert answer.json["checks"]["hub"] == {"ok": False, "running": True, "behind": newest}
        assert int(answer.headers["retry-after"]) > 0

    async def test_while_it_drains_it_is_not_ready_and_looks_at_nothing(self, hanging: Hanging) -> None:
        streams().draining.set()
        answer = await ask(operations.readyz)
        assert answer.status == 503
        assert answer.json["checks"]["draining"] is True
        assert answer.json["ready"] is False
        assert hanging.asked == 0

    async def test_a_database_that_fails_makes_it_unready_and_is_not_described_to_strangers(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def newest() -> int:
            raise OperationalError('connection to "db.internal" failed for user "switchboard"')

        monkeypatch.setattr(operations.log, "newest", newest)
        async with a_running_hub_without_a_log(monkeypatch):
            answer = await ask(operations.readyz)
        assert answer.status == 503
        assert answer.json["checks"]["database"] == {"ok": False, "error": "does not answer"}
        assert answer.json["checks"]["hub"]["ok"] is False
        assert b"db.internal" not in answer.body
        assert "db.internal" in caplog.text, "the operator's log says what it was"

    async def test_a_database_that_hangs_is_asked_once_however_many_want_to_know(
        self, hanging: Hanging
    ) -> None:
        answers = await asyncio.gather(*(ask(operations.readyz) for _ in range(50)))
        assert {answer.status for answer in answers} == {503}
        again = await ask(operations.readyz)
        assert again.status == 503
        assert hanging.asked == 1, "while one question hangs there is no second one"
        assert names_of_threads().count("operations.look") == 1
        hanging.released.set()
        await eventually(lambda: "operations.look" not in names_of_threads())
        assert (await ask(operations.readyz)).status == 200
        assert hanging.asked == 2

    async def test_a_probe_that_leaves_takes_the_look_from_nobody(self, hanging: Hanging) -> None:
        impatient = asyncio.create_task(ask(operations.readyz))
        patient = asyncio.create_task(ask(operations.readyz))
        await eventually(lambda: hanging.asked)
        impatient.cancel()
        with pytest.raises(asyncio.CancelledError):
            await impatient
        hanging.released.set()
        assert (await patient).status == 200

    async def test_a_layer_that_takes_what_is_said_is_ready_when_nobody_listens(self, layer: Layer) -> None:
        answer = await ask(operations.readyz)
        assert answer.status == 200, answer.body
        assert layer.said == [(operations.waker.GROUP, operations.waker.MESSAGE)]

    async def test_many_probes_at_once_cost_one_look(self, layer: Layer) -> None:
        answers = await asyncio.gather(*(ask(operations.readyz) for _ in range(50)))
        assert {answer.status for answer in answers} == {200}
        assert len(layer.said) == 1
        await ask(operations.readyz)
        assert len(layer.said) == 2, "what was is not told again to who asks later"

    async def test_a_layer_that_hangs_makes_it_unready_and_does_not_hold_the_check(
        self, layer: Layer
    ) -> None:
        layer.answering = False
        async with asyncio.timeout(10):
            answer = await ask(operations.readyz)
        assert answer.status == 503
        assert answer.json["checks"]["database"]["ok"] is True
        assert answer.json["checks"]["layer"] == {"ok": False, "kind": "redis", "error": "does not answer"}

    async def test_a_hub_that_does_not_hear_what_the_layer_took_is_not_ready(self, layer: Layer) -> None:
        async with a_running_hub():
            answer = await ask(operations.readyz)
            assert answer.status == 503
            assert answer.json["checks"]["layer"]["ok"] is False
            assert len(layer.said) > 1, "it is said again, for the hub may have joined just now"
            layer.after = metrics.WAKES.inc
            answer = await ask(operations.readyz)
        assert answer.status == 200, answer.body

    async def test_only_reading_is_allowed(self) -> None:
        for application in (operations.readyz, operations.metrics_page):
            for method in ("POST", "PUT", "DELETE"):
                answer = await ask(application, method=method)
                assert (answer.status, answer.json["code"]) == (405, "method_not_allowed")
                assert answer.headers["allow"] == "GET, HEAD"
            head = await ask(application, method="HEAD")
            assert (head.status, head.body) == (200, b"")
            assert int(head.headers["content-length"]) > 0


@contextlib.asynccontextmanager
async def a_running_hub_without_a_log(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    monkeypatch.setattr(
        hubs, "_hubs", {asyncio.get_running_loop(): SimpleNamespace(running=True, position=0)}
    )
    yield


@pytest.mark.django_db(transaction=True)
@pytest.mark.asyncio
class TestMetrics:
    async def test_streams_are_counted_by_who_opened_them_and_go_down_again(self) -> None:
        with streams().place("user:5"), streams().place("user:5"), streams().place("key:7"):
            numbers = (await ask(operations.metrics_page)).numbers
            assert numbers["switchboard_streams_open"] == 3
            assert numbers["switchboard_principal_streamsuser:5"] == 2
            assert numbers["switchboard_principal_streamskey:7"] == 1
        numbers = (await ask(operations.metrics_page)).numbers
        assert numbers["switchboard_streams_open"] == 0
        assert not any(name.startswith("switchboard_principal_streamsuser") for name in numbers)

    async def test_many_principals_do_not_become_many_series(self) -> None:
        with contextlib.ExitStack() as held:
            held.enter_context(streams().place("user:1"))
            for number in range(operations.NAMED_PRINCIPALS + 9):
                held.enter_context(streams().place(f"page:{number}"))
            held.enter_context(streams().place("user:1"))
            numbers = (await ask(operations.metrics_page)).numbers
        series = [
            name for name in numbers if name.startswith("switchboard_principal_streams") and ":" in name
        ]
        assert len(series) == operations.NAMED_PRINCIPALS
        assert numbers["switchboard_principal_streamsuser:1"] == 2, "those with the most are named"
        assert numbers["switchboard_principal_streamsothers"] == 10

    async def test_the_lag_of_the_hub_is_told_in_events_and_seconds(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ids = await asyncio.to_thread(write_and_leave, *range(4))
        numbers = (await ask(operations.metrics_page)).numbers
        assert numbers["switchboard_log_newest"] == ids[-1]
        assert (numbers["switchboard_hub_running"], numbers["switchboard_hub_lag_events"]) == (0, 0)
        hub = SimpleNamespace(running=True, position=ids[0], caught_up_at=time.monotonic() - 60)
        monkeypatch.setattr(hubs, "_hubs", {asyncio.get_running_loop(): hub})
        numbers = (await ask(operations.metrics_page)).numbers
        assert numbers["switchboard_hub_lag_events"] == ids[-1] - ids[0]
        assert 60 <= numbers["switchboard_hub_lag_seconds"] < 120
        hub.position = ids[-1]
        numbers = (await ask(operations.metrics_page)).numbers
        assert (numbers["switchboard_hub_lag_events"], numbers["switchboard_hub_lag_seconds"]) == (0, 0)
        assert numbers["switchboard_hub_looked_seconds"] >= 60
        hub.position, hub.caught_up_at = 0, None
        numbers = (await ask(operations.metrics_page)).numbers
        assert numbers["switchboard_hub_lag_seconds"] > 0, "it never was: as old as the process"

    async def test_without_the_database_the_rest_is_told_and_no_lag_is_made_up(
        self, hanging: Hanging, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async with a_running_hub():
            with streams().place("user:5"):
                numbers = (await ask(operations.metrics_page)).numbers
        hanging.released.set()
        assert numbers["switchboard_database_up"] == 0
        assert numbers["switchboard_streams_open"] == 1
        assert "switchboard_hub_lag_events" not in numbers
        assert "switchboard_log_newest" not in numbers
        await eventually(lambda: "operations.look" not in names_of_threads())

    async def test_everything_that_is_counted_is_told_and_the_process_too(self) -> None:
        metrics.ENDED.labels("slow").inc()
        numbers = (await ask(operations.metrics_page)).numbers
        assert numbers["switchboard_streams_ended_totalslow"] >= 1
        assert {
            "switchboard_events_skipped_total",
            "process_resident_memory_bytes",
            "process_open_fds",
        } <= set(numbers)
        assert not any(name.endswith("_created") for name in numbers)

    async def test_a_look_leaves_no_thread_and_no_database_connection_behind(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        used: list[Any] = []
        real = log.newest

        def newest() -> int:
            found = real()
            used.append(connections["default"])
            assert used[-1].connection is not None
            return found

        monkeypatch.setattr(operations.log, "newest", newest)
        for _ in range(3):
            await ask(operations.metrics_page)
        await eventually(lambda: "operations.look" not in names_of_threads())
        assert [each.connection for each in used] == [None] * 3, "closed, or back in the pool"

    @pytest.mark.parametrize("peer", ["127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1"])
    async def test_this_machine_may_read(self, peer: str) -> None:
        assert (await ask(operations.metrics_page, peer=peer)).status == 200

    @pytest.mark.parametrize(
        ("peer", "headers"),
        [
            ("10.0.0.5", {}),
            ("::ffff:10.0.0.5", {}),
            ("", {}),
            ("not an address", {}),
            ("127.0.0.1", {"x_forwarded_for": "127.0.0.1"}),
            ("127.0.0.1", {"X_Forwarded_Proto": "https"}),
            ("127.0.0.1", {"forwarded": "for=127.0.0.1"}),
            ("127.0.0.1", {"via": "1.1 proxy"}),
            ("127.0.0.1", {"x_real_ip": "127.0.0.1"}),
            ("127.0.0.1", {"host": "rebound.example:8000"}),
            ("127.0.0.1", {"host": "[::1"}),
            ("127.0.0.1", {"authorization": f"Bearer {TOKEN}"} | {"x_forwarded_for": "127.0.0.1"}),
        ],
    )
    async def test_nobody_else_may_without_a_token(self, peer: str, headers: dict[str, str]) -> None:
        answer = await ask(operations.metrics_page, peer=peer, **headers)
        assert (answer.status, set(answer.json)) == (403, {"code", "message"})
        assert b"switchboard_" not in answer.body

    async def test_with_a_token_only_who_sends_it_may_and_from_anywhere(self, settings: Any) -> None:
        settings.METRICS_TOKEN = TOKEN
        for wrong in ({}, {"authorization": TOKEN}, {"authorization": f"Basic {TOKEN}"},
                      {"authorization": f"Bearer {TOKEN}x"}, {"authorization": "Bearer "}):  # fmt: skip
            answer = await ask(operations.metrics_page, **wrong)
            assert (answer.status, answer.json["code"]) == (401, "unauthorized")
            assert answer.headers["www-authenticate"] == "Bearer"
            assert TOKEN.encode() not in answer.body
        for scheme in ("Bearer", "bearer"):
            answer = await ask(
                operations.metrics_page,
                peer="10.0.0.5",
                x_forwarded_for="192.0.2.7",
                host="switchboard.example.com",
                authorization=f"{scheme} {TOKEN}",
            )
            assert answer.status == 200
        assert TOKEN.encode() not in answer.body


def test_the_layer_of_the_tests_is_the_one_in_memory() -> None:
    """Or the tests above that say "memory" would test nothing."""
    assert isinstance(operations.get_channel_layer(), InMemoryChannelLayer)


# ── manage.py events_stats ──


def told(*words: str) -> str:
    out = io.StringIO()
    call_command("events_stats", *words, stdout=out)
    return out.getvalue()


@pytest.mark.django_db
def test_events_stats_of_an_empty_log() -> None:
    shown = json.loads(told("--json"))
    assert shown["events"]["count"] == 0
    assert shown["events"]["oldest"] is None
    assert shown["days"] == []
    assert "events in the log  0" in told()


@pytest.mark.django_db(transaction=True)
def test_events_stats_counts_by_day_and_name_and_tells_ages_rates_and_size() -> None:
    now = timezone.now()

    def ago(**units: float) -> Any:
        return now - events_stats.dt.timedelta(**units)

    old = write(1, at=ago(days=40))
    write(2, 3, at=ago(days=3))
    write(4, at=ago(minutes=30))
    new = write(5, 6, name="task.updated", at=ago(seconds=2))
    shown = json.loads(told("--json"))
    assert shown["events"]["count"] == 6
    assert shown["events"]["cut_off"] is False
    assert shown["events"]["oldest"]["id"] == old[0]
    assert shown["events"]["newest"]["id"] == shown["events"]["newest_cursor"] == new[-1]
    assert shown["written"] == {"last_minute": 2, "last_hour": 3}
    assert shown["size"]["bytes"] > 0
    assert shown["retention_days"] == 30
    days = {(row["day"], row["event"]): row["count"] for row in shown["days"]}
    assert sum(days.values()) == 5, "an event of 40 days ago is none of this week"
    assert days[(ago(days=3).date().isoformat(), "task.status")] == 2
    text = told()
    assert f"#{old[0]}" in text
    assert "task.updated" in text
    assert [line.split()[-1] for line in text.splitlines() if line.startswith("sum ")] == ["5"]
    log.prune(ago(days=20))
    assert json.loads(told("--json"))["events"]["pruned_through"] == old[0]


@pytest.mark.django_db(transaction=True)
def test_events_stats_does_not_list_what_servers_say_to_each_other() -> None:
    write(1, at=timezone.now())
    for name in SIGNAL_NAMES:
        write(2, name=name, at=timezone.now())
    assert [(row["event"], row["count"]) for row in json.loads(told("--json"))["days"]] == [
        ("task.status", 1)
    ]
    assert "signal." not in told()


@pytest.mark.django_db(transaction=True)
def test_events_stats_says_so_when_it_did_not_look_at_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    write(*range(5), at=timezone.now())
    monkeypatch.setattr(events_stats, "SCAN_LIMIT", 3)
    shown = json.loads(told("--json"))
    assert (shown["events"]["count"], shown["events"]["cut_off"]) == (3, True)
    assert sum(row["count"] for row in shown["days"]) == 3
    assert "more than 3" in told()


@pytest.mark.django_db
def test_events_stats_says_in_words_why_a_server_cannot_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CommandError, match="does not answer"):
        told("--url", "http://127.0.0.1:9")
    with pytest.raises(CommandError, match="does not answer"):
        told("--url", "no address")

    def answering(status: int, text: str) -> Any:
        return lambda *_, **__: SimpleNamespace(status_code=status, text=text)

    monkeypatch.setattr(events_stats.httpx, "get", answering(403, ""))
    with pytest.raises(CommandError, match="METRICS_TOKEN"):
        told("--url", "http://127.0.0.1:9")
    monkeypatch.setattr(events_stats.httpx, "get", answering(200, "<html> is this\n"))
    with pytest.raises(CommandError, match="format"):
        told("--url", "http://127.0.0.1:9")
    monkeypatch.setattr(events_stats.httpx, "get", answering(200, 'a 1\nb{x="y"} 2.5\nc +Inf\n'))
    assert json.loads(told("--url", "http://127.0.0.1:9", "--json"))["live"] == {"a": 1, 'b{x="y"}': 2.5}
