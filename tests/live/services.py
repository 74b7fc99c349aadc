"""Real PostgreSQL and Redis on free loopback ports, for as long as a test needs them."""

from __future__ import annotations

import contextlib
import glob
import os
import pwd
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.conftest import free_port, missing, until


def _as_postgres() -> dict[str, int]:
    """PostgreSQL refuses to run as root, so there it runs as its own user."""
    if os.geteuid() != 0:
        return {}
    user = pwd.getpwnam("postgres")
    return {"user": user.pw_uid, "group": user.pw_gid}


def _tool(name: str) -> str:
    found = sorted(glob.glob(f"/usr/lib/postgresql/*/bin/{name}"))
    return found[-1] if found else (shutil.which(name) or "")


@contextlib.contextmanager
def postgresql(directory: Path) -> Iterator[str]:
    """A new database cluster; yields its DATABASE_URL."""
    if not _tool("initdb"):
        missing("PostgreSQL")
    identity = _as_postgres()
    # The server's user must be able to enter every folder above its data.
    place = Path("/tmp") / f"sb-pg-{os.getpid()}-{free_port()}"
    place.mkdir()
    try:
        if identity:
            os.chown(place, identity["user"], identity["group"])
        port = free_port()
        subprocess.run(
            [_tool("initdb"), "-D", place / "data", "-A", "trust", "-U", "switchboard", "-E", "UTF8"],
            check=True, capture_output=True, cwd="/", **identity,
        )  # fmt: skip
        with (directory / "postgresql.log").open("wb") as output:
            server = subprocess.Popen(
                [_tool("postgres"), "-D", place / "data", "-p", str(port), "-k", place,
                 "-c", "listen_addresses=127.0.0.1", "-c", "fsync=off"],
                stdout=output, stderr=output, cwd="/", **identity,
            )  # fmt: skip
        try:
            words = ["-h", "127.0.0.1", "-p", str(port), "-U", "switchboard"]
            until(
                lambda: subprocess.run([_tool("pg_isready"), *words], capture_output=True).returncode == 0, 30
            )
            subprocess.run([_tool("createdb"), *words, "switchboard"], check=True, capture_output=True)
            yield f"postgres://switchboard@127.0.0.1:{port}/switchboard"
        finally:
            server.terminate()
            server.wait(20)
    finally:
        shutil.rmtree(place)


@contextlib.contextmanager
def redis(directory: Path) -> Iterator[str]:
    """A Redis server that keeps nothing; yields its REDIS_URL."""
    program = shutil.which("redis-server")
    if not program:
        missing("Redis")
    port = free_port()
    with (directory / "redis.log").open("wb") as output:
        server = subprocess.Popen(
            [str(program), "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", directory],
            stdout=output, stderr=output,
        )  # fmt: skip
    try:
        ping = ["redis-cli", "-p", str(port), "ping"]
        until(lambda: b"PONG" in subprocess.run(ping, capture_output=True).stdout, 20)
        yield f"redis://127.0.0.1:{port}/0"
    finally:
        server.terminate()
        server.wait(20)
