"""``manage.py runserver``: Daphne's development server, with this project's own server in it."""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import Any

from daphne.management.commands.runserver import Command as DaphneCommand

# Its reactor, too: Daphne's server has to be the first to ask for one.
from project.server import Server, reactor

#: How long a reload waits for the server's orderly end.
END_SECONDS = 10


class Command(DaphneCommand):
    help = (
        "Serve this installation and start anew when the code changes; streams have the back-pressure and the orderly end of "
        "the real server. The worker is a program of its own: manage.py run_worker."
    )
    server_cls = Server

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._ended = threading.Event()
        self._interrupted = False

    def inner_run(self, *args: Any, **options: Any) -> None:
        try:
            super().inner_run(*args, **options)
        finally:
            self._ended.set()
            if self._interrupted:
                # The server has ended in order. The other thread looks at files and would go on with that.
                sys.stdout.flush()
                os._exit(0)

    def run(self, **options: Any) -> None:
        """Under the reloader the server runs in a thread beside this one, which ends by an exception for a reload and SIGTERM."""
        if options["use_reloader"]:
            signal.signal(signal.SIGINT, self._interrupt)
        try:
            super().run(**options)
        finally:
            if reactor.running:  # type: ignore[attr-defined]
                reactor.callFromThread(reactor.stop)  # type: ignore[attr-defined,misc]
                self._ended.wait(END_SECONDS)

    def _interrupt(self, number: int, frame: Any) -> None:
        """Ctrl-C. Not by an exception in this thread: one that happens upon a callback of a weak reference is printed and dropped."""
        if not reactor.running:  # type: ignore[attr-defined]
            raise KeyboardInterrupt
        if not self._interrupted:
            self._interrupted = True
            reactor.callFromThread(reactor.stop)  # type: ignore[attr-defined,misc]
