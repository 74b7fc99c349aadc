"""HTTP to addresses that somebody else names: guarded, pinned, bounded.

Whoever may give us a URL may try to make us talk to our own network (server-side request forgery). So every
name is resolved here, every address it resolves to is checked, and the connection goes to exactly the address
that was checked, while ``Host``, SNI and the certificate keep the name: a name that resolves differently a
moment later (DNS rebinding) gains nothing. Redirects are followed hop by hop by :meth:`GuardedClient.fetch`,
so each hop passes the same gate. Proxies of the environment are ignored, bodies are counted after
decompression, and one deadline covers a fetch with all its redirects.

Knows nothing about logins; web hooks use it too.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import ipaddress
import logging
import re
import socket
import ssl
import typing
import zlib
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol, Self

import httpcore
import httpx

Resolver = Callable[[str, int], Awaitable[Sequence[str]]]
IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

#: A name with more addresses than this is tried on the first ones only.
_ADDRESSES_TRIED = 4
#: What is taken of a body that nobody wants.
_DROPPED_BYTES, _DROPPED_SECONDS = 64 * 1024, 1.0
_REDIRECTS = frozenset({301, 302, 303, 307, 308})

#: Not public, although ``ipaddress`` of some Python versions says so, or public but never a web site:
#: RFC 6890 (192.0.0.0/24), RFC 7526 (192.88.99.0/24), RFC 8215 (64:ff9b:1::/48), RFC 4291 (IPv4-compatible),
#: RFC 9637 (3fff::/20, documentation),
#: and the metadata service of Azure, which lives on a public address.
_NEVER = tuple(
    ipaddress.ip_network(block)
    for block in (
        "192.0.0.0/24",
        "192.88.99.0/24",
        "168.63.129.16/32",
        "64:ff9b:1::/48",
        "::/96",
        "3fff::/20",
    )
)
#: Metadata services hand out the credentials of the machine: never, not even where private addresses are
#: allowed.
_METADATA = frozenset(
    ipaddress.ip_address(text)
    for text in ("169.254.169.254", "169.254.170.2", "100.100.100.200", "168.63.129.16", "fd00:ec2::254")
)
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_ENDS_IN_NUMBER = re.compile(r"(^|\.)(\d+|0x[0-9a-f]*)\.?$", re.IGNORECASE)


class NetworkFault(Exception):
    """The answer could not be had. The text is fit to be shown: it names a host, never a path or a query."""


class AddressRefused(NetworkFault):
    """The URL leads to an address, a host or a scheme that is not allowed."""


class ConnectionRefused(NetworkFault):
    """Nothing listens on that port."""


class TooManyRedirects(NetworkFault):
    """More hops than allowed."""


class BodyTooLarge(NetworkFault):
    """The body, decompressed, is longer than allowed."""


class TimedOut(NetworkFault):
    """The deadline passed."""


def is_public(address: IPAddress) -> bool:
    """Whether ``address`` is one that any host on the internet could be reached at.

    IPv4 embedded in IPv6 (mapped, 6to4, NAT64) is judged as the IPv4 address that the packets end up at.
    """
    embedded = _embedded(address)
    if embedded is not None:
        return is_public(embedded)
    if isinstance(address, ipaddress.IPv6Address) and address.is_site_local:
        return False
    # is_global alone is not enough: it holds for multicast.
    return (
        address.is_global
        and not address.is_multicast
        and not address.is_reserved
        and not any(address in network for network in _NEVER if network.version == address.version)
    )


def _embedded(address: IPAddress) -> ipaddress.IPv4Address | None:
    """The IPv4 address inside an IPv6 one (RFC 4291 2.5.5.2, RFC 3056, RFC 6052); None when there is none."""
    if isinstance(address, ipaddress.IPv4Address):
        return None
    if address in _NAT64:
        return ipaddress.IPv4Address(address.packed[-4:])
    return address.ipv4_mapped or address.sixtofour


async def resolve(host: str, port: int) -> Sequence[str]:
    """The addresses of ``host`` as the system resolves it. Raises OSError."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


