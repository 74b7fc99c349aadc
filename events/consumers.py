"""One stream over HTTP: who may open it, its headers, heartbeat, life limit, disconnect, and how it ends.

Intentional, do not "fix":

* Streams are Channels consumers and not Django views: a ``StreamingHttpResponse`` under ASGI holds a thread for its whole life.
* ``__call__`` listens by itself: ``AsyncHttpConsumer`` awaits ``handle`` inside its dispatch, so it would not hear the disconnect while it
  streams (channels #1249, #1302), and its dispatch makes a thread hop for every message.
* A stream has no channel of the layer: only the hub listens there.
* A stream does no ORM of its own: ``authorise`` and snapshots are units of work at the desk (``units.py``).
* One task serves a stream, and sleeps on one event while all is well: what is published then goes from the broker straight to the
  socket, within the hub's own step. A wake-up of a task per stream and event would cost more than the write itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import dataclasses
import datetime as dt
import itertools
import logging
import math
import random
import time
import weakref
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Protocol, TypeVar
from urllib.parse import quote

from channels.generic.http import AsyncHttpConsumer
from django.conf import settings
from django.db import Error as DatabaseFailed

from events import clients, metrics, registry, sse, trace
from events import hub as hubs
from events.broker import Subscription
from events.clients import Arrival, Welcome
from events.envelope import Envelope, Interest
from events.stream import Events, Follower, Item, Ready, Reset
from events.window import PORTION_BYTES

logger = logging.getLogger(__name__)
T = TypeVar("T")

#: A reader that takes nothing for this long is closed.
STALLED_SECONDS = 60.0
#: A drained server tells its clients to come back within this time, each at another moment.
DRAIN_SPREAD_MS = 5000
DRAIN_SECONDS = 8.0
#: How long the headers wait for the first events, so that they leave in one write.
FIRST_SECONDS = 0.25
#: How long a stream waits for the log before it looks after its heartbeats again.
LOOK_SECONDS = 2.0
#: How soon a stream that could not read the log tries again.
RETRY_SECONDS = 1.0

#: The ASGI extension that a server offers for streams: ``scope["extensions"][WIRE]()`` is a Wire, once the headers were sent.
WIRE = "switchboard.wire"


class Wire(Protocol):
    """A connection that is written to at once, while it takes what is written (``project/server.py``)."""

    def write(self, data: bytes) -> bool:
        """Take the bytes: into the socket, and what does not fit there into the transport. False, and none taken, while something waits there."""

    @property
    def free(self) -> bool:
        """Nothing waits in the transport."""

    def unsent(self) -> int:
        """Bytes that the other end has not taken yet, in the transport and in the socket."""

    def call_when_free(self, callback: Any) -> None:
        """Who is to be told when nothing waits in the transport any more."""


class Refused(Exception):
    """No stream: an ordinary HTTP answer with the contract's error body, before any byte of a stream."""

    def __init__(
        self, status: int, code: str, message: str, *, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.headers = dict(headers or {})


class Over(Exception):
    """The stream ends in order, for a named reason."""

    def __init__(
        self, reason: str, *, reconnect: bool, retry_ms: int | None = None, frame: bytes | None = None
    ) -> None:
        super().__init__(reason)
        self.reason = reason
        self.reconnect = reconnect
        self.retry_ms = retry_ms
        #: The last frame, where it is not an ``end`` of the usual form.
        self.frame = frame


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grant:
    """What :meth:`EventStreamConsumer.authorise` found. ``principal`` counts towards the limit of streams."""

    principal: str
    interest: Interest
    after: int | None = None
    state: Any = None
    #: For a stream that brings a client id.
    client: Arrival | None = None


class Streams:
    """The open streams of this process: limits, what is due, and draining. One per event loop, like the hub."""

    def __init__(self) -> None:
        self.per_principal: Counter[str] = Counter()
        self.total = 0
        #: Clients whose new stream has no place of its own yet.
        self._swapping: set[tuple[int, str]] = set()
        self.draining = asyncio.Event()
        self._empty = asyncio.Event()
        self._empty.set()
        self._open: dict[EventStreamConsumer, None] = {}
        self._ticking: asyncio.Task[None] | None = None

    @contextlib.contextmanager
    def place(
        self, principal: str, client: tuple[int, str] | None = None, *, is_back: bool = False
    ) -> Iterator[None]:
        """A place for one stream, of this client if it has one.

        ``is_back``: it is about to end a stream of the same page, and needs no further place: or a page whose network changed could not come back
        before somebody notices the old socket. Once, until one of the two has ended, or it were a way around the limits.

        :raises Refused: 429 when the principal has too many, 503 when the process is full or draining.
        """
        swaps = is_back and client not in self._swapping
        if self.draining.is_set():
            raise Refused(503, "draining", "The server is restarting.", headers={"Retry-After": "2"})
        if self.total >= settings.STREAM_PROCESS_LIMIT and not swaps:
            raise Refused(503, "process_full", "This server has no room for another stream.",
                          headers={"Retry-After": "10"})  # fmt: skip
        if self.per_principal[principal] >= settings.STREAM_LIMIT and not swaps:
            raise Refused(429, "too_many_streams", f"At most {settings.STREAM_LIMIT} streams can be open at a time.",
                          headers={"Retry-After": "5"})  # fmt: skip
        self.total += 1
        self.per_principal[principal] += 1
        self._empty.clear()
        if swaps and client is not None:
            self._swapping.add(client)
        try:
            yield
        finally:
            if client is not None:
                self._swapping.discard(client)
            self.total -= 1
            self.per_principal[principal] -= 1
            if not self.per_principal[principal]:
                del self.per_principal[principal]
            if not self.total:
                self._empty.set()

    @contextlib.contextmanager
    def watched(self, stream: EventStreamConsumer) -> Iterator[None]:
        """The stream is told when something is due for it: one clock for all, and not some timers for each."""
        self._open[stream] = None
        if self._ticking is None:
            # In a context of its own, for it serves everybody.
            self._ticking = asyncio.create_task(
                self._tick(), name="streams.tick", context=contextvars.Context()
            )
        try:
            yield
        finally:
            del self._open[stream]
            if not self._open and self._ticking is not None:
                self._ticking.cancel()
                self._ticking = None

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(tick_seconds())
            now = time.monotonic()
            for stream in list(self._open):
                stream.look_at_the_clock(now)

    async def drain(self) -> None:
        """Refuse new streams, end the open ones, and wait until they are gone (for a bounded time)."""
        self.draining.set()
        for stream in list(self._open):
            stream.call_attention()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_SECONDS):
                await self._empty.wait()
        await registry.current().flush()


