"""Clients that come back, with real processes and sockets: two servers on SQLite without Redis, two on PostgreSQL with Redis."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import random
import re
import secrets
import signal
import subprocess
import sys
import threading
import urllib.parse
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, free_port, until
from tests.events.test_clients import MALFORMED
from tests.live import services
from tests.live.client import Line, Node, Tab, installation
from tests.live.streaming import Cut, Stream, call, connect, events, login, threads_of
from tests.live.test_leaks import WRAPPER, Browser
from tests.live.test_operations import numbers

pytestmark = pytest.mark.live

#: Seconds. Short, so that a test can wait for an end, and long enough to come back in time on a machine that is busy; a lease is renewed
#: every third of it.
GRACE, LEASE, HEARTBEAT = 8, 9, 1
KNOBS = {
    "CLIENT_GRACE_SECONDS": str(GRACE),
    "CLIENT_LEASE_SECONDS": str(LEASE),
    "HEARTBEAT_SECONDS": str(HEARTBEAT),
}


class Telling(Node):
    """A server that says on SIGUSR1 what it holds."""

    def start(self, name: str) -> None:
        with (self.data_dir / f"{name}.log").open("ab") as output:
            self.processes[name] = subprocess.Popen(
                [sys.executable, "-c", WRAPPER], cwd=ROOT, env=self.env, stdout=output, stderr=output
            )

    def held(self) -> dict[str, int]:
        before = self.log(self.name).count("HELD ")
        self.processes[self.name].send_signal(signal.SIGUSR1)
        until(lambda: self.log(self.name).count("HELD ") > before, 20)
        told: dict[str, int] = json.loads(re.findall(r"HELD (\{.*\})", self.log(self.name))[-1])
        return told | {
            "threads": threads_of(self.pid),
            "files": len(list(Path(f"/proc/{self.pid}/fd").iterdir())),
        }


@pytest.fixture(scope="module", params=["sqlite", "postgresql+redis"])
def nodes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Node]]:
    place = tmp_path_factory.mktemp("comeback")
    with contextlib.ExitStack() as stack:
        more: dict[str, Any] = {}
        if request.param != "sqlite":
            layer = stack.enter_context(services.redis(tmp_path_factory.mktemp("comeback-redis")))
            more = {"database": request.getfixturevalue("clients_database"), "REDIS_URL": layer.url}
        yield stack.enter_context(installation(place, servers=2, kind=Telling, **KNOBS, **more))


@pytest.fixture
def tabs(nodes: list[Node]) -> Iterator[contextlib.ExitStack]:
    """Whatever is opened here is closed at the end, and no client stays live."""
    with contextlib.ExitStack() as stack:
        yield stack
    until(
        lambda: not nodes[0].rows("SELECT cid FROM events_client WHERE state = 'live'"),
        30,
        "a client stays live",
    )


def open_streams(nodes: list[Node]) -> float:
    return sum(numbers(node)["switchboard_streams_open"] for node in nodes)


def subject_of(connection: Any) -> str:
    return f"connection:{connection['id']}"


def ids_of(line: Line, name: str) -> list[str]:
    return [event.json()["id"] for event in line.of(name)]


# What is the same in every deployment is looked at in one.
on_sqlite = pytest.mark.parametrize("nodes", ["sqlite"], indirect=True)
on_postgresql = pytest.mark.parametrize("nodes", ["postgresql+redis"], indirect=True)

# ── The whole path ──


def test_B13_B18_B23_B24_B25_connect_drop_reconnect_drop_expire(
    nodes: list[Node], tabs: contextlib.ExitStack
) -> None:
    here, there = nodes
    made = connect(here)
    subject = subject_of(made)
    # Somebody who only looks, with a client of its own.
    watcher = tabs.enter_context(Tab(there, topics=f"clients,{subject}"))
    watching = watcher.open()
    tab = tabs.enter_context(Tab(here, topics=subject))

    line = tab.open()
    first = line.welcome
    assert (first["epoch"], first["resumed"], first["cid_accepted"]) == (1, False, True)
    assert line.names()[0] == "welcome"
    assert tab.claim(subject)[0] == 200
    line.named("claim.taken")

    line.cut()
    away = tab.wait_for("inactive")
    assert away["expires_at"] is not None
    login(here, made)
    again = tab.open(there)
    assert (again.welcome["epoch"], again.welcome["resumed"]) == (2, True)
    # What happened meanwhile came before "ready", once.
    assert again.names()[:3] == ["welcome", "flow.state", "ready"], again.names()
    owner = f"SELECT c.cid FROM events_claim k JOIN events_client c ON c.id = k.client_id WHERE k.subject = '{subject}'"
    assert there.rows(owner) == [(tab.cid,)]
    # Its first message is accepted and acted on. (It ends the login, and with it who was handling that.)
    named = {"X-Connection-ID": tab.cid}
    status, _, _ = call(there, "POST", f"/auth/connections/{made['id']}/cancel", {}, headers=named)
    assert status < 300
    again.until(lambda event: event.name == "flow.state" and event.json()["flow_status"] == "CANCELED")
    assert tab.claim(subject)[0] == 200

    again.cut(reset=True)
    tab.wait_for("expired")
    watching.until(lambda event: event.name == "client.expired" and event.json()["id"] == tab.cid)
    mine = [event.name for event in watching.logged() if tab.cid in (event.json()["id"], event.json().get("client"), event.json().get("previous_client"))]  # fmt: skip
    assert mine == [
        "client.opened", "claim.taken", "client.inactive", "client.opened", "claim.released", "claim.taken", "client.inactive",
        "claim.released", "client.expired",
    ]  # fmt: skip
    finished, released = watching.of("claim.released")
    assert finished.json()["reason"] == "finished"
    assert (released.json()["reason"], released.json()["previous_client"]) == ("expired", tab.cid)

    last = tab.open(here)
    assert (last.welcome["epoch"], last.welcome["resumed"], last.welcome["connection_id"]) == (
        3,
        False,
        tab.cid,
    )
    assert "claim.released" in last.names(), "it learns what it lost"
    status, claim = tab.claim(subject)
    assert (status, claim["client"]) == (200, tab.cid)


# ── The old stream ends when it ends ──

ENDINGS = ["before", 0, 5, 50, 500, "reset", "black-holed", "stalled"]


def test_B14_B15_B16_the_old_stream_may_end_whenever_it_ends_the_new_one_stays(
    nodes: list[Node], tabs: contextlib.ExitStack
) -> None:
    here = nodes[0]
    made = connect(here)
    before = open_streams(nodes)
    expected = before
    network = tabs.enter_context(Cut(here.url))
    opened: list[tuple[str, Tab, Line, Line]] = []
    for ending in ENDINGS:
        for target in nodes:
            tab = tabs.enter_context(Tab(here, topics=f"{subject_of(made)}"))
            old = tab.open(url=network.url if ending == "black-holed" else "")
            how = f"{ending} to {'the same' if target is here else 'another'} process"
            timer = None
            if ending == "before":
                old.cut()
            elif ending == "black-holed":
                network.swallow()
            elif ending == "stalled":
                old.pause()
            else:
                late = 0 if ending == "reset" else int(ending) / 1000
                timer = threading.Timer(late, old.cut, kwargs={"reset": ending == "reset"})
                timer.start()
            new = tab.open(target)
            network.heal()
            assert (new.welcome["epoch"], new.welcome["cid_accepted"], new.welcome["resumed"]) == (
                2,
                True,
                True,
            ), how
            if timer is not None:
                timer.join()
            opened.append((how, tab, old, new))
            expected += 1
    # The server ends every old stream, also those that nobody closes.
    until(lambda: open_streams(nodes) == expected, 40, "an old stream stays open")
    login(here, made)
    for how, tab, old, new in opened:
        new.named("flow.state")
        assert not old.of("flow.state"), how
        assert new.names().count("flow.state") == 1, how
        assert not new.of("superseded", "end"), how
        picture = tab.picture
        assert (picture["state"], picture["epoch"], picture["expires_at"]) == ("live", 2, None), how
        assert tab.probe(), how
        old.resume()
        if how.startswith("stalled"):
            # It was told, and reads it now.
            assert old.named("superseded").json() == {"epoch": 2}
    for node in nodes:
        assert "Traceback" not in node.log(node.name)


def test_B17_B30_B31_two_hundred_reconnects_over_two_processes_lose_nothing_and_leave_nothing(
    nodes: list[Telling], tabs: contextlib.ExitStack
) -> None:
    """20 of each of 10 tabs, all at once, while events are written."""
    here = nodes[0]
    resident = [tabs.enter_context(Tab(node, topics="tasks")) for node in nodes]
    for each in resident:
        each.open()
    made = [connect(here) for _ in range(2)]
    crowd = [tabs.enter_context(Tab(random.choice(nodes), topics="connections")) for _ in range(10)]
    for number, tab in enumerate(crowd):
        # Warm: everything that a process makes once is made.
        tab.open(nodes[number % 2])
        assert tab.claim(subject_of(made[number % 2]))[0] == 200
        tab.line.cut()
    until(lambda: open_streams(nodes) == 2, 30)

    def settled() -> list[dict[str, int]] | None:
        """What is held when nothing but the resident is: nobody's request outlives their stream."""
        now = [node.held() for node in nodes]
        return now if all(each["requests"] == each["wires"] == each["streams"] == 1 for each in now) else None

    held = until(settled, 20, "a request stays behind")
    rows = count_rows(here)
    # What is being written meanwhile does not end before the last reconnect has begun.
    over = threading.Event()
    created: list[str] = []

    def write() -> None:
        while not over.is_set():
            created.append(connect(random.choice(nodes))["id"])
            over.wait(0.05)

    def come_and_go(tab: Tab) -> None:
        for number in range(20):
            line = tab.open(random.choice(nodes), ready=bool(number % 3))
            if number % 4:
                line.cut(reset=number % 2 == 0)
        for line in tab.lines:
            # Those that were replaced are over, and their connections would be kept for another request.
            line.cut()

    first = [len(tab.lines) for tab in crowd]
    writer = threading.Thread(target=write)
    writer.start()
    threads = [threading.Thread(target=come_and_go, args=[tab]) for tab in crowd]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    over.set()
    writer.join()
    assert [len(tab.lines) - count for tab, count in zip(crowd, first, strict=True)] == [20] * 10
    for tab in crowd:
        line = tab.open()
        assert line.welcome["resumed"] is True
        assert tab.epoch == 22
        got = [event.json()["id"] for each in tab.lines for event in each.of("connection.created")]
        assert [each for each in tab.seen if tab.seen.count(each) > 1] == []
        assert tab.seen == sorted(tab.seen)
        missing = [each for each in created if each not in got]
        assert not missing, missing
        line.cut()
    until(lambda: open_streams(nodes) == 2, 30)
    assert count_rows(here) == rows

    def grown() -> list[tuple[str, int, int]]:
        now = [node.held() for node in nodes]
        pairs = [(name, was[name], is_[name]) for was, is_ in zip(held, now, strict=True) for name in was]
        # Threads and database connections of a pool come and go by one or two.
        return [each for each in pairs if each[2] > each[1] + (3 if each[0] in ("threads", "files") else 0)]

    last: list[tuple[str, int, int]] = []

    def nothing_has_grown() -> bool:
        last[:] = grown()
        return not last

    try:
        until(nothing_has_grown, 20)
    except AssertionError:
        raise AssertionError(f"{last}") from None


