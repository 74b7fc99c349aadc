"""The hosted page over HTTP, without a script: what a plain browser gets, and what the script is answered."""

from __future__ import annotations

import dataclasses
import datetime as dt
import re
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from django.conf import LazySettings
from django.contrib.auth.models import User
from django.test import Client
from django.utils import timezone

from connections import handoff, hosted, tasks, transitions
from connections.access import Principal
from connections.models import LoginFlow
from connections.states import FlowStep
from connections.tasks import Hold

USERNAME: dict[str, Any] = {"id": "f1", "ref": "username", "type": "identifier", "label": "User name"}
PASSWORD: dict[str, Any] = {"id": "f2", "ref": "password", "type": "password", "label": "Password"}
CODE: dict[str, Any] = {"id": "f3", "ref": "code", "type": "code", "label": "Code", "hint": "Sent to ••42"}
SECRET = "correct horse battery staple"


@dataclasses.dataclass
class Login:
    """A login that runs, its worker, and the browser of the end user."""

    flow: LoginFlow
    code: str
    hold: Hold
    browser: Client
    now: dt.datetime

    @property
    def url(self) -> str:
        return f"/login/{self.flow.connection_id}"

    @property
    def link(self) -> str:
        return f"{self.url}?code={self.code}"

    def json(self, path: str, data: dict[str, str] | None = None) -> Any:
        headers = {"accept": "application/json", **self.csrf()}
        if data is None:
            return self.browser.get(self.url + path, headers=headers)
        return self.browser.post(self.url + path, data, headers=headers)

    def csrf(self) -> dict[str, str]:
        cookie = self.browser.cookies.get("csrftoken")
        return {"X-CSRFToken": cookie.value} if cookie else {}

    def open(self) -> Any:
        """Follow the link and press Continue, without a script."""
        self.browser.get(self.link)
        answer = self.browser.post(
            self.url + "/start", {"code": self.code, "csrfmiddlewaretoken": self.csrf()["X-CSRFToken"]}
        )
        assert answer.status_code == 303, answer.content
        return self.browser.get(answer["Location"])

    def ask(
        self, *fields: dict[str, Any], choices: list[dict[str, Any]] | None = None, error: str = ""
    ) -> str:
        flow = transitions.await_input(
            hold=self.hold, fields=list(fields), choices=choices or [], website_error=error, now=self.now
        )
        return flow.interaction_id

    def succeed(self) -> None:
        transitions.succeed(
            hold=self.hold, storage_state={}, post_login_url="http://site.example/", values={}, requirements={}, now=self.now,
        )  # fmt: skip


@pytest.fixture
def login(owner: User, principal: Principal) -> Login:
    now = timezone.now()
    row = transitions.create_connection(
        owner_id=owner.pk, domain="acme-bank.example", profile_name="Finance <agent>", config={}, actor=principal, now=now,
    )  # fmt: skip
    flow, code = transitions.start_login(connection_id=row.id, actor=principal, now=now)
    hold = tasks.claim(worker="w", kinds=["login"], now=now)
    assert hold is not None
    return Login(flow=flow, code=code, hold=hold, browser=Client(enforce_csrf_checks=True), now=now)


def text_of(response: Any) -> str:
    return str(response.content.decode())


# ── PRIME and the exchange ──


def test_A03_opening_the_link_consumes_nothing_however_often(login: Login) -> None:
    for _ in range(3):
        preview = Client().get(login.link, headers={"user-agent": "Slackbot"})
        assert preview.status_code == 200
        assert "Continue" in text_of(preview)
        assert handoff.PAGE_COOKIE not in preview.cookies
    login.flow.refresh_from_db()
    assert login.flow.exchanged_at is None


def test_the_page_says_which_site_and_profile_and_never_whose(login: Login, owner: User) -> None:
    text = text_of(login.browser.get(login.link))
    assert "Sign in to acme-bank.example" in text
    assert "Finance &lt;agent&gt;" in text
    assert owner.username not in text


def test_A32_without_a_script_continue_is_a_form_that_leads_to_the_present_card(login: Login) -> None:
    page = login.open()
    text = text_of(page)
    assert 'data-kind="discovering"' in text
    assert '<noscript><meta http-equiv="refresh" content="5"></noscript>' in text


