"""A process that lets verbs of clients race each other: ``python -m tests.live.racer --times 500 --storm 1500``.

It is configured by the environment like every other process (``DATABASE_URL``), and every thread has a database connection of its own, so to the
database they are processes. One after the other:

``reconnect``: a client whose time is over is swept, every third time by two, while it comes back; so often.
``takeover``: the same, while somebody else takes over what it was handling; every other time it comes back as well.
``purge``: a row that is purged just before it is locked, while another process comes for it; on PostgreSQL, where rows are locked one by one.
``storm``: six do at random everything that there is, so many words altogether.

After each the log is read, as a page would, and held against the rows and against what each caller was answered. Prints a line
``DONE <json>`` for each: how often what happened, and ``wrong``, a list of sentences. ``--no-clock``: asking this process for the time is a fault.
"""

# ruff: noqa: E402  (Django must be set up before the rest is imported)
from __future__ import annotations

import argparse
import dataclasses
import datetime as dt
import json
import os
import random
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable
from typing import Any

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "project.settings")

import django

django.setup()

from django.conf import settings
from django.contrib.auth.models import User
from django.db import connection, transaction
from django.utils import timezone

from events import clients, log
from events.clients import Arrival, Caller, Claimed, Unknown, Welcome
from events.models import Claim, Client, Event, Presence
from events.states import CLIENT_ARROWS, CLIENT_KEEPS, ClientState

PROCESS = "racer/1/1"
#: How far apart the racers start at most: about as long as what they do takes.
APART = 0.003


def caller(user: User) -> Caller:
    return Caller(owner_id=user.pk, binding=f"session:{user.username}", who=user.username)


def cid_of(number: int) -> str:
    return f"cid-{uuid.UUID(int=number)}"


# ── What the log says ──


@dataclasses.dataclass
class Known:
    """A client, as somebody knows it who read the log up to here."""

    state: ClientState = ClientState.EXPIRED
    epoch: int = 0
    version: int = 0


class Reader:
    """Knows the rows as they are; then reads the log from there. Whatever cannot be is a sentence in ``wrong``."""

    def __init__(self) -> None:
        self.wrong: list[str] = []
        self.clients = {
            row.cid: Known(ClientState(row.state), row.epoch, row.version) for row in Client.objects.all()
        }
        claims = Claim.objects.select_related("client")
        self.owners = {row.subject: row.client.cid if row.client else None for row in claims}
        self.versions = {row.subject: row.version for row in claims}
        #: (cid, epoch) → whether it went on with what it had. The epochs begin again when a row was purged, so the last one counts.
        self.opened: dict[tuple[str, int], bool] = {}
        self.taken: set[tuple[str, str, int]] = set()
        self.counts: Counter[str] = Counter()
        self._cursor = log.newest()

    def read(self) -> None:
        for event in log.read(self._cursor, 10**6):
            self.counts[event.name] += 1
            if event.name.startswith("client."):
                self._client(event)
            elif event.name.startswith("claim."):
                self._claim(event)

    def _client(self, event: Event) -> None:
        data, known = event.data, self.clients.setdefault(event.object_id, Known())
        state = ClientState(data["state"])
        where = f"#{event.pk} {event.name} {event.object_id} {known}"
        if data["version"] == 1 and known.state not in CLIENT_KEEPS:
            known.version = known.epoch = 0
        self._expect(data["version"] == known.version + 1, f"{where}: version {data['version']}")
        self._expect(state == known.state or state in CLIENT_ARROWS[known.state], f"{where}: to {state}")
        if event.name == "client.opened" and data["epoch"] != known.epoch:
            self._expect(data["epoch"] == known.epoch + 1, f"{where}: epoch {data['epoch']}")
            self.opened[event.object_id, data["epoch"]] = known.state in CLIENT_KEEPS
        else:
            self._expect(data["epoch"] == known.epoch, f"{where}: of epoch {data['epoch']}")
        if state not in CLIENT_KEEPS:
            held = [subject for subject, owner in self.owners.items() if owner == event.object_id]
            self._expect(not held, f"{where}: it still had {held}")
        known.state, known.epoch, known.version = state, data["epoch"], data["version"]

    def _claim(self, event: Event) -> None:
        data, subject = event.data, event.topic
        owner = self.owners.get(subject)
        where = f"#{event.pk} {event.name} {subject} of {owner}"
        self._expect(
            data["version"] == self.versions.get(subject, 0) + 1, f"{where}: version {data['version']}"
        )
        self.versions[subject] = data["version"]
        if event.name == "claim.updated":
            self._expect(data["client"] == owner, f"{where}: says {data['client']}")
            return
        self._expect(
            data.get("previous_client") == owner, f"{where}: says that {data.get('previous_client')} lost it"
        )
        self.owners[subject] = data["client"]
        if event.name == "claim.released":
            self._expect(
                owner is not None and data["client"] is None, f"{where}: released to {data['client']}"
            )
        else:
            taker = self.clients.get(data["client"], Known())
            self._expect(taker.state in CLIENT_KEEPS, f"{where}: taken by {taker}")
            self.taken.add((subject, data["client"], data["version"]))

    def _expect(self, condition: bool, sentence: str) -> None:
        if not condition:
            self.wrong.append(sentence)

    def hold_against_the_rows(self) -> None:
        rows = {row.cid: row for row in Client.objects.filter(epoch__gt=0)}
        for cid, known in self.clients.items():
            row = rows.get(cid)
            if row is None:
                self._expect(known.state not in CLIENT_KEEPS, f"{cid} has no row, and was told to be {known}")
            else:
                seen = Known(ClientState(row.state), row.epoch, row.version)
                self._expect(seen == known, f"{cid} is {seen}, and was told to be {known}")
        for claim in Claim.objects.select_related("client"):
            owner = claim.client.cid if claim.client else None
            told = self.owners.get(claim.subject)
            self._expect(owner == told, f"{claim.subject} is {owner}'s, and was told to be {told}'s")
            self._expect(
                claim.client is None or claim.client.keeps_claims,
                f"{claim.subject} is kept by {claim.client}",
            )
        for each in Presence.objects.select_related("client"):
            self._expect(each.client.keeps_claims, f"{each} is there, and its client is over")

    def hold_against_answers(self, welcomes: list[Welcome], taken: list[dict[str, Any]]) -> None:
        given = Counter((each.cid, each.epoch) for each in welcomes)
        for each in welcomes:
            name = (each.cid, each.epoch)
            if given[name] == 1:
                self._expect(
                    self.opened.get(name) is each.resumed, f"{name} was answered resumed={each.resumed}"
                )
        for claim in taken:
            name = (claim["subject"], claim["client"], claim["version"])
            self._expect(name in self.taken, f"{name} was answered, and never told")