def count_rows(node: Node) -> list[int]:
    tables = ("events_client", "events_claim", "events_presence")
    return [node.rows(f"SELECT count(*) FROM {table}")[0][0] for table in tables]


# ── Two pages with one id ──


def test_B03_B27_B28_a_duplicated_tab_gets_an_id_of_its_own_and_neither_puts_the_other_out(
    nodes: list[Node], tabs: contextlib.ExitStack
) -> None:
    here, there = nodes
    original = tabs.enter_context(Tab(here))
    mine = original.open()
    for target in nodes:
        copy = tabs.enter_context(original.reloaded())
        line = copy.open(target)
        assert (line.welcome["cid_accepted"], line.welcome["reason"], line.welcome["resumed"]) == (
            False,
            "in_use",
            False,
        )
        assert copy.cid != original.cid
        assert copy.open(target).welcome["resumed"] is True
    assert original.asked == 2
    before = [numbers(node)["switchboard_streams_opened_total"] for node in nodes]
    assert mine.welcome["heartbeat_seconds"] == HEARTBEAT
    beats = mine.names().count("heartbeat")
    until(lambda: mine.names().count("heartbeat") >= beats + 2, 30)
    assert [numbers(node)["switchboard_streams_opened_total"] for node in nodes] == before
    assert not mine.of("superseded", "end")
    assert original.probe(there)


