"""/profiles: names and ids, renaming, deleting, the state as a file."""

from __future__ import annotations

import pytest
from django.utils import timezone
from rest_framework.test import APIClient

from connections import vault
from connections.models import ManagedAuthConnection, Profile
from events.models import Event
from tests.connections.api_support import error_of, new_connection, post, waiting

pytestmark = pytest.mark.django_db
STATE = {
    "cookies": [{"name": "sid", "value": "cookie-secret", "domain": "example.com", "path": "/"}],
    "origins": [],
}


@pytest.fixture
def api(owner, client_of) -> APIClient:
    return client_of(owner)


def test_a_profile_is_created_with_a_name_or_called_by_its_id(api):
    named = post(api, "/profiles", {"name": "work"})
    assert named.status_code == 201
    assert named.json()["id"].startswith("prof_")
    nameless = post(api, "/profiles").json()
    assert nameless["name"] == nameless["id"]
    assert (
        error_of(post(api, "/profiles", {"name": "work"}), 409, "already_exists")["existing_id"]
        == named.json()["id"]
    )


def test_profiles_are_listed_newest_first_by_name_or_part(api):
    for name in ("one", "two", "twofold"):
        post(api, "/profiles", {"name": name})

    def found(**query):
        return [row["name"] for row in api.get("/profiles", query).json()]

    assert found() == ["twofold", "two", "one"]
    assert found(name="TWO") == ["two"]
    assert found(query="wo") == ["twofold", "two"]
    assert found(limit=1, offset=1) == ["two"]


def test_a_renamed_profile_is_seen_on_its_connections_and_told(api):
    connection_id = new_connection(api)
    answer = api.patch("/profiles/work", {"name": "home"}, format="json")
    assert answer.json()["name"] == "home"
    assert api.get(f"/auth/connections/{connection_id}").json()["profile_name"] == "home"
    assert Event.objects.filter(name="connection.updated", data__profile_name="home").count() == 1
    post(api, "/profiles", {"name": "work"})
    error_of(api.patch("/profiles/work", {"name": "home"}, format="json"), 409, "already_exists")
    error_of(api.patch("/profiles/work", {}, format="json"), 400, "invalid_request")


def test_a_deleted_profile_takes_its_connections_along_and_tells_it(api):
    connection_id = new_connection(api)
    waiting(api, connection_id)
    assert api.delete("/profiles/work").status_code == 204
    assert not ManagedAuthConnection.objects.exists()
    assert Event.objects.filter(name="connection.deleted", object_id=connection_id).count() == 1
    assert Event.objects.filter(name="flow.state", data__flow_status="CANCELED").count() == 1
    error_of(api.get("/profiles/work"), 404, "not_found")


def test_the_state_is_downloaded_as_json_by_whoever_may_act_and_by_nobody_else(
    api, colleague, stranger, client_of
):
    created = post(api, "/profiles", {"name": "work"}).json()
    error_of(api.get("/profiles/work/download"), 404, "not_found")
    Profile.objects.update(state=vault.seal(STATE), state_saved_at=timezone.now())
    for reference in ("work", created["id"]):
        answer = api.get(
            f"/profiles/{reference}/download?format=tar.zst", HTTP_ACCEPT="application/octet-stream"
        )
        assert answer.json() == STATE
        assert answer["Content-Disposition"] == f'attachment; filename="{created["id"]}.json"'
    assert client_of(colleague).get("/profiles/work/download").status_code == 200
    colleague.groups.get().permissions.clear()
    error_of(client_of(colleague).get("/profiles/work/download"), 403, "forbidden")
    error_of(client_of(stranger).get("/profiles/work/download"), 404, "not_found")
    assert b"cookie-secret" not in api.get("/profiles").content + api.get("/profiles/work").content
