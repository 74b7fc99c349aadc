"""Bounded queues in memory: order, the bound, and what happens beyond it."""

from __future__ import annotations

import asyncio

from hypothesis import given
from hypothesis import strategies as st

from events import broker as module
from events.broker import Broker
from events.envelope import Envelope, Interest


def envelope(number: int, *, audience: int = 1, topic: str = "task:1", size: int = 10) -> Envelope:
    return Envelope(id=number, name="task.status", topic=topic, audience=audience, data={}, frame=b"x" * size)


def ids(envelopes: list[Envelope]) -> list[int]:
    return [each.id for each in envelopes]


def test_C09_publishing_without_subscribers_does_nothing() -> None:
    Broker().publish(envelope(1))


def test_C05_every_subscription_gets_what_it_wants_in_order() -> None:
    broker = Broker()
    mine = broker.add(Interest(audiences=frozenset({1})))
    everything = broker.add(Interest())
    for number in range(5):
        broker.publish(envelope(number, audience=number % 2))
    assert ids(mine.take()) == [1, 3]
    assert ids(everything.take()) == [0, 1, 2, 3, 4]
    assert mine.take() == []


def test_C10_a_full_queue_is_let_go_and_marked_lost_until_the_reader_is_found() -> None:
    broker = Broker()
    slow, quick = broker.add(Interest(), limit=3), broker.add(Interest())
    for number in range(4):
        broker.publish(envelope(number))
    assert slow.lost
    assert slow.take() == []
    broker.publish(envelope(4))
    assert len(slow) == 0
    assert ids(quick.take()) == [0, 1, 2, 3, 4]
    slow.found()
    broker.publish(envelope(5))
    assert not slow.lost
    assert ids(slow.take()) == [5]


def test_C10_a_queue_is_bounded_in_bytes_as_well_and_always_takes_one_event() -> None:
    broker = Broker()
    reader = broker.add(Interest())
    broker.publish(envelope(1, size=module.QUEUE_BYTES * 3))
    assert ids(reader.take()) == [1]
    broker.publish(envelope(2, size=module.QUEUE_BYTES // 2))
    broker.publish(envelope(3, size=module.QUEUE_BYTES // 2))
    assert not reader.lost
    broker.publish(envelope(4, size=1))
    assert reader.lost
    reader.found()
    broker.publish(envelope(5, size=module.QUEUE_BYTES))
    assert ids(reader.take()) == [5]


def test_C06_a_removed_subscription_is_offered_nothing_and_may_be_removed_twice() -> None:
    broker = Broker()
    gone = broker.add(Interest())
    broker.remove(gone)
    broker.remove(gone)
    broker.publish(envelope(1))
    assert (len(broker), gone.take()) == (0, [])


async def _waits(subscription: module.Subscription) -> bool:
    waiting = asyncio.ensure_future(subscription.wait())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    done = waiting.done()
    waiting.cancel()
    return not done


def test_waiting_ends_with_news_and_with_a_loss() -> None:
    async def course() -> None:
        broker = Broker()
        reader = broker.add(Interest(audiences=frozenset({1})), limit=1)
        assert await _waits(reader)
        broker.publish(envelope(1, audience=2))
        assert await _waits(reader)
        broker.publish(envelope(2))
        assert not await _waits(reader)
        reader.take()
        assert await _waits(reader)
        broker.publish(envelope(3))
        broker.publish(envelope(4))
        reader.take()
        assert not await _waits(reader), "a reader that lost its queue must not fall asleep over it"
        reader.found()
        assert await _waits(reader)

    asyncio.run(course())


@given(st.lists(st.sampled_from(["publish", "take", "found"]), max_size=60), st.integers(1, 5))
def test_C10_whatever_the_course_the_queue_is_bounded_ordered_and_never_has_a_silent_gap(
    course: list[str], limit: int
) -> None:
    broker = Broker()
    reader = broker.add(Interest(), limit=limit)
    published, seen = 0, 0
    for step in course:
        if step == "publish":
            published += 1
            broker.publish(envelope(published))
        elif step == "take" and not reader.lost:
            taken = ids(reader.take())
            assert taken == list(range(seen + 1, published + 1))
            seen = published
        elif step == "found" and reader.lost:
            reader.found()
            seen = published
        assert len(reader) <= limit
