"""Lines for a task: verbs, API, page. Who may send them, in which order they arrive, and that their text is nowhere else."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable
from typing import Any

import pytest
from django.contrib.auth.models import Group, User
from django.db import IntegrityError, transaction
from django.test import Client
from django.utils import timezone
from rest_framework.test import APIClient

from connections import fragments, inputs, task_inputs, tasks, transitions, vault
from connections.access import of_user
from connections.models import Task, TaskInput
from connections.states import TaskKind, TaskStatus
from connections.tasks import Hold
from events import log
from events.models import Event
from tests.connections.api_support import error_of, post
from tests.connections.flow_support import T0, Story, after, cursor, events, locked
from tests.connections.task_support import take_input

pytestmark = pytest.mark.django_db
SECRET = "unmistakable-passw0rd"


def command(owner: User, **story: Any) -> Task:
    """A command that waits for a worker."""
    row = Story.of(owner, **story).connection
    return tasks.enqueue(kind=TaskKind.COMMAND, title="refactor", connection=row, actor="owner", now=T0)


def taken(task: Task) -> Hold:
    hold = tasks.claim(worker="w", kinds=[TaskKind.COMMAND], now=T0)
    assert hold is not None
    assert hold.task_id == task.id
    return hold


def text_of(taken: task_inputs.Input | None) -> str | None:
    return None if taken is None else taken.text


def send(task: Task, text: str = "y", message_id: str | None = None, actor: str = "op1") -> TaskInput:
    return task_inputs.add_input(
        task_id=task.id, content=text, message_id=message_id or str(uuid.uuid4()), actor=actor, now=T0
    )


def end(task: Task, status: TaskStatus = TaskStatus.COMPLETED) -> None:
    with transaction.atomic():
        tasks.finish(locked(task), status, actor="w", now=T0)


# ── Verbs ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_B66_lines_are_delivered_in_the_order_of_acceptance_whatever_the_task_does(owner: User) -> None:
    task = command(owner)
    send(task, "while it is queued")
    hold = taken(task)
    send(task, "while it runs")
    with transaction.atomic():
        tasks.wait_for_input(locked(task), actor="w", now=T0)
    send(task, "while it waits")
    assert [text_of(take_input(hold=hold, now=after(n))) for n in range(4)] == [
        "while it is queued",
        "while it runs",
        "while it waits",
        None,
    ]
    assert list(task.inputs.order_by("number").values_list("number", flat=True)) == [1, 2, 3]


def test_a_line_is_told_as_a_count_and_its_text_is_in_no_event(owner: User) -> None:
    task = command(owner)
    before = cursor()
    send(task, SECRET, actor="op2")
    hold = taken(task)
    assert text_of(take_input(hold=hold, now=T0)) == SECRET
    told = [event for event in events(before) if event.name == "task.updated"]
    assert [(event.actor, event.data["inputs_waiting"]) for event in told] == [("op2", 1), ("w", 0)]
    assert told[0].data["version"] < told[1].data["version"]
    assert SECRET not in json.dumps([event.data for event in events()])


def test_A48_a_line_is_encrypted_while_it_waits_and_erased_when_it_is_taken(owner: User) -> None:
    task = command(owner)
    line = send(task, SECRET)
    assert SECRET.encode() not in bytes(line.sealed)
    assert vault.unseal(line.sealed) == SECRET
    assert SECRET not in repr(TaskInput.objects.values().get())
    take_input(hold=taken(task), now=after(3))
    line.refresh_from_db()
    assert (line.sealed, line.taken_at, line.state) == (None, after(3), "delivered")
    with pytest.raises(IntegrityError), transaction.atomic():
        TaskInput.objects.update(sealed=vault.seal(SECRET))


@pytest.mark.parametrize("how", [TaskStatus.COMPLETED, TaskStatus.FAILED, TaskStatus.KILLED])
def test_lines_that_nobody_will_read_are_erased_with_the_end_of_the_task(
    owner: User, how: TaskStatus
) -> None:
    task = command(owner)
    send(task, SECRET)
    taken(task)
    end(task, how)
    line = TaskInput.objects.select_related("task").get()
    assert (line.sealed, line.taken_at, line.state) == (None, None, "dropped")
    task.refresh_from_db()
    assert task.inputs_waiting == 0


def test_a_deleted_connection_takes_the_lines_of_its_commands_with_it(owner: User) -> None:
    task = command(owner)
    send(task, SECRET)
    assert task.connection_id is not None
    transitions.delete_connection(connection_id=task.connection_id, actor=of_user(owner), now=T0)
    assert TaskInput.objects.get().sealed is None


def test_lines_outlive_the_worker_that_did_not_take_them(owner: User) -> None:
    """Those of a command go with it: it is not run again by itself."""
    task = tasks.create(owner_id=owner.pk, kind="build", title="b", spec={}, actor="owner", now=T0)
    send(task, "first")
    hold = tasks.claim(worker="w", kinds=["build"], now=T0)
    assert hold is not None
    send(task, "second")
    assert text_of(take_input(hold=hold, now=T0)) == "first"
    assert transitions.rescue(task_id=task.id, now=after(3600))
    with pytest.raises(tasks.LeaseLost):
        take_input(hold=hold, now=T0)
    again = tasks.claim(worker="w2", kinds=["build"], now=after(3600))
    assert again is not None
    assert text_of(take_input(hold=again, now=after(3600))) == "second"


def test_the_same_message_is_the_same_line_and_another_text_is_refused(owner: User) -> None:
    task = command(owner)
    first = send(task, SECRET, "m1")
    before = cursor()
    assert send(task, SECRET, "m1", actor="somebody else").pk == first.pk
    with pytest.raises(task_inputs.MessageConflict):
        send(task, "other words", "m1")
    take_input(hold=taken(task), now=T0)
    end(task)
    # Also when it was delivered long ago, and the task is over.
    assert send(task, SECRET, "m1").pk == first.pk
    assert TaskInput.objects.count() == 1
    assert [event.name for event in events(before)].count("task.updated") == 1, "the delivery"


def test_the_same_message_id_at_another_task_is_another_line(owner: User) -> None:
    one, other = command(owner), command(owner, domain="b.example")
    assert send(one, "y", "m1").pk != send(other, "y", "m1").pk


@pytest.mark.parametrize("kind", sorted(tasks.TAKES_NONE))
def test_a_task_with_questions_of_its_own_takes_no_lines(owner: User, kind: TaskKind) -> None:
    row = Story.of(owner).connection
    task = tasks.enqueue(kind=kind, title="t", connection=row, actor="owner", now=T0)
    with pytest.raises(task_inputs.TakesNoInput):
        send(task)
    assert not TaskInput.objects.exists()


def test_B72_a_full_queue_takes_nothing_of_a_line(owner: User, monkeypatch: pytest.MonkeyPatch) -> None:
    task = command(owner)
    monkeypatch.setattr(task_inputs, "TASK_INPUT_LIMIT", 3)
    for n in range(3):
        send(task, f"{n}")
    before = cursor()
    with pytest.raises(task_inputs.InputQueueFull, match="3 lines wait"):
        send(task, "one too many")
    task.refresh_from_db()
    assert (TaskInput.objects.count(), task.inputs_waiting, events(before)) == (3, 3, [])
    assert text_of(take_input(hold=taken(task), now=T0)) == "0"
    assert send(task, "room again").number == 4


def test_B72_the_bytes_that_wait_are_bounded_too(owner: User, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task_inputs, "TASK_INPUT_BYTES", 10)
    task = command(owner)
    send(task, "ü" * 4)
    with pytest.raises(task_inputs.InputQueueFull):
        send(task, "abc")
    assert send(task, "ab").byte_count == 2
    assert text_of(take_input(hold=taken(task), now=T0)) == "ü" * 4
    assert send(task, "abcdefgh").number == 3


# ── API ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def api(owner: User, client_of: Callable[[User], APIClient]) -> APIClient:
    return client_of(owner)


def path_of(task: Task) -> str:
    return f"/api/tasks/{task.id}/input"


def test_B43_an_accepted_line_is_answered_with_a_receipt(api: APIClient, owner: User) -> None:
    task = command(owner)
    message = str(uuid.uuid4())
    answer = post(api, path_of(task), {"text": "y"}, HTTP_IDEMPOTENCY_KEY=message)
    assert answer.status_code == 202
    assert answer.json() == {"accepted": True, "client_message_id": message, "task_id": task.id}
    line = TaskInput.objects.get()
    assert (line.message_id, line.submitted_by, line.byte_count) == (message, 'API key "test"', 1)


def test_B43_without_a_message_id_the_server_names_the_message(api: APIClient, owner: User) -> None:
    task = command(owner)
    named = {post(api, path_of(task), {"text": "y"}).json()["client_message_id"] for _ in range(2)}
    assert len(named) == TaskInput.objects.count() == 2
    assert all(uuid.UUID(name) for name in named)


def test_the_message_id_may_stand_in_the_body_but_not_differ_from_the_header(
    api: APIClient, owner: User
) -> None:
    task = command(owner)
    body = {"text": "y", "client_message_id": "m-1"}
    first = post(api, path_of(task), body)
    again = post(api, path_of(task), {"text": "y"}, HTTP_IDEMPOTENCY_KEY="m-1")
    both = post(api, path_of(task), body, HTTP_IDEMPOTENCY_KEY="m-1")
    assert first.json() == again.json() == both.json()
    error = error_of(post(api, path_of(task), body, HTTP_IDEMPOTENCY_KEY="m-2"), 400, "invalid_request")
    assert "Idempotency-Key" in error["message"]
    assert TaskInput.objects.count() == 1


@pytest.mark.parametrize(
    "text",
    [
        "a",
        " ",
        "\n",
        "'; rm -rf / #\n$(id) `id` \\",
        "\x1b[A\x03\t",
        "ü🙂",
        "x" * inputs.MAX_LINE,
        "🙂" * (inputs.MAX_LINE // 4),
    ],
)
def test_any_text_arrives_as_it_was_written(api: APIClient, owner: User, text: str) -> None:
    task = command(owner)
    assert post(api, path_of(task), {"text": text}).status_code == 202
    assert text_of(take_input(hold=taken(task), now=T0)) == text


@pytest.mark.parametrize(
    "body",
    [
        {}, {"text": ""}, {"text": 5}, {"text": None}, {"text": ["a"]}, {"text": "x" * (inputs.MAX_LINE + 1)},
        {"text": "🙂" * (inputs.MAX_LINE // 4 + 1)}, {"text": "a", "submit": 1}, {"text": "a", "enter": True}, {"submit": True},
        {"text": "a", "keys": ["enter"]}, {"keys": []}, {"keys": ["ctrl-alt-del"]}, {"keys": "enter"}, {"keys": ["enter"], "submit": True},
        {"rows": 24}, {"rows": 0, "cols": 80}, {"rows": 24, "cols": 80, "text": "a"}, {"rows": 24, "cols": 2001}, {"text": "a", "client_message_id": 7}, {"text": "a", "client_message_id": ""}, [], "a",
    ],
)  # fmt: skip
def test_B50_what_is_no_line_is_400_and_nothing_is_kept(api: APIClient, owner: User, body: Any) -> None:
    task = command(owner)
    error_of(api.post(path_of(task), body, format="json"), 400, "invalid_request")
    assert not TaskInput.objects.exists()


def test_the_error_of_a_line_does_not_repeat_it(api: APIClient, owner: User) -> None:
    task = command(owner)
    answer = post(api, path_of(task), {"text": SECRET * 60_000})
    error_of(answer, 400, "invalid_request")
    assert SECRET not in answer.content.decode()


def test_a_task_that_is_over_says_how_it_ended(api: APIClient, owner: User) -> None:
    task = command(owner)
    taken(task)
    end(task, TaskStatus.FAILED)
    error = error_of(post(api, path_of(task), {"text": "y"}), 409, "task_over")
    assert error["status"] == "failed"
    assert not TaskInput.objects.exists()


def test_a_login_takes_no_lines(api: APIClient, owner: User) -> None:
    story = Story.of(owner)
    story.start()
    error_of(post(api, path_of(story.task()), {"text": "y"}), 409, "takes_no_input")


def test_B72_a_full_queue_is_429_with_the_reason_and_the_same_message_is_accepted_later(
    api: APIClient, owner: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(task_inputs, "TASK_INPUT_LIMIT", 1)
    task = command(owner)
    post(api, path_of(task), {"text": "1"})
    for _ in range(2):
        answer = post(api, path_of(task), {"text": "2"}, HTTP_IDEMPOTENCY_KEY="m-2")
        assert "1 lines wait" in error_of(answer, 429, "queue_full")["message"]
        assert int(answer["Retry-After"]) >= 1
    take_input(hold=taken(task), now=T0)
    assert post(api, path_of(task), {"text": "2"}, HTTP_IDEMPOTENCY_KEY="m-2").status_code == 202
    assert TaskInput.objects.count() == 2


def test_B49_a_task_that_does_not_exist_or_is_anothers_is_404(
    owner: User, stranger: User, client_of: Callable[[User], APIClient]
) -> None:
    task = command(owner)
    foreign = client_of(stranger)
    for address in (f"/api/tasks/{task.id}", f"/api/tasks/{task.id}/input", "/api/tasks/task_no/input"):
        answer = foreign.get(address) if address.endswith(task.id) else post(foreign, address, {"text": "y"})
        error_of(answer, 404, "not_found")
    assert not TaskInput.objects.exists()


def test_C60_who_may_only_look_sees_the_task_and_sends_nothing(
    owner: User, colleague: User, stranger: User, client_of: Callable[[User], APIClient]
) -> None:
    task = command(owner)
    lookers = Group.objects.create(name="lookers")
    owner.groups.add(lookers)
    stranger.groups.add(lookers)
    looker = client_of(stranger)
    assert looker.get(f"/api/tasks/{task.id}").status_code == 200
    error_of(post(looker, path_of(task), {"text": "y"}), 403, "forbidden")
    assert post(client_of(colleague), path_of(task), {"text": "y"}).status_code == 202
    page = Client()
    page.force_login(stranger)
    assert "data-outbox" not in page.get(f"/tasks/{task.id}").content.decode()
    assert page.post(f"/tasks/{task.id}/input", {"text": "y"}).status_code == 403
    assert TaskInput.objects.count() == 1


def test_a_task_is_shown_with_its_lines_and_never_their_texts(api: APIClient, owner: User) -> None:
    task = command(owner)
    send(task, SECRET, "m-1")
    send(task, "second", "m-2")
    take_input(hold=taken(task), now=after(2))
    answer = api.get(f"/api/tasks/{task.id}")
    shown = answer.json()
    assert (shown["status"], shown["kind"], shown["inputs_waiting"]) == ("running", "command", 1)
    assert [(line["number"], line["client_message_id"], line["status"]) for line in shown["inputs"]] == [
        (1, "m-1", "delivered"),
        (2, "m-2", "waiting"),
    ]
    assert shown["inputs"][0]["taken_at"] == "2026-03-01T12:00:02.000Z"
    assert SECRET not in answer.content.decode()
    end(task)
    last = api.get(f"/api/tasks/{task.id}").json()
    assert (last["inputs"][1]["status"], last["inputs_waiting"]) == ("dropped", 0)


def test_tasks_are_listed_newest_first_by_status_and_in_pages(
    api: APIClient, owner: User, stranger: User
) -> None:
    made = [command(owner, domain=f"{n}.example") for n in range(3)]
    Task.objects.filter(pk=made[2].pk).update(created_at=after(9))
    tasks.claim(worker="w", kinds=[TaskKind.COMMAND], now=T0)
    command(stranger)
    ids = [row["id"] for row in api.get("/api/tasks").json()]
    assert ids[0] == made[2].id
    assert set(ids) == {task.id for task in made}
    running = api.get("/api/tasks?status=running").json()
    assert [row["status"] for row in running] == ["running"]
    page = api.get("/api/tasks?limit=2")
    assert (page["X-Has-More"], page["X-Next-Offset"], len(page.json())) == ("true", "2", 2)
    error_of(api.get("/api/tasks?status=asleep"), 400, "invalid_request")


def test_looking_at_a_task_costs_the_same_whatever_waits(
    api: APIClient, owner: User, django_assert_max_num_queries: Any
) -> None:
    task = command(owner)
    for n in range(30):
        send(task, f"{n}")
    with django_assert_max_num_queries(8):
        api.get(f"/api/tasks/{task.id}")


# ── The page ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def web(owner: User) -> Client:
    client = Client()
    client.force_login(owner)
    return client


def test_the_page_of_a_task_shows_its_state_its_lines_and_its_form(web: Client, owner: User) -> None:
    task = command(owner)
    send(task, SECRET, actor="op2")
    take_input(hold=taken(task), now=T0)
    send(task, "abc", actor="op3")
    page = web.get(f"/tasks/{task.id}").content.decode()
    assert "refactor" in page
    assert "Working" in page
    assert re.search(r"op2 sent \d+ bytes: delivered", page)
    assert "op3 sent 3 bytes: waiting" in page
    assert "(1 waiting)" in page
    assert SECRET not in page
    assert f'data-outbox="task:{task.id}" method="post" action="/tasks/{task.id}/input"' in page
    assert "data-outbox-list" in page
    told = re.findall(r'<span class="moment-text">(.*?) <span class="muted">by (\w+)', page)
    assert set(told) == {
        ("queued", "owner"),
        ("started", "w"),
        (f"sent {len(SECRET.encode())} bytes: delivered", "op2"),
        ("sent 3 bytes: waiting", "op3"),
    }


def test_a_line_does_not_change_since_when_the_task_is_in_its_state(web: Client, owner: User) -> None:
    task = command(owner)
    taken(task)
    task_inputs.add_input(task_id=task.id, content="y", message_id="m-1", actor="op1", now=after(600))
    page = web.get(f"/tasks/{task.id}").content.decode()
    since = re.search(r'since <time datetime="([^"]+)"', page)
    assert since is not None
    assert since.group(1).startswith("2026-03-01T12:00:00")


def test_the_page_of_a_login_or_of_a_task_that_is_over_has_no_form(web: Client, owner: User) -> None:
    story = Story.of(owner)
    story.start()
    page = web.get(f"/tasks/{story.task().id}").content.decode()
    assert "data-outbox" not in page
    assert f'href="/connections/{story.id}"' in page
    task = command(owner, domain="b.example")
    taken(task)
    end(task)
    assert "data-outbox" not in web.get(f"/tasks/{task.id}").content.decode()


def test_a_foreign_task_has_no_page(owner: User, stranger: User) -> None:
    task = command(owner)
    client = Client()
    client.force_login(stranger)
    assert client.get(f"/tasks/{task.id}").status_code == 404
    assert client.post(f"/tasks/{task.id}/input", {"text": "y"}).status_code == 404


def test_rows_of_the_list_lead_to_the_task(web: Client, owner: User) -> None:
    task = command(owner)
    assert f'href="/tasks/{task.id}"' in web.get("/tasks").content.decode()


def test_without_script_the_form_is_a_plain_post_that_arrives_once(owner: User) -> None:
    task = command(owner)
    strict = Client(enforce_csrf_checks=True)
    strict.force_login(owner)
    page = strict.get(f"/tasks/{task.id}").content.decode()
    form = page[page.index("data-outbox=") :]
    names = ("csrfmiddlewaretoken", "message_id")
    sent = {name: re.search(rf'name="{name}" value="([^"]+)"', form) for name in names}
    fields = {name: found.group(1) for name, found in sent.items() if found} | {"text": "one\r\ntwo"}
    assert strict.post(f"/tasks/{task.id}/input", {"text": "y"}).status_code == 403
    for _ in range(2):
        answer = strict.post(f"/tasks/{task.id}/input", fields)
        assert (answer.status_code, answer["Location"]) == (302, f"/tasks/{task.id}")
    assert "The line was accepted." in strict.get(f"/tasks/{task.id}").content.decode()
    other = strict.post(f"/tasks/{task.id}/input", {**fields, "text": "three"}, follow=True)
    assert "sent before, with other content" in other.content.decode()
    # What the script of the page would have sent instead is the same message.
    api = APIClient()
    api.force_login(owner)
    post(api, path_of(task), {"text": "one\ntwo"}, HTTP_IDEMPOTENCY_KEY=fields["message_id"])
    assert text_of(take_input(hold=taken(task), now=T0)) == "one\ntwo"
    assert TaskInput.objects.count() == 1
    assert strict.get(f"/tasks/{task.id}").content.decode().count(fields["message_id"]) == 0, "a new page"


def test_without_script_a_refused_line_says_why(web: Client, owner: User) -> None:
    task = command(owner)
    empty = web.post(f"/tasks/{task.id}/input", {"text": ""}, follow=True).content.decode()
    assert "may not be blank" in empty
    taken(task)
    end(task)
    late = web.post(f"/tasks/{task.id}/input", {"text": "y"}, follow=True).content.decode()
    assert "This task is over" in late
    assert not TaskInput.objects.exists()


def test_the_stream_sends_the_parts_of_the_page_with_their_version(web: Client, owner: User) -> None:
    task = command(owner)
    send(task, SECRET)
    event = Event.objects.filter(topic=f"task:{task.id}").order_by("-id")[0]
    html = fragments.live_message(log.envelope(event))
    assert html is not None
    task.refresh_from_db()
    for part in ("task", "state", "lines", "timeline", "facts", "attn"):
        assert f'<hx-partial hx-target="#{part}-{task.id}" hx-swap="outerMorph"><' in html
    assert html.count(f'data-rev="{task.version}"') == 6
    assert SECRET not in html
    page = web.get(f"/tasks/{task.id}").content.decode()
    lines = re.search(rf'<section [^>]*id="lines-{task.id}".*?</section>', page, re.DOTALL)
    assert lines is not None
    assert lines.group() in html


def test_B42_running_and_waiting_are_said_by_the_server_and_follow_from_nothing_that_was_sent(
    owner: User,
) -> None:
    task = command(owner)

    def told_by(act: Callable[[], object]) -> list[tuple[str, str]]:
        mark = cursor()
        act()
        return [(event.name, str(event.data["status"])) for event in events(mark)]

    def shown() -> str:
        (newest,) = log.read_envelopes(log.newest() - 1, 1)[0]
        html = fragments.live_message(newest)
        assert html is not None
        found = re.search(r'id="state-[^"]*".*?class="chip[^>]*>.*?<span>([^<]+)</span>', html, re.DOTALL)
        assert found is not None, html
        return found[1]

    def wait() -> None:
        with transaction.atomic():
            tasks.wait_for_input(locked(task), actor="w", now=T0)

    def go_on() -> None:
        with transaction.atomic():
            tasks.resume(locked(task), actor="w", now=T0)

    assert told_by(lambda: send(task)) == [("task.updated", "queued")]
    assert shown() == "Queued", "a line that was sent sets nothing in motion"
    assert told_by(lambda: taken(task)) == [("task.status", "running")]
    assert shown() == "Working"
    assert told_by(wait) == [("task.status", "waiting_for_input")]
    assert shown() == "Waiting for you"
    assert told_by(lambda: send(task)) == [("task.updated", "waiting_for_input")]
    assert shown() == "Waiting for you", "not before the task itself goes on"
    assert told_by(go_on) == [("task.status", "running")]
    assert told_by(lambda: end(task)) == [("task.status", "completed")]
    assert shown() == "Done"


def test_the_constraints_hold_what_the_verbs_promise(owner: User) -> None:
    task = command(owner)
    line = send(task, "a", "m-1")
    same: Any = {
        "task": task,
        "fingerprint": "f",
        "byte_count": 1,
        "submitted_by": "x",
        "created_at": timezone.now(),
    }
    for wrong in ({"number": line.number, "message_id": "m-2"}, {"number": 9, "message_id": "m-1"}):
        with pytest.raises(IntegrityError), transaction.atomic():
            TaskInput.objects.create(**same, **wrong)
