"""The parts of a page that change live: one picture of a connection, and the HTML that pages include and the stream sends.

A part is rendered by the same template for the page and for the stream. In the stream it is the same for every viewer: no CSRF token,
no per-user button; who may only look is told so by the element around it (class ``read-only``). Every part carries ``data-rev``,
the version of its object, so that the browser never replaces a newer picture by an older one.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

from django.db.models import Exists, OuterRef, Q, QuerySet, Subquery
from django.template.loader import render_to_string

from connections import health, task_picture
from connections.access import Principal
from connections.chips import Chip
from connections.models import HealthCheck, LoginFlow, ManagedAuthConnection, SiteCircuit, Task
from connections.payloads import hosted_url
from connections.states import ConnectionStatus, FlowStatus, FlowStep, FlowType, TaskStatus
from connections.task_picture import STATUS_CHIP, Moment
from events import clients
from events.envelope import Envelope, topic_of
from events.models import Client, Event, Presence
from events.states import ClientState

Json = dict[str, Any]

#: Steps in which a person is needed.
WAITING_STEPS = (
    FlowStep.AWAITING_INPUT,
    FlowStep.AWAITING_EXTERNAL_ACTION,
    FlowStep.AWAITING_HUMAN_INTERVENTION,
)
WORKING_STEPS = (FlowStep.DISCOVERING, FlowStep.SUBMITTING)

TIMELINE_EVENTS = 60

#: What passes: who looks and who types is shown while it is so, and is no history of the object.
PASSING = ("claim.updated",)
#: Left out of the feed unless it is asked for: every page that somebody turns to would be some of its lines.
COMINGS_AND_GOINGS = (
    *PASSING, "client.opened", "client.suspended", "client.inactive", "client.expired",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Input:
    """One field of a question as an ``<input>``."""

    html_id: str
    name: str
    label: str
    type: str
    autocomplete: str
    inputmode: str
    placeholder: str
    hint: str
    required: bool
    rejected: bool
    is_code: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Option:
    """One choice of a question as a button."""

    id: str
    label: str
    note: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Person:
    """Somebody at a subject. ``client`` is the tab, by which a page knows itself."""

    client: str
    user: str
    typing: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Who:
    """Who is at a subject: the one who handles it, and who else looks or types. ``rev``: the version of its claim."""

    subject: str
    rev: int
    holder: Person | None = None
    others: Sequence[Person] = ()

    @property
    def id(self) -> str:
        return self.subject.partition(":")[2]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Picture:
    """What every part shows of a connection: templates only print it."""

    connection: ManagedAuthConnection
    flow: LoginFlow | None
    chip: Chip
    since: dt.datetime
    deadline: dt.datetime | None
    inputs: list[Input]
    options: list[Option]
    sso: list[Option]
    #: The sentence under the state.
    sentence: str
    #: What the site itself said.
    website_error: str
    needs_attention: bool
    who: Who

    @property
    def filter(self) -> str:
        """The value of ``?status=`` that finds this connection in the list."""
        if self.flow is None:
            return "new"
        if self.waiting:
            return "waiting"
        if self.busy:
            return "working"
        ends = {FlowStatus.SUCCESS: "done", FlowStatus.CANCELED: "cancelled"}
        return ends.get(FlowStatus(self.flow.status), self.flow.status.lower())

    @property
    def id(self) -> str:
        return self.connection.id

    @property
    def rev(self) -> int:
        return self.connection.version

    @property
    def running(self) -> bool:
        return self.flow is not None and not self.flow.is_over

    @property
    def waiting(self) -> bool:
        return self.flow is not None and self.flow.step in WAITING_STEPS

    @property
    def asks(self) -> bool:
        return bool(self.flow and self.flow.interaction_id)

    @property
    def ended_badly(self) -> bool:
        return self.flow is not None and self.flow.status in (FlowStatus.FAILED, FlowStatus.EXPIRED)

    @property
    def busy(self) -> bool:
        return self.flow is not None and self.flow.step in WORKING_STEPS

    @property
    def signed_in(self) -> bool:
        return bool(self.connection.status == ConnectionStatus.AUTHENTICATED)

    @property
    def hosted_url(self) -> str:
        return hosted_url(self.connection.id)

    @property
    def can_reauth(self) -> bool:
        return self.connection.can_reauth()[0]

    @property
    def reauth_reason(self) -> str:
        reason = self.connection.can_reauth()[1]
        return _REAUTH_WORDS.get(reason, reason.replace("_", " "))

    @property
    def check_minutes(self) -> int:
        return round(self.connection.health_check_interval / 60)

    @property
    def checked(self) -> bool:
        """Whether the clock checks it."""
        return health.is_checked(self.connection)

    @property
    def not_checked(self) -> str:
        """Why the clock does not check it, where that is wanted."""
        if not self.signed_in:
            return "not while it is signed out"
        return "there is no page to look at" if not self.checked else ""

    @cached_property
    def circuit(self) -> SiteCircuit | None:
        """The open circuit of its site. One query, when a page asks for it."""
        return health.circuit(self.connection.domain) if self.checked else None

    @property
    def reauth_given_up(self) -> bool:
        return bool(self.connection.reauths_failed >= health.REAUTH_LIMIT)


# ── Words ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _and(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def asked_for(fields: Sequence[Mapping[str, Any]], choices: Sequence[Mapping[str, Any]]) -> str:
    """What a question wants, in words: ``user name and password``, ``code``, ``choice``."""
    words = {"identifier": "user name", "password": "password", "code": "code", "totp_code": "code"}
    found: list[str] = []
    for field in fields:
        word = words.get(field.get("type", ""), "") or str(field.get("label") or "an answer").lower()
        if word not in found:
            found.append(word)
    if found:
        return _and(found[:3])
    return "choice" if choices else "answer"


def chip_of_flow(status: str, step: str, *, wants: str, reason: str = "", who: str = "") -> Chip:
    """The chip of a login flow, from the words of the one vocabulary."""
    if status == FlowStatus.SUCCESS:
        return Chip(shape="✔", tone="done", word="Done")
    if status == FlowStatus.FAILED:
        return Chip(shape="✖", tone="failed", word=f"Failed: {reason}" if reason else "Failed")
    if status == FlowStatus.EXPIRED:
        return Chip(shape="⧖", tone="idle", word="Expired")
    if status == FlowStatus.CANCELED:
        return Chip(shape="–", tone="idle", word=f"Cancelled by {who}" if who else "Cancelled")
    if step == FlowStep.AWAITING_INPUT:
        return Chip(shape="◆", tone="waiting", word=f"Waiting for you: {wants}")
    if step == FlowStep.AWAITING_EXTERNAL_ACTION:
        return Chip(shape="◇", tone="external", word="Approve on your phone")
    if step == FlowStep.AWAITING_HUMAN_INTERVENTION:
        return Chip(shape="◆", tone="waiting", word="Waiting for you: act in the browser")
    if step == FlowStep.SUBMITTING:
        return Chip(shape="◌", tone="working", word="Sending…")
    return Chip(shape="●", tone="working", word="Working")


_SHORT_REASON = {
    "credentials_invalid": "wrong user name or password",
    "totp_code_rejected": "the code was rejected",
    "login_form_not_found": "no login form found",
    "domain_not_allowed": "the site leads elsewhere",
    "network_error": "the site cannot be reached",
    "captcha_blocked": "a CAPTCHA is in the way",
    "bot_detected": "the site refuses automated logins",
    "unsupported_auth_method": "unsupported way of signing in",
    "max_attempts_reached": "too many attempts",
    "stuck_in_loop": "the site asks in circles",
    "internal_error": "internal error",
    "website_error": "the site reported an error",
    "session_expired": "the session ended",
}


def _reason(code: str) -> str:
    return _SHORT_REASON.get(code, code.replace("_", " "))


_REAUTH_WORDS = {
    "no_prior_successful_login": "there was no successful login yet",
    "no_credential": "no values are stored",
    "requires_external_action": "the site wants an approval elsewhere",
    "requires_sms_code": "the site sends a code by text message",
    "requires_email_code": "the site sends a code by e-mail",
    "requires_customer_input": "the site asks for more than is stored",
    "requires_totp_without_secret": "the secret of the one-time code is not stored",
}


def _chip(connection: ManagedAuthConnection, flow: LoginFlow | None) -> Chip:
    if flow is None:
        if connection.status == ConnectionStatus.AUTHENTICATED:
            return Chip(shape="✔", tone="done", word="Signed in")
        return Chip(shape="○", tone="idle", word="Not signed in yet")
    if flow.status == FlowStatus.SUCCESS:
        if connection.status == ConnectionStatus.AUTHENTICATED:
            return Chip(shape="✔", tone="done", word="Done: signed in")
        return Chip(shape="○", tone="idle", word="Signed out since")
    return chip_of_flow(
        flow.status,
        flow.step,
        wants=asked_for(flow.fields, flow.choices),
        reason=_reason(flow.error_code) if flow.error_code else "",
        who=flow.ended_by,
    )


def _sentence(connection: ManagedAuthConnection, flow: LoginFlow | None) -> str:
    if flow is None:
        return "No login was started yet."
    if flow.status == FlowStatus.SUCCESS:
        if connection.status == ConnectionStatus.AUTHENTICATED:
            return "The profile is signed in to the site."
        return "The last login worked, but the profile is not signed in any more."
    if flow.status == FlowStatus.CANCELED:
        return flow.end_reason or "The login was cancelled."
    if flow.is_over:
        return flow.error_message or flow.get_status_display()
    if flow.step == FlowStep.AWAITING_EXTERNAL_ACTION:
        return flow.external_action_message or "Approve the sign-in on your phone."
    if flow.step == FlowStep.AWAITING_HUMAN_INTERVENTION:
        return "Somebody has to act in the browser itself."
    if flow.step == FlowStep.AWAITING_INPUT:
        return ""
    if flow.step == FlowStep.SUBMITTING:
        return "The answer is on its way. The site is checking it."
    return "Opening the login page of the site. This usually takes a few seconds."


# ── Questions ─────────────────────────────────────────────────────────────────────────────────────────────────────

_INPUT = {
    # type: (type of the input, autocomplete, inputmode). Identifiers are text: type=email would refuse a user name.
    "identifier": ("text", "username", ""),
    "password": ("password", "current-password", ""),
    "code": ("text", "one-time-code", "numeric"),
    "totp_code": ("text", "one-time-code", "numeric"),
    "totp_secret": ("password", "off", ""),
    "text": ("text", "off", ""),
}


def _input(flow: LoginFlow, field: Json) -> Input:
    kind, autocomplete, inputmode = _INPUT.get(field["type"], _INPUT["text"])
    return Input(
        html_id=f"field-{flow.connection_id}-{flow.interaction_id}-{field['id']}",
        name=f"field.{field['id']}",
        label=field["label"],
        type=kind,
        autocomplete=autocomplete,
        inputmode=field.get("input_mode") or inputmode,
        placeholder=field.get("placeholder") or "",
        hint=field.get("hint") or "",
        required=bool(field.get("required", True)),
        rejected=field.get("reason") == "rejected",
        is_code=field["type"] in ("code", "totp_code"),
    )


def _is_another_way(choice: Json) -> bool:
    return choice["type"] == "other" or choice.get("mfa_type") in ("switch", "other")


def _option(choice: Json) -> Option:
    notes = (choice.get(name) or "" for name in ("masked_destination", "context", "description"))
    new = [note for note in notes if note and note not in choice["label"]]
    return Option(id=choice["id"], label=choice["label"], note=" · ".join(new))


def who(subject: str, claim: Mapping[str, Any] | None) -> Who:
    """``claim`` as :func:`events.clients.claim_picture` makes it; None: nobody was ever there."""
    if claim is None:
        return Who(subject=subject, rev=0)
    people = [
        Person(client=each["client"], user=each["user"], typing=each["doing"] == Presence.TYPING)
        for each in claim["people"]
    ]
    holder = None
    if claim["client"]:
        typing = any(each.client == claim["client"] and each.typing for each in people)
        holder = Person(client=claim["client"], user=claim["user"], typing=typing)
    others = [each for each in people if each.client != claim["client"]]
    return Who(subject=subject, rev=claim["version"], holder=holder, others=others)


def who_is_at(subject: str) -> Who:
    return who(subject, clients.claims_of([subject]).get(subject))


def picture(
    connection: ManagedAuthConnection, flow: LoginFlow | None, claims: Mapping[str, Json] | None = None
) -> Picture:
    """What the parts show. ``flow`` is the latest one of the connection; ``claims`` by subject, looked up when they are not given."""
    subject = topic_of("connection", connection.id)
    if claims is None:
        claims = clients.claims_of([subject])
    asking = flow if flow is not None and flow.interaction_id else None
    choices = sorted(asking.choices, key=_is_another_way) if asking else []
    return Picture(
        connection=connection,
        flow=flow,
        chip=_chip(connection, flow),
        since=flow.step_entered_at if flow else connection.created_at,
        deadline=flow.deadline() if flow else None,
        inputs=[_input(asking, field) for field in asking.fields] if asking else [],
        options=[_option(choice) for choice in choices if choice["type"] != "sso_provider"],
        sso=[_option(choice) for choice in choices if choice["type"] == "sso_provider"],
        sentence=_sentence(connection, flow),
        website_error=flow.website_error if flow else "",
        needs_attention=flow is not None and _needs_attention(flow),
        who=who(subject, claims.get(subject)),
    )


# ── Which connections ─────────────────────────────────────────────────────────────────────────────────────────────


def _needs_attention(flow: LoginFlow) -> bool:
    if flow.status == FlowStatus.IN_PROGRESS:
        return flow.step in WAITING_STEPS
    return flow.status in (FlowStatus.FAILED, FlowStatus.EXPIRED) and flow.acknowledged_at is None


def connections_of(principal: Principal) -> QuerySet[Any]:
    """What the caller may see, each with ``flow_pk``, ``flow_status`` and ``flow_step`` of its latest flow."""
    latest = LoginFlow.objects.filter(connection=OuterRef("pk")).order_by("-number")
    return (
        ManagedAuthConnection.objects.visible_to(principal)
        .select_related("profile", "credential", "owner")
        .annotate(
            flow_pk=Subquery(latest.values("pk")[:1]),
            flow_status=Subquery(latest.values("status")[:1]),
            flow_step=Subquery(latest.values("step")[:1]),
        )
    )


def pictures(rows: Iterable[Any]) -> list[Picture]:
    """Pictures of rows of :func:`connections_of`, in the same order, with one query for all flows and one look for who is there."""
    found = list(rows)
    flows = LoginFlow.objects.in_bulk([row.flow_pk for row in found if row.flow_pk])
    for row in found:
        if row.flow_pk in flows:
            flows[row.flow_pk].connection = row
    claims = clients.claims_of(topic_of("connection", row.pk) for row in found)
    return [picture(row, flows.get(row.flow_pk), claims) for row in found]


def _latest_flows(principal: Principal) -> QuerySet[LoginFlow]:
    newer = LoginFlow.objects.filter(connection=OuterRef("connection"), number__gt=OuterRef("number"))
    rows = LoginFlow.objects.filter(~Exists(newer))
    if principal.audiences is not None:
        rows = rows.filter(connection__owner_id__in=principal.audiences)
    return rows


def attention(principal: Principal, *, keep: Sequence[str] = (), limit: int = 50) -> list[Picture]:
    """What needs somebody: the oldest deadline first, then approvals elsewhere, then failures, newest first.

    ``keep``: ids that the caller shows already; they stay at the end when they need nobody any more, so that
    nothing disappears under a reader's fingers.
    """
    open_ends = Q(status__in=(FlowStatus.FAILED, FlowStatus.EXPIRED), acknowledged_at=None)
    wanted = Q(status=FlowStatus.IN_PROGRESS, step__in=WAITING_STEPS) | open_ends
    rows = _latest_flows(principal).filter(wanted).values_list("connection_id", flat=True)
    found = pictures(connections_of(principal).filter(pk__in=[*rows[:500], *keep]))

    def order(item: Picture) -> tuple[int, float]:
        if not item.needs_attention:
            return (9, -item.since.timestamp())
        if item.deadline is None:
            return (3, -item.since.timestamp())
        external = item.flow is not None and item.flow.step == FlowStep.AWAITING_EXTERNAL_ACTION
        return (2 if external else 1, item.deadline.timestamp())

    return sorted(found, key=order)[:limit]


def counts(principal: Principal) -> dict[str, int]:
    """The numbers in the navigation: what waits for a person (logins and tasks); logins that work, and that failed (latest flows); open tasks
    of other kinds; open tabs."""
    rows = _latest_flows(principal)
    running = rows.filter(status=FlowStatus.IN_PROGRESS)
    work = task_picture.counts(principal)
    return {
        "waiting": running.filter(step__in=WAITING_STEPS).count() + work["waiting"],
        "tasks": work["open"],
        "running": running.filter(step__in=WORKING_STEPS).count(),
        "failed": rows.filter(status=FlowStatus.FAILED).count(),
        "tabs": clients.visible_to(principal.audiences).filter(state=ClientState.LIVE).count(),
    }


def tasks_attention(principal: Principal, *, keep: Sequence[str] = (), limit: int = 20) -> list[Json]:
    """The tasks that wait for somebody, the longest first, as their cards on the home page want them; ``keep`` as in :func:`attention`."""
    rows = TASK_ROWS.visible_to(principal)
    ids = list(task_picture.waiting_for(principal).values_list("pk", flat=True)[:limit])
    found = rows.filter(Q(pk__in=ids) | Q(pk__in=keep)).in_bulk()
    order = [*ids, *(pk for pk in keep if pk not in ids)]
    claims = clients.claims_of(topic_of("task", pk) for pk in found)
    return [
        {
            "item": task_picture.picture(found[pk]),
            "task": found[pk],
            "who": who(topic_of("task", pk), claims.get(topic_of("task", pk))),
        }
        for pk in order
        if pk in found
    ]


# ── The log in words ──────────────────────────────────────────────────────────────────────────────────────────────


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """One event in words. ``took``: seconds since the entry before it, where that means something."""

    id: int
    name: str
    at: dt.datetime
    chip: Chip
    text: str
    actor: str
    href: str
    label: str
    took: int | None = None


#: Tasks with what their parts show.
TASK_ROWS = Task.objects.select_related("connection__profile", "owner", "parent", "hook_delivery")

#: What shows a task: the beginning of the part's id, and its template.
TASK_PARTS = (
    ("task", "task_row"),
    ("state", "task_state"),
    ("lines", "task_lines"),
    ("timeline", "task_timeline"),
    ("facts", "task_facts"),
    ("attn", "attention_task"),
)


def _told_flow(data: Mapping[str, Any], actor: str, first: bool | None) -> tuple[Chip, str]:
    status, step = data.get("flow_status", ""), data.get("flow_step", "")
    wants = asked_for(data.get("fields") or [], data.get("choices") or [])
    chip = chip_of_flow(status, step, wants=wants)
    if status == FlowStatus.SUCCESS:
        return chip, "signed in"
    if status == FlowStatus.FAILED:
        return chip, f"failed: {data.get('error_message') or _reason(str(data.get('error_code', '')))}"
    if status == FlowStatus.EXPIRED:
        return chip, f"expired: {data.get('error_message') or 'its time is over'}"
    if status == FlowStatus.CANCELED:
        reason = data.get("error_message")
        return chip, f"cancelled by {actor}{f': {reason}' if reason else ''}"
    if step == FlowStep.AWAITING_INPUT:
        rejected = data.get("website_error")
        return chip, f"asks for {wants}" + (f" (the site says: {rejected})" if rejected else "")
    if step == FlowStep.AWAITING_EXTERNAL_ACTION:
        return chip, str(data.get("external_action_message") or "waits for an approval elsewhere")
    if step == FlowStep.AWAITING_HUMAN_INTERVENTION:
        return chip, "waits for somebody in the browser"
    if step == FlowStep.SUBMITTING:
        return chip, f"answer sent by {actor} (values are not kept in the log)"
    kind = "re-authentication" if data.get("flow_type") == FlowType.REAUTH else "login"
    if first is None:
        return chip, f"{kind} begins"
    return chip, f"{kind} started by {actor}" if first else "opening the login page again"


def entry(
    event: Event, *, labels: Mapping[str, str], first: bool | None = None, took: int | None = None
) -> Entry:
    """One event in words. ``labels``: names of objects by topic. ``first``: whether it began its flow, where known."""
    kind, _, object_id = event.topic.partition(":")
    data, actor = event.data, event.actor or "system"
    plain = Chip(shape="·", tone="idle", word=event.name)
    text = event.name
    if event.name == "flow.state":
        plain, text = _told_flow(data, actor, first)
    elif event.name.startswith("task."):
        status = data.get("status", "")
        plain = STATUS_CHIP[TaskStatus(status)] if status in TaskStatus.values else plain
        words = {"task.created": "queued", "task.updated": "changed", "task.deleted": "deleted"}
        text = words.get(event.name) or str(plain.word).lower()
        if data.get("error"):
            text += f": {data['error']}"
    elif kind == "client":
        plain, text = _CLIENT_CHIP[ClientState(data["state"])], _told_client(event)
    elif event.name.startswith("claim."):
        plain, text = _told_claim(event)
    elif event.name == "connection.status":
        signed_in = data.get("status") == ConnectionStatus.AUTHENTICATED
        plain = Chip(
            shape="✔" if signed_in else "○",
            tone="done" if signed_in else "idle",
            word="Signed in" if signed_in else "Signed out",
        )
        text = "the profile is signed in" if signed_in else "the profile is signed out"
    elif event.name.startswith("connection."):
        text = {"created": "connection created", "updated": "changed", "deleted": "connection deleted"}[
            event.name.partition(".")[2]
        ]
    page = {"connection": "connections", "task": "tasks"}.get(kind)
    href = f"/{page}/{object_id}" if page and event.topic in labels else ""
    label = labels.get(event.topic) or _named(event) or event.topic
    return Entry(
        id=event.id,
        name=event.name,
        at=event.at,
        chip=plain,
        text=text,
        actor=actor,
        href=href,
        label=label,
        took=took,
    )


_CLIENT_WORDS = {
    "client.opened": "connected",
    "client.suspended": "went to the background",
    "client.inactive": "is gone",
    "client.expired": "did not come back; what it handled was released",
}


def _told_client(event: Event) -> str:
    if event.name == "client.closed":
        return f"disconnected by {event.actor}: {event.data.get('reason')}"
    path = event.data.get("path")
    return f"{_CLIENT_WORDS[event.name]}{f' ({path})' if path else ''}"


def _told_claim(event: Event) -> tuple[Chip, str]:
    data = event.data
    user, before = data.get("user"), data.get("previous_user")
    if event.name == "claim.taken":
        chip = Chip(shape="◉", tone="working", word="Handled")
        return chip, f"{user} took it over from {before}" if before else f"{user} is handling it"
    chip = Chip(shape="○", tone="idle", word="Not handled")
    why = {
        "released": "let it go",
        "expired": "is gone and does not handle it any more",
        "disconnected": "was disconnected and does not handle it any more",
        "finished": "handled it to its end",
    }
    if event.name == "claim.released":
        return (
            chip,
            f"{before or 'somebody'} {why.get(str(data.get('reason')), 'does not handle it any more')}",
        )
    return chip, "who looks and who types changed"


def _claimed(event: Event) -> Moment:
    chip, text = _told_claim(event)
    # The sentence names who it was.
    return Moment(id=str(event.id), at=event.at, chip=chip, text=text, actor="")


def _named(event: Event) -> str:
    """The name that an event carries itself, for objects that are gone."""
    if event.topic.startswith("client:"):
        return f"Tab of {event.data.get('user')}" if event.data.get("path") else str(event.data.get("user"))
    if "domain" in event.data and "profile_name" in event.data:
        return f"{event.data['domain']} / {event.data['profile_name']}"
    return str(event.data.get("title", ""))


def labels_of(events: Iterable[Event]) -> dict[str, str]:
    """The names of the objects of these events, by topic, as far as they still exist."""
    topics = {event.topic for event in events}
    ids = {
        kind: [t.partition(":")[2] for t in topics if t.startswith(f"{kind}:")]
        for kind in ("connection", "task")
    }
    found = ManagedAuthConnection.objects.filter(pk__in=ids["connection"]).select_related("profile")
    names = {f"connection:{row.id}": str(row) for row in found}
    names |= {
        f"task:{pk}": title
        for pk, title in Task.objects.filter(pk__in=ids["task"]).values_list("pk", "title")
    }
    return names


def entries(events: Sequence[Event]) -> list[Entry]:
    labels = labels_of(events)
    return [entry(event, labels=labels) for event in events]


def _told_check(check: HealthCheck) -> tuple[Chip, str]:
    if check.status is None:
        chip = Chip(shape="?", tone="idle", word="Could not tell")
        return chip, f"health check: could not tell. {check.reason}".rstrip()
    if check.status == ConnectionStatus.AUTHENTICATED:
        return Chip(shape="✔", tone="done", word="Checked"), "health check: still signed in"
    return Chip(shape="○", tone="idle", word="Checked"), "health check: not signed in any more"


def timeline(connection: ManagedAuthConnection, flow: LoginFlow | None) -> list[Entry]:
    """What happened in the latest attempt, oldest first; of a connection without one, what happened to it at all."""
    rows = Event.objects.filter(topic=f"connection:{connection.id}")
    if flow is not None:
        rows = rows.filter(at__gte=flow.started_at)
    events = list(rows.exclude(name__in=PASSING).order_by("-id")[:TIMELINE_EVENTS])[::-1]
    labels = {f"connection:{connection.id}": str(connection)}
    # A check tells that the connection has changed; what it saw is in a row of the same moment.
    changes = [event.at for event in events if event.name == "connection.updated"]
    checks = {check.checked_at: check for check in connection.checks.filter(checked_at__in=changes)}
    told: list[Entry] = []
    seen_flow = False
    for event in events:
        took = round((event.at - told[-1].at).total_seconds()) if told else None
        told.append(entry(event, labels=labels, first=not seen_flow, took=took))
        if event.name == "connection.updated" and event.at in checks:
            chip, text = _told_check(checks[event.at])
            told[-1] = dataclasses.replace(told[-1], chip=chip, text=text)
        seen_flow = seen_flow or event.name == "flow.state"
    return told


_TASK_STATES = ("task.created", "task.status")


def task_context(task: Task) -> Json:
    """What the parts of a task's page show: its state, its newest lines in the order of acceptance, what happened to it, its facts."""
    # That lines came and went is told by the lines themselves.
    passing = ("task.updated", *PASSING)
    rows = Event.objects.filter(topic=topic_of("task", task.id)).exclude(name__in=passing).order_by("-id")
    events = list(rows[: task_picture.MOMENTS])[::-1]
    told = [event for event in events if event.name in _TASK_STATES]
    claims = [_claimed(event) for event in events if event.name.startswith("claim.")]
    sent = list(task.inputs.defer("sealed").order_by("-number")[: task_picture.MOMENTS])[::-1]
    for line in sent:
        # Whether the task is over is asked of every line.
        line.task = task
    item = task_picture.picture(task)
    return {
        "item": item,
        "task": task,
        "who": who_is_at(topic_of("task", task.id)) if item.types else None,
        "lines": [(line, task_picture.LINE_CHIP[line.state]) for line in sent[-task_picture.LINES :]],
        "entries": task_picture.moments(task, told, sent, claims),
        "children": [
            # Whoever sees this task sees those of its owner, and not surely those of somebody else who has hung theirs below it.
            (row, task_picture.chip_of(row))
            for row in task.children.filter(owner_id=task.owner_id)[: task_picture.CHILDREN]
        ],
        # Not the row's updated_at: a line that comes is a change, and leaves the state as it is.
        "since": told[-1].at if told else task.created_at,
    }