def test_B03_B27_a_page_that_is_gone_or_silent_is_taken_over_told_so_and_answered_204_from_then_on(
    nodes: list[Node], tabs: contextlib.ExitStack
) -> None:
    here, there = nodes
    # A reload: the old page is gone.
    page = tabs.enter_context(Tab(here))
    page.open().cut()
    page.wait_for("inactive")
    reloaded = tabs.enter_context(page.reloaded())
    assert reloaded.open(there).welcome["resumed"] is True
    assert reloaded.cid == page.cid
    assert page.open(here).status == 204
    # A page that sleeps: it does not answer within its second.
    silent = tabs.enter_context(Tab(here, answers=False))
    asleep = silent.open()
    other = tabs.enter_context(silent.reloaded())
    taken = other.open(there)
    assert (taken.welcome["resumed"], taken.welcome["epoch"]) == (True, 2)
    assert asleep.named("superseded").json() == {"epoch": 2}
    assert asleep.ended.wait(30)
    assert silent.asked == 1
    for node in nodes:
        stopped = silent.open(node)
        assert (stopped.status, bytes(stopped.raw), stopped.answer.getheader("Cache-Control")) == (
            204,
            b"",
            "no-store",
        )
    assert silent.stopped == "204"
    assert not taken.of("superseded", "end")


