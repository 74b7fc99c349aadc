"""The streams of a task without sockets: every byte once from any offset, one look for all, and how they end."""

from __future__ import annotations

import asyncio
import base64
import random
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import pytest_asyncio
from asgiref.sync import sync_to_async
from channels.db import database_sync_to_async
from django.contrib.auth.models import Group, User
from django.db import connections as databases
from django.utils import timezone

from connections import outputs, registry, task_inputs, task_streams, tasks, transitions
from connections.access import of_user
from connections.models import ApiKey, Task
from connections.task_streams import InputsConsumer, OutputConsumer, wants_stream
from connections.tasks import Hold
from connections.terminal.ansi import plain
from events import consumers
from events.sse import Parser, ServerSentEvent
from tests.connections.task_support import end, held, new_task, write
from tests.connections.worker_support import in_db

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.asyncio]


class Reading:
    """The server's side of one stream, and the page's: what came, and where it would go on."""

    def __init__(
        self,
        task_id: str,
        key: str,
        query: str = "",
        *,
        last: int | None = None,
        consumer: Any = OutputConsumer,
        stop_after: str = "",
    ) -> None:
        self.stop_after = stop_after
        self.sent: list[dict[str, Any]] = []
        self.may_send = asyncio.Event()
        self.may_send.set()
        self.parser = Parser()
        self.events: list[ServerSentEvent] = []
        self.inbox: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        headers = [(b"authorization", f"Bearer {key}".encode())]
        if last is not None:
            headers.append((b"last-event-id", str(last).encode()))
        scope = {
            "type": "http", "method": "GET", "headers": headers, "query_string": query.encode(), "path": "/", "client": ("127.0.0.1", 1),
            "url_route": {"kwargs": {"task_id": task_id}},
        }  # fmt: skip
        self.task = asyncio.create_task(consumer()(scope, self.inbox.get, self.send))

    async def send(self, message: dict[str, Any]) -> None:
        self.sent.append(message)
        told = list(self.parser.feed(message.get("body", b"")))
        self.events.extend(told)
        if any(event.name == self.stop_after for event in told):
            self.may_send.clear()
        if message.get("body"):
            await self.may_send.wait()

    @property
    def status(self) -> int | None:
        return self.sent[0]["status"] if self.sent else None

    @property
    def names(self) -> list[str]:
        return [event.name for event in self.events]

    @property
    def data(self) -> bytes:
        return b"".join(base64.b64decode(e.json()["data"]) for e in self.events if e.name == "output")

    @property
    def text(self) -> str:
        return "".join(event.json()["text"] for event in self.events if event.name == "output")

    @property
    def place(self) -> int:
        return int(self.parser.last_event_id)

    @property
    def over(self) -> bool:
        return any(m["type"] == "http.response.body" and not m.get("more_body") for m in self.sent)

    async def until(self, condition: Callable[[], Any]) -> Any:
        async with asyncio.timeout(30):
            while not (value := condition()):
                await asyncio.sleep(0.005)
        return value

    async def named(self, name: str) -> Any:
        found = await self.until(lambda: next((e for e in self.events if e.name == name), None))
        return found.json()

    async def leave(self) -> None:
        self.inbox.put_nowait({"type": "http.disconnect"})
        async with asyncio.timeout(10):
            await self.task


@pytest_asyncio.fixture(autouse=True)
async def _nothing_is_left() -> AsyncIterator[None]:
    yield
    async with asyncio.timeout(10):
        while len(asyncio.all_tasks()) > 1:
            await asyncio.sleep(0.01)
    assert consumers.streams().total == 0
    assert len(task_streams.reader()) == 0
    # What the units of work left open, in the thread that they share.
    await sync_to_async(databases.close_all)()


async def key_of(user: User) -> str:
    _, plain_key = await in_db(registry.create_api_key, owner_id=user.pk, name="k", now=timezone.now())
    return plain_key


@pytest_asyncio.fixture
async def key(owner: User) -> str:
    return await key_of(owner)


@pytest_asyncio.fixture
async def hold(owner: User) -> Hold:
    return await in_db(held, owner)