def task_parts(task: Task) -> str:
    """Every part that shows this task, wherever it is on a page."""
    context = task_context(task)
    return "".join(
        _partial(f"{target}-{task.id}", render_to_string(f"dashboard/parts/{template}.html", context))
        for target, template in TASK_PARTS
    )


def present_task(task_id: str) -> Task | None:
    """This task as it is now, with what its parts show; None when it is gone."""
    return TASK_ROWS.filter(pk=task_id).first()


def task_gone(task_id: str, *, rev: int) -> str:
    """The parts of a task that was deleted (row C59)."""
    context = {"id": task_id, "rev": rev}
    return "".join(
        _partial(f"{target}-{task_id}", render_to_string(f"dashboard/parts/{template}.html", context))
        for target, template in (
            ("task", "task_row_gone"),
            ("state", "task_state_gone"),
            ("attn", "attention_gone"),
        )
    )


# ── Clients ───────────────────────────────────────────────────────────────────────────────────────────────────────

_CLIENT_CHIP = {
    ClientState.LIVE: Chip(shape="●", tone="done", word="Live"),
    ClientState.SUSPENDED: Chip(shape="◑", tone="idle", word="In the background"),
    ClientState.INACTIVE: Chip(shape="○", tone="waiting", word="Gone"),
    ClientState.EXPIRED: Chip(shape="⧖", tone="idle", word="Expired"),
    ClientState.CLOSED: Chip(shape="–", tone="idle", word="Disconnected"),
}
_LOST = Chip(shape="○", tone="waiting", word="Lost contact")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tab:
    """A client as its row shows it. ``lag``: see :func:`events.clients.lag`."""

    client: Client
    chip: Chip
    live: bool
    browser: str
    sees: str
    lag: int

    @property
    def link(self) -> str:
        """The page that it shows, where that is one of ours to follow."""
        return self.client.path if re.fullmatch(r"/(?!/)[\w/.-]*", self.client.path, re.ASCII) else ""

    @property
    def over(self) -> bool:
        return not self.client.keeps_claims


