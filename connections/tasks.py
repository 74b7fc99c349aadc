"""The queue: one verb per arrow of a task. Together with ``transitions.py`` the only writer of a task's status.

A worker holds a task under a lease. :class:`Hold` is the proof: worker and attempt. Whoever comes with a hold that is no longer
the present one gets :class:`LeaseLost` and has changed nothing, so a worker that slept through its lease can do no harm.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
from collections.abc import Collection

from django.conf import settings
from django.db import connection as database
from django.db import transaction
from django.db.models import Sum

from connections import telling, vault
from connections.models import LoginFlow, ManagedAuthConnection, Task, TaskInput
from connections.states import TASK_ARROWS, TASK_END, TASK_HELD, TaskKind, TaskStatus
from events import clients
from events.envelope import topic_of


class InvalidTransition(Exception):
    """The arrow does not exist from where the object is. ``present`` is where it is."""

    def __init__(self, present: str, wanted: str) -> None:
        super().__init__(f"{present} does not lead to {wanted}")
        self.present = present
        self.wanted = wanted


class LeaseLost(Exception):
    """Somebody else holds the task by now, or nobody does."""


#: What takes lines while it runs. A login asks its own questions, each with an answer of its own.
TAKES_LINES = frozenset({TaskKind.COMMAND})
#: How many lines of one task may wait, and how many bytes together: a task that is stuck must not fill the database.
TASK_INPUT_LIMIT = 100
TASK_INPUT_BYTES = 1024 * 1024


class TaskOver(Exception):
    """The task takes nothing any more. ``present`` is how it ended."""

    def __init__(self, present: str) -> None:
        super().__init__(present)
        self.present = present


class TakesNoInput(Exception):
    """Tasks of this kind take no lines."""


class InputQueueFull(Exception):
    """Too much waits for this task already. The text is fit to be shown."""


class MessageConflict(Exception):
    """This message id belongs to another text."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hold:
    """A worker's claim on one task: the attempt counts up with every claim, so an old hold never fits again."""

    task_id: str
    worker: str
    attempt: int
    kind: str
    flow_id: str | None
    connection_id: str | None


def lease_end(now: dt.datetime) -> dt.datetime:
    return now + dt.timedelta(seconds=settings.LEASE_SECONDS)


def enqueue(
    *,
    kind: TaskKind,
    title: str,
    connection: ManagedAuthConnection,
    flow: LoginFlow | None = None,
    actor: str,
    now: dt.datetime,
) -> Task:
    """Put a task at the end of the queue."""
    with transaction.atomic():
        row = Task.objects.create(
            owner_id=connection.owner_id,
            kind=kind,
            title=title[:200],
            connection=connection,
            flow=flow,
            run_after=now,
            created_at=now,
            updated_at=now,
        )
        telling.task("task.created", row, at=now, actor=actor)
        return row


def claim(*, worker: str, kinds: Collection[str], now: dt.datetime) -> Hold | None:
    """Take the task that waits longest, under a lease; None when there is none. Locks the task alone."""
    waiting = Task.objects.filter(status=TaskStatus.QUEUED, kind__in=kinds, run_after__lte=now)
    # A look without a lock first: on SQLite a transaction takes the one write lock of the database.
    if not waiting.exists():
        return None
    with transaction.atomic():
        queue = waiting.order_by("run_after", "created_at", "pk")
        if database.features.has_select_for_update_skip_locked:
            queue = queue.select_for_update(skip_locked=True)
        row = queue.first()
        if row is None:
            return None
        row.attempts += 1
        row.leased_by = worker
        row.lease_expires_at = lease_end(now)
        row.started_at = row.started_at or now
        _move(row, TaskStatus.RUNNING, actor=worker, now=now)
        return Hold(
            task_id=row.id,
            worker=worker,
            attempt=row.attempts,
            kind=row.kind,
            flow_id=row.flow_id,
            connection_id=row.connection_id,
        )


def renew(*, hold: Hold, now: dt.datetime) -> bool:
    """Hold on for another lease; False when it was lost. Losing it is an answer, not an error."""
    return bool(
        Task.objects.filter(
            pk=hold.task_id, leased_by=hold.worker, attempts=hold.attempt, status__in=TASK_HELD
        ).update(lease_expires_at=lease_end(now))
    )


def lock_held(hold: Hold) -> Task:
    """The task behind a hold, locked.

    :raises LeaseLost: when the hold is not the present one.
    """
    row = (
        Task.objects.select_for_update()
        .filter(pk=hold.task_id, leased_by=hold.worker, attempts=hold.attempt, status__in=TASK_HELD)
        .first()
    )
    if row is None:
        raise LeaseLost(hold.task_id)
    return row


def wait_for_input(row: Task, *, actor: str, now: dt.datetime) -> None:
    """running → waiting_for_input. Waiting already is no change. ``row`` is locked by the caller."""
    if row.status != TaskStatus.WAITING_FOR_INPUT:
        _move(row, TaskStatus.WAITING_FOR_INPUT, actor=actor, now=now)


