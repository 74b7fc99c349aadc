"""The pages of tasks, without a browser: who may what, the form of a new command, what stands in the page itself."""

from __future__ import annotations

import datetime as dt
import json
import re
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from django.contrib.auth.models import Group, Permission, User
from django.test import Client
from django.utils import timezone

from connections import fragments, outputs, task_forms, task_inputs, task_picture, tasks, transitions, vault
from connections.access import of_user
from connections.models import HookDelivery, Task, TaskInput
from connections.states import InputKind, TaskStatus
from events import log
from events.models import Event
from tests.connections.task_support import take_input

pytestmark = pytest.mark.django_db(transaction=True)

SCRIPT: Any = {"HTTP_HX_REQUEST": "true"}
ASKS = {
    "kind": "yes_no",
    "text": "Proceed? (y/n)",
    "replies": [{"label": "Yes", "text": "y"}, {"label": "Down", "keys": ["down", "enter"]}],
    "detected_by": "read",
}


def now() -> dt.datetime:
    return timezone.now()


@pytest.fixture
def web(owner: User) -> Client:
    client = Client()
    client.force_login(owner)
    return client


def make(owner: User, *argv: str, kind: str = "command", **more: Any) -> Task:
    spec = {"argv": list(argv or ("make", "all")), "cwd": "/srv/work", "template": "", "rows": 24, "cols": 80}
    return tasks.create(
        owner_id=owner.pk, kind=kind, title=more.pop("title", "build"), spec=spec, actor=owner.username, now=now(), **more
    )  # fmt: skip


def run(task: Task, output: bytes = b"", *, asks: Any = None) -> tasks.Hold:
    hold = tasks.claim(worker="worker-1", kinds=[task.kind], now=now())
    assert hold is not None
    if output:
        outputs.append(task_id=task.id, worker=hold.worker, attempt=hold.attempt, data=output, now=now())
    if asks is not None:
        tasks.await_input(hold=hold, prompt=asks, now=now())
    return hold


def typed(**fields: str) -> dict[str, str]:
    return {"command": "echo 'a b' $HOME", "reading": "words", "message_id": "m-1", **fields}


# ── The list ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_list_shows_what_waits_for_what_and_how_long_things_took(web: Client, owner: User) -> None:
    asking = make(owner, title="asking", labels=["nightly"])
    run(asking, asks=ASKS)
    ended = make(owner, title="ended")
    tasks.settle(
        hold=run(ended), exit_code=3, error_code="exit_code", error="It ended with exit code 3.", now=now()
    )
    page = web.get("/tasks").content.decode()
    assert "Waiting for you: yes or no" in page
    assert "Proceed? (y/n)" in page
    assert "Failed: exit code 3" in page
    assert '<span class="tag">nightly</span>' in page
    assert 'data-time="took"' in page, "what runs counts on"


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("status=open", {"asking", "queued"}),
        ("status=waiting_for_input", {"asking"}),
        ("status=nonsense", {"asking", "queued", "ended", "theirs"}),
        ("label=nightly", {"asking"}),
        ("label=night", set()),
        ("kind=report", {"theirs"}),
        ("q=make%20all", set()),
        ("q=ALL", {"asking", "queued", "ended", "theirs"}),
        ("q=asking&status=open", {"asking"}),
        ("owner=nobody", set()),
    ],
)
def test_the_list_is_filtered_by_its_address(web: Client, owner: User, query: str, found: set[str]) -> None:
    run(make(owner, title="asking", labels=["nightly"]), asks=ASKS)
    tasks.settle(hold=run(make(owner, title="ended")), now=now())
    make(owner, title="queued")
    tasks.settle(hold=run(make(owner, title="theirs", kind="report")), now=now())
    page = web.get(f"/tasks?{query}").content.decode()
    assert set(re.findall(r'<a class="row-link"[^>]*>([^<]*)</a>', page)) == found
    assert ("Nothing matches these filters" in page) == (not found)


def test_an_empty_list_says_how_to_make_a_task_to_those_who_may(web: Client, stranger: User) -> None:
    page = web.get("/tasks").content.decode()
    assert "No task yet" in page
    assert 'href="/tasks/new"' in page
    web.force_login(stranger)
    assert 'href="/tasks/new"' not in web.get("/tasks").content.decode()


