"""What a program asks its terminal for is noticed, wherever the bytes are cut."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from connections.terminal.ansi import Modes
from connections.terminal.keys import pressed

PARTS = st.sampled_from(
    [b"\x1b[?2004h", b"\x1b[?2004l", b"\x1b[?1h", b"\x1b[?1l", b"\x1b[?1;2004h", b"\x1b[?1049h", b"\x1bc", b"text\r\n", b"\x1b[31m", b"\x1b", b"?1h"]
)  # fmt: skip


def modes(*pieces: bytes) -> tuple[bool, bool]:
    found = Modes()
    for piece in pieces:
        found.feed(piece)
    return found.bracketed_paste, found.application_keys


@given(st.lists(PARTS, max_size=12), st.lists(st.integers(1, 7), min_size=1, max_size=20))
def test_cuts_make_no_difference(parts: list[bytes], sizes: list[int]) -> None:
    whole = b"".join(parts)
    pieces, rest = [], whole
    for size in sizes * (len(whole) // sum(sizes) + 1):
        pieces.append(rest[:size])
        rest = rest[size:]
    assert modes(*pieces, rest) == modes(whole)


def test_the_last_word_counts_and_a_reset_forgets_all() -> None:
    assert modes(b"\x1b[?2004h", b"\x1b[?1h") == (True, True)
    assert modes(b"\x1b[?1;2004h", b"\x1b[?2004l") == (False, True)
    assert modes(b"\x1b[?1;2004h\x1bc") == (False, False)
    assert modes(b"\x1b[1h\x1b[2004h") == (False, False)


def test_cursor_keys_send_what_the_program_asked_for() -> None:
    assert pressed(["up", "enter"]) == b"\x1b[A\r"
    assert pressed(["up", "enter"], application=True) == b"\x1bOA\r"
