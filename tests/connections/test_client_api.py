"""The API of clients: whose a client is, signs of life, disconnecting, and claims with their permissions."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from typing import Any
from urllib.parse import urlencode

import pytest
from django.contrib.auth.models import Group, Permission, User
from django.utils import timezone
from rest_framework.test import APIClient

from connections import client_api, tasks, transitions
from connections.access import of_user
from connections.models import Task
from connections.states import TaskKind
from events import clients
from events.models import Claim, Client, Event
from events.states import ClientState
from tests.connections.api_support import error_of
from tests.connections.client_support import Login, holder_of, new_cid, row_of
from tests.connections.task_support import new_task

pytestmark = pytest.mark.django_db(transaction=True)

MALFORMED = ["cid-", "cid-" + "-" * 36, "conn-1", "cid-1", "cid-00000000-0000-4000-8000-00000000000g"]


@pytest.fixture
def me(owner: User) -> Login:
    return Login(owner)


@pytest.fixture
def other(colleague: User) -> Login:
    return Login(colleague)


@pytest.fixture
def connection(owner: User) -> Any:
    return transitions.create_connection(
        owner_id=owner.pk,
        domain="acme.example",
        profile_name="work",
        config={},
        actor=of_user(owner),
        now=timezone.now(),
    )


@pytest.fixture
def subject(connection: Any) -> str:
    return f"connection:{connection.id}"


def told(name: str) -> list[dict[str, Any]]:
    return list(Event.objects.filter(name=name).order_by("id").values_list("data", flat=True))


# ── Whose it is ──


def test_B07_the_id_of_a_header_and_of_an_address_pass_the_same_validation(me: Login, subject: str) -> None:
    mine = me.come()
    body = {"epoch": mine.epoch, "nonce": "nonce-1"}
    for wrong in MALFORMED:
        error_of(me.post(mine.cid, "probe", body, HTTP_X_CONNECTION_ID=wrong), 400, "invalid_connection_id")
        error_of(me.post(wrong, "probe", body), 400, "invalid_connection_id")
        error_of(me.claim(wrong, subject), 400, "invalid_connection_id")
    error_of(me.post(mine.cid, "probe", body, HTTP_X_CONNECTION_ID=new_cid()), 409, "connection_unknown")
    # Another spelling is the same id, in both places.
    assert (
        me.post(
            mine.cid.upper().replace("CID", "Cid"), "probe", body, HTTP_X_CONNECTION_ID=mine.cid.upper()
        ).status_code
        == 202
    )


def test_B08_another_user_and_another_session_can_do_nothing_with_a_client(
    me: Login, owner: User, other: Login, subject: str
) -> None:
    mine = me.come(cursor=7)
    before = Client.objects.filter(pk=mine.pk).values().get()
    count = Event.objects.count()
    for foreign in (other, Login(owner)):
        error_of(
            foreign.post(mine.cid, "probe", {"epoch": mine.epoch, "nonce": "nonce-1", "cursor": 99}),
            409,
            "connection_unknown",
        )
        error_of(foreign.post(mine.cid, "suspend", {"epoch": mine.epoch}), 404, "not_found")
        error_of(foreign.claim(mine.cid, subject), 409, "connection_unknown")
        error_of(foreign.let_go(mine.cid, subject), 409, "connection_unknown")
        error_of(
            foreign.post(mine.cid, "presence", {"subject": subject, "doing": "looking"}),
            409,
            "connection_unknown",
        )
        # An answer is never refused, and a foreign one is nobody's.
        assert foreign.post(mine.cid, "answer", {"nonce": "nonce-1"}).status_code == 204
    assert Client.objects.filter(pk=mine.pk).values().get() == before
    assert Event.objects.count() == count


def test_B09_a_client_that_is_away_is_still_its_logins_own(me: Login, owner: User, settings: Any) -> None:
    mine = me.come()
    clients.disconnect([(mine.pk, mine.epoch, "gone")])
    error_of(Login(owner).post(mine.cid, "suspend", {"epoch": mine.epoch}), 404, "not_found")
    assert row_of(mine).state == ClientState.INACTIVE
    # Also when it is over, until its row goes.
    settings.CLIENT_GRACE_SECONDS = 0
    Client.objects.filter(pk=mine.pk).update(expires_at=timezone.now() - dt.timedelta(seconds=1))
    clients.sweep()
    assert row_of(mine).state == ClientState.EXPIRED
    stranger = Login(owner).come(mine.cid)
    assert (stranger.accepted, stranger.reason) == (False, "other_session")
    assert stranger.cid != mine.cid


def test_a_key_has_clients_of_its_own(owner: User, client_of: Callable[[User], APIClient], me: Login) -> None:
    program = client_of(owner)
    mine = me.come()
    error_of(
        program.post(f"/api/clients/{mine.cid}/suspend", {"epoch": mine.epoch}, format="json"),
        404,
        "not_found",
    )
    # But its owner's are shown.
    assert [row["id"] for row in program.get("/api/clients").json()] == [mine.cid]


def test_nobody_and_a_session_without_its_token_are_refused(owner: User, me: Login) -> None:
    mine = me.come()
    assert APIClient().get("/api/clients").status_code == 401
    strict = Login(owner, csrf=True)
    error_of(strict.post(strict.come().cid, "answer", {"nonce": "nonce-1"}), 403, "csrf_failed")
    assert row_of(mine).state == ClientState.LIVE


# ── Signs of life ──


def test_B29_a_probe_is_accepted_for_the_present_stream_alone(me: Login) -> None:
    mine = me.come()
    answer = me.post(mine.cid, "probe", {"epoch": mine.epoch, "nonce": "nonce-1", "cursor": 5})
    assert answer.status_code == 202
    assert answer.json() == {"nonce": "nonce-1"}
    assert row_of(mine).cursor == 5
    asked = Event.objects.get(name="signal.probe")
    assert asked.data == {"epoch": mine.epoch, "nonce": "nonce-1"}
    error_of(
        me.post(mine.cid, "probe", {"epoch": mine.epoch + 1, "nonce": "nonce-1"}), 409, "connection_unknown"
    )
    clients.disconnect([(mine.pk, mine.epoch, "gone")])
    error_of(me.post(mine.cid, "probe", {"epoch": mine.epoch, "nonce": "nonce-1"}), 409, "connection_unknown")


@pytest.mark.parametrize(
    "body",
    [{}, {"epoch": 1}, {"epoch": "1", "nonce": "n"}, {"epoch": 0, "nonce": "n"}, {"epoch": 2**63, "nonce": "n"},
     {"epoch": 1, "nonce": ""}, {"epoch": 1, "nonce": "n" * 101}, {"epoch": 1, "nonce": "n", "cursor": -1}, {"epoch": 1, "nonce": "n", "more": 1}],
)  # fmt: skip
def test_a_probe_that_is_none_is_refused(me: Login, body: Any) -> None:
    error_of(me.post(me.come().cid, "probe", body), 400, "invalid_request")


def test_B39_going_to_the_background_twice_is_once_and_coming_back_keeps_everything(
    me: Login, subject: str
) -> None:
    mine = me.come()
    assert me.claim(mine.cid, subject).status_code == 200
    for _ in range(2):
        assert me.post(mine.cid, "suspend", {"epoch": mine.epoch, "cursor": 3}).status_code == 204
    row = row_of(mine)
    assert row.state == ClientState.SUSPENDED
    assert row.expires_at is not None
    assert 115 < (row.expires_at - timezone.now()).total_seconds() <= 120
    assert len(told("client.suspended")) == 1
    # A stream that was replaced says nothing about the present one.
    again = me.come(mine.cid)
    assert again.resumed
    assert me.post(mine.cid, "suspend", {"epoch": mine.epoch}).status_code == 204
    assert row_of(mine).state == ClientState.LIVE
    assert holder_of(subject) == "owner"


def test_B40_a_beacon_is_a_form_with_the_token_of_its_page(owner: User, other: Login) -> None:
    page = Login(owner, csrf=True)
    mine = page.come()
    page.web.get("/connections/new")
    token = page.web.cookies["csrftoken"].value
    kind = "application/x-www-form-urlencoded;charset=UTF-8"

    def beacon(**fields: Any) -> Any:
        return page.web.post(f"/api/clients/{mine.cid}/suspend", urlencode(fields), content_type=kind)

    error_of(beacon(epoch=mine.epoch), 403, "csrf_failed")
    assert row_of(mine).state == ClientState.LIVE
    error_of(beacon(csrfmiddlewaretoken=token, epoch="x"), 400, "invalid_request")
    assert beacon(csrfmiddlewaretoken=token, epoch=mine.epoch, cursor="").status_code == 204
    assert row_of(mine).state == ClientState.SUSPENDED
    assert row_of(mine).lease_expires_at is not None, "it may still be there"
    assert beacon(csrfmiddlewaretoken=token, epoch=mine.epoch, leaving="true").status_code == 204
    assert row_of(mine).lease_expires_at is None, "the next page of the tab need not ask"
    # Whose client it is, is looked at for beacons as for everything else.
    theirs = other.come()
    answer = page.web.post(
        f"/api/clients/{theirs.cid}/suspend",
        urlencode({"csrfmiddlewaretoken": token, "epoch": theirs.epoch}),
        content_type=kind,
    )
    error_of(answer, 404, "not_found")
    assert row_of(theirs).state == ClientState.LIVE


# ── Looking and disconnecting ──


def test_everybody_sees_the_clients_of_their_team(me: Login, other: Login, stranger: User) -> None:
    mine, theirs = me.come(path="/"), other.come(path="/connections")
    alone = Login(stranger)
    own = alone.come()
    assert {row["id"] for row in me.web.get("/api/clients").json()} == {mine.cid, theirs.cid}
    assert [row["id"] for row in alone.web.get("/api/clients").json()] == [own.cid]
    shown = other.web.get(f"/api/clients/{mine.cid}").json()
    assert (shown["user"], shown["state"], shown["path"], shown["epoch"]) == ("owner", "live", "/", 1)
    assert "binding" not in shown
    error_of(alone.web.get(f"/api/clients/{mine.cid}"), 404, "not_found")
    clients.disconnect([(theirs.pk, theirs.epoch, "gone")])
    assert [row["id"] for row in me.web.get("/api/clients?state=inactive").json()] == [theirs.cid]
    error_of(me.web.get("/api/clients?state=asleep"), 400, "invalid_request")
    page = me.web.get("/api/clients?limit=1")
    assert (len(page.json()), page["X-Has-More"], page["X-Next-Offset"]) == (1, "true", "1")


def test_of_two_clients_with_one_id_everybody_sees_their_own(me: Login, other: Login) -> None:
    cid = new_cid()
    mine, theirs = me.come(cid), other.come(cid)
    assert mine.pk != theirs.pk
    assert me.web.get(f"/api/clients/{cid}").json()["user"] == "owner"
    assert other.web.get(f"/api/clients/{cid}").json()["user"] == "colleague"


def test_who_may_operate_disconnects_others_and_everybody_disconnects_themselves(
    me: Login, other: Login, owner: User, stranger: User, subject: str
) -> None:
    mine = me.come()
    me.claim(mine.cid, subject)
    error_of(Login(stranger).post(mine.cid, "disconnect", {"reason": "no"}), 404, "not_found")
    looking = User.objects.create_user("looking")
    readers = Group.objects.create(name="readers")
    owner.groups.add(readers)
    looking.groups.add(readers)
    error_of(Login(looking).post(mine.cid, "disconnect", {"reason": "no"}), 403, "forbidden")
    assert other.post(mine.cid, "disconnect", {"reason": "a new version"}).status_code == 204
    row = row_of(mine)
    assert (row.state, row.reason) == (ClientState.CLOSED, "a new version")
    assert holder_of(subject) is None
    assert Event.objects.get(name="client.closed").actor == "colleague"
    # Twice is once.
    assert other.post(mine.cid, "disconnect", {}).status_code == 204
    assert len(told("client.closed")) == 1
    login = Login(looking)
    assert login.post(login.come().cid, "disconnect", {}).status_code == 204


# ── Claims ──


def test_a_claim_says_who_is_handling_it_and_only_a_takeover_takes_it_away(
    me: Login, other: Login, subject: str
) -> None:
    mine, theirs = me.come(), other.come()
    taken = me.claim(mine.cid, subject)
    assert taken.status_code == 200
    assert {name: taken.json()[name] for name in ("subject", "client", "user", "people")} == {
        "subject": subject, "client": mine.cid, "user": "owner", "people": [],
    }  # fmt: skip
    assert me.claim(mine.cid, subject).json() == taken.json()
    assert len(told("claim.taken")) == 1
    refused = other.claim(theirs.cid, subject)
    assert refused.status_code == 409
    assert refused["x-should-retry"] == "false"
    assert refused.json()["code"] == "claimed"
    assert refused.json()["claim"] == taken.json()
    assert holder_of(subject) == "owner"


def test_B44_B45_a_claim_that_is_sent_again_does_not_take_back_what_was_taken_over(
    me: Login, other: Login, subject: str
) -> None:
    """Its answer got lost, and meanwhile somebody else took it over."""
    mine, theirs = me.come(), other.come()
    headers = {"HTTP_IDEMPOTENCY_KEY": "k-1"}
    body = {"subject": subject, "takeover": True}
    first = me.post(mine.cid, "claims", body, **headers)
    assert other.claim(theirs.cid, subject, takeover=True).status_code == 200
    again = me.post(mine.cid, "claims", body, **headers)
    assert (again.status_code, again.json(), again["Idempotent-Replayed"]) == (200, first.json(), "true")
    assert holder_of(subject) == "colleague"
    error_of(me.post(mine.cid, "claims", {"subject": subject}, **headers), 409, "idempotency_conflict")
    headers = {"HTTP_IDEMPOTENCY_KEY": "k-2"}
    for _ in range(2):
        assert me.post(mine.cid, "disconnect", {"reason": "one"}, **headers).status_code == 204
    error_of(me.post(mine.cid, "disconnect", {"reason": "two"}, **headers), 409, "idempotency_conflict")
    assert row_of(mine).reason == "one"


def test_B49_that_a_client_is_unknown_is_not_kept_for_the_name_of_a_request(me: Login, subject: str) -> None:
    cid, headers = new_cid(), {"HTTP_IDEMPOTENCY_KEY": "k-1"}
    error_of(me.post(cid, "claims", {"subject": subject}, **headers), 409, "connection_unknown")
    me.come(cid)
    assert me.post(cid, "claims", {"subject": subject}, **headers).status_code == 200
    assert holder_of(subject) == "owner"


def test_a_task_that_has_ended_is_handled_by_nobody_any_more(me: Login, owner: User) -> None:
    mine, task = me.come(), new_task(owner)
    assert me.claim(mine.cid, f"task:{task.id}").status_code == 200
    transitions.kill_task(task_id=task.id, actor=of_user(owner), reason="", now=timezone.now())
    assert holder_of(f"task:{task.id}") is None
    error_of(me.claim(mine.cid, f"task:{task.id}"), 409, "task_over")
    assert holder_of(f"task:{task.id}") is None
    tasks.delete(task_id=task.id, actor="owner", now=timezone.now())
    error_of(me.claim(mine.cid, f"task:{task.id}"), 404, "not_found")


@pytest.fixture
def deleted_after_the_look(
    owner: User, connection: Any, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], None]:
    """From the call on, the connection is deleted as soon as somebody has looked whose it is."""
    look = client_api.owner_of_subject

    def look_and_delete(*words: Any, **more: Any) -> int:
        found = look(*words, **more)
        transitions.delete_connection(connection_id=connection.id, actor=of_user(owner), now=timezone.now())
        return found

    return lambda: monkeypatch.setattr(client_api, "owner_of_subject", look_and_delete)


def test_what_is_deleted_between_the_look_and_the_claim_leaves_no_claim(
    me: Login, subject: str, deleted_after_the_look: Callable[[], None]
) -> None:
    mine = me.come()
    deleted_after_the_look()
    error_of(me.claim(mine.cid, subject), 404, "not_found")
    assert not Claim.objects.exists()


def test_who_looks_at_what_is_being_deleted_leaves_nothing_behind(
    me: Login, subject: str, deleted_after_the_look: Callable[[], None]
) -> None:
    mine = me.come()
    assert me.post(mine.cid, "presence", {"subject": subject, "doing": ""}).status_code == 204
    assert not Claim.objects.exists(), "who was not there leaves nothing either"
    deleted_after_the_look()
    error_of(me.post(mine.cid, "presence", {"subject": subject, "doing": "looking"}), 404, "not_found")
    assert not Claim.objects.exists()


def test_what_is_deleted_with_its_owner_leaves_no_claim(
    me: Login, other: Login, owner: User, subject: str
) -> None:
    mine, theirs = me.come(), other.come()
    other.claim(theirs.cid, subject)
    me.post(mine.cid, "presence", {"subject": subject, "doing": "looking"})
    assert Claim.objects.count() == 1
    owner.delete()
    assert not Claim.objects.exists()
    assert row_of(theirs).state == ClientState.LIVE


def test_B38_a_takeover_tells_the_one_who_had_it_and_leaves_them_connected(
    me: Login, other: Login, subject: str
) -> None:
    mine, theirs = me.come(), other.come()
    me.claim(mine.cid, subject)
    taken = other.claim(theirs.cid, subject, takeover=True)
    assert (taken.status_code, taken.json()["user"]) == (200, "colleague")
    data = told("claim.taken")[-1]
    assert (data["reason"], data["previous_client"], data["user"]) == (
        "session_takeover",
        mine.cid,
        "colleague",
    )
    assert Event.objects.filter(name="claim.taken").latest("id").audience == me.user.pk
    assert row_of(mine).state == ClientState.LIVE
    # What the one before lets go of is not theirs any more.
    assert me.let_go(mine.cid, subject).status_code == 204
    assert holder_of(subject) == "colleague"
    assert other.let_go(theirs.cid, subject).status_code == 204
    assert holder_of(subject) is None
    assert other.let_go(theirs.cid, subject).status_code == 204
    assert len(told("claim.released")) == 1


def test_another_tab_of_the_same_person_has_it_for_the_asking(me: Login, subject: str) -> None:
    one, two = me.come(), me.come(page="page-0002")
    me.claim(one.cid, subject)
    assert me.claim(two.cid, subject).json()["client"] == two.cid


def test_B22_what_was_let_go_before_the_end_is_not_released_again(me: Login, owner: User) -> None:
    rows = [
        transitions.create_connection(
            owner_id=owner.pk,
            domain=f"{name}.example",
            profile_name="work",
            config={},
            actor=of_user(owner),
            now=timezone.now(),
        )
        for name in ("a", "b")
    ]
    kept, left = (f"connection:{row.id}" for row in rows)
    mine = me.come()
    for subject in (kept, left):
        assert me.claim(mine.cid, subject).status_code == 200
    assert me.let_go(mine.cid, left).status_code == 204
    clients.disconnect([(mine.pk, mine.epoch, "gone")])
    Client.objects.filter(pk=mine.pk).update(expires_at=timezone.now() - dt.timedelta(seconds=1))
    before = Event.objects.latest("id").id
    clients.sweep()
    released = Event.objects.filter(name="claim.released", id__gt=before)
    assert [(event.topic, event.data["reason"]) for event in released] == [(kept, "expired")]


def test_claims_go_by_the_permission_on_the_object(
    me: Login, owner: User, stranger: User, subject: str
) -> None:
    alone = Login(stranger)
    theirs = alone.come()
    error_of(alone.claim(theirs.cid, subject), 404, "not_found")
    error_of(alone.post(theirs.cid, "presence", {"subject": subject, "doing": "looking"}), 404, "not_found")
    readers = Group.objects.create(name="readers")
    for user in (owner, stranger):
        user.groups.add(readers)
    error_of(alone.claim(theirs.cid, subject), 403, "forbidden")
    assert alone.post(theirs.cid, "presence", {"subject": subject, "doing": "looking"}).status_code == 204
    readers.permissions.add(Permission.objects.get(codename="operate_managedauthconnection"))
    assert alone.claim(theirs.cid, subject).status_code == 200
    # Whoever may see the object is told.
    assert Event.objects.filter(topic=subject, name__startswith="claim.").latest("id").audience == owner.pk


@pytest.mark.parametrize(
    "wrong", ["", "connection:", "client:cid-1", "connection:a b", "connection:" + "x" * 81, 5, None]
)
def test_what_is_no_subject_is_refused(me: Login, wrong: Any) -> None:
    mine = me.come()
    error_of(me.post(mine.cid, "claims", {"subject": wrong}), 400, "invalid_request")
    error_of(me.post(mine.cid, "presence", {"subject": wrong, "doing": ""}), 400, "invalid_request")
    assert not Claim.objects.exists()


def test_a_client_that_is_over_claims_nothing_until_it_comes_back(me: Login, subject: str) -> None:
    mine = me.come()
    clients.close(pk=mine.pk, reason="enough", actor="test")
    error_of(me.claim(mine.cid, subject), 409, "connection_unknown")
    error_of(
        me.post(mine.cid, "presence", {"subject": subject, "doing": "looking"}), 409, "connection_unknown"
    )
    me.come(mine.cid, page="another-page")
    assert me.claim(mine.cid, subject).status_code == 200


def test_who_looks_and_who_types_is_told_when_it_changes(me: Login, other: Login, subject: str) -> None:
    mine, theirs = me.come(), other.come()
    for doing in ("looking", "looking", "typing"):
        assert other.post(theirs.cid, "presence", {"subject": subject, "doing": doing}).status_code == 204
    me.claim(mine.cid, subject)
    shown = told("claim.taken")[-1]
    assert shown["people"] == [{"client": theirs.cid, "user": "colleague", "doing": "typing"}]
    assert [data["people"][0]["doing"] for data in told("claim.updated")] == ["looking", "typing"]
    other.post(theirs.cid, "presence", {"subject": subject, "doing": ""})
    assert told("claim.updated")[-1]["people"] == []
    error_of(
        other.post(theirs.cid, "presence", {"subject": subject, "doing": "sleeping"}), 400, "invalid_request"
    )


def test_a_login_is_handled_at_its_connection_and_a_command_at_its_task(
    me: Login, connection: Any, owner: User
) -> None:
    transitions.start_login(connection_id=connection.id, actor=of_user(owner), now=timezone.now())
    mine = me.come()
    error_of(me.claim(mine.cid, f"task:{Task.objects.get().id}"), 404, "not_found")
    now = timezone.now()
    command = Task.objects.create(
        owner=owner, kind=TaskKind.COMMAND, title="refactor", run_after=now, created_at=now, updated_at=now
    )
    assert me.claim(mine.cid, f"task:{command.id}").status_code == 200


def test_B51_a_page_of_somebody_who_is_not_signed_in_any_more_does_and_learns_nothing(
    owner: User, colleague: User
) -> None:
    """Another tab of the same browser signed somebody else in: the cookie is theirs, the page is not."""
    login = Login(colleague)
    mine = login.come()
    former = {"X-Page-User": f"user:{owner.pk}", "HX-Request": "true"}
    present = {"X-Page-User": f"user:{colleague.pk}", "HX-Request": "true"}
    error_of(login.web.get("/api/clients", headers=former), 401, "unauthorized")
    error_of(
        login.web.post(
            f"/api/clients/{mine.cid}/probe",
            {"epoch": mine.epoch, "nonce": "abc"},
            content_type="application/json",
            headers=former,
        ),
        401,
        "unauthorized",
    )
    assert login.web.get("/connections", headers=former).status_code == 401
    assert login.web.get("/connections", headers=present).status_code == 200
    assert login.web.get("/api/clients", headers=present).status_code == 200
    assert login.web.get("/connections").status_code == 200
