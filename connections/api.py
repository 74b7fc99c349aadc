"""The API: one thin view per operation. Each reads the request, calls one verb and shows what came of it.

:class:`Operation` holds what all of them share: the order of errors (401 before 404 before 400), bodies of any framing,
session tokens that work in two places, ``Idempotency-Key`` on POST.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import json
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from django.db.models import CharField, F, OuterRef, Q, QuerySet, Subquery, Value
from django.utils import timezone
from drf_spectacular.utils import OpenApiParameter, OpenApiResponse, OpenApiTypes, extend_schema
from drf_spectacular.views import SpectacularAPIView, SpectacularSwaggerSplitView
from rest_framework.authentication import BaseAuthentication
from rest_framework.negotiation import DefaultContentNegotiation
from rest_framework.permissions import SAFE_METHODS, AllowAny
from rest_framework.renderers import JSONRenderer
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView

from connections import errors, handoff, idempotency, inputs, models, openapi, payloads, registry, transitions
from connections.access import Forbidden, NotFound, Principal, operable, visible
from connections.authentication import BrowserAuthentication, address_of, limited
from connections.commands import NotAllowed
from connections.errors import ApiError
from connections.models import HealthCheck, LoginFlow, ManagedAuthConnection
from connections.openapi import operation, shape
from connections.states import FlowType
from events import clients

Json = dict[str, Any]

#: Exchanges of one address per minute: a code has 256 bits, so this only keeps noise away.
EXCHANGES_PER_MINUTE = 60
#: Headers that belong to an answer and are kept with it; all others are made anew each time.
_KEPT_HEADERS = ("x-should-retry", "retry-after")


class Operation(APIView):
    """What every operation shares."""

    #: No OPTIONS of DRF's own: preflights are answered by the CORS middleware, the rest is 405.
    http_method_names = ["get", "head", "post", "patch", "delete"]
    #: Methods on which the session token of a hosted page works, for its own connection.
    page_methods: ClassVar[frozenset[str]] = frozenset()
    #: Whether the session of the dashboard opens it, too. The addresses of the wire contract know keys alone.
    browser: ClassVar[bool] = False

    def get_authenticators(self) -> list[BaseAuthentication]:
        return [*super().get_authenticators(), *([BrowserAuthentication()] if self.browser else [])]

    def initial(self, request: Request, *args: Any, **kwargs: Any) -> None:
        super().initial(request, *args, **kwargs)
        self.now = timezone.now()
        caller: Any = request.user
        if isinstance(caller, Principal) and caller.is_page:
            own = caller.connection_id == kwargs.get("connection_id")
            if not own or request.method not in self.page_methods:
                raise errors.unauthorized("This session token does not work here.")
        if any(not inputs.storable(str(value)) for value in kwargs.values()):
            raise errors.nothing_here()
        if isinstance(caller, Principal) and request.method not in SAFE_METHODS:
            self._check_client(caller, request.headers.get("X-Connection-ID"))

    def _check_client(self, caller: Principal, given: str | None) -> None:
        """The client that says it acts: nothing is asked of whoever names none (a send needs no stream).

        :raises ApiError: 400 for what is no id; 409 for one that this login does not have, which connecting again heals.
        """
        if given is None:
            return
        try:
            cid = clients.normal_cid(given)
        except ValueError as error:
            raise ApiError(400, "invalid_connection_id", f"X-Connection-ID: {error}") from None
        found = caller.user_id is not None and clients.find(
            owner_id=caller.user_id, binding=caller.binding, cid=cid
        )
        if not found:
            raise ApiError(409, "connection_unknown", "This connection id is not known here. Connect again.")

    @property
    def principal(self) -> Principal:
        """The caller."""
        caller: Any = self.request.user
        assert isinstance(caller, Principal)
        return caller

    @property
    def default_response_headers(self) -> dict[str, str]:
        """States and codes are of this moment and for this caller."""
        return {**super().default_response_headers, "Cache-Control": "no-store"}

    def raw_body(self) -> bytes:
        """The body as bytes. Read here and not by DRF, which takes a chunked body for an empty one.

        :raises ApiError: 413.
        """
        if not hasattr(self, "_raw_body"):
            self._raw_body = inputs.read_body(self.request._request)
        return self._raw_body

    def parsed(self, schema: type[inputs.Closed]) -> Json:
        """The validated body; an absent one is ``{}``.

        :raises ApiError: 400, 413, 415.
        """
        raw = self.raw_body()
        if not raw.strip():
            return inputs.checked(schema, {})
        if not inputs.is_json(self.request.content_type or ""):
            raise ApiError(415, "unsupported_media_type", "The body must be application/json.")
        return inputs.checked(schema, inputs.decode(raw))

    def once(self, act: Callable[[], Response], *, scope: str | None = None) -> Response:
        """``act``, honouring the ``Idempotency-Key`` of the request."""
        key = self.message_id()
        if key is None:
            return act()

        def answered() -> idempotency.Answer:
            try:
                response = act()
            except Exception as error:  # noqa: BLE001  (translate() logs what nobody expected)
                response = errors.exception_handler(error, {})
            headers = {name: response[name] for name in _KEPT_HEADERS if name in response}
            return idempotency.Answer(status=response.status_code, data=response.data, headers=headers)

        return _answer(
            idempotency.once(
                scope=scope or self.principal.key,
                key=key,
                request=self._fingerprint(),
                act=answered,
                now=self.now,
            )
        )

    def handle_exception(self, exc: Exception) -> Response:
        """What was done to an object that is gone by now, or that the caller may not change any more, still has its receipt: without it, a
        repetition would be told that it never arrived."""
        if isinstance(exc, NotFound | Forbidden | NotAllowed) and self.request.method == "POST":
            # A request with other faults as well is answered with this one.
            with contextlib.suppress(ApiError):
                if (kept := self._kept()) is not None:
                    return _answer(kept)
        return super().handle_exception(exc)

    def _kept(self) -> idempotency.Answer | None:
        key = self.message_id()
        if key is None:
            return None
        return idempotency.kept(scope=self.principal.key, key=key, request=self._fingerprint(), now=self.now)

    def _fingerprint(self) -> list[Any]:
        return [self.request.method, self.request.path, self.comparable_body()]

    def message_id(self) -> str | None:
        """The client's name for this request; None when it has none.

        :raises ApiError: 400 when it is none that could be one.
        """
        return idempotency.key_of(self.request.headers.get("Idempotency-Key"))

    def comparable_body(self) -> Any:
        """The body for telling two requests apart: spelling does not matter, an absent one is ``{}``."""
        raw = self.raw_body()
        try:
            return json.loads(raw) if raw.strip() else {}
        except (ValueError, RecursionError):
            return raw.hex()


def _answer(answer: idempotency.Answer) -> Response:
    headers = {**answer.headers, **({"Idempotent-Replayed": "true"} if answer.replayed else {})}
    return Response(answer.data, status=answer.status, headers=headers)


def paged(rows: Sequence[Any], page: inputs.Page, show: Callable[[Any], Any]) -> Response:
    """A list of which one row more than ``page.limit`` was fetched."""
    more = len(rows) > page.limit
    headers = {
        "X-Has-More": "true" if more else "false",
        "X-Next-Offset": str(page.offset + page.limit if more else 0),
    }
    return Response([show(row) for row in rows[: page.limit]], headers=headers)


def window(rows: QuerySet[Any], page: inputs.Page) -> list[Any]:
    """The rows of a page, and one more to know whether there are more."""
    return list(rows[page.offset : page.offset + page.limit + 1])


class Nothing(Operation):
    """Every other address: 401 without a key, else 404."""

    schema = None

    def initial(self, request: Request, *args: Any, **kwargs: Any) -> None:
        super().initial(request, *args, **kwargs)
        raise errors.nothing_here()


# ── Connections ───────────────────────────────────────────────────────────────────────────────────────────────────


def _connections() -> Any:
    return ManagedAuthConnection.objects.select_related("profile", "credential")


def _shown(connection: ManagedAuthConnection, now: dt.datetime) -> payloads.ManagedAuthShape:
    """GET's answer, after what is due has expired."""
    if transitions.expire_if_due(connection_id=connection.pk, now=now):
        connection = _connections().get(pk=connection.pk)
    return payloads.managed_auth(connection, connection.latest_flow())


