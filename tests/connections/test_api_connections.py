"""/auth/connections: create, read, change, delete; who may; lists."""

from __future__ import annotations

import datetime as dt
from unittest import mock

import pytest
from django.contrib.auth.models import Group, User
from django.utils import timezone
from rest_framework.test import APIClient

from connections.models import ApiKey, LoginFlow, ManagedAuthConnection, Profile
from events.models import Event
from tests.connections.api_support import claim, error_of, new_connection, post, waiting

pytestmark = pytest.mark.django_db


@pytest.fixture
def api(owner, client_of) -> APIClient:
    return client_of(owner)


def test_create_answers_201_with_the_whole_connection_and_its_defaults(api):
    answer = post(api, "/auth/connections", {"domain": "Example.COM", "profile_name": "work"})
    assert answer.status_code == 201
    body = answer.json()
    assert body["id"].startswith("ma_")
    assert body["domain"] == "example.com"
    assert body["status"] == "NEEDS_AUTH"
    assert (body["health_checks"], body["auto_reauth"], body["health_check_interval"]) == (True, True, 3600)
    assert body["flow_status"] is None
    assert body["fields"] is None
    assert body["created_at"].endswith("Z")
    assert (body["can_reauth"], body["can_reauth_reason"]) == (False, "no_prior_successful_login")
    assert Profile.objects.get().name == "work"
    assert Event.objects.filter(name="connection.created").count() == 1


def test_create_again_is_409_with_the_existing_id_and_asks_sdks_not_to_retry(api):
    connection_id = new_connection(api)
    again = post(api, "/auth/connections", {"domain": "example.com", "profile_name": "work"})
    assert error_of(again, 409, "already_exists")["existing_id"] == connection_id
    assert ManagedAuthConnection.objects.count() == 1


def test_what_was_configured_is_echoed(api):
    config = {
        "login_url": "https://example.com/login",
        "save_credentials": False,
        "record_session": True,
        "health_checks": False,
        "auto_reauth": False,
        "health_check_interval": 300,
        "browser": {"stealth": True, "telemetry": {"enabled": True}},
        "proxy": {"id": "p1"},
        "browser_telemetry": {"enabled": False},
        "credential": {"provider": "my-1p", "auto": True},
    }
    connection_id = new_connection(api, **config)
    shown = api.get(f"/auth/connections/{connection_id}").json()
    assert {key: shown[key] for key in config} == config


def test_allowed_domains_lose_www_and_stars_and_repetitions(api):
    connection_id = new_connection(
        api, allowed_domains=["www.A.com", "*.b.com", "a.com", "*.www.c.com", "d.com:8443"]
    )
    shown = api.get(f"/auth/connections/{connection_id}").json()
    assert shown["allowed_domains"] == ["a.com", "b.com", "c.com", "d.com:8443"]


def test_patch_changes_only_the_keys_sent_and_an_empty_login_url_clears(api):
    connection_id = new_connection(api, login_url="https://example.com/login", allowed_domains=["a.com"])
    path = f"/auth/connections/{connection_id}"
    first = api.patch(path, {"auto_reauth": False}, format="json").json()
    assert (first["auto_reauth"], first["login_url"], first["allowed_domains"]) == (
        False,
        "https://example.com/login",
        ["a.com"],
    )
    second = api.patch(path, {"login_url": "", "allowed_domains": ["b.com"]}, format="json").json()
    assert (second["login_url"], second["allowed_domains"], second["auto_reauth"]) == (None, ["b.com"], False)
    assert second["version"] > first["version"]
    untouched = api.patch(path, {}, format="json").json()
    assert untouched["version"] == second["version"]


def test_patch_of_browser_keeps_the_properties_that_are_left_out(api):
    connection_id = new_connection(api, browser={"stealth": True, "proxy": {"id": "p"}})
    shown = api.patch(
        f"/auth/connections/{connection_id}", {"browser": {"stealth": False}}, format="json"
    ).json()
    assert shown["browser"] == {"stealth": False, "proxy": {"id": "p"}}


def test_a_credential_is_referenced_by_name_and_detached_by_null(api):
    post(api, "/credentials", {"name": "mine", "domain": "example.com", "values": {"username": "u"}})
    connection_id = new_connection(api, credential={"name": "mine"})
    path = f"/auth/connections/{connection_id}"
    assert api.get(path).json()["credential"] == {"name": "mine"}
    assert api.patch(path, {"credential": None}, format="json").json()["credential"] is None


def test_somebody_elses_credential_does_not_exist(api, stranger, client_of):
    post(client_of(stranger), "/credentials", {"name": "theirs", "domain": "example.com", "values": {}})
    answer = post(
        api,
        "/auth/connections",
        {"domain": "example.com", "profile_name": "p", "credential": {"name": "theirs"}},
    )
    assert "credential.name" in error_of(answer, 400, "invalid_request")["details"][0]["message"]