_streams: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Streams] = weakref.WeakKeyDictionary()


def streams() -> Streams:
    """The open streams of the running event loop."""
    loop = asyncio.get_running_loop()
    found = _streams.get(loop)
    if found is None:
        found = _streams[loop] = Streams()
    return found


class EventStreamConsumer(AsyncHttpConsumer):
    """Base of every stream. Subclasses say who may open it (``authorise``) and how an event looks (``encode``)."""

    #: A layer that is not configured: ``get_channel_layer`` gives None for it, so no channel is made per stream.
    channel_layer_alias = "none: only the hub listens"
    #: Whether control frames (ready, reset, end ...) may be sent: clients of the managed-auth stream know none.
    control_frames: ClassVar[bool] = True
    #: Whether the frame of an event is the envelope's own, the same for all: then it need not pass ``encode``.
    plain_frames: ClassVar[bool] = False
    #: Whether it carries something besides events, which ``more`` gives.
    has_more: ClassVar[bool] = False
    extra_headers: ClassVar[tuple[tuple[bytes, bytes], ...]] = ()
    _serial = itertools.count(1)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        #: Set by a subclass when what it streams has come to its own end: the server closes after that frame, and the last one, where it says more
        #: than the usual ``end``.
        self.finished = False
        self.farewell: bytes | None = None
        #: Set from outside: the stream ends in order, at its next step.
        self.over: Over | None = None
        #: Control frames from outside, written between two events.
        self.notes: list[bytes] = []
        self._course: Course | None = None

    # ── What a subclass says ──

    async def authorise(self, *, within: float = 0.0) -> Grant:
        """Who is asking, and for what. Called before the first byte, and again at every heartbeat.

        :param within: then an answer may be so many seconds old (see ``units.Desk.look``).
        :raises Refused: 400, 401, 404, 410 ...
        """
        raise NotImplementedError("a stream must say who may open it")

    async def opening(self, grant: Grant) -> list[bytes]:
        """Frames before everything else, after the subscription exists (a snapshot, for instance)."""
        return []

    async def encode(self, batch: Sequence[Envelope], grant: Grant) -> bytes:
        """The events as bytes; empty for nothing."""
        return b"".join([envelope.frame for envelope in batch])

    async def more(self) -> bytes | None:
        """The next of what it carries besides events; None when there is nothing now (``call_attention`` when there is). Asked for when everything
        before it was written, so a reader that takes nothing costs one piece."""
        return None

    def marker(self, item: Ready | Reset) -> bytes:
        """How it says where it is in the log."""
        if isinstance(item, Ready):
            return sse.frame("ready", {"cursor": item.cursor}, retry_ms=random.randint(1000, 3000))
        return sse.frame("reset", {"reason": item.reason, "cursor": item.cursor})

    def heartbeat(self) -> bytes:
        return sse.frame("heartbeat", {"server_time": now_text()})

    def cors_headers(self) -> list[tuple[bytes, bytes]]:
        return []

    # ── The course of one request ──

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.scope = scope
        self.base_send = send
        name = f"stream-{next(self._serial)}"
        trace.stream_id.set(name)
        serving = asyncio.create_task(self._serve(), name=name)
        try:
            while (await receive())["type"] != "http.disconnect":
                pass
        finally:
            serving.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await serving

    async def _serve(self) -> None:
        try:
            if self.scope["method"] != "GET":
                raise Refused(
                    405, "method_not_allowed", "Only GET is allowed here.", headers={"Allow": "GET"}
                )
            grant = await self.authorise()
            notes = self.scope.get("switchboard.notes")
            if notes is not None:
                # For the access line of whoever serves this.
                notes.caller = grant.principal
            if grant.client is None:
                with streams().place(grant.principal):
                    await self._stream(grant, None)
            else:
                here, name = registry.current(), registry.name_of(grant.client)
                with streams().place(grant.principal, name, is_back=here.is_back(grant.client)):
                    async with here.attend(grant.client, self) as seat:
                        await self._stream(grant, seat)
        except registry.Crowded:
            message = f"You have {clients.PER_OWNER} clients already: use an id again instead of a new one."
            await self._refuse(Refused(429, "too_many_clients", message, headers={"Retry-After": "60"}))
        except registry.Gone as gone:
            # What stops an EventSource for good (WHATWG HTML, section 9.2.3). It has no body, so a header says why.
            headers = {} if gone.dismissed is None else {"X-Disconnected": quote(gone.dismissed)}
            await self._refuse(Refused(204, "superseded", "Another page has taken over.", headers=headers))
        except Refused as refused:
            await self._refuse(refused)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            if self._course is not None:
                logger.exception("a stream broke")
                metrics.ENDED.labels("fault").inc()
                await self.send_body(b"")
            elif isinstance(error, DatabaseFailed | TimeoutError):
                # A passing fault: never 401 or 410, which clients take for the end of their session.
                logger.exception("a stream could not be opened: the database does not answer")
                away = "The database does not answer."
                await self._refuse(Refused(503, "unavailable", away, headers={"Retry-After": "2"}))
            else:
                logger.exception("a stream could not be opened")
                await self._refuse(Refused(500, "internal_error", "Something went wrong on the server."))

    async def _refuse(self, refused: Refused) -> None:
        metrics.REFUSED.labels(str(refused.status)).inc()
        if refused.status == 204:
            more = [(name.encode(), value.encode()) for name, value in refused.headers.items()]
            await self.send_response(
                204, b"", headers=[(b"Cache-Control", b"no-store"), *more, *self.cors_headers()]
            )
            return
        body = sse.dumps({"code": refused.code, "message": refused.message}).encode()
        headers = [
            (b"Content-Type", b"application/json"),
            # A browser may keep a 410 and answer the next attempts from its cache.
            (b"Cache-Control", b"no-store"),
            *((name.encode(), value.encode()) for name, value in refused.headers.items()),
            *self.cors_headers(),
        ]
        await self.send_response(refused.status, body, headers=headers)

    async def _stream(self, grant: Grant, seat: registry.Seat | None) -> None:
        hub = hubs.current()
        async with hub.subscribe(grant.interest) as subscription:
            follower = Follower(hub, subscription, after=grant.after)
            opening = await self.opening(grant)
            if seat is not None:
                opening.insert(0, _welcome_frame(seat.welcome))
            await self.send_headers(
                status=200, headers=[*sse.HEADERS, *self.extra_headers, *self.cors_headers()]
            )
            metrics.OPENED.inc()
            self._course = course = Course(self, hub, subscription, grant)
            try:
                with streams().watched(self):
                    await course.run(follower, opening)
            except Over as over:
                metrics.ENDED.labels(over.reason).inc()
                if seat is not None:
                    seat.reason = over.reason
                await course.end(over)
            except asyncio.CancelledError:
                metrics.ENDED.labels("gone").inc()
                raise

    def look_at_the_clock(self, now: float) -> None:
        if self._course is not None:
            self._course.look_at_the_clock(now)

    def call_attention(self) -> None:
        if self._course is not None:
            self._course.subscription.attention.set()

    # ── What the registry of clients says to a stream: see registry.Stream ──

    def signal(self, nonce: str, *, question: bool) -> None:
        self.notes.append(sse.frame("probe", {"nonce": nonce, **({"question": True} if question else {})}))
        self.call_attention()

    def supersede(self, epoch: int) -> None:
        self._end_with(Over("superseded", reconnect=False, frame=sse.frame("superseded", {"epoch": epoch})))

    def dismiss(self, reason: str) -> None:
        data = {"reason": "disconnected", "reconnect": False, "message": reason}
        self._end_with(Over("disconnected", reconnect=False, frame=sse.frame("end", data)))

    def come_again(self) -> None:
        self._end_with(Over("client_lost", reconnect=True))

    def _end_with(self, over: Over) -> None:
        self.over = self.over or over
        self.call_attention()

    @property
    def position(self) -> int:
        return self._course.position if self._course is not None else 0


