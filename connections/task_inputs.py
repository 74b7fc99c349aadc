"""What is sent to a task: a queue of its own for each, in the order of acceptance. The only writer of :class:`TaskInput`.

People and programs add (:func:`add_input`); the holder of the task takes, in two steps, each of which bears to be done twice: it reads, and then says what has
arrived (:func:`inputs_taken`), which is erased. So no line is lost when an answer of the database is, or when it was written to a dead socket
(row B37). Our own workers read one at a time (:func:`next_input`); programs that take their tasks through the API are sent all that waits (:func:`peek_inputs`).
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import uuid
from collections.abc import Sequence
from typing import Any

from django.db import transaction
from django.db.models import Sum

from connections import telling, vault
from connections.models import Task, TaskInput
from connections.states import InputKind, TaskKind
from connections.tasks import Hold, TaskOver, lock_held, resume, takes_input, touch
from connections.terminal.keys import FINISHING

#: How many inputs of one task may wait, and how many bytes together: a task that is stuck must not fill the database.
TASK_INPUT_LIMIT = 100
TASK_INPUT_BYTES = 2 * 1024 * 1024


class TakesNoInput(Exception):
    """Tasks of this kind take no input."""


class InputQueueFull(Exception):
    """Too much waits for this task already. The text is fit to be shown."""


class MessageConflict(Exception):
    """This message id belongs to another text."""


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Input:
    """One thing that was sent to a task, by ``kind``: ``text`` (``submit``: with Enter), ``keys``, or ``rows`` and ``cols``. Never printed.

    ``initial``: a command gets it once it is ready for it (row C55)."""

    number: int
    kind: str
    text: str = ""
    submit: bool = False
    keys: tuple[str, ...] = ()
    rows: int = 0
    cols: int = 0
    initial: bool = False

    @property
    def finishes(self) -> bool:
        """Whether a task that waits for input goes on after it."""
        return self.submit or not FINISHING.isdisjoint(self.keys)


def add_input(
    *,
    task_id: str,
    kind: InputKind = InputKind.TEXT,
    content: Any,
    submit: bool = True,
    message_id: str,
    sender: int | None = None,
    actor: str,
    now: dt.datetime,
) -> TaskInput:
    """Put something at the end of the task's own queue, whatever the task is doing: the order of acceptance is the order of delivery.

    ``content`` is, by ``kind``: a text, a list of names of keys, or ``[rows, columns]``. It goes into the row, encrypted, and nowhere else. The
    same message again is the input that it was: of the same ``sender``, the key of a user, on whichever page or with whichever of their keys.

    :raises TakesNoInput: a task of this kind has no use for it.
    :raises MessageConflict: the sender used the message id for something else.
    :raises TaskOver: it has ended.
    :raises InputQueueFull: as much as may wait is waiting already; nothing of this was kept.
    """
    plain = kind == InputKind.TEXT and submit
    fingerprint = vault.fingerprint([task_id, content] if plain else [task_id, content, kind, submit])
    size = len(content.encode()) if isinstance(content, str) else 0
    with transaction.atomic():
        row = Task.objects.select_for_update().get(pk=task_id)
        if not takes_input(row.kind):
            raise TakesNoInput(row.kind)
        # Of this sender: two people may well call a line "1", and each has to have a receipt for their own.
        known = row.inputs.filter(message_id=message_id, sender=sender or 0).first()
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
            kind=kind,
            submit=submit and kind == InputKind.TEXT,
            message_id=message_id,
            sender=sender or 0,
            fingerprint=fingerprint,
            sealed=vault.seal(content),
            byte_count=size,
            submitted_by=actor[:200],
            created_at=now,
        )
        _count_inputs(row, 1, actor=actor, now=now)
        return line


def first_input(row: Task, *, text: str, actor: str, now: dt.datetime) -> TaskInput:
    """The text, with Enter, that a task is made with. ``row`` was created in this very transaction: nobody else sees it, so it need not be locked.

    A command gets it once it is ready. A program that takes its tasks through the API knows itself when it is.
    """
    initial = row.kind == TaskKind.COMMAND
    line = TaskInput.objects.create(
        task=row,
        number=1,
        initial=initial,
        message_id=str(uuid.uuid4()),
        fingerprint=vault.fingerprint([row.pk, text]),
        sealed=vault.seal(text),
        byte_count=len(text.encode()),
        submitted_by=actor[:200],
        created_at=now,
    )
    if initial:
        row.prompt_delivered = False
    _count_inputs(row, 1, actor=actor, now=now)
    return line


def next_input(*, hold: Hold) -> Input | None:
    """What waits longest; None when nothing waits. It waits on until :func:`inputs_taken` says that it has arrived."""
    line = TaskInput.objects.filter(task_id=hold.task_id).exclude(sealed=None).order_by("number").first()
    return None if line is None else _opened(line)


def peek_inputs(*, hold: Hold, after: int) -> list[Input]:
    """What waits and has a number above ``after``, in order, without taking it: a program that takes its tasks through the API says later, with
    :func:`inputs_taken`, what it has got.

    :raises LeaseLost: when the hold is not the present one.
    """
    with transaction.atomic():
        row = lock_held(hold)
        lines = row.inputs.exclude(sealed=None).filter(number__gt=after).order_by("number")
        return [_opened(line) for line in lines]


def inputs_taken(*, hold: Hold, through: int, now: dt.datetime) -> None:
    """The holder has got everything up to this number: it is erased. Again is no change.

    A task that waited goes on, if a line is finished by it: the status is told with the delivery.

    :raises LeaseLost: when the hold is not the present one.
    """
    with transaction.atomic():
        row = lock_held(hold)
        lines = list(row.inputs.exclude(sealed=None).filter(number__lte=through).order_by("number"))
        if lines:
            finishes = any(_opened(line).finishes for line in lines)
            _mark_taken(row, lines, resumes=finishes, actor=hold.worker, now=now)


def initial_delivered(*, hold: Hold, now: dt.datetime) -> None:
    """The command has got what it was made with, as far as its holder can see. Again is no change.

    :raises LeaseLost: when the hold is not the present one.
    """
    with transaction.atomic():
        row = lock_held(hold)
        if not row.prompt_delivered:
            row.prompt_delivered = True
            touch(row, "prompt_delivered", now=now)
            telling.task("task.updated", row, at=now, actor=hold.worker)


def _opened(line: TaskInput) -> Input:
    content = vault.unseal(line.sealed)
    if line.kind == InputKind.KEYS:
        return Input(number=line.number, kind=line.kind, keys=tuple(content))
    if line.kind == InputKind.RESIZE:
        return Input(number=line.number, kind=line.kind, rows=content[0], cols=content[1])
    return Input(
        number=line.number, kind=line.kind, text=str(content), submit=line.submit, initial=line.initial
    )


def _mark_taken(
    row: Task, lines: Sequence[TaskInput], *, resumes: bool, actor: str, now: dt.datetime
) -> None:
    TaskInput.objects.filter(pk__in=[line.pk for line in lines]).update(sealed=None, taken_at=now)
    row.last_activity_at = now
    _count_inputs(row, -len(lines), actor=actor, now=now)
    if resumes:
        resume(row, actor=actor, now=now)


def _count_inputs(row: Task, more: int, *, actor: str, now: dt.datetime) -> None:
    row.inputs_waiting += more
    touch(row, "inputs_waiting", "last_activity_at", "prompt_delivered", now=now)
    telling.task("task.updated", row, at=now, actor=actor)
