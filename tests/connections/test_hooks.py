"""Reports of ended tasks: the outbox under race and death, and what is sent, to real receivers on the loopback address."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import datetime as dt
import logging
import threading
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import standardwebhooks
from django.conf import settings as project
from django.contrib.auth.models import User
from django.db import connections as databases
from django.utils import timezone

from connections import hooks, payloads, reconciler, tasks, vault
from connections.drivers import network
from connections.hooks import BACKOFF, LEASE, Report
from connections.models import HookDelivery, Task
from connections.runners import hook as runner
from connections.runners.hook import Deliverer, Outcome, judged
from connections.states import HookState, TaskKind, TaskStatus
from tests.connections.flow_support import T0, after, cursor, events
from tests.connections.hook_support import SECRET, Came, Say, receiver
from tests.connections.worker_support import in_db, until_db

README = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
SECRET_QUERY = "token=do-not-show-me"


def ended(
    owner: User, url: str, *, secret: str = SECRET, now: dt.datetime = T0, title: str = "A task"
) -> Task:
    """A command with a hook that has run to its end."""
    row = tasks.create(
        owner_id=owner.pk,
        kind=TaskKind.COMMAND,
        title=title,
        spec={"argv": ["true"]},
        hook_url=url,
        hook_secret=secret,
        actor="owner",
        now=now,
    )
    hold = tasks.claim(worker="runner", kinds=[TaskKind.COMMAND], now=now)
    assert hold is not None
    assert hold.task_id == row.id
    return tasks.settle(hold=hold, exit_code=0, now=now)


def delivery(task: Task) -> HookDelivery:
    return HookDelivery.objects.get(task=task)


def claimed(now: dt.datetime = T0, worker: str = "w1") -> Report:
    found = hooks.claim(worker=worker, now=now)
    assert found is not None
    return found


# ── Secrets ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_new_secret_is_one_that_is_accepted_and_never_the_same() -> None:
    made = {hooks.new_secret() for _ in range(20)}
    assert len(made) == 20
    assert {hooks.checked_secret(secret) for secret in made} == made
    assert len(base64.b64decode(made.pop().removeprefix("whsec_"))) == 32


@pytest.mark.parametrize(
    "text",
    [
        "",
        "whsec_",
        "secret",
        base64.b64encode(b"x" * 32).decode(),
        "whsec_" + base64.b64encode(b"x" * 23).decode(),
        "whsec_" + base64.b64encode(b"x" * 65).decode(),
        "whsec_not base64 at all, but long enough",
        "whsec_ümläut",
    ],
)
def test_a_secret_of_another_form_is_refused_without_being_repeated(text: str) -> None:
    with pytest.raises(ValueError) as refused:
        hooks.checked_secret(text)
    assert "24 to 64 bytes" in str(refused.value)
    assert not text or text == "whsec_" or text not in str(refused.value)


def test_C31_the_signature_is_the_one_of_the_library_of_standard_webhooks() -> None:
    body = '{"a":"ü"}'
    moment = dt.datetime(2026, 3, 1, 12, tzinfo=dt.UTC)
    theirs = standardwebhooks.Webhook(SECRET).sign("msg_1", moment, body)
    ours = hooks.signature(SECRET, message_id="msg_1", timestamp=int(moment.timestamp()), body=body.encode())
    assert ours == theirs


# ── The outbox ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_C25_the_end_of_a_task_whose_worker_died_is_reported_too(owner: User) -> None:
    row = tasks.create(
        owner_id=owner.pk, kind=TaskKind.COMMAND, title="A task", spec={"argv": ["true"]},
        hook_url="http://127.0.0.1:9/hook", hook_secret=SECRET, actor="owner", now=T0,
    )  # fmt: skip
    assert tasks.claim(worker="dead", kinds=[TaskKind.COMMAND], now=T0) is not None
    lost = after(project.LEASE_SECONDS)
    assert reconciler.rescue_tasks(lost) == 1
    assert claimed(lost).body["type"] == "task.failed"
    assert HookDelivery.objects.get().task_id == row.id


def test_a_task_without_a_hook_has_nothing_to_report(owner: User) -> None:
    row = ended(owner, "")
    assert not HookDelivery.objects.exists()
    with pytest.raises(hooks.NoHook):
        hooks.redeliver(task_id=row.id, actor="owner", now=T0)


def test_C28_the_report_is_written_with_the_end_and_counted_before_it_is_sent(owner: User) -> None:
    row = ended(owner, "http://127.0.0.1:9/hook")
    report = claimed(after(1))
    assert (report.attempt, report.owner_id, report.secret) == (1, owner.pk, SECRET)
    kept = delivery(row)
    assert (kept.state, kept.attempts, kept.lease_expires_at) == (HookState.PENDING, 1, after(1) + LEASE)
    assert hooks.claim(worker="w2", now=after(1)) is None, "nobody else has it"
    assert SECRET not in repr(report)


def test_the_body_is_the_same_at_every_try(owner: User) -> None:
    row = ended(owner, "http://127.0.0.1:9/hook")
    first = claimed()
    hooks.refused(report=first, status=500, error="no", final=False, now=T0)
    again = claimed(after(3600))
    assert runner.encoded(first) == runner.encoded(again)
    row.refresh_from_db()
    shown = dict(payloads.task(row))
    for lively in ("hook", "version", "updated_at"):
        del shown[lively]
    assert again.body == {"type": "task.completed", "timestamp": "2026-03-01T12:00:00.000Z", "data": shown}


def test_C28_of_many_workers_at_once_each_report_is_taken_by_one_and_none_is_passed_by(
    transactional_db: Any, owner: User
) -> None:
    rows = [ended(owner, f"http://127.0.0.1:9/{n}") for n in range(8)]
    barrier = threading.Barrier(8)

    def take(n: int) -> list[str]:
        barrier.wait(20)
        found: list[str] = []
        try:
            # Each asks once: who is not the quickest goes on to the next report instead of leaving empty-handed.
            report = hooks.claim(worker=f"w{n}", now=T0)
            if report is not None:
                found.append(report.id)
        finally:
            databases.close_all()
        return found

    with ThreadPoolExecutor(8) as pool:
        taken = [pk for job in [pool.submit(take, n) for n in range(8)] for pk in job.result()]
    assert sorted(taken) == sorted(delivery(row).pk for row in rows)


def test_C28_who_finds_a_report_taken_goes_on_to_the_next(
    owner: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = ended(owner, "http://127.0.0.1:9/1"), ended(owner, "http://127.0.0.1:9/2", now=after(1))
    quicker: list[Report] = []
    token = hooks.secrets.token_hex

    def while_it_looks(size: int) -> str:
        if not quicker:
            quicker.append(None)  # type: ignore[arg-type]
            quicker[0] = claimed(after(2), "quicker")
        return token(size)

    monkeypatch.setattr(hooks.secrets, "token_hex", while_it_looks)
    mine = claimed(after(2))
    assert (quicker[0].id, mine.id) == (delivery(first).pk, delivery(second).pk)


def test_C29_a_lease_that_ran_out_is_taken_up_by_another_under_the_same_id(owner: User) -> None:
    row = ended(owner, "http://127.0.0.1:9/hook")
    lost = claimed()
    assert hooks.claim(worker="w2", now=T0 + LEASE - dt.timedelta(seconds=1)) is None
    found = claimed(T0 + LEASE, "w2")
    assert (found.id, found.attempt) == (lost.id, 2)
    mark = cursor()
    assert not hooks.delivered(report=lost, status=200, now=T0 + LEASE), "its word does not count any more"
    assert (delivery(row).state, events(mark)) == (HookState.PENDING, [])
    assert hooks.delivered(report=found, status=204, now=T0 + LEASE)
    assert (delivery(row).state, delivery(row).last_status) == (HookState.DELIVERED, 204)
    assert [(event.name, event.data["hook"]["state"]) for event in events(mark)] == [
        ("task.updated", "delivered")
    ]


def test_C29_a_worker_that_lost_its_lease_and_claims_anew_is_not_taken_for_its_older_self(
    owner: User,
) -> None:
    row = ended(owner, "http://127.0.0.1:9/hook")
    old = claimed()
    hooks.redeliver(task_id=row.id, actor="owner", now=T0 + LEASE)
    new = claimed(T0 + LEASE)
    assert (old.worker, old.attempt) == (new.worker, new.attempt), "only the lease tells them apart"
    assert not hooks.refused(report=old, status=400, error="no", final=True, now=T0 + LEASE)
    assert hooks.delivered(report=new, status=200, now=T0 + LEASE)


def test_C29_a_report_whose_workers_die_every_time_is_given_up_visibly(owner: User) -> None:
    row = ended(owner, "http://127.0.0.1:9/hook")
    now = T0
    for attempt in range(1, project.HOOK_ATTEMPTS + 1):
        assert claimed(now).attempt == attempt
        now += LEASE
    assert hooks.claim(worker="w", now=now) is None
    kept = delivery(row)
    assert (kept.state, kept.leased_by) == (HookState.FAILED, "")
    assert "Whether it arrived is not known" in kept.last_error
    hooks.redeliver(task_id=row.id, actor="owner", now=now)
    assert claimed(now).attempt == 1


def test_a_worker_that_stops_leaves_its_report_to_the_next_at_once(owner: User) -> None:
    row = ended(owner, "http://127.0.0.1:9/hook")
    left = claimed()
    assert hooks.release(report=left, now=after(1))
    assert claimed(after(1), "w2").attempt == 2, "it may have arrived, so it counts"
    assert not hooks.release(report=left, now=after(1))
    assert delivery(row).leased_by.startswith("w2/")


def test_C30_each_try_waits_longer_until_there_were_enough(owner: User) -> None:
    row = ended(owner, "http://127.0.0.1:9/hook")
    now = T0
    for attempt in range(1, project.HOOK_ATTEMPTS):
        hooks.refused(report=claimed(now), status=503, error="busy", final=False, now=now)
        kept = delivery(row)
        assert kept.next_attempt_at is not None
        pause = kept.next_attempt_at - now
        expected = BACKOFF[min(attempt, len(BACKOFF)) - 1]
        assert expected * 0.9 <= pause <= expected * 1.1
        assert hooks.claim(worker="w", now=kept.next_attempt_at - dt.timedelta(seconds=1)) is None
        now = kept.next_attempt_at
    hooks.refused(report=claimed(now), status=503, error="busy", final=False, now=now)
    kept = delivery(row)
    assert (kept.state, kept.attempts, kept.next_attempt_at) == (
        HookState.FAILED,
        project.HOOK_ATTEMPTS,
        None,
    )
    row.refresh_from_db()
    hook: Any = payloads.task(row)["hook"]
    assert (hook["state"], hook["last_status"], hook["last_error"]) == ("failed", 503, "busy")


def test_C30_a_receiver_that_says_when_is_believed_within_limits(owner: User) -> None:
    rows = [ended(owner, f"http://127.0.0.1:9/{n}") for n in range(3)]
    waits = [dt.timedelta(seconds=1), dt.timedelta(seconds=90), dt.timedelta(days=9)]
    for wait in waits:
        hooks.refused(report=claimed(), status=429, error="later", final=False, retry_after=wait, now=T0)
    due = sorted(delivery(row).next_attempt_at - T0 for row in rows)  # type: ignore[operator]
    assert due[0] >= BACKOFF[0] * 0.9, "never sooner than without its word"
    assert due[1:] == [waits[1], hooks.LONGEST_WAIT]


def test_C30_redelivery_by_hand_starts_a_new_round_and_hurries_one_that_waits(owner: User) -> None:
    row = ended(owner, "http://127.0.0.1:9/hook")
    with pytest.raises(Task.DoesNotExist):
        hooks.redeliver(task_id="task_none", actor="owner", now=T0)
    first = claimed()
    under_way = hooks.redeliver(task_id=row.id, actor="owner", now=after(1))
    assert (under_way.attempts, under_way.leased_by) == (1, first.lease), "it is being sent at this moment"
    hooks.refused(report=first, status=500, error="no", final=False, now=after(2))
    mark = cursor()
    hurried = hooks.redeliver(task_id=row.id, actor="owner", now=after(3))
    assert (hurried.attempts, hurried.next_attempt_at) == (0, after(3))
    assert [(event.name, event.actor) for event in events(mark)] == [("task.updated", "owner")]
    second = claimed(after(3))
    assert (second.id, second.attempt) == (first.id, 1)
    hooks.delivered(report=second, status=200, now=after(4))
    hooks.redeliver(task_id=row.id, actor="owner", now=after(5))
    kept = delivery(row)
    assert (kept.state, kept.delivered_at) == (HookState.PENDING, None)
    assert claimed(after(5)).id == first.id


def test_a_task_that_is_deleted_while_its_report_is_sent_takes_it_along(owner: User) -> None:
    row = ended(owner, "http://127.0.0.1:9/hook")
    report = claimed()
    tasks.delete(task_id=row.id, actor="owner", now=T0)
    mark = cursor()
    assert not hooks.delivered(report=report, status=200, now=T0)
    assert not hooks.refused(report=report, status=500, error="no", final=False, now=T0)
    assert not hooks.release(report=report, now=T0)
    assert (hooks.claim(worker="w", now=after(9999)), events(mark)) == (None, [])


def test_a_secret_that_cannot_be_read_fails_that_report_and_no_other(owner: User) -> None:
    broken, empty, fine = (ended(owner, f"http://127.0.0.1:9/{n}", now=after(n)) for n in range(3))
    Task.objects.filter(pk=broken.pk).update(hook_sealed=b"tampered with")
    Task.objects.filter(pk=empty.pk).update(hook_sealed=vault.seal(""))
    assert claimed(after(9)).id == delivery(fine).pk
    assert {delivery(row).state for row in (broken, empty)} == {HookState.FAILED}
    assert "cannot be read" in delivery(broken).last_error


def test_enough_to_one_site_or_of_one_owner_leaves_room_for_others(owner: User, stranger: User) -> None:
    for n, url in enumerate(
        ("http://a.example", "http://a.example/x", "http://a.example?x", "http://a.example.org/x")
    ):
        ended(owner, url, now=after(n))
    other = ended(stranger, "http://a.example/x", now=after(9))
    found = hooks.claim(worker="w", now=after(10), sites=["http://a.example"])
    assert found is not None
    assert found.site == "http://a.example.org"
    theirs = hooks.claim(worker="w", now=after(10), owners=[owner.pk])
    assert theirs is not None
    assert theirs.id == delivery(other).pk


# ── What answers mean ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("status", [200, 201, 202, 204, 299])
def test_C30_every_2xx_has_arrived(status: int) -> None:
    assert judged(status, now=T0) == Outcome(status=status)


@pytest.mark.parametrize(
    ("status", "final"),
    [
        *((status, True) for status in (301, 307, 400, 401, 404, 410, 422)),
        *((status, False) for status in (408, 429, 500, 502, 503, 599)),
    ],
)
def test_C30_4xx_and_redirects_are_final_but_later_means_later(status: int, final: bool) -> None:
    outcome = judged(status, now=T0)
    assert (outcome.status, outcome.final) == (status, final)
    assert str(status) in outcome.error
    assert ("redirects are not followed" in outcome.error) == (300 <= status < 400)


@pytest.mark.parametrize(
    ("status", "text", "seconds"),
    [
        (429, "7", 7),
        (503, " 120 ", 120),
        (503, "Sun, 01 Mar 2026 12:01:00 GMT", 60),
        (503, "Sun, 01 Mar 2026 11:00:00 GMT", 0),
        (503, "99999999999999999999", 10**9),
        (503, "-3", None),
        (503, "soon", None),
        (503, "", None),
        (500, "7", None),
        (400, "7", None),
    ],
)
def test_C30_retry_after_is_read_in_both_forms(status: int, text: str, seconds: int | None) -> None:
    wait = judged(status, text, now=T0).retry_after
    assert wait == (None if seconds is None else dt.timedelta(seconds=seconds))


# ── One POST ──────────────────────────────────────────────────────────────────────────────────────────────────────


def made(url: str, **body: Any) -> Report:
    return Report(
        id="msg_1", owner_id=1, worker="w", lease="w/1", attempt=1, url=url, secret=SECRET, body=body
    )


def sent(report: Report, **client: Any) -> Outcome:
    async def scenario() -> Outcome:
        async with network.GuardedClient(**{"allow_private": True, "seconds": 5, **client}) as guarded:
            return await runner.send(report, guarded, now=timezone.now())

    return asyncio.run(scenario())


def test_C31_a_report_is_a_signed_post_that_an_independent_library_verifies() -> None:
    with receiver(Say(204)) as there:
        assert sent(made(there.url("/a/b?" + SECRET_QUERY), type="task.completed")) == Outcome(status=204)
    (came,) = there.came
    assert came.verified() == {"type": "task.completed"}
    assert came.path == "/a/b?" + SECRET_QUERY
    assert came.headers["content-type"] == "application/json"
    assert came.headers["user-agent"].startswith("Switchboard/")
    assert (came.id, came.headers["webhook-signature"][:3]) == ("msg_1", "v1,")
    with pytest.raises(standardwebhooks.WebhookVerificationError):
        came.verified(hooks.new_secret())


def test_C31_the_ten_lines_of_the_readme_verify_a_report_and_refuse_a_wrong_one() -> None:
    section = README.split("\n## Hooks\n", 1)[1].split("\n## ", 1)[0]
    lines = section.split("```python\n", 1)[1].split("```", 1)[0]
    room: dict[str, Any] = {}
    exec(compile(lines, "README.md", "exec"), room)  # the reader's own program
    with receiver() as there:
        sent(made(there.url(), type="task.completed"))
    (came,) = there.came
    assert room["verified"](SECRET, came.headers, came.body) == {"type": "task.completed"}
    old = {**came.headers, "webhook-timestamp": str(int(came.headers["webhook-timestamp"]) - 301)}
    for secret, headers, body in (
        (hooks.new_secret(), came.headers, came.body),
        (SECRET, came.headers, came.body + b" "),
        (SECRET, old, came.body),
    ):
        with pytest.raises(ValueError):
            room["verified"](secret, headers, body)


def test_C31_a_redirect_is_not_followed() -> None:
    with receiver() as other, receiver(Say(307, {"Location": other.url()})) as there:
        outcome = sent(made(there.url()))
    assert (outcome.status, outcome.final) == (307, True)
    assert (len(there.came), other.came) == (1, [])


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]", "localhost", "[::ffff:127.0.0.1]", "169.254.169.254"])
def test_C31_private_addresses_are_refused_for_good(host: str) -> None:
    with receiver() as there:
        outcome = sent(made(f"http://{host}:{there.port}/hook?{SECRET_QUERY}"), allow_private=False)
    assert outcome.final
    assert "not allowed" in outcome.error or "never allowed" in outcome.error
    assert (there.came, SECRET_QUERY in outcome.error) == ([], False)


@pytest.mark.parametrize(
    "url", ["ftp://example.com/x", "file:///etc/passwd", "http://", "http://[::1", "nonsense"]
)
def test_C31_only_http_and_https_are_spoken(url: str) -> None:
    outcome = sent(made(url))
    assert outcome.final
    assert outcome.error


def test_C31_a_name_is_looked_up_once_and_another_answer_a_moment_later_gains_nothing() -> None:
    asked: list[str] = []

    async def rebinding(host: str, port: int) -> Sequence[str]:
        asked.append(host)
        # The first answer is public, every later one is our own machine.
        return ["93.184.215.14"] if len(asked) == 1 else ["127.0.0.1"]

    class Elsewhere(network.httpcore.AsyncNetworkBackend):
        def __init__(self) -> None:
            self.reached: list[str] = []

        async def connect_tcp(self, host: str, port: int, **words: Any) -> Any:
            self.reached.append(host)
            raise network.httpcore.ConnectError

    with receiver() as there:
        backend = Elsewhere()
        report = made(f"http://hooks.example:{there.port}/hook")
        outcome = sent(report, allow_private=False, resolver=rebinding, backend=backend)
        assert not outcome.final
        assert (asked, backend.reached) == (["hooks.example"], ["93.184.215.14"])
        # The next try looks it up anew, and sees where it leads by now.
        again = sent(report, allow_private=False, resolver=rebinding, backend=backend)
    assert again.final
    assert (backend.reached, there.came) == (["93.184.215.14"], [])


def test_C30_nobody_there_and_nobody_answering_is_tried_again() -> None:
    with receiver() as there:
        url = there.url("/hook?" + SECRET_QUERY)
    refused = sent(made(url))
    held = threading.Event()
    with receiver(Say(200, after=held)) as silent:
        late = sent(made(silent.url("/hook?" + SECRET_QUERY)), seconds=0.3)
        held.set()
    for outcome in (refused, late):
        assert (outcome.status, outcome.final) == (None, False)
        assert outcome.error.startswith("127.0.0.1")
        assert SECRET_QUERY not in outcome.error


def test_the_answer_counts_by_its_status_however_long_or_broken_its_body_is() -> None:
    long = Say(200, body=b"x" * 3_000_000)
    broken = Say(
        200, {"Content-Length": "100", "Content-Encoding": "gzip"}, b"not gzip, and shorter than said"
    )
    for say in (long, broken):
        with receiver(say) as there:
            assert sent(made(there.url())) == Outcome(status=200)


# ── The loop ──────────────────────────────────────────────────────────────────────────────────────────────────────


@contextlib.asynccontextmanager
async def at_work(*names: str, **words: Any) -> AsyncIterator[list[Deliverer]]:
    """Deliverers that run inside the block; nothing rings their bells."""
    workers = [Deliverer(worker=name, **words) for name in names]
    running = [asyncio.create_task(worker.run()) for worker in workers]
    try:
        yield workers
    finally:
        for each in running:
            each.cancel()
        await asyncio.wait(running)
        for each in running:
            assert each.cancelled() or each.exception() is None


def all_of(state: HookState) -> bool:
    return not HookDelivery.objects.exclude(state=state).exists()


@pytest.mark.django_db(transaction=True)
def test_C28_with_two_workers_each_report_arrives_exactly_once(owner: User) -> None:
    with receiver() as there:
        rows = [ended(owner, there.url(f"/{n}"), now=timezone.now()) for n in range(20)]

        async def scenario() -> None:
            async with at_work("w1", "w2"):
                await until_db(lambda: all_of(HookState.DELIVERED), 30)

        asyncio.run(scenario())
    assert sorted(came.id for came in there.came) == sorted(delivery(row).pk for row in rows)
    assert {came.verified()["data"]["id"] for came in there.came} == {row.id for row in rows}
    assert set(HookDelivery.objects.values_list("attempts", flat=True)) == {1}


@pytest.mark.django_db(transaction=True)
def test_C30_a_receiver_that_is_busy_at_first_gets_it_later_under_the_same_id(
    owner: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hooks, "BACKOFF", (dt.timedelta(seconds=0.05),))
    monkeypatch.setattr(runner, "LOOK_SECONDS", 0.05)

    def busy_at_first(came: Came, before: int) -> Say:
        return Say(503 if before == 0 else 500 if before == 1 else 200)

    with receiver(busy_at_first) as there:
        row = ended(owner, there.url(), now=timezone.now())

        async def scenario() -> None:
            async with at_work("w1"):
                await until_db(lambda: all_of(HookState.DELIVERED))

        asyncio.run(scenario())
    assert [came.id for came in there.came] == [delivery(row).pk] * 3
    assert len({came.body for came in there.came}) == 1
    assert delivery(row).attempts == 3


@pytest.mark.django_db(transaction=True)
def test_one_slow_receiver_does_not_hold_up_the_others(owner: User, stranger: User) -> None:
    held = threading.Event()
    with receiver(Say(after=held)) as slow, receiver() as quick:
        now = timezone.now()
        for n in range(runner.CONCURRENCY + 5):
            ended(owner, slow.url(f"/{n}"), now=now - dt.timedelta(seconds=60))
        fine = [ended(stranger, quick.url(), now=now), ended(owner, quick.url(), now=now)]

        async def scenario() -> None:
            async with at_work("w1"):
                await until_db(
                    lambda: HookDelivery.objects.filter(task__in=fine, state=HookState.DELIVERED).count() == 2
                )
                assert len(slow.came) == runner.PER_SITE
                held.set()
                await until_db(lambda: all_of(HookState.DELIVERED), 30)

        asyncio.run(scenario())
    assert len(slow.came) == runner.CONCURRENCY + 5


@pytest.mark.django_db(transaction=True)
def test_a_worker_that_stops_in_the_middle_gives_its_report_back(
    owner: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "STOP_SECONDS", 0.1)
    held = threading.Event()
    with receiver(lambda came, before: Say(after=held if before == 0 else None)) as there:
        row = ended(owner, there.url(), now=timezone.now())

        async def scenario() -> None:
            async with at_work("w1"):
                await until_db(lambda: there.came)
            assert (await in_db(delivery, row)).leased_by == ""
            async with at_work("w2"):
                await until_db(lambda: all_of(HookState.DELIVERED))
            held.set()

        asyncio.run(scenario())
    assert [came.id for came in there.came] == [delivery(row).pk] * 2


@pytest.mark.django_db(transaction=True)
def test_a_fault_of_ours_is_logged_without_the_address_and_tried_again(
    owner: User, caplog: pytest.LogCaptureFixture
) -> None:
    row = ended(owner, "http://127.0.0.1:9/hook?" + SECRET_QUERY, now=timezone.now())

    def broken() -> network.GuardedClient:
        raise ValueError("http://127.0.0.1:9/hook?" + SECRET_QUERY)

    async def scenario() -> None:
        async with at_work("w1", clients=broken):
            await until_db(lambda: delivery(row).last_error)

    with caplog.at_level(logging.ERROR):
        asyncio.run(scenario())
    kept = delivery(row)
    assert (kept.state, kept.attempts) == (HookState.PENDING, 1)
    assert "broke with ValueError" in caplog.text
    assert SECRET_QUERY not in caplog.text + kept.last_error


@pytest.mark.django_db(transaction=True)
def test_C25_an_end_and_a_wish_to_send_again_ring_the_bell(
    owner: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "LOOK_SECONDS", 3600)
    with receiver() as there:

        async def scenario() -> None:
            sending = asyncio.create_task(runner.deliver_loop(worker="w1"))
            row = await in_db(ended, owner, there.url(), now=timezone.now())
            await until_db(lambda: delivery(row).state == HookState.DELIVERED)
            await in_db(hooks.redeliver, task_id=row.id, actor="owner", now=timezone.now())
            await until_db(lambda: len(there.came) == 2)
            await until_db(lambda: delivery(row).state == HookState.DELIVERED)
            sending.cancel()
            await asyncio.wait({sending})

        asyncio.run(scenario())
    assert len({came.id for came in there.came}) == 1


def test_nothing_secret_is_in_any_event_or_row_that_is_shown(owner: User) -> None:
    row = ended(owner, f"http://127.0.0.1:9/hook?{SECRET_QUERY}")
    report = claimed()
    hooks.refused(report=report, status=None, error=sent(made(report.url)).error, final=True, now=T0)
    row.refresh_from_db()
    shown = repr([event.data for event in events()]) + repr(payloads.task(row)) + delivery(row).last_error
    assert row.status == TaskStatus.COMPLETED
    for secret in (SECRET, SECRET_QUERY, SECRET.removeprefix("whsec_")):
        assert secret not in shown
