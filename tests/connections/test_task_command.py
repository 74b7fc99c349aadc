"""``manage.py task``: what it does, prints, refuses, and leaves with. The worker of these tests takes a step whenever the command waits."""

from __future__ import annotations

import getpass
import io
import json
from collections.abc import Callable
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.core.management import call_command
from django.core.management.base import CommandError
from django.utils import timezone

from connections import task_inputs, tasks
from connections.management.commands import task as command
from connections.models import HookDelivery, Task, TaskInput
from connections.tasks import Hold
from events.models import Event
from tests.connections.task_support import HOOK_SECRET, end, held, hold_of, new_task, take_input, write

pytestmark = pytest.mark.django_db


@pytest.fixture(autouse=True)
def admin(db: Any) -> User:
    return User.objects.create_superuser("root", password="root-password")


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """What happens while the command waits, one after the other."""

    def script(*acts: Callable[[], Any]) -> None:
        left = list(acts)

        def sleep(seconds: float) -> None:
            assert left, "it waits for something that does not come"
            left.pop(0)()

        monkeypatch.setattr(command.time, "sleep", sleep)

    return script


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


def run(*words: str) -> int:
    """The exit code; 0 when it returned."""
    try:
        call_command("task", *words)
    except SystemExit as leaving:
        return int(leaving.code or 0)
    return 0


def present() -> Hold:
    """The only task, taken by a worker if it was not."""
    row = Task.objects.get()
    return (
        hold_of(row)
        if row.status == "queued"
        else tasks.held(task_id=row.pk, worker="w", attempt=row.attempts)
    )


def interrupted() -> None:
    raise KeyboardInterrupt


# ── run ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_command_is_started_with_what_stands_behind_the_dashes(capsysbinary: Any, owner: User) -> None:
    assert (
        run(
            "run",
            "--detach",
            "--owner",
            "owner",
            "--label",
            "ci",
            "--title",
            "t",
            "--timeout",
            "9",
            "--",
            "ls",
            "--json",
            "a b",
        )
        == 0
    )
    row = Task.objects.get()
    assert capsysbinary.readouterr().out.decode().strip() == row.pk
    assert row.spec["argv"] == ["ls", "--json", "a b"]
    assert (row.owner, row.labels, row.title, row.timeout_seconds) == (owner, ["ci"], "t", 9)
    assert (row.created_by, Event.objects.get().actor) == ("command task", "command task")


def test_as_json_the_task_is_shown_and_left_alone(capsysbinary: Any, admin: User) -> None:
    run("run", "--json", "--", "true")
    shown = json.loads(capsysbinary.readouterr().out)
    assert (shown["id"], shown["argv"], shown["status"]) == (Task.objects.get().pk, ["true"], "queued")
    assert Task.objects.get().owner == admin


@pytest.mark.parametrize(
    ("how", "code"),
    [
        ({"exit_code": 0}, 0),
        ({"exit_code": 3, "error_code": "exit_code", "error": "exited with 3"}, 3),
        ({"signal": "SIGSEGV", "error_code": "signal", "error": "ended by SIGSEGV"}, 139),
    ],
)
def test_C32_it_shows_every_byte_and_leaves_as_the_command_did(
    capsysbinary: Any, steps: Callable[..., None], how: dict[str, Any], code: int
) -> None:
    steps(
        lambda: write(present(), b"\xff\x00one\r\n"),
        lambda: write(present(), b"two"),
        lambda: end(present(), **how),
    )
    assert run("run", "--", "prog") == code
    said = capsysbinary.readouterr()
    assert said.out == b"\xff\x00one\r\ntwo"
    assert b"prog" in said.err


def test_C15_what_could_not_start_says_why(capsysbinary: Any, steps: Callable[..., None]) -> None:
    steps(lambda: end(present(), error_code="cannot_start", error="no such program: nope"))
    with pytest.raises(CommandError, match="no such program: nope"):
        run("run", "--", "nope")


