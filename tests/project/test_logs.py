"""What the log looks like, and which ids a request gets."""

from __future__ import annotations

import asyncio
import datetime as dt
import io
import json
import logging
import logging.config
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.http import HttpRequest, HttpResponse
from django.test import RequestFactory
from django.utils.functional import SimpleLazyObject

from connections.access import of_user
from events import trace
from project import env, logs
from project.middleware import noted


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    """What JsonLines writes of the logger ``test``, and of the access lines."""
    # Another test of this process may have left its own.
    trace.request_id.set("")
    trace.stream_id.set("")
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    handler.setFormatter(logs.JsonLines())
    loggers = [logging.getLogger("test"), logs.access]
    before = [(logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
    yield written
    for logger, (level, propagate) in zip(loggers, before, strict=True):
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


def objects(written: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in written.getvalue().splitlines()]


def test_a_record_is_one_line_and_one_object(lines: io.StringIO) -> None:
    logging.getLogger("test").warning("two\nlines of %s \x85\u2028", "text")
    assert lines.getvalue().count("\n") == 1
    (line,) = objects(lines)
    assert set(line) == {"time", "level", "logger", "message"}
    assert (line["level"], line["logger"]) == ("WARNING", "test")
    # Compared in ASCII: what a failed assertion says must be printable.
    assert ascii(line["message"]) == ascii("two\nlines of text \x85\u2028")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"])
    assert abs(dt.datetime.fromisoformat(line["time"]) - dt.datetime.now(dt.UTC)) < dt.timedelta(minutes=1)


def test_the_ids_of_request_and_stream_are_in_it_when_there_are_any(lines: io.StringIO) -> None:
    request, stream = trace.request_id.set("r1"), trace.stream_id.set("s1")
    logging.getLogger("test").info("inside")
    trace.request_id.reset(request)
    trace.stream_id.reset(stream)
    logging.getLogger("test").info("outside")
    inside, outside = objects(lines)
    assert (inside["request_id"], inside["stream_id"]) == ("r1", "s1")
    assert not {"request_id", "stream_id"} & set(outside)


def test_an_exception_is_told_with_its_traceback(lines: io.StringIO) -> None:
    try:
        raise ValueError("broken")
    except ValueError:
        logging.getLogger("test").exception("it broke")
    (line,) = objects(lines)
    assert line["exc_info"].startswith("Traceback")
    assert line["exc_info"].endswith("ValueError: broken")


def test_A48_what_others_attach_to_a_record_stays_out(lines: io.StringIO) -> None:
    """Django attaches the request, whose representation has the whole address of a hosted page in it."""
    request = RequestFactory().get("/login/ma_1?code=one-time-code")
    assert "one-time-code" in repr(request), "or this test looks for nothing"
    logging.getLogger("test").warning(
        "Not Found", extra={"request": request, "status_code": 404, "route": "x"}
    )
    logging.getLogger("test").warning({"message": "an object", "request": repr(request)[:5]})
    assert "one-time-code" not in lines.getvalue()
    first, second = objects(lines)
    assert set(first) == set(second) == {"time", "level", "logger", "message"}


# ── The configuration ──


def configured(form: str, level: str) -> dict[str, Any]:
    config = logs.config(form, level)
    logging.config.DictConfigurator(config)
    return config


def test_text_has_no_access_lines_and_json_has() -> None:
    assert configured("text", "INFO")["loggers"][logs.access.name] == {"level": "WARNING"}
    assert logs.access.name not in configured("json", "INFO")["loggers"], "they follow LOG_LEVEL"
    assert configured("json", "WARNING")["root"]["level"] == "WARNING"


@pytest.mark.parametrize("form", ["text", "json"])
def test_A48_whoever_prints_full_addresses_is_quiet_in_every_form(form: str) -> None:
    loggers = configured(form, "DEBUG")["loggers"]
    for name in ("httpx", "httpcore", "django.channels.server", "daphne"):
        assert loggers[name]["level"] == "WARNING"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("LOG_FORMAT", "xml"),
        ("METRICS_TOKEN", "short"),
        ("METRICS_TOKEN", "sixteen and spaces"),
        ("METRICS_TOKEN", "ü" * 20),
    ],
)
def test_a_wrong_knob_ends_the_start_with_its_name_and_without_its_secret(
    tmp_path: Path, name: str, value: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        env.read({"DATA_DIR": str(tmp_path / "var"), name: value})
    assert str(ended.value).startswith(f"switchboard: {name}: ")
    assert name == "LOG_FORMAT" or value not in str(ended.value)


def test_A48_the_token_of_the_metrics_is_not_in_the_representation_of_the_knobs(tmp_path: Path) -> None:
    token = "unmistakable-token"
    knobs = env.read({"DATA_DIR": str(tmp_path / "var"), "METRICS_TOKEN": token, "LOG_FORMAT": "JSON"})
    assert (knobs.metrics_token, knobs.log_format) == (token, "json")
    assert token not in repr(knobs)


# ── Requests ──


def request_of(application: Any, method: str = "GET", **headers: str) -> list[dict[str, Any]]:
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": method,
        "path": "/login/ma_1",
        "query_string": b"code=one-time-code",
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
    }
    asyncio.run(logs.traced(application)(scope, None, send))
    return sent


