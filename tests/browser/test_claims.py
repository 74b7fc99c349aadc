"""Two people in two browsers: who is handling what, seen by both, handed over, taken over, kept and released."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import expect

from tests import sites
from tests.browser.test_dashboard import Tab, create, host_of, is_live, signed_in
from tests.conftest import Running, run_switchboard, until
from tests.live.switchboard import program

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def office(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server that does not wait long for somebody to come back, and long enough for a page that is loaded on a busy machine."""
    with run_switchboard(
        tmp_path_factory.mktemp("office"),
        STREAM_LIMIT="100",
        CLIENT_GRACE_SECONDS="5",
        CLIENT_SUSPENDED_SECONDS="10",
    ) as started:
        yield started


@pytest.fixture
def boss(chromium: Any, office: Running) -> Iterator[Any]:
    with signed_in(chromium, office) as make:
        yield make


@pytest.fixture
def other(chromium: Any, office: Running) -> Iterator[Any]:
    """The owner of the connections; the boss may act on everybody's."""
    someone = dataclasses.replace(office, username=office.other_username, password=office.other_password)
    with signed_in(chromium, someone) as make:
        yield make


@pytest.fixture
def site() -> Iterator[sites.Site]:
    with sites.Site(scenario="simple") as started:
        yield started


def who(tab: Tab) -> Any:
    return tab.page.locator(".who").first


def field(tab: Tab) -> Any:
    return tab.page.locator("form.answer input[autocomplete=username]").first


def press(tab: Tab, name: str) -> None:
    tab.page.get_by_role("button", name=name, exact=True).click()


def waiting(tab: Tab, site: sites.Site, profile: str) -> str:
    connection = create(tab, host_of(site), profile)
    expect(tab.page.locator("section.state .chip")).to_contain_text("Waiting for you")
    is_live(tab)
    return connection


def test_two_people_see_each_other_take_let_go_and_take_over(boss: Any, other: Any, site: sites.Site) -> None:
    theirs = other("/")
    connection = waiting(theirs, site, "two-people")
    mine, lists = boss(f"/connections/{connection}"), boss("/connections")
    for tab in (mine, lists):
        is_live(tab)
    # Whoever has the page open looks at it.
    expect(who(theirs)).to_contain_text("admin is looking")
    expect(who(mine)).to_contain_text("other is looking")
    # Who begins to answer is handling it.
    field(theirs).press_sequentially("al")
    expect(who(mine)).to_contain_text("other is handling this, typing…")
    expect(who(theirs)).to_contain_text("other is handling this (you)")
    expect(lists.page.locator(f"#row-{connection} .who")).to_contain_text("other is handling this")
    # Let go, and taken with a button.
    press(theirs, "Let go")
    press(mine, "I take it")
    expect(who(theirs)).to_contain_text("admin is handling this")
    expect(who(mine)).to_contain_text("admin is handling this (you)")
    # Taking over asks first, and nothing that was typed is lost.
    press(theirs, "Take over…")
    dialog = theirs.page.locator("#take-over")
    expect(dialog).to_contain_text("Take this over from admin?")
    dialog.get_by_role("button", name="Leave it to admin").click()
    expect(dialog).to_have_count(0)
    expect(who(theirs)).to_contain_text("admin is handling this")
    press(theirs, "Take over…")
    theirs.page.locator("#take-over").get_by_role("button", name="Take over").click()
    expect(who(mine)).to_contain_text("other is handling this")
    expect(mine.page.locator(".who-said")).to_have_text("other took this over from you.")
    expect(field(theirs)).to_have_value("al")
    for tab in (theirs, mine, lists):
        tab.check()


