"""Escape sequences in what a program writes (ECMA-48, xterm's ctlseqs): taken out (:func:`plain`), or listened to (:class:`Modes`)."""

from __future__ import annotations

import codecs
import re

_MODE = re.compile(rb"\x1b(?:\[\?([0-9;]{1,60})([hl])|(c))")
_MODE_CUT = re.compile(rb"\x1b(?:\[(?:\?[0-9;]{0,60})?)?\Z")


class Modes:
    """What a program has asked its terminal for, as far as it changes what typing sends. Fed in pieces that may be cut anywhere."""

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