# ── Races ──


class Handicap:
    """How much later the quicker one starts, so that it wins about every other race, however busy the machine is."""

    def __init__(self) -> None:
        self._seconds = APART

    def wait(self) -> None:
        # Not for anything to happen: this is the distance of the race itself.
        time.sleep(random.uniform(0, 2 * self._seconds))

    def won(self, won: bool) -> None:
        self._seconds = min(self._seconds * 1.2, 1.0) if won else max(self._seconds / 1.2, APART / 100)


class Race:
    """Everybody starts at about the same moment, again and again; each in a thread with a connection of its own."""

    def __init__(self, racers: list[Callable[[int], object]]) -> None:
        self.faults: list[str] = []
        self._racers = racers
        self._line = threading.Barrier(len(racers) + 1)
        self._number = 0
        self._threads = [
            threading.Thread(target=self._run, args=[racer, place], daemon=True)
            for place, racer in enumerate(racers)
        ]
        for thread in self._threads:
            thread.start()

    def _run(self, racer: Callable[[int], object], place: int) -> None:
        lots = random.Random(place)
        while True:
            self._line.wait()
            if self._number < 0:
                connection.close()
                return
            time.sleep(lots.uniform(0, APART))
            try:
                racer(self._number)
            except Exception as error:
                self.faults.append(f"{self._number}: {type(error).__name__} {error}")
            self._line.wait()

    def run(self, number: int) -> None:
        self._number = number
        self._line.wait(60)
        self._line.wait(60)

    def over(self) -> None:
        self._number = -1
        self._line.wait(60)
        for thread in self._threads:
            thread.join(20)


def _away_with_a_claim(who: Caller, times: int) -> list[Client]:
    """So many clients that are away, each with a claim of its own: ``task:<number>``."""
    now = clients.database_now()
    Client.objects.bulk_create(
        Client(
            owner_id=who.owner_id, cid=cid_of(number), binding=who.binding, who=who.who, page="page-one", epoch=1, version=2,
            state=ClientState.INACTIVE, expires_at=now + dt.timedelta(hours=1), last_seen_at=now, opened_at=now,
        )
        for number in range(times)
    )  # fmt: skip
    rows = {row.cid: row for row in Client.objects.filter(owner=who.owner_id)}
    made = [rows[cid_of(number)] for number in range(times)]
    Claim.objects.bulk_create(
        Claim(subject=f"task:{number}", audience=who.owner_id, client=row, taken_at=now, version=1)
        for number, row in enumerate(made)
    )
    return made


