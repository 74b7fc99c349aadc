"""What the tests of the verbs share: a connection, a worker's hold, and a login brought to any step of its machine."""

from __future__ import annotations

import dataclasses
import datetime as dt
import itertools
from typing import Any

from django.contrib.auth.models import User
from django.db import transaction

from connections import registry, tasks, transitions
from connections.access import Principal, of_user
from connections.models import (
    Credential,
    HealthCheck,
    LoginFlow,
    ManagedAuthConnection,
    Profile,
    Submission,
    Task,
)
from connections.states import FlowStatus, FlowStep, TaskKind, TaskStatus
from connections.tasks import Hold
from connections.transitions import SubmittedAnswer
from events.models import Event

Json = dict[str, Any]

T0 = dt.datetime(2026, 3, 1, 12, 0, tzinfo=dt.UTC)
KINDS = [TaskKind.LOGIN, TaskKind.REAUTH, TaskKind.HEALTH_CHECK]

USERNAME: Json = {
    "id": "f1", "ref": "username", "type": "identifier", "reason": "missing", "label": "User name",
    "required": True, "input_mode": "email", "observed_selector": "#user", "placeholder": "you@example.com",
}  # fmt: skip
PASSWORD: Json = {
    "id": "f2",
    "ref": "password",
    "type": "password",
    "reason": "missing",
    "label": "Password",
    "required": True,
}
NOTE: Json = {
    "id": "f3",
    "ref": "note",
    "type": "text",
    "reason": "missing",
    "label": "Note",
    "required": False,
    "hint": "if you like",
}
CODE: Json = {
    "id": "f4",
    "ref": "code",
    "type": "code",
    "reason": "missing",
    "label": "Code",
    "required": True,
    "linked_mfa_type": "sms",
}
FIELDS = [USERNAME, PASSWORD, NOTE]
GOOD = {"f1": "alice", "f2": "S3cret-of-alice"}

SMS: Json = {
    "id": "c1",
    "type": "mfa_method",
    "label": "Text ••42",
    "mfa_type": "sms",
    "masked_destination": "••42",
    "description": "by text",
}
PASSKEY: Json = {"id": "c2", "type": "mfa_method", "label": "Passkey", "mfa_type": "passkey"}
GOOGLE: Json = {
    "id": "c3",
    "type": "sso_provider",
    "label": "Google",
    "provider": "google",
    "observed_selector": "#google",
}
GITHUB: Json = {"id": "github", "type": "sso_provider", "label": "GitHub"}
ACCOUNT: Json = {"id": "c5", "type": "account", "label": "alice@work", "description": "last used today"}
CHOICES = [SMS, PASSKEY, GOOGLE, GITHUB, ACCOUNT]

STATE: Json = {"cookies": [{"name": "sid", "value": "cookie-of-the-site"}], "origins": []}


def after(seconds: float) -> dt.datetime:
    return T0 + dt.timedelta(seconds=seconds)


def events(since: int = 0) -> list[Event]:
    """The log after a cursor."""
    return list(Event.objects.filter(id__gt=since).order_by("id"))


def cursor() -> int:
    return Event.objects.order_by("-id").values_list("id", flat=True).first() or 0


def everything() -> Json:
    """Every row that a verb may write, to see that nothing changed."""
    models = (Profile, Credential, ManagedAuthConnection, LoginFlow, Submission, Task, HealthCheck)
    return {model.__name__: list(model.objects.order_by("pk").values()) for model in models}


