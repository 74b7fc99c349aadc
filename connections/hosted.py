"""The hosted login page: what the end user sees who was sent a link (wire contract, section 5).

A stranger's page: no Django session, no code of the dashboard, and no word about whose connection it is. It works without
JavaScript (plain POSTs, a refresh while waiting) and is live with it (``project/static/js/login.js``). Every state is a *card*: one
template, included by the page and sent by the stream (:func:`card_html`), the same for every viewer. Therefore a card holds
neither a CSRF token nor a return address; both belong to the shell around it.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from django.conf import settings
from django.core import signing
from django.http import HttpRequest, HttpResponse, HttpResponseBase, HttpResponseRedirect, JsonResponse
from django.middleware.csrf import CsrfViewMiddleware, get_token
from django.shortcuts import render
from django.template.loader import render_to_string
from django.urls import reverse
from django.utils import timezone
from django.utils.decorators import decorator_from_middleware
from django.views.decorators.csrf import csrf_exempt
from django.views.decorators.http import require_http_methods

from connections import handoff, payloads, transitions
from connections.access import Principal
from connections.models import LoginFlow
from connections.states import FlowStatus, FlowStep

Json = dict[str, Any]

RETURN_COOKIE = "sb_return"
_RETURN_SALT = "switchboard.return"
#: After so long the card of DISCOVERING says that it takes longer than usual.
SLOW = dt.timedelta(seconds=45)
#: Kinds of cards that wait for something else than this page's user: without script the page reloads itself.
WAITING = frozenset({"discovering", "submitting", "external", "human"})

_CODE_TYPES = frozenset({"code", "totp_code"})
_AUTOCOMPLETE = {"identifier": "username", "password": "current-password"} | dict.fromkeys(
    _CODE_TYPES, "one-time-code"
)
_CHOICE_TITLES = {
    "mfa_method": "How do you want to confirm that it is you?",
    "account": "Choose an account",
    "identifier_method": "How do you want to sign in?",
    "auth_method": "How do you want to sign in?",
    "sign_in_method": "How do you want to sign in?",
}
_FAILURES = {
    "credentials_invalid": "The site did not accept the sign-in",
    "totp_code_rejected": "The site did not accept the code",
    "network_error": "The site could not be reached",
    "bot_detected": "The site did not let us in",
    "captcha_blocked": "The site did not let us in",
    "login_form_not_found": "No login form was found",
    "unsupported_auth_method": "This way of signing in is not supported",
    "max_attempts_reached": "Too many attempts",
}
_ENDED_TEXT = "Ask whoever sent you this link for a new one."


# ── Cards ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def card_html(flow_id: str) -> str:
    """The card of a flow's present state as HTML, the same for every viewer. A flow that was deleted has ended."""
    flow = LoginFlow.objects.select_related("connection__profile").filter(pk=flow_id).first()
    return _html(expired_card() if flow is None else card_of(flow, now=timezone.now()))


def _html(card: Json) -> str:
    return render_to_string(f"hosted/cards/{card['kind']}.html", {"card": card})


def card_of(flow: LoginFlow, *, now: dt.datetime) -> Json:
    """What the template of a flow's present state is filled with. ``kind`` names the template."""
    domain = flow.connection.domain
    card: Json = {
        "kind": _kind(flow),
        "version": flow.version,
        "connection": flow.connection_id,
        "flow": flow.id,
        "status": flow.status,
        "step": flow.step,
        "interaction": flow.interaction_id,
        "domain": domain,
        "profile": flow.connection.profile.name,
        "deadline": _deadline(flow),
        "website_error": flow.website_error,
    }
    build = {
        "discovering": _discovering,
        "form": _question,
        "code": _question,
        "choice": _question,
        "external": _external,
        "human": _human,
        "submitting": _submitting,
        "success": _success,
        "expired": _expired,
        "canceled": _canceled,
        "error": _error,
    }[card["kind"]]
    card.update(build(flow, now))
    return card


def _kind(flow: LoginFlow) -> str:
    ends = {
        FlowStatus.SUCCESS: "success",
        FlowStatus.FAILED: "error",
        FlowStatus.EXPIRED: "expired",
        FlowStatus.CANCELED: "canceled",
    }
    if flow.status in ends:
        return ends[FlowStatus(flow.status)]
    if flow.step == FlowStep.AWAITING_INPUT:
        types = {field["type"] for field in flow.fields}
        if not types:
            return "choice"
        return "code" if types & _CODE_TYPES and not types - _CODE_TYPES else "form"
    return {
        FlowStep.DISCOVERING: "discovering",
        FlowStep.SUBMITTING: "submitting",
        FlowStep.AWAITING_EXTERNAL_ACTION: "external",
        FlowStep.AWAITING_HUMAN_INTERVENTION: "human",
    }[FlowStep(flow.step)]


