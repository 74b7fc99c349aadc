"""Time-based one-time codes (RFC 6238). Pure: a secret and a moment in, a code out.

Not pyotp: since 2.12 it refuses secrets below 112 bits and periods above two minutes, but sites hand out 16 base32
characters (80 bits) every day, and a secret that a site made is not ours to refuse.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import hmac
from collections.abc import Callable, Mapping
from typing import Any

_DIGESTS: Mapping[str, Callable[..., Any]] = {
    "SHA1": hashlib.sha1,
    "SHA256": hashlib.sha256,
    "SHA512": hashlib.sha512,
}


@dataclasses.dataclass(frozen=True, repr=False)
class Generator:
    """The codes of one secret. ``secret`` is base32, with or without padding; ``interval`` is in seconds."""

    secret: str
    algorithm: str = "SHA1"
    digits: int = 6
    interval: int = 30

    def at(self, seconds: int) -> str:
        """The code at a Unix time.

        :raises binascii.Error: the secret is not base32.
        """
        text = self.secret.rstrip("=").upper()
        key = base64.b32decode(text + "=" * (-len(text) % 8))
        counter = (seconds // self.interval).to_bytes(8, "big")
        digest = hmac.new(key, counter, _DIGESTS[self.algorithm]).digest()
        start = digest[-1] & 0x0F
        number = int.from_bytes(digest[start : start + 4], "big") & 0x7FFF_FFFF
        return f"{number:010d}"[-self.digits :]

    def ends(self, seconds: int) -> int:
        """The Unix time at which the code of ``seconds`` gives way to the next."""
        return (seconds // self.interval + 1) * self.interval
