"""``python -m tests.bench.peers.djangoq_app COUNT``: queue so many tasks and wait until each has its result; prints the seconds between."""

# ruff: noqa: E402  (Django must be set up before the rest is imported)
from __future__ import annotations

import os
import subprocess
import sys
import time

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "tests.bench.peers.djangoq_settings")

import django

django.setup()

from django_q.models import Success
from django_q.tasks import async_task


def short() -> None:
    subprocess.run(["true"], check=True)


def main(count: int) -> None:
    before = Success.objects.count()
    began = time.monotonic()
    for _ in range(count):
        async_task("tests.bench.peers.djangoq_app.short")
    while Success.objects.count() - before < count:
        time.sleep(0.005)
    print("SECONDS", time.monotonic() - began)


if __name__ == "__main__":
    main(int(sys.argv[1]))
