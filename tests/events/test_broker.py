"""The broker hands events to who is idle and wants them, and leaves alone who is behind."""

from __future__ import annotations

import asyncio
from typing import Any

from events.broker import Broker, Subscription
from events.envelope import Envelope, Interest

EVERYTHING = Interest()
MINE = Interest(audiences=frozenset({1}))


def event(number: int, topic: str = "task:t1", audience: int = 1) -> Envelope:
    return Envelope(
        id=number, name="task.status", topic=topic, audience=audience, data={}, frame=b"id: %d\n\n" % number
    )


class Reader:
    """A subscription whose sink notes what it took."""

    def __init__(self, broker: Broker, interest: Interest = EVERYTHING, *, takes: bool = True) -> None:
        self.subscription: Subscription = broker.add(interest, 0)
        self.subscription.idle = True
        self.subscription.sink = self.sink
        self.takes = takes
        self.got: list[bytes] = []

    def sink(self, frames: bytes) -> bool:
        if self.takes:
            self.got.append(frames)
        return self.takes


def test_C05_an_event_goes_to_everybody_who_wants_it_and_to_nobody_else() -> None:
    broker = Broker()
    everything, mine = Reader(broker), Reader(broker, MINE)
    topic = Reader(broker, Interest(topics=frozenset({"task:t2"})))
    kind = Reader(broker, Interest(topics=frozenset({"connections"})))
    broker.publish([event(1), event(2, audience=2), event(3, topic="task:t2")], 0.0)
    assert everything.got == [b"id: 1\n\nid: 2\n\nid: 3\n\n"]
    assert mine.got == [b"id: 1\n\nid: 3\n\n"]
    assert topic.got == [b"id: 3\n\n"]
    assert kind.got == []
    assert not kind.subscription.attention.is_set()
    assert kind.subscription.idle


def test_C12_one_that_cannot_take_is_called_and_left_alone_until_it_is_idle_again() -> None:
    broker = Broker()
    full, quick = Reader(broker, takes=False), Reader(broker)
    broker.publish([event(5), event(6)], 0.0)
    assert quick.got == [b"id: 5\n\nid: 6\n\n"]
    assert not full.subscription.idle
    assert full.subscription.attention.is_set()
    # Everything that it wants up to here it has.
    assert full.subscription.cursor == 4
    full.takes = True
    broker.publish([event(7)], 0.0)
    assert full.got == []
    assert full.subscription.cursor == 4


def test_C10_one_without_a_sink_is_called_at_the_first_event_that_it_wants() -> None:
    broker = Broker()
    reader = Reader(broker, MINE)
    reader.subscription.sink = None
    broker.publish([event(1, audience=2)], 0.0)
    assert reader.subscription.idle
    broker.publish([event(2, audience=2), event(3), event(4)], 0.0)
    assert (reader.subscription.idle, reader.subscription.cursor) == (False, 2)


def test_C06_who_left_gets_nothing_and_leaves_nothing() -> None:
    broker = Broker()
    left, stays = Reader(broker), Reader(broker, MINE)
    broker.remove(left.subscription)
    broker.remove(left.subscription)
    broker.publish([event(1)], 0.0)
    assert left.got == []
    assert stays.got
    assert len(broker) == 1
    broker.remove(stays.subscription)
    assert len(broker) == 0
    assert broker._groups == {}


def test_C05_rights_that_changed_count_from_the_next_event_on() -> None:
    broker = Broker()
    reader = Reader(broker)
    broker.change(reader.subscription, MINE)
    broker.publish([event(1, audience=2), event(2)], 0.0)
    assert reader.got == [b"id: 2\n\n"]
    assert len(broker) == 1


def test_C09_publishing_works_without_subscribers_and_while_readers_leave() -> None:
    broker = Broker()
    broker.publish([event(1)], 0.0)
    readers: list[Reader] = [Reader(broker) for _ in range(3)]

    def leaving(frames: bytes) -> bool:
        for reader in readers:
            broker.remove(reader.subscription)
        return True

    readers[0].subscription.sink = leaving
    broker.publish([event(2)], 0.0)
    assert len(broker) == 0


async def _waits(reader: Reader) -> bool:
    waiting: Any = asyncio.ensure_future(reader.subscription.attention.wait())
    await asyncio.sleep(0)
    done = waiting.done()
    waiting.cancel()
    return not done


def test_C10_attention_wakes_who_waits() -> None:
    async def course() -> None:
        broker = Broker()
        reader = Reader(broker, takes=False)
        assert await _waits(reader)
        broker.publish([event(1)], 0.0)
        assert not await _waits(reader)

    asyncio.run(course())
