"""``manage.py check_connection``: asks, waits, and says what came of it."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.core.management import call_command
from django.core.management.base import CommandError
from django.utils import timezone

from connections import tasks, transitions
from connections.management.commands import check_connection
from connections.models import Task
from connections.states import FlowStep, TaskKind, TaskStatus
from tests.connections.flow_support import Story
from tests.connections.worker_support import of_now


@pytest.fixture
def story(owner: User) -> Story:
    made = of_now(Story.of(owner)).bring_to(FlowStep.SUBMITTING)
    made.succeed({"username": "alice", "password": "pw"})
    return made


@pytest.fixture
def meanwhile(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], None]:
    """What somebody else does while the command waits."""

    def patched(work: Callable[[], Any]) -> None:
        monkeypatch.setattr(check_connection.time, "sleep", lambda seconds: work())

    return patched


def seen(result: bool | None) -> Callable[[], Any]:
    """A worker that does the check."""

    def work() -> None:
        hold = tasks.claim(worker="w", kinds=[TaskKind.HEALTH_CHECK], now=timezone.now())
        assert hold is not None
        transitions.record_check(
            hold=hold, signed_in=result, reason="No answer." if result is None else "", now=timezone.now()
        )

    return work


def run(*words: str) -> tuple[str, int]:
    """What it printed, and its exit code."""
    out = io.StringIO()
    try:
        call_command("check_connection", *words, stdout=out, stderr=io.StringIO())
    except SystemExit as left:
        return out.getvalue(), int(str(left.code))
    return out.getvalue(), 0


def test_it_waits_for_the_result_and_its_exit_code_says_it(
    story: Story, meanwhile: Callable[[Callable[[], Any]], None]
) -> None:
    meanwhile(seen(True))
    assert run(story.id) == ("example.com / work is signed in.\n", 0)
    meanwhile(seen(None))
    text, code = run("example.com/work")
    assert (code, "could not be told. No answer." in text) == (2, True)
    meanwhile(seen(False))
    text, code = run(story.id)
    assert (code, "signed in again with what is stored" in text) == (1, True)


def test_where_a_person_is_needed_it_says_how(
    owner: User, meanwhile: Callable[[Callable[[], Any]], None]
) -> None:
    story = of_now(Story.of(owner))
    meanwhile(seen(False))
    text, code = run(story.id)
    assert (code, f"manage.py login {story.id}" in text) == (1, True)


@pytest.mark.parametrize(
    ("result", "word", "code"), [(True, "signed_in", 0), (False, "signed_out", 1), (None, "unclear", 2)]
)
def test_as_json(
    result: bool | None,
    word: str,
    code: int,
    story: Story,
    meanwhile: Callable[[Callable[[], Any]], None],
) -> None:
    meanwhile(seen(result))
    text, left = run(story.id, "--json")
    shown = json.loads(text)
    assert (shown["result"], left) == (word, code)
    assert (shown["task"]["status"], shown["check"]["type"]) == ("completed", "health_check")
    assert shown["connection"]["id"] == story.id


def test_it_may_leave_at_once(story: Story) -> None:
    text, _ = run(story.id, "--no-wait")
    task = Task.objects.get(kind=TaskKind.HEALTH_CHECK)
    assert task.id in text
    assert task.created_by == "command check_connection"
    shown, _ = run(story.id, "--no-wait", "--json")
    assert json.loads(shown)["task"]["id"] == task.id, "asked twice, it is the same check"


def test_it_says_when_no_result_comes_and_why(
    story: Story, meanwhile: Callable[[Callable[[], Any]], None]
) -> None:
    with pytest.raises(CommandError, match="Is a worker running"):
        run(story.id, "--timeout", "0")

    def kill() -> None:
        task = Task.objects.get(kind=TaskKind.HEALTH_CHECK, status=TaskStatus.QUEUED)
        transitions.kill_task(task_id=task.id, actor=story.actor, reason="", now=timezone.now())

    meanwhile(kill)
    with pytest.raises(CommandError, match="did not come to its end: killed"):
        run(story.id)
    meanwhile(lambda: Task.objects.filter(kind=TaskKind.HEALTH_CHECK).delete())
    with pytest.raises(CommandError, match="deleted meanwhile"):
        run(story.id)
