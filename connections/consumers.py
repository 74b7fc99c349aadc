"""Topic, permission and snapshot of each stream. How a stream runs is in ``events/consumers.py``."""

from __future__ import annotations

import asyncio
import datetime as dt
import hashlib
import ipaddress
import secrets
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, ClassVar, TypeVar, cast
from urllib.parse import parse_qs

from django.conf import settings
from django.contrib.auth import get_user
from django.http import HttpRequest, parse_cookie
from django.utils import timezone

from connections import fragments, handoff, hosted, payloads, transitions
from connections.access import NotFound, Principal, is_page_of, of_request_user, visible
from connections.addresses import client_address
from connections.authentication import principal_of_bearer
from connections.errors import ApiError
from connections.models import LoginFlow, ManagedAuthConnection
from connections.states import FLOW_END
from events import clients, registry, sse, units
from events.clients import Arrival, Caller
from events.consumers import EventStreamConsumer, Grant, Refused, now_text
from events.envelope import Envelope, Interest, parse_topics, topic_of

MAX_CURSOR = 2**63 - 1
T = TypeVar("T")


def headers_of(scope: Any) -> dict[str, str]:
    return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}


def query_of(scope: Any) -> dict[str, str]:
    """The last value of every parameter."""
    parsed = parse_qs(scope["query_string"].decode("latin-1"), keep_blank_values=True)
    return {name: values[-1] for name, values in parsed.items()}


def session_principal(headers: dict[str, str]) -> Principal | None:
    """The user of the session cookie, checked as Django's middleware checks it (password changes end sessions).

    Only for our own pages: a browser also adds the cookie to what a page of a neighbour asks for (the same host on another port), and
    opening a stream makes a client.
    """
    if headers.get("sec-fetch-site") in ("cross-site", "same-site"):
        return None
    key = parse_cookie(headers.get("cookie", "")).get(settings.SESSION_COOKIE_NAME)
    if not key:
        return None
    request = HttpRequest()
    request.session = import_module(settings.SESSION_ENGINE).SessionStore(key)
    return of_request_user(get_user(request), key)


def caller(scope: Any, *, now: dt.datetime, again: bool = False) -> Principal:
    """Who opens a stream: a Bearer token, or the session of the same origin.

    ``again``: it is open, and asked only whether that still holds. Then what others do from the same address neither counts nor limits:
    a 429 would hide that the key was revoked.

    :raises Refused: 401, 410 or 429, with the code of the contract.
    """
    headers = headers_of(scope)
    try:
        if "authorization" in headers:
            address = None if again else _address_of(scope)
            return principal_of_bearer(headers["authorization"], now=now, address=address)
    except ApiError as error:
        raise Refused(error.status, error.code, error.message, headers=error.headers) from error
    principal = session_principal(headers)
    if principal is None:
        raise Refused(
            401, "unauthorized", "Sign in, or send an API key.", headers={"WWW-Authenticate": "Bearer"}
        )
    return principal


def credential(scope: Any) -> tuple[str, bytes]:
    """Stands for what a request identifies itself with: two of the same are the same caller, at the same moment."""
    headers = headers_of(scope)
    shown = [headers.get("authorization", ""), headers.get("cookie", ""), _address_of(scope)]
    # What is kept in memory beyond the request is not the secret itself.
    return ("caller", hashlib.sha256("\0".join(shown).encode()).digest())


def _address_of(scope: Any) -> str:
    """The client's address; streams do not pass ``project.middleware.trusted_proxy``."""
    peer = scope["client"][0] if scope.get("client") else ""
    hops = [value.decode("latin-1") for name, value in scope["headers"] if name.lower() == b"x-forwarded-for"]
    networks = [ipaddress.ip_network(proxy) for proxy in settings.TRUSTED_PROXIES]
    return client_address(peer, ",".join(hops), networks)


def cursor_of(scope: Any, parameter: str) -> int | None:
    """The cursor to go on from: ``Last-Event-ID`` wins over the parameter; empty means none.

    :raises Refused: 400 when it is no number.
    """
    raw = headers_of(scope).get("last-event-id") or query_of(scope).get(parameter) or ""
    if not raw:
        return None
    # Its length is looked at first: int() refuses thousands of digits with an error of its own.
    if not raw.isascii() or not raw.isdigit() or len(raw) > 19 or int(raw) > MAX_CURSOR:
        raise Refused(400, "invalid_cursor", "A cursor is the id of an event: a whole number, not negative.")
    return int(raw)


def topics_of(scope: Any) -> frozenset[str] | None:
    try:
        return parse_topics(query_of(scope).get("topics", ""))
    except ValueError as error:
        raise Refused(400, "invalid_topics", str(error)) from error


