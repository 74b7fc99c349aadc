"""The pages of the dashboard. Thin: parse, call one verb of ``transitions.py``, translate its result or its exception.

Every page reads the cursor of the log before it reads its rows: the stream that the page opens goes on from there, so nothing that
happens in between is missed. Every form is a plain POST followed by a redirect; with script (``HX-Request``) the answer is the
parts that changed, which are those of the stream.
"""

from __future__ import annotations

import csv
import dataclasses
import datetime as dt
import functools
import hashlib
import io
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec

from django.conf import settings
from django.contrib import messages
from django.contrib.auth import views as auth_views
from django.contrib.auth.views import redirect_to_login
from django.core.cache import cache
from django.core.paginator import Paginator
from django.db.models import Q, QuerySet
from django.http import Http404, HttpRequest, HttpResponse, HttpResponseNotAllowed, JsonResponse
from django.http.response import HttpResponseBase
from django.shortcuts import redirect, render
from django.template.loader import render_to_string
from django.utils import timezone
from django.utils.cache import patch_cache_control
from django.utils.html import escape
from django.views.decorators.debug import sensitive_post_parameters

from connections import access, fragments, idempotency, page_forms, payloads, task_picture, tasks, transitions
from connections.access import Forbidden, NotFound, Principal
from connections.errors import ApiError
from connections.models import ManagedAuthConnection, Profile
from connections.states import FlowStatus
from connections.tasks import InvalidTransition
from events import log
from events.envelope import CATALOGUE, SIGNAL_NAMES
from events.models import Event

P = ParamSpec("P")

PER_PAGE = 25
FEED_PAGE = 50
EXPORT_LIMIT = 5000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Visit:
    """One request of somebody who is signed in. ``cursor``: up to where the log was when it began."""

    request: HttpRequest
    principal: Principal
    cursor: int
    now: dt.datetime

    @property
    def heartbeat_seconds(self) -> int:
        return int(settings.HEARTBEAT_SECONDS)

    @property
    def login(self) -> str:
        """A name for this login session, by which a page knows that somebody signed in anew; it opens nothing."""
        return self.principal.binding[-8:]

    @property
    def by_script(self) -> bool:
        return self.request.headers.get("HX-Request") == "true"

    def param(self, name: str) -> str:
        """A parameter to search by: no NUL (PostgreSQL has none), no endless text."""
        return self.request.GET.get(name, "").replace("\0", "").strip()[:200]

    def page(self, template: str, context: dict[str, Any], *, status: int = 200) -> HttpResponse:
        shown = {"visit": self, "counts": fragments.counts(self.principal), **context}
        return render(self.request, f"dashboard/{template}", shown, status=status)

    def part(self, template: str, context: dict[str, Any]) -> HttpResponse:
        return render(self.request, f"dashboard/parts/{template}", {"visit": self, **context})


View = Callable[Concatenate[Visit, P], HttpResponseBase]


def page(*methods: str) -> Callable[[View[P]], Callable[Concatenate[HttpRequest, P], HttpResponseBase]]:
    """Somebody who is signed in, one of these methods; foreign ids are 404, looking without acting is 403."""

    def decorate(view: View[P]) -> Callable[Concatenate[HttpRequest, P], HttpResponseBase]:
        @functools.wraps(view)
        @sensitive_post_parameters()
        def wrapper(request: HttpRequest, *args: P.args, **kwargs: P.kwargs) -> HttpResponseBase:
            if request.method not in methods and not (request.method == "HEAD" and "GET" in methods):
                return HttpResponseNotAllowed(methods)
            principal = access.of_request_user(request.user, request.session.session_key)
            if principal is None or not access.is_page_of(principal, request.headers.get("X-Page-User")):
                if request.headers.get("HX-Request"):
                    return HttpResponse("Sign in again.", status=401, content_type="text/plain")
                # A form that was sent while signed out is not repeated by signing in.
                target = request.get_full_path() if request.method in ("GET", "HEAD") else "/"
                return redirect_to_login(target)
            visit = Visit(request=request, principal=principal, cursor=log.newest(), now=timezone.now())
            try:
                response = view(visit, *args, **kwargs)
            except NotFound:
                raise Http404 from None
            except Forbidden:
                response = _refused(visit)
            patch_cache_control(response, no_store=True, private=True)
            response.headers["Vary"] = "Cookie, HX-Request"
            return response

        return wrapper

    return decorate


