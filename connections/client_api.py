"""The API of clients: who is connected, the page's own signs of life, and who is handling what.

A client is addressed by its ``cid``, which is a label and no credential: what a page does with it works for its own login session or
key alone. Looking at others, and disconnecting them, goes by team and permission as everywhere.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any
from urllib.parse import parse_qsl

from django.db.models import Case, IntegerField, Value, When
from drf_spectacular.utils import OpenApiParameter
from rest_framework.request import Request
from rest_framework.response import Response

from connections import errors, inputs, openapi, payloads, tasks, transitions
from connections.access import Forbidden, NotFound, Principal, operable, visible
from connections.api import Operation, paged, window
from connections.errors import ApiError
from connections.models import ManagedAuthConnection, Task
from connections.openapi import FORM, operation, shape
from connections.tasks import TAKES_NONE
from events import clients
from events.clients import Caller
from events.states import ClientState

Json = dict[str, Any]


def caller_of(principal: Principal) -> Caller:
    """The login behind a request, as clients are bound to it.

    :raises ApiError: 401 for what belongs to no user.
    """
    if principal.user_id is None:
        raise errors.unauthorized()
    return Caller(owner_id=principal.user_id, binding=principal.binding, who=principal.name)


def owner_of_subject(principal: Principal, subject: str, *, to_act: bool) -> int:
    """Whose object a subject is, if the caller may see it (``to_act``: and change it).

    A login is handled at its connection: its task is no subject of its own, or two people could handle the same thing.

    :raises NotFound: there is no such object for this caller.
    :raises Forbidden: it may look and no more.
    """
    kind, _, object_id = subject.partition(":")
    rows = (
        Task.objects.exclude(kind__in=TAKES_NONE) if kind == "task" else ManagedAuthConnection.objects.all()
    )
    look = operable if to_act else visible
    return int(look(principal, rows, object_id).owner_id)


def verbs_of(subject: str) -> ModuleType:
    """The room whose ``handle`` and ``attend`` hold the object of a subject while a client comes to it."""
    return tasks if subject.startswith("task:") else transitions


class ClientOperation(Operation):
    """What is common: the dashboard's own pages ask as well, and the id in the address has one spelling."""

    browser = True

    def initial(self, request: Request, *args: Any, **kwargs: Any) -> None:
        super().initial(request, *args, **kwargs)
        if "cid" in kwargs:
            try:
                self.cid = clients.normal_cid(kwargs["cid"])
            except ValueError as error:
                raise ApiError(400, "invalid_connection_id", str(error)) from None

    @property
    def caller(self) -> Caller:
        return caller_of(self.principal)

    def said(self, schema: type[inputs.Closed]) -> Json:
        """The body as JSON, or as the form that ``navigator.sendBeacon`` sends: numbers are digits there, and truth is a word.

        :raises ApiError: 400, 413, 415.
        """
        if (self.request.content_type or "").partition(";")[0].strip().lower() != FORM:
            return self.parsed(schema)
        try:
            pairs = parse_qsl(self.raw_body().decode(), keep_blank_values=True, max_num_fields=20)
        except ValueError:
            raise ApiError(400, "invalid_request", "The form cannot be read.") from None
        form: Json = {name: value for name, value in pairs if name != "csrfmiddlewaretoken" and value}
        for name in ("epoch", "cursor"):
            text = str(form.get(name, ""))
            if text.isascii() and text.isdigit() and len(text) < 20:
                form[name] = int(text)
        if form.get("leaving") in ("true", "false"):
            form["leaving"] = form["leaving"] == "true"
        return inputs.checked(schema, form)

    def visible_client(self) -> Any:
        """The client of this id that the caller may see; of several people's the caller's own.

        :raises NotFound: there is none.
        """
        rows = clients.visible_to(self.principal.audiences).filter(cid=self.cid)
        own = Case(
            When(owner_id=self.principal.user_id, then=Value(0)),
            default=Value(1),
            output_field=IntegerField(),
        )
        row = rows.order_by(own, "pk").first()
        if row is None:
            raise NotFound(self.cid)
        return row


class Clients(ClientOperation):
    """All clients that the caller may see."""

    @operation(
        "listClients",
        "Browser tabs and programs with a stable id, the latest first.",
        tag="clients",
        answer=shape(payloads.ClientShape, many=True),
        query=[OpenApiParameter("state", str, enum=ClientState.values, description="Only these.")],
        paged=True,
    )
    def get(self, request: Request) -> Response:
        page = inputs.page_of(request.query_params)
        rows = clients.visible_to(self.principal.audiences)
        wanted = inputs.text_of(request.query_params, "state")
        if wanted and wanted not in ClientState.values:
            known = ", ".join(ClientState.values)
            raise errors.invalid_request(
                [{"code": "invalid_choice", "message": f"state: Use one of {known}."}]
            )
        if wanted:
            rows = rows.filter(state=wanted)
        return paged(window(rows, page), page, clients.picture)


class Client(ClientOperation):
    """One client."""

    @operation(
        "getClient",
        "A client. Of several people's with this id it is the caller's own.",
        tag="clients",
        answer=shape(payloads.ClientShape),
        errors=(400, 404),
    )
    def get(self, request: Request, cid: str) -> Response:
        return Response(clients.picture(self.visible_client()))