def test_A03_the_cookies_are_http_only_and_bound_to_page_and_stream(
    login: Login, settings: LazySettings
) -> None:
    settings.USE_HTTPS = True
    login.browser.get(login.link)
    answer = login.browser.post(
        login.url + "/start", {"code": login.code, "csrfmiddlewaretoken": login.csrf()["X-CSRFToken"]}
    )
    page, stream = answer.cookies[handoff.PAGE_COOKIE], answer.cookies[handoff.STREAM_COOKIE]
    assert page["path"] == login.url
    assert stream["path"] == f"/auth/connections/{login.flow.connection_id}/events"
    for cookie in (page, stream):
        assert cookie["httponly"]
        assert cookie["secure"]
        assert (cookie["samesite"], cookie["max-age"]) == ("Lax", 1800)
    assert page.value == stream.value
    assert login.code not in text_of(answer)


def test_A03_a_second_person_with_the_same_link_is_told_that_it_has_ended(login: Login) -> None:
    login.open()
    other = Client(REMOTE_ADDR="10.9.9.9").get(login.link)
    assert other.status_code == 410
    assert "This link has ended" in text_of(other)


def test_A03_the_link_again_in_the_same_browser_leads_on_to_the_present_card(login: Login) -> None:
    login.open()
    again = login.browser.get(login.link)
    assert again.status_code == 200
    assert 'data-kind="discovering"' in text_of(again)
    answer = login.json("/start", {"code": login.code})
    assert (answer.status_code, answer.json()["flow_step"]) == (200, "DISCOVERING")


def test_A31_the_start_answers_the_script_with_the_present_card(login: Login) -> None:
    login.ask(USERNAME, PASSWORD)
    login.browser.get(login.link)
    body = login.json("/start", {"code": login.code}).json()
    flow = LoginFlow.objects.get(pk=login.flow.id)
    assert body["version"] == flow.version
    assert (body["flow_status"], body["flow_step"]) == ("IN_PROGRESS", "AWAITING_INPUT")
    assert body["interaction_id"] == flow.interaction_id
    assert f'data-version="{flow.version}"' in body["html"]


@pytest.mark.parametrize("path", ["/login/ma_unknown", "/login/ma_unknown?code=x", "/login/ma_unknown/start"])
def test_unknown_and_foreign_look_the_same(login: Login, path: str) -> None:
    foreign = path.replace("ma_unknown", login.flow.connection_id)
    answers = []
    for url in (path, foreign):
        client = Client()
        answers.append(client.post(url, {"code": "x"}) if url.endswith("start") else client.get(url))
    assert [answer.status_code for answer in answers] == [404, 404]
    texts = [re.sub(r'data-(now|connection)="[^"]*"', "", text_of(answer)) for answer in answers]
    texts = [re.sub(r'value="[^"]{64}"', "", text) for text in texts]
    assert texts[0] == texts[1]
    assert "There is no sign-in here" in texts[0]


def test_A17_the_state_is_401_without_a_cookie_and_410_after_the_end(login: Login) -> None:
    assert Client().get(login.url + "/state").status_code == 401
    login.open()
    assert login.json("/state").status_code == 200
    LoginFlow.objects.filter(pk=login.flow.id).update(expires_at=timezone.now())
    answer = login.json("/state")
    assert (answer.status_code, answer.json()["code"]) == (410, "session_expired")
    assert "This link has ended" in answer.json()["html"]
    # Expiry is evaluated on read.
    login.flow.refresh_from_db()
    assert login.flow.status == "EXPIRED"


def test_A02_the_cookie_of_another_connection_opens_nothing(
    login: Login, owner: User, principal: Principal
) -> None:
    row = transitions.create_connection(
        owner_id=owner.pk, domain="other.example", profile_name="o", config={}, actor=principal, now=login.now
    )
    flow, _ = transitions.start_login(connection_id=row.id, actor=principal, now=login.now)
    client = Client()
    client.cookies[handoff.PAGE_COOKIE] = handoff.token_of(flow, at=login.now)
    assert client.get(login.url).status_code == 404
    assert client.get(f"/login/{row.id}").status_code == 200


# ── headers, CSRF ──


