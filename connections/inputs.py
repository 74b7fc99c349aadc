"""What may come in: JSON read strictly, closed schemas, strict types. Nothing is coerced, nothing unknown is dropped.

An error names the key that is wrong and never repeats a value, because a value may be a secret.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import ipaddress
import json
import re
from collections.abc import Mapping
from typing import IO, Any, NoReturn
from urllib.parse import parse_qs, urlsplit

from django.conf import settings
from rest_framework import serializers
from rest_framework.exceptions import ErrorDetail
from rest_framework.fields import empty
from rest_framework.negotiation import BaseContentNegotiation
from rest_framework.parsers import JSONParser
from rest_framework.request import Request

from connections import hooks
from connections.errors import ApiError, Detail, flatten, invalid_request, too_large
from connections.states import TaskKind, TaskStatus, is_external
from connections.terminal.keys import KEYS
from events import clients

Json = dict[str, Any]

MAX_DEPTH = 32
MAX_ECHOED = 16_384
MAX_KEYS = 100
MAX_NAME = 255
MAX_OFFSET = 1_000_000_000
DEFAULT_LIMIT, MAX_LIMIT = 20, 100

_INTEGER = re.compile(r"-?[0-9]{1,30}", re.ASCII)
_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?", re.ASCII)
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


# ── JSON ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _invalid_json(why: str) -> ApiError:
    return ApiError(400, "invalid_json", why)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _no_repeats(pairs: list[tuple[str, Any]]) -> Json:
    """Which of two equal keys counts differs from one reader to the next, so neither does."""
    found: Json = {}
    for key, value in pairs:
        if key in found:
            # As repr() has it: half a surrogate pair could not be sent.
            raise _invalid_json(f"The key {key[:80]!r} stands twice in one object.")
        found[key] = value
    return found


def read_body(stream: IO[bytes] | Any) -> bytes:
    """The body, however it is framed.

    :raises ApiError: 413 when it is longer than ``settings.MAX_BODY_BYTES``. Chunked bodies name no length, so it is counted here.
    """
    limit = settings.MAX_BODY_BYTES
    raw: bytes = stream.read(limit + 1)
    if len(raw) > limit:
        raise too_large(limit)
    return raw


def decode(raw: bytes) -> Any:
    """JSON as RFC 8259 has it: UTF-8, no NaN, no key twice, bounded depth, and no text that a database cannot keep.

    :raises ApiError: 400 ``invalid_json``.
    """
    try:
        value = json.loads(
            raw.decode("utf-8-sig"), parse_constant=_no_constant, object_pairs_hook=_no_repeats
        )
    except RecursionError:
        raise _invalid_json("The body is nested too deeply.") from None
    except ValueError:
        # The decoder's own message may quote the body. UnicodeDecodeError is a ValueError too.
        raise _invalid_json("The body is not valid JSON.") from None
    _check_storable(value)
    return value


def _check_storable(value: Any) -> None:
    """Refuse NUL, lone surrogates, infinite numbers and deep nesting. Iterative: the depth is not trusted yet."""
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        deeper: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                deeper += [*item.keys(), *item.values()]
            elif isinstance(item, list):
                deeper += item
            elif isinstance(item, str) and not storable(item):
                raise _invalid_json("Text may contain neither NUL characters nor half a surrogate pair.")
            elif isinstance(item, float) and item in (float("inf"), float("-inf")):
                raise _invalid_json("A number is too large.")
        if not deeper:
            return
        level = deeper
    raise _invalid_json(f"The body is nested more than {MAX_DEPTH} levels deep.")


def storable(text: str) -> bool:
    """Whether a text can be kept: PostgreSQL has no NUL, and UTF-8 no lone surrogates."""
    return "\x00" not in text and not any("\ud800" <= character <= "\udfff" for character in text)


def is_json(content_type: str) -> bool:
    """Whether a Content-Type header says JSON."""
    return content_type.partition(";")[0].strip().lower() == "application/json"


class StrictJSONParser(JSONParser):
    """DRF's parser of request bodies, with the strictness of :func:`decode`."""

    def parse(
        self, stream: IO[Any], media_type: str | None = None, parser_context: Mapping[str, Any] | None = None
    ) -> Any:
        return decode(read_body(stream))


class AlwaysJSON(BaseContentNegotiation):
    """Whatever ``Accept`` says, the first renderer answers: an SDK that asks for ``*/*`` or a file must not get 406."""

    def select_parser(self, request: Request, parsers: Any) -> Any:
        return next((parser for parser in parsers if is_json(request.content_type or "")), None)

    def select_renderer(self, request: Request, renderers: Any, format_suffix: str | None = None) -> Any:
        return renderers[0], renderers[0].media_type


