"""Frames out, events in: what :func:`events.sse.frame` writes is read back whole, however the bytes are cut."""

from __future__ import annotations

import json
import re
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


# ── The whole way, with a second witness ──

#: What JSON, UTF-8 and lines could trip over; halves of surrogate pairs come in as JSON escapes.
WILD = (
    *ODD,
    "\ud800",
    "\udfff",
    "\r\n",
    "\n\n",
    "\r\r",
    "\x7f",
    "\u200d",
    "🇪🇺",
    "data: x\n\n",
    "id: 9\n",
    "\n:",
)
wild = st.lists(st.one_of(st.sampled_from(WILD), st.characters(), st.text(max_size=5)), max_size=12).map(
    "".join
)
milliseconds = st.none() | st.integers(0, 10**12)
cursors = st.none() | st.integers(0, 2**63 - 1)
frames_of_all_kinds = st.one_of(
    st.tuples(
        st.just("json"), names, st.dictionaries(wild, wild | values, max_size=3), cursors, milliseconds
    ),
    st.tuples(st.just("text"), st.none() | names, wild, cursors, milliseconds),
)


def by_the_grammar(wire: bytes) -> tuple[list[tuple[str, str, str]], str]:
    """``(name, data, last event id)`` of each event, and the last ``retry``; the second witness.

    Written from the ABNF of WHATWG HTML, section 9.2.5, over the whole text at once: :class:`events.sse.Parser` goes line by line,
    and this knows nothing of chunks, buffers and states.
    """
    text = wire.decode("utf-8-sig", "strict")
    line_end = r"(?:\r\n|\r|\n)"
    any_char = r"[^\r\n]"
    field = rf"(?:[^\r\n:]+(?:: ?{any_char}*)?){line_end}"
    comment = rf":{any_char}*{line_end}"
    event = re.compile(rf"((?:{comment}|{field})*){line_end}")
    assert re.fullmatch(rf"(?:(?:{comment}|{field})*{line_end})*", text), "this is no event stream"
    found: list[tuple[str, str, str]] = []
    last_id = retry = ""
    for block in event.findall(text):
        told: dict[str, list[str]] = {}
        for name, value in re.findall(rf"^([^\r\n:]+)(?:: ?({any_char}*))?{line_end}", block, re.MULTILINE):
            told.setdefault(name, []).append(value)
        last_id = [last_id, *(value for value in told.get("id", []) if "\0" not in value)][-1]
        retry = [retry, *(value for value in told.get("retry", []) if re.fullmatch("[0-9]+", value))][-1]
        if "data" in told:
            found.append((told.get("event", [""])[-1] or "message", "\n".join(told["data"]), last_id))
    return found, retry


def over_the_wire(text: str) -> str:
    """What a reader must get of a text: lines end in LF, what has no UTF-8 or may not be there is replaced."""
    lines = re.sub(r"\r\n?", "\n", text).replace("\0", "\N{REPLACEMENT CHARACTER}")
    return "".join("?" if "\ud800" <= letter <= "\udfff" else letter for letter in lines)


def both_witnesses(wire: bytes, borders: list[int]) -> tuple[list[tuple[str, str, str]], str]:
    """Read it in one go by the grammar, and in pieces by the parser; they agree."""
    seen, retry = by_the_grammar(wire)
    parser = sse.Parser()
    in_pieces = [event for chunk in cut(wire, borders) for event in parser.feed(chunk)]
    assert [(event.name, event.data, event.id) for event in in_pieces] == seen
    assert parser.retry_ms == (int(retry) if retry else None)
    return seen, retry


def clean(value: Any) -> Any:
    """JSON as a reader gets it: NUL travels as an escape, half a pair is replaced."""
    text = json.dumps(value, ensure_ascii=False)
    return json.loads("".join("?" if "\ud800" <= letter <= "\udfff" else letter for letter in text))


