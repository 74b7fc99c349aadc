"""The clients of a process: who comes and goes, who is asked, and what is heard of other processes. Two registries stand for two processes."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import json
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import pytest_asyncio
from channels.db import database_sync_to_async
from django.contrib.auth.models import User
from django.db import OperationalError, transaction

from events import clients, consumers, metrics, registry
from events.clients import Arrival, Caller, Unknown, Welcome
from events.consumers import EventStreamConsumer, Grant
from events.envelope import Envelope, Interest
from events.models import Client, Event
from events.registry import Gone, Registry
from events.states import ClientState
from tests.events.test_consumers import Client as Request
from tests.events.test_consumers import nothing_left
from tests.events.writing import write_and_leave

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.asyncio]

CID = f"cid-{uuid.UUID(int=1)}"
L, S, I, E, C = ClientState  # noqa: E741 (as in states.py)


@database_sync_to_async
def rows() -> list[Client]:
    return list(Client.objects.order_by("pk"))


async def row() -> Client:
    (found,) = await rows()
    return found


@database_sync_to_async
def told(*names: str) -> list[Event]:
    return list(Event.objects.filter(name__in=names).order_by("pk"))


async def until(condition: Callable[[], Any], seconds: float = 10) -> Any:
    async with asyncio.timeout(seconds):
        while True:
            value = condition()
            if asyncio.iscoroutine(value):
                value = await value
            if value:
                return value
            await asyncio.sleep(0.01)


@pytest.fixture
def who(owner: User) -> Caller:
    return Caller(owner_id=owner.pk, binding="session:a", who="owner")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page that does not answer is not waited for so long."""
    monkeypatch.setattr(registry, "QUESTION_SECONDS", 0.2)


def counted(name: str) -> float:
    return metrics.REGISTRY.get_sample_value(f"switchboard_{name}_total") or 0.0


# ── The registry by itself ──


class Ear:
    """A stream that only notes what it is told. ``answer`` is called with the nonce of a question."""

    def __init__(self) -> None:
        self.heard: list[tuple[Any, ...]] = []
        self.answer: Callable[[str], None] | None = None
        self.position = 0

    def signal(self, nonce: str, *, question: bool) -> None:
        self.heard.append(("question" if question else "probe", nonce))
        if question and self.answer is not None:
            self.answer(nonce)

    def supersede(self, epoch: int) -> None:
        # It may be said twice: by whoever sits down here, and by the log. A stream ends at the first word.
        if ("superseded", epoch) not in self.heard:
            self.heard.append(("superseded", epoch))

    def dismiss(self, reason: str) -> None:
        self.heard.append(("dismissed", reason))

    def come_again(self) -> None:
        self.heard.append(("again",))


class Sitting:
    """A stream of a client in one registry, from its arrival until it leaves."""

    def __init__(self, where: Registry, arrival: Arrival) -> None:
        self.ear = Ear()
        self.seat: asyncio.Future[registry.Seat] = asyncio.get_running_loop().create_future()
        self._leave = asyncio.Event()
        self.task = asyncio.create_task(self._run(where, arrival))

    async def _run(self, where: Registry, arrival: Arrival) -> None:
        try:
            async with where.attend(arrival, self.ear) as seat:
                self.seat.set_result(seat)
                await self._leave.wait()
        except Exception as error:
            self.seat.set_exception(error)

    async def welcome(self) -> Welcome:
        async with asyncio.timeout(10):
            return (await self.seat).welcome

    async def leave(self) -> None:
        self._leave.set()
        await self.task


class House:
    """Server processes: a registry each."""

    def __init__(self, who: Caller) -> None:
        self.who = who
        self.sittings: list[Sitting] = []

    def process(self, name: str) -> Registry:
        made = Registry()
        made.process = f"{name}/1/1"
        return made

    def arrival(self, where: Registry, page: str = "page-one", cid: str = CID, **more: Any) -> Arrival:
        return Arrival(**{"caller": self.who, "cid": cid, "page": page, "process": where.process, **more})

    def sit(self, where: Registry, page: str = "page-one", cid: str = CID, **more: Any) -> Sitting:
        self.sittings.append(Sitting(where, self.arrival(where, page, cid, **more)))
        return self.sittings[-1]

    async def close(self) -> None:
        for sitting in self.sittings:
            with contextlib.suppress(Exception):
                await sitting.leave()


@pytest_asyncio.fixture
async def house(who: Caller) -> AsyncIterator[House]:
    made = House(who)
    yield made
    await made.close()
    await nothing_left()
    assert not [each for each in await rows() if each.state == L], "a stream left, and its client is live"