def test_the_page_is_not_stored_not_referred_and_runs_nothing_inline(login: Login) -> None:
    for answer in (
        login.browser.get(login.link),
        login.open(),
        login.json("/state"),
        Client().get("/login/nobody"),
    ):
        assert answer["Cache-Control"] == "no-store"
        assert answer["Referrer-Policy"] == "no-referrer"
        policy = answer["Content-Security-Policy"]
        assert "form-action 'self'" in policy
        assert "frame-ancestors 'none'" in policy
        assert not re.search(r'\son\w+=|style="|<script(?![^>]*\ssrc=)', text_of(answer))


def test_the_page_may_be_framed_by_the_origins_of_the_settings(login: Login, settings: LazySettings) -> None:
    settings.FRAME_ANCESTORS = ["https://app.example"]
    answer = login.browser.get(login.link)
    assert "frame-ancestors https://app.example" in answer["Content-Security-Policy"]
    assert "X-Frame-Options" not in answer


def test_a_post_without_the_page_is_refused_and_says_why(login: Login) -> None:
    answer = Client(enforce_csrf_checks=True).post(login.url + "/start", {"code": login.code})
    assert answer.status_code == 403
    assert "cookies" in text_of(answer)
    login.flow.refresh_from_db()
    assert login.flow.exchanged_at is None


@pytest.mark.parametrize(
    ("origin", "site", "status"),
    [
        ("null", "same-origin", 303),
        ("null", "cross-site", 403),
        ("http://testserver", "same-origin", 303),
        ("https://evil.example", "cross-site", 403),
    ],
)
def test_a_form_of_a_page_without_referrer_comes_with_origin_null(
    login: Login, origin: str, site: str, status: int
) -> None:
    login.browser.get(login.link)
    data = {"code": login.code, "csrfmiddlewaretoken": login.csrf()["X-CSRFToken"]}
    answer = login.browser.post(
        login.url + "/start", data, headers={"origin": origin, "sec-fetch-site": site}
    )
    assert answer.status_code == status


# ── the answer ──


def test_A06_a_form_is_submitted_without_a_script(login: Login) -> None:
    login.open()
    interaction = login.ask(USERNAME, PASSWORD)
    page = text_of(login.browser.get(login.url))
    assert 'autocomplete="username"' in page
    assert 'type="password" autocomplete="current-password"' in page
    token = re.search(r'csrfmiddlewaretoken" value="([^"]+)"', page)
    assert token
    data = {
        "csrfmiddlewaretoken": token[1],
        "interaction_id": interaction,
        "field.f1": "alice",
        "field.f2": SECRET,
    }
    answer = login.browser.post(login.url + "/submit", data)
    assert (answer.status_code, answer["Location"]) == (303, login.url)
    assert 'data-kind="submitting"' in text_of(login.browser.get(login.url))
    taken = transitions.take_submission(hold=login.hold, now=login.now)
    assert taken is not None
    assert taken.field_values == {"f1": "alice", "f2": SECRET}


def test_A06_the_script_is_answered_with_the_next_version_and_the_submitting_card(login: Login) -> None:
    login.open()
    interaction = login.ask(USERNAME, PASSWORD)
    before = LoginFlow.objects.get(pk=login.flow.id).version
    data = {"interaction_id": interaction, "field.f1": "alice", "field.f2": SECRET}
    answer = login.json("/submit", data)
    body = answer.json()
    assert (answer.status_code, body["accepted"], body["flow_step"]) == (202, True, "SUBMITTING")
    assert body["version"] > before
    assert 'data-kind="submitting"' in body["html"]
    # A48: and nothing of what was typed.
    assert SECRET not in text_of(answer)
    # Again, because the first answer was lost: accepted again, acted on once.
    assert login.json("/submit", data).status_code == 202
    assert LoginFlow.objects.get(pk=login.flow.id).submissions.count() == 1


def test_A28_a_stale_interaction_is_answered_with_the_new_form_and_a_message(login: Login) -> None:
    login.open()
    old = login.ask(USERNAME, PASSWORD)
    login.json("/submit", {"interaction_id": old, "field.f1": "a", "field.f2": "b"})
    transitions.take_submission(hold=login.hold, now=login.now)
    new = login.ask(CODE)
    answer = login.json("/submit", {"interaction_id": old, "field.f1": "a", "field.f2": SECRET})
    body = answer.json()
    assert (answer.status_code, body["code"]) == (400, "stale_interaction")
    assert body["message"]
    assert f'id="form-{new}"' in body["html"]
    page = login.browser.post(
        login.url + "/submit",
        {"interaction_id": old, "field.f2": SECRET, "csrfmiddlewaretoken": login.csrf()["X-CSRFToken"]},
    )
    assert page.status_code == 400
    assert body["message"] in text_of(page)
    assert f'id="form-{new}"' in text_of(page)
    assert SECRET not in text_of(answer) + text_of(page)