#: Of the database's own type for it.
MAX_ATTEMPT = 32_767


# ── Query parameters ──────────────────────────────────────────────────────────────────────────────────────────────


@dataclasses.dataclass(frozen=True)
class Page:
    """A piece of a list. ``limit`` is 1 to 100."""

    limit: int
    offset: int


def page_of(query: Mapping[str, str]) -> Page:
    """``limit`` is clamped and never refused; ``offset`` has to be one.

    :raises ApiError: 400 for what is no whole number, or a negative offset.
    """
    limit = _integer(query, "limit", DEFAULT_LIMIT)
    offset = _integer(query, "offset", 0)
    if not 0 <= offset <= MAX_OFFSET:
        raise invalid_request(
            [{"code": "invalid", "message": f"offset: It must be between 0 and {MAX_OFFSET}."}]
        )
    return Page(limit=min(max(limit, 1), MAX_LIMIT), offset=offset)


def _integer(query: Mapping[str, str], name: str, default: int) -> int:
    text = query.get(name)
    if text is None or text == "":
        return default
    if not _INTEGER.fullmatch(text):
        raise invalid_request([{"code": "invalid", "message": f"{name}: A whole number is required."}])
    return int(text)


def text_of(query: Mapping[str, str], name: str) -> str:
    """A parameter to search for; absent is empty.

    :raises ApiError: 400 when it cannot be searched for at all.
    """
    text = query.get(name, "")
    if not storable(text) or len(text) > 2000:
        raise invalid_request([{"code": "invalid", "message": f"{name}: This cannot be searched for."}])
    return text


def wrong_parameter(name: str, message: str, *, code: str = "invalid") -> ApiError:
    """400 for a parameter of the query."""
    return invalid_request([{"code": code, "message": f"{name}: {message}"}])


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskQuery:
    """Which tasks are asked for; empty: all."""

    statuses: frozenset[str]
    kind: str
    text: str
    label: str
    parent_id: str
    connection_id: str


