"""The walk from page to page: reads each one, answers it or asks, until it is in or cannot go on."""

from __future__ import annotations

import asyncio
import dataclasses
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Literal
from urllib.parse import urlsplit

from connections.drivers import forms, network
from connections.drivers.base import (
    Answer,
    Choice,
    DriverFailed,
    ErrorCode,
    ExternalAction,
    Person,
    Question,
    Success,
    Target,
)
from connections.drivers.browsing import Browser, Seen, not_allowed, origin_of, parsed_url
from connections.drivers.forms import Reading, Want, Way
from connections.drivers.known import Known, Sent
from connections.drivers.places import LOGIN_PATHS, Entry, host_of

#: How often one address may be shown or one wordless refusal met before it counts as a loop.
_MAX_VISITS, _MAX_SILENT_REJECTIONS = 6, 3
_MAX_FAILED_POLLS = 5


class Walk:
    """One login, page by page, until the site lets us in or nothing more can be done."""

    def __init__(
        self,
        target: Target,
        person: Person,
        browser: Browser,
        addresses: network.AddressBook,
        now: Callable[[], float],
        sleep: Callable[[float], Awaitable[None]],
    ) -> None:
        self._target, self._person, self._browser, self._addresses = target, person, browser, addresses
        self._sleep = sleep
        self._known = Known(target, now)
        #: Forms sent since the last choice, oldest first.
        self._sent: list[Sent] = []
        self._last_form: Seen | None = None
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

    async def _begin(self) -> Seen | Success:
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

    async def _open_start(self) -> Seen:
        if self._target.login_url is not None:
            return await self._browser.open(self._target.login_url)
        return await self._open_home()

    async def _open_home(self) -> Seen:
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

    async def _find_login(self, start: Seen) -> Seen:
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
        base = origin_of(start.page.url)
        for path in LOGIN_PATHS:
            tried = await self._browser.open(f"{base}{path}")
            if tried.reading.kind == "login" and tried.status < 500:
                return tried
        return seen

    # -- one page

    async def _step(self, seen: Seen) -> Seen | Success:
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

    async def _arrive(self, seen: Seen) -> Seen | Success:
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

    def _looks_let_in(self, seen: Seen) -> bool:
        """Without a "log out" to prove it: no complaint, no link to the login, and something has changed."""
        if seen.status >= 400 or seen.page.errors or forms.login_link(seen.page) is not None:
            return False
        form = self._last_form
        moved = form is None or urlsplit(form.page.url).path != urlsplit(seen.page.url).path
        cookies = self._browser.jar.values_for(parsed_url(seen.page.url))
        return (moved and not forms.is_login_path(seen.page.url)) or bool(cookies - self._cookies_before)

    async def _back_to_form(self, seen: Seen) -> Seen:
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

    async def _fill_in(self, seen: Seen) -> Seen:
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

    async def _send(self, seen: Seen, values: dict[str, str], *, told: str | None = None) -> Seen:
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
            Sent(
                forms.signature(seen.reading),
                tuple((w.field, values[w.field.id]) for w in wants if w.field.id in values),
            )
        )
        submission = forms.fill(form, form.primary, typed, entries)
        self._before_acting(seen, submission.url)
        self._last_form = seen
        return await self._browser.submit(seen, submission, carrying=True, told=told)

    async def _picked_entries(self, seen: Seen) -> list[tuple[str, str]]:
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

    def _note_rejection(self, seen: Seen) -> frozenset[str]:
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

    def _complaint(self, seen: Seen) -> str | None:
        """What the site says about the last submission; nothing before the first."""
        errors, self._site_said = (self._site_said or seen.page.errors), ()
        return self._hidden(errors) if self._acted else None

    def _hidden(self, errors: Sequence[str]) -> str | None:
        return self._browser.secrets.hide(" ".join(errors)) or None

    # -- questions

    def _question(
        self,
        seen: Seen,
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

    async def _ask_way(self, seen: Seen) -> Seen:
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

    async def _take(self, seen: Seen, way: Way) -> Seen:
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

    async def _wait_outside(self, seen: Seen) -> Seen:
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
            if answer is not None:
                # The way is no longer offered: show again what is.
                shown = None
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

    def _external_action(self, seen: Seen) -> ExternalAction:
        message = self._browser.secrets.hide(seen.page.message or seen.page.title, names=False, limit=500)
        ways = seen.reading.ways
        fallback = Question(choices=self._choices(ways), sso_provider=self._sso_provider) if ways else None
        return ExternalAction(message=message, fallback=fallback)

    def _was_sent(self, reading: Reading) -> bool:
        return any(sent.signature == forms.signature(reading) for sent in self._sent)

    # -- ends and bounds

    def _before_acting(self, seen: Seen, url: str) -> None:
        self._acted = True
        self._cookies_before = self._browser.jar.values_for(parsed_url(url))

    def _count_visit(self, seen: Seen) -> None:
        """For what is followed without asking anybody: round and round is a loop."""
        self._visits[seen.page.url] += 1
        if self._visits[seen.page.url] > _MAX_VISITS:
            raise DriverFailed("stuck_in_loop", f"{host_of(seen.page.url)} leads in a circle.")

    def _is_home(self, url: str) -> bool:
        login_url = self._target.login_url
        return self._browser.places.is_home(url) or (
            login_url is not None and host_of(login_url) == host_of(url)
        )

    def _success(self, seen: Seen) -> Success:
        return Success(
            storage_state=self._browser.jar.to_state(),
            post_login_url=self._browser.secrets.clean_url(seen.page.url),
        )


def _way_of(answer: Answer, ways: Sequence[Way]) -> Way | None:
    return next((way for way in ways if way.choice.id == answer.choice_id), None)


def _is_signed_in(seen: Seen, asked: str, *, checked: bool = False) -> bool | None:
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


def _site_error(seen: Seen, website_error: str | None = None) -> DriverFailed:
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
