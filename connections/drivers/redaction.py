"""What must never be shown: takes submitted values out of what a site says."""

from __future__ import annotations

import re
from urllib.parse import unquote_plus


class Secrets:
    """The values that were submitted, so that they can be taken out of what the site says."""

    MASK = "•••"

    def __init__(self) -> None:
        self._names: set[str] = set()
        self._secrets: set[str] = set()

    def add(self, value: str, *, secret: bool) -> None:
        """Remember ``value``. Identifiers are hidden in error texts only: "sent to you@..." has a use."""
        if value.strip():
            (self._secrets if secret else self._names).add(value.strip())

    def hide(self, text: str, *, names: bool = True, limit: int = 300) -> str:
        """``text`` without submitted values, at most ``limit`` characters long."""
        for value in sorted(self._secrets | (self._names if names else set()), key=len, reverse=True):
            # A short value would tear other words apart ("a" in "password"), so it counts only as a word.
            edge = r"(?<!\w){}(?!\w)" if len(value) < 4 else "{}"
            text = re.sub(edge.format(re.escape(value)), self.MASK, text, flags=re.IGNORECASE)
        text = " ".join(text.split())
        return text if len(text) <= limit else f"{text[: limit - 1]}…"

    def occur_in(self, text: str) -> bool:
        """Whether a secret is part of ``text``, percent-encoded or not."""
        readable = unquote_plus(text)
        return any(len(value) > 5 and (value in text or value in readable) for value in self._secrets)

    def clean_url(self, url: str) -> str:
        """``url``, without its query when that holds a submitted value (forms sent by GET)."""
        readable = unquote_plus(url)
        shown = any(value in readable for value in self._secrets | self._names if len(value) > 2)
        return url.partition("#")[0].partition("?")[0] if shown else url
