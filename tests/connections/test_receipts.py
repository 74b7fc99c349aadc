"""Sends that survive failures, the server's half: who may send, the same message once, and answers that say what to do next.

The same over two server processes is in tests/live/test_receipts.py.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import json
import re
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

import pytest
from django.contrib.auth.models import User
from django.db import connections as databases
from django.http import HttpResponse
from django.test import Client as Browser
from django.utils import timezone
from rest_framework.test import APIClient

from connections import access, consumers, tasks, transitions
from connections.models import (
    ApiKey,
    IdempotentAnswer,
    LoginFlow,
    ManagedAuthConnection,
    Submission,
    Task,
    TaskInput,
)
from connections.states import FlowStatus, TaskKind
from connections.tasks import Hold
from events.models import Client, Event
from tests.connections.api_support import error_of, new_connection, post, waiting
from tests.connections.task_support import take_input
from tests.connections.test_task_input import text_of

pytestmark = pytest.mark.django_db
SECRET = "unmistakable-passw0rd"
SCRIPT: Any = {"HTTP_HX_REQUEST": "true"}
CID = "cid-9b2d5b0e-7f4e-4c9e-8a53-3a0f6a1f2b11"


@pytest.fixture
def api(owner: User, client_of: Callable[[User], APIClient]) -> APIClient:
    return client_of(owner)


@pytest.fixture
def connection_id(api: APIClient) -> str:
    return new_connection(api)


@pytest.fixture
def task(connection_id: str) -> Task:
    row = ManagedAuthConnection.objects.get(pk=connection_id)
    return tasks.enqueue(
        kind=TaskKind.COMMAND, title="run", connection=row, actor="owner", now=timezone.now()
    )


def path_of(task: Task) -> str:
    return f"/api/tasks/{task.id}/input"


def browser_of(user: User) -> tuple[Browser, str]:
    """A signed-in browser with a page loaded, and the token of that page."""
    browser = Browser(enforce_csrf_checks=True)
    browser.force_login(user)
    page = browser.get("/").content.decode()
    token = re.search(r'"X-CSRFToken":"([^"]+)"', page)
    assert token is not None
    return browser, token.group(1)


def send(browser: Browser, path: str, body: Any, **headers: str) -> HttpResponse:
    answer: Any = browser.post(path, json.dumps(body), content_type="application/json", **headers)
    return answer


def client_row(owner: User, binding: str, cid: str = CID) -> Client:
    return Client.objects.create(owner=owner, binding=binding, cid=cid, who=owner.username)


def session_binding(browser: Browser) -> str:
    key = browser.session.session_key
    assert key
    return f"session:{hashlib.sha256(key.encode()).hexdigest()[:32]}"


# ── Who may send: a key, or the session of a page ─────────────────────────────────────────────────────────────────


def test_B65_a_page_sends_by_its_session_alone_without_any_stream(owner: User, task: Task) -> None:
    browser, token = browser_of(owner)
    answer: Any = send(browser, path_of(task), {"text": "y"}, HTTP_X_CSRFTOKEN=token)
    assert answer.status_code == 202
    assert TaskInput.objects.get().submitted_by == "owner"
    assert browser.get(f"/api/tasks/{task.id}").json()["inputs_waiting"] == 1
    assert not Client.objects.exists()


@pytest.mark.parametrize("token", [None, "", "x", "x" * 64])
def test_B50_a_session_without_the_token_of_its_page_is_403_and_does_nothing(
    owner: User, task: Task, token: str | None
) -> None:
    browser, _ = browser_of(owner)
    headers = {} if token is None else {"HTTP_X_CSRFTOKEN": token}
    error_of(send(browser, path_of(task), {"text": "y"}, **headers), 403, "csrf_failed")
    assert not TaskInput.objects.exists()


def test_a_session_sends_from_its_own_origin_alone(owner: User, task: Task) -> None:
    browser, token = browser_of(owner)
    foreign = send(
        browser, path_of(task), {"text": "y"}, HTTP_X_CSRFTOKEN=token, HTTP_ORIGIN="https://evil.example"
    )
    error_of(foreign, 403, "csrf_failed")
    assert not TaskInput.objects.exists()


def test_a_form_cannot_be_made_to_look_like_json(owner: User, task: Task) -> None:
    browser, token = browser_of(owner)
    form = {"csrfmiddlewaretoken": token, "text": "y"}
    error_of(browser.post(path_of(task), form), 415, "unsupported_media_type")
    plain: Any = browser.post(path_of(task), form, HTTP_X_CSRFTOKEN=token)
    error_of(plain, 415, "unsupported_media_type")
    coded: Any = browser.post(
        path_of(task), f"csrfmiddlewaretoken={token}&text=y", content_type="application/x-www-form-urlencoded"
    )
    error_of(coded, 415, "unsupported_media_type")
    assert not TaskInput.objects.exists()


def test_a_bearer_decides_and_no_cookie_beside_it_counts(owner: User, task: Task, api: APIClient) -> None:
    browser, token = browser_of(owner)
    headers = {"HTTP_X_CSRFTOKEN": token, "HTTP_AUTHORIZATION": "Bearer sk_wrong"}
    error_of(send(browser, path_of(task), {"text": "y"}, **headers), 401, "unauthorized")
    headers["HTTP_AUTHORIZATION"] = api._credentials["HTTP_AUTHORIZATION"]
    assert send(browser, path_of(task), {"text": "y"}, **headers).status_code == 202
    assert TaskInput.objects.get().submitted_by == 'API key "test"'


def test_the_addresses_of_the_wire_contract_stay_with_keys(owner: User, connection_id: str) -> None:
    browser, token = browser_of(owner)
    for path in ("/auth/connections", f"/auth/connections/{connection_id}", "/profiles", "/credentials"):
        error_of(browser.get(path, HTTP_X_CSRFTOKEN=token), 401, "unauthorized")
    answer = send(browser, f"/auth/connections/{connection_id}/login", {}, HTTP_X_CSRFTOKEN=token)
    error_of(answer, 401, "unauthorized")
    assert not LoginFlow.objects.exists()


def test_signing_out_ends_it_and_the_answer_is_json(owner: User, task: Task) -> None:
    browser, token = browser_of(owner)
    browser.logout()
    error_of(send(browser, path_of(task), {"text": "y"}, HTTP_X_CSRFTOKEN=token), 401, "unauthorized")
    error_of(Browser().get("/api/tasks"), 401, "unauthorized")


def test_B50_every_refusal_is_json_with_a_code(
    owner: User,
    task: Task,
    api: APIClient,
    stranger: User,
    client_of: Callable[[User], APIClient],
    settings: Any,
) -> None:
    path = path_of(task)
    headers = {"HTTP_IDEMPOTENCY_KEY": "k"}
    post(api, path, {"text": "y"}, **headers)
    error_of(api.post(path, b"{", content_type="application/json"), 400, "invalid_json")
    error_of(api.post(path, b"text=y", content_type="text/plain"), 415, "unsupported_media_type")
    error_of(
        api.post(path, b" " * (settings.MAX_BODY_BYTES + 1), content_type="application/json"),
        413,
        "payload_too_large",
    )
    error_of(post(api, path, {"text": "y"}, HTTP_IDEMPOTENCY_KEY="x" * 256), 400, "invalid_request")
    error_of(post(api, path, {"text": "other"}, **headers), 409, "idempotency_conflict")
    error_of(post(APIClient(), path, {"text": "y"}), 401, "unauthorized")
    error_of(post(client_of(stranger), path, {"text": "y"}), 404, "not_found")
    error_of(api.delete(path), 405, "method_not_allowed")
    error_of(post(api, "/api/nothing/of/this/name", {}), 404, "not_found")
    assert TaskInput.objects.count() == 1


# ── Which login it is ─────────────────────────────────────────────────────────────────────────────────────────────


def test_B08_a_session_is_bound_by_a_hash_and_a_key_by_its_number(owner: User, api: APIClient) -> None:
    browser, _ = browser_of(owner)
    request = browser.get("/").wsgi_request
    of_page = access.of_request_user(owner, request.session.session_key)
    assert of_page is not None
    assert of_page.binding == session_binding(browser)
    assert browser.session.session_key not in repr(of_page)
    cookie = f"sessionid={browser.session.session_key}"
    of_stream = consumers.session_principal({"cookie": cookie})
    assert of_stream is not None
    assert of_stream.binding == of_page.binding, "the stream and the page are one login"
    other, _ = browser_of(owner)
    assert session_binding(other) != of_page.binding
    key = ApiKey.objects.get()
    assert access.of_user(owner, api_key=key, session_key="s").binding == f"key:{key.pk}"
    assert access.of_user(owner).binding == access.of_system("x").binding == ""


# ── X-Connection-ID ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "wrong",
    ["", "x", CID[:-1], f"{CID}0", "cid-" + "-" * 36, CID.replace("-", ""), f"conn-{CID[4:]}", f"{CID}é"],
)
def test_B07_a_malformed_connection_id_is_400_and_nothing_is_done(
    api: APIClient, task: Task, wrong: str
) -> None:
    answer = post(api, path_of(task), {"text": "y"}, HTTP_X_CONNECTION_ID=wrong)
    error_of(answer, 400, "invalid_connection_id")
    assert not TaskInput.objects.exists()


def test_B07_it_is_looked_at_on_every_address_that_acts(api: APIClient, connection_id: str) -> None:
    for path in ("login", "submit", "cancel", "check", "handoff"):
        answer = post(api, f"/auth/connections/{connection_id}/{path}", {}, HTTP_X_CONNECTION_ID="x")
        error_of(answer, 400, "invalid_connection_id")
    address = f"/auth/connections/{connection_id}"
    error_of(api.patch(address, {}, format="json", HTTP_X_CONNECTION_ID="x"), 400, "invalid_connection_id")
    error_of(api.delete(address, HTTP_X_CONNECTION_ID="x"), 400, "invalid_connection_id")
    assert api.get(address, HTTP_X_CONNECTION_ID="x").status_code == 200, "reading needs none"


def test_B49_an_unknown_connection_is_409_and_heals_and_an_unknown_task_is_404(
    owner: User, api: APIClient, task: Task
) -> None:
    headers = {"HTTP_X_CONNECTION_ID": CID, "HTTP_IDEMPOTENCY_KEY": "m-1"}
    error_of(post(api, path_of(task), {"text": "y"}, **headers), 409, "connection_unknown")
    assert not TaskInput.objects.exists()
    client_row(owner, f"key:{ApiKey.objects.get().pk}")
    assert post(api, path_of(task), {"text": "y"}, **headers).status_code == 202, "the refusal was not kept"
    error_of(post(api, "/api/tasks/task_no/input", {"text": "y"}, **headers), 404, "not_found")


def test_B05_another_spelling_of_the_connection_id_is_the_same(
    owner: User, api: APIClient, task: Task
) -> None:
    client_row(owner, f"key:{ApiKey.objects.get().pk}")
    for cid in (CID, CID.upper()):
        assert post(api, path_of(task), {"text": "y"}, HTTP_X_CONNECTION_ID=cid).status_code == 202


def test_B08_the_connection_of_another_session_or_user_is_unknown(
    owner: User,
    colleague: User,
    api: APIClient,
    task: Task,
    client_of: Callable[[User], APIClient],
) -> None:
    mine, token = browser_of(owner)
    other, other_token = browser_of(owner)
    client_row(owner, session_binding(mine))
    body = {"text": "y"}
    for browser, its in ((mine, token), (other, other_token)):
        answer = send(browser, path_of(task), body, HTTP_X_CSRFTOKEN=its, HTTP_X_CONNECTION_ID=CID)
        if browser is mine:
            assert answer.status_code == 202
        else:
            error_of(answer, 409, "connection_unknown")
    for client in (api, client_of(colleague)):
        error_of(post(client, path_of(task), body, HTTP_X_CONNECTION_ID=CID), 409, "connection_unknown")
    assert TaskInput.objects.count() == 1


def test_the_token_of_a_hosted_page_has_no_connection_of_that_kind(
    api: APIClient, connection_id: str
) -> None:
    started, _, _flow = waiting(api, connection_id)
    page = APIClient()
    token = post(page, f"/auth/connections/{connection_id}/exchange", {"code": started["handoff_code"]})
    page.credentials(HTTP_AUTHORIZATION=f"Bearer {token.json()['jwt']}")
    answer = post(page, f"/auth/connections/{connection_id}/submit", {}, HTTP_X_CONNECTION_ID=CID)
    error_of(answer, 409, "connection_unknown")


# ── The same message once ─────────────────────────────────────────────────────────────────────────────────────────


def test_B44_a_repeated_message_gets_the_same_receipt_and_runs_once(api: APIClient, task: Task) -> None:
    message = str(uuid.uuid4())
    first = post(api, path_of(task), {"text": SECRET}, HTTP_IDEMPOTENCY_KEY=message)
    again = post(api, path_of(task), {"text": SECRET}, HTTP_IDEMPOTENCY_KEY=message)
    assert (first.status_code, again.status_code) == (202, 202)
    assert again.json() == first.json()
    assert again["Idempotent-Replayed"] == "true"
    assert TaskInput.objects.count() == 1
    # What is kept of it says nothing of the text.
    kept = json.dumps(list(IdempotentAnswer.objects.values("scope", "key", "fingerprint")))
    assert SECRET not in kept


def test_B44_also_from_another_connection_id_and_after_it_was_delivered(
    owner: User, api: APIClient, task: Task
) -> None:
    binding = f"key:{ApiKey.objects.get().pk}"
    cids = [CID, f"cid-{uuid.uuid4()}"]
    for cid in cids:
        client_row(owner, binding, cid)
    headers = {"HTTP_IDEMPOTENCY_KEY": "m-1"}
    first = post(api, path_of(task), {"text": "y"}, HTTP_X_CONNECTION_ID=cids[0], **headers)
    hold = tasks.claim(worker="w", kinds=[TaskKind.COMMAND], now=timezone.now())
    assert hold is not None
    assert text_of(take_input(hold=hold, now=timezone.now())) == "y"
    again = post(api, path_of(task), {"text": "y"}, HTTP_X_CONNECTION_ID=cids[1], **headers)
    assert (again.status_code, again.json()) == (202, first.json())
    assert take_input(hold=hold, now=timezone.now()) is None


def test_B44_a_page_and_a_key_of_one_person_do_not_send_one_message_twice(
    owner: User, api: APIClient, task: Task
) -> None:
    browser, token = browser_of(owner)
    first = post(api, path_of(task), {"text": "y"}, HTTP_IDEMPOTENCY_KEY="m-1")
    headers = {"HTTP_X_CSRFTOKEN": token, "HTTP_IDEMPOTENCY_KEY": "m-1"}
    answer: Any = send(browser, path_of(task), {"text": "y"}, **headers)
    assert (answer.status_code, answer.json()) == (202, first.json())
    assert TaskInput.objects.count() == 1


def test_B43_two_people_may_give_their_messages_the_same_id_and_each_has_a_receipt_for_their_own(
    api: APIClient, colleague: User, client_of: Callable[[User], APIClient], task: Task
) -> None:
    theirs = client_of(colleague)
    for text in ("y", "y", "n"):
        for who in (api, theirs):
            answer = post(who, path_of(task), {"text": text}, HTTP_IDEMPOTENCY_KEY=f"1{text}")
            assert answer.status_code == 202
    assert TaskInput.objects.count() == 4


def test_B44_a_repeated_send_has_its_receipt_also_when_the_right_to_send_is_gone(
    owner: User, colleague: User, client_of: Callable[[User], APIClient], task: Task
) -> None:
    theirs = client_of(colleague)
    headers = {"HTTP_IDEMPOTENCY_KEY": "m-1"}
    first = post(theirs, path_of(task), {"text": "y"}, **headers)
    assert first.status_code == 202
    colleague.groups.get().permissions.clear()
    again = post(theirs, path_of(task), {"text": "y"}, **headers)
    assert (again.status_code, again.json()) == (202, first.json())
    assert again["Idempotent-Replayed"] == "true"
    # Only that very message: nothing new, and nothing else under its id.
    error_of(post(theirs, path_of(task), {"text": "y"}), 403, "forbidden")
    error_of(post(theirs, path_of(task), {"text": "n"}, **headers), 403, "forbidden")
    assert TaskInput.objects.count() == 1


def test_B44_a_login_anew_keeps_the_receipts(owner: User, task: Task) -> None:
    receipts = []
    for _ in range(2):
        browser, token = browser_of(owner)
        headers = {"HTTP_X_CSRFTOKEN": token, "HTTP_IDEMPOTENCY_KEY": "m-1"}
        answer: Any = send(browser, path_of(task), {"text": "y"}, **headers)
        receipts.append((answer.status_code, answer.json()))
    assert receipts[0] == receipts[1]
    assert receipts[0][0] == 202
    assert TaskInput.objects.count() == 1


def test_B44_the_receipt_outlasts_the_day_for_which_answers_are_kept(api: APIClient, task: Task) -> None:
    first = post(api, path_of(task), {"text": "y"}, HTTP_IDEMPOTENCY_KEY="m-1")
    tomorrow = timezone.now() + dt.timedelta(hours=30)
    with mock.patch("django.utils.timezone.now", return_value=tomorrow):
        again = post(api, path_of(task), {"text": "y"}, HTTP_IDEMPOTENCY_KEY="m-1")
        assert (again.status_code, again.json()) == (202, first.json())
        conflict = post(api, path_of(task), {"text": "n"}, HTTP_IDEMPOTENCY_KEY="m-1")
        error_of(conflict, 409, "idempotency_conflict")
    assert TaskInput.objects.count() == 1


def test_B44_the_receipt_outlives_its_task(
    api: APIClient, owner: User, client_of: Callable[[User], APIClient], task: Task
) -> None:
    """The answer got lost, and until the repetition the task has ended and was deleted."""
    path, headers = f"/api/tasks/{task.id}/input", {"HTTP_IDEMPOTENCY_KEY": "m-1"}
    body = {"text": "yes"}
    first = api.post(path, body, format="json", **headers)
    assert first.status_code == 202
    transitions.kill_task(task_id=task.id, actor=access.of_user(owner), reason="", now=timezone.now())
    tasks.delete(task_id=task.id, actor="owner", now=timezone.now())
    again = api.post(path, body, format="json", **headers)
    assert (again.status_code, again.json()) == (202, first.json())
    assert again["Idempotent-Replayed"] == "true"
    for other, words in (
        ({"text": "no"}, headers),
        (body, {"HTTP_IDEMPOTENCY_KEY": "m-2"}),
        (body, {}),
        (body, {"HTTP_IDEMPOTENCY_KEY": "ü"}),
    ):
        error_of(api.post(path, other, format="json", **words), 404, "not_found")
    error_of(client_of(owner).post(path, body, format="json", **headers), 404, "not_found")


def test_B44_what_broke_on_the_way_leaves_nothing_and_the_repetition_acts(
    api: APIClient, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that dies between the act and its receipt: one transaction, so there is neither."""

    def dies(*_: Any, **__: Any) -> Any:
        raise RuntimeError("killed")

    with monkeypatch.context() as patched:
        patched.setattr("connections.vault.seal", lambda value: dies() if "accepted" in str(value) else b"x")
        answer = post(api, path_of(task), {"text": "y"}, HTTP_IDEMPOTENCY_KEY="m-1")
        assert answer.status_code == 500
    task.refresh_from_db()
    assert (TaskInput.objects.count(), IdempotentAnswer.objects.count(), task.inputs_waiting) == (0, 0, 0)
    assert not Event.objects.filter(name="task.updated").exists()
    assert post(api, path_of(task), {"text": "y"}, HTTP_IDEMPOTENCY_KEY="m-1").status_code == 202
    assert TaskInput.objects.count() == 1