def test_it_says_when_nobody_takes_the_command_and_when_it_waits_for_input(
    capsysbinary: Any, steps: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "NO_WORKER_SECONDS", -1.0)
    prompt = {"kind": "yes_no", "text": "go on?", "replies": [], "detected_by": "read"}
    steps(
        lambda: None,
        lambda: tasks.await_input(hold=present(), prompt=prompt, now=timezone.now()),
        lambda: None,
        lambda: end(present()),
    )
    run("run", "--", "prog")
    said = capsysbinary.readouterr().err.decode()
    assert said.count("run_worker") == 1
    assert said.count(f"manage.py task input {Task.objects.get().pk}") == 1


def test_C19_ctrl_c_asks_and_kills_and_shows_the_rest(
    capsysbinary: Any, steps: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", Tty())
    monkeypatch.setattr("builtins.input", lambda question: "")

    def ends() -> None:
        write(present(), b"^C bye")
        end(present(), signal="SIGTERM")

    steps(lambda: write(present(), b"one "), interrupted, ends)
    assert run("run", "--", "prog") == 130
    assert capsysbinary.readouterr().out == b"one ^C bye"
    row = Task.objects.get()
    assert (row.status, row.kill_reason) == ("killed", "Killed in the terminal.")


def test_ctrl_c_and_a_no_leave_it_running(
    capsysbinary: Any, steps: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", Tty())
    monkeypatch.setattr("builtins.input", lambda question: "n")
    steps(lambda: present(), interrupted)
    assert run("run", "--", "prog") == 130
    assert Task.objects.get().kill_requested_at is None
    assert b"It goes on" in capsysbinary.readouterr().err


def test_ctrl_c_where_there_is_nobody_to_ask_kills(
    capsysbinary: Any, steps: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO())
    steps(interrupted)
    assert run("run", "--", "prog") == 130
    assert Task.objects.get().status == "killed"


def test_what_somebody_else_killed_is_said(steps: Callable[..., None], capsysbinary: Any) -> None:
    steps(lambda: call_command("task", "kill", Task.objects.get().pk, "--reason", "too hot"))
    with pytest.raises(CommandError, match="killed by command task: too hot"):
        run("run", "--", "prog")


def test_what_others_have_written_does_not_reach_the_terminal_as_commands(
    steps: Callable[..., None], capsysbinary: Any, owner: User
) -> None:
    steps(lambda: call_command("task", "kill", Task.objects.get().pk, "--reason", "\x1b]0;evil\x07\x9b2J"))
    with pytest.raises(CommandError) as said:
        run("run", "--", "prog")
    assert str(said.value) == "The command was killed by command task: ?]0;evil??2J."
    end(hold_of(new_task(owner)), error_code="failed", error="\x1b[31mred")
    run("list")
    for row in Task.objects.all():
        run("show", row.pk)
    assert not {0x1B, 0x07} & set(capsysbinary.readouterr().out)


def test_a_list_has_no_more_than_there_is_however_much_is_asked_for(capsysbinary: Any, owner: User) -> None:
    task = new_task(owner)
    for limit in ("-5", "99999999999999999999"):
        run("list", "--limit", limit, "--json")
        assert [row["id"] for row in json.loads(capsysbinary.readouterr().out)] == [task.pk]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run"], "argv"), (["run", "--cwd", "/etc", "--", "ls"], "cwd"), (["run", "--timeout", "0", "--", "ls"], "timeout_seconds"),
        (["run", "--label", "a b", "--", "ls"], "labels"), (["run", "--owner", "nobody", "--", "ls"], "no active user"),
        (["run", "--template", "x"], "template"), (["run", "--", "ls", "\udcff"], "UTF-8"),
        (["show", "task_no"], "no task"), (["list", "--status", "asleep"], "status"), (["output", "task_no"], "no task"), (["kill", "task_no"], "no task"),
    ],
)  # fmt: skip
def test_what_is_refused_is_said_in_a_sentence(words: list[str], message: str) -> None:
    with pytest.raises(CommandError, match=message):
        run(*words)
    assert not Task.objects.exists()