def _deadline(flow: LoginFlow) -> Json | None:
    """Until when this step may last; only where somebody has to hurry."""
    moment = flow.deadline()
    if moment is None or flow.step not in (FlowStep.AWAITING_INPUT, FlowStep.AWAITING_EXTERNAL_ACTION):
        return None
    return {"iso": payloads.timestamp(moment), "moment": moment}


def _discovering(flow: LoginFlow, now: dt.datetime) -> Json:
    slow = now - flow.step_entered_at > SLOW
    text = "Still working. You can keep this open." if slow else "Opening the login page…"
    return {"title": "Opening the login page…", "announce": text, "slow": slow, "progress": 1}


def _submitting(flow: LoginFlow, now: dt.datetime) -> Json:
    return {
        "title": "Signing in…",
        "announce": "Sent. Waiting for the site.",
        "progress": 2,
    }


def _question(flow: LoginFlow, now: dt.datetime) -> Json:
    fields = [_field(field, flow.interaction_id) for field in flow.fields]
    choices = _choices(flow)
    title = f"Sign in to {flow.connection.domain}"
    if all(field["is_code"] for field in fields) and fields:
        title = "Enter the code"
    elif not fields and choices["ways"]:
        title = _CHOICE_TITLES.get(choices["ways"][0]["type"], "Choose how to go on")
    asked = ", ".join(field["label"] for field in fields)
    rejected = any(field["rejected"] for field in fields)
    said = f"The site says: {flow.website_error} " if flow.website_error else ""
    if rejected and not said:
        said = "The site did not accept what was sent. "
    return {
        "title": title,
        "announce": f"{said}{title}." + (f" Asked for: {asked}." if asked else ""),
        "fields": fields,
        "progress": 2,
        **choices,
    }


def _external(flow: LoginFlow, now: dt.datetime) -> Json:
    parts = _question(flow, now)
    message = flow.external_action_message or "Confirm this sign-in on your phone, then come back."
    return {
        **parts,
        "title": "Approve the sign-in on your other device",
        "announce": message,
        "message": message,
    }


def _human(flow: LoginFlow, now: dt.datetime) -> Json:
    view = flow.live_view_url if flow.live_view_url.startswith(("https://", "http://")) else ""
    return {
        "title": "The site wants to see a person",
        "announce": "The site wants to see a person.",
        "live_view_url": view,
        "progress": 2,
    }


def _success(flow: LoginFlow, now: dt.datetime) -> Json:
    return {
        "title": "You are signed in",
        "announce": f"You are signed in to {flow.connection.domain}. You can close this window.",
        "outcome": "success",
        "progress": 3,
    }


def _expired(flow: LoginFlow, now: dt.datetime) -> Json:
    return _ended(flow.error_message, flow.error_code)


def _ended(message: str = "", code: str = "") -> Json:
    return {
        "title": "This link has ended",
        "message": message,
        "hint": _ENDED_TEXT,
        "announce": f"This link has ended. {_ENDED_TEXT}",
        "outcome": "error",
        "code": code or "session_expired",
        "callback_message": message or "This link has ended.",
    }


def _canceled(flow: LoginFlow, now: dt.datetime) -> Json:
    # The reason was written by an operator for operators; a stranger reads that it is over.
    return {
        "title": "This sign-in was cancelled",
        "hint": _ENDED_TEXT,
        "announce": f"This sign-in was cancelled. {_ENDED_TEXT}",
        "outcome": "error",
        "code": flow.error_code or "canceled",
        "callback_message": "The sign-in was cancelled.",
    }


def _error(flow: LoginFlow, now: dt.datetime) -> Json:
    title = _FAILURES.get(flow.error_code, "The sign-in did not work")
    return {
        "title": title,
        "message": flow.error_message,
        "hint": _ENDED_TEXT,
        "announce": f"{title}. {flow.error_message}",
        "outcome": "error",
        "code": flow.error_code or "internal_error",
        "callback_message": flow.error_message or flow.website_error or "The sign-in did not work.",
    }