def test_a_claim_is_kept_through_a_reload_and_released_when_nobody_comes_back(
    boss: Any, other: Any, site: sites.Site, office: Running
) -> None:
    theirs = other("/")
    connection = waiting(theirs, site, "kept-and-released")
    mine = boss(f"/connections/{connection}")
    is_live(mine)
    press(mine, "I take it")
    expect(who(theirs)).to_contain_text("admin is handling this")
    with program(office) as api:
        epoch = {row["id"]: row["epoch"] for row in api.get("/api/clients?state=live")}
        mine.page.reload()
        is_live(mine)
        expect(who(mine)).to_contain_text("admin is handling this (you)")
        again = {row["id"]: row["epoch"] for row in api.get("/api/clients?state=live")}
        assert set(again) == set(epoch), "the reloaded page is the same client"
        timeline = api.get(f"/auth/connections/{connection}/timeline")
    assert timeline is not None
    expect(who(theirs)).to_contain_text("admin is handling this")
    mine.page.close()
    expect(who(theirs)).not_to_contain_text("admin is handling this", timeout=40_000)
    expect(theirs.page.get_by_role("button", name="I take it", exact=True)).to_be_visible()
    moments = theirs.page.locator(f"#timeline-{connection}")
    theirs.page.reload()
    expect(moments).to_contain_text("admin is gone and does not handle it any more")
    expect(moments.get_by_text("admin is handling it", exact=True)).to_have_count(1)
    theirs.check()


def test_another_tab_of_the_same_person_says_so_and_takes_it_without_asking(
    boss: Any, other: Any, site: sites.Site
) -> None:
    one = other("/")
    connection = waiting(one, site, "two-tabs")
    two = other(f"/connections/{connection}")
    is_live(two)
    press(one, "I take it")
    expect(who(two)).to_contain_text("other is handling this (you, in another tab)")
    press(two, "Take it here")
    expect(who(two)).to_contain_text("other is handling this (you)")
    expect(one.page.locator(".who-said")).to_have_text("You handle this in another tab now.")


def test_B08_somebody_who_uses_the_same_id_is_not_taken_for_the_reader(
    boss: Any, other: Any, site: sites.Site
) -> None:
    theirs = other("/")
    connection = waiting(theirs, site, "same-id")
    mine = boss(f"/connections/{connection}")
    is_live(mine)
    # An id is shown to the whole team: nothing keeps somebody from using it as well.
    cid = mine.page.evaluate("sessionStorage.getItem('switchboard.cid')")
    theirs.page.evaluate("(cid) => sessionStorage.setItem('switchboard.cid', cid)", cid)
    theirs.page.reload()
    is_live(theirs)
    assert theirs.page.evaluate("sessionStorage.getItem('switchboard.cid')") == cid
    press(theirs, "I take it")
    expect(who(theirs)).to_contain_text("other is handling this (you)")
    expect(who(mine)).to_contain_text("other is handling this")
    expect(mine.page.locator(".who-has .who-you")).to_have_text("")
    press(mine, "Take over…")
    mine.page.locator("#take-over").get_by_role("button", name="Take over").click()
    expect(theirs.page.locator(".who-said")).to_have_text("admin took this over from you.")
    expect(who(mine)).to_contain_text("admin is handling this (you)")
    for tab in (theirs, mine):
        tab.check()


def test_the_home_page_has_the_same_words_and_buttons(boss: Any, other: Any, site: sites.Site) -> None:
    theirs = other("/")
    connection = waiting(theirs, site, "at-home")
    theirs.page.goto("/")
    is_live(theirs)
    home = boss("/")
    is_live(home)
    item = home.page.locator(f"#attn-{connection}")
    item.get_by_role("button", name="I take it").click()
    expect(item.locator(".who")).to_contain_text("admin is handling this (you)")
    expect(theirs.page.locator(f"#attn-{connection} .who")).to_contain_text("admin is handling this")
    # In a list nobody looks at everything at once: only the form that has the focus.
    theirs.page.locator(f"#attn-{connection} input[autocomplete=username]").focus()
    expect(item.locator(".who")).to_contain_text("other is looking")
    theirs.page.locator("body").press("Tab")
    theirs.page.evaluate("document.activeElement.blur()")
    # Whoever left a field on purpose is not put back into it by the next piece of news.
    news = "document.dispatchEvent(new Event('htmx:after:swap'))"
    left = "setTimeout(() => done(document.activeElement === document.body), 100)"
    assert theirs.page.evaluate(f"new Promise((done) => {{ {news}; {left}; }})")
    expect(item.locator(".who")).not_to_contain_text("other is looking")
    for tab in (theirs, home):
        tab.check()


