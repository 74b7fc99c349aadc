"""Every knob of the environment, read once and checked here. A wrong value stops the start and names the knob.

The table in README.md lists the same knobs; ``tests/project/test_env.py`` compares the two.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import os
import re
import secrets
import tomllib
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

import dj_database_url
import psycopg
import redis
import redis.asyncio
from cryptography.fernet import Fernet
from environs import Env, EnvError
from psycopg.conninfo import conninfo_to_dict, make_conninfo, timeout_from_conninfo

#: A host name or address with an optional port. No user, no space, nothing that ends a header.
_NETLOC = re.compile(r"[\w.-]+(:\d+)?|\[[0-9A-Fa-f:.]+\](:\d+)?", re.ASCII)
#: What fits into an Authorization header and cannot be guessed.
_TOKEN = re.compile(r"[\x21-\x7e]{16,}")
_HOST = re.compile(r"[\w.-]+|[0-9A-Fa-f:.]+", re.ASCII)

BASE_DIR = Path(__file__).resolve().parent.parent


class WrongSetting(SystemExit):
    """A knob has a value that cannot work. Ends the program with its name and a reason."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(f"switchboard: {name}: {why}")
        self.name = name


@dataclasses.dataclass(frozen=True, kw_only=True)
class Knobs:
    """The checked values. Durations are in seconds, sizes in bytes."""

    debug: bool
    host: str
    port: int
    data_dir: Path
    base_url: str
    allowed_hosts: list[str]
    trusted_proxies: list[str]
    database: dict[str, object] = dataclasses.field(repr=False)
    database_pool_size: int
    redis_url: str
    cors_origins: list[str]
    return_urls: list[str]
    frame_ancestors: list[str]
    allow_private_targets: bool
    secret_key: str = dataclasses.field(repr=False)
    encryption_keys: list[str] = dataclasses.field(repr=False)
    flow_seconds: int
    input_seconds: int
    lease_seconds: int
    task_attempts: int
    stream_max_seconds: int
    stream_limit: int
    stream_process_limit: int
    heartbeat_seconds: int
    client_grace_seconds: int
    client_suspended_seconds: int
    client_lease_seconds: int
    poll_seconds: float
    event_retention_days: int
    task_retention_days: int
    max_body_bytes: int
    connection_quota: int
    commands: str
    command_templates: dict[str, dict[str, Any]]
    command_directories: list[str]
    command_env: list[str]
    command_limit: int
    command_concurrency: int
    command_seconds: int
    command_output_bytes: int
    command_quiet_seconds: float
    command_kill_seconds: float
    command_on_stop: str
    command_stop_seconds: int
    hook_attempts: int
    log_level: str
    log_format: str
    metrics_token: str = dataclasses.field(repr=False)
    admin_password: str = dataclasses.field(repr=False)


