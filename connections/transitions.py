"""One verb per arrow of connections and login flows. Together with ``tasks.py`` the only writer of a status.

Each verb opens the transaction, takes the locks in the order connection → flow → task → circuit → claim → log, checks the arrow, writes, tells
and returns the row. Time is an argument. ``version`` of the connection grows by one with every change, and the flow keeps
the number of its last one, so every reader can tell the newer of two pictures.

Verbs of people come first, verbs of workers (which carry a :class:`~connections.tasks.Hold`) after them.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import re
from collections.abc import Mapping, Sequence
from typing import Any

from django.conf import settings
from django.db import IntegrityError, transaction
from django.db.models import QuerySet

from connections import health, payloads, tasks, telling, vault
from connections.access import Principal, of_system
from connections.models import (
    ApiKey,
    Credential,
    HealthCheck,
    LoginFlow,
    ManagedAuthConnection,
    Profile,
    Submission,
    Task,
    new_id,
)
from connections.states import (
    ANSWERABLE,
    FLOW_ARROWS,
    TASK_END,
    ConnectionStatus,
    FlowStatus,
    FlowStep,
    FlowType,
    TaskKind,
    TaskStatus,
)
from connections.tasks import Hold, InvalidTransition, LeaseLost
from events import clients
from events.envelope import topic_of

Json = dict[str, Any]

#: Wire contract, section 6: the same login request again within this time gets the same answer.
LOGIN_REPLAY = dt.timedelta(seconds=30)
MAX_VALUE = 10_000

CONFIG = frozenset(
    {
        "login_url",
        "allowed_domains",
        "credential",
        "external_credential",
        "save_credentials",
        "record_session",
        "health_checks",
        "auto_reauth",
        "health_check_interval",
        "browser",
        "proxy",
        "browser_telemetry",
    }
)

#: Changes after which a check is planned anew, and after which re-authentications that failed are worth another try.
_PLANS = frozenset({"health_checks", "health_check_interval"})
_HELPS = frozenset(
    {"login_url", "allowed_domains", "credential", "external_credential", "health_checks", "auto_reauth"}
)

#: Who starts re-authentications.
_HEALTH = of_system("health check")

_TASK_OF_END = {
    FlowStatus.SUCCESS: TaskStatus.COMPLETED,
    FlowStatus.FAILED: TaskStatus.FAILED,
    FlowStatus.EXPIRED: TaskStatus.FAILED,
    FlowStatus.CANCELED: TaskStatus.KILLED,
}


class AlreadyExists(Exception):
    """The profile has a connection to this domain already."""

    def __init__(self, existing_id: str) -> None:
        super().__init__(existing_id)
        self.existing_id = existing_id


class QuotaReached(Exception):
    """The owner has as many connections as the installation allows."""


class LoginInProgress(Exception):
    """A flow that has not expired is running."""

    def __init__(self, flow: LoginFlow) -> None:
        super().__init__(flow.id)
        self.flow = flow


class StaleInteraction(Exception):
    """The question that was answered is not the one being asked. The text is fit to be shown.

    ``first``: the answer that was accepted instead, if there was one. ``asking``: another question is open by now.
    """

    def __init__(self, message: str, *, first: Submission | None = None, asking: bool = False) -> None:
        super().__init__(message)
        self.answered_by = first.submitted_by if first else ""
        self.answered_at = first.created_at if first else None
        self.asking = asking


class InvalidSubmission(Exception):
    """The answer does not fit the question. The text is fit to be shown and holds no submitted value."""

    def __init__(self, message: str, details: Sequence[Mapping[str, str]] = ()) -> None:
        super().__init__(message)
        self.details = list(details)


class FlowOver(Exception):
    """No flow is running (any more). ``flow`` is the last one, if there was one."""

    def __init__(self, flow: LoginFlow | None) -> None:
        super().__init__(flow.status if flow else "no flow")
        self.flow = flow


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class SubmittedAnswer:
    """What came in for one interaction: canonical (first three) or legacy (the rest), never both. Never printed."""

    interaction_id: str | None = None
    field_values: Mapping[str, str] | None = None
    choice_id: str | None = None
    fields: Mapping[str, str] | None = None
    mfa_option_id: str | None = None
    sign_in_option_id: str | None = None
    sso_button_selector: str | None = None
    sso_provider: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class TakenAnswer:
    """What the worker takes from a submission, once."""

    field_values: dict[str, str]
    choice_id: str | None


# ── Locks, versions, telling ──────────────────────────────────────────────────────────────────────────────────────


def _lock(connection_id: str) -> ManagedAuthConnection:
    # No join under the lock: after waiting for it PostgreSQL reads the row anew, and joins it to what was there before.
    return ManagedAuthConnection.objects.select_for_update().get(pk=connection_id)


def _running(connection: ManagedAuthConnection) -> LoginFlow | None:
    flow = connection.flows.select_for_update().filter(status=FlowStatus.IN_PROGRESS).first()
    if flow is not None:
        flow.connection = connection
    return flow


def _bump(connection: ManagedAuthConnection, now: dt.datetime, *, touch: bool = False) -> None:
    connection.version += 1
    fields = ["version"]
    if touch:
        connection.updated_at = now
        fields.append("updated_at")
    connection.save(update_fields=fields)


def _save_flow(flow: LoginFlow, *, at: dt.datetime, actor: str) -> None:
    """Write the flow under the next version, and tell."""
    _bump(flow.connection, at)
    flow.version = flow.connection.version
    flow.updated_at = at
    flow.save()
    telling.flow_state(flow, at=at, actor=actor)


def _step(flow: LoginFlow, step: FlowStep, *, now: dt.datetime) -> None:
    """Take one arrow: whatever was asked before is gone."""
    if step not in FLOW_ARROWS[FlowStep(flow.step)]:
        raise InvalidTransition(flow.step, step)
    flow.step = step
    flow.step_entered_at = now
    flow.interaction_id = ""
    flow.input_expires_at = None
    flow.fields = []
    flow.choices = []
    flow.external_action_message = ""
    flow.website_error = ""
    flow.live_view_url = ""


def _end(
    flow: LoginFlow,
    status: FlowStatus,
    *,
    at: dt.datetime,
    now: dt.datetime,
    actor: str,
    website_error: str = "",
) -> None:
    """To one of the ends, the task with it. ``at`` is when it happened, ``now`` when it was noticed."""
    _step(flow, FlowStep.COMPLETED, now=at)
    flow.status = status
    flow.completed_at = at
    flow.website_error = website_error
    # The hosted page's code dies with the flow; its hash stays, so that a late use is known to be late.
    flow.handoff_sealed = None
    flow.submissions.exclude(sealed=None).update(sealed=None, taken_at=now)
    if flow.type == FlowType.REAUTH and status in (FlowStatus.FAILED, FlowStatus.EXPIRED):
        health.reauth_failed(flow.connection, now)
        flow.connection.save(update_fields=["reauths_failed", "reauth_after"])
    # Locked before anything is told: telling takes the lock of the log, which comes last (tasks.claim has its task, and then tells).
    task = Task.objects.select_for_update().filter(flow=flow).exclude(status__in=TASK_END).first()
    # There is nothing left to handle.
    clients.finish(topic_of("connection", flow.connection_id), actor=actor)
    _save_flow(flow, at=at, actor=actor)
    if task is not None:
        error = flow.error_message or ("" if status == FlowStatus.SUCCESS else flow.get_status_display())
        tasks.finish(task, _TASK_OF_END[status], actor=actor, now=at, error=error)


def _expire(flow: LoginFlow, *, now: dt.datetime) -> None:
    deadline = flow.deadline() or now
    if (
        flow.step == FlowStep.AWAITING_INPUT
        and flow.input_expires_at
        and flow.input_expires_at <= flow.expires_at
    ):
        flow.error_code = "awaiting_input_timeout"
        flow.error_message = "Nobody answered in time."
    elif flow.step == FlowStep.AWAITING_EXTERNAL_ACTION:
        flow.error_code = "external_action_timeout"
        flow.error_message = "The sign-in was not approved in time."
    else:
        flow.error_code = "session_expired"
        flow.error_message = "The login took longer than it may."
    _end(flow, FlowStatus.EXPIRED, at=deadline, now=now, actor="time limit")


def _actor(principal: Principal) -> str:
    return principal.name[:200]


# ── Connections ───────────────────────────────────────────────────────────────────────────────────────────────────


def create_connection(
    *,
    owner_id: int,
    domain: str,
    profile_name: str,
    config: Mapping[str, Any],
    actor: Principal,
    now: dt.datetime,
) -> ManagedAuthConnection:
    """A new connection of ``owner_id``; the profile is made when it does not exist. ``config`` has keys of CONFIG.

    :raises AlreadyExists: profile and domain have one.
    :raises QuotaReached: the owner has too many.
    """
    unknown = set(config) - CONFIG
    if unknown:
        raise ValueError(f"not part of a connection's configuration: {sorted(unknown)}")
    try:
        with transaction.atomic():
            profile, _ = Profile.objects.get_or_create(
                owner_id=owner_id, name=profile_name, defaults={"created_at": now, "updated_at": now}
            )
            existing = ManagedAuthConnection.objects.filter(profile=profile, domain=domain).first()
            if existing is not None:
                raise AlreadyExists(existing.id)
            if ManagedAuthConnection.objects.filter(owner_id=owner_id).count() >= settings.CONNECTION_QUOTA:
                raise QuotaReached(f"At most {settings.CONNECTION_QUOTA} connections can be kept.")
            row = ManagedAuthConnection.objects.create(
                owner_id=owner_id, profile=profile, domain=domain, created_at=now, updated_at=now, **config
            )
            telling.connection("connection.created", row, at=now, actor=_actor(actor))
            return row
    except IntegrityError:
        # Two identical requests at once: the other one was first.
        other = ManagedAuthConnection.objects.filter(
            owner_id=owner_id, profile__name=profile_name, domain=domain
        ).first()
        if other is None:
            raise
        raise AlreadyExists(other.id) from None


def update_connection(
    *, connection_id: str, changes: Mapping[str, Any], actor: Principal, now: dt.datetime
) -> ManagedAuthConnection:
    """Change what ``changes`` names (keys of CONFIG). Nothing different is no change and tells nothing."""
    unknown = set(changes) - CONFIG
    if unknown:
        raise ValueError(f"not part of a connection's configuration: {sorted(unknown)}")
    with transaction.atomic():
        row = _lock(connection_id)
        different = {name: value for name, value in changes.items() if getattr(row, name) != value}
        if different:
            for name, value in different.items():
                setattr(row, name, value)
            if _PLANS & set(different):
                health.plan(row, now)
            if _HELPS & set(different):
                health.begin_anew(row, now)
            row.version += 1
            row.updated_at = now
            row.save()
            telling.connection("connection.updated", row, at=now, actor=_actor(actor))
        return row


def handle(*, subject: str, **claim: Any) -> dict[str, Any]:
    """A client is handling the login of ``connection:<id>`` from now on: :func:`events.clients.take`.

    :raises ManagedAuthConnection.DoesNotExist: it was deleted meanwhile; nothing would ever remove the claim.
    """
    with transaction.atomic():
        _lock(subject.partition(":")[2])
        return clients.take(subject=subject, **claim)


def attend(*, subject: str, **presence: Any) -> None:
    """A client looks at ``connection:<id>``, or types: :func:`events.clients.be_present`.

    :raises ManagedAuthConnection.DoesNotExist: as for :func:`handle`.
    """
    with transaction.atomic():
        _lock(subject.partition(":")[2])
        clients.be_present(subject=subject, **presence)


def delete_connection(*, connection_id: str, actor: Principal, now: dt.datetime) -> None:
    """Cancel what runs, then delete the connection and its flows. Its finished tasks stay as history."""
    with transaction.atomic():
        row = _lock(connection_id)
        flow = _running(row)
        # All of them before the first is told: the lock of the log comes last.
        running = list(row.tasks.select_for_update().exclude(status__in=TASK_END).order_by("pk"))
        clients.forget(topic_of("connection", row.id), *(topic_of("task", task.id) for task in running))
        if flow is not None:
            _cancel(flow, actor=actor, reason="The connection was deleted.", now=now)
        for task in row.tasks.exclude(status__in=TASK_END).order_by("pk"):
            tasks.finish(
                task,
                TaskStatus.KILLED,
                actor=_actor(actor),
                now=now,
                error="The connection was deleted.",
                handled=False,
            )
        row.version += 1
        row.updated_at = now
        telling.connection("connection.deleted", row, at=now, actor=_actor(actor))
        row.delete()


def _set_status(
    row: ManagedAuthConnection, status: ConnectionStatus, *, reason: str, now: dt.datetime, actor: str
) -> None:
    previous = row.status
    if previous == status:
        return
    row.status = status
    row.version += 1
    row.updated_at = now
    row.save(update_fields=["status", "version", "updated_at"])
    telling.connection_status(row, previous=previous, reason=reason, at=now, actor=actor)


# ── Login flows: what people do ───────────────────────────────────────────────────────────────────────────────────


def start_login(
    *, connection_id: str, actor: Principal, now: dt.datetime, flow_type: FlowType = FlowType.LOGIN
) -> tuple[LoginFlow, str]:
    """Start a flow and queue its task; returns the flow and the one-time code of its hosted page.

    The same key asking again within 30 s, while nothing was submitted, gets the same answer.

    :raises LoginInProgress: an unexpired flow runs.
    """
    with transaction.atomic():
        connection = _lock(connection_id)
        running = _running(connection)
        if running is not None and running.is_due(now):
            _expire(running, now=now)
            running = None
        if running is not None:
            if _is_replay_of_login(running, actor.api_key, now):
                return running, vault.unseal(running.handoff_sealed)
            raise LoginInProgress(running)
        return _begin(connection, flow_type, actor=actor, now=now)


def _begin(
    connection: ManagedAuthConnection, flow_type: FlowType, *, actor: Principal, now: dt.datetime
) -> tuple[LoginFlow, str]:
    """The next flow of a locked connection that has none running, and its task. Takes no lock: something may have been told."""
    last = connection.flows.order_by("-number").values_list("number", flat=True).first() or 0
    code = vault.new_code()
    flow = LoginFlow(
        connection=connection,
        number=last + 1,
        type=flow_type,
        step_entered_at=now,
        started_at=now,
        updated_at=now,
        expires_at=now + dt.timedelta(seconds=settings.FLOW_SECONDS),
        started_by=_actor(actor),
        started_by_key=actor.api_key,
        handoff_hash=vault.hash_token(code),
        handoff_sealed=vault.seal(code),
    )
    _save_flow(flow, at=now, actor=_actor(actor))
    again = flow_type == FlowType.REAUTH
    tasks.enqueue(
        kind=TaskKind.REAUTH if again else TaskKind.LOGIN,
        title=f"Log in to {connection.domain}{' again' if again else ''}",
        connection=connection,
        flow=flow,
        actor=_actor(actor),
        now=now,
    )
    return flow, code


def _is_replay_of_login(flow: LoginFlow, key: ApiKey | None, now: dt.datetime) -> bool:
    return (
        key is not None
        and flow.started_by_key_id == key.pk
        and now - flow.started_at <= LOGIN_REPLAY
        and flow.handoff_sealed is not None
        and not flow.submissions.exists()
    )


def new_handoff(*, connection_id: str, actor: Principal, now: dt.datetime) -> tuple[LoginFlow, str]:
    """A fresh one-time code for the running flow. The one before stops working.

    :raises FlowOver: none is running.
    """
    expire_if_due(connection_id=connection_id, now=now)
    with transaction.atomic():
        connection = _lock(connection_id)
        flow = _running(connection)
        if flow is None:
            raise FlowOver(connection.latest_flow())
        code = vault.new_code()
        flow.handoff_hash = vault.hash_token(code)
        flow.handoff_sealed = vault.seal(code)
        flow.exchanged_at = None
        flow.exchanged_by = ""
        flow.save(update_fields=["handoff_hash", "handoff_sealed", "exchanged_at", "exchanged_by"])
        return flow, code


def submit(
    *,
    connection_id: str,
    answer: SubmittedAnswer,
    actor: Principal,
    now: dt.datetime,
    flow_id: str | None = None,
) -> LoginFlow:
    """Accept the answer to the open interaction: consumes the interaction and sets SUBMITTING in one transaction.

    The identical answer to the interaction just accepted is accepted again and acted on once. ``flow_id`` binds the caller
    to one flow (the token of a hosted page).

    :raises StaleInteraction: another question is open by now, or none.
    :raises InvalidSubmission: the answer does not fit the question.
    :raises FlowOver: the flow ended.
    """
    expire_if_due(connection_id=connection_id, now=now)
    with transaction.atomic():
        connection = _lock(connection_id)
        flow = connection.flows.select_for_update().order_by("-number").first()
        if flow is None or (flow_id is not None and flow.id != flow_id):
            raise FlowOver(flow)
        flow.connection = connection
        canonical = _is_canonical(answer)
        fingerprint = vault.fingerprint([flow.id, dataclasses.asdict(answer)])
        last = flow.submissions.order_by("-pk").first()
        if last is not None and _is_replay_of_submission(flow, last, answer, fingerprint):
            return flow
        if flow.is_over:
            raise FlowOver(flow)
        if flow.step not in ANSWERABLE or not flow.interaction_id:
            raise StaleInteraction(
                "Nothing is being asked right now. This answer was not used.",
                first=_first_answer(flow, answer, actor),
            )
        if answer.interaction_id is not None and answer.interaction_id != flow.interaction_id:
            raise StaleInteraction(
                "The site asks something else by now. Please answer the new question.",
                first=_first_answer(flow, answer, actor),
                asking=True,
            )
        values, choice = _canonical_answer(flow, answer) if canonical else _legacy_answer(flow, answer)
        Submission.objects.create(
            flow=flow,
            interaction_id=flow.interaction_id,
            fingerprint=fingerprint,
            sealed=vault.seal({"field_values": values, "choice_id": choice["id"] if choice else None}),
            field_count=len(values),
            submitted_by=_actor(actor),
            created_at=now,
        )
        _step(flow, FlowStep.SUBMITTING, now=now)
        if choice is not None and choice["type"] == "sso_provider":
            flow.sso_provider = payloads.provider_of(choice)
        # As in _end: whatever is locked is locked before the first is told.
        task = Task.objects.select_for_update().filter(flow=flow).first()
        _save_flow(flow, at=now, actor=_actor(actor))
        if task is not None:
            tasks.resume(task, actor=_actor(actor), now=now)
        return flow


def _first_answer(flow: LoginFlow, answer: SubmittedAnswer, actor: Principal) -> Submission | None:
    """The accepted answer to the question that ``answer`` was meant for. The hosted page does not learn who works here."""
    if actor.is_page:
        return None
    rows = flow.submissions.order_by("-pk")
    # An answer of the older kind names no question: it was meant for the last one.
    return rows.first() if answer.interaction_id is None else answer_to(flow, answer.interaction_id)


def answer_to(flow: LoginFlow, interaction_id: str) -> Submission | None:
    """The answer that was accepted for this question: who gave it, and when."""
    return flow.submissions.filter(interaction_id=interaction_id).first()


def _is_canonical(answer: SubmittedAnswer) -> bool:
    canonical = answer.field_values is not None or answer.choice_id is not None
    modes = [
        answer.mfa_option_id,
        answer.sign_in_option_id,
        answer.sso_button_selector,
        answer.sso_provider,
    ]
    legacy = sum(mode is not None for mode in modes)
    # React sends an empty ``fields`` beside another legacy mode; it counts as absent.
    if answer.fields is not None and (answer.fields or not legacy):
        legacy += 1
    if canonical and legacy:
        raise InvalidSubmission(
            "field_values and selected_choice_id cannot be sent together with the older fields, mfa_option_id, "
            "sign_in_option_id, sso_button_selector or sso_provider."
        )
    if not canonical and not legacy:
        raise InvalidSubmission("Nothing was submitted.")
    if legacy > 1:
        raise InvalidSubmission("Only one kind of answer can be submitted at a time.")
    return canonical


def _is_replay_of_submission(
    flow: LoginFlow, last: Submission, answer: SubmittedAnswer, fingerprint: str
) -> bool:
    if not vault.same(last.fingerprint, fingerprint):
        return False
    # Without an id the same words may answer a new question (the password once more): only a closed one is a replay.
    return answer.interaction_id == last.interaction_id or not flow.interaction_id


def _canonical_answer(flow: LoginFlow, answer: SubmittedAnswer) -> tuple[dict[str, str], Json | None]:
    choice = None
    if answer.choice_id is not None:
        choice = next((c for c in flow.choices if c["id"] == answer.choice_id), None)
        if choice is None:
            raise InvalidSubmission("That choice is not offered.")
    given = answer.field_values or {}
    values = {field["id"]: given[field["id"]] for field in flow.fields if field["id"] in given}
    if choice is None:
        _require(flow, values)
    return _checked(values), choice


def _legacy_answer(flow: LoginFlow, answer: SubmittedAnswer) -> tuple[dict[str, str], Json | None]:
    def pick(matches: Any) -> Json:
        choice = next((c for c in flow.choices if matches(c)), None)
        if choice is None:
            raise InvalidSubmission("That choice is not offered.")
        return choice

    if answer.mfa_option_id is not None:
        wanted = answer.mfa_option_id
        return {}, pick(
            lambda c: (
                c["type"] == "mfa_method"
                and wanted in (payloads.legacy_mfa_type(c), c.get("mfa_type"), c["id"], c["label"])
            )
        )
    if answer.sign_in_option_id is not None:
        return {}, pick(
            lambda c: c["type"] not in ("mfa_method", "sso_provider") and c["id"] == answer.sign_in_option_id
        )
    if answer.sso_button_selector is not None:
        return {}, pick(
            lambda c: (
                c["type"] == "sso_provider"
                and (c.get("observed_selector") or "") == answer.sso_button_selector
            )
        )
    if answer.sso_provider is not None:
        return {}, pick(
            lambda c: c["type"] == "sso_provider" and payloads.provider_of(c) == answer.sso_provider
        )
    given = answer.fields or {}
    values = {field["id"]: given[field["ref"]] for field in flow.fields if field["ref"] in given}
    _require(flow, values)
    return _checked(values), None


def _require(flow: LoginFlow, values: Mapping[str, str]) -> None:
    missing = [
        field
        for field in flow.fields
        if field.get("required", True) and not values.get(field["id"], "").strip()
    ]
    if missing:
        raise InvalidSubmission(
            "Please fill in: " + ", ".join(field["label"] for field in missing) + ".",
            [
                {"code": "required", "message": f"{field['id']}: {field['label']} is required."}
                for field in missing
            ],
        )
    if not values:
        raise InvalidSubmission("None of the fields that were sent is being asked for.")


def _checked(values: dict[str, str]) -> dict[str, str]:
    if any(len(value) > MAX_VALUE for value in values.values()):
        raise InvalidSubmission(f"A value is longer than {MAX_VALUE} characters.")
    return values


def cancel(*, connection_id: str, actor: Principal, reason: str, now: dt.datetime) -> ManagedAuthConnection:
    """End the running flow as CANCELED. Without one nothing changes: saying it twice is the same as once."""
    expire_if_due(connection_id=connection_id, now=now)
    with transaction.atomic():
        connection = _lock(connection_id)
        flow = _running(connection)
        if flow is not None:
            _cancel(flow, actor=actor, reason=reason, now=now)
        return connection


def _cancel(flow: LoginFlow, *, actor: Principal, reason: str, now: dt.datetime) -> None:
    flow.ended_by = _actor(actor)
    flow.end_reason = reason[:500]
    flow.error_message = reason[:500]
    _end(flow, FlowStatus.CANCELED, at=now, now=now, actor=_actor(actor))


def expire_if_due(*, connection_id: str, now: dt.datetime) -> bool:
    """Expire the running flow if its time is over. Reading does this too, so nobody sees a dead flow as alive."""
    running = LoginFlow.objects.filter(connection_id=connection_id, status=FlowStatus.IN_PROGRESS).first()
    if running is None or not running.is_due(now):
        return False
    with transaction.atomic():
        try:
            flow = _running(_lock(connection_id))
        except ManagedAuthConnection.DoesNotExist:
            # Deleted since the look above, and its flow with it.
            return False
        if flow is None or not flow.is_due(now):
            return False
        _expire(flow, now=now)
        return True


def acknowledge(*, flow_id: str, actor: Principal, now: dt.datetime) -> LoginFlow:
    """Somebody has seen that this flow failed or expired: it needs attention no longer.

    :raises InvalidTransition: the flow is still running.
    """
    connection_id = LoginFlow.objects.values_list("connection_id", flat=True).get(pk=flow_id)
    with transaction.atomic():
        connection = _lock(connection_id)
        flow = connection.flows.select_for_update().get(pk=flow_id)
        flow.connection = connection
        if not flow.is_over:
            raise InvalidTransition(flow.status, "acknowledged")
        if flow.acknowledged_at is None:
            flow.acknowledged_at = now
            flow.save(update_fields=["acknowledged_at"])
            _bump(connection, now)
            telling.connection("connection.updated", connection, at=now, actor=_actor(actor))
        return flow


def request_check(*, connection_id: str, actor: Principal, now: dt.datetime) -> Task:
    """Queue a health check. One that is waiting or running already is the one; if it is the clock's, it is this person's from now on, too."""
    with transaction.atomic():
        connection = _lock(connection_id)
        waiting = _open_checks(connection).first()
        if waiting is None:
            return _queue_check(connection, actor=actor, spec={}, now=now)
        if waiting.spec and not waiting.spec.get("asked"):
            # Its spec alone: a worker may be moving it on at this moment.
            waiting.spec = {**waiting.spec, "asked": True}
            waiting.save(update_fields=["spec"])
        return waiting


def _open_checks(connection: ManagedAuthConnection) -> QuerySet[Task]:
    return connection.tasks.filter(kind=TaskKind.HEALTH_CHECK).exclude(status__in=TASK_END)


def _queue_check(
    connection: ManagedAuthConnection, *, actor: Principal, spec: Mapping[str, Any], now: dt.datetime
) -> Task:
    return tasks.enqueue(
        kind=TaskKind.HEALTH_CHECK,
        title=f"Check {connection.domain}",
        connection=connection,
        spec=spec,
        actor=_actor(actor),
        now=now,
    )


def check_by_clock(*, connection_id: str, now: dt.datetime) -> bool:
    """Queue the check that is due, or put it off while the circuit of its site is open. False: it is not due (any more), or has to wait."""
    with transaction.atomic():
        try:
            connection = _lock(connection_id)
        except ManagedAuthConnection.DoesNotExist:
            return False
        if connection.next_check_at is None or connection.next_check_at > now:
            return False
        if not health.is_checked(connection):
            connection.next_check_at = None
            connection.save(update_fields=["next_check_at"])
            return False
        busy = connection.flows.filter(status=FlowStatus.IN_PROGRESS).exists()
        if busy or _open_checks(connection).exists():
            return False
        allowed = health.ask(connection.domain, now)
        if allowed.until is not None:
            health.put_off(connection, allowed.until)
        else:
            # Planned from now on: should this one get lost, the next one comes all the same.
            health.plan(connection, now)
        connection.save(update_fields=["next_check_at"])
        if allowed.until is None:
            _queue_check(
                connection,
                actor=_HEALTH,
                spec=health.AS_TRIAL if allowed.trial else health.BY_CLOCK,
                now=now,
            )
        return True


def plan_check(*, connection_id: str, now: dt.datetime) -> bool:
    """Give one that is checked by the clock and has no plan its first check, anywhere within its interval."""
    with transaction.atomic():
        try:
            connection = _lock(connection_id)
        except ManagedAuthConnection.DoesNotExist:
            return False
        if connection.next_check_at is not None or not health.is_checked(connection):
            return False
        health.spread(connection, now)
        connection.save(update_fields=["next_check_at"])
        return True


def reauth_by_clock(*, connection_id: str, now: dt.datetime) -> bool:
    """Start the re-authentication that is due: one before it has failed, and its pause is over. False: there is none to start."""
    with transaction.atomic():
        try:
            connection = _lock(connection_id)
        except ManagedAuthConnection.DoesNotExist:
            return False
        if connection.reauth_after is None or connection.reauth_after > now:
            return False
        if _running(connection) is not None:
            return False
        connection.reauth_after = None
        connection.save(update_fields=["reauth_after"])
        if connection.status != ConnectionStatus.NEEDS_AUTH or not health.signs_in_again(connection):
            return False
        _begin(connection, FlowType.REAUTH, actor=_HEALTH, now=now)
        return True


def kill_task(*, task_id: str, actor: Principal, reason: str, now: dt.datetime) -> Task:
    """End a task before its time. One that waits in the queue is killed at once; of one that runs, its holder is told, and ends it. A login is
    canceled. Killed already, or being killed, is no change.

    :raises TaskOver: it has ended otherwise: what it became stays (row C22).
    """
    found = Task.objects.get(pk=task_id)
    if found.flow_id is not None and found.connection_id is not None and not found.is_over:
        cancel(connection_id=found.connection_id, actor=actor, reason=reason, now=now)
    with transaction.atomic():
        row = Task.objects.select_for_update().get(pk=task_id)
        if row.status == TaskStatus.KILLED:
            return row
        if row.is_over:
            raise tasks.TaskOver(row.status)
        if row.status == TaskStatus.QUEUED or row.kind == TaskKind.HEALTH_CHECK:
            row.kill_requested_at = now
            row.kill_requested_by = _actor(actor)
            row.kill_reason = reason[:500]
            row.save(update_fields=["kill_requested_at", "kill_requested_by", "kill_reason"])
            tasks.finish(row, TaskStatus.KILLED, actor=_actor(actor), now=now)
        else:
            tasks.request_kill(row, actor=_actor(actor), reason=reason, now=now)
        return row


# ── Login flows: what workers do ──────────────────────────────────────────────────────────────────────────────────


def _lock_held_flow(hold: Hold, now: dt.datetime) -> tuple[LoginFlow, Task]:
    """The running flow behind a hold, locked in order.

    :raises LeaseLost: the hold is not the present one, or the connection is gone.
    :raises FlowOver: the flow has ended.
    """
    try:
        connection = _lock(str(hold.connection_id))
        flow = connection.flows.select_for_update().get(pk=hold.flow_id)
    except (ManagedAuthConnection.DoesNotExist, LoginFlow.DoesNotExist):
        raise LeaseLost(hold.task_id) from None
    flow.connection = connection
    if flow.is_over:
        raise FlowOver(flow)
    return flow, tasks.lock_held(hold)


def _before_work(hold: Hold, now: dt.datetime) -> None:
    """A worker that comes after the deadline finds the flow expired, as everybody else does."""
    if hold.connection_id and expire_if_due(connection_id=hold.connection_id, now=now):
        raise FlowOver(LoginFlow.objects.filter(pk=hold.flow_id).first())


def discovering(*, hold: Hold, now: dt.datetime) -> LoginFlow:
    """→ DISCOVERING: the worker looks at the site. There already is no change."""
    return _work_on(hold, FlowStep.DISCOVERING, now)


def submit_stored(*, hold: Hold, now: dt.datetime) -> LoginFlow:
    """→ SUBMITTING with values of the credential, so nobody is asked. There already is no change."""
    return _work_on(hold, FlowStep.SUBMITTING, now)


def _work_on(hold: Hold, step: FlowStep, now: dt.datetime) -> LoginFlow:
    _before_work(hold, now)
    with transaction.atomic():
        flow, task = _lock_held_flow(hold, now)
        if flow.step != step:
            _step(flow, step, now=now)
            _save_flow(flow, at=now, actor=hold.worker)
            tasks.resume(task, actor=hold.worker, now=now)
        return flow


def await_input(
    *,
    hold: Hold,
    fields: list[Json],
    choices: list[Json],
    website_error: str = "",
    sso_provider: str = "",
    now: dt.datetime,
) -> LoginFlow:
    """→ AWAITING_INPUT with a new interaction. ``fields`` and ``choices`` as in ``drivers/base.py``."""
    _before_work(hold, now)
    with transaction.atomic():
        flow, task = _lock_held_flow(hold, now)
        # An answer that nobody took belongs to the question before: it must never be given to this one.
        flow.submissions.filter(taken_at=None).update(sealed=None, taken_at=now)
        _step(flow, FlowStep.AWAITING_INPUT, now=now)
        flow.interaction_id = new_id("mai")
        flow.input_expires_at = min(now + dt.timedelta(seconds=settings.INPUT_SECONDS), flow.expires_at)
        flow.fields = fields
        flow.choices = choices
        flow.website_error = website_error
        flow.sso_provider = sso_provider or flow.sso_provider
        _save_flow(flow, at=now, actor=hold.worker)
        tasks.wait_for_input(task, actor=hold.worker, now=now)
        return flow


def await_external_action(
    *,
    hold: Hold,
    message: str,
    fields: list[Json],
    choices: list[Json],
    website_error: str = "",
    now: dt.datetime,
) -> LoginFlow:
    """→ AWAITING_EXTERNAL_ACTION. Telling the same again is no change; fallbacks open an interaction."""
    _before_work(hold, now)
    with transaction.atomic():
        flow, task = _lock_held_flow(hold, now)
        if _answered_meanwhile(flow):
            # A way on was chosen while the driver looked at the page: it is about to take that answer.
            return flow
        same = flow.step == FlowStep.AWAITING_EXTERNAL_ACTION and (
            (flow.fields, flow.choices, flow.website_error) == (fields, choices, website_error)
        )
        if same and _without_countdown(flow.external_action_message) == _without_countdown(message):
            return flow
        # A new text beside the same ways on is the same question: whoever is answering it may go on.
        interaction_id = flow.interaction_id if same else ""
        _step(flow, FlowStep.AWAITING_EXTERNAL_ACTION, now=now)
        flow.external_action_message = message
        flow.fields = fields
        flow.choices = choices
        flow.website_error = website_error
        if fields or choices:
            flow.interaction_id = interaction_id or new_id("mai")
        _save_flow(flow, at=now, actor=hold.worker)
        tasks.wait_for_input(task, actor=hold.worker, now=now)
        return flow


def _answered_meanwhile(flow: LoginFlow) -> bool:
    return flow.submissions.filter(taken_at=None).exists()


#: "42 seconds left", "1:40": what falls by itself is no change. A number to compare on the phone is one.
_COUNTDOWN = re.compile(r"\d+:\d\d|\d+(?=\s*(?:s|secs?|seconds?|m|mins?|minutes?)\b)", re.IGNORECASE)


def _without_countdown(message: str) -> str:
    return _COUNTDOWN.sub("#", message)


def await_human(*, hold: Hold, live_view_url: str, now: dt.datetime) -> LoginFlow:
    """→ AWAITING_HUMAN_INTERVENTION: somebody has to act in the browser itself (browser driver)."""
    _before_work(hold, now)
    with transaction.atomic():
        flow, task = _lock_held_flow(hold, now)
        _step(flow, FlowStep.AWAITING_HUMAN_INTERVENTION, now=now)
        flow.live_view_url = live_view_url
        _save_flow(flow, at=now, actor=hold.worker)
        tasks.wait_for_input(task, actor=hold.worker, now=now)
        return flow


def take_submission(*, hold: Hold, now: dt.datetime) -> TakenAnswer | None:
    """The values that wait for this worker, once: they are erased in the same transaction. None when none wait."""
    if not Submission.objects.filter(flow_id=hold.flow_id, taken_at=None).exists():
        return None
    with transaction.atomic():
        flow, _ = _lock_held_flow(hold, now)
        row = flow.submissions.filter(taken_at=None).order_by("-pk").first()
        if row is None:
            return None
        content = vault.unseal(row.sealed)
        row.sealed = None
        row.taken_at = now
        row.save(update_fields=["sealed", "taken_at"])
        return TakenAnswer(field_values=content["field_values"], choice_id=content["choice_id"])


def succeed(
    *,
    hold: Hold,
    storage_state: Json,
    post_login_url: str,
    values: Mapping[str, str],
    requirements: Json,
    now: dt.datetime,
) -> LoginFlow:
    """→ SUCCESS: flow, profile state and AUTHENTICATED in one transaction; ``values`` (by ref) are kept if wanted."""
    _before_work(hold, now)
    with transaction.atomic():
        flow, _ = _lock_held_flow(hold, now)
        connection = flow.connection
        before = _looks(connection)
        profile = connection.profile
        profile.state = vault.seal(storage_state)
        profile.state_saved_at = now
        profile.last_used_at = now
        profile.updated_at = now
        profile.save(update_fields=["state", "state_saved_at", "last_used_at", "updated_at"])
        if connection.save_credentials and values:
            connection.credential = _keep_values(connection, values, now)
        connection.post_login_url = post_login_url[:2000]
        connection.authenticated_at = now
        connection.requirements = requirements
        health.signed_in(connection, now)
        connection.save(
            update_fields=[
                "credential",
                "post_login_url",
                "authenticated_at",
                "requirements",
                *health.FIELDS,
            ]
        )
        flow.post_login_url = post_login_url[:2000]
        flow.error_code = ""
        flow.error_message = ""
        _end(flow, FlowStatus.SUCCESS, at=now, now=now, actor=hold.worker)
        if _looks(connection) != before:
            # What is stored by now decides can_reauth and the credential that GET shows.
            _bump(connection, now, touch=True)
            telling.connection("connection.updated", connection, at=now, actor=hold.worker)
        _set_status(
            connection, ConnectionStatus.AUTHENTICATED, reason="login_succeeded", now=now, actor=hold.worker
        )
        return flow


def _looks(connection: ManagedAuthConnection) -> Json:
    """What GET shows of the connection itself, without what every change changes."""
    shown: Json = dict(payloads.connection_fields(connection))
    for name in ("version", "updated_at"):
        del shown[name]
    return shown


def _keep_values(
    connection: ManagedAuthConnection, values: Mapping[str, str], now: dt.datetime
) -> Credential:
    """The connection's credential with ``values`` merged in; made when there is none."""
    row = connection.credential
    if row is not None:
        row = Credential.objects.select_for_update().get(pk=row.pk)
        merged = {**vault.unseal(row.values), **values}
    else:
        merged = dict(values)
        name = f"{connection.domain}/{connection.profile.name}"[:240]
        if Credential.objects.filter(owner_id=connection.owner_id, name=name).exists():
            name = f"{name} {connection.id[-8:]}"
        row = Credential(owner_id=connection.owner_id, name=name, domain=connection.domain, created_at=now)
    row.values = vault.seal(merged)
    row.value_keys = sorted(merged)
    row.updated_at = now
    row.save()
    return row


