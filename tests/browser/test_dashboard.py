"""The dashboard in a real Chromium, with a real server, a real worker and a real site to sign in to."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.conftest import Running, until
from tests.sites import app as sites

playwright_api = pytest.importorskip("playwright.sync_api")
expect = playwright_api.expect

#: How much wider than its window the page is, in pixels.
OVERHANG = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
#: Collected by the page itself: what the policy refused, and what nobody caught.
WATCH = """
window.__wrong = [];
document.addEventListener("securitypolicyviolation", (e) => window.__wrong.push(`csp: ${e.violatedDirective} ${e.blockedURI} ${e.sample}`));
addEventListener("error", (e) => window.__wrong.push(`error: ${e.message}`));
addEventListener("unhandledrejection", (e) => window.__wrong.push(`rejection: ${e.reason}`));
"""


@dataclasses.dataclass
class Tab:
    page: Any
    wrong: list[str]

    def check(self) -> None:
        """No violation of the policy, no uncaught error, no message of htmx on the console."""
        assert self.page.evaluate("window.__wrong") == []
        assert self.wrong == []


@pytest.fixture
def desk(chromium: Any, running: Running) -> Iterator[Any]:
    """A signed-in browser: call it for a tab."""
    with signed_in(chromium, running) as make:
        yield make


@contextlib.contextmanager
def signed_in(chromium: Any, running: Running, **options: Any) -> Iterator[Any]:
    context = chromium.new_context(base_url=running.url, viewport={"width": 1280, "height": 900}, **options)
    context.set_default_timeout(20_000)
    context.add_init_script(WATCH)
    tabs: list[Tab] = []

    def make(path: str = "/") -> Tab:
        tab = Tab(page=context.new_page(), wrong=[])
        # "Failed to load resource" is the browser's own note of a 4xx, which some tests provoke on purpose.
        tab.page.on(
            "console",
            lambda message: (
                tab.wrong.append(message.text)
                if message.type in ("error", "warning") and "Failed to load resource" not in message.text
                else None
            ),
        )
        tab.page.goto(path)
        tabs.append(tab)
        return tab

    first = make("/signin")
    first.page.get_by_label("User name").fill(running.username)
    first.page.get_by_label("Password", exact=True).fill(running.password)
    first.page.get_by_role("button", name="Sign in").click()
    expect(first.page).to_have_url(f"{running.url}/")
    first.check()
    first.page.close()
    tabs.clear()
    yield make
    context.close()


@pytest.fixture
def site() -> Iterator[sites.Site]:
    with sites.Site(scenario="sms") as started:
        yield started


def host_of(site: sites.Site) -> str:
    return urlsplit(site.url()).netloc


def is_live(tab: Tab) -> None:
    expect(tab.page.locator("#badge")).to_have_attribute("data-state", "live")


def state(tab: Tab) -> Any:
    return tab.page.locator("section.state .chip")


def create(tab: Tab, domain: str, profile: str, *, start: bool = True) -> str:
    """Fill the form in; returns the id of the connection."""
    tab.page.goto("/connections/new")
    tab.page.get_by_label("Domain", exact=True).fill(domain)
    tab.page.get_by_label("Profile", exact=True).fill(profile)
    tab.page.get_by_role(
        "button", name="Create and start the login" if start else "Create", exact=True
    ).click()
    tab.page.wait_for_url(re.compile(r"/connections/ma_"))
    return str(tab.page.url.rsplit("/", 1)[1])


def fill_password(tab: Tab, password: str) -> None:
    form = tab.page.locator("form.answer").first
    form.locator("input[autocomplete=username]").fill(sites.USERNAME)
    form.locator("input[type=password]").fill(password)
    form.get_by_role("button", name="Send", exact=True).click()


def test_a_login_is_walked_through_and_a_second_tab_sees_every_step_live(desk: Any, site: sites.Site) -> None:
    one = desk("/")
    connection = create(one, host_of(site), "walk")
    two = desk(f"/connections/{connection}")
    home = desk("/")
    for tab in (one, two, home):
        is_live(tab)
        tab.page.evaluate("window.__same = true")
    expect(state(one)).to_contain_text("Waiting for you: user name and password")
    expect(home.page.locator(f"#attn-{connection} form.answer")).to_be_visible()
    fill_password(one, "wrong password")
    for tab in (one, two):
        expect(tab.page.locator("section.state")).to_contain_text("The site says:")
        expect(tab.page.locator("section.state form.answer input[type=password]")).to_have_value("")
    fill_password(one, sites.PASSWORD)
    for tab in (one, two):
        expect(state(tab)).to_contain_text("Waiting for you: code")
    # The second tab answers: everybody sees it.
    two.page.locator("input[autocomplete=one-time-code]").fill(sites.SMS_CODE)
    two.page.get_by_role("button", name="Send", exact=True).click()
    for tab in (one, two):
        expect(state(tab)).to_contain_text("Done: signed in")
    expect(one.page.locator(f"#timeline-{connection}")).to_contain_text("the profile is signed in")
    expect(home.page.locator(f"#attn-{connection}")).to_have_class(re.compile("resolved"))
    for tab in (one, two, home):
        assert tab.page.evaluate("window.__same"), "a step reloaded the page"
        tab.check()


def test_home_shows_a_new_question_and_loses_nothing_that_is_being_typed(desk: Any, site: sites.Site) -> None:
    maker = desk("/")
    first = create(maker, host_of(site), "typing-1")
    home = desk("/")
    is_live(home)
    form = home.page.locator(f"#attn-{first} form.answer")
    form.locator("input[autocomplete=username]").fill("half a na")
    form.locator("input[type=password]").press_sequentially("half a pass")
    with sites.Site(scenario="simple") as other:
        second = create(maker, host_of(other), "typing-2")
        expect(home.page.locator(f"#attn-{second} form.answer")).to_be_visible()
        # A swap happened; the caret is where it was, and typing goes on.
        home.page.keyboard.type("word")
        expect(form.locator("input[type=password]")).to_have_value("half a password")
        expect(form.locator("input[autocomplete=username]")).to_have_value("half a na")
        assert home.page.evaluate("document.activeElement.type") == "password"
        # Answered elsewhere: greyed, not gone.
        fill_password(maker, sites.PASSWORD)
        expect(home.page.locator(f"#attn-{second}")).to_have_class(re.compile("resolved"))
        expect(form.locator("input[type=password]")).to_have_value("half a password")
    for tab in (maker, home):
        tab.check()


def test_A30_a_double_click_sends_one_answer(desk: Any, site: sites.Site) -> None:
    tab = desk("/")
    connection = create(tab, host_of(site), "double")
    expect(tab.page.locator("form.answer")).to_be_visible()
    posts: list[str] = []
    tab.page.on("request", lambda request: posts.append(request.url) if request.method == "POST" else None)
    form = tab.page.locator("form.answer")
    form.locator("input[autocomplete=username]").fill(sites.USERNAME)
    form.locator("input[type=password]").fill(sites.PASSWORD)
    form.get_by_role("button", name="Send", exact=True).dblclick()
    expect(state(tab)).to_contain_text("Waiting for you: code")
    assert len([url for url in posts if url.endswith(f"/connections/{connection}/answer")]) == 1
    tab.check()


def test_B47_an_answer_that_did_not_arrive_is_sent_again_and_says_so(desk: Any, site: sites.Site) -> None:
    tab = desk("/")
    create(tab, host_of(site), "retry")
    expect(tab.page.locator("form.answer")).to_be_visible()
    tries: list[str] = []

    def flaky(route: Any) -> None:
        tries.append(route.request.post_data)
        if len(tries) == 1:
            route.fulfill(status=503, body="<h1>busy</h1>", content_type="text/html")
        else:
            route.continue_()

    tab.page.route("**/answer", flaky)
    fill_password(tab, sites.PASSWORD)
    expect(tab.page.get_by_text("Not delivered yet. Trying again (1 of 3)")).to_be_visible()
    expect(tab.page.locator("form.answer input[type=password]")).to_have_value(sites.PASSWORD)
    expect(state(tab)).to_contain_text("Waiting for you: code")
    assert len(tries) == 2
    assert tries[0] == tries[1]
    assert tab.page.get_by_text("busy").count() == 0
    assert tab.page.evaluate("window.__wrong") == []


def test_B48_after_the_last_try_the_form_is_free_again_with_its_values(desk: Any, site: sites.Site) -> None:
    tab = desk("/")
    create(tab, host_of(site), "given-up")
    expect(tab.page.locator("form.answer")).to_be_visible()
    tab.page.route("**/answer", lambda route: route.abort())
    fill_password(tab, sites.PASSWORD)
    expect(tab.page.get_by_text("We could not confirm that this arrived.")).to_be_visible(timeout=40_000)
    expect(tab.page.locator("form.answer input[type=password]")).to_have_value(sites.PASSWORD)
    tab.page.unroute("**/answer")
    tab.page.get_by_role("button", name="Send", exact=True).click()
    expect(state(tab)).to_contain_text("Waiting for you: code")


@pytest.mark.parametrize("how", ["under way", "waiting for its next try"])
def test_B47_an_answer_whose_question_was_answered_meanwhile_is_not_lost_in_silence(
    how: str, desk: Any, site: sites.Site
) -> None:
    slow = desk("/")
    connection = create(slow, host_of(site), f"second-{how.split()[0]}")
    expect(slow.page.locator("form.answer")).to_be_visible()
    quick = desk(f"/connections/{connection}")
    held: list[Any] = []
    healed: list[bool] = []

    def hold(route: Any) -> None:
        if healed:
            route.continue_()
        elif how == "under way":
            held.append(route)
        else:
            route.abort()

    slow.page.route("**/answer", hold)
    # All that is left to do while the other one waits for its next try is one click.
    form = quick.page.locator("form.answer").first
    form.locator("input[autocomplete=username]").fill(sites.USERNAME)
    form.locator("input[type=password]").fill(sites.PASSWORD)
    fill_password(slow, "something else")
    if how == "under way":
        until(lambda: (slow.page.wait_for_timeout(20), held)[1], 20)
    else:
        expect(slow.page.get_by_text("Not delivered yet. Trying again (1 of 3)")).to_be_visible()
    form.get_by_role("button", name="Send", exact=True).click()
    expect(state(slow)).to_contain_text("Waiting for you: code")
    if how != "under way":
        # A try that fails while its form is gone is said on top of the page.
        expect(slow.page.locator("#notices")).to_contain_text("Not delivered yet")
    healed.append(True)
    for route in held:
        route.continue_()
    expect(slow.page.locator(".say")).to_contain_text("s ago. Please answer the new question.")
    expect(slow.page.get_by_text("Not delivered yet")).to_have_count(0)
    code = slow.page.locator("form.answer:visible").first
    code.locator("input[autocomplete=one-time-code]").fill(sites.SMS_CODE)
    code.get_by_role("button", name="Send", exact=True).click()
    expect(state(slow)).to_contain_text("Done")
    assert slow.page.evaluate("window.__wrong") == []


def test_B59_an_answer_that_arrived_without_a_word_gets_its_receipt_and_no_banner(
    desk: Any, site: sites.Site
) -> None:
    tab = desk("/")
    create(tab, host_of(site), "swallowed")
    expect(tab.page.locator("form.answer")).to_be_visible()
    statuses: list[int] = []

    def swallow(route: Any) -> None:
        answer = route.fetch()
        statuses.append(answer.status)
        if len(statuses) == 1:
            route.abort()
        else:
            route.fulfill(response=answer)

    tab.page.route("**/answer", swallow)
    fill_password(tab, sites.PASSWORD)
    expect(state(tab)).to_contain_text("Waiting for you: code")
    until(lambda: (tab.page.wait_for_timeout(20), len(statuses) == 2)[1], 20)
    assert statuses == [200, 200]
    expect(tab.page.get_by_text("Not delivered yet")).to_have_count(0)
    assert tab.page.locator(".banner:visible").all_inner_texts() == []
    expect(tab.page.locator("form.answer:visible").first).not_to_have_attribute("inert", "")
    assert tab.page.evaluate("window.__wrong") == []


def test_a_login_is_cancelled_with_a_reason_and_started_again(desk: Any, site: sites.Site) -> None:
    tab = desk("/")
    create(tab, host_of(site), "cancel")
    expect(state(tab)).to_contain_text("Waiting for you")
    tab.page.get_by_text("Cancel…").click()
    tab.page.get_by_label("Reason").fill("wrong account")
    tab.page.get_by_role("button", name="Cancel this login").click()
    expect(state(tab)).to_contain_text("Cancelled by admin")
    expect(tab.page.locator("section.state")).to_contain_text("wrong account")
    tab.page.get_by_role("button", name="Start again").click()
    expect(state(tab)).to_contain_text("Waiting for you")
    tab.check()


def test_the_hosted_link_is_made_and_opens_the_login_page(desk: Any, site: sites.Site) -> None:
    tab = desk("/")
    create(tab, host_of(site), "link")
    expect(state(tab)).to_contain_text("Waiting for you")
    tab.page.get_by_role("button", name="Make a link for somebody else").click()
    field = tab.page.get_by_label(re.compile("Link to the login page"))
    expect(field).to_have_value(re.compile(r"/login/ma_.*\?code="))
    tab.check()


def test_new_rows_come_through_a_pill_and_rows_change_in_place(desk: Any, site: sites.Site) -> None:
    tab = desk("/connections")
    is_live(tab)
    maker = desk("/")
    connection = create(maker, host_of(site), "pill", start=False)
    expect(tab.page.locator("[data-pill]")).to_contain_text("1 new")
    assert tab.page.locator(f"#row-{connection}").count() == 0
    tab.page.locator("[data-pill]").click()
    expect(tab.page.locator(f"#row-{connection}")).to_contain_text("Not signed in yet")
    maker.page.get_by_role("button", name="Start login").click()
    expect(tab.page.locator(f"#row-{connection}")).to_contain_text("Waiting for you")
    for each in (tab, maker):
        each.check()


def test_filters_are_in_the_address_and_come_back_with_it(desk: Any, site: sites.Site) -> None:
    maker = desk("/")
    connection = create(maker, host_of(site), "filter-me", start=False)
    tab = desk("/connections")
    tab.page.get_by_label("Search").fill("filter-me")
    expect(tab.page).to_have_url(re.compile(r"/connections\?q=filter-me$"))
    expect(tab.page.locator("tbody tr")).to_have_count(1)
    tab.page.reload()
    expect(tab.page.locator(f"#row-{connection}")).to_be_visible()
    tab.page.get_by_label("State").select_option("failed")
    expect(tab.page.get_by_text("Nothing matches these filters")).to_be_visible()
    tab.check()


def test_signed_out_elsewhere_stops_the_stream_and_says_so(chromium: Any, running: Running) -> None:
    with signed_in(chromium, running) as desk:
        tab = desk("/")
        is_live(tab)
        asked: list[str] = []
        tab.page.on("request", lambda request: asked.append(request.url) if "/live" in request.url else None)
        other = desk("/connections")
        other.page.locator("#menu summary").click()
        other.page.get_by_role("button", name="Sign out").click()
        expect(other.page).to_have_url(re.compile("/signin"))
        # The session is looked at again at every heartbeat; a page that comes back sooner finds out sooner.
        tab.page.get_by_role("button", name="Pause live updates").click()
        expect(tab.page.locator("#badge")).to_have_attribute("data-state", "paused")
        tab.page.locator("#badge-act").click()
        expect(tab.page.locator("#badge")).to_have_attribute("data-state", "signed-out")
        expect(tab.page.locator("#stale-line")).to_be_visible()
        tab.page.wait_for_timeout(1500)
        assert len(asked) == 1, "it stops asking"


def test_B32_a_server_that_fails_first_is_asked_again_and_each_kind_of_refusal_is_told_apart(
    desk: Any,
) -> None:
    tab = desk("/signin")
    is_live(tab)
    answers = [503, 204, 200]
    asked: list[int] = []

    def refuse(route: Any) -> None:
        if len(asked) < len(answers):
            status = answers[len(asked)]
            asked.append(status)
            route.fulfill(
                status=status, body="<p>no stream</p>" if status != 204 else "", content_type="text/html"
            )
        else:
            route.continue_()

    tab.page.route("**/live?**", refuse)
    tab.page.goto("/")
    expect(tab.page.locator("#badge")).to_have_attribute("data-state", "reconnecting")
    expect(tab.page.locator("#stale-line")).to_be_visible()
    expect(tab.page.locator("#badge")).to_have_attribute("data-state", "live", timeout=30_000)
    assert asked == answers
    assert tab.page.get_by_text("no stream").count() == 0
    tab.page.unroute("**/live?**")
    tab.page.route("**/live?**", lambda route: route.fulfill(status=410, body="gone"))
    tab.page.goto("/")
    expect(tab.page.locator("#badge")).to_have_attribute("data-state", "signed-out")


def test_C39_the_page_comes_back_by_itself_and_is_as_new_as_the_server(
    chromium: Any, own_running: Running
) -> None:
    with sites.Site(scenario="simple") as target, signed_in(chromium, own_running) as desk:
        tab = desk("/")
        connection = create(tab, host_of(target), "restart")
        expect(state(tab)).to_contain_text("Waiting for you")
        is_live(tab)
        own_running.stop("server")
        expect(tab.page.locator("#badge")).to_have_attribute("data-state", "reconnecting")
        expect(tab.page.locator("#badge-text")).to_contain_text("as of")
        # The badge has more to say than usual: the page is not wider for it.
        assert tab.page.evaluate(OVERHANG) <= 0
        # What happens while nobody listens is not missed.
        own_running.shell(_CANCEL.format(connection=json.dumps(connection)))
        own_running.start("server")
        own_running.wait_until_up()
        expect(state(tab)).to_contain_text("Cancelled by test", timeout=40_000)
        is_live(tab)
        assert tab.page.evaluate("window.__wrong") == []


_CANCEL = """
from django.utils import timezone
from connections import access, transitions
transitions.cancel(connection_id={connection}, actor=access.of_system("test"), reason="", now=timezone.now())
"""


def test_the_keyboard_alone_is_enough_to_answer(desk: Any, site: sites.Site) -> None:
    maker = desk("/")
    connection = create(maker, host_of(site), "keys")
    expect(state(maker)).to_contain_text("Waiting for you")
    tab = desk("/connections")
    press = tab.page.keyboard.press
    # The keys are the scripts' work, which are there when the page is live.
    is_live(tab)
    press("/")
    assert tab.page.evaluate("document.activeElement.id") == "q"
    tab.page.keyboard.type("keys")
    expect(tab.page.locator(f"#row-{connection}")).to_be_visible()
    expect(tab.page.locator("tbody tr")).to_have_count(1)
    tab.page.locator(f"#row-{connection} a").focus()
    press("Enter")
    expect(tab.page).to_have_url(re.compile(connection))
    is_live(tab)
    press("?")
    expect(tab.page.locator("#help")).to_be_visible()
    press("Escape")
    expect(tab.page.locator("#help")).to_be_hidden()
    tab.page.evaluate("document.activeElement.blur()")
    press("i")
    tab.page.keyboard.type(sites.USERNAME)
    press("Tab")
    tab.page.keyboard.type(sites.PASSWORD)
    press("Enter")
    expect(state(tab)).to_contain_text("Waiting for you: code")
    # The form that had the focus is gone: the next question has it.
    expect(tab.page.locator(":focus")).to_have_attribute("autocomplete", "one-time-code")
    tab.page.keyboard.type(sites.SMS_CODE)
    press("Enter")
    expect(state(tab)).to_contain_text("Done")
    tab.page.evaluate("document.activeElement.blur()")
    press("g")
    press("e")
    expect(tab.page).to_have_url(re.compile("/events$"))
    tab.check()


def test_who_waits_for_the_site_has_the_heading_and_then_the_next_question(
    desk: Any, site: sites.Site
) -> None:
    connection = create(desk("/"), host_of(site), "waits")
    tab = desk(f"/connections/{connection}")
    expect(state(tab)).to_contain_text("Waiting for you: user name and password")
    is_live(tab)
    site.answers.clear()
    try:
        tab.page.keyboard.press("i")
        tab.page.keyboard.type(sites.USERNAME)
        tab.page.keyboard.press("Tab")
        tab.page.keyboard.type(sites.PASSWORD)
        tab.page.keyboard.press("Enter")
        # There is no field: the heading is where the next one will be.
        expect(tab.page.locator("h2:focus")).to_contain_text("Sending")
        # What is typed on is no command, until there was a pause; and a visit to the help ends where it began.
        tab.page.keyboard.type("/?gc", delay=50)
        expect(tab.page.locator("#help")).to_be_hidden()
        tab.page.wait_for_timeout(1600)
        tab.page.keyboard.press("?")
        expect(tab.page.locator("#help")).to_be_visible()
        tab.page.keyboard.press("Escape")
        expect(tab.page.locator("h2:focus")).to_contain_text("Sending")
        assert tab.page.url.endswith(connection)
    finally:
        site.answers.set()
    expect(tab.page.locator(":focus")).to_have_attribute("autocomplete", "one-time-code")
    expect(tab.page.locator(".state h2")).not_to_have_attribute("tabindex", "-1")
    tab.check()


def test_the_button_beside_the_badge_has_the_focus_again_when_it_comes_back(desk: Any) -> None:
    tab = desk("/")
    is_live(tab)
    tab.page.locator("#badge-act").focus()
    for shown, state_of in (("Go on", "paused"), ("Pause", "live")):
        tab.page.keyboard.press("Enter")
        expect(tab.page.locator("#badge")).to_have_attribute("data-state", state_of)
        expect(tab.page.locator("#badge-act:focus")).to_have_text(shown)
    tab.check()


@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_page_fits_its_width_and_breaks_no_policy(
    chromium: Any, running: Running, site: sites.Site, tmp_path: Path, width: int, scheme: str
) -> None:
    with signed_in(chromium, running, color_scheme=scheme) as desk:
        tab = desk("/")
        tab.page.set_viewport_size({"width": width, "height": 800})
        connection = create(tab, host_of(site), f"look-{width}-{scheme}")
        expect(state(tab)).to_contain_text("Waiting for you")
        tab.page.get_by_role("button", name="Make a link for somebody else").click()
        expect(tab.page.locator("#link-field")).to_be_visible()
        paths = ["/", "/connections", f"/connections/{connection}", f"/connections/{connection}/edit",
                 f"/connections/{connection}/delete", "/connections/new", "/tasks", "/events", "/nothing"]  # fmt: skip
        for path in [None, *paths]:
            if path is not None:
                tab.page.goto(path)
            wide = tab.page.evaluate(OVERHANG)
            assert wide <= 0, f"{path} is {wide} px too wide"
            name = (path or "/link").strip("/").replace("/", "-").replace(connection, "detail") or "home"
            tab.page.screenshot(path=tmp_path / f"{name}-{width}-{scheme}.png", full_page=True)
            assert tab.page.evaluate("window.__wrong") == [], path


def test_without_script_a_login_can_be_answered_too(
    chromium: Any, running: Running, site: sites.Site
) -> None:
    with signed_in(chromium, running) as desk:
        connection = create(desk("/"), host_of(site), "plain")
        tab = desk(f"/connections/{connection}")
        expect(state(tab)).to_contain_text("Waiting for you")
        cookies = tab.page.context.cookies()
    plain = chromium.new_context(base_url=running.url, java_script_enabled=False)
    plain.add_cookies(cookies)
    page = plain.new_page()
    page.goto(f"/connections/{connection}")
    page.locator("input[autocomplete=username]").fill(sites.USERNAME)
    page.locator("input[type=password]").fill("wrong")
    page.get_by_role("button", name="Send", exact=True).click()
    expect(page.locator("section.state")).to_be_visible()
    assert page.url.endswith(f"/connections/{connection}")
    page.goto("/")
    expect(page.get_by_role("heading", name="Needs attention")).to_be_visible()
    plain.close()


def test_A28_a_stale_answer_keeps_its_message_beside_the_new_question(desk: Any, site: sites.Site) -> None:
    slow = desk("/")
    connection = create(slow, host_of(site), "stale")
    expect(slow.page.locator("form.answer")).to_be_visible()
    slow.page.get_by_role("button", name="Pause live updates").click()
    expect(slow.page.locator("#badge")).to_have_attribute("data-state", "paused")
    quick = desk(f"/connections/{connection}")
    fill_password(quick, sites.PASSWORD)
    expect(state(quick)).to_contain_text("Waiting for you: code")
    fill_password(slow, "typed too late")
    expect(state(slow)).to_contain_text("Waiting for you: code")
    expect(slow.page.locator(".question .say")).to_contain_text("answer the new question")
    expect(slow.page.locator("#notices")).to_be_empty()
    slow.page.locator("input[autocomplete=one-time-code]").fill(sites.SMS_CODE)
    slow.page.get_by_role("button", name="Send", exact=True).click()
    expect(state(slow)).to_contain_text(re.compile("Sending|Done"))
    assert slow.page.evaluate("window.__wrong") == []


def test_A18_signing_in_again_in_another_tab_is_enough_to_send_the_same_form(
    chromium: Any, running: Running, site: sites.Site
) -> None:
    with signed_in(chromium, running) as desk:
        tab = desk("/")
        create(tab, host_of(site), "again")
        expect(tab.page.locator("form.answer")).to_be_visible()
        tab.page.context.clear_cookies(name="sessionid")
        fill_password(tab, sites.PASSWORD)
        expect(tab.page.get_by_text("You are signed out.")).to_be_visible()
        expect(tab.page.locator("form.answer input[type=password]")).to_have_value(sites.PASSWORD)
        other = desk("/signin")
        other.page.get_by_label("User name").fill(running.username)
        other.page.get_by_label("Password", exact=True).fill(running.password)
        other.page.get_by_role("button", name="Sign in").click()
        expect(other.page).to_have_url(f"{running.url}/")
        tab.page.get_by_role("button", name="Send", exact=True).click()
        expect(state(tab)).to_contain_text(re.compile("Sending|code"))


def test_B34_a_reset_fetches_the_view_again_and_keeps_what_is_typed(desk: Any, site: sites.Site) -> None:
    tab = desk("/")
    connection = create(tab, host_of(site), "reset")
    expect(tab.page.locator("form.answer")).to_be_visible()
    is_live(tab)
    tab.page.locator("form.answer input[type=password]").fill("half a pass")
    tab.page.get_by_role("button", name="Pause live updates").click()
    expect(tab.page.locator("#badge")).to_have_attribute("data-state", "paused")
    frames = 'event: reset\ndata: {"reason":"unknown_cursor","cursor":0}\n\n'
    tab.page.route(
        "**/live?**",
        lambda route: route.fulfill(status=200, body=frames, content_type="text/event-stream"),
        times=1,
    )
    with tab.page.expect_request(lambda request: request.url.endswith(f"/connections/{connection}")):
        tab.page.locator("#badge-act").click()
    expect(tab.page.locator("#badge")).to_have_attribute("data-state", "live")
    expect(tab.page.locator("form.answer input[type=password]")).to_have_value("half a pass")
    assert tab.page.evaluate("window.__wrong") == []
