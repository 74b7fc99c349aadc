"""``Idempotency-Key``: a POST that comes again gets the answer that it got (wire contract, section 6).

The key, what the request did and its answer are **one transaction**. So a process that dies in between leaves nothing behind and
the repetition acts; and of two identical requests at once the second waits at the unique constraint until the first
has committed, then reads its answer. Nothing has to be taken over, timed out or cleaned up but old rows.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from typing import Any

from django.db import IntegrityError, transaction
from rest_framework.response import Response

from connections import vault
from connections.errors import ApiError, invalid_request
from connections.models import IdempotentAnswer

KEPT = dt.timedelta(hours=24)
MAX_KEY = 255
#: Headers that belong to the answer and are kept with it; all others are made anew each time.
_KEPT_HEADERS = ("x-should-retry", "retry-after")


class _NotKept(Exception):
    """Leaves the transaction without a trace, with the answer."""

    def __init__(self, response: Response) -> None:
        super().__init__(response.status_code)
        self.response = response


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


def once(*, scope: str, key: str, request: Any, act: Callable[[], Response], now: dt.datetime) -> Response:
    """Act, or repeat the answer. ``request`` is the JSON value that tells two requests apart (method, path, body).

    ``act`` returns its errors as answers. 401, 429 and 5xx are not kept, nor is anything that led to them: the next try acts.

    :raises ApiError: 409 ``idempotency_conflict`` when the key belongs to another request.
    """
    fingerprint = vault.fingerprint(request)
    try:
        with transaction.atomic():
            row = _claim(scope, key, fingerprint, now)
            if row is None:
                return _repeat(scope, key, fingerprint)
            response = act()
            if response.status_code in (401, 429) or response.status_code >= 500:
                raise _NotKept(response)
            headers = {name: response[name] for name in _KEPT_HEADERS if name in response}
            row.status_code = response.status_code
            row.sealed = vault.seal({"data": response.data, "headers": headers})
            row.save(update_fields=["status_code", "sealed"])
            return response
    except _NotKept as error:
        return error.response


def _claim(scope: str, key: str, fingerprint: str, now: dt.datetime) -> IdempotentAnswer | None:
    IdempotentAnswer.objects.filter(scope=scope, key=key, created_at__lte=now - KEPT).delete()
    try:
        with transaction.atomic():
            return IdempotentAnswer.objects.create(
                scope=scope, key=key, fingerprint=fingerprint, created_at=now
            )
    except IntegrityError:
        return None


def _repeat(scope: str, key: str, fingerprint: str) -> Response:
    row = IdempotentAnswer.objects.get(scope=scope, key=key)
    if not vault.same(row.fingerprint, fingerprint):
        raise ApiError(409, "idempotency_conflict", "This Idempotency-Key was used for another request.")
    answer = vault.unseal(row.sealed)
    headers = {**answer["headers"], "Idempotent-Replayed": "true"}
    return Response(answer["data"], status=row.status_code, headers=headers)
