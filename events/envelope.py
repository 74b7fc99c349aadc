"""What one change looks like on its way: made by a verb, kept by the log, told to every stream. No Django."""

from __future__ import annotations

import dataclasses
import datetime as dt
import re
from collections.abc import Mapping, Sequence
from typing import Any

#: The catalogue (spec/streams.md, section 3). A name outside of it is refused before it reaches the log.
CATALOGUE = frozenset(
    {
        "connection.created",
        "connection.updated",
        "connection.deleted",
        "connection.status",
        "flow.state",
        "task.created",
        "task.updated",
        "task.deleted",
        "task.status",
        "client.opened",
        "client.suspended",
        "client.inactive",
        "client.expired",
        "client.closed",
        "claim.taken",
        "claim.released",
        # Somebody looks or types; the two above are about who is handling it.
        "claim.updated",
    }
)

#: What server processes tell each other through the log: questions to a stream, and their answers. No stream carries them, and no list
#: shows them; only who asks for :data:`SIGNALS` gets them.
SIGNAL_NAMES = frozenset({"signal.question", "signal.answer", "signal.probe"})
SIGNALS = "signals"
_SIGNAL = "signal:"

_OBJECT_ID = re.compile(r"[A-Za-z0-9_:.-]{1,80}")

#: Topic kinds, and the plural that subscribes to the whole kind.
TOPIC_KINDS = {"connections": "connection", "tasks": "task", "clients": "client"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Change:
    """One real change, as a verb tells it.

    ``topic`` is ``<kind>:<id>``; ``audience`` says whose object it is (the key of its owner);
    ``actor`` says who did it, in words; ``data`` is JSON and holds no secret.
    """

    name: str
    topic: str
    audience: int
    object_id: str
    version: int
    at: dt.datetime
    actor: str
    data: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Envelope:
    """One event of the log. ``id`` is its cursor; ``frame`` its bytes on ``/api/events``, encoded once.

    ``cache`` holds other encodings, made at most once per process and event (an HTML fragment, for instance).
    """

    id: int
    name: str
    topic: str
    audience: int
    data: Mapping[str, Any]
    frame: bytes
    cache: dict[str, Any] = dataclasses.field(default_factory=dict, compare=False)
    #: The topic that subscribes to all of its kind: ``tasks`` for ``task:task_1``.
    plural: str = dataclasses.field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "plural", f"{self.topic.partition(':')[0]}s")


def topic_of(kind: str, object_id: str) -> str:
    """``topic_of("task", "task_1") == "task:task_1"``"""
    return f"{kind}:{object_id}"


@dataclasses.dataclass(frozen=True)
class Interest:
    """What a stream asked for and may see. ``topics`` None: everything; ``audiences`` None: everybody's."""

    topics: frozenset[str] | None = None
    audiences: frozenset[int] | None = None

    def wants(self, topic: str, audience: int) -> bool:
        if self.audiences is not None and audience not in self.audiences:
            return False
        if self.topics is None:
            return not topic.startswith(_SIGNAL)
        if topic in self.topics:
            return True
        kind = topic.partition(":")[0]
        return f"{kind}s" in self.topics

    def of(self, events: Sequence[Envelope]) -> list[Envelope]:
        """Those that it wants. As :meth:`wants`, but a stream that comes back may pass thousands that are not for it."""
        topics, audiences = self.topics, self.audiences
        if topics is None:
            return [event for event in events if self.wants(event.topic, event.audience)]
        return [
            event
            for event in events
            if (event.plural in topics or event.topic in topics)
            and (audiences is None or event.audience in audiences)
        ]


def parse_topics(raw: str) -> frozenset[str] | None:
    """The ``topics`` parameter: ``connection:<id>,tasks``; empty means everything.

    :raises ValueError: with a sentence for the caller, when a topic is of no known form.
    """
    names = [name.strip() for name in raw.split(",") if name.strip()]
    if not names:
        return None
    if len(names) > 100:
        raise ValueError("At most 100 topics can be named.")
    for name in names:
        kind, colon, object_id = name.partition(":")
        if name in TOPIC_KINDS or (
            colon and kind in TOPIC_KINDS.values() and _OBJECT_ID.fullmatch(object_id)
        ):
            continue
        raise ValueError(f"Unknown topic {name[:60]!r}: use connections, tasks, clients or kind:id.")
    return frozenset(names)
