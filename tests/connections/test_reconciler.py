"""What time does, sweep by sweep; and that one broken row, sweep or reconciler more makes no difference."""

from __future__ import annotations

import datetime as dt
import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from django.conf import settings
from django.contrib.auth.models import User
from django.db import DatabaseError
from django.db import connections as databases

from connections import reconciler, tasks, transitions
from connections.models import IdempotentAnswer, LoginFlow, Task
from connections.states import FlowStatus, FlowStep, TaskStatus
from events.models import Event
from tests.connections.flow_support import T0, Story, after, cursor, events
from tests.connections.task_support import held

LATE = after(settings.FLOW_SECONDS)


def urgent(now: dt.datetime) -> dict[str, int]:
    return reconciler.run(reconciler.URGENT, now=now)


def test_C25_flows_and_questions_expire_without_anybody_looking(owner: User) -> None:
    asked = Story.of(owner).bring_to(FlowStep.AWAITING_INPUT)
    busy = Story.of(owner, domain="busy.example").bring_to(FlowStep.SUBMITTING)
    assert reconciler.expire_flows(after(settings.INPUT_SECONDS)) == 1
    assert (asked.flow().status, busy.flow().status) == (FlowStatus.EXPIRED, FlowStatus.IN_PROGRESS)
    assert reconciler.expire_flows(LATE) == 1
    assert busy.flow().status == FlowStatus.EXPIRED


def test_C24_nothing_due_is_nothing_done_and_nothing_told(owner: User) -> None:
    Story.of(owner).bring_to(FlowStep.AWAITING_INPUT)
    mark = cursor()
    assert set(urgent(after(1)).values()) == {0}
    assert cursor() == mark


def test_tasks_of_a_dead_worker_go_back_to_the_queue(owner: User) -> None:
    story = Story.of(owner).bring_to(FlowStep.AWAITING_INPUT)
    done = urgent(after(settings.LEASE_SECONDS))
    assert {name: count for name, count in done.items() if count} == {"rescue_tasks": 1}
    assert (story.task().status, story.flow().step) == (TaskStatus.QUEUED, FlowStep.DISCOVERING)


def test_a_health_check_of_a_dead_worker_is_tried_again_and_given_up_in_the_end(owner: User) -> None:
    story = Story.of(owner)
    task = transitions.request_check(connection_id=story.id, actor=story.actor, now=T0)
    for attempt in range(settings.TASK_ATTEMPTS):
        task.refresh_from_db()
        assert (task.status, task.attempts) == (TaskStatus.QUEUED, attempt)
        story.claim()
        story.now += dt.timedelta(seconds=settings.LEASE_SECONDS)
        assert urgent(story.now)["rescue_tasks"] == 1
    task.refresh_from_db()
    assert (task.status, task.error) == (TaskStatus.FAILED, "The worker stopped.")


def test_C26_one_broken_row_does_not_stop_the_pass(
    owner: User, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stories = [Story.of(owner, domain=f"{n}.example").bring_to(FlowStep.SUBMITTING) for n in range(3)]
    verb = transitions.expire_if_due

    def fragile(*, connection_id: str, now: dt.datetime) -> bool:
        if connection_id == stories[1].id:
            raise ValueError("broken row")
        return verb(connection_id=connection_id, now=now)

    monkeypatch.setattr(transitions, "expire_if_due", fragile)
    with caplog.at_level(logging.ERROR, logger="connections.reconciler"):
        assert urgent(LATE)["expire_flows"] == 2
    assert stories[1].id in caplog.text
    monkeypatch.undo()
    assert urgent(LATE)["expire_flows"] == 1, "the next tick is the retry"


def test_C26_one_broken_sweep_does_not_stop_the_others(caplog: pytest.LogCaptureFixture) -> None:
    def broken(now: dt.datetime) -> int:
        raise DatabaseError("locked")

    def fine(now: dt.datetime) -> int:
        return 3

    assert reconciler.run((broken, fine), now=T0) == {"broken": -1, "fine": 3}
    assert "the sweep broken broke" in caplog.text


def test_C26_a_pass_is_bounded(owner: User, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconciler, "LIMIT", 2)
    for n in range(3):
        Story.of(owner, domain=f"{n}.example").bring_to(FlowStep.SUBMITTING)
    assert [urgent(LATE)["expire_flows"] for _ in range(3)] == [2, 1, 0]


@pytest.mark.django_db(transaction=True)
def test_C20_C27_several_reconcilers_and_readers_at_once_tell_each_expiry_once(owner: User) -> None:
    stories = [Story.of(owner, domain=f"{n}.example").bring_to(FlowStep.AWAITING_INPUT) for n in range(4)]
    mark, barrier = cursor(), threading.Barrier(4)

    def look(n: int) -> None:
        barrier.wait(10)
        try:
            if n % 2:
                urgent(LATE)
            else:
                for story in stories:
                    transitions.expire_if_due(connection_id=story.id, now=LATE)
        finally:
            databases.close_all()

    with ThreadPoolExecutor(4) as pool:
        for job in [pool.submit(look, n) for n in range(4)]:
            job.result()
    ended = [event.object_id for event in events(mark) if event.name == "flow.state"]
    assert sorted(ended) == sorted(LoginFlow.objects.values_list("pk", flat=True))
    assert {event.at for event in events(mark)} == {after(settings.INPUT_SECONDS)}


def test_old_events_and_old_idempotent_answers_go(owner: User) -> None:
    story = Story.of(owner).bring_to(FlowStatus.CANCELED)
    count = Event.objects.count()
    for age in (1, 25):
        IdempotentAnswer.objects.create(
            scope="key:1", key=f"k{age}", fingerprint="f", created_at=T0 - dt.timedelta(hours=age)
        )
    days = dt.timedelta(days=settings.EVENT_RETENTION_DAYS, seconds=1)
    assert reconciler.prune_idempotent_answers(T0) == 1
    assert IdempotentAnswer.objects.get().key == "k1"
    assert reconciler.prune_log(story.now) == 0
    # The newest event stays: its id tells a cursor of the future from one of the past.
    assert reconciler.prune_log(T0 + days) == count - 1


def test_tasks_that_ended_long_ago_are_deleted_and_told_and_those_that_run_are_not(
    owner: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, open_one = held(owner), held(owner)
    tasks.settle(hold=old, now=T0)
    late = T0 + dt.timedelta(days=settings.TASK_RETENTION_DAYS)
    mark = cursor()
    assert reconciler.delete_old_tasks(late) == 0
    with monkeypatch.context() as forever:
        forever.setattr(settings, "TASK_RETENTION_DAYS", 0)
        assert reconciler.delete_old_tasks(late + dt.timedelta(days=9999)) == 0
    assert reconciler.delete_old_tasks(late + dt.timedelta(seconds=1)) == 1
    assert [row.pk for row in Task.objects.all()] == [open_one.task_id]
    assert [(event.name, event.object_id, event.actor) for event in events(mark)] == [
        ("task.deleted", old.task_id, "retention")
    ]


def test_a_second_pass_finds_nothing(owner: User) -> None:
    Story.of(owner).bring_to(FlowStep.AWAITING_INPUT)
    urgent(LATE)
    counts: dict[str, Any] = urgent(LATE)
    assert not any(counts.values())
