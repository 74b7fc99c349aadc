"""Reports of ended tasks to their hooks: the outbox. The only writer of :class:`HookDelivery`.

The row is written in the transaction of the task's end (:func:`report`), so no end goes unreported and none is reported that was rolled
back. A worker takes it under a lease before anything is sent (:func:`claim`), sends it (``runners/hook.py``), and writes what came of it
(:func:`delivered`, :func:`refused`). One that dies in between leaves a lease that runs out: the report is sent again, with the same
``webhook-id``, by which receivers know it.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import random
from collections.abc import Mapping
from typing import Any

from django.conf import settings
from django.db import transaction
from django.db.models import F, Q

from connections import payloads, telling, vault
from connections.models import HookDelivery, Task
from connections.states import HOOK_ARROWS, HookState

#: How long one try may take, its lease included.
LEASE = dt.timedelta(seconds=60)
#: Waiting before the second try, the third ...; the last one holds for all later.
BACKOFF = tuple(dt.timedelta(seconds=s) for s in (5, 30, 120, 600, 3600, 3 * 3600))


class NoHook(Exception):
    """There is nothing to send again: the task has no hook, or has not ended."""


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Report:
    """One delivery in a worker's hands. Never printed: it holds the secret."""

    id: str
    worker: str
    attempt: int
    url: str
    secret: str
    body: Mapping[str, Any]


def report(task: Task, *, now: dt.datetime) -> None:
    """The task has ended: tell its hook, if it has one. Called inside the transaction of the end."""
    if task.hook_url:
        HookDelivery.objects.create(task=task, next_attempt_at=now, created_at=now, updated_at=now)


def claim(*, worker: str, now: dt.datetime) -> Report | None:
    """Take the report that is due longest; None when there is none. Counted as a try before it is sent."""
    due = HookDelivery.objects.filter(state=HookState.PENDING, next_attempt_at__lte=now).filter(
        Q(lease_expires_at=None) | Q(lease_expires_at__lte=now)
    )
    row = due.select_related("task").order_by("next_attempt_at", "pk").first()
    if row is None:
        return None
    taken = due.filter(pk=row.pk, attempts=row.attempts).update(
        attempts=F("attempts") + 1, leased_by=worker, lease_expires_at=now + LEASE, updated_at=now
    )
    if not taken:
        # Somebody else was quicker. The next look finds the next one.
        return None
    return Report(
        id=row.id,
        worker=worker,
        attempt=row.attempts + 1,
        url=row.task.hook_url,
        secret=str(vault.unseal(row.task.hook_sealed)),
        body=_body(row.task),
    )


def _body(task: Task) -> Mapping[str, Any]:
    """What is sent (Standard Webhooks): the same at every try, so it says nothing of the tries."""
    assert task.finished_at is not None
    data = {key: value for key, value in payloads.task(task).items() if key != "hook"}
    return {"type": f"task.{task.status}", "timestamp": payloads.timestamp(task.finished_at), "data": data}


def delivered(*, report: Report, status: int, now: dt.datetime) -> bool:
    """pending → delivered. False when the lease was lost."""
    return _settle(report, HookState.DELIVERED, status=status, error="", retry=None, now=now)


def refused(*, report: Report, status: int | None, error: str, final: bool, now: dt.datetime) -> bool:
    """It did not arrive: tried again after a pause, or pending → failed when that is final or was tried ``HOOK_ATTEMPTS`` times.

    ``error`` is fit to be shown. False when the lease was lost.
    """
    if final or report.attempt >= settings.HOOK_ATTEMPTS:
        return _settle(report, HookState.FAILED, status=status, error=error, retry=None, now=now)
    pause = BACKOFF[min(report.attempt, len(BACKOFF)) - 1] * random.uniform(0.9, 1.1)
    return _settle(report, HookState.PENDING, status=status, error=error, retry=now + pause, now=now)


def redeliver(*, task_id: str, actor: str, now: dt.datetime) -> HookDelivery:
    """Send it again, now, with a new round of tries and the same ``webhook-id``. One that waits for its next try is hurried.

    :raises NoHook: the task has none, or has not ended.
    """
    with transaction.atomic():
        task = Task.objects.select_for_update().get(pk=task_id)
        row = HookDelivery.objects.select_for_update().filter(task=task).first()
        if row is None:
            raise NoHook(task_id)
        if row.state == HookState.PENDING and row.leased_by:
            # It is being sent at this moment.
            return row
        row.state = HookState.PENDING
        row.attempts = 0
        row.next_attempt_at = now
        row.leased_by = ""
        row.lease_expires_at = None
        row.delivered_at = None
        row.updated_at = now
        row.save()
        task.hook_delivery = row
        _tell(task, actor=actor, now=now)
        return row


def _settle(
    report: Report,
    state: HookState,
    *,
    status: int | None,
    error: str,
    retry: dt.datetime | None,
    now: dt.datetime,
) -> bool:
    with transaction.atomic():
        task_id = HookDelivery.objects.filter(pk=report.id).values_list("task_id", flat=True).first()
        task = Task.objects.select_for_update().filter(pk=task_id).first()
        row = (
            HookDelivery.objects.select_for_update()
            .filter(pk=report.id, leased_by=report.worker, attempts=report.attempt, state=HookState.PENDING)
            .first()
        )
        if task is None or row is None:
            return False
        assert state == row.state or state in HOOK_ARROWS[HookState(row.state)]
        row.state = state
        row.leased_by = ""
        row.lease_expires_at = None
        row.next_attempt_at = retry
        row.last_status = status
        row.last_error = error[:300]
        row.delivered_at = now if state == HookState.DELIVERED else None
        row.updated_at = now
        row.save()
        task.hook_delivery = row
        _tell(task, actor=report.worker, now=now)
        return True


def _tell(task: Task, *, actor: str, now: dt.datetime) -> None:
    """The task looks different now, though it has ended: its version grows."""
    task.version += 1
    task.updated_at = now
    task.save(update_fields=["version", "updated_at"])
    telling.task("task.updated", task, at=now, actor=actor)
