"""The OpenAPI document: what drf-spectacular cannot see by itself.

Answers are described by the TypedDicts of ``payloads.py``, each as a component of its own, so that the document and the
code cannot say different things. The streams are ASGI consumers and no views; they are added by hand.
"""

from __future__ import annotations

import types
from typing import Any, Literal, TypedDict, Union, get_args, get_origin, get_type_hints, is_typeddict

from django.conf import settings
from drf_spectacular.extensions import OpenApiAuthenticationExtension, OpenApiSerializerExtension
from drf_spectacular.generators import SchemaGenerator
from drf_spectacular.openapi import AutoSchema
from drf_spectacular.plumbing import ResolvedComponent, resolve_type_hint
from drf_spectacular.types import OpenApiTypes
from drf_spectacular.utils import Direction, OpenApiParameter, OpenApiResponse, extend_schema
from rest_framework import serializers

from connections import inputs, payloads
from connections.states import (
    ConnectionStatus,
    FlowStatus,
    FlowStep,
    FlowType,
    HookState,
    InputKind,
    TaskStatus,
)
from events.states import ClientState

Json = dict[str, Any]

FORM = "application/x-www-form-urlencoded"


class DetailShape(TypedDict):
    code: str
    message: str


class PresentClaimShape(payloads.ClaimShape):
    """Who has it."""


class _ErrorBase(TypedDict):
    code: str
    message: str


class ErrorShape(_ErrorBase, total=False):
    """The body of every answer that is an error."""

    details: list[DetailShape]
    inner_error: DetailShape
    existing_id: str
    status: str
    answered_by: str
    answered_at: str
    claim: PresentClaimShape
    limit: int
    running: int
    queued: int
    end: int


class ProbedShape(TypedDict):
    """The nonce comes back over the stream; that it was accepted proves nothing."""

    nonce: str


class AcceptedShape(TypedDict):
    accepted: bool


class ReceiptShape(TypedDict):
    """The line is kept and will be delivered, after those that were accepted before it."""

    accepted: bool
    client_message_id: str
    task_id: str


class ClaimedTaskShape(payloads.TaskShape):
    """What is to be done."""


class ClaimedShape(TypedDict):
    """A task to do. ``worker`` and ``attempt`` go with everything that is said of it from now on."""

    task: ClaimedTaskShape
    attempt: int
    worker: str
    lease_expires_at: str


class HeldShape(TypedDict):
    """What a program that holds a task needs to know."""

    lease_expires_at: str
    status: str
    kill_requested: bool
    inputs_waiting: int


class WrittenShape(TypedDict):
    """``end``: bytes that are kept; ``dropped``: bytes beyond the limit; ``next``: both together, where the next piece begins (``at``)."""

    end: int
    dropped: int
    next: int


class ExchangeShape(TypedDict):
    invocation_id: str
    jwt: str


class TotpCodeShape(TypedDict):
    code: str
    expires_at: str


class Described(serializers.Serializer[Any]):
    """Stands for a TypedDict where drf-spectacular wants a serializer. Made by :func:`shape`."""

    hint: type


_described: dict[type, type[Described]] = {}


def shape(hint: type, *, many: bool = False) -> Described:
    """An answer of this TypedDict (or a list of them)."""
    if hint not in _described:
        name = f"{_name(hint)}Answer"
        _described[hint] = type(name, (Described,), {"hint": hint, "__doc__": hint.__doc__})
    described = _described[hint](many=many)
    assert isinstance(described, serializers.BaseSerializer)
    return described  # type: ignore[return-value]


def _name(hint: type) -> str:
    return hint.__name__.lstrip("_").removesuffix("Shape").removesuffix("Fields")


#: The values of the members that are one of a few; the TypedDicts say only ``str``.
_ENUMS: dict[tuple[type, str], type] = {
    (payloads.ManagedAuthShape, "status"): ConnectionStatus,
    (payloads.ManagedAuthShape, "flow_status"): FlowStatus,
    (payloads.ManagedAuthShape, "flow_step"): FlowStep,
    (payloads.ManagedAuthShape, "flow_type"): FlowType,
    (payloads.LoginShape, "flow_type"): FlowType,
    (payloads.TaskShape, "status"): TaskStatus,
    (payloads.TaskCreatedShape, "status"): TaskStatus,
    (payloads.TaskDetailShape, "status"): TaskStatus,
    (ClaimedTaskShape, "status"): TaskStatus,
    (payloads.TaskInputShape, "kind"): InputKind,
    (payloads.HookShape, "state"): HookState,
    (payloads.ClientShape, "state"): ClientState,
}


