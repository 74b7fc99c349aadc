"""HTML to a page that a login can be walked through. Pure: bytes in, frozen dataclasses out, never an
exception.

Three layers, top to bottom: a parser that reads as browsers do (html5lib, the WHATWG algorithm) but within a
budget; :func:`parse`, which finds forms, controls, labels, links and error messages; :func:`read`, which says
what the page is for (:data:`Kind`), what it wants typed (:class:`Want`) and which other ways on it offers
(:class:`Way`).

A guess that is wrong must be wrong on the safe side: a form is a login form only when something says so,
because stored passwords go into it without anybody looking.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import secrets
import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal
from urllib.parse import urlencode, urljoin, urlsplit

import html5lib  # type: ignore[import-untyped, unused-ignore]
import webencodings  # type: ignore[import-untyped, unused-ignore]
from html5lib import _tokenizer
from html5lib.constants import tokenTypes  # type: ignore[import-untyped, unused-ignore]
from lxml import etree  # type: ignore[import-untyped, unused-ignore]

from connections.drivers.base import Choice, ChoiceType, Field, FieldType, InputMode, MfaType

# ------------------------------------------------------------------------------------------------------------
# What a page consists of


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
            self.kind in _TYPABLE
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
            if not _ELSEWHERE.search(button.label) and not sso_of(button.label)
        ]
        named = [button for button in straight if _SUBMIT.search(button.label)]
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


# ------------------------------------------------------------------------------------------------------------
# What words mean. English first, then the words of the larger European languages.

_TYPABLE = frozenset({"text", "email", "tel", "password", "number", "search", "url", "textarea", "date"})
_I = re.IGNORECASE
_IDENTIFIER = re.compile(
    r"\b(user ?(name|id)?|login( ?(name|id))?|log|e-?mail|phone|mobile|account|identifier|identity|member|"
    r"customer|"
    r"benutzer(name)?|nutzername|kennung|anmeldename|identifiant|usuario|correo|utente|gebruikersnaam|"
    r"session.?key)\b",
    _I,
)
_EMAIL, _PHONE = re.compile(r"\be-?mail|correo|courriel", _I), re.compile(r"\b(phone|mobile|tel|telefon)", _I)
_PASSWORD = re.compile(
    r"pass(word|wd|phrase)?\b|passwort|kennwort|mot de passe|contraseña|wachtwoord|\bpwd\b", _I
)
_CODE = re.compile(
    r"\b(otp|totp|2fa|mfa|tfa|one.?time|passcode|auth(entication)? ?code|verif\w* ?code|security ?code|"
    r"sms ?code|login ?code|access ?code|confirmation ?code|backup ?code|(digit|6.digit).{0,12}code|code|"
    r"token|"
    r"einmal\w*|bestätigungscode|sicherheitscode|código|codice)\b",
    _I,
)
_NOT_CODE = re.compile(
    r"\b(zip|post(al)?|country|promo|coupon|voucher|discount|gift|area|language|csrf)\b", _I
)
_LOGIN = re.compile(
    r"\b(log.?(in|on)|sign.?(in|on)|anmelden|einloggen|connexion|se connecter|iniciar sesión|acceder|accedi|"
    r"entrar|inloggen|logga in|log ind|zaloguj)\b",
    _I,
)
_LOGIN_PATH = re.compile(
    r"(^|[/._-])(log-?in|log-?on|sign-?in|sign_in|signon|auth|sso|session|sessions|oauth2?|identifier|"
    r"wp-login)\b",
    _I,
)
_LOGOUT = re.compile(
    r"\b(log.?(out|off)|sign.?(out|off)|abmelden|ausloggen|déconnexion|se déconnecter|cerrar sesión|esci|"
    r"sair|"
    r"uitloggen|logga ut|wyloguj)\b",
    _I,
)
_LOGOUT_PATH = re.compile(r"[/._-](log-?out|log-?off|sign-?out|sign_out|signoff)\b", _I)
_SUBMIT = re.compile(
    rf"{_LOGIN.pattern}|\b(continue|next|submit|verify|confirm|enter|go|proceed|weiter|bestätigen|suivant|"
    rf"continuer|"
    r"valider|siguiente|continuar|avanti|volgende)\b",
    _I,
)
_SIGN_UP = re.compile(
    r"\b(sign.?up|register|registration|create|join|subscribe|newsletter|notify|konto erstellen|registrieren|"
    r"s'inscrire|inscription|crear)\b",
    _I,
)
_RESET = re.compile(r"\b(forgot|forgotten|reset|recover|lost|vergessen|oublié|olvid)", _I)
_SEARCH = re.compile(r"\b(search|suche|recherche|buscar|query)\b", _I)
_ELSEWHERE = re.compile(
    r"\b(another|different|instead|other (way|method|option)|can.?t|trouble|don.?t have|switch|change|resend|"
    r"send (me )?(a |an |another |new )?(new )?(code|link|text|sms|email|push)|text me|call me|e-?mail me|"
    r"use (a|an|your|my) |try (again|another)|passkey|magic link|not you|andere)\b",
    _I,
)
_NEVER_A_WAY = re.compile(
    rf"{_RESET.pattern}|{_LOGOUT.pattern}|\b(privacy|terms|help|support|contact|about|imprint|cookies?|legal|"
    r"learn more|language|cancel|home|faq|sign.?up|register|create (an |a new )?(account|organi[sz]ation|"
    r"workspace))\b",
    _I,
)
_CHOOSE = re.compile(
    r"\b(choose|select|pick|wähle\w*|choisi\w*|elige|which)\b.{0,60}\b(account|organi[sz]ation|workspace|"
    r"team|tenant|"
    r"method|profile|way|option|konto|compte|cuenta|verif\w*|company)\b|how (would|do) you (like|want) to\b",
    _I,
)
_ACCOUNT_HEADING = re.compile(r"\b(account|profile|konto|compte|cuenta)\b", _I)
_CONFIRM = re.compile(
    r"\b(continue|yes|no|allow|authori[sz]e|accept|agree|confirm|approve|skip|not now|later|trust|weiter|ja|"
    r"nein|done)\b",
    _I,
)
_EXTERNAL = re.compile(
    r"check your (e-?mail|mail|inbox|phone|mobile|device|authenticator)|approve (the |this |your )?(sign|"
    r"log|request|"
    r"notification|on your|in the|it)|approve .{0,40}\bon your (phone|device|mobile)|"
    r"(sent|pushed) (you )?(a|an|the) ([\w-]+ ){0,2}(link|notification|push|request|prompt)|"
    r"(open|click|follow|tap) (the|on the|your) ([\w-]+ ){0,3}(link|app|notification)|magic link|"
    r"waiting for (your )?(approval|confirmation)|tap .{0,20}\b(yes|approve|\d{1,3})\b|"
    r"confirm .{0,40}\bon your (phone|device|mobile)|prüfen sie ihr|bestätigen sie .{0,40}(handy|telefon|"
    r"gerät)",
    _I,
)
_BOT = re.compile(
    r"unusual traffic|verify (that )?you(.re| are) (a )?human|are you a robot|not a robot|"
    r"checking your browser|"
    r"just a moment\.\.\.|automated (queries|requests|access|traffic)|bot (detected|protection)|"
    r"(suspicious|unusual) activity (from|has been)|attention required! \| cloudflare",
    _I,
)
_CAPTCHA = re.compile(r"g-recaptcha|h-captcha|cf-turnstile|frc-captcha|arkose|funcaptcha|captcha", _I)
_NEEDS_SCRIPT = re.compile(r"(enable|requires?|need|activate|turn on|aktivieren).{0,30}java ?script", _I)
_REMEMBER = re.compile(
    r"remember|keep me|stay (signed|logged)|trust (this|my)|angemeldet bleiben|rester connect", _I
)

_METHODS: tuple[tuple[MfaType, re.Pattern[str]], ...] = (
    (
        "totp",
        re.compile(
            r"authenticat(or|ion) app|authenticator|authy|\btotp\b|time.based|two.factor app|2fa app", _I
        ),
    ),
    ("sms", re.compile(r"\bsms\b|text (message|me)|\btext(ed)?\b.{0,20}\b(code|phone|number)|per sms", _I)),
    ("call", re.compile(r"\b(phone call|call me|voice call|anruf)\b|\bcall\b", _I)),
    ("passkey", re.compile(r"passkey|security key|webauthn|yubikey|fido", _I)),
    (
        "push",
        re.compile(
            r"\bpush\b|notification|approve .{0,30}(phone|device|app)|on your (phone|device)|duo\b", _I
        ),
    ),
    ("email", re.compile(r"e-?mail|inbox|magic link", _I)),
    ("password", _PASSWORD),
)
_SENT_TO = re.compile(
    r"(?:sent|texted|e-?mailed|sending|ending|code to|call(?:ed|ing)?|text|sms|e-?mail)\b[^.!?]{0,60}?"
    r"(?:\b(?:to|at|in|with)\b)?\s*[:(]?\s*"
    r"((?:[\w.+•*…-]+@[\w.•*…-]+\w)|(?:\+?[\d() -]*[•*…x]{1,}[\d •*…x()-]*\d{1,4})|(?:\+\d[\d -]{5,}\d))",
    _I,
)
_ENDING = re.compile(r"\bending (?:in|with) (\d{2,4})\b", _I)
_ADDRESS = re.compile(r"[\w.+•*…-]+@[\w•*…-]+(\.[\w•*…-]+)*", _I)

_PROVIDERS: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("google", re.compile(r"\bgoogle\b|google-oauth2?|accounts\.google\.", _I)),
    ("github", re.compile(r"\bgithub\b", _I)),
    (
        "microsoft",
        re.compile(r"\b(microsoft|azure|entra|office ?365|live\.com|outlook)\b|microsoftonline", _I),
    ),
    ("apple", re.compile(r"\bapple(id)?\b", _I)),
    ("okta", re.compile(r"\bokta\b", _I)),
    ("facebook", re.compile(r"\bfacebook\b", _I)),
    ("linkedin", re.compile(r"\blinked.?in\b", _I)),
    ("gitlab", re.compile(r"\bgitlab\b", _I)),
    ("bitbucket", re.compile(r"\bbitbucket\b", _I)),
    ("twitter", re.compile(r"\btwitter\b|\bwith x\b", _I)),
    ("amazon", re.compile(r"\bamazon\b|amazoncognito", _I)),
    ("slack", re.compile(r"\bslack\b", _I)),
    ("discord", re.compile(r"\bdiscord\b", _I)),
    ("auth0", re.compile(r"\bauth0\b", _I)),
    ("onelogin", re.compile(r"\bonelogin\b", _I)),
    ("ping", re.compile(r"\bping ?(one|identity)\b", _I)),
    ("sso", re.compile(r"\b(sso|saml|single sign.?on)\b", _I)),
)
_WITH = re.compile(r"\b(with|using|via|mit|avec|con|through)\b|single sign.?on|\bsso\b", _I)
_AUTH_PATH = re.compile(
    r"o?auth|/login|/connect|/social|/sso|saml|sign-?in|openid|/begin|accounts\.google", _I
)


def sso_of(label: str, hints: str = "") -> str | None:
    """The identity provider that a button or link leads to; None when it leads to none.

    ``hints`` is its address, id and class: with it, an icon without words is enough ("Follow us on GitHub" is
    not).
    """
    for provider, pattern in _PROVIDERS:
        if pattern.search(label) and (_WITH.search(label) or _AUTH_PATH.search(hints)):
            return provider
        if not label.strip() and pattern.search(hints) and _AUTH_PATH.search(hints):
            return provider
    return None


# ------------------------------------------------------------------------------------------------------------
# Parsing within a budget

#: Chrome stops nesting at 512; without a limit, every open tag costs a walk over all open elements.
_MAX_DEPTH = 256
_MAX_NODES = 40_000
_MAX_ATTRIBUTES = 64
_MAX_FORMATTING = 64
_MAX_SECONDS = 8.0
_MAX_FORMS, _MAX_CONTROLS, _MAX_LINKS = 60, 300, 1_000
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*\Z")
#: What XML, and so lxml, cannot hold.
_NOT_XML = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")
_META_CHARSET = re.compile(rb"<meta[^>]{0,200}?charset\s*=\s*[\"']?\s*([A-Za-z0-9_.:-]{1,40})", re.IGNORECASE)


class _Exhausted(Exception):
    """The page costs more than a login page is worth; what was read so far counts."""


class _Source:
    """The page as a stream that raises :class:`_Exhausted` at the deadline, amid a tag or a comment, too."""

    def __init__(self, markup: str, deadline: float) -> None:
        self._markup, self._at, self._deadline = markup, 0, deadline

    def read(self, size: int) -> str:
        if time.monotonic() > self._deadline:
            raise _Exhausted
        piece = self._markup[self._at : self._at + size]
        self._at += len(piece)
        return piece


class _Tokenizer(_tokenizer.HTMLTokenizer):  # type: ignore[misc]
    """html5lib's, giving only such tokens as lxml can hold. Comments are dropped."""

    def beforeAttributeNameState(self) -> bool:
        # Looking for duplicates is quadratic in the number of attributes of one tag.
        del self.currentToken["data"][_MAX_ATTRIBUTES:]
        return bool(super().beforeAttributeNameState())

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for token in super().__iter__():
            kind = token["type"]
            if kind in (tokenTypes["ParseError"], tokenTypes["Comment"]):
                continue
            if kind == tokenTypes["Doctype"]:
                # Only its being there matters here, and lxml chokes on the odd ones.
                token = {**token, "name": "html", "publicId": None, "systemId": None}
            elif kind in (tokenTypes["Characters"], tokenTypes["SpaceCharacters"]):
                token["data"] = _NOT_XML.sub(" ", token["data"])
            else:
                _clean_tag(token)
            yield token


