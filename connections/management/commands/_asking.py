"""Asking a person in the terminal what a web site asks: values, secrets without echo, choices by number."""

from __future__ import annotations

import dataclasses
import getpass
from collections.abc import Callable, Mapping
from typing import Any

from django.core.management.base import CommandError

from connections.models import LoginFlow
from connections.transitions import SubmittedAnswer

Json = Mapping[str, Any]

#: Types of fields whose value must not be seen: not on the screen, not in the shell's history, not in the list of processes.
SECRET_TYPES = frozenset({"password", "totp_secret"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Interaction:
    """What is being asked, copied from the flow so that the flow may move on while somebody types."""

    id: str
    fields: list[Json]
    choices: list[Json]
    website_error: str = ""


def interaction_of(flow: LoginFlow) -> Interaction | None:
    """The open question of a flow, None when there is none."""
    if not flow.interaction_id:
        return None
    return Interaction(
        id=flow.interaction_id,
        fields=list(flow.fields),
        choices=list(flow.choices),
        website_error=flow.website_error,
    )


def is_secret(field: Json) -> bool:
    return field.get("type") in SECRET_TYPES


def prompt_of(field: Json) -> str:
    """``Password (rejected by the site): ``"""
    notes = []
    if field.get("reason") == "rejected":
        notes.append("rejected by the site")
    if field.get("hint"):
        notes.append(str(field["hint"]))
    if not field.get("required", True):
        notes.append("optional")
    return str(field["label"]) + (f" ({'; '.join(notes)})" if notes else "") + ": "


def ask_field(field: Json) -> str:
    """The value of one field; asked again while a required one is empty."""
    while True:
        value = getpass.getpass(prompt_of(field)) if is_secret(field) else input(prompt_of(field))
        if value.strip() or not field.get("required", True):
            return value


def choice_line(number: int, choice: Json) -> str:
    extra = choice.get("masked_destination") or choice.get("description")
    return f"  {number}) {choice['label']}" + (f"   {extra}" if extra else "")


def ask(question: Interaction, say: Callable[[str], Any]) -> SubmittedAnswer:
    """Put the question; values and choices come back by their ids.

    :raises EOFError: there is nobody to ask (standard input ended).
    """
    choice_id: str | None = None
    if question.choices:
        for number, choice in enumerate(question.choices, start=1):
            say(choice_line(number, choice))
        instead = " (Enter: fill in the form)" if question.fields else ""
        while True:
            raw = input(f"Choose 1 to {len(question.choices)}{instead}: ").strip()
            if not raw and question.fields:
                break
            found = pick_choice(question, raw)
            if found is not None:
                choice_id = found
                break
            say("That is not one of the numbers.")
    if choice_id is not None:
        return SubmittedAnswer(interaction_id=question.id, choice_id=choice_id)
    values = {str(field["id"]): ask_field(field) for field in question.fields}
    return SubmittedAnswer(
        interaction_id=question.id, field_values={name: value for name, value in values.items() if value}
    )


def pick_choice(question: Interaction, raw: str) -> str | None:
    """The id of a choice named by its number or id; None when there is no such choice."""
    if raw.isdigit() and 1 <= int(raw) <= len(question.choices):
        return str(question.choices[int(raw) - 1]["id"])
    return next((str(choice["id"]) for choice in question.choices if choice["id"] == raw), None)


def field_named(question: Interaction, name: str) -> Json:
    """A field by its id or by the name that it is saved under.

    :raises CommandError: it is not being asked for.
    """
    for field in question.fields:
        if name in (field["id"], field["ref"]):
            return field
    asked = ", ".join(str(field["ref"]) for field in question.fields) or "nothing to fill in"
    raise CommandError(f"The site does not ask for {name!r}. It asks for: {asked}.")
