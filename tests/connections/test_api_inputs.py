"""Bad input gets the contract's error and loses nothing."""

from __future__ import annotations

import pytest
from django.test import Client
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some
from rest_framework.test import APIClient

from connections import inputs
from connections.errors import ApiError
from connections.models import Credential, ManagedAuthConnection
from tests.connections.api_support import error_of, new_connection, post, waiting

GOOD = {"domain": "example.com", "profile_name": "work"}


@pytest.fixture
def api(owner, client_of) -> APIClient:
    return client_of(owner)


def raw(api: APIClient, path: str, body: bytes, content_type: str = "application/json", **headers: str):
    return api.generic("POST", path, body, content_type=content_type, **headers)


pytestmark = pytest.mark.django_db


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"surprise": 1}, "surprise"),
        ({"domain": None}, "domain"),
        ({"domain": 5}, "domain"),
        ({"domain": ""}, "domain"),
        ({"domain": "https://example.com"}, "domain"),
        ({"domain": "example.com/path"}, "domain"),
        ({"domain": "user@example.com"}, "domain"),
        ({"domain": "exa mple.com"}, "domain"),
        ({"domain": "example.com:99999"}, "domain"),
        ({"domain": "example.com:"}, "domain"),
        ({"domain": "-x.com"}, "domain"),
        ({"domain": "1.2.3.400"}, "domain"),
        ({"domain": "a" * 300 + ".com"}, "domain"),
        ({"profile_name": " "}, "profile_name"),
        ({"profile_name": "x" * 256}, "profile_name"),
        ({"profile_name": "a\nb"}, "profile_name"),
        ({"profile_name": ["x"]}, "profile_name"),
        ({"login_url": "ftp://example.com"}, "login_url"),
        ({"login_url": "javascript:alert(1)"}, "login_url"),
        ({"login_url": "https://u:p@example.com"}, "login_url"),
        ({"login_url": "/login"}, "login_url"),
        ({"login_url": "http://[::1"}, "login_url"),
        ({"save_credentials": "true"}, "save_credentials"),
        ({"record_session": 1}, "record_session"),
        ({"health_checks": None}, "health_checks"),
        ({"health_check_interval": 299}, "health_check_interval"),
        ({"health_check_interval": 86_401}, "health_check_interval"),
        ({"health_check_interval": "3600"}, "health_check_interval"),
        ({"health_check_interval": 3600.0}, "health_check_interval"),
        ({"health_check_interval": True}, "health_check_interval"),
        ({"allowed_domains": "a.com"}, "allowed_domains"),
        ({"allowed_domains": ["a.com", 1]}, "allowed_domains.1"),
        ({"allowed_domains": ["*."]}, "allowed_domains.0"),
        ({"allowed_domains": ["a.com"] * 101}, "allowed_domains"),
        ({"browser": []}, "browser"),
        ({"browser": {"x": "y" * 20_000}}, "browser"),
        ({"credential": {}}, "credential"),
        ({"credential": {"provider": "p"}}, "credential"),
        ({"credential": {"provider": "p", "auto": False}}, "credential"),
        ({"credential": {"name": "n", "path": "p"}}, "credential"),
        ({"credential": {"name": "none"}}, "credential.name"),
        ({"credential": {"name": "n", "extra": 1}}, "credential.extra"),
    ],
)
def test_what_the_schema_does_not_know_is_400_and_names_the_key(api, change, named):
    error = error_of(post(api, "/auth/connections", {**GOOD, **change}), 400, "invalid_request")
    assert any(detail["message"].startswith(f"{named}:") for detail in error["details"]), error
    assert not ManagedAuthConnection.objects.exists()


def test_every_wrong_key_has_a_detail_of_its_own(api):
    body = {"domain": 1, "health_checks": "x", "save_credentials": 0}
    error = error_of(post(api, "/auth/connections", body), 400, "invalid_request")
    named = {detail["message"].partition(":")[0] for detail in error["details"]}
    assert named == {"domain", "health_checks", "save_credentials", "profile_name"}
    unknown = error_of(post(api, "/auth/connections", {**GOOD, "a": 1, "b": 2}), 400, "invalid_request")
    assert [detail["code"] for detail in unknown["details"]] == ["unknown_key", "unknown_key"]


@pytest.mark.parametrize(
    "body",
    [
        b"{", b"nonsense", b'{"domain": NaN}', b'{"domain": Infinity}', b"\xff\xfe", b'{"domain": "a"', b"{'a': 1}",
        b'{"domain": "a\\u0000b", "profile_name": "p"}', b'{"domain": "\\ud800", "profile_name": "p"}',
        b'{"x\\u0000": 1}', b'{"n": 1e999}', b'{"n": ' + b"9" * 5000 + b"}",
        b'{"browser": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"browser": ' + b'{"a":' * 50 + b"1" + b"}" * 50 + b"}",
    ],
)  # fmt: skip
def test_bad_json_is_400_and_creates_nothing(api, body):
    error_of(raw(api, "/auth/connections", body), 400, "invalid_json")
    assert not ManagedAuthConnection.objects.exists()