def resume(row: Task, *, actor: str, now: dt.datetime) -> None:
    """waiting_for_input → running. Running already is no change. ``row`` is locked by the caller."""
    if row.status == TaskStatus.WAITING_FOR_INPUT:
        _move(row, TaskStatus.RUNNING, actor=actor, now=now)


def requeue(row: Task, *, actor: str, now: dt.datetime) -> None:
    """Back to the queue: its worker stopped or died. ``row`` is locked by the caller."""
    _move(row, TaskStatus.QUEUED, actor=actor, now=now)


def finish(
    row: Task,
    status: TaskStatus,
    *,
    actor: str,
    now: dt.datetime,
    error: str = "",
    exit_code: int | None = None,
    handled: bool = True,
) -> None:
    """To one of the ends. ``row`` is locked by the caller. ``handled``: whoever handles it is released; nothing may have been told yet."""
    row.error = error[:500]
    row.exit_code = exit_code
    row.finished_at = now
    if row.inputs_waiting:
        # Nobody will ever read them.
        row.inputs.exclude(sealed=None).update(sealed=None)
        row.inputs_waiting = 0
    if handled and row.kind in TAKES_LINES:
        clients.finish(topic_of("task", row.id), actor=actor)
    _move(row, status, actor=actor, now=now)


# ── Lines for a task ──────────────────────────────────────────────────────────────────────────────────────────────


def add_input(*, task_id: str, text: str, message_id: str, actor: str, now: dt.datetime) -> TaskInput:
    """Put a line at the end of the task's own queue, whatever the task is doing: the order of acceptance is the order of delivery.

    The same message again is the line that it was. The text goes into the row, encrypted, and nowhere else.

    :raises TakesNoInput: a task of this kind has no use for lines.
    :raises MessageConflict: the message id was used for another text.
    :raises TaskOver: it has ended.
    :raises InputQueueFull: as much as may wait is waiting already; nothing of this line was kept.
    """
    fingerprint = vault.fingerprint([task_id, text])
    size = len(text.encode())
    with transaction.atomic():
        row = Task.objects.select_for_update().get(pk=task_id)
        if row.kind not in TAKES_LINES:
            raise TakesNoInput(row.kind)
        known = row.inputs.filter(message_id=message_id).first()
        if known is not None:
            if not vault.same(known.fingerprint, fingerprint):
                raise MessageConflict(message_id)
            return known
        if row.is_over:
            raise TaskOver(row.status)
        if row.inputs_waiting >= TASK_INPUT_LIMIT:
            raise InputQueueFull(f"{TASK_INPUT_LIMIT} lines wait for this task already.")
        waiting = row.inputs.exclude(sealed=None).aggregate(size=Sum("byte_count"))["size"] or 0
        if waiting + size > TASK_INPUT_BYTES:
            raise InputQueueFull(f"More than {TASK_INPUT_BYTES} bytes would wait for this task.")
        last = row.inputs.order_by("-number").values_list("number", flat=True).first() or 0
        line = TaskInput.objects.create(
            task=row,
            number=last + 1,
            message_id=message_id,
            fingerprint=fingerprint,
            sealed=vault.seal(text),
            byte_count=size,
            submitted_by=actor[:200],
            created_at=now,
        )
        _count_inputs(row, 1, actor=actor, now=now)
        return line


def take_input(*, hold: Hold, now: dt.datetime) -> str | None:
    """The line that waits longest, once: it is erased in the same transaction. None when none waits.

    :raises LeaseLost: when the hold is not the present one.
    """
    if not TaskInput.objects.filter(task_id=hold.task_id).exclude(sealed=None).exists():
        return None
    with transaction.atomic():
        row = lock_held(hold)
        line = row.inputs.exclude(sealed=None).order_by("number").first()
        if line is None:
            return None
        text = str(vault.unseal(line.sealed))
        line.sealed = None
        line.taken_at = now
        line.save(update_fields=["sealed", "taken_at"])
        _count_inputs(row, -1, actor=hold.worker, now=now)
        return text


def _count_inputs(row: Task, more: int, *, actor: str, now: dt.datetime) -> None:
    row.inputs_waiting += more
    row.version += 1
    row.updated_at = now
    row.save(update_fields=["inputs_waiting", "version", "updated_at"])
    telling.task("task.updated", row, at=now, actor=actor)


def _move(row: Task, status: TaskStatus, *, actor: str, now: dt.datetime) -> None:
    previous = TaskStatus(row.status)
    if status not in TASK_ARROWS[previous]:
        raise InvalidTransition(previous, status)
    row.status = status
    if status not in TASK_HELD:
        row.leased_by = ""
        row.lease_expires_at = None
    if status in TASK_END and row.finished_at is None:
        row.finished_at = now
    row.version += 1
    row.updated_at = now
    row.save()
    telling.task_status(row, previous=previous, at=now, actor=actor)
