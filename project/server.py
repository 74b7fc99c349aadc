"""Daphne that waits for slow readers and lets its streams end in order: ``python -m project.server``.

Daphne's ``send`` never waits: what a client does not read piles up in the transport (a client that read nothing made it hold all
of 256 MiB). Here a stream gets a ``Wire``, which takes bytes only while the transport is empty.
On SIGTERM Daphne cancels its applications at once; here the open streams are ended first.

Daphne also hands a request to its application only when the whole body is there, and holds all of it until then. Here a body over
``settings.MAX_BODY_BYTES`` is refused by the connection itself: from its declared length, or while its chunks arrive. And a request has
ARRIVAL_SECONDS to arrive, all of it together.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import functools
import json
import logging
import os
import socket
import struct
import sys
import termios
from collections.abc import Callable
from typing import Any, NoReturn

# isort: off
# Daphne's server comes first: it installs the reactor.
from daphne.server import Server as DaphneServer
from daphne.http_protocol import HTTPFactory, WebRequest

# isort: on
from django.conf import settings
from django.db import DatabaseError
from django.db import connection as database
from twisted.internet import defer, reactor
from twisted.internet.error import ConnectionLost
from twisted.internet.interfaces import IPushProducer
from twisted.internet.tcp import Server as TCPServer
from twisted.web.http import HTTPChannel
from zope.interface import implementer

# First: it sets Django up, and the rooms below need that.
from project.asgi import application

# isort: split
from events import clients, consumers, waker

logger = logging.getLogger(__name__)

#: Bytes that the kernel is asked to hold for a stream at most; it takes this twice, for its own accounts.
SEND_BUFFER = 1 << 16
#: How long a connection may take to flush its last frame after the application is done with it.
FLUSH_SECONDS = 5
#: How long a stopping server waits for requests that it has begun to answer.
FINISH_SECONDS = 5.0
#: How long a stopping server waits for the last frames to leave, after its streams have ended.
LAST_FLUSH_SECONDS = 1.0
#: How long a client whose body was refused may go on sending, unheard, before the connection is cut.
LINGER_SECONDS = 5
#: How long a request may take from its first byte to its last. Twisted's own patience of 60 s begins anew with every byte.
ARRIVAL_SECONDS = 60


class StreamTransport(TCPServer):
    """What a connection's transport is while it carries a stream: it is full as soon as anything waits in it.

    Twisted has one number for what it puts aside before it says so and for what it reads at a time. Nothing read would be taken for the
    end of the connection, so one byte too many from the client would end its stream.
    """

    bufferSize = 0  # noqa: N815 (Twisted's name)

    def doRead(self) -> Any:  # noqa: N802
        try:
            data = self.socket.recv(TCPServer.bufferSize)
        except OSError as error:
            return None if error.errno == errno.EWOULDBLOCK else ConnectionLost()
        return self._dataReceived(data)


@implementer(IPushProducer)
class Wire:
    """A stream's connection: written to at once, and closed for more while anything waits in the transport.

    Twisted's own ``write`` only puts bytes aside and has the reactor come back for them: three times the cost of the system call, for
    each stream and event. Here the bytes go to the socket in the caller's step, and only what it does not take goes to the transport. The
    transport tells when it is empty again (a push producer; see StreamTransport), so a reader that takes nothing costs at most what was
    written last.
    """

    __slots__ = ("_callback", "_channel", "_chunked", "_free", "_opened", "_send", "_socket")

    def __init__(self, request: Request) -> None:
        self._channel = request.channel
        self._channel.streaming = True
        self._chunked = False
        self._socket: socket.socket | None = None
        #: The socket's own method; None while nothing may be written with it.
        self._send: Callable[[bytes], int] | None = None
        self._free = True
        #: What waits until it is free, through the ordinary ``send``.
        self._opened: asyncio.Future[None] | None = None
        self._callback: Callable[[], None] | None = None
        transport = self._channel.transport
        if type(transport) is TCPServer and not getattr(transport, "TLS", False):
            # Its own class, and not its own attributes: those would cost every stream some hundred bytes.
            transport.__class__ = StreamTransport
            self._socket = transport.socket
            self._send = transport.socket.send
            # The kernel counts twice this. What it holds for a reader that takes nothing is memory, too.
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
            # An event is not held back until the one before it was acknowledged.
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    # ── For the stream (events.consumers.Wire) ──

    def write(self, data: bytes) -> bool:
        send = self._send
        if send is None:
            return False
        framed = _chunk(data) if self._chunked else data
        try:
            sent = send(framed)
        except (BlockingIOError, InterruptedError):
            sent = 0
        except OSError:
            # It is broken: the reactor finds out by its own write, and tells everybody.
            sent = 0
        if sent < len(framed):
            # This pauses us, in the same step.
            self._channel.transport.write(framed[sent:])
        return True

    def unsent(self) -> int:
        transport = self._channel.transport
        if transport is None or self._socket is None:
            return 0
        waiting = len(transport.dataBuffer) - transport.offset + transport._tempDataLen
        try:
            # Linux: what the other end has not acknowledged.
            return (
                waiting + struct.unpack("i", fcntl.ioctl(self._socket.fileno(), termios.TIOCOUTQ, b"    "))[0]
            )
        except OSError:
            return waiting

    def call_when_free(self, callback: Callable[[], None]) -> None:
        self._callback = callback

    # ── For the server ──

    def headers_sent(self, chunked: bool) -> None:
        self._chunked = chunked

    def release(self) -> None:
        """The stream is over; the connection may go on with other requests."""
        if self._socket is not None and self._channel.transport is not None:
            self._channel.transport.__class__ = TCPServer
        self._channel.streaming = False
        self._send = None

    @property
    def direct(self) -> bool:
        """Whether ``write`` works here: over plain TCP."""
        return self._socket is not None

    @property
    def free(self) -> bool:
        return self._free

    async def wait(self) -> None:
        while not self._free:
            if self._opened is None:
                self._opened = asyncio.get_running_loop().create_future()
            await asyncio.shield(self._opened)

    # ── For Twisted ──

    def pauseProducing(self) -> None:  # noqa: N802 (Twisted's name)
        self._free = False
        self._send = None

    def resumeProducing(self) -> None:  # noqa: N802
        self._free = True
        self._send = None if self._socket is None else self._socket.send
        opened, self._opened = self._opened, None
        if opened is not None and not opened.done():
            opened.set_result(None)
        if self._callback is not None:
            self._callback()

    def stopProducing(self) -> None:  # noqa: N802
        # The connection is gone. Whoever waits goes on, and hears http.disconnect next.
        self._socket = None
        self.resumeProducing()


@functools.lru_cache(maxsize=4)
def _chunk(data: bytes) -> bytes:
    """Chunked transfer coding (RFC 9112, section 7.1). Remembered, for the same bytes go to a thousand streams."""
    return b"%x\r\n%b\r\n" % (len(data), data)


class Channel(HTTPChannel):
    """A connection that can refuse what it is about to read, or is reading, and that does not wait for ever for the rest."""

    # Twisted's own types name interfaces that say less than what is there.
    transport: Any
    _networkProducer: Any  # noqa: N815
    _handlingRequest: bool  # noqa: N815

    #: A stream is on it. What the client says meanwhile could be answered in an hour: it is thrown away, and with it the connection when
    #: the stream is over. Twisted would keep it, and without a limit while the client reads nothing.
    streaming = False
    _refused = False
    #: Ends the patience with the request that is arriving.
    _patience: Any = None

    def refuse(self, answer: bytes) -> None:
        """Send the answer and hear nothing more of this client.

        A socket that is closed while bytes arrive resets the connection, and the client may lose the answer it was sent. So only
        the own side is closed, and what still arrives is thrown away until the client closes too, or its time is over.
        """
        self._refused = True
        self.persistent = False
        self.arrived()
        self.setTimeout(None)
        # connectionLost cancels it.
        self._abortingCall = self.callLater(LINGER_SECONDS, self.forceAbortClient)
        # Answers to earlier requests that were not read yet may have paused the reading, and would hold the end back.
        self._networkProducer.unregisterProducer()
        self._networkProducer.resumeProducing()
        self.transport.write(answer)
        self.transport.loseWriteConnection()

    def arrived(self) -> None:
        """The request that was arriving is there, or nobody waits for it any more."""
        patience, self._patience = self._patience, None
        if patience is not None:
            patience.cancel()

    def dataReceived(self, data: bytes) -> None:  # noqa: N802 (Twisted's name)
        if self.streaming:
            self.persistent = False
        elif not self._refused:
            if self._patience is None and not self._handlingRequest:
                self._patience = self.callLater(ARRIVAL_SECONDS, self._out_of_patience)
            super().dataReceived(data)

    def _out_of_patience(self) -> None:
        self._patience = None
        self.timeoutConnection()

    def connectionLost(self, reason: Any = None) -> None:  # noqa: N802
        self.arrived()
        super().connectionLost(reason)

    def lineLengthExceeded(self, line: bytes) -> None:  # noqa: N802
        # Twisted closes without a word, and clients take that for a fault that passes.
        self.refuse(
            _answer(
                "431 Request Header Fields Too Large",
                "headers_too_large",
                f"A line of a request can have at most {self.MAX_LENGTH} bytes.",
            )
        )

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
        # No WebSockets here. A server may overlook what it is offered (RFC 9110, section 7.8): the answer is that to a plain request.
        self.requestHeaders.removeHeader(b"Upgrade")
        if not self._refused:
            self.channel.arrived()
            super().requestReceived(command, path, version)

    def _refuse(self) -> None:
        self._refused = True
        self.content.close()
        # As project.middleware.body_limit says it; under Daphne nothing of Django runs before the body is complete.
        message = f"A body can have at most {settings.MAX_BODY_BYTES} bytes."
        self.channel.refuse(_answer("413 Request Entity Too Large", "payload_too_large", message))


class Factory(HTTPFactory):
    """Makes the connections above. They speak plain HTTP/1.1: Twisted's own would also look for HTTP/2, which needs TLS."""

    protocol = Channel

    def buildProtocol(self, addr: Any) -> Any:  # noqa: N802
        channel = super().buildProtocol(addr)
        channel.requestFactory = Request
        return channel


