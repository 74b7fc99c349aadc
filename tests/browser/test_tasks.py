"""Tasks on the pages, in real Chromium with a real worker: commands that run, ask, are answered and end, in every tab as it happens."""

from __future__ import annotations

import json
import re
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect

from tests.browser.test_dashboard import Tab, is_live, signed_in, state
from tests.conftest import Running, run_switchboard, until

pytestmark = pytest.mark.browser

ASKS = """
print("\\x1b[1;32mready\\x1b[0m to go")
print("you said", input("Proceed with migration? (y/n) "))
print("hello", input("And your name? "))
"""
COUNTS = """
import sys
for number in range(int(sys.argv[1])): print(f"line {number:06d} \\x1b[3{number % 8}mcolour\\x1b[0m")
print("more:", input("more? "))
for number in range(3): print(f"late {number}")
input("end? ")
"""
SECRET = """
import getpass
print("length", len(getpass.getpass("Password: ")))
input("on? ")
"""
GROWS = """
import sys, time
for number in range(400):
    print(f"tick {number:04d}", flush=True)
    time.sleep(0.01)
"""


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """An installation that runs any command, keeps little output of each, and sees soon that one waits."""
    folder = tmp_path_factory.mktemp("tasks")
    more = {
        "COMMANDS": "any",
        "COMMAND_QUIET_SECONDS": "0.2",
        "COMMAND_OUTPUT_BYTES": "3000000",
        "STREAM_LIMIT": "100",
    }
    with run_switchboard(folder, **more) as started:
        yield started


@pytest.fixture
def desk(chromium: Any, running: Running) -> Iterator[Any]:
    with signed_in(chromium, running) as make:
        yield make


