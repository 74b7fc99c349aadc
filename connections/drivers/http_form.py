"""The login driver for server-rendered sites: no browser, but HTTP, forms and cookies as a browser handles them.

Where values may be entered is in ``places.py``, what must never be shown in ``redaction.py``, the small browser in
``browsing.py``, what is known without asking in ``known.py``, and the walk from page to page, which
:class:`HttpFormDriver` starts, in ``walk.py``. Nothing here logs, and no exception carries a typed value.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Awaitable, Callable

import httpcore

from connections.drivers import network
from connections.drivers.base import (
    Answer,
    DriverFailed,
    ExternalAction,
    Person,
    Question,
    Success,
    Target,
)
from connections.drivers.browsing import Browser
from connections.drivers.storage_state import CookieJar
from connections.drivers.walk import Walk


class HttpFormDriver:
    """Logs in to server-rendered sites over HTTP (see :class:`connections.drivers.base.Driver`).

    ``clock`` gives seconds since 1970 (cookies, one-time codes) and ``sleep`` waits; both, the resolver, the
    backend and the TLS context are for tests.
    """

    def __init__(
        self,
        *,
        resolver: network.Resolver = network.resolve,
        backend: httpcore.AsyncNetworkBackend | None = None,
        ssl_context: ssl.SSLContext | None = None,
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._resolver, self._backend, self._ssl_context = resolver, backend, ssl_context
        self._clock, self._sleep = clock, sleep

    async def login(self, target: Target, person: Person) -> Success:
        """Log in to ``target``, asking ``person`` whatever is not stored. Raises DriverFailed."""
        try:
            async with self._client(target) as client:
                return await self._walk(target, person, client).run()
        except network.TooManyRedirects as fault:
            raise DriverFailed("stuck_in_loop", str(fault)) from None
        except network.AddressRefused as fault:
            raise DriverFailed("domain_not_allowed", str(fault)) from None
        except network.NetworkFault as fault:
            raise DriverFailed("network_error", str(fault)) from None

    async def check(self, target: Target) -> bool | None:
        """Whether the session of ``target.storage_state`` still holds; None when that cannot be told."""
        if not len(CookieJar.from_state(target.storage_state, now=self._clock)):
            return False
        try:
            async with self._client(target) as client:
                return await self._walk(target, _NOBODY, client).check()
        except (network.NetworkFault, DriverFailed):
            # Trouble on the way says nothing about the session: "cannot be told" is the answer, not an error.
            return None

    def _client(self, target: Target) -> network.GuardedClient:
        return network.GuardedClient(
            allow_private=target.allow_private,
            max_bytes=target.limits.page_bytes,
            seconds=target.limits.request_seconds,
            resolver=self._resolver,
            backend=self._backend,
            ssl_context=self._ssl_context,
        )

    def _walk(self, target: Target, person: Person, client: network.GuardedClient) -> Walk:
        browser = Browser(target, client, self._clock)
        return Walk(target, person, browser, client.addresses, self._clock, self._sleep)


class _Nobody:
    """The person of a health check: there is nobody to ask."""

    async def discovering(self) -> None:
        raise AssertionError("a check asks nobody")

    submitting_stored = discovering

    async def ask(self, question: Question) -> Answer:
        raise AssertionError("a check asks nobody")

    async def external_action(self, action: ExternalAction) -> None:
        raise AssertionError("a check asks nobody")

    async def answer_within(self, seconds: float) -> Answer | None:
        raise AssertionError("a check asks nobody")


_NOBODY = _Nobody()