# ── Whose id it is, and what is none ──


@on_sqlite
def test_B08_B09_another_user_and_another_session_with_the_same_id_do_not_touch_the_owner(
    nodes: list[Node], tabs: contextlib.ExitStack
) -> None:
    here, there = nodes
    made = connect(here)
    mine = tabs.enter_context(Tab(here))
    line = mine.open()
    assert mine.claim(subject_of(made))[0] == 200
    before = mine.picture
    # Another user: a client of their own, under the same name.
    theirs = tabs.enter_context(Tab(there, cid=mine.cid, key=there.other_api_key))
    found = theirs.open().welcome
    assert (found["connection_id"], found["cid_accepted"], found["epoch"], found["resumed"]) == (
        mine.cid,
        True,
        1,
        False,
    )
    assert theirs.say("suspend", {"epoch": 1})[0] == 204
    assert theirs.probe()
    theirs.line.cut()
    # The same user with another key: another login.
    second = tabs.enter_context(Tab(there, cid=mine.cid, key=there.second_key))
    found = second.open().welcome
    assert (found["cid_accepted"], found["reason"], found["resumed"]) == (False, "other_session", False)
    assert found["connection_id"] != mine.cid
    # And with a session, on the stream of the pages.
    browser = Browser(there)
    with browser.http:
        browser.sign_in("/signin", there.username, there.password)
    words = f"cid={mine.cid}&page={mine.page}&path=/"
    with Stream(f"{there.url}/live?{words}", headers={"Cookie": browser.cookie}) as page:
        found = page.named("welcome").json()
        assert (found["cid_accepted"], found["reason"]) == (False, "other_session")
        page.named("ready")
    after = mine.picture
    for name in ("state", "epoch", "expires_at", "watches", "path", "version"):
        assert after[name] == before[name]
    assert not line.of("superseded", "end", "probe")
    # Also while it is only waiting for its end.
    line.cut()
    mine.wait_for("inactive")
    assert (
        tabs.enter_context(Tab(here, cid=mine.cid, key=here.second_key)).open().welcome["reason"]
        == "other_session"
    )
    again = mine.open(there)
    assert (again.welcome["epoch"], again.welcome["resumed"]) == (2, True)


