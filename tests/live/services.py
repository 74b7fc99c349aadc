"""Real PostgreSQL, Redis and nginx on free loopback ports, and whole installations of several processes on top of them.

Each service is an object: ``url`` and ``pid``; ``stop()`` asks it to end, ``kill()`` does not ask, ``start()`` starts it again on the same port with
what it kept. PostgreSQL keeps its data over both, Redis keeps nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import glob
import ipaddress
import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
from cryptography import x509
from cryptography.fernet import Fernet
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.conftest import ROOT, SETUP, Running, free_port, missing, no_client_was_harmed, until

#: Makes the connections of one address unusable for that long after a fault: every start waits for an answer instead.
START_SECONDS = 30


def _as_postgres() -> dict[str, int]:
    """PostgreSQL refuses to run as root, so there it runs as its own user."""
    if os.geteuid() != 0:
        return {}
    user = pwd.getpwnam("postgres")
    return {"user": user.pw_uid, "group": user.pw_gid}


def _tool(name: str) -> str:
    found = sorted(glob.glob(f"/usr/lib/postgresql/*/bin/{name}"))
    return found[-1] if found else (shutil.which(name) or "")


class Service:
    """One program of others, as a process of this test."""

    name = "service"

    def __init__(self, directory: Path) -> None:
        self.port = free_port()
        self.log_file = directory / f"{self.name}.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None, f"{self.name} does not run"
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None

    def words(self) -> list[str]:
        raise NotImplementedError("each service says how it is started and asked")

    def answers(self) -> bool:
        raise NotImplementedError("each service says how it is started and asked")

    def identity(self) -> dict[str, int]:
        return {}

    def start(self) -> None:
        """Start it, and return when it answers."""
        assert self._process is None, f"{self.name} runs"
        end = None
        with self.log_file.open("ab") as output:

            def attempt() -> bool:
                nonlocal end
                if self._process is not None and (end := self._process.poll()) is not None:
                    # After a kill its children may hold the port or the data a little longer.
                    self._process = None
                if self._process is None:
                    self._process = subprocess.Popen(
                        self.words(),
                        stdin=subprocess.DEVNULL,
                        stdout=output,
                        stderr=output,
                        cwd="/",
                        **self.identity(),
                    )
                return self.answers()

            try:
                until(attempt, START_SECONDS)
            except AssertionError:
                raise AssertionError(f"{self.name} does not start ({end}):\n{self.log()[-2000:]}") from None

    def stop(self, number: int = signal.SIGTERM, seconds: float = 20) -> None:
        if self._process is None:
            return
        process, self._process = self._process, None
        process.send_signal(signal.SIGCONT)
        process.send_signal(number)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise AssertionError(f"{self.name} did not stop:\n{self.log()[-2000:]}") from None

    def kill(self) -> None:
        """As the kernel does it when memory is short: not a word to anybody."""
        self.stop(signal.SIGKILL)

    def restart(self) -> None:
        self.stop()
        self.start()

    def pause(self) -> None:
        """It is there, takes connections, and says nothing: as a network that swallows everything."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def log(self) -> str:
        return self.log_file.read_text(errors="replace") if self.log_file.exists() else ""


class PostgreSQL(Service):
    name = "postgresql"

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        # The server's user must be able to enter every folder above its data.
        self.place = Path(tempfile.mkdtemp(prefix="sb-pg-"))
        os.chmod(self.place, 0o755)
        if identity := self.identity():
            os.chown(self.place, identity["user"], identity["group"])
        subprocess.run(
            [_tool("initdb"), "-D", self.place / "data", "-A", "trust", "-U", "switchboard", "-E", "UTF8", "--no-sync"],
            check=True, capture_output=True, cwd="/", **self.identity(),
        )  # fmt: skip

    @property
    def url(self) -> str:
        return self.url_of("switchboard")

    def url_of(self, database: str) -> str:
        return f"postgres://switchboard@127.0.0.1:{self.port}/{database}"

    def identity(self) -> dict[str, int]:
        return _as_postgres()

    def words(self) -> list[str]:
        # fsync off: a process that dies loses nothing by it, only a machine that does.
        settings = {"listen_addresses": "127.0.0.1", "fsync": "off", "max_connections": "200"}
        return [
            _tool("postgres"), "-D", str(self.place / "data"), "-p", str(self.port), "-k", str(self.place),
            *(word for name, value in settings.items() for word in ("-c", f"{name}={value}")),
        ]  # fmt: skip

    def answers(self) -> bool:
        try:
            self.execute("SELECT 1", database="postgres")
        except psycopg.OperationalError:
            return False
        return True

    def execute(self, query: str, *, database: str = "switchboard") -> list[tuple[Any, ...]]:
        """One statement, in a transaction of its own; its rows."""
        with psycopg.connect(self.url_of(database), autocommit=True, connect_timeout=5) as connection:
            done = connection.execute(query)
            return done.fetchall() if done.description else []

    def new_database(self, name: str) -> str:
        """An empty database; its DATABASE_URL."""
        self.execute(f'CREATE DATABASE "{name}"', database="postgres")
        return self.url_of(name)

    def stop(self, number: int = signal.SIGINT, seconds: float = 20) -> None:
        """Fast: open connections are cut, as ``systemctl restart postgresql`` does it."""
        super().stop(number, seconds)

    def kill(self) -> None:
        """``kill -9`` of the server's first process. The others of it notice, and go."""
        super().kill()