def test_the_list_costs_the_same_number_of_queries_for_one_row_and_for_twenty(
    web: Client, owner: User, django_assert_max_num_queries: Any
) -> None:
    make(owner)
    with django_assert_max_num_queries(60) as one:
        web.get("/tasks")
    for _ in range(19):
        make(owner, labels=["x"])
    with django_assert_max_num_queries(len(one)):
        web.get("/tasks")


def test_C54_what_waited_for_more_than_twenty_minutes_is_stale(web: Client, owner: User) -> None:
    task = make(owner)
    run(task, asks=ASKS)
    assert re.search(r'class="stale" data-from="[^"]+" hidden>', web.get("/tasks").content.decode())
    Task.objects.update(last_activity_at=now() - dt.timedelta(minutes=21))
    assert re.search(r'class="stale" data-from="[^"]+">stale<', web.get("/tasks").content.decode())


# ── A new command ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_command_is_a_list_of_arguments_and_never_a_line_of_a_shell(web: Client, settings: Any) -> None:
    answer = web.post("/tasks/new", typed(title=" my  build ", labels="a, b a", timeout_minutes="2"))
    task = Task.objects.get()
    assert answer["Location"] == f"/tasks/{task.id}"
    assert task.spec["argv"] == ["echo", "a b", "$HOME"]
    assert task.spec["cwd"] == str(settings.COMMAND_DIRECTORIES[0])
    assert (task.title, task.labels, task.timeout_seconds) == ("my build", ["a", "b"], 120)
    assert task.created_by == "owner"


def test_one_argument_per_line_is_taken_as_it_is_written(web: Client) -> None:
    web.post("/tasks/new", typed(command="printf\r\n %s \r\n'quoted'\r\n\r\nlast\r\n", reading="lines"))
    assert Task.objects.get().spec["argv"] == ["printf", " %s ", "'quoted'", "", "last"]


def test_the_same_form_twice_is_one_task_and_after_a_refusal_it_is_another_message(
    web: Client, settings: Any
) -> None:
    for _ in range(2):
        answer = web.post("/tasks/new", typed())
        assert answer.status_code == 302
    assert Task.objects.count() == 1
    settings.COMMAND_LIMIT = 1
    full = web.post("/tasks/new", typed(message_id="m-2", title="kept title"))
    page = full.content.decode()
    assert full.status_code == 429
    assert "1 of 1 commands are open (0 running, 1 queued)" in page
    assert 'value="kept title"' in page
    assert 'value="m-2"' not in page
    settings.COMMAND_LIMIT = 2
    assert web.post("/tasks/new", typed(message_id="m-2", title="kept title")).status_code == 302


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"command": "echo 'open"}, "no closing quotation"),
        ({"command": ""}, "This field is required."),
        ({"command": "  "}, "Say what to run"),
        ({"cwd": "/etc"}, "not one of those that commands may run in"),
        ({"labels": "no/good!"}, "A label has"),
        ({"timeout_minutes": "0"}, "greater than or equal to 1"),
        ({"hook_url": "ftp://x.example"}, "absolute http or https URL"),
        ({"hook_url": "https://x.example/", "hook_secret": "short"}, "base64 of 24 to 64 bytes"),
        ({"hook_url": "https://x.example/", "hook_secret": ""}, "A hook needs a secret"),
    ],
)
def test_a_wrong_form_says_it_beside_the_field_and_loses_nothing(
    web: Client, fields: dict[str, str], says: str
) -> None:
    answer = web.post("/tasks/new", typed(title="my <title>", **fields))
    page = answer.content.decode()
    assert answer.status_code == 400
    assert says in page
    assert 'value="my &lt;title&gt;"' in page
    for name, value in fields.items():
        assert not value.strip() or value.replace("'", "&#x27;") in page, name
    assert not Task.objects.exists()


def test_a_hook_gets_a_secret_that_is_shown_once_in_the_form(web: Client) -> None:
    page = web.get("/tasks/new").content.decode()
    found = re.search(r'name="hook_secret" value="(whsec_[^"]+)"', page)
    assert found is not None
    web.post("/tasks/new", typed(hook_url="https://hooks.example/x?token=t", hook_secret=found[1]))
    task = Task.objects.get()
    assert task.hook_site == "https://hooks.example"
    assert vault.unseal(task.hook_sealed)[0] == "https://hooks.example/x?token=t"
    shown = web.get(f"/tasks/{task.id}").content.decode()
    assert found[1] not in shown
    assert "https://hooks.example/…" in shown
    assert "token=t" not in shown