def answering(sitting: Sitting, who: Caller) -> list[asyncio.Task[Any]]:
    """Its page answers every question, as pages do."""
    tasks: list[asyncio.Task[Any]] = []

    def answer(nonce: str) -> None:
        words = {"caller": who, "cid": CID, "nonce": nonce}
        tasks.append(asyncio.create_task(database_sync_to_async(clients.answer)(**words)))

    sitting.ear.answer = answer
    return tasks


async def test_B14_B15_a_reconnect_to_the_same_process_replaces_the_stream_at_once_and_its_late_close_changes_nothing(
    house: House,
) -> None:
    here = house.process("here")
    old = house.sit(here)
    assert (await old.welcome()).epoch == 1
    new = house.sit(here)
    assert (await new.welcome()).epoch == 2
    assert old.ear.heard == [("superseded", 2)], "in the very step, without the log"
    assert len(here) == 1
    await old.leave()
    await until(lambda: here._writing is None)
    assert ((await row()).state, (await row()).epoch) == (L, 2)
    assert await told("client.inactive") == []
    # What is said to the client reaches the new stream, and only that.
    await database_sync_to_async(clients.probe)(caller=house.who, cid=CID, epoch=2, nonce="n")
    await until(lambda: new.ear.heard == [("probe", "n")])
    assert old.ear.heard == [("superseded", 2)]


async def test_B14_a_reconnect_to_another_process_ends_the_old_stream_in_the_first(house: House) -> None:
    here, there = house.process("here"), house.process("there")
    old = house.sit(here)
    await old.welcome()
    await until(here._following.is_set)
    new = house.sit(there)
    assert (await new.welcome()).resumed
    await until(lambda: old.ear.heard == [("superseded", 2)])
    await old.leave()
    await until(lambda: here._writing is None)
    assert ((await row()).state, (await row()).process) == (L, "there/1/1")
    assert await told("client.inactive") == []


@pytest.mark.parametrize("elsewhere", [False, True], ids=["in one process", "in two"])
async def test_B03_B27_the_second_of_two_pages_with_one_id_gets_an_id_of_its_own_and_both_stay(
    elsewhere: bool, house: House
) -> None:
    here = house.process("here")
    there = house.process("there") if elsewhere else here
    first = house.sit(here)
    await first.welcome()
    await until(here._following.is_set)
    tasks = answering(first, house.who)
    second = house.sit(there, "page-two")
    given = await second.welcome()
    await asyncio.gather(*tasks)
    assert (given.accepted, given.reason, given.resumed) == (False, "in_use", False)
    assert given.cid != CID
    assert [kind for kind, *_ in first.ear.heard] == ["question"]
    # A third, and the second with its new id once more: nobody is put out.
    third = house.sit(here, "page-three")
    assert (await third.welcome()).reason == "in_use"
    again = house.sit(there, "page-two", given.cid)
    assert (await again.welcome()).resumed
    assert not [word for word in first.ear.heard if word[0] != "question"]
    assert {each.state for each in await rows()} == {L}
    assert len(await rows()) == 3


@pytest.mark.parametrize("elsewhere", [False, True], ids=["in one process", "in two"])
async def test_B03_B27_while_looks_at_the_log_are_slow_a_page_that_answers_is_waited_for(
    elsewhere: bool, quick: None, settings: Any, house: House
) -> None:
    """Redis is away: question and answer are found by looking, one after the other. That takes longer than an answer may take."""
    here = house.process("here")
    there = house.process("there") if elsewhere else here
    first = house.sit(here)
    await first.welcome()
    await until(here._following.is_set)
    settings.POLL_SECONDS = 1.0
    late: list[asyncio.Task[Any]] = []

    async def found_by_looking(nonce: str) -> None:
        await asyncio.sleep(3 * registry.QUESTION_SECONDS)
        await database_sync_to_async(clients.answer)(caller=house.who, cid=CID, nonce=nonce)

    first.ear.answer = lambda nonce: late.append(asyncio.create_task(found_by_looking(nonce)))
    given = await house.sit(there, "page-two").welcome()
    assert (given.accepted, given.reason) == (False, "in_use")
    assert [word[0] for word in first.ear.heard] == ["question"]
    await asyncio.gather(*late)


