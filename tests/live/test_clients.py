"""Clients that nobody wrote for us read the streams: Chromium's EventSource, htmx's extension, httpx-sse, curl. Kernel's SDK: test_sdk.py."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import httpx_sse
import pytest

from tests.conftest import Running, missing, until
from tests.live.streaming import call, connect, login

playwright_api = pytest.importorskip("playwright.sync_api")
pytestmark = pytest.mark.live


@pytest.fixture
def browser(chromium: Any, running: Running) -> Iterator[Any]:
    with signed_in(chromium, running) as context:
        yield context


@contextlib.contextmanager
def signed_in(chromium: Any, running: Running) -> Iterator[Any]:
    context = chromium.new_context(base_url=running.url)
    context.set_default_timeout(15_000)
    page = context.new_page()
    page.goto("/signin")
    page.get_by_label("User name").fill(running.username)
    page.get_by_label("Password", exact=True).fill(running.password)
    page.get_by_role("button", name="Sign in").click()
    page.wait_for_url(f"{running.url}/")
    page.close()
    yield context
    context.close()


# ── Chromium's EventSource, with the session cookie ──

LISTEN = """
() => {
    window.heard = [];
    window.source = new EventSource("/api/events?topics=connections");
    for (const name of ["ready", "connection.created", "connection.updated"])
        source.addEventListener(name, (event) => heard.push([event.type, event.lastEventId, event.data]));
}
"""


def heard(page: Any, name: str, part: str = "", count: int = 1) -> list[list[str]]:
    """Everything that the page heard, once it has heard ``count`` events of that name with this in their data."""

    def look() -> list[list[str]] | None:
        told: list[list[str]] = page.evaluate("window.heard")
        return told if sum(each[0] == name and part in each[-1] for each in told) >= count else None

    return until(look, 20, f"the page heard no {name}")


def test_C01_C04_the_EventSource_of_a_browser_reads_the_stream_with_its_session(
    browser: Any, running: Running
) -> None:
    page = browser.new_page()
    page.goto("/tasks")
    page.evaluate(LISTEN)
    heard(page, "ready")
    made = connect(running)["id"]
    heard(page, "connection.created", made)
    status, _, _ = call(running, "PATCH", f"/auth/connections/{made}", {"save_credentials": False})
    assert status == 200
    told = [each for each in heard(page, "connection.updated", made) if each[0] != "ready"]
    assert [name for name, _, data in told if made in data] == ["connection.created", "connection.updated"]
    cursors = [int(cursor) for _, cursor, _ in told]
    assert cursors == sorted(set(cursors))


def test_C08_C44_an_EventSource_comes_back_by_itself_with_its_cursor(
    chromium: Any, own_running: Running
) -> None:
    """The browser's own reconnection: nothing of ours runs in the page but a listener."""
    with signed_in(chromium, own_running) as browser:
        page = browser.new_page()
        page.goto("/tasks")
        page.evaluate(LISTEN)
        heard(page, "ready")
        made = [connect(own_running)["id"]]
        heard(page, "connection.created", made[0])
        own_running.stop("server", signal.SIGKILL)
        own_running.manage("connect", "while-away.example.com", "--profile", "away")
        own_running.start("server")
        own_running.wait_until_up()
        made.append(connect(own_running)["id"])
        told = heard(page, "connection.created", made[-1])
        created = [json.loads(data) for name, _, data in told if name == "connection.created"]
        assert [each["domain"] for each in created][1] == "while-away.example.com"
        assert [each["id"] for each in created][::2] == made
        assert len(created) == 3


# ── htmx ──

HTMX_PAGE = """<!doctype html><meta charset="utf-8"><title>htmx</title>
<script>
    window.heard = [];
    for (const name of ["ready", "connection.created"])
        document.addEventListener(name, (event) => heard.push([name, JSON.stringify(event.detail)]), true);
</script>
<script src="/static/vendor/htmx-4.0.1.min.js"></script>
<script src="/static/vendor/hx-sse-4.0.1.min.js"></script>
<div id="box" hx-sse:connect="/api/events?topics=connections" hx-swap="none"></div>"""


