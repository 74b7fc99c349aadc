"""Row C53: known questions become answers to click on, and ordinary text does not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from connections.terminal.prompts import LINE_LENGTH, LOOK_BYTES, TEXT_LENGTH, recognise, screen_lines


@pytest.mark.parametrize(
    ("line", "yes", "no"),
    [
        ("Overwrite? [y/N] ", "y", "n"),
        ("Continue (Y/n)? ", "y", "n"),
        ("Proceed ([y]/n)?", None, None),
        ("Do you want to continue? [Y/n]", "y", "n"),
        ("Are you sure you want to continue connecting (yes/no/[fingerprint])? ", "yes", "no"),
        ("Remove all? (yes/no): ", "yes", "no"),
        ("Delete [y/n] (default n): ", "y", "n"),
        ("\x1b[1mReally?\x1b[0m \x1b[2m[y/N]\x1b[0m \x1b[?25h", "y", "n"),
    ],
)
def test_C53_yes_or_no(line: str, yes: str | None, no: str | None) -> None:
    found = recognise(f"some output\r\n{line}".encode())
    if yes is None:
        assert found["kind"] == "text"
    else:
        assert found["kind"] == "yes_no"
        assert found["replies"] == [{"label": "Yes", "text": yes}, {"label": "No", "text": no}]


MENU = "Do you want to make this edit?\r\n❯ 1. Yes\r\n  2. Yes, and do not ask again\r\n  3. No (esc)\r\n"


def test_C53_a_numbered_menu_with_a_caret_is_answered_with_keys() -> None:
    found = recognise(MENU.encode())
    assert (found["kind"], found["text"]) == ("menu", "Do you want to make this edit?")
    assert found["replies"] == [
        {"label": "1. Yes", "keys": ["enter"]},
        {"label": "2. Yes, and do not ask again", "keys": ["down", "enter"]},
        {"label": "3. No (esc)", "keys": ["down", "down", "enter"]},
    ]


def test_C53_a_menu_in_a_frame_with_a_hint_whose_caret_has_moved() -> None:
    drawn = (
        "╭──────────╮\r\n│ Pick one │\r\n│   1) red │\r\n│ > 2) blue │\r\n│     the colour of the sky │\r\n│   3) green │\r\n╰──────────╯\r\n"
        "  Enter to select · Esc to cancel\r\n"
    )
    found = recognise(drawn.encode())
    assert (found["kind"], found["text"]) == ("menu", "Pick one")
    assert [reply["keys"] for reply in found["replies"]] == [["up", "enter"], ["enter"], ["down", "enter"]]


def test_C53_only_the_last_drawing_of_a_menu_counts() -> None:
    again = MENU.replace("❯ 1", "  1").replace("  2", "❯ 2")
    found = recognise((MENU + "\x1b[4A" + again).encode())
    assert found["replies"][0]["keys"] == ["up", "enter"]


@pytest.mark.parametrize(
    "text",
    [
        "Steps:\r\n 1. Install\r\n 2. Run\r\n",
        "1. First\r\n2. Second\r\n> ",
        "> 1. quoted\r\n> 2. from a mail\r\n",
        "> 1. quoted once\r\n",
        "version 2. of 3. things\r\n$ ",
        "[1/3] Compiling (y/n is not asked here) ...\r\n",
        "❯ 1. Yes\r\n  2. No\r\nand then a lot\r\nof other\r\nlines came\r\nso it is over\r\nlong ago\r\n$ ",
    ],
)  # fmt: skip
def test_C53_ordinary_numbered_text_is_no_prompt(text: str) -> None:
    found = recognise(text.encode())
    assert (found["kind"], found["replies"]) == ("text", [])


def test_a_password_is_told_by_its_label_alone() -> None:
    found = recognise(b"[y/N] 1. x\r\n[sudo] password for alice: ", secret=True)
    assert found == {"kind": "password", "text": "[sudo] password for alice:", "replies": []}


def test_lines_are_what_is_seen_of_them() -> None:
    assert screen_lines(b"10%\r50%\r100%\r\nabc\b\bX\r\n\x1b[2Kdone\x07") == ["100%", "aX", "done"]
    assert screen_lines(b"top\x1b[24;1Hbottom") == ["top", "bottom"]


def test_backspaces_take_back_what_is_before_them_however_many_there_are() -> None:
    assert screen_lines(b"\b\babc\b\b\b\b\bxy\bz") == ["xz"]
    # A pass over the line for each of them would take seconds, in the event loop of the worker.
    assert screen_lines(b"a" * 4000 + b"\b" * 3999) == ["a"]


@pytest.mark.parametrize(
    "line",
    [b"[y/n]" + b" " * LOOK_BYTES + b"x", b" " * LOOK_BYTES + b"x", b"> 1. x" + b" " * LOOK_BYTES + b"x"],
)
def test_of_a_line_that_never_ends_no_more_than_its_end_is_looked_at(line: bytes) -> None:
    assert [len(each) for each in screen_lines(line)] == [LINE_LENGTH]
    assert recognise(line)["kind"] == "text"
    assert recognise(b"\x1b[2m" + b"." * LOOK_BYTES + b"Go on? [y/n] ")["kind"] == "yes_no"


@given(st.binary(max_size=400), st.booleans())
def test_whatever_was_written_there_is_a_prompt_fit_to_be_shown(output: bytes, secret: bool) -> None:
    found = recognise(output * 30, secret=secret)
    assert found["kind"] in ("yes_no", "menu", "password", "text")
    assert len(found["text"]) <= TEXT_LENGTH
    assert not {"\x1b", "\0"} & set(found["text"])


def test_only_the_end_is_looked_at() -> None:
    assert recognise(b"[y/N]" + b"\n" * LOOK_BYTES)["text"] == ""
