"""The queue: one verb per arrow of a task. Together with ``transitions.py`` the only writer of a task's status.

A worker holds a task under a lease. :class:`Hold` is the proof: worker and attempt. Whoever comes with a hold that is no longer
the present one gets :class:`LeaseLost` and has changed nothing, so a worker that slept through its lease can do no harm.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from django.conf import settings
from django.db import connection as database
from django.db import transaction
from django.db.models import Count, F, QuerySet
from django.db.models.functions import Coalesce

from connections import hooks, telling, vault
from connections.access import NotFound
from connections.models import Capacity, LoginFlow, ManagedAuthConnection, Task, TaskInput
from connections.states import (
    TASK_ARROWS,
    TASK_END,
    TASK_HELD,
    TaskKind,
    TaskStatus,
    is_external,
)
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


#: A task that was taken and given back so often is given to nobody any more: programs that cannot do it would hand it around for ever.
GIVEN_BACK = 1000

#: So long a program of somebody else's may take to end what is to be killed. It cannot be made to: then the task is killed without it.
KILL_PATIENCE = dt.timedelta(seconds=60)

#: The row that is locked while open commands are counted.
COMMANDS = "commands"


#: Kinds whose tasks take nothing that is sent to them: a login asks its own questions, each with an answer of its own.
TAKES_NONE = frozenset({TaskKind.LOGIN, TaskKind.REAUTH, TaskKind.HEALTH_CHECK})


def takes_input(kind: str) -> bool:
    """Whether tasks of this kind take what is sent to them."""
    return kind not in TAKES_NONE


class TaskOver(Exception):
    """The task takes nothing any more. ``present`` is how it ended."""

    def __init__(self, present: str) -> None:
        super().__init__(present)
        self.present = present


class NotOver(Exception):
    """The task has not ended. ``present`` is where it is."""

    def __init__(self, present: str) -> None:
        super().__init__(present)
        self.present = present


class NoCapacity(Exception):
    """As many commands are open as the installation allows. The text is fit to be shown."""

    def __init__(self, *, limit: int, running: int, queued: int) -> None:
        super().__init__(
            f"{running + queued} of {limit} commands are open ({running} running, {queued} queued)."
        )
        self.limit = limit
        self.running = running
        self.queued = queued


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hold:
    """A worker's claim on one task: the attempt counts up with every claim, so an old hold never fits again."""

    task_id: str
    worker: str
    attempt: int
    kind: str
    flow_id: str | None
    connection_id: str | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class End:
    """How a held task ended, as its holder saw it: see :func:`settle`. ``prompt_delivered``: its end shows that it has got its initial input."""

    hold: Hold
    exit_code: int | None = None
    signal: str = ""
    error_code: str = ""
    error: str = ""
    prompt_delivered: bool = False


def lease_end(now: dt.datetime) -> dt.datetime:
    return now + dt.timedelta(seconds=settings.LEASE_SECONDS)


def enqueue(
    *,
    kind: TaskKind,
    title: str,
    connection: ManagedAuthConnection,
    flow: LoginFlow | None = None,
    spec: Mapping[str, Any] | None = None,
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
            spec=dict(spec or {}),
            created_by=actor[:200],
            run_after=now,
            created_at=now,
            updated_at=now,
        )
        telling.task("task.created", row, at=now, actor=actor)
        return row


def create(
    *,
    owner_id: int,
    kind: str,
    title: str,
    spec: Mapping[str, Any],
    labels: Sequence[str] = (),
    parent_id: str | None = None,
    timeout_seconds: int | None = None,
    hook_url: str = "",
    hook_secret: str = "",
    actor: str,
    now: dt.datetime,
) -> Task:
    """A task for a command, or for somebody else's kind. Who may, and what may stand in ``spec``, is decided before (``commands.py``).

    :raises NoCapacity: as many commands are open as may be; nothing was created.
    :raises NotFound: there is no such parent.
    """
    with transaction.atomic():
        if kind == TaskKind.COMMAND:
            _check_capacity()
        if parent_id is not None and not Task.objects.select_for_update().filter(pk=parent_id).first():
            # Deleted since somebody looked.
            raise NotFound(parent_id)
        row = Task.objects.create(
            owner_id=owner_id,
            kind=kind,
            title=title[:200],
            spec=dict(spec),
            labels=list(labels),
            parent_id=parent_id,
            timeout_seconds=timeout_seconds,
            hook_site=hooks.site_of(hook_url) if hook_url else "",
            hook_sealed=vault.seal([hook_url, hook_secret]) if hook_url else None,
            created_by=actor[:200],
            run_after=now,
            created_at=now,
            updated_at=now,
        )
        telling.task("task.created", row, at=now, actor=actor)
        return row