def _field(field: Json, interaction: str) -> Json:
    kind = field["type"]
    is_code = kind in _CODE_TYPES
    input_mode = field.get("input_mode") or ("numeric" if is_code else None)
    return {
        "name": f"field.{field['id']}",
        # A new question is a new element: nothing typed into the one before can be taken for its answer.
        "dom_id": f"in-{interaction}-{field['id']}",
        "label": field["label"],
        "hint": field.get("hint") or "",
        "placeholder": field.get("placeholder") or "",
        "required": field.get("required", True),
        "rejected": field.get("reason") == "rejected",
        "secret": kind in ("password", "totp_secret"),
        "is_code": is_code,
        "type": "password"
        if kind in ("password", "totp_secret")
        else "tel"
        if input_mode == "tel"
        else "text",
        "input_mode": input_mode,
        "autocomplete": _AUTOCOMPLETE.get(kind, "off"),
    }


def _choices(flow: LoginFlow) -> Json:
    """Ways on, "another way" last; identity providers apart, for they get their own row below an "or"."""
    ways, providers = [], []
    for choice in flow.choices:
        label = choice.get("display_text") or choice["label"]
        # Many sites name the destination in the label already.
        more = [choice.get("masked_destination"), choice.get("description") or choice.get("context")]
        row = {
            "id": choice["id"],
            "type": choice["type"],
            "label": label,
            "text": " · ".join(text for text in more if text and text not in label),
            "last": choice.get("mfa_type") == "switch" or choice["type"] == "other",
        }
        if choice["type"] == "sso_provider":
            providers.append(row)
        else:
            ways.append(row)
    return {"ways": sorted(ways, key=lambda row: row["last"]), "providers": providers}


def prime_card(flow: LoginFlow) -> Json:
    """What a visitor sees before anything is consumed."""
    domain = flow.connection.domain
    return {
        "kind": "prime",
        "domain": domain,
        "profile": flow.connection.profile.name,
        "letter": domain[:1].upper(),
        "title": f"Sign in to {domain}",
        "announce": "",
        "encrypted": settings.USE_HTTPS,
        "kept": flow.connection.save_credentials,
        "expires": flow.expires_at,
        "expires_iso": payloads.timestamp(flow.expires_at),
    }


def expired_card() -> Json:
    """Whoever comes too late, or too often."""
    return {"kind": "expired", **_ended()}


def missing_card() -> Json:
    """Unknown, foreign, mistyped: they all look the same."""
    return {
        "kind": "missing",
        "title": "There is no sign-in here",
        "announce": "There is no sign-in here.",
        "hint": "Please open the whole link that you were sent, or ask for a new one.",
    }


def fatal_card() -> Json:
    """What the page shows by itself when the stream reports something that cannot be mended."""
    return {
        "kind": "error",
        "title": "Something went wrong",
        "announce": "Something went wrong.",
        "message": "",
        "hint": _ENDED_TEXT,
        "outcome": "error",
        "code": "internal_error",
        "callback_message": "Something went wrong.",
    }


# ── Where the page returns to ─────────────────────────────────────────────────────────────────────────────────────


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReturnUrls:
    """Where to go afterwards; empty: nowhere. ``refused``: an address was given that is not on the list."""

    success: str = ""
    error: str = ""
    refused: bool = False


def allowed_return_url(url: str) -> bool:
    """Whether ``url`` has exactly one of the origins of ``settings.RETURN_URLS``. No open redirect, no other scheme."""
    if not url or len(url) > 2000 or "\\" in url or any(ord(char) <= 32 or ord(char) == 127 for char in url):
        return False
    try:
        parts = urlsplit(url)
        origin = _origin(url)
    except ValueError:
        return False
    if parts.scheme not in ("http", "https") or parts.username is not None or parts.password is not None:
        return False
    return origin is not None and origin in {_origin(allowed) for allowed in settings.RETURN_URLS}


def _origin(url: str) -> tuple[str, str, int] | None:
    parts = urlsplit(url)
    if not parts.hostname:
        return None
    return parts.scheme, parts.hostname.lower(), parts.port or {"http": 80, "https": 443}.get(parts.scheme, 0)


def with_query(url: str, values: Mapping[str, str]) -> str:
    """``url`` with these parameters; what it carried under other names stays."""
    parts = urlsplit(url)
    query = [pair for pair in parse_qsl(parts.query, keep_blank_values=True) if pair[0] not in values]
    return urlunsplit(parts._replace(query=urlencode([*query, *values.items()])))


