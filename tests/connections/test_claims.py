"""Who is at what, as pages, feed and stream show it; and the page of clients."""

from __future__ import annotations

import datetime as dt
import re
from typing import Any

import pytest
from django.contrib.auth.models import Group, User
from django.test import Client as Web
from django.utils import timezone

from connections import fragments, tasks, transitions
from connections.access import of_user
from connections.models import Task
from connections.states import TaskKind
from events import clients, log
from events.models import Claim, Client, Event
from events.states import ClientState
from tests.connections.client_support import Login, holder_of, row_of
from tests.connections.test_pages import PASSWORD_FIELDS, make

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def me(owner: User) -> Login:
    return Login(owner)


@pytest.fixture
def other(colleague: User) -> Login:
    return Login(colleague)


@pytest.fixture
def waiting(owner: User) -> Any:
    """A connection whose login asks for a password; returns (connection, hold)."""
    principal = of_user(owner)
    connection = make(principal)
    transitions.start_login(connection_id=connection.id, actor=principal, now=timezone.now())
    hold = tasks.claim(worker="worker-1", kinds=["login"], now=timezone.now())
    assert hold is not None
    transitions.await_input(hold=hold, fields=PASSWORD_FIELDS, choices=[], now=timezone.now())
    return connection, hold


def who_part(html: str, object_id: str) -> str:
    found = re.search(rf'<p class="who" id="who-{object_id}".*?</p>', html, re.DOTALL)
    assert found, "there is no such part"
    return found.group()


