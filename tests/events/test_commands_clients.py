"""``manage.py clients``, and clients and claims in Django's admin."""

from __future__ import annotations

import datetime as dt
import io
import json
import uuid
from typing import Any

import pytest
from django.contrib.auth.models import Permission, User
from django.core.management import call_command
from django.core.management.base import CommandError
from django.test import Client as Web

from events import admin as events_admin
from events import clients
from events.clients import Arrival, Caller, Welcome
from events.models import Claim, Client, Event
from events.states import ClientState

pytestmark = pytest.mark.django_db


def come(user: User, *, cid: str | None = None, **more: Any) -> Welcome:
    caller = Caller(owner_id=user.pk, binding=f"session:{user.pk}", who=user.username)
    arrival = Arrival(
        caller=caller, cid=cid or f"cid-{uuid.uuid4()}", page="page-0001", process="here/1/1", **more
    )
    found = clients.connect([arrival])[0]
    assert isinstance(found, Welcome)
    return found


def run(*words: str) -> str:
    out = io.StringIO()
    call_command("clients", *words, stdout=out)
    return out.getvalue()


@pytest.fixture
def people(owner: User, stranger: User) -> tuple[User, User]:
    return owner, stranger


# ── The command ──


def test_it_lists_who_is_there_or_expected_back(people: tuple[User, User]) -> None:
    assert run() == "No client.\n"
    one, two = people
    here = come(one, path="/connections/ma_1")
    away = come(two)
    clients.disconnect([(away.pk, away.epoch, "the line broke")])
    over = come(two)
    clients.close(pk=over.pk, reason="enough", actor="test")
    lines = run().splitlines()
    assert lines[0].split() == ["WHO", "STATE", "PAGE", "CONNECTED", "SEEN", "LAG", "ID"]
    assert len(lines) == 3
    assert any(
        line.split()[:3] == ["owner", "live", "/connections/ma_1"] and line.endswith(here.cid)
        for line in lines
    )
    assert any(line.split()[:3] == ["stranger", "gone", "-"] for line in lines)
    assert over.cid in run("--all")
    assert over.cid in run("--state", "closed")
    assert here.cid not in run("--state", "closed")
    assert here.cid not in run("--user", "stranger")
    assert "connected" not in run("--user", "nobody")


def test_a_lease_that_ran_out_is_called_so(people: tuple[User, User]) -> None:
    here = come(people[0])
    Client.objects.filter(pk=here.pk).update(
        lease_expires_at=clients.database_now() - dt.timedelta(seconds=1)
    )
    assert "lost contact" in run()
    (shown,) = json.loads(run("--json"))
    assert (shown["state"], shown["seems_live"], shown["owner"]) == ("live", False, "owner")


def test_the_lag_is_what_its_stream_was_not_handed(people: tuple[User, User]) -> None:
    here = come(people[0])
    newest = Event.objects.latest("id").pk
    assert run().splitlines()[1].split()[-2] == "0"
    seen = clients.database_now() + dt.timedelta(seconds=5)
    Client.objects.filter(pk=here.pk).update(sent_cursor=newest - 1, last_seen_at=seen)
    assert run().splitlines()[1].split()[-2] == "1"
    (shown,) = json.loads(run("--json"))
    assert (shown["lag"], shown["sent_cursor"]) == (1, newest - 1)
    # Without a stream there is nothing that could lag.
    clients.disconnect([(here.pk, here.epoch, "gone")])
    assert run().splitlines()[1].split()[-2] == "0"


def test_json_is_the_picture_of_the_api(people: tuple[User, User]) -> None:
    here = come(people[0], path="/")
    (shown,) = json.loads(run("--json"))
    assert {name: shown[name] for name in clients.picture(Client.objects.get(pk=here.pk))} == clients.picture(
        Client.objects.get(pk=here.pk)
    )
    assert "binding" not in shown
    assert "page" not in shown


def test_it_disconnects_with_a_reason_and_says_when_there_was_nothing_to_do(
    people: tuple[User, User],
) -> None:
    here = come(people[0])
    assert "was disconnected" in run("--disconnect", here.cid.upper(), "--reason", "a new version")
    row = Client.objects.get(pk=here.pk)
    assert (row.state, row.reason) == (ClientState.CLOSED, "a new version")
    assert Event.objects.get(name="client.closed").actor == "command clients"
    assert "gone already" in run("--disconnect", here.cid)
    assert json.loads(run("--disconnect", here.cid, "--json"))["disconnected"] is False


def test_it_refuses_what_it_cannot_find_or_tell_apart(people: tuple[User, User]) -> None:
    one, two = people
    with pytest.raises(CommandError, match="cid- followed by a UUID"):
        run("--disconnect", "tab-1")
    with pytest.raises(CommandError, match="no client"):
        run("--disconnect", f"cid-{uuid.uuid4()}")
    here = come(one)
    there = come(two, cid=here.cid)
    with pytest.raises(CommandError, match=r"name one with --user \(owner, stranger"):
        run("--disconnect", here.cid)
    run("--disconnect", here.cid, "--user", "stranger")
    assert Client.objects.get(pk=here.pk).state == ClientState.LIVE
    assert Client.objects.get(pk=there.pk).state == ClientState.CLOSED


