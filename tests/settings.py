"""Settings of the test run: a data directory of its own, loopback targets allowed, quick password hashes."""

from __future__ import annotations

import os
import tempfile

os.environ.setdefault("DATA_DIR", tempfile.mkdtemp(prefix="switchboard-test-"))
os.environ.setdefault("ALLOW_PRIVATE_TARGETS", "1")
os.environ.setdefault("COMMANDS", "any")
os.environ.setdefault("LOG_LEVEL", "WARNING")

from project.settings import *  # noqa: F403
from project.settings import DATA_DIR, DATABASES, IS_SQLITE

PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]
ALLOWED_HOSTS = ["*"]
BASE_URL = "http://testserver"
if IS_SQLITE:
    # A file, so that the hub's and the worker's threads see the same database as the test.
    DATABASES["default"]["TEST"] = {"NAME": str(DATA_DIR / "test.sqlite3")}