def test_A29_an_answer_without_its_interaction_is_refused(login: Login) -> None:
    login.open()
    login.ask(USERNAME, PASSWORD)
    answer = login.json("/submit", {"field.f1": "alice", "field.f2": SECRET})
    assert (answer.status_code, answer.json()["code"]) == (400, "invalid_submission")
    assert LoginFlow.objects.get(pk=login.flow.id).step == FlowStep.AWAITING_INPUT


def test_A44_a_missing_field_is_said_on_the_page_and_secrets_are_not_echoed(login: Login) -> None:
    login.open()
    interaction = login.ask(USERNAME, PASSWORD)
    data = {"interaction_id": interaction, "field.f1": "", "field.f2": SECRET}
    answer = login.json("/submit", data)
    assert (answer.status_code, answer.json()["code"]) == (400, "invalid_submission")
    assert answer.json()["details"]
    page = login.browser.post(
        login.url + "/submit", {**data, "csrfmiddlewaretoken": login.csrf()["X-CSRFToken"]}
    )
    assert page.status_code == 400
    assert "Please fill in: User name." in text_of(page)
    assert SECRET not in text_of(page) + text_of(answer)


def test_A18_an_answer_after_the_end_is_410_with_the_card_of_the_end(login: Login) -> None:
    login.open()
    interaction = login.ask(USERNAME, PASSWORD)
    transitions.fail(hold=login.hold, code="network_error", message="The site is down.", now=login.now)
    answer = login.json("/submit", {"interaction_id": interaction, "field.f1": "a", "field.f2": SECRET})
    assert (answer.status_code, answer.json()["code"]) == (410, "no_active_flow")
    assert 'data-kind="error"' in answer.json()["html"]
    assert SECRET not in text_of(answer)


# ── cards ──


def test_A45_a_rejected_field_is_marked_with_words_and_the_new_form_is_a_new_element(login: Login) -> None:
    first = login.ask(USERNAME, PASSWORD)
    html = hosted.card_html(login.flow.id)
    assert f'id="form-{first}"' in html
    assert "aria-invalid" not in html
    transitions.discovering(hold=login.hold, now=login.now)
    second = login.ask(USERNAME, {**PASSWORD, "reason": "rejected"}, error="Wrong <b>password</b>")
    html = hosted.card_html(login.flow.id)
    assert f'id="form-{second}"' in html
    assert first not in html
    assert html.count('aria-invalid="true"') == 1
    assert "Not accepted." in html
    assert "Wrong &lt;b&gt;password&lt;/b&gt;" in html


def test_A09_a_card_shows_the_present_question_and_nothing_of_the_one_before(login: Login) -> None:
    login.ask(USERNAME, PASSWORD, error="Wrong")
    transitions.discovering(hold=login.hold, now=login.now)
    login.ask(CODE)
    html = hosted.card_html(login.flow.id)
    assert 'data-kind="code"' in html
    assert 'autocomplete="one-time-code"' in html
    assert 'inputmode="numeric"' in html
    assert "Sent to ••42" in html
    assert "Password" not in html
    assert "Wrong" not in html


def test_choices_are_buttons_with_another_way_last_and_identity_providers_apart(login: Login) -> None:
    login.open()
    interaction = login.ask(
        choices=[
            {"id": "other", "type": "mfa_method", "mfa_type": "switch", "label": "Another way"},
            {
                "id": "sms",
                "type": "mfa_method",
                "mfa_type": "sms",
                "label": "Text",
                "masked_destination": "••42",
            },
            {"id": "google", "type": "sso_provider", "label": "Continue with Google"},
        ]
    )
    html = hosted.card_html(login.flow.id)
    assert html.index("Text") < html.index("Another way") < html.index("Continue with Google")
    assert "••42" in html
    answer = login.json("/submit", {"interaction_id": interaction, "selected_choice_id": "sms"})
    assert answer.status_code == 202
    taken = transitions.take_submission(hold=login.hold, now=login.now)
    assert taken is not None
    assert taken.choice_id == "sms"


