"""Where values may be entered, and where login pages are."""

from __future__ import annotations

import dataclasses
import ipaddress
from collections.abc import Sequence
from typing import Literal
from urllib.parse import urlsplit

#: Where values may always be entered, with their subdomains (wire contract, section 2).
IDENTITY_PROVIDERS = (
    "accounts.google.com", "login.microsoftonline.com", "login.live.com", "okta.com", "oktapreview.com",
    "auth0.com", "appleid.apple.com", "github.com", "www.facebook.com", "www.linkedin.com",
    "amazoncognito.com", "onelogin.com", "pingone.com", "pingidentity.com",
)  # fmt: skip
#: Where login pages are when nothing links to them.
LOGIN_PATHS = (
    "/login", "/signin", "/accounts/login/", "/users/sign_in", "/admin/login/", "/auth/login", "/user/login",
    "/log-in", "/sign-in", "/wp-login.php",
)  # fmt: skip

Entry = Literal["free", "typed_only", "refused"]


@dataclasses.dataclass(frozen=True)
class _Host:
    """A host with its subdomains; ``port`` None covers any port."""

    name: str
    port: int | None = None

    @classmethod
    def parse(cls, text: str) -> _Host:
        text = text.strip().lower().partition("://")[2] or text.strip().lower()
        parts = urlsplit(f"//{text.partition('/')[0].removeprefix('*.').removeprefix('www.')}")
        try:
            return cls(parts.hostname or "", parts.port)
        except ValueError:
            return cls("")

    def covers(self, url: str) -> bool:
        parts = urlsplit(url)
        host = (parts.hostname or "").rstrip(".")
        port = parts.port or (443 if parts.scheme == "https" else 80)
        if not self.name or self.port not in (None, port):
            return False
        return host == self.name or (host.endswith(f".{self.name}") and not _is_address(host))


class Places:
    """Where values may be entered: on the domain, the allowed domains and the identity providers.

    An empty ``allowed_domains`` restricts nobody who types, but stored values stay on the domain and the
    providers.
    """

    def __init__(self, domain: str, allowed_domains: Sequence[str]) -> None:
        self._domain = _Host.parse(domain)
        self._allowed = tuple(_Host.parse(entry) for entry in allowed_domains)
        self._providers = tuple(_Host(name.removeprefix("www."), 443) for name in IDENTITY_PROVIDERS)

    def is_home(self, url: str) -> bool:
        """Whether ``url`` is on the domain itself or an allowed one: a place where a login may end."""
        return self._domain.covers(url) or any(host.covers(url) for host in self._allowed)

    def entry(self, *urls: str) -> Entry:
        """What may be entered when all of ``urls`` get to see it (the page and the form's action)."""
        if all(self.is_home(url) or self._is_provider(url) for url in urls):
            return "free"
        return "refused" if self._allowed else "typed_only"

    def foreign(self, *urls: str) -> str:
        """The host that keeps ``urls`` from being free."""
        return next((host_of(url) for url in urls if self.entry(url) != "free"), "")

    def _is_provider(self, url: str) -> bool:
        return urlsplit(url).scheme == "https" and any(host.covers(url) for host in self._providers)


def host_of(url: str) -> str:
    """The host of ``url``, with its port when it has one: all of a URL that a message may show."""
    return urlsplit(url).netloc.rpartition("@")[2]


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