def task_query(query: Mapping[str, str]) -> TaskQuery:
    """The parameters of a list of tasks.

    :raises ApiError: 400.
    """
    statuses = frozenset(filter(None, text_of(query, "status").split(",")))
    if not statuses <= set(TaskStatus.values):
        known = ", ".join(TaskStatus.values)
        raise wrong_parameter("status", f"Use one of {known}, or several with commas.", code="invalid_choice")
    return TaskQuery(
        statuses=statuses,
        kind=text_of(query, "kind"),
        text=text_of(query, "q").strip(),
        label=text_of(query, "label"),
        parent_id=text_of(query, "parent_id"),
        connection_id=text_of(query, "connection_id"),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutputPlace:
    """From where an output is wanted: an offset, so many bytes before the end, or the end. ``strip``: as text, without escape sequences."""

    offset: int = 0
    tail: int | None = None
    live: bool = False
    strip: bool = False

    def begin(self, end: int) -> int:
        """The offset to begin at.

        :raises ApiError: 400 when it is beyond the end.
        """
        if self.live:
            return end
        if self.tail is not None:
            return max(0, end - self.tail)
        if self.offset > end:
            raise beyond_the_end(end)
        return self.offset


def beyond_the_end(end: int) -> ApiError:
    return ApiError(400, "invalid_offset", f"The output ends at {end}.")


def output_place(query: Mapping[str, str]) -> OutputPlace:
    """``from`` (an offset, ``start`` or ``live``), ``tail`` (bytes) and ``ansi`` (``strip`` or ``keep``).

    :raises ApiError: 400.
    """
    given, tail, ansi = query.get("from", ""), query.get("tail", ""), query.get("ansi", "")
    if ansi not in ("", "strip", "keep"):
        raise wrong_parameter("ansi", "Use strip or keep.", code="invalid_choice")
    if given and tail:
        raise wrong_parameter("tail", "Either from or tail.")
    strip = ansi == "strip"
    if tail:
        return OutputPlace(tail=_offset("tail", tail), strip=strip)
    if given == "live":
        return OutputPlace(live=True, strip=strip)
    return OutputPlace(offset=0 if given in ("", "start") else _offset("from", given), strip=strip)


def _offset(name: str, text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise wrong_parameter(
            name, "Use an offset, start or live." if name == "from" else "A number of bytes is required."
        )
    return int(text)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Holder:
    """The program that holds a task. ``at``: where it believes the output to end."""

    worker: str
    attempt: int
    at: int | None


def holder_of(query: Mapping[str, str]) -> Holder:
    """The program that holds a task, where it says so in the query.

    :raises ApiError: 400.
    """
    worker, at = text_of(query, "worker"), query.get("at", "")
    attempt = _integer(query, "attempt", 0)
    if not worker or not 1 <= attempt <= MAX_ATTEMPT:
        raise wrong_parameter("attempt" if worker else "worker", "This is required.", code="required")
    return Holder(worker=worker, attempt=attempt, at=_offset("at", at) if at else None)


#: What one answer of an output has at most.
MAX_OUTPUT = 16 << 20


def output_limit(query: Mapping[str, str]) -> int:
    """``limit``, in bytes; more than :data:`MAX_OUTPUT` is clamped.

    :raises ApiError: 400.
    """
    return min(max(_integer(query, "limit", MAX_OUTPUT), 1), MAX_OUTPUT)


# ── Hosts, URLs, secrets ──────────────────────────────────────────────────────────────────────────────────────────


def normal_host(text: str) -> str:
    """``Example.COM:8000`` → ``example.com:8000``; names of other scripts become their IDNA form.

    :raises ValueError: with a sentence, when it is no host name with an optional port.
    """
    refused = ValueError("Use a host name such as example.com, with an optional port and nothing else.")
    if not text or _CONTROL.search(text) or re.search(r"[\s/?#@\\%]", text):
        raise refused
    try:
        parts = urlsplit(f"//{text}")
        host, port = parts.hostname or "", parts.port
    except ValueError:
        raise refused from None
    if port == 0 or text.endswith(":"):
        raise refused
    if text.startswith("["):
        shown = f"[{ipaddress.IPv6Address(host).compressed}]" if _is_ipv6(host) else ""
    else:
        shown = _ascii_host(host.rstrip("."))
    if not shown or len(shown) > 253:
        raise refused
    return f"{shown}:{port}" if port is not None else shown


def _is_ipv6(host: str) -> bool:
    try:
        ipaddress.IPv6Address(host)
    except ValueError:
        return False
    return "%" not in host


def _ascii_host(host: str) -> str:
    """The host in ASCII; empty when it is none."""
    try:
        ascii_host = host.encode("idna").decode().lower() if not host.isascii() else host.lower()
    except UnicodeError:
        return ""
    labels = ascii_host.split(".")
    if not all(_LABEL.fullmatch(label) for label in labels):
        return ""
    if labels[-1].isdigit():
        try:
            ipaddress.IPv4Address(ascii_host)
        except ValueError:
            return ""
    return ascii_host


def normal_root(text: str) -> str:
    """An entry of ``allowed_domains``: as :func:`normal_host`, without leading ``*.`` and ``www.`` labels.

    :raises ValueError: with a sentence.
    """
    host = text.strip().lower()
    while host.startswith(("*.", "www.")) and "." in host.partition(".")[2]:
        host = host.partition(".")[2]
    return normal_host(host)


def normal_url(text: str) -> str:
    """An absolute http(s) URL.

    :raises ValueError: with a sentence.
    """
    refused = ValueError("Use an absolute http or https URL, without a user name or password.")
    if _CONTROL.search(text) or re.search(r"[\s\\]", text):
        raise refused
    try:
        parts = urlsplit(text)
        usable = bool(parts.scheme in ("http", "https") and parts.hostname and parts.port != 0)
    except ValueError:
        raise refused from None
    if not usable or "@" in parts.netloc:
        raise refused
    try:
        normal_host(parts.netloc)
    except ValueError:
        raise refused from None
    return text


ALGORITHMS = ("SHA1", "SHA256", "SHA512")


@dataclasses.dataclass(frozen=True, repr=False)
class TotpInput:
    """A secret as it was given. What is None was not said."""

    secret: str
    algorithm: str | None = None
    digits: int | None = None
    period: int | None = None
    from_uri: bool = False


def parse_totp(text: str) -> TotpInput:
    """A base32 secret of 16 to 128 characters, or an ``otpauth://totp/…`` URI with one.

    Spaces, dashes, lower case and padding are what sites show to people, and are dropped.

    :raises ValueError: with a sentence that does not repeat the secret.
    """
    if text.lower().startswith("otpauth:"):
        return _parse_otpauth(text)
    return TotpInput(secret=_base32(text))


def _base32(text: str) -> str:
    secret = re.sub(r"[\s-]", "", text).upper().rstrip("=")
    refused = ValueError("Use a base32 secret of 16 to 128 characters, or an otpauth://totp/ URI.")
    if not 16 <= len(secret) <= 128 or not re.fullmatch(r"[A-Z2-7]+", secret, re.ASCII):
        raise refused
    try:
        base64.b32decode(secret + "=" * (-len(secret) % 8))
    except binascii.Error:
        raise refused from None
    return secret


def _parse_otpauth(text: str) -> TotpInput:
    try:
        parts = urlsplit(text)
        query = {name.lower(): values[-1] for name, values in parse_qs(parts.query).items()}
    except ValueError:
        raise ValueError("This otpauth URI cannot be read.") from None
    if parts.netloc.lower() != "totp":
        raise ValueError("Only otpauth://totp/ URIs are supported.")
    if "secret" not in query:
        raise ValueError("This otpauth URI has no secret.")
    algorithm = query["algorithm"].upper().replace("-", "") if "algorithm" in query else None
    if algorithm is not None and algorithm not in ALGORITHMS:
        raise ValueError("The algorithm of this otpauth URI is not SHA1, SHA256 or SHA512.")
    return TotpInput(
        secret=_base32(query["secret"]),
        algorithm=algorithm,
        digits=_uri_number(query, "digits", 6, 10),
        period=_uri_number(query, "period", 1, 3600),
        from_uri=True,
    )


def _uri_number(query: Mapping[str, str], name: str, low: int, high: int) -> int | None:
    if name not in query:
        return None
    if not re.fullmatch(r"[0-9]{1,4}", query[name], re.ASCII) or not low <= int(query[name]) <= high:
        raise ValueError(f"The {name} of this otpauth URI must be between {low} and {high}.")
    return int(query[name])


# ── Strict fields ─────────────────────────────────────────────────────────────────────────────────────────────────


class Text(serializers.CharField):
    """A string that is a string, kept as it came."""

    def __init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("trim_whitespace", False)
        super().__init__(**kwargs)

    def to_internal_value(self, data: Any) -> str:
        if not isinstance(data, str):
            self.fail("invalid")
        return super().to_internal_value(data)


class Name(Text):
    """A name that people read and that stands in an address: 1 to 255 characters on one line."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(max_length=MAX_NAME, trim_whitespace=True, **kwargs)

    def to_internal_value(self, data: Any) -> str:
        text = super().to_internal_value(data)
        if _CONTROL.search(text):
            raise serializers.ValidationError("It may not contain control characters.")
        return text


class Flag(serializers.BooleanField):
    """true or false, and not "yes", 1 or null."""

    def to_internal_value(self, data: Any) -> bool:
        if data is not True and data is not False:
            self.fail("invalid")
        return bool(data)


class Whole(serializers.IntegerField):
    """An integer: neither "5" nor 5.0 nor true."""

    def to_internal_value(self, data: Any) -> int:
        if type(data) is not int:
            self.fail("invalid")
        return data


class OneOf(serializers.ChoiceField):
    """One of a few strings."""

    default_error_messages = {"invalid_choice": "This is not one of the possible values."}

    def to_internal_value(self, data: Any) -> str:
        if not isinstance(data, str):
            self.fail("invalid_choice", input="")
        return str(super().to_internal_value(data))


class Host(Text):
    """A host name with an optional port."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(max_length=MAX_NAME, **kwargs)

    def to_internal_value(self, data: Any) -> str:
        try:
            return normal_host(super().to_internal_value(data))
        except ValueError as error:
            raise serializers.ValidationError(str(error)) from None


class HostRoot(Text):
    """An entry of ``allowed_domains``."""

    def to_internal_value(self, data: Any) -> str:
        try:
            return normal_root(super().to_internal_value(data))
        except ValueError as error:
            raise serializers.ValidationError(str(error)) from None


class HostRoots(serializers.ListField):
    """``allowed_domains``: each once, in the order given."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(child=HostRoot(max_length=MAX_NAME), **kwargs)

    def to_internal_value(self, data: Any) -> list[str]:
        if isinstance(data, list) and len(data) > MAX_KEYS:
            raise serializers.ValidationError(f"It may have at most {MAX_KEYS} entries.")
        return list(dict.fromkeys(super().to_internal_value(data)))


class Url(Text):
    """An http(s) URL, or empty for none."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(max_length=2000, allow_blank=True, **kwargs)

    def to_internal_value(self, data: Any) -> str:
        text = super().to_internal_value(data)
        try:
            return normal_url(text) if text else ""
        except ValueError as error:
            raise serializers.ValidationError(str(error)) from None


class Echoed(serializers.DictField):
    """An object that is stored and echoed, of bounded size."""

    def to_internal_value(self, data: Any) -> Json:
        value: Json = super().to_internal_value(data)
        if len(json.dumps(value)) > MAX_ECHOED:
            raise serializers.ValidationError(f"It may have at most {MAX_ECHOED} characters as JSON.")
        return value


class Values(serializers.DictField):
    """Names and secret values, all of them strings."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(child=Text(allow_blank=True, max_length=10_000), **kwargs)

    def to_internal_value(self, data: Any) -> dict[str, str]:
        if isinstance(data, dict):
            if len(data) > MAX_KEYS:
                raise serializers.ValidationError(f"It may have at most {MAX_KEYS} entries.")
            if any(not key or len(key) > MAX_NAME for key in data):
                raise serializers.ValidationError(f"Each key must have 1 to {MAX_NAME} characters.")
        values: dict[str, str] = super().to_internal_value(data)
        return values


class TotpSecret(Text):
    """A TOTP secret or an otpauth URI; it comes out as a :class:`TotpInput`, or None for the empty string."""

    def to_internal_value(self, data: Any) -> Any:
        text = super().to_internal_value(data)
        if not text:
            return None
        # Here and not as ``max_length``: DRF's validators would get the parsed secret.
        if len(text) > 2000:
            raise serializers.ValidationError("It may have at most 2000 characters.")
        try:
            return parse_totp(text)
        except ValueError as error:
            raise serializers.ValidationError(str(error)) from None

    def run_validation(self, data: Any = empty) -> Any:
        return None if data == "" else super().run_validation(data)


# ── Schemas ───────────────────────────────────────────────────────────────────────────────────────────────────────


class Closed(serializers.Serializer[Any]):
    """A schema that knows all its keys: another one is an error, not ignored."""

    def to_internal_value(self, data: Any) -> Any:
        if isinstance(data, Mapping):
            unknown = [key for key in data if key not in self.fields]
            if unknown:
                raise serializers.ValidationError(
                    {
                        key[:80]: [ErrorDetail("This key is not known.", code="unknown_key")]
                        for key in unknown[:MAX_KEYS]
                    }
                )
        return super().to_internal_value(data)


class CredentialReference(Closed):
    """``{name}``, ``{provider, path}`` or ``{provider, auto: true}``."""

    name = Name(required=False)
    provider = Name(required=False)
    path = Text(required=False, max_length=1000)
    auto = Flag(required=False)

    def validate(self, attrs: Json) -> Json:
        given = set(attrs)
        if given == {"name"} or given == {"provider", "path"}:
            return attrs
        if given == {"provider", "auto"} and attrs["auto"]:
            return attrs
        raise serializers.ValidationError("Use {name}, {provider, path} or {provider, auto: true}.")


class ConnectionUpdate(Closed):
    """What PATCH may change; only the keys sent change. null detaches what is optional."""

    login_url = Url(required=False)
    allowed_domains = HostRoots(required=False)
    credential = CredentialReference(required=False, allow_null=True)
    save_credentials = Flag(required=False)
    record_session = Flag(required=False)
    health_checks = Flag(required=False)
    auto_reauth = Flag(required=False)
    health_check_interval = Whole(required=False, min_value=300, max_value=86_400)
    browser = Echoed(required=False, allow_null=True)
    proxy = Echoed(required=False, allow_null=True)
    browser_telemetry = Echoed(required=False, allow_null=True)


class ConnectionCreate(ConnectionUpdate):
    """What makes a connection. The profile is made when it does not exist."""

    domain = Host()
    profile_name = Name()


class Login(Closed):
    """Overrides for one login. They are accepted for the sake of Kernel's clients; the HTTP driver has no browser."""

    proxy = Echoed(required=False, allow_null=True)
    browser = Echoed(required=False, allow_null=True)
    browser_telemetry = Echoed(required=False, allow_null=True)
    record_session = Flag(required=False)
    skill_mode = OneOf(["enabled", "disabled"], required=False)


class Submit(Closed):
    """An answer: canonical (the first three) or legacy (the others), never both."""

    interaction_id = Text(required=False, max_length=80)
    field_values = Values(required=False)
    selected_choice_id = Text(required=False, max_length=1000)
    fields = Values(required=False)  # type: ignore[assignment]
    mfa_option_id = Text(required=False, max_length=1000)
    sign_in_option_id = Text(required=False, max_length=1000)
    sso_button_selector = Text(required=False, max_length=10_000)
    sso_provider = Text(required=False, max_length=1000)


class Cancel(Closed):
    """Why a login is canceled, in words."""

    reason = Text(required=False, max_length=500)


class Exchange(Closed):
    """The one-time code of the hosted page."""

    code = Text(max_length=200)


class Empty(Closed):
    """No keys at all."""


MAX_LINE = 1_048_576


class Line(Text):
    """What is typed into a task: 1 byte to 1 MiB as UTF-8, of any characters."""

    def to_internal_value(self, data: Any) -> str:
        text = super().to_internal_value(data)
        if len(text.encode()) > MAX_LINE:
            raise serializers.ValidationError(f"It may have at most {MAX_LINE} bytes.", code="max_length")
        return text


#: Rows or columns of a terminal at most.
MAX_SIDE = 2000


class TaskInput(Closed):
    """What is sent to a task: a text (``submit`` false: without Enter behind it), keys, or a new size of its terminal; one of these.
    ``client_message_id`` is for clients that cannot set the header Idempotency-Key."""

    text = Line(required=False)
    submit = Flag(required=False)
    keys = serializers.ListField(child=OneOf(sorted(KEYS)), required=False, min_length=1, max_length=MAX_KEYS)
    rows = Whole(required=False, min_value=1, max_value=MAX_SIDE)
    cols = Whole(required=False, min_value=1, max_value=MAX_SIDE)
    client_message_id = Text(required=False, max_length=255)

    def validate(self, attrs: Json) -> Json:
        given = set(attrs) - {"client_message_id"}
        if given not in ({"text"}, {"text", "submit"}, {"keys"}, {"rows", "cols"}):
            raise serializers.ValidationError("Send a text, keys, or rows and cols.")
        return attrs


MAX_LABELS = 20
MAX_ARGUMENTS = 1000
MAX_ARGUMENT = 131_072
#: Of all arguments together: they stand in every answer and every event of the task.
MAX_ARGUMENT_SUM = 262_144
MAX_SECONDS = 30 * 86_400
_LABEL_OF_TASK = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:/@-]{0,39}", re.ASCII)
_WORKER = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:@-]{0,47}", re.ASCII)


