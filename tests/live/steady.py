"""A process that writes numbered events and lets nothing stop it: ``python -m tests.live.steady --topic steady``.

It is configured by the environment like every other process. A transaction that failed is tried again until it is in the log; one whose commit got
no answer is looked for first, so every number is there once. Prints ``READY`` before the first and, after a line of input,
``DONE <how many are in the log> <how many attempts failed>``.
"""

# ruff: noqa: E402  (Django must be set up before the rest is imported)
from __future__ import annotations

import argparse
import datetime as dt
import os
import sys
import threading
import time

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "project.settings")

import django

django.setup()

from django.contrib.auth.models import User
from django.db import Error, close_old_connections, connection, transaction

from events import log
from events.envelope import Change
from events.models import Event


def write(owner: int, topic: str, number: int, start: int) -> int:
    """Until it is in the log after ``start``; how many attempts failed."""
    failed = 0
    while True:
        try:
            close_old_connections()
            with transaction.atomic():
                mine = Event.objects.filter(id__gt=start, topic=f"task:{topic}", version=number)
                if not (failed and mine.exists()):
                    data = {"id": topic, "version": number}
                    log.append(
                        Change(
                            name="task.updated",
                            topic=f"task:{topic}",
                            audience=owner,
                            object_id=topic,
                            version=number,
                            at=dt.datetime.now(dt.UTC),
                            actor="steady",
                            data=data,
                        )
                    )
            return failed
        except Error:
            connection.close()
            failed += 1
            time.sleep(0.1)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--topic", required=True)
    parser.add_argument("--pause", type=float, default=0.02)
    options = parser.parse_args()
    owner = User.objects.get(username="admin").pk
    start = log.newest()
    told = threading.Event()

    def listen() -> None:
        sys.stdin.readline()
        told.set()

    threading.Thread(target=listen, daemon=True).start()
    print("READY", flush=True)
    number = failed = 0
    while not told.wait(options.pause):
        number += 1
        failed += write(owner, options.topic, number, start)
    print("DONE", number, failed, flush=True)


if __name__ == "__main__":
    main()
