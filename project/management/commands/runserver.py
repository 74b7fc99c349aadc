"""``manage.py runserver``: Daphne's development server, with this project's own server in it."""

from __future__ import annotations

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

    def inner_run(self, *args: Any, **options: Any) -> None:
        try:
            super().inner_run(*args, **options)
        finally:
            self._ended.set()

    def run(self, **options: Any) -> None:
        """Under the reloader the server runs in a thread beside this one, which ends by an exception for a reload, SIGTERM and Ctrl-C."""
        try:
            super().run(**options)
        finally:
            if reactor.running:  # type: ignore[attr-defined]
                reactor.callFromThread(reactor.stop)  # type: ignore[attr-defined,misc]
                self._ended.wait(END_SECONDS)
