"""Messages that arrive, in real Chromium: what is written to a task gets there once and in order, whatever the line and the server do."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import socket
import threading
import urllib.request
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import expect

from tests import sites
from tests.browser import clock
from tests.browser import test_dashboard as dashboard
from tests.browser.test_dashboard import Tab, create, fill_password, host_of, is_live, signed_in, state
from tests.conftest import Running, until

pytestmark = pytest.mark.browser
desk = dashboard.desk

#: Of a kind that no worker of ours does.
OPEN = """
from django.utils import timezone
from connections import tasks
from connections.models import ManagedAuthConnection
row = ManagedAuthConnection.objects.get(pk="{connection}")
for number in range({count}):
    task = tasks.create(owner_id=row.owner_id, kind="export", title="nightly export", spec={{}}, actor="test", now=timezone.now())
    print("TASK", task.pk)
"""
LINES = """
import json
from connections import vault
from connections.models import TaskInput
rows = TaskInput.objects.filter(task_id="{task}").order_by("number")
print("LINES", json.dumps([[row.message_id, vault.unseal(bytes(row.sealed))] for row in rows]))
"""


@dataclasses.dataclass
class Task:
    id: str
    running: Running

    @property
    def path(self) -> str:
        return f"/tasks/{self.id}"

    def texts(self) -> list[str]:
        """What the server has accepted, in the order of acceptance. Every line has another message id."""
        said = self.running.shell(LINES.format(task=self.id))
        lines = json.loads(said.split("LINES", 1)[1])
        assert len({name for name, _ in lines}) == len(lines)
        return [text for _, text in lines]


def make_tasks(running: Running, count: int = 1) -> list[Task]:
    """Tasks that take lines; no worker runs them, so that every line stays readable."""
    body = {"domain": f"{uuid.uuid4().hex[:8]}.example", "profile_name": "outbox"}
    request = urllib.request.Request(
        f"{running.url}/auth/connections",
        data=json.dumps(body).encode(),
        headers={"Authorization": f"Bearer {running.api_key}", "Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=10) as answer:
        connection = json.load(answer)["id"]
    said = running.shell(OPEN.format(connection=connection, count=count))
    return [Task(id=found, running=running) for found in re.findall(r"TASK (\S+)", said)]


@pytest.fixture
def task(running: Running) -> Task:
    return make_tasks(running)[0]


def write(tab: Tab, text: str) -> None:
    tab.page.get_by_label("Text", exact=True).fill(text)
    tab.page.get_by_role("button", name="Send", exact=True).click()


def messages(tab: Tab) -> Any:
    return tab.page.locator("[data-outbox-list] .send")


def said(tab: Tab) -> Any:
    return tab.page.locator("[data-outbox-list] .send-state")


def posts(tab: Tab, answer: Callable[[Any, int], None] | None = None) -> list[Any]:
    """The POSTs of lines from here on. ``answer`` handles each route with its number; without, they pass."""
    seen: list[Any] = []

    def handle(route: Any) -> None:
        seen.append(route.request)
        if answer is None:
            route.continue_()
        else:
            answer(route, len(seen))

    tab.page.route("**/api/tasks/*/input", handle)
    return seen


def pass_time(tab: Tab, ms: int) -> None:
    """Move the clock once no try is in flight: only its answer arms the timer of the next one, and after 15 s it would count as lost."""
    expect(tab.page.locator('.send[data-state="sending"]')).to_have_count(0)
    tab.page.clock.run_for(ms)


def waits(tab: Tab, text: str) -> None:
    """A line waits for its next try. While one is in flight it says the same as before it."""
    waiting = tab.page.locator('[data-outbox-list] .send[data-state="retrying"]')
    expect(waiting.filter(has_text=f"Not delivered yet. {text}")).to_have_count(1)


def keys(requests: list[Any]) -> list[str]:
    return [request.headers["idempotency-key"] for request in requests]


def test_B43_a_line_is_sent_shown_and_acknowledged_and_the_field_is_free_at_once(
    desk: Any, task: Task
) -> None:
    tab = desk(task.path)
    is_live(tab)
    write(tab, "echo one\necho 'two' && $(three)")
    expect(tab.page.get_by_label("Text", exact=True)).to_have_value("")
    expect(said(tab)).to_have_text([re.compile("Sent")])
    assert task.texts() == ["echo one\necho 'two' && $(three)"]
    # The line itself leaves when it has been read; the page of the task has it by then.
    expect(messages(tab)).to_have_count(0)
    tab.check()


def test_B53_B57_five_lines_written_offline_arrive_in_order_and_once_when_the_line_is_back(
    desk: Any, task: Task
) -> None:
    tab = desk(task.path)
    is_live(tab)
    seen = posts(tab)
    tab.page.context.set_offline(True)
    for number in range(5):
        write(tab, f"line {number}")
    expect(said(tab)).to_have_text([re.compile("You are offline. This is sent when you are back.")] * 5)
    assert seen == []
    tab.page.context.set_offline(False)
    expect(said(tab)).to_have_text([re.compile("Sent")] * 5)
    assert task.texts() == [f"line {number}" for number in range(5)]
    assert len(set(keys(seen))) == len(seen) == 5
    is_live(tab)


def test_B44_an_answer_that_was_swallowed_is_asked_for_again_and_the_line_is_there_once(
    desk: Any, task: Task
) -> None:
    tab = desk("/signin")

    def swallow(route: Any, number: int) -> None:
        if number <= 2:
            route.fetch()
            route.abort("connectionreset")
        else:
            route.continue_()

    clock.stop(tab.page)
    tab.page.goto(task.path)
    seen = posts(tab, swallow)
    write(tab, "once")
    waits(tab, "Trying again (1 of 3)…")
    pass_time(tab, 3_000)
    waits(tab, "Trying again (2 of 3)…")
    write(tab, "then")
    pass_time(tab, 6_000)
    expect(said(tab)).to_have_text([re.compile("Sent")] * 2)
    assert len(seen) == 4
    assert len(set(keys(seen)[:3])) == 1
    assert task.texts() == ["once", "then"]
    assert tab.page.evaluate("window.__wrong") == []


def test_B47_B48_refusals_that_pass_are_tried_again_as_long_as_it_takes_and_can_be_hurried(
    desk: Any, task: Task
) -> None:
    tab = desk("/signin")
    refusals = [(503, {}), (502, {}), (503, {}), (502, {}), (429, {"Retry-After": "50"})]

    def refuse(route: Any, number: int) -> None:
        if number > len(refusals):
            return route.continue_()
        status, headers = refusals[number - 1]
        route.fulfill(status=status, headers=headers, body="<h1>Bad gateway</h1>", content_type="text/html")

    clock.stop(tab.page)
    tab.page.goto(task.path)
    seen = posts(tab, refuse)
    write(tab, "stubborn")
    retry = tab.page.get_by_role("button", name="Retry now")
    for ms, text, buttons in [
        (0, "Trying again (1 of 3)…", 0),
        (3_000, "Trying again (2 of 3)…", 0),
        (6_000, "Trying again (3 of 3)…", 1),
        (12_000, "Trying again every 30 seconds.", 1),
    ]:
        pass_time(tab, ms)
        waits(tab, text)
        expect(retry).to_have_count(buttons)
    retry.click()
    until_count(seen, 5)
    waits(tab, "Trying again every 30 seconds.")
    expect(retry).to_be_visible()
    pass_time(tab, 45_000)
    waits(tab, "Trying again every 30 seconds.")
    assert len(seen) == 5, "Retry-After is honoured"
    pass_time(tab, 6_000)
    expect(said(tab)).to_contain_text("Sent")
    assert len(set(keys(seen))) == 1
    assert task.texts() == ["stubborn"]
    assert tab.page.get_by_text("Bad gateway").count() == 0


def until_count(seen: list[Any], count: int) -> None:
    """Requests are counted while the page is talked to."""
    assert seen
    page = seen[0].frame.page
    until(lambda: page.evaluate("0") or len(seen) >= count, 20)


def test_B50_a_refusal_that_is_final_is_shown_at_once_and_the_next_line_goes(desk: Any, task: Task) -> None:
    tab = desk(task.path)

    def refuse(route: Any, number: int) -> None:
        if number == 1:
            route.fulfill(status=413, body="<h1>Request Entity Too Large</h1>", content_type="text/html")
        elif number == 2:
            body = {"code": "idempotency_conflict", "message": "This message id was used for another text."}
            route.fulfill(status=409, json=body)
        else:
            route.continue_()

    posts(tab, refuse)
    for text in ("too large", "conflicting", "fine"):
        write(tab, text)
    expect(said(tab)).to_have_text(
        [
            re.compile("Not sent. The server refused it."),
            re.compile("Not sent. This message id was used for another text."),
            re.compile("Sent"),
        ]
    )
    assert task.texts() == ["fine"]
    # Only the reader takes it away.
    messages(tab).first.get_by_role("button", name="Discard").click()
    expect(tab.page.get_by_text("The server refused it.")).to_have_count(0)
    expect(tab.page.get_by_text("This message id was used for another text.")).to_have_count(1)


class Stalling:
    """A proxy that lets everything pass but the answers to lines: of these the head comes, and the body never ends."""

    def __init__(self, running: Running) -> None:
        self.upstream = ("127.0.0.1", int(running.url.rsplit(":", 1)[1]))
        self.left = 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.sockets: list[socket.socket] = [self.listener]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self.listener.accept()
                far = socket.create_connection(self.upstream)
                self.sockets += [near, far]
                stalled = threading.Event()
                for source, target, up in ((near, far, True), (far, near, False)):
                    threading.Thread(
                        target=self._pump, args=(source, target, up, stalled), daemon=True
                    ).start()

    def _pump(self, source: socket.socket, target: socket.socket, up: bool, stalled: threading.Event) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65_536):
                if up and self.left and data.startswith(b"POST /api/tasks/") and b"/input " in data[:200]:
                    self.left -= 1
                    stalled.set()
                if up or not stalled.is_set():
                    target.sendall(data)
                else:
                    head = b"HTTP/1.1 202 Accepted\r\nContent-Type: application/json\r\nContent-Length: 90\r\n\r\n{"
                    target.sendall(head)
            target.close()

    def close(self) -> None:
        for each in self.sockets:
            with contextlib.suppress(OSError):
                each.close()


def test_B69_a_body_that_never_ends_is_cut_after_fifteen_seconds_and_the_line_is_there_once(
    chromium: Any, running: Running, task: Task
) -> None:
    proxy = Stalling(running)
    try:
        with signed_in(chromium, dataclasses.replace(running, url=proxy.url)) as desk:
            tab = desk("/signin")
            clock.stop(tab.page)
            tab.page.goto(task.path)
            proxy.left = 1
            with tab.page.expect_response("**/api/tasks/*/input"):
                write(tab, "slow")
            tab.page.clock.run_for(14_000)
            expect(said(tab)).to_contain_text("Sending…")
            tab.page.clock.run_for(1_500)
            waits(tab, "Trying again (1 of 3)…")
            pass_time(tab, 3_000)
            expect(said(tab)).to_contain_text("Sent")
            assert proxy.left == 0
            assert task.texts() == ["slow"]
    finally:
        proxy.close()


def test_B49_a_server_that_forgot_this_tab_gets_the_line_after_the_stream_was_built_anew(
    desk: Any, task: Task
) -> None:
    tab = desk(task.path)
    is_live(tab)
    streams: list[str] = []
    tab.page.on("request", lambda request: streams.append(request.url) if "/live?" in request.url else None)

    def forget(route: Any, number: int) -> None:
        if number == 1:
            route.fulfill(status=409, json={"code": "connection_unknown", "message": "Connect again."})
        else:
            route.continue_()

    seen = posts(tab, forget)
    # Time stands still: it is not the timer of a retry that sends it again.
    clock.stop(tab.page)
    write(tab, "heals")
    expect(said(tab)).to_contain_text("Sent")
    is_live(tab)
    assert len(streams) == 1
    assert len(seen) == 2
    cid = tab.page.evaluate("sessionStorage.getItem('switchboard.cid')")
    assert [request.headers["x-connection-id"] for request in seen] == [cid, cid]


def test_B68_an_unsent_line_survives_a_reload_and_other_pages_show_it(desk: Any, task: Task) -> None:
    tab = desk(task.path)
    seen = posts(tab, lambda route, number: route.fulfill(status=503, body=""))
    write(tab, "kept")
    expect(said(tab)).to_contain_text("Not delivered yet")
    tab.page.goto("/connections")
    rest = tab.page.locator("#outbox-rest .send")
    expect(rest).to_contain_text("kept")
    expect(rest).to_contain_text("Not delivered yet")
    tab.page.unroute("**/api/tasks/*/input")
    after = posts(tab)
    tab.page.goto(task.path)
    tab.page.reload()
    expect(said(tab)).to_contain_text("Sent")
    assert len(set(keys(seen + after))) == 1
    assert task.texts() == ["kept"]


def test_B68_a_secret_line_is_in_no_storage_no_console_no_address_and_arrives(desk: Any, task: Task) -> None:
    tab = desk(task.path)
    urls: list[str] = []
    spoken: list[str] = []
    tab.page.on("request", lambda request: urls.append(request.url))
    tab.page.on("console", lambda message: spoken.append(message.text))
    told = "window.__told = []; document.addEventListener('outbox:failure', (e) => window.__told.push(JSON.stringify(e.detail)))"
    tab.page.evaluate(told)
    posts(
        tab,
        lambda route, number: route.fulfill(status=503, body="") if number == 1 else route.continue_(),
    )
    tab.page.locator("form[data-lines]").evaluate("(form) => { form.dataset.secret = '' }")
    write(tab, "hunter2-hunter2")
    expect(said(tab)).to_contain_text("Not delivered yet")
    everything = "JSON.stringify([{...sessionStorage}, {...localStorage}, window.__told, document.body.innerText, location.href])"
    assert "hunter2" not in tab.page.evaluate(everything)
    expect(said(tab)).to_contain_text("Sent")
    assert "hunter2" not in tab.page.evaluate(everything)
    assert "hunter2" not in "\n".join(urls + spoken)
    assert task.texts() == ["hunter2-hunter2"]


def test_B51_what_waits_when_somebody_else_signs_in_is_not_sent_and_not_shown(
    chromium: Any, running: Running, task: Task
) -> None:
    with signed_in(chromium, running) as desk:
        tab = desk(task.path)
        posts(tab, lambda route, number: route.fulfill(status=503, body=""))
        write(tab, "of the first user")
        expect(said(tab)).to_contain_text("Not delivered yet")
        tab.page.unroute("**/api/tasks/*/input")
        seen = posts(tab)
        # Somebody else signs in in another tab. This one has the old page, and no idea.
        other = desk("/")
        other.page.locator("#menu summary").click()
        other.page.get_by_role("button", name="Sign out").click()
        other.page.get_by_label("User name").fill(running.other_username)
        other.page.get_by_label("Password", exact=True).fill(running.other_password)
        other.page.get_by_role("button", name="Sign in").click()
        expect(other.page).to_have_url(f"{running.url}/")
        # Signed out in between: the try of then may have been refused already.
        expect(said(tab)).to_contain_text("We could not confirm")
        assert [request.headers["idempotency-key"] for request in seen][1:] == []
        tab.page.goto("/")
        expect(tab.page.locator("#outbox-rest .send")).to_have_count(0)
        assert "first user" not in tab.page.evaluate("JSON.stringify({...sessionStorage})")
        assert task.texts() == []


def test_B56_the_hundred_and_first_line_is_refused_and_stays_in_the_field(desk: Any, task: Task) -> None:
    tab = desk(task.path)
    tab.page.context.set_offline(True)
    form = tab.page.locator("form[data-lines]")
    form.evaluate(
        "(form) => { for (let n = 0; n < 100; n += 1) { form.querySelector('[name=text]').value = `line ${n}`; form.requestSubmit(); } }"
    )
    expect(messages(tab)).to_have_count(100)
    write(tab, "one too many")
    expect(tab.page.get_by_role("alert").filter(has_text="Too many messages wait already")).to_be_visible()
    expect(tab.page.get_by_label("Text", exact=True)).to_have_value("one too many")
    expect(messages(tab)).to_have_count(100)


def test_B62_B76_the_mark_of_work_goes_with_the_last_line_that_is_on_its_way(desk: Any, task: Task) -> None:
    tab = desk(task.path)
    tab.page.evaluate(
        "(task) => { const mark = document.createElement('b'); mark.dataset.working = `task:${task}`; mark.id = 'mark'; mark.hidden = true; "
        "mark.textContent = 'working'; document.getElementById('notices').append(mark) }",
        task.id,
    )
    held: list[Any] = []
    posts(tab, lambda route, number: held.append(route))
    write(tab, "refused")
    expect(tab.page.locator("#mark")).to_be_visible()
    until(lambda: tab.page.evaluate("0") or held, 20)
    held[0].fulfill(status=409, json={"code": "task_over", "message": "This task is over: it is killed."})
    expect(tab.page.locator("#mark")).to_be_hidden()
    expect(said(tab)).to_contain_text("Not sent. This task is over: it is killed.")


def test_B60_the_banner_of_a_line_outlives_a_new_stream_and_the_arrival_of_another_line(
    desk: Any, running: Running
) -> None:
    stuck, fine = make_tasks(running, 2)
    tab = desk("/signin")
    tab.page.clock.install()
    # What is stuck belongs to another task: its banner is at the top of every other page.
    tab.page.route(f"**/api/tasks/{stuck.id}/input", lambda route: route.fulfill(status=503, body=""))
    tab.page.goto(stuck.path)
    write(tab, "stuck")
    expect(said(tab)).to_contain_text("Not delivered yet")
    tab.page.goto(fine.path)
    banner = tab.page.locator("#outbox-rest .send")
    expect(banner).to_contain_text("Not delivered yet")
    is_live(tab)
    write(tab, "fine")
    expect(said(tab)).to_contain_text("Sent")
    tab.page.evaluate("document.dispatchEvent(new CustomEvent('live:reconnect'))")
    is_live(tab)
    expect(banner).to_contain_text("Not delivered yet")
    tab.page.unroute(f"**/api/tasks/{stuck.id}/input")
    until(lambda: (pass_time(tab, 3_000), "Sent" in banner.inner_text())[1], 30)


def test_B60_B63_a_line_that_waits_stays_on_the_page_when_the_view_is_fetched_again(
    desk: Any, task: Task
) -> None:
    tab = desk("/signin")
    clock.stop(tab.page)
    tab.page.goto(task.path)
    posts(tab, lambda route, number: route.fulfill(status=503, body=""))
    write(tab, "waiting")
    waits(tab, "Trying again (1 of 3)…")
    tab.page.clock.resume()
    refetch = "import(document.querySelector('script[src*=\"live\"]').src).then((live) => live.refetch())"
    # The first morph takes over the attributes of the new view; only the second one would show what was lost by it.
    for _ in range(3):
        tab.page.evaluate(refetch)
        expect(messages(tab)).to_contain_text("Not delivered yet")
    # Also when the list itself is another element.
    tab.page.locator("[data-outbox-list]").evaluate("(list) => list.replaceWith(list.cloneNode())")
    tab.page.evaluate(refetch)
    expect(messages(tab)).to_contain_text("Not delivered yet")


def test_B67_stopping_is_tried_once_and_says_when_it_did_not_get_there(desk: Any) -> None:
    with sites.Site(scenario="simple") as site:
        tab = desk("/")
        create(tab, host_of(site), f"stop-{uuid.uuid4().hex[:6]}")
        expect(state(tab)).to_contain_text("Waiting for you")
        tries: list[str] = []

        def lose(route: Any) -> None:
            tries.append(route.request.url)
            route.abort()

        tab.page.route("**/cancel", lose)
        tab.page.clock.install()
        tab.page.get_by_text("Cancel…").click()
        tab.page.get_by_role("button", name="Cancel this login").click()
        expect(tab.page.locator("#notices")).to_contain_text("It is not tried again.")
        tab.page.clock.run_for(60_000)
        assert len(tries) == 1
        expect(state(tab)).to_contain_text("Waiting for you")


def test_B44_the_answer_of_a_login_has_one_name_until_it_is_changed(desk: Any) -> None:
    with sites.Site(scenario="simple") as site:
        tab = desk("/")
        create(tab, host_of(site), f"named-{uuid.uuid4().hex[:6]}")
        expect(tab.page.locator("form.answer")).to_be_visible()
        sent: list[Any] = []

        def refuse(route: Any) -> None:
            sent.append(route.request)
            route.abort()

        tab.page.route("**/answer", refuse)
        tab.page.clock.install()
        for round_, password in enumerate(("first", "first", "second"), 1):
            fill_password(tab, password)
            until(lambda tries=4 * round_: (tab.page.clock.run_for(500), len(sent) == tries)[1], 30)
            expect(tab.page.get_by_text("Sending it again is safe.")).to_be_visible()
        names = keys(sent)
        assert len(names) == 12
        assert len(set(names[:8])) == 1, "four tries each, sent again unchanged"
        assert len(set(names[8:])) == 1
        assert names[0] != names[8]


@pytest.mark.parametrize(
    ("scheme", "width"), [("light", 1280), ("dark", 1280), ("light", 360), ("dark", 360)]
)
def test_every_state_of_a_line_fits_the_page_and_breaks_no_policy(
    chromium: Any, running: Running, task: Task, tmp_path: Path, scheme: str, width: int
) -> None:
    with signed_in(chromium, running, color_scheme=scheme) as desk:
        tab = desk("/signin")
        clock.stop(tab.page)
        tab.page.set_viewport_size({"width": width, "height": 900})
        tab.page.goto(task.path)

        def answer(route: Any, number: int) -> None:
            if number == 1:
                route.continue_()
            elif number == 2:
                body = {"code": "forbidden", "message": "You may look at this, and not change it."}
                route.fulfill(status=403, json=body)
            else:
                route.abort()

        posts(tab, answer)
        for text in (
            "git pull",
            "drop table customers",
            "systemctl restart export --now",
            "tail -f " + "x" * 90,
        ):
            write(tab, text)
        for ms, number in ((0, 1), (3_000, 2), (6_000, 3)):
            pass_time(tab, ms)
            waits(tab, f"Trying again ({number} of 3)…")
        expect(tab.page.get_by_role("button", name="Retry now")).to_be_visible()
        wide = tab.page.evaluate(
            "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        )
        assert wide <= 0, f"{wide} px too wide"
        tab.page.screenshot(path=tmp_path / f"outbox-{scheme}-{width}.png", full_page=True)
        tab.page.goto("/connections")
        expect(tab.page.locator("#outbox-rest .send").first).to_be_visible()
        assert (
            tab.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
            <= 0
        )
        tab.page.screenshot(path=tmp_path / f"rest-{scheme}-{width}.png")
        assert tab.page.evaluate("window.__wrong") == []