def _refused(visit: Visit) -> HttpResponse:
    text = "You may look at this, but only its owner's team can act on it."
    if visit.by_script:
        return notice(text, status=403)
    return visit.page("message.html", {"title": "Not allowed", "text": text, "back": "/"}, status=403)


# ── Home ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _attention(visit: Visit) -> dict[str, Any]:
    keep = [part for part in visit.param("keep").split(",") if part][:50] if visit.by_script else []
    found = fragments.attention(visit.principal, keep=keep)
    waiting = fragments.tasks_attention(visit.principal, keep=keep)
    return {
        "attention": [(item, visit.principal.may_operate(item.connection.owner_id)) for item in found],
        "attention_tasks": [
            (
                each,
                visit.principal.may_operate(each["task"].owner_id),
                task_picture.may_type(visit.principal, each["task"]),
            )
            for each in waiting
        ],
        "attention_count": sum(item.needs_attention for item in found)
        + sum(each["item"].needs_attention for each in waiting),
        "newcomer": not found
        and not waiting
        and not ManagedAuthConnection.objects.visible_to(visit.principal).exists(),
    }


def _visible_events(principal: Principal) -> QuerySet[Event]:
    # What server processes say to each other through the log is nobody's history.
    rows = Event.objects.exclude(name__in=SIGNAL_NAMES)
    return rows if principal.audiences is None else rows.filter(audience__in=principal.audiences)


#: What the home page tells of: logins, and what became of tasks that are not represented by one.
_OF_OBJECTS = Q(topic__startswith="connection:") | (
    Q(name="task.status") & ~Q(data__kind__in=sorted(tasks.TAKES_NONE))
)


def _recent(visit: Visit) -> dict[str, Any]:
    rows = _visible_events(visit.principal).filter(_OF_OBJECTS)
    shown = rows.exclude(name__in=fragments.PASSING).order_by("-id")[:8]
    return {"recent": fragments.entries(list(shown)), "compact": True}


@page("GET")
def home(visit: Visit) -> HttpResponse:
    total = ManagedAuthConnection.objects.visible_to(visit.principal).count()
    return visit.page("home.html", {"section": "home", "total": total, **_attention(visit), **_recent(visit)})


@page("GET")
def attention(visit: Visit) -> HttpResponse:
    """The list of the home page alone. ``keep``: what the page shows already and keeps, also when it is done."""
    return visit.part("attention.html", _attention(visit)) if visit.by_script else redirect("home")


@page("GET")
def recent(visit: Visit) -> HttpResponse:
    return visit.part("recent.html", _recent(visit)) if visit.by_script else redirect("home")


# ── Lists ─────────────────────────────────────────────────────────────────────────────────────────────────────────

STATES: dict[str, tuple[str, Q]] = {
    "waiting": ("Waiting", Q(flow_status=FlowStatus.IN_PROGRESS, flow_step__in=fragments.WAITING_STEPS)),
    "working": ("Working", Q(flow_status=FlowStatus.IN_PROGRESS, flow_step__in=fragments.WORKING_STEPS)),
    "failed": ("Failed", Q(flow_status=FlowStatus.FAILED)),
    "expired": ("Expired", Q(flow_status=FlowStatus.EXPIRED)),
    "cancelled": ("Cancelled", Q(flow_status=FlowStatus.CANCELED)),
    "done": ("Done", Q(flow_status=FlowStatus.SUCCESS)),
    "new": ("Not signed in yet", Q(flow_status=None)),
}
SORTS = {
    "newest": ("Newest first", ("-created_at", "-id")),
    "changed": ("Last change", ("-updated_at", "-id")),
    "domain": ("Domain", ("domain", "profile__name", "id")),
}


@page("GET")
def connection_list(visit: Visit) -> HttpResponse:
    q, status, owner, sort = (visit.param(name) for name in ("q", "status", "owner", "sort"))
    rows = fragments.connections_of(visit.principal)
    owners = sorted(set(rows.order_by().values_list("owner__username", flat=True).distinct()))
    if q:
        rows = rows.filter(Q(id__icontains=q) | Q(domain__icontains=q) | Q(profile__name__icontains=q))
    if status in STATES:
        rows = rows.filter(STATES[status][1])
    if owner:
        rows = rows.filter(owner__username=owner)
    sort = sort if sort in SORTS else "newest"
    shown = Paginator(rows.order_by(*SORTS[sort][1]), PER_PAGE).get_page(visit.request.GET.get("page"))
    return visit.page(
        "connections.html",
        {
            "section": "connections",
            "items": fragments.pictures(shown.object_list),
            "page": shown,
            "query": query_without(visit, "page"),
            "q": q,
            "status": status,
            "owner": owner,
            "owners": owners,
            "sort": sort,
            "statuses": [(name, label) for name, (label, _) in STATES.items()],
            "sorts": [(name, label) for name, (label, _) in SORTS.items()],
            "filtered": bool(q or status or owner),
        },
    )


