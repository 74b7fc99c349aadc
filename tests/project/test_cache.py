"""The counters of the rate limits go on counting while Redis is away."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from project import cache
from tests.live import services


@pytest.fixture
def redis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[services.Redis]:
    monkeypatch.setattr(cache, "state", cache._State())
    with services.redis(tmp_path) as started:
        yield started
        # What was counted in the process is the process's.
        made(started)._own.clear()


def made(redis: services.Redis) -> cache.SharedCounters:
    return cache.SharedCounters(redis.url, {})


def test_counters_are_shared_through_redis(redis: services.Redis) -> None:
    one, other = made(redis), made(redis)
    assert one.add("n", 0, timeout=60)
    assert not other.add("n", 0, timeout=60)
    assert (one.incr("n"), other.incr("n"), one.get("n")) == (1, 2, 2)
    assert other.delete("n")
    with pytest.raises(ValueError):
        one.incr("n")


@pytest.mark.parametrize("fault", ["kill", "pause"])
def test_while_redis_is_away_they_count_in_the_process_and_it_is_left_alone(
    redis: services.Redis, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    counters = made(redis)
    getattr(redis, fault)()
    assert counters.get("n", 0) == 0
    asked: list[object] = []
    monkeypatch.setattr(counters._shared, "incr", asked.append)
    counters.set("n", 1)
    assert (counters.incr("n"), counters.incr("n")) == (2, 3)
    assert asked == []


def test_when_redis_is_back_they_are_shared_again(
    redis: services.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "PAUSE_SECONDS", 0.0)
    counters, other = made(redis), made(redis)
    redis.kill()
    counters.set("n", 7)
    redis.start()
    counters.set("n", 9)
    assert other.get("n") == 9