async def test_C50_what_is_there_comes_first_then_what_is_written_and_then_the_end(
    hold: Hold, key: str
) -> None:
    await in_db(write, hold, b"before \xff\x00")
    reading = Reading(hold.task_id, key)
    await reading.until(lambda: reading.data == b"before \xff\x00")
    await in_db(write, hold, "after é".encode())
    await reading.until(lambda: reading.data == b"before \xff\x00" + "after é".encode())
    await in_db(end, hold, exit_code=3, error_code="exit_code", error="exited with 3")
    ended = await reading.named("end")
    assert ended == {
        "status": "failed", "exit_code": 3, "signal": None, "error_code": "exit_code", "error": "exited with 3", "dropped": 0,
    }  # fmt: skip
    await reading.until(lambda: reading.over)
    assert reading.names[0] == "ready"
    assert reading.events[0].json()["offset"] == 0
    assert reading.place == 17
    headers = {name.lower(): value for name, value in reading.sent[0]["headers"]}
    assert headers[b"content-type"] == b"text/event-stream"
    await reading.leave()


async def test_C51_of_a_task_that_has_ended_everything_comes_and_the_stream_ends_at_once(
    hold: Hold, key: str
) -> None:
    await in_db(write, hold, b"x" * 100_000)
    await in_db(end, hold)
    reading = Reading(hold.task_id, key, "from=99990")
    await reading.until(lambda: reading.over)
    assert (reading.data, reading.names) == (b"x" * 10, ["ready", "output", "end"])
    await reading.leave()


@pytest.mark.parametrize(
    ("query", "last", "expected"),
    [("", None, b"0123456789"), ("from=start", None, b"0123456789"), ("from=4", None, b"456789"), ("tail=3", None, b"789"), ("from=live", None, b""),
     ("from=4", 7, b"789"), ("tail=3", 0, b"0123456789"), ("from=live", 9, b"9"), ("from=10", None, b"")],
)  # fmt: skip
async def test_C44_where_a_stream_begins(
    hold: Hold, key: str, query: str, last: int | None, expected: bytes
) -> None:
    await in_db(write, hold, b"0123456789")
    reading = Reading(hold.task_id, key, query, last=last)
    await reading.named("ready")
    await in_db(write, hold, b"!")
    await reading.until(lambda: reading.data.endswith(b"!"))
    assert reading.data == expected + b"!"
    await reading.leave()


async def test_who_begins_at_the_present_and_is_cut_off_misses_nothing(hold: Hold, key: str) -> None:
    """The first frame names the place: an EventSource that comes back asks for the same address, and says where it was."""
    await in_db(write, hold, b"old")
    reading = Reading(hold.task_id, key, "from=live")
    await reading.named("ready")
    await reading.leave()
    await in_db(write, hold, b"new")
    again = Reading(hold.task_id, key, "from=live", last=reading.place)
    await again.until(lambda: again.data == b"new")
    await again.leave()


@pytest.mark.parametrize("seed", range(4))
async def test_C50_over_reconnects_at_random_places_every_byte_comes_once(
    hold: Hold, key: str, seed: int
) -> None:
    chance = random.Random(seed)
    data = chance.randbytes(700_000)
    written = 0
    found = bytearray()
    place = 0
    while place < len(data):
        if written < len(data):
            size = chance.choice([1, 100, 5_000, 70_000, 300_000])
            await in_db(write, hold, data[written : written + size])
            written = min(len(data), written + size)
        reading = Reading(hold.task_id, key, last=place)
        wanted = chance.randint(place, written)
        await reading.until(lambda r=reading, w=wanted: r.status and r.parser.last_event_id and r.place >= w)
        await reading.leave()
        found += reading.data
        assert reading.place == len(found)
        place = reading.place
    assert bytes(found) == data


def kill(hold: Hold, user: User, reason: str) -> None:
    transitions.kill_task(task_id=hold.task_id, actor=of_user(user), reason=reason, now=timezone.now())


WRITTEN = (
    "\x1b[1;31mrot\x1b[0m größer ✔ 🙂\r\n\x1b]0;a title\x07\x1b[2K\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\".encode()
    + b"\xff\xe2\x82"
) * 800