def test_only_who_may_run_commands_sees_the_form_and_only_where_they_run(
    web: Client, stranger: User, settings: Any
) -> None:
    settings.COMMANDS = "off"
    off = web.post("/tasks/new", typed())
    assert off.status_code == 403
    assert "switched off" in off.content.decode()
    settings.COMMANDS = "any"
    web.force_login(stranger)
    refused = web.post("/tasks/new", typed())
    assert refused.status_code == 403
    assert "needs the permission" in refused.content.decode()
    assert not Task.objects.exists()


def test_a_template_is_chosen_by_its_name_and_arguments_go_behind_its_own(web: Client, settings: Any) -> None:
    settings.COMMANDS = "templates"
    folder = str(settings.COMMAND_DIRECTORIES[0])
    common = {"cwd": folder, "timeout_seconds": 60}
    settings.COMMAND_TEMPLATES = {
        "deploy": {"argv": ["make", "deploy"], "title": "Deploy", "arguments": True, **common},
        "status": {"argv": ["make", "status"], "title": "", "arguments": False, **common},
    }
    page = web.get("/tasks/new").content.decode()
    assert re.findall(r'<option value="(\w*)"', page)[:2] == ["deploy", "status"]
    web.post("/tasks/new", typed(template="deploy", command="'two words'"))
    task = Task.objects.get()
    assert (task.spec["argv"], task.title) == (["make", "deploy", "two words"], "Deploy")
    none = web.post("/tasks/new", typed(template="status", message_id="m-2"))
    assert "This template takes no arguments." in none.content.decode()
    other = web.post("/tasks/new", typed(template="rm", message_id="m-3"))
    assert other.status_code == 400
    again = web.get(f"/tasks/new?again={task.id}").content.decode()
    assert '<option value="deploy" selected' in again
    assert "&#x27;two words&#x27;</textarea>" in again


def test_what_is_typed_is_shown_as_it_would_be_read(web: Client) -> None:
    shown = web.post("/tasks/argv", {"command": "a 'b <c>'", "reading": "words"}, **SCRIPT).content.decode()
    assert re.findall(r"<code>(.*?)</code>", shown) == ["a", "b &lt;c&gt;"]
    assert "2 arguments, not by a shell" in shown
    assert "no closing quotation" in web.post("/tasks/argv", {"command": "'"}, **SCRIPT).content.decode()


def test_running_again_fills_the_form_in_and_foreign_tasks_fill_in_nothing(
    web: Client, owner: User, stranger: User
) -> None:
    task = make(owner, "printf", "%s", "a 'b'", title="print", labels=["x"], timeout_seconds=120)
    page = web.get(f"/tasks/new?again={task.id}").content.decode()
    assert task_forms.NewCommand.initial_again(task)["command"] == "printf %s 'a '\"'\"'b'\"'\"''"
    assert 'value="print"' in page
    stranger.user_permissions.add(Permission.objects.get(codename="run_commands"))
    web.force_login(stranger)
    assert web.get(f"/tasks/new?again={task.id}").status_code == 404


# ── One task ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_page_holds_the_end_of_the_output_as_text_with_links_to_the_rest(
    web: Client, owner: User
) -> None:
    task = make(owner)
    lines = b"".join(b"\x1b[31mrow %06d\x1b[0m <b>\r\n" % number for number in range(3000))
    run(task, lines + b"10 %\r50 %\r100 %\r\n\xff\xfe Proceed? ", asks=ASKS)
    page = web.get(f"/tasks/{task.id}").content.decode()
    assert "row 002999 &lt;b&gt;" in page
    assert "row 000100" not in page
    assert "\x1b" not in page
    assert "\n100 %\n" in page
    assert "10 %" not in page.replace("100 %", "")
    earlier = re.search(r'href="(\?at=\d+)">Show earlier', page)
    assert earlier is not None
    before = web.get(f"/tasks/{task.id}{earlier[1]}").content.decode()
    assert "row 002999" not in before
    assert re.search(r'data-later><a class="button small" href="\?at=\d+"', before)
    assert web.get(f"/tasks/{task.id}?at=99999999999").status_code == 200
    assert web.get(f"/tasks/{task.id}?at=-1%00x").status_code == 200