_BROWSERS = (
    ("Edg/", "Edge"),
    ("OPR/", "Opera"),
    ("SamsungBrowser/", "Samsung Internet"),
    ("Firefox/", "Firefox"),
    ("FxiOS/", "Firefox"),
    ("CriOS/", "Chrome"),
    ("Chrome/", "Chrome"),
    ("Safari/", "Safari"),
)
_SYSTEMS = (
    ("iPhone", "iOS"), ("iPad", "iPadOS"), ("Android", "Android"), ("Windows", "Windows"), ("Mac OS X", "macOS"),
    ("CrOS", "ChromeOS"), ("Linux", "Linux"),
)  # fmt: skip


def browser_of(user_agent: str) -> str:
    """``Firefox, Linux``; of a program its own name: ``python-httpx 0.28.1``. User agents say what they like: words, no knowledge."""
    browser = next((word for mark, word in _BROWSERS if mark in user_agent), "")
    if not browser:
        name, _, version = user_agent.partition(" ")[0].partition("/")
        return f"{name} {version}".strip()[:60] or "unknown"
    system = next((word for mark, word in _SYSTEMS if mark in user_agent), "")
    return f"{browser}, {system}" if system else browser


def _sees(watches: Sequence[str]) -> str:
    """What a stream asked for, in words."""
    kinds = [name for name in watches if ":" not in name]
    found = [f"all {_and(kinds)}"] if kinds else []
    for kind in ("connection", "task", "client"):
        count = sum(name.startswith(f"{kind}:") for name in watches)
        if count and f"{kind}s" not in kinds:
            found.append(f"{count} {kind}{'s' if count > 1 else ''}")
    return _and(found) if found else "everything"