class Labels(serializers.ListField):
    """Short ASCII words, each once, in the order given."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(child=Text(), **kwargs)

    def to_internal_value(self, data: Any) -> list[str]:
        if isinstance(data, list) and len(data) > MAX_LABELS:
            raise serializers.ValidationError(f"It may have at most {MAX_LABELS} entries.")
        labels = list(dict.fromkeys(super().to_internal_value(data)))
        if not all(_LABEL_OF_TASK.fullmatch(label) for label in labels):
            raise serializers.ValidationError("A label has 1 to 40 of A-Z a-z 0-9 _ . : / @ -.")
        return labels


class Arguments(serializers.ListField):
    """A program and its arguments: strings of any characters, and no line for a shell."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(child=Text(allow_blank=True, max_length=MAX_ARGUMENT), **kwargs)

    def to_internal_value(self, data: Any) -> list[str]:
        if isinstance(data, list) and len(data) > MAX_ARGUMENTS:
            raise serializers.ValidationError(f"It may have at most {MAX_ARGUMENTS} entries.")
        arguments = list(super().to_internal_value(data))
        if sum(map(len, arguments)) > MAX_ARGUMENT_SUM:
            raise serializers.ValidationError(
                f"Together they may have at most {MAX_ARGUMENT_SUM} characters. Use a file for more."
            )
        return arguments