def test_the_download_is_the_output_byte_for_byte(web: Client, owner: User) -> None:
    task = make(owner)
    data = bytes(range(256)) * 3000
    run(task, data)
    answer = web.get(f"/tasks/{task.id}/output")

    async def whole() -> bytes:
        return b"".join([piece async for piece in answer])

    assert async_to_sync(whole)() == data
    assert answer["Content-Type"] == "application/octet-stream"
    assert "attachment" in answer["Content-Disposition"]
    assert answer["Content-Length"] == str(len(data))


def test_the_timeline_tells_who_did_what_and_nothing_of_what_was_typed(web: Client, owner: User) -> None:
    task = make(owner)
    hold = run(task, asks=ASKS)
    for number, (kind, content, submit) in enumerate(
        [
            (InputKind.TEXT, "s3cret", True),
            (InputKind.TEXT, "half", False),
            (InputKind.KEYS, ["ctrl-c"], True),
        ]
    ):
        task_inputs.add_input(
            task_id=task.id,
            kind=kind,
            content=content,
            submit=submit,
            message_id=f"m{number}",
            actor="op2",
            now=now(),
        )
        take_input(hold=hold, now=now())
    transitions.kill_task(task_id=task.id, actor=of_user(owner), reason="wrong branch", now=now())
    tasks.settle(hold=hold, signal="SIGTERM", now=now())
    page = web.get(f"/tasks/{task.id}").content.decode()
    told = [
        re.sub(r"<[^>]+>", "", each) for each in re.findall(r'<span class="moment-text">(.*?)</span>\n', page)
    ]
    assert told == [
        "queued by owner",
        "started by worker-1",
        "waits for input by worker-1",
        "sent 6 bytes: delivered by op2",
        "goes on by worker-1",
        "sent 4 bytes without Enter: delivered by op2",
        "pressed keys: delivered by op2",
        "asked to stop: wrong branch by owner",
        "ended by SIGTERM by worker-1",
    ]
    assert "Stopped by owner" in page
    assert "s3cret" not in page


def test_quick_answers_are_buttons_until_one_is_on_its_way(web: Client, owner: User) -> None:
    task = make(owner)
    run(task, asks=ASKS)
    page = web.get(f"/tasks/{task.id}").content.decode()
    assert re.findall(r'reply" type="submit" name="(\w+)" value="([^"]+)">(\w+)<', page) == [
        ("text", "y", "Yes"),
        ("keys", "down,enter", "Down"),
    ]
    web.post(f"/tasks/{task.id}/input", {"keys": "down,enter", "message_id": "m-1"})
    page = web.get(f"/tasks/{task.id}").content.decode()
    assert "An answer is on its way." in page
    assert 'class="button reply"' not in page


def test_a_prompt_is_text_and_never_markup(web: Client, owner: User) -> None:
    task = make(owner, title="<i>t</i>")
    run(task, asks={**ASKS, "text": "<img src=x>", "replies": [{"label": "<b>", "text": '"><script>'}]})
    event = Event.objects.filter(topic=f"task:{task.id}").order_by("-id")[0]
    for html in (
        web.get(f"/tasks/{task.id}").content.decode(),
        web.get("/tasks").content.decode(),
        web.get("/").content.decode(),
        fragments.live_message(log.envelope(event)) or "",
    ):
        assert "&lt;img src=x&gt;" in html
        assert "<img src=x" not in html
        assert '"><script>' not in html


@pytest.mark.parametrize(
    ("fields", "kind", "content", "submit"),
    [
        ({"text": "a\r\nb", "submit": ["enter", "typed"]}, "text", "a\nb", True),
        ({"text": "a", "submit": ["typed"]}, "text", "a", False),
        ({"text": "y"}, "text", "y", True),
        ({"keys": "up,enter"}, "keys", ["up", "enter"], False),
    ],
)
def test_without_script_each_form_types_what_it_says(
    web: Client, owner: User, fields: Any, kind: str, content: Any, submit: bool
) -> None:
    task = make(owner)
    assert web.post(f"/tasks/{task.id}/input", fields).status_code == 302
    line = TaskInput.objects.get()
    assert (line.kind, line.submit) == (kind, submit)
    taken = take_input(hold=run(task), now=now())
    assert taken is not None
    assert (list(taken.keys) if kind == "keys" else taken.text) == content


