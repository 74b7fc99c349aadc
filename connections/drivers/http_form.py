"""The login driver for server-rendered sites: no browser, but HTTP, forms and cookies as a browser handles
them.

From top to bottom: where values may be entered (:class:`Places`), what must never be shown
(:class:`Secrets`), the small browser (:class:`_Browser`), what is known without asking (:class:`_Known`), and
the walk from page to page (:class:`_Walk`) that :class:`HttpFormDriver` starts. Nothing here logs, and no
exception carries a typed value.
"""

from __future__ import annotations

import asyncio
import dataclasses
import ipaddress
import re
import ssl
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import ClassVar, Literal
from urllib.parse import unquote_plus, urlsplit

import httpcore
import httpx

from connections.drivers import forms, network
from connections.drivers.base import (
    Answer,
    Choice,
    DriverFailed,
    ErrorCode,
    ExternalAction,
    Field,
    Person,
    Question,
    Success,
    Target,
    Totp,
)
from connections.drivers.forms import Page, Reading, Want, Way
from connections.drivers.storage_state import CookieJar
from connections.totp import Generator

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
#: The next window of a one-time code is waited for at most this long (seconds).
_MAX_TOTP_WAIT = 60.0
#: How often one address may be shown or one wordless refusal met before it counts as a loop.
_MAX_VISITS, _MAX_SILENT_REJECTIONS = 6, 3
_MAX_FAILED_POLLS = 5

Entry = Literal["free", "typed_only", "refused"]


# ------------------------------------------------------------------------------------------------------------
# Where values may be entered


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


# ------------------------------------------------------------------------------------------------------------
# What must never be shown


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


# ------------------------------------------------------------------------------------------------------------
# A small browser


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class _Seen:
    """A page that came back, and what it is for. ``method`` is that of the last hop."""

    page: Page
    reading: Reading
    status: int
    method: str = "GET"
    json: bool = False
    basic: bool = False


