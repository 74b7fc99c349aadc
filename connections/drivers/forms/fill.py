"""A form filled in: what a browser would send."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Sequence
from typing import Literal
from urllib.parse import urlencode, urlsplit

import webencodings  # type: ignore[import-untyped, unused-ignore]

from connections.drivers.forms.page import Control, Form
from connections.drivers.forms.words import REMEMBER


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
            if control.checked or (control.visible and REMEMBER.search(control.says)):
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
