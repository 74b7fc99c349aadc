"""The guarded HTTP client: which addresses it talks to, and how much it takes in."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import gzip
import ipaddress
import logging
import ssl
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import httpcore
import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from connections.drivers import network
from tests.sites import Site

PUBLIC = "93.184.216.34"
INWARD = (
    "127.0.0.1", "127.1.2.3", "10.0.0.1", "172.16.5.4", "192.168.1.1", "169.254.169.254", "100.64.0.1",
    "0.0.0.0",
    "192.0.0.192", "192.88.99.1", "224.0.0.1", "240.0.0.1", "255.255.255.255", "168.63.129.16", "198.18.0.1",
    "::1", "::", "fe80::1", "fc00::1", "fd00:ec2::254", "fec0::1", "ff02::1", "2001:db8::1", "3fff::1",
    "::ffff:127.0.0.1",
    "::ffff:169.254.169.254", "::127.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::1",
    "2002:7f00:1::1",
    "2002:a00:1::",
)  # fmt: skip
OUTWARD = ("93.184.216.34", "8.8.8.8", "2606:4700:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808")


class Names:
    """A resolver that answers each time with the next of the addresses given for a name."""

    def __init__(self, **answers: Sequence[str | Sequence[str]]) -> None:
        self.answers = {name.replace("_", "."): list(given) for name, given in answers.items()}
        self.asked: list[str] = []

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        self.asked.append(host)
        if host not in self.answers:
            raise OSError("no such name")
        given = self.answers[host]
        answer = given.pop(0) if len(given) > 1 else given[0]
        return [answer] if isinstance(answer, str) else list(answer)


class Wires(httpcore.AsyncNetworkBackend):
    """Leads connections to (address, port) to a local port, or refuses them. Keeps a list of the calls."""

    def __init__(self, routes: dict[tuple[str, int], int]) -> None:
        self.routes = routes
        self.called: list[tuple[str, int]] = []
        self._inner = httpcore.AnyIOBackend()

    async def connect_tcp(
        self, host: str, port: int, timeout: float | None = None, local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:  # fmt: skip
        self.called.append((host, port))
        if (host, port) not in self.routes:
            try:
                raise ConnectionRefusedError
            except ConnectionRefusedError as error:
                raise httpcore.ConnectError from error
        return await self._inner.connect_tcp("127.0.0.1", self.routes[host, port], timeout=timeout)


def get(url: str) -> network.Request:
    return network.Request(url=httpx.URL(url))


def certified(names: Sequence[str], folder: Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """TLS contexts for a server called ``names`` and for a client that trusts it."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0])])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name) for name in names]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = certificate.public_bytes(serialization.Encoding.PEM)
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (folder / "site.pem").write_bytes(pem + private)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(folder / "site.pem")
    return server, ssl.create_default_context(cadata=pem.decode())


@contextlib.asynccontextmanager
async def serving(
    answer: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
) -> AsyncIterator[str]:
    """A server that answers each connection with ``answer``; its address."""

    handlers: set[asyncio.Task[None]] = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        handlers.add(task)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            try:
                await reader.readuntil(b"\r\n\r\n")
                await answer(reader, writer)
            finally:
                writer.close()
                await writer.wait_closed()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with server:
        host, port = server.sockets[0].getsockname()[:2]
        yield f"http://{host}:{port}/"
        await asyncio.gather(*handlers)


def sending(payload: bytes) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(payload)
        await writer.drain()

    return answer


@pytest.mark.parametrize("address", INWARD)
def test_an_address_that_is_not_of_the_internet_is_not_public(address: str) -> None:
    assert not network.is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", OUTWARD)
def test_an_address_of_the_internet_is_public(address: str) -> None:
    assert network.is_public(ipaddress.ip_address(address))


@pytest.mark.asyncio
@pytest.mark.parametrize("address", INWARD)
async def test_a_name_that_resolves_inward_is_refused_before_any_connection(address: str) -> None:
    wires = Wires({})
    async with network.GuardedClient(resolver=Names(shop_test=[address]), backend=wires) as client:
        with pytest.raises(network.AddressRefused):
            await client.fetch(get("http://shop.test/"))
    assert wires.called == []