def test_B45_the_same_id_with_another_text_is_409_and_nothing_runs(
    owner: User, api: APIClient, task: Task
) -> None:
    post(api, path_of(task), {"text": "yes"}, HTTP_IDEMPOTENCY_KEY="m-1")
    conflict = post(api, path_of(task), {"text": "no"}, HTTP_IDEMPOTENCY_KEY="m-1")
    error_of(conflict, 409, "idempotency_conflict")
    browser, token = browser_of(owner)
    headers = {"HTTP_X_CSRFTOKEN": token, "HTTP_IDEMPOTENCY_KEY": "m-1"}
    error_of(send(browser, path_of(task), {"text": "no"}, **headers), 409, "idempotency_conflict")
    assert TaskInput.objects.count() == 1


@pytest.mark.django_db(transaction=True)
def test_B46_twenty_identical_messages_at_once_are_one_line_with_one_receipt(
    owner: User, api: APIClient, task: Task
) -> None:
    together = threading.Barrier(20)
    key = api._credentials["HTTP_AUTHORIZATION"]

    def one(_: int) -> tuple[int, Any]:
        client = APIClient()
        client.credentials(HTTP_AUTHORIZATION=key)
        together.wait(30)
        try:
            answer = post(client, path_of(task), {"text": "y"}, HTTP_IDEMPOTENCY_KEY="m-1")
            return answer.status_code, answer.json()
        finally:
            databases.close_all()

    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(one, range(20)))
    receipt = {"accepted": True, "client_message_id": "m-1", "task_id": task.id}
    assert answers == [(202, receipt)] * 20
    assert TaskInput.objects.count() == 1
    assert Event.objects.filter(name="task.updated").count() == 1


