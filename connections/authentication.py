"""Who a Bearer is: an API key (``sk_…``) or the session token of a hosted page (a JWT). And the session of the dashboard.

Used by the API's views and by the stream consumers, so that a token means the same everywhere.
"""

from __future__ import annotations

import datetime as dt

from django.core.cache import cache
from django.db.models import Q
from django.http import HttpRequest, HttpResponse
from django.utils import timezone
from rest_framework.authentication import BaseAuthentication, CSRFCheck
from rest_framework.request import Request

from connections import errors, handoff, vault
from connections.access import Principal, is_page_of, of_request_user, of_user
from connections.models import ApiKey

#: How exact ``last_used_at`` of a key is: a write per request would make every read a write.
USED_EVERY = dt.timedelta(minutes=1)
#: Wrong tokens of one address per minute. A right one always passes, so that nobody locks out their neighbours.
FAILURES_PER_MINUTE = 60
_MAX_TOKEN = 4096


def limited(kind: str, address: str, *, limit: int, now: dt.datetime, seconds: int = 60) -> int | None:
    """Count one event of ``address``; over the limit, the seconds to wait. Fixed windows in Django's cache."""
    window, into = divmod(int(now.timestamp()), seconds)
    key = f"limit:{kind}:{vault.hash_token(address)[:32]}:{window}"
    cache.add(key, 0, timeout=seconds)
    try:
        count = cache.incr(key)
    except ValueError:
        # The cache dropped the counter between the two calls: it starts anew.
        return None
    return seconds - into if count > limit else None


def address_of(request: HttpRequest) -> str:
    """The client's address; ``project.middleware.trusted_proxy`` has put the right one there."""
    return str(request.META.get("REMOTE_ADDR") or "unknown")


def principal_of_bearer(header_value: str, *, now: dt.datetime, address: str | None = None) -> Principal:
    """The caller behind an ``Authorization`` header. With an ``address``, what is wrong counts against it.

    :raises errors.ApiError: 401 for a header, key or token that is no good, 410 for the token of a flow that is over,
        429 for an address with too many wrong ones.
    """
    try:
        return _principal(header_value, now)
    except handoff.TokenOver as error:
        raise errors.translate(error) from error
    except (errors.ApiError, handoff.TokenExpired) as error:
        wait = None
        if address is not None:
            wait = limited("authentication", address, limit=FAILURES_PER_MINUTE, now=now)
        raise (errors.translate(error) if wait is None else errors.rate_limited(wait)) from error


def _principal(header_value: str, now: dt.datetime) -> Principal:
    scheme, _, token = header_value.strip().partition(" ")
    token = token.strip()
    if scheme.lower() != "bearer" or not token or len(token) > _MAX_TOKEN or not token.isascii():
        raise errors.unauthorized()
    if token.startswith(vault.API_KEY_PREFIX):
        return _principal_of_key(token, now)
    return handoff.principal_of_token(token, now=now)


def _principal_of_key(token: str, now: dt.datetime) -> Principal:
    key = (
        ApiKey.objects.select_related("owner")
        .filter(key_hash=vault.hash_token(token), revoked_at=None, owner__is_active=True)
        .first()
    )
    if key is None:
        raise errors.unauthorized("This API key is not valid.")
    if key.last_used_at is None or key.last_used_at < now - USED_EVERY:
        stale = Q(last_used_at=None) | Q(last_used_at__lt=now - USED_EVERY)
        ApiKey.objects.filter(stale, pk=key.pk).update(last_used_at=now)
    return of_user(key.owner, api_key=key)


class BearerAuthentication(BaseAuthentication):
    """DRF's authentication: ``request.user`` is the :class:`~connections.access.Principal`."""

    def authenticate(self, request: Request) -> tuple[Principal, None] | None:
        header = request.headers.get("Authorization")
        if header is None:
            return None
        return principal_of_bearer(header, now=timezone.now(), address=address_of(request._request)), None

    def authenticate_header(self, request: Request) -> str:
        return "Bearer"


def _no_answer(request: HttpRequest) -> HttpResponse:
    raise AssertionError("the check is asked, and never passes a request on")


class BrowserAuthentication(BaseAuthentication):
    """The session of the dashboard, for operations with ``browser = True``. Asked after BearerAuthentication, which decides where it can.

    Whatever changes something has to prove that a page of ours sent it: other sites can make a browser send its cookies.
    """

    def authenticate(self, request: Request) -> tuple[Principal, None] | None:
        inner = request._request
        principal = of_request_user(inner.user, inner.session.session_key)
        if principal is None:
            return None
        if not is_page_of(principal, request.headers.get("X-Page-User")):
            raise errors.unauthorized("Somebody else is signed in by now. Load the page again.")
        self._check_origin(inner)
        return principal, None

    def _check_origin(self, request: HttpRequest) -> None:
        """As Django does it for forms.

        :raises errors.ApiError: 403 ``csrf_failed``; 415 for a body in which the token would be looked for, and the rest be lost.
        """
        if (request.content_type or "").startswith("multipart/"):
            raise errors.ApiError(415, "unsupported_media_type", "The body must be application/json.")
        check = CSRFCheck(_no_answer)
        check.process_request(request)
        if check.process_view(request, _no_answer, (), {}):
            message = "This was sent without the token of its page. Load the page again."
            raise errors.ApiError(403, "csrf_failed", message)
