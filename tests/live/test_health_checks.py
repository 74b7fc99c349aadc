"""Sessions that die on a real site, found and had again by a real worker; wrong passwords and sites that are down."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Running, run_switchboard, until
from tests.live.switchboard import Program, program
from tests.sites import PASSWORD, TOTP_SECRET, USERNAME, Site

pytestmark = pytest.mark.live


@pytest.fixture
def installation(tmp_path: Path) -> Iterator[Running]:
    """Nobody waits long for an answer here."""
    with run_switchboard(tmp_path, LEASE_SECONDS="3", INPUT_SECONDS="2") as running:
        yield running


@pytest.fixture
def client(installation: Running) -> Iterator[Program]:
    with program(installation) as made:
        yield made


def manage(client: Program, script: str) -> str:
    head = (
        "import datetime as dt\nfrom django.utils import timezone\n"
        "from connections.models import *\nnow = timezone.now()\n"
    )
    return client.running.shell(head + script)


def make_due(client: Program, *connections: str) -> None:
    """What the clock would do in an hour it does now."""
    manage(
        client,
        f"ManagedAuthConnection.objects.filter(pk__in={list(connections)!r}).update(next_check_at=now)",
    )


def stored(client: Program, site: Site, name: str, *, totp: bool = False) -> str:
    body: dict[str, Any] = {
        "name": name,
        "domain": site.domain,
        "values": {"username": USERNAME, "password": PASSWORD},
    }
    if totp:
        body["totp_secret"] = TOTP_SECRET
    client.post("/credentials", body, 201)
    return name


def connected(client: Program, site: Site, scenario: str, profile: str, credential: str) -> str:
    """A connection that is signed in with what is stored."""
    made = client.connect(
        site.domain,
        profile,
        login_url=site.url(f"/{scenario}/login"),
        credential={"name": credential},
        health_check_interval=300,
    )
    client.login(made)
    client.wait(made, status="SUCCESS")
    return made


def timeline(client: Program, connection: str) -> list[tuple[str, str]]:
    rows = client.get(f"/auth/connections/{connection}/timeline")
    return [(row["type"], row["status"]) for row in rows]


def test_a_session_that_dies_on_the_site_is_found_and_had_again_without_a_person(client: Program) -> None:
    with Site(scenario="totp") as site:
        name = stored(client, site, "with a secret", totp=True)
        made = connected(client, site, "totp", "self-healing", name)
        make_due(client, made)
        until(lambda: ("health_check", "AUTHENTICATED") in timeline(client, made), 30, "it was not checked")
        site.forget_codes()
        site.expire_sessions()
        make_due(client, made)
        until(lambda: ("reauth", "SUCCESS") in timeline(client, made), 60, "it was not signed in again")
        assert timeline(client, made) == [
            ("reauth", "SUCCESS"),
            ("health_check", "NEEDS_AUTH"),
            ("health_check", "AUTHENTICATED"),
            ("login", "SUCCESS"),
        ]
        shown = client.state(made)
        assert (shown["status"], shown["flow_type"], shown["reauths_failed"]) == (
            "AUTHENTICATED",
            "REAUTH",
            0,
        )
        assert shown["next_check_at"]
        page = client.running.manage("check_connection", made, "--json")
        assert json.loads(page)["result"] == "signed_in"
    assert "ERROR" not in client.running.log("worker")


def test_a_wrong_stored_password_backs_off_and_is_given_up(client: Program) -> None:
    with Site(scenario="simple") as site:
        name = stored(client, site, "soon wrong")
        made = connected(client, site, "simple", "wrong", name)
        client.http.patch(f"/credentials/{name}", json={"values": {"password": "not any more"}})
        site.expire_sessions()
        make_due(client, made)
        for failures in range(1, 7):
            shown = until(
                lambda n=failures: found if (found := client.state(made))["reauths_failed"] == n else None,
                60,
                f"re-authentication {failures} did not end",
            )
            assert shown["status"] == "NEEDS_AUTH"
            assert shown["flow_status"] in ("EXPIRED", "FAILED")
            if failures < 6:
                assert shown["reauth_after"]
                manage(client, f"ManagedAuthConnection.objects.filter(pk={made!r}).update(reauth_after=now)")
        assert shown["reauth_after"] is None
        assert timeline(client, made).count(("reauth", shown["flow_status"])) >= 1
        # The right password is put in: that is worth a try at once.
        client.http.patch(f"/credentials/{name}", json={"values": {"password": PASSWORD}})
        until(lambda: client.state(made)["status"] == "AUTHENTICATED", 60, "it was not tried again")
        assert client.state(made)["reauths_failed"] == 0


def test_a_site_that_is_down_is_left_alone_until_one_trial_says_that_it_is_back(client: Program) -> None:
    with Site(scenario="simple") as site:
        port, name = site.port, stored(client, site, "of the site")
        made = [connected(client, site, "simple", f"p{n}", name) for n in range(5)]
        domain = site.domain
    make_due(client, *made)

    def circuit() -> list[Any]:
        return client.rows("SELECT failures, retry_at FROM connections_sitecircuit WHERE domain = ?", domain)

    until(lambda: circuit() and circuit()[0][1], 60, "the circuit did not open")
    assert circuit()[0][0] == 5
    assert {client.state(pk)["status"] for pk in made} == {"AUTHENTICATED"}
    make_due(client, *made)
    later = "2000-01-01T00:00:00Z"

    def put_off() -> bool:
        planned = [client.state(pk)["next_check_at"] or later for pk in made]
        return min(planned) > circuit()[0][1].replace(" ", "T")

    until(put_off, 30, "the checks were not put off")
    with Site(scenario="simple", port=port) as back:
        # The sessions died with the site; that a check can tell so is what counts.
        manage(client, "SiteCircuit.objects.update(retry_at=now)")
        make_due(client, made[0])
        until(lambda: circuit() == [(0, None)], 60, "the circuit did not close")
        client.wait(made[0], status="SUCCESS")
        make_due(client, *made[1:])
        for pk in made:
            until(lambda one=pk: ("reauth", "SUCCESS") in timeline(client, one), 60)
        assert back.seen("POST", "/simple/login")