@pytest.mark.asyncio
async def test_one_private_address_among_public_ones_is_enough_to_refuse() -> None:
    wires = Wires({})
    names = Names(shop_test=[[PUBLIC, "10.0.0.1"]])
    async with network.GuardedClient(resolver=names, backend=wires) as client:
        with pytest.raises(network.AddressRefused):
            await client.fetch(get("http://shop.test/"))
    assert wires.called == []


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "host",
    [
        "2130706433",
        "0x7f000001",
        "0x7f.1",
        "0177.1",
        "127.1",
        "127.0.0.1.",
        "[::ffff:127.0.0.1]",
        "[::1]",
        "0",
    ],
)
async def test_an_address_in_disguise_is_refused_without_asking_a_resolver(host: str) -> None:
    names = Names()
    async with network.GuardedClient(resolver=names, backend=Wires({})) as client:
        with pytest.raises(network.AddressRefused):
            await client.fetch(get(f"http://{host}/"))
    assert names.asked == []


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "url", ["ftp://shop.test/", "file:///etc/passwd", "gopher://shop.test/", "http:///nothing"]
)
async def test_only_http_and_https_are_spoken(url: str) -> None:
    async with network.GuardedClient(allow_private=True, resolver=Names(shop_test=[PUBLIC])) as client:
        with pytest.raises(network.AddressRefused):
            await client.fetch(get(url))


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "address", ["169.254.169.254", "::ffff:169.254.169.254", "fd00:ec2::254", "64:ff9b::a9fe:a9fe"]
)
async def test_a_metadata_service_is_refused_even_where_private_addresses_are_allowed(address: str) -> None:
    wires = Wires({})
    async with network.GuardedClient(
        allow_private=True, resolver=Names(x_test=[address]), backend=wires
    ) as client:
        with pytest.raises(network.AddressRefused, match="metadata"):
            await client.fetch(get("http://x.test/"))
    assert wires.called == []


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "target",
    [
        "http://127.0.0.1/",
        "http://169.254.169.254/latest/",
        "http://[::1]/",
        "http://[::ffff:10.0.0.1]/",
        "http://in.test/",
    ],
)
async def test_a_redirect_inward_is_refused(target: str) -> None:
    with Site("inward", inward=target) as site:
        wires = Wires({(PUBLIC, 80): site.port})
        names = Names(shop_test=[PUBLIC], in_test=["192.168.0.1"])
        async with network.GuardedClient(resolver=names, backend=wires) as client:
            with pytest.raises(network.AddressRefused):
                await client.fetch(get("http://shop.test/inward/login"), redirects=5)
        assert wires.called == [(PUBLIC, 80)]


@pytest.mark.asyncio
async def test_a_name_stays_pinned_to_the_address_that_was_checked() -> None:
    with Site("simple") as site:
        wires = Wires({(PUBLIC, 80): site.port, ("127.0.0.1", 80): site.port})
        names = Names(shop_test=[PUBLIC, "127.0.0.1"])
        async with network.GuardedClient(resolver=names, backend=wires) as client:
            for _ in range(3):
                assert (await client.fetch(get("http://shop.test/simple/login"))).status == 200
        assert wires.called == [(PUBLIC, 80)] * 3
        assert names.asked == ["shop.test"]
        assert site.seen("GET", "/simple/login")[0].headers["Host"] == "shop.test"


@pytest.mark.asyncio
async def test_the_next_address_of_a_name_is_tried_when_the_first_refuses() -> None:
    with Site("simple") as site:
        wires = Wires({("8.8.8.8", 80): site.port})
        async with network.GuardedClient(
            resolver=Names(shop_test=[[PUBLIC, "8.8.8.8"]]), backend=wires
        ) as client:
            assert (await client.fetch(get("http://shop.test/simple/login"))).status == 200
        assert wires.called == [(PUBLIC, 80), ("8.8.8.8", 80)]


@pytest.mark.asyncio
async def test_tls_is_checked_against_the_name_while_the_address_is_pinned(tmp_path: Path) -> None:
    server, trusting = certified(["shop.test"], tmp_path)
    with Site("simple", tls=server) as site:
        wires = Wires({(PUBLIC, 443): site.port})
        names = Names(shop_test=[PUBLIC], other_test=[PUBLIC])
        async with network.GuardedClient(resolver=names, backend=wires, ssl_context=trusting) as client:
            assert (await client.fetch(get("https://shop.test/simple/login"))).status == 200
            with pytest.raises(network.NetworkFault, match="certificate"):
                await client.fetch(get("https://other.test/simple/login"))


@pytest.mark.asyncio
async def test_redirects_are_counted() -> None:
    with Site("circle") as site:
        async with network.GuardedClient(allow_private=True) as client:
            with pytest.raises(network.TooManyRedirects):
                await client.fetch(get(site.url("/circle/a")), redirects=4)
        assert len(site.requests) == 5


@pytest.mark.asyncio
async def test_a_redirect_is_an_answer_as_any_other_when_none_may_be_followed() -> None:
    with Site("circle") as site:
        async with network.GuardedClient(allow_private=True) as client:
            reply = await client.fetch(get(site.url("/circle/a")))
    assert (reply.status, reply.headers["location"]) == (302, "/circle/b")


