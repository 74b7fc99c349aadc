"""Reports of ended tasks to their hooks: the outbox. The only writer of :class:`HookDelivery`.

The row is written in the transaction of the task's end (:func:`report`), so no end goes unreported and none is reported that was rolled
back. A worker takes it under a lease before anything is sent (:func:`claim`), sends it (``runners/hook.py``), and writes what came of it
(:func:`delivered`, :func:`refused`). One that dies in between leaves a lease that runs out: the report is sent again, with the same
``webhook-id``, by which receivers know it. A task that is deleted takes its report along.

What is sent is signed as https://www.standardwebhooks.com wants it (:func:`signature`).
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import dataclasses
import datetime as dt
import hashlib
import hmac
import random
import secrets
from collections.abc import Collection, Mapping
from typing import Any
from urllib.parse import urlsplit

from django.conf import settings
from django.db import transaction
from django.db.models import F, Q, QuerySet

from connections import payloads, telling, vault
from connections.models import HookDelivery, Task
from connections.states import HOOK_ARROWS, HookState

#: A try is given up after :data:`SECONDS`. What is still leased later belonged to a worker that died.
SECONDS = 15.0
LEASE = dt.timedelta(seconds=20)
#: Waiting before the second try, the third ...; the last one holds for all later.
BACKOFF = tuple(dt.timedelta(seconds=s) for s in (5, 30, 120, 600, 3600, 3 * 3600))
#: A receiver that says when it wants to be asked again (``Retry-After``) is not believed beyond this.
LONGEST_WAIT = dt.timedelta(hours=3)
SECRET_PREFIX = "whsec_"  # noqa: S105 (the prefix alone)
#: Rows looked at by one claim: that many others may be quicker at the same moment.
_CANDIDATES = 20


class NoHook(Exception):
    """There is nothing to send again: the task has no hook, or has not ended."""


# ── Secrets and signatures ────────────────────────────────────────────────────────────────────────────────────────


def new_secret() -> str:
    """``whsec_`` and 32 random bytes in base64."""
    return SECRET_PREFIX + base64.b64encode(secrets.token_bytes(32)).decode()


def checked_secret(text: str) -> str:
    """``text`` as it is kept.

    :raises ValueError: with a sentence, which does not repeat it: it is not ``whsec_`` and the base64 of 24 to 64 bytes.
    """
    _key(text)
    return text


def _key(secret: str) -> bytes:
    text, key = secret[len(SECRET_PREFIX) :], b""
    with contextlib.suppress(binascii.Error, UnicodeEncodeError):
        key = base64.b64decode(text.encode("ascii"), validate=True)
    # Written in one way only, so that no reader takes it for another key.
    same = secret == SECRET_PREFIX + base64.b64encode(key).decode()
    if not same or not 24 <= len(key) <= 64:
        raise ValueError(f"Use {SECRET_PREFIX} and the base64 of 24 to 64 bytes.")
    return key


def signature(secret: str, *, message_id: str, timestamp: int, body: bytes) -> str:
    """The header ``webhook-signature``: HMAC-SHA256 over id, Unix time and body (Standard Webhooks, symmetric).

    :raises ValueError: as :func:`checked_secret`.
    """
    content = f"{message_id}.{timestamp}.".encode() + body
    return "v1," + base64.b64encode(hmac.digest(_key(secret), content, hashlib.sha256)).decode()


# ── The outbox ────────────────────────────────────────────────────────────────────────────────────────────────────


def site_of(url: str) -> str:
    """``https://host:port`` as it is written in the URL: all of a hook's address that is shown."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Report:
    """One delivery in a worker's hands. Never printed: it holds the secret. ``lease`` is the proof: no other claim has the same."""

    id: str
    owner_id: int
    worker: str
    lease: str
    attempt: int
    url: str
    secret: str
    body: Mapping[str, Any]

    @property
    def site(self) -> str:
        """``https://host:port`` as it is written in the URL."""
        return site_of(self.url)


def report(task: Task, *, now: dt.datetime) -> None:
    """The task has ended: tell its hook, if it has one. Called inside the transaction of the end."""
    if task.hook_site:
        HookDelivery.objects.create(task=task, next_attempt_at=now, created_at=now, updated_at=now)


def claim(
    *, worker: str, now: dt.datetime, sites: Collection[str] = (), owners: Collection[int] = ()
) -> Report | None:
    """Take the report that is due longest; None when there is none. Counted as a try before it is sent.

    :param sites: leave out reports to these (:attr:`Report.site`): enough are under way to them.
    :param owners: leave out reports of these.
    """
    due = HookDelivery.objects.filter(state=HookState.PENDING, next_attempt_at__lte=now).filter(
        Q(lease_expires_at=None) | Q(lease_expires_at__lte=now)
    )
    wanted = due.exclude(task__owner_id__in=owners) if owners else due
    if sites:
        wanted = wanted.exclude(task__hook_site__in=sites)
    for row in wanted.select_related("task").order_by("next_attempt_at", "pk")[:_CANDIDATES]:
        lease = f"{worker[:60]}/{secrets.token_hex(6)}"
        taken = due.filter(pk=row.pk, attempts=row.attempts, leased_by=row.leased_by).update(
            attempts=F("attempts") + 1, leased_by=lease, lease_expires_at=now + LEASE, updated_at=now
        )
        if not taken:
            # Somebody else was quicker, or the task was deleted: on to the next.
            continue
        taken_report = _report(row, worker=worker, lease=lease)
        if taken_report.attempt > settings.HOOK_ATTEMPTS:
            # Only after the last try broke off: one that was refused ended the row.
            error = "The worker stopped while it sent this. Whether it arrived is not known."
            _settle(taken_report, HookState.FAILED, status=None, error=error, retry=None, now=now)
            continue
        try:
            url, secret = vault.unseal(row.task.hook_sealed)
            return dataclasses.replace(taken_report, url=url, secret=checked_secret(secret))
        except (vault.VaultError, ValueError):
            error = "The secret of this hook cannot be read, so nothing can be signed."
            _settle(taken_report, HookState.FAILED, status=None, error=error, retry=None, now=now)
    return None