def _schema_of(hint: Any, auto_schema: AutoSchema) -> Json:
    """As ``resolve_type_hint``, but a TypedDict becomes a component and a reference to it."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        inner = [argument for argument in get_args(hint) if argument is not type(None)]
        if len(inner) == 1:
            return {**_schema_of(inner[0], auto_schema), "nullable": True}
    if origin is list:
        return {"type": "array", "items": _schema_of(get_args(hint)[0], auto_schema)}
    if is_typeddict(hint):
        component = ResolvedComponent(
            name=_name(hint), type=ResolvedComponent.SCHEMA, object=hint, schema=_object(hint, auto_schema)
        )
        auto_schema.registry.register_on_missing(component)
        return dict(component.ref)
    return dict(resolve_type_hint(hint))


def _object(hint: Any, auto_schema: AutoSchema) -> Json:
    properties = {}
    for name, inner in get_type_hints(hint).items():
        schema = _schema_of(inner, auto_schema)
        choices = _ENUMS.get((hint, name))
        if choices is not None:
            schema["enum"] = list(choices.values) + ([None] if schema.get("nullable") else [])  # type: ignore[attr-defined]
        properties[name] = schema
    described: Json = {"type": "object", "properties": properties}
    if hint.__required_keys__:
        described["required"] = sorted(hint.__required_keys__)
    if hint.__doc__:
        described["description"] = hint.__doc__.strip()
    return described


class _DescribedExtension(OpenApiSerializerExtension):
    target_class = Described
    match_subclasses = True

    def get_name(self, auto_schema: AutoSchema, direction: Direction) -> str:
        return _name(self.target.hint)

    def map_serializer(self, auto_schema: AutoSchema, direction: Direction) -> Json:
        return _object(self.target.hint, auto_schema)


class _ClosedExtension(OpenApiSerializerExtension):
    target_class = inputs.Closed
    match_subclasses = True

    def map_serializer(self, auto_schema: AutoSchema, direction: Direction) -> Json:
        schema: Json = auto_schema._map_serializer(self.target, direction, bypass_extensions=True)
        return {**schema, "additionalProperties": False}


class _BearerExtension(OpenApiAuthenticationExtension):
    target_class = "connections.authentication.BearerAuthentication"
    name = "bearer"

    def get_security_definition(self, auto_schema: AutoSchema) -> Json:
        return {
            "type": "http",
            "scheme": "bearer",
            "description": (
                "An API key (sk_…). The session token of /exchange works on GET, /submit and /events of its own "
                "connection, and nowhere else."
            ),
        }


class _SessionExtension(OpenApiAuthenticationExtension):
    target_class = "connections.authentication.BrowserAuthentication"
    name = "session"

    def get_security_definition(self, auto_schema: AutoSchema) -> Json:
        return {
            "type": "apiKey",
            "in": "cookie",
            "name": settings.SESSION_COOKIE_NAME,
            "description": (
                "The session of the dashboard. Whatever changes something needs X-CSRFToken (or csrfmiddlewaretoken in a form) as well."
            ),
        }


_ERRORS = {
    400: "The request is not valid: unknown keys, wrong types, or the code says what.",
    401: "No valid key or session token.",
    403: "Not allowed for this caller.",
    404: "There is no such object for this caller.",
    409: "This is not possible right now, or exists already.",
    410: "The login has ended.",
    413: "The body is too large.",
    415: "The body is of a content type that is not taken here.",
    429: "Too many requests; Retry-After says how many seconds to wait.",
}
IDEMPOTENCY_KEY = OpenApiParameter(
    "Idempotency-Key",
    str,
    OpenApiParameter.HEADER,
    description="1 to 255 printable characters. The same key and body get the same answer for 24 hours.",
)
CONNECTION_ID = OpenApiParameter(
    "X-Connection-ID",
    str,
    OpenApiParameter.HEADER,
    description=(
        "The client that acts (the connection_id of its stream's welcome). Never needed. 409 connection_unknown: connect again."
    ),
)
PAGE = [
    OpenApiParameter("limit", int, description="1 to 100, 20 by default; more is clamped."),
    OpenApiParameter("offset", int, description="How many to skip."),
]
#: What 403 is besides, where the session of the dashboard opens an operation that changes something.
_CSRF = "csrf_failed: a browser's session without the token of its page."
_PAGE_HEADERS = [
    OpenApiParameter(
        "X-Has-More", bool, OpenApiParameter.HEADER, response=[200], description="Whether there are more."
    ),
    OpenApiParameter(
        "X-Next-Offset",
        int,
        OpenApiParameter.HEADER,
        response=[200],
        description="The next offset; 0 on the last page.",
    ),
]


def operation(
    name: str,
    summary: str,
    *,
    tag: str,
    success: int = 200,
    answer: Any = None,
    takes: type[inputs.Closed] | None = None,
    form: type[inputs.Closed] | None = None,
    errors: tuple[int, ...] = (),
    query: list[OpenApiParameter] | None = None,
    post: bool = False,
    acts: bool = False,
    browser: bool = False,
    paged: bool = False,
    public: bool = False,
    nothing: str = "",
    raw: bool = False,
) -> Any:
    """The description of one operation. 401 (unless ``public``) and what every body can get wrong are added.

    ``post``: it honours Idempotency-Key. ``acts``: it changes something, and says for which client (so does every ``post``);
    ``browser``: for the session of the dashboard as well. ``form``: the body is taken as a form, too. ``nothing``: when 204 is answered instead.
    ``raw``: the body is bytes.
    """
    wrong = set(errors) | (set() if public else {401})
    if takes is not None:
        wrong |= {400, 413, 415}
    parameters = list(query or [])
    if post:
        parameters.append(IDEMPOTENCY_KEY)
        wrong |= {400, 409}
    acts = (acts or post) and not public
    if acts:
        parameters.append(CONNECTION_ID)
        wrong |= {400, 409}
    if acts and browser:
        wrong |= {403}
    if paged:
        parameters += [*PAGE, *_PAGE_HEADERS]
        wrong |= {400}
    responses: dict[int, Any] = {
        success: OpenApiResponse(answer, description="Done." if answer is None else "")
    }
    if nothing:
        responses[204] = OpenApiResponse(None, description=nothing)
    body: Any = takes if form is None else {"application/json": takes, FORM: form}
    if raw:
        body = {"application/octet-stream": OpenApiTypes.BINARY}
    for status in sorted(wrong):
        text = f"{_ERRORS[403]} {_CSRF}" if status == 403 and acts and browser else _ERRORS[status]
        responses[status] = OpenApiResponse(shape(ErrorShape), description=text)
    extra: dict[str, Any] = {"auth": []} if public else {}
    return extend_schema(
        operation_id=name,
        summary=summary,
        tags=[tag],
        request=body,
        responses=responses,
        parameters=parameters,
        **extra,
    )


def _stream(
    name: str,
    summary: str,
    tag: str,
    parameters: list[Json],
    errors: tuple[int, ...],
    *,
    clients: bool = False,
    browser: bool = False,
) -> Json:
    """``browser``: pages of the dashboard follow it as well; ``clients``: and one page can lose its stream to another."""
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    described = {**_ERRORS, 503: "The process is full or stopping; Retry-After says when to come again."}
    return {
        "get": {
            "operationId": name,
            "summary": summary,
            "tags": [tag],
            "parameters": parameters,
            "security": [{"bearer": []}, *([{"session": []}] if clients or browser else [])],
            "responses": {
                "200": {
                    "description": "Server-sent events, UTF-8, until the end of the stream.",
                    "content": {"text/event-stream": {"schema": {"type": "string"}}},
                },
                **({"204": {"description": _SUPERSEDED}} if clients else {}),
                **{str(status): {"description": described[status], "content": error} for status in errors},
            },
        }
    }


def _parameter(name: str, where: Literal["path", "query", "header"], text: str) -> Json:
    return {
        "in": where,
        "name": name,
        "schema": {"type": "string"},
        "description": text,
        **({"required": True} if where == "path" else {}),
    }


_SUPERSEDED = (
    "Another page has taken the client over since. Do not come back by yourself: an EventSource does not."
)

#: events/consumers.py and connections/consumers.py answer these, before Django's URLs are asked.
STREAMS: Json = {
    "/auth/connections/{connection_id}/events": _stream(
        "followConnection",
        "Follow a connection: its present state, then one event per change; ends with the login.",
        "connections",
        [_parameter("connection_id", "path", "The connection.")],
        (401, 404, 410, 429, 503),
    ),
    "/api/events": _stream(
        "followEvents",
        "Follow everything that the caller may see.",
        "events",
        [
            _parameter(
                "topics", "query", "Comma separated: connections, tasks, clients, or kind:id. All by default."
            ),
            _parameter(
                "after", "query", "A cursor: the id of the last event seen. Live from now without one."
            ),
            _parameter("Last-Event-ID", "header", "As after, and wins over it."),
            _parameter("cid", "query", "The stable id of a browser tab."),
            _parameter("page", "query", "A nonce of the page load, together with cid."),
            _parameter(
                "path",
                "query",
                "The path of the page, together with cid: others see where it is. At most 300 characters.",
            ),
        ],
        (400, 401, 429, 503),
        clients=True,
    ),
    "/api/tasks/{task_id}/output": _stream(
        "readTaskOutput",
        "What a task wrote: in one piece, or as a stream that goes on until the task has ended.",
        "tasks",
        [
            _parameter("task_id", "path", "The task."),
            _parameter("from", "query", "An offset in bytes, start (the default) or live (the present end)."),
            _parameter("tail", "query", "So many bytes before the present end, instead of from."),
            _parameter(
                "ansi",
                "query",
                "keep (the default): every byte as it was written. strip: as text without escape sequences; what is no UTF-8 becomes U+FFFD. The ids of a "
                "stripped stream, and X-Output-End, lie between two sequences, so going on there gives the same text; an offset of your own may lie inside "
                "one, and its rest is text then.",
            ),
            _parameter("limit", "query", "Bytes in one piece; 16777216 at most. Not for the stream."),
            _parameter(
                "stream",
                "query",
                "1: as a stream, as with Accept: text/event-stream. Frames: ready, output (id: the offset after it; data: {data: base64}, or {text} when "
                "stripped), cut (the limit was reached), heartbeat, end.",
            ),
            _parameter("Last-Event-ID", "header", "Where the stream goes on, and wins over from and tail."),
        ],
        (400, 401, 404, 429, 503),
        browser=True,
    ),
    "/api/work/{task_id}/inputs": _stream(
        "followWorkInputs",
        "What is sent to a task, for the program that holds it: input (id: its number), kill, end.",
        "work",
        [
            _parameter("task_id", "path", "The task."),
            _parameter("worker", "query", "What the program calls itself."),
            _parameter("attempt", "query", "The attempt that it was given."),
            _parameter(
                "Last-Event-ID",
                "header",
                "The number of the last input that has arrived. Without it everything comes that was not reported as taken.",
            ),
        ],
        (400, 401, 403, 404, 409, 429, 503),
    ),
}
_PIECE = {
    name: {"schema": {"type": "string"}, "description": text}
    for name, text in {
        "X-Output-Start": "Where the piece begins.",
        "X-Output-End": "Where it ends, and the next begins.",
        "X-Output-Size": "How much is kept at present.",
        "X-Output-Dropped": "How many bytes came beyond the limit, and are not kept.",
        "X-Task-Status": "The status of the task.",
    }.items()
}
_BYTES: Json = {"schema": {"type": "string", "format": "binary"}}
STREAMS["/api/tasks/{task_id}/output"]["get"]["responses"]["200"] |= {
    "description": "Every byte, or the text; or server-sent events, UTF-8, until the end of the stream.",
    "headers": _PIECE,
    "content": {
        "application/octet-stream": _BYTES,
        "text/plain": {"schema": {"type": "string"}},
        "text/event-stream": {"schema": {"type": "string"}},
    },
}


class Generator(SchemaGenerator):
    """The document with the streams in it."""

    def get_schema(self, request: Any = None, public: bool = False) -> Json:
        document: Json = super().get_schema(request, public)
        document["paths"] = dict(sorted({**document["paths"], **STREAMS}.items()))
        return document
