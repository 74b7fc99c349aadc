"""What no template may hold: the policy forbids inline code and style, and htmx would need eval for three of its forms."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEMPLATES = sorted((ROOT / "templates").rglob("*.html"))

FORBIDDEN = {
    "inline style": r"\sstyle\s*=",
    "style element": r"<style\b",
    "inline script": r"<script(?![^>]*\bsrc=)",
    "event attribute": r"\son[a-z]+\s*=",
    "hx-on": r"\bhx-on\b",
    "js: value": r"""=["']\s*(?:js|javascript):""",
    "trigger filter": r"""hx-trigger[^=]*=["'][^"']*\[""",
    "unescaped value": r"\|\s*safe\b|\{%\s*autoescape\s+off",
    "text from elsewhere": r"""(?:src|href)=["']https?://""",
}


def without_comments(text: str) -> str:
    return re.sub(r"\{%\s*comment\s*%\}.*?\{%\s*endcomment\s*%\}|\{#.*?#\}", "", text, flags=re.DOTALL)


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: str(path.relative_to(ROOT)))
@pytest.mark.parametrize("what", FORBIDDEN)
def test_no_template_holds(what: str, path: Path) -> None:
    found = re.search(FORBIDDEN[what], without_comments(path.read_text()), flags=re.IGNORECASE)
    assert found is None, f"{what}: {found and found.group()!r}"


def test_the_lint_sees_each_of_the_forbidden_things() -> None:
    samples = {
        "inline style": '<p style="color:red">',
        "style element": "<style>",
        "inline script": "<script>alert(1)</script>",
        "event attribute": '<a onclick="x()">',
        "hx-on": '<a hx-on:click="x()">',
        "js: value": """<a hx-vals="js:{a: 1}">""",
        "trigger filter": '<a hx-trigger="click[ctrlKey]">',
        "unescaped value": "{{ value|safe }}",
        "text from elsewhere": '<script src="https://cdn.example/x.js">',
    }
    for what, sample in samples.items():
        assert re.search(FORBIDDEN[what], sample, flags=re.IGNORECASE), what


def test_a_part_that_the_stream_sends_has_a_version() -> None:
    parts = ROOT / "templates" / "dashboard" / "parts"
    for name in (
        "row",
        "state",
        "timeline",
        "attention_item",
        "task_row",
        "row_gone",
        "state_gone",
        "attention_gone",
    ):
        first = without_comments((parts / f"{name}.html").read_text()).strip().split(">", 1)[0]
        assert "data-rev=" in first, name


def test_no_form_of_a_fragment_puts_a_token_where_a_morph_would_take_it_away() -> None:
    """A fragment of the stream has no CSRF token: the page's own must stay where it is, in a place that morphs skip."""
    parts = ROOT / "templates" / "dashboard" / "parts"
    for path in parts.glob("*.html"):
        text = path.read_text()
        tokens = text.count("{% csrf_token %}")
        assert tokens == text.count('<span class="csrf" hx-morph-skip-children>{% csrf_token %}</span>'), (
            path.name
        )
