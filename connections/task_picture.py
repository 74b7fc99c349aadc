"""One picture of a task: what its row, its page and its card on the home page show. Templates only print it."""

from __future__ import annotations

import dataclasses
import datetime as dt
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from django.conf import settings
from django.db.models import QuerySet
from django.utils import timezone

from connections.access import Principal
from connections.chips import Chip
from connections.models import Task, TaskInput
from connections.payloads import HookShape
from connections.payloads import task as payload
from connections.states import TASK_END, HookState, InputKind, TaskKind, TaskStatus
from connections.tasks import TAKES_NONE, takes_input
from events.models import Event

#: Waiting for longer is "stale" (row C54): nobody seems to know of it.
STALE = dt.timedelta(minutes=20)

#: As many moments are told, the newest.
MOMENTS = 60
#: As many of the lines that were sent are shown, the newest.
LINES = 8
CHILDREN = 20

STATUS_CHIP = {
    TaskStatus.QUEUED: Chip(shape="○", tone="idle", word="Queued"),
    TaskStatus.RUNNING: Chip(shape="●", tone="working", word="Working"),
    TaskStatus.WAITING_FOR_INPUT: Chip(shape="◆", tone="waiting", word="Waiting for you"),
    TaskStatus.COMPLETED: Chip(shape="✔", tone="done", word="Done"),
    TaskStatus.FAILED: Chip(shape="✖", tone="failed", word="Failed"),
    TaskStatus.KILLED: Chip(shape="–", tone="idle", word="Cancelled"),
}
LINE_CHIP = {
    "waiting": Chip(shape="○", tone="idle", word="waiting"),
    "delivered": Chip(shape="✔", tone="done", word="delivered"),
    "dropped": Chip(shape="–", tone="idle", word="not delivered, the task was over"),
}
HOOK_CHIP = {
    HookState.PENDING: Chip(shape="◌", tone="working", word="Being sent"),
    HookState.DELIVERED: Chip(shape="✔", tone="done", word="Delivered"),
    HookState.FAILED: Chip(shape="✖", tone="failed", word="Not delivered"),
}