def fail(*, hold: Hold, code: str, message: str, website_error: str = "", now: dt.datetime) -> LoginFlow:
    """→ FAILED. The profile stays as it was."""
    _before_work(hold, now)
    with transaction.atomic():
        flow, _ = _lock_held_flow(hold, now)
        _fail(flow, code=code, message=message, website_error=website_error, now=now, actor=hold.worker)
        return flow


def _fail(
    flow: LoginFlow, *, code: str, message: str, website_error: str, now: dt.datetime, actor: str
) -> None:
    flow.error_code = code
    flow.error_message = message
    _end(flow, FlowStatus.FAILED, at=now, now=now, actor=actor, website_error=website_error)


def give_back(*, hold: Hold, now: dt.datetime) -> None:
    """The worker stops: its task goes back to the queue and its flow to DISCOVERING. Losing the race is fine."""
    with transaction.atomic():
        try:
            if hold.flow_id is None:
                flow, task = None, tasks.lock_held(hold)
            else:
                flow, task = _lock_held_flow(hold, now)
        except (LeaseLost, FlowOver):
            return
        # Stopping on purpose is not an attempt that went wrong.
        task.attempts -= 1
        if flow is None:
            tasks.requeue(task, actor=hold.worker, now=now)
        else:
            _restart(flow, task, actor=hold.worker, now=now)