def query_without(visit: Visit, *without: str) -> str:
    """The filters of this page for a link that changes ``without``: ``q=acme&``, or nothing."""
    kept = visit.request.GET.copy()
    for name in without:
        kept.pop(name, None)
    text = kept.urlencode()
    return f"{text}&" if text else ""


# ── Events ────────────────────────────────────────────────────────────────────────────────────────────────────────


@page("GET")
def event_feed(visit: Visit) -> HttpResponse:
    """The log, newest first. ``cursor``: only what is older. ``format``: csv or json, with the same filters."""
    kind, wanted, actor, cursor = (visit.param(name) for name in ("type", "object", "actor", "cursor"))
    rows = _visible_events(visit.principal)
    if kind in CATALOGUE:
        rows = rows.filter(name=kind)
    elif not wanted.startswith(("client:", "cid-")):
        rows = rows.exclude(name__in=fragments.COMINGS_AND_GOINGS)
    if wanted:
        named = ManagedAuthConnection.objects.visible_to(visit.principal).filter(
            Q(domain__icontains=wanted) | Q(profile__name__icontains=wanted)
        )
        topics = [f"connection:{pk}" for pk in named.values_list("pk", flat=True)[:200]]
        rows = rows.filter(Q(topic__in=topics) | Q(topic__icontains=wanted) | Q(object_id__icontains=wanted))
    if actor:
        rows = rows.filter(actor__icontains=actor)
    before = int(cursor) if cursor.isascii() and cursor.isdigit() and len(cursor) < 19 else None
    if before is not None:
        rows = rows.filter(id__lt=before)
    rows = rows.order_by("-id")
    if visit.param("format") in ("csv", "json"):
        return _export(list(rows[:EXPORT_LIMIT]), visit.param("format"))
    found = list(rows[: FEED_PAGE + 1])
    shown = found[:FEED_PAGE]
    return visit.page(
        "events.html",
        {
            "section": "events",
            "feed": fragments.entries(shown),
            "older": shown[-1].id if len(found) > FEED_PAGE else None,
            "newest": visit.cursor,
            "cursor": before,
            "query": query_without(visit, "cursor", "format"),
            "types": sorted(CATALOGUE),
            "type": kind,
            "object": wanted,
            "actor": actor,
            "filtered": bool(kind or wanted or actor),
        },
    )


def _export(rows: list[Event], form: str) -> HttpResponse:
    if form == "json":
        found = [
            {
                "id": row.id,
                "name": row.name,
                "topic": row.topic,
                "at": payloads.timestamp(row.at),
                "actor": row.actor,
                "data": row.data,
            }
            for row in rows
        ]
        return JsonResponse(
            found, safe=False, headers={"Content-Disposition": 'attachment; filename="events.json"'}
        )
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["id", "at", "name", "topic", "version", "actor"])
    for row in rows:
        line = (row.id, payloads.timestamp(row.at), row.name, row.topic, row.version, row.actor)
        writer.writerow([_cell(value) for value in line])
    return HttpResponse(
        text.getvalue(),
        content_type="text/csv; charset=utf-8",
        headers={"Content-Disposition": 'attachment; filename="events.csv"'},
    )


def _cell(value: Any) -> str:
    """A spreadsheet takes text that begins with one of these as a formula."""
    text = str(value)
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t", "\r") else text


# ── One connection ────────────────────────────────────────────────────────────────────────────────────────────────


def _rows() -> QuerySet[Any]:
    return ManagedAuthConnection.objects.select_related("profile", "credential", "owner")


def _visible(visit: Visit, connection_id: str) -> ManagedAuthConnection:
    row: ManagedAuthConnection = access.visible(visit.principal, _rows(), connection_id)
    return row


def _operable(visit: Visit, connection_id: str) -> ManagedAuthConnection:
    row: ManagedAuthConnection = access.operable(visit.principal, _rows(), connection_id)
    return row