@on_sqlite
def test_B04_B05_B06_B10_whatever_a_client_calls_itself_its_stream_is_served(
    nodes: list[Node], tabs: contextlib.ExitStack
) -> None:
    here, _ = nodes
    for text in [*MALFORMED[:-1], "cid-" + "0" * 4000]:
        query = urllib.parse.urlencode({"cid": text, "page": "page-of-this-test"})
        with events(here, f"?{query}") as line:
            assert line.status == 200, text
            found = line.named("welcome").json()
            assert (found["cid_accepted"], found["reason"], found["epoch"]) == (False, "malformed", 1), text
            uuid.UUID(found["connection_id"].removeprefix("cid-"))
    assert "malformed" in here.log(here.name)
    tab = tabs.enter_context(Tab(here))
    tab.open()
    written = tab.cid
    tab.cid = tab.cid.upper()
    again = tab.open()
    assert (again.welcome["connection_id"], again.welcome["resumed"], tab.epoch) == (written, True, 2)
    for query in ("page=short", "page=" + "x" * 65, "page=with%20space", "path=nowhere", "path=/%00"):
        with events(here, f"?cid={written}&{query}") as line:
            assert (line.status, line.json()["code"]) == (400, "invalid_parameter"), query


@on_postgresql
def test_B11_B73_a_stream_without_an_id_keeps_nothing_and_one_without_a_page_comes_back_all_the_same(
    nodes: list[Node], tabs: contextlib.ExitStack
) -> None:
    here, there = nodes
    before = count_rows(here)
    with events(here) as line:
        line.named("ready")
        assert line.names() == ["ready"]
    assert count_rows(here) == before
    # A program that was given an id, and knows nothing of pages.
    with events(here, "?cid=mine") as line:
        cid = line.named("welcome").json()["connection_id"]
    until(lambda: not here.rows(f"SELECT cid FROM events_client WHERE cid = '{cid}' AND state = 'live'"), 30)
    with events(there, f"?cid={cid}") as line:
        found = line.named("welcome").json()
        assert (found["connection_id"], found["resumed"], found["epoch"]) == (cid, True, 2)


# ── Signs of life ──


def test_B29_a_probe_comes_back_over_the_stream_alone_whichever_process_took_it(
    nodes: list[Node], tabs: contextlib.ExitStack
) -> None:
    here, there = nodes
    network = tabs.enter_context(Cut(here.url))
    tab = tabs.enter_context(Tab(here))
    line = tab.open(url=network.url)
    for node in nodes:
        assert tab.probe(node)
    for epoch in (2, 7):
        status, body = tab.say("probe", {"epoch": epoch, "nonce": "of-this-test"})
        assert (status, body["code"]) == (409, "connection_unknown")
    # Its line is dead, and neither end knows: the request is fine, and says nothing.
    network.swallow()
    count = len(line.events)
    status, body = tab.say("probe", {"epoch": 1, "nonce": "of-a-dead-line"}, node=there)
    assert (status, body) == (202, {"nonce": "of-a-dead-line"})
    swallowed = network.swallowed
    until(lambda: network.swallowed > swallowed, 30)
    assert len(line.events) == count
    tab.open(there)
    assert tab.probe(here)
    # A stream that nobody has any more.
    tab.line.cut()
    tab.wait_for("inactive")
    assert tab.say("probe", {"epoch": tab.epoch, "nonce": "of-this-test"})[0] == 409