def test_C52_a_full_house_and_switched_off_commands_are_said(settings: Any) -> None:
    settings.COMMAND_LIMIT = 0
    with pytest.raises(CommandError, match="0 of 0 commands are open"):
        run("run", "--", "ls")
    settings.COMMANDS = "off"
    with pytest.raises(CommandError, match="switched off"):
        run("run", "--", "ls")


# ── list, show ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_lists_show_what_is_asked_for(capsysbinary: Any, owner: User) -> None:
    build, other = new_task(owner, title="bad \x1b[2J title", labels=["ci"]), new_task(owner, kind="other")
    end(hold_of(other))
    run("list")
    lines = capsysbinary.readouterr().out.decode().splitlines()
    assert [line.split()[0] for line in lines] == [other.pk, build.pk]
    assert "bad ?[2J title" in lines[1]
    for words, expected in (
        (["--status", "queued,running"], [build.pk]),
        (["--kind", "other"], [other.pk]),
        (["--label", "ci"], [build.pk]),
        (["--limit", "1"], [other.pk]),
    ):
        run("list", "--json", *words)
        assert [row["id"] for row in json.loads(capsysbinary.readouterr().out)] == expected


def test_a_task_is_shown_with_what_it_asks_and_what_was_sent(capsysbinary: Any, owner: User) -> None:
    hold = held(owner, hook_url="https://hook.example/?token=hidden", hook_secret=HOOK_SECRET)
    prompt = {
        "kind": "yes_no",
        "text": "Deploy?",
        "replies": [{"label": "Yes", "text": "y"}],
        "detected_by": "worker",
    }
    tasks.await_input(hold=hold, prompt=prompt, now=timezone.now())
    run("input", hold.task_id, "y")
    capsysbinary.readouterr()
    run("show", hold.task_id)
    said = capsysbinary.readouterr().out.decode()
    for expected in (
        "waiting_for_input",
        "Deploy?",
        "Yes",
        "input 1",
        "waiting (text, 1 bytes, command task)",
        "https://hook.example/…",
    ):
        assert expected in said, expected
    assert "hidden" not in said
    run("show", hold.task_id, "--json")
    assert json.loads(capsysbinary.readouterr().out)["inputs"][0]["status"] == "waiting"


# ── input ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def taken(hold: Hold) -> task_inputs.Input:
    found = take_input(hold=hold, now=timezone.now())
    assert found is not None
    return found


def test_C45_C47_C48_a_text_and_keys_are_typed(owner: User, monkeypatch: pytest.MonkeyPatch) -> None:
    hold = held(owner)
    run("input", hold.task_id, "$(id) 'x'")
    run("input", hold.task_id, "half", "--no-enter")
    run("input", hold.task_id, "--keys", "up, ctrl-c")
    monkeypatch.setattr("sys.stdin", io.StringIO("two\nlines\n"))
    run("input", hold.task_id)
    monkeypatch.setattr("sys.stdin", io.StringIO("dash\n"))
    run("input", hold.task_id, "-")
    found = [taken(hold) for _ in range(5)]
    assert [(each.text, each.submit, each.keys) for each in found] == [
        ("$(id) 'x'", True, ()),
        ("half", False, ()),
        ("", False, ("up", "ctrl-c")),
        ("two\nlines", True, ()),
        ("dash", True, ()),
    ]
    assert set(TaskInput.objects.values_list("submitted_by", flat=True)) == {"command task"}


