"""``Idempotency-Key``: a POST that comes again gets the answer that it got (wire contract, section 6). API and pages alike.

The key, what the request did and its answer are **one transaction**. So a process that dies in between leaves nothing behind and
the repetition acts; and of two identical requests at once the second waits at the unique constraint until the first
has committed, then reads its answer. Nothing has to be taken over, timed out or cleaned up but old rows.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
from collections.abc import Callable, Mapping
from typing import Any

from django.db import IntegrityError, transaction

from connections import vault
from connections.errors import ApiError, invalid_request
from connections.models import IdempotentAnswer

KEPT = dt.timedelta(hours=24)
MAX_KEY = 255


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """What is kept: a status, a JSON value and headers. ``replayed``: it was given before, and nothing was done now."""

    status: int
    data: Any
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    replayed: bool = False


class _NotKept(Exception):
    """Leaves the transaction without a trace, with the answer."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer.status)
        self.answer = answer


def key_of(header: str | None) -> str | None:
    """The key of a request; None when it has none.

    :raises ApiError: 400 when it is not 1 to 255 printable ASCII characters.
    """
    if header is None:
        return None
    if not 1 <= len(header) <= MAX_KEY or not all(" " <= character <= "~" for character in header):
        raise invalid_request(
            [
                {
                    "code": "invalid",
                    "message": f"Idempotency-Key: It must have 1 to {MAX_KEY} printable characters.",
                }
            ]
        )
    return header


def once(*, scope: str, key: str, request: Any, act: Callable[[], Answer], now: dt.datetime) -> Answer:
    """Act, or repeat the answer. ``request`` is the JSON value that tells two requests apart (method, path, body).

    ``act`` returns its errors as answers. 401, 403, 429, 5xx and ``connection_unknown`` are not kept, nor is anything that led to them: the next
    try acts.

    :raises ApiError: 409 ``idempotency_conflict`` when the key belongs to another request.
    """
    fingerprint = vault.fingerprint(request)
    try:
        with transaction.atomic():
            row = _claim(scope, key, fingerprint, now)
            if row is None:
                return _repeat(scope, key, fingerprint)
            answer = act()
            if _passes(answer):
                raise _NotKept(answer)
            row.status_code = answer.status
            row.sealed = vault.seal({"data": answer.data, "headers": dict(answer.headers)})
            row.save(update_fields=["status_code", "sealed"])
            return answer
    except _NotKept as error:
        return error.answer


def kept(*, scope: str, key: str, request: Any, now: dt.datetime) -> Answer | None:
    """The answer that this request got before, if it did: a receipt outlives what it was for."""
    row = IdempotentAnswer.objects.filter(scope=scope, key=key, created_at__gt=now - KEPT).first()
    if row is None or not vault.same(row.fingerprint, vault.fingerprint(request)):
        return None
    return _again(row)


def _passes(answer: Answer) -> bool:
    code = answer.data.get("code") if isinstance(answer.data, dict) else None
    return answer.status in (401, 403, 429) or answer.status >= 500 or code == "connection_unknown"


def _claim(scope: str, key: str, fingerprint: str, now: dt.datetime) -> IdempotentAnswer | None:
    IdempotentAnswer.objects.filter(scope=scope, key=key, created_at__lte=now - KEPT).delete()
    try:
        with transaction.atomic():
            return IdempotentAnswer.objects.create(
                scope=scope, key=key, fingerprint=fingerprint, created_at=now
            )
    except IntegrityError:
        return None


def _repeat(scope: str, key: str, fingerprint: str) -> Answer:
    row = IdempotentAnswer.objects.get(scope=scope, key=key)
    if not vault.same(row.fingerprint, fingerprint):
        raise ApiError(409, "idempotency_conflict", "This Idempotency-Key was used for another request.")
    return _again(row)


def _again(row: IdempotentAnswer) -> Answer:
    assert row.status_code is not None, "a row is seen by others when it is complete"
    return Answer(status=row.status_code, replayed=True, **vault.unseal(row.sealed))
