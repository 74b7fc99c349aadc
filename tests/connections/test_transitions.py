"""The verbs, row by row of the contract: what one call does, in one transaction, and what it tells."""

from __future__ import annotations

import datetime as dt
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from django.conf import settings
from django.contrib.auth.models import User
from django.db import connections as databases

from connections import payloads, reconciler, transitions, vault
from connections.models import (
    Credential,
    HealthCheck,
    LoginFlow,
    ManagedAuthConnection,
    Profile,
    Submission,
    Task,
)
from connections.states import (
    FLOW_END,
    ConnectionStatus,
    FlowStatus,
    FlowStep,
    FlowType,
    TaskKind,
    TaskStatus,
)
from connections.tasks import InvalidTransition, LeaseLost
from connections.transitions import (
    AlreadyExists,
    FlowOver,
    InvalidSubmission,
    LoginInProgress,
    QuotaReached,
    StaleInteraction,
    SubmittedAnswer,
    TakenAnswer,
)
from events.models import Event
from events.signals import status_changed
from tests.connections.flow_support import (
    ACCOUNT,
    CHOICES,
    CODE,
    FIELDS,
    GITHUB,
    GOOD,
    GOOGLE,
    NOTE,
    PASSKEY,
    PASSWORD,
    SMS,
    STATE,
    T0,
    USERNAME,
    Story,
    after,
    cursor,
    events,
    everything,
)


@pytest.fixture
def story(owner: User) -> Story:
    return Story.of(owner)


def told(since: int) -> list[str]:
    return [event.name for event in events(since)]


@pytest.fixture
def broken_log() -> Iterator[Callable[[str], None]]:
    """Call it with an event's name: from then on, telling that event breaks (and with it the transaction of its change)."""
    names: set[str] = set()

    def refuse(sender: Any, *, changes: Any, **kwargs: Any) -> None:
        if names.intersection(change.name for change in changes):
            raise RuntimeError("the process died here")

    status_changed.connect(refuse, dispatch_uid="tests.broken_log")
    yield names.add
    status_changed.disconnect(dispatch_uid="tests.broken_log")


# ── Connections ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_creating_tells_once_and_makes_the_profile(owner: User) -> None:
    story = Story.of(owner, profile="fresh")
    assert Profile.objects.get(name="fresh").owner_id == owner.pk
    assert told(0) == ["connection.created"]
    assert events()[0].data["id"] == story.id
    assert events()[0].audience == owner.pk


def test_creating_the_same_again_names_the_one_that_exists(story: Story) -> None:
    mark = cursor()
    with pytest.raises(AlreadyExists) as caught:
        Story.of(story.owner)
    assert caught.value.existing_id == story.id
    assert told(mark) == []


@pytest.mark.django_db(transaction=True)
def test_creating_the_same_in_parallel_makes_one_and_names_it_to_the_others(owner: User) -> None:
    barrier = threading.Barrier(4)

    def create() -> str:
        barrier.wait(10)
        try:
            return "made " + Story.of(owner).id
        except AlreadyExists as other:
            return "exists " + other.existing_id
        finally:
            databases.close_all()

    with ThreadPoolExecutor(4) as pool:
        answers = [job.result() for job in [pool.submit(create) for _ in range(4)]]
    only = ManagedAuthConnection.objects.get().id
    assert sorted(answers) == [f"exists {only}"] * 3 + [f"made {only}"]
    assert told(0) == ["connection.created"]


def test_a_full_quota_creates_nothing_not_even_the_profile(story: Story, settings: Any) -> None:
    settings.CONNECTION_QUOTA = 1
    mark = cursor()
    with pytest.raises(QuotaReached):
        Story.of(story.owner, domain="other.example", profile="new")
    assert not Profile.objects.filter(name="new").exists()
    assert told(mark) == []


def test_A05_updating_to_what_it_is_already_tells_nothing(story: Story) -> None:
    mark = cursor()
    transitions.update_connection(
        connection_id=story.id,
        changes={"health_check_interval": 3600, "login_url": ""},
        actor=story.actor,
        now=T0,
    )
    assert told(mark) == []
    transitions.update_connection(
        connection_id=story.id, changes={"health_check_interval": 600}, actor=story.actor, now=T0
    )
    assert told(mark) == ["connection.updated"]
    assert events(mark)[0].data["health_check_interval"] == 600
    with pytest.raises(ValueError, match="status"):
        transitions.update_connection(
            connection_id=story.id, changes={"status": "AUTHENTICATED"}, actor=story.actor, now=T0
        )


def test_deleting_cancels_the_running_flow_first_and_ends_its_tasks(story: Story) -> None:
    story.bring_to(FlowStep.AWAITING_INPUT)
    check = transitions.request_check(connection_id=story.id, actor=story.actor, now=T0)
    mark = cursor()
    transitions.delete_connection(connection_id=story.id, actor=story.actor, now=after(5))
    names = told(mark)
    assert names == ["flow.state", "task.status", "task.status", "connection.deleted"]
    assert events(mark)[0].data["flow_status"] == "CANCELED"
    assert not ManagedAuthConnection.objects.exists()
    assert not LoginFlow.objects.exists()
    assert not Submission.objects.exists()
    assert set(Task.objects.values_list("status", flat=True)) == {TaskStatus.KILLED}
    assert Task.objects.get(pk=check.pk).error == "The connection was deleted."
    with pytest.raises(LeaseLost):
        story.ask()


