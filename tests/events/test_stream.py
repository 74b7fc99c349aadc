"""follow(): replay, mark, live. No event lost, none twice, all in order, whoever writes meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
from collections.abc import AsyncIterator
from typing import Any

import pytest

from events import hub as hubs
from events.broker import Subscription
from events.envelope import Interest
from events.hub import Hub
from events.stream import Events, Item, Ready, Reset, follow
from tests.events.writing import NOW, prune_and_leave, write_and_leave, writers

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.asyncio]


@contextlib.asynccontextmanager
async def following(
    hub: Hub, *, after: int | None = None, interest: Interest | None = None
) -> AsyncIterator[tuple[Any, Subscription]]:
    async with (
        hub.subscribe(interest or Interest()) as subscription,
        contextlib.aclosing(follow(hub, subscription, after=after)) as items,
    ):
        yield items, subscription


async def item_of(items: Any) -> Item:
    async with asyncio.timeout(20):
        return await anext(items)


async def ids_of(items: Any, count: int) -> list[int]:
    """The next ``count`` events; control items must not come between."""
    got: list[int] = []
    while len(got) < count:
        item = await item_of(items)
        assert isinstance(item, Events), item
        got += [each.id for each in item.batch]
    return got


async def test_C03_without_a_cursor_ready_is_first_and_everything_after_it_comes() -> None:
    (before,) = await asyncio.to_thread(write_and_leave, 1)
    async with following(hubs.current()) as (items, _):
        assert await item_of(items) == Ready(before)
        ids = await asyncio.to_thread(write_and_leave, 2, 3)
        assert await ids_of(items, 2) == ids


async def test_C44_a_cursor_replays_what_followed_it_then_is_ready() -> None:
    ids = await asyncio.to_thread(write_and_leave, *range(250))
    async with following(hubs.current(), after=ids[9]) as (items, _):
        assert await ids_of(items, 240) == ids[10:]
        assert await item_of(items) == Ready(ids[-1])


async def test_C44_the_newest_cursor_replays_nothing() -> None:
    ids = await asyncio.to_thread(write_and_leave, 1, 2)
    async with following(hubs.current(), after=ids[-1]) as (items, _):
        assert await item_of(items) == Ready(ids[-1])


async def test_C05_replay_and_live_are_filtered_alike() -> None:
    mine = Interest(topics=frozenset({"task:t1", "connections"}), audiences=frozenset({1}))
    wanted = await asyncio.to_thread(write_and_leave, 1)
    await asyncio.to_thread(write_and_leave, 2)
    await asyncio.to_thread(write_and_leave, 1, audience=2)
    async with following(hubs.current(), after=0, interest=mine) as (items, _):
        assert await ids_of(items, 1) == wanted
        assert isinstance(await item_of(items), Ready)
        await asyncio.to_thread(write_and_leave, 1, audience=2)
        await asyncio.to_thread(write_and_leave, 3)
        later = await asyncio.to_thread(write_and_leave, 1)
        assert await ids_of(items, 1) == later


async def test_B34_a_cursor_beyond_the_end_is_reset() -> None:
    (last,) = await asyncio.to_thread(write_and_leave, 1)
    async with following(hubs.current(), after=last + 1) as (items, _):
        assert await item_of(items) == Reset("unknown_cursor", last)
        assert await item_of(items) == Ready(last)


async def test_C44_a_cursor_before_the_retention_is_reset_and_the_border_itself_is_not() -> None:
    old = await asyncio.to_thread(write_and_leave, 1, 2, 3, at=NOW - dt.timedelta(days=40))
    young = await asyncio.to_thread(write_and_leave, 4, 5)
    assert await asyncio.to_thread(prune_and_leave, NOW) == 3
    async with following(hubs.current(), after=old[1]) as (items, _):
        assert await item_of(items) == Reset("retention", young[-1])
        assert await item_of(items) == Ready(young[-1])
    async with following(hubs.current(), after=old[2]) as (items, _):
        assert await ids_of(items, 2) == young


async def test_C44_what_is_pruned_under_a_replay_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hubs, "BATCH", 2)
    old = await asyncio.to_thread(write_and_leave, *range(6), at=NOW - dt.timedelta(days=40))
    (young,) = await asyncio.to_thread(write_and_leave, 9)
    async with following(hubs.current(), after=0) as (items, _):
        assert await ids_of(items, 2) == old[:2]
        await asyncio.to_thread(prune_and_leave, NOW)
        assert await item_of(items) == Reset("retention", young)
        assert await item_of(items) == Ready(young)
        later = await asyncio.to_thread(write_and_leave, 10)
        assert await ids_of(items, 1) == later


async def test_B31_at_the_border_between_replay_and_live_nothing_is_lost_twice_or_out_of_order() -> None:
    """Four writers in threads write all the time while streams come with cursors of every age."""
    first = (await asyncio.to_thread(write_and_leave, *range(20)))[0]
    each, count = 60, 4
    total = each * count
    hub = hubs.current()

    async def reader(after: int, start_at: int) -> list[int]:
        async with asyncio.timeout(60):
            while hub.position < start_at:
                await asyncio.sleep(0.001)
        async with following(hub, after=after) as (items, _):
            got: list[int] = []
            told_ready = 0
            while len(got) < first + 19 + total - after:
                item = await item_of(items)
                if isinstance(item, Ready):
                    told_ready += 1
                    assert item.cursor == (got[-1] if got else after)
                else:
                    assert isinstance(item, Events)
                    got += [envelope.id for envelope in item.batch]
            if not told_ready:
                assert isinstance(await item_of(items), Ready)
            return got

    loop = asyncio.get_running_loop()
    async with hub.subscribe(Interest()):
        base = hub.position
        with writers(count) as pool:
            # A little at a time, so that readers come in the middle.
            writing = [loop.run_in_executor(pool, write_and_leave, number) for number in range(total)]
            readers = [
                asyncio.create_task(reader(base - back, base + late))
                for back, late in [(0, 0), (5, 1), (15, 40), (0, 80), (10, 120), (3, 200)]
            ]
            await asyncio.gather(*writing)
            results = await asyncio.gather(*readers)
    for got in results:
        assert got == list(range(got[0], base + total + 1))


async def test_C10_a_slow_stream_falls_back_to_the_log_and_misses_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("events.broker.QUEUE_LIMIT", 5)
    monkeypatch.setattr(hubs, "BATCH", 7)
    hub = hubs.current()
    async with following(hub) as (items, subscription):
        assert isinstance(await item_of(items), Ready)
        subscription.limit = 5
        ids = await asyncio.to_thread(write_and_leave, *range(40))
        async with asyncio.timeout(10):
            while hub.position < ids[-1]:
                await asyncio.sleep(0.01)
        assert subscription.lost
        assert await ids_of(items, 40) == ids
        later = await asyncio.to_thread(write_and_leave, 50)
        assert await ids_of(items, 1) == later


async def test_C12_a_stream_that_takes_nothing_delays_nobody() -> None:
    hub = hubs.current()
    async with following(hub) as (stalled, lost), following(hub) as (quick, _):
        assert isinstance(await item_of(stalled), Ready)
        assert isinstance(await item_of(quick), Ready)
        ids = await asyncio.to_thread(write_and_leave, *range(300))
        assert await ids_of(quick, 300) == ids
        assert lost.lost
        assert len(lost) == 0
