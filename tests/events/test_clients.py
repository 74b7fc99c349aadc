"""Clients that come back, verb by verb: the arrows, whose a client is, what time does to it, and who is handling what."""

from __future__ import annotations

import datetime as dt
import json
import os
import re
import subprocess
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from django.conf import settings as django_settings
from django.contrib.auth.models import User
from django.db import IntegrityError, connection, transaction
from django.db.models import F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from events import clients, log, states
from events.clients import Arrival, Caller, Claimed, Outcome, Question, Replaced, Unknown, Welcome
from events.envelope import CATALOGUE, SIGNAL_NAMES, Interest, parse_topics
from events.models import Claim, Client, Event, Presence
from events.states import CLIENT_ARROWS, CLIENT_KEEPS, ClientState

pytestmark = pytest.mark.django_db

ROOT = Path(__file__).resolve().parents[2]
T0 = dt.datetime(2026, 3, 1, 12, tzinfo=dt.UTC)
L, S, I, E, C = ClientState  # noqa: E741 (as in states.py)
HERE = "here/1/1"
SUBJECT = "connection:ma_1"


class Clock:
    """The database's clock, which goes when it is told to."""

    def __init__(self) -> None:
        self.now = T0

    def __call__(self) -> dt.datetime:
        return self.now

    def go(self, seconds: float) -> None:
        self.now += dt.timedelta(seconds=seconds)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(clients, "database_now", made)
    return made


def caller(user: User, login: str = "session:a") -> Caller:
    return Caller(owner_id=user.pk, binding=login, who=user.username)


def cid_of(number: int) -> str:
    return f"cid-{uuid.UUID(int=number)}"


def arrive(who: Caller, cid: str, page: str = "page-one", **more: Any) -> Outcome:
    given = {"process": HERE, **more}
    (outcome,) = clients.connect([Arrival(caller=who, cid=cid, page=page, **given)])
    return outcome


def welcome(who: Caller, cid: str, page: str = "page-one", **more: Any) -> Welcome:
    outcome = arrive(who, cid, page, **more)
    assert isinstance(outcome, Welcome)
    return outcome


def row_of(found: Welcome) -> Client:
    return Client.objects.get(pk=found.pk)


def told(after: int = 0) -> list[Event]:
    return list(Event.objects.filter(pk__gt=after).order_by("pk"))


def names(after: int = 0) -> list[str]:
    return [event.name for event in told(after)]


# ── The machine ──

SAME = "nothing changes"
FORMER = "S, and its stream has ended"
STATES = [L, S, FORMER, I, E, C]


class Tale:
    """One client in one state, and the words of whoever acts for it."""

    def __init__(self, owner: User, clock: Clock) -> None:
        self.clock = clock
        self.caller = caller(owner)
        welcome(self.caller, cid_of(1))
        self.welcome = welcome(self.caller, cid_of(1))
        self.epoch = self.welcome.epoch

    @property
    def row(self) -> Client:
        return row_of(self.welcome)

    def connect(self, page: str = "page-one", **more: Any) -> Outcome:
        return arrive(self.caller, self.welcome.cid, page, **more)

    def disconnect(self, epoch: int | None = None) -> int:
        return clients.disconnect([(self.welcome.pk, epoch or self.epoch, "gone")])

    def suspend(self, epoch: int | None = None) -> bool:
        return clients.suspend(caller=self.caller, cid=self.welcome.cid, epoch=epoch or self.epoch)

    def close(self) -> bool:
        return clients.close(pk=self.welcome.pk, reason="an operator says so", actor="op")

    def renew(self, process: str = HERE, epoch: int | None = None) -> Any:
        held = {self.welcome.pk: epoch or self.epoch}
        return clients.renew(process, held, cursors={self.welcome.pk: 7})

    def probe(self, epoch: int | None = None) -> None:
        clients.probe(caller=self.caller, cid=self.welcome.cid, epoch=epoch or self.epoch, nonce="n")

    def sweep(self, seconds: float) -> int:
        self.clock.go(seconds)
        return clients.sweep()

    def bring_to(self, state: str) -> None:
        if state in (S, FORMER):
            assert self.suspend()
        if state in (FORMER, I, E):
            self.disconnect()
        if state == E:
            self.sweep(61)
        if state == C:
            assert self.close()
        assert self.row.state == (S if state == FORMER else state)


VERBS: dict[str, Callable[[Tale], Any]] = {
    "connect": lambda tale: tale.connect(),
    "connect, another page": lambda tale: tale.connect("page-two"),
    "connect, another page that got no answer": lambda tale: tale.connect("page-two", unanswered=tale.epoch),
    "suspend": lambda tale: tale.suspend(),
    "suspend, of a replaced stream": lambda tale: tale.suspend(tale.epoch - 1),
    "disconnect": lambda tale: tale.disconnect(),
    "disconnect, of a replaced stream": lambda tale: tale.disconnect(tale.epoch - 1),
    "close": lambda tale: tale.close(),
    "renew": lambda tale: tale.renew(),
    "renew, of a replaced stream": lambda tale: tale.renew(epoch=tale.epoch - 1),
    "renew, by another process": lambda tale: tale.renew("there/1/1"),
    "probe": lambda tale: tale.probe(),
    "probe, of a replaced stream": lambda tale: tale.probe(tale.epoch - 1),
    "sweep, at once": lambda tale: tale.sweep(0),
    "sweep, after the lease": lambda tale: tale.sweep(31),
    "sweep, after the grace time": lambda tale: tale.sweep(121),
}


def everywhere(outcome: Any, but: dict[str, Any] | None = None) -> dict[str, Any]:
    return dict.fromkeys(STATES, outcome) | (but or {})


#: verb → state → the state after it, an exception, or SAME.
EXPECTED: dict[str, dict[str, Any]] = {
    # Sent away by an operator, the very page does not come back; loaded again it is another one.
    "connect": everywhere(L, {C: SAME}),
    "connect, another page": everywhere(L, {L: SAME, S: SAME}),
    "connect, another page that got no answer": everywhere(L),
    "suspend": everywhere(SAME, {L: S, I: S}),
    "suspend, of a replaced stream": everywhere(SAME),
    "disconnect": everywhere(SAME, {L: I}),
    "disconnect, of a replaced stream": everywhere(SAME),
    "close": everywhere(C, {E: SAME, C: SAME}),
    "renew": everywhere(SAME, {I: L}),
    "renew, of a replaced stream": everywhere(SAME),
    "renew, by another process": everywhere(SAME),
    "probe": everywhere(Unknown, {L: SAME, S: L}),
    "probe, of a replaced stream": everywhere(Unknown),
    "sweep, at once": everywhere(SAME),
    "sweep, after the lease": everywhere(SAME, {L: I}),
    "sweep, after the grace time": everywhere(SAME, {L: I, FORMER: E, I: E}),
}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("verb", VERBS)
def test_B15_B16_every_verb_takes_its_arrow_or_changes_and_tells_nothing(
    verb: str, state: str, owner: User, clock: Clock
) -> None:
    tale = Tale(owner, clock)
    tale.bring_to(state)
    before, mark = tale.row, log.newest()
    expected = EXPECTED[verb][state]

    if isinstance(expected, type):
        with pytest.raises(expected):
            VERBS[verb](tale)
    else:
        VERBS[verb](tale)

    after = tale.row
    events = [event for event in told(mark) if event.name not in SIGNAL_NAMES]
    if expected == SAME or isinstance(expected, type):
        assert (after.state, after.epoch, after.version) == (before.state, before.epoch, before.version)
        assert events == []
        return
    assert after.state == expected
    assert expected == before.state or expected in CLIENT_ARROWS[ClientState(before.state)]
    (event,) = events
    assert event.name == {L: "client.opened", S: "client.suspended", I: "client.inactive", E: "client.expired", C: "client.closed"}[expected]  # fmt: skip
    assert (event.version, event.data["state"], event.data["epoch"]) == (
        after.version,
        after.state,
        after.epoch,
    )
    assert after.version == before.version + 1
    assert after.epoch == before.epoch + verb.startswith("connect")
    assert (event.topic, event.audience) == (f"client:{after.cid}", owner.pk)


