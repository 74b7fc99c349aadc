"""The reference deployment as it stands in ``deploy/``: its nginx, two servers, a worker, PostgreSQL and Redis, all of them real."""

from __future__ import annotations

import configparser
import http.client
import re
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from connections import worker
from events.sse import Parser, ServerSentEvent
from project import env
from tests.conftest import ROOT, Running, missing, until
from tests.live import services
from tests.live.services import Cluster
from tests.live.streaming import (
    DRAINS_LONGER,
    TLS,
    Stream,
    call,
    connect,
    events,
    login,
    managed,
    many,
    opened_and_stalled,
    start_patched,
    tls,
    write_elsewhere,
)
from tests.sites.app import Site

pytestmark = pytest.mark.live
DEPLOY = ROOT / "deploy"
UNITS = sorted(path.name for path in DEPLOY.glob("switchboard*.service"))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with services.cluster(tmp_path_factory.mktemp("cluster"), HEARTBEAT_SECONDS="2") as started:
        yield started


def numbers(stream: Stream) -> list[int]:
    return [event.json()["n"] for event in stream.logged()]


def up(node: Running) -> None:
    node.start("server")
    node.wait_until_up()


# ── Two servers are one installation ──


def test_C36_an_event_made_on_one_server_is_on_the_streams_of_the_other_in_the_same_order(
    cluster: Cluster,
) -> None:
    first, second = cluster.nodes
    with events(first, "?topics=connections") as here, events(second, "?topics=connections") as there:
        for stream in (here, there):
            stream.named("ready")
        made = [connect(node)["id"] for node in (first, second, first, second, second, first)]
        for stream in (here, there):
            until(lambda stream=stream: len(stream.of("connection.created")) >= len(made), 15)
            assert [event.json()["id"] for event in stream.of("connection.created")] == made
        assert [event.id for event in here.logged()] == [event.id for event in there.logged()]


def test_C44_a_client_that_moves_between_servers_by_its_cursor_has_everything_once(cluster: Cluster) -> None:
    with events(cluster.nodes[0], "?topics=task:moving") as whole:
        cursor = str(whole.named("ready").json()["cursor"])
        seen: list[int] = []
        for turn in range(4):
            write_elsewhere(cluster.nodes[0], 5, topic="moving")
            with events(cluster.nodes[turn % 2], "?topics=task:moving", Last_Event_ID=cursor) as stream:
                until(lambda stream=stream: len(stream.logged()) >= 5, 15)
                stream.named("ready")
                seen += [int(event.id) for event in stream.logged()]
                cursor = stream.parser.last_event_id
        until(lambda: len(whole.logged()) >= 20, 15)
        assert seen == [int(event.id) for event in whole.logged()]


def test_a_login_started_through_nginx_is_done_by_a_worker_and_followed_on_both_servers(
    cluster: Cluster,
) -> None:
    with Site(scenario="simple") as site:
        connection = connect(cluster.front, site.domain, login_url=site.url("/simple/login"))
        with (
            managed(cluster.nodes[0], connection) as here,
            managed(cluster.nodes[1], connection) as there,
            managed(cluster.front, connection) as front,
        ):
            login(cluster.front, connection)
            for stream in (here, there, front):
                stream.until(lambda event: event.json().get("flow_step") == "AWAITING_INPUT")
            call(cluster.front, "POST", f"/auth/connections/{connection['id']}/cancel", {})
            for stream in (here, there, front):
                assert stream.ended.wait(30)
                assert stream.events[-1].json()["flow_status"] == "CANCELED"


# ── Through nginx ──


