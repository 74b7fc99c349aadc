"""``make bench ARGS=logins``: measure a real installation (SQLite, no Redis): how soon a stream shows what happened, and what a stream costs.

Prints a table and writes ``tests/bench/results/logins.json``. The method is in README.md.
"""

# ruff: noqa: E402  (Django must be set up before the rest is imported)
from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "tests.settings")

import django

django.setup()

from playwright.sync_api import sync_playwright

from tests.conftest import CHROMIUM, CHROMIUM_FLAGS, Running, run_switchboard, until
from tests.live.streaming import Stream, call, connect, events, login, managed, pid_of, rss_of, threads_of
from tests.sites.app import PASSWORD, USERNAME, Site

RESULTS = Path(__file__).parent / "results" / "logins.json"


class TimedSite(Site):
    """Knows how long it was busy answering: ``(begin, end)`` of each request on the monotonic clock."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.busy: list[tuple[float, float]] = []

    def _application(self, environ: dict[str, Any], start_response: Any) -> Any:
        begin = time.monotonic()
        try:
            return super()._application(environ, start_response)
        finally:
            self.busy.append((begin, time.monotonic()))

    def busy_between(self, begin: float, end: float) -> float:
        return sum(
            min(stop, end) - max(start, begin)
            for start, stop in list(self.busy)
            if stop > begin and start < end
        )


def summary(seconds: list[float]) -> dict[str, float]:
    """Milliseconds: median, 95th percentile, largest; and how many."""
    ordered = sorted(seconds)
    at_95 = ordered[min(len(ordered) - 1, int(len(ordered) * 0.95))]
    return {
        "count": len(ordered),
        "median_ms": round(statistics.median(ordered) * 1000, 1),
        "p95_ms": round(at_95 * 1000, 1),
        "max_ms": round(ordered[-1] * 1000, 1),
    }


def _fill(state: dict[str, Any]) -> dict[str, Any]:
    values = {"identifier": USERNAME, "password": PASSWORD}
    fields = {field["id"]: values[field["type"]] for field in state["fields"]}
    return {"interaction_id": state["interaction_id"], "field_values": fields}


def _arrival(stream: Stream, condition: Callable[[dict[str, Any]], bool]) -> tuple[float, dict[str, Any]]:
    def found() -> tuple[float, dict[str, Any]] | None:
        for at, event in zip(list(stream.times), list(stream.events), strict=False):
            if condition(event.json()):
                return at, event.json()
        return None

    answer: tuple[float, dict[str, Any]] = until(found, 20)
    return answer


def logins(running: Running, site: TimedSite, count: int) -> dict[str, list[float]]:
    """Each login: from the 202 of its submission to the states that follow, as the stream of the connection shows them."""
    measured: dict[str, list[float]] = {"total": [], "site": [], "beside_site": [], "submitting": []}
    for _ in range(count):
        connection = connect(running, site.domain, login_url=site.url("/simple/login"))
        with managed(running, connection) as stream:
            login(running, connection)
            _, state = _arrival(stream, lambda body: body.get("flow_step") == "AWAITING_INPUT")
            status, body, _ = call(
                running, "POST", f"/auth/connections/{connection['id']}/submit", _fill(state)
            )
            accepted = time.monotonic()
            if status != 202:
                raise SystemExit(f"a submission was refused: {body}")
            shown, _ = _arrival(stream, lambda body: body.get("flow_step") == "SUBMITTING")
            end, last = _arrival(stream, lambda body: body.get("flow_status") not in (None, "IN_PROGRESS"))
            if last["flow_status"] != "SUCCESS":
                raise SystemExit(f"a login failed: {last}")
            at_site = site.busy_between(accepted, end)
            measured["total"].append(end - accepted)
            measured["site"].append(at_site)
            measured["beside_site"].append(end - accepted - at_site)
            measured["submitting"].append(max(0.0, shown - accepted))
    return measured


#: Notes in the page when the submission was answered and when the page shows the end. Wall clock, milliseconds.
_WATCH = """
const clock = () => performance.timeOrigin + performance.now();
const ask = window.fetch.bind(window);
window.fetch = async (...words) => {
  // The result may be on the page before the 202 is: then the time counts from the request.
  const submits = String(words[0]).endsWith("/submit");
  if (submits) window.acceptedAt = clock();
  const answer = await ask(...words);
  if (submits && !window.shownAt) window.acceptedAt = clock();
  return answer;
};
new MutationObserver(() => {
  const title = document.getElementById("card-title");
  if (!window.shownAt && title && title.textContent.includes("You are signed in")) window.shownAt = clock();
}).observe(document, {childList: true, subtree: true, characterData: true});
"""


def in_browser(running: Running, site: TimedSite, count: int) -> list[float]:
    """The same on the hosted page in Chromium: from the 202 to the next card in the document, beside the site's answers."""
    beside: list[float] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_FLAGS)
        for _ in range(count):
            connection = connect(running, site.domain, login_url=site.url("/simple/login"))
            started = login(running, connection)
            page = browser.new_page()
            page.add_init_script(_WATCH)
            page.goto(started["hosted_url"])
            page.get_by_role("button", name="Continue").click()
            page.locator("input[autocomplete=username]").fill(USERNAME)
            page.locator("input[type=password]").fill(PASSWORD)
            page.get_by_role("button", name="Continue").click()
            page.get_by_role("heading", name="You are signed in").wait_for()
            accepted, shown = page.evaluate("[window.acceptedAt, window.shownAt]")
            offset = time.monotonic() - time.time()
            at_site = site.busy_between(accepted / 1000 + offset, shown / 1000 + offset)
            beside.append(max(0.0, (shown - accepted) / 1000 - at_site))
            page.close()
        browser.close()
    return beside