def tab(client: Client, now: dt.datetime) -> Tab:
    """``now``: by the database's clock."""
    live = clients.seems_live(client, now)
    lost = client.state == ClientState.LIVE and not live
    return Tab(
        client=client,
        chip=_LOST if lost else _CLIENT_CHIP[ClientState(client.state)],
        live=live and client.state == ClientState.LIVE,
        browser=browser_of(client.user_agent),
        sees=_sees(client.watches),
        lag=clients.lag(client, now),
    )


def client_part(client: Client) -> str:
    context = {"tab": tab(client, clients.database_now())}
    return _partial(f"client-{client.pk}", render_to_string("dashboard/parts/client_row.html", context))


def earlier_logins(connection: ManagedAuthConnection) -> list[tuple[LoginFlow, Chip]]:
    """The ten logins before the latest one, newest first."""
    rows = connection.flows.order_by("-number")[1:11]
    return [(row, chip_of_flow(row.status, row.step, wants="", who=row.ended_by)) for row in rows]


# ── The stream ────────────────────────────────────────────────────────────────────────────────────────────────────


def _partial(target: str, html: str, swap: str = "outerMorph") -> str:
    # No white space around the element: a morph would add it to the page as text, once per message.
    return f'<hx-partial hx-target="#{target}" hx-swap="{swap}">{html.strip()}</hx-partial>'