# ── Starting, and starting again ──────────────────────────────────────────────────────────────────────────────────


def test_C13_C56_a_login_is_told_from_its_first_moment_and_created_comes_before_any_status(
    story: Story,
) -> None:
    mark = cursor()
    flow = story.start()
    story.claim()
    story.ask()
    story.submit(GOOD)
    story.succeed()
    task_events = [(e.name, e.data["status"]) for e in events(mark) if e.topic.startswith("task:")]
    assert task_events == [
        ("task.created", "queued"),
        ("task.status", "running"),
        ("task.status", "waiting_for_input"),
        ("task.status", "running"),
        ("task.status", "completed"),
    ]
    created = next(e for e in events(mark) if e.name == "task.created")
    assert created.data["kind"] == "login"
    assert created.data["flow_id"] == flow.id
    versions = [e.version for e in events(mark) if e.topic == f"connection:{story.id}"]
    assert versions == sorted(set(versions))


def test_a_second_login_while_one_runs_is_refused_and_named(story: Story) -> None:
    flow = story.start()
    with pytest.raises(LoginInProgress) as caught:
        story.start()
    assert caught.value.flow.id == flow.id


def test_the_same_login_request_within_30_seconds_from_the_same_key_gets_the_same_answer(
    story: Story,
) -> None:
    key = story.with_key()
    flow, code = transitions.start_login(connection_id=story.id, actor=key, now=T0)
    mark = cursor()
    again, same = transitions.start_login(connection_id=story.id, actor=key, now=after(30))
    assert (again.id, same) == (flow.id, code)
    assert told(mark) == []
    with pytest.raises(LoginInProgress):
        transitions.start_login(connection_id=story.id, actor=key, now=after(31))


def test_another_key_that_starts_a_login_gets_no_replay(story: Story) -> None:
    story.start(actor=story.with_key())
    with pytest.raises(LoginInProgress):
        story.start(actor=story.with_key())


def test_there_is_no_replay_of_a_login_after_a_submission(story: Story) -> None:
    key = story.with_key()
    story.start(actor=key)
    story.claim()
    story.ask()
    story.submit(GOOD)
    with pytest.raises(LoginInProgress):
        story.start(actor=key)


def test_a_login_after_the_deadline_supersedes_the_stale_flow(story: Story) -> None:
    old = story.start()
    story.now = after(settings.FLOW_SECONDS)
    mark = cursor()
    new = story.start()
    assert (new.id, new.number) != (old.id, old.number)
    assert LoginFlow.objects.get(pk=old.pk).status == FlowStatus.EXPIRED
    assert told(mark) == ["flow.state", "task.status", "flow.state", "task.created"]


def test_a_reauth_is_a_task_of_its_own_kind(story: Story) -> None:
    story.start(flow_type=FlowType.REAUTH)
    assert story.task().kind == TaskKind.REAUTH
    assert story.flow().type == FlowType.REAUTH


def test_a_fresh_handoff_code_replaces_the_one_before(story: Story) -> None:
    _, first = transitions.start_login(connection_id=story.id, actor=story.actor, now=T0)
    flow, second = transitions.new_handoff(connection_id=story.id, actor=story.actor, now=after(5))
    assert first != second
    assert flow.handoff_hash == vault.hash_token(second)
    story.cancel()
    with pytest.raises(FlowOver):
        transitions.new_handoff(connection_id=story.id, actor=story.actor, now=after(6))
    assert story.flow().handoff_sealed is None


# ── Submitting ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_A08_accepting_a_submission_consumes_the_interaction_and_sets_submitting(story: Story) -> None:
    story.bring_to(FlowStep.AWAITING_INPUT)
    mark = cursor()
    story.submit(GOOD)
    shown = payloads.managed_auth(story.row(), story.flow())
    assert shown["flow_step"] == "SUBMITTING"
    assert shown["interaction_id"] is None
    assert shown["fields"] is None
    assert shown["discovered_fields"] is None
    event = events(mark)[0]
    assert (event.name, event.data["flow_step"]) == ("flow.state", "SUBMITTING")
    assert "fields" not in event.data
    assert "interaction_id" not in event.data


@pytest.mark.parametrize("dies_at", ["flow.state", "task.status"])
def test_A08_a_crash_while_accepting_leaves_neither_the_answer_nor_the_step(
    dies_at: str, story: Story, broken_log: Callable[[str], None]
) -> None:
    story.bring_to(FlowStep.AWAITING_INPUT)
    before, mark = everything(), cursor()
    broken_log(dies_at)
    with pytest.raises(RuntimeError):
        story.submit(GOOD)
    assert everything() == before
    assert told(mark) == []


