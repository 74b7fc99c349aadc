"""Django's sessions in the database, with a closer look at the key that a cookie brings."""

from __future__ import annotations

import re

from django.contrib.sessions.backends import db

#: What Django makes its keys of. A cookie can hold anything: with a NUL in it PostgreSQL would refuse the question, and the page be a 500.
_KEY = re.compile(r"[a-z0-9]{8,40}")


class SessionStore(db.SessionStore):
    def _validate_session_key(self, key: str | None) -> bool:
        return bool(key and _KEY.fullmatch(key))