def test_every_arrow_of_a_client_is_taken_by_some_verb() -> None:
    taken = {
        (S if state == FORMER else state, outcome)
        for outcomes in EXPECTED.values()
        for state, outcome in outcomes.items()
        if isinstance(outcome, ClientState)
    }
    # A live client that connects again stays live, under the next epoch.
    assert taken - {(L, L)} == {(state, to) for state, arrows in CLIENT_ARROWS.items() for to in arrows}


def test_a_way_that_is_no_arrow_is_refused_before_anything_is_written(owner: User, clock: Clock) -> None:
    row = row_of(welcome(caller(owner), cid_of(1)))
    mark = log.newest()
    with pytest.raises(RuntimeError, match="does not go from live to expired"):
        clients._move(row, E, now=T0, tell="client.expired", actor="x", lease_expires_at=None)
    assert row_of_pk(row.pk).state == L
    assert names(mark) == []


def row_of_pk(pk: int) -> Client:
    return Client.objects.get(pk=pk)


def drawn(text: str) -> dict[str, frozenset[str]]:
    """``live ─▶ suspended (why) | closed``, line by line."""
    arrows = {}
    for line in text.splitlines():
        if "─▶" in line:
            left, right = line.split("─▶")
            targets = frozenset(word.split()[0] for word in re.sub(r"\(.*?\)", "", right).split("|"))
            arrows[left.strip()] = targets - {"nothing"}
    return arrows


def test_the_drawings_of_a_client_agree_with_its_arrows() -> None:
    code = {str(state): frozenset(map(str, arrows)) for state, arrows in CLIENT_ARROWS.items()}
    assert drawn(str(states.__doc__)) == code
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert drawn(readme.split("<!-- arrows: client -->\n```\n", 1)[1].split("```", 1)[0]) == code
    assert set(CLIENT_ARROWS) == set(ClientState)
    assert {state for state, arrows in CLIENT_ARROWS.items() if C in arrows} == CLIENT_KEEPS


@pytest.mark.parametrize(
    "fields",
    [
        {"lease_expires_at": None},
        {"expires_at": T0},
        {"state": I, "lease_expires_at": None},
        {"state": S, "expires_at": None},
    ],
)
def test_the_database_itself_refuses_a_client_without_its_time(
    fields: dict[str, Any], owner: User, clock: Clock
) -> None:
    row = row_of(welcome(caller(owner), cid_of(1)))
    with pytest.raises(IntegrityError), transaction.atomic():
        Client.objects.filter(pk=row.pk).update(**fields)


# ── Names (B04, B05, B06) ──

GOOD = "cid-0f8fad5b-d9cb-469f-a165-70867728950e"
MALFORMED = [
    "",
    "cid-",
    "cid-" + "-" * 36,
    GOOD.removeprefix("cid-"),
    f"conn-{GOOD[4:]}",
    GOOD + "0",
    GOOD[:-1],
    GOOD + "\n",
    " " + GOOD,
    GOOD.replace("-", "‐"),
    GOOD.replace("0f8f", "0g8f"),
    "cid-{" + GOOD[4:] + "}",
    "cid-urn:uuid:" + GOOD[4:],
    "cid-" + GOOD[4:].replace("-", ""),
    # One character whose lower case is an ASCII letter, and digits of another script.
    "\u212a" + GOOD[1:],
    GOOD.replace("0", "\u0660"),
    GOOD + "\x00",
    "cid-" + "0" * 10_000,
]


@pytest.mark.parametrize("version", [1, 3, 4, 5, 7, 0, 15])
def test_B04_a_uuid_of_any_version_and_any_case_is_taken_and_written_in_lower_case(version: int) -> None:
    plain = f"{uuid.uuid4()}"
    text = f"{plain[:14]}{version:x}{plain[15:]}"
    assert clients.normal_cid(f"CID-{text.upper()}") == f"cid-{text}"


@pytest.mark.parametrize("text", MALFORMED)
def test_B04_B06_anything_else_is_refused_and_served_under_a_new_id_and_the_client_and_the_log_say_so(
    text: str, owner: User, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "events.clients")
    with pytest.raises(ValueError, match="a UUID"):
        clients.normal_cid(text)
    given = welcome(caller(owner), text)
    assert (given.accepted, given.reason, given.resumed, given.epoch) == (False, "malformed", False, 1)
    assert clients.normal_cid(given.cid) == given.cid
    assert given.cid in caplog.text
    assert "malformed" in caplog.text
    assert "\n" not in caplog.messages[0]
    assert Client.objects.count() == 1, "what was refused leaves no row"


near_misses = st.builds(
    lambda at, what, cid: cid[:at] + what + cid[at + 1 :],
    st.integers(0, len(GOOD)), st.text(max_size=2), st.uuids().map(lambda each: f"cid-{each}"),
)  # fmt: skip


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.one_of(st.text(max_size=60), near_misses))
def test_B04_B05_B10_whatever_a_client_calls_itself_it_is_served_under_an_id_of_the_one_form(
    text: str, owner: User
) -> None:
    who = caller(owner)
    given = welcome(who, text)
    again = welcome(who, given.cid.upper(), "page-one")
    assert re.fullmatch(r"cid-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", given.cid)
    if given.accepted:
        assert given.cid == text.lower()
        uuid.UUID(given.cid[4:])
    else:
        assert given.reason == "malformed"
        assert not Client.objects.filter(cid=text).exists()
    # Another spelling is the same client.
    assert (again.pk, again.epoch, again.accepted, again.resumed) == (given.pk, given.epoch + 1, True, True)


@pytest.mark.parametrize(
    "text", ["", "short", "x" * 65, "with space", "ü" * 10, "line\nbreaks", "12345678\n"]
)
def test_a_page_nonce_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="nonce"):
        clients.normal_page(text)
    assert clients.normal_page("A-z_0123") == "A-z_0123"


@pytest.mark.parametrize(
    "text", ["", "connection:", "client:cid-1", "connection:ma 1", "task:" + "x" * 81, "task:a\n"]
)
def test_only_a_connection_or_a_task_can_be_claimed(text: str, owner: User, clock: Clock) -> None:
    who = caller(owner)
    welcome(who, cid_of(1))
    with pytest.raises(ValueError, match="subject"):
        clients.take(caller=who, cid=cid_of(1), subject=text, audience=owner.pk)
    assert not Claim.objects.exists()


