"""Commands in a worker of this process: faults of the database, lost leases, limits, and what is started at a time."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.db import OperationalError
from django.utils import timezone

from connections import commands, outputs, task_inputs, tasks, transitions
from connections.access import of_user
from connections.models import Task
from connections.runners import command, terminal, waiting
from connections.states import TaskStatus
from connections.worker import Worker
from events.models import Event
from tests.connections.worker_support import Scripted, in_db, until_db

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture(autouse=True)
def quick(settings: Any) -> None:
    settings.COMMAND_QUIET_SECONDS = 0.2
    settings.COMMAND_KILL_SECONDS = 0.5
    settings.COMMAND_ON_STOP = "interrupt"


def queued(owner: User, *argv: str, **more: Any) -> Task:
    made = commands.prepare(principal=of_user(owner), argv=argv, **more)
    return tasks.create(
        owner_id=owner.pk,
        kind="command",
        title=made.title,
        spec=made.spec,
        timeout_seconds=made.timeout_seconds,
        actor="test",
        now=timezone.now(),
    )


@contextlib.asynccontextmanager
async def at_work(**more: Any) -> AsyncIterator[Worker]:
    stop = asyncio.Event()
    worker = Worker(Scripted(), **more)
    running = asyncio.create_task(worker.run(stop))
    try:
        yield worker
    finally:
        stop.set()
        await asyncio.wait_for(running, 30)


def ended(*rows: Task) -> Callable[[], bool]:
    ids = [row.pk for row in rows]
    return lambda: not Task.objects.filter(pk__in=ids, finished_at=None).exists()


def told(row: Task) -> list[str]:
    return [
        event.data["status"]
        for event in Event.objects.filter(name="task.status", object_id=row.pk).order_by("id")
    ]


def flaky(monkeypatch: pytest.MonkeyPatch, where: Any, name: str, times: int, *, after: bool) -> list[int]:
    """The verb fails so often: before it has done anything, or after its commit, when only the answer is lost."""
    verb, calls = getattr(where, name), [0]

    def broken(*words: Any, **arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] > times:
            return verb(*words, **arguments)
        if after:
            verb(*words, **arguments)
        raise OperationalError("the server closed the connection")

    monkeypatch.setattr(where, name, broken)
    return calls


@pytest.mark.parametrize("after", [False, True], ids=["not done", "done, and the answer lost"])
def test_while_the_database_is_away_nothing_is_lost_and_nothing_is_there_twice(
    owner: User, monkeypatch: pytest.MonkeyPatch, after: bool
) -> None:
    monkeypatch.setattr("connections.runners.database.AGAIN_SECONDS", 0.05)
    calls = flaky(monkeypatch, outputs, "append", 4, after=after)
    row = queued(owner, "sh", "-c", "for n in 1 2 3; do echo $n; sleep 0.2; done")

    async def scenario() -> None:
        async with at_work():
            await until_db(ended(row), 30)

    asyncio.run(scenario())
    row.refresh_from_db()
    assert (row.status, row.exit_code) == (TaskStatus.COMPLETED, 0)
    assert outputs.read(row.pk, 0) == b"1\r\n2\r\n3\r\n"
    assert calls[0] > 4


@pytest.mark.parametrize("after", [False, True], ids=["not done", "done, and the answer lost"])
def test_a_line_is_typed_once_also_when_the_answer_to_taking_it_got_lost(
    owner: User, monkeypatch: pytest.MonkeyPatch, after: bool
) -> None:
    monkeypatch.setattr("connections.runners.database.AGAIN_SECONDS", 0.05)
    calls = flaky(monkeypatch, task_inputs, "inputs_taken", 2, after=after)
    row = queued(owner, "sh", "-c", "stty -echo; for n in 1 2 3; do read x; echo $n:$x; done")
    for text in ("one", "two", "three"):
        task_inputs.add_input(task_id=row.pk, content=text, message_id=text, actor="test", now=timezone.now())

    async def scenario() -> None:
        async with at_work():
            await until_db(ended(row), 30)

    asyncio.run(scenario())
    assert outputs.read(row.pk, 0).split()[-3:] == [b"1:one", b"2:two", b"3:three"]
    assert calls[0] == 5
    assert not row.inputs.filter(taken_at=None).exists()
    assert not row.inputs.exclude(sealed=None).exists()


def test_a_command_that_stopped_its_supervisor_is_killed_all_the_same(
    owner: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal, "STUCK_SECONDS", 0.2)
    row = queued(owner, "sh", "-c", "read go; kill -STOP $PPID; echo stopped; exec sleep 60")
    # Typed when it has been told that it runs.
    task_inputs.add_input(task_id=row.pk, content="go", message_id="go", actor="test", now=timezone.now())
    principal = of_user(owner)

    async def scenario() -> None:
        async with at_work():
            await until_db(lambda: b"stopped" in outputs.read(row.pk, 0), 30)
            await in_db(transitions.kill_task, task_id=row.pk, actor=principal, reason="", now=timezone.now())
            await until_db(ended(row), 30)

    asyncio.run(scenario())
    row.refresh_from_db()
    assert row.status == TaskStatus.KILLED
    assert told(row) == ["running", "killed"]


def test_an_end_whose_answer_got_lost_is_told_once(owner: User, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("connections.runners.database.AGAIN_SECONDS", 0.05)
    flaky(monkeypatch, tasks, "settle_several", 2, after=False)
    flaky(monkeypatch, command, "finish_several", 1, after=True)
    row = queued(owner, "sh", "-c", "echo bye; exit 3")

    async def scenario() -> None:
        async with at_work() as worker:
            await until_db(ended(row), 30)
            async with asyncio.timeout(10):
                while worker.jobs:
                    await asyncio.sleep(0.02)

    asyncio.run(scenario())
    row.refresh_from_db()
    assert (row.status, row.exit_code, row.error_code) == (TaskStatus.FAILED, 3, "exit_code")
    assert outputs.read(row.pk, 0) == b"bye\r\n"
    assert told(row) == ["running", "failed"]


def test_a_worker_that_lost_the_lease_ends_the_program_and_says_nothing(owner: User, settings: Any) -> None:
    settings.LEASE_SECONDS = 1
    row = queued(owner, "sh", "-c", "echo $$; exec sleep 1000")

    def taken_away() -> bool:
        Task.objects.filter(pk=row.pk).update(lease_expires_at=timezone.now())
        return transitions.rescue(task_id=row.pk, now=timezone.now())

    async def scenario() -> None:
        async with at_work():
            await until_db(lambda: outputs.read(row.pk, 0))
            pid = int(await in_db(outputs.read, row.pk, 0))
            assert await in_db(taken_away)
            async with asyncio.timeout(15):
                while os.path.exists(f"/proc/{pid}"):
                    await asyncio.sleep(0.02)

    asyncio.run(scenario())
    row.refresh_from_db()
    assert (row.status, row.error_code) == (TaskStatus.FAILED, "interrupted")
    assert told(row) == ["running", "failed"]


def test_while_the_lease_may_be_lost_and_nobody_can_be_asked_the_program_is_ended(
    owner: User, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Renewing fails for longer than the lease: somebody else may have called it interrupted, so it must not run on."""
    settings.LEASE_SECONDS = 1
    monkeypatch.setattr("connections.reconciler.rescue_tasks", lambda now: 0)
    monkeypatch.setattr("connections.reconciler.URGENT", ())
    flaky(monkeypatch, tasks, "renew", 1000, after=False)
    row = queued(owner, "sh", "-c", "trap 'echo ended; exit 1' TERM; echo begun; sleep 1000 & wait")

    async def scenario() -> None:
        async with at_work():
            await until_db(ended(row), 30)

    asyncio.run(scenario())
    row.refresh_from_db()
    assert (row.status, row.error_code) == (TaskStatus.FAILED, "interrupted")
    assert row.error == "interrupted: its worker lost the database for too long"
    assert outputs.read(row.pk, 0) == b"begun\r\nended\r\n"