def test_htmx_with_its_sse_extension_reads_the_stream(browser: Any, running: Running) -> None:
    page = browser.new_page()
    page.route("**/with-htmx", lambda route: route.fulfill(body=HTMX_PAGE, content_type="text/html"))
    page.goto("/with-htmx")
    heard(page, "ready")
    made = [connect(running)["id"] for _ in range(3)]
    told = [detail for name, detail in heard(page, "connection.created", made[-1]) if name != "ready"]
    order = [next((each for each in made if each in detail), None) for detail in told]
    assert [each for each in order if each] == made


def test_the_dashboard_which_is_htmx_shows_a_change_live(browser: Any, running: Running) -> None:
    made = connect(running)
    page = browser.new_page()
    page.goto("/connections")
    page.locator("#badge[data-state=live]").wait_for()
    row = page.locator("tr", has_text=made["domain"])
    before = row.inner_text()
    login(running, made)
    until(lambda: row.inner_text() != before, 15, "the row did not change")


# ── httpx-sse ──


def test_httpx_sse_reads_the_stream_and_goes_on_from_its_last_event_id(running: Running) -> None:
    headers = {"Authorization": f"Bearer {running.api_key}"}
    url = f"{running.url}/api/events?topics=connections"
    made: list[str] = []
    seen: list[str] = []
    last = ""
    with httpx.Client(headers=headers, timeout=20, trust_env=False) as client:
        for _ in range(2):
            resume = {"Last-Event-ID": last} if last else {}
            with httpx_sse.connect_sse(client, "GET", url, headers=resume) as source:
                live = False
                for event in source.iter_sse():
                    if event.event == "ready":
                        assert event.retry
                        live = True
                        made += [connect(running)["id"] for _ in range(2)]
                    elif event.event == "connection.created":
                        seen.append(event.json()["id"])
                        last = event.id
                        if live and seen[-1] == made[-1]:
                            break
            # While nobody listens.
            made += [connect(running)["id"] for _ in range(2)]
    assert seen == made[:6]


def test_httpx_sse_reads_the_stream_asynchronously(running: Running) -> None:
    async def first_created() -> Any:
        headers = {"Authorization": f"Bearer {running.api_key}"}
        async with (
            httpx.AsyncClient(headers=headers, timeout=20, trust_env=False) as client,
            httpx_sse.aconnect_sse(client, "GET", f"{running.url}/api/events?topics=connections") as source,
        ):
            async for event in source.aiter_sse():
                if event.event == "ready":
                    made.append(await asyncio.to_thread(connect, running))
                elif event.event == "connection.created" and event.json()["id"] == made[0]["id"]:
                    return event.json()

    made: list[Any] = []
    # In a thread of its own: the one of the tests has the loop of the browser.
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(asyncio.run, first_created()).result(30)["domain"] == made[0]["domain"]


# ── curl ──


def test_curl_prints_every_event_when_it_happens(running: Running) -> None:
    program = shutil.which("curl")
    if not program:
        missing("curl")
    curl = subprocess.Popen(
        [str(program), "--no-progress-meter", "-N", "-H", f"Authorization: Bearer {running.api_key}",
         f"{running.url}/api/events?topics=connections"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    printed = _Lines(curl.stdout)
    try:
        printed.wait_for("event: ready")
        made = connect(running)
        printed.wait_for(made["id"])
        block = "\n".join(printed.lines).split("\n\n")
        frame = next(each for each in block if made["id"] in each).strip().split("\n")
        assert [line.split(":")[0] for line in frame] == ["id", "event", "data"]
        assert frame[1] == "event: connection.created"
        assert json.loads(frame[2].removeprefix("data: "))["id"] == made["id"]
    finally:
        curl.terminate()
        curl.wait(10)
        printed.thread.join(5)


class _Lines:
    """What a program prints, as it prints it."""

    def __init__(self, stream: Any) -> None:
        self.lines: list[str] = []
        self.thread = threading.Thread(target=self._read, args=(stream,), daemon=True)
        self.thread.start()

    def _read(self, stream: Any) -> None:
        for line in stream:
            self.lines.append(line.rstrip("\n"))
        stream.close()

    def wait_for(self, part: str) -> None:
        until(lambda: any(part in line for line in list(self.lines)), 15, f"curl printed {self.lines[-10:]}")