def _clean_tag(token: dict[str, Any]) -> None:
    """Names that XML cannot hold go (``@click``, ``:href``): nothing we look at is called like that."""
    if not _NAME.match(token["name"]):
        token["name"] = "x-unknown"
    if token["type"] == tokenTypes["EndTag"]:
        return
    attributes = token["data"]
    for name in list(attributes):
        if not _NAME.match(name) or name.startswith("xmlns"):
            del attributes[name]
        else:
            attributes[name] = _NOT_XML.sub("", attributes[name])


class _TreeBuilder(html5lib.getTreeBuilder("lxml")):  # type: ignore[misc]
    """html5lib's for lxml, with a limit on depth (siblings from there on, as in Chrome) and on size."""

    nodes = 0

    def insertElementNormal(self, token: dict[str, Any]) -> Any:
        self._count()
        if len(self.openElements) > _MAX_DEPTH:
            self.openElements.pop()
        return super().insertElementNormal(token)

    def createElement(self, token: dict[str, Any]) -> Any:
        self._count()
        return super().createElement(token)

    def reconstructActiveFormattingElements(self) -> None:
        # Each paragraph would repeat all of them, so a thousand <b a=...> cost a million nodes.
        del self.activeFormattingElements[:-_MAX_FORMATTING]
        super().reconstructActiveFormattingElements()

    def _count(self) -> None:
        self.nodes += 1
        if self.nodes > _MAX_NODES:
            raise _Exhausted