def test_delete_answers_204_without_a_body_and_cancels_a_running_login_first(api):
    connection_id = new_connection(api)
    waiting(api, connection_id)
    answer = api.delete(f"/auth/connections/{connection_id}")
    assert (answer.status_code, answer.content) == (204, b"")
    assert not ManagedAuthConnection.objects.exists()
    ended = Event.objects.filter(name="flow.state").latest("id")
    assert ended.data["flow_status"] == "CANCELED"
    error_of(api.delete(f"/auth/connections/{connection_id}"), 404, "not_found")


def test_the_quota_is_403_and_creates_nothing(api, settings):
    settings.CONNECTION_QUOTA = 1
    new_connection(api)
    answer = post(api, "/auth/connections", {"domain": "b.com", "profile_name": "other"})
    error_of(answer, 403, "quota_reached")
    assert ManagedAuthConnection.objects.count() == 1
    assert not Profile.objects.filter(name="other").exists()


EVERY_OPERATION = [
    ("get", ""),
    ("patch", ""),
    ("delete", ""),
    ("post", "/login"),
    ("post", "/submit"),
    ("post", "/cancel"),
    ("post", "/check"),
    ("post", "/handoff"),
    ("get", "/timeline"),
]


@pytest.mark.parametrize(("method", "suffix"), EVERY_OPERATION)
def test_a_foreign_connection_is_404_like_one_that_never_was(api, stranger, client_of, method, suffix):
    connection_id = new_connection(api)
    theirs = client_of(stranger)
    foreign = getattr(theirs, method)(f"/auth/connections/{connection_id}{suffix}")
    unknown = getattr(theirs, method)(f"/auth/connections/ma_0123456789abcdef01234567{suffix}")
    assert error_of(foreign, 404, "not_found") == error_of(unknown, 404, "not_found")
    assert ManagedAuthConnection.objects.filter(pk=connection_id).exists()
    assert not LoginFlow.objects.exists()


@pytest.mark.parametrize(("method", "suffix"), EVERY_OPERATION)
def test_without_a_key_401_comes_before_404(client, method, suffix):
    answer = getattr(client, method)(f"/auth/connections/ma_none{suffix}")
    error_of(answer, 401, "unauthorized")
    assert answer["WWW-Authenticate"] == "Bearer"


@pytest.mark.parametrize(
    "header",
    ["", "Bearer", "Bearer ", "Basic dTpw", "Bearer sk_wrong", "Bearer a.b.c", "Bearer \xff", "sk_x"],
)
def test_a_wrong_authorization_is_401(client, header):
    answer = client.get("/auth/connections", HTTP_AUTHORIZATION=header)
    error_of(answer, 401, "session_expired" if header == "Bearer a.b.c" else "unauthorized")


def test_a_revoked_key_and_an_inactive_user_are_401(api, owner, client_of):
    assert api.get("/auth/connections").status_code == 200
    ApiKey.objects.update(revoked_at=timezone.now())
    error_of(api.get("/auth/connections"), 401, "unauthorized")
    fresh = client_of(owner)
    assert fresh.get("/auth/connections").status_code == 200
    User.objects.filter(pk=owner.pk).update(is_active=False)
    error_of(fresh.get("/auth/connections"), 401, "unauthorized")


def test_a_session_cookie_alone_opens_nothing_so_no_other_site_can_use_it(client, owner):
    client.force_login(owner)
    error_of(client.post("/auth/connections", "{}", content_type="application/json"), 401, "unauthorized")


def test_wrong_keys_are_limited_per_address_and_a_right_one_still_passes(api, client, monkeypatch):
    monkeypatch.setattr("connections.authentication.FAILURES_PER_MINUTE", 3)
    with mock.patch(
        "django.utils.timezone.now", return_value=dt.datetime(2030, 1, 1, 0, 0, 10, tzinfo=dt.UTC)
    ):
        wrong = [client.get("/auth/connections", HTTP_AUTHORIZATION="Bearer sk_no") for _ in range(4)]
        assert [answer.status_code for answer in wrong] == [401, 401, 401, 429]
        assert wrong[-1]["Retry-After"] == "50"
        error_of(wrong[-1], 429, "rate_limited")
        assert api.get("/auth/connections").status_code == 200


def test_the_last_use_of_a_key_is_written_at_most_once_a_minute(api, django_assert_num_queries):
    start = dt.datetime(2030, 1, 1, tzinfo=dt.UTC)
    seen = []
    for seconds in (0, 30, 59, 61):
        with mock.patch("django.utils.timezone.now", return_value=start + dt.timedelta(seconds=seconds)):
            api.get("/auth/connections")
        seen.append((ApiKey.objects.get().last_used_at - start).total_seconds())
    assert seen == [0, 0, 0, 61]


def test_a_colleague_with_the_permission_acts_and_one_without_only_looks(api, owner, colleague, client_of):
    connection_id = new_connection(api)
    path = f"/auth/connections/{connection_id}"
    assert client_of(colleague).patch(path, {"auto_reauth": False}, format="json").status_code == 200
    Group.objects.get(name="team").permissions.clear()
    looking = client_of(colleague)
    assert looking.get(path).status_code == 200
    error_of(looking.patch(path, {"auto_reauth": True}, format="json"), 403, "forbidden")
    error_of(post(looking, f"{path}/login"), 403, "forbidden")
    error_of(looking.delete(path), 403, "forbidden")
    assert not LoginFlow.objects.exists()


