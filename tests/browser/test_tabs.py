"""Tabs of one browser in real Chromium: who each of them is, who gets a stream, and what each says when it comes and goes."""

from __future__ import annotations

import contextlib
import json
import re
import threading
import urllib.request
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import expect

from tests.browser import clock
from tests.browser import test_dashboard as dashboard
from tests.browser.test_dashboard import Tab, is_live, signed_in
from tests.browser.test_outbox import make_tasks, said, write
from tests.conftest import Running, until

pytestmark = pytest.mark.browser
desk = dashboard.desk

NO_LOCKS = "Object.defineProperty(Navigator.prototype, 'locks', {value: undefined})"


def cid_of(page: Any) -> str:
    return str(page.evaluate("sessionStorage.getItem('switchboard.cid')"))


def streams_of(page: Any) -> list[str]:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url) if "/live?" in request.url else None)
    return asked


def client_of(running: Running, cid: str) -> dict[str, Any]:
    """A client as the API shows it."""
    request = urllib.request.Request(
        f"{running.url}/api/clients/{cid}", headers={"Authorization": f"Bearer {running.api_key}"}
    )
    with urllib.request.urlopen(request, timeout=10) as answer:
        return dict(json.load(answer))


def becomes(running: Running, page: Any, cid: str, state: str) -> None:
    until(
        lambda: page.evaluate("0") or client_of(running, cid)["state"] == state, 20, f"it never was {state}"
    )


def turn(page: Any, *, hidden: bool) -> None:
    """Put a page into the background or the foreground: a browser without windows does not do that by itself."""
    page.evaluate(
        "(hidden) => { Object.defineProperty(document, 'hidden', {value: hidden, configurable: true}); "
        "document.dispatchEvent(new Event('visibilitychange')) }",
        hidden,
    )


def listen_for_probes(page: Any) -> None:
    """Count the nonces that come back over the stream. The page's own second for that passes with ``run_for`` alone."""
    page.evaluate(
        "window.__probes = 0; document.getElementById('live').addEventListener('htmx:sse:after:message', "
        "({detail: {message}}) => { window.__probes += message.event === 'probe' })"
    )
    clock.stop(page)


@pytest.mark.parametrize("locks", [True, False], ids=["with Web Locks", "without"])
def test_B03_B27_a_duplicated_tab_gets_an_id_of_its_own_and_both_live_in_peace(
    chromium: Any, running: Running, locks: bool
) -> None:
    with signed_in(chromium, running) as desk:
        tab = desk("/signin")
        if not locks:
            tab.page.context.add_init_script(NO_LOCKS)
        tab.page.goto("/connections")
        is_live(tab)
        assert tab.page.evaluate("Boolean(navigator.locks)") is locks
        first = cid_of(tab.page)
        with tab.page.context.expect_page() as opened:
            # Without noopener a new window begins with a copy of this one's sessionStorage.
            tab.page.evaluate("void window.open(location.href)")
        copy = opened.value
        expect(copy.locator("#badge")).to_have_attribute("data-state", "live")
        is_live(tab)
        assert cid_of(tab.page) == first
        second = cid_of(copy)
        assert second != first
        asked = streams_of(tab.page), streams_of(copy)
        tab.page.wait_for_timeout(5_000)
        assert asked == ([], [])
        is_live(tab)
        expect(copy.locator("#badge")).to_have_attribute("data-state", "live")
        assert {client_of(running, cid)["state"] for cid in (first, second)} == {"live"}
        # The copy keeps its own id from then on.
        copy.reload()
        expect(copy.locator("#badge")).to_have_attribute("data-state", "live")
        assert cid_of(copy) == second
        assert copy.evaluate("window.__wrong") == []
        tab.check()


def test_B03_a_tab_that_is_reloaded_twenty_times_keeps_its_id(desk: Any, running: Running) -> None:
    tab = desk("/connections")
    is_live(tab)
    cid = cid_of(tab.page)
    for _ in range(20):
        tab.page.reload()
        is_live(tab)
        assert cid_of(tab.page) == cid
    assert client_of(running, cid)["epoch"] == 21
    other = desk("/connections")
    is_live(other)
    assert cid_of(other.page) != cid
    tab.check()


def test_B02_a_page_without_a_storage_works(desk: Any) -> None:
    tab = desk("/signin")
    tab.page.add_init_script(
        "Object.defineProperty(window, 'sessionStorage', {get() { throw new DOMException('no', 'SecurityError') }})"
    )
    tab.page.goto("/connections")
    is_live(tab)
    assert tab.page.evaluate("window.__wrong") == []


def test_B39_B29_a_hidden_tab_is_suspended_and_one_that_returns_proves_its_stream(
    desk: Any, running: Running
) -> None:
    tab = desk("/connections")
    is_live(tab)
    cid = cid_of(tab.page)
    asked = streams_of(tab.page)
    listen_for_probes(tab.page)
    turn(tab.page, hidden=True)
    becomes(running, tab.page, cid, "suspended")
    with tab.page.expect_response("**/probe") as probed:
        turn(tab.page, hidden=False)
    assert probed.value.status == 202
    becomes(running, tab.page, cid, "live")
    until(lambda: tab.page.evaluate("window.__probes"), 20)
    # Longer than the second within which the nonce has to come back.
    tab.page.clock.run_for(2_000)
    assert asked == []
    is_live(tab)
    tab.check()