def test_A10_the_provider_buttons_follow_the_question(login: Login) -> None:
    login.ask(USERNAME, choices=[{"id": "github", "type": "sso_provider", "label": "Continue with GitHub"}])
    assert "Continue with GitHub" in hosted.card_html(login.flow.id)
    transitions.discovering(hold=login.hold, now=login.now)
    login.ask(PASSWORD)
    assert "GitHub" not in hosted.card_html(login.flow.id)


def test_A46_an_external_action_shows_its_text_the_alternatives_and_the_time_left(login: Login) -> None:
    transitions.await_external_action(
        hold=login.hold,
        message="Tap 47 in the app",
        fields=[],
        choices=[{"id": "totp", "type": "mfa_method", "mfa_type": "totp", "label": "Use a code instead"}],
        now=login.now,
    )
    html = hosted.card_html(login.flow.id)
    assert 'data-kind="external"' in html
    for text in ("Tap 47 in the app", "Use a code instead", "data-deadline"):
        assert text in html


def test_A47_human_intervention_is_a_card_of_its_own(login: Login) -> None:
    transitions.await_human(hold=login.hold, live_view_url="https://view.example/1", now=login.now)
    html = hosted.card_html(login.flow.id)
    assert 'data-kind="human"' in html
    assert 'href="https://view.example/1"' in html


def test_a_card_is_the_same_for_every_viewer_and_holds_no_token(login: Login) -> None:
    login.ask(USERNAME, PASSWORD)
    html = hosted.card_html(login.flow.id)
    assert "csrfmiddlewaretoken" not in html
    assert html == hosted.card_html(login.flow.id)
    assert " autofocus" not in html


def test_A13_an_error_shows_the_sites_words_and_its_code(login: Login) -> None:
    transitions.fail(
        hold=login.hold, code="credentials_invalid", message="The site refused.", website_error="Locked <out>", now=login.now,
    )  # fmt: skip
    html = hosted.card_html(login.flow.id)
    for text in (
        "The site refused.",
        "Locked &lt;out&gt;",
        '<code class="error-code">credentials_invalid</code>',
    ):
        assert text in html


@pytest.mark.parametrize(
    ("message", "said", "shown"),
    [
        ("The site refused.", "Locked.", "The site refused."),
        ("", "Locked.", "Locked."),
        ("", "", "The sign-in did not work."),
    ],
)
def test_A13_the_message_is_the_error_else_the_sites_words_else_a_default(
    login: Login, message: str, said: str, shown: str
) -> None:
    flow = transitions.fail(
        hold=login.hold, code="website_error", message=message, website_error=said, now=login.now
    )
    assert hosted.card_of(flow, now=login.now)["callback_message"] == shown


def test_A48_neither_code_nor_values_get_into_the_server_log(
    login: Login, caplog: pytest.LogCaptureFixture
) -> None:
    login.open()
    interaction = login.ask(USERNAME, PASSWORD)
    login.json("/submit", {"interaction_id": "mai_old", "field.f1": "alice", "field.f2": SECRET})
    login.json("/submit", {"interaction_id": interaction, "field.f1": "", "field.f2": SECRET})
    Client(REMOTE_ADDR="10.9.9.9").get(login.link)
    Client(enforce_csrf_checks=True).post(login.url + "/start", {"code": login.code})
    assert caplog.records
    for text in (login.code, SECRET):
        assert text not in caplog.text


def test_A48_a_cancelled_login_does_not_show_the_operators_words(login: Login, principal: Principal) -> None:
    transitions.cancel(
        connection_id=login.flow.connection_id, actor=principal, reason="fraud?", now=login.now
    )
    html = hosted.card_html(login.flow.id)
    assert "This sign-in was cancelled" in html
    assert "fraud" not in html


def test_a_deleted_flow_has_a_card_too(login: Login, principal: Principal) -> None:
    transitions.delete_connection(connection_id=login.flow.connection_id, actor=principal, now=login.now)
    assert "This link has ended" in hosted.card_html(login.flow.id)


def test_a_discovery_that_takes_long_says_that_it_goes_on(login: Login) -> None:
    card = hosted.card_of(login.flow, now=login.now + dt.timedelta(seconds=46))
    assert (card["slow"], card["announce"]) == (True, "Still working. You can keep this open.")
    assert not hosted.card_of(login.flow, now=login.now)["slow"]


