"""What the tests of the API share: connections, and logins that wait at a chosen step, without a worker process."""

from __future__ import annotations

import datetime as dt
from typing import Any

from django.utils import timezone
from rest_framework.test import APIClient

from connections import tasks, transitions
from connections.models import LoginFlow
from connections.states import TaskKind

FIELDS = [
    {
        "id": "f1",
        "ref": "username",
        "type": "identifier",
        "reason": "missing",
        "label": "User name",
        "required": True,
    },
    {
        "id": "f2",
        "ref": "password",
        "type": "password",
        "reason": "missing",
        "label": "Password",
        "required": True,
    },
]
ANSWER = {"username": "alice", "password": "hunter2-secret"}


def post(client: APIClient, path: str, body: Any = None, **headers: str) -> Any:
    """POST as JSON; without a body, none is sent."""
    if body is None:
        return client.post(path, **headers)
    return client.post(path, body, format="json", **headers)


def new_connection(client: APIClient, domain: str = "example.com", **extra: Any) -> str:
    answer = post(client, "/auth/connections", {"domain": domain, "profile_name": "work", **extra})
    assert answer.status_code == 201, answer.content
    return str(answer.json()["id"])


def claim(connection_id: str) -> tasks.Hold:
    """Take the login of this connection as a worker would."""
    hold = tasks.claim(worker="test", kinds=[TaskKind.LOGIN, TaskKind.REAUTH], now=timezone.now())
    assert hold is not None
    assert hold.connection_id == connection_id
    return hold


def waiting(client: APIClient, connection_id: str, **extra: Any) -> tuple[Any, tasks.Hold, LoginFlow]:
    """Start a login and bring it to AWAITING_INPUT: the answer of /login, the worker's hold, the flow."""
    started = post(client, f"/auth/connections/{connection_id}/login")
    assert started.status_code == 200, started.content
    hold = claim(connection_id)
    flow = transitions.await_input(
        hold=hold, fields=FIELDS, choices=extra.pop("choices", []), now=timezone.now(), **extra
    )
    return started.json(), hold, flow


def succeed(hold: tasks.Hold, *, now: dt.datetime | None = None) -> None:
    transitions.succeed(
        hold=hold,
        storage_state={"cookies": [{"name": "sid", "value": "cookie-secret"}], "origins": []},
        post_login_url="https://example.com/home",
        values={},
        requirements={"kinds": [], "refs": []},
        now=now or timezone.now(),
    )


def error_of(answer: Any, status: int, code: str) -> dict[str, Any]:
    """The body of an error that has the contract's shape."""
    assert answer.status_code == status, answer.content
    assert answer["Content-Type"].startswith("application/json")
    body: dict[str, Any] = answer.json()
    assert body["code"] == code, body
    assert isinstance(body["message"], str)
    assert body["message"]
    extra = {"existing_id", "status", "answered_by", "answered_at", "limit", "running", "queued", "end"}
    assert set(body) <= {"code", "message", "details", "inner_error"} | extra
    for detail in body.get("details", []):
        assert set(detail) == {"code", "message"}
    if status in (400, 409):
        assert answer["x-should-retry"] == "false"
    return body