class AnyJson(serializers.JSONField):
    """Any JSON, of bounded size."""

    def to_internal_value(self, data: Any) -> Any:
        if len(json.dumps(data)) > MAX_ECHOED:
            raise serializers.ValidationError(f"It may have at most {MAX_ECHOED} characters as JSON.")
        return data


class HookSecret(Text):
    """A secret as Standard Webhooks writes it: ``whsec_`` and the base64 of 24 to 64 bytes."""

    def to_internal_value(self, data: Any) -> str:
        text = super().to_internal_value(data)
        try:
            return hooks.checked_secret(text)
        except ValueError as error:
            raise serializers.ValidationError(str(error)) from None


class TaskUpdate(Closed):
    """Only what is sent changes."""

    title = Text(required=False, max_length=200, trim_whitespace=True)
    labels = Labels(required=False)


class TaskCreate(Closed):
    """A command (``argv`` or ``template``), or a task of somebody's own kind (``payload``). Without ``hook_secret`` one is made up, and answered once.
    ``input`` is the first text that is sent to it; a command gets it, with Enter, once it waits for input."""

    kind = Text(max_length=40)
    argv = Arguments(required=False)
    template = Text(required=False, max_length=100)
    cwd = Text(required=False, max_length=4096)
    rows = Whole(required=False, min_value=1, max_value=MAX_SIDE)
    cols = Whole(required=False, min_value=1, max_value=MAX_SIDE)
    payload = AnyJson(required=False, allow_null=True)
    input = Line(required=False)
    title = Text(required=False, max_length=200, trim_whitespace=True)
    labels = Labels(required=False)
    parent_id = Text(required=False, max_length=80)
    timeout_seconds = Whole(required=False, min_value=1, max_value=MAX_SECONDS)
    hook_url = Url(required=False)
    hook_secret = HookSecret(required=False)

    def validate_kind(self, kind: str) -> str:
        if kind != TaskKind.COMMAND and not is_external(kind):
            ours = kind in TaskKind.values
            raise serializers.ValidationError(
                "Tasks of this kind are made by what they belong to."
                if ours
                else "Use command, or a name of your own: 2 to 40 of a-z 0-9 _ . -, a letter first."
            )
        return kind

    def validate(self, attrs: Json) -> Json:
        command = attrs["kind"] == TaskKind.COMMAND
        foreign = {"payload"} if command else {"argv", "template", "cwd", "rows", "cols"}
        wrong = {key: ["A task of this kind has none."] for key in sorted(foreign & set(attrs))}
        if not attrs.get("hook_url") and "hook_secret" in attrs:
            wrong["hook_secret"] = ["This requires hook_url."]
        if wrong:
            raise serializers.ValidationError(wrong)
        return attrs


