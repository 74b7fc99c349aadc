"""What operators and their machines ask of one server process: may it get work (``/readyz``), what is it doing (``/metrics``).

Plain ASGI, routed before Django: both look at the hub and the streams of the very event loop that serves the request, and both
must answer when the thread pool is busy. Whatever is looked at gets LOOK_SECONDS, and whoever asks while a look is under way gets
its result, so that a wedged database or Redis, or a thousand impatient probes, cost one look.

``/readyz`` fails

* while the process drains, at once;
* when the database does not answer: nothing can be read or written;
* when the channel layer does not answer, or, while somebody listens, the hub does not hear what was said there. No event is lost
  then, but this process's events reach the streams of the others late and the other way round, and limits that all processes count
  together it counts alone: another process that has its Redis is the better choice. Where all share one Redis, its end makes all of
  them unready. A balancer that then has nobody left should go on with everybody (they still work), or look at ``/healthz`` alone;
* when the hub does not come up to what the log held as the look began. A hub without streams does not read, and is no reason.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import logging
import threading
import time
import weakref
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, Generic, TypeVar
from urllib.parse import urlsplit

from channels.layers import InMemoryChannelLayer, get_channel_layer
from django.conf import settings
from django.db import connection
from prometheus_client import CONTENT_TYPE_LATEST, ProcessCollector, disable_created_metrics, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric

from events import hub as hubs
from events import log, metrics, registry, sse, waker
from events.consumers import Refused, streams

logger = logging.getLogger(__name__)
T = TypeVar("T")
Json = dict[str, Any]

#: What a look may take, all of it together.
LOOK_SECONDS = 2.0
#: A wake-up says nothing when nobody has joined yet, so it is said again.
SAY_AGAIN_SECONDS = 0.25
_PAUSE = 0.02
#: A principal is a time series: those with the most streams are named, the rest is ``others``.
NAMED_PRINCIPALS = 50

_STARTED = time.monotonic()
_process = ProcessCollector(registry=None)
# Or every counter is told twice, the second time with the moment at which the process started.
disable_created_metrics()


class Shared(Generic[T]):
    """One run at a time; whoever asks meanwhile gets its result."""

    def __init__(self, work: Callable[[], Coroutine[Any, Any, T]]) -> None:
        self._work = work
        self._running: asyncio.Task[T] | None = None

    async def __call__(self) -> T:
        if self._running is None:
            self._running = asyncio.create_task(self._work(), name="operations.look")
            self._running.add_done_callback(self._over)
        # One that leaves while it waits must not take the result away from the others.
        return await asyncio.shield(self._running)

    def _over(self, _: asyncio.Task[T]) -> None:
        self._running = None


class Operations:
    """The looks of one event loop."""

    def __init__(self) -> None:
        self.readiness = Shared(self._readiness)
        self.numbers = Shared(self._numbers)
        self._asking: asyncio.Future[int | Exception] | None = None

    # ── Ready? ──

    async def _readiness(self) -> tuple[bool, Json]:
        end = time.monotonic() + LOOK_SECONDS
        (database, newest), layer = await asyncio.gather(self._database(), _layer(end))
        hub = await _hub(newest, end)
        draining = streams().draining.is_set()
        ready = database["ok"] and layer["ok"] and hub["ok"] and not draining
        return ready, {"database": database, "layer": layer, "hub": hub, "draining": draining}

    async def _database(self) -> tuple[Json, int | None]:
        began = time.monotonic()
        try:
            newest = await self.newest()
        except Exception as error:  # noqa: BLE001 (whatever it is, the database cannot be used)
            # What exactly is wrong names hosts and users, so it is for the log alone.
            logger.warning("the database does not answer a look: %r", error)
            return {"ok": False, "error": "does not answer"}, None
        return {"ok": True, "milliseconds": _milliseconds(began)}, newest

    async def newest(self) -> int:
        """The newest cursor of the log, as it is now.

        :raises TimeoutError: the database did not answer within LOOK_SECONDS.
        :raises Exception: what it answered with.
        """
        async with asyncio.timeout(LOOK_SECONDS):
            while self._asking is not None:
                # It began before this question did. Of those that hang there is one at most.
                await asyncio.wait({self._asking})
            answer = await asyncio.shield(self._ask())
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _ask(self) -> asyncio.Future[int | Exception]:
        """In a thread that lives for one question.

        Intentional: a database that hangs would hold the thread that all streams share, and Python waits for the threads of an
        executor before it ends.
        """
        loop = asyncio.get_running_loop()
        asking: asyncio.Future[int | Exception] = loop.create_future()

        def answered(answer: int | Exception) -> None:
            self._asking = None
            if not asking.done():
                asking.set_result(answer)

        def look() -> None:
            answer: int | Exception
            try:
                try:
                    answer = log.newest()
                finally:
                    connection.close()
            except Exception as error:  # noqa: BLE001 (raised where it was asked)
                answer = error
            with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
                loop.call_soon_threadsafe(answered, answer)

        threading.Thread(target=look, name="operations.look", daemon=True).start()
        self._asking = asking
        return asking

    # ── Numbers ──

    async def _numbers(self) -> bytes:
        newest: int | None = None
        try:
            newest = await self.newest()
        except Exception as error:  # noqa: BLE001 (told as a number: switchboard_database_up)
            logger.warning("the database does not answer a look: %r", error)
        return generate_latest(metrics.REGISTRY) + generate_latest(
            _Families([*_now(newest), *_process.collect()])
        )


class _Families:
    """Families that are known already, as a collector."""

    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        yield from self._families


_operations: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Operations] = weakref.WeakKeyDictionary()


def current() -> Operations:
    """Of the running event loop."""
    return _operations.setdefault(asyncio.get_running_loop(), Operations())


# ── Looks ──


async def _layer(end: float) -> Json:
    """A round trip: the layer's server takes a wake-up, and the hub, when it runs, hears one."""
    layer = get_channel_layer()
    if layer is None or isinstance(layer, InMemoryChannelLayer):
        return {"ok": True, "kind": "memory"}
    began = time.monotonic()
    heard = _wakes()
    try:
        async with asyncio.timeout(max(0.0, end - began)):
            while True:
                # What all hubs understand, and costs each a look: a channel of its own would stay behind in the layer
                # whenever it does not answer.
                await layer.group_send(waker.GROUP, waker.MESSAGE)
                again = time.monotonic() + SAY_AGAIN_SECONDS
                while hubs.current().running and _wakes() == heard and time.monotonic() < again:
                    await asyncio.sleep(_PAUSE)
                if not hubs.current().running or _wakes() != heard:
                    return {"ok": True, "kind": "redis", "milliseconds": _milliseconds(began)}
    except Exception as error:  # noqa: BLE001 (whatever its client raises)
        logger.warning("the channel layer does not answer a look: %r", error)
        return {"ok": False, "kind": "redis", "error": "does not answer"}


