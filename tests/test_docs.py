"""The README can fail: its drawings, commands, files and links are compared with what there is."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
from django.core.management import get_commands, load_command_class

from connections.states import FLOW_ARROWS, FLOW_END, HOOK_ARROWS, TASK_ARROWS, TASK_END

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
OURS = {name for name, app in get_commands().items() if app in ("connections", "events")}


def drawn(machine: str) -> dict[str, frozenset[str]]:
    """The arrows under ``<!-- arrows: machine -->``."""
    block = README.split(f"<!-- arrows: {machine} -->\n```\n", 1)[1].split("```", 1)[0]
    arrows = {}
    for line in block.strip().splitlines():
        source, targets = line.split("─▶")
        arrows[source.strip()] = frozenset(name.strip() for name in targets.split("|")) - {"nothing"}
    return arrows


@pytest.mark.parametrize(
    ("machine", "arrows"), [("flow", FLOW_ARROWS), ("task", TASK_ARROWS), ("hook", HOOK_ARROWS)]
)
def test_the_drawing_has_exactly_the_arrows_of_the_code(
    machine: str, arrows: Mapping[str, frozenset[str]]
) -> None:
    code = {str(source): frozenset(str(target) for target in targets) for source, targets in arrows.items()}
    assert drawn(machine) == code


def test_the_sketches_name_every_end() -> None:
    for name in (*FLOW_END, *TASK_END):
        assert str(name) in README.split("## State machines", 1)[1].split("\n## ", 1)[0]


def test_every_command_is_in_the_table_and_the_table_has_no_other() -> None:
    section = README.split("## Commands", 1)[1].split("\n## ", 1)[0]
    assert set(re.findall(r"^\| `([a-z_]+)", section, re.MULTILINE)) == OURS


def test_every_command_has_a_help_text_and_one_for_each_argument() -> None:
    for name in OURS:
        command = load_command_class(get_commands()[name], name)
        assert command.help, name
        parser = command.create_parser("manage.py", name)
        unexplained = [action.dest for action in parser._actions if not action.help]
        assert unexplained == [], name


def test_every_command_that_the_readme_calls_exists() -> None:
    called = set(re.findall(r"manage\.py ([a-z_]+)", README))
    assert called <= OURS | {"migrate", "createsuperuser", "help"}


def test_every_make_target_that_the_readme_names_exists() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([a-z]+)", README, re.MULTILINE))
    assert {"run", "test"} <= named <= targets


def test_every_file_that_the_readme_names_is_there() -> None:
    named = set(re.findall(r"`((?:project|connections|events|tests|templates)/[\w./]*)`", README))
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_python_in_the_readme_is_python() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    for block in blocks:
        ast.parse(re.sub(r"^   ", "", block, flags=re.MULTILINE))


def test_links_inside_the_readme_lead_somewhere() -> None:
    headings = {
        re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-")
        for title in re.findall(r"^#+ (.*)$", README, re.MULTILINE)
    }
    assert set(re.findall(r"\]\(#([\w-]+)\)", README)) <= headings
