"""A login through the API: start, submit, cancel, check, handoff, exchange, timeline."""

from __future__ import annotations

import datetime as dt
import io
import logging
import threading
from unittest import mock

import pytest
from django.db import connections as databases
from django.test import Client
from django.utils import timezone
from rest_framework.test import APIClient

from connections import transitions
from connections.models import HealthCheck, LoginFlow, ManagedAuthConnection, Submission, Task
from connections.states import FlowType
from events.models import Event
from tests.connections.api_support import (
    ANSWER,
    FIELDS,
    claim,
    error_of,
    new_connection,
    post,
    succeed,
    waiting,
)

pytestmark = pytest.mark.django_db


@pytest.fixture
def api(owner, client_of) -> APIClient:
    return client_of(owner)


@pytest.fixture
def connection_id(api) -> str:
    return new_connection(api)


def at(moment):
    return mock.patch("django.utils.timezone.now", return_value=moment)


def bearer(token: str) -> APIClient:
    client = APIClient(raise_request_exception=False)
    client.credentials(HTTP_AUTHORIZATION=f"Bearer {token}")
    return client


def exchanged(connection_id: str, code: str) -> str:
    answer = post(APIClient(), f"/auth/connections/{connection_id}/exchange", {"code": code})
    assert answer.status_code == 200, answer.content
    return answer.json()["jwt"]


def by_id(flow: LoginFlow, **values: str) -> dict[str, object]:
    return {
        "interaction_id": flow.interaction_id,
        "field_values": {"f1": "alice", "f2": "hunter2-secret", **values},
    }


# ── Starting ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_login_answers_the_hosted_page_and_a_code_and_queues_a_task(api, connection_id):
    answer = post(api, f"/auth/connections/{connection_id}/login", {})
    assert answer.status_code == 200
    body = answer.json()
    assert (body["id"], body["flow_type"]) == (connection_id, "LOGIN")
    assert body["hosted_url"].endswith(f"/login/{connection_id}?code={body['handoff_code']}")
    assert body["flow_expires_at"].endswith("Z")
    shown = api.get(f"/auth/connections/{connection_id}").json()
    assert (shown["flow_status"], shown["flow_step"]) == ("IN_PROGRESS", "DISCOVERING")
    assert "code=" not in shown["hosted_url"]
    assert Task.objects.get().status == "queued"


def test_login_accepts_what_kernels_sdk_sends(api, connection_id):
    body = {
        "proxy": {"id": "p"},
        "browser": {"stealth": True},
        "browser_telemetry": None,
        "record_session": True,
        "skill_mode": "disabled",
    }
    assert post(api, f"/auth/connections/{connection_id}/login", body).status_code == 200


def test_login_again_from_the_same_key_within_30_s_is_the_same_answer_and_from_another_409(
    api, owner, client_of, connection_id
):
    path = f"/auth/connections/{connection_id}/login"
    first, again = post(api, path), post(api, path)
    assert again.status_code == 200
    assert again.json() == first.json()
    error_of(post(client_of(owner), path), 409, "login_in_progress")
    with at(timezone.now() + dt.timedelta(seconds=31)):
        error_of(post(api, path), 409, "login_in_progress")
    assert LoginFlow.objects.count() == 1


def test_login_after_a_submission_is_409_and_after_the_flow_expired_a_new_one(api, connection_id):
    _, _, flow = waiting(api, connection_id)
    path = f"/auth/connections/{connection_id}"
    assert post(api, f"{path}/submit", by_id(flow)).status_code == 202
    error_of(post(api, f"{path}/login"), 409, "login_in_progress")
    with at(flow.expires_at + dt.timedelta(seconds=1)):
        assert post(api, f"{path}/login").status_code == 200
    assert list(LoginFlow.objects.order_by("number").values_list("status", flat=True)) == [
        "EXPIRED",
        "IN_PROGRESS",
    ]


