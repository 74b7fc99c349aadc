"""The window and the pages: what is in memory is whole, bounded, and never claims what it does not have."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from events.envelope import Envelope
from events.window import PORTION_BYTES, Page, Pages, Window, portions


def event(number: int, size: int = 10) -> Envelope:
    return Envelope(id=number, name="task.updated", topic="task:t", audience=1, data={}, frame=b"x" * size)


def ids(events: object) -> list[int]:
    return [each.id for each in events]  # type: ignore[attr-defined]


def test_B30_what_follows_a_cursor_is_everything_after_it() -> None:
    window = Window(10)
    window.extend([event(12), event(15), event(16)])
    assert (window.start, window.end) == (10, 16)
    for cursor, expected in [
        (10, [12, 15, 16]),
        (11, [12, 15, 16]),
        (12, [15, 16]),
        (14, [15, 16]),
        (16, []),
    ]:
        portion = window.after(cursor)
        assert portion is not None
        assert ids(portion.events) == expected
        assert portion.through == 16


def test_C44_a_cursor_before_the_window_is_not_answered_from_it() -> None:
    window = Window(0, limit_events=2)
    window.extend([event(n) for n in range(1, 6)])
    assert window.start == 3
    assert window.after(2) is None
    assert ids(window.after(3).events) == [4, 5]  # type: ignore[union-attr]


def test_C10_the_window_is_bounded_in_bytes_and_keeps_the_newest_event_however_large() -> None:
    window = Window(0, limit_bytes=1000)
    window.extend([event(n, 300) for n in range(1, 11)])
    assert len(window) == 3
    window.extend([event(11, 5000)])
    assert ids(window.after(10).events) == [11]  # type: ignore[union-attr]
    assert (window.start, len(window)) == (10, 1)


@given(
    st.lists(st.tuples(st.integers(1, 3), st.integers(1, 400)), max_size=60),
    st.integers(1, 20),
    st.integers(1, 3000),
)
def test_B31_reading_on_portion_by_portion_gives_every_event_once_in_order(
    steps: list[tuple[int, int]], limit_events: int, limit_bytes: int
) -> None:
    window = Window(0, limit_events=limit_events, limit_bytes=limit_bytes)
    written = []
    number = 0
    for step, size in steps:
        number += step
        written.append(number)
        window.extend([event(number, size)])
        assert window.start < window.end == number
        got, cursor = [], window.start
        while cursor < window.end:
            portion = window.after(cursor)
            assert portion is not None
            got += ids(portion.events)
            assert portion.through > cursor
            cursor = portion.through
        assert got == [each for each in written if each > window.start]


@given(st.lists(st.integers(1, 200_000), max_size=40))
def test_C12_portions_are_of_bounded_size_and_lose_nothing(sizes: list[int]) -> None:
    events = [event(number, size) for number, size in enumerate(sizes, 1)]
    parts = portions(events)
    assert [each for part in parts for each in part] == events
    for part in parts:
        assert part
        assert len(part) == 1 or sum(len(each.frame) for each in part) <= PORTION_BYTES


@pytest.mark.parametrize("size", [1, PORTION_BYTES + 1])
def test_C12_a_reader_of_the_window_gets_at_least_one_event_at_a_time(size: int) -> None:
    window = Window(0)
    window.extend([event(1, size), event(2, PORTION_BYTES)])
    portion = window.after(0)
    assert portion is not None
    assert (ids(portion.events), portion.through) == ([1], 1)


def test_C10_pages_are_bounded_and_the_one_used_longest_ago_goes_first() -> None:
    pages = Pages(limit_bytes=5000)
    for start in (0, 100, 200):
        pages.put(Page(start, [event(start + 1, 1000)], start + 100, 0))
    assert pages.find(0) is not None
    pages.put(Page(300, [event(301, 1000)], 400, 0))
    assert pages.find(100) is None
    assert [pages.find(start) is not None for start in (0, 200, 300)] == [True, True, True]
    pages.put(Page(400, [event(401, 50_000)], 500, 0))
    assert [pages.find(start) is not None for start in (0, 300, 400)] == [False, False, True]