def _reloaded(connection_id: str, now: dt.datetime) -> payloads.ManagedAuthShape:
    return _shown(_connections().get(pk=connection_id), now)


def _config(body: Json, owner_id: int) -> Json:
    """The body in the words of the model: a credential is a row or a reference to an external one.

    :raises ApiError: 400 when the credential of this name does not exist.
    """
    config = {key: value for key, value in body.items() if key not in ("domain", "profile_name")}
    if "credential" in config:
        reference = config.pop("credential")
        config["credential"] = None
        config["external_credential"] = None
        if reference and "name" in reference:
            config["credential"] = models.Credential.objects.filter(
                owner_id=owner_id, name=reference["name"]
            ).first()
            if config["credential"] is None:
                raise errors.invalid_request(
                    [
                        {
                            "code": "not_found",
                            "message": "credential.name: There is no credential of this name.",
                        }
                    ]
                )
        elif reference:
            config["external_credential"] = dict(reference)
    return config


def owner_of(principal: Principal) -> int:
    """The user that what is made belongs to.

    :raises ApiError: 401 for what belongs to no user.
    """
    if principal.user_id is None:
        raise errors.unauthorized()
    return principal.user_id


class Connections(Operation):
    """All connections of the caller."""

    @operation(
        "createConnection",
        "Create a connection; its profile is made when it does not exist.",
        tag="connections",
        success=201,
        answer=shape(payloads.ManagedAuthShape),
        takes=inputs.ConnectionCreate,
        errors=(403, 409),
        post=True,
    )
    def post(self, request: Request) -> Response:
        return self.once(self._create)

    def _create(self) -> Response:
        body = self.parsed(inputs.ConnectionCreate)
        owner_id = owner_of(self.principal)
        row = transitions.create_connection(
            owner_id=owner_id,
            domain=body["domain"],
            profile_name=body["profile_name"],
            config=_config(body, owner_id),
            actor=self.principal,
            now=self.now,
        )
        return Response(payloads.managed_auth(row, None), status=201)

    @operation(
        "listConnections",
        "The connections that the caller may see, newest first.",
        tag="connections",
        answer=shape(payloads.ManagedAuthShape, many=True),
        query=[
            OpenApiParameter("domain", str, description="Exactly this domain."),
            OpenApiParameter("profile_name", str, description="Exactly this profile."),
            OpenApiParameter("query", str, description="Part of the id, the domain or the profile's name."),
        ],
        paged=True,
    )
    def get(self, request: Request) -> Response:
        page = inputs.page_of(request.query_params)
        rows = _connections().visible_to(self.principal)
        domain, profile, query = (
            inputs.text_of(request.query_params, name) for name in ("domain", "profile_name", "query")
        )
        if domain:
            rows = rows.filter(domain=domain.lower())
        if profile:
            rows = rows.filter(profile__name=profile)
        if query:
            rows = rows.filter(
                Q(pk__icontains=query) | Q(domain__icontains=query) | Q(profile__name__icontains=query)
            )
        latest = LoginFlow.objects.filter(connection=OuterRef("pk")).order_by("-number").values("pk")[:1]
        found = window(rows.order_by("-created_at", "-pk").annotate(latest_flow_id=Subquery(latest)), page)
        flows = LoginFlow.objects.in_bulk([row.latest_flow_id for row in found if row.latest_flow_id])

        def show(row: Any) -> payloads.ManagedAuthShape:
            flow = flows.get(row.latest_flow_id)
            if flow is not None and flow.is_due(self.now):
                return _shown(row, self.now)
            return payloads.managed_auth(row, flow)

        return paged(found, page, show)


