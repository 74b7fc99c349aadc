"""``python -m tests.bench.queueing ends COUNT`` and ``... make -- CMD``: commands into the queue of the installation that the environment names.

``ends`` queues so many times ``true``, waits until each has ended, and prints the seconds between; ``make`` queues one command and prints its id.
"""

# ruff: noqa: E402  (Django must be set up before the rest is imported)
from __future__ import annotations

import os
import sys
import time

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "project.settings")

import django

django.setup()

from django.conf import settings
from django.contrib.auth.models import User
from django.utils import timezone

from connections import commands, tasks
from connections.access import of_system
from connections.models import Task
from connections.states import TASK_END, TaskKind


def make(argv: list[str], owner_id: int) -> Task:
    command = commands.prepare(principal=of_system("bench"), argv=argv)
    return tasks.create(
        owner_id=owner_id,
        kind=TaskKind.COMMAND,
        title=command.title,
        spec=command.spec,
        timeout_seconds=command.timeout_seconds,
        actor="bench",
        now=timezone.now(),
    )


def owner() -> int:
    return User.objects.get(username="admin").pk


def ends(count: int) -> None:
    over = Task.objects.filter(kind=TaskKind.COMMAND, status__in=TASK_END)
    before = over.count()
    owner_id = owner()
    began = time.monotonic()
    for _ in range(count):
        make(["true"], owner_id)
    while over.count() - before < count:
        time.sleep(0.005)
    seconds = time.monotonic() - began
    wrong = over.exclude(status="completed").count()
    if wrong:
        raise SystemExit(f"{wrong} of the tasks did not complete")
    print("SECONDS", seconds)


if __name__ == "__main__":
    if sys.argv[1] == "ends":
        settings.COMMAND_LIMIT = 1_000_000
        ends(int(sys.argv[2]))
    else:
        print("TASK", make(sys.argv[3:], owner()).id)