class _Parser(html5lib.HTMLParser):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__(tree=_TreeBuilder, namespaceHTMLElements=False)

    def tree_of(self, markup: str) -> Any:
        """The root element; None when there is none."""
        self.innerHTMLMode = self.scripting = False
        self.tokenizer = _Tokenizer(_Source(markup, time.monotonic() + _MAX_SECONDS), parser=self)
        self.reset()
        # html5lib 1.1, the last release, fails its own assertions on a few broken pages. What it has built
        # until then is a tree all the same.
        with contextlib.suppress(_Exhausted, AssertionError):
            self.mainLoop()
        document = self.tree.document
        return document._elementTree.getroot() if document._elementTree is not None else None


def decode(body: bytes, charset: str | None = None) -> tuple[str, str]:
    """``body`` as text, and the WHATWG name of its encoding.

    Tried in this order: byte order mark, header, ``<meta>``, UTF-8, windows-1252.
    """
    for mark, name in ((b"\xef\xbb\xbf", "utf-8"), (b"\xff\xfe", "utf-16le"), (b"\xfe\xff", "utf-16be")):
        if body.startswith(mark):
            return body[len(mark) :].decode(name, "replace"), "utf-8"
    encoding = webencodings.lookup(charset) if charset else None
    if encoding is None:
        declared = _META_CHARSET.search(body[:4096])
        encoding = webencodings.lookup(declared[1].decode("ascii")) if declared else None
        if encoding is not None and encoding.name.startswith("utf-16"):
            encoding = webencodings.UTF8  # a <meta> that could be read is not in UTF-16
    if encoding is None:
        try:
            return body.decode("utf-8"), "utf-8"
        except UnicodeDecodeError:
            encoding = webencodings.lookup("windows-1252")
    if encoding.name in ("x-user-defined", "replacement"):
        return body.decode("latin-1"), "utf-8"
    # Forms on UTF-16 pages are sent in UTF-8 (Encoding standard, "get an output encoding").
    output = "utf-8" if encoding.name.startswith("utf-16") else str(encoding.name)
    return body.decode(encoding.codec_info.name, "replace"), output


# ------------------------------------------------------------------------------------------------------------
# Finding things in the tree

_SILENT = frozenset(
    {"script", "style", "template", "head", "title", "noscript", "svg", "iframe", "object", "select"}
)
_ASIDE = frozenset({"nav", "header", "footer"})
_INLINE = frozenset(
    {"a", "b", "i", "em", "strong", "span", "small", "code", "u", "font", "abbr", "label", "mark", "x"}
)
_HIDING_STYLE = re.compile(r"display\s*:\s*none|visibility\s*:\s*hidden", _I)
_ERROR_CLASS = re.compile(
    r"(^|[\s_-])(error|errors|errorlist|errornote|danger|invalid-feedback|alert-(warning|error)|"
    r"flash-(error|alert)|"
    r"fehler|error-?(message|text|msg)|validation-summary-errors|form-error|field-error)($|[\s_-])",
    _I,
)
_NOT_ERROR = re.compile(r"success|info|notice-ok|hidden|sr-only", _I)


class _Document:
    """A parsed tree with the look-ups that labels need."""

    def __init__(self, root: Any, url: str, encoding: str) -> None:
        self.root, self.url, self.encoding = root, url, encoding
        self.hidden: set[Any] = set()
        self.aside: set[Any] = set()
        self.inert: set[Any] = set()
        self.by_id: dict[str, Any] = {}
        self.labels: dict[str, Any] = {}
        base = url
        for node in root.iter(etree.Element):
            parent = node.getparent()
            if parent in self.hidden or _hides(node):
                self.hidden.add(node)
            if (
                parent in self.aside
                or node.tag in _ASIDE
                or node.get("role") in ("navigation", "contentinfo", "banner")
            ):
                self.aside.add(node)
            if parent in self.inert or node.tag in ("template", "script", "style"):
                self.inert.add(node)
            self.by_id.setdefault(node.get("id", ""), node)
            if node.tag == "label" and node.get("for"):
                self.labels.setdefault(node.get("for"), node)
            if node.tag == "base" and node.get("href") and base == url:
                base = _join(url, node.get("href")) or url
        self.base = base
        self.tree = root.getroottree()

    def visible(self, node: Any) -> bool:
        return node not in self.hidden

    def xpath(self, node: Any) -> str:
        identity = node.get("id", "")
        if identity and not re.search(r"['\"\s]", identity) and self.by_id.get(identity) is node:
            return f"//*[@id='{identity}']"
        return str(self.tree.getpath(node))

    def text(self, node: Any, *, without: frozenset[str] = frozenset()) -> str:
        """What can be read inside ``node``, its hidden parts left out; white space is collapsed."""
        pieces: list[str] = []
        stack: list[Any] = [node]
        while stack:
            item = stack.pop()
            if isinstance(item, str):
                pieces.append(item)
                continue
            if (
                not isinstance(item.tag, str)
                or item.tag[0] == "{"
                or item.tag in _SILENT
                or item.tag in without
            ):
                continue
            if item is not node and item in self.hidden:
                continue
            if item.tag == "img" and item.get("alt"):
                pieces.append(f" {item.get('alt')} ")
            edge = "" if item.tag in _INLINE else " "
            stack.append(edge)
            for child in reversed(item):
                stack += [child.tail or "", child]
            stack += [item.text or "", edge]
        return " ".join("".join(pieces).split())

    def named(self, ids: str | None) -> str:
        """The text of the elements that an ``aria-labelledby`` or ``aria-describedby`` names."""
        found = (self.by_id.get(one) for one in (ids or "").split()[:8])
        return " ".join(self.text(node) for node in found if node is not None).strip()

    def label_of(self, node: Any) -> str:
        """What a control is called (a simplified "accessible name"): the first of these that says a thing."""
        explicit = self.labels.get(node.get("id") or "\0")
        wrapping = next((above for above in node.iterancestors("label")), None)
        candidates = (
            lambda: self.text(explicit, without=_CONTROLS) if explicit is not None else "",
            lambda: self.text(wrapping, without=_CONTROLS) if wrapping is not None else "",
            lambda: node.get("aria-label", ""),
            lambda: self.named(node.get("aria-labelledby")),
            lambda: node.get("placeholder", ""),
            lambda: node.get("title", ""),
            lambda: _before(node),
        )
        for candidate in candidates:
            label = " ".join(candidate().split()).rstrip(" :*")
            if label:
                return label[:200]
        return ""


