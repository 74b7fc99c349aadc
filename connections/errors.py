"""One shape for everything that goes wrong: ``{"code", "message", "details"?}`` (wire contract, section 1).

:func:`translate` knows every exception of the domain; DRF's views, the stream consumers and Django's own handlers all
answer with what it makes. Under the paths of the API nothing ever answers in HTML.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from typing import Any

from django.core.exceptions import (
    ObjectDoesNotExist,
    PermissionDenied,
    RequestDataTooBig,
    SuspiciousOperation,
)
from django.db import OperationalError
from django.http import Http404, HttpRequest, HttpResponse, JsonResponse
from django.template import TemplateDoesNotExist
from django.template.loader import render_to_string
from rest_framework import exceptions
from rest_framework.response import Response

from connections import (
    access,
    commands,
    handoff,
    hooks,
    outputs,
    payloads,
    registry,
    task_inputs,
    tasks,
    transitions,
)
from events import clients

logger = logging.getLogger(__name__)

#: What belongs to the API, so that its errors are JSON.
API_PATH = re.compile(r"^/(auth|credentials|profiles|api)(/|$)")

#: Kernel's SDKs repeat 409 by themselves; an answer that was meant must not be asked for three times.
NO_RETRY = {"x-should-retry": "false"}
BEARER = {"WWW-Authenticate": "Bearer"}
#: When to send a line again to a task whose queue is full, or to ask again for room for a command: somebody else has to end first, so not at once.
QUEUE_RETRY_SECONDS = 5

Detail = dict[str, str]


class ApiError(Exception):
    """An answer that is an error. ``extra`` holds further members of the body (``existing_id``)."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        details: list[Detail] | None = None,
        headers: Mapping[str, str] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.details = details
        self.headers = dict(headers or {})
        if status in (400, 409):
            self.headers.setdefault("x-should-retry", "false")
        if status == 401:
            self.headers.setdefault("WWW-Authenticate", "Bearer")
        self.extra = dict(extra or {})

    @property
    def body(self) -> dict[str, Any]:
        """The JSON body."""
        return {**body(self.code, self.message, self.details), **self.extra}


def body(code: str, message: str, details: list[Detail] | None = None) -> dict[str, Any]:
    """The error body; without details the member is left out."""
    shape: dict[str, Any] = {"code": code, "message": message}
    if details:
        shape["details"] = details
    return shape


def unauthorized(message: str = "A valid API key is required.", *, code: str = "unauthorized") -> ApiError:
    """401: nobody knows who is asking."""
    return ApiError(401, code, message)


def nothing_here() -> ApiError:
    """404, for what does not exist and for what belongs to somebody else."""
    return ApiError(404, "not_found", "There is nothing here.")


def rate_limited(seconds: int) -> ApiError:
    """429, to come back after whole ``seconds``."""
    return ApiError(
        429,
        "rate_limited",
        "Too many requests. Please wait a moment.",
        headers={"Retry-After": str(max(1, seconds))},
    )


def too_large(limit: int) -> ApiError:
    """413: the body has more than ``limit`` bytes."""
    return ApiError(413, "payload_too_large", f"The body may have at most {limit} bytes.")


def flatten(detail: Any, path: str = "") -> Iterator[Detail]:
    """The details of a DRF ValidationError, each naming its key: ``credential.name: This field is required.``"""
    if isinstance(detail, Mapping):
        for key, value in detail.items():
            # "non_field_errors" is DRF's name for "the object itself".
            inner = path if key == "non_field_errors" else f"{path}.{key}" if path else str(key)
            yield from flatten(value, inner)
    elif isinstance(detail, list):
        for value in detail:
            yield from flatten(value, path)
    else:
        message = f"{path}: {detail}" if path else str(detail)
        yield {"code": str(getattr(detail, "code", "invalid")), "message": message}


def invalid_request(details: list[Detail]) -> ApiError:
    """400: the request is not what the schema says. The message repeats the first detail."""
    first = details[0]["message"] if details else "The request is not valid."
    return ApiError(400, "invalid_request", first, details=details)


