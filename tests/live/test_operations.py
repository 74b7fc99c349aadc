"""Readiness, metrics and logs of a real server process."""

from __future__ import annotations

import contextlib
import http.client
import json
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import Running, run_switchboard, until
from tests.live import services
from tests.live.streaming import (
    DRAINS_LONGER,
    Stream,
    connect,
    events,
    login,
    many,
    opened_and_stalled,
    start_patched,
    write_elsewhere,
)

pytestmark = pytest.mark.live

TOKEN = "a-token-of-these-tests"


def ask(
    running: Running, path: str, method: str = "GET", **headers: str
) -> tuple[int, bytes, dict[str, str]]:
    parts = urlsplit(running.url)
    client = http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=20)
    with contextlib.closing(client):
        client.request(
            method, path, headers={name.replace("_", "-"): value for name, value in headers.items()}
        )
        answer = client.getresponse()
        found = {name.lower(): value for name, value in answer.getheaders()}
        return answer.status, answer.read(), found


def readiness(running: Running) -> tuple[int, Any]:
    status, body, _ = ask(running, "/readyz")
    return status, json.loads(body)


def numbers(running: Running, **headers: str) -> dict[str, float]:
    """By name, with the values of the labels behind it."""
    status, body, _ = ask(running, "/metrics", **headers)
    assert status == 200, body
    return {
        " ".join([sample.name, *sample.labels.values()]): sample.value
        for family in text_string_to_metric_families(body.decode())
        for sample in family.samples
    }


def test_C08_a_draining_server_is_alive_and_not_ready(own_running: Running) -> None:
    running = own_running
    assert running.stop("server") == 0
    start_patched(running, DRAINS_LONGER)
    with opened_and_stalled(running, "?topics=task:flood"), events(running, "?topics=tasks") as stream:
        stream.named("ready")
        assert readiness(running)[0] == 200
        write_elsewhere(running, 60, topic="flood", size=100_000)
        until(lambda: len(stream.logged()) == 60, 20)
        process = running.processes["server"]
        process.terminate()
        stream.named("end")
        # The reader that does not read holds the server for its last seconds.
        status, body, headers = ask(running, "/readyz")
        assert status == 503
        assert json.loads(body)["ready"] is False
        assert json.loads(body)["checks"]["draining"] is True
        assert int(headers["retry-after"]) > 0
        assert ask(running, "/healthz")[0] == 200
        assert numbers(running)["switchboard_draining"] == 1
        assert process.wait(15) == 0
    running.processes.pop("server")


def test_streams_are_seen_while_they_are_open_and_the_hub_has_no_lag(own_running: Running) -> None:
    """Of its own: the shared installation has other tests' streams."""
    running = own_running
    before = numbers(running)
    assert (before["switchboard_streams_open"], before["switchboard_hub_running"]) == (0, 0)
    with many(3, lambda: events(running)) as held, events(running, key=running.other_api_key) as other:
        for stream in [*held, other]:
            stream.named("ready")
        created = connect(running)
        for stream in held:
            stream.until(lambda event: event.json().get("id") == created["id"])
        during = numbers(running)
        by_principal = [
            value for name, value in during.items() if name.startswith("switchboard_principal_streams key:")
        ]
        assert sorted(by_principal) == [1, 3]
        assert during["switchboard_streams_open"] == 4
        assert during["switchboard_hub_running"] == 1
        assert during["switchboard_hub_position"] == during["switchboard_log_newest"] > 0
        assert (during["switchboard_hub_lag_events"], during["switchboard_hub_lag_seconds"]) == (0, 0)
        assert during["switchboard_events_delivered_total"] >= 3
        # No Redis here: what another process wrote is found by looking, and that is counted.
        missed = during["switchboard_wakes_missed_total"]
        write_elsewhere(running, 1, topic="elsewhere")
        held[0].until(lambda event: event.json().get("id") == "elsewhere")
        until(lambda: numbers(running)["switchboard_wakes_missed_total"] > missed, 10)
        during = until(
            lambda: found if not (found := numbers(running))["switchboard_hub_lag_events"] else None, 10
        )
        assert readiness(running)[1]["checks"]["hub"] == {"ok": True, "running": True, "behind": 0}
        shown = json.loads(running.manage("events_stats", "--json", "--url", running.url))
        assert shown["live"]["switchboard_streams_open"] == 4
        assert shown["events"]["newest_cursor"] == during["switchboard_log_newest"]
        assert "switchboard_streams_open" in running.manage("events_stats", "--url", running.url)
    after = until(lambda: found if (found := numbers(running))["switchboard_streams_open"] == 0 else None, 10)
    assert not any(name.startswith("switchboard_principal_streams key:") for name in after)
    assert after["switchboard_streams_opened_total"] == 4
    assert sum(value for name, value in after.items() if "streams_ended_total" in name) == 4
    assert after["switchboard_hub_running"] == 0
    assert after["switchboard_streams_ended_total gone"] == 4
    for name in (
        "switchboard_events_skipped_total",
        "switchboard_events_out_of_order_total",
        "switchboard_stream_fallbacks_total",
    ):
        assert after[name] == 0


