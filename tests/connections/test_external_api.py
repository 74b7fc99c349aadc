"""Programs that do tasks of their own kind: taken under a lease, kept alive, written to, asked from, ended. An old hold changes nothing."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from typing import Any

import pytest
from django.contrib.auth.models import Group, User
from django.utils import timezone
from rest_framework.test import APIClient

from connections import outputs, payloads, reconciler, registry, tasks, transitions
from connections.access import of_user
from connections.models import Task
from connections.states import TaskStatus
from tests.connections.api_support import error_of, post
from tests.connections.flow_support import cursor, events
from tests.connections.task_support import KIND, new_task

pytestmark = pytest.mark.django_db
NAME = {"worker": "w1"}


@pytest.fixture
def api(owner: User, client_of: Callable[[User], APIClient]) -> APIClient:
    return client_of(owner)


def claim(api: APIClient, **more: Any) -> Any:
    answer = post(api, "/api/work/claim", {"kinds": ["build"], **NAME, **more})
    assert answer.status_code in (200, 204), answer.content
    return answer.json() if answer.content else None


class Work:
    """A task in a program's hands."""

    def __init__(self, api: APIClient, **more: Any) -> None:
        self.api = api
        self.claimed = claim(api, **more)
        assert self.claimed is not None
        self.id = self.claimed["task"]["id"]
        self.hold = {"worker": self.claimed["worker"], "attempt": self.claimed["attempt"]}

    def say(self, verb: str, **more: Any) -> Any:
        return post(self.api, f"/api/work/{self.id}/{verb}", {**self.hold, **more})

    def write(self, data: bytes, **query: Any) -> Any:
        words = "&".join(f"{name}={value}" for name, value in {**self.hold, **query}.items())
        return self.api.post(
            f"/api/work/{self.id}/output?{words}", data, content_type="application/octet-stream"
        )

    @property
    def shown(self) -> Any:
        return self.api.get(f"/api/tasks/{self.id}").json()


def test_the_task_that_waits_longest_is_taken_and_nothing_is_204(api: APIClient, owner: User) -> None:
    first, second = new_task(owner), new_task(owner)
    new_task(owner, kind="other")
    found = claim(api, lease_seconds=60)
    assert (found["task"]["id"], found["attempt"], found["worker"]) == (first.pk, 1, "w1")
    assert (found["task"]["status"], found["task"]["payload"]) == ("running", {"n": 1})
    row = Task.objects.get(pk=first.pk)
    assert row.lease_expires_at is not None
    assert 55 < (row.lease_expires_at - timezone.now()).total_seconds() <= 60
    assert claim(api)["task"]["id"] == second.pk
    assert claim(api) is None


@pytest.mark.parametrize(
    "body",
    [
        {}, {"kinds": [], **NAME}, {"kinds": ["command"], **NAME}, {"kinds": ["login"], **NAME}, {"kinds": ["build"]}, {"kinds": ["build"], "worker": ""},
        {"kinds": ["build"], "worker": "a/b"}, {"kinds": ["build"], "worker": "x" * 49}, {"kinds": ["build"], **NAME, "lease_seconds": 4},
        {"kinds": ["build"], **NAME, "lease_seconds": 3601}, {"kinds": "build", **NAME},
    ],
)  # fmt: skip
def test_only_kinds_of_ones_own_are_taken_and_only_for_a_sensible_time(
    api: APIClient, owner: User, body: Any
) -> None:
    new_task(owner)
    error_of(post(api, "/api/work/claim", body), 400, "invalid_request")
    assert Task.objects.get().status == "queued"


def test_the_same_claim_again_is_the_same_task(api: APIClient, owner: User) -> None:
    new_task(owner)
    new_task(owner)
    body = {"kinds": ["build"], **NAME}
    first = post(api, "/api/work/claim", body, HTTP_IDEMPOTENCY_KEY="k")
    again = post(api, "/api/work/claim", body, HTTP_IDEMPOTENCY_KEY="k")
    assert first.json() == again.json()
    assert Task.objects.filter(status="running").count() == 1