# ── going back ──


@pytest.mark.parametrize(
    ("url", "allowed"),
    [
        ("https://app.example/done?x=1", True),
        ("https://app.example", True),
        ("https://app.example:443/", True),
        ("HTTPS://APP.example/", True),
        ("http://app.example/", False),
        ("https://app.example:8443/", False),
        ("https://app.example.evil.example/", False),
        ("https://app.example@evil.example/", False),
        ("https://evil.example/#https://app.example", False),
        ("https://user@app.example/", False),
        ("//app.example/", False),
        ("/done", False),
        ("javascript:alert(1)//https://app.example", False),
        ("https://app.example\\@evil.example/", False),
        ("https://app.example\n.evil.example/", False),
        (" https://app.example/", False),
        ("https://app.example:port/", False),
        ("data:text/html,x", False),
        ("", False),
    ],
)
def test_a_return_address_has_exactly_an_origin_of_the_list(
    settings: LazySettings, url: str, allowed: bool
) -> None:
    settings.RETURN_URLS = ["https://app.example"]
    assert hosted.allowed_return_url(url) is allowed


def test_a_refused_return_address_is_ignored_and_said(login: Login, settings: LazySettings) -> None:
    settings.RETURN_URLS = ["https://app.example"]
    text = text_of(login.browser.get(login.link + "&success_url=https://evil.example/"))
    assert "evil.example" not in text
    assert "is not on this service" in text


def test_A12_after_success_the_page_leads_to_the_success_url_with_profile_and_domain(
    login: Login, settings: LazySettings
) -> None:
    settings.RETURN_URLS = ["https://app.example"]
    login.browser.get(login.link + "&success_url=https://app.example/done?a=b")
    login.json("/start", {"code": login.code})
    login.succeed()
    page = text_of(login.browser.get(login.url))
    assert "You are signed in" in page
    href = re.search(r'<a class="button primary block" href="([^"]+)"', page)
    assert href
    target = urlsplit(href[1].replace("&amp;", "&"))
    assert (target.netloc, target.path) == ("app.example", "/done")
    assert parse_qs(target.query) == {
        "a": ["b"],
        "profile_name": ["Finance <agent>"],
        "domain": ["acme-bank.example"],
    }


def test_A13_after_a_failure_the_page_leads_to_the_error_url_with_code_and_message(
    login: Login, settings: LazySettings
) -> None:
    settings.RETURN_URLS = ["https://app.example"]
    login.browser.get(login.link + "&error_url=https://app.example/oh&success_url=https://app.example/")
    login.json("/start", {"code": login.code})
    transitions.fail(
        hold=login.hold, code="network_error", message="Down.", website_error="Site words", now=login.now
    )
    page = text_of(login.browser.get(login.url))
    href = re.search(r'<a class="button primary block" href="([^"]+)"', page)
    assert href
    query = parse_qs(urlsplit(href[1].replace("&amp;", "&")).query)
    assert query == {"code": ["network_error"], "message": ["Down."]}


def test_a_forged_or_foreign_return_cookie_leads_nowhere(login: Login, settings: LazySettings) -> None:
    settings.RETURN_URLS = ["https://app.example"]
    login.browser.get(login.link + "&success_url=https://app.example/done")
    kept = login.browser.cookies[hosted.RETURN_COOKIE].value
    login.open()
    for value in (kept[:-2], "x", ""):
        login.browser.cookies[hosted.RETURN_COOKIE] = value
        assert "app.example/done" not in text_of(login.browser.get(login.url))
    login.browser.cookies[hosted.RETURN_COOKIE] = kept
    assert "app.example/done" in text_of(login.browser.get(login.url))
    # The list became shorter meanwhile.
    settings.RETURN_URLS = []
    assert "app.example/done" not in text_of(login.browser.get(login.url))


def test_A13_a_link_that_has_ended_leads_to_the_error_url_too(login: Login, settings: LazySettings) -> None:
    settings.RETURN_URLS = ["https://app.example"]
    login.open()
    late = Client(REMOTE_ADDR="10.9.9.9").get(login.link + "&error_url=https://app.example/oh")
    assert late.status_code == 410
    assert 'content="3; url=https://app.example/oh?code=session_expired&amp;message=' in text_of(late)