@pytest.mark.django_db(transaction=True)
def test_B66_twenty_messages_at_once_all_get_a_place_of_their_own(
    owner: User, api: APIClient, task: Task
) -> None:
    together = threading.Barrier(20)
    key = api._credentials["HTTP_AUTHORIZATION"]

    def one(number: int) -> int:
        client = APIClient()
        client.credentials(HTTP_AUTHORIZATION=key)
        together.wait(30)
        try:
            answer = post(client, path_of(task), {"text": f"{number}"}, HTTP_IDEMPOTENCY_KEY=f"m-{number}")
            return int(answer.status_code)
        finally:
            databases.close_all()

    with ThreadPoolExecutor(20) as pool:
        assert list(pool.map(one, range(20))) == [202] * 20
    assert sorted(TaskInput.objects.values_list("number", flat=True)) == list(range(1, 21))
    hold = tasks.claim(worker="w", kinds=[TaskKind.COMMAND], now=timezone.now())
    assert hold is not None
    delivered = [text_of(take_input(hold=hold, now=timezone.now())) for _ in range(20)]
    by_number = TaskInput.objects.order_by("number").values_list("message_id", flat=True)
    assert [f"m-{text}" for text in delivered] == list(by_number)


# ── The forms of the pages ────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def web(owner: User) -> Browser:
    browser = Browser()
    browser.force_login(owner)
    return browser