def arrival_of(scope: Any, principal: Principal, cursor: int | None) -> Arrival | None:
    """The client whose stream this wants to be; None for a stream without an id, which nothing is kept of.

    :raises Refused: 400 for a page nonce or path of no known form. (A cid that cannot be had is no error: the stream gets another.)
    """
    query = query_of(scope)
    if "cid" not in query or principal.user_id is None:
        return None
    path = query.get("path", "")
    if path and (not path.startswith("/") or not path.isprintable() or len(path) > 300):
        raise Refused(400, "invalid_parameter", "path is the path of a page, at most 300 characters.")
    try:
        # A program that names no page is a new one with every stream.
        page = clients.normal_page(query["page"]) if query.get("page") else secrets.token_urlsafe(12)
    except ValueError as error:
        raise Refused(400, "invalid_parameter", str(error)) from error
    return Arrival(
        caller=Caller(owner_id=principal.user_id, binding=principal.binding, who=principal.name),
        cid=query["cid"][:200],
        page=page,
        process=registry.current().process,
        user_agent=_printable(headers_of(scope).get("user-agent", ""))[:300],
        address=_address_of(scope),
        path=path,
        watches=tuple(sorted(topics_of(scope) or ())),
        cursor=cursor,
    )


def _printable(text: str) -> str:
    return "".join(character for character in text if character.isprintable())


class EventsConsumer(EventStreamConsumer):
    """``GET /api/events``: everything that the caller may see (spec/streams.md, section 1)."""

    KNOWN: ClassVar[frozenset[str]] = frozenset({"topics", "after", "cid", "page", "path"})

    plain_frames = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._key: Any = None
        self._grant: Grant | None = None

    async def authorise(self, *, within: float = 0.0) -> Grant:
        # Made once: a thousand streams are checked again every few seconds.
        self._key = self._key or credential(self.scope)
        again = self._grant is not None
        principal = await units.desk().look(
            lambda: caller(self.scope, now=timezone.now(), again=again),
            key=(*self._key, again),
            within=within,
        )
        if self._grant is not None and self._grant.interest.audiences == principal.audiences:
            return self._grant
        if principal.is_page:
            raise Refused(401, "unauthorized", "The token of a hosted page does not open this stream.")
        unknown = sorted(set(query_of(self.scope)) - self.KNOWN)
        if unknown:
            raise Refused(400, "invalid_parameter", f"Unknown parameter {unknown[0][:60]!r}.")
        interest = Interest(topics=topics_of(self.scope), audiences=principal.audiences)
        after = cursor_of(self.scope, "after")
        self._grant = Grant(
            principal=principal.key,
            interest=interest,
            after=after,
            client=None if again else arrival_of(self.scope, principal, after),
        )
        return self._grant


class ConnectionEventsConsumer(EventStreamConsumer):
    """``GET /auth/connections/{id}/events``: the stream that Kernel's clients read (wire contract, section 3).

    No ``id:``, no ``retry:``, no comment and no control frame: each of these stops a released client.
    """

    control_frames = False
    extra_headers = ((b"X-SSE-Content-Type", b"application/json"),)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._version = 0
        self._opened = False

    @property
    def connection_id(self) -> str:
        return self.scope["url_route"]["kwargs"]["connection_id"]

    def cors_headers(self) -> list[tuple[bytes, bytes]]:
        origin = headers_of(self.scope).get("origin", "")
        if origin not in settings.CORS_ALLOWED_ORIGINS:
            return [(b"Vary", b"Origin")]
        return [(b"Vary", b"Origin"), (b"Access-Control-Allow-Origin", origin.encode())]

    async def authorise(self, *, within: float = 0.0) -> Grant:
        again, self._opened = self._opened, True
        return await units.desk().look(lambda: self._grant(again))

    def _grant(self, again: bool) -> Grant:
        now = timezone.now()
        by_cookie = False
        token = parse_cookie(headers_of(self.scope).get("cookie", "")).get(handoff.STREAM_COOKIE)
        if token and "authorization" not in headers_of(self.scope):
            principal = self._page_principal(token, now)
            by_cookie = True
        else:
            principal = caller(self.scope, now=now, again=again)
        if principal.is_page and principal.connection_id != self.connection_id:
            # Row A02: the token of another flow opens nothing, and does not learn what exists.
            raise Refused(401, "unauthorized", "This session token does not work here.")
        try:
            row = visible(principal, ManagedAuthConnection.objects.all(), self.connection_id)
        except NotFound:
            raise Refused(404, "not_found", "There is no such connection.") from None
        transitions.expire_if_due(connection_id=row.id, now=now)
        interest = Interest(
            topics=frozenset({topic_of("connection", row.id)}), audiences=frozenset({row.owner_id})
        )
        return Grant(principal=principal.key, interest=interest, state=(principal.flow_id, by_cookie))

    def _page_principal(self, token: str, now: dt.datetime) -> Principal:
        try:
            return handoff.principal_of_token(token, now=now)
        except handoff.TokenExpired as error:
            raise Refused(401, "session_expired", "The session of this page has expired.") from error
        except handoff.TokenOver as error:
            raise Refused(410, "session_expired", "This login is over.") from error

    async def opening(self, grant: Grant) -> list[bytes]:
        state = await units.desk().look(lambda: self._present_state(grant.state[0]))
        return [] if state is None else [await self._frame(state, state.pop("at"), None, grant)]

    def _present_state(self, flow_id: str | None) -> dict[str, Any] | None:
        flows = LoginFlow.objects.filter(connection_id=self.connection_id).order_by("-number")
        flow = flows.filter(pk=flow_id).first() if flow_id else flows.first()
        return (
            None if flow is None else payloads.flow_state(flow) | {"at": payloads.timestamp(flow.updated_at)}
        )

    async def encode(self, batch: Sequence[Envelope], grant: Grant) -> bytes:
        frames = []
        for envelope in batch:
            data = dict(envelope.data)
            wrong_flow = grant.state[0] is not None and data.get("flow_id") != grant.state[0]
            if envelope.name == "connection.deleted":
                self.finished = True
            if envelope.name != "flow.state" or wrong_flow or data["version"] <= self._version:
                continue
            for name in ("id", "connection_id"):
                data.pop(name)
            frames.append(await self._frame(data, data.pop("at"), envelope, grant))
            if self.finished:
                break
        return b"".join(frames)

    async def _frame(self, state: dict[str, Any], at: str, envelope: Envelope | None, grant: Grant) -> bytes:
        self._version = state["version"]
        self.finished = state["flow_status"] in FLOW_END
        body = {"event": "managed_auth_state", "timestamp": at, **state}
        if grant.state[1]:
            body["html"] = await _shared(envelope, "card", hosted.card_html, state["flow_id"])
        return sse.frame("managed_auth_state", body)

    def heartbeat(self) -> bytes:
        return sse.frame("sse_heartbeat", {"event": "sse_heartbeat", "timestamp": now_text()})


