"""The claim loop in this process: many at once, bells, leases, and an end in order."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.db import OperationalError, transaction
from django.utils import timezone

from connections import tasks, transitions
from connections.drivers.base import Person, Success, Target
from connections.models import HealthCheck, LoginFlow, Task
from connections.states import FlowStatus, FlowStep, TaskStatus
from connections.worker import Worker
from tests.connections.flow_support import Story
from tests.connections.worker_support import SUCCESS, Scripted, ask_once, in_db, of_now, until_db

pytestmark = pytest.mark.django_db(transaction=True)

GIVEN = {"f1": "alice", "f2": "a-password"}


def many(owner: User, count: int) -> list[Story]:
    stories = [of_now(Story.of(owner, domain=f"{n}.example")) for n in range(count)]
    for story in stories:
        story.start()
    return stories


def in_step(step: FlowStep) -> Callable[[], int]:
    return lambda: LoginFlow.objects.filter(step=step).count()


@contextlib.asynccontextmanager
async def at_work(worker: Worker) -> AsyncIterator[asyncio.Event]:
    """The worker runs inside the block, and is stopped in order at its end."""
    stop = asyncio.Event()
    running = asyncio.create_task(worker.run(stop))
    try:
        yield stop
    finally:
        stop.set()
        await asyncio.wait_for(running, 20)


def test_many_logins_wait_for_their_people_at_the_same_time(owner: User) -> None:
    stories = many(owner, 12)

    async def scenario() -> None:
        async with at_work(Worker(Scripted(ask_once))):
            await until_db(lambda: in_step(FlowStep.AWAITING_INPUT)() == 12)
            for story in stories:
                await in_db(story.submit, dict(GIVEN))
            await until_db(lambda: LoginFlow.objects.filter(status=FlowStatus.SUCCESS).count() == 12)

    asyncio.run(scenario())
    assert set(Task.objects.values_list("status", "attempts")) == {(TaskStatus.COMPLETED, 1)}


def test_a_worker_takes_no_more_than_it_may_and_the_next_one_when_it_has_room(owner: User) -> None:
    stories = many(owner, 3)

    async def scenario() -> None:
        worker = Worker(Scripted(ask_once), concurrency=2)
        async with at_work(worker):
            await until_db(lambda: in_step(FlowStep.AWAITING_INPUT)() == 2)
            assert len(worker.jobs) == 2
            assert await in_db(Task.objects.filter(status=TaskStatus.QUEUED).count) == 1
            asked = await in_db(LoginFlow.objects.filter(step=FlowStep.AWAITING_INPUT).first)
            story = next(story for story in stories if story.id == asked.connection_id)
            await in_db(story.submit, dict(GIVEN))
            await until_db(lambda: Task.objects.filter(status=TaskStatus.QUEUED).count() == 0)

    asyncio.run(scenario())


def test_a_new_task_is_heard_of_without_waiting_for_the_next_look(
    owner: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("connections.worker.LOOK_SECONDS", 3600)
    story = of_now(Story.of(owner))

    async def scenario() -> None:
        async with at_work(Worker(Scripted(ask_once))):
            await in_db(story.start)
            await until_db(lambda: in_step(FlowStep.AWAITING_INPUT)() == 1)

    asyncio.run(scenario())


def test_canceling_while_somebody_is_asked_stops_the_login(
    owner: User, caplog: pytest.LogCaptureFixture
) -> None:
    (story,) = many(owner, 1)
    driver = Scripted(ask_once)

    async def scenario() -> None:
        worker = Worker(driver)
        async with at_work(worker):
            await until_db(in_step(FlowStep.AWAITING_INPUT))
            await in_db(story.cancel)
            async with asyncio.timeout(10):
                while worker.jobs:
                    await asyncio.sleep(0.02)

    asyncio.run(scenario())
    assert driver.canceled == 1
    assert (story.flow().status, story.task().status) == (FlowStatus.CANCELED, TaskStatus.KILLED)
    assert caplog.text == ""


def test_stopping_in_order_gives_everything_back_without_counting_an_attempt(owner: User) -> None:
    many(owner, 3)

    async def scenario() -> None:
        async with at_work(Worker(Scripted(ask_once))):
            await until_db(lambda: in_step(FlowStep.AWAITING_INPUT)() == 3)

    asyncio.run(scenario())
    assert set(Task.objects.values_list("status", "attempts", "leased_by")) == {(TaskStatus.QUEUED, 0, "")}
    assert in_step(FlowStep.DISCOVERING)() == 3


def test_what_one_worker_gave_back_another_takes_up_with_a_new_question(owner: User) -> None:
    (story,) = many(owner, 1)

    async def scenario() -> None:
        async with at_work(Worker(Scripted(ask_once))):
            await until_db(in_step(FlowStep.AWAITING_INPUT))
            asked = (await in_db(story.flow)).interaction_id
        async with at_work(Worker(Scripted(ask_once))):
            await until_db(in_step(FlowStep.AWAITING_INPUT))
            assert (await in_db(story.flow)).interaction_id != asked

    asyncio.run(scenario())


def test_a_lost_lease_stops_the_login_and_is_said_once(
    owner: User, settings: Any, caplog: pytest.LogCaptureFixture
) -> None:
    settings.LEASE_SECONDS = 1
    (story,) = many(owner, 1)
    driver = Scripted(ask_once)

    def take_over() -> None:
        task = story.task()
        # In one transaction, or the worker of this test takes it again in between.
        with transaction.atomic():
            transitions.rescue(task_id=task.pk, now=task.lease_expires_at)
            settings.LEASE_SECONDS = 60
            assert tasks.claim(worker="another", kinds=["login"], now=timezone.now()) is not None

    async def scenario() -> None:
        worker = Worker(driver, concurrency=1)
        async with at_work(worker):
            await until_db(in_step(FlowStep.AWAITING_INPUT))
            settings.LEASE_SECONDS = 1
            await in_db(take_over)
            settings.LEASE_SECONDS = 1
            async with asyncio.timeout(15):
                while worker.jobs:
                    await asyncio.sleep(0.02)

    with caplog.at_level(logging.WARNING, logger="connections.worker"):
        asyncio.run(scenario())
    assert driver.canceled == 1
    assert caplog.text.count("was lost") == 1
    assert story.task().leased_by == "another"


def test_A48_a_driver_that_breaks_does_not_stop_the_worker_and_quotes_nothing(
    owner: User, caplog: pytest.LogCaptureFixture
) -> None:
    stories = many(owner, 2)

    async def script(target: Target, person: Person) -> Success:
        if target.domain == "0.example":
            raise RuntimeError("UNMISTAKABLE")
        return SUCCESS

    async def scenario() -> None:
        async with at_work(Worker(Scripted(script))):
            await until_db(lambda: LoginFlow.objects.exclude(status=FlowStatus.IN_PROGRESS).count() == 2)

    asyncio.run(scenario())
    assert [story.flow().status for story in stories] == [FlowStatus.FAILED, FlowStatus.SUCCESS]
    assert stories[0].flow().error_code == "internal_error"
    assert GIVEN["f2"] not in caplog.text


def test_a_database_that_fails_under_a_login_leaves_it_to_the_lease(
    owner: User, caplog: pytest.LogCaptureFixture
) -> None:
    (story,) = many(owner, 1)

    async def script(target: Target, person: Person) -> Success:
        raise OperationalError("database is locked")

    async def scenario() -> None:
        worker = Worker(Scripted(script))
        async with at_work(worker):
            # Not the empty list of its jobs: the claim is committed before it is in there.
            await until_db(lambda: "the database failed" in caplog.text)
            await until_db(lambda: not worker.jobs)

    asyncio.run(scenario())
    assert "the database failed" in caplog.text
    assert (story.flow().status, story.task().status) == (FlowStatus.IN_PROGRESS, TaskStatus.RUNNING)


def test_a_health_check_is_done_by_the_same_worker(owner: User) -> None:
    story = of_now(Story.of(owner)).bring_to(FlowStatus.SUCCESS)
    transitions.request_check(connection_id=story.id, actor=story.actor, now=story.now)

    async def scenario() -> None:
        async with at_work(Worker(Scripted(seen=False))):
            await until_db(HealthCheck.objects.exists)

    asyncio.run(scenario())
    assert story.row().status == "NEEDS_AUTH"


def test_C25_a_worker_expires_what_nobody_looks_at(owner: User, settings: Any) -> None:
    settings.INPUT_SECONDS = 1
    settings.LEASE_SECONDS = 1
    (story,) = many(owner, 1)
    driver = Scripted(ask_once)

    async def scenario() -> None:
        async with at_work(Worker(driver)):
            await until_db(lambda: story.flow().status == FlowStatus.EXPIRED)

    asyncio.run(scenario())
    assert story.flow().error_code == "awaiting_input_timeout"


def test_a_helper_that_breaks_ends_the_worker_with_its_reason(
    owner: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(self: Worker) -> None:
        raise RuntimeError("the renewing broke")

    monkeypatch.setattr(Worker, "_renew", broken)
    with pytest.raises(RuntimeError, match="the renewing broke"):
        asyncio.run(asyncio.wait_for(Worker(Scripted(ask_once)).run(asyncio.Event()), 20))
