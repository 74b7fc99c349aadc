"""What a client got, from the bytes it received: which events, when, and whether any is lost, doubled or out of order.

Pure and cheap: bytes and times in, numbers out. It runs after the measured time, so it costs the measurement nothing. An event
counts only when its whole frame arrived: a torn frame is a lost event.
"""

from __future__ import annotations

import bisect
import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

#: Every benched event starts its JSON with this: its number, and when it was published (CLOCK_MONOTONIC, nanoseconds).
#: The name has one letter because PostgreSQL keeps the keys of JSON in order of their length.
_EVENT = re.compile(rb'data: ?\{"m": ?"S(\d+)T(\d+)E"')
#: Frames of the stream itself, by their names.
_SIGN = re.compile(rb"^event: (welcome|ready|reset|end|superseded)$", re.MULTILINE)
_READY_CURSOR = re.compile(rb'event: ready\ndata: \{"cursor": ?(\d+)')


def mark(seq: int, sent_ns: int) -> str:
    """What goes into the payload, under ``m``."""
    return f"S{seq}T{sent_ns}E"


def payload(seq: int, sent_ns: int, size: int = 300) -> dict[str, str]:
    """The same for everybody: about ``size`` bytes of JSON."""
    return {"m": mark(seq, sent_ns), "fill": "x" * max(0, size - 60)}


def needle(seq: int) -> bytes:
    """Bytes that only event ``seq`` holds."""
    return b'"S%dT' % seq


@dataclasses.dataclass(slots=True)
class Sign:
    """A frame of the stream itself, as one client got it: when (as in Got), its name, its data as they came."""

    at: int
    name: str
    data: str


@dataclasses.dataclass(slots=True)
class Got:
    """One event as one client got it. Times in nanoseconds of CLOCK_MONOTONIC."""

    seq: int
    sent: int
    at: int


class Broken(ValueError):
    """The chunked framing of an answer does not hold."""


class Reader:
    """The answer to one request: head, chunked framing, frames. Keeps what is incomplete until the rest comes."""

    def __init__(self) -> None:
        self.status = 0
        self.ended = False
        self.signs: list[Sign] = []
        self._head = False
        self._chunked = False
        self._raw = b""
        self._raw_at = 0
        self._body = b""
        self._body_at = 0

    def feed(self, received: Iterable[tuple[int, bytes]]) -> tuple[list[Got], str]:
        """What came, and when; returns the events that it completes and the last cursor among them (or ``""``).

        :raises Broken: when the chunked framing does not hold.
        """
        pieces = [self._raw] if self._raw else []
        ends = [len(self._raw)] if self._raw else []
        times = [self._raw_at] if self._raw else []
        end = len(self._raw)
        for at, data in received:
            pieces.append(data)
            end += len(data)
            ends.append(end)
            times.append(at)
        raw = b"".join(pieces)
        if not raw:
            return [], ""
        start = 0
        if not self._head:
            stop = raw.find(b"\r\n\r\n")
            if stop < 0:
                self._raw, self._raw_at = raw, times[-1]
                return [], ""
            head = raw[:stop].lower()
            self._head = True
            self.status = int(head.split(b" ", 2)[1])
            self._chunked = b"transfer-encoding: chunked" in head
            start = stop + 4
        parts, origins, consumed = self._unframe(raw, start)
        self._raw, self._raw_at = raw[consumed:], times[-1]
        return self._events(parts, origins, ends, times)

    def _unframe(self, raw: bytes, start: int) -> tuple[list[bytes], list[int], int]:
        """The pieces of the body, the place of each in ``raw``, and how much of ``raw`` they used up."""
        if not self._chunked:
            return [raw[start:]], [start], len(raw)
        parts: list[bytes] = []
        origins: list[int] = []
        while True:
            line = raw.find(b"\r\n", start, start + 20)
            if line < 0:
                if len(raw) - start >= 20:
                    raise Broken(f"no length of a chunk in {raw[start : start + 40]!r}")
                return parts, origins, start
            try:
                size = int(raw[start:line], 16)
            except ValueError:
                raise Broken(f"no length of a chunk in {raw[start : start + 40]!r}") from None
            begin, stop = line + 2, line + 2 + size
            if len(raw) < stop + 2:
                return parts, origins, start
            if raw[stop : stop + 2] != b"\r\n":
                raise Broken(f"a chunk does not end where it says: {raw[stop : stop + 20]!r}")
            if not size:
                self.ended = True
                return parts, origins, len(raw)
            parts.append(raw[begin:stop])
            origins.append(begin)
            start = stop + 2

    def _events(
        self, parts: list[bytes], origins: list[int], ends: list[int], times: list[int]
    ) -> tuple[list[Got], str]:
        pending = len(self._body)
        body = b"".join([self._body, *parts])
        places: list[int] = []
        place = pending
        for part in parts:
            places.append(place)
            place += len(part)
        found: list[Got] = []

        def arrived(last: int) -> int:
            """When this byte of the body was there."""
            if last < pending or not places:
                return self._body_at
            number = bisect.bisect_right(places, last) - 1
            return times[bisect.bisect_right(ends, origins[number] + last - places[number])]

        start = 0
        while (stop := body.find(b"\n\n", start)) >= 0:
            frame, start = body[start:stop], stop + 2
            match = _EVENT.search(frame)
            if match is None and (sign := _SIGN.search(frame)) is not None:
                data = frame[frame.find(b"data: ") + 6 :].decode()
                self.signs.append(Sign(arrived(stop + 1), sign[1].decode(), data))
            # One line of data, which is whole: two events that run into each other are none.
            if match is None or not frame.endswith(b"}") or frame.find(b"\n", match.end()) >= 0:
                continue
            if match.start() and frame[match.start() - 1] != 10:
                continue
            # The last byte of the empty line that dispatches the event says when it was there.
            found.append(Got(int(match[1]), int(match[2]), arrived(stop + 1)))
        cursor = self._cursor(body[:start])
        self._body, self._body_at = body[start:], times[-1]
        return found, cursor

    def _cursor(self, frames: bytes) -> str:
        """The last one in these frames: of an event, or else of ``ready``."""
        place = frames.rfind(b"\nid: ") + 1
        if place or frames.startswith(b"id: "):
            return frames[place + 4 : frames.index(b"\n", place)].decode()
        ready = _READY_CURSOR.search(frames) if b"event: ready" in frames else None
        return ready[1].decode() if ready else ""


