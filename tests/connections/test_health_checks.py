"""Checks by the clock, re-authentication and the breakers (wire contract, section 7). Time is an argument everywhere."""

from __future__ import annotations

import datetime as dt
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from django.conf import settings
from django.contrib.auth.models import User
from django.db import connection as database
from django.db import connections as databases
from django.test.utils import CaptureQueriesContext

from connections import fragments, health, payloads, reconciler, registry, tasks, transitions
from connections.models import HealthCheck, LoginFlow, ManagedAuthConnection, SiteCircuit, Task
from connections.states import ConnectionStatus, FlowStatus, FlowStep, FlowType, TaskKind, TaskStatus
from connections.tasks import Hold
from tests.connections.flow_support import T0, Story, after, cursor, events

HOUR = 3600.0
VALUES = {"username": "alice", "password": "S3cret-of-alice"}


def signed_in(owner: User, domain: str = "example.com", **config: Any) -> Story:
    """Logged in at T0, with what it takes to do it again."""
    story = Story.of(owner, domain=domain, **config).bring_to(FlowStep.SUBMITTING)
    story.succeed(dict(VALUES), requirements={"kinds": ["identifier", "password"], "refs": ["password"]})
    return story


def checks() -> list[Task]:
    """Open checks, oldest first."""
    return list(
        Task.objects.filter(kind=TaskKind.HEALTH_CHECK, finished_at=None).order_by("created_at", "pk")
    )


def claim_check(now: dt.datetime, worker: str = "w") -> Hold:
    hold = tasks.claim(worker=worker, kinds=[TaskKind.HEALTH_CHECK], now=now)
    assert hold is not None
    return hold


def check(story: Story, seen: bool | None, now: dt.datetime, *, by_hand: bool = False) -> HealthCheck:
    """One check from its beginning to its end: of the clock, whatever the plan was, or of a person."""
    if by_hand:
        transitions.request_check(connection_id=story.id, actor=story.actor, now=now)
    else:
        ManagedAuthConnection.objects.filter(pk=story.id).update(next_check_at=now)
        assert transitions.check_by_clock(connection_id=story.id, now=now)
    return transitions.record_check(hold=claim_check(now), signed_in=seen, reason="why", now=now)


def fail_reauth(story: Story, now: dt.datetime) -> None:
    """The re-authentication that was started fails."""
    story.now = now
    story.claim()
    assert story.flow().type == FlowType.REAUTH
    story.fail()


def about(pause: dt.timedelta | None, seconds: float) -> bool:
    assert pause is not None
    return seconds * 0.9 <= pause.total_seconds() <= seconds * 1.1


def moments(since: int) -> list[str]:
    return [event.name for event in events(since)]


# ── The plan ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_login_plans_the_first_check_one_interval_later_with_jitter(owner: User) -> None:
    planned = [signed_in(owner, domain=f"{n}.example").row().next_check_at for n in range(8)]
    assert all(about(moment - T0, HOUR) for moment in planned if moment)
    assert len(set(planned)) == 8, "they do not come together"


def test_nothing_is_planned_without_a_login_or_where_checks_are_off(owner: User) -> None:
    assert Story.of(owner).row().next_check_at is None
    assert signed_in(owner, domain="off.example", health_checks=False).row().next_check_at is None


def test_another_interval_and_switching_checks_on_and_off_plan_anew(owner: User) -> None:
    story = signed_in(owner)

    def change(**changes: Any) -> dt.datetime | None:
        transitions.update_connection(
            connection_id=story.id, changes=changes, actor=story.actor, now=after(10)
        )
        return story.row().next_check_at

    sooner = change(health_check_interval=300)
    assert sooner is not None
    assert about(sooner - after(10), 300)
    assert change(login_url="https://example.com/login") == sooner, "what has nothing to do with it"
    assert change(health_checks=False) is None
    again = change(health_checks=True)
    assert again is not None
    assert about(again - after(10), 300)


def test_what_has_no_plan_gets_one_spread_over_its_interval(owner: User) -> None:
    stories = [signed_in(owner, domain=f"{n}.example") for n in range(8)]
    Story.of(owner, domain="never.example")
    ManagedAuthConnection.objects.update(next_check_at=None)
    assert reconciler.plan_checks(after(5)) == 8
    planned = [story.row().next_check_at for story in stories]
    assert all(moment and after(5) <= moment <= after(5 + HOUR) for moment in planned)
    assert len(set(planned)) == 8
    assert reconciler.plan_checks(after(6)) == 0


