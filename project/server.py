"""Daphne that waits for slow readers and lets its streams end in order: ``python -m project.server``.

Daphne's ``send`` never waits: what a client does not read piles up in the transport (a client that read nothing made it hold all
of 256 MiB). Here a stream registers itself as a push producer with its connection, and ``send`` waits while the transport is full.
On SIGTERM Daphne cancels its applications at once; here the open streams are ended first.

Daphne also hands a request to its application only when the whole body is there, and holds all of it until then. Here a body over
``settings.MAX_BODY_BYTES`` is refused by the connection itself: from its declared length, or while its chunks arrive.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import sys
from typing import Any

# isort: off
# Daphne's server comes first: it installs the reactor.
from daphne.server import Server as DaphneServer
from daphne.http_protocol import HTTPFactory, WebRequest

# isort: on
from django.conf import settings
from twisted.internet import defer, reactor
from twisted.internet.interfaces import IPushProducer
from twisted.web.http import HTTPChannel
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
#: How long a client whose body was refused may go on sending, unheard, before the connection is cut.
LINGER_SECONDS = 5


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


class Channel(HTTPChannel):
    """A connection that can refuse the body it is about to read, or is reading."""

    # Twisted's own types name interfaces that say less than what is there.
    transport: Any
    _networkProducer: Any  # noqa: N815

    _refused = False

    def refuse(self) -> None:
        """Answer 413 and hear nothing more of this client.

        A socket that is closed while bytes arrive resets the connection, and the client may lose the answer it was sent. So only
        the own side is closed, and what still arrives is thrown away until the client closes too, or its time is over.
        """
        self._refused = True
        self.persistent = False
        self.setTimeout(None)
        # connectionLost cancels it.
        self._abortingCall = self.callLater(LINGER_SECONDS, self.forceAbortClient)
        # Answers to earlier requests that were not read yet may have paused the reading, and would hold the end back.
        self._networkProducer.unregisterProducer()
        self._networkProducer.resumeProducing()
        self.transport.write(_too_large())
        self.transport.loseWriteConnection()

    def dataReceived(self, data: bytes) -> None:  # noqa: N802 (Twisted's name)
        if not self._refused:
            super().dataReceived(data)

    def rawDataReceived(self, data: bytes) -> None:  # noqa: N802
        if not self._refused:
            super().rawDataReceived(data)

    def _respondToBadRequestAndDisconnect(self) -> None:  # noqa: N802
        # The rest of what was just read may still be decoded. It is answered already.
        if not self._refused:
            super()._respondToBadRequestAndDisconnect()


class Request(WebRequest):
    """A request with a body of at most ``settings.MAX_BODY_BYTES``. The channel calls these methods, in this order.

    Its channel takes up pipelined requests one after the other, so whatever is refused is the next to be answered.
    """

    _received = 0
    _refused = False

    def gotLength(self, length: int | None) -> None:  # noqa: N802
        if length is None or length <= settings.MAX_BODY_BYTES:
            super().gotLength(length)
            return
        super().gotLength(0)
        # Or the channel says "100 Continue" next.
        self.requestHeaders.removeHeader(b"Expect")
        self._refuse()

    def handleContentChunk(self, data: bytes) -> None:  # noqa: N802
        if self._refused:
            return
        self._received += len(data)
        if self._received <= settings.MAX_BODY_BYTES:
            super().handleContentChunk(data)
            return
        self._refuse()

    def requestReceived(self, command: bytes, path: bytes, version: bytes) -> None:  # noqa: N802
        if not self._refused:
            super().requestReceived(command, path, version)

    def _refuse(self) -> None:
        self._refused = True
        self.content.close()
        self.channel.refuse()


class Factory(HTTPFactory):
    """Makes the connections above. They speak plain HTTP/1.1: Twisted's own would also look for HTTP/2, which needs TLS."""

    protocol = Channel

    def buildProtocol(self, addr: Any) -> Any:  # noqa: N802
        channel = super().buildProtocol(addr)
        channel.requestFactory = Request
        return channel


def _too_large() -> bytes:
    """As ``project.middleware.body_limit`` says it; under Daphne nothing of Django runs before the body is complete."""
    message = f"A body can have at most {settings.MAX_BODY_BYTES} bytes."
    body = json.dumps({"code": "payload_too_large", "message": message}).encode()
    head = (
        "HTTP/1.1 413 Request Entity Too Large\r\n"
        "Content-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n"
        "X-Content-Type-Options: nosniff\r\n"
        "Connection: close\r\n\r\n"
    )
    return head.encode() + body


class Server(DaphneServer):
    """Daphne's server with back-pressure for event streams, a limit for bodies, and an orderly end."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        #: Transports of streams that ended because the server stops.
        self._closing: set[Any] = set()

    # Daphne's run() does everything from making its factory to running the reactor, and has no hook. It keeps the factory in this
    # attribute and listens with what it finds there, so the attribute is where another one gets in: nothing is copied from run(),
    # and nothing in Daphne's modules is replaced for other servers of the process.
    @property
    def http_factory(self) -> Factory:
        return self._http_factory

    @http_factory.setter
    def http_factory(self, _: HTTPFactory) -> None:
        self._http_factory = Factory(self)

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