@on_postgresql
def test_B21_B39_a_page_in_the_background_outlives_the_grace_time_of_a_drop(
    nodes: list[Node], tabs: contextlib.ExitStack
) -> None:
    here, there = nodes
    made = connect(here)
    watcher = tabs.enter_context(Tab(there, topics="clients"))
    watching = watcher.open()
    hidden, dropped = (tabs.enter_context(Tab(here)) for _ in range(2))
    for tab in (hidden, dropped):
        tab.open()
    assert hidden.claim(subject_of(made))[0] == 200
    for _ in range(2):
        assert hidden.say("suspend", {"epoch": 1, "cursor": 1}, node=there)[0] == 204
    assert hidden.say("suspend", {"epoch": 7}, node=there)[0] == 204
    # Its stream is still open, so a probe wakes it.
    assert hidden.picture["state"] == "suspended"
    assert hidden.probe(there)
    assert hidden.picture["state"] == "live"
    hidden.say("suspend", {"epoch": 1})
    hidden.line.cut()
    dropped.line.cut()
    dropped.wait_for("expired")
    assert hidden.picture["state"] == "suspended"
    assert hidden.open(there).welcome["resumed"] is True
    assert hidden.claim(subject_of(made))[1]["version"] == 1, "it was its own all the time"
    told = [event.name for event in watching.logged() if event.json()["id"] == hidden.cid]
    assert told == ["client.opened", "client.suspended", "client.opened", "client.suspended", "client.opened"]


# ── Switching, taking over, ending ──


@on_postgresql
def test_B26_after_switching_no_event_of_the_first_comes_however_often_it_reconnects(
    nodes: list[Node], tabs: contextlib.ExitStack
) -> None:
    first, second = connect(nodes[0]), connect(nodes[0])
    tab = tabs.enter_context(Tab(nodes[0], topics=subject_of(first)))
    line = tab.open()
    login(nodes[0], first)
    line.named("flow.state")
    line.cut()
    tab.topics = subject_of(second)
    start = tab.cursor
    for number in range(6):
        for connection in (first, second):
            path = f"/auth/connections/{connection['id']}/{('login', 'cancel')[(number + (connection is first)) % 2]}"
            status, body, _ = call(nodes[0], "POST", path, {})
            assert status < 300, body
        tab.open(nodes[number % 2])
    query = f"SELECT id FROM events_event WHERE id > {start} AND topic = '{subject_of(second)}' ORDER BY id"
    written = [number for (number,) in nodes[0].rows(query)]
    assert len(written) >= 6
    assert [number for number in tab.seen if number > start] == written
    later = [event for each in tab.lines[1:] for event in each.logged()]
    assert {event.json()["connection_id"] for event in later} == {second["id"]}
    assert tab.picture["watches"] == [subject_of(second)]


@on_sqlite
def test_B38_who_loses_what_it_was_handling_is_told_and_goes_on_reading(
    nodes: list[Node], tabs: contextlib.ExitStack
) -> None:
    here, there = nodes
    made = connect(here, key=here.other_api_key)
    subject = subject_of(made)
    owner = tabs.enter_context(Tab(here, topics=subject, key=here.other_api_key))
    line = owner.open()
    assert owner.claim(subject)[0] == 200
    # The admin sees everybody's.
    admin = tabs.enter_context(Tab(there))
    admin.open()
    status, body = admin.claim(subject)
    assert (status, body["code"]) == (409, "claimed")
    status, claim = admin.claim(subject, takeover=True)
    assert (status, claim["client"]) == (200, admin.cid)
    told = line.until(lambda event: event.name == "claim.taken" and event.json()["client"] == admin.cid)
    assert (told.json()["reason"], told.json()["previous_client"]) == ("session_takeover", owner.cid)
    assert owner.claim(subject)[0] == 409
    assert owner.picture["state"] == "live"
    assert call(here, "POST", f"/auth/connections/{made['id']}/login", {}, key=here.other_api_key)[0] == 200
    line.named("flow.state")


