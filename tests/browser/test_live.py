"""The stream of the dashboard's pages in real Chromium: how many there are, and what a page does without one."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import expect

from tests import sites
from tests.browser import clock
from tests.browser import test_dashboard as dashboard
from tests.browser.test_dashboard import create, host_of, is_live, state
from tests.conftest import until

pytestmark = pytest.mark.browser
desk = dashboard.desk


@pytest.fixture
def site() -> Iterator[sites.Site]:
    with sites.Site(scenario="simple") as started:
        yield started


def requests_of(tab: Any) -> list[str]:
    asked: list[str] = []
    tab.page.on("request", lambda request: asked.append(request.url))
    return asked


def test_C37_a_page_has_one_stream_and_with_it_asks_for_nothing_else(desk: Any, site: sites.Site) -> None:
    watching, acting = desk("/connections"), desk("/")
    asked = requests_of(watching)
    watching.page.goto("/connections")
    is_live(watching)
    connection = create(acting, host_of(site), "one-stream")
    expect(watching.page.locator("[data-pill]")).to_contain_text("1 new")
    expect(state(acting)).to_contain_text("Waiting for you")
    streams = [url for url in asked if "/live?" in url]
    assert len(streams) == 1, streams
    assert [url for url in asked if connection in url] == []


def test_C38_without_a_stream_the_view_is_fetched_every_ten_seconds_unless_it_is_hidden(
    desk: Any, site: sites.Site
) -> None:
    acting = desk("/")
    connection = create(acting, host_of(site), "no-stream", start=False)
    tab = desk("/signin")
    tab.page.route("**/live?**", lambda route: route.fulfill(status=502, body="<p>no stream</p>"))
    tab.page.clock.install()
    tab.page.goto(f"/connections/{connection}")
    asked = requests_of(tab)
    began = tab.page.evaluate("Date.now()")
    tab.page.clock.run_for(5_000)
    expect(tab.page.locator("#badge")).to_have_attribute("data-state", "reconnecting")
    expect(state(tab)).not_to_contain_text("Waiting for you")
    acting.page.get_by_role("button", name="Start login").click()
    expect(state(acting)).to_contain_text("Waiting for you")
    tab.page.clock.run_for(10_000)
    expect(state(tab)).to_contain_text("Waiting for you")
    expect(tab.page.locator("#badge")).to_have_attribute("data-state", "reconnecting")

    def views() -> int:
        return sum(url.endswith(f"/connections/{connection}") for url in asked)

    # Looked at first, then fetched: two requests each time.
    until(lambda: tab.page.evaluate("0") or (views() and views() % 2 == 0), 20)
    tab.page.evaluate("Object.defineProperty(document, 'hidden', {value: true, configurable: true})")
    passed = tab.page.evaluate("Date.now()") - began
    assert 2 <= views() <= 2 * (passed / 10_000 + 1), (views(), passed)
    known = len(asked)
    tab.page.clock.run_for(30_000)
    assert [url for url in asked[known:] if "/live?" not in url] == []


def test_C38_an_error_page_never_takes_the_place_of_the_view(desk: Any) -> None:
    tab = desk("/signin")
    tab.page.route("**/live?**", lambda route: route.fulfill(status=502, body="<p>no stream</p>"))
    tab.page.clock.install()
    tab.page.goto("/connections")
    failed = threading.Event()

    def fail(route: Any) -> None:
        failed.set()
        route.fulfill(status=502, content_type="text/html", body="<main id=main>Bad gateway</main>")

    tab.page.route(re.compile("/connections$"), fail)
    until(lambda: (tab.page.clock.run_for(1_000), failed.is_set())[1], 30)
    tab.page.clock.run_for(12_000)
    expect(tab.page.get_by_role("heading", name="Connections")).to_be_visible()
    assert tab.page.get_by_text("Bad gateway").count() == 0


def test_C41_a_view_that_was_asked_for_before_a_change_does_not_take_it_back(
    desk: Any, site: sites.Site
) -> None:
    tab, acting = desk("/"), desk("/")
    connection = create(acting, host_of(site), "older-view", start=False)
    tab.page.goto(f"/connections/{connection}")
    is_live(tab)
    before = tab.page.request.get(f"/connections/{connection}")
    acting.page.get_by_role("button", name="Start login").click()
    expect(state(tab)).to_contain_text("Waiting for you")
    # The answer of before arrives now.
    tab.page.route(re.compile(f"/connections/{connection}$"), lambda route: route.fulfill(response=before))
    with tab.page.expect_response(re.compile(f"/connections/{connection}$")):
        tab.page.evaluate(
            "import(document.querySelector('script[src*=\"live\"]').src).then((live) => live.refetch())"
        )
    expect(state(tab)).to_contain_text("Waiting for you")
    tab.check()


def test_C42_switching_fast_shows_the_last_one_only(desk: Any, site: sites.Site) -> None:
    acting = desk("/")
    first = create(acting, host_of(site), "first-of-two", start=False)
    second = create(acting, host_of(site), "second-of-two", start=False)
    tab = desk("/connections")
    # The first one does not answer in time.
    tab.page.route(re.compile(f"/connections/{first}$"), lambda route: None)
    with tab.page.expect_request(re.compile(f"/connections/{first}$")):
        tab.page.evaluate(f"setTimeout(() => location.assign('/connections/{first}'))")
    tab.page.goto(f"/connections/{second}")
    is_live(tab)
    expect(tab.page.get_by_text("second-of-two").first).to_be_visible()
    assert tab.page.get_by_text("first-of-two").count() == 0


def test_C43_a_malformed_frame_is_an_empty_one_and_the_page_goes_on(desk: Any) -> None:
    tab = desk("/signin")
    is_live(tab)
    body = "".join(
        f"event: {name}\ndata: {{broken\n\n" for name in ("counts", "welcome", "appeared", "ready", "end")
    )
    tab.page.route(
        "**/live?**",
        lambda route: route.fulfill(status=200, body=body, content_type="text/event-stream"),
        times=1,
    )
    tab.page.goto("/")
    is_live(tab)
    assert tab.page.evaluate("window.__wrong") == []


def test_B33_a_connection_that_hangs_is_given_up_after_fifteen_seconds_and_tried_again(desk: Any) -> None:
    tab = desk("/signin")
    # Signed in already, this is a page with a stream: the connection that hangs is to be the one of the next page.
    is_live(tab)
    hanging: list[Any] = []
    tab.page.route("**/live?**", lambda route: hanging.append(route), times=1)
    clock.stop(tab.page)
    tab.page.goto("/")
    until(lambda: tab.page.evaluate("0") or hanging, 20)
    tab.page.clock.run_for(14_000)
    expect(tab.page.locator("#badge")).to_have_attribute("data-state", "connecting")
    tab.page.clock.run_for(1_500)
    expect(tab.page.locator("#badge")).to_have_attribute("data-state", "reconnecting")
    tab.page.clock.resume()
    is_live(tab)
    assert len(hanging) == 1
