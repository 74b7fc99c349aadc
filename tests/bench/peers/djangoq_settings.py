"""django-q2 with its ORM broker on SQLite, as its documentation sets it up, and two workers for two processors."""

from __future__ import annotations

import os

SECRET_KEY = "a bench on a loopback address has no secrets"
INSTALLED_APPS = ["django.contrib.contenttypes", "django.contrib.auth", "django_q"]
USE_TZ = True
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": os.environ["BENCH_DATABASE"],
        # As Switchboard's: without these, writers and readers of SQLite stop each other.
        "OPTIONS": {
            "transaction_mode": "IMMEDIATE",
            "timeout": 20,
            "init_command": "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL;",
        },
    }
}
# No limit of saved results, so that all can be counted.
Q_CLUSTER = {"name": "bench", "orm": "default", "workers": 2, "timeout": 60, "retry": 120, "save_limit": 0}