def _report(row: HookDelivery, *, worker: str, lease: str) -> Report:
    return Report(
        id=row.id,
        owner_id=row.task.owner_id,
        worker=worker,
        lease=lease,
        attempt=row.attempts + 1,
        url="",
        secret="",
        body=_body(row.task),
    )


#: What changes after the end, by the tries themselves: the body of every try is the same.
_LIVELY = frozenset({"hook", "version", "updated_at"})


def _body(task: Task) -> Mapping[str, Any]:
    """What is sent. ``title`` and ``labels`` are as they are now, all else as the end left it."""
    assert task.finished_at is not None
    data = {key: value for key, value in payloads.task(task).items() if key not in _LIVELY}
    return {"type": f"task.{task.status}", "timestamp": payloads.timestamp(task.finished_at), "data": data}


def delivered(*, report: Report, status: int, now: dt.datetime) -> bool:
    """pending → delivered. False when the lease was lost."""
    return _settle(report, HookState.DELIVERED, status=status, error="", retry=None, now=now)


def refused(
    *,
    report: Report,
    status: int | None,
    error: str,
    final: bool,
    now: dt.datetime,
    retry_after: dt.timedelta | None = None,
) -> bool:
    """It did not arrive: tried again after a pause, or pending → failed when that is final or was tried ``HOOK_ATTEMPTS`` times.

    ``error`` is fit to be shown. ``retry_after``: not before that, as the receiver says. False when the lease was lost.
    """
    if final or report.attempt >= settings.HOOK_ATTEMPTS:
        return _settle(report, HookState.FAILED, status=status, error=error, retry=None, now=now)
    pause = BACKOFF[min(report.attempt, len(BACKOFF)) - 1] * random.uniform(0.9, 1.1)
    if retry_after is not None:
        pause = max(pause, min(retry_after, LONGEST_WAIT))
    return _settle(report, HookState.PENDING, status=status, error=error, retry=now + pause, now=now)


def release(*, report: Report, now: dt.datetime) -> bool:
    """The worker stops before it has an answer: the next one may send it at once. It stays counted, for it may have arrived."""
    return bool(
        _held(report).update(leased_by="", lease_expires_at=None, next_attempt_at=now, updated_at=now)
    )


def _held(report: Report) -> QuerySet[HookDelivery]:
    return HookDelivery.objects.filter(pk=report.id, leased_by=report.lease, state=HookState.PENDING)


def redeliver(*, task_id: str, actor: str, now: dt.datetime) -> HookDelivery:
    """Send it again, now, with a new round of tries and the same ``webhook-id``. One that waits for its next try is hurried.

    :raises NoHook: the task has none, or has not ended.
    """
    with transaction.atomic():
        task = Task.objects.select_for_update().get(pk=task_id)
        row = HookDelivery.objects.select_for_update().filter(task=task).first()
        if row is None:
            raise NoHook(task_id)
        if row.lease_expires_at is not None and row.lease_expires_at > now:
            # It is being sent at this moment.
            return row
        row.state = HookState.PENDING
        row.attempts = 0
        row.next_attempt_at = now
        row.leased_by = ""
        row.lease_expires_at = None
        row.delivered_at = None
        row.updated_at = now
        row.save()
        task.hook_delivery = row
        _tell(task, actor=actor, now=now)
        return row


def _settle(
    report: Report,
    state: HookState,
    *,
    status: int | None,
    error: str,
    retry: dt.datetime | None,
    now: dt.datetime,
) -> bool:
    with transaction.atomic():
        task_id = HookDelivery.objects.filter(pk=report.id).values_list("task_id", flat=True).first()
        task = Task.objects.select_for_update().filter(pk=task_id).first()
        row = _held(report).select_for_update().first()
        if task is None or row is None:
            return False
        assert state == row.state or state in HOOK_ARROWS[HookState(row.state)]
        row.state = state
        row.leased_by = ""
        row.lease_expires_at = None
        row.next_attempt_at = retry
        row.last_status = status
        row.last_error = error[:300]
        row.delivered_at = now if state == HookState.DELIVERED else None
        row.updated_at = now
        row.save()
        task.hook_delivery = row
        _tell(task, actor=report.worker, now=now)
        return True


def _tell(task: Task, *, actor: str, now: dt.datetime) -> None:
    """The task looks different now, though it has ended: its version grows."""
    task.version += 1
    task.updated_at = now
    task.save(update_fields=["version", "updated_at"])
    telling.task("task.updated", task, at=now, actor=actor)