def open_commands() -> QuerySet[Task]:
    """Those that have not ended."""
    found: QuerySet[Task] = Task.objects.filter(kind=TaskKind.COMMAND, finished_at=None)
    return found


def _check_capacity() -> None:
    # Held to the end of the transaction: the next creation counts what this one has added.
    if Capacity.objects.select_for_update().filter(name=COMMANDS).first() is None:
        Capacity.objects.get_or_create(name=COMMANDS)
        Capacity.objects.select_for_update().get(name=COMMANDS)
    if open_commands().count() < settings.COMMAND_LIMIT:
        return
    counted = dict(open_commands().order_by().values_list("status").annotate(count=Count("pk")))
    queued = counted.pop(TaskStatus.QUEUED, 0)
    raise NoCapacity(limit=settings.COMMAND_LIMIT, running=sum(counted.values()), queued=queued)


def update(
    *,
    task_id: str,
    title: str | None = None,
    labels: Sequence[str] | None = None,
    actor: str,
    now: dt.datetime,
) -> Task:
    """A new title or new labels; None leaves as it is. Also after the end. What is the same already is no change."""
    with transaction.atomic():
        row = Task.objects.select_for_update().get(pk=task_id)
        before = (row.title, row.labels)
        row.title = row.title if title is None else title[:200]
        row.labels = row.labels if labels is None else list(labels)
        if (row.title, row.labels) != before:
            touch(row, "title", "labels", now=now)
            telling.task("task.updated", row, at=now, actor=actor)
        return row


def delete(*, task_id: str, actor: str, now: dt.datetime) -> None:
    """Remove an ended task with its output and everything else of it.

    :raises NotOver: it has not ended.
    """
    with transaction.atomic():
        row = Task.objects.select_for_update().get(pk=task_id)
        if not row.is_over:
            raise NotOver(row.status)
        row.version += 1
        clients.forget(topic_of("task", row.id))
        # What is told afterwards still needs the id, which delete() takes away.
        shown = Task.objects.get(pk=task_id)
        shown.version = row.version
        row.delete()
        telling.task("task.deleted", shown, at=now, actor=actor)


def hold_of(row: Task) -> Hold:
    """The claim on a task that has just been taken."""
    return Hold(
        task_id=row.id,
        worker=row.leased_by,
        attempt=row.attempts,
        kind=row.kind,
        flow_id=row.flow_id,
        connection_id=row.connection_id,
    )


def claim(
    *,
    worker: str,
    kinds: Collection[str],
    now: dt.datetime,
    owners: Collection[int] | None = None,
    lease_seconds: int | None = None,
) -> Hold | None:
    """Take the task that waits longest, under a lease; None when there is none. Locks the task alone.

    :param owners: only tasks of these (None: of everybody).
    :param lease_seconds: how long it is held without :func:`renew` (None: as our own workers do).
    """
    rows = claim_several(
        worker=worker, kinds=kinds, limit=1, now=now, owners=owners, lease_seconds=lease_seconds
    )
    return hold_of(rows[0]) if rows else None


def claim_several(
    *,
    worker: str,
    kinds: Collection[str],
    limit: int,
    now: dt.datetime,
    owners: Collection[int] | None = None,
    lease_seconds: int | None = None,
) -> list[Task]:
    """As :func:`claim`, up to ``limit`` tasks in one transaction: the rows, from which :func:`hold_of` makes the holds."""
    waiting = Task.objects.filter(status=TaskStatus.QUEUED, kind__in=kinds, run_after__lte=now)
    if owners is not None:
        waiting = waiting.filter(owner_id__in=owners)
    # A look without a lock first: on SQLite a transaction takes the one write lock of the database.
    if not waiting.exists():
        return []
    with transaction.atomic():
        queue = waiting.order_by("run_after", "created_at", "pk")
        if database.features.has_select_for_update_skip_locked:
            queue = queue.select_for_update(skip_locked=True)
        rows = list(queue[:limit])
        if rows:
            until = lease_end(now) if lease_seconds is None else now + dt.timedelta(seconds=lease_seconds)
            _begin(rows, worker=worker, until=until, now=now)
        return rows


