"""What a page consists of, and what a reading of it says. Data only."""

from __future__ import annotations

import dataclasses
from typing import Literal

from connections.drivers.base import Choice, Field
from connections.drivers.forms.words import ELSEWHERE, SUBMIT, TYPABLE, sso_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Option:
    """One ``<option>``."""

    value: str
    label: str
    selected: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Control:
    """One form control. ``kind`` is the type of an input, or ``select``, ``textarea``, ``submit``."""

    name: str
    kind: str
    value: str = ""
    label: str = ""
    xpath: str = ""
    id: str = ""
    autocomplete: frozenset[str] = frozenset()
    placeholder: str = ""
    hint: str = ""
    error: str = ""
    input_mode: str = ""
    max_length: int | None = None
    pattern: str = ""
    required: bool = False
    readonly: bool = False
    disabled: bool = False
    checked: bool = False
    visible: bool = True
    invalid: bool = False
    options: tuple[Option, ...] = ()
    form_action: str | None = None
    form_method: str | None = None

    @property
    def typable(self) -> bool:
        """Whether a person would type into it."""
        return (
            self.kind in TYPABLE
            and self.visible
            and not self.readonly
            and not self.disabled
            and bool(self.name)
        )

    @property
    def presses(self) -> bool:
        """Whether it is a button that submits, and can be seen and pressed."""
        return self.kind in ("submit", "image") and self.visible and not self.disabled

    @property
    def says(self) -> str:
        """Everything that hints at its meaning, for the patterns below."""
        return f"{self.name} {self.id} {self.label} {self.placeholder}".replace("_", " ").replace("-", " ")


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Form:
    """One form. ``action`` is absolute; ``text`` is what can be read in it, without its buttons and links."""

    action: str
    method: Literal["get", "post"] = "get"
    multipart: bool = False
    encoding: str = "utf-8"
    controls: tuple[Control, ...] = ()
    xpath: str = ""
    text: str = ""
    hints: str = ""
    captcha: bool = False

    @property
    def typed(self) -> tuple[Control, ...]:
        """What a person would type into."""
        return tuple(control for control in self.controls if control.typable)

    @property
    def buttons(self) -> tuple[Control, ...]:
        """The buttons that submit it."""
        return tuple(control for control in self.controls if control.presses)

    @property
    def primary(self) -> Control | None:
        """The button that Enter presses (HTML, "implicit submission"), unless it plainly leads elsewhere."""
        straight = [
            button
            for button in self.buttons
            if not ELSEWHERE.search(button.label) and not sso_of(button.label)
        ]
        named = [button for button in straight if SUBMIT.search(button.label)]
        return next(iter(named or straight), None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Link:
    """One link. ``aside`` when it stands in navigation, header or footer."""

    url: str
    label: str
    xpath: str
    hints: str = ""
    aside: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Page:
    """One page. ``text`` is what can be read without buttons and links; ``heading`` is title and headings."""

    url: str
    title: str = ""
    heading: str = ""
    text: str = ""
    message: str = ""
    forms: tuple[Form, ...] = ()
    links: tuple[Link, ...] = ()
    errors: tuple[str, ...] = ()
    refresh: tuple[float, str] | None = None
    captcha: bool = False
    scripted: bool = False
    orphan_password: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Want:
    """A value the page wants typed, and the controls it goes into (several when each takes one character)."""

    field: Field
    controls: tuple[Control, ...]


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Way:
    """One way on: a link, or a form pressed by ``button`` with ``entries`` chosen in it."""

    choice: Choice
    link: Link | None = None
    form: Form | None = None
    button: Control | None = None
    entries: tuple[tuple[str, str], ...] = ()


Kind = Literal[
    "login", "code", "picker", "external", "relay", "captcha", "bot", "scripted", "signed_in", "other"
]


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Reading:
    """What a page is for. ``signed_in`` when it offers to sign out, whatever else it is."""

    kind: Kind
    form: Form | None = None
    wants: tuple[Want, ...] = ()
    ways: tuple[Way, ...] = ()
    signed_in: bool = False