def one_sweeper(_: int) -> None:
    clients.sweep()


def now_and_then_another(number: int) -> None:
    if number % 3 == 0:
        clients.sweep()


def _is_due(row: Client) -> None:
    Client.objects.filter(pk=row.pk).update(expires_at=clients.database_now() - dt.timedelta(milliseconds=1))


def race_with_a_reconnect(people: list[Caller], times: int) -> dict[str, Any]:
    who = people[0]
    rows = _away_with_a_claim(who, times)
    reader = Reader()
    welcomes: list[Welcome] = []
    handicap = Handicap()

    def come_back(number: int) -> None:
        handicap.wait()
        (outcome,) = clients.connect(
            [Arrival(caller=who, cid=cid_of(number), page="page-one", process=PROCESS)]
        )
        assert isinstance(outcome, Welcome)
        handicap.won(outcome.resumed)
        welcomes.append(outcome)

    race = Race([one_sweeper, now_and_then_another, come_back])
    for number in range(times):
        _is_due(rows[number])
        race.run(number)
    race.over()
    reader.read()
    reader.hold_against_the_rows()
    reader.hold_against_answers(welcomes, [])
    wrong = race.faults + reader.wrong
    for each in welcomes:
        number = uuid.UUID(each.cid[4:]).int
        owner = reader.owners[f"task:{number}"]
        if (owner == each.cid) != each.resumed or reader.clients[each.cid].state != ClientState.LIVE:
            wrong.append(f"{number} was answered resumed={each.resumed}, and the claim is {owner}'s")
    resumed = sum(each.resumed for each in welcomes)
    if (
        reader.counts["claim.released"] != times - resumed
        or reader.counts["client.expired"] != times - resumed
    ):
        wrong.append(f"{times - resumed} began anew, and the log has {reader.counts}")
    return {"times": len(welcomes), "resumed": resumed, "anew": len(welcomes) - resumed, "wrong": wrong}


def race_with_a_takeover(people: list[Caller], times: int) -> dict[str, Any]:
    who, other = people[0], people[1]
    rows = _away_with_a_claim(who, times)
    reader = Reader()
    other_cid = cid_of(10**6)
    clients.connect([Arrival(caller=other, cid=other_cid, page="page-two", process=PROCESS)])
    welcomes: list[Welcome] = []
    pictures: list[dict[str, Any]] = []
    handicap = Handicap()

    def come_back(number: int) -> None:
        if number % 2:
            (outcome,) = clients.connect(
                [Arrival(caller=who, cid=cid_of(number), page="page-one", process=PROCESS)]
            )
            assert isinstance(outcome, Welcome)
            welcomes.append(outcome)

    def take_over(number: int) -> None:
        handicap.wait()
        words: dict[str, Any] = {"caller": other, "cid": other_cid, "audience": who.owner_id}
        picture = clients.take(**words, subject=f"task:{number}", takeover=True)
        # Taken from its owner; after an expiry it would be the third change.
        handicap.won(picture["version"] == 2)
        pictures.append(picture)

    race = Race([one_sweeper, now_and_then_another, take_over, come_back])
    for number in range(times):
        _is_due(rows[number])
        race.run(number)
    race.over()
    reader.read()
    reader.hold_against_the_rows()
    reader.hold_against_answers(welcomes, pictures)
    wrong = race.faults + reader.wrong
    first = 0
    for number in range(times):
        subject = f"task:{number}"
        if reader.owners[subject] != other_cid:
            wrong.append(f"{subject} is {reader.owners[subject]}'s, who did not take it over")
        # Taken, and then either taken over or released and taken: whoever lost it was told once.
        first += reader.versions[subject] == 2
        if reader.versions[subject] not in (2, 3):
            wrong.append(f"{subject} changed {reader.versions[subject]} times")
    return {"times": len(pictures), "taken over": first, "expired before": times - first, "wrong": wrong}