@pytest.mark.parametrize("text", ["caf\udce9", "a\0b"])
def test_a_name_or_reason_that_no_database_takes_is_refused_in_words(
    people: tuple[User, User], text: str
) -> None:
    here = come(people[0])
    with pytest.raises(CommandError, match="--user is no text in UTF-8"):
        run("--user", text)
    with pytest.raises(CommandError, match="--reason is no text in UTF-8"):
        run("--disconnect", here.cid, "--reason", text)
    assert Client.objects.get(pk=here.pk).state == ClientState.LIVE


def test_what_a_program_calls_itself_does_not_reach_the_terminal(people: tuple[User, User]) -> None:
    here = come(people[0])
    Client.objects.filter(pk=here.pk).update(who="evil\x1b[2J")
    assert "\x1b" not in run()
    assert "\x1b" not in run("--disconnect", here.cid)


# ── The administration ──

LIST = "/admin/events/client/"


@pytest.fixture
def admin(db: Any) -> Web:
    web = Web()
    web.force_login(User.objects.create_superuser("admin"))
    return web


def test_the_administration_lists_clients_and_claims_and_changes_neither(admin: Web, owner: User) -> None:
    here = come(owner, path="/tasks")
    caller = Caller(owner_id=owner.pk, binding=f"session:{owner.pk}", who="owner")
    clients.take(caller=caller, cid=here.cid, subject="connection:ma_1", audience=owner.pk)
    page = admin.get(LIST).content.decode()
    assert here.cid in page
    assert "/tasks" in page
    assert here.cid in admin.get(f"{LIST}?q=cid-").content.decode()
    assert here.cid not in admin.get(f"{LIST}?state__exact=closed").content.decode()
    one = admin.get(f"{LIST}{here.pk}/change/").content.decode()
    assert "session:" not in one
    assert "page-0001" not in one
    claims = admin.get("/admin/events/claim/").content.decode()
    assert "connection:ma_1" in claims
    assert "owner" in claims
    for path in (f"{LIST}{here.pk}/change/", "/admin/events/claim/add/", f"{LIST}{here.pk}/delete/"):
        assert admin.post(path, {"state": "closed"}).status_code == 403
    assert Client.objects.get(pk=here.pk).state == ClientState.LIVE
    assert Claim.objects.get().client_id == here.pk


def test_the_administration_asks_for_a_reason_before_it_disconnects(admin: Web, owner: User) -> None:
    here = come(owner)
    chosen = {"action": "disconnect", "_selected_action": [here.pk]}
    asked = admin.post(LIST, chosen)
    assert "Reason" in asked.content.decode()
    assert Client.objects.get(pk=here.pk).state == ClientState.LIVE
    # Nothing is no reason.
    admin.post(LIST, {**chosen, "apply": "1", "reason": "  "})
    assert Client.objects.get(pk=here.pk).state == ClientState.LIVE
    done = admin.post(LIST, {**chosen, "apply": "1", "reason": "a new version"}, follow=True)
    assert "1 disconnected" in done.content.decode()
    row = Client.objects.get(pk=here.pk)
    assert (row.state, row.reason) == (ClientState.CLOSED, "a new version")
    assert Event.objects.get(name="client.closed").actor == "admin"


def test_the_administration_says_when_it_disconnects_some_of_those_selected_only(
    admin: Web, owner: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events_admin, "DISCONNECT_LIMIT", 2)
    here = [come(owner) for _ in range(3)]
    chosen = {"action": "disconnect", "_selected_action": [each.pk for each in here]}
    asked = admin.post(LIST, chosen).content.decode()
    assert "3 are selected. This is about the first 2 of them alone" in asked
    assert asked.count('name="_selected_action"') == 2
    done = admin.post(LIST, {**chosen, "apply": "1", "reason": "x"}, follow=True).content.decode()
    assert "3 are selected" in done
    assert "2 disconnected" in done
    assert Client.objects.filter(state=ClientState.LIVE).count() == 1
    assert (
        "are selected" not in admin.post(LIST, {**chosen, "_selected_action": [here[0].pk]}).content.decode()
    )


def test_staff_see_their_own_clients_and_disconnect_no_others(owner: User, stranger: User) -> None:
    owner.is_staff = True
    owner.save()
    owner.user_permissions.add(Permission.objects.get(codename="view_client"))
    web = Web()
    web.force_login(owner)
    mine, theirs = come(owner), come(stranger)
    page = web.get(LIST).content.decode()
    assert mine.cid in page
    assert theirs.cid not in page
    owner.user_permissions.add(Permission.objects.get(codename="follow_all_events"))
    assert theirs.cid in web.get(LIST).content.decode()
    both = {"action": "disconnect", "_selected_action": [mine.pk, theirs.pk], "apply": "1", "reason": "x"}
    assert "not yours" in web.post(LIST, both, follow=True).content.decode()
    assert Client.objects.get(pk=theirs.pk).state == ClientState.LIVE
    assert Client.objects.get(pk=mine.pk).state == ClientState.CLOSED
