"""``manage.py task``: run commands, watch tasks, type into them, end them."""

from __future__ import annotations

import argparse
import contextlib
import getpass
import os
import signal
import sys
import time
import uuid
from collections.abc import Iterator
from typing import Any

from django.conf import settings
from django.core.management.base import CommandError, CommandParser

from connections import hooks, inputs, outputs, payloads, task_api, task_inputs, tasks, transitions
from connections.errors import ApiError
from connections.management.commands import _shared
from connections.models import Task
from connections.outputs import Size
from connections.states import TaskKind, TaskStatus
from connections.terminal.keys import KEYS

#: Seconds that a command may wait for a worker before somebody should be told.
NO_WORKER_SECONDS = 3.0
#: What a shell answers for a program that Ctrl-C ended.
INTERRUPTED = 130

RUN = """
Run a command on the machine of a worker, in a terminal of its own there, and show what it writes until it ends. The exit code is the command's
(128 and the number of the signal, when one ended it). Everything after -- is the program and its arguments; no shell looks at them.

Ctrl-C asks whether to kill the command; once more, or where there is nobody to ask, kills it. Answering "n" leaves it running.
"""
INPUT = """
Type into a task. Without TEXT it is asked for, or read from standard input where that is no terminal. What a task asks for as a password is never
taken from the command line: other users of this machine could read it there.
"""
KILL = """
End a task. One in the queue is killed at once; the worker of one that runs sends SIGTERM to its whole process group, and SIGKILL after
COMMAND_KILL_SECONDS; a login is canceled. What has ended stays as it is.
"""
OUTPUT = """
Write to standard output what a task wrote, byte for byte, escape sequences and all. With --follow until the task has ended.
"""


