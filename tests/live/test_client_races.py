"""Expiry races with a reconnect, and with a takeover, on both databases: never two owners, never an owner who does not know."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.live import services
from tests.live.client import installation

pytestmark = pytest.mark.live

TIMES = 500
STORM = 1200
DATABASES = ["sqlite", "postgresql"]


@pytest.fixture(scope="module")
def races(
    clients_database: services.PostgreSQL, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[tuple[str, str], Any]]:
    """By database and race. Both databases at once: each is one process of :mod:`tests.live.racer`."""
    words = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "tests.live.racer",
        "--times",
        str(TIMES),
        "--storm",
        str(STORM),
    ]
    with contextlib.ExitStack() as stack:
        running: dict[str, subprocess.Popen[str]] = {}
        # On PostgreSQL time is the database's, and a process that asks its own clock is broken.
        for name, database, more in (("sqlite", None, []), ("postgresql", clients_database, ["--no-clock"])):
            place = tmp_path_factory.mktemp(f"races-{name}")
            (node,) = stack.enter_context(
                installation(place, servers=1, started=False, database=database, LOG_LEVEL="ERROR")
            )
            running[name] = subprocess.Popen(
                [*words, *more],
                cwd=ROOT,
                env=node.env,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        found: dict[tuple[str, str], Any] = {}
        for name, process in running.items():
            try:
                printed, _ = process.communicate(timeout=900)
            finally:
                process.kill()
            lines = [
                json.loads(line.removeprefix("DONE "))
                for line in printed.splitlines()
                if line.startswith("DONE ")
            ]
            assert process.returncode == 0, printed[-3000:]
            found |= {(name, done["race"]): done for done in lines}
        yield found


@pytest.mark.parametrize("database", DATABASES)
def test_B19_B23_expiry_and_a_reconnect_at_once_end_resumed_or_anew_and_the_client_is_told_which(
    races: dict[tuple[str, str], Any],
    database: str,
) -> None:
    done = races[database, "reconnect"]
    print(done)
    assert done["wrong"] == []
    assert done["times"] == TIMES
    # Both came out, or it was no race.
    assert min(done["resumed"], done["anew"]) > TIMES / 100, done


@pytest.mark.parametrize("database", DATABASES)
def test_B18_B20_expiry_and_a_takeover_at_once_leave_one_owner_and_whoever_lost_it_was_told_once(
    races: dict[tuple[str, str], Any],
    database: str,
) -> None:
    done = races[database, "takeover"]
    print(done)
    assert done["wrong"] == []
    assert done["times"] == TIMES
    assert min(done["taken over"], done["expired before"]) > TIMES / 100, done


def test_B06_B23_a_client_that_is_purged_while_two_processes_come_for_it_makes_neither_wait_for_the_other(
    races: dict[tuple[str, str], Any],
) -> None:
    # Where rows are locked one by one this was a deadlock; SQLite has one writer at a time.
    done = races["postgresql", "purge"]
    print(done)
    assert done["wrong"] == []
    assert done["made anew"] == done["went on"] == done["times"] > 0, done


@pytest.mark.parametrize("database", DATABASES)
def test_B15_B38_whatever_everybody_does_at_once_the_log_tells_exactly_what_is_in_the_rows(
    races: dict[tuple[str, str], Any],
    database: str,
) -> None:
    done = races[database, "storm"]
    print(done)
    assert done["wrong"] == []
    for what in (
        "client.opened",
        "client.inactive",
        "client.expired",
        "claim.taken",
        "claim.released",
        "claim.updated",
    ):
        assert done.get(what, 0) > 0, done
