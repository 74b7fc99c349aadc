"""Every state × every verb: the arrow of states.py is taken, or nothing changes and nothing is told."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from typing import Any

import pytest
from django.conf import settings
from django.contrib.auth.models import User
from django.db import transaction

from connections import states, tasks, transitions
from connections.models import LoginFlow, Task
from connections.states import FLOW_ARROWS, FLOW_END, TASK_ARROWS, TASK_END, FlowStatus, FlowStep, TaskStatus
from connections.tasks import InvalidTransition
from connections.transitions import FlowOver, LoginInProgress, StaleInteraction
from tests.connections.flow_support import (
    CODE,
    GOOD,
    KINDS,
    T0,
    Story,
    after,
    cursor,
    events,
    everything,
    locked,
)

D, I, E, H, S, C = (  # noqa: E741 (as in states.py)
    FlowStep.DISCOVERING,
    FlowStep.AWAITING_INPUT,
    FlowStep.AWAITING_EXTERNAL_ACTION,
    FlowStep.AWAITING_HUMAN_INTERVENTION,
    FlowStep.SUBMITTING,
    FlowStep.COMPLETED,
)
F = "AWAITING_EXTERNAL_ACTION with a fallback"
ENDS = [FlowStatus.SUCCESS, FlowStatus.FAILED, FlowStatus.EXPIRED, FlowStatus.CANCELED]
RUNNING = [D, I, E, F, H, S]

SAME = "nothing changes"
HOURS = T0 + dt.timedelta(hours=3)


def answer(story: Story) -> Any:
    """What somebody would send to the question that is (or was) open."""
    flow = story.flow()
    values = {"f4": "123456"} if flow.fields == [CODE] else GOOD
    return story.submit({**values}, interaction_id=flow.interaction_id or "mai_of_before")


def _expire(story: Story) -> Any:
    return transitions.expire_if_due(connection_id=story.id, now=HOURS)


FLOW_VERBS: dict[str, Callable[[Story], Any]] = {
    "discovering": lambda story: transitions.discovering(hold=story.holding(), now=story.now),
    "submit_stored": lambda story: transitions.submit_stored(hold=story.holding(), now=story.now),
    "await_input": lambda story: story.ask([CODE]),
    "await_external_action": lambda story: story.taken().external(message="Another text"),
    "await_external_action, told again": lambda story: story.taken().external(),
    "await_human": lambda story: story.human(),
    "submit": answer,
    "take_submission": lambda story: transitions.take_submission(hold=story.holding(), now=story.now),
    "succeed": lambda story: story.succeed(),
    "fail": lambda story: story.fail(),
    "cancel": lambda story: story.cancel(),
    "expire_if_due": _expire,
    "expire_if_due, too early": lambda story: transitions.expire_if_due(
        connection_id=story.id, now=story.now
    ),
    "give_back": lambda story: transitions.give_back(hold=story.holding(), now=story.now),
    "rescue": lambda story: transitions.rescue(
        task_id=story.holding().task_id, now=after(settings.LEASE_SECONDS)
    ),
    "rescue, too early": lambda story: transitions.rescue(task_id=story.holding().task_id, now=story.now),
    "acknowledge": lambda story: transitions.acknowledge(
        flow_id=story.flow().id, actor=story.actor, now=story.now
    ),
    "start_login": lambda story: story.start(),
    "new_handoff": lambda story: transitions.new_handoff(
        connection_id=story.id, actor=story.actor, now=story.now
    ),
}

Outcome = Any


def everywhere(running: Outcome, ended: Outcome, **other: Outcome) -> dict[str, Outcome]:
    """One outcome for the running states and one for the ends, with exceptions to it."""
    return dict.fromkeys(RUNNING, running) | dict.fromkeys(ENDS, ended) | other


#: verb → state → the step after it, an exception, or SAME.
EXPECTED: dict[str, dict[str, Outcome]] = {
    "discovering": everywhere(D, FlowOver) | {D: SAME},
    "submit_stored": everywhere(S, FlowOver) | {S: SAME},
    "await_input": everywhere(I, FlowOver) | {I: InvalidTransition},
    "await_external_action": everywhere(E, FlowOver) | {I: InvalidTransition},
    "await_external_action, told again": everywhere(E, FlowOver) | {I: InvalidTransition, E: SAME},
    "await_human": everywhere(H, FlowOver) | {H: InvalidTransition},
    "submit": everywhere(StaleInteraction, FlowOver) | {I: S, F: S},
    "take_submission": everywhere(SAME, SAME) | {S: "taken"},
    "succeed": everywhere(C, FlowOver),
    "fail": everywhere(C, FlowOver),
    "cancel": everywhere(C, SAME),
    "expire_if_due": everywhere(C, SAME),
    "expire_if_due, too early": everywhere(SAME, SAME),
    "give_back": everywhere(D, SAME) | {D: "requeued"},
    "rescue": everywhere(D, SAME) | {D: "requeued"},
    "rescue, too early": everywhere(SAME, SAME),
    "acknowledge": everywhere(InvalidTransition, "acknowledged"),
    "start_login": everywhere(LoginInProgress, "a new flow"),
    "new_handoff": everywhere("a new code", FlowOver),
}
CASES = [(verb, state) for verb in FLOW_VERBS for state in [*RUNNING, *ENDS]]


@pytest.mark.django_db
@pytest.mark.parametrize(("verb", "state"), CASES)
def test_C22_C24_every_flow_verb_takes_its_arrow_or_changes_and_tells_nothing(
    verb: str, state: str, owner: User
) -> None:
    story = Story.of(owner).bring_to(state)
    flow = story.flow()
    step = FlowStep(flow.step)
    assert step == (C if state in ENDS else E if state == F else state)
    before, mark = everything(), cursor()
    expected = EXPECTED[verb][state]

    if isinstance(expected, type):
        with pytest.raises(expected):
            FLOW_VERBS[verb](story)
    else:
        FLOW_VERBS[verb](story)

    told = [event.name for event in events(mark)]
    flow_after = LoginFlow.objects.get(pk=flow.pk)
    if expected == SAME or isinstance(expected, type):
        assert everything() == before
        assert told == []
    elif expected == "taken":
        assert (flow_after.step, told) == (S, [])
    elif expected == "requeued":
        assert (flow_after.step, flow_after.version, told) == (D, flow.version, ["task.status"])
    elif expected == "acknowledged":
        assert flow_after.acknowledged_at == story.now
        assert (flow_after.status, told) == (state, ["connection.updated"])
    elif expected == "a new flow":
        assert LoginFlow.objects.filter(pk=flow.pk).values().get() in before["LoginFlow"]
        assert (story.flow().step, told) == (D, ["flow.state", "task.created"])
    elif expected == "a new code":
        assert flow_after.handoff_hash != flow.handoff_hash
        assert (flow_after.version, told) == (flow.version, [])
    else:
        assert expected in FLOW_ARROWS[step]
        assert flow_after.step == expected
        assert flow_after.version > flow.version
        assert told.count("flow.state") == 1
        assert flow_after.is_over == (expected == C)


def test_every_arrow_of_a_flow_is_taken_by_some_verb() -> None:
    """D → D is the one that the verbs answer with "no change"."""
    taken = {
        (E if state == F else state, outcome)
        for outcomes in EXPECTED.values()
        for state, outcome in outcomes.items()
        if isinstance(outcome, FlowStep)
    }
    assert taken == {(step, to) for step, arrows in FLOW_ARROWS.items() for to in arrows} - {(D, D)}


@pytest.mark.django_db
@pytest.mark.parametrize(
    ("verb", "status"),
    [
        ("succeed", FlowStatus.SUCCESS),
        ("fail", FlowStatus.FAILED),
        ("expire_if_due", FlowStatus.EXPIRED),
        ("cancel", FlowStatus.CANCELED),
    ],
)
def test_each_end_of_a_flow_ends_its_task_accordingly(verb: str, status: FlowStatus, owner: User) -> None:
    story = Story.of(owner).bring_to(I)
    FLOW_VERBS[verb](story)
    assert story.flow().status == status
    ends = {
        FlowStatus.SUCCESS: TaskStatus.COMPLETED,
        FlowStatus.FAILED: TaskStatus.FAILED,
        FlowStatus.EXPIRED: TaskStatus.FAILED,
        FlowStatus.CANCELED: TaskStatus.KILLED,
    }
    assert story.task().status == ends[status]
    assert story.task().finished_at == story.flow().completed_at


# ── Tasks ─────────────────────────────────────────────────────────────────────────────────────────────────────────

Q, R, W = TaskStatus.QUEUED, TaskStatus.RUNNING, TaskStatus.WAITING_FOR_INPUT
OK, BAD, KILLED = TaskStatus.COMPLETED, TaskStatus.FAILED, TaskStatus.KILLED


def _finish(status: TaskStatus) -> Callable[[Task, Story], Any]:
    return lambda row, story: tasks.finish(row, status, actor="test", now=after(5), error="why", exit_code=3)


TASK_VERBS: dict[str, Callable[[Task, Story], Any]] = {
    "claim": lambda row, story: tasks.claim(worker="other", kinds=KINDS, now=after(5)),
    "wait_for_input": lambda row, story: tasks.wait_for_input(row, actor="test", now=after(5)),
    "resume": lambda row, story: tasks.resume(row, actor="test", now=after(5)),
    "requeue": lambda row, story: tasks.requeue(row, actor="test", now=after(5)),
    "finish as completed": _finish(OK),
    "finish as failed": _finish(BAD),
    "finish as killed": _finish(KILLED),
}
X = InvalidTransition
TASK_EXPECTED: dict[str, dict[TaskStatus, Outcome]] = {
    "claim": {Q: R, R: SAME, W: SAME, OK: SAME, BAD: SAME, KILLED: SAME},
    "wait_for_input": {Q: X, R: W, W: SAME, OK: X, BAD: X, KILLED: X},
    "resume": {Q: SAME, R: SAME, W: R, OK: SAME, BAD: SAME, KILLED: SAME},
    "requeue": {Q: X, R: Q, W: Q, OK: X, BAD: X, KILLED: X},
    "finish as completed": {Q: X, R: OK, W: OK, OK: X, BAD: X, KILLED: X},
    "finish as failed": {Q: BAD, R: BAD, W: BAD, OK: X, BAD: X, KILLED: X},
    "finish as killed": {Q: KILLED, R: KILLED, W: KILLED, OK: X, BAD: X, KILLED: X},
}


@pytest.mark.django_db
@pytest.mark.parametrize(("verb", "state"), [(verb, state) for verb in TASK_VERBS for state in TaskStatus])
def test_C20_C24_every_task_verb_takes_its_arrow_or_changes_and_tells_nothing(
    verb: str, state: TaskStatus, owner: User
) -> None:
    story = Story.of(owner).bring_to(state)
    row = story.task()
    assert row.status == state
    before, mark = everything(), cursor()
    expected = TASK_EXPECTED[verb][state]

    with transaction.atomic():
        if isinstance(expected, type):
            with pytest.raises(expected) as caught:
                TASK_VERBS[verb](locked(row), story)
            assert caught.value.present == state
        else:
            TASK_VERBS[verb](locked(row), story)

    told = [
        (event.name, event.data.get("status"), event.data.get("previous_status")) for event in events(mark)
    ]
    if expected == SAME or isinstance(expected, type):
        assert everything() == before
        assert told == []
    else:
        assert expected in TASK_ARROWS[state]
        assert story.task().status == expected
        assert story.task().version == row.version + 1
        assert told == [("task.status", expected, state)]


def test_every_arrow_of_a_task_is_taken_by_some_verb() -> None:
    taken = {
        (state, outcome)
        for outcomes in TASK_EXPECTED.values()
        for state, outcome in outcomes.items()
        if isinstance(outcome, TaskStatus)
    }
    assert taken == {(state, to) for state, arrows in TASK_ARROWS.items() for to in arrows}


@pytest.mark.django_db
@pytest.mark.parametrize("state", list(TaskStatus))
def test_renewing_moves_the_lease_of_a_held_task_and_tells_nothing(state: TaskStatus, owner: User) -> None:
    story = Story.of(owner).bring_to(state)
    hold = story.hold or tasks.Hold(
        task_id=story.task().id, worker="nobody", attempt=1, kind="login", flow_id=None, connection_id=None
    )
    before, mark = story.task(), cursor()
    held = state in states.TASK_HELD
    assert tasks.renew(hold=hold, now=after(10)) is held
    assert story.task().lease_expires_at == (after(10 + settings.LEASE_SECONDS) if held else None)
    assert (story.task().version, cursor()) == (before.version, mark)


# ── The drawing ───────────────────────────────────────────────────────────────────────────────────────────────────


def drawing(heading: str) -> list[tuple[str, list[str]]]:
    """The block of the docstring under ``heading``: what stands left of each line's first arrow, and what right of it."""
    assert states.__doc__ is not None
    block = states.__doc__.split(heading, 1)[1].split("::", 1)[1].strip("\n").split("\n\n", 1)[0]
    lines = []
    for line in block.splitlines():
        if "─▶" in line:
            left, *right = [part.strip() for part in line.split("─▶")]
            lines.append((left, right))
    return lines


