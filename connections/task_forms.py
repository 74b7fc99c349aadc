"""The forms of tasks on the pages: a new command, and the name and the labels of a task."""

from __future__ import annotations

import re
import shlex
from typing import Any

from django import forms
from django.conf import settings
from rest_framework.exceptions import ValidationError

from connections import commands, hooks, inputs
from connections.models import Task

WORDS, LINES = "words", "lines"
READINGS = [
    (WORDS, "Words, quoted as in a shell"),
    (LINES, "One argument per line, exactly as written"),
]
_PLAIN = {"class": "input", "autocomplete": "off", "autocapitalize": "none", "spellcheck": "false"}
_TYPED = {**_PLAIN, "class": "input mono"}


def read_arguments(text: str, reading: str) -> list[str]:
    """The list of arguments that was typed. No variable, no wildcard, no pipe: nothing in it means anything.

    :raises ValueError: with a sentence, when a quote is not closed.
    """
    text = text.replace("\r\n", "\n")
    if reading == LINES:
        return text.removesuffix("\n").split("\n") if text else []
    try:
        return shlex.split(text)
    except ValueError as error:
        raise ValueError(f"This cannot be read as words: {str(error).lower()}.") from None


def read_labels(text: str) -> list[str]:
    """``nightly, export`` as a list without repetitions.

    :raises ValueError: with a sentence.
    """
    try:
        return inputs.Labels().run_validation([part for part in re.split(r"[,\s]+", text) if part])
    except ValidationError as error:
        raise ValueError(" ".join(str(each) for each in error.detail)) from None


def _checked(read: Any, *args: Any) -> Any:
    try:
        return read(*args)
    except ValueError as error:
        raise forms.ValidationError(str(error)) from None


class TaskName(forms.Form):
    """What can change at any time."""

    title = forms.CharField(
        label="Title",
        max_length=200,
        widget=forms.TextInput(attrs={"class": "input", "autocomplete": "off"}),
    )
    labels = forms.CharField(
        label="Labels",
        required=False,
        max_length=1200,
        help_text="Short words, separated by commas, to find it by",
        widget=forms.TextInput(attrs=_PLAIN),
    )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.label_suffix = ""

    def clean_title(self) -> str:
        title = " ".join(str(self.cleaned_data["title"]).split())
        if not inputs.storable(title):
            raise forms.ValidationError("It may not contain control characters.")
        return title

    def clean_labels(self) -> list[str]:
        return list(_checked(read_labels, self.cleaned_data["labels"]))

    @staticmethod
    def initial_of(task: Task) -> dict[str, Any]:
        return {"title": task.title, "labels": ", ".join(task.labels)}