def _wakes() -> float:
    return metrics.REGISTRY.get_sample_value("switchboard_wakes_total") or 0.0


async def _hub(newest: int | None, end: float) -> Json:
    """Caught up with what the log held when the look began, or catching up in time."""
    hub = hubs.current()
    if not hub.running:
        return {"ok": True, "running": False}
    if newest is None:
        return {"ok": False, "running": True, "error": "cannot be told without the database"}
    while hub.running and hub.position < newest and time.monotonic() < end:
        await asyncio.sleep(_PAUSE)
    behind = max(0, newest - hub.position) if hub.running else 0
    return {"ok": not behind, "running": hub.running, "behind": behind}


def _milliseconds(began: float) -> float:
    return round((time.monotonic() - began) * 1000, 1)


def _now(newest: int | None) -> Iterator[Metric]:
    """What is now; what grows is in ``events/metrics.py``. ``newest`` is None when the database did not say."""
    open_streams, hub, now = streams(), hubs.current(), time.monotonic()

    def gauge(name: str, value: float, what: str) -> Metric:
        return GaugeMetricFamily(f"switchboard_{name}", what, value=value)

    yield gauge("streams_open", open_streams.total, "Streams that are open.")
    yield gauge("streams_limit", settings.STREAM_PROCESS_LIMIT, "Streams that this process takes.")
    yield gauge(
        "principal_streams_limit", settings.STREAM_LIMIT, "Streams that one user or key may have open."
    )
    yield _by_principal(open_streams.per_principal.most_common())
    yield gauge("draining", open_streams.draining.is_set(), "1 while the process ends its streams and stops.")
    yield gauge(
        "hub_running", hub.running, "1 while the hub reads the log, which it does while a stream is open."
    )
    yield gauge("database_up", newest is not None, "1 when the database answered this look.")
    yield gauge("threads", threading.active_count(), "Threads of the process, those of Python.")
    if newest is not None:
        yield gauge("log_newest", newest, "The newest cursor of the log.")
    if hub.running:
        since = now - (hub.caught_up_at if hub.caught_up_at is not None else _STARTED)
        yield gauge("hub_position", hub.position, "The cursor up to which the hub has served its streams.")
        yield gauge(
            "hub_looked_seconds", since, "Age of the hub's last look at the log that left nothing unread."
        )
        behind = max(0, newest - hub.position) if newest is not None else None
    else:
        behind = since = 0
    # Without the database they cannot be told, and a missing number alarms better than an old one.
    if behind is not None:
        yield gauge(
            "hub_lag_events", behind, "Events (by their ids, so at most) that the hub has yet to read."
        )
        yield gauge(
            "hub_lag_seconds",
            since if behind else 0.0,
            "How long ago the hub had nothing to read; 0 when it has not.",
        )