@pytest.mark.parametrize("elsewhere", [False, True], ids=["in one process", "in two"])
async def test_B03_B27_a_page_that_does_not_answer_is_taken_over_told_so_and_stays_away(
    elsewhere: bool, quick: None, house: House
) -> None:
    here = house.process("here")
    there = house.process("there") if elsewhere else here
    silent = house.sit(here)
    await silent.welcome()
    await until(here._following.is_set)
    second = house.sit(there, "page-two")
    given = await second.welcome()
    assert (given.accepted, given.resumed, given.cid, given.epoch) == (True, True, CID, 2)
    await until(lambda: [word[0] for word in silent.ear.heard] == ["question", "superseded"])
    await silent.leave()
    with pytest.raises(Gone):
        await house.sit(here).welcome()
    assert second.ear.heard == []
    assert (await row()).epoch == 2


async def test_B03_a_page_whose_process_died_is_taken_over_after_one_question(
    quick: None, house: House
) -> None:
    await database_sync_to_async(clients.connect)(
        [Arrival(caller=house.who, cid=CID, page="page-one", process="dead/1/1")]
    )
    second = house.sit(house.process("here"), "page-two")
    assert (await second.welcome()).epoch == 2


async def test_an_answer_that_comes_too_late_or_to_another_question_is_nothing(
    quick: None, house: House
) -> None:
    here = house.process("here")
    silent = house.sit(here)
    await silent.welcome()
    second = house.sit(here, "page-two")
    (question,) = await until(lambda: silent.ear.heard)
    await database_sync_to_async(clients.answer)(caller=house.who, cid=CID, nonce="of another question")
    assert (await second.welcome()).accepted
    await database_sync_to_async(clients.answer)(caller=house.who, cid=CID, nonce=question[1])
    assert (await house.sit(here, "page-two").welcome()).epoch == 3
    assert here._questions == {}


async def test_two_pages_that_take_over_at_once_end_with_one_and_the_other_knows(
    quick: None, house: House
) -> None:
    here, there = house.process("here"), house.process("there")
    silent = house.sit(here)
    await silent.welcome()
    await until(here._following.is_set)
    two, three = house.sit(here, "page-two"), house.sit(there, "page-three")
    epochs = sorted([(await two.welcome()).epoch, (await three.welcome()).epoch])
    assert epochs == [2, 3]
    loser = min((two, three), key=lambda each: each.seat.result().welcome.epoch)
    await until(lambda: ("superseded", 3) in loser.ear.heard)
    await until(lambda: [word for word in silent.ear.heard if word[0] == "superseded"])
    assert len(here) + len(there) <= 2


async def test_a_later_stream_that_sits_down_first_stays(who: Caller) -> None:
    here = Registry()
    one = Welcome(pk=1, owner_id=1, cid=CID, epoch=1, accepted=True, reason="", resumed=False)
    two = Welcome(pk=1, owner_id=1, cid=CID, epoch=2, accepted=True, reason="", resumed=True)
    early, late = Ear(), Ear()
    here._sit(registry.Seat(two, late, ("", "")))
    here._sit(registry.Seat(one, early, ("", "")))
    assert early.heard == [("superseded", 2)]
    assert late.heard == []
    assert here._seats[1].welcome.epoch == 2


async def test_B15_what_the_log_says_of_an_earlier_client_of_this_id_is_not_about_the_one_that_is_here(
    who: Caller,
) -> None:
    """Its row was deleted, and the new one's epochs begin again; this process reads the log a moment later."""
    here, ear = Registry(), Ear()
    welcome = Welcome(pk=2, owner_id=1, cid=CID, epoch=1, accepted=True, reason="", resumed=False, told=7)
    here._sit(registry.Seat(welcome, ear, ("", "")))

    def hear(number: int, name: str, epoch: int) -> None:
        here._take(
            Envelope(
                id=number, name=name, topic=f"client:{CID}", audience=1, data={"epoch": epoch}, frame=b""
            )
        )

    hear(5, "client.opened", 9)
    hear(6, "client.closed", 1)
    hear(7, "client.opened", 1)
    assert ear.heard == []
    hear(8, "client.opened", 2)
    assert ear.heard == [("superseded", 2)]


# ── Many ──