_WANTED = {"yes_no": "yes or no", "menu": "a choice", "password": "a password", "text": "an answer"}
_WHY = {
    "timeout": "it took too long",
    "cannot_start": "it could not be started",
    "missing_directory": "its folder is missing",
    "not_allowed": "it may not be run any more",
    "interrupted": "interrupted",
    "worker_lost": "its worker was lost",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reply:
    """One quick answer as a button: the name and the value of what it sends."""

    label: str
    name: str
    value: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Moment:
    """Something that happened to a task. ``id`` is unique within the task; ``actor`` is empty where the text names who it was."""

    id: str
    at: dt.datetime
    chip: Chip
    text: str
    actor: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskPicture:
    """What the parts show of a task. ``stale_at``: from when on it counts as forgotten; None while it does not wait."""

    task: Task
    chip: Chip
    replies: Sequence[Reply]
    stale_at: dt.datetime | None
    took: str

    @property
    def id(self) -> str:
        return self.task.id

    @property
    def rev(self) -> int:
        return self.task.version

    @property
    def waits(self) -> bool:
        return bool(self.task.status == TaskStatus.WAITING_FOR_INPUT)

    @property
    def asks(self) -> str:
        """What it seems to ask, in its own words."""
        return str((self.task.prompt or {}).get("text", "")) if self.waits else ""

    @property
    def asks_kind(self) -> str:
        return str((self.task.prompt or {}).get("kind", "")) if self.waits else ""

    @property
    def guessed(self) -> bool:
        """Whether nothing but silence speaks for it that it waits."""
        return self.waits and (self.task.prompt or {}).get("detected_by") == "quiet"

    @property
    def active_at(self) -> dt.datetime:
        return self.task.last_activity_at or self.task.created_at

    @property
    def is_stale(self) -> bool:
        return self.stale_at is not None and self.stale_at <= timezone.now()

    @property
    def limit(self) -> str:
        return duration(self.task.timeout_seconds or 0)

    @property
    def is_held(self) -> bool:
        return not self.task.is_over and self.task.status != TaskStatus.QUEUED

    @property
    def stopping(self) -> bool:
        return not self.task.is_over and self.task.kill_requested_at is not None

    @property
    def types(self) -> bool:
        """Whether something can be sent to it now."""
        return takes_input(self.task.kind) and not self.task.is_over

    @property
    def writes(self) -> bool:
        """Whether there is, or may be, output."""
        return self.task.output_bytes > 0 or takes_input(self.task.kind)

    @property
    def needs_attention(self) -> bool:
        """A login that waits is on the home page as its connection already."""
        return self.waits and takes_input(self.task.kind)

    @property
    def filter(self) -> str:
        """The value of ``?status=`` that finds it in the list."""
        return str(self.task.status)

    @property
    def deadline(self) -> dt.datetime | None:
        if self.task.is_over or self.task.started_at is None or not self.task.timeout_seconds:
            return None
        return self.task.started_at + dt.timedelta(seconds=self.task.timeout_seconds)

    @property
    def command_line(self) -> str:
        """The arguments as a shell would quote them: to be read, never to be run."""
        return shlex.join(self.task.spec.get("argv") or ())

    @property
    def rows(self) -> int:
        return int(self.task.spec.get("rows") or 24)

    @property
    def cols(self) -> int:
        return int(self.task.spec.get("cols") or 80)

    @property
    def hook(self) -> HookShape | None:
        return payload(self.task)["hook"]

    @property
    def hook_chip(self) -> Chip | None:
        hook = self.hook
        return HOOK_CHIP[HookState(hook["state"])] if hook and hook["state"] else None

    @property
    def tells_its_end(self) -> bool:
        """Whether the chip says already what the error does."""
        return self.task.error_code in ("exit_code", "signal")

    @property
    def ended(self) -> str:
        """How it ended, in a sentence."""
        if not self.task.is_over:
            return ""
        after = f" after {self.took}" if self.took else ""
        if self.task.signal:
            return f"Ended by {self.task.signal}{after}."
        if self.task.exit_code is not None:
            return f"Exit code {self.task.exit_code}{after}."
        return f"Ended{after}." if after else ""


def chip_of(task: Task) -> Chip:
    """The chip of a task, with what it waits for, why it failed, who ended it."""
    plain = STATUS_CHIP[TaskStatus(task.status)]
    if task.status == TaskStatus.WAITING_FOR_INPUT and task.prompt:
        wanted = _WANTED.get(str(task.prompt.get("kind")))
        return dataclasses.replace(plain, word=f"Waiting for you: {wanted}") if wanted else plain
    if task.status == TaskStatus.FAILED:
        why = _WHY.get(task.error_code, "")
        if task.error_code == "exit_code" and task.exit_code is not None:
            why = f"exit code {task.exit_code}"
        elif task.error_code == "signal":
            why = task.signal
        return dataclasses.replace(plain, word=f"Failed: {why}") if why else plain
    if task.status == TaskStatus.KILLED and takes_input(task.kind):
        by = f" by {task.kill_requested_by}" if task.kill_requested_by else ""
        return dataclasses.replace(plain, word=f"Stopped{by}")
    if task.kill_requested_at is not None and not task.is_over:
        return Chip(shape="◌", tone="working", word="Stopping…")
    return plain


def duration(seconds: float) -> str:
    """``0.4 s``, ``38 s``, ``3 min 12 s``, ``2 h 5 min``, ``4 d 3 h``."""
    if seconds < 10:
        return f"{max(0.0, seconds):.1f} s"
    whole = round(seconds)
    days, hours, minutes = whole // 86_400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{whole} s"


def _replies(task: Task) -> list[Reply]:
    found = []
    for each in (task.prompt or {}).get("replies") or ():
        if "keys" in each:
            found.append(Reply(label=str(each["label"]), name="keys", value=",".join(each["keys"])))
        else:
            found.append(Reply(label=str(each["label"]), name="text", value=str(each.get("text", ""))))
    return found


def picture(task: Task) -> TaskPicture:
    waits = task.status == TaskStatus.WAITING_FOR_INPUT
    took = ""
    if task.finished_at is not None and task.started_at is not None:
        took = duration((task.finished_at - task.started_at).total_seconds())
    return TaskPicture(
        task=task,
        chip=chip_of(task),
        # An answer that is on its way answers it: one more would answer the next question.
        replies=_replies(task) if waits and not task.inputs_waiting else [],
        stale_at=(task.last_activity_at or task.updated_at) + STALE if waits else None,
        took=took,
    )


# ── Which tasks ───────────────────────────────────────────────────────────────────────────────────────────────────

#: What ``?status=open`` finds.
OPEN = frozenset(TaskStatus) - TASK_END


def waiting_for(principal: Principal) -> QuerySet[Task]:
    """The tasks that wait for somebody and are not represented by a connection, the longest first."""
    rows = _open_to(principal).filter(status=TaskStatus.WAITING_FOR_INPUT)
    found: QuerySet[Task] = rows.exclude(kind__in=TAKES_NONE).order_by("last_activity_at", "pk")
    return found


def counts(principal: Principal) -> dict[str, int]:
    """``waiting``: those of :func:`waiting_for`; ``open``: what ``?status=open`` finds."""
    return {
        "waiting": waiting_for(principal).count(),
        "open": _open_to(principal).count(),
    }


def _open_to(principal: Principal) -> QuerySet[Task]:
    # In the words of an index, for every page counts them, and of ended tasks there are ever more.
    found: QuerySet[Task] = Task.objects.visible_to(principal).filter(finished_at=None)
    return found


# ── What happened to it ───────────────────────────────────────────────────────────────────────────────────────────

_SENT = {InputKind.TEXT: "sent", InputKind.KEYS: "pressed keys", InputKind.RESIZE: "changed the size of the terminal"}  # fmt: skip


def told_input(line: TaskInput) -> str:
    """``sent 2 bytes: delivered``; of what was typed nothing but its length is known."""
    word = _SENT[InputKind(line.kind)]
    size = (
        f" {line.byte_count} byte{'' if line.byte_count == 1 else 's'}" if line.kind == InputKind.TEXT else ""
    )
    enter = "" if line.submit or line.kind != InputKind.TEXT else " without Enter"
    return f"{word}{size}{enter}: {LINE_CHIP[line.state].word}"


def _told_status(data: Mapping[str, Any], task: Task) -> tuple[Chip, str]:
    status = TaskStatus(data["status"])
    before = data.get("previous_status")
    plain = STATUS_CHIP[status]
    if status == TaskStatus.QUEUED:
        return plain, "back in the queue: its worker stopped"
    if status == TaskStatus.RUNNING:
        return plain, "started" if before == TaskStatus.QUEUED else "goes on"
    if status == TaskStatus.WAITING_FOR_INPUT:
        return plain, "waits for input"
    if status == TaskStatus.COMPLETED:
        code = data.get("exit_code")
        return plain, "done" if code is None else f"ended with exit code {code}"
    if status == TaskStatus.FAILED:
        return plain, f"failed: {data['error']}" if data.get("error") else "failed"
    by = f" by {task.signal}" if task.signal else ""
    return plain, f"ended{by}" if takes_input(task.kind) else "cancelled"


def moments(
    task: Task, events: Iterable[Event], lines: Iterable[TaskInput], others: Iterable[Moment] = ()
) -> list[Moment]:
    """What happened, oldest first: its statuses from the log, what was sent by whom, who asked to stop it and why; and ``others``."""
    found: list[Moment] = list(others)
    for event in events:
        chip, text = STATUS_CHIP[TaskStatus.QUEUED], "queued"
        if event.name == "task.status":
            chip, text = _told_status(event.data, task)
        found.append(
            Moment(id=str(event.id), at=event.at, chip=chip, text=text, actor=event.actor or "system")
        )
    for line in lines:
        sign = {"delivered": Chip(shape="›", tone="working", word="input")}.get(
            line.state, LINE_CHIP[line.state]
        )
        found.append(
            Moment(
                id=f"{task.id}-{line.number}",
                at=line.created_at,
                chip=sign,
                text=told_input(line),
                actor=line.submitted_by,
            )
        )
    if task.kill_requested_at is not None:
        why = f": {task.kill_reason}" if task.kill_reason else ""
        found.append(
            Moment(
                id=f"{task.id}-kill",
                at=task.kill_requested_at,
                chip=Chip(shape="–", tone="failed", word="Stop"),
                text=f"asked to stop{why}",
                actor=task.kill_requested_by or "system",
            )
        )
    return sorted(found, key=lambda each: each.at)[-MOMENTS:]


def kinds_of(principal: Principal) -> list[str]:
    """The kinds to filter by: ours, and those of others that the caller has seen."""
    there = Task.objects.visible_to(principal).order_by().values_list("kind", flat=True).distinct()[:100]
    return sorted({*TaskKind.values, *there})


def may_type(principal: Principal, task: Task) -> bool:
    """Whether this caller may send something to it: into a command only who may run commands (``commands.check_right``)."""
    if not principal.may_operate(task.owner_id) or not takes_input(task.kind):
        return False
    return task.kind != TaskKind.COMMAND or (settings.COMMANDS != "off" and principal.runs_commands)
