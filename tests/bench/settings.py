"""Switchboard's own settings, and one more URL: ``POST /bench/publish`` (``tests/bench/urls.py``).

Streams do not pass Django's middleware; the one request that publishes shall not either, for the peers have none.
"""

from __future__ import annotations

from project.settings import *  # noqa: F403

ROOT_URLCONF = "tests.bench.urls"
MIDDLEWARE: list[str] = []