# ── Submitting ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_canonical_and_legacy_twins_are_shown_together_with_the_same_content(api, connection_id):
    choices = [
        {
            "id": "c1",
            "type": "mfa_method",
            "mfa_type": "sms",
            "label": "Text me",
            "masked_destination": "••42",
        },
        {"id": "github", "type": "sso_provider", "label": "GitHub", "observed_selector": "//a[1]"},
        {"id": "c3", "type": "account", "label": "alice"},
    ]
    waiting(api, connection_id, choices=choices)
    shown = api.get(f"/auth/connections/{connection_id}").json()
    assert [field["id"] for field in shown["fields"]] == ["f1", "f2"]
    assert [field["name"] for field in shown["discovered_fields"]] == ["username", "password"]
    assert [choice["id"] for choice in shown["choices"]] == ["c1", "github", "c3"]
    assert shown["mfa_options"] == [{"type": "sms", "label": "Text me", "target": "••42"}]
    assert shown["pending_sso_buttons"] == [{"provider": "github", "selector": "//a[1]", "label": "GitHub"}]
    assert shown["sign_in_options"] == [{"id": "c3", "label": "alice"}]


@pytest.mark.parametrize(
    "body",
    [
        {"field_values": {"f1": "alice", "f2": "x"}},
        {"field_values": {"f1": "alice", "f2": "x", "unknown": "y"}},
        {"fields": ANSWER},
        {"selected_choice_id": "c1"},
        {"mfa_option_id": "sms", "fields": {}},
        {"sso_provider": "github"},
        {"sso_button_selector": "//a[1]"},
        {"sign_in_option_id": "c3"},
    ],
)
def test_every_way_of_submitting_is_accepted_with_202(api, connection_id, body):
    choices = [
        {"id": "c1", "type": "mfa_method", "mfa_type": "sms", "label": "Text me"},
        {"id": "github", "type": "sso_provider", "label": "GitHub", "observed_selector": "//a[1]"},
        {"id": "c3", "type": "account", "label": "alice"},
    ]
    waiting(api, connection_id, choices=choices)
    answer = post(api, f"/auth/connections/{connection_id}/submit", body)
    assert (answer.status_code, answer.json()) == (202, {"accepted": True})
    shown = api.get(f"/auth/connections/{connection_id}").json()
    assert (shown["flow_step"], shown["interaction_id"], shown["fields"]) == ("SUBMITTING", None, None)


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"field_values": {}},
        {"field_values": {"f1": "alice"}},
        {"field_values": {"f1": "alice", "f2": ""}},
        {"fields": {}},
        {"fields": {"username": "alice"}},
        {"selected_choice_id": "none"},
        {"mfa_option_id": "sms"},
        {"field_values": {"f1": "a", "f2": "b"}, "fields": ANSWER},
        {"mfa_option_id": "sms", "sso_provider": "google"},
    ],
)
def test_A29_an_answer_that_does_not_fit_is_refused_and_the_question_stays_open(api, connection_id, body):
    _, _, flow = waiting(api, connection_id)
    answer = post(
        api, f"/auth/connections/{connection_id}/submit", {"interaction_id": flow.interaction_id, **body}
    )
    error_of(answer, 400, "invalid_submission")
    shown = api.get(f"/auth/connections/{connection_id}").json()
    assert (shown["flow_step"], shown["interaction_id"]) == ("AWAITING_INPUT", flow.interaction_id)
    assert not Submission.objects.exists()


def test_A28_a_stale_interaction_is_refused_with_a_message_and_the_new_form_stays(api, connection_id):
    _, hold, old = waiting(api, connection_id)
    path = f"/auth/connections/{connection_id}/submit"
    assert post(api, path, by_id(old)).status_code == 202
    new = transitions.await_input(
        hold=hold, fields=FIELDS, choices=[], website_error="Wrong.", now=timezone.now()
    )
    stale = post(api, path, by_id(old, f2="another"))
    error_of(stale, 400, "stale_interaction")
    shown = api.get(f"/auth/connections/{connection_id}").json()
    assert (shown["interaction_id"], shown["website_error"]) == (new.interaction_id, "Wrong.")


def test_A28_an_answer_between_two_questions_is_stale(api, connection_id):
    _, _, flow = waiting(api, connection_id)
    path = f"/auth/connections/{connection_id}/submit"
    post(api, path, by_id(flow))
    error_of(post(api, path, by_id(flow, f2="another")), 400, "stale_interaction")


