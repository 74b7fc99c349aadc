"""``Idempotency-Key`` on every POST (wire contract, section 6)."""

from __future__ import annotations

import datetime as dt
import threading
from unittest import mock

import pytest
from django.db import connections as databases
from django.utils import timezone
from rest_framework.test import APIClient

from connections import registry
from connections.models import ApiKey, Credential, IdempotentAnswer, LoginFlow, ManagedAuthConnection, Profile
from tests.connections.api_support import error_of, new_connection, post, waiting

pytestmark = pytest.mark.django_db
BODY = {"domain": "example.com", "profile_name": "work"}


@pytest.fixture
def api(owner, client_of) -> APIClient:
    return client_of(owner)


def keyed(api, path, body=None, key="k1", **headers):
    return post(api, path, body, HTTP_IDEMPOTENCY_KEY=key, **headers)


def test_the_same_key_and_body_get_the_stored_answer_and_nothing_happens_again(api):
    first = keyed(api, "/auth/connections", BODY)
    again = keyed(api, "/auth/connections", dict(reversed(BODY.items())))
    assert (first.status_code, again.status_code) == (201, 201)
    assert again.json() == first.json()
    assert again["Idempotent-Replayed"] == "true"
    assert ManagedAuthConnection.objects.count() == 1


def test_the_answer_is_kept_in_the_database_so_another_process_gives_it_too(api):
    first = keyed(api, "/profiles", {})
    row = IdempotentAnswer.objects.get()
    assert first.json()["id"].encode() not in bytes(row.sealed)
    assert keyed(APIClient_with_key_of(api), "/profiles", {}).json() == first.json()
    assert Profile.objects.count() == 1


def APIClient_with_key_of(api):
    client = APIClient()
    client.credentials(**api._credentials)
    return client


@pytest.mark.parametrize(
    ("path", "body"), [("/auth/connections", {**BODY, "domain": "b.com"}), ("/profiles", BODY)]
)
def test_the_same_key_for_another_request_is_409_and_does_nothing(api, path, body):
    keyed(api, "/auth/connections", BODY)
    error_of(keyed(api, path, body), 409, "idempotency_conflict")
    assert ManagedAuthConnection.objects.count() == 1
    assert Profile.objects.count() == 1


def test_an_absent_body_and_an_empty_object_are_the_same_request(api):
    assert keyed(api, "/profiles").json() == keyed(api, "/profiles", {}).json()


def test_keys_belong_to_their_caller(api, stranger, client_of, owner):
    first = keyed(api, "/profiles", {}).json()
    assert keyed(client_of(stranger), "/profiles", {}).json()["id"] != first["id"]
    assert keyed(client_of(owner), "/profiles", {}).json()["id"] != first["id"], (
        "another key of the same user"
    )


def test_errors_of_the_caller_are_kept(api):
    error_of(keyed(api, "/profiles", {"nme": "x"}), 400, "invalid_request")
    again = keyed(api, "/profiles", {"nme": "x"})
    error_of(again, 400, "invalid_request")
    assert again["Idempotent-Replayed"] == "true"
    new_connection(api)
    conflict = [
        error_of(keyed(api, "/auth/connections", BODY, key="k2"), 409, "already_exists") for _ in range(2)
    ]
    assert conflict[0] == conflict[1]


def test_faults_of_ours_are_not_kept_and_leave_nothing_behind(api, monkeypatch):
    original = registry.create_profile

    def broken(**arguments):
        original(**arguments)
        raise RuntimeError("broken")

    with monkeypatch.context() as patched:
        patched.setattr("connections.registry.create_profile", broken)
        error_of(keyed(api, "/profiles", {"name": "p"}), 500, "internal_error")
    assert not Profile.objects.exists()
    assert not IdempotentAnswer.objects.exists()
    assert keyed(api, "/profiles", {"name": "p"}).status_code == 201


def test_a_revoked_key_is_401_and_not_the_stored_answer(api):
    keyed(api, "/profiles", {})
    ApiKey.objects.update(revoked_at=timezone.now())
    error_of(keyed(api, "/profiles", {}), 401, "unauthorized")


@pytest.mark.parametrize("key", ["", "x" * 256, "a\x01b", "ö"])
def test_a_key_that_is_none_is_400(api, key):
    error_of(keyed(api, "/profiles", {}, key=key), 400, "invalid_request")
    assert not Profile.objects.exists()
    assert keyed(api, "/profiles", {}, key="x" * 255).status_code == 201


def test_an_answer_is_kept_for_a_day_and_the_key_is_free_then(api):
    now = timezone.now()
    first = keyed(api, "/profiles", {}).json()
    with mock.patch("django.utils.timezone.now", return_value=now + dt.timedelta(hours=23, minutes=59)):
        assert keyed(api, "/profiles", {}).json() == first
    with mock.patch("django.utils.timezone.now", return_value=now + dt.timedelta(hours=24, minutes=1)):
        assert keyed(api, "/profiles", {}).json()["id"] != first["id"]
    assert IdempotentAnswer.objects.count() == 1, "the old one made room"


def test_every_post_honours_it(api):
    connection_id = new_connection(api)
    path = f"/auth/connections/{connection_id}"
    login = keyed(api, f"{path}/login", key="login")
    with mock.patch("django.utils.timezone.now", return_value=timezone.now() + dt.timedelta(minutes=2)):
        assert keyed(api, f"{path}/login", key="login").json() == login.json(), (
            "also after the 30 s of a replay"
        )
    handoff = keyed(api, f"{path}/handoff", key="handoff").json()
    assert keyed(api, f"{path}/handoff", key="handoff").json() == handoff
    exchange = [
        keyed(APIClient(), f"{path}/exchange", {"code": handoff["handoff_code"]}, key="exchange")
        for _ in range(2)
    ]
    assert exchange[0].json() == exchange[1].json()
    assert (
        keyed(api, f"{path}/cancel", key="cancel").json() == keyed(api, f"{path}/cancel", key="cancel").json()
    )
    assert keyed(api, f"{path}/check", key="check").json() == keyed(api, f"{path}/check", key="check").json()
    _, _, flow = waiting(api, connection_id)
    answer = {"interaction_id": flow.interaction_id, "field_values": {"f1": "alice", "f2": "hunter2-secret"}}
    assert [keyed(api, f"{path}/submit", answer, key="submit").status_code for _ in range(2)] == [202, 202]
    credential = {"name": "c", "domain": "a.com", "values": {"password": "hunter2-secret"}}
    created = [keyed(api, "/credentials", credential, key="credential") for _ in range(2)]
    assert [entry.status_code for entry in created] == [201, 201]
    assert Credential.objects.count() == 1
    assert LoginFlow.objects.count() == 2


@pytest.mark.django_db(transaction=True)
def test_of_identical_requests_at_once_one_acts_and_all_get_its_answer(api):
    together = threading.Barrier(4)
    answers: list[tuple[int, str]] = []

    def send() -> None:
        client = APIClient_with_key_of(api)
        together.wait()
        try:
            answer = keyed(client, "/profiles", {})
            answers.append((answer.status_code, answer.json()["id"]))
        finally:
            databases.close_all()

    threads = [threading.Thread(target=send) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(answers) == 4
    assert len(set(answers)) == 1
    assert Profile.objects.count() == 1
