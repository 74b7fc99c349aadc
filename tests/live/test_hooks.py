"""Reports of ended tasks, sent by workers that are real processes: killed in the middle, two at once, and where they may not go."""

from __future__ import annotations

import json
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from connections.hooks import LEASE
from tests.conftest import Running, run_switchboard, until
from tests.connections.hook_support import SECRET, Say, receiver

pytestmark = pytest.mark.live

#: Tasks of a kind that no worker here takes, brought to their end by this process.
END = """
import json
from django.contrib.auth.models import User
from django.utils import timezone
from connections import tasks
urls, secret = json.loads({words!r})
admin, ids = User.objects.get(username="admin"), []
for url in urls:
    row = tasks.create(owner_id=admin.pk, kind="report.test", title="A task", spec={{}}, hook_url=url,
                       hook_secret=secret, actor="admin", now=timezone.now())
    hold = tasks.claim(worker="somebody", kinds=["report.test"], now=timezone.now())
    tasks.settle(hold=hold, exit_code=0, now=timezone.now())
    ids.append(row.id)
print("IDS", json.dumps(ids))
"""
STATE = """
import json
from connections.models import HookDelivery
print("STATE", json.dumps(list(HookDelivery.objects.values("id", "task_id", "state", "attempts", "last_error"))))
"""
AGAIN = """
from django.utils import timezone
from connections import hooks
hooks.redeliver(task_id={task!r}, actor="admin", now=timezone.now())
"""


def shell(running: Running, script: str) -> str:
    return running.shell(script)


def end_tasks(running: Running, *urls: str) -> list[str]:
    words = json.dumps([urls, SECRET])
    return list(json.loads(shell(running, END.format(words=words)).split("IDS", 1)[1]))


def deliveries(running: Running) -> dict[str, Any]:
    rows = json.loads(shell(running, STATE).split("STATE", 1)[1])
    return {row["task_id"]: row for row in rows}


def states(running: Running) -> set[str]:
    return {row["state"] for row in deliveries(running).values()}


def test_C29_a_worker_killed_while_the_receiver_holds_the_report_loses_nothing(own_running: Running) -> None:
    held = threading.Event()
    with receiver(lambda came, before: Say(after=held if before == 0 else None)) as there:
        (task,) = end_tasks(own_running, there.url())
        until(lambda: there.came, 20, "no report was sent")
        own_running.stop("worker", signal.SIGKILL)
        assert deliveries(own_running)[task]["state"] == "pending"
        own_running.start("worker2")
        until(lambda: len(there.came) == 2, LEASE.total_seconds() + 30, "it was not sent again")
        held.set()
        until(lambda: states(own_running) == {"delivered"}, 20)
        first, second = there.came
        assert (first.id, first.body) == (second.id, second.body)
        row = deliveries(own_running)[task]
        assert (row["id"], row["attempts"]) == (second.id, 2)
        assert second.verified()["data"]["id"] == task
        shell(own_running, AGAIN.format(task=task))
        until(lambda: len(there.came) == 3, 20, "it was not sent again by hand")
        assert there.came[2].id == first.id
    assert "ERROR" not in own_running.log("worker2")


def test_C28_two_real_workers_send_each_report_once(own_running: Running) -> None:
    own_running.start("worker2")
    with receiver() as there:
        ids = end_tasks(own_running, *(there.url(f"/{n}") for n in range(30)))
        until(lambda: states(own_running) == {"delivered"}, 40)
        assert sorted(came.verified()["data"]["id"] for came in there.came) == sorted(ids)
    for name in ("worker", "worker2"):
        assert own_running.stop(name) == 0
        assert "ERROR" not in own_running.log(name)


def test_C31_private_addresses_are_refused_where_they_are_not_allowed(tmp_path: Path) -> None:
    with run_switchboard(tmp_path, ALLOW_PRIVATE_TARGETS="0") as running, receiver() as there:
        ids = end_tasks(running, there.url("/hook?token=secret"), f"http://localhost:{there.port}/hook")
        until(lambda: states(running) == {"failed"}, 30)
        rows = deliveries(running)
        assert there.came == []
        for pk in ids:
            assert rows[pk]["attempts"] == 1
            assert "not allowed here" in rows[pk]["last_error"]
            assert "token" not in rows[pk]["last_error"]