@dataclasses.dataclass
class Story:
    """One connection, its owner, and the worker that has (or had) its task."""

    owner: User
    actor: Principal
    connection: ManagedAuthConnection
    hold: Hold | None = None
    now: dt.datetime = T0
    _names: Any = dataclasses.field(default_factory=itertools.count)

    @classmethod
    def of(cls, owner: User, domain: str = "example.com", profile: str = "work", **config: Any) -> Story:
        actor = of_user(owner)
        connection = transitions.create_connection(
            owner_id=owner.pk, domain=domain, profile_name=profile, config=config, actor=actor, now=T0
        )
        return cls(owner=owner, actor=actor, connection=connection)

    @property
    def id(self) -> str:
        return self.connection.id

    def row(self) -> ManagedAuthConnection:
        return ManagedAuthConnection.objects.get(pk=self.id)

    def flow(self) -> LoginFlow:
        flow = self.row().latest_flow()
        assert flow is not None
        return flow

    def task(self) -> Task:
        return Task.objects.get(flow=self.flow())

    def holding(self) -> Hold:
        assert self.hold is not None
        return self.hold

    def with_key(self) -> Principal:
        key, _ = registry.create_api_key(owner_id=self.owner.pk, name="test", now=T0)
        return of_user(self.owner, api_key=key)

    # What people do

    def start(self, **extra: Any) -> LoginFlow:
        flow, _ = transitions.start_login(
            connection_id=self.id, actor=extra.pop("actor", self.actor), now=self.now, **extra
        )
        return flow

    def submit(self, values: Json | None = None, **answer: Any) -> LoginFlow:
        """The canonical answer to the open question, unless ``answer`` says something else."""
        actor = answer.pop("actor", self.actor)
        flow_id = answer.pop("flow_id", None)
        if values is not None:
            answer |= {"field_values": values}
            answer.setdefault("interaction_id", self.flow().interaction_id)
        return transitions.submit(
            connection_id=self.id,
            answer=SubmittedAnswer(**answer),
            actor=actor,
            now=self.now,
            flow_id=flow_id,
        )

    def cancel(self, reason: str = "I changed my mind.") -> ManagedAuthConnection:
        return transitions.cancel(connection_id=self.id, actor=self.actor, reason=reason, now=self.now)

    # What workers do

    def claim(self) -> Hold:
        """Taken by a worker with a name of its own, as every start of a worker has."""
        self.hold = tasks.claim(worker=f"{self.id}-w{next(self._names)}", kinds=KINDS, now=self.now)
        return self.holding()

    def ask(
        self, fields: list[Json] | None = None, choices: list[Json] | None = None, **extra: Any
    ) -> LoginFlow:
        return transitions.await_input(
            hold=self.holding(),
            fields=FIELDS if fields is None else fields,
            choices=choices or [],
            now=self.now,
            **extra,
        )

    def external(
        self,
        fields: list[Json] | None = None,
        message: str = "Press 47 on your phone.",
        choices: list[Json] | None = None,
    ) -> LoginFlow:
        return transitions.await_external_action(
            hold=self.holding(), message=message, fields=fields or [], choices=choices or [], now=self.now
        )

    def taken(self) -> Story:
        """What was submitted is with the driver, if anything was: only then does it tell of something new."""
        if self.hold is not None and self.flow().step == FlowStep.SUBMITTING:
            transitions.take_submission(hold=self.hold, now=self.now)
        return self

    def human(self) -> LoginFlow:
        return transitions.await_human(
            hold=self.holding(), live_view_url="http://testserver/live/1", now=self.now
        )

    def succeed(self, values: dict[str, str] | None = None, **extra: Any) -> LoginFlow:
        return transitions.succeed(
            hold=self.holding(),
            storage_state=STATE,
            post_login_url="https://example.com/home",
            values=values or {},
            requirements=extra.pop("requirements", {"kinds": ["password"], "refs": ["password"]}),
            now=self.now,
        )

    def fail(
        self, code: str = "credentials_invalid", message: str = "Wrong password.", website_error: str = "Nope"
    ) -> LoginFlow:
        return transitions.fail(
            hold=self.holding(), code=code, message=message, website_error=website_error, now=self.now
        )

    def bring_to(self, where: str) -> Story:
        """Start a login and bring it to a step or to an end, by the ways that lead there."""
        self.start()
        if where == "queued":
            return self
        self.claim()
        match where:
            case FlowStep.DISCOVERING | TaskStatus.RUNNING:
                pass
            case FlowStep.AWAITING_INPUT | TaskStatus.WAITING_FOR_INPUT:
                self.ask()
            case FlowStep.AWAITING_EXTERNAL_ACTION:
                self.external()
            case "AWAITING_EXTERNAL_ACTION with a fallback":
                self.external([CODE])
            case FlowStep.AWAITING_HUMAN_INTERVENTION:
                self.human()
            case FlowStep.SUBMITTING:
                self.ask()
                self.submit(GOOD)
            case FlowStatus.SUCCESS | TaskStatus.COMPLETED:
                self.succeed()
            case FlowStatus.FAILED | TaskStatus.FAILED:
                self.fail()
            case FlowStatus.EXPIRED:
                assert transitions.expire_if_due(connection_id=self.id, now=T0 + dt.timedelta(hours=2))
            case FlowStatus.CANCELED | TaskStatus.KILLED:
                self.cancel()
            case _:
                raise ValueError(where)
        return self


def locked(task: Task) -> Task:
    """The row as a verb of tasks.py gets it. In a transaction."""
    assert transaction.get_connection().in_atomic_block
    return Task.objects.select_for_update().get(pk=task.pk)
