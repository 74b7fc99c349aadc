"""Every row of the behaviours table that is built has a test that carries its name."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).resolve().parent

#: The login flow, the clients, the streams and the tasks. C33 and C34 tell of triggers and of a memory, which this service does not have: their
#: events are not in the catalogue of spec/streams.md.
ROWS = [
    *(f"A{number:02d}" for number in range(1, 51)),
    *(f"B{number:02d}" for number in range(1, 77)),
    *(f"C{number:02d}" for number in range(1, 61) if number not in (33, 34)),
]


def names() -> str:
    """The names of all tests: Python functions, and the titles of the scripts' tests."""
    python = [
        match
        for path in TESTS.rglob("test_*.py")
        for match in re.findall(r"^\s*(?:async )?def (test_\w+)", path.read_text(), re.MULTILINE)
    ]
    scripts = [
        match
        for path in (TESTS / "js").glob("*.mjs")
        for match in re.findall(r"""\b(?:test|it)\(\s*["'`](.+?)["'`]\s*,""", path.read_text())
    ]
    return "\n".join(python + scripts)


def test_every_row_has_a_test_that_names_it() -> None:
    named = set(re.findall(r"[ABC]\d\d", names()))
    missing = [row for row in ROWS if row not in named]
    assert missing == [], f"rows without a test: {', '.join(missing)}"
