"""A program that runs commands on a running Switchboard, and what is left of them on this machine."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from tests.conftest import Running, run_switchboard, until

#: Quick: what waits is known to wait after a quarter of a second; what does not want to end is killed after one.
QUICK = {
    "COMMANDS": "any",
    "COMMAND_QUIET_SECONDS": "0.25",
    "COMMAND_KILL_SECONDS": "1",
    "STREAM_LIMIT": "100",
}
END = ("completed", "failed", "killed")


@dataclasses.dataclass
class Commands:
    http: httpx.Client
    running: Running

    @property
    def folder(self) -> Path:
        """Where commands run without another wish."""
        return self.running.data_dir / "work"

    def run(self, *argv: str, **more: Any) -> str:
        """Queue a command; its id."""
        answer = self.http.post("/api/tasks", json={"kind": "command", "argv": list(argv), **more})
        assert answer.status_code == 201, answer.text
        return str(answer.json()["id"])

    def show(self, task: str) -> Any:
        answer = self.http.get(f"/api/tasks/{task}")
        assert answer.status_code == 200, answer.text
        return answer.json()

    def wait(self, task: str, *statuses: str, seconds: float = 60, **fields: Any) -> Any:
        """Until the task has one of these statuses (by default: an end), and these fields."""
        wanted = statuses or END
        last: Any = None

        def look() -> Any:
            nonlocal last
            last = self.show(task)
            fits = last["status"] in wanted and all(last[name] == value for name, value in fields.items())
            return last if fits else None

        try:
            return until(look, seconds)
        except AssertionError:
            raise AssertionError(f"not {wanted} {fields}: {last}\n{self.output(task)[-2000:]!r}") from None

    def prompted(self, task: str, text: str, seconds: float = 60) -> Any:
        """Until it waits for input, and what it shows last has this text in it: the prompt."""

        def look() -> Any:
            shown = self.show(task)
            prompt = shown["prompt"]
            return prompt if shown["status"] == "waiting_for_input" and text in prompt["text"] else None

        try:
            return until(look, seconds)
        except AssertionError:
            shown = self.show(task)
            raise AssertionError(
                f"it does not ask {text!r}: {shown['status']} {shown['prompt']}\n{self.output(task)[-2000:]!r}"
            ) from None

    def type(self, task: str, text: str | None = None, status: int = 202, **more: Any) -> Any:
        body = more if text is None else {"text": text, **more}
        answer = self.http.post(f"/api/tasks/{task}/input", json=body)
        assert answer.status_code == status, answer.text
        return answer.json()

    def kill(self, task: str, reason: str = "") -> int:
        return self.http.post(f"/api/tasks/{task}/kill", json={"reason": reason}).status_code

    def output(self, task: str) -> bytes:
        found = bytearray()
        while True:
            answer = self.http.get(f"/api/tasks/{task}/output", params={"from": len(found)})
            assert answer.status_code == 200, answer.text
            found += answer.content
            if len(found) >= int(answer.headers["X-Output-Size"]):
                return bytes(found)

    def says(self, task: str, text: bytes, seconds: float = 60) -> None:
        """Until the output has this in it."""
        try:
            until(lambda: text in self.output(task), seconds)
        except AssertionError:
            raise AssertionError(f"no {text!r} in {self.output(task)[-2000:]!r}") from None

    def statuses(self, task: str) -> list[str]:
        """What was told of the task's status, in order."""
        # A copy of the database would do as well: the log is the one thing that says what was told.
        events: list[str] = []
        printed = self.running.shell(
            "import sys\nfrom events.models import Event\n"
            f"for row in Event.objects.filter(name='task.status', object_id={task!r}).order_by('id'):\n"
            "    print('STATUS', row.data['status'])\n",
        )
        for line in printed.splitlines():
            if line.startswith("STATUS "):
                events.append(line.removeprefix("STATUS "))
        return events


@contextlib.contextmanager
def client(running: Running) -> Iterator[Commands]:
    headers = {"Authorization": f"Bearer {running.api_key}"}
    with httpx.Client(base_url=running.url, headers=headers, timeout=60) as http:
        yield Commands(http, running)


@contextlib.contextmanager
def installation(data_dir: Path, **extra: str) -> Iterator[Commands]:
    with run_switchboard(data_dir, **{**QUICK, **extra}) as running, client(running) as made:
        yield made


def processes(mark: str) -> dict[int, str]:
    """Processes of this machine that have this word in their environment or arguments, with their arguments."""
    found = {}
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) == os.getpid():
            continue
        try:
            arguments = Path(f"/proc/{name}/cmdline").read_bytes()
            environment = Path(f"/proc/{name}/environ").read_bytes()
            state = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if mark.encode() in arguments + environment or (state == "Z" and mark == "zombie"):
            found[int(name)] = arguments.replace(b"\0", b" ").decode(errors="replace")
    return found


def children(pid: int) -> dict[int, str]:
    """The processes below this one, with their states: ``R``, ``S``, ``Z`` ..."""
    parents: dict[int, tuple[int, str]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()
                parents[int(name)] = (int(words[1]), words[0])
    found: dict[int, str] = {}
    look = [pid]
    while look:
        above = look.pop()
        for child, (parent, state) in parents.items():
            if parent == above and child not in found:
                found[child] = state
                look.append(child)
    return found