def test_an_operator_disconnects_a_client_of_another_process_with_a_reason(
    nodes: list[Node], tabs: contextlib.ExitStack
) -> None:
    here, there = nodes
    made = connect(here)
    tab = tabs.enter_context(Tab(here))
    line = tab.open()
    assert tab.claim(subject_of(made))[0] == 200
    assert tab.say("disconnect", {"reason": "the shift is over"}, node=there)[0] == 204
    assert line.named("end").json() == {
        "reason": "disconnected",
        "reconnect": False,
        "message": "the shift is over",
    }
    assert line.ended.wait(30)
    assert tab.picture["state"] == "closed"
    assert not here.rows(
        f"SELECT id FROM events_claim WHERE subject = '{subject_of(made)}' AND client_id IS NOT NULL"
    )
    # The page that was sent away stays away; loaded again it begins anew.
    assert tab.open(there).status == 204
    tab.page = secrets.token_urlsafe(12)
    assert tab.open(there).welcome["resumed"] is False


# ── Servers that stop ──


@on_sqlite
def test_B41_after_a_stop_or_a_kill_nobody_looks_live_and_whoever_comes_back_in_time_has_everything(
    nodes: list[Node], tabs: contextlib.ExitStack
) -> None:
    here, _ = nodes
    port = free_port()
    # A third one, with the usual times: what its end leaves behind is not over before this test is.
    env = here.env | {"PORT": str(port), "CLIENT_GRACE_SECONDS": "60", "CLIENT_LEASE_SECONDS": "30"}
    third = dataclasses.replace(here, name="server3", url=f"http://127.0.0.1:{port}", env=env, processes={})
    tabs.callback(services.stop_all, third)

    def live() -> list[Any]:
        return here.rows(
            "SELECT cid, reason FROM events_client WHERE state = 'live' OR lease_expires_at IS NOT NULL"
        )

    def comes_back() -> None:
        """The server is started again, and of its clients one comes at once, the others later."""
        third.start_server()
        third.wait_until_up()
        assert live() == [], "also before the first of them comes"
        epochs = [tab.epoch for tab in crowd]
        assert crowd[0].open(third).welcome["resumed"] is True
        # Long before any lease is over.
        until(lambda: [cid for cid, _ in live()] == [crowd[0].cid], 25, f"{live()}")
        states = dict(here.rows("SELECT cid, state FROM events_client"))
        assert [states[tab.cid] for tab in crowd] == ["live", "inactive", "suspended"]
        for tab, connection, epoch in zip(crowd, made, epochs, strict=True):
            if tab is not crowd[0]:
                assert tab.open(third).welcome["resumed"] is True
            assert tab.epoch == epoch + 1
            status, claim = tab.claim(subject_of(connection))
            assert (status, claim["version"]) == (200, 1), "it was kept"

    third.start_server()
    third.wait_until_up()
    made = [connect(here) for _ in range(3)]
    crowd = [tabs.enter_context(Tab(third)) for _ in made]
    for tab, connection in zip(crowd, made, strict=True):
        tab.open()
        assert tab.claim(subject_of(connection))[0] == 200
    crowd[2].say("suspend", {"epoch": 1})
    assert len(live()) == 3
    third.stop_server()
    assert live() == []
    assert crowd[0].line.named("end").json() == {"reason": "shutdown", "reconnect": True}
    comes_back()
    crowd[2].say("suspend", {"epoch": crowd[2].epoch})
    third.stop_server(signal.SIGKILL)
    assert len(live()) == 3, "nobody could say anything"
    comes_back()