class NewCommand(TaskName):
    """A command to run. What may be run at all is decided by ``commands.prepare``."""

    field_order = [
        "template",
        "command",
        "reading",
        "cwd",
        "title",
        "labels",
        "timeout_minutes",
        "hook_url",
        "hook_secret",
    ]

    title = forms.CharField(
        label="Title",
        required=False,
        max_length=200,
        help_text="Without one, the command itself",
        widget=forms.TextInput(attrs={"class": "input", "autocomplete": "off"}),
    )
    template = forms.ChoiceField(
        label="Template", required=False, widget=forms.Select(attrs={"class": "input"})
    )
    command = forms.CharField(
        label="Command",
        required=False,
        strip=False,
        max_length=100_000,
        widget=forms.Textarea(attrs={**_TYPED, "rows": "3", "data-argv": ""}),
    )
    reading = forms.ChoiceField(
        label="Read as", choices=READINGS, initial=WORDS, widget=forms.RadioSelect(attrs={"data-argv": ""})
    )
    cwd = forms.CharField(
        label="Folder",
        required=False,
        max_length=4000,
        help_text="One of the allowed folders, or one below",
        widget=forms.TextInput(attrs={**_TYPED, "list": "folders"}),
    )
    timeout_minutes = forms.IntegerField(
        label="Time limit in minutes",
        required=False,
        min_value=1,
        max_value=30 * 24 * 60,
        widget=forms.NumberInput(attrs={"class": "input short", "inputmode": "numeric"}),
    )
    hook_url = forms.CharField(
        label="Hook",
        required=False,
        max_length=2000,
        help_text="An address that is told when the task has ended",
        widget=forms.TextInput(attrs={**_PLAIN, "inputmode": "url"}),
    )
    hook_secret = forms.CharField(
        label="Secret of the hook",
        required=False,
        max_length=120,
        help_text="The report is signed with it. Copy it to the receiver now: it is not shown again.",
        widget=forms.TextInput(attrs=_TYPED),
    )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        template: Any = self.fields["template"]
        names = sorted(settings.COMMAND_TEMPLATES)
        only_templates = settings.COMMANDS == "templates"
        template.choices = [
            *([] if only_templates else [("", "None: the command below")]),
            *((name, settings.COMMAND_TEMPLATES[name]["title"] or name) for name in names),
        ]
        command: Any = self.fields["command"]
        if not names:
            del self.fields["template"]
            command.required = True
        else:
            command.help_text = "With a template: the arguments behind its own, where it takes any."
        self.fields["cwd"].initial = "" if only_templates else str(settings.COMMAND_DIRECTORIES[0])
        self.fields["timeout_minutes"].help_text = f"At most {max(1, settings.COMMAND_SECONDS // 60)}"
        self.fields["hook_secret"].initial = hooks.new_secret()

    def clean_title(self) -> str:
        return super().clean_title() if self.cleaned_data["title"] else ""

    def clean_hook_url(self) -> str:
        text = self.cleaned_data["hook_url"].strip()
        return str(_checked(inputs.normal_url, text)) if text else ""

    def clean_hook_secret(self) -> str:
        text = self.cleaned_data["hook_secret"].strip()
        return str(_checked(hooks.checked_secret, text)) if text else ""

    def clean(self) -> dict[str, Any]:
        found: dict[str, Any] = super().clean() or self.cleaned_data
        if "command" in found:
            try:
                found["argv"] = read_arguments(found["command"], found.get("reading", WORDS))
            except ValueError as error:
                self.add_error("command", str(error))
        if found.get("hook_url") and not found.get("hook_secret") and "hook_secret" not in self.errors:
            self.add_error("hook_secret", "A hook needs a secret.")
        return found

    @property
    def more_open(self) -> bool:
        """Whether something stands, or is wrong, in the fields that are folded away."""
        names = ("timeout_minutes", "hook_url")
        return (
            any(self[name].value() or name in self.errors for name in names) or "hook_secret" in self.errors
        )

    def prepare(self, principal: Any) -> commands.Command:
        """The command that the cleaned values ask for.

        :raises NotAllowed: the caller may not.
        :raises InvalidCommand: it cannot be run.
        """
        values = self.cleaned_data
        minutes = values["timeout_minutes"]
        return commands.prepare(
            principal=principal,
            argv=values["argv"],
            template=values.get("template") or None,
            cwd=values["cwd"].strip() or None,
            title=values["title"] or None,
            timeout_seconds=minutes * 60 if minutes else None,
        )

    def refuse(self, error: commands.InvalidCommand) -> None:
        """Say what cannot be run beside the field that it is in."""
        field = {"argv": "command"}.get(error.field, error.field)
        self.add_error(field if field in self.fields else None, str(error))

    @staticmethod
    def initial_again(task: Task) -> dict[str, Any]:
        """The same once more. The secret of its hook is not known to anybody here, so the hook is not taken over."""
        argv, template = list(task.spec.get("argv") or ()), task.spec.get("template") or ""
        if template in settings.COMMAND_TEMPLATES:
            argv = argv[len(settings.COMMAND_TEMPLATES[template]["argv"]) :]
        else:
            template = ""
        whole = shlex.join(argv)
        own_title = task.title if task.title != " ".join(task.spec.get("argv") or ())[:200] else ""
        return {
            "template": template,
            "command": whole,
            "reading": WORDS,
            "cwd": task.spec.get("cwd") or "",
            "title": own_title,
            "labels": ", ".join(task.labels),
            "timeout_minutes": max(1, task.timeout_seconds // 60) if task.timeout_seconds else None,
        }
