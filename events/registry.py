"""The clients whose streams this process has: who comes, who goes, who is asked whether it is still there.

A thousand clients that come back at once are a few transactions: what waits while one runs goes into the next. Leases are renewed for
all together. What other processes do to a client of ours (another stream of it, an operator, a question) arrives through the log, like
everything else; a stream that belongs to no client costs nothing here.

One per event loop, like the hub. It starts with the first client and ends with the last.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import dataclasses
import logging
import weakref
from collections.abc import AsyncIterator, Callable
from typing import Any, Protocol

from channels.db import database_sync_to_async
from django.conf import settings

from events import clients, metrics
from events import hub as hubs
from events.broker import Subscription
from events.clients import Arrival, Full, Outcome, Question, Replaced, Welcome
from events.envelope import SIGNALS, Envelope, Interest
from events.states import ClientState
from events.stream import Events, follow

logger = logging.getLogger(__name__)

#: How long a page that is asked has for its answer.
QUESTION_SECONDS = 1.0
FOLLOWING_SECONDS = 5.0
#: Arrivals and departures that share a transaction.
TOGETHER = 250
#: How often the rows are looked over for what time has done to them.
SWEEP_SECONDS = 5.0
#: A process that ends waits so long for the last departures to be written.
FLUSH_SECONDS = 1.0
PAUSE_AFTER_ERROR = 1.0


class Stream(Protocol):
    """What the registry wants of a stream. Called within somebody else's step: quick, and never waiting."""

    def signal(self, nonce: str, *, question: bool) -> None:
        """Write a ``probe`` frame, after what was written before."""

    def supersede(self, epoch: int) -> None:
        """Another stream of the same client took over."""

    def dismiss(self, reason: str) -> None:
        """An operator disconnected the client."""

    def come_again(self) -> None:
        """The client was lost; connecting again makes it anew."""

    @property
    def position(self) -> int:
        """The cursor up to which it was handed everything."""


@dataclasses.dataclass(eq=False, slots=True)
class Seat:
    """A stream that has its client. ``who``: binding and page of whoever has it; ``reason``: why it ended, said by the stream itself."""

    welcome: Welcome
    stream: Stream
    who: tuple[str, str]
    reason: str = "gone"


def name_of(arrival: Arrival) -> tuple[int, str] | None:
    """Owner and client id; None where that is no id."""
    try:
        return arrival.caller.owner_id, clients.normal_cid(arrival.cid)
    except ValueError:
        return None


def _who(arrival: Arrival) -> tuple[str, str]:
    return arrival.caller.binding, arrival.page


class Crowded(Exception):
    """The owner has as many clients as there may be."""


class Gone(Exception):
    """The page lost its client to another page, or was ``dismissed`` for a reason: it shall not come back."""

    def __init__(self, cid: str, dismissed: str | None) -> None:
        super().__init__(cid)
        self.dismissed = dismissed


