"""What the tests of tasks share: tasks of somebody's own kind, their holds, and what they write."""

from __future__ import annotations

import datetime as dt
from typing import Any

from django.contrib.auth.models import User
from django.utils import timezone

from connections import outputs, task_inputs, tasks
from connections.models import Task
from connections.tasks import Hold

KIND = "build"
#: As Standard Webhooks writes it.
HOOK_SECRET = "whsec_" + "QUJD" * 10


def new_task(owner: User, **more: Any) -> Task:
    """A task of somebody's own kind, in the queue."""
    words = {
        "kind": KIND,
        "title": "a build",
        "spec": {"payload": {"n": 1}},
        "actor": "owner",
        "now": timezone.now(),
    }
    return tasks.create(owner_id=owner.pk, **{**words, **more})


def hold_of(task: Task, worker: str = "w") -> Hold:
    """Taken by a worker."""
    hold = tasks.claim(worker=worker, kinds=[task.kind], now=timezone.now())
    assert hold is not None
    assert hold.task_id == task.id
    return hold


def held(owner: User, **more: Any) -> Hold:
    return hold_of(new_task(owner, **more))


def write(hold: Hold, data: bytes) -> outputs.Size:
    return outputs.append(
        task_id=hold.task_id, worker=hold.worker, attempt=hold.attempt, data=data, now=timezone.now()
    )


def end(hold: Hold, **how: Any) -> Task:
    return tasks.settle(hold=hold, now=timezone.now(), **how)


def take_input(*, hold: Hold, now: dt.datetime) -> task_inputs.Input | None:
    """What waits longest, read and erased, as our own workers take it."""
    found = task_inputs.next_input(hold=hold)
    if found is not None:
        task_inputs.inputs_taken(hold=hold, through=found.number, now=now)
    return found