def worker_to_stream(running: Running, site: TimedSite, count: int) -> list[float]:
    """From the moment that a verb of the worker notes (``at``) to the event's arrival: same clock, same machine."""
    late: list[float] = []
    with events(running, "?topics=connections") as stream:
        stream.named("ready")
        for _ in range(count):
            login(running, connect(running, site.domain, login_url=site.url("/simple/login")))
            known = len(stream.events)
            until(
                lambda known=known: any(
                    event.json().get("flow_step") == "AWAITING_INPUT" for event in stream.events[known:]
                ),
                20,
            )
        offset = time.time() - time.monotonic()
        for at, event in zip(stream.times, stream.events, strict=False):
            if event.name == "flow.state" and event.json()["flow_step"] == "AWAITING_INPUT":
                late.append(at + offset - dt.datetime.fromisoformat(event.json()["at"]).timestamp())
    return late


@contextlib.contextmanager
def idle(running: Running, count: int) -> Iterator[list[Stream]]:
    held: list[Stream] = []
    try:
        for _ in range(count):
            held.append(events(running))
        for stream in held:
            stream.named("ready")
        yield held
    finally:
        for stream in held:
            stream.close()


def many_streams(running: Running, count: int, changes: int) -> dict[str, Any]:
    """Memory and threads of ``count`` idle streams, and how late each of them gets changes made ten times a second."""
    pid = pid_of(running)
    with idle(running, 5):
        pass
    memory, threads = rss_of(pid), threads_of(pid)
    with idle(running, count) as held:
        grown, more = rss_of(pid) - memory, threads_of(pid) - threads
        connection = connect(running)
        answered: list[float] = []
        for number in range(changes):
            started = time.monotonic()
            call(
                running,
                "PATCH",
                f"/auth/connections/{connection['id']}",
                {"health_check_interval": 400 + number},
            )
            answered.append(time.monotonic())
            time.sleep(max(0.0, started + 0.1 - time.monotonic()))
        late: list[float] = []
        for stream in held:
            until(lambda stream=stream: len(stream.of("connection.updated")) >= changes, 20)
            at = [
                when
                for when, event in zip(stream.times, stream.events, strict=False)
                if event.name == "connection.updated"
            ]
            late += [max(0.0, when - done) for when, done in zip(at, answered, strict=True)]
    until(lambda: threads_of(pid) <= threads + 1, 20)
    return {
        "streams": count,
        "kib_per_stream": round(grown / count / 1024, 1),
        "threads_more": more,
        "after_the_answer": summary(late),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--logins", type=int, default=30, help="logins to measure")
    parser.add_argument("--streams", type=int, default=200, help="idle streams to hold")
    parser.add_argument("--changes", type=int, default=30, help="paced changes while they are held")
    chosen = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="switchboard-bench-") as folder,
        TimedSite() as site,
        run_switchboard(Path(folder), STREAM_LIMIT="1000", LOG_LEVEL="WARNING") as running,
    ):
        logins(running, site, 2)  # warm
        measured = logins(running, site, chosen.logins)
        seen = in_browser(running, site, chosen.logins) if Path(CHROMIUM).exists() else []
        late = worker_to_stream(running, site, chosen.logins)
        held = many_streams(running, chosen.streams, chosen.changes)
    result = {
        "at": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "machine": {
            "python": platform.python_version(),
            "processors": os.cpu_count(),
            "system": platform.system(),
        },
        "login": {name: summary(values) for name, values in measured.items()},
        "in_browser": summary(seen) if seen else None,
        "worker_to_stream": summary(late),
        "many_streams": held,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")
    rows = [
        ("202 → result on the stream, in all", result["login"]["total"]),
        ("  of this the site's own answers", result["login"]["site"]),
        ("  beside the site's answers (target < 300)", result["login"]["beside_site"]),
        ("  the same in Chromium (target < 300)", result["in_browser"]),
        ("202 → SUBMITTING on the stream", result["login"]["submitting"]),
        ("worker's verb → event on a stream", late and result["worker_to_stream"]),
        (f"API's answer → event on {held['streams']} streams", held["after_the_answer"]),
    ]
    print(f"{'milliseconds':<46}{'median':>9}{'p95':>9}{'max':>9}{'n':>7}")
    for name, row in rows:
        if row is None:
            print(f"{name:<46}  Chromium is not installed")
            continue
        print(f"{name:<46}{row['median_ms']:>9}{row['p95_ms']:>9}{row['max_ms']:>9}{row['count']:>7}")
    print(
        f"{held['streams']} idle streams: {held['kib_per_stream']} KiB each, {held['threads_more']} threads more"
    )


if __name__ == "__main__":
    main()