async def nameless_streams() -> int:
    """Streams of this process that belong to no client: programs that brought no id, and hosted pages."""
    return max(0, streams().total - len(registry.current()))


def _by_principal(counts: list[tuple[str, int]]) -> Metric:
    family = GaugeMetricFamily(
        "switchboard_principal_streams",
        f"Open streams by who opened them; the {NAMED_PRINCIPALS} with the most, the rest as 'others'.",
        labels=["principal"],
    )
    for principal, count in counts[:NAMED_PRINCIPALS]:
        family.add_metric([principal], count)
    if counts[NAMED_PRINCIPALS:]:
        family.add_metric(["others"], sum(count for _, count in counts[NAMED_PRINCIPALS:]))
    return family


# ── Answers ──


async def readyz(scope: Any, receive: Any, send: Any) -> None:
    """``{"ready", "checks": {"database", "layer", "hub", "draining"}}``; 200, or 503 with ``Retry-After``."""
    try:
        _only_read(scope)
        if streams().draining.is_set():
            not_looked = {"ok": None}
            ready, checks = (
                False,
                dict.fromkeys(("database", "layer", "hub"), not_looked) | {"draining": True},
            )
        else:
            ready, checks = await current().readiness()
    except Refused as refused:
        await _refuse(scope, send, refused)
        return
    headers = {} if ready else {"Retry-After": "2"}
    body = sse.dumps({"ready": ready, "checks": checks}).encode()
    await _answer(scope, send, 200 if ready else 503, body, "application/json", headers)


async def metrics_page(scope: Any, receive: Any, send: Any) -> None:
    """Prometheus' text format, for who may read it."""
    try:
        _only_read(scope)
        _may_read_metrics(scope)
    except Refused as refused:
        await _refuse(scope, send, refused)
        return
    await _answer(scope, send, 200, await current().numbers(), CONTENT_TYPE_LATEST, {})


def _only_read(scope: Any) -> None:
    if scope["method"] not in ("GET", "HEAD"):
        raise Refused(
            405, "method_not_allowed", "Only GET and HEAD are allowed here.", headers={"Allow": "GET, HEAD"}
        )


def _may_read_metrics(scope: Any) -> None:
    """With METRICS_TOKEN, who sends it. Without, who asks from this machine and directly: the numbers tell who is connected.

    :raises Refused: 401 or 403.
    """
    headers = [(name.lower(), value) for name, value in scope["headers"]]
    if settings.METRICS_TOKEN:
        given = next((value for name, value in headers if name == b"authorization"), b"")
        scheme, _, token = given.partition(b" ")
        right = hmac.compare_digest(token.strip(), settings.METRICS_TOKEN.encode())
        if scheme.lower() != b"bearer" or not right:
            raise Refused(
                401,
                "unauthorized",
                "Send METRICS_TOKEN as a Bearer token.",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return
    # A proxy on this machine is a loopback peer, too, and asks for others.
    passed_on = any(
        name in (b"forwarded", b"via", b"x-real-ip") or name.startswith(b"x-forwarded-")
        for name, _ in headers
    )
    # A page that has its own name lead to 127.0.0.1 would make a browser on this machine ask.
    host = next((value.decode("latin-1") for name, value in headers if name == b"host"), "")
    peer = scope["client"][0] if scope.get("client") else ""
    if passed_on or not _is_loopback(peer) or not _names_this_machine(host):
        raise Refused(403, "forbidden", "Only this machine may read this without METRICS_TOKEN.")


def _is_loopback(address: str) -> bool:
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    mapped = parsed.ipv4_mapped if isinstance(parsed, ipaddress.IPv6Address) else None
    return (mapped or parsed).is_loopback


def _names_this_machine(host: str) -> bool:
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return False
    return name == "localhost" or _is_loopback(name)


async def _refuse(scope: Any, send: Any, refused: Refused) -> None:
    body = sse.dumps({"code": refused.code, "message": refused.message}).encode()
    await _answer(scope, send, refused.status, body, "application/json", refused.headers)


async def _answer(
    scope: Any, send: Any, status: int, body: bytes, kind: str, headers: dict[str, str]
) -> None:
    shown = {
        "Content-Type": kind,
        "Content-Length": str(len(body)),
        "Cache-Control": "no-store",
        "X-Content-Type-Options": "nosniff",
        **headers,
    }
    encoded = [(name.encode(), value.encode()) for name, value in shown.items()]
    await send({"type": "http.response.start", "status": status, "headers": encoded})
    await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})