class Kill(Closed):
    """Why, in words."""

    reason = Text(required=False, max_length=500, allow_blank=True)


# ── Programs that work ──

#: For how long a program holds a task without a sign of life: seconds.
MIN_LEASE, MAX_LEASE, DEFAULT_LEASE = 5, 3600, 30


class WorkerName(Text):
    """What a program calls itself, so that several of one key are told apart."""

    def to_internal_value(self, data: Any) -> str:
        text = super().to_internal_value(data)
        if not _WORKER.fullmatch(text):
            raise serializers.ValidationError("Use 1 to 48 of A-Z a-z 0-9 _ . : @ -.")
        return text


class Lease(Whole):
    """How long a task is held without a sign of life, in seconds."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(required=False, min_value=MIN_LEASE, max_value=MAX_LEASE, **kwargs)


class WorkClaim(Closed):
    """Which kinds a program takes, and what it calls itself."""

    kinds = serializers.ListField(child=Text(max_length=40), min_length=1, max_length=20)
    worker = WorkerName()
    lease_seconds = Lease()

    def validate_kinds(self, kinds: list[str]) -> list[str]:
        if not all(is_external(kind) for kind in kinds):
            raise serializers.ValidationError("Only kinds of your own can be taken.")
        return kinds


class _Held(Closed):
    worker = WorkerName()
    attempt = Whole(min_value=1, max_value=MAX_ATTEMPT)


class WorkHeartbeat(_Held):
    """A sign of life. ``inputs_taken``: every input up to this number has arrived, and is erased."""

    lease_seconds = Lease()
    inputs_taken = Whole(required=False, min_value=0, max_value=2**31 - 1)


class WorkRelease(_Held):
    """Back to the queue."""


class WorkReply(Closed):
    """A quick reply: a ``text`` to send, or ``keys`` to press."""

    label = Text(max_length=80)  # type: ignore[assignment]
    text = Text(required=False, max_length=500, allow_blank=True)
    keys = serializers.ListField(child=OneOf(sorted(KEYS)), required=False, min_length=1, max_length=MAX_KEYS)

    def validate(self, attrs: Json) -> Json:
        if ("text" in attrs) == ("keys" in attrs):
            raise serializers.ValidationError("Use either text or keys.")
        return attrs


class WorkPrompt(Closed):
    """What the program wants to know. ``password``: nobody sees what is typed, and no page keeps it."""

    kind = OneOf(["text", "yes_no", "menu", "password"], required=False)
    text = Text(max_length=500)
    replies = WorkReply(many=True, required=False, max_length=20)  # type: ignore[call-arg]


WORK_STATUSES = ("running", "waiting_for_input", "completed", "failed")


class WorkStatus(_Held):
    """What the program is doing now, or how it ended. ``prompt`` belongs to waiting, the members about the end to the end."""

    status = OneOf(WORK_STATUSES)
    prompt = WorkPrompt(required=False)
    exit_code = Whole(required=False, min_value=-(2**31), max_value=2**31 - 1)
    error_code = Text(required=False, max_length=40)
    error = Text(required=False, max_length=500)

    def validate(self, attrs: Json) -> Json:
        allowed = {
            "running": set(),
            "waiting_for_input": {"prompt"},
            "completed": {"exit_code"},
            "failed": {"exit_code", "error", "error_code"},
        }[attrs["status"]]
        extra = set(attrs) - {"worker", "attempt", "status"} - allowed
        wrong = {key: ["This does not belong to this status."] for key in sorted(extra)}
        if attrs["status"] == "waiting_for_input" and "prompt" not in attrs:
            wrong["prompt"] = ["This field is required."]
        if wrong:
            raise serializers.ValidationError(wrong)
        return attrs


#: Epochs and cursors are numbers of the database.
MAX_NUMBER = 2**63 - 1


class Nonce(Text):
    """What a page or the server made up to recognise its own question."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(max_length=100, **kwargs)


