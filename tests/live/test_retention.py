"""Retention with real databases: what was pruned is told, what is left is read, and the table does not grow."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Iterator

import psycopg
import pytest

from tests.conftest import Running, run_switchboard, until
from tests.live import services
from tests.live.streaming import events, write_elsewhere

pytestmark = pytest.mark.live

ROUNDS = 4
#: More than what makes ``prune_events`` vacuum by itself.
ROWS = 6_000


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[services.PostgreSQL]:
    with services.postgresql(tmp_path_factory.mktemp("retention-pg")) as started:
        yield started


@pytest.fixture(scope="module")
def installed(database: services.PostgreSQL, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with run_switchboard(tmp_path_factory.mktemp("retention"), DATABASE_URL=database.url) as started:
        yield started


def prune(running: Running, before: dt.datetime | None = None) -> int:
    """``manage.py prune_events``; how many went."""
    moment = before or dt.datetime.now(dt.UTC) + dt.timedelta(seconds=1)
    return int(json.loads(running.manage("prune_events", "--before", moment.isoformat(), "--json"))["pruned"])


def test_C44_a_cursor_from_before_the_retention_is_reset_and_the_stream_goes_on(installed: Running) -> None:
    running = installed
    with events(running) as stream:
        start = stream.named("ready").json()["cursor"]
        write_elsewhere(running, 6, topic="old")
        until(lambda: len(stream.logged()) == 6, 10)
        ids = [int(event.id) for event in stream.logged()]
    assert prune(running) >= 5
    # A server that saw them itself may still have them at hand, and need not refuse what it can continue.
    running.stop("server")
    running.start("server")
    running.wait_until_up()
    # The newest one stays: before it, nothing can be continued; after it, everything can.
    with (
        events(running, f"?after={start}") as by_parameter,
        events(running, Last_Event_ID=str(ids[3])) as by_header,
        events(running, f"?after={ids[4]}") as at_the_edge,
    ):
        for told in (by_parameter, by_header):
            reset = told.named("reset").json()
            assert reset["reason"] == "retention"
            assert told.named("ready").json()["cursor"] == reset["cursor"] == ids[-1]
            assert told.names() == ["reset", "ready"], "nothing of what is no longer whole"
        at_the_edge.named("ready")
        assert [int(event.id) for event in at_the_edge.logged()] == ids[-1:]
        write_elsewhere(running, 3, topic="new")
        for each in (by_parameter, by_header, at_the_edge):
            until(
                lambda each=each: len(each.of("task.updated")) >= 3 and each.logged()[-1].json()["n"] == 2, 10
            )
            assert [event.json()["n"] for event in each.logged()[-3:]] == [0, 1, 2]
            assert len(each.of("reset")) == (each is not at_the_edge)
        new = [int(event.id) for event in at_the_edge.logged()][-3:]
    # A page that comes back with the cursor of its reset is in the clear.
    with events(running, f"?after={reset['cursor']}") as back:
        back.named("ready")
        assert [int(event.id) for event in back.logged()] == new
        assert back.of("reset") == []


def test_nobody_has_to_call_the_command_for_every_worker_prunes(installed: Running) -> None:
    write_elsewhere(installed, 3, topic="aged")
    installed.shell(
        "import datetime as dt; from django.conf import settings; from django.db.models import F; from events.models import Event; "
        "Event.objects.update(at=F('at') - dt.timedelta(days=settings.EVENT_RETENTION_DAYS + 1))",
    )  # fmt: skip
    done = json.loads(installed.manage("run_reconciler", "--once", "--json"))
    assert done["prune_log"] >= 2
    assert len(installed.manage("follow", "--after", "0", "--json", "--count", "1").splitlines()) == 1


FILL = """
INSERT INTO events_event (name, topic, audience, object_id, version, at, actor, data)
SELECT 'task.updated', 'task:t' || n % 500, 1, 't' || n % 500, n, now(), 'test', jsonb_build_object('id', 't' || n, 'fill', repeat('x', 300))
FROM generate_series(1, {rows}) AS n
"""


def test_what_is_pruned_on_postgresql_makes_room_for_what_comes(
    installed: Running, database: services.PostgreSQL
) -> None:
    sizes = []
    with psycopg.connect(database.url, autocommit=True) as connection:
        ((options,),) = connection.execute(
            "SELECT reloptions FROM pg_class WHERE relname = 'events_event'"
        ).fetchall()
        assert {"autovacuum_vacuum_scale_factor=0", "vacuum_truncate=off"} <= set(options)
        for _ in range(ROUNDS):
            connection.execute(FILL.format(rows=ROWS))
            assert prune(installed) >= ROWS - 1
            ((size,),) = connection.execute("SELECT pg_total_relation_size('events_event')").fetchall()
            sizes.append(size)
        ((left,),) = connection.execute("SELECT count(*) FROM events_event").fetchall()
    assert left == 1
    # The first round makes the table; index pages that became empty may be used again one vacuum later.
    assert sizes[-1] <= sizes[1] * 1.05, sizes
    assert sizes[-1] <= sizes[0] * 1.5, sizes


def test_pruning_takes_no_lock_that_a_writer_or_a_reader_waits_for(
    installed: Running, database: services.PostgreSQL
) -> None:
    """One writer has told and not ended, one reader looks on with an old picture: the prune is done before either ends."""
    with psycopg.connect(database.url) as writer, psycopg.connect(database.url) as reader:
        writer.execute(FILL.format(rows=ROWS))
        writer.commit()
        writer.execute("SELECT pg_advisory_xact_lock(%s)", [0x5B_10_60])
        writer.execute(FILL.format(rows=1))
        reader.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        count = "SELECT count(*) FROM events_event"
        ((before,),) = reader.execute(count).fetchall()
        # Both connections stay in their transactions over this: were it to wait for one, it would not come back.
        assert prune(installed) >= ROWS - 1
        assert reader.execute(count).fetchall() == [(before,)]
        writer.commit()
        reader.commit()
        ((after,),) = reader.execute(count).fetchall()
        assert after == 2, "the newest committed one, and the one that was being written"
