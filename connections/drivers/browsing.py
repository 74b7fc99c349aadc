"""A small browser: HTTP, redirects and cookies as a browser handles them, within limits."""

from __future__ import annotations

import asyncio
import dataclasses
import re
from collections.abc import Callable
from typing import Literal
from urllib.parse import urlsplit

import httpx

from connections.drivers import forms, network
from connections.drivers.base import (
    DriverFailed,
    Target,
)
from connections.drivers.forms import Page, Reading
from connections.drivers.places import Places, host_of
from connections.drivers.redaction import Secrets
from connections.drivers.storage_state import CookieJar


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Seen:
    """A page that came back, and what it is for. ``method`` is that of the last hop."""

    page: Page
    reading: Reading
    status: int
    method: str = "GET"
    json: bool = False
    basic: bool = False


class Browser:
    """Cookies, referrers, page count; and the gate that values pass on their way out (see network.Hops)."""

    def __init__(self, target: Target, client: network.GuardedClient, now: Callable[[], float]) -> None:
        self.jar = CookieJar.from_state(target.storage_state, now=now)
        self.places = Places(target.domain, target.allowed_domains)
        self.secrets = Secrets()
        self._client = client
        self._limits = target.limits
        self._pages_left = target.limits.pages
        self._seen_https = False
        #: Where the values on their way may go although it is no free place: the person was told.
        self._told: str | None = None
        #: Where in the request of the moment values travel.
        self._carrying: Literal["", "url", "body"] = ""

    async def open(self, url: str, *, referrer: str = "", poll: bool = False) -> Seen:
        """GET a page. Polls do not count as pages: time bounds them."""
        return await self._fetch(
            network.Request(url=parsed_url(url), headers=_headers(url, referrer)), poll=poll
        )

    async def submit(
        self, seen: Seen, submission: forms.Submission, *, carrying: bool, told: str | None = None
    ) -> Seen:
        """Send a form. ``carrying`` when it holds typed or stored values."""
        headers = _headers(submission.url, seen.page.url)
        if submission.method == "post":
            headers |= {"Content-Type": submission.content_type, "Origin": origin_of(seen.page.url)}
        request = network.Request(
            url=parsed_url(submission.url),
            method=submission.method.upper(),
            headers=headers,
            body=submission.body,
        )
        if carrying:
            self._carrying = "body" if submission.method == "post" else "url"
        self._told = told
        try:
            return await self._fetch(request)
        finally:
            self._carrying, self._told = "", None

    # network.Hops: called for every hop, redirects included

    def outgoing(self, request: network.Request) -> network.Request:
        url = str(request.url)
        # A redirect of a POST carries them on as long as it keeps the body; one of a GET, when it repeats
        # them.
        carries = self._carrying == "url" or (self._carrying == "body" and bool(request.body))
        if self._carrying == "url":
            self._carrying = ""
        if carries or self.secrets.occur_in(url) or self.secrets.occur_in(_text(request.body)):
            self._gate(url)
        headers = {name: value for name, value in request.headers.items() if name != "Cookie"}
        if origin_of(headers.get("Referer", url)) != origin_of(url):
            headers["Referer"] = f"{origin_of(headers['Referer'])}/"
        cookies = self.jar.header(request.url)
        if cookies:
            headers["Cookie"] = cookies
        return dataclasses.replace(request, headers=headers)

    def incoming(self, reply: network.Reply) -> None:
        self._seen_https |= reply.url.scheme == "https"
        self.jar.store(reply.url, reply.headers.get_list("set-cookie"))

    def _gate(self, url: str) -> None:
        if self._seen_https and urlsplit(url).scheme != "https":
            raise DriverFailed(
                "domain_not_allowed",
                f"The site wants the values sent to {host_of(url)} without encryption. Nothing was sent.",
            )
        if self.places.entry(url) != "free" and host_of(url) != self._told:
            raise not_allowed(host_of(url))

    async def _fetch(self, request: network.Request, *, poll: bool = False) -> Seen:
        if not poll:
            if self._pages_left <= 0:
                raise DriverFailed("stuck_in_loop", f"The login took more than {self._limits.pages} pages.")
            self._pages_left -= 1
        reply = await self._client.fetch(request, redirects=self._limits.redirects, hops=self)
        content, charset = _content_type(reply.headers.get("content-type", "text/html"))
        url = str(reply.url)
        is_page = "html" in content or content in ("text/plain", "application/xml", "")
        # In a thread: a page of the allowed size keeps html5lib busy for a second.
        page = await asyncio.to_thread(forms.parse, reply.body, url, charset) if is_page else Page(url=url)
        return Seen(
            page=page,
            reading=forms.read(page),
            status=reply.status,
            method=reply.method,
            json="json" in content,
            basic=reply.status == 401 and "basic" in reply.headers.get("www-authenticate", "").lower(),
        )


def not_allowed(host: str) -> DriverFailed:
    """The refusal to enter values on ``host``, with the way out."""
    return DriverFailed(
        "domain_not_allowed",
        f"The login continues on {host}, where values may not be entered. To allow it, add {host} to "
        f"allowed_domains.",
    )


def _headers(url: str, referrer: str) -> dict[str, str]:
    headers = {"Accept": "text/html,application/xhtml+xml;q=0.9,*/*;q=0.5", "Accept-Language": "en,*;q=0.5"}
    if referrer:
        # Django and Rails check it on https. Never the query: it may hold what a GET form sent.
        same = origin_of(referrer) == origin_of(url)
        headers["Referer"] = origin_of(referrer) + (urlsplit(referrer).path or "/" if same else "/")
    return headers


def origin_of(url: str) -> str:
    return f"{urlsplit(url).scheme}://{host_of(url)}"


def _text(body: bytes) -> str:
    return body.decode("utf-8", "replace")


def parsed_url(url: str) -> httpx.URL:
    try:
        return httpx.URL(url)
    except httpx.InvalidURL:
        raise DriverFailed("navigation_confused", "The site leads to an address that is not valid.") from None


def _content_type(header: str) -> tuple[str, str | None]:
    content, _, rest = header.partition(";")
    charset = re.search(r"charset\s*=\s*[\"']?([\w.:-]{1,40})", rest, re.IGNORECASE)
    return content.strip().lower(), charset[1] if charset else None