class Registry:
    """``arrive``, then the stream runs, then it leaves by itself (:meth:`attend`)."""

    def __init__(self) -> None:
        self.process = clients.process_name()
        self._seats: dict[int, Seat] = {}
        self._by_name: dict[tuple[int, str], Seat] = {}
        self._users = 0
        self._arrivals: list[tuple[Arrival, asyncio.Future[Outcome]]] = []
        self._departures: list[tuple[int, int, str]] = []
        self._writing: asyncio.Task[None] | None = None
        self._questions: dict[str, asyncio.Future[None]] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._following = asyncio.Event()
        self._renew_now = asyncio.Event()

    def __len__(self) -> int:
        return len(self._seats)

    @contextlib.asynccontextmanager
    async def attend(self, arrival: Arrival, stream: Stream) -> AsyncIterator[Seat]:
        """The stream is its client's stream for as long as the block runs.

        :raises Gone: its page was replaced by another one.
        :raises Crowded: there is no room for another client.
        :raises django.db.Error: the database does not answer.
        :raises TimeoutError: nor does the log.
        """
        self._users += 1
        seat: Seat | None = None
        try:
            self._start()
            welcome = await self._arrive(arrival)
            seat = self._sit(Seat(welcome, stream, _who(arrival)))
            yield seat
        finally:
            if seat is not None:
                self._stand_up(seat)
            self._users -= 1
            if not self._users:
                self._stop()

    def is_back(self, arrival: Arrival) -> bool:
        """Whether a page opens a stream although its stream is still open here: its network changed, and the old socket says nothing of it."""
        seat = self._by_name.get(name_of(arrival) or (0, ""))
        return seat is not None and seat.who == _who(arrival)

    # ── Coming ──

    async def _arrive(self, arrival: Arrival) -> Welcome:
        # A question that nobody answered may find, when it is taken over, that somebody else was quicker: then that one is asked.
        while True:
            outcome = await self._write_arrival(arrival)
            if isinstance(outcome, Welcome):
                return outcome
            if isinstance(outcome, Replaced):
                raise Gone(arrival.cid, outcome.dismissed)
            if isinstance(outcome, Full):
                raise Crowded(arrival.caller.who)
            if await self._is_there(outcome):
                arrival = dataclasses.replace(arrival, in_use=True)
            else:
                arrival = dataclasses.replace(arrival, unanswered=outcome.epoch)

    async def _is_there(self, question: Question) -> bool:
        # Whoever answers does so through the log: the ear has to be there before the question is.
        async with asyncio.timeout(FOLLOWING_SECONDS):
            await self._following.wait()
        answered: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._questions[question.nonce] = answered
        try:
            seat = self._by_name.get((question.owner_id, question.cid))
            if seat is not None and seat.welcome.epoch == question.epoch:
                seat.stream.signal(question.nonce, question=True)
            else:
                await database_sync_to_async(clients.ask)(question)
            # Question and answer may have to wait for a look at the log each, while the layer carries no wake-ups.
            async with asyncio.timeout(QUESTION_SECONDS + 2 * settings.POLL_SECONDS):
                await answered
        except TimeoutError:
            return False
        finally:
            del self._questions[question.nonce]
        return True

    def _sit(self, seat: Seat) -> Seat:
        welcome = seat.welcome
        before = self._seats.get(welcome.pk)
        if before is not None and before.welcome.epoch > welcome.epoch:
            # Two of one client at once, and the later one is here already.
            seat.stream.supersede(before.welcome.epoch)
            return seat
        if before is not None:
            before.stream.supersede(welcome.epoch)
        self._seats[welcome.pk] = self._by_name[welcome.owner_id, welcome.cid] = seat
        return seat

    def _stand_up(self, seat: Seat) -> None:
        welcome = seat.welcome
        if self._seats.get(welcome.pk) is seat:
            del self._seats[welcome.pk], self._by_name[welcome.owner_id, welcome.cid]
        # Also when it was replaced: the database knows better than this process.
        self._depart(welcome, seat.reason)

    # ── Writing, together ──

    async def _write_arrival(self, arrival: Arrival) -> Outcome:
        future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._arrivals.append((arrival, future))
        self._write()
        try:
            return await future
        except asyncio.CancelledError:
            # It left in the very step in which it became a client.
            if future.done() and not future.cancelled() and future.exception() is None:
                self._take_back(future.result())
            raise

    def _take_back(self, outcome: Outcome) -> None:
        if isinstance(outcome, Welcome):
            self._depart(outcome, "gone")

    def _depart(self, welcome: Welcome, reason: str) -> None:
        self._departures.append((welcome.pk, welcome.epoch, reason))
        self._write()

    def _write(self) -> None:
        if self._writing is None:
            # In a context of its own, for it serves everybody.
            self._writing = asyncio.create_task(
                self._write_all(), name="registry.write", context=contextvars.Context()
            )

    async def _write_all(self) -> None:
        try:
            while self._departures or self._arrivals:
                if self._departures:
                    await self._write_departures()
                waiting, self._arrivals = self._arrivals[:TOGETHER], self._arrivals[TOGETHER:]
                if waiting:
                    await self._write_arrivals([each for each in waiting if not each[1].done()])
        finally:
            self._writing = None

    async def _write_departures(self) -> None:
        leaving, self._departures = self._departures[:TOGETHER], self._departures[TOGETHER:]
        try:
            await database_sync_to_async(clients.disconnect)(leaving)
        except Exception:
            # Their leases run out: later, but surely.
            logger.exception("%s clients left, and the database did not hear it", len(leaving))

    async def _write_arrivals(self, waiting: list[tuple[Arrival, asyncio.Future[Outcome]]]) -> None:
        if not waiting:
            return
        try:
            outcomes: list[Outcome | Exception] = [
                *await database_sync_to_async(clients.connect)([arrival for arrival, _ in waiting])
            ]
        except Exception as error:  # noqa: BLE001 (handed to whoever asked)
            if len(waiting) > 1:
                # One of them may have been the reason.
                for each in waiting:
                    await self._write_arrivals([each])
                return
            outcomes = [error]
        for (_, future), outcome in zip(waiting, outcomes, strict=True):
            if future.done():
                # It left while it waited.
                if not isinstance(outcome, Exception):
                    self._take_back(outcome)
            elif isinstance(outcome, Exception):
                future.set_exception(outcome)
            else:
                future.set_result(outcome)

    async def flush(self) -> None:
        """Until everybody who left is written down, for a bounded time."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FLUSH_SECONDS):
                while self._writing is not None:
                    await asyncio.wait({self._writing})

    # ── What happens elsewhere, and time ──

    def _start(self) -> None:
        if self._tasks:
            return
        # A new one: what is just ending clears its own.
        self._following = asyncio.Event()
        self._tasks = [
            asyncio.create_task(work, name=name, context=contextvars.Context())
            for name, work in (
                ("registry.follow", self._follow(self._following)),
                ("registry.tick", self._tick()),
            )
        ]

    def _stop(self) -> None:
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()

    async def _follow(self, following: asyncio.Event) -> None:
        hub = hubs.current()
        interest = Interest(topics=frozenset({"clients", SIGNALS}))
        while True:
            try:
                async with hub.subscribe(interest) as subscription:
                    await self._hear(hub, subscription, following)
            except Exception:
                # The leases go on, and tell the streams that were replaced.
                logger.exception("the registry does not hear of clients elsewhere; trying again")
                await asyncio.sleep(PAUSE_AFTER_ERROR)

    async def _hear(self, hub: hubs.Hub, subscription: Subscription, following: asyncio.Event) -> None:
        following.set()
        try:
            async with contextlib.aclosing(follow(hub, subscription, after=None)) as items:
                async for item in items:
                    if isinstance(item, Events):
                        for envelope in item.batch:
                            self._take(envelope)
        finally:
            following.clear()

    def _take(self, envelope: Envelope) -> None:
        data = envelope.data
        if envelope.name == "signal.answer":
            question = self._questions.get(data["nonce"])
            if question is not None and not question.done():
                question.set_result(None)
            return
        seat = self._by_name.get((envelope.audience, envelope.topic.partition(":")[2]))
        if seat is None:
            return
        mine = seat.welcome.epoch
        if envelope.name.startswith("signal."):
            if data["epoch"] == mine:
                seat.stream.signal(data["nonce"], question=envelope.name == "signal.question")
        elif envelope.id <= seat.welcome.told:
            return
        elif data["epoch"] > mine:
            seat.stream.supersede(data["epoch"])
        elif data["epoch"] == mine:
            self._about(seat, envelope.name, data)

    def _about(self, seat: Seat, name: str, data: Any) -> None:
        """Something was told of the very stream that is open here."""
        if name == "client.closed":
            seat.stream.dismiss(str(data.get("reason") or ""))
        elif name == "client.expired":
            metrics.EXPIRED_LIVE.inc()
            logger.error("client %s expired although its stream is open", seat.welcome.cid)
            seat.stream.come_again()
        elif name == "client.inactive":
            if data.get("reason") not in clients.LAPSED:
                metrics.STALE_CHANGED.inc()
                logger.error("client %s was ended by a stream that is not its own", seat.welcome.cid)
            self._renew_now.set()

    async def _tick(self) -> None:
        period = min(SWEEP_SECONDS, settings.CLIENT_LEASE_SECONDS / 3)
        while True:
            # Again, while there is more than one sweep deals with.
            while (await self._quietly(clients.sweep) or 0) >= clients.LIMIT:
                pass
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(period):
                    await self._renew_now.wait()
            self._renew_now.clear()
            await self._renew()

    async def _renew(self) -> None:
        held = {pk: seat.welcome.epoch for pk, seat in self._seats.items()}
        cursors = {pk: seat.stream.position for pk, seat in self._seats.items()}
        lost = (
            await self._quietly(lambda: clients.renew(self.process, held, cursors=cursors)) if held else None
        )
        for pk, row in (lost or {}).items():
            seat = self._seats.get(pk)
            if seat is None or seat.welcome.epoch != held[pk]:
                continue
            # The log says so as well, and may be later than this.
            if row is not None and row.epoch > held[pk]:
                seat.stream.supersede(row.epoch)
            elif row is not None and row.state == ClientState.CLOSED:
                seat.stream.dismiss(row.reason)
            else:
                seat.stream.come_again()

    async def _quietly(self, work: Callable[[], Any]) -> Any:
        try:
            return await database_sync_to_async(work)()
        except Exception:
            # The next one has another chance; leases are longer than three of them.
            logger.exception("the clients' rows could not be looked after; trying again")
            return None


_registries: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Registry] = weakref.WeakKeyDictionary()


def current() -> Registry:
    """The registry of the running event loop: one per server process."""
    loop = asyncio.get_running_loop()
    found = _registries.get(loop)
    if found is None:
        found = _registries[loop] = Registry()
    return found