def _detail(
    visit: Visit, connection: ManagedAuthConnection, *, link: str = "", status: int = 200
) -> HttpResponse:
    transitions.expire_if_due(connection_id=connection.id, now=visit.now)
    connection.refresh_from_db()
    flow = connection.latest_flow()
    if flow is not None:
        flow.connection = connection
    return visit.page(
        "connection.html",
        {
            "section": "connections",
            "item": fragments.picture(connection, flow),
            "entries": fragments.timeline(connection, flow),
            "attempts": fragments.earlier_logins(connection),
            "may_act": visit.principal.may_operate(connection.owner_id),
            "link": link,
        },
        status=status,
    )


@page("GET")
def connection_detail(visit: Visit, connection_id: str) -> HttpResponse:
    return _detail(visit, _visible(visit, connection_id))


@page("GET", "POST")
def connection_new(visit: Visit) -> HttpResponse:
    """Create one for oneself; with ``start`` its first login begins at once."""
    owner_id = visit.principal.user_id
    if owner_id is None:
        raise Forbidden
    form = page_forms.NewConnection(visit.request.POST or None, owner_id=owner_id)
    existing_id = ""
    if visit.request.method == "POST" and form.is_valid():
        try:
            row = transitions.create_connection(
                owner_id=owner_id,
                domain=form.cleaned_data["domain"],
                profile_name=form.cleaned_data["profile_name"],
                config=form.config(),
                actor=visit.principal,
                now=visit.now,
            )
        except transitions.AlreadyExists as error:
            existing_id = error.existing_id
            form.add_error(None, "This profile already has a connection to this domain.")
        except transitions.QuotaReached as error:
            form.add_error(None, str(error))
        else:
            if visit.request.POST.get("start"):
                transitions.start_login(connection_id=row.id, actor=visit.principal, now=timezone.now())
            return redirect("connection", row.id)
    profiles = (
        Profile.objects.filter(owner_id=owner_id)
        .order_by("-last_used_at")
        .values_list("name", flat=True)[:50]
    )
    context = {"section": "connections", "form": form, "existing_id": existing_id, "profiles": profiles}
    return visit.page("connection_form.html", context, status=400 if form.errors else 200)


@page("GET", "POST")
def connection_edit(visit: Visit, connection_id: str) -> HttpResponse:
    row = _operable(visit, connection_id)
    initial = page_forms.ConnectionSettings.initial_of(row)
    form = page_forms.ConnectionSettings(visit.request.POST or None, initial=initial, owner_id=row.owner_id)
    form.allow_interval(row.health_check_interval)
    if visit.request.method == "POST" and form.is_valid():
        transitions.update_connection(
            connection_id=row.id, changes=form.config(), actor=visit.principal, now=visit.now
        )
        messages.success(visit.request, "The settings were saved.")
        return redirect("connection", row.id)
    context = {"section": "connections", "form": form, "connection": row}
    return visit.page("connection_form.html", context, status=400 if form.errors else 200)


@page("GET", "POST")
def connection_delete(visit: Visit, connection_id: str) -> HttpResponse:
    row = _operable(visit, connection_id)
    if visit.request.method == "POST":
        transitions.delete_connection(connection_id=row.id, actor=visit.principal, now=visit.now)
        messages.success(visit.request, f"{row.domain} / {row.profile.name} was deleted.")
        return redirect("connections")
    return visit.page("connection_delete.html", {"section": "connections", "connection": row})


# ── Acting on a connection ────────────────────────────────────────────────────────────────────────────────────────


def notice(text: str, *, status: int, target: str = "notices", parts: str = "") -> HttpResponse:
    """A message for somebody whose browser runs the script: beside the form it belongs to, or on top of the page.

    ``data-say`` names the place once more: a question that comes with ``parts`` is not on the page yet when htmx looks for it.
    """
    say = f'<span data-say="{target}">{escape(text)}</span>'
    html = f'{parts}<hx-partial hx-target="#{target}" hx-swap="innerHTML">{say}</hx-partial>'
    return HttpResponse(html, status=status)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Done:
    """What came of a form, before anybody draws it; it holds nothing of what was typed. ``fresh``: with the parts as they are now."""

    status: int = 200
    text: str = ""
    fresh: bool = True


def message_id_of(visit: Visit) -> str | None:
    return visit.request.headers.get("Idempotency-Key") or visit.request.POST.get("message_id") or None


