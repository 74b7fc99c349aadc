"""The pages of clients: which browser tabs and programs are connected, and the form that disconnects one."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlencode

from asgiref.sync import async_to_sync
from django.contrib import messages
from django.core.paginator import Paginator
from django.db.models import QuerySet
from django.http import HttpResponse
from django.shortcuts import redirect

from connections import fragments
from connections.access import Forbidden, NotFound
from connections.views import PER_PAGE, Visit, page
from events import clients, operations
from events.models import Client
from events.states import CLIENT_KEEPS, ClientState

DEFAULT_REASON = "disconnected by an operator"


def _rows(visit: Visit) -> QuerySet[Client]:
    rows: QuerySet[Client] = clients.visible_to(visit.principal.audiences)
    return rows


@page("GET")
def client_list(visit: Visit) -> HttpResponse:
    """Without a filter, those that are there and those that are expected back."""
    state, user = visit.param("state"), visit.param("user")
    rows = _rows(visit)
    there = rows.filter(state__in=CLIENT_KEEPS)
    # Also whoever is chosen and not there: a filter that is on has to be seen.
    people = sorted({user} - {""} | set(there.order_by().values_list("who", flat=True).distinct()[:200]))
    rows = rows.filter(state=state) if state in ClientState.values else there
    if user:
        rows = rows.filter(who=user)
    shown = Paginator(rows, PER_PAGE).get_page(visit.request.GET.get("page"))
    filters = {name: value for name, value in (("state", state), ("user", user)) if value}
    now = clients.database_now()
    return visit.page(
        "clients.html",
        {
            "section": "clients",
            "tabs": [
                (fragments.tab(row, now), visit.principal.may_operate(row.owner_id))
                for row in shown.object_list
            ],
            "page": shown,
            "query": f"{urlencode(filters)}&" if filters else "",
            "state": state,
            "user": user,
            "people": people,
            "states": ClientState.choices,
            "filtered": bool(filters),
            "nameless": async_to_sync(operations.nameless_streams)(),
        },
    )


@page("GET", "POST")
def client_disconnect(visit: Visit, pk: int) -> HttpResponse:
    """The question as a page of its own, for browsers that run no script; and what both forms are sent to."""
    row = _rows(visit).filter(pk=pk).first()
    if row is None:
        raise NotFound(str(pk))
    if not visit.principal.may_operate(row.owner_id):
        raise Forbidden(str(pk))
    if visit.request.method != "POST":
        context: dict[str, Any] = {"section": "clients", "client": row}
        return visit.page("client_disconnect.html", context)
    reason = visit.request.POST.get("reason", "").replace("\0", "").strip()[:200] or DEFAULT_REASON
    if clients.close(pk=row.pk, reason=reason, actor=visit.principal.name):
        messages.success(visit.request, f"{row.who} was disconnected.")
    else:
        messages.warning(visit.request, f"{row.who} was gone already.")
    return redirect("clients")