class Connection(Operation):
    """One connection."""

    page_methods = frozenset({"GET", "HEAD"})

    @operation(
        "getConnection",
        "A connection and its most recent login.",
        tag="connections",
        answer=shape(payloads.ManagedAuthShape),
        errors=(404, 410),
    )
    def get(self, request: Request, connection_id: str) -> Response:
        return Response(_shown(visible(self.principal, _connections(), connection_id), self.now))

    @operation(
        "updateConnection",
        "Change a connection; only the keys sent change.",
        tag="connections",
        acts=True,
        answer=shape(payloads.ManagedAuthShape),
        takes=inputs.ConnectionUpdate,
        errors=(403, 404),
    )
    def patch(self, request: Request, connection_id: str) -> Response:
        row = operable(self.principal, _connections(), connection_id)
        changes = _config(self.parsed(inputs.ConnectionUpdate), row.owner_id)
        if changes.get("browser") is not None:
            # As the SDK says: properties that are left out stay as they are.
            changes["browser"] = {**(row.browser or {}), **changes["browser"]}
        transitions.update_connection(
            connection_id=connection_id, changes=changes, actor=self.principal, now=self.now
        )
        return Response(_reloaded(connection_id, self.now))

    @operation(
        "deleteConnection",
        "Delete a connection; a running login is canceled first.",
        tag="connections",
        acts=True,
        success=204,
        errors=(403, 404),
    )
    def delete(self, request: Request, connection_id: str) -> Response:
        operable(self.principal, _connections(), connection_id)
        transitions.delete_connection(connection_id=connection_id, actor=self.principal, now=self.now)
        return Response(status=204)


