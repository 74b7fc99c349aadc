"""A client of ``/api/events`` as one should be; also as a process: ``python -m tests.live.follower --after 17 URL ...``.

It keeps its cursor, takes silence for a broken line, and comes back by itself after every end and every fault. Knows no Django, so that the process
starts at once. The process takes the key from ``KEY``, prints ``<its clock> <id>`` for every event, and goes when its input is closed.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import os
import random
import socket
import ssl
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Self
from urllib.parse import urlsplit

from events.sse import Parser


class Follower:
    """``seen``: ids of the log in the order of arrival, all of them after ``after``.

    ``urls`` are bases of servers that it goes to in turn. ``silence`` is in seconds: more than two heartbeats. ``opened`` counts its streams, ``faults``
    lines that broke, ``refused`` answers that were no stream (by status), ``ends`` orderly ends and ``resets`` (by reason).
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        key: str,
        after: int,
        silence: float,
        told: Callable[[int], None] | None = None,
    ) -> None:
        self.seen: list[int] = []
        self.cursor = after
        self.opened = 0
        self.faults = 0
        self.refused: Counter[int] = Counter()
        self.heartbeats = 0
        self.ends: Counter[str] = Counter()
        self.resets: Counter[str] = Counter()
        self._urls = list(urls)
        self._key = key
        self._silence = silence
        self._told = told
        self._stopped = threading.Event()
        self._socket: socket.socket | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def __repr__(self) -> str:
        shown = ("cursor", "opened", "faults", "refused", "heartbeats", "ends", "resets")
        return f"{self._urls} {len(self.seen)} seen, " + ", ".join(f"{x} {getattr(self, x)}" for x in shown)

    def stop(self) -> None:
        self._stopped.set()
        line = self._socket
        if line is not None:
            with contextlib.suppress(OSError):
                line.shutdown(socket.SHUT_RDWR)
        self._thread.join(self._silence + 5)
        assert not self._thread.is_alive(), "a follower does not stop"

    def _run(self) -> None:
        turn = 0
        while not self._stopped.is_set():
            try:
                self._follow(self._urls[turn % len(self._urls)])
            except (OSError, http.client.HTTPException):
                self.faults += 1
            self._socket = None
            turn += 1
            # As "retry:" asks for it, only sooner; not all at the same moment.
            self._stopped.wait(random.uniform(0.05, 0.3))

    def _follow(self, url: str) -> None:
        with contextlib.closing(self._connection(url)) as connection:
            headers = {
                "Accept": "text/event-stream",
                "Authorization": f"Bearer {self._key}",
                "Last-Event-ID": str(self.cursor),
            }
            connection.request("GET", "/api/events", headers=headers)
            self._socket = connection.sock
            answer = connection.getresponse()
            if answer.status != 200:
                self.refused[answer.status] += 1
                return
            self.opened += 1
            parser = Parser()
            while not self._stopped.is_set() and (chunk := answer.read1(65536)):
                for event in parser.feed(chunk):
                    if "." in event.name:
                        self.cursor = int(event.id)
                        self.seen.append(self.cursor)
                        if self._told is not None:
                            self._told(self.cursor)
                    elif event.name == "heartbeat":
                        self.heartbeats += 1
                    elif event.name in ("end", "reset"):
                        kind = self.ends if event.name == "end" else self.resets
                        kind[event.json()["reason"]] += 1

    def _connection(self, url: str) -> http.client.HTTPConnection:
        parts = urlsplit(url)
        assert parts.hostname is not None
        if parts.scheme == "http":
            return http.client.HTTPConnection(parts.hostname, parts.port, timeout=self._silence)
        context: Any = ssl.create_default_context()
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        return http.client.HTTPSConnection(parts.hostname, parts.port, timeout=self._silence, context=context)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("urls", nargs="+")
    parser.add_argument("--after", type=int, required=True)
    parser.add_argument("--silence", type=float, required=True)
    options = parser.parse_args()
    with Follower(
        options.urls,
        key=os.environ["KEY"],
        after=options.after,
        silence=options.silence,
        told=lambda cursor: print(time.time(), cursor, flush=True),
    ):
        sys.stdin.read()


if __name__ == "__main__":
    main()