class Purge:
    """Two clients come back together, and one of them is purged between the look and the lock. Before its row is made again, another process
    comes for the same two: neither may hold what the other one waits for.

    It is a wrapper of the statements of this thread's connection (``execute_wrapper``), so that each of the others has its turn at one statement.
    """

    def __init__(self, who: Caller, number: int) -> None:
        self.cids = [cid_of(2 * number), cid_of(2 * number + 1)]
        self.welcomes: list[Welcome] = []
        self.faults: list[str] = []
        #: Whether the other one had to wait for this one.
        self.waited = False
        self._who = who
        self._steps = [self._purge, self._another_comes]
        self._others: list[threading.Thread] = []
        self._pid = 0
        now = clients.database_now()
        Client.objects.bulk_create(
            Client(
                owner_id=self._who.owner_id, cid=cid, binding=self._who.binding, who=self._who.who, page="page-one", epoch=1, version=2,
                state=ClientState.EXPIRED, last_seen_at=now - age,
            )
            for cid, age in zip(self.cids, (dt.timedelta(), 2 * clients.KEPT), strict=True)
        )  # fmt: skip

    def run(self) -> None:
        with connection.execute_wrapper(self):
            self._say_faults(lambda: self._come("page-two"))
        for other in self._others:
            other.join(60)

    def __call__(self, execute: Any, sql: str, params: Any, many: bool, context: Any) -> Any:
        if len(self._steps) == 1 or (self._steps and "FOR UPDATE" in sql):
            self._steps.pop(0)()
        return execute(sql, params, many, context)

    def _purge(self) -> None:
        self._start(clients.sweep).join(60)

    def _another_comes(self) -> None:
        """Goes on when it is done, or waits."""
        other = self._start(lambda: self._come("page-three"))
        with connection.cursor() as cursor:
            while other.is_alive() and not self.waited:
                other.join(0.005)
                cursor.execute("SELECT cardinality(pg_blocking_pids(%s))", [self._pid])
                self.waited = bool(cursor.fetchone()[0])

    def _start(self, work: Callable[[], object]) -> threading.Thread:
        def run() -> None:
            with connection.cursor() as cursor:
                cursor.execute("SELECT pg_backend_pid()")
                (self._pid,) = cursor.fetchone()
            self._say_faults(work)
            connection.close()

        self._others.append(threading.Thread(target=run, daemon=True))
        self._others[-1].start()
        return self._others[-1]

    def _come(self, page: str) -> None:
        both = [Arrival(caller=self._who, cid=cid, page=page, process=PROCESS) for cid in self.cids]
        self.welcomes += [each for each in clients.connect(both) if isinstance(each, Welcome)]

    def _say_faults(self, work: Callable[[], object]) -> None:
        try:
            work()
        except Exception as error:
            self.faults.append(f"{type(error).__name__} {error}")


def race_with_a_purge(people: list[Caller], times: int) -> dict[str, Any]:
    races = [Purge(people[0], number) for number in range(times)]
    reader = Reader()
    for race in races:
        race.run()
    reader.read()
    reader.hold_against_the_rows()
    # A row that was made anew begins at its first epoch; the other one had an epoch already.
    epochs = Counter((each.cid == race.cids[1], each.epoch) for race in races for each in race.welcomes)
    return {
        "times": times,
        "made anew": epochs[True, 1],
        "went on": epochs[False, 2],
        "waited": sum(race.waited for race in races),
        "wrong": [fault for race in races for fault in race.faults] + reader.wrong,
    }


# ── Everything at once ──