def test_A09_an_event_holds_everything_that_can_be_acted_on(story: Story) -> None:
    story.start()
    story.claim()
    mark = cursor()
    story.ask([USERNAME, PASSWORD], CHOICES)
    story.submit(GOOD)
    story.ask([CODE])
    states = [e.data for e in events(mark) if e.name == "flow.state"]
    assert [field["id"] for field in states[0]["fields"]] == ["f1", "f2"]
    assert len(states[0]["choices"]) == len(CHOICES)
    # What is not asked any more is an empty list or absent, never "as before".
    assert [field["id"] for field in states[2]["fields"]] == ["f4"]
    assert states[2]["choices"] == states[2]["mfa_options"] == states[2]["pending_sso_buttons"] == []


def test_A10_the_sso_provider_follows_the_choice_into_event_and_answer(story: Story) -> None:
    story.start()
    story.claim()
    story.ask([], CHOICES)
    mark = cursor()
    story.submit(choice_id="github", interaction_id=story.flow().interaction_id)
    assert events(mark)[0].data["sso_provider"] == "github"
    assert payloads.flow_fields(story.flow())["sso_provider"] == "github"


def test_A11_what_outlives_steps_is_in_every_event(story: Story) -> None:
    mark = cursor()
    story.bring_to(FlowStep.SUBMITTING)
    for event in events(mark):
        if event.name == "flow.state":
            assert event.data["flow_type"] == "LOGIN"
            assert event.data["hosted_url"].endswith(f"/login/{story.id}")
            assert "code=" not in event.data["hosted_url"]


def test_A28_a_stale_interaction_is_refused_and_changes_nothing(story: Story) -> None:
    story.bring_to(FlowStep.AWAITING_INPUT)
    old = story.flow().interaction_id
    story.submit(GOOD)
    story.ask([CODE])
    before = everything()
    with pytest.raises(StaleInteraction, match="something else"):
        story.submit({"f1": "bob", "f2": "other"}, interaction_id=old)
    assert everything() == before


@pytest.mark.parametrize(
    "answer",
    [
        {},
        {"field_values": {"f1": "alice", "f2": "pw"}, "fields": {"username": "alice"}},
        {"choice_id": "c1", "sso_provider": "google"},
        {"mfa_option_id": "sms", "sso_provider": "google"},
        {"fields": {"username": "a", "password": "b"}, "mfa_option_id": "sms"},
        {"field_values": {"f1": "alice"}},
        {"field_values": {"f1": "alice", "f2": "   "}},
        {"field_values": {"unknown": "x"}},
        {"field_values": {}},
        {"fields": {}},
        {"fields": {"username": "alice"}},
        {"choice_id": "nobody offered this"},
        {"mfa_option_id": "call"},
        {"sign_in_option_id": "c1"},
        {"sso_button_selector": "#elsewhere"},
        {"sso_provider": "apple"},
        {"field_values": {"f1": "alice", "f2": "x" * 10_001}},
    ],
)
def test_A29_an_answer_that_does_not_fit_the_question_is_refused_without_a_trace(
    answer: dict[str, Any], story: Story
) -> None:
    story.start()
    story.claim()
    story.ask(FIELDS, CHOICES)
    before, mark = everything(), cursor()
    with pytest.raises(InvalidSubmission) as caught:
        story.submit(interaction_id=story.flow().interaction_id, **answer)
    assert str(caught.value)
    assert "alice" not in str(caught.value)
    assert everything() == before
    assert told(mark) == []


def test_A29_missing_required_fields_are_named_one_by_one(story: Story) -> None:
    story.bring_to(FlowStep.AWAITING_INPUT)
    with pytest.raises(InvalidSubmission) as caught:
        story.submit({"f3": "a note"})
    assert str(caught.value) == "Please fill in: User name, Password."
    assert [detail["message"] for detail in caught.value.details] == [
        "f1: User name is required.",
        "f2: Password is required.",
    ]


def test_unknown_field_ids_are_ignored(story: Story) -> None:
    story.bring_to(FlowStep.AWAITING_INPUT)
    story.submit({**GOOD, "f99": "nobody asked"})
    taken = transitions.take_submission(hold=story.holding(), now=T0)
    assert taken is not None
    assert taken.field_values == GOOD


@pytest.mark.parametrize(
    ("answer", "choice"),
    [
        ({"choice_id": "c5"}, ACCOUNT),
        ({"mfa_option_id": "sms"}, SMS),
        ({"mfa_option_id": "switch"}, PASSKEY),
        ({"mfa_option_id": "passkey"}, PASSKEY),
        ({"sign_in_option_id": "c5"}, ACCOUNT),
        ({"sso_button_selector": "#google"}, GOOGLE),
        ({"sso_button_selector": ""}, GITHUB),
        ({"sso_provider": "google"}, GOOGLE),
        ({"sso_provider": "github"}, GITHUB),
        ({"fields": {}, "sso_provider": "github"}, GITHUB),
        ({"fields": {}, "mfa_option_id": "sms"}, SMS),
    ],
)
def test_every_way_of_choosing_reaches_the_worker_as_the_same_choice(
    answer: dict[str, Any], choice: dict[str, Any], story: Story
) -> None:
    story.start()
    story.claim()
    story.ask(FIELDS, CHOICES)
    story.submit(**answer)
    assert transitions.take_submission(hold=story.holding(), now=T0) == TakenAnswer(
        field_values={}, choice_id=choice["id"]
    )


