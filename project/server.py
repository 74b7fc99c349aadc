"""Daphne that waits for slow readers and lets its streams end in order: ``python -m project.server``.

Daphne's ``send`` never waits: what a client does not read piles up in the transport (a client that read nothing made it hold all
of 256 MiB). Here a stream registers itself as a push producer with its connection, and ``send`` waits while the transport is full.
On SIGTERM Daphne cancels its applications at once; here the open streams are ended first.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
from typing import Any

from daphne.server import Server as DaphneServer
from django.conf import settings
from twisted.internet import defer, reactor
from twisted.internet.interfaces import IPushProducer
from zope.interface import implementer

# First: it sets Django up, and the rooms below need that.
from project.asgi import application

# isort: split
from events import consumers

logger = logging.getLogger(__name__)

#: How long a connection may take to flush its last frame after the application is done with it.
FLUSH_SECONDS = 5
#: How long a stopping server waits for the last frames to leave, after its streams have ended.
LAST_FLUSH_SECONDS = 1.0


@implementer(IPushProducer)
class Gate:
    """Open while the transport takes bytes, closed while its buffer is full."""

    def __init__(self) -> None:
        self._open = asyncio.Event()
        self._open.set()

    def pauseProducing(self) -> None:  # noqa: N802 (Twisted's name)
        self._open.clear()

    def resumeProducing(self) -> None:  # noqa: N802
        self._open.set()

    def stopProducing(self) -> None:  # noqa: N802
        # The connection is gone. Whoever waits goes on, and hears http.disconnect next.
        self._open.set()

    @property
    def closed(self) -> bool:
        return not self._open.is_set()

    async def wait(self) -> None:
        await self._open.wait()


class Server(DaphneServer):
    """Daphne's server with back-pressure for event streams, and an orderly end."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        #: Transports of streams that ended because the server stops.
        self._closing: set[Any] = set()

    async def handle_reply(self, protocol: Any, message: dict[str, Any]) -> None:
        details = self.connections.get(protocol)
        gate: Gate | None = details.get("gate") if details else None
        if gate is not None and message["type"] == "http.response.body" and not message.get("more_body"):
            self._before_last_frame(protocol.channel, gate)
            protocol.producer = None
        await super().handle_reply(protocol, message)
        if details is None:
            return
        if message["type"] == "http.response.start" and _is_stream(message) and protocol.channel is not None:
            details["gate"] = Gate()
            protocol.registerProducer(details["gate"], True)
        elif gate is not None and gate.closed:
            await gate.wait()

    def _before_last_frame(self, channel: Any, gate: Gate) -> None:
        if channel is None:
            # The client was quicker.
            return
        channel.unregisterProducer()
        stopping = consumers.streams().draining.is_set()
        if gate.closed or stopping:
            # The connection takes no other request: it is closed once its bytes have left.
            channel.persistent = False
        if gate.closed:
            # It does not read, so its last frame may never get out: do not keep it for ever.
            reactor.callLater(FLUSH_SECONDS, channel.transport.abortConnection)  # type: ignore[arg-type]
        if stopping:
            self._closing.add(channel.transport)

    def kill_all_applications(self) -> Any:
        """Let the streams end first; what is left after that is cancelled, as Daphne does."""
        drained = defer.Deferred.fromFuture(asyncio.ensure_future(self._drain()))
        drained.addErrback(lambda failure: logger.error("draining failed: %s", failure))
        return drained.addCallback(lambda _: self._kill_the_rest())

    async def _drain(self) -> None:
        await consumers.streams().drain()
        # The reactor's own end throws away what a transport still holds.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LAST_FLUSH_SECONDS):
                while any(transport.connected for transport in self._closing):
                    await asyncio.sleep(0.01)

    def _kill_the_rest(self) -> Any:
        for protocol, details in list(self.connections.items()):
            if "application_instance" not in details:
                del self.connections[protocol]
        return super().kill_all_applications()


def _is_stream(message: dict[str, Any]) -> bool:
    return any(
        name.lower() == b"content-type" and value.startswith(b"text/event-stream")
        for name, value in message.get("headers", [])
    )


def endpoint(host: str, port: int) -> str:
    """Twisted's description of where to listen. The backlog is raised: after a restart everybody comes back at once."""
    interface = host.replace(":", r"\:")
    return f"tcp:port={port}:interface={interface}:backlog=1024"


def main() -> int:
    knobs = settings.KNOBS
    server = Server(
        application=application,
        endpoints=[endpoint(knobs.host, knobs.port)],
        server_name="switchboard",
        ready_callable=lambda: print(f"listening on http://{knobs.host}:{knobs.port}", flush=True),
    )
    server.run()
    return 1 if server.abort_start else 0


if __name__ == "__main__":
    sys.exit(main())