def connection_parts(item: Picture) -> str:
    """Every part that shows this connection, wherever it is on a page. Parts that are not there are ignored."""
    context = {"item": item}
    return "".join(
        (
            _partial(f"row-{item.id}", render_to_string("dashboard/parts/row.html", context)),
            _partial(f"state-{item.id}", render_to_string("dashboard/parts/state.html", context)),
            _partial(f"attn-{item.id}", render_to_string("dashboard/parts/attention_item.html", context)),
            _partial(f"facts-{item.id}", render_to_string("dashboard/parts/facts.html", context)),
            _partial(
                f"attempts-{item.id}",
                render_to_string(
                    "dashboard/parts/attempts.html",
                    {"item": item, "attempts": earlier_logins(item.connection)},
                ),
            ),
            _partial(
                f"timeline-{item.id}",
                render_to_string(
                    "dashboard/parts/timeline.html",
                    {"item": item, "entries": timeline(item.connection, item.flow)},
                ),
            ),
        )
    )


def present(connection_id: str) -> Picture | None:
    """The picture of this connection as it is now; None when it is gone."""
    row = (
        ManagedAuthConnection.objects.filter(pk=connection_id)
        .select_related("profile", "credential", "owner")
        .first()
    )
    if row is None:
        return None
    flow = row.latest_flow()
    if flow is not None:
        flow.connection = row
    return picture(row, flow)


