"""What a login driver is told, what it may ask, and how it ends.

A driver logs in to one web site. It is a coroutine over a :class:`Person`: it asks, the person
answers, and it returns a :class:`Success` or raises :class:`DriverFailed`. It knows no ORM and no
events; the runner (``connections/runners/login.py``) turns its questions into steps of the flow.
The names and types of fields and choices are those of Kernel's managed auth API.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, Protocol

FieldType = Literal["identifier", "password", "code", "totp_code", "totp_secret", "text"]
InputMode = Literal["text", "email", "tel", "numeric"]
ChoiceType = Literal[
    "mfa_method", "sso_provider", "sign_in_method", "auth_method", "identifier_method", "account", "other"
]
MfaType = Literal["sms", "call", "email", "totp", "push", "password", "passkey", "switch", "other"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Field:
    """One value that the site wants. ``ref`` is the name it is saved under in a credential."""

    id: str
    ref: str
    type: FieldType
    label: str
    reason: Literal["missing", "rejected"] = "missing"
    required: bool = True
    hint: str | None = None
    placeholder: str | None = None
    input_mode: InputMode | None = None
    observed_selector: str | None = None
    #: Where the code was sent, when the page says so: decides ``requires_sms_code`` and its kin.
    linked_mfa_type: MfaType | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """One of several ways on: an account, a second factor, an identity provider."""

    id: str
    type: ChoiceType
    label: str
    description: str | None = None
    mfa_type: MfaType | None = None
    masked_destination: str | None = None
    display_text: str | None = None
    context: str | None = None
    observed_selector: str | None = None
    #: For ``sso_provider``: google, github, microsoft ...
    provider: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """A pause for the person: fill in ``fields`` and / or pick one of ``choices``."""

    fields: tuple[Field, ...] = ()
    choices: tuple[Choice, ...] = ()
    website_error: str | None = None
    sso_provider: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExternalAction:
    """A pause for something done elsewhere (approve on the phone). ``fallback`` are the other ways on."""

    message: str
    fallback: Question | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Answer:
    """What the person gave: values by field id, and / or the id of a choice. Never printed."""

    field_values: Mapping[str, str] = dataclasses.field(default_factory=dict)
    choice_id: str | None = None

    def __repr__(self) -> str:
        return f"Answer(fields={sorted(self.field_values)}, choice_id={self.choice_id!r})"


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Totp:
    """A stored one-time-code secret (RFC 6238). ``secret`` is base32."""

    secret: str
    algorithm: Literal["SHA1", "SHA256", "SHA512"] = "SHA1"
    digits: int = 6
    period: int = 30

    def __repr__(self) -> str:
        return f"Totp(algorithm={self.algorithm}, digits={self.digits}, period={self.period})"


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class StoredValues:
    """The values of a credential, by ``ref`` (username, password ...), and its one-time-code secret."""

    values: Mapping[str, str] = dataclasses.field(default_factory=dict)
    totp: Totp | None = None
    sso_provider: str | None = None

    def __repr__(self) -> str:
        return f"StoredValues(keys={sorted(self.values)}, totp={self.totp is not None})"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What one login may cost. Seconds, bytes, counts."""

    pages: int = 40
    page_bytes: int = 2_000_000
    redirects: int = 10
    request_seconds: float = 20.0
    questions: int = 15
    poll_seconds: float = 2.0
    external_seconds: float = 300.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """The site, what is stored for it, and where values may be entered.

    ``domain`` is a host with an optional port. ``allowed_domains`` each cover that host and its subdomains;
    empty means ``domain`` itself, its subdomains and the well-known identity providers, as the wire contract says.
    ``storage_state`` has the format of Playwright's ``storage_state`` (``{"cookies": [...], "origins": [...]}``).
    """

    domain: str
    login_url: str | None = None
    allowed_domains: tuple[str, ...] = ()
    storage_state: Mapping[str, Any] | None = None
    stored: StoredValues = dataclasses.field(default_factory=StoredValues)
    #: The page that showed a signed-in session last time; health checks look there.
    check_url: str | None = None
    allow_private: bool = False
    limits: Limits = dataclasses.field(default_factory=Limits)


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Success:
    """The site let us in. ``storage_state`` holds live session cookies: a secret."""

    storage_state: dict[str, Any]
    post_login_url: str

    def __repr__(self) -> str:
        return f"Success(post_login_url={self.post_login_url!r})"


ErrorCode = Literal[
    "login_form_not_found", "domain_not_allowed", "stuck_in_loop", "max_attempts_reached", "website_error",
    "network_error", "element_not_found", "credentials_invalid", "totp_required", "sms_code_required",
    "email_code_required", "account_choice_required", "customer_input_required", "external_action_required",
    "totp_code_rejected", "unsupported_auth_method", "bot_detected", "captcha_blocked", "session_expired",
    "no_active_flow", "awaiting_input_timeout", "external_action_timeout", "navigation_confused", "browser_error",
    "internal_error",
]  # fmt: skip


class DriverFailed(Exception):
    """The login cannot go on. ``message`` is fit to be shown; it never holds a submitted value."""

    def __init__(self, code: ErrorCode, message: str, *, website_error: str | None = None) -> None:
        super().__init__(f"{code}: {message}")
        self.code: ErrorCode = code
        self.message = message
        self.website_error = website_error


class Person(Protocol):
    """Whoever answers: the hosted page, the dashboard, a terminal, a program over the API."""

    async def discovering(self) -> None:
        """Tell that the driver is looking at the site again (allowed after a submission)."""

    async def submitting_stored(self) -> None:
        """Tell that values from the credential are being sent, so nobody is asked for them."""

    async def ask(self, question: Question) -> Answer:
        """Show the question and return its answer. The flow is then in SUBMITTING."""
        ...

    async def external_action(self, action: ExternalAction) -> None:
        """Show that something has to be done elsewhere. Telling the same again changes nothing."""

    async def answer_within(self, seconds: float) -> Answer | None:
        """Wait that long for a fallback of the external action to be chosen; None when nobody did."""
        ...


class Driver(Protocol):
    """One way of logging in. Both methods may raise :class:`DriverFailed`."""

    async def login(self, target: Target, person: Person) -> Success:
        """Log in, asking ``person`` whatever is not stored."""
        ...

    async def check(self, target: Target) -> bool | None:
        """Whether ``target.storage_state`` is still signed in; None when that cannot be told."""
        ...
