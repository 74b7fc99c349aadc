"""The OpenAPI document and its page, CORS."""

from __future__ import annotations

import re
import warnings

import pytest
from django.contrib.staticfiles import finders
from django.urls import get_resolver
from drf_spectacular.drainage import GENERATOR_STATS
from drf_spectacular.validation import validate_schema
from rest_framework.test import APIClient

from connections import api_urls
from connections.consumers import EventsConsumer
from connections.openapi import Generator
from connections.task_streams import InputsConsumer, OutputConsumer
from tests.connections.api_support import error_of

METHODS = {"get", "post", "patch", "delete", "put"}
ORIGIN = "https://app.example.com"


@pytest.fixture(scope="module")
def document():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        document = Generator().get_schema(public=True)
    assert not GENERATOR_STATS, "drf-spectacular warned about something"
    return document


def operations(document):
    for path, entry in document["paths"].items():
        for method in METHODS & set(entry):
            yield f"{method} {path}", entry[method]


def test_the_document_is_valid_openapi(document):
    validate_schema(document)


def test_every_operation_is_described_with_its_errors_and_its_key(document):
    names = set()
    for name, operation in operations(document):
        names.add(operation["operationId"])
        assert operation["summary"], name
        assert len(operation["tags"]) == 1, name
        responses = operation["responses"]
        assert any(code.startswith("2") for code in responses), name
        for code, answer in responses.items():
            if code == "204":
                assert "content" not in answer, name
            else:
                assert answer["content"], (name, code)
            if not code.startswith("2"):
                schema = answer["content"]["application/json"]["schema"]
                assert schema == {"$ref": "#/components/schemas/Error"}, (name, code)
        if operation["operationId"] == "exchange":
            assert not operation.get("security")
        else:
            # The addresses of the wire contract know keys alone.
            browser = name.partition(" ")[2].startswith(("/api/tasks", "/api/clients", "/api/events"))
            assert operation["security"] == [{"bearer": []}, *([{"session": []}] if browser else [])], name
            assert "401" in responses, name
    assert len(names) == sum(1 for _ in operations(document)), "operation ids are unique"
    assert document["components"]["securitySchemes"]["bearer"]["scheme"] == "bearer"


def test_every_address_of_the_api_is_in_the_document(document):
    addresses = {
        "/" + re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", str(entry.pattern))
        for entry in api_urls.urlpatterns
        if not str(entry.pattern).startswith(("^", "api/schema", "api/docs"))
    }
    streams = {"/api/events", "/auth/connections/{connection_id}/events", "/api/work/{task_id}/inputs"}
    assert addresses | streams == set(document["paths"])


def test_the_streams_of_a_task_are_described_with_all_that_they_take(document):
    for path, consumer in (
        ("/api/tasks/{task_id}/output", OutputConsumer),
        ("/api/work/{task_id}/inputs", InputsConsumer),
    ):
        operation = document["paths"][path]["get"]
        names = {each["name"] for each in operation["parameters"] if each["in"] == "query"}
        assert names - {"limit"} == consumer.KNOWN
        assert "text/event-stream" in operation["responses"]["200"]["content"]


def test_the_stream_of_events_is_described_with_all_that_it_takes_and_answers(document):
    operation = document["paths"]["/api/events"]["get"]
    names = {each["name"] for each in operation["parameters"] if each["in"] == "query"}
    assert names == EventsConsumer.KNOWN
    assert "EventSource" in operation["responses"]["204"]["description"]
    assert "204" not in document["paths"]["/auth/connections/{connection_id}/events"]["get"]["responses"]


def test_whatever_changes_something_is_described_with_the_client_that_acts(document):
    for name, operation in operations(document):
        headers = {each["name"] for each in operation.get("parameters", []) if each["in"] == "header"}
        acts = not name.startswith("get ") and operation["operationId"] != "exchange"
        assert ("X-Connection-ID" in headers) == acts, name
        if acts:
            assert {"400", "409"} <= set(operation["responses"]), name


def test_where_a_browser_changes_something_the_token_of_its_page_is_asked_for(document):
    count = 0
    for name, operation in operations(document):
        by_session = {"session": []} in operation.get("security", []) and not name.startswith("get ")
        said = "csrf_failed" in operation["responses"].get("403", {}).get("description", "")
        assert said == by_session, name
        count += by_session
    assert count == 13


def test_a_page_that_leaves_may_say_so_in_a_form(document):
    path = "/api/clients/{cid}/suspend"
    content = document["paths"][path]["post"]["requestBody"]["content"]
    assert set(content) == {"application/json", "application/x-www-form-urlencoded"}
    json, form = (
        document["components"]["schemas"][each["schema"]["$ref"].rpartition("/")[2]]
        for each in (content["application/json"], content["application/x-www-form-urlencoded"])
    )
    assert set(form["properties"]) - set(json["properties"]) == {"csrfmiddlewaretoken"}
    assert form["required"] == json["required"]