# ── Coming back (B03, B10, B13, B14, B23, B27) ──


def test_B10_B13_B23_the_same_page_goes_on_with_everything_it_had(owner: User, clock: Clock) -> None:
    who = caller(owner)
    first = welcome(who, cid_of(1), path="/connections/ma_1", cursor=3)
    assert (first.accepted, first.resumed, first.epoch, first.cid) == (True, False, 1, cid_of(1))
    clients.take(caller=who, cid=first.cid, subject=SUBJECT, audience=owner.pk)
    clock.go(5)
    clients.disconnect([(first.pk, 1, "gone")])
    assert row_of(first).expires_at == clock.now + dt.timedelta(seconds=60)
    clock.go(59)
    mark = log.newest()
    second = welcome(who, cid_of(1), path="/", cursor=mark)
    assert (second.pk, second.epoch, second.accepted, second.resumed) == (first.pk, 2, True, True)
    row = row_of(first)
    assert (row.state, row.expires_at, row.cursor, row.path, row.opened_at) == (L, None, mark, "/", T0)
    assert names(mark) == ["client.opened"]
    # Its first words are heard at once: nothing has to be taken over.
    picture = clients.take(caller=who, cid=first.cid, subject=SUBJECT, audience=owner.pk)
    assert (picture["client"], picture["version"]) == (first.cid, 1)
    clock.go(1000)
    clients.renew(HERE, {first.pk: 2}, cursors={})
    assert clients.sweep() == 0


def test_B03_another_page_while_the_old_one_has_a_stream_is_a_question_and_changes_nothing(
    owner: User, clock: Clock
) -> None:
    who = caller(owner)
    first = welcome(who, cid_of(1), "page-one")
    before = Client.objects.values().get()
    question = arrive(who, cid_of(1), "page-two")
    assert isinstance(question, Question)
    assert (question.owner_id, question.cid, question.epoch) == (owner.pk, cid_of(1), 1)
    assert Client.objects.values().get() == before
    # The old one is there: an id of its own for the newcomer.
    given = welcome(who, cid_of(1), "page-two", in_use=True)
    assert (given.accepted, given.reason, given.resumed) == (False, "in_use", False)
    assert given.cid != first.cid
    assert row_of(first).epoch == 1
    # From then on both go on by themselves.
    assert welcome(who, given.cid, "page-two").resumed
    assert welcome(who, first.cid, "page-one").resumed


def test_B03_a_page_that_does_not_answer_is_taken_over_by_the_one_that_asked_for_this_very_stream(
    owner: User, clock: Clock
) -> None:
    who = caller(owner)
    first = welcome(who, cid_of(1), "page-one")
    taken = welcome(who, cid_of(1), "page-two", unanswered=1)
    assert (taken.pk, taken.epoch, taken.resumed, taken.accepted) == (first.pk, 2, True, True)
    # The answer that did not come says nothing of the next stream.
    question = arrive(who, cid_of(1), "page-three", unanswered=1)
    assert isinstance(question, Question)
    assert question.epoch == 2


def test_B03_a_page_in_the_background_is_asked_as_long_as_its_stream_is_open(
    owner: User, clock: Clock
) -> None:
    who = caller(owner)
    first = welcome(who, cid_of(1), "page-one")
    clients.suspend(caller=who, cid=cid_of(1), epoch=1)
    assert isinstance(arrive(who, cid_of(1), "page-two"), Question)
    clients.disconnect([(first.pk, 1, "gone")])
    assert welcome(who, cid_of(1), "page-two").resumed


@pytest.mark.parametrize("hidden", [False, True])
def test_B03_a_page_that_leaves_is_not_asked_though_its_stream_was_not_seen_to_end(
    hidden: bool, owner: User, clock: Clock
) -> None:
    who = caller(owner)
    first = welcome(who, cid_of(1), "page-one")
    if hidden:
        assert clients.suspend(caller=who, cid=cid_of(1), epoch=1)
    clients.suspend(caller=who, cid=cid_of(1), epoch=2, leaving=True)
    assert isinstance(arrive(who, cid_of(1), "page-two"), Question), "of another stream it says nothing"
    clients.suspend(caller=who, cid=cid_of(1), epoch=1, leaving=True)
    assert row_of(first).state == S
    assert welcome(who, cid_of(1), "page-two").resumed


def test_B03_a_stream_whose_lease_is_over_is_no_stream_also_before_a_sweep_has_found_it(
    owner: User, clock: Clock
) -> None:
    who = caller(owner)
    first = welcome(who, cid_of(1), "page-one")
    clock.go(29.9)
    assert clients.seems_live(row_of(first), clock.now)
    assert isinstance(arrive(who, cid_of(1), "page-two"), Question)
    clock.go(0.1)
    assert not clients.seems_live(row_of(first), clock.now)
    assert welcome(who, cid_of(1), "page-two").resumed


def test_B27_a_page_that_was_replaced_is_told_to_stay_away_also_when_nobody_has_the_client_any_more(
    owner: User, clock: Clock
) -> None:
    who = caller(owner)
    first = welcome(who, cid_of(1), "page-one")
    welcome(who, cid_of(1), "page-two", unanswered=1)
    replaced = arrive(who, cid_of(1), "page-one")
    assert replaced == Replaced(epoch=2)
    clients.disconnect([(first.pk, 2, "gone")])
    assert arrive(who, cid_of(1), "page-one") == Replaced(epoch=2)
    clock.go(1000)
    clients.sweep()
    assert row_of(first).state == E
    assert arrive(who, cid_of(1), "page-one") == Replaced(epoch=2)
    assert row_of(first).epoch == 2


def test_B27_so_many_former_pages_are_remembered_and_no_more(owner: User, clock: Clock) -> None:
    who = caller(owner)
    for number in range(30):
        last = welcome(who, cid_of(1), f"page-{number:04}", unanswered=number)
    kept = row_of(last).former_pages
    assert kept == [f"page-{number:04}" for number in range(28, 18, -1)]
    assert len(kept) == clients.FORMER_PAGES


def test_B14_arrivals_of_one_transaction_are_answered_one_after_the_other(owner: User, clock: Clock) -> None:
    who = caller(owner)
    arrivals = [
        Arrival(caller=who, cid=cid_of(1), page="page-one", process=HERE),
        Arrival(caller=who, cid="nonsense", page="page-one", process=HERE),
        Arrival(caller=who, cid=cid_of(1).upper(), page="page-one", process=HERE),
        Arrival(caller=who, cid=cid_of(1), page="page-two", process=HERE),
        Arrival(caller=who, cid=cid_of(2), page="page-two", process=HERE),
    ]
    one, refused, same, asked, other = clients.connect(arrivals)
    assert isinstance(one, Welcome)
    assert isinstance(same, Welcome)
    assert (one.epoch, same.epoch, same.resumed) == (1, 2, True)
    assert isinstance(refused, Welcome)
    assert refused.reason == "malformed"
    assert isinstance(asked, Question)
    assert asked.epoch == 2
    assert isinstance(other, Welcome)
    assert Client.objects.count() == 3