def asked(api: APIClient, connection_id: str) -> tuple[Hold, LoginFlow, dict[str, str]]:
    """A question, and the form that answers it."""
    _, hold, flow = waiting(api, connection_id)
    form = {"interaction_id": flow.interaction_id, "field.f1": "alice", "field.f2": SECRET}
    return hold, flow, form


def another_question(hold: Hold, flow: LoginFlow) -> None:
    """The site went on by itself."""
    transitions.discovering(hold=hold, now=timezone.now())
    transitions.await_input(hold=hold, fields=flow.fields, choices=[], now=timezone.now())


@pytest.mark.parametrize("how", [{"HTTP_IDEMPOTENCY_KEY": "m-1"}, {}])
def test_B44_a_form_that_comes_again_is_acted_on_once(
    web: Browser, connection_id: str, how: dict[str, str]
) -> None:
    """Cancelled and started again by somebody meanwhile: the repetition must not cancel the new login."""
    fields = {"reason": "lunch", **({} if how else {"message_id": "m-1"})}
    web.post(f"/connections/{connection_id}/login", **SCRIPT)
    first = web.post(f"/connections/{connection_id}/cancel", fields, **SCRIPT, **how)
    web.post(f"/connections/{connection_id}/login", **SCRIPT)
    again = web.post(f"/connections/{connection_id}/cancel", fields, **SCRIPT, **how)
    assert (first.status_code, again.status_code) == (200, 200)
    assert LoginFlow.objects.filter(status=FlowStatus.CANCELED).count() == 1
    assert LoginFlow.objects.filter(status=FlowStatus.IN_PROGRESS).count() == 1
    assert "lunch" in first.content.decode()
    assert "Working" in again.content.decode(), "the parts as they are now"