_CONTROLS = frozenset({"input", "button", "select", "textarea"})
_PROSE = frozenset({"a", "button", "select", "option", "label", *_ASIDE})


def _hides(node: Any) -> bool:
    return (
        node.get("hidden") is not None
        or node.get("aria-hidden") == "true"
        or (node.tag == "input" and node.get("type", "").lower() == "hidden")
        or bool(_HIDING_STYLE.search(node.get("style", "")))
    )


def _before(node: Any) -> str:
    """The words just before a control that has no label: in its line, or in the cell to its left."""
    for place in (node, node.getparent()):
        if place is None or place.tag in ("form", "body"):
            return ""
        previous = place.getprevious()
        while previous is not None and previous.tag == "br":
            previous = previous.getprevious() if not (previous.tail or "").strip() else None
        words = place.getprevious().tail if place.getprevious() is not None else place.getparent().text
        if words and words.strip():
            return str(words)
        if previous is not None and previous.tag in ("td", "th", "dt", "b", "strong", "span", "p", "font"):
            return " ".join("".join(previous.itertext()).split())
    return ""


def _join(base: str, reference: str) -> str | None:
    """``reference`` made absolute; None when it is no http address."""
    try:
        url = urljoin(base, reference.strip())
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return None
    return url if valid else None


def parse(body: bytes | str, url: str, charset: str | None = None) -> Page:
    """The page at ``url``; ``charset`` is that of the Content-Type header, if any. Never raises."""
    markup, encoding = (body, "utf-8") if isinstance(body, str) else decode(body, charset)
    root = _Parser().tree_of(markup)
    if root is None:
        return Page(url=url)
    document = _Document(root, url, encoding)
    forms, orphan_password = _forms(document)
    links = tuple(_links(document))
    title = " ".join("".join(root.xpath("string(//title)")).split())[:300]
    headings = [
        document.text(node) for node in root.xpath("//h1|//h2|//h3|//legend|//*[@role='heading']")[:20]
    ]
    main = root.find(".//main")
    text = document.text(root, without=_PROSE)
    return Page(
        url=url,
        title=title,
        heading=" . ".join([title, *headings])[:1000],
        text=text[:5000],
        message=_message(document, main if main is not None else root),
        forms=forms,
        links=links,
        errors=_errors(document),
        refresh=_refresh(document),
        captcha=any(_is_captcha(node) for node in root.iter(etree.Element)),
        scripted=root.find(".//script") is not None,
        orphan_password=orphan_password,
    )


def _forms(document: _Document) -> tuple[tuple[Form, ...], bool]:
    """The forms with their controls, also those of ``form=`` and those that broken markup left outside."""
    nodes = [node for node in document.root.iter("form") if node not in document.inert][:_MAX_FORMS]
    owned: dict[Any, list[Any]] = {node: [] for node in nodes}
    orphan_password = False
    last: Any = None
    for node in document.root.iter("form", *_CONTROLS):
        if node in document.inert:
            continue
        if node.tag == "form":
            # In broken tables the form element is closed at once, but goes on owning what follows (HTML,
            # "form element pointer"). A form with controls inside is whole.
            whole = any(True for _ in node.iter(*_CONTROLS))
            last = None if whole else node
            continue
        owner = (
            document.by_id.get(node.get("form"))
            if node.get("form")
            else next(node.iterancestors("form"), last)
        )
        if owner in owned and len(owned[owner]) < _MAX_CONTROLS:
            owned[owner].append(node)
        elif owner is None and node.get("type", "").lower() == "password" and document.visible(node):
            orphan_password = True
    return tuple(_form(document, node, controls) for node, controls in owned.items()), orphan_password


def _form(document: _Document, node: Any, controls: Sequence[Any]) -> Form:
    action = node.get("action", "").strip()
    hints = " ".join(
        [action, node.get("id", ""), node.get("class", ""), node.get("name", ""), node.get("role", "")]
    )
    return Form(
        # Without an action a form goes to its own page, not to <base> (HTML, "form submission algorithm").
        action=(_join(document.base, action) or "") if action else document.url,
        method="post" if node.get("method", "").strip().lower() == "post" else "get",
        multipart=node.get("enctype", "").strip().lower() == "multipart/form-data",
        encoding=document.encoding,
        controls=tuple(_control(document, control) for control in controls),
        xpath=document.xpath(node),
        text=document.text(node, without=_PROSE)[:2000],
        hints=hints,
        captcha=any(_is_captcha(part) for part in node.iter(etree.Element)),
    )


def _control(document: _Document, node: Any) -> Control:
    kind = node.get("type", "").strip().lower()
    if node.tag == "button":
        kind = "submit" if kind in ("", "submit") else "button"
    elif node.tag != "input":
        kind = node.tag
    elif kind not in _TYPABLE | {
        "hidden",
        "checkbox",
        "radio",
        "submit",
        "image",
        "button",
        "reset",
        "file",
        "range",
        "color",
    }:
        kind = "text"
    is_button = kind in ("submit", "button", "image", "reset")
    label = _button_label(document, node) if is_button else document.label_of(node)
    # A value is sent with CRLF line ends; what is typed has none anyway.
    value = node.get("value", "") if node.tag != "textarea" else "".join(node.itertext())
    if kind in ("checkbox", "radio"):
        value = node.get("value", "on")
    length = node.get("maxlength", "")
    described = document.named(node.get("aria-describedby"))
    invalid = node.get("aria-invalid") == "true"
    return Control(
        name=node.get("name", ""),
        kind=kind,
        value=value,
        label=label,
        xpath=document.xpath(node),
        id=node.get("id", ""),
        autocomplete=frozenset(node.get("autocomplete", "").lower().split()),
        placeholder=node.get("placeholder", "")[:200],
        hint="" if invalid else described[:300],
        error=(document.named(node.get("aria-errormessage")) or described)[:300] if invalid else "",
        input_mode=node.get("inputmode", "").lower(),
        max_length=int(length) if length.isascii() and length.isdecimal() and len(length) < 6 else None,
        pattern=node.get("pattern", ""),
        required=node.get("required") is not None or node.get("aria-required") == "true",
        readonly=node.get("readonly") is not None,
        disabled=node.get("disabled") is not None
        or any(above.get("disabled") is not None for above in node.iterancestors("fieldset")),
        checked=node.get("checked") is not None,
        visible=document.visible(node),
        invalid=invalid,
        options=tuple(_options(document, node)) if kind == "select" else (),
        form_action=_join(document.base, node.get("formaction")) or "" if node.get("formaction") else None,
        form_method=node.get("formmethod", "").lower() or None,
    )