def test_B23_after_it_expired_it_begins_anew_and_is_told(owner: User, clock: Clock) -> None:
    who = caller(owner)
    first = welcome(who, cid_of(1))
    clients.disconnect([(first.pk, 1, "gone")])
    clock.go(60)
    assert clients.sweep() == 1
    again = welcome(who, cid_of(1))
    assert (again.pk, again.epoch, again.resumed, again.accepted) == (first.pk, 2, False, True)
    assert row_of(again).opened_at == clock.now


# ── Whose it is (B08, B09) ──


def test_B08_the_same_id_of_another_user_is_another_client_and_nothing_of_the_owners_is_touched(
    owner: User, stranger: User, clock: Clock
) -> None:
    mine = welcome(caller(owner), cid_of(1), path="/mine", watches=("tasks",), cursor=5)
    clients.take(caller=caller(owner), cid=cid_of(1), subject=SUBJECT, audience=owner.pk)
    before = list(Client.objects.filter(owner=owner).values()), list(Claim.objects.values())
    mark = log.newest()
    theirs = caller(stranger)
    got = welcome(theirs, cid_of(1), "page-two", cursor=9)
    assert (got.accepted, got.resumed, got.epoch, got.cid) == (True, False, 1, cid_of(1))
    assert got.pk != mine.pk
    assert clients.suspend(caller=theirs, cid=cid_of(1), epoch=1)
    clients.disconnect([(got.pk, 1, "gone")])
    clock.go(1000)
    clients.renew(HERE, {mine.pk: 1}, cursors={mine.pk: 0})
    clients.sweep()
    after = list(Client.objects.filter(owner=owner).values()), list(Claim.objects.values())
    renewed = {"lease_expires_at", "last_seen_at", "sent_cursor"}

    def rest(rows: list[Any]) -> list[Any]:
        return [{name: value for name, value in row.items() if name not in renewed} for row in rows]

    assert (rest(after[0]), after[1]) == (rest(before[0]), before[1])
    assert {event.audience for event in told(mark)} == {stranger.pk}


@pytest.mark.parametrize(
    ("first", "second"), [("session:a", "session:b"), ("session:a", "key:1"), ("key:1", "key:2")]
)
@pytest.mark.parametrize("state", STATES)
def test_B08_B09_another_session_gets_an_id_of_its_own_whatever_state_the_client_is_in(
    first: str, second: str, state: str, owner: User, clock: Clock
) -> None:
    tale = Tale(owner, clock)
    Client.objects.update(binding=first)
    tale.caller = caller(owner, first)
    tale.bring_to(state)
    before = Client.objects.values().get()
    other = caller(owner, second)
    for page in ("page-one", "page-two"):
        given = welcome(other, tale.welcome.cid, page, unanswered=tale.epoch)
        assert (given.accepted, given.reason, given.resumed) == (False, "other_session", False)
        assert given.cid != tale.welcome.cid
    assert Client.objects.filter(pk=tale.welcome.pk).values().get() == before
    # Nor does anything else of that login reach it.
    for act in (
        lambda: clients.suspend(caller=other, cid=tale.welcome.cid, epoch=tale.epoch),
        lambda: clients.probe(caller=other, cid=tale.welcome.cid, epoch=tale.epoch, nonce="n"),
        lambda: clients.take(caller=other, cid=tale.welcome.cid, subject=SUBJECT, audience=owner.pk),
        lambda: clients.let_go(caller=other, cid=tale.welcome.cid, subject=SUBJECT),
        lambda: clients.be_present(caller=other, cid=tale.welcome.cid, subject=SUBJECT, audience=1, doing="looking"),
    ):  # fmt: skip
        with pytest.raises(Unknown):
            act()
    assert clients.find(owner_id=owner.pk, binding=second, cid=tale.welcome.cid) is None
    assert Client.objects.filter(pk=tale.welcome.pk).values().get() == before


def test_B09_an_id_stays_bound_for_an_hour_after_its_end_and_is_free_then(owner: User, clock: Clock) -> None:
    first, second = caller(owner, "session:a"), caller(owner, "session:b")
    mine = welcome(first, cid_of(1))
    clients.take(caller=first, cid=cid_of(1), subject=SUBJECT, audience=owner.pk)
    clients.disconnect([(mine.pk, 1, "gone")])
    clock.go(60)
    clients.sweep()
    clock.go(3600 - 61)
    assert clients.sweep() == 0
    assert welcome(second, cid_of(1)).reason == "other_session"
    clock.go(1)
    assert clients.sweep() == 1
    assert not Client.objects.filter(pk=mine.pk).exists()
    free = welcome(second, cid_of(1))
    assert (free.accepted, free.epoch) == (True, 1)


def test_a_client_that_is_away_or_live_is_never_purged(owner: User, clock: Clock) -> None:
    for number, state in enumerate([L, S, FORMER, I], 1):
        tale = Tale(owner, clock)
        tale.bring_to(state)
        Client.objects.filter(pk=tale.welcome.pk).update(
            cid=cid_of(number + 100), last_seen_at=T0 - dt.timedelta(days=2)
        )
    assert clients.sweep() == 0
    assert Client.objects.count() == 4


# ── Going (B15 – B19, B21, B22) ──


def test_B15_B16_the_late_close_of_a_replaced_stream_neither_ends_nor_times_the_new_one(
    owner: User, clock: Clock
) -> None:
    who = caller(owner)
    first = welcome(who, cid_of(1))
    second = welcome(who, cid_of(1))
    before = Client.objects.values().get()
    mark = log.newest()
    assert clients.disconnect([(first.pk, first.epoch, "gone")]) == 0
    assert clients.suspend(caller=who, cid=cid_of(1), epoch=first.epoch) is False
    assert list(clients.renew(HERE, {first.pk: first.epoch}, cursors={})) == [first.pk]
    assert Client.objects.values().get() == before
    assert names(mark) == []
    assert clients.disconnect([(second.pk, second.epoch, "gone")]) == 1


def test_B18_claims_are_kept_for_the_grace_time_and_released_exactly_once(owner: User, clock: Clock) -> None:
    who = caller(owner)
    mine = welcome(who, cid_of(1))
    for subject in ("connection:ma_1", "task:t_1"):
        clients.take(caller=who, cid=cid_of(1), subject=subject, audience=owner.pk)
    clients.disconnect([(mine.pk, 1, "gone")])
    mark = log.newest()
    clock.go(59.9)
    assert clients.sweep() == 0
    assert Claim.objects.filter(client=mine.pk).count() == 2
    clock.go(0.1)
    assert clients.sweep() == 1
    assert clients.sweep() == 0
    assert names(mark) == ["claim.released", "claim.released", "client.expired"]
    released = told(mark)[0]
    assert released.data["reason"] == "expired"
    assert (released.data["previous_client"], released.data["client"]) == (cid_of(1), None)
    assert not Claim.objects.filter(client__isnull=False).exists()


def test_B19_expiry_leaves_what_somebody_has_taken_over(owner: User, colleague: User, clock: Clock) -> None:
    mine = welcome(caller(owner), cid_of(1))
    other = welcome(caller(colleague), cid_of(2))
    clients.take(caller=caller(owner), cid=cid_of(1), subject=SUBJECT, audience=owner.pk)
    clients.disconnect([(mine.pk, 1, "gone")])
    clients.take(caller=caller(colleague), cid=cid_of(2), subject=SUBJECT, audience=owner.pk, takeover=True)
    before = Claim.objects.values().get()
    mark = log.newest()
    clock.go(61)
    clients.renew(HERE, {other.pk: 1}, cursors={})
    clients.sweep()
    assert row_of(mine).state == E
    assert Claim.objects.values().get() == before
    assert names(mark) == ["client.expired"]