def answered_id(sent: list[dict[str, Any]]) -> str:
    (found,) = [value.decode() for name, value in sent[0]["headers"] if name == b"X-Request-ID"]
    return found


async def fine(scope: Any, receive: Any, send: Any) -> None:
    logging.getLogger("test").info("at work")
    await send({"type": "http.response.start", "status": 204, "headers": [(b"A", b"b")]})
    await send({"type": "http.response.body"})


@pytest.mark.parametrize("given", ["a", "x" * 64, "1-67.a_b", "0.f-_Z"])
def test_a_clients_own_id_is_taken_over(lines: io.StringIO, given: str) -> None:
    assert answered_id(request_of(fine, **{"x-request-id": given})) == given
    assert {line["request_id"] for line in objects(lines)} == {given}


@pytest.mark.parametrize("given", ["", "x" * 65, "a b", "a\r\nSet-Cookie: b", "ä", "a\n", '{"a"}'])
def test_an_id_that_is_none_is_replaced(lines: io.StringIO, given: str) -> None:
    made = answered_id(request_of(fine, **{"x-request-id": given}))
    assert re.fullmatch(r"[0-9a-f]{32}", made)
    assert {line["request_id"] for line in objects(lines)} == {made}


def test_every_request_has_its_own_id_and_the_rest_of_the_answer_is_as_it_was() -> None:
    first, second = request_of(fine), request_of(fine)
    assert answered_id(first) != answered_id(second)
    assert first[0]["headers"][0] == (b"A", b"b")
    assert first[0]["status"] == 204
    assert first[1] == {"type": "http.response.body"}
    assert trace.request_id.get() == "", "it ends with its request"


def test_the_access_line_names_the_route_and_not_the_path(lines: io.StringIO) -> None:
    request_of(logs.routed("login/<id>", fine))
    _, line = objects(lines)
    assert (line["logger"], line["level"]) == ("switchboard.access", "INFO")
    assert (line["method"], line["route"], line["status"], line["caller"]) == ("GET", "login/<id>", 204, None)
    assert line["milliseconds"] >= 0
    assert "ma_1" not in lines.getvalue()
    assert "one-time-code" not in lines.getvalue()


def test_probes_and_nonsense_do_not_fill_the_log(lines: io.StringIO) -> None:
    request_of(logs.routed("readyz", fine))
    assert [line["logger"] for line in objects(lines)] == ["test"]
    request_of(logs.routed("x", fine), method="G" * 5000)
    assert objects(lines)[-1]["method"] == "?"


def test_a_request_that_breaks_has_its_access_line_too(lines: io.StringIO) -> None:
    async def broken(scope: Any, receive: Any, send: Any) -> None:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError):
        request_of(broken)
    assert objects(lines)[-1]["status"] is None


def test_what_is_no_request_passes_untouched() -> None:
    seen: list[Any] = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope)

    asyncio.run(logs.traced(application)({"type": "lifespan"}, None, None))
    assert seen == [{"type": "lifespan"}]


# ── What Django's middleware notes ──


def noted_of(
    user: Any = None, *, path: str = "/", route: str | None = None, cached: Any = None
) -> logs.Notes:
    request = HttpRequest()
    request.path = path
    notes = logs.Notes()
    request.scope = {logs.NOTES: notes}  # type: ignore[attr-defined]

    def view(request: HttpRequest) -> HttpResponse:
        if route is not None:
            request.resolver_match = SimpleNamespace(route=route)  # type: ignore[assignment]
        if user is not None:
            request.user = user
        if cached is not None:
            request._cached_user = cached  # type: ignore[attr-defined]
        return HttpResponse()

    noted(view)(request)
    return notes


def unasked() -> Any:
    raise AssertionError("who asked was looked up for the sake of a log line")


def test_the_route_is_the_pattern_and_who_asked_is_noted_when_it_is_known() -> None:
    assert noted_of(route="login/<str:connection_id>").route == "login/<str:connection_id>"
    assert noted_of(route="").route == "/"
    assert noted_of(path="/static/js/app.js").route == "static"
    assert noted_of(path="/nowhere/secret").route == ""
    lazy = SimpleLazyObject(unasked)
    assert noted_of(user=lazy).caller == ""
    assert noted_of(user=lazy, cached=User(pk=5)).caller == "user:5"
    assert noted_of(user=lazy, cached=SimpleNamespace(pk=None)).caller == "", "nobody is signed in"


@pytest.mark.django_db
def test_a_key_is_noted_by_its_number(owner: User) -> None:
    assert noted_of(user=of_user(owner)).caller == f"user:{owner.pk}"
    key = SimpleNamespace(pk=7, name="laptop")
    assert noted_of(user=of_user(owner, api_key=key)).caller == "key:7"  # type: ignore[arg-type]


def test_without_an_asgi_server_there_is_nothing_to_note() -> None:
    assert noted(lambda _: HttpResponse("x"))(HttpRequest()).content == b"x"
