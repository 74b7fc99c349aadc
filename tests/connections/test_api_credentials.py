"""/credentials: encrypted values that never come out again, names and ids, one-time codes."""

from __future__ import annotations

import base64
import datetime as dt
from unittest import mock

import pytest
from rest_framework.test import APIClient

from connections import vault
from connections.drivers import known
from connections.drivers.base import Totp
from connections.models import Credential, ManagedAuthConnection
from connections.totp import Generator
from tests.connections.api_support import error_of, new_connection, post

pytestmark = pytest.mark.django_db

SECRET = "JBSWY3DPEHPK3PXP"
#: The test vectors of RFC 6238 (appendix B): seconds, algorithm, code.
VECTORS = [
    (59, "SHA1", "94287082"),
    (59, "SHA256", "46119246"),
    (59, "SHA512", "90693936"),
    (1111111109, "SHA1", "07081804"),
    (20000000000, "SHA256", "77737706"),
    (20000000000, "SHA512", "47863826"),
]
SEEDS = {"SHA1": 20, "SHA256": 32, "SHA512": 64}


@pytest.fixture
def api(owner, client_of) -> APIClient:
    return client_of(owner)


def create(api, **extra):
    body = {"name": "shop", "domain": "shop.example", "values": {"username": "alice", "password": "hunter2"}}
    return post(api, "/credentials", {**body, **extra})


def test_create_answers_the_names_of_the_values_and_never_a_value(api):
    answer = create(api)
    assert answer.status_code == 201
    body = answer.json()
    assert body["id"].startswith("cred_")
    assert (body["has_values"], body["value_keys"], body["has_totp_secret"]) == (
        True,
        ["password", "username"],
        False,
    )
    assert "totp_code" not in body
    assert b"hunter2" not in answer.content
    row = Credential.objects.get()
    assert b"hunter2" not in bytes(row.values)
    assert vault.unseal(row.values) == {"username": "alice", "password": "hunter2"}


def test_a_name_that_is_taken_is_409_with_the_existing_id(api):
    first = create(api).json()["id"]
    assert error_of(create(api), 409, "already_exists")["existing_id"] == first
    other = create(api, name="other").json()["id"]
    error_of(api.patch(f"/credentials/{other}", {"name": "shop"}, format="json"), 409, "already_exists")
    assert Credential.objects.count() == 2


@pytest.mark.parametrize("name", ["shop", "mit Leerzeichen", "a/b", "ö", "127.0.0.1:8000/work", "?&#%"])
def test_a_credential_is_found_by_id_and_by_name(api, name):
    created = create(api, name=name).json()
    by_id = api.get(f"/credentials/{created['id']}").json()
    quoted = "".join(f"%{byte:02X}" for byte in name.encode())
    assert api.get(f"/credentials/{quoted}").json() == by_id
    assert by_id["name"] == name


def test_lists_leave_out_value_keys_and_find_by_domain_and_part(api):
    create(api)
    create(api, name="Bank", domain="bank.example")
    rows = api.get("/credentials").json()
    assert [row["name"] for row in rows] == ["Bank", "shop"]
    assert all("value_keys" not in row for row in rows)

    def found(**query):
        return [row["name"] for row in api.get("/credentials", query).json()]

    assert found(domain="bank.example") == ["Bank"]
    assert found(query="ban") == ["Bank"]
    assert found(query="EXAMPLE") == ["Bank", "shop"]
    assert found(query=rows[0]["id"]) == ["Bank"]
    assert found(query=rows[0]["id"][:-1]) == []


def test_patch_removes_keys_first_and_merges_values_then(api):
    create(api)
    changes = {
        "remove_value_keys": ["username", "password", "none"],
        "values": {"password": "new", "pin": "1"},
    }
    body = api.patch("/credentials/shop", changes, format="json").json()
    assert body["value_keys"] == ["password", "pin"]
    assert vault.unseal(Credential.objects.get().values) == {"password": "new", "pin": "1"}


def test_patch_renames_and_its_connections_show_the_new_name(api):
    create(api)
    connection_id = new_connection(api, credential={"name": "shop"})
    before = api.get(f"/auth/connections/{connection_id}").json()
    api.patch("/credentials/shop", {"name": "store"}, format="json")
    after = api.get(f"/auth/connections/{connection_id}").json()
    assert after["credential"] == {"name": "store"}
    assert after["version"] > before["version"]
    error_of(api.get("/credentials/shop"), 404, "not_found")


def test_delete_leaves_the_connection_without_a_credential(api):
    create(api)
    connection_id = new_connection(api, credential={"name": "shop"})
    assert api.delete("/credentials/shop").status_code == 204
    assert api.get(f"/auth/connections/{connection_id}").json()["credential"] is None
    assert ManagedAuthConnection.objects.count() == 1
    error_of(api.delete("/credentials/shop"), 404, "not_found")


def test_the_sso_provider_is_set_and_cleared_by_null_or_empty(api):
    assert create(api, sso_provider="google").json()["sso_provider"] == "google"
    for nothing in (None, ""):
        api.patch("/credentials/shop", {"sso_provider": "github"}, format="json")
        assert (
            api.patch("/credentials/shop", {"sso_provider": nothing}, format="json").json()["sso_provider"]
            is None
        )