class Login(Operation):
    """Starts a login."""

    @operation(
        "startLogin",
        "Start a login. The answer holds the address of the hosted page.",
        tag="connections",
        answer=shape(payloads.LoginShape),
        takes=inputs.Login,
        errors=(403, 404, 409),
        post=True,
    )
    def post(self, request: Request, connection_id: str) -> Response:
        operable(self.principal, _connections(), connection_id)
        return self.once(lambda: self._start(connection_id))

    def _start(self, connection_id: str) -> Response:
        self.parsed(inputs.Login)
        flow, code = transitions.start_login(connection_id=connection_id, actor=self.principal, now=self.now)
        return Response(payloads.login(flow, code))


class Submit(Operation):
    """Answers a login."""

    page_methods = frozenset({"POST"})

    @operation(
        "submit",
        "Answer the open interaction. Accepting it consumes it.",
        tag="connections",
        success=202,
        answer=shape(openapi.AcceptedShape),
        takes=inputs.Submit,
        errors=(403, 404, 410),
        post=True,
    )
    def post(self, request: Request, connection_id: str) -> Response:
        operable(self.principal, _connections(), connection_id)
        return self.once(lambda: self._submit(connection_id))

    def _submit(self, connection_id: str) -> Response:
        body = self.parsed(inputs.Submit)
        choice_id = body.pop("selected_choice_id", None)
        transitions.submit(
            connection_id=connection_id,
            answer=transitions.SubmittedAnswer(choice_id=choice_id, **body),
            actor=self.principal,
            now=self.now,
            flow_id=self.principal.flow_id,
        )
        return Response({"accepted": True}, status=202)