def test_bodies_are_closed_and_required_keys_are_named(document):
    schemas = document["components"]["schemas"]
    requests = [name for name in schemas if name.endswith("Request")]
    assert len(requests) >= 10
    for name in requests:
        assert schemas[name]["additionalProperties"] is False, name
    assert set(schemas["ConnectionCreateRequest"]["required"]) == {"domain", "profile_name"}
    assert {"id", "domain", "status", "flow_status", "version"} <= set(schemas["ManagedAuth"]["required"])
    assert set(schemas["FlowStatusEnum"]["enum"]) == {
        "IN_PROGRESS",
        "SUCCESS",
        "FAILED",
        "EXPIRED",
        "CANCELED",
    }


def test_no_answer_describes_a_secret(document):
    answers = [name for name in document["components"]["schemas"] if not name.endswith("Request")]
    for name in answers:
        properties = document["components"]["schemas"][name].get("properties", {})
        # Of a client it is whether it is there, of a hook whether the report has arrived, and not what a browser has stored.
        named = set(properties) - ({"state"} if name in ("Client", "Hook") else set())
        assert not {"values", "totp_secret", "password", "key_hash", "state"} & named, name


@pytest.mark.django_db
def test_document_and_page_are_public_and_load_nothing_from_elsewhere(client):
    answer = client.get("/api/schema")
    assert answer.status_code == 200
    assert answer.json()["openapi"].startswith("3.")
    assert client.get("/api/schema?format=yaml").content.startswith(b"openapi: 3")
    page = client.get("/api/docs").content.decode()
    sources = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert sources
    assert "<script>" not in page
    for source in sources:
        if source.startswith("/api/docs?script="):
            assert client.get(source)["Content-Type"] == "application/javascript"
            continue
        assert source.startswith("/static/"), source
        assert finders.find(source.removeprefix("/static/")), source


def test_the_page_of_the_document_is_allowed_what_it_does_and_no_more(client):
    policy = client.get("/api/docs")["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'self'" in policy
    assert "http" not in policy


# ── CORS ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def allowed(settings):
    settings.CORS_ALLOWED_ORIGINS = [ORIGIN]


def preflight(client, path, method="POST", origin=ORIGIN):
    return client.options(
        path,
        headers={
            "origin": origin,
            "access-control-request-method": method,
            "access-control-request-headers": "authorization, content-type, last-event-id, idempotency-key",
        },
    )


@pytest.mark.parametrize(
    "path", ["/auth/connections/ma_x/submit", "/auth/connections/ma_x/exchange", "/credentials"]
)
def test_a_preflight_from_an_allowed_origin_is_answered_without_a_key(client, allowed, path):
    answer = preflight(client, path)
    assert answer.status_code == 200
    assert answer["Access-Control-Allow-Origin"] == ORIGIN
    assert set(answer["Access-Control-Allow-Methods"].split(", ")) == {"GET", "POST", "OPTIONS"}
    names = set(answer["Access-Control-Allow-Headers"].split(", "))
    assert {"authorization", "content-type", "accept", "last-event-id", "idempotency-key"} <= names
    assert "Access-Control-Allow-Credentials" not in answer


def test_another_origin_and_other_paths_get_no_permission(client, allowed, db):
    assert "Access-Control-Allow-Origin" not in preflight(
        client, "/credentials", origin="https://evil.example"
    )
    assert "Access-Control-Allow-Origin" not in preflight(client, "/admin/")
    answer = client.get("/credentials", headers={"origin": "https://evil.example"})
    assert "Access-Control-Allow-Origin" not in answer


@pytest.mark.django_db
def test_errors_can_be_read_by_an_allowed_origin(client, allowed, owner, client_of):
    unauthorized = client.get("/auth/connections/ma_x", headers={"origin": ORIGIN})
    error_of(unauthorized, 401, "unauthorized")
    assert unauthorized["Access-Control-Allow-Origin"] == ORIGIN
    api: APIClient = client_of(owner)
    missing = api.get("/auth/connections/ma_x", HTTP_ORIGIN=ORIGIN)
    error_of(missing, 404, "not_found")
    assert missing["Access-Control-Allow-Origin"] == ORIGIN
    exposed = api.get("/auth/connections", HTTP_ORIGIN=ORIGIN)["Access-Control-Expose-Headers"]
    assert {"X-Has-More", "X-Next-Offset", "Retry-After"} <= set(exposed.split(", "))


def test_nothing_else_hides_behind_the_paths_of_the_api():
    """The catch-all must stay the last of its room, or it would swallow what comes after it."""
    patterns = [str(entry.pattern) for entry in api_urls.urlpatterns]
    assert patterns[-1].startswith("^(?:auth|credentials|profiles|api)")
    assert get_resolver().resolve("/api/docs").url_name == "api-docs"