# ── One-time codes ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("seconds", "algorithm", "code"), VECTORS)
def test_codes_are_those_of_rfc_6238(seconds, algorithm, code):
    seed = (b"1234567890" * 7)[: SEEDS[algorithm]]
    secret = base64.b32encode(seed).decode()
    assert Generator(secret, algorithm=algorithm, digits=8).at(seconds) == code


def test_setting_a_secret_answers_the_code_of_this_moment_and_so_does_totp_code(api):
    moment = dt.datetime(2030, 1, 1, 0, 0, 31, tzinfo=dt.UTC)
    with mock.patch("django.utils.timezone.now", return_value=moment):
        body = create(api, totp_secret=SECRET).json()
        code = api.get("/credentials/shop/totp-code").json()
    assert body["totp_code"] == Generator(SECRET).at(int(moment.timestamp()))
    assert body["totp_code_expires_at"] == "2030-01-01T00:01:00.000Z"
    assert code == {"code": body["totp_code"], "expires_at": "2030-01-01T00:01:00.000Z"}
    assert "totp_code" not in api.get("/credentials/shop").json()


def test_totp_code_without_a_secret_is_404(api):
    create(api)
    error_of(api.get("/credentials/shop/totp-code"), 404, "not_found")


def test_only_the_parameters_that_a_uri_names_win_over_the_explicit_ones(api):
    uri = f"otpauth://totp/Shop:alice?secret={SECRET}&digits=8"
    body = create(api, totp_secret=uri, totp_algorithm="SHA256", totp_digits=6, totp_period=60).json()
    assert (body["totp_algorithm"], body["totp_digits"], body["totp_period"]) == ("SHA256", 8, 60)
    assert len(body["totp_code"]) == 8


def test_a_new_raw_secret_keeps_the_parameters_and_a_new_uri_resets_what_it_does_not_name(api):
    create(api, totp_secret=SECRET, totp_digits=8, totp_period=60)
    kept = api.patch("/credentials/shop", {"totp_secret": SECRET[::-1]}, format="json").json()
    assert (kept["totp_digits"], kept["totp_period"]) == (8, 60)
    reset = api.patch(
        "/credentials/shop", {"totp_secret": f"otpauth://totp/x?secret={SECRET}&period=15"}, format="json"
    ).json()
    assert (reset["totp_algorithm"], reset["totp_digits"], reset["totp_period"]) == ("SHA1", 6, 15)


def test_an_empty_secret_removes_it_and_its_metadata(api):
    create(api, totp_secret=SECRET, totp_digits=8)
    body = api.patch("/credentials/shop", {"totp_secret": ""}, format="json").json()
    assert (body["has_totp_secret"], body["totp_digits"]) == (False, 6)
    assert "totp_code" not in body


def test_parameters_without_a_secret_are_refused_in_a_change(api):
    create(api, totp_secret=SECRET)
    error_of(api.patch("/credentials/shop", {"totp_digits": 8}, format="json"), 400, "invalid_request")


def test_a_sixteen_character_secret_and_a_long_period_work_everywhere(api):
    body = create(api, totp_secret=SECRET, totp_period=300).json()
    assert len(body["totp_code"]) == 6
    assert api.get("/credentials/shop/totp-code").status_code == 200
    drawn = known._generator(Totp(secret=SECRET, period=300))
    assert drawn is not None
    assert len(drawn.at(0)) == 6, "the driver draws codes for whatever the API accepts"


# ── Who may ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_foreign_credential_is_404_by_id_and_by_name(api, stranger, client_of):
    created = create(api, totp_secret=SECRET).json()
    theirs = client_of(stranger)
    for reference in (created["id"], "shop"):
        error_of(theirs.get(f"/credentials/{reference}"), 404, "not_found")
        error_of(theirs.get(f"/credentials/{reference}/totp-code"), 404, "not_found")
        error_of(theirs.patch(f"/credentials/{reference}", {}, format="json"), 404, "not_found")
        error_of(theirs.delete(f"/credentials/{reference}"), 404, "not_found")
    assert theirs.get("/credentials").json() == []
    assert create(theirs).status_code == 201, "the same name, of another owner"


def test_who_may_only_look_sees_the_credential_and_not_its_codes(api, colleague, client_of):
    colleague.groups.get().permissions.clear()
    create(api, totp_secret=SECRET)
    looking = client_of(colleague)
    assert looking.get("/credentials/shop").status_code == 200
    error_of(looking.get("/credentials/shop/totp-code"), 403, "forbidden")
    error_of(looking.patch("/credentials/shop", {}, format="json"), 403, "forbidden")
    error_of(looking.delete("/credentials/shop"), 403, "forbidden")


def test_a_name_means_ones_own_credential_before_a_colleagues(api, colleague, client_of):
    mine, theirs = create(api).json(), create(client_of(colleague)).json()
    assert api.get("/credentials/shop").json()["id"] == mine["id"]
    assert client_of(colleague).get("/credentials/shop").json()["id"] == theirs["id"]