def rescue(*, task_id: str, now: dt.datetime) -> bool:
    """A worker died: start its task again elsewhere, or end it after too many attempts. False when it was not needed."""
    found = Task.objects.filter(pk=task_id).values_list("connection_id", "flow_id").first()
    if found is None:
        return False
    connection_id, flow_id = found
    with transaction.atomic():
        flow = None
        if connection_id is not None and flow_id is not None:
            try:
                connection = _lock(connection_id)
            except ManagedAuthConnection.DoesNotExist:
                # Deleted since the look above, which ended its tasks.
                return False
            flow = connection.flows.select_for_update().filter(pk=flow_id).first()
            if flow is not None:
                flow.connection = connection
        task = (
            Task.objects.select_for_update()
            .filter(pk=task_id, lease_expires_at__lte=now)
            .exclude(status__in=TASK_END)
            .first()
        )
        if task is None:
            return False
        worn_out = task.attempts >= settings.TASK_ATTEMPTS
        if task.kill_requested_at is not None and flow is None:
            tasks.finish(task, TaskStatus.KILLED, actor="reconciler", now=now)
        elif task.kind == TaskKind.COMMAND:
            # A command that died half way is never run again by itself (row B41): what it did may not bear being done twice.
            tasks.interrupt(task, actor="reconciler", now=now)
        elif flow is not None and not flow.is_over:
            if worn_out:
                message = f"The worker stopped {task.attempts} times while logging in."
                _fail(
                    flow,
                    code="internal_error",
                    message=message,
                    website_error="",
                    now=now,
                    actor="reconciler",
                )
            else:
                _restart(flow, task, actor="reconciler", now=now)
        elif flow is not None or worn_out:
            tasks.finish(
                task,
                TaskStatus.FAILED,
                actor="reconciler",
                now=now,
                error_code="worker_lost",
                error="The worker stopped.",
            )
        else:
            tasks.requeue(task, actor="reconciler", now=now)
        return True