class Subject(Text):
    """What can be claimed: ``connection:<id>`` or ``task:<id>``."""

    def to_internal_value(self, data: Any) -> str:
        try:
            return clients.normal_subject(super().to_internal_value(data))
        except ValueError as error:
            raise serializers.ValidationError(str(error), code="invalid") from None


class Probe(Closed):
    """A question to one's own stream. ``cursor``: what the page has applied."""

    epoch = Whole(min_value=1, max_value=MAX_NUMBER)
    nonce = Nonce()
    cursor = Whole(required=False, min_value=0, max_value=MAX_NUMBER)


class ProbeAnswer(Closed):
    """The page that was asked is there."""

    nonce = Nonce()


class Suspend(Closed):
    """The page goes to the background. ``leaving``: it ends, so that the next page need not ask whether it is still there."""

    leaving = Flag(required=False)
    epoch = Whole(min_value=1, max_value=MAX_NUMBER)
    cursor = Whole(required=False, min_value=0, max_value=MAX_NUMBER)


class SuspendForm(Suspend):
    """As ``navigator.sendBeacon`` sends it, with the token of the page, for a beacon has no headers."""

    csrfmiddlewaretoken = Text(required=False)


class Disconnect(Closed):
    """Why, in words: the page that is disconnected shows it."""

    reason = Text(required=False, max_length=200, allow_blank=True)


