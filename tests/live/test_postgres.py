"""The same login on PostgreSQL and Redis: the way out of one machine keeps every promise of the small one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from kernel import Kernel

from tests.conftest import run_switchboard
from tests.live import services
from tests.sites import Site
from tests.sites.app import PASSWORD, USERNAME

pytestmark = pytest.mark.live


def test_C36_a_login_on_postgresql_and_redis_is_followed_to_its_end(tmp_path: Path) -> None:
    with (
        services.postgresql(tmp_path) as database_url,
        services.redis(tmp_path) as redis_url,
        run_switchboard(tmp_path, DATABASE_URL=database_url, REDIS_URL=redis_url) as running,
        Site(scenario="simple") as site,
    ):
        client = Kernel(api_key=running.api_key, base_url=running.url, max_retries=0)
        connection = client.auth.connections.create(domain=site.domain, profile_name="p")
        client.auth.connections.login(connection.id)
        asked: list[str] = []
        states: list[tuple[str, str]] = []
        with client.auth.connections.follow(connection.id) as stream:
            for event in stream:
                if event.event != "managed_auth_state":
                    continue
                states.append((event.flow_status, event.flow_step))
                if event.flow_step == "AWAITING_INPUT":
                    asked.append(str(event.interaction_id))
                    given = {"identifier": USERNAME, "password": PASSWORD}
                    client.auth.connections.submit(
                        connection.id,
                        interaction_id=event.interaction_id or "",
                        field_values={field.id: given[field.type] for field in event.fields or []},
                    )
        assert states[-1] == ("SUCCESS", "COMPLETED")
        assert len(asked) == 1

        printed = running.manage("follow", "--after", "0", "--json", "--count", "8")
        ids = [json.loads(line)["id"] for line in printed.splitlines()]
        assert ids == sorted(ids)
        assert len(ids) == 8