def translate(error: BaseException) -> ApiError:
    """The answer that belongs to an exception. What nobody expected is logged with its traceback, and is a 500."""
    known = _of_domain(error) or _of_framework(error)
    if known is not None:
        return known
    logger.error("unexpected %s in the API", type(error).__name__, exc_info=error)
    return ApiError(500, "internal_error", "Something went wrong here.")


def _of_domain(error: BaseException) -> ApiError | None:
    match error:
        case ApiError():
            return error
        case transitions.AlreadyExists():
            return ApiError(
                409,
                "already_exists",
                "This profile already has a connection to this domain.",
                extra={"existing_id": error.existing_id},
            )
        case registry.NameTaken():
            return ApiError(
                409, "already_exists", "This name is taken already.", extra={"existing_id": error.existing_id}
            )
        case transitions.LoginInProgress():
            return ApiError(409, "login_in_progress", "A login of this connection is running already.")
        case tasks.InvalidTransition():
            return ApiError(409, "invalid_transition", f"This cannot be done while it is {error.present}.")
        case transitions.QuotaReached():
            return ApiError(403, "quota_reached", str(error))
        case access.Forbidden():
            return ApiError(403, "forbidden", "You may look at this, and not change it.")
        case transitions.StaleInteraction():
            return ApiError(400, "stale_interaction", str(error), extra=_answered(error))
        case transitions.InvalidSubmission():
            return ApiError(
                400, "invalid_submission", str(error), details=[dict(detail) for detail in error.details]
            )
        case transitions.FlowOver():
            message = "This login has ended." if error.flow is not None else "No login is running."
            return ApiError(410, "no_active_flow", message)
        case handoff.CodeUsed():
            return ApiError(410, "handoff_code_used", "This link was used already, or its login has ended.")
        case handoff.TokenOver():
            return ApiError(410, "session_expired", "This login has ended.")
        case handoff.TokenExpired():
            return unauthorized("This session has expired.", code="session_expired")
        case tasks.TaskOver():
            message = f"This task is over: it is {error.present}."
            return ApiError(409, "task_over", message, extra={"status": error.present})
        case task_inputs.TakesNoInput():
            return ApiError(409, "takes_no_input", "A task of this kind takes no input.")
        case task_inputs.MessageConflict():
            return ApiError(409, "idempotency_conflict", "This message id was used for something else.")
        case task_inputs.InputQueueFull():
            message = f"{error} Nothing was accepted. Please try again later."
            return ApiError(429, "queue_full", message, headers={"Retry-After": str(QUEUE_RETRY_SECONDS)})
        case tasks.NotOver():
            message = f"This task has not ended: it is {error.present}. Kill it first."
            return ApiError(409, "task_running", message, extra={"status": error.present})
        case tasks.NoCapacity():
            figures = {"limit": error.limit, "running": error.running, "queued": error.queued}
            headers = {"Retry-After": str(QUEUE_RETRY_SECONDS)}
            return ApiError(429, "no_capacity", str(error), headers=headers, extra=figures)
        case tasks.LeaseLost():
            return ApiError(409, "lease_lost", "Somebody else holds this task by now, or nobody does.")
        case outputs.Gap():
            message = f"The output ends at {error.end}, before this piece."
            return ApiError(409, "gap", message, extra={"end": error.end})
        case commands.NotAllowed():
            return ApiError(403, "commands_forbidden", str(error))
        case commands.InvalidCommand():
            return invalid_request([{"code": "invalid", "message": f"{error.field}: {error}"}])
        case hooks.NoHook():
            return ApiError(
                409, "no_hook", "There is no report to send: the task has no hook, or has not ended."
            )
        case clients.Unknown():
            message = "This connection id is not known here. Connect again."
            return ApiError(409, "connection_unknown", message)
        case clients.Claimed():
            return ApiError(
                409, "claimed", f"{error} is handling this already.", extra={"claim": error.claim}
            )
        case access.NotFound() | handoff.UnknownCode() | ObjectDoesNotExist():
            return nothing_here()
    return None