def once(visit: Visit, act: Callable[[], Done]) -> Done:
    """``act``, once for each message id (``Idempotency-Key``, or the field ``message_id``); again, it is what it was.

    What is kept is the outcome and not the parts: those are drawn after the commit, since on PostgreSQL nobody else can tell anything
    before it, and who asks again wants to see what is so now.
    """
    sent = visit.request.POST
    key = message_id_of(visit)
    if key is None:
        return act()
    content = sorted(
        [name, values] for name, values in sent.lists() if name not in ("csrfmiddlewaretoken", "message_id")
    )

    def answer() -> idempotency.Answer:
        done = act()
        return idempotency.Answer(status=done.status, data=dataclasses.asdict(done))

    try:
        kept = idempotency.once(
            scope=f"{visit.principal.key} page",
            key=str(idempotency.key_of(key)),
            request=[visit.request.method, visit.request.path, content],
            act=answer,
            now=visit.now,
        )
    except ApiError as error:
        text = error.message
        if error.code == "idempotency_conflict":
            text = "This form was sent before, with other content. Nothing was changed now."
        return Done(status=error.status, text=text)
    return Done(**kept.data)


def _acted(visit: Visit, connection_id: str, act: Callable[[], Done]) -> HttpResponse:
    """Act once, then show what came of it: the parts as they are now; without script, the page they are on."""
    done = once(visit, act)
    if done.status >= 400:
        return _failed(visit, connection_id, done.text, status=done.status, fresh=done.fresh)
    if visit.by_script and done.text:
        return notice(done.text, status=done.status)
    if visit.by_script:
        item = fragments.present(connection_id)
        return HttpResponse(fragments.connection_parts(item) if item else "")
    if done.text:
        messages.success(visit.request, done.text)
    return redirect(_back(visit, connection_id))


def _back(visit: Visit, connection_id: str) -> str:
    # The home page's forms come back to the home page. Only these two places have forms, so no URL is taken from the request.
    referer = visit.request.headers.get("Referer", "")
    return "/" if referer == visit.request.build_absolute_uri("/") else f"/connections/{connection_id}"


def _failed(visit: Visit, connection_id: str, text: str, *, status: int, fresh: bool = False) -> HttpResponse:
    """What went wrong, beside the form it belongs to. ``fresh``: with the parts as they are now."""
    if visit.by_script:
        item = fragments.present(connection_id)
        asking = item.flow.interaction_id if item and item.flow else ""
        return notice(
            text,
            status=status,
            target=f"say-{connection_id}-{asking}" if asking else "notices",
            parts=fragments.connection_parts(item) if item and fresh else "",
        )
    messages.error(visit.request, text)
    return redirect(_back(visit, connection_id))


@page("POST")
def answer(visit: Visit, connection_id: str) -> HttpResponse:
    """The answer to the open question. The values go to the verb and nowhere else: no log, no message, no fragment."""
    row = _operable(visit, connection_id)
    sent = visit.request.POST
    values = {name.removeprefix("field."): sent[name] for name in sent if name.startswith("field.")}
    choice = sent.get("selected_choice_id")
    # A form always names its question: without, an old page could answer a new one.
    interaction_id = sent.get("interaction_id") or "none"

    def act() -> Done:
        try:
            transitions.submit(
                connection_id=row.id,
                answer=transitions.SubmittedAnswer(
                    interaction_id=interaction_id,
                    field_values=values if values or choice is None else None,
                    choice_id=choice,
                ),
                actor=visit.principal,
                now=visit.now,
            )
        except transitions.StaleInteraction as error:
            if error.answered_at is None:
                return Done(status=400, text=str(error))
            first = _who_was_first(visit, error.answered_by, error.answered_at)
            return Done(
                status=409, text=f"{first}. Please answer the new question." if error.asking else f"{first}."
            )
        except transitions.InvalidSubmission as error:
            return Done(status=400, text=str(error), fresh=False)
        except transitions.FlowOver as error:
            before = transitions.answer_to(error.flow, interaction_id) if error.flow else None
            first = f"{_who_was_first(visit, before.submitted_by, before.created_at)}. " if before else ""
            return Done(status=410, text=f"{first}This login has ended. Your answer was not sent.")
        return Done()

    return _acted(visit, row.id, act)


def _who_was_first(visit: Visit, name: str, at: dt.datetime) -> str:
    """``op2 answered 3 s ago``: whose answer was accepted instead, and never what it was."""
    words = {visit.principal.name: "You", "hosted page": "Somebody on the hosted page"}
    who = words.get(name, name)
    seconds = max(0, int((visit.now - at).total_seconds()))
    return f"{who} answered {seconds} s ago" if seconds < 120 else f"{who} answered {seconds // 60} min ago"