def test_A48_a_password_is_asked_for_without_echo_and_never_taken_from_the_command_line(
    owner: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold = held(owner)
    prompt = {"kind": "password", "text": "Password:", "replies": [], "detected_by": "read"}
    tasks.await_input(hold=hold, prompt=prompt, now=timezone.now())
    with pytest.raises(CommandError, match="password") as refused:
        run("input", hold.task_id, "hunter2")
    assert "hunter2" not in str(refused.value)
    assert not TaskInput.objects.exists()
    monkeypatch.setattr("sys.stdin", Tty())
    asked = []
    monkeypatch.setattr(getpass, "getpass", lambda question: asked.append(question) or "hunter2")
    run("input", hold.task_id)
    assert (taken(hold).text, asked) == ("hunter2", ["Password: "])


def test_what_cannot_be_typed_is_refused(owner: User) -> None:
    hold = held(owner)
    for words in (["x", "--keys", "enter"], ["--keys", "f99"], ["--keys", ""], ["a\0b"]):
        with pytest.raises(CommandError):
            run("input", hold.task_id, *words)
    end(hold)
    with pytest.raises(CommandError, match="This task is over"):
        run("input", hold.task_id, "y")


# ── kill, output, redeliver ───────────────────────────────────────────────────────────────────────────────────────


def test_C22_a_kill_says_what_comes_of_it(capsysbinary: Any, owner: User) -> None:
    queued, hold = new_task(owner, kind="later"), held(owner)
    run("kill", queued.pk)
    run("kill", hold.task_id, "--reason", "r")
    assert capsysbinary.readouterr().out.decode().splitlines() == ["Killed.", "Its worker is told to end it."]
    assert Task.objects.get(pk=hold.task_id).kill_reason == "r"
    done = held(owner)
    end(done)
    with pytest.raises(CommandError, match="it is completed"):
        run("kill", done.task_id)


def test_C51_the_output_comes_byte_for_byte(capsysbinary: Any, owner: User, settings: Any) -> None:
    settings.COMMAND_OUTPUT_BYTES = 1000
    hold = held(owner)
    write(hold, b"\xff\x00" * 600)
    run("output", hold.task_id)
    said = capsysbinary.readouterr()
    assert said.out == b"\xff\x00" * 500
    assert b"200 more bytes" in said.err
    for words, expected in (
        (["--from", "997"], b"\x00\xff\x00"),
        (["--tail", "2"], b"\xff\x00"),
        (["--from", "live"], b""),
    ):
        run("output", hold.task_id, *words)
        assert capsysbinary.readouterr().out == expected
    with pytest.raises(CommandError, match="ends at 1000"):
        run("output", hold.task_id, "--from", "1001")


def test_an_output_is_followed_until_the_end_and_ctrl_c_leaves(
    capsysbinary: Any, owner: User, steps: Callable[..., None]
) -> None:
    hold = held(owner)
    write(hold, b"old ")
    steps(lambda: write(hold, b"new"), interrupted)
    assert run("output", hold.task_id, "--follow", "--from", "live") == 130
    assert capsysbinary.readouterr().out == b"new"
    assert Task.objects.get().status == "running", "who leaves changes nothing"
    steps(lambda: end(hold, error_code="failed"))
    assert run("output", hold.task_id, "--follow") == 0
    assert capsysbinary.readouterr().out == b"old new"


def test_C30_a_report_is_sent_again(capsysbinary: Any, owner: User) -> None:
    hold = held(owner, hook_url="https://hook.example/", hook_secret=HOOK_SECRET)
    with pytest.raises(CommandError, match="no report to send"):
        run("redeliver", hold.task_id)
    end(hold)
    HookDelivery.objects.update(state="failed", next_attempt_at=None, attempts=8)
    run("redeliver", hold.task_id, "--json")
    assert json.loads(capsysbinary.readouterr().out)["hook"]["state"] == "pending"


def test_every_verb_explains_itself(capsysbinary: Any) -> None:
    for verb in ("run", "list", "show", "input", "kill", "output", "redeliver"):
        with pytest.raises(SystemExit):
            call_command("task", verb, "--help")
        said = capsysbinary.readouterr().out.decode()
        assert len(said.split("\n\n")[1]) > 30, verb
