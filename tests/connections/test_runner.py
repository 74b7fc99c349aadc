"""One claimed task to one outcome, with a driver that does as it is told."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
from collections.abc import Callable
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.db import OperationalError

from connections import transitions, vault
from connections.drivers.base import (
    Choice,
    DriverFailed,
    ExternalAction,
    Field,
    Person,
    Question,
    Success,
    Target,
)
from connections.models import Credential, HealthCheck
from connections.runners import login as runner
from connections.states import FlowStatus, FlowStep
from connections.tasks import LeaseLost
from tests.connections.flow_support import STATE, T0, Story, cursor
from tests.connections.worker_support import (
    QUESTION,
    SUCCESS,
    Scripted,
    ask_once,
    in_db,
    of_now,
    until_db,
)

pytestmark = pytest.mark.django_db(transaction=True)

SECRET = "UNMISTAKABLE-PASSWORD"
GIVEN = {"f1": "alice", "f2": SECRET}


@pytest.fixture
def story(owner: User) -> Story:
    story = of_now(Story.of(owner))
    story.start()
    story.claim()
    return story


def run(
    story: Story,
    driver: Scripted,
    meanwhile: Callable[[], Any] | None = None,
    *,
    when: Callable[[], Any] = lambda: True,
) -> None:
    """The runner to its end; ``meanwhile`` happens when somebody can act, and the driver is as far as ``when`` says."""

    async def both() -> None:
        bell = asyncio.Event()
        job = asyncio.create_task(runner.run_login(story.holding(), bell, driver))
        if meanwhile is not None:
            await until_db(lambda: when() and story.flow().interaction_id)
            await in_db(meanwhile)
            bell.set()
        await asyncio.wait_for(job, 15)

    asyncio.run(both())


def test_a_login_that_asks_once_ends_in_success_with_the_values_kept(story: Story) -> None:
    run(story, Scripted(ask_once), lambda: story.submit(GIVEN))
    row = story.row()
    assert story.flow().status == FlowStatus.SUCCESS
    assert row.credential is not None
    assert vault.unseal(row.credential.values) == {"username": "alice", "password": SECRET}
    assert row.requirements == {"kinds": ["identifier", "password"], "refs": ["password", "username"]}
    assert row.can_reauth() == (True, "requirements_satisfiable")


def test_an_answer_is_found_without_a_bell(story: Story, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "LOOK_SECONDS", 0.05)

    async def both() -> None:
        job = asyncio.create_task(runner.run_login(story.holding(), asyncio.Event(), Scripted(ask_once)))
        await until_db(lambda: story.flow().interaction_id)
        await in_db(story.submit, GIVEN)
        await asyncio.wait_for(job, 15)

    asyncio.run(both())
    assert story.flow().status == FlowStatus.SUCCESS


def test_A13_what_the_driver_could_not_do_is_the_end_of_the_flow_in_its_words(story: Story) -> None:
    async def script(target: Target, person: Person) -> Success:
        raise DriverFailed("bot_detected", "The site keeps robots out.", website_error="Unusual traffic")

    run(story, Scripted(script))
    flow = story.flow()
    assert (flow.status, flow.error_code) == (FlowStatus.FAILED, "bot_detected")
    assert (flow.error_message, flow.website_error) == ("The site keeps robots out.", "Unusual traffic")


def test_A48_a_fault_of_ours_is_an_internal_error_and_quotes_nothing(
    story: Story, caplog: pytest.LogCaptureFixture
) -> None:
    async def script(target: Target, person: Person) -> Success:
        answer = await person.ask(QUESTION)
        raise ValueError(f"cannot send {answer.field_values['f2']}")

    with caplog.at_level(logging.DEBUG):
        run(story, Scripted(script), lambda: story.submit(GIVEN))
    flow = story.flow()
    assert (flow.status, flow.error_code) == (FlowStatus.FAILED, "internal_error")
    assert "UNMISTAKABLE" not in flow.error_message
    assert "ValueError" in caplog.text, "the log says what and where"
    assert "test_runner.py" in caplog.text
    assert "UNMISTAKABLE" not in caplog.text


@pytest.mark.parametrize("ends", ["canceled", "rescued"])
def test_losing_the_flow_to_somebody_else_is_no_error(
    ends: str, story: Story, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "LOOK_SECONDS", 0.05)

    async def script(target: Target, person: Person) -> Success:
        await person.ask(QUESTION)
        await in_db(end)
        return SUCCESS

    def end() -> None:
        if ends == "canceled":
            story.cancel()
        else:
            transitions.give_back(hold=story.holding(), now=story.now)

    run(story, Scripted(script), lambda: story.submit(GIVEN))
    expected = FlowStatus.CANCELED if ends == "canceled" else FlowStatus.IN_PROGRESS
    assert story.flow().status == expected
    assert caplog.text == ""
    assert story.row().profile.state is None


def test_a_database_that_is_away_fails_no_flow(story: Story) -> None:
    """The lease runs out by itself, and another worker starts the login again."""

    async def script(target: Target, person: Person) -> Success:
        raise OperationalError("database is locked")

    with pytest.raises(OperationalError):
        run(story, Scripted(script))
    assert story.flow().status == FlowStatus.IN_PROGRESS


def test_telling_what_is_told_already_changes_nothing(story: Story) -> None:
    async def script(target: Target, person: Person) -> Success:
        await person.submitting_stored()
        mark = await in_db(cursor)
        await person.submitting_stored()
        await person.discovering()
        await person.discovering()
        assert await in_db(cursor) == mark + 1
        return SUCCESS

    run(story, Scripted(script))
    assert story.flow().status == FlowStatus.SUCCESS
    assert story.row().requirements == {"kinds": ["stored"], "refs": []}


CODE_FIELDS = [
    (Field(id="f1", ref="code", type="code", label="Code", linked_mfa_type="sms"), ["sms_code"], []),
    (Field(id="f1", ref="code", type="code", label="Code", linked_mfa_type="call"), ["sms_code"], []),
    (Field(id="f1", ref="code", type="code", label="Code", linked_mfa_type="email"), ["email_code"], []),
    (Field(id="f1", ref="code", type="code", label="Code", linked_mfa_type="totp"), ["totp_code"], []),
    (Field(id="f1", ref="code", type="code", label="Code"), ["input"], ["code"]),
    (Field(id="f1", ref="code", type="totp_code", label="Code"), ["totp_code"], []),
    (Field(id="f1", ref="pin", type="text", label="PIN"), ["text"], ["pin"]),
]


@pytest.mark.parametrize(("field", "kinds", "refs"), CODE_FIELDS)
def test_what_was_asked_is_remembered_as_a_requirement_and_codes_are_not_kept(
    field: Field, kinds: list[str], refs: list[str], story: Story
) -> None:
    async def script(target: Target, person: Person) -> Success:
        await person.ask(Question(fields=(field,)))
        return SUCCESS

    run(story, Scripted(script), lambda: story.submit({"f1": "123456"}))
    row = story.row()
    assert row.requirements == {"kinds": kinds, "refs": refs}
    kept = vault.unseal(row.credential.values) if row.credential else {}
    assert kept == ({"pin": "123456"} if field.type == "text" else {})


@pytest.mark.parametrize(("kind", "kinds"), [("account", ["choice"]), ("sso_provider", [])])
def test_a_choice_needs_a_person_next_time_unless_it_was_an_identity_provider(
    kind: Any, kinds: list[str], story: Story
) -> None:
    async def script(target: Target, person: Person) -> Success:
        answer = await person.ask(Question(choices=(Choice(id="c1", type=kind, label="One"),)))
        assert answer.choice_id == "c1"
        return SUCCESS

    run(story, Scripted(script), lambda: story.submit(choice_id="c1"))
    assert story.row().requirements == {"kinds": kinds, "refs": []}


def test_A46_an_external_action_is_shown_and_its_fallback_can_be_answered(story: Story) -> None:
    looked = threading.Event()

    async def script(target: Target, person: Person) -> Success:
        code = Question(fields=(Field(id="f1", ref="code", type="code", label="Code"),))
        await person.external_action(ExternalAction(message="Press 47", fallback=code))
        assert await person.answer_within(0.01) is None
        looked.set()
        while (answer := await person.answer_within(0.2)) is None:
            pass
        assert answer.field_values == {"f1": "123456"}
        return SUCCESS

    def meanwhile() -> None:
        assert story.flow().step == FlowStep.AWAITING_EXTERNAL_ACTION
        story.submit({"f1": "123456"})

    run(story, Scripted(script), meanwhile, when=looked.is_set)
    assert story.flow().status == FlowStatus.SUCCESS
    assert "external_action" in story.row().requirements["kinds"]


# ── What a driver is told ─────────────────────────────────────────────────────────────────────────────────────────


def test_a_target_holds_what_is_stored_and_prints_none_of_it(owner: User) -> None:
    kept = Credential.objects.create(
        owner=owner, name="kept", domain="example.com", created_at=T0, updated_at=T0, sso_provider="github",
        values=vault.seal({"password": SECRET}), value_keys=["password"], totp_secret=vault.seal("SECRETBASE32"),
    )  # fmt: skip
    story = Story.of(
        owner, credential=kept, login_url="https://example.com/in", allowed_domains=["example.com"]
    )
    profile = story.row().profile
    profile.state = vault.seal(STATE)
    profile.save()
    target = runner.load_target(story.id)
    assert (target.domain, target.login_url, target.allowed_domains) == (
        "example.com",
        "https://example.com/in",
        ("example.com",),
    )
    assert target.stored.values == {"password": SECRET}
    assert target.stored.totp is not None
    assert (target.stored.totp.secret, target.stored.sso_provider) == ("SECRETBASE32", "github")
    assert target.storage_state == STATE
    assert "UNMISTAKABLE" not in repr(target.stored)
    assert "SECRETBASE32" not in repr(target.stored)


def test_a_target_that_is_gone_is_a_lost_lease(db: Any) -> None:
    with pytest.raises(LeaseLost):
        runner.load_target("ma_gone")


# ── Checks ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("seen", "status", "reason"),
    [
        (True, "AUTHENTICATED", ""),
        (False, "NEEDS_AUTH", ""),
        (None, None, "did not show"),
        (DriverFailed("network_error", "The site does not answer."), None, "does not answer"),
        (ValueError(SECRET), None, "The check broke."),
    ],
)
def test_a_check_records_what_was_seen(
    seen: Any, status: str | None, reason: str, owner: User, caplog: pytest.LogCaptureFixture
) -> None:
    story = of_now(Story.of(owner)).bring_to(FlowStatus.SUCCESS)
    transitions.request_check(connection_id=story.id, actor=story.actor, now=story.now)
    asyncio.run(runner.run_check(story.claim(), Scripted(seen=seen)))
    check = HealthCheck.objects.get()
    assert check.status == status
    assert reason in check.reason
    assert "UNMISTAKABLE" not in check.reason + caplog.text


def test_a_profile_that_never_signed_in_is_not_looked_at(owner: User) -> None:
    story = of_now(Story.of(owner))
    transitions.request_check(connection_id=story.id, actor=story.actor, now=story.now)
    driver = Scripted(seen=True)
    asyncio.run(runner.run_check(story.claim(), driver))
    assert driver.targets == []
    assert HealthCheck.objects.get().status is None


def test_the_check_of_a_deleted_connection_ends_in_silence(owner: User) -> None:
    story = of_now(Story.of(owner))
    transitions.request_check(connection_id=story.id, actor=story.actor, now=story.now)
    hold = story.claim()
    transitions.delete_connection(connection_id=story.id, actor=story.actor, now=story.now)
    asyncio.run(runner.run_check(hold, Scripted(seen=True)))
    assert not HealthCheck.objects.exists()


# ── A caller that is cancelled ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("error", "logged"), [(LeaseLost("ma_1"), False), (ValueError(SECRET), True), (None, False)]
)
def test_a_verb_whose_caller_is_cancelled_is_finished_and_its_error_is_read(
    error: Exception | None, logged: bool, caplog: pytest.LogCaptureFixture
) -> None:
    begun, go_on, ended = threading.Event(), threading.Event(), threading.Event()

    def verb() -> None:
        begun.set()
        go_on.wait(10)
        ended.set()
        if error is not None:
            raise error

    async def both() -> None:
        job = asyncio.create_task(runner._db(verb))
        await asyncio.to_thread(begun.wait, 10)
        job.cancel()
        with pytest.raises(asyncio.CancelledError):
            await job
        go_on.set()
        while others := asyncio.all_tasks() - {asyncio.current_task()}:
            await asyncio.wait(others)

    asyncio.run(both())
    gc.collect()
    assert ended.is_set()
    assert "never retrieved" not in caplog.text
    assert "UNMISTAKABLE" not in caplog.text
    assert ("broke with ValueError" in caplog.text) is logged