@pytest.mark.parametrize("body", [b"[]", b'"text"', b"5", b"null", b"true"])
def test_a_body_that_is_no_object_is_400(api, body):
    error_of(raw(api, "/auth/connections", body), 400, "invalid_request")


def test_a_byte_order_mark_is_skipped(api):
    body = b'\xef\xbb\xbf{"domain": "b.com", "profile_name": "p"}'
    assert raw(api, "/auth/connections", body).json()["domain"] == "b.com"


@pytest.mark.parametrize(
    ("body", "named"),
    [
        (b'{"domain": "a.com", "domain": "b.com", "profile_name": "p"}', "'domain'"),
        (b'{"domain": "a.com", "profile_name": "p", "browser": {"a": 1, "\\u0061": 2}}', "'a'"),
        (b'{"\\ud800": 1, "\\ud800": 2}', "ud800"),
        (b'{"%(key)s": 1, "%(key)s": 2}' % {b"key": b"k" * 500}, "k" * 80 + "'"),
    ],
    ids=["top", "nested", "surrogate", "long"],
)
def test_a_key_that_stands_twice_is_refused_by_name(api, body, named):
    error = error_of(raw(api, "/auth/connections", body), 400, "invalid_json")
    assert named in error["message"]
    assert len(error["message"]) < 150
    assert not ManagedAuthConnection.objects.exists()


@pytest.mark.parametrize(
    "content_type", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""]
)
def test_another_content_type_is_415(api, content_type):
    error_of(
        raw(api, "/auth/connections", b'{"domain": "a.com", "profile_name": "p"}', content_type),
        415,
        "unsupported_media_type",
    )
    assert not ManagedAuthConnection.objects.exists()


def test_json_with_a_charset_is_json(api):
    body = b'{"domain": "a.com", "profile_name": "p"}'
    assert raw(api, "/auth/connections", body, "application/json; charset=UTF-8").status_code == 201


@pytest.mark.parametrize("content_type", ["application/json", "", "text/plain"])
def test_an_absent_body_and_an_empty_object_mean_the_same_where_nothing_is_required(api, content_type):
    connection_id = new_connection(api)
    path = f"/auth/connections/{connection_id}/login"
    first = raw(api, path, b"", content_type)
    assert first.status_code == 200
    assert raw(api, path, b"{}").json() == first.json()
    error_of(raw(api, "/auth/connections", b"", content_type), 400, "invalid_request")


def test_a_huge_body_is_413_and_creates_nothing(api, settings):
    body = b'{"domain": "a.com", "profile_name": "' + b"x" * settings.MAX_BODY_BYTES + b'"}'
    answer = raw(api, "/auth/connections", body)
    error_of(answer, 413, "payload_too_large")
    assert not ManagedAuthConnection.objects.exists()


def test_a_bad_answer_loses_neither_the_question_nor_a_login(api):
    connection_id = new_connection(api)
    _, _, flow = waiting(api, connection_id)
    path = f"/auth/connections/{connection_id}/submit"
    for body in (
        {"fields": {"username": 5}}, {"fields": []}, {"field_values": {"f1": None}}, {"unknown": "x"},
        {"interaction_id": 5}, {"selected_choice_id": {"a": 1}}, {"field_values": {"": "x"}},
        {"field_values": {str(number): "" for number in range(101)}}, {"fields": {"username": "x" * 10_001}},
    ):  # fmt: skip
        error_of(post(api, path, body), 400, "invalid_request")
    shown = api.get(f"/auth/connections/{connection_id}").json()
    assert (shown["flow_step"], shown["interaction_id"]) == ("AWAITING_INPUT", flow.interaction_id)


@pytest.mark.parametrize("path", ["/credentials/a%00b", "/profiles/%00", "/auth/connections/%00"])
def test_a_nul_in_an_address_is_404(api, path):
    error_of(api.get(path), 404, "not_found")


def test_no_error_repeats_a_value(api):
    secret = "xyzzy-swordfish-42"
    for body in (
        {"name": "n", "domain": secret + "/", "values": {"password": [secret]}, "totp_secret": secret},
        {
            "name": "n",
            "domain": "a.com",
            "values": {},
            "totp_algorithm": secret,
            "totp_secret": f"otpauth://hotp/{secret}",
        },
        {
            "name": "n",
            "domain": "a.com",
            "values": secret,
            "sso_provider": {"a": secret},
            "totp_digits": secret,
        },
    ):
        answer = post(api, "/credentials", body)
        error_of(answer, 400, "invalid_request")
        assert secret not in answer.content.decode()
    answer = raw(api, "/credentials", b'{"values": {"password": "' + secret.encode() + b'"')
    assert secret not in answer.content.decode()
    assert not Credential.objects.exists()


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("Example.COM", "example.com"),
        ("example.com.", "example.com"),
        ("127.0.0.1:8000", "127.0.0.1:8000"),
        ("localhost", "localhost"),
        ("my_host.internal:1", "my_host.internal:1"),
        ("bücher.example", "xn--bcher-kva.example"),
        ("[::1]:8000", "[::1]:8000"),
        ("[0:0::1]", "[::1]"),
    ],
)
def test_a_host_is_normalised(given, kept):
    assert inputs.normal_host(given) == kept