def _answered(error: transitions.StaleInteraction) -> dict[str, str]:
    """Who was first, for whom came second."""
    if error.answered_at is None:
        return {}
    return {"answered_by": error.answered_by, "answered_at": payloads.timestamp(error.answered_at)}


_OF_STATUS = {
    400: ("invalid_request", "The request is not valid."),
    403: ("forbidden", "You may not do this."),
    404: ("not_found", "There is nothing here."),
    406: ("not_acceptable", "Only JSON is spoken here."),
    415: ("unsupported_media_type", "The body must be application/json."),
}


def _of_framework(error: BaseException) -> ApiError | None:
    match error:
        case exceptions.ValidationError():
            return invalid_request(list(flatten(error.detail)))
        case exceptions.NotAuthenticated() | exceptions.AuthenticationFailed():
            return unauthorized()
        case exceptions.MethodNotAllowed():
            return ApiError(405, "method_not_allowed", "This method is not allowed here.")
        case exceptions.Throttled():
            return rate_limited(1)
        case exceptions.ParseError():
            return ApiError(400, "invalid_json", "The body is not valid JSON.")
        case exceptions.APIException() if error.status_code in _OF_STATUS:
            return ApiError(error.status_code, *_OF_STATUS[error.status_code])
        case Http404():
            return nothing_here()
        case PermissionDenied():
            return ApiError(403, *_OF_STATUS[403])
        case RequestDataTooBig():
            return ApiError(413, "payload_too_large", "The body is too large.")
        case SuspiciousOperation():
            return ApiError(400, *_OF_STATUS[400])
        case OperationalError():
            # The database is away or busy: a passing fault, which must not look like the end of a session.
            logger.error("the database cannot be used right now", exc_info=error)
            return ApiError(
                503, "unavailable", "Not available right now. Please try again.", headers={"Retry-After": "2"}
            )
    return None


def exception_handler(exc: Exception, context: Mapping[str, Any]) -> Response:
    """DRF's hook: every exception of a view, as the contract's answer."""
    error = translate(exc)
    return Response(error.body, status=error.status, headers=error.headers)


def json_response(error: ApiError) -> JsonResponse:
    """The same answer outside of DRF: for Django's handlers and the middleware."""
    return JsonResponse(error.body, status=error.status, headers=error.headers)


# ── Django's own handlers (project/urls.py names them): JSON under the API's paths, a page elsewhere ─────────────


def _answer(request: HttpRequest, error: ApiError, template: str | None = None) -> HttpResponse:
    if API_PATH.match(request.path):
        return json_response(error)
    try:
        page = render_to_string(template or f"{error.status}.html", {"error": error}, request)
    except TemplateDoesNotExist:
        return HttpResponse(
            f"{error.message}\n", status=error.status, content_type="text/plain; charset=utf-8"
        )
    return HttpResponse(page, status=error.status)


def bad_request(request: HttpRequest, exception: BaseException | None = None) -> HttpResponse:
    """A request that Django itself refused."""
    return _answer(request, ApiError(400, *_OF_STATUS[400]))


def permission_denied(request: HttpRequest, exception: BaseException | None = None) -> HttpResponse:
    """Not allowed."""
    return _answer(request, ApiError(403, *_OF_STATUS[403]))


def csrf_failure(request: HttpRequest, reason: str = "") -> HttpResponse:
    """A form without the token of its page (``CSRF_FAILURE_VIEW``). Django has logged the reason."""
    message = "This form was sent without the token of its page. Load the page again."
    return _answer(request, ApiError(403, "forbidden", message), "403_csrf.html")


def not_found(request: HttpRequest, exception: BaseException | None = None) -> HttpResponse:
    """An address that does not exist."""
    return _answer(request, nothing_here())


def server_error(request: HttpRequest) -> HttpResponse:
    """Something broke outside of the API's views. Django has logged it."""
    return _answer(request, ApiError(500, "internal_error", "Something went wrong here."))