def test_legacy_fields_are_matched_by_their_name_and_need_no_interaction_id(story: Story) -> None:
    story.bring_to(FlowStep.AWAITING_INPUT)
    story.submit(fields={"username": "alice", "password": "pw", "surplus": "x"})
    taken = transitions.take_submission(hold=story.holding(), now=T0)
    assert taken is not None
    assert taken.field_values == {"f1": "alice", "f2": "pw"}
    assert "pw" not in repr(taken)


def test_submitted_values_are_handed_out_once_and_then_erased(story: Story) -> None:
    story.bring_to(FlowStep.SUBMITTING)
    assert transitions.take_submission(hold=story.holding(), now=after(1)) is not None
    assert transitions.take_submission(hold=story.holding(), now=after(2)) is None
    row = Submission.objects.get()
    assert (row.sealed, row.taken_at) == (None, after(1))


def test_A30_the_identical_submission_is_accepted_again_and_acted_on_once(story: Story) -> None:
    story.bring_to(FlowStep.AWAITING_INPUT)
    asked = story.flow().interaction_id
    story.submit(GOOD)
    before, mark = everything(), cursor()
    assert story.submit(GOOD, interaction_id=asked).step == FlowStep.SUBMITTING
    assert everything() == before
    assert told(mark) == []
    story.ask([CODE])
    # Also when the next question is open already: the id says which one was meant.
    assert story.submit(GOOD, interaction_id=asked).step == FlowStep.AWAITING_INPUT
    with pytest.raises(StaleInteraction):
        story.submit({"f1": "alice", "f2": "another"}, interaction_id=asked)


def test_A30_the_same_words_without_an_id_answer_the_new_question(story: Story) -> None:
    """The password once more, after the site did not take it."""
    story.bring_to(FlowStep.AWAITING_INPUT)
    story.submit(fields={"username": "alice", "password": "pw"})
    story.ask()
    assert story.submit(fields={"username": "alice", "password": "pw"}).step == FlowStep.SUBMITTING
    assert Submission.objects.count() == 2


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("identical", [True, False])
def test_A30_of_two_parallel_submissions_exactly_one_is_acted_on(identical: bool, owner: User) -> None:
    story = Story.of(owner).bring_to(FlowStep.AWAITING_INPUT)
    asked, mark = story.flow().interaction_id, cursor()
    barrier = threading.Barrier(2)

    def submit(password: str) -> str:
        barrier.wait(10)
        try:
            story.submit({"f1": "alice", "f2": password}, interaction_id=asked)
            return "accepted"
        except StaleInteraction:
            return "stale"
        finally:
            databases.close_all()

    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(submit, password) for password in ("one", "one" if identical else "two")]
        answers = sorted(job.result() for job in jobs)
    assert answers == ["accepted", "accepted" if identical else "stale"]
    assert Submission.objects.count() == 1
    assert told(mark) == ["flow.state", "task.status"]


def test_A14_A18_submitting_after_the_end_says_that_it_is_over(story: Story) -> None:
    story.bring_to(FlowStatus.FAILED)
    with pytest.raises(FlowOver) as caught:
        story.submit(GOOD, interaction_id="mai_x")
    assert caught.value.flow is not None
    assert caught.value.flow.status == FlowStatus.FAILED


def test_a_page_of_an_older_flow_cannot_answer_the_newer_one(story: Story) -> None:
    story.bring_to(FlowStatus.CANCELED)
    old = story.flow().id
    story.start()
    story.claim()
    story.ask()
    with pytest.raises(FlowOver):
        story.submit(GOOD, flow_id=old)


def test_submitting_before_any_flow_ran_says_so(story: Story) -> None:
    with pytest.raises(FlowOver) as caught:
        story.submit(fields={"username": "a"})
    assert caught.value.flow is None


def test_A45_a_rejected_field_is_marked_and_has_an_interaction_of_its_own(story: Story) -> None:
    story.bring_to(FlowStep.SUBMITTING)
    first = Submission.objects.get().interaction_id
    story.ask([{**PASSWORD, "reason": "rejected"}], website_error="Wrong password.")
    shown = payloads.flow_fields(story.flow())
    assert shown["fields"] is not None
    assert shown["fields"][0]["reason"] == "rejected"
    assert shown["website_error"] == "Wrong password."
    assert shown["interaction_id"] not in (None, first)


def test_A46_an_external_action_shows_its_text_and_its_alternatives_and_the_next_step_moves_on(
    story: Story,
) -> None:
    story.start()
    story.claim()
    story.external([CODE])
    shown = payloads.flow_fields(story.flow())
    assert shown["flow_step"] == "AWAITING_EXTERNAL_ACTION"
    assert shown["external_action_message"] == "Press 47 on your phone."
    assert shown["fields"] is not None
    assert shown["interaction_id"]
    mark = cursor()
    story.external([CODE])
    assert told(mark) == [], "the same again is no change"
    story.submit({"f4": "123456"})
    assert payloads.flow_fields(story.flow())["external_action_message"] is None


def test_A46_without_alternatives_there_is_nothing_to_submit(story: Story) -> None:
    story.start()
    story.claim()
    story.external()
    assert payloads.flow_fields(story.flow())["interaction_id"] is None
    with pytest.raises(StaleInteraction):
        story.submit(fields={"code": "1"})