def test_metrics_are_for_this_machine_unless_there_is_a_token(running: Running, tmp_path: Path) -> None:
    status, body, headers = ask(running, "/metrics", X_Forwarded_For="127.0.0.1")
    assert status == 403
    assert set(json.loads(body)) == {"code", "message"}
    assert headers["content-type"] == "application/json"
    assert ask(running, "/metrics", Host="rebound.example")[0] == 403
    assert ask(running, "/metrics", "POST")[0] == 405
    status, body, headers = ask(running, "/metrics", "HEAD")
    assert (status, body) == (200, b"")
    assert headers["content-type"].startswith("text/plain; version=")
    with run_switchboard(tmp_path, METRICS_TOKEN=TOKEN) as guarded:
        assert ask(guarded, "/metrics")[0] == 401
        assert ask(guarded, "/metrics", Authorization=f"Bearer {TOKEN}?")[0] == 401
        seen = numbers(guarded, Authorization=f"Bearer {TOKEN}", X_Forwarded_For="192.0.2.7")
        assert seen["switchboard_database_up"] == 1
        live = json.loads(guarded.manage("events_stats", "--json", "--url", guarded.url))["live"]
        assert live["switchboard_database_up"] == 1
        guarded.env = {name: value for name, value in guarded.env.items() if name != "METRICS_TOKEN"}
        assert "Traceback" not in guarded.manage("events_stats", "--url", guarded.url, check=False)
        assert TOKEN not in guarded.log("server")


def test_A48_no_secret_is_in_the_metrics_or_in_json_lines_and_every_line_of_a_request_has_its_id(
    tmp_path: Path,
) -> None:
    with run_switchboard(tmp_path, LOG_FORMAT="json", LOG_LEVEL="DEBUG") as running:
        connection = connect(running)
        code = login(running, connection)["handoff_code"]
        page = f"/login/{connection['id']}?code={code}"
        status, _, headers = ask(running, page, X_Request_ID="page-1")
        assert status in (200, 302, 303)
        assert headers["x-request-id"] == "page-1"
        assert ask(running, "/nowhere/unmistakable-path?q=unmistakable-query")[0] == 404
        with Stream(
            f"{running.url}/api/events", key=running.api_key, headers={"X-Request-ID": "stream-1"}
        ) as stream:
            stream.named("ready")
            assert dict(stream.answer.getheaders())["X-Request-Id"] == "stream-1"
            _, shown, _ = ask(running, "/metrics")

        def lines() -> list[dict[str, Any]]:
            text = running.log("server").split("\n", 1)[1]
            return [json.loads(line) for line in text.splitlines()]

        def access(name: str) -> dict[str, Any] | None:
            found = [
                line
                for line in lines()
                if line["logger"] == "switchboard.access" and line.get("request_id") == name
            ]
            return found[0] if found else None

        of_page = until(lambda: access("page-1"), 10)
        assert (of_page["route"], of_page["method"]) == ("login/<str:connection_id>", "GET")
        of_stream = until(lambda: access("stream-1"), 10)
        assert (of_stream["route"], of_stream["status"], of_stream["caller"]) == ("api/events", 200, "key:1")
        with Stream(
            f"{running.url}/auth/connections/{connection['id']}/events",
            key=running.other_api_key,
            headers={"X-Request-ID": "stream-2"},
        ) as stream:
            assert stream.status == 404
        of_other = until(lambda: access("stream-2"), 10)
        assert (of_other["status"], of_other["caller"]) == (404, None), "nobody until it is let in"
        assert running.log("server").startswith("listening on http://")
        log = running.log("server").encode()
        for secret in (running.api_key, code, running.password):
            assert secret.encode() not in log
            assert secret.encode() not in shown
        for part in (b"unmistakable-path", b"unmistakable-query"):
            assert part not in log


def test_a_redis_that_hangs_makes_it_unready_in_time_and_ready_again(tmp_path: Path) -> None:
    with (
        services.redis(tmp_path) as redis,
        run_switchboard(tmp_path, REDIS_URL=redis.url) as running,
    ):
        status, found = readiness(running)
        assert (status, found["checks"]["layer"]["kind"]) == (200, "redis")
        with events(running) as stream:
            stream.named("ready")
            # Here a wake-up goes the whole way: to Redis, and back to this process's hub.
            until(lambda: readiness(running)[0] == 200, 10, "the hub never heard a wake-up")
            redis.pause()
            try:
                status, found = readiness(running)
                assert status == 503
                assert found["checks"]["layer"]["ok"] is False
                assert found["checks"]["database"]["ok"] is True
                assert ask(running, "/healthz")[0] == 200
            finally:
                redis.resume()
            until(lambda: readiness(running)[0] == 200, 20, "it was not ready again")
            created = connect(running)
            stream.until(lambda event: event.json().get("id") == created["id"])
