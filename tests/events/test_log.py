"""The log: append only with the change, in order, pruned from the front."""

from __future__ import annotations

import datetime as dt

import pytest
from django.db import connection, transaction
from django.test.utils import CaptureQueriesContext

from events import log, waker
from events.models import Event
from tests.events.writing import NOW, change, write

DAY = dt.timedelta(days=1)


@pytest.mark.django_db(transaction=True)
def test_C35_an_event_outside_of_a_transaction_is_refused() -> None:
    with pytest.raises(RuntimeError, match="transaction"):
        log.append(change())
    assert not Event.objects.exists()


@pytest.mark.django_db
def test_a_name_outside_of_the_catalogue_is_refused() -> None:
    with pytest.raises(ValueError, match="catalogue"):
        log.append(change(name="task.invented"))
    assert not Event.objects.exists()


@pytest.mark.django_db(transaction=True)
def test_C35_a_rolled_back_change_leaves_nothing_and_wakes_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    woken: list[bool] = []
    monkeypatch.setattr(waker, "wake", lambda: woken.append(True))

    def course() -> None:
        with transaction.atomic():
            log.append(change())
            raise LookupError

    with pytest.raises(LookupError):
        course()
    assert (Event.objects.count(), log.newest(), woken) == (0, 0, [])
    write(1)
    assert (Event.objects.count(), woken) == (1, [True])


@pytest.mark.django_db(transaction=True)
def test_C09_a_wake_up_that_fails_does_not_undo_the_change(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> None:
        raise ConnectionError("the layer is gone")

    monkeypatch.setattr(waker, "wake", broken)
    (written,) = write(1)
    assert log.newest() == written
    assert "the layer is gone" in caplog.text


@pytest.mark.django_db
def test_C44_reading_is_by_cursor_ascending_bounded_and_up_to_a_mark() -> None:
    ids = write(*range(6))
    assert [row.id for row in log.read(0)] == ids
    assert [row.id for row in log.read(ids[1], 2)] == ids[2:4]
    assert [row.id for row in log.read(ids[1], upto=ids[3])] == ids[2:4]
    assert log.read(ids[-1]) == []
    assert log.newest() == ids[-1]


@pytest.mark.django_db
def test_an_empty_log_begins_at_zero() -> None:
    assert (log.newest(), log.oldest_cursor(), log.read(0)) == (0, 0, [])


@pytest.mark.django_db
def test_pruning_takes_a_prefix_and_remembers_where_it_ended() -> None:
    old = write(1, 2, 3, at=NOW - 3 * DAY)
    young = write(4, at=NOW)
    # Late in the log, but of an earlier time: it waits until everything before it has gone.
    late = write(5, at=NOW - 3 * DAY)
    newest = write(6, at=NOW)
    assert log.prune(NOW - DAY, limit=2) == 2
    assert log.oldest_cursor() == old[1]
    assert log.prune(NOW - DAY) == 1
    assert log.oldest_cursor() == old[2]
    assert log.prune(NOW - DAY) == 0
    assert [row.id for row in log.read(log.oldest_cursor())] == young + late + newest


@pytest.mark.django_db
def test_pruning_leaves_the_newest_event_so_that_cursors_never_run_backwards() -> None:
    ids = write(1, 2, at=NOW - 3 * DAY)
    assert log.prune(NOW) == 1
    assert log.newest() == ids[1]
    assert write(3)[0] > ids[1]


@pytest.mark.django_db
def test_pruning_all_goes_on_in_batches_until_nothing_old_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "PRUNE_BATCH", 2)
    batches = count_batches(monkeypatch)
    write(*range(5), at=NOW - 3 * DAY)
    young = write(5, 6, at=NOW)
    assert log.prune_all(NOW - DAY) == 5
    assert batches == [2, 2, 1]
    assert [row.id for row in log.read(0)] == young
    assert log.prune_all(NOW - DAY) == 0
    assert not log.vacuum(), "nothing to do on SQLite, and never inside of a transaction"


@pytest.mark.django_db
def test_pruning_all_stops_when_its_time_is_over_and_the_next_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(log, "PRUNE_BATCH", 2)
    batches = count_batches(monkeypatch)
    write(*range(6), at=NOW - 3 * DAY)
    write(6, at=NOW)
    assert [log.prune_all(NOW - DAY, seconds=0) for _ in range(4)] == [2, 2, 2, 0]
    assert batches == [2, 2, 2, 0]


def count_batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What each transaction of :func:`log.prune_all` takes away."""
    batches: list[int] = []
    prune = log.prune

    def counted(before: dt.datetime, limit: int) -> int:
        batches.append(prune(before, limit))
        return batches[-1]

    monkeypatch.setattr(log, "prune", counted)
    return batches


@pytest.mark.django_db
def test_pruning_begins_at_the_mark_and_not_at_the_beginning() -> None:
    """What was deleted is still in PostgreSQL's index until a vacuum; nobody walks over it again and again."""
    ids = write(*range(4), at=NOW - 3 * DAY)
    assert log.prune(NOW - DAY, 2) == 2
    with CaptureQueriesContext(connection) as captured:
        assert log.prune(NOW - DAY, 1) == 1
    (looked,) = [each["sql"] for each in captured if '"events_event"."at"' in each["sql"]]
    assert f'"id" > {ids[1]} ' in looked


@pytest.mark.django_db
def test_C12_envelopes_are_read_in_amounts_that_fit_in_memory() -> None:
    ids = write(*range(45), data={"fill": "x" * 100_000})
    seen: list[int] = []
    over = False
    while not over:
        found, over = log.read_envelopes(seen[-1] if seen else 0, 100)
        assert 0 < len(found) <= 8
        seen += [each.id for each in found]
    assert seen == ids
    some, over = log.read_envelopes(ids[19], 3)
    assert ([each.id for each in some], over) == (ids[20:23], False)
    rest, over = log.read_envelopes(ids[41], 100)
    assert ([each.id for each in rest], over) == (ids[42:], True)
    upto, over = log.read_envelopes(ids[9], 100, upto=ids[12])
    assert ([each.id for each in upto], over) == (ids[10:13], True)
    assert log.read_envelopes(ids[-1], 100) == ([], True)


@pytest.mark.django_db
def test_small_envelopes_are_read_in_few_looks() -> None:
    ids = write(*range(300))
    with CaptureQueriesContext(connection) as captured:
        found, _ = log.read_envelopes(0, 300)
    assert [each.id for each in found] == ids
    assert len(captured) <= 3


@pytest.mark.django_db
def test_the_tail_of_the_log_is_its_newest_events_and_the_cursor_before_them() -> None:
    assert log.tail(10, 1 << 20) == ([], 0)
    ids = write(*range(12))
    found, cursor = log.tail(5, 1 << 20)
    assert [each.id for each in found] == ids[-5:]
    assert [row.id for row in log.read(cursor)] == ids[-5:]
    found, cursor = log.tail(100, 1 << 20)
    assert ([each.id for each in found], cursor) == (ids, 0)
    found, cursor = log.tail(100, len(found[-1].frame))
    assert [each.id for each in found] == [row.id for row in log.read(cursor)]
    assert len(found) < len(ids)


@pytest.mark.django_db
def test_an_envelope_carries_its_bytes() -> None:
    (written,) = write(7)
    ((each,), _) = log.read_envelopes(0, 10)
    assert each.frame == f'id: {written}\nevent: task.status\ndata: {{"id":"t7","version":7}}\n\n'.encode()
    assert (each.topic, each.audience, each.data) == ("task:t7", 1, {"id": "t7", "version": 7})
