"""Whose work is being done: set where a request or a stream begins, read by the log lines. No Django, no I/O.

A task takes over the values of whoever starts it. What serves everybody (the hub) is started in a context of its own,
or its lines would carry the ids of the first who came.
"""

from __future__ import annotations

from contextvars import ContextVar

#: The id of the HTTP request, as its answer says it in ``X-Request-ID``; empty outside of one.
request_id: ContextVar[str] = ContextVar("request_id", default="")
#: The id of the stream, empty outside of one.
stream_id: ContextVar[str] = ContextVar("stream_id", default="")
