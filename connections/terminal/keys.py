"""The keys that may be pressed, and the bytes that they send (ECMA-48, xterm's ctlseqs, "PC-Style Function Keys")."""

from __future__ import annotations

from collections.abc import Iterable

#: The allow-list: a name, and what a terminal in its ordinary mode sends for it.
KEYS: dict[str, bytes] = {
    "enter": b"\r",
    "tab": b"\t",
    "shift-tab": b"\x1b[Z",
    "escape": b"\x1b",
    "backspace": b"\x7f",
    "delete": b"\x1b[3~",
    "space": b" ",
    "up": b"\x1b[A",
    "down": b"\x1b[B",
    "right": b"\x1b[C",
    "left": b"\x1b[D",
    "home": b"\x1b[H",
    "end": b"\x1b[F",
    "page-up": b"\x1b[5~",
    "page-down": b"\x1b[6~",
    "ctrl-a": b"\x01",
    "ctrl-c": b"\x03",
    "ctrl-d": b"\x04",
    "ctrl-e": b"\x05",
    "ctrl-k": b"\x0b",
    "ctrl-l": b"\x0c",
    "ctrl-r": b"\x12",
    "ctrl-u": b"\x15",
    "ctrl-w": b"\x17",
    "ctrl-z": b"\x1a",
}

#: The same keys after a program asked for "application cursor keys" (DECCKM).
_APPLICATION: dict[str, bytes] = {
    "up": b"\x1bOA",
    "down": b"\x1bOB",
    "right": b"\x1bOC",
    "left": b"\x1bOD",
    "home": b"\x1bOH",
    "end": b"\x1bOF",
}

#: Keys that finish a line: what waits for input goes on after them.
FINISHING = frozenset({"enter", "ctrl-c", "ctrl-d"})


def pressed(names: Iterable[str], *, application: bool = False) -> bytes:
    """What pressing these keys one after the other sends.

    :raises KeyError: for a name that is not in :data:`KEYS`.
    """
    return b"".join(
        _APPLICATION[name] if application and name in _APPLICATION else KEYS[name] for name in names
    )
