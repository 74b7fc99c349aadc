"""follow(): replay, mark, live. No event lost, none twice, all in order, whoever writes meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import functools
from collections.abc import AsyncIterator
from typing import Any

import pytest

from events import hub as hubs
from events import metrics
from events.broker import Subscription
from events.envelope import Interest
from events.hub import Hub
from events.stream import Events, Follower, Item, Ready, Reset, follow
from events.window import Window
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
    monkeypatch.setattr(hubs, "PAGE", 2)
    monkeypatch.setattr(hubs, "TAIL_EVENTS", 1)
    old = await asyncio.to_thread(write_and_leave, *range(6), at=NOW - dt.timedelta(days=40))
    (young,) = await asyncio.to_thread(write_and_leave, 9)
    async with following(hubs.current(), after=0) as (items, _):
        # Pages begin at round ids, so the first one may be cut anywhere.
        got = await ids_of(items, 2)
        assert got == old[: len(got)]
        assert len(got) < 5
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


async def caught_up(hub: Hub, cursor: int) -> None:
    async with asyncio.timeout(10):
        while hub.position < cursor:
            await asyncio.sleep(0.01)


async def test_C10_a_slow_stream_reads_on_from_the_window_at_its_own_pace_and_misses_nothing() -> None:
    hub = hubs.current()
    async with following(hub) as (items, subscription):
        assert isinstance(await item_of(items), Ready)
        ids = await asyncio.to_thread(write_and_leave, *range(40))
        await caught_up(hub, ids[-1])
        assert await ids_of(items, 40) == ids
        later = await asyncio.to_thread(write_and_leave, 50)
        assert await ids_of(items, 1) == later
        assert subscription.cursor >= later[0] - 1


async def test_C10_one_that_fell_out_of_the_window_reads_the_log_and_misses_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hubs, "Window", functools.partial(Window, limit_events=5))
    hub = Hub()
    fallbacks = metrics.FALLBACKS._value.get()
    async with following(hub) as (items, _):
        assert isinstance(await item_of(items), Ready)
        ids = await asyncio.to_thread(write_and_leave, *range(230))
        await caught_up(hub, ids[-1])
        assert hub.window.start > ids[200]
        assert await ids_of(items, 230) == ids
        later = await asyncio.to_thread(write_and_leave, 300)
        assert await ids_of(items, 1) == later
    assert metrics.FALLBACKS._value.get() > fallbacks


async def test_C10_many_that_fell_out_of_the_window_share_their_reads_of_the_log(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hubs, "Window", functools.partial(Window, limit_events=5))
    ids = await asyncio.to_thread(write_and_leave, *range(300))
    hub = Hub()

    async def reader(after: int) -> list[int]:
        async with following(hub, after=after) as (items, _):
            return await ids_of(items, ids[-1] - after)

    async with hub.subscribe(Interest()):
        before = metrics.LOG_READS.labels("page")._value.get()
        results = await asyncio.gather(*(reader(ids[back % 60]) for back in range(200)))
        reads = metrics.LOG_READS.labels("page")._value.get() - before
    for number, got in enumerate(results):
        assert got == ids[number % 60 + 1 :]
    # Three hundred events are at most five pages, whoever asks and how many they are.
    assert 3 <= reads <= 5


async def test_C12_a_stream_that_takes_nothing_delays_nobody_and_holds_nothing() -> None:
    hub = hubs.current()
    async with following(hub) as (stalled, left), following(hub) as (quick, _):
        assert isinstance(await item_of(stalled), Ready)
        assert isinstance(await item_of(quick), Ready)
        # Both are idle once they are asked for more.
        waiting = asyncio.ensure_future(anext(stalled))
        first = await asyncio.to_thread(write_and_leave, 1)
        assert await ids_of(quick, 1) == first
        assert [each.id for each in (await waiting).batch] == first
        ids = await asyncio.to_thread(write_and_leave, *range(300))
        assert await ids_of(quick, 300) == ids
        assert left.cursor == first[0]
        assert not left.idle


async def test_B30_a_cursor_that_another_process_is_ahead_with_waits_for_this_one_and_gets_nothing_twice() -> (
    None
):
    hub = Hub()
    async with hub.subscribe(Interest()):
        # The log grows, but this process does not look.
        hub._tasks[0].cancel()
        await asyncio.gather(hub._tasks[0], return_exceptions=True)
        ids = await asyncio.to_thread(write_and_leave, 1, 2, 3)
        async with following(hub, after=ids[1]) as (items, subscription):
            waiting = asyncio.ensure_future(anext(items))
            async with asyncio.timeout(5):
                while subscription not in hub._ahead:
                    await asyncio.sleep(0.01)
            hub._tasks[0] = asyncio.create_task(hub._follow_log())
            assert isinstance(await waiting, Events | Ready)
            later = await asyncio.to_thread(write_and_leave, 4)
            got = [] if isinstance(waiting.result(), Ready) else [each.id for each in waiting.result().batch]
            while len(got) < 2:
                item = await item_of(items)
                got += [each.id for each in item.batch] if isinstance(item, Events) else []
            assert got == [ids[2], *later]


async def test_B31_B36_what_is_handed_to_a_sink_and_what_is_read_join_without_a_gap() -> None:
    """A sink that takes some and refuses some: a socket that is full now and then."""
    hub = hubs.current()
    got: list[int] = []
    refused = 0

    def sink(frames: bytes) -> bool:
        nonlocal refused
        ids = [int(line[4:]) for line in frames.split(b"\n") if line.startswith(b"id: ")]
        if ids[0] % 3 == 0:
            refused += 1
            return False
        got.extend(ids)
        return True

    async with hub.subscribe(Interest()) as subscription:
        follower = Follower(hub, subscription, after=None)

        async def serve() -> None:
            while True:
                item = await follower.next()
                if isinstance(item, Events):
                    got.extend(each.id for each in item.batch)
                elif item is None:
                    subscription.sink = sink
                    await subscription.attention.wait()
                    subscription.attention.clear()
                    subscription.sink = None

        serving = asyncio.create_task(serve())
        ids: list[int] = []
        for number in range(60):
            ids += await asyncio.to_thread(write_and_leave, number)
            await caught_up(hub, ids[-1])
        async with asyncio.timeout(10):
            while len(got) < 60:
                await asyncio.sleep(0.01)
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
    assert got == ids
    assert 0 < refused < 60