# ── Lists ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_lists_are_bare_arrays_newest_first_with_both_headers(api):
    ids = [new_connection(api, domain=f"d{n}.com") for n in range(3)]
    answer = api.get("/auth/connections", {"limit": 2})
    assert [row["id"] for row in answer.json()] == [ids[2], ids[1]]
    assert (answer["X-Has-More"], answer["X-Next-Offset"]) == ("true", "2")
    rest = api.get("/auth/connections", {"limit": 2, "offset": 2})
    assert [row["id"] for row in rest.json()] == [ids[0]]
    assert (rest["X-Has-More"], rest["X-Next-Offset"]) == ("false", "0")
    beyond = api.get("/auth/connections", {"offset": 50})
    assert (beyond.json(), beyond["X-Has-More"], beyond["X-Next-Offset"]) == ([], "false", "0")


def test_limit_is_twenty_by_default_and_clamped_to_1_to_100(api, owner):
    profile = Profile.objects.create(
        owner=owner, name="p", created_at=timezone.now(), updated_at=timezone.now()
    )
    now = timezone.now()
    ManagedAuthConnection.objects.bulk_create(
        ManagedAuthConnection(
            owner=owner, profile=profile, domain=f"d{n}.com", created_at=now, updated_at=now
        )
        for n in range(105)
    )

    def count(**query):
        return len(api.get("/auth/connections", query).json())

    assert [count(), count(limit=0), count(limit=-7), count(limit=1000), count(limit="9" * 25)] == [
        20, 1, 1, 100, 100,
    ]  # fmt: skip


@pytest.mark.parametrize(
    "query", ["limit=x", "limit=1.5", "limit=1e3", "limit=٣", "offset=-1", "offset=" + "9" * 25]
)
def test_a_limit_or_offset_that_is_no_number_is_400(api, query):
    error_of(api.get(f"/auth/connections?{query}"), 400, "invalid_request")


def test_filters_are_exact_and_query_is_a_part_of_id_domain_or_profile(api):
    one = new_connection(api, domain="shop.example.com")
    two = post(api, "/auth/connections", {"domain": "example.com", "profile_name": "Büro"}).json()["id"]

    def found(**query):
        return {row["id"] for row in api.get("/auth/connections", query).json()}

    assert found(domain="EXAMPLE.com") == {two}
    assert found(profile_name="work") == {one}
    assert found(query="shop") == {one}
    assert found(query="Bür") == {two}
    assert found(query=two[5:15]) == {two}
    assert found(query="%") == set()
    assert found() == {one, two}
    error_of(api.get("/auth/connections", {"query": "\x00"}), 400, "invalid_request")


def test_a_list_shows_the_flow_of_each_and_expires_what_is_due(api):
    connection_id = new_connection(api)
    new_connection(api, domain="other.com")
    waiting(api, connection_id)
    later = timezone.now() + dt.timedelta(hours=1)
    with mock.patch("django.utils.timezone.now", return_value=later):
        rows = {row["id"]: row for row in api.get("/auth/connections").json()}
    assert rows[connection_id]["flow_status"] == "EXPIRED"
    assert LoginFlow.objects.get().status == "EXPIRED"


def test_the_number_of_queries_of_a_list_does_not_grow_with_it(api, django_assert_max_num_queries):
    for n in range(8):
        connection_id = new_connection(api, domain=f"d{n}.com")
        post(api, f"/auth/connections/{connection_id}/login")
        claim(connection_id)
    with django_assert_max_num_queries(10):
        assert len(api.get("/auth/connections").json()) == 8


@pytest.mark.parametrize(
    "path", ["/auth", "/auth/", "/auth/connections/", "/api", "/api/nothing", "/profiles/"]
)
def test_unknown_addresses_are_json(api, client, path, settings):
    settings.DEBUG = True
    error_of(api.get(path), 404, "not_found")
    error_of(client.get(path), 401, "unauthorized")


@pytest.mark.parametrize(
    ("method", "path"), [("put", "/auth/connections"), ("delete", "/credentials"), ("options", "/profiles")]
)
def test_a_method_that_is_not_there_is_405_in_json(api, method, path):
    answer = getattr(api, method)(path)
    error_of(answer, 405, "method_not_allowed")


def test_a_fault_of_ours_is_500_in_json_and_says_nothing_about_itself(api, monkeypatch, caplog):
    def broken(**_):
        raise RuntimeError("the password is swordfish")

    monkeypatch.setattr("connections.transitions.create_connection", broken)
    answer = post(api, "/auth/connections", {"domain": "example.com", "profile_name": "p"})
    error_of(answer, 500, "internal_error")
    assert b"swordfish" not in answer.content
    assert "unexpected RuntimeError" in caplog.text


def test_any_accept_header_gets_json(api):
    assert api.get("/auth/connections", HTTP_ACCEPT="text/html").json() == []
    assert api.get("/auth/connections?format=xml", HTTP_ACCEPT="application/octet-stream").json() == []


def test_answers_are_not_to_be_stored_by_anybody(api):
    assert api.get("/auth/connections")["Cache-Control"] == "no-store"