def test_a_program_that_writes_after_the_lease_was_lost_is_ended(owner: User) -> None:
    row = queued(owner, "sh", "-c", "echo $$; read x; echo more; exec sleep 1000")

    async def scenario() -> None:
        async with at_work():
            await until_db(lambda: Task.objects.filter(pk=row.pk, status="waiting_for_input").exists())
            pid = int(await in_db(outputs.read, row.pk, 0))

            def somebody_elses() -> None:
                Task.objects.filter(pk=row.pk).update(leased_by="somebody else")

            await in_db(somebody_elses)
            await in_db(
                task_inputs.add_input,
                task_id=row.pk,
                content="x",
                message_id="1",
                actor="test",
                now=timezone.now(),
            )
            async with asyncio.timeout(15):
                while os.path.exists(f"/proc/{pid}"):
                    await asyncio.sleep(0.02)

    asyncio.run(scenario())
    row.refresh_from_db()
    assert (row.status, row.leased_by, row.inputs_waiting) == ("waiting_for_input", "somebody else", 1)


def test_no_more_commands_run_at_a_time_than_may(owner: User) -> None:
    rows = [queued(owner, "sh", "-c", "read x") for _ in range(5)]
    me = of_user(owner)

    async def scenario() -> None:
        async with at_work(commands=3) as worker:
            await until_db(lambda: Task.objects.filter(status="waiting_for_input").count() == 3)
            assert len(worker.jobs) == 3
            first = await in_db(Task.objects.filter(status="waiting_for_input").first)
            await in_db(transitions.kill_task, task_id=first.pk, actor=me, reason="", now=timezone.now())
            await until_db(lambda: Task.objects.filter(status="queued").count() == 1)

    asyncio.run(scenario())
    assert set(Task.objects.filter(pk__in=[row.pk for row in rows]).values_list("status", flat=True)) == {
        "killed",
        "failed",
        "queued",
    }