@pytest.mark.parametrize("seed", range(4))
async def test_C50_stripped_the_text_is_the_same_over_reconnects_within_sequences_and_characters(
    hold: Hold, key: str, seed: int
) -> None:
    chance = random.Random(seed)
    text, place, written = "", 0, 0
    while written < len(WRITTEN):
        size = chance.choice([1, 3, 7, 500, 40_000])
        await in_db(write, hold, WRITTEN[written : written + size])
        written = min(len(WRITTEN), written + size)
        if chance.random() < 0.4:
            reading = Reading(hold.task_id, key, "ansi=strip", last=place)
            # All but what may still become something else.
            await reading.until(lambda r=reading, w=written: r.parser.last_event_id and r.place >= w - 40)
            await reading.leave()
            text, place = text + reading.text, reading.place
    await in_db(end, hold)
    reading = Reading(hold.task_id, key, "ansi=strip", last=place)
    await reading.until(lambda: reading.over)
    await reading.leave()
    assert text + reading.text == plain(WRITTEN, final=True)[0]


async def test_a_sequence_over_the_border_of_a_frame_does_not_stop_a_stripped_stream(
    hold: Hold, key: str
) -> None:
    border = task_streams.FRAME
    for lead in (border - 3, border - 16_000, 2 * border - 1):
        await in_db(
            write, hold, b"x" * (lead % border) + b"\x1b]0;" + b"t" * 16_000 + b"\x07" + b"y" * border
        )
    await in_db(end, hold)
    reading = Reading(hold.task_id, key, "ansi=strip")
    await reading.until(lambda: reading.over)
    whole = await in_db(outputs.read, hold.task_id, 0, 1 << 30)
    assert reading.text == plain(whole, final=True)[0]
    await reading.leave()


async def test_the_limit_is_shown_where_it_was_reached(hold: Hold, key: str, settings: Any) -> None:
    settings.COMMAND_OUTPUT_BYTES = 1024
    reading = Reading(hold.task_id, key)
    await in_db(write, hold, b"x" * 1500)
    assert await reading.named("cut") == {"at": 1024, "dropped": 476}
    await in_db(write, hold, b"x" * 500)
    await in_db(end, hold)
    assert (await reading.named("end"))["dropped"] == 976
    assert (reading.data, reading.names.count("cut")) == (b"x" * 1024, 1)
    await reading.leave()


async def test_many_readers_of_one_task_cost_one_look_and_one_read(
    hold: Hold, key: str, monkeypatch: pytest.MonkeyPatch, settings: Any
) -> None:
    settings.STREAM_LIMIT = 200
    looks, reads = [], []
    sizes, read = outputs.sizes, outputs.read
    monkeypatch.setattr(outputs, "sizes", lambda ids: looks.append(1) or sizes(ids))
    monkeypatch.setattr(outputs, "read", lambda *words: reads.append(words) or read(*words))
    readings = [Reading(hold.task_id, key, "from=live") for _ in range(100)]
    for reading in readings:
        await reading.named("ready")
    data = b"0123456789" * 3000
    looks.clear()
    reads.clear()
    await in_db(write, hold, data)
    for reading in readings:
        await reading.until(lambda r=reading: r.data == data)
    assert len(reads) == 1
    assert (
        len({id(m["body"]) for r in readings for m in r.sent if b"event: output" in m.get("body", b"")}) == 1
    )
    await asyncio.gather(*(reading.leave() for reading in readings))


async def test_C12_a_reader_that_takes_nothing_keeps_one_piece_and_nobody_waits_for_it(
    hold: Hold, key: str
) -> None:
    slow, quick = Reading(hold.task_id, key), Reading(hold.task_id, key)
    await slow.named("ready")
    slow.may_send.clear()
    data = random.Random(1).randbytes(3_000_000)
    for start in range(0, len(data), 250_000):
        await in_db(write, hold, data[start : start + 250_000])
    await quick.until(lambda: len(quick.data) == len(data))
    assert sum(len(message.get("body", b"")) for message in slow.sent) < 2 * task_streams.FRAME
    slow.may_send.set()
    await slow.until(lambda: len(slow.data) == len(data))
    assert slow.data == quick.data == data
    await asyncio.gather(slow.leave(), quick.leave())


