"""One reader of the log per process: it starts with the first stream, ends with the last, and survives what goes wrong."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from typing import Any

import pytest
from channels.layers import get_channel_layer
from django.db import DatabaseError

from events import hub as module
from events import log, waker
from events.broker import Subscription
from events.envelope import Interest
from events.hub import Hub
from events.stream import Events, follow
from tests.events.writing import write_and_leave

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.asyncio]


async def taken(hub: Hub, subscription: Subscription, count: int) -> list[int]:
    """The ids of the next ``count`` events; ``follow`` is told nothing of where to begin, the subscription knows."""
    got: list[int] = []
    async with asyncio.timeout(10), contextlib.aclosing(follow(hub, subscription, after=None)) as items:
        async for item in items:
            if isinstance(item, Events):
                got += [each.id for each in item.batch]
            if len(got) >= count:
                break
    return got


def hub_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("hub")]


async def nothing_left() -> None:
    """No task but this one, and no thread of a hub."""
    async with asyncio.timeout(5):
        while len(asyncio.all_tasks()) > 1 or hub_threads():
            await asyncio.sleep(0.01)


async def test_the_hub_starts_with_the_first_and_stops_with_the_last() -> None:
    hub = Hub()
    assert not hub_threads()
    async with hub.subscribe(Interest()) as first:
        assert len(hub_threads()) == 1
        async with hub.subscribe(Interest()) as second:
            assert len(hub_threads()) == 1
            ids = await asyncio.to_thread(write_and_leave, 1, 2)
            assert await taken(hub, first, 2) == ids
            assert await taken(hub, second, 2) == ids
        assert len(hub_threads()) == 1
    assert len(hub.broker) == 0
    await nothing_left()
    layer = get_channel_layer()
    assert layer is not None
    assert not layer.groups.get(waker.GROUP)


async def test_a_hub_that_is_started_again_begins_at_the_present() -> None:
    hub = Hub()
    async with hub.subscribe(Interest()):
        await asyncio.to_thread(write_and_leave, 1)
    (missed,) = await asyncio.to_thread(write_and_leave, 2)
    async with hub.subscribe(Interest()) as again:
        assert hub.position == missed
        ids = await asyncio.to_thread(write_and_leave, 3)
        assert await taken(hub, again, 1) == ids


async def test_C06_two_hundred_streams_opened_and_closed_leave_nothing() -> None:
    hub = Hub()

    async def stream() -> None:
        async with hub.subscribe(Interest()) as subscription:
            await subscription.attention.wait()

    for _ in range(4):
        streams = [asyncio.create_task(stream()) for _ in range(50)]
        async with asyncio.timeout(10):
            while len(hub.broker) < 50:
                await asyncio.sleep(0.01)
        for number, task in enumerate(streams):
            task.cancel()
            if number % 2:
                # Once more while it leaves: the client goes just when the server ends the stream.
                await asyncio.sleep(0)
                task.cancel()
        await asyncio.gather(*streams, return_exceptions=True)
        assert len(hub.broker) == 0
        await nothing_left()


async def test_C06_a_stream_that_is_cancelled_again_and_again_still_stops_the_hub() -> None:
    for pauses in range(1, 12):
        hub = Hub()
        entered = asyncio.Event()

        async def stream(hub: Hub = hub, entered: asyncio.Event = entered) -> None:
            async with hub.subscribe(Interest()):
                entered.set()
                await asyncio.Event().wait()

        task = asyncio.create_task(stream())
        await entered.wait()
        while not task.done():
            task.cancel()
            for _ in range(pauses):
                await asyncio.sleep(0)
        with contextlib.suppress(asyncio.CancelledError):
            await task
        await nothing_left()


async def test_a_hub_that_cannot_start_says_so_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> int:
        raise DatabaseError("gone")

    hub = Hub()
    with monkeypatch.context() as patch:
        patch.setattr(module.log, "newest", broken)
        with pytest.raises(DatabaseError):
            async with hub.subscribe(Interest()):
                pass
    await nothing_left()
    async with hub.subscribe(Interest()) as subscription:
        ids = await asyncio.to_thread(write_and_leave, 1)
        assert await taken(hub, subscription, 1) == ids


@pytest.mark.parametrize("fault", [DatabaseError("gone"), ValueError("a row that cannot be encoded")])
async def test_a_fault_while_reading_the_log_costs_latency_and_no_event(
    fault: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real, failures = log.read_envelopes, 0

    def failing(*args: Any, **kwargs: Any) -> Any:
        nonlocal failures
        failures += 1
        if failures <= 3:
            raise fault
        return real(*args, **kwargs)

    monkeypatch.setattr(module, "PAUSE_AFTER_ERROR", 0.01)
    hub = Hub()
    async with hub.subscribe(Interest()) as subscription:
        monkeypatch.setattr(module.log, "read_envelopes", failing)
        ids = await asyncio.to_thread(write_and_leave, 1, 2)
        assert await taken(hub, subscription, 2) == ids
    assert "cannot read the log" in caplog.text


async def test_a_layer_that_fails_is_survived_by_looking(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken:
        async def new_channel(self, prefix: str) -> str:
            raise ConnectionError("no layer")

    monkeypatch.setattr(module, "PAUSE_AFTER_ERROR", 0.01)
    monkeypatch.setattr(module, "get_channel_layer", Broken)
    hub = Hub()
    async with hub.subscribe(Interest()) as subscription:
        ids = await asyncio.to_thread(write_and_leave, 1)
        assert await taken(hub, subscription, 1) == ids
    assert "the channel layer does not answer" in caplog.text


class Deaf:
    """A layer whose client swallows the first cancellation, as redis-py does while it connects."""

    def __init__(self) -> None:
        self.deaf = True
        self.entered = asyncio.Event()

    async def new_channel(self, prefix: str) -> str:
        self.entered.set()
        while self.deaf:
            try:
                await asyncio.sleep(3600)
            except asyncio.CancelledError:
                self.deaf = False
        return prefix

    async def group_add(self, group: str, channel: str) -> None: ...

    async def group_discard(self, group: str, channel: str) -> None: ...

    async def receive(self, channel: str) -> None:
        await asyncio.sleep(3600)


async def test_C06_a_layer_that_swallows_a_cancellation_neither_stops_the_next_stream_nor_stays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer = Deaf()
    monkeypatch.setattr(module, "get_channel_layer", lambda: layer)
    hub = Hub()
    async with asyncio.timeout(5):
        async with hub.subscribe(Interest()):
            await layer.entered.wait()
        async with hub.subscribe(Interest()) as again:
            ids = await asyncio.to_thread(write_and_leave, 1)
            assert await taken(hub, again, 1) == ids
    await nothing_left()


async def test_a_wake_up_is_heard_long_before_the_next_look(settings: Any) -> None:
    settings.POLL_SECONDS = 600
    layer = get_channel_layer()
    assert layer is not None
    hub = Hub()
    async with hub.subscribe(Interest()) as subscription:
        async with asyncio.timeout(5):
            while not layer.groups.get(waker.GROUP):
                await asyncio.sleep(0.01)
        ids = await asyncio.to_thread(write_and_leave, 1)
        await layer.group_send(waker.GROUP, waker.MESSAGE)
        assert await taken(hub, subscription, 1) == ids


async def test_a_row_with_half_a_surrogate_pair_does_not_stop_the_log() -> None:
    hub = Hub()
    async with hub.subscribe(Interest()) as subscription:
        ids = await asyncio.to_thread(write_and_leave, 1, data={"text": "\ud800"})
        ids += await asyncio.to_thread(write_and_leave, 2)
        assert await taken(hub, subscription, 2) == ids


async def test_the_hub_belongs_to_its_event_loop() -> None:
    assert module.current() is module.current()

    async def elsewhere() -> Hub:
        return module.current()

    assert await asyncio.to_thread(asyncio.run, elsewhere()) is not module.current()