def return_link(card: Json, urls: ReturnUrls) -> str:
    """The address that a page in its end state goes to, with what the caller wants to know; empty: it stays."""
    if card.get("outcome") == "success" and urls.success:
        return with_query(urls.success, {"profile_name": card["profile"], "domain": card["domain"]})
    if card.get("outcome") == "error" and urls.error:
        return with_query(urls.error, {"code": card["code"], "message": card["callback_message"]})
    return ""


def _given_return_urls(query: Mapping[str, str]) -> ReturnUrls:
    given = {name: query.get(f"{name}_url", "") for name in ("success", "error")}
    good = {name: url if allowed_return_url(url) else "" for name, url in given.items()}
    return ReturnUrls(success=good["success"], error=good["error"], refused=good != given)


def _kept_return_urls(request: HttpRequest, connection_id: str) -> ReturnUrls:
    try:
        kept = signing.loads(
            request.COOKIES.get(RETURN_COOKIE, ""), salt=_RETURN_SALT, max_age=handoff.LIFETIME
        )
    except signing.BadSignature:
        return ReturnUrls()
    if kept.get("connection") != connection_id:
        return ReturnUrls()
    # Checked again: the list may be shorter by now.
    return _given_return_urls({"success_url": kept["success"], "error_url": kept["error"]})


# ── Views ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class PageCsrf(CsrfViewMiddleware):
    """Django's check, for a page with ``Referrer-Policy: no-referrer``: browsers then send ``Origin: null`` with a form.

    ``null`` is accepted only from a request that the browser itself calls same-origin (or from a browser too old to say).
    The token must fit in any case.
    """

    def _origin_verified(self, request: HttpRequest) -> bool:
        if request.META.get("HTTP_ORIGIN") == "null":
            return request.META.get("HTTP_SEC_FETCH_SITE", "same-origin") == "same-origin"
        return bool(super()._origin_verified(request))  # type: ignore[misc]

    def _reject(self, request: HttpRequest, reason: str) -> HttpResponse:
        message = "Your browser did not send this page's cookie. Please allow cookies, reload and try again."
        if _wants_json(request):
            return _json({"code": "csrf_failed", "message": message}, status=403)
        card = {"kind": "missing", "title": "That did not arrive", "announce": message, "hint": message}
        return _shell(request, "", card, status=403)


View = Callable[..., HttpResponseBase]
_page_csrf = decorator_from_middleware(PageCsrf)


def _guarded(view: View) -> View:
    """POST only, and with the page's own CSRF check in place of the general one."""
    guarded: View = csrf_exempt(_page_csrf(require_http_methods(["POST"])(view)))
    return guarded


@require_http_methods(["GET", "HEAD"])
def page(request: HttpRequest, connection_id: str) -> HttpResponse:
    """GET /login/<id>: PRIME for a fresh code (which it does not consume), else the present card of the cookie's flow."""
    now = timezone.now()
    code = request.GET.get("code", "")
    found = _flow_of_cookie(request, connection_id, now)
    if not code:
        urls = _kept_return_urls(request, connection_id)
        if isinstance(found, LoginFlow):
            return _shell(request, connection_id, card_of(found, now=now), urls=urls)
        return _refusal(request, connection_id, found, urls=urls)
    urls = _given_return_urls(request.GET)
    try:
        flow = handoff.peek(connection_id=connection_id, code=code, client=_client(request), now=now)
    except (handoff.UnknownCode, handoff.CodeUsed) as error:
        # The link again, opened by whoever used it: on with the page that it led to.
        if isinstance(found, LoginFlow):
            return _shell(request, connection_id, card_of(found, now=now), urls=urls, keep=True)
        return _refusal(request, connection_id, error, urls=urls, keep=True)
    if isinstance(found, LoginFlow) and found.id == flow.id:
        # A reload within the seconds in which the code could be exchanged again: there is nothing left to exchange.
        return _shell(request, connection_id, card_of(found, now=now), urls=urls, keep=True)
    return _shell(request, connection_id, prime_card(flow), urls=urls, keep=True, code=code)


