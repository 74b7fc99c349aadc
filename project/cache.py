"""The counters of the rate limits: shared through Redis while it answers, of this process alone while it does not.

Without this a Redis that is down would turn every sign-in into an error, and one that is silent would hold each for a second.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from django.core.cache.backends.base import BaseCache
from django.core.cache.backends.locmem import LocMemCache
from django.core.cache.backends.redis import RedisCache
from redis.exceptions import RedisError

logger = logging.getLogger(__name__)
T = TypeVar("T")

#: After a failure Redis is left alone for so long.
PAUSE_SECONDS = 5.0
#: How long one question may take.
ANSWER_SECONDS = 1.0


class _State:
    """Of this process: whether Redis is left alone. Django makes one cache object per thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._until = 0.0
        self._healthy = True

    def resting(self) -> bool:
        return time.monotonic() < self._until

    def failed(self, error: Exception) -> None:
        with self._lock:
            self._until = time.monotonic() + PAUSE_SECONDS
            if self._healthy:
                logger.warning(
                    "Redis does not answer (%r); rate limits count per process until it does", error
                )
            self._healthy = False

    def worked(self) -> None:
        if not self._healthy:
            with self._lock:
                self._healthy = True
            logger.info("Redis answers again; rate limits are shared")


state = _State()


class SharedCounters(BaseCache):
    """Redis, or memory while Redis does not answer. Values are small and may be forgotten: it is a cache."""

    def __init__(self, location: str, params: dict[str, Any]) -> None:
        super().__init__(params)
        limits = {"socket_connect_timeout": ANSWER_SECONDS, "socket_timeout": ANSWER_SECONDS}
        self._shared = RedisCache(location, {**params, "OPTIONS": limits})
        self._own = LocMemCache("while Redis is away", params)

    def _ask(self, question: Callable[[BaseCache], T]) -> T:
        if not state.resting():
            try:
                answer = question(self._shared)
            except (RedisError, OSError) as error:
                state.failed(error)
            else:
                state.worked()
                return answer
        return question(self._own)

    def add(self, key: Any, value: Any, *rest: Any, **named: Any) -> bool:
        return self._ask(lambda cache: cache.add(key, value, *rest, **named))

    def get(self, key: Any, *rest: Any, **named: Any) -> Any:
        return self._ask(lambda cache: cache.get(key, *rest, **named))

    def set(self, key: Any, value: Any, *rest: Any, **named: Any) -> None:
        self._ask(lambda cache: cache.set(key, value, *rest, **named))

    def incr(self, key: Any, *rest: Any, **named: Any) -> int:
        return self._ask(lambda cache: cache.incr(key, *rest, **named))

    def touch(self, key: Any, *rest: Any, **named: Any) -> bool:
        return self._ask(lambda cache: cache.touch(key, *rest, **named))

    def delete(self, key: Any, *rest: Any, **named: Any) -> bool:
        return self._ask(lambda cache: cache.delete(key, *rest, **named))

    def clear(self) -> None:
        self._own.clear()
        self._ask(lambda cache: cache.clear())

    def close(self, **named: Any) -> None:
        self._shared.close(**named)