def test_A47_human_intervention_is_a_step_of_its_own_with_its_live_view(story: Story) -> None:
    story.start()
    story.claim()
    story.human()
    shown = payloads.flow_fields(story.flow())
    assert (shown["flow_step"], shown["live_view_url"]) == (
        "AWAITING_HUMAN_INTERVENTION",
        "http://testserver/live/1",
    )
    transitions.discovering(hold=story.holding(), now=T0)
    assert payloads.flow_fields(story.flow())["live_view_url"] is None


def test_A48_no_event_and_no_row_holds_a_submitted_value_in_plain(story: Story) -> None:
    story.start()
    story.claim()
    story.ask()
    story.submit({"f1": "alice", "f2": "UNMISTAKABLE-PASSWORD"})
    assert "UNMISTAKABLE" not in repr(everything())
    assert "UNMISTAKABLE" not in repr([event.data for event in events()])
    assert "UNMISTAKABLE" not in repr(SubmittedAnswer(fields={"password": "UNMISTAKABLE"}))
    story.succeed({"password": "UNMISTAKABLE-PASSWORD"})
    assert "UNMISTAKABLE" not in repr(everything())
    assert "UNMISTAKABLE" not in repr([event.data for event in events()])
    assert "cookie-of-the-site" not in repr(everything())


def test_A50_a_submission_is_told_on_the_topic_that_every_page_of_the_connection_follows(
    story: Story,
) -> None:
    story.bring_to(FlowStep.AWAITING_INPUT)
    mark = cursor()
    story.submit(GOOD)
    assert events(mark)[0].topic == f"connection:{story.id}"


# ── Ends ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_success_is_one_transaction_with_the_profile_and_the_status(story: Story) -> None:
    story.bring_to(FlowStep.SUBMITTING)
    mark = cursor()
    story.succeed({"username": "alice", "password": "pw"})
    row = story.row()
    assert row.status == ConnectionStatus.AUTHENTICATED
    assert row.authenticated_at == T0
    assert vault.unseal(row.profile.state) == STATE
    assert row.credential is not None
    assert vault.unseal(row.credential.values) == {"username": "alice", "password": "pw"}
    assert row.credential.value_keys == ["password", "username"]
    assert told(mark) == ["flow.state", "task.status", "connection.updated", "connection.status"]
    assert events(mark)[3].data["previous_status"] == "NEEDS_AUTH"


@pytest.mark.parametrize("dies_at", ["flow.state", "task.status", "connection.updated", "connection.status"])
def test_a_success_that_cannot_be_told_has_not_happened(
    dies_at: str, story: Story, broken_log: Callable[[str], None]
) -> None:
    story.bring_to(FlowStep.SUBMITTING)
    before, mark = everything(), cursor()
    broken_log(dies_at)
    with pytest.raises(RuntimeError):
        story.succeed({"password": "pw"})
    assert everything() == before
    assert told(mark) == []


def test_values_are_kept_only_where_that_is_wanted(owner: User) -> None:
    story = Story.of(owner, save_credentials=False).bring_to(FlowStep.SUBMITTING)
    story.succeed({"password": "pw"})
    assert story.row().credential is None
    assert not Credential.objects.exists()


def test_kept_values_are_merged_into_the_credential_that_is_there(story: Story) -> None:
    story.bring_to(FlowStep.SUBMITTING)
    story.succeed({"username": "alice", "password": "old"})
    story.start()
    story.claim()
    story.succeed({"password": "new"})
    assert vault.unseal(Credential.objects.get().values) == {"username": "alice", "password": "new"}


def test_a_second_success_does_not_tell_a_status_that_did_not_change(story: Story) -> None:
    story.bring_to(FlowStatus.SUCCESS)
    story.start()
    story.claim()
    mark = cursor()
    story.succeed()
    assert told(mark) == ["flow.state", "task.status"]


def test_a_failed_flow_leaves_the_profile_as_it_was(story: Story) -> None:
    story.bring_to(FlowStatus.SUCCESS)
    before = Profile.objects.values().get()
    status = story.row().status
    story.start()
    story.claim()
    story.fail()
    assert Profile.objects.values().get() == before
    assert story.row().status == status


def test_A13_a_failure_carries_its_code_its_message_and_what_the_site_said(story: Story) -> None:
    story.start()
    story.claim()
    mark = cursor()
    story.fail("credentials_invalid", "The site did not accept it.", website_error="Wrong password")
    data = events(mark)[0].data
    assert (data["flow_status"], data["flow_step"]) == ("FAILED", "COMPLETED")
    assert (data["error_code"], data["error_message"], data["website_error"]) == (
        "credentials_invalid",
        "The site did not accept it.",
        "Wrong password",
    )


def test_A13_a_cancellation_says_who_and_why(story: Story) -> None:
    story.bring_to(FlowStep.AWAITING_INPUT)
    story.cancel("Wrong account.")
    flow = story.flow()
    assert (flow.status, flow.error_message, flow.ended_by) == (
        FlowStatus.CANCELED,
        "Wrong account.",
        "owner",
    )