def _start(request: HttpRequest, connection_id: str) -> HttpResponse:
    """POST /login/<id>/start: exchange the code for the cookies. JSON for the script, 303 for a form."""
    now = timezone.now()
    try:
        flow, token = handoff.exchange(
            connection_id=connection_id,
            code=request.POST.get("code", ""),
            client=_client(request),
            now=now,
        )
    except (handoff.UnknownCode, handoff.CodeUsed) as error:
        found = _flow_of_cookie(request, connection_id, now)
        if isinstance(found, LoginFlow):
            return _json(_state_of(found, now)) if _wants_json(request) else _see_page(connection_id)
        return _refusal(request, connection_id, error)
    response = _json(_state_of(flow, now)) if _wants_json(request) else _see_page(connection_id)
    for name, path in (
        (handoff.PAGE_COOKIE, reverse("hosted:page", args=[connection_id])),
        (handoff.STREAM_COOKIE, f"/auth/connections/{connection_id}/events"),
    ):
        response.set_cookie(
            name,
            token,
            max_age=handoff.LIFETIME,
            path=path,
            secure=settings.USE_HTTPS,
            httponly=True,
            samesite="Lax",
        )
    return response


@require_http_methods(["GET"])
def state(request: HttpRequest, connection_id: str) -> HttpResponse:
    """GET /login/<id>/state: version, state and card of the cookie's flow, as JSON."""
    now = timezone.now()
    found = _flow_of_cookie(request, connection_id, now)
    if isinstance(found, LoginFlow):
        return _json(_state_of(found, now))
    return _refusal(request, connection_id, found, as_json=True)


def _submit(request: HttpRequest, connection_id: str) -> HttpResponse:
    """POST /login/<id>/submit: ``interaction_id`` with ``field.<id>`` or ``selected_choice_id``. 202, or 303 for a form."""
    now = timezone.now()
    found = _principal_of_cookie(request, connection_id, now)
    if not isinstance(found, Principal):
        return _refusal(request, connection_id, found)
    values = {
        name.removeprefix("field."): str(value)
        for name, value in request.POST.items()
        if name.startswith("field.") and value
    }
    interaction = request.POST.get("interaction_id", "")
    choice = request.POST.get("selected_choice_id", "")
    try:
        if not interaction:
            raise transitions.InvalidSubmission("The page was not complete. Please reload it.")
        flow = transitions.submit(
            connection_id=connection_id,
            flow_id=found.flow_id,
            answer=transitions.SubmittedAnswer(
                interaction_id=interaction, field_values=values or None, choice_id=choice or None
            ),
            actor=found,
            now=now,
        )
    except (transitions.StaleInteraction, transitions.InvalidSubmission) as error:
        return _refused_answer(request, connection_id, str(found.flow_id), error, now)
    except transitions.FlowOver:
        again = _flow_of_cookie(request, connection_id, now)
        if not isinstance(again, LoginFlow):
            return _refusal(request, connection_id, again)
        if not _wants_json(request):
            return _see_page(connection_id)
        body = {"code": "no_active_flow", "message": "This sign-in has ended.", **_state_of(again, now)}
        return _json(body, status=410)
    if _wants_json(request):
        return _json({"accepted": True, **_state_of(_load(flow.id), now)}, status=202)
    return _see_page(connection_id)


def _refused_answer(
    request: HttpRequest,
    connection_id: str,
    flow_id: str,
    error: transitions.StaleInteraction | transitions.InvalidSubmission,
    now: dt.datetime,
) -> HttpResponse:
    """The present card with the reason. Never what was typed."""
    flow = _load(flow_id)
    stale = isinstance(error, transitions.StaleInteraction)
    if _wants_json(request):
        body: Json = {"code": "stale_interaction" if stale else "invalid_submission", "message": str(error)}
        if isinstance(error, transitions.InvalidSubmission) and error.details:
            body["details"] = error.details
        return _json({**body, **(_state_of(flow, now) if stale else {})}, status=400)
    card = card_of(flow, now=now) | {"alert": str(error)}
    urls = _kept_return_urls(request, connection_id)
    return _shell(request, connection_id, card, urls=urls, status=400)


start = _guarded(_start)
submit = _guarded(_submit)


# ── Parts of views ────────────────────────────────────────────────────────────────────────────────────────────────


def _client(request: HttpRequest) -> str:
    return handoff.client_of(request.META.get("REMOTE_ADDR", ""), request.headers.get("User-Agent", ""))


def _wants_json(request: HttpRequest) -> bool:
    return "application/json" in request.headers.get("Accept", "")


def _load(flow_id: str) -> LoginFlow:
    return LoginFlow.objects.select_related("connection__profile").get(pk=flow_id)