def test_B21_B39_a_page_in_the_background_has_longer_and_with_an_open_stream_no_end(
    owner: User, clock: Clock
) -> None:
    who = caller(owner)
    mine = welcome(who, cid_of(1))
    assert clients.suspend(caller=who, cid=cid_of(1), epoch=1, cursor=4)
    mark = log.newest()
    assert clients.suspend(caller=who, cid=cid_of(1), epoch=1, cursor=4) is False, "twice is once"
    assert names(mark) == []
    for _ in range(30):
        clock.go(10)
        assert clients.renew(HERE, {mine.pk: 1}, cursors={}) == {}
        assert clients.sweep() == 0
    # Now its stream is closed, too.
    clients.disconnect([(mine.pk, 1, "gone")])
    clock.go(119)
    assert clients.sweep() == 0
    assert welcome(who, cid_of(1)).resumed
    clients.suspend(caller=who, cid=cid_of(1), epoch=2)
    clients.disconnect([(mine.pk, 2, "gone")])
    clock.go(120)
    assert clients.sweep() == 1
    assert row_of(mine).state == E


def test_B39_only_its_owner_says_that_a_page_is_in_the_background(
    owner: User, stranger: User, clock: Clock
) -> None:
    mine = welcome(caller(owner), cid_of(1))
    for other in (caller(stranger), caller(owner, "session:b")):
        with pytest.raises(Unknown):
            clients.suspend(caller=other, cid=cid_of(1), epoch=1)
    for cid in ("nonsense", cid_of(7)):
        with pytest.raises(Unknown):
            clients.suspend(caller=caller(owner), cid=cid, epoch=1)
    assert row_of(mine).state == L


def test_B22_expiry_releases_what_is_claimed_then_and_not_what_was_once(owner: User, clock: Clock) -> None:
    who = caller(owner)
    mine = welcome(who, cid_of(1), watches=("task:a", "task:b"))
    for subject in ("task:a", "task:b"):
        clients.take(caller=who, cid=cid_of(1), subject=subject, audience=owner.pk)
    assert clients.let_go(caller=who, cid=cid_of(1), subject="task:b")
    assert not clients.let_go(caller=who, cid=cid_of(1), subject="task:b")
    welcome(who, cid_of(1), watches=("task:a",))
    assert row_of(mine).watches == ["task:a"], "what the present stream declares, and nothing of before"
    clients.disconnect([(mine.pk, 2, "gone")])
    mark = log.newest()
    clock.go(60)
    clients.sweep()
    assert [(event.name, event.topic) for event in told(mark)] == [
        ("claim.released", "task:a"),
        ("client.expired", f"client:{cid_of(1)}"),
    ]


def test_an_operator_ends_a_client_once_and_it_begins_anew(owner: User, clock: Clock) -> None:
    who = caller(owner)
    mine = welcome(who, cid_of(1))
    clients.take(caller=who, cid=cid_of(1), subject=SUBJECT, audience=owner.pk)
    mark = log.newest()
    assert clients.close(pk=mine.pk, reason="x" * 500, actor="op")
    assert not clients.close(pk=mine.pk, reason="again", actor="op")
    assert not clients.close(pk=10**9, reason="nobody", actor="op")
    assert names(mark) == ["claim.released", "client.closed"]
    assert told(mark)[0].data["reason"] == "disconnected"
    assert row_of(mine).reason == "x" * 200
    with pytest.raises(Unknown):
        clients.take(caller=who, cid=cid_of(1), subject=SUBJECT, audience=owner.pk)
    assert arrive(who, cid_of(1)) == Replaced(epoch=1, dismissed="x" * 200), "it stays away"
    again = welcome(who, cid_of(1), "page-two")
    assert (again.epoch, again.resumed, again.accepted) == (2, False, True)


# ── Leases (B41) ──


def test_B41_a_lease_that_runs_out_makes_it_inactive_since_then_and_a_renewal_takes_it_back(
    owner: User, clock: Clock
) -> None:
    who = caller(owner)
    mine = welcome(who, cid_of(1))
    clients.take(caller=who, cid=cid_of(1), subject=SUBJECT, audience=owner.pk)
    clock.go(29)
    assert clients.sweep() == 0
    clock.go(6)
    mark = log.newest()
    assert clients.sweep() == 1
    row = row_of(mine)
    # As if it had been found at once.
    assert (row.state, row.expires_at, row.lease_expires_at) == (I, T0 + dt.timedelta(seconds=90), None)
    assert row.reason in clients.LAPSED
    assert clients.renew(HERE, {mine.pk: 1}, cursors={mine.pk: 12}) == {}
    row = row_of(mine)
    assert (row.state, row.epoch, row.expires_at, row.sent_cursor) == (L, 1, None, 12)
    assert row.lease_expires_at == clock.now + dt.timedelta(seconds=30)
    assert names(mark) == ["client.inactive", "client.opened"]
    assert Claim.objects.get().client_id == mine.pk


def test_B41_after_an_outage_of_any_length_nobody_expires_before_the_streams_could_be_renewed(
    owner: User, clock: Clock
) -> None:
    live = welcome(caller(owner), cid_of(1))
    hidden = welcome(caller(owner), cid_of(2))
    clients.suspend(caller=caller(owner), cid=cid_of(2), epoch=1)
    clients.take(caller=caller(owner), cid=cid_of(1), subject=SUBJECT, audience=owner.pk)
    clock.go(86_400)
    mark = log.newest()
    for _ in range(3):
        clients.sweep()
    assert names(mark) == ["client.inactive"]
    clock.go(20)
    clients.sweep()
    assert clients.renew(HERE, {live.pk: 1, hidden.pk: 1}, cursors={}) == {}
    assert (row_of(live).state, row_of(hidden).state) == (L, S)
    clock.go(29)
    assert clients.sweep() == 0
    # And if nobody has them any more, their time comes.
    clock.go(300)
    clients.sweep()
    clock.go(300)
    clients.sweep()
    assert (row_of(live).state, row_of(hidden).state) == (E, E)


def test_a_renewal_says_what_became_of_those_that_are_lost(owner: User, clock: Clock) -> None:
    who = caller(owner)
    kept, replaced, closed, gone, moved = [welcome(who, cid_of(number)) for number in range(1, 6)]
    welcome(who, replaced.cid)
    clients.close(pk=closed.pk, reason="why", actor="op")
    Client.objects.filter(pk=gone.pk).delete()
    Client.objects.filter(pk=moved.pk).update(process="there/1/1")
    lost = clients.renew(HERE, {each.pk: 1 for each in (kept, replaced, closed, gone, moved)}, cursors={})
    assert set(lost) == {replaced.pk, closed.pk, gone.pk, moved.pk}
    assert lost[gone.pk] is None
    assert lost[replaced.pk].epoch == 2  # type: ignore[union-attr]
    assert (lost[closed.pk].state, lost[closed.pk].reason) == (C, "why")  # type: ignore[union-attr]