def _button_label(document: _Document, node: Any) -> str:
    own = document.text(node) if node.tag == "button" else node.get("value", "")
    return " ".join((own or node.get("aria-label") or node.get("title") or node.get("alt") or "").split())[
        :200
    ]


def _options(document: _Document, node: Any) -> Iterator[Option]:
    options = list(node.iter("option"))[:300]
    chosen = [option for option in options if option.get("selected") is not None]
    for option in options:
        label = " ".join("".join(option.itertext()).split())
        selected = option is (chosen[-1] if chosen else options[0])
        yield Option(value=option.get("value", label), label=option.get("label") or label, selected=selected)


def _links(document: _Document) -> Iterator[Link]:
    for node in list(document.root.iter("a", "area"))[:_MAX_LINKS]:
        href = node.get("href")
        url = _join(document.base, href) if href and not href.startswith("#") else None
        if url is None or not document.visible(node) or node in document.inert:
            continue
        label = document.text(node) or node.get("aria-label", "") or node.get("title", "")
        yield Link(
            url=url,
            label=" ".join(label.split())[:200],
            xpath=document.xpath(node),
            hints=f"{href} {node.get('id', '')} {node.get('class', '')}",
            aside=node in document.aside,
        )


def _errors(document: _Document) -> tuple[str, ...]:
    """What the site complains about, outermost element first, each thing once."""
    found: list[str] = []
    taken: set[Any] = set()
    for node in document.root.iter(etree.Element):
        if node.getparent() in taken:
            taken.add(node)
            continue
        style = node.get("class", "")
        complains = (
            node.get("role") == "alert" or node.get("aria-live") == "assertive" or _ERROR_CLASS.search(style)
        )
        if (
            not complains
            or _NOT_ERROR.search(style)
            or not document.visible(node)
            or node.tag in ("body", "html", "form")
        ):
            continue
        if next(node.iter(*_CONTROLS), None) is None:
            text = document.text(node)
        elif node.tag in ("font", "p", "span", "b"):
            text = " ".join((node.text or "").split())  # never closed, so that it swallowed the form
        else:
            continue  # a group of fields marked red, not a message
        if text and len(text) <= 600 and text not in found:
            found.append(text)
            taken.add(node)
    for node in document.root.iter("input"):
        if node.get("aria-invalid") == "true":
            text = document.named(node.get("aria-errormessage") or node.get("aria-describedby"))
            if text and not any(text in known for known in found):
                found.append(text)
    return tuple(found[:5])


def _message(document: _Document, node: Any) -> str:
    """The few sentences a person would read: paragraphs and headings, without buttons and links."""
    return document.text(node, without=_PROSE)[:500]


def _refresh(document: _Document) -> tuple[float, str] | None:
    """Delay (seconds) and target of a ``<meta http-equiv=refresh>`` (HTML, "declarative refresh steps")."""
    for node in document.root.iter("meta"):
        match = re.match(
            r"\s*(\d{1,6})(?:\.\d*)?\s*(?:[;,\s]\s*(?:url\s*=\s*)?[\"']?([^\"']*))?",
            node.get("content", ""),
            _I,
        )
        if node.get("http-equiv", "").strip().lower() == "refresh" and match and node not in document.inert:
            target = _join(document.base, match[2]) if match[2] else document.url
            return (float(match[1]), target) if target else None
    return None


def _is_captcha(node: Any) -> bool:
    """Whether ``node`` is a puzzle for people, not just a script that scores visitors in the background."""
    if node.tag in ("script", "link", "body", "html", "form"):
        return False
    marks = f"{node.get('class', '')} {node.get('id', '')} {node.get('name', '')}"
    if node.tag == "iframe":
        marks += node.get("src", "")
    # grecaptcha v3 and "invisible" ones have no widget to solve, and many sites let the form pass without.
    return bool(_CAPTCHA.search(marks)) and node.get("data-size") != "invisible"


# ------------------------------------------------------------------------------------------------------------
# What a page is for


def read(page: Page) -> Reading:
    """Say what ``page`` is for. The order below is the order of certainty."""
    signed_in = _offers_logout(page)
    login, code = _login_form(page, signed_in), _code_form(page)
    form = login if login is not None and (code is None or _has_password(login)) else code
    if _is_relay(page):
        relay = next(candidate for candidate in page.forms if not candidate.typed)
        return Reading(kind="relay", form=relay)
    if form is not None:
        if form.captcha:
            return Reading(kind="captcha", form=form)
        wants = _wants(page, form)
        kind: Kind = "login" if form is login else "code"
        return Reading(kind=kind, form=form, wants=wants, ways=_ways_beside(page, form), signed_in=signed_in)
    external = bool(_EXTERNAL.search(f"{page.heading} . {page.text}")) and not _has_fields(page)
    if external and not (signed_in and not _EXTERNAL.search(page.heading)):
        return Reading(kind="external", ways=_ways_beside(page, None), signed_in=signed_in)
    picker = _picker(page, signed_in)
    if picker:
        return Reading(kind="picker", ways=picker, signed_in=signed_in)
    if signed_in:
        return Reading(kind="signed_in", signed_in=True)
    providers = tuple(_sso_ways(page))
    if providers:
        return Reading(kind="login", ways=_unique((*providers, *_alternatives(page, None))))
    return Reading(kind=_dead_end(page))


def _dead_end(page: Page) -> Kind:
    """Why nothing can be done on a page that offers nothing."""
    if _BOT.search(f"{page.title} . {page.text}"):
        return "bot"
    if page.captcha:
        return "captcha"
    fields = any(control.typable for form in page.forms for control in form.controls)
    empty = page.scripted and not fields and len(page.text) < 200 and not page.links
    if page.orphan_password or empty or (page.scripted and _NEEDS_SCRIPT.search(page.text) and not fields):
        return "scripted"
    return "other"


def login_link(page: Page) -> str | None:
    """Where "Log in" leads to; None when the page has no such link."""
    by_words = [
        link for link in page.links if _LOGIN.search(link.label) and not sso_of(link.label, link.hints)
    ]
    by_path = [
        link for link in page.links
        if re.search(r"/(log-?in|sign-?in|sign_in)\b", urlsplit(link.url).path, _I)
        and not sso_of(link.label, link.hints)
        and not _SIGN_UP.search(link.label)
        and not _RESET.search(link.label)
    ]  # fmt: skip
    for link in (*by_words, *by_path):
        return link.url
    for form in page.forms:
        button = form.primary
        if form.method == "get" and not form.typed and button is not None and _LOGIN.search(button.label):
            return form.action or None
    return None


