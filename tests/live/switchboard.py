"""A program that uses a running Switchboard over HTTP, as the live tests of worker and secrets need it."""

from __future__ import annotations

import dataclasses
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import httpx

from tests.conftest import Running, until


@dataclasses.dataclass
class Program:
    http: httpx.Client
    running: Running

    def post(self, path: str, body: Any = None, status: int = 200) -> Any:
        answer = self.http.post(path, json={} if body is None else body)
        assert answer.status_code == status, answer.text
        return answer.json() if answer.content else None

    def get(self, path: str) -> Any:
        answer = self.http.get(path)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def connect(self, domain: str, profile: str, **config: Any) -> str:
        body = {"domain": domain, "profile_name": profile, **config}
        return str(self.post("/auth/connections", body, 201)["id"])

    def login(self, connection_id: str) -> Any:
        return self.post(f"/auth/connections/{connection_id}/login")

    def submit(self, connection_id: str, values: dict[str, str]) -> None:
        """Answer the open question by the names of its fields."""
        shown = self.state(connection_id)
        given = {field["id"]: values[field["ref"]] for field in shown["fields"]}
        body = {"interaction_id": shown["interaction_id"], "field_values": given}
        self.post(f"/auth/connections/{connection_id}/submit", body, 202)

    def state(self, connection_id: str) -> Any:
        return self.get(f"/auth/connections/{connection_id}")

    def wait(
        self,
        connection_id: str,
        *,
        step: str = "",
        status: str = "",
        other_than: Any = None,
        seconds: float = 30,
    ) -> Any:
        """Until the flow is in this step (with another interaction than ``other_than``), or has this status."""
        last: list[Any] = []

        def look() -> Any:
            shown = self.state(connection_id)
            last[:] = [shown["flow_status"], shown["flow_step"], shown["error_code"], shown["error_message"]]
            fits = shown["flow_step"] == step if step else shown["flow_status"] == status
            return (
                shown
                if fits and (not step or shown["interaction_id"] != other_than or not other_than)
                else None
            )

        try:
            return until(look, seconds)
        except AssertionError:
            raise AssertionError(f"no {step or status}: {last}") from None

    def rows(self, query: str, *words: Any) -> list[Any]:
        """Look into the database itself."""
        with closing(
            sqlite3.connect(f"file:{self.running.data_dir}/switchboard.sqlite3?mode=ro", uri=True)
        ) as file:
            return file.execute(query, words).fetchall()


@contextmanager
def program(running: Running) -> Iterator[Program]:
    headers = {"Authorization": f"Bearer {running.api_key}"}
    with httpx.Client(base_url=running.url, headers=headers, timeout=20) as http:
        yield Program(http, running)