@pytest.mark.parametrize("end", sorted(FLOW_END))
def test_A14_C22_after_the_end_nothing_changes_it(end: str, story: Story) -> None:
    story.bring_to(end)
    before, mark = everything(), cursor()
    story.cancel()
    assert not transitions.expire_if_due(connection_id=story.id, now=after(86_400))
    for verb in (story.succeed, story.fail, story.ask, story.human):
        with pytest.raises(FlowOver):
            verb()
    transitions.give_back(hold=story.holding(), now=T0)
    assert everything() == before
    assert told(mark) == []


@pytest.mark.django_db(transaction=True)
def test_C20_C23_cancelling_and_succeeding_at_once_have_one_outcome_everywhere(owner: User) -> None:
    story = Story.of(owner).bring_to(FlowStep.SUBMITTING)
    barrier, mark = threading.Barrier(2), cursor()

    def run(verb: Callable[[], Any]) -> None:
        barrier.wait(10)
        try:
            verb()
        except (FlowOver, LeaseLost):
            return
        finally:
            databases.close_all()

    with ThreadPoolExecutor(2) as pool:
        for job in [pool.submit(run, verb) for verb in (story.cancel, story.succeed)]:
            job.result()
    flow, task = story.flow(), story.task()
    ends = [event.data["flow_status"] for event in events(mark) if event.name == "flow.state"]
    assert ends == [flow.status]
    assert (flow.status, task.status) in {
        (FlowStatus.CANCELED, TaskStatus.KILLED),
        (FlowStatus.SUCCESS, TaskStatus.COMPLETED),
    }
    assert (story.row().status == "AUTHENTICATED") == (flow.status == FlowStatus.SUCCESS)


# ── Time ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("where", "deadline", "code"),
    [
        (FlowStep.DISCOVERING, settings.FLOW_SECONDS, "session_expired"),
        (FlowStep.SUBMITTING, settings.FLOW_SECONDS, "session_expired"),
        (FlowStep.AWAITING_INPUT, settings.INPUT_SECONDS, "awaiting_input_timeout"),
        (FlowStep.AWAITING_EXTERNAL_ACTION, settings.FLOW_SECONDS, "external_action_timeout"),
    ],
)
def test_expiry_is_dated_at_the_deadline_not_at_its_noticing(
    where: FlowStep, deadline: int, code: str, story: Story
) -> None:
    story.bring_to(where)
    mark = cursor()
    assert not transitions.expire_if_due(connection_id=story.id, now=after(deadline - 1))
    assert transitions.expire_if_due(connection_id=story.id, now=after(deadline + 5000))
    flow = story.flow()
    assert (flow.status, flow.error_code) == (FlowStatus.EXPIRED, code)
    assert flow.completed_at == after(deadline)
    assert story.task().finished_at == after(deadline)
    assert {event.at for event in events(mark)} == {after(deadline)}


def test_C20_expiry_by_reading_and_by_the_reconciler_is_in_the_log_once(story: Story) -> None:
    story.bring_to(FlowStep.AWAITING_INPUT)
    mark, late = cursor(), after(settings.INPUT_SECONDS)
    assert transitions.expire_if_due(connection_id=story.id, now=late)
    assert not transitions.expire_if_due(connection_id=story.id, now=late)
    assert reconciler.run(reconciler.URGENT, now=late) == {
        "expire_flows": 0,
        "rescue_tasks": 0,
        "sweep_clients": 0,
        "queue_checks": 0,
        "start_reauths": 0,
    }
    assert told(mark) == ["flow.state", "task.status"]


def test_a_submission_after_the_deadline_is_too_late(story: Story) -> None:
    story.bring_to(FlowStep.AWAITING_INPUT)
    story.now = after(settings.INPUT_SECONDS)
    with pytest.raises(FlowOver):
        story.submit(GOOD)
    assert story.flow().status == FlowStatus.EXPIRED


def test_a_worker_that_comes_after_the_deadline_finds_the_flow_expired(story: Story) -> None:
    story.bring_to(FlowStep.SUBMITTING)
    story.now = after(settings.FLOW_SECONDS)
    with pytest.raises(FlowOver):
        story.succeed()
    assert story.flow().status == FlowStatus.EXPIRED
    assert story.row().profile.state is None


def test_a_question_never_lives_longer_than_its_flow(story: Story) -> None:
    story.start()
    story.now = after(settings.FLOW_SECONDS - 10)
    story.claim()
    assert story.ask().input_expires_at == after(settings.FLOW_SECONDS)


# ── C35 ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.django_db(transaction=True)
def test_C35_an_event_and_its_change_become_visible_in_the_same_moment(owner: User) -> None:
    story = Story.of(owner)
    seen: dict[str, Any] = {}

    def look() -> None:
        seen["flows"] = LoginFlow.objects.count()
        seen["events"] = Event.objects.filter(name="flow.state").count()
        databases.close_all()

    def from_outside(sender: Any, **kwargs: Any) -> None:
        if not seen:
            with ThreadPoolExecutor(1) as pool:
                pool.submit(look).result()

    status_changed.connect(from_outside, dispatch_uid="tests.outside")
    try:
        story.start()
    finally:
        status_changed.disconnect(dispatch_uid="tests.outside")
    assert seen == {"flows": 0, "events": 0}, "before the commit nobody sees either"
    assert LoginFlow.objects.count() == Event.objects.filter(name="flow.state").count() == 1


