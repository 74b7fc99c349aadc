"""Text without escape sequences: the same, however the bytes were cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from connections.terminal.ansi import LONGEST_TEXT, plain

#: What programs write, whole and in ruins.
PARTS = [
    b"text", b"\r\n", b"\x1b[31m", b"\x1b[0m", b"\x1b[2K", b"\x1b[?25l", b"\x1b[38;2;1;2;3m", b"\x1b(B", b"\x1bM", b"\x1b", b"\x1b[", b"\x1b[3",
    b"\x1b]0;title\x07", b"\x1b]8;;http://x\x1b\\", b"\x1b]0;never ended", b"\x1bPq#0\x1b\\", b"\x1b\\", b"\x18", b"\x07", b"[31m", b"m",
    "é€🙂".encode(), b"\xe2\x82", b"\xf0\x9f", b"\xff", b"\x80", b"\x1b\x1b[1m", b"\x1b[1\n2m",
]  # fmt: skip
WRITTEN = st.lists(st.sampled_from(PARTS) | st.binary(max_size=4), max_size=30).map(b"".join)
CUTS = st.lists(st.integers(min_value=1, max_value=9), min_size=1, max_size=60)


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    found, place = [], 0
    for size in cuts * (len(data) // sum(cuts) + 1):
        found.append(data[place : place + size])
        place += size
    return found


@given(WRITTEN, CUTS)
def test_the_text_is_the_same_however_the_bytes_were_cut(data: bytes, cuts: list[int]) -> None:
    """As the streams do it: whoever comes back begins where the text that they have ends."""
    whole, used = plain(data, final=True)
    assert used == len(data)
    text, start, known = "", 0, 0
    for piece in pieces(data, cuts):
        known += len(piece)
        more, used = plain(data[start:known])
        text, start = text + more, start + used
        assert known - start <= LONGEST_TEXT + 300
    more, _ = plain(data[start:], final=True)
    assert text + more == whole
    assert "\x1b" not in whole


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"\x1b[1;31mred\x1b[0m plain", "red plain"),
        (b"\x1b]0;a title\x07$ ", "$ "),
        (b"\x1b]8;;http://example.com\x1b\\link\x1b]8;;\x1b\\", "link"),
        (b"\x1bP1$r0m\x1b\\after", "after"),
        (b"\x1b(Bascii\x1b=", "ascii"),
        (b"\x1b[3\nJ", "\nJ"),
        ("\x1b[32m✔ größer\x1b[0m".encode(), "✔ größer"),
        (b"\xe2\x82\x1b[0m\xac", "�" * 2),
        (b"100%\r\x1b[K", "100%\r"),
    ],
)
def test_what_is_no_text_is_gone(data: bytes, text: str) -> None:
    assert plain(data, final=True) == (text, len(data))


def test_a_string_without_an_end_is_given_up_and_does_not_swallow_the_rest() -> None:
    data = b"\x1b]0;" + b"x" * (3 * LONGEST_TEXT)
    assert plain(data + b"end", final=False)[0].endswith("end")
    assert plain(b"\x1b]0;" + b"x" * 100) == ("", 0)