def test_without_script_there_are_no_claims_and_no_buttons(
    chromium: Any, other: Any, office: Running, site: sites.Site
) -> None:
    theirs = other("/")
    connection = waiting(theirs, site, "no-script")
    press(theirs, "I take it")
    expect(who(theirs)).to_contain_text("other is handling this (you)")
    cookies = theirs.page.context.cookies()
    context = chromium.new_context(base_url=office.url, java_script_enabled=False)
    context.add_cookies(cookies)
    plain = context.new_page()
    plain.goto(f"/connections/{connection}")
    expect(plain.locator(".who")).to_have_text(re.compile(r"^\s*◉ other is handling this\s*$"))
    expect(plain.locator(".who-acts button")).to_have_count(0)
    plain.goto("/clients")
    expect(plain.locator("tbody tr").first).to_contain_text("other")
    plain.get_by_role("link", name="Disconnect…").first.click()
    plain.get_by_label("Reason").fill("an old page")
    plain.get_by_role("button", name="Disconnect").click()
    expect(plain.locator("main")).to_contain_text("was disconnected")
    context.close()


def test_the_page_of_clients_shows_this_tab_and_disconnects_another_with_a_reason(
    boss: Any, other: Any, office: Running
) -> None:
    theirs = other("/connections")
    is_live(theirs)
    mine = boss("/clients")
    is_live(mine)
    expect(mine.page.locator("tr", has_text="★ this tab")).to_contain_text("admin")
    row = mine.page.locator("tr[data-client]", has_text="other").filter(has_text="/connections").first
    expect(row).to_contain_text("Live")
    expect(row).to_contain_text("Chrome, Linux")
    row.get_by_role("link", name="Disconnect…").click()
    dialog = mine.page.locator("#disconnect")
    expect(dialog).to_contain_text("other")
    dialog.get_by_label("Reason").fill("a new version")
    dialog.get_by_role("button", name="Disconnect").click()
    expect(mine.page.locator("main")).to_contain_text("other was disconnected")
    expect(theirs.page.locator("#badge")).not_to_have_attribute("data-state", "live")
    expect(theirs.page.locator("body")).to_contain_text("a new version")
    mine.page.goto("/clients?state=closed")
    expect(mine.page.locator("tr", has_text="a new version")).to_contain_text("Disconnected")
    mine.check()


def test_a_page_that_was_sent_away_while_it_was_paused_is_told_why_and_offers_nothing_any_more(
    boss: Any, other: Any, office: Running, site: sites.Site
) -> None:
    theirs = other("/")
    waiting(theirs, site, "sent-away")
    expect(theirs.page.get_by_role("button", name="I take it")).to_be_visible()
    press(theirs, "Pause live updates")
    expect(theirs.page.locator("#badge")).to_have_attribute("data-state", "paused")
    cid = theirs.page.evaluate("sessionStorage.getItem('switchboard.cid')")
    office.manage("clients", "--disconnect", cid, "--reason", "maintenance – at ten")
    press(theirs, "Go on")
    expect(theirs.page.locator("#badge")).to_contain_text("Disconnected: maintenance – at ten")
    expect(theirs.page.get_by_role("button", name="I take it")).to_have_count(0)
    assert theirs.page.evaluate("window.__wrong") == []


def test_who_took_a_login_that_ended_meanwhile_can_let_it_go(other: Any, site: sites.Site) -> None:
    theirs = other("/")
    connection = waiting(theirs, site, "too-late")
    held: list[Any] = []
    theirs.page.route("**/claims", lambda route: held.append(route))
    press(theirs, "I take it")
    until(lambda: (theirs.page.wait_for_timeout(20), held)[1], 20)
    canceller = other(f"/connections/{connection}")
    canceller.page.get_by_text("Cancel…").click()
    canceller.page.get_by_role("button", name="Cancel this login").click()
    expect(theirs.page.locator("section.state .chip")).to_contain_text("Cancelled")
    expect(theirs.page.get_by_role("button", name="I take it")).to_have_count(0)
    held[0].continue_()
    expect(who(theirs)).to_contain_text("other is handling this")
    press(theirs, "Let go")
    expect(who(theirs)).to_be_empty()
    expect(theirs.page.get_by_role("button", name="I take it")).to_have_count(0)
    theirs.check()


