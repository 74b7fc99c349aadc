"""The log: append only with the change, in order, pruned from the front."""

from __future__ import annotations

import datetime as dt

import pytest
from django.db import transaction

from events import log
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
    monkeypatch.setattr(log, "_wake", lambda: woken.append(True))

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

    monkeypatch.setattr(log, "_wake", broken)
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
def test_C12_envelopes_are_read_in_amounts_that_fit_in_memory() -> None:
    ids = write(*range(45), data={"fill": "x" * 100_000})
    first = log.read_envelopes(0, 100)
    assert [each.id for each in first] == ids[:5]
    assert [each.id for each in log.read_envelopes(ids[19], 3)] == ids[20:23]
    assert [each.id for each in log.read_envelopes(ids[41], 100)] == ids[42:]
    assert [each.id for each in log.read_envelopes(ids[9], 100, upto=ids[12])] == ids[10:13]
    assert log.read_envelopes(ids[-1]) == []


@pytest.mark.django_db
def test_an_envelope_carries_its_bytes() -> None:
    (written,) = write(7)
    (each,) = log.read_envelopes(0)
    assert each.frame == f'id: {written}\nevent: task.status\ndata: {{"id":"t7","version":7}}\n\n'.encode()
    assert (each.topic, each.audience, each.data) == ("task:t7", 1, {"id": "t7", "version": 7})