def _begin(rows: Sequence[Task], *, worker: str, until: dt.datetime, now: dt.datetime) -> None:
    """queued → running, for all of them in one statement. They are locked by the caller."""
    for row in rows:
        row.status = TaskStatus.RUNNING
        row.attempts += 1
        row.leased_by = worker
        row.lease_expires_at = until
        row.started_at = row.started_at or now
        row.last_activity_at = row.updated_at = now
        row.version += 1
    Task.objects.filter(pk__in=[row.pk for row in rows]).update(
        status=TaskStatus.RUNNING,
        attempts=F("attempts") + 1,
        leased_by=worker,
        lease_expires_at=until,
        started_at=Coalesce("started_at", now),
        last_activity_at=now,
        updated_at=now,
        version=F("version") + 1,
    )
    moved = [telling.Move(row=row, previous=TaskStatus.QUEUED, actor=worker) for row in rows]
    telling.task_statuses(moved, at=now)


def adopt(*, task_id: str, holder: str, attempt: int, worker: str, now: dt.datetime) -> Task:
    """Go on with a running command that ``holder`` has left to the next worker on its machine (``COMMAND_ON_STOP=handover``).

    :raises LeaseLost: that hold is not the present one any more.
    """
    with transaction.atomic():
        row = (
            Task.objects.select_for_update()
            .filter(pk=task_id, leased_by=holder, attempts=attempt, status__in=TASK_HELD)
            .first()
        )
        if row is None:
            raise LeaseLost(task_id)
        row.attempts += 1
        row.leased_by = worker
        row.lease_expires_at = lease_end(now)
        touch(row, "attempts", "leased_by", "lease_expires_at", now=now)
        telling.task("task.updated", row, at=now, actor=worker)
        return row


def renew(*, hold: Hold, now: dt.datetime, lease_seconds: int | None = None) -> bool:
    """Hold on for another lease; False when it was lost. Losing it is an answer, not an error. Not beyond :data:`KILL_PATIENCE`."""
    until = lease_end(now) if lease_seconds is None else now + dt.timedelta(seconds=lease_seconds)
    row = Task.objects.filter(
        pk=hold.task_id, leased_by=hold.worker, attempts=hold.attempt, status__in=TASK_HELD
    )
    if not is_external(hold.kind):
        return bool(row.update(lease_expires_at=until))
    if row.filter(kill_requested_at=None).update(lease_expires_at=until):
        return True
    killed_at = row.values_list("kill_requested_at", flat=True).first()
    return killed_at is not None and bool(row.update(lease_expires_at=min(until, killed_at + KILL_PATIENCE)))


def handle(*, subject: str, **claim: Any) -> dict[str, Any]:
    """A client is handling the task ``task:<id>`` from now on: :func:`events.clients.take`, as long as there is something left to handle.

    :raises NotFound: it was deleted meanwhile.
    :raises TaskOver: it has ended.
    """
    task_id = subject.partition(":")[2]
    with transaction.atomic():
        # The end of a task releases its claim with the task locked, so none is taken behind it.
        row = Task.objects.select_for_update().filter(pk=task_id).first()
        if row is None:
            raise NotFound(task_id)
        if row.is_over:
            raise TaskOver(row.status)
        return clients.take(subject=subject, **claim)


def attend(*, subject: str, **presence: Any) -> None:
    """A client looks at the task ``task:<id>``, or types: :func:`events.clients.be_present`, also after its end.

    :raises NotFound: it was deleted meanwhile; nothing would ever remove who is there.
    """
    task_id = subject.partition(":")[2]
    with transaction.atomic():
        if not Task.objects.select_for_update().filter(pk=task_id).first():
            raise NotFound(task_id)
        clients.be_present(subject=subject, **presence)


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


def held(*, task_id: str, worker: str, attempt: int) -> Hold:
    """The hold of a program that says who it is and which attempt this is.

    :raises LeaseLost: it is not the present one.
    """
    row = Task.objects.filter(pk=task_id, leased_by=worker, attempts=attempt, status__in=TASK_HELD).first()
    if row is None:
        raise LeaseLost(task_id)
    return Hold(
        task_id=row.id,
        worker=worker,
        attempt=attempt,
        kind=row.kind,
        flow_id=row.flow_id,
        connection_id=row.connection_id,
    )