def is_login_path(url: str) -> bool:
    """Whether the path of ``url`` is called as login pages are."""
    return bool(_LOGIN_PATH.search(urlsplit(url).path))


def signature(reading: Reading) -> tuple[str, ...]:
    """The same for a form that comes again, whatever its token and address: then a value was rejected."""
    names = sorted(control.name for want in reading.wants for control in want.controls)
    return (reading.kind, *names)


def mfa_type_of(text: str) -> MfaType | None:
    """Which second factor ``text`` speaks of."""
    return next((kind for kind, pattern in _METHODS if pattern.search(text)), None)


def destination_of(text: str) -> str | None:
    """The masked number or address that ``text`` says a code was sent to, as written there."""
    ending = _ENDING.search(text)
    if ending:
        return f"••{ending[1]}"
    match = _SENT_TO.search(text)
    return match[1].strip(" .") if match else None


def _offers_logout(page: Page) -> bool:
    if any(_LOGOUT.search(link.label) or _LOGOUT_PATH.search(urlsplit(link.url).path) for link in page.links):
        return True
    return any(
        _LOGOUT_PATH.search(urlsplit(form.action).path)
        or any(_LOGOUT.search(button.label) for button in form.buttons)
        for form in page.forms
    )


def _has_password(form: Form) -> bool:
    return any(control.kind == "password" and not _is_code(control) for control in form.typed)


def _has_fields(page: Page) -> bool:
    """Whether anything but search and newsletter wants typing."""
    return any(form.typed and not _is_beside_the_point(form) for form in page.forms)


def _is_beside_the_point(form: Form) -> bool:
    """Search, newsletter, registration, reset: forms with an e-mail address that log nobody in."""
    typed = form.typed
    words = " ".join(button.label for button in form.buttons)
    if any(control.kind == "search" or control.name in ("q", "s", "query", "search") for control in typed):
        return True
    if "search" in form.hints.lower().split() or _SEARCH.search(form.hints.replace("/", " ")):
        return True
    new = [
        c
        for c in typed
        if "new-password" in c.autocomplete or (c.kind == "password" and "new" in c.says.lower().split())
    ]
    if new or sum(
        c.kind == "password" and bool(re.search(r"confirm|repeat|again|(?<!\d)2$", c.says, _I)) for c in typed
    ):
        return True
    if _LOGIN.search(words):
        return False
    hints = re.sub(r"[/_-]", " ", form.hints)
    return bool(
        _SIGN_UP.search(words) or _SIGN_UP.search(hints) or _RESET.search(words) or _RESET.search(hints)
    )


def _login_form(page: Page, signed_in: bool) -> Form | None:
    scored = [
        (score, -index, form)
        for index, form in enumerate(page.forms)
        if (score := _login_score(page, form)) > 0
    ]
    if not scored:
        return None
    best = max(scored, key=lambda entry: entry[:2])[2]
    # Signed-in pages are full of forms with an e-mail address; a password is asked for a reason.
    return best if not signed_in or _has_password(best) else None


def _login_score(page: Page, form: Form) -> int:
    """Above zero for a form that logs in; the best one has a password, an identifier and the right words."""
    typed = [control for control in form.typed if not _is_code(control)]
    if not typed or not form.action or _is_beside_the_point(form):
        return 0
    passwords = [control for control in typed if control.kind == "password"]
    if len(typed) - len(passwords) > 6 or len(passwords) > 3:
        return 0
    words = " ".join(button.label for button in form.buttons)
    identifiers = [control for control in typed if _is_identifier(control)]
    signs = bool(_LOGIN.search(words)) + bool(_LOGIN_PATH.search(form.hints.replace(" ", "/")))
    signs += any({"username", "webauthn"} & control.autocomplete for control in identifiers)
    if passwords:
        return 10 + 2 * signs + bool(identifiers)
    if not identifiers or len(typed) > 2:
        return 0
    # An e-mail address alone is what newsletters want, too: words, path or page must speak of logging in.
    signs += bool(_LOGIN_PATH.search(urlsplit(form.action).path)) + bool(_LOGIN.search(page.heading))
    signs += is_login_path(page.url) and bool(_SUBMIT.search(words) or not words)
    return 2 * signs


def _is_identifier(control: Control) -> bool:
    if control.kind not in ("text", "email", "tel"):
        return False
    tokens = {"username", "email", "tel", "webauthn"}
    return (
        bool(tokens & control.autocomplete)
        or control.kind in ("email", "tel")
        or bool(_IDENTIFIER.search(control.says))
    )


def _is_code(control: Control) -> bool:
    if "one-time-code" in control.autocomplete:
        return True
    if control.kind not in ("text", "tel", "number", "password") or _NOT_CODE.search(control.says):
        return False
    if control.kind == "password" and (
        _PASSWORD.search(control.says) or control.autocomplete & {"current-password"}
    ):
        return False
    return bool(_CODE.search(control.says))


def _code_form(page: Page) -> Form | None:
    for form in page.forms:
        if (
            form.action
            and not _is_beside_the_point(form)
            and (any(map(_is_code, form.typed)) or _boxes(form.typed))
        ):
            return form
    return None


def _boxes(controls: Sequence[Control]) -> tuple[Control, ...]:
    """The little boxes of a code that is typed one character each; empty when there are none."""
    boxes = tuple(control for control in controls if control.max_length == 1 and control.kind != "password")
    return boxes if 4 <= len(boxes) <= 10 else ()


def _is_relay(page: Page) -> bool:
    """A form that only a script was to send, as SAML and OpenID Connect hand over their tokens."""
    hidden = [form for form in page.forms if form.method == "post" and form.action and not form.typed]
    if len(page.forms) != 1 or not hidden:
        return False
    names = {control.name.lower() for control in hidden[0].controls if control.kind == "hidden"}
    if names >= {"code", "state"} and not hidden[0].buttons:
        return True  # OAuth 2.0 form post response mode
    return (
        bool(names & {"samlresponse", "samlrequest", "id_token", "wresult"}) and len(hidden[0].buttons) <= 1
    )


# -- what is to be typed


def _wants(page: Page, form: Form) -> tuple[Want, ...]:
    boxes = _boxes(form.typed)
    wants: list[Want] = []
    taken: set[str] = set()
    password_seen = False
    for control in form.typed:
        if control in boxes:
            if control is boxes[0]:
                field = dataclasses.replace(_code_field(page, form, control), label="Code", placeholder=None)
                wants.append(_want(field, boxes, taken))
            continue
        if _is_code(control):
            field = _code_field(page, form, control)
        elif control.kind == "password":
            ref = control.name.lower() if password_seen else "password"
            password_seen = True
            field = _field(control, ref=ref, type="password", label=control.label or "Password")
        elif _is_identifier(control) or _stands_before_password(form, control):
            field = _identifier_field(control)
        else:
            field = _field(
                control, ref=control.name.lower(), type="text", label=control.label or control.name
            )
            field = dataclasses.replace(field, required=control.required)
        wants.append(_want(field, (control,), taken))
    return tuple(wants)