class Redis(Service):
    name = "redis"

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._directory = directory

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def words(self) -> list[str]:
        program = shutil.which("redis-server")
        assert program
        return [
            program,
            "--port",
            str(self.port),
            "--bind",
            "127.0.0.1",
            "--save",
            "",
            "--dir",
            str(self._directory),
        ]

    def answers(self) -> bool:
        try:
            return self.ask("PING") == "+PONG"
        except OSError:
            return False

    def ask(self, *words: str) -> str:
        """One command; the first line of its answer as it is on the wire."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=5) as link:
            parts = [f"${len(word.encode())}\r\n{word}\r\n" for word in words]
            link.sendall(f"*{len(words)}\r\n{''.join(parts)}".encode())
            return link.recv(65536).decode(errors="replace").split("\r\n", 1)[0]

    def cut(self) -> None:
        """Cut every connection that hears wake-ups, and every other one; the server goes on."""
        for kind in ("pubsub", "normal"):
            self.ask("CLIENT", "KILL", "TYPE", kind)


@contextlib.contextmanager
def postgresql(directory: Path) -> Iterator[PostgreSQL]:
    """A new PostgreSQL with an empty database ``switchboard``."""
    if not _tool("initdb"):
        missing("PostgreSQL")
    server = PostgreSQL(directory)
    try:
        server.start()
        server.new_database("switchboard")
        yield server
    finally:
        server.stop()
        shutil.rmtree(server.place)


@contextlib.contextmanager
def redis(directory: Path) -> Iterator[Redis]:
    """A Redis server that keeps nothing."""
    if not shutil.which("redis-server"):
        missing("Redis")
    server = Redis(directory)
    try:
        server.start()
        yield server
    finally:
        server.stop()


# ── nginx, with the very file of deploy/ ──

NGINX_CONF = ROOT / "deploy" / "nginx.conf"
#: A line of deploy/nginx.conf that every installation has another value in.
MARK = "# <- yours"


def _nginx() -> str:
    return shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin") or ""


class Nginx(Service):
    """deploy/nginx.conf in front of servers on these ports. Only lines that it marks as the reader's own are changed."""

    name = "nginx"

    def __init__(self, directory: Path, ports: list[int]) -> None:
        super().__init__(directory)
        self.plain_port = free_port()
        self.directory = directory
        self.access_log = directory / "access.log"
        self.certificate = directory / "tls.crt"
        _self_signed(self.certificate, directory / "tls.key")
        self.conf = directory / "nginx.conf"
        self.conf.write_text(self.render(ports))

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    def render(self, ports: list[int]) -> str:
        """The reference with the values of this test in its marked lines.

        :raises AssertionError: when the file has a marked line that is not known here, or lacks one that is.
        """
        servers = [f"server 127.0.0.1:{port} max_fails=0;" for port in ports]
        values: dict[str, list[str]] = {
            # The tests' folders belong to whoever runs the tests.
            "user": ["user root;"] if os.geteuid() == 0 else [],
            "pid": [f"pid {self.directory}/nginx.pid;"],
            "error_log": [f"error_log {self.directory}/nginx-error.log warn;"],
            "access_log": [
                f"access_log {self.access_log} switchboard;",
                *(
                    f"{name}_temp_path {self.directory}/{name};"
                    for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
                ),
            ],
            "server 127.0.0.1:8001": servers,
            "server 127.0.0.1:8002": [],
            "listen 80": [f"listen 127.0.0.1:{self.plain_port} default_server;"],
            "listen [::]:80": [],
            "listen 443": [f"listen 127.0.0.1:{self.port} ssl http2 backlog=4096;"],
            "listen [::]:443": [],
            "server_name": ["server_name 127.0.0.1;"],
            "ssl_certificate ": [f"ssl_certificate {self.certificate};"],
            "ssl_certificate_key": [f"ssl_certificate_key {self.directory}/tls.key;"],
        }
        unused = set(values)
        lines: list[str] = []
        for line in NGINX_CONF.read_text().splitlines():
            if MARK not in line:
                lines.append(line)
                continue
            start = next((start for start in values if line.strip().startswith(start)), None)
            assert start is not None, f"{NGINX_CONF.name}: no test knows what to put here: {line}"
            unused.discard(start)
            indent = line[: len(line) - len(line.lstrip())]
            lines.extend(indent + each for each in values[start])
        assert not unused, f"{NGINX_CONF.name} has no marked line for {sorted(unused)}"
        return "\n".join(lines) + "\n"

    def words(self) -> list[str]:
        return [
            _nginx(),
            "-c",
            str(self.conf),
            "-e",
            str(self.directory / "nginx-error.log"),
            "-g",
            "daemon off;",
        ]

    def answers(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=2):
            return True
        return False

    def check(self) -> subprocess.CompletedProcess[str]:
        """``nginx -t`` on what is run."""
        return subprocess.run(
            [*self.words()[:-2], "-t"], capture_output=True, text=True, timeout=20, check=False, cwd="/"
        )