@pytest.mark.parametrize("http2", [False, True], ids=["HTTP/1.1", "HTTP/2"])
def test_C01_every_event_arrives_before_the_next_is_written_and_nothing_is_compressed(
    cluster: Cluster, http2: bool
) -> None:
    """A proxy that held bytes back would show the first event only when the buffer is full or the stream over."""
    headers = {"Authorization": f"Bearer {cluster.front.api_key}", "Accept-Encoding": "gzip, br, deflate"}
    with (
        httpx.Client(http1=not http2, http2=http2, verify=tls(), trust_env=False, timeout=20) as client,
        client.stream("GET", f"{cluster.front.url}/api/events?topics=connections", headers=headers) as answer,
    ):
        assert answer.status_code == 200
        assert answer.http_version == ("HTTP/2" if http2 else "HTTP/1.1")
        assert answer.headers["content-type"] == "text/event-stream"
        assert answer.headers.get("content-encoding") == "identity"
        parser, arrived = Parser(), iter(())
        chunks = answer.iter_raw()

        def next_event(name: str) -> ServerSentEvent:
            nonlocal arrived
            while True:
                for event in arrived:
                    if event.name == name:
                        return event
                arrived = iter(parser.feed(next(chunks)))

        next_event("ready")
        for node in (*cluster.nodes, cluster.front):
            made = connect(node)
            # The next is made only when this one is here, so nothing pushes it out.
            assert next_event("connection.created").json()["id"] == made["id"]


def test_C01_both_streams_of_pages_and_connections_pass_unbuffered(cluster: Cluster) -> None:
    connection = connect(cluster.front)
    with managed(cluster.front, connection) as stream:
        # Nothing happens on it: its first byte is a heartbeat, far smaller than any buffer.
        assert stream.status == 200
        stream.named("sse_heartbeat", 20)


@pytest.mark.parametrize(
    "path", ["/metrics", "/metrics/", "//metrics", "/%6detrics", "/x/../metrics", "/readyz", "/metrics?x=1"]
)
def test_what_is_for_operators_is_not_public(cluster: Cluster, path: str) -> None:
    parts = urlsplit(cluster.front.url)
    link = http.client.HTTPSConnection(parts.hostname or "", parts.port, timeout=10, context=TLS)
    # As it is: a client library would tidy the path up.
    link.putrequest("GET", path)
    link.putheader("Authorization", f"Bearer {cluster.front.api_key}")
    link.endheaders()
    answer = link.getresponse()
    body = answer.read()
    link.close()
    assert answer.status == 404
    assert b"switchboard_" not in body
    assert b"python_" not in body


def test_plain_http_leads_to_https(cluster: Cluster) -> None:
    link = http.client.HTTPConnection("127.0.0.1", cluster.nginx.plain_port, timeout=10)
    link.request("GET", "/connections?x=1")
    answer = link.getresponse()
    assert (answer.status, answer.getheader("Location")) == (301, "https://127.0.0.1/connections?x=1")
    link.close()


def test_a_body_over_the_limit_is_refused_with_a_reason_in_the_form_of_the_api(cluster: Cluster) -> None:
    for size in (3_000_000, 6_000_000):
        status, body, _ = call(cluster.front, "POST", "/auth/connections", {"domain": "x" * size})
        assert (status, body["code"]) == (413, "payload_too_large")


def test_A48_the_code_of_a_hosted_link_is_not_in_the_log_of_nginx(cluster: Cluster) -> None:
    link = http.client.HTTPSConnection("127.0.0.1", cluster.nginx.port, timeout=10, context=TLS)
    link.request("GET", "/login/ma_x?code=very-secret-code", headers={"X-Request-ID": "named-by-the-caller"})
    link.getresponse().read()
    link.close()
    line = until(
        lambda: next(
            (x for x in cluster.nginx.access_log.read_text().splitlines() if "/login/ma_x" in x), None
        ),
        5,
    )
    assert "very-secret-code" not in line
    assert "id=named-by-the-caller" in line


