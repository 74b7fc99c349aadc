"""HTML to a page that a login can be walked through. Pure: bytes in, frozen dataclasses out, never an
exception.

Three layers: ``budget.py``, a parser that reads as browsers do (html5lib, the WHATWG algorithm) but within a
budget; ``parse.py``, which finds forms, controls, labels, links and error messages; ``classify.py``, which says
what the page is for (:data:`Kind`), what it wants typed (:class:`Want`) and which other ways on it offers
(:class:`Way`). ``page.py`` holds the shapes, ``words.py`` the vocabulary, and ``fill.py`` fills a form in.

A guess that is wrong must be wrong on the safe side: a form is a login form only when something says so,
because stored passwords go into it without anybody looking.
"""

from connections.drivers.forms.budget import decode
from connections.drivers.forms.classify import (
    destination_of,
    is_login_path,
    login_link,
    mfa_type_of,
    option_ways,
    read,
    signature,
)
from connections.drivers.forms.fill import Submission, action_of, fill
from connections.drivers.forms.page import Control, Form, Kind, Link, Option, Page, Reading, Want, Way
from connections.drivers.forms.parse import parse

__all__ = [
    "Control",
    "Form",
    "Kind",
    "Link",
    "Option",
    "Page",
    "Reading",
    "Submission",
    "Want",
    "Way",
    "action_of",
    "decode",
    "destination_of",
    "fill",
    "is_login_path",
    "login_link",
    "mfa_type_of",
    "option_ways",
    "parse",
    "read",
    "signature",
]