class Exchange(Operation):
    """Opens a hosted page."""

    authentication_classes = ()
    permission_classes = (AllowAny,)

    def initial(self, request: Request, *args: Any, **kwargs: Any) -> None:
        super().initial(request, *args, **kwargs)
        wait = limited("exchange", address_of(request._request), limit=EXCHANGES_PER_MINUTE, now=self.now)
        if wait is not None:
            raise errors.rate_limited(wait)

    @operation(
        "exchange",
        "Exchange the one-time code of the hosted page for a session token.",
        tag="connections",
        answer=shape(openapi.ExchangeShape),
        takes=inputs.Exchange,
        errors=(404, 410, 429),
        post=True,
        public=True,
    )
    def post(self, request: Request, connection_id: str) -> Response:
        client = handoff.client_of(address_of(request._request), request.headers.get("User-Agent", ""))
        return self.once(lambda: self._exchange(connection_id, client), scope=f"client:{client}"[:80])

    def _exchange(self, connection_id: str, client: str) -> Response:
        body = self.parsed(inputs.Exchange)
        flow, token = handoff.exchange(
            connection_id=connection_id, code=body["code"], client=client, now=self.now
        )
        return Response({"invocation_id": flow.pk, "jwt": token})


class Cancel(Operation):
    """Ends a login."""

    @operation(
        "cancelLogin",
        "Cancel the running login. Without one nothing changes.",
        tag="connections",
        answer=shape(payloads.ManagedAuthShape),
        takes=inputs.Cancel,
        errors=(403, 404),
        post=True,
    )
    def post(self, request: Request, connection_id: str) -> Response:
        operable(self.principal, _connections(), connection_id)
        return self.once(lambda: self._cancel(connection_id))

    def _cancel(self, connection_id: str) -> Response:
        reason = self.parsed(inputs.Cancel).get("reason") or "The login was canceled."
        transitions.cancel(connection_id=connection_id, actor=self.principal, reason=reason, now=self.now)
        return Response(_reloaded(connection_id, self.now))


class Check(Operation):
    """Checks a session."""

    @operation(
        "checkConnection",
        "Look now whether the profile is still signed in. The answer is the task that does it.",
        tag="connections",
        success=202,
        answer=shape(payloads.TaskShape),
        takes=inputs.Empty,
        errors=(403, 404),
        post=True,
    )
    def post(self, request: Request, connection_id: str) -> Response:
        operable(self.principal, _connections(), connection_id)
        return self.once(lambda: self._check(connection_id))

    def _check(self, connection_id: str) -> Response:
        self.parsed(inputs.Empty)
        task = transitions.request_check(connection_id=connection_id, actor=self.principal, now=self.now)
        return Response(payloads.task(task), status=202)


class Handoff(Operation):
    """Renews the link to a hosted page."""

    @operation(
        "newHandoff",
        "A fresh one-time code for the running login. The one before stops working.",
        tag="connections",
        answer=shape(payloads.LoginShape),
        takes=inputs.Empty,
        errors=(403, 404, 410),
        post=True,
    )
    def post(self, request: Request, connection_id: str) -> Response:
        operable(self.principal, _connections(), connection_id)
        return self.once(lambda: self._handoff(connection_id))

    def _handoff(self, connection_id: str) -> Response:
        self.parsed(inputs.Empty)
        flow, code = transitions.new_handoff(connection_id=connection_id, actor=self.principal, now=self.now)
        return Response(payloads.login(flow, code))


_TIMELINE_TYPES = ("login", "reauth", "health_check")


class Timeline(Operation):
    """What happened to a connection."""

    @operation(
        "getTimeline",
        "Logins and health checks, newest first.",
        tag="connections",
        answer=shape(payloads.TimelineShape, many=True),
        query=[OpenApiParameter("type", str, enum=_TIMELINE_TYPES, description="Only these.")],
        errors=(404,),
        paged=True,
    )
    def get(self, request: Request, connection_id: str) -> Response:
        connection = visible(self.principal, _connections(), connection_id)
        page = inputs.page_of(request.query_params)
        wanted = inputs.text_of(request.query_params, "type")
        if wanted and wanted not in _TIMELINE_TYPES:
            known = ", ".join(_TIMELINE_TYPES)
            raise errors.invalid_request(
                [{"code": "invalid_choice", "message": f"type: Use one of {known}."}]
            )
        transitions.expire_if_due(connection_id=connection_id, now=self.now)
        found = window(_timeline(connection, wanted), page)
        flows = LoginFlow.objects.in_bulk([pk for pk, _, source in found if source == "flow"])
        checks = HealthCheck.objects.in_bulk([pk for pk, _, source in found if source == "check"])

        def show(entry: tuple[str, dt.datetime, str]) -> payloads.TimelineShape:
            pk, _, source = entry
            return (
                payloads.timeline_flow(flows[pk]) if source == "flow" else payloads.timeline_check(checks[pk])
            )

        # A row may be deleted between the two looks.
        present = [entry for entry in found if entry[0] in flows or entry[0] in checks]
        return paged(present, page, show)