def test_C60_only_tasks_that_the_caller_may_act_on_are_taken(
    owner: User, colleague: User, stranger: User, client_of: Callable[[User], APIClient]
) -> None:
    new_task(owner)
    lookers = Group.objects.create(name="lookers")
    owner.groups.add(lookers)
    stranger.groups.add(lookers)
    assert claim(client_of(stranger)) is None
    work = Work(client_of(colleague))
    looker = client_of(stranger)
    for verb, more in (("heartbeat", {}), ("release", {}), ("status", {"status": "completed"})):
        error_of(post(looker, f"/api/work/{work.id}/{verb}", {**work.hold, **more}), 403, "forbidden")
    assert work.shown["status"] == "running"


def test_C60_another_key_of_the_same_person_does_not_hold_what_this_one_took(
    api: APIClient, owner: User
) -> None:
    new_task(owner)
    work = Work(api)
    _, plain = registry.create_api_key(owner_id=owner.pk, name="other", now=timezone.now())
    other = APIClient()
    other.credentials(HTTP_AUTHORIZATION=f"Bearer {plain}")
    error_of(post(other, f"/api/work/{work.id}/heartbeat", work.hold), 409, "lease_lost")
    query = f"worker={work.hold['worker']}&attempt=1"
    answer = other.post(f"/api/work/{work.id}/output?{query}", b"x", content_type="application/octet-stream")
    error_of(answer, 409, "lease_lost")


def test_a_heartbeat_holds_on_and_tells_what_has_changed(api: APIClient, owner: User) -> None:
    new_task(owner)
    work = Work(api, lease_seconds=5)
    post(api, f"/api/tasks/{work.id}/input", {"text": "a"})
    post(api, f"/api/tasks/{work.id}/input", {"text": "b"})
    shown = work.say("heartbeat", lease_seconds=3600).json()
    assert (shown["status"], shown["kill_requested"], shown["inputs_waiting"]) == ("running", False, 2)
    row = Task.objects.get()
    assert row.lease_expires_at is not None
    assert (row.lease_expires_at - timezone.now()).total_seconds() > 3500
    post(api, f"/api/tasks/{work.id}/kill")
    shown = work.say("heartbeat", inputs_taken=1).json()
    assert (shown["kill_requested"], shown["inputs_waiting"]) == (True, 1)
    assert [line["status"] for line in work.shown["inputs"]] == ["delivered", "waiting"]
    assert work.say("heartbeat", inputs_taken=1).json()["inputs_waiting"] == 1, "again is no change"


def test_C50_what_is_written_is_exact_and_a_repetition_adds_nothing(api: APIClient, owner: User) -> None:
    new_task(owner)
    work = Work(api)
    assert work.write(b"\x00\xffone").json() == {"end": 5, "dropped": 0, "next": 5}
    for _ in range(2):
        assert work.write(b"two", at=5).json()["end"] == 8
    assert work.write(b"othree", at=7).json()["end"] == 13, (
        "the byte that is there already is not added again"
    )
    error = error_of(work.write(b"x", at=20), 409, "gap")
    assert error["end"] == 13
    assert outputs.read(work.id, 0) == b"\x00\xffonetwothree"
    assert work.write(b"").json()["end"] == 13


@pytest.mark.parametrize(
    "query",
    ["", "worker=w1", "attempt=1", "worker=w1&attempt=x", "worker=w1&attempt=0", "worker=w1&attempt=1&at=x"],
)
def test_writing_without_saying_who_writes_is_400(api: APIClient, owner: User, query: str) -> None:
    new_task(owner)
    work = Work(api)
    answer = api.post(f"/api/work/{work.id}/output?{query}", b"x", content_type="application/octet-stream")
    error_of(answer, 400, "invalid_request")