def _secret_file(path: Path, make: bytes) -> str:
    """The content of a file that only its owner may read; made when it is not there yet."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    except FileExistsError:
        return path.read_text().strip()
    with os.fdopen(handle, "wb") as file:
        file.write(make + b"\n")
    return make.decode()


def _origin(name: str, value: str) -> str:
    parts = _url(name, value)
    if parts.path.strip("/"):
        raise WrongSetting(name, f"{value!r} is not an origin such as https://app.example.com")
    return f"{parts.scheme}://{parts.netloc}"


def _url(name: str, value: str) -> SplitResult:
    """An http(s) URL of a plain host, perhaps a port and a path: links and headers are built on it."""
    wrong = WrongSetting(name, f"{value!r} is not an address such as https://switchboard.example.com")
    try:
        parts = urlsplit(value)
        port_fits = parts.port is None or parts.port > 0
    except ValueError:
        raise wrong from None
    plain = _NETLOC.fullmatch(parts.netloc) and not parts.query and not parts.fragment
    if parts.scheme not in ("http", "https") or not plain or not port_fits:
        raise wrong
    return parts


def _names(env: Env, name: str) -> list[str]:
    """A comma separated list without its empty items."""
    values: list[str] = env.list(name, [])
    return [value.strip() for value in values if value.strip()]


def _origins(env: Env, name: str) -> list[str]:
    return [_origin(name, value) for value in _names(env, name)]


def _is_redis(value: str) -> bool:
    try:
        parts = urlsplit(value)
        port_fits = parts.port is None or parts.port > 0
    except ValueError:
        return False
    if parts.scheme == "unix":
        named = bool(parts.path)
    else:
        # redis-py takes what is no number after the "/" for database 0, and -1 as it is.
        number = re.fullmatch(r"(/\d*)?", parts.path, re.ASCII)
        named = parts.scheme in ("redis", "rediss") and bool(parts.hostname) and port_fits and bool(number)
    return named and _fits_clients(value)


def _fits_clients(redis_url: str) -> bool:
    """Whether the clients can be made, with all that the address says after its "?". Nothing is connected."""
    try:
        for pool in (
            redis.ConnectionPool.from_url(redis_url),
            redis.asyncio.ConnectionPool.from_url(redis_url),
        ):
            pool.connection_class(**pool.connection_kwargs)
    except (TypeError, ValueError, redis.RedisError):
        return False
    return True


def _check_parameters(database: dict[str, object]) -> None:
    """What ``DATABASE_URL`` says after its "?", before the first connection would fail on it."""
    parameters = database.get("OPTIONS")
    if not parameters:
        return
    assert isinstance(parameters, dict)
    if "sqlite" in str(database["ENGINE"]):
        raise WrongSetting("DATABASE_URL", "SQLite takes no parameters here")
    try:
        timeout_from_conninfo(conninfo_to_dict(make_conninfo("", **parameters)))
    except psycopg.Error as error:
        raise WrongSetting(
            "DATABASE_URL", f"its parameters do not fit libpq: {str(error).strip()}"
        ) from error


def _directories(env: Env, data_dir: Path) -> list[str]:
    """Where commands may run: absolute paths. Without any, a folder of its own beside the data."""
    named = _names(env, "COMMAND_DIRECTORIES")
    for path in named:
        if not os.path.isabs(path):
            raise WrongSetting("COMMAND_DIRECTORIES", f"{path!r} is not an absolute path")
    if named:
        return [os.path.normpath(path) for path in named]
    work = data_dir / "work"
    work.mkdir(exist_ok=True, mode=0o700)
    return [str(work)]


_TEMPLATE_KEYS = {"argv", "cwd", "title", "timeout_seconds", "arguments"}


def _templates(path: str) -> dict[str, dict[str, Any]]:
    """The commands that the file names, each as ``{"argv", "cwd", "title", "timeout_seconds", "arguments"}``. TOML: a table a command."""
    if not path:
        return {}

    def wrong(why: str) -> WrongSetting:
        return WrongSetting("COMMAND_TEMPLATES", f"{path}: {why}")

    try:
        tables = tomllib.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise wrong(str(error)) from error
    found = {}
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise wrong(f"{name} is not a table such as [{name}]")
        unknown = sorted(set(table) - _TEMPLATE_KEYS)
        if unknown:
            raise wrong(f"[{name}] has an unknown key {unknown[0]!r}")
        argv = table.get("argv")
        if not (
            isinstance(argv, list)
            and argv
            and all(isinstance(part, str) and "\0" not in part for part in argv)
        ):
            raise wrong(f"[{name}] argv must be a list of strings, the program first")
        cwd = table.get("cwd", "")
        if not isinstance(cwd, str) or (cwd and not os.path.isabs(cwd)):
            raise wrong(f"[{name}] cwd must be an absolute path")
        seconds = table.get("timeout_seconds", 0)
        if not isinstance(seconds, int) or isinstance(seconds, bool) or seconds < 0:
            raise wrong(f"[{name}] timeout_seconds must be a whole number")
        arguments, title = table.get("arguments", False), table.get("title", "")
        if not isinstance(arguments, bool) or not isinstance(title, str):
            raise wrong(f"[{name}] arguments is true or false, title a text")
        found[name] = {
            "argv": argv, "cwd": cwd, "title": title, "timeout_seconds": seconds, "arguments": arguments,
        }  # fmt: skip
    return found


def _between(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise WrongSetting(name, f"{value:g} is not between {low:g} and {high:g}")


def read(environ: dict[str, str] | None = None) -> Knobs:
    """Read the environment (or ``environ``).

    :raises WrongSetting: for the first knob with a value that cannot work.
    """
    saved = None
    if environ is not None:
        saved = dict(os.environ)
        os.environ.clear()
        os.environ.update(environ)
    try:
        return _read(Env())
    except EnvError as error:
        name = str(error).split('"')[1] if '"' in str(error) else "environment"
        raise WrongSetting(name, str(error)) from error
    finally:
        if saved is not None:
            os.environ.clear()
            os.environ.update(saved)


def _read(env: Env) -> Knobs:
    debug = env.bool("DEBUG", False)
    host = env.str("HOST", "") or "127.0.0.1"
    if not _HOST.fullmatch(host):
        raise WrongSetting("HOST", f"{host!r} is not a host name or an address")
    port = env.int("PORT", 8000)
    _between("PORT", port, 1, 65535)
    data_dir = Path(env.str("DATA_DIR", "") or BASE_DIR / "var").expanduser().absolute()
    try:
        data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise WrongSetting("DATA_DIR", f"{data_dir} cannot be made: {error.strerror}") from error
    if not os.access(data_dir, os.W_OK | os.X_OK):
        raise WrongSetting("DATA_DIR", f"{data_dir} cannot be written to")

    database_url = env.str("DATABASE_URL", "") or f"sqlite:///{data_dir / 'switchboard.sqlite3'}"
    try:
        database = dict(dj_database_url.parse(database_url))
    except (ValueError, KeyError) as error:
        raise WrongSetting(
            "DATABASE_URL", "use postgres://user:password@host/name or sqlite:///path"
        ) from error
    if "sqlite" not in str(database["ENGINE"]) and "postgresql" not in str(database["ENGINE"]):
        raise WrongSetting("DATABASE_URL", "only PostgreSQL and SQLite are supported")

    if not database.get("NAME"):
        raise WrongSetting("DATABASE_URL", "it names no database: use postgres://user:password@host/name")
    _check_parameters(database)

    redis_url = env.str("REDIS_URL", "")
    if redis_url and not _is_redis(redis_url):
        raise WrongSetting("REDIS_URL", "use redis://host:port/0")

    shown_host = f"[{host}]" if ":" in host else host
    base_url = env.str("BASE_URL", "").rstrip("/") or f"http://{shown_host}:{port}"
    _url("BASE_URL", base_url)
    allowed_hosts = _names(env, "ALLOWED_HOSTS")
    if not allowed_hosts:
        named = urlsplit(base_url).hostname or host
        allowed_hosts = sorted(
            {"localhost", "127.0.0.1", "[::1]", host, f"[{named}]" if ":" in named else named}
        )
    trusted_proxies = _names(env, "TRUSTED_PROXIES")
    for proxy in trusted_proxies:
        try:
            ipaddress.ip_network(proxy)
        except ValueError as error:
            raise WrongSetting("TRUSTED_PROXIES", f"{proxy!r} is not an address or network") from error

    encryption_keys = _names(env, "ENCRYPTION_KEYS")
    if not encryption_keys:
        encryption_keys = _secret_file(data_dir / "encryption.key", Fernet.generate_key()).split()
    for key in encryption_keys:
        try:
            Fernet(key)
        except ValueError as error:
            raise WrongSetting(
                "ENCRYPTION_KEYS", "each must be a Fernet key (32 bytes, url-safe base64)"
            ) from error
    secret_key = env.str("SECRET_KEY", "") or _secret_file(
        data_dir / "secret.key", secrets.token_urlsafe(50).encode()
    )
    if len(secret_key) < 32:
        raise WrongSetting("SECRET_KEY", "must have at least 32 characters")

    knobs = Knobs(
        debug=debug,
        host=host,
        port=port,
        data_dir=data_dir,
        base_url=base_url,
        allowed_hosts=allowed_hosts,
        trusted_proxies=trusted_proxies,
        database=database,
        database_pool_size=env.int("DATABASE_POOL_SIZE", 20),
        redis_url=redis_url,
        cors_origins=_origins(env, "CORS_ORIGINS"),
        return_urls=_origins(env, "RETURN_URLS"),
        frame_ancestors=_origins(env, "FRAME_ANCESTORS"),
        allow_private_targets=env.bool("ALLOW_PRIVATE_TARGETS", False),
        secret_key=secret_key,
        encryption_keys=encryption_keys,
        flow_seconds=env.int("FLOW_SECONDS", 1200),
        input_seconds=env.int("INPUT_SECONDS", 600),
        lease_seconds=env.int("LEASE_SECONDS", 30),
        task_attempts=env.int("TASK_ATTEMPTS", 3),
        stream_max_seconds=env.int("STREAM_MAX_SECONDS", 3600),
        stream_limit=env.int("STREAM_LIMIT", 20),
        stream_process_limit=env.int("STREAM_PROCESS_LIMIT", 10_000),
        heartbeat_seconds=env.int("HEARTBEAT_SECONDS", 15),
        client_grace_seconds=env.int("CLIENT_GRACE_SECONDS", 60),
        client_suspended_seconds=env.int("CLIENT_SUSPENDED_SECONDS", 120),
        client_lease_seconds=env.int("CLIENT_LEASE_SECONDS", 30),
        poll_seconds=env.float("POLL_SECONDS", 0.25 if redis_url else 0.05),
        event_retention_days=env.int("EVENT_RETENTION_DAYS", 30),
        task_retention_days=env.int("TASK_RETENTION_DAYS", 90),
        max_body_bytes=env.int("MAX_BODY_BYTES", 2_097_152),
        connection_quota=env.int("CONNECTION_QUOTA", 1000),
        commands=env.str("COMMANDS", "").lower() or "off",
        command_templates=_templates(env.str("COMMAND_TEMPLATES", "")),
        command_directories=_directories(env, data_dir),
        command_env=_names(env, "COMMAND_ENV") or ["PATH", "HOME", "LANG", "LC_ALL", "TZ", "USER", "LOGNAME"],
        command_limit=env.int("COMMAND_LIMIT", 100),
        command_concurrency=env.int("COMMAND_CONCURRENCY", 20),
        command_seconds=env.int("COMMAND_SECONDS", 3600),
        command_output_bytes=env.int("COMMAND_OUTPUT_BYTES", 64 * 1024 * 1024),
        command_quiet_seconds=env.float("COMMAND_QUIET_SECONDS", 1.0),
        command_kill_seconds=env.float("COMMAND_KILL_SECONDS", 5.0),
        command_on_stop=env.str("COMMAND_ON_STOP", "").lower() or "finish",
        command_stop_seconds=env.int("COMMAND_STOP_SECONDS", 60),
        hook_attempts=env.int("HOOK_ATTEMPTS", 8),
        log_level=env.str("LOG_LEVEL", "INFO").upper(),
        log_format=env.str("LOG_FORMAT", "").lower() or "text",
        metrics_token=env.str("METRICS_TOKEN", ""),
        admin_password=env.str("ADMIN_PASSWORD", ""),
    )
    # Three at least: the hub keeps one, and a verb and a look at the log must not wait for each other.
    _between("DATABASE_POOL_SIZE", knobs.database_pool_size, 3, 1000)
    _between("FLOW_SECONDS", knobs.flow_seconds, 1, 86_400)
    _between("INPUT_SECONDS", knobs.input_seconds, 1, 86_400)
    _between("LEASE_SECONDS", knobs.lease_seconds, 1, 3600)
    _between("TASK_ATTEMPTS", knobs.task_attempts, 1, 100)
    _between("STREAM_MAX_SECONDS", knobs.stream_max_seconds, 1, 86_400)
    _between("STREAM_LIMIT", knobs.stream_limit, 1, 100_000)
    _between("STREAM_PROCESS_LIMIT", knobs.stream_process_limit, 1, 1_000_000)
    _between("HEARTBEAT_SECONDS", knobs.heartbeat_seconds, 1, 15)
    _between("CLIENT_GRACE_SECONDS", knobs.client_grace_seconds, 1, 86_400)
    _between("CLIENT_SUSPENDED_SECONDS", knobs.client_suspended_seconds, 1, 86_400)
    _between("CLIENT_LEASE_SECONDS", knobs.client_lease_seconds, 1, 600)
    _between("POLL_SECONDS", knobs.poll_seconds, 0.01, 1)
    _between("EVENT_RETENTION_DAYS", knobs.event_retention_days, 1, 3650)
    _between("TASK_RETENTION_DAYS", knobs.task_retention_days, 0, 36500)
    _between("MAX_BODY_BYTES", knobs.max_body_bytes, 1024, 100_000_000)
    _between("CONNECTION_QUOTA", knobs.connection_quota, 1, 10_000_000)
    if knobs.commands not in ("off", "templates", "any"):
        raise WrongSetting("COMMANDS", f"{knobs.commands!r} is not off, templates or any")
    if knobs.commands == "templates" and not knobs.command_templates:
        raise WrongSetting("COMMAND_TEMPLATES", "COMMANDS=templates needs a file that names some")
    if knobs.command_on_stop not in ("finish", "handover", "interrupt"):
        raise WrongSetting(
            "COMMAND_ON_STOP", f"{knobs.command_on_stop!r} is not finish, handover or interrupt"
        )
    _between("COMMAND_LIMIT", knobs.command_limit, 0, 1_000_000)
    _between("COMMAND_CONCURRENCY", knobs.command_concurrency, 0, 10_000)
    _between("COMMAND_SECONDS", knobs.command_seconds, 1, 30 * 86_400)
    _between("COMMAND_OUTPUT_BYTES", knobs.command_output_bytes, 1024, 1 << 40)
    _between("COMMAND_QUIET_SECONDS", knobs.command_quiet_seconds, 0.1, 3600)
    _between("COMMAND_KILL_SECONDS", knobs.command_kill_seconds, 0, 600)
    _between("COMMAND_STOP_SECONDS", knobs.command_stop_seconds, 0, 86_400)
    _between("HOOK_ATTEMPTS", knobs.hook_attempts, 1, 100)
    if knobs.log_level not in ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"):
        raise WrongSetting("LOG_LEVEL", f"{knobs.log_level!r} is not DEBUG, INFO, WARNING, ERROR or CRITICAL")
    if knobs.log_format not in ("text", "json"):
        raise WrongSetting("LOG_FORMAT", f"{knobs.log_format!r} is not text or json")
    if knobs.metrics_token and not _TOKEN.fullmatch(knobs.metrics_token):
        raise WrongSetting("METRICS_TOKEN", "must have at least 16 characters, ASCII without spaces")
    return knobs