def test_a_renewal_of_many_is_a_few_statements(
    owner: User, clock: Clock, django_assert_max_num_queries: Any
) -> None:
    who = caller(owner)
    arrivals = [Arrival(caller=who, cid=cid_of(n), page="page-one", process=HERE) for n in range(450)]
    held = {each.pk: 1 for each in clients.connect(arrivals) if isinstance(each, Welcome)}
    assert len(held) == 450
    with django_assert_max_num_queries(15):
        assert clients.renew(HERE, held, cursors=dict.fromkeys(held, 3)) == {}


def test_B41_a_server_that_is_started_again_does_not_wait_for_the_leases_of_the_one_before(
    owner: User, clock: Clock
) -> None:
    alive = clients.process_name()
    host, pid, _ = alive.split("/")
    with subprocess.Popen(["sleep", "60"]) as other:
        dead = f"{host}/{other.pid}/{clients._started(other.pid)}"
        assert not clients.is_gone(dead)
        other.kill()
    elsewhere = f"another-machine/{os.getpid()}/1"
    same_number = f"{host}/{pid}/1"
    assert [clients.is_gone(name) for name in (dead, alive, elsewhere, same_number, "", "x")] == [
        True, False, False, True, False, False,
    ]  # fmt: skip
    who = caller(owner)
    held = {
        name: welcome(who, cid_of(number), process=name)
        for number, name in enumerate((dead, alive, elsewhere, same_number), 1)
    }
    hidden = welcome(who, cid_of(9), process=dead)
    clients.suspend(caller=who, cid=cid_of(9), epoch=1)
    clients.take(caller=who, cid=cid_of(1), subject=SUBJECT, audience=owner.pk)
    clock.go(1)
    assert clients.recover() == 3
    assert {name: row_of(each).state for name, each in held.items()} == {
        dead: I, alive: L, elsewhere: L, same_number: I,
    }  # fmt: skip
    assert row_of(held[dead]).expires_at == clock.now + dt.timedelta(seconds=60), (
        "from now on, for they could not come"
    )
    assert row_of(hidden).expires_at == clock.now + dt.timedelta(seconds=120)
    assert not clients.seems_live(row_of(hidden), clock.now)
    assert Claim.objects.get().client_id == held[dead].pk
    assert clients.recover() == 0


def test_every_lease_and_every_end_is_reckoned_from_the_databases_clock(owner: User, clock: Clock) -> None:
    """The clock of this fixture stands in 2026-03; a verb that asked another one would be months away."""
    tale = Tale(owner, clock)
    clients.take(caller=tale.caller, cid=tale.welcome.cid, subject=SUBJECT, audience=owner.pk)
    clients.be_present(
        caller=tale.caller, cid=tale.welcome.cid, subject="task:t", audience=owner.pk, doing="looking"
    )
    for state in (S, FORMER, I, E, C):
        tale.connect()
        tale.epoch = tale.row.epoch
        tale.bring_to(state)
    moments = [
        value
        for model in (Client, Claim, Presence)
        for row in model.objects.values()
        for value in row.values()
        if isinstance(value, dt.datetime)
    ] + [event.at for event in told()]
    assert len(moments) > 10
    assert all(abs(moment - T0) < dt.timedelta(minutes=10) for moment in moments)


# ── Probes and signals (B29) ──


def test_B29_a_probe_is_for_the_stream_of_that_epoch_and_for_no_other_eyes(owner: User, clock: Clock) -> None:
    who = caller(owner)
    mine = welcome(who, cid_of(1))
    mark = log.newest()
    clients.probe(caller=who, cid=cid_of(1), epoch=1, nonce="abc", cursor=mark)
    (signal,) = told(mark)
    assert (signal.name, signal.topic, signal.audience) == ("signal.probe", f"signal:{cid_of(1)}", owner.pk)
    assert signal.data == {"epoch": 1, "nonce": "abc"}
    assert row_of(mine).cursor == mark
    clients.probe(caller=who, cid=cid_of(1), epoch=1, nonce="abc", cursor=0)
    assert row_of(mine).cursor == mark, "what was applied stays applied"
    for epoch in (0, 2):
        with pytest.raises(Unknown):
            clients.probe(caller=who, cid=cid_of(1), epoch=epoch, nonce="abc")
    clock.go(30)
    with pytest.raises(Unknown):
        # Nobody renewed it: whether there is a stream is not known.
        clients.probe(caller=who, cid=cid_of(1), epoch=1, nonce="abc")


def test_signals_reach_only_who_asks_for_them_and_nobody_can_ask_from_outside() -> None:
    topic = f"signal:{cid_of(1)}"
    assert SIGNAL_NAMES.isdisjoint(CATALOGUE)
    assert not Interest().wants(topic, 1)
    assert not Interest(topics=frozenset({"clients", f"client:{cid_of(1)}"})).wants(topic, 1)
    assert Interest(topics=frozenset({"signals"})).wants(topic, 1)
    for asked in ("signals", topic):
        with pytest.raises(ValueError, match="Unknown topic"):
            parse_topics(asked)


def test_an_answer_that_nobody_waits_for_and_one_of_a_stranger_change_no_row(
    owner: User, stranger: User, clock: Clock
) -> None:
    welcome(caller(owner), cid_of(1))
    before, mark = list(Client.objects.values()), log.newest()
    clients.answer(caller=caller(owner), cid=cid_of(1), nonce="late")
    clients.answer(caller=caller(stranger), cid=cid_of(1), nonce="late")
    assert names(mark) == ["signal.answer"]
    assert list(Client.objects.values()) == before


# ── Who is handling what (B38) ──


def test_B38_somebody_else_takes_over_only_when_asked_to_and_both_are_told(
    owner: User, colleague: User, clock: Clock
) -> None:
    mine, theirs = caller(owner), caller(colleague)
    welcome(mine, cid_of(1))
    welcome(theirs, cid_of(2))
    clients.take(caller=mine, cid=cid_of(1), subject=SUBJECT, audience=owner.pk)
    mark = log.newest()
    with pytest.raises(Claimed) as refused:
        clients.take(caller=theirs, cid=cid_of(2), subject=SUBJECT, audience=owner.pk)
    assert refused.value.claim["user"] == "owner"
    assert names(mark) == []
    picture = clients.take(caller=theirs, cid=cid_of(2), subject=SUBJECT, audience=owner.pk, takeover=True)
    assert (picture["client"], picture["user"], picture["version"]) == (cid_of(2), "colleague", 2)
    (event,) = told(mark)
    assert (event.name, event.topic, event.audience, event.actor) == (
        "claim.taken",
        SUBJECT,
        owner.pk,
        "colleague",
    )
    assert event.data["reason"] == "session_takeover"
    assert (event.data["previous_client"], event.data["previous_user"]) == (cid_of(1), "owner")
    assert not clients.let_go(caller=mine, cid=cid_of(1), subject=SUBJECT), (
        "what one lost one cannot give back"
    )
    assert clients.find(owner_id=owner.pk, binding="session:a", cid=cid_of(1)).state == L  # type: ignore[union-attr]


def test_B38_the_same_users_other_tab_needs_no_permission(owner: User, clock: Clock) -> None:
    who = caller(owner)
    welcome(who, cid_of(1))
    welcome(who, cid_of(2), "page-two")
    clients.take(caller=who, cid=cid_of(1), subject=SUBJECT, audience=owner.pk)
    mark = log.newest()
    assert clients.take(caller=who, cid=cid_of(2), subject=SUBJECT, audience=owner.pk)["client"] == cid_of(2)
    assert told(mark)[0].data["reason"] == "session_takeover"