def test_C35_a_change_that_is_rolled_back_is_not_told(
    story: Story, broken_log: Callable[[str], None]
) -> None:
    mark = cursor()
    broken_log("task.created")
    with pytest.raises(RuntimeError):
        story.start()
    assert told(mark) == []
    assert not LoginFlow.objects.exists()


# ── Attention, checks ─────────────────────────────────────────────────────────────────────────────────────────────


def test_acknowledging_twice_is_the_same_as_once(story: Story) -> None:
    story.bring_to(FlowStatus.FAILED)
    flow = story.flow()
    mark = cursor()
    transitions.acknowledge(flow_id=flow.id, actor=story.actor, now=after(1))
    transitions.acknowledge(flow_id=flow.id, actor=story.actor, now=after(2))
    assert story.flow().acknowledged_at == after(1)
    assert told(mark) == ["connection.updated"]


def test_a_running_flow_cannot_be_acknowledged(story: Story) -> None:
    story.start()
    with pytest.raises(InvalidTransition):
        transitions.acknowledge(flow_id=story.flow().id, actor=story.actor, now=T0)


def test_asking_for_a_check_twice_queues_one(story: Story) -> None:
    first = transitions.request_check(connection_id=story.id, actor=story.actor, now=T0)
    mark = cursor()
    assert transitions.request_check(connection_id=story.id, actor=story.actor, now=T0).id == first.id
    assert told(mark) == []


@pytest.mark.parametrize(
    ("seen", "status"), [(True, "AUTHENTICATED"), (False, "NEEDS_AUTH"), (None, "AUTHENTICATED")]
)
def test_a_check_is_stamped_whatever_its_result_and_keeps_the_status_when_it_could_not_tell(
    seen: bool | None, status: str, story: Story
) -> None:
    story.bring_to(FlowStatus.SUCCESS)
    transitions.request_check(connection_id=story.id, actor=story.actor, now=T0)
    story.now = after(60)
    hold = story.claim()
    mark = cursor()
    transitions.record_check(hold=hold, signed_in=seen, reason="why", now=story.now)
    row = story.row()
    assert (row.status, row.last_auth_check_at) == (status, after(60))
    check = HealthCheck.objects.get()
    assert (check.previous_status, check.status) == ("AUTHENTICATED", None if seen is None else status)
    assert Task.objects.get(pk=hold.task_id).status == TaskStatus.COMPLETED
    expected = ["connection.updated"] + ["connection.status"] * (seen is False) + ["task.status"]
    assert told(mark) == expected
    with pytest.raises(LeaseLost):
        transitions.record_check(hold=hold, signed_in=True, reason="", now=story.now)


# ── Dying and giving back ─────────────────────────────────────────────────────────────────────────────────────────


def test_giving_back_starts_the_flow_again_without_counting_an_attempt(story: Story) -> None:
    story.bring_to(FlowStep.SUBMITTING)
    transitions.give_back(hold=story.holding(), now=T0)
    task = story.task()
    assert (task.status, task.attempts) == (TaskStatus.QUEUED, 0)
    assert story.flow().step == FlowStep.DISCOVERING
    assert Submission.objects.get().sealed is None, "typed values are never sent twice"


def test_giving_back_a_health_check_counts_no_attempt_either(story: Story) -> None:
    transitions.request_check(connection_id=story.id, actor=story.actor, now=T0)
    hold = story.claim()
    transitions.give_back(hold=hold, now=T0)
    task = Task.objects.get(pk=hold.task_id)
    assert (task.status, task.attempts) == (TaskStatus.QUEUED, 0)


def test_a_worker_that_dies_too_often_ends_the_flow_as_an_internal_error(story: Story) -> None:
    story.start()
    for attempt in range(1, settings.TASK_ATTEMPTS + 1):
        hold = story.claim()
        assert hold.attempt == attempt
        story.ask()
        story.now += dt.timedelta(seconds=settings.LEASE_SECONDS)
        assert transitions.rescue(task_id=hold.task_id, now=story.now)
        assert not transitions.rescue(task_id=hold.task_id, now=story.now)
    flow, task = story.flow(), story.task()
    assert (flow.status, flow.error_code) == (FlowStatus.FAILED, "internal_error")
    assert (task.status, task.error) == (TaskStatus.FAILED, flow.error_message)


def test_after_a_rescue_the_question_is_a_new_one(story: Story) -> None:
    story.bring_to(FlowStep.AWAITING_INPUT)
    asked, old = story.flow().interaction_id, story.holding()
    story.now = after(settings.LEASE_SECONDS)
    transitions.rescue(task_id=old.task_id, now=story.now)
    story.claim()
    assert story.ask([USERNAME, PASSWORD, NOTE]).interaction_id != asked
    with pytest.raises(StaleInteraction):
        story.submit(GOOD, interaction_id=asked)
    with pytest.raises(LeaseLost):
        transitions.succeed(
            hold=old, storage_state=STATE, post_login_url="", values={}, requirements={}, now=story.now
        )