def wait_for_input(
    row: Task, *, actor: str, now: dt.datetime, prompt: Mapping[str, Any] | None = None
) -> None:
    """running → waiting_for_input. Waiting already for the same is no change. ``row`` is locked by the caller."""
    asks = None if prompt is None else dict(prompt)
    if row.status != TaskStatus.WAITING_FOR_INPUT:
        row.prompt = asks
        _move(row, TaskStatus.WAITING_FOR_INPUT, actor=actor, now=now)
    elif row.prompt != asks:
        row.prompt = asks
        touch(row, "prompt", now=now)
        telling.task("task.updated", row, at=now, actor=actor)


def resume(row: Task, *, actor: str, now: dt.datetime) -> None:
    """waiting_for_input → running. Running already is no change. ``row`` is locked by the caller."""
    if row.status == TaskStatus.WAITING_FOR_INPUT:
        row.prompt = None
        _move(row, TaskStatus.RUNNING, actor=actor, now=now)


def await_input(*, hold: Hold, prompt: Mapping[str, Any], now: dt.datetime) -> bool:
    """running → waiting_for_input, with what it seems to ask. False when somebody has sent something meanwhile: it is about to be taken.

    :raises LeaseLost: when the hold is not the present one.
    """
    with transaction.atomic():
        row = lock_held(hold)
        if row.inputs_waiting:
            return False
        wait_for_input(row, actor=hold.worker, now=now, prompt=prompt)
        return True


def go_on(*, hold: Hold, now: dt.datetime) -> None:
    """waiting_for_input → running: it moved by itself. Running already is no change.

    :raises LeaseLost: when the hold is not the present one.
    """
    with transaction.atomic():
        resume(lock_held(hold), actor=hold.worker, now=now)


def requeue(row: Task, *, actor: str, now: dt.datetime) -> None:
    """Back to the queue: its worker stopped or died. ``row`` is locked by the caller."""
    row.prompt = None
    _move(row, TaskStatus.QUEUED, actor=actor, now=now)


def release(*, hold: Hold, now: dt.datetime) -> Task:
    """Given up by its holder, for somebody else to take; one that is to be killed is killed, and after :data:`GIVEN_BACK` attempts it has failed.

    The number of the attempt stays: who held it under this number does not any more.

    :raises LeaseLost: when the hold is not the present one.
    """
    with transaction.atomic():
        row = lock_held(hold)
        if row.kill_requested_at is not None:
            finish(row, TaskStatus.KILLED, actor=hold.worker, now=now)
        elif row.attempts >= GIVEN_BACK:
            error = f"It was taken and given back {row.attempts} times."
            finish(row, TaskStatus.FAILED, actor=hold.worker, now=now, error_code="given_back", error=error)
        else:
            requeue(row, actor=hold.worker, now=now)
        return row


def request_kill(row: Task, *, actor: str, reason: str, now: dt.datetime) -> None:
    """Mark a held task before its program is told: whichever of the two ends it is recorded first, it is killed (row C23). ``row`` is locked
    by the caller. Twice is the same as once."""
    if row.kill_requested_at is None:
        row.kill_requested_at = now
        row.kill_requested_by = actor[:200]
        row.kill_reason = reason[:500]
        if is_external(row.kind) and row.lease_expires_at is not None:
            row.lease_expires_at = min(row.lease_expires_at, now + KILL_PATIENCE)
        touch(row, "kill_requested_at", "kill_requested_by", "kill_reason", "lease_expires_at", now=now)
        telling.task("task.updated", row, at=now, actor=actor)


def settle(
    *,
    hold: Hold,
    now: dt.datetime,
    exit_code: int | None = None,
    signal: str = "",
    error_code: str = "",
    error: str = "",
) -> Task:
    """The end, as its holder saw it: killed when that was asked for, completed without an ``error_code``, failed with one.

    :raises LeaseLost: when the hold is not the present one.
    """
    end = End(hold=hold, exit_code=exit_code, signal=signal, error_code=error_code, error=error)
    settled = settle_several([end], now=now)
    if not settled:
        raise LeaseLost(hold.task_id)
    return settled[0]


def _keys(ends: Sequence[End]) -> list[tuple[str, str, int]]:
    """The holds of those whose end shows that they got their initial input."""
    return [(end.hold.task_id, end.hold.worker, end.hold.attempt) for end in ends if end.prompt_delivered]