class Command(_shared.SwitchboardCommand):
    help = "Run commands, and see, answer, end and read tasks of every kind. `manage.py task VERB --help` tells the options of each."

    def add_arguments(self, parser: CommandParser) -> None:
        verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True, help="what to do")

        run = verbs.add_parser("run", help="run a command and follow it", description=RUN)
        run.add_argument(
            "--cwd", metavar="DIRECTORY", help="where to run it (default: the first that is allowed)"
        )
        run.add_argument("--timeout", type=int, metavar="SECONDS", help="end it after so many seconds")
        run.add_argument(
            "--template",
            metavar="NAME",
            help="a command of COMMAND_TEMPLATES; the words after -- are added to it",
        )
        run.add_argument("--title", help="what lists show (default: the command)")
        run.add_argument("--label", action="append", default=[], help="a label (repeatable)")
        run.add_argument("--user", "--owner", metavar="NAME", help="the owner (default: the first superuser)")
        how = run.add_mutually_exclusive_group()
        how.add_argument(
            "--follow", action="store_true", help="show what it writes until it ends (the default)"
        )
        how.add_argument("--detach", action="store_true", help="print its id and leave")
        self._add_json(run, "print the task as JSON and leave, as with --detach")
        run.add_argument(
            "words", nargs=argparse.REMAINDER, metavar="-- CMD", help="the program and its arguments"
        )

        listing = verbs.add_parser(
            "list", help="the newest tasks", description="The newest tasks of everybody, the latest first."
        )
        listing.add_argument("--status", default="", help="only these: one, or several with commas")
        listing.add_argument("--kind", default="", help="only of this kind")
        listing.add_argument("--label", default="", help="only with this label")
        listing.add_argument("--limit", type=int, default=50, help="so many at most (default: 50)")
        self._add_json(listing)

        show = verbs.add_parser(
            "show",
            help="one task, with what was sent to it",
            description="A task, what it asks, and what was sent to it without the texts.",
        )
        self._add_id(show)
        self._add_json(show)

        typing = verbs.add_parser("input", help="type into a task", description=INPUT)
        self._add_id(typing)
        typing.add_argument("text", nargs="?", metavar="TEXT", help="what to type; - reads standard input")
        typing.add_argument(
            "--keys", metavar="KEY,KEY", help=f"press keys instead: {', '.join(sorted(KEYS))}"
        )
        typing.add_argument("--no-enter", action="store_true", help="without Enter behind the text")
        self._add_json(typing)

        kill = verbs.add_parser("kill", help="end a task", description=KILL)
        self._add_id(kill)
        kill.add_argument("--reason", default="", help="why, in words")
        self._add_json(kill)

        output = verbs.add_parser("output", help="what a task wrote, byte for byte", description=OUTPUT)
        self._add_id(output)
        output.add_argument("--follow", action="store_true", help="go on until it ends; Ctrl-C leaves")
        output.add_argument(
            "--from", dest="start", default="", metavar="OFFSET", help="an offset in bytes, start, or live"
        )
        output.add_argument("--tail", default="", metavar="BYTES", help="only so many bytes before the end")

        redeliver = verbs.add_parser(
            "redeliver",
            help="send the report of a task's end to its hook again",
            description="Send the report of a task's end to its hook again, now, under the same webhook-id.",
        )
        self._add_id(redeliver)
        self._add_json(redeliver)

    def _add_id(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("id", metavar="ID", help="the task (task_…)")

    def _add_json(self, parser: argparse.ArgumentParser, text: str = "print JSON instead of text") -> None:
        parser.add_argument("--json", action="store_true", help=text)

    def handle(self, *args: Any, **options: Any) -> None:
        verb = {
            "run": self._run,
            "list": self._list,
            "show": self._show,
            "input": self._input,
            "kill": self._kill,
            "output": self._output,
            "redeliver": self._redeliver,
        }[options["verb"]]
        with _shared.said_plainly():
            verb(options)

    # ── run ──

    def _run(self, options: dict[str, Any]) -> None:
        words = options["words"][1:] if options["words"][:1] == ["--"] else options["words"]
        owner = _shared.owner(options["user"])
        given = {
            "argv": words or None,
            "template": options["template"],
            "cwd": options["cwd"],
            "timeout_seconds": options["timeout"],
            "title": options["title"],
            "labels": options["label"] or None,
        }
        body = _shared.checked(
            inputs.TaskCreate,
            {
                "kind": TaskKind.COMMAND.value,
                **{name: value for name, value in given.items() if value is not None},
            },
        )
        row, _ = task_api.create_task(self.actor, body, owner_id=owner.pk, now=_shared.now())
        if options["json"]:
            self.print_json(payloads.task(row))
        elif options["detach"]:
            self.stdout.write(row.pk)
        else:
            self.stderr.write(f"{row.pk}   {_shared.printable(row.title)}")
            self._attend(row)

    def _attend(self, row: Task) -> None:
        """Follow a command that was started here, and leave with its exit code."""
        asked = False
        pieces = _Pieces(row.pk, 0, say=self._hint)
        while True:
            try:
                for piece in pieces:
                    _write(piece)
                break
            except KeyboardInterrupt:
                self.stderr.write("")
                if not asked and self._wants_it_to_go_on():
                    self.stderr.write(
                        f"It goes on: manage.py task output {row.pk} --follow, or manage.py task kill {row.pk}"
                    )
                    sys.exit(INTERRUPTED)
                asked = True
                # That it has ended meanwhile is what was wanted.
                with _shared.said_plainly(), contextlib.suppress(tasks.TaskOver):
                    transitions.kill_task(
                        task_id=row.pk, actor=self.actor, reason="Killed in the terminal.", now=_shared.now()
                    )
        row.refresh_from_db()
        _report(row, interrupted=asked)

    def _hint(self, text: str) -> None:
        self.stderr.write(self.style.WARNING(text))

    def _wants_it_to_go_on(self) -> bool:
        if not sys.stdin.isatty():
            return False
        try:
            return input("Kill this command? [Y/n] ").strip().lower() in ("n", "no")
        except (KeyboardInterrupt, EOFError):
            self.stderr.write("")
            return False

    # ── list, show ──

    def _list(self, options: dict[str, Any]) -> None:
        try:
            query = inputs.task_query({name: options[name] for name in ("status", "kind", "label")})
        except ApiError as error:
            raise CommandError(error.message) from error
        rows = task_api.found(task_api.rows(), query).select_related("owner", "hook_delivery")
        rows = list(rows.order_by("-created_at", "-pk")[: min(max(1, options["limit"]), inputs.MAX_OFFSET)])
        if options["json"]:
            self.print_json([payloads.task(row) for row in rows])
            return
        for row in rows:
            title = _shared.printable(row.title)[:60]
            self.stdout.write(
                f"{row.pk}  {row.status:<17}  {row.kind:<12}  {row.created_at.astimezone():%Y-%m-%d %H:%M:%S}  {title}"
            )
        if not rows:
            self.stderr.write("No tasks.")

    def _show(self, options: dict[str, Any]) -> None:
        row = _find(options["id"])
        shown = payloads.task_detail(row, row.inputs.defer("sealed").order_by("number"))
        if options["json"]:
            self.print_json(shown)
            return
        for name, value in shown.items():
            if name in ("inputs", "prompt", "hook") or value in (None, [], ""):
                continue
            text = " ".join(map(repr, value)) if isinstance(value, list) else str(value)
            self.stdout.write(f"{name.replace('_', ' '):<18} {_shared.printable(text)}")
        if shown["prompt"] is not None:
            self.stdout.write(f"{'it asks':<18} {_shared.printable(shown['prompt']['text'])}")
            for reply in shown["prompt"]["replies"]:
                self.stdout.write(f"{'':<18} {_shared.printable(reply['label'])}")
        if shown["hook"] is not None:
            self.stdout.write(
                f"{'hook':<18} {_shared.printable(shown['hook']['url'])} ({shown['hook']['state'] or 'when it ends'})"
            )
        for line in shown["inputs"]:
            what = f"{line['kind']}, {line['byte_count']} bytes" if line["byte_count"] else line["kind"]
            self.stdout.write(
                f"{'input ' + str(line['number']):<18} {line['status']} ({what}, {_shared.printable(line['submitted_by'])})"
            )

    # ── input, kill, redeliver ──

    def _input(self, options: dict[str, Any]) -> None:
        row = _find(options["id"])
        body: dict[str, Any]
        if options["keys"] is not None:
            if options["text"] is not None or options["no_enter"]:
                raise CommandError("Either TEXT or --keys.")
            body = {"keys": [key.strip() for key in options["keys"].split(",") if key.strip()]}
        else:
            body = {"text": self._text(row, options["text"]), "submit": not options["no_enter"]}
        kind, content = task_api.content_of(_shared.checked(inputs.TaskInput, body))
        message_id = str(uuid.uuid4())
        line = task_inputs.add_input(
            task_id=row.pk,
            kind=kind,
            content=content,
            submit=body.get("submit", True),
            message_id=message_id,
            actor=self.actor.name,
            now=_shared.now(),
        )
        if options["json"]:
            self.print_json(payloads.task_input(line))
        else:
            self.stdout.write(f"Accepted as input {line.number}. The task takes it when it comes to it.")

    def _text(self, row: Task, given: str | None) -> str:
        secret = (row.prompt or {}).get("kind") == "password"
        if given is not None and given != "-":
            if secret:
                raise CommandError(
                    "The task asks for a password, which is not taken from the command line. Leave TEXT out and be asked, or pipe it in. Change "
                    "it if it was a real one: it is in your shell's history now."
                )
            return given
        if given == "-" or not sys.stdin.isatty():
            return _shared.read_stdin()
        asked = _shared.printable((row.prompt or {}).get("text") or "Input:")
        try:
            return getpass.getpass(f"{asked} ") if secret else input(f"{asked} ")
        except EOFError:
            raise CommandError("Nothing was typed.") from None

    def _kill(self, options: dict[str, Any]) -> None:
        row = transitions.kill_task(
            task_id=_find(options["id"]).pk, actor=self.actor, reason=options["reason"], now=_shared.now()
        )
        if options["json"]:
            self.print_json(payloads.task(row))
        elif row.status == TaskStatus.KILLED:
            self.stdout.write("Killed.")
        else:
            self.stdout.write("Its worker is told to end it.")

    def _redeliver(self, options: dict[str, Any]) -> None:
        row = _find(options["id"])
        hooks.redeliver(task_id=row.pk, actor=self.actor.name, now=_shared.now())
        if options["json"]:
            self.print_json(payloads.task(_find(row.pk)))
        else:
            self.stdout.write("The report is sent again.")

    # ── output ──

    def _output(self, options: dict[str, Any]) -> None:
        row = _find(options["id"])
        query = {"from": options["start"], "tail": options["tail"]}
        try:
            start = inputs.output_place(query).begin(row.output_bytes)
        except ApiError as error:
            raise CommandError(error.message) from error
        try:
            if options["follow"]:
                for piece in _Pieces(row.pk, start):
                    _write(piece)
            else:
                while piece := outputs.read(row.pk, start):
                    _write(piece)
                    start += len(piece)
        except KeyboardInterrupt:
            sys.exit(INTERRUPTED)
        except BrokenPipeError:
            # As every program whose reader has seen enough. Python would complain once more when it flushes at its end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return
        row.refresh_from_db(fields=["output_dropped"])
        if row.output_dropped:
            self.stderr.write(f"{row.output_dropped} more bytes were written, beyond what is kept.")


def _find(task_id: str) -> Task:
    row = task_api.rows().filter(pk=task_id).first()
    if row is None:
        raise CommandError(f"There is no task {task_id!r}. `manage.py task list` shows those that there are.")
    return row


class _Pieces:
    """What a task writes from an offset on, until it has ended. No generator: that would be over once Ctrl-C came while it waited."""

    def __init__(self, task_id: str, offset: int, *, say: Any = None) -> None:
        self._offset = offset
        self._task_id = task_id
        self._say = say
        self._began = time.monotonic()
        self._asked = ""

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        while True:
            size = outputs.sizes([self._task_id]).get(self._task_id)
            if size is None:
                raise CommandError("The task was deleted meanwhile.")
            if self._offset < size.end:
                piece = outputs.read(self._task_id, self._offset)
                self._offset += len(piece)
                return piece
            if size.is_over:
                raise StopIteration
            if self._say is not None:
                self._look(size)
            time.sleep(settings.POLL_SECONDS)

    def _look(self, size: Size) -> None:
        """Whether somebody should know why nothing comes."""
        if size.status == TaskStatus.QUEUED and time.monotonic() - self._began > NO_WORKER_SECONDS:
            self._began = float("inf")
            self._say(
                "Nobody has taken the command yet. Is a worker running? Start one with `manage.py run_worker`."
            )
        if size.status != TaskStatus.WAITING_FOR_INPUT:
            self._asked = ""
        elif self._asked != size.status:
            self._asked = size.status
            self._say(f"\nIt waits for input: manage.py task input {self._task_id}")


def _write(piece: bytes) -> None:
    sys.stdout.buffer.write(piece)
    sys.stdout.buffer.flush()


def _report(row: Task, *, interrupted: bool) -> None:
    """Leave as the command did.

    :raises CommandError: it has no exit code of its own to leave with.
    """
    if row.status == TaskStatus.KILLED:
        if interrupted:
            sys.exit(INTERRUPTED)
        why = f": {row.kill_reason}" if row.kill_reason else ""
        said = _shared.printable(f"The command was killed by {row.kill_requested_by}{why}.")
        raise CommandError(said, returncode=_code(row) or 1)
    code = _code(row)
    if row.status == TaskStatus.FAILED and (code is None or row.error_code not in ("exit_code", "signal")):
        said = _shared.printable(row.error or row.error_code or "It failed.")
        raise CommandError(said, returncode=code or 1)
    if code:
        sys.exit(code)


def _code(row: Task) -> int | None:
    """The exit code as a shell has it; None when there is none."""
    if row.exit_code is not None:
        return row.exit_code
    if row.signal in signal.Signals.__members__:
        return 128 + signal.Signals[row.signal]
    return None