def _timeline(connection: ManagedAuthConnection, wanted: str) -> QuerySet[Any, tuple[str, dt.datetime, str]]:
    """Ids of flows and checks, put in order and cut into pages by the database."""

    def ids(rows: Any, moment: str, source: str) -> Any:
        columns = {"moment": F(moment), "source": Value(source, output_field=CharField())}
        return rows.order_by().annotate(**columns).values_list("pk", "moment", "source")

    flows = LoginFlow.objects.filter(connection=connection)
    if wanted in ("login", "reauth"):
        kind = FlowType.LOGIN if wanted == "login" else FlowType.REAUTH
        return ids(flows.filter(type=kind), "started_at", "flow").order_by("-moment", "-pk")
    checks = ids(HealthCheck.objects.filter(connection=connection), "checked_at", "check")
    if wanted == "health_check":
        return checks.order_by("-moment", "-pk")
    return ids(flows, "started_at", "flow").union(checks, all=True).order_by("-moment", "-pk")


# ── Credentials and profiles, by id or name ───────────────────────────────────────────────────────────────────────


def _named(principal: Principal, rows: Any, id_or_name: str) -> Any:
    """The row of this id; else the caller's own of this name; else the newest of their team's.

    :raises NotFound: there is none for this caller.
    """
    candidates = list(rows.visible_to(principal).filter(Q(pk=id_or_name) | Q(name=id_or_name))[:50])
    if not candidates:
        raise NotFound(id_or_name)
    return min(candidates, key=lambda row: (row.pk != id_or_name, row.owner_id != principal.user_id))


def _operated(principal: Principal, rows: Any, id_or_name: str) -> Any:
    """As :func:`_named`, for somebody who wants to change it or see its secret side.

    :raises Forbidden: when the caller may only look.
    """
    row = _named(principal, rows, id_or_name)
    if not principal.may_operate(row.owner_id):
        raise Forbidden(id_or_name)
    return row


def _credential_fields(body: Json) -> Json:
    """The body in the words of the registry. An otpauth URI wins over the explicit fields that it names."""
    fields = dict(body)
    if "sso_provider" in fields:
        fields["sso_provider"] = fields["sso_provider"] or ""
    totp: inputs.TotpInput | None = fields.get("totp_secret")
    if totp is not None:
        fields["totp_secret"] = totp.secret
        said = {"totp_algorithm": totp.algorithm, "totp_digits": totp.digits, "totp_period": totp.period}
        fields |= {key: value for key, value in said.items() if value is not None}
        if totp.from_uri:
            fields = {**registry.TOTP_DEFAULTS, **fields}
    return fields


def _credential_answer(row: models.Credential, body: Json, now: dt.datetime) -> payloads.CredentialShape:
    """With the present code when a secret was just set, so that its owner can compare."""
    answer = payloads.credential(row)
    if body.get("totp_secret") is not None:
        code, ends = registry.totp_code(row, now=now)
        answer["totp_code"] = code
        answer["totp_code_expires_at"] = payloads.timestamp(ends)
    return answer


