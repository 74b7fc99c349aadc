"""From the tree to a page: forms, controls, labels, links and error messages."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import urljoin, urlsplit

from lxml import etree  # type: ignore[import-untyped, unused-ignore]

from connections.drivers.forms.budget import MAX_CONTROLS, MAX_FORMS, MAX_LINKS, Parser, decode
from connections.drivers.forms.page import Control, Form, Link, Option, Page
from connections.drivers.forms.words import CAPTCHA, IGNORECASE, TYPABLE

_SILENT = frozenset(
    {"script", "style", "template", "head", "title", "noscript", "svg", "iframe", "object", "select"}
)
_ASIDE = frozenset({"nav", "header", "footer"})
_INLINE = frozenset(
    {"a", "b", "i", "em", "strong", "span", "small", "code", "u", "font", "abbr", "label", "mark", "x"}
)
_BLOCKS = frozenset({"h1", "h2", "h3", "h4", "h5", "h6", "p", "li", "div"})
_HIDING_STYLE = re.compile(r"display\s*:\s*none|visibility\s*:\s*hidden", IGNORECASE)
_ERROR_CLASS = re.compile(
    r"(^|[\s_-])(error|errors|errorlist|errornote|danger|invalid-feedback|alert-(warning|error)|"
    r"flash-(error|alert)|"
    r"fehler|error-?(message|text|msg)|validation-summary-errors|form-error|field-error)($|[\s_-])",
    IGNORECASE,
)
_NOT_ERROR = re.compile(r"success|info|notice-ok|hidden|sr-only", IGNORECASE)


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

    def text(self, node: Any, *, without: frozenset[str] = frozenset(), block: str = " ") -> str:
        """What can be read inside ``node``, its hidden parts left out; white space is collapsed. ``block``: what parts blocks."""
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
            edge = "" if item.tag in _INLINE else block if item.tag in _BLOCKS else " "
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
    root = Parser().tree_of(markup)
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
    nodes = [node for node in document.root.iter("form") if node not in document.inert][:MAX_FORMS]
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
        if owner in owned and len(owned[owner]) < MAX_CONTROLS:
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
    elif kind not in TYPABLE | {
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
    for node in list(document.root.iter("a", "area"))[:MAX_LINKS]:
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
    said = ""
    for piece in map(str.strip, document.text(node, without=_PROSE, block="\0").split("\0")):
        ended = not said or said[-1] in ".!?…:;," or not piece[:1].isupper()
        said = f"{said}{'' if ended else '.'} {piece}".strip()
    return said[:500]


def _refresh(document: _Document) -> tuple[float, str] | None:
    """Delay (seconds) and target of a ``<meta http-equiv=refresh>`` (HTML, "declarative refresh steps")."""
    for node in document.root.iter("meta"):
        match = re.match(
            r"\s*(\d{1,6})(?:\.\d*)?\s*(?:[;,\s]\s*(?:url\s*=\s*)?[\"']?([^\"']*))?",
            node.get("content", ""),
            IGNORECASE,
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
    return bool(CAPTCHA.search(marks)) and node.get("data-size") != "invisible"
