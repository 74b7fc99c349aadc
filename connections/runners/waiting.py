"""Whether a silent program waits for somebody to type (row C57: ``sleep 200`` does not).

On Linux /proc tells what every process is blocked in. A program waits when a process of the terminal's foreground group is blocked in a read of
that terminal, or in poll, select or epoll without a timeout on a descriptor of it. One that asks with a timeout has something else to do. Where /proc
says nothing (another system, a process of somebody else such as ``sudo``), that is the answer: unknown.
"""

from __future__ import annotations

import enum
import fcntl
import os
import platform
import struct
import sys
import termios
from collections.abc import Iterator

#: What a system call reads the terminal with, by its number. The numbers differ between processors.
_CALLS: dict[str, dict[int, str]] = {
    "x86_64": {
        0: "read", 19: "read", 7: "poll", 271: "ppoll", 23: "select", 270: "select", 232: "epoll", 281: "epoll", 441: "epoll2",
    },
    "aarch64": {63: "read", 65: "read", 73: "ppoll", 72: "select", 22: "epoll", 441: "epoll2"},
}  # fmt: skip
_POLLIN = 0x0001
_EPOLLIN = 0x0001
#: More descriptors than anybody polls: a number that is larger was read wrongly.
_MANY = 4096


class Waits(enum.Enum):
    READS = "it waits in a read of its terminal"
    BUSY = "it does something else"
    UNKNOWN = "the system does not say"


def look(master: int, terminal: str) -> Waits:
    """Whether the foreground of the terminal ``terminal`` (such as ``/dev/pts/3``) with this master waits to be typed to."""
    calls = _CALLS.get(platform.machine())
    if sys.platform != "linux" or calls is None or not terminal:
        return Waits.UNKNOWN
    try:
        group = os.tcgetpgrp(master)
    except OSError:
        return Waits.UNKNOWN
    if group <= 0:
        return Waits.BUSY
    known = True
    for pid in _members(group):
        try:
            if any(_reads(pid, thread, calls, terminal) for thread in os.listdir(f"/proc/{pid}/task")):
                return Waits.READS
        except PermissionError:
            known = False
        except (OSError, ValueError, IndexError, struct.error):
            # It went on, or away, while it was looked at.
            continue
    return Waits.BUSY if known else Waits.UNKNOWN


def unread(terminal: str) -> int:
    """How many bytes were typed into this terminal that nobody has read yet, of whole lines where it edits lines; 0 where that is not known."""
    try:
        descriptor = os.open(terminal, os.O_RDONLY | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return 0
    try:
        return int(struct.unpack("i", fcntl.ioctl(descriptor, termios.FIONREAD, bytes(4)))[0])
    except OSError:
        return 0
    finally:
        os.close(descriptor)


def _members(group: int) -> Iterator[int]:
    """The processes of a group, its first one first: mostly it is the one, and the rest of /proc need not be read."""
    yield group
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) != group:
            try:
                with open(f"/proc/{name}/stat", "rb") as file:
                    # Behind the name of the program, in brackets: state, parent, group.
                    theirs = int(file.read().rpartition(b")")[2].split()[2])
            except (OSError, ValueError, IndexError):
                continue
            if theirs == group:
                yield int(name)


def _reads(pid: int, thread: str, calls: dict[int, str], terminal: str) -> bool:
    with open(f"/proc/{pid}/task/{thread}/syscall") as file:
        words = file.read().split()
    if len(words) < 7 or not words[0].isdigit():
        # "running", or "-1" with less behind it: blocked in no system call.
        return False
    call = calls.get(int(words[0]))
    arguments = [int(word, 16) for word in words[1:7]]
    match call:
        case "read":
            return _is_terminal(pid, arguments[0], terminal)
        case "poll":
            # The timeout is an int: negative means none.
            return _negative(arguments[2]) and _polls(pid, arguments[0], arguments[1], terminal)
        case "ppoll":
            return arguments[2] == 0 and _polls(pid, arguments[0], arguments[1], terminal)
        case "select":
            return arguments[4] == 0 and _selects(pid, arguments[0], arguments[1], terminal)
        case "epoll":
            return _negative(arguments[3]) and _epolls(pid, arguments[0], terminal)
        case "epoll2":
            return arguments[3] == 0 and _epolls(pid, arguments[0], terminal)
    return False


def _negative(value: int) -> bool:
    return bool(value & 0x8000_0000)


def _is_terminal(pid: int, descriptor: int, terminal: str) -> bool:
    """``/dev/tty`` is this terminal by another name: the process is in its foreground group, so it has no other."""
    try:
        return os.readlink(f"/proc/{pid}/fd/{descriptor}") in (terminal, "/dev/tty")
    except FileNotFoundError:
        return False


def _memory(pid: int, address: int, size: int) -> bytes:
    descriptor = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.pread(descriptor, size, address)
    finally:
        os.close(descriptor)


def _polls(pid: int, address: int, count: int, terminal: str) -> bool:
    """An array of ``struct pollfd {int fd; short events, revents}``."""
    if not 0 < count <= _MANY:
        return False
    found = struct.iter_unpack("=ihh", _memory(pid, address, 8 * count))
    return any(fd >= 0 and events & _POLLIN and _is_terminal(pid, fd, terminal) for fd, events, _ in found)


def _selects(pid: int, count: int, address: int, terminal: str) -> bool:
    """A set of bits, in words of the machine, which on little-endian ones is in bytes."""
    if not 0 < count <= _MANY or not address:
        return False
    bits = int.from_bytes(_memory(pid, address, (count + 63) // 64 * 8), "little")
    return any(bits >> fd & 1 and _is_terminal(pid, fd, terminal) for fd in range(count))


def _epolls(pid: int, descriptor: int, terminal: str) -> bool:
    """Lines such as ``tfd:        0 events:       19 data: ...``, the events in hexadecimal digits."""
    with open(f"/proc/{pid}/fdinfo/{descriptor}") as file:
        for line in file:
            words = line.split()
            if (
                len(words) >= 4
                and words[0] == "tfd:"
                and int(words[3], 16) & _EPOLLIN
                and _is_terminal(pid, int(words[1]), terminal)
            ):
                return True
    return False