@dataclasses.dataclass
class Faults:
    """Over all clients. ``incomplete``: clients that miss at least one."""

    lost: int = 0
    duplicates: int = 0
    misordered: int = 0
    incomplete: int = 0


def faults(seqs: Iterable[list[int]], first: int, last: int) -> Faults:
    """``seqs``: everything that each client ever got, in the order in which it came. Expected: ``first`` to ``last``, once each.

    Duplicates and order are looked at over all that came, loss over the expected range.
    """
    sums = Faults()
    wanted = frozenset(range(first, last + 1))
    for got in seqs:
        seen = frozenset(got)
        lost = len(wanted - seen)
        sums.lost += lost
        sums.incomplete += lost > 0
        sums.duplicates += len(got) - len(seen)
        highest = -1
        for seq in got:
            if seq < highest:
                sums.misordered += 1
            highest = max(highest, seq)
    return sums


def percentiles(values: list[int]) -> dict[str, float]:
    """Milliseconds from nanoseconds: p50, p99, largest."""
    if not values:
        return {}
    ordered = sorted(values)

    def at(share: float) -> float:
        return round(ordered[min(len(ordered) - 1, int(len(ordered) * share))] / 1e6, 3)

    return {"p50": at(0.5), "p99": at(0.99), "max": round(ordered[-1] / 1e6, 3)}


def summary(
    clients: Iterable[tuple[list[int], list[Got]]], first: int, last: int, commits: Mapping[int, int]
) -> dict[str, Any]:
    """Of each client what it ever got (numbers), and what it got lately (events). ``share``: of what was expected, each counted once.

    ``slowest``: the events that were longest on their way to some client, by their place in the range.
    ``latency_ms`` counts from publishing; ``from_commit_ms`` from ``commits`` (number of the event → nanoseconds), where known.
    """
    known = list(clients)
    checked = faults((seqs for seqs, _ in known), first, last)
    late: list[int] = []
    latest: dict[int, int] = {}
    from_commit: list[int] = []
    delivered, first_sent, last_at = 0, 0, 0
    for _, events in known:
        for event in events:
            if not first <= event.seq <= last:
                continue
            delivered += 1
            late.append(event.at - event.sent)
            latest[event.seq] = max(latest.get(event.seq, 0), event.at - event.sent)
            first_sent = min(first_sent or event.sent, event.sent)
            last_at = max(last_at, event.at)
            if event.seq in commits:
                from_commit.append(event.at - commits[event.seq])
    expected = len(known) * (last - first + 1)
    return {
        "clients": len(known),
        "expected": expected,
        "delivered": delivered,
        "share": round(1 - checked.lost / expected, 4) if expected else 0.0,
        **dataclasses.asdict(checked),
        "latency_ms": percentiles(late),
        "from_commit_ms": percentiles(from_commit),
        "slowest": [
            {"event": seq - first, "ms": round(ns / 1e6, 1)}
            for seq, ns in sorted(latest.items(), key=lambda one: -one[1])[:5]
        ],
        "last_at_ns": last_at,
        "seconds": round((last_at - first_sent) / 1e9, 3) if delivered else None,
    }
