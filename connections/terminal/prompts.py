"""What a program that waits seems to ask: known kinds of questions become answers to click on.

Only what is meant for a person to answer counts: a question with ``[y/n]`` at the end of the output, a numbered menu in which a caret shows
the present choice, a terminal with its echo switched off. A list of numbered lines is text (row C53).
"""

from __future__ import annotations

import re
from typing import Any

from connections.terminal import ansi

#: How much of the end of the output is looked at, in bytes.
LOOK_BYTES = 8192
TEXT_LENGTH = 500
#: Of a line its end is enough: no terminal shows a question that is longer.
LINE_LENGTH = 1000

_YES_NO = re.compile(
    r"[\[(](?P<yes>y|yes)\s*[/|]\s*(?P<no>n|no)(?:\s*/\S*?)?[\])]\s*(?:\(default[^)]*\)\s*)?[?:>]*\s*\Z",
    re.IGNORECASE,
)
_CARETS = "❯➜▶►›»→>*"
_CHOICE = re.compile(
    rf"^(?P<before>[\s│|]*)(?P<caret>[{_CARETS}])?(?P<space>\s*)(?P<number>\d{{1,2}})[.)]\s+(?P<label>\S.*?)[\s│|]*$"
)
#: Lines under a menu that belong to it: hints, frames, nothing.
_HINT_LINES = 4
_CHOICE_LINES = 20
#: The cursor goes to another line, as programs do that draw the whole screen.
_JUMP = re.compile(rb"\x1b\[[0-9;]*[HfdEF]")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


def screen_lines(output: bytes) -> list[str]:
    """The end of the output as lines of text: no escape sequences, and what a line was overwritten with (``\\r``) instead of what it was."""
    text, _ = ansi.plain(_JUMP.sub(b"\n", output), final=True)
    lines = []
    for line in text.replace("\r\n", "\n").split("\n"):
        parts = [part for part in _rubbed_out(line).split("\r") if part]
        # The patterns below take a time that grows with the square of the length, and they run in the event loop of the worker.
        lines.append(_CONTROL.sub("", parts[-1] if parts else "").rstrip(" ")[-LINE_LENGTH:])
    return lines


def _rubbed_out(line: str) -> str:
    """What is left of a line in which backspaces take back the character before them."""
    if "\x08" not in line:
        return line
    left: list[str] = []
    for character in line:
        if character != "\x08":
            left.append(character)
        elif left:
            left.pop()
    return "".join(left)


def recognise(output: bytes, *, secret: bool = False) -> dict[str, Any]:
    """What is asked at the end of ``output``: ``{"kind", "text", "replies"}`` of ``payloads.PromptShape``.

    :param secret: what is typed is not shown.
    """
    lines = screen_lines(output[-LOOK_BYTES:])
    while lines and not lines[-1].strip():
        lines.pop()
    last = lines[-1].strip() if lines else ""
    if secret:
        return _prompt("password", last)
    yes_no = _YES_NO.search(last)
    if yes_no:
        replies = [
            {"label": "Yes", "text": yes_no["yes"].lower()},
            {"label": "No", "text": yes_no["no"].lower()},
        ]
        return _prompt("yes_no", last, replies)
    return _menu(lines) or _prompt("text", last)


def _prompt(kind: str, text: str, replies: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    return {"kind": kind, "text": text[-TEXT_LENGTH:], "replies": replies or []}


def _menu(lines: list[str]) -> dict[str, Any] | None:
    """The last block of numbered lines, if one of them has the caret and little comes after it."""
    bottom = next(
        (
            at
            for at in range(len(lines) - 1, max(-1, len(lines) - 2 - _HINT_LINES), -1)
            if _CHOICE.match(lines[at])
        ),
        None,
    )
    if bottom is None:
        return None
    choices: list[re.Match[str]] = []
    top = bottom
    for at in range(bottom, max(-1, bottom - _CHOICE_LINES * 2), -1):
        found = _CHOICE.match(lines[at])
        if found is None:
            # A choice may have a second line, which stands further in than its number.
            indented = choices and len(lines[at]) - len(lines[at].lstrip(" │|")) > choices[0].start("number")
            if indented:
                continue
            break
        choices.insert(0, found)
        top = at
        if found["number"] == "1":
            break
    numbers = [int(found["number"]) for found in choices]
    carets = [at for at, found in enumerate(choices) if found["caret"]]
    if numbers != list(range(1, len(numbers) + 1)) or len(numbers) < 2 or len(carets) != 1:
        return None
    present = carets[0]
    replies = []
    for at, found in enumerate(choices):
        steps = ["down" if at > present else "up"] * abs(at - present)
        replies.append(
            {"label": f"{found['number']}. {found['label'].strip()}"[:100], "keys": [*steps, "enter"]}
        )
    question = next(
        (line.strip(" │|") for line in reversed(lines[max(0, top - 3) : top]) if line.strip(" │|╭─╮")), ""
    )
    return _prompt("menu", question or choices[present]["label"].strip(), replies)
