"""The same message once, whichever process it reaches: two server processes on PostgreSQL, and one that is killed in the middle.

Who may send, and what every answer looks like, is in tests/connections/test_receipts.py.
"""

from __future__ import annotations

import re
import signal
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.conftest import Running, until
from tests.live import services
from tests.live.services import Cluster
from tests.live.streaming import Stream

pytestmark = pytest.mark.live

COMMAND = """
from django.utils import timezone
from connections import tasks
from connections.models import ManagedAuthConnection
from connections.states import TaskKind
row = ManagedAuthConnection.objects.get(pk="{connection_id}")
task = tasks.enqueue(kind=TaskKind.COMMAND, title="run", connection=row, actor="test", now=timezone.now())
print("TASK", task.pk)
"""
#: A login that asks for a name, without a worker process.
ASKING = """
from django.contrib.auth.models import User
from django.utils import timezone
from connections import access, tasks, transitions
from connections.states import TaskKind
actor = access.of_user(User.objects.get(username="admin"))
transitions.start_login(connection_id="{connection_id}", actor=actor, now=timezone.now())
hold = tasks.claim(worker="test", kinds=[TaskKind.LOGIN], now=timezone.now())
field = {{"id": "f1", "ref": "username", "type": "identifier", "reason": "missing", "label": "User name", "required": True}}
flow = transitions.await_input(hold=hold, fields=[field], choices=[], now=timezone.now())
for name in ("op1", "op2"):
    if not User.objects.filter(username=name).exists():
        User.objects.create_superuser(name, password="correct-horse-battery")
print("ASKS", flow.interaction_id)
"""


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two servers and no worker: nothing is taken from a queue. A killed server is started again by its test."""
    with services.cluster(tmp_path_factory.mktemp("receipts"), servers=2, workers=0) as made:
        yield made


def client(node: Running, **extra: Any) -> httpx.Client:
    return httpx.Client(
        base_url=node.url, headers={"Authorization": f"Bearer {node.api_key}"}, timeout=30, **extra
    )


def new_connection(two: Cluster) -> str:
    with client(two.nodes[0]) as http:
        body = {"domain": f"{uuid.uuid4().hex[:8]}.example", "profile_name": "p"}
        answer = http.post("/auth/connections", json=body)
        assert answer.status_code == 201, answer.text
        return str(answer.json()["id"])


def shell(two: Cluster, script: str, word: str) -> str:
    """What the script printed after ``word``."""
    said = two.nodes[0].shell(script)
    return said.split(word, 1)[1].split()[0]


@pytest.fixture
def task_id(two: Cluster) -> str:
    return shell(two, COMMAND.format(connection_id=new_connection(two)), "TASK")


def send(http: httpx.Client, task_id: str, text: str, message_id: str) -> httpx.Response:
    return http.post(
        f"/api/tasks/{task_id}/input", json={"text": text}, headers={"Idempotency-Key": message_id}
    )


def names(count: int) -> list[str]:
    """Message ids, each of which was never used before."""
    return [str(uuid.uuid4()) for _ in range(count)]


def lines(two: Cluster, task_id: str) -> list[tuple[int, str]]:
    """Number and message id of every line of the task, in order."""
    query = (
        f"SELECT number, message_id FROM connections_taskinput WHERE task_id = '{task_id}' ORDER BY number"
    )
    return [(number, message) for number, message in two.postgresql.execute(query)]


def at_once(two: Cluster, count: int, act: Callable[[int, httpx.Client], Any]) -> list[Any]:
    """``act(n, client)`` for every n at the same moment, even ones at the first process and odd ones at the second."""
    together = threading.Barrier(count)

    def one(number: int) -> Any:
        with client(two.nodes[number % 2]) as http:
            together.wait(60)
            return act(number, http)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


def test_B44_the_other_process_and_a_restarted_one_give_the_same_receipt(two: Cluster, task_id: str) -> None:
    message = str(uuid.uuid4())
    receipt = {"accepted": True, "client_message_id": message, "task_id": task_id}
    for node in two.nodes:
        with client(node) as http:
            answer = send(http, task_id, "y", message)
            assert (answer.status_code, answer.json()) == (202, receipt)
    node = two.nodes[0]
    node.stop("server")
    node.start("server")
    node.wait_until_up()
    with client(node) as http:
        answer = send(http, task_id, "y", message)
        assert (answer.status_code, answer.json()) == (202, receipt)
        assert answer.headers["Idempotent-Replayed"] == "true"
        # B45
        other = send(http, task_id, "n", message)
        assert (other.status_code, other.json()["code"]) == (409, "idempotency_conflict")
    assert lines(two, task_id) == [(1, message)]


def test_B46_twenty_identical_messages_at_once_at_two_processes_are_one_line(
    two: Cluster, task_id: str
) -> None:
    message = str(uuid.uuid4())
    answers = at_once(two, 20, lambda _, http: send(http, task_id, "y", message))
    receipt = {"accepted": True, "client_message_id": message, "task_id": task_id}
    assert [(answer.status_code, answer.json()) for answer in answers] == [(202, receipt)] * 20
    assert lines(two, task_id) == [(1, message)]
    told = f"SELECT count(*) FROM events_event WHERE topic = 'task:{task_id}' AND name = 'task.updated'"
    assert two.postgresql.execute(told) == [(1,)]


def test_B66_messages_at_once_at_two_processes_get_one_place_each(two: Cluster, task_id: str) -> None:
    ids = names(24)
    answers = at_once(two, 24, lambda number, http: send(http, task_id, f"{number}", ids[number]))
    assert {answer.status_code for answer in answers} == {202}
    kept = lines(two, task_id)
    assert [number for number, _ in kept] == list(range(1, 25))
    assert {message for _, message in kept} == set(ids)


def test_B72_a_queue_that_fills_up_from_two_sides_takes_exactly_what_fits(two: Cluster, task_id: str) -> None:
    def many(_: int, http: httpx.Client) -> list[tuple[str, httpx.Response]]:
        return [(message, send(http, task_id, "y", message)) for message in names(15)]

    answers = [answer for sent in at_once(two, 8, many) for answer in sent]
    accepted = {message for message, answer in answers if answer.status_code == 202}
    refused = [answer for _, answer in answers if answer.status_code != 202]
    assert len(accepted) == 100
    assert {message for _, message in lines(two, task_id)} == accepted
    assert {(answer.status_code, answer.json()["code"]) for answer in refused} == {(429, "queue_full")}
    assert all(int(answer.headers["Retry-After"]) >= 1 for answer in refused)


def test_B44_a_process_that_is_killed_in_the_middle_loses_nothing_and_doubles_nothing(
    two: Cluster, task_id: str
) -> None:
    """Every message is repeated until it has its receipt, as the outbox of a page does it."""
    node, other = two.nodes
    ids = names(60)
    unsure: list[str] = []
    some = threading.Event()

    def through_the_first(part: list[str]) -> None:
        with client(node) as http:
            for position, message in enumerate(part):
                try:
                    answer = send(http, task_id, message, message)
                    assert answer.status_code == 202, answer.text
                except httpx.TransportError:
                    unsure.append(message)
                if position == 3:
                    some.set()

    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(through_the_first, ids[start::4]) for start in range(4)]
        until(lambda: some.is_set() or all(job.done() for job in jobs), 30)
        node.stop("server", signal.SIGKILL)
        for job in jobs:
            job.result(60)
    try:
        assert unsure, "the kill came when everything had been sent"
        before = {message for _, message in lines(two, task_id)}
        with client(other) as http:
            for message in ids:
                answer = send(http, task_id, message, message)
                assert answer.status_code == 202
                assert answer.json()["client_message_id"] == message
                assert message not in before or "Idempotent-Replayed" in answer.headers
        kept = lines(two, task_id)
        assert [number for number, _ in kept] == list(range(1, 61))
        assert {message for _, message in kept} == set(ids)
    finally:
        node.start("server")
        node.wait_until_up()


def browser(two: Cluster, name: str, node: Running) -> httpx.Client:
    """Somebody who signed in through nginx, and whose requests all reach this process."""
    host = two.front.url.removeprefix("https://")
    with httpx.Client(
        base_url=two.front.url, timeout=30, verify=False, headers={"Referer": two.front.url}
    ) as http:
        token = re.search(r'name="csrfmiddlewaretoken" value="([^"]+)"', http.get("/signin").text)
        assert token is not None
        fields = {
            "username": name,
            "password": "correct-horse-battery",
            "csrfmiddlewaretoken": token.group(1),
        }
        assert http.post("/signin", data=fields).status_code == 302
        shown = re.search(r'"X-CSRFToken":"([^"]+)"', http.get("/").text)
        assert shown is not None
        cookies = "; ".join(f"{cookie.name}={cookie.value}" for cookie in http.cookies.jar)
    headers = {
        "Host": host, "X-Forwarded-Proto": "https", "X-Forwarded-For": "127.0.0.1", "Referer": f"{two.front.url}/",
        "Cookie": cookies, "X-CSRFToken": shown.group(1),
    }  # fmt: skip
    return httpx.Client(base_url=node.url, timeout=30, headers=headers)


def test_B65_a_page_sends_by_its_session_through_nginx_or_not_at_all(two: Cluster, task_id: str) -> None:
    with browser(two, "admin", two.nodes[1]) as http:
        first, second = names(2)
        assert send(http, task_id, "y", first).status_code == 202
        del http.headers["X-CSRFToken"]
        refused = send(http, task_id, "y", second)
        assert (refused.status_code, refused.json()["code"]) == (403, "csrf_failed")
    assert lines(two, task_id) == [(1, first)]


def test_B49_a_client_whose_stream_is_at_one_process_acts_at_the_other(two: Cluster, task_id: str) -> None:
    one, other = two.nodes
    cid = f"cid-{uuid.uuid4()}"
    first, second = names(2)
    with client(other) as http:
        http.headers["X-Connection-ID"] = cid
        refused = send(http, task_id, "y", first)
        assert (refused.status_code, refused.json()["code"]) == (409, "connection_unknown")
        with Stream(f"{one.url}/api/events?cid={cid}&page={uuid.uuid4()}", key=one.api_key) as stream:
            until(lambda: any(event.name == "welcome" for event in stream.events), 20)
            assert send(http, task_id, "y", first).status_code == 202
        # B65: it is gone, and that is no reason to refuse.
        assert send(http, task_id, "y", second).status_code == 202
    assert lines(two, task_id) == [(1, first), (2, second)]


def test_A48_a_line_is_found_in_no_table_no_answer_and_no_log(two: Cluster, task_id: str) -> None:
    secret = f"unmistakable-{uuid.uuid4().hex}"
    (message,) = names(1)
    said = ""
    with client(two.nodes[0]) as http:
        said += send(http, task_id, secret, message).text
        said += send(http, task_id, f"{secret} again", message).text
        said += send(http, task_id, secret * 2000, names(1)[0]).text
        said += http.get(f"/api/tasks/{task_id}").text
    with browser(two, "admin", two.nodes[1]) as http:
        said += http.get(f"/tasks/{task_id}").text
        said += http.get("/events").text
    for table in (
        "connections_taskinput",
        "connections_task",
        "connections_idempotentanswer",
        "events_event",
    ):
        said += str(two.postgresql.execute(f"SELECT row::text FROM {table} AS row"))
    said += "".join(node.log("server") for node in two.nodes) + two.postgresql.log()
    assert message in said, "there was something to look through"
    assert secret not in said
    assert secret.encode().hex() not in said


def test_A30_of_two_people_at_two_processes_one_is_accepted_and_the_other_is_told_by_whom(
    two: Cluster,
) -> None:
    connection_id = new_connection(two)
    interaction_id = shell(two, ASKING.format(connection_id=connection_id), "ASKS")
    together = threading.Barrier(2)

    def answer(name: str) -> httpx.Response:
        with browser(two, name, two.nodes[name == "op2"]) as http:
            together.wait(60)
            return http.post(
                f"/connections/{connection_id}/answer",
                data={"interaction_id": interaction_id, "field.f1": f"typed-by-{name}"},
                headers={"HX-Request": "true", "Idempotency-Key": str(uuid.uuid4())},
            )

    with ThreadPoolExecutor(2) as pool:
        answers = dict(zip(("op1", "op2"), pool.map(answer, ("op1", "op2")), strict=True))
    assert sorted(answer.status_code for answer in answers.values()) == [200, 409]
    winner = next(name for name, answer in answers.items() if answer.status_code == 200)
    loser = next(answer for answer in answers.values() if answer.status_code == 409)
    assert f"{winner} answered" in loser.text
    assert "typed-by" not in loser.text
    accepted = two.postgresql.execute(
        f"SELECT submitted_by FROM connections_submission WHERE interaction_id = '{interaction_id}'"
    )
    assert accepted == [(winner,)]