class Credentials(Operation):
    """All credentials of the caller."""

    @operation(
        "createCredential",
        "Keep a credential, encrypted.",
        tag="credentials",
        success=201,
        answer=shape(payloads.CredentialShape),
        takes=inputs.CredentialCreate,
        errors=(409,),
        post=True,
    )
    def post(self, request: Request) -> Response:
        return self.once(self._create)

    def _create(self) -> Response:
        body = self.parsed(inputs.CredentialCreate)
        row = registry.create_credential(
            owner_id=owner_of(self.principal), now=self.now, **_credential_fields(body)
        )
        return Response(_credential_answer(row, body, self.now), status=201)

    @operation(
        "listCredentials",
        "The credentials that the caller may see, newest first. Never their values.",
        tag="credentials",
        answer=shape(payloads.CredentialShape, many=True),
        query=[
            OpenApiParameter("domain", str, description="Exactly this domain."),
            OpenApiParameter("query", str, description="Part of the name or the domain, or the id."),
        ],
        paged=True,
    )
    def get(self, request: Request) -> Response:
        page = inputs.page_of(request.query_params)
        rows = models.Credential.objects.visible_to(self.principal)
        domain, query = (inputs.text_of(request.query_params, name) for name in ("domain", "query"))
        if domain:
            rows = rows.filter(domain=domain.lower())
        if query:
            rows = rows.filter(Q(pk=query) | Q(name__icontains=query) | Q(domain__icontains=query))
        found = window(rows.order_by("-created_at", "-pk"), page)
        return paged(found, page, lambda row: payloads.credential(row, keys=False))


class Credential(Operation):
    """One credential."""

    @operation(
        "getCredential",
        "A credential by id or name. Never its values.",
        tag="credentials",
        answer=shape(payloads.CredentialShape),
        errors=(404,),
    )
    def get(self, request: Request, id_or_name: str) -> Response:
        return Response(payloads.credential(_named(self.principal, models.Credential.objects, id_or_name)))

    @operation(
        "updateCredential",
        "Change a credential; values are merged.",
        tag="credentials",
        acts=True,
        answer=shape(payloads.CredentialShape),
        takes=inputs.CredentialUpdate,
        errors=(403, 404, 409),
    )
    def patch(self, request: Request, id_or_name: str) -> Response:
        row = _operated(self.principal, models.Credential.objects, id_or_name)
        body = self.parsed(inputs.CredentialUpdate)
        row = registry.update_credential(
            credential_id=row.pk, changes=_credential_fields(body), actor=self.principal, now=self.now
        )
        return Response(_credential_answer(row, body, self.now))

    @operation(
        "deleteCredential",
        "Delete a credential; connections that used it have none from then on.",
        tag="credentials",
        acts=True,
        success=204,
        errors=(403, 404),
    )
    def delete(self, request: Request, id_or_name: str) -> Response:
        row = _operated(self.principal, models.Credential.objects, id_or_name)
        registry.delete_credential(credential_id=row.pk, actor=self.principal, now=self.now)
        return Response(status=204)


class TotpCode(Operation):
    """Codes of an authenticator app."""

    @operation(
        "getTotpCode",
        "The one-time code of this moment.",
        tag="credentials",
        answer=shape(openapi.TotpCodeShape),
        errors=(403, 404),
    )
    def get(self, request: Request, id_or_name: str) -> Response:
        row = _operated(self.principal, models.Credential.objects, id_or_name)
        code, ends = registry.totp_code(row, now=self.now)
        return Response({"code": code, "expires_at": payloads.timestamp(ends)})


