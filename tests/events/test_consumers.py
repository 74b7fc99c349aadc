"""One stream without a socket: refusals, endings and cancellation, spoken in ASGI messages."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

import pytest
from django.db import OperationalError

from events import consumers
from events.consumers import EventStreamConsumer, Grant, Refused, Streams
from events.envelope import Interest
from events.sse import Parser, ServerSentEvent
from tests.events.writing import write_and_leave

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.asyncio]


class Open(EventStreamConsumer):
    """Everybody may see everything, until ``verdict`` says otherwise."""

    verdict: Exception | None = None

    async def authorise(self, *, within: float = 0.0) -> Grant:
        if self.verdict is not None:
            raise self.verdict
        return Grant(principal="test", interest=Interest())


class Client:
    """The server's side of one request."""

    def __init__(self, consumer: Any, method: str = "GET") -> None:
        self.sent: list[dict[str, Any]] = []
        self.blocked: asyncio.Event | None = None
        self.inbox: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.inbox.put_nowait({"type": "http.request", "body": b"", "more_body": False})
        scope = {"type": "http", "method": method, "headers": [], "query_string": b"", "path": "/"}
        self.task = asyncio.create_task(consumer(scope, self.inbox.get, self.send))

    async def send(self, message: dict[str, Any]) -> None:
        self.sent.append(message)
        if self.blocked is not None and message.get("body"):
            await self.blocked.wait()

    @property
    def events(self) -> list[ServerSentEvent]:
        parser = Parser()
        return [event for message in self.sent for event in parser.feed(message.get("body", b""))]

    @property
    def over(self) -> bool:
        return any(
            message["type"] == "http.response.body" and not message.get("more_body") for message in self.sent
        )

    async def until(self, condition: Callable[[], Any]) -> None:
        async with asyncio.timeout(10):
            while not condition():
                await asyncio.sleep(0.01)

    async def leave(self) -> None:
        self.inbox.put_nowait({"type": "http.disconnect"})
        async with asyncio.timeout(10):
            await self.task


async def nothing_left() -> None:
    async with asyncio.timeout(5):
        while len(asyncio.all_tasks()) > 1:
            await asyncio.sleep(0.01)
    assert consumers.streams().total == 0


async def test_C06_a_client_that_leaves_ends_its_stream_at_once() -> None:
    client = Client(Open())
    await client.until(lambda: [event.name for event in client.events] == ["ready"])
    await client.leave()
    await nothing_left()


async def test_a_stream_that_is_cancelled_while_it_writes_leaves_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    client = Client(Open())
    await client.until(lambda: client.events)
    client.blocked = asyncio.Event()
    await asyncio.to_thread(write_and_leave, 1, 2, 3)
    await client.until(lambda: len(client.events) > 1)
    await client.leave()
    await nothing_left()
    assert "a stream broke" not in caplog.text


async def test_C11_C12_a_reader_that_takes_nothing_is_told_that_it_was_slow(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(consumers, "STALLED_SECONDS", 0.1)
    client = Client(Open())
    await client.until(lambda: client.events)
    client.blocked = asyncio.Event()
    await asyncio.to_thread(write_and_leave, 1)
    await client.until(lambda: "slow" in str(client.sent[-1]))
    client.blocked.set()
    await client.until(lambda: client.over)
    assert client.events[-1].json() == {"reason": "slow", "reconnect": True}
    await client.leave()
    await nothing_left()
    assert "a stream broke" not in caplog.text


async def test_A49_a_session_that_ends_ends_the_stream_at_the_next_heartbeat_and_a_passing_fault_does_not(
    settings: Any,
) -> None:
    settings.HEARTBEAT_SECONDS = 0.1
    consumer = Open()
    client = Client(consumer)
    await client.until(lambda: client.events)
    for passing in (OperationalError("gone"), Refused(503, "x", "x")):
        consumer.verdict = passing
        seen = len(client.events)
        await client.until(lambda seen=seen: len(client.events) >= seen + 3)
    consumer.verdict = Refused(401, "unauthorized", "no more")
    await client.until(lambda: client.over)
    assert client.events[-1].json() == {"reason": "session_over", "reconnect": False}
    await client.leave()
    await nothing_left()


async def test_a_database_that_does_not_answer_is_503_and_never_401() -> None:
    consumer = Open()
    consumer.verdict = OperationalError("gone")
    client = Client(consumer)
    await client.until(lambda: client.over)
    assert client.sent[0]["status"] == 503
    assert (b"Retry-After", b"2") in client.sent[0]["headers"]
    await client.leave()


async def test_C05_a_stream_that_sees_nothing_of_a_long_log_is_ready_and_gets_what_is_its_own() -> None:
    class Narrow(Open):
        plain_frames = True

        async def authorise(self, *, within: float = 0.0) -> Grant:
            return Grant(principal="test", interest=Interest(audiences=frozenset({7})), after=before)

    (before,) = await asyncio.to_thread(write_and_leave, 1)
    await asyncio.to_thread(write_and_leave, *range(40), data={"fill": "x" * 10_000})
    client = Client(Narrow())
    await client.until(lambda: [event.name for event in client.events] == ["ready"])
    (mine,) = await asyncio.to_thread(write_and_leave, 1, audience=7)
    await client.until(lambda: client.events[-1].id == str(mine))
    await client.leave()
    await nothing_left()


async def test_a_fault_while_encoding_is_tried_again_and_loses_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(consumers, "RETRY_SECONDS", 0.05)
    faults = 2

    class Drawn(Open):
        async def encode(self, batch: Any, grant: Grant) -> bytes:
            nonlocal faults
            if faults:
                faults -= 1
                raise OperationalError("gone")
            return await super().encode(batch, grant)

    client = Client(Drawn())
    await client.until(lambda: client.events)
    ids = await asyncio.to_thread(write_and_leave, 1, 2, 3)
    await client.until(lambda: len(client.events) >= 4)
    assert [event.id for event in client.events[1:]] == [str(each) for each in ids]
    assert faults == 0
    await client.leave()
    await nothing_left()


async def test_draining_ends_open_streams_and_refuses_new_ones() -> None:
    clients = [Client(Open()) for _ in range(3)]
    for client in clients:
        await client.until(lambda client=client: client.events)
    await consumers.streams().drain()
    for client in clients:
        assert client.events[-1].json() == {"reason": "shutdown", "reconnect": True}
    late = Client(Open())
    await late.until(lambda: late.over)
    assert late.sent[0]["status"] == 503
    for client in [*clients, late]:
        await client.leave()
    await nothing_left()


async def test_places_are_given_back_whatever_happens(settings: Any) -> None:
    settings.STREAM_LIMIT, settings.STREAM_PROCESS_LIMIT = 1, 2
    streams = Streams()
    with streams.place("a"):
        with pytest.raises(Refused) as refused, streams.place("a"):
            pass
        assert (refused.value.status, refused.value.headers["Retry-After"]) == (429, "5")
        with contextlib.suppress(LookupError), streams.place("b"):
            with pytest.raises(Refused) as full, streams.place("c"):
                pass
            assert full.value.status == 503
            raise LookupError
    assert (streams.total, streams.per_principal) == (0, {})
