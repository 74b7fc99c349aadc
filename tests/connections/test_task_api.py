"""Tasks through the API: made, found, changed, typed into, killed, deleted, read. Who may do what of it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from django.contrib.auth.models import Group, Permission, User
from django.db import connection
from django.db import connections as databases
from django.test import Client as Browser
from django.test.utils import CaptureQueriesContext
from django.utils import timezone
from rest_framework.test import APIClient

from connections import hooks, inputs, task_inputs, tasks, vault
from connections.models import HookDelivery, IdempotentAnswer, Task, TaskInput, TaskOutput
from connections.states import TaskKind, TaskStatus
from events.models import Event
from tests.connections.api_support import error_of, new_connection, post, waiting
from tests.connections.flow_support import cursor, events
from tests.connections.task_support import HOOK_SECRET, KIND, end, held, hold_of, new_task, take_input, write

pytestmark = pytest.mark.django_db
COMMAND = {"kind": "command", "argv": ["echo", "$(id)", 'a "b"\n']}


@pytest.fixture
def api(owner: User, client_of: Callable[[User], APIClient]) -> APIClient:
    return client_of(owner)


@pytest.fixture
def looker(owner: User, stranger: User, client_of: Callable[[User], APIClient]) -> APIClient:
    """Of the owner's team, with the right to run commands of their own, and none to act on what is the owner's."""
    lookers = Group.objects.create(name="lookers")
    owner.groups.add(lookers)
    stranger.groups.add(lookers)
    stranger.user_permissions.add(Permission.objects.get(codename="run_commands"))
    return client_of(stranger)


def created(api: APIClient, body: Any, **headers: str) -> Any:
    answer = post(api, "/api/tasks", body, **headers)
    assert answer.status_code == 201, answer.content
    return answer.json()


# ── Creating ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_C13_C14_a_command_is_created_and_told_with_what_it_runs(api: APIClient, owner: User) -> None:
    before = cursor()
    shown = created(
        api, COMMAND | {"title": "a try", "labels": ["ci", "ci", "nightly"], "timeout_seconds": 60}
    )
    assert (shown["kind"], shown["status"], shown["title"]) == ("command", "queued", "a try")
    assert (shown["argv"], shown["labels"], shown["timeout_seconds"]) == (
        COMMAND["argv"],
        ["ci", "nightly"],
        60,
    )
    [event] = events(before)
    assert (event.name, event.object_id, event.actor) == ("task.created", shown["id"], 'API key "test"')
    assert event.data["argv"] == COMMAND["argv"]
    row = Task.objects.get()
    assert (row.owner, row.spec["rows"], row.spec["cols"]) == (owner, 24, 80)
    assert api.get(f"/api/tasks/{row.pk}").json() == {**shown, "inputs": []}


def test_C13_a_task_of_an_own_kind_keeps_its_payload_and_its_parent(api: APIClient) -> None:
    parent = created(api, {"kind": "build", "payload": {"commit": "abc", "n": [1, None]}})
    child = created(api, {"kind": "build.step", "payload": "x", "parent_id": parent["id"]})
    assert parent["payload"] == {"commit": "abc", "n": [1, None]}
    assert (parent["title"], parent["argv"], child["parent_id"]) == ("build", None, parent["id"])


@pytest.mark.parametrize(
    "body",
    [
        {}, {"kind": "login"}, {"kind": "health_check"}, {"kind": "Build"}, {"kind": "b"}, {"kind": "command"}, {"kind": "command", "argv": []},
        {"kind": "command", "argv": "ls"}, {"kind": "command", "argv": [""]}, {"kind": "command", "argv": [1]}, {"kind": "command", "argv": ["ls"], "payload": 1},
        {"kind": "command", "argv": ["ls"], "cwd": "relative"}, {"kind": "command", "argv": ["ls"], "cwd": "/etc"}, {"kind": "command", "template": "nothing"},
        {"kind": "command", "argv": ["ls"], "rows": 0}, {"kind": "build", "argv": ["ls"]}, {"kind": "build", "labels": ["a b"]},
        {"kind": "build", "labels": ["x"] * 21}, {"kind": "build", "payload": "x" * 20_000}, {"kind": "build", "timeout_seconds": 0},
        {"kind": "build", "hook_url": "ftp://x"}, {"kind": "build", "hook_secret": "whsec_" + "A" * 44}, {"kind": "build", "hook_url": "https://x.example/", "hook_secret": "short"},
        {"kind": "build", "parent_id": "task_nothing"}, {"kind": "build", "status": "running"},
    ],
)  # fmt: skip
def test_B50_what_is_no_task_is_400_and_nothing_is_made(api: APIClient, body: Any) -> None:
    before = cursor()
    error_of(post(api, "/api/tasks", body), 400, "invalid_request")
    assert not Task.objects.exists()
    assert events(before) == []


def test_C55_a_command_is_made_with_its_first_input_which_is_nowhere_to_be_read(api: APIClient) -> None:
    before = cursor()
    shown = created(api, COMMAND | {"input": "the secret plan"})
    assert (shown["status"], shown["inputs_waiting"], shown["prompt_delivered"]) == ("queued", 1, False)
    assert [event.name for event in events(before)] == ["task.created", "task.updated"]
    assert "secret plan" not in json.dumps([event.data for event in events(before)]) + json.dumps(shown)
    row = Task.objects.get()
    hold = hold_of(row)
    given = task_inputs.next_input(hold=hold)
    assert given is not None
    assert (given.text, given.submit, given.initial) == ("the secret plan", True, True)
    task_inputs.inputs_taken(hold=hold, through=1, now=timezone.now())
    assert api.get(f"/api/tasks/{row.pk}").json()["prompt_delivered"] is False
    for _ in range(2):
        task_inputs.initial_delivered(hold=hold, now=timezone.now())
    tasks.settle(hold=hold, exit_code=0, now=timezone.now())
    assert api.get(f"/api/tasks/{row.pk}").json()["prompt_delivered"] is True
    updates = [event.data for event in events(before) if event.name == "task.updated"]
    assert [each["prompt_delivered"] for each in updates] == [False, False, True]
    with pytest.raises(tasks.LeaseLost):
        task_inputs.initial_delivered(hold=hold, now=timezone.now())


def test_C55_without_one_there_is_nothing_to_be_delivered_and_other_kinds_get_it_as_any_input(
    api: APIClient,
) -> None:
    assert created(api, COMMAND)["prompt_delivered"] is None
    shown = created(api, {"kind": "build", "input": "go"})
    assert (shown["prompt_delivered"], shown["inputs_waiting"]) == (None, 1)
    assert not TaskInput.objects.get().initial


@pytest.mark.parametrize("wrong", ["", 1, None, ["go"], "x" * (inputs.MAX_LINE + 1)])
def test_C55_what_is_no_line_is_400_and_nothing_is_made(api: APIClient, wrong: Any) -> None:
    error_of(post(api, "/api/tasks", COMMAND | {"input": wrong}), 400, "invalid_request")
    assert not Task.objects.exists()


def test_C55_who_may_not_run_commands_types_nothing_into_one_either(
    stranger: User, client_of: Callable[[User], APIClient]
) -> None:
    error_of(post(client_of(stranger), "/api/tasks", COMMAND | {"input": "go"}), 403, "commands_forbidden")
    assert not TaskInput.objects.exists()


def test_C60_only_who_may_run_commands_makes_one(
    stranger: User, client_of: Callable[[User], APIClient], api: APIClient, settings: Any
) -> None:
    error_of(post(client_of(stranger), "/api/tasks", COMMAND), 403, "commands_forbidden")
    assert created(client_of(stranger), {"kind": "build"})["kind"] == "build"
    settings.COMMANDS = "off"
    error_of(post(api, "/api/tasks", COMMAND), 403, "commands_forbidden")
    settings.COMMANDS = "templates"
    settings.COMMAND_TEMPLATES = {
        "greet": {
            "argv": ["echo", "hello"],
            "cwd": "",
            "title": "Greet",
            "timeout_seconds": 5,
            "arguments": True,
        }
    }
    error_of(post(api, "/api/tasks", COMMAND), 400, "invalid_request")
    shown = created(api, {"kind": "command", "template": "greet", "argv": ["you"], "timeout_seconds": 60})
    assert (shown["argv"], shown["template"], shown["title"]) == (["echo", "hello", "you"], "greet", "Greet")
    assert shown["timeout_seconds"] == 5


def test_all_arguments_together_are_of_bounded_size(api: APIClient) -> None:
    """They stand in every answer and every event of the task."""
    half = "x" * (inputs.MAX_ARGUMENT_SUM // 2 - 2)
    created(api, {"kind": "command", "argv": ["echo", half, half]})
    refused = error_of(
        post(api, "/api/tasks", {"kind": "command", "argv": ["echo", half, half, "x"]}),
        400,
        "invalid_request",
    )
    assert "Together" in refused["message"]


def test_the_same_request_again_is_the_same_task_and_another_is_refused(api: APIClient) -> None:
    key = {"HTTP_IDEMPOTENCY_KEY": "once"}
    first = created(api, COMMAND, **key)
    again = post(api, "/api/tasks", COMMAND, **key)
    assert (again.json(), again["Idempotent-Replayed"]) == (first, "true")
    error_of(post(api, "/api/tasks", {"kind": "build"}, **key), 409, "idempotency_conflict")
    assert Task.objects.count() == 1


def test_C31_a_hook_has_a_secret_that_is_told_once_and_kept_encrypted(api: APIClient) -> None:
    body = {"kind": "build", "hook_url": "https://hook.example/in?token=abc"}
    answer = post(api, "/api/tasks", body, HTTP_IDEMPOTENCY_KEY="k")
    shown = answer.json()
    secret = shown.pop("hook_secret")
    assert secret.startswith("whsec_")
    assert post(api, "/api/tasks", body, HTTP_IDEMPOTENCY_KEY="k").json()["hook_secret"] == secret
    row = Task.objects.get()
    assert vault.unseal(row.hook_sealed) == [body["hook_url"], secret]
    kept = [api.get(f"/api/tasks/{row.pk}").content.decode(), api.get("/api/tasks").content.decode()]
    kept += [json.dumps(event.data) for event in Event.objects.all()]
    kept += [repr(IdempotentAnswer.objects.values().get()), repr(Task.objects.values().get())]
    assert not [text for text in kept if secret in text]
    assert shown["hook"]["url"] == "https://hook.example/…"
    own = "whsec_" + "QUJD" * 10
    assert "hook_secret" not in created(api, {**body, "hook_secret": own})
    assert vault.unseal(Task.objects.exclude(pk=row.pk).get().hook_sealed)[1] == own


# ── Capacity ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_C52_over_the_limit_it_is_429_with_figures_and_nothing_is_kept(api: APIClient, settings: Any) -> None:
    settings.COMMAND_LIMIT = 2
    created(api, COMMAND)
    created(api, COMMAND)
    tasks.claim(worker="w", kinds=[TaskKind.COMMAND], now=timezone.now())
    before = cursor()
    key = {"HTTP_IDEMPOTENCY_KEY": "later"}
    for _ in range(2):
        answer = post(api, "/api/tasks", COMMAND, **key)
        error = error_of(answer, 429, "no_capacity")
        assert (error["limit"], error["running"], error["queued"]) == (2, 1, 1)
        assert int(answer["Retry-After"]) >= 1
    assert (Task.objects.count(), events(before), IdempotentAnswer.objects.count()) == (2, [], 0)
    assert created(api, {"kind": "build"})["status"] == "queued", "others are not counted"
    hold = Task.objects.get(status=TaskStatus.RUNNING)
    tasks.settle(hold=tasks.held(task_id=hold.pk, worker="w", attempt=1), now=timezone.now())
    assert created(api, COMMAND, **key)["status"] == "queued", "the refusal was not the answer for ever"


@pytest.mark.django_db(transaction=True)
def test_C52_of_ten_creations_at_once_one_passes(api: APIClient, owner: User, settings: Any) -> None:
    settings.COMMAND_LIMIT = 3
    created(api, COMMAND)
    created(api, COMMAND)
    before, together = cursor(), threading.Barrier(10)

    def one(number: int) -> int:
        browser = Browser()
        browser.force_login(owner)
        together.wait(30)
        try:
            answer = browser.post(
                "/api/tasks", COMMAND, content_type="application/json", HTTP_IDEMPOTENCY_KEY=f"k{number}"
            )
            return answer.status_code
        finally:
            databases.close_all()

    with ThreadPoolExecutor(10) as pool:
        assert sorted(pool.map(one, range(10))) == [201] + [429] * 9
    assert [event.name for event in events(before)] == ["task.created"]


# ── Finding ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_lists_are_filtered_searched_and_paged(api: APIClient, owner: User) -> None:
    connection_id = new_connection(api)
    waiting(api, connection_id)
    one = created(api, COMMAND | {"title": "Ünique", "labels": ["ci"]})["id"]
    two = created(api, {"kind": "build", "labels": ["ci", "ci2"], "parent_id": one})["id"]
    three = created(api, {"kind": "command", "argv": ["grep", "é 100%"]})["id"]
    login = Task.objects.get(kind="login").pk

    def ids(query: str) -> list[str]:
        answer = api.get(f"/api/tasks?{query}")
        assert answer.status_code == 200, answer.content
        return [row["id"] for row in answer.json()]

    assert ids("") == [three, two, one, login]
    assert ids("status=queued,running") == [three, two, one]
    assert ids("status=waiting_for_input") == [login]
    assert ids("kind=command") == [three, one]
    assert ids("label=ci") == [two, one]
    assert ids("label=ci2") == [two]
    assert ids("label=c") == []
    assert ids(f"parent_id={one}") == [two]
    assert ids(f"connection_id={connection_id}") == [login]
    assert ids("q=%C3%9Cnique") == [one]
    assert ids("q=GREP") == [three]
    assert ids("q=%C3%A9+100%25") == [three]
    assert ids('q=a+"b"') == [one]
    assert ids("q=argv") == []
    assert ids(f"q={two[:14]}") == [two]
    page = api.get("/api/tasks?limit=2&offset=1")
    assert [row["id"] for row in page.json()] == [two, one]
    assert (page["X-Has-More"], page["X-Next-Offset"]) == ("true", "3")
    for wrong in ("status=sleeping", "offset=-1", "q=%00"):
        error_of(api.get(f"/api/tasks?{wrong}"), 400, "invalid_request")


def test_a_list_asks_the_database_as_often_for_many_as_for_one(api: APIClient, owner: User) -> None:
    counts = []
    for number in range(12):
        end(held(owner, title=f"{number}", hook_url="https://hook.example/", hook_secret=HOOK_SECRET))
        if number in (0, 1, 11):
            with CaptureQueriesContext(connection) as asked:
                shown = api.get("/api/tasks").json()
            counts.append(len(asked))
    # The first request also notes that the key was used.
    assert counts[1] == counts[2] <= counts[0]
    assert [row["hook"]["state"] for row in shown] == ["pending"] * 12


# ── Changing and deleting ─────────────────────────────────────────────────────────────────────────────────────────


def test_C59_a_new_title_and_new_labels_are_told_and_nothing_else_changes(
    api: APIClient, owner: User
) -> None:
    hold = held(owner, labels=["a"])
    before = cursor()
    shown = api.patch(f"/api/tasks/{hold.task_id}", {"title": " renamed "}, format="json").json()
    assert (shown["title"], shown["labels"], shown["status"]) == ("renamed", ["a"], "running")
    end(hold)
    late = api.patch(f"/api/tasks/{hold.task_id}", {"labels": ["b"]}, format="json").json()
    assert (late["labels"], late["status"]) == (["b"], "completed")
    api.patch(f"/api/tasks/{hold.task_id}", {"labels": ["b"]}, format="json")
    assert [event.name for event in events(before)] == ["task.updated", "task.status", "task.updated"]
    for wrong in ({"status": "failed"}, {"title": ""}, {"labels": "a"}, {"title": "x" * 201}):
        error_of(api.patch(f"/api/tasks/{hold.task_id}", wrong, format="json"), 400, "invalid_request")


def test_C59_what_has_ended_is_deleted_with_everything_and_told_once(api: APIClient, owner: User) -> None:
    hold = held(owner, hook_url="https://hook.example/", hook_secret=HOOK_SECRET)
    write(hold, b"output")
    path = f"/api/tasks/{hold.task_id}"
    post(api, f"{path}/input", {"text": "y"})
    error = error_of(api.delete(path), 409, "task_running")
    assert error["status"] == "running"
    end(hold)
    before = cursor()
    assert api.delete(path).status_code == 204
    assert [event.name for event in events(before)] == ["task.deleted"]
    assert not any(model.objects.exists() for model in (Task, TaskInput, TaskOutput, HookDelivery))
    error_of(api.delete(path), 404, "not_found")


# ── Typing ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_C45_C47_C48_text_keys_and_sizes_are_taken_in_the_order_of_acceptance(
    api: APIClient, owner: User
) -> None:
    hold = held(owner)
    path = f"/api/tasks/{hold.task_id}/input"
    for body in (
        {"text": "no Enter", "submit": False},
        {"keys": ["up", "enter"]},
        {"rows": 50, "cols": 132},
        {"text": "y"},
    ):
        assert post(api, path, body).status_code == 202, body
    taken = [take_input(hold=hold, now=timezone.now()) for _ in range(4)]
    assert [
        (each.kind, each.text, each.submit, each.keys, each.rows, each.cols) for each in taken if each
    ] == [
        ("text", "no Enter", False, (), 0, 0),
        ("keys", "", False, ("up", "enter"), 0, 0),
        ("resize", "", False, (), 50, 132),
        ("text", "y", True, (), 0, 0),
    ]
    shown = api.get(f"/api/tasks/{hold.task_id}").json()["inputs"]
    assert [(line["number"], line["kind"], line["submit"], line["status"]) for line in shown] == [
        (1, "text", False, "delivered"),
        (2, "keys", False, "delivered"),
        (3, "resize", False, "delivered"),
        (4, "text", True, "delivered"),
    ]


def test_C47_what_is_typed_without_enter_changes_no_status_and_an_answer_does(
    api: APIClient, owner: User
) -> None:
    hold = held(owner)
    prompt = {"kind": "text", "text": "go on?", "replies": [], "detected_by": "worker"}
    assert tasks.await_input(hold=hold, prompt=prompt, now=timezone.now())
    path = f"/api/tasks/{hold.task_id}"
    post(api, f"{path}/input", {"text": "half", "submit": False})
    take_input(hold=hold, now=timezone.now())
    assert api.get(path).json()["status"] == "waiting_for_input"
    post(api, f"{path}/input", {"text": "y"})
    before = cursor()
    take_input(hold=hold, now=timezone.now())
    shown = api.get(path).json()
    assert (shown["status"], shown["prompt"]) == ("running", None)
    assert [event.data["status"] for event in events(before) if event.name == "task.status"] == ["running"]


def test_C46_the_same_message_types_once_and_another_meaning_is_refused(api: APIClient, owner: User) -> None:
    hold = held(owner)
    path = f"/api/tasks/{hold.task_id}/input"
    key = {"HTTP_IDEMPOTENCY_KEY": "m"}
    first = post(api, path, {"keys": ["enter"]}, **key)
    assert post(api, path, {"keys": ["enter"]}, **key).json() == first.json()
    error_of(post(api, path, {"keys": ["tab"]}, **key), 409, "idempotency_conflict")
    # The stored answer is gone after a day; the input itself still knows.
    IdempotentAnswer.objects.all().delete()
    assert post(api, path, {"keys": ["enter"]}, **key).json() == first.json()
    error_of(post(api, path, {"text": "enter", "submit": False}, **key), 409, "idempotency_conflict")
    assert TaskInput.objects.count() == 1


def test_C49_a_million_bytes_of_anything_arrive_as_they_were_sent(api: APIClient, owner: User) -> None:
    hold = held(owner)
    text = "'\"$(rm -rf /)`id`\n\r\x1b[200~\x03\x04é🙂;&&|\\" * 26_000
    text = text.encode()[: 1 << 20].decode(errors="ignore")
    assert post(api, f"/api/tasks/{hold.task_id}/input", {"text": text}).status_code == 202
    taken = take_input(hold=hold, now=timezone.now())
    assert taken is not None
    assert taken.text == text


# ── Killing ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_C19_a_kill_in_the_queue_is_an_end_and_of_a_running_one_a_request(
    api: APIClient, owner: User
) -> None:
    queued, hold = new_task(owner, kind="later"), held(owner)
    answer = post(api, f"/api/tasks/{queued.pk}/kill", {"reason": "not needed"})
    assert (answer.status_code, answer.json()["status"], answer.json()["kill_reason"]) == (
        202,
        "killed",
        "not needed",
    )
    path = f"/api/tasks/{hold.task_id}"
    answer = post(api, f"{path}/kill")
    assert (answer.status_code, answer.json()["status"]) == (202, "running")
    assert answer.json()["kill_requested_by"] == 'API key "test"'
    before = cursor()
    assert post(api, f"{path}/kill", {"reason": "once more"}).json()["kill_reason"] is None
    assert events(before) == [], "twice is the same as once"
    end(hold)
    assert api.get(path).json()["status"] == "killed"
    assert post(api, f"{path}/kill").status_code == 200


def test_C22_what_has_ended_is_not_killed_afterwards(api: APIClient, owner: User) -> None:
    hold = held(owner)
    end(hold, exit_code=3, error_code="exit_code", error="exited with 3")
    before = cursor()
    error = error_of(post(api, f"/api/tasks/{hold.task_id}/kill"), 409, "task_over")
    assert error["status"] == "failed"
    row = Task.objects.get()
    assert (row.status, row.exit_code, row.kill_requested_at, events(before)) == ("failed", 3, None, [])


def test_C15_C16_C56_events_of_a_task_are_in_order_and_nothing_comes_after_the_end(
    api: APIClient, owner: User
) -> None:
    before = cursor()
    shown = created(api, {"kind": KIND, "payload": 1})
    hold = hold_of(Task.objects.get())
    tasks.settle(hold=hold, error_code="cannot_start", error="no such program", now=timezone.now())
    post(api, f"/api/tasks/{shown['id']}/input", {"text": "too late"})
    post(api, f"/api/tasks/{shown['id']}/kill")
    told = [(event.name, event.data.get("status"), event.data.get("error")) for event in events(before)]
    assert told == [
        ("task.created", "queued", None),
        ("task.status", "running", None),
        ("task.status", "failed", "no such program"),
    ]
    ended = events(before)[-1].data
    assert ended["finished_at"] == api.get(f"/api/tasks/{shown['id']}").json()["finished_at"]
    assert [event.version for event in events(before)] == sorted({event.version for event in events(before)})


def test_a_login_is_killed_by_canceling_it(api: APIClient) -> None:
    connection_id = new_connection(api)
    waiting(api, connection_id)
    task_id = Task.objects.get().pk
    assert post(api, f"/api/tasks/{task_id}/kill", {"reason": "no"}).json()["status"] == "killed"
    assert api.get(f"/auth/connections/{connection_id}").json()["flow_status"] == "CANCELED"


# ── Hooks ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_C30_a_report_is_sent_again_under_the_same_id(api: APIClient, owner: User) -> None:
    hold = held(owner, hook_url="https://hook.example/", hook_secret=HOOK_SECRET)
    path = f"/api/tasks/{hold.task_id}/redeliver-hook"
    error_of(post(api, path), 409, "no_hook")
    end(hold)
    report = hooks.claim(worker="w", now=timezone.now())
    assert report is not None
    hooks.refused(report=report, status=410, error="410", final=True, now=timezone.now())
    answer = post(api, path, HTTP_IDEMPOTENCY_KEY="again")
    assert (answer.status_code, answer.json()["hook"]["state"]) == (202, "pending")
    assert answer.json()["hook"]["delivery_id"] == report.id
    assert post(api, path, HTTP_IDEMPOTENCY_KEY="again").json() == answer.json()
    assert HookDelivery.objects.get().attempts == 0


# ── Reading ───────────────────────────────────────────────────────────────────────────────────────────────────────


def output(api: APIClient, task_id: str, query: str = "") -> tuple[bytes, dict[str, str]]:
    answer = api.get(f"/api/tasks/{task_id}/output{query}")
    assert answer.status_code == 200, answer.content
    return answer.content, dict(answer.headers)


def test_C50_C51_the_bytes_come_as_they_were_written_also_after_the_end(api: APIClient, owner: User) -> None:
    hold = held(owner)
    data = b"\x00\xff\xe2\x82 line\r\n\x1b[31mred" * 50_000
    for start in range(0, len(data), 300_001):
        write(hold, data[start : start + 300_001])
    end(hold)
    found, headers = output(api, hold.task_id)
    assert found == data
    assert headers["Content-Type"] == "application/octet-stream"
    assert headers["Cache-Control"] == "no-store"
    assert (headers["X-Output-Start"], headers["X-Output-End"], headers["X-Task-Status"]) == (
        "0",
        str(len(data)),
        "completed",
    )
    piece, headers = output(api, hold.task_id, "?from=299990&limit=40")
    assert piece == data[299_990:300_030]
    assert (headers["X-Output-Start"], headers["X-Output-End"], headers["X-Output-Size"]) == (
        "299990",
        "300030",
        str(len(data)),
    )
    assert output(api, hold.task_id, "?tail=33")[0] == data[-33:]
    assert output(api, hold.task_id, "?tail=99999999")[0] == data
    assert output(api, hold.task_id, "?from=live")[0] == b""
    assert output(api, hold.task_id, f"?from={len(data)}")[0] == b""


def test_C50_stripped_it_is_text_and_the_next_piece_begins_where_the_last_one_ended(
    api: APIClient, owner: User
) -> None:
    hold = held(owner)
    data = "\x1b[1mgrün\x1b[0m\x1b]0;title\x07 ✔ \x1b[3".encode() + b"\xff"
    write(hold, data)
    text, start = "", 0
    for limit in (7, 20, 3, 30):
        piece, headers = output(api, hold.task_id, f"?ansi=strip&from={start}&limit={limit}")
        text, start = text + piece.decode(), int(headers["X-Output-End"])
        assert headers["Content-Type"] == "text/plain; charset=utf-8"
    assert text == "grün ✔ �"
    end(hold)
    assert output(api, hold.task_id, "?ansi=strip")[0].decode() == "grün ✔ �"
    assert output(api, hold.task_id, "?ansi=keep")[0] == data


def test_what_was_dropped_is_said(api: APIClient, owner: User, settings: Any) -> None:
    settings.COMMAND_OUTPUT_BYTES = 1024
    hold = held(owner)
    write(hold, b"x" * 1500)
    found, headers = output(api, hold.task_id)
    assert (len(found), headers["X-Output-Dropped"]) == (1024, "476")


@pytest.mark.parametrize(
    "query",
    ["from=-1", "from=x", "tail=x", "from=1&tail=1", "ansi=html", "limit=x", "from=99999999999999999999"],
)
def test_what_is_no_place_in_an_output_is_400(api: APIClient, owner: User, query: str) -> None:
    error_of(api.get(f"/api/tasks/{held(owner).task_id}/output?{query}"), 400, "invalid_request")


def test_an_offset_beyond_the_end_is_refused(api: APIClient, owner: User) -> None:
    error_of(api.get(f"/api/tasks/{held(owner).task_id}/output?from=1"), 400, "invalid_offset")


# ── Who may ───────────────────────────────────────────────────────────────────────────────────────────────────────

ACTS: list[tuple[str, str, Any]] = [
    ("patch", "", {"title": "mine"}),
    ("delete", "", None),
    ("post", "/input", {"text": "y"}),
    ("post", "/kill", {}),
    ("post", "/redeliver-hook", {}),
]
LOOKS = ["", "/output"]


def ask(client: Any, method: str, path: str, body: Any) -> Any:
    return (
        getattr(client, method)(path, body, format="json")
        if body is not None
        else getattr(client, method)(path)
    )


@pytest.mark.parametrize("task_id", ["task_nothing", "..", "%2e%2e%2fetc", "task_%00"])
def test_C58_an_id_leads_to_a_task_or_nowhere(api: APIClient, task_id: str) -> None:
    for method, path, body in [*ACTS, *(("get", path, None) for path in LOOKS)]:
        error_of(ask(api, method, f"/api/tasks/{task_id}{path}", body), 404, "not_found")


def test_C60_what_is_anothers_does_not_exist(
    owner: User, stranger: User, client_of: Callable[[User], APIClient]
) -> None:
    task, foreign = new_task(owner), client_of(stranger)
    before = cursor()
    for method, path, body in [*ACTS, *(("get", path, None) for path in LOOKS)]:
        error_of(ask(foreign, method, f"/api/tasks/{task.pk}{path}", body), 404, "not_found")
    error_of(post(foreign, "/api/tasks", {"kind": "build", "parent_id": task.pk}), 400, "invalid_request")
    assert foreign.get("/api/tasks").json() == []
    assert events(before) == []


def test_C60_who_may_look_sees_and_does_nothing(owner: User, looker: APIClient) -> None:
    command = tasks.create(
        owner_id=owner.pk,
        kind="command",
        title="c",
        spec={"argv": ["true"]},
        actor="owner",
        now=timezone.now(),
    )
    build = new_task(owner)
    before = cursor()
    for task in (build, command):
        for path in LOOKS:
            assert looker.get(f"/api/tasks/{task.pk}{path}").status_code == 200
        for method, path, body in ACTS:
            error_of(ask(looker, method, f"/api/tasks/{task.pk}{path}", body), 403, "forbidden")
    error_of(post(looker, "/api/tasks", {"kind": "build", "parent_id": command.pk}), 403, "forbidden")
    assert events(before) == []


def test_C60_typing_into_a_command_wants_the_right_to_run_some(
    owner: User, stranger: User, client_of: Callable[[User], APIClient]
) -> None:
    team = Group.objects.create(name="operators")
    team.permissions.add(Permission.objects.get(codename="operate_managedauthconnection"))
    owner.groups.add(team)
    stranger.groups.add(team)
    operator = client_of(stranger)
    command = tasks.create(
        owner_id=owner.pk, kind="command", title="c", spec={"argv": ["sh"]}, actor="owner", now=timezone.now()
    )
    error_of(post(operator, f"/api/tasks/{command.pk}/input", {"text": "id"}), 403, "commands_forbidden")
    assert post(operator, f"/api/tasks/{new_task(owner).pk}/input", {"text": "y"}).status_code == 202
    assert post(operator, f"/api/tasks/{command.pk}/kill").status_code == 202, "ending it is no running of it"


def test_C60_the_token_of_a_hosted_page_opens_nothing_here(api: APIClient, owner: User) -> None:
    connection_id = new_connection(api)
    started, _hold, _flow = waiting(api, connection_id)
    page = APIClient()
    token = post(page, f"/auth/connections/{connection_id}/exchange", {"code": started["handoff_code"]})
    page.credentials(HTTP_AUTHORIZATION=f"Bearer {token.json()['jwt']}")
    task_id = Task.objects.get().pk
    for method, path, body in [*ACTS, *(("get", path, None) for path in LOOKS)]:
        error_of(ask(page, method, f"/api/tasks/{task_id}{path}", body), 401, "unauthorized")
    error_of(post(page, "/api/tasks", COMMAND), 401, "unauthorized")
    error_of(page.get("/api/tasks"), 401, "unauthorized")
    error_of(post(page, "/api/work/claim", {"kinds": ["build"], "worker": "w"}), 401, "unauthorized")


def test_the_dashboards_session_opens_it_and_its_posts_want_the_token_of_the_page(owner: User) -> None:
    task = new_task(owner)
    browser = Browser(enforce_csrf_checks=True)
    browser.force_login(owner)
    assert browser.get(f"/api/tasks/{task.pk}").status_code == 200
    for path, body in (
        ("", {"kind": "build"}),
        (f"/{task.pk}/kill", {}),
        (f"/{task.pk}/input", {"text": "y"}),
    ):
        answer = browser.post(f"/api/tasks{path}", body, content_type="application/json")
        error_of(answer, 403, "csrf_failed")
    error_of(browser.delete(f"/api/tasks/{task.pk}"), 403, "csrf_failed")
    browser.get("/connections")
    token = browser.cookies["csrftoken"].value
    answer = browser.post(
        f"/api/tasks/{task.pk}/kill", {}, content_type="application/json", headers={"x-csrftoken": token}
    )
    assert (answer.status_code, answer.json()["kill_requested_by"]) == (202, "owner")


def test_an_unknown_client_id_is_refused_before_anything_is_done(api: APIClient, owner: User) -> None:
    task = new_task(owner)
    for method, path, body in ACTS:
        answer = getattr(api, method)(
            f"/api/tasks/{task.pk}{path}", body, format="json", HTTP_X_CONNECTION_ID="x"
        )
        error_of(answer, 400, "invalid_connection_id")
    assert Task.objects.get().status == "queued"


def test_a_made_up_secret_is_one_that_would_be_accepted(api: APIClient) -> None:
    body = {"kind": "build", "hook_url": "https://hook.example/", "hook_secret": hooks.new_secret()}
    assert created(api, body)["status"] == "queued"
