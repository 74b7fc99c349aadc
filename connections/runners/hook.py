"""Reports of ended tasks on their way: one POST to one receiver, and the loop that sends what is due.

Headers and signature are those of https://www.standardwebhooks.com; the URL is somebody else's, so it goes through the guard of
``drivers/network.py``. What was sent is known by its answer alone: whoever breaks off leaves a lease, and the report is sent again.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import datetime as dt
import email.utils
import functools
import json
import logging
import ssl
import traceback
from collections import Counter
from collections.abc import Callable
from typing import TypeVar

import httpx
from channels.db import database_sync_to_async
from django.conf import settings
from django.db import DatabaseError
from django.utils import timezone

from connections import hooks
from connections.drivers import network
from connections.hooks import Report
from connections.states import HookState
from events import hub as hubs
from events.envelope import Envelope, Interest
from events.stream import Events, follow

logger = logging.getLogger(__name__)
T = TypeVar("T")

USER_AGENT = "Switchboard/0.1 (hooks; Standard Webhooks v1)"
#: Reports under way at once in one worker; of them to one site, and of one owner: who is slow holds up themselves.
CONCURRENCY, PER_SITE, PER_OWNER = 32, 4, 16
#: Looked again after this time even when no bell rang: retries become due in silence.
LOOK_SECONDS = 2.0
#: Bells that ring together are one look.
PAUSE_SECONDS = 0.05
#: How long a worker that stops waits for the answers to what it has sent.
STOP_SECONDS = 5.0

#: Not now, says the receiver. Every other 4xx is for good.
_LATER = frozenset({408, 429})
_SAY_WHEN = frozenset({429, 503})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of one try. ``error`` (empty: it arrived) names at most a host, never a path, a query or a secret."""

    status: int | None = None
    error: str = ""
    final: bool = False
    retry_after: dt.timedelta | None = None


def encoded(report: Report) -> bytes:
    """The body of every try."""
    return json.dumps(report.body, separators=(",", ":")).encode()


async def send(report: Report, client: network.GuardedClient, *, now: dt.datetime) -> Outcome:
    """POST one report. ``client`` is made for this one, so that its names are looked up anew, once."""
    body = encoded(report)
    timestamp = int(now.timestamp())
    try:
        url = httpx.URL(report.url)
    except httpx.InvalidURL:
        return Outcome(error="The address of this hook is not valid.", final=True)
    request = network.Request(
        url=url,
        method="POST",
        headers={
            "Content-Type": "application/json",
            "Accept-Encoding": "identity",
            "User-Agent": USER_AGENT,
            "webhook-id": report.id,
            "webhook-timestamp": str(timestamp),
            "webhook-signature": hooks.signature(
                report.secret, message_id=report.id, timestamp=timestamp, body=body
            ),
        },
        body=body,
        status_only=True,
    )
    try:
        reply = await client.fetch(request)
    except network.AddressRefused as fault:
        return Outcome(error=str(fault), final=True)
    except network.NetworkFault as fault:
        return Outcome(error=str(fault))
    return judged(reply.status, reply.headers.get("retry-after", ""), now=now)


def judged(status: int, retry_after: str = "", *, now: dt.datetime) -> Outcome:
    """What an answer means: 2xx has arrived; 408, 429 and 5xx are tried again; everything else is for good."""
    if 200 <= status < 300:
        return Outcome(status=status)
    if 300 <= status < 400:
        return Outcome(
            status=status,
            error=f"The receiver answered {status}; redirects are not followed.",
            final=True,
        )
    if status == 410:
        return Outcome(
            status=status, error="The receiver answered 410: it wants no more reports.", final=True
        )
    return Outcome(
        status=status,
        error=f"The receiver answered {status}.",
        final=status not in _LATER and status < 500,
        retry_after=_wait(retry_after, now) if status in _SAY_WHEN else None,
    )


def _wait(text: str, now: dt.datetime) -> dt.timedelta | None:
    """``Retry-After`` (RFC 9110, 10.2.3): seconds or a date. None when there is none that makes sense."""
    text = text.strip()
    if text.isascii() and text.isdigit():
        return dt.timedelta(seconds=min(int(text[:10]), 10**9))
    try:
        moment = email.utils.parsedate_to_datetime(text)
    except ValueError:
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=dt.UTC)
    return max(moment - now, dt.timedelta())


async def _db(work: Callable[..., T], **arguments: object) -> T:
    return await database_sync_to_async(work, thread_sensitive=False)(**arguments)


@functools.cache
def _trusted() -> ssl.SSLContext:
    """Made once: reading all certificates takes as long as many reports."""
    return httpx.create_ssl_context(trust_env=False)


def new_client() -> network.GuardedClient:
    return network.GuardedClient(
        allow_private=settings.ALLOW_PRIVATE_TARGETS, seconds=hooks.SECONDS, ssl_context=_trusted()
    )


