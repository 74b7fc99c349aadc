"""The form of a connection on the pages: the same rules as the API (``inputs.py``), in words for people."""

from __future__ import annotations

from typing import Any

from django import forms

from connections import inputs
from connections.models import Credential, ManagedAuthConnection

#: What the form changes; the keys are those of ``transitions.CONFIG``.
SETTINGS = (
    "login_url",
    "allowed_domains",
    "credential",
    "save_credentials",
    "health_checks",
    "health_check_interval",
    "auto_reauth",
)

_INTERVALS = [(300, "every 5 minutes"), (900, "every 15 minutes"), (3600, "every hour"), (21600, "every 6 hours"),
              (86400, "every day")]  # fmt: skip


class ConnectionSettings(forms.Form):
    """The settings that can change later. ``owner_id``: whose credentials may be chosen."""

    login_url = forms.CharField(
        label="Login page",
        required=False,
        max_length=2000,
        help_text="Only if it is not found by itself, for example https://example.com/login",
        widget=forms.TextInput(attrs={"class": "input", "inputmode": "url", "autocomplete": "off"}),
    )
    allowed_domains = forms.CharField(
        label="Allowed domains",
        required=False,
        max_length=5000,
        help_text="Where values may be entered besides the domain itself, separated by commas. Empty: wherever the login leads.",
        widget=forms.TextInput(attrs={"class": "input", "autocomplete": "off", "autocapitalize": "none"}),
    )
    credential = forms.ModelChoiceField(
        label="Stored credential",
        queryset=Credential.objects.none(),
        required=False,
        empty_label="None: ask a person",
        help_text="Its values are tried first, so that nobody has to be asked.",
        widget=forms.Select(attrs={"class": "input"}),
    )
    save_credentials = forms.BooleanField(
        label="Keep what was entered (encrypted) for the next time", required=False, initial=True
    )
    health_checks = forms.BooleanField(
        label="Check regularly whether the profile is still signed in", required=False, initial=True
    )
    health_check_interval = forms.TypedChoiceField(
        label="How often to check",
        choices=_INTERVALS,
        coerce=int,
        initial=3600,
        widget=forms.Select(attrs={"class": "input"}),
    )
    auto_reauth = forms.BooleanField(
        label="Sign in again by itself when that works without a person", required=False, initial=True
    )

    def __init__(self, *args: Any, owner_id: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.label_suffix = ""
        credentials: Any = self.fields["credential"]
        credentials.queryset = Credential.objects.filter(owner_id=owner_id).order_by("name")
        if not credentials.queryset.exists():
            credentials.help_text = (
                "There is none yet. What is entered in the first login can be kept for the next time."
            )

    def clean_login_url(self) -> str:
        text = self.cleaned_data["login_url"].strip()
        return _checked(inputs.normal_url, text) if text else ""

    def clean_allowed_domains(self) -> list[str]:
        parts = [part.strip() for part in self.cleaned_data["allowed_domains"].replace("\n", ",").split(",")]
        return list(dict.fromkeys(_checked(inputs.normal_root, part) for part in parts if part))

    def config(self) -> dict[str, Any]:
        """The cleaned values as ``transitions`` wants them."""
        return {name: self.cleaned_data[name] for name in SETTINGS}

    @staticmethod
    def initial_of(connection: ManagedAuthConnection) -> dict[str, Any]:
        found = {name: getattr(connection, name) for name in SETTINGS}
        return {**found, "allowed_domains": ", ".join(connection.allowed_domains)}

    def allow_interval(self, seconds: int) -> None:
        """Keep an interval that was set through the API and is none of the usual ones."""
        field: Any = self.fields["health_check_interval"]
        if seconds not in dict(_INTERVALS):
            field.choices = [(seconds, f"every {seconds} s"), *_INTERVALS]


class NewConnection(ConnectionSettings):
    """Domain and profile say what a connection is, and never change."""

    field_order = ["domain", "profile_name"]

    domain = forms.CharField(
        label="Domain",
        max_length=2000,
        help_text="The site to sign in to, for example example.com",
        widget=forms.TextInput(
            attrs={
                "class": "input",
                "inputmode": "url",
                "autocomplete": "off",
                "autocapitalize": "none",
                "spellcheck": "false",
                "autofocus": True,
            }
        ),
    )
    profile_name = forms.CharField(
        label="Profile",
        max_length=255,
        help_text="Whose cookies these are, for example finance-agent. A new name makes a new profile.",
        widget=forms.TextInput(
            attrs={"class": "input", "autocomplete": "off", "autocapitalize": "none", "list": "profiles"}
        ),
    )

    def clean_domain(self) -> str:
        text = self.cleaned_data["domain"].strip()
        # People paste what the address bar shows: the rest of such a URL is not part of the domain.
        if text.lower().startswith(("http://", "https://")):
            text = text.split("://", 1)[1].partition("/")[0]
        return _checked(inputs.normal_host, text)

    def clean_profile_name(self) -> str:
        name = str(self.cleaned_data["profile_name"]).strip()
        if not inputs.storable(name) or any(ord(character) < 32 for character in name):
            raise forms.ValidationError("It may not contain control characters.")
        return name


def _checked(normal: Any, text: str) -> str:
    try:
        return str(normal(text))
    except ValueError as error:
        raise forms.ValidationError(str(error)) from None