def test_submit_again_identical_is_202_and_acted_on_once(api, connection_id):
    _, hold, flow = waiting(api, connection_id)
    path = f"/auth/connections/{connection_id}/submit"
    answers = [post(api, path, by_id(flow)) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [202, 202, 202]
    assert Submission.objects.count() == 1
    assert transitions.take_submission(hold=hold, now=timezone.now()) is not None
    assert transitions.take_submission(hold=hold, now=timezone.now()) is None


@pytest.mark.django_db(transaction=True)
def test_A30_of_parallel_answers_to_one_interaction_exactly_one_is_accepted(api, connection_id):
    _, _, flow = waiting(api, connection_id)
    path = f"/auth/connections/{connection_id}/submit"
    together = threading.Barrier(4)
    answers: list[int] = []
    header = api._credentials

    def submit(number: int) -> None:
        client = APIClient()
        client.credentials(**header)
        together.wait()
        try:
            answers.append(post(client, path, by_id(flow, f2=f"password {number}")).status_code)
        finally:
            databases.close_all()

    threads = [threading.Thread(target=submit, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(answers) == [202, 400, 400, 400]
    assert Submission.objects.count() == 1
    assert Event.objects.filter(name="flow.state", data__flow_step="SUBMITTING").count() == 1


# ── Ends ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_A18_an_answer_to_a_flow_that_is_over_is_410(api, connection_id):
    path = f"/auth/connections/{connection_id}"
    error_of(post(api, f"{path}/submit", {"fields": ANSWER}), 410, "no_active_flow")
    _, _, flow = waiting(api, connection_id)
    assert post(api, f"{path}/cancel").status_code == 200
    error_of(post(api, f"{path}/submit", by_id(flow)), 410, "no_active_flow")
    error_of(post(api, f"{path}/handoff"), 410, "no_active_flow")


def test_a_flow_whose_time_is_over_is_expired_on_read_and_once_in_the_log(api, connection_id):
    _, _, flow = waiting(api, connection_id)
    path = f"/auth/connections/{connection_id}"
    with at(flow.input_expires_at + dt.timedelta(seconds=1)):
        error_of(post(api, f"{path}/submit", by_id(flow)), 410, "no_active_flow")
        shown = [api.get(path).json() for _ in range(2)]
    assert {(row["flow_status"], row["error_code"]) for row in shown} == {
        ("EXPIRED", "awaiting_input_timeout")
    }
    assert Event.objects.filter(name="flow.state", data__flow_status="EXPIRED").count() == 1


def test_cancel_is_idempotent_and_answers_the_connection(api, connection_id):
    path = f"/auth/connections/{connection_id}/cancel"
    assert post(api, path).json()["flow_status"] is None
    waiting(api, connection_id)
    first = post(api, path, {"reason": "no time"}).json()
    assert (first["flow_status"], first["error_message"]) == ("CANCELED", "no time")
    assert post(api, path).json()["version"] == first["version"]


def test_check_queues_one_health_check_and_answers_its_task_with_202(api, connection_id):
    path = f"/auth/connections/{connection_id}/check"
    first, again = post(api, path), post(api, path)
    assert (first.status_code, first.json()["kind"], first.json()["status"]) == (
        202,
        "health_check",
        "queued",
    )
    assert again.json()["id"] == first.json()["id"]


# ── Handoff, exchange, session tokens ─────────────────────────────────────────────────────────────────────────────


def test_A03_a_code_is_exchanged_once_per_client_and_is_410_afterwards(api, connection_id):
    started, _, flow = waiting(api, connection_id)
    path = f"/auth/connections/{connection_id}/exchange"
    code = {"code": started["handoff_code"]}
    now = timezone.now()
    with at(now):
        first = post(APIClient(), path, code)
        assert first.status_code == 200
        assert first.json()["invocation_id"] == flow.id
        assert set(first.json()) == {"invocation_id", "jwt"}
        assert post(APIClient(), path, code).json() == first.json(), "a double mount gets the same token"
        error_of(post(APIClient(), path, code, HTTP_USER_AGENT="another"), 410, "handoff_code_used")
    with at(now + dt.timedelta(seconds=11)):
        error_of(post(APIClient(), path, code), 410, "handoff_code_used")


def test_A03_a_wrong_code_is_404_and_consumes_nothing_and_a_dead_one_410(api, connection_id):
    started, _, _ = waiting(api, connection_id)
    other = new_connection(api, domain="other.com")
    path = f"/auth/connections/{connection_id}/exchange"
    error_of(post(APIClient(), path, {"code": "wrong"}), 404, "not_found")
    error_of(
        post(APIClient(), f"/auth/connections/{other}/exchange", {"code": started["handoff_code"]}),
        404,
        "not_found",
    )
    error_of(post(APIClient(), "/auth/connections/ma_none/exchange", {"code": "wrong"}), 404, "not_found")
    error_of(post(APIClient(), path, {}), 400, "invalid_request")
    post(api, f"/auth/connections/{connection_id}/cancel")
    error_of(post(APIClient(), path, {"code": started["handoff_code"]}), 410, "handoff_code_used")


def test_exchanges_are_limited_per_address(api, connection_id, monkeypatch):
    monkeypatch.setattr("connections.api.EXCHANGES_PER_MINUTE", 2)
    path = f"/auth/connections/{connection_id}/exchange"
    with at(dt.datetime(2030, 1, 1, 0, 0, 1, tzinfo=dt.UTC)):
        answers = [post(APIClient(), path, {"code": "wrong"}) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [404, 404, 429]
    assert answers[-1]["Retry-After"] == "59"
    other = post(APIClient(), path, {"code": "wrong"}, REMOTE_ADDR="192.0.2.9")
    assert other.status_code == 404


def test_a_fresh_handoff_replaces_the_code_before(api, connection_id):
    started, _, _ = waiting(api, connection_id)
    fresh = post(api, f"/auth/connections/{connection_id}/handoff").json()
    assert fresh["handoff_code"] != started["handoff_code"]
    path = f"/auth/connections/{connection_id}/exchange"
    error_of(post(APIClient(), path, {"code": started["handoff_code"]}), 404, "not_found")
    assert post(APIClient(), path, {"code": fresh["handoff_code"]}).status_code == 200


def test_A02_a_session_token_reads_and_answers_its_own_connection_and_nothing_else(api, connection_id):
    started, _, flow = waiting(api, connection_id)
    other = new_connection(api, domain="other.com")
    page = bearer(exchanged(connection_id, started["handoff_code"]))
    path = f"/auth/connections/{connection_id}"
    assert page.get(path).json()["interaction_id"] == flow.interaction_id
    elsewhere = [
        page.get(f"/auth/connections/{other}"),
        page.get("/auth/connections/ma_none"),
        page.get("/auth/connections"),
        page.get(f"{path}/timeline"),
        page.get("/credentials"),
        page.get("/profiles"),
        page.get("/api/nothing"),
        page.patch(path, {}, format="json"),
        page.delete(path),
        post(page, f"{path}/login"),
        post(page, f"{path}/cancel"),
        post(page, f"{path}/handoff"),
        post(page, f"{path}/check"),
        post(page, f"/auth/connections/{other}/submit", {"fields": ANSWER}),
        post(page, "/auth/connections", {"domain": "x.com", "profile_name": "x"}),
    ]
    for answer in elsewhere:
        error_of(answer, 401, "unauthorized")
    assert post(page, f"{path}/submit", by_id(flow)).status_code == 202


def test_A02_a_token_reads_the_end_of_its_flow_and_is_410_when_that_expired_or_was_superseded(
    api, connection_id
):
    started, hold, flow = waiting(api, connection_id)
    page = bearer(exchanged(connection_id, started["handoff_code"]))
    path = f"/auth/connections/{connection_id}"
    succeed(hold)
    assert page.get(path).json()["flow_status"] == "SUCCESS"
    error_of(post(page, f"{path}/submit", by_id(flow)), 410, "no_active_flow")
    with at(flow.expires_at + dt.timedelta(seconds=1)):
        error_of(page.get(path), 410, "session_expired")
    post(api, f"{path}/login")
    error_of(page.get(path), 410, "session_expired")


def test_A02_a_token_is_401_after_half_an_hour_or_with_one_letter_changed(api, connection_id):
    started, _, _ = waiting(api, connection_id)
    token = exchanged(connection_id, started["handoff_code"])
    path = f"/auth/connections/{connection_id}"
    error_of(bearer(token[:-2] + ("AA" if token[-2:] != "AA" else "BB")).get(path), 401, "session_expired")
    with at(timezone.now() + dt.timedelta(minutes=31)):
        error_of(bearer(token).get(path), 401, "session_expired")


# ── Timeline ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_timeline_shows_flows_and_checks_newest_first_filtered_and_in_pages(api, connection_id):
    connection = ManagedAuthConnection.objects.get(pk=connection_id)
    start = timezone.now() - dt.timedelta(hours=1)
    checks = [
        HealthCheck.objects.create(
            connection=connection,
            status="AUTHENTICATED" if number else None,
            previous_status="NEEDS_AUTH",
            checked_at=start + dt.timedelta(minutes=number),
        )
        for number in range(3)
    ]
    post(api, f"/auth/connections/{connection_id}/login")
    path = f"/auth/connections/{connection_id}/timeline"
    rows = api.get(path).json()
    assert [row["type"] for row in rows] == ["login", "health_check", "health_check", "health_check"]
    assert rows[0]["status"] == "IN_PROGRESS"
    assert "completed_at" not in rows[0]
    assert [row["id"] for row in rows[1:]] == [check.id for check in reversed(checks)]
    assert rows[-1]["status"] == "NEEDS_AUTH", "an inconclusive check repeats the status that it kept"
    first = api.get(path, {"limit": 3})
    assert (first["X-Has-More"], first["X-Next-Offset"]) == ("true", "3")
    last = api.get(path, {"limit": 3, "offset": 3})
    assert [row["id"] for row in first.json() + last.json()] == [row["id"] for row in rows]
    assert last["X-Next-Offset"] == "0"
    assert [row["type"] for row in api.get(path, {"type": "login"}).json()] == ["login"]
    assert api.get(path, {"type": "reauth"}).json() == []
    assert len(api.get(path, {"type": "health_check"}).json()) == 3
    error_of(api.get(path, {"type": "else"}), 400, "invalid_request")


def test_the_timeline_row_of_a_flow_ends_when_the_flow_ends_and_a_reauth_says_so(
    api, principal, connection_id
):
    transitions.start_login(
        connection_id=connection_id, actor=principal, now=timezone.now(), flow_type=FlowType.REAUTH
    )
    transitions.fail(
        hold=claim(connection_id), code="network_error", message="No answer.", now=timezone.now()
    )
    (row,) = api.get(f"/auth/connections/{connection_id}/timeline", {"type": "reauth"}).json()
    assert (row["status"], row["error_code"], row["error_message"]) == (
        "FAILED",
        "network_error",
        "No answer.",
    )
    assert row["completed_at"].endswith("Z")


# ── Secrets ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_A48_what_was_submitted_is_in_no_answer_event_row_or_log(api, connection_id):
    secret = "xyzzy-swordfish-42"
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    logging.getLogger().addHandler(handler)
    try:
        _, hold, flow = waiting(api, connection_id)
        path = f"/auth/connections/{connection_id}"
        answers = [
            post(api, f"{path}/submit", {**by_id(flow, f2=secret), "fields": {"password": secret}}),
            post(api, f"{path}/submit", {"interaction_id": "mai_x", "field_values": {"f2": secret}}),
            post(
                api,
                f"{path}/submit",
                {"interaction_id": flow.interaction_id, "field_values": {"f1": 1, "f2": [secret]}},
            ),
            post(api, f"{path}/submit", by_id(flow, f2=secret), HTTP_IDEMPOTENCY_KEY="k"),
            api.get(path),
            api.get(f"{path}/timeline"),
        ]
        assert answers[3].status_code == 202
        taken = transitions.take_submission(hold=hold, now=timezone.now())
        assert taken is not None
        assert taken.field_values["f2"] == secret
        assert secret not in repr(taken)
    finally:
        logging.getLogger().removeHandler(handler)
    for answer in answers:
        assert secret not in answer.content.decode()
    assert secret not in str(list(Event.objects.values_list("data", flat=True)))
    with databases["default"].cursor() as cursor:
        for table in databases["default"].introspection.table_names(cursor):
            cursor.execute(f'SELECT * FROM "{table}"')
            assert secret not in repr(cursor.fetchall()), table
    assert Submission.objects.get().sealed is None
    assert secret not in written.getvalue()


def test_the_exchange_needs_no_cookie_and_no_csrf_token(api, connection_id):
    started, _, _ = waiting(api, connection_id)
    strict = Client(enforce_csrf_checks=True)
    answer = strict.post(
        f"/auth/connections/{connection_id}/exchange",
        {"code": started["handoff_code"]},
        content_type="application/json",
    )
    assert answer.status_code == 200
