"""The knobs: each has a default that works, a wrong value ends the start with its name, and the README lists them all."""

from __future__ import annotations

import re
import stat
from pathlib import Path

import pytest

from project import env

ROOT = Path(__file__).resolve().parents[2]


def read(tmp_path: Path, **values: str) -> env.Knobs:
    return env.read({"DATA_DIR": str(tmp_path / "var"), **values})


def names_in_code() -> set[str]:
    """The knobs that project/env.py reads."""
    code = (ROOT / "project/env.py").read_text(encoding="utf-8")
    return set(
        re.findall(r'(?:env\.(?:str|int|float|bool|list)\(|_(?:origins|names)\(env,)\s*"([A-Z_]+)"', code)
    )


def table_of_readme() -> dict[str, str]:
    """Name and default, from the rows ``| `NAME` | default | … |`` under "Settings"."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.split("## Settings", 1)[1].split("\n## ", 1)[0]
    return dict(re.findall(r"^\| `([A-Z_]+)` \| ([^|]*) \|", section, re.MULTILINE))


def test_the_table_of_the_readme_lists_exactly_the_knobs_of_the_code() -> None:
    assert set(table_of_readme()) == names_in_code()


def test_the_defaults_in_the_readme_are_those_of_the_code(tmp_path: Path) -> None:
    knobs = read(tmp_path)
    for name, text in table_of_readme().items():
        shown = text.strip().strip("`")
        if not re.fullmatch(r"[\d.]+|on|off|[A-Z]+|127\.0\.0\.1", shown):
            continue
        value = getattr(knobs, name.lower())
        if isinstance(value, bool):
            value = "on" if value else "off"
        assert str(value) == shown, name


def test_nobody_else_reads_the_environment() -> None:
    """One place for the knobs, so that one table can list them."""
    readers = [
        str(path.relative_to(ROOT))
        for room in ("project", "connections", "events")
        for path in (ROOT / room).rglob("*.py")
        if re.search(r"os\.getenv|os\.environ(?:\.get\(|\[)", path.read_text(encoding="utf-8"))
    ]
    # run.py shows how to call manage.py with what was set for this start, and honours NO_COLOR. command.py hands on what COMMAND_ENV names,
    # and keeper.py, a program without Django, makes that the environment of a command.
    known = (
        "project/env.py",
        "project/run.py",
        "connections/runners/command.py",
        "connections/runners/keeper.py",
    )
    assert [name for name in readers if name not in known] == []


def test_an_empty_environment_is_enough(tmp_path: Path) -> None:
    knobs = read(tmp_path)
    assert (knobs.host, knobs.port, knobs.base_url) == ("127.0.0.1", 8000, "http://127.0.0.1:8000")
    assert knobs.debug is False
    assert knobs.allow_private_targets is False
    assert "sqlite" in str(knobs.database["ENGINE"])


def test_the_generated_keys_are_private_and_stay_the_same(tmp_path: Path) -> None:
    first = read(tmp_path)
    again = read(tmp_path)
    assert (again.secret_key, again.encryption_keys) == (first.secret_key, first.encryption_keys)
    for name in ("secret.key", "encryption.key"):
        assert stat.S_IMODE((tmp_path / "var" / name).stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "var").stat().st_mode) == 0o700


def test_two_installations_have_different_keys(tmp_path: Path) -> None:
    assert read(tmp_path / "a").secret_key != read(tmp_path / "b").secret_key


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PORT", "abc"),
        ("PORT", "0"),
        ("PORT", "65536"),
        ("DEBUG", "maybe"),
        ("DATABASE_URL", "mysql://u:p@h/d"),
        ("DATABASE_URL", "nonsense"),
        ("REDIS_URL", "http://127.0.0.1"),
        ("BASE_URL", "switchboard.example.com"),
        ("CORS_ORIGINS", "app.example.com"),
        ("CORS_ORIGINS", "https://app.example.com/path"),
        ("RETURN_URLS", "*"),
        ("TRUSTED_PROXIES", "proxy.internal"),
        ("ALLOW_PRIVATE_TARGETS", "sometimes"),
        ("ENCRYPTION_KEYS", "short"),
        ("SECRET_KEY", "short"),
        ("FLOW_SECONDS", "0"),
        ("DATABASE_POOL_SIZE", "0"),
        ("HEARTBEAT_SECONDS", "16"),
        ("POLL_SECONDS", "2"),
        ("LOG_LEVEL", "LOUD"),
        ("HOST", "not a host"),
        ("RETURN_URLS", "https://a.example:99999"),
        ("RETURN_URLS", "https://a.example?x=1"),
        ("FRAME_ANCESTORS", "https://a.example;x"),
        ("BASE_URL", "http://host:abc"),
        ("BASE_URL", "https://switchboard.example.com/y?z"),
        ("BASE_URL", "https://user@switchboard.example.com"),
        ("DATABASE_URL", "postgres://"),
        ("REDIS_URL", "redis://h:abc"),
        ("REDIS_URL", "redis://"),
        ("REDIS_URL", "redis://h:6379/0?bogus=1"),
        ("REDIS_URL", "redis://h:6379/0?socket_timeout=soon"),
        ("REDIS_URL", "redis://h:6379/abc"),
        ("REDIS_URL", "redis://h:6379/-1"),
        ("REDIS_URL", "redis://h:6379/1/2"),
        ("REDIS_URL", "unix:///run/redis.sock?bogus=1"),
        ("REDIS_URL", "rediss://h?ssl_cert_reqs=bogus"),
        ("DATABASE_URL", "postgres://u@h/n?bogus=1"),
        ("DATABASE_URL", "postgres://u@h/n?pool=1"),
        ("DATABASE_URL", "postgres://u@h/n?connect_timeout=soon"),
        ("DATABASE_URL", "sqlite:////x.sqlite3?bogus=1"),
    ],
)
def test_a_wrong_value_ends_the_start_with_the_name_of_the_knob(
    tmp_path: Path, name: str, value: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        read(tmp_path, **{name: value})
    assert str(ended.value).startswith(f"switchboard: {name}: ")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("REDIS_URL", "redis://h"),
        ("REDIS_URL", "redis://:word@h:6380/"),
        ("REDIS_URL", "redis://h/3?health_check_interval=5&socket_keepalive=true"),
        ("REDIS_URL", "rediss://h:6379/0?ssl_cert_reqs=none"),
        ("REDIS_URL", "unix:///run/redis.sock?db=2"),
        ("DATABASE_URL", "postgres://u:p@h:5433/n?sslmode=require&connect_timeout=3&keepalives=1"),
        ("DATABASE_URL", "postgres://u@h/n?options=-c%20work_mem%3D8MB"),
        ("DATABASE_URL", "postgres://%2Frun%2Fpostgresql/n"),
        ("DATABASE_URL", "sqlite:////x.sqlite3"),
    ],
)
def test_an_address_with_what_its_client_knows_is_taken(tmp_path: Path, name: str, value: str) -> None:
    knobs = read(tmp_path, **{name: value})
    assert knobs.database["NAME"]
    assert knobs.redis_url == (value if name == "REDIS_URL" else "")


def test_an_empty_value_is_the_default_and_never_all_interfaces(tmp_path: Path) -> None:
    knobs = read(tmp_path, HOST="", ALLOWED_HOSTS=",")
    assert knobs.host == "127.0.0.1"
    assert "" not in knobs.allowed_hosts


def test_an_empty_data_dir_is_the_default_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(env, "BASE_DIR", tmp_path)
    assert env.read({"DATA_DIR": ""}).data_dir == tmp_path / "var"


def test_a_data_dir_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="DATA_DIR"):
        env.read({"DATA_DIR": str(tmp_path / "file" / "var")})


def test_a48_what_is_secret_is_not_in_the_representation_of_the_knobs(tmp_path: Path) -> None:
    knobs = read(tmp_path, ADMIN_PASSWORD="hunter2", DATABASE_URL="postgres://u:hunter2@h/d")
    for secret in ("hunter2", knobs.secret_key, knobs.encryption_keys[0]):
        assert secret not in repr(knobs)


def test_reading_leaves_the_environment_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PORT", "9999")
    assert read(tmp_path, PORT="8123").port == 8123
    assert env.read().port == 9999