@page("POST")
def start(visit: Visit, connection_id: str) -> HttpResponse:
    row = _operable(visit, connection_id)

    def act() -> Done:
        try:
            transitions.start_login(connection_id=row.id, actor=visit.principal, now=visit.now)
        except transitions.LoginInProgress:
            return Done(status=409, text="A login is running already.")
        return Done()

    return _acted(visit, row.id, act)


@page("POST")
def cancel(visit: Visit, connection_id: str) -> HttpResponse:
    row = _operable(visit, connection_id)
    reason = visit.request.POST.get("reason", "").replace("\0", "").strip()[:500]

    def act() -> Done:
        transitions.cancel(connection_id=row.id, actor=visit.principal, reason=reason, now=visit.now)
        return Done()

    return _acted(visit, row.id, act)


@page("POST")
def seen(visit: Visit, connection_id: str) -> HttpResponse:
    row = _operable(visit, connection_id)
    flow_id = (
        row.flows.filter(pk=visit.request.POST.get("flow_id", "")[:40]).values_list("pk", flat=True).first()
    )
    if flow_id is None:
        raise NotFound

    def act() -> Done:
        try:
            transitions.acknowledge(flow_id=flow_id, actor=visit.principal, now=visit.now)
        except InvalidTransition:
            return Done(status=409, text="This login is still running.")
        return Done()

    return _acted(visit, row.id, act)


@page("POST")
def check(visit: Visit, connection_id: str) -> HttpResponse:
    row = _operable(visit, connection_id)

    def act() -> Done:
        transitions.request_check(connection_id=row.id, actor=visit.principal, now=visit.now)
        return Done(text="A check was queued. Its result shows up here.")

    return _acted(visit, row.id, act)


@page("POST")
def link(visit: Visit, connection_id: str) -> HttpResponse:
    """A fresh one-time link to the hosted page. It is shown once, and never stored in the page of the stream."""
    row = _operable(visit, connection_id)
    try:
        _, code = transitions.new_handoff(connection_id=row.id, actor=visit.principal, now=visit.now)
    except transitions.FlowOver:
        return _failed(
            visit, row.id, "No login is running, so there is nothing to link to.", status=410, fresh=True
        )
    url = payloads.hosted_url(row.id, code)
    if not visit.by_script:
        # No redirect: the code exists in this answer alone.
        return _detail(visit, row, link=url)
    html = render_to_string("dashboard/parts/link.html", {"link": url}).strip()
    return HttpResponse(f'<hx-partial hx-target="#link-{row.id}" hx-swap="innerHTML">{html}</hx-partial>')


# ── Signing in ────────────────────────────────────────────────────────────────────────────────────────────────────

SIGNIN_FAILURES = 8
SIGNIN_WINDOW = 300


class SignIn(auth_views.LoginView):
    """Django's own, with our page and a brake: ``SIGNIN_FAILURES`` wrong passwords per address and name in five minutes."""

    template_name = "dashboard/signin.html"
    redirect_authenticated_user = True

    def _brake(self) -> str:
        name = self.request.POST.get("username", "")[:150].lower()
        address = self.request.META.get("REMOTE_ADDR", "")
        return "signin:" + hashlib.sha256(f"{address}\0{name}".encode()).hexdigest()

    def post(self, request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponse:
        if cache.get(self._brake(), 0) < SIGNIN_FAILURES:
            return super().post(request, *args, **kwargs)
        # An unbound form: the password is not even looked at.
        context = self.get_context_data(form=self.get_form_class()(request), blocked=True)
        return self.render_to_response(context, status=429, headers={"Retry-After": str(SIGNIN_WINDOW)})

    def form_invalid(self, form: Any) -> HttpResponse:
        key = self._brake()
        cache.add(key, 0, SIGNIN_WINDOW)
        try:
            cache.incr(key)
        except ValueError:
            # It ran out between the two calls: then the window is over anyway.
            cache.set(key, 1, SIGNIN_WINDOW)
        return self.render_to_response(self.get_context_data(form=form), status=400)

    def form_valid(self, form: Any) -> HttpResponse:
        cache.delete(self._brake())
        return super().form_valid(form)


class SignOut(auth_views.LogoutView):
    """By POST alone."""