class TakeClaim(Closed):
    """``takeover``: also when somebody else is handling it; both are told."""

    subject = Subject()
    takeover = Flag(required=False)


class BePresent(Closed):
    """Empty: not any more."""

    subject = Subject()
    doing = OneOf(["looking", "typing", ""], allow_blank=True)


class _Totp(Closed):
    sso_provider = Text(required=False, max_length=40, allow_blank=True, allow_null=True)
    totp_secret = TotpSecret(required=False, allow_blank=True)
    totp_algorithm = OneOf(ALGORITHMS, required=False)
    totp_digits = Whole(required=False, min_value=6, max_value=10)
    totp_period = Whole(required=False, min_value=1, max_value=3600)


class CredentialCreate(_Totp):
    """A credential. Values are encrypted and never handed out again."""

    name = Name()
    domain = Host()
    values = Values()


class CredentialUpdate(_Totp):
    """Only what is sent changes: ``remove_value_keys`` first, then ``values`` are merged."""

    name = Name(required=False)
    values = Values(required=False)
    remove_value_keys = serializers.ListField(
        child=Text(max_length=MAX_NAME), required=False, max_length=MAX_KEYS
    )

    def validate(self, attrs: Json) -> Json:
        if not attrs.get("totp_secret"):
            alone = [key for key in ("totp_algorithm", "totp_digits", "totp_period") if key in attrs]
            if alone:
                raise serializers.ValidationError({key: ["This requires totp_secret."] for key in alone})
        return attrs


class ProfileCreate(Closed):
    """A profile; without a name it gets its id as one."""

    name = Name(required=False)


class ProfileUpdate(Closed):
    """A new name."""

    name = Name()


def checked(schema: type[Closed], data: Any) -> Json:
    """The validated body. An absent one is ``{}``.

    :raises ApiError: 400 ``invalid_request`` with one detail per wrong key.
    """
    if not isinstance(data, dict):
        raise invalid_request([{"code": "invalid", "message": "The body must be a JSON object."}])
    serializer = schema(data=data)
    if not serializer.is_valid():
        details: list[Detail] = list(flatten(serializer.errors))
        raise invalid_request(details)
    return dict(serializer.validated_data)
