"""The law of the rooms, held by import-linter and by a walk over the syntax trees."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CODE = sorted(
    path
    for app in ("project", "events", "connections")
    for path in (ROOT / app).rglob("*.py")
    if "migrations" not in path.parts
)
TREES = {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text()) for path in CODE}

#: Law 5: where async may begin.
ASYNC_ROOMS = (
    "events/broker.py",
    "events/hub.py",
    "events/stream.py",
    "events/registry.py",
    "events/consumers.py",
    "connections/drivers/",
    "connections/runners/",
    "connections/worker.py",
    "connections/consumers.py",
    "connections/task_streams.py",
    "events/waker.py",
    "events/units.py",
    "events/operations.py",
    "connections/management/commands/run_worker.py",
    "connections/management/commands/_worker.py",
    "connections/management/commands/doctor.py",
    "project/",
)

#: Files of more than 600 lines, each with its reason.
LONG = {
    "events/consumers.py": "one stream from its request to its end: its place, the request, and the one loop that serves it",
    "events/clients.py": "every verb of clients and claims, one after the other: one lock order, one page",
    "connections/payloads.py": "one outward shape after the other, and how each is filled",
    "connections/tasks.py": "every verb of the queue, one after the other: one lock order, one page",
    "connections/runners/command.py": "one command from its start to its one outcome: what goes on at the same time shares its state",
    "connections/transitions.py": "every verb of connections and flows, one after the other: one lock order, one page",
    "connections/api.py": "one thin view per operation of the contract, each with its description for OpenAPI",
    "connections/admin.py": "one section per model, and nothing but declarations",
    "connections/fragments.py": "one function per live part of the dashboard, and what each event changes",
    "connections/hosted.py": "the hosted page: one function per card and the posts of its forms",
    "connections/inputs.py": "one closed schema per operation, declarations only",
    "connections/views.py": "the dashboard's pages, one short view each",
}


def nodes(kind: type[ast.AST] | tuple[type[ast.AST], ...]) -> Iterator[tuple[str, ast.AST]]:
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, kind):
                yield name, node


def where(name: str, node: ast.AST) -> str:
    return f"{name}:{getattr(node, 'lineno', '?')}"


def test_imports_go_one_way_through_the_rooms() -> None:
    lint = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run(
        [lint, "--no-cache"], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@pytest.mark.parametrize("app", ["events", "connections"])
def test_every_module_has_a_room(app: str) -> None:
    """import-linter says so as well; here the contract itself is held to be exhaustive."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    contract = next(contract for contract in contracts if contract.get("containers") == [app])
    assert contract["exhaustive"] is True
    rooms = {room.strip() for layer in contract["layers"] for room in layer.split("|")}
    there = {
        path.stem
        for path in (ROOT / app).iterdir()
        if (path.suffix == ".py" and path.stem != "__init__") or (path.is_dir() and any(path.glob("*.py")))
    }
    assert rooms == there


def test_only_the_verbs_write_a_status_or_a_step() -> None:
    writers = {"connections/transitions.py", "connections/tasks.py"}
    wrong = []
    for name, node in nodes((ast.Assign, ast.AugAssign, ast.AnnAssign)):
        assert isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign)
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        for target in targets:
            if not (isinstance(target, ast.Attribute) and target.attr in ("status", "step")):
                continue
            # An exception's own ``self.status`` (an HTTP status) is not a row's.
            own = isinstance(target.value, ast.Name) and target.value.id == "self"
            if name not in writers and not own:
                wrong.append(where(name, node))
    for name, node in nodes(ast.Call):
        assert isinstance(node, ast.Call)
        if isinstance(node.func, ast.Attribute) and node.func.attr in ("update", "bulk_update", "aupdate"):
            named = {keyword.arg for keyword in node.keywords} & {"status", "step"}
            on_rows = "objects" in ast.unparse(node.func) or "filter" in ast.unparse(node.func)
            if named and on_rows and name not in writers:
                wrong.append(where(name, node))
    assert wrong == []


def test_only_telling_and_the_clients_send_the_signal() -> None:
    senders = {
        name
        for name, node in nodes(ast.Attribute)
        if isinstance(node, ast.Attribute)
        and node.attr.startswith(("send", "asend"))
        and isinstance(node.value, ast.Name)
        and node.value.id == "status_changed"
    }
    assert senders == {"connections/telling.py", "events/clients.py"}


def test_only_the_log_writes_events() -> None:
    writing = {"create", "bulk_create", "update", "delete", "get_or_create", "update_or_create", "save"}
    wrong = set()
    for name, node in nodes(ast.Call):
        assert isinstance(node, ast.Call)
        text = ast.unparse(node.func)
        if text == "Event" or (text.startswith("Event.objects") and text.rpartition(".")[2] in writing):
            wrong.add(name)
    assert wrong == {"events/log.py"}


def test_imports_stand_at_the_top_and_name_what_they_take() -> None:
    wrong = []
    for name, node in nodes((ast.FunctionDef, ast.AsyncFunctionDef)):
        wrong += [
            where(name, inner) for inner in ast.walk(node) if isinstance(inner, ast.Import | ast.ImportFrom)
        ]
    for name, node in nodes(ast.ImportFrom):
        assert isinstance(node, ast.ImportFrom)
        if any(alias.name == "*" for alias in node.names):
            wrong.append(where(name, node))
    assert wrong == []


def test_the_log_could_stream_a_bakerys_orders() -> None:
    wrong = [
        name for name in TREES if name.startswith("events/") and "login" in (ROOT / name).read_text().lower()
    ]
    assert wrong == []


def test_async_begins_only_where_the_law_allows_it() -> None:
    wrong = [
        where(name, node)
        for name, node in nodes((ast.AsyncFunctionDef, ast.AsyncWith, ast.AsyncFor, ast.Await))
        if not name.startswith(ASYNC_ROOMS)
    ]
    assert wrong == []


def test_a_long_file_has_a_reason() -> None:
    long = {name for name in TREES if len((ROOT / name).read_text().splitlines()) > 600}
    assert long - set(LONG) == set(), "split it along its subjects, or say why not"
    assert {name for name in LONG if not (ROOT / name).exists()} == set()


def test_no_file_names_a_machine_or_swallows_an_exception() -> None:
    wrong = []
    for name, node in nodes(ast.ExceptHandler):
        assert isinstance(node, ast.ExceptHandler)
        broad = node.type is None or ast.unparse(node.type) in ("Exception", "BaseException")
        if broad and all(isinstance(line, ast.Pass) for line in node.body):
            wrong.append(where(name, node))
    wrong += [name for name in TREES if f"{ROOT}/" in (ROOT / name).read_text()]
    assert wrong == []