async def test_C07_a_silent_stream_beats(hold: Hold, key: str, settings: Any) -> None:
    settings.HEARTBEAT_SECONDS = 0.5
    reading = Reading(hold.task_id, key)
    await reading.named("heartbeat")
    await reading.leave()


async def test_a_status_alone_writes_nothing_and_a_kill_ends_the_stream(
    hold: Hold, key: str, owner: User
) -> None:
    reading = Reading(hold.task_id, key)
    await reading.named("ready")
    await in_db(kill, hold, owner, "x")
    await in_db(end, hold, signal="SIGTERM")
    assert (await reading.named("end"))["status"] == "killed"
    assert reading.names == ["ready", "end"]
    await reading.leave()


async def test_C59_a_task_that_is_deleted_takes_its_streams_along(hold: Hold, key: str) -> None:
    await in_db(write, hold, b"x" * 500_000)
    reading = Reading(hold.task_id, key, stop_after="ready")
    await reading.named("ready")
    await in_db(end, hold)
    await in_db(tasks.delete, task_id=hold.task_id, actor="owner", now=timezone.now())
    reading.may_send.set()
    assert await reading.named("end") == {"reason": "deleted", "reconnect": False}
    await reading.leave()


@pytest.mark.parametrize(
    ("query", "last", "code"),
    [("from=x", None, "invalid_request"), ("ansi=x", None, "invalid_request"), ("from=11", None, "invalid_offset"), ("", 11, "invalid_offset"),
     ("frm=1", None, "invalid_parameter"), ("limit=1", None, "invalid_parameter")],
)  # fmt: skip
async def test_what_is_no_place_is_refused_before_the_first_byte(
    hold: Hold, key: str, query: str, last: int | None, code: str
) -> None:
    await in_db(write, hold, b"0123456789")
    reading = Reading(hold.task_id, key, query, last=last)
    await reading.until(lambda: reading.over)
    assert reading.status == 400
    assert code.encode() in reading.sent[1]["body"]
    await reading.leave()


async def test_C60_only_who_may_see_a_task_sees_its_output(hold: Hold, owner: User, stranger: User) -> None:
    await in_db(write, hold, b"secret")
    for key, status in ((await key_of(stranger), 404), ("sk_wrong", 401)):
        reading = Reading(hold.task_id, key)
        await reading.until(lambda r=reading: r.over)
        assert (reading.status, b"secret" in b"".join(m.get("body", b"") for m in reading.sent)) == (
            status,
            False,
        )
        await reading.leave()

    def in_one_team() -> None:
        team = Group.objects.create(name="lookers")
        owner.groups.add(team)
        stranger.groups.add(team)

    await in_db(in_one_team)
    looker = Reading(hold.task_id, await key_of(stranger))
    await looker.until(lambda: looker.data == b"secret")
    await looker.leave()


async def test_C60_who_may_not_see_it_any_more_is_shown_no_more(hold: Hold, key: str, settings: Any) -> None:
    settings.HEARTBEAT_SECONDS = 0.5
    reading = Reading(hold.task_id, key)
    await reading.named("ready")
    await database_sync_to_async(lambda: ApiKey.objects.update(revoked_at=timezone.now()))()
    assert (await reading.named("end"))["reason"] == "session_over"
    await reading.leave()


@pytest.mark.parametrize(
    ("accept", "query", "method", "wanted"),
    [(b"text/event-stream", b"", "GET", True), (b"*/*", b"stream=1", "GET", True), (b"*/*", b"", "GET", False), (b"*/*", b"stream=0", "GET", False),
     (b"text/event-stream", b"", "HEAD", False), (b"text/event-stream", b"", "POST", False)],
)  # fmt: skip
async def test_the_stream_is_for_whoever_asks_for_it(
    accept: bytes, query: bytes, method: str, wanted: bool
) -> None:
    scope = {"method": method, "headers": [(b"accept", accept)], "query_string": query}
    assert wants_stream(scope) is wanted


# ── What is sent to a task ────────────────────────────────────────────────────────────────────────────────────────


