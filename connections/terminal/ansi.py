"""Escape sequences in what a program writes (ECMA-48, xterm's ctlseqs): taken out, or listened to. Fed in pieces that may be cut anywhere."""

from __future__ import annotations

import codecs
import enum
import re

_ESCAPE = 0x1B
#: A text inside of a sequence (a title, a link, a picture) that is longer than this was none, but bytes that looked like it.
STRING_BYTES = 1 << 16

_PARAMETERS = re.compile(rb"[\x20-\x3f]*")
_INTERMEDIATES = re.compile(rb"[\x20-\x2f]*")
#: What ends such a text: BEL, ESC (of ST), CAN, SUB.
_STRING_END = re.compile(rb"[\x07\x1b\x18\x1a]")


class _State(enum.Enum):
    GROUND = enum.auto()
    ESCAPE = enum.auto()
    INTERMEDIATE = enum.auto()
    CSI = enum.auto()
    STRING = enum.auto()
    STRING_ESCAPE = enum.auto()


class Stripper:
    """Takes escape sequences out. What is between them comes out unchanged: line ends, tabs, bytes of any kind."""

    def __init__(self) -> None:
        self._state = _State.GROUND
        self._length = 0

    def feed(self, data: bytes) -> bytes:
        """The plain part of what has come."""
        plain: list[bytes] = []
        at, end = 0, len(data)
        while at < end:
            match self._state:
                case _State.GROUND:
                    start = data.find(_ESCAPE, at)
                    plain.append(data[at : start if start >= 0 else end])
                    if start < 0:
                        break
                    at, self._state = start + 1, _State.ESCAPE
                case _State.ESCAPE:
                    at = self._after_escape(data[at], at)
                case _State.CSI | _State.INTERMEDIATE:
                    pattern = _PARAMETERS if self._state is _State.CSI else _INTERMEDIATES
                    found = pattern.match(data, at)
                    assert found is not None
                    at = found.end()
                    if at < end:
                        lowest = 0x40 if self._state is _State.CSI else 0x30
                        # Anything but a last character breaks it off, and is not part of it.
                        at += lowest <= data[at] <= 0x7E
                        self._state = _State.GROUND
                case _State.STRING:
                    at = self._in_string(data, at)
                case _State.STRING_ESCAPE:
                    ended = data[at] == ord("\\")
                    at += ended
                    self._state = _State.GROUND if ended else _State.ESCAPE
        return b"".join(plain)

    def _after_escape(self, character: int, at: int) -> int:
        if character == ord("["):
            self._state = _State.CSI
        elif character in b"]PX^_":
            self._state, self._length = _State.STRING, 0
        elif 0x20 <= character <= 0x2F:
            self._state = _State.INTERMEDIATE
        elif character == _ESCAPE:
            return at + 1
        else:
            self._state = _State.GROUND
            if not 0x30 <= character <= 0x7E:
                # Not part of a sequence.
                return at
        return at + 1

    def _in_string(self, data: bytes, at: int) -> int:
        limit = at + STRING_BYTES - self._length
        found = _STRING_END.search(data, at, min(limit, len(data)))
        if found is None:
            stop = min(limit, len(data))
            self._length += stop - at
            if stop == limit:
                self._state = _State.GROUND
            return stop
        self._state = _State.STRING_ESCAPE if found[0] == b"\x1b" else _State.GROUND
        return found.end()


def strip(data: bytes) -> bytes:
    """All of it at once."""
    return Stripper().feed(data)


_MODE = re.compile(rb"\x1b(?:\[\?([0-9;]{1,60})([hl])|(c))")
_MODE_CUT = re.compile(rb"\x1b(?:\[(?:\?[0-9;]{0,60})?)?\Z")


class Modes:
    """What a program has asked its terminal for, as far as it changes what typing sends."""

    def __init__(self) -> None:
        #: DEC private mode 2004: a text that is pasted comes between marks.
        self.bracketed_paste = False
        #: DECCKM: cursor keys send other sequences.
        self.application_keys = False
        self._held = b""

    def feed(self, data: bytes) -> None:
        data = self._held + data
        self._held = b""
        for wanted, switch, reset in _MODE.findall(data):
            if reset:
                self.bracketed_paste = self.application_keys = False
                continue
            numbers = wanted.split(b";")
            if b"2004" in numbers:
                self.bracketed_paste = switch == b"h"
            if b"1" in numbers:
                self.application_keys = switch == b"h"
        cut = _MODE_CUT.search(data, max(0, len(data) - 64))
        if cut:
            self._held = cut[0]


# ── A piece that stands for itself ─────────────────────────────────────────────────────────────────────────────────

#: A string (a window title, an image) that is longer is given up: so much of it is dropped, and what follows is text.
LONGEST_TEXT = 16_384

# A group matches where a sequence is complete. One that breaks off in the middle, because something follows that cannot belong to it, is dropped as
# far as it went.
_SEQUENCE = re.compile(
    rb"\x1b(?:"
    rb"\[[0-?]{0,256}[ -/]{0,16}([@-~])?"  # control sequences: colours, movements
    rb"|\][^\x07\x18\x1a\x1b]{0,%d}(\x07|\x1b\\|[\x18\x1a])?"  # OSC: titles, links
    rb"|[PX^_][^\x18\x1a\x1b]{0,%d}(\x1b\\|[\x18\x1a])?"  # DCS, SOS, PM, APC
    rb"|[ -/]{1,16}([0-~])?"  # character sets
    rb"|([0-~])"
    rb"|)" % (LONGEST_TEXT, LONGEST_TEXT)
)


def plain(data: bytes, *, final: bool = False) -> tuple[str, int]:
    """The text of a piece that begins outside of any sequence, and how many of its bytes that is: the next piece begins there.

    What is left over is at most a sequence, or a character, of which the end has not come. ``final``: it will not come. Bytes that are no UTF-8
    become U+FFFD; a sequence in the middle of a character ends it.
    """
    runs, place, end = [], 0, len(data)
    for found in _SEQUENCE.finditer(data):
        runs.append(data[place : found.start()].decode("utf-8", "replace"))
        place = found.end()
        if place == len(data) and found.lastindex is None and not final:
            return "".join(runs), found.start()
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    runs.append(decoder.decode(data[place:], final))
    end -= len(decoder.getstate()[0])
    return "".join(runs), end
