"""The hosted page in a real Chromium, against a real server, a real worker and a real (small) web site."""

from __future__ import annotations

import dataclasses
import json
import re
import secrets
import urllib.request
from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, Request, Route, expect

from tests.browser import clock
from tests.conftest import Running, run_switchboard, until
from tests.sites.app import PASSWORD, SMS_CODE, USERNAME, Site

pytestmark = [pytest.mark.browser, pytest.mark.live]

#: Every kind of card that was ever on the page, and every break of its Content-Security-Policy.
WATCH = """
document.addEventListener("securitypolicyviolation", (event) =>
  console.error(`csp-violation ${event.violatedDirective} ${event.blockedURI} ${event.sample}`));
globalThis.kinds = [];
document.addEventListener("DOMContentLoaded", () => {
  const note = () => {
    const card = document.getElementById("card");
    if (card && kinds.at(-1) !== card.dataset.kind) kinds.push(card.dataset.kind);
  };
  note();
  new MutationObserver(note).observe(document.body, { childList: true, subtree: true });
});
"""


@dataclasses.dataclass
class Stage:
    """Server, worker, site and browser, and what was seen of them."""

    running: Running
    site: Site
    browser: Browser
    problems: list[str] = dataclasses.field(default_factory=list)
    contexts: list[BrowserContext] = dataclasses.field(default_factory=list)

    def api(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        request = urllib.request.Request(
            self.running.url + path,
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Authorization": f"Bearer {self.running.api_key}", "Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=20) as answer:
            return json.load(answer)

    def login(self, scenario: str) -> tuple[str, str]:
        """A fresh login to a scenario of the site: the id of its connection, and the link of its page."""
        connection = self.api(
            "POST",
            "/auth/connections",
            {
                "domain": self.site.domain,
                "profile_name": f"{scenario} {secrets.token_hex(4)}",
                "login_url": self.site.url(f"/{scenario}/login"),
            },
        )
        started = self.api("POST", f"/auth/connections/{connection['id']}/login", {})
        return connection["id"], started["hosted_url"]

    def state(self, connection: str) -> Any:
        return self.api("GET", f"/auth/connections/{connection}")

    def wait_for_step(self, connection: str, step: str) -> Any:
        def there() -> Any:
            state = self.state(connection)
            return state if state["flow_step"] == step else None

        return until(there, 20, f"the flow did not come to {step}")

    def context(self, **options: Any) -> BrowserContext:
        context = self.browser.new_context(viewport={"width": 390, "height": 844}, **options)
        context.set_default_timeout(20_000)
        context.add_init_script(WATCH)
        self.contexts.append(context)
        return context

    def page(self, context: BrowserContext | None = None) -> Page:
        page = (context or self.context()).new_page()
        page.on("console", lambda message: self._note(message.text))
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        return page

    def _note(self, text: str) -> None:
        if "csp-violation" in text or "Content Security Policy" in text or "TrustedHTML" in text:
            self.problems.append(text)


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with Site() as site:
        yield site


@pytest.fixture(scope="module")
def server(site: Site, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with run_switchboard(tmp_path_factory.mktemp("hosted"), RETURN_URLS=site.url("")) as running:
        yield running


@pytest.fixture
def stage(server: Running, site: Site, chromium: Browser) -> Iterator[Stage]:
    stage = Stage(server, site, chromium)
    yield stage
    for context in stage.contexts:
        context.close()
    assert stage.problems == [], "the page broke its own policy, or raised an error"


def press_continue(page: Page) -> None:
    page.get_by_role("button", name="Continue").click()


def sign_in(page: Page, password: str = PASSWORD) -> None:
    page.get_by_label("User name").fill(USERNAME)
    page.get_by_label("Password", exact=True).fill(password)
    press_continue(page)


def kinds(page: Page) -> list[str]:
    seen: list[str] = page.evaluate("kinds")
    return seen


def asked(page: Page, path: str) -> list[Request]:
    """The requests for a path from here on."""
    seen: list[Request] = []
    page.on(
        "request", lambda request: seen.append(request) if urlsplit(request.url).path.endswith(path) else None
    )
    return seen


def heading(page: Page, text: str) -> None:
    expect(page.get_by_role("heading", level=1)).to_have_text(text)


# ── the whole walk ──


def test_A01_A06_A45_from_the_link_to_success_with_a_wrong_password_and_a_code_over_one_stream(
    stage: Stage,
) -> None:
    connection, link = stage.login("sms")
    page = stage.page()
    streams, states = asked(page, "/events"), asked(page, "/state")
    page.goto(link)
    heading(page, f"Sign in to {stage.site.domain}")
    press_continue(page)

    expect(page.get_by_label("User name")).to_be_focused()
    assert "code=" not in page.url
    sign_in(page, "wrong password")
    expect(page.locator("[aria-invalid=true]").first).to_be_visible()
    expect(page.get_by_label("Password", exact=True)).to_have_value("")
    assert "wrong password" not in page.content()

    sign_in(page)
    expect(page.get_by_role("textbox", name="Code")).to_be_focused()
    expect(page.get_by_role("textbox", name="Code")).to_have_attribute("autocomplete", "one-time-code")
    page.get_by_role("textbox", name="Code").fill(SMS_CODE)
    page.keyboard.press("Enter")

    heading(page, "You are signed in")
    expect(page.get_by_role("heading", level=1)).to_be_focused()
    expect(page.get_by_role("status")).to_contain_text("You are signed in")
    assert stage.state(connection)["status"] == "AUTHENTICATED"
    assert (len(streams), len(states)) == (1, 0)
    # The password was asked for twice, and no answered question ever came back.
    shown = [kind for kind in kinds(page) if kind not in ("submitting", "discovering")]
    assert shown == ["prime", "form", "form", "code", "success"]


def test_without_javascript_the_page_leads_to_success(stage: Stage) -> None:
    connection, link = stage.login("sms")
    page = stage.page(stage.context(java_script_enabled=False))
    page.goto(link)
    press_continue(page)
    # Waiting states reload by themselves, every 5 s.
    sign_in(page, "wrong password")
    expect(page.locator("[aria-invalid=true]").first).to_be_visible()
    sign_in(page)
    page.get_by_role("textbox", name="Code").fill(SMS_CODE)
    press_continue(page)
    expect(page.get_by_role("heading", name="You are signed in")).to_be_visible()
    assert stage.state(connection)["status"] == "AUTHENTICATED"


def test_A50_two_tabs_show_the_same_and_an_answer_in_one_moves_the_other(stage: Stage) -> None:
    _, link = stage.login("sms")
    context = stage.context()
    first, second = stage.page(context), stage.page(context)
    first.goto(link)
    press_continue(first)
    expect(first.get_by_label("User name")).to_be_visible()
    second.goto(first.url)
    expect(second.get_by_label("User name")).to_be_visible()
    sign_in(first)
    for page in (first, second):
        expect(page.get_by_role("textbox", name="Code")).to_be_visible()
    second.get_by_role("textbox", name="Code").fill(SMS_CODE)
    press_continue(second)
    heading(first, "You are signed in")
    heading(second, "You are signed in")


def test_A46_an_external_action_is_shown_with_its_number_and_goes_on_by_itself(stage: Stage) -> None:
    _, link = stage.login("external")
    page = stage.page()
    page.goto(link)
    press_continue(page)
    sign_in(page)
    expect(page.locator(".message")).to_contain_text("47")
    expect(page.locator("time[data-deadline]")).to_contain_text("left")
    stage.site.approve()
    heading(page, "You are signed in")


# ── the start ──


def test_A03_the_code_is_exchanged_once_and_leaves_the_address_bar(stage: Stage) -> None:
    _, link = stage.login("simple")
    page = stage.page()
    starts = asked(page, "/start")
    page.goto(link)
    page.wait_for_url(lambda url: "code=" not in url)
    page.reload()
    page.go_back()
    assert len(starts) == 1
    assert all("code=" not in request.url for request in starts)


def test_A32_an_early_click_is_not_lost(stage: Stage) -> None:
    connection, link = stage.login("simple")
    stage.wait_for_step(connection, "AWAITING_INPUT")
    page = stage.page()
    gate: list[Route] = []
    page.route("**/start", lambda route: gate.append(route))
    page.goto(link)
    button = page.locator("#prime button")
    expect(button).to_have_attribute("aria-disabled", "true")
    button.click(force=True)
    expect(button).to_contain_text("One moment")
    until(lambda: (page.wait_for_timeout(20), gate)[1], 20)
    gate[0].continue_()
    expect(page.get_by_label("User name")).to_be_focused()


def test_A32_when_the_start_does_not_get_through_the_button_is_a_plain_form_again(stage: Stage) -> None:
    connection, link = stage.login("simple")
    stage.wait_for_step(connection, "AWAITING_INPUT")
    page = stage.page()
    page.clock.install()
    tries: list[Route] = []

    def lose_four(route: Route) -> None:
        tries.append(route)
        if len(tries) <= 4:
            route.abort()
        else:
            route.continue_()

    page.route("**/start", lose_four)
    page.goto(link)
    until(lambda: (page.clock.run_for(500), len(tries) == 4)[1], 20)
    expect(page.get_by_role("alert")).to_contain_text("could not reach the service")
    press_continue(page)
    expect(page.get_by_label("User name")).to_be_visible()


def test_the_time_left_is_shown_and_announced_at_two_minutes_and_thirty_seconds(stage: Stage) -> None:
    connection, link = stage.login("simple")
    stage.wait_for_step(connection, "AWAITING_INPUT")
    page = stage.page()
    page.clock.install()
    page.route("**/events", lambda route: None)
    page.route("**/state", lambda route: route.fulfill(status=503, body=""))
    page.goto(link)
    press_continue(page)
    left = page.locator("time[data-deadline]")
    expect(left).to_have_text(re.compile(r"^9:\d\d left$"))
    page.clock.fast_forward("08:05")
    expect(left).to_have_text(re.compile(r"^1:\d\d left$"))
    expect(page.get_by_role("status")).to_have_text("Less than 2 minutes left.")
    page.clock.fast_forward("01:30")
    expect(left).to_have_text(re.compile(r"^0:\d\d left$"))
    expect(page.get_by_role("status")).to_have_text("Less than 30 seconds left.")


def test_A31_a_form_that_is_ready_is_shown_at_once_on_continue(stage: Stage) -> None:
    connection, link = stage.login("simple")
    stage.wait_for_step(connection, "AWAITING_INPUT")
    page = stage.page()
    page.goto(link)
    press_continue(page)
    expect(page.get_by_label("User name")).to_be_visible()
    assert kinds(page) == ["prime", "form"]


def test_A03_somebody_elses_second_opening_says_that_the_link_has_ended(stage: Stage) -> None:
    _, link = stage.login("simple")
    first = stage.page()
    first.goto(link)
    first.wait_for_url(lambda url: "code=" not in url)
    other = stage.page(stage.context(user_agent="Another browser"))
    assert other.goto(link).status == 410  # type: ignore[union-attr]
    heading(other, "This link has ended")


# ── the answer ──


def test_A30_a_double_click_sends_one_answer_and_the_form_is_inert_meanwhile(stage: Stage) -> None:
    _, link = stage.login("simple")
    page = stage.page()
    page.goto(link)
    press_continue(page)
    held: list[Route] = []
    page.route("**/submit", lambda route: held.append(route))
    page.get_by_label("User name").fill(USERNAME)
    page.get_by_label("Password", exact=True).fill(PASSWORD)
    page.locator("form[data-answer] button[type=submit]").dblclick()
    expect(page.locator("form[data-answer]")).to_have_attribute("inert", "")
    expect(page.get_by_text("Sending…").first).to_be_visible()
    until(lambda: (page.wait_for_timeout(20), held)[1], 20)
    assert len(held) == 1
    held[0].continue_()
    heading(page, "You are signed in")
    assert len(held) == 1


def test_A44_a_lost_answer_is_sent_again_under_the_same_key_and_acted_on_once(stage: Stage) -> None:
    _, link = stage.login("simple")
    page = stage.page()
    page.goto(link)
    press_continue(page)
    keys: list[str] = []
    posted = len(stage.site.seen("POST", "/simple/login"))

    def lose_the_first_two(route: Route) -> None:
        keys.append(route.request.headers["idempotency-key"])
        if len(keys) == 1:
            route.abort("connectionreset")
        elif len(keys) == 2:
            route.fulfill(status=503, body="busy")
        else:
            route.continue_()

    page.route("**/submit", lose_the_first_two)
    sign_in(page)
    expect(page.get_by_role("alert")).to_contain_text("Trying again (1 of 3)")
    heading(page, "You are signed in")
    assert len(keys) == 3
    assert len(set(keys)) == 1
    assert len(stage.site.seen("POST", "/simple/login")) == posted + 1


def test_A44_when_nothing_gets_through_the_values_stay_and_the_text_is_honest(stage: Stage) -> None:
    _, link = stage.login("simple")
    page = stage.page()
    page.clock.install()
    page.goto(link)
    press_continue(page)
    page.get_by_label("User name").wait_for()
    clock.stop(page)
    page.route("**/submit", lambda route: route.abort())
    sign_in(page)
    for attempt, seconds in ((1, 1), (2, 2), (3, 4)):
        expect(page.get_by_role("alert")).to_contain_text(f"({attempt} of 3)")
        page.clock.run_for(seconds * 1000)
    expect(page.get_by_role("alert")).to_have_text(
        "We could not confirm that this arrived. Sending it again is safe."
    )
    expect(page.get_by_label("Password", exact=True)).to_have_value(PASSWORD)
    expect(page.get_by_label("User name")).to_be_focused()
    page.unroute("**/submit")
    press_continue(page)
    heading(page, "You are signed in")


def test_A08_a_dropped_stream_and_stale_snapshots_do_not_bring_the_answered_form_back(stage: Stage) -> None:
    connection, link = stage.login("simple")
    stage.wait_for_step(connection, "AWAITING_INPUT")
    page = stage.page()
    attempts: list[Route] = []
    old: dict[str, Any] = {}

    def stale_stream(route: Route) -> None:
        attempts.append(route)
        data = json.dumps({"event": "managed_auth_state", **old})
        route.fulfill(
            status=200, content_type="text/event-stream", body=f"event: managed_auth_state\ndata: {data}\n\n"
        )

    page.goto(link)
    press_continue(page)
    page.get_by_label("User name").wait_for()
    old.update(page.evaluate("fetch(location.pathname + '/state').then((answer) => answer.json())"))
    assert old["flow_step"] == "AWAITING_INPUT"
    # From here on every stream ends at once after telling the old state, and every GET tells it too.
    page.route("**/events", stale_stream)
    page.route(
        "**/state",
        lambda route: route.fulfill(status=200, content_type="application/json", body=json.dumps(old)),
    )
    page.reload()
    page.get_by_label("User name").wait_for()
    page.evaluate("kinds.splice(0, kinds.length, 'form')")
    sign_in(page)
    expect(page.locator("#card")).to_have_attribute("data-kind", "submitting")
    before = len(attempts)
    until(lambda: (page.wait_for_timeout(100), len(attempts) >= before + 3)[1], 30)
    assert kinds(page) == ["form", "submitting"]
    page.unroute("**/events")
    page.unroute("**/state")
    heading(page, "You are signed in")
    assert kinds(page) == ["form", "submitting", "success"]


def test_A07_while_the_answer_is_on_its_way_nothing_jumps(stage: Stage) -> None:
    _, link = stage.login("simple")
    page = stage.page()
    page.goto(link)
    press_continue(page)
    page.get_by_label("User name").wait_for()
    held: list[Route] = []
    page.route("**/submit", lambda route: held.append(route))
    page.route(
        "**/state", lambda route: route.fulfill(status=410, content_type="application/json", body="{}")
    )
    sign_in(page)
    until(lambda: (page.wait_for_timeout(20), held)[1], 20)
    page.evaluate("dispatchEvent(new Event('online'))")
    expect(page.locator("form[data-answer]")).to_have_attribute("inert", "")
    assert kinds(page)[-1] == "form"
    held[0].continue_()
    heading(page, "You are signed in")


def test_A28_a_stale_answer_shows_the_new_question_and_keeps_the_message(stage: Stage) -> None:
    connection, link = stage.login("sms")
    state = stage.wait_for_step(connection, "AWAITING_INPUT")
    page = stage.page()
    page.route("**/events", lambda route: route.abort())
    page.route("**/state", lambda route: route.abort())
    page.goto(link)
    press_continue(page)
    page.get_by_label("User name").wait_for()
    # Meanwhile somebody answers elsewhere, and this page is cut off.
    values = {
        field["id"]: USERNAME if field["type"] == "identifier" else PASSWORD for field in state["fields"]
    }
    stage.api(
        "POST",
        f"/auth/connections/{connection}/submit",
        {"interaction_id": state["interaction_id"], "field_values": values},
    )
    until(lambda: stage.state(connection)["interaction_id"] not in (None, state["interaction_id"]), 20)
    expect(page.locator("#reconnecting")).to_be_visible()
    sign_in(page, "typed too late")
    expect(page.get_by_role("textbox", name="Code")).to_be_visible()
    expect(page.get_by_role("alert")).to_contain_text("The site asks something else by now")
    assert "typed too late" not in page.content()


# ── the stream ──


def test_A16_a_refused_stream_ends_the_page_once_and_calls_back_once(stage: Stage) -> None:
    _, link = stage.login("simple")
    page = stage.page()
    attempts: list[str] = []

    def gone(route: Route) -> None:
        attempts.append(route.request.url)
        route.fulfill(status=410, content_type="application/json", body='{"code":"flow_over","message":""}')

    page.route("**/events", gone)
    page.goto(f"{link}&error_url={stage.site.url('/sorry')}")
    page.wait_for_url(re.compile(r"/sorry\?"))
    query = parse_qs(urlsplit(page.url).query)
    assert query == {"code": ["session_expired"], "message": ["This link has ended."]}
    assert len(attempts) == 1


def test_A20_a_drop_shows_a_thin_bar_and_never_replaces_the_card(stage: Stage) -> None:
    _, link = stage.login("simple")
    page = stage.page()
    page.route("**/events", lambda route: route.fulfill(status=503, body=""))
    page.goto(link)
    press_continue(page)
    expect(page.locator("#reconnecting")).to_be_visible()
    # Without any stream the page still learns what happens.
    page.get_by_label("User name").fill("half typed")
    page.unroute("**/events")
    expect(page.locator("#reconnecting")).to_be_hidden()
    expect(page.get_by_label("User name")).to_have_value("half typed")


def test_A38_a_stream_that_is_silent_for_two_and_a_half_heartbeats_is_built_anew(stage: Stage) -> None:
    connection, link = stage.login("simple")
    stage.wait_for_step(connection, "AWAITING_INPUT")
    page = stage.page()
    page.clock.install()
    attempts: list[Route] = []
    page.route("**/events", lambda route: attempts.append(route))
    page.goto(link)
    press_continue(page)
    page.get_by_label("User name").fill("half typed")
    # The clock also moved by itself, as the page was loaded.
    page.clock.run_for(20_000)
    assert len(attempts) == 1
    page.clock.run_for(20_000)
    until(lambda: (page.evaluate("0"), len(attempts) == 2)[1], 20)
    expect(page.locator("#reconnecting")).to_be_visible()
    expect(page.get_by_label("User name")).to_have_value("half typed")


def test_A27_a_page_that_was_left_and_is_shown_again_is_live_again(stage: Stage) -> None:
    _, link = stage.login("simple")
    page = stage.page()
    page.goto(link)
    press_continue(page)
    page.get_by_label("User name").wait_for()
    page.goto(stage.site.url("/about"))
    page.go_back()
    sign_in(page)
    heading(page, "You are signed in")


def test_A19_an_error_event_is_final(stage: Stage) -> None:
    _, link = stage.login("simple")
    page = stage.page()
    data = json.dumps({"event": "error", "error": {"code": "internal_error", "message": "It <broke>."}})
    attempts: list[int] = []

    def broken(route: Route) -> None:
        attempts.append(1)
        route.fulfill(status=200, content_type="text/event-stream", body=f"event: error\ndata: {data}\n\n")

    page.route("**/events", broken)
    page.goto(link)
    heading(page, "Something went wrong")
    expect(page.locator(".message")).to_have_text("It <broke>.")
    assert len(attempts) == 1


def test_A12_success_returns_once_to_the_success_url(stage: Stage) -> None:
    _, link = stage.login("simple")
    page = stage.page()
    returned = asked(page, "/done")
    page.goto(f"{link}&success_url={stage.site.url('/done')}")
    press_continue(page)
    sign_in(page)
    heading(page, "You are signed in")
    expect(page.get_by_role("link", name=f"Return to {stage.site.domain}")).to_be_visible()
    page.wait_for_url(re.compile(r"/done\?"))
    query = parse_qs(urlsplit(page.url).query)
    assert query["domain"] == [stage.site.domain]
    assert query["profile_name"][0].startswith("simple ")
    page.go_back()
    heading(page, "You are signed in")
    expect(page.get_by_role("link", name=f"Return to {stage.site.domain}")).to_be_visible()
    assert len(returned) == 1


# ── shape ──


@pytest.mark.parametrize("width", [320, 390, 1280])
def test_the_page_fits_and_can_be_used_by_keyboard_alone(stage: Stage, width: int) -> None:
    connection, link = stage.login("sms")
    stage.wait_for_step(connection, "AWAITING_INPUT")
    page = stage.page()
    page.set_viewport_size({"width": width, "height": 700})
    page.goto(link)
    page.wait_for_url(lambda url: "code=" not in url)
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.get_by_label("User name")).to_be_focused()
    page.keyboard.type(USERNAME)
    page.keyboard.press("Tab")
    page.keyboard.type(PASSWORD)
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    expect(page.get_by_role("button", name="Show Password")).to_have_text("Hide")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    small = page.evaluate(
        "[...document.querySelectorAll('input:not([type=hidden]), button')]"
        ".filter((e) => e.getBoundingClientRect().height < 40).length"
    )
    assert small == 0
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.get_by_role("textbox", name="Code")).to_be_focused()