def test_a_pass_plans_a_bounded_number(owner: User, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconciler, "LIMIT", 2)
    for n in range(3):
        signed_in(owner, domain=f"{n}.example")
    ManagedAuthConnection.objects.update(next_check_at=None)
    assert [reconciler.plan_checks(T0) for _ in range(3)] == [2, 1, 0]


# ── Queueing ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_check_is_queued_when_it_is_due_and_once(owner: User) -> None:
    story = signed_in(owner)
    assert reconciler.queue_checks(after(HOUR * 0.8)) == 0
    mark = cursor()
    assert reconciler.queue_checks(after(HOUR * 1.2)) == 1
    (task,) = checks()
    assert (task.connection_id, task.created_by) == (story.id, "health check")
    assert moments(mark) == ["task.created"]
    assert reconciler.queue_checks(after(HOUR * 9)) == 0, "one is queued already, and the next is planned"


def test_what_a_person_asked_for_is_not_queued_a_second_time(owner: User) -> None:
    story = signed_in(owner)
    transitions.request_check(connection_id=story.id, actor=story.actor, now=after(HOUR * 2))
    assert reconciler.queue_checks(after(HOUR * 2)) == 0
    assert len(checks()) == 1


def test_while_somebody_logs_in_nothing_is_checked(owner: User) -> None:
    story = signed_in(owner)
    story.now = after(HOUR * 2)
    story.start()
    assert reconciler.queue_checks(after(HOUR * 2)) == 0
    assert not transitions.check_by_clock(connection_id=story.id, now=after(HOUR * 2))
    story.claim()
    story.cancel()
    assert reconciler.queue_checks(after(HOUR * 2)) == 1, "its turn was not lost"


def test_who_is_signed_out_or_has_nothing_to_look_at_is_not_checked(owner: User) -> None:
    out, bare = signed_in(owner, domain="out.example"), signed_in(owner, domain="bare.example")
    ManagedAuthConnection.objects.filter(pk=out.id).update(status=ConnectionStatus.NEEDS_AUTH)
    ManagedAuthConnection.objects.filter(pk=bare.id).update(post_login_url="")
    assert reconciler.queue_checks(after(HOUR * 2)) == 0
    assert [story.row().next_check_at for story in (out, bare)] == [None, None], "and not looked at again"


def test_a_connection_that_was_deleted_meanwhile_is_nothing_to_check(owner: User) -> None:
    story = signed_in(owner)
    transitions.delete_connection(connection_id=story.id, actor=story.actor, now=T0)
    assert not transitions.check_by_clock(connection_id=story.id, now=after(HOUR * 2))
    assert not transitions.reauth_by_clock(connection_id=story.id, now=after(HOUR * 2))
    assert not transitions.plan_check(connection_id=story.id, now=after(HOUR * 2))


def test_only_so_many_checks_are_open_at_a_time_and_the_rest_come_after_them(
    owner: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reconciler, "OPEN_CHECKS", 2)
    for n in range(5):
        signed_in(owner, domain=f"{n}.example")
    now = after(HOUR * 2)
    assert reconciler.queue_checks(now) == 2
    assert reconciler.queue_checks(now) == 0
    transitions.record_check(hold=claim_check(now), signed_in=True, reason="", now=now)
    assert reconciler.queue_checks(now) == 1


@pytest.mark.django_db(transaction=True)
def test_C27_several_reconcilers_at_once_queue_each_check_once(owner: User) -> None:
    stories = [signed_in(owner, domain=f"{n}.example") for n in range(5)]
    barrier = threading.Barrier(4)

    def sweep() -> int:
        barrier.wait(20)
        try:
            return reconciler.queue_checks(after(HOUR * 2))
        finally:
            databases.close_all()

    with ThreadPoolExecutor(4) as pool:
        done = [job.result() for job in [pool.submit(sweep) for _ in range(4)]]
    assert sum(done) == 5
    assert sorted(str(task.connection_id) for task in checks()) == sorted(story.id for story in stories)