def test_B44_every_form_of_a_connection_honours_a_message_id(
    web: Browser, api: APIClient, connection_id: str, owner: User
) -> None:
    page = f"/connections/{connection_id}"

    def twice(path: str, fields: dict[str, str] | None = None) -> list[int]:
        headers = {**SCRIPT, "HTTP_IDEMPOTENCY_KEY": f"m-{path}"}
        return [web.post(f"{page}/{path}", fields or {}, **headers).status_code for _ in range(2)]

    assert twice("login") == [200, 200], "the second is no 409: it is the first"
    transitions.cancel(
        connection_id=connection_id, actor=access.of_user(owner), reason="", now=timezone.now()
    )
    hold, flow, form = asked(api, connection_id)
    assert twice("answer", form) == [200, 200]
    assert Submission.objects.count() == 1
    transitions.fail(hold=hold, code="internal_error", message="no", now=timezone.now())
    assert twice("seen", {"flow_id": flow.id}) == [200, 200]
    assert twice("check") == [200, 200]
    kept = IdempotentAnswer.objects.exclude(status_code=None)
    assert {row.key for row in kept} == {f"m-{name}" for name in ("login", "answer", "seen", "check")}
    assert {row.scope for row in kept} == {f"user:{owner.pk} page"}


def test_B45_the_same_id_with_another_answer_is_409_visibly(
    web: Browser, api: APIClient, connection_id: str
) -> None:
    hold, _flow, form = asked(api, connection_id)
    headers = {**SCRIPT, "HTTP_IDEMPOTENCY_KEY": "m-1"}
    web.post(f"/connections/{connection_id}/answer", form, **headers)
    other = web.post(f"/connections/{connection_id}/answer", {**form, "field.f2": "other"}, **headers)
    assert other.status_code == 409
    assert "sent before, with other content" in other.content.decode()
    plain = web.post(
        f"/connections/{connection_id}/answer", {**form, "field.f2": "x", "message_id": "m-1"}, follow=True
    )
    assert "sent before, with other content" in plain.content.decode()
    taken = transitions.take_submission(hold=hold, now=timezone.now())
    assert taken is not None
    assert taken.field_values["f2"] == SECRET