class AddressBook:
    """Names to checked addresses. A name is resolved once in the life of the book: that is the pin."""

    def __init__(self, *, allow_private: bool, resolver: Resolver) -> None:
        self._allow_private = allow_private
        self._resolver = resolver
        self._pinned: dict[tuple[str, int], tuple[IPAddress, ...]] = {}

    async def look_up(self, host: str, port: int) -> tuple[IPAddress, ...]:
        """The addresses to connect to, best first. Raises AddressRefused, NetworkFault."""
        key = (host.lower().rstrip("."), port)
        if key not in self._pinned:
            self._pinned[key] = await self._resolve(*key)
        return self._pinned[key]

    async def _resolve(self, host: str, port: int) -> tuple[IPAddress, ...]:
        literal = _literal(host)
        if literal is not None:
            addresses: tuple[IPAddress, ...] = (literal,)
        else:
            try:
                answers = await self._resolver(host, port)
                addresses = tuple(ipaddress.ip_address(answer) for answer in answers)
            except (OSError, UnicodeError, ValueError):
                raise NetworkFault(f"The name {host} could not be resolved.") from None
        if not addresses:
            raise NetworkFault(f"The name {host} has no address.")
        if any((_embedded(address) or address) in _METADATA for address in addresses):
            raise AddressRefused(f"{host} is the address of a metadata service, which is never allowed.")
        # All of them: a name with one public and one private address is an attack, or soon a mistake.
        if not self._allow_private and not all(is_public(address) for address in addresses):
            raise AddressRefused(f"{host} is on a private or reserved address, which is not allowed here.")
        return addresses[:_ADDRESSES_TRIED]


def _literal(host: str) -> IPAddress | None:
    """``host`` as an address; None when it is a name.

    Numbers that the C library would read as an address, but that are not written as one (2130706433, 0x7f.1,
    0177.0.0.1), are refused: no honest site is linked that way.
    """
    try:
        return ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        if _ENDS_IN_NUMBER.search(host):
            raise AddressRefused(f"{host} is not a valid host.") from None
        return None


class _PinnedBackend(httpcore.AsyncNetworkBackend):
    """Opens connections to checked addresses only. TLS above it still sees the name."""

    def __init__(self, book: AddressBook, inner: httpcore.AsyncNetworkBackend) -> None:
        self._book = book
        self._inner = inner

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        addresses = await self._book.look_up(host, port)
        for address in addresses[:-1]:
            try:
                return await self._inner.connect_tcp(
                    str(address),
                    port,
                    timeout=timeout,
                    local_address=local_address,
                    socket_options=socket_options,
                )
            except (httpcore.ConnectError, httpcore.ConnectTimeout):
                continue  # the next address of the same name, as browsers do
        return await self._inner.connect_tcp(
            str(addresses[-1]),
            port,
            timeout=timeout,
            local_address=local_address,
            socket_options=socket_options,
        )

    async def connect_unix_socket(
        self, path: str, timeout: float | None = None, socket_options: Iterable[Any] | None = None
    ) -> httpcore.AsyncNetworkStream:
        raise AddressRefused("Unix sockets are not allowed here.")

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Request:
    """One request. Its URL and body may hold secrets, so it is never printed.

    ``status_only``: the answer counts as soon as its headers are there. Its body is taken off the line as far as it comes at once, and
    dropped: that it is long, slow or broken changes nothing.
    """

    url: httpx.URL
    method: str = "GET"
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    body: bytes = b""
    status_only: bool = False

    def __repr__(self) -> str:
        return f"Request({self.method} {self.url.host})"


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Reply:
    """One answer, read to its end. ``body`` is decompressed; ``url`` is where it came from."""

    url: httpx.URL
    method: str
    status: int
    headers: httpx.Headers
    body: bytes

    def __repr__(self) -> str:
        return f"Reply({self.status} from {self.url.host}, {len(self.body)} bytes)"