def test_nothing_due_costs_one_query_for_each_sweep_and_each_has_an_index(owner: User) -> None:
    for n in range(3):
        signed_in(owner, domain=f"{n}.example")
    ManagedAuthConnection.objects.update(reauth_after=None)
    wanted = {
        reconciler.queue_checks: "connection_check_due",
        reconciler.start_reauths: "connection_reauth_due",
        reconciler.plan_checks: "connection_check_unplanned",
    }
    for sweep, index in wanted.items():
        with CaptureQueriesContext(
            database,
        ) as asked:
            assert sweep(after(1)) == 0
        (query,) = asked.captured_queries
        if database.vendor == "sqlite":
            with database.cursor() as cursor_:
                cursor_.execute(f"EXPLAIN QUERY PLAN {query['sql']}")
                plan = " ".join(str(row) for row in cursor_.fetchall())
            assert index in plan


# ── Results ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_result_is_stamped_and_only_a_clear_one_changes_the_status(owner: User) -> None:
    story = signed_in(owner, auto_reauth=False)
    now = after(HOUR)
    for seen, status in ((True, "AUTHENTICATED"), (None, "AUTHENTICATED"), (False, "NEEDS_AUTH")):
        now += dt.timedelta(hours=1)
        row = check(story, seen, now)
        assert (story.row().last_auth_check_at, story.row().status) == (now, status)
        shown = payloads.timeline_check(row)
        assert ("error_message" in shown) == (seen is None)
    assert story.row().next_check_at is None, "who is signed out needs no check"


def test_checks_that_cannot_tell_become_rarer_up_to_a_day_and_a_clear_one_ends_that(owner: User) -> None:
    story = signed_in(owner)
    now, pauses = after(HOUR), []
    for _ in range(7):
        check(story, None, now)
        planned = story.row().next_check_at
        assert planned is not None
        pauses.append(planned - now)
        now = planned
        # The circuit has tests of its own.
        SiteCircuit.objects.all().delete()
    hours = [2, 4, 8, 16, 24, 24, 24]
    assert all(about(pause, HOUR * n) for pause, n in zip(pauses, hours, strict=True))
    check(story, True, now)
    row = story.row()
    assert row.checks_unclear == 0
    assert row.next_check_at is not None
    assert about(row.next_check_at - now, HOUR)


def test_a_check_by_hand_that_cannot_tell_leaves_the_plan_alone(owner: User) -> None:
    story = signed_in(owner)
    planned = story.row().next_check_at
    for _ in range(health.CIRCUIT_AFTER + 1):
        check(story, None, after(60), by_hand=True)
    row = story.row()
    assert (row.next_check_at, row.checks_unclear) == (planned, 0)
    assert health.circuit("example.com") is None, "nobody opens the circuit of others by asking often"


def test_a_check_that_got_lost_is_followed_by_the_next_one_all_the_same(owner: User) -> None:
    story = signed_in(owner)
    assert reconciler.queue_checks(after(HOUR * 2)) == 1
    (task,) = checks()
    transitions.kill_task(task_id=task.id, actor=story.actor, reason="", now=after(HOUR * 2))
    assert reconciler.queue_checks(after(HOUR * 2.5)) == 0
    assert reconciler.queue_checks(after(HOUR * 3.5)) == 1


# ── Signing in again ──────────────────────────────────────────────────────────────────────────────────────────────


def test_a_lost_session_is_signed_in_again_in_the_same_transaction(owner: User) -> None:
    story = signed_in(owner)
    mark = cursor()
    check(story, False, after(HOUR))
    assert moments(mark) == [
        "task.created", "task.status", "connection.updated", "connection.status", "task.status", "flow.state", "task.created",
    ]  # fmt: skip
    flow = story.flow()
    assert (flow.type, flow.status, flow.started_by) == (
        FlowType.REAUTH,
        FlowStatus.IN_PROGRESS,
        "health check",
    )
    assert story.task().kind == TaskKind.REAUTH
    assert story.row().status == ConnectionStatus.NEEDS_AUTH, "until it has succeeded"
    story.now = after(HOUR + 5)
    story.claim()
    story.succeed(dict(VALUES))
    row = story.row()
    assert row.status == ConnectionStatus.AUTHENTICATED
    assert row.next_check_at is not None
    assert about(row.next_check_at - story.now, HOUR)


@pytest.mark.parametrize(
    "config",
    [
        {"auto_reauth": False},
        {"save_credentials": False},
        {"external_credential": {"provider": "vault", "path": "x"}},
    ],
)
def test_where_a_person_is_needed_it_needs_auth_and_nothing_is_started(
    config: dict[str, Any], owner: User
) -> None:
    story = signed_in(owner, **config)
    check(story, False, after(HOUR))
    row = story.row()
    assert (row.status, row.reauth_after) == (ConnectionStatus.NEEDS_AUTH, None)
    assert LoginFlow.objects.count() == 1
    assert reconciler.start_reauths(after(HOUR * 99)) == 0


def test_health_checks_that_are_off_start_nothing_when_a_person_checks(owner: User) -> None:
    story = signed_in(owner, health_checks=False)
    check(story, False, after(HOUR), by_hand=True)
    assert LoginFlow.objects.count() == 1


def test_a_check_of_a_connection_that_never_was_signed_in_starts_nothing(owner: User) -> None:
    story = Story.of(owner)
    check(story, False, after(HOUR), by_hand=True)
    assert LoginFlow.objects.count() == 0
    assert reconciler.start_reauths(after(HOUR * 99)) == 0


def test_what_a_person_does_meanwhile_goes_first(owner: User) -> None:
    story = signed_in(owner)
    assert reconciler.queue_checks(after(HOUR * 2)) == 1
    story.now = after(HOUR * 2)
    hold = claim_check(story.now)
    story.start()
    transitions.record_check(hold=hold, signed_in=False, reason="", now=story.now)
    assert story.flow().type == FlowType.LOGIN
    assert reconciler.start_reauths(after(HOUR * 2)) == 0
    story.claim()
    story.fail()
    assert reconciler.start_reauths(after(HOUR * 2)) == 1, "they did not succeed, so the clock goes on"
    assert story.flow().type == FlowType.REAUTH


def test_failing_reauths_back_off_and_are_given_up_after_six(owner: User) -> None:
    story = signed_in(owner)
    now = after(HOUR)
    check(story, False, now)
    for failures, minutes in enumerate((5, 10, 20, 40, 80), start=1):
        fail_reauth(story, now)
        row = story.row()
        assert row.reauths_failed == failures
        assert row.reauth_after is not None
        assert about(row.reauth_after - now, minutes * 60)
        assert reconciler.start_reauths(row.reauth_after - dt.timedelta(seconds=1)) == 0
        now = row.reauth_after
        assert reconciler.start_reauths(now) == 1
        assert reconciler.start_reauths(now) == 0
    fail_reauth(story, now)
    row = story.row()
    assert (row.reauths_failed, row.reauth_after) == (health.REAUTH_LIMIT, None)
    assert reconciler.start_reauths(now + dt.timedelta(days=99)) == 0
    assert LoginFlow.objects.filter(type=FlowType.REAUTH).count() == health.REAUTH_LIMIT


def test_the_pause_between_reauths_has_an_end(owner: User) -> None:
    story = signed_in(owner)
    row = story.row()
    row.reauths_failed = 3
    for _ in range(2):
        health.reauth_failed(row, T0)
    assert row.reauth_after is not None
    assert row.reauth_after - T0 <= health.REAUTH_LONGEST * 1.1
    assert health._doubled(health.REAUTH_FIRST, 99, health.REAUTH_LONGEST) == health.REAUTH_LONGEST


def test_a_reauth_that_expires_counts_and_one_that_a_person_cancels_ends_it(owner: User) -> None:
    story = signed_in(owner)
    check(story, False, after(HOUR))
    story.now = after(HOUR)
    story.claim()
    story.ask()
    late = after(HOUR + settings.INPUT_SECONDS)
    assert transitions.expire_if_due(connection_id=story.id, now=late)
    row = story.row()
    assert row.reauths_failed == 1
    assert row.reauth_after is not None
    assert about(row.reauth_after - late, 300)
    story.now = row.reauth_after
    assert reconciler.start_reauths(story.now) == 1
    story.cancel()
    row = story.row()
    assert (row.reauths_failed, row.reauth_after) == (1, None)
    assert reconciler.start_reauths(after(HOUR * 99)) == 0


def test_a_login_of_a_person_that_fails_is_not_counted_and_one_that_succeeds_resets(owner: User) -> None:
    story = signed_in(owner)
    now = after(HOUR)
    check(story, False, now)
    fail_reauth(story, now)
    planned = story.row().reauth_after
    story.now = after(HOUR + 10)
    story.start()
    story.claim()
    story.fail()
    assert (story.row().reauths_failed, story.row().reauth_after) == (1, planned)
    story.start()
    story.claim()
    story.succeed(dict(VALUES))
    assert (story.row().reauths_failed, story.row().reauth_after) == (0, None)


def given_up(owner: User) -> Story:
    story = signed_in(owner)
    check(story, False, after(HOUR))
    fail_reauth(story, after(HOUR))
    ManagedAuthConnection.objects.filter(pk=story.id).update(
        reauths_failed=health.REAUTH_LIMIT, reauth_after=None
    )
    return story


def test_a_check_that_a_person_asks_for_begins_anew_after_it_was_given_up(owner: User) -> None:
    story = given_up(owner)
    check(story, False, after(HOUR * 5), by_hand=True)
    assert story.flow().status == FlowStatus.IN_PROGRESS
    fail_reauth(story, after(HOUR * 5))
    row = story.row()
    assert row.reauths_failed == 1
    assert row.reauth_after is not None


def test_a_person_who_asks_while_the_clock_checks_is_heard(owner: User) -> None:
    story = signed_in(owner)
    assert reconciler.queue_checks(after(HOUR * 2)) == 1
    hold = claim_check(after(HOUR * 2))
    mine = transitions.request_check(connection_id=story.id, actor=story.actor, now=after(HOUR * 2))
    assert mine.id == hold.task_id
    ManagedAuthConnection.objects.filter(pk=story.id).update(
        status=ConnectionStatus.NEEDS_AUTH, reauths_failed=health.REAUTH_LIMIT
    )
    transitions.record_check(hold=hold, signed_in=False, reason="", now=after(HOUR * 2))
    assert (story.flow().type, story.row().reauths_failed) == (FlowType.REAUTH, 0)


@pytest.mark.parametrize("what", ["login_url", "credential", "values"])
def test_a_changed_setting_or_credential_is_worth_another_try_at_once(what: str, owner: User) -> None:
    story = given_up(owner)
    now = after(HOUR * 5)
    if what == "values":
        credential = story.row().credential
        assert credential is not None
        registry.update_credential(
            credential_id=credential.id,
            changes={"values": {"password": "the right one"}},
            actor=story.actor,
            now=now,
        )
    else:
        other = registry.create_credential(
            owner_id=owner.pk, name="other", domain="example.com", values=VALUES, now=now
        )
        changes = {"credential": other} if what == "credential" else {"login_url": "https://example.com/in"}
        transitions.update_connection(connection_id=story.id, changes=changes, actor=story.actor, now=now)
    assert reconciler.start_reauths(now) == 1
    assert story.row().reauths_failed == 0


def test_reauths_that_are_switched_off_meanwhile_are_not_started(owner: User) -> None:
    story = signed_in(owner)
    check(story, False, after(HOUR))
    fail_reauth(story, after(HOUR))
    ManagedAuthConnection.objects.filter(pk=story.id).update(auto_reauth=False)
    assert reconciler.start_reauths(after(HOUR * 2)) == 0
    assert story.row().reauth_after is None


@pytest.mark.django_db(transaction=True)
def test_C27_several_reconcilers_at_once_start_one_reauth(owner: User) -> None:
    story = signed_in(owner)
    check(story, False, after(HOUR))
    fail_reauth(story, after(HOUR))
    barrier = threading.Barrier(4)

    def sweep() -> int:
        barrier.wait(20)
        try:
            return reconciler.start_reauths(after(HOUR * 2))
        finally:
            databases.close_all()

    with ThreadPoolExecutor(4) as pool:
        done = [job.result() for job in [pool.submit(sweep) for _ in range(4)]]
    assert sum(done) == 1
    assert LoginFlow.objects.filter(status=FlowStatus.IN_PROGRESS).count() == 1


# ── The circuit of a site ─────────────────────────────────────────────────────────────────────────────────────────


def open_circuit(owner: User, now: dt.datetime) -> list[Story]:
    """Connections of two profiles to one site, which has stopped to answer."""
    stories = [signed_in(owner, profile=f"p{n}") for n in range(health.CIRCUIT_AFTER)]
    for story in stories:
        assert health.circuit("example.com") is None
        check(story, None, now)
    return stories


def test_enough_checks_of_a_site_that_cannot_tell_open_its_circuit(owner: User) -> None:
    now = after(HOUR)
    stories = open_circuit(owner, now)
    row = health.circuit("example.com")
    assert row is not None
    assert row.retry_at is not None
    assert about(row.retry_at - now, 300)
    other = signed_in(owner, domain="other.example")
    for story in (stories[0], other):
        ManagedAuthConnection.objects.filter(pk=story.id).update(next_check_at=now)
    assert reconciler.queue_checks(now) == 2
    assert [task.connection_id for task in checks()] == [other.id], "the other site is checked"
    waiting = stories[0].row()
    assert waiting.status == ConnectionStatus.AUTHENTICATED, "nobody is marked as failing"
    assert waiting.next_check_at is not None
    assert row.retry_at <= waiting.next_check_at <= row.retry_at + dt.timedelta(seconds=HOUR / 10)


def test_one_clear_check_in_between_starts_the_count_anew(owner: User) -> None:
    stories = [signed_in(owner, profile=f"p{n}") for n in range(health.CIRCUIT_AFTER)]
    for seen in (None, True):
        for story in stories[1:]:
            check(story, seen, after(HOUR))
    check(stories[0], None, after(HOUR))
    assert health.circuit("example.com") is None


def test_checks_that_were_under_way_when_it_opened_do_not_open_it_wider(owner: User) -> None:
    now = after(HOUR)
    stories = [signed_in(owner, profile=f"p{n}") for n in range(health.CIRCUIT_AFTER + 3)]
    ManagedAuthConnection.objects.update(next_check_at=now)
    assert reconciler.queue_checks(now) == len(stories)
    for n in range(len(stories)):
        transitions.record_check(hold=claim_check(now, f"w{n}"), signed_in=None, reason="", now=now)
    assert SiteCircuit.objects.get().failures == health.CIRCUIT_AFTER


def test_after_the_pause_one_trial_decides_and_the_pause_doubles_up_to_six_hours(owner: User) -> None:
    now = after(HOUR)
    stories = open_circuit(owner, now)
    minutes = [10, 20, 40, 80, 160, 320, 360, 360]
    for n in minutes:
        row = SiteCircuit.objects.get()
        assert row.retry_at is not None
        now = row.retry_at
        ManagedAuthConnection.objects.update(next_check_at=now)
        assert reconciler.queue_checks(now) == len(stories)
        assert len(checks()) == 1, "one of them is the trial"
        transitions.record_check(hold=claim_check(now), signed_in=None, reason="", now=now)
        row.refresh_from_db()
        assert about(row.retry_at - now, n * 60)
    now = row.retry_at
    ManagedAuthConnection.objects.update(next_check_at=now)
    reconciler.queue_checks(now)
    transitions.record_check(hold=claim_check(now), signed_in=True, reason="", now=now)
    assert health.circuit("example.com") is None
    # The others were put off, and nobody was lost.
    assert reconciler.queue_checks(now + health.TRIAL + dt.timedelta(seconds=HOUR / 10)) == len(stories) - 1
    assert len(checks()) == len(stories) - 1


def test_a_trial_that_is_lost_is_followed_by_another(owner: User) -> None:
    now = after(HOUR)
    stories = open_circuit(owner, now)
    now += dt.timedelta(minutes=6)
    ManagedAuthConnection.objects.filter(pk__in=[story.id for story in stories[:2]]).update(next_check_at=now)
    reconciler.queue_checks(now)
    (lost,) = checks()
    transitions.kill_task(task_id=lost.id, actor=stories[0].actor, reason="", now=now)
    reconciler.queue_checks(now + health.TRIAL + dt.timedelta(seconds=HOUR / 10))
    assert [task.spec for task in checks()] == [health.AS_TRIAL]


def test_a_person_may_check_an_open_circuit_and_closes_it_when_that_can_tell(owner: User) -> None:
    stories = open_circuit(owner, after(HOUR))
    check(stories[0], None, after(HOUR + 1), by_hand=True)
    assert SiteCircuit.objects.get().failures == health.CIRCUIT_AFTER
    check(stories[0], True, after(HOUR + 2), by_hand=True)
    assert health.circuit("example.com") is None


@pytest.mark.django_db(transaction=True)
def test_of_many_that_ask_an_open_circuit_at_once_one_gets_the_trial(owner: User) -> None:
    now = after(HOUR)
    stories = open_circuit(owner, now)
    now += dt.timedelta(minutes=6)
    ManagedAuthConnection.objects.update(next_check_at=now)
    barrier = threading.Barrier(len(stories))

    def sweep(story: Story) -> None:
        barrier.wait(20)
        try:
            transitions.check_by_clock(connection_id=story.id, now=now)
        finally:
            databases.close_all()

    with ThreadPoolExecutor(len(stories)) as pool:
        for job in [pool.submit(sweep, story) for story in stories]:
            job.result()
    assert [task.spec for task in checks()] == [health.AS_TRIAL]


# ── What is shown ─────────────────────────────────────────────────────────────────────────────────────────────────


def facts(story: Story) -> str:
    item = fragments.present(story.id)
    assert item is not None
    return fragments.connection_parts(item)


def test_the_page_says_when_the_next_check_comes_and_why_none_does(owner: User) -> None:
    story = signed_in(owner, auto_reauth=False)
    planned = story.row().next_check_at
    assert planned is not None
    assert f'every 60 min, next <time datetime="{planned:%Y-%m-%dT%H:%M:%S}' in facts(story)
    SiteCircuit.objects.create(domain="example.com", failures=5, retry_at=after(300), updated_at=T0)
    assert "paused until" in facts(story)
    assert "5 checks of this site in a row could not tell" in facts(story)
    check(story, False, after(HOUR), by_hand=True)
    assert "not while it is signed out" in facts(story)


def test_the_page_says_how_signing_in_again_goes(owner: User) -> None:
    story = signed_in(owner)
    assert "<dd>by itself</dd>" in facts(story)
    check(story, False, after(HOUR))
    fail_reauth(story, after(HOUR))
    assert "after 1 failure in a row" in facts(story)
    ManagedAuthConnection.objects.update(reauths_failed=6, reauth_after=None)
    assert "not any more: it failed 6 times in a row" in facts(story)


def test_the_timelines_show_the_check_the_new_login_and_its_success(owner: User, client_of: Any) -> None:
    story = signed_in(owner)
    check(story, False, after(HOUR))
    story.now = after(HOUR + 5)
    story.claim()
    story.succeed(dict(VALUES))
    check(story, None, after(HOUR * 2))
    told = [entry.text for entry in fragments.timeline(story.row(), story.flow())]
    assert [text for text in told if text != "changed"] == [
        "health check: not signed in any more",
        "the profile is signed out",
        "re-authentication started by health check",
        "signed in",
        "the profile is signed in",
        "health check: could not tell. why",
    ]
    rows = client_of(owner).get(f"/auth/connections/{story.id}/timeline").json()
    assert [(row["type"], row["status"]) for row in rows] == [
        ("health_check", "AUTHENTICATED"),
        ("reauth", "SUCCESS"),
        ("health_check", "NEEDS_AUTH"),
        ("login", "SUCCESS"),
    ]
    assert rows[0]["error_message"] == "It could not be told. why"


def test_the_api_shows_what_the_clock_will_do(owner: User, client_of: Any) -> None:
    story = signed_in(owner)
    api = client_of(owner)
    shown = api.get(f"/auth/connections/{story.id}").json()
    planned = story.row().next_check_at
    assert planned is not None
    assert (shown["next_check_at"], shown["reauths_failed"], shown["reauth_after"]) == (
        payloads.timestamp(planned),
        0,
        None,
    )


def test_of_many_connections_every_one_is_checked_once_in_its_interval(
    owner: User,
) -> None:
    stories = [signed_in(owner, domain=f"{n}.example", health_check_interval=300) for n in range(30)]
    seen: set[str] = set()
    now = T0
    for _ in range(11):
        now += dt.timedelta(seconds=30)
        reconciler.queue_checks(now)
        for task in checks():
            seen.add(str(task.connection_id))
            transitions.record_check(hold=claim_check(now), signed_in=True, reason="", now=now)
    assert seen == {story.id for story in stories}
    assert Task.objects.filter(kind=TaskKind.HEALTH_CHECK, status=TaskStatus.COMPLETED).count() == 30
