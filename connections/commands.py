"""What may be run: by whom, as what, where. The last word before a command becomes a task.

``COMMANDS`` says it for the installation: ``off``, ``templates`` (only what ``COMMAND_TEMPLATES`` names) or ``any``. A command is a list of
arguments and never a line for a shell. Its folder is one of ``COMMAND_DIRECTORIES`` or below one; where the path really leads is looked at once
more when it starts (``runners/command.py``), for links change.
"""

from __future__ import annotations

import dataclasses
import os.path
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from django.conf import settings

from connections.access import Principal

Json = dict[str, Any]

#: The size of a terminal that nobody has given another one.
ROWS, COLS = 24, 80


class NotAllowed(Exception):
    """This caller may run no commands, or the installation runs none. The text is fit to be shown."""


class InvalidCommand(Exception):
    """What is asked for cannot be run. ``field`` is the member that is wrong; the text is fit to be shown."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """A command that may be run: the ``spec`` of its task, its title and its limit of time in seconds."""

    spec: Json
    title: str
    timeout_seconds: int


def check_right(principal: Principal) -> None:
    """Whether this caller may run commands at all, and type into those that run.

    :raises NotAllowed: otherwise.
    """
    if settings.COMMANDS == "off":
        raise NotAllowed("Commands are switched off on this installation (COMMANDS).")
    if not principal.runs_commands:
        raise NotAllowed("Running commands needs the permission to run commands.")


def prepare(
    *,
    principal: Principal,
    argv: Sequence[str] | None = None,
    template: str | None = None,
    cwd: str | None = None,
    title: str | None = None,
    timeout_seconds: int | None = None,
    rows: int | None = None,
    cols: int | None = None,
) -> Command:
    """The command that is asked for, checked. With ``template``, ``argv`` are the arguments behind the template's own, where it takes any.

    :raises NotAllowed: the caller may not.
    :raises InvalidCommand: it cannot be run.
    """
    check_right(principal)
    if template is not None:
        named: Json | None = settings.COMMAND_TEMPLATES.get(template)
        if named is None:
            known = ", ".join(sorted(settings.COMMAND_TEMPLATES)) or "none"
            raise InvalidCommand("template", f"There is no such template. Known are: {known}.")
        if argv and not named["arguments"]:
            raise InvalidCommand("argv", "This template takes no arguments.")
        whole = [*named["argv"], *(argv or ())]
        cwd = cwd or named["cwd"]
        title = title or named["title"] or template
        longest = named["timeout_seconds"] or settings.COMMAND_SECONDS
    else:
        if settings.COMMANDS == "templates":
            raise InvalidCommand("template", "Only the commands of templates may be run here.")
        if not argv:
            raise InvalidCommand("argv", "Say what to run: argv or template.")
        whole = list(argv)
        longest = settings.COMMAND_SECONDS
    if not whole[0]:
        raise InvalidCommand("argv", "The first argument names the program; it must not be empty.")
    if any("\0" in argument for argument in whole):
        raise InvalidCommand("argv", "An argument cannot hold the character NUL.")
    spec = {
        "argv": whole,
        "cwd": allowed_directory(cwd),
        "template": template or "",
        "rows": rows or ROWS,
        "cols": cols or COLS,
    }
    return Command(
        spec=spec,
        title=(title or " ".join(whole))[:200],
        timeout_seconds=min(timeout_seconds or longest, longest),
    )


def check_still(spec: Json) -> None:
    """Whether a command that has waited in the queue may still be run: the settings may be others by now.

    :raises NotAllowed: it is neither of a template as it is today, nor may any command be run.
    """
    if settings.COMMANDS == "any" and not spec.get("template"):
        return
    named: Json | None = settings.COMMAND_TEMPLATES.get(spec.get("template", ""))
    if settings.COMMANDS == "off" or named is None:
        raise NotAllowed("This command is not among those that may be run any more.")
    own, arguments = spec["argv"][: len(named["argv"])], spec["argv"][len(named["argv"]) :]
    if own != list(named["argv"]) or (arguments and not named["arguments"]):
        raise NotAllowed("The template of this command is another by now.")


def allowed_directory(cwd: str | None) -> str:
    """The folder to run in, as a plain absolute path; without one, the first that is allowed.

    :raises InvalidCommand: it is neither one of ``COMMAND_DIRECTORIES`` nor below one.
    """
    allowed = settings.COMMAND_DIRECTORIES
    if not cwd:
        return str(allowed[0])
    wanted = os.path.normpath(cwd)
    if "\0" in cwd or not os.path.isabs(wanted):
        raise InvalidCommand("cwd", "The folder must be an absolute path.")
    if not any(is_below(wanted, str(folder)) for folder in allowed):
        raise InvalidCommand("cwd", "This folder is not one of those that commands may run in.")
    return wanted


def is_below(path: str, folder: str) -> bool:
    """Whether ``path`` is ``folder`` or below it. Both absolute; no link is followed."""
    return Path(path) == Path(folder) or Path(folder) in Path(path).parents
