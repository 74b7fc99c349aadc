"""The two streams of a task: what it writes, and, for a program that works through the API, what is sent to it.

Output is in no event. One reader per process (:class:`Reader`) asks how much there is of every task that somebody watches, when a wake-up is heard and
every ``settings.POLL_SECONDS``, and reads each block of bytes once for all streams that are at it. A stream keeps an offset and nothing else, so
one that is slow costs what was written to its socket, and reads on at its own pace.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import contextvars
import dataclasses
import logging
import random
import time
import weakref
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar, TypeVar

from asgiref.sync import sync_to_async
from django.conf import settings
from django.db import DatabaseError, InterfaceError, connection
from django.utils import timezone

from connections import access, errors, inputs, outputs, payloads, task_inputs, tasks
from connections.access import Forbidden, NotFound, Principal, operable, visible
from connections.consumers import MAX_CURSOR, caller, credential, cursor_of, headers_of, query_of
from connections.errors import ApiError
from connections.models import Task
from connections.outputs import Size
from connections.states import TASK_END
from connections.tasks import Hold, LeaseLost
from connections.terminal.ansi import plain
from events import hub as hubs
from events import sse, units
from events.consumers import EventStreamConsumer, Grant, Refused, now_text
from events.envelope import Envelope, Interest, topic_of
from events.stream import Ready, Reset

logger = logging.getLogger(__name__)
T = TypeVar("T")

#: What is read at a time, from a multiple of it on: the size of the largest row.
BLOCK = outputs.PIECE_BYTES
#: Bytes in one frame at most, up to a multiple of it: so streams that began at different places come to the same frames. As base64 it is
#: one portion of a stream.
FRAME = 1 << 15
#: What is kept for those who come to it a moment later.
BLOCKS_KEPT, FRAMES_KEPT = 64, 64
#: Looks that follow each other are so far apart: a program that writes all the time is not asked about all the time.
JOIN_SECONDS = 0.01
PAUSE_AFTER_ERROR = 1.0


class Gone(Exception):
    """The task was deleted, and its output with it."""


@dataclasses.dataclass(eq=False)
class Watched:
    """A task that streams of this process look at. ``calls``: how their attention is called."""

    size: Size
    calls: dict[object, Callable[[], None]] = dataclasses.field(default_factory=dict)
    gone: bool = False
    ending: dict[str, Any] | None = None

    def learn(self, size: Size | None) -> None:
        """How much there is now; None when there is no such task any more."""
        if size == self.size:
            return
        if size is None:
            self.gone = True
        else:
            self.size = size
        self.call()

    def call(self) -> None:
        for call in list(self.calls.values()):
            call()


class Reader:
    """Reads outputs for all streams of an event loop. Starts with the first and ends with the last."""

    def __init__(self) -> None:
        self._watched: dict[str, Watched] = {}
        self._blocks: OrderedDict[tuple[str, int], bytes] = OrderedDict()
        self._frames: OrderedDict[tuple[str, int, int, str], tuple[bytes, int]] = OrderedDict()
        #: By where the block begins, and where what is read does.
        self._reading: dict[tuple[str, int, int], asyncio.Task[bytes]] = {}
        self._wake = asyncio.Event()
        self._following: asyncio.Task[None] | None = None
        self._thread: ThreadPoolExecutor | None = None

    def __len__(self) -> int:
        return len(self._watched)

    @contextlib.asynccontextmanager
    async def watch(self, task_id: str, size: Size, call: Callable[[], None]) -> AsyncIterator[Watched]:
        """Have ``call`` called when there is more of a task, for as long as the block runs. ``size``: as somebody has just seen it."""
        watched = self._watched.get(task_id)
        if watched is None:
            watched = self._watched[task_id] = Watched(size)
        if self._following is None:
            self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="outputs")
            # In a context of its own, for it serves everybody.
            self._following = asyncio.create_task(
                self._follow(), name="outputs.follow", context=contextvars.Context()
            )
        me = object()
        watched.calls[me] = call
        self.look()
        try:
            yield watched
        finally:
            del watched.calls[me]
            if not watched.calls and self._watched.get(task_id) is watched:
                self._forget(task_id)
            if not self._watched:
                self._stop()

    def look(self) -> None:
        """Look soon: something has happened."""
        self._wake.set()

    def _forget(self, task_id: str) -> None:
        del self._watched[task_id]
        for block in [key for key in self._blocks if key[0] == task_id]:
            del self._blocks[block]
        for frame in [key for key in self._frames if key[0] == task_id]:
            del self._frames[frame]

    def _stop(self) -> None:
        following, self._following = self._following, None
        thread, self._thread = self._thread, None
        if following is not None:
            following.cancel()
        if thread is not None:
            # Its own connection: which one that is depends on who asks.
            thread.submit(lambda: connection.close())
            thread.shutdown(wait=False)

    async def _follow(self) -> None:
        with hubs.current().hearing(self.look):
            while True:
                self._wake.clear()
                began = time.monotonic()
                try:
                    await self._look()
                except Exception:
                    # Whatever it is: a reader that stopped looking would leave every stream alive and silent.
                    logger.exception("outputs cannot be looked at; trying again in %s s", PAUSE_AFTER_ERROR)
                    await asyncio.sleep(PAUSE_AFTER_ERROR)
                    continue
                await asyncio.sleep(max(0.0, began + JOIN_SECONDS - time.monotonic()))
                # Not wait_for(): before Python 3.12 it swallows a cancellation that comes together with the wake-up.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(settings.POLL_SECONDS):
                        await self._wake.wait()

    async def _look(self) -> None:
        # What is over grows no more; that it was deleted is an event.
        asked = [task_id for task_id, watched in self._watched.items() if not watched.size.is_over]
        if asked:
            found = await self._in_thread(lambda: outputs.sizes(asked))
            for task_id in asked:
                if task_id in self._watched:
                    self._watched[task_id].learn(found.get(task_id))

    async def frame(self, task_id: str, start: int, size: Size, *, strip: bool) -> tuple[bytes, int]:
        """The next frame from an offset on, and the offset after it: the same as before when nothing of it can be told yet.

        :raises Gone: there is no such output any more.
        """
        end = min(size.end, (start // FRAME + 1) * FRAME)
        if strip and end - start < 3 * FRAME // 4:
            # Room for a sequence that lies over the border.
            end = min(size.end, end + FRAME)
        final = size.is_over and end == size.end
        key = (
            (task_id, start, end, "text, to the end" if final else "text")
            if strip
            else (task_id, start, end, "")
        )
        found = self._frames.get(key)
        if found is None:
            data = await self._bytes(task_id, start, end)
            # Others have waited for the same bytes; the first of them makes the frame.
            found = self._frames.get(key)
            if found is None:
                found = self._frames[key] = _frame(data, start, strip=strip, final=final)
                if len(self._frames) > FRAMES_KEPT:
                    self._frames.popitem(last=False)
        return found

    async def _bytes(self, task_id: str, start: int, end: int) -> bytes:
        parts = []
        while start < end:
            first = start - start % BLOCK
            block = await self._block(task_id, first, min(end, first + BLOCK) - first)
            parts.append(block[start - first : min(end - first, BLOCK)])
            start = first + BLOCK
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def _block(self, task_id: str, first: int, size: int) -> bytes:
        """At least the first ``size`` bytes of the block that begins at an offset, read once, however many wait for them."""
        key = (task_id, first)
        while len(known := self._blocks.get(key, b"")) < size:
            # A stream that leaves while it waits must not take the block away from the others.
            more = await asyncio.shield(self._reading_from(task_id, first, first + len(known)))
            if not more:
                raise Gone(task_id)
            # Whoever comes back first from waiting puts it there; for the others it is there.
            if len(self._blocks.get(key, b"")) == len(known):
                self._blocks[key] = known + more
                if len(self._blocks) > BLOCKS_KEPT:
                    self._blocks.popitem(last=False)
        self._blocks.move_to_end(key)
        return known

    def _reading_from(self, task_id: str, first: int, start: int) -> asyncio.Task[bytes]:
        """The look for the rest of a block, from ``start`` on: under way already, or begun now."""
        key = (task_id, first, start)
        found = self._reading.get(key)
        if found is None:
            look = self._in_thread(lambda: outputs.read(task_id, start, first + BLOCK - start))
            found = self._reading[key] = asyncio.create_task(look, context=contextvars.Context())
            found.add_done_callback(lambda _: self._reading.pop(key, None))
        return found

    async def ending(self, task_id: str, watched: Watched) -> dict[str, Any]:
        """How a task ended, looked up once.

        :raises Gone: it was deleted.
        """
        if watched.ending is None:
            watched.ending = await self._in_thread(lambda: _ending(task_id))
            if watched.ending is None:
                raise Gone(task_id)
        return watched.ending

    async def _in_thread(self, work: Callable[[], T]) -> T:
        def run() -> T:
            try:
                return work()
            except (DatabaseError, InterfaceError):
                # The next look gets a new connection: the server may have been restarted.
                connection.close()
                raise

        if self._thread is None:
            raise InterfaceError("the last stream has gone")
        return await asyncio.get_running_loop().run_in_executor(self._thread, run)


def _ending(task_id: str) -> dict[str, Any] | None:
    row = Task.objects.filter(pk=task_id).first()
    if row is None:
        return None
    shown = payloads.task(row)
    return {
        "status": shown["status"],
        "exit_code": shown["exit_code"],
        "signal": shown["signal"],
        "error_code": shown["error_code"],
        "error": shown["error"],
        "dropped": shown["output_dropped"],
    }


def _frame(data: bytes, start: int, *, strip: bool, final: bool) -> tuple[bytes, int]:
    """The frame of a piece (empty when it has no text), and the offset after it."""
    if not strip:
        end = start + len(data)
        # As sse.frame() would write it: base64 needs no escapes.
        return b'id: %d\nevent: output\ndata: {"data":"%b"}\n\n' % (end, base64.b64encode(data)), end
    text, used = plain(data, final=final)
    return sse.frame("output", {"text": text}, id=start + used) if text else b"", start + used


_readers: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Reader] = weakref.WeakKeyDictionary()


def reader() -> Reader:
    """The reader of the running event loop."""
    return _readers.setdefault(asyncio.get_running_loop(), Reader())


async def whole(task_id: str, end: int) -> AsyncIterator[bytes]:
    """An output up to an offset, a piece at a time, for whoever wants it in one answer. It ends early when the task is deleted meanwhile."""
    at = 0
    while at < end:
        piece = await sync_to_async(outputs.read)(task_id, at, min(outputs.PIECE_BYTES, end - at))
        if not piece:
            return
        yield piece
        at += len(piece)


def wants_stream(scope: Any) -> bool:
    """Whether a request for an output asks for the stream: the same address has it in one piece as well."""
    if scope["method"] != "GET":
        return False
    return "text/event-stream" in headers_of(scope).get("accept", "") or query_of(scope).get("stream") == "1"


def _refused(error: ApiError) -> Refused:
    return Refused(error.status, error.code, error.message, headers=error.headers)


def _end(reason: str, **more: Any) -> bytes:
    return sse.frame("end", {"reason": reason, "reconnect": False, **more})


class _TaskStream(EventStreamConsumer):
    """What the two have in common: they are of one task, and say little of the log."""

    has_more = True
    KNOWN: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._opened = False

    @property
    def task_id(self) -> str:
        return str(self.scope["url_route"]["kwargs"]["task_id"])

    async def authorise(self, *, within: float = 0.0) -> Grant:
        again = self._opened
        grant = await units.desk().look(
            lambda: self._look(again),
            key=(type(self).__name__, self.task_id, *credential(self.scope), self.scope["query_string"])
            if again
            else None,
            within=within,
        )
        self._opened = True
        return grant

    def _look(self, again: bool) -> Grant:
        principal = caller(self.scope, now=timezone.now(), again=again)
        if principal.is_page:
            raise Refused(401, "unauthorized", "The token of a hosted page does not open this stream.")
        unknown = sorted(set(query_of(self.scope)) - self.KNOWN)
        if unknown:
            raise Refused(400, "invalid_parameter", f"Unknown parameter {unknown[0][:60]!r}.")
        try:
            return self._grant(principal)
        except (ApiError, NotFound, Forbidden, LeaseLost) as error:
            raise _refused(errors.translate(error)) from None

    def _grant(self, principal: Principal) -> Grant:
        raise NotImplementedError("each stream says what it needs")

    def _interest(self, row: Task) -> Interest:
        return Interest(topics=frozenset({topic_of("task", row.id)}), audiences=frozenset({row.owner_id}))

    def marker(self, item: Ready | Reset) -> bytes:
        # Its cursor is another than the log's.
        return b""


@dataclasses.dataclass(frozen=True)
class _Place:
    start: int
    strip: bool
    size: Size


class OutputConsumer(_TaskStream):
    """``GET /api/tasks/{id}/output`` as a stream: every byte from an offset on, and then the end.

    ``id:`` is the offset after the piece: ``Last-Event-ID`` goes on exactly there. Frames: ``ready`` (also with an id), ``output``, ``cut`` (the
    limit was reached: what follows is counted and not kept), ``heartbeat``, ``end``.
    """

    KNOWN = frozenset({"from", "tail", "ansi", "stream"})

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._watched: Watched | None = None
        self._offset = 0
        self._told_cut = False

    def _grant(self, principal: Principal) -> Grant:
        place = inputs.output_place(query_of(self.scope))
        row = visible(principal, Task.objects.all(), self.task_id)
        size = Size(end=row.output_bytes, dropped=row.output_dropped, status=row.status)
        start = cursor_of(self.scope, "")
        if start is None:
            start = place.begin(size.end)
        elif start > size.end:
            raise inputs.beyond_the_end(size.end)
        state = _Place(start=start, strip=place.strip, size=size)
        return Grant(principal=principal.key, interest=self._interest(row), state=state)

    async def _stream(self, grant: Grant, seat: Any) -> None:
        self._offset = grant.state.start
        self._strip = grant.state.strip
        async with reader().watch(self.task_id, grant.state.size, self.call_attention) as self._watched:
            await super()._stream(grant, seat)

    async def opening(self, grant: Grant) -> list[bytes]:
        data = {"offset": self._offset, "status": grant.state.size.status, "server_time": now_text()}
        return [sse.frame("ready", data, id=self._offset, retry_ms=random.randint(500, 1500))]

    async def encode(self, batch: Sequence[Envelope], grant: Grant) -> bytes:
        assert self._watched is not None
        if any(envelope.name == "task.deleted" for envelope in batch):
            self._watched.gone = True
            self._watched.call()
        reader().look()
        return b""

    async def more(self) -> bytes | None:
        watched = self._watched
        assert watched is not None
        size = watched.size
        try:
            if watched.gone:
                raise Gone(self.task_id)
            if self._offset < size.end:
                frame, offset = await reader().frame(self.task_id, self._offset, size, strip=self._strip)
                if offset > self._offset:
                    self._offset = offset
                    # A reader that takes everything at once is not the only one here.
                    await asyncio.sleep(0)
                    return frame
            if size.dropped and not self._told_cut:
                self._told_cut = True
                return sse.frame("cut", {"at": size.end, "dropped": size.dropped})
            if size.is_over:
                self.farewell = sse.frame("end", await reader().ending(self.task_id, watched))
                self.finished = True
                return b""
        except Gone:
            self.farewell = _end("deleted")
            self.finished = True
            return b""
        return None


class InputsConsumer(_TaskStream):
    """``GET /api/work/{id}/inputs``: what is sent to a task, for the program that holds it.

    ``id:`` is the number of the input. A new stream brings again what was not reported as taken, unless ``Last-Event-ID`` says that it has come.
    ``kill`` says that somebody wants the task to end; ``end`` that the program does not hold it any more.
    """

    KNOWN = frozenset({"worker", "attempt"})

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._hold: Hold | None = None
        self._sent = 0
        self._kill_told = False
        self._news = True

    def _grant(self, principal: Principal) -> Grant:
        row = operable(principal, Task.objects.all(), self.task_id)
        query = inputs.holder_of(query_of(self.scope))
        worker = access.worker_name(principal, query.worker)
        hold = tasks.held(task_id=row.id, worker=worker, attempt=query.attempt)
        state = (hold, cursor_of(self.scope, "") or 0)
        return Grant(principal=principal.key, interest=self._interest(row), state=state)

    async def opening(self, grant: Grant) -> list[bytes]:
        self._hold, self._sent = grant.state
        data = {"server_time": now_text(), "heartbeat_seconds": settings.HEARTBEAT_SECONDS}
        return [sse.frame("ready", data, retry_ms=random.randint(500, 1500))]

    async def encode(self, batch: Sequence[Envelope], grant: Grant) -> bytes:
        self._news = True
        return b""

    async def more(self) -> bytes | None:
        if not self._news:
            return None
        self._news = False
        hold, sent = self._hold, self._sent
        assert hold is not None
        try:
            waiting, row = await units.desk().look(lambda: _sent_to(hold, sent))
        except Exception:
            # The next look tries again.
            self._news = True
            raise
        if waiting is None:
            status = row.status if row is not None else None
            self.farewell = _end("over" if status in TASK_END else "lease_lost", status=status)
            self.finished = True
            return b""
        frames = []
        for each in waiting:
            self._sent = each.number
            frames.append(sse.frame("input", _shown(each), id=min(each.number, MAX_CURSOR)))
        if row is not None and row.kill_requested_at is not None and not self._kill_told:
            self._kill_told = True
            data = {"requested_by": row.kill_requested_by, "reason": row.kill_reason}
            frames.append(sse.frame("kill", data))
        return b"".join(frames) or None


def _sent_to(hold: Hold, after: int) -> tuple[list[task_inputs.Input] | None, Task | None]:
    """What waits (None: the task is held by somebody else, or by nobody), and the task, if there is one."""
    try:
        waiting = task_inputs.peek_inputs(hold=hold, after=after)
    except LeaseLost:
        waiting = None
    return waiting, Task.objects.filter(pk=hold.task_id).first()


def _shown(each: task_inputs.Input) -> dict[str, Any]:
    """An input as the program gets it."""
    if each.keys:
        return {"number": each.number, "kind": each.kind, "keys": list(each.keys)}
    if each.rows:
        return {"number": each.number, "kind": each.kind, "rows": each.rows, "cols": each.cols}
    return {"number": each.number, "kind": each.kind, "text": each.text, "submit": each.submit}