def test_a_worker_takes_the_kinds_that_it_was_told_to(owner: User) -> None:
    row = queued(owner, "true")

    async def scenario() -> None:
        async with at_work(kinds=["login"]) as logins:
            assert not logins.runs_commands
            async with at_work(kinds=["command"], commands=1) as runs:
                assert not runs.logins
                await until_db(ended(row))

    asyncio.run(scenario())


def test_a_worker_where_commands_are_off_takes_none(owner: User, settings: Any) -> None:
    row = queued(owner, "true")
    settings.COMMANDS = "off"
    assert not Worker(Scripted()).runs_commands
    assert Task.objects.get(pk=row.pk).status == "queued"


def test_C17_where_nothing_can_be_known_a_long_silence_counts_and_says_so(
    owner: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "look", lambda master, terminal: waiting.Waits.UNKNOWN)
    row = queued(owner, "sh", "-c", "echo name:; read x")
    began = time.monotonic()

    async def scenario() -> None:
        async with at_work():
            await until_db(lambda: Task.objects.filter(pk=row.pk, status="waiting_for_input").exists())

    asyncio.run(scenario())
    row.refresh_from_db()
    prompts = [
        event.data.get("prompt")
        for event in Event.objects.filter(object_id=row.pk, name__startswith="task.")
        if event.data.get("prompt")
    ]
    assert time.monotonic() - began >= 1.0
    assert all(prompt["detected_by"] == "quiet" for prompt in prompts)


