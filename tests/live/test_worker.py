"""Workers as real processes: killed, stopped, several at once. A login survives all of it, and nothing is sent twice."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Running, run_switchboard, until
from tests.live.switchboard import Program, program
from tests.sites import PASSWORD, USERNAME, Site

pytestmark = pytest.mark.live
GIVEN = {"username": USERNAME, "password": PASSWORD}


@pytest.fixture
def client(own_running: Running) -> Iterator[Program]:
    with program(own_running) as made:
        yield made


def task_of(client: Program, connection_id: str) -> tuple[str, int]:
    return client.rows(
        "SELECT status, attempts FROM connections_task WHERE connection_id = ? ORDER BY created_at DESC",
        connection_id,
    )[0]


def test_a_worker_killed_while_somebody_is_asked_is_replaced_by_another_that_asks_anew(
    client: Program, own_running: Running
) -> None:
    with Site(scenario="simple") as site:
        connection = client.connect(site.domain, "killed while asking")
        client.login(connection)
        asked = client.wait(connection, step="AWAITING_INPUT")["interaction_id"]
        own_running.stop("worker", signal.SIGKILL)
        own_running.start("worker2")
        # The lease is 3 s; the reconciler of the new worker looks once a second.
        fresh = client.wait(connection, step="AWAITING_INPUT", other_than=asked, seconds=20)
        stale = client.http.post(
            f"/auth/connections/{connection}/submit",
            json={"interaction_id": asked, "field_values": {field["id"]: "x" for field in fresh["fields"]}},
        )
        assert (stale.status_code, stale.json()["code"]) == (400, "stale_interaction")
        steps = client.rows(
            "SELECT json_extract(data, '$.flow_step') FROM events_event WHERE name = 'flow.state' ORDER BY id"
        )
        assert [step for (step,) in steps] == [
            "DISCOVERING",
            "AWAITING_INPUT",
            "DISCOVERING",
            "AWAITING_INPUT",
        ]
        client.submit(connection, GIVEN)
        client.wait(connection, status="SUCCESS")
        assert task_of(client, connection) == ("completed", 2)


def test_a_worker_killed_while_it_submits_never_sends_what_was_typed_again(
    client: Program, own_running: Running
) -> None:
    with Site(scenario="slow", slow_seconds=2) as site:
        connection = client.connect(site.domain, "killed while submitting")
        client.login(connection)
        asked = client.wait(connection, step="AWAITING_INPUT")["interaction_id"]
        client.submit(connection, GIVEN)
        until(lambda: site.seen("POST", "/slow/login"), 20, "the worker did not send the form")
        own_running.stop("worker", signal.SIGKILL)
        own_running.start("worker2")
        client.wait(connection, step="AWAITING_INPUT", other_than=asked, seconds=30)
        assert len(site.seen("POST", "/slow/login")) == 1
        kept = client.rows("SELECT count(*) FROM connections_submission WHERE sealed IS NOT NULL")
        assert kept == [(0,)]
        client.submit(connection, GIVEN)
        client.wait(connection, status="SUCCESS")
        assert len(site.seen("POST", "/slow/login")) == 2


def test_after_too_many_deaths_the_login_fails_and_says_so(tmp_path_factory: pytest.TempPathFactory) -> None:
    data_dir = tmp_path_factory.mktemp("worn out")
    with (
        run_switchboard(data_dir, LEASE_SECONDS="3", TASK_ATTEMPTS="2") as running,
        Site(scenario="simple") as site,
        program(running) as client,
    ):
        connection = client.connect(site.domain, "worn out")
        client.login(connection)
        asked = client.wait(connection, step="AWAITING_INPUT")["interaction_id"]
        running.stop("worker", signal.SIGKILL)
        running.start("worker2")
        client.wait(connection, step="AWAITING_INPUT", other_than=asked, seconds=20)
        running.stop("worker2", signal.SIGKILL)
        running.start("worker3")
        failed = client.wait(connection, status="FAILED", seconds=20)
        assert failed["error_code"] == "internal_error"
        assert task_of(client, connection) == ("failed", 2)


def test_a_worker_told_to_stop_stops_in_order_and_another_takes_over(
    client: Program, own_running: Running
) -> None:
    with Site(scenario="simple") as site:
        connection = client.connect(site.domain, "stopped")
        client.login(connection)
        asked = client.wait(connection, step="AWAITING_INPUT")["interaction_id"]
        assert own_running.stop("worker") == 0
        assert task_of(client, connection) == ("queued", 0)
        assert client.state(connection)["flow_step"] == "DISCOVERING"
        assert "Traceback" not in own_running.log("worker")
        own_running.start("worker2")
        client.wait(connection, step="AWAITING_INPUT", other_than=asked)
        client.submit(connection, GIVEN)
        client.wait(connection, status="SUCCESS")


def test_a_login_that_is_canceled_leaves_nothing_behind_in_the_worker(
    client: Program, own_running: Running
) -> None:
    with Site(scenario="slow", slow_seconds=1) as site:
        connection = client.connect(site.domain, "canceled")
        client.login(connection)
        client.wait(connection, step="AWAITING_INPUT")
        client.submit(connection, GIVEN)
        client.post(f"/auth/connections/{connection}/cancel")
        assert client.state(connection)["flow_status"] == "CANCELED"
        assert own_running.stop("worker") == 0
        assert "ERROR" not in own_running.log("worker")
        assert task_of(client, connection) == ("killed", 1)


def test_C27_two_workers_never_do_one_task_twice(tmp_path: Path) -> None:
    # With the lease of every day: one of 3 s that a busy machine lets run out is taken over, and rightly so.
    with run_switchboard(tmp_path) as running, Site(scenario="simple") as site, program(running) as client:
        running.start("worker2")
        connections = [client.connect(site.domain, f"many {number}") for number in range(20)]
        for connection in connections:
            client.login(connection)
        for connection in connections:
            client.wait(connection, step="AWAITING_INPUT")
            client.submit(connection, GIVEN)
        for connection in connections:
            client.wait(connection, status="SUCCESS")
        assert len(site.seen("POST", "/simple/login")) == 20
        assert client.rows("SELECT DISTINCT status, attempts FROM connections_task") == [("completed", 1)]
        claims = client.rows(
            "SELECT object_id, count(*) FROM events_event WHERE name = 'task.status' "
            "AND json_extract(data, '$.previous_status') = 'queued' GROUP BY object_id"
        )
        assert [count for _, count in claims] == [1] * 20
