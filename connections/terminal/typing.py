"""What has to be written to a terminal so that the program behind it reads exactly a text.

A terminal is not a pipe. In canonical mode (the ordinary one, in which lines can be edited) it acts on control characters, and drops what a line
has beyond 4,095 bytes. So control characters are quoted with VLNEXT (``^V``), and a long line is handed over in parts with VEOF (``^D``): the program reads
them one after the other, as it would read from a pipe. (A program that reads a terminal byte by byte, as a shell's ``read`` does, takes the end
of a part for the end of its input: for such a one a line of more than 4,000 bytes is too long.) In the other modes the program itself gets every byte, but for
those that the terminal turns into signals where the program left that on. One that asked for bracketed paste gets a text with line ends or other control
characters between its marks, so that it knows them from keys.
"""

from __future__ import annotations

import dataclasses
import re
import termios
from collections.abc import Callable, Sequence
from typing import Any

PASTE_BEGIN, PASTE_END = b"\x1b[200~", b"\x1b[201~"

#: Bytes of one part of a long line. Less than the 4,095 that the kernel keeps, and no multiple of the size of anybody's buffer: a program
#: whose read ends exactly at the end of a part reads "nothing" next, which means the end of the input.
PART_BYTES = 4001

_IFLAG, _LFLAG, _CC = 0, 3, 6
#: Controls that no terminal acts on.
_HARMLESS = frozenset(b"\t\n")
_ALL_CONTROLS = frozenset([*range(0x20), 0x7F])
_CONTROLS = _ALL_CONTROLS - _HARMLESS
_DISABLED = b"\0"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """How a terminal treats what is typed, from ``termios.tcgetattr``."""

    #: Lines are edited by the terminal, and come whole.
    canonical: bool
    echo: bool
    #: What Enter has to send.
    enter: bytes = b"\r"
    #: The character that quotes the next one; empty where nothing can be quoted.
    quote: bytes = b""
    #: The character that hands over what there is of a line; empty outside of canonical mode.
    push: bytes = b""
    #: Bytes that the terminal acts on instead of handing them over.
    special: frozenset[int] = frozenset()

    @property
    def asks_secret(self) -> bool:
        """Whether it reads as passwords are read. A program that draws its own lines switches both off."""
        return self.canonical and not self.echo


def line_of(attributes: Sequence[Any]) -> Line:
    """From what ``termios.tcgetattr`` says."""
    iflag, lflag, cc = attributes[_IFLAG], attributes[_LFLAG], attributes[_CC]
    canonical = bool(lflag & termios.ICANON)
    extended = bool(lflag & termios.IEXTEN)

    def character(index: int) -> bytes:
        found: bytes = cc[index] if isinstance(cc[index], bytes) else b""
        return found if found != _DISABLED else b""

    acting = []
    if lflag & termios.ISIG:
        acting += [termios.VINTR, termios.VQUIT, termios.VSUSP]
    if iflag & termios.IXON:
        acting += [termios.VSTART, termios.VSTOP]
    if canonical:
        acting += [termios.VERASE, termios.VKILL, termios.VEOF, termios.VEOL]
        if extended:
            acting += [termios.VWERASE, termios.VLNEXT, termios.VEOL2, termios.VREPRINT]
    special = {byte for index in acting for byte in character(index)}
    if iflag & (termios.ICRNL | termios.IGNCR):
        special.add(ord("\r"))
    if iflag & termios.INLCR:
        special.add(ord("\n"))
    newline = canonical and (iflag & termios.IGNCR or not iflag & termios.ICRNL)
    return Line(
        canonical=canonical,
        echo=bool(lflag & termios.ECHO),
        enter=b"\n" if newline else b"\r",
        quote=character(termios.VLNEXT) if canonical and extended else b"",
        push=character(termios.VEOF) if canonical else b"",
        special=frozenset(special),
    )


class Typist:
    """Types texts. Remembers how long the line is that has been begun, for it may be typed in several goes."""

    def __init__(self) -> None:
        #: How many bytes of the present line were typed since its last part was handed over.
        self.begun = 0

    def text(self, text: bytes, line: Line, *, bracketed: bool = False) -> bytes:
        """What to write so that the program reads ``text``. No Enter is added."""
        if not line.canonical:
            self.begun = 0
            # Plain words are typed, as a person would: an editor takes them for what they mean to it. With the end mark inside, the paste
            # would end early, and the rest would count as keys: then better all of it.
            if bracketed and not _ALL_CONTROLS.isdisjoint(text) and PASTE_END not in text:
                return PASTE_BEGIN + text + PASTE_END
            return text
        acting = (_CONTROLS | line.special) if line.quote else frozenset[int]()
        # A line feed that is quoted is a character like others: so it is where the terminal would have changed it.
        lines = [text] if ord("\n") in acting else text.split(b"\n")
        quoted = _quoting(acting, line.quote)
        typed = []
        for number, each in enumerate(lines):
            if number:
                self.begun = 0
            typed.append(line.push.join(quoted(part) for part in self._parts(each, line)))
        return b"\n".join(typed)

    def _parts(self, text: bytes, line: Line) -> list[bytes]:
        """The text in parts, of which the first goes on with what was typed before."""
        if not line.push or self.begun + len(text) <= PART_BYTES:
            self.begun += len(text)
            return [text]
        first = PART_BYTES - self.begun
        parts = [text[:first]]
        parts += [text[at : at + PART_BYTES] for at in range(first, len(text), PART_BYTES)]
        self.begun = len(parts[-1])
        return parts

    def enter(self, line: Line) -> bytes:
        """What finishes the line."""
        self.begun = 0
        return line.enter

    def keys(self) -> None:
        """Keys were pressed: what they did to the line is known to the terminal alone. Taken for a new line."""
        self.begun = 0


def _quoting(acting: frozenset[int], quote: bytes) -> Callable[[bytes], bytes]:
    if not acting:
        return lambda part: part
    pattern = re.compile(b"[" + b"".join(re.escape(bytes([byte])) for byte in sorted(acting)) + b"]")
    return lambda part: pattern.sub(lambda found: quote + found[0], part)
