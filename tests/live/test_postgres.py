"""The same login on PostgreSQL and Redis: the way out of one machine keeps every promise of the small one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from kernel import Kernel

from tests.conftest import ROOT, run_switchboard
from tests.live import services
from tests.sites import Site
from tests.sites.app import PASSWORD, USERNAME

pytestmark = pytest.mark.live


def test_C36_a_login_on_postgresql_and_redis_is_followed_to_its_end(tmp_path: Path) -> None:
    with (
        services.postgresql(tmp_path) as database,
        services.redis(tmp_path) as redis,
        run_switchboard(tmp_path, DATABASE_URL=database.url, REDIS_URL=redis.url) as running,
        Site(scenario="simple") as site,
        Kernel(api_key=running.api_key, base_url=running.url, max_retries=0) as client,
    ):
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


PRINT = """
import json
from project.settings import CHANNEL_LAYERS, DATABASES
database = DATABASES["default"]
print("SET", json.dumps([database["OPTIONS"], database["CONN_MAX_AGE"], CHANNEL_LAYERS["default"]["BACKEND"]]))
"""


def test_what_the_url_of_the_database_says_after_its_question_mark_wins(tmp_path: Path) -> None:
    query = "sslmode=require&connect_timeout=9&options=-c%20search_path%3Dmine"
    env = {
        "PATH": os.environ["PATH"],
        "DATA_DIR": str(tmp_path),
        "DATABASE_URL": f"postgres://u:p@h/n?{query}",
        "DATABASE_POOL_SIZE": "7",
        "REDIS_URL": "redis://h:1/0",
    }
    done = subprocess.run(
        [sys.executable, "-c", PRINT],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    options, age, layer = json.loads(done.stdout.split("SET ", 1)[1])
    assert (options["sslmode"], options["connect_timeout"], options["application_name"]) == (
        "require",
        9,
        "switchboard",
    )
    # Of two settings of one name PostgreSQL takes the last.
    assert options["options"].endswith("-c search_path=mine")
    assert "lock_timeout" in options["options"]
    assert options["pool"]["max_size"] == 7
    assert age == 0, "Django takes no pool with anything else"
    assert layer == "channels_redis.pubsub.RedisPubSubChannelLayer"