def _answer(status: str, code: str, message: str) -> bytes:
    """A whole answer with the contract's error body, the last one on its connection."""
    body = json.dumps({"code": code, "message": message}).encode()
    head = (
        f"HTTP/1.1 {status}\r\n"
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

    def create_application(self, protocol: Any, scope: dict[str, Any]) -> Any:
        scope["extensions"] = {consumers.WIRE: functools.partial(self._wire_of, protocol)}
        return super().create_application(protocol, scope)

    def _wire_of(self, protocol: Any) -> Wire | None:
        wire: Wire | None = self.connections.get(protocol, {}).get("wire")
        return wire if wire is not None and wire.direct else None

    async def handle_reply(self, protocol: Any, message: dict[str, Any]) -> None:
        details = self.connections.get(protocol)
        wire: Wire | None = details.get("wire") if details else None
        is_body = message["type"] == "http.response.body"
        if wire is not None and is_body and not message.get("more_body"):
            self._before_last_frame(protocol.channel, wire)
            protocol.producer = None
        await super().handle_reply(protocol, message)
        if details is None:
            return
        if message["type"] == "http.response.start" and _is_stream(message) and protocol.channel is not None:
            details["wire"] = wire = Wire(protocol)
            protocol.registerProducer(wire, True)
        elif wire is not None:
            if is_body:
                wire.headers_sent(bool(getattr(protocol, "chunked", False)))
            if not wire.free and not wire.direct:
                await wire.wait()

    def _before_last_frame(self, channel: Any, wire: Wire) -> None:
        if channel is None:
            # The client was quicker.
            return
        channel.unregisterProducer()
        wire.release()
        stopping = consumers.streams().draining.is_set()
        if not wire.free or stopping:
            # The connection takes no other request: it is closed once its bytes have left.
            channel.persistent = False
        if not wire.free:
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
        await asyncio.gather(consumers.streams().drain(), self._finish_requests())
        # The reactor's own end throws away what a transport still holds.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LAST_FLUSH_SECONDS):
                while any(transport.connected for transport in self._closing):
                    await asyncio.sleep(0.01)

    async def _finish_requests(self) -> None:
        """Requests that are no streams are under way for a moment: what was accepted is answered."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FINISH_SECONDS):
                while any(
                    "wire" not in details and not details["application_instance"].done()
                    for details in self.connections.values()
                    if "application_instance" in details and "disconnected" not in details
                ):
                    await asyncio.sleep(0.02)

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
    try:
        # Nobody shall look alive who was connected to the process before (row B41).
        clients.recover()
    except DatabaseError:
        logger.exception("the clients of the process before could not be looked after; their leases run out")
    finally:
        database.close()
    server = Server(
        application=application,
        endpoints=[endpoint(knobs.host, knobs.port)],
        server_name="switchboard",
        ready_callable=lambda: print(f"listening on http://{knobs.host}:{knobs.port}", flush=True),
    )
    server.run()
    return 1 if server.abort_start else 0


def leave(code: int) -> NoReturn:
    """End the process now. Python would wait for threads that hang in a database that does not answer."""
    waker.flush()
    logging.shutdown()
    sys.stdout.flush()
    os._exit(code)


if __name__ == "__main__":
    leave(main())