def call(running: Running, path: str, body: Any = None) -> Any:
    request = urllib.request.Request(
        f"{running.url}{path}",
        data=None if body is None else json.dumps(body).encode(),
        headers={"Authorization": f"Bearer {running.api_key}", "Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.load(answer)


def command(running: Running, program: str, *arguments: str, **more: Any) -> str:
    """The path of a task that runs this Python program."""
    argv = [sys.executable, "-u", "-c", program, *arguments]
    return f"/tasks/{call(running, '/api/tasks', {'kind': 'command', 'argv': argv, **more})['id']}"


def present(running: Running, path: str) -> Any:
    return call(running, f"/api{path}")


def waits(running: Running, path: str) -> None:
    until(lambda: present(running, path)["status"] == "waiting_for_input", 20, "it does not wait")


def output(tab: Tab) -> Any:
    return tab.page.locator("[data-lines-of-output]")


def say(tab: Tab, text: str) -> None:
    tab.page.get_by_label("Text", exact=True).fill(text)
    tab.page.get_by_role("button", name="Send", exact=True).click()


def test_a_command_is_run_from_the_page_asks_is_answered_and_ends_while_a_second_tab_sees_it(
    desk: Any, running: Running, tmp_path: Path
) -> None:
    program = tmp_path / "asks me.py"
    program.write_text(ASKS)
    one = desk("/tasks")
    one.page.get_by_role("link", name="New task").click()
    one.page.get_by_label("Command").fill(f"{sys.executable} -u '{program}'")
    expect(one.page.locator("#argv li")).to_have_text([sys.executable, "-u", str(program)])
    one.page.get_by_label("Title").fill("migration")
    one.page.get_by_label("Labels").fill("nightly, billing")
    one.page.get_by_role("button", name="Run").click()
    one.page.wait_for_url(re.compile(r"/tasks/task_"))
    two = desk(one.page.url.removeprefix(running.url))
    home = desk("/")
    for tab in (one, two):
        is_live(tab)
        expect(state(tab)).to_contain_text("Waiting for you: yes or no")
        expect(output(tab)).to_contain_text("ready to go")
        expect(tab.page.locator(".asks-text")).to_have_text("Proceed with migration? (y/n)")
    assert output(one).locator(".t-fg-2.t-bold").inner_text() == "ready"
    expect(home.page.locator("article.attn", has_text="migration")).to_contain_text("Proceed with migration?")
    # A quick reply, then a text; both tabs have what came of it.
    one.page.get_by_role("button", name="Yes", exact=True).click()
    for tab in (one, two):
        expect(output(tab)).to_contain_text("you said y")
        expect(output(tab)).to_contain_text("And your name?")
        expect(state(tab)).to_contain_text("Waiting for you")
    two.page.locator("body").press("i")
    expect(two.page.get_by_label("Text", exact=True)).to_be_focused()
    two.page.keyboard.type("Grace & Ada")
    two.page.keyboard.press("Enter")
    for tab in (one, two):
        expect(output(tab)).to_contain_text("hello Grace & Ada")
        expect(state(tab)).to_contain_text("Done")
        expect(tab.page.locator("section.state")).to_contain_text("Exit code 0")
        expect(tab.page.locator(".send-card")).to_be_hidden()
        told = tab.page.locator("[id^=timeline-] .moment-text")
        expect(told).to_contain_text(
            ["queued by admin", "started by", "waits for input by", "sent 1 byte: delivered by admin", "goes on by",
             "waits for input by", "sent 11 bytes: delivered by admin", "goes on by", "ended with exit code 0"]
        )  # fmt: skip
    expect(home.page.locator("article.attn", has_text="migration")).to_contain_text("Done")
    for tab in (one, two, home):
        tab.check()


def test_a_task_is_stopped_with_a_reason_that_everybody_sees(desk: Any, running: Running) -> None:
    path = command(running, "import time; print('here'); time.sleep(600)", title="sleeper")
    tab, other, listed = desk(path), desk(path), desk("/tasks")
    for each in (tab, other, listed):
        is_live(each)
    expect(output(tab)).to_contain_text("here")
    tab.page.get_by_text("Stop…").click()
    tab.page.get_by_label("Reason").fill("wrong branch")
    tab.page.get_by_role("button", name="Stop this task").click()
    for each in (tab, other):
        expect(state(each)).to_contain_text("Stopped by admin")
        expect(each.page.locator("section.state")).to_contain_text("wrong branch")
        expect(each.page.locator("ol[id^=timeline-]")).to_contain_text("asked to stop: wrong branch by admin")
    expect(listed.page.locator(f"#task-{path.split('/')[-1]}")).to_contain_text("Stopped by admin")
    for each in (tab, other, listed):
        each.check()


def test_B67_a_key_and_a_stop_that_get_lost_are_said_and_not_sent_again(desk: Any, running: Running) -> None:
    tab = desk("/signin")
    path = command(running, "input('wait? ')")
    waits(running, path)
    tab.page.clock.install()
    tab.page.goto(path)
    is_live(tab)
    tries: list[str] = []

    def lose(route: Any) -> None:
        tries.append(route.request.url)
        route.abort()

    tab.page.route("**/api/tasks/*/input", lose)
    tab.page.route("**/tasks/*/kill", lose)
    tab.page.get_by_role("button", name="Ctrl-C").click()
    expect(tab.page.locator("[data-outbox-list] .send-state")).to_contain_text("It is not sent again.")
    tab.page.get_by_text("Stop…").click()
    tab.page.get_by_role("button", name="Stop this task").click()
    expect(tab.page.locator("#notices")).to_contain_text("It is not tried again.")
    tab.page.clock.run_for(120_000)
    assert [url.rsplit("/", 1)[1] for url in tries] == ["input", "kill"]
    assert present(running, path)["status"] == "waiting_for_input"
    tab.page.unroute("**/api/tasks/*/input")
    tab.page.get_by_role("button", name="Ctrl-C").click()
    expect(state(tab)).to_contain_text("Failed")
    expect(output(tab)).to_contain_text("KeyboardInterrupt")


def test_the_output_follows_until_the_reader_scrolls_and_says_how_much_is_new(
    desk: Any, running: Running
) -> None:
    path = command(running, COUNTS, "2000")
    tab = desk(path)
    expect(output(tab).locator("li").last).to_contain_text("more?")
    box = tab.page.locator("[data-scroll]")
    at_end = "box => box.scrollHeight - box.scrollTop - box.clientHeight < 24"
    until(lambda: box.evaluate(at_end), 5)
    box.hover()
    tab.page.mouse.wheel(0, -1200)
    follow = tab.page.get_by_role("button", name="Follow")
    expect(follow).to_have_attribute("aria-pressed", "false")
    top = box.evaluate("box => box.scrollTop")
    call(running, f"/api{path}/input", {"text": "x"})
    new = tab.page.locator("[data-to-end]")
    expect(new).to_have_text(re.compile(r"^\d+ new lines ↓$"))
    assert box.evaluate("box => box.scrollTop") == top
    new.click()
    expect(new).to_be_hidden()
    expect(follow).to_have_attribute("aria-pressed", "true")
    until(lambda: box.evaluate(at_end), 5)
    expect(output(tab).get_by_text("late 2")).to_be_in_viewport()
    tab.check()


def test_the_output_is_searched_across_colours_unwrapped_and_downloaded_byte_for_byte(
    desk: Any, running: Running
) -> None:
    path = command(running, COUNTS, "300")
    tab = desk(path)
    expect(output(tab)).to_contain_text("more?")
    find = tab.page.get_by_label("Search in the output")
    find.fill("LINE 00010")
    found = tab.page.locator("[data-found]")
    expect(found).to_have_text("10 of 10")
    find.press("Enter")
    expect(found).to_have_text("1 of 10")
    expect(output(tab).locator("li.hit")).to_contain_text("line 000100")
    find.press("Shift+Enter")
    expect(found).to_have_text("10 of 10")
    # The text goes over a change of colour.
    find.fill("000123 col")
    expect(found).to_have_text("1 of 1")
    expect(output(tab).locator("li.hit")).to_be_in_viewport()
    assert tab.page.evaluate("[...CSS.highlights.get('found')].map(String)") == ["000123 col"]
    find.fill("no such thing")
    expect(found).to_have_text("none here")
    wrap = tab.page.get_by_role("button", name="Wrap")
    wrap.click()
    expect(wrap).to_have_attribute("aria-pressed", "false")
    assert output(tab).locator("li").first.evaluate("li => getComputedStyle(li).whiteSpace") == "pre"
    with tab.page.expect_download() as started:
        tab.page.get_by_role("link", name="Download").click()
    kept = Path(started.value.path()).read_bytes()
    task = present(running, path)
    assert len(kept) == task["output_bytes"]
    assert kept.startswith(b"line 000000 \x1b[30mcolour\x1b[0m\r\nline 000001")
    tab.check()


def test_a_long_output_begins_at_its_end_and_what_came_before_is_asked_for(
    desk: Any, running: Running
) -> None:
    path = command(running, COUNTS, "20000")
    waits(running, path)
    tab = desk(path)
    lines = output(tab).locator("li")
    # Not the text of all of it: that alone takes the browser a while, each time.
    expect(lines.last).to_contain_text("more?", timeout=20_000)
    first = until(lambda: lines.first.inner_text(), 5)
    assert "line 0" in first
    assert "line 000000" not in first
    assert lines.count() <= 5_100
    tab.page.get_by_role("link", name="Show earlier").click()
    until(lambda: lines.first.inner_text() != first, 5)
    shown = [int(number) for number in re.findall(r"line (\d{6})", output(tab).inner_text())]
    assert shown == list(range(shown[0], 20_000)), "no line is missing or there twice at the seam"
    # A line has an address of its own, which works for others.
    link = output(tab).locator("li", has_text="line 019000").locator("a.line-link").get_attribute("href")
    there = desk(f"{path}{link}")
    meant = output(there).locator("li.meant")
    expect(meant).to_contain_text("line 019000")
    expect(meant).to_be_in_viewport()
    for each in (tab, there):
        each.check()


def test_a_reload_and_a_broken_line_go_on_at_the_same_byte(desk: Any, running: Running) -> None:
    path = command(running, GROWS)
    tab = desk(path)
    expect(output(tab)).to_contain_text("tick 0030")
    tab.page.reload()
    expect(output(tab)).to_contain_text("tick 0090")
    tab.page.context.set_offline(True)
    tab.page.context.set_offline(False)
    expect(state(tab)).to_contain_text("Done", timeout=20_000)
    expect(output(tab)).to_contain_text("tick 0399")
    shown = re.findall(r"tick (\d{4})", output(tab).inner_text())
    assert shown == [f"{number:04d}" for number in range(400)]


def test_a_password_is_typed_hidden_and_kept_nowhere(desk: Any, running: Running) -> None:
    path = command(running, SECRET)
    tab = desk(path)
    is_live(tab)
    expect(state(tab)).to_contain_text("Waiting for you: a password")
    field = tab.page.get_by_label("Password", exact=True)
    expect(field).to_be_visible()
    expect(tab.page.get_by_label("Text", exact=True)).to_be_hidden()
    field.fill("hunter2-hunter2")
    tab.page.get_by_role("button", name="Show", exact=True).click()
    tab.page.get_by_role("button", name="Send", exact=True).click()
    expect(output(tab)).to_contain_text("length 15")
    expect(tab.page.get_by_label("Text", exact=True)).to_be_visible()
    everything = (
        "JSON.stringify([{...sessionStorage}, {...localStorage}, document.body.innerText, location.href])"
    )
    assert "hunter2" not in tab.page.evaluate(everything)
    assert "hunter2" not in json.dumps(present(running, path))
    tab.check()


def test_typing_without_enter_and_keys_reach_the_program_as_they_are(desk: Any, running: Running) -> None:
    path = command(running, "import sys; print(repr(input('> '))); print(repr(input('> ')))")
    tab = desk(path)
    expect(state(tab)).to_contain_text("Waiting for you")
    tab.page.get_by_label("with Enter").uncheck()
    say(tab, "half '$(x)' ")
    expect(output(tab)).to_contain_text("> half '$(x)'")
    say(tab, "whole")
    expect(tab.page.get_by_label("with Enter")).not_to_be_checked()
    expect(output(tab)).to_contain_text("> half '$(x)' whole")
    assert present(running, path)["status"] == "waiting_for_input"
    tab.page.get_by_role("button", name="Enter", exact=True).click()
    expect(output(tab)).to_contain_text("""\"half '$(x)' whole\"""")
    tab.page.get_by_role("button", name="Ctrl-D").click()
    expect(output(tab)).to_contain_text("EOFError")
    expect(state(tab)).to_contain_text("Failed: exit code 1")
    tab.check()


def test_a_program_with_the_whole_screen_is_shown_as_one_and_leaves_the_output_as_it_was(
    desk: Any, running: Running, tmp_path: Path
) -> None:
    text = tmp_path / "long.txt"
    text.write_text("".join(f"row {number}\n" for number in range(200)))
    body = {"kind": "command", "argv": ["less", str(text)], "title": "reading"}
    tab = desk(f"/tasks/{call(running, '/api/tasks', body)['id']}")
    whole = tab.page.locator("[data-full-screen]")
    expect(whole).to_contain_text("row 22")
    tab.page.get_by_role("button", name="down", exact=True).click()
    expect(whole).to_contain_text("row 23")
    expect(whole).not_to_contain_text("row 0\n")
    tab.page.get_by_label("with Enter").uncheck()
    say(tab, "q")
    expect(state(tab)).to_contain_text("Done")
    expect(whole).to_be_hidden()
    tab.check()


def test_C52_what_goes_beyond_the_limit_is_cut_where_everybody_sees_it(desk: Any, running: Running) -> None:
    path = command(running, "print('x' * 4_000_000)")
    tab = desk(path)
    expect(state(tab)).to_contain_text("Done")
    expect(tab.page.locator("[data-cut]")).to_contain_text("The output was cut here: 1,000,002 more bytes")
    tab.page.reload()
    expect(tab.page.locator("[data-cut]")).to_contain_text("1,000,002 more bytes")
    tab.check()


def test_C59_a_new_name_and_a_deletion_reach_other_tabs(desk: Any, running: Running) -> None:
    path = command(running, "print('x')", title="before")
    until(lambda: present(running, path)["status"] == "completed", 20)
    tab, listed = desk(path), desk("/tasks")
    row = listed.page.locator(f"#task-{path.split('/')[-1]}")
    is_live(listed)
    expect(row).to_contain_text("before")
    tab.page.get_by_role("link", name="Rename…").click()
    tab.page.get_by_label("Title").fill("after")
    tab.page.get_by_label("Labels").fill("odd label!")
    tab.page.get_by_role("button", name="Save").click()
    expect(tab.page.locator(".error")).to_contain_text("A label has")
    expect(tab.page.get_by_label("Title")).to_have_value("after")
    tab.page.get_by_label("Labels").fill("done, kept")
    tab.page.get_by_role("button", name="Save").click()
    expect(tab.page.get_by_role("heading", level=1)).to_have_text("after")
    expect(row).to_contain_text("after")
    expect(row.locator(".tag")).to_have_text(["done", "kept"])
    tab.page.get_by_role("link", name="Delete…").click()
    tab.page.get_by_role("button", name="Delete this task").click()
    expect(tab.page.locator(".flash")).to_contain_text("after was deleted")
    expect(row).to_contain_text("Deleted")
    for each in (tab, listed):
        each.check()


def test_a_new_task_shows_up_in_the_list_through_the_pill_and_filters_find_it(
    desk: Any, running: Running
) -> None:
    tab = desk("/tasks?status=waiting_for_input")
    is_live(tab)
    path = command(running, "input('what now? ')", title="pilled", labels=["pill"])
    pill = tab.page.locator("#list [data-pill]")
    expect(pill).to_have_text(re.compile("new, show ↑"))
    pill.click()
    row = tab.page.locator(f"#task-{path.split('/')[-1]}")
    expect(row).to_contain_text("what now?")
    tab.page.get_by_label("Label", exact=True).fill("pill")
    expect(tab.page.locator("#list tbody tr")).to_have_count(1)
    assert "label=pill" in tab.page.url
    tab.page.get_by_label("Search").fill("nothing like it")
    expect(tab.page.locator("#list")).to_contain_text("Nothing matches these filters")
    tab.check()


def test_C54_a_task_that_waits_for_twenty_minutes_is_called_stale_by_the_clock_alone(
    desk: Any, running: Running
) -> None:
    path = command(running, "input('anybody? ')")
    waits(running, path)
    tab = desk("/signin")
    tab.page.clock.install()
    tab.page.goto(path)
    is_live(tab)
    stale = tab.page.locator("section.state .stale")
    expect(stale).to_be_hidden()
    tab.page.clock.fast_forward("21:00")
    expect(stale).to_be_visible()


def test_what_waits_is_answered_from_the_home_page_once(desk: Any, running: Running) -> None:
    path = command(running, "print('said', input('Really? [y/N] '))", title="from home")
    tab = desk("/")
    is_live(tab)
    card = tab.page.locator("article.attn", has_text="from home")
    no = card.get_by_role("button", name="No", exact=True)
    # What was refused can be pressed again where the focus was.
    tab.page.route("**/input", lambda route: route.fulfill(status=400, body="no"))
    no.press("Enter")
    expect(tab.page.get_by_text("Not sent.").first).to_be_visible()
    expect(no).to_be_focused()
    tab.page.unroute("**/input")
    no.dblclick()
    expect(card).to_contain_text("Done")
    assert len(present(running, path)["inputs"]) == 1
    tab.check()


def test_without_script_a_command_is_run_read_answered_and_stopped(
    chromium: Any, running: Running, tmp_path: Path
) -> None:
    with signed_in(chromium, running, java_script_enabled=True) as desk:
        cookies = desk("/").page.context.cookies()
    context = chromium.new_context(base_url=running.url, java_script_enabled=False)
    context.add_cookies(cookies)
    context.set_default_timeout(8_000)
    page = context.new_page()
    try:
        page.goto("/tasks/new")
        page.get_by_label("Command").fill("python 'unclosed")
        page.get_by_role("button", name="Run").click()
        expect(page.locator(".error")).to_contain_text("no closing quotation")
        expect(page.get_by_label("Command")).to_have_value("python 'unclosed")
        program = "for n in range(3000): print(f'\\x1b[31mrow {n:05d}\\x1b[0m')\nprint('got', input('Go on? (y/n) '))\ninput('and? ')"
        page.get_by_label("Command").fill(f"{sys.executable}\n-c\nimport this")
        page.get_by_label("One argument per line").check()
        page.get_by_role("button", name="Run").click()
        page.wait_for_url(re.compile(r"/tasks/task_"))
        expect(page.locator("section[id^=facts-]")).to_contain_text("-c 'import this'")
        path = command(running, program, title="plain")
        waits(running, path)
        page.goto(path)
        expect(page.locator(".state .chip")).to_contain_text("Waiting for you: yes or no")
        shown = page.locator("[data-lines-of-output]")
        expect(shown).to_contain_text("row 02999")
        expect(shown).not_to_contain_text("row 00100")
        assert "\x1b" not in page.content()
        page.get_by_role("link", name="Show earlier").click()
        expect(shown).not_to_contain_text("row 02999")
        page.get_by_role("link", name="To the end").click()
        page.get_by_role("button", name="Yes", exact=True).click()
        until(lambda: "got y" in tail(running, path), 10)
        page.goto(path)
        page.get_by_label("Text", exact=True).fill("typed")
        page.get_by_label("with Enter").uncheck()
        page.get_by_role("button", name="Send", exact=True).click()
        expect(page.locator(".flash")).to_contain_text("The line was accepted.")
        until(lambda: "and? typed" in tail(running, path), 10)
        assert present(running, path)["status"] == "waiting_for_input"
        page.get_by_text("Stop…").click()
        page.get_by_label("Reason").fill("enough")
        page.get_by_role("button", name="Stop this task").click()
        until(lambda: present(running, path)["status"] == "killed", 20)
        page.goto(path)
        expect(page.locator(".state")).to_contain_text("enough")
        expect(page.locator("body")).not_to_contain_text("Enter sends")
    finally:
        context.close()


def tail(running: Running, path: str) -> str:
    request = urllib.request.Request(
        f"{running.url}/api{path}/output?tail=200", headers={"Authorization": f"Bearer {running.api_key}"}
    )
    with urllib.request.urlopen(request, timeout=10) as answer:
        return str(answer.read().decode(errors="replace"))


@pytest.mark.parametrize(
    ("scheme", "width"), [("light", 1280), ("dark", 1280), ("light", 360), ("dark", 360)]
)
def test_the_pages_of_tasks_fit_and_have_no_barrier_that_axe_knows(
    chromium: Any, running: Running, tmp_path: Path, scheme: str, width: int
) -> None:
    path = command(running, ASKS, title="looked over", labels=["axe"])
    ended = command(running, "print('\\x1b[30;42m PASS \\x1b[0m \\x1b[34mblue\\x1b[0m'); raise SystemExit(3)")
    waits(running, path)
    until(lambda: present(running, ended)["status"] == "failed", 20)
    with signed_in(chromium, running, color_scheme=scheme) as desk:
        for page in ("/", "/tasks", "/tasks/new", path, ended, f"{path}/edit"):
            tab = desk(page)
            tab.page.set_viewport_size({"width": width, "height": 900})
            is_live(tab)
            if page in (path, ended):
                expect(output(tab).locator("li").first).to_be_visible()
            wide = tab.page.evaluate(
                "document.documentElement.scrollWidth - document.documentElement.clientWidth"
            )
            assert wide <= 0, f"{page} is {wide} px too wide"
            found = Axe().run(tab.page)
            assert found.violations_count == 0, found.generate_report()
            tab.page.screenshot(path=tmp_path / f"{page.strip('/').replace('/', '-')}.png", full_page=True)
            tab.check()
            tab.page.close()


def test_a_stolen_seat_and_a_browser_with_many_tabs_get_the_output_all_the_same(
    desk: Any, running: Running
) -> None:
    path = command(running, COUNTS, "5")
    waits(running, path)
    tabs = [desk(path) for _ in range(6)]
    for tab in tabs:
        tab.page.bring_to_front()
        expect(output(tab)).to_contain_text("more?")
    call(running, f"/api{path}/input", {"text": "seen by all"})
    for tab in tabs:
        tab.page.bring_to_front()
        expect(output(tab)).to_contain_text("more: seen by all")
        expect(output(tab)).to_contain_text("late 2")