def _restart(flow: LoginFlow, task: Task, *, actor: str, now: dt.datetime) -> None:
    """Begin the flow again on another worker. What was typed is gone: it is never sent twice."""
    flow.submissions.exclude(sealed=None).update(sealed=None, taken_at=now)
    if flow.step != FlowStep.DISCOVERING:
        _step(flow, FlowStep.DISCOVERING, now=now)
        _save_flow(flow, at=now, actor=actor)
    tasks.requeue(task, actor=actor, now=now)


def record_check(*, hold: Hold, signed_in: bool | None, reason: str, now: dt.datetime) -> HealthCheck:
    """The result of a health check. ``None``: it could not be told, and the status stays.

    A session that is found lost is signed in again at once where that needs no person: the flow begins in this transaction. The status is
    NEEDS_AUTH until it has succeeded.

    :raises LeaseLost: somebody else has the task by now.
    """
    with transaction.atomic():
        try:
            connection = _lock(str(hold.connection_id))
        except ManagedAuthConnection.DoesNotExist:
            raise LeaseLost(hold.task_id) from None
        running = _running(connection)
        task = tasks.lock_held(hold)
        by_clock = task.spec.get("by") == "clock"
        asked = not by_clock or bool(task.spec.get("asked"))
        observed = None
        if signed_in is not None:
            observed = ConnectionStatus.AUTHENTICATED if signed_in else ConnectionStatus.NEEDS_AUTH
        previous = ConnectionStatus(connection.status)
        check = HealthCheck.objects.create(
            connection=connection,
            status=observed,
            previous_status=previous,
            reason=reason[:500],
            checked_at=now,
        )
        again = False
        if observed is None:
            if by_clock:
                health.unclear(connection.domain, trial=bool(task.spec.get("trial")), now=now)
                connection.checks_unclear += 1
                health.plan(connection, now)
        else:
            if connection.profile.state_saved_at is not None:
                health.clear(connection.domain, now)
            again = _take_check(
                connection, observed, lost=previous != observed or asked, running=running, now=now
            )
        connection.last_auth_check_at = now
        connection.version += 1
        connection.save(update_fields=["last_auth_check_at", "version", *health.FIELDS])
        telling.connection("connection.updated", connection, at=now, actor=hold.worker)
        if observed is not None:
            _set_status(connection, observed, reason="health_check", now=now, actor=hold.worker)
        tasks.finish(task, TaskStatus.COMPLETED, actor=hold.worker, now=now)
        if again:
            _begin(connection, FlowType.REAUTH, actor=_HEALTH, now=now)
        return check


def _take_check(
    connection: ManagedAuthConnection,
    observed: ConnectionStatus,
    *,
    lost: bool,
    running: LoginFlow | None,
    now: dt.datetime,
) -> bool:
    """Plan what follows a check that could tell. True: a re-authentication begins now. ``lost``: it was there before, or a person asked."""
    connection.checks_unclear = 0
    if observed == ConnectionStatus.AUTHENTICATED:
        health.signed_in(connection, now)
        return False
    connection.next_check_at = None
    if not lost:
        return False
    # Whoever asks for a check has done something about it: the count of failures begins anew.
    connection.reauths_failed = 0
    connection.reauth_after = None
    if not health.signs_in_again(connection):
        return False
    if running is not None:
        # A person is at it. Should they not succeed, the clock goes on from there.
        connection.reauth_after = now
        return False
    return True
