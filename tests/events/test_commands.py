"""The commands of the log: following it and pruning it."""

from __future__ import annotations

import datetime as dt
import io
import json
import os
import sys
from typing import Any

import pytest
from django.core.management import call_command
from django.core.management.base import CommandError
from django.db import transaction
from django.utils import timezone

from events import log
from events.envelope import Change, Interest, topic_of
from events.management.commands import follow
from events.models import Event


def happen(number: int, *, kind: str = "task", days_ago: float = 0) -> Event:
    with transaction.atomic():
        return log.append(
            Change(
                name=f"{kind}.status" if kind == "connection" else f"{kind}.created",
                topic=topic_of(kind, f"{kind}_{number}"),
                audience=1,
                object_id=f"{kind}_{number}",
                version=1,
                at=timezone.now() - dt.timedelta(days=days_ago),
                actor="somebody",
                data={"id": f"{kind}_{number}", "status": "queued"},
            )
        )


def run(name: str, *words: str) -> tuple[str, str]:
    out, err = io.StringIO(), io.StringIO()
    call_command(name, *words, stdout=out, stderr=err)
    return out.getvalue(), err.getvalue()


# ── follow ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_follow_shows_what_happened_after_a_cursor_in_the_order_of_the_log(db: Any) -> None:
    events = [happen(number) for number in range(5)]
    out, _ = run("follow", "--after", str(events[1].id), "--count", "3", "--json")
    shown = [json.loads(line) for line in out.splitlines()]
    assert [line["id"] for line in shown] == [event.id for event in events[2:]]
    assert shown[0]["event"] == "task.created"
    assert shown[0]["data"] == {"id": "task_2", "status": "queued"}


def test_follow_begins_now_and_shows_what_happens_then(db: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    happen(1)
    monkeypatch.setattr(follow.time, "sleep", lambda seconds: happen(2))
    out, _ = run("follow", "--count", "1")
    assert "task:task_2" in out
    assert "task:task_1" not in out
    assert "(somebody)" in out


def test_follow_shows_only_the_topics_asked_for(db: Any) -> None:
    for kind in ("task", "connection", "task"):
        happen(1, kind=kind)
    out, _ = run("follow", "--after", "0", "--topics", "connections", "--count", "1")
    assert "connection:connection_1" in out
    with pytest.raises(CommandError, match="Unknown topic"):
        run("follow", "--topics", "bread")


def test_ctrl_c_ends_follow_and_says_where_to_go_on(db: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    last = happen(1)

    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(follow.time, "sleep", interrupt)
    _, err = run("follow")
    assert f"--after {last.id}" in err


def test_follow_refuses_a_cursor_of_the_future_and_says_when_one_was_pruned(db: Any) -> None:
    old, new = happen(1, days_ago=40), happen(2)
    log.prune(timezone.now() - dt.timedelta(days=30))
    out, err = run("follow", "--after", "0", "--count", "1")
    assert f"up to {old.id} were pruned" in err
    assert f"#{new.id}" in out
    with pytest.raises(CommandError, match="no event"):
        run("follow", "--after", str(new.id + 1))


def test_events_that_are_not_wanted_move_the_cursor_on(db: Any) -> None:
    event = happen(1)
    assert follow.next_events(0, Interest(topics=frozenset({"clients"}))) == ([], event.id)


def test_follow_ends_quietly_when_its_reader_has_gone(db: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    happen(1)
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as gone:
        monkeypatch.setattr(sys, "stdout", gone)
        call_command("follow", "--after", "0")
        # What is left in the buffer goes nowhere, instead of raising once more.
        gone.flush()
        monkeypatch.undo()


# ── prune_events ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_pruning_deletes_what_is_old_and_says_how_much(db: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "PRUNE_BATCH", 2)
    for number in range(5):
        happen(number, days_ago=40)
    happen(9)
    out, _ = run("prune_events", "--days", "30")
    assert out.startswith("5 events")
    assert Event.objects.count() == 1


def test_pruning_takes_a_moment_too(db: Any) -> None:
    happen(1, days_ago=2)
    happen(2)
    day = (timezone.now() - dt.timedelta(days=1)).date().isoformat()
    assert json.loads(run("prune_events", "--before", day, "--json")[0])["pruned"] == 1


@pytest.mark.parametrize("text", ["yesterday", "2026-02-31", "2026-13-01"])
def test_a_moment_that_does_not_exist_is_refused(db: Any, text: str) -> None:
    with pytest.raises(CommandError, match="--before"):
        run("prune_events", f"--before={text}")


def test_nothing_old_is_nothing_to_do(db: Any) -> None:
    happen(1)
    assert run("prune_events")[0].startswith("0 events")
