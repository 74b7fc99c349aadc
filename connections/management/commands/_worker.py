"""A worker beside a command, for ``manage.py login --worker``."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

from django.conf import settings

STOP_SECONDS = 15


@contextlib.contextmanager
def beside(*, wanted: bool) -> Iterator[None]:
    """Run a worker for as long as the block lasts; it is asked to stop, and gives back what it holds."""
    if not wanted:
        yield
        return
    with subprocess.Popen(
        [sys.executable, str(settings.BASE_DIR / "manage.py"), "run_worker"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        # Ctrl-C is for the command: it cancels the login while there is still somebody to see to it.
        start_new_session=True,
        env={**os.environ},
    ) as process:
        try:
            yield
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