class Probe(ClientOperation):
    """Is my stream alive?"""

    @operation(
        "probeClient",
        "Have a nonce sent back over the present stream of one's own client. A page in the background is in the foreground again.",
        tag="clients",
        acts=True,
        browser=True,
        success=202,
        answer=shape(openapi.ProbedShape),
        takes=inputs.Probe,
        errors=(409,),
    )
    def post(self, request: Request, cid: str) -> Response:
        body = self.parsed(inputs.Probe)
        clients.probe(
            caller=self.caller,
            cid=self.cid,
            epoch=body["epoch"],
            nonce=body["nonce"],
            cursor=body.get("cursor"),
        )
        return Response({"nonce": body["nonce"]}, status=202)


class Answer(ClientOperation):
    """I am still here."""

    @operation(
        "answerProbe",
        "Answer the question that the stream brought. An answer that nobody waits for changes nothing.",
        tag="clients",
        acts=True,
        browser=True,
        success=204,
        takes=inputs.ProbeAnswer,
    )
    def post(self, request: Request, cid: str) -> Response:
        clients.answer(caller=self.caller, cid=self.cid, nonce=self.parsed(inputs.ProbeAnswer)["nonce"])
        return Response(status=204)


class Suspend(ClientOperation):
    """I go to the background."""

    @operation(
        "suspendClient",
        "The page was hidden. Twice is the same as once; for a stream that was replaced it is nothing. A form of the same members is taken, too.",
        tag="clients",
        acts=True,
        browser=True,
        success=204,
        takes=inputs.Suspend,
        form=inputs.SuspendForm,
        errors=(404,),
    )
    def post(self, request: Request, cid: str) -> Response:
        body = self.said(inputs.Suspend)
        try:
            clients.suspend(
                caller=self.caller,
                cid=self.cid,
                epoch=body["epoch"],
                cursor=body.get("cursor"),
                leaving=body.get("leaving", False),
            )
        except clients.Unknown:
            # Nobody waits for a beacon's answer to heal anything; foreign ids look like unknown ones.
            raise errors.nothing_here() from None
        return Response(status=204)


class Disconnect(ClientOperation):
    """Go away."""

    @operation(
        "disconnectClient",
        "End the stream of a client and release what it had claimed. Its page shows the reason and does not come back by itself.",
        tag="clients",
        browser=True,
        success=204,
        takes=inputs.Disconnect,
        errors=(403, 404),
        post=True,
    )
    def post(self, request: Request, cid: str) -> Response:
        row = self.visible_client()
        if not self.principal.may_operate(row.owner_id):
            raise Forbidden(self.cid)
        return self.once(lambda: self._close(row.pk))

    def _close(self, pk: int) -> Response:
        reason = self.parsed(inputs.Disconnect).get("reason", "").strip()
        clients.close(pk=pk, reason=reason or "disconnected by an operator", actor=self.principal.name)
        return Response(status=204)


class Claims(ClientOperation):
    """What a client is handling."""

    @operation(
        "claimSubject",
        "This client is handling the subject from now on. 409 `claimed` while somebody else does, unless `takeover` is true; 409 `task_over` for a task that has ended.",
        tag="clients",
        browser=True,
        answer=shape(payloads.ClaimShape),
        takes=inputs.TakeClaim,
        errors=(403, 404, 409),
        post=True,
    )
    def post(self, request: Request, cid: str) -> Response:
        return self.once(self._take)

    def _take(self) -> Response:
        body = self.parsed(inputs.TakeClaim)
        subject: str = body["subject"]
        audience = owner_of_subject(self.principal, subject, to_act=True)
        claim = verbs_of(subject).handle(
            caller=self.caller,
            cid=self.cid,
            subject=subject,
            audience=audience,
            takeover=body.get("takeover", False),
        )
        return Response(claim)


class Claim(ClientOperation):
    """One claim of a client."""

    @operation(
        "releaseSubject",
        "This client does not handle the subject any more. That it did not is no error.",
        tag="clients",
        acts=True,
        browser=True,
        success=204,
        errors=(400, 409),
    )
    def delete(self, request: Request, cid: str, subject: str) -> Response:
        clients.let_go(caller=self.caller, cid=self.cid, subject=subject)
        return Response(status=204)


class Presence(ClientOperation):
    """Who looks, who types."""

    @operation(
        "sayPresence",
        "This client looks at the subject, or types, for 30 seconds. The page renews it; empty: not any more.",
        tag="clients",
        acts=True,
        browser=True,
        success=204,
        takes=inputs.BePresent,
        errors=(404, 409),
    )
    def post(self, request: Request, cid: str) -> Response:
        body = self.parsed(inputs.BePresent)
        audience = owner_of_subject(self.principal, body["subject"], to_act=False)
        verbs_of(body["subject"]).attend(
            caller=self.caller,
            cid=self.cid,
            subject=body["subject"],
            audience=audience,
            doing=body["doing"],
        )
        return Response(status=204)