def names(text: str) -> list[str]:
    """``A | B (why) | end`` → A, B, end"""
    return [name.split(" (")[0].strip() for name in text.split(" | ")]


def test_the_drawing_of_a_flow_in_the_docstring_agrees_with_its_arrows() -> None:
    drawn: dict[FlowStep, set[FlowStep]] = {step: set() for step in FlowStep}
    running = set(FlowStep) - {C}
    for left, right in drawing("A login flow"):
        if left == "start_login":
            assert right == ["DISCOVERING"]
        elif left == "any step" and len(right) == 2:
            through = FlowStep(right[0])
            assert names(right[1]) == ["back", "end"]
            for step in running - {through}:
                drawn[step].add(through)
                drawn[through].add(step)
            drawn[through].add(C)
        elif left == "any other step":
            to_step = FlowStep(names(right[0])[0])
            for step in running - {to_step}:
                drawn[step].add(to_step)
        else:
            for name in names(right[0]):
                to = (
                    running if name == "any next step by itself" else {C if name == "end" else FlowStep(name)}
                )
                drawn[FlowStep(left)] |= to
    assert drawn == {step: set(arrows) for step, arrows in FLOW_ARROWS.items()}


def test_the_drawing_of_a_task_in_the_docstring_agrees_with_its_arrows() -> None:
    drawn: dict[TaskStatus, set[TaskStatus]] = {status: set() for status in TaskStatus}
    for left, right in drawing("A task"):
        for name in names(right[0]):
            drawn[TaskStatus(left)] |= set(TASK_END) if name == "end" else {TaskStatus(name)}
    assert drawn == {status: set(arrows) for status, arrows in TASK_ARROWS.items()}


def test_ends_lead_nowhere() -> None:
    assert FLOW_ARROWS[C] == frozenset()
    assert all(TASK_ARROWS[end] == frozenset() for end in TASK_END)
    assert frozenset(FlowStatus) - {FlowStatus.IN_PROGRESS} == FLOW_END