def gone(connection_id: str, *, rev: int) -> str:
    """The parts of a connection that was deleted."""
    context = {"id": connection_id, "rev": rev}
    return "".join(
        (
            _partial(f"row-{connection_id}", render_to_string("dashboard/parts/row_gone.html", context)),
            _partial(f"state-{connection_id}", render_to_string("dashboard/parts/state_gone.html", context)),
            _partial(
                f"attn-{connection_id}", render_to_string("dashboard/parts/attention_gone.html", context)
            ),
        )
    )


def live_message(envelope: Envelope) -> str | None:
    """The HTML of one unnamed message of ``GET /live``: the present picture of what the event is about.

    The same for every viewer; rendered once per event and process. None: no page shows anything of it.
    """
    kind, _, object_id = envelope.topic.partition(":")
    if envelope.name.startswith("claim."):
        html = render_to_string("dashboard/parts/who.html", {"who": who_is_at(envelope.topic)})
        return _partial(f"who-{object_id}", html)
    if kind == "client":
        client = Client.objects.filter(owner_id=envelope.audience, cid=object_id).first()
        return None if client is None else client_part(client)
    if kind == "connection":
        item = present(object_id)
        if item is None:
            return gone(object_id, rev=int(envelope.data.get("version", 0)) + 1)
        return connection_parts(item)
    if kind == "task":
        task = present_task(object_id)
        if task is None:
            return task_gone(object_id, rev=int(envelope.data.get("version", 0)) + 1)
        return task_parts(task)
    return None