def _self_signed(certificate: Path, key: Path) -> None:
    private = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = dt.datetime.now(dt.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name).issuer_name(name).public_key(private.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1)).not_valid_after(now + dt.timedelta(days=2))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(private, hashes.SHA256())
    )  # fmt: skip
    certificate.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    key.write_bytes(
        private.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    key.chmod(0o600)


@contextlib.contextmanager
def nginx(directory: Path, ports: list[int]) -> Iterator[Nginx]:
    if not _nginx():
        missing("nginx")
    server = Nginx(directory, ports)
    try:
        server.start()
        yield server
    finally:
        server.stop(signal.SIGTERM)


# ── An installation of several machines, all of them here ──


@dataclasses.dataclass
class Cluster:
    """``nodes`` are the servers, each with a directory of its own as on a machine of its own; ``front`` is what users reach."""

    nodes: list[Running]
    front: Running
    postgresql: PostgreSQL
    redis: Redis | None
    nginx: Nginx

    def stop(self) -> None:
        for node in self.nodes:
            stop_all(node)


def stop_all(running: Running) -> None:
    """End every process of this node that still runs."""
    no_client_was_harmed(running)
    processes = list(running.processes.values())
    running.processes.clear()
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextlib.contextmanager
def cluster(
    directory: Path, *, servers: int = 2, workers: int = 1, with_redis: bool = True, **extra: str
) -> Iterator[Cluster]:
    """PostgreSQL, Redis, ``servers`` server processes, ``workers`` workers, nginx in front; all of them answer.

    ``extra`` are knobs of every process. The workers run on the first node as ``worker``, ``worker2`` ...
    """
    with contextlib.ExitStack() as stack:
        database = stack.enter_context(postgresql(directory))
        layer = stack.enter_context(redis(directory)) if with_redis else None
        ports = [free_port() for _ in range(servers)]
        front = stack.enter_context(nginx(directory, ports))
        shared = {
            "DATABASE_URL": database.url,
            "BASE_URL": front.url,
            "TRUSTED_PROXIES": "127.0.0.1",
            "ALLOW_PRIVATE_TARGETS": "1",
            "COMMANDS": "any",
            "STREAM_LIMIT": "200",
            "SECRET_KEY": "of the cluster " * 4,
            "ENCRYPTION_KEYS": Fernet.generate_key().decode(),
            "PYTHONUNBUFFERED": "1",
            "DJANGO_SETTINGS_MODULE": "project.settings",
            **({"REDIS_URL": layer.url} if layer else {}),
            **extra,
        }
        kept = {
            name: os.environ[name] for name in ("PATH", "HOME", "LANG", "VIRTUAL_ENV") if name in os.environ
        }
        nodes = []
        for number, port in enumerate(ports, 1):
            place = directory / f"node{number}"
            place.mkdir()
            env = kept | shared | {"PORT": str(port), "DATA_DIR": str(place)}
            nodes.append(
                Running(url=f"http://127.0.0.1:{port}", env=env, data_dir=place, api_key="", other_api_key="")
            )
        first = nodes[0]
        first.manage("migrate", "--verbosity", "0")
        keys = json.loads(first.shell(SETUP).split("KEYS", 1)[1])
        for node in nodes:
            node.api_key, node.other_api_key = keys
        made = Cluster(
            nodes=nodes,
            front=dataclasses.replace(first, url=front.url, processes={}),
            postgresql=database, redis=layer, nginx=front,
        )  # fmt: skip
        stack.callback(made.stop)
        for node in nodes:
            node.start("server")
        for number in range(workers):
            first.start("worker" if number == 0 else f"worker{number + 1}")
        for node in nodes:
            node.wait_until_up()
        yield made