def _want(field: Field, controls: tuple[Control, ...], taken: set[str]) -> Want:
    identity, number = field.ref, 2
    while identity in taken:
        identity, number = f"{field.ref}-{number}", number + 1
    taken.add(identity)
    return Want(field=dataclasses.replace(field, id=identity, ref=identity), controls=controls)


def _field(
    control: Control, *, ref: str, type: FieldType, label: str, mode: InputMode | None = None
) -> Field:
    return Field(
        id=ref,
        ref=ref[:80],
        type=type,
        label=label,
        hint=control.hint or None,
        placeholder=control.placeholder or None,
        input_mode=mode,
        observed_selector=control.xpath,
    )


def _stands_before_password(form: Form, control: Control) -> bool:
    """The one text field before the password is the identifier, whatever it is called."""
    typed = [one for one in form.typed if one.kind in ("text", "email", "tel", "password")]
    texts = [one for one in typed if one.kind != "password"]
    return texts == [control] and typed[0] is control and len(typed) > 1


def _identifier_field(control: Control) -> Field:
    says, tokens = control.says, control.autocomplete
    also_name = re.search(r"\buser|\blogin\b|\bor\b|benutzer", says, _I) and control.kind == "text"
    if control.kind == "email" or "email" in tokens or (_EMAIL.search(says) and not also_name):
        return _field(control, ref="email", type="identifier", label=control.label or "E-mail", mode="email")
    if control.kind == "tel" or "tel" in tokens or (_PHONE.search(says) and not also_name):
        return _field(control, ref="phone", type="identifier", label=control.label or "Phone", mode="tel")
    return _field(control, ref="username", type="identifier", label=control.label or "User name", mode="text")


def _code_field(page: Page, form: Form, control: Control) -> Field:
    """The field's own words decide first, then those of its form, then those of the page."""
    own = f"{control.says} {control.hint}"
    around = f"{own} . {form.text}", f"{page.heading} . {form.text} . {page.text}"
    kind = next((found for text in (own, *around) if (found := _code_type(text))), None)
    sent_to = destination_of(around[1])
    if kind is None and sent_to is not None:
        kind = "email" if "@" in sent_to else "sms"
    is_totp = kind == "totp"
    field = _field(
        control,
        ref="totp" if is_totp else "code",
        type="totp_code" if is_totp else "code",
        label=control.label or "Code",
        mode="text" if control.input_mode == "text" else "numeric",
    )
    hint = " ".join(
        part for part in (field.hint, f"Sent to {sent_to}" if sent_to and not is_totp else None) if part
    )
    return dataclasses.replace(field, hint=hint or None, linked_mfa_type=kind)


def _code_type(text: str) -> MfaType | None:
    kind = mfa_type_of(text)
    return kind if kind in ("totp", "sms", "call", "email") else None


# -- which ways there are


def _ways_beside(page: Page, form: Form | None) -> tuple[Way, ...]:
    """The other ways on of a page that wants something typed or waited for."""
    return _unique((*_sso_ways(page), *_alternatives(page, form)))


def _sso_ways(page: Page) -> Iterator[Way]:
    for link in page.links:
        provider = sso_of(link.label, link.hints)
        if provider and not _NEVER_A_WAY.search(link.label):
            yield Way(choice=_provider_choice(provider, link.label, link.xpath), link=link)
    for form in page.forms:
        for button in form.buttons:
            hints = f"{button.form_action or form.action} {button.name} {button.value} {button.id}"
            provider = sso_of(button.label, hints)
            if provider:
                yield Way(
                    choice=_provider_choice(provider, button.label, button.xpath), form=form, button=button
                )


def _provider_choice(provider: str, label: str, xpath: str) -> Choice:
    return Choice(
        id=provider,
        type="sso_provider",
        label=label or provider.title(),
        provider=provider,
        observed_selector=xpath,
    )


def _alternatives(page: Page, main: Form | None) -> Iterator[Way]:
    """Links and buttons that lead elsewhere than the main form: "Use a code instead", "Not you?" ..."""
    for form in page.forms:
        for button in form.buttons:
            if button is form.primary and (form is main or form.typed):
                continue
            known = _ELSEWHERE.search(button.label) or (main is None and _CONFIRM.search(button.label))
            if known and not sso_of(button.label) and not _NEVER_A_WAY.search(button.label):
                yield Way(choice=_alternative_choice(button.label, button.xpath), form=form, button=button)
    for link in page.links:
        if (
            _ELSEWHERE.search(link.label)
            and not _NEVER_A_WAY.search(link.label)
            and not sso_of(link.label, link.hints)
        ):
            yield Way(choice=_alternative_choice(link.label, link.xpath), link=link)


def _alternative_choice(label: str, xpath: str) -> Choice:
    kind = mfa_type_of(label)
    resend = re.search(r"\bresend|send .{0,12}\b(again|new)\b", label, _I)
    another = re.search(r"\b(another|different|other|switch|change)\b", label, _I)
    if resend:
        return _choice("other", label, xpath)
    if kind is not None or (another and re.search(r"\b(way|method|option|factor|verif\w+)\b", label, _I)):
        return _choice("mfa_method", label, xpath, mfa_type=kind or "switch")
    if re.search(r"\b(account|not you)\b", label, _I):
        return _choice("account", label, xpath)
    return _choice("sign_in_method", label, xpath)


def _choice(
    type: ChoiceType,
    label: str,
    xpath: str,
    *,
    mfa_type: MfaType | None = None,
    value: str = "",
    context: str = "",
) -> Choice:
    slug = re.sub(r"[^a-z0-9]+", "-", (value or label).lower()).strip("-")[:40] or "choice"
    return Choice(
        id=slug,
        type=type,
        label=label,
        mfa_type=mfa_type,
        masked_destination=destination_of(label) if mfa_type else None,
        display_text=label if mfa_type else None,
        context=context or None,
        observed_selector=xpath,
    )


def _unique(ways: Sequence[Way]) -> tuple[Way, ...]:
    """Each way once, each with an id of its own."""
    result: list[Way] = []
    seen: set[tuple[str, str]] = set()
    ids: set[str] = set()
    for way in ways:
        target = (
            way.link.url
            if way.link
            else f"{way.form.xpath if way.form else ''}{way.choice.observed_selector}"
        )
        key = (target, "" if way.choice.provider else f"{way.choice.label}{way.entries}")
        if key in seen or not way.choice.label or len(result) >= 40:
            continue
        seen.add(key)
        identity, number = way.choice.id, 2
        while identity in ids:
            identity, number = f"{way.choice.id}-{number}", number + 1
        ids.add(identity)
        result.append(dataclasses.replace(way, choice=dataclasses.replace(way.choice, id=identity)))
    return tuple(result)


