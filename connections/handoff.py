"""The one-time code of a hosted page, and the session token that it is exchanged for (wire contract, section 5).

The code is single use and dies with its flow. It is consumed by one conditional UPDATE, so of two clients that come at once exactly
one wins. The token is a JWT of 30 minutes, bound to one connection **and** one flow; the hosted page carries it in two cookies.
"""

from __future__ import annotations

import datetime as dt
from typing import Any

import jwt
from django.conf import settings
from django.utils.crypto import salted_hmac

from connections import access, vault
from connections.access import Principal
from connections.models import LoginFlow
from connections.states import FlowStatus

#: Read by the hosted page's views; sent only below ``/login/<connection>``.
PAGE_COOKIE = "sb_page"
#: Read by the stream; sent only to ``/auth/connections/<connection>/events``. The same token as the page's cookie.
STREAM_COOKIE = "sb_stream"

LIFETIME = dt.timedelta(minutes=30)
#: A page that mounts twice exchanges twice (React StrictMode): the same client gets the same answer for so long.
REPLAY = dt.timedelta(seconds=10)
ISSUER = "kernel-api"
_ALGORITHM = "HS256"


class UnknownCode(Exception):
    """No flow of this connection has this code: 404."""

    def __init__(self) -> None:
        super().__init__("There is no such code.")


class CodeUsed(Exception):
    """The code was used by somebody, or died with its flow: 410."""

    def __init__(self) -> None:
        super().__init__("This link was used already, or its login has ended.")


class TokenExpired(Exception):
    """The token's 30 minutes are over, or it never was one of ours: 401."""

    def __init__(self) -> None:
        super().__init__("This session has expired.")


class TokenOver(Exception):
    """The token is in order, but its flow is over: 410."""

    def __init__(self) -> None:
        super().__init__("This login has ended.")


def client_of(address: str, user_agent: str) -> str:
    """Who is exchanging, as a keyed hash of 64 characters: enough to know a repetition by, and nothing to read back."""
    return vault.fingerprint([address, user_agent])


def peek(*, connection_id: str, code: str, client: str, now: dt.datetime) -> LoginFlow:
    """The flow that :func:`exchange` would open for this client now. Consumes nothing: link previews are GETs.

    :raises UnknownCode: there is no such code for this connection.
    :raises CodeUsed: it was used, or its flow is over.
    """
    flow = (
        LoginFlow.objects.select_related("connection__profile")
        .filter(connection_id=connection_id, handoff_hash=vault.hash_token(code))
        .first()
        if code
        else None
    )
    if flow is None:
        raise UnknownCode
    if flow.is_over or flow.is_due(now):
        raise CodeUsed
    if flow.exchanged_at is not None and not _is_replay(flow, client, now):
        raise CodeUsed
    return flow


def exchange(*, connection_id: str, code: str, client: str, now: dt.datetime) -> tuple[LoginFlow, str]:
    """Use up a one-time code. ``client`` is what :func:`client_of` says about the caller.

    Again within 10 s from the same client: the identical token.

    :return: the flow, and the session token (a JWT).
    :raises UnknownCode: there is no such code for this connection.
    :raises CodeUsed: somebody else was first, or the flow is over.
    """
    flow = peek(connection_id=connection_id, code=code, client=client, now=now)
    LoginFlow.objects.filter(
        pk=flow.pk, handoff_hash=flow.handoff_hash, exchanged_at=None, status=FlowStatus.IN_PROGRESS
    ).update(exchanged_at=now, exchanged_by=client)
    # Whoever lost the race reads here who won it; that may have been the same page, mounted twice.
    flow.refresh_from_db()
    if flow.handoff_hash != vault.hash_token(code) or not _is_replay(flow, client, now):
        raise CodeUsed
    assert flow.exchanged_at is not None
    return flow, token_of(flow, at=flow.exchanged_at)


def token_of(flow: LoginFlow, *, at: dt.datetime) -> str:
    """The session token of a flow, valid for 30 minutes from ``at``. The same arguments make the same token."""
    issued = int(at.timestamp())
    claims = {
        "iss": ISSUER,
        "managed_auth_session_id": flow.connection_id,
        "invocation_id": flow.id,
        "iat": issued,
        "exp": issued + int(LIFETIME.total_seconds()),
    }
    return jwt.encode(claims, _key(), algorithm=_ALGORITHM)


def principal_of_token(token: str, *, now: dt.datetime) -> Principal:
    """Who holds this token: a page of one flow. After the end of a flow it still works until ``expires_at``, to read the result.

    :raises TokenExpired: its time is over, or it is not one of ours (401).
    :raises TokenOver: its flow expired, was replaced by a newer one, or is gone (410).
    """
    claims = _claims(token)
    if claims["exp"] <= now.timestamp():
        raise TokenExpired
    flow = (
        LoginFlow.objects.select_related("connection")
        .filter(connection__owner__is_active=True)
        .filter(pk=claims["invocation_id"], connection_id=claims["managed_auth_session_id"])
        .first()
    )
    if flow is None or flow.status == FlowStatus.EXPIRED or flow.is_due(now):
        raise TokenOver
    if flow.is_over and flow.expires_at <= now:
        raise TokenOver
    if LoginFlow.objects.filter(connection_id=flow.connection_id, number__gt=flow.number).exists():
        raise TokenOver
    return access.of_page(
        owner_id=flow.connection.owner_id, connection_id=flow.connection_id, flow_id=flow.id
    )


def _is_replay(flow: LoginFlow, client: str, now: dt.datetime) -> bool:
    return (
        flow.exchanged_at is not None
        and vault.same(flow.exchanged_by, client)
        and now - flow.exchanged_at <= REPLAY
    )


def _key() -> bytes:
    """A key of its own, so that nothing else signed with SECRET_KEY can pass for a token."""
    return salted_hmac(
        "switchboard.handoff", "token", secret=settings.SECRET_KEY, algorithm="sha256"
    ).digest()


def _claims(token: str) -> dict[str, Any]:
    try:
        # The clock is an argument here (``now``), so PyJWT's own look at it is switched off.
        claims: dict[str, Any] = jwt.decode(
            token,
            _key(),
            algorithms=[_ALGORITHM],
            issuer=ISSUER,
            options={
                "require": ["exp", "iat", "managed_auth_session_id", "invocation_id"],
                "verify_exp": False,
                "verify_iat": False,
            },
        )
    except jwt.InvalidTokenError as error:
        raise TokenExpired from error
    return claims