@given(
    st.lists(frames_of_all_kinds, min_size=1, max_size=5),
    st.lists(st.integers(0), max_size=12),
    st.booleans(),
)
def test_C04_frames_make_the_round_trip_through_a_parser_of_the_specification(
    frames: list[tuple[str, str | None, Any, int | None, int | None]], borders: list[int], marked: bool
) -> None:
    wire, expected, last_id, last_retry = b"\xef\xbb\xbf" if marked else b"", [], "", ""
    for kind, name, data, number, retry_ms in frames:
        if kind == "json":
            wire += sse.frame(name, data, id=number, retry_ms=retry_ms)
        else:
            wire += sse.text_frame(name, data, id=number, retry_ms=retry_ms)
        last_id = last_id if number is None else str(number)
        last_retry = last_retry if retry_ms is None else str(retry_ms)
        expected.append((kind, name or "message", data, last_id))
    # A byte order mark of the wire needs two more bytes behind it, or a parser cannot tell: every frame has them.
    seen, retry = both_witnesses(wire, borders)
    assert retry == last_retry
    assert len(seen) == len(expected), "one frame is one event"
    for (name, text, number), (kind, wanted_name, data, wanted_id) in zip(seen, expected, strict=True):
        assert (name, number) == (wanted_name, wanted_id)
        if kind == "json":
            assert "\n" not in text
            assert json.loads(text) == clean(data)
        else:
            assert text == over_the_wire(data)


@pytest.mark.parametrize("piece", ["x", "é", "🦉", "\r", "\n", "\r\n", "\0", "\u2028", "\ufeff", "\ud800"])
def test_C04_a_megabyte_makes_the_round_trip(piece: str) -> None:
    """1 MB on the wire of the one thing, as JSON and as text, in the pieces in which a socket hands it over."""
    text = piece * (1_000_000 // len(sse.dumps({"": piece})[5:-2].encode("utf-8", "replace")))
    # A line end becomes a line of its own, and a reader takes its time over each.
    lines = text[:30_000] if piece in "\r\n" else text
    wire = sse.frame("big", {"text": text}, id=1) + sse.text_frame("big", lines, id=2)
    assert len(wire) > 900_000
    sizes = list(range(0, len(wire), 65_521))
    seen, _ = both_witnesses(wire, sizes)
    assert [(name, number) for name, _, number in seen] == [("big", "1"), ("big", "2")]
    assert json.loads(seen[0][1]) == {"text": over_the_wire(text) if "\ud800" <= piece <= "\udfff" else text}
    assert seen[1][1] == over_the_wire(lines)


@given(
    st.binary(max_size=60).map(lambda junk: junk.replace(b"\xef\xbb\xbf", b"")),
    st.lists(st.integers(0), max_size=8),
)
def test_a_parser_reads_any_bytes_alike_however_they_are_cut(junk: bytes, borders: list[int]) -> None:
    whole, pieces = sse.Parser(), sse.Parser()
    expected = list(whole.feed(b":\n\n" + junk + b"\n\n"))
    assert [
        event for chunk in cut(b":\n\n" + junk + b"\n\n", borders) for event in pieces.feed(chunk)
    ] == expected
    assert (pieces.retry_ms, pieces.last_event_id, pieces.comments) == (
        whole.retry_ms, whole.last_event_id, whole.comments,
    )  # fmt: skip


@given(st.text(st.characters(), max_size=70) | st.text(st.sampled_from("aZ0_.:-\n\r \0é"), max_size=70))
def test_a_name_of_an_event_is_a_plain_token_or_refused(name: str) -> None:
    plain = 0 < len(name) <= 64 and all(
        letter.isascii() and (letter.isalnum() or letter in "_.:-") for letter in name
    )
    if plain:
        assert both_witnesses(sse.frame(name, {}), [])[0] == [(name, "{}", "")]
    else:
        with pytest.raises(ValueError, match="not a name"):
            sse.frame(name, {})
        with pytest.raises(ValueError, match="not a name"):
            sse.text_frame(name, "")


def test_the_second_witness_is_not_blind() -> None:
    """It reads what the specification's own examples say, and refuses what is no event stream."""
    example = b"data: YHOO\ndata: +2\ndata: 10\n\n: test stream\n\ndata: first event\nid: 1\n\ndata:second event\nid\n\ndata:  third event\n\n"
    assert by_the_grammar(example)[0] == [
        ("message", "YHOO\n+2\n10", ""), ("message", "first event", "1"), ("message", "second event", ""), ("message", " third event", ""),
    ]  # fmt: skip
    assert by_the_grammar(b"data\n\ndata\ndata\n\ndata:test\n\ndata: test\n\n")[0] == [
        ("message", data, "") for data in ("", "\n", "test", "test")
    ]
    with pytest.raises(AssertionError):
        by_the_grammar(b"data: cut off")