def test_C48_a_key_that_is_not_on_the_list_is_refused(web: Client, owner: User) -> None:
    task = make(owner)
    page = web.post(
        f"/tasks/{task.id}/input", {"keys": "ctrl-c,ctrl-alt-delete"}, follow=True
    ).content.decode()
    assert "keys.1: This is not one of the possible values." in page, re.findall(
        r'flash" role="status">([^<]*)', page
    )
    assert not TaskInput.objects.exists()


def test_stopping_what_is_queued_ends_it_and_what_is_over_stays_what_it_is(web: Client, owner: User) -> None:
    queued = make(owner)
    answer = web.post(f"/tasks/{queued.id}/kill", {"reason": "not needed"}, **SCRIPT)
    assert "Stopped by owner" in answer.content.decode()
    done = make(owner)
    tasks.settle(hold=run(done), exit_code=0, now=now())
    late = web.post(f"/tasks/{done.id}/kill", {"reason": "x"}, **SCRIPT)
    assert late.status_code == 409
    assert "It is over already: completed." in late.content.decode()
    done.refresh_from_db()
    assert done.status == TaskStatus.COMPLETED


def test_a_report_that_failed_can_be_sent_again(web: Client, owner: User) -> None:
    task = make(owner, hook_url="https://hooks.example/x", hook_secret="whsec_" + "A" * 44)
    assert "There is no report to send." in web.post(f"/tasks/{task.id}/redeliver", **SCRIPT).content.decode()
    tasks.settle(hold=run(task), now=now())
    HookDelivery.objects.update(
        state="failed", next_attempt_at=None, last_status=410, last_error="It answered 410."
    )
    page = web.get(f"/tasks/{task.id}").content.decode()
    assert "Not delivered" in page
    assert "HTTP 410" in page
    assert "It answered 410." in page
    answer = web.post(f"/tasks/{task.id}/redeliver", **SCRIPT).content.decode()
    assert "Being sent" in answer
    assert HookDelivery.objects.get().state == "pending"


def test_parts_and_their_whole_lead_to_each_other(web: Client, owner: User) -> None:
    whole = make(owner, title="whole")
    part = make(owner, title="part", parent_id=whole.id)
    assert f'<a href="/tasks/{part.id}">part</a>' in web.get(f"/tasks/{whole.id}").content.decode()
    assert f'<a href="/tasks/{whole.id}">whole</a>' in web.get(f"/tasks/{part.id}").content.decode()


def test_C60_the_titles_of_other_owners_are_not_told_by_parts_and_wholes(
    web: Client, owner: User, stranger: User
) -> None:
    """Somebody in two teams may hang a task of theirs below one of the other team: the names of both stay with those who see them."""
    whole = make(owner, title="what the one team does")
    part = make(stranger, title="what the other team does", parent_id=whole.id)
    assert part.title not in web.get(f"/tasks/{whole.id}").content.decode()
    other = Client()
    other.force_login(stranger)
    shown = other.get(f"/tasks/{part.id}").content.decode()
    assert whole.title not in shown
    assert f'<a href="/tasks/{whole.id}">{whole.id}</a>' in shown


def test_deleting_asks_first_waits_for_the_end_and_reaches_other_pages(web: Client, owner: User) -> None:
    task = make(owner)
    assert "Delete this task?" in web.get(f"/tasks/{task.id}/delete").content.decode()
    assert "It is not over yet." in web.post(f"/tasks/{task.id}/delete", follow=True).content.decode()
    tasks.settle(hold=run(task), now=now())
    assert web.post(f"/tasks/{task.id}/delete")["Location"] == "/tasks"
    event = Event.objects.filter(name="task.deleted").get()
    html = fragments.live_message(log.envelope(event))
    assert html is not None
    assert html.count("Deleted") == 3


# ── Who may what ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_foreign_task_is_404_on_every_path(owner: User, stranger: User) -> None:
    task = make(owner)
    client = Client()
    client.force_login(stranger)
    for path in ("", "/output", "/edit", "/delete"):
        assert client.get(f"/tasks/{task.id}{path}").status_code == 404, path
    for path in ("/input", "/kill", "/redeliver", "/edit", "/delete"):
        assert client.post(f"/tasks/{task.id}{path}", {"text": "y"}).status_code == 404, path