def test_presence_is_told_when_it_changes_and_lapses_by_itself(
    owner: User, colleague: User, clock: Clock
) -> None:
    mine, theirs = caller(owner), caller(colleague)
    me, they = welcome(mine, cid_of(1)), welcome(theirs, cid_of(2))
    clients.take(caller=mine, cid=cid_of(1), subject=SUBJECT, audience=owner.pk)

    def present(doing: str) -> list[str]:
        mark = log.newest()
        clients.be_present(caller=theirs, cid=cid_of(2), subject=SUBJECT, audience=owner.pk, doing=doing)
        return [event.data["reason"] for event in told(mark)]

    assert present("looking") == ["looking"]
    assert present("looking") == []
    assert present("typing") == ["typing"]
    assert clients.claims_of([SUBJECT])[SUBJECT]["people"] == [
        {"client": cid_of(2), "user": "colleague", "doing": "typing"}
    ]
    assert present("") == ["left"]
    assert present("") == []
    present("looking")
    for _ in range(4):
        clock.go(20)
        clients.renew(HERE, {me.pk: 1, they.pk: 1}, cursors={})
        assert present("looking") == []
        assert clients.sweep() == 0
    clock.go(30)
    mark = log.newest()
    assert clients.sweep() >= 1
    assert [event.data["people"] for event in told(mark) if event.name == "claim.updated"] == [[]]
    versions = [event.version for event in told() if event.topic == SUBJECT]
    assert versions == [*range(1, len(versions) + 1)]


def test_what_expires_takes_its_presence_along_also_where_somebody_else_is_handling(
    owner: User, colleague: User, clock: Clock
) -> None:
    mine, theirs = caller(owner), caller(colleague)
    welcome(mine, cid_of(1))
    them = welcome(theirs, cid_of(2))
    clients.take(caller=mine, cid=cid_of(1), subject=SUBJECT, audience=owner.pk)
    clients.be_present(caller=theirs, cid=cid_of(2), subject=SUBJECT, audience=owner.pk, doing="typing")
    clients.close(pk=them.pk, reason="away", actor="op")
    picture = clients.claims_of([SUBJECT, "task:nobody"])
    assert list(picture) == [SUBJECT]
    assert (picture[SUBJECT]["client"], picture[SUBJECT]["people"]) == (cid_of(1), [])
    assert not Presence.objects.exists()


def test_what_is_over_needs_nobody_and_what_is_gone_keeps_nobody(owner: User, clock: Clock) -> None:
    who = caller(owner)
    mine = welcome(who, cid_of(1))
    clients.take(caller=who, cid=cid_of(1), subject=SUBJECT, audience=owner.pk)
    mark = log.newest()
    for subject in (SUBJECT, SUBJECT, "task:unknown"):
        with transaction.atomic():
            clients.finish(subject, actor="system")
    assert [(event.name, event.data["reason"]) for event in told(mark)] == [("claim.released", "finished")]
    clients.take(caller=who, cid=cid_of(1), subject=SUBJECT, audience=owner.pk)
    clients.forget(SUBJECT)
    assert not Claim.objects.exists()
    assert row_of(mine).state == L


def test_a_claim_needs_a_client_that_is_not_over(owner: User, clock: Clock) -> None:
    tale = Tale(owner, clock)
    for state in (S, FORMER, I, E, C):
        tale.connect()
        tale.epoch = tale.row.epoch
        tale.bring_to(state)
        words: dict[str, Any] = {
            "caller": tale.caller,
            "cid": tale.welcome.cid,
            "subject": SUBJECT,
            "audience": owner.pk,
        }
        if state in (E, C):
            with pytest.raises(Unknown):
                clients.take(**words)
            with pytest.raises(Unknown):
                clients.be_present(**words, doing="looking")
        else:
            assert clients.take(**words)["client"] == tale.welcome.cid


# ── Pictures ──


def test_a_client_is_shown_without_anything_that_opens_a_session(owner: User, clock: Clock) -> None:
    who = caller(owner, "session:secret-binding")
    welcome(who, cid_of(1), "secret-page", user_agent="Firefox", address="192.0.2.7", path="/x")
    shown = json.dumps([event.data for event in told()])
    for secret in ("secret-binding", "secret-page", HERE):
        assert secret not in shown
    (event,) = told()
    assert event.data == {**clients.picture(Client.objects.get()), "at": "2026-03-01T12:00:00.000Z"}
    assert event.data["state"] == "live"
    assert event.data["opened_at"] == "2026-03-01T12:00:00.000Z"


def test_clients_are_listed_for_those_who_may_see_their_owners(
    owner: User, stranger: User, clock: Clock
) -> None:
    for number, user in enumerate((owner, stranger, owner), 1):
        clock.go(1)
        welcome(caller(user), cid_of(number))
    # A row that was made and never became a client is none.
    Client.objects.create(owner=owner, cid=cid_of(9), binding="x")
    assert [row.cid for row in clients.visible_to(None)] == [cid_of(3), cid_of(2), cid_of(1)]
    assert [row.cid for row in clients.visible_to({owner.pk})] == [cid_of(3), cid_of(1)]


# ── One statement decides (B19, B20) ──


def test_B20_a_row_that_changed_since_it_was_read_is_not_written(owner: User, clock: Clock) -> None:
    row = row_of(welcome(caller(owner), cid_of(1)))
    for field in ("epoch", "version"):
        Client.objects.filter(pk=row.pk).update(**{field: F(field) + 1})
        mark = log.newest()
        assert not clients._move(
            row, I, now=T0, tell="client.inactive", actor="x", lease_expires_at=None, expires_at=T0
        )
        assert names(mark) == []
        assert row_of_pk(row.pk).state == L
        row = row_of_pk(row.pk)


@pytest.fixture
def queries() -> Iterator[list[str]]:
    """The statements of this test, as they go to the database."""
    seen: list[str] = []

    def note(execute: Any, sql: str, params: Any, many: bool, context: Any) -> Any:
        seen.append(sql)
        return execute(sql, params, many, context)

    with connection.execute_wrapper(note):
        yield seen


def test_a_sweep_with_nothing_to_do_takes_no_lock(owner: User, clock: Clock, queries: list[str]) -> None:
    """On SQLite a transaction is the one write lock of the database, and every server process sweeps every few seconds."""
    welcome(caller(owner), cid_of(1))
    queries.clear()
    assert clients.sweep() == 0
    assert len(queries) <= 5
    assert all(sql.startswith("SELECT") for sql in queries), queries


def test_the_times_are_knobs(owner: User, clock: Clock, settings: Any) -> None:
    settings.CLIENT_GRACE_SECONDS, settings.CLIENT_SUSPENDED_SECONDS, settings.CLIENT_LEASE_SECONDS = 5, 7, 9
    who = caller(owner)
    mine = welcome(who, cid_of(1))
    assert row_of(mine).lease_expires_at == T0 + dt.timedelta(seconds=9)
    clients.disconnect([(mine.pk, 1, "gone")])
    assert row_of(mine).expires_at == T0 + dt.timedelta(seconds=5)
    clients.suspend(caller=who, cid=cid_of(1), epoch=1)
    assert row_of(mine).expires_at == T0 + dt.timedelta(seconds=7)
    assert django_settings.CLIENT_GRACE_SECONDS == 5


