"""Escape sequences out of what a program wrote: ECMA-48, section 5, and the strings of xterm's ctlseqs. 7-bit, as programs that write UTF-8 send them.

A piece may be cut anywhere. What can still become a sequence, or a character, is held back until it is known what it is; so the text is the
same however the bytes were cut.
"""

from __future__ import annotations

import codecs
import re

#: A string (a window title, an image) that is longer is given up: so much of it is dropped, and what follows is text.
LONGEST = 16_384

# A group matches where a sequence is complete. One that breaks off in the middle, because something follows that cannot belong to it, is dropped as
# far as it went.
_SEQUENCE = re.compile(
    rb"\x1b(?:"
    rb"\[[0-?]{0,256}[ -/]{0,16}([@-~])?"  # control sequences: colours, movements
    rb"|\][^\x07\x18\x1a\x1b]{0,%d}(\x07|\x1b\\|[\x18\x1a])?"  # OSC: titles, links
    rb"|[PX^_][^\x18\x1a\x1b]{0,%d}(\x1b\\|[\x18\x1a])?"  # DCS, SOS, PM, APC
    rb"|[ -/]{1,16}([0-~])?"  # character sets
    rb"|([0-~])"
    rb"|)" % (LONGEST, LONGEST)
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


class Stripper:
    """Takes pieces of bytes, gives them without the sequences, wherever the pieces were cut."""

    def __init__(self) -> None:
        self._held = b""

    def feed(self, data: bytes) -> bytes:
        """The next piece. What may be the beginning of a sequence comes with a later one, or not at all."""
        data = self._held + data
        end = len(data)
        for found in _SEQUENCE.finditer(data):
            if found.end() == len(data) and found.lastindex is None:
                end = found.start()
        self._held = data[end:]
        return _SEQUENCE.sub(b"", data[:end])
