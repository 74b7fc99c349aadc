"""When each event of a bench is due; the same for every publisher."""

from __future__ import annotations

import time
from collections.abc import Iterator

#: Nothing is waited for longer than this: what takes longer is reported as "more than".
CAP_SECONDS = 30


def turns(first: int, count: int, rate: float) -> Iterator[tuple[int, float]]:
    """``(number, seconds to wait before it)``, ``rate`` a second (0: at once).

    It ends early when that takes CAP_SECONDS longer than it should.
    """
    start = time.monotonic()
    for seq in range(first, first + count):
        due = start + (seq - first) / rate if rate else start
        late = time.monotonic() - due
        if late > CAP_SECONDS:
            return
        yield seq, max(0.0, -late)
