"""The one outward shape of every object, for API, streams, snapshots and pages.

Fields are listed one by one, so that a secret cannot get in by being added to a model. Names and types are
those of Kernel's SDK; what is ours is ``version``, ``flow_id`` and ``input_expires_at``.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable
from typing import Any, TypedDict

from django.conf import settings

from connections.models import (
    Credential,
    HealthCheck,
    HookDelivery,
    LoginFlow,
    ManagedAuthConnection,
    Profile,
    Task,
    TaskInput,
)
from connections.states import FlowType

Json = dict[str, Any]


class FieldShape(TypedDict, total=False):
    id: str
    ref: str
    type: str
    reason: str
    label: str
    hint: str
    input_mode: str
    required: bool
    observed_selector: str


class ChoiceShape(TypedDict, total=False):
    id: str
    type: str
    label: str
    description: str
    display_text: str
    context: str
    masked_destination: str
    mfa_type: str
    observed_selector: str


class DiscoveredFieldShape(TypedDict, total=False):
    name: str
    type: str
    label: str
    selector: str
    placeholder: str
    required: bool
    hint: str
    linked_mfa_type: str


class MfaOptionShape(TypedDict, total=False):
    type: str
    label: str
    target: str
    description: str


class SsoButtonShape(TypedDict):
    provider: str
    selector: str
    label: str


class SignInOptionShape(TypedDict, total=False):
    id: str
    label: str
    description: str


class FlowFields(TypedDict):
    """The flow part of a connection: null when it does not apply."""

    flow_id: str | None
    flow_status: str | None
    flow_step: str | None
    flow_type: str | None
    flow_expires_at: str | None
    input_expires_at: str | None
    interaction_id: str | None
    fields: list[FieldShape] | None
    choices: list[ChoiceShape] | None
    discovered_fields: list[DiscoveredFieldShape] | None
    mfa_options: list[MfaOptionShape] | None
    pending_sso_buttons: list[SsoButtonShape] | None
    sign_in_options: list[SignInOptionShape] | None
    external_action_message: str | None
    website_error: str | None
    error_code: str | None
    error_message: str | None
    sso_provider: str | None
    post_login_url: str | None
    hosted_url: str | None
    live_view_url: str | None
    browser_session_id: str | None


class ConnectionFields(TypedDict):
    """A connection without its flow."""

    id: str
    domain: str
    profile_name: str
    status: str
    save_credentials: bool
    record_session: bool
    login_url: str | None
    allowed_domains: list[str]
    credential: Json | None
    health_checks: bool
    auto_reauth: bool
    health_check_interval: int
    browser: Json | None
    proxy: Json | None
    browser_telemetry: Json | None
    last_auth_check_at: str | None
    last_auth_at: str | None
    health_check_unavailable_reason: str | None
    can_reauth: bool
    can_reauth_reason: str
    version: int
    created_at: str
    updated_at: str


class ManagedAuthShape(ConnectionFields, FlowFields):
    """What GET /auth/connections/{id} answers. What the clock will do is here alone: it changes without an event.

    ``next_check_at``: null while nothing is checked. ``reauths_failed``: re-authentications in a row; ``reauth_after``: when the next one is
    tried, null when none is planned.
    """

    next_check_at: str | None
    reauths_failed: int
    reauth_after: str | None


class LoginShape(TypedDict):
    id: str
    flow_id: str
    flow_type: str
    hosted_url: str
    flow_expires_at: str
    handoff_code: str


class TimelineShape(TypedDict, total=False):
    id: str
    type: str
    status: str
    timestamp: str
    step: str
    previous_status: str
    error_code: str
    error_message: str
    website_error: str
    updated_at: str
    completed_at: str


class CredentialShape(TypedDict, total=False):
    id: str
    name: str
    domain: str
    created_at: str
    updated_at: str
    has_values: bool
    has_totp_secret: bool
    sso_provider: str | None
    totp_algorithm: str
    totp_digits: int
    totp_period: int
    value_keys: list[str]
    totp_code: str
    totp_code_expires_at: str


class ProfileShape(TypedDict):
    id: str
    name: str
    created_at: str
    updated_at: str
    last_used_at: str | None


class ReplyShape(TypedDict, total=False):
    """One way to answer at once: a ``text`` to send, or ``keys`` to press."""

    label: str
    text: str
    keys: list[str]


class PromptShape(TypedDict):
    """What a task that waits for input seems to ask. ``detected_by``: ``read`` (its program waits in a read of the terminal), ``quiet`` (it
    only wrote nothing for a while, where no more can be known), ``worker`` (it says so)."""

    kind: str
    text: str
    replies: list[ReplyShape]
    detected_by: str


class HookShape(TypedDict):
    """The report of the task's end: null ``state`` before that."""

    url: str
    delivery_id: str | None
    state: str | None
    attempts: int
    next_attempt_at: str | None
    last_status: int | None
    last_error: str | None
    delivered_at: str | None


class TaskShape(TypedDict):
    """``prompt_delivered``: whether a command has got the ``input`` that it was made with; null when there was none."""

    id: str
    kind: str
    status: str
    title: str
    labels: list[str]
    connection_id: str | None
    flow_id: str | None
    parent_id: str | None
    argv: list[str] | None
    cwd: str | None
    template: str | None
    payload: Any
    timeout_seconds: int | None
    created_by: str | None
    attempts: int
    created_at: str
    updated_at: str
    started_at: str | None
    finished_at: str | None
    last_activity_at: str | None
    exit_code: int | None
    signal: str | None
    error_code: str | None
    error: str | None
    prompt: PromptShape | None
    kill_requested_at: str | None
    kill_requested_by: str | None
    kill_reason: str | None
    inputs_waiting: int
    prompt_delivered: bool | None
    output_bytes: int
    output_dropped: int
    hook: HookShape | None
    version: int


class TaskCreatedShape(TaskShape, total=False):
    """A new task. ``hook_secret`` signs what is sent to its hook: made up here, and told this once."""

    hook_secret: str


class TaskInputShape(TypedDict):
    number: int
    kind: str
    submit: bool
    client_message_id: str
    status: str
    byte_count: int
    submitted_by: str
    created_at: str
    taken_at: str | None


class TaskDetailShape(TaskShape):
    """A task and its newest lines, without their texts."""

    inputs: list[TaskInputShape]


class ClientShape(TypedDict):
    """A browser tab or a program with a stable id; ``events.clients.picture`` makes it."""

    id: str
    user: str
    state: str
    reason: str | None
    epoch: int
    path: str | None
    watches: list[str]
    user_agent: str | None
    address: str | None
    cursor: int | None
    sent_cursor: int | None
    opened_at: str | None
    connected_at: str | None
    last_seen_at: str | None
    expires_at: str | None
    version: int


class PersonShape(TypedDict):
    client: str
    user: str
    doing: str


class ClaimShape(TypedDict):
    """Who is handling a subject, and who else looks or types; ``events.clients.claim_picture`` makes it."""

    id: str
    subject: str
    client: str | None
    user: str | None
    taken_at: str | None
    people: list[PersonShape]
    version: int


def timestamp(moment: dt.datetime) -> str:
    """RFC 3339 in UTC with ``Z``, to the millisecond."""
    text = moment.astimezone(dt.UTC).isoformat(timespec="milliseconds")
    return text.replace("+00:00", "Z")


def _maybe(moment: dt.datetime | None) -> str | None:
    return None if moment is None else timestamp(moment)


def _present(**values: Any) -> Any:
    """Only what is there: optional keys of a shape are left out, not null."""
    return {key: value for key, value in values.items() if value is not None and value != ""}


def hosted_url(connection_id: str, code: str | None = None) -> str:
    """The address of the hosted page; with the one-time code only where it is handed out."""
    url = f"{settings.BASE_URL}/login/{connection_id}"
    return f"{url}?code={code}" if code else url


# Fields and choices are kept in the flow as the driver made them (drivers/base.py); here they become both
# the canonical and the legacy shape, with the same content (wire contract, section 4).

_LEGACY_FIELD_TYPE = {
    "password": "password",
    "code": "code",
    "totp_code": "totp",
    "totp_secret": "text",
    "text": "text",
}
_LEGACY_MFA = frozenset({"sms", "call", "email", "totp", "push", "password", "switch"})


def _field(field: Json) -> FieldShape:
    names = ("id", "ref", "type", "reason", "label", "hint", "input_mode", "required", "observed_selector")
    return _present(**{name: field.get(name) for name in names})


def _choice(choice: Json) -> ChoiceShape:
    return _present(
        id=choice["id"],
        type=choice["type"],
        label=choice["label"],
        description=choice.get("description"),
        display_text=choice.get("display_text"),
        context=choice.get("context"),
        masked_destination=choice.get("masked_destination"),
        mfa_type=choice.get("mfa_type"),
        observed_selector=choice.get("observed_selector"),
    )


def _legacy_field(field: Json) -> DiscoveredFieldShape:
    kind = _LEGACY_FIELD_TYPE.get(field["type"])
    if kind is None:
        kind = {"email": "email", "tel": "tel", "numeric": "number"}.get(
            field.get("input_mode") or "", "text"
        )
    linked = field.get("linked_mfa_type")
    return _present(
        name=field["ref"],
        type=kind,
        label=field["label"],
        placeholder=field.get("placeholder"),
        required=field.get("required", True),
        hint=field.get("hint"),
        linked_mfa_type=linked if linked in _LEGACY_MFA else None,
    ) | {"selector": field.get("observed_selector") or ""}