def _picker(page: Page, signed_in: bool) -> tuple[Way, ...]:
    """The ways of a page that lets one choose an account, an organisation, a second factor, yes or no."""
    if _has_fields(page):
        return ()
    heading = (
        page.heading
        if _CHOOSE.search(page.heading)
        else page.text[:300]
        if _CHOOSE.search(page.text[:300])
        else ""
    )
    if signed_in and not _CHOOSE.search(page.heading):
        return ()
    ways = [way for form in page.forms for way in _form_ways(form, heading)]
    links = [
        link for link in page.links
        if link.label and not link.aside
        and not _NEVER_A_WAY.search(link.label) and not sso_of(link.label, link.hints)
    ]  # fmt: skip
    if not heading:
        links = [link for link in links if _ADDRESS.search(link.label) or _looks_like_method(link)]
        links = links if len(links) + len(ways) > 1 else []
    ways += [Way(choice=_picked(link.label, link.xpath, heading), link=link) for link in links]
    if ways and not heading and all(way.link is None for way in ways):
        # Buttons alone make a picker only when they are about a second factor, an account, or consent.
        ways = [
            w
            for w in ways
            if w.entries or w.choice.mfa_type or w.choice.type == "account" or _CONFIRM.search(w.choice.label)
        ]
    return _unique(ways)


def _looks_like_method(link: Link) -> bool:
    return mfa_type_of(link.label) is not None and bool(
        _ELSEWHERE.search(link.label) or destination_of(link.label)
    )


def _form_ways(form: Form, heading: str) -> Iterator[Way]:
    if not form.action or form.typed:
        return
    radios = [c for c in form.controls if c.kind == "radio" and c.name and not c.disabled and c.visible]
    selects = [c for c in form.controls if c.kind == "select" and c.name and not c.disabled and c.visible]
    if radios:
        for control in radios:
            if control.name == radios[0].name:
                choice = _picked(control.label or control.value, control.xpath, heading, value=control.value)
                yield Way(
                    choice=choice, form=form, button=form.primary, entries=((control.name, control.value),)
                )
        return
    if selects:
        yield from option_ways(selects[0], form, heading)
        return
    for button in form.buttons:
        if not _NEVER_A_WAY.search(button.label) and not sso_of(button.label, form.hints):
            yield Way(
                choice=_picked(button.label, button.xpath, heading, value=button.value),
                form=form,
                button=button,
            )


def option_ways(select: Control, form: Form, heading: str = "") -> tuple[Way, ...]:
    """The options of a list as ways to send ``form``; the empty one ("please choose") is none."""
    return _unique(
        [
            Way(
                choice=_picked(option.label, select.xpath, heading or select.label, value=option.value),
                form=form,
                button=form.primary,
                entries=((select.name, option.value),),
            )
            for option in select.options
            if option.value
        ]
    )


def _picked(label: str, xpath: str, heading: str, *, value: str = "") -> Choice:
    method = mfa_type_of(f"{label} {value}")
    about_accounts = bool(_ACCOUNT_HEADING.search(heading))
    if method is not None and not (about_accounts and _ADDRESS.search(label)):
        return _choice("mfa_method", label, xpath, mfa_type=method, value=value)
    if _ADDRESS.search(label) or about_accounts:
        return _choice("account", label, xpath, value=value)
    return _choice("other", label, xpath, value=value, context=heading[:200])


# ------------------------------------------------------------------------------------------------------------
# Filling in


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Submission:
    """What pressing a button sends. Holds what was typed, so it is never printed."""

    method: Literal["get", "post"]
    url: str
    body: bytes = b""
    content_type: str = ""

    def __repr__(self) -> str:
        return f"Submission({self.method} {urlsplit(self.url).hostname})"


def action_of(form: Form, button: Control | None) -> str:
    """Where the form goes when ``button`` is pressed; empty when only a script could say."""
    return button.form_action if button is not None and button.form_action is not None else form.action


def fill(
    form: Form, button: Control | None, typed: dict[str, str], entries: Sequence[tuple[str, str]] = ()
) -> Submission:
    """What a browser sends (HTML, "constructing the entry list"): ``typed`` by XPath of the control,
    ``entries`` by name.

    "Remember me" is ticked: a session that lasts is what the person wants from us.
    """
    picked = dict(entries)
    pairs: list[tuple[str, str]] = []
    for control in form.controls:
        if control.disabled or (control.kind in ("submit", "image") and control is not button):
            continue
        if control.kind == "image":
            prefix = f"{control.name}." if control.name else ""
            pairs += [(f"{prefix}x", "1"), (f"{prefix}y", "1")]
        elif not control.name or control.kind in ("button", "reset", "file"):
            continue
        elif control.kind == "radio":
            chosen = picked.get(control.name)
            if control.value == chosen if chosen is not None else control.checked:
                pairs.append((control.name, control.value))
        elif control.kind == "checkbox":
            if control.checked or (control.visible and _REMEMBER.search(control.says)):
                pairs.append((control.name, control.value))
        elif control.kind == "select":
            default = next((option.value for option in control.options if option.selected), None)
            value = picked.get(control.name, default)
            if value is not None:
                pairs.append((control.name, value))
        else:
            pairs.append((control.name, typed.get(control.xpath, control.value)))
    return _encode(form, button, pairs)


def _encode(form: Form, button: Control | None, pairs: Sequence[tuple[str, str]]) -> Submission:
    url = action_of(form, button).partition("#")[0]
    method = (
        button.form_method if button is not None and button.form_method in ("get", "post") else form.method
    )
    codec = webencodings.lookup(form.encoding).codec_info.name
    if method == "get":
        query = urlencode(pairs, encoding=codec, errors="xmlcharrefreplace")
        return Submission(method="get", url=f"{url.partition('?')[0]}?{query}")
    if not form.multipart:
        body = urlencode(pairs, encoding=codec, errors="xmlcharrefreplace").encode("ascii")
        return Submission(method="post", url=url, body=body, content_type="application/x-www-form-urlencoded")
    boundary = f"----{secrets.token_hex(16)}"
    parts = [
        f'--{boundary}\r\nContent-Disposition: form-data; name="{name.translate(_QUOTED)}"\r\n\r\n{value}\r\n'
        for name, value in pairs
    ]
    body = "".join([*parts, f"--{boundary}--\r\n"]).encode(codec, "xmlcharrefreplace")
    return Submission(
        method="post", url=url, body=body, content_type=f"multipart/form-data; boundary={boundary}"
    )


#: How names are escaped in multipart bodies (HTML, "multipart/form-data encoding algorithm").
_QUOTED = str.maketrans({'"': "%22", "\r": "%0D", "\n": "%0A"})