@pytest.mark.parametrize(
    ("status", "method", "expected"),
    [
        (302, "POST", "GET"),
        (303, "POST", "GET"),
        (301, "POST", "GET"),
        (307, "POST", "POST"),
        (308, "POST", "POST"),
    ],
)
def test_a_redirect_keeps_method_and_body_only_where_the_standard_says_so(
    status: int, method: str, expected: str
) -> None:
    request = network.Request(url=httpx.URL("http://a.test/x"), method=method, body=b"secret")
    reply = network.Reply(
        url=request.url, method=method, status=status, headers=httpx.Headers({"location": "/y"}), body=b""
    )
    following = network.next_hop(request, reply)
    assert following is not None
    assert (following.method, following.body) == (expected, b"secret" if expected == "POST" else b"")
    assert str(following.url) == "http://a.test/y"


@pytest.mark.asyncio
async def test_a_body_longer_than_allowed_is_cut_off() -> None:
    with Site("huge") as site:
        async with network.GuardedClient(allow_private=True, max_bytes=10_000) as client:
            with pytest.raises(network.BodyTooLarge):
                await client.fetch(get(site.url("/huge/login")))


@pytest.mark.asyncio
async def test_what_counts_is_the_size_after_decompression() -> None:
    bomb = gzip.compress(b"\0" * 50_000_000)
    head = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(bomb)
    client = network.GuardedClient(allow_private=True, max_bytes=1_000_000)
    async with serving(sending(head + bomb)) as url, client:
        with pytest.raises(network.BodyTooLarge):
            await client.fetch(get(url))


@pytest.mark.asyncio
@pytest.mark.parametrize(("encoding", "compress"), [(b"gzip", gzip.compress), (b"deflate", zlib.compress)])
async def test_a_compressed_body_is_read(encoding: bytes, compress: Callable[[bytes], bytes]) -> None:
    body = compress("grüezi".encode())
    head = b"HTTP/1.1 200 OK\r\nContent-Encoding: %s\r\nContent-Length: %d\r\n\r\n" % (encoding, len(body))
    async with serving(sending(head + body)) as url, network.GuardedClient(allow_private=True) as client:
        assert (await client.fetch(get(url))).body.decode() == "grüezi"


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "payload",
    [
        b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 4\r\n\r\nnope",
        b"HTTP/1.1 200 OK\r\nContent-Encoding: br\r\nContent-Length: 4\r\n\r\nnope",
        b"HTTP/1.1 200 OK\r\nContent-Length: 40\r\n\r\ncut",
        b"this is not HTTP\r\n\r\n",
        b"",
    ],
)
async def test_a_broken_answer_is_a_fault_that_names_only_the_host(payload: bytes) -> None:
    async with serving(sending(payload)) as url, network.GuardedClient(allow_private=True) as client:
        with pytest.raises(network.NetworkFault) as caught:
            await client.fetch(get(f"{url}path?password=hunter2"))
    assert "127.0.0.1" in str(caught.value)
    assert "hunter2" not in str(caught.value)


@pytest.mark.asyncio
async def test_one_deadline_covers_a_server_that_drips() -> None:
    async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
        while not writer.is_closing():
            writer.write(b".")
            await writer.drain()
            await asyncio.sleep(0.02)

    async with serving(drip) as url, network.GuardedClient(allow_private=True, seconds=0.2) as client:
        with pytest.raises(network.TimedOut):
            await client.fetch(get(url))


@pytest.mark.asyncio
async def test_a_closed_port_is_told_apart_from_other_faults(unused_tcp_port: int) -> None:
    async with network.GuardedClient(allow_private=True) as client:
        with pytest.raises(network.ConnectionRefused):
            await client.fetch(get(f"http://127.0.0.1:{unused_tcp_port}/"))


@pytest.mark.asyncio
async def test_proxies_of_the_environment_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    with Site("simple") as site:
        async with network.GuardedClient(allow_private=True) as client:
            assert (await client.fetch(get(site.url("/simple/login")))).status == 200


@pytest.mark.asyncio
async def test_neither_urls_nor_cookies_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    payload = b"HTTP/1.1 200 OK\r\nSet-Cookie: session=topsecret\r\nContent-Length: 2\r\n\r\nok"
    async with serving(sending(payload)) as url, network.GuardedClient(allow_private=True) as client:
        await client.fetch(get(f"{url}?password=hunter2"))
    assert "hunter2" not in caplog.text
    assert "topsecret" not in caplog.text


def test_requests_and_replies_do_not_print_what_they_carry() -> None:
    request = network.Request(
        url=httpx.URL("http://a.test/?p=hunter2"), body=b"hunter2", headers={"Cookie": "hunter2"}
    )
    reply = network.Reply(url=request.url, method="GET", status=200, headers=httpx.Headers(), body=b"hunter2")
    assert "hunter2" not in f"{request!r} {reply!r}"