def test_verbs_of_time_pass_over_a_connection_that_is_gone(
    story: Story, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody deletes it between the look without a lock and the lock."""
    story.bring_to(FlowStep.AWAITING_INPUT)
    hold = story.holding()

    def gone(connection_id: str) -> Any:
        raise ManagedAuthConnection.DoesNotExist

    monkeypatch.setattr(transitions, "_lock", gone)
    assert not transitions.expire_if_due(connection_id=story.id, now=after(86_400))
    assert not transitions.rescue(task_id=hold.task_id, now=after(86_400))
    with pytest.raises(LeaseLost):
        transitions.discovering(hold=hold, now=T0)
    transitions.give_back(hold=hold, now=T0)


# ── can_reauth ────────────────────────────────────────────────────────────────────────────────────────────────────


def _credential(owner: User, *, totp: bool = False) -> Credential:
    return Credential.objects.create(
        owner=owner, name="kept", domain="example.com", created_at=T0, updated_at=T0,
        values=vault.seal({"username": "a", "password": "b"}), value_keys=["password", "username"],
        totp_secret=vault.seal("JBSWY3DPEHPK3PXP") if totp else None,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("requirements", "setting", "expected"),
    [
        (None, "never", (False, "no_prior_successful_login")),
        (None, "external", (True, "external_credential")),
        (None, "bare", (False, "no_credential")),
        (None, "kept", (True, "has_credential")),
        ({"kinds": [], "refs": []}, "kept", (True, "no_requirements_recorded")),
        ({"kinds": ["external_action"], "refs": []}, "kept", (False, "requires_external_action")),
        ({"kinds": ["sms_code"], "refs": []}, "kept", (False, "requires_sms_code")),
        ({"kinds": ["email_code"], "refs": []}, "kept", (False, "requires_email_code")),
        ({"kinds": ["choice"], "refs": []}, "kept", (False, "requires_customer_input")),
        ({"kinds": ["text"], "refs": ["pin"]}, "kept", (False, "requires_customer_input")),
        ({"kinds": ["totp_code"], "refs": []}, "totp", (True, "totp_reauth_allowed")),
        ({"kinds": ["totp_code"], "refs": []}, "kept with state", (True, "optimistic_totp_attempt")),
        ({"kinds": ["totp_code"], "refs": []}, "kept", (False, "requires_totp_without_secret")),
        ({"kinds": ["password"], "refs": ["password"]}, "kept", (True, "requirements_satisfiable")),
    ],
)
def test_each_reason_of_can_reauth_is_reached(
    requirements: Any, setting: str, expected: tuple[bool, str], story: Story
) -> None:
    row = story.row()
    row.requirements = requirements
    row.authenticated_at = None if setting == "never" else T0
    row.external_credential = {"provider": "vault", "path": "x"} if setting == "external" else None
    if setting.startswith(("kept", "totp")):
        row.credential = _credential(story.owner, totp=setting == "totp")
    if setting == "kept with state":
        row.profile.state_saved_at = T0
    assert row.can_reauth() == expected
    shown = payloads.connection_fields(row)
    assert (shown["can_reauth"], shown["can_reauth_reason"]) == expected


CODE_INSTEAD = [{"id": "code", "type": "mfa_method", "label": "Use a code instead", "mfa_type": "sms"}]


def test_A28_an_answer_that_nobody_took_is_never_given_to_the_next_question(owner: User) -> None:
    # The site moved on by itself at the very moment in which somebody chose another way.
    story = Story.of(owner)
    story.start()
    hold = story.claim()
    story.external(message="Approve on your phone", choices=CODE_INSTEAD)
    story.submit(choice_id="code", interaction_id=story.flow().interaction_id)
    transitions.await_input(hold=hold, fields=FIELDS, choices=[], now=story.now)
    assert story.flow().step == FlowStep.AWAITING_INPUT
    assert transitions.take_submission(hold=hold, now=story.now) is None


def test_A46_a_choice_made_during_a_poll_is_kept_for_the_driver(owner: User) -> None:
    story = Story.of(owner)
    story.start()
    hold = story.claim()
    story.external(message="Approve on your phone", choices=CODE_INSTEAD)
    story.submit(choice_id="code", interaction_id=story.flow().interaction_id)
    story.external(message="Another text", choices=CODE_INSTEAD)
    assert story.flow().step == FlowStep.SUBMITTING
    taken = transitions.take_submission(hold=hold, now=story.now)
    assert taken is not None
    assert taken.choice_id == "code"


def test_A05_a_countdown_in_the_text_is_no_change_and_a_new_number_keeps_the_question(owner: User) -> None:
    story = Story.of(owner)
    story.start()
    story.claim()
    story.external(message="Tap 47. The request expires in 58 seconds", choices=CODE_INSTEAD)
    before = story.flow()
    story.external(message="Tap 47. The request expires in 56 seconds", choices=CODE_INSTEAD)
    assert story.flow().version == before.version
    story.external(message="Tap 82. The request expires in 54 seconds", choices=CODE_INSTEAD)
    after = story.flow()
    assert after.external_action_message.startswith("Tap 82")
    assert after.version > before.version
    assert after.interaction_id == before.interaction_id
