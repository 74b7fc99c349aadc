"""The pages of tasks: the list, one task with its output, a new command. Thin, as ``views.py``: parse, one verb, show."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

from django.conf import settings
from django.contrib import messages
from django.core.paginator import Paginator
from django.db.models import QuerySet
from django.http import HttpResponse, StreamingHttpResponse
from django.shortcuts import redirect

from connections import (
    access,
    commands,
    errors,
    fragments,
    hooks,
    inputs,
    outputs,
    task_api,
    task_forms,
    task_inputs,
    task_picture,
    task_streams,
    tasks,
    transitions,
)
from connections.access import Forbidden, NotFound, Principal
from connections.errors import ApiError
from connections.models import Task
from connections.states import InputKind, TaskKind, TaskStatus
from connections.terminal.ansi import plain
from connections.views import PER_PAGE, Done, Visit, message_id_of, notice, once, page, query_without

#: Why something that was sent to a task is not accepted.
INPUT_REFUSED = (
    ApiError,
    tasks.TaskOver,
    task_inputs.TakesNoInput,
    task_inputs.InputQueueFull,
    task_inputs.MessageConflict,
)

#: As many bytes of output stand in the page itself, for browsers that run no script, and until the script has fetched more.
SHOWN_BYTES = 16_384
#: Buttons that press a key: the name (``terminal/keys.py``), what stands on it, and what it usually does.
KEY_BUTTONS = [
    ("ctrl-c", "Ctrl-C", "interrupt"),
    ("ctrl-d", "Ctrl-D", "end of input"),
    ("enter", "Enter", ""),
    ("escape", "Esc", ""),
    ("tab", "Tab", ""),
    ("up", "↑", "up"),
    ("down", "↓", "down"),
    ("left", "←", "left"),
    ("right", "→", "right"),
]  # fmt: skip


# ── The list ──────────────────────────────────────────────────────────────────────────────────────────────────────


@page("GET")
def task_list(visit: Visit) -> HttpResponse:
    q, status, kind, label, owner = (visit.param(name) for name in ("q", "status", "kind", "label", "owner"))
    rows: QuerySet[Task] = Task.objects.visible_to(visit.principal).select_related("owner")
    owners = sorted(set(rows.order_by().values_list("owner__username", flat=True).distinct()))
    statuses = task_picture.OPEN if status == "open" else {status} & set(TaskStatus.values)
    wanted = inputs.TaskQuery(
        statuses=frozenset(statuses), kind=kind, text=q, label=label, parent_id="", connection_id=""
    )
    rows = task_api.found(rows, wanted)
    if owner:
        rows = rows.filter(owner__username=owner)
    shown = Paginator(rows.order_by("-created_at", "-id"), PER_PAGE).get_page(visit.request.GET.get("page"))
    return visit.page(
        "tasks.html",
        {
            "section": "tasks",
            "items": [task_picture.picture(row) for row in shown.object_list],
            "page": shown,
            "query": query_without(visit, "page"),
            "q": q,
            "status": status,
            "kind": kind,
            "label": label,
            "owner": owner,
            "owners": owners,
            "statuses": [("open", "Not over"), *TaskStatus.choices],
            "kinds": [(name, _kind_label(name)) for name in task_picture.kinds_of(visit.principal)],
            "filtered": bool(q or status or kind or label or owner),
            "may_run": may_run(visit.principal),
        },
    )


def _kind_label(kind: str) -> str:
    return str(TaskKind(kind).label) if kind in TaskKind.values else kind


def may_run(principal: Principal) -> bool:
    """Whether this caller may run commands at all."""
    try:
        commands.check_right(principal)
    except commands.NotAllowed:
        return False
    return True


# ── A new command ─────────────────────────────────────────────────────────────────────────────────────────────────


@page("GET", "POST")
def task_new(visit: Visit) -> HttpResponse:
    """A command to run. ``again``: the id of one whose values are filled in."""
    try:
        commands.check_right(visit.principal)
    except commands.NotAllowed as error:
        context = {"title": "Not allowed", "text": str(error), "back": "/tasks", "section": "tasks"}
        return visit.page("message.html", context, status=403)
    owner_id = visit.principal.user_id
    if owner_id is None:
        raise Forbidden
    if visit.request.method != "POST":
        initial = None
        if again := visit.param("again"):
            row = access.visible(visit.principal, Task.objects.filter(kind=TaskKind.COMMAND), again)
            initial = task_forms.NewCommand.initial_again(row)
        return _new_form(visit, task_forms.NewCommand(initial=initial))
    form = task_forms.NewCommand(visit.request.POST)
    if not form.is_valid():
        return _new_form(visit, form, status=400)
    try:
        command = form.prepare(visit.principal)
    except commands.InvalidCommand as error:
        form.refuse(error)
        return _new_form(visit, form, status=400)
    done = once(visit, lambda: _create(visit, owner_id, form, command))
    if done.status >= 400:
        form.add_error(None, done.text)
        return _new_form(visit, form, status=done.status)
    return redirect("task", done.text)


def _create(visit: Visit, owner_id: int, form: task_forms.NewCommand, command: commands.Command) -> Done:
    """The text of what comes out is the id of the new task."""
    values = form.cleaned_data
    try:
        row = tasks.create(
            owner_id=owner_id,
            kind=TaskKind.COMMAND,
            title=command.title,
            spec=command.spec,
            labels=values["labels"],
            timeout_seconds=command.timeout_seconds,
            hook_url=values["hook_url"],
            hook_secret=values["hook_secret"] if values["hook_url"] else "",
            actor=visit.principal.name,
            now=visit.now,
        )
    except tasks.NoCapacity as error:
        return Done(status=429, text=f"{error} Nothing was started; please try again when one has ended.")
    return Done(status=201, text=row.id)


def _new_form(visit: Visit, form: task_forms.NewCommand, *, status: int = 200) -> HttpResponse:
    """``argv`` is what would be run, as far as it can be told from what was typed."""
    context = {
        "section": "tasks",
        "form": form,
        "folders": settings.COMMAND_DIRECTORIES,
        "argv": _argv_of(form),
        # Whatever was refused may be sent again, and is another message then.
        "message_id": uuid.uuid4(),
    }
    return visit.page("task_form.html", context, status=status)


def _argv_of(form: task_forms.NewCommand) -> list[str]:
    try:
        return task_forms.read_arguments(
            str(form["command"].value() or ""), str(form["reading"].value() or "")
        )
    except ValueError:
        return []


@page("POST")
def task_argv(visit: Visit) -> HttpResponse:
    """How what is being typed would be read: a part of the form of a new command."""
    sent = visit.request.POST
    argv, problem = [], ""
    try:
        argv = task_forms.read_arguments(sent.get("command", "")[:100_000], sent.get("reading", ""))
    except ValueError as error:
        problem = str(error)
    return visit.part("task_argv.html", {"argv": argv, "problem": problem})


# ── One task ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _visible(visit: Visit, task_id: str) -> Task:
    row: Task = access.visible(visit.principal, fragments.TASK_ROWS, task_id)
    return row


def _operable(visit: Visit, task_id: str) -> Task:
    row: Task = access.operable(visit.principal, Task.objects, task_id)
    return row


@page("GET")
def task_detail(visit: Visit, task_id: str) -> HttpResponse:
    """``at``: the offset that the output is shown from; without, its end."""
    row = _visible(visit, task_id)
    may_act = visit.principal.may_operate(row.owner_id)
    may_type = task_picture.may_type(visit.principal, row)
    return visit.page(
        "task.html",
        {
            "section": "tasks",
            "may_act": may_act,
            "may_type": may_type,
            "may_send": may_type and not row.is_over,
            "may_run": row.kind == TaskKind.COMMAND and may_run(visit.principal),
            "keys": KEY_BUTTONS,
            # Of this page as it was loaded: sent twice, by a double click or by the browser itself, it is one message.
            "message_id": uuid.uuid4(),
            "output": _shown_output(row, visit.param("at")),
            **fragments.task_context(row),
        },
    )


def _shown_output(task: Task, at: str) -> dict[str, Any]:
    """A part of the output as text: from the offset ``at`` on, or the last one. Begins and ends with whole lines where it can."""
    end = task.output_bytes
    pinned = at.isascii() and at.isdigit() and len(at) < 16
    start = min(int(at), end) if pinned else max(0, end - SHOWN_BYTES)
    data = outputs.read(task.id, start, SHOWN_BYTES)
    if start and not pinned and (line := data.find(b"\n") + 1):
        start, data = start + line, data[line:]
    through = start + len(data)
    if through < end and (line := data.rfind(b"\n") + 1):
        through, data = start + line, data[:line]
    text, _ = plain(data, final=True)
    return {
        "pinned": pinned,
        "at": start,
        "through": through,
        "end": end,
        "text": _overwritten(text),
        "earlier": max(0, start - SHOWN_BYTES) if start else None,
        "later": through if through < end else None,
    }


def _overwritten(text: str) -> str:
    """Without script there is no terminal: of a line that was written over (a progress bar) the last writing is shown."""
    lines = (line.rstrip("\r") for line in text.split("\n"))
    return "\n".join(line.rpartition("\r")[2] for line in lines)


@page("GET")
def task_download(visit: Visit, task_id: str) -> StreamingHttpResponse:
    """All of the output as it is now, byte for byte."""
    row = _visible(visit, task_id)
    return StreamingHttpResponse(
        task_streams.whole(row.id, row.output_bytes),
        content_type="application/octet-stream",
        headers={
            "Content-Disposition": f'attachment; filename="{row.id}.log"',
            "Content-Length": str(row.output_bytes),
        },
    )


# ── Acting on a task ──────────────────────────────────────────────────────────────────────────────────────────────


def _acted(visit: Visit, task_id: str, act: Callable[[], Done]) -> HttpResponse:
    """Act once, then show what came of it: the parts as they are now; without script, the page they are on."""
    done = once(visit, act)
    if visit.by_script:
        row = fragments.present_task(task_id)
        parts = fragments.task_parts(row) if row is not None and done.fresh else ""
        if done.text:
            return notice(done.text, status=done.status, parts=parts)
        return HttpResponse(parts)
    if done.text:
        (messages.error if done.status >= 400 else messages.success)(visit.request, done.text)
    return redirect(_back(visit, task_id))


def _back(visit: Visit, task_id: str) -> str:
    # The home page's forms come back to the home page. Only these two places have forms, so no URL is taken from the request.
    referer = visit.request.headers.get("Referer", "")
    return "/" if referer == visit.request.build_absolute_uri("/") else f"/tasks/{task_id}"


@page("POST")
def task_input(visit: Visit, task_id: str) -> HttpResponse:
    """A line or keys, from a form of a browser that runs no script. With script they go to the API."""
    try:
        row = task_api.typeable(visit.principal, task_id)
    except commands.NotAllowed:
        raise Forbidden(task_id) from None
    sent = visit.request.POST
    message_id = message_id_of(visit) or str(uuid.uuid4())
    # A form without the box for it types with Enter.
    submit = "enter" in sent.getlist("submit") or "submit" not in sent

    def act() -> Done:
        try:
            kind = InputKind.KEYS if "keys" in sent else InputKind.TEXT
            if kind == InputKind.KEYS:
                body: dict[str, Any] = {"keys": sent["keys"].split(",")}
            else:
                # Forms are sent with the line ends of the web's first days.
                body = {"text": sent.get("text", "").replace("\r\n", "\n")}
            content = inputs.checked(inputs.TaskInput, body)[kind.value]
            task_inputs.add_input(
                task_id=row.id,
                kind=kind,
                content=content,
                submit=submit,
                message_id=message_id,
                sender=visit.principal.user_id,
                actor=visit.principal.name,
                now=visit.now,
            )
        except INPUT_REFUSED as error:
            known = errors.translate(error)
            return Done(status=known.status, text=known.message, fresh=False)
        return Done(
            text="The line was accepted." if kind == InputKind.TEXT else "It was accepted.", fresh=False
        )

    return _acted(visit, row.id, act)


@page("POST")
def task_kill(visit: Visit, task_id: str) -> HttpResponse:
    row = _operable(visit, task_id)
    reason = visit.request.POST.get("reason", "").replace("\0", "").strip()[:500]

    def act() -> Done:
        try:
            transitions.kill_task(task_id=row.id, actor=visit.principal, reason=reason, now=visit.now)
        except tasks.TaskOver as error:
            return Done(status=409, text=f"It is over already: {TaskStatus(error.present).label.lower()}.")
        return Done()

    return _acted(visit, row.id, act)


@page("POST")
def task_redeliver(visit: Visit, task_id: str) -> HttpResponse:
    row = _operable(visit, task_id)

    def act() -> Done:
        try:
            hooks.redeliver(task_id=row.id, actor=visit.principal.name, now=visit.now)
        except hooks.NoHook:
            return Done(status=409, text="There is no report to send.")
        return Done()

    return _acted(visit, row.id, act)


@page("GET", "POST")
def task_edit(visit: Visit, task_id: str) -> HttpResponse:
    row = _operable(visit, task_id)
    form = task_forms.TaskName(visit.request.POST or None, initial=task_forms.TaskName.initial_of(row))
    if visit.request.method == "POST" and form.is_valid():
        tasks.update(
            task_id=row.id,
            title=form.cleaned_data["title"],
            labels=form.cleaned_data["labels"],
            actor=visit.principal.name,
            now=visit.now,
        )
        return redirect("task", row.id)
    context = {"section": "tasks", "form": form, "task": row}
    return visit.page("task_edit.html", context, status=400 if form.errors else 200)


@page("GET", "POST")
def task_delete(visit: Visit, task_id: str) -> HttpResponse:
    row = _operable(visit, task_id)
    if visit.request.method == "POST":
        try:
            tasks.delete(task_id=row.id, actor=visit.principal.name, now=visit.now)
        except Task.DoesNotExist:
            raise NotFound(task_id) from None
        except tasks.NotOver:
            messages.error(visit.request, "It is not over yet. Stop it first.")
            return redirect("task", row.id)
        messages.success(visit.request, f"{row.title} was deleted.")
        return redirect("tasks")
    return visit.page("task_delete.html", {"section": "tasks", "task": row})
