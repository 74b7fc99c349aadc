"""HTML parsed as browsers do (html5lib, the WHATWG algorithm), but within a budget of nodes, depth and time."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator
from typing import Any

import html5lib  # type: ignore[import-untyped, unused-ignore]
import webencodings  # type: ignore[import-untyped, unused-ignore]
from html5lib import _tokenizer
from html5lib.constants import tokenTypes  # type: ignore[import-untyped, unused-ignore]

#: Chrome stops nesting at 512; without a limit, every open tag costs a walk over all open elements.
_MAX_DEPTH = 256
_MAX_NODES = 40_000
_MAX_ATTRIBUTES = 64
_MAX_FORMATTING = 64
_MAX_SECONDS = 8.0
MAX_FORMS, MAX_CONTROLS, MAX_LINKS = 60, 300, 1_000
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


class Parser(html5lib.HTMLParser):  # type: ignore[misc]
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