def legacy_mfa_type(choice: Json) -> str:
    """The type under which older clients see a second factor, and send it back."""
    kind = choice.get("mfa_type")
    return kind if kind in _LEGACY_MFA else "switch"


def _mfa_option(choice: Json) -> MfaOptionShape:
    return _present(
        type=legacy_mfa_type(choice),
        label=choice["label"],
        target=choice.get("masked_destination"),
        description=choice.get("description"),
    )


def provider_of(choice: Json) -> str:
    return choice.get("provider") or choice["id"]


def _sso_button(choice: Json) -> SsoButtonShape:
    return {
        "provider": provider_of(choice),
        "selector": choice.get("observed_selector") or "",
        "label": choice["label"],
    }


def _sign_in_option(choice: Json) -> SignInOptionShape:
    return _present(id=choice["id"], label=choice["label"], description=choice.get("description"))


def flow_fields(flow: LoginFlow | None) -> FlowFields:
    """Every flow field of GET, null where it does not apply."""
    empty: Any = dict.fromkeys(FlowFields.__annotations__)
    if flow is None:
        return empty
    choices = flow.choices
    running = not flow.is_over
    actionable = bool(flow.interaction_id)
    empty.update(
        flow_id=flow.id,
        flow_status=flow.status,
        flow_step=flow.step,
        flow_type=flow.type,
        flow_expires_at=timestamp(flow.expires_at),
        input_expires_at=_maybe(flow.input_expires_at) if actionable else None,
        interaction_id=flow.interaction_id or None,
        fields=[_field(field) for field in flow.fields] if actionable else None,
        choices=[_choice(choice) for choice in choices] if actionable else None,
        discovered_fields=[_legacy_field(field) for field in flow.fields] if actionable else None,
        mfa_options=[_mfa_option(c) for c in choices if c["type"] == "mfa_method"] if actionable else None,
        pending_sso_buttons=[_sso_button(c) for c in choices if c["type"] == "sso_provider"]
        if actionable
        else None,
        sign_in_options=[
            _sign_in_option(c) for c in choices if c["type"] not in ("mfa_method", "sso_provider")
        ]
        if actionable
        else None,
        external_action_message=flow.external_action_message or None,
        website_error=flow.website_error or None,
        error_code=flow.error_code or None,
        error_message=flow.error_message or None,
        sso_provider=flow.sso_provider or None,
        post_login_url=flow.post_login_url or None,
        hosted_url=hosted_url(flow.connection_id) if running else None,
        live_view_url=flow.live_view_url or None,
    )
    return empty


def flow_state(flow: LoginFlow) -> Json:
    """The content of ``managed_auth_state`` without ``event`` and ``timestamp``: absent fields are left out."""
    state: Json = {key: value for key, value in flow_fields(flow).items() if value is not None}
    state["version"] = flow.version
    return state


def connection_fields(connection: ManagedAuthConnection) -> ConnectionFields:
    """The connection without flow fields: the data of ``connection.*`` events, and the first half of GET."""
    can_reauth, reason = connection.can_reauth()
    credential: Json | None = connection.external_credential
    if connection.credential is not None:
        credential = {"name": connection.credential.name}
    checked = _maybe(connection.last_auth_check_at)
    nothing_to_check = connection.health_checks and not connection.post_login_url
    return {
        "id": connection.id,
        "domain": connection.domain,
        "profile_name": connection.profile.name,
        "status": connection.status,
        "save_credentials": connection.save_credentials,
        "record_session": connection.record_session,
        "login_url": connection.login_url or None,
        "allowed_domains": connection.allowed_domains,
        "credential": credential,
        "health_checks": connection.health_checks,
        "auto_reauth": connection.auto_reauth,
        "health_check_interval": connection.health_check_interval,
        "browser": connection.browser,
        "proxy": connection.proxy,
        "browser_telemetry": connection.browser_telemetry,
        "last_auth_check_at": checked,
        "last_auth_at": checked,
        "health_check_unavailable_reason": "no_auth_check_url" if nothing_to_check else None,
        "can_reauth": can_reauth,
        "can_reauth_reason": reason,
        "version": connection.version,
        "created_at": timestamp(connection.created_at),
        "updated_at": timestamp(connection.updated_at),
    }


def managed_auth(connection: ManagedAuthConnection, flow: LoginFlow | None) -> ManagedAuthShape:
    """What GET answers: the connection and its most recent flow."""
    return {
        **connection_fields(connection),
        **flow_fields(flow),
        "next_check_at": _maybe(connection.next_check_at),
        "reauths_failed": connection.reauths_failed,
        "reauth_after": _maybe(connection.reauth_after),
    }