async def claimed(owner: User, key: str) -> tuple[Hold, str]:
    """A task in the hands of the program that has this key."""
    row = await in_db(ApiKey.objects.get)

    def take() -> Hold:
        new_task(owner)
        found = tasks.claim(worker=f"key:{row.pk}/w1", kinds=["build"], now=timezone.now())
        assert found is not None
        return found

    return await in_db(take), "worker=w1&attempt=1"


async def send(hold: Hold, content: Any, **more: Any) -> None:
    await in_db(
        task_inputs.add_input, task_id=hold.task_id, content=content, message_id=f"m{content}", actor="o", now=timezone.now(), **more
    )  # fmt: skip


async def test_B37_inputs_come_in_order_and_again_until_they_are_reported_as_taken(
    owner: User, key: str
) -> None:
    hold, query = await claimed(owner, key)
    await send(hold, "one")
    reading = Reading(hold.task_id, key, query, consumer=InputsConsumer)
    await reading.named("input")
    await send(hold, ["up", "enter"], kind="keys", submit=False)
    await send(hold, [24, 80], kind="resize", submit=False)
    await reading.until(lambda: reading.names.count("input") == 3)
    shown = [event.json() for event in reading.events if event.name == "input"]
    assert shown == [
        {"number": 1, "kind": "text", "text": "one", "submit": True},
        {"number": 2, "kind": "keys", "keys": ["up", "enter"]},
        {"number": 3, "kind": "resize", "rows": 24, "cols": 80},
    ]
    assert reading.place == 3
    await reading.leave()
    await in_db(task_inputs.inputs_taken, hold=hold, through=1, now=timezone.now())
    again = Reading(hold.task_id, key, query, consumer=InputsConsumer)
    await again.until(lambda: again.names.count("input") == 2)
    assert [event.id for event in again.events if event.name == "input"] == ["2", "3"]
    await again.leave()
    later = Reading(hold.task_id, key, query, last=2, consumer=InputsConsumer)
    await later.named("input")
    assert later.place == 3
    await later.leave()


async def test_a_kill_and_the_end_of_a_hold_are_told_to_the_program(owner: User, key: str) -> None:
    hold, query = await claimed(owner, key)
    reading = Reading(hold.task_id, key, query, consumer=InputsConsumer)
    await reading.named("ready")
    await in_db(kill, hold, owner, "enough")
    assert await reading.named("kill") == {"requested_by": "owner", "reason": "enough"}
    await in_db(end, hold)
    assert await reading.named("end") == {"reason": "over", "reconnect": False, "status": "killed"}
    await reading.leave()
    late = Reading(hold.task_id, key, query, consumer=InputsConsumer)
    await late.until(lambda: late.over)
    assert late.status == 409
    assert b"lease_lost" in late.sent[1]["body"]
    await late.leave()


async def test_a_program_that_lost_its_task_is_told(owner: User, key: str) -> None:
    hold, query = await claimed(owner, key)
    reading = Reading(hold.task_id, key, query, consumer=InputsConsumer)
    await reading.named("ready")
    await in_db(tasks.release, hold=hold, now=timezone.now())
    assert await reading.named("end") == {"reason": "lease_lost", "reconnect": False, "status": "queued"}
    await reading.leave()


async def test_C60_what_is_sent_goes_to_the_program_that_holds_the_task_alone(
    owner: User, colleague: User, stranger: User, key: str
) -> None:
    hold, query = await claimed(owner, key)
    await send(hold, "a password")
    for user, status in ((stranger, 404), (colleague, 409), (owner, 409)):
        reading = Reading(hold.task_id, await key_of(user), query, consumer=InputsConsumer)
        await reading.until(lambda r=reading: r.over)
        assert reading.status == status
        assert b"a password" not in b"".join(m.get("body", b"") for m in reading.sent)
        await reading.leave()
    for wrong in (
        "worker=w1",
        "attempt=1",
        "worker=w1&attempt=x",
        "worker=w1&attempt=2",
        "worker=w2&attempt=1",
    ):
        reading = Reading(hold.task_id, key, wrong, consumer=InputsConsumer)
        await reading.until(lambda r=reading: r.over)
        assert reading.status in (400, 409)
        await reading.leave()
    assert (await in_db(Task.objects.get)).inputs_waiting == 1
