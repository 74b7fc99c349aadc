"""One stream over HTTP: who may open it, its headers, heartbeat, life limit, disconnect, and how it ends.

Intentional, do not "fix":

* Streams are Channels consumers and not Django views: a ``StreamingHttpResponse`` under ASGI holds a thread for its whole life.
* ``http_request`` starts a task and returns, instead of implementing ``handle()``: ``AsyncHttpConsumer`` awaits ``handle``
  inside its dispatch, so it would not hear the disconnect while it streams (channels #1249, #1302).
* A stream has no channel of the layer: only the hub listens there.
* A stream does no ORM of its own. ``authorise`` and snapshots are short units of work that close their connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import datetime as dt
import itertools
import logging
import random
import weakref
from collections import Counter, deque
from collections.abc import AsyncGenerator, Iterator, Mapping
from typing import Any, ClassVar

from channels.exceptions import StopConsumer
from channels.generic.http import AsyncHttpConsumer
from django.conf import settings
from django.db import Error as DatabaseFailed

from events import hub as hubs
from events import sse
from events.broker import Subscription
from events.envelope import Envelope, Interest
from events.stream import Events, Item, Ready, Reset, follow

logger = logging.getLogger(__name__)

#: A reader that takes nothing for this long is closed.
STALLED_SECONDS = 60.0
#: What is written at a time (at least one event): the memory that a reader costs who takes nothing.
PORTION_BYTES = 1 << 16
#: A drained server tells its clients to come back within this time, each at another moment.
DRAIN_SPREAD_MS = 5000
DRAIN_SECONDS = 8.0


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

    def __init__(self, reason: str, *, reconnect: bool, retry_ms: int | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.reconnect = reconnect
        self.retry_ms = retry_ms


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grant:
    """What :meth:`EventStreamConsumer.authorise` found. ``principal`` counts towards the limit of streams."""

    principal: str
    interest: Interest
    after: int | None = None
    state: Any = None


class Streams:
    """The open streams of this process: limits, and draining. One per event loop, like the hub."""

    def __init__(self) -> None:
        self.per_principal: Counter[str] = Counter()
        self.total = 0
        self.draining = asyncio.Event()
        self._empty = asyncio.Event()
        self._empty.set()

    @contextlib.contextmanager
    def place(self, principal: str) -> Any:
        """A place for one stream.

        :raises Refused: 429 when the principal has too many, 503 when the process is full or draining.
        """
        if self.draining.is_set():
            raise Refused(503, "draining", "The server is restarting.", headers={"Retry-After": "2"})
        if self.total >= settings.STREAM_PROCESS_LIMIT:
            raise Refused(503, "process_full", "This server has no room for another stream.",
                          headers={"Retry-After": "10"})  # fmt: skip
        if self.per_principal[principal] >= settings.STREAM_LIMIT:
            raise Refused(429, "too_many_streams", f"At most {settings.STREAM_LIMIT} streams can be open at a time.",
                          headers={"Retry-After": "5"})  # fmt: skip
        self.total += 1
        self.per_principal[principal] += 1
        self._empty.clear()
        try:
            yield
        finally:
            self.total -= 1
            self.per_principal[principal] -= 1
            if not self.per_principal[principal]:
                del self.per_principal[principal]
            if not self.total:
                self._empty.set()

    async def drain(self) -> None:
        """Refuse new streams, end the open ones, and wait until they are gone (for a bounded time)."""
        self.draining.set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_SECONDS):
                await self._empty.wait()


_streams: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Streams] = weakref.WeakKeyDictionary()


def streams() -> Streams:
    """The open streams of the running event loop."""
    return _streams.setdefault(asyncio.get_running_loop(), Streams())


class EventStreamConsumer(AsyncHttpConsumer):
    """Base of every stream. Subclasses say who may open it (``authorise``) and how an event looks (``encode``)."""

    #: A layer that is not configured: ``get_channel_layer`` gives None for it, so no channel is made per stream.
    channel_layer_alias = "none: only the hub listens"
    #: Whether control frames (ready, reset, end ...) may be sent: clients of the managed-auth stream know none.
    control_frames: ClassVar[bool] = True
    extra_headers: ClassVar[tuple[tuple[bytes, bytes], ...]] = ()
    _serial = itertools.count(1)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._serving: asyncio.Task[None] | None = None
        self._wrote_at = 0.0
        #: Set by a subclass when what it streams has come to its own end: the server closes after that frame.
        self.finished = False

    # ── What a subclass says ──

    async def authorise(self) -> Grant:
        """Who is asking, and for what. Called before the first byte and again at every heartbeat.

        :raises Refused: 400, 401, 404, 410 ...
        """
        raise NotImplementedError("a stream must say who may open it")

    async def opening(self, grant: Grant) -> list[bytes]:
        """Frames before everything else, after the subscription exists (a snapshot, for instance)."""
        return []

    async def encode(self, batch: list[Envelope], grant: Grant) -> bytes:
        """The events as bytes; empty for nothing."""
        return b"".join(envelope.frame for envelope in batch)

    def heartbeat(self) -> bytes:
        return sse.frame("heartbeat", {"server_time": now_text()})

    # ── The course of one request ──

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._stop_serving()

    async def http_request(self, message: dict[str, Any]) -> None:
        if self._serving is None:
            self._serving = asyncio.create_task(self._serve(), name=f"stream-{next(self._serial)}")

    async def http_disconnect(self, message: dict[str, Any]) -> None:
        await self._stop_serving()
        raise StopConsumer()

    async def _stop_serving(self) -> None:
        task, self._serving = self._serving, None
        if task is None:
            return
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    async def _serve(self) -> None:
        try:
            if self.scope["method"] != "GET":
                raise Refused(
                    405, "method_not_allowed", "Only GET is allowed here.", headers={"Allow": "GET"}
                )
            grant = await self._first_grant()
            with streams().place(grant.principal):
                await self._stream(grant)
        except Refused as refused:
            await self._refuse(refused)
        except asyncio.CancelledError:
            raise
        except Exception:
            logger.exception("a stream broke")
            if not self._wrote_at:
                await self._refuse(Refused(500, "internal_error", "Something went wrong on the server."))
            else:
                await self.send_body(b"")

    async def _first_grant(self) -> Grant:
        try:
            return await self.authorise()
        except DatabaseFailed:
            # A passing fault: never 401 or 410, which clients take for the end of their session.
            logger.exception("a stream could not be opened: the database does not answer")
            raise Refused(
                503, "unavailable", "The database does not answer.", headers={"Retry-After": "2"}
            ) from None

    async def _refuse(self, refused: Refused) -> None:
        body = sse.dumps({"code": refused.code, "message": refused.message}).encode()
        headers = [
            (b"Content-Type", b"application/json"),
            # A browser may keep a 410 and answer the next attempts from its cache.
            (b"Cache-Control", b"no-store"),
            *((name.encode(), value.encode()) for name, value in refused.headers.items()),
            *self.cors_headers(),
        ]
        await self.send_response(refused.status, body, headers=headers)

    def cors_headers(self) -> list[tuple[bytes, bytes]]:
        return []

    async def _stream(self, grant: Grant) -> None:
        hub = hubs.current()
        # Closed from the outside in, whatever happens in a write: only then is nobody still inside ``items``.
        async with (
            hub.subscribe(grant.interest) as subscription,
            contextlib.aclosing(follow(hub, subscription, after=grant.after)) as items,
            contextlib.aclosing(self._chunks(grant, items, subscription)) as chunks,
        ):
            await self.send_headers(
                status=200, headers=[*sse.HEADERS, *self.extra_headers, *self.cors_headers()]
            )
            try:
                # Without a first byte the server keeps the headers, and the client does not know that it is connected.
                await self._write(b"")
                async for chunk in chunks:
                    await self._write(chunk)
            except Over as over:
                await self._end(over)

    async def _chunks(
        self, grant: Grant, items: AsyncGenerator[Item], subscription: Subscription
    ) -> AsyncGenerator[bytes]:
        loop = asyncio.get_running_loop()
        life = settings.STREAM_MAX_SECONDS
        dies_at = loop.time() + life * random.uniform(0.9, 1.1)
        # A little early: the promise is "at most", and a client measures at its own end of the line.
        beat = settings.HEARTBEAT_SECONDS * 0.95
        check_at = loop.time() + beat
        draining = asyncio.ensure_future(streams().draining.wait())
        # Taken before the snapshot, so that whatever happens while it is read comes after it.
        pending: asyncio.Future[Item] = asyncio.ensure_future(anext(items))
        portions: deque[Item] = deque()
        try:
            for first in await self.opening(grant):
                yield first
            while not self.finished:
                now = loop.time()
                wake_at = min(check_at, dies_at, self._wrote_at + beat)
                if not portions:
                    watched: set[asyncio.Future[Any]] = {pending, draining}
                    await asyncio.wait(
                        watched, timeout=max(0.0, wake_at - now), return_when=asyncio.FIRST_COMPLETED
                    )
                if draining.done():
                    raise Over("shutdown", reconnect=True, retry_ms=random.randint(200, DRAIN_SPREAD_MS))
                now = loop.time()
                if now >= dies_at:
                    raise Over("lifetime", reconnect=True, retry_ms=random.randint(100, 1000))
                if now >= check_at:
                    grant = await self._check_again(grant)
                    subscription.interest = grant.interest
                    check_at = loop.time() + beat * random.uniform(0.8, 1.0)
                if not portions and pending.done():
                    portions.extend(_portions(pending.result()))
                    pending = asyncio.ensure_future(anext(items))
                chunk = await self._chunk(portions.popleft(), grant) if portions else b""
                if chunk:
                    yield chunk
                elif loop.time() >= self._wrote_at + beat:
                    yield self.heartbeat()
            raise Over("completed", reconnect=False)
        finally:
            for waiting in (pending, draining):
                waiting.cancel()
            await asyncio.gather(pending, draining, return_exceptions=True)

    async def _chunk(self, item: Item, grant: Grant) -> bytes:
        if isinstance(item, Events):
            return await self.encode(item.batch, grant)
        if not self.control_frames:
            return b""
        if isinstance(item, Ready):
            return sse.frame("ready", {"cursor": item.cursor}, retry_ms=random.randint(1000, 3000))
        assert isinstance(item, Reset)
        return sse.frame("reset", {"reason": item.reason, "cursor": item.cursor})

    async def _check_again(self, grant: Grant) -> Grant:
        try:
            return await self.authorise()
        except DatabaseFailed:
            # A passing fault ends no session; the next heartbeat asks again.
            logger.exception("a stream could not be checked: the database does not answer")
            return grant
        except Refused as refused:
            if refused.status >= 500 or refused.status == 429:
                return grant
            reason = "forbidden" if refused.status in (403, 404) else "session_over"
            raise Over(reason, reconnect=False) from refused

    async def _write(self, chunk: bytes) -> None:
        try:
            async with asyncio.timeout(STALLED_SECONDS):
                await self.send_body(chunk, more_body=True)
        except TimeoutError:
            raise Over("slow", reconnect=True) from None
        self._wrote_at = asyncio.get_running_loop().time()

    async def _end(self, over: Over) -> None:
        body = b""
        if self.control_frames:
            data = {"reason": over.reason, "reconnect": over.reconnect}
            body = sse.frame("end", data, retry_ms=over.retry_ms)
        await self.send_body(body, more_body=False)


def _portions(item: Item) -> Iterator[Item]:
    """A batch in parts of about PORTION_BYTES: each is written, and waited for, before the next is made."""
    if not isinstance(item, Events):
        yield item
        return
    part: list[Envelope] = []
    size = 0
    for envelope in item.batch:
        if part and size + len(envelope.frame) > PORTION_BYTES:
            yield Events(part)
            part, size = [], 0
        part.append(envelope)
        size += len(envelope.frame)
    yield Events(part)


def now_text() -> str:
    """The present time, RFC 3339 in UTC."""
    return dt.datetime.now(dt.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
