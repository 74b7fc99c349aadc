"""Cookies, and their form in a Playwright ``storage_state``.

The state is ``{"cookies": [{name, value, domain, path, expires, httpOnly, secure, sameSite}], "origins":
[...]}``: ``domain`` begins with a dot for a cookie that subdomains get too, ``expires`` is in seconds since
1970 or -1 for the session, ``sameSite`` is Strict, Lax or None. A browser can load what the jar writes, and
the jar can load what a browser wrote; the ``origins`` (local storage) pass through untouched.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import math
import time
from collections.abc import Callable, Iterable, Mapping
from http.cookiejar import http2time  # type: ignore[attr-defined]  # public, but not in typeshed
from typing import Any, Literal

import httpx

SameSite = Literal["Strict", "Lax", "None"]

#: RFC 6265bis, section 5.6: longer ones are ignored. The count is RFC 6265's minimum for a whole browser.
MAX_COOKIE_BYTES = 4096
MAX_COOKIES = 1000
_SAME_SITE: Mapping[str, SameSite] = {"strict": "Strict", "lax": "Lax", "none": "None"}
#: Browsers cap the age of a cookie at 400 days (RFC 6265bis, section 5.5).
_MAX_AGE = 400 * 86400


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Cookie:
    """One cookie. ``domain`` has no leading dot; ``expires`` is None for a session cookie. Never printed."""

    name: str
    value: str
    domain: str
    host_only: bool = True
    path: str = "/"
    expires: float | None = None
    http_only: bool = False
    secure: bool = False
    same_site: SameSite = "Lax"

    def __repr__(self) -> str:
        return f"Cookie({self.name} for {self.domain}{self.path})"

    @property
    def key(self) -> tuple[str, str, bool, str]:
        """What makes two cookies the same one."""
        return self.name, self.domain, self.host_only, self.path

    def matches(self, url: httpx.URL) -> bool:
        """Whether the cookie is sent to ``url`` (RFC 6265, section 5.4)."""
        host = url.host.lower()
        if host != self.domain and (self.host_only or not _is_subdomain(host, self.domain)):
            return False
        if self.secure and not _is_trustworthy(url):
            return False
        path = url.path or "/"
        return path == self.path or path.startswith(self.path if self.path.endswith("/") else f"{self.path}/")


class CookieJar:
    """The cookies of one login, kept as a browser keeps them. ``now`` gives seconds since 1970."""

    def __init__(self, *, now: Callable[[], float] = time.time) -> None:
        self._now = now
        self._cookies: dict[tuple[str, str, bool, str], Cookie] = {}
        self._origins: list[Any] = []

    @classmethod
    def from_state(
        cls, state: Mapping[str, Any] | None, *, now: Callable[[], float] = time.time
    ) -> CookieJar:
        """A jar with the cookies of a ``storage_state``; entries that are no cookies are left out."""
        jar = cls(now=now)
        if state is None:
            return jar
        jar._origins = list(state.get("origins") or [])
        for entry in state.get("cookies") or []:
            if isinstance(entry, Mapping) and entry.get("name") is not None and entry.get("domain"):
                jar._put(_from_entry(entry))
        return jar

    def to_state(self) -> dict[str, Any]:
        """The jar as a ``storage_state``. Session cookies are a secret."""
        return {"cookies": [_to_entry(cookie) for cookie in self._alive()], "origins": list(self._origins)}

    def __len__(self) -> int:
        return len(self._alive())

    def store(self, url: httpx.URL, set_cookie: Iterable[str]) -> None:
        """Take the ``Set-Cookie`` headers of an answer from ``url`` (RFC 6265, section 5.3)."""
        for header in set_cookie:
            cookie = parse_set_cookie(header, url, now=self._now())
            if cookie is not None:
                self._put(cookie)

    def header(self, url: httpx.URL) -> str | None:
        """The ``Cookie`` header for ``url``; None when there is nothing to send."""
        fitting = [cookie for cookie in self._alive() if cookie.matches(url)]
        fitting.sort(key=lambda cookie: -len(cookie.path))
        return "; ".join(f"{cookie.name}={cookie.value}" for cookie in fitting) or None

    def values_for(self, url: httpx.URL) -> frozenset[tuple[str, str]]:
        """Names and values sent to ``url``: to see whether a session began."""
        return frozenset((cookie.name, cookie.value) for cookie in self._alive() if cookie.matches(url))

    def _alive(self) -> list[Cookie]:
        now = self._now()
        return [cookie for cookie in self._cookies.values() if cookie.expires is None or cookie.expires > now]

    def _put(self, cookie: Cookie) -> None:
        self._cookies.pop(cookie.key, None)
        if cookie.expires is not None and cookie.expires <= self._now():
            return
        self._cookies[cookie.key] = cookie
        while len(self._cookies) > MAX_COOKIES:
            del self._cookies[next(iter(self._cookies))]


def parse_set_cookie(header: str, url: httpx.URL, *, now: float) -> Cookie | None:
    """The cookie of one ``Set-Cookie`` header; None when a browser would ignore it (RFC 6265bis, section
    5.6).
    """
    pair, *rest = header.split(";")
    name, equals, value = pair.partition("=")
    name, value = name.strip(), value.strip()
    if not equals or not name or len(name) + len(value) > MAX_COOKIE_BYTES or _has_controls(name + value):
        return None
    attributes: dict[str, str] = {}
    for part in rest:
        key, _, content = part.partition("=")
        attributes[key.strip().lower()] = content.strip()

    host = url.host.lower()
    domain = attributes.get("domain", "").lower().lstrip(".")
    host_only = not domain or (domain == host and (_is_address(host) or "." not in host))
    if not host_only and not (domain == host or _is_subdomain(host, domain)):
        return None
    if not host_only and "." not in domain:
        return None  # a whole top-level domain; a list of public suffixes would find more of them

    path = attributes.get("path", "")
    secure = "secure" in attributes
    if secure and not _is_trustworthy(url):
        return None
    path = path if path.startswith("/") else default_path(url)
    if name.lower().startswith("__secure-") and not secure:
        return None
    if name.lower().startswith("__host-") and not (secure and host_only and path == "/"):
        return None
    return Cookie(
        name=name,
        value=value,
        domain=host if host_only else domain,
        host_only=host_only,
        path=path,
        expires=_expiry(attributes, now),
        http_only="httponly" in attributes,
        secure=secure,
        same_site=_SAME_SITE.get(attributes.get("samesite", "").lower(), "Lax"),
    )


def default_path(url: httpx.URL) -> str:
    """The path of a cookie that names none (RFC 6265, section 5.1.4)."""
    return url.path.rpartition("/")[0] or "/"


def _expiry(attributes: Mapping[str, str], now: float) -> float | None:
    age = attributes.get("max-age", "")
    if age.lstrip("-").isdecimal() and age.isascii():
        # A number too long for a float is as good as "for ever".
        return now + min(int(age[:12]), _MAX_AGE)
    if "expires" in attributes:
        moment = http2time(attributes["expires"])
        return None if moment is None else min(float(moment), now + _MAX_AGE)
    return None


def _from_entry(entry: Mapping[str, Any]) -> Cookie:
    domain = str(entry["domain"]).lower()
    expires = entry.get("expires")
    return Cookie(
        name=str(entry["name"]),
        value=str(entry.get("value", "")),
        domain=domain.lstrip("."),
        host_only=not domain.startswith("."),
        path=str(entry.get("path") or "/"),
        expires=float(expires) if isinstance(expires, int | float) and 0 <= expires < math.inf else None,
        http_only=bool(entry.get("httpOnly")),
        secure=bool(entry.get("secure")),
        same_site=_SAME_SITE.get(str(entry.get("sameSite", "")).lower(), "Lax"),
    )


def _to_entry(cookie: Cookie) -> dict[str, Any]:
    # Chromium refuses to load SameSite=None without Secure, and the whole state with it.
    same_site = "Lax" if cookie.same_site == "None" and not cookie.secure else cookie.same_site
    return {
        "name": cookie.name,
        "value": cookie.value,
        "domain": cookie.domain if cookie.host_only else f".{cookie.domain}",
        "path": cookie.path,
        "expires": -1 if cookie.expires is None else cookie.expires,
        "httpOnly": cookie.http_only,
        "secure": cookie.secure,
        "sameSite": same_site,
    }


def _is_subdomain(host: str, domain: str) -> bool:
    return host.endswith(f".{domain}") and not _is_address(host)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _is_trustworthy(url: httpx.URL) -> bool:
    """Whether Secure cookies may travel: over TLS, or to this machine (as browsers have it for localhost)."""
    host = url.host.lower()
    if url.scheme == "https" or host == "localhost" or host.endswith(".localhost"):
        return True
    return _is_address(host) and ipaddress.ip_address(host).is_loopback


def _has_controls(text: str) -> bool:
    return any(ord(character) < 32 or ord(character) == 127 for character in text)
