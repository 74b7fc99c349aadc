"""What processes cost: CPU time to the nanosecond, resident memory, threads, descriptors. Read from the kernel (Linux)."""

from __future__ import annotations

import contextlib
import os
import platform
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_TICK = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


def _stat(pid: int) -> list[str]:
    """The fields of ``/proc/PID/stat`` after the name: [0] state, [1] parent, [13] and [14] time of waited-for children."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def family(pid: int) -> list[int]:
    """The process and all that descend from it."""
    parents: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError, IndexError, ValueError):
                parents.setdefault(int(_stat(int(entry))[1]), []).append(int(entry))
    found, todo = [], [pid]
    while todo:
        one = todo.pop()
        found.append(one)
        todo.extend(parents.get(one, []))
    return found


def cpu_ns(pids: Iterable[int]) -> int:
    """CPU time of these processes, their descendants, and descendants that have ended, in nanoseconds.

    The clock of another process (clock_getcpuclockid(3)) counts all its threads, those that have ended included; ``/proc/PID/stat``
    would count in hundredths of a second, too coarse for a burst.
    """
    total = 0
    for root in pids:
        for pid in family(root):
            with contextlib.suppress(OSError):
                total += time.clock_gettime_ns((~pid << 3) | 2)
                total += sum(int(field) for field in _stat(pid)[13:15]) * (1_000_000_000 // _TICK)
    return total


def rss(pids: Iterable[int]) -> int:
    """Resident bytes, descendants included."""
    total = 0
    for root in pids:
        for pid in family(root):
            with contextlib.suppress(OSError):
                total += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE
    return total


def threads(pids: Iterable[int]) -> int:
    total = 0
    for root in pids:
        for pid in family(root):
            with contextlib.suppress(OSError):
                total += len(os.listdir(f"/proc/{pid}/task"))
    return total


def descriptors(pids: Iterable[int]) -> int:
    total = 0
    for root in pids:
        for pid in family(root):
            with contextlib.suppress(OSError):
                total += len(os.listdir(f"/proc/{pid}/fd"))
    return total


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    model = ""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    return {
        "processor": model or platform.processor(),
        "processors": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }
