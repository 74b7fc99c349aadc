"""Any order of verbs by people, workers (also those that lost their hold), time and the reconciler keeps the promises.

Hypothesis plays; after every step the rows, the log and the promises of the design are compared.
"""

from __future__ import annotations

import datetime as dt
import itertools
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
from django.conf import settings as project
from django.contrib.auth.models import User
from django.db import transaction
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from connections import payloads, reconciler, registry, tasks, transitions
from connections.access import of_user
from connections.models import LoginFlow, ManagedAuthConnection, Submission, Task
from connections.states import FLOW_END, TASK_END, TASK_HELD, FlowStatus, FlowStep, TaskKind
from connections.tasks import Hold, InvalidTransition, LeaseLost
from connections.transitions import (
    AlreadyExists,
    FlowOver,
    InvalidSubmission,
    LoginInProgress,
    StaleInteraction,
    SubmittedAnswer,
)
from events.models import Event
from tests.connections.flow_support import CHOICES, CODE, FIELDS, GOOD, KINDS, STATE, T0, everything

#: What a verb may answer to somebody who comes at the wrong moment. Anything else (IntegrityError above all) is a fault.
NAMED = (
    AlreadyExists,
    FlowOver,
    InvalidSubmission,
    InvalidTransition,
    LeaseLost,
    LoginInProgress,
    StaleInteraction,
    ManagedAuthConnection.DoesNotExist,
)
#: Set by the test below, because the library makes the machines itself.
OWNERS = itertools.count()
DOMAINS = ["one.example", "two.example"]

domains = st.sampled_from(DOMAINS)
#: 0: the newest hold, 1: the one before it, and so on.
ages = st.sampled_from([0, 0, 0, 0, 1, 1, 2, 5])


class Switchboard(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.atomic = transaction.atomic()
        self.atomic.__enter__()
        self.now = T0
        self.holds: list[Hold] = []
        self.workers = itertools.count()
        self.ids: dict[str, str] = {}
        self.last_answer: dict[str, tuple[SubmittedAnswer, int]] = {}

    def teardown(self) -> None:
        transaction.set_rollback(True)
        self.atomic.__exit__(None, None, None)

    @initialize()
    def begin(self) -> None:
        user = User.objects.create_user(f"player-{next(OWNERS)}")
        key, _ = registry.create_api_key(owner_id=user.pk, name="test", now=T0)
        self.owner, self.actor, self.keyed = user, of_user(user), of_user(user, api_key=key)
        for domain in DOMAINS:
            self.create(domain)

    def do(self, about: str | None, verb: Callable[..., Any], /, **arguments: Any) -> Any:
        """Call the verb; when it raises its named exception, nothing may have changed."""
        if about is not None:
            transitions.expire_if_due(connection_id=about, now=self.now)
        before, mark = everything(), Event.objects.count()
        try:
            return verb(**arguments, now=self.now)
        except NAMED as error:
            refusal = error
        assert everything() == before, f"{refusal!r} came with a change"
        assert Event.objects.count() == mark, f"{refusal!r} came with an event"
        return refusal

    # ── People ────────────────────────────────────────────────────────────────────────────────────────────────────

    @rule(domain=domains)
    def create(self, domain: str) -> None:
        made = self.do(
            None, transitions.create_connection, owner_id=self.owner.pk, domain=domain, profile_name="p",
            config={}, actor=self.actor,
        )  # fmt: skip
        if isinstance(made, AlreadyExists):
            assert made.existing_id == self.ids[domain]
        else:
            self.ids[domain] = made.id

    @rule(domain=domains, interval=st.sampled_from([600, 3600]))
    def update(self, domain: str, interval: int) -> None:
        changes = {"health_check_interval": interval}
        self.do(
            None,
            transitions.update_connection,
            connection_id=self.ids[domain],
            changes=changes,
            actor=self.actor,
        )

    @precondition(lambda self: len(self.holds) > 3)
    @rule(domain=domains)
    def delete(self, domain: str) -> None:
        self.do(None, transitions.delete_connection, connection_id=self.ids[domain], actor=self.actor)

    @rule(domain=domains, keyed=st.booleans())
    def start(self, domain: str, keyed: bool) -> None:
        connection_id = self.ids[domain]
        running = LoginFlow.objects.filter(connection_id=connection_id, status=FlowStatus.IN_PROGRESS).first()
        started = self.do(
            connection_id, transitions.start_login, connection_id=connection_id,
            actor=self.keyed if keyed else self.actor,
        )  # fmt: skip
        if isinstance(started, tuple) and running is not None and not running.is_due(self.now):
            # The replay of the same request: the same flow, only for a key, only in its first half minute.
            assert keyed
            assert started[0].pk == running.pk
            assert self.now - running.started_at <= transitions.LOGIN_REPLAY

    @rule(domain=domains)
    def handoff(self, domain: str) -> None:
        self.do(self.ids[domain], transitions.new_handoff, connection_id=self.ids[domain], actor=self.actor)

    @rule(
        domain=domains,
        kind=st.sampled_from(["right", "right", "unnamed", "stale", "incomplete", "legacy", "choice"]),
    )
    def submit(self, domain: str, kind: str) -> None:
        connection_id = self.ids[domain]
        flow = LoginFlow.objects.filter(connection_id=connection_id).order_by("-number").first()
        named = flow.interaction_id if flow else "mai_none"
        coded = flow is not None and flow.fields == [CODE]
        values = {"f4": "402877"} if coded else dict(GOOD)
        legacy = {"code": "402877"} if coded else {"username": "alice", "password": "pw"}
        answers: dict[str, Any] = {
            "right": SubmittedAnswer(interaction_id=named, field_values=values),
            "unnamed": SubmittedAnswer(field_values=values),
            "stale": SubmittedAnswer(interaction_id="mai_of_before", field_values=values),
            "incomplete": SubmittedAnswer(interaction_id=named, field_values={"f1": "alice"}),
            "legacy": SubmittedAnswer(fields=legacy),
            "choice": SubmittedAnswer(interaction_id=named, choice_id="c3"),
        }
        self._submit(connection_id, answers[kind])

    @rule(domain=domains)
    def submit_again(self, domain: str) -> None:
        """The answer to the request before was lost, so the client sends it again."""
        if domain in self.last_answer:
            answer, number = self.last_answer[domain]
            before = everything()
            transitions.expire_if_due(connection_id=self.ids[domain], now=self.now)
            flow = LoginFlow.objects.filter(connection_id=self.ids[domain]).order_by("-number").first()
            again = self._submit(self.ids[domain], answer)
            if (
                answer.interaction_id
                and flow is not None
                and flow.number == number
                and not flow.interaction_id
            ):
                assert isinstance(again, LoginFlow)
                assert everything()["Submission"] == before["Submission"] or flow.is_over

    def _submit(self, connection_id: str, answer: SubmittedAnswer) -> Any:
        transitions.expire_if_due(connection_id=connection_id, now=self.now)
        open_before = (
            LoginFlow.objects.filter(connection_id=connection_id).exclude(interaction_id="").exists()
        )
        done = self.do(
            connection_id, transitions.submit, connection_id=connection_id, answer=answer, actor=self.actor
        )
        if isinstance(done, LoginFlow) and open_before:
            fresh = LoginFlow.objects.get(pk=done.pk)
            assert fresh.interaction_id == "" or answer.interaction_id not in ("", fresh.interaction_id)
            domain = next(name for name, pk in self.ids.items() if pk == connection_id)
            self.last_answer[domain] = (answer, fresh.number)
        return done

    @rule(domain=domains)
    def cancel(self, domain: str) -> None:
        before = everything()["LoginFlow"]
        self.do(
            self.ids[domain],
            transitions.cancel,
            connection_id=self.ids[domain],
            actor=self.actor,
            reason="enough",
        )
        again = everything()
        self.do(
            self.ids[domain],
            transitions.cancel,
            connection_id=self.ids[domain],
            actor=self.actor,
            reason="enough",
        )
        assert everything() == again, before

    @rule(domain=domains)
    def acknowledge(self, domain: str) -> None:
        flow = LoginFlow.objects.filter(connection_id=self.ids[domain]).order_by("-number").first()
        if flow is not None:
            self.do(self.ids[domain], transitions.acknowledge, flow_id=flow.pk, actor=self.actor)

    @rule(domain=domains)
    def check(self, domain: str) -> None:
        self.do(None, transitions.request_check, connection_id=self.ids[domain], actor=self.actor)

    # ── Time ──────────────────────────────────────────────────────────────────────────────────────────────────────

    @rule(seconds=st.sampled_from([1, 1, 5, 29, 31, 120, 601, 1201]))
    def time_passes(self, seconds: int) -> None:
        self.now += dt.timedelta(seconds=seconds)

    @rule()
    def reconcile(self) -> None:
        assert -1 not in reconciler.run(reconciler.URGENT, now=self.now).values()
        again = reconciler.run(reconciler.URGENT, now=self.now)
        assert not any(again.values()), "the second pass finds nothing to do"
        assert not Task.objects.filter(status__in=TASK_HELD, lease_expires_at__lte=self.now).exists()

    # ── Workers ───────────────────────────────────────────────────────────────────────────────────────────────────

    @rule()
    def claim(self) -> None:
        hold = tasks.claim(worker=f"w{next(self.workers)}", kinds=KINDS, now=self.now)
        if hold is not None:
            self.holds.append(hold)

    # Short ways to where it becomes interesting; chance alone seldom gets there.

    @rule(domain=domains)
    def begin_and_ask(self, domain: str) -> None:
        self.start(domain, False)
        self.claim()
        self.ask(0, FIELDS)

    @precondition(lambda self: self.holds)
    @rule()
    def die_and_be_replaced(self) -> None:
        self.time_passes(project.LEASE_SECONDS + 1)
        self.reconcile()
        self.claim()
        # The one that was taken for dead wakes up and goes on.
        for age, hold in enumerate(reversed(self.holds)):
            if age and hold.task_id == self.holds[-1].task_id:
                self.login(age, transitions.fail, code="internal_error", message="I am back.")

    def work(self, age: int, verb: Callable[..., Any], **arguments: Any) -> Any:
        """A verb with a hold: the present one may change things, a stale one never does."""
        if age >= len(self.holds):
            return None
        hold = self.holds[-1 - age]
        if hold.connection_id is not None:
            transitions.expire_if_due(connection_id=hold.connection_id, now=self.now)
        present = Task.objects.filter(
            pk=hold.task_id, leased_by=hold.worker, attempts=hold.attempt, status__in=TASK_HELD
        ).exists()
        before, mark = everything(), Event.objects.count()
        done = self.do(None, verb, hold=hold, **arguments)
        if not present:
            assert everything() == before, "a stale hold changed something"
            assert Event.objects.count() == mark
        return done

    def login(self, age: int, verb: Callable[..., Any], **arguments: Any) -> Any:
        if age < len(self.holds) and self.holds[-1 - age].kind != TaskKind.HEALTH_CHECK:
            return self.work(age, verb, **arguments)
        return None

    @rule(age=ages)
    def renew(self, age: int) -> None:
        self.work(age, tasks.renew)

    @rule(age=ages)
    def discovering(self, age: int) -> None:
        self.login(age, transitions.discovering)

    @rule(age=ages)
    def submit_stored(self, age: int) -> None:
        self.login(age, transitions.submit_stored)

    @rule(age=ages, fields=st.sampled_from([FIELDS, FIELDS, [CODE], []]))
    def ask(self, age: int, fields: list[Any]) -> None:
        self.login(age, transitions.await_input, fields=fields, choices=[] if fields else CHOICES)

    @rule(age=ages, fields=st.sampled_from([[], [CODE]]), message=st.sampled_from(["one", "two"]))
    def external(self, age: int, fields: list[Any], message: str) -> None:
        self.login(age, transitions.await_external_action, message=message, fields=fields, choices=[])

    @rule(age=ages)
    def human(self, age: int) -> None:
        self.login(age, transitions.await_human, live_view_url="http://testserver/live")

    @rule(age=ages)
    def take(self, age: int) -> None:
        taken = self.login(age, transitions.take_submission)
        if isinstance(taken, transitions.TakenAnswer):
            assert self.login(age, transitions.take_submission) is None, "values are handed out once"

    @rule(age=ages)
    def succeed(self, age: int) -> None:
        self.login(
            age, transitions.succeed, storage_state=STATE, post_login_url="https://one.example/", values={"username": "a"},
            requirements={"kinds": [], "refs": []},
        )  # fmt: skip

    @rule(age=ages)
    def fail(self, age: int) -> None:
        self.login(age, transitions.fail, code="credentials_invalid", message="No.")

    @rule(age=ages)
    def give_back(self, age: int) -> None:
        self.work(age, transitions.give_back)

    @rule(age=ages, seen=st.sampled_from([True, False, None]))
    def record_check(self, age: int, seen: bool | None) -> None:
        if age < len(self.holds) and self.holds[-1 - age].kind == TaskKind.HEALTH_CHECK:
            self.work(age, transitions.record_check, signed_in=seen, reason="")

    # ── The promises ──────────────────────────────────────────────────────────────────────────────────────────────

    @invariant()
    def the_log_tells_exactly_what_happened(self) -> None:
        topics: dict[str, list[Event]] = defaultdict(list)
        for event in Event.objects.filter(audience=self.owner.pk).order_by("id") if self.ids else []:
            topics[event.topic].append(event)
        for log in topics.values():
            # One event per version: none without a change, no change without one, and versions only grow.
            assert [event.version for event in log] == list(range(1, len(log) + 1))
            assert log[0].name.endswith(".created")
        for row in ManagedAuthConnection.objects.all():
            self._connection_agrees(row, topics.pop(f"connection:{row.pk}"))
        for task in Task.objects.all():
            log = topics.pop(f"task:{task.pk}")
            statuses = [event.data["status"] for event in log]
            assert (statuses[-1], log[-1].version) == (task.status, task.version)
            assert not TASK_END & set(statuses[:-1]), "something happened after the end"
        for topic, log in topics.items():
            assert topic.startswith("connection:")
            assert log[-1].name == "connection.deleted"
            ended = {
                event.object_id: event.data["flow_status"] for event in log if event.name == "flow.state"
            }
            assert set(ended.values()) <= FLOW_END

    def _connection_agrees(self, row: ManagedAuthConnection, log: list[Event]) -> None:
        assert len(log) == row.version
        status = [event.data["status"] for event in log if "status" in event.data][-1]
        assert status == row.status
        flows: dict[str, list[Event]] = defaultdict(list)
        for event in log:
            if event.name == "flow.state":
                flows[event.object_id].append(event)
        for flow in row.flows.all():
            told = flows.pop(flow.pk)
            assert told[0].data["flow_step"] == FlowStep.DISCOVERING
            assert not [event for event in told[:-1] if event.data["flow_status"] in FLOW_END]
            said = {
                key: value for key, value in told[-1].data.items() if key not in ("id", "at", "connection_id")
            }
            assert said == payloads.flow_state(flow), "replaying the log does not give the row"
            if flow.status == FlowStatus.EXPIRED:
                assert told[-1].at == flow.completed_at
                assert flow.completed_at is not None
                assert flow.completed_at <= min(flow.expires_at, self.now)
        assert not flows

    @invariant()
    def at_most_one_flow_runs_and_its_task_with_it(self) -> None:
        for connection_id in ManagedAuthConnection.objects.values_list("pk", flat=True):
            running = LoginFlow.objects.filter(connection_id=connection_id, status=FlowStatus.IN_PROGRESS)
            assert running.count() <= 1
        for flow in LoginFlow.objects.all():
            assert flow.is_over == Task.objects.get(flow=flow).is_over
        worn = Task.objects.filter(attempts__gt=project.TASK_ATTEMPTS).exclude(kind=TaskKind.HEALTH_CHECK)
        assert not worn.exists()

    @invariant()
    def submitted_values_live_until_they_are_taken_and_no_longer_than_the_flow(self) -> None:
        kept = Submission.objects.exclude(sealed=None).select_related("flow")
        for submission in kept:
            assert submission.taken_at is None
            assert submission.flow.status == FlowStatus.IN_PROGRESS
        over = LoginFlow.objects.exclude(status=FlowStatus.IN_PROGRESS)
        assert not over.exclude(handoff_sealed=None).exists()
        assert not over.exclude(interaction_id="").exists()


@pytest.mark.django_db
def test_A05_A14_C20_C21_C22_C56_no_order_of_verbs_breaks_a_promise() -> None:
    run_state_machine_as_test(
        Switchboard,
        settings=settings(
            max_examples=30,
            stateful_step_count=40,
            deadline=None,
            # A step is a dozen queries on a file: slow by hypothesis' measure, and meant to be.
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
            print_blob=True,
            database=None,
        ),
    )
