"""Clients that come back, and what they have claimed. The only writer of Client, Claim and Presence.

Every write is conditional on (client, epoch): a close, a lease, a timer of a stream that has been replaced matches no row, and that is an
answer and not an error. Time is the database's. Locks are taken in one order: that of newcomers, clients by their key, claims, the log.

What happens between a drop and its end (spec/behaviours.md, "The stable id"): the server that lost the stream makes the client
*inactive*; a server that died lets its leases run out, which is found by :func:`sweep`. After the grace time the claims are released, in
the transaction in which the client expires.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import logging
import os
import re
import secrets
import socket
import uuid
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from django.conf import settings
from django.db import connection, transaction
from django.db.models import Count, F, Q, QuerySet
from django.utils import timezone

from events import log, metrics
from events.envelope import SIGNALS, Change, topic_of
from events.models import Claim, Client, Event, Presence
from events.signals import status_changed
from events.states import CLIENT_ARROWS, ClientState

logger = logging.getLogger(__name__)
Json = dict[str, Any]

_CID = re.compile(r"cid-[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
_PAGE = re.compile(r"[A-Za-z0-9_-]{8,64}")
_SUBJECT = re.compile(r"(connection|task):[A-Za-z0-9_-]{1,80}")

#: Pages that are remembered as superseded, per client.
FORMER_PAGES = 10
#: Clients that are over are kept for so long, so that their id stays bound to their session or key.
KEPT = dt.timedelta(hours=1)
#: "is looking", "is typing": the page renews it.
PRESENCE = dt.timedelta(seconds=30)
#: Why a client is inactive without anybody having ended its stream: nobody renewed its lease.
LAPSED = ("its server process ended", "its lease ran out")
#: Clients of one owner, those that are over included: a loop that makes up ids must not fill the table and the log.
PER_OWNER = 500
#: So often arrivals begin anew because of what others delete meanwhile: a bound, for each turn needs another deletion at just that moment.
TURNS = 20
#: Rows that one sweep deals with at a time.
LIMIT = 200
#: A lag is counted up to here.
MAX_LAG = 1000
#: What the position of a stream may be older than the moment that it was written down.
LAG_GRACE = dt.timedelta(seconds=1)
#: Any fixed number, and another one than that of the log: see :func:`_lock_newcomers`.
NEWCOMERS_LOCK = 0x5B_10_61


class Unknown(Exception):
    """The caller has no such client, or it is over. It heals by connecting again."""


class Claimed(Exception):
    """Somebody else is handling it. ``claim`` is the present picture."""

    def __init__(self, claim: Json) -> None:
        super().__init__(claim["user"])
        self.claim = claim


class _Purged(Exception):
    """A row went between the look and the lock."""


class _Crowded(Exception):
    """These owners have as many clients as there may be; some that are over may go."""

    def __init__(self, owners: Set[int]) -> None:
        super().__init__(owners)
        self.owners = owners


@dataclasses.dataclass(frozen=True, kw_only=True)
class Caller:
    """Who comes with a cid. ``binding``: the session or key (never the secret itself); ``who``: how pages name it."""

    owner_id: int
    binding: str
    who: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arrival:
    """A stream that wants to be the stream of a client. ``page``: nonce of the page, made when it was loaded."""

    caller: Caller
    cid: str
    page: str
    process: str
    user_agent: str = ""
    address: str = ""
    path: str = ""
    watches: tuple[str, ...] = ()
    cursor: int | None = None
    #: The epoch whose page was asked and did not answer: it may be taken over.
    unanswered: int | None = None
    #: The page was asked and answered: a client of its own for this one.
    in_use: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Welcome:
    """The stream is the stream of this client. ``pk`` and ``epoch`` are its proof for everything later.

    ``told``: the event of the log that says so. What stands before it is of earlier streams, or of an earlier client of this id, whose epochs were
    higher.
    """

    pk: int
    owner_id: int
    cid: str
    epoch: int
    accepted: bool
    reason: str
    resumed: bool
    told: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """Another page has a live stream with this id: is it still there? To be asked with :func:`ask`."""

    owner_id: int
    cid: str
    epoch: int
    nonce: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Replaced:
    """This page lost the client to another one, and was told. It shall not come back."""

    epoch: int
    #: An operator sent it away, with this reason; None: another page has it.
    dismissed: str | None = None


@dataclasses.dataclass(frozen=True)
class Full:
    """The owner has as many clients as there may be, and none of them is over."""


Outcome = Welcome | Question | Replaced | Full


# ── Names and time ──


def normal_cid(text: str) -> str:
    """The one spelling of a client id: ``cid-`` and a UUID of any version, in lower case (rows B04, B05).

    :raises ValueError: it is no such id.
    """
    cid = text.lower()
    if not text.isascii() or not _CID.fullmatch(cid):
        raise ValueError("A client id is cid- followed by a UUID.")
    return cid


def normal_page(text: str) -> str:
    """The nonce of a page: 8 to 64 letters, digits, ``-`` and ``_``.

    :raises ValueError: otherwise.
    """
    if not _PAGE.fullmatch(text):
        raise ValueError("A page nonce is 8 to 64 letters, digits, - and _.")
    return text


def normal_subject(text: str) -> str:
    """What can be claimed: ``connection:<id>`` or ``task:<id>``.

    :raises ValueError: otherwise.
    """
    if not _SUBJECT.fullmatch(text):
        raise ValueError("A subject is connection:<id> or task:<id>.")
    return text


def new_cid() -> str:
    return f"cid-{uuid.uuid4()}"


def process_name() -> str:
    """Tells a server process from every other one, also from one that had its number before."""
    return f"{socket.gethostname()[:60]}/{os.getpid()}/{_started(os.getpid())}"


def _started(pid: int) -> str:
    """When a process began, in ticks since boot; empty where the system does not say (``/proc``, Linux)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    return stat.rpartition(")")[2].split()[19]