class Echo:
    """A server that answers every request with what it was asked, in place of Switchboard."""

    def __init__(self, port: int, *, status: int = 200) -> None:
        self.seen: list[str] = []
        self.status = status
        self._listener = socket.create_server(("127.0.0.1", port))
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                link, _ = self._listener.accept()
            except OSError:
                return
            with link:
                head = b""
                while b"\r\n\r\n" not in head:
                    head += link.recv(65536)
                self.seen.append(head.decode())
                link.sendall(
                    f"HTTP/1.1 {self.status} X\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok".encode()
                )

    def stop(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(5)


@pytest.fixture
def echoes(tmp_path: Path) -> Iterator[tuple[services.Nginx, list[Echo]]]:
    """The reference nginx before two servers that only write down what they are asked; the first answers 503."""
    ports = [services.free_port() for _ in range(2)]
    servers = [Echo(port, status=status) for port, status in zip(ports, (503, 200), strict=True)]
    with services.nginx(tmp_path, ports) as front:
        yield front, servers
    for server in servers:
        server.stop()


def test_what_a_client_says_about_its_address_is_replaced(echoes: tuple[services.Nginx, list[Echo]]) -> None:
    front, servers = echoes
    lies = {
        "X-Forwarded-For": "6.6.6.6", "X-Forwarded-Proto": "http", "X-Forwarded-Host": "evil.example", "X-Real-IP": "6.6.6.6",
        "Forwarded": "for=6.6.6.6", "X-Forwarded-Port": "1", "X-Request-ID": 'x" forged="1',
    }  # fmt: skip
    httpx.get(f"{front.url}/auth/connections", headers=lies, verify=tls(), trust_env=False)
    (head,) = servers[1].seen
    sent = dict(line.lower().split(": ", 1) for line in head.split("\r\n")[1:] if ": " in line)
    assert sent["x-forwarded-for"] == "127.0.0.1"
    assert sent["x-forwarded-proto"] == "https"
    assert re.fullmatch(r"[0-9a-f]{32}", sent["x-request-id"])
    assert not {"x-forwarded-host", "x-real-ip", "forwarded", "x-forwarded-port", "connection"} & set(sent)


def test_a_GET_that_one_server_refuses_goes_to_the_other_and_a_POST_is_sent_once(
    echoes: tuple[services.Nginx, list[Echo]],
) -> None:
    front, servers = echoes
    with httpx.Client(verify=tls(), trust_env=False) as client:
        for _ in range(2):
            assert client.get(f"{front.url}/api/events").status_code == 200
        assert any(head.startswith("GET /api/events") for head in servers[0].seen), (
            "the one that refuses was asked"
        )
        for method in ("POST", "PATCH"):
            before = sum(len(server.seen) for server in servers)
            client.request(method, f"{front.url}/auth/connections", json={})
            assert sum(len(server.seen) for server in servers) == before + 1


def test_without_any_server_the_answer_is_503_in_the_form_of_the_api(tmp_path: Path) -> None:
    with services.nginx(tmp_path, [services.free_port(), services.free_port()]) as front:
        answer = httpx.get(f"{front.url}/auth/connections", verify=tls(), trust_env=False)
    assert (answer.status_code, answer.json()["code"], answer.headers["retry-after"]) == (
        503,
        "unavailable",
        "2",
    )


# ── Restarts ──


class Client:
    """Follows the stream through nginx as a client should: keeps its cursor, comes back after every end."""

    def __init__(self, cluster: Cluster, topic: str) -> None:
        self.cluster = cluster
        self.topic = topic
        self.cursor = ""
        self.seen: list[int] = []
        self.ends: list[str] = []
        self.opened = 0
        self.ready = threading.Event()
        self.stopped = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def _follow(self) -> None:
        while not self.stopped.is_set():
            try:
                headers = {"Last_Event_ID": self.cursor} if self.cursor else {}
                with events(self.cluster.front, f"?topics=task:{self.topic}", **headers) as stream:
                    self._take(stream)
            except OSError:
                pass
            # As "retry:" asks for it, only sooner.
            self.stopped.wait(0.05)

    def _take(self, stream: Stream) -> None:
        if stream.status != 200:
            return
        self.opened += 1
        taken = 0
        while not self.stopped.is_set():
            over = stream.ended.is_set()
            for event in stream.events[taken:]:
                taken += 1
                if event.name == "ready":
                    self.cursor = self.cursor or str(event.json()["cursor"])
                    self.ready.set()
                elif event.name == "end":
                    self.ends.append(event.json()["reason"])
                elif "." in event.name:
                    self.seen.append(event.json()["n"])
                    self.cursor = event.id
            if over:
                return
            stream.ended.wait(0.02)

    def wait_for(self, count: int) -> None:
        until(lambda: len(self.seen) >= count, 30, f"it has {self.seen}, and was told {self.ends}")

    def stop(self) -> None:
        self.stopped.set()
        self._thread.join(10)


def test_C08_a_rolling_restart_under_twenty_clients_loses_nothing_and_repeats_nothing(
    cluster: Cluster,
) -> None:
    clients = [Client(cluster, "rolling") for _ in range(20)]
    try:
        for client in clients:
            assert client.ready.wait(20)
        written = 0
        for node in cluster.nodes:
            write_elsewhere(node, 10, topic="rolling")
            assert node.stop("server", signal.SIGTERM) == 0
            # The other one has them all.
            write_elsewhere(node, 10, topic="rolling")
            written += 20
            for client in clients:
                client.wait_for(written)
            up(node)
        for client in clients:
            assert client.seen == [*range(10)] * 4
            assert set(client.ends) <= {"shutdown"}
        assert sum(len(client.ends) for client in clients) >= 20, "every stream was told"
    finally:
        for client in clients:
            client.stop()
    for node in cluster.nodes:
        assert "Traceback" not in node.log("server"), node.log("server")


def test_C08_B41_a_server_that_is_killed_is_replaced_by_the_other_and_nothing_is_lost(
    cluster: Cluster,
) -> None:
    clients = [Client(cluster, "killed") for _ in range(6)]
    node = cluster.nodes[0]
    try:
        for client in clients:
            assert client.ready.wait(20)
        write_elsewhere(node, 5, topic="killed")
        node.stop("server", signal.SIGKILL)
        write_elsewhere(node, 5, topic="killed")
        for client in clients:
            client.wait_for(10)
            assert client.seen == [*range(5)] * 2
        assert any(client.opened > 1 for client in clients), "some were on it"
    finally:
        for client in clients:
            client.stop()
        up(node)


def test_C08_the_503_of_a_draining_server_is_taken_over_by_the_other(cluster: Cluster) -> None:
    """A reader that takes nothing keeps the first server draining for seconds; who comes meanwhile does not notice."""
    node = cluster.nodes[0]
    assert node.stop("server") == 0
    start_patched(node, DRAINS_LONGER)
    with opened_and_stalled(node, "?topics=task:stuck"):
        with events(node, "?topics=task:stuck") as quick:
            quick.named("ready")
            write_elsewhere(node, 80, topic="stuck", size=100_000)
            until(lambda: len(quick.logged()) == 80, 30)
            process = node.processes["server"]
            process.terminate()
            assert quick.named("end").json()["reason"] == "shutdown"
            with events(node) as refused:
                assert refused.status == 503
            with many(6, lambda: events(cluster.front)) as streams:
                for stream in streams:
                    assert stream.status == 200
                    stream.named("ready")
                assert process.poll() is None, "it was still draining"
        assert process.wait(15) == 0
    node.processes.pop("server")
    # A line of the log is written when its request is over.
    log = cluster.nginx.access_log
    line = until(lambda: next((x for x in log.read_text().splitlines() if "was=503, 200" in x), None), 5)
    assert "/api/events" in line
    up(node)


def test_a_worker_told_to_stop_hands_its_login_over_and_a_killed_one_loses_it_only_for_the_lease(
    cluster: Cluster,
) -> None:
    first = cluster.nodes[0]
    with Site(scenario="simple") as site:
        connection = connect(cluster.front, site.domain, login_url=site.url("/simple/login"))
        with managed(cluster.front, connection) as stream:
            login(cluster.front, connection)
            asked = stream.until(lambda event: event.json().get("flow_step") == "AWAITING_INPUT").json()
            assert first.stop("worker") == 0
            first.start("worker")
            stream.until(
                lambda event: (
                    event.json().get("flow_step") == "AWAITING_INPUT"
                    and event.json()["interaction_id"] != asked["interaction_id"]
                ),
                30,
            )
        call(cluster.front, "POST", f"/auth/connections/{connection['id']}/cancel", {})


# ── PostgreSQL and Redis ──


def test_a_restart_of_postgresql_and_of_redis_costs_time_and_no_event(cluster: Cluster) -> None:
    assert cluster.redis is not None
    clients = [Client(cluster, "faults") for _ in range(4)]
    try:
        for client in clients:
            assert client.ready.wait(20)
        written = 0
        for fault in (cluster.redis.cut, cluster.redis.restart, cluster.postgresql.restart):
            write_elsewhere(cluster.nodes[0], 5, topic="faults")
            fault()
            write_elsewhere(cluster.nodes[0], 5, topic="faults")
            written += 10
            for client in clients:
                client.wait_for(written)
        for client in clients:
            assert client.seen == [*range(5)] * 6
        assert call(cluster.front, "GET", "/auth/connections")[0] == 200
    finally:
        for client in clients:
            client.stop()


def test_while_redis_is_away_people_sign_in_and_wrong_keys_are_401(cluster: Cluster) -> None:
    assert cluster.redis is not None
    cluster.redis.stop()
    try:
        assert call(cluster.front, "GET", "/auth/connections", key="sk_wrong")[0] == 401
        with httpx.Client(
            base_url=cluster.front.url, verify=tls(), trust_env=False, follow_redirects=True
        ) as browser:
            browser.get("/signin")
            form = {
                "username": cluster.front.username,
                "password": cluster.front.password,
                "csrfmiddlewaretoken": browser.cookies["csrftoken"],
            }
            signed_in = browser.post("/signin", data=form, headers={"Referer": f"{cluster.front.url}/signin"})
            assert signed_in.status_code == 200
            assert signed_in.url.path == "/"
        with events(cluster.front) as stream:
            stream.named("ready")
            made = connect(cluster.nodes[1])
            stream.until(
                lambda event: event.name == "connection.created" and event.json()["id"] == made["id"]
            )
    finally:
        cluster.redis.start()


def test_a_connection_to_postgresql_has_the_limits_that_keep_one_stuck_process_from_stopping_all(
    cluster: Cluster,
) -> None:
    show = "from django.db import connection\nwith connection.cursor() as c:\n"
    for name, value in {
        "idle_in_transaction_session_timeout": "15s",
        "lock_timeout": "20s",
        "application_name": "switchboard",
    }.items():
        code = f"{show}    c.execute('SHOW {name}'); print('IS', c.fetchone()[0])\nconnection.close()\nconnection.close_pool()"
        printed = cluster.nodes[0].shell(code)
        assert printed.split("IS ")[1].strip() == value


# ── systemd ──


def test_systemd_accepts_the_units_and_finds_them_confined(tmp_path: Path) -> None:
    if not shutil.which("systemd-analyze"):
        missing("systemd")
    assert UNITS == ["switchboard-server@.service", "switchboard-worker@.service"]
    for name in (*UNITS, "switchboard.target"):
        # Only the place of the installation is another one here: systemd looks whether what is started exists.
        text = (DEPLOY / name).read_text().replace("/srv/switchboard", str(ROOT))
        (tmp_path / name).write_text(text)
    for unit in ("switchboard-server@8001.service", "switchboard-worker@1.service"):
        done = subprocess.run(
            ["systemd-analyze", "verify", "--man=no", str(tmp_path / unit)],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        ours = [line for line in done.stderr.splitlines() if "switchboard" in line]
        assert (done.returncode, ours) == (0, []), done.stderr
    for name in UNITS:
        done = subprocess.run(
            ["systemd-analyze", "security", "--offline=true", "--threshold=25", "--no-pager", str(tmp_path / name)],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-600:] + done.stderr


def as_systemd_reads(path: Path) -> dict[str, str]:
    """systemd.exec(5), EnvironmentFile=, as far as the example needs it: a value between single quotes is taken as it is."""
    given = {}
    for line in path.read_text().splitlines():
        if line and not line.startswith("#"):
            name, value = line.split("=", 1)
            assert re.fullmatch("'[^']*'", value), f"{name} is not between single quotes"
            given[name] = value[1:-1]
    return given


def as_a_shell_reads(path: Path) -> dict[str, str]:
    """As manage() in the README does."""
    done = subprocess.run(
        ["env", "-i", "sh", "-c", 'set -a; . "$0"; exec /usr/bin/env -0', str(path)],
        capture_output=True, text=True, timeout=10, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    given = dict(line.split("=", 1) for line in done.stdout.split("\0") if line)
    return {name: value for name, value in given.items() if name not in ("PWD", "OLDPWD", "SHLVL", "_")}


def test_the_environment_file_is_the_same_for_systemd_and_for_a_shell(tmp_path: Path) -> None:
    text = (DEPLOY / "switchboard.env.example").read_text()
    assert "change-me" in text
    # What people put there: each of these means something to a shell.
    word = 'a&b;c$d#e f*g`h`"i"\\\\j|k(l)~m!n<o>'
    file = tmp_path / "switchboard.env"
    file.write_text(text.replace("change-me", word).replace("# SECRET_KEY=''", f"SECRET_KEY='{word}'"))
    given = as_systemd_reads(file)
    assert word in given["DATABASE_URL"]
    assert given["SECRET_KEY"] == word
    assert as_a_shell_reads(file) == given


def service_of(name: str) -> configparser.SectionProxy:
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(DEPLOY / name)
    return unit["Service"]


def test_the_units_and_the_environment_file_fit_the_program(tmp_path: Path) -> None:
    given = as_systemd_reads(DEPLOY / "switchboard.env.example")
    knobs = env.read({**given, "DATA_DIR": str(tmp_path)})
    assert knobs.redis_url
    assert "postgresql" in str(knobs.database["ENGINE"])
    assert "PORT" not in given, "it is the instance of the unit"
    for name in UNITS:
        service = service_of(name)
        # Longer than a drain takes, so that systemd kills nobody who is still saying goodbye.
        assert int(service["TimeoutStopSec"].rstrip("s")) > 10
        assert int(service["LimitNOFILE"]) > knobs.stream_process_limit
        if "worker" in name:
            # What it needs to see to its commands, and both of its patience for logins and for what does not listen.
            needed = knobs.command_stop_seconds + knobs.command_kill_seconds + 2 * worker.STOP_SECONDS
            assert int(service["TimeoutStopSec"]) > needed
            assert service["KillMode"] == "process", "systemd ends no command under the worker"
        module = service["ExecStart"].split(".venv/bin/python ")[1]
        assert module in ("-m project.server", "manage.py run_worker")


def waiting(port: str) -> subprocess.CompletedProcess[str]:
    """What the unit runs after its server, with less patience."""
    if not shutil.which("curl"):
        missing("curl")
    words = service_of("switchboard-server@.service")["ExecStartPost"].replace("%i", port)
    assert words.startswith("-"), "whatever it finds, the server stays"
    words = words.removeprefix("-").replace("--retry-max-time 30", "--retry-max-time 3")
    return subprocess.run(words.split(), capture_output=True, text=True, timeout=60, check=False)


def test_the_wait_for_a_ready_server_is_over_before_systemd_loses_its_patience() -> None:
    service = service_of("switchboard-server@.service")
    words = service["ExecStartPost"].split()
    retrying, one = (int(words[words.index(name) + 1]) for name in ("--retry-max-time", "--max-time"))
    # The last attempt may begin when the time for new ones is over.
    assert retrying + one + 10 <= int(service["TimeoutStartSec"])


def test_a_start_of_the_unit_returns_when_the_server_is_ready(cluster: Cluster) -> None:
    assert cluster.redis is not None
    node = cluster.nodes[0]
    assert waiting(node.env["PORT"]).returncode == 0
    # Nobody listens there.
    assert waiting(str(services.free_port())).returncode == 7


def test_a_server_that_starts_without_redis_is_waited_for_in_vain_and_serves(cluster: Cluster) -> None:
    assert cluster.redis is not None
    node = cluster.nodes[0]
    assert node.stop("server") == 0
    cluster.redis.stop()
    try:
        up(node)
        assert waiting(node.env["PORT"]).returncode == 22
        with events(node) as stream:
            stream.named("ready")
            made = connect(node)
            stream.until(lambda event: event.json().get("id") == made["id"])
    finally:
        cluster.redis.start()
    until(lambda: waiting(node.env["PORT"]).returncode == 0, 30, "it was not ready again")