async def test_many_that_come_and_go_at_once_are_a_few_transactions(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: dict[str, list[int]] = {"connect": [], "disconnect": []}
    for name, work in (("connect", clients.connect), ("disconnect", clients.disconnect)):

        def noted(batch: Any, name: str = name, work: Any = work) -> Any:
            sizes[name].append(len(batch))
            return work(batch)

        monkeypatch.setattr(clients, name, noted)
    here = house.process("here")
    sittings = [house.sit(here, cid=f"cid-{uuid.UUID(int=number)}") for number in range(250)]
    assert {(await each.welcome()).epoch for each in sittings} == {1}
    assert len(here) == 250
    await asyncio.gather(*(each.leave() for each in sittings))
    await until(lambda: here._writing is None)
    assert len(here) == 0
    assert {each.state for each in await rows()} == {I}
    for batches in sizes.values():
        assert sum(batches) == 250
        assert len(batches) <= 4
        assert max(batches) == registry.TOGETHER


async def test_one_arrival_that_breaks_does_not_take_the_others_along(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = f"cid-{uuid.UUID(int=13)}"
    connect = clients.connect

    def breaking(batch: Any) -> Any:
        if any(each.cid == bad for each in batch):
            raise OperationalError("this one breaks")
        return connect(batch)

    monkeypatch.setattr(clients, "connect", breaking)
    here = house.process("here")
    sittings = {number: house.sit(here, cid=f"cid-{uuid.UUID(int=number)}") for number in range(10, 20)}
    for number, sitting in sittings.items():
        if number == 13:
            with pytest.raises(OperationalError):
                await sitting.welcome()
        else:
            assert (await sitting.welcome()).accepted
    assert len(here) == 9


async def test_C06_one_that_leaves_at_whatever_moment_of_its_arrival_leaves_no_live_client(
    house: House, quick: None
) -> None:
    here = house.process("here")
    held = house.sit(here, "page-zero", f"cid-{uuid.UUID(int=99)}")
    await held.welcome()
    for steps in range(40):
        for page in ("page-one", "page-two"):
            sitting = Sitting(here, house.arrival(here, page, f"cid-{uuid.UUID(int=1000 + steps)}"))
            for _ in range(steps):
                await asyncio.sleep(0 if steps < 20 else 0.001)
            sitting.task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await sitting.task
            sitting.seat.cancel()
    await until(lambda: here._writing is None)
    assert len(here) == 1
    assert here._questions == {}
    assert not here._arrivals
    states = {each.cid: each.state for each in await rows()}
    assert states.pop(held.seat.result().welcome.cid) == L
    assert L not in states.values()


async def test_C06_one_that_leaves_in_the_very_step_in_which_it_became_a_client_is_no_live_client(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = house.process("here")
    write = here._write_arrivals

    async def written(waiting: Any) -> None:
        await write(waiting)
        sitting.task.cancel()

    monkeypatch.setattr(here, "_write_arrivals", written)
    sitting = Sitting(here, house.arrival(here))
    with contextlib.suppress(asyncio.CancelledError):
        await sitting.task
    assert sitting.task.cancelled()
    assert not sitting.seat.done()
    sitting.seat.cancel()
    await until(lambda: here._writing is None)
    assert ((await row()).state, (await row()).epoch) == (I, 1)


async def test_the_registry_ends_with_its_last_client_and_begins_with_the_next(house: House) -> None:
    here = house.process("here")
    for epoch in (1, 2, 3):
        sitting = house.sit(here)
        assert (await sitting.welcome()).epoch == epoch
        assert len(here._tasks) == 2
        await sitting.leave()
        await nothing_left()
        assert here._tasks == []
        assert not here._following.is_set()


# ── Leases, and what is heard ──


@pytest.fixture
def short(settings: Any) -> None:
    settings.CLIENT_LEASE_SECONDS = 0.6
    settings.CLIENT_GRACE_SECONDS = 0.6


async def test_the_lease_goes_on_as_long_as_the_stream_does(short: None, house: House) -> None:
    sitting = house.sit(house.process("here"))
    await sitting.welcome()
    sitting.ear.position = 41
    first = (await row()).lease_expires_at
    assert first is not None
    later = first + dt.timedelta(seconds=1)

    async def renewed() -> bool:
        lease = (await row()).lease_expires_at
        return lease is not None and lease > later

    await until(renewed)
    assert (await row()).sent_cursor == 41
    assert sitting.ear.heard == []
    assert await told("client.inactive", "client.expired") == []


async def test_B41_a_client_that_lapsed_while_its_stream_was_open_is_taken_back_as_soon_as_that_is_heard(
    house: House,
) -> None:
    here = house.process("here")
    sitting = house.sit(here)
    await sitting.welcome()
    await until(here._following.is_set)

    def lapse() -> None:
        past = clients.database_now() - dt.timedelta(seconds=5)
        Client.objects.update(lease_expires_at=past)
        assert clients.sweep() == 1

    await database_sync_to_async(lapse)()

    async def live_again() -> bool:
        return (await row()).state == L

    await until(live_again)
    assert sitting.ear.heard == []
    assert [event.name for event in await told("client.opened", "client.inactive")] == [
        "client.opened", "client.inactive", "client.opened",
    ]  # fmt: skip
    assert (await row()).epoch == 1


@pytest.fixture
def deaf(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is heard of what happens elsewhere."""
    monkeypatch.setattr(Registry, "_take", lambda *_: None)


async def test_B27_a_stream_that_was_replaced_and_did_not_hear_of_it_learns_it_with_its_next_renewal(
    deaf: None, short: None, house: House
) -> None:
    here, there = house.process("here"), house.process("there")
    old = house.sit(here)
    await old.welcome()
    await house.sit(there).welcome()
    await until(lambda: old.ear.heard)
    assert set(old.ear.heard) == {("superseded", 2)}


async def test_a_client_that_an_operator_ended_is_not_asked_to_come_again_by_the_renewal(
    deaf: None, short: None, house: House
) -> None:
    sitting = house.sit(house.process("here"))
    pk = (await sitting.welcome()).pk
    await database_sync_to_async(clients.close)(pk=pk, reason="enough", actor="op")
    await until(lambda: sitting.ear.heard)
    assert set(sitting.ear.heard) == {("dismissed", "enough")}


async def test_a_client_whose_row_is_gone_comes_again(deaf: None, short: None, house: House) -> None:
    sitting = house.sit(house.process("here"))
    await sitting.welcome()
    await database_sync_to_async(lambda: Client.objects.all().delete())()
    await until(lambda: sitting.ear.heard)
    assert set(sitting.ear.heard) == {("again",)}


async def test_what_an_operator_ends_is_told_with_the_reason(house: House) -> None:
    here = house.process("here")
    sitting = house.sit(here)
    pk = (await sitting.welcome()).pk
    await until(here._following.is_set)
    await database_sync_to_async(clients.close)(pk=pk, reason="the shift is over", actor="op")
    await until(lambda: sitting.ear.heard == [("dismissed", "the shift is over")])


async def test_a_client_that_expires_although_its_stream_is_open_is_counted_and_comes_again(
    house: House, counted_faults: None, caplog: pytest.LogCaptureFixture
) -> None:
    here = house.process("here")
    sitting = house.sit(here)
    await sitting.welcome()
    await until(here._following.is_set)
    before = counted("clients_expired_live")

    def expire() -> None:
        with transaction.atomic():
            now = clients.database_now()
            found = Client.objects.get()
            for state, name in ((I, "client.inactive"), (E, "client.expired")):
                clients._move(
                    found, state, now=now, tell=name, actor="system", reason=clients.LAPSED[1],
                    lease_expires_at=None, expires_at=now if state == I else None,
                )  # fmt: skip

    await database_sync_to_async(expire)()
    await until(lambda: ("again",) in sitting.ear.heard)
    assert counted("clients_expired_live") == before + 1
    assert "expired although its stream is open" in caplog.text


async def test_a_stream_that_somebody_else_ended_is_counted_and_taken_back(
    house: House, counted_faults: None, caplog: pytest.LogCaptureFixture
) -> None:
    here = house.process("here")
    sitting = house.sit(here)
    pk = (await sitting.welcome()).pk
    await until(here._following.is_set)
    before = counted("clients_stale_changed")
    await database_sync_to_async(clients.disconnect)([(pk, 1, "gone")])
    await until(lambda: counted("clients_stale_changed") == before + 1)

    async def live_again() -> bool:
        return (await row()).state == L

    await until(live_again)
    assert sitting.ear.heard == []
    assert "not its own" in caplog.text


async def test_a_registry_that_lost_the_log_finds_it_again(
    house: House, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(registry, "PAUSE_AFTER_ERROR", 0.05)
    real, faults = registry.follow, [OperationalError("away"), OperationalError("still away")]

    def breaking(*args: Any, **kwargs: Any) -> Any:
        if faults:
            raise faults.pop()
        return real(*args, **kwargs)

    monkeypatch.setattr(registry, "follow", breaking)
    here = house.process("here")
    first = house.sit(here)
    await first.welcome()
    tasks = answering(first, house.who)
    await until(lambda: not faults and here._following.is_set())
    second = house.sit(here, "page-two")
    assert (await second.welcome()).reason == "in_use"
    await asyncio.gather(*tasks)
    assert caplog.text.count("does not hear of clients elsewhere") == 2


async def test_rows_that_cannot_be_looked_after_are_looked_after_later(
    short: None, house: House, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    work, faults = clients.renew, [OperationalError("away"), OperationalError("still away")]

    def breaking(*args: Any, **kwargs: Any) -> Any:
        if faults:
            raise faults.pop()
        return work(*args, **kwargs)

    monkeypatch.setattr(clients, "renew", breaking)
    sitting = house.sit(house.process("here"))
    await sitting.welcome()
    first = (await row()).lease_expires_at
    await until(lambda: not faults)

    async def renewed() -> bool:
        found = await row()
        return found.state == L and found.lease_expires_at != first

    await until(renewed)
    assert sitting.ear.heard == []
    assert "could not be looked after" in caplog.text


async def test_departures_that_cannot_be_written_are_left_to_the_lease_and_nobody_waits_for_them_for_ever(
    house: House, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def breaking(_: Any) -> int:
        raise OperationalError("away")

    here = house.process("here")
    sitting = house.sit(here)
    await sitting.welcome()
    with monkeypatch.context() as broken:
        broken.setattr(clients, "disconnect", breaking)
        await sitting.leave()
        await here.flush()
    assert (await row()).state == L
    assert "the database did not hear it" in caplog.text

    def later() -> None:
        past = clients.database_now() - dt.timedelta(seconds=1)
        Client.objects.update(lease_expires_at=past)
        clients.sweep()

    await database_sync_to_async(later)()
    assert (await row()).state == I


# ── Streams with a client ──


class Page(EventStreamConsumer):
    """Everybody may see everything; ``arrival`` is the client."""

    def __init__(
        self, arrival: Arrival | None, *, topics: frozenset[str] | None = None, after: int | None = None
    ) -> None:
        super().__init__()
        self.grant = Grant(principal="test", interest=Interest(topics=topics), after=after, client=arrival)

    async def authorise(self, *, within: float = 0.0) -> Grant:
        return self.grant


@pytest.fixture
def opens(who: Caller) -> Callable[..., Request]:
    def make(page: str | None = "page-one", cid: str = CID, **more: Any) -> Request:
        arrival = None
        if page is not None:
            arrival = Arrival(caller=who, cid=cid, page=page, process=registry.current().process)
        return Request(Page(arrival, **more))

    return make


def names(request: Request) -> list[str]:
    return [event.name for event in request.events]


def logged(request: Request) -> list[Any]:
    """Its events of the log. (Frames without an id keep the last one: that is how the protocol has it.)"""
    return [event for event in request.events if "." in event.name]


def of(request: Request, name: str) -> Any:
    return next((event.json() for event in request.events if event.name == name), None)


async def test_B10_B12_welcome_is_the_first_frame_and_says_everything(
    opens: Callable[..., Request], settings: Any
) -> None:
    first = opens()
    await first.until(lambda: "ready" in names(first))
    assert names(first)[0] == "welcome"
    frame = of(first, "welcome")
    moment = dt.datetime.fromisoformat(frame.pop("server_time"))
    assert abs(moment - dt.datetime.now(dt.UTC)) < dt.timedelta(minutes=1)
    assert frame == {
        "connection_id": CID, "epoch": 1, "cid_accepted": True, "resumed": False,
        "heartbeat_seconds": settings.HEARTBEAT_SECONDS,
    }  # fmt: skip
    assert not first.events[0].id, "a control frame moves no cursor"
    await first.leave()
    other = opens(cid="CID-nonsense")
    await other.until(lambda: names(other))
    frame = of(other, "welcome")
    assert (frame["cid_accepted"], frame["reason"], frame["epoch"]) == (False, "malformed", 1)
    await other.leave()
    # Whoever ignores it is served all the same.
    deaf = opens(cid="CID-nonsense")
    await deaf.until(lambda: "ready" in names(deaf))
    (number,) = await asyncio.to_thread(write_and_leave, 1)
    await deaf.until(lambda: str(number) in [event.id for event in deaf.events])
    await deaf.leave()
    await nothing_left()


async def test_B12_welcome_comes_before_the_first_picture(who: Caller) -> None:
    class Pictured(Page):
        async def opening(self, grant: Grant) -> list[bytes]:
            return [b"event: picture\ndata: {}\n\n"]

    stream = Request(Pictured(Arrival(caller=who, cid=CID, page="page-one", process="here/1/1")))
    await stream.until(lambda: "ready" in names(stream))
    assert names(stream)[:2] == ["welcome", "picture"]
    await stream.leave()
    await nothing_left()


async def test_B11_B73_a_stream_without_an_id_is_served_and_nothing_of_it_is_kept(
    opens: Callable[..., Request],
) -> None:
    plain = opens(None)
    await plain.until(lambda: names(plain) == ["ready"])
    assert len(registry.current()) == 0
    assert registry.current()._tasks == []
    await plain.leave()
    assert await rows() == []
    assert await told("client.opened", "client.inactive") == []
    await nothing_left()


async def test_B14_B17_the_new_stream_gets_the_events_and_the_old_one_is_told_and_ended(
    opens: Callable[..., Request],
) -> None:
    old = opens()
    await old.until(lambda: "ready" in names(old))
    new = opens()
    await old.until(lambda: old.over)
    assert names(old)[-1] == "superseded"
    assert of(old, "superseded") == {"epoch": 2}
    await new.until(lambda: "ready" in names(new))
    count = len(old.sent)
    (number,) = await asyncio.to_thread(write_and_leave, 1)
    await new.until(lambda: str(number) in [event.id for event in new.events])
    assert len(old.sent) == count
    assert of(new, "welcome")["resumed"] is True
    # Its late end, as the server notices it now.
    await old.leave()
    await until(lambda: registry.current()._writing is None)
    assert (await row()).state == L
    assert consumers.streams().total == 1
    await new.leave()
    await nothing_left()
    assert ((await row()).state, (await row()).reason) == (I, "gone")


async def test_B27_a_page_that_was_replaced_is_answered_204_which_stops_it_for_good(
    opens: Callable[..., Request], quick: None
) -> None:
    old = opens("page-one")
    await old.until(lambda: "ready" in names(old))
    new = opens("page-two")
    await new.until(lambda: "ready" in names(new))
    assert [names(old)[index] for index in (0, -2, -1)] == ["welcome", "probe", "superseded"]
    assert of(old, "probe")["question"] is True
    await old.leave()
    back = opens("page-one")
    await back.until(lambda: back.over)
    start, body = back.sent[0], back.sent[1:]
    assert start["status"] == 204
    assert (b"Cache-Control", b"no-store") in start["headers"]
    assert b"".join(message.get("body", b"") for message in body) == b""
    await back.leave()
    assert not new.over
    await new.leave()
    await nothing_left()


async def test_B29_a_probe_comes_back_over_the_stream_behind_what_was_written_before(
    opens: Callable[..., Request], who: Caller
) -> None:
    stream = opens()
    await stream.until(lambda: "ready" in names(stream))
    (number,) = await asyncio.to_thread(write_and_leave, 1)
    await stream.until(lambda: stream.events[-1].id == str(number))
    probe = database_sync_to_async(clients.probe)
    for epoch in (0, 2):
        with pytest.raises(Unknown):
            await probe(caller=who, cid=CID, epoch=epoch, nonce="wrong")
    await probe(caller=who, cid=CID, epoch=1, nonce="n-1")
    await stream.until(lambda: of(stream, "probe"))
    at = names(stream).index("probe")
    assert stream.events[at].json() == {"nonce": "n-1"}
    assert int(stream.events[at].id) >= number, "it comes behind, and moves no cursor"
    assert names(stream).count("probe") == 1
    # Nobody else's stream says it.
    bystander = opens("page-two", cid=f"cid-{uuid.UUID(int=2)}", after=0)
    await bystander.until(lambda: "ready" in names(bystander))
    await probe(caller=who, cid=CID, epoch=1, nonce="n-2")
    await stream.until(lambda: {"nonce": "n-2"} in [event.json() for event in stream.events])
    assert "probe" not in names(bystander)
    assert not [name for name in names(bystander) if name.startswith("signal")]
    for request in (stream, bystander):
        await request.leave()
    await nothing_left()


async def test_B24_what_happens_in_the_grace_time_is_delivered_after_the_reconnect(
    opens: Callable[..., Request],
) -> None:
    tasks = frozenset({"tasks"})
    stream = opens(topics=tasks)
    await stream.until(lambda: "ready" in names(stream))
    (first,) = await asyncio.to_thread(write_and_leave, 1)
    await stream.until(lambda: stream.events[-1].id == str(first))
    await stream.leave()
    missed = await asyncio.to_thread(write_and_leave, 2, 3, 4)
    again = opens(topics=tasks, after=first)
    await again.until(lambda: "ready" in names(again))
    assert [int(event.id) for event in logged(again)] == missed
    assert of(again, "welcome")["resumed"] is True
    await again.leave()
    await nothing_left()


async def test_B26_after_switching_from_one_task_to_another_no_reconnect_brings_an_event_of_the_first(
    opens: Callable[..., Request],
) -> None:
    stream = opens(topics=frozenset({"task:t1"}))
    await stream.until(lambda: "ready" in names(stream))
    (cursor,) = await asyncio.to_thread(write_and_leave, 1)
    await stream.until(lambda: stream.events[-1].id == str(cursor))
    await stream.leave()
    expected: list[int] = []
    seen: list[tuple[str, int]] = []
    for _ in range(12):
        written = await asyncio.to_thread(write_and_leave, 1, 2, 1)
        again = opens(topics=frozenset({"task:t2"}), after=cursor)
        await again.until(lambda again=again: "ready" in names(again))
        later = await asyncio.to_thread(write_and_leave, 1, 2)
        await again.until(lambda again=again, later=later: again.events[-1].id == str(later[1]))
        expected += [written[1], later[1]]
        got = [(event.json()["id"], int(event.id)) for event in logged(again)]
        seen += got
        cursor = got[-1][1]
        await again.leave()
    assert {topic for topic, _ in seen} == {"t2"}
    assert [number for _, number in seen] == expected
    await nothing_left()


async def test_B28_a_stream_of_a_client_has_heartbeats(opens: Callable[..., Request], settings: Any) -> None:
    settings.HEARTBEAT_SECONDS = 0.1
    stream = opens()
    await stream.until(lambda: names(stream).count("heartbeat") >= 3)
    assert of(stream, "welcome")["heartbeat_seconds"] == 0.1
    await stream.leave()
    await nothing_left()


async def test_an_operator_ends_a_stream_with_the_reason_and_without_an_invitation(
    opens: Callable[..., Request],
) -> None:
    stream = opens()
    await stream.until(lambda: "ready" in names(stream))
    await until(registry.current()._following.is_set)
    pk = (await row()).pk
    await database_sync_to_async(clients.close)(pk=pk, reason="the shift\nis over", actor="op")
    await stream.until(lambda: stream.over)
    assert names(stream)[-1] == "end"
    assert stream.events[-1].json() == {
        "reason": "disconnected", "reconnect": False, "message": "the shift\nis over",
    }  # fmt: skip
    await stream.leave()
    await until(lambda: registry.current()._writing is None)
    assert ((await row()).state, (await row()).reason) == (C, "the shift\nis over")
    await nothing_left()


async def test_a_client_that_was_lost_is_asked_to_come_again(opens: Callable[..., Request]) -> None:
    stream = opens()
    await stream.until(lambda: "ready" in names(stream))
    (seat,) = registry.current()._seats.values()
    seat.stream.come_again()
    # Whatever else is said to it now, the first word stands.
    seat.stream.supersede(9)
    await stream.until(lambda: stream.over)
    assert stream.events[-1].json() == {"reason": "client_lost", "reconnect": True}
    await stream.leave()
    await nothing_left()


async def test_B41_an_orderly_stop_leaves_no_client_that_looks_live(opens: Callable[..., Request]) -> None:
    streams = [opens("page-one", f"cid-{uuid.UUID(int=number)}") for number in range(20)]
    for stream in streams:
        await stream.until(lambda stream=stream: "ready" in names(stream))
    await consumers.streams().drain()
    here = registry.current()
    assert (here._writing, here._departures) == (None, []), "it waited until everything was written"
    assert {(each.state, each.reason, each.lease_expires_at) for each in await rows()} == {
        (I, "shutdown", None)
    }
    for stream in streams:
        assert stream.events[-1].json() == {"reason": "shutdown", "reconnect": True}
        await stream.leave()
    await nothing_left()


async def test_a_database_that_does_not_answer_an_arrival_is_503_and_leaves_nothing(
    opens: Callable[..., Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaking(_: Any) -> Any:
        raise OperationalError("away")

    monkeypatch.setattr(clients, "connect", breaking)
    stream = opens()
    await stream.until(lambda: stream.over)
    assert stream.sent[0]["status"] == 503
    assert (b"Retry-After", b"2") in stream.sent[0]["headers"]
    assert json.loads(stream.sent[1]["body"])["code"] == "unavailable"
    await stream.leave()
    await nothing_left()


async def test_C06_streams_of_clients_that_come_and_go_leave_nothing(opens: Callable[..., Request]) -> None:
    for number in range(30):
        stream = opens()
        if number % 3:
            await stream.until(lambda stream=stream: "ready" in names(stream))
        await stream.leave()
    await nothing_left()
    here = registry.current()
    assert (len(here), here._by_name, here._departures, here._arrivals, here._tasks) == (0, {}, [], [], [])
    assert (await row()).state == I