def is_gone(process: str) -> bool:
    """Whether a process of this machine is surely over. Of other machines nothing is known: their leases run out."""
    host, _, rest = process.partition("/")
    pid, _, started = rest.partition("/")
    if host != socket.gethostname()[:60] or not pid.isdigit():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return _started(int(pid)) != started


def database_now() -> dt.datetime:
    """The database's clock: several servers have several clocks of their own."""
    if connection.vendor != "postgresql":
        # SQLite runs in this process, and knows no other clock.
        return timezone.now()
    with connection.cursor() as cursor:
        cursor.execute("SELECT statement_timestamp()")
        (now,) = cursor.fetchone()
    return now if timezone.is_aware(now) else now.replace(tzinfo=dt.UTC)


def _seconds(setting: int) -> dt.timedelta:
    return dt.timedelta(seconds=setting)


# ── Pictures ──


def _text(moment: dt.datetime | None) -> str | None:
    if moment is None:
        return None
    return moment.astimezone(dt.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def picture(row: Client) -> Json:
    """A client as JSON, for API, events and pages."""
    return {
        "id": row.cid,
        "user": row.who,
        "state": row.state,
        "reason": row.reason or None,
        "epoch": row.epoch,
        "path": row.path or None,
        "watches": list(row.watches),
        "user_agent": row.user_agent or None,
        "address": row.address or None,
        "cursor": row.cursor,
        "sent_cursor": row.sent_cursor,
        "opened_at": _text(row.opened_at),
        "connected_at": _text(row.connected_at),
        "last_seen_at": _text(row.last_seen_at),
        "expires_at": _text(row.expires_at),
        "version": row.version,
    }


def claim_picture(row: Claim) -> Json:
    """Who is at a subject: the one who handles it, and everybody who looks or types."""
    people = [
        {"client": each.client.cid, "user": each.client.who, "doing": each.doing}
        for each in sorted(row.people.all(), key=lambda each: each.pk)
        if each.client_id != row.client_id or each.doing == Presence.TYPING
    ]
    return {
        "id": row.subject,
        "subject": row.subject,
        "client": row.client.cid if row.client else None,
        "user": row.client.who if row.client else None,
        "taken_at": _text(row.taken_at),
        "people": people,
        "version": row.version,
    }


def claims_of(subjects: Iterable[str]) -> dict[str, Json]:
    """The pictures of these subjects, as far as anybody was ever there."""
    rows = Claim.objects.filter(subject__in=list(subjects)).select_related("client")
    rows = rows.prefetch_related("people__client")
    return {row.subject: claim_picture(row) for row in rows}


# ── Writing: the two places where rows change ──


_COLUMNS: dict[str, Any] = {column.name: column for column in Client._meta.concrete_fields}


def _check_arrow(row: Client, state: ClientState) -> None:
    present = ClientState(row.state)
    if state != present and state not in CLIENT_ARROWS[present]:
        raise RuntimeError(f"a client does not go from {present} to {state}")


def _change(row: Client, name: str, *, actor: str, now: dt.datetime) -> Change:
    return Change(
        name=name,
        topic=topic_of("client", row.cid),
        audience=row.owner_id,
        object_id=row.cid,
        version=row.version,
        at=now,
        actor=actor,
        data={**picture(row), "at": _text(now)},
    )


def _move(row: Client, state: ClientState, *, now: dt.datetime, tell: str, actor: str, **fields: Any) -> bool:
    """One conditional UPDATE on (client, epoch), and its event. False: the stream was replaced, nothing changed."""
    _check_arrow(row, state)
    changed = Client.objects.filter(pk=row.pk, epoch=row.epoch, version=row.version).update(
        state=state, version=row.version + 1, **fields
    )
    if not changed:
        metrics.STALE.labels(tell).inc()
        return False
    row.state, row.version = state, row.version + 1
    for name, value in fields.items():
        setattr(row, name, value)
    metrics.CLIENTS.labels(tell.partition(".")[2]).inc()
    status_changed.send(Client, changes=[_change(row, tell, actor=actor, now=now)])
    return True


class _Batch:
    """Moves of rows that are locked here, written together: a thousand clients that come back at once are a few statements.

    Each is still an UPDATE that is conditional on (client, epoch, version). The rows are changed in memory at once, so that a client that comes
    twice is met as the first one left it.
    """

    def __init__(self, now: dt.datetime) -> None:
        self.now = now
        #: By the columns that they change.
        self._updates: dict[tuple[str, ...], list[list[Any]]] = {}
        self._moved: set[int] = set()
        self._newest: int | None = None
        self._changes: list[Change] = []

    def move(self, row: Client, state: ClientState, *, tell: str, actor: str, **fields: Any) -> None:
        _check_arrow(row, state)
        if row.pk in self._moved:
            self._update()
        self._moved.add(row.pk)
        seen = [row.pk, row.epoch, row.version]
        # What stays as it is need not be written: of a client that comes back that is most of it.
        changed = {name: value for name, value in fields.items() if getattr(row, name) != value}
        changed |= {"state": state, "version": row.version + 1}
        for name, value in changed.items():
            setattr(row, name, value)
        values = [_COLUMNS[name].get_db_prep_save(value, connection) for name, value in changed.items()]
        self._updates.setdefault(tuple(changed), []).append([*values, *seen])
        self._changes.append(_change(row, tell, actor=actor, now=self.now))

    def believed(self, cursor: int | None) -> int | None:
        """What a client says to have applied; None when the log is not there yet."""
        if cursor is None:
            return None
        if self._newest is None:
            self._newest = log.newest()
        return cursor if cursor <= self._newest else None

    def write(self) -> int:
        """All that was moved; how many. The last thing of a transaction.

        :raises RuntimeError: somebody changed a row that is locked here.
        """
        if not self._changes:
            return 0
        self._update()
        for change in self._changes:
            metrics.CLIENTS.labels(change.name.partition(".")[2]).inc()
        status_changed.send(Client, changes=self._changes)
        return len(self._changes)

    def _update(self) -> None:
        quote = connection.ops.quote_name
        with connection.cursor() as cursor:
            for names, rows in self._updates.items():
                columns = ", ".join(f"{quote(_COLUMNS[name].column)} = %s" for name in names)
                where = "id = %s AND epoch = %s AND version = %s"
                # Names of our own columns; values are parameters.
                cursor.executemany(
                    f"UPDATE {quote(Client._meta.db_table)} SET {columns} WHERE {where}",  # noqa: S608
                    rows,
                )
                if cursor.rowcount != len(rows):
                    raise RuntimeError("a locked client was changed by somebody else")
        self._updates = {}
        self._moved = set()


def _tell_claim(name: str, row: Claim, *, actor: str, reason: str, now: dt.datetime, **more: Any) -> None:
    row.version = F("version") + 1  # type: ignore[assignment]
    row.save(update_fields=["version", "client", "taken_at"])
    row.refresh_from_db()
    data = {**claim_picture(row), "reason": reason, "at": _text(now), **more}
    status_changed.send(
        Claim,
        changes=[
            Change(
                name=name,
                topic=row.subject,
                audience=row.audience,
                object_id=row.subject,
                version=row.version,
                at=now,
                actor=actor,
                data=data,
            )
        ],
    )


def _locked(rows: Any) -> list[Client]:
    return list(rows.select_for_update().order_by("pk"))


# ── Streams come ──


def connect(arrivals: Sequence[Arrival]) -> list[Outcome]:
    """Make each stream the stream of its client, in one transaction: a thousand that come back at once are a few.

    Same page, or no live stream: the client goes on under the next epoch. Another page, and a live stream: a :class:`Question`.
    An id that cannot be had is answered with another one.
    """
    wanted = [_normal(arrival) for arrival in arrivals]
    crowded: set[int] = set()
    for _ in range(TURNS):
        try:
            with transaction.atomic():
                return _connect(arrivals, wanted, crowded)
        except _Crowded as error:
            # In a transaction of its own: who has deleted rows must not wait for others.
            for owner_id in error.owners:
                _make_room(owner_id, len(arrivals), spare={cid for cid in wanted if cid})
            crowded |= error.owners
        except _Purged:
            # Its locks are given back first: a row is never made behind rows that are locked.
            continue
    raise RuntimeError(f"clients went {TURNS} times between the look and the lock")


def _connect(arrivals: Sequence[Arrival], wanted: Sequence[str | None], crowded: Set[int]) -> list[Outcome]:
    """One turn. ``crowded``: the owners for whom room was made already.

    :raises _Crowded: there is no room for one of the others.
    :raises _Purged: a row went, or became another session's, since it was looked at.
    """
    batch = _Batch(database_now())
    names = [(arrival.caller.owner_id, cid or "") for arrival, cid in zip(arrivals, wanted, strict=True)]
    # Every one of these owners with every one of these ids: a hundred pairs would be a query that costs more to write than to answer.
    rows = Client.objects.filter(
        owner__in={owner_id for owner_id, _ in names}, cid__in={cid for cid in wanted if cid}
    )
    newcomers = _newcomers(arrivals, names, rows)
    if newcomers:
        _lock_newcomers()
        newcomers = _newcomers(arrivals, names, rows)
    refused = _refused([(place, names[place][0]) for place in newcomers])
    if without := {names[place][0] for place in refused} - crowded:
        raise _Crowded(without)
    Client.objects.bulk_create(
        Client(owner_id=names[place][0], cid=names[place][1], binding=arrivals[place].caller.binding)
        for place, reason in newcomers.items()
        if not reason and place not in refused
    )
    roomless = {names[place] for place in refused if not newcomers[place]}
    found = {(row.owner_id, row.cid): row for row in _locked(rows)}
    outcomes: list[Outcome] = []
    for place, arrival in enumerate(arrivals):
        if place in refused or names[place] in roomless:
            outcomes.append(Full())
        elif reason := newcomers.get(place):
            outcomes.append(_another(arrival, reason, batch))
        else:
            row = found.get(names[place])
            if row is None or row.binding != arrival.caller.binding:
                raise _Purged
            outcomes.append(_arrive(arrival, row, batch))
    if not batch.write():
        return outcomes
    # Nobody else tells before this transaction has ended.
    told = log.newest()
    return [
        dataclasses.replace(outcome, told=told) if isinstance(outcome, Welcome) else outcome
        for outcome in outcomes
    ]


def _newcomers(
    arrivals: Sequence[Arrival], names: Sequence[tuple[int, str]], rows: QuerySet[Client]
) -> dict[int, str]:
    """The places of those that need a row which does not exist: "" for an id that is new, or why they cannot have the one that they brought."""
    bindings = {
        (owner_id, cid): binding for owner_id, cid, binding in rows.values_list("owner_id", "cid", "binding")
    }
    needed: dict[int, str] = {}
    for place, (arrival, name) in enumerate(zip(arrivals, names, strict=True)):
        binding = arrival.caller.binding
        if not name[1]:
            needed[place] = "malformed"
        elif bindings.get(name, binding) != binding:
            # Rows B08, B09: also while it only waits for its end.
            needed[place] = "other_session"
        elif arrival.in_use:
            needed[place] = "in_use"
        elif name not in bindings:
            # Of several that bring one new id the first one makes it, and is its session.
            needed[place] = ""
            bindings[name] = binding
    return needed


def _refused(newcomers: Sequence[tuple[int, int]]) -> set[int]:
    """Of these (place, owner) the places for which there is no room. First come, first served."""
    if not newcomers:
        return set()
    owned = Client.objects.filter(owner__in={owner_id for _, owner_id in newcomers}).order_by()
    counts = Counter(dict(owned.values_list("owner_id").annotate(Count("pk"))))
    refused = set()
    for place, owner_id in newcomers:
        if counts[owner_id] < PER_OWNER:
            counts[owner_id] += 1
        else:
            refused.add(place)
    return refused


def _normal(arrival: Arrival) -> str | None:
    try:
        return normal_cid(arrival.cid)
    except ValueError:
        return None


def _lock_newcomers() -> None:
    """One transaction at a time counts and makes rows, and this lock is the first one that it takes.

    On PostgreSQL an INSERT waits for whoever has inserted the same id and not committed yet. Two that did so, each with rows locked that the
    other one wants next, would wait in a circle. SQLite has one writer.
    """
    if connection.vendor == "postgresql":
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_advisory_xact_lock(%s)", [NEWCOMERS_LOCK])


def _make_room(owner_id: int, count: int, *, spare: Set[str]) -> None:
    """The owner's clients that are over go, the oldest first: ``count``, or some more at once. Not those that are just coming back."""
    with transaction.atomic():
        over = Client.objects.filter(owner=owner_id, state__in=[ClientState.EXPIRED, ClientState.CLOSED])
        oldest = over.exclude(cid__in=spare).order_by("last_seen_at")
        pks = list(oldest.values_list("pk", flat=True)[: max(count, PER_OWNER // 10)])
        rows = over.filter(pk__in=pks)
        if connection.features.has_select_for_update_skip_locked:
            # Somebody else's arrival may have one of them: it is not waited for.
            rows = rows.select_for_update(skip_locked=True)
        Client.objects.filter(pk__in=[row.pk for row in rows]).delete()


def _newer(said: int | None, known: int | None) -> int | None:
    return known if said is None else said if known is None else max(said, known)


def _arrive(arrival: Arrival, row: Client, batch: _Batch) -> Outcome:
    if row.state == ClientState.CLOSED and arrival.page == row.page:
        # An operator sent this page away. Loading it again is another page.
        return Replaced(epoch=row.epoch, dismissed=row.reason)
    if arrival.page != row.page:
        if arrival.page in row.former_pages:
            return Replaced(epoch=row.epoch)
        # Also a page in the background, as long as its stream is open: it can answer.
        if seems_live(row, batch.now) and arrival.unanswered != row.epoch:
            nonce = secrets.token_urlsafe(12)
            return Question(owner_id=row.owner_id, cid=row.cid, epoch=row.epoch, nonce=nonce)
    return _begin(arrival, row, batch, accepted=True, reason="")


def _another(arrival: Arrival, reason: str, batch: _Batch) -> Welcome:
    metrics.CLIENTS_REFUSED.labels(reason).inc()
    row = Client.objects.create(
        owner_id=arrival.caller.owner_id, cid=new_cid(), binding=arrival.caller.binding
    )
    logger.info(
        "%s brought the client id %.60r, which it cannot have (%s); it was given %s",
        arrival.caller.who, arrival.cid, reason, row.cid,
    )  # fmt: skip
    return _begin(arrival, row, batch, accepted=False, reason=reason)


def _begin(arrival: Arrival, row: Client, batch: _Batch, *, accepted: bool, reason: str) -> Welcome:
    resumed = row.keeps_claims
    former = row.former_pages
    if row.page and row.page != arrival.page:
        former = [row.page, *(page for page in former if page != row.page)][:FORMER_PAGES]
    now, epoch = batch.now, row.epoch + 1
    # Conditional on the old epoch, which no other stream has any more after it.
    batch.move(
        row,
        ClientState.LIVE,
        tell="client.opened",
        actor=arrival.caller.who,
        epoch=epoch,
        who=arrival.caller.who[:200],
        page=arrival.page,
        former_pages=former,
        process=arrival.process,
        lease_expires_at=now + _seconds(settings.CLIENT_LEASE_SECONDS),
        expires_at=None,
        user_agent=arrival.user_agent[:300],
        address=arrival.address[:64],
        path=arrival.path[:300],
        watches=list(arrival.watches),
        cursor=_newer(batch.believed(arrival.cursor), row.cursor),
        opened_at=row.opened_at if resumed else now,
        connected_at=now,
        last_seen_at=now,
        reason="",
    )
    if resumed:
        metrics.CLIENTS.labels("resumed").inc()
    return Welcome(
        pk=row.pk,
        owner_id=row.owner_id,
        cid=row.cid,
        epoch=epoch,
        accepted=accepted,
        reason=reason,
        resumed=resumed,
    )


# ── Between processes ──


def _signal(name: str, *, owner_id: int, cid: str, data: Mapping[str, Any]) -> None:
    """Through the log, because it reaches every process, with and without Redis, and a lost one would be taken for silence."""
    with transaction.atomic():
        now = database_now()
        topic = topic_of(SIGNALS.removesuffix("s"), cid)
        change = Change(
            name=name, topic=topic, audience=owner_id, object_id=cid, version=0, at=now, actor="", data=data
        )
        log.append(change)


def ask(question: Question) -> None:
    """Ask the page that has the live stream, wherever that is, whether it is still there."""
    data = {"epoch": question.epoch, "nonce": question.nonce}
    _signal("signal.question", owner_id=question.owner_id, cid=question.cid, data=data)


def answer(*, caller: Caller, cid: str, nonce: str) -> None:
    """The page that was asked is there. An answer that nobody waits for changes nothing."""
    row = find(owner_id=caller.owner_id, binding=caller.binding, cid=cid)
    if row is not None:
        _signal("signal.answer", owner_id=row.owner_id, cid=row.cid, data={"nonce": nonce})


def probe(*, caller: Caller, cid: str, epoch: int, nonce: str, cursor: int | None = None) -> None:
    """Send a nonce back over the client's stream (row B29); a page in the background is in the foreground again.

    :raises Unknown: this epoch has no live stream.
    """
    with transaction.atomic():
        now = database_now()
        row = _own(caller, cid)
        alive = row.lease_expires_at is not None and row.lease_expires_at > now
        if row.epoch != epoch or not alive or row.state not in (ClientState.LIVE, ClientState.SUSPENDED):
            raise Unknown(cid)
        if row.state == ClientState.SUSPENDED:
            _move(
                row, ClientState.LIVE, now=now, tell="client.opened", actor=caller.who,
                expires_at=None, last_seen_at=now, reason="",
            )  # fmt: skip
        _seen(row, now, cursor)
        _signal("signal.probe", owner_id=row.owner_id, cid=row.cid, data={"epoch": row.epoch, "nonce": nonce})


def _seen(row: Client, now: dt.datetime, cursor: int | None) -> None:
    """A sign of life, and what was applied. No event: nothing changed that anybody waits for."""
    fields: Json = {"last_seen_at": now}
    if cursor is not None and (row.cursor or 0) < cursor <= log.newest():
        fields["cursor"] = cursor
    Client.objects.filter(pk=row.pk, epoch=row.epoch).update(**fields)


def find(*, owner_id: int, binding: str, cid: str) -> Client | None:
    """The caller's own client, in whatever state; None when there is none, or it is another session's.

    :raises ValueError: the id is malformed.
    """
    return Client.objects.filter(owner_id=owner_id, binding=binding, cid=normal_cid(cid)).first()


def _own(caller: Caller, cid: str) -> Client:
    """As :func:`find`, locked.

    :raises Unknown: there is none.
    """
    try:
        wanted = normal_cid(cid)
    except ValueError:
        raise Unknown(cid) from None
    rows = Client.objects.filter(owner_id=caller.owner_id, binding=caller.binding, cid=wanted)
    for row in _locked(rows):
        return row
    raise Unknown(cid)


# ── Streams go ──


def disconnect(ended: Sequence[tuple[int, int, str]]) -> int:
    """The streams ``(pk, epoch, reason)`` ended: their clients are inactive now. How many; a replaced one is none of them."""
    with transaction.atomic():
        now = database_now()
        batch = _Batch(now)
        rows = {row.pk: row for row in _locked(Client.objects.filter(pk__in=[pk for pk, _, _ in ended]))}
        for pk, epoch, reason in ended:
            row = rows.get(pk)
            if row is None or row.epoch != epoch:
                metrics.STALE.labels("disconnect").inc()
            elif row.state == ClientState.LIVE:
                batch.move(
                    row, ClientState.INACTIVE, tell="client.inactive", actor=row.who,
                    lease_expires_at=None, last_seen_at=now, reason=reason,
                    expires_at=now + _seconds(settings.CLIENT_GRACE_SECONDS),
                )  # fmt: skip
            elif row.state == ClientState.SUSPENDED:
                # It had said so: its own, longer time begins now.
                Client.objects.filter(pk=pk, epoch=epoch).update(
                    lease_expires_at=None, expires_at=now + _seconds(settings.CLIENT_SUSPENDED_SECONDS)
                )
        return batch.write()


def suspend(
    *, caller: Caller, cid: str, epoch: int, cursor: int | None = None, leaving: bool = False
) -> bool:
    """The page goes to the background. Saying it twice is the same as once; for a stream that was replaced it is nothing.

    ``leaving``: the page itself ends (a reload, a link): its stream is as good as closed, and the next page need not ask for it.

    :raises Unknown: the caller has no such client.
    """
    with transaction.atomic():
        now = database_now()
        row = _own(caller, cid)
        if row.epoch != epoch:
            metrics.STALE.labels("suspend").inc()
            return False
        if leaving and row.lease_expires_at is not None and row.state == ClientState.SUSPENDED:
            Client.objects.filter(pk=row.pk, epoch=epoch).update(lease_expires_at=None)
        if row.state not in (ClientState.LIVE, ClientState.INACTIVE):
            return False
        _seen(row, now, cursor)
        gone: Json = {"lease_expires_at": None} if leaving else {}
        return _move(
            row, ClientState.SUSPENDED, now=now, tell="client.suspended", actor=caller.who,
            last_seen_at=now, expires_at=now + _seconds(settings.CLIENT_SUSPENDED_SECONDS), reason="in the background",
            **gone,
        )  # fmt: skip


def close(*, pk: int, reason: str, actor: str) -> bool:
    """An operator disconnects a client: its stream ends and its claims are released. False: it was over already."""
    with transaction.atomic():
        now = database_now()
        for row in _locked(Client.objects.filter(pk=pk)):
            if not row.keeps_claims:
                return False
            _release_all(row, actor=actor, reason="disconnected", now=now)
            return _move(
                row, ClientState.CLOSED, now=now, tell="client.closed", actor=actor,
                lease_expires_at=None, expires_at=None, reason=reason[:200],
            )  # fmt: skip
        return False


def close_all(owner_id: int) -> None:
    """A user is about to be deleted: whoever watched what they handled is told, before the rows go.

    Called with the user's objects locked, so that nobody comes to them behind this: who is at them is forgotten.
    """
    with transaction.atomic():
        now = database_now()
        rows = [row for row in _locked(Client.objects.filter(owner=owner_id)) if row.keeps_claims]
        theirs = Claim.objects.select_for_update().filter(audience=owner_id).order_by("pk")
        places = [claim.pk for claim in theirs]
        _release_all(*rows, actor="system", reason="its user was deleted", now=now)
        for row in rows:
            _move(
                row, ClientState.CLOSED, now=now, tell="client.closed", actor="system",
                lease_expires_at=None, expires_at=None, reason="its user was deleted",
            )  # fmt: skip
        Claim.objects.filter(pk__in=places).delete()


def renew(process: str, held: Mapping[int, int], *, cursors: Mapping[int, int]) -> dict[int, Client | None]:
    """Hold on to the clients ``{pk: epoch}`` whose streams this process has, for another lease; returns those that were lost, as they are now.

    ``cursors``: what the streams have been handed. A client that only lapsed (the database was away for longer than the lease) is
    taken back.
    """
    kept: set[int] = set()
    pairs = sorted(held.items())
    for start in range(0, len(pairs), LIMIT):
        part = dict(pairs[start : start + LIMIT])
        with transaction.atomic():
            now = database_now()
            lease = now + _seconds(settings.CLIENT_LEASE_SECONDS)
            rows = _locked(Client.objects.filter(pk__in=part, process=process))
            mine = [row for row in rows if row.epoch == part[row.pk]]
            for row in mine:
                if row.state == ClientState.INACTIVE:
                    _move(
                        row, ClientState.LIVE, now=now, tell="client.opened", actor=row.who,
                        lease_expires_at=lease, expires_at=None, last_seen_at=now, reason="",
                    )  # fmt: skip
            alive = [row for row in mine if row.state in (ClientState.LIVE, ClientState.SUSPENDED)]
            by_cursor: dict[int, list[int]] = {}
            for row in alive:
                by_cursor.setdefault(cursors.get(row.pk, 0), []).append(row.pk)
            for cursor, pks in by_cursor.items():
                # Locked above, with their epochs.
                Client.objects.filter(pk__in=pks, process=process).update(
                    lease_expires_at=lease, last_seen_at=now, sent_cursor=cursor
                )
            kept.update(row.pk for row in alive)
    lost = set(held) - kept
    found = Client.objects.in_bulk(lost) if lost else {}
    return {pk: found.get(pk) for pk in lost}


# ── Time ──


def sweep(limit: int = LIMIT) -> int:
    """What time does to clients: servers die, leases run out, clients expire, presence lapses, old rows go. Returns how much changed."""
    return recover() + _lapse(limit) + _expire(limit) + _forget_presence(limit) + _purge(limit)


def _due(rows: Any, limit: int) -> list[Client]:
    # A look without a lock first: mostly nothing is due, and on SQLite a transaction takes the one write lock.
    pks = list(rows.values_list("pk", flat=True)[:limit])
    return _locked(rows.filter(pk__in=pks)) if pks else []


def recover() -> int:
    """Clients of server processes of this machine that are over: a server that is started again need not wait for their leases."""
    live = Client.objects.filter(lease_expires_at__isnull=False)
    gone = [name for name in live.values_list("process", flat=True).distinct() if is_gone(name)]
    if not gone:
        return 0
    done = 0
    with transaction.atomic():
        batch = _Batch(database_now())
        for row in _locked(Client.objects.filter(process__in=gone, lease_expires_at__isnull=False)):
            done += _lose(row, batch, at=batch.now, reason=LAPSED[0])
        batch.write()
    return done


def _lapse(limit: int) -> int:
    if not Client.objects.filter(lease_expires_at__lte=database_now()).exists():
        return 0
    done = 0
    with transaction.atomic():
        now = database_now()
        batch = _Batch(now)
        for row in _due(Client.objects.filter(lease_expires_at__lte=now), limit):
            assert row.lease_expires_at is not None
            # Found late, because nobody could look: then nobody could renew, either. Whoever still has the stream gets the time for it.
            at = max(row.lease_expires_at, now - _seconds(settings.CLIENT_GRACE_SECONDS) / 2)
            done += _lose(row, batch, at=at, reason=LAPSED[1])
        batch.write()
    return done


def _lose(row: Client, batch: _Batch, *, at: dt.datetime, reason: str) -> bool:
    """Its server process is gone, since ``at``."""
    if row.state == ClientState.LIVE:
        batch.move(
            row, ClientState.INACTIVE, tell="client.inactive", actor="system",
            lease_expires_at=None, expires_at=at + _seconds(settings.CLIENT_GRACE_SECONDS), reason=reason,
        )  # fmt: skip
        return True
    grace = settings.CLIENT_SUSPENDED_SECONDS if row.state == ClientState.SUSPENDED else 0
    fields: Json = {"lease_expires_at": None}
    if grace:
        fields["expires_at"] = at + _seconds(grace)
    return bool(Client.objects.filter(pk=row.pk, epoch=row.epoch).update(**fields))


def _expire(limit: int) -> int:
    # A page in the background whose stream is open still holds its lease: it is not over. Nor is it when the lease ran out and nobody has seen that
    # yet (`_lapse`): its time begins with the loss of the stream.
    def due(now: dt.datetime) -> Any:
        away = Q(state__in=[ClientState.SUSPENDED, ClientState.INACTIVE], expires_at__lte=now)
        return Client.objects.filter(away, lease_expires_at=None)

    done = 0
    # One by one: whatever a transaction locks (here the claims of each) is locked before it tells anything.
    for pk in list(due(database_now()).values_list("pk", flat=True)[:limit]):
        with transaction.atomic():
            now = database_now()
            for row in _locked(due(now).filter(pk=pk)):
                _release_all(row, actor="system", reason="expired", now=now)
                if _move(
                    row, ClientState.EXPIRED, now=now, tell="client.expired", actor="system",
                    lease_expires_at=None, expires_at=None, reason="nobody came back",
                ):  # fmt: skip
                    done += 1
                    logger.info("client %s of %s expired: nobody came back", row.cid, row.who)
    return done


def _forget_presence(limit: int) -> int:
    if not Presence.objects.filter(until__lte=database_now()).exists():
        return 0
    with transaction.atomic():
        now = database_now()
        due = Presence.objects.filter(until__lte=now)
        subjects = set(due.values_list("claim_id", flat=True)[:limit])
        rows = list(Claim.objects.select_for_update().filter(pk__in=subjects).order_by("pk"))
        gone = 0
        for row in rows:
            count, _ = Presence.objects.filter(claim=row, until__lte=now).delete()
            gone += count
            if count:
                _tell_claim("claim.updated", row, actor="system", reason="left", now=now)
        return gone


def _purge(limit: int) -> int:
    over = Client.objects.filter(
        state__in=[ClientState.EXPIRED, ClientState.CLOSED], last_seen_at__lte=database_now() - KEPT
    )
    if not over.exists():
        return 0
    with transaction.atomic():
        # Looked at again under the lock: one may have come back since, and delete() looks only once.
        return Client.objects.filter(pk__in=[row.pk for row in _due(over, limit)]).delete()[0]


# ── Claims ──


def _claim_row(subject: str, audience: int) -> Claim:
    """The row of a subject, locked; made when nobody was there before."""
    # Without its client: PostgreSQL waits for the lock, looks at the claim again, and joins the client of before to it (or none at all).
    rows = Claim.objects.select_for_update()
    found = rows.filter(subject=subject).first()
    if found is None:
        Claim.objects.bulk_create(
            [Claim(subject=normal_subject(subject), audience=audience)], ignore_conflicts=True
        )
        found = rows.get(subject=subject)
    return found


def take(
    *, caller: Caller, cid: str, subject: str, audience: int, takeover: bool = False, reason: str = "taken"
) -> Json:
    """This client is handling the subject from now on. Taking what one has already is no change. The picture of the claim.

    The same user's other tab gives it up without being asked; another user only on ``takeover``, and both are told.

    :raises Unknown: the caller has no such client, or it is over.
    :raises Claimed: somebody else is handling it.
    """
    with transaction.atomic():
        row = _own(caller, cid)
        if not row.keeps_claims:
            raise Unknown(cid)
        claim = _claim_row(subject, audience)
        holder = claim.client
        if holder is not None and holder.pk == row.pk:
            return claim_picture(claim)
        if holder is not None and holder.owner_id != row.owner_id and not takeover:
            raise Claimed(claim_picture(claim))
        now = database_now()
        more: Json = {}
        if holder is not None:
            reason = "session_takeover"
            more = {"previous_client": holder.cid, "previous_user": holder.who}
        claim.client, claim.taken_at = row, now
        _tell_claim("claim.taken", claim, actor=caller.who, reason=reason, now=now, **more)
        return claim_picture(claim)


def let_go(*, caller: Caller, cid: str, subject: str) -> bool:
    """This client does not handle the subject any more. False: it did not.

    :raises Unknown: the caller has no such client.
    """
    with transaction.atomic():
        row = _own(caller, cid)
        claim = Claim.objects.select_for_update().filter(subject=subject, client=row).first()
        if claim is None:
            return False
        _release(claim, actor=caller.who, reason="released", now=database_now())
        return True


def _release(claim: Claim, *, actor: str, reason: str, now: dt.datetime) -> None:
    previous = claim.client
    claim.client, claim.taken_at = None, None
    more = {"previous_client": previous.cid, "previous_user": previous.who} if previous else {}
    _tell_claim("claim.released", claim, actor=actor, reason=reason, now=now, **more)


def _release_all(*rows: Client, actor: str, reason: str, now: dt.datetime) -> None:
    """Everything that these clients have, and nothing that somebody has taken over meanwhile: the owner is part of the look under the lock."""
    held = Q(client__in=rows) | Q(people__client__in=rows)
    involved = set(Claim.objects.filter(held).values_list("pk", flat=True))
    pks = {row.pk for row in rows}
    for claim in list(Claim.objects.select_for_update().filter(pk__in=involved).order_by("pk")):
        gone, _ = Presence.objects.filter(claim=claim, client__in=rows).delete()
        if claim.client_id in pks:
            _release(claim, actor=actor, reason=reason, now=now)
        elif gone:
            _tell_claim("claim.updated", claim, actor=actor, reason=reason, now=now)


def finish(*subjects: str, actor: str, reason: str = "finished") -> None:
    """There is nothing left to handle. Called by the domain, within the transaction of its own change, before it tells."""
    claims = Claim.objects.select_for_update().filter(subject__in=subjects).order_by("pk")
    for claim in list(claims):
        if claim.client_id is not None:
            _release(claim, actor=actor, reason=reason, now=database_now())


def forget(*subjects: str) -> None:
    """The objects are gone, and with them who was there. Called as :func:`finish` is."""
    rows = Claim.objects.select_for_update().filter(subject__in=subjects).order_by("pk")
    Claim.objects.filter(pk__in=[row.pk for row in rows]).delete()


def be_present(*, caller: Caller, cid: str, subject: str, audience: int, doing: str) -> None:
    """This client looks at the subject, or types, for PRESENCE; empty ``doing``: not any more. Told only when it changes.

    :raises Unknown: the caller has no such client, or it is over.
    """
    with transaction.atomic():
        row = _own(caller, cid)
        if not row.keeps_claims:
            raise Unknown(cid)
        known = Presence.objects.filter(claim__subject=subject, client=row)
        now = database_now()
        if doing and known.filter(doing=doing).update(until=now + PRESENCE):
            return
        if not doing and not known.exists():
            return
        claim = _claim_row(subject, audience)
        if doing:
            Presence.objects.update_or_create(
                claim=claim, client=row, defaults={"doing": doing, "until": now + PRESENCE}
            )
        elif not known.delete()[0]:
            return
        _tell_claim("claim.updated", claim, actor=caller.who, reason=doing or "left", now=now)


# ── Looking ──


def seems_live(row: Client, now: dt.datetime) -> bool:
    """Whether its stream is open as far as can be told: a lease that ran out and was not found yet is not."""
    return row.lease_expires_at is not None and row.lease_expires_at > now


def lag(row: Client, now: dt.datetime) -> int:
    """Events that its stream had not been handed when that was last looked at, at most MAX_LAG; 0 for a client without a stream."""
    if not seems_live(row, now) or row.sent_cursor is None or row.last_seen_at is None:
        return 0
    missed = Event.objects.filter(id__gt=row.sent_cursor, at__lt=row.last_seen_at - LAG_GRACE)
    return missed[:MAX_LAG].count()


def visible_to(audiences: Collection[int] | None) -> Any:
    """The clients of these users (None: of everybody), the latest first."""
    rows = Client.objects.filter(epoch__gt=0)
    if audiences is not None:
        rows = rows.filter(owner__in=audiences)
    return rows.order_by("-last_seen_at", "-pk")
