"""The only place that sees plain secrets at rest. Encrypts with Fernet (AES-128-CBC + HMAC), rotates with MultiFernet.

The first of ``settings.ENCRYPTION_KEYS`` encrypts, all of them decrypt. ``manage.py rotate_keys`` writes everything anew
under the first, after which the others can go.
"""

from __future__ import annotations

import functools
import hashlib
import hmac
import json
import secrets
from typing import Any

from cryptography.fernet import Fernet, InvalidToken, MultiFernet
from django.conf import settings
from django.utils.crypto import salted_hmac

API_KEY_PREFIX = "sk_"


class VaultError(Exception):
    """What is stored cannot be read with the keys of this installation."""


@functools.lru_cache(maxsize=4)
def _fernet(keys: tuple[str, ...]) -> MultiFernet:
    return MultiFernet([Fernet(key) for key in keys])


def _current() -> MultiFernet:
    return _fernet(tuple(settings.ENCRYPTION_KEYS))


def seal(value: Any) -> bytes:
    """Encrypt a JSON value."""
    return _current().encrypt(json.dumps(value).encode())


def unseal(token: bytes | memoryview | None) -> Any:
    """Decrypt what :func:`seal` made.

    :raises VaultError: when no key fits or the text was tampered with.
    """
    if token is None:
        raise VaultError("nothing is stored here")
    try:
        return json.loads(_current().decrypt(bytes(token)))
    except InvalidToken as error:
        raise VaultError("a stored secret cannot be read with ENCRYPTION_KEYS") from error


def reseal(token: bytes | memoryview) -> bytes:
    """The same secret under the first key.

    :raises VaultError: as :func:`unseal`.
    """
    try:
        return _current().rotate(bytes(token))
    except InvalidToken as error:
        raise VaultError("a stored secret cannot be read with ENCRYPTION_KEYS") from error


def new_api_key() -> str:
    """A key of 256 random bits with the prefix ``sk_``."""
    return API_KEY_PREFIX + secrets.token_urlsafe(32)


def new_code() -> str:
    """A one-time code of 256 random bits."""
    return secrets.token_urlsafe(32)


def hash_token(token: str) -> str:
    """SHA-256 in hex. Enough for tokens of 256 random bits: there is nothing to guess."""
    return hashlib.sha256(token.encode()).hexdigest()


def fingerprint(value: Any) -> str:
    """A keyed hash of a JSON value: tells whether two submissions are the same, and nothing about what they hold."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return salted_hmac("switchboard.fingerprint", text, algorithm="sha256").hexdigest()


def same(one: str, other: str) -> bool:
    """Compare in constant time."""
    return hmac.compare_digest(one.encode(), other.encode())
