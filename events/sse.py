"""Server-Sent Events on the wire (WHATWG HTML, section 9.2). No Django.

Every frame that leaves this project is made by :func:`frame`, so the one rule that keeps streams whole lives here:
data is one line of JSON, and neither a name nor an id can break out of its line.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

_NAME = re.compile(r"[A-Za-z0-9_.:-]{1,64}\Z")
_LINE_END = re.compile(rb"\r\n|\n|\r")
CONTENT_TYPE = "text/event-stream"

#: Headers of every stream. ``identity`` and ``no-transform`` keep proxies and middleware from buffering to compress.
HEADERS: tuple[tuple[bytes, bytes], ...] = (
    (b"Content-Type", b"text/event-stream"),
    (b"Cache-Control", b"no-cache, no-transform"),
    (b"X-Accel-Buffering", b"no"),
    (b"Content-Encoding", b"identity"),
    (b"X-Content-Type-Options", b"nosniff"),
)


def dumps(data: Mapping[str, Any]) -> str:
    """One line of JSON. ``json`` escapes every control character, so no raw CR, LF or NUL can occur."""
    return json.dumps(data, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def frame(
    name: str | None, data: Mapping[str, Any], *, id: int | None = None, retry_ms: int | None = None
) -> bytes:
    """One named frame with one ``data:`` line; ``id:`` only where a cursor belongs, ``retry:`` in milliseconds.

    :raises ValueError: for a name that is no plain token.
    """
    return text_frame(name, dumps(data), id=id, retry_ms=retry_ms)


def text_frame(name: str | None, text: str, *, id: int | None = None, retry_ms: int | None = None) -> bytes:
    """As :func:`frame`, for text that may have several lines: each becomes a ``data:`` line of its own."""
    if name is not None and not _NAME.match(name):
        raise ValueError(f"not a name of an event: {name!r}")
    lines = []
    if id is not None:
        lines.append(f"id: {int(id)}")
    if retry_ms is not None:
        lines.append(f"retry: {int(retry_ms)}")
    if name is not None:
        lines.append(f"event: {name}")
    clean = text.replace("\0", "\N{REPLACEMENT CHARACTER}")
    lines.extend(f"data: {line}" for line in re.split(r"\r\n|\r|\n", clean))
    # Half of a surrogate pair can come in as a JSON escape and has no UTF-8: one such event must not stop the log for everybody.
    return ("\n".join(lines) + "\n\n").encode("utf-8", "replace")


@dataclass
class ServerSentEvent:
    """One event as a reader sees it. ``id`` is the last event id in force when it was dispatched."""

    name: str
    data: str
    id: str

    def json(self) -> Any:
        return json.loads(self.data)


class Parser:
    """Bytes in, events out: a reader that follows the specification to the letter (WHATWG HTML, section 9.2.6).

    The tests and the bench read every stream with it: written from the specification and not from :func:`frame`, it
    is an independent witness of what went over the wire.
    """

    def __init__(self) -> None:
        self._buffer = b""
        self._first = True
        self._after_cr = False
        self._data: list[str] = []
        self._name = ""
        self.last_event_id = ""
        self.retry_ms: int | None = None
        self.comments = 0

    def feed(self, chunk: bytes) -> Iterator[ServerSentEvent]:
        """Take the next bytes, wherever the chunk was cut; the events that they complete."""
        buffer = self._buffer + chunk
        # What was looked through before has no line end, but for a CR whose LF may come now.
        place, look_from = 0, len(self._buffer)
        if self._first and len(buffer) >= 3:
            place = 3 if buffer.startswith(b"\xef\xbb\xbf") else 0
            look_from, self._first = place, False
        found: list[ServerSentEvent] = []
        while not self._first:
            if self._after_cr and place < len(buffer):
                place += buffer.startswith(b"\n", place)
                self._after_cr = False
            match = _LINE_END.search(buffer, max(place, look_from))
            if match is None:
                break
            line, place = buffer[place : match.start()], match.end()
            # A lone CR at the end of a chunk ends the line now; if LF follows, it belonged to it.
            self._after_cr = match.group() == b"\r" and place == len(buffer)
            event = self._line(line.decode("utf-8", "replace"))
            if event is not None:
                found.append(event)
        self._buffer = buffer[place:]
        return iter(found)

    def _line(self, line: str) -> ServerSentEvent | None:
        if not line:
            return self._dispatch()
        if line.startswith(":"):
            self.comments += 1
            return None
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if field == "data":
            self._data.append(value)
        elif field == "event":
            self._name = value
        elif field == "id" and "\0" not in value:
            self.last_event_id = value
        elif field == "retry" and value.isascii() and value.isdigit():
            self.retry_ms = int(value)
        return None

    def _dispatch(self) -> ServerSentEvent | None:
        data, name = self._data, self._name or "message"
        self._data, self._name = [], ""
        if not data:
            return None
        return ServerSentEvent(name=name, data="\n".join(data), id=self.last_event_id)
