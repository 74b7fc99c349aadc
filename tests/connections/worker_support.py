"""A driver that does as the test says, and a way to look at the database from an event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from channels.db import database_sync_to_async
from django.utils import timezone

from connections.drivers.base import Field, Person, Question, Success, Target
from tests.connections.flow_support import STATE, Story

T = TypeVar("T")

USER = Field(id="f1", ref="username", type="identifier", label="User name")
SECRET = Field(id="f2", ref="password", type="password", label="Password")
QUESTION = Question(fields=(USER, SECRET))
SUCCESS = Success(storage_state=STATE, post_login_url="https://example.com/home")

Script = Callable[[Target, Person], Awaitable[Success]]


class Scripted:
    """``script`` is the login, ``seen`` the result of a check (or what it raises)."""

    def __init__(self, script: Script | None = None, *, seen: bool | Exception | None = None) -> None:
        self.script = script
        self.seen = seen
        self.targets: list[Target] = []
        self.canceled = 0

    async def login(self, target: Target, person: Person) -> Success:
        self.targets.append(target)
        assert self.script is not None
        try:
            return await self.script(target, person)
        except asyncio.CancelledError:
            self.canceled += 1
            raise

    async def check(self, target: Target) -> bool | None:
        self.targets.append(target)
        if isinstance(self.seen, Exception):
            raise self.seen
        return self.seen


async def ask_once(target: Target, person: Person) -> Success:
    await person.ask(QUESTION)
    return SUCCESS


async def in_db(work: Callable[..., T], /, *words: Any, **arguments: Any) -> T:
    return await database_sync_to_async(work, thread_sensitive=False)(*words, **arguments)


async def until_db(condition: Callable[[], T], seconds: float = 15) -> T:
    """Wait for something in the database."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        value = await in_db(condition)
        if value:
            return value
        await asyncio.sleep(0.02)
    raise AssertionError("it did not happen in time")


def of_now(story: Story) -> Story:
    """A story in the present, as workers take their time from the clock."""
    story.now = timezone.now()
    return story