class Profiles(Operation):
    """All profiles of the caller."""

    @operation(
        "createProfile",
        "Create a profile.",
        tag="profiles",
        success=201,
        answer=shape(payloads.ProfileShape),
        takes=inputs.ProfileCreate,
        errors=(409,),
        post=True,
    )
    def post(self, request: Request) -> Response:
        return self.once(self._create)

    def _create(self) -> Response:
        name = self.parsed(inputs.ProfileCreate).get("name")
        row = registry.create_profile(owner_id=owner_of(self.principal), name=name, now=self.now)
        return Response(payloads.profile(row), status=201)

    @operation(
        "listProfiles",
        "The profiles that the caller may see, newest first.",
        tag="profiles",
        answer=shape(payloads.ProfileShape, many=True),
        query=[
            OpenApiParameter("name", str, description="Exactly this name, in any case."),
            OpenApiParameter("query", str, description="Part of the name or id."),
        ],
        paged=True,
    )
    def get(self, request: Request) -> Response:
        page = inputs.page_of(request.query_params)
        rows = models.Profile.objects.visible_to(self.principal).defer("state")
        name, query = (inputs.text_of(request.query_params, key) for key in ("name", "query"))
        if name:
            rows = rows.filter(name__iexact=name)
        if query:
            rows = rows.filter(Q(pk__icontains=query) | Q(name__icontains=query))
        return paged(window(rows.order_by("-created_at", "-pk"), page), page, payloads.profile)


class Profile(Operation):
    """One profile."""

    @operation(
        "getProfile",
        "A profile by id or name.",
        tag="profiles",
        answer=shape(payloads.ProfileShape),
        errors=(404,),
    )
    def get(self, request: Request, id_or_name: str) -> Response:
        return Response(payloads.profile(_named(self.principal, models.Profile.objects, id_or_name)))

    @operation(
        "updateProfile",
        "Rename a profile.",
        tag="profiles",
        acts=True,
        answer=shape(payloads.ProfileShape),
        takes=inputs.ProfileUpdate,
        errors=(403, 404, 409),
    )
    def patch(self, request: Request, id_or_name: str) -> Response:
        row = _operated(self.principal, models.Profile.objects, id_or_name)
        name = self.parsed(inputs.ProfileUpdate)["name"]
        row = registry.rename_profile(profile_id=row.pk, name=name, actor=self.principal, now=self.now)
        return Response(payloads.profile(row))

    @operation(
        "deleteProfile",
        "Delete a profile with its connections.",
        tag="profiles",
        acts=True,
        success=204,
        errors=(403, 404),
    )
    def delete(self, request: Request, id_or_name: str) -> Response:
        row = _operated(self.principal, models.Profile.objects, id_or_name)
        registry.delete_profile(profile_id=row.pk, actor=self.principal, now=self.now)
        return Response(status=204)


class ProfileDownload(Operation):
    """The cookies of a profile."""

    @extend_schema(
        operation_id="downloadProfile",
        summary="The state of a profile (Playwright's storage_state) as a file.",
        tags=["profiles"],
        parameters=[
            OpenApiParameter(
                "format", str, description="Accepted for Kernel's clients; the file is always JSON."
            )
        ],
        responses={
            200: OpenApiResponse(OpenApiTypes.OBJECT, description="storage_state: cookies and origins."),
            **{
                status: OpenApiResponse(shape(openapi.ErrorShape), description=text)
                for status, text in (
                    (401, "No valid key."),
                    (403, "Not allowed."),
                    (404, "No profile, or no state."),
                )
            },
        },
    )
    def get(self, request: Request, id_or_name: str) -> Response:
        row = _operated(self.principal, models.Profile.objects, id_or_name)
        state = registry.profile_state(row)
        if state is None:
            raise ApiError(404, "not_found", "Nobody has signed in with this profile yet.")
        disposition = f'attachment; filename="{row.pk}.json"'
        return Response(state, headers={"Content-Disposition": disposition})


# ── The document ──────────────────────────────────────────────────────────────────────────────────────────────────


class Schema(SpectacularAPIView):
    """The OpenAPI document: JSON, or YAML for whoever asks for it. Public."""

    authentication_classes = ()
    permission_classes = (AllowAny,)
    content_negotiation_class = DefaultContentNegotiation
    renderer_classes = [JSONRenderer, *SpectacularAPIView.renderer_classes]
    generator_class = openapi.Generator


class Docs(SpectacularSwaggerSplitView):
    """Swagger UI, from this server alone, its script apart from the page: no inline script to be allowed. Public."""

    authentication_classes = ()
    permission_classes = (AllowAny,)
    url_name = "api-schema"
