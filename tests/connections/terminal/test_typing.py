"""What is typed arrives: through the kernel's own terminal, in every mode, byte by byte."""

from __future__ import annotations

import contextlib
import os
import pty
import select
import termios
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from connections.terminal.typing import PART_BYTES, PASTE_BEGIN, PASTE_END, Line, Typist, line_of

#: Short texts of everything, and now and then a long line.
TEXTS = st.binary(max_size=60) | st.builds(
    lambda head, size, tail: head + b"x" * size + tail,
    st.binary(max_size=9), st.integers(PART_BYTES - 3, 2 * PART_BYTES + 3), st.binary(max_size=9),
)  # fmt: skip


@contextlib.contextmanager
def terminal(**changes: Any) -> Iterator[tuple[int, int]]:
    """Master and slave; ``lflag=~termios.ECHO`` and the like take bits out of the ordinary mode, ``cc`` changes characters."""
    master, slave = pty.openpty()
    try:
        attributes = termios.tcgetattr(slave)
        for name, value in changes.items():
            if name == "cc":
                for index, character in value.items():
                    attributes[6][index] = character
            else:
                attributes[{"iflag": 0, "oflag": 1, "cflag": 2, "lflag": 3}[name]] &= value
        termios.tcsetattr(slave, termios.TCSANOW, attributes)
        os.set_blocking(master, False)
        os.set_blocking(slave, False)
        yield master, slave
    finally:
        os.close(master)
        os.close(slave)


def through(master: int, slave: int, typed: bytes, length: int) -> bytes:
    """Write to one side what the other side reads, until ``length`` bytes have come: as the worker writes and a program reads."""
    got = b""
    deadline = time.monotonic() + 20
    while len(got) < length and time.monotonic() < deadline:
        readable, writable, _ = select.select([master, slave], [master] if typed else [], [], 0.5)
        if master in readable:
            # The echo.
            with contextlib.suppress(BlockingIOError):
                os.read(master, 65536)
        if master in writable:
            with contextlib.suppress(BlockingIOError):
                typed = typed[os.write(master, typed) :]
        if slave in readable:
            with contextlib.suppress(BlockingIOError):
                got += os.read(slave, 65536)
    return got


@given(st.lists(TEXTS, min_size=1, max_size=4))
@settings(deadline=None, max_examples=60)
def test_C49_in_the_ordinary_mode_every_byte_arrives_and_acts_on_nothing(texts: list[bytes]) -> None:
    with terminal(lflag=~termios.ECHO) as (master, slave):
        line = line_of(termios.tcgetattr(master))
        typist = Typist()
        typed = b"".join(typist.text(text, line) for text in texts) + typist.enter(line)
        whole = b"".join(texts) + b"\n"
        assert through(master, slave, typed, len(whole)) == whole


@given(TEXTS)
@settings(deadline=None, max_examples=30)
def test_C49_where_line_ends_are_changed_and_characters_moved_every_byte_arrives_as_well(text: bytes) -> None:
    moved = {
        termios.VERASE: b"#",
        termios.VKILL: b"@",
        termios.VEOL: b"!",
        termios.VLNEXT: b"\x10",
        termios.VSUSP: b"\0",
    }
    with terminal(lflag=~termios.ECHO, iflag=~termios.ICRNL, cc=moved) as (master, slave):
        attributes = termios.tcgetattr(slave)
        attributes[0] |= termios.INLCR
        termios.tcsetattr(slave, termios.TCSANOW, attributes)
        line = line_of(termios.tcgetattr(master))
        typist = Typist()
        pushed = typist.text(text, line) + line.push
        if text:
            assert through(master, slave, pushed, len(text)) == text


@given(TEXTS)
@settings(deadline=None, max_examples=20)
def test_C49_a_program_that_draws_its_own_lines_gets_every_byte(text: bytes) -> None:
    with terminal(
        lflag=~(termios.ICANON | termios.ECHO | termios.ISIG | termios.IEXTEN),
        iflag=~(termios.ICRNL | termios.IXON),
    ) as (master, slave):
        line = line_of(termios.tcgetattr(master))
        assert (line.canonical, line.asks_secret, line.enter) == (False, False, b"\r")
        typed = Typist().text(text, line)
        assert typed == text
        assert through(master, slave, typed, len(text)) == text


LINE = Line(canonical=True, echo=True, quote=b"\x16", push=b"\x04", special=frozenset(b"\x03\x04\x16\r"))
RAW = Line(canonical=False, echo=False)


def test_a_long_line_is_handed_over_in_parts_also_when_it_is_typed_in_several_goes() -> None:
    typist = Typist()
    assert typist.text(b"x" * PART_BYTES, LINE) == b"x" * PART_BYTES
    assert typist.text(b"y", LINE) == b"\x04y"
    assert typist.text(b"z" * PART_BYTES, LINE) == b"z" * (PART_BYTES - 1) + b"\x04z"
    assert typist.enter(LINE) == b"\r"
    assert typist.text(b"a" * PART_BYTES + b"\nb", LINE) == b"a" * PART_BYTES + b"\nb"


def test_control_characters_are_quoted_and_line_ends_and_tabs_are_not() -> None:
    assert Typist().text(b"a\x03b\tc\nd\x1b\x7f\r", LINE) == b"a\x16\x03b\tc\nd\x16\x1b\x16\x7f\x16\r"


def test_a_text_of_several_lines_is_pasted_where_that_is_known_and_plain_words_are_typed() -> None:
    typist = Typist()
    assert typist.text(b"one\ntwo", RAW, bracketed=True) == PASTE_BEGIN + b"one\ntwo" + PASTE_END
    assert typist.text(b"one two", RAW, bracketed=True) == b"one two"
    assert typist.text(b"one\ntwo", RAW) == b"one\ntwo"
    assert typist.text(b"one\ntwo", LINE, bracketed=True) == b"one\ntwo"


def test_a_text_with_the_end_of_a_paste_in_it_cannot_break_out_of_one() -> None:
    text = b"one\n\x1b[201~rm -rf\r"
    assert Typist().text(text, RAW, bracketed=True) == text


@pytest.mark.parametrize(
    ("changes", "enter"),
    [({}, b"\r"), ({"iflag": ~termios.ICRNL}, b"\n"), ({"lflag": ~termios.ICANON}, b"\r")],
    ids=["ordinary", "no ICRNL", "keys"],
)
def test_enter_is_what_finishes_a_line_in_this_mode(changes: dict[str, int], enter: bytes) -> None:
    with terminal(**changes) as (master, _):
        assert Typist().enter(line_of(termios.tcgetattr(master))) == enter


def test_a_line_that_is_edited_and_not_shown_asks_for_a_secret() -> None:
    with terminal(lflag=~termios.ECHO) as (master, _):
        assert line_of(termios.tcgetattr(master)).asks_secret
    with terminal() as (master, _):
        assert not line_of(termios.tcgetattr(master)).asks_secret