def settle_several(ends: Sequence[End], *, now: dt.datetime) -> list[Task]:
    """As :func:`settle`, for several in one transaction. The rows; one whose hold is not the present one is missing, and nothing of it was done."""
    with transaction.atomic():
        held = Task.objects.select_for_update().filter(
            pk__in=[end.hold.task_id for end in ends], status__in=TASK_HELD
        )
        rows = {(row.pk, row.leased_by, row.attempts): row for row in held.order_by("pk")}
        alike: dict[Any, list[Task]] = {}
        for end in ends:
            row = rows.get((end.hold.task_id, end.hold.worker, end.hold.attempt))
            if row is None:
                continue
            row.signal = end.signal[:16]
            if row.kill_requested_at is not None:
                way = (TaskStatus.KILLED, end.hold.worker, row.signal, "", "", end.exit_code)
            else:
                status = TaskStatus.FAILED if end.error_code else TaskStatus.COMPLETED
                way = (status, end.hold.worker, row.signal, end.error_code, end.error, end.exit_code)
            alike.setdefault(way, []).append(row)
        given = [rows[key] for key in _keys(ends) if key in rows and rows[key].prompt_delivered is False]
        if given:
            # Told with the end.
            Task.objects.filter(pk__in=[row.pk for row in given]).update(prompt_delivered=True)
            for row in given:
                row.prompt_delivered = True
        moved: list[telling.Move] = []
        for (status, worker, _, error_code, error, exit_code), same in alike.items():
            moved += _end(
                same, status, actor=worker, now=now, error_code=error_code, error=error, exit_code=exit_code
            )
        telling.task_statuses(moved, at=now)
        return [move.row for move in moved]


def interrupt(row: Task, *, actor: str, now: dt.datetime) -> None:
    """→ failed: its worker died or stopped in the middle. Its output stays. ``row`` is locked by the caller."""
    finish(
        row,
        TaskStatus.FAILED,
        actor=actor,
        now=now,
        error_code="interrupted",
        error="interrupted: its worker was lost while it ran",
    )


def finish(
    row: Task,
    status: TaskStatus,
    *,
    actor: str,
    now: dt.datetime,
    error_code: str = "",
    error: str = "",
    exit_code: int | None = None,
    handled: bool = True,
) -> None:
    """To one of the ends. ``row`` is locked by the caller. ``handled``: whoever handles it is released; nothing may have been told yet."""
    moved = _end(
        [row],
        status,
        actor=actor,
        now=now,
        error_code=error_code,
        error=error,
        exit_code=exit_code,
        handled=handled,
    )
    telling.task_statuses(moved, at=now)


def _end(
    rows: Sequence[Task],
    status: TaskStatus,
    *,
    actor: str,
    now: dt.datetime,
    error_code: str,
    error: str,
    exit_code: int | None,
    handled: bool = True,
) -> list[telling.Move]:
    """:func:`finish`, for several that end alike (``signal`` included), in as many statements as for one; what is to be told of it."""
    moved = []
    for row in rows:
        previous = TaskStatus(row.status)
        if status not in TASK_ARROWS[previous]:
            raise InvalidTransition(previous, status)
        moved.append(telling.Move(row=row, previous=previous, actor=actor))
    if any(row.inputs_waiting for row in rows):
        # Nobody will ever read them.
        TaskInput.objects.filter(task__in=rows).exclude(sealed=None).update(sealed=None)
    handlers = [topic_of("task", row.pk) for row in rows if handled and takes_input(row.kind)]
    if handlers:
        clients.finish(*handlers, actor=actor)
    ended: dict[str, Any] = {
        "status": status,
        "leased_by": "",
        "lease_expires_at": None,
        "finished_at": now,
        "exit_code": exit_code,
        "signal": rows[0].signal,
        "error_code": error_code[:40],
        "error": error[:500],
        "prompt": None,
        "inputs_waiting": 0,
        "updated_at": now,
    }
    Task.objects.filter(pk__in=[row.pk for row in rows]).update(version=F("version") + 1, **ended)
    for row in rows:
        row.version += 1
        for name, value in ended.items():
            setattr(row, name, value)
        hooks.report(row, now=now)
    return moved


def touch(row: Task, *fields: str, now: dt.datetime) -> None:
    """Save these fields, with a version of their own."""
    row.version += 1
    row.updated_at = now
    row.save(update_fields=[*fields, "version", "updated_at"])


_MOVED = [
    "status", "leased_by", "lease_expires_at", "started_at", "finished_at", "attempts", "exit_code", "signal", "error_code", "error", "prompt",
    "inputs_waiting", "last_activity_at", "version", "updated_at",
]  # fmt: skip


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
    # Not what output adds to: its writer does not hold this row while it waits for the log.
    row.save(update_fields=_MOVED)
    telling.task_statuses([telling.Move(row=row, previous=previous, actor=actor)], at=now)
