"""The clock of a page, in the tests' hands.

What a machine that is busy takes to answer is real time, and the timers of a page are armed by answers. So a test that moves the clock first
stops it (or a timer fires while the test is still looking), and moves it only after what arms the timer has happened.
"""

from __future__ import annotations

import datetime as dt
from typing import Any


def stop(page: Any) -> None:
    """From the next page on, time is what ``page.clock.run_for`` makes of it; ``page.clock.resume()`` lets it go again."""
    now = dt.datetime.now(dt.UTC)
    page.clock.install(time=now)
    page.clock.pause_at(now + dt.timedelta(seconds=1))