def login(flow: LoginFlow, code: str) -> LoginShape:
    return {
        "id": flow.connection_id,
        "flow_id": flow.id,
        "flow_type": flow.type,
        "hosted_url": hosted_url(flow.connection_id, code),
        "flow_expires_at": timestamp(flow.expires_at),
        "handoff_code": code,
    }


def timeline_flow(flow: LoginFlow) -> TimelineShape:
    return _present(
        id=flow.id,
        type="reauth" if flow.type == FlowType.REAUTH else "login",
        status=flow.status,
        timestamp=timestamp(flow.started_at),
        step=flow.step,
        error_code=flow.error_code,
        error_message=flow.error_message,
        website_error=flow.website_error,
        updated_at=timestamp(flow.updated_at),
        completed_at=_maybe(flow.completed_at),
    )


def timeline_check(check: HealthCheck) -> TimelineShape:
    """An inconclusive check repeats the status that it kept, and says why it could not tell."""
    return _present(
        id=check.id,
        type="health_check",
        status=check.status or check.previous_status,
        timestamp=timestamp(check.checked_at),
        previous_status=check.previous_status,
        error_message="" if check.status else f"It could not be told. {check.reason}".rstrip(),
    )


def credential(row: Credential, *, keys: bool = True) -> CredentialShape:
    """``keys`` False leaves out ``value_keys``, as Kernel does in lists."""
    shape: CredentialShape = {
        "id": row.id,
        "name": row.name,
        "domain": row.domain,
        "created_at": timestamp(row.created_at),
        "updated_at": timestamp(row.updated_at),
        "has_values": bool(row.value_keys),
        "has_totp_secret": row.totp_secret is not None,
        "sso_provider": row.sso_provider or None,
        "totp_algorithm": row.totp_algorithm,
        "totp_digits": row.totp_digits,
        "totp_period": row.totp_period,
    }
    if keys:
        shape["value_keys"] = sorted(row.value_keys)
    return shape


def profile(row: Profile) -> ProfileShape:
    return {
        "id": row.id,
        "name": row.name,
        "created_at": timestamp(row.created_at),
        "updated_at": timestamp(row.updated_at),
        "last_used_at": _maybe(row.last_used_at),
    }


def task(row: Task) -> TaskShape:
    return {
        "id": row.id,
        "kind": row.kind,
        "status": row.status,
        "title": row.title,
        "labels": row.labels,
        "connection_id": row.connection_id,
        "flow_id": row.flow_id,
        "parent_id": row.parent_id,
        "argv": row.spec.get("argv"),
        "cwd": row.spec.get("cwd") or None,
        "template": row.spec.get("template") or None,
        "payload": row.spec.get("payload"),
        "timeout_seconds": row.timeout_seconds,
        "created_by": row.created_by or None,
        "attempts": row.attempts,
        "created_at": timestamp(row.created_at),
        "updated_at": timestamp(row.updated_at),
        "started_at": _maybe(row.started_at),
        "finished_at": _maybe(row.finished_at),
        "last_activity_at": _maybe(row.last_activity_at),
        "exit_code": row.exit_code,
        "signal": row.signal or None,
        "error_code": row.error_code or None,
        "error": row.error or None,
        "prompt": row.prompt,
        "kill_requested_at": _maybe(row.kill_requested_at),
        "kill_requested_by": row.kill_requested_by or None,
        "kill_reason": row.kill_reason or None,
        "inputs_waiting": row.inputs_waiting,
        "prompt_delivered": row.prompt_delivered,
        "output_bytes": row.output_bytes,
        "output_dropped": row.output_dropped,
        "hook": _hook(row),
        "version": row.version,
    }


def _hook(row: Task) -> HookShape | None:
    """Lists fetch ``hook_delivery`` along. Of the address only the site is shown: the rest may hold a secret."""
    if not row.hook_site:
        return None
    sent: HookDelivery | None = getattr(row, "hook_delivery", None)
    return {
        "url": f"{row.hook_site}/…",
        "delivery_id": sent.id if sent else None,
        "state": sent.state if sent else None,
        "attempts": sent.attempts if sent else 0,
        "next_attempt_at": _maybe(sent.next_attempt_at) if sent else None,
        "last_status": sent.last_status if sent else None,
        "last_error": sent.last_error or None if sent else None,
        "delivered_at": _maybe(sent.delivered_at) if sent else None,
    }


def task_detail(row: Task, lines: Iterable[TaskInput]) -> TaskDetailShape:
    return {**task(row), "inputs": [task_input(line) for line in lines]}


def task_input(row: TaskInput) -> TaskInputShape:
    """A line, never its text."""
    return {
        "number": row.number,
        "kind": row.kind,
        "submit": row.submit,
        "client_message_id": row.message_id,
        "status": row.state,
        "byte_count": row.byte_count,
        "submitted_by": row.submitted_by,
        "created_at": timestamp(row.created_at),
        "taken_at": _maybe(row.taken_at),
    }