@pytest.mark.parametrize(
    "text",
    [
        "",
        ".",
        "a..b",
        "a b",
        "a/b",
        "a?b",
        "a#b",
        "a@b",
        "a\\b",
        "a:b",
        ":80",
        "[::1",
        "::1",
        "a:0",
        "%61.com",
        "a\x00",
    ],
)
def test_what_is_no_host_is_refused(text):
    with pytest.raises(ValueError, match="host name"):
        inputs.normal_host(text)


SECRET = "JBSWY3DPEHPK3PXP"


def test_a_totp_secret_may_be_written_as_sites_show_it():
    assert inputs.parse_totp("jbsw y3dp-ehpk 3pxp==") == inputs.TotpInput(secret=SECRET)


def test_an_otpauth_uri_says_its_parameters():
    uri = f"otpauth://totp/Shop:alice?secret={SECRET}&issuer=Shop&algorithm=SHA256&digits=8&period=60"
    assert inputs.parse_totp(uri) == inputs.TotpInput(
        secret=SECRET, algorithm="SHA256", digits=8, period=60, from_uri=True
    )


@pytest.mark.parametrize(
    "text",
    [
        "short", "A" * 15, "A" * 129, "JBSWY3DPEHPK3PX1", "A" * 17, "otpauth://hotp/x?secret=" + SECRET,
        "otpauth://totp/x", "otpauth://totp/x?secret=1", f"otpauth://totp/x?secret={SECRET}&digits=5",
        f"otpauth://totp/x?secret={SECRET}&period=0", f"otpauth://totp/x?secret={SECRET}&algorithm=MD5",
        f"otpauth://totp/x?secret={SECRET}&digits=six",
    ],
)  # fmt: skip
def test_what_is_no_totp_secret_is_refused_without_repeating_it(text):
    with pytest.raises(ValueError) as refused:
        inputs.parse_totp(text)
    assert SECRET not in str(refused.value)


def test_depth_is_bounded_at_32():
    def nested(depth: int) -> bytes:
        return b'{"a":' * depth + b"1" + b"}" * depth

    assert inputs.decode(nested(31))
    with pytest.raises(ApiError):
        inputs.decode(nested(33))


def test_what_django_itself_refuses_is_json_under_the_api_and_a_page_elsewhere(settings):
    settings.ALLOWED_HOSTS = ["good.example"]
    client = Client(raise_request_exception=False)
    error_of(client.get("/auth/connections", headers={"host": "evil.example"}), 400, "invalid_request")
    page = client.get("/nowhere", headers={"host": "evil.example"})
    assert page.status_code == 400
    assert not page["Content-Type"].startswith("application/json")


SCHEMAS = [
    inputs.ConnectionCreate, inputs.ConnectionUpdate, inputs.Login, inputs.Submit, inputs.Cancel, inputs.Exchange,
    inputs.Empty, inputs.CredentialCreate, inputs.CredentialUpdate, inputs.ProfileCreate, inputs.ProfileUpdate,
]  # fmt: skip
SCALARS = some.one_of(
    some.none(), some.booleans(), some.integers(), some.floats(allow_nan=False), some.text(max_size=40),
    some.sampled_from(["", "example.com", "https://example.com/", "otpauth://totp/x?secret=A", "[::1", "a:b", "*.", "\x00"]),
)  # fmt: skip
VALUES = some.recursive(
    SCALARS,
    lambda inner: some.lists(inner, max_size=3) | some.dictionaries(some.text(max_size=5), inner, max_size=3),
)


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: schema.__name__)
@settings(
    max_examples=60, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=some.data())
def test_whatever_comes_in_is_taken_or_refused_and_never_a_fault(schema, data):
    keys = some.sampled_from([*schema().fields, "unknown"])
    body = data.draw(some.dictionaries(keys, VALUES, max_size=6) | VALUES)
    try:
        taken = inputs.checked(schema, body)
    except ApiError as refused:
        assert refused.status == 400  # noqa: PT017
        assert refused.body["details"]  # noqa: PT017
    else:
        assert set(taken) <= set(body)
        assert "unknown" not in taken


@settings(
    max_examples=200,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(raw=some.binary(max_size=200) | some.text(max_size=80).map(str.encode))
def test_whatever_bytes_come_in_are_json_or_refused(raw):
    try:
        inputs.decode(raw)
    except ApiError as refused:
        assert (refused.status, refused.code) == (400, "invalid_json")  # noqa: PT017


@settings(
    max_examples=200,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(text=some.text(max_size=30))
def test_a_normalised_host_is_stable(text):
    for normal in (inputs.normal_host, inputs.normal_root):
        try:
            once = normal(text)
        except ValueError:
            continue
        assert normal(once) == once
        assert once.isascii()