def test_C17_C18_a_question_is_shown_with_its_replies_until_somebody_answers(
    api: APIClient, owner: User
) -> None:
    new_task(owner)
    work = Work(api)
    before = cursor()
    prompt = {
        "kind": "yes_no",
        "text": "Deploy?",
        "replies": [{"label": "Yes", "text": "y"}, {"label": "Stop", "keys": ["ctrl-c"]}],
    }
    shown = work.say("status", status="waiting_for_input", prompt=prompt).json()
    assert (shown["status"], shown["prompt"]) == ("waiting_for_input", {**prompt, "detected_by": "worker"})
    work.say("status", status="waiting_for_input", prompt=prompt)
    assert [event.name for event in events(before)] == ["task.status"], "the same question again is no change"
    assert work.say("status", status="running").json()["prompt"] is None
    secret = {"kind": "password", "text": "Password:", "replies": [{"label": "x", "text": "hunter2"}]}
    assert work.say("status", status="waiting_for_input", prompt=secret).json()["prompt"]["replies"] == []


def test_who_asks_while_something_waits_is_told_so(api: APIClient, owner: User) -> None:
    new_task(owner)
    work = Work(api)
    post(api, f"/api/tasks/{work.id}/input", {"text": "early"})
    shown = work.say("status", status="waiting_for_input", prompt={"text": "?"}).json()
    assert (shown["status"], shown["inputs_waiting"]) == ("running", 1)


@pytest.mark.parametrize(
    ("how", "status", "code"),
    [
        ({"status": "completed", "exit_code": 0}, "completed", None),
        (
            {"status": "failed", "exit_code": 3, "error": "tests failed", "error_code": "exit_code"},
            "failed",
            "exit_code",
        ),
        ({"status": "failed"}, "failed", "failed"),
    ],
)
def test_C16_C32_the_end_is_told_once_and_is_final(
    api: APIClient, owner: User, how: Any, status: str, code: str | None
) -> None:
    new_task(owner)
    work = Work(api)
    before = cursor()
    shown = post(api, f"/api/work/{work.id}/status", {**work.hold, **how}, HTTP_IDEMPOTENCY_KEY="end")
    assert (shown.json()["status"], shown.json()["error_code"]) == (status, code)
    again = post(api, f"/api/work/{work.id}/status", {**work.hold, **how}, HTTP_IDEMPOTENCY_KEY="end")
    assert again.json() == shown.json(), "an answer that was lost is given again"
    assert [event.name for event in events(before)] == ["task.status"]
    for verb, more in (
        ("status", {"status": "running"}),
        ("heartbeat", {}),
        ("release", {}),
        ("status", {"status": "failed"}),
    ):
        error_of(work.say(verb, **more), 409, "lease_lost")
    error_of(work.write(b"late"), 409, "lease_lost")


@pytest.mark.parametrize(
    "body",
    [
        {"status": "queued"}, {"status": "killed"}, {"status": "running", "exit_code": 1}, {"status": "waiting_for_input"}, {"status": "completed", "error": "x"},
        {"status": "waiting_for_input", "prompt": {"text": "?", "replies": [{"label": "x"}]}}, {"status": "waiting_for_input", "prompt": {"kind": "text"}},
        {"status": "waiting_for_input", "prompt": {"text": "?", "replies": [{"label": "x", "text": "a", "keys": ["enter"]}]}},
    ],
)  # fmt: skip
def test_what_is_no_status_of_a_program_is_400(api: APIClient, owner: User, body: Any) -> None:
    new_task(owner)
    work = Work(api)
    error_of(work.say("status", **body), 400, "invalid_request")
    assert work.shown["status"] == "running"


def test_C23_what_ends_after_a_kill_was_asked_for_is_killed(api: APIClient, owner: User) -> None:
    for how in ({"status": "completed"}, {"status": "failed", "error": "terminated"}):
        new_task(owner)
        work = Work(api)
        post(api, f"/api/tasks/{work.id}/kill", {"reason": "enough"})
        assert work.say("status", **how).json()["status"] == "killed"
        assert (work.shown["kill_reason"], work.shown["error"]) == ("enough", None)


def test_what_is_given_back_is_taken_again_under_another_attempt(api: APIClient, owner: User) -> None:
    new_task(owner)
    work = Work(api)
    assert work.say("release").status_code == 204
    assert work.shown["status"] == "queued"
    again = Work(api)
    assert (again.id, again.hold["attempt"]) == (work.id, 2)
    error_of(work.say("heartbeat"), 409, "lease_lost")
    post(api, f"/api/tasks/{work.id}/kill")
    assert again.say("release").status_code == 204
    assert work.shown["status"] == "killed"


