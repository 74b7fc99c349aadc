"""What is known without asking: stored values, one-time codes, and what was typed a page ago."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import ClassVar

from connections.drivers.base import (
    Field,
    Target,
    Totp,
)
from connections.drivers.forms import Want
from connections.totp import Generator

#: The next window of a one-time code is waited for at most this long (seconds).
_MAX_TOTP_WAIT = 60.0


@dataclasses.dataclass(frozen=True, repr=False)
class Sent:
    """One form that was sent: which, and with what."""

    signature: tuple[str, ...]
    values: tuple[tuple[Field, str], ...]


class Known:
    """Stored values, identifiers typed in this login, the one-time-code secret; a rejected value is over."""

    _ALIASES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "username": ("username", "user", "login", "identifier", "userid", "user_id", "email", "phone"),
        "email": ("email", "e-mail", "mail", "username", "login", "identifier", "user"),
        "phone": ("phone", "tel", "mobile", "phone_number", "username", "identifier"),
        "password": ("password", "passwd", "pass", "pwd", "passphrase"),
    }

    def __init__(self, target: Target, now: Callable[[], float]) -> None:
        self._values = {key.lower(): value for key, value in target.stored.values.items() if value}
        self._typed: dict[str, str] = {}
        self._rejected: set[str] = set()
        self._now = now
        self._totp = _generator(target.stored.totp)
        self._totp_tries = 0
        self._last_window = -1

    def find(self, want: Want) -> str | None:
        """The value for ``want``; None when it has to be asked for. One-time codes: see :meth:`code`."""
        field = want.field
        for key in (want.controls[0].name.lower(), *self._ALIASES.get(field.ref, (field.ref,))):
            value = self._values.get(key) or self._typed.get(key)
            if value and value not in self._rejected and _fits(field, value):
                return value
        return None

    def learn(self, field: Field, value: str) -> None:
        """An identifier that was typed serves for the pages after; a password is asked for each time."""
        if field.type == "identifier":
            self._typed[field.ref] = value

    def reject(self, sent: Iterable[Sent]) -> None:
        """The site took none of these: they are not tried again by themselves."""
        for entry in sent:
            self._rejected.update(value for _, value in entry.values)

    def wants_code(self, field: Field) -> bool:
        """Whether the stored secret can make the code that ``field`` wants (twice per login at most)."""
        fitting = field.type == "totp_code" or (field.type == "code" and field.linked_mfa_type is None)
        return (
            fitting
            and self._totp is not None
            and self._totp_tries < 2
            and self.wait_for_code() <= _MAX_TOTP_WAIT
        )

    def wait_for_code(self) -> float:
        """Seconds until a code that was not sent yet: the second try needs the next window."""
        if self._totp is None or not self._totp_tries:
            return 0.0
        window, into_it = divmod(self._now(), self._totp.interval)
        return self._totp.interval - into_it if int(window) == self._last_window else 0.0

    def code(self) -> str:
        """The code of this moment (RFC 6238). Counts as a try."""
        assert self._totp is not None, "ask wants_code() first"
        self._totp_tries += 1
        self._last_window = int(self._now() // self._totp.interval)
        return self._totp.at(int(self._now()))


def _fits(field: Field, value: str) -> bool:
    """Browsers would not let a user name into an e-mail field."""
    if field.ref == "email":
        return "@" in value
    return field.ref != "phone" or sum(character.isdigit() for character in value) > 4


def _generator(totp: Totp | None) -> Generator | None:
    """The generator of a stored secret; None without one, or when it is not base32: then people are asked."""
    secret = re.sub(r"[\s=-]", "", totp.secret) if totp is not None else ""
    if totp is None or not secret:
        return None
    generator = Generator(secret, algorithm=totp.algorithm, digits=totp.digits, interval=totp.period)
    try:
        generator.at(0)
    except ValueError:
        return None
    return generator