def test_B29_a_stream_whose_nonce_does_not_come_back_is_built_anew(desk: Any) -> None:
    tab = desk("/connections")
    is_live(tab)
    # The server says yes, and the stream says nothing.
    tab.page.route("**/probe", lambda route: route.fulfill(status=202, json={"nonce": "x"}))
    with tab.page.expect_request("**/live?**") as again:
        turn(tab.page, hidden=False)
    assert again.value.headers["last-event-id"].isdigit()
    is_live(tab)


def test_B40_leaving_the_page_suspends_it_by_a_beacon(desk: Any, running: Running) -> None:
    tab = desk("/connections")
    is_live(tab)
    cid = cid_of(tab.page)
    # A stream that merely breaks off leaves its client inactive.
    tab.page.goto("about:blank")
    becomes(running, tab.page, cid, "suspended")


def test_B27_a_tab_that_an_operator_disconnects_says_why_and_comes_back_when_it_is_wanted(
    desk: Any, running: Running
) -> None:
    tab = desk("/connections")
    is_live(tab)
    asked = streams_of(tab.page)
    request = urllib.request.Request(
        f"{running.url}/api/clients/{cid_of(tab.page)}/disconnect",
        data=json.dumps({"reason": "we move the <server>"}).encode(),
        headers={"Authorization": f"Bearer {running.api_key}", "Content-Type": "application/json"},
    )
    urllib.request.urlopen(request, timeout=10).close()
    expect(tab.page.locator("#badge")).to_have_attribute("data-state", "ended")
    expect(tab.page.locator("#badge-text")).to_contain_text("Disconnected: we move the <server>")
    turn(tab.page, hidden=False)
    tab.page.wait_for_timeout(1_500)
    assert asked == []
    tab.page.get_by_role("button", name="Use it here").click()
    is_live(tab)
    tab.check()


@contextlib.contextmanager
def stranger_stream(tab: Tab, running: Running, cid: str) -> Iterator[list[bytes]]:
    """A stream of the same login with the same id from another page, and what it receives."""
    cookies = "; ".join(f"{each['name']}={each['value']}" for each in tab.page.context.cookies())
    url = f"{running.url}/live?topics=connections&cid={cid}&page={uuid.uuid4().hex}"
    answer = urllib.request.urlopen(urllib.request.Request(url, headers={"Cookie": cookies}), timeout=30)
    lines: list[bytes] = []

    def read() -> None:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            lines.extend(iter(answer.readline, b""))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        yield lines
    finally:
        answer.fp.raw._sock.close()


def test_B27_a_page_that_does_not_answer_is_superseded_and_stays_away(desk: Any, running: Running) -> None:
    tab = desk("/connections")
    is_live(tab)
    asked = streams_of(tab.page)
    tab.page.route("**/answer", lambda route: route.abort())
    with stranger_stream(tab, running, cid_of(tab.page)):
        expect(tab.page.locator("#badge")).to_have_attribute("data-state", "taken")
        expect(tab.page.locator("#badge-text")).to_contain_text("This tab was taken over")
        tab.page.wait_for_timeout(3_000)
        assert asked == []
    tab.page.get_by_role("button", name="Use it here").click()
    is_live(tab)


def test_B29_a_page_that_answers_keeps_its_stream_and_the_newcomer_gets_another_id(
    desk: Any, running: Running
) -> None:
    tab = desk("/connections")
    is_live(tab)
    cid = cid_of(tab.page)
    asked = streams_of(tab.page)
    listen_for_probes(tab.page)
    # The question is asked after the tab was in the background and came back.
    turn(tab.page, hidden=True)
    becomes(running, tab.page, cid, "suspended")
    turn(tab.page, hidden=False)
    becomes(running, tab.page, cid, "live")
    until(lambda: tab.page.evaluate("window.__probes"), 20)
    with stranger_stream(tab, running, cid) as lines:
        until(lambda: tab.page.evaluate("0") or any(b'"in_use"' in line for line in lines), 20)
        is_live(tab)
    assert asked == []
    assert cid_of(tab.page) == cid


def test_seven_tabs_over_six_connections_each_post_without_waiting_for_one(
    desk: Any, running: Running
) -> None:
    tasks = make_tasks(running, 7)
    tabs = [desk(task.path) for task in tasks]
    for tab in tabs:
        expect(tab.page.locator("#badge")).to_have_attribute("data-state", re.compile("live|standby"))
    asked = [streams_of(tab.page) for tab in tabs]
    for number, tab in enumerate(tabs):
        with tab.page.expect_response("**/input") as answer:
            write(tab, f"from tab {number}")
        expect(said(tab)).to_contain_text("Sent")
        # Milliseconds in the queue for a connection, by the clock of the part of the browser that has the queue: neither how fast the server
        # is nor how busy the page.
        assert 0 <= answer.value.request.timing["requestStart"] < 1_000, number
    states = [tab.page.locator("#badge").get_attribute("data-state") for tab in tabs]
    assert sorted(states) == ["live"] * 4 + ["standby"] * 3
    assert all(len(requests) == 0 for requests in asked)
    for number, task in enumerate(tasks):
        assert task.texts() == [f"from tab {number}"]
    # The one that somebody turns to gets a stream; there are four as before.
    turned = tabs[states.index("standby")]
    turned.page.get_by_role("button", name="Go live").click()
    is_live(turned)
    until(lambda: turned.page.evaluate("0") or sum(_state(tab) == "live" for tab in tabs) == 4, 20)
    for tab in tabs:
        tab.check()


def _state(tab: Tab) -> str:
    return str(tab.page.locator("#badge").get_attribute("data-state"))