def _principal_of_cookie(request: HttpRequest, connection_id: str, now: dt.datetime) -> Principal | Exception:
    """Who the page's cookie says this is, or why it says nothing (an answer here, not a failure)."""
    token = request.COOKIES.get(handoff.PAGE_COOKIE, "")
    if not token:
        return handoff.UnknownCode()
    transitions.expire_if_due(connection_id=connection_id, now=now)
    try:
        principal = handoff.principal_of_token(token, now=now)
    except (handoff.TokenExpired, handoff.TokenOver) as error:
        return error
    # The cookie's path keeps it to its connection; a forged request may carry it elsewhere.
    return principal if principal.connection_id == connection_id else handoff.UnknownCode()


def _flow_of_cookie(request: HttpRequest, connection_id: str, now: dt.datetime) -> LoginFlow | Exception:
    found = _principal_of_cookie(request, connection_id, now)
    return _load(str(found.flow_id)) if isinstance(found, Principal) else found


def _state_of(flow: LoginFlow, now: dt.datetime) -> Json:
    card = card_of(flow, now=now)
    return {
        "version": flow.version,
        "flow_id": flow.id,
        "flow_status": flow.status,
        "flow_step": flow.step,
        "interaction_id": flow.interaction_id or None,
        "server_time": payloads.timestamp(now),
        "html": _html(card),
    }


def _see_page(connection_id: str) -> HttpResponse:
    return _private(HttpResponseRedirect(reverse("hosted:page", args=[connection_id]), status=303))


def _json(body: Json, *, status: int = 200) -> HttpResponse:
    return _private(JsonResponse(body, status=status))


def _refusal(
    request: HttpRequest,
    connection_id: str,
    why: Exception,
    *,
    urls: ReturnUrls | None = None,
    keep: bool = False,
    as_json: bool = False,
) -> HttpResponse:
    """Why there is nothing to see: 401 and 410 "this link has ended", 404 "there is no sign-in here"."""
    known: dict[type[Exception], tuple[int, str]] = {
        handoff.TokenExpired: (401, "session_expired"),
        handoff.TokenOver: (410, "session_expired"),
        handoff.CodeUsed: (410, "code_used"),
    }
    status, code = known.get(type(why), (404, "not_found"))
    if as_json and status == 404:
        # The script asks for its own page's state: without a cookie it has to be told that it is nobody.
        status, code = 401, "session_expired"
    card = missing_card() if status == 404 else expired_card()
    if as_json or _wants_json(request):
        return _json({"code": code, "message": card["title"] + ".", "html": _html(card)}, status=status)
    return _shell(request, connection_id, card, urls=urls, status=status, keep=keep)


def _shell(
    request: HttpRequest,
    connection_id: str,
    card: Json,
    *,
    urls: ReturnUrls | None = None,
    keep: bool = False,
    code: str = "",
    status: int = 200,
) -> HttpResponse:
    """The page around a card. ``keep``: remember ``urls`` in a signed cookie, in place of what it held."""
    urls = urls or ReturnUrls()
    live = card.get("flow") is not None or card["kind"] == "prime"
    response = render(
        request,
        "hosted/page.html",
        {
            "card": card,
            "card_template": f"hosted/cards/{card['kind']}.html",
            "expired_card": expired_card() if live else None,
            "fatal_card": fatal_card() if live else None,
            "connection_id": connection_id,
            "code": code,
            "csrf_token": get_token(request),
            "urls": urls,
            "return_link": return_link(card, urls),
            "waiting": card["kind"] in WAITING and not card.get("fields"),
            "live": live,
            "now_iso": payloads.timestamp(timezone.now()),
        },
        status=status,
    )
    if keep:
        path = reverse("hosted:page", args=[connection_id])
        if urls.success or urls.error:
            kept = {"connection": connection_id, "success": urls.success, "error": urls.error}
            response.set_cookie(
                RETURN_COOKIE,
                signing.dumps(kept, salt=_RETURN_SALT),
                max_age=handoff.LIFETIME,
                path=path,
                secure=settings.USE_HTTPS,
                httponly=True,
                samesite="Lax",
            )
        elif RETURN_COOKIE in request.COOKIES:
            response.delete_cookie(RETURN_COOKIE, path=path, samesite="Lax")
    return _private(response)


def _private(response: HttpResponse) -> HttpResponse:
    """Nothing of this page may be kept by a cache, told to another site, or put in a stranger's frame."""
    response["Cache-Control"] = "no-store"
    response["Referrer-Policy"] = "no-referrer"
    if settings.FRAME_ANCESTORS:
        response.csp_extra = {"frame-ancestors": list(settings.FRAME_ANCESTORS)}  # type: ignore[attr-defined]
        response.xframe_options_exempt = True  # type: ignore[attr-defined]
    return response