async def _shared(envelope: Envelope | None, key: str, render: Callable[[Any], T], argument: Any) -> T:
    """Rendered once per event and process, whoever asks first; the others wait for the same result."""
    if envelope is None:
        return await units.desk().look(lambda: render(argument))
    task = envelope.cache.get(key)
    if task is None:
        task = envelope.cache[key] = asyncio.ensure_future(units.desk().look(lambda: render(argument)))
        # A fault is not remembered: the next one to ask tries again.
        task.add_done_callback(
            lambda done: done.cancelled() or (done.exception() and envelope.cache.pop(key))
        )
    # A stream that leaves while it waits must not take the result away from the others.
    return cast(T, await asyncio.shield(task))


def _part_of(envelope: Envelope) -> tuple[str, bool]:
    return envelope.topic, envelope.name.startswith("claim.")


class LiveConsumer(EventStreamConsumer):
    """``GET /live``: the one stream of all dashboard pages. HTML in unnamed messages, numbers in named ones."""

    COUNTS_EVERY = 1.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._counted_at = 0.0

    async def authorise(self, *, within: float = 0.0) -> Grant:
        headers = headers_of(self.scope)
        key = ("session", *credential(self.scope))
        principal = await units.desk().look(lambda: session_principal(headers), key=key, within=within)
        if principal is None or not is_page_of(principal, headers.get("x-page-user")):
            raise Refused(401, "unauthorized", "Sign in to see the dashboard.")
        interest = Interest(topics=topics_of(self.scope), audiences=principal.audiences)
        after = cursor_of(self.scope, "since")
        client = None if within else arrival_of(self.scope, principal, after)
        return Grant(principal=principal.key, interest=interest, after=after, state=principal, client=client)

    async def opening(self, grant: Grant) -> list[bytes]:
        counts = await self._counts(grant)
        if grant.client is not None:
            return [counts]
        data = {"server_time": now_text(), "heartbeat_seconds": settings.HEARTBEAT_SECONDS}
        return [sse.frame("welcome", data), counts]

    async def encode(self, batch: Sequence[Envelope], grant: Grant) -> bytes:
        # Fragments show the newest state, so of each object only the last event of the batch is worth drawing.
        # Who is at it is a part of its own, with a version of its own.
        last = {_part_of(envelope): envelope for envelope in batch}
        frames = []
        for envelope in batch:
            if envelope.name == "connection.created":
                data = {"kind": "connection", "id": envelope.data["id"], "status": envelope.data["status"]}
                frames.append(sse.frame("appeared", data))
            if last[_part_of(envelope)] is envelope:
                html = await _shared(envelope, "live", fragments.live_message, envelope)
                if html:
                    frames.append(sse.text_frame(None, html, id=envelope.id))
        if time.monotonic() - self._counted_at >= self.COUNTS_EVERY or any(
            envelope.name == "flow.state" for envelope in batch
        ):
            frames.append(await self._counts(grant))
        return b"".join(frames)

    async def _counts(self, grant: Grant) -> bytes:
        self._counted_at = time.monotonic()
        principal = grant.state
        # The pages of one person that wait at the same moment share one count.
        counted = await units.desk().look(lambda: fragments.counts(principal), key=("counts", principal.key))
        return sse.frame("counts", counted)