def test_C60_a_teammate_who_may_only_look_sees_the_output_and_is_refused_the_rest(
    owner: User, stranger: User
) -> None:
    team = Group.objects.create(name="lookers")
    owner.groups.add(team)
    stranger.groups.add(team)
    task = make(owner)
    run(task, b"hello\r\n", asks=ASKS)
    client = Client()
    client.force_login(stranger)
    page = client.get(f"/tasks/{task.id}").content.decode()
    assert "hello" in page
    assert 'class="detail task read-only"' in page
    assert "data-lines " not in page
    assert "Rename…" not in page
    for path in ("input", "kill", "redeliver", "edit", "delete"):
        assert client.post(f"/tasks/{task.id}/{path}", {"text": "y"}).status_code == 403, path
    home = client.get("/").content.decode()
    assert re.search(rf'<li id="slot-{task.id}" class="read-only">', home)


def test_who_may_act_and_not_run_commands_stops_one_and_does_not_type_into_it(
    owner: User, stranger: User
) -> None:
    team = Group.objects.create(name="team")
    team.permissions.add(Permission.objects.get(codename="operate_managedauthconnection"))
    owner.groups.add(team)
    stranger.groups.add(team)
    task = make(owner)
    run(task, asks=ASKS)
    client = Client()
    client.force_login(stranger)
    page = client.get(f"/tasks/{task.id}").content.decode()
    assert 'class="detail task no-typing"' in page
    assert 'name="text" rows' not in page
    assert "Run again…" not in page
    assert client.post(f"/tasks/{task.id}/input", {"text": "y"}).status_code == 403
    assert client.post(f"/tasks/{task.id}/kill").status_code == 302
    task.refresh_from_db()
    assert task.kill_requested_by == "stranger"


# ── Home ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_home_shows_what_waits_and_counts_what_its_cards_lead_to(web: Client, owner: User) -> None:
    asking = make(owner, title="asking")
    run(asking, asks=ASKS)
    make(owner, title="queued")
    ended = make(owner, title="ended", kind="report")
    tasks.settle(hold=run(ended), error_code="exit_code", error="x", exit_code=1, now=now())
    page = web.get("/").content.decode()
    assert f'id="attn-{asking.id}"' in page
    assert f'id="attn-{ended.id}"' not in page, "a task that failed has nobody waiting for it"
    assert 'data-count="waiting">1<' in page
    assert 'data-count="tasks">2<' in page
    assert page.count("Nothing waits for you") == 0
    kept = web.get(f"/attention?keep={ended.id}", **SCRIPT).content.decode()
    assert f'id="attn-{ended.id}"' in kept, "what the page shows already stays on it"


def test_a_login_that_waits_is_counted_and_shown_once_as_its_connection(web: Client, owner: User) -> None:
    principal = of_user(owner)
    connection = transitions.create_connection(
        owner_id=owner.pk, domain="a.example", profile_name="p", config={}, actor=principal, now=now()
    )
    transitions.start_login(connection_id=connection.id, actor=principal, now=now())
    hold = tasks.claim(worker="w", kinds=["login"], now=now())
    assert hold is not None
    choices = [{"id": "c1", "type": "other", "label": "Go"}]
    transitions.await_input(hold=hold, fields=[], choices=choices, now=now())
    assert fragments.counts(principal)["waiting"] == 1
    assert list(task_picture.waiting_for(principal)) == []
    assert web.get("/").content.decode().count("data-attention aria-labelledby") == 1


def test_the_parts_of_the_stream_are_those_of_the_page_and_hold_nothing_of_a_viewer(
    web: Client, owner: User
) -> None:
    task = make(owner)
    run(task, b"output is no part of it\r\n", asks=ASKS)
    event = Event.objects.filter(topic=f"task:{task.id}").order_by("-id")[0]
    html = fragments.live_message(log.envelope(event))
    assert html is not None
    assert "csrfmiddlewaretoken" not in html
    assert "message_id" not in html
    assert "output is no part of it" not in html
    assert json.dumps(owner.username) not in html
    page = web.get(f"/tasks/{task.id}").content.decode()
    for part in ("facts", "timeline", "lines"):
        found = re.search(rf'<(section|ol) [^>]*id="{part}-{task.id}".*?</\1>', page, re.DOTALL)
        assert found is not None, part
        assert found.group() in html, part


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.04, "0.0 s"),
        (9.96, "10.0 s"),
        (38.2, "38 s"),
        (192, "3 min 12 s"),
        (7500, "2 h 5 min"),
        (97_200, "1 d 3 h"),
    ],
)
def test_a_duration_in_words(seconds: float, words: str) -> None:
    assert task_picture.duration(seconds) == words
