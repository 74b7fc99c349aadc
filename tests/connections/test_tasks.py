"""The queue: order, holds, leases."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from django.conf import settings
from django.contrib.auth.models import User
from django.db import connections as databases
from django.db import transaction

from connections import reconciler, task_inputs, task_picture, tasks, transitions
from connections.access import of_user
from connections.models import Task
from connections.states import TaskKind, TaskStatus
from connections.tasks import LeaseLost
from tests.connections.flow_support import KINDS, T0, Story, after, cursor, events
from tests.connections.task_support import held


def test_the_task_that_waits_longest_is_claimed_first(owner: User) -> None:
    stories = [Story.of(owner, domain=f"{n}.example") for n in range(3)]
    for n, story in enumerate(stories):
        story.now = after(n)
        story.start()
    claimed = [tasks.claim(worker="w", kinds=KINDS, now=after(9)) for _ in range(4)]
    assert [hold and hold.connection_id for hold in claimed] == [*[story.id for story in stories], None]


def test_a_task_of_the_future_or_of_another_kind_is_left_alone(owner: User) -> None:
    story = Story.of(owner)
    story.start()
    assert tasks.claim(worker="w", kinds=[TaskKind.HEALTH_CHECK], now=T0) is None
    assert tasks.claim(worker="w", kinds=KINDS, now=after(-1)) is None


def test_claiming_notes_worker_attempt_lease_and_start(owner: User) -> None:
    story = Story.of(owner)
    story.start()
    hold = story.claim()
    row = story.task()
    assert (row.leased_by, row.attempts) == (hold.worker, hold.attempt) == (hold.worker, 1)
    assert row.lease_expires_at == after(settings.LEASE_SECONDS)
    assert row.started_at == T0
    assert events()[-1].actor == hold.worker


def test_the_first_start_stays_when_the_task_is_taken_again(owner: User) -> None:
    story = Story.of(owner).bring_to(TaskStatus.RUNNING)
    transitions.give_back(hold=story.holding(), now=after(5))
    story.now = after(10)
    story.claim()
    assert story.task().started_at == T0


@pytest.mark.django_db(transaction=True)
def test_C27_many_workers_at_once_never_take_one_task_twice(owner: User) -> None:
    for n in range(6):
        Story.of(owner, domain=f"{n}.example").start()
    barrier = threading.Barrier(4)

    def work(name: str) -> list[str]:
        barrier.wait(10)
        taken = []
        try:
            while (hold := tasks.claim(worker=name, kinds=KINDS, now=T0)) is not None:
                taken.append(hold.task_id)
        finally:
            databases.close_all()
        return taken

    with ThreadPoolExecutor(4) as pool:
        taken = [pk for job in [pool.submit(work, f"w{n}") for n in range(4)] for pk in job.result()]
    assert len(taken) == len(set(taken)) == 6
    assert set(Task.objects.values_list("attempts", flat=True)) == {1}


def _stale(story: Story) -> None:
    story.now = after(settings.LEASE_SECONDS)
    transitions.rescue(task_id=story.holding().task_id, now=story.now)


@pytest.mark.parametrize(
    "loses",
    [
        pytest.param(lambda story: transitions.give_back(hold=story.holding(), now=T0), id="given back"),
        pytest.param(_stale, id="lease ran out"),
        pytest.param(lambda story: story.cancel(), id="canceled"),
    ],
)
def test_a_hold_that_is_no_longer_the_present_one_is_refused(
    loses: Callable[[Story], Any], owner: User
) -> None:
    story = Story.of(owner).bring_to(TaskStatus.WAITING_FOR_INPUT)
    loses(story)
    assert not tasks.renew(hold=story.holding(), now=story.now)
    with transaction.atomic(), pytest.raises(LeaseLost):
        tasks.lock_held(story.holding())


def test_a_worker_that_slept_through_its_lease_may_go_on_until_somebody_took_over(owner: User) -> None:
    story = Story.of(owner).bring_to(TaskStatus.RUNNING)
    assert tasks.renew(hold=story.holding(), now=after(settings.LEASE_SECONDS + 5))


def test_C32_how_a_task_ended_is_in_its_row_and_in_its_event(owner: User) -> None:
    story = Story.of(owner).bring_to(TaskStatus.RUNNING)
    mark = cursor()
    with transaction.atomic():
        row = tasks.lock_held(story.holding())
        tasks.finish(row, TaskStatus.FAILED, actor="w", now=after(3), error="e" * 900, exit_code=7)
    assert (row.exit_code, len(row.error), row.finished_at) == (7, 500, after(3))
    assert (row.leased_by, row.lease_expires_at) == ("", None)
    data = events(mark)[0].data
    assert (data["exit_code"], data["error"], data["previous_status"]) == (7, "e" * 500, "running")
    assert data["finished_at"] == "2026-03-01T12:00:03.000Z"


def test_C23_ends_that_come_together_are_each_told_once_and_what_is_lost_is_left_alone(owner: User) -> None:
    holds = [held(owner) for _ in range(5)]
    good, bad, killed, lost, asked = holds
    transitions.kill_task(task_id=killed.task_id, actor=of_user(owner), reason="enough", now=after(1))
    Task.objects.filter(pk=lost.task_id).update(attempts=2)
    task_inputs.add_input(task_id=asked.task_id, content="y", message_id="m", actor="owner", now=after(1))
    mark = cursor()
    settled = tasks.settle_several(
        [
            tasks.End(hold=good, exit_code=0),
            tasks.End(hold=bad, exit_code=3, error_code="exit_code", error="It ended with exit code 3."),
            tasks.End(hold=killed, exit_code=0),
            tasks.End(hold=lost, exit_code=0),
            tasks.End(hold=asked, exit_code=0),
        ],
        now=after(2),
    )
    assert {row.pk for row in settled} == {hold.task_id for hold in (good, bad, killed, asked)}
    rows = {row.pk: row for row in Task.objects.all()}
    for row in settled:
        stored = rows[row.pk]
        assert (stored.status, stored.version, stored.exit_code) == (row.status, row.version, row.exit_code)
        assert (stored.finished_at, stored.leased_by, stored.inputs_waiting) == (after(2), "", 0)
    assert {hold.task_id: rows[hold.task_id].status for hold in holds} == {
        good.task_id: "completed",
        bad.task_id: "failed",
        killed.task_id: "killed",
        lost.task_id: "running",
        asked.task_id: "completed",
    }
    assert rows[bad.task_id].error == "It ended with exit code 3."
    told = [(event.object_id, event.data["status"]) for event in events(mark) if event.name == "task.status"]
    assert sorted(told) == sorted((row.pk, row.status) for row in settled)
    assert not rows[asked.task_id].inputs.exclude(sealed=None).exists()


@pytest.mark.parametrize(
    ("look", "index"),
    [
        (lambda owner: tasks.open_commands(), "task_open_of_kind"),
        (lambda owner: reconciler.lost_tasks(T0), "task_rescue"),
        (lambda owner: task_picture.waiting_for(of_user(owner)), "task_open_of_owner"),
        (lambda owner: Task.objects.filter(status=TaskStatus.QUEUED, run_after__lte=T0), "task_claim_next"),
    ],
)
def test_what_is_asked_all_the_time_does_not_read_the_tasks_that_have_ended(
    owner: User, look: Callable[[User], Any], index: str
) -> None:
    """Of SQLite, on which these tests run; PostgreSQL decides by what is in the table."""
    plan = look(owner).order_by().explain()
    assert index in plan, plan