class Deliverer:
    """Sends what is due, several at once. ``clients`` and ``now`` are for tests."""

    def __init__(
        self,
        *,
        worker: str,
        clients: Callable[[], network.GuardedClient] = new_client,
        now: Callable[[], dt.datetime] = timezone.now,
    ) -> None:
        self.worker = worker
        self.bell = asyncio.Event()
        self._clients, self._now = clients, now
        self._under_way: dict[asyncio.Task[None], Report] = {}

    async def run(self) -> None:
        """Until it is cancelled; then what was sent has a little time to be answered."""
        try:
            while True:
                self.bell.clear()
                try:
                    while await self.start_one():
                        pass
                except DatabaseError:
                    logger.exception("the reports that are due cannot be read; trying again")
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(LOOK_SECONDS):
                        await self.bell.wait()
                await asyncio.sleep(PAUSE_SECONDS)
        finally:
            await self._finish()

    async def start_one(self) -> bool:
        """Begin to send one report. False when none is due, or none may be begun now."""
        if len(self._under_way) >= CONCURRENCY:
            return False
        sites = Counter(report.site for report in self._under_way.values())
        owners = Counter(report.owner_id for report in self._under_way.values())
        claiming = asyncio.ensure_future(
            _db(
                hooks.claim,
                worker=self.worker,
                now=self._now(),
                sites=[site for site, count in sites.items() if count >= PER_SITE],
                owners=[owner for owner, count in owners.items() if count >= PER_OWNER],
            )
        )
        try:
            report = await asyncio.shield(claiming)
        except asyncio.CancelledError:
            # Stopped in the middle: nothing was sent of what was claimed.
            report = await claiming
            if report is not None:
                await _db(hooks.release, report=report, now=self._now())
            raise
        if report is None:
            return False
        sending = asyncio.create_task(self._deliver(report), name=report.id)
        self._under_way[sending] = report
        sending.add_done_callback(self._done)
        return True

    def _done(self, sending: asyncio.Task[None]) -> None:
        del self._under_way[sending]
        self.bell.set()

    async def _deliver(self, report: Report) -> None:
        outcome = await self._sent(report)
        try:
            if not outcome.error:
                kept = await _db(hooks.delivered, report=report, status=outcome.status, now=self._now())
            else:
                kept = await _db(hooks.refused, report=report, now=self._now(), **dataclasses.asdict(outcome))
            if not kept:
                logger.warning("report %s: its lease was lost, so it may be sent twice", report.id)
        except DatabaseError:
            # Its lease runs out by itself, and it is sent again under the same id.
            logger.exception("report %s was sent, and what came of it could not be written", report.id)

    async def _sent(self, report: Report) -> Outcome:
        try:
            async with self._clients() as client:
                return await send(report, client, now=self._now())
        except Exception as error:  # noqa: BLE001 (logged, and told: a report never hangs because of a fault of ours)
            # Without its text, which may quote the address.
            where = "".join(traceback.format_tb(error.__traceback__))
            logger.error("sending report %s broke with %s\n%s", report.id, type(error).__name__, where)
            return Outcome(error="Something went wrong inside Switchboard while sending.")

    async def _finish(self) -> None:
        if not self._under_way:
            return
        _, late = await asyncio.wait(self._under_way, timeout=STOP_SECONDS)
        left = [self._under_way[sending] for sending in late]
        for sending in late:
            sending.cancel()
        if late:
            await asyncio.wait(late)
        for report in left:
            await _db(hooks.release, report=report, now=self._now())

    def hear(self, envelope: Envelope) -> None:
        """A task has ended, or its report is to be sent again."""
        hook = envelope.data.get("hook")
        if envelope.data.get("hook_state") == HookState.PENDING or (
            envelope.name == "task.updated" and hook and hook["state"] == HookState.PENDING
        ):
            self.bell.set()


async def deliver_loop(*, worker: str) -> None:
    """Send what is due until cancelled. Reads the log by itself, so that it needs nothing of the worker but its name."""
    deliverer = Deliverer(worker=worker)
    both = {asyncio.create_task(deliverer.run()), asyncio.create_task(_listen(deliverer))}
    try:
        done, _ = await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            # Neither ends by itself: say why.
            task.result()
    finally:
        for task in both:
            task.cancel()
        await asyncio.wait(both)


async def _listen(deliverer: Deliverer) -> None:
    hub = hubs.current()
    while True:
        try:
            async with hub.subscribe(Interest(topics=frozenset({"tasks"}))) as subscription:
                async for item in follow(hub, subscription, after=None):
                    if isinstance(item, Events):
                        for envelope in item.batch:
                            deliverer.hear(envelope)
        except DatabaseError:
            # The looks by the clock go on meanwhile.
            logger.exception("the log cannot be read; trying again")
            await asyncio.sleep(1.0)