def test_many_ids_of_one_owner_make_room_for_each_other_and_not_for_more_that_are_alive(
    owner: User, colleague: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clients, "PER_OWNER", 20)
    who = Caller(owner_id=owner.pk, binding="session:1", who="owner")
    first = [welcome(who, clients.new_cid()) for _ in range(20)]
    assert isinstance(arrive(who, clients.new_cid()), clients.Full)
    assert isinstance(arrive(who, "malformed"), clients.Full)
    assert arrive(who, first[0].cid) != clients.Full(), "who is known comes in"
    other = Caller(owner_id=colleague.pk, binding="session:2", who="colleague")
    assert isinstance(arrive(other, clients.new_cid()), Welcome)
    for pk in (first[3].pk, first[4].pk):
        assert clients.close(pk=pk, reason="", actor="op")
    new = [welcome(who, clients.new_cid()) for _ in range(2)]
    assert not Client.objects.filter(pk__in=[first[3].pk, first[4].pk]).exists()
    assert Client.objects.filter(owner=owner).count() == 20
    assert isinstance(arrive(who, clients.new_cid()), clients.Full)
    assert {each.cid for each in new} <= set(Client.objects.values_list("cid", flat=True))


def crowd(who: Caller, count: int, *, alive: int = 0) -> list[str]:
    """So many clients of one owner, of which the first ones are alive and the others have expired, the oldest first."""
    now = clients.database_now()
    cids = [clients.new_cid() for _ in range(count)]
    rows = [
        Client(
            owner_id=who.owner_id, cid=cid, binding=who.binding, who=who.who, page="page-one", epoch=1, version=1,
            state=ClientState.LIVE if number < alive else ClientState.EXPIRED,
            lease_expires_at=now + dt.timedelta(hours=1) if number < alive else None,
            last_seen_at=now - dt.timedelta(minutes=30) + dt.timedelta(seconds=number),
        )
        for number, cid in enumerate(cids)
    ]  # fmt: skip
    Client.objects.bulk_create(rows)
    return cids


@pytest.mark.parametrize("stranger", ["new", "malformed"])
def test_B13_a_client_that_comes_back_is_not_deleted_to_make_room_for_one_that_comes_with_it(
    owner: User, monkeypatch: pytest.MonkeyPatch, stranger: str
) -> None:
    monkeypatch.setattr(clients, "PER_OWNER", 20)
    who = Caller(owner_id=owner.pk, binding="session:1", who="owner")
    cids = crowd(who, 20)
    rows = {row.cid: row.pk for row in Client.objects.all()}
    other = clients.new_cid() if stranger == "new" else stranger
    arrivals = [Arrival(caller=who, cid=cid, page="page-two", process=HERE) for cid in (cids[0], other)]
    outcomes = [outcome for outcome in clients.connect(arrivals) if isinstance(outcome, Welcome)]
    assert [outcome.pk == rows[cids[0]] for outcome in outcomes] == [True, False]
    assert not Client.objects.filter(cid=cids[1]).exists(), "the oldest of the others went"
    assert Client.objects.count() <= 20


def test_who_comes_first_gets_the_last_place(owner: User, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients, "PER_OWNER", 20)
    who = Caller(owner_id=owner.pk, binding="session:1", who="owner")
    crowd(who, 19, alive=19)
    one, two = clients.new_cid(), clients.new_cid()
    for cids, full in (
        (("malformed", one, two), [False, True, True]),
        ((one, "malformed", two), [False, True, True]),
        ((one, two, one), [False, True, False]),
    ):
        with transaction.atomic():
            outcomes = clients.connect(
                [Arrival(caller=who, cid=cid, page="page-two", process=HERE) for cid in cids]
            )
            assert [outcome == clients.Full() for outcome in outcomes] == full
            transaction.set_rollback(True)


def test_B03_a_page_whose_id_is_in_use_and_gone_meanwhile_leaves_no_row_behind(owner: User) -> None:
    who = Caller(owner_id=owner.pk, binding="session:1", who="owner")
    cid = clients.new_cid()
    found = welcome(who, cid, in_use=True)
    assert (found.accepted, found.reason) == (False, "in_use")
    assert [row.cid for row in Client.objects.all()] == [found.cid]


def test_B39_B41_a_page_in_the_background_has_its_whole_time_when_its_server_dies_however_many_there_are(
    owner: User, clock: Clock
) -> None:
    who = Caller(owner_id=owner.pk, binding="session:1", who="owner")
    held = {}
    for _ in range(6):
        found = welcome(who, clients.new_cid(), process="elsewhere/1/1")
        clients.suspend(caller=who, cid=found.cid, epoch=found.epoch)
        held[found.pk] = found.epoch
    # Their streams stay open for longer than a page without one is kept.
    for _ in range(20):
        clock.go(django_settings.CLIENT_LEASE_SECONDS / 2)
        clients.renew("elsewhere/1/1", held, cursors={})
    assert clock.now > max(row.expires_at for row in Client.objects.all())
    clock.go(django_settings.CLIENT_LEASE_SECONDS + 1)
    clients.sweep(limit=2)
    assert {row.state for row in Client.objects.all()} == {ClientState.SUSPENDED}
    while clients.sweep(limit=2):
        pass
    clients.sweep(limit=200)
    assert {row.state for row in Client.objects.all()} == {ClientState.SUSPENDED}
    clock.go(django_settings.CLIENT_SUSPENDED_SECONDS + 1)
    clients.sweep()
    assert {row.state for row in Client.objects.all()} == {ClientState.EXPIRED}


def test_B34_a_cursor_that_the_log_has_not_come_to_is_not_believed(owner: User) -> None:
    who = Caller(owner_id=owner.pk, binding="session:1", who="owner")
    found = welcome(who, clients.new_cid(), cursor=10**15)
    assert row_of(found).cursor is None
    clients.probe(caller=who, cid=found.cid, epoch=found.epoch, nonce="n1", cursor=2**63 - 1)
    assert row_of(found).cursor is None
    clients.probe(caller=who, cid=found.cid, epoch=found.epoch, nonce="n2", cursor=1)
    assert row_of(found).cursor == 1
    clients.suspend(caller=who, cid=found.cid, epoch=found.epoch, cursor=10**15)
    assert row_of(found).cursor == 1


def test_B18_whoever_watches_hears_that_the_user_who_handled_it_was_deleted(
    owner: User, colleague: User
) -> None:
    who = Caller(owner_id=colleague.pk, binding="session:1", who="colleague")
    found = welcome(who, clients.new_cid())
    clients.take(caller=who, cid=found.cid, subject=SUBJECT, audience=owner.pk)
    mark = log.newest()
    colleague.delete()
    assert [(event.name, event.data["reason"]) for event in log.read(mark)] == [
        ("claim.released", "its user was deleted"),
        ("client.closed", "its user was deleted"),
    ]
    assert clients.claims_of([SUBJECT])[SUBJECT]["user"] is None
    assert not Client.objects.filter(pk=found.pk).exists()
