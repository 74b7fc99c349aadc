"""A process that writes to the log, as the tests of its order need it: ``python -m tests.live.writer``.

It is configured by the environment like every other process (``DATABASE_URL``), uses :func:`events.log.append`, and has two ways.

``--script``: each line of the input is ``<session> <word> [number]``, carried out in that session's own thread and connection, and is
answered by one line ``<session> <word> <result>`` when it is done: begin, append (result: the id), savepoint, back (to the
savepoint), change (a row of its own, without an event), look (how many events it sees), commit, rollback.

``--seconds 20 --threads 4``: random transactions until then: of one to three events, held for 0 to 4 ms and now and then for 150, some
of them rolled back, some with a savepoint that is. Prints ``READY`` before the first and ``DONE <events that were committed>`` at the end.
"""

# ruff: noqa: E402  (Django must be set up before the rest is imported)
from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import os
import queue
import random
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "project.settings")

import django

django.setup()

from django.contrib.auth.models import User
from django.db import close_old_connections, connection, transaction

from events import log
from events.envelope import Change
from events.models import Event


def change(owner: int, topic: str, number: int, fill: int = 0) -> Change:
    return Change(
        name="task.updated",
        topic=f"task:{topic}",
        audience=owner,
        object_id=topic,
        version=number,
        at=dt.datetime.now(dt.UTC),
        actor="writer",
        data={"id": topic, "version": number, **({"fill": "x" * fill} if fill else {})},
    )


# ── By script ──


class Session:
    """One thread with one database connection; does what it is told, in turn."""

    def __init__(self, name: str, owner: int) -> None:
        self.name = name
        self.owner = owner
        self.words: queue.Queue[tuple[str, int] | None] = queue.Queue()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        blocks: list[transaction.Atomic] = []
        while (order := self.words.get()) is not None:
            word, number = order
            try:
                result = self._do(word, number, blocks)
            except Exception as error:
                result = f"failed {type(error).__name__}"
            # In one piece: what print() writes word by word mixes with the line of another session.
            sys.stdout.write(f"{self.name} {word} {result}\n")
            sys.stdout.flush()
        connection.close()

    def _do(self, word: str, number: int, blocks: list[transaction.Atomic]) -> object:
        if word in ("begin", "savepoint"):
            blocks.append(transaction.atomic())
            blocks[-1].__enter__()
        elif word == "commit":
            blocks.pop().__exit__(None, None, None)
        elif word in ("rollback", "back"):
            error = RuntimeError("as the script wants it")
            blocks.pop().__exit__(RuntimeError, error, None)
        elif word == "append":
            return log.append(change(self.owner, f"script-{self.name}", number)).id
        elif word == "change":
            User.objects.filter(pk=self.owner).update(first_name=str(number))
        elif word == "look":
            return Event.objects.count()
        return "done"


def follow_script(owner: int) -> None:
    sessions: dict[str, Session] = {}
    print("READY", flush=True)
    for line in sys.stdin:
        name, word, *numbers = line.split()
        session = sessions.get(name) or sessions.setdefault(name, Session(name, owner))
        session.words.put((word, int(numbers[0]) if numbers else 0))
    for session in sessions.values():
        session.words.put(None)


# ── At random ──


class RollBack(Exception):
    pass


def write_at_random(owner: int, name: str, end: float) -> int:
    lots = random.Random(name)
    count = number = 0
    while time.monotonic() < end:
        appended = 0
        with contextlib.suppress(RollBack), transaction.atomic():
            if lots.random() < 0.2:
                with contextlib.suppress(RollBack), transaction.atomic():
                    log.append(change(owner, name, number))
                    raise RollBack
            for _ in range(lots.choice((1, 1, 2, 3))):
                number += 1
                appended += 1
                log.append(change(owner, name, number, lots.choice((0, 10, 500))))
                time.sleep(lots.uniform(0, 0.004))
            if lots.random() < 0.01:
                time.sleep(0.15)
            if lots.random() < 0.1:
                raise RollBack
            count += appended
        # Now and then a connection of its own: a pool hands out the same ones, a new one draws from the same sequence.
        close_old_connections()
    connection.close()
    return count


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--script", action="store_true")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--name", default="w")
    parser.add_argument("--owner", default="admin")
    options = parser.parse_args()
    owner = User.objects.get(username=options.owner).pk
    connection.close()
    if options.script:
        follow_script(owner)
        return
    print("READY", flush=True)
    sys.stdin.readline()
    end = time.monotonic() + options.seconds
    with ThreadPoolExecutor(options.threads) as threads:
        jobs = [
            threads.submit(write_at_random, owner, f"{options.name}{number}", end)
            for number in range(options.threads)
        ]
        print("DONE", sum(job.result() for job in jobs), flush=True)


if __name__ == "__main__":
    main()