class Hops(Protocol):
    """Looks at every hop of a fetch: adds cookies, takes cookies, or refuses by raising."""

    def outgoing(self, request: Request) -> Request:
        """The request as it is to be sent."""
        ...

    def incoming(self, reply: Reply) -> None:
        """Told of every answer, redirects included."""
        ...


class GuardedClient:
    """An HTTP client for URLs that are not ours. Use as an async context manager.

    ``seconds`` bounds one fetch with all its redirects, ``max_bytes`` one decompressed body. ``resolver`` and
    ``backend`` are for tests. Names stay pinned to the addresses first seen for the life of the client, so
    use one client per login or delivery, not one per process.
    """

    def __init__(
        self,
        *,
        allow_private: bool = False,
        max_bytes: int = 2_000_000,
        seconds: float = 20.0,
        user_agent: str = "Mozilla/5.0 (compatible; Switchboard/1.0)",
        resolver: Resolver = resolve,
        backend: httpcore.AsyncNetworkBackend | None = None,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        # httpcore logs whole response headers at DEBUG, and they hold session cookies. httpx would log URLs
        # at INFO; its client is not used here, only its requests and responses.
        logging.getLogger("httpcore").setLevel(logging.WARNING)
        self.addresses = AddressBook(allow_private=allow_private, resolver=resolver)
        self._max_bytes = max_bytes
        self._seconds = seconds
        self._user_agent = user_agent
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=ssl_context or httpx.create_ssl_context(trust_env=False),
            max_connections=4,
            # No reuse: a kept connection that the site closes at the wrong moment would cost a login.
            max_keepalive_connections=0,
            network_backend=_PinnedBackend(self.addresses, backend or httpcore.AnyIOBackend()),
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._pool.aclose()

    async def fetch(self, request: Request, *, redirects: int = 0, hops: Hops | None = None) -> Reply:
        """Send ``request`` and follow up to ``redirects`` redirects. Raises NetworkFault and its kinds.

        With ``redirects=0`` a redirect is returned as any other answer.
        """
        left = redirects
        try:
            async with asyncio.timeout(self._seconds):
                while True:
                    if hops is not None:
                        request = hops.outgoing(request)
                    reply = await self._send(request)
                    if hops is not None:
                        hops.incoming(reply)
                    following = next_hop(request, reply) if redirects else None
                    if following is None:
                        return reply
                    if not left:
                        raise TooManyRedirects(f"{request.url.host} redirects more than {redirects} times.")
                    left -= 1
                    request = following
        except TimeoutError:
            raise TimedOut(f"{request.url.host} did not answer within {self._seconds:g} seconds.") from None

    async def _send(self, request: Request) -> Reply:
        url = request.url
        if url.scheme not in ("http", "https") or not url.host:
            raise AddressRefused(
                f"Only http and https are allowed, not {url.scheme[:20] or 'an empty scheme'}."
            )
        # Causes are cut off below (from None): h11 quotes header values in its errors, cookies among them.
        try:
            async with self._pool.stream(
                request.method,
                httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path),
                headers=self._headers(request),
                content=request.body,
                extensions={"timeout": {"connect": self._seconds / 2, "read": self._seconds}},
            ) as response:
                headers = httpx.Headers(response.headers, encoding="latin-1")
                if request.status_only:
                    body = await self._drop(response)
                else:
                    body = await self._read(response, headers, url.host)
                return Reply(
                    url=url, method=request.method, status=response.status, headers=headers, body=body
                )
        except httpcore.ConnectError as error:
            if _has_cause(error, ConnectionRefusedError):
                raise ConnectionRefused(f"{url.host} refused the connection.") from None
            if _has_cause(error, ssl.SSLError):
                raise NetworkFault(
                    f"No secure connection to {url.host}: its certificate or TLS is not valid."
                ) from None
            raise NetworkFault(f"{url.host} could not be reached.") from None
        except httpcore.TimeoutException:
            raise TimedOut(f"{url.host} did not answer in time.") from None
        except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.UnsupportedProtocol) as error:
            raise NetworkFault(f"The connection to {url.host} broke ({type(error).__name__}).") from None

    def _headers(self, request: Request) -> list[tuple[bytes, bytes]]:
        headers = {
            "Host": request.url.netloc.decode("ascii"),
            "User-Agent": self._user_agent,
            "Accept-Encoding": "gzip, deflate",
            **request.headers,
        }
        if request.body or request.method not in ("GET", "HEAD"):
            headers["Content-Length"] = str(len(request.body))
        # Latin-1 is how received headers are read below, so cookies go back byte for byte.
        return [(name.encode("ascii"), value.encode("latin-1", "replace")) for name, value in headers.items()]

    async def _drop(self, response: httpcore.Response) -> bytes:
        """Nothing. Who sends a short body sees it taken, and not a connection that breaks."""
        left = _DROPPED_BYTES
        with contextlib.suppress(
            TimeoutError, httpcore.TimeoutException, httpcore.NetworkError, httpcore.ProtocolError
        ):
            async with asyncio.timeout(_DROPPED_SECONDS):
                async for chunk in typing.cast("typing.AsyncIterable[bytes]", response.stream):
                    left -= len(chunk)
                    if left <= 0:
                        break
        return b""

    async def _read(self, response: httpcore.Response, headers: httpx.Headers, host: str) -> bytes:
        """The decompressed body. Each piece is inflated only as far as the limit allows: no bomb goes off."""
        inflate = _inflater(headers.get("content-encoding", ""), host)
        body = bytearray()
        async for chunk in typing.cast("typing.AsyncIterable[bytes]", response.stream):
            try:
                body += inflate(chunk, self._max_bytes + 1 - len(body))
            except zlib.error:
                raise NetworkFault(f"{host} sent a body that cannot be decompressed.") from None
            if len(body) > self._max_bytes:
                raise BodyTooLarge(f"{host} sent more than {self._max_bytes:,} bytes.")
        return bytes(body)


