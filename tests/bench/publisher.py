"""A process that commits events as a worker does: ``python -m tests.bench.publisher``, with the environment of the server.

One line of JSON in (``{"first", "count", "size", "rate", "topic", "audience"}``), one out (``{"commits": {number: nanoseconds}}``).
It is started before the measurement, with its database connection open.
"""

# ruff: noqa: E402  (Django must be set up before the rest is imported)
from __future__ import annotations

import json
import os
import sys

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "project.settings")

import django

django.setup()

from django.db import connection

from tests.bench import writing


def main() -> None:
    connection.ensure_connection()
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps({"commits": writing.write(**json.loads(line))}), flush=True)


if __name__ == "__main__":
    main()