def words(part: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", "", part)).strip()


def last_message(name: str) -> str:
    row = Event.objects.filter(name=name).latest("id")
    return fragments.live_message(log.envelope(row)) or ""


# ── The part ──


def test_a_page_shows_who_is_handling_it_the_same_to_everybody(me: Login, other: Login, waiting: Any) -> None:
    connection, _ = waiting
    subject = f"connection:{connection.id}"
    mine, theirs = me.come(), other.come()
    empty = who_part(me.web.get(f"/connections/{connection.id}").content.decode(), connection.id)
    assert empty.endswith("></p>"), "white space would make it look like something"
    me.claim(mine.cid, subject)
    other.post(theirs.cid, "presence", {"subject": subject, "doing": "typing"})
    parts = {
        who_part(login.web.get(path).content.decode(), connection.id)
        for login in (me, other)
        for path in ("/", "/connections", f"/connections/{connection.id}")
    }
    assert len(parts) == 1
    part = parts.pop()
    assert words(part) == "◉ owner is handling this✎ colleague is typing…"
    assert f'data-holder="{mine.cid}"' in part
    assert f'data-rev="{Claim.objects.get().version}"' in part


def test_the_holder_who_types_is_named_once(me: Login, waiting: Any) -> None:
    connection, _ = waiting
    subject = f"connection:{connection.id}"
    mine = me.come()
    me.claim(mine.cid, subject)
    me.post(mine.cid, "presence", {"subject": subject, "doing": "typing"})
    assert words(last_message("claim.updated")) == "◉ owner is handling this, typing…"


def test_the_stream_sends_of_a_claim_the_who_part_alone(me: Login, waiting: Any) -> None:
    connection, _ = waiting
    mine = me.come()
    me.claim(mine.cid, f"connection:{connection.id}")
    message = last_message("claim.taken")
    assert message.startswith(
        f'<hx-partial hx-target="#who-{connection.id}" hx-swap="outerMorph"><p class="who"'
    )
    assert message.count("<hx-partial") == 1
    assert "csrf" not in message
    assert "owner is handling this" in words(message)


def test_names_are_text_and_never_markup(owner: User, waiting: Any) -> None:
    connection, _ = waiting
    User.objects.filter(pk=owner.pk).update(username='<img src=x onerror="1">')
    login = Login(User.objects.get(pk=owner.pk))
    mine = login.come(path="/connections", user_agent='"><script>x</script>')
    login.claim(mine.cid, f"connection:{connection.id}")
    for html in (
        last_message("claim.taken"),
        last_message("client.opened"),
        login.web.get("/clients").content.decode(),
    ):
        assert "<img src=x" not in html
        assert "<script>x" not in html


def test_nobody_is_handling_a_login_that_has_ended(me: Login, owner: User, waiting: Any) -> None:
    connection, _ = waiting
    subject = f"connection:{connection.id}"
    me.claim(me.come().cid, subject)
    transitions.cancel(connection_id=connection.id, actor=of_user(owner), reason="", now=timezone.now())
    assert holder_of(subject) is None
    released = Event.objects.get(name="claim.released")
    assert released.data["reason"] == "finished"
    ended = Event.objects.filter(name="flow.state").latest("id")
    assert released.id < ended.id


def test_a_deleted_connection_leaves_no_claim(me: Login, owner: User, waiting: Any) -> None:
    connection, _ = waiting
    me.claim(me.come().cid, f"connection:{connection.id}")
    command = command_of(owner, connection=connection)
    me.claim(me.come(page="page-0002").cid, f"task:{command.id}")
    assert Claim.objects.count() == 2
    transitions.delete_connection(connection_id=connection.id, actor=of_user(owner), now=timezone.now())
    assert not Claim.objects.exists()


def command_of(owner: User, **more: Any) -> Task:
    now = timezone.now()
    return Task.objects.create(
        owner=owner,
        kind=TaskKind.COMMAND,
        title="refactor",
        run_after=now,
        created_at=now,
        updated_at=now,
        **more,
    )


def test_a_task_that_takes_lines_shows_who_is_at_it_until_it_ends(me: Login, owner: User) -> None:
    command = command_of(owner)
    mine = me.come()
    subject = f"task:{command.id}"
    assert me.claim(mine.cid, subject).status_code == 200
    page = me.web.get(f"/tasks/{command.id}").content.decode()
    assert words(who_part(page, command.id)) == "◉ owner is handling this"
    assert f'hx-target="#who-{command.id}"' in last_message("claim.taken")
    # The sentence names who it was, once.
    assert "owner is handling it" in page
    assert "by owner" not in page
    hold = tasks.claim(worker="worker-1", kinds=["command"], now=timezone.now())
    assert hold is not None
    Task.objects.filter(pk=command.id).update(
        attempts=99, lease_expires_at=timezone.now() - dt.timedelta(seconds=1)
    )
    assert transitions.rescue(task_id=command.id, now=timezone.now())
    assert holder_of(subject) is None
    assert "who-" not in me.web.get(f"/tasks/{command.id}").content.decode()


# ── The log in words ──


def test_the_timeline_says_who_handled_it_and_not_who_looked(me: Login, other: Login, waiting: Any) -> None:
    connection, _ = waiting
    subject = f"connection:{connection.id}"
    mine, theirs = me.come(), other.come()
    other.post(theirs.cid, "presence", {"subject": subject, "doing": "looking"})
    me.claim(mine.cid, subject)
    other.claim(theirs.cid, subject, takeover=True)
    other.let_go(theirs.cid, subject)
    page = me.web.get(f"/connections/{connection.id}").content.decode()
    moments = re.findall(r'<span class="moment-text">(.*?)</span>', page)
    assert moments[-4:-1] == [
        "owner is handling it",
        "colleague took it over from owner",
        "colleague let it go",
    ]
    assert not any("looks" in moment for moment in moments)


def test_the_feed_shows_comings_and_goings_only_to_who_asks_for_them(me: Login) -> None:
    mine = me.come(path="/tasks")
    me.post(mine.cid, "probe", {"epoch": mine.epoch, "nonce": "nonce-1"})
    clients.close(pk=mine.pk, reason="a new version", actor="boss")
    assert Event.objects.filter(name="signal.probe").exists()
    for query in (
        "",
        "?object=signal",
        "?type=signal.probe",
        "?format=json",
        "?type=client.opened",
        f"?object={mine.cid}",
    ):
        shown = me.web.get(f"/events{query}").content.decode()
        assert "<code>signal." not in shown, query
        assert '"signal.' not in shown, query
    assert "connected (/tasks)" not in me.web.get("/events").content.decode()
    assert "connected (/tasks)" in me.web.get("/events?type=client.opened").content.decode()
    assert "connected (/tasks)" in me.web.get(f"/events?object={mine.cid}").content.decode()
    # What somebody did to somebody is always there.
    assert "disconnected by boss: a new version" in me.web.get("/events").content.decode()


# ── The page of clients ──


def rows(web: Web, query: str = "") -> list[str]:
    page = web.get(f"/clients{query}")
    assert page.status_code == 200
    return [words(row) for row in re.findall(r"<tr id=.*?</tr>", page.content.decode(), re.DOTALL)]


def test_the_page_of_clients_says_who_is_where_with_what(me: Login, other: Login) -> None:
    me.come(
        path="/connections/ma_1", watches=("connections", "tasks"),
        user_agent="Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0",
    )  # fmt: skip
    away = other.come(user_agent="python-httpx/0.28.1", watches=("connection:ma_1", "connection:ma_2"))
    clients.disconnect([(away.pk, away.epoch, "the line broke")])
    gone, here = rows(me.web) if "Gone" in rows(me.web)[0] else rows(me.web)[::-1]
    for word in (
        "●Live",
        "owner",
        "/connections/ma_1",
        "Firefox, Linux",
        "now",
        "all connections and tasks",
        "Disconnect…",
    ):
        assert word in here, word
    for word in (
        "○Gone",
        "the line broke",
        "colleague",
        "a program",
        "python-httpx 0.28.1",
        "2 connections",
    ):
        assert word in gone, word


def test_a_page_in_the_background_is_called_so_once(me: Login) -> None:
    mine = me.come()
    assert me.post(mine.cid, "suspend", {"epoch": mine.epoch}).status_code == 204
    assert rows(me.web)[0].lower().count("in the background") == 1


def test_the_page_of_clients_filters_and_says_when_there_is_nothing(me: Login, other: Login) -> None:
    assert "Nobody is connected" in me.web.get("/clients").content.decode()
    over = me.come()
    other.come()
    clients.close(pk=over.pk, reason="enough", actor="test")
    # What is over is there for who asks.
    assert len(rows(me.web)) == 1
    assert "–Disconnected" in rows(me.web, "?state=closed")[0]
    assert "Disconnect…" not in rows(me.web, "?state=closed")[0]
    assert rows(me.web, "?user=owner") == []
    assert "Nothing matches" in me.web.get("/clients?state=suspended").content.decode()
    assert len(rows(me.web, "?state=nonsense")) == 1


def test_a_client_whose_server_died_is_not_called_live(me: Login) -> None:
    mine = me.come()
    Client.objects.filter(pk=mine.pk).update(lease_expires_at=timezone.now() - dt.timedelta(seconds=1))
    assert "Lost contact" in rows(me.web)[0]


def test_the_lag_is_what_a_stream_had_not_been_handed_when_it_was_looked_at(me: Login, owner: User) -> None:
    mine = me.come()
    make(of_user(owner), "one.example")
    make(of_user(owner), "two.example")
    now = timezone.now()
    at = {"sent_cursor": log.newest() - 2, "lease_expires_at": now + dt.timedelta(seconds=60)}
    # They happened after the last look: no lag is known.
    Client.objects.filter(pk=mine.pk).update(**at, last_seen_at=now)
    assert "lag" not in rows(me.web)[0]
    Client.objects.filter(pk=mine.pk).update(**at, last_seen_at=now + dt.timedelta(seconds=10))
    assert "⚠ lag 2" in rows(me.web)[0]


def test_only_who_may_operate_disconnects_others_and_gives_a_reason(
    me: Login, other: Login, owner: User, stranger: User
) -> None:
    mine = me.come()
    path = f"/clients/{mine.pk}/disconnect"
    assert Login(stranger).web.get(path).status_code == 404
    looking = User.objects.create_user("looking")
    readers = Group.objects.create(name="readers")
    for user in (owner, looking):
        user.groups.add(readers)
    assert Login(looking).web.post(path, {"reason": "x"}).status_code == 403
    page = other.web.get(path)
    assert "Disconnect this client?" in page.content.decode()
    done = other.web.post(path, {"reason": "a new version"})
    assert (done.status_code, done["Location"]) == (302, "/clients")
    assert (row_of(mine).state, row_of(mine).reason) == (ClientState.CLOSED, "a new version")
    assert "was gone already" in other.web.post(path, {"reason": "again"}, follow=True).content.decode()


def test_the_row_of_a_client_comes_with_the_stream_and_is_of_the_right_person(
    me: Login, other: Login
) -> None:
    mine = me.come()
    theirs = other.come(mine.cid)
    message = last_message("client.opened")
    assert f'hx-target="#client-{theirs.pk}"' in message
    assert "colleague" in message
    assert f'hx-target="#client-{mine.pk}"' not in message


@pytest.mark.parametrize(
    ("agent", "shown"),
    [
        ("Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/140.0.0.0 Safari/537.36", "Chrome, Linux"),
        ("Mozilla/5.0 (Windows NT 10.0; Win64; x64) AppleWebKit/537.36 Chrome/140.0 Safari/537.36 Edg/140.0", "Edge, Windows"),
        ("Mozilla/5.0 (iPhone; CPU iPhone OS 18_0 like Mac OS X) AppleWebKit/605 Version/18.0 Mobile Safari/604.1", "Safari, iOS"),
        ("Mozilla/5.0 (Linux; Android 15; Pixel 9) AppleWebKit/537.36 Chrome/140.0 Mobile Safari/537.36", "Chrome, Android"),
        ("Mozilla/5.0 (Macintosh; Intel Mac OS X 10.15; rv:140.0) Gecko/20100101 Firefox/140.0", "Firefox, macOS"),
        ("curl/8.5.0", "curl 8.5.0"),
        ("", "unknown"),
        ("x" * 300, "x" * 60),
    ],
)  # fmt: skip
def test_a_user_agent_becomes_two_words(agent: str, shown: str) -> None:
    assert fragments.browser_of(agent) == shown


def test_only_pages_of_this_site_become_links(me: Login) -> None:
    for path, linked in (("/tasks", True), ("//evil.example/x", False), ("/a?b=c", False), ("", False)):
        row = Client(path=path, cid="cid-1", who="x", state=ClientState.EXPIRED)
        assert bool(fragments.tab(row, timezone.now()).link) is linked, path