def _welcome_frame(welcome: Welcome) -> bytes:
    data = {
        "connection_id": welcome.cid,
        "epoch": welcome.epoch,
        "cid_accepted": welcome.accepted,
        **({"reason": welcome.reason} if welcome.reason else {}),
        "resumed": welcome.resumed,
        "server_time": now_text(),
        "heartbeat_seconds": settings.HEARTBEAT_SECONDS,
    }
    return sse.frame("welcome", data)


class Course:
    """An open stream on its way: what is in hand for it, what is due, and the one loop that serves it."""

    __slots__ = (
        "_beat", "_check_at", "_checking", "_dies_at", "_grant", "_hand", "_hub", "_item", "_large", "_retry_at", "_stalled_since", "_stream", "_unsent",
        "_whole", "_wire", "_wrote_at", "subscription",
    )  # fmt: skip

    def __init__(
        self, stream: EventStreamConsumer, hub: hubs.Hub, subscription: Subscription, grant: Grant
    ) -> None:
        now = time.monotonic()
        self.subscription = subscription
        self._stream = stream
        self._hub = hub
        self._grant = grant
        #: Bytes that were not written yet: few, so a list (a deque is 760 bytes, empty or not). And whether what was written ended a frame.
        self._hand: list[bytes] = []
        self._whole = True
        #: An event that is larger than a portion, and how much of its frame was written. The frame itself stays in the log: a thousand readers that
        #: stop in the middle of a large one shall not hold it a thousand times.
        self._large: tuple[int, int] | None = None
        self._wire: Wire | None = None
        # A little early: the promise is "at most", and a client measures at its own end of the line.
        self._beat = settings.HEARTBEAT_SECONDS * 0.95 - tick_seconds()
        self._wrote_at = now
        self._check_at = now + self._beat / 2
        #: The look that is under way. Nobody waits for it: a database that takes its time must not silence the stream.
        self._checking: asyncio.Task[Grant | Over] | None = None
        self._dies_at = now + settings.STREAM_MAX_SECONDS * random.uniform(0.9, 1.1)
        self._stalled_since: float | None = None
        self._unsent = 0
        #: What came from the log and could not be encoded yet, because that needs the database; and when to look again.
        self._item: Item | None = None
        self._retry_at: float | None = None

    @property
    def position(self) -> int:
        """The cursor up to which everything was handed over."""
        return self._hub.position if self.subscription.idle else self.subscription.cursor

    @property
    def silent_since(self) -> float:
        """When something was last written, by this stream's task or by the broker."""
        return max(self._wrote_at, self.subscription.handed_at)

    # ── Called from outside, within somebody else's step: quick, and never waiting ──

    def look_at_the_clock(self, now: float) -> None:
        """Something may be due: a heartbeat is written at once where that can be, for the rest the stream's task is called."""
        due = min(self._dies_at, self._check_at)
        if self._stalled_since is not None:
            due = min(due, self._stalled_since + STALLED_SECONDS)
        if self._retry_at is not None:
            due = min(due, self._retry_at)
        if now >= due:
            self.subscription.attention.set()
        elif now >= self.silent_since + self._beat and self._stalled_since is None:
            sink = self.subscription.sink
            if self.subscription.idle and sink is not None and sink(self._stream.heartbeat()):
                self._wrote_at = now
            else:
                self.subscription.attention.set()

    # ── The stream's own task ──

    async def run(self, follower: Follower, opening: list[bytes]) -> None:
        """Serve the stream. Returns never.

        :raises Over: the stream ends in order.
        """
        try:
            await self._first_write(follower, opening)
            await self._serve(follower)
        finally:
            if self._checking is not None:
                self._checking.cancel()

    async def _serve(self, follower: Follower) -> None:
        attention = self.subscription.attention
        while True:
            self._what_is_due()
            if self._hand:
                if not await self._write():
                    await attention.wait()
                    attention.clear()
                continue
            if self._large is not None:
                if not await self._write_large(*self._large):
                    await attention.wait()
                    attention.clear()
                continue
            if self._stream.notes:
                self._hand.append(self._stream.notes.pop(0))
                continue
            if self._stream.finished:
                raise Over("completed", reconnect=False, frame=self._stream.farewell)
            if time.monotonic() >= self.silent_since + self._beat:
                self._hand.append(self._stream.heartbeat())
                continue
            if not await self._read(follower) and not await self._read_more():
                if self._stream.plain_frames and self._wire is not None and self.subscription.idle:
                    self.subscription.sink = self._wire.write
                await attention.wait()
                attention.clear()
                self.subscription.sink = None

    async def _first_write(self, follower: Follower, opening: list[bytes]) -> None:
        """The headers leave together with what there is to say soon; without a first byte they would not leave at all."""
        self._hand.extend(opening)
        opening.clear()
        until = time.monotonic() + FIRST_SECONDS
        while (
            time.monotonic() < until
            and sum(map(len, self._hand)) < PORTION_BYTES
            and self._large is None
            and not self._stream.finished
            and (await self._read(follower) or await self._read_more())
        ):
            pass
        first = b""
        while self._hand and len(first) + len(self._hand[0]) <= PORTION_BYTES:
            first += self._hand.pop(0)
        await self._send(first)
        offer = self._stream.scope.get("extensions", {}).get(WIRE)
        if offer is not None:
            self._wire = offer()
        if self._wire is not None:
            self._wire.call_when_free(self.subscription.attention.set)

    def _what_is_due(self) -> None:
        if self._stream.over is not None:
            raise self._stream.over
        if streams().draining.is_set():
            raise Over("shutdown", reconnect=True, retry_ms=random.randint(200, DRAIN_SPREAD_MS))
        now = time.monotonic()
        if now >= self._dies_at:
            raise Over("lifetime", reconnect=True, retry_ms=random.randint(100, 1000))
        if self._checking is not None and self._checking.done():
            found, self._checking = self._checking.result(), None
            if isinstance(found, Over):
                raise found
            self._grant = found
            self._hub.broker.change(self.subscription, self._grant.interest)
            self._check_at = now + self._beat * random.uniform(0.4, 0.5)
        elif now >= self._check_at:
            self._check_at = math.inf
            self._checking = asyncio.create_task(self._check_again())
            self._checking.add_done_callback(lambda _: self.subscription.attention.set())

    async def _check_again(self) -> Grant | Over:
        try:
            # Two checks in a heartbeat, each of which may take an answer of the last half: revoked is seen within one.
            return await self._stream.authorise(within=self._beat * 0.45)
        except DatabaseFailed as error:
            # A passing fault ends no session; the next check asks again.
            logger.warning("a stream could not be checked: the database does not answer (%r)", error)
            return self._grant
        except Refused as refused:
            if refused.status >= 500:
                return self._grant
            reason = "forbidden" if refused.status in (403, 404) else "session_over"
            return Over(reason, reconnect=False)

    async def _read(self, follower: Follower) -> bool:
        """Take what comes next in hand; False when there is nothing now."""
        item = self._item or await self._from_log(follower.next)
        if item is None:
            return False
        if (
            self._stream.plain_frames
            and isinstance(item, Events)
            and item.batch
            and len(item.batch[0].frame) > PORTION_BYTES
        ):
            # It is alone in its portion.
            self._large = (item.batch[0].id, 0)
            return True
        self._item = item
        chunk = await self._from_log(lambda: self._chunk(item))
        if chunk is None:
            return False
        self._item = None
        if chunk:
            self._hand.append(chunk)
        return True

    async def _read_more(self) -> bool:
        """As :meth:`_read`, for what is not in the log."""
        if not self._stream.has_more or self._stream.finished:
            return False
        piece = await self._from_log(self._stream.more)
        if piece:
            self._hand.append(piece)
        return piece is not None

    async def _from_log(self, look: Callable[[], Awaitable[T | None]]) -> T | None:
        """None also when the log cannot be read now; the next look is made after RETRY_SECONDS."""
        if self._retry_at is not None and time.monotonic() < self._retry_at:
            return None
        self._retry_at = None
        try:
            # A database that takes its time must not silence the stream: whoever looks is asked again, and what it reads is shared.
            async with asyncio.timeout(LOOK_SECONDS):
                return await look()
        except (DatabaseFailed, TimeoutError) as error:
            # One line for each stream that waits: where it waits is always here, and a thousand tracebacks would hide what else is wrong.
            logger.warning(
                "a stream cannot read what it needs (%r); trying again in %s s", error, RETRY_SECONDS
            )
            self._retry_at = time.monotonic() + RETRY_SECONDS
            return None

    async def _chunk(self, item: Item) -> bytes:
        if isinstance(item, Events):
            return await self._stream.encode(item.batch, self._grant) if item.batch else b""
        if not self._stream.control_frames:
            # Clients without control frames are told the present state instead.
            again = await self._stream.opening(self._grant) if isinstance(item, Reset) else []
            return b"".join(again)
        return self._stream.marker(item)

    async def _write(self) -> bool:
        """Write one portion of what is in hand; False while the connection takes none.

        :raises Over: it took nothing for STALLED_SECONDS.
        """
        chunk = self._hand[0]
        if self._wire is None:
            await self._send(self._hand.pop(0))
            return True
        if not self._wire.write(chunk if len(chunk) <= PORTION_BYTES else chunk[:PORTION_BYTES]):
            self._watch_stall(self._wire)
            return False
        self._wrote()
        self._whole = len(chunk) <= PORTION_BYTES
        if self._whole:
            self._hand.pop(0)
        else:
            self._hand[0] = chunk[PORTION_BYTES:]
        return True

    async def _write_large(self, event_id: int, offset: int) -> bool:
        """As :meth:`_write`, for the next portion of the large event."""
        if self._wire is not None and not self._wire.free:
            self._watch_stall(self._wire)
            return False
        event = await self._from_log(lambda: self._hub.find(event_id))
        if event is None:
            if self._retry_at is not None:
                return False
            # It was pruned under us. The client comes back with the cursor before it, and is told.
            raise Over("slow", reconnect=True)
        piece = event.frame[offset : offset + PORTION_BYTES]
        if self._wire is None:
            await self._send(piece)
        elif not self._wire.write(piece):
            return False
        self._wrote()
        self._whole = offset + len(piece) == len(event.frame)
        self._large = None if self._whole else (event_id, offset + len(piece))
        return True

    def _wrote(self) -> None:
        self._stalled_since = None
        self._wrote_at = time.monotonic()

    def _watch_stall(self, wire: Wire) -> None:
        now, unsent = time.monotonic(), wire.unsent()
        if self._stalled_since is None or unsent < self._unsent:
            self._stalled_since, self._unsent = now, unsent
        elif now >= self._stalled_since + STALLED_SECONDS:
            raise Over("slow", reconnect=True)

    async def _send(self, chunk: bytes) -> None:
        """Through the server's own ``send``."""
        try:
            async with asyncio.timeout(STALLED_SECONDS):
                await self._stream.send_body(chunk, more_body=True)
        except TimeoutError:
            raise Over("slow", reconnect=True) from None
        self._wrote_at = time.monotonic()

    async def end(self, over: Over) -> None:
        """Close, with the last frame where the protocol has one."""
        # Who takes nothing is not sent the rest of something large: it would wait in memory.
        stuck = over.reason == "slow" and self._large is not None and not self._whole
        body = None if stuck else await self._rest_of_frame()
        if body is None:
            # Without its end the frame is thrown away by whoever reads it, as it must be.
            await self._stream.send_body(b"", more_body=False)
            return
        if self._stream.control_frames:
            data = {"reason": over.reason, "reconnect": over.reconnect}
            body += over.frame or sse.frame("end", data, retry_ms=over.retry_ms)
        await self._stream.send_body(body, more_body=False)

    async def _rest_of_frame(self) -> bytes | None:
        """The rest of a frame that was begun: if another followed it at once, the half would be read as an event, and its id would be taken for
        received. None when it cannot be had."""
        if self._whole:
            return b""
        if self._large is None:
            return self._hand[0]
        event_id, offset = self._large
        event = await self._from_log(lambda: self._hub.find(event_id))
        return None if event is None else event.frame[offset:]


def tick_seconds() -> float:
    """How often the streams of a process are looked over for what is due: heartbeats, checks, ends of life."""
    return float(min(0.25, settings.HEARTBEAT_SECONDS / 10))


def now_text() -> str:
    """The present time, RFC 3339 in UTC."""
    return dt.datetime.now(dt.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
