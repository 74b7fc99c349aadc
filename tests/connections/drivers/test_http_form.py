"""Logging in to real sites over HTTP: what is asked, what is sent where, and how it ends."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from connections.drivers.base import (
    Answer,
    DriverFailed,
    ExternalAction,
    Limits,
    Question,
    StoredValues,
    Success,
    Target,
    Totp,
)
from connections.drivers.http_form import HttpFormDriver
from connections.drivers.places import Places
from connections.drivers.redaction import Secrets
from tests.connections.drivers.test_network import PUBLIC, Names, Wires, certified
from tests.sites import EMAIL, OUTSIDER, OUTSIDER_PASSWORD, PASSWORD, SMS_CODE, TOTP_SECRET, USERNAME, Site

LOGIN = {"username": USERNAME, "password": PASSWORD}
WRONG = {"username": USERNAME, "password": "not-the-password"}

pytestmark = pytest.mark.asyncio


class Scripted:
    """A person who answers one question after the other: a dict fills in fields by id, a string picks a
    choice.

    An answer may be a function, called when the question comes.

    ``told`` is everything that was told in order: "discovering", "stored", "ask", "external".
    """

    def __init__(
        self,
        *answers: Mapping[str, str] | str | Callable[[], Mapping[str, str]],
        waiting: Callable[[], str | None] | None = None,
    ) -> None:
        self.answers = list(answers)
        self.questions: list[Question] = []
        self.actions: list[ExternalAction] = []
        self.told: list[str] = []
        self._waiting = waiting

    async def discovering(self) -> None:
        self.told.append("discovering")

    async def submitting_stored(self) -> None:
        self.told.append("stored")

    async def ask(self, question: Question) -> Answer:
        self.told.append("ask")
        self.questions.append(question)
        assert self.answers, f"nobody expected {question}"
        answer = self.answers.pop(0)
        if callable(answer):
            answer = answer()
        if isinstance(answer, str):
            return Answer(choice_id=answer)
        return Answer(field_values=answer)

    async def external_action(self, action: ExternalAction) -> None:
        self.told.append("external")
        self.actions.append(action)

    async def answer_within(self, seconds: float) -> Answer | None:
        choice = self._waiting() if self._waiting is not None else None
        return Answer(choice_id=choice) if choice is not None else None


class Clock:
    """A clock that goes on only by sleeping."""

    def __init__(self, now: float = 1_800_000_010.0) -> None:
        self.now = now
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def target(site: Site, **changes: Any) -> Target:
    scenario = site.scenario
    fields: dict[str, Any] = {
        "domain": site.domain,
        "login_url": site.url(f"/{scenario}/login"),
        "allow_private": True,
    }
    return Target(**(fields | changes))


async def login(site: Site, person: Scripted, **changes: Any) -> Success:
    return await HttpFormDriver().login(target(site, **changes), person)


async def failing(site: Site, person: Scripted, **changes: Any) -> DriverFailed:
    with pytest.raises(DriverFailed) as caught:
        await login(site, person, **changes)
    return caught.value


def stored(
    values: Mapping[str, str], *, totp: Totp | None = None, sso_provider: str | None = None
) -> StoredValues:
    return StoredValues(values=values, totp=totp, sso_provider=sso_provider)


def fields(question: Question) -> list[tuple[str, str, str]]:
    return [(field.id, field.type, field.reason) for field in question.fields]


def ids(question: Question) -> list[str]:
    return [choice.id for choice in question.choices]


# -- plain logins


async def test_user_name_and_password_are_asked_for_and_open_the_site() -> None:
    with Site("simple") as site:
        person = Scripted(LOGIN)
        success = await login(site, person)
        assert fields(person.questions[0]) == [
            ("username", "identifier", "missing"), ("password", "password", "missing"),
        ]  # fmt: skip
        assert person.questions[0].website_error is None
        assert person.told == ["discovering", "ask"]
        assert success.post_login_url == site.url("/simple/home")
        (posted,) = site.seen("POST", "/simple/login")
        assert set(posted.form) == {"csrf", "username", "password"}
        (cookie,) = success.storage_state["cookies"]
        assert (cookie["domain"], cookie["httpOnly"], cookie["expires"]) == ("127.0.0.1", True, -1)


@pytest.mark.parametrize("scenario", ["simple", "broken", "crowded", "admin", "identifier", "mail"])
async def test_the_login_is_found_from_the_start_page(scenario: str) -> None:
    with Site(scenario) as site:
        person = Scripted()
        failed = await failing(site, person, login_url=None, limits=Limits(questions=0))
        assert failed.code == "max_attempts_reached"  # so a question would have been asked
        assert f"/{scenario}/login" in {entry.path.rstrip("/") for entry in site.requests}


async def test_a_login_page_that_nothing_links_to_is_found_at_a_common_path() -> None:
    with Site("admin", linked=False) as site:
        success = await login(site, Scripted(LOGIN), login_url=None)
        assert success.post_login_url == site.url("/admin/")


async def test_an_identifier_comes_first_and_the_password_on_the_next_page() -> None:
    with Site("identifier") as site:
        person = Scripted({"email": EMAIL}, {"password": PASSWORD})
        await login(site, person)
        assert [fields(question) for question in person.questions] == [
            [("email", "identifier", "missing")], [("password", "password", "missing")],
        ]  # fmt: skip
        assert site.seen("POST", "/identifier/password")[0].form["email"] == EMAIL


async def test_a_wrong_identifier_is_rejected_on_its_own_page() -> None:
    with Site("identifier") as site:
        person = Scripted({"email": "nobody@example.com"}, {"email": EMAIL}, {"password": PASSWORD})
        await login(site, person)
        assert fields(person.questions[1]) == [("email", "identifier", "rejected")]
        assert person.questions[1].website_error == "We know nobody of that address."


async def test_a_wrong_password_is_a_new_question_that_says_what_the_site_says() -> None:
    with Site("simple") as site:
        person = Scripted(WRONG, LOGIN)
        await login(site, person)
        assert fields(person.questions[1]) == [
            ("username", "identifier", "rejected"), ("password", "password", "rejected"),
        ]  # fmt: skip
        assert person.questions[1].website_error == "Wrong user name or password (•••)."


async def test_a_page_without_a_form_that_says_no_leads_back_to_the_form() -> None:
    with Site("turnedaway") as site:
        person = Scripted(WRONG, LOGIN)
        success = await login(site, person)
        assert person.questions[1].website_error == "Those are not the right ones."
        assert success.post_login_url == site.url("/turnedaway/home")


async def test_latin_1_markup_without_labels_works() -> None:
    with Site("broken") as site:
        person = Scripted(
            {"username": "Jörg", "password": "geheim"}, {"username": "Jörg", "password": "päss"}
        )
        success = await login(site, person)
        assert [field.label for field in person.questions[0].fields] == ["Benutzer", "Kennwort"]
        assert person.questions[1].website_error is not None
        assert "Falscher Benutzer" in person.questions[1].website_error
        assert success.post_login_url == site.url("/broken/home")


async def test_a_list_without_a_default_is_asked_for_and_remember_me_is_ticked() -> None:
    with Site("pages") as site:
        person = Scripted({"email": EMAIL}, "eu", {"password": PASSWORD})
        await login(site, person)
        assert ids(person.questions[1]) == ["eu", "us"]
        assert site.seen("POST", "/pages/login")[0].form == {"email": EMAIL, "region": "eu"}
        assert site.seen("POST", "/pages/password")[0].form == {
            "secret": PASSWORD, "remember": "yes", "language": "en",
        }  # fmt: skip


async def test_a_relay_page_is_passed_on_without_a_question() -> None:
    with Site("relay") as site:
        success = await login(site, Scripted(LOGIN))
        assert success.post_login_url == site.url("/relay/home")


async def test_a_slow_site_is_waited_for_and_a_too_slow_one_is_a_network_error() -> None:
    with Site("slow", slow_seconds=0.05) as site:
        await login(site, Scripted(LOGIN))
        site.slow_seconds = 5
        failed = await failing(site, Scripted(), limits=Limits(request_seconds=0.2))
        assert (failed.code, failed.message) == (
            "network_error",
            "127.0.0.1 did not answer within 0.2 seconds.",
        )


async def test_not_everything_given_is_asked_again_and_not_sent() -> None:
    with Site("simple") as site:
        person = Scripted({"username": USERNAME}, LOGIN)
        await login(site, person)
        assert len(site.seen("POST", "/simple/login")) == 1


# -- Django's admin


@pytest.mark.parametrize(
    "first",
    [WRONG, {"username": OUTSIDER, "password": OUTSIDER_PASSWORD}],
    ids=["wrong password", "not staff"],
)
async def test_the_admin_of_django_takes_staff_only(first: dict[str, str]) -> None:
    with Site("admin") as site:
        person = Scripted(first, LOGIN)
        success = await login(site, person, login_url=site.url("/admin/"))
        error = person.questions[1].website_error
        assert error is not None
        assert error.startswith("Please enter the correct")
        assert success.post_login_url == site.url("/admin/")
        assert {cookie["name"] for cookie in success.storage_state["cookies"]} == {
            "csrftoken",
            f"sid{site.port}",
        }


# -- stored values


async def test_stored_values_are_sent_without_a_question() -> None:
    with Site("simple") as site:
        person = Scripted()
        await login(site, person, stored=stored({"email": EMAIL, "password": PASSWORD}))
        assert person.told == ["discovering", "stored"]


async def test_a_stored_value_that_is_rejected_is_tried_once_and_then_asked_for() -> None:
    with Site("simple") as site:
        person = Scripted(LOGIN)
        await login(site, person, stored=stored(WRONG))
        assert person.told == ["discovering", "stored", "ask"]
        assert {field.reason for field in person.questions[0].fields} == {"rejected"}
        assert [entry.form["password"] for entry in site.seen("POST", "/simple/login")] == [
            "not-the-password",
            PASSWORD,
        ]


async def test_only_what_is_not_stored_is_asked_for() -> None:
    with Site("simple") as site:
        person = Scripted({"password": PASSWORD})
        await login(site, person, stored=stored({"username": USERNAME}))
        assert fields(person.questions[0]) == [("password", "password", "missing")]


async def test_a_session_that_still_holds_is_enough() -> None:
    with Site("simple") as site:
        first = await login(site, Scripted(LOGIN))
        for changes in ({}, {"login_url": None}, {"check_url": first.post_login_url}):
            person = Scripted()
            again = await login(site, person, storage_state=first.storage_state, **changes)
            assert person.told == ["discovering"]
            assert again.storage_state == first.storage_state


async def test_a_session_that_has_ended_is_begun_anew() -> None:
    with Site("simple") as site:
        first = await login(site, Scripted(LOGIN))
        site.expire_sessions()
        person = Scripted(LOGIN)
        again = await login(site, person, storage_state=first.storage_state, check_url=first.post_login_url)
        assert len(person.questions) == 1
        assert again.storage_state != first.storage_state


# -- one-time codes


async def test_a_code_is_asked_for_when_its_secret_is_not_stored() -> None:
    clock = Clock()
    with Site("totp", now=clock) as site:
        person = Scripted(LOGIN, {"totp": "000000"}, {"totp": site.totp()})
        await login(site, person)
        (field,) = person.questions[1].fields
        assert (field.type, field.linked_mfa_type, field.input_mode) == ("totp_code", "totp", "numeric")
        assert fields(person.questions[2]) == [("totp", "totp_code", "rejected")]
        assert person.questions[2].website_error == "The code ••• is not right."


async def test_a_code_is_computed_when_its_secret_is_stored() -> None:
    clock = Clock()
    with Site("totp", now=clock) as site:
        person = Scripted()
        values = stored(LOGIN, totp=Totp(secret=TOTP_SECRET.lower()))
        await HttpFormDriver(clock=clock, sleep=clock.sleep).login(target(site, stored=values), person)
        assert person.told == ["discovering", "stored", "stored"]
        assert clock.slept == []


async def test_a_code_that_was_used_before_is_followed_by_the_next_one() -> None:
    clock = Clock()
    with Site("totp", now=clock) as site:
        driver, values = (
            HttpFormDriver(clock=clock, sleep=clock.sleep),
            stored(LOGIN, totp=Totp(secret=TOTP_SECRET)),
        )
        await driver.login(target(site, stored=values), Scripted())
        await driver.login(target(site, stored=values), Scripted())
        assert clock.slept == [20.0]  # 10 seconds into a window of 30
        codes = [entry.form["code"] for entry in site.seen("POST", "/totp/totp")]
        assert codes[0] == codes[1] != codes[2]


async def test_after_two_computed_codes_the_person_is_asked() -> None:
    clock = Clock()
    with Site("totp", now=clock) as site:
        person = Scripted(lambda: {"totp": site.totp()})
        values = stored(LOGIN, totp=Totp(secret="A" * 32))
        await HttpFormDriver(clock=clock, sleep=clock.sleep).login(target(site, stored=values), person)
        assert fields(person.questions[0]) == [("totp", "totp_code", "rejected")]
        assert len(site.seen("POST", "/totp/totp")) == 3


async def test_a_stored_secret_that_is_none_is_asked_around() -> None:
    with Site("totp") as site:
        person = Scripted({"totp": site.totp()})
        await login(site, person, stored=stored(LOGIN, totp=Totp(secret="not base 32!")))
        assert len(person.questions) == 1


async def test_a_code_by_text_message_is_asked_for_although_a_secret_is_stored() -> None:
    with Site("sms") as site:
        person = Scripted({"code": "1"}, "resend-code", {"code": SMS_CODE})
        await login(site, person, stored=stored(LOGIN, totp=Totp(secret=TOTP_SECRET)))
        (field,) = person.questions[0].fields
        assert (field.type, field.linked_mfa_type, field.hint) == ("code", "sms", "Sent to ••42")
        assert [fields(question)[0][2] for question in person.questions] == ["missing", "rejected", "missing"]
        assert {"again": "1"} in [entry.query for entry in site.seen("GET", "/sms/sms")]


async def test_a_code_in_six_boxes_is_one_field() -> None:
    with Site("boxes") as site:
        person = Scripted(LOGIN, {"code": SMS_CODE})
        await login(site, person)
        assert site.seen("POST", "/boxes/boxes")[0].form == {
            f"d{i}": digit for i, digit in enumerate(SMS_CODE)
        }


# -- choices


async def test_a_second_factor_is_chosen() -> None:
    with Site("methods") as site:
        person = Scripted(LOGIN, "sms", {"code": SMS_CODE})
        await login(site, person)
        assert [(c.id, c.type, c.mfa_type, c.masked_destination) for c in person.questions[1].choices] == [
            ("sms", "mfa_method", "sms", "••42"),
            ("email", "mfa_method", "email", "a•••@example.com"),
            ("totp", "mfa_method", "totp", None),
            ("push", "mfa_method", "push", None),
        ]
        assert person.told == ["discovering", "ask", "ask", "discovering", "ask"]


async def test_an_account_is_chosen() -> None:
    with Site("accounts") as site:
        person = Scripted(LOGIN, "team-example-com")
        await login(site, person)
        assert {choice.type for choice in person.questions[1].choices} == {"account"}
        assert site.seen("GET", "/accounts/use")[0].query == {"as": "team@example.com"}


async def test_an_organisation_is_chosen_although_the_page_offers_to_log_out() -> None:
    with Site("organisations") as site:
        person = Scripted(LOGIN, "globex")
        await login(site, person)
        assert site.seen("POST", "/organisations/choose")[0].form == {"org": "globex"}


async def test_a_choice_that_does_not_exist_is_asked_again() -> None:
    with Site("accounts") as site:
        person = Scripted(LOGIN, "nonsense", "alice-example-com")
        await login(site, person)
        assert len(person.questions) == 3


# -- identity providers


async def test_sso_buttons_are_choices_and_lead_to_the_provider_and_back() -> None:
    with Site() as provider, Site("sso", identity_provider=provider) as site:
        person = Scripted("github", LOGIN)
        success = await login(site, person, allowed_domains=(provider.domain,))
        buttons = {choice.provider: choice for choice in person.questions[0].choices}
        assert set(buttons) == {"google", "github"}
        assert all(choice.type == "sso_provider" and choice.id == name for name, choice in buttons.items())
        assert buttons["google"].observed_selector == "//*[@id='with-google']"
        assert buttons["github"].observed_selector == "/html/body/form/button"
        assert person.questions[1].sso_provider == "github"
        assert success.post_login_url == site.url("/sso/home")


async def test_the_provider_of_a_credential_is_chosen_by_itself() -> None:
    with Site() as provider, Site("sso", identity_provider=provider) as site:
        person = Scripted()
        values = stored(LOGIN, sso_provider="github")
        await login(site, person, allowed_domains=(provider.domain,), stored=values)
        assert person.questions == []
        assert len(provider.seen("POST", "/idp/authorize")) == 1


async def test_a_provider_that_is_not_allowed_gets_nothing() -> None:
    with Site() as provider, Site("sso", identity_provider=provider) as site:
        failed = await failing(site, Scripted("github"), allowed_domains=("example.com",))
        assert failed.code == "domain_not_allowed"
        assert f"add {provider.domain} to allowed_domains" in failed.message
        assert provider.seen("POST", "/idp/authorize") == []


async def test_without_restriction_the_person_decides_and_stored_values_stay_at_home() -> None:
    with Site() as provider, Site("sso", identity_provider=provider) as site:
        person = Scripted("github", LOGIN)
        await login(site, person, stored=stored(LOGIN))
        assert [field.hint for field in person.questions[1].fields] == [
            f"This goes to {provider.domain}, not to {site.domain}."
        ] * 2
        assert "stored" not in person.told


# -- where values may be entered


@pytest.mark.parametrize("allowed", [(), ("example.com",)])
async def test_a_form_that_posts_elsewhere_counts_as_elsewhere(allowed: tuple[str, ...]) -> None:
    with Site("simple") as other, Site("foreign", form_host=other.domain) as site:
        person = Scripted(LOGIN)
        failed = await failing(
            site, person, allowed_domains=allowed, stored=stored(LOGIN), limits=Limits(questions=0)
        )
        assert failed.code == ("domain_not_allowed" if allowed else "max_attempts_reached")
        assert other.requests == []


@pytest.mark.parametrize("allowed", [True, False])
async def test_a_redirect_that_keeps_the_body_takes_values_only_where_they_may_go(allowed: bool) -> None:
    with Site("simple") as other, Site("forward", form_host=other.domain) as site:
        if allowed:
            await failing(site, Scripted(LOGIN), allowed_domains=(other.domain,), limits=Limits(questions=1))
            assert other.seen("POST", "/simple/login")[0].form["password"] == PASSWORD
        else:
            # Too short to be recognised in a body: it is the body itself that must not go on.
            failed = await failing(site, Scripted({"username": "u", "password": "abc"}))
            assert failed.code == "domain_not_allowed"
            assert other.requests == []


@pytest.mark.parametrize(
    ("domain", "allowed", "url", "entry"),
    [
        ("shop.test", (), "https://shop.test/login", "free"),
        ("shop.test", (), "https://id.shop.test/login", "free"),
        ("www.shop.test", (), "https://shop.test/login", "free"),
        ("shop.test", (), "https://notshop.test/", "typed_only"),
        ("shop.test", (), "https://shop.test.evil.test/", "typed_only"),
        ("shop.test", (), "https://shop.test@evil.test/", "typed_only"),
        ("shop.test", ("id.test",), "https://evil.test/", "refused"),
        ("shop.test", ("*.id.test",), "https://a.id.test/", "free"),
        ("shop.test", ("www.id.test",), "https://id.test/", "free"),
        ("shop.test", (), "https://accounts.google.com/signin", "free"),
        ("shop.test", (), "http://accounts.google.com/signin", "typed_only"),
        ("shop.test", ("id.test",), "https://acme.okta.com/login", "free"),
        ("shop.test", ("id.test",), "https://okta.com.evil.test/login", "refused"),
        ("127.0.0.1:8000", (), "http://127.0.0.1:8000/", "free"),
        ("127.0.0.1:8000", (), "http://127.0.0.1:8001/", "typed_only"),
        ("127.0.0.1:8000", ("127.0.0.1:9",), "http://127.0.0.1:8001/", "refused"),
        ("127.0.0.1:8000", ("127.0.0.1:8001",), "http://127.0.0.1:8001/", "free"),
        ("127.0.0.1:8000", ("127.0.0.1",), "http://127.0.0.1:8001/", "free"),
        ("shop.test:8443", (), "https://shop.test/", "typed_only"),
        ("[::1]:8000", (), "http://[::1]:8000/", "free"),
    ],
)
async def test_where_values_may_be_entered(
    domain: str, allowed: tuple[str, ...], url: str, entry: str
) -> None:
    assert Places(domain, allowed).entry(url) == entry


async def test_a_page_and_its_form_must_both_be_free() -> None:
    places = Places("shop.test", ())
    assert places.entry("https://shop.test/", "https://evil.test/") == "typed_only"
    assert places.entry("https://evil.test/", "https://shop.test/") == "typed_only"
    assert places.foreign("https://shop.test/", "https://evil.test/x") == "evil.test"


def through(site: Site, port: int, **changes: Any) -> tuple[HttpFormDriver, Wires]:
    """A driver for which shop.test is a public name whose ``port`` is that of ``site``."""
    wires = Wires({(PUBLIC, port): site.port})
    return HttpFormDriver(resolver=Names(shop_test=[PUBLIC]), backend=wires, **changes), wires


async def test_a_public_name_is_met_over_tls(tmp_path: Path) -> None:
    server, trusting = certified(["shop.test"], tmp_path)
    with Site("simple", tls=server) as site:
        driver, wires = through(site, 443, ssl_context=trusting)
        success = await driver.login(Target(domain="shop.test"), Scripted(LOGIN))
        assert success.post_login_url == "https://shop.test/simple/home"
        assert set(wires.called) == {(PUBLIC, 443)}
        (posted,) = site.seen("POST", "/simple/login")
        assert posted.headers["Origin"] == "https://shop.test"
        assert posted.headers["Referer"] == "https://shop.test/simple/login"


async def test_a_public_name_without_tls_is_met_without_when_nothing_listens_there() -> None:
    with Site("simple") as site:
        driver, wires = through(site, 80)
        success = await driver.login(Target(domain="shop.test"), Scripted(LOGIN))
        assert success.post_login_url == "http://shop.test/simple/home"
        assert wires.called[:2] == [(PUBLIC, 443), (PUBLIC, 80)]


async def test_a_form_that_would_leave_tls_is_not_filled_in(tmp_path: Path) -> None:
    server, trusting = certified(["shop.test"], tmp_path)
    with Site("foreign", tls=server, form_host="shop.test") as site:
        driver, wires = through(site, 443, ssl_context=trusting)
        with pytest.raises(DriverFailed, match="without encryption") as caught:
            await driver.login(Target(domain="shop.test"), Scripted())
        assert caught.value.code == "domain_not_allowed"
        assert (PUBLIC, 80) not in wires.called


async def test_a_redirect_that_would_leave_tls_with_a_password_is_not_followed(tmp_path: Path) -> None:
    server, trusting = certified(["shop.test"], tmp_path)
    with Site("forward", tls=server, form_host="shop.test") as site:
        driver, wires = through(site, 443, ssl_context=trusting)
        with pytest.raises(DriverFailed, match="without encryption"):
            await driver.login(Target(domain="shop.test"), Scripted(LOGIN))
        assert len(site.seen("POST", "/forward/login")) == 1
        assert (PUBLIC, 80) not in wires.called


@pytest.mark.parametrize("inward", ["http://127.0.0.1:1/", "http://169.254.169.254/latest/", "http://[::1]/"])
async def test_a_site_cannot_lead_the_driver_inward(inward: str) -> None:
    with Site("inward", inward=inward) as site:
        driver, wires = through(site, 80)
        with pytest.raises(DriverFailed) as caught:
            await driver.login(
                Target(domain="shop.test", login_url="http://shop.test/inward/login"), Scripted()
            )
        assert caught.value.code == "domain_not_allowed"
        assert wires.called == [(PUBLIC, 80)]


async def test_a_private_domain_is_refused_unless_it_is_allowed() -> None:
    with Site("simple") as site:
        failed = await failing(site, Scripted(), allow_private=False)
        assert failed.code == "domain_not_allowed"
        assert site.requests == []


# -- waiting for something elsewhere


async def test_an_approval_on_the_phone_is_waited_for() -> None:
    with Site("external") as site:
        polls = 0

        def waiting() -> None:
            nonlocal polls
            polls += 1
            if polls == 3:
                site.approve()

        person = Scripted(LOGIN, waiting=waiting)
        success = await login(site, person)
        assert success.post_login_url == site.url("/external/home")
        (action,) = person.actions  # told once, as long as nothing changes
        assert "Tap 47 in the app" in action.message
        assert action.fallback is not None
        assert [choice.label for choice in action.fallback.choices] == ["Use a code instead"]


async def test_a_fallback_can_be_chosen_while_waiting() -> None:
    with Site("external") as site:
        person = Scripted(LOGIN, {"totp": site.totp()}, waiting=lambda: "use-a-code-instead")
        await login(site, person)
        assert fields(person.questions[1]) == [("totp", "totp_code", "missing")]


async def test_a_link_in_the_mail_is_waited_for_where_the_page_says() -> None:
    with Site("mail") as site:
        person = Scripted({"email": EMAIL}, waiting=lambda: site.approve())
        await login(site, person)
        assert EMAIL in person.actions[0].message
        assert site.seen("GET", "/mail/sent")[-1].query == {"poll": "1"}


async def test_nobody_waits_for_ever() -> None:
    with Site("external") as site:
        limits = Limits(external_seconds=0.05, poll_seconds=0)
        failed = await failing(site, Scripted(LOGIN), limits=limits)
        assert failed.code == "external_action_timeout"


# -- dead ends and bounds


@pytest.mark.parametrize(
    ("scenario", "code"),
    [
        ("captcha", "captcha_blocked"),
        ("wall", "bot_detected"),
        ("scripted", "unsupported_auth_method"),
        ("circle", "stuck_in_loop"),
        ("huge", "network_error"),
        ("fault", "website_error"),
        ("inward", "network_error"),
    ],
)
@pytest.mark.parametrize("from_start", [False, True])
async def test_a_dead_end_says_what_it_is_and_asks_nobody(scenario: str, code: str, from_start: bool) -> None:
    with Site(scenario) as site:
        failed = await failing(site, Scripted(), **({"login_url": None} if from_start else {}))
        assert failed.code == code
        assert "127.0.0.1" in failed.message
        assert len(site.requests) <= 15


async def test_a_site_without_a_login_says_so() -> None:
    with Site() as site:
        site.scenario = "nowhere"
        failed = await failing(site, Scripted(), login_url=site.url("/control/expire"))
        assert failed.code == "login_form_not_found"


async def test_nothing_listens_there() -> None:
    with Site("simple") as site:
        where = target(site)
    with pytest.raises(DriverFailed) as caught:
        await HttpFormDriver().login(where, Scripted())
    assert (caught.value.code, caught.value.message) == ("network_error", "127.0.0.1 refused the connection.")


async def test_a_form_that_comes_back_without_a_word_is_a_loop() -> None:
    with Site("silent") as site:
        failed = await failing(site, Scripted(LOGIN, LOGIN, LOGIN), stored=stored(LOGIN))
        assert failed.code == "stuck_in_loop"
        assert len(site.seen("POST", "/silent/login")) == 3


@pytest.mark.parametrize(
    ("scenario", "answer", "code"),
    [("simple", WRONG, "credentials_invalid"), ("totp", {"totp": "000000"}, "totp_code_rejected")],
)
async def test_many_wrong_values_end_the_login(scenario: str, answer: dict[str, str], code: str) -> None:
    with Site(scenario) as site:
        first = [LOGIN] if scenario == "totp" else []
        person = Scripted(*first, *[answer] * 9)
        failed = await failing(site, person, limits=Limits(questions=4))
        assert failed.code == code
        assert len(person.questions) == 4
        assert failed.website_error


async def test_more_pages_than_allowed_are_a_loop() -> None:
    with Site("simple") as site:
        failed = await failing(site, Scripted(*[WRONG] * 20), limits=Limits(pages=5))
        assert failed.code == "stuck_in_loop"
        assert len(site.requests) == 5


async def test_a_login_can_be_cancelled() -> None:
    with Site("external") as site:
        waiting = asyncio.Event()

        class Patient(Scripted):
            async def answer_within(self, seconds: float) -> Answer | None:
                waiting.set()
                await asyncio.Event().wait()
                return None

        task = asyncio.create_task(login(site, Patient(LOGIN)))
        await waiting.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


# -- secrets


async def test_no_value_is_in_any_log_line_error_or_url(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with Site("get") as site:
        person = Scripted(WRONG, LOGIN)
        success = await login(site, person)
        assert site.requests[-1].query["password"] == PASSWORD  # sent in the URL, as the form wants it
        assert success.post_login_url == site.url("/get/login")
        failed = await failing(site, Scripted(*[WRONG] * 3), limits=Limits(questions=2))
    everything = (
        f"{caplog.text} {person.questions} {failed!r} {failed.message} {failed.website_error} {success!r}"
    )
    for value in (WRONG["password"], PASSWORD, PASSWORD.replace(" ", "+"), PASSWORD.replace(" ", "%20")):
        assert value not in everything


async def test_submitted_values_are_hidden_from_what_is_shown() -> None:
    secrets = Secrets()
    secrets.add("hunter2!", secret=True)
    secrets.add("ann@x.test", secret=False)
    secrets.add("a", secret=True)
    assert secrets.hide("No: HUNTER2! of ann@x.test") == "No: ••• of •••"
    assert secrets.hide("Sent to ann@x.test", names=False) == "Sent to ann@x.test"
    assert secrets.hide("a password, a") == "••• password, •••"
    assert len(secrets.hide("x" * 1000)) == 300
    assert secrets.clean_url("https://x.test/a?u=ann%40x.test#f") == "https://x.test/a"
    assert secrets.clean_url("https://x.test/a?tab=1") == "https://x.test/a?tab=1"


# -- checks


async def test_a_session_is_checked_where_it_was_seen_last() -> None:
    with Site("simple") as site:
        success = await login(site, Scripted(LOGIN))
        for check_url in (success.post_login_url, None):
            where = target(site, storage_state=success.storage_state, check_url=check_url)
            assert await HttpFormDriver().check(where) is True
        site.expire_sessions()
        for check_url in (success.post_login_url, None):
            where = target(site, storage_state=success.storage_state, check_url=check_url)
            assert await HttpFormDriver().check(where) is False


@pytest.mark.parametrize("scenario", ["fault", "circle", "huge", "captcha", "scripted", "wall", "inward"])
async def test_a_check_that_learns_nothing_says_so(scenario: str) -> None:
    with Site("simple") as site:
        state = (await login(site, Scripted(LOGIN))).storage_state
    with Site(scenario) as site:
        where = target(site, storage_state=state, check_url=site.url(f"/{scenario}/login"))
        expected = None
        assert await HttpFormDriver().check(where) is expected


async def test_without_cookies_there_is_no_session() -> None:
    with Site("simple") as site:
        assert await HttpFormDriver().check(target(site, storage_state={"cookies": []})) is False
        assert site.requests == []