def test_a_secret_is_asked_for_also_where_nothing_can_be_known(
    owner: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``sudo`` belongs to somebody else, so /proc does not show what it does."""
    monkeypatch.setattr(command, "look", lambda master, terminal: waiting.Waits.UNKNOWN)
    monkeypatch.setattr(command, "QUIET_TIMES", 1000)
    row = queued(owner, "sh", "-c", "stty -echo; printf 'Password: '; read x")

    async def scenario() -> None:
        async with at_work():
            await until_db(lambda: Task.objects.filter(pk=row.pk, status="waiting_for_input").exists())
            prompt = await in_db(lambda: Task.objects.get(pk=row.pk).prompt)
            assert prompt == {
                "kind": "password",
                "text": "Password:",
                "replies": [],
                "detected_by": "quiet",
            }

    asyncio.run(scenario())


def test_a_look_at_what_is_no_terminal_or_gone_says_so(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    try:
        assert waiting.look(reading, "/dev/pts/0") is waiting.Waits.UNKNOWN
        assert waiting.look(reading, "") is waiting.Waits.UNKNOWN
    finally:
        os.close(reading)
        os.close(writing)


def test_only_what_COMMAND_ENV_names_reaches_a_command(
    settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.COMMAND_ENV = ["PATH", "CHOSEN", "MISSING"]
    monkeypatch.setenv("CHOSEN", "yes")
    monkeypatch.setenv("SECRET_KEY", "no")
    assert command.environment("task_1") == {
        "PATH": os.environ["PATH"],
        "CHOSEN": "yes",
        "TERM": "xterm-256color",
        "SWITCHBOARD_TASK_ID": "task_1",
    }


def test_a_hold_that_is_adopted_is_the_old_holders_no_more(owner: User) -> None:
    row = queued(owner, "true")
    (held,) = tasks.claim_several(worker="old", kinds=["command"], limit=5, now=timezone.now())
    hold = tasks.hold_of(held)
    new = tasks.adopt(task_id=row.pk, holder="old", attempt=hold.attempt, worker="new", now=timezone.now())
    assert (new.leased_by, new.attempts, new.status) == ("new", 2, "running")
    with pytest.raises(tasks.LeaseLost):
        tasks.settle(hold=hold, now=timezone.now())
    with pytest.raises(tasks.LeaseLost):
        tasks.adopt(task_id=row.pk, holder="old", attempt=1, worker="third", now=timezone.now())
    assert not tasks.renew(hold=hold, now=timezone.now())
    assert tasks.settle(hold=tasks.hold_of(new), exit_code=0, now=timezone.now()).status == "completed"


def test_several_are_claimed_in_the_order_in_which_they_wait_and_told_one_by_one(owner: User) -> None:
    rows = [queued(owner, "true") for _ in range(4)]
    claimed = tasks.claim_several(worker="w", kinds=["command"], limit=3, now=timezone.now())
    assert [row.pk for row in claimed] == [row.pk for row in rows[:3]]
    assert [told(row) for row in rows] == [["running"], ["running"], ["running"], []]
    assert tasks.claim_several(worker="w", kinds=["login"], limit=3, now=timezone.now()) == []


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("now", "status"),
    [
        ({"argv": ["echo"], "arguments": True}, TaskStatus.COMPLETED),
        ({"argv": ["echo"], "arguments": False}, TaskStatus.FAILED),
        ({"argv": ["false"], "arguments": True}, TaskStatus.FAILED),
        (None, TaskStatus.FAILED),
    ],
)
async def test_a_queued_command_of_a_template_that_is_another_by_now_is_not_run(
    owner: User, settings: Any, now: dict[str, Any] | None, status: str
) -> None:
    rest = {"cwd": "", "title": "", "timeout_seconds": None}
    settings.COMMANDS = "templates"
    settings.COMMAND_TEMPLATES = {"say": {"argv": ["echo"], "arguments": True, **rest}}
    row = await in_db(queued, owner, "hello", template="say")
    settings.COMMAND_TEMPLATES = {} if now is None else {"say": {**now, **rest}}
    async with at_work():
        await until_db(ended(row))
    await in_db(row.refresh_from_db)
    assert (row.status, row.error_code) == (status, "not_allowed" if status == TaskStatus.FAILED else "")


@pytest.mark.asyncio
async def test_a_queued_command_is_not_run_when_only_templates_may_be(owner: User, settings: Any) -> None:
    row = await in_db(queued, owner, "echo", "hello")
    settings.COMMANDS = "templates"
    async with at_work():
        await until_db(ended(row))
    await in_db(row.refresh_from_db)
    assert (row.status, row.error_code, row.output_bytes) == (TaskStatus.FAILED, "not_allowed", 0)