class Somebody:
    """A thread that does at random whatever a process or a page can do, with what it knows, which is mostly outdated."""

    def __init__(self, number: int, people: list[Caller], clients_count: int, subjects: int) -> None:
        self.lots = random.Random(number)
        self.people = people
        self.process = f"racer/{number}/1"
        self.cids = clients_count
        self.subjects = subjects
        self.welcomes: list[Welcome] = []
        self.pictures: list[dict[str, Any]] = []
        self.done: Counter[str] = Counter()
        self.faults: list[str] = []

    def run(self, count: int) -> None:
        words = {"connect": 6, "disconnect": 4, "suspend": 2, "probe": 1, "renew": 2, "sweep": 3, "take": 5, "let_go": 2, "be_present": 2, "close": 1, "finish": 1}  # fmt: skip
        try:
            for _ in range(count):
                (word,) = self.lots.choices(list(words), list(words.values()))
                try:
                    getattr(self, word)()
                    self.done[word] += 1
                except (Unknown, Claimed) as error:
                    self.done[type(error).__name__] += 1
                except Exception as error:
                    self.faults.append(f"{word}: {type(error).__name__} {error}")
        finally:
            connection.close()

    def _client(self) -> dict[str, Any]:
        number = self.lots.randrange(self.cids)
        return {"caller": self.people[number % len(self.people)], "cid": cid_of(number)}

    def _subject(self) -> str:
        return f"task:{self.lots.randrange(self.subjects)}"

    def _known(self) -> Welcome | None:
        recent = self.welcomes[-20:]
        return self.lots.choice(recent) if recent else None

    def connect(self) -> None:
        arrivals = [
            Arrival(
                **self._client(), process=self.process, page=f"page-{self.lots.randrange(12):08}",
                unanswered=self.lots.choice([None, known.epoch if (known := self._known()) else None]),
            )
            for _ in range(self.lots.choice((1, 1, 3)))
        ]  # fmt: skip
        self.welcomes += [each for each in clients.connect(arrivals) if isinstance(each, Welcome)]

    def disconnect(self) -> None:
        leaving = [known for _ in range(self.lots.choice((1, 3))) if (known := self._known())]
        clients.disconnect([(each.pk, each.epoch, "gone") for each in leaving])

    def suspend(self) -> None:
        known = self._known()
        clients.suspend(**self._client(), epoch=known.epoch if known else 1)

    def probe(self) -> None:
        known = self._known()
        clients.probe(**self._client(), epoch=known.epoch if known else 1, nonce="n")

    def renew(self) -> None:
        held = {each.pk: each.epoch for each in self.welcomes[-10:]}
        clients.renew(self.process, held, cursors=dict.fromkeys(held, 1))

    def sweep(self) -> None:
        clients.sweep(self.lots.choice((1, 5, 200)))

    def take(self) -> None:
        words = self._client()
        picture = clients.take(
            **words, subject=self._subject(), audience=1, takeover=self.lots.random() < 0.5
        )
        if picture["client"] != words["cid"]:
            self.faults.append(f"{words['cid']} took, and was shown {picture}")

    def let_go(self) -> None:
        clients.let_go(**self._client(), subject=self._subject())

    def be_present(self) -> None:
        doing = self.lots.choice(("looking", "typing", ""))
        clients.be_present(**self._client(), subject=self._subject(), audience=1, doing=doing)

    def close(self) -> None:
        if known := self._known():
            clients.close(pk=known.pk, reason="the storm", actor="storm")

    def finish(self) -> None:
        with transaction.atomic():
            clients.finish(self._subject(), actor="storm")


def storm(people: list[Caller], words: int) -> dict[str, Any]:
    settings.CLIENT_GRACE_SECONDS = settings.CLIENT_SUSPENDED_SECONDS = 0.03
    settings.CLIENT_LEASE_SECONDS = 0.05
    clients.PRESENCE = dt.timedelta(seconds=0.03)
    clients.KEPT = dt.timedelta(seconds=0.3)
    reader = Reader()
    crowd = [Somebody(number, people, 8, 4) for number in range(6)]
    threads = [threading.Thread(target=each.run, args=[words // len(crowd)], daemon=True) for each in crowd]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    reader.read()
    reader.hold_against_the_rows()
    # Epochs begin again where a row was purged: then an answer cannot be told from another one.
    done = sum((each.done for each in crowd), Counter())
    wrong = [fault for each in crowd for fault in each.faults] + reader.wrong
    return {"times": sum(done.values()), **done, **reader.counts, "wrong": wrong}


class NoClock:
    """Stands for ``django.utils.timezone``."""

    is_aware = staticmethod(timezone.is_aware)

    def now(self) -> dt.datetime:
        raise AssertionError("this process was asked for the time")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--times", type=int, required=True)
    parser.add_argument("--storm", type=int, required=True)
    parser.add_argument("--no-clock", action="store_true")
    options = parser.parse_args()
    if options.no_clock:
        clients.timezone = NoClock()  # type: ignore[assignment]
    settings.CLIENT_LEASE_SECONDS = 600
    people = [caller(user) for user in User.objects.order_by("pk")]
    for name, work in (
        ("reconnect", lambda: race_with_a_reconnect(people, options.times)),
        ("takeover", lambda: race_with_a_takeover(people, options.times)),
        ("purge", lambda: race_with_a_purge(people, max(1, options.times // 25))),
        ("storm", lambda: storm(people, options.storm)),
    ):
        if name == "purge" and connection.vendor != "postgresql":
            continue
        for model in (Presence, Claim, Client, Event):
            model.objects.all().delete()
        began = time.monotonic()
        done = work()
        done["wrong"] = done["wrong"][:20]
        print(
            "DONE",
            json.dumps({"race": name, **done, "seconds": round(time.monotonic() - began, 2)}),
            flush=True,
        )


if __name__ == "__main__":
    main()
