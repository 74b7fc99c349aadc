"""What the log looks like: lines for people, or one JSON object per line, with the ids of request and stream.

A line says what the program wrote into it and nothing else: others' extras (Django attaches the request, and the address of a
hosted page holds a one-time code) stay out. For the same reason the access line names the route and not the path.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import logging
import re
import time
import uuid
from collections.abc import Awaitable
from typing import Any

from pythonjsonlogger.json import JsonFormatter

from events import trace

access = logging.getLogger("switchboard.access")

#: Where in the ASGI scope the notes for the access line are kept. Streams, which pass no middleware and do not know this module, look
#: for them here by name and write down their caller.
NOTES = "switchboard.notes"
#: Asked every few seconds by machines: their lines are for DEBUG.
_PROBES = frozenset({"healthz", "readyz", "metrics"})
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
#: What an access line has more than others.
_ACCESS_FIELDS = ("method", "route", "status", "milliseconds", "caller")


@dataclasses.dataclass(slots=True)
class Notes:
    """What the access line will say; whoever knows it writes it down."""

    route: str = ""
    #: ``user:5`` or ``key:7``, when somebody had to find out.
    caller: str = ""
    #: The HTTP status, once the answer has begun.
    answered: int | None = None


class JsonLines(JsonFormatter):
    """One object per record: ``time`` (RFC 3339, UTC), ``level``, ``logger``, ``message``, and where there is one
    ``request_id``, ``stream_id``, ``exc_info``, ``stack_info``; access lines have fields of their own."""

    def add_fields(
        self, log_data: dict[str, Any], record: logging.LogRecord, message_dict: dict[str, Any]
    ) -> None:
        at = dt.datetime.fromtimestamp(record.created, dt.UTC)
        log_data["time"] = at.isoformat(timespec="milliseconds").replace("+00:00", "Z")
        log_data["level"] = record.levelname
        log_data["logger"] = record.name
        log_data["message"] = record.getMessage()
        if found := trace.request_id.get():
            log_data["request_id"] = found
        if found := trace.stream_id.get():
            log_data["stream_id"] = found
        if record.name == access.name:
            log_data.update({name: vars(record).get(name) for name in _ACCESS_FIELDS})
        for name in ("exc_info", "stack_info"):
            if message_dict.get(name):
                log_data[name] = message_dict[name]


def config(form: str, level: str) -> dict[str, Any]:
    """Django's ``LOGGING`` for ``LOG_FORMAT`` (text or json) and ``LOG_LEVEL``."""
    loggers: dict[str, Any] = {
        # The request line of the target site may carry what a GET form was filled with.
        "httpx": {"level": "WARNING"},
        "httpcore": {"level": "WARNING"},
        # Its access line prints the full URL, and a hosted page's URL carries a one-time code.
        "django.channels.server": {"level": "WARNING"},
        "daphne": {"level": "WARNING"},
        "asyncio": {"level": "WARNING"},
    }
    if form == "json":
        # Without the handlers of Django's own configuration, which would say everything twice when DEBUG is on.
        loggers["django"] = {"handlers": [], "level": level if level != "DEBUG" else "INFO"}
        # "Not Found: /..." names the path; the access line says it without. What breaks is an ERROR.
        loggers["django.request"] = {"level": "ERROR"}
    else:
        # Access lines are for machines. Who reads the terminal has the proxy's log, or LOG_FORMAT=json.
        loggers[access.name] = {"level": "WARNING"}
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {
            "text": {"format": "%(asctime)s %(levelname)s %(name)s %(message)s"},
            "json": {"()": JsonLines},
        },
        "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": form}},
        "root": {"handlers": ["stderr"], "level": level},
        "loggers": loggers,
    }


def traced(application: Any) -> Any:
    """The outermost ASGI layer: gives every request its id, tells it in ``X-Request-ID``, and writes the access line at its end.

    A client's own id is taken over when it is one (1 to 64 of ``A-Z a-z 0-9 . _ -``). Not Django's middleware, for streams and
    probes do not pass that.
    """

    async def with_id(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await application(scope, receive, send)
            return
        given = next((value for name, value in scope["headers"] if name.lower() == b"x-request-id"), b"")
        name = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex.encode()
        trace.request_id.set(name.decode())
        notes = Notes()

        # A plain function that hands on what it calls: every chunk of every stream passes here.
        def sending(message: Any) -> Awaitable[None]:
            if message["type"] == "http.response.start":
                notes.answered = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), (b"X-Request-ID", name)]}
            return send(message)  # type: ignore[no-any-return]

        began = time.monotonic()
        try:
            await application({**scope, NOTES: notes}, receive, sending)
        finally:
            _write_access_line(scope["method"], notes, time.monotonic() - began)

    return with_id


def routed(route: str, application: Any) -> Any:
    """An ASGI application that is not reached through Django's URLs, under the name that the access line gives it."""

    async def with_route(scope: Any, receive: Any, send: Any) -> None:
        if NOTES in scope:
            scope[NOTES].route = route
        await application(scope, receive, send)

    return with_route


def _write_access_line(method: str, notes: Notes, seconds: float) -> None:
    level = logging.DEBUG if notes.route in _PROBES else logging.INFO
    if not access.isEnabledFor(level):
        return
    milliseconds = round(seconds * 1000, 1)
    shown = {
        "method": method if method.isalpha() and len(method) <= 16 else "?",
        "route": notes.route or None,
        "status": notes.answered,
        "milliseconds": milliseconds,
        "caller": notes.caller or None,
    }
    access.log(
        level,
        "%s %s %s %s ms",
        shown["method"],
        notes.route or "-",
        notes.answered,
        milliseconds,
        extra=shown,
    )