def test_rows_of_clients_are_live_and_new_ones_come_through_the_pill(boss: Any, other: Any) -> None:
    mine = boss("/clients")
    is_live(mine)
    expect(mine.page.locator("tr", has_text="★ this tab")).to_contain_text("admin")
    known = mine.page.locator("tr[data-client]").count()
    theirs = other("/tasks")
    is_live(theirs)
    pill = mine.page.locator("[data-pill]")
    expect(pill).to_contain_text("1 new")
    assert mine.page.locator("tr[data-client]").count() == known
    pill.click()
    row = mine.page.locator("tr[data-client]", has_text="/tasks").filter(has_text="other").first
    expect(row).to_contain_text("Live")
    theirs.page.close()
    expect(row).to_contain_text(re.compile("Gone|background|Expired"))
    expect(row).to_contain_text("Expired", timeout=40_000)
    mine.check()


@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_of_clients_fits_its_width(
    chromium: Any, other: Any, office: Running, tmp_path: Path, width: int, scheme: str
) -> None:
    theirs = other("/tasks")
    is_live(theirs)
    with signed_in(chromium, office, color_scheme=scheme) as desk:
        tab = desk("/")
        tab.page.set_viewport_size({"width": width, "height": 800})
        tab.page.goto("/clients")
        expect(tab.page.locator("tr", has_text="★ this tab")).to_contain_text("admin")
        for what in ("list", "dialog"):
            if what == "dialog":
                tab.page.get_by_role("link", name="Disconnect…").first.click()
                expect(tab.page.locator("#disconnect")).to_be_visible()
            wide = tab.page.evaluate(
                "document.documentElement.scrollWidth - document.documentElement.clientWidth"
            )
            assert wide <= 0, f"{what} is {wide} px too wide"
            tab.page.screenshot(path=tmp_path / f"{what}-{width}-{scheme}.png")
        tab.check()


def test_streams_without_an_id_are_counted_and_a_key_leads_to_the_page(boss: Any, office: Running) -> None:
    tab = boss("/")
    is_live(tab)
    tab.page.locator("#main").focus()
    tab.page.keyboard.press("g")
    tab.page.keyboard.press("l")
    expect(tab.page).to_have_url(f"{office.url}/clients")
    expect(tab.page.locator(".nameless")).to_have_count(0)
    headers = {"Authorization": f"Bearer {office.api_key}"}
    with httpx.stream("GET", f"{office.url}/api/events", headers=headers, timeout=10) as stream:
        # Held: the connection ends with its iterator.
        text = stream.iter_text()
        assert "ready" in next(text)

        def alone() -> bool:
            # Streams of pages that have just been left count until they are gone.
            tab.page.reload()
            words = "And 1 stream without an id on this server process."
            return words in tab.page.locator("#main").inner_text()

        until(alone, 20)
    tab.check()


#: Of a kind that no worker of ours does.
OPEN = """
from django.contrib.auth.models import User
from django.utils import timezone
from connections.models import Task
now = timezone.now()
owner = User.objects.get(username="other")
task = Task.objects.create(owner=owner, kind="refactoring", title="refactor", run_after=now, created_at=now, updated_at=now)
print("TASK", task.id)
"""


def test_a_task_that_takes_lines_shows_who_looks_who_types_and_who_handles_it(
    boss: Any, other: Any, office: Running
) -> None:
    task = office.shell(OPEN).split("TASK", 1)[1].strip()
    theirs, mine = other(f"/tasks/{task}"), boss(f"/tasks/{task}")
    for tab in (theirs, mine):
        is_live(tab)
    expect(who(theirs)).to_contain_text("admin is looking")
    theirs.page.get_by_label("Text").press_sequentially("y")
    expect(who(mine)).to_contain_text("other is handling this, typing…")
    press(mine, "Take over…")
    mine.page.locator("#take-over").get_by_role("button", name="Take over").click()
    expect(theirs.page.locator(".who-said")).to_have_text("admin took this over from you.")
    expect(theirs.page.get_by_label("Text")).to_have_value("y")
    press(mine, "Let go")
    expect(theirs.page.get_by_role("button", name="I take it", exact=True)).to_be_visible()
    for tab in (theirs, mine):
        tab.check()