class _Browser:
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

    async def open(self, url: str, *, referrer: str = "", poll: bool = False) -> _Seen:
        """GET a page. Polls do not count as pages: time bounds them."""
        return await self._fetch(
            network.Request(url=_parsed(url), headers=_headers(url, referrer)), poll=poll
        )

    async def submit(
        self, seen: _Seen, submission: forms.Submission, *, carrying: bool, told: str | None = None
    ) -> _Seen:
        """Send a form. ``carrying`` when it holds typed or stored values."""
        headers = _headers(submission.url, seen.page.url)
        if submission.method == "post":
            headers |= {"Content-Type": submission.content_type, "Origin": _origin(seen.page.url)}
        request = network.Request(
            url=_parsed(submission.url),
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
        if _origin(headers.get("Referer", url)) != _origin(url):
            headers["Referer"] = f"{_origin(headers['Referer'])}/"
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

    async def _fetch(self, request: network.Request, *, poll: bool = False) -> _Seen:
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
        return _Seen(
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
        same = _origin(referrer) == _origin(url)
        headers["Referer"] = _origin(referrer) + (urlsplit(referrer).path or "/" if same else "/")
    return headers


def _origin(url: str) -> str:
    return f"{urlsplit(url).scheme}://{host_of(url)}"


def _text(body: bytes) -> str:
    return body.decode("utf-8", "replace")


def _parsed(url: str) -> httpx.URL:
    try:
        return httpx.URL(url)
    except httpx.InvalidURL:
        raise DriverFailed("navigation_confused", "The site leads to an address that is not valid.") from None


def _content_type(header: str) -> tuple[str, str | None]:
    content, _, rest = header.partition(";")
    charset = re.search(r"charset\s*=\s*[\"']?([\w.:-]{1,40})", rest, re.IGNORECASE)
    return content.strip().lower(), charset[1] if charset else None


# ------------------------------------------------------------------------------------------------------------
# What is known without asking


@dataclasses.dataclass(frozen=True, repr=False)
class _Sent:
    """One form that was sent: which, and with what."""

    signature: tuple[str, ...]
    values: tuple[tuple[Field, str], ...]


class _Known:
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

    def reject(self, sent: Iterable[_Sent]) -> None:
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


# ------------------------------------------------------------------------------------------------------------
# The walk


class _Walk:
    """One login, page by page, until the site lets us in or nothing more can be done."""

    def __init__(
        self,
        target: Target,
        person: Person,
        browser: _Browser,
        addresses: network.AddressBook,
        now: Callable[[], float],
        sleep: Callable[[float], Awaitable[None]],
    ) -> None:
        self._target, self._person, self._browser, self._addresses = target, person, browser, addresses
        self._sleep = sleep
        self._known = _Known(target, now)
        #: Forms sent since the last choice, oldest first.
        self._sent: list[_Sent] = []
        self._last_form: _Seen | None = None
        self._cookies_before: frozenset[tuple[str, str]] = frozenset()
        self._acted = False
        self._questions = 0
        self._silent_rejections = 0
        self._visits: Counter[str] = Counter()
        self._sso_provider: str | None = None
        self._site_said: tuple[str, ...] = ()
        self._last_error: str | None = None
        self._last_rejected: frozenset[str] = frozenset()
        self._picks: dict[str, str] = {}

    # -- beginning

    async def run(self) -> Success:
        await self._person.discovering()
        seen = await self._begin()
        while True:
            if isinstance(seen, Success):
                return seen
            seen = await self._step(seen)

    async def check(self) -> bool | None:
        if self._target.check_url is not None:
            return _is_signed_in(
                await self._browser.open(self._target.check_url), self._target.check_url, checked=True
            )
        return _is_signed_in(await self._open_home(), await self._home())

    async def _begin(self) -> _Seen | Success:
        """The page to start from; Success when the stored session still holds."""
        if len(self._browser.jar):
            # Many login pages show their form to people who are signed in, too: so the start page has a say.
            for url in filter(None, (self._target.check_url or self._target.login_url, await self._home())):
                seen = await (self._open_home() if url == await self._home() else self._browser.open(url))
                if _is_signed_in(seen, url, checked=url == self._target.check_url):
                    return self._success(seen)
        seen = await self._open_start()
        if seen.reading.kind in ("login", "code", "picker", "external", "relay"):
            return seen
        return await self._find_login(seen)

    async def _open_start(self) -> _Seen:
        if self._target.login_url is not None:
            return await self._browser.open(self._target.login_url)
        return await self._open_home()

    async def _open_home(self) -> _Seen:
        home = await self._home()
        try:
            return await self._browser.open(home)
        except network.ConnectionRefused:
            # Nothing was typed yet. Only for the plain name: a port that was named is meant.
            if urlsplit(home).scheme != "https" or urlsplit(home).port is not None:
                raise
            return await self._browser.open(f"http://{self._target.domain}/")

    async def _home(self) -> str:
        """The start page of the domain: https, but http where the name is one of our own network."""
        parts = urlsplit(f"//{self._target.domain}")
        host = parts.hostname or ""
        if self._target.allow_private and host:
            addresses = await self._addresses.look_up(host, parts.port or 443)
            if not any(network.is_public(address) for address in addresses):
                return f"http://{self._target.domain}/"
        return f"https://{self._target.domain}/"

    async def _find_login(self, start: _Seen) -> _Seen:
        """From a page without a login form to one with: by its links, else by the paths that are common."""
        seen, link, followed = start, forms.login_link(start.page), set[str]()
        while link is not None and link not in followed and len(followed) < 3 and seen.status < 500:
            followed.add(link)
            seen = await self._browser.open(link, referrer=seen.page.url)
            if seen.reading.kind in ("login", "code", "picker", "external", "relay"):
                return seen
            link = forms.login_link(seen.page)
        dead_end = seen.reading.kind in ("captcha", "bot") or seen.json or seen.basic or seen.status >= 500
        if dead_end or self._target.login_url is not None:
            return seen
        # Also where the start page is nothing without scripts: the login behind it often is plain.
        base = _origin(start.page.url)
        for path in LOGIN_PATHS:
            tried = await self._browser.open(f"{base}{path}")
            if tried.reading.kind == "login" and tried.status < 500:
                return tried
        return seen

    # -- one page

    async def _step(self, seen: _Seen) -> _Seen | Success:
        kind, host = seen.reading.kind, host_of(seen.page.url)
        complaint = self._hidden(seen.page.errors)
        if seen.status >= 500 or seen.status == 429:
            raise _site_error(seen, complaint)
        if kind in ("login", "code"):
            return await self._fill_in(seen) if seen.reading.form is not None else await self._ask_way(seen)
        if kind == "picker":
            return await self._ask_way(seen)
        if kind == "external":
            return await self._wait_outside(seen)
        if kind == "relay":
            self._count_visit(seen)
            assert seen.reading.form is not None
            submission = forms.fill(seen.reading.form, seen.reading.form.primary, {})
            return await self._browser.submit(seen, submission, carrying=False)
        if kind == "captcha":
            raise DriverFailed(
                "captcha_blocked",
                f"{host} asks for a CAPTCHA, which only a person in a browser can solve.",
                website_error=complaint,
            )
        if kind == "bot":
            raise DriverFailed(
                "bot_detected",
                f"{host} takes this login for an automated one and refuses it.",
                website_error=complaint,
            )
        if seen.basic:
            raise DriverFailed(
                "unsupported_auth_method", f"{host} wants HTTP Basic authentication, which is no form."
            )
        if kind == "scripted" or seen.json:
            raise DriverFailed(
                "unsupported_auth_method",
                f"The login of {host} works only with JavaScript; it needs the browser driver.",
            )
        return await self._arrive(seen)

    async def _arrive(self, seen: _Seen) -> _Seen | Success:
        """A page that wants nothing: we are in, or were turned away, or are on the way."""
        page, refresh = seen.page, seen.page.refresh
        if refresh is not None and refresh[0] <= 10 and not seen.reading.signed_in:
            self._count_visit(seen)
            if refresh[1] == page.url:
                await self._sleep(min(max(refresh[0], 0.5), 5.0))
            return await self._browser.open(refresh[1], referrer=page.url)
        if not self._acted:
            raise DriverFailed("login_form_not_found", f"No login form was found on {host_of(page.url)}.")
        if not self._is_home(page.url):
            # Signed in at the identity provider, say, but not sent back. One look whether home knows us by
            # now.
            self._count_visit(seen)
            home = self._target.login_url or await self._home()
            back = await self._browser.open(home)
            if _is_signed_in(back, home):
                return self._success(back)
            if back.reading.kind in ("signed_in", "other"):
                raise DriverFailed(
                    "navigation_confused", f"The login ended on {host_of(page.url)} and did not return."
                )
            return back
        if seen.reading.signed_in and seen.status < 400:
            return self._success(seen)
        if self._looks_let_in(seen):
            return self._success(seen)
        return await self._back_to_form(seen)

    def _looks_let_in(self, seen: _Seen) -> bool:
        """Without a "log out" to prove it: no complaint, no link to the login, and something has changed."""
        if seen.status >= 400 or seen.page.errors or forms.login_link(seen.page) is not None:
            return False
        form = self._last_form
        moved = form is None or urlsplit(form.page.url).path != urlsplit(seen.page.url).path
        cookies = self._browser.jar.values_for(_parsed(seen.page.url))
        return (moved and not forms.is_login_path(seen.page.url)) or bool(cookies - self._cookies_before)

    async def _back_to_form(self, seen: _Seen) -> _Seen:
        """Turned away on a page without a form: the form is asked for again, and the complaint is kept."""
        errors = seen.page.errors or ((seen.page.message,) if seen.page.message else ())
        self._count_visit(seen)
        if self._last_form is None or self._last_form.method != "GET":
            back = await self._browser.open(self._target.login_url or await self._home())
        else:
            back = await self._browser.open(self._last_form.page.url, referrer=seen.page.url)
        if back.reading.kind not in ("login", "code", "picker"):
            raise _site_error(seen, self._hidden(errors))
        self._site_said = errors
        return back

    # -- forms

    async def _fill_in(self, seen: _Seen) -> _Seen:
        reading, form = seen.reading, seen.reading.form
        assert form is not None
        action = forms.action_of(form, form.primary)
        entry = self._browser.places.entry(seen.page.url, action)
        if entry == "refused":
            raise not_allowed(self._browser.places.foreign(seen.page.url, action))
        if urlsplit(seen.page.url).scheme == "https" and urlsplit(action).scheme == "http":
            raise DriverFailed(
                "domain_not_allowed",
                f"The form on {host_of(seen.page.url)} goes to {host_of(action)} without encryption. "
                f"Nothing was entered.",
            )
        rejected = self._note_rejection(seen)
        website_error = self._complaint(seen)
        # First of all: a credential that names a provider holds the provider's values, not those of the site.
        preferred = self._preferred_way(reading)
        if preferred is not None:
            return await self._take(seen, preferred)
        code_want = next((want for want in reading.wants if self._known.wants_code(want.field)), None)
        stored = {
            want.field.id: value for want in reading.wants if (value := self._known.find(want)) is not None
        }
        if entry != "free":
            stored, code_want = {}, None
        missing = [
            want
            for want in reading.wants
            if want.field.required and want.field.id not in stored and want is not code_want
        ]
        if not missing and (stored or code_want):
            await self._person.submitting_stored()
            values = dict(stored)
            if code_want is not None:
                await self._sleep_until_code()
                values[code_want.field.id] = self._known.code()
            return await self._send(seen, values)
        # An optional field is shown only beside one that has to be asked for anyway.
        asked = tuple(want for want in reading.wants if want.field.id not in stored and want is not code_want)
        question = self._question(
            seen, asked, reading.ways, rejected=rejected, entry=entry, error=website_error
        )
        answer = await self._ask(question)
        way = _way_of(answer, reading.ways)
        if way is not None:
            return await self._take(seen, way)
        values = {**stored, **{want.field.id: answer.field_values.get(want.field.id, "") for want in asked}}
        if code_want is not None:
            await self._sleep_until_code()
            values[code_want.field.id] = self._known.code()
        if any(want.field.required and not values.get(want.field.id) for want in reading.wants):
            return seen  # not everything was given: the next step asks again
        for want in asked:
            self._known.learn(want.field, values[want.field.id])
        return await self._send(seen, values, told=host_of(action) if entry == "typed_only" else None)

    async def _sleep_until_code(self) -> None:
        wait = self._known.wait_for_code()
        if wait > 0:
            await self._sleep(wait)

    async def _send(self, seen: _Seen, values: dict[str, str], *, told: str | None = None) -> _Seen:
        form, wants = seen.reading.form, seen.reading.wants
        assert form is not None
        typed: dict[str, str] = {}
        for want in wants:
            value = values.get(want.field.id, "")
            self._browser.secrets.add(value, secret=want.field.type not in ("identifier", "text"))
            if len(want.controls) == 1:
                typed[want.controls[0].xpath] = value
            else:
                typed.update(
                    (control.xpath, digit) for control, digit in zip(want.controls, value, strict=False)
                )
        entries = await self._picked_entries(seen)
        self._sent.append(
            _Sent(
                forms.signature(seen.reading),
                tuple((w.field, values[w.field.id]) for w in wants if w.field.id in values),
            )
        )
        submission = forms.fill(form, form.primary, typed, entries)
        self._before_acting(seen, submission.url)
        self._last_form = seen
        return await self._browser.submit(seen, submission, carrying=True, told=told)

    async def _picked_entries(self, seen: _Seen) -> list[tuple[str, str]]:
        """Lists without a default that the form insists on (a region, a company): asked for once each."""
        form = seen.reading.form
        assert form is not None
        for control in form.controls:
            unset = not any(option.selected and option.value for option in control.options)
            if control.kind != "select" or not (
                control.required and unset and control.visible and control.name
            ):
                continue
            while control.name not in self._picks:
                ways = forms.option_ways(control, form)
                question = Question(
                    choices=tuple(way.choice for way in ways), sso_provider=self._sso_provider
                )
                way = _way_of(await self._ask(question), ways)
                if way is not None:
                    self._picks.update(way.entries)
        return list(self._picks.items())

    def _note_rejection(self, seen: _Seen) -> frozenset[str]:
        """The refs that the site did not take. A form that comes back after it was sent is a rejection."""
        signature = forms.signature(seen.reading)
        position = next((i for i, sent in enumerate(self._sent) if sent.signature == signature), None)
        if position is None:
            return frozenset()
        sent, self._sent = self._sent[position:], self._sent[:position]
        self._known.reject(sent)
        if seen.page.errors or self._site_said:
            self._silent_rejections = 0
        else:
            self._silent_rejections += 1
            if self._silent_rejections >= _MAX_SILENT_REJECTIONS:
                raise DriverFailed(
                    "stuck_in_loop",
                    f"{host_of(seen.page.url)} shows its form again and again, without saying why.",
                )
        named = frozenset(
            want.field.id for want in seen.reading.wants if any(c.invalid for c in want.controls)
        )
        return named or frozenset(want.field.id for want in seen.reading.wants)

    def _complaint(self, seen: _Seen) -> str | None:
        """What the site says about the last submission; nothing before the first."""
        errors, self._site_said = (self._site_said or seen.page.errors), ()
        return self._hidden(errors) if self._acted else None

    def _hidden(self, errors: Sequence[str]) -> str | None:
        return self._browser.secrets.hide(" ".join(errors)) or None

    # -- questions

    def _question(
        self,
        seen: _Seen,
        asked: Sequence[Want],
        ways: Sequence[Way],
        *,
        rejected: frozenset[str],
        entry: Entry,
        error: str | None,
    ) -> Question:
        fields = []
        for want in asked:
            field = want.field
            hints = [self._shown(field.hint or "")]
            if entry == "typed_only":
                form = seen.reading.form
                foreign = self._browser.places.foreign(
                    seen.page.url, forms.action_of(form, form.primary) if form else ""
                )
                hints.append(f"This goes to {foreign}, not to {self._target.domain}.")
            reason: Literal["missing", "rejected"] = "rejected" if field.id in rejected else "missing"
            hint = " ".join(filter(None, hints)) or None
            fields.append(
                dataclasses.replace(field, reason=reason, hint=hint, label=self._shown(field.label))
            )
        self._last_error, self._last_rejected = (
            error,
            frozenset(f.type for f in fields if f.reason == "rejected"),
        )
        return Question(
            fields=tuple(fields),
            choices=self._choices(ways),
            website_error=error,
            sso_provider=self._sso_provider,
        )

    def _choices(self, ways: Sequence[Way]) -> tuple[Choice, ...]:
        return tuple(dataclasses.replace(way.choice, label=self._shown(way.choice.label)) for way in ways)

    def _shown(self, text: str) -> str:
        return self._browser.secrets.hide(text, names=False)

    async def _ask(self, question: Question) -> Answer:
        if self._questions >= self._target.limits.questions:
            raise self._gave_up()
        self._questions += 1
        self._visits.clear()
        return await self._person.ask(question)

    def _gave_up(self) -> DriverFailed:
        code: ErrorCode = "max_attempts_reached"
        if "password" in self._last_rejected:
            code = "credentials_invalid"
        elif "totp_code" in self._last_rejected:
            code = "totp_code_rejected"
        return DriverFailed(
            code, f"Not signed in after {self._questions} questions.", website_error=self._last_error
        )

    async def _ask_way(self, seen: _Seen) -> _Seen:
        preferred = self._preferred_way(seen.reading)
        if preferred is not None:
            return await self._take(seen, preferred)
        question = Question(
            choices=self._choices(seen.reading.ways),
            website_error=self._complaint(seen),
            sso_provider=self._sso_provider,
        )
        way = _way_of(await self._ask(question), seen.reading.ways)
        return seen if way is None else await self._take(seen, way)

    def _preferred_way(self, reading: Reading) -> Way | None:
        """The identity provider that the credential names, once."""
        wanted = self._target.stored.sso_provider
        if not wanted or self._sso_provider is not None:
            return None
        return next((way for way in reading.ways if way.choice.provider == wanted.lower()), None)

    async def _take(self, seen: _Seen, way: Way) -> _Seen:
        """Go the way that was chosen. A form that comes again after a choice was not rejected, but chosen."""
        await self._person.discovering()
        self._sent.clear()
        self._sso_provider = way.choice.provider or self._sso_provider
        if way.link is not None:
            self._before_acting(seen, way.link.url)
            return await self._browser.open(way.link.url, referrer=seen.page.url)
        assert way.form is not None
        submission = forms.fill(way.form, way.button, {}, way.entries)
        self._before_acting(seen, submission.url)
        return await self._browser.submit(seen, submission, carrying=False)

    # -- waiting for something elsewhere

    async def _wait_outside(self, seen: _Seen) -> _Seen:
        limits = self._target.limits
        deadline = asyncio.get_running_loop().time() + limits.external_seconds
        failed = 0
        shown: ExternalAction | None = None
        while asyncio.get_running_loop().time() < deadline:
            action = self._external_action(seen)
            if action != shown:
                await self._person.external_action(action)
                shown = action
            answer = await self._person.answer_within(limits.poll_seconds)
            way = _way_of(answer, seen.reading.ways) if answer is not None else None
            if way is not None:
                return await self._take(seen, way)
            try:
                now = await self._browser.open(
                    seen.page.refresh[1] if seen.page.refresh else seen.page.url, poll=True
                )
            except network.NetworkFault:
                failed += 1
                if failed > _MAX_FAILED_POLLS:
                    raise
                continue
            if now.status >= 500:
                failed += 1
                if failed > _MAX_FAILED_POLLS:
                    raise _site_error(now)
                continue
            failed = 0
            if now.reading.kind == "external":
                seen = now
            elif seen.method == "GET" or not self._was_sent(now.reading) or now.page.errors:
                self._acted = True
                return now
            # Otherwise the page to wait on was the answer to a POST, and its address alone shows the form
            # again.
        raise DriverFailed(
            "external_action_timeout",
            f"Nothing was confirmed elsewhere within {limits.external_seconds:g} seconds.",
        )

    def _external_action(self, seen: _Seen) -> ExternalAction:
        message = self._browser.secrets.hide(seen.page.message or seen.page.title, names=False, limit=500)
        ways = seen.reading.ways
        fallback = Question(choices=self._choices(ways), sso_provider=self._sso_provider) if ways else None
        return ExternalAction(message=message, fallback=fallback)

    def _was_sent(self, reading: Reading) -> bool:
        return any(sent.signature == forms.signature(reading) for sent in self._sent)

    # -- ends and bounds

    def _before_acting(self, seen: _Seen, url: str) -> None:
        self._acted = True
        self._cookies_before = self._browser.jar.values_for(_parsed(url))

    def _count_visit(self, seen: _Seen) -> None:
        """For what is followed without asking anybody: round and round is a loop."""
        self._visits[seen.page.url] += 1
        if self._visits[seen.page.url] > _MAX_VISITS:
            raise DriverFailed("stuck_in_loop", f"{host_of(seen.page.url)} leads in a circle.")

    def _is_home(self, url: str) -> bool:
        login_url = self._target.login_url
        return self._browser.places.is_home(url) or (
            login_url is not None and host_of(login_url) == host_of(url)
        )

    def _success(self, seen: _Seen) -> Success:
        return Success(
            storage_state=self._browser.jar.to_state(),
            post_login_url=self._browser.secrets.clean_url(seen.page.url),
        )


def _way_of(answer: Answer, ways: Sequence[Way]) -> Way | None:
    return next((way for way in ways if way.choice.id == answer.choice_id), None)


def _is_signed_in(seen: _Seen, asked: str, *, checked: bool = False) -> bool | None:
    """Whether a page fetched with an old session shows that it still holds; None when it does not tell.

    ``checked`` when ``asked`` is a page that was only to be seen signed in.
    """
    page, kind = seen.page, seen.reading.kind
    if kind == "login" and seen.reading.signed_in and seen.status < 400:
        return True  # "confirm your password" on a page of the account
    if seen.status == 401 or kind in ("login", "code", "picker", "external"):
        return False
    if seen.status >= 400 or kind in ("captcha", "bot", "scripted", "relay") or seen.json:
        return None
    if seen.reading.signed_in:
        return True
    if forms.login_link(page) is not None or (
        forms.is_login_path(page.url) and not forms.is_login_path(asked)
    ):
        return False
    stayed = urlsplit(page.url)[1:3] == urlsplit(asked)[1:3]
    if (checked and stayed) or (forms.is_login_path(asked) and not forms.is_login_path(page.url)):
        return True
    return None


def _site_error(seen: _Seen, website_error: str | None = None) -> DriverFailed:
    host = host_of(seen.page.url)
    if seen.status == 429:
        return DriverFailed(
            "website_error", f"{host} says there were too many requests.", website_error=website_error
        )
    if seen.status >= 400:
        return DriverFailed(
            "website_error", f"{host} answered with error {seen.status}.", website_error=website_error
        )
    return DriverFailed("website_error", f"{host} refused the login.", website_error=website_error)


class HttpFormDriver:
    """Logs in to server-rendered sites over HTTP (see :class:`connections.drivers.base.Driver`).

    ``clock`` gives seconds since 1970 (cookies, one-time codes) and ``sleep`` waits; both, the resolver, the
    backend and the TLS context are for tests.
    """

    def __init__(
        self,
        *,
        resolver: network.Resolver = network.resolve,
        backend: httpcore.AsyncNetworkBackend | None = None,
        ssl_context: ssl.SSLContext | None = None,
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._resolver, self._backend, self._ssl_context = resolver, backend, ssl_context
        self._clock, self._sleep = clock, sleep

    async def login(self, target: Target, person: Person) -> Success:
        """Log in to ``target``, asking ``person`` whatever is not stored. Raises DriverFailed."""
        try:
            async with self._client(target) as client:
                return await self._walk(target, person, client).run()
        except network.TooManyRedirects as fault:
            raise DriverFailed("stuck_in_loop", str(fault)) from None
        except network.AddressRefused as fault:
            raise DriverFailed("domain_not_allowed", str(fault)) from None
        except network.NetworkFault as fault:
            raise DriverFailed("network_error", str(fault)) from None

    async def check(self, target: Target) -> bool | None:
        """Whether the session of ``target.storage_state`` still holds; None when that cannot be told."""
        if not len(CookieJar.from_state(target.storage_state, now=self._clock)):
            return False
        try:
            async with self._client(target) as client:
                return await self._walk(target, _NOBODY, client).check()
        except (network.NetworkFault, DriverFailed):
            # Trouble on the way says nothing about the session: "cannot be told" is the answer, not an error.
            return None

    def _client(self, target: Target) -> network.GuardedClient:
        return network.GuardedClient(
            allow_private=target.allow_private,
            max_bytes=target.limits.page_bytes,
            seconds=target.limits.request_seconds,
            resolver=self._resolver,
            backend=self._backend,
            ssl_context=self._ssl_context,
        )

    def _walk(self, target: Target, person: Person, client: network.GuardedClient) -> _Walk:
        browser = _Browser(target, client, self._clock)
        return _Walk(target, person, browser, client.addresses, self._clock, self._sleep)


class _Nobody:
    """The person of a health check: there is nobody to ask."""

    async def discovering(self) -> None:
        raise AssertionError("a check asks nobody")

    submitting_stored = discovering

    async def ask(self, question: Question) -> Answer:
        raise AssertionError("a check asks nobody")

    async def external_action(self, action: ExternalAction) -> None:
        raise AssertionError("a check asks nobody")

    async def answer_within(self, seconds: float) -> Answer | None:
        raise AssertionError("a check asks nobody")


_NOBODY = _Nobody()