def test_a_message_id_that_is_none_is_refused_and_nothing_is_done(web: Browser, connection_id: str) -> None:
    for wrong in ("x" * 256, "ö"):
        answer = web.post(f"/connections/{connection_id}/login", {"message_id": wrong}, **SCRIPT)
        assert answer.status_code == 400
    assert not LoginFlow.objects.exists()


def test_a_mistake_can_be_corrected_under_another_message_id(
    web: Browser, api: APIClient, connection_id: str
) -> None:
    _hold, _flow, form = asked(api, connection_id)
    headers = {**SCRIPT, "HTTP_IDEMPOTENCY_KEY": "m-1"}
    incomplete = {**form, "field.f2": ""}
    for _ in range(2):
        answer = web.post(f"/connections/{connection_id}/answer", incomplete, **headers)
        assert answer.status_code == 400
        assert "Please fill in: Password." in answer.content.decode()
    headers["HTTP_IDEMPOTENCY_KEY"] = "m-2"
    assert web.post(f"/connections/{connection_id}/answer", form, **headers).status_code == 200


def test_A48_what_is_kept_of_a_form_holds_no_value_and_the_link_is_never_kept(
    web: Browser, api: APIClient, connection_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sealed: list[str] = []
    real = IdempotentAnswer.save

    def watched(row: IdempotentAnswer, **arguments: Any) -> None:
        sealed.append(json.dumps(transitions.vault.unseal(row.sealed)) if row.sealed else "")
        real(row, **arguments)

    monkeypatch.setattr(IdempotentAnswer, "save", watched)
    _hold, _flow, form = asked(api, connection_id)
    headers = {**SCRIPT, "HTTP_IDEMPOTENCY_KEY": "m-1"}
    web.post(f"/connections/{connection_id}/answer", form, **headers)
    assert any(sealed)
    assert SECRET not in "".join(sealed)
    assert SECRET not in json.dumps(list(IdempotentAnswer.objects.values("fingerprint", "key", "scope")))
    links = {
        web.post(
            f"/connections/{connection_id}/link", **{**headers, "HTTP_IDEMPOTENCY_KEY": "m-link"}
        ).content
        for _ in range(2)
    }
    assert len(links) == 2
    assert not IdempotentAnswer.objects.filter(key="m-link").exists()


# ── The first accepted answer wins ────────────────────────────────────────────────────────────────────────────────


def ago(seconds: int) -> None:
    Submission.objects.update(created_at=timezone.now() - dt.timedelta(seconds=seconds))


def test_A30_who_comes_second_on_the_dashboard_sees_the_present_state_and_who_was_first(
    web: Browser, api: APIClient, connection_id: str, colleague: User
) -> None:
    hold, _flow, form = asked(api, connection_id)
    other = Browser()
    other.force_login(colleague)
    path = f"/connections/{connection_id}/answer"
    assert other.post(path, {**form, "field.f1": "of-the-colleague"}, **SCRIPT).status_code == 200
    ago(3)
    late = web.post(path, form, **SCRIPT)
    body = late.content.decode()
    assert late.status_code == 409
    assert re.search(r"colleague answered [3-9] s ago\.", body)
    assert "Sending…" in body, "the fresh parts"
    assert "of-the-colleague" not in body
    assert SECRET not in body
    plain = web.post(path, form, follow=True).content.decode()
    assert "colleague answered" in plain
    taken = transitions.take_submission(hold=hold, now=timezone.now())
    assert taken is not None
    assert taken.field_values["f1"] == "of-the-colleague"
    ago(300)
    assert (
        "colleague answered 5 min ago" in web.post(path, {**form, "field.f1": "z"}, **SCRIPT).content.decode()
    )


def test_A28_a_question_that_nobody_answered_is_outdated_and_nobody_is_named(
    web: Browser, api: APIClient, connection_id: str
) -> None:
    hold, flow, form = asked(api, connection_id)
    another_question(hold, flow)
    late = web.post(f"/connections/{connection_id}/answer", form, **SCRIPT)
    assert late.status_code == 400
    assert "answer the new question" in late.content.decode()
    assert " ago." not in late.content.decode()


def test_who_comes_after_the_end_is_told_who_answered_and_that_it_ended(
    web: Browser, api: APIClient, connection_id: str, colleague: User
) -> None:
    hold, _flow, form = asked(api, connection_id)
    other = Browser()
    other.force_login(colleague)
    other.post(f"/connections/{connection_id}/answer", form, **SCRIPT)
    transitions.fail(hold=hold, code="internal_error", message="no", now=timezone.now())
    late = web.post(f"/connections/{connection_id}/answer", {**form, "field.f1": "z"}, **SCRIPT)
    assert late.status_code == 410
    assert re.search(r"colleague answered \d+ s ago\. This login has ended\.", late.content.decode())


def test_A28_over_the_api_it_stays_400_and_names_who_was_first(
    api: APIClient, connection_id: str, colleague: User, client_of: Callable[[User], APIClient]
) -> None:
    _hold, flow, _form = asked(api, connection_id)
    path = f"/auth/connections/{connection_id}/submit"

    def answer(client: APIClient, name: str) -> Any:
        body = {"interaction_id": flow.interaction_id, "field_values": {"f1": name, "f2": SECRET}}
        return post(client, path, body)

    assert answer(client_of(colleague), "c").status_code == 202
    error = error_of(answer(api, "o"), 400, "stale_interaction")
    assert error["answered_by"] == 'API key "test"'
    at = Submission.objects.get().created_at
    assert error["answered_at"] == at.strftime("%Y-%m-%dT%H:%M:%S.") + f"{at.microsecond // 1000:03d}Z"
    # The older kind of answer names no question.
    older = error_of(
        post(api, path, {"fields": {"username": "o", "password": "p"}}), 400, "stale_interaction"
    )
    assert older["answered_by"] == 'API key "test"'


def test_A28_a_question_that_nobody_answered_names_nobody_over_the_api(
    api: APIClient, connection_id: str
) -> None:
    hold, flow, _form = asked(api, connection_id)
    another_question(hold, flow)
    body = {"interaction_id": flow.interaction_id, "field_values": {"f1": "o", "f2": SECRET}}
    error = error_of(post(api, f"/auth/connections/{connection_id}/submit", body), 400, "stale_interaction")
    assert "answered_by" not in error


def test_the_hosted_page_does_not_learn_who_works_here(
    web: Browser, api: APIClient, connection_id: str
) -> None:
    started, _hold, flow = waiting(api, connection_id)
    page = APIClient()
    token = post(page, f"/auth/connections/{connection_id}/exchange", {"code": started["handoff_code"]})
    page.credentials(HTTP_AUTHORIZATION=f"Bearer {token.json()['jwt']}")
    form = {"interaction_id": flow.interaction_id, "field.f1": "alice", "field.f2": SECRET}
    web.post(f"/connections/{connection_id}/answer", form, **SCRIPT)
    body = {"interaction_id": flow.interaction_id, "field_values": {"f1": "b", "f2": "c"}}
    answer = post(page, f"/auth/connections/{connection_id}/submit", body)
    assert "answered_by" not in error_of(answer, 400, "stale_interaction")
    assert "owner" not in answer.content.decode()


@pytest.mark.django_db(transaction=True)
def test_A30_of_ten_people_at_once_one_is_accepted_and_the_others_are_told_by_whom(
    owner: User, api: APIClient, connection_id: str
) -> None:
    hold, _flow, form = asked(api, connection_id)
    together = threading.Barrier(10)
    browsers = []
    for number in range(10):
        browser = Browser()
        browser.force_login(User.objects.create_superuser(f"op{number}", password="x"))
        browsers.append(browser)

    def one(number: int) -> tuple[int, str]:
        together.wait(30)
        try:
            fields = {**form, "field.f1": f"name-{number}"}
            headers = {**SCRIPT, "HTTP_IDEMPOTENCY_KEY": f"m-{number}"}
            answer = browsers[number].post(f"/connections/{connection_id}/answer", fields, **headers)
            return answer.status_code, answer.content.decode()
        finally:
            databases.close_all()

    with ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(one, range(10)))
    assert sorted(status for status, _ in answers) == [200] + [409] * 9
    winner = next(number for number, (status, _) in enumerate(answers) if status == 200)
    assert all(f"op{winner} answered" in body for status, body in answers if status == 409)
    taken = transitions.take_submission(hold=hold, now=timezone.now())
    assert taken is not None
    assert taken.field_values["f1"] == f"name-{winner}"