def test_C19_a_program_that_goes_on_after_a_kill_loses_its_task_all_the_same(
    api: APIClient, owner: User
) -> None:
    task = new_task(owner)
    work = Work(api, lease_seconds=3600)
    post(api, f"/api/tasks/{work.id}/kill", {"reason": "enough"})
    task.refresh_from_db()
    assert task.kill_requested_at is not None
    end = task.kill_requested_at + tasks.KILL_PATIENCE
    assert task.lease_expires_at == end
    shown = work.say("heartbeat", lease_seconds=3600).json()
    assert (shown["kill_requested"], shown["lease_expires_at"]) == (True, payloads.timestamp(end))
    assert not reconciler.rescue_tasks(end - dt.timedelta(seconds=1))
    assert reconciler.rescue_tasks(end) == 1
    assert (work.shown["status"], work.shown["kill_reason"]) == ("killed", "enough")
    error_of(work.say("heartbeat"), 409, "lease_lost")


def test_what_is_handed_around_for_ever_has_failed(
    api: APIClient, owner: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "GIVEN_BACK", 3)
    new_task(owner)
    for attempt in (1, 2, 3):
        work = Work(api)
        assert work.hold["attempt"] == attempt
        assert work.say("release").status_code == 204
    assert (work.shown["status"], work.shown["error_code"]) == ("failed", "given_back")
    assert post(api, "/api/work/claim", {"kinds": [KIND], "worker": "w"}).status_code == 204


def test_a_program_that_died_loses_its_task_to_the_next_and_after_some_it_has_failed(
    api: APIClient, owner: User, settings: Any
) -> None:
    """The rules of our own workers: the reconciler's rescue."""
    settings.TASK_ATTEMPTS = 2
    new_task(owner)
    work = Work(api, lease_seconds=5)
    work.write(b"half")
    later = timezone.now() + dt.timedelta(seconds=6)
    assert reconciler.rescue_tasks(later) == 1
    assert work.shown["status"] == "queued"
    again = Work(api, lease_seconds=5)
    assert (again.id, again.hold["attempt"]) == (work.id, 2)
    error_of(work.write(b"from beyond"), 409, "lease_lost")
    assert reconciler.rescue_tasks(timezone.now() + dt.timedelta(seconds=6)) == 1
    shown = work.shown
    assert (shown["status"], shown["error_code"], shown["output_bytes"]) == ("failed", "worker_lost", 4)


def test_C23_a_program_that_died_after_a_kill_leaves_a_killed_task(api: APIClient, owner: User) -> None:
    new_task(owner)
    work = Work(api, lease_seconds=5)
    transitions.kill_task(task_id=work.id, actor=of_user(owner), reason="", now=timezone.now())
    reconciler.rescue_tasks(timezone.now() + dt.timedelta(seconds=6))
    assert work.shown["status"] == "killed"


def test_C60_what_is_anothers_does_not_exist_for_a_program(
    api: APIClient, owner: User, stranger: User, client_of: Callable[[User], APIClient]
) -> None:
    new_task(owner)
    work = Work(api)
    foreign = client_of(stranger)
    for verb, more in (("heartbeat", {}), ("release", {}), ("status", {"status": "completed"})):
        error_of(post(foreign, f"/api/work/{work.id}/{verb}", {**work.hold, **more}), 404, "not_found")
    answer = foreign.post(f"/api/work/{work.id}/output?worker=w1&attempt=1", b"x", content_type="text/plain")
    error_of(answer, 404, "not_found")
    error_of(post(APIClient(), "/api/work/claim", {"kinds": ["build"], **NAME}), 401, "unauthorized")
    assert tasks.held(task_id=work.id, worker=Task.objects.get().leased_by, attempt=1)
    assert Task.objects.get().status == TaskStatus.RUNNING


def test_a_browsers_session_does_no_work(owner: User, client: Any) -> None:
    client.force_login(owner)
    answer = client.post("/api/work/claim", {"kinds": ["build"], **NAME}, content_type="application/json")
    error_of(answer, 401, "unauthorized")
