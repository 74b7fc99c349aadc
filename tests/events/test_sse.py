"""Frames out, events in: what :func:`events.sse.frame` writes is read back whole, however the bytes are cut."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from events import sse

ODD = "\0\r\n\x0b\x0c\x1c\x85\u2028\u2029\ufeff:é🦉 \t"
texts = st.text(st.one_of(st.sampled_from(ODD), st.characters(exclude_categories=("Cs",))), max_size=40)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
objects = st.dictionaries(texts, values, max_size=4)
names = st.from_regex(r"[A-Za-z0-9_.:-]{1,64}", fullmatch=True)


def read(*chunks: bytes) -> list[sse.ServerSentEvent]:
    parser = sse.Parser()
    return [event for chunk in chunks for event in parser.feed(chunk)]


def cut(data: bytes, borders: list[int]) -> list[bytes]:
    places = sorted({border % (len(data) + 1) for border in borders})
    return [data[start:end] for start, end in zip([0, *places], [*places, len(data)], strict=True)]


@given(
    st.lists(st.tuples(names, objects, st.integers(0, 2**63 - 1)), min_size=1, max_size=4),
    st.lists(st.integers(0), max_size=9),
)
def test_A37_what_is_written_is_read_back_wherever_the_bytes_are_cut(
    frames: list[tuple[str, dict[str, Any], int]], borders: list[int]
) -> None:
    wire = b"".join(sse.frame(name, data, id=number) for name, data, number in frames)
    events = read(*cut(wire, borders))
    assert [(event.name, event.json(), event.id) for event in events] == [
        (name, data, str(number)) for name, data, number in frames
    ]


@given(names, objects)
def test_C04_a_frame_is_one_data_line_and_no_raw_control_character_gets_out(
    name: str, data: dict[str, Any]
) -> None:
    wire = sse.frame(name, data)
    assert b"\r" not in wire
    assert b"\0" not in wire
    assert wire.count(b"\n") == 3
    assert wire.startswith(f"event: {name}\ndata: ".encode())
    assert wire.endswith(b"\n\n")


@given(texts)
def test_A36_a_text_of_several_lines_becomes_several_data_lines_and_one_text_again(text: str) -> None:
    wire = sse.text_frame(None, text, id=3)
    assert b"\r" not in wire
    assert b"\0" not in wire
    (event,) = read(b"\n", wire)
    expected = text.replace("\0", "\N{REPLACEMENT CHARACTER}").replace("\r\n", "\n").replace("\r", "\n")
    assert (event.name, event.data, event.id) == ("message", expected, "3")


@pytest.mark.parametrize("name", ["", "a\nb", "a\r", "a b", "é", "x" * 65, "data: x\n\nevent"])
def test_a_name_that_could_break_out_of_its_line_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="not a name"):
        sse.frame(name, {})


def test_a_frame_with_cursor_and_retry_has_its_fields_in_lines_of_their_own() -> None:
    wire = sse.frame("ready", {"cursor": 7}, id=7, retry_ms=1500)
    assert wire == b'id: 7\nretry: 1500\nevent: ready\ndata: {"cursor":7}\n\n'


def test_C09_empty_data_is_an_empty_object() -> None:
    assert sse.frame("x", {}) == b"event: x\ndata: {}\n\n"


def test_half_a_surrogate_pair_is_replaced_instead_of_breaking_the_stream() -> None:
    broken = json.loads('"\\ud800"')
    (event,) = read(b"\n\n", sse.frame("x", {"text": broken}))
    assert event.json() == {"text": "?"}


def test_a_number_that_json_does_not_know_is_refused() -> None:
    with pytest.raises(ValueError, match="JSON"):
        sse.frame("x", {"value": float("nan")})


@pytest.mark.parametrize("end", [b"\n", b"\r", b"\r\n"])
def test_A35_all_three_line_ends_are_read_alike(end: bytes) -> None:
    wire = end.join([b"event: a", b"data: 1", b"", b"data: 2", b"data: 3", b"", b""])
    for chunks in ([wire], [wire[i : i + 1] for i in range(len(wire))]):
        events = read(*chunks)
        assert [(event.name, event.data) for event in events] == [("a", "1"), ("message", "2\n3")]


def test_A35_mixed_line_ends_are_read_alike() -> None:
    assert [event.data for event in read(b"data: 1\r\n\ndata: 2\r\r\ndata: 3\n\r")] == ["1", "2", "3"]


def test_A38_comments_count_as_life_and_dispatch_nothing() -> None:
    parser = sse.Parser()
    assert list(parser.feed(b": hello\n\n:\n\nretry: 250\n\nid: 4\n\n")) == []
    assert (parser.comments, parser.retry_ms, parser.last_event_id) == (2, 250, "4")


def test_A39_a_mark_at_the_start_no_blank_and_a_line_without_colon_follow_the_specification() -> None:
    events = read(b"\xef\xbb", b"\xbf", b"data:x\ndata\nid: 1\0\nretry: soon\n\n")
    assert [(event.data, event.id) for event in events] == [("x\n", "")]


def test_an_unfinished_event_is_not_dispatched() -> None:
    assert read(b"\n\ndata: 1\n") == []