def next_hop(request: Request, reply: Reply) -> Request | None:
    """The request that a redirect asks for (Fetch standard, "HTTP-redirect fetch"); None when it is none."""
    location = reply.headers.get("location")
    if reply.status not in _REDIRECTS or not location:
        return None
    try:
        url = request.url.join(location)
    except httpx.InvalidURL:
        raise NetworkFault(f"{request.url.host} redirects to an address that is not valid.") from None
    keep = reply.status in (307, 308) or request.method in ("GET", "HEAD")
    if keep:
        return dataclasses.replace(request, url=url)
    headers = {
        name: value
        for name, value in request.headers.items()
        if name.lower() not in ("content-type", "origin")
    }
    return Request(url=url, method="GET", headers=headers)


def _inflater(encoding: str, host: str) -> Callable[[bytes, int], bytes]:
    if encoding.strip().lower() in ("", "identity"):
        return lambda chunk, room: chunk
    if encoding.strip().lower() not in ("gzip", "x-gzip", "deflate"):
        raise NetworkFault(f"{host} sent a body in an encoding that was not asked for.")
    # 32 + 15: zlib finds out by itself whether the header is gzip's or zlib's.
    stream = zlib.decompressobj(wbits=47)
    return lambda chunk, room: stream.decompress(chunk, room)


def _has_cause(error: BaseException, kind: type[BaseException]) -> bool:
    """Whether an error of ``kind`` is somewhere among the causes: anyio wraps the errors of all addresses."""
    waiting: list[BaseException | None] = [error]
    seen: set[int] = set()
    while waiting:
        cause = waiting.pop()
        if cause is None or id(cause) in seen:
            continue
        seen.add(id(cause))
        if isinstance(cause, kind):
            return True
        if isinstance(cause, BaseExceptionGroup):
            waiting.extend(cause.exceptions)
        waiting += [cause.__cause__, cause.__context__]
    return False
