"""Every state machine of the domain on one page. No ORM here: enums, arrows, end states.

The README draws the same machines; ``tests/connections/test_states.py`` compares the drawing with the arrows.

A login flow (wire contract, section 4)::

    start_login ─▶ DISCOVERING
    DISCOVERING                 ─▶ AWAITING_INPUT | AWAITING_EXTERNAL_ACTION | SUBMITTING (stored values) | end
    AWAITING_INPUT              ─▶ SUBMITTING (a submission was accepted) | end
    AWAITING_EXTERNAL_ACTION    ─▶ SUBMITTING (a fallback was submitted) | any next step by itself | end
    SUBMITTING                  ─▶ AWAITING_INPUT | AWAITING_EXTERNAL_ACTION | DISCOVERING | end
    any step                    ─▶ AWAITING_HUMAN_INTERVENTION ─▶ back | end
    any other step              ─▶ DISCOVERING (its worker died: the flow starts again, typed values are gone)
    end = SUCCESS | FAILED | EXPIRED | CANCELED, all shown as step COMPLETED, all final

A task::

    queued               ─▶ running | failed | killed
    running              ─▶ waiting_for_input | queued (its worker stopped or died) | end
    waiting_for_input    ─▶ running | queued (its worker stopped or died) | end
    end = completed | failed | killed, all final

The report of a task's end to its hook (``hooks.py``)::

    pending   ─▶ delivered | failed (refused for good, or tried too often)
    delivered ─▶ pending (sent again by hand)
    failed    ─▶ pending (sent again by hand)

A connection is ``NEEDS_AUTH`` or ``AUTHENTICATED``: the last known state of its profile on that site.
"""

from __future__ import annotations

import re

from django.db.models import TextChoices


class ConnectionStatus(TextChoices):
    AUTHENTICATED = "AUTHENTICATED", "Authenticated"
    NEEDS_AUTH = "NEEDS_AUTH", "Needs auth"


class FlowType(TextChoices):
    LOGIN = "LOGIN", "Login"
    REAUTH = "REAUTH", "Re-authentication"


class FlowStatus(TextChoices):
    IN_PROGRESS = "IN_PROGRESS", "In progress"
    SUCCESS = "SUCCESS", "Success"
    FAILED = "FAILED", "Failed"
    EXPIRED = "EXPIRED", "Expired"
    CANCELED = "CANCELED", "Canceled"


class FlowStep(TextChoices):
    DISCOVERING = "DISCOVERING", "Discovering"
    AWAITING_INPUT = "AWAITING_INPUT", "Awaiting input"
    AWAITING_EXTERNAL_ACTION = "AWAITING_EXTERNAL_ACTION", "Awaiting external action"
    AWAITING_HUMAN_INTERVENTION = "AWAITING_HUMAN_INTERVENTION", "Awaiting human intervention"
    SUBMITTING = "SUBMITTING", "Submitting"
    COMPLETED = "COMPLETED", "Completed"


FLOW_END = frozenset({FlowStatus.SUCCESS, FlowStatus.FAILED, FlowStatus.EXPIRED, FlowStatus.CANCELED})

#: Steps in which an interaction may be open, so that a submission can be accepted.
ANSWERABLE = frozenset({FlowStep.AWAITING_INPUT, FlowStep.AWAITING_EXTERNAL_ACTION})

_D, _I, _E, _H, _S, _C = (
    FlowStep.DISCOVERING,
    FlowStep.AWAITING_INPUT,
    FlowStep.AWAITING_EXTERNAL_ACTION,
    FlowStep.AWAITING_HUMAN_INTERVENTION,
    FlowStep.SUBMITTING,
    FlowStep.COMPLETED,
)

#: step → the steps it may go to. A step that may follow itself does so with a new interaction or a new text.
FLOW_ARROWS: dict[FlowStep, frozenset[FlowStep]] = {
    _D: frozenset({_I, _E, _H, _S, _C}),
    _I: frozenset({_S, _H, _D, _C}),
    _E: frozenset({_S, _I, _E, _H, _D, _C}),
    _H: frozenset({_D, _I, _E, _S, _C}),
    _S: frozenset({_I, _E, _D, _H, _C}),
    _C: frozenset(),
}


class TaskKind(TextChoices):
    """What our own workers do. Every other kind (:func:`is_external`) is done by programs that take their tasks through the API."""

    LOGIN = "login", "Login"
    REAUTH = "reauth", "Re-authentication"
    HEALTH_CHECK = "health_check", "Health check"
    COMMAND = "command", "Command"


_EXTERNAL_KIND = re.compile(r"[a-z][a-z0-9_.-]{1,39}")


def is_external(kind: str) -> bool:
    """Whether this names a kind of somebody else's: 2 to 40 characters, small letters first, and none of ours."""
    return kind not in TaskKind.values and _EXTERNAL_KIND.fullmatch(kind) is not None


class TaskStatus(TextChoices):
    QUEUED = "queued", "Queued"
    RUNNING = "running", "Running"
    WAITING_FOR_INPUT = "waiting_for_input", "Waiting for input"
    COMPLETED = "completed", "Completed"
    FAILED = "failed", "Failed"
    KILLED = "killed", "Killed"


TASK_END = frozenset({TaskStatus.COMPLETED, TaskStatus.FAILED, TaskStatus.KILLED})

#: Statuses in which a worker holds the task under a lease.
TASK_HELD = frozenset({TaskStatus.RUNNING, TaskStatus.WAITING_FOR_INPUT})

TASK_ARROWS: dict[TaskStatus, frozenset[TaskStatus]] = {
    TaskStatus.QUEUED: frozenset({TaskStatus.RUNNING, TaskStatus.FAILED, TaskStatus.KILLED}),
    TaskStatus.RUNNING: frozenset({TaskStatus.WAITING_FOR_INPUT, TaskStatus.QUEUED, *TASK_END}),
    TaskStatus.WAITING_FOR_INPUT: frozenset({TaskStatus.RUNNING, TaskStatus.QUEUED, *TASK_END}),
    TaskStatus.COMPLETED: frozenset(),
    TaskStatus.FAILED: frozenset(),
    TaskStatus.KILLED: frozenset(),
}


class InputKind(TextChoices):
    """What can be sent to a task."""

    TEXT = "text", "Text"
    KEYS = "keys", "Keys"
    RESIZE = "resize", "New size of the terminal"


class HookState(TextChoices):
    PENDING = "pending", "Pending"
    DELIVERED = "delivered", "Delivered"
    FAILED = "failed", "Failed"


HOOK_ARROWS: dict[HookState, frozenset[HookState]] = {
    HookState.PENDING: frozenset({HookState.DELIVERED, HookState.FAILED}),
    HookState.DELIVERED: frozenset({HookState.PENDING}),
    HookState.FAILED: frozenset({HookState.PENDING}),
}
