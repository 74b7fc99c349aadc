"""How a verb tells what it did: the one sender of ``status_changed`` of this app. Called inside the verb's transaction."""

from __future__ import annotations

import dataclasses
import datetime as dt
from collections.abc import Sequence
from typing import Any

from connections import payloads
from connections.models import LoginFlow, ManagedAuthConnection, Task
from connections.states import HookState
from events.envelope import Change, topic_of
from events.signals import status_changed


def _send(sender: type, **words: Any) -> None:
    status_changed.send(sender, changes=[_change(**words)])


def _change(
    *, name: str, topic: str, owner_id: int, object_id: str, version: int, at: dt.datetime, actor: str, data: dict[str, Any]
) -> Change:  # fmt: skip
    body = {"id": object_id, "version": version, "at": payloads.timestamp(at), **data}
    return Change(
        name=name,
        topic=topic,
        audience=owner_id,
        object_id=object_id,
        version=version,
        at=at,
        actor=actor,
        data=body,
    )


def connection(name: str, row: ManagedAuthConnection, *, at: dt.datetime, actor: str) -> None:
    """``connection.created``, ``connection.updated``, ``connection.deleted``."""
    _send(
        ManagedAuthConnection,
        name=name,
        topic=topic_of("connection", row.id),
        owner_id=row.owner_id,
        object_id=row.id,
        version=row.version,
        at=at,
        actor=actor,
        data=dict(payloads.connection_fields(row)),
    )


def connection_status(
    row: ManagedAuthConnection, *, previous: str, reason: str, at: dt.datetime, actor: str
) -> None:
    _send(
        ManagedAuthConnection,
        name="connection.status",
        topic=topic_of("connection", row.id),
        owner_id=row.owner_id,
        object_id=row.id,
        version=row.version,
        at=at,
        actor=actor,
        data={"status": row.status, "previous_status": previous, "reason": reason},
    )


def flow_state(row: LoginFlow, *, at: dt.datetime, actor: str) -> None:
    """The full picture of a flow; its topic is the connection, which is what people watch."""
    _send(
        LoginFlow,
        name="flow.state",
        topic=topic_of("connection", row.connection_id),
        owner_id=row.connection.owner_id,
        object_id=row.id,
        version=row.version,
        at=at,
        actor=actor,
        data={**payloads.flow_state(row), "connection_id": row.connection_id, "flow_id": row.id},
    )


def task(name: str, row: Task, *, at: dt.datetime, actor: str) -> None:
    """``task.created``, ``task.updated``, ``task.deleted``."""
    _send(
        Task,
        name=name,
        topic=topic_of("task", row.id),
        owner_id=row.owner_id,
        object_id=row.id,
        version=row.version,
        at=at,
        actor=actor,
        data=dict(payloads.task(row)),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Move:
    """A task that has another status now."""

    row: Task
    previous: str
    actor: str


def task_statuses(moves: Sequence[Move], *, at: dt.datetime) -> None:
    """``task.status`` of each, in this order, in one look at the log."""
    if moves:
        changes = [_task_status(move.row, previous=move.previous, at=at, actor=move.actor) for move in moves]
        status_changed.send(Task, changes=changes)


def _task_status(row: Task, *, previous: str, at: dt.datetime, actor: str) -> Change:
    extra = {
        "exit_code": row.exit_code,
        "finished_at": row.finished_at and payloads.timestamp(row.finished_at),
        "error": row.error or None,
        "connection_id": row.connection_id,
        "flow_id": row.flow_id,
        # Its end is to be reported: workers that send reports need not look after every other one.
        "hook_state": HookState.PENDING.value if row.is_over and row.hook_site else None,
    }
    return _change(
        name="task.status",
        topic=topic_of("task", row.id),
        owner_id=row.owner_id,
        object_id=row.id,
        version=row.version,
        at=at,
        actor=actor,
        data={
            "status": row.status,
            "previous_status": previous,
            "kind": row.kind,
            **{key: value for key, value in extra.items() if value is not None},
        },
    )
